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
import signal
import sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from tqdm import tqdm

from files import write_whole
from paper.measures import MEASURES, dynamics
from runs import open_run, read_settings
from settings import WRITTEN_FROM, Settings
from train import Processes, train


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
    off, written = dict(memory=False), WRITTEN_FROM["prompt"]
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


def settings_of(run, seed, folder):
    common = dict(seed=seed, threads=1, control=False, table_samples=0, sample_every=0, log_every=5)
    base = dict(from_run=str(folder / str(seed) / run.settings["from_run"])) if "from_run" in run.settings else {}
    return Settings(**{**run.settings, **common, **base})


def finished_measures(folder, s):
    """The measures of a finished run with exactly these settings, or None."""
    path = folder / "measures.json"
    if not path.exists():
        return None
    saved = json.loads(path.read_text())
    return saved if saved.pop("settings") == asdict(s) else None


def train_and_measure(s, measures, folder, size):
    """One run: train, measure, write measures.json. In a process of its own, with everything it prints in log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {"settings": asdict(s)}
    with open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            train(s, folder, can_resume(folder, s), SimpleNamespace(signal=None), Processes())
        except SystemExit:  # its reason is in the log: a loss that is not finite
            out["diverged"] = 1.0
        else:
            _, _, model = open_run(folder)
            out |= dynamics(folder)
            for name in measures:
                out |= MEASURES[name](s, model, size)
    write_whole(folder / "measures.json", lambda path: path.write_text(json.dumps(out) + "\n"))


def can_resume(folder, s):
    """Whether the folder holds the start of this very run."""
    try:
        return read_settings(folder) == s
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


def run_all(size, folder, jobs, seeds, only=None):
    """All runs of all seeds, `jobs` at a time, each after the base it starts from. Returns {name: [measures of each seed]}."""
    runs = {name: run for name, run in plan(size).items() if only is None or name in only}
    todo = {(name, seed): run for seed in range(seeds) for name, run in runs.items()
            if finished_measures(folder / str(seed) / name, settings_of(run, seed, folder)) is None}
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
                    running[pool.submit(train_and_measure, s, run.measures, folder / str(key[1]) / key[0], size)] = key
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
    return {name: [finished_measures(folder / str(seed) / name, settings_of(run, seed, folder)) for seed in range(seeds)]
            for name, run in runs.items()}


def run_claims(quick, jobs, seeds, out):
    """All of it: runs, verdicts, report. Returns the path of the report."""
    from paper.report import report
    name = "quick" if quick else "full"
    size, folder = SIZES[name], Path(out) / name
    try:
        results = run_all(size, folder, jobs, seeds or size.seeds)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with what is left", file=sys.stderr)
        sys.exit(130)
    return report(results, size, folder)
