"""The memory plan, and optimisers that round."""
from dataclasses import replace

import pytest
import torch
from torch import nn

from backbones.checkpoint import load_backbone
from backbones.families import TINY, translate
from backbones.lora import (add_lora, lora_weights)
from backbones.plan import kept_per_token, memory_plan, optimizer_bytes
import memdlm
import train
from settings import Settings
from tiny_models import NAMES


def saved_bytes(function):
    """What autograd keeps of a forward pass, each storage once, without parameters."""
    seen = {}

    def pack(x):
        if not isinstance(x, nn.Parameter):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function()
    return sum(seen.values()), out


@pytest.mark.parametrize("lora_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_plans_activations_are_those_that_autograd_keeps(name, lora_dtype):
    """One layer, 256 tokens wide enough that nothing but the counted tensors matters."""
    raw = TINY[name] | {"mask_token_id": 301, "eos_token_id": 300}
    raw |= {
        k: 4 * raw[k]
        for k in ("hidden_size", "d_model", "expert_intermediate_size", "moe_intermediate_size",
                  "mlp_hidden_size", "head_dim")
        if k in raw
    }
    backbone = load_backbone(raw, random=True, dtype="bfloat16", device="cpu", load_4bit=True)
    s = Settings(model="x", load_4bit=True, lora_rank=4, lora_dtype=lora_dtype, dtype="bfloat16",
                       optimizer="adamw8bit")
    add_lora(backbone, 4, 8.0, s.lora_dropout, dtype=lora_dtype)
    backbone.train()
    h = torch.randn(1, 256, backbone.config.width, dtype=torch.bfloat16, requires_grad=True)
    valid = torch.ones(1, 256, dtype=torch.bool)
    kept, _ = saved_bytes(lambda: backbone.blocks(h, valid, 2, 3))
    # On a CPU dropout's mask has the precision of its input.
    planned = 256 * kept_per_token(backbone.config, s, 2, mask_of=lambda grain: grain)
    assert 0.95 < kept / planned < 1.08, (kept, planned)


def test_the_plan_counts_what_is_loaded():
    raw = TINY["llada-moe"] | {"mask_token_id": 301, "eos_token_id": 300}
    backbone = load_backbone(raw, random=True, dtype="bfloat16", device="cpu", load_4bit=True)
    s = Settings(model="x", load_4bit=True, dtype="bfloat16", lora_rank=4, rank=4)
    parts = [size for _, size in memory_plan(backbone.config, s, 100)]
    held = sum(p.numel() * p.element_size() for p in backbone.parameters())
    for m in backbone.modules():
        q = getattr(getattr(m, "weight", None), "quant_state", getattr(m, "quant_state", None))
        if q is not None:
            held += q.absmax.numel() * q.absmax.element_size() + q.state2.absmax.numel(
            ) * q.state2.absmax.element_size()
    assert abs(parts[0] - held) / held < 0.02
    add_lora(backbone, 4, 8.0, 0.0)
    lora = lora_weights(backbone).values()
    assert parts[1] == parts[2] == sum(4 * p.numel() for p in lora) and parts[3] == 2 * parts[1]
    for optimizer in ("adamw8bit", "paged_adamw8bit"):  # what bitsandbytes really makes
        for n in (4095, 4096, 65_600, 99_999):
            p = nn.Parameter(torch.ones(n))
            p.grad = torch.ones(n)
            made = train.make_optimizer(replace(s, optimizer=optimizer), [p])
            made.step()
            held = sum(v.numel() * v.element_size()
                       for k, v in made.state[p].items()
                       if torch.is_tensor(v) and "qmap" not in k)
            assert held == optimizer_bytes(optimizer, n, 4)
    phi = memdlm.fresh_phi(backbone, s, [0])
    assert parts[4] == 3 * sum(4 * w.numel() for pair in phi.values() for w in pair)


def test_rounding_at_random_is_right_on_average_and_keeps_what_bfloat16_can_hold():
    torch.manual_seed(0)
    x = torch.tensor([0.0, 1.0, -3.5, 2.0 ** -20, 1e30])
    exact = x.to(torch.bfloat16).float()
    assert all(
        torch.equal(train.round_at_random(exact), exact.to(torch.bfloat16)) for _ in range(20))
    x = torch.full((200_000,), 0.02 + 2e-5)
    rounded = train.round_at_random(x).float()
    assert len(rounded.unique()) == 2 and abs(rounded.mean() - x[0]) < 2e-6
    torch.testing.assert_close(train.round_at_random(-x).float().mean(), -x[0], rtol=1e-4, atol=0)


def test_small_updates_of_a_bfloat16_lora_are_not_lost():
    """A thousand steps of 2e-5 on weights of 0.02, where bfloat16's neighbours are 1.2e-4 apart."""
    import bitsandbytes as bnb
    s, moved = Settings(model="x", lora_dtype="bfloat16", optimizer="adamw8bit", lr=2e-5), {}
    for name, make in (("ours", lambda p: train.make_optimizer(s, p)),
                       ("plain", lambda p: bnb.optim.AdamW8bit(p, lr=2e-5, weight_decay=0.0))):
        torch.manual_seed(0)
        p = nn.Parameter(torch.full((8192,), 0.02, dtype=torch.bfloat16))
        optimizer, start = make([p]), 0.02
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[name] = float(start - p.detach().float().mean())
    assert abs(moved["ours"] - 200 * 2e-5) < 0.1 * 200 * 2e-5 and abs(
        moved["plain"]) < 0.02 * 200 * 2e-5


def plan_of(length=100, **changes):
    """Bytes of phi, of the upper and the lower layers, and of logits; and of a token in a layer."""
    s = Settings(**{**dict(model="x", dtype="float32", batch=2, rank=4, lora_rank=4), **changes})
    config = translate(TINY["llada-8b"])
    parts = memory_plan(config, s, length)
    sizes = {word: size for what, size in parts for word in
             ("successor", "with phi", "below", "logits") if word in what}
    return [*sizes.values(), kept_per_token(config, s, 4)]


def test_the_plan_by_hand():
    """4 layers of width 64 and inner width 128, two samples of 100 tokens, numbers of 4 bytes.

    phi has rank 4 on three matrices of one layer: 4 * (64 + 128) numbers for each. It stands there
    with its gradient and its successor, and once for each sample that has its own.
    """
    matrix = 4 * (64 + 128) * 4
    phi, upper, lower, logits, layer = plan_of()
    assert phi == 3 * 3 * matrix
    assert plan_of(per_sample=True)[0] == plan_of(memory_from="prompt")[0] == 2 * phi
    assert plan_of(memory=False)[0] == 0 and plan_of(layer_fraction=0.5)[0] == 2 * phi

    # The upper layer keeps what any layer keeps, and for phi the inputs of its matrices.
    assert upper == 200 * layer + 200 * (64 + 128) * 4
    assert plan_of(memory=False)[1] == 200 * layer
    # Below, each of three layers keeps its input, and one at a time is made again.
    assert lower == 3 * 200 * 64 * 4 + 200 * layer
    assert plan_of(checkpointing=False)[2] == 3 * 200 * layer
    # The logits of 200 tokens and 320 words, four times in 4 bytes; never more than a chunk.
    assert logits == 200 * 320 * 16 and plan_of(10 ** 6)[3] == 2 ** 26 * 16
