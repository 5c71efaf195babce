"""Block diffusion, the decoder of LLaDA2.x.

Text is decoded a block of 32 after the other. A token sees its own block and those before, so a
finished block never changes, and its keys and values are kept:

    prompt in whole blocks     one pass; keys and values are kept
    block 1   _ _ _ _ ... _    look: commit what is surer than the threshold, at least one token
              a _ _ c ... _    look again, until no mask is left
              a b e c ... d    once more with the final tokens; keys and values are kept
    block 2   _ _ _ _ ... _    and so on, until a sample says its end

A look computes 32 positions, however long the text before is.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import memdlm
from backbones.blocks import Past

# How sure the model must be to commit a token, and to replace one that stands (None: never).
# speed and quality are LLaDA2.1's, whose training included token editing.
MODES = {"plain": (0.95, None), "speed": (0.5, 0.0), "quality": (0.7, 0.5)}


@torch.no_grad()
def block_diffusion(backbone, s, x, fill, valid, seeds, phi=None, threshold=0.95,
                    edit_threshold=None, steps=None, temperature=0.0, extra_steps=16):
    """Fill in the positions `fill` of x, block by block. Yields the canvas [B, L] after each step.

    Arguments are those of memdlm.denoise, and:
    fill: what follows the prompt in each sample. Blocks count from the start of the sample, so
    samples of different lengths share the grid.
    threshold: commit a token that is more probable than this, and at least the scheduled number
    (block length / steps; one if no steps are given).
    edit_threshold: from the second look on, replace a token of the block where the model prefers
    another by more than this, until nothing changes or after `extra_steps` looks.
    A sample is done after the block in which it says its end; what is left of it is that token.
    """
    size = backbone.family.block_length
    end, done = int(valid.sum(1).max()), ~fill.any(1)  # done [B]: the sample wants nothing more
    x, given, fill = to_whole_blocks(x, fill, valid, backbone.mask_id, size)
    open_, width, past = fill.clone(), x.shape[1], Past(x.shape[1])
    tokenizer = backbone.tokenizer
    stops = torch.tensor(tokenizer.stop_ids if tokenizer else [backbone.config.eos_id])

    def forward(start, stop, need=None):
        """Hidden states of x[:, start:stop], of which the positions `need` will be read.

        Without `need` none is: these are final tokens, whose keys and values join the past.
        """
        keep = need is None
        if keep:
            need = torch.zeros(x[:, start:stop].shape, dtype=torch.bool)
        with memdlm.fast_weights(backbone, s, phi):
            h = backbone.blocks(backbone.embed(x[:, start:stop]), None, 0, None, need, past)
        past.length = stop if keep else past.length
        return h

    def look(here, live, extra, k):
        """Look at the block once and commit. Returns who wants another look, and if x changed."""
        masks = open_[:, here] & live[:, None]
        where = masks if edit_threshold is None else fill[:, here] & live[:, None]
        noise = None
        if temperature > 0:
            noise = memdlm.gumbel_noise(backbone, seeds, f"{here.start} {k}", where)
        h = forward(here.start, here.stop, where)[where]
        tokens, p = memdlm.pick_tokens(backbone, h, temperature=temperature, noise=noise)
        tokens, p = memdlm.to_positions(tokens, where), memdlm.to_positions(p, where)
        at_least = scheduled(size, steps or size, k)
        commit = masks & ((p > threshold) | (memdlm.rank_of(masks, -p) < at_least))
        change, again = commit, (masks & ~commit).any(1)
        if edit_threshold is not None:
            change = commit | (where & ~masks & (tokens != x[:, here]) & (p > edit_threshold))
            extra += ~masks.any(1)
            # Done when a look without masks changes nothing.
            again = masks.any(1) | (change.any(1) & (extra < extra_steps))
        x[:, here] = torch.where(change, tokens, x[:, here])
        open_[:, here] &= ~commit
        return again, bool(change.any())

    if start := int(given.sum(1).min()) // size * size:
        forward(0, start)  # the prompt's whole blocks, in one pass
    for start in range(start, width, size):
        here, k = slice(start, start + size), 0
        live, extra = ~done & fill[:, here].any(1), torch.zeros(len(x), dtype=torch.long)
        while live.any() and k < size + extra_steps:
            live, changed = look(here, live, extra, k)
            k += 1
            if changed:
                yield x[:, :end].clone()
        done |= (torch.isin(x[:, here], stops) & fill[:, here]).any(1)
        if (done | ~fill[:, here.stop:].any(1)).all():
            break
        if here.stop < width:
            forward(start, here.stop)  # once more, with the block's final tokens
    if (rest := open_ & done[:, None]).any():  # what a sample did not need
        yield torch.where(rest, backbone.config.eos_id, x)[:, :end]


def to_whole_blocks(x, fill, valid, mask_id, size):
    """The canvas, what was given, and `fill`, up to the end of each sample's last block.

    That block is decoded whole, as in training, also where less of it was asked for.
    """
    width = math.ceil(int(valid.sum(1).max()) / size) * size
    pad, last = (0, width - x.shape[1]), (-(-valid.sum(1) // size) * size)[:, None]  # [B, 1]
    given, place = F.pad(valid & ~fill, pad), torch.arange(width)
    fill = ~given & (place < last) & (place >= given.sum(1, keepdim=True))
    return torch.where(fill, mask_id, F.pad(x, pad)), given, fill


def scheduled(size, steps, k):
    """How many tokens of a block look k commits at least: after `steps` looks the block is full."""
    return max(1, memdlm.quota(size, steps, k)) if k < steps else size
