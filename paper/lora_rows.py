"""What does memory in training do to theta? One gain of the claims on the toy, taken apart.

    python evaluate.py lora

When a LoRA is tuned on a base that stays, training with memory keeps more of what the base could
do, and the LoRA learns the new text no worse. When all weights are tuned, memory costs retrieval.
Why? Each sentence of `SENTENCES` is an answer that could be wrong, and names the two measures whose
difference decides it.

Fixed before the first run:

    seeds      20 and up. The claims, and all that was tried before them, had seeds 0 to 7.
    models     those of the claims: a base of retrieval tasks, then 300 steps of `prose` by a LoRA
               of rank 8, eta 0.03, lr 1e-3, batch 16.
    kept       share of answers right at 32 and 64 tokens, without phi ("in alone").
    learned    nats on held-out prose, without phi ("nats alone").
    excess     kept, minus what plain MDLM keeps at the same loss. What it keeps there is read off
               the straight lines between its own runs of this seed, sorted by loss: at 0.35, 0.5,
               0.7, 1, 1.4 and 2 times the learning rate. A loss beyond all of them counts as
               missing. "excess, same compute" is the same with runs of 2.1 times the steps, the
               price of memory.
    attention  entropy, and share on the needle, as `measure_attention` has them.
    verdicts   as in the claims: paired over seeds, Student's t, corrected for their number.

A second call goes on where the first was stopped. Every run has a folder in runs/lora.
"""
from __future__ import annotations

from pathlib import Path

from console import last_words
from paper.claims import Claim, judge_claims, look_up
from paper.report import claims_table, format_mean, to_markdown, write_study
from paper.runs import LORA, OFF, SIZES, STEP_COST, Run, base_recipe, run_parts, tuned_recipe

FIRST_SEED = 20
LAYERS, TIMES = (2, 4, 8), (1, 3, 10)              # of the map: layers, steps of the base
RATES = (0.35, 0.5, 0.7, 1, 1.4, 2)                # times the learning rate
MEMORY_RATES = (0.5, 1.4)                          # the same for MemDLM
SLOWER = (0.35, 0.5, 0.7, 1)                       # rates of plain tuning at equal compute
RANKS = (2, 32)                                    # besides 8


# ---- The runs -----------------------------------------------------------------------------------

def at_rate(name, rate):
    return name if rate == 1 else f"{name}, lr x {rate:g}"


def name_of(method, layers, times):
    """The name of a run on one of the bases of the map: "mdlm, 4 layers, 3 x steps"."""
    deeper = f", {layers} layers" if layers != 2 else ""
    return method + deeper + (f", {times} x steps" if times != 1 else "")


def lora_on(size, layers=2, times=1):
    """Settings of a LoRA on one of the bases, with memory."""
    return tuned_recipe(size) | LORA | dict(
        from_run=name_of("base", layers, times), layers=layers)


def plan_pairs(size):
    """The map: on each base a LoRA with memory and one without."""
    runs = {}
    for times in TIMES:
        for layers in LAYERS:
            base = base_recipe(size) | dict(layers=layers, steps=times * size.base)
            runs[name_of("base", layers, times)] = Run(base, ("kept", "attention"))
            for method, change in (("mdlm", OFF), ("memdlm", {})):
                settings = lora_on(size, layers, times) | change
                runs[name_of(method, layers, times)] = Run(settings, ("kept", "attention"), "plain")
    return runs


def plan_parts(size, layers=2):
    """What phi is, what it changes, and the pace, each in place of MemDLM's or MDLM's."""
    memory = lora_on(size, layers)
    pace = name_of("memdlm", layers, 1), name_of("mdlm", layers, 1)
    variants = {name: (memory, name)
                for name in ("noise", "another", "shuffled", "error", "path", "weights")}
    variants["mdlm at memdlm's pace"] = memory | OFF, f"plain at the pace of {pace[0]}"
    variants["memdlm at mdlm's pace"] = memory, f"plain at the pace of {pace[1]}"
    return {name_of(name, layers, 1): Run(settings, ("kept",), variant)
            for name, (settings, variant) in variants.items()}


def plan_rates(size):
    """MDLM and MemDLM at other learning rates, and MDLM with the compute of MemDLM."""
    memory, runs = lora_on(size), {}
    longer = dict(steps=int(STEP_COST["lora"] * size.tuned))
    for rate in RATES:
        change = dict(lr=rate * memory["lr"])
        runs[at_rate("mdlm", rate)] = Run(memory | OFF | change, ("kept",), "plain")
        if rate in MEMORY_RATES:
            runs[at_rate("memdlm", rate)] = Run(memory | change, ("kept",), "plain")
    for rate in SLOWER:
        change = longer | dict(lr=rate * memory["lr"])
        runs[at_rate("mdlm, same compute", rate)] = Run(memory | OFF | change, ("kept",), "plain")
    del runs["mdlm"]  # the rate of the pair, which is in the plan already
    return runs


def plan_scopes(size):
    """Other ranks of the LoRA; all weights; all weights but the ends."""
    runs = {}
    for method, change in (("mdlm", OFF), ("memdlm", {})):
        for rank in RANKS:
            lora = lora_on(size) | dict(lora_rank=rank, lora_alpha=2.0 * rank)
            runs[f"{method}, rank {rank}"] = Run(lora | change, ("kept",), "plain")
        whole = tuned_recipe(size) | change
        runs[f"{method}, all weights"] = Run(whole, ("kept", "attention"), "plain")
        runs[f"{method}, all but the ends"] = Run(whole, ("kept",), "no ends")
    return runs


def plan_lora(size):
    return (plan_pairs(size) | plan_parts(size) | plan_parts(size, 4) | plan_rates(size)
            | plan_scopes(size))


def list_parts(size):
    """The runs in the order of their worth: (names, number of seeds). Seeds are added later."""
    def on_base(layers, times=1):
        return tuple(name_of(what, layers, times) for what in ("base", "mdlm", "memdlm"))
    parts = [on_base(2), ("mdlm, all weights", "memdlm, all weights"), tuple(plan_parts(size)),
             tuple(plan_rates(size)), (*on_base(4), *plan_parts(size, 4)), tuple(plan_scopes(size))]
    for seeds in (3, 6):
        for names in parts:
            yield names, seeds
    for times in TIMES:
        for layers in LAYERS:
            yield on_base(layers, times), 3


# ---- What is derived ----------------------------------------------------------------------------

def read_off(x, points):
    """The height at x of the straight lines between points (x, y); None beyond the ends."""
    points = sorted(points)
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def add_excess(results):
    """Add "excess" and "excess, same compute" to the measures of each run on the base of two."""
    frontiers = {"excess": [at_rate("mdlm", rate) for rate in RATES],
                 "excess, same compute": [at_rate("mdlm, same compute", rate) for rate in SLOWER]}
    for key, names in frontiers.items():
        columns = zip(*(zip(look_up(results, name, "nats alone"),
                            look_up(results, name, "in alone")) for name in names))
        for seed, points in enumerate(columns):
            if any(None in point for point in points):
                continue
            for run, seeds in results.items():
                if " layers" in run or "x steps" in run or run.startswith("base"):
                    continue
                measures = seeds[seed] if seed < len(seeds) else None
                if measures and "nats alone" in measures:
                    there = read_off(measures["nats alone"], points)
                    if there is not None:
                        measures[key] = measures["in alone"] - there
    for measures in results.get("mdlm", []):
        if measures:
            measures["nothing"] = 0.0


# ---- The sentences ------------------------------------------------------------------------------

def sentence(text, first, expect, second, family):
    return Claim("LoRA", text, first, expect, second, family)


def parts_sentences(layers=2):
    """On one base: is it the pace, noise, the sample, the right answers, the error, the path?"""
    def kept(run):
        return name_of(run, layers, 1), "in alone"
    memory, plain = kept("memdlm"), kept("mdlm")
    where = "" if layers == 2 else f"base of {layers} layers: "
    for text, first, expect, second in (
            ("memory keeps more than plain tuning", memory, "more", plain),
            ("it is not the pace: plain tuning with the same length of every update keeps less",
             memory, "more", kept("mdlm at memdlm's pace")),
            ("... and memory still keeps more when it goes at plain tuning's pace",
             kept("memdlm at mdlm's pace"), "more", plain),
            ("it is not noise: a random phi of the same norm keeps no more than plain tuning",
             kept("noise"), "same", plain),
            ("... and memory keeps more than that", memory, "more", kept("noise")),
            ("phi must be the sample's own: memory keeps more than with a neighbour's phi",
             memory, "more", kept("another")),
            ("phi must hold the right answers: more than with the answers at wrong places",
             memory, "more", kept("shuffled")),
            ("the error that phi leaves is enough, sent down without phi",
             kept("error"), "more", plain),
            ("the path through phi is enough, with the plain error", kept("path"), "more", plain),
            ("it is enough to weigh a token less by as much as phi has explained of it",
             kept("weights"), "more", plain)):
        yield sentence(where + text, first, expect, second, f"parts, {layers} layers")


def frontier_sentences():
    nothing = ("mdlm", "nothing")
    yield sentence("it is no smaller learning rate: memory keeps more than plain tuning does at "
                   "the same loss", ("memdlm", "excess"), "more", nothing, "rates")
    yield sentence("... and than plain tuning with the same compute, at the same loss",
                   ("memdlm", "excess, same compute"), "more", nothing,
                   "rates")
    for rate in MEMORY_RATES:
        yield sentence(f"... at {rate:g} times the learning rate, too",
                       (at_rate("memdlm", rate), "excess"), "more", nothing, "rates")


def scope_sentences():
    for scope in (*(f"rank {rank}" for rank in RANKS), "all weights", "all but the ends"):
        yield sentence(f"memory keeps more than plain tuning: {scope}",
                       (f"memdlm, {scope}", "in alone"), "more", (f"mdlm, {scope}", "in alone"),
                       "scopes")


def attention_sentences():
    """What version 2 of the paper says first: memory in training relieves attention."""
    for scope in ("", ", 4 layers", ", all weights"):
        memory, plain = f"memdlm{scope}", f"mdlm{scope}"
        what = scope.removeprefix(", ") or "a LoRA"
        for times in (1, 2, 4):
            yield sentence(f"attention is less spread after training with memory: {what}, at "
                           f"{times} x the trained length",
                           (memory, f"entropy x{times}"), "less",
                           (plain, f"entropy x{times}"), "attention")
            yield sentence(f"... and more of it is on the needle: {what}, {times} x",
                           (memory, f"on needle x{times}"), "more",
                           (plain, f"on needle x{times}"), "attention")


def map_sentences():
    for times in TIMES:
        for layers in LAYERS:
            if (layers, times) in ((2, 1), (4, 1)):
                continue  # among those of the parts
            memory, plain = (name_of(method, layers, times) for method in ("memdlm", "mdlm"))
            yield sentence(f"memory keeps more: {layers} layers, base of {times} x the steps",
                           (memory, "in alone"), "more", (plain, "in alone"), "bases")


SENTENCES = [*parts_sentences(), *frontier_sentences(), *parts_sentences(4), *scope_sentences(),
             *map_sentences(), *attention_sentences()]


# ---- The page -----------------------------------------------------------------------------------

PAGE = """# What memory does to theta

A LoRA on a base that stays is tuned on a new text, with memory in training and without. Nothing is
measured with phi. *Kept* is the share of answers right on the base's own tasks, in percent;
*learned* is the loss on held-out new text, in nats. Seeds are fresh: nothing was tried on them
before. `python evaluate.py lora` wrote this page; the definitions stand at the top of
`paper/lora_rows.py` and were fixed before the runs. A sentence whose runs are not finished is
missing or "not run".

## Sentences, and what decides each

{sentences}

## Every run on the base of two layers

{runs}

## Attention

Where the gaps of an answer look, at 1, 2 and 4 times the trained length: the entropy in nats, and
the share on the pair that is asked for. Means over layers and heads.

{attention}

## Other bases

Kept, with memory minus without, in points; what the base kept before, in percent.

{bases}
"""


def runs_table(results):
    out = [["run", "kept, %", "learned, nats", "excess, points", "excess, same compute",
            "length of all updates"]]
    for run in results:
        if " layers" in run or "x steps" in run:
            continue
        row = [run]
        for key, digits, percent in (("in alone", 1, True), ("nats alone", 3, False),
                                     ("excess", 1, True), ("excess, same compute", 1, True),
                                     ("moved in all", 1, False)):
            numbers = look_up(results, run, key)
            if run == "base" and key == "nats alone":
                numbers = []  # on its own text, which is another
            row.append(format_mean(numbers, digits, "", percent))
        out.append(row)
    return out


def attention_table(results):
    """How widely attention is spread, and what of it is on the needle."""
    keys = [(key, times) for key in ("entropy", "on needle") for times in (1, 2, 4)]
    out = [["run", *(f"{key}, {times} x" for key, times in keys)]]
    for run, seeds in results.items():
        if any(measures and "entropy x1" in measures for measures in seeds):
            out.append([run, *(format_mean(look_up(results, run, f"{key} x{times}"))
                               for key, times in keys)])
    return out


def map_table(results):
    """Rows: layers. Columns: how long the base was trained."""
    out = [["layers", *(f"base x {times}: kept before; gain" for times in TIMES)]]
    for layers in LAYERS:
        row = [str(layers)]
        for times in TIMES:
            base, plain, memory = (look_up(results, name_of(method, layers, times), "in alone")
                                   for method in ("base", "mdlm", "memdlm"))
            gains = [a - b for a, b in zip(memory, plain) if None not in (a, b)]
            row.append(f"{format_mean(base, 1, '', True)}; {format_mean(gains, 1, '+', True)}")
        out.append(row)
    return out


def write_lora_page(results, folder):
    """The page and its numbers, from what is finished so far."""
    add_excess(results)
    verdicts = judge_claims(results, SENTENCES)
    page = PAGE.format(sentences=to_markdown(claims_table(verdicts)),
                       runs=to_markdown(runs_table(results)), bases=to_markdown(map_table(results)),
                       attention=to_markdown(attention_table(results)))
    write_study("lora", page, results, verdicts, folder, FIRST_SEED)


def run_lora(jobs, out):
    """Work through the parts. After each, the page is written from what there is."""
    size, folder = SIZES["full"], Path(out)
    parts = list_parts(size)
    with last_words("stopped; the same command goes on with what is left"):
        for results in run_parts(plan_lora(size), parts, size, folder, jobs, FIRST_SEED):
            write_lora_page(results, folder)
