"""Text for the real backbones: tokenizer, chat template, chat data."""
from __future__ import annotations

import random
from functools import lru_cache

import torch
from tqdm import tqdm

from backbones.families import FAMILIES
from data import Sample, collate

MASK_TOKENS = {family.mask_token for family in FAMILIES.values()}
TURN_ENDS = {token for family in FAMILIES.values() for token in family.turn_ends}
TURN_MARKS = {token for family in FAMILIES.values() for token in family.turn_marks}


class SpecialToken(ValueError):
    """A text that the model would not read as text."""


class Tokenizer:
    """The checkpoint's own tokenizer and chat template (Jinja, which transformers runs in a sandbox)."""

    def __init__(self, folder, config):
        from transformers import PreTrainedTokenizerFast
        try:
            self.hf = PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise ValueError(f"{folder}: the tokenizer cannot be read: {str(error).splitlines()[0][:200]}") from None
        if len(self.hf) > config.vocab_size:
            raise ValueError(f"{folder}: the tokenizer has {len(self.hf)} tokens, the model {config.vocab_size}")
        self.vocab_size, self.added = config.vocab_size, self.hf.get_added_vocab()
        self.mask_id = next((self.added[t] for t in sorted(MASK_TOKENS) if t in self.added), self.hf.mask_token_id)
        self.eos_id = self.hf.eos_token_id
        self.templated = bool(self.hf.chat_template) and self.good_template()

    @property
    def stop_ids(self):
        """A response ends with the template's end of turn, or with the end of text."""
        ends = (self.eos_id, *map(self.added.get, sorted(TURN_ENDS)))
        return [i for i in ends if i is not None]

    def good_template(self):
        """Can prompt and reply be told apart, and does a reply end in a token that says so?"""
        try:
            return self.split([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[1][-1] in self.stop_ids
        except ValueError:
            return False

    def refuse_special(self, text):
        """A user's text may not hold a mask, an end, or what begins a turn."""
        structure = TURN_MARKS | {self.hf.bos_token}
        for token, i in self.added.items():
            if token in text and (token in structure or i in (self.mask_id, *self.stop_ids)):
                raise SpecialToken(f"the text contains {token!r}, which this model reads as a special token; remove it")

    def encode(self, text):
        return self.hf(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids):
        return self.hf.decode(ids, skip_special_tokens=True)

    def pieces(self, ids):
        return [self.hf.decode([i]) for i in ids]

    def chat(self, messages):
        """[{role, content}, ...] -> (ids of the prompt, ids of the reply, [] if the last turn is the user's)."""
        for message in messages:
            self.refuse_special(message["content"])
        if self.templated:
            return self.split(messages)
        reply = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        prompt = "\n\n".join(m["content"] for m in messages[:len(messages) - bool(reply)]) + "\n\n"
        return self.encode(prompt), self.encode(reply) + [self.eos_id] if reply else []

    def split(self, messages):
        from jinja2 import TemplateError
        reply = messages[-1]["role"] == "assistant"
        try:
            prompt = self.hf.apply_chat_template(messages[:-1] if reply else messages, add_generation_prompt=True, tokenize=False)
            whole = self.hf.apply_chat_template(messages, tokenize=False) if reply else prompt
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from None
        if not whole.startswith(prompt):
            raise ValueError("the model's chat template does not put a reply behind its generation prompt")
        ids = self.encode(whole[len(prompt):])
        ends = [i for i, token in enumerate(ids) if token in self.stop_ids]
        return self.encode(prompt), ids[:ends[0] + 1] if ends else ids  # some templates go on with the next turn's header


def chat_turns(record):
    """A record of a data file -> chat messages: `messages`, prompt and response, or Alpaca's fields. ValueError if neither."""
    def text(key, optional=False):
        value = record.get(key)
        if optional and value in (None, ""):
            return ""
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{key!r} is {'missing' if key not in record else 'empty' if value in ('', None) else 'no text'}")
        return value.strip()

    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object, not {type(record).__name__}")
    if "messages" in record:
        turns = record["messages"]
        good = isinstance(turns, list) and len(turns) > 1 and all(
            isinstance(t, dict) and t.get("role") in ("system", "user", "assistant") and isinstance(t.get("content"), str)
            and t["content"].strip() for t in turns)
        if not good or turns[-1]["role"] != "assistant":
            raise ValueError("'messages' must be a list of {role, content} that ends with the assistant's turn")
        return [{"role": t["role"], "content": t["content"]} for t in turns]
    if "instruction" in record:
        extra = text("input", optional=True)
        prompt, reply = text("instruction") + (f"\n\n{extra}" if extra else ""), text("output")
    else:
        prompt, reply = text("prompt"), text("response")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


class ChatData:
    """Training pairs through the chat template, with the interface of toy.data.ToyData. The Base models are trained with
    the template too, as in the published run."""
    words, metric, kind = False, "nats", "chat"

    def __init__(self, backbone, records=(), max_length=4096, truncate=False, split_seed=42, where="", bad=0, seed=0):
        self.tokenizer, self.window, self.seed = backbone.tokenizer, backbone.config.max_length, seed
        if self.tokenizer is None:
            raise ValueError(f"{backbone.name} has no tokenizer.json, so it cannot read text")
        samples, long, cut, special = [], 0, 0, 0
        for turns in tqdm(records, desc="reading", unit="record", delay=1):
            try:
                prompt, reply = self.tokenizer.chat(turns)
            except SpecialToken:
                special += 1
                continue
            room = max_length - len(prompt)
            if room <= 0 or (len(reply) > room and not truncate):
                long += 1
                continue
            cut += len(reply) > room
            samples.append(Sample(prompt, reply[:room], [True] * len(reply[:room])))
        if records and len(samples) < 2:
            raise ValueError(f"{where}: {len(samples)} samples left of {len(records)} ({long} longer than {max_length} tokens, "
                             f"{special} with special tokens in their text); raise --max-length, or --truncate")
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(split_seed)).tolist()
        held = max(1, len(samples) // 20)  # 95 % to train, 5 % held out
        self.pairs = {"test": [samples[i] for i in order[:held]], "train": [samples[i] for i in order[held:]]}
        self.columns = {"held out": {}}
        lengths = sorted(len(s.prompt) + len(s.rest) for s in samples)
        self.note = (f"{where}: {len(samples)} samples kept ({len(self.pairs['train'])} to train, {held} held out; "
                     f"{lengths[len(lengths) // 2]} tokens in the median, {lengths[-1]} at most), {long} too long, {cut} cut, "
                     f"{special} with special tokens in their text, {bad} malformed"
                     + ("" if self.tokenizer.templated else "; no usable chat template, so prompt and reply are joined by a blank "
                        "line")) if samples else ""

    def train(self, rng, progress, number):
        """Training sample `number`: all of them in a new order in each epoch."""
        epoch, i = divmod(number, len(self.pairs["train"]))
        return self.pairs["train"][_shuffled(f"{self.seed} {epoch}", len(self.pairs["train"]))[i]]

    def test(self, column, name, number):
        return self.pairs["test"][number % len(self.pairs["test"])]

    def tests(self, column, numbers, closed_book, name="test"):
        """Held-out samples as one batch."""
        return collate([self.test(column, name, n) for n in numbers], [f"{name} {column} {n}" for n in numbers], closed_book)

    def ask(self, prompt, question="", length=0):
        """A user's text as the user's turn -> Sample with `length` gaps for the reply."""
        if question or not prompt.strip():
            raise ValueError("the prompt is empty; give some text with --prompt or --file" if not question else
                             "--question is for the toy; put the question into the prompt")
        ids, length = self.tokenizer.chat([{"role": "user", "content": prompt.strip()}])[0], length or 128
        if len(ids) + length > self.window:
            raise ValueError(f"the prompt has {len(ids)} tokens, with {length} to generate more than the model's window of "
                             f"{self.window}; shorten it")
        return Sample(ids, [0] * length, [True] * length)


@lru_cache(maxsize=2)
def _shuffled(name, n):
    return random.Random(name).sample(range(n), n)
