"""Compare trained runs on held-out samples: with and without memory, and with the controls a fair reading needs.

    python evaluate.py                        the latest run and its control
    python evaluate.py runs/a runs/b ...      any runs of the same data; runs that differ in the seed alone are
                                              averaged, with the spread over seeds
    python evaluate.py --exposure             the exposure-bias curves (Fig. 3), static and sequential loss beside
                                              the ratio, as a table and exposure.png
    python evaluate.py --tasks ruler_vt,babilong_qa1 --lengths 4096,8192 --adapt --model ... --load-4bit
                                              tasks of lm-evaluation-harness, by generate.py's decoder
    python evaluate.py --paper                the paper's tables, with our scores beside them
    python evaluate.py --paper toy            every claim of the paper on the toy, with controls and verdicts: a report
    python evaluate.py lm_eval run --model memdlm --model_args run=runs/a,adapt=True --tasks ...
                                              lm-evaluation-harness's own command line

The rows of the table say what phi is written from. "nothing" is theta alone, the paper's "train-only" for a model that
was trained with memory; "its prompt" is "train & inference". "another prompt" shows how much of that has nothing to
do with memory. "the answers" is how training itself writes phi: it has seen these very tokens, so it compares with
nothing.
"""
from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import memdlm
from files import write_whole
from runs import open_run, read_settings
from settings import Settings, control_settings


CHUNK = 50  # samples measured at once


class Row(NamedTuple):
    """A row of the table: what phi is written from."""
    label: str
    s: Settings       # of the inner loop
    source: str       # nothing, prompt, another or answers
    role: str = ""    # "own" and "other" mark the pair that the summary compares


def phi_of_prompt(model, s, batch, shift=0):
    """Prompt adaptation (4.5). shift=1 gives each sample the phi of its neighbour's prompt."""
    prompt, valid = batch.prompt.roll(shift, 0), batch.prompt_valid.roll(shift, 0)
    return memdlm.adapt(model.backbone, s, prompt, valid, batch.seeds)[0]


def phi_of_answers(model, s, batch, t, xt, masked):
    """What training writes: the inner loop on the noised response itself, and its answers."""
    h = memdlm.lower_layers(model.backbone, s, xt, batch.valid).detach()
    return memdlm.write_from_response(model.backbone, s, batch, t, xt, masked, h)[0]


def table_rows(s, changes):
    """The rows of a run with settings s; `changes` are inner-loop settings from the command line."""
    paper = dict(trajectory="consistent", inner_steps=2, pre_scale=1.5, anchor_ratio=0.2)

    def row(source, role="", **other):
        inner = replace(s, **other)
        published = all(getattr(inner, k) == v for k, v in paper.items())
        masks = "paper's masks" if published else inner.trajectory
        name = {"prompt": "its prompt", "another": "another prompt"}[source]
        extra = "".join(f", {k} {v}" for k, v in other.items()
                        if k not in ("trajectory", "inner_lr") and not (published and k in paper))
        return Row(f"{name}, {masks}, eta {inner.inner_lr:g}{extra}", inner, source, role)

    rows = [Row("nothing (theta alone)", s, "nothing", "alone")]
    if s.memory and s.memory_from == "prompt":  # it has learned to read phi written this way
        rows += [row("prompt", "own"), row("another", "other"), row("prompt", **paper)]
    else:
        cover = dict(trajectory="cover:4", inner_lr=0.3)
        rows += [row("prompt", **paper, inner_lr=0.1), row("another", **paper, inner_lr=0.1),
                 row("prompt", "own", **cover), row("another", "other", **cover)]
        if s.memory:
            rows.insert(1, row("prompt"))
            rows.append(Row(f"the answers, eta {s.inner_lr:g} (leaks)", s, "answers", "leak"))
    rows += [row("prompt", **changes), row("another", **changes)] if changes else []
    return list({row.label: row for row in reversed(rows)}.values())[::-1]  # a label once; the first of its kind stays


def add_noise(model, batch, metric):
    """t, xt, masked of held-out samples, the same for every model: everything masked for decoding, else noise as in training."""
    t = memdlm.uniform(batch.seeds, "t", 1)[:, 0]
    u = memdlm.uniform(batch.seeds, "anchor", batch.x0.shape[1])
    masked = batch.maskable if metric == "accuracy" else memdlm.at_least_one(batch.maskable, u, t[:, None])  # so that each has a loss
    return t, torch.where(masked, model.backbone.mask_id, batch.x0), masked


def write_phi(model, s, source, batch, *anchor):
    """The phi of a row of the table; anchor: t, xt and masked, from which that of the answers is written."""
    return {"nothing": lambda: None,
            "prompt": lambda: phi_of_prompt(model, s, batch),
            "another": lambda: phi_of_prompt(model, s, batch, shift=1),
            "answers": lambda: phi_of_answers(model, s, batch, *anchor)}[source]()


def mark_right(model, s, batch, phi):
    """[B, L] bool: answer tokens that decoding got right."""
    canvas = batch.x0
    for canvas in memdlm.denoise(model.backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds, phi):
        pass
    return (canvas == batch.x0) & batch.maskable


def measure(model, s, source, batch, metric):
    """One number per sample, [B]: share of answer tokens right after decoding, or nats per masked answer token."""
    t, xt, masked = add_noise(model, batch, metric)
    phi = write_phi(model, s, source, batch, t, xt, masked)
    if metric == "nats":
        return memdlm.response_nll(model.backbone, s, batch.x0, masked, batch.valid, phi).sum(1) / masked.sum(1)
    return mark_right(model, s, batch, phi).sum(1) / masked.sum(1)


def run_values(folder, samples, changes):
    """Settings, data and {(row label, column): [samples]} of one run, with the label of each role."""
    s, data, model = open_run(folder)
    values, roles = {}, {}
    chunks = -(-samples // (CHUNK if s.model == "toy" else 2))  # of nearly equal size: a chunk of one would have no other prompt
    edges = [samples * i // chunks for i in range(chunks + 1)]
    for row in tqdm(table_rows(s, changes), desc=f"measuring {folder}", unit="row", leave=False):
        if row.role:
            roles[row.role] = row.label
        for column in data.columns:
            parts = [measure(model, row.s, row.source, data.tests(column, range(start, end), s.closed_book), data.metric)
                     for start, end in zip(edges, edges[1:])]
            values[row.label, column] = torch.cat(parts).double()
    return s, data, values, roles


def name_of(s):
    """A run's name in the table."""
    return f"{f'MemDLM, memory of the {s.memory_from}' if s.memory else 'MDLM'}, " + (
        "closed book" if s.closed_book else "sees the prompt")


class Group(NamedTuple):
    """Runs that differ in the seed alone."""
    s: Settings
    seeds: list
    values: dict   # (row label, column) -> [runs, samples]
    roles: dict    # role -> row label

    def all(self, role):
        """A row's samples of all columns, [runs, columns * samples]."""
        return torch.cat([value for (label, _), value in self.values.items() if label == self.roles[role]], dim=1)

    def mean(self, role):
        return self.all(role).mean().item()


def with_controls(folders):
    """Run folders and the controls inside them, each once. ValueError if their samples differ."""
    parts = [part for folder in folders for part in (Path(folder), Path(folder) / "control")
             if part == Path(folder) or (part / "settings.json").exists()]
    parts = list({part.resolve(): part for part in parts}.values())
    kinds = {(s.data, s.prompt_length, s.response_length) for s in map(read_settings, parts)}
    if len(kinds) > 1:
        raise ValueError("these runs were trained on different data or lengths; compare runs of one kind at a time")
    return parts


def compare_runs(folders, samples, changes=None):
    """Measure runs and their controls. Returns the data and a Group per kind of run."""
    groups = {}
    for part in with_controls(folders):
        s, data, values, roles = run_values(part, samples, changes)
        groups.setdefault(same_but(s, "seed"), []).append((s, values, roles))
    return data, [Group(runs[0][0], [s.seed for s, _, _ in runs], {key: torch.stack([values[key] for _, values, _ in runs])
                                                                   for key in runs[0][1]},
                        runs[0][2]) for runs in groups.values()]


def same_but(s, *names):
    """A key that is equal for settings that differ at most in `names` and in what does not change a result."""
    ignored = {"control", "threads", "table_samples", "log_every", "save_every", "sample_every", *names}
    return json.dumps({k: v for k, v in asdict(s).items() if k not in ignored}, sort_keys=True)


def find_control(group, groups):
    """The group that is this one's control in all but the seed; without memory the inner loop's settings are idle."""
    idle = set(memdlm.Settings.__dataclass_fields__) - {"memory", "closed_book", "min_t"}
    wanted = same_but(control_settings(group.s), "seed", *idle)
    return next((g for g in groups if group.s.memory and same_but(g.s, "seed", *idle) == wanted), None)


def mean_and_error(values):
    """[runs, n] -> mean and its standard error: over seeds if there are several, else over samples."""
    spread = values.mean(1) if len(values) > 1 else values[0]
    return values.mean().item(), (spread.std() / len(spread) ** 0.5).item() if len(spread) > 1 else float("nan")


def cells(data, group, label):
    """(mean, standard error) per column. In nats, all rows but the first are paired differences to the first:
    the spread between samples is far larger than what memory does to each of them."""
    rows = [(group.values[label, column], group.values[group.roles["alone"], column]) for column in data.columns]
    change = data.metric == "nats" and label != group.roles["alone"]
    return [mean_and_error(value - alone if change else value) for value, alone in rows]


def columns_mean(data):
    return {"dictionary": "prompt tokens x times each pair is stated",
            "retrieval": "task and prompt tokens"}.get(data.kind, "prompt tokens")


def table(data, groups):
    """The comparison as text: a block per kind of run, a row per source of phi, a column per task or length."""
    what = {"accuracy": "share of answers right, decoded",
            "nats": "nats per masked answer token; below the first row: the change, less is better"}[data.metric]
    lines = [f"{data.kind}: {what}. Columns: "
             + columns_mean(data) + ("; chance 0.025" if data.kind == "dictionary" else "")]
    wide = max(len(label) for group in groups for label, _ in group.values) + 4
    for group in groups:
        runs = len(next(iter(group.values.values())))
        spread = f"{runs} seeds, +- standard error over seeds" if runs > 1 else "1 seed, +- standard error over samples"
        lines += ["", f"{name_of(group.s)}  [{group.s.steps} steps; {spread}]",
                  f"  {'phi written from':{wide - 2}}" + "".join(f"{column:>15}" for column in data.columns)]
        for label in dict.fromkeys(label for label, _ in group.values):
            sign = "+" if data.metric == "nats" and label != group.roles["alone"] else ""
            lines.append(f"  {label:{wide - 2}}" + "".join(
                f"{f'{mean:{sign}.3f} +-{error:.3f}':>15}" for mean, error in cells(data, group, label)))
    return "\n".join(lines)


def findings(data, groups):
    """What the numbers of a table say, a sentence each. Computed, never assumed."""
    lines, better = [], (lambda a, b: a > b) if data.metric == "accuracy" else (lambda a, b: a < b)
    for group in groups:
        alone, own, other = group.mean("alone"), group.mean("own"), group.mean("other")
        lines.append(f"- {name_of(group.s)}: {alone:.3f} alone, {own:.3f} with phi of {group.roles['own']}, {other:.3f} "
                     "with phi of another prompt (means over columns).")
        base = find_control(group, groups)
        if base and group.s.closed_book:
            lines.append("  The decoder does not see the prompt; what it knows came through phi. Attention that sees "
                         f"the prompt, trained as many steps, reaches {base.mean('alone'):.3f}.")
        elif base and group.seeds == base.seeds:
            roles = [role for role in ("alone", "own") if group.roles[role] == base.roles[role]]
            pairs = [(role, *mean_and_error(group.all(role) - base.all(role))) for role in roles]
            lines.append("  Against the baseline, paired: " + ", ".join(
                f"{mean:+.4f} +-{error:.4f} {'alone' if role == 'alone' else 'with the same adaptation'}"
                for role, mean, error in pairs) + ".")
        if "leak" in group.roles and better(group.mean("leak"), alone):
            lines.append(f"  With phi of the answers, which is what training itself sees, {group.mean('leak'):.3f}. The gap "
                         "to theta alone is leakage: with a larger --inner-lr phi carries the answers, and theta need "
                         "not learn them.")
    return "\n".join(lines)


def print_comparison(folders, samples=100, changes=None, save_to=None, picture=None):
    """Print the comparison of runs and what it says; optionally keep the numbers as JSON and a picture."""
    data, groups = compare_runs([Path(folder) for folder in folders], samples, changes)
    print(f"\n{table(data, groups)}\n\n{findings(data, groups)}\n")
    if save_to:
        rows = [{"run": name_of(g.s), "settings": asdict(g.s), "rows": [
            {"phi": label, "column": column, "mean": mean_and_error(value)[0], "standard_error": mean_and_error(value)[1],
             "per_run": value.mean(1).tolist()} for (label, column), value in g.values.items()]} for g in groups]
        whole = {"data": data.kind, "metric": data.metric, "samples": samples, "torch": torch.__version__, "groups": rows}
        write_whole(Path(save_to), lambda path: path.write_text(json.dumps(whole, indent=1) + "\n"))
        print(f"numbers in {save_to}")
    if picture:
        draw_comparison(data, groups, picture)


RATIOS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]


def print_exposure(folders, samples, out):
    """Static, sequential and matched loss by mask ratio, for theta alone and with phi of the prompt."""
    curves = {}
    for folder in with_controls(folders):
        s, data, model = open_run(folder)
        batch = data.tests(list(data.columns)[0], range(samples), s.closed_book)
        for row in [row for row in table_rows(s, None) if row.role in ("alone", "own")]:
            phi = phi_of_prompt(model, row.s, batch) if row.source == "prompt" else None
            losses = memdlm.exposure_bias(model.backbone, row.s, batch.x0, batch.maskable, batch.valid, batch.seeds,
                                          RATIOS, phi)
            curve = {name: value.mean(1).tolist() for name, value in losses.items()}
            kind = {"alone": "train-only", "own": "train & inference"} if s.memory else {"alone": "MDLM", "own": "MDLM, adapted"}
            curves[f"{folder}: {row.label}"] = curve | {"color": COLORS[kind[row.role]]}
    print("Loss against the truth, mean nats per masked token. static: true context; sequential: the model's own "
          "guesses;\nmatched: true context at the positions that the sequential path left open.\n")
    for label, curve in curves.items():
        print(label)
        print("  mask ratio        " + "".join(f"{ratio:8.1f}" for ratio in RATIOS))
        for name in ("static", "sequential", "matched"):
            print(f"  {name:18}" + "".join(f"{x:8.3f}" for x in curve[name]))
        for name in ("static", "matched"):
            print(f"  sequential/{name:7}" + "".join(f"{a / b:8.3f}" for a, b in zip(curve["sequential"], curve[name])))
    draw_exposure(curves, out)
    print("Read the ratio beside the losses: a model with a worse static loss has a flatter ratio.")


# The same thing has the same colour in every picture; seen apart by the colour-blind too.
COLORS = {"MDLM": "#8C8C8C", "MDLM, adapted": "#000000", "train-only": "#E69F00", "train & inference": "#0072B2", "answers": "#CC79A7"}


def pyplot():
    """matplotlib, or None with a word on how to get it: pictures are worth having, not worth stopping for."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "legend.frameon": False,
                         "axes.titlesize": 10, "savefig.dpi": 120, "lines.linewidth": 1.3})
    return plt


def draw_losses(folder):
    """loss.png: cross-entropy per masked token, with memory and without."""
    plt = pyplot()
    if plt is None:
        return
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    label, kind = ("with memory (phi has seen these answers)", "answers") if "inner" in lines[0] else ("no memory", "MDLM")
    if "inner" in lines[0] and read_settings(folder).memory_from == "prompt":
        label, kind = "with memory of the prompt", "train & inference"
    for key, text, color in (("ce", label, COLORS[kind]), ("ce_without", "without memory (theta alone)", COLORS["train-only"])):
        points = [(line["step"], line[key]) for line in lines if key in line]
        held = [(line["step"], line["held_out_" + key]) for line in lines if "held_out_" + key in line]
        if points:
            axes.plot(*zip(*points), color=color, linewidth=1.2, label=text, alpha=0.4 if held else 1)
        if held:
            axes.plot(*zip(*held), "o-", color=color, linewidth=1.2, markersize=4, label=text + ", held out")
    axes.set(xlabel="step", ylabel="nats per masked token", ylim=(0, None))
    axes.legend()
    figure.savefig(folder / "loss.png")
    plt.close(figure)


def bar_color(memory, label):
    """By the first word of the row: what phi is written from."""
    return {"nothing": COLORS["train-only" if memory else "MDLM"], "its": COLORS["train & inference" if memory else "MDLM, adapted"],
            "another": "#56B4E9", "the": COLORS["answers"]}[label.split()[0]]


def draw_comparison(data, groups, path):
    """Bars with standard errors, a chart per kind of run."""
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(1, len(groups), figsize=(6.5 * len(groups), 4.4), layout="constrained", squeeze=False,
                                sharey=True)
    for group, ax in zip(groups, axes[0]):
        labels = list(dict.fromkeys(label for label, _ in group.values))
        labels = labels[1:] if data.metric == "nats" else labels
        for i, label in enumerate(labels):
            means, errors = zip(*cells(data, group, label))
            x = [column + (i - (len(labels) - 1) / 2) * 0.8 / len(labels) for column in range(len(means))]
            ax.bar(x, means, 0.8 / len(labels), yerr=errors, label=label, color=bar_color(group.s.memory, label),
                   alpha=1 if label in group.roles.values() else 0.45, error_kw={"linewidth": 0.8})
        ax.set_title(name_of(group.s), fontsize=10)
        ax.set_xticks(range(len(data.columns)), list(data.columns))
        ax.set_ylabel("share of answers right" if data.metric == "accuracy" else "change in nats per token (less is better)")
        ax.set_xlabel(columns_mean(data))
        ax.legend(fontsize=8, title="phi written from", title_fontsize=8, ncol=2,
                  loc="upper center", bbox_to_anchor=(0.5, -0.16))
    if data.metric == "accuracy":
        axes[0][0].set_ylim(0, 1.05)
    figure.savefig(path)
    plt.close(figure)
    print(f"picture in {path}")


def draw_exposure(curves, out):
    plt = pyplot()
    if plt is None:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for label, curve in curves.items():
        color = curve["color"]
        left.plot(RATIOS, [a / b for a, b in zip(curve["sequential"], curve["static"])], color=color, label=label)
        right.plot(RATIOS, curve["static"], color=color, linestyle="--")
        right.plot(RATIOS, curve["sequential"], color=color)
    left.set(xlabel="mask ratio (decoding goes right)", ylabel="sequential / static loss", xlim=(1, 0.1))
    right.set(xlabel="mask ratio", ylabel="nats per masked token (dashed: static)", xlim=(1, 0.1))
    left.legend(fontsize=7)
    figure.savefig(out)
    plt.close(figure)
    print(f"picture in {out}")
