"""The experts of a layer as stacks: against single experts, sorted and padded, 4-bit, LoRA, φ."""

import pytest
import torch

import backbones.experts as experts_module
from backbones.checkpoint import hub_weights
from backbones.experts import Experts, Stack, draw_kept, product, sort_tokens
from backbones.lora import lora_weights
from memdlm import MemDLM
from settings import Settings
from tiny_models import random_batch, random_lora, tiny_backbone

NAMES = ["llada-moe", "llada2.1-mini"]


def test_tokens_are_sorted_as_in_the_picture():
    """Two tokens, k = 2: token 0 goes to experts 5 and 1, token 1 to experts 1 and 7."""
    chosen = torch.tensor([[5, 1], [1, 7]])
    places = sort_tokens(chosen, 1, 8, padded=False)
    assert places.tokens.tolist() == [0, 1, 0, 1]
    assert places.rows.tolist() == [2, 0, 1, 3]
    assert places.ends.tolist() == [0, 2, 2, 2, 2, 3, 3, 4]
    padded = sort_tokens(chosen, 1, 8, padded=True)  # expert 1 has the most, two tokens
    assert padded.tokens.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert padded.rows.tolist() == [10, 2, 3, 14] and padded.ends is None
    pairs = sort_tokens(chosen, 1, 8, padded=False, unit=2)
    assert pairs.tokens.tolist() == [0, 1, 0, 0, 1, 0] and pairs.rows.tolist() == [2, 0, 1, 4]
    assert pairs.ends.tolist() == [0, 2, 2, 2, 2, 4, 4, 6]


def test_a_cpu_has_whole_units_of_rows_in_bfloat16_where_there_are_many():
    x, chosen = torch.zeros(2, 256, 8, dtype=torch.bfloat16), torch.zeros(512, 4)
    unit = experts_module.row_unit
    assert unit(x, chosen, 8) == 32 and unit(x, chosen, 9) == 1 and unit(x.float(), chosen, 8) == 1


@pytest.mark.parametrize("padded, unit", [(False, 1), (False, 4), (True, 1)])
@pytest.mark.parametrize("width, out", [(16, 8), (5, 3)])
def test_a_product_takes_each_row_through_the_matrix_of_its_expert_and_sample(padded, unit, width,
                                                                              out):
    """Three samples of four tokens; experts 0 and 3 are idle. With gradients."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor([[1, 2], [2, 4], [4, 1], [5, 2]] * 3)
    x = torch.randn(12, width, generator=generator, requires_grad=True)
    W = torch.randn(6, out, width, generator=generator, requires_grad=True)
    own = torch.randn(6 * 3, out, width, generator=generator, requires_grad=True)
    places = sort_tokens(chosen, 3, 6, padded, unit=unit)
    for weights in (W, own):
        got = product(x[places.tokens], weights, places)[places.rows].view(12, 2, out)
        which = chosen if weights is W else chosen * 3 + torch.arange(12)[:, None] // 4
        want = torch.einsum("ncoi,ni->nco", weights[which], x)
        torch.testing.assert_close(got, want)
        grads = torch.autograd.grad(got.sin().sum(), (x, weights))
        for g, expected in zip(grads, torch.autograd.grad(want.sin().sum(), (x, weights))):
            torch.testing.assert_close(g, expected)


def take_step(backbone, s, batch):
    """One training step -> loss, inner losses and every gradient."""
    backbone.train().zero_grad()
    loss, record = MemDLM(backbone, s)(batch)
    loss.backward()
    grads = {n: p.grad for n, p in backbone.named_parameters() if p.requires_grad}
    return loss.item(), record.get("inner"), grads


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("load_4bit", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_more_rows_is_that_with_sorted_ones(name, load_4bit, per_sample, adapter,
                                                        monkeypatch):
    """Loss, inner losses and every gradient of a step with LoRA and φ. Some experts are idle."""
    backbone = random_lora(tiny_backbone(name, load_4bit=load_4bit))
    s = Settings(per_sample=per_sample, rank=8, alpha=8.0, layer_fraction=0.5, adapter=adapter)
    seen = []
    for padded, unit in ((False, 1), (True, 1), (False, 4)):
        monkeypatch.setattr(experts_module, "pads", lambda x: padded)
        monkeypatch.setattr(experts_module, "row_unit", lambda x, chosen, experts: unit)
        seen.append(take_step(backbone, s, random_batch([12, 3, 9], prompt=1)))
    loss, inner, grads = seen[0]
    for other_loss, other_inner, other_grads in seen[1:]:
        assert abs(loss - other_loss) < 1e-5 and torch.allclose(inner, other_inner, atol=1e-5)
        for key, want in grads.items():
            assert (other_grads[key] - want).norm() <= 1e-5 * want.norm() + 1e-8, key
    stacks = [key for key in grads if ".experts." in key]
    assert any((grads[key].flatten(1).norm(dim=1) == 0).any() for key in stacks), "none is idle"


@pytest.mark.parametrize("load_4bit", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_lora_on_a_stack_is_one_on_each_expert(name, load_4bit):
    """W x + (alpha / r) B A x, with the weights under the names that a checkpoint gives them."""
    backbone = random_lora(tiny_backbone(name, load_4bit=load_4bit)).eval()
    path, stack = next((n, m) for n, m in backbone.core.named_modules() if isinstance(m, Stack))
    x = torch.randn(24, stack.in_features, generator=torch.Generator().manual_seed(0))
    chosen = torch.arange(24)[:, None] % 7  # expert 7 is idle
    places = sort_tokens(chosen, 1, 8, padded=False)
    got = stack(x[places.tokens], places)[places.rows]
    lora, unpacked = lora_weights(backbone), stack.unpacked(torch.float32)
    for row, x_row, expert in zip(got, x, chosen[:, 0].tolist()):
        key = f"base_model.model.{stack.names(path)[expert]}.lora_"
        A, B = (lora[f"{key}{letter}.weight"] for letter in "AB")
        want = unpacked[expert] @ x_row + 2.0 * B @ (A @ x_row)
        torch.testing.assert_close(row, want, rtol=1e-4, atol=1e-5)
    if not load_4bit:
        whole = hub_weights(backbone.core)
        assert all(torch.equal(whole[f"{one}.weight"], W)
                   for one, W in zip(stack.names(path), unpacked))


def test_an_unpacked_stack_is_close_to_each_matrix_unpacked_alone():
    """The codes are the same. The scales are rounded in blocks that reach over several experts."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    stack = Stack(3, 64, 128)
    W = torch.randn(3, 128, 64, generator=torch.Generator().manual_seed(0))
    stack.weight = torch.nn.Parameter(stack.quantise(W), requires_grad=False)
    whole = stack.unpacked(torch.float32)
    for got, alone in zip(whole, W):
        one = dequantize_4bit(*quantize_4bit(alone, compress_statistics=True, quant_type="nf4"))
        assert torch.equal(got == 0, one == 0) and (got - one).norm() < 5e-3 * one.norm()
    assert stack.weight.dtype == torch.uint8 and stack.weight.numel() == W.numel() // 2


def test_dropout_acts_on_the_input_of_a_stacks_lora_in_training_alone():
    stack = Stack(2, 64, 8)
    stack.weight.data.zero_()
    stack.weight.requires_grad_(False)
    stack.add_lora(4, 4.0, dropout=0.5)
    stack.lora_B.data.fill_(1.0)
    places = sort_tokens(torch.tensor([[0], [1], [1]]), 1, 2, padded=False)
    x = torch.ones(3, 64)
    plain = stack.eval()(x, places)
    torch.manual_seed(0)
    trained = stack.train()(x, places)
    torch.manual_seed(0)
    dropped = 2 * x * draw_kept(x, 0.5)
    assert 0 < (dropped == 0).sum() < dropped.numel()
    low = torch.stack([stack.lora_A[e] @ row for e, row in zip((0, 1, 1), dropped)])
    torch.testing.assert_close(trained, low.sum(1, keepdim=True).expand(-1, 8))
    assert not torch.equal(plain, trained) and torch.equal(stack.eval()(x, places), plain)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_a_number_is_dropped_as_often_as_was_asked_for(dropout):
    """Alone and beside its neighbour, which comes from the same draw of 64 bits."""
    torch.manual_seed(0)
    x = torch.ones(1001, 999)
    kept = draw_kept(x, dropout)
    torch.manual_seed(0)
    assert kept.dtype == torch.bool and torch.equal(kept, draw_kept(x, dropout))
    pairs = kept[:, 1:] & kept[:, :-1]
    for got, want in ((kept, 1 - dropout), (pairs, (1 - dropout) ** 2)):
        spread = (want * (1 - want) / got.numel()) ** 0.5
        assert abs(got.double().mean().item() - want) < 5 * spread


def test_dropout_at_its_ends():
    x = torch.ones(200, 1000)
    assert not draw_kept(x, 1.0).any()
    assert draw_kept(x, 1e-9).float().mean() > 0.9998


def test_all_weights_of_stacks_train(monkeypatch):
    backbone = tiny_backbone("llada-moe").requires_grad_(True)
    seen = []
    for padded in (False, True):
        monkeypatch.setattr(experts_module, "pads", lambda x: padded)
        seen.append(take_step(backbone, Settings(memory=False), random_batch([40, 30]))[2])
    for key, want in seen[0].items():
        assert want.abs().sum() > 0 and (seen[1][key] - want).norm() <= 1e-5 * want.norm(), key


def test_the_number_of_products_does_not_grow_with_the_experts(monkeypatch):
    calls = []
    monkeypatch.setattr(experts_module, "product", lambda *a: calls.append(1) or product(*a))
    for count in (2, 16):
        calls.clear()
        experts = Experts(count, 8, 8)
        for p in experts.parameters():
            torch.nn.init.normal_(p)
        experts(torch.randn(1, 5, 8), torch.ones(5, 2), torch.tensor([[0, 1]] * 5), {})
        assert len(calls) == 3


def test_padding_at_most_doubles_many_rows(monkeypatch):
    """4 experts, 100 tokens with one choice. All choose the first, then they spread evenly."""
    for few, chosen, rows in ((400, torch.zeros(100, 1), 400), (399, torch.zeros(100, 1), 100),
                              (0, torch.arange(100)[:, None] % 4, 100)):
        monkeypatch.setattr(experts_module, "FEW_ROWS", few)
        places = sort_tokens(chosen.long(), 1, 4, True)
        assert len(places.tokens) == rows and (places.ends is None) == (few != 399)
