"""The memory of a training run, and of an answer, counted before anything is loaded.

Weights, LoRA, gradients, optimiser and phi are counted exactly. Activations are summed tensor by
tensor from what autograd keeps. The last line is an allowance.
"""
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

import memdlm
from backbones.backbone import LOGITS, Backbone, build_network
from backbones.checkpoint import choose_dtype, human_count, quantisable
from backbones.experts import CPU_ROWS, Stack, fill_rows, most_rows
from backbones.families import FAMILIES
from backbones.lora import lora_targets

BYTES = {"float32": 4, "bfloat16": 2}  # of a number
# nf4: 4 bits for a weight, a byte for the scale of 64 weights, a float for the scale of 256 scales.
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8


def memory_plan(config, s, length, device="cuda"):
    """[(what, bytes)] of a training run with settings s, at `length` tokens a sample.

    device: cuda, for one GPU, or cpu.
    """
    network, wide = empty_network(config), number_bytes(config, s, device)
    parts = [plan_weights(network, config, s, wide), *plan_training(network, config, s, wide)]
    phi = phi_bytes(network, config, s)
    return parts + plan_activations(config, s, length, wide, device, phi)


def answer_plan(config, s, length, device="cuda"):
    """The same of an answer: a prompt of `length` tokens is adapted to, then decoded from."""
    network, wide = empty_network(config), number_bytes(config, s, device)
    lora = sum(lora_sizes(network, config, s)) * BYTES[s.lora_dtype] if s.lora else 0
    one = replace(s, batch=1)
    upper = config.layers - memdlm.first_fast_layer(config.layers, s.layer_fraction)
    extra = padding(config, 1, length, wide, device)
    layer = kept_per_token(config, None, wide, extra=extra)
    inputs = kept_by_phi(config, None, wide, extra)
    passing = plan_passing(config, s, length, wide, device, extra)
    # Of the layers below, which have no gradient, one at a time is there. With memory they see two
    # states of the prompt in one pass, before those with phi see one.
    layers = length * (layer + s.memory * upper * (layer + inputs))
    both = 2 * length * layer + passing_of_layer(config, s, 2 * length, wide, extra)
    layers = max(layers, s.memory * (both - passing[1]))
    return [plan_weights(network, config, s, wide), ("LoRA", lora),
            ("phi, its gradient and its successor", 3 * phi_bytes(network, config, one)),
            *plan_copies(config, s, wide, upper),
            (f"a prompt of {length} tokens: activations", layers),
            passing, allowance(device)]


@lru_cache(maxsize=1)  # a plan of training and one of an answer ask for the same
def empty_network(config):
    with torch.device("meta"):
        return build_network(config)


def number_bytes(config, s, device):
    """Bytes of a number of the model, as checkpoint.choose_dtype has it."""
    dtype = choose_dtype(s.dtype, {"dtype": config.stored}, torch.device(device))
    return dtype.itemsize


def plan_weights(network, config, s, wide):
    """The weights. wide: bytes of a number."""
    small = quantisable(network, config) if s.load_4bit else {}
    in_4bit = sum(module.weight.numel() for module in small.values())
    total, what = sum(p.numel() for p in network.parameters()), "weights"
    if in_4bit:
        what += f", {human_count(in_4bit)} of {human_count(total)} in 4-bit"
    return what, (total - in_4bit) * wide + in_4bit * NF4


def plan_training(network, config, s, wide):
    """What is trained, its gradients, and the optimiser."""
    if s.lora:
        trained, grain = lora_sizes(network, config, s), BYTES[s.lora_dtype]
        parts = [(f"LoRA, {human_count(sum(trained))}", sum(trained) * grain)]
    else:
        trained, grain = [p.numel() for p in network.parameters()], wide
        parts = [(f"trained weights (the same as above), {human_count(sum(trained))}", 0)]
    state = sum(optimizer_bytes(s.optimizer, n, grain) for n in trained)
    return parts + [("their gradients", sum(trained) * grain),
                    (f"optimiser, {s.optimizer}", state)]


def lora_sizes(network, config, s):
    """How many numbers each tensor of the LoRA has: an A and a B for each adapted layer."""
    targets = lora_targets(config, s.lora_scope, s.lora_router)
    sizes = []
    for name, module in network.named_modules():
        is_head = name == FAMILIES[config.family].head
        adaptable = isinstance(module, (nn.Linear, Stack)) and not is_head
        if adaptable and name.rpartition(".")[2] in targets:
            rows = s.lora_rank * getattr(module, "experts", 1)
            sizes += [rows * module.in_features, rows * module.out_features]
    return sizes


def phi_bytes(network, config, s):
    """Bytes of phi, 0 without memory."""
    if not s.memory:
        return 0
    first = memdlm.first_fast_layer(config.layers, s.layer_fraction)
    count = s.batch if s.per_sample or s.memory_from == "prompt" else 1
    numbers = 0
    for module in Backbone(network, config).matrices(first, s.scope).values():
        if s.adapter == "lora":
            each = s.rank * (module.in_features + module.out_features)
            numbers += each * getattr(module, "experts", 1)
        else:
            numbers += module.weight.numel()
    return numbers * 4 * count


def plan_activations(config, s, length, wide, device, phi):
    """The most that is there at a time besides weights and optimiser: in a step of the inner loop.

    phi and its gradient, what autograd keeps of the layers with phi, and what the outer step will
    need of those below. Later there is less: phi is a constant, and when a layer below is computed
    again, those above are done and have left their room. The last layer computes what is read of it
    alone; here that is all, as where nearly every token is masked.
    """
    tokens = s.batch * length * (2 if s.objective == "own" else 1)  # own: two passes at a time
    extra = padding(config, s.batch, length, wide, device)
    first = memdlm.first_fast_layer(config.layers, s.layer_fraction)
    upper = config.layers - first

    layer = tokens * kept_per_token(config, s, wide, extra)
    layer_with_phi = layer + tokens * kept_by_phi(config, s, wide, extra) * s.memory
    lower, how = first * layer, ""
    if s.checkpointing:
        lower, how = first * tokens * config.width * wide, ": their inputs"
    uneven = f", experts' rows padded to {extra:.3g} times theirs" if extra > 1 else ""
    # phi's successor is made when the activations are gone.
    return [
        ("phi and its gradient", 2 * phi + max(0, phi - upper * layer_with_phi)),
        (f"activations of the {upper} layers with phi, {length} tokens x {s.batch}{uneven}",
         upper * layer_with_phi),
        (f"activations of the layers below{how}", lower),
        *plan_copies(config, s, wide, upper + (0 if s.checkpointing else first)),
        plan_passing(config, s, tokens, wide, device, extra),
        allowance(device)]


def padding(config, samples, length, wide, device):
    """How many times as many rows as the router sends the experts are computed.

    On a CPU in bfloat16 as `fill_rows` has it, on average. On GPUs with a fast grouped product no
    more. Elsewhere as many as `sort_tokens` allows.
    """
    rows = samples * length * config.top_k
    if not config.experts:
        return 1
    if device == "cpu":
        if wide != 2 or not fill_rows(rows, config.experts, samples):
            return 1
        return 1 + config.experts * samples * CPU_ROWS / 2 / rows
    if wide == 2 and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        return 1
    return min(most_rows(rows), config.experts * samples * length) / rows


def plan_passing(config, s, tokens, wide, device, extra):
    """What comes and goes: the larger of what a layer and what a chunk of logits need meanwhile."""
    layer = passing_of_layer(config, s, tokens, wide, extra)
    # A chunk is there in the model's precision, in float32, as log-softmax and as its gradient.
    logits = min(chunk_of_logits(s, device), tokens * config.vocab_size) * (wide + 12)
    if layer > logits:
        return "what comes and goes while a layer is computed", layer
    return "a chunk of logits, in four forms", logits


def passing_of_layer(config, s, tokens, wide, extra):
    """Bytes that a layer needs while it is computed, besides what autograd keeps."""
    if not config.experts:
        return tokens * 4 * max(config.ffn, config.width) * wide
    # A product unpacks the 4 bits of one stack. Of the last product there are two terms, their sum,
    # and its rows in the tokens' order.
    stack = config.experts * config.expert_ffn * config.width * wide * s.load_4bit
    return stack + tokens * config.top_k * (3 * extra + 1) * config.width * wide


def plan_copies(config, s, wide, layers):
    """A LoRA of stacks in float32 is copied in the model's precision.

    The copy stays until the backward pass of its layer. `layers` layers are kept at a time.
    """
    if not (config.experts and s.lora and s.lora_scope == "all") or BYTES[s.lora_dtype] == wide:
        return []
    each = s.lora_rank * (config.width + config.expert_ffn)
    return [("the experts' LoRA in the model's precision",
             3 * config.experts * each * wide * layers)]


def chunk_of_logits(s, device):
    """Numbers of the largest tensor of logits; see Backbone.per_row."""
    return LOGITS if device == "cuda" or not s.lora else LOGITS // 8


def allowance(device):
    own = "CUDA's own" if device == "cuda" else "Python and its libraries"
    return f"{own}, and what fragments", 1.0 * 2**30


def optimizer_bytes(optimizer, n, grain):
    """Bytes on the GPU of the two moments of a tensor of n numbers. grain: bytes of a number."""
    if optimizer == "adamw":
        return 2 * n * grain
    if n < 4096:  # bitsandbytes keeps small tensors in float32 ...
        return 2 * n * 4
    if optimizer == "paged_adamw8bit" and n >= 1e5:  # ... and pages only large ones to the host
        return 0
    return 2 * (n + -(-n // 256) * 4)


def kept_per_token(config, s, wide, extra=1):
    """Bytes that autograd keeps of one token in one layer.

    s: None where nothing of the model is trained. wide: bytes of a number. extra: see `padding`.
    """
    family = FAMILIES[config.family]
    D, q, kv = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    grain = BYTES[s.lora_dtype] if s else 0

    def input_of_matrix(width, grain=grain, adapted=True):
        # A frozen matrix keeps nothing of its input. A LoRA keeps what dropout left of it, in its
        # own precision, and of dropout's mask a byte for a number.
        if s and not s.lora:
            return width * wide
        if not s or not adapted:
            return 0
        return width * (grain + (s.lora_dropout > 0))

    adapted = s and s.lora_scope == "all"

    def feed_forward(inner):
        # Of silu(gate) * up: both factors, and what silu was applied to.
        inputs = 2 * input_of_matrix(D, grain, adapted) + input_of_matrix(inner, grain, adapted)
        return 3 * inner * wide + inputs

    norms = 2 * D * 4 + ((q + kv) * 4 if family.head_norms else 0)  # their inputs, in float32
    attention = 4 * q * wide  # queries, keys and values of every head, and the output
    # The inputs of the output's matrix and of those before: three, or one in LLaDA2.x.
    attention += input_of_matrix(q) + input_of_matrix(D) * (len(family.attention) - 1)
    if not config.experts:
        return norms + attention + feed_forward(config.ffn)
    # The LoRA of a stack of experts computes in the model's precision. It keeps its input, which
    # two stacks share, and dropout's mask.
    inner = config.expert_ffn
    inputs = D + inner if s and (adapted or not s.lora) else 0
    masks = 2 * D + inner if s and s.lora and adapted and s.lora_dropout else 0
    routed = config.top_k * (extra * ((3 * inner + inputs) * wide + masks) + D * wide)
    shared = feed_forward(config.shared) if config.shared else 0
    return norms + attention + routed + shared


def kept_by_phi(config, s, wide, extra=1):
    """Bytes per token and layer that phi's gradient needs besides: the inputs of its matrices.

    s: as in `kept_per_token`. The inputs of stacks are kept for their LoRA already, if they have
    one.
    """
    if not config.experts:
        return (config.width + config.ffn) * wide
    shared = config.width + config.shared if config.shared else 0
    has_lora = s and s.lora and s.lora_scope == "all"
    routed = 0 if has_lora else config.top_k * extra * (config.width + config.expert_ffn)
    return (routed + shared) * wide


def plan_text(parts, room=None, device="cuda", title="memory planned"):
    """The plan as lines, and what to change if it does not fit into `room` bytes."""
    total = sum(size for _, size in parts)
    lines = [f"{title}:"]
    lines += [f"  {size / 2**30:7.2f} GiB  {what}" for what, size in [*parts, ("together", total)]]
    if room is not None and total > room:
        which = "this GPU" if torch.cuda.is_available() else "such a GPU"
        lines.append(
            f"  more than the {room / 2**30:.1f} GiB of "
            f"{'this machine' if device == 'cpu' else which}. What helps, in this order: "
            "--load-4bit, --checkpointing, --batch 1 with more --accumulate, --optimizer "
            "adamw8bit, --lora-dtype bfloat16 with it, --max-length 2048, --lora-rank 16, "
            "--lora-scope attention")
    elif room is not None:
        lines.append(f"  fits into {room / 2**30:.1f} GiB")
    return "\n".join(lines)
