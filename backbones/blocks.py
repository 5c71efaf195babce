"""The parts of a transformer, and the three blocks side by side."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from backbones.experts import Experts


class Context(NamedTuple):
    """What a block needs besides hidden states."""
    cos: torch.Tensor          # [L, rotated channels]
    sin: torch.Tensor
    mask: torch.Tensor | None  # bool, broadcast to [B, heads, L, keys]: True where a query may look. None: everywhere
    past: Past | None          # keys and values of what stands before
    need: torch.Tensor | None  # [B, L] bool, on the CPU: rows that the last layer's feed-forward is needed for. None: all


class RMSNorm(nn.Module):
    """Normalised in float32, rounded to the model's precision, and only then multiplied: so the checkpoints were trained."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = x.float() if x.dtype != torch.float64 else x
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def linear(width, out):
    return nn.Linear(width, out, bias=False)


def rotary(positions, dim, theta, dtype):
    """cos and sin [L, dim] of the positions [L]; angles in float32, channel i paired with i + dim / 2."""
    frequency = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angle = torch.outer(positions.float(), frequency).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary position embedding of the first channels of each head; the others (LLaDA2.x) pass. x [B, heads, L, dim]."""
    turned, rest = x[..., :cos.shape[-1]], x[..., cos.shape[-1]:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def attend(q, k, v, context, layer):
    """Attention of q on k and v, each [B, L, heads, dim] and already normalised -> [B, L, heads * dim]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, L, dim]
    q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
    if context.past is not None:
        k, v = context.past.extend(layer, k, v)
    share = q.shape[1] // k.shape[1]
    if share > 1:  # grouped queries: `share` of them read the same keys
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask)  # no mask: the fast path
    return out.transpose(1, 2).flatten(2)


class Past:
    """Keys and values of finished blocks, by layer, in room made once for `room` positions. What is computed now stands behind
    them, to be written over, or to stay if `length` is moved beyond it."""

    def __init__(self, room):
        self.length, self.room, self.pairs = 0, room, {}

    def extend(self, layer, k, v):
        """k, v [B, heads, n, dim] -> all that may be looked at: [B, heads, length + n, dim]."""
        end = self.length + k.shape[2]
        if layer not in self.pairs:
            self.pairs[layer] = [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (k, v)]
        for whole, new in zip(self.pairs[layer], (k, v)):
            whole[:, :, self.length:end] = new
        return [whole[:, :, :end] for whole in self.pairs[layer]]


def add_feed_forward(h, x, need, feed_forward):
    """h + feed_forward(x), on all rows or on those needed. x [B, L, D]; or [N, D] with the number of rows of each sample."""
    if need is not None and need.any():
        return h.index_put((need,), h[need] + feed_forward(x[need], need.sum(1).tolist()))
    if need is None or torch.is_grad_enabled():  # with gradients all weights take part, even if nothing is read
        return h + feed_forward(x)
    return h  # the keys and values of a finished block: nobody reads what is above them


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)): an expert, a shared expert, or the feed-forward of a dense layer."""

    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(width, inner), linear(width, inner), linear(inner, width)

    def forward(self, x, rows_per_sample=None):
        # x [N, D] holds so many rows of each sample: per-sample fast weights need to know
        for matrix in (self.gate_proj, self.up_proj, self.down_proj):
            matrix.rows_per_sample = rows_per_sample
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LLaDABlock(nn.Module):
    """LLaDA-8B."""

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim, D = layer, c.head_dim, c.width
        self.attn_norm, self.ff_norm = RMSNorm(D, c.eps), RMSNorm(D, c.eps)
        self.q_proj, self.attn_out = linear(D, c.heads * c.head_dim), linear(c.heads * c.head_dim, D)
        self.k_proj, self.v_proj = linear(D, c.kv_heads * c.head_dim), linear(D, c.kv_heads * c.head_dim)
        self.ff_proj, self.up_proj, self.ff_out = linear(D, c.ffn), linear(D, c.ffn), linear(c.ffn, D)

    def forward(self, h, context):
        x = self.attn_norm(h)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        h = h + self.attn_out(attend(q, k, v, context, self.layer))
        return add_feed_forward(h, self.ff_norm(h), context.need, self.feed_forward)

    def feed_forward(self, x, rows_per_sample=None):
        for matrix in (self.ff_proj, self.up_proj, self.ff_out):
            matrix.rows_per_sample = rows_per_sample
        return self.ff_out(F.silu(self.ff_proj(x)) * self.up_proj(x))

    def matrices(self, scope):
        names = ["ff_proj", "up_proj", "ff_out"] + ["q_proj", "k_proj", "v_proj", "attn_out"] * (scope == "ffn+attn")
        return {name: getattr(self, name) for name in names}


class LLaDAMoEBlock(nn.Module):
    """LLaDA-MoE: the norm of queries and keys is per head."""

    def __init__(self, c, layer):
        super().__init__()
        D = c.width
        self.layer, self.head_dim, self.top_k = layer, c.head_dim, c.top_k
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, c.eps), RMSNorm(D, c.eps)
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
            setattr(self.self_attn, f"{name}_proj", linear(D, heads * c.head_dim))
        self.self_attn.o_proj = linear(c.heads * c.head_dim, D)
        self.self_attn.q_norm, self.self_attn.k_norm = RMSNorm(c.head_dim, c.eps), RMSNorm(c.head_dim, c.eps)
        self.mlp.gate = linear(D, c.experts)
        self.mlp.experts = Experts(FeedForward(D, c.expert_ffn) for _ in range(c.experts))

    def forward(self, h, context):
        x, a = self.input_layernorm(h), self.self_attn
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (a.q_proj, a.k_proj, a.v_proj))
        h = h + a.o_proj(attend(a.q_norm(q), a.k_norm(k), v, context, self.layer))
        return add_feed_forward(h, self.post_attention_layernorm(h), context.need, self.feed_forward)

    def feed_forward(self, x, rows_per_sample=None):
        # Softmax over all experts; the weights of the chosen are used as they are, so they sum to less than 1.
        weights, chosen = self.mlp.gate(x).flatten(0, -2).float().softmax(-1).topk(self.top_k, dim=-1)
        return self.mlp.experts(x, weights, chosen, rows_per_sample)

    def matrices(self, scope):
        found = {f"mlp.{name}": m for name, m in feed_forwards(self.mlp)}
        if scope == "ffn+attn":
            found |= {f"self_attn.{name}": getattr(self.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        return found


class GroupRouter(nn.Module):
    """The router of LLaDA2.x, in float32 throughout. Not an nn.Linear: neither quantised nor adapted."""

    def __init__(self, c):
        super().__init__()
        self.c, self.weight = c, nn.Parameter(torch.zeros(c.experts, c.width))
        self.register_buffer("expert_bias", torch.zeros(c.experts))

    def forward(self, x):
        """x [N, D] -> weights, chosen [N, k]."""
        c, score = self.c, F.linear(x.float(), self.weight.float()).sigmoid()
        ranked = score + self.expert_bias  # the bias balances the load: it decides who is chosen, not how much of it
        groups = ranked.view(len(x), c.groups, -1)
        # A group is worth its two best experts; only experts of the best groups can be chosen.
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1).topk(c.top_groups, dim=-1).indices
        closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
        chosen = groups.masked_fill(closed[..., None], -math.inf).flatten(1).topk(c.top_k, dim=-1).indices
        weights = score.gather(1, chosen)
        return c.routed_scale * weights / (weights.sum(-1, keepdim=True) + 1e-20), chosen


class LLaDA2Block(nn.Module):
    """LLaDA2.0 and 2.1: one matrix makes queries, keys and values; the first layers are dense."""

    def __init__(self, c, layer):
        super().__init__()
        D = c.width
        self.layer, self.heads, self.kv_heads, self.head_dim, self.dense = layer, c.heads, c.kv_heads, c.head_dim, layer < c.dense_layers
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, c.eps), RMSNorm(D, c.eps)
        self.attention = nn.Module()
        self.attention.query_key_value = linear(D, (c.heads + 2 * c.kv_heads) * c.head_dim)
        self.attention.dense = linear(c.heads * c.head_dim, D)
        self.attention.query_layernorm, self.attention.key_layernorm = RMSNorm(c.head_dim, c.eps), RMSNorm(c.head_dim, c.eps)
        self.mlp = FeedForward(D, c.ffn) if self.dense else nn.Module()
        if not self.dense:
            self.mlp.gate = GroupRouter(c)
            self.mlp.experts = Experts(FeedForward(D, c.expert_ffn) for _ in range(c.experts))
            self.mlp.shared_experts = FeedForward(D, c.shared)

    def forward(self, h, context):
        a = self.attention
        heads = a.query_key_value(self.input_layernorm(h)).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        h = h + a.dense(attend(a.query_layernorm(q), a.key_layernorm(k), v, context, self.layer))
        return add_feed_forward(h, self.post_attention_layernorm(h), context.need, self.mlp if self.dense else self.feed_forward)

    def feed_forward(self, x, rows_per_sample=None):
        return self.mlp.experts(x, *self.mlp.gate(x.flatten(0, -2)), rows_per_sample) + self.mlp.shared_experts(x, rows_per_sample)

    def matrices(self, scope):
        found = {f"mlp.{name}": m for name, m in feed_forwards(self.mlp)}
        if scope == "ffn+attn":
            found |= {f"attention.{name}": getattr(self.attention, name) for name in ("query_key_value", "dense")}
        return found


def feed_forwards(mlp):
    """The matrices of every feed-forward in a layer: (name, nn.Linear or its adapter)."""
    for name, module in mlp.named_modules():
        if isinstance(module, FeedForward):
            for part in ("gate_proj", "up_proj", "down_proj"):
                yield f"{name}.{part}".lstrip("."), getattr(module, part)
