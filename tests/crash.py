"""End a training run suddenly, again and again, and see whether anything is lost.

    python tests/crash.py --kills 100

prints what was done and found. The exit code is 1 if anything differs.

Half of the kills come from outside: -9 at a random moment. The others come from a timer in the
process. It is set when the process begins to write a checkpoint, and goes off within the time that
the quickest one took. This ends the process as suddenly as -9.

The killed run is resumed until it ends. Its weights, optimiser and metrics must then be those of a
run that nobody touched, bit for bit. After each kill the checkpoint must be readable, and no resume
may repeat more steps than lie between two saves.
"""
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
FLAGS = ["--model", "toy", "--data", "languages", "--steps", "60", "--batch", "2", "--width", "16",
         "--layers", "1", "--heads", "2", "--log-every", "1", "--save-every", str(EVERY),
         "--sample-every", "0", "--table-samples", "0", "--threads", "1", "--no-control"]


def watch_saves(rng):
    """From now on a file says when this process is writing a checkpoint.

    With rng, one of the next checkpoints is not finished. Nothing handles SIGALRM, so it ends the
    process.
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
    """Start a training run as a process of its own, and return its number.

    Its output goes to log.txt. With rng, it dies while it saves.
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


def wait_for(child, until):
    """The exit code if the process ends before `until`, else None. After a kill it is negative."""
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def kill(child, rng):
    """Wait for a random moment, kill, and return the exit code.

    It is -9, or that of a run that ended before.
    """
    if (code := wait_for(child, time.monotonic() + rng.uniform(0.02, 1.2))) is not None:
        return code
    os.kill(child, signal.SIGKILL)
    return wait_for(child, time.monotonic() + 30)


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def last_step(folder):
    """The last step that a killed run logged, -1 for none; its last line may be half."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
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


def differs(folder):
    """Whether the run in this folder differs from the one that nobody touched."""
    one, whole = ((place / "model.safetensors").read_bytes() for place in (folder, Path("whole")))
    return one != whole or metrics(folder) != metrics(Path("whole"))


def start_or_resume(folder, rng=None):
    if (folder / "settings.json").exists():
        return start("--resume", str(folder), rng=rng)
    return start(*FLAGS, "--out", str(folder), rng=rng)


def crash(kills, seed=0):
    """Train and kill until so many kills have hit. Returns what happened."""
    rng, folder = random.Random(seed), Path("killed")
    report = {"kills": 0, "while_saving": 0, "runs": 0, "most_repeated": 0, "unreadable": 0,
              "different": 0}
    code = wait_for(start(*FLAGS, "--out", "whole"), time.monotonic() + 300)
    assert code == 0, Path("log.txt").read_text()
    while report["kills"] < kills:
        if report["kills"] % 2 == 1:  # this kill is aimed at a save
            child = start_or_resume(folder, random.Random(rng.random()))
            code = wait_for(child, time.monotonic() + 300)
        else:
            code = kill(start_or_resume(folder), rng)
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
            report["different"] += differs(folder)
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink()
            folder.rmdir()
        else:
            raise SystemExit(f"a run ended with {code}:\n{Path('log.txt').read_text()[-2000:]}")
    code = wait_for(start_or_resume(folder), time.monotonic() + 300)
    if code != 0:
        raise SystemExit(f"the last run ended with {code}:\n{Path('log.txt').read_text()[-2000:]}")
    report["runs"] += 1
    report["different"] += differs(folder)
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
