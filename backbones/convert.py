"""A model that was trained left to right becomes a diffusion model.

Llama, Qwen2 and Qwen3 say what comes next. Their weights are a good beginning for a diffusion
model, which costs far less than one from scratch (A2D). Three things are missing:

    sight    a token looks left only. Now it looks both ways: everywhere (full), in the upper
             layers (causal:N), or in the response (causal-prompt)
    a mask   no token says "something is missing". An unused row of the embedding becomes one, or
             a row more. It begins as the mean of all others
    place    the logits at token i are about token i + 1. Now they are about i. With --shift they
             stay where they were: token i is predicted from the place of token i - 1

The rest is training: the loss of any masked diffusion model (Eq. 2), with or without memory.
"""
from __future__ import annotations

from dataclasses import replace

import torch

from backbones.families import FAMILIES


def choose_sight(config, attention, shift):
    """The config with how tokens look at each other, and whether logits are shifted.

    attention: as --attention; auto is what config.json says, else full. ValueError if the model
    cannot do that.
    """
    family = FAMILIES[config.family]
    attention = (config.attention or "full") if attention == "auto" else attention
    if attention == "block" and not family.block_length:
        raise ValueError("--attention block is for LLaDA2.x and SDAR, which decode in blocks; "
                         f"{family.title} attends fully")
    if family.block_length and (attention == "causal-prompt" or shift):
        flag = "--shift" if shift else "--attention causal-prompt"
        raise ValueError(f"{flag} is for models that see the whole text; {family.title} decodes "
                         "in blocks")
    return replace(config, attention=attention, shift=config.shift or shift)


def add_mask(config, tokenizer, source):
    """Give a model without a mask one: the first row that no token has, maybe a row more.

    Returns the config, and a source of weights that fills the row.
    """
    ids = tokenizer.hf.get_vocab().values() if tokenizer else [config.vocab_size - 1]
    mask, rows = max(ids) + 1, config.vocab_size
    config = replace(config, mask_id=mask, vocab_size=max(rows, mask + 1))
    return config, MaskRow(source, config, rows)


class MaskRow:
    """A source of weights in which the mask's row is the mean of the rows of all tokens."""

    def __init__(self, source, config, rows):
        """rows: how many the embedding of the checkpoint has."""
        family = FAMILIES[config.family]
        self.source, self.mask, self.rows = source, config.mask_id, rows
        self.tables = (f"{family.embed}.weight", f"{family.head}.weight")

    def __call__(self, name, shape):
        if name not in self.tables:
            return self.source(name, shape)
        table = self.source(name, [self.rows, shape[1]])
        mean = table[:self.mask].float().mean(0, keepdim=True).to(table.dtype)
        return torch.cat([table[:self.mask], mean, table[self.mask + 1:]])

    def finish(self):
        self.source.finish()


def describe_conversion(backbone):
    """One line: what becomes of a model that was trained left to right."""
    config = backbone.config
    sight = {"full": "every token looks both ways", "causal": "every token still looks left only",
             "causal-prompt": "the response looks both ways, the prompt left only"}.get(
        config.attention, f"the {backbone.causal_layers} lower layers look left only")
    place = "the place before it" if config.shift else "its own place"
    return (f"{backbone.name} was trained left to right. Here it is a diffusion model: {sight}, "
            f"token {config.mask_id} is the mask, and a token is predicted from {place}. It has "
            "to be trained as one before it answers well")
