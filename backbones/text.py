"""Text for the real backbones: tokenizer, chat template, and chat data to train on.

The chat template is a Jinja program that comes with the checkpoint. The transformers library runs
it in a sandbox.
"""
from __future__ import annotations

import random
from functools import lru_cache

import torch
from tqdm import tqdm

from backbones.families import FAMILIES
from data import Sample, Source

# The special tokens of all families. A tokenizer has those of its own.
MASK_TOKENS = sorted({family.mask_token for family in FAMILIES.values()})
TURN_ENDS = sorted({token for family in FAMILIES.values() for token in family.turn_ends})
TURN_MARKS = {token for family in FAMILIES.values() for token in family.turn_marks}
BREAK = "\ue000"  # stands in a text where a special token's name was broken


# ---- The tokenizer ------------------------------------------------------------------------------

class SpecialToken(ValueError):
    """A text holds a token that the model would not read as text."""


class Tokenizer:
    """The checkpoint's own tokenizer and chat template."""

    def __init__(self, folder, config):
        from transformers import PreTrainedTokenizerFast
        try:
            self.hf = PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            reason = str(error).splitlines()[0][:200]
            raise ValueError(f"{folder}: the tokenizer cannot be read: {reason}") from None
        if len(self.hf) > config.vocab_size:
            raise ValueError(f"{folder}: the tokenizer has {len(self.hf)} tokens, the model "
                             f"{config.vocab_size}")
        self.vocab_size, self.added = config.vocab_size, self.hf.get_added_vocab()
        known = [self.added[token] for token in MASK_TOKENS if token in self.added]
        self.mask_id = known[0] if known else self.hf.mask_token_id
        self.eos_id = self.hf.eos_token_id
        self.templated = bool(self.hf.chat_template) and self.template_is_usable()

    @property
    def stop_ids(self):
        """The tokens that end a reply: the end of text and the template's end of turn."""
        ends = [self.eos_id, *(self.added.get(token) for token in TURN_ENDS)]
        return [i for i in ends if i is not None]

    def template_is_usable(self):
        """Can prompt and reply be told apart, and does a reply end in a token that says so?"""
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            return self.apply_template(example)[1][-1] in self.stop_ids
        except ValueError:
            return False

    def encode(self, text):
        """Ids of a text, without a token at its start or end."""
        parts = self.hf(text.split(BREAK), add_special_tokens=False)["input_ids"]
        return [i for part in parts for i in part]

    def shield(self, text):
        """The text with a break in every name of a special token: `encode` gives its characters."""
        for token in self.hf.all_special_tokens + [self.hf.bos_token, *TURN_MARKS, *TURN_ENDS]:
            if token in self.added:
                text = text.replace(token, token[0] + BREAK + token[1:])
        return text

    def decode(self, ids):
        """The text of ids; special tokens are skipped."""
        return self.hf.decode(ids, skip_special_tokens=True)

    def pieces(self, ids):
        """One display string per token."""
        return [self.hf.decode([i]) for i in ids]

    def chat(self, messages):
        """[{role, content}, ...] -> ids of the prompt, ids of the reply.

        The reply is [] if the last turn is the user's. Without a usable template the turns are
        joined by blank lines.
        """
        for message in messages:
            self.refuse_special(message["content"])
        if self.templated:
            return self.apply_template(messages)
        reply = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        turns = messages[:-1] if reply else messages
        prompt = "\n\n".join(turn["content"] for turn in turns) + "\n\n"
        return self.encode(prompt), self.encode(reply) + [self.eos_id] if reply else []

    def refuse_special(self, text):
        """SpecialToken if a user's text holds a mask, an end, or what begins a turn."""
        marks = TURN_MARKS | {self.hf.bos_token}
        for token, i in self.added.items():
            if token in text and (token in marks or i in (self.mask_id, *self.stop_ids)):
                raise SpecialToken(f"the text contains {token!r}, which this model reads as a "
                                   "special token; remove it")

    def apply_template(self, messages):
        """The same as `chat`, by the chat template."""
        from jinja2 import TemplateError
        has_reply = messages[-1]["role"] == "assistant"
        before = messages[:-1] if has_reply else messages
        try:
            prompt = self.hf.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
            whole = self.hf.apply_chat_template(messages, tokenize=False) if has_reply else prompt
        except TemplateError as error:
            raise ValueError(
                f"the model's chat template refuses these messages: {error}") from None
        if not whole.startswith(prompt):
            raise ValueError("the model's chat template does not put a reply behind its generation "
                             "prompt")
        ids = self.encode(whole[len(prompt):])
        ends = [i for i, token in enumerate(ids) if token in self.stop_ids]
        # Some templates go on with the next turn's header.
        return self.encode(prompt), ids[:ends[0] + 1] if ends else ids


# ---- Data ---------------------------------------------------------------------------------------

def chat_turns(record):
    """A record of a data file -> chat messages.

    A record has `messages`, or prompt and response, or Alpaca's instruction, input and output.
    ValueError says what is wrong with any other record.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object, not {type(record).__name__}")
    if "messages" in record:
        return check_messages(record["messages"])
    if "instruction" in record:
        extra = text_field(record, "input", optional=True)
        prompt = text_field(record, "instruction") + (f"\n\n{extra}" if extra else "")
        reply = text_field(record, "output")
    else:
        prompt, reply = text_field(record, "prompt"), text_field(record, "response")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def check_messages(turns):
    """The turns of a record's `messages`, without other fields. The last is the assistant's."""
    good = isinstance(turns, list) and len(turns) > 1 and all(is_turn(turn) for turn in turns)
    if not good or turns[-1]["role"] != "assistant":
        raise ValueError("'messages' must be a list of {role, content} that ends with the "
                         "assistant's turn")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def is_turn(turn):
    """Is this a {role, content} with a known role and some text?"""
    return (isinstance(turn, dict) and turn.get("role") in ("system", "user", "assistant")
            and isinstance(turn.get("content"), str) and bool(turn["content"].strip()))


def text_field(record, key, optional=False):
    """A text of a record, without white space around it. An optional text may be missing."""
    value = record.get(key)
    if optional and value in (None, ""):
        return ""
    if not isinstance(value, str) or not value.strip():
        wrong = "empty" if value in ("", None) else "no text"
        raise ValueError(f"{key!r} is {wrong if key in record else 'missing'}")
    return value.strip()


class ChatData(Source):
    """Training pairs through the chat template, with the interface of toy.data.ToyData.

    The Base models are trained with the template too, as in the published run.
    """
    words, metric, kind = False, "nats", "chat"

    def __init__(self, backbone, records=(), max_length=4096, truncate=False, split_seed=42,
                 where="", bad=0, seed=0):
        """records: lists of chat messages. where: the name of the data.

        bad: how many records were left out before. ValueError if fewer than two samples are left.
        """
        self.tokenizer, self.seed = backbone.tokenizer, seed
        self.window, self.columns = backbone.config.max_length, {"held out": {}}
        if self.tokenizer is None:
            raise ValueError(f"{backbone.name} has no tokenizer.json, so it cannot read text")
        samples, counts = self.encode_records(records, max_length, truncate)
        if records and len(samples) < 2:
            raise ValueError(
                f"{where}: {len(samples)} samples left of {len(records)} ({counts['long']} longer "
                f"than {max_length} tokens, {counts['special']} with special tokens in their "
                "text); raise --max-length, or --truncate")
        generator = torch.Generator().manual_seed(split_seed)
        order = torch.randperm(len(samples), generator=generator).tolist()
        held_out = max(1, len(samples) // 20)  # 95 % to train, 5 % held out
        self.pairs = {"test": [samples[i] for i in order[:held_out]],
                      "train": [samples[i] for i in order[held_out:]]}
        self.note = self.describe(where, samples, counts, bad) if samples else ""

    def encode_records(self, records, max_length, truncate):
        """Records -> samples of at most max_length tokens, and how many were left out, and why."""
        samples, counts = [], {"long": 0, "cut": 0, "special": 0}
        for turns in tqdm(records, desc="reading", unit="record", delay=1):
            try:
                prompt, reply = self.tokenizer.chat(turns)
            except SpecialToken:
                counts["special"] += 1
                continue
            room = max_length - len(prompt)
            if room <= 0 or (len(reply) > room and not truncate):
                counts["long"] += 1
                continue
            counts["cut"] += len(reply) > room
            reply = reply[:room]
            samples.append(Sample(prompt, reply, [True] * len(reply)))
        return samples, counts

    def describe(self, where, samples, counts, bad):
        """One line about the data."""
        lengths = sorted(len(sample.prompt) + len(sample.rest) for sample in samples)
        note = (f"{where}: {len(samples)} samples kept ({len(self.pairs['train'])} to train, "
                f"{len(self.pairs['test'])} held out; {lengths[len(lengths) // 2]} tokens in the "
                f"median, {lengths[-1]} at most), {counts['long']} too long, {counts['cut']} cut, "
                f"{counts['special']} with special tokens in their text, {bad} malformed")
        if not self.tokenizer.templated:
            note += "; no usable chat template, so prompt and reply are joined by a blank line"
        return note

    def train(self, rng, progress, number):
        """Training sample `number`: all of them in a new order in each epoch."""
        epoch, i = divmod(number, len(self.pairs["train"]))
        order = shuffled_numbers(f"{self.seed} {epoch}", len(self.pairs["train"]))
        return self.pairs["train"][order[i]]

    def test(self, column, name, number):
        """Held-out sample `number`, in turn."""
        return self.pairs["test"][number % len(self.pairs["test"])]

    def ask(self, prompt, question="", length=0):
        """A user's text as the user's turn -> Sample with `length` gaps for the reply."""
        if question:
            raise ValueError("--question is for the toy; put the question into the prompt")
        if not prompt.strip():
            raise ValueError("the prompt is empty; give some text with --prompt or --file")
        ids, _ = self.tokenizer.chat([{"role": "user", "content": prompt.strip()}])
        length = length or 128
        if len(ids) + length > self.window:
            raise ValueError(f"the prompt has {len(ids)} tokens, with {length} to generate more "
                             f"than the model's window of {self.window}; shorten it")
        return Sample(ids, [0] * length, [True] * length)


@lru_cache(maxsize=2)
def shuffled_numbers(name, n):
    """0 .. n-1 in an order that the name decides."""
    return random.Random(name).sample(range(n), n)
