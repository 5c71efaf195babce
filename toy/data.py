"""One door to all toy data: what data.py asks for, for generated words and for real text."""
from __future__ import annotations

import os
import random

from data import PAD, Source, name_part
from files import nearest
from toy import tasks, text
from toy.tokenizer import KEYS, SEP, VALUES

LENGTHS = (32, 64, 128)
DICTIONARIES = ((16, 1), (16, 2), (32, 1), (32, 2), (64, 1), (64, 2), (64, 4))  # length, rep

# The columns of a table: label -> keywords of the task.
COLUMNS = {
    "dictionary": {f"{length} x{rep}": {"length": length, "rep": rep}
                   for length, rep in DICTIONARIES},
    "languages": {f"{length}": {"length": length} for length in LENGTHS},
    "prose": {f"{length}": {"length": length} for length in LENGTHS},
    "retrieval": {f"{task} {length}": {"task": task, "length": length}
                  for task in tasks.RETRIEVAL for length in LENGTHS},
}

QUERIES = 4  # keys of a dictionary that are asked for where the user does not say

# How many gaps an answer has where the user does not say.
USUAL_GAPS = {"dictionary": 1, "languages": 16, "prose": 16, "retrieval": 1}


class ToyData(Source):
    """Samples of one kind.

    kind: 'dictionary', 'languages', 'prose' or 'retrieval' (generated words), 'python' or 'pydoc'
    (text that comes with Python, as bytes), or data that people have, as data.read_data reads it
    (bytes).
    """

    def __init__(self, kind, prompt_length=256, response_length=64, skip_bad=False,
                 max_records=0):
        self.kind, self.prompt_length, self.response_length = kind, prompt_length, response_length
        self.columns = COLUMNS.get(kind, {f"{prompt_length}": {}})
        self.words = kind in COLUMNS
        self.window = 4096 if self.words else prompt_length + response_length
        self.tokenizer = tasks.WORDS if self.words else text.BYTES
        self.metric = "accuracy" if kind in ("dictionary", "retrieval") else "nats"
        self.docs, self.pairs, self.note = None, None, ""
        if kind in ("python", "pydoc"):
            self.docs = {split: text.documents(kind, split) for split in ("train", "test")}
        elif not self.words:
            self._open_file(kind, skip_bad, max_records)

    def _open_file(self, path, skip_bad, max_records):
        """Read a file of pairs and hold some of them out."""
        if not os.path.exists(path) and "/" not in path:
            known = [*COLUMNS, "python", "pydoc"]
            raise ValueError(f"--data {path}: no such file, and not one of {', '.join(known)}"
                             f"{nearest(path, known)}")
        pairs, bad = text.read_pairs(path, skip_bad, max_records)
        path = name_part(path, len(pairs) + bad, max_records)
        if not any(prompt for prompt, _, _ in pairs):
            return self._take_documents(path, pairs, bad)
        samples, long = [], 0
        for pair in pairs:
            try:
                samples.append(text.pair_sample(pair, self.prompt_length, self.response_length))
            except ValueError as error:
                long, reason = long + 1, error
        if not samples:
            raise ValueError(f"{path}: all {long} pairs are too long ({reason}); "
                             "raise --prompt-length and --response-length")
        # The split has a seed of its own: runs of different seeds are tested on the same pairs.
        train, test = text.split_pairs(samples, seed=0)
        self.pairs = {"train": train, "test": test}
        held = f"{len(test)} held out"
        if len(samples) == 1:
            held = "and tested on, there being only one"
        self.note = (f"{path}: {len(samples)} pairs kept ({len(train)} to train, {held}), "
                     f"{long} too long, {bad} malformed lines skipped")

    def _take_documents(self, path, pairs, bad):
        """Plain text has no prompts: its samples are windows, as of python and pydoc."""
        docs = [(str(number), whole.encode()) for number, (_, _, whole) in enumerate(pairs)]
        train, test = text.split_pairs(docs, seed=0)
        self.docs = {"train": train, "test": test}
        self.note = (f"{path}: {len(docs)} texts kept ({len(train)} to train, {len(test)} held "
                     f"out), {bad} malformed lines skipped")

    def train(self, rng, progress, number=0):
        """A training sample, drawn whatever its number.

        progress in [0, 1) drives the curriculum of generated tasks.
        """
        if self.words:
            return tasks.curriculum(self.kind, rng, progress)
        return self._draw_text(rng, "train")

    def test(self, column, name, number):
        """Held-out sample `number` of a column: the same for every model."""
        rng = random.Random(f"{name} {column} {number}")
        if self.pairs:
            # In turn, so that each pair comes as often as the others.
            return self.pairs["test"][number % len(self.pairs["test"])]
        if not self.words:
            return self._draw_text(rng, "test")
        keywords = dict(self.columns[column])
        return tasks.TASKS[keywords.pop("task", self.kind)](rng, **keywords)

    def _draw_text(self, rng, split):
        if self.docs:
            return text.cut(rng, self.docs[split], self.prompt_length, self.response_length)
        return rng.choice(self.pairs[split])

    def ask(self, prompt, question="", length=0):
        """A user's texts -> Sample with gaps to fill. ValueError if the prompt does not do.

        Generated words: each `?` of the question is a gap ("owl ? fox ?").
        A dictionary without a question is asked for its first keys.
        Text: the response follows the prompt and the question, as in training.
        Where there is no gap yet, `length` gaps follow; 0 stands for what the data is used to.
        """
        room = max(self.prompt_length, 4096 if self.words else 0)
        ids = self.tokenizer.encode(prompt)
        if not ids:
            raise ValueError("the prompt is empty; give some text with --prompt or --file")
        if len(ids) > room:
            raise ValueError(f"the prompt has {len(ids)} tokens but this model's window for it is "
                             f"{room}; shorten it")
        if self.kind == "dictionary" and not question and not length:
            words = prompt.split()
            keys = {key: None for key, value in zip(words, words[1:])
                    if key in KEYS and value in VALUES}
            question = " ".join(f"{key} ?" for key in list(keys)[:QUERIES])
        rest, gaps = self._read_words(question) if self.words else self._read_text(question)
        if not any(gaps):
            more = length or USUAL_GAPS.get(self.kind, self.response_length)
            rest, gaps = rest + [PAD] * more, gaps + [True] * more
        return tasks.Sample(ids, rest, gaps)

    def _read_words(self, question):
        """The ids of a question of words behind a separator, and which of them are gaps."""
        rest, gaps = [], []
        words = question.replace("?", " ? ").split()
        if words:
            rest, gaps = [SEP], [False]
        for word in words:
            rest += [PAD] if word == "?" else self.tokenizer.encode(word)
            gaps.append(word == "?")
        return rest, gaps

    def _read_text(self, question):
        """The ids of a question in bytes, with the separators that pairs have. No gaps."""
        rest = [SEP] + self.tokenizer.encode(question) if question else []
        rest = rest + [SEP] if self.pairs else rest
        return rest, [False] * len(rest)

    # ---- What a dictionary holds

    def recall(self, sample):
        """The value of the key before each gap, if the prompt is a dictionary that has just one."""
        if self.kind != "dictionary":
            return super().recall(sample)
        values = {}
        for key, value in zip(sample.prompt, sample.prompt[1:]):
            if tasks.WORDS.words[key] in KEYS and tasks.WORDS.words[value] in VALUES:
                values.setdefault(key, set()).add(value)
        known = [values.get(before, ()) for before in [None, *sample.rest]]
        return [next(iter(found)) if len(found) == 1 else None
                for found, gap in zip(known, sample.answer) if gap]

    def add_line(self, told, line):
        """What was told before and one more line, and the pairs that it takes the place of.

        ValueError if the line has an unknown word, or if it is not pairs, for a dictionary.
        """
        self.tokenizer.encode(line)
        if self.kind != "dictionary":
            return f"{told} {line}".strip(), ""
        words, before = line.split(), told.split()
        pairs = list(zip(words[::2], words[1::2]))
        if len(words) % 2 or not all(key in KEYS and value in VALUES for key, value in pairs):
            raise ValueError(f"{line!r} is not pairs of a key and a value, such as fox ruby (keys: "
                             f"{', '.join(KEYS[:4])} ...; values: {', '.join(VALUES[:4])} ...)")
        new, kept, gone = dict(pairs), [], []
        for key, value in zip(before[::2], before[1::2]):
            (gone if new.get(key, value) != value else kept).append(f"{key} {value}")
        return " ".join([*kept, line]), ", ".join(gone)
