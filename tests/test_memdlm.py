"""Oracles for memdlm.py: every result is derived a second time by plain means, and compared.

`test_two_inner_steps_by_hand` works the inner loop out on a sentence of six words. Start there.

The functions called plain_... are the second derivation. They know no hooks, no batches, no
padding and no shared layers. They take one sample at a time, write W + (alpha / r) B A into a
float64 copy of the model, run it from the embeddings, and sum the loss position by position. The
gradients of A and B follow by the chain rule from the gradient of the matrix they were written
into.

The sections stand in the order of memdlm.py.
"""
import copy
import inspect
import math
from dataclasses import fields, replace
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch import nn

import memdlm
from backbones import backbone
from memdlm import Batch, MemDLM, Settings
from settings import GROUPS
from toy.model import ToyConfig, ToyDLM

torch.set_num_threads(1)
V, MASK = 23, 22

# Three samples: the lengths of their prompts and responses, and their seeds.
SIZES, SEEDS = ((4, 7), (3, 5), (6, 9)), [3, 5, 11]


# ---- Small models and batches -------------------------------------------------------------------

def make_settings(**changes):
    small = {"rank": 3, "alpha": 6.0, "layer_fraction": 0.5, "inner_lr": 0.5, "min_t": 0.3}
    return Settings(**small | changes)


class Watched(ToyDLM):
    """ToyDLM that writes down what is asked of it, and breaks at the `fail_at`-th call of blocks.

    embeds: the inputs [B, L]. runs: (start, stop, whether h has a gradient) of each call of
    blocks. heads: for how many rows logits were computed. modes: whether a module was training.
    """
    fail_at = None

    def watch(self, fail_at=None):
        self.fail_at = fail_at
        self.embeds, self.runs, self.heads, self.modes = [], [], [], []
        return self

    def embed(self, ids):
        self.embeds.append(ids)
        return super().embed(ids)

    def blocks(self, h, valid, start, stop, need=None):
        self.runs.append((start, stop, h.requires_grad))
        self.modes.append(any(module.training for module in self.modules()))
        if len(self.runs) == self.fail_at:
            raise RuntimeError("broken")
        return super().blocks(h, valid, start, stop, need)

    def head(self, h):
        if len(h):  # no rows are asked for only to see whether the head is trained
            self.heads.append(len(h))
        return super().head(h)


class Chunked(Watched):
    """With logits for a few rows at a time, as the real backbones have them."""
    per_row = backbone.Backbone.per_row


def make_toy(layers=2, seed=0, kind=Watched):
    model = kind(ToyConfig(V, MASK, width=16, layers=layers, heads=2, ffn=12), seed).watch()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():  # no two numbers are alike, not even in the norms
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def pad(lists, filler):
    longest = max(map(len, lists))
    return torch.tensor([[*values, *[filler] * (longest - len(values))] for values in lists])


def make_batch(sizes=SIZES, seeds=SEEDS):
    """A batch with prompts of their own lengths. Sample b depends on sizes[b] and seeds[b] alone.

        x0          p p p p r r r r r r r - -      p: prompt, r: response, -: padding
        maskable    . . . . 1 1 1 1 1 1 1 . .
        valid       1 1 1 1 1 1 1 1 1 1 1 . .
    """
    samples, prompts = [], []
    for (prompt, response), seed in zip(sizes, seeds):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, MASK, (prompt + response,), generator=generator).tolist()
        samples.append(ids)
        prompts.append(ids[:prompt])
    maskable = [[False] * prompt + [True] * response for prompt, response in sizes]
    return Batch(
        x0=pad(samples, 1),
        maskable=pad(maskable, False),
        valid=pad([[True] * len(ids) for ids in samples], False),
        seeds=list(seeds),
        prompt=pad(prompts, 1),
        prompt_valid=pad([[True] * len(ids) for ids in prompts], False))


def gradients_of(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True,
                               materialize_grads=True)


def true_positions(flags):
    """The indices at which flags [L] is True."""
    return [i for i, flag in enumerate(flags.tolist()) if flag]


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def unpack(phi):
    """phi of G samples -> a list of G, each {name: ([r, in], [out, r])} in float64."""
    count = len(next(iter(phi.values()))[0])
    return [{name: tuple(w[g].double() for w in pair) for name, pair in phi.items()}
            for g in range(count)]


def write_phi(model, s, batch):
    """What the inner loop of training leaves: phi_K and its record."""
    t = s.min_t + (1 - s.min_t) * memdlm.uniform(batch.seeds, "t", 1)[:, 0]
    u = memdlm.uniform(batch.seeds, "anchor", batch.x0.shape[1])
    xt, masked = memdlm.corrupt(batch.x0, batch.maskable, t, u, MASK)
    h = memdlm.lower_layers(model, s, xt, batch.valid).detach()
    return memdlm.write_from_response(model, s, batch, t, xt, masked, h)


def adapt_to_prompts(model, s, batch):
    return memdlm.adapt(model, s, batch.prompt, batch.prompt_valid, batch.seeds)


# ---- The second derivation ----------------------------------------------------------------------

class Noised(NamedTuple):
    """One sample without padding, and its noise."""
    x0: torch.Tensor  # [n] clean tokens
    maskable: list    # positions that may be masked
    masked: set       # positions masked at the anchor
    t: float
    seed: int


class PlainStage(NamedTuple):
    """One inner step of one sample."""
    masks: set        # masked positions of the input
    targets: list     # positions of the loss
    weight: float
    next_masks: set   # masked positions of what a teacher sees


def draw(seed, purpose, n):
    """n numbers in [0, 1), as memdlm.py draws them."""
    return memdlm.uniform([seed], purpose, n)[0].tolist()


def plain_noise(s, batch):
    """Eq. 1 for each sample of a batch."""
    samples = []
    for x0, maskable, valid, seed in zip(batch.x0, batch.maskable, batch.valid, batch.seeds):
        t = s.min_t + (1 - s.min_t) * draw(seed, "t", 1)[0]
        u, where = draw(seed, "anchor", len(x0)), true_positions(maskable)
        samples.append(Noised(x0[valid], where, {i for i in where if u[i] < t}, t, seed))
    return samples


def plain_prompts(s, batch):
    """The same for prompts: every token may be masked, and at least one is."""
    samples = []
    for x0, valid, seed in zip(batch.prompt, batch.prompt_valid, batch.seeds):
        u, where = draw(seed, "prompt anchor", len(x0)), true_positions(valid)
        masked = {i for i in where if u[i] < s.anchor_ratio} or {min(where, key=u.__getitem__)}
        samples.append(Noised(x0[valid], where, masked, s.anchor_ratio, seed))
    return samples


def plain_states(s, sample):
    """The masks of each state of the path, the last one included, and the ratios to weight by.

    A ratio of None stands for the state's own. (3.2, 4.6)
    """
    kind, _, parts = s.trajectory.partition(":")
    n, K = len(sample.maskable), s.inner_steps
    if kind in ("consistent", "pre_only"):
        states = [*plain_pre_anchors(s, sample), sample.masked, set()]
        states = states[:-1] if kind == "pre_only" else states
        return states, [None] * len(states)
    if kind == "anchor_only":
        return [sample.masked, set()], [sample.t]
    if kind == "inconsistent":
        ratios = [0.8 - 0.6 * k / (K - 1) for k in range(K)]
        states = []
        for k, ratio in enumerate(ratios):
            u = draw(sample.seed, f"inconsistent {k}", len(sample.x0))
            lowest = sorted(sample.maskable, key=u.__getitem__)[:1]
            states.append({i for i in sample.maskable if u[i] < ratio} or set(lowest))
        return states + [set()], ratios
    parts, _, rounds = parts.partition("x")
    parts, rounds = int(parts), int(rounds or 1)
    states = [set() for _ in range(parts * rounds + 1)]
    for k in range(rounds):
        u = draw(sample.seed, f"cover {k}" if k else "cover", len(sample.x0))
        for place, i in enumerate(sorted(sample.maskable, key=u.__getitem__)):
            states[k * parts + place * parts // n].add(i)
    return states, [None] * (parts * rounds)


def plain_pre_anchors(s, sample):
    """The K - 1 states before the anchor, the most masked first."""
    n, m = len(sample.maskable), len(sample.masked)
    u = draw(sample.seed, "pre-anchor", len(sample.x0))
    free = sorted(set(sample.maskable) - sample.masked, key=u.__getitem__)
    extra, states = min(n, math.floor(s.pre_scale * m)) - m, []
    for steps_left in range(s.inner_steps - 1, 0, -1):
        states.append(sample.masked | set(free[:extra]))
        extra -= math.ceil(extra / steps_left)
    return states


def plain_path(s, sample, weighted):
    """The stages of one sample's inner loop."""
    states, ratios = plain_states(s, sample)
    path = []
    for masks, next_masks, ratio in zip(states, states[1:], ratios):
        targets = masks - next_masks if s.stage1_target == "anchor_tokens" else masks
        if ratio is None:
            ratio = len(masks) / len(sample.maskable)
        weight = 1 / (ratio + 1e-6) if weighted else 1.0
        path.append(PlainStage(masks, sorted(targets), weight, next_masks))
    return path


def merge(model, s, phi):
    """A copy of the model with the fast weights of one sample written into its matrices."""
    model = copy.deepcopy(model)
    for name, pair in phi.items():
        weight = model.get_submodule(name).weight
        weight.data += pair[0] if s.adapter == "full" else s.alpha / s.rank * pair[1] @ pair[0]
    return model


def plain_hidden(model, x0, masks):
    """The last block's output [n, D] for one sample with these positions masked."""
    ids = torch.tensor([[MASK if i in masks else int(x) for i, x in enumerate(x0)]])
    valid = torch.ones(ids.shape, dtype=torch.bool)
    return model.blocks(model.embed(ids), valid, 0, None)[0]


def plain_inner_loss(kind, model, student, teacher, target):
    """The loss of one position, from the hidden states [D] of student and teacher."""
    if kind == "hidden_mse":
        return sum((a - b) ** 2 for a, b in zip(student, teacher)) / len(student)
    if kind == "hidden_cosine":
        return 1 - student.dot(teacher) / (student.norm() * teacher.norm())
    q = model.head(student[None])[0].softmax(-1)
    p = model.head(teacher[None])[0].softmax(-1).detach()
    if kind == "ce":
        return -q[target].log()
    if kind == "kl":
        return (p * (p / q).log()).sum()
    return (q * (q / p).log()).sum()


def plain_inner_loop(model, s, samples, phi0s, weighted):
    """Eq. 6-8. phi0s: one phi_0 for each sample, or a single one that all samples share.

    Returns phi_K of each, and the mean loss of each stage [K].
    """
    model = copy.deepcopy(model).double()
    sharers = [samples] if len(phi0s) == 1 else [[sample] for sample in samples]
    phis, histories = [], []
    for own, phi in zip(sharers, phi0s):
        losses = []
        paths = [plain_path(s, sample, weighted) for sample in own]
        for stages in zip(*paths):  # stage k of each sample that has a part in this phi
            loss, grads = plain_gradients(model, s, own, stages, phi)
            phi = plain_sgd_step(s, phi, grads)
            losses.append(loss)
        phis.append(phi)
        histories.append(losses)
    return phis, [sum(losses) / len(losses) for losses in zip(*histories)]


def plain_gradients(model, s, samples, stages, phi):
    """The loss of one stage, and the gradient of each tensor of phi."""
    now, total, count = merge(model, s, phi), torch.zeros(()).double(), 0
    for sample, stage in zip(samples, stages):
        student = plain_hidden(now, sample.x0, stage.masks)
        teacher = plain_hidden(now, sample.x0, stage.next_masks).detach()
        for i in stage.targets:
            loss = plain_inner_loss(s.inner_loss, now, student[i], teacher[i], sample.x0[i])
            total, count = total + stage.weight * loss, count + 1
    weights = [now.get_submodule(name).weight for name in phi]
    grads = [torch.zeros_like(w) for w in weights]
    if count:
        total = total / count
        grads = torch.autograd.grad(total, weights)
    if s.adapter == "full":
        return float(total.detach()), {name: (g,) for name, g in zip(phi, grads)}
    # W' = W + c B A:  dL/dA = c B^T dL/dW',  dL/dB = c dL/dW' A^T
    c = s.alpha / s.rank
    return float(total.detach()), {name: (c * phi[name][1].T @ g, c * g @ phi[name][0].T)
                                   for name, g in zip(phi, grads)}


def plain_sgd_step(s, phi, grads):
    """phi - eta clip(gradient), tensor by tensor."""
    whole = math.sqrt(sum(float(g.norm()) ** 2 for pair in grads.values() for g in pair))

    def clip(g):
        norm = {"local": float(g.norm()), "global": whole, "none": 0}[s.clip]
        return g * s.clip_norm / norm if norm > s.clip_norm else g

    return {name: tuple(w - s.inner_lr * clip(g) for w, g in zip(phi[name], grads[name]))
            for name in phi}


def assert_same_walk(phi, phi0, reference):
    """The way that phi went from phi0 is the reference's, tensor by tensor."""
    for got, start, want in zip(unpack(phi), phi0, reference):
        for name in want:
            for g, s0, w in zip(got[name], start[name], want[name]):
                assert (g - w).norm() <= 1e-4 * (w - s0).norm() + 2e-6, name


# ---- 1. Settings --------------------------------------------------------------------------------

LIMITED = [f for f in fields(Settings) if f.metadata["low"] is not None]


@pytest.mark.parametrize("name, value", [
    ("trajectory", "cover"), ("trajectory", "cover:0"), ("trajectory", "cover:00"),
    ("trajectory", "cover:x"), ("trajectory", "consistent:"), ("trajectory", "consistent:2"),
    ("trajectory", "cover:4x"), ("trajectory", "cover:4x0"), ("trajectory", "cover:x4"),
    ("trajectory", "cover:4x2x2"), ("trajectory", "cover:1000x2"), ("trajectory", "cover:1001"),
    ("trajectory", "consistent:4x2"),
    ("trajectory", "nonsense"), ("inner_loss", "mse"), ("stage1_target", "all"), ("clip", "l2"),
    ("scope", "attn"), ("adapter", "dora"), ("memory_from", "both"), ("inner_steps", 1),
    ("rank", 0), ("layer_fraction", 0.0), ("layer_fraction", 1.1), ("pre_scale", 0.9),
    ("pre_scale", math.nan), ("anchor_ratio", -0.1), ("anchor_ratio", 1.1), ("inner_lr", -1.0),
    ("inner_lr", math.nan), ("clip_norm", 0.0), ("min_t", 0.0), ("min_t", 1.5)])
def test_a_bad_setting_is_named_in_one_line(name, value):
    with pytest.raises(ValueError) as error:
        Settings(**{name: value})
    message = str(error.value)
    assert name in message and str(value) in message and "\n" not in message


def test_defaults_are_the_papers():
    s = Settings()
    assert (s.trajectory, s.inner_steps) == ("consistent", 2)
    assert (s.inner_loss, s.stage1_target) == ("ce", "clean")
    assert (s.pre_scale, s.inner_lr, s.clip, s.clip_norm) == (1.5, 0.1, "local", 1.0)
    assert (s.anchor_ratio, s.min_t) == (0.2, 1e-3)
    assert (s.layer_fraction, s.scope) == (0.1, "ffn")
    assert (s.adapter, s.rank, s.alpha) == ("lora", 32, 64.0)
    assert (s.memory, s.memory_from) == (True, "response")
    assert (s.closed_book, s.per_sample) == (False, False)


@pytest.mark.parametrize("field", fields(Settings), ids=lambda field: field.name)
def test_every_setting_says_what_its_flag_needs(field):
    assert field.metadata["group"] in GROUPS and field.metadata["help"]
    if field.type in ("int", "float"):
        assert field in LIMITED


def test_choices_are_the_tables_that_are_looked_up():
    choices = {f.name: f.metadata["choices"] for f in fields(Settings)}
    help_text = {f.name: f.metadata["help"] for f in fields(Settings)}
    assert choices["inner_loss"] == list(memdlm.INNER_LOSSES)
    assert choices["memory_from"] == list(memdlm.WRITE_FROM)
    assert all(name in help_text["trajectory"] for name in memdlm.TRAJECTORIES)


@pytest.mark.parametrize("field", LIMITED, ids=lambda field: field.name)
def test_a_limit_may_be_reached_but_not_crossed(field):
    low, high = field.metadata["low"], field.metadata["high"]
    whole = field.type == "int"
    for limit in (low, high):
        assert getattr(Settings(**{field.name: limit}), field.name) == limit
    outside = [low - 1 if whole else math.nextafter(low, -math.inf)]
    if high < math.inf:
        outside.append(high + 1 if whole else math.nextafter(high, math.inf))
    for value in outside:
        with pytest.raises(ValueError, match=f"{field.name} is .* must lie between"):
            Settings(**{field.name: value})


# ---- 2. One training step -----------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {}, {"per_sample": True}, {"per_sample": True, "scope": "ffn+attn", "layer_fraction": 1.0},
    {"memory": False}, {"memory_from": "prompt"},
    {"trajectory": "anchor_only", "adapter": "full"}], ids=str)
def test_outer_loss_and_every_gradient_with_phi_as_a_constant(changes):
    """Eq. 9-10, with N the number of maskable tokens in the batch:

        1 / N sum_b 1 / t_b sum_{i in M_b} -log p_{theta, phi_K}(x0_i | x_t)
    """
    model, s, batch = make_toy(), make_settings(**changes), make_batch()
    samples = plain_noise(s, batch)
    phis = [{}]
    if s.memory:
        from_prompt = s.memory_from == "prompt"
        own = s.per_sample or from_prompt
        phi0 = unpack(memdlm.fresh_phi(model, s, SEEDS if own else SEEDS[:1]))
        read = plain_prompts(s, batch) if from_prompt else samples
        phis, _ = plain_inner_loop(model, s, read, phi0, weighted=not from_prompt)

    want, masks, nats = 0.0, 0, 0.0
    grads = [0.0] * len(list(model.parameters()))
    for sample, phi in zip(samples, phis * (len(samples) // len(phis))):
        theta = merge(copy.deepcopy(model).double(), s, phi)
        h = plain_hidden(theta, sample.x0, sample.masked)
        nll = sum(-theta.head(h[i][None])[0].log_softmax(-1)[sample.x0[i]] for i in sample.masked)
        part = nll / sample.t / sum(response for _, response in SIZES)
        want += float(part.detach())
        masks += len(sample.masked)
        nats += float(nll.detach())
        grads = [total + g for total, g in zip(grads, gradients_of(part, theta))]

    loss, record = MemDLM(model, s)(batch)
    assert float(record["loss"]) == loss.item() == pytest.approx(want, rel=1e-5)
    assert float(record["ce"]) == pytest.approx(nats / masks, rel=1e-5)
    for (name, _), got, g in zip(model.named_parameters(), gradients_of(loss, model), grads):
        assert (got - g).norm() <= 1e-4 * g.norm() + 1e-6, name


@pytest.mark.parametrize("changes", [
    {}, {"per_sample": True}, {"adapter": "full"}, {"memory_from": "prompt"}], ids=str)
def test_without_learning_memdlm_is_the_baseline(changes):
    """phi = 0 is the baseline, bit for bit; and `loss_without` reports it beside any other phi."""
    model, batch = make_toy(), make_batch()
    base, base_record = MemDLM(model, make_settings(memory=False, **changes))(batch)
    loss, record = MemDLM(model, make_settings(inner_lr=0.0, **changes))(batch)
    assert torch.equal(loss, base)
    pairs = zip(gradients_of(loss, model), gradients_of(base, model))
    assert all(torch.equal(a, b) for a, b in pairs)

    loss, record = MemDLM(model, make_settings(**changes))(batch, report=True)
    assert torch.equal(record["loss_without"], base)
    assert torch.equal(record["ce_without"], base_record["ce"])
    assert not torch.equal(loss, base)
    assert "loss_without" not in MemDLM(model, make_settings(**changes))(batch)[1]


def test_the_lower_layers_run_once_and_the_head_sees_masked_positions_only():
    model, s, batch = make_toy(layers=4), make_settings(), make_batch()
    paths = [plain_path(s, sample, weighted=True) for sample in plain_noise(s, batch)]
    pre, anchor = [sum(len(path[k].targets) for path in paths) for k in (0, 1)]
    assert anchor < pre < 21
    MemDLM(model, s)(batch)
    # The anchor's lower layers and the pre-anchor's. On top of them, as constants, two inner
    # steps. Then the outer pass with its gradient.
    inner = [(0, 2, False), (2, None, False), (2, None, False)]
    assert model.runs == [(0, 2, True), *inner, (2, None, True)]
    assert [int((x == MASK).sum()) for x in model.embeds] == [anchor, pre]
    assert model.heads == [pre, anchor, anchor]
    model.watch()
    MemDLM(model, s)(batch, report=True)
    assert len(model.embeds) == 2 and len(model.runs) == 6
    assert model.heads == [pre, anchor, anchor, anchor]
    model.watch()
    MemDLM(model, make_settings(memory=False))(batch)
    assert model.runs == [(0, 2, True), (2, None, True)] and model.heads == [anchor]
    model.watch()
    adapt_to_prompts(model, s, batch)
    assert model.runs == inner  # both states of a prompt share a pass of the lower layers


@pytest.mark.parametrize("trajectory",
                         ["consistent", "pre_only", "anchor_only", "inconsistent", "cover:3"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_samples_with_nothing_to_mask_cost_nothing_and_break_nothing(trajectory, per_sample):
    model, batch = make_toy(), make_batch(((4, 0), (5, 1), (3, 6)))
    # min_t = 1: everything is masked.
    s = make_settings(trajectory=trajectory, per_sample=per_sample, min_t=1.0)
    loss, record = MemDLM(model, s)(batch, report=True)
    numbers = [loss, *record.values(), *gradients_of(loss, model)]
    assert all(bool(torch.isfinite(x).all()) for x in numbers)
    assert record["skipped"] == 0

    nothing = replace(batch, maskable=batch.maskable & False)
    loss, record = MemDLM(model, s)(nothing)
    assert loss == 0 and record["ce"] == 0 and not record["inner"].any()
    assert not any(g.any() for g in gradients_of(loss, model))
    phi, _ = write_phi(model, s, nothing)
    phi0 = memdlm.fresh_phi(model, s, SEEDS if per_sample else SEEDS[:1])
    assert all(torch.equal(w, w0) for name in phi for w, w0 in zip(phi[name], phi0[name]))


@pytest.mark.parametrize("model", [ToyDLM, backbone.Backbone], ids=["toy", "real"])
def test_both_wings_have_the_interface(model):
    """Every method of memdlm.Backbone, with the same parameters first."""
    methods = inspect.getmembers(memdlm.Backbone, inspect.isfunction)
    names = {name for name, _ in methods if not name.startswith("_")}
    assert names == {"embed", "blocks", "per_row", "matrices"}
    for name in names:
        asked = inspect.signature(getattr(memdlm.Backbone, name)).parameters.values()
        offered = list(inspect.signature(getattr(model, name)).parameters.values())
        assert [p.name for p in asked] == [p.name for p in offered[:len(asked)]], name
        assert all(p.default is not p.empty for p in offered[len(asked):]), name


# ---- 3. Noise -----------------------------------------------------------------------------------

@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10 ** 9), st.integers(0, 10 ** 9), st.integers(0, 70), st.integers(0, 70))
def test_random_numbers_depend_on_seed_and_purpose_alone(seed, other, short, long):
    short, long = sorted((short, long))
    u = memdlm.uniform([seed], "anchor", long)[0]
    assert torch.equal(memdlm.uniform([other, seed], "anchor", long)[1], u)    # in any batch
    assert torch.equal(memdlm.uniform([seed], "anchor", short)[0], u[:short])  # at any padding
    assert bool(((u >= 0) & (u < 1)).all())
    if short > 2:
        assert not torch.equal(memdlm.uniform([seed], "static", long)[0], u)
        assert seed == other or not torch.equal(memdlm.uniform([other], "anchor", long)[0], u)


def test_noise_masks_a_share_t_of_the_maskable_tokens_and_nothing_else():
    x0, t = torch.arange(4000).expand(4, 4000) % MASK, torch.tensor([0.0, 0.1, 0.7, 1.0])
    maskable = torch.arange(4000).expand(4, 4000) >= 500
    u = memdlm.uniform(range(4), "anchor", 4000)
    xt, masked = memdlm.corrupt(x0, maskable, t, u, MASK)
    assert torch.equal(xt == MASK, masked) and torch.equal(xt[~masked], x0[~masked])
    assert not masked[:, :500].any()
    share = masked[:, 500:].float().mean(1)
    assert share[0] == 0 and share[3] == 1 and (share - t).abs().max() < 0.02
    edge = memdlm.corrupt(x0, maskable, t, torch.zeros(4, 4000), MASK)[1]
    assert not edge[0].any() and edge[1, 500:].all()  # u = 0: never at t = 0, always above


# ---- 4. The trajectory --------------------------------------------------------------------------

def rightmost(n, where):
    """n of the True positions of `where` [1, L], from the right."""
    return where & (where.flip(1).cumsum(1).flip(1) <= n)


@hypothesis_settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([1.0, 1.25, 1.5, 1.75, 2.0, 9.0]),
       st.sampled_from([2, 3, 4, 7]), st.integers(0, 10 ** 6))
def test_states_walk_from_the_pre_anchor_down_to_exactly_the_anchor(n, m, pre_scale, K, seed):
    m, s = min(n, m), make_settings(pre_scale=pre_scale, inner_steps=K)
    maskable = rightmost(n, torch.arange(45)[None] % 8 != 3)
    n = int(maskable.sum())
    masked = rightmost(min(m, n), maskable)
    m = int(masked.sum())
    masks, ratios = memdlm.consistent(s, masked, maskable, None, [seed])
    assert len(masks) == K + 1 and ratios is None
    assert torch.equal(masks[-2], masked) and not masks[-1].any()

    counts = [int(mask.sum()) for mask in masks[:-1]]
    assert counts[0] == min(n, int(Fraction(pre_scale) * m))
    for k, (now, after) in enumerate(zip(masks, masks[1:])):
        assert not (after & ~now).any() and not (now & ~maskable).any()  # each contains the next
        if k < K - 1:
            assert counts[k] - counts[k + 1] == math.ceil((counts[k] - m) / (K - 1 - k))

    pre, _ = memdlm.pre_only(s, masked, maskable, None, [seed])
    assert len(pre) == K and all(torch.equal(a, b) for a, b in zip(pre, masks))


def test_pre_anchor_count_is_exact_for_decimal_scales():
    for text, m in (("1.3", 90), ("1.05", 60), ("2.1", 30), ("1.3", 10)):
        maskable = torch.ones(1, 300, dtype=torch.bool)
        s = make_settings(pre_scale=float(text))
        masks, _ = memdlm.consistent(s, rightmost(m, maskable), maskable, None, [0])
        assert masks[0].sum() == int(Fraction(text) * m)


def test_extra_and_revealed_masks_are_spread_evenly():
    maskable, seeds = torch.ones(1000, 9, dtype=torch.bool), list(range(1000))
    masked = torch.arange(9).expand(1000, 9) < 4
    s = make_settings(inner_steps=3, pre_scale=1.75)
    masks, _ = memdlm.consistent(s, masked, maskable, None, seeds)
    # 3 of the 5 free positions are masked, and at the next state 3 - ceil(3 / 2) = 1 of 5.
    for mask, expected in zip(masks, (600, 200)):
        assert mask[:, :4].all() and (mask[:, 4:].sum(0) - expected).abs().max() < 70


@pytest.mark.parametrize("trajectory",
                         ["consistent", "pre_only", "anchor_only", "inconsistent", "cover:3"])
@pytest.mark.parametrize("target", ["clean", "anchor_tokens"])
@pytest.mark.parametrize("weighted", [True, False])
def test_stages_position_by_position(trajectory, target, weighted):
    """Inputs, loss positions, weights, teacher inputs; prompt and padding are never masked."""
    s = make_settings(trajectory=trajectory, stage1_target=target, inner_steps=3)
    batch = make_batch()
    samples, width = plain_noise(s, batch), batch.x0.shape[1]
    masked = torch.tensor([[i in sample.masked for i in range(width)] for sample in samples])
    t = torch.tensor([sample.t for sample in samples])
    path = memdlm.stages(s, batch.x0, masked, batch.maskable, t, SEEDS, MASK, weighted)
    assert len(path) == {"pre_only": 2, "anchor_only": 1}.get(trajectory, 3)
    for b, sample in enumerate(samples):
        plain = plain_path(s, sample, weighted)
        assert len(plain) == len(path)
        for stage, want in zip(path, plain):
            assert set(true_positions(stage.x[b] == MASK)) == want.masks <= set(sample.maskable)
            assert set(true_positions(stage.next_x[b] == MASK)) == want.next_masks
            assert true_positions(stage.targets[b]) == want.targets
            # The 1e-6 in the weight is 3 to 10 times this tolerance.
            assert float(stage.weight[b]) == pytest.approx(want.weight, rel=3e-7)
            for x, masks in ((stage.x, want.masks), (stage.next_x, want.next_masks)):
                assert all(x[b, i] == batch.x0[b, i] for i in range(width) if i not in masks)


# ---- 5. The inner loop --------------------------------------------------------------------------

class Stack(nn.Module):
    """Linear layers one after the other on given inputs; the logits are U times the last output.

    It has the interface that memdlm.py asks of a backbone, and no attention. So each position
    can be worked out by itself.
    """

    def __init__(self, layers, U, mask_id):
        super().__init__()
        self.layers, self.U = nn.ModuleList(layers), U
        self.num_layers, self.vocab_size, self.mask_id = len(layers), len(U), mask_id

    def below(self, states):
        """What the inner loop asks for where every layer is a fast one."""
        return [self.embed(x) for x in states]

    def blocks(self, h, valid, start, stop, need=None):
        for layer in self.layers[start:stop]:
            h = layer(h)
        return h

    def per_row(self, f, h, *rest):
        return f(lambda h: h @ self.U.T, h, *rest)

    def matrices(self, first, scope):
        return {str(i): self.layers[i] for i in range(first, self.num_layers)}


class WordCounts(Stack):
    """A model that knows nothing: one matrix W = 0 [5, 1], on a hidden state of 1 at each position.

    Under phi it becomes B A, so every position has the logits z = B A of the five words. With
    r = 1 that is one number A times five numbers B.
    """
    words = ["the", "cat", "sat", "on", "mat", "_"]

    def __init__(self):
        W = nn.Linear(1, 5, bias=False)
        nn.init.zeros_(W.weight)
        super().__init__([W], torch.eye(5), mask_id=5)

    def embed(self, ids):
        return torch.ones(*ids.shape, 1)

    def encode(self, text):
        return torch.tensor([[self.words.index(word) for word in text.split()]])


def walk_six_words():
    """The model, its settings, the clean text and the two stages of its inner loop."""
    net = WordCounts()
    s = make_settings(rank=1, alpha=1.0, inner_lr=0.5, clip="none", pre_scale=1.5, inner_steps=2)
    x0, anchor = net.encode("the cat sat on the mat"), net.encode("the cat _ on the _")
    # The pre-anchor has floor(1.5 * 2) = 3 masks: the anchor's, and with this seed that of cat.
    seeds, everything = [2], torch.ones(1, 6, dtype=torch.bool)
    path = memdlm.stages(s, x0, anchor == 5, everything, torch.ones(1), seeds, 5, weighted=True)
    assert torch.equal(path[0].x, net.encode("the _ _ on the _"))
    assert torch.equal(path[1].x, anchor)
    return net, s, x0, path


def test_two_inner_steps_by_hand():
    """The inner loop on six words. Each pass sees p = softmax(B A); each step changes A and B.

                     input                        the     cat     sat      on     mat
        phi_0        A = 1                    B     0       0       0       0       0
        stage 1      the  _   _  on the  _    p  .2000   .2000   .2000   .2000   .2000
        phi_1        A = 1                    B -.2000   .1333   .1333  -.2000   .1333
        stage 2      the cat  _  on the  _    p  .1616   .2256   .2256   .1616   .2256
        phi_2        A = 1.1616               B -.4425  -.2050   .5450  -.4425   .5450
        outer step   the cat  _  on the  _    p  .1040   .1370   .3275   .1040   .3275

    Stage 1 raises the three words that were masked: cat, sat and mat. At stage 2 only sat and mat
    are. They rise further, and cat falls. So the outer step finds its two masked words with a
    probability of 33 % each; without phi it is 20 %.
    """
    net, s, x0, path = walk_six_words()
    valid, anchor = torch.ones(1, 6, dtype=torch.bool), path[1].x
    phi = {"0": (torch.tensor([[[1.0]]]), torch.zeros(1, 5, 1))}  # in practice A is random

    # Stage 1. A sample's loss is divided by its share of masks, here 3 of 6: its weight is 2.
    # The loss is 2 * -log .2 = 3.2189. Its gradient by a logit z is the sum of p - onehot over
    # the masks, times weight / masks:
    #     the, on         2/3 * (3 * .2)     =  .4
    #     cat, sat, mat   2/3 * (3 * .2 - 1) = -.2667
    # z = B A, so dL/dB = A dL/dz = dL/dz, and B moves by -.5 dL/dz.
    # dL/dA = sum(B dL/dz) = 0, because B is 0: A stays.
    phi, record = memdlm.inner_loop(net, s, path[:1], x0, valid, net.below, phi)
    assert read_numbers(phi) == (1, to_4_decimals(-0.2000, 0.1333, 0.1333, -0.2000, 0.1333))
    assert record["inner"].tolist() == to_4_decimals(3.2189)

    # Stage 2. The share is 2 of 6, the weight 3, the loss 3 * -log .2256 = 4.4673. The gradient:
    #     the, on         3/2 * (2 * .1616)     =  .4849
    #     cat             3/2 * (2 * .2256)     =  .6767
    #     sat, mat        3/2 * (2 * .2256 - 1) = -.8233
    # B moves by -.5 dL/dz again. Now B is not 0, so A moves too:
    #     dL/dA = 2 * -.2 * .4849 + .1333 * (.6767 - 2 * .8233) = -.3233,  A = 1 + .5 * .3233
    phi, record = memdlm.inner_loop(net, s, path[1:], x0, valid, net.below, phi)
    assert read_numbers(phi) == (pytest.approx(1.1616, abs=1e-4),
                                 to_4_decimals(-0.4425, -0.2050, 0.5450, -0.4425, 0.5450))
    assert record["inner"].tolist() == to_4_decimals(4.4673)

    # The outer step reads the anchor under phi_2. theta has not moved: without phi, p is .2.
    for fast, p in ((phi, 0.3275), (None, 0.2)):
        top = memdlm.upper_layers(net, s, net.embed(anchor), valid, fast)
        nll = memdlm.token_nll(net, top, x0, anchor == 5)
        assert (-nll[anchor == 5]).exp().tolist() == to_4_decimals(p, p)


def read_numbers(phi):
    """A, and the list B."""
    A, B = phi["0"]
    return A.item(), B.flatten().tolist()


def to_4_decimals(*numbers):
    return pytest.approx(list(numbers), abs=1e-4)


class TwoLinear(Stack):
    """logits_i = U W1 W0 (E[x_i] + P_i), in float64, with random numbers everywhere."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        shapes = (V, 6), (10, 6), (V, 5), (4, 6), (5, 4)
        E, P, U, W0, W1 = [torch.randn(shape, generator=generator).double() / 2
                           for shape in shapes]
        layers = [nn.Linear(6, 4, bias=False).double(), nn.Linear(4, 5, bias=False).double()]
        layers[0].weight.data, layers[1].weight.data = W0, W1
        super().__init__(layers, U, MASK)
        self.E, self.P = E, P

    def embed(self, ids):
        return self.E[ids] + self.P[:ids.shape[1]]


def test_two_inner_steps_through_two_matrices():
    """The same by the chain rule, for two matrices, phi of rank 3, and seven maskable tokens.

        position   0  1  2  3  4  5  6  7  8  9
        prompt     p  p  p                            never masked
        stage 1             _  .  _  .  _  .  _       and two of the dots: 6 masks
        stage 2             _  .  _  .  _  .  _       the anchor: 4 masks
    """
    net, c, eta = TwoLinear(), 2.0, 0.5
    s = make_settings(layer_fraction=1.0, clip="none")
    x0, maskable = torch.arange(10)[None], torch.arange(10)[None] >= 3
    masked = torch.tensor([[False] * 3 + [True, False, True, False, True, False, True]])
    valid = torch.ones_like(masked)
    phi0 = {name: (A.double(), B.double())
            for name, (A, B) in memdlm.fresh_phi(net, s, [7]).items()}
    path = memdlm.stages(s, x0, masked, maskable, torch.ones(1), [7], MASK, weighted=True)
    (A0, B0), (A1, B1) = [[w[0].clone() for w in phi0[name]] for name in ("0", "1")]
    for k in (1, 2):
        x = path[k - 1].x[0]
        where = [i for i in range(10) if x[i] == MASK]
        assert len(where) == {1: 6, 2: 4}[k]

        # The matrices with phi written in, and the gradient of the loss by each of the two.
        W0 = net.layers[0].weight.detach() + c * B0 @ A0
        W1 = net.layers[1].weight.detach() + c * B1 @ A1
        G0, G1 = torch.zeros_like(W0), torch.zeros_like(W1)
        for i in where:
            e = net.E[MASK] + net.P[i]
            error = (net.U @ W1 @ W0 @ e).softmax(0)
            error[x0[0, i]] -= 1  # d(-log p)/dlogits = softmax - onehot
            error /= (len(where) / 7 + 1e-6) * len(where)  # weight 1 / rho, mean over the masks
            G1 += torch.outer(net.U.T @ error, W0 @ e)
            G0 += torch.outer(W1.T @ net.U.T @ error, e)
        if k == 1:
            assert not B0.any() and not (c * B0.T @ G0).any()  # so A moves at stage 2 only

        # One SGD step of each tensor, all from the values before it.
        A0, B0 = A0 - eta * c * B0.T @ G0, B0 - eta * c * G0 @ A0.T
        A1, B1 = A1 - eta * c * B1.T @ G1, B1 - eta * c * G1 @ A1.T
        phi, _ = memdlm.inner_loop(net, s, path[:k], x0, valid, net.below, phi0)
        for got, want in zip([*phi["0"], *phi["1"]], [A0, B0, A1, B1]):
            # The tolerance is wide because the loss is float32.
            torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-7)
        for name in ("0", "1"):
            assert torch.equal(phi[name][0], phi0[name][0]) == (k == 1)


def test_inner_loop_leaves_no_gradient_anywhere():
    model, s, batch = make_toy(), make_settings(), make_batch()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    with torch.no_grad():  # it runs wherever it is called from
        from_prompt, _ = adapt_to_prompts(model, s, batch)
    for phi in (from_prompt, write_phi(model, s, batch)[0]):
        tensors = [w for pair in phi.values() for w in pair]
        assert all(not w.requires_grad and w.grad_fn is None for w in tensors)
    MemDLM(model, s)(batch)
    assert all(bool((p.grad == 7).all()) for p in model.parameters())


@pytest.mark.parametrize("trajectory", ["consistent", "inconsistent", "cover:3"])
@pytest.mark.parametrize("use", ["training", "prompt"])
def test_per_sample_phi_of_a_padded_batch_is_that_of_each_sample_alone(use, trajectory):
    model, s = make_toy(), make_settings(per_sample=True, trajectory=trajectory)

    def run(*which):
        """phi of these samples, and the sum of their losses."""
        batch = make_batch([SIZES[b] for b in which], [SEEDS[b] for b in which])
        if use == "prompt":
            return adapt_to_prompts(model, s, batch)[0], 0
        loss = MemDLM(model, s)(batch)[0].detach()
        return write_phi(model, s, batch)[0], loss * batch.maskable.sum()

    phi, loss = run(0, 1, 2)
    alone = [run(b) for b in range(3)]
    torch.testing.assert_close(loss, sum(loss for _, loss in alone))
    for name, pair in phi.items():
        for k, w in enumerate(pair):
            want = torch.cat([one[name][k] for one, _ in alone])
            torch.testing.assert_close(w, want, rtol=1e-4, atol=2e-6)


def test_alone_shared_and_per_sample_phi_agree_exactly():
    model, batch = make_toy(), make_batch(SIZES[:1], SEEDS[:1])
    one, other = [MemDLM(model, make_settings(per_sample=flag))(batch)[0]
                  for flag in (False, True)]
    assert torch.equal(one, other)
    pairs = zip(gradients_of(one, model), gradients_of(other, model))
    assert all(torch.equal(a, b) for a, b in pairs)


def test_samples_that_are_not_finite_keep_their_phi_and_the_others_step():
    model, s, batch = make_toy(), make_settings(per_sample=True), make_batch()
    good, _ = write_phi(model, s, batch)
    poison = [int(x) for b in (1, 2) for x in batch.x0[b, batch.valid[b]] if x not in batch.x0[0]]
    with torch.no_grad():
        model.embedding.weight[poison] = math.nan
    phi, record = write_phi(model, s, batch)
    phi0 = memdlm.fresh_phi(model, s, SEEDS)
    assert record["skipped"] == 4  # two samples, both stages
    for name in phi:
        for w, w0, w1 in zip(phi[name], phi0[name], good[name]):
            assert torch.equal(w[1:], w0[1:])
            torch.testing.assert_close(w[0], w1[0], rtol=1e-5, atol=1e-6)
    shared, record = write_phi(model, make_settings(), batch)
    assert record["skipped"] == 2
    for name in phi0:
        assert all(torch.equal(w[0], w0[0]) for w, w0 in zip(shared[name], phi0[name]))


@pytest.mark.parametrize("clip", ["local", "global", "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_is_taken_only_if_loss_and_gradient_are_finite(clip, bad, where):
    s = make_settings(clip=clip)
    phi = {"w": (torch.ones(3, 2, 4), torch.ones(3, 5, 2))}
    grads, loss = [torch.full_like(w, 0.1) for w in phi["w"]], torch.ones(3)
    if where == "loss":
        loss[1] = bad
    else:
        grads[1][1, 0, 0] = bad
    new, taken = memdlm.sgd_step(s, phi, grads, loss)
    assert taken.tolist() == [True, False, True]
    for w in new["w"]:
        assert (w[1] == 1).all()
        torch.testing.assert_close(w[[0, 2]], torch.full_like(w[:2], 1 - 0.5 * 0.1))


# ---- 6. Fast weights ----------------------------------------------------------------------------

def test_phi_0_is_seeded_kaiming_uniform_times_zero():
    model, s = make_toy(), make_settings(rank=200, scope="ffn+attn")
    phi = memdlm.fresh_phi(model, s, SEEDS)
    alone = memdlm.fresh_phi(model, s, SEEDS[1:2])
    attention = {f"layers.1.attn.{name}_proj" for name in "qkvo"}
    assert set(phi) == attention | {f"layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    for name, (A, B) in phi.items():
        out, width = model.get_submodule(name).weight.shape
        limit = width ** -0.5
        assert A.shape[1:] == (200, width) and B.shape[1:] == (out, 200) and not B.any()
        assert 0.98 * limit < A.max() <= limit and -limit <= A.min() < -0.98 * limit
        assert A.mean().abs() < 0.03 * limit
        assert A.dtype == B.dtype == torch.float32 and torch.equal(A[1], alone[name][0][0])
        assert not torch.equal(A[0], A[1])
    gate, up = phi["layers.1.mlp.gate_proj"][0], phi["layers.1.mlp.up_proj"][0]
    assert not torch.equal(gate, up)
    with pytest.raises(ValueError, match="no matrix"):
        memdlm.fresh_phi(Table(torch.zeros(2, V)), s, [0])


@pytest.mark.parametrize("layers, fraction, first", [
    (16, 0.1, 14), (20, 0.1, 18), (16, 0.05, 15), (20, 0.05, 19), (16, 0.25, 12), (20, 0.5, 10),
    (2, 0.1, 1), (1, 0.1, 0), (4, 1.0, 0), (4, 0.1, 3), (4, 0.3, 2), (4, 0.0, 3)])
def test_fast_weights_sit_in_the_last_share_of_the_layers(layers, fraction, first):
    assert memdlm.first_fast_layer(layers, fraction) == first


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("G", [1, 3])
def test_fast_weights_at_zero_change_no_bit_and_otherwise_act_as_if_merged(adapter, G):
    model, batch = make_toy(), make_batch()
    s = make_settings(adapter=adapter, scope="ffn+attn", layer_fraction=1.0)
    h = model.embed(batch.x0)

    def run(phi):
        return memdlm.upper_layers(model, s, h, batch.valid, phi)

    phi = memdlm.fresh_phi(model, s, SEEDS[:G])
    assert torch.equal(run(phi), run(None))
    phi = {name: tuple(w + 0.1 * memdlm.uniform(range(G), name, *w.shape[1:]) for w in pair)
           for name, pair in phi.items()}
    out = run(phi)
    for b, own in enumerate(unpack(phi) * (3 // G)):
        theta = merge(copy.deepcopy(model).double(), s, own)
        want = plain_hidden(theta, batch.x0[b, batch.valid[b]], set())
        torch.testing.assert_close(out[b, batch.valid[b]].double(), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, run(None), atol=1e-2)


def snapshot(model, batch):
    """What must be as before: outputs, weights, and the mode of every module."""
    out = model.head(model.blocks(model.embed(batch.x0), batch.valid, 0, None)).detach()
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    return out, weights, [module.training for module in model.modules()]


@pytest.mark.parametrize("use", ["with", "adapt", "denoise", "train"])
@pytest.mark.parametrize("fail_at", [None, 1, 2, 3, 4])
def test_the_model_is_as_before_whatever_happens(use, fail_at):
    model, batch = make_toy(), make_batch()
    s = make_settings(scope="ffn+attn", inner_steps=3)  # at least four passes in each use
    model.train()
    model.layers[0].eval()
    model.layers[1].mlp.eval()
    out, weights, modes = snapshot(model, batch)
    phi = adapt_to_prompts(model, s, batch)[0]
    model.watch(fail_at)

    def run():
        if use == "with":
            with memdlm.fast_weights(model, s, phi):
                assert count_hooks(model) == 7
                for _ in range(4):
                    model.blocks(model.embed(batch.x0), batch.valid, 0, None)
        elif use == "adapt":
            adapt_to_prompts(model, s, batch)
        elif use == "denoise":
            list(memdlm.denoise(model, s, batch.x0, batch.maskable, batch.valid, SEEDS, phi))
        else:
            MemDLM(model, s)(batch)

    if fail_at:
        with pytest.raises(RuntimeError, match="broken"):
            run()
    else:
        run()
        assert any(model.modes) == (use != "adapt")  # no dropout while adapting
    assert count_hooks(model) == 0 and torch.is_grad_enabled()
    out_now, weights_now, modes_now = snapshot(model.watch(), batch)
    assert torch.equal(out, out_now) and modes == modes_now
    assert list(weights) == list(weights_now)
    assert all(torch.equal(weights[name], weights_now[name]) for name in weights)


def test_an_unknown_matrix_leaves_no_hook():
    model, s = make_toy(), make_settings()
    phi = memdlm.fresh_phi(model, s, [0])
    phi["elsewhere"] = next(iter(phi.values()))
    with pytest.raises(KeyError), memdlm.fast_weights(model, s, phi):
        pass
    assert count_hooks(model) == 0


def test_a_matrix_that_the_forward_pass_skips_is_an_error():
    """Else a backbone that names the wrong matrices would silently have no memory."""
    model, batch = make_toy(), make_batch()
    used, idle = model.matrices(1, "ffn"), nn.Linear(16, 16)
    for some in (used, {}):
        model.matrices = lambda first, scope: some | {"idle": idle}
        with pytest.raises(RuntimeError, match="not have been used"):
            write_phi(model, make_settings(), batch)
        assert count_hooks(model) == 0


def test_a_phi_for_another_number_of_samples_is_refused():
    model, s, batch = make_toy(), make_settings(), make_batch()
    phi = memdlm.fresh_phi(model, s, SEEDS[:2])
    with pytest.raises(ValueError, match="2 samples"):
        memdlm.upper_layers(model, s, model.embed(batch.x0), batch.valid, phi)
    assert count_hooks(model) == 0


def test_samples_multiply_by_their_own_fast_weights_or_by_one_for_all():
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(3, 5, 4, generator=generator), torch.randn(3, 2, 4, generator=generator)
    own, shared = memdlm.fast_product(x, W), memdlm.fast_product(x, W[1:2])
    for b in range(3):
        for i in range(5):
            torch.testing.assert_close(own[b, i], W[b] @ x[b, i])
            torch.testing.assert_close(shared[b, i], W[1] @ x[b, i])
    with pytest.raises(ValueError, match="phi is for 2 samples, the input has 3"):
        memdlm.fast_product(x, W[:2])


def test_steps_of_a_stack_are_the_steps_of_its_matrices():
    """Each expert's gradient is clipped by its own norm, for each sample."""
    generator = torch.Generator().manual_seed(0)
    s = Settings(inner_lr=0.5, clip_norm=2.0)
    stack, grad = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    loss = torch.zeros(2)
    moved, taken = memdlm.sgd_step(s, {"stack": (stack,)}, [grad], loss)
    single = {str(e): (stack[:, e],) for e in range(3)}
    alone, _ = memdlm.sgd_step(s, single, [grad[:, e] for e in range(3)], loss)
    assert taken.all()
    for e in range(3):
        torch.testing.assert_close(moved["stack"][0][:, e], alone[str(e)][0])
        for b in range(2):
            g = grad[b, e]
            want = stack[b, e] - 0.5 * g * min(1, 2 / float(g.norm()))
            torch.testing.assert_close(moved["stack"][0][b, e], want)
    grad[1, 2, 0, 0] = math.inf  # one number of one expert: that sample's phi stays as it was
    moved, taken = memdlm.sgd_step(s, {"stack": (stack,)}, [grad], loss)
    assert taken.tolist() == [True, False] and torch.equal(moved["stack"][0][1], stack[1])
    assert not torch.equal(moved["stack"][0][0], stack[0])


# ---- 7. Losses: logits for a few rows at a time -------------------------------------------------

@pytest.mark.parametrize("kind", list(memdlm.INNER_LOSSES))
def test_logits_in_chunks_change_nothing_but_how_many_are_held(kind, monkeypatch):
    """Loss, phi and the outer gradient with two rows of logits at a time, as with all at once."""
    s, batch, results = make_settings(inner_loss=kind, per_sample=True), make_batch(), []
    for limit in (backbone.LOGITS, 2 * V):
        monkeypatch.setattr(backbone, "LOGITS", limit)
        model = make_toy(kind=Chunked)
        loss, record = MemDLM(model, s)(batch, report=True)
        result = [loss, record["inner"], record["loss_without"], *gradients_of(loss, model)]
        assert limit > 2 * V or max(model.heads) <= 2
        *_, canvas = memdlm.denoise(model, s, batch.x0, batch.maskable, batch.valid, SEEDS,
                                    temperature=0.5)
        results.append([*result, canvas.float()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(memdlm.INNER_LOSSES))
def test_row_gradients_taken_early_are_those_of_autograd(kind, monkeypatch):
    """Under a head that is not trained, each logit is computed once and none is kept.

    Seven rows, two at a time: four parts, which keep the gradients of 2, 2, 2 and 1 rows.
    """
    monkeypatch.setattr(backbone, "LOGITS", 8 * 2 * V)  # a CPU takes an eighth of it
    model, generator = make_toy(kind=Chunked).double(), torch.Generator().manual_seed(5)
    for module in (model.norm, model.lm_head):
        module.requires_grad_(False)
    h = torch.randn(7, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    rest = [torch.randint(2, V, (7,), generator=generator)]
    if kind != "ce":
        rest.append(torch.randn(7, 16, generator=generator, dtype=torch.float64))
    factor = torch.rand(7, generator=generator, dtype=torch.float64)
    loss = memdlm.INNER_LOSSES[kind]
    plain, = torch.autograd.grad((factor * loss(model.head, h, *rest)).sum(), h)

    model.watch()
    out = model.per_row(loss, h, *rest)
    parts = [part for part, _ in out.grad_fn.next_functions]
    kept = [[tensor.shape for tensor in part.saved_tensors] for part in parts]
    assert kept == [[(2, 16)]] * 3 + [[(1, 16)]]
    early, = torch.autograd.grad((factor * out).sum(), h)
    assert sum(model.heads) == {"ce": 7, "kl": 14, "reverse_kl": 14}.get(kind, 0)
    assert max(model.heads, default=0) <= 2
    torch.testing.assert_close(out, loss(model.head, h, *rest))
    torch.testing.assert_close(early, plain, rtol=1e-5, atol=1e-7)  # the losses are float32


# ---- 8. Adapting to a prompt --------------------------------------------------------------------

@pytest.mark.parametrize("ratio, masks", [(0.0, 1), (1.0, 6)])
def test_a_prompt_has_at_least_one_mask(ratio, masks):
    model, s = make_toy(), make_settings(anchor_ratio=ratio, pre_scale=1.0)
    prompt = torch.arange(6)[None]
    memdlm.adapt(model, s, prompt, prompt >= 0, [0])
    assert [int((x == MASK).sum()) for x in model.embeds] == [2 * masks]  # both states in one pass


@pytest.mark.parametrize("trajectory", ["consistent", "inconsistent", "cover:3", "cover:2x2"])
def test_short_prompts_are_always_adapted(trajectory):
    model, s = make_toy(), make_settings(trajectory=trajectory)
    prompt = torch.arange(8)[:, None]
    phi, _ = memdlm.adapt(model, s, prompt, prompt >= 0, list(range(8)))
    assert all(bool((B.flatten(1) != 0).any(1).all()) for _, B in phi.values())


# ---- 9. Decoding --------------------------------------------------------------------------------

class Table(nn.Module):
    """Logits by position, from a table [L, V].

    `shift` [V] is added to them wherever the first token of the sample is hidden.
    """
    num_layers, mask_id, vocab_size = 1, MASK, V

    def __init__(self, table, shift=None):
        super().__init__()
        self.table, self.shift = table, torch.zeros(V) if shift is None else shift

    def embed(self, ids):
        here = torch.eye(ids.shape[1]).expand(len(ids), -1, -1)
        blind = (ids[:, :1, None] == MASK).float().expand(-1, ids.shape[1], -1)
        return torch.cat([here, blind], -1)

    def blocks(self, h, valid, start, stop, need=None):
        return h

    def per_row(self, f, h, *rest):
        return f(lambda h: h[:, :-1] @ self.table + h[:, -1:] * self.shift, h, *rest)

    def matrices(self, first, scope):
        return {}


def random_table(L, seed=0):
    return torch.randn(L, V, generator=torch.Generator().manual_seed(seed))


def decode(model, batch, s=None, **options):
    """The canvas before the first step and after each."""
    canvases = memdlm.denoise(model, s or make_settings(), batch.x0, batch.maskable, batch.valid,
                              batch.seeds, **options)
    return [torch.where(batch.maskable, MASK, batch.x0), *canvases]


def list_commits(canvases):
    """For each step and sample, the set of positions that it filled in."""
    return [[set(true_positions(a != b)) for a, b in zip(old, new)]
            for old, new in zip(canvases, canvases[1:])]


@pytest.mark.parametrize("options", [
    {}, {"steps": 4}, {"steps": 50}, {"block_length": 3, "steps": 9}, {"temperature": 2.0},
    {"remasking": "random"}, {"cfg_scale": 1.0, "block_length": 3}], ids=str)
def test_every_gap_is_filled_once_with_a_real_token_and_the_rest_is_left_alone(options):
    logits = random_table(15)
    logits[:, MASK] += 1e4  # the model would like to answer with the mask token
    batch = make_batch()
    canvases = decode(Table(logits), batch, **options)
    assert not (canvases[-1] == MASK).any()
    assert torch.equal(canvases[-1][~batch.maskable], batch.x0[~batch.maskable])
    for old, new in zip(canvases, canvases[1:]):
        assert torch.equal(new[old != MASK], old[old != MASK])  # what is committed is final
        assert not torch.equal(old, new)


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 40), st.integers(1, 40))
def test_quota_is_even_and_complete(n, steps):
    gaps = torch.tensor([n])
    counts = [int(memdlm.quota(gaps, steps, torch.tensor(k))) for k in range(steps)]
    assert sum(counts) == n and max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


def test_steps_counts_and_blocks_from_left_to_right():
    def run(**options):
        return list_commits(decode(Table(random_table(15)), make_batch(), **options))

    def sizes(**options):
        """How many gaps each step fills in each of the three samples, which have 7, 5 and 9."""
        return [[len(filled) for filled in step] for step in run(**options)]

    assert sizes() == [[int(k < n) for n in (7, 5, 9)] for k in range(9)]
    assert sizes(steps=4) == [[2, 2, 3], [2, 1, 2], [2, 1, 2], [1, 1, 2]]
    assert sizes(steps=1) == [[7, 5, 9]]
    assert sizes(steps=6, block_length=3) == [
        [2, 2, 2], [1, 1, 1],  # the first three gaps: two steps for each block
        [2, 1, 2], [1, 1, 1],
        [1, 0, 2], [0, 0, 1]]
    for k, step in enumerate(run(steps=6, block_length=3)):
        for filled, (prompt, _) in zip(step, SIZES):
            assert all((i - prompt) // 3 == k // 2 for i in filled)


def test_without_steps_one_token_is_committed_at_a_time_in_blocks_too():
    steps = list_commits(decode(Table(random_table(15)), make_batch(), block_length=4))
    assert all(len(filled) <= 1 for step in steps for filled in step)


def test_steps_that_do_not_divide_by_the_blocks_are_rounded_down():
    """Nine gaps in blocks of three. 8 steps: floor(8 / 3) = 2 for each block. 2 steps: one each."""
    for steps, passes in ((8, 6), (2, 3), (9, 9)):
        canvases = decode(Table(random_table(15)), make_batch(), block_length=3, steps=steps)
        assert len(canvases) - 1 == passes


def test_near_certainty_the_surer_token_still_comes_first():
    """p = 1 - 4e-11 at the first gap and 1 - 3e-13 at the second: both are 1 in float32."""
    logits = torch.zeros(3, V)
    logits[1, 4], logits[2, 5] = 27.0, 32.0
    (first,), (second,) = list_commits(decode(Table(logits), make_copies(1, 2)))
    assert (first, second) == ({2}, {1})


def test_sampling_noise_is_finer_than_float32():
    """The largest of 157k numbers decides. Among multiples of 2^-24 the largest are often alike."""
    where = torch.ones(2, 3, dtype=torch.bool)
    noise = memdlm.sampling_noise(Table(random_table(3)), [1, 2], "tag", where)
    assert noise.shape == (6, V) and (noise * 2 ** 24 % 1 != 0).float().mean() > 0.99


def test_low_confidence_commits_the_most_probable_tokens_first():
    logits = 2 * random_table(15)
    batch = make_batch(SIZES[2:], SEEDS[2:])
    canvases = decode(Table(logits), batch, steps=4)
    p = logits[:, :MASK].softmax(-1)  # MASK is the last entry
    gaps = true_positions(batch.maskable[0])
    ranking = sorted(gaps, key=lambda i: -float(p[i].max()))
    want = [set(ranking[0:3]), set(ranking[3:5]), set(ranking[5:7]), set(ranking[7:9])]
    assert [filled for filled, in list_commits(canvases)] == want
    assert all(canvases[-1][0, i] == p[i].argmax() for i in ranking)


def deviation(observed, expected):
    """Chi-square statistic, in standard deviations above its mean."""
    keep = expected > 0
    chi = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = keep.sum() - 1
    return float((chi - freedom) / (2 * freedom) ** 0.5)


def make_copies(n, gaps):
    """n samples "0 gap gap ..." that differ in their seeds alone."""
    x0 = torch.zeros(n, gaps + 1, dtype=torch.long)
    maskable = torch.arange(gaps + 1).expand_as(x0) > 0
    return Batch(x0, maskable, x0 == 0, [f"row {i}" for i in range(n)], x0, x0 == 0)


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0])
def test_temperature_samples_the_tempered_distribution(T):
    logits = random_table(2)
    logits[:, MASK] = 5.0
    tokens = decode(Table(logits), make_copies(3000, 1), temperature=T)[-1][:, 1]
    expected = torch.cat([(logits[1, :MASK] / T).softmax(-1), torch.zeros(1)]) * 3000
    assert deviation(torch.bincount(tokens, minlength=V), expected) < 3


def test_each_step_samples_anew():
    """Two gaps of the same odds, one after the other: each of the 9 pairs is equally frequent."""
    logits = torch.full((3, V), -1e4)
    logits[1:, :3] = 0.0
    options = dict(temperature=1.0, block_length=1)
    tokens = decode(Table(logits), make_copies(1800, 2), **options)[-1]
    pairs = torch.bincount(3 * tokens[:, 1] + tokens[:, 2], minlength=9).float()
    assert deviation(pairs, torch.full((9,), 200.0)) < 3


def test_confidence_is_the_plain_probability_of_the_sampled_token():
    """Gaps of [.9 .1] and [.4 .35 .25]: the first is committed first if it has drawn its .9.

    Where it has drawn its .1, every token of the second gap is surer.
    """
    logits = torch.full((3, V), -1e4)
    logits[1, :2] = torch.tensor([0.9, 0.1]).log()
    logits[2, :3] = torch.tensor([0.4, 0.35, 0.25]).log()
    first = decode(Table(logits), make_copies(2000, 2), temperature=1.0)[1]
    sure = first[:, 1] != MASK
    assert (first[sure, 1] == 0).all() and abs(int(sure.sum()) - 1800) < 45


def test_random_remasking_takes_any_position_and_still_the_best_token():
    logits = 3 * random_table(5)
    canvases = decode(Table(logits), make_copies(2000, 4), remasking="random")
    firsts = torch.tensor([min(filled) for filled in list_commits(canvases)[0]])
    expected = torch.tensor([0, 500.0, 500, 500, 500])
    assert deviation(torch.bincount(firsts, minlength=5).float(), expected) < 3
    assert (canvases[-1][:, 1:] == logits[1:, :MASK].argmax(-1)).all()


def test_guidance_moves_away_from_the_blind_logits():
    """blind + (w + 1) (seen - blind), where blind sees no given token but its own commits."""
    logits, shift = random_table(6), 3 * random_table(1, seed=1)[0]
    x = torch.tensor([[4, 5, MASK, 7, MASK, 1]])
    hide = torch.tensor([[True, True, False, False, False, False]])
    model, where = Table(logits, shift), x == MASK
    seen, blind = [model.embed(ids)[where] for ids in (x, torch.where(hide, MASK, x))]
    tokens, probability = memdlm.pick_tokens(model, seen, blind, cfg_scale=1.5)
    expected = (logits - 1.5 * shift)[[2, 4]].double()
    expected[:, MASK] = -math.inf
    assert torch.equal(tokens, expected.argmax(-1))
    assert not torch.equal(tokens, logits[[2, 4], :MASK].argmax(-1))
    torch.testing.assert_close(probability, expected.softmax(-1).amax(-1))

    # In denoise, what is blind to the prompt at the second step sees the first step's commits.
    model, batch = make_toy(), make_batch()
    decode(model, batch, cfg_scale=1.0, steps=2)
    seen, blind = model.embeds[2:]
    prompt = batch.valid & ~batch.maskable
    assert (blind[prompt] == MASK).all() and torch.equal(seen[prompt], batch.x0[prompt])
    assert torch.equal(blind[batch.maskable], seen[batch.maskable])
    assert (seen[batch.maskable] != MASK).any()


@pytest.mark.parametrize("options", [
    {}, {"steps": 4}, {"temperature": 1.0}, {"remasking": "random", "cfg_scale": 0.5}], ids=str)
def test_decoding_a_ragged_batch_with_own_phis_is_decoding_each_sample(options):
    model, s, batch = make_toy(), make_settings(inner_lr=5.0), make_batch()
    phi, _ = adapt_to_prompts(model, s, batch)
    together = decode(model, batch, s, phi=phi, **options)
    without = decode(model, batch, s, **options)
    for b in range(3):
        one = make_batch(SIZES[b:b + 1], SEEDS[b:b + 1])
        own = {name: tuple(w[b:b + 1] for w in pair) for name, pair in phi.items()}
        alone = decode(model, one, s, phi=own, **options)
        length = sum(SIZES[b])
        for canvas, want in zip(together[1:], alone[1:]):
            assert torch.equal(canvas[b, :length], want[0])
        assert torch.equal(together[-1][b, :length], alone[-1][0])
    assert not torch.equal(together[-1], without[-1])


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"remasking": "random"}], ids=str)
def test_seeds_decide(options):
    batch = make_batch(SIZES[2:], [1])

    def run(seed):
        model = Table(random_table(15))
        return torch.stack(decode(model, replace(batch, seeds=[seed]), **options))

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_nothing_to_fill_yields_nothing():
    batch = make_batch()
    assert decode(make_toy(), replace(batch, maskable=batch.maskable & False))[1:] == []


# ---- 10. Exposure bias --------------------------------------------------------------------------

RATIOS = [1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01]


def plain_exposure(model, x0, gaps, seed, ratios):
    """Eq. 3-4 for one sample without padding: {"static", "sequential", "matched": curve}."""
    u, canvas, open_ = draw(seed, "static", len(x0)), x0.clone(), set(gaps)
    shuffled = sorted(gaps, key=u.__getitem__)
    curves = {"static": [], "sequential": [], "matched": []}

    def log_p(ids, masks):
        return model.head(plain_hidden(model, ids, masks)).log_softmax(-1)

    def mean_nll(ids, masks):
        lp = log_p(ids, masks)
        return sum(-float(lp[i, x0[i]]) for i in masks) / len(masks)

    for ratio in ratios:
        keep = max(1, int(Fraction(str(ratio)) * len(gaps)))
        guess = log_p(canvas, open_)[:, :MASK].log_softmax(-1)  # without the mask token, the last
        surest = sorted(open_, key=lambda i: -float(guess[i].max()))
        for i in surest[:max(0, len(open_) - keep)]:
            canvas[i] = guess[i].argmax()
            open_.remove(i)
        curves["static"].append(mean_nll(x0, set(shuffled[:keep])))
        curves["sequential"].append(mean_nll(canvas, open_))
        curves["matched"].append(mean_nll(x0, open_))
    return curves


@torch.no_grad()
@pytest.mark.parametrize("with_phi", [False, True])
def test_exposure_bias_against_loops(with_phi):
    model, s, batch = make_toy(), make_settings(), make_batch()
    phi = adapt_to_prompts(model, s, batch)[0] if with_phi else None
    got = memdlm.exposure_bias(model, s, batch.x0, batch.maskable, batch.valid, SEEDS, RATIOS, phi)
    for b in range(3):
        plain = merge(copy.deepcopy(model).double(), s, unpack(phi)[b] if phi else {})
        x0, gaps = batch.x0[b, batch.valid[b]], true_positions(batch.maskable[b])
        want = plain_exposure(plain, x0, gaps, SEEDS[b], RATIOS)
        for name in ("static", "sequential", "matched"):
            assert got[name][:, b].tolist() == pytest.approx(want[name], rel=1e-4), name
    # Fully masked, the three are the same. Half-way they are not.
    assert torch.equal(got["static"][0], got["sequential"][0])
    assert torch.equal(got["static"][0], got["matched"][0])
    assert not torch.allclose(got["static"][3], got["sequential"][3])
    assert not torch.allclose(got["matched"][3], got["sequential"][3])


def test_an_oracle_has_no_exposure_bias():
    """A model that is always right commits the truth, so its own tokens do no harm.

    If it is equally sure everywhere, it does not matter either which positions are left.
    """
    batch = make_batch(SIZES[:1], SEEDS[:1])

    def run(logits):
        return memdlm.exposure_bias(Table(logits), make_settings(), batch.x0, batch.maskable,
                                    batch.valid, SEEDS[:1], RATIOS)

    sure = 9 * nn.functional.one_hot(batch.x0[0], V).float()
    curves = run(sure)
    torch.testing.assert_close(curves["sequential"], curves["static"])
    curves = run(sure * torch.linspace(1, 2, len(sure))[:, None])
    assert torch.equal(curves["sequential"], curves["matched"])
    assert not torch.equal(curves["static"], curves["matched"])


# ---- 11. Variants -------------------------------------------------------------------------------

VARIANTS = [
    {},
    {"inner_loss": "kl"}, {"inner_loss": "reverse_kl"},
    {"inner_loss": "hidden_mse"}, {"inner_loss": "hidden_cosine"},
    {"stage1_target": "anchor_tokens"}, {"stage1_target": "anchor_tokens", "inner_loss": "kl"},
    {"trajectory": "pre_only"}, {"trajectory": "cover:3"},
    {"trajectory": "anchor_only"}, {"trajectory": "anchor_only", "inner_loss": "kl"},
    {"trajectory": "inconsistent"}, {"trajectory": "inconsistent", "inner_loss": "reverse_kl"},
    {"inner_steps": 3}, {"pre_scale": 2.0}, {"clip_norm": 0.5},
    {"clip": "global"}, {"clip": "global", "clip_norm": 2.0}, {"clip": "none"},
    {"scope": "ffn+attn"}, {"layer_fraction": 0.25},
    {"layer_fraction": 1.0, "inner_loss": "hidden_mse"},
    {"adapter": "full"}, {"adapter": "full", "clip": "global", "scope": "ffn+attn"},
]


@pytest.mark.parametrize("use", ["training, shared", "training, per sample", "prompt"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_inner_loop_against_the_plain_one(changes, use):
    model, batch = make_toy(layers=3), make_batch()
    s = make_settings(per_sample=use == "training, per sample", **changes)
    phi0 = unpack(memdlm.fresh_phi(model, s, SEEDS[:1] if use == "training, shared" else SEEDS))
    if use == "prompt":
        phi, record = adapt_to_prompts(model, s, batch)
        samples = plain_prompts(s, batch)
    else:
        phi, record = write_phi(model, s, batch)
        samples = plain_noise(s, batch)
    want, losses = plain_inner_loop(model, s, samples, phi0, weighted=use != "prompt")
    assert record["inner"].tolist() == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert record["skipped"] == 0
    assert_same_walk(phi, phi0, want)
    assert any((w != w0).any() for name in want[0] for w, w0 in zip(want[0][name], phi0[0][name]))


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 30), st.integers(1, 8), st.integers(1, 3), st.integers(0, 10 ** 6))
def test_cover_is_disjoint_even_and_covers(n, K, R, seed):
    maskable = rightmost(n, torch.arange(40)[None] % 7 != 2)
    masks, _ = memdlm.cover(make_settings(trajectory=f"cover:{K}x{R}"), maskable, maskable, None,
                            [seed])
    assert len(masks) == K * R + 1 and not masks.pop().any()
    for k in range(R):
        part = masks[K * k:K * (k + 1)]
        counts = [int(mask.sum()) for mask in part]
        assert torch.equal(sum(mask.long() for mask in part), maskable.long())
        assert max(counts) - min(counts) <= 1
    # The first round is that of cover:K; the others are drawn anew.
    once, _ = memdlm.cover(make_settings(trajectory=f"cover:{K}"), maskable, maskable, None, [seed])
    assert all(map(torch.equal, once, masks[:K]))
    if n == 30 and K > 2 and R > 1:
        assert not all(map(torch.equal, masks[:K], masks[K:]))
