"""Results of the runs -> tables, pictures, one self-contained HTML page, a Markdown summary, and the numbers as JSON."""
from __future__ import annotations

import base64
import html
import io
import json
import platform

import torch

from compare import COLORS, RATIOS, pyplot
from files import write_whole
from paper.claims import judged, paired, summary, value
from toy import tasks

METHODS = (("MDLM", "mdlm", "alone"), ("train-only", "memdlm", "alone"), ("train & inference", "memdlm", "adapted"),
           ("MDLM, adapted", "mdlm", "adapted"), ("train & inference, phi of another prompt", "memdlm", "another"))

# The paper's BABILong-1K scores of the ablations (train & inference).
PAPER = {"memdlm": .684, "mdlm": .538,
         "kl": .660, "reverse_kl": .624, "hidden_cosine": .582, "hidden_mse": .572,
         "all layers": .574, "ffn+attn": .648, "full rank": .602,
         "clip global": .632, "clip 0.5": .630, "clip 2": .640, "no clip": .682,
         "s_pre 1.25": .624, "s_pre 1.75": .674, "s_pre 2": .678,
         "inconsistent": .604, "anchor only": .646, "pre only": .604, "pre only, anchor tokens": .620, "anchor tokens": .668,
         "K=3": .644, "K=4": .590}

FAR = (("tuned, eta 0.003", "memdlm, lr 0.001, eta 0.003", "mdlm"), ("tuned, eta 0.01", "memdlm, lr 0.001, eta 0.01", "mdlm"),
       ("tuned, eta 0.03 (the default here)", "memdlm", "mdlm"), ("tuned, eta 0.1", "memdlm, lr 0.001, eta 0.1", "mdlm"),
       ("tuned, phi shared by 16, eta 0.1", "memdlm, shared, eta 0.1", "mdlm"),
       ("tuned, phi shared by 4, eta 0.1", "memdlm, shared by 4, eta 0.1", "mdlm, batch 4"),
       ("tuned at lr 3e-4, eta 0.03", "memdlm, lr 0.0003, eta 0.03", "mdlm, lr x 0.3"),
       ("tuned at lr 3e-4, eta 0.1", "memdlm, lr 0.0003, eta 0.1", "mdlm, lr x 0.3"),
       ("tuned at lr 3e-4, eta 0.3", "memdlm, lr 0.0003, eta 0.3", "mdlm, lr x 0.3"),
       ("tuned at lr 1e-4, eta 0.1", "memdlm, lr 0.0001, eta 0.1", "mdlm, lr 0.0001"),
       ("tuned by a LoRA, eta 0.01", "lora memdlm, eta 0.01", "lora mdlm"),
       ("tuned by a LoRA, eta 0.03", "lora memdlm", "lora mdlm"),
       ("tuned by a LoRA, eta 0.1", "lora memdlm, eta 0.1", "lora mdlm"),
       ("tuned by a LoRA, base of 4 layers, eta 0.03", "lora memdlm, 4 layers", "lora mdlm, 4 layers"),
       ("tuned by a LoRA, base trained 3 times as long, eta 0.03", "lora memdlm, 3 x steps", "lora mdlm, 3 x steps"),
       ("tuned, phi from the prompt (ours)", "memdlm from the prompt", "mdlm"),
       ("scratch, eta 0.003 (the default here)", "scratch memdlm", "scratch mdlm"),
       ("scratch, eta 0.01", "scratch memdlm, eta 0.01", "scratch mdlm"),
       ("scratch, eta 0.03", "scratch memdlm, eta 0.03", "scratch mdlm"),
       ("scratch, eta 0.1", "scratch memdlm, eta 0.1", "scratch mdlm"),
       ("scratch, phi shared by 32, eta 0.1", "scratch memdlm, shared, eta 0.1", "scratch mdlm"),
       ("scratch, 4 times the steps", "scratch memdlm, 4 x steps", "scratch mdlm, 4 x steps"),
       ("scratch, D = 128", "scratch memdlm, wide", "scratch mdlm, wide"))

UNTESTED = """\
Not testable on a toy: LongBench (Table 3) and BABILong as such, whose texts need a model that reads; what happens at
7B and 16B weights; lengths of thousands of tokens; anything that a pretrained model's knowledge decides. Scope f = 0.05 and
0.25 are the same layer as 0.10 in a model of two layers."""


# ---- Tables: lists of rows of text -------------------------------------------------------------------------

def shown(numbers, digits=3, sign="", percent=False):
    numbers = [x for x in numbers if x is not None]
    if not numbers:
        return "-"
    mean, error, _ = summary(numbers)
    scale = 100 if percent else 1
    return f"{scale * mean:{sign}.{digits}f}" + (f" ± {scale * error:.{digits}f}" if len(numbers) > 1 else "")


def claims_table(rows):
    out = [["place", "claim", "difference", "95 % interval", "seeds", "verdict"]]
    for row in rows:
        if "mean" in row:
            low, high = row["interval"]
            cells = [f"{row['mean']:+.3f} ± {row['error']:.3f}", f"{low:+.3f} to {high:+.3f}", row["agree"], row["verdict"]]
        else:
            cells = ["-", "-", "-", row["verdict"]]
        out.append([row["place"], row["claim"], *cells])
    return out


def retrieval_table(results, lengths):
    """Tables 1 and 2: percent of answer tokens right."""
    out = [["method", *(f"{task} {length}" for task in (*tasks.RETRIEVAL, "mean") for length in lengths)]]
    for label, run, row in (("base, not tuned", "base", "alone"), *METHODS):
        keys = ([f"{task} {length} {row}" for task in tasks.RETRIEVAL for length in lengths]
                + [f"{length} {row}" for length in lengths])
        out.append([label, *(shown(value(results, (run, key)), 1, percent=True) for key in keys)])
    return out


def ablation_table(results):
    out = [["variant", "paper, BABILong-1K", "training loss", "retrieval, adapted, %", "minus the default", "train-only, %"]]
    for name, paper in PAPER.items():
        difference = paired(results, (name, "in adapted"), ("memdlm", "in adapted"))
        out.append([{"memdlm": "MemDLM, default", "mdlm": "MDLM, adapted"}.get(name, name),
                    f"{paper:.3f}",
                    shown(value(results, (name, "train"))),
                    shown(value(results, (name, "in adapted")), 1, percent=True),
                    shown(difference, 1, "+", True) if name != "memdlm" else "",
                    shown(value(results, (name, "in alone")), 1, percent=True)])
    return out


def far_table(results):
    """How far we looked: what training with memory changes, against the MDLM of the same recipe."""
    keys = (("loss, train-only", "nats alone", 3, False), ("loss, both adapted", "nats adapted", 3, False),
            ("retrieval, train-only, %", "in alone", 1, True), ("retrieval, both adapted, %", "in adapted", 1, True))
    out = [["setting (MemDLM minus MDLM)", *(key[0] for key in keys)]]
    for label, memory, plain in FAR:
        out.append([label, *(shown(paired(results, (memory, key), (plain, key)), digits, "+", percent)
                             for _, key, digits, percent in keys)])
    return out


def recall_table(results):
    measures = next((seed for seed in results.get("closed memdlm", []) if seed), {})
    columns = [key[7:-6] for key in measures
               if key.startswith("recall ") and key.endswith(" alone") and key != "recall alone"]
    out = [["closed book: phi written from", *columns, "mean"]]
    for label, run, row in (("its prompt", "closed memdlm", "cover"),
                            ("nothing", "closed memdlm", "alone"),
                            ("another prompt", "closed memdlm", "cover another"),
                            ("its prompt, the paper's masks", "closed memdlm", "paper's masks"),
                            ("closed-book MDLM: nothing", "closed mdlm", "alone"),
                            ("closed-book MDLM: its prompt, at inference only", "closed mdlm", "cover"),
                            ("MDLM that sees the prompt: nothing", "open mdlm", "alone")):
        out.append([label, *(shown(value(results, (run, f"recall {column} {row}")), 2) for column in columns),
                    shown(value(results, (run, f"recall {row}")), 2)])
    return out


def markdown(table):
    lines = [" | ".join(row) for row in table]
    rule = "|".join(["---"] * len(table[0]))
    text = "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))
    return text.replace("| ---|", "|---|").replace("--- |", "---|")


# ---- Pictures ----------------------------------------------------------------------------------------------

def curve(results, run, key):
    """Mean over seeds of a list, and its standard error."""
    lists = torch.tensor([seed[key] for seed in results.get(run, []) if seed and key in seed], dtype=torch.float64)
    return ((lists.mean(0), lists.std(0) / len(lists) ** 0.5 if len(lists) > 1 else torch.zeros_like(lists[0]))
            if len(lists) else (None, None))


def line(ax, x, results, run, key, label, color, style="-"):
    mean, error = curve(results, run, key)
    if mean is not None:
        ax.plot(x or range(len(mean)), mean, style, color=color, label=label)
        ax.fill_between(x or range(len(mean)), mean - error, mean + error, color=color, alpha=0.15, linewidth=0)


def legend(ax, **options):
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**options)


BOTH = (("scratch ", "from scratch"), ("", "tuned"))


def exposure_picture(plt, results):
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for (prefix, how), (left, right) in zip(BOTH, axes):
        for label, run, row, name in (("MDLM", "mdlm", "alone", "MDLM"),
                                      ("MDLM, logits / 3", "mdlm", "cooled", "MDLM, adapted"),
                                      ("train-only", "memdlm", "alone", "train-only"),
                                      ("train & inference", "memdlm", "adapted", "train & inference")):
            static, _ = curve(results, prefix + run, f"exposure static {row}")
            if static is None:
                continue
            sequential, _ = curve(results, prefix + run, f"exposure sequential {row}")
            left.plot(RATIOS, sequential / static, ":" if row == "cooled" else "-", color=COLORS[name], label=label)
            if row != "cooled":
                right.plot(RATIOS, sequential, color=COLORS[name], label=label)
                right.plot(RATIOS, static, "--", color=COLORS[name])
        left.set(title=f"{how}: sequential / static loss", xlabel="mask ratio (decoding goes right)", xlim=(1, 0.1))
        right.set(title=f"{how}: sequential loss, dashed static", xlabel="mask ratio", ylabel="nats per masked token",
                  xlim=(1, 0.1))
        legend(left)
    return figure


def bins_picture(plt, results):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (prefix, how), ax in zip(BOTH, axes):
        line(ax, RATIOS, results, prefix + "mdlm", "bins alone", "MDLM", COLORS["MDLM"])
        for row, label in (("alone", "train-only"), ("adapted", "train & inference"), ("answers", "answers")):
            line(ax, RATIOS, results, prefix + "memdlm", f"bins {row}",
                 label if row != "answers" else "phi of the answers", COLORS[label])
        ax.set(title=f"{how}: loss by mask ratio", xlabel="mask ratio", ylabel="nats per masked token", xlim=(1, 0.1))
    legend(axes[0])
    return figure


def dynamics_picture(plt, results):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (prefix, how), ax in zip(BOTH, axes):
        for run, key, label, name in (("mdlm", "curve", "MDLM", "MDLM"),
                                      ("memdlm", "curve", "MemDLM, with phi of the answers", "answers"),
                                      ("memdlm", "curve alone", "MemDLM, without phi", "train-only")):
            steps, _ = curve(results, prefix + run, "curve steps")
            if steps is not None:
                line(ax, steps.tolist(), results, prefix + run, key, label, COLORS[name])
        ax.set(title=f"{how}: training", xlabel="step", ylabel="nats per masked token")
    legend(axes[0])
    return figure


def heat(figure, ax, table, title, columns, rows, limits, colors):
    image = ax.imshow(table, vmin=limits[0], vmax=limits[1], cmap=colors, aspect="auto")
    ax.set(title=title, xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)
    ax.spines[:].set_visible(False)
    for i, numbers in enumerate(table):
        for j, x in enumerate(numbers):
            dark = (x - limits[0]) / (limits[1] - limits[0])
            ax.text(j, i, f"{x:.2f}".replace("0.", ".").replace("-.00", ".00"), ha="center", va="center", fontsize=8,
                    color="white" if (dark < 0.5 if colors == "cividis" else abs(dark - 0.5) > 0.35) else "black")
    return image


def needle_picture(plt, results, lengths):
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    depths = ["0-20", "20-40", "40-60", "60-80", "80-100"]
    for run, row, sizes, how, line_of_axes in (("memdlm", "adapted", lengths, "tuned, open book", axes[0]),
                                               ("closed memdlm", "cover", (16, 32, 64), "closed book", axes[1])):
        off, on = curve(results, run, "needle alone")[0], curve(results, run, f"needle {row}")[0]
        if off is None:
            continue
        for ax, table, title, limits, colors in zip(line_of_axes, (off, on, on - off), ("phi off", "phi on", "difference"),
                                                    ((0, 1), (0, 1), (-1, 1)), ("cividis", "cividis", "PuOr")):
            heat(figure, ax, table.tolist(), f"{how}: {title}", depths, [f"{n} tokens" for n in sizes], limits, colors)
    figure.supxlabel("where in the prompt the pair stands, in percent of its length", fontsize=9)
    return figure


def inner_picture(plt, results):
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
    for (prefix, how), ax in zip(BOTH, axes):
        for key, shift, color in (("before", -0.2, COLORS["MDLM"]), ("after", 0.2, COLORS["train & inference"])):
            mean, error = curve(results, prefix + "memdlm", f"inner {key}")
            if mean is not None:
                ax.bar([k + shift for k in range(len(mean))], mean, 0.38, yerr=error, color=color, label=f"{key} the step")
        ax.set(title=f"{how}: adapting to a prompt", xticks=[0, 1], xticklabels=["stage 1, pre-anchor", "stage 2, anchor"],
               ylabel="nats per masked token")
        ax.set_ylim(top=1.3 * ax.get_ylim()[1])  # room for the legend
    legend(axes[0], loc="upper right")
    return figure


def order_picture(plt, results):
    figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for run, row, label, name in (("scratch mdlm", "alone", "MDLM", "MDLM"),
                                  ("scratch memdlm", "alone", "train-only", "train-only"),
                                  ("scratch memdlm", "cover", "adapted, cover:4", "train & inference")):
        line(ax, None, results, run, f"order {row}", label, COLORS[name])
    ax.set(title="from scratch: when a position is decided", xlabel="position in the response", ylabel="mean step, of 16")
    legend(ax)
    return figure


def where_picture(plt, results):
    figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    mean, error = curve(results, "memdlm", "where")
    if mean is not None:
        names = next(seed["where names"] for seed in results["memdlm"] if seed)
        last = max(name.split(".")[1] for name in names)
        colors = [COLORS["train & inference" if name.split(".")[1] == last and ".mlp." in name else "MDLM"] for name in names]
        labels = [name.replace("layers.", "").replace("_proj", "") for name in names]
        ax.bar(range(len(names)), mean, yerr=error, color=colors)
        ax.set_xticks(range(len(names)), labels, rotation=60, ha="right")
        ax.set(title="where phi lives, if all matrices may change (blue: those of the paper's default)",
               ylabel="norm of the change")
    return figure


FRONTIER = {"all weights": (("mdlm", "MDLM", "MDLM"), ("mdlm, half the steps", "half the steps", "MDLM"),
                            ("mdlm, lr x 0.5", "lr x 0.5", "MDLM"), ("mdlm, lr x 0.3", "lr x 0.3", "MDLM"),
                            ("mdlm, lr 0.0001", "lr x 0.1", "MDLM"), ("memdlm", "MemDLM, eta 0.03", "train-only"),
                            ("memdlm, lr 0.001, eta 0.003", "eta 0.003", "train-only"),
                            ("memdlm, lr 0.001, eta 0.01", "eta 0.01", "train-only"),
                            ("memdlm, lr 0.0003, eta 0.03", "lr x 0.3, eta 0.03", "train-only"),
                            ("memdlm from the prompt", "phi from the prompt", "train & inference")),
            "a LoRA": (("lora mdlm", "MDLM", "MDLM"), ("lora mdlm, lr x 0.5", "lr x 0.5", "MDLM"), ("lora mdlm, lr x 2", "lr x 2", "MDLM"),
                       ("lora mdlm, same compute", "2.4 x the steps", "MDLM"), ("lora memdlm", "MemDLM, eta 0.03", "train-only"),
                       ("lora memdlm, eta 0.01", "eta 0.01", "train-only"))}


def frontier_picture(plt, results):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    base, _ = curve(results, "base", "in alone")
    for (how, runs), ax in zip(FRONTIER.items(), axes):
        for run, label, name in runs:
            x, y = ([v for v in value(results, (run, key)) if v is not None] for key in ("nats alone", "in alone"))
            if x:
                (mx, ex, _), (my, ey, _) = summary(x), summary(y)
                ax.errorbar(mx, my, xerr=ex, yerr=ey, fmt="o", color=COLORS[name], markersize=4, elinewidth=0.8)
                ax.annotate(label, (mx, my), textcoords="offset points", xytext=(5, 4), fontsize=7)
        if base is not None:
            ax.axhline(base.mean(), color="#CCCCCC", linewidth=0.8)
            ax.annotate("base", (ax.get_xlim()[1], base.mean()), ha="right", va="bottom", fontsize=7)
        ax.set(title=f"tuning {how}: learning the new, keeping the old, without phi", xlabel="loss on the new data (left is better)",
               ylabel="retrieval (up is better)")
    return figure


def pictures(results, size):
    """{name: (caption, PNG bytes)}; none without matplotlib."""
    plt, out = pyplot(), {}
    if plt is None:
        return out
    for name, caption, figure in (
            ("dynamics", "Fig. 4. The loss with phi has seen the answers; only the loss without it compares with MDLM.",
             dynamics_picture(plt, results)),
            ("exposure", "Fig. 3. Read the ratio beside the losses, and beside the dotted line: MDLM itself, less confident, "
                         "decoding the same.",
             exposure_picture(plt, results)),
            ("frontier", "Fig. 5 with its control: whoever moves less forgets less.", frontier_picture(plt, results)),
            ("needle", "Share of answers right by prompt length and depth of the pair.",
             needle_picture(plt, results, size.lengths)),
            ("bins", "Loss by mask ratio.", bins_picture(plt, results)),
            ("inner", "Inner loss before and after each step.", inner_picture(plt, results)),
            ("order", "Unmasking order: low steps are decided first.", order_picture(plt, results)),
            ("where", "Norm of phi's change by layer and matrix.", where_picture(plt, results))):
        png = io.BytesIO()
        figure.savefig(png, format="png")
        plt.close(figure)
        out[name] = (caption, png.getvalue())
    return out


# ---- Files ---------------------------------------------------------------------------------------------------

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto } \
td, th { padding: 3px 9px; text-align: left; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
img { max-width: 100% } figcaption { color: #666; font-size: 13px } \
.reproduced { color: #00694e } .reversed { color: #a33b00 } .control td { color: #666 }"""


def page(title, intro, sections):
    """sections: (heading, text, table or None, list of (caption, png))."""
    out = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
           f"<h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>"]
    for heading, text, table, images in sections:
        out.append(f"<h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>")
        if table:
            head, *rows = table
            out.append("<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>")
            for row in rows:
                kind = "control" if row[0] == "control" else ""
                out.append(f"<tr class='{kind}'>" + "".join(
                    f"<td class='{html.escape(cell)}'>{html.escape(cell)}</td>" if cell in ("reproduced", "reversed")
                    else f"<td>{html.escape(cell)}</td>"
                    for cell in row) + "</tr>")
            out.append("</table>")
        for caption, png in images:
            data = base64.b64encode(png).decode()
            out.append(f"<figure><img alt='{html.escape(caption)}' src='data:image/png;base64,{data}'>"
                       f"<figcaption>{html.escape(caption)}</figcaption></figure>")
    return "\n".join(out)


def report(results, size, folder):
    """Write report.html, summary.md, values.json and the pictures into the folder, and print the verdicts."""
    rows, images = judged(results), pictures(results, size)
    counts = sorted(n for n in (len([seed for seed in runs if seed]) for runs in results.values()) if n) or [0]
    seeds = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    intro = (f"{seeds} paired seeds: same initial weights, data, masks and test samples. A difference is the mean over seeds "
             "with its standard error; reproduced or reversed if its 95 % interval (Student's t) lies on one side of zero, or "
             "within 0.02 of it where the claim is 'about as good'; otherwise not reproduced, and the interval bounds what "
             "there may be. Many claims are tested: of twenty without any effect, one would seem to have one. Rows 'control' "
             "ask what the paper leaves out. ") + UNTESTED.replace("\n", " ")
    picture = {name: [image] for name, image in images.items()}.get
    sections = [
        ("Claims and verdicts", "", claims_table(rows), []),
        ("Tables 1 and 2: retrieval",
         f"Percent of answer tokens right. Trained on lengths up to 64; base: {size.base} steps of retrieval; "
         f"tuned: {size.tuned} steps of other text.",
         retrieval_table(results, size.lengths), picture("needle", [])),
        ("Fig. 3: exposure bias", "", None, picture("exposure", [])),
        ("Fig. 4: training", "", None, picture("dynamics", []) + picture("bins", [])),
        ("Fig. 5: forgetting", "", None, picture("frontier", [])),
        ("Fig. 6, 7, 9-11 and clipping: ablations",
         "Tuned models, each adapted by its own inner loop; retrieval at the trained lengths.",
         ablation_table(results), []),
        ("Closed book (ours)",
         "Share of answers right, 40 values; the decoder never sees the prompt, except in the last row.",
         recall_table(results), []),
        ("How far we looked",
         "Training with memory against the same without; loss on its own kind of held-out data (less is better), retrieval.",
         far_table(results), []),
        ("Inside the memory", "", None, picture("inner", []) + picture("order", []) + picture("where", []))]
    folder.mkdir(parents=True, exist_ok=True)
    title = "MemDLM's claims on the toy"
    write_whole(folder / "report.html", lambda path: path.write_text(page(title, intro, sections), encoding="utf-8"))
    text = f"# {title}\n\n{intro}\n" + "".join(
        f"\n## {heading}\n\n{note}{chr(10) * 2 * bool(note)}{markdown(table)}\n"
        for heading, note, table, _ in sections if table)
    write_whole(folder / "summary.md", lambda path: path.write_text(text, encoding="utf-8"))
    numbers = {name: [{k: round(v, 5) for k, v in seed.items() if isinstance(v, float)} if seed else None for seed in runs]
               for name, runs in results.items()}
    whole = {"size": size._asdict(), "torch": torch.__version__, "python": platform.python_version(),
             "machine": platform.machine(), "claims": rows, "runs": numbers}
    write_whole(folder / "values.json", lambda path: path.write_text(json.dumps(whole) + "\n"))
    for name, (_, png) in images.items():
        write_whole(folder / f"{name}.png", lambda path, png=png: path.write_bytes(png))
    print(markdown(claims_table(rows)))
    print(f"\n{folder}/report.html holds the tables and pictures, summary.md the tables, values.json the numbers")
    return folder / "report.html"
