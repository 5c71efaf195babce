"""The real backbones: LLaDA-8B, LLaDA-MoE and LLaDA2.x, with the interface that memdlm.py asks of a backbone.

    backbone = llada.load("inclusionAI/LLaDA-MoE-7B-A1B-Base", llada.Options(load_4bit=True, lora=True))

All three are ordinary transformers that look both ways. In one line each:

    LLaDA-8B    LLaMA without the causal mask
    LLaDA-MoE   Qwen3-MoE without the causal mask: 64 experts, 8 per token, softmax router, no renormalisation
    LLaDA2.x    GLM-4-MoE with a block-causal mask: 256 experts in 8 groups, sigmoid router, one shared expert

The three blocks below stand side by side and carry the names of the published checkpoints. So a checkpoint loads as it
is, and adapters made with PEFT fit by name. Every expert is three plain nn.Linear, because that is what bitsandbytes
quantises, what PEFT adapts and what fast weights hang on: transformers' own classes stack the experts of a layer in one
parameter, of which both libraries silently leave 90 % alone. No code from a model's repository is ever run, and
nothing is unpickled: a model is its config.json, its safetensors and its tokenizer.

Attention masks are True where a query may look. LLaDA and LLaDA-MoE look everywhere. LLaDA2.x decodes block by block: a
token sees its own block of 32 and those before. Trained and adapted it is with full attention, though, because the
published run did so (--attention full, the default; --attention block is what the base model was trained with).
"""
from __future__ import annotations

import json
import logging
import math
import random
import re
import shutil
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import memdlm
from toy.data import collate
from toy.tasks import Sample

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it warns of an optional CPU kernel
BLOCK = 32  # length of a block of LLaDA2.x, counted from the start of the sequence


# ---- 1. config.json, translated ------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """What the blocks need to know, whatever the file calls it."""
    family: str            # llada, llada_moe or llada2
    vocab_size: int
    width: int             # D
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int        # channels of a head that are rotated
    rope_theta: float
    eps: float             # of the norms
    ffn: int               # inner width of a dense feed-forward, 0 where there is none
    dense_layers: int      # the first so many layers are dense
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared: int = 0        # inner width of the shared expert
    groups: int = 1        # of experts; a token chooses among the best `top_groups`
    top_groups: int = 1
    routed_scale: float = 1.0
    max_length: int = 0    # positions the model was made for
    mask_id: int | None = None
    eos_id: int | None = None


SUPPORTED = ('LLaDA ("llada"), LLaDA-MoE ("llada" with num_experts, or "lladamoe") and LLaDA2.x ("llada2_moe"); '
             "other architectures have no code here")
SPECIAL = {"llada": (126336, 126081), "llada_moe": (156895, 156892), "llada2": (156895, 156892)}  # mask, eos if unnamed


def translate(raw, name="config.json"):
    """A config.json as a dict -> Config. ValueError if it is of another architecture, or of a variant with other maths.

    Fields are required, not defaulted: the published classes' defaults (no rotation, biases, dropout 0.1) are not what
    the checkpoints hold.
    """
    def number(key, *others, low=1, high=1 << 20, kind=int):
        key = next((k for k in (key, *others) if raw.get(k) is not None), key)
        value = raw.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or kind(value) != value:
            raise ValueError(f"{name}: {key} is {value!r}; it must be a number from {low} to {high}")
        return kind(value)

    def refuse_unless(fields):
        for key, allowed in fields.items():
            if raw.get(key) not in allowed:
                raise ValueError(f"{name}: {key} is {raw.get(key)!r}, a variant that this code does not compute")

    if not isinstance(raw, dict):
        raise ValueError(f"{name} is not a model's configuration")
    raw = {**(raw.get("rope_parameters") or {}), **raw}  # where transformers 5 puts rope_theta and the like
    kind = raw.get("model_type")
    if kind == "llada" and "n_layers" in raw:
        family, parts = "llada", _dense(raw, number, refuse_unless)
    elif kind in ("llada", "lladamoe", "llada_moe") and "num_experts" in raw:
        family, parts = "llada_moe", _moe(raw, number, refuse_unless)
    elif kind in ("llada2_moe", "llada2_moe_21", "llada21_moe"):
        family, parts = "llada2", _moe2(raw, number, refuse_unless)
    else:
        raise ValueError(f"{name}: model_type {kind!r} is not supported; supported are {SUPPORTED}")
    eos = raw.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    special = {"mask_id": raw.get("mask_token_id"), "eos_id": raw.get("pad_token_id") if eos is None else eos}
    config = Config(family=family, **parts, **special)
    if config.heads % config.kv_heads or config.rotary_dim % 2 or config.top_k > config.experts:
        raise ValueError(f"{name}: heads {config.heads}, key-value heads {config.kv_heads}, rotated channels "
                         f"{config.rotary_dim}, top-k {config.top_k} do not fit together")
    if config.experts % config.groups or config.top_groups > config.groups or \
            config.top_k > config.experts // config.groups * config.top_groups:
        raise ValueError(f"{name}: {config.experts} experts in {config.groups} groups, of which {config.top_groups} are "
                         f"chosen, do not leave {config.top_k} for a token")
    return config


def _dense(raw, number, refuse_unless):
    refuse_unless({"block_type": ("llama",), "layer_norm_type": ("rms",), "activation_type": ("silu",), "alibi": (None, False),
                   "include_bias": (None, False), "include_qkv_bias": (None, False), "attention_layer_norm": (None, False),
                   "weight_tying": (False,), "clip_qkv": (None,), "rope": (None, True), "scale_logits": (None, False),
                   "input_emb_norm": (None, False)})
    width, heads = number("d_model"), number("n_heads")
    return dict(vocab_size=number("embedding_size", "vocab_size", high=1 << 24), width=width,
                layers=number("n_layers", high=1000), heads=heads, kv_heads=number("n_kv_heads", "n_heads"),
                head_dim=width // heads, rotary_dim=width // heads,
                rope_theta=number("rope_theta", high=1e12, kind=float), eps=number("rms_norm_eps", low=0, high=1, kind=float),
                ffn=number("mlp_hidden_size"), dense_layers=number("n_layers", high=1000),
                max_length=number("max_sequence_length", high=1 << 30))


def _moe(raw, number, refuse_unless):
    refuse_unless({"attention_bias": (None, False), "clip_qkv": (None,), "rope_scaling": (None,), "qk_layernorm": (True,),
                   "moe_router_enable_expert_bias": (None, False), "partial_rotary_factor": (None, 1),
                   "tie_word_embeddings": (None, False), "shared_expert_intermediate_size": (None, 0),
                   "moe_router_score_function": (None, "softmax"), "hidden_act": ("silu",),
                   "norm_topk_prob": (None, False)})
    frequency = 1 if raw.get("moe_layer_freq") is None else raw["moe_layer_freq"]
    if any(layer != 1 for layer in (frequency if isinstance(frequency, list) else [frequency])):
        raise ValueError("config.json: dense layers (moe_layer_freq with a 0) are a variant that this code does not compute")
    return _both(raw, number) | dict(expert_ffn=number("expert_intermediate_size"), ffn=0, dense_layers=0)


def _moe2(raw, number, refuse_unless):
    refuse_unless({"use_bias": (False,), "use_qkv_bias": (None, False), "use_qk_norm": (None, True), "rope_scaling": (None,),
                   "score_function": (None, "sigmoid"), "tie_word_embeddings": (None, False), "hidden_act": ("silu",),
                   "norm_head": (None, False), "use_sliding_window": (None, False), "norm_topk_prob": (None, True)})
    parts = _both(raw, number)
    if raw.get("partial_rotary_factor") is None and raw.get("rotary_dim"):
        parts["rotary_dim"] = number("rotary_dim")
    else:
        parts["rotary_dim"] = int(parts["head_dim"] * number("partial_rotary_factor", low=0, high=1, kind=float))
    return parts | dict(expert_ffn=number("moe_intermediate_size"), ffn=number("intermediate_size"),
                        dense_layers=number("first_k_dense_replace", low=0),
                        shared=number("moe_intermediate_size") * number("num_shared_experts", low=0),
                        groups=number("n_group"), top_groups=number("topk_group"),
                        routed_scale=number("routed_scaling_factor", low=0, kind=float))


def _both(raw, number):
    width, heads = number("hidden_size"), number("num_attention_heads")
    head_dim = number("head_dim") if raw.get("head_dim") else width // heads
    return dict(vocab_size=number("vocab_size", high=1 << 24), width=width, layers=number("num_hidden_layers", high=1000),
                heads=heads, kv_heads=number("num_key_value_heads", low=1), head_dim=head_dim, rotary_dim=head_dim,
                rope_theta=number("rope_theta", high=1e12, kind=float), eps=number("rms_norm_eps", low=0, high=1, kind=float),
                experts=number("num_experts", high=1 << 14), top_k=number("num_experts_per_tok"),
                max_length=number("max_position_embeddings", high=1 << 30))


# The shapes of the published models, as their config.json has them: for bench.py, --plan and trying things out.
PUBLISHED = {
    "llada-8b": dict(
        model_type="llada", d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288, vocab_size=126464,
        embedding_size=126464, block_type="llama", layer_norm_type="rms", activation_type="silu", rms_norm_eps=1e-5,
        rope_theta=500000.0, max_sequence_length=4096, weight_tying=False, mask_token_id=126336, eos_token_id=126081),
    "llada-moe": dict(
        model_type="llada", hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16,
        expert_intermediate_size=1024, num_experts=64, num_experts_per_tok=8, vocab_size=157184, rms_norm_eps=1e-5,
        rope_theta=50000, hidden_act="silu", qk_layernorm=True, max_position_embeddings=8192, pad_token_id=156892,
        mask_token_id=156895),
    "llada2.1-mini": dict(
        model_type="llada2_moe", hidden_size=2048, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=4,
        head_dim=128, intermediate_size=5120, moe_intermediate_size=512, num_experts=256, num_experts_per_tok=8,
        num_shared_experts=1, n_group=8, topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=1, vocab_size=157184,
        rms_norm_eps=1e-6, rope_theta=600000, partial_rotary_factor=0.5, hidden_act="silu", use_bias=False,
        max_position_embeddings=32768, pad_token_id=156892, mask_token_id=156895),
}


# ---- 2. The parts of a transformer ---------------------------------------------------------------------

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


def feed(h, x, need, feed_forward):
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

    def forward(self, x, groups=None):
        # x [N, D] holds so many rows of each sample: per-sample fast weights need to know
        self.gate_proj.groups = self.up_proj.groups = self.down_proj.groups = groups
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """Each token goes through its k experts; the outputs are summed with the router's weights."""
    grouped = False  # set by `load`: all experts in one product per projection, or one expert after the other

    def forward(self, x, weights, chosen, groups=None):
        """x [B, L, D], or [N, D] with the number of rows of each sample; weights, chosen [rows, k]: how much of which expert.

        One sample, k = 2, token 0 to experts 5 and 1, token 1 to 1 and 7: pairs 5 1 1 7, in order of their experts the pairs
        1 2 0 3, which are tokens 0 1 0 1. (LLaDA2.x was published to sum in float32; here in the model's precision.)
        """
        groups = groups or [x.shape[1]] * len(x)
        B, k, rows = len(groups), chosen.shape[1], x.reshape(-1, x.shape[-1])
        sample = torch.arange(B).repeat_interleave(torch.tensor(groups)).to(x.device)
        pair = (chosen * B + sample[:, None]).flatten()  # (expert, sample)
        order = pair.argsort(stable=True)  # sorted once: by expert, within an expert by sample, within that by position
        counts = torch.zeros(len(self) * B, dtype=torch.long, device=x.device).scatter_add_(0, pair, torch.ones_like(pair))
        out = (self.at_once if self.grouped else self.one_by_one)(rows[order // k], counts.view(-1, B))
        out = out[order.argsort()].view(-1, k, x.shape[-1])  # back to [token, choice, D]
        return (weights.to(out.dtype)[:, None] @ out).view(x.shape)

    def one_by_one(self, rows, counts):
        counts = counts.tolist()  # the one number that the host reads from the device in this layer
        rows = rows.split([sum(own) for own in counts])
        return torch.cat([expert(part, own if len(own) > 1 else None) for expert, part, own in zip(self, rows, counts) if len(part)])

    def at_once(self, rows, counts):
        ends = counts.flatten().cumsum(0).int()  # [experts * B] where the rows of each expert and sample end
        gate, up, down = ([getattr(expert, name) for expert in self] for name in ("gate_proj", "up_proj", "down_proj"))
        inner = F.silu(grouped_linear(gate, rows, ends)) * grouped_linear(up, rows, ends)
        return grouped_linear(down, inner, ends)


def grouped_linear(layers, x, ends):
    """What the experts' linear layers, one each, with their LoRA and fast weights, make of their rows. x [N, in] -> [N, out].

    The layers themselves are not called. Every matrix, also the low-rank ones, takes part in one product for all experts.
    """
    B, first, base = len(ends) // len(layers), layers[0], [getattr(layer, "base_layer", layer) for layer in layers]
    of_expert = ends[B - 1::B].contiguous()
    if base[0].weight.requires_grad:
        y = F.grouped_mm(x, torch.stack([layer.weight for layer in base]).mT, offs=of_expert)
    else:
        y = Frozen.apply(x, of_expert, base)
    if base is not layers and hasattr(first, "lora_A"):
        name = first.active_adapters[0]
        A, B_ = (torch.stack([getattr(layer, part)[name].weight for layer in layers]) for part in ("lora_A", "lora_B"))
        low = F.grouped_mm(first.lora_dropout[name](x.to(A.dtype)), A.mT, offs=of_expert)
        y = (y + first.scaling[name] * F.grouped_mm(low, B_.mT, offs=of_expert)).to(y.dtype)
    if fast := getattr(first, "fast", None):
        (pair, scale), z = fast, x
        for i in range(len(pair)):  # A, then B; or the full-rank delta
            own = torch.stack([layer.fast[0][i] for layer in layers]).flatten(0, 1).to(x.dtype)  # [experts * G, ...]
            z = F.grouped_mm(z, own.mT, offs=ends if len(pair[0]) > 1 else of_expert)
        y = y + scale * z
    return y


class Frozen(torch.autograd.Function):
    """The product with frozen weights. They are put side by side, and their 4 bits unpacked, in the forward pass and again in
    the backward pass, so that nobody keeps them in between."""

    @staticmethod
    def forward(ctx, x, ends, layers):
        ctx.save_for_backward(ends)
        ctx.layers = layers
        return F.grouped_mm(x, side_by_side(layers, x.dtype).mT, offs=ends)

    @staticmethod
    def backward(ctx, grad):
        return F.grouped_mm(grad.contiguous(), side_by_side(ctx.layers, grad.dtype), offs=ctx.saved_tensors[0]), None, None


def side_by_side(layers, dtype):
    """Weights of linear layers of one shape -> [layers, out, in]."""
    state = getattr(layers[0].weight, "quant_state", None)
    if state is None:
        return torch.stack([layer.weight for layer in layers])
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
    states = [layer.weight.quant_state for layer in layers]
    # A byte or a float per block of 64 weights; a matrix is a whole number of blocks, so many are unpacked like one.
    scales = torch.cat([dequantize_blockwise(own.absmax, own.state2) + own.offset for own in states])
    packed = torch.cat([layer.weight.data.flatten() for layer in layers])
    shape = (len(layers) * state.shape[0], state.shape[1])
    whole = QuantState(absmax=scales, shape=torch.Size(shape), code=state.code, blocksize=state.blocksize, quant_type=state.quant_type, dtype=dtype)
    return dequantize_4bit(packed[:, None], whole).view(len(layers), *state.shape)


# ---- 3. The three blocks, side by side -----------------------------------------------------------------
#      h += attention(norm(h));  h += feed-forward(norm(h))

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
        return feed(h, self.ff_norm(h), context.need, self.feed_forward)

    def feed_forward(self, x, groups=None):
        self.ff_proj.groups = self.up_proj.groups = self.ff_out.groups = groups
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
        return feed(h, self.post_attention_layernorm(h), context.need, self.feed_forward)

    def feed_forward(self, x, groups=None):
        # Softmax over all experts; the weights of the chosen are used as they are, so they sum to less than 1.
        weights, chosen = self.mlp.gate(x).flatten(0, -2).float().softmax(-1).topk(self.top_k, dim=-1)
        return self.mlp.experts(x, weights, chosen, groups)

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
        return feed(h, self.post_attention_layernorm(h), context.need, self.mlp if self.dense else self.feed_forward)

    def feed_forward(self, x, groups=None):
        return self.mlp.experts(x, *self.mlp.gate(x.flatten(0, -2)), groups) + self.mlp.shared_experts(x, groups)

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


class Family(NamedTuple):
    """Where a checkpoint keeps what, and which linear layers PEFT's "all-linear" adapts (the head is none of them)."""
    name: str
    block: type
    embed: str
    layers: str
    norm: str
    head: str
    attention: tuple
    ffn: tuple


FAMILIES = {
    "llada": Family("LLaDA", LLaDABlock, "model.transformer.wte", "model.transformer.blocks", "model.transformer.ln_f",
                    "model.transformer.ff_out", ("q_proj", "k_proj", "v_proj", "attn_out"), ("ff_proj", "up_proj", "ff_out")),
    "llada_moe": Family("LLaDA-MoE", LLaDAMoEBlock, "model.embed_tokens", "model.layers", "model.norm", "lm_head",
                        ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")),
    "llada2": Family("LLaDA2.x", LLaDA2Block, "model.word_embeddings", "model.layers", "model.norm", "lm_head",
                     ("query_key_value", "dense"), ("gate_proj", "up_proj", "down_proj")),
}


def build_network(config):
    """The module tree of a checkpoint, under the checkpoint's own names."""
    family, root = FAMILIES[config.family], nn.Module()
    parts = {family.embed: nn.Embedding(config.vocab_size, config.width),
             family.layers: nn.ModuleList(family.block(config, i) for i in range(config.layers)),
             family.norm: RMSNorm(config.width, config.eps), family.head: linear(config.width, config.vocab_size)}
    for path, module in parts.items():
        *outer, name = path.split(".")
        place = root
        for part in outer:
            if not hasattr(place, part):
                setattr(place, part, nn.Module())
            place = getattr(place, part)
        setattr(place, name, module)
    return root


# ---- 4. The backbone -----------------------------------------------------------------------------------

class Backbone(nn.Module):
    """A network with the interface described at the top of memdlm.py."""

    def __init__(self, network, config, tokenizer=None, attention="full", checkpointing=False, name=""):
        super().__init__()
        self.network, self.config, self.tokenizer, self.name = network, config, tokenizer, name
        self.attention, self.checkpointing = attention, checkpointing
        self.num_layers, self.vocab_size, self.mask_id = config.layers, config.vocab_size, config.mask_id

    @property
    def core(self):
        """The network inside PEFT's wrapper, if there is one."""
        return self.network.get_base_model() if self.has_lora else self.network

    @property
    def family(self):
        return FAMILIES[self.config.family].name

    @property
    def has_lora(self):
        return hasattr(self.network, "peft_config")

    def checksum(self):
        return checksum(self.part("embed").weight, [p for p in self.core.parameters() if p.dim() == 1])

    @property
    def decoder(self):
        return block_diffusion if self.config.family == "llada2" else memdlm.denoise

    def part(self, name):
        return self.core.get_submodule(getattr(FAMILIES[self.config.family], name))

    def embed(self, ids):
        table = self.part("embed")
        return table(ids.to(table.weight.device))  # [B, L, D]

    def blocks(self, h, valid, start, stop, need=None, past=None):
        """Run layers start..stop-1. need: rows [B, L] that will be read. past: keys and values before h, for block diffusion."""
        before = past.length if past else 0
        where = torch.arange(before, before + h.shape[1], device=h.device)
        # LLaDA-8B rotates in float32, the others in the model's precision.
        precision = torch.float32 if self.config.family == "llada" else h.dtype
        cos, sin = rotary(where, self.config.rotary_dim, self.config.rope_theta, precision)
        context = Context(cos, sin, self.mask(valid, h, past), past, None)
        # Fast weights act from `stop` on; what is computed again in the backward pass must not need them.
        again = self.checkpointing and stop is not None and torch.is_grad_enabled()
        for layer in self.part("layers")[start:stop]:
            if layer.layer == self.num_layers - 1:
                context = context._replace(need=need)
            h = checkpoint(layer, h, context, use_reentrant=False) if again else layer(h, context)
        return h

    def mask(self, valid, h, past):
        """Where a query may look: not at padding and, with block-causal attention, not beyond its own block."""
        mask = None if valid is None or valid.all() else valid[:, None, None, :].to(h.device)  # [B, 1, 1, L]
        if self.attention == "block" or past is not None:
            before = past.length if past else 0
            if (before + h.shape[1] - 1) // BLOCK != before // BLOCK:  # else all queries are in the last block and see everything
                block = torch.arange(before + h.shape[1], device=h.device) // BLOCK
                causal = block[before:, None] >= block  # [L, before + L]
                mask = causal if mask is None else mask & causal
        return mask

    def head(self, h):
        return self.part("head")(self.part("norm")(h))

    def matrices(self, first, scope):
        path, layers = FAMILIES[self.config.family].layers, self.part("layers")
        return {f"{path}.{i}.{name}": matrix for i in range(first, self.num_layers)
                for name, matrix in layers[i].matrices(scope).items()}


# ---- 5. Loading ----------------------------------------------------------------------------------------

def find(model):
    """A folder, or the hub's id of a model or adapter (its files are downloaded, or taken from the cache) -> folder."""
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json", "special_tokens_map.json",
              "chat_template.jinja", "adapter_config.json", "base.json"]
    if Path(model).is_dir():
        return Path(model)
    return download(model, "model", wanted, "'toy', a folder with config.json and *.safetensors, or a hub id such as "
                    "inclusionAI/LLaDA-MoE-7B-A1B-Base")


def config_of(model):
    """The configuration of a model, before any of its weights are fetched."""
    folder = Path(model)
    if not folder.is_dir():
        if model in PUBLISHED:
            return translate(PUBLISHED[model])
        folder = download(model, "model", ["config.json"], "'toy', a folder with config.json and *.safetensors, or a hub id such "
                          "as inclusionAI/LLaDA-MoE-7B-A1B-Base")
    return translate(read_json(folder / "config.json"), str(folder / "config.json"))


def find_data(name):
    """A .json or .jsonl file, or the hub's id of a data set that holds exactly one -> path."""
    if Path(name).is_file():
        return name
    folder = download(name, "dataset", ["*.json", "*.jsonl"], "--data FILE.jsonl, with prompt and response (or instruction and "
                      "output, or messages) in each line")
    found = sorted(p for p in folder.rglob("*.json*") if p.name not in ("dataset_infos.json", "config.json"))
    if len(found) != 1:
        raise ValueError(f"data set {name} has {len(found)} JSON files ({', '.join(p.name for p in found[:5])}); download one "
                         "and give it with --data FILE.json")
    return str(found[0])


def download(name, kind, wanted, instead):
    """Files of a repository on the hub -> folder. Nothing is retried for minutes: one line says what to do instead."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"there is no {kind} {name!r} here; give {instead}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=wanted, etag_timeout=5))
    except (HfHubHTTPError, OSError) as error:  # not found, not allowed, not reachable, and not in the cache either
        raise ValueError(f"{kind} {name!r} is not here and could not be fetched from the hub "
                         f"({str(error).strip().splitlines()[0][:160]}); give {instead}") from None


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: not the folder of a model in the hub's layout") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


class Shards:
    """The safetensors files of a model folder. Called with a name and a shape, gives that tensor, read from disk now."""

    def __init__(self, folder):
        self.folder, self.open, self.used = folder, {}, set()
        index = folder / "model.safetensors.index.json"
        if index.exists():
            names = read_json(index).get("weight_map", {})
            for file in set(names.values()):
                if not re.fullmatch(r"[\w.-]+\.safetensors", str(file)):
                    raise ValueError(f"{index} names the file {file!r}, which is not a safetensors file beside it")
            self.where = names
        else:
            self.where = dict.fromkeys(self.file("model.safetensors")[1], "model.safetensors")

    def file(self, name):
        from safetensors import SafetensorError, safe_open
        if name not in self.open:
            if not (self.folder / name).exists():
                raise ValueError(f"{self.folder / name} is missing")
            try:
                file = safe_open(self.folder / name, "pt")
                self.open[name] = file, set(file.keys())
            except SafetensorError as error:
                raise ValueError(f"{self.folder / name} is not a safetensors file: {error}") from None
        return self.open[name]

    def __call__(self, name, shape):
        if name not in self.where:
            raise ValueError(f"{self.folder}: the checkpoint has no {name}")
        file, names = self.file(self.where[name])
        if name not in names:
            raise ValueError(f"{self.folder / self.where[name]} has no {name}, though the index says so")
        found = file.get_slice(name).get_shape()
        if list(found) != list(shape):
            raise ValueError(f"{self.folder}: {name} should be {list(shape)}, is {list(found)}")
        self.used.add(name)
        return file.get_tensor(name)

    def finish(self):
        """Everything that is in the files must have been asked for."""
        if left := sorted(set(self.where) - self.used):
            raise ValueError(f"{self.folder}: {len(left)} weights of the checkpoint have no place in the model: "
                             f"{', '.join(left[:3])}{' ...' if len(left) > 3 else ''}")


def random_source(device, seed=0):
    """In place of a checkpoint: the same shapes, random numbers, made where they are needed and one at a time."""
    generator = torch.Generator(device).manual_seed(seed)

    def tensor(name, shape):
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        return torch.empty(shape, device=device).normal_(0, 0.02, generator=generator)
    return tensor


def quantisable(network, config):
    """{name: nn.Linear} of the blocks but the router: what --load-4bit quantises."""
    return {name: m for name, m in network.named_modules() if type(m) is nn.Linear and name != FAMILIES[config.family].head
            and not name.endswith("mlp.gate")}


def to_4bit(network, config, dtype):
    """Replace every linear layer of the blocks but the router by bitsandbytes' nf4 with double quantisation."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise ValueError("--load-4bit needs bitsandbytes, which is not installed: pip install bitsandbytes") from None
    found = quantisable(network, config)
    if not found:
        raise ValueError("--load-4bit found no linear layer to quantise")
    for path, old in found.items():
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=dtype, compress_statistics=True,
                                quant_type="nf4", device="meta")
        # On some CPUs bitsandbytes switches in eval mode to a fused product that has no gradient: adapting to a prompt would
        # silently do nothing.
        new.support_avx512bf16_for_cpu = False
        place, _, name = path.rpartition(".")
        setattr(network.get_submodule(place), name, new)


def load_weights(network, source, dtype, device):
    """Give every parameter its values, one at a time, so that the host holds no more than one of them."""
    for path, module in network.named_modules():
        for name, empty in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            value = source(f"{path}.{name}", empty.shape)
            if not value.isfinite().all():
                raise ValueError(f"{path}.{name} holds numbers that are not finite; the checkpoint is damaged")
            if hasattr(empty, "quant_type"):  # Params4bit: quantised on its way to the device
                value = type(empty)(value.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True,
                                    module=module).to(device)
            elif isinstance(empty, nn.Parameter):
                value = nn.Parameter(value.to(device, dtype), requires_grad=False)
            else:  # the router's bias is stored in float32 and stays so
                value = value.to(device, torch.float32)
            setattr(module, name, value)


def load(model, load_4bit=False, dtype="auto", device=None, attention="full", checkpointing=False, merge="", random=False,
         seed=0, experts="loop"):
    """A hub id, a folder in the hub's layout, or (random=True) a name of PUBLISHED or a config -> Backbone, frozen.

    dtype: auto (bfloat16 on a GPU, the file's on a CPU), bfloat16 or float32. merge: folder of an adapter that is added
    to the weights before they are rounded. experts: loop, or grouped (see Experts). ValueError says in one line what does not fit.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if random:
        folder, raw, source = None, PUBLISHED[model] if isinstance(model, str) else model, random_source(device, seed)
    else:
        folder = find(model)
        raw, source = read_json(folder / "config.json"), Shards(folder)
    config = translate(raw, str(folder / "config.json") if folder else "config")
    tokenizer = Tokenizer(folder, config) if folder and (folder / "tokenizer.json").exists() else None
    config = special_ids(config, tokenizer)
    if attention == "block" and config.family != "llada2":
        raise ValueError(f"--attention block is for LLaDA2.x; {FAMILIES[config.family].name} attends fully")
    if dtype == "auto":
        stored = raw.get("dtype") or raw.get("torch_dtype")
        dtype = "bfloat16" if device.type == "cuda" or stored == "bfloat16" else "float32"
    dtype = getattr(torch, dtype)
    with torch.device("meta"):
        network = build_network(config)
        for module in network.modules():
            if isinstance(module, Experts):
                module.grouped = experts == "grouped"
        if load_4bit:
            to_4bit(network, config, dtype)
    load_weights(network, merged(source, merge, network, model, FAMILIES[config.family].embed) if merge else source, dtype, device)
    if folder:
        source.finish()
    if tokenizer:
        tokenizer.mask_id, tokenizer.eos_id = config.mask_id, config.eos_id
    network.is_loaded_in_4bit = load_4bit  # where PEFT looks
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # float32 products, the LoRA's above all, on tensor cores (TF32)
    name = model if folder else "random weights"
    name += f" merged with {merge}" if merge else ""
    return Backbone(network, config, tokenizer, attention, checkpointing, name).eval()


def special_ids(config, tokenizer):
    """The ids of mask and end: from config.json, else from the tokenizer, else the published ones."""
    mask, eos = SPECIAL[config.family]
    given = (config.mask_id, tokenizer.mask_id if tokenizer else None, mask), (config.eos_id, tokenizer.eos_id if tokenizer else None, eos)
    mask, eos = (next(i for i in ids if i is not None) for ids in given)
    for what, i in (("mask", mask), ("end", eos)):
        if not isinstance(i, int) or not 0 <= i < config.vocab_size:
            raise ValueError(f"the {what} token's id is {i!r}, outside the vocabulary of {config.vocab_size}; "
                             f"set {'mask' if what == 'mask' else 'eos'}_token_id in config.json")
    if mask == eos:
        raise ValueError(f"mask and end token have the same id, {mask}; correct mask_token_id in config.json")
    return replace(config, mask_id=mask, eos_id=eos)


def describe(backbone):
    """One line: what was loaded."""
    is_4bit = [m for m in backbone.modules() if hasattr(m, "quant_state") and hasattr(m, "in_features")]
    adapted = sum(hasattr(m, "lora_A") for m in backbone.modules())
    lora = sum(p.numel() for n, p in backbone.named_parameters() if "lora_" in n)
    packed = sum(m.weight.numel() for m in is_4bit)
    whole = sum(m.in_features * m.out_features for m in is_4bit)
    total = sum(p.numel() for n, p in backbone.named_parameters() if "lora_" not in n) - packed + whole
    size = sum(p.numel() * p.element_size() for p in backbone.parameters())
    return (f"{FAMILIES[backbone.config.family].name}: {many(total)} parameters, {len(is_4bit):,} layers in 4-bit, {adapted:,} with "
            f"LoRA ({many(lora)} parameters), {size / 2**30:.3g} GiB on {next(backbone.parameters()).device}")


def many(n):
    return f"{n / 1e9:.3g} billion" if n >= 1e9 else f"{n / 1e6:.3g} million"


# ---- 6. The outer LoRA, through PEFT -------------------------------------------------------------------

def lora_targets(config, scope, router):
    """Names of the layers that get a LoRA. The published run had it on the router of LLaDA-MoE too, an nn.Linear there."""
    family = FAMILIES[config.family]
    names = {"all": family.attention + family.ffn, "attention": family.attention}[scope]
    if router and config.family != "llada_moe":
        raise ValueError("--lora-router is for LLaDA-MoE: the router of the other models is no linear layer")
    return [*names] + ["gate"] * router


def add_lora(backbone, rank, alpha, dropout, scope="all", router=False, dtype="float32", seed=0, targets=None):
    """Wrap the network in PEFT's LoRA; only its weights are trainable then."""
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", base_model_name_or_path=backbone.name,
                        target_modules=targets or lora_targets(backbone.config, scope, router),
                        exclude_modules=FAMILIES[backbone.config.family].head)  # LLaDA-8B calls it ff_out too
    backbone.network.name_or_path = backbone.name  # where PEFT looks
    with torch.random.fork_rng(devices=[]):  # PEFT draws A from the global generator
        torch.manual_seed(seed)
        backbone.network = get_peft_model(backbone.network, config)
    for name, p in backbone.network.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(getattr(torch, dtype))
    return backbone


def lora_weights(backbone):
    """{key in PEFT's file: parameter}."""
    return {name.replace(".default.", "."): p for name, p in backbone.network.named_parameters() if "lora_" in name}


def checksum(embedding, vectors):
    """Tells base weights of one shape apart, by some that are never quantised or adapted: embeddings and all norms; in bfloat16,
    as checkpoints come. (So a base that differs by a merged LoRA alone is not told apart.)"""
    some = torch.cat([embedding[:1024].flatten(), *vectors]).detach().to("cpu", torch.bfloat16)
    return f"{crc32(some.view(torch.int16).numpy().tobytes()):08x}"


def save_adapter(backbone, folder):
    """adapter_config.json and adapter_model.safetensors, as plain PEFT writes and reads them, and in base.json what it is for.
    Whole or not at all."""
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    backbone.network.save_pretrained(aside, save_embedding_layers=False)
    (aside / "base.json").write_text(json.dumps({"name": backbone.name, "checksum": backbone.checksum()}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def read_adapter(folder, base):
    """An adapter's folder or hub id -> its LoraConfig fields, with base.json under made_for, and tensors. Only plain LoRA is taken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    folder = find(folder)
    raw, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if raw.get("init_lora_weights") not in (True, False, None, "gaussian"):
        raise ValueError(f"{folder}: initialised by {raw['init_lora_weights']}, which changes the base weights too; not supported")
    odd = [key for key in ("use_dora", "use_rslora", "modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern",
                           "layer_replication", "fan_in_fan_out", "lora_bias") if raw.get(key)]
    if raw.get("peft_type") != "LORA" or odd or raw.get("bias", "none") != "none":
        raise ValueError(f"{folder}: only plain LoRA adapters are read, this one has {', '.join(odd) or raw.get('peft_type')}")
    if not isinstance(raw.get("r"), (int, float)) or not 0 < raw["r"] <= 1 << 16 or not isinstance(raw.get("lora_alpha"), (int, float)):
        raise ValueError(f"{folder}/adapter_config.json: r {raw.get('r')!r} and lora_alpha {raw.get('lora_alpha')!r} must be numbers")
    raw["r"], theirs = int(raw["r"]), str(raw.get("base_model_name_or_path") or "")
    ours, their = (name.rstrip("/").rpartition("/")[2].lower() for name in (base, theirs))
    # Shapes are checked in any case; Base and Instruct have the same. A path on someone's disk says nothing.
    published = "llada" in ours and "llada" in their and not Path(theirs).exists()
    if "merged with" in theirs + base and theirs != base or published and ours != their:
        raise ValueError(f"{folder} was made for {theirs}, not for {base}; if that is the same model, correct "
                         "base_model_name_or_path in its adapter_config.json")
    raw["made_for"] = read_json(folder / "base.json") if (folder / "base.json").exists() else {}
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing (an adapter must be in safetensors)") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if broken := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), ""):
        raise ValueError(f"{path}: {broken} holds numbers that are not finite; the file is damaged")
    return raw, tensors


def refuse_other_weights(raw, folder, base, own):
    """Of two bases with the same shapes, an adapter fits one. own: the checksum of that which is here."""
    made_for = raw["made_for"]
    if isinstance(made_for, dict) and made_for.get("checksum", own) != own:
        raise ValueError(f"{folder} was made for other weights ({made_for.get('name')}) than those of {base}; "
                         "remove its base.json to use it all the same")


def load_adapter(backbone, folder, dropout=0.0, dtype="float32"):
    """Put a trained adapter on the backbone, live and trainable. Every key must fit, and no layer may go without."""
    raw, tensors = read_adapter(folder, backbone.name)
    targets = sorted({key.rpartition(".lora_")[0].rpartition(".")[2] for key in tensors})
    allowed = lora_targets(backbone.config, "all", backbone.config.family == "llada_moe")
    if not targets or not set(targets) <= set(allowed):
        raise ValueError(f"{folder} adapts {', '.join(targets[:8]) or 'nothing'}; this model has {', '.join(allowed)}")
    add_lora(backbone, raw["r"], raw["lora_alpha"], dropout, dtype=dtype, targets=targets)
    places = lora_weights(backbone)
    wrong = [key for key in tensors.keys() | places.keys()
             if key not in tensors or key not in places or tensors[key].shape != places[key].shape]
    if wrong:
        raise ValueError(f"{folder} was made for another model: {len(wrong)} of {len(tensors)} keys do not fit, such as {min(wrong)}")
    refuse_other_weights(raw, folder, backbone.name, backbone.checksum())
    for key, p in places.items():
        p.data.copy_(tensors[key])
    return backbone


def merged(source, folder, network, base, embed):
    """The same source of weights, with an adapter's W + (alpha / r) B A. Before quantisation: rounded once, not twice."""
    raw, tensors = read_adapter(folder, base)
    scale, weights = raw["lora_alpha"] / raw["r"], dict(network.named_parameters())
    stems = {key.rpartition(".lora_")[0] for key in tensors}
    for stem in sorted(stems):
        shapes = [tuple(tensors[f"{stem}.lora_{x}.weight"].shape) if f"{stem}.lora_{x}.weight" in tensors else None for x in "AB"]
        place = weights.get(stem.removeprefix("base_model.model.") + ".weight")
        if place is None or shapes != [(raw["r"], place.shape[1]), (place.shape[0], raw["r"])]:
            raise ValueError(f"{folder} was made for another model: its {stem} has no place here")
    vectors = [source(name, p.shape) for name, p in weights.items() if p.dim() == 1]
    refuse_other_weights(raw, folder, base, checksum(source(f"{embed}.weight", weights[f"{embed}.weight"].shape), vectors))

    def with_adapter(name, shape):
        W, stem = source(name, shape), "base_model.model." + name.removesuffix(".weight")
        if stem not in stems:
            return W
        A, B = (tensors[f"{stem}.lora_{x}.weight"].to(W.device).float() for x in "AB")
        return (W.float() + scale * B @ A).to(W.dtype)
    return with_adapter


# ---- 7. Text -------------------------------------------------------------------------------------------

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
        self.mask_id = next((self.added[t] for t in ("<|mask|>", "<|mdm_mask|>") if t in self.added), self.hf.mask_token_id)
        self.eos_id = self.hf.eos_token_id
        self.templated = bool(self.hf.chat_template) and self.good_template()

    @property
    def stop_ids(self):
        """A response ends with the template's end of turn, or with the end of text."""
        return [i for i in (self.eos_id, self.added.get("<|role_end|>"), self.added.get("<|eot_id|>")) if i is not None]

    def good_template(self):
        """Can prompt and reply be told apart, and does a reply end in a token that says so?"""
        try:
            return self.split([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[1][-1] in self.stop_ids
        except ValueError:
            return False

    def refuse_special(self, text):
        """A user's text may not hold a mask, an end, or what begins a turn."""
        structure = {"<role>", "</role>", "<|start_header_id|>", "<|end_header_id|>", self.hf.bos_token}
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


def messages(record):
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


# ---- 8. Block diffusion, the decoder of LLaDA2.x -------------------------------------------------------

def _whole_blocks(x, fill, valid, mask_id):
    """Rows filled up to the end of their last block, which is decoded whole, as in training, also where less of it was asked
    for -> canvas, given, fill, each [B, whole blocks]."""
    width = -(-int(valid.sum(1).max()) // BLOCK) * BLOCK
    pad, last = (0, width - x.shape[1]), (-(-valid.sum(1) // BLOCK) * BLOCK)[:, None]  # [B, 1] end of each row's last block
    given, place = F.pad(valid & ~fill, pad), torch.arange(width)
    fill = ~given & (place < last) & (place >= given.sum(1, keepdim=True))
    return torch.where(fill, mask_id, F.pad(x, pad)), given, fill


def _scheduled(steps, k):
    """How many positions of a block are committed at look k at the least: with so many steps it is full."""
    return max(1, memdlm.quota(BLOCK, steps, k)) if k < steps else BLOCK


@torch.no_grad()
def block_diffusion(backbone, s, x, fill, valid, seeds, phi=None, threshold=0.95, edit_threshold=None, steps=None,
                    temperature=0.0, extra_steps=16):
    """Fill in the positions `fill` of x, a block of 32 after the other. Yields the canvas [B, L] after each step.

    Within a block every position whose token is more probable than `threshold` is committed, and at least the scheduled
    number (32 / steps per block, so one by default). edit_threshold: from the second look on, tokens of the block are replaced
    where the model prefers another by more than this (LLaDA2.1's editing), until nothing changes or after `extra_steps` looks.

    Finished blocks never change and do not look ahead, so their keys and values, computed from their final tokens, are kept and
    exact: a step computes 32 positions. fill is what follows the prompt in each row; blocks count from the start of the row,
    so rows of different lengths share the grid. A row is done after the block in which it says its end; the rest is that.
    """
    end, done = int(valid.sum(1).max()), ~fill.any(1)  # done: nothing (more) is wanted of this row
    x, given, fill = _whole_blocks(x, fill, valid, backbone.mask_id)
    open_, width, past = fill.clone(), x.shape[1], Past(x.shape[1])
    stops = torch.tensor(backbone.tokenizer.stop_ids if backbone.tokenizer else [backbone.config.eos_id])

    def forward(start, stop, need=None):
        """Hidden states of x[:, start:stop], read where `need` is. None: nowhere; final tokens, which join the past."""
        keep = need is None
        need = torch.zeros(x[:, start:stop].shape, dtype=torch.bool) if keep else need
        with memdlm.fast_weights(backbone, s, phi):
            h = backbone.blocks(backbone.embed(x[:, start:stop]), None, 0, None, need, past)
        past.length = stop if keep else past.length
        return h

    def step(here, live, looks, k):
        """Look at the block once and commit. Returns the rows that want another look, and whether anything changed."""
        masks = open_[:, here] & live[:, None]
        where = masks if edit_threshold is None else fill[:, here] & live[:, None]
        noise = memdlm.gumbel_noise(backbone, seeds, f"{here.start} {k}", where) if temperature > 0 else None
        tokens, p = memdlm.choose(backbone, forward(here.start, here.stop, where)[where], temperature=temperature, noise=noise)
        tokens, p = memdlm.scatter(tokens, where), memdlm.scatter(p, where)
        at_least = _scheduled(steps or BLOCK, k)
        change = commit = masks & ((p > threshold) | (memdlm.order(masks, -p) < at_least))
        again = (masks & ~commit).any(1)
        if edit_threshold is not None:
            change = commit | (where & ~masks & (tokens != x[:, here]) & (p > edit_threshold))
            looks += ~masks.any(1)
            again = masks.any(1) | (change.any(1) & (looks < extra_steps))  # until a look without masks changes nothing
        x[:, here] = torch.where(change, tokens, x[:, here])
        open_[:, here] &= ~commit
        return again, bool(change.any())

    if start := int(given.sum(1).min()) // BLOCK * BLOCK:
        forward(0, start)  # whole blocks of prompt, in one pass
    for start in range(start, width, BLOCK):
        here = slice(start, start + BLOCK)
        live, looks, k = ~done & fill[:, here].any(1), torch.zeros(len(x), dtype=torch.long), 0
        while live.any() and k < BLOCK + extra_steps:
            (live, changed), k = step(here, live, looks, k), k + 1
            if changed:
                yield x[:, :end].clone()
        done |= (torch.isin(x[:, here], stops) & fill[:, here]).any(1)
        if (done | ~fill[:, here.stop:].any(1)).all():
            break
        if here.stop < width:
            forward(start, here.stop)  # once more, with the block's final tokens
    if (rest := open_ & done[:, None]).any():  # what a row did not need
        yield torch.where(rest, backbone.config.eos_id, x)[:, :end]


# ---- 9. Memory, before anything is loaded --------------------------------------------------------------

def plan(config, s, length):
    """[(what, bytes)] of a training run on one GPU with settings s, at `length` tokens per sample.

    The counts are exact; activations are summed tensor by tensor from what autograd keeps, and the last line is an allowance.
    """
    with torch.device("meta"):
        network = build_network(config)
    linears = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    size = {"float32": 4, "bfloat16": 2, "auto": 2}
    wide = size[s.dtype]
    head = FAMILIES[config.family].head
    small = quantisable(network, config) if s.load_4bit else {}
    in_4bit, all_ = sum(m.weight.numel() for m in small.values()), sum(p.numel() for p in network.parameters())
    weights = (all_ - in_4bit) * wide + in_4bit * (4 + 8 / 64 + 32 / (64 * 256)) / 8  # nf4: a byte per 64, a float per 64 * 256
    targets = lora_targets(config, s.lora_scope, s.lora_router) if s.lora else []
    adapted = [m for n, m in linears.items() if n.rpartition(".")[2] in targets and n != head]
    lora = sum(s.lora_rank * (m.in_features + m.out_features) for m in adapted)
    trained, grain = (lora, size[s.lora_dtype]) if s.lora else (all_, wide)
    sizes = [s.lora_rank * n for m in adapted for n in (m.in_features, m.out_features)] or [p.numel() for p in network.parameters()]
    state = sum(moments(s.optimizer, n, grain) for n in sizes)
    first, count = memdlm.first_layer(config.layers, s.layer_fraction), s.batch if s.per_sample or s.memory_from == "prompt" else 1
    fast = [m for n, m in Backbone(network, config).matrices(first, s.scope).items()] if s.memory else []
    phi = sum(s.rank * (m.in_features + m.out_features) if s.adapter == "lora" else m.weight.numel() for m in fast) * 4 * count
    rows = s.batch * length
    one, with_phi = rows * kept_per_token(config, s, wide), rows * kept_by_phi(config, wide) * s.memory
    above = config.layers - first
    h = rows * config.width * wide
    return [("weights" + (f", {many(in_4bit)} of {many(all_)} in 4-bit" if in_4bit else ""), weights),
            (f"{'LoRA' if s.lora else 'trained weights (the same as above)'}, {many(trained)}", lora * grain),
            ("their gradients", trained * grain), (f"optimiser, {s.optimizer}", state),
            ("phi, its gradient and its successor", 3 * phi),
            (f"activations of the {above} layers with phi, {length} tokens x {s.batch}", above * (one + with_phi)),
            ("activations of the layers below" + (", each made again when its turn comes" if s.checkpointing else ""),
             (first * h + one) if s.checkpointing else first * one),
            ("a chunk of logits: in the model's precision, in float32, log-softmax and gradient",
             min(memdlm.LOGITS, rows * config.vocab_size) * (wide + 12)),
            ("CUDA's own, and what fragments", 1.0 * 2**30)]


def moments(optimizer, n, grain):
    """Bytes on the GPU of the two moments of a tensor of n numbers."""
    if optimizer == "adamw":
        return 2 * n * grain
    if n < 4096:  # bitsandbytes keeps small tensors in float32, and pages only large ones to the host
        return 2 * n * 4
    return 0 if optimizer == "paged_adamw8bit" and n >= 1e5 else 2 * (n + -(-n // 256) * 4)


def kept_per_token(config, s, wide, mask=1):
    """Bytes that autograd keeps of one token in one layer. wide: bytes of a number; mask: of one in dropout's mask."""
    D, q, kv = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    grain = {"float32": 4, "bfloat16": 2}[s.lora_dtype]

    def matrix(width, adapted=True):
        # A frozen matrix keeps nothing of its input; a LoRA keeps what dropout left of it, in its own precision, and the mask.
        if not s.lora:
            return width * wide
        return 0 if not adapted else width * (grain + mask) if s.lora_dropout else width * grain

    def feed_forward(inner):  # inside silu(gate) * up: its two factors and what silu was applied to
        everywhere = s.lora_scope == "all"
        return 3 * inner * wide + 2 * matrix(D, everywhere) + matrix(inner, everywhere)

    norms = 2 * D * 4 + (0 if config.family == "llada" else (q + kv) * 4)  # their inputs, in float32
    attention = 4 * q * wide  # queries, keys and values of every head, and the output
    # The output matrix, and those of q, k and v: three, in LLaDA2.x one.
    attention += matrix(q) + matrix(D) * (1 if config.family == "llada2" else 3)
    if not config.experts:
        return norms + attention + feed_forward(config.ffn)
    routed = config.top_k * (feed_forward(config.expert_ffn) + D * wide)
    return norms + attention + routed + (feed_forward(config.shared) if config.shared else 0)


def kept_by_phi(config, wide):
    """Bytes per token and layer that the gradient of phi needs besides: the inputs of its matrices."""
    if not config.experts:
        return (config.width + config.ffn) * wide
    return (config.top_k * (config.width + config.expert_ffn) + (config.width + config.shared if config.shared else 0)) * wide


def plan_text(parts, room=None):
    """The plan as lines, and what to change when it does not fit."""
    total = sum(size for _, size in parts)
    lines = [f"  {size / 2**30:7.2f} GiB  {what}" for what, size in parts] + [f"  {total / 2**30:7.2f} GiB  together"]
    if room is not None and total > room:
        lines.append(f"  more than the {room / 2**30:.1f} GiB of {'this' if torch.cuda.is_available() else 'such a'} GPU. What helps, in "
                     "this order: --load-4bit, --checkpointing, --batch 1 with more --accumulate, --optimizer adamw8bit, "
                     "--lora-dtype bfloat16 with it, --max-length 2048, --lora-rank 16, --lora-scope attention")
    elif room is not None:
        lines.append(f"  fits into {room / 2**30:.1f} GiB")
    return "\n".join(["memory planned:", *lines])


# ---- 10. A tiny checkpoint, to try the whole path on a CPU ----------------------------------------------

TINY = {  # changes to PUBLISHED; widths are multiples of 64, the block in which bitsandbytes quantises
    "llada-8b": dict(d_model=64, n_layers=4, n_heads=4, n_kv_heads=4, mlp_hidden_size=128, vocab_size=320, embedding_size=320),
    "llada-moe": dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, num_experts=8,
                      num_experts_per_tok=2, expert_intermediate_size=64, vocab_size=320),
    "llada2.1-mini": dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                          num_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, intermediate_size=128,
                          moe_intermediate_size=64, vocab_size=320),
}
TEMPLATE = ("{% for m in messages %}{{ '<role>' + {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'}[m['role']] "
            "+ '</role>' + m['content'] + '<|role_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}")


def byte_tokenizer():
    """A tokenizer of bytes, with the special tokens and a chat template like the published one's."""
    from tokenizers import Tokenizer as Fast, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|mask|>", "<|role_end|>", "<role>", "</role>"]
    tokenizer = Fast(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0], mask_token=special[1],
                                   additional_special_tokens=special[2:])
    fast.chat_template = TEMPLATE
    return fast


def write_tiny(name, folder, seed=0, shards=2):
    """A random model of a few hundred thousand weights in the hub's layout: config, sharded safetensors, tokenizer of bytes; with
    pairs.jsonl to train on."""
    from safetensors.torch import save_file
    folder, fast = Path(folder), byte_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    ids = fast.get_added_vocab()
    raw = PUBLISHED[name] | TINY[name] | {"mask_token_id": ids["<|mask|>"], "eos_token_id": ids["<|endoftext|>"]}
    raw |= {"pad_token_id": raw["eos_token_id"], "dtype": "float32"}
    backbone = load(raw, random=True, dtype="float32", device="cpu", seed=seed)
    weights = {k: v.contiguous() for k, v in backbone.network.state_dict().items()}
    names, where = sorted(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({k: weights[k] for k in part}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    pairs = [{"prompt": f"What is {a} plus {b}?", "response": f"{a} plus {b} is {a + b}."} for a in range(10) for b in range(6)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in TINY:
        sys.exit(f"usage: python llada.py {{{','.join(TINY)}}} FOLDER   writes a tiny random model in the hub's layout")
    write_tiny(sys.argv[1], sys.argv[2])
    print(f"{sys.argv[2]}: a tiny {sys.argv[1]}; try: python train.py --model {sys.argv[2]} --data {sys.argv[2]}/pairs.jsonl --load-4bit")
