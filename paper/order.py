"""How far does the exact outer gradient go? First against second order, on the toy.

    python evaluate.py order            everything; a second call goes on where the first stopped
    python evaluate.py order headline   the settings whose names begin with this

In the paper phi_K is a constant when theta learns (first order). `--order second` lets theta's
gradient go through the inner loop, as MAML (1703.03400) does. GradMem (2603.13875) did so for
autoregressive models that write a context into memory tokens: it reports 88 % of 96 key-value
pairs. Here the same question is put to the closed book: the prompt states pairs, each once; phi is
written from it; then the decoder, which never sees the prompt, is asked for the values of 8 keys.

The keys are 190 words of the toy's vocabulary, so that up to 128 pairs can have keys of their own.
The values are 40, so guessing gives .025. Training goes from 8 pairs to 64. 128 are never trained.

Every setting has a folder, runs/order/<name>-<seed>, with a checkpoint. Its numbers stand in
results/order.json when it is measured.

Fixed before any of these runs, after trials of 300 steps of the lever "full, eta 1" (seed 100, up
to 32 pairs: .77 at 8 pairs, .57 at 64):

    exploring    seed 100, 1,000 steps: the inner steps, the levers, the paper's setting
    headline     the lever with the highest recall at 64 pairs, in second order and in first,
                 3,000 steps, with fresh seeds 0, 1 and 2
    metric       recall at 64 pairs, stated once; the goal is .95 in second order

Changed since: the lever "full, eta 3" was added when "eta 1" had been measured, and no other.

Added when the headline was known, with seeds of its own: two or three rounds of four masks, in
place of one round of eight. Of 64 pairs the lever "full, eta 1, 8 steps" recalled .989 where some
mask hid the value and not its key, and .082 where none did. (This lever was trained twice: .862 of
all at first, when they were not counted apart, and then .870.) The rule is the same: the better of
the two on seed 100, then 3,000 steps with seeds 3, 4 and 5, in both orders.
"""
from __future__ import annotations

import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

import memdlm
from colors import color_of
from compare import mark_right, pyplot, save_picture, write_phi
from console import last_words
from data import Sample, collate
from files import read_json, write_json, write_text
from memdlm import MemDLM
from paper.report import to_markdown
from paper.runs import worker_pool
from runs import load_checkpoint, peak_memory, save_checkpoint
from settings import Settings
from toy.model import ToyConfig, ToyDLM
from toy.tasks import WORDS
from toy.tokenizer import SEP, SPECIALS, VALUES
from train import learning_rate, make_optimizer

RUNS, RESULTS = Path("runs/order"), Path("results")
KEYS = [word for word in WORDS.words[len(SPECIALS):] if word not in VALUES]
TRAINED, ASKED = (8, 16, 32, 64), 8  # pairs of a prompt, keys that are asked for
MEASURED, SAMPLES = (8, 16, 32, 64, 128), 128
EXPLORING, CONFIRMING = 100, {"headline": (0, 1, 2), "rounds": (3, 4, 5)}


# ---- What is trained ----------------------------------------------------------------------------

CLOSED = dict(memory_from="prompt", closed_book=True, per_sample=True, layers=1, batch=16, lr=3e-3,
              steps=1000, save_every=100)
RECIPE = CLOSED | dict(inner_lr=0.3, trajectory="cover:4")  # train.py's: a LoRA of rank 32
OPEN = dict(per_sample=True, layers=1, batch=16, lr=3e-3, steps=1000, save_every=100)

# What could help second order, each a change to the recipe.
LEVERS = {
    "full, eta 1": dict(adapter="full", inner_lr=1.0),
    "full, eta 1, 8 steps": dict(adapter="full", inner_lr=1.0, trajectory="cover:8"),
    "full, eta 1, lr 1e-3": dict(adapter="full", inner_lr=1.0, lr=1e-3),
    "full, eta 3": dict(adapter="full", inner_lr=3.0),
    "full": dict(adapter="full"),
    "full, eta 1, width 128": dict(adapter="full", inner_lr=1.0, width=128),
    "eta 1": dict(inner_lr=1.0),
    "rank 128": dict(rank=128, alpha=256.0),
}
# More rounds of masks, each a change to the lever that the headline has.
ROUNDS = {f"4 masks, {R} rounds": dict(trajectory=f"cover:4x{R}") for R in (2, 3)}


def plan_settings(results):
    """{name: settings without the seed}, in the order in which they are trained.

    The headlines are among them once their levers are measured.
    """
    plan = {f"lever {name}": RECIPE | dict(order="second") | change
            for name, change in LEVERS.items()}
    if best := choose_best(results, LEVERS):
        plan |= in_both_orders("headline", RECIPE | LEVERS[best] | dict(steps=3000))
        rounds = {name: RECIPE | LEVERS[best] | change for name, change in ROUNDS.items()}
        plan |= {f"lever {name}": s | dict(order="second") for name, s in rounds.items()}
        if more := choose_best(results, ROUNDS):
            plan |= in_both_orders("rounds", rounds[more] | dict(steps=3000))
    for K in (4, 2, 8, 1):
        plan |= in_both_orders(f"steps {K}", RECIPE | dict(trajectory=f"cover:{K}"))
    for eta in (0.003, 0.1):
        plan |= in_both_orders(f"paper {eta:g}", OPEN | dict(inner_lr=eta))
    return plan


def in_both_orders(name, settings):
    return {f"{name}, {order}": settings | dict(order=order) for order in ("second", "first")}


def choose_best(results, levers):
    """The lever with the highest recall at 64 pairs; None before all are measured."""
    runs = {name: results.get(f"lever {name}", {}).get(str(EXPLORING)) for name in levers}
    if not all(runs.values()):
        return None
    return max(runs, key=lambda name: runs[name]["recall"]["own"]["64"])


def next_job(results, beginnings):
    """What is to be run next: name, seed and settings; None when all is done."""
    for name, settings in plan_settings(results).items():
        wanted = not beginnings or any(name.startswith(each) for each in beginnings)
        for seed in CONFIRMING.get(name.partition(",")[0], [EXPLORING]):
            done = results.get(name, {}).get(str(seed))
            if wanted and (not done or done["settings"] != settings):
                return name, seed, settings
    return None


# ---- The task -----------------------------------------------------------------------------------

def make_sample(rng, pairs):
    """Pairs "fox ruby ba jade ...", each stated once; then "ba ? fox ?", for up to 8 of them."""
    stated = [(key, rng.choice(VALUES)) for key in rng.sample(KEYS, pairs)]
    asked = rng.sample(stated, min(ASKED, pairs))
    rest = [SEP] + WORDS.encode(" ".join(f"{key} {value}" for key, value in asked))
    prompt = WORDS.encode(" ".join(f"{key} {value}" for key, value in stated))
    return Sample(prompt, rest, [False] + [False, True] * len(asked))


def make_batch(names, pairs, closed_book):
    """A batch of samples, each of which its name decides."""
    samples = [make_sample(random.Random(f"order {name}"), pairs) for name in names]
    return collate(samples, names, closed_book)


def pairs_of_step(s, step):
    """How many pairs the prompts of a step have: 8 first; up to 64 from .53 of the steps on.

    At each time the two largest sizes so far take turns at random.
    """
    stage = min(len(TRAINED) - 1, int(step / s.steps / 0.7 * len(TRAINED)))
    rng = random.Random(f"order {s.seed} {step}")
    return rng.choice(TRAINED[max(0, stage - 1):stage + 1])


# ---- One setting --------------------------------------------------------------------------------

class Trained(NamedTuple):
    """A model that was trained, and what that took."""
    model: MemDLM
    steps: int      # fewer than were planned if a gradient was not finite
    seconds: float  # of CPU
    memory: float   # MiB above what the process had before the first step


def train_setting(s, folder):
    """Train one model, or go on with it if the folder holds the start of this very run."""
    net = ToyDLM(ToyConfig(WORDS.vocab_size, WORDS.mask_id, s.width, s.layers, s.heads), s.seed)
    model, start, before = MemDLM(net, s).train(), 0, peak_memory()
    optimizer = make_optimizer(s, list(model.parameters()))
    costs = {"settings": asdict(s), "0": [0.0, 0.0]}  # by step: seconds, MiB
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model.safetensors").exists():
        saved = read_json(folder / "costs.json")
        if saved["settings"] == costs["settings"]:
            start, costs = load_checkpoint(folder, model, optimizer), saved
    (used, most), began = costs[str(start)], time.process_time()

    def spent():
        return [used + time.process_time() - began, max(most, peak_memory() - before)]
    for step in range(start, s.steps):
        names = [f"{s.seed} {step} {place}" for place in range(s.batch)]
        batch = make_batch(names, pairs_of_step(s, step), s.closed_book)
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        if not norm.isfinite():
            return Trained(model, step, *spent())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step)
        optimizer.step()
        if (step + 1) % s.save_every == 0 or step + 1 == s.steps:
            costs[str(step + 1)] = spent()
            write_json(folder / "costs.json", costs)
            save_checkpoint(folder, model, optimizer, step + 1)
    return Trained(model, s.steps, *costs[str(s.steps)])


@torch.no_grad()
def measure_recall(s, model):
    """{way: {pairs: share of answers right}}. Without phi, with phi of the prompt, of another.

    With cover also "apart" and "together": of phi of the prompt, the answers that some mask hid
    without their key, and the others. "never apart" is the share of those others.
    """
    sources = {"alone": "nothing", "own": "prompt", "another": "another"}
    covers = s.trajectory.startswith("cover") and s.memory_from == "prompt"
    recall = {}
    model.eval()
    for pairs in MEASURED:
        right, never = {way: [] for way in sources}, []
        for start in range(0, SAMPLES, 32):
            names = [f"test {pairs} {number}" for number in range(start, start + 32)]
            batch = make_batch(names, pairs, s.closed_book)
            for way, source in sources.items():
                phi = write_phi(model, s, source, batch)
                right[way].append(mark_right(model, s, batch, phi)[batch.maskable])
            if covers:
                never.append(masked_together(s, batch))
        right = {way: torch.cat(parts).double() for way, parts in right.items()}
        if covers:
            never = torch.cat(never)
            right |= {"apart": right["own"][~never], "together": right["own"][never],
                      "never apart": never.double()}
        for way, values in right.items():
            share = float(values.mean()) if len(values) else None
            recall.setdefault(way, {})[str(pairs)] = share
    return recall


def masked_together(s, batch):
    """For each answer, in the order of the batch: no mask hid it and left its key in sight. [N]"""
    masks, _ = memdlm.cover(s, batch.prompt_valid, batch.prompt_valid, None, batch.seeds)
    apart = torch.stack([mask[:, 1::2] & ~mask[:, ::2] for mask in masks]).any(0)  # [B, pairs]
    asked = batch.x0.roll(1, 1)[..., None] == batch.prompt[:, None, ::2]  # [B, L, pairs]
    return ~(asked & apart[:, None]).any(-1)[batch.maskable]


def run_setting(name, seed, settings):
    """Train and measure, in a process of its own. Returns what stands in order.json."""
    s = Settings(**settings, seed=seed, threads=1)
    torch.set_num_threads(1)
    folder = RUNS / f"{name.replace(',', '').replace(' ', '-')}-{seed}"
    trained = train_setting(s, folder)
    return {"settings": settings, "steps": trained.steps,
            "recall": measure_recall(s, trained.model),
            "seconds": round(trained.seconds, 3), "memory": round(trained.memory)}


# ---- All of them --------------------------------------------------------------------------------

def run_order(beginnings=()):
    """Do what is not done yet, and write numbers, page and picture."""
    path, page = RESULTS / "order.json", RESULTS / "order.md"
    results = read_json(path) if path.exists() else {}
    names = [*plan_settings(results), "headline, second", "headline, first"]
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in names):
            raise ValueError(f"no setting begins with {beginning!r}; there are: "
                             f"{'; '.join(dict.fromkeys(names))}")
    with last_words("stopped; the same command goes on with what is left"):
        while job := next_job(results, beginnings):
            name, seed, _ = job
            print(f"{name}, seed {seed}", flush=True)
            with worker_pool(1) as pool:  # a process for each, whose peak of memory is its own
                results.setdefault(name, {})[str(seed)] = pool.submit(run_setting, *job).result()
            write_json(path, results)
            write_text(page, make_page(results))
            draw_recall(results, RESULTS / "order.png")
    if not choose_best(results, LEVERS):
        print("the headline is chosen when all levers are measured\n")
    write_text(page, make_page(results))
    print(page.read_text())


# ---- The page -----------------------------------------------------------------------------------

PAGE = """# The exact outer gradient, on the toy

*How far does the closed book go if theta's gradient goes through the inner loop?* `python
evaluate.py order` wrote this page; paper/order.py says what was run. An extension of the paper,
whose gradient is of first order. GradMem (2603.13875) has the exact gradient for autoregressive
models and reports 88 % of 96 pairs.

The prompt states pairs of a key and a value, each once. Phi is written from it. The decoder never
sees it, and is asked for the values of {asked} keys. Numbers are shares of answers right on
{samples} held-out prompts; guessing gives .025. Training goes up to 64 pairs, so 128 are
beyond it. Seconds are of one CPU core, for one training step of 16 prompts; memory is the
peak of a training above its start.

## The headline

The rule was fixed before any of these runs: the best lever of the table "What it takes", trained
for 3,000 steps with fresh seeds. (One lever, "full, eta 3", was added when "eta 1" had been
measured, and no other.) {headline}Means over seeds {seeds}, with standard errors.

{headline_table}

{finding}

{picture}## What was missing: pairs that are masked together

A pair is learned where a mask hides its value and leaves its key in sight. With K disjoint masks,
about one pair in K has both words behind the same mask, and nothing says which value goes with
which key. More rounds, each with new masks, take such pairs apart. Of 64 pairs, the headline's
lever and the same with rounds, 1,000 steps, one seed; below, the better one in both orders, 3,000
steps:

{parts_table}

This was added when the headline was known, by the same rule, with fresh seeds {more_seeds}. Its
seconds compare with those above only where the machine was as idle:

{rounds_table}

{rounds_finding}

## Inner steps

The recipe of `train.py` (LoRA of rank 32, eta .3), 1,000 steps of training, one seed. K steps
cover the prompt with K disjoint masks. With one step everything is masked at once, the keys too,
so nothing can say which value goes with which key.

{steps_table}

## What it takes

Changes to the row "4 steps, second order" above, one seed. The best at 64 pairs is the headline.
*Full* is a phi of full rank: one of rank 32 has fewer directions than a prompt has pairs.

{levers_table}

## The paper's own setting

Phi is written from the noised response; the decoder sees the prompt; two steps; one phi per sample;
one seed. *Alone* is theta without phi. *Own prompt*: phi is written from the prompt at inference.

{paper_table}
"""


def make_page(results):
    """The whole page as markdown; a table says what is missing."""
    best = choose_best(results, LEVERS)
    steps = {f"{K} step{'s' * (K > 1)}, {order} order": (f"steps {K}, {order}", "own")
             for K in (1, 2, 4, 8) for order in ("first", "second")}
    paper = {f"eta {eta:g}, {order} order: {words}": (f"paper {eta:g}, {order}", way)
             for eta in (0.003, 0.1) for order in ("first", "second")
             for way, words in (("alone", "alone"), ("own", "own prompt"))}
    drawn = any(results.get(f"{name}, second") for name in ("headline", "rounds", "steps 4"))
    return PAGE.format(
        asked=ASKED, samples=SAMPLES,
        seeds=name_seeds("headline"), more_seeds=name_seeds("rounds"),
        headline=f"The best was: {best}. " if best else "",
        headline_table=headline_table(results, "headline"),
        finding=make_finding(results, "headline"), parts_table=make_parts_table(results, best),
        rounds_table=headline_table(results, "rounds"),
        rounds_finding=make_finding(results, "rounds"), steps_table=make_table(results, steps),
        levers_table=make_table(results, {"no change": ("steps 4, second", "own")} | {
            name: (f"lever {name}", "own") for name in LEVERS}),
        paper_table=make_table(results, paper),
        picture="![Recall](order.png)\n\n" if drawn else "")


def name_seeds(what):
    *some, last = map(str, CONFIRMING[what])
    return f"{', '.join(some)} and {last}"


def headline_table(results, what):
    """Both orders, and the controls of the second. what: headline, or rounds."""
    first, last = (f"{what}, {order}" for order in ("first", "second"))
    return make_table(results, {
        "first order": (first, "own"), "**second order**": (last, "own"),
        "second order, phi of another prompt": (last, "another"),
        "second order, no phi": (last, "alone")})


def make_parts_table(results, best):
    """Answers whose value some mask hid without its key, and the others."""
    rows = {name: f"lever {name}" for name in (best, *ROUNDS) if name}
    rows |= {f"rounds, {order} order, 3,000 steps": f"rounds, {order}"
             for order in ("first", "second")}
    lines = [["", "never apart", "right if apart", "right if never", "right"]]
    for words, name in rows.items():
        recalls = [run["recall"] for run in results.get(name, {}).values()
                   if "apart" in run["recall"]]
        for_all = [[recall[way]["64"] for recall in recalls]
                   for way in ("never apart", "apart", "together", "own")]
        cells = [describe([x for x in values if x is not None]) for values in for_all]
        lines.append([words, *cells] if recalls else [words, "not run yet", *[""] * 3])
    return to_markdown(lines)


def make_table(results, rows):
    """rows: {words: (name of the setting, way)} -> a table of recall, seconds and memory."""
    head = ["", *(f"{pairs} pairs" for pairs in MEASURED), "s per step", "minutes", "MiB"]
    lines = [head]
    for words, (name, way) in rows.items():
        runs = list(results.get(name, {}).values())
        if not runs:
            lines.append([words, "not run yet", *[""] * (len(head) - 2)])
            continue
        cells = [describe([run["recall"][way][str(pairs)] for run in runs]) for pairs in MEASURED]
        seconds = sum(run["seconds"] for run in runs) / len(runs)
        steps = sum(run["steps"] for run in runs) / len(runs)
        if steps < runs[0]["settings"]["steps"]:
            words += f" (diverged after {steps:g} steps)"
        lines.append([words, *cells, f"{seconds / max(1, steps):.3f}", f"{seconds / 60:.1f}",
                      f"{max(run['memory'] for run in runs)}"])
    return to_markdown(lines)


def describe(values):
    """A mean, and its standard error over seeds if there are several."""
    values = torch.tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return f"{values.item():.3f}" if len(values) else "-"
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def make_finding(results, what):
    """What the headline came to at 64 pairs, in a sentence. what: headline, or rounds."""
    runs = {order: results.get(f"{what}, {order}", {}) for order in ("first", "second")}
    shared = [seed for seed in runs["second"] if seed in runs["first"]]
    if not shared:
        return "Not run yet, or not for both orders."
    first, second = ([runs[order][seed]["recall"]["own"]["64"] for seed in shared]
                     for order in ("first", "second"))
    gains = [b - a for a, b in zip(first, second)]
    times = sum(runs["second"][seed]["seconds"] / runs["first"][seed]["seconds"]
                for seed in shared) / len(shared)
    mean = sum(second) / len(second)
    reached = "reaches" if mean >= 0.95 else "does not reach"
    return (f"**Second order {reached} .95 at 64 pairs: {describe(second)}, against "
            f"{describe(first)} in first order** (paired difference {describe(gains)}, "
            f"{len(shared)} seeds). A step costs {times:.1f} times as much CPU time.")


def draw_recall(results, path):
    """Draw recall by the number of pairs, and by the number of inner steps."""
    plt = pyplot()
    if plt is None:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.6), layout="constrained",
                                         sharey=True)
    for order in ("first", "second"):
        color = color_of(f"{order} order")
        for what, style, words in (("headline", "o-", "headline"), ("rounds", "s-", "more rounds"),
                                   ("steps 4", "o--", "recipe of train.py, 4 steps")):
            runs = results.get(f"{what}, {order}", {}).values()
            if runs:
                means = [sum(run["recall"]["own"][str(pairs)] for run in runs) / len(runs)
                         for pairs in MEASURED]
                left.plot(MEASURED, means, style, color=color, label=f"{order} order, {words}")
        points = [(K, run["recall"]["own"]["32"]) for K in (1, 2, 4, 8)
                  for run in results.get(f"steps {K}, {order}", {}).values()]
        if points:
            right.plot(*zip(*points), "o--", color=color, label=f"{order} order")
    left.set(xscale="log", xlabel="pairs in the prompt", ylabel="answers right", ylim=(0, 1.03))
    left.set_xticks(MEASURED, MEASURED)
    right.set(xscale="log", xlabel="inner steps, 32 pairs, recipe of train.py")
    right.set_xticks((1, 2, 4, 8), (1, 2, 4, 8))
    for axes in (left, right):
        axes.minorticks_off()
    if left.lines:
        figure.legend(handles=left.lines, loc="outside lower center", ncols=2, fontsize=7)
    save_picture(figure, path)
