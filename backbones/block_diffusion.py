"""Block diffusion, the decoder of LLaDA2.x and SDAR.

Text is decoded a block of 32 after the other, of 4 by SDAR. A token sees its own block and those
before, so a finished block never changes, and its keys and values are kept:

    prompt in whole blocks     one pass; keys and values are kept
    block 1   _ _ _ _ ... _    look: commit what is surer than the threshold, at least one token
              a _ _ c ... _    look again, until no mask is left
              a b e c ... d    once more with the final tokens; keys and values are kept
    block 2   _ _ _ _ ... _    and so on, until a sample says its end

A look computes one block's positions, however long the text before is.
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
    size, end = backbone.block_length, int(valid.sum(1).max())
    canvas = Canvas(backbone, s, phi, x, fill, valid)
    x, fill, done = canvas.x, canvas.fill, ~fill.any(1)  # done [B]: the sample wants nothing more
    stops = torch.tensor(backbone.stop_ids)
    if start := int(canvas.given.sum(1).min()) // size * size:
        canvas.forward(0, start)  # the prompt's whole blocks, in one pass
    for start in range(start, x.shape[1], size):
        here, k = slice(start, start + size), 0
        live, extra = ~done & fill[:, here].any(1), torch.zeros(len(x), dtype=torch.long)
        while live.any() and k < size + extra_steps:
            noise = (seeds, f"{start} {k}", temperature)
            at_least = scheduled(size, steps or size, k)
            had_masks = (canvas.open_[:, here] & live[:, None]).any(1)
            change = canvas.look(here, live, noise, at_least, threshold, edit_threshold)
            extra, k = extra + ~had_masks, k + 1
            if edit_threshold is None:
                live = (canvas.open_[:, here] & live[:, None]).any(1)
            else:  # done when a look without masks changes nothing
                live = had_masks | (change.any(1) & (extra < extra_steps))
            if change.any():
                yield x[:, :end].clone()
        done |= (torch.isin(x[:, here], stops) & fill[:, here]).any(1)
        if (done | ~fill[:, here.stop:].any(1)).all():
            break
        if here.stop < x.shape[1]:
            canvas.forward(start, here.stop)  # once more, with the block's final tokens
    if (rest := canvas.open_ & done[:, None]).any():  # what a sample did not need
        yield torch.where(rest, backbone.config.eos_id, x)[:, :end]


class Canvas:
    """What is decoded: tokens, gaps, and the keys and values of finished blocks.

    x [B, width] the tokens, in whole blocks; given, fill, open_ [B, width] bool: the prompt, what
    is to be filled, what is still masked.
    """

    def __init__(self, backbone, s, phi, x, fill, valid):
        self.backbone, self.s, self.phi = backbone, s, phi
        self.x, self.given, self.fill = to_whole_blocks(
            x, fill, valid, backbone.mask_id, backbone.block_length)
        self.open_, self.past = self.fill.clone(), Past(self.x.shape[1])

    def forward(self, start, stop, need=None):
        """Hidden states of x[:, start:stop], of which the positions `need` will be read.

        Without `need` none is: these are final tokens, whose keys and values join the past.
        """
        ids, keep = self.x[:, start:stop], need is None
        if keep:
            need = torch.zeros(ids.shape, dtype=torch.bool)
        with memdlm.fast_weights(self.backbone, self.s, self.phi):
            h = self.backbone.blocks(self.backbone.embed(ids), None, 0, None, need, self.past)
        if keep:
            self.past.length = stop
        return h

    def look(self, here, live, noise, at_least, threshold, edit_threshold):
        """Look at the block `here` of the samples `live` once, and commit.

        noise: seeds, a tag and the temperature. Returns where x changed, [B, block length] bool.
        """
        masks = self.open_[:, here] & live[:, None]
        where = masks if edit_threshold is None else self.fill[:, here] & live[:, None]
        h, (seeds, tag, temperature), u = self.forward(here.start, here.stop, where), noise, None
        if temperature > 0:
            u = memdlm.sampling_noise(self.backbone, seeds, tag, where)
        h = memdlm.rows_at(h, where)
        tokens, p = memdlm.pick_tokens(self.backbone, h, temperature=temperature, noise=u)
        tokens, p = memdlm.to_positions(tokens, where), memdlm.to_positions(p, where)
        commit = masks & ((p > threshold) | (memdlm.rank_of(masks, -p) < at_least))
        change = commit
        if edit_threshold is not None:
            edit = where & ~masks & (tokens != self.x[:, here]) & (p > edit_threshold)
            change = commit | edit
        self.x[:, here] = torch.where(change, tokens, self.x[:, here])
        self.open_[:, here] &= ~commit
        return change


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
