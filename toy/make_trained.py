"""Make the trained toy that comes with the repository again, in toy/trained:

    python -m toy.make_trained

It is the run of `python train.py`, without what only training needs. Its numbers are those of
`python evaluate.py`; a test holds the weights to them.
"""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ROOT / "toy" / "trained"
COMMAND = ["train.py", "--model", "toy", "--no-control", "--table-samples", "0"]
SAMPLES = 100


def run_script(folder, script, *arguments):
    subprocess.run([sys.executable, ROOT / script, *arguments], cwd=folder, check=True)


def keep_weights(run):
    """Copy a run's settings and weights, without the optimiser's state, into TRAINED."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    TRAINED.mkdir(exist_ok=True)
    (TRAINED / "settings.json").write_text((run / "settings.json").read_text())
    with safe_open(run / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys() if name.startswith("model.")}
        save_file(weights, TRAINED / "model.safetensors", file.metadata())
    (TRAINED / "model.safetensors").chmod(0o644)


def write_numbers(table):
    """Write what was measured, and how the weights were made."""
    shares = {}
    for row in table["groups"][0]["rows"]:
        shares.setdefault(row["phi"], {})[row["column"]] = round(row["mean"], 4)
    made = {"made by": "python -m toy.make_trained", "which runs": " ".join(["python", *COMMAND]),
            "torch": torch.__version__, "samples per cell": SAMPLES,
            "share of answers right": shares}
    (TRAINED / "numbers.json").write_text(json.dumps(made, indent=1) + "\n")


def main():
    with tempfile.TemporaryDirectory() as folder:
        run_script(folder, *COMMAND, "--out", "run")
        keep_weights(Path(folder) / "run")
        run_script(folder, "evaluate.py", "run", "--samples", str(SAMPLES), "--json", "table.json")
        write_numbers(json.loads((Path(folder) / "table.json").read_text()))


if __name__ == "__main__":
    main()
