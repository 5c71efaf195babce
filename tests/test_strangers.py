"""Tokenizers of strangers: bombs are refused in one line, published shapes are read."""
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import files
from backbones.strangers import is_linear
from backbones.text import Tokenizer
from backbones.tiny import SPLIT, TOKENIZERS

sys.path.insert(0, str(Path(__file__).parent))
import fuzz  # noqa: E402

TAIL = r"|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + TAIL
BAILING = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
           r"|\s*[\r\n]" + TAIL)
LLAMA3 = SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def replace(text, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: text}, "content": content}


def split(regex):
    part = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [part, BYTES]}


def chain(*steps, name="normalizers"):
    return {"type": "Sequence", name: list(steps)}


def open_changed(folder, model=None, **changes):
    """The merging tokenizer with sections of its tokenizer.json changed."""
    TOKENIZERS["merging"]().save_pretrained(folder)
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text()) | changes
    raw["model"] |= model(raw["model"]) if model else {}
    path.write_text(json.dumps(raw))
    return Tokenizer(folder, SimpleNamespace(vocab_size=320, eos_ids=(), max_length=4096))


PADDING = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
           "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
TRUNCATION = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
LLAMA2 = dict(normalizer=chain({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")),
              decoder=chain(replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                            name="decoders"))


@pytest.mark.parametrize("changes", [
    dict(pre_tokenizer=split(GPT2)), dict(pre_tokenizer=split(LLAMA3)),
    dict(pre_tokenizer=split(SPLIT)), dict(pre_tokenizer=split(BAILING)),
    dict(normalizer={"type": "NFC"}), dict(normalizer={"type": "NFKC"}),
    dict(pre_tokenizer=BYTES | {"use_regex": True}), LLAMA2,
    dict(padding=PADDING, truncation=TRUNCATION)])
def test_published_shapes_are_read(tmp_path, changes):
    tokenizer = open_changed(tmp_path, **changes)
    assert tokenizer.is_linear
    if changes is not LLAMA2:  # its pieces are not in this vocabulary
        assert tokenizer.decode(tokenizer.encode("Hi the 12\n\n  B")) == "Hi the 12\n\n  B"


@pytest.mark.parametrize("changes, says", [
    (dict(normalizer=replace("z", "z" * 1000)), "1000 times as long"),
    (dict(normalizer=replace("a", "a" * 10**6)), "longer than 16384"),
    (dict(normalizer=chain(*[replace("a", "aa")] * 20)), "times as long"),
    (dict(normalizer=replace("", "b" * 100, "Regex")), "101 times as long"),
    (dict(normalizer={"type": "Prepend", "prepend": "x" * 1000}), "times as long"),
    (dict(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}), "'Precompiled'; known"),
    (dict(decoder=chain(replace("(a+)+b", "b", "Regex"), name="decoders")), "for ever"),
    (dict(decoder=replace("a", "a" * 99)), "99 times as long"),
    (dict(model=lambda m: {"vocab": m["vocab"] | {"zz": 4 * 10**9}}), "has the id 4000000000"),
    (dict(model=lambda m: {"vocab": m["vocab"] | {"zz": 5}}), "have one id"),
    (dict(model=lambda m: {"merges": m["merges"] + [["no", "thing"]]}), "out of vocabulary"),
    (dict(model=lambda m: {"end_of_word_suffix": "x" * 999}), "end_of_word_suffix is longer"),
    (dict(model=lambda m: {"dropout": 0.5}), "dropout"),
    (dict(added_tokens=[{"content": f"q{i}"} for i in range(9999)]), "adds 9999 tokens"),
    (dict(added_tokens=[{"content": "q" * 10**6}]), "an added token has no name"),
])
def test_bombs_are_refused_in_one_line(tmp_path, changes, says):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="tokenizer cannot be read") as error:
        open_changed(tmp_path, **changes)
    line = str(error.value)
    assert says in line and "\n" not in line and len(line) < 500
    assert time.perf_counter() - start < 10


def test_a_search_that_does_not_end_costs_one_text(tmp_path):
    tokenizer = open_changed(tmp_path, pre_tokenizer=split("(z+)+y|."))
    assert not tokenizer.is_linear
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    with pytest.raises(ValueError, match="cannot read this text"):
        tokenizer.encode("z" * 20000)


@pytest.mark.parametrize("regex", [
    "(a+)+b", "z+y", "z+y|.", "z+z+y", r"(a?){30}a{30}", "a?a?a?aaa", r"\s*[\r\n]+|\s", "[a-z]+?y",
    r"(.)\1+x", "z+$", "(?=z+y)", "z{1,99999}y", r"z+y" + TAIL, TAIL[1:] + "|z+y"])
def test_searches_that_may_take_long_are_known(regex):
    assert not is_linear(regex)


def test_a_process_apart_answers_or_is_stopped():
    assert files.run_apart(lambda: [1, "a"]) == [1, "a"]
    with pytest.raises(ValueError, match="^no$"):
        files.run_apart(lambda: exec("raise ValueError('no')"))
    with pytest.raises(ValueError, match="more than 1 s"):
        files.run_apart(lambda: 10 ** 10 ** 10, seconds=1)  # native code, which no signal stops
    with pytest.raises(ValueError, match="Memory"):
        files.run_apart(lambda: len(b"x" * (1 << 32)))


def test_a_wide_spelling_of_a_mask_is_no_mask(tmp_path):
    tokens = json.loads(TOKENIZERS["merging"]().backend_tokenizer.to_str())["added_tokens"]
    tokens = [token | {"normalized": True} for token in tokens]
    tokenizer = open_changed(tmp_path, normalizer={"type": "NFKC"}, added_tokens=tokens)
    wide = "a \uff1c|mask|\uff1e b"
    assert tokenizer.mask_id not in tokenizer.encode(tokenizer.shield(wide))


@pytest.mark.parametrize("name", fuzz.FUZZERS)
def test_fuzz(tmp_path, name):
    run, share = fuzz.FUZZERS[name]
    log = fuzz.Log()
    run(int(100 * share) + 5, 1, tmp_path, log)
    assert log.counts["taken"] and log.counts["refused"] and log.longest < 15, log.report()


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.FUZZERS)
def test_fuzz_for_longer(tmp_path, name):
    run, share = fuzz.FUZZERS[name]
    log = fuzz.Log()
    run(int(2000 * share), 2, tmp_path, log)
    assert log.longest < 20, log.report()


@pytest.mark.parametrize("template", list(fuzz.ENDLESS.values())[1:3])
def test_endless_templates_are_not_used(tmp_path, template):
    assert not fuzz.open_with(tmp_path, "bytes", template).templated
