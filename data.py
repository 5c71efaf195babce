"""Samples, batches, and the reader of data files that people have.

A *sample* is one task as token ids: a prompt, and the rest, where some tokens are the answer. The
answer is noised in training and decoded afterwards. A *batch* is several samples, padded on the
right: `Batch` of memdlm.py, which `collate` makes.

Training and evaluation ask the following of their data. toy/data.py's `ToyData` has it, and so
has `ChatData` of backbones/text.py.

    train(rng, progress, number)    Sample to train on. `number` counts the samples of a run. Data
                                    that has an end goes through all samples in turn. Other data
                                    draws one from rng. progress, from 0 to 1, is the share of the
                                    steps done: generated tasks grow harder with it.
    test(column, name, number)      held-out Sample `number` of a column, the same for every model.
                                    Other uses (sample, example ...) have other names.
    tests(column, numbers, closed_book, name)
                                    those held-out samples as one Batch
    columns                         {label: what it means to the data}, the columns of a table
    metric                          what a table shows: "accuracy", the share of answer tokens that
                                    decoding gets right; or "nats", the cross-entropy of each
    pairs                           {"train": [Sample], "test": [Sample]} of data that has an end,
                                    else None
    ask(prompt, question, length)   a user's texts -> Sample with gaps to fill; ValueError says
                                    what is wrong with the texts
    tokenizer                       encode, decode, pieces; eos_id, and stop_ids, which end a reply
    kind, words                     what the data is; whether a token is a word, shown with spaces
    note                            one line for the user: what was read and what was left out
"""
from __future__ import annotations

import gzip
import io
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

from files import fetch_from_hub
from memdlm import Batch

PAD = 0  # the id that fills up a sample. No one reads it: `valid` is False there.


class Sample(NamedTuple):
    """One task instance, as token ids."""

    prompt: list[int]   # what memory may be written from; a closed-book decoder never sees it
    rest: list[int]     # what follows: visible question and answer, possibly interleaved
    answer: list[bool]  # which tokens of `rest` are answer: noised in training, then decoded


class Source:
    """What the data of toy and real models share."""

    def tests(self, column, numbers, closed_book, name="test"):
        """The held-out samples with these numbers as one batch."""
        samples = [self.test(column, name, number) for number in numbers]
        seeds = [f"{name} {column} {number}" for number in numbers]
        return collate(samples, seeds, closed_book)


# ---- Batches ------------------------------------------------------------------------------------

def collate(samples, seeds, closed_book):
    """B samples with their seeds -> Batch. A closed book leaves the prompt out of x0.

    Two samples: prompt "a b", rest "? c d"; and prompt "a", rest "? c". What follows "?" is the
    answer. "." is padding:

                    closed_book=False    closed_book=True
        x0              a b ? c d            ? c d
                        a ? c . .            ? c .
        maskable        0 0 0 1 1            0 1 1
                        0 0 1 0 0            0 1 0
    """
    texts, answers = [], []
    for sample in samples:
        prompt = [] if closed_book else sample.prompt
        texts.append(prompt + sample.rest)
        answers.append([False] * len(prompt) + sample.answer)
    prompts = [sample.prompt for sample in samples]
    return Batch(
        x0=pad(texts, PAD), maskable=pad(answers, False), valid=where_tokens(texts),
        seeds=list(seeds), prompt=pad(prompts, PAD), prompt_valid=where_tokens(prompts))


def pad(lists, filler):
    """Lists of different lengths -> [B, L], filled up on the right."""
    longest = max(len(some) for some in lists)
    return torch.tensor([[*some, *[filler] * (longest - len(some))] for some in lists])


def where_tokens(lists):
    """[B, L] bool, False on the padding."""
    return pad([[True] * len(some) for some in lists], False)


# ---- Records ------------------------------------------------------------------------------------

# The forms of a record: the field of what is asked, and that of what is answered.
FORMS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"),
         ("instruction", "output"))
TAKEN = ("prompt and response (or completion), question and answer, instruction and output, "
         "messages, conversations, or text")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}


class Record(NamedTuple):
    """One record of a data file, whatever its form."""

    turns: list     # [{"role": ..., "content": ...}, ...]; the last is the assistant's, to learn
    question: str   # what a closed-book decoder may see besides; "" in most data


def parse_record(record):
    """A parsed record of a data file -> Record. Texts are kept as they are, white space too.

    The forms, by their fields: prompt and response (the toy's may have a question), prompt and
    completion, question and answer, instruction and output with an optional input (Alpaca),
    messages of role and content, conversations of from and value (ShareGPT), and plain text, which
    is one turn of the assistant's. ValueError names what is wrong, or the fields that were found.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, not {type(record).__name__}")
    for key in ("messages", "conversations"):
        if record.get(key) is not None:
            return Record(read_turns(record[key], key), "")
    given = {key for key, value in record.items() if value is not None}
    ask, reply = max(FORMS, key=lambda form: len(given.intersection(form)))
    if "text" in given and not given & {ask, reply}:
        return Record([{"role": "assistant", "content": text_field(record, "text")}], "")
    prompt, question = text_field(record, ask), ""
    if ask == "instruction":
        extra = text_field(record, "input", optional=True)
        prompt += f"\n\n{extra}" if extra else ""
    if ask == "prompt":
        question = text_field(record, "question", optional=True)
    return Record([{"role": "user", "content": prompt},
                   {"role": "assistant", "content": text_field(record, reply)}], question)


def read_turns(turns, key):
    """The turns of `messages` or `conversations`, without other fields."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key!r} must be a list of turns, which have role and content")
    found = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} of {key!r} must be an object with role and content")
        who, what = ("from", "value") if "from" in turn else ("role", "content")
        role = turn.get(who)
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"turn {number} of {key!r} has the {who} {role!r}; known are "
                             f"{', '.join(ROLES)}")
        found.append({"role": ROLES[role], "content": text_field(turn, what)})
    if len(found) < 2 or found[-1]["role"] != "assistant":
        raise ValueError(f"{key!r} must be two turns or more, the last the assistant's")
    return found


def text_field(record, name, optional=False):
    """A text of a record. One that is optional may be missing, null or empty: "" then."""
    value = record.get(name)
    if optional and value is None:
        return ""
    if name not in record:
        raise ValueError(f"no {name!r} in a record with {', '.join(map(str, record)) or 'nothing'}"
                         f"; taken are {TAKEN}")
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be text, not {type(value).__name__}")
    if not value.strip():
        if optional:
            return ""
        raise ValueError(f"{name!r} is empty: fill it in or remove the record")
    return clean_text(value)


def clean_text(text):
    """The same text. ValueError if it has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of the text is half of a surrogate pair, which "
                         "has no UTF-8 form: remove it") from None
    return text


# ---- Data files ---------------------------------------------------------------------------------

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
DATA_FILES = ["*" + suffix for suffix in SUFFIXES] + ["*.json.gz", "*.jsonl.gz", "*.csv.gz"]


def read_data(name, parse=parse_record, skip_bad=False):
    """parse(record) of each record of any data that people have, and how many were skipped.

    name: a file of JSON lines or a JSON array, also with .gz; CSV; parquet; a folder that datasets
    saved with save_to_disk; or an id of the hub, with id:split or id/subset:split if it has
    several. ValueError, one line, says what cannot be read and where.
    """
    path = Path(name)
    if path.is_file() and path.suffix not in (".csv", ".parquet"):
        return read_records(path, parse, skip_bad)
    if not path.exists() and (path.suffix in (".gz", *SUFFIXES) or path.is_absolute()):
        raise ValueError(f"--data {name}: no such file")
    rows = open_table(name, path) if path.exists() else open_hub_data(name)
    if isinstance(rows, Path):  # the one JSON file of a data set
        return read_records(rows, parse, skip_bad)
    # A table has every column in every row: null where a record lacks the field.
    places = ((f"row {number}", {key: value for key, value in row.items() if value is not None})
              for number, row in enumerate(rows, 1))
    return parse_all(name, places, parse, skip_bad)


def open_table(name, path):
    """The rows of a .csv or .parquet file, or of a folder of save_to_disk, through datasets."""
    import datasets
    try:
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
            return choose_split(name, found, "train") if isinstance(found, dict) else found
        kind = path.suffix.removeprefix(".")
        return datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:  # pyarrow, pandas and datasets each have their own
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ValueError(f"cannot read {name}: {reason}; give a .jsonl, .json, .csv or .parquet "
                         "file, or a folder of save_to_disk") from None


def open_hub_data(name):
    """The rows of a data set on the hub, or the path of its one JSON file, if that is all it has.

    Its data files are fetched, and datasets reads them. Code of the data set is never run.
    """
    words, _, split = name.partition(":")
    parts = words.split("/")
    repo, subset = "/".join(parts[:2]), "/".join(parts[2:]) or None
    instead = f"--data FILE.jsonl (.json, .csv, .parquet), whose records have {TAKEN}"
    folder = fetch_from_hub(repo, "dataset", [*DATA_FILES, "README.md"], instead)
    files = [path for pattern in DATA_FILES for path in sorted(folder.rglob(pattern))
             if path.name not in ("dataset_infos.json", "config.json")]
    if len(files) == 1 and not split and not subset and files[0].suffix in (".json", ".jsonl"):
        return files[0]
    import datasets
    try:
        found = datasets.load_dataset(str(folder), subset)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"data set {name} cannot be read: {reason}; say which part with "
                         "id/subset:split, or download a file and give that") from None
    return choose_split(name, found, split or "train")


def choose_split(name, found, split):
    """A split of a data set. ValueError names those that it has."""
    if split not in found:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(found)}: give one "
                         "with id:split")
    return found[split]


def read_records(path, parse, skip_bad=False):
    """parse(record) of each record of a JSONL file or JSON array, and how many were skipped.

    Errors are one-line ValueErrors with the line (in an array: the record) at fault; with
    skip_bad such records are skipped and counted instead.
    """
    text = _read_text(path)
    is_array = text.lstrip().startswith("[")
    places = _split_array(path, text) if is_array else _split_lines(text)
    return parse_all(path, places, parse if is_array else lambda part: parse(_load_json(part)),
                     skip_bad)


def parse_all(name, places, parse, skip_bad):
    """parse(part) of each (place, part), and how many were skipped. ValueError if none is left."""
    records, skipped = [], 0
    for place, part in places:
        try:
            records.append(parse(part))
        except (ValueError, RecursionError) as error:
            # JSON's own message would add a line number counted within this line.
            reason = f"{name}, {place}: {getattr(error, 'msg', error)}"
            if not skip_bad:
                raise ValueError(reason) from None
            skipped += 1
    if not records:
        last = f"; the last: {reason}" if skipped else ""
        raise ValueError(f"{name} has no usable records ({skipped} skipped{last}): taken are "
                         f"{TAKEN}")
    return records, skipped


def _read_text(path):
    """The text of a UTF-8 file, without the byte order mark that some editors put first.

    A file that ends in .gz is unpacked.
    """
    try:
        content = Path(path).read_bytes()
        if Path(path).suffix == ".gz":
            content = _unpack(path, content)
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


UNPACKED = 1 << 32  # bytes that a .gz file may unpack to: a small one can claim any number


def _unpack(path, content):
    """The content of a .gz file. ValueError if it is damaged, or larger than UNPACKED."""
    try:
        with gzip.open(io.BytesIO(content)) as file:
            text = file.read(UNPACKED + 1)
    except (EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if len(text) > UNPACKED:
        raise ValueError(f"{path} unpacks to more than {UNPACKED >> 30} GiB; split it")
    return text


def _split_lines(text):
    """The lines of a JSONL file that are not blank: [("line 1", text), ...]."""
    # Not splitlines(), which would also split at line separators inside a JSON text.
    lines = [line.strip() for line in text.split("\n")]
    return [(f"line {n}", line) for n, line in enumerate(lines, 1) if line]


def _split_array(path, text):
    """The records of a JSON array, parsed: [("record 1", record), ...]."""
    try:
        records = _load_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: JSON array: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: unusable JSON array: {error}") from None
    return [(f"record {n}", record) for n, record in enumerate(records, 1)]


def _load_json(text):
    """Parsed JSON. ValueError if two fields of an object have one name."""
    return json.loads(text, object_pairs_hook=_make_object)


def _make_object(pairs):
    """The fields of a JSON object as a dict.

    JSON itself would keep the last of two fields with one name. Nobody knows which was meant.
    """
    record = {}
    for name, value in pairs:
        if name in record:
            raise ValueError(f"{name!r} stands twice in a record")
        record[name] = value
    return record
