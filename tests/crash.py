"""End a training run suddenly, again and again, and see whether anything is lost.

    python tests/crash.py --kills 100        prints what was done and found; exit code 1 if anything
    differs

Half of the kills come from outside, -9 at a random moment. The others come from a timer in the
process that is set when a checkpoint begins to be written and goes off within the time that the
quickest one took: the process ends as suddenly. The killed run is resumed until it ends. Its
weights, optimiser and metrics must then be those of a run nobody touched, bit for bit; after each
kill the checkpoint must be readable; and no resume may repeat more than one save interval. """
import argparse
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runs
import train  # imported once: every run is a fork of this process

EVERY, SAVING = 4, Path("saving")
FLAGS = [
    "--model", "toy", "--data", "languages", "--steps", "60", "--batch", "2", "--width", "16",
    "--layers", "1", "--heads", "2", "--log-every", "1", "--save-every",
    str(EVERY), "--sample-every", "0", "--table-samples", "0", "--threads", "1", "--no-control"
]


def watch_saves(rng):
    """In this process: a file says when a checkpoint is being written.

    With rng one of the next ones is not finished: SIGALRM ends the process, for nothing handles it.
    """
    write, left, took = runs.write_whole, [rng.randint(2, 4) if rng else -1], [math.inf]

    def watched(path, how):
        if path.name != "model.safetensors":
            return write(path, how)
        left[0] -= 1
        begin = time.monotonic()
        SAVING.touch()
        if left[0] == 0:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, rng.uniform(0, took[0])))
        write(path, how)
        SAVING.unlink()
        took[0] = min(took[0], time.monotonic() - begin)
    runs.write_whole = watched


def start(*arguments, rng=None):
    """A training run as a process of its own; its output goes to log.txt.

    Returns its number. rng: it is to die while saving.
    """
    if (child := os.fork()) == 0:
        try:
            watch_saves(rng)
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.argv = ["train.py", *arguments]
            train.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            code = 70
        os._exit(code)
    return child


def ended(child, until):
    """The exit code if the process ends before `until`, else None.

    A process killed has a negative one.
    """
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def kill(child, rng):
    """Wait for a random moment and kill.

    Returns the exit code: -9, or that of a run that ended before.
    """
    if (code := ended(child, time.monotonic() + rng.uniform(0.02, 1.2))) is not None:
        return code
    os.kill(child, signal.SIGKILL)
    return ended(child, time.monotonic() + 30)


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def last_step(folder):
    """The last step that a killed run logged, -1 for none; its last line may be half."""
    path = folder / "metrics.jsonl"
    whole = [line for line in path.read_text().splitlines(True)
             if line.endswith("\n")] if path.exists() else []
    return json.loads(whole[-1])["step"] if whole else -1


def saved_step(folder):
    """The step of the checkpoint, which must be readable if it is there at all."""
    if not (folder / "model.safetensors").exists():
        return 0
    from safetensors import safe_open
    with safe_open(folder / "model.safetensors", "pt") as file:
        for key in file.keys():
            file.get_tensor(key)
        return json.loads(file.metadata()["state"])["step"]


def crash(kills, seed=0):
    """Runs until so many kills have hit. Returns what happened."""
    rng, folder = random.Random(seed), Path("killed")
    report = {
        "kills": 0, "while_saving": 0, "runs": 0, "most_repeated": 0, "unreadable": 0,
        "different": 0
    }
    assert ended(start(*FLAGS, "--out", "whole"),
                 time.monotonic() + 300) == 0, Path("log.txt").read_text()
    want, want_metrics = Path("whole/model.safetensors").read_bytes(), metrics(Path("whole"))
    while report["kills"] < kills:
        begun, aimed = (folder / "settings.json").exists(), report["kills"] % 2 == 1
        arguments = ["--resume", str(folder)] if begun else [*FLAGS, "--out", str(folder)]
        if aimed:
            code = ended(start(*arguments, rng=random.Random(rng.random())), time.monotonic() + 300)
        else:
            code = kill(start(*arguments), rng)
        if code in (-signal.SIGKILL, -signal.SIGALRM):
            report["kills"] += 1
            report["while_saving"] += SAVING.exists()
            SAVING.unlink(missing_ok=True)
            try:
                report["most_repeated"] = max(report["most_repeated"],
                                              last_step(folder) + 1 - saved_step(folder))
            except Exception:
                report["unreadable"] += 1
        elif code == 0:
            report["runs"] += 1
            report["different"] += (folder / "model.safetensors"
                                    ).read_bytes() != want or metrics(folder) != want_metrics
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink()
            folder.rmdir()
        else:
            raise SystemExit(f"a run ended with {code}:\n{Path('log.txt').read_text()[-2000:]}")
    while (code := ended(start(*(["--resume", str(folder)] if (folder / "settings.json").exists()
                                 else [*FLAGS, "--out", str(folder)])),
                         time.monotonic() + 300)) != 0:
        raise SystemExit(f"the last run ended with {code}:\n{Path('log.txt').read_text()[-2000:]}")
    report["runs"] += 1
    report["different"] += (
        folder / "model.safetensors").read_bytes() != want or metrics(folder) != want_metrics
    return report


if __name__ == "__main__":
    import tempfile
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        result = crash(arguments.kills, arguments.seed)
    print(json.dumps(result))
    sys.exit(bool(result["unreadable"] or result["different"] or result["most_repeated"] > EVERY))
