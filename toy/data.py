"""One door to all toy data: a tokenizer, training samples, test samples by column, and padding into batches."""
from __future__ import annotations

import os
import random

from data import collate
from toy import tasks, text
from toy.tokenizer import PAD, SEP

LENGTHS = (32, 64, 128)
COLUMNS = {  # what a panel's columns are: label -> keywords of the task
    "dictionary": {f"{length} x{rep}": {"length": length, "rep": rep}
                   for length, rep in ((16, 1), (16, 2), (32, 1), (32, 2), (64, 1), (64, 2), (64, 4))},
    "languages": {f"{length}": {"length": length} for length in LENGTHS},
    "prose": {f"{length}": {"length": length} for length in LENGTHS},
    "retrieval": {f"{task} {length}": {"task": task, "length": length}
                  for task in tasks.RETRIEVAL for length in LENGTHS},
}


class ToyData:
    """Samples of one kind.

    kind: 'dictionary', 'languages' or 'retrieval' (generated words), 'python' or 'pydoc' (text that comes with
    Python, bytes), or the path of a .json / .jsonl file of prompt and response pairs (bytes).
    metric: 'accuracy' (share of answer tokens right, decoded) or 'nats' (cross-entropy per answer token).
    """

    def __init__(self, kind, prompt_length=256, response_length=64, skip_bad=False):
        self.kind, self.prompt_length, self.response_length = kind, prompt_length, response_length
        self.columns, self.note = COLUMNS.get(kind, {f"{prompt_length}": {}}), ""
        self.words = kind in COLUMNS
        self.tokenizer = tasks.WORDS if self.words else text.BYTES
        self.metric = "accuracy" if kind in ("dictionary", "retrieval") else "nats"
        if kind in ("python", "pydoc"):
            self.docs = {split: text.documents(kind, split) for split in ("train", "test")}
        elif not self.words:
            self._open_file(kind, skip_bad)

    def _open_file(self, path, skip_bad):
        if not os.path.exists(path):
            raise ValueError(f"--data {path}: no such file, and not one of {', '.join(COLUMNS)}, python, pydoc")
        pairs, bad = text.read_pairs(path, skip_bad)
        samples, long = [], 0
        for pair in pairs:
            try:
                samples.append(text.pair_sample(pair, self.prompt_length, self.response_length))
            except ValueError as error:
                long, reason = long + 1, error
        if not samples:
            raise ValueError(f"{path}: all {long} pairs are too long ({reason}); "
                             "raise --prompt-length and --response-length")
        # The split has a seed of its own, so that runs of different seeds are tested on the same pairs.
        self.pairs = dict(zip(("train", "test"), text.split_pairs(samples, seed=0)))
        held = f"{len(self.pairs['test'])} held out" if len(samples) > 1 else "and tested on, there being only one"
        self.note = (f"{path}: {len(samples)} pairs kept ({len(self.pairs['train'])} to train, {held}), "
                     f"{long} too long, {bad} malformed lines skipped")

    def train(self, rng, progress, number=0):
        """A training sample; progress in [0, 1) drives the curriculum of generated tasks. Drawn, whatever its number."""
        if self.words:
            return tasks.curriculum(self.kind, rng, progress)
        return self._text(rng, "train")

    def test(self, column, name, number):
        """Held-out sample `number` of a column of `self.columns`: the same for every model."""
        rng = random.Random(f"{name} {column} {number}")
        if hasattr(self, "pairs"):
            return self.pairs["test"][number % len(self.pairs["test"])]  # in turn: each pair as often as the others
        if not self.words:
            return self._text(rng, "test")
        keywords = dict(self.columns[column])
        return tasks.TASKS[keywords.pop("task", self.kind)](rng, **keywords)

    def _text(self, rng, split):
        if hasattr(self, "docs"):
            return text.cut(rng, self.docs[split], self.prompt_length, self.response_length)
        return rng.choice(self.pairs[split])

    def ask(self, prompt, question="", length=0):
        """A user's texts -> Sample with gaps to fill. `length`: gaps, 0 for what the data is used to.

        Generated words: a `?` in the question is a gap ("owl ? fox ?"); without one, gaps are added at its end.
        Text: the response follows the prompt, as in training.
        """
        room = max(self.prompt_length, 4096 if self.words else 0)
        ids = self.tokenizer.encode(prompt)
        if not ids:
            raise ValueError("the prompt is empty; give some text with --prompt or --file")
        if len(ids) > room:
            raise ValueError(f"the prompt has {len(ids)} tokens but this model's window for it is {room}; shorten it")
        usual = {"dictionary": 1, "languages": 16, "prose": 16, "retrieval": 1}.get(self.kind, self.response_length)
        if self.words:
            words = question.split()
            visible = [SEP] if words else []
            rest, answer = list(visible), [False] * len(visible)
            for word in words:
                rest += [PAD] if word == "?" else self.tokenizer.encode(word)
                answer.append(word == "?")
        else:
            visible = ([SEP] + self.tokenizer.encode(question) if question else [])
            rest = visible + ([SEP] if hasattr(self, "pairs") else [])
            answer = [False] * len(rest)
        if not any(answer):
            rest, answer = rest + [PAD] * (length or usual), answer + [True] * (length or usual)
        return tasks.Sample(ids, rest, answer)

    def tests(self, column, numbers, closed_book, name="test"):
        """The held-out samples with these numbers as one batch."""
        samples = [self.test(column, name, number) for number in numbers]
        return collate(samples, [f"{name} {column} {number}" for number in numbers], closed_book)
