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

import codecs
import contextlib
import csv
import gzip
import json
import re
import zlib
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

from console import say
from files import fetch_from_hub, size_on_hub
from memdlm import Batch

PAD = 0  # the id that fills up a sample. No one reads it: `valid` is False there.


class Sample(NamedTuple):
    """One task instance, as token ids."""

    prompt: list[int]   # what memory may be written from; a closed-book decoder never sees it
    rest: list[int]     # what follows: visible question and answer, possibly interleaved
    answer: list[bool]  # which tokens of `rest` are answer: noised in training, then decoded


GAP = re.compile(r"\[MASK(?::([1-9]\d{0,6}))?\]")  # in a text to fill in: [MASK], or [MASK:8]


class Source:
    """What the data of toy and real models share.

    window: how many tokens a text to fill in may have.
    """

    def tests(self, column, numbers, closed_book, name="test"):
        """The held-out samples with these numbers as one batch."""
        samples = [self.test(column, name, number) for number in numbers]
        seeds = [f"{name} {column} {number}" for number in numbers]
        return collate(samples, seeds, closed_book)

    def count_tests(self, most):
        """How many different samples are held out, at most `most`. What is drawn has no end."""
        return min(most, len(self.pairs["test"])) if self.pairs else most

    def ask_gaps(self, text):
        """A text in which [MASK] is a gap and [MASK:8] are eight -> Sample.

        Its prompt, from which memory may be written, is what stands there; its rest is the text
        with the gaps. ValueError if the text does not do.
        """
        ids, gaps, words = [], [], GAP.split(text)
        for part, count in zip_longest(words[::2], words[1::2], fillvalue=0):
            if "[MASK" in part:
                raise ValueError(f"{part.strip()[:40]!r} is no gap: a gap is [MASK], or [MASK:8] "
                                 "for several tokens")
            own = self.tokenizer.encode(part)
            more = 0 if count == 0 else int(count or 1)
            if len(ids) + len(own) + more > self.window:
                raise ValueError(f"the text with its gaps has more than {self.window} tokens, "
                                 "which is this model's window; shorten it")
            ids, gaps = ids + own + [PAD] * more, gaps + [False] * len(own) + [True] * more
        prompt = [token for token, gap in zip(ids, gaps) if not gap]
        if not prompt:
            raise ValueError("there are only gaps; give some text around them")
        return Sample(prompt, ids, gaps)

    def recall(self, sample):
        """What is right in each gap of a user's question; None where nobody knows."""
        return [None] * sum(sample.answer)


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
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return Batch(
        x0=pad(texts, PAD), maskable=pad(answers, False),
        valid=mark_response(where_tokens(texts), 0 * lengths if closed_book else lengths),
        seeds=list(seeds), prompt=pad(prompts, PAD),
        prompt_valid=mark_response(where_tokens(prompts), lengths))


def mark_response(valid, starts):
    """`valid` [B, L], with word of where each response begins, starts [B], in `response_at`.

    A real model whose prompt looks left only has to know. Nobody else reads it.
    """
    valid.response_at = starts
    return valid


def pad(lists, filler):
    """Lists of different lengths -> [B, L], filled up on the right."""
    longest = max(len(some) for some in lists)
    return torch.tensor([[*some, *[filler] * (longest - len(some))] for some in lists])


def where_tokens(lists):
    """[B, L] bool, False on the padding."""
    return pad([[True] * len(some) for some in lists], False)


def visible_pieces(pieces):
    """The display strings of tokens, without those that say nothing to a reader."""
    return [piece if piece not in ("<sep>", "<eos>", "<pad>") else "" for piece in pieces]


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
    given = {key for key, value in record.items() if value is not None}
    whole = [form for form in (("messages",), ("conversations",), *FORMS) if given.issuperset(form)]
    if len(whole) > 1:
        raise ValueError(f"the record has {' and '.join(whole[0])}, but also "
                         f"{' and '.join(whole[1])}: nobody knows which is meant, so leave one out")
    ask, *more = fields_of(given)
    if ask in ("messages", "conversations"):
        return Record(read_turns(record[ask], ask), "")
    if ask == "text":
        return Record([{"role": "assistant", "content": text_field(record, "text")}], "")
    reply = more[0]
    prompt, question = text_field(record, ask), ""
    if ask == "instruction":
        extra = text_field(record, "input", optional=True)
        prompt += f"\n\n{extra}" if extra else ""
    if ask == "prompt":
        question = text_field(record, "question", optional=True)
    return Record([{"role": "user", "content": prompt},
                   {"role": "assistant", "content": text_field(record, reply)}], question)


def fields_of(given):
    """The fields that a record is read from, of those that it has. The first says which form."""
    for key in ("messages", "conversations"):
        if key in given:
            return (key,)
    ask, reply = max(FORMS, key=lambda form: len(given.intersection(form)))
    if "text" in given and not given & {ask, reply}:
        return ("text",)
    return ask, reply, {"instruction": "input", "prompt": "question"}.get(ask, reply)


def unread_fields(record):
    """The fields of a record, and of its turns, that say something and are not read."""
    if not isinstance(record, dict):
        return []
    given = {key for key, value in record.items() if value not in (None, "", [], {})}
    names, unread = fields_of(given), []
    if isinstance(turns := record.get(names[0]), list):
        read = ("role", "content", "from", "value")
        unread = [f"{names[0]}: {key}" for turn in turns if isinstance(turn, dict)
                  for key, value in turn.items() if value is not None and key not in read]
    return [*given.difference(names), *unread]


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
            raise ValueError(f"turn {number} of {key!r} has the {who} {shorten(repr(role))}; known "
                             f"are {', '.join(ROLES)}")
        for name in ("tool_calls", "function_call"):
            if turn.get(name):
                raise ValueError(f"turn {number} of {key!r} has {name}, which no model here is "
                                 "taught; remove the record")
        try:
            turn = {what: join_parts(turn[what])} if what in turn else turn
            found.append({"role": ROLES[role], "content": text_field(turn, what)})
        except ValueError as error:
            raise ValueError(f"turn {number} of {key!r}: {error}") from None
    if len(found) < 2 or found[-1]["role"] != "assistant":
        raise ValueError(f"{key!r} must be two turns or more, the last the assistant's")
    return found


def join_parts(content):
    """The text of a turn whose content is a list of texts, [{"type": "text", "text": ...}, ...].

    Other content is returned as it is.
    """
    def is_part(part):
        return isinstance(part, dict) and {*part} == {"type", "text"} and (
            part["type"] == "text" and isinstance(part["text"], str))

    if not isinstance(content, list) or not content or not all(map(is_part, content)):
        return content
    return "".join(part["text"] for part in content)


def text_field(record, name, optional=False):
    """A text of a record. One that is optional may be missing, null or empty: "" then."""
    value = record.get(name)
    if optional and value is None:
        return ""
    if name not in record:
        found = shorten(", ".join(map(str, record))) or "nothing"
        raise ValueError(f"no {name!r} in a record with {found}; taken are {TAKEN}")
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be text, not {type(value).__name__}")
    if not value.strip():
        if optional:
            return ""
        raise ValueError(f"{name!r} is empty: fill it in or remove the record")
    return clean_text(value)


def shorten(text, most=200):
    """The beginning of a text, for a line that a user reads."""
    return text if len(text) <= most else text[:most] + " ..."


def clean_text(text):
    """The same text. ValueError if it has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of the text is half of a surrogate pair, which "
                         "has no UTF-8 form: remove it") from None
    return text


# ---- Data files ---------------------------------------------------------------------------------

READ_HERE = (".jsonl", ".json", ".csv")  # without the datasets library, and also with .gz
SUFFIXES = (*READ_HERE, *(suffix + ".gz" for suffix in READ_HERE), ".parquet")
DATA_FILES = ["*" + suffix for suffix in SUFFIXES]
FILES = ".jsonl, .json or .csv (also with .gz), .parquet, or a folder of save_to_disk"
UNPACKED = 1 << 32  # bytes of a line, or of a .gz file: a small one can claim to hold any number
FETCHED = 1 << 30  # bytes of a data set on the hub that are fetched rather than streamed


def read_data(name, parse=parse_record, skip_bad=False, most=0):
    """parse(record) of the records of any data that people have, and how many were skipped.

    name: a file of JSON lines or a JSON array, or CSV, each also with .gz; parquet; a folder that
    datasets saved with save_to_disk; or an id of the hub, with id:split or id/subset:split if it
    has several. ValueError, one line, says what cannot be read and where.

    most: the first records, so many, are read and no more of the data; 0 for all. They are the
    same each time. With skip_bad, records that cannot be used are skipped and counted instead.
    """
    path = Path(name)
    if not path.exists() and (path.suffix.lower() in (".gz", *SUFFIXES) or path.is_absolute()):
        raise ValueError(f"--data {name}: no such file")
    places = read_path(path) if path.exists() else read_hub(name, most)
    with contextlib.closing(places):
        return parse_all(name, islice(places, most or None), parse, skip_bad)


def name_part(name, count, most):
    """How to call what was read, if `count` records were read and `most` was the bound."""
    return f"the first {most} records of {name} (--max-records)" if count == most else str(name)


def parse_all(name, places, parse, skip_bad):
    """parse(part) of each (place, part), and how many were skipped. ValueError if none is left.

    A part is a parsed record, or the error that says why there is none.
    """
    records, skipped, unread = [], [], set()
    for place, part in places:
        try:
            if isinstance(part, Exception):
                raise part
            records.append(parse(part))
            unread.update(unread_fields(part))
        except (ValueError, RecursionError) as error:
            # JSON's own message would add a line number counted within this line.
            reason = shorten(str(getattr(error, "msg", error)), 500)
            if not skip_bad:
                raise ValueError(f"{name}, {place}: {reason}") from None
            skipped.append((place, reason))
    last = f"; the last, {skipped[-1][0]}: {skipped[-1][1]}" if skipped else ""
    if not records:
        raise ValueError(f"{name} has no usable records ({len(skipped)} skipped{last}): taken are "
                         f"{TAKEN}")
    if skipped:
        places = shorten(", ".join(place for place, _ in skipped), 60)
        say(f"{name}: left out {places}{last}")
    if unread:
        say(f"{name}: fields that are not read: {shorten(', '.join(sorted(unread)))}")
    return records, len(skipped)


def read_path(path):
    """The records of a file or folder, one after the other: (place, part), for `parse_all`."""
    if path.is_dir() or path.suffix.lower() == ".parquet":
        return read_rows(path, read_folder if path.is_dir() else read_parquet)
    kind = path.name.lower().removesuffix(".gz")
    return read_csv(path) if kind.endswith(".csv") else read_json_file(path)


# ---- Text files ---------------------------------------------------------------------------------

def read_lines(path):
    """The lines of a UTF-8 file, one after the other, with their ends.

    A file that ends in .gz is unpacked as far as it is read. The byte order mark that some editors
    put first is left out.
    """
    packed, size, number = path.suffix.lower() == ".gz", 0, 0
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            # Only \n ends a line: JSON texts may hold the other characters that end one.
            while line := file.readline(UNPACKED + 1):
                number, size = number + 1, size * packed + len(line)
                if size > UNPACKED:
                    raise ValueError(f"{path} unpacks to more than {UNPACKED >> 30} GiB, or has a "
                                     "line as long; split it")
                yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}, line {number}: not UTF-8; give UTF-8 text as {FILES}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', 0) or error}") from None


def read_json_file(path):
    """The records of a JSONL file, whose blank lines do not count, or of a JSON array."""
    lines, begun = read_lines(path), False
    for number, whole_line in enumerate(lines, 1):
        line = whole_line.strip()
        if line.startswith("[") and not begun:
            yield from _split_array(path, "\n" * (number - 1) + whole_line + "".join(lines))
            return
        if line and not begun and not line.startswith("{") and path.suffix and not (
                path.name.lower().endswith(SUFFIXES)):
            raise ValueError(f"cannot read {path}: it does not begin as JSON does; give {FILES}")
        begun = begun or bool(line)
        if line:
            yield f"line {number}", _load_line(line)


def read_csv(path):
    """The rows of a CSV file as records. Every cell is text, and an empty one is no field."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(read_lines(path), strict=True)
    while (names := _next_row(rows)) == []:  # a blank line
        pass
    if not isinstance(names, list) or len({*names}) < len(names):
        raise ValueError(f"cannot read {path}: its first line must name the columns, each by a "
                         "name of its own")
    number = 0
    while (cells := _next_row(rows)) is not None:
        number += cells != []  # a blank line
        if isinstance(cells, Exception):
            yield f"row {number}", cells
        elif len(cells) > len(names):
            yield f"row {number}", ValueError(f"it has {len(cells)} cells for the {len(names)} "
                                              f"columns {', '.join(names)}")
        elif cells:
            yield f"row {number}", {key: cell for key, cell in zip(names, cells) if cell}


def _next_row(rows):
    """The cells of the next row of a CSV file, the error that it has, or None at the end."""
    try:
        return next(rows, None)
    except csv.Error as error:
        if "unexpected end" in str(error):
            error = f"{error}: a quote opens in it and never ends, so it holds all that follows"
        return ValueError(f"the row is no CSV: {error}")


def _split_array(path, text):
    """The records of a JSON array, parsed: [("record 1", record), ...]."""
    try:
        records = _load_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: JSON array: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: unusable JSON array: {error}") from None
    return [(f"record {n}", record) for n, record in enumerate(records, 1)]


def _load_line(line):
    """A parsed line of JSON, or the error that says what is wrong with it."""
    try:
        return _load_json(line)
    except (ValueError, RecursionError) as error:
        return error


# ---- Tables -------------------------------------------------------------------------------------

def read_rows(name, open_rows, instead=FILES):
    """The rows of a table as records. ValueError if open_rows(name) cannot open or read it."""
    try:
        for number, row in enumerate(open_rows(name), 1):
            # A table has every column in every row: null where a record lacks the field.
            yield f"row {number}", {key: value for key, value in row.items() if value is not None}
    except Exception as error:  # pyarrow, pandas and datasets each have their own
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"cannot read {name}: {reason}; give {instead}") from None


def read_parquet(path):
    """The rows of a parquet file, a few at a time."""
    from pyarrow.parquet import ParquetFile
    file = ParquetFile(path)
    if len({*file.schema_arrow.names}) < len(file.schema_arrow.names):
        raise ValueError("two of its columns have one name")
    for batch in file.iter_batches(batch_size=256):
        yield from batch.to_pylist()


def read_folder(path):
    """The rows of a folder of save_to_disk: its own, or those of its split `train`."""
    import datasets
    found = datasets.load_from_disk(str(path))
    if not isinstance(found, dict):
        return found
    return choose_split(path, found, "train", f"--data {path / next(iter(found), 'NAME')}")


def read_hub(name, most):
    """The records of a data set on the hub: (place, part). Code of the data set is never run.

    Its data files are fetched, and datasets reads them, or we do if there is only one. A set that
    is larger than FETCHED is not fetched: as much as is needed is streamed.
    """
    words, _, split = name.partition(":")
    parts = words.split("/")
    repo, subset = "/".join(parts[:2]), "/".join(parts[2:]) or None
    source = repo
    if not most or size_on_hub(repo, "dataset", DATA_FILES) <= FETCHED:
        instead = f"--data FILE ({FILES}), whose records have {TAKEN}"
        folder = source = fetch_from_hub(repo, "dataset", [*DATA_FILES, "README.md"], instead)
        files = [path for pattern in DATA_FILES for path in sorted(folder.rglob(pattern))
                 if path.name not in ("dataset_infos.json", "config.json")]
        if len(files) == 1 and not split and not subset and files[0].suffix != ".parquet":
            return read_path(files[0])

    def open_rows(name):
        import datasets
        found = datasets.load_dataset(str(source), subset, streaming=True)
        return choose_split(name, found, split or "train")

    return read_rows(name, open_rows, "a part of it with id/subset:split, or download a file")


def choose_split(name, found, split, instead="id:split"):
    """A split of a data set. ValueError names those that it has, and how to give one."""
    if split not in found:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(found)}: give one "
                         f"with {instead}")
    return found[split]


# ---- JSON ---------------------------------------------------------------------------------------

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
