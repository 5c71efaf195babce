"""What a stranger's tokenizer may do to a text, found out before it is used.

tokenizer.json is a small program: it replaces, splits and joins. A step of it may make one letter
a million, or search for hours. Here each kind of step is known, a text grows by a small factor at
most, and a regular expression that may search for long is told from those that cannot.
"""
from __future__ import annotations

import json
import re

from files import read_json

# MiB. The largest tokenizers have some 10.
LARGEST = {"tokenizer.json": 64, "tokenizer_config.json": 16, "chat_template.jinja": 1,
           "special_tokens_map.json": 1, "added_tokens.json": 1}
LONGEST_PIECE = 4096    # characters of a token; published ones have some hundreds
LONGEST_SECTION = 1 << 14  # characters of a section of tokenizer.json; published ones have 3,000
MOST_GROWTH = 16        # how much longer a text may become; Llama-2's grows threefold

# The steps that are known, by the section of tokenizer.json that holds them.
KNOWN_STEPS = {
    "normalizer": {"NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents",
                   "BertNormalizer", "ByteLevel", "Prepend", "Replace"},
    "pre_tokenizer": {"ByteLevel", "Split", "Metaspace", "Whitespace", "WhitespaceSplit", "Digits",
                      "Punctuation", "BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts"},
    "post_processor": {"ByteLevel", "TemplateProcessing", "RobertaProcessing", "BertProcessing"},
    "decoder": {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Replace", "Metaspace", "WordPiece",
                "BPEDecoder"},
}
PARTS = ("normalizers", "pretokenizers", "processors", "decoders")  # of a Sequence


def check_sizes(folder):
    """ValueError if a file of a tokenizer is no plain file, or larger than any tokenizer's."""
    for name, most in LARGEST.items():
        path = folder / name
        if path.exists() and (not path.is_file() or path.stat().st_size > most << 20):
            raise ValueError(f"{path} is no file of at most {most} MiB; no tokenizer is larger")


def check_tokenizer(folder, vocab_size):
    """Whether this tokenizer reads any text in a time that grows like the text.

    ValueError if it has a step that is not known, or one that makes texts much longer.
    """
    raw = read_json(folder / "tokenizer.json")
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
        raise ValueError("tokenizer.json is no tokenizer")
    check_vocabulary(raw["model"], vocab_size)
    check_added(raw.get("added_tokens"), vocab_size)
    steps = {name: list_steps(raw.get(name), name) for name in KNOWN_STEPS}
    for name in ("normalizer", "decoder"):
        growth = 1.0
        for step in steps[name]:
            growth *= growth_of(step)
        if growth > MOST_GROWTH:
            raise ValueError(f"its {name} makes a text up to {growth:.0f} times as long; no "
                             f"published one does so more than {MOST_GROWTH} times")
    slow = {name: [regex for step in found for regex in regexes_of(step) if not is_linear(regex)]
            for name, found in steps.items()}
    if slow["decoder"]:
        raise ValueError(f"its decoder searches for {slow['decoder'][0]!r}, which may take for "
                         "ever")
    return not any(slow.values())


def check_vocabulary(model, vocab_size):
    """ValueError unless each piece has an id of its own that the model knows."""
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # Unigram: [[piece, score], ...]
        vocab = {pair[0]: i for i, pair in enumerate(vocab)}
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError("its vocabulary is no table of pieces and ids")
    if len(set(vocab.values())) < len(vocab):
        raise ValueError("two pieces of its vocabulary have one id")
    if vocab and not 0 <= min(vocab.values()) <= max(vocab.values()) < vocab_size:
        raise ValueError(f"its vocabulary has the id {max(vocab.values())}, the model has "
                         f"{vocab_size} tokens")
    if any(len(piece) > LONGEST_PIECE for piece in vocab):
        raise ValueError(f"a piece of its vocabulary has more than {LONGEST_PIECE} characters")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if len(str(model.get(name))) > 64:
            raise ValueError(f"its {name} is longer than 64 characters")
    if model.get("dropout"):
        raise ValueError(f"its dropout is {model['dropout']}, so that it reads a text differently "
                         "each time; set it to null")


def check_added(tokens, vocab_size):
    """ValueError unless the added tokens are a list of named tokens that the model knows."""
    if tokens and len(tokens) > vocab_size:
        raise ValueError(f"it adds {len(tokens)} tokens, the model has {vocab_size}")
    for token in tokens or []:
        name = token.get("content")
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST_PIECE:
            raise ValueError(f"an added token has no name of 1 to {LONGEST_PIECE} characters")


def list_steps(section, name):
    """The steps of a section of tokenizer.json in order, those of its sequences too."""
    if section is None:
        return []
    if len(json.dumps(section)) > LONGEST_SECTION:
        raise ValueError(f"its {name} is longer than {LONGEST_SECTION} characters")
    if not isinstance(section, dict):
        raise ValueError(f"its {name} is no step that is known")
    if section.get("type") == "Sequence":
        parts = next((section[key] for key in PARTS if isinstance(section.get(key), list)), [])
        return [step for part in parts for step in list_steps(part, name)]
    if section.get("type") not in KNOWN_STEPS[name]:
        raise ValueError(f"its {name} has a step {section.get('type')!r}; known are "
                         f"{', '.join(sorted(KNOWN_STEPS[name]))}")
    return [section]


def growth_of(step):
    """How many times as long this step makes a text at most, in bytes."""
    if step["type"] == "Prepend" and len(str(step.get("prepend"))) > 64:
        return float("inf")
    if step["type"] != "Replace":
        return 2.0 if step["type"] == "ByteLevel" else 1.0
    size = len(str(step.get("content")).encode("utf-8", "replace"))
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and pattern.get("String"):
        return max(1.0, size / len(str(pattern["String"]).encode("utf-8", "replace")))
    return 1.0 + size  # an expression may match nothing, between any two bytes


def regexes_of(step):
    """The regular expressions of a step."""
    pattern = step.get("pattern")
    return [str(pattern["Regex"])] if isinstance(pattern, dict) and "Regex" in pattern else []


# ---- Which searches end soon ---------------------------------------------------------------------

# A search goes from left to right through the alternatives of an expression. It takes for ever
# where an alternative reads far, then fails and is tried again one letter later: z+y in zzzzz. So
# behind what is repeated, nothing may be required:
#
#     [^\s\p{L}\p{N}]+[\r\n]*     linear: behind the first run, all may be missing
#     \s*[\r\n]+                  not so: reads all spaces in vain where no line ends
#
# The second kind stands in the published expressions, before \s+, which then reads the same spaces
# once and for all. These ends of expressions are known.
TAILS = (r"\s*[\r\n]+|\s+(?!\S)|\s+", r"\s*[\r\n]|\s+(?!\S)|\s+", r"\s+(?!\S)|\s+",
         r"\s++$|\s*[\r\n]|\s+(?!\S)|\s", r"\s++$|\s+(?!\S)|\s")
ESCAPE = re.compile(r"\\[pP]\{\^?\w+\}|\\[sSdDwWrnt]|\\[^\w\s]", re.ASCII)
CLASS = re.compile(r"\[\^?[^\[\]]+\]")
CHOICE = re.compile(r"\((?:\?i?:)?[^()\[\]{}*+?\\^$]*\)")  # between short texts
ATOM = r"[^()\[\]{}|*+?\\^$]"
LINEAR = re.compile(
    rf"({ATOM}\?\+?)?{ATOM}{{0,9}}({ATOM}([*+]|\{{\d,\d\}})\+?({ATOM}[*?]\+?){{0,3}}|{ATOM}\?)?")


def is_linear(regex):
    """Whether a search for this takes a time that grows like the text. False if not sure."""
    tail = next((tail for tail in TAILS if regex.endswith("|" + tail)), "")
    head = regex[:len(regex) - len(tail) - 1] if tail else regex
    # An escape, a class and a choice between short texts each become one letter.
    plain = CHOICE.sub("c", CLASS.sub("c", ESCAPE.sub("c", head)))
    return len(regex) <= 2000 and all(LINEAR.fullmatch(part) for part in plain.split("|"))
