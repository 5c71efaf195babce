"""Decoding with a block cache, for models that look both ways.

Such a model can keep nothing exactly: a token that is committed changes the keys and values of all
others. But it changes those far away little. So while a block is decoded, the keys and values of
everything outside of it are kept, and they are computed anew when the next block begins:

    block 1, first look    the prompt  _ _ _ _  . . . .    all positions; all keys and values kept
    block 1, later looks               a _ _ c             the block alone, in its own places
    block 2, first look    the prompt  a b e c  _ _ _ _    all positions once more
    block 2, later looks                        _ f _ _    the block alone

A look then costs the block's positions, however long the text is. The price: what stands outside
has not seen what was committed in the block. With a refresh at every look it is exact decoding.
"""
from __future__ import annotations

import torch

import memdlm
from backbones.backbone import shift_left
from backbones.blocks import Past

BLOCK_LENGTH = 32  # with the cache, unless another is asked for


def check_cache(backbone):
    """ValueError if a model is not decoded with this cache."""
    if backbone.decoder is not memdlm.denoise:
        raise ValueError(f"{backbone.title} always keeps the keys and values of finished blocks: "
                         "leave the cache out")
    if getattr(backbone, "attention", "") == "causal-prompt":
        raise ValueError("--cache is not for --attention causal-prompt")
    if not getattr(backbone, "keeps_past", False):
        raise ValueError(f"the block cache is for real models, not for the {backbone.title}, "
                         "which is small enough to decode exactly")


class BlockCache:
    """look(x, where, window, k) -> hidden states [N, D], as memdlm.look_at_all, but from a cache.

    x [B, L] the canvas. where [B, L] bool: the gaps that are still open and will be read. window
    [B, L] bool: the block, its filled gaps included. k: the number of the look in its block.
    """

    def __init__(self, backbone, s, valid, phi):
        self.backbone, self.s, self.valid, self.phi = backbone, s, valid, phi
        self.past = self.places = self.own = None

    def __call__(self, x, where, window, k):
        if k == 0:
            self.past = Slots(x.shape[1])
            h = self.forward(x, where)
            if self.backbone.config.shift:  # a token's logits come from the token before it
                window = window | shift_left(window)
            self.places, self.own = places_of(window)
            self.past.places = memdlm.to_device(self.places, h)
            return memdlm.rows_at(h, where)
        where = where.gather(1, self.places) & self.own
        return memdlm.rows_at(self.forward(x.gather(1, self.places), where), where)

    def forward(self, ids, need):
        """Hidden states of the tokens `ids`, of which the positions `need` will be read."""
        with memdlm.fast_weights(self.backbone, self.s, self.phi):
            h = self.backbone.embed(ids)
            return self.backbone.blocks(h, self.valid, 0, None, need, self.past)


class Slots(Past):
    """Keys and values of a whole canvas. Once `places` are set, only these are written anew."""
    places = None  # [B, M] long

    def positions(self, count, device):
        if self.places is None:
            return super().positions(count, device)
        return self.places[:, None]  # [B, 1, M], for all heads

    def end(self, count):
        return self.room

    def extend(self, layer, k, v):
        if self.places is None:
            return super().extend(layer, k, v)
        for whole, new in zip(self.pairs[layer], (k, v)):
            whole.scatter_(2, self.places[:, None, :, None].expand_as(new), new)
        return self.pairs[layer]


def places_of(window):
    """The positions [B, M] of the True ones in each row of a mask [B, L], from the left.

    M is the most that a row has. A row with fewer repeats its last, or any if it has none. Also
    returned: which of the positions are a row's own, and no repetition, [B, M] bool.
    """
    count = window.sum(1, keepdim=True)
    number = torch.arange(int(count.max())).expand(len(window), -1)  # [B, M]
    order = window.byte().argsort(dim=1, descending=True, stable=True)
    return order.gather(1, number.minimum((count - 1).clamp(min=0))), number < count
