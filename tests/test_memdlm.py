"""Oracles for memdlm.py: every result is derived a second time by plain means, and compared.

The second derivation knows no hooks, no batches, no padding and no shared prefix. It takes one sample at a time,
writes W + (alpha / r) B A into a float64 copy of the model, runs it from the embeddings, sums the loss position
by position, and gets the gradient of A and B from that of the merged matrix by the chain rule.
"""
import copy
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch import nn

import memdlm
from backbones import backbone
from memdlm import Batch, MemDLM, Settings
from toy.model import ToyConfig, ToyDLM

torch.set_num_threads(1)
V, MASK = 23, 22
SIZES, SEEDS = ((4, 7), (3, 5), (6, 9)), [3, 5, 11]  # (prompt, response) lengths of three samples, and their seeds


# ---- Small models and batches ---------------------------------------------------------------------------

def settings(**changes):
    return Settings(**{"rank": 3, "alpha": 6.0, "layer_fraction": 0.5, "inner_lr": 0.5, "min_t": 0.3} | changes)


class Watched(ToyDLM):
    """ToyDLM that writes down what is asked of it, and breaks at the `fail_at`-th call of blocks."""
    fail_at = None

    def watch(self, fail_at=None):
        self.fail_at, self.embeds, self.runs, self.heads, self.modes = fail_at, [], [], [], []
        return self

    def embed(self, ids):
        self.embeds.append(ids)
        return super().embed(ids)

    def blocks(self, h, valid, start, stop, need=None):
        self.runs.append((start, stop, h.requires_grad))
        self.modes.append(any(m.training for m in self.modules()))
        if len(self.runs) == self.fail_at:
            raise RuntimeError("broken")
        return super().blocks(h, valid, start, stop, need)

    def head(self, h):
        self.heads += [len(h)] if len(h) else []  # of no rows: only to see whether it is trained
        return super().head(h)


class Chunked(Watched):
    """With few logits at a time, as the real backbones have them."""
    per_row = backbone.Backbone.per_row


def toy(layers=2, seed=0, kind=Watched):
    model = kind(ToyConfig(V, MASK, width=16, layers=layers, heads=2, ffn=12), seed).watch()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():  # no two numbers alike, in the norms neither
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def pad(rows, filler):
    return torch.tensor([[*row, *[filler] * (max(map(len, rows)) - len(row))] for row in rows])


def batch_of(sizes=SIZES, seeds=SEEDS):
    """A batch with prompts of their own lengths; row b depends on sizes[b] and seeds[b] alone."""
    rows, prompts = [], []
    for (prompt, response), seed in zip(sizes, seeds):
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.randint(0, MASK, (prompt + response,), generator=generator).tolist())
        prompts.append(rows[-1][:prompt])
    flags = [[False] * prompt + [True] * response for prompt, response in sizes]
    return Batch(pad(rows, 1), pad(flags, False), pad([[True] * len(row) for row in rows], False), list(seeds),
                 pad(prompts, 1), pad([[True] * len(p) for p in prompts], False))


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


def positions(row):
    return [i for i, x in enumerate(row.tolist()) if x]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- The second derivation ------------------------------------------------------------------------------

def draw(seed, purpose, n):
    return memdlm.uniform([seed], purpose, n)[0].tolist()


def plain_noise(s, batch):
    """Eq. 1 for each sample: (x0 without padding, its maskable positions, set of masked ones, t, seed)."""
    rows = []
    for x0, maskable, valid, seed in zip(batch.x0, batch.maskable, batch.valid, batch.seeds):
        t = s.min_t + (1 - s.min_t) * draw(seed, "t", 1)[0]
        u, where = draw(seed, "anchor", len(x0)), positions(maskable)
        rows.append((x0[valid], where, {i for i in where if u[i] < t}, t, seed))
    return rows


def plain_prompts(s, batch):
    """The same for prompts: every token may be masked, one of them is."""
    rows = []
    for x0, valid, seed in zip(batch.prompt, batch.prompt_valid, batch.seeds):
        u, where = draw(seed, "prompt anchor", len(x0)), positions(valid)
        masked = {i for i in where if u[i] < s.anchor_ratio} or {min(where, key=u.__getitem__)}
        rows.append((x0[valid], where, masked, s.anchor_ratio, seed))
    return rows


def plain_path(s, length, maskable, masked, t, seed, weighted):
    """[(masks, loss positions, weight, next masks)] of one sample, masks being sets of positions (3.2, 4.6)."""
    kind, _, parts = s.trajectory.partition(":")
    n, nominal = len(maskable), None
    if kind in ("consistent", "pre_only"):
        u = draw(seed, "pre-anchor", length)
        free = sorted(set(maskable) - masked, key=u.__getitem__)
        extra, states = min(n, math.floor(s.pre_scale * len(masked))) - len(masked), []
        for steps_left in range(s.inner_steps - 1, 0, -1):
            states.append(masked | set(free[:extra]))
            extra -= math.ceil(extra / steps_left)
        states += [masked, set()][:1 if kind == "pre_only" else 2]
    elif kind == "anchor_only":
        states, nominal = [masked, set()], [t]
    elif kind == "inconsistent":
        nominal = [0.8 - 0.6 * k / (s.inner_steps - 1) for k in range(s.inner_steps)]
        us = [draw(seed, f"inconsistent {k}", length) for k in range(s.inner_steps)]
        states = [{i for i in maskable if u[i] < r} or set(sorted(maskable, key=u.__getitem__)[:1])
                  for u, r in zip(us, nominal)] + [set()]
    else:
        u, k = draw(seed, "cover", length), int(parts)
        shuffled = sorted(maskable, key=u.__getitem__)
        states = [{i for place, i in enumerate(shuffled) if place * k // n == part} for part in range(k)] + [set()]
    path = []
    for k, (now, after) in enumerate(zip(states, states[1:])):
        ratio = nominal[k] if nominal else len(now) / n
        targets = now - after if s.stage1_target == "anchor_tokens" else now
        path.append((now, sorted(targets), 1 / (ratio + 1e-6) if weighted else 1.0, after))
    return path


def merged(model, s, phi):
    """A copy of the model with the fast weights of one sample written into its matrices."""
    model = copy.deepcopy(model)
    for name, pair in phi.items():
        weight = model.get_submodule(name).weight
        weight.data += pair[0] if s.adapter == "full" else s.alpha / s.rank * pair[1] @ pair[0]
    return model


def hidden(model, x0, masks):
    """Last block's output [n, D] of one sample, from the embeddings, with these positions masked."""
    ids = torch.tensor([[MASK if i in masks else int(x) for i, x in enumerate(x0)]])
    return model.blocks(model.embed(ids), torch.ones(ids.shape, dtype=torch.bool), 0, None)[0]


def plain_inner_loss(kind, model, student, teacher, target):
    """Loss of one position from hidden states [D] of the two."""
    if kind == "hidden_mse":
        return sum((a - b) ** 2 for a, b in zip(student, teacher)) / len(student)
    if kind == "hidden_cosine":
        return 1 - student.dot(teacher) / (student.norm() * teacher.norm())
    q, p = model.head(student[None])[0].softmax(-1), model.head(teacher[None])[0].softmax(-1).detach()
    return {"ce": -q[target].log(), "kl": (p * (p / q).log()).sum(), "reverse_kl": (q * (q / p).log()).sum()}[kind]


def plain_inner_loop(model, s, rows, phis, weighted):
    """Eq. 6-8. phis: one phi_0 per sample, or a single one that the samples share. -> phi_K of each, losses [K]"""
    model, groups = copy.deepcopy(model).double(), [rows] if len(phis) == 1 else [[row] for row in rows]
    paths = {row[-1]: plain_path(s, len(row[0]), *row[1:], weighted) for row in rows}
    results, history = [], []
    for group, phi in zip(groups, phis):
        history.append([])
        for k in range(len(paths[group[0][-1]])):
            now, total, count = merged(model, s, phi), torch.zeros(()).double(), 0
            for x0, *_, seed in group:
                masks, targets, weight, after = paths[seed][k]
                student, teacher = hidden(now, x0, masks), hidden(now, x0, after).detach()
                for i in targets:
                    loss = plain_inner_loss(s.inner_loss, now, student[i], teacher[i], x0[i])
                    total, count = total + weight * loss, count + 1
            weights = [now.get_submodule(name).weight for name in phi]
            grads = [torch.zeros_like(w) for w in weights]
            if count:
                total = total / count
                grads = torch.autograd.grad(total, weights)
            if s.adapter == "full":
                grads = {name: (g,) for name, g in zip(phi, grads)}
            else:  # W' = W + c B A:  dL/dA = c B^T dL/dW',  dL/dB = c dL/dW' A^T
                c = s.alpha / s.rank
                grads = {name: (c * phi[name][1].T @ g, c * g @ phi[name][0].T) for name, g in zip(phi, grads)}
            whole = math.sqrt(sum(float(g.norm()) ** 2 for pair in grads.values() for g in pair))

            def clipped(g):
                norm = {"local": float(g.norm()), "global": whole, "none": 0}[s.clip]
                return g * s.clip_norm / norm if norm > s.clip_norm else g

            phi = {name: tuple(w - s.inner_lr * clipped(g) for w, g in zip(phi[name], grads[name])) for name in phi}
            history[-1].append(float(total.detach()))
        results.append(phi)
    return results, [sum(step) / len(step) for step in zip(*history)]


def split(phi):
    """{name: ([G, ...], ...)} -> G times {name: ([...], ...)}, float64."""
    groups = len(next(iter(phi.values()))[0])
    return [{name: tuple(w[g].double() for w in pair) for name, pair in phi.items()} for g in range(groups)]


def assert_same_walk(phi, phi0, reference):
    """The way that phi went from phi0 is the reference's, tensor by tensor."""
    for got, start, want in zip(split(phi), phi0, reference):
        for name in want:
            for g, s0, w in zip(got[name], start[name], want[name]):
                assert (g - w).norm() <= 1e-4 * (w - s0).norm() + 2e-6, name


def write(model, s, batch):
    """What training's inner loop leaves: phi_K, record."""
    t = s.min_t + (1 - s.min_t) * memdlm.uniform(batch.seeds, "t", 1)[:, 0]
    u = memdlm.uniform(batch.seeds, "anchor", batch.x0.shape[1])
    xt, masked = memdlm.corrupt(batch.x0, batch.maskable, t, u, MASK)
    h = memdlm.lower_layers(model, s, xt, batch.valid).detach()
    return memdlm.write_from_response(model, s, batch, t, xt, masked, h)


# ---- 1. The inner steps by hand -------------------------------------------------------------------------

class TwoLinear(nn.Module):
    """logits_i = U W1 W0 (E[x_i] + P_i): small enough for gradients on paper."""
    num_layers, mask_id, vocab_size = 2, MASK, V

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.E, self.P, self.U, W0, W1 = (torch.randn(shape, generator=generator).double() / 2
                                          for shape in ((V, 6), (10, 6), (V, 5), (4, 6), (5, 4)))
        self.w = nn.ModuleList([nn.Linear(6, 4, bias=False), nn.Linear(4, 5, bias=False)]).double()
        self.w[0].weight.data, self.w[1].weight.data = W0, W1

    def embed(self, ids):
        return self.E[ids] + self.P[:ids.shape[1]]

    def blocks(self, h, valid, start, stop, need=None):
        for layer in self.w[start:stop]:
            h = layer(h)
        return h

    def per_row(self, f, h, *rest):
        return f(lambda h: h @ self.U.T, h, *rest)

    def matrices(self, first, scope):
        return {str(i): self.w[i] for i in range(first, 2)}


def test_two_inner_steps_by_hand():
    net, c, eta = TwoLinear(), 2.0, 0.5
    s = settings(layer_fraction=1.0, clip="none")
    x0, maskable = torch.arange(10)[None], torch.arange(10)[None] >= 3
    masked = torch.tensor([[False] * 3 + [True, False, True, False, True, False, True]])
    phi0 = {name: tuple(w.double() for w in pair) for name, pair in memdlm.fresh_phi(net, s, [7]).items()}
    path = memdlm.stages(s, x0, masked, maskable, torch.ones(1), [7], MASK, weighted=True)
    valid = torch.ones_like(masked)
    (A0, B0), (A1, B1) = [[w[0].clone() for w in phi0[name]] for name in ("0", "1")]
    for k in (1, 2):
        x = path[k - 1].x[0]
        where = [i for i in range(10) if x[i] == MASK]
        assert len(where) == {1: 6, 2: 4}[k]
        W0, W1 = net.w[0].weight.detach() + c * B0 @ A0, net.w[1].weight.detach() + c * B1 @ A1
        G0, G1 = torch.zeros_like(W0), torch.zeros_like(W1)  # dL/dW0, dL/dW1
        for i in where:
            e = net.E[MASK] + net.P[i]
            error = (net.U @ W1 @ W0 @ e).softmax(0)
            error[x0[0, i]] -= 1                                  # dCE/dlogits = softmax - onehot
            error /= (len(where) / 7 + 1e-6) * len(where)         # weight 1 / rho, mean over the masks
            G1 += torch.outer(net.U.T @ error, W0 @ e)
            G0 += torch.outer(W1.T @ net.U.T @ error, e)
        if k == 1:
            assert not B0.any() and not (c * B0.T @ G0).any()     # so A moves at stage 2 only
        A0, B0, A1, B1 = (A0 - eta * c * B0.T @ G0, B0 - eta * c * G0 @ A0.T,
                          A1 - eta * c * B1.T @ G1, B1 - eta * c * G1 @ A1.T)
        phi, _ = memdlm.inner_loop(net, s, path[:k], x0, valid, net.embed, phi0)
        for got, want in zip([*phi["0"], *phi["1"]], [A0, B0, A1, B1]):
            torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-7)  # the loss is float32
        assert torch.equal(phi["0"][0], phi0["0"][0]) == torch.equal(phi["1"][0], phi0["1"][0]) == (k == 1)


# ---- 2. The outer gradient, first order -----------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {}, {"per_sample": True}, {"per_sample": True, "scope": "ffn+attn", "layer_fraction": 1.0}, {"memory": False},
    {"memory_from": "prompt"}, {"trajectory": "anchor_only", "adapter": "full"}], ids=str)
def test_outer_loss_and_every_gradient_with_phi_as_a_constant(changes):
    """Eq. 9-10:  1 / N sum_b 1 / t_b sum_{i in M_b} -log p_{theta, phi_K}(x0_i | x_t), N maskable tokens in all."""
    model, s, batch = toy(), settings(**changes), batch_of()
    rows = plain_noise(s, batch)
    if not s.memory:
        phis = [{}]
    elif s.memory_from == "prompt":
        phis, _ = plain_inner_loop(model, s, plain_prompts(s, batch), split(memdlm.fresh_phi(model, s, SEEDS)), False)
    else:
        phi0 = split(memdlm.fresh_phi(model, s, SEEDS if s.per_sample else SEEDS[:1]))
        phis, _ = plain_inner_loop(model, s, rows, phi0, True)
    want, grads, masks, nats = 0.0, [0.0] * len(list(model.parameters())), 0, 0.0
    for (x0, maskable, masked, t, _), phi in zip(rows, phis * (len(rows) // len(phis))):
        theta = merged(copy.deepcopy(model).double(), s, phi)
        h = hidden(theta, x0, masked)
        nll = sum(-theta.head(h[i][None])[0].log_softmax(-1)[x0[i]] for i in masked)
        part = nll / t / sum(response for _, response in SIZES)
        want, masks, nats = want + float(part.detach()), masks + len(masked), nats + float(nll.detach())
        grads = [total + g for total, g in zip(grads, gradients(part, theta))]
    loss, record = MemDLM(model, s)(batch)
    assert float(record["loss"]) == loss.item() == pytest.approx(want, rel=1e-5)
    assert float(record["ce"]) == pytest.approx(nats / masks, rel=1e-5)
    for (name, _), got, g in zip(model.named_parameters(), gradients(loss, model), grads):
        assert (got - g).norm() <= 1e-4 * g.norm() + 1e-6, name


def test_inner_loop_leaves_no_gradient_anywhere():
    model, s, batch = toy(), settings(), batch_of()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    with torch.no_grad():  # and it runs wherever it is called from
        from_prompt, _ = memdlm.adapt(model, s, batch.prompt, batch.prompt_valid, batch.seeds)
    for phi in (from_prompt, write(model, s, batch)[0]):
        assert all(not w.requires_grad and w.grad_fn is None for pair in phi.values() for w in pair)
    MemDLM(model, s)(batch)
    assert all(bool((p.grad == 7).all()) for p in model.parameters())


# ---- 3. phi = 0 is the baseline, bit for bit ------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"per_sample": True}, {"adapter": "full"}, {"memory_from": "prompt"}], ids=str)
def test_without_learning_memdlm_is_the_baseline(changes):
    model, batch = toy(), batch_of()
    base, base_record = MemDLM(model, settings(memory=False, **changes))(batch)
    loss, record = MemDLM(model, settings(inner_lr=0.0, **changes))(batch)
    assert torch.equal(loss, base)
    assert all(torch.equal(a, b) for a, b in zip(gradients(loss, model), gradients(base, model)))
    loss, record = MemDLM(model, settings(**changes))(batch, report=True)
    assert torch.equal(record["loss_without"], base) and torch.equal(record["ce_without"], base_record["ce"])
    assert not torch.equal(loss, base) and "loss_without" not in MemDLM(model, settings(**changes))(batch)[1]


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("groups", [1, 3])
def test_fast_weights_at_zero_change_no_bit_and_otherwise_act_as_merged(adapter, groups):
    model, s, batch = toy(), settings(adapter=adapter, scope="ffn+attn", layer_fraction=1.0), batch_of()
    phi = memdlm.fresh_phi(model, s, SEEDS[:groups])
    h = model.embed(batch.x0)
    run = lambda phi: memdlm.upper_layers(model, s, h, batch.valid, phi)
    assert torch.equal(run(phi), run(None))
    phi = {name: tuple(w + 0.1 * memdlm.uniform(range(groups), name, *w.shape[1:]) for w in pair)
           for name, pair in phi.items()}
    out = run(phi)
    for b, one in enumerate(split(phi) * (3 // groups)):
        want = hidden(merged(copy.deepcopy(model).double(), s, one), batch.x0[b, batch.valid[b]], set())
        torch.testing.assert_close(out[b, batch.valid[b]].double(), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, run(None), atol=1e-2)


# ---- 4. A batch is its samples --------------------------------------------------------------------------

@pytest.mark.parametrize("trajectory", ["consistent", "inconsistent", "cover:3"])
@pytest.mark.parametrize("use", ["training", "prompt"])
def test_per_sample_phi_of_a_padded_batch_is_that_of_each_sample_alone(use, trajectory):
    model, s = toy(), settings(per_sample=True, trajectory=trajectory)

    def run(*which):
        batch = batch_of([SIZES[b] for b in which], [SEEDS[b] for b in which])
        if use == "prompt":
            return memdlm.adapt(model, s, batch.prompt, batch.prompt_valid, batch.seeds)[0], 0
        return write(model, s, batch)[0], MemDLM(model, s)(batch)[0].detach() * batch.maskable.sum()

    (phi, loss), alone = run(0, 1, 2), [run(b) for b in range(3)]
    torch.testing.assert_close(loss, sum(loss for _, loss in alone))
    for name, pair in phi.items():
        for k, w in enumerate(pair):
            torch.testing.assert_close(w, torch.cat([one[name][k] for one, _ in alone]), rtol=1e-4, atol=2e-6)


def test_alone_shared_and_per_sample_phi_agree_exactly():
    model, batch = toy(), batch_of(SIZES[:1], SEEDS[:1])
    one, other = (MemDLM(model, settings(per_sample=flag))(batch)[0] for flag in (False, True))
    assert torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(gradients(one, model), gradients(other, model)))


# ---- 5. Masks -------------------------------------------------------------------------------------------

def some(n, of):
    """n of the True positions of `of` [1, L], from the right."""
    return of & (of.flip(1).cumsum(1).flip(1) <= n)


@hypothesis_settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([1.0, 1.25, 1.5, 1.75, 2.0, 9.0]),
       st.sampled_from([2, 3, 4, 7]), st.integers(0, 10 ** 6))
def test_states_walk_from_the_pre_anchor_down_to_exactly_the_anchor(n, m, pre_scale, K, seed):
    m, s = min(n, m), settings(pre_scale=pre_scale, inner_steps=K)
    maskable = some(n, torch.arange(45)[None] % 8 != 3)
    n = int(maskable.sum())
    masked = some(min(m, n), maskable)
    m = int(masked.sum())
    masks, ratios = memdlm.consistent(s, masked, maskable, None, [seed])
    assert len(masks) == K + 1 and ratios is None and torch.equal(masks[-2], masked) and not masks[-1].any()
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
        masks, _ = memdlm.consistent(settings(pre_scale=float(text)), some(m, maskable), maskable, None, [0])
        assert masks[0].sum() == int(Fraction(text) * m)


def test_extra_and_revealed_masks_are_spread_evenly():
    maskable, seeds = torch.ones(1000, 9, dtype=torch.bool), list(range(1000))
    masked = torch.arange(9).expand(1000, 9) < 4
    masks, _ = memdlm.consistent(settings(inner_steps=3, pre_scale=1.75), masked, maskable, None, seeds)
    for mask, expected in zip(masks, (600, 200)):  # 3 of 5 free positions, then 3 - ceil(3 / 2) = 1 of 5
        assert mask[:, :4].all() and (mask[:, 4:].sum(0) - expected).abs().max() < 70


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 30), st.integers(1, 8), st.integers(0, 10 ** 6))
def test_cover_is_disjoint_even_and_covers(n, K, seed):
    maskable = some(n, torch.arange(40)[None] % 7 != 2)
    masks, _ = memdlm.cover(settings(trajectory=f"cover:{K}"), maskable, maskable, None, [seed])
    counts = [int(mask.sum()) for mask in masks]
    assert torch.equal(sum(mask.long() for mask in masks), maskable.long())
    assert len(masks) == K + 1 and counts.pop() == 0 and max(counts) - min(counts) <= 1


def test_noise_masks_a_share_t_of_the_maskable_tokens_and_nothing_else():
    x0, t = torch.arange(4000).expand(4, 4000) % MASK, torch.tensor([0.0, 0.1, 0.7, 1.0])
    maskable = torch.arange(4000).expand(4, 4000) >= 500
    xt, masked = memdlm.corrupt(x0, maskable, t, memdlm.uniform(range(4), "anchor", 4000), MASK)
    assert torch.equal(xt == MASK, masked) and torch.equal(xt[~masked], x0[~masked]) and not masked[:, :500].any()
    share = masked[:, 500:].float().mean(1)
    assert share[0] == 0 and share[3] == 1 and (share - t).abs().max() < 0.02
    edge = memdlm.corrupt(x0, maskable, t, torch.zeros(4, 4000), MASK)[1]
    assert not edge[0].any() and edge[1, 500:].all()  # u = 0: never at t = 0, always above


@pytest.mark.parametrize("trajectory", ["consistent", "pre_only", "anchor_only", "inconsistent", "cover:3"])
@pytest.mark.parametrize("target", ["clean", "anchor_tokens"])
@pytest.mark.parametrize("weighted", [True, False])
def test_stages_position_by_position(trajectory, target, weighted):
    """Inputs, loss positions, weights and teacher inputs; prompt and padding are never masked."""
    s = settings(trajectory=trajectory, stage1_target=target, inner_steps=3)
    batch = batch_of()
    rows = plain_noise(s, batch)
    masked = torch.tensor([[i in row[2] for i in range(batch.x0.shape[1])] for row in rows])
    t = torch.tensor([row[3] for row in rows])
    path = memdlm.stages(s, batch.x0, masked, batch.maskable, t, SEEDS, MASK, weighted)
    assert len(path) == {"pre_only": 2, "anchor_only": 1}.get(trajectory, 3)
    for b, row in enumerate(rows):
        plain = plain_path(s, len(row[0]), *row[1:], weighted)
        assert len(plain) == len(path)
        for stage, (now, targets, weight, after) in zip(path, plain):
            assert set(positions(stage.x[b] == MASK)) == now <= set(row[1])
            assert set(positions(stage.next_x[b] == MASK)) == after
            assert positions(stage.targets[b]) == targets
            assert float(stage.weight[b]) == pytest.approx(weight, rel=3e-7)  # the 1e-6 is 3 to 10 times that
            for x, masks in ((stage.x, now), (stage.next_x, after)):
                assert all(x[b, i] == batch.x0[b, i] for i in range(x.shape[1]) if i not in masks)


@pytest.mark.parametrize("trajectory", ["consistent", "pre_only", "anchor_only", "inconsistent", "cover:3"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_samples_with_nothing_to_mask_cost_nothing_and_break_nothing(trajectory, per_sample):
    model, batch = toy(), batch_of(((4, 0), (5, 1), (3, 6)))
    s = settings(trajectory=trajectory, per_sample=per_sample, min_t=1.0)  # all masked
    loss, record = MemDLM(model, s)(batch, report=True)
    assert all(bool(torch.isfinite(x).all()) for x in [loss, *record.values(), *gradients(loss, model)])
    assert record["skipped"] == 0
    nothing = replace(batch, maskable=batch.maskable & False)
    loss, record = MemDLM(model, s)(nothing)
    assert loss == 0 and record["ce"] == 0 and not record["inner"].any()
    assert not any(g.any() for g in gradients(loss, model))
    phi, _ = write(model, s, nothing)
    phi0 = memdlm.fresh_phi(model, s, SEEDS if per_sample else SEEDS[:1])
    assert all(torch.equal(w, w0) for name in phi for w, w0 in zip(phi[name], phi0[name]))


@pytest.mark.parametrize("ratio, masks", [(0.0, 1), (1.0, 6)])
def test_a_prompt_has_at_least_one_mask(ratio, masks):
    model, s = toy(), settings(anchor_ratio=ratio, pre_scale=1.0)
    prompt = torch.arange(6)[None]
    memdlm.adapt(model, s, prompt, prompt >= 0, [0])
    assert [int((x == MASK).sum()) for x in model.embeds] == [masks, masks]


@pytest.mark.parametrize("trajectory", ["consistent", "inconsistent", "cover:3"])
def test_short_prompts_are_always_adapted(trajectory):
    model, s = toy(), settings(trajectory=trajectory)
    prompt = torch.arange(8)[:, None]
    phi, _ = memdlm.adapt(model, s, prompt, prompt >= 0, list(range(8)))
    assert all(bool((B.flatten(1) != 0).any(1).all()) for _, B in phi.values())


# ---- 6. Every variant of the inner loop -----------------------------------------------------------------

VARIANTS = [{}, *({"inner_loss": kind} for kind in ("kl", "reverse_kl", "hidden_mse", "hidden_cosine")),
            {"stage1_target": "anchor_tokens"}, {"stage1_target": "anchor_tokens", "inner_loss": "kl"},
            {"trajectory": "pre_only"}, {"trajectory": "anchor_only"}, {"trajectory": "cover:3"},
            {"trajectory": "anchor_only", "inner_loss": "kl"}, {"trajectory": "inconsistent"},
            {"trajectory": "inconsistent", "inner_loss": "reverse_kl"}, {"inner_steps": 3}, {"pre_scale": 2.0},
            {"clip_norm": 0.5}, {"clip": "global"}, {"clip": "global", "clip_norm": 2.0}, {"clip": "none"},
            {"scope": "ffn+attn"}, {"layer_fraction": 0.25}, {"layer_fraction": 1.0, "inner_loss": "hidden_mse"},
            {"adapter": "full"}, {"adapter": "full", "clip": "global", "scope": "ffn+attn"}]


@pytest.mark.parametrize("use", ["training, shared", "training, per sample", "prompt"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_inner_loop_against_the_plain_one(changes, use):
    model, batch, s = toy(layers=3), batch_of(), settings(per_sample=use == "training, per sample", **changes)
    phi0 = split(memdlm.fresh_phi(model, s, SEEDS[:1] if use == "training, shared" else SEEDS))
    if use == "prompt":
        phi, record = memdlm.adapt(model, s, batch.prompt, batch.prompt_valid, SEEDS)
        want, losses = plain_inner_loop(model, s, plain_prompts(s, batch), phi0, weighted=False)
    else:
        phi, record = write(model, s, batch)
        want, losses = plain_inner_loop(model, s, plain_noise(s, batch), phi0, weighted=True)
    assert record["inner"].tolist() == pytest.approx(losses, rel=1e-4, abs=1e-6) and record["skipped"] == 0
    assert_same_walk(phi, phi0, want)
    assert any((w != w0).any() for name in want[0] for w, w0 in zip(want[0][name], phi0[0][name]))


def test_phi_0_is_seeded_kaiming_uniform_times_zero():
    model, s = toy(), settings(rank=200, scope="ffn+attn")
    phi = memdlm.fresh_phi(model, s, SEEDS)
    alone = memdlm.fresh_phi(model, s, SEEDS[1:2])
    assert set(phi) == {f"layers.1.{name}_proj" for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate",
                                                             "mlp.up", "mlp.down")}
    for name, (A, B) in phi.items():
        matrix = model.get_submodule(name).weight
        limit = matrix.shape[1] ** -0.5
        assert A.shape[1:] == (200, matrix.shape[1]) and B.shape[1:] == (matrix.shape[0], 200) and not B.any()
        assert 0.98 * limit < A.max() <= limit and -limit <= A.min() < -0.98 * limit and A.mean().abs() < 0.03 * limit
        assert A.dtype == B.dtype == torch.float32 and torch.equal(A[1], alone[name][0][0])
        assert not torch.equal(A[0], A[1])
    gate, up = phi["layers.1.mlp.gate_proj"][0], phi["layers.1.mlp.up_proj"][0]
    assert not torch.equal(gate, up)
    with pytest.raises(ValueError, match="no matrix"):
        memdlm.fresh_phi(Table(torch.zeros(2, V)), s, [0])


@pytest.mark.parametrize("layers, fraction, first", [(16, 0.1, 14), (20, 0.1, 18), (16, 0.05, 15), (20, 0.05, 19),
                                                     (16, 0.25, 12), (20, 0.5, 10), (2, 0.1, 1), (1, 0.1, 0),
                                                     (4, 1.0, 0), (4, 0.1, 3), (4, 0.3, 2), (4, 0.0, 3)])
def test_fast_weights_sit_in_the_last_share_of_the_layers(layers, fraction, first):
    assert memdlm.first_fast_layer(layers, fraction) == first


# ---- 7. No trace ----------------------------------------------------------------------------------------

def trace(model, batch):
    """Everything that must be as before."""
    out = model.head(model.blocks(model.embed(batch.x0), batch.valid, 0, None)).detach()
    return out, {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]


@pytest.mark.parametrize("use", ["with", "adapt", "denoise", "train"])
@pytest.mark.parametrize("fail_at", [None, 1, 2, 3, 4])
def test_the_model_is_as_before_whatever_happens(use, fail_at):
    model, s, batch = toy(), settings(scope="ffn+attn"), batch_of()
    model.train()
    model.layers[0].eval()
    model.layers[1].mlp.eval()
    out, weights, modes = trace(model, batch)
    phi = memdlm.adapt(model, s, batch.prompt, batch.prompt_valid, SEEDS)[0]
    model.watch(fail_at)

    def within():
        with memdlm.fast_weights(model, s, phi):
            assert hooks(model) == 7
            for _ in range(4):
                model.blocks(model.embed(batch.x0), batch.valid, 0, None)

    run = {"with": within, "adapt": lambda: memdlm.adapt(model, s, batch.prompt, batch.prompt_valid, SEEDS),
           "denoise": lambda: list(memdlm.denoise(model, s, batch.x0, batch.maskable, batch.valid, SEEDS, phi)),
           "train": lambda: MemDLM(model, s)(batch)}[use]
    if fail_at:
        with pytest.raises(RuntimeError, match="broken"):
            run()
    else:
        run()
        assert any(model.modes) == (use != "adapt")  # no dropout while adapting
    assert hooks(model) == 0 and torch.is_grad_enabled()
    again, weights_now, modes_now = trace(model.watch(), batch)
    assert torch.equal(out, again) and modes == modes_now and list(weights) == list(weights_now)
    assert all(torch.equal(weights[k], weights_now[k]) for k in weights)


def test_an_unknown_matrix_leaves_no_hook():
    model, s = toy(), settings()
    phi = memdlm.fresh_phi(model, s, [0])
    with pytest.raises(KeyError), memdlm.fast_weights(model, s, phi | {"elsewhere": next(iter(phi.values()))}):
        pass
    assert hooks(model) == 0


def test_matrices_that_the_forward_pass_skips():
    """An idle one (an expert that no token chose) keeps its phi_0; if all are idle, that is an error."""
    model, s, batch = toy(), settings(), batch_of()
    named = model.matrices(1, "ffn")
    idle = nn.Linear(16, 16)
    model.matrices = lambda first, scope: named | {"idle": idle}
    phi, record = write(model, s, batch)
    start = memdlm.fresh_phi(model, s, SEEDS[:1])
    assert record["skipped"] == 0 and all(torch.equal(w, w0) for w, w0 in zip(phi["idle"], start["idle"]))
    assert all(phi[name][1].any() for name in named)
    model.matrices = lambda first, scope: {"idle": idle}
    with pytest.raises(RuntimeError, match="no fast weight"):
        write(model, s, batch)
    assert hooks(model) == 0


def test_a_phi_for_another_number_of_rows_is_refused():
    model, s, batch = toy(), settings(), batch_of()
    with pytest.raises(ValueError, match="2 samples"):
        memdlm.upper_layers(model, s, model.embed(batch.x0), batch.valid, memdlm.fresh_phi(model, s, SEEDS[:2]))
    assert hooks(model) == 0


# ---- 8. Non-finite steps --------------------------------------------------------------------------------

def test_samples_that_are_not_finite_keep_their_phi_and_the_others_step():
    model, s, batch = toy(), settings(per_sample=True), batch_of()
    good, _ = write(model, s, batch)
    poison = [int(x) for b in (1, 2) for x in batch.x0[b, batch.valid[b]] if x not in batch.x0[0]]
    with torch.no_grad():
        model.embedding.weight[poison] = math.nan
    phi, record = write(model, s, batch)
    phi0 = memdlm.fresh_phi(model, s, SEEDS)
    assert record["skipped"] == 4  # two samples, both stages
    for name in phi:
        for w, w0, w1 in zip(phi[name], phi0[name], good[name]):
            assert torch.equal(w[1:], w0[1:])
            torch.testing.assert_close(w[0], w1[0], rtol=1e-5, atol=1e-6)
    shared, record = write(model, settings(), batch)
    assert record["skipped"] == 2 and all(torch.equal(w[0], w0[0]) for n in phi0 for w, w0 in zip(shared[n], phi0[n]))


@pytest.mark.parametrize("clip", ["local", "global", "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_is_taken_only_if_loss_and_gradient_are_finite(clip, bad, where):
    s = settings(clip=clip)
    phi = {"w": (torch.ones(3, 2, 4), torch.ones(3, 5, 2))}
    grads, loss = [torch.full_like(w, 0.1) for w in phi["w"]], torch.ones(3)
    (loss if where == "loss" else grads[1][:, 0, 0])[1] = bad
    new, taken = memdlm.sgd_step(s, phi, grads, loss)
    assert taken.tolist() == [True, False, True]
    for w in new["w"]:
        assert (w[1] == 1).all()
        torch.testing.assert_close(w[[0, 2]], torch.full_like(w[:2], 1 - 0.5 * 0.1))


# ---- 9. Nothing is computed twice -----------------------------------------------------------------------

def test_the_anchor_prefix_is_computed_once_and_the_head_sees_masked_rows_only():
    model, s, batch = toy(layers=4), settings(), batch_of()
    paths = [plain_path(s, len(row[0]), *row[1:], True) for row in plain_noise(s, batch)]
    pre, anchor = (sum(len(path[k][1]) for path in paths) for k in (0, 1))
    assert anchor < pre < 21
    MemDLM(model, s)(batch)
    # The anchor's prefix, the pre-anchor's; two inner steps on top of them as constants, the outer pass with gradient.
    inner = [(0, 2, False), (2, None, False), (2, None, False)]
    assert model.runs == [(0, 2, True), *inner, (2, None, True)]
    assert [int((x == MASK).sum()) for x in model.embeds] == [anchor, pre] and model.heads == [pre, anchor, anchor]
    model.watch()
    MemDLM(model, s)(batch, report=True)
    assert len(model.embeds) == 2 and len(model.runs) == 6 and model.heads == [pre, anchor, anchor, anchor]
    model.watch()
    MemDLM(model, settings(memory=False))(batch)
    assert model.runs == [(0, 2, True), (2, None, True)] and model.heads == [anchor]
    model.watch()
    memdlm.adapt(model, s, batch.prompt, batch.prompt_valid, SEEDS)
    assert model.runs == inner[:2] * 2  # a prompt has no outer pass to share with


@pytest.mark.parametrize("kind", list(memdlm.INNER_LOSSES))
def test_logits_in_chunks_change_nothing_but_how_many_are_held(kind, monkeypatch):
    """Loss, phi and the outer gradient with two rows of logits at a time, as with all at once."""
    s, results = settings(inner_loss=kind, per_sample=True), []
    for limit in (backbone.LOGITS, 2 * V):
        monkeypatch.setattr(backbone, "LOGITS", limit)
        model = toy(kind=Chunked)
        loss, record = MemDLM(model, s)(batch_of(), True)
        results.append([loss, record["inner"], record["loss_without"], *gradients(loss, model)])
        assert limit > 2 * V or max(model.heads) <= 2
        decoded = list(memdlm.denoise(model, s, batch_of().x0, batch_of().maskable, batch_of().valid, SEEDS, temperature=0.5))
        results[-1] += [decoded[-1].float()]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(memdlm.INNER_LOSSES))
def test_row_gradients_taken_early_are_those_of_autograd(kind, monkeypatch):
    """Under a head that is not trained: two rows of logits at a time, each computed once and none kept."""
    monkeypatch.setattr(backbone, "LOGITS", 16 * 2 * V)  # on a CPU a sixteenth of it
    model, generator = toy(kind=Chunked).double(), torch.Generator().manual_seed(5)
    for module in (model.norm, model.lm_head):
        module.requires_grad_(False)
    h = torch.randn(7, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    rest = [torch.randint(2, V, (7,), generator=generator)]
    rest += [torch.randn(7, 16, generator=generator, dtype=torch.float64)] * (kind != "ce")
    factor, loss = torch.rand(7, generator=generator, dtype=torch.float64), memdlm.INNER_LOSSES[kind]
    plain, = torch.autograd.grad((factor * loss(model.head, h, *rest)).sum(), h)
    model.watch()
    out = model.per_row(loss, h, *rest)
    assert [[kept.shape for kept in part.saved_tensors] for part, _ in out.grad_fn.next_functions] == [[(2, 16)]] * 3 + [[(1, 16)]]
    early, = torch.autograd.grad((factor * out).sum(), h)
    assert sum(model.heads) == {"ce": 7, "kl": 14, "reverse_kl": 14}.get(kind, 0) and max(model.heads, default=0) <= 2
    torch.testing.assert_close(out, loss(model.head, h, *rest))
    torch.testing.assert_close(early, plain, rtol=1e-5, atol=1e-7)  # the losses are float32


def test_rows_of_several_samples_in_one_input_get_each_their_own_phi():
    """An expert's input [N, in]: `rows_per_sample` rows of each sample, one after another, some of none."""
    expert, generator = nn.Linear(3, 2, bias=False), torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(shape, generator=generator) for shape in ((6, 3), (4, 5, 3), (4, 2, 5)))
    expert.rows_per_sample = [2, 0, 3, 1]
    out = memdlm.per_sample_product(memdlm.low_rank, expert, x, (A, B))
    for row, sample in enumerate([0, 0, 2, 2, 2, 3]):
        torch.testing.assert_close(out[row], B[sample] @ (A[sample] @ x[row]))
    delta = torch.randn(4, 2, 3, generator=generator)
    out = memdlm.per_sample_product(memdlm.full_rank, expert, x, (delta,))
    torch.testing.assert_close(out[5], delta[3] @ x[5])
    with pytest.raises(ValueError, match="phi is for 2 samples, the input has 4"):
        memdlm.per_sample_product(memdlm.low_rank, expert, x, (A[:2], B[:2]))


# ---- 10. Decoding ---------------------------------------------------------------------------------------

class Table(nn.Module):
    """Logits by position, table [L, V]; plus `shift` [V] wherever the row's first token is hidden."""
    num_layers, mask_id, vocab_size = 1, MASK, V

    def __init__(self, table, shift=None):
        super().__init__()
        self.table, self.shift = table, torch.zeros(V) if shift is None else shift

    def embed(self, ids):
        here = torch.eye(ids.shape[1]).expand(len(ids), -1, -1)
        return torch.cat([here, (ids[:, :1, None] == MASK).float().expand(-1, ids.shape[1], -1)], -1)

    def blocks(self, h, valid, start, stop, need=None):
        return h

    def per_row(self, f, h, *rest):
        return f(lambda h: h[:, :-1] @ self.table + h[:, -1:] * self.shift, h, *rest)

    def matrices(self, first, scope):
        return {}


def table(L, seed=0):
    return torch.randn(L, V, generator=torch.Generator().manual_seed(seed))


def decode(model, batch, s=None, **options):
    canvases = memdlm.denoise(model, s or settings(), batch.x0, batch.maskable, batch.valid, batch.seeds, **options)
    start = torch.where(batch.maskable, MASK, batch.x0)
    return [start, *canvases]


def commits(canvases):
    """For each step and row, the set of positions that it filled in."""
    return [[set(positions(a != b)) for a, b in zip(old, new)] for old, new in zip(canvases, canvases[1:])]


@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"steps": 50}, {"block_length": 3, "steps": 9},
                                     {"temperature": 2.0}, {"remasking": "random"},
                                     {"cfg_scale": 1.0, "block_length": 3}], ids=str)
def test_every_gap_is_filled_once_with_a_real_token_and_the_rest_is_left_alone(options):
    favoured = table(15)
    favoured[:, MASK] += 1e4
    batch = batch_of()
    canvases = decode(Table(favoured), batch, **options)
    assert not (canvases[-1] == MASK).any() and torch.equal(canvases[-1][~batch.maskable], batch.x0[~batch.maskable])
    for old, new in zip(canvases, canvases[1:]):
        assert torch.equal(new[old != MASK], old[old != MASK]) and not torch.equal(old, new)  # final once committed


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 40), st.integers(1, 40))
def test_quota_is_even_and_complete(n, steps):
    counts = [int(memdlm.quota(torch.tensor([n]), steps, torch.tensor(k))) for k in range(steps)]
    assert sum(counts) == n and max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)


def test_steps_counts_and_blocks_from_left_to_right():
    run = lambda **options: commits(decode(Table(table(15)), batch_of(), **options))
    sizes = lambda **options: [[len(filled) for filled in step] for step in run(**options)]
    assert sizes() == [[int(k < n) for n in (7, 5, 9)] for k in range(9)]
    assert sizes(steps=4) == [[2, 2, 3], [2, 1, 2], [2, 1, 2], [1, 1, 2]]
    assert sizes(steps=1) == [[7, 5, 9]]
    assert sizes(steps=6, block_length=3) == [[2, 2, 2], [1, 1, 1], [2, 1, 2], [1, 1, 1], [1, 0, 2], [0, 0, 1]]
    for k, step in enumerate(run(steps=6, block_length=3)):  # two steps for each block of three gaps
        assert all((i - prompt) // 3 == k // 2 for filled, (prompt, _) in zip(step, SIZES) for i in filled)


def test_without_steps_one_token_is_committed_at_a_time_in_blocks_too():
    filled = commits(decode(Table(table(15)), batch_of(), block_length=4))
    assert all(len(step[b]) <= 1 for step in filled for b in range(3))


def test_low_confidence_commits_the_most_probable_tokens_first():
    logits = 2 * table(15)
    batch = batch_of(SIZES[2:], SEEDS[2:])
    canvases = decode(Table(logits), batch, steps=4)
    p = logits[:, :MASK].softmax(-1)  # MASK is the last entry
    ranking = sorted(positions(batch.maskable[0]), key=lambda i: -float(p[i].max()))
    assert [step[0] for step in commits(canvases)] == [set(ranking[i:j]) for i, j in ((0, 3), (3, 5), (5, 7), (7, 9))]
    assert all(canvases[-1][0, i] == p[i].argmax() for i in ranking)


def far(observed, expected):
    """Chi-square statistic in standard deviations above its mean."""
    keep = expected > 0
    chi, freedom = ((observed - expected)[keep] ** 2 / expected[keep]).sum(), keep.sum() - 1
    return float((chi - freedom) / (2 * freedom) ** 0.5)


def same_rows(n, gaps):
    """n rows "0 gap gap ..." that differ in their seeds alone."""
    x0 = torch.zeros(n, gaps + 1, dtype=torch.long)
    return Batch(x0, torch.arange(gaps + 1).expand_as(x0) > 0, x0 == 0, [f"row {i}" for i in range(n)], x0, x0 == 0)


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0])
def test_temperature_samples_the_tempered_distribution(T):
    logits = table(2)
    logits[:, MASK] = 5.0
    tokens = decode(Table(logits), same_rows(3000, 1), temperature=T)[-1][:, 1]
    expected = torch.cat([(logits[1, :MASK] / T).softmax(-1), torch.zeros(1)]) * 3000
    assert far(torch.bincount(tokens, minlength=V), expected) < 3


def test_each_step_samples_anew():
    """Two gaps of the same odds, one after the other: all pairs of tokens are as frequent as if independent."""
    logits = torch.full((3, V), -1e4)
    logits[1:, :3] = 0.0
    tokens = decode(Table(logits), same_rows(1800, 2), temperature=1.0, block_length=1)[-1]
    assert far(torch.bincount(3 * tokens[:, 1] + tokens[:, 2], minlength=9).float(), torch.full((9,), 200.0)) < 3


def test_confidence_is_the_plain_probability_of_the_sampled_token():
    """Gaps of [.9 .1] and [.4 .35 .25]: the second is committed first whenever the first has drawn its .1."""
    logits = torch.full((3, V), -1e4)
    logits[1, :2], logits[2, :3] = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.4, 0.35, 0.25]).log()
    first = decode(Table(logits), same_rows(2000, 2), temperature=1.0)[1]
    sure = first[:, 1] != MASK
    assert (first[sure, 1] == 0).all() and abs(int(sure.sum()) - 1800) < 45


def test_random_remasking_takes_any_position_and_still_the_best_token():
    logits = 3 * table(5)
    canvases = decode(Table(logits), same_rows(2000, 4), remasking="random")
    firsts = torch.tensor([min(row) for row in commits(canvases)[0]])
    assert far(torch.bincount(firsts, minlength=5).float(), torch.tensor([0, 500.0, 500, 500, 500])) < 3
    assert (canvases[-1][:, 1:] == logits[1:, :MASK].argmax(-1)).all()


def test_guidance_moves_away_from_the_blind_logits():
    """cfg:  blind + (w + 1) (seen - blind), where blind sees no given token but its own commits."""
    logits, shift, x = table(6), 3 * table(1, seed=1)[0], torch.tensor([[4, 5, MASK, 7, MASK, 1]])
    model, where, given_ = Table(logits, shift), x == MASK, torch.tensor([[True, True, False, False, False, False]])
    seen, blind = (model.embed(ids)[where] for ids in (x, torch.where(given_, MASK, x)))
    tokens, probability = memdlm.pick_tokens(model, seen, blind, cfg_scale=1.5)
    expected = ((logits - 1.5 * shift)[[2, 4]]).double()
    expected[:, MASK] = -math.inf
    assert torch.equal(tokens, expected.argmax(-1)) and not torch.equal(tokens, logits[[2, 4], :MASK].argmax(-1))
    torch.testing.assert_close(probability, expected.softmax(-1).amax(-1))
    model, batch = toy(), batch_of()
    decode(model, batch, cfg_scale=1.0, steps=2)
    seen, blind = model.embeds[2:]
    prompt = batch.valid & ~batch.maskable
    assert (blind[prompt] == MASK).all() and torch.equal(seen[prompt], batch.x0[prompt])
    assert torch.equal(blind[batch.maskable], seen[batch.maskable]) and (seen[batch.maskable] != MASK).any()


@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"temperature": 1.0}, {"remasking": "random", "cfg_scale": 0.5}],
                         ids=str)
def test_decoding_a_ragged_batch_with_own_phis_is_decoding_each_row(options):
    model, s, batch = toy(), settings(inner_lr=5.0), batch_of()
    phi, _ = memdlm.adapt(model, s, batch.prompt, batch.prompt_valid, SEEDS)
    together, without = decode(model, batch, s, phi=phi, **options), decode(model, batch, s, **options)
    for b in range(3):
        one, row = batch_of(SIZES[b:b + 1], SEEDS[b:b + 1]), {n: tuple(w[b:b + 1] for w in p) for n, p in phi.items()}
        alone = decode(model, one, s, phi=row, **options)
        for canvas, want in zip(together[1:], alone[1:]):
            assert torch.equal(canvas[b, :sum(SIZES[b])], want[0])
        assert torch.equal(together[-1][b, :sum(SIZES[b])], alone[-1][0])
    assert not torch.equal(together[-1], without[-1])


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"remasking": "random"}], ids=str)
def test_seeds_decide(options):
    batch = batch_of(SIZES[2:], [1])
    run = lambda seed: torch.stack(decode(Table(table(15)), replace(batch, seeds=[seed]), **options))
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_nothing_to_fill_yields_nothing():
    batch = batch_of()
    assert decode(toy(), replace(batch, maskable=batch.maskable & False))[1:] == []


# ---- 11. Exposure bias ----------------------------------------------------------------------------------

RATIOS = [1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01]


def plain_exposure(model, x0, gaps, seed, ratios):
    """Eq. 3-4 for one sample without padding: [static, sequential, matched] curves."""
    u, canvas, open_ = draw(seed, "static", len(x0)), x0.clone(), set(gaps)
    shuffled, curves = sorted(gaps, key=u.__getitem__), ([], [], [])
    log_p = lambda ids, masks: model.head(hidden(model, ids, masks)).log_softmax(-1)
    for ratio in ratios:
        keep = max(1, int(Fraction(str(ratio)) * len(gaps)))
        guess = log_p(canvas, open_)[:, :MASK].log_softmax(-1)  # the mask token, the last, is no answer
        for i in sorted(open_, key=lambda i: -float(guess[i].max()))[:max(0, len(open_) - keep)]:
            canvas[i] = guess[i].argmax()
            open_.remove(i)
        for curve, ids, masks in zip(curves, (x0, canvas, x0), (set(shuffled[:keep]), open_, open_)):
            lp = log_p(ids, masks)
            curve.append(sum(-float(lp[i, x0[i]]) for i in masks) / len(masks))
    return curves


@torch.no_grad()
@pytest.mark.parametrize("with_phi", [False, True])
def test_exposure_bias_against_loops(with_phi):
    model, s, batch = toy(), settings(), batch_of()
    phi = memdlm.adapt(model, s, batch.prompt, batch.prompt_valid, SEEDS)[0] if with_phi else None
    got = memdlm.exposure_bias(model, s, batch.x0, batch.maskable, batch.valid, SEEDS, RATIOS, phi)
    for b in range(3):
        plain = merged(copy.deepcopy(model).double(), s, split(phi)[b] if phi else {})
        want = plain_exposure(plain, batch.x0[b, batch.valid[b]], positions(batch.maskable[b]), SEEDS[b], RATIOS)
        for name, curve in zip(("static", "sequential", "matched"), want):
            assert got[name][:, b].tolist() == pytest.approx(curve, rel=1e-4), name
    assert torch.equal(got["static"][0], got["sequential"][0]) and torch.equal(got["static"][0], got["matched"][0])
    assert not torch.allclose(got["static"][3], got["sequential"][3])
    assert not torch.allclose(got["matched"][3], got["sequential"][3])


def test_an_oracle_has_no_exposure_bias():
    """Always right: its own tokens are the truth. Equally sure everywhere: position does not matter either."""
    batch = batch_of(SIZES[:1], SEEDS[:1])
    run = lambda logits: memdlm.exposure_bias(Table(logits), settings(), batch.x0, batch.maskable, batch.valid, SEEDS[:1], RATIOS)
    sure = 9 * nn.functional.one_hot(batch.x0[0], V).float()
    curves = run(sure)
    torch.testing.assert_close(curves["sequential"], curves["static"])
    curves = run(sure * torch.linspace(1, 2, len(sure))[:, None])
    assert torch.equal(curves["sequential"], curves["matched"]) and not torch.equal(curves["static"], curves["matched"])


# ---- 12. Settings and randomness ------------------------------------------------------------------------

@pytest.mark.parametrize("name, value", [
    ("trajectory", "cover"), ("trajectory", "cover:0"), ("trajectory", "cover:00"), ("trajectory", "cover:x"),
    ("trajectory", "consistent:"), ("trajectory", "consistent:2"), ("trajectory", "nonsense"), ("inner_loss", "mse"),
    ("stage1_target", "all"), ("clip", "l2"), ("scope", "attn"), ("adapter", "dora"), ("memory_from", "both"),
    ("inner_steps", 1), ("rank", 0), ("layer_fraction", 0.0),
    ("layer_fraction", 1.1), ("pre_scale", 0.9), ("pre_scale", math.nan), ("anchor_ratio", -0.1), ("anchor_ratio", 1.1),
    ("inner_lr", -1.0), ("inner_lr", math.nan), ("clip_norm", 0.0), ("min_t", 0.0), ("min_t", 1.5)])
def test_a_bad_setting_is_named_in_one_line(name, value):
    with pytest.raises(ValueError) as error:
        Settings(**{name: value})
    assert name in str(error.value) and str(value) in str(error.value) and "\n" not in str(error.value)


def test_defaults_are_the_papers():
    s = Settings()
    assert (s.trajectory, s.inner_steps, s.inner_loss, s.stage1_target) == ("consistent", 2, "ce", "clean")
    assert (s.pre_scale, s.inner_lr, s.clip, s.clip_norm) == (1.5, 0.1, "local", 1.0)
    assert (s.anchor_ratio, s.min_t) == (0.2, 1e-3)
    assert (s.layer_fraction, s.scope, s.adapter, s.rank, s.alpha) == (0.1, "ffn", "lora", 32, 64.0)
    assert (s.memory, s.memory_from, s.closed_book, s.per_sample) == (True, "response", False, False)


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10 ** 9), st.integers(0, 10 ** 9), st.integers(0, 70), st.integers(0, 70))
def test_random_rows_depend_on_seed_and_purpose_alone(seed, other, short, long):
    short, long = sorted((short, long))
    row = memdlm.uniform([seed], "anchor", long)[0]
    assert torch.equal(memdlm.uniform([other, seed], "anchor", long)[1], row)      # in any batch
    assert torch.equal(memdlm.uniform([seed], "anchor", short)[0], row[:short])    # at any padding
    assert bool(((row >= 0) & (row < 1)).all())
    if short > 2:
        assert not torch.equal(memdlm.uniform([seed], "static", long)[0], row)
        assert seed == other or not torch.equal(memdlm.uniform([other], "anchor", long)[0], row)
