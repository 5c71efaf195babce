"""Experts: one after the other, and all in one product."""
import pytest
import torch

import backbones.experts as experts_module
from backbones.checkpoint import load_backbone
from backbones.experts import Experts, grouped_linear, stack_weights
from backbones.lora import add_lora
from memdlm import MemDLM
from settings import Settings
from tiny_models import random_batch, tiny_backbone, use_grouped


def gradients(backbone):
    return {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("load_4bit", [False, True])
@pytest.mark.parametrize("name", ["llada-moe", "llada2.1-mini"])
def test_experts_at_once_are_the_experts_one_by_one(name, load_4bit, per_sample, adapter,
                                                    monkeypatch):
    """A whole training step with LoRA and fast weights gives the same losses and gradients.

    Some experts get no token. Their gradients are None one by one, and zero at once.
    """
    backbone = tiny_backbone(name, load_4bit=load_4bit)
    add_lora(backbone, 8, 16.0, 0.0)
    for i, (key, p) in enumerate(sorted(backbone.named_parameters())):
        if "lora_" in key:
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    s = Settings(per_sample=per_sample, rank=8, alpha=8.0, layer_fraction=0.5, adapter=adapter)
    calls = []

    def count_and_multiply(*arguments):
        calls.append(arguments)
        return grouped_linear(*arguments)

    monkeypatch.setattr(experts_module, "grouped_linear", count_and_multiply)

    def train_step(on):
        use_grouped(backbone, on)
        backbone.train().zero_grad()
        loss, record = MemDLM(backbone, s)(random_batch([12, 3, 9], prompt=1))
        loss.backward()
        assert bool(calls) == on
        assert not any("fast" in m.__dict__ for m in backbone.modules())
        return loss.item(), record["inner"], gradients(backbone)

    loss, inner, grads = train_step(False)
    loss_at_once, inner_at_once, grads_at_once = train_step(True)
    assert abs(loss - loss_at_once) < 1e-5
    assert torch.allclose(inner, inner_at_once, atol=1e-5)
    for key, want in grads.items():
        got = grads_at_once[key]
        if want is None:
            assert got.abs().max() == 0, key
        else:
            assert (got - want).norm() <= 1e-5 * want.norm() + 1e-8, key


def test_all_weights_train_with_experts_at_once():
    backbone = tiny_backbone("llada-moe").requires_grad_(True)
    found = []
    for on in (False, True):
        use_grouped(backbone, on)
        backbone.zero_grad()
        MemDLM(backbone, Settings(memory=False))(random_batch([40, 30]))[0].backward()
        found.append(gradients(backbone))
    one_by_one, at_once = found
    for key, want in one_by_one.items():
        assert want is None or (at_once[key] - want).norm() <= 1e-5 * want.norm() + 1e-9, key


def test_weights_put_side_by_side_are_bit_for_bit_those_unpacked_one_by_one():
    from bitsandbytes.functional import dequantize_4bit
    backbone = tiny_backbone("llada-moe", load_4bit=True)
    experts = next(m for m in backbone.modules() if isinstance(m, Experts))
    layers = [expert.up_proj for expert in experts]
    whole = stack_weights(layers, torch.float32)
    for got, layer in zip(whole, layers):
        want = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        assert torch.equal(got, want)


def test_settings_and_loading_choose_the_experts(tiny_models):
    for experts in ("loop", "grouped"):
        backbone = load_backbone(str(tiny_models / "llada-moe"), experts=experts)
        grouped = {m.grouped for m in backbone.modules() if isinstance(m, Experts)}
        assert grouped == {experts == "grouped"}
    with pytest.raises(ValueError, match="multiples of 8"):
        Settings(model="x", experts="grouped", rank=12)
