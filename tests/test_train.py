"""The loop of train.py, each part against a second derivation by plain means.

A toy with dropout stands for a real model: its LoRA has dropout, and the toy has none.
"""
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from backbones.families import PUBLISHED
from data import Sample, collate
from memdlm import MemDLM
from runs import build, load_checkpoint, save_checkpoint
from settings import Settings
from toy.data import ToyData
from toy.model import ToyConfig, ToyDLM

SMALL = dict(data="retrieval", width=16, layers=1, heads=2, steps=5, batch=2, accumulate=2,
             memory=False, control=False, log_every=3, sample_every=0, threads=1)


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- A step -------------------------------------------------------------------------------------

def test_a_run_is_adamw_on_clipped_gradients_of_whole_batches(train_into):
    """Five steps of two micro-batches, against AdamW written out on batches of four.

        m = .9 m + .1 g     v = .999 v + .001 g^2     g is clipped to a norm of 0.1
        w = w - lr (0.5 w + m / (1 - .9^k) / (sqrt(v / (1 - .999^k)) + 1e-8))

    The answers of these samples have 1 to 5 tokens, so the micro-batches do not weigh alike.
    """
    s = Settings(**SMALL, lr=0.01, warmup=0.4, grad_clip=0.1, weight_decay=0.5)
    folder = train_into("run", s)
    logged = {line["step"]: line for line in read_metrics(folder)}
    assert list(logged) == [0, 3, 4]  # every third step, and the last

    data, model = build(s)
    weights, start = dict(model.backbone.named_parameters()), model.state_dict()
    start = {name: w.clone() for name, w in start.items()}
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    v = {name: torch.zeros_like(w) for name, w in weights.items()}
    # Two steps of warm-up; then the cosine of 0, 1/3 and 2/3 of the way from peak to zero.
    rates = [0.005, 0.01, 0.01, 0.0075, 0.0025]
    for step, lr in enumerate(rates):
        batch = train.make_batch(replace(s, batch=4), data, step)
        assert len({int(n) for n in batch.maskable.sum(1)}) > 1
        loss, record = model(batch)
        grads = dict(zip(weights, torch.autograd.grad(loss, weights.values())))
        norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
        assert norm > 0.2  # it is clipped
        if step in logged:
            want = {"loss": record["loss"].item(), "ce": record["ce"].item(),
                    "grad_norm": norm, "lr": lr}
            assert {k: logged[step][k] for k in want} == pytest.approx(want, rel=1e-4)
        for name, w in weights.items():
            g, k = grads[name] * 0.1 / norm, step + 1
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            move = m[name] / (1 - 0.9 ** k) / ((v[name] / (1 - 0.999 ** k)).sqrt() + 1e-8)
            w.data = w.data - lr * (0.5 * w.data + move)
    saved = load_file(folder / "model.safetensors")
    for name, w in weights.items():
        way = (w.detach() - start[f"backbone.{name}"]).norm()
        assert (saved[f"model.{name}"] - w.detach()).norm() < 1e-3 * way, name


def test_what_is_reported_is_a_mean_over_what_it_counts():
    """Micro-batches with 1 and with 9 answer tokens, at t = 1: all of them are masked.

    The loss and ce are means over tokens, the inner losses over samples.
    """
    s = Settings(**{**SMALL, "memory": True, "min_t": 1.0, "batch": 1})
    data, model = build(s)
    samples = [Sample([5, 6, 7], [8] * n, [True] * n) for n in (1, 9)]
    batches = [collate([sample], [i], False) for i, sample in enumerate(samples)]
    alone = [model(batch, report=True)[1] for batch in batches]
    record = train.compute_gradients(s, model, batches, True, train.Processes())
    for name in ("loss", "ce", "loss_without", "ce_without"):
        want = (1 * alone[0][name] + 9 * alone[1][name]) / 10
        torch.testing.assert_close(record[name], want)
        assert not torch.isclose(alone[0][name], alone[1][name], rtol=1e-3)
    torch.testing.assert_close(record["inner"], (alone[0]["inner"] + alone[1]["inner"]) / 2)


# ---- Which samples, in which order --------------------------------------------------------------

class Numbers:
    """Data that writes down what it is asked for. Sample `number` has that number for a prompt."""
    pairs = {"train": [None] * 23}

    def __init__(self):
        self.asked = []

    def train(self, rng, progress, number):
        self.asked.append((number, progress, rng.random()))
        return Sample([number], [1], [True])


def test_parts_and_processes_share_the_samples_of_a_step():
    """A batch of 2, two micro-batches on each of two processes, 10 steps:

        step 0   process 0   samples 0 1 | 2 3        process 1   samples 4 5 | 6 7
        step 3               samples 24 25 | 26 27                samples 28 29 | 30 31
    """
    s, data = Settings(batch=2, accumulate=2, steps=10, seed=5), Numbers()
    for step, first in ((0, 0), (3, 24)):
        seen, seeds = [], []
        for rank in (0, 1):
            processes = SimpleNamespace(rank=rank, count=2)
            batches = train.make_batches(s, data, step, processes)
            seen += [batch.prompt.flatten().tolist() for batch in batches]
            seeds += [seed for batch in batches for seed in batch.seeds]
        assert seen == [[first + i, first + i + 1] for i in (0, 2, 4, 6)]
        whole = train.make_batch(replace(s, batch=8, accumulate=1), data, step)
        assert whole.seeds == seeds and whole.prompt.flatten().tolist() == sum(seen, [])
    assert {progress for _, progress, _ in data.asked} == {0, 0.3}


def test_steps_samples_and_seeds_draw_differently():
    """Sample 1 of step 2 under seed 3: each of the three numbers counts, for data and masks."""
    data, drawn, seeds = Numbers(), set(), set()
    for seed, step, place in ((3, 2, 1), (4, 2, 1), (3, 1, 1), (3, 2, 0)):
        data.asked = []
        batch = train.make_batch(Settings(batch=2, seed=seed), data, step)
        drawn.add(data.asked[place][2])
        seeds.add(batch.seeds[place])
    assert len(drawn) == len(seeds) == 4


@pytest.mark.parametrize("epochs, batch, accumulate, count, steps", [
    (1, 1, 1, 1, 23), (0.25, 1, 2, 1, 3), (1, 2, 1, 1, 12), (2, 2, 2, 2, 6), (0.01, 8, 1, 1, 1)])
def test_epochs_are_counted_in_samples(epochs, batch, accumulate, count, steps):
    """23 samples; a step that is not full is a step."""
    s = Settings(epochs=epochs, batch=batch, accumulate=accumulate)
    assert train.steps_of_epochs(s, Numbers(), SimpleNamespace(count=count)) == steps


# ---- Dropout ------------------------------------------------------------------------------------

class Dropping(ToyDLM):
    """A toy with dropout on its embeddings. drawn: the masks of each pass in train mode."""
    drawn = []

    def embed(self, ids):
        h = super().embed(ids)
        if self.training:
            keep = F.dropout(torch.ones_like(h), 0.5)
            self.drawn.append(keep)
            h = h * keep
        return h


drawn_by_run = []  # the masks of each run


def make_dropping(s, **_):
    data = ToyData(s.data)
    config = ToyConfig(data.tokenizer.vocab_size, data.tokenizer.mask_id, 16, 1, 2)
    model = Dropping(config, s.seed)
    model.drawn = drawn_by_run[-1]
    return data, MemDLM(model, s)


def test_dropout_is_new_at_each_step_the_same_when_resumed_and_off_when_measured(
        train_into, monkeypatch):
    """Held-out losses and samples come between the steps and change nothing."""
    monkeypatch.setattr(train, "build", make_dropping)
    s = Settings(**{**SMALL, "data": "languages", "accumulate": 1, "eval_samples": 2})

    def run(name, s, **options):
        drawn_by_run.append([])
        train_into(name, s, **options)
        return drawn_by_run[-1]

    whole = run("whole", s)
    assert len(whole) == 5  # one pass in train mode per step
    assert not any(torch.equal(whole[i], whole[j]) for i in range(5) for j in range(i))
    shown = run("shown", replace(s, sample_every=1, eval_every=1))
    parts = run("parts", s, stop_after=2) + run("parts", s, resume=True)
    other = run("other", replace(s, seed=1))
    for masks, alike in ((shown, True), (parts, True), (other, False)):
        assert len(masks) == 5
        assert all(torch.equal(a, b) == alike for a, b in zip(whole, masks))


def test_the_optimiser_rounds_anew_at_each_step_and_alike_on_all_processes(
        train_into, monkeypatch):
    """What is drawn while the optimiser steps: by a rank that dropout does not share."""
    made, drawn = train.make_optimizer, []

    def make(s, parameters):
        optimizer, drew = made(s, parameters), []
        drawn.append(drew)
        optimizer.register_step_pre_hook(lambda *_: drew.append(torch.rand(()).item()))
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", make)
    monkeypatch.setattr(train, "build", make_dropping)
    drawn_by_run.append([])
    s = Settings(**{**SMALL, "data": "languages", "accumulate": 1})
    train_into("first", s)
    real = train.step_seeds
    monkeypatch.setattr(train, "step_seeds", lambda s, step, processes: real(
        s, step, SimpleNamespace(rank=1)))
    train_into("second", s)
    first, second = drawn
    assert first == second and len(set(first)) == 5
    one, two = (torch.stack(drawn_by_run[-1][i:i + 5]) for i in (0, 5))
    assert not torch.equal(one, two)  # dropout is another on each process


# ---- Held-out samples ---------------------------------------------------------------------------

@pytest.mark.parametrize("memory", [False, True])
def test_held_out_losses_are_means_over_masks_in_eval_mode(memory):
    """Five samples in batches of two, against each of the five alone, without dropout."""
    drawn_by_run.append([])
    s = Settings(**{**SMALL, "batch": 2, "eval_samples": 5, "memory": memory, "per_sample": True})
    data, model = make_dropping(s)
    values = train.measure_held_out(s, data, model.train())
    assert drawn_by_run[-1] == []
    sums, masks = {"ce": 0.0, "ce_without": 0.0}, 0
    for number in range(5):
        batch = data.tests(list(data.columns)[0], [number], False, "held out")
        _, record = model.eval()(batch, report=True)
        masks += int(record["masked"])
        for name in record.keys() & sums.keys():
            sums[name] += float(record[name]) * int(record["masked"])
    kept = {name: total / masks for name, total in sums.items() if total}
    assert values == pytest.approx(kept, rel=1e-5)
    assert values.keys() == ({"ce", "ce_without"} if memory else {"ce"})


def test_held_out_losses_come_every_so_often_and_at_the_end(train_into):
    folder = train_into("run", Settings(**SMALL, eval_every=2, eval_samples=2))
    held_out = [line["step"] for line in read_metrics(folder) if "held_out_ce" in line]
    assert held_out == [1, 3, 4]


def test_a_sample_of_a_real_model_shows_the_first_tokens_of_the_reply():
    """The first two of three reply tokens, and nothing behind them."""
    batch = collate([Sample([4, 5], [6, 7, 8], [True, True, True])], ["a"], False)
    cut = train.cut_reply(batch, 2)
    assert cut.x0.tolist() == [[4, 5, 6, 7]]
    assert cut.maskable.tolist() == [[False, False, True, True]] and cut.valid.all()
    assert train.cut_reply(batch, 9).x0.tolist() == batch.x0.tolist()


# ---- Runs that start from others ----------------------------------------------------------------

def test_a_run_starts_from_the_weights_of_another(train_into):
    """At a rate of zero it ends with them too, although its own seed is another."""
    one = train_into("one", Settings(**SMALL, lr=0.01))
    two = train_into("two", Settings(**SMALL, lr=0.0, seed=1, from_run=str(one)))
    fresh = train_into("fresh", Settings(**SMALL, lr=0.0, seed=1))
    a, b, c = (load_file(folder / "model.safetensors") for folder in (one, two, fresh))
    names = [name for name in a if name.startswith("model.") and a[name].dim() == 2]
    assert all(torch.equal(a[name], b[name]) for name in names)
    assert not any(torch.equal(a[name], c[name]) for name in names)


def test_a_toy_lora_stands_on_the_run_that_it_starts_from(train_into, tmp_path):
    """W + (alpha / r) B A of that run's W, with alpha / r = 3 / 4. No other W will do."""
    one = train_into("one", Settings(**SMALL, lr=0.01))
    s = Settings(**SMALL, from_run=str(one), toy_lora=True, lora_rank=4, lora_alpha=3.0,
                 lora_dropout=0.0, seed=1)
    data, model = build(s)
    saved = load_file(one / "model.safetensors")
    lora = {name: p for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert lora and all("lora_" in name for name in lora)
    for p in lora.values():
        p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(p.numel()))
    plain = ToyDLM(model.backbone.config)
    for name, w in plain.named_parameters():
        w.data, stem = saved[f"model.{name}"].clone(), name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in lora:
            A, B = (lora[f"{stem}.lora_{x}.default.weight"].data for x in "AB")
            w.data += 0.75 * B @ A
    batch = train.make_batch(s, data, 0)
    got, want = (MemDLM(net.eval(), s)(batch)[0] for net in (model.backbone, plain))
    torch.testing.assert_close(got, want)

    # A checkpoint of the LoRA fits a LoRA on the same weights alone.
    folder = tmp_path / "lora"
    folder.mkdir()
    optimizer = torch.optim.AdamW(lora.values())
    save_checkpoint(folder, model, optimizer, 3)
    again = build(s)[1]
    assert load_checkpoint(folder, again) == 3
    torch.testing.assert_close(MemDLM(again.backbone.eval(), s)(batch)[0], want)
    two = train_into("two", Settings(**SMALL, lr=0.02))
    with pytest.raises(ValueError, match="trained on other base weights"):
        load_checkpoint(folder, build(replace(s, from_run=str(two)))[1])
    with pytest.raises(ValueError, match="was trained by 1 processes; with 2"):
        load_checkpoint(folder, again, optimizer, processes=2)


# ---- Memory -------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 ..."),
     "error: the GPU's memory is too small for this (CUDA out of memory. Tried to allocate 2.00"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
     "error: memory is too small for this ([enforce fail]"),
    (MemoryError(), "error: memory is too small for this")])
def test_too_little_memory_is_one_line_that_names_what_to_turn(cli, monkeypatch, error, says):
    def fail(*arguments):
        raise error
    monkeypatch.setattr(train, "compute_gradients", fail)
    code, _, err = cli(train, "--steps", "2", "--no-control", "--table-samples", "0")
    assert code == 2 and says in err and "--batch 1" in err and "Traceback" not in err


def test_another_error_of_the_runtime_keeps_its_traceback(cli, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("shapes do not fit")
    monkeypatch.setattr(train, "compute_gradients", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        cli(train, "--steps", "2", "--no-control", "--table-samples", "0")


def test_a_large_model_is_not_trained_on_a_cpu_that_nobody_asked_for(cli, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps(PUBLISHED["llada-moe"]))
    code, _, err = cli(train, "--model", tmp_path / "m")
    assert code == 2 and "7.36 billion parameters" in err and "say --device cpu" in err
    code, _, err = cli(train, "--model", tmp_path / "m", "--device", "cpu", "--data", "none.jsonl")
    assert code == 2 and "none.jsonl" in err
