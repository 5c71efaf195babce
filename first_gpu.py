"""The first ten minutes on a GPU, in one command.

    python first_gpu.py

Until now everything was computed, counted and simulated without one. Here each step is a command
line that you could type yourself. It runs in a process of its own, so a step that fails, runs out
of memory or breaks CUDA leaves the others alone. Its result is written as soon as it ends:

    results/gpu_NAME.json    commands, times, measured numbers, and the last lines of what failed
    results/gpu_NAME.md      the same as a page: device, driver, versions, tables

Call it again, and it goes on with what is not done or has failed. With another driver or torch,
everything runs anew.
"""
from __future__ import annotations

if __name__ == "__main__":  # first of all: a Ctrl-C may come while torch is imported
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback, until `begin` takes it
    import console
    console.begin()

import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from console import say
from files import read_json, write_json, write_text
from settings import Parser, one_line

ROOT = Path(__file__).resolve().parent
LIMIT = 900  # seconds that a command may take
FRUGAL = "--optimizer adamw8bit --lora-dtype bfloat16"
KEPT = 15  # of the last lines of a step that fails


def make_steps(gib):
    """{name: command lines}, for a card of so many GiB. Quick and certain steps come first.

    PLACE is a new folder for each step. What bench.py measures it writes to PLACE/measured.json.
    """
    def measure(words):
        return [f"bench.py {words} --json PLACE/measured.json"]

    moe = "--model llada-moe --random --length 2048"
    llada2 = f"--model llada2.1-mini --random --length 4096 {FRUGAL}"
    tiny = "--model PLACE/tiny --load-4bit"
    return {
        "tests on the GPU": ["-m pytest -q tests/test_cuda.py"],
        "a tiny checkpoint: train in 4-bit, adapt, answer": [
            "-m backbones.tiny llada-moe PLACE/tiny",
            f"train.py {tiny} --data PLACE/tiny/pairs.jsonl --steps 6 --out PLACE/run",
            'generate.py --run PLACE/run --adapt --prompt "What is 1 plus 2?" --length 8'],
        "middle size: kernels of a step": measure("--profile"),
        "Qwen3-0.6B's shape": measure("--model qwen3-0.6b --random --length 2048"),
        "LLaDA-MoE, grouped products": measure(f"{moe} --experts grouped"),
        "LLaDA-MoE, padded products": measure(f"{moe} --experts padded"),
        "LLaDA-MoE: kernels of a step": measure(f"{moe} --profile"),
        "LLaDA-8B, 2,048 tokens": measure("--model llada-8b --random --length 2048"),
        # A 24 GB card leaves 23 to PyTorch.
        "LLaDA2.1-mini as on a 24 GB card": measure(f"{llada2} --memory-cap {min(23, gib)}"),
        "LLaDA2.1-mini: kernels of a step": measure(f"{llada2} --profile"),
    }


def run_steps(steps, about, folder):
    """Run what is not done yet. Returns {name: result} of all steps.

    about: device and versions. A result of other versions does not count.
    """
    stem = "gpu_" + re.sub(r"\W+", "_", about["device"]).strip("_").lower()
    path = Path(folder) / f"{stem}.json"
    done = read_done(path, about) if path.exists() else {}
    for number, (name, commands) in enumerate(steps.items(), 1):
        say(f"[{number}/{len(steps)}] {name}")
        if done.get(name, {}).get("commands") == commands and done[name]["ok"]:
            say(f"    was done before, in {done[name]['seconds']:.0f} s")
            continue
        done[name] = result = run_step(commands)
        say(f"    {'done' if result['ok'] else 'FAILED'} after {result['seconds']:.0f} s")
        done = {name: done[name] for name in [*steps, *done] if name in done}  # in their order
        write_json(path, {"about": about, "steps": done}, indent=1)
        write_text(path.with_suffix(".md"), make_page(about, done))
    say(f"{path.with_suffix('.md')} has the tables, {path} the numbers")
    return done


def read_done(path, about):
    """{name: result} of the steps in an earlier file. ValueError if it is none of ours."""
    before = read_json(path)
    steps = before.get("steps") if isinstance(before, dict) else None
    if not isinstance(steps, dict) or not all(
            isinstance(step, dict) and {"commands", "ok", "seconds"} <= {*step}
            and (step["ok"] or {"exit_code", "last_lines"} <= {*step}) for step in steps.values()):
        raise ValueError(f"{path} is not what this program writes; move it away")
    return steps if before.get("about") == about else {}


def run_step(commands):
    """Run command lines, one after the other, until one fails."""
    begin, tail = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as place:
        code = 0
        for command in commands:
            words = [word.replace("PLACE", place) for word in shlex.split(command)]
            code, tail = run_command(words)
            if code:
                break
        result = {"commands": commands, "ok": code == 0, "seconds": time.perf_counter() - begin}
        if code:
            result |= {"exit_code": code, "last_lines": tail}
        measured = Path(place) / "measured.json"
        if measured.exists():
            result["measured"] = read_json(measured)
    return result


def run_command(words, limit=LIMIT):
    """Run Python with these words, and show what it says. Returns its exit code and last lines."""
    environment = os.environ | {"MEMDLM_CUDA": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, encoding="utf-8",
        errors="replace")
    late = threading.Event()

    def stop():
        late.set()
        process.kill()

    timer, tail = threading.Timer(limit, stop), []
    timer.start()
    try:
        for line in process.stdout:
            say(f"    {line.rstrip()}")
            tail = [*tail, line.rstrip()][-KEPT:]
        code = process.wait()
    finally:  # also at a Ctrl-C
        timer.cancel()
        process.kill()
    if late.is_set():
        tail.append(f"stopped after {limit} s")
    return code, tail


# ---- The page -----------------------------------------------------------------------------------

def make_page(about, done):
    """Device, versions, steps, times, memory, kernels and failures in Markdown."""
    lines = [f"# The first minutes on {about['device']}", "", "```bash", "python first_gpu.py",
             "```", "", ", ".join(f"{key} {value}" for key, value in about.items()) + ".", "",
             "| step | result | s |", "|---|---|---|"]
    for name, result in done.items():
        how = "done" if result["ok"] else f"failed, exit code {result['exit_code']}"
        lines.append(f"| {name} | {how} | {result['seconds']:.0f} |")
    measured = {name: result["measured"] for name, result in done.items() if "measured" in result}
    lines += times_table(measured) + kernels_table(measured)
    for name, result in done.items():
        if not result["ok"]:
            lines += ["", f"## Failed: {name}", "", "```text", *result["last_lines"], "```"]
    return "\n".join(lines) + "\n"


def times_table(measured):
    """Seconds of what was measured, and the planned memory beside the peak of a MemDLM step."""
    rows = {name: m for name, m in measured.items() if "planned_total" in m}
    if not rows:
        return []
    works = ["plain step", "MemDLM step", "forward pass", "prompt adaptation"]
    lines = ["", "## Seconds and memory", "",
             f"| | tokens | {' | '.join(works)} | decoding, s / token | with a cache "
             "| planned, GiB | peak, GiB |", "|---" * (len(works) + 6) + "|"]
    for name, m in rows.items():
        cells = [seconds_of(m.get(work)) for work in works]
        for ending in ("tokens", "with a cache"):
            key = next((key for key in m if re.fullmatch(rf"decoding \d+ {ending}", key)), "")
            new = int(key.split()[1]) if key else 1
            cells.append(seconds_of(m[key], new) if key else "")
        peak = (m["MemDLM step"] or [0, 0])[1] / 2**30
        lines.append(f"| {name} | {m['length']:,} | {' | '.join(cells)} "
                     f"| {m['planned_total'] / 2**30:.1f} | {f'{peak:.1f}' if peak else ''} |")
    return lines


def seconds_of(measured, parts=1):
    return f"{measured[0] / parts:.3f}" if measured else "does not fit"


def kernels_table(measured):
    """Launches, waits, and how busy the GPU is, of both kinds of steps."""
    rows = [(name, label, summary) for name, m in measured.items()
            for label, summary in m.get("profile", {}).items()]
    if not rows:
        return []
    lines = ["", "## Kernels", "", "| | step | s | launches | waits of the host | busy |",
             "|---|---|---|---|---|---|"]
    for name, label, summary in rows:
        counts = [f"{summary['launches']:,}", f"{summary['waits']:,}", f"{summary['busy']:.0%}"]
        lines.append(f"| {name} | {label} | {summary['seconds']:.3f} | {' | '.join(counts)} |")
    return lines


# ---- The command line ---------------------------------------------------------------------------

def describe_machine():
    """Device, driver and versions."""
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    major, minor = torch.cuda.get_device_capability(0)
    return {"device": torch.cuda.get_device_name(0), "GiB": f"{memory:.1f}",
            "architecture": f"sm_{major}{minor}", "driver": read_driver(),
            "torch": torch.__version__, "CUDA": torch.version.cuda or torch.version.hip,
            "Python": platform.python_version()}


def read_driver():
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True)
        return asked.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--out", default=ROOT / "results", metavar="FOLDER", type=Path,
                        help="where the results are written [default results]")
    arguments = parser.parse_args()
    with one_line():
        if not torch.cuda.is_available():
            why = ("this PyTorch is one for CPUs" if not (torch.version.cuda or torch.version.hip)
                   else "the driver may be older than this PyTorch needs; see nvidia-smi")
            raise ValueError(f"PyTorch {torch.__version__} finds no GPU here: {why}")
        arguments.out.mkdir(parents=True, exist_ok=True)
        about = describe_machine()
        gib = int(torch.cuda.get_device_properties(0).total_memory / 2**30)
        done = run_steps(make_steps(gib), about, arguments.out)
    sys.exit(0 if all(result["ok"] for result in done.values()) else 1)


if __name__ == "__main__":
    main()
