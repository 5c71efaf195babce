"""The paper's tables with our scores beside its numbers."""
from __future__ import annotations

import json
from pathlib import Path


METHODS = {(False, False): "MDLM", (True, False): "train-only", (True, True): "train & inference",
           (False, True): "MDLM, adapted"}  # the last one is the control that the paper lacks


def print_tables(folder):
    """Each of the paper's tables: its numbers and, from every scores.json below the folder, ours. Blank where not run."""
    paper = json.loads((Path(__file__).parent.parent / "results" / "paper.json").read_text())
    ours = [row for path in sorted(Path(folder).rglob("scores.json")) for row in json.loads(path.read_text())]

    def found(model, method, column, other):
        """The newest of our scores for a cell, in percent."""
        _, task, length, metric = column
        values = [r["value"] for r in ours if r["model"] == model and METHODS[r["memory"], r["adapt"]] == method and
                  (r["task"], r["length"], r["metric"]) == (task, length, metric) and
                  {k: v for k, v in r["other"].items() if k != "memory"} == other]
        return f"{100 * values[-1]:.2f}" if values else "-"

    for table in paper["tables"]:
        print(f"\n{table['name']} (percent; paper / ours)\n")
        print("| method | " + " | ".join(column[0] for column in table["columns"]) + " |\n|---" + "|---" * len(table["columns"]) + "|")
        for method in (*table["rows"], "MDLM, adapted"):
            numbers = table["rows"].get(method, [None] * len(table["columns"]))
            cells = [f"{'-' if x is None else f'{x:.2f}'} / {found(table['model'], method, column, {})}"
                     for x, column in zip(numbers, table["columns"])]
            print(f"| {method} | " + " | ".join(cells) + " |")
    ablations = paper["ablations"]
    print(f"\n{ablations['name']} (percent)\n\n| variant | paper | ours |\n|---|---|---|")
    for name, other, value in ablations["rows"]:
        print(f"| {name} | {value:.1f} | {found(ablations['model'], 'train & inference', ablations['column'], other)} |")
    print(f"\nOurs: {len(ours)} scores from {folder}, written by --tasks.")
