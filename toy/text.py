"""Real text as bytes: what every Python carries with it, or your own file of pairs.

Memory that only works on synthetic words would prove little, so these samples are real text.
The test files are never trained on, not even in part.
"""

import os
import random
import sysconfig
import zlib
from pathlib import Path

from data import Sample, parse_record, read_data
from toy.tokenizer import EOS, SEP, Bytes

BYTES = Bytes()

# Besides what is installed by the user and what is mere test code: `encodings` is tables that
# are near copies of each other, so a held-out one would be known from training, and
# `pydoc_data` is the other source.
SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data",
}


def documents(source, split):
    """The documents (name, bytes) of a source, 'python' or 'pydoc', in a split, 'train' or 'test'.

    'python' is the standard library's own .py files of 2000 bytes or more, 'pydoc' the help
    topics of 600 bytes or more. Both differ between Python versions, so compare results
    within one version only. About one document in ten is held out for 'test'.
    """
    readers = {"python": _library_files, "pydoc": _help_topics}
    if source not in readers:
        raise ValueError(f"no source {source!r}: use 'python' or 'pydoc'")
    if split not in ("train", "test"):
        raise ValueError(f"no split {split!r}: use 'train' or 'test'")
    # The split hangs on the name alone (Python's own hash() differs from run to run), so a
    # document stays on its side whatever else is there.
    return [
        (name, data) for name, data in readers[source]()
        if (zlib.crc32(name.encode()) % 10 == 0) == (split == "test")
    ]


def _library_files():
    """The usable .py files of the standard library, sorted by relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, files in os.walk(root):
        # Cut off before descending: site-packages may hold a hundred thousand files.
        subfolders[:] = [name for name in subfolders if name not in SKIPPED]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            try:
                data = path.read_bytes()
                data.decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if len(data) >= 2000:
                found.append((path.relative_to(root).as_posix(), data))
    if not found:
        raise ValueError(f"no Python source files in {root}: use the source 'pydoc' instead")
    return sorted(found)


def _help_topics():
    """The usable topics of Python's help(), sorted by name."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(
            "this Python comes without pydoc_data: use the source 'python' instead"
        ) from None
    # Many topics are a section of a longer one ('for' of 'compound'), and held out they would
    # be known from training. So the longest come first, and one that repeats them is dropped.
    kept, seen = [], set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        data = topics[name].encode("utf-8")
        lines = {line.strip() for line in data.split(b"\n") if len(line.strip()) >= 40}
        if len(data) >= 600 and len(lines & seen) <= len(lines) / 10:
            kept.append((name, data))
            seen |= lines
    return sorted(kept)


def cut(rng, docs, prompt_len, response_len):
    """A random window of a document: `prompt_len` bytes, then `response_len` bytes of answer.

    Each window that lies fully inside a document is equally likely, so a document counts
    about as much as it is long. ValueError if no document is long enough.
    """
    size = prompt_len + response_len
    windows = [max(0, len(data) - size + 1) for _, data in docs]
    if not any(windows):
        raise ValueError(
            f"none of the {len(docs)} documents has {prompt_len} + {response_len} bytes: "
            "use a shorter prompt or response"
        )
    data = rng.choices(docs, weights=windows)[0][1]
    start = rng.randrange(len(data) - size + 1)
    ids = BYTES.encode_bytes(data[start:start + size])
    return Sample(ids[:prompt_len], ids[prompt_len:], [True] * response_len)


def read_pairs(path, skip_bad=False, most=0):
    """Read (prompt, question, response) texts; returns (list of them, number of records skipped).

    most: how many records are read at most, 0 for all.

    All forms of data.parse_record. Of several turns the last is the response and the others are
    the prompt, joined by blank lines. Plain text has the prompt "".
    """
    return read_data(path, make_pair, skip_bad, most)


def make_pair(record):
    """The (prompt, question, response) of a parsed record; ValueError says what is wrong."""
    turns, question = parse_record(record)
    prompt = "\n\n".join(turn["content"] for turn in turns[:-1])
    return prompt, question, turns[-1]["content"]


def pair_sample(pair, prompt_len_max, response_len):
    """The sample of a (prompt, question, response); lengths in bytes.

    rest: SEP and the question if there is one, SEP, then `response_len` answer tokens.
    ValueError if the prompt has more than `prompt_len_max` bytes or the response more than
    response_len - 1; callers filter such pairs out.
    """
    prompt, question, response = (BYTES.encode(text) for text in pair)
    if len(prompt) > prompt_len_max:
        raise ValueError(
            f"the prompt has {len(prompt)} bytes but at most {prompt_len_max} fit: "
            "shorten it or raise the limit"
        )
    if len(response) > response_len - 1:
        raise ValueError(
            f"the response has {len(response)} bytes but at most {response_len - 1} fit before "
            "its end token: shorten it or raise the limit"
        )
    visible = ([SEP] + question if question else []) + [SEP]
    # EOS fills up the answer and is part of it: at inference the length is unknown and all
    # response_len places start masked, so the model must learn to say where the answer ends
    # and that nothing follows.
    filled = response + [EOS] * (response_len - len(response))
    return Sample(prompt, visible + filled, [False] * len(visible) + [True] * response_len)


def split_pairs(pairs, seed):
    """(train, test): a seeded shuffle, one pair in ten held out, but two if there are four.

    Two, since a prompt is compared with another one. A single pair is put in both, so that a
    demonstration with one record runs; its test score then says nothing about unseen text.
    """
    if not pairs:
        raise ValueError("no pairs to split: give at least one")
    if len(pairs) == 1:
        return list(pairs), list(pairs)
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    held_out = max(min(2, len(pairs) // 2), len(pairs) // 10)
    return shuffled[held_out:], shuffled[:held_out]
