"""The runs that test the paper's claims on the toy: which there are, and the work through them.

    python evaluate.py claims            everything: five paired seeds, 50 minutes on two cores
    python evaluate.py claims --quick    the same in small: three seeds, five minutes on two

Most claims are about a model that was trained with memory, compared with one that was not. There
are two settings in which both are trained, and one of ours.

    tuned          A base learns the retrieval tasks first. Then it is fine-tuned on `prose`, a
                   text that has nothing to do with them. The paper does the same: it fine-tunes a
                   pretrained model and then asks it for needles.
    from scratch   A fresh model learns `languages`, in which each sample is written in a random
                   language of its own. The loss of such a model can be compared directly.
    closed book    Ours: the decoder does not see the prompt, so it recalls from phi alone.

Every run has a folder, OUT/<size>/<seed>/<name of the run>. A run that is finished has left its
numbers there, in measures.json. So a second call of the same command goes on where the first one
stopped. All runs of one seed share initial weights, data, masks and test samples. They are compared
in pairs.
"""
from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from tqdm import tqdm

from console import last_words
from files import write_json
from paper.measures import MEASURES, read_training_curve
from paper.variants import AT_THE_PACE_OF, tune
from runs import hold_run, open_run, read_settings
from settings import WRITTEN_FROM, Settings
from train import Diverged, Processes, train


# ---- The plan -----------------------------------------------------------------------------------

class Size(NamedTuple):
    """How large the whole comparison is."""
    seeds: int
    base: int       # steps of the base that is tuned
    tuned: int      # steps of tuning it
    scratch: int    # steps from scratch
    closed: int     # steps of the closed book
    samples: int    # held-out samples per cell
    lengths: tuple  # of the retrieval tasks' prompts; the first two are those of training
    far: bool       # also look far from the defaults


SIZES = {"full": Size(5, 2000, 300, 350, 1000, 64, (32, 64, 128, 256), True),
         "quick": Size(3, 400, 60, 100, 300, 24, (32, 64, 128), False)}


class Run(NamedTuple):
    """One model to train: its settings, and the names of what is measured on it."""
    settings: dict
    measures: tuple
    variant: str = ""  # a way to train that no setting names: see variants.py
    seeds: int = 100   # at most so many


OFF = dict(memory=False)
FAR_SEEDS = 3  # of runs that no claim is about
# A MemDLM step in plain ones, in CPU seconds: 1.96 from scratch, 2.05 with a LoRA.
STEP_COST = {"scratch": 2.0, "lora": 2.1}
LORA = dict(toy_lora=True, lora_rank=8, lora_alpha=16.0)
SHORT = ("retrieval_short", "nats_short")  # what most runs are measured by
LONGER = ("retrieval_short", "retrieval_further", "nats_short")

# The paper's ablations of training: name of the run -> what it changes in the tuned MemDLM.
ABLATIONS = {
    "kl": dict(inner_loss="kl"),
    "reverse_kl": dict(inner_loss="reverse_kl"),
    "hidden_cosine": dict(inner_loss="hidden_cosine"),
    "hidden_mse": dict(inner_loss="hidden_mse"),
    "all layers": dict(layer_fraction=1.0),
    "ffn+attn": dict(scope="ffn+attn"),
    "full rank": dict(adapter="full"),
    "clip global": dict(clip="global"),
    "clip 0.5": dict(clip_norm=0.5),
    "clip 2": dict(clip_norm=2.0),
    "no clip": dict(clip="none"),
    "s_pre 1.25": dict(pre_scale=1.25),
    "s_pre 1.75": dict(pre_scale=1.75),
    "s_pre 2": dict(pre_scale=2.0),
    "inconsistent": dict(trajectory="inconsistent"),
    "anchor only": dict(trajectory="anchor_only"),
    "pre only": dict(trajectory="pre_only"),
    "pre only, anchor tokens": dict(trajectory="pre_only", stage1_target="anchor_tokens"),
    "anchor tokens": dict(stage1_target="anchor_tokens"),
    "K=3": dict(inner_steps=3),
    "K=4": dict(inner_steps=4),
}


def base_recipe(size):
    return dict(data="retrieval", steps=size.base, lr=3e-3, **OFF)


def tuned_recipe(size):
    # With an eta of 0.03, phi visibly holds the answers, and theta is not lost without it.
    return dict(data="prose", from_run="base", steps=size.tuned, batch=16, lr=1e-3,
                per_sample=True, inner_lr=0.03)


def scratch_recipe(size):
    return dict(data="languages", steps=size.scratch, lr=3e-3, per_sample=True, inner_lr=0.003)


def closed_recipe(size):
    return dict(data="dictionary", layers=1, steps=size.closed, lr=3e-3, closed_book=True,
                memory_from="prompt", **WRITTEN_FROM["prompt"])


def plan_runs(size):
    """All runs of one seed, {name: Run}.

    A run whose settings name another run in `from_run` starts from the weights of that one.
    """
    runs = main_runs(size) | lora_runs(size)
    runs |= {name: Run(tuned_recipe(size) | change, ("retrieval_short",))
             for name, change in ABLATIONS.items()}
    if size.far:
        far = far_tuned_runs(size) | far_scratch_runs(size)
        runs |= larger_base_runs(size)
        runs |= {name: run._replace(seeds=FAR_SEEDS) for name, run in far.items()}
    return runs


def main_runs(size):
    """The three settings, each with memory and without."""
    tuned, scratch, closed = tuned_recipe(size), scratch_recipe(size), closed_recipe(size)
    half = size.tuned // 2
    same_compute = dict(steps=int(size.scratch * STEP_COST["scratch"]))
    tuned_measures = ("nats", "exposure", "bins", "attention")
    scratch_measures = ("nats", "exposure", "bins", "order")
    return {
        "base": Run(base_recipe(size), ("retrieval_plain",)),
        "mdlm": Run(tuned | OFF, ("retrieval_own", *tuned_measures)),
        "memdlm": Run(tuned, ("retrieval", *tuned_measures, "anchor_ratios", "inner", "where",
                              "needle")),
        "mdlm, lr x 0.5": Run(tuned | OFF | dict(lr=5e-4), SHORT),
        "mdlm, lr x 0.3": Run(tuned | OFF | dict(lr=3e-4), SHORT),
        "mdlm, half the steps": Run(tuned | OFF | dict(steps=half), SHORT),
        "scratch mdlm": Run(scratch | OFF, (*scratch_measures, "nats_cover")),
        "scratch memdlm": Run(scratch, (*scratch_measures, "inner")),
        "scratch mdlm, same compute": Run(scratch | OFF | same_compute, ("nats_short",)),
        "closed memdlm": Run(closed, ("recall", "needle")),
        "closed mdlm": Run(closed | OFF, ("recall",)),
        "open mdlm": Run(closed | OFF | dict(closed_book=False), ("recall",)),
    }


def lora_runs(size):
    """Tuned as the paper tunes: by a LoRA, on a base whose weights stay."""
    with_memory = tuned_recipe(size) | LORA
    without = with_memory | OFF
    same_compute = dict(steps=int(size.tuned * STEP_COST["lora"]))
    return {
        "lora mdlm": Run(without, (*LONGER, "attention")),
        "lora memdlm": Run(with_memory, (*LONGER, "attention")),
        "lora mdlm, lr x 0.5": Run(without | dict(lr=5e-4), SHORT),
        "lora mdlm, lr x 2": Run(without | dict(lr=2e-3), SHORT),
        "lora mdlm, same compute": Run(without | same_compute, SHORT),
    }


def far_tuned_runs(size):
    """Tuned far from the defaults: other learning rates, other etas, a phi that samples share."""
    tuned, runs = tuned_recipe(size), {}
    for lr, etas in ((1e-3, (0.003, 0.01, 0.1)), (3e-4, (0.03, 0.1, 0.3)), (1e-4, (0.1,))):
        for eta in etas:
            runs[f"memdlm, lr {lr:g}, eta {eta:g}"] = Run(tuned | dict(lr=lr, inner_lr=eta), SHORT)
    shared, from_prompt = dict(per_sample=False, inner_lr=0.1), dict(memory_from="prompt")
    return runs | {
        "mdlm, lr 0.0001": Run(tuned | OFF | dict(lr=1e-4), SHORT),
        "memdlm, shared, eta 0.1": Run(tuned | shared, SHORT),
        "mdlm, batch 4": Run(tuned | OFF | dict(batch=4), SHORT),
        "memdlm, shared by 4, eta 0.1": Run(tuned | shared | dict(batch=4), SHORT),
        "lora memdlm, eta 0.01": Run(tuned | LORA | dict(inner_lr=0.01), SHORT),
        "lora memdlm, eta 0.1": Run(tuned | LORA | dict(inner_lr=0.1), SHORT),
        "memdlm from the prompt": Run(tuned | WRITTEN_FROM["prompt"] | from_prompt, SHORT),
    }


def larger_base_runs(size):
    """A deeper base and a base that was trained longer, each tuned by a LoRA."""
    runs = {}
    for what, layers, steps in (("4 layers", 4, size.base), ("3 x steps", 2, 3 * size.base)):
        base = base_recipe(size) | dict(layers=layers, steps=steps)
        tuned = tuned_recipe(size) | LORA | dict(from_run=f"base, {what}", layers=layers)
        runs |= {f"base, {what}": Run(base, ("retrieval_short",)),
                 f"lora mdlm, {what}": Run(tuned | OFF, LONGER),
                 f"lora memdlm, {what}": Run(tuned, LONGER)}
    slower = runs["lora mdlm, 4 layers"].settings | dict(lr=5e-4)
    return runs | {"lora mdlm, 4 layers, lr x 0.5": Run(slower, SHORT)}


def far_scratch_runs(size):
    """From scratch far from the defaults: other etas, more steps, a wider model."""
    scratch, longer = scratch_recipe(size), dict(steps=4 * size.scratch)
    runs = {f"scratch memdlm, eta {eta:g}": Run(scratch | dict(inner_lr=eta), ("nats_short",))
            for eta in (0.01, 0.03, 0.1)}
    changes = {
        "scratch memdlm, shared, eta 0.1": dict(per_sample=False, inner_lr=0.1),
        "scratch mdlm, 4 x steps": OFF | longer,
        "scratch memdlm, 4 x steps": longer,
        "scratch mdlm, wide": OFF | dict(width=128),
        "scratch memdlm, wide": dict(width=128),
    }
    return runs | {name: Run(scratch | change, ("nats_short",))
                   for name, change in changes.items()}


def needs_of(run):
    """Names of the runs that must be finished before this one: its base, and who sets its pace."""
    return [run.settings.get("from_run"), run.variant.partition(AT_THE_PACE_OF)[2]]


def run_folder(folder, seed, name):
    return folder / str(seed) / name


def settings_of(run, seed, folder):
    """The settings with which a run is trained for one seed."""
    values = run.settings | dict(
        seed=seed, threads=1, control=False, table_samples=0, sample_every=0, log_every=5)
    if "from_run" in values:
        values["from_run"] = str(run_folder(folder, seed, values["from_run"]))
    return Settings(**values)


def estimate_cost(run):
    """About how long a run takes, in units of its own, for the progress bar and the order."""
    s = run.settings
    samples = s["steps"] * s.get("batch", 32)
    with_memory = 2.5 if s.get("memory", True) else 1
    wide = 3 if s.get("width") == 128 else 1
    return samples * with_memory * wide / 32 + 60 * len(run.measures)


# ---- One run ------------------------------------------------------------------------------------

def train_and_measure(s, measures, folder, size, variant=""):
    """Train one model, measure it and write measures.json, in a process of its own.

    All that it prints goes to log.txt in its folder. A run whose loss did not stay finite has
    {"diverged": 1.0} for its measures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = {"settings": asdict(s)}
    with hold_run(folder), \
            open(folder / "log.txt", "w", encoding="utf-8", errors="backslashreplace") as log, \
            contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            if variant:
                out |= tune(s, folder, variant)
            else:
                train(s, folder, can_resume(folder, s), SimpleNamespace(signal=None), Processes())
        except Diverged:
            out["diverged"] = 1.0
        except SystemExit:
            raise ValueError(f"{folder} could not be trained; its log.txt says why") from None
        else:
            _, _, model = open_run(folder)
            out |= {} if variant else read_training_curve(folder)
            for name in measures:
                out |= MEASURES[name](s, model, size)
        write_json(folder / "measures.json", out)


def can_resume(folder, s):
    """Whether the folder holds the start of this very run."""
    try:
        return read_settings(folder) == s
    except ValueError:
        return False


def read_measures(folder, s):
    """The measures of a finished run with exactly these settings, or None."""
    try:
        measures = json.loads((folder / "measures.json").read_text(encoding="utf-8"))
        return measures if measures.pop("settings") == asdict(s) else None
    except (FileNotFoundError, ValueError, TypeError, AttributeError, KeyError):
        return None  # there is none yet, or it is damaged: the run is measured again


# ---- All runs -----------------------------------------------------------------------------------

def run_all(size, folder, jobs, seeds, only=None, plan=None, first_seed=0):
    """Train and measure what is not finished yet, `jobs` runs at a time.

    only: names of runs, in place of all that are planned. plan: other runs than the claims'.
    Returns {name: [the measures of each seed]}.
    """
    plan, seeds = plan or plan_runs(size), range(first_seed, first_seed + seeds)
    runs = {name: run for name, run in plan.items() if only is None or name in only}

    def read(name, seed):
        s = settings_of(runs[name], seed, folder)
        return read_measures(run_folder(folder, seed, name), s)

    todo = {(name, seed): run for name, run in runs.items() for seed in seeds[:run.seeds]
            if read(name, seed) is None}
    total = round(sum(estimate_cost(run) for run in todo.values()))
    bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=total, unit="", bar_format=bar_format, disable=not todo) as bar, \
            worker_pool(jobs) as pool:
        work_through(todo, folder, size, jobs, pool, bar)
    return {name: [read(name, seed) for seed in seeds[:run.seeds]] for name, run in runs.items()}


def run_parts(plan, parts, size, folder, jobs, first_seed):
    """Work through parts of a plan, (names of runs, number of seeds) each.

    Yields all results so far after each part, as `run_all` returns them.
    """
    results = {}
    for names, seeds in parts:
        some = run_all(size, folder, jobs, seeds, names, plan, first_seed)
        results |= {name: measures for name, measures in some.items()
                    if len(measures) >= len(results.get(name, ()))}
        yield results


def work_through(todo, folder, size, jobs, pool, bar):
    """Hand out the runs {(name, seed): Run} to the pool, until all of them are finished."""
    running = {}  # future -> name, seed and run
    while todo or running:
        busy = {(name, seed) for name, seed, _ in running.values()}
        for name, seed in pick_next(todo, busy)[:max(0, 2 * jobs - len(running))]:
            run = todo.pop((name, seed))
            with block_interrupts():  # until a new process ignores them by itself
                future = pool.submit(train_and_measure, settings_of(run, seed, folder),
                                     run.measures, run_folder(folder, seed, name), size,
                                     run.variant)
            running[future] = name, seed, run
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            name, _, run = running.pop(future)
            future.result()  # raises what the run raised
            bar.update(round(estimate_cost(run)))
            bar.set_description(f"{len(todo) + len(running)} runs left, last: {name}")


def pick_next(todo, busy):
    """The runs that may start now, because what each needs is there. [(name, seed)]

    Bases come first, then the longest runs, so that the end does not wait for one of them.
    """
    unfinished = busy | todo.keys()
    ready = [(name, seed) for (name, seed), run in todo.items()
             if not any((other, seed) in unfinished for other in needs_of(run))]
    return sorted(ready, key=lambda key: ("base" not in key[0], -estimate_cost(todo[key])))


@contextlib.contextmanager
def worker_pool(jobs):
    """Processes that train. Whatever stops the caller stops them too, at once."""
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"),
                               initializer=begin_worker)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


@contextlib.contextmanager
def block_interrupts():
    """Keep Ctrl-C waiting. A process that is started within never gets it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker():
    """Ctrl-C reaches all processes. A worker leaves it to the one that hands out the runs.

    Its bars share no lock with other processes, which would be left over when it is ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())


def run_claims(quick, jobs, seeds, out, first_seed=0):
    """Do all of it: runs, verdicts, report. Returns the path of the report."""
    from paper.report import write_report
    name = "quick" if quick else "full"
    size, folder = SIZES[name], Path(out) / name
    with last_words("stopped; the same command goes on with what is left"):
        results = run_all(size, folder, jobs, seeds or size.seeds, first_seed=first_seed)
    return write_report(results, size, folder, first_seed)
