"""Train and adapt in one process for as long as you like, and watch its memory.

    python tests/soak.py --minutes 60

prints a line per round and a summary. The exit code is 1 if memory grows or a weight changes.

A round trains the default toy and its control for some steps, with checkpoints and pictures. Then
it adapts to a thousand prompts and decodes after them. All rounds do the same. So if the last third
of them holds more memory than the first, something has leaked.
"""
import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import memdlm
import train
from runs import build, load_checkpoint, read_settings

STEPS, PROMPTS, BATCH = 100, 1000, 8


def resident():
    """Megabytes of this process in memory now (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def one_round(folder, number):
    """Train, adapt and decode once. Returns whether adapting left every weight as it was."""
    sys.argv = ["train.py", "--model", "toy", "--steps", str(STEPS), "--save-every", "20",
                "--threads", "1", "--table-samples", "8", "--seed", str(number),
                "--out", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main()
    s = read_settings(folder)
    data, model = build(s)
    load_checkpoint(folder, model)
    backbone = model.backbone.eval()
    before = {name: p.clone() for name, p in backbone.state_dict().items()}
    for start in range(0, PROMPTS, BATCH):
        batch = data.tests("16 x1", range(start, start + BATCH), s.closed_book)
        phi, _ = memdlm.adapt(backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
        for _ in memdlm.denoise(backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds,
                                phi):
            pass
    return all(torch.equal(p, before[name]) for name, p in backbone.state_dict().items())


def growth(levels):
    """Megabytes at the start and at the end, each a median of a third, and whether that is growth.

    The first rounds load what is loaded once, and fill the allocator's pools.
    """
    levels = levels[8:]
    third = len(levels) // 3
    early, late = statistics.median(levels[:third]), statistics.median(levels[-third:])
    return early, late, late - early > max(10, 0.1 * (len(levels) - third))


def soak(minutes):
    end, levels, sound = time.monotonic() + 60 * minutes, [], True
    with tempfile.TemporaryDirectory() as place:
        while time.monotonic() < end or len(levels) < 30:
            folder = Path(place) / "r"
            shutil.rmtree(folder, ignore_errors=True)
            sound &= one_round(folder, len(levels))
            levels.append(resident())
            print(f"round {len(levels)}: {levels[-1]:.0f} MB", flush=True)
    early, late, grows = growth(levels)
    return {"minutes": minutes, "rounds": len(levels), "steps": 2 * STEPS * len(levels),
            "prompts": PROMPTS * len(levels), "weights_unchanged_by_adapting": sound,
            "early_mb": round(early), "late_mb": round(late), "grows": grows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    result = soak(parser.parse_args().minutes)
    print(json.dumps(result))
    sys.exit(result["grows"] or not result["weights_unchanged_by_adapting"])
