"""Samples and batches, and the reader of files that people have."""
from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from files import fetch_from_hub
from memdlm import Batch

PAD = 0  # what fills up a row; never read, for `valid` is False there


class Sample(NamedTuple):
    """One task instance, as token ids."""

    prompt: list[int]   # what memory may be written from; a closed-book decoder never sees it
    rest: list[int]     # what follows: visible question and answer, possibly interleaved
    answer: list[bool]  # which tokens of `rest` are answer: noised in training, then decoded


def pad(rows, filler):
    """Rows of different lengths -> [B, L], filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


def collate(samples, seeds, closed_book):
    """Samples -> Batch. With closed_book the prompt is left out of x0 and only stands in `prompt`."""
    rows = [(s.rest, s.answer) if closed_book else (s.prompt + s.rest, [False] * len(s.prompt) + s.answer)
            for s in samples]
    prompts = [s.prompt for s in samples]
    return Batch(x0=pad([ids for ids, _ in rows], PAD), maskable=pad([answer for _, answer in rows], False),
                 valid=pad([[True] * len(ids) for ids, _ in rows], False), seeds=list(seeds),
                 prompt=pad(prompts, PAD), prompt_valid=pad([[True] * len(p) for p in prompts], False))


def find_data_file(name):
    """A .json or .jsonl file, or the hub's id of a data set that holds exactly one -> path."""
    if Path(name).is_file():
        return name
    folder = fetch_from_hub(name, "dataset", ["*.json", "*.jsonl"], "--data FILE.jsonl, with prompt and response (or instruction and "
                      "output, or messages) in each line")
    found = sorted(p for p in folder.rglob("*.json*") if p.name not in ("dataset_infos.json", "config.json"))
    if len(found) != 1:
        raise ValueError(f"data set {name} has {len(found)} JSON files ({', '.join(p.name for p in found[:5])}); download one "
                         "and give it with --data FILE.json")
    return str(found[0])


def read_records(path, parse, skip_bad=False):
    """parse(record) of each record of a JSONL file or JSON array, and how many were skipped.

    Errors are one-line ValueErrors with the line (in an array: the record) at fault; with
    skip_bad such records are skipped and counted instead.
    """
    records, skipped = [], 0
    for place, load in _records(path, _read_text(path)):
        try:
            records.append(parse(load()))
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


def _records(path, text):
    """For each record its place in the file and a function that gives its parsed JSON."""
    if not text.lstrip().startswith("["):
        # Not splitlines(), which would also split at line separators inside a JSON text.
        lines = [line.strip() for line in text.split("\n")]
        return [(f"line {n}", lambda line=line: json.loads(line, object_pairs_hook=_unique))
                for n, line in enumerate(lines, 1) if line]
    try:
        records = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: JSON array: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: unusable JSON array: {error}") from None
    return [(f"record {n}", lambda record=record: record) for n, record in enumerate(records, 1)]


def _unique(pairs):
    """A JSON object whose names differ: of two fields of one name it is not known which was meant."""
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{twice!r} stands twice in a record")
    return record
