"""A tiny bidirectional transformer, from scratch, with the interface that memdlm.py asks of a backbone.

It is LLaMA-shaped (RMSNorm, rotary attention, gated feed-forward), so the names of its matrices are those of
the full models. Two things differ from a GPT: attention looks both ways, and what enters attention and feed-forward
has a *token shift*: half of the channels come from the left neighbour. Looking up "the value that followed this key" then
takes one layer instead of two, which is what makes a model this small worth watching.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import memdlm


@dataclass
class ToyConfig:
    vocab_size: int
    mask_id: int
    width: int = 64   # D, a multiple of 2 * heads
    layers: int = 2
    heads: int = 4
    ffn: int = 0      # inner width of the feed-forward; 0 means 2.5 D

    def __post_init__(self):
        if self.width % (2 * self.heads) or min(self.width, self.layers, self.heads) < 1:
            raise ValueError(f"width {self.width} must be a multiple of twice the {self.heads} heads, "
                             "and width, layers and heads at least 1")
        self.ffn = self.ffn or 5 * self.width // 2


def shift(h):
    """Left half of the channels from the token to the left, [B, L, D]. From the left only: padding stands on the
    right and must not be seen."""
    half = h.shape[-1] // 2
    return torch.cat([F.pad(h[:, :-1, :half], (0, 0, 1, 0)), h[..., half:]], dim=-1)


def rotary(length, dim, device):
    """cos and sin, [L, dim]. Angles in float32; channel i is paired with i + dim / 2."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=device).float() / dim)
    angle = torch.outer(torch.arange(length, device=device).float(), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):  # x [B, heads, L, dim]
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, h, mask):
        B, L, D = h.shape
        q, k, v = (p(h).view(B, L, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = rotary(L, D // self.heads, h.device)
        # No causal mask: a diffusion LM fills in a token from both sides.
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(B, L, D))


class FeedForward(nn.Module):
    def __init__(self, width, ffn):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, ffn, bias=False), nn.Linear(width, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, width, bias=False)

    def forward(self, h):
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(config.width, eps=1e-6), nn.RMSNorm(config.width, eps=1e-6)
        self.attn, self.mlp = Attention(config.width, config.heads), FeedForward(config.width, config.ffn)

    def forward(self, h, mask):
        h = h + self.attn(shift(self.norm1(h)), mask)
        return h + self.mlp(shift(self.norm2(h)))


class ToyDLM(nn.Module):
    """The backbone, with the interface `Backbone` of memdlm.py."""
    title, decoder = "toy", staticmethod(memdlm.denoise)

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.mask_id, self.num_layers, self.vocab_size = config.mask_id, config.layers, config.vocab_size
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed):
        """Initial weights from the seed alone. Matrices that write into the residual start smaller, as in GPT-2."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 if "embedding" in name else p.shape[1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=generator) * std / (2 * self.num_layers if residual else 1) ** 0.5)

    def embed(self, ids):
        return self.embedding(ids.to(self.embedding.weight.device))  # [B, L, D]

    def blocks(self, h, valid, start, stop, need=None):  # here one product for all rows costs less than picking some
        # [B, 1, 1, L]: nobody attends to padding. None lets attention take its fast path.
        mask = None if valid.all() else valid[:, None, None, :].to(h.device)
        for layer in self.layers[start:stop]:
            h = layer(h, mask)
        return h

    def per_row(self, f, h, *rest):
        return f(self.head, h, *rest)  # a small vocabulary: all rows at once

    def head(self, h):
        return self.lm_head(self.norm(h))

    def matrices(self, first, scope):
        kinds = {"ffn": ("mlp",), "ffn+attn": ("mlp", "attn")}[scope]
        return {f"layers.{i}.{kind}.{name}": matrix
                for i in range(first, self.num_layers) for kind in kinds
                for name, matrix in getattr(self.layers[i], kind).named_children()}
