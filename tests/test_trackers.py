"""train.py --log: nothing unless it is asked for, no step twice, and no harm when it fails."""
import importlib.util
import json
import os
import shutil
import sys

import pytest

import train
from runs import open_run
from test_cli import QUICK, StopAfter, metrics, refused
from trackers import flatten, pick_tracker, wandb_id

HERE = ["--eval-every", "3", "--eval-samples", "2", "--out", "r"]

# A false wandb, whose server is a file per run: {step: values}, as wandb keeps them. It refuses
# steps that come too late, and asks for a login in the way that PROBLEM says.
FAKE = '''
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
SERVER = Path(__file__).parent
config = SimpleNamespace(update=lambda values, **_: _write("settings", values))
def _write(name, values):
    (SERVER / f"{run.id}.{name}.json").write_text(json.dumps(values))
class Run:
    def __init__(self, id, online):
        path = SERVER / f"{id}.history.json"
        self.id, self.history = id, {}
        if online and path.exists():
            self.history = json.loads(path.read_text())
        self.step = 1 + max(map(int, self.history), default=-1)
    def log(self, values, step):
        if PROBLEM == "log" and step == 2:
            raise ConnectionError("no server")
        assert step >= self.step, "wandb leaves out what comes too late"
        self.step = step
        for name in values:
            assert name not in self.history.get(str(step), {}), f"{name} comes twice"
        self.history.setdefault(str(step), {}).update(values)
        _write("history", self.history)
    def finish(self):
        _write("end", True)
def init(project, id, mode=None, **options):
    global run
    mode = mode or os.environ.get("WANDB_MODE", "online")
    if PROBLEM == "login" and mode == "online":
        if sys.stdin.name != os.devnull:
            raise SystemExit("it asks")
        input("your key: ")
    if PROBLEM == "all":
        raise RuntimeError("out of\\norder")
    run = Run(id, mode == "online")
    _write("options", {"project": project, "mode": mode, **options})
    return run
'''


def write_fake_wandb(folder, problem=""):
    """Write the false wandb into a new folder, which must come first in the search path."""
    folder.mkdir()
    (folder / "wandb.py").write_text(FAKE + f"PROBLEM = {problem!r}\n")
    return folder


def sent_to(server, run):
    """What a run sent to the false wandb: its settings, options and steps."""
    name = (run / "wandb.id").read_text().strip()
    return [json.loads((server / f"{name}.{kind}.json").read_text())
            for kind in ("settings", "options", "history")]


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """wandb(problem): from now on the false wandb is installed. Returns its server's folder."""
    for name in [*os.environ]:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    before = dict(os.environ)

    def install(problem=""):
        server = write_fake_wandb(tmp_path / "server", problem)
        monkeypatch.syspath_prepend(server)
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        return server
    yield install
    sys.modules.pop("wandb", None)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


class Watch:
    """A finder of modules that finds none, and notes what is looked for."""

    def __init__(self):
        self.seen = set()

    def find_spec(self, name, path=None, target=None):
        self.seen.add(name.partition(".")[0])


TRACKERS = {"accelerate", "tensorboard", "wandb", "tensorboardX"}


def test_nothing_of_a_tracker_is_imported_unless_it_is_asked_for(cli, tmp_path, monkeypatch):
    for name in [*sys.modules]:
        if name.partition(".")[0] in TRACKERS:
            monkeypatch.delitem(sys.modules, name)
    watch = Watch()
    monkeypatch.setattr(sys, "meta_path", [watch, *sys.meta_path])
    assert cli(train, *QUICK, *HERE)[0] == 0
    assert not watch.seen & TRACKERS
    assert not [path for path in (tmp_path / "r").iterdir()
                if path.name.startswith(("tensorboard", "wandb"))]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_that_says_how_to_get_it(cli, tmp_path, monkeypatch, kind):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == kind else real(name, *rest))
    line = refused(cli(train, *QUICK, "--log", kind))
    assert f"pip install {kind} " in line and not list(tmp_path.iterdir())


def test_lists_are_numbered_from_one():
    assert flatten({"step": 3, "ce": 1.5, "inner": [4.0, 2.0]}) == {
        "ce": 1.5, "inner_1": 4.0, "inner_2": 2.0}


def test_wandb_gets_every_line_and_the_settings_of_a_run_and_its_control(cli, tmp_path, wandb):
    server = wandb()
    assert cli(train, *QUICK, *HERE, "--control", "--log", "wandb")[0] == 0
    for folder in (tmp_path / "r", tmp_path / "r/control"):
        settings, options, history = sent_to(server, folder)
        assert settings == json.loads((folder / "settings.json").read_text())
        assert options["project"] == "memdlm"
        assert options["dir"] == str(folder.relative_to(tmp_path))
        want = {}
        for line in metrics(folder):
            want.setdefault(str(line["step"]), {}).update(flatten(line))
        assert [*history] == [str(step) for step in range(6)] == [*want]
        for step, values in want.items():
            history[step].pop("seconds")
            assert history[step] == values
        assert "held_out_ce" in history["2"] and "loss" in history["2"]


def interrupt_and_resume(cli, tmp_path, monkeypatch, *flags):
    """A run that is killed after step 5, with a checkpoint of step 3, and then goes on."""
    for stop_after, start in ((3, [*QUICK, *HERE, *flags]), (5, ["--resume", "r"])):
        with monkeypatch.context() as patch:
            lines = stop_after + 1  # the held-out numbers of step 3 are a line too
            patch.setattr(train, "Stop", lambda: StopAfter(tmp_path / "r", lines))
            assert cli(train, *start)[0] == 130
        if stop_after == 3:
            shutil.copy(tmp_path / "r/model.safetensors", tmp_path / "old")
    shutil.copy(tmp_path / "old", tmp_path / "r/model.safetensors")
    assert cli(train, "--resume", "r")[0] == 0
    assert len(metrics(tmp_path / "r")) == 8


def test_a_resumed_run_goes_on_in_its_run_of_wandb(cli, tmp_path, monkeypatch, wandb):
    """The false wandb refuses a step that it has."""
    server = wandb()
    interrupt_and_resume(cli, tmp_path, monkeypatch, "--log", "wandb")
    history = sent_to(server, tmp_path / "r")[2]
    assert [*history] == [str(step) for step in range(6)]
    assert all("loss" in values for values in history.values())
    assert len(list(server.glob("*.history.json"))) == 1


def look_at(folder):
    """Event files, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def scalars_of(found):
    """{name: [(step, value)]} without the times."""
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)]
            for tag in found.Tags()["scalars"] if tag != "seconds"}


@pytest.mark.parametrize("from_the_start", [True, False])
def test_tensorboard_has_every_step_once(cli, tmp_path, monkeypatch, from_the_start):
    """Also if the log is asked for only when the run goes on: it gets the earlier steps too."""
    pytest.importorskip("tensorboard")
    if from_the_start:
        interrupt_and_resume(cli, tmp_path, monkeypatch, "--log", "tensorboard")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(train, "Stop", lambda: StopAfter(tmp_path / "r", 2))
            assert cli(train, *QUICK, *HERE)[0] == 130
        assert cli(train, "--resume", "r", "--log", "tensorboard")[0] == 0
    want = {}
    for line in metrics(tmp_path / "r"):
        for name, value in flatten(line).items():
            if name != "seconds":
                want.setdefault(name, []).append((line["step"], pytest.approx(value)))
    assert [step for step, _ in want["held_out_ce"]] == [2, 5]
    places = tmp_path / "r/tensorboard"
    found = look_at(places)
    assert scalars_of(found) == want
    assert "_hparams_/session_start_info" in found.summary_metadata
    assert {path.name[:20] for path in places.iterdir()} == {"events.out.tfevents."}
    if from_the_start:  # and a TensorBoard that is looking sees no step twice
        shutil.copy(tmp_path / "old", tmp_path / "r/model.safetensors")
        assert cli(train, "--resume", "r")[0] == 0
        found.Reload()
        assert scalars_of(found) == want


@pytest.mark.parametrize("problem, mode, says", [
    ("login", None, "its log stays in r/wandb"),
    ("login", "offline", None),
    ("login", "disabled", None),
    ("login", "online", "the training goes on without it (EOFError"),
    ("all", None, "the training goes on without it (RuntimeError: out of order)"),
    ("log", None, "the training goes on without it (ConnectionError: no server)"),
])
def test_a_tracker_never_asks_and_never_ends_the_run(
        cli, tmp_path, monkeypatch, wandb, problem, mode, says):
    server = wandb(problem)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    code, out, err = cli(train, *QUICK, *HERE, "--log", "wandb")
    assert code == 0 and len(metrics(tmp_path / "r")) == 8 and "Traceback" not in err
    assert sum("wandb" in line for line in out.splitlines()) == (1 if says else 0), out
    assert not says or says in out
    if problem == "login" and mode != "online":
        settings, options, history = sent_to(server, tmp_path / "r")
        assert options["mode"] == (mode or "offline") and len(history) == 6
    assert open_run(tmp_path / "r")[0].steps == 6


def test_the_user_of_wandb_decides(cli, tmp_path, monkeypatch, wandb):
    server = wandb()
    for name, value in (("PROJECT", "mine"), ("DIR", str(tmp_path)), ("INIT_TIMEOUT", "5")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert cli(train, *QUICK, *HERE, "--log", "wandb")[0] == 0
    options = sent_to(server, tmp_path / "r")[1]
    assert options["project"] == "mine" and options["dir"] == str(tmp_path)
    assert os.environ["WANDB_INIT_TIMEOUT"] == "5" and os.environ["WANDB_CONSOLE"] == "off"


def test_a_run_that_goes_on_keeps_its_tracker_unless_told_else(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert pick_tracker(None) == pick_tracker(None, tmp_path) == "none"
    (tmp_path / "wandb.id").write_text("../../x")
    assert pick_tracker(None, tmp_path) == "wandb" and pick_tracker("none", tmp_path) == "none"
    (tmp_path / "tensorboard").mkdir()
    assert pick_tracker(None, tmp_path) == "tensorboard"
    assert wandb_id(tmp_path) != "../../x" and wandb_id(tmp_path) == wandb_id(tmp_path)
