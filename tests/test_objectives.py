"""The outer objectives besides the paper's, each by hand on a few tokens."""
import math
from dataclasses import replace

import pytest
import torch

import memdlm
import objectives
import train
from memdlm import MemDLM
from objectives import OBJECTIVES, BellShapedT, OwnPredictions, PlannerWeights
from runs import build, open_run, read_settings
from settings import Settings
from test_memdlm import MASK, SEEDS, gradients_of, make_batch, make_settings, make_toy
from test_train import SMALL


class Probabilities(PlannerWeights):
    """A model whose right tokens have these probabilities at the masks of a sample [B, L]."""

    def __init__(self, probabilities):
        super().__init__(make_toy(), make_settings(memory=False))
        self.nll = -torch.tensor(probabilities).log()


def test_planner_weights_of_three_tokens():
    """Two samples: three masks with the right tokens' probabilities .6, .3, .1, and none at all.

    t = 1/2, 4 maskable tokens: the loss is 2 / 4 (1.6 * -log .6 + 1.3 * -log .3 + 1.1 * -log .1).
    """
    model = Probabilities([[1.0, 0.6, 0.3, 0.1], [1.0, 1.0, 1.0, 1.0]])
    masked = torch.tensor([[False, True, True, True], [False] * 4])
    nll = (model.nll * masked).requires_grad_()
    batch = make_batch(((1, 3), (3, 1)))
    t = torch.tensor([0.5, 0.3])
    loss = model.outer_loss(nll, t, batch, masked)
    want = sum((1 + p) * -math.log(p) for p in (0.6, 0.3, 0.1)) * 2 / 4
    assert float(loss.detach()) == pytest.approx(want, rel=1e-6)
    # The weights are constants: the gradient by -log p is the factor, over t and tokens.
    grad, = torch.autograd.grad(loss, nll)
    assert grad[0].tolist() == pytest.approx([0.5, 0.8, 0.65, 0.55])
    assert torch.isfinite(grad).all()
    plain = memdlm.mdlm_loss(nll, t, batch.maskable)
    assert torch.equal(model.eval().outer_loss(nll, t, batch, masked), plain)


@pytest.mark.parametrize("memory", [False, True])
def test_planner_weights_of_a_whole_step(memory):
    """By brute force: the factor of each token from the plain step's losses."""
    model, batch = make_toy(), make_batch()
    s, seen = make_settings(memory=memory, per_sample=True), {}

    class Watching(MemDLM):
        def outer_loss(self, nll, t, batch, masked):
            seen.update(nll=nll, t=t, masked=masked)
            return super().outer_loss(nll, t, batch, masked)
    plain, record = Watching(model, s)(batch)
    want = 0.0
    for nll, t, masked in zip(seen["nll"], seen["t"], seen["masked"]):
        p = (-nll[masked].detach()).exp().tolist()
        want = want + sum((1 + q / sum(p)) * x for q, x in zip(p, nll[masked])) / t
    want = want / batch.maskable.sum()
    loss, own_record = PlannerWeights(model, s)(batch)
    assert torch.allclose(loss, want, rtol=1e-5) and loss > plain
    assert own_record["ce"] == record["ce"]  # what is reported stays nats per masked token
    # The weights have no gradient: the second loss is a fresh graph with the factors as numbers.
    factors = torch.zeros_like(seen["nll"])
    for b, masked in enumerate(seen["masked"]):
        p = (-seen["nll"][b][masked].detach()).exp()
        factors[b][masked] = 1 + p / p.sum()
    Watching(model, s)(batch)
    fixed = memdlm.mdlm_loss(seen["nll"] * factors, seen["t"], batch.maskable)
    for got, g in zip(gradients_of(loss, model), gradients_of(fixed, model)):
        assert torch.allclose(got, g, rtol=1e-4, atol=1e-6)


def test_own_predictions_are_two_plain_passes_by_hand():
    """The anchor, then the anchor with every mask filled by the likeliest token; no mask token."""
    model, batch, s = make_toy(), make_batch(), make_settings(memory=False)
    t = s.min_t + (1 - s.min_t) * memdlm.uniform(SEEDS, "t", 1)[:, 0]
    u = memdlm.uniform(SEEDS, "anchor", batch.x0.shape[1])
    xt, masked = memdlm.corrupt(batch.x0, batch.maskable, t, u, MASK)

    def logits(x):
        return model.head(model.blocks(model.embed(x), batch.valid, 0, None))
    with torch.no_grad():
        likeliest = logits(xt)
        likeliest[..., MASK] = -math.inf
        guess = torch.where(masked, likeliest.argmax(-1), xt)
    assert (guess != batch.x0)[masked].any() and not (guess == MASK).any()
    want, n = 0.0, int(batch.maskable.sum())
    for x, where in ((xt, masked), (guess, batch.maskable)):
        log_p = logits(x).log_softmax(-1)
        for b in range(len(x)):
            for i in where[b].nonzero()[:, 0].tolist():
                want = want - log_p[b, i, batch.x0[b, i]] / t[b] / n
    own = OwnPredictions(model, s)
    loss, record = own(batch)
    assert torch.allclose(loss, want, rtol=1e-5)
    for got, g in zip(gradients_of(loss, model), gradients_of(want, model)):
        assert torch.allclose(got, g, rtol=1e-4, atol=1e-5)
    plain, plain_record = MemDLM(model, s)(batch)
    assert record["ce"] == plain_record["ce"]
    assert torch.equal(own.eval()(batch)[0], plain)


def test_the_bell_has_its_density_and_grows_with_the_plain_t():
    bell = BellShapedT(make_toy(), make_settings(memory=False, min_t=1e-9))
    u = torch.linspace(0, 1, 100_001)
    t = bell.noise_level(u)
    assert (t.diff() > 0).float().mean() > 0.999 and t[0] < 1e-3 and t[-1] > 0.999
    # The share of t below a level is the integral of 6 t (1 - t); the most at one half.
    for level in (0.1, 0.25, 0.5, 0.8, 0.95):
        share = float((t < level).float().mean())
        assert share == pytest.approx(3 * level**2 - 2 * level**3, abs=1e-4)
    table = [round(float(bell.noise_level(torch.tensor(x))), 3) for x in (.1, .3, .5, .7, .9)]
    assert table == [0.196, 0.363, 0.5, 0.637, 0.804]  # as the docstring has them
    assert torch.equal(bell.eval().noise_level(u), MemDLM.noise_level(bell, u))


def test_the_bell_masks_by_its_own_t_and_weighs_by_it():
    model, batch, s = make_toy(), make_batch(), make_settings(memory=False)
    u = memdlm.uniform(SEEDS, "t", 1)[:, 0]
    t = s.min_t + (1 - s.min_t) * (0.5 - (torch.asin(1 - 2 * u) / 3).sin())
    xt, masked = memdlm.corrupt(batch.x0, batch.maskable, t,
                                memdlm.uniform(SEEDS, "anchor", batch.x0.shape[1]), MASK)
    top = model.blocks(model.embed(xt), batch.valid, 0, None)
    nll = memdlm.token_nll(model, top, batch.x0, masked)
    want = sum(nll[b].sum() / t[b] for b in range(len(t))) / batch.maskable.sum()
    loss, record = BellShapedT(model, s)(batch)
    assert torch.allclose(loss, want, rtol=1e-5) and record["masked"] == masked.sum()


# ---- The setting --------------------------------------------------------------------------------

def test_the_setting_names_the_classes():
    field = Settings.__dataclass_fields__["objective"]
    assert field.metadata["choices"] == list(OBJECTIVES) and field.default == "mdlm"
    for name, kind in OBJECTIVES.items():
        s = Settings(objective=name, memory=False, width=16, layers=1, heads=2)
        assert type(build(s)[1]) is kind
        assert f"    {name:8}" in objectives.__doc__
    with pytest.raises(ValueError, match="--objective own is a baseline .* --no-memory"):
        Settings(objective="own")


@pytest.mark.parametrize("name", ["papl", "own", "bell"])
def test_a_run_with_an_objective_goes_on_exactly_and_is_paired(train_into, name):
    s = Settings(**SMALL, objective=name)
    whole, parted = train_into("whole", s), train_into("parted", s, stop_after=3)
    assert read_settings(parted).objective == name
    train_into("parted", s, resume=True)
    assert (whole / "model.safetensors").read_bytes() == (
        parted / "model.safetensors").read_bytes()
    # The same samples, initial weights and seeds of the masks as plain MDLM.
    data, model = build(s)
    plain_data, plain = build(replace(s, objective="mdlm"))
    for a, b in zip(model.parameters(), plain.parameters()):
        assert torch.equal(a, b)
    one, two = (train.make_batch(s, source, 1) for source in (data, plain_data))
    assert torch.equal(one.x0, two.x0) and one.seeds == two.seeds
    # Held out, all are measured alike.
    s, data, model = open_run(whole)
    plain = MemDLM(model.backbone, s).eval()
    with torch.no_grad():
        assert torch.equal(model(one)[0], plain(one)[0])
