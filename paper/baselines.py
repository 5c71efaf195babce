"""Does memory in training help against exposure bias more than what others propose for it?

    python evaluate.py baselines

Three other objectives (objectives.py) against MDLM and MemDLM, in the two settings of the claims:
from scratch, and tuned. A MemDLM step costs more than a plain one, so all others get more steps:
each run takes the compute of MemDLM's. All runs of a seed share initial weights and samples.

Fixed before the first run:

    seeds      40 and up, which nothing was tried on
    compute    a MemDLM step costs 2 plain ones (1.96 from scratch, 1.94 tuned, counted in CPU
               seconds of 60 steps of each in turns); so does a step of `own`
    measures   those of Fig. 3 (ratio, static loss), the loss on held-out samples, and, tuned, the
               share of answers right of Table 1; all without phi
    verdicts   as in the claims
"""
from __future__ import annotations

from pathlib import Path

from console import last_words
from paper.claims import Claim, judge_claims, look_up
from paper.report import claims_table, format_mean, to_markdown, write_study
from paper.runs import OFF, SIZES, Run, base_recipe, run_parts, scratch_recipe, tuned_recipe

FIRST_SEED, SEEDS = 40, 5
SETTINGS, COST = ("scratch", "tuned"), 2  # and that of a MemDLM step, in plain ones
OBJECTIVES = {"papl": 1, "own": 2, "bell": 1}  # what is tried -> the cost of a step
MEASURES = {"scratch": ("exposure", "nats_short"), "tuned": ("exposure", "kept")}


def plan_baselines(size):
    """The runs. "scratch mdlm" and "tuned papl" have the compute of "scratch memdlm" and so on."""
    runs = {"base": Run(base_recipe(size), ())}
    for how, recipe in (("scratch", scratch_recipe(size)), ("tuned", tuned_recipe(size))):
        runs[f"{how} memdlm"] = Run(recipe, MEASURES[how])
        for objective, cost in {"mdlm": 1, **OBJECTIVES}.items():
            steps = round(COST / cost * recipe["steps"])
            change = OFF | dict(objective=objective, steps=steps)
            runs[f"{how} {objective}"] = Run(recipe | change, MEASURES[how])
    return runs


def list_claims():
    for how in SETTINGS:
        def measure(run, key):
            return f"{how} {run}", key
        for run in ("memdlm", *OBJECTIVES):
            yield Claim(
                "Fig. 3", f"{how}, same compute: {run} has a lower ratio than MDLM",
                measure(run, "ratio alone"), "less", measure("mdlm", "ratio alone"), how)
            yield Claim(
                "control", "... with a lower static loss, too",
                measure(run, "static alone"), "less", measure("mdlm", "static alone"), how)
            if how == "tuned":
                yield Claim(
                    "Table 1", f"{how}, same compute: {run} retrieves more than MDLM",
                    measure(run, "in alone"), "more", measure("mdlm", "in alone"), how)
        for run in OBJECTIVES:
            yield Claim(
                "Fig. 3", f"{how}, same compute: memdlm has a lower ratio than {run}",
                measure("memdlm", "ratio alone"), "less", measure(run, "ratio alone"), how)


PAGE = """# Memory against other remedies for exposure bias

Every run has the compute of MemDLM's. All is measured without phi. Seeds are fresh. `python
evaluate.py baselines` wrote this page; the definitions stand at the top of `paper/baselines.py` and
were fixed before the runs.

## Claims

{claims}

## Every run

{runs}
"""


def runs_table(results):
    out = [["run", "ratio", "ratio, matched", "static loss", "loss, held out", "retrieval, %"]]
    for run in results:
        if run == "base":
            continue
        row = [run] + [format_mean(look_up(results, run, f"{key} alone"))
                       for key in ("ratio", "ratio matched", "static", "nats")]
        out.append(row + [format_mean(look_up(results, run, "in alone"), 1, percent=True)])
    return out


def run_baselines(jobs, out, seeds=None):
    """Train and measure all of them, three seeds first, and write the page."""
    size, folder = SIZES["full"], Path(out)
    plan, seeds = plan_baselines(size), seeds or SEEDS
    parts = [(tuple(plan), count) for count in sorted({min(3, seeds), seeds})]
    with last_words("stopped; the same command goes on with what is left"):
        for results in run_parts(plan, parts, size, folder, jobs, FIRST_SEED):
            verdicts = judge_claims(results, list(list_claims()))
            page = PAGE.format(claims=to_markdown(claims_table(verdicts)),
                               runs=to_markdown(runs_table(results)))
            write_study("baselines", page, results, verdicts, folder, FIRST_SEED)
