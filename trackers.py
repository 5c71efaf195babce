"""Trackers: what `train.py --log` sends the numbers of metrics.jsonl to.

    --log tensorboard     event files in the run's folder; see them with: tensorboard --logdir runs
    --log wandb           Weights & Biases; without a login the log stays in the run's folder

Both go through accelerate's trackers, and nothing of them is imported unless it is asked for. Only
the first process has a tracker. A resumed run goes on with its own, so no step stands there twice.
A tracker that fails is told once and left out: the training goes on.
"""
from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import sys
from dataclasses import asdict

from console import say
from files import write_text
from runs import read_metrics

KINDS = ("none", "tensorboard", "wandb")


def pick_tracker(kind, folder=None):
    """The kind of tracker for a run: the one that was asked for, else the one that it has already.

    folder: of a run that goes on. ValueError if a package is missing.
    """
    if kind is None:
        places = {"tensorboard": "tensorboard", "wandb": WANDB_ID} if folder else {}
        kind = next((each for each, name in places.items() if (folder / name).exists()), "none")
    for package in () if kind == "none" else (kind, "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--log {kind} needs a package that is not installed: pip install "
                             f"{package} (or leave the log out with --log none)")
    return kind


class Tracker:
    """One run's log. Of the kind "none" it does nothing."""

    def __init__(self, kind, folder, s):
        self.kind, self.theirs, self.first_step = kind, None, 0
        self.attempt(lambda: self.begin(folder, s))

    def begin(self, folder, s):
        """Open the log of a run, and send it what metrics.jsonl holds already."""
        if self.kind == "none":
            return
        from accelerate import PartialState
        PartialState()  # the trackers want it, also where there is one process
        opened = OPEN[self.kind](folder, s)
        # A run of wandb that is opened again has its first steps.
        self.theirs, self.first_step = opened, getattr(opened.tracker, "step", 0)
        for line in read_metrics(folder)[0]:
            self.log(line)

    def log(self, values):
        """Send a line of metrics, unless the log has its step already."""
        if self.theirs and values["step"] >= self.first_step:
            self.attempt(lambda: self.theirs.log(flatten(values), step=values["step"]))

    def close(self):
        """Send what is left."""
        if self.theirs:
            self.attempt(self.theirs.finish)

    def attempt(self, work):
        """Do some work of the tracker. If it fails, there is no tracker any more."""
        try:
            work()
        except Exception as error:  # of any kind: these are programs and servers of others
            self.theirs = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"--log {self.kind} failed, the training goes on without it ({reason:.300})")


@contextlib.contextmanager
def open_tracker(kind, folder, s):
    """A Tracker, which is closed at the end, however that comes."""
    tracker = Tracker(kind, folder, s)
    try:
        yield tracker
    finally:
        tracker.close()


def flatten(values):
    """A line of metrics without its step and without lists: inner [a, b] is inner_1, inner_2."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{name}_{i}": each for i, each in enumerate(value, 1)}
        elif name != "step":
            flat[name] = value
    return flat


# ---- TensorBoard --------------------------------------------------------------------------------

def open_tensorboard(folder, s):
    """New event files in the run's folder. They take the place of those that it has already."""
    from accelerate.tracking import TensorBoardTracker
    # purge_step: TensorBoard forgets what it read of older files. These must stay: one that is
    # looking finds the new files only from there.
    tracker = TensorBoardTracker("tensorboard", folder, purge_step=0)
    tracker.start()
    # Accelerate's own way writes these into two more folders, which look like runs.
    tracker.tracker.add_hparams(asdict(s), {}, run_name=".")
    return tracker


# ---- Weights & Biases ---------------------------------------------------------------------------

WANDB_ID = "wandb.id"  # the file that says which run of wandb a run is

# Nobody waits long for a server, and no text of a terminal is sent to it. The user may say else.
WANDB_DEFAULTS = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "60", "WANDB_CONSOLE": "off"}


def open_wandb(folder, s):
    """A run of wandb, or the same one again. Without login or server it is kept in the folder."""
    from accelerate.tracking import WandBTracker
    for name, value in WANDB_DEFAULTS.items():
        os.environ.setdefault(name, value)
    place = os.environ.get("WANDB_DIR", str(folder))
    options = dict(name="/".join(folder.parts[-2:]), id=wandb_id(folder), dir=place, resume="allow")
    project = os.environ.get("WANDB_PROJECT", "memdlm")
    tracker = WandBTracker(project, **options)
    try:
        with no_questions():
            tracker.start()
    except Exception as error:
        if "WANDB_MODE" in os.environ:
            raise
        tracker = WandBTracker(project, mode="offline", **options)
        tracker.start()
        reason = " ".join(str(error).split())
        say(f"wandb cannot be reached ({reason:.150}); its log stays in {place}/wandb, and "
            "wandb sync sends it from there later")
    tracker.store_init_configuration(asdict(s))
    return tracker


def wandb_id(folder):
    """The name that wandb knows a run by. It is drawn once and kept in the run's folder."""
    path = folder / WANDB_ID
    with contextlib.suppress(FileNotFoundError):
        found = path.read_text(encoding="utf-8").strip()
        if re.fullmatch("[0-9a-z]{8,64}", found):
            return found
    name = secrets.token_hex(8)
    write_text(path, name + "\n")
    return name


@contextlib.contextmanager
def no_questions():
    """Nobody is asked for a login: within, there is no terminal to type into."""
    terminal = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal


OPEN = {"tensorboard": open_tensorboard, "wandb": open_wandb}
