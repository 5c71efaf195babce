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

import json
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


# ---- Data files ---------------------------------------------------------------------------------

def find_data_file(name):
    """The path of a .json or .jsonl file: `name` itself, or the only one of a data set on the hub.

    ValueError if the data set cannot be fetched or holds another number of files.
    """
    if Path(name).is_file():
        return name
    instead = ("--data FILE.jsonl, with prompt and response (or instruction and output, or "
               "messages) in each line")
    folder = fetch_from_hub(name, "dataset", ["*.json", "*.jsonl"], instead)
    found = sorted(path for path in folder.rglob("*.json*")
                   if path.name not in ("dataset_infos.json", "config.json"))
    if len(found) != 1:
        some = ", ".join(path.name for path in found[:5])
        raise ValueError(f"data set {name} has {len(found)} JSON files ({some}); download one "
                         "and give it with --data FILE.json")
    return str(found[0])


def read_records(path, parse, skip_bad=False):
    """parse(record) of each record of a JSONL file or JSON array, and how many were skipped.

    Errors are one-line ValueErrors with the line (in an array: the record) at fault; with
    skip_bad such records are skipped and counted instead.
    """
    text = _read_text(path)
    is_array = text.lstrip().startswith("[")
    places = _split_array(path, text) if is_array else _split_lines(text)
    records, skipped = [], 0
    for place, part in places:
        try:
            records.append(parse(part if is_array else _load_json(part)))
        except (ValueError, RecursionError) as error:
            if not skip_bad:
                # JSON's own message would add a line number counted within this line.
                raise ValueError(f"{path}, {place}: {getattr(error, 'msg', error)}") from None
            skipped += 1
    if not records:
        raise ValueError(
            f"{path} has no usable records ({skipped} skipped): "
            'give one JSON object {"prompt": ..., "response": ...} per line'
        )
    return records, skipped


def _read_text(path):
    """The text of a UTF-8 file, without the byte order mark that some editors put first."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


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
