"""The second-order gradient of theta, through the inner loop.

`test_the_gradient_through_one_step_by_hand` works it out on a model of two numbers. Start there.
Then every kind of phi is checked against finite differences, in float64: theta is moved a little,
and the whole step, inner loop and all, is taken again.
"""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import memdlm
from memdlm import Batch, MemDLM
from runs import read_settings
from settings import Settings, control_settings, settings_from_flags
from test_memdlm import Stack, make_batch, make_settings, make_toy
from test_train import SMALL, read_metrics
from toy.model import rotary


class TwoLogits(Stack):
    """theta is two logits, whatever the input: a matrix W [2, 1] on a hidden state of 1."""

    def __init__(self, theta):
        W = nn.Linear(1, 2, bias=False)
        W.weight.data = torch.tensor(theta)[:, None]
        super().__init__([W], torch.eye(2), mask_id=2)

    def embed(self, ids):
        return torch.ones(*ids.shape, 1)


@pytest.mark.parametrize("order", ["first", "second"])
def test_the_gradient_through_one_step_by_hand(order):
    """Two words a and b. phi is a full delta on the logits: p = softmax(theta + phi).

        theta         a 0     b log 3     p    1/4   3/4
        inner step    b is masked; the gradient by phi is p - onehot(b) = 1/4, -1/4.
                      eta = 2 log 3, so phi_1 = -(log 3) / 2, (log 3) / 2
        outer step    logits -(log 3) / 2, 3 (log 3) / 2: odds of 1 to 9, p 1/10, 9/10. b is masked:
                      the gradient by theta + phi is g = 1/10, -1/10

    First order stops here. Second order: phi_1 moves with theta, too. It is -eta (p - onehot(b)),
    and p's derivative is H = diag(p) - p p^T = 3/16 times 1, -1; -1, 1. So the gradient by theta is
    (1 - eta H) g = (1 - eta 3/8) g = (1 - 3/4 log 3) g, since g is an eigenvector of H with the
    eigenvalue 3/8.
    """
    eta, log3 = 2 * math.log(3), math.log(3)
    net = TwoLogits([0.0, log3])
    s = make_settings(adapter="full", trajectory="anchor_only", clip="none", inner_lr=eta,
                      min_t=1.0, layer_fraction=1.0, order=order)
    one = torch.ones(1, 1, dtype=torch.bool)
    batch = Batch(x0=one.long(), maskable=one, valid=one, seeds=[0], prompt=one.long(),
                  prompt_valid=one)
    loss, record = MemDLM(net, s)(batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-math.log(0.9), rel=1e-5)
    factor = 1 if order == "first" else 1 - 0.75 * log3
    got = net.layers[0].weight.grad[:, 0].tolist()
    assert got == pytest.approx([0.1 * factor, -0.1 * factor], rel=1e-4)


@pytest.fixture
def in_float64(monkeypatch):
    """phi, all losses and the kept angles of positions in float64."""
    draw = memdlm.fresh_phi

    def wide_phi(*arguments):
        return {name: tuple(w.double() for w in pair) for name, pair in draw(*arguments).items()}
    monkeypatch.setattr(memdlm, "fresh_phi", wide_phi)
    rotary.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield
    rotary.cache_clear()  # other tests draw theirs anew


KINDS = [
    {"clip_norm": 0.05}, {"clip_norm": 0.05, "per_sample": True}, {"clip": "none"},
    {"clip": "global", "clip_norm": 0.05, "per_sample": True, "inner_steps": 3},
    {"adapter": "full", "per_sample": True, "clip_norm": 0.05},
    {"scope": "ffn+attn", "layer_fraction": 1.0, "clip_norm": 0.05},
    {"memory_from": "prompt", "trajectory": "cover:4", "clip_norm": 0.05},
]


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_the_gradient_is_that_of_finite_differences(changes, in_float64):
    """Along a random direction in all weights, and for each matrix in one of its own."""
    model, batch = make_toy().double(), make_batch()
    if changes.get("memory_from") == "prompt":  # closed book: the response alone
        batch = replace(batch, x0=batch.x0.masked_fill(~batch.maskable, 1))
    step = MemDLM(model, make_settings(order="second", inner_lr=1.0, **changes))
    weights = dict(model.named_parameters())
    grads = dict(zip(weights, torch.autograd.grad(step(batch)[0], weights.values())))
    first = MemDLM(model, make_settings(inner_lr=1.0, **changes))
    firsts = dict(zip(weights, torch.autograd.grad(first(batch)[0], weights.values())))

    def loss_at(direction, size):
        with torch.no_grad():
            for name, d in direction.items():
                weights[name] += size * d
            loss = float(first(batch)[0])
            for name, d in direction.items():
                weights[name] -= size * d
        return loss

    generator, eps = torch.Generator().manual_seed(0), 1e-6
    everything = {name: torch.randn(w.shape, generator=generator).double()
                  for name, w in weights.items()}
    some = ["embedding.weight", "layers.0.attn.q_proj.weight", "layers.1.attn.v_proj.weight",
            "layers.1.mlp.up_proj.weight", "norm.weight", "lm_head.weight"]
    off = 0.0
    for direction in (everything, *({name: everything[name]} for name in some)):
        slope = (loss_at(direction, eps) - loss_at(direction, -eps)) / (2 * eps)
        exact = sum(float((grads[name] * d).sum()) for name, d in direction.items())
        assert exact == pytest.approx(slope, rel=1e-5, abs=1e-7), list(direction)[:2]
        off += abs(exact - sum(float((firsts[name] * d).sum()) for name, d in direction.items()))
    assert off > 1e-2  # the first order is another gradient


@pytest.mark.parametrize("changes", [{}, {"per_sample": True}, {"memory_from": "prompt"}], ids=str)
def test_the_order_changes_the_gradient_and_nothing_else(changes):
    """phi, losses and records are the same. Where no gradient is asked for, no graph is kept."""
    model, batch = make_toy(), make_batch()
    records = [MemDLM(model, make_settings(order=order, **changes))(batch, report=True)[1]
               for order in ("first", "second")]
    for name in records[0]:
        assert torch.allclose(records[0][name], records[1][name], rtol=1e-5), name
    s, kept = make_settings(order="second", **changes), []
    real = memdlm.upper_layers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memdlm, "upper_layers", lambda *args: kept.append(args[4]) or real(*args))
        with torch.no_grad():
            MemDLM(model, s)(batch)
        assert not any(w.requires_grad for pair in kept[-1].values() for w in pair)
        MemDLM(model, s)(batch)
        assert all(w.requires_grad for pair in kept[-1].values() for w in pair)
    phi, _ = memdlm.adapt(model, s, batch.prompt, batch.prompt_valid, batch.seeds)
    assert not any(w.requires_grad for pair in phi.values() for w in pair)  # inference


@pytest.mark.parametrize("changes, words", [
    ({"model": "x"}, "--order second is for the toy"),
    ({"memory": False}, "--no-memory leaves out"),
    ({"inner_loss": "kl"}, "--order second needs --inner-loss ce"),
    ({"order": "third"}, "it must be one of first, second")], ids=str)
def test_what_has_no_second_order_is_refused(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        Settings(**{"order": "second", **changes})
    assert "\n" not in str(error.value)


def test_its_control_is_a_plain_run():
    s = settings_from_flags({"order": "second"})
    assert s.closed_book and control_settings(s) == control_settings(settings_from_flags({}))


def test_a_run_of_second_order_goes_on_exactly(train_into):
    s = Settings(**{**SMALL, "data": "dictionary", "memory": True, "memory_from": "prompt",
                    "closed_book": True, "per_sample": True, "trajectory": "cover:2", "rank": 4,
                    "inner_lr": 0.3, "order": "second", "lr": 1e-3})
    whole = train_into("whole", s)
    parted = train_into("parted", s, stop_after=3)
    assert read_settings(parted).order == "second"
    train_into("parted", s, resume=True)
    assert (whole / "model.safetensors").read_bytes() == (
        parted / "model.safetensors").read_bytes()
    first = train_into("first", replace(s, order="first"))
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in (whole, first)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)  # the same data and masks
    assert losses[0][1:] != losses[1][1:]
