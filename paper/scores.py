"""scores.json: what was measured, a row for each score, and of what.

A row has the score (`MEASURED`) and its name, which is everything else in the row: the task, its
length, metric and filter; the model with its weights, run and adapter; how it was trained and
whether it adapted to each prompt; the settings and the limit. A score that is measured again
replaces the one of the same name. All others stay.
"""
from __future__ import annotations

import json
from pathlib import Path

from files import write_json

# stderr: of the value. samples: their number. longest: the longest prompt, in tokens of the model.
# cut: how many prompts were cut to max_length.
MEASURED = ("value", "stderr", "samples", "longest", "cut")

# What each row has, also in files from the time before rows had more.
NEEDED = ("task", "metric", "value", "model", "adapt")


def load_scores(path):
    """The rows of a scores.json, [] if there is none. ValueError if it holds anything else."""
    path = Path(path)
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; move it away") from None
    bad = [n for n, row in enumerate(rows, 1) if not is_row(row)] if isinstance(rows, list) else [0]
    if bad:
        raise ValueError(f"{path}, row {bad[0]}: not a score of evaluate.py tasks; move the file "
                         "away")
    return rows


def is_row(row):
    """Is this a row of scores.json? Older ones have fewer fields."""
    return (isinstance(row, dict) and not {*NEEDED} - {*row}
            and all(isinstance(row[key], str) for key in ("task", "metric", "model"))
            and all(isinstance(row.get(key) or "", str)
                    for key in ("filter", "weights", "run", "adapter"))
            and all(isinstance(row.get(key) or {}, dict) for key in ("other", "options"))
            and row["adapt"] in (True, False) and row.get("memory") in (True, False, None))


def add_scores(path, rows):
    """Add rows to a scores.json. A row of the same name is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {name_of(row) for row in rows}
    others = [row for row in load_scores(path) if name_of(row) not in names]
    write_json(path, others + rows, indent=1)


def name_of(row):
    """All of a row but what was measured, as a text."""
    return json.dumps({key: row[key] for key in row if key not in MEASURED}, sort_keys=True)


def plain(value):
    """A value of the harness as JSON can hold it; None for one that it could not compute."""
    if getattr(value, "size", 0) == 1:  # of numpy or torch
        value = value.item()
    if value is None or value == "N/A":
        return None
    return value if isinstance(value, (str, int, float)) else str(value)
