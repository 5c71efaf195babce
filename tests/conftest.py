"""What several test files use."""
import io
import os
import signal
import sys

# The tests are for a CPU, also where there is a GPU. Those of test_cuda.py ask for it:
# MEMDLM_CUDA=1 python -m pytest tests/test_cuda.py
if not os.environ.get("MEMDLM_CUDA"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest

from backbones.tiny import write_tiny
from tiny_models import EACH, NAMES


@pytest.fixture(scope="session", autouse=True)
def a_hangup_counts():
    """Whoever starts the tests by nohup has them ignore a hang-up, and the programs under test."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(script, *arguments) runs a script's main() in an empty folder.

    It returns the exit code, stdout and stderr.
    """
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments, stdin=""):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            script.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


@pytest.fixture
def train_into(tmp_path, monkeypatch):
    """train_into(name, s) trains a run into that folder and returns the folder.

    stop_after: the number of steps after which Ctrl-C is pressed.
    """
    import train
    monkeypatch.setattr(train, "draw_losses", lambda folder: None)

    def run(name, s, resume=False, stop_after=None):
        folder, asked = tmp_path / name, []

        class Stop:
            @property
            def signal(self):
                asked.append(1)
                return 2 if len(asked) == stop_after else None

        try:
            train.train(s, folder, resume, Stop(), train.Processes())
        except SystemExit:
            assert stop_after
        return folder
    return run


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """The folder that holds a tiny checkpoint of each family, written once. Do not change them."""
    root = tmp_path_factory.mktemp("hub")
    for name in NAMES:
        write_tiny(name, root / name)
    return root


@pytest.fixture(params=EACH)
def name_of(request):
    return request.param


@pytest.fixture(params=EACH)
def folder(tiny_models, request):
    return tiny_models / request.param
