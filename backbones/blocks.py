"""The parts of a transformer, and the blocks side by side.

A block is one layer. All of them do the same two things:

    h = h + attention(norm(h))
    h = h + feed_forward(norm(h))

Its modules carry the names of the published checkpoint, so a checkpoint loads as it is and PEFT's
adapters fit by name. The experts of a layer are three stacks of matrices (experts.py). These
quantise and adapt themselves: bitsandbytes and PEFT silently leave such parameters alone.

block(h, context) takes and returns hidden states [B, L, D]. block.matrices(scope) names the linear
layers that fast weights may act on: those of the feed-forward, and with "ffn+attn" the attention's.
"""
from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from backbones.experts import Experts


# ---- The parts of a transformer -----------------------------------------------------------------

class Context(NamedTuple):
    """What a block needs besides hidden states."""
    cos: torch.Tensor          # [L, rotated channels], or [B, 1, L, rotated channels]
    sin: torch.Tensor
    mask: torch.Tensor | None  # bool, broadcast to [B, heads, L, keys]: where a query may look;
    #                            None: everywhere
    past: Past | None          # keys and values of what stands before
    need: torch.Tensor | None  # [B, M] long: rows of h as [B * L, D] that are read; None: all
    fullest: dict              # what Experts.forward notes for when it is computed again


class RMSNorm(nn.Module):
    """A root-mean-square norm in float32, rounded to the model's precision, then multiplied.

    The checkpoints were trained with this order of rounding and multiplying.
    """

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = x.float() if x.dtype != torch.float64 else x
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normal.to(x.dtype)


def linear(width, out, bias=False):
    """A linear layer. Of these models only Qwen2's queries, keys and values have a bias."""
    return nn.Linear(width, out, bias=bias)


class TiedHead(nn.Module):
    """A head that multiplies by the embedding. It has no weights of its own.

    So there is one matrix, which is saved once, and nothing to quantise or to adapt.
    """

    def __init__(self, embedding):
        super().__init__()
        self.shared = [embedding]  # in a list, so that it is no part of this module

    def forward(self, h):
        return F.linear(h, self.shared[0].weight)


def rotary(positions, dim, theta, dtype, scaling=()):
    """cos and sin [..., dim] of positions [...].

    Angles are computed in float32. Channel i is paired with channel i + dim / 2. scaling: see
    `scale_frequencies`.
    """
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    frequency = theta ** -exponent
    if scaling:
        frequency = scale_frequencies(frequency, *scaling)
    angle = positions.float()[..., None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def scale_frequencies(frequency, factor, low, high, length):
    """Llama 3's way to a longer window: channels that turn slowly turn slower by `factor`.

    What counts is how often a channel turned within `length`, the window before:

        more than `high` times     it stays as it is
        less than `low` times      its frequency is divided by the factor
        between                    a mean of both, which goes evenly from one to the other
    """
    turns = length * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


def rotate(x, cos, sin):
    """Rotary position embedding of the first channels of each head. x [B, heads, L, dim].

    LLaDA2.x rotates half of a head's channels. The others stay as they are.
    """
    turned, rest = x[..., :cos.shape[-1]], x[..., cos.shape[-1]:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def attend(q, k, v, context, layer):
    """Attention of q [B, M, heads, dim] on k and v [B, L, heads, dim] -> [B, M, heads * dim].

    q and k are normalised. The queries are those of the rows context.need [B, M], or all.
    """
    cos, sin, mask, need = context.cos, context.sin, context.mask, context.need
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, M or L, dim]
    k = rotate(k, cos, sin)
    if context.past is not None:
        k, v = context.past.extend(layer, k, v)
    if need is not None:
        if not need.numel():
            return None  # a finished block of text: only its keys and values will be read
        cos, sin = pick_rows(cos, need), pick_rows(sin, need)
        if mask is not None and mask.shape[-2] > 1:
            mask = pick_rows(mask, need)
    q = rotate(q, cos, sin)
    share = q.shape[1] // k.shape[1]
    if share > 1:  # grouped queries: `share` query heads read the same keys
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # no mask: the fast path
    return out.transpose(1, 2).flatten(2)


class Past:
    """Keys and values of finished blocks of text, by layer.

    The memory for `room` positions is made once. What is computed now stands behind the finished
    part. The next pass writes over it, unless `length` has been moved beyond it.
    """

    def __init__(self, room):
        self.length, self.room, self.pairs = 0, room, {}

    def positions(self, count, device):
        """Where the next `count` tokens stand in the text."""
        return torch.arange(self.length, self.length + count, device=device)

    def end(self, count):
        """How many tokens these can see: themselves and what is kept."""
        return self.length + count

    def extend(self, layer, k, v):
        """k, v [B, heads, n, dim] -> all that a query may see, [B, heads, length + n, dim]."""
        end = self.end(k.shape[2])
        if layer not in self.pairs:
            self.pairs[layer] = [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (k, v)]
        for whole, new in zip(self.pairs[layer], (k, v)):
            whole[:, :, self.length:end] = new
        return [whole[:, :, :end] for whole in self.pairs[layer]]


def pick(x, need):
    """What is read of x [B, L, ...]: [B, M, ...], the rows need [B, M] of all B * L, or all.

    Row numbers are all that autograd keeps of this. `gather` would keep one for each channel.
    """
    if need is None or not need.numel():
        return x
    rows = x.flatten(0, 1).index_select(0, need.flatten())
    return rows.view(*need.shape, *x.shape[2:])


def pick_rows(x, need):
    """The same of x [L, n] or [B, 1, L, n] -> [B, 1, M, n], where samples may share one x."""
    x = x.view(-1, *x.shape[-2:])
    return pick(x, need if len(x) == len(need) else need % x.shape[1])[:, None]


def add_both(h, need, attended, project, norm, feed_forward):
    """h + project(attended), then that + feed_forward(norm(that)). h [B, L, D] -> [B, L, D].

    Both are computed only in the rows need [B, M], if these are all that will be read.
    """
    if need is None:
        h = h + project(attended)
        return h + feed_forward(norm(h))
    if not need.numel():
        return h
    some = pick(h, need) + project(attended)
    some = (some + feed_forward(norm(some))).flatten(0, 1)
    return h.flatten(0, 1).index_put((need.flatten(),), some).view_as(h)


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)): an expert, a shared expert, or that of a dense layer."""

    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj, self.up_proj = linear(width, inner), linear(width, inner)
        self.down_proj = linear(inner, width)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def find_matrices(block, scope, attention, names):
    """{name: linear layer, its adapter, or a stack of them} of every feed-forward in block.mlp.

    With the scope ffn+attn also the matrices `names` of the block's module `attention`.
    """
    found = {}
    for name, module in block.mlp.named_modules():
        if isinstance(module, (FeedForward, Experts)):
            for part in ("gate_proj", "up_proj", "down_proj"):
                found[f"mlp.{name}.{part}".replace("..", ".")] = getattr(module, part)
    if scope == "ffn+attn":
        for name in names:
            found[f"{attention}.{name}"] = getattr(block.get_submodule(attention), name)
    return found


# ---- The blocks ---------------------------------------------------------------------------------

class LLaDABlock(nn.Module):
    """LLaDA-8B."""

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        D, q, kv = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.attn_norm, self.ff_norm = RMSNorm(D, c.eps), RMSNorm(D, c.eps)
        self.q_proj, self.attn_out = linear(D, q), linear(q, D)
        self.k_proj, self.v_proj = linear(D, kv), linear(D, kv)
        self.ff_proj, self.up_proj = linear(D, c.ffn), linear(D, c.ffn)
        self.ff_out = linear(c.ffn, D)

    def forward(self, h, context):
        x = self.attn_norm(h)
        q, k, v = self.q_proj(pick(x, context.need)), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        return add_both(h, context.need, attend(q, k, v, context, self.layer), self.attn_out,
                        self.ff_norm, self.feed_forward)

    def feed_forward(self, x):
        return self.ff_out(F.silu(self.ff_proj(x)) * self.up_proj(x))

    def matrices(self, scope):
        names = ["ff_proj", "up_proj", "ff_out"]
        if scope == "ffn+attn":
            names += ["q_proj", "k_proj", "v_proj", "attn_out"]
        return {name: getattr(self, name) for name in names}


class LlamaBlock(nn.Module):
    """Llama under the transformers library's names; with a variant each, Qwen2 and Qwen3."""
    qkv_bias, head_norms = False, False

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        D, q, kv = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, c.eps), RMSNorm(D, c.eps)
        self.self_attn, self.mlp = nn.Module(), FeedForward(D, c.ffn)
        a, bias = self.self_attn, self.qkv_bias
        a.q_proj, a.k_proj = linear(D, q, bias), linear(D, kv, bias)
        a.v_proj, a.o_proj = linear(D, kv, bias), linear(q, D)
        if self.head_norms:
            a.q_norm, a.k_norm = RMSNorm(c.head_dim, c.eps), RMSNorm(c.head_dim, c.eps)

    def forward(self, h, context):
        x, a = self.input_layernorm(h), self.self_attn
        q, k, v = a.q_proj(pick(x, context.need)), a.k_proj(x), a.v_proj(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        if self.head_norms:
            q, k = a.q_norm(q), a.k_norm(k)
        return add_both(h, context.need, attend(q, k, v, context, self.layer), a.o_proj,
                        self.post_attention_layernorm, self.mlp)

    def matrices(self, scope):
        return find_matrices(self, scope, "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"))


class Qwen2Block(LlamaBlock):
    """Qwen2 and Qwen2.5: queries, keys and values have a bias."""
    qkv_bias = True


class Qwen3Block(LlamaBlock):
    """Qwen3: queries and keys are normalised per head."""
    head_norms = True


class LLaDAMoEBlock(nn.Module):
    """LLaDA-MoE: queries and keys are normalised per head."""

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim, self.top_k = layer, c.head_dim, c.top_k
        D, q, kv = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, c.eps), RMSNorm(D, c.eps)
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.q_proj, self.self_attn.k_proj = linear(D, q), linear(D, kv)
        self.self_attn.v_proj, self.self_attn.o_proj = linear(D, kv), linear(q, D)
        self.self_attn.q_norm = RMSNorm(c.head_dim, c.eps)
        self.self_attn.k_norm = RMSNorm(c.head_dim, c.eps)
        self.mlp.gate = linear(D, c.experts)
        self.mlp.experts = Experts(c.experts, D, c.expert_ffn)

    def forward(self, h, context):
        x, a = self.input_layernorm(h), self.self_attn
        q, k, v = a.q_proj(pick(x, context.need)), a.k_proj(x), a.v_proj(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        attended = attend(a.q_norm(q), a.k_norm(k), v, context, self.layer)
        return add_both(h, context.need, attended, a.o_proj, self.post_attention_layernorm,
                        partial(self.feed_forward, fullest=context.fullest))

    def feed_forward(self, x, fullest):
        # Softmax over all experts. The weights of the chosen ones are used as they are, so they
        # sum to less than 1.
        share = self.mlp.gate(x).flatten(0, -2).float().softmax(-1)
        weights, chosen = share.topk(self.top_k, dim=-1)
        return self.mlp.experts(x, weights, chosen, fullest)

    def matrices(self, scope):
        return find_matrices(self, scope, "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"))


class LLaDA2Block(nn.Module):
    """LLaDA2.0 and 2.1: one matrix makes queries, keys and values; the first layers are dense."""

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim, self.dense = layer, c.head_dim, layer < c.dense_layers
        self.heads, self.kv_heads, D = c.heads, c.kv_heads, c.width
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, c.eps), RMSNorm(D, c.eps)
        self.attention = a = nn.Module()
        a.query_key_value = linear(D, (c.heads + 2 * c.kv_heads) * c.head_dim)
        a.dense = linear(c.heads * c.head_dim, D)
        a.query_layernorm, a.key_layernorm = RMSNorm(c.head_dim, c.eps), RMSNorm(c.head_dim, c.eps)
        self.mlp = FeedForward(D, c.ffn) if self.dense else nn.Module()
        if not self.dense:
            self.mlp.gate = GroupRouter(c)
            self.mlp.experts = Experts(c.experts, D, c.expert_ffn)
            self.mlp.shared_experts = FeedForward(D, c.shared)

    def forward(self, h, context):
        a = self.attention
        heads = a.query_key_value(self.input_layernorm(h)).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k = a.query_layernorm(pick(q, context.need)), a.key_layernorm(k)
        attended, feed_forward = attend(q, k, v, context, self.layer), self.mlp
        if not self.dense:
            feed_forward = partial(self.feed_forward, fullest=context.fullest)
        return add_both(h, context.need, attended, a.dense, self.post_attention_layernorm,
                        feed_forward)

    def feed_forward(self, x, fullest):
        weights, chosen = self.mlp.gate(x.flatten(0, -2))
        routed = self.mlp.experts(x, weights, chosen, fullest)
        return routed + self.mlp.shared_experts(x)

    def matrices(self, scope):
        return find_matrices(self, scope, "attention", ("query_key_value", "dense"))


class GroupRouter(nn.Module):
    """The router of LLaDA2.x, in float32 throughout.

    It is not an nn.Linear, so it is neither quantised nor adapted.
    """

    def __init__(self, c):
        super().__init__()
        self.c, self.weight = c, nn.Parameter(torch.zeros(c.experts, c.width))
        self.register_buffer("expert_bias", torch.zeros(c.experts))

    def forward(self, x):
        """x [N, D] -> weights [N, k] and the chosen experts [N, k]."""
        c, score = self.c, F.linear(x.float(), self.weight.float()).sigmoid()
        # The bias balances the load. It decides which experts are chosen, not their weights.
        groups = (score + self.expert_bias).view(len(x), c.groups, -1)  # [N, groups, experts]
        # A group is worth its two best experts. Only experts of the best groups can be chosen.
        worth = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        best = worth.topk(c.top_groups, dim=-1).indices
        closed = torch.ones_like(worth, dtype=torch.bool).scatter(1, best, False)
        ranked = groups.masked_fill(closed[..., None], -math.inf).flatten(1)
        chosen = ranked.topk(c.top_k, dim=-1).indices
        weights = score.gather(1, chosen)
        return c.routed_scale * weights / (weights.sum(-1, keepdim=True) + 1e-20), chosen
