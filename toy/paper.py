"""The paper's tables and figures on the toy: the runs, and what is measured on each.

    python evaluate.py --paper toy            everything, five paired seeds, under two hours on two cores
    python evaluate.py --paper toy --quick    the same in small, under ten minutes

Two ways to train are compared. *Tuned*: a base that has learned the retrieval tasks is fine-tuned on `prose`, text that has
nothing to do with them, as the paper fine-tunes a pretrained model and then asks it for needles. *From scratch*: random
languages, where the loss itself can be watched. A third, *closed book*, is ours: recall from phi alone.

Every run has its folder, out/<size>/<seed>/<run>, with measures.json when it is done, so a second call goes on where the first
one stopped. Runs of one seed share initial weights, data, masks and test samples: they are compared in pairs.
"""
from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import signal
import sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from tqdm import tqdm

import evaluate
import memdlm
import train
from toy import tasks
from toy.data import ToyData, collate


class Size(NamedTuple):
    seeds: int
    base: int      # steps of each kind of run
    tuned: int
    scratch: int
    closed: int
    samples: int   # held-out samples per cell
    lengths: tuple  # of the retrieval tasks; the first two are those of training
    far: bool      # also look far from the defaults


SIZES = {"full": Size(5, 2000, 300, 350, 1000, 64, (32, 64, 128, 256), True),
         "quick": Size(3, 400, 60, 100, 300, 24, (32, 64, 128), False)}


# ---- The runs ---------------------------------------------------------------------------------------------

class Run(NamedTuple):
    settings: dict
    measures: tuple


# The paper's ablations of training: name of the run -> what differs from its default.
ABLATIONS = {
    "kl": dict(inner_loss="kl"), "reverse_kl": dict(inner_loss="reverse_kl"),
    "hidden_cosine": dict(inner_loss="hidden_cosine"), "hidden_mse": dict(inner_loss="hidden_mse"),
    "all layers": dict(layer_fraction=1.0), "ffn+attn": dict(scope="ffn+attn"), "full rank": dict(adapter="full"),
    "clip global": dict(clip="global"), "clip 0.5": dict(clip_norm=0.5), "clip 2": dict(clip_norm=2.0),
    "no clip": dict(clip="none"),
    "s_pre 1.25": dict(pre_scale=1.25), "s_pre 1.75": dict(pre_scale=1.75), "s_pre 2": dict(pre_scale=2.0),
    "inconsistent": dict(trajectory="inconsistent"),
    "anchor only": dict(trajectory="anchor_only"), "pre only": dict(trajectory="pre_only"),
    "pre only, anchor tokens": dict(trajectory="pre_only", stage1_target="anchor_tokens"),
    "anchor tokens": dict(stage1_target="anchor_tokens"),
    "K=3": dict(inner_steps=3), "K=4": dict(inner_steps=4),
}


def plan(size):
    """{name: Run}. A run whose settings name another in from_run starts from that one of its seed."""
    off, written = dict(memory=False), train.WRITTEN_FROM["prompt"]
    # At this strength phi visibly holds the answers, and theta is not lost without it.
    tuned = dict(data="prose", from_run="base", steps=size.tuned, batch=16, lr=1e-3, per_sample=True, inner_lr=0.03)
    scratch = dict(data="languages", steps=size.scratch, lr=3e-3, per_sample=True, inner_lr=0.003)
    closed = dict(data="dictionary", layers=1, steps=size.closed, lr=3e-3, closed_book=True, memory_from="prompt", **written)
    small = ("retrieval_short", "nats_short")
    runs = {
        "base": Run(dict(data="retrieval", steps=size.base, lr=3e-3, **off), ("retrieval",)),
        "mdlm": Run(tuned | off, ("retrieval", "nats", "exposure", "bins")),
        "memdlm": Run(tuned, ("retrieval", "nats", "exposure", "bins", "anchor_ratios", "inner", "where", "needle")),
        "mdlm, lr x 0.5": Run(tuned | off | dict(lr=5e-4), small),
        "mdlm, lr x 0.3": Run(tuned | off | dict(lr=3e-4), small),
        "mdlm, half the steps": Run(tuned | off | dict(steps=size.tuned // 2), small),
        "scratch mdlm": Run(scratch | off, ("nats", "exposure", "bins", "order")),
        "scratch memdlm": Run(scratch, ("nats", "exposure", "bins", "order", "inner")),
        "scratch mdlm, same compute": Run(scratch | off | dict(steps=int(size.scratch * 1.8)), ("nats",)),
        "closed memdlm": Run(closed, ("recall", "needle")),
        "closed mdlm": Run(closed | off, ("recall",)),
        "open mdlm": Run(closed | off | dict(closed_book=False), ("recall",)),
    }
    lora = dict(toy_lora=True, lora_rank=8, lora_alpha=16.0)
    runs |= {
        "lora mdlm": Run(tuned | off | lora, ("retrieval", "nats")),
        "lora memdlm": Run(tuned | lora, ("retrieval", "nats")),
        "lora mdlm, lr x 0.5": Run(tuned | off | lora | dict(lr=5e-4), small),
        "lora mdlm, lr x 2": Run(tuned | off | lora | dict(lr=2e-3), small),
        "lora mdlm, same compute": Run(tuned | off | lora | dict(steps=int(size.tuned * 2.4)), small),
    }
    runs |= {name: Run(tuned | change, small) for name, change in ABLATIONS.items()}
    if size.far:
        for lr, etas in ((1e-3, (0.003, 0.01, 0.1)), (3e-4, (0.03, 0.1, 0.3)), (1e-4, (0.1,))):
            runs |= {f"memdlm, lr {lr:g}, eta {eta:g}": Run(tuned | dict(lr=lr, inner_lr=eta), small) for eta in etas}
        runs |= {"mdlm, lr 0.0001": Run(tuned | off | dict(lr=1e-4), small),
                 "memdlm, shared, eta 0.1": Run(tuned | dict(per_sample=False, inner_lr=0.1), small),
                 "mdlm, batch 4": Run(tuned | off | dict(batch=4), small),
                 "memdlm, shared by 4, eta 0.1": Run(tuned | dict(per_sample=False, inner_lr=0.1, batch=4), small),
                 "lora memdlm, eta 0.01": Run(tuned | lora | dict(inner_lr=0.01), small),
                 "lora memdlm, eta 0.1": Run(tuned | lora | dict(inner_lr=0.1), small),
                 "memdlm from the prompt": Run(tuned | written | dict(memory_from="prompt"), small)}
        for what, layers, steps in (("4 layers", 4, size.base), ("3 x steps", 2, 3 * size.base)):
            start = tuned | lora | dict(from_run=f"base, {what}", layers=layers)
            runs |= {f"base, {what}": Run(runs["base"].settings | dict(layers=layers, steps=steps), ("retrieval",)),
                     f"lora mdlm, {what}": Run(start | off, ("retrieval", "nats")),
                     f"lora memdlm, {what}": Run(start, ("retrieval", "nats"))}
        runs["lora mdlm, 4 layers, lr x 0.5"] = Run(runs["lora mdlm, 4 layers"].settings | dict(lr=5e-4), small)
        runs |= {f"scratch memdlm, eta {eta:g}": Run(scratch | dict(inner_lr=eta), ("nats_short",))
                 for eta in (0.01, 0.03, 0.1)}
        runs |= {"scratch memdlm, shared, eta 0.1": Run(scratch | dict(per_sample=False, inner_lr=0.1), ("nats",)),
                 "scratch mdlm, 4 x steps": Run(scratch | off | dict(steps=4 * size.scratch), ("nats",)),
                 "scratch memdlm, 4 x steps": Run(scratch | dict(steps=4 * size.scratch), ("nats",)),
                 "scratch mdlm, wide": Run(scratch | off | dict(width=128), ("nats",)),
                 "scratch memdlm, wide": Run(scratch | dict(width=128), ("nats",))}
    return runs


# ---- What is measured: functions of a run that return {name: number or list} ---------------------------------

def at_inference(s):
    """The inner loop that adapts to a prompt: the paper's eta, the run's own design; or what the run has learned to read."""
    return s if s.memory and s.memory_from == "prompt" else replace(s, inner_lr=0.1)


def rows(s):
    """What phi is written from: name -> inner-loop settings, source."""
    inner, cover = at_inference(s), replace(s, **train.WRITTEN_FROM["prompt"])
    return {"alone": (s, "nothing"), "adapted": (inner, "prompt"), "another": (inner, "another"),
            "cover": (cover, "prompt"), "cover another": (cover, "another")}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def retrieval(s, model, size, lengths=None, names=("alone", "adapted", "another")):
    """Share of answer tokens right, by task, length and row. "in" and "beyond": means inside and outside the trained lengths."""
    out, lengths = {}, lengths or size.lengths
    for length in lengths:
        named = [(task, f"paper {task} {length} {i}") for task in tasks.RETRIEVAL for i in range(size.samples)]
        samples = [tasks.TASKS[task](random.Random(name), length) for task, name in named]
        batch = collate(samples, [name for _, name in named], False)
        for row in names:
            right = evaluate.measure(model, *rows(s)[row], batch, "accuracy").view(len(tasks.RETRIEVAL), size.samples).mean(1)
            out |= {f"{task} {length} {row}": x for task, x in zip(tasks.RETRIEVAL, right.tolist())}
            out[f"{length} {row}"] = right.mean().item()
    for row in names:
        for where, some in (("in", lengths[:2]), ("beyond", lengths[2:])):
            if some:
                out[f"{where} {row}"] = mean(out[f"{length} {row}"] for length in some)
    return out


def retrieval_short(s, model, size):
    return retrieval(s, model, size, size.lengths[:2], ("alone", "adapted"))


def nats(s, model, size, names=("alone", "adapted", "another", "cover", "cover another")):
    """Cross-entropy on held-out samples of the run's own kind, by length and row, and their means."""
    data, out = ToyData(s.data), {}
    sources = {row: rows(s)[row] for row in names}
    if s.memory and s.memory_from == "response":
        sources["answers"] = s, "answers"
    for row, (inner, source) in sources.items():
        for column in data.columns:
            batch = data.tests(column, range(2 * size.samples), False, "paper")
            out[f"nats {column} {row}"] = evaluate.measure(model, inner, source, batch, "nats").mean().item()
        out[f"nats {row}"] = mean(out[f"nats {column} {row}"] for column in data.columns)
    return out


def nats_short(s, model, size):
    return nats(s, model, size, ("alone", "adapted"))


def exposure(s, model, size):
    """Exposure bias (Fig. 3) for each row, and for the same model with logits / 3: as confident in the same order."""
    batch, out = ToyData(s.data).tests("32", range(2 * size.samples), False, "paper"), {}
    head = model.backbone.lm_head.weight
    for row in ("alone", "adapted", "cover", "cooled"):
        inner, source = rows(s)["alone" if row == "cooled" else row]
        phi = evaluate.written(model, inner, source, batch)
        head.data.div_(3 if row == "cooled" else 1)
        losses = memdlm.exposure_bias(model.backbone, inner, batch.x0, batch.maskable, batch.valid, batch.seeds,
                                      evaluate.RATIOS, phi)
        head.data.mul_(3 if row == "cooled" else 1)
        static, sequential, matched = (losses[name].mean(1) for name in ("static", "sequential", "matched"))
        out |= {f"exposure {name} {row}": x.tolist()
                for name, x in (("static", static), ("sequential", sequential), ("matched", matched))}
        out |= {f"ratio {row}": (sequential / static)[1:].mean().item(),
                f"ratio matched {row}": (sequential / matched)[1:].mean().item(),
                f"static {row}": static[1:].mean().item()}
    return out


def bins(s, model, size):
    """Loss by mask ratio, also with the phi of training, which has seen the answers."""
    batch, out = ToyData(s.data).tests("32", range(2 * size.samples), False, "paper"), {}
    rank, n = memdlm.order(batch.maskable, memdlm.uniform(batch.seeds, "bins", batch.x0.shape[1])), batch.maskable.sum(1)
    sources = {row: rows(s)[row] for row in ("alone", "adapted")} | ({"answers": (s, "answers")} if s.memory else {})
    for row, (inner, source) in sources.items():
        curve = []
        for ratio in evaluate.RATIOS:
            masked = batch.maskable & (rank < (n * ratio).round().clamp(min=1).long()[:, None])
            xt = torch.where(masked, model.backbone.mask_id, batch.x0)
            phi = evaluate.written(model, inner, source, batch, torch.full((len(n),), ratio), xt, masked)
            nll = memdlm.response_nll(model.backbone, inner, batch.x0, masked, batch.valid, phi)
            curve.append((nll.sum(1) / masked.sum(1)).mean().item())
        out[f"bins {row}"] = curve
    return out


def anchor_ratios(s, model, size):
    """Retrieval inside the trained lengths with other anchors at inference (Fig. 8)."""
    return {f"in anchor {ratio}": retrieval(replace(s, anchor_ratio=ratio), model, size, size.lengths[:2],
                                            ("adapted",))["in adapted"]
            for ratio in (0.2, 0.4, 0.6, 0.8)}


def inner(s, model, size):
    """Loss of each stage of adapting to a prompt, before its step and after."""
    s, batch = at_inference(s), ToyData(s.data).tests("32", range(2 * size.samples), False, "paper")
    x0, valid, backbone = batch.prompt, batch.prompt_valid, model.backbone
    masked = memdlm.at_least_one(valid, memdlm.uniform(batch.seeds, "prompt anchor", x0.shape[1]), s.anchor_ratio)
    path = memdlm.stages(s, x0, masked, valid, torch.full((len(x0),), s.anchor_ratio), batch.seeds, backbone.mask_id,
                         weighted=False)
    pairs = []
    for k in range(len(path)):  # the stage once more shows what its step did
        _, record = memdlm.inner_loop(backbone, s, path[:k + 1] + path[k:k + 1], x0, valid,
                                      lambda x: memdlm.below(backbone, s, x, valid).detach(),
                                      memdlm.fresh_phi(backbone, s, batch.seeds))
        pairs.append(record["inner"][-2:].tolist())
    return {"inner before": [before for before, _ in pairs], "inner after": [after for _, after in pairs]}


def where(s, model, size):
    """Where phi lives: norm of the change it makes to each matrix, if it may change all of them."""
    s = replace(at_inference(s), layer_fraction=1.0, scope="ffn+attn")
    batch = ToyData(s.data).tests("32", range(size.samples), False, "paper")
    phi = evaluate.written(model, s, "prompt", batch)
    change = {name: s.alpha / s.rank * (B @ A).flatten(1).norm(dim=1).mean().item() for name, (A, B) in phi.items()}
    return {"where names": list(change), "where": list(change.values())}


def order(s, model, size):
    """When each position of the response is committed, by row."""
    batch, out = ToyData(s.data).tests("32", range(2 * size.samples), False, "paper"), {}
    for row in ("alone", "cover"):
        inner_s, source = rows(s)[row]
        phi, when = evaluate.written(model, inner_s, source, batch), torch.zeros(batch.x0.shape)
        for x in memdlm.denoise(model.backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds, phi):
            when += (x == model.backbone.mask_id) & batch.maskable  # steps that a position still waits
        out[f"order {row}"] = when[batch.maskable].view(len(when), -1).mean(0).tolist()
    return out


def needle(s, model, size):
    """Answers right by how deep in the prompt the pair stands: [lengths][5 depths], for each row. From dictionaries."""
    out = {row: [] for row in ("alone", "cover" if s.closed_book else "adapted")}
    for length in (16, 32, 64) if s.closed_book else size.lengths:
        named = [f"paper dictionary {length} {i}" for i in range(3 * size.samples)]
        samples = [tasks.dictionary(random.Random(name), length, rep=1 if length < 128 else None) for name in named]
        batch = collate(samples, named, s.closed_book)
        depth = torch.tensor([5 * sample.prompt.index(key) // len(sample.prompt) for sample in samples
                              for key, asked in zip(sample.rest, sample.answer[1:]) if asked])
        for row in out:
            inner_s, source = rows(s)[row]
            right = evaluate.answered(model, inner_s, batch, evaluate.written(model, inner_s, source, batch))[batch.maskable]
            out[row].append([right[depth == d].double().mean().item() for d in range(5)])
    return {f"needle {row}": table for row, table in out.items()}


def recall(s, model, size):
    """Closed book: answers right by column, for each row; and their means."""
    data, out = ToyData("dictionary"), {}
    sources = rows(s) | {"paper's masks": (replace(s, trajectory="consistent", inner_lr=0.3), "prompt")}
    for row in ("alone", "cover", "cover another", "paper's masks") if s.closed_book else ("alone",):
        for column in data.columns:
            batch = data.tests(column, range(2 * size.samples), s.closed_book, "paper")
            out[f"recall {column} {row}"] = evaluate.measure(model, *sources[row], batch, "accuracy").mean().item()
        out[f"recall {row}"] = mean(out[f"recall {column} {row}"] for column in data.columns)
    return out


MEASURES = {f.__name__: f for f in (retrieval, retrieval_short, nats, nats_short, exposure, bins,
                                    anchor_ratios, inner, where, order, needle, recall)}


def dynamics(folder):
    """The training curve: cross-entropy per masked token as trained, and without memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line["ce"] for line in lines]
    alone = [line.get("ce_without", line["ce"]) for line in lines]
    half, last = len(lines) // 2, -(-len(lines) // 4)
    return {"curve steps": [line["step"] for line in lines], "curve": trained, "curve alone": alone,
            "train": mean(trained[-last:]), "train alone": mean(alone[-last:]),
            "train alone, first half": mean(alone[:half or 1])}


# ---- Working through the runs ---------------------------------------------------------------------------------

def settings_of(run, seed, folder):
    common = dict(seed=seed, threads=1, control=False, table_samples=0, sample_every=0, log_every=5)
    base = dict(from_run=str(folder / str(seed) / run.settings["from_run"])) if "from_run" in run.settings else {}
    return train.Settings(**{**run.settings, **common, **base})


def done(folder, s):
    """The measures of a finished run with exactly these settings, or None."""
    path = folder / "measures.json"
    if not path.exists():
        return None
    saved = json.loads(path.read_text())
    return saved if saved.pop("settings") == asdict(s) else None


def work(s, measures, folder, size):
    """One run: train, measure, write measures.json. In a process of its own, with everything it prints in log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {"settings": asdict(s)}
    with open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            train.train(s, folder, resume_of(folder, s), SimpleNamespace(signal=None), train.Processes())
        except SystemExit:  # its reason is in the log: a loss that is not finite
            out["diverged"] = 1.0
        else:
            _, _, model = train.open_run(folder)
            out |= dynamics(folder)
            for name in measures:
                out |= MEASURES[name](s, model, size)
    train.write_whole(folder / "measures.json", lambda path: path.write_text(json.dumps(out) + "\n"))


def resume_of(folder, s):
    """Whether the folder holds the start of this very run."""
    try:
        return train.read_settings(folder) == s
    except ValueError:
        return False


def quiet():
    """A worker leaves Ctrl-C to the one who hands out the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def cost(run):
    """Roughly, for the bar."""
    s = run.settings
    memory, width = s.get("memory", True), 3 if s.get("width") == 128 else 1
    return s["steps"] * s.get("batch", 32) * (2.5 if memory else 1) * width / 32 + 60 * len(run.measures)


def work_all(size, folder, jobs, seeds, only=None):
    """All runs of all seeds, `jobs` at a time, each after the base it starts from. Returns {name: [measures of each seed]}."""
    runs = {name: run for name, run in plan(size).items() if only is None or name in only}
    todo = {(name, seed): run for seed in range(seeds) for name, run in runs.items()
            if done(folder / str(seed) / name, settings_of(run, seed, folder)) is None}
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=quiet)
    running, total = {}, sum(cost(run) for run in todo.values())
    with tqdm(total=round(total), unit="", bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
              disable=not todo) as bar:
        try:
            while todo or running:
                waits = {*todo, *running.values()}
                ready = [key for key in todo if (todo[key].settings.get("from_run"), key[1]) not in waits]
                # Bases and the long ones first, so that the end does not wait for one.
                for key in sorted(ready, key=lambda key: ("base" not in key[0],
                                                          -cost(todo[key])))[:max(0, 2 * jobs - len(running))]:
                    run = todo.pop(key)
                    s = settings_of(run, key[1], folder)
                    running[pool.submit(work, s, run.measures, folder / str(key[1]) / key[0], size)] = key
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    name, seed = running.pop(future)
                    future.result()
                    bar.update(round(cost(runs[name])))
                    bar.set_description(f"{len(todo) + len(running)} runs left, last: {name}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    pool.shutdown()
    return {name: [done(folder / str(seed) / name, settings_of(run, seed, folder)) for seed in range(seeds)]
            for name, run in runs.items()}


def paper_toy(quick, jobs, seeds, out):
    """All of it: runs, verdicts, report. Returns the path of the report."""
    from toy.report import report
    name = "quick" if quick else "full"
    size, folder = SIZES[name], Path(out) / name
    try:
        results = work_all(size, folder, jobs, seeds or size.seeds)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with what is left", file=sys.stderr)
        sys.exit(130)
    return report(results, size, folder)
