"""Text for the real backbones: tokenizer, chat template, and chat data to train on.

The chat template is a Jinja program that comes with the checkpoint. The transformers library runs
it in a sandbox.
"""
from __future__ import annotations

import random
import re
from functools import lru_cache

import torch
from tqdm import tqdm

from backbones.families import FAMILIES
from backbones.strangers import check_sizes, check_tokenizer
from data import Sample, Source, clean_text, parse_record
from files import bounded, run_apart

# The special tokens of all families. A tokenizer has those of its own.
MASK_TOKENS = sorted({family.mask_token for family in FAMILIES.values()})
TURN_ENDS = sorted({token for family in FAMILIES.values() for token in family.turn_ends})
TURN_MARKS = {token for family in FAMILIES.values() for token in family.turn_marks}


# ---- The tokenizer ------------------------------------------------------------------------------

SHIELD = "\ue000"  # a character for private use: it splits a token's name and is then left out
LONGEST_TEMPLATE = 1 << 20  # characters
# A text that is read on trial, of many kinds of characters.
TRIAL = "Hello, wörld!\n\n  x = 12345;\t你好 \U0001f600 e\u0301 \ufb03 \u0000" + "az 09\n" * 100


class SpecialToken(ValueError):
    """A text holds a token that the model would not read as text."""


class Tokenizer:
    """The checkpoint's own tokenizer and chat template."""

    def __init__(self, folder, config, hf=None):
        """hf: a tokenizer of the transformers library that is known, in place of the folder's."""
        from transformers import PreTrainedTokenizerFast
        self.hf, self.is_linear = hf, True
        self.read = PreTrainedTokenizerFast.from_pretrained
        try:
            if hf is None:
                check_sizes(folder)
                # Tried apart first: what takes too much there does not come here.
                self.is_linear = run_apart(
                    lambda: self.open(folder, config.vocab_size, check=True))
                self.open(folder, config.vocab_size)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ValueError(f"{folder}: the tokenizer cannot be read: {reason}") from None
        self.vocab_size, self.added = config.vocab_size, self.hf.get_added_vocab()
        known = [self.added[token] for token in MASK_TOKENS if token in self.added]
        self.mask_id = known[0] if known else self.hf.mask_token_id
        self.eos_id = self.hf.eos_token_id
        # All that may end a reply: what config.json and generation_config.json call the end, what
        # the tokenizer does, the ends of a turn that are known, and the template's own.
        known_ends = (self.added.get(token) for token in TURN_ENDS)
        ends = [self.eos_id, *config.eos_ids, *known_ends]
        self.stop_ids = [i for i in dict.fromkeys(ends) if i is not None]
        self.template_ids = set()  # the special tokens that the template puts around turns
        self.templated = bool(self.hf.chat_template) and self.template_is_usable()

    def open(self, folder, vocab_size, check=False):
        """Read the tokenizer's files. With `check`, say whether it reads any text in short time."""
        is_linear = check and check_tokenizer(folder, vocab_size)
        self.hf = self.read(folder)
        ids = self.hf.get_vocab().values()
        if len(ids) > vocab_size or max(ids, default=0) >= vocab_size:
            raise ValueError(f"the tokenizer has {len(ids)} tokens with ids up to {max(ids)}, the "
                             f"model {vocab_size}")
        if check:
            self.hf.decode(self.hf(TRIAL, add_special_tokens=False)["input_ids"])
            self.hf("")
        return is_linear

    def template_is_usable(self):
        """Can prompt and reply be told apart, and does a reply end in a token that says so?

        The token that the template puts behind a reply is an end from now on.
        """
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            prompt, reply, _ = self.apply_template(example)
        except ValueError:
            return False
        self.template_ids = {*self.hf.all_special_ids} & {*prompt, *reply}
        said = self.encode("b")
        behind = reply[len(said):][:1] if reply[:len(said)] == said else []
        self.stop_ids += [i for i in behind
                          if i in self.added.values() and i not in self.stop_ids]
        return any(i in self.stop_ids for i in reply)

    def encode(self, text):
        """Ids of a text, without a token at its start or end. What is shielded stays text."""
        parts = clean_text(text).split(SHIELD)

        def encode_parts():
            return [i for part in parts
                    for i in self.hf(part, add_special_tokens=False)["input_ids"]]
        if self.is_linear:
            return encode_parts()
        # Its regular expression may search for hours in a text that was made for it.
        try:
            return run_apart(encode_parts)
        except ValueError as error:
            raise ValueError(f"the model's tokenizer cannot read this text: {error}") from None

    def shield(self, text):
        """A user's text in which the names of special tokens are nothing but their characters."""
        names = {*self.special_names(), *self.hf.all_special_tokens}
        for token in sorted(names, key=len, reverse=True):
            text = text.replace(token, token[:1] + SHIELD + token[1:])
        if any(token in self.normalize(text) for token in names):
            text = SHIELD.join(text)  # read letter by letter
        return text

    def normalize(self, text):
        """A text as the tokenizer looks for tokens in it: a wide \uff1c may have become a <."""
        normalizer = self.hf.backend_tokenizer.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def special_names(self):
        """The names of the mask, the ends, and of what begins a turn."""
        marks = TURN_MARKS | {self.hf.bos_token}
        ids = {self.mask_id, *self.stop_ids, *self.template_ids}
        return [token for token, i in self.added.items() if token in marks or i in ids]

    def decode(self, ids):
        """The text of ids; special tokens are skipped."""
        return self.hf.decode(ids, skip_special_tokens=True)

    def pieces(self, ids):
        """One display string per token."""
        return [self.hf.decode([i]) for i in ids]

    def chat(self, messages):
        """[{role, content}, ...] -> ids of the prompt, ids of the reply.

        The reply is [] if the last turn is the user's. Without a usable template the turns are
        joined by blank lines. Plain text, one turn of the assistant's, is a reply to nothing.
        """
        for message in messages:
            self.refuse_special(clean_text(message["content"]))
        is_plain_text = [message["role"] for message in messages] == ["assistant"]
        if self.templated and not is_plain_text:
            prompt, rest, _ = self.apply_template(messages)
            return prompt, rest
        reply = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        turns = messages[:-1] if reply else messages
        prompt = "".join(turn["content"] + "\n\n" for turn in turns)
        return self.encode(prompt), self.encode(reply) + [self.eos_id] if reply else []

    def refuse_special(self, text):
        """SpecialToken if a user's text holds a mask, an end, or what begins a turn."""
        normalized = self.normalize(text)
        for token in self.special_names():
            if token in text or token in normalized:
                raise SpecialToken(f"the text contains {token!r}, which this model reads as a "
                                   "special token; remove it")

    def render(self, messages, **options):
        """Messages through the chat template -> text. ValueError if it refuses them.

        options: of the library's apply_chat_template.
        """
        try:
            with bounded():
                template = options.get("chat_template") or self.hf.chat_template
                for each in template.values() if isinstance(template, dict) else [template]:
                    check_template(each)
                text = self.hf.apply_chat_template(messages, tokenize=False, **options)
                said = sum(len(message["content"]) for message in messages)
                if len(text) > LONGEST_TEMPLATE + 4 * said:
                    raise ValueError(f"it makes {len(text)} characters of {said}")
                return text
        except Exception as error:  # a template is a program: it may divide by zero
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError("the model's chat template refuses these messages: "
                             f"{reason}") from None

    def chat_all(self, messages):
        """The same, with all of the assistant's turns: ids of what comes before the first of them,
        ids of the rest, and which of the rest the assistant says. ValueError without a template.
        """
        if not self.templated or [turn["role"] for turn in messages] == ["assistant"]:
            prompt, reply = self.chat(messages)
            if sum(turn["role"] == "assistant" for turn in messages) > 1:
                raise ValueError("--turns all needs a chat template, which says where a turn ends; "
                                 "this model has none that does")
            return prompt, reply, [True] * len(reply)
        for message in messages:
            self.refuse_special(clean_text(message["content"]))
        return self.apply_template(messages, all_turns=True)

    def apply_template(self, messages, all_turns=False):
        """Messages through the chat template -> ids of the prompt, ids of the rest, said.

        The prompt ends where the assistant's last turn begins; with all_turns, where the first
        does. `said` marks what the assistant says in the rest, with the end of each turn. What the
        template puts behind the last end is left out:

            prompt   <user>One?<end><assistant>
            rest     1<end><user>Two?<end><assistant>2<end>
            said     1  1     0   0    0      0      1  1
        """
        replies = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        if not messages or messages[-1]["role"] != "assistant":
            return self.encode(self.render(messages, add_generation_prompt=True)), [], []
        whole, starts = self.render(messages), []
        for i in replies if all_turns else replies[-1:]:
            before = self.render(messages[:i], add_generation_prompt=True)
            if not whole.startswith(before):
                raise ValueError("the model's chat template does not put a reply behind its "
                                 "generation prompt")
            starts.append(len(before))
        rest, said = [], []
        end_names = tuple(token for token, i in self.added.items() if i in self.stop_ids)
        for i, start, end in zip(replies[-len(starts):], starts, [*starts[1:], None]):
            # The reply, and behind its end all that comes before the next one.
            ids = self.encode(whole[start:end])
            ends = [i for i, token in enumerate(ids) if token in self.stop_ids]
            behind = whole[start:end].partition(messages[i]["content"].strip())[2]
            if end is not None and not behind.lstrip().startswith(end_names):
                raise ValueError("the model's chat template leaves out an earlier turn, or its end")
            length = ends[0] + 1 if ends else len(ids)
            # Some templates go on with the next turn's header.
            ids = ids if end is not None else ids[:length]
            rest, said = rest + ids, said + [i < length for i in range(len(ids))]
        return self.encode(whole[:starts[0]]), rest, said


@lru_cache(maxsize=8)
def check_template(template):
    """ValueError if a chat template is too long, or raises to powers.

    Nobody does the latter in a chat, and 10 ** 10 ** 10 cannot be stopped.
    """
    from jinja2 import Environment, nodes
    if not isinstance(template, str) or len(template) > LONGEST_TEMPLATE:
        raise ValueError(f"it is no text of at most {LONGEST_TEMPLATE} characters")
    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
        re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
    if tree.find(nodes.Pow):
        raise ValueError("it raises numbers to powers")


# ---- Data ---------------------------------------------------------------------------------------

def chat_turns(record):
    """A record of a data file -> chat messages. A question of its own ends the prompt."""
    turns, question = parse_record(record)
    if question:
        turns[0]["content"] += "\n\n" + question
    return turns


class ChatData(Source):
    """Training pairs through the chat template, with the interface of toy.data.ToyData.

    The Base models are trained with the template too, as in the published run.
    """
    words, metric, kind = False, "nats", "chat"

    def __init__(self, backbone, records=(), max_length=4096, truncate=False, split_seed=42,
                 where="", bad=0, seed=0, skip_bad=False, turns="last"):
        """records: lists of chat messages. where: the name of the data.

        bad: how many records were left out before. ValueError if fewer than two samples are left,
        or, unless skip_bad, if the template refuses a record. turns: which of the assistant's
        turns are learned, the last or all. With all, an earlier turn is predicted with sight of
        the later ones, since a masked model looks both ways.
        """
        self.turns = turns
        self.tokenizer, self.seed = backbone.tokenizer, seed
        self.window, self.columns = backbone.config.max_length, {"held out": {}}
        if self.tokenizer is None:
            raise ValueError(f"{backbone.name} has no tokenizer.json, so it cannot read text")
        samples, counts = self.encode_records(records, max_length, truncate, where, skip_bad)
        if records and len(samples) < 2:
            raise_it = "; raise --max-length, or --truncate" if counts["long"] else ""
            raise ValueError(
                f"{where}: {len(samples)} samples left of {len(records)} ({counts['long']} longer "
                f"than {max_length} tokens, {counts['special']} with special tokens in their "
                f"text, {counts['refused']} refused by the chat template); two are needed, one to "
                f"train and one to test{raise_it}")
        generator = torch.Generator().manual_seed(split_seed)
        order = torch.randperm(len(samples), generator=generator).tolist()
        # 5 % are held out, but two if there are four: a prompt is compared with another one.
        held_out = max(min(2, len(samples) // 2), len(samples) // 20)
        self.pairs = {"test": [samples[i] for i in order[:held_out]],
                      "train": [samples[i] for i in order[held_out:]]}
        self.note = self.describe(where, samples, counts, bad) if samples else ""

    def encode_records(self, records, max_length, truncate, where, skip_bad):
        """Records -> samples of at most max_length tokens, and how many were left out, and why."""
        samples, counts = [], dict.fromkeys(["long", "cut", "special", "refused"], 0)
        bar = tqdm(records, desc="reading", unit="record", delay=1, disable=None)
        for number, turns in enumerate(bar, 1):
            try:
                prompt, reply, said = self.encode_turns(turns)
            except SpecialToken:
                counts["special"] += 1
                continue
            except ValueError as error:
                if not skip_bad:
                    raise ValueError(f"{where}, record {number}: {error}") from None
                counts["refused"] += 1
                continue
            room = max_length - len(prompt)
            if room <= 0 or (len(reply) > room and not truncate):
                counts["long"] += 1
                continue
            counts["cut"] += len(reply) > room
            samples.append(Sample(prompt, reply[:room], said[:room]))
        return samples, counts

    def encode_turns(self, turns):
        """The turns of a record -> ids of the prompt, ids of the rest, which of these to learn."""
        if self.turns == "all":
            return self.tokenizer.chat_all(turns)
        prompt, reply = self.tokenizer.chat(turns)
        return prompt, reply, [True] * len(reply)

    def describe(self, where, samples, counts, bad):
        """One line about the data."""
        lengths = sorted(len(sample.prompt) + len(sample.rest) for sample in samples)
        note = (f"{where}: {len(samples)} samples kept ({len(self.pairs['train'])} to train, "
                f"{len(self.pairs['test'])} held out; {lengths[len(lengths) // 2]} tokens in the "
                f"median, {lengths[-1]} at most), {counts['long']} too long, {counts['cut']} cut, "
                f"{counts['special']} with special tokens in their text, {counts['refused']} "
                f"refused by the chat template, {bad} malformed; "
                f"learned: {'all turns' if self.turns == 'all' else 'the last turn'} of the "
                "assistant")
        if not self.tokenizer.templated:
            note += "; no usable chat template, so prompt and reply are joined by a blank line"
        return note

    def train(self, rng, progress, number):
        """Training sample `number`: all of them in a new order in each epoch."""
        epoch, i = divmod(number, len(self.pairs["train"]))
        order = shuffled_numbers(f"{self.seed} {epoch}", len(self.pairs["train"]))
        return self.pairs["train"][order[i]]

    def test(self, column, name, number):
        """Held-out sample `number`, in turn."""
        return self.pairs["test"][number % len(self.pairs["test"])]

    def ask(self, prompt, question="", length=0):
        """A user's text as the user's turn -> Sample with `length` gaps for the reply."""
        if question:
            raise ValueError("--question is for the toy; put the question into the prompt")
        if not prompt.strip():
            raise ValueError("the prompt is empty; give some text with --prompt or --file")
        return self.ask_turns([{"role": "user", "content": prompt.strip()}], length)

    def refuse_long(self, count):
        """ValueError for a text of so many characters that it need not be read to be too long."""
        if count > 100 * self.window:
            raise ValueError(f"the prompt has {count} characters, too many for the model's "
                             f"window of {self.window} tokens; shorten it")

    def ask_turns(self, turns, length=0):
        """A conversation whose last turn is the user's -> Sample, as `ask`."""
        self.refuse_long(sum(len(turn["content"]) for turn in turns))
        ids, _ = self.tokenizer.chat(turns)
        length = length or 128
        if len(ids) + length > self.window:
            raise ValueError(f"the prompt has {len(ids)} tokens, with {length} to generate more "
                             f"than the model's window of {self.window}; shorten it")
        return Sample(ids, [0] * length, [True] * length)

    def ask_gaps(self, text):
        """A text with gaps, without a chat template -> Sample; see Source.ask_gaps."""
        self.refuse_long(len(text))
        self.tokenizer.refuse_special(clean_text(text))
        if len(self.tokenizer.encode(" a")) == 1:
            # A word's token holds the space before it. So the space is a gap's to fill.
            text = text.replace(" [MASK", "[MASK")
        return super().ask_gaps(text)


@lru_cache(maxsize=2)
def shuffled_numbers(name, n):
    """0 .. n-1 in an order that the name decides."""
    return random.Random(name).sample(range(n), n)
