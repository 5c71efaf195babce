"""The paper's tables, with our scores beside its numbers.

The paper's numbers lie in results/paper.json. Ours come from the scores.json files that
`python evaluate.py tasks` writes. A cell without a score of ours shows a dash.
"""
from __future__ import annotations

import json
from pathlib import Path

# (trained with memory, adapted to each prompt) -> the paper's word for it. The paper lacks the
# last one. It is the control: the same adaptation of a model that was not trained for it.
METHODS = {(False, False): "MDLM", (True, False): "train-only", (True, True): "train & inference",
           (False, True): "MDLM, adapted"}


def print_tables(folder):
    """Print each of the paper's tables, with the scores of every scores.json below the folder."""
    numbers = Path(__file__).parent.parent / "results" / "paper.json"
    paper = json.loads(numbers.read_text())
    scores = []
    for path in sorted(Path(folder).rglob("scores.json")):
        scores += json.loads(path.read_text())
    for table in paper["tables"]:
        print_table(table, scores)
    print_ablations(paper["ablations"], scores)
    print(f"\nOurs: {len(scores)} scores from {folder}, written by evaluate.py tasks.")


def print_table(table, scores):
    """Print a table with a row per method. A cell says: the paper's number / ours."""
    columns = table["columns"]
    print(f"\n{table['name']} (percent; paper / ours)\n")
    print("| method | " + " | ".join(column[0] for column in columns) + " |")
    print("|---" + "|---" * len(columns) + "|")
    for method in (*table["rows"], "MDLM, adapted"):
        cells = []
        for number, column in zip(table["rows"].get(method, [None] * len(columns)), columns):
            theirs = "-" if number is None else f"{number:.2f}"
            cells.append(f"{theirs} / {find_score(scores, table['model'], method, column, {})}")
        print(f"| {method} | " + " | ".join(cells) + " |")


def print_ablations(ablations, scores):
    """Print the table of ablations, with a row per variant."""
    print(f"\n{ablations['name']} (percent)\n\n| variant | paper | ours |\n|---|---|---|")
    for name, settings, number in ablations["rows"]:
        ours = find_score(scores, ablations["model"], "train & inference", ablations["column"],
                          settings)
        print(f"| {name} | {number:.1f} | {ours} |")


def find_score(scores, model, method, column, settings):
    """Our score for a cell, in percent; the last if there are several, "-" if there is none.

    column: [title, task, length, metric]. settings: how the run differs from the paper's defaults.
    """
    _, task, length, metric = column
    found = "-"
    for score in scores:
        other = {name: value for name, value in score["other"].items() if name != "memory"}
        if (score["model"] == model and METHODS[score["memory"], score["adapt"]] == method
                and (score["task"], score["length"], score["metric"]) == (task, length, metric)
                and other == settings):
            found = f"{100 * score['value']:.2f}"
    return found
