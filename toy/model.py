"""A tiny bidirectional transformer, from scratch, with the interface that memdlm.py asks for.

It is LLaMA-shaped (RMSNorm, rotary attention, gated feed-forward), so its matrices have the names
that those of the real models have. Two things differ from a GPT. Attention looks both ways. And
what enters attention and feed-forward has a *token shift*: half of the channels come from the left
neighbour. With the shift, looking up "the value that followed this key" takes one layer instead of
two. That makes a model this small worth watching.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import nn

import memdlm


@dataclass
class ToyConfig:
    """The shape of the tiny model. ValueError if width and heads do not go together."""
    vocab_size: int
    mask_id: int
    width: int = 64   # D, a multiple of 2 * heads
    layers: int = 2
    heads: int = 4
    ffn: int = 0      # inner width of the feed-forward; 0 means 2.5 D

    def __post_init__(self):
        if self.width % (2 * self.heads) or min(self.width, self.layers, self.heads) < 1:
            raise ValueError(f"width {self.width} must be a multiple of twice the {self.heads} "
                             "heads, and width, layers and heads at least 1")
        self.ffn = self.ffn or 5 * self.width // 2


# ---- A block ------------------------------------------------------------------------------------

def shift(h):
    """Take the left half of the channels from the token to the left. [B, L, D] -> [B, L, D].

    With one letter for the left half and a digit for the right one:

        before   a1  b2  c3        after   .1  a2  b3

    Never from the token to the right: padding stands there and must not be seen.
    """
    half = h.shape[-1] // 2
    return torch.cat([F.pad(h[:, :-1, :half], (0, 0, 1, 0)), h[..., half:]], dim=-1)


@lru_cache(maxsize=64)
def rotary(length, dim, device):
    """cos and sin, [L, dim]. Angles in float32; channel i is paired with i + dim / 2."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=device).float() / dim)
    angle = torch.outer(torch.arange(length, device=device).float(), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn queries or keys by their positions' angles. x [B, heads, L, dim] -> the same shape."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def rms_norm(width):
    return nn.RMSNorm(width, eps=1e-6)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = linear(width, width), linear(width, width)
        self.v_proj, self.o_proj = linear(width, width), linear(width, width)

    def forward(self, h, mask):
        B, L, D = h.shape
        q, k, v = (projection(h).view(B, L, self.heads, -1).transpose(1, 2)
                   for projection in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = rotary(L, D // self.heads, h.device)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # No causal mask: a diffusion LM fills in a token from both sides.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(B, L, D))


class FeedForward(nn.Module):
    def __init__(self, width, ffn):
        super().__init__()
        self.gate_proj, self.up_proj = linear(width, ffn), linear(width, ffn)
        self.down_proj = linear(ffn, width)

    def forward(self, h):
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = rms_norm(config.width), rms_norm(config.width)
        self.attn = Attention(config.width, config.heads)
        self.mlp = FeedForward(config.width, config.ffn)

    def forward(self, h, mask, rows=None):
        """rows [B, M], of h as [B * L, D]: where the feed-forward's result is read. None: all."""
        h = h + self.attn(shift(self.norm1(h)), mask)
        x = shift(self.norm2(h))
        if rows is None:
            return h + self.mlp(x)
        some = x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])
        some = self.mlp(some).flatten(0, 1)
        return h.flatten(0, 1).index_add(0, rows.flatten(), some).view_as(h)


# ---- The model ----------------------------------------------------------------------------------

class ToyDLM(nn.Module):
    """The backbone, with the interface `Backbone` of memdlm.py."""
    name = title = "toy"
    decoder = staticmethod(memdlm.denoise)
    has_lora = False  # no LoRA that PEFT saves as an adapter: --toy-lora's stays in the checkpoint

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = rms_norm(config.width)
        self.lm_head = linear(config.width, config.vocab_size)
        self.mask_id, self.vocab_size = config.mask_id, config.vocab_size
        self.num_layers = config.layers
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed):
        """Draw initial weights from the seed alone.

        Matrices that write into the residual start smaller, as in GPT-2.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                smaller = (2 * self.num_layers if is_residual else 1) ** 0.5
                std = 0.02 if "embedding" in name else p.shape[1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=generator) * std / smaller)

    def embed(self, ids):
        return self.embedding(ids.to(self.embedding.weight.device))  # [B, L, D]

    def blocks(self, h, valid, start, stop, need=None):
        """Run layers start..stop-1 on h [B, L, D]; only positions `need` [B, L] will be read."""
        # [B, 1, 1, L]: nobody attends to padding. None lets attention take its fast path.
        mask = None if valid.all() else valid[:, None, None, :].to(h.device)
        rows = None
        if need is not None:  # M is the most that a sample needs; others get some more
            first = need.byte().topk(int(need.sum(1).max())).indices
            rows = (first + h.shape[1] * torch.arange(len(h))[:, None]).to(h.device)
        for i, layer in enumerate(self.layers[start:stop], start):
            h = layer(h, mask, rows if i == self.num_layers - 1 else None)
        return h

    def head(self, h):
        return self.lm_head(self.norm(h))

    def per_row(self, f, h, *rest):
        """f(head, h, *rest) on all rows at once: the vocabulary is small."""
        return f(self.head, h, *rest)

    def matrices(self, first, scope):
        """{name: nn.Linear} of layers first, first + 1, ... for fast weights."""
        kinds = {"ffn": ("mlp",), "ffn+attn": ("mlp", "attn")}[scope]
        return {f"layers.{i}.{kind}.{name}": matrix
                for i in range(first, self.num_layers) for kind in kinds
                for name, matrix in self.layers[i].get_submodule(kind).named_children()}

    def weights_checksum(self):
        """Tells the weights that a LoRA stands on from others: CRC-32 of all that is frozen."""
        frozen = [p.detach().cpu().numpy().tobytes() for p in self.parameters()
                  if not p.requires_grad]
        return f"{crc32(b''.join(frozen)):08x}"
