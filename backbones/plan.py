"""Memory, before anything is loaded."""
from __future__ import annotations

import torch
from torch import nn

import memdlm
from backbones.backbone import LOGITS, Backbone, build_network
from backbones.checkpoint import human_count, quantisable
from backbones.families import FAMILIES
from backbones.lora import lora_targets


def memory_plan(config, s, length):
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
    state = sum(optimizer_bytes(s.optimizer, n, grain) for n in sizes)
    first, count = memdlm.first_fast_layer(config.layers, s.layer_fraction), s.batch if s.per_sample or s.memory_from == "prompt" else 1
    fast = [m for n, m in Backbone(network, config).matrices(first, s.scope).items()] if s.memory else []
    phi = sum(s.rank * (m.in_features + m.out_features) if s.adapter == "lora" else m.weight.numel() for m in fast) * 4 * count
    rows = s.batch * length
    one, with_phi = rows * kept_per_token(config, s, wide), rows * kept_by_phi(config, wide) * s.memory
    above = config.layers - first
    h = rows * config.width * wide
    return [("weights" + (f", {human_count(in_4bit)} of {human_count(all_)} in 4-bit" if in_4bit else ""), weights),
            (f"{'LoRA' if s.lora else 'trained weights (the same as above)'}, {human_count(trained)}", lora * grain),
            ("their gradients", trained * grain), (f"optimiser, {s.optimizer}", state),
            ("phi, its gradient and its successor", 3 * phi),
            (f"activations of the {above} layers with phi, {length} tokens x {s.batch}", above * (one + with_phi)),
            ("activations of the layers below" + (", each made again when its turn comes" if s.checkpointing else ""),
             (first * h + one) if s.checkpointing else first * one),
            ("a chunk of logits: in the model's precision, in float32, log-softmax and gradient",
             min(LOGITS, rows * config.vocab_size) * (wide + 12)),
            ("CUDA's own, and what fragments", 1.0 * 2**30)]


def optimizer_bytes(optimizer, n, grain):
    """Bytes on the GPU of the two moments of a tensor of n numbers."""
    if optimizer == "adamw":
        return 2 * n * grain
    if n < 4096:  # bitsandbytes keeps small tensors in float32, and pages only large ones to the host
        return 2 * n * 4
    return 0 if optimizer == "paged_adamw8bit" and n >= 1e5 else 2 * (n + -(-n // 256) * 4)


def kept_per_token(config, s, wide, mask=1):
    """Bytes that autograd keeps of one token in one layer. wide: bytes of a number; mask: of one in dropout's mask."""
    family = FAMILIES[config.family]
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

    norms = 2 * D * 4 + (0 if not family.head_norms else (q + kv) * 4)  # their inputs, in float32
    attention = 4 * q * wide  # queries, keys and values of every head, and the output
    # The output matrix, and those of q, k and v: three, in LLaDA2.x one.
    attention += matrix(q) + matrix(D) * (len(family.attention) - 1)
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
