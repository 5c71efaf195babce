"""The paper's tables, with our scores beside its numbers.

The paper's numbers lie in results/paper.json. Ours come from the scores.json files that
`python evaluate.py tasks` writes. A cell without a score of ours shows a dash. All scores of a line
come from one model, with one limit and the same settings.
"""
from __future__ import annotations

import json
from pathlib import Path

from console import say
from paper.scores import load_scores

# (trained with memory, adapted to each prompt) -> the paper's word for it. The paper lacks the
# fourth. It is the control: the same adaptation of a model that was not trained for it. The last
# two are models as they were published, or with an adapter from elsewhere.
METHODS = {(False, False): "MDLM", (True, False): "train-only", (True, True): "train & inference",
           (False, True): "MDLM, adapted", (None, False): "not trained here",
           (None, True): "not trained here, adapted"}


def print_tables(folder):
    """Print each of the paper's tables, with the scores of every scores.json below the folder."""
    numbers = Path(__file__).parent.parent / "results" / "paper.json"
    paper = json.loads(numbers.read_text())
    scores = []
    for path in sorted(Path(folder).rglob("scores.json")):
        scores += load_scores(path)
    for table in paper["tables"]:
        print_table(table, scores)
    print_ablations(paper["ablations"], scores)
    print_all(scores)
    say(f"\nOurs: {len(scores)} scores from {folder}, written by evaluate.py tasks.")


def print_table(table, scores):
    """Print a table with a line per method. A cell says: the paper's number / ours.

    A method has several lines if several models of ours, limits or settings belong to it.
    """
    columns = table["columns"]
    say(f"\n{table['name']} (percent; paper / ours)\n")
    say("| method | " + " | ".join(column[0] for column in columns) + " |")
    say("|---" + "|---" * len(columns) + "|")
    for method in METHODS.values():
        ours = find_lines(scores, table["model"], method, columns, {})
        theirs = table["rows"].get(method, [None] * len(columns))
        if not ours and method.startswith("not trained here"):
            continue
        for label, cells in ours or [(method, ["-"] * len(columns))]:
            pairs = [f"{'-' if number is None else f'{number:.2f}'} / {cell}"
                     for number, cell in zip(theirs, cells)]
            say(f"| {label} | " + " | ".join(pairs) + " |")


def print_ablations(ablations, scores):
    """Print the table of ablations, with a line per variant, or several as in `print_table`."""
    say(f"\n{ablations['name']} (percent)\n\n| variant | paper | ours |\n|---|---|---|")
    method = "train & inference"
    for name, settings, number in ablations["rows"]:
        ours = find_lines(scores, ablations["model"], method, [ablations["column"]], settings)
        for label, (cell,) in ours or [(method, ["-"])]:
            say(f"| {name}{label.removeprefix(method)} | {number:.1f} | {cell} |")


def find_lines(scores, model, method, columns, settings):
    """Our lines of a table: [(label, a cell for each column)], in percent, "-" without a score.

    There is one line for each origin, so that none mixes two. Of scores with one name, in several
    files, the last counts. columns: [title, task, length, metric] each. settings: how the runs
    differ from the paper's defaults.
    """
    lines, origins = {}, {}
    for score in scores:
        place = [score["task"], score.get("length"), score["metric"]]
        where = [i for i, column in enumerate(columns) if column[1:] == place]
        fits = score["model"] == model and method_of(score) == method
        fits = fits and not_the_papers(score) == settings
        if fits and where and score.get("filter", "none") == "none":
            origin = json.dumps(origin_of(score), sort_keys=True)
            origins[origin] = score
            lines.setdefault(origin, ["-"] * len(columns))[where[0]] = show_score(score)
    return [(show_line(method, score, alone=len(lines) == 1), lines[origin])
            for origin, score in origins.items()]


def method_of(score):
    """The name of a score's method. Old rows do not know if the model was trained by a run."""
    return METHODS[score.get("memory"), bool(score["adapt"])]


def not_the_papers(score):
    """The method's settings that are not the paper's. The method's name says if it has memory."""
    other = score.get("other") or {}
    return {name: value for name, value in other.items() if name != "memory"}


def origin_of(score):
    """What all scores of a line share: the model and how it was asked."""
    return [score.get(key) for key in ("weights", "run", "adapter", "options", "limit")]


def show_line(method, score, alone):
    """The label of a line: its method, where it came from if not alone, and what is not usual."""
    parts = [] if alone else [name_source(score)]
    parts += show_settings(score.get("options"))
    if score.get("limit") is not None:
        parts.append(f"limit {score['limit']}")
    return ", ".join([method, *filter(None, parts)])


def name_source(score):
    """Where the model of a score came from: its run, its adapter or its weights."""
    return score.get("run") or score.get("adapter") or score.get("weights") or ""


def show_settings(settings):
    """Settings by name, for a label."""
    return [f"{name} {value}" for name, value in sorted((settings or {}).items())]


def show_score(score):
    """A score in percent. With a limit it says of how many samples."""
    limited = f" ({score.get('samples')} samples)" if score.get("limit") is not None else ""
    value = score["value"]
    return (f"{100 * value:.2f}" if isinstance(value, (int, float)) else str(value)) + limited


def print_all(scores):
    """Print every score of ours, also those that are in no table of the paper."""
    if scores:
        say("\nAll scores of ours\n")
        say("| task | length | metric | score | samples | model | method | settings |")
        say("|---" * 8 + "|")
    for score in scores:
        model = " ".join(filter(None, [score["model"], name_source(score)]))
        metric = ",".join([score["metric"], score.get("filter", "none")]).removesuffix(",none")
        settings = show_settings(not_the_papers(score) | (score.get("options") or {}))
        if score.get("limit") is not None:
            settings.append(f"limit {score['limit']}")
        length = "" if score.get("length") is None else score["length"]
        say(f"| {score['task']} | {length} | {metric} | {score['value']} | "
              f"{score.get('samples')} | {model} | {method_of(score)} | {', '.join(settings)} |")
