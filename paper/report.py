"""The report of the paper's claims: tables, pictures, one page, and the numbers as JSON.

    report.html    everything on one page, with the pictures inside it
    summary.md     the tables
    values.json    the numbers of every run and claim
    curves.json    the lists that the pictures show
    *.png          the pictures

`results` is everywhere {name of the run: [the measures of each seed]}, as `run_all` of runs.py
returns it. A table is a list of rows of text, the head first. What was not run shows as "-" in a
table and is missing in a picture. Without matplotlib there are no pictures at all.
"""
from __future__ import annotations

import base64
import html
import io
import platform
from collections import Counter
from types import SimpleNamespace

import torch

from colors import color_of
from compare import RATIOS, pyplot
from files import read_json, write_json, write_text, write_whole
from paper.claims import CLAIMS, judge_claims, judge_rows, look_up, subtract, summarise
from paper.ladder import ONLY_LARGE_TEXT, only_large_table, pretrained_rows
from toy import tasks

# (label, run, way of writing phi)
METHODS = (
    ("base, not tuned", "base", "alone"),
    ("MDLM", "mdlm", "alone"),
    ("train-only", "memdlm", "alone"),
    ("train & inference", "memdlm", "adapted"),
    ("MDLM, adapted", "mdlm", "adapted"),
    ("train & inference, phi of another prompt", "memdlm", "another"),
)

RECALLS = (
    ("its prompt", "closed memdlm", "cover"),
    ("nothing", "closed memdlm", "alone"),
    ("another prompt", "closed memdlm", "cover another"),
    ("its prompt, the paper's masks", "closed memdlm", "paper's masks"),
    ("closed-book MDLM: nothing", "closed mdlm", "alone"),
    ("closed-book MDLM: its prompt, at inference only", "closed mdlm", "cover"),
    ("MDLM that sees the prompt: nothing", "open mdlm", "alone"),
)

# The paper's BABILong-1K scores of the ablations (train & inference).
PAPER = {
    "memdlm": .684, "mdlm": .538,
    "kl": .660, "reverse_kl": .624, "hidden_cosine": .582, "hidden_mse": .572,
    "all layers": .574, "ffn+attn": .648, "full rank": .602,
    "clip global": .632, "clip 0.5": .630, "clip 2": .640, "no clip": .682,
    "s_pre 1.25": .624, "s_pre 1.75": .674, "s_pre 2": .678,
    "inconsistent": .604, "anchor only": .646, "pre only": .604,
    "pre only, anchor tokens": .620, "anchor tokens": .668,
    "K=3": .644, "K=4": .590,
}

# (label, run with memory, run without)
FAR = (
    ("tuned, eta 0.003", "memdlm, lr 0.001, eta 0.003", "mdlm"),
    ("tuned, eta 0.01", "memdlm, lr 0.001, eta 0.01", "mdlm"),
    ("tuned, eta 0.03 (the default here)", "memdlm", "mdlm"),
    ("tuned, eta 0.1", "memdlm, lr 0.001, eta 0.1", "mdlm"),
    ("tuned, phi shared by 16, eta 0.1", "memdlm, shared, eta 0.1", "mdlm"),
    ("tuned, phi shared by 4, eta 0.1", "memdlm, shared by 4, eta 0.1", "mdlm, batch 4"),
    ("tuned at lr 3e-4, eta 0.03", "memdlm, lr 0.0003, eta 0.03", "mdlm, lr x 0.3"),
    ("tuned at lr 3e-4, eta 0.1", "memdlm, lr 0.0003, eta 0.1", "mdlm, lr x 0.3"),
    ("tuned at lr 3e-4, eta 0.3", "memdlm, lr 0.0003, eta 0.3", "mdlm, lr x 0.3"),
    ("tuned at lr 1e-4, eta 0.1", "memdlm, lr 0.0001, eta 0.1", "mdlm, lr 0.0001"),
    ("tuned by a LoRA, eta 0.01", "lora memdlm, eta 0.01", "lora mdlm"),
    ("tuned by a LoRA, eta 0.03", "lora memdlm", "lora mdlm"),
    ("tuned by a LoRA, eta 0.1", "lora memdlm, eta 0.1", "lora mdlm"),
    ("tuned by a LoRA, base of 4 layers, eta 0.03",
     "lora memdlm, 4 layers", "lora mdlm, 4 layers"),
    ("tuned by a LoRA, base trained 3 times as long, eta 0.03",
     "lora memdlm, 3 x steps", "lora mdlm, 3 x steps"),
    ("tuned, phi from the prompt (ours)", "memdlm from the prompt", "mdlm"),
    ("scratch, eta 0.003 (the default here)", "scratch memdlm", "scratch mdlm"),
    ("scratch, eta 0.01", "scratch memdlm, eta 0.01", "scratch mdlm"),
    ("scratch, eta 0.03", "scratch memdlm, eta 0.03", "scratch mdlm"),
    ("scratch, eta 0.1", "scratch memdlm, eta 0.1", "scratch mdlm"),
    ("scratch, phi shared by 32, eta 0.1", "scratch memdlm, shared, eta 0.1", "scratch mdlm"),
    ("scratch, 4 times the steps", "scratch memdlm, 4 x steps", "scratch mdlm, 4 x steps"),
    ("scratch, D = 128", "scratch memdlm, wide", "scratch mdlm, wide"),
)


# ---- Tables -------------------------------------------------------------------------------------

def format_mean(numbers, digits=3, sign="", percent=False):
    """"mean ± standard error" of the numbers that are there, "-" if none is."""
    numbers = [x for x in numbers if x is not None]
    if not numbers:
        return "-"
    mean, error, _ = summarise(numbers)
    scale = 100 if percent else 1
    text = f"{scale * mean:{sign}.{digits}f}"
    return f"{text} ± {scale * error:.{digits}f}" if len(numbers) > 1 else text


def claims_table(verdicts):
    """The claims with their statistics. A `base` stands in a column of its own if any row has one.

    "could be seen" is the smallest effect that this many seeds would have shown four times in
    five. "alone" is the verdict of the interval by itself, "verdict" that after Holm's correction.
    """
    out = [["place", "claim", "difference", "95 % interval", "seeds", "could be seen", "p",
            "p, Holm", "alone", "verdict"]]
    for claim in verdicts:
        difference = interval = agree = seen = p = holm = "-"
        if "mean" in claim:
            difference, agree = f"{claim['mean']:+.3f}", claim["agree"]
        if "p" in claim:
            low, high = claim["interval"]
            difference += f" ± {claim['error']:.3f}"
            interval = f"{low:+.3f} to {high:+.3f}"
            seen, p, holm = f"{claim['seen']:.3f}", format_p(claim["p"]), format_p(claim["holm"])
        out.append([claim["place"], claim["claim"], difference, interval, agree, seen, p, holm,
                    claim["alone"], claim["verdict"]])
    if any("base" in claim for claim in verdicts):
        for row, base in zip(out, ["base"] + [claim.get("base", "toy") for claim in verdicts]):
            row.insert(1, base)
    return out


def format_p(p):
    if p < 0.0001:
        return "< .0001"
    return f"{p:.{4 if p < 0.01 else 2}f}".removeprefix("0")


def retrieval_table(results, lengths):
    """Tables 1 and 2: percent of answer tokens right."""
    columns = [f"{task} {length}" for task in tasks.RETRIEVAL for length in lengths]
    out = [["method", *columns, *(f"mean {length}" for length in lengths)]]
    for label, run, way in METHODS:
        keys = [f"{column} {way}" for column in (*columns, *lengths)]
        cells = [format_mean(look_up(results, run, key), 1, percent=True) for key in keys]
        out.append([label, *cells])
    return out


def ablation_table(results):
    out = [["variant", "paper, BABILong-1K", "training loss", "retrieval, adapted, %",
            "minus the default", "train-only, %"]]
    labels = {"memdlm": "MemDLM, default", "mdlm": "MDLM, adapted"}
    for run, score in PAPER.items():
        difference = subtract(results, (run, "in adapted"), ("memdlm", "in adapted"))
        out.append([
            labels.get(run, run),
            f"{score:.3f}",
            format_mean(look_up(results, run, "train")),
            format_mean(look_up(results, run, "in adapted"), 1, percent=True),
            format_mean(difference, 1, "+", percent=True) if run != "memdlm" else "",
            format_mean(look_up(results, run, "in alone"), 1, percent=True)])
    return out


def far_table(results):
    """What training with memory changes, far from the defaults too: MemDLM minus its MDLM."""
    columns = (("loss, train-only", "nats alone", 3, False),
               ("loss, both adapted", "nats adapted", 3, False),
               ("retrieval, train-only, %", "in alone", 1, True),
               ("retrieval, both adapted, %", "in adapted", 1, True))
    out = [["setting (MemDLM minus MDLM)", *(column[0] for column in columns)]]
    for label, memory, plain in FAR:
        cells = []
        for _, key, digits, percent in columns:
            difference = subtract(results, (memory, key), (plain, key))
            cells.append(format_mean(difference, digits, "+", percent))
        out.append([label, *cells])
    return out


def recall_table(results):
    """The closed book: share of answers right, by what phi is written from."""
    finished = [measures for measures in results.get("closed memdlm", []) if measures]
    before, after = "recall ", " alone"
    columns = [key.removeprefix(before).removesuffix(after) for key in (finished or [{}])[0]
               if key.startswith(before) and key.endswith(after) and key != "recall alone"]
    out = [["closed book: phi written from", *columns, "mean"]]
    for label, run, way in RECALLS:
        keys = [f"recall {column} {way}" for column in columns] + [f"recall {way}"]
        out.append([label, *(format_mean(look_up(results, run, key), 2) for key in keys)])
    return out


def to_markdown(table):
    head, *rows = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *rows])


# ---- Pictures: what they share ------------------------------------------------------------------

WIDTHS = (2.8, 1.8, 0.9)  # of lines that may lie on each other: each is seen beside the next
SETTINGS = (("scratch ", "from scratch"), ("", "tuned"))  # what a run's name begins with, title


def mean_curve(results, run, key):
    """A list that was measured on each seed -> its mean and standard error, or None, None."""
    lists = [measures[key] for measures in results.get(run, []) if measures and key in measures]
    if not lists:
        return None, None
    curves = torch.tensor(lists, dtype=torch.float64)  # [seeds, ...]
    mean = curves.mean(0)
    if len(lists) == 1:
        return mean, torch.zeros_like(mean)
    return mean, curves.std(0) / len(lists) ** 0.5


def draw_curve(ax, x, results, run, key, label, color, width=1.3):
    """A line with a band of its standard error. x=None counts from 0."""
    mean, error = mean_curve(results, run, key)
    if mean is not None:
        x = x or range(len(mean))
        ax.plot(x, mean, "-", color=color, label=label, linewidth=width)
        ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)


def draw_legend(ax, **options):
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**options)


def draw_heat_map(ax, table, title, columns, rows, limits, colors):
    """A table of numbers as coloured cells, with the numbers in them."""
    low, high = limits
    image = ax.imshow(table, vmin=low, vmax=high, cmap=colors, aspect="auto")
    ax.set(title=title, xticks=range(len(columns)), xticklabels=columns,
           yticks=range(len(rows)), yticklabels=rows)
    ax.spines[:].set_visible(False)
    for i, numbers in enumerate(table):
        for j, x in enumerate(numbers):
            red, green, blue, _ = image.cmap(image.norm(x))
            is_dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            text = f"{x:.2f}".replace("0.", ".").replace("-.00", ".00")
            ax.text(j, i, text, ha="center", va="center", fontsize=8,
                    color="white" if is_dark else "black")


# ---- Pictures: one function for each ------------------------------------------------------------

def draw_exposure(plt, results, size):
    """Fig. 3: the exposure-bias ratio, beside the two losses that it divides."""
    curves = (("MDLM", "mdlm", "alone", "MDLM"),
              ("MDLM, logits / 3", "mdlm", "cooled", "MDLM, logits / 3"),
              ("train-only", "memdlm", "alone", "train-only"),
              ("train & inference", "memdlm", "adapted", "train & inference"))
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for (prefix, how), (left, right) in zip(SETTINGS, axes):
        for label, run, way, color in curves:
            static, _ = mean_curve(results, prefix + run, f"exposure static {way}")
            if static is None:
                continue
            sequential, _ = mean_curve(results, prefix + run, f"exposure sequential {way}")
            style, color = ":" if way == "cooled" else "-", color_of(color)
            left.plot(RATIOS, sequential / static, style, color=color, label=label)
            if way != "cooled":
                right.plot(RATIOS, sequential, color=color, label=label)
                right.plot(RATIOS, static, "--", color=color)
        left.set(title=f"{how}: sequential / static loss",
                 xlabel="mask ratio (decoding goes right)", xlim=(1, 0.1))
        right.set(title=f"{how}: sequential loss, dashed static", xlabel="mask ratio",
                  ylabel="nats per masked token", xlim=(1, 0.1))
        draw_legend(left)
    return figure


def draw_bins(plt, results, size):
    """The loss by mask ratio."""
    curves = (("mdlm", "alone", "MDLM", "MDLM"),
              ("memdlm", "alone", "train-only", "train-only"),
              ("memdlm", "adapted", "train & inference", "train & inference"),
              ("memdlm", "answers", "phi of the answers", "phi of the answers"))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (prefix, how), ax in zip(SETTINGS, axes):
        for run, way, label, color in curves:
            draw_curve(ax, RATIOS, results, prefix + run, f"bins {way}", label, color_of(color))
        ax.set(title=f"{how}: loss by mask ratio", xlabel="mask ratio",
               ylabel="nats per masked token", xlim=(1, 0.1))
    draw_legend(axes[0])
    return figure


def draw_dynamics(plt, results, size):
    """Fig. 4: the loss in training, with memory and without."""
    curves = (("mdlm", "curve", "MDLM", "MDLM"),
              ("memdlm", "curve", "MemDLM, with phi of the answers",
               "phi of the answers"),
              ("memdlm", "curve alone", "MemDLM, without phi", "train-only"))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (prefix, how), ax in zip(SETTINGS, axes):
        for (run, key, label, color), width in zip(curves, WIDTHS):
            steps, _ = mean_curve(results, prefix + run, "curve steps")
            if steps is not None:
                x = steps.tolist()
                draw_curve(ax, x, results, prefix + run, key, label, color_of(color),
                           width)
        ax.set(title=f"{how}: training", xlabel="step", ylabel="nats per masked token")
        ax.margins(x=0.02)
    draw_legend(axes[0])
    return figure


def draw_needle(plt, results, size):
    """Answers right by prompt length and depth: without phi, with it, and the difference."""
    depths = ["0-20", "20-40", "40-60", "60-80", "80-100"]
    parts = (("memdlm", "adapted", size.lengths, "tuned, open book"),
             ("closed memdlm", "cover", (16, 32, 64), "closed book"))
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    for (run, way, lengths, how), (left, middle, right) in zip(parts, axes):
        off, _ = mean_curve(results, run, "needle alone")  # [lengths, 5]
        on, _ = mean_curve(results, run, f"needle {way}")
        if off is None:
            continue
        rows = [f"{length} tokens" for length in lengths]
        for ax, table, title, limits, colors in (
                (left, off, "phi off", (0, 1), "cividis"),
                (middle, on, "phi on", (0, 1), "cividis"),
                (right, on - off, "difference", (-1, 1), "PuOr")):
            draw_heat_map(ax, table.tolist(), f"{how}: {title}", depths, rows, limits, colors)
    figure.supxlabel("where in the prompt the pair stands, in percent of its length", fontsize=9)
    return figure


def draw_inner(plt, results, size):
    """The loss of each inner step, before it and after."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
    for (prefix, how), ax in zip(SETTINGS, axes):
        for key, shift, color in (("before", -0.2, color_of("MDLM")),
                                  ("after", 0.2, color_of("train & inference"))):
            mean, error = mean_curve(results, prefix + "memdlm", f"inner {key}")
            if mean is not None:
                x = [k + shift for k in range(len(mean))]
                ax.bar(x, mean, 0.38, yerr=error, color=color, label=f"{key} the step")
        ax.set(title=f"{how}: adapting to a prompt", xticks=[0, 1],
               xticklabels=["stage 1, pre-anchor", "stage 2, anchor"],
               ylabel="nats per masked token")
        ax.set_ylim(top=1.3 * ax.get_ylim()[1])  # room for the legend
    draw_legend(axes[0], loc="upper right")
    return figure


def draw_order(plt, results, size):
    """When each position of the response is decided."""
    figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for run, way, label, color in (
            ("scratch mdlm", "alone", "MDLM", "MDLM"),
            ("scratch memdlm", "alone", "train-only", "train-only"),
            ("scratch memdlm", "cover", "adapted, cover:4", "train & inference")):
        draw_curve(ax, None, results, run, f"order {way}", label, color_of(color))
    ax.set(title="from scratch: when a position is decided", xlabel="position in the response",
           ylabel="mean step, of 16")
    draw_legend(ax)
    return figure


def draw_where(plt, results, size):
    """How far phi moves each matrix."""
    figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    mean, error = mean_curve(results, "memdlm", "where")
    if mean is None:
        return figure
    finished = [measures for measures in results["memdlm"] if measures]
    names = finished[0]["where names"]
    last = max(name.split(".")[1] for name in names)
    colors = []
    for name in names:
        is_default = name.split(".")[1] == last and ".mlp." in name
        colors.append(color_of("train & inference" if is_default else "MDLM"))
    ax.bar(range(len(names)), mean, yerr=error, color=colors)
    labels = [name.replace("layers.", "").replace("_proj", "") for name in names]
    ax.set_xticks(range(len(names)), labels, rotation=60, ha="right")
    ax.set(title="where phi lives, if all matrices may change "
                 "(blue: those of the paper's default)",
           ylabel="norm of the change")
    return figure


FRONTIER = {  # what is tuned -> (run, label, name of the colour)
    "all weights": (
        ("mdlm", "MDLM", "MDLM"),
        ("mdlm, half the steps", "half the steps", "MDLM"),
        ("mdlm, lr x 0.5", "lr x 0.5", "MDLM"),
        ("mdlm, lr x 0.3", "lr x 0.3", "MDLM"),
        ("mdlm, lr 0.0001", "lr x 0.1", "MDLM"),
        ("memdlm", "MemDLM, eta 0.03", "train-only"),
        ("memdlm, lr 0.001, eta 0.003", "eta 0.003", "train-only"),
        ("memdlm, lr 0.001, eta 0.01", "eta 0.01", "train-only"),
        ("memdlm, lr 0.0003, eta 0.03", "lr x 0.3, eta 0.03", "train-only"),
        ("memdlm from the prompt", "phi from the prompt", "train & inference")),
    "a LoRA": (
        ("lora mdlm", "MDLM", "MDLM"),
        ("lora mdlm, lr x 0.5", "lr x 0.5", "MDLM"),
        ("lora mdlm, lr x 2", "lr x 2", "MDLM"),
        ("lora mdlm, same compute", "equal compute", "MDLM"),
        ("lora memdlm", "MemDLM, eta 0.03", "train-only"),
        ("lora memdlm, eta 0.01", "eta 0.01", "train-only")),
}


def draw_frontier(plt, results, size):
    """Fig. 5 with its control: what each run learned of the new data against what it kept."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    base, _ = mean_curve(results, "base", "in alone")
    all_labels = []
    for (how, runs), ax in zip(FRONTIER.items(), axes):
        labels = []
        for run, label, color in runs:
            losses = [x for x in look_up(results, run, "nats alone") if x is not None]
            kept = [x for x in look_up(results, run, "in alone") if x is not None]
            if losses:
                (x, x_error, _), (y, y_error, _) = summarise(losses), summarise(kept)
                ax.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o", color=color_of(color),
                            markersize=4, elinewidth=0.8)
                labels.append(ax.annotate(label, (x, y), (6, 4), fontsize=7,
                                          textcoords="offset points"))
        if base is not None:
            ax.axhline(base.mean(), color="#CCCCCC", linewidth=0.8)
            ax.annotate("base", (ax.get_xlim()[1], base.mean()), ha="right", va="bottom",
                        fontsize=7)
        ax.set(title=f"tuning {how}: learning the new, keeping the old, without phi",
               xlabel="loss on the new data (left is better)", ylabel="retrieval (up is better)")
        all_labels.append((ax, labels))
    figure.draw_without_rendering()  # the layout decides where a point is
    for ax, labels in all_labels:
        spread_labels(ax, labels)
    return figure


def spread_labels(ax, labels):
    """Put each label where it covers no other label and no point, and sticks out of nothing."""
    points = [ax.transData.transform(label.xy) for label in labels]
    taken, frame = [], ax.get_window_extent()
    for label in labels:
        for x, y in ((6, 4), (6, -10), (-6, 4), (-6, -10), (6, 14), (-6, 14), (6, -20), (-6, -20)):
            label.set(position=(x, y), ha="left" if x > 0 else "right")
            box = label.get_window_extent()
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0
            if inside and not any(map(box.overlaps, taken)) and not any(
                    box.x0 - 4 < px < box.x1 + 4 and box.y0 - 4 < py < box.y1 + 4
                    for px, py in points):
                break
        taken.append(box)


PICTURES = {  # name -> function, caption
    "dynamics": (draw_dynamics,
                 "Fig. 4. The loss with phi has seen the answers; only the loss without it "
                 "compares with MDLM."),
    "exposure": (draw_exposure,
                 "Fig. 3. Read the ratio beside the losses, and beside the dotted line: MDLM "
                 "itself, less confident, decoding the same."),
    "frontier": (draw_frontier,
                 "Fig. 5 with its control: whoever moves less forgets less."),
    "needle": (draw_needle, "Share of answers right by prompt length and depth of the pair."),
    "bins": (draw_bins, "Loss by mask ratio."),
    "inner": (draw_inner, "Inner loss before and after each step."),
    "order": (draw_order, "Unmasking order: low steps are decided first."),
    "where": (draw_where, "Norm of phi's change by layer and matrix."),
}


def draw_pictures(results, size, names=None):
    """{name: (caption, PNG bytes)} of these pictures, or of all. None without matplotlib."""
    plt, out = pyplot(), {}
    if plt is None:
        return out
    for name in names or PICTURES:
        draw, caption = PICTURES[name]
        figure, png = draw(plt, results, size), io.BytesIO()
        figure.savefig(png, format="png")
        plt.close(figure)
        out[name] = (caption, png.getvalue())
    return out


# ---- The page -----------------------------------------------------------------------------------

STYLE = (
    "body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; "
    "padding: 0 1em; color: #222 }\n"
    "table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto } "
    "td, th { padding: 3px 9px; text-align: left; border-bottom: 1px solid #e4e4e4; "
    "white-space: nowrap }\n"
    "img { max-width: 100% } figcaption { color: #666; font-size: 13px } "
    ".reproduced { color: #00694e } .reversed { color: #a33b00 } .control td { color: #666 }")

INTRO = (
    "{seeds} paired seeds: same initial weights, data, masks and test samples. A difference is the "
    "mean over seeds with its standard error; reproduced or reversed if its 95 % interval "
    "(Student's t) lies on one side of zero, or within 0.02 of it where the claim is 'about as "
    "good'; otherwise not reproduced, and the interval bounds what there may be. That is the "
    "column 'alone'. Many claims are tested, and of twenty without any effect one would seem to "
    "have one. So Holm's method raises each p for the number of claims in its family "
    "({families}), and the raised p gives the column 'verdict'. 'Could be seen' is the smallest "
    "effect that so many seeds with such a spread would show, alone, four times in five. Rows "
    "'control' ask what the paper leaves out. Not testable on a toy: LongBench (Table 3) and "
    "BABILong as such, whose texts need a model that reads; what happens at 7B and 16B weights; "
    "lengths of thousands of tokens; anything that a pretrained model's knowledge decides. Scope "
    "f = 0.05 and 0.25 are the same layer as 0.10 in a model of two layers.")


def build_page(title, intro, sections):
    """One HTML page. sections: (heading, text, table or None, [(caption, PNG bytes)])."""
    out = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
           f"<style>{STYLE}</style>"
           f"<h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>"]
    for heading, text, table, images in sections:
        out.append(f"<h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>")
        if table:
            out += html_table(table)
        for caption, png in images:
            data = base64.b64encode(png).decode()
            out.append(f"<figure><img alt='{html.escape(caption)}' "
                       f"src='data:image/png;base64,{data}'>"
                       f"<figcaption>{html.escape(caption)}</figcaption></figure>")
    return "\n".join(out)


def html_table(table):
    """A table as lines of HTML. Controls are grey, and two of the verdicts have a colour."""
    head, *rows = table
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    out = [f"<table><tr>{cells}</tr>"]
    for row in rows:
        cells = ""
        for cell in row:
            kind = f" class='{cell}'" if cell in ("reproduced", "reversed") else ""
            cells += f"<td{kind}>{html.escape(cell)}</td>"
        kind = "control" if row[0] == "control" else ""
        out.append(f"<tr class='{kind}'>{cells}</tr>")
    return out + ["</table>"]


def write_intro(results, verdicts):
    """The introduction, with the number of seeds that the runs have and the sizes of families."""
    counts = [len([measures for measures in runs if measures]) for runs in results.values()]
    counts = sorted(count for count in counts if count) or [0]
    low, high = counts[0], counts[-1]
    sizes = Counter(row["family"] for row in verdicts)
    families = "; ".join(f"{family}, {size}" for family, size in sizes.items())
    return INTRO.format(seeds=f"{low}" if low == high else f"{low} to {high}", families=families)


def build_sections(results, size, verdicts, images):
    """The sections of the page, as `build_page` takes them."""
    def pictures(*names):
        return [images[name] for name in names if name in images]

    return [
        ("Claims and verdicts", "", claims_table(verdicts), []),
        *pretrained_section(verdicts),
        ("What only 7B can show", ONLY_LARGE_TEXT, only_large_table(), []),
        ("Tables 1 and 2: retrieval",
         f"Percent of answer tokens right. Trained on lengths up to 64; base: {size.base} steps of "
         f"retrieval; tuned: {size.tuned} steps of other text.",
         retrieval_table(results, size.lengths), pictures("needle")),
        ("Fig. 3: exposure bias", "", None, pictures("exposure")),
        ("Fig. 4: training", "", None, pictures("dynamics", "bins")),
        ("Fig. 5: forgetting", "", None, pictures("frontier")),
        ("Fig. 6, 7, 9-11 and clipping: ablations",
         "Tuned models, each adapted by its own inner loop; retrieval at the trained lengths.",
         ablation_table(results), []),
        ("Closed book (ours)",
         "Share of answers right, 40 values; the decoder never sees the prompt, except in the last "
         "row.",
         recall_table(results), []),
        ("How far we looked",
         "Training with memory against the same without; loss on its own kind of held-out data "
         "(less is better), retrieval. No claim stands on these runs, so most have fewer seeds.",
         far_table(results), []),
        ("Inside the memory", "", None, pictures("inner", "order", "where"))]


def pretrained_section(verdicts):
    """The section of pretrained bases, in a list; an empty list if none was tried."""
    rows = pretrained_rows(verdicts)
    text = ("Rows of results/ladder.json, each below the toy's row with the same words. The rows "
            "of one base are a family.")
    return [("A pretrained base", text, claims_table(rows), [])] if rows else []


def build_summary(title, intro, sections):
    """The sections that have a table, as Markdown."""
    out = f"# {title}\n\n{intro}\n"
    for heading, text, table, _ in sections:
        if table:
            text = f"{text}\n\n" if text else ""
            out += f"\n## {heading}\n\n{text}{to_markdown(table)}\n"
    return out


def numbers_of(results):
    """Every number of every run, with five digits: {run: [{key: number} of each seed]}."""
    return {run: [{key: round(x, 5) for key, x in measures.items() if isinstance(x, float)}
                  if measures else None for measures in seeds] for run, seeds in results.items()}


def write_study(name, page, results, verdicts, folder, first_seed):
    """Write the page of a study and its numbers, NAME.md and NAME.json, and print the verdicts."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.md", page)
    write_json(folder / f"{name}.json", {"first seed": first_seed, "torch": torch.__version__,
                                         "claims": verdicts, "runs": numbers_of(results)})
    print(to_markdown(claims_table(verdicts)))
    print(f"\n{folder}/{name}.md holds the page, {name}.json the numbers")


def values_of(results, size, verdicts, first_seed):
    """What values.json holds: every number of every run, and the claims."""
    return {"size": size._asdict(), "first seed": first_seed, "torch": torch.__version__,
            "python": platform.python_version(), "machine": platform.machine(),
            "claims": verdicts, "runs": numbers_of(results)}


def lists_of(results):
    """What curves.json holds: the lists of those runs whose curves are drawn."""
    drawn = {run: [measures or {} for measures in seeds] for run, seeds in results.items()
             if any(key.startswith(("exposure", "needle"))
                    for measures in seeds for key in measures or ())}
    return {"runs": {run: [{key: x for key, x in measures.items() if isinstance(x, list)}
                           for measures in seeds] for run, seeds in drawn.items()}}


def write_report(results, size, folder, first_seed=0):
    """Write the report into the folder and print the verdicts. Returns the path of the page."""
    verdicts, images = judge_claims(results), draw_pictures(results, size)
    title, intro = "MemDLM's claims on the toy", write_intro(results, verdicts)
    sections = build_sections(results, size, verdicts, images)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.html", build_page(title, intro, sections))
    write_text(folder / "summary.md", build_summary(title, intro, sections))
    write_json(folder / "values.json", values_of(results, size, verdicts, first_seed))
    write_json(folder / "curves.json", lists_of(results))
    for name, (_, png) in images.items():
        write_whole(folder / f"{name}.png", lambda path, png=png: path.write_bytes(png))
    print(to_markdown(claims_table(verdicts)))
    print(f"\n{folder}/report.html holds the tables and pictures, summary.md the tables, "
          "values.json the numbers")
    return folder / "report.html"


def judge_again(path):
    """Judge the claims of an earlier report anew, from its values.json, without any run.

    The file is written again, and its tables beside it, as .md. The differences stay as they are.
    """
    values = read_json(path)
    try:
        size = SimpleNamespace(**values["size"])
        results, rows = values["runs"], [dict(row) for row in values["claims"]]
        families = {(claim.text, *claim.first): claim.family for claim in CLAIMS}
        for row in rows:
            row.setdefault("family", families.get((row["claim"], *row["first"]), ""))
        values["claims"] = verdicts = judge_rows(rows)
        sections = build_sections(results, size, verdicts, {})
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no values.json of a report of the claims") from None
    title, intro = "MemDLM's claims on the toy", write_intro(results, verdicts)
    write_json(path, values)
    write_text(path.with_suffix(".md"), build_summary(title, intro, sections))
    print(to_markdown(claims_table(verdicts)))
    print(f"\n{path} and {path.with_suffix('.md')} have the verdicts of today")
