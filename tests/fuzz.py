"""Odd records through odd chat templates, and damaged tokenizers: what comes out is sound.

    python tests/fuzz.py --count 20000 --seed 1

prints how many inputs were taken, what the others were refused for, and the longest time that one
took; exit code 1 if one broke a rule. A rule that breaks names the input's number and the seed.
"""
import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from backbones.text import ChatData, Tokenizer, chat_turns
from backbones.tiny import MERGING_TEMPLATE, TEMPLATE, TOKENIZERS
from data import collate
from paper.harness import ChatPrompt, Harness

VOCAB = 320  # of the model

# ---- Records ------------------------------------------------------------------------------------

NAMES = ["<|mask|>", "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<role>", "</role>", "<|end|>",
         "<|role_end|>", "<|mdm_mask|>", "[MASK]"]
BITS = ["a", " ", "  ", "\n", "\n\n", "\t", "\r\n", " the", "the", " B", "in", "0", "12345", ".",
        "'s", "é", "e\u0301", "ﬁ", "中文", "😀", "👩‍👩‍👧", "\u200d", "\ufeff", "\u2028",
        "\x00", "\x1b[31m", "\x7f", "\ue000", "\uffff", "\ud83d", "\udc00",
        "{{ 7 * 7 }}", "{% endfor %}", "\\u0000",
        "\\ud83d", "&lt;", "<", "|", ">", "＜|mask|＞", "<|ma", "sk|>", "\u202e", "ﷺ"]
ROLES = ["user", "assistant", "system", "human", "gpt", "tool", "", None, 3]


def make_text(rng, longest=12):
    """A random text; at times a name of a special token, in whole or in parts, or a long one."""
    kind = rng.random()
    if kind < 0.02:
        return rng.choice(["", " ", "\n", None, 3, [], {}])
    bits = BITS if kind < 0.6 else [bit for bit in BITS if bit.isalnum() or bit.isspace()]
    if rng.random() < 0.9:
        bits = [bit for bit in bits if bit not in ("\ud83d", "\udc00")]
    text = "".join(rng.choice(bits) for _ in range(rng.randint(1, longest)))
    if kind < 0.12:
        at = rng.randint(0, len(text))
        text = text[:at] + rng.choice(NAMES) + text[at:]
    return text * rng.choice([100, 3000]) if kind > 0.99 else text


def make_record(rng):
    """A record of a data file: often sound, often with turns in an odd order."""
    if rng.random() < 0.4:
        ask, reply = rng.choice([("prompt", "response"), ("question", "answer"),
                                 ("instruction", "output"), ("prompt", "completion")])
        return {ask: make_text(rng), reply: make_text(rng)}
    if rng.random() < 0.1:
        return {"text": make_text(rng)}
    odd = rng.random() < 0.3
    roles = [rng.choice(ROLES) for _ in range(rng.randint(0, 6))] if odd else [
        *["system"] * rng.randint(0, 1), *["user", "assistant"] * rng.randint(1, 3)]
    who, what = rng.choice([("role", "content"), ("from", "value")])
    key = "messages" if who == "role" else "conversations"
    return {key: [{who: role, what: make_text(rng)} for role in roles]}


# ---- Chat templates -----------------------------------------------------------------------------

EACH = "{% for m in messages %}"
ASK = "{% if add_generation_prompt %}"
IM, ROLE = "<|im_start|>{{ m['role'] }}\n", "<role>{{ m['role'] }}</role>"
# Of each tokenizer's marks: what opens a turn, what ends it, and what opens the assistant's.
SHAPES = {"bytes": (ROLE, "<|role_end|>", "<role>assistant</role>", TEMPLATE),
          "merging": (IM, "<|im_end|>\n", "<|im_start|>assistant\n", MERGING_TEMPLATE)}


def templates_of(kind):
    """Templates of published shapes, and some that go wrong, with the marks of a tokenizer."""
    start, end, ask, own = SHAPES[kind]
    close = f"{end}{{% endfor %}}{ASK}{ask}{{% endif %}}"
    turn = start + "{{ m['content'] }}"
    refuse = "{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    return {
        "own": own,
        "plain": EACH + turn + close,
        "strips": EACH + start + "{{ m['content'] | trim }}" + close,
        "no system": EACH + refuse + turn + close,
        "usual system": start.replace("{{ m['role'] }}", "system") + "Be kind." + end + EACH + turn
        + close,
        "alternates": EACH + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}" + turn + close,
        "first system": "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n"
        "{% set messages = messages[1:] %}{% endif %}" + EACH + turn + close,
        "always asks": EACH + turn + end + "{% endfor %}" + ask,
        "no end": EACH + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + ASK
        + "assistant: {% endif %}",
        "space before": EACH + start + " {{ m['content'] }}" + close,
        "thinks": EACH + turn + close.replace("{% endif %}", "<think>{% endif %}"),
        "shortens": EACH + start + "{{ m['content'][:5] }}" + close,
        "shouts": EACH + start + "{{ m['content'] | upper }}" + close,
        "json": EACH + start + "{{ m['content'] | tojson }}" + close,
        "twice": EACH + turn + end + turn + close,
        "divides": EACH + "{{ 1 // (m['content'] | length - 3) }}" + turn + close,
        "says more": EACH + turn + close + "{% if messages[-1]['role'] == 'assistant' %}" + ask
        + "more" + end + "{% endif %}",
        "recurses": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}" + EACH
        + "{% if 'z' in m['content'] %}{{ f(0) }}{% endif %}" + turn + close,
        "not a program": EACH + turn,
        "no such thing": EACH + "{{ m.nothing.at_all }}" + turn + close,
        "powers": EACH + "{{ 10 ** 10 ** 10 }}" + turn + close,
        "writes masks": EACH + turn + "<|mask|>" + close,
        "empty": "",
    }


# These take their three seconds. They have a run of their own.
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "grows": "{{ 'a' * 20000000000 }}", "long": "{{ 'a' * 500000000 }}",
    "joins": "{% set s = namespace(a='aaaaaaaa') %}{% for i in range(60) %}"
             "{% set s.a = s.a + s.a %}{% endfor %}",
}


# ---- What must hold -----------------------------------------------------------------------------

class Log:
    """What came of the inputs: counts, kinds of refusals, and the longest time of one."""

    def __init__(self):
        self.counts, self.refusals, self.longest, self.slowest = Counter(), Counter(), 0.0, ""

    def try_input(self, name, function, *arguments):
        """function(*arguments), or None if it is refused in one line."""
        start = time.perf_counter()
        try:
            result = function(*arguments)
        except ValueError as error:
            line = str(error)
            assert line and "\n" not in line and len(line) < 1500, (name, line)
            self.counts["refused"] += 1
            # Names, numbers and what is quoted differ from one refusal to the next.
            kind = re.sub(r"'.*'|\".*\"|/\S+|\d+", "_", line.split(": ")[-1])[:70]
            self.refusals[kind] += 1
            return None
        except BaseException as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
        finally:
            took = time.perf_counter() - start
            if took > self.longest:
                self.longest, self.slowest = took, name
        self.counts["taken"] += 1
        return result

    def report(self):
        lines = [f"{number:8}  {kind}" for kind, number in self.refusals.most_common(40)]
        lines += [f"{number:8}  {name}" for name, number in self.counts.items()]
        return "\n".join(lines + [f"the longest took {self.longest:.2f} s: {self.slowest}"])


def meaning_of(tokenizer):
    """The ids that no text of a user may hold."""
    return {tokenizer.mask_id, *tokenizer.stop_ids}


def check_sample(tokenizer, turns, prompt, reply, shape):
    """What holds of every sample: its ids, its text, and its end."""
    assert all(type(i) is int and 0 <= i < VOCAB for i in prompt + reply)
    assert reply and reply[-1] in tokenizer.stop_ids or shape == "writes masks"
    said = [i for i in reply if i not in tokenizer.stop_ids]
    assert len(said) >= len(reply) - 1, "an end within the reply"
    if shape != "writes masks":
        assert tokenizer.mask_id not in prompt + reply
    text, content = tokenizer.decode(said), turns[-1]["content"].replace("\ue000", "")
    templated = tokenizer.templated and len(turns) > 1  # one turn is plain text
    if any(name in content for name in tokenizer.hf.all_special_tokens):
        assert not meaning_of(tokenizer) & set(said)  # it is skipped when decoded
        return
    if not templated or shape in ("own", "plain", "no system", "alternates", "says more",
                                  "usual system", "divides"):
        assert text == content, "the reply's tokens are another text"
    if shape == "always asks":  # Jinja drops the line's end behind this prompt, so the reply has it
        assert text in (content, "\n" + content)
    if shape == "strips" and templated:
        assert text == content.strip() or "\ue000" in turns[-1]["content"]
    if not templated:
        return
    # The prompt is read apart, as it is when the reply is not there yet. Together they are the
    # rendering, up to the end of the reply.
    if turns[-2]["role"] != "assistant":
        assert prompt == tokenizer.chat(turns[:-1])[0], "another prompt without the reply"
    whole = tokenizer.hf.decode(tokenizer.encode(tokenizer.render(turns)))
    assert whole.startswith(tokenizer.hf.decode(prompt + reply)), "not what was rendered"


def check_prompt(tokenizer, ids, content):
    """What holds of a user's prompt in generate.py."""
    assert all(0 <= i < VOCAB for i in ids) and tokenizer.mask_id not in ids


def make_harness(tokenizer):
    """The text side of the harness's model, without a model behind it."""
    harness = Harness.__new__(Harness)
    harness.tokenizer, harness.data = tokenizer, SimpleNamespace(tokenizer=tokenizer)
    harness.template, harness.left_out, harness.max_length = None, True, 0
    harness.start_counting()
    return harness


def check_harness(harness, turns):
    """A chat and a bare text of a task: no mask and no end comes from a user's text."""
    tokenizer = harness.tokenizer
    bare = harness.encode_prompt(turns[0]["content"], 8)
    assert not meaning_of(tokenizer) & set(bare), "a special token in a text"
    if tokenizer.templated:
        prompt = harness.apply_chat_template(turns[:-1] or turns)
        assert isinstance(prompt, ChatPrompt)
        plain = [{**turn, "content": "x"} for turn in turns[:-1] or turns]
        count = lambda ids: sum(i in meaning_of(tokenizer) for i in ids)
        try:
            usual = count(harness.encode_prompt(harness.apply_chat_template(plain), 8))
        except ValueError:
            return
        assert count(harness.encode_prompt(prompt, 8)) == usual, "a special token in a chat"


# ---- Fuzzers ------------------------------------------------------------------------------------

def write_tokenizer(kind, folder):
    TOKENIZERS[kind]().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def config_of():
    return SimpleNamespace(vocab_size=VOCAB, eos_ids=(), max_length=1 << 20)


def open_with(folder, kind, template):
    """A tokenizer of this kind with this chat template."""
    write_tokenizer(kind, folder)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder, config_of())


def fuzz_records(count, seed, folder, log):
    """Random records through every template and both tokenizers, into samples and prompts."""
    rng, tokenizers = random.Random(seed), {}
    for kind in TOKENIZERS:
        for shape, template in templates_of(kind).items():
            tokenizer = log.try_input(f"{kind} {shape}", open_with, folder / kind, kind, template)
            tokenizers[kind, shape] = tokenizer, make_harness(tokenizer)
    for number in range(count):
        (kind, shape), (tokenizer, harness) = rng.choice(list(tokenizers.items()))
        name, record = f"seed {seed}, record {number}, {kind} {shape}", make_record(rng)
        turns = log.try_input(name, chat_turns, record)
        if turns is None:
            continue
        pair = log.try_input(name, tokenizer.chat, turns)
        try:
            if pair:
                check_sample(tokenizer, turns, *pair, shape)
            asked = turns[0]["content"]
            ids = log.try_input(name, ask, tokenizer, asked)
            if ids and shape != "writes masks":
                check_prompt(tokenizer, ids, asked)
            if shape not in ("writes masks", "shortens"):
                log.try_input(name, check_harness, harness, turns)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}: {json.dumps(record)[:600]}") from error


def ask(tokenizer, text):
    """The prompt of generate.py: its token ids."""
    data = ChatData(backbone_of(tokenizer))
    return data.ask(text, length=8).prompt


def backbone_of(tokenizer):
    return SimpleNamespace(tokenizer=tokenizer, config=config_of(), name="m")


def fuzz_data(count, seed, folder, log):
    """Whole data sets: what is kept and what is left out adds up, and a batch can be made."""
    rng = random.Random(seed)
    for number in range(count):
        kind = rng.choice(list(TOKENIZERS))
        shape, template = rng.choice(list(templates_of(kind).items()))
        name = f"seed {seed}, data {number}, {kind} {shape}"
        tokenizer = log.try_input(name, open_with, folder / kind, kind, template)
        records = []
        for _ in range(rng.randint(0, 30)):
            try:
                records.append(chat_turns(make_record(rng)))
            except ValueError:
                continue
        options = dict(max_length=rng.choice([8, 64, 4096]), truncate=rng.random() < 0.5,
                       skip_bad=rng.random() < 0.7, where="here", bad=3)
        data = log.try_input(name, make_data, tokenizer, records, options)
        if data is None or not records:
            continue
        kept = sum(map(len, data.pairs.values()))
        numbers = [int(data.note.split(words)[0].split()[-1]) for words in (
            " samples kept", " too long", " with special", " refused by", " malformed")]
        assert numbers[0] == kept and sum(numbers[:4]) == len(records) and numbers[4] == 3, name
        batch = collate([data.train(None, 0, 0), data.test("", "test", 0)], [0, 1], False)
        assert batch.x0.shape[1] <= options["max_length"] and batch.maskable.any(1).all()
        assert torch.equal(batch.maskable & ~batch.valid, torch.zeros_like(batch.valid)), name


def make_data(tokenizer, records, options):
    return ChatData(backbone_of(tokenizer), records, **options)


ODD = [None, True, False, -1, 0, 1, 3, 2**31, 10**12, 10**30, 0.5, 1e308, "", "a", "a" * 100000, [],
       {}, [[]] * 3, [1], {"a": 1}, [None], {"type": "Sequence"}, {"type": "NFKC"},
       {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100},
       {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
       {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False},
       {"type": "Prepend", "prepend": " "}, {"type": "Lowercase"}, {"id": 0}, "<|mask|>"]


def change_json(raw, rng):
    """Drop, replace, double or nest something anywhere in parsed JSON."""
    places = []

    def walk(node):
        # Few of a large table's entries, or nothing else would ever be changed.
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        for key in keys if len(keys) < 60 else rng.sample(keys, 3):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])
    walk(raw)
    for node, key in rng.sample(places, min(len(places), rng.randint(1, 3))):
        kind = rng.randrange(5)
        if kind == 0:
            node[key] = None
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(["x", "type", "id", "content", "eos_token"])] = rng.choice(ODD)
        elif kind == 2:
            node[key] = [node[key]] * rng.choice([1, 3])
        elif kind == 3 and isinstance(node.get(key) if isinstance(node, dict) else 0, int):
            node[key] = rng.choice([-1, 0, 5, 300, 10**9, 2**63])
        else:
            node[key] = rng.choice(ODD)


FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


def fuzz_files(count, seed, folder, log):
    """Damaged files of a tokenizer: refused in one line, or a tokenizer that works."""
    rng = random.Random(seed)
    for kind in TOKENIZERS:
        TOKENIZERS[kind]().save_pretrained(folder / f"whole {kind}")
    for number in range(count):
        copy, whole = folder / "copy", folder / f"whole {rng.choice(list(TOKENIZERS))}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        for file in rng.sample(FILES, rng.choice([1, 1, 2])):
            damage(copy / file, rng)
        name = f"seed {seed}, files {number}"
        tokenizer = log.try_input(name, Tokenizer, copy, config_of())
        if tokenizer:
            turns = chat_turns({"prompt": "Hi the 12", "response": " B\n\nyou"})
            pair = log.try_input(name, tokenizer.chat, turns)
            log.try_input(name, tokenizer.encode, "aaaa zzzz é中😀 " * 200)
            if pair:
                assert all(0 <= i < VOCAB for ids in pair for i in ids if i is not None), name


def damage(path, rng):
    """Change a JSON file somewhere, or some characters of any file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json" and rng.random() < 0.8:
        raw = json.loads(text)
        change_json(raw, rng)
        text = json.dumps(raw)
    else:
        for _ in range(rng.randint(1, 4)):
            at = rng.randint(0, len(text))
            text = text[:at] + rng.choice(["", "{", "}", "{%", "%}", "\x00", '"', "{{", "1e999",
                                           "[" * 2000]) + text[at + rng.randint(0, 20):]
    path.write_text(text, encoding="utf-8")


FUZZERS = {"records": (fuzz_records, 1.0), "data": (fuzz_data, 0.02), "files": (fuzz_files, 0.05)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20000, help="records; of the others fewer")
    parser.add_argument("--seed", type=int, default=0)
    arguments, broken = parser.parse_args(), False
    for name, (fuzz, share) in FUZZERS.items():
        log, count = Log(), max(1, int(share * arguments.count))
        with tempfile.TemporaryDirectory() as folder:
            try:
                fuzz(count, arguments.seed, Path(folder), log)
            except AssertionError as error:
                print(f"BROKEN: {error}")
                broken = True
        print(f"---- {name}: {count}\n{log.report()}", flush=True)
    sys.exit(broken)


if __name__ == "__main__":
    main()
