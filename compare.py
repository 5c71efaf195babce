"""Compare trained runs on held-out samples: with memory, without it, and with controls.

evaluate.py, train.py and paper/ print and draw with this library. A comparison has a table for
each kind of run. The columns of a table are lengths or tasks. Its rows say what phi is written
from:

    nothing          theta alone. For a model that was trained with memory, this is what the paper
                     calls "train-only".
    its prompt       each sample has a phi of its own prompt: the paper's "train & inference".
    another prompt   each sample has the phi of its neighbour's prompt. What remains of the gain
                     has nothing to do with memory.
    the answers      training writes phi like this. This phi has seen the very tokens that are
                     measured, so its row cannot be compared with the others.

Every model is measured on the same samples with the same masks. The numbers of a table come in
three steps: `measure` gives one number per sample, `compare_runs` gathers the runs that differ in
the seed alone, and `compute_cells` turns both into means with standard errors.

The rows of a run depend on how it was trained. A run whose phi comes from the prompt is measured
with the masks that it has learned to read, and with the paper's. The others get the paper's masks
and a stronger inner loop, which covers the whole prompt.
"""
from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import memdlm
from colors import color_of
from console import fold, format_grid, printable, say, sign, terminal_width
from data import mark_response
from files import read_json, write_json, write_whole
from runs import open_run, read_metrics, read_settings
from settings import Settings, control_settings

# How many samples are measured at once.
TOY_CHUNK, REAL_CHUNK = 50, 2


# ---- What phi is written from -------------------------------------------------------------------

class TableRow(NamedTuple):
    """A row of the table: what phi is written from, and how."""
    label: str
    s: Settings       # of the inner loop
    source: str       # nothing, prompt, another or answers
    role: str = ""    # what the findings call the row: alone, own, other or leak


# How the paper masks a prompt that it adapts to.
PAPER_MASKS = dict(trajectory="consistent", inner_steps=2, pre_scale=1.5, anchor_ratio=0.2)


def list_rows(s, changes=None):
    """The rows of a run with settings s, as TableRow.

    changes: settings of the inner loop from the command line. They add two rows.
    """
    rows = [TableRow("nothing (theta alone)", s, "nothing", "alone")]
    if s.memory and s.memory_from == "prompt":  # theta has learned to read phi written this way
        rows += [prompt_row(s, "prompt", "own"), prompt_row(s, "another", "other"),
                 prompt_row(s, "prompt", **PAPER_MASKS)]
    else:
        paper = dict(**PAPER_MASKS, inner_lr=0.1)
        cover = dict(trajectory="cover:4", inner_lr=0.3)
        if s.memory:
            rows.append(prompt_row(s, "prompt"))
        rows += [prompt_row(s, "prompt", **paper), prompt_row(s, "another", **paper),
                 prompt_row(s, "prompt", "own", **cover),
                 prompt_row(s, "another", "other", **cover)]
        if s.memory:
            label = f"the answers, eta {s.inner_lr:g} (leaks)"
            rows.append(TableRow(label, s, "answers", "leak"))
    if changes:
        rows += [prompt_row(s, "prompt", **changes), prompt_row(s, "another", **changes)]
    # Two rows with one label are the same row. It stands where the last of them stood, and it
    # keeps the role that one of them has.
    unique = {}
    for row in rows:
        earlier = unique.pop(row.label, row)
        unique[row.label] = earlier if earlier.role else row
    return list(unique.values())


def prompt_row(s, source, role="", **changes):
    """A row whose phi is written from a prompt, with settings s and these changes to them."""
    inner = replace(s, **changes)
    published = all(getattr(inner, name) == value for name, value in PAPER_MASKS.items())
    masks = "paper's masks" if published else inner.trajectory
    said = {"trajectory", "inner_lr", *(PAPER_MASKS if published else ())}
    rest = "".join(f", {name} {value}" for name, value in changes.items() if name not in said)
    whose = "its" if source == "prompt" else "another"
    label = f"{whose} prompt, {masks}, eta {inner.inner_lr:g}{rest}"
    return TableRow(label, inner, source, role)


def write_phi(model, s, source, batch, t=None, xt=None, masked=None):
    """The phi of a row for a batch. None stands for no memory.

    source: what phi is written from, as in TableRow. t, xt, masked: the noised batch. Only the
    source "answers" needs them.
    """
    if source == "nothing":
        return None
    if source == "answers":  # as in training: the inner loop on the noised response itself
        h = memdlm.lower_layers(model.backbone, s, xt, batch.valid).detach()
        return memdlm.write_from_response(model.backbone, s, batch, t, xt, masked, h)[0]
    # Adapting to a prompt (4.5): the sample's own, or its neighbour's.
    shift = 1 if source == "another" else 0
    prompt, valid = batch.prompt.roll(shift, 0), batch.prompt_valid.roll(shift, 0)
    mark_response(valid, batch.prompt_valid.response_at.roll(shift, 0))
    return memdlm.adapt(model.backbone, s, prompt, valid, batch.seeds)[0]


# ---- Measuring ----------------------------------------------------------------------------------

def measure(model, s, source, batch, metric):
    """Measure a batch with the phi of a row. Returns one number per sample, [B].

    metric: "accuracy", the share of answer tokens that decoding gets right, or "nats", the
    cross-entropy per masked answer token.
    """
    t, xt, masked = add_noise(model, batch, metric)
    phi = write_phi(model, s, source, batch, t, xt, masked)
    if metric == "nats":
        nll = memdlm.response_nll(model.backbone, s, batch.x0, masked, batch.valid, phi)
        return nll.sum(1) / masked.sum(1)
    return mark_right(model, s, batch, phi).sum(1) / masked.sum(1)


def add_noise(model, batch, metric):
    """Mask held-out samples, the same way for every model. Returns t [B], xt and masked [B, L].

    For decoding every answer token is masked. Otherwise the noise is that of training, but each
    sample has at least one mask, so that it has a loss.
    """
    t = memdlm.uniform(batch.seeds, "t", 1)[:, 0]
    if metric == "accuracy":
        masked = batch.maskable
    else:
        u = memdlm.uniform(batch.seeds, "anchor", batch.x0.shape[1])
        masked = memdlm.at_least_one(batch.maskable, u, t[:, None])
    return t, torch.where(masked, model.backbone.mask_id, batch.x0), masked


def mark_right(model, s, batch, phi):
    """Decode a batch under phi. Returns where an answer token came out right, [B, L] bool."""
    canvas = batch.x0
    steps = memdlm.denoise(model.backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds,
                           phi)
    for canvas in steps:
        pass
    return (canvas == batch.x0) & batch.maskable


def measure_run(folder, samples, changes=None):
    """Measure one run by every row of its table.

    samples: held-out samples per cell, or all where there are fewer. changes: as for `list_rows`.
    Returns the run's settings, its data, {(row label, column): [samples]} and {role: row label}.
    A single sample has no other prompt, so the rows of another prompt are left out then.
    """
    s, data, model = open_run(folder)
    ranges, values, roles = chunks_of(s, data, samples), {}, {}
    rows = [row for row in list_rows(s, changes)
            if row.source != "another" or data.count_tests(samples) > 1]
    rows = tqdm(rows, desc=printable(f"measuring {folder}"), unit="row",
                leave=False, disable=None, ncols=terminal_width())
    for row in rows:
        if row.role:
            roles[row.role] = row.label
        for column in data.columns:
            parts = []
            for numbers in ranges:
                batch = data.tests(column, numbers, s.closed_book)
                parts.append(measure(model, row.s, row.source, batch, data.metric))
            values[row.label, column] = torch.cat(parts).double()
    return s, data, values, roles


def chunks_of(s, data, samples):
    """The numbers of the held-out samples that are measured, in ranges for one batch each."""
    return split_evenly(data.count_tests(samples), TOY_CHUNK if s.model == "toy" else REAL_CHUNK)


def split_evenly(samples, most):
    """Ranges of about `most` numbers that make up range(samples), of nearly equal size.

    None has fewer than two: a batch of one sample has no other prompt. So of an odd number of
    samples in pairs, one range has three.
    """
    parts = max(1, min(-(-samples // most), samples // 2))
    edges = [samples * i // parts for i in range(parts + 1)]
    return [range(edges[i], edges[i + 1]) for i in range(parts)]


# ---- Runs that differ in the seed, and runs that are controls -----------------------------------

class Experiment(NamedTuple):
    """One experiment: runs that differ in the seed alone."""
    s: Settings    # of the first run
    seeds: list
    values: dict   # (row label, column) -> [runs, samples]
    roles: dict    # role -> row label

    def samples(self, role):
        """A row's numbers in all columns, [runs, columns * samples]."""
        columns = [value for (label, _), value in self.values.items() if label == self.roles[role]]
        return torch.cat(columns, dim=1)

    def mean(self, role):
        """The mean of a row over runs, columns and samples."""
        return self.samples(role).mean().item()


def compare_runs(folders, samples, changes=None):
    """Measure runs and their controls. Returns the data and a list of experiments.

    ValueError if the runs were trained on different data.
    """
    measured = {}  # what the runs of an experiment share -> [(settings, values, roles)]
    for folder in add_controls(folders):
        s, data, values, roles = measure_run(folder, samples, changes)
        measured.setdefault(settings_without(s, "seed"), []).append((s, values, roles))
    experiments = []
    for runs in measured.values():
        s, values, roles = runs[0]
        stacked = {cell: torch.stack([run[1][cell] for run in runs]) for cell in values}
        experiments.append(Experiment(s, [run[0].seed for run in runs], stacked, roles))
    return data, experiments


def add_controls(folders):
    """Run folders and the controls inside them, each once. ValueError if their samples differ."""
    unique = {}
    for folder in map(Path, folders):
        unique[folder.resolve()] = folder
        control = folder / "control"
        if (control / "settings.json").exists():
            unique[control.resolve()] = control
    settings = [read_settings(folder) for folder in unique.values()]
    if len({(s.data, s.prompt_length, s.response_length) for s in settings}) > 1:
        raise ValueError("these runs were trained on different data or lengths; compare runs of "
                         "one kind at a time")
    return list(unique.values())


def settings_without(s, *names):
    """Settings as text, without `names` and without those that change no result.

    Two runs with the same text differ at most in what was left out.
    """
    left_out = {"control", "threads", "table_samples", "log_every", "save_every", "sample_every",
                *names}
    kept = {name: value for name, value in asdict(s).items() if name not in left_out}
    return json.dumps(kept, sort_keys=True)


def find_control(experiment, experiments):
    """The experiment that is the control of this one, whatever the seeds; None if there is none.

    A control has no memory, so the settings of its inner loop have no effect and may differ.
    """
    if not experiment.s.memory:
        return None
    idle = set(memdlm.Settings.__dataclass_fields__) - {"memory", "closed_book", "min_t"}
    wanted = settings_without(control_settings(experiment.s), "seed", *idle)
    for other in experiments:
        if settings_without(other.s, "seed", *idle) == wanted:
            return other
    return None


# ---- Tables -------------------------------------------------------------------------------------

def print_comparison(folders, samples=100, changes=None, save_to=None, picture=None):
    """Print the comparison of runs and what it says.

    save_to: a path for the numbers as JSON. picture: a path for the table as a picture.
    """
    data, experiments = compare_runs(folders, samples, changes)
    say(f"\n{format_table(data, experiments)}\n\n{fold(state_findings(data, experiments))}\n")
    numbers = gather_numbers(data, experiments, data.count_tests(samples))
    if save_to:
        write_json(save_to, numbers, indent=1)
        say(f"numbers in {save_to}")
    if picture:
        draw_numbers(numbers, picture)


def format_table(data, experiments):
    """The comparison as text: a block per experiment, a row per source of phi."""
    if data.metric == "accuracy":
        what = "share of answers right, decoded"
    else:
        what = "nats per masked answer token; below the first row: the change, less is better"
    chance = "; chance .025" if data.kind == "dictionary" else ""
    parts = [fold(f"{data.kind}: {what}. Columns: {explain_columns(data.kind)}{chance}")]
    for experiment in experiments:
        rows = [("  phi written from", list(data.columns))]
        for label in row_labels(experiment):
            is_difference = is_change(data, experiment, label)
            rows.append((f"  {label}", [format_cell(data, *cell, is_difference)
                                        for cell in compute_cells(data, experiment, label)]))
        title = f"{name_of(experiment.s)}  [{explain_errors(experiment)}]"
        parts.append(f"{fold(title)}\n{format_grid(rows, numbers=True)}")
    return "\n\n".join(parts)


def format_cell(data, mean, error, is_difference):
    """A mean with its standard error, such as .72±.02. Shares have two digits, nats have three.

    A single sample has no error.
    """
    digits = 2 if data.metric == "accuracy" else 3
    texts = [f"{mean:{'+' if is_difference else ''}.{digits}f}"]
    texts += [] if error is None else [f"{error:.{digits}f}"]
    return sign("error").join(text.replace("0.", ".", 1) if abs(number) < 1 else text
                              for text, number in zip(texts, (mean, error)))


def compute_cells(data, experiment, label):
    """(mean, standard error) of a row, one pair per column.

    In nats every row but the first holds paired differences from the first: the spread between
    samples is far larger than what memory does to each of them.
    """
    cells = []
    for column in data.columns:
        values = experiment.values[label, column]
        if is_change(data, experiment, label):
            values = values - experiment.values[experiment.roles["alone"], column]
        cells.append(mean_and_error(values))
    return cells


def is_change(data, experiment, label):
    """Whether a row is shown as its difference from the row of theta alone."""
    return data.metric == "nats" and label != experiment.roles["alone"]


def mean_and_error(values):
    """[runs, n] -> mean and its standard error: over seeds if there are several, else samples.

    One number has no error: None.
    """
    spread = values.mean(1) if len(values) > 1 else values[0]
    error = (spread.std() / len(spread) ** 0.5).item() if len(spread) > 1 else None
    return values.mean().item(), error


def row_labels(experiment):
    """The labels of the rows, each once, in order."""
    return list(dict.fromkeys(label for label, _ in experiment.values))


def name_of(s):
    """A run's name in the table."""
    method = f"MemDLM, memory of the {s.memory_from}" if s.memory else "MDLM"
    method += ", second order" if s.order == "second" else ""
    method += f", {s.objective}" if s.objective != "mdlm" else ""
    return f"{method}, {'closed book' if s.closed_book else 'sees the prompt'}"


def explain_columns(kind):
    """What the columns of a table are."""
    if kind == "dictionary":
        return "prompt tokens x times each pair is stated"
    return "task and prompt tokens" if kind == "retrieval" else "prompt tokens"


def explain_errors(experiment):
    """How long an experiment's runs were trained, and what its standard errors are over."""
    runs = len(experiment.seeds)
    count = next(iter(experiment.values.values())).shape[1]
    if runs == count == 1:
        return f"{experiment.s.steps} steps; 1 seed, a single sample"
    seeds, over = (f"{runs} seeds", "seeds") if runs > 1 else ("1 seed", f"{count} samples")
    return f"{experiment.s.steps} steps; {seeds}, {sign('error')} standard error over {over}"


def gather_numbers(data, experiments, samples):
    """Every cell with its mean in each run, as plain values: what is stored and drawn.

    `shown` is what the table shows, with its standard error: in nats the paired change.
    """
    groups = []
    for experiment in experiments:
        shown = {label: dict(zip(data.columns, compute_cells(data, experiment, label)))
                 for label in row_labels(experiment)}
        rows = []
        for (label, column), values in experiment.values.items():
            mean, error = mean_and_error(values)
            rows.append({"phi": label, "column": column, "mean": mean, "standard_error": error,
                         "per_run": values.mean(1).tolist(), "shown": shown[label][column]})
        groups.append({"run": name_of(experiment.s), "settings": asdict(experiment.s),
                       "rows": rows})
    return {"data": data.kind, "metric": data.metric, "samples": samples,
            "torch": torch.__version__, "groups": groups}


# ---- Findings -----------------------------------------------------------------------------------

def state_findings(data, experiments):
    """What the numbers of a table say, as text. Each sentence is computed, never assumed."""
    lines = []
    for experiment in experiments:
        alone, own = experiment.mean("alone"), experiment.mean("own")
        another = "none of another prompt, since only one is held out"
        if "other" in experiment.roles:
            another = f"{experiment.mean('other'):.3f} with phi of another prompt"
        lines.append(f"- {name_of(experiment.s)}: {alone:.3f} alone, {own:.3f} with phi of "
                     f"{experiment.roles['own']}, {another} (means over columns).")
        control = find_control(experiment, experiments)
        if control and experiment.s.closed_book:
            lines.append("  The decoder does not see the prompt; what it knows came through phi. "
                         "Attention that sees the prompt, trained as many steps, reaches "
                         f"{control.mean('alone'):.3f}.")
        elif control and experiment.seeds == control.seeds:
            lines.append(state_difference(experiment, control))
        if "leak" in experiment.roles:
            leak = experiment.mean("leak")
            gain = leak - alone if data.metric == "accuracy" else alone - leak
            if gain > 0:
                lines.append(f"  With phi of the answers, which is what training itself sees, "
                             f"{leak:.3f}. The gap to theta alone is leakage: with a larger "
                             "--inner-lr phi carries the answers, and theta need not learn them.")
    return "\n".join(lines)


def state_difference(experiment, control):
    """How the runs of an experiment differ from the control's of the same seeds, as a sentence."""
    parts = []
    for role, words in (("alone", "alone"), ("own", "with the same adaptation")):
        if experiment.roles[role] == control.roles[role]:
            mean, error = mean_and_error(experiment.samples(role) - control.samples(role))
            parts.append(f"{mean:+.4f} {'' if error is None else f'+-{error:.4f} '}{words}")
    return f"  Against the baseline, paired: {', '.join(parts)}."


# ---- Exposure bias (Fig. 3) ---------------------------------------------------------------------

# The mask ratios at which exposure bias is measured.
RATIOS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]


def print_exposure(folders, samples, out):
    """Print and draw the exposure bias of runs and their controls, by mask ratio.

    out: a path for the picture. ValueError if the runs were trained on different data.
    """
    curves = {}
    for folder in add_controls(folders):
        curves |= measure_exposure(folder, samples)
    print("Loss against the truth, mean nats per masked token. static: true context; sequential: "
          "the model's own guesses;\nmatched: true context at the positions that the sequential "
          "path left open.\n")
    for label, curve in curves.items():
        say(label)
        print_curve("mask ratio", RATIOS, 1)
        for name in ("static", "sequential", "matched"):
            print_curve(name, curve[name])
        for name in ("static", "matched"):
            print_curve(f"sequential/{name}", divide(curve["sequential"], curve[name]))
    draw_exposure(curves, out)
    print("Read the ratio beside the losses: a model with a worse static loss has a flatter ratio.")


def measure_exposure(folder, samples):
    """The losses of a run along the denoising path, for theta alone and with phi of the prompt.

    Returns {label: curve}. A curve holds the lists static, sequential and matched, one loss per
    mask ratio, and the colour in which it is drawn.
    """
    curves = {}
    s, data, model = open_run(folder)
    first_column = list(data.columns)[0]
    for row in list_rows(s):
        if row.role not in ("alone", "own"):
            continue
        parts = []
        for numbers in chunks_of(s, data, samples):
            batch = data.tests(first_column, numbers, s.closed_book)
            phi = write_phi(model, row.s, row.source, batch)
            parts.append(memdlm.exposure_bias(model.backbone, row.s, batch.x0, batch.maskable,
                                              batch.valid, batch.seeds, RATIOS, phi))
        curve = {name: torch.cat([part[name] for part in parts], 1).mean(1).tolist()
                 for name in parts[0]}
        ways = {"alone": ("MDLM", "train-only"), "own": ("MDLM, adapted", "train & inference")}
        curve["color"] = color_of(ways[row.role][s.memory])
        curves[f"{folder}: {row.label}"] = curve
    return curves


def print_curve(name, numbers, digits=3):
    print(f"  {name:18}" + "".join(f"{x:8.{digits}f}" for x in numbers))


def divide(numbers, by):
    return [a / b for a, b in zip(numbers, by)]


# ---- Pictures -----------------------------------------------------------------------------------

def pyplot():
    """Import matplotlib.pyplot in the style of our pictures.

    Without matplotlib it says how to get it and returns None: no picture is worth stopping for.
    """
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
                         "legend.frameon": False, "axes.titlesize": 10, "savefig.dpi": 120,
                         "lines.linewidth": 1.3})
    return plt


def save_picture(figure, path):
    """Write a picture whole, in the format that its name ends in. Returns its path."""
    from matplotlib import pyplot
    path = Path(path)
    if not path.suffix:
        path = path.with_name(path.name + ".png")
    try:
        write_whole(path, lambda aside: figure.savefig(aside, format=path.suffix[1:]))
    finally:
        pyplot.close(figure)
    return path


def draw_losses(folder, path=None):
    """Draw loss.png of a run: cross-entropy per masked token, with memory and without."""
    plt = pyplot()
    if plt is None:
        return
    lines, _ = read_metrics(folder)
    if not lines:
        return
    if not any("inner" in line for line in lines):
        label = "no memory"
    elif read_settings(folder).memory_from == "prompt":
        label = "with memory of the prompt"
    else:
        label = "with memory (phi has seen these answers)"
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    draw_loss(axes, lines, "ce", label)
    draw_loss(axes, lines, "ce_without", "without memory (theta alone)")
    axes.set(xlabel="step", ylabel="nats per masked token")
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    save_picture(figure, path or folder / "loss.png")


def draw_loss(axes, lines, key, label):
    """Draw one loss of metrics.jsonl, and its held-out values where there are some."""
    color = color_of(label)
    trained = [(line["step"], line[key]) for line in lines if key in line]
    key = "held_out_" + key
    held_out = [(line["step"], line[key]) for line in lines if key in line]
    if trained:
        axes.plot(*zip(*trained), color=color, linewidth=1.2, label=label,
                  alpha=0.4 if held_out else 1)
    if held_out:
        axes.plot(*zip(*held_out), "o-", color=color, linewidth=1.2, markersize=4,
                  label=label + ", held out")


def draw_stored(path, out):
    """Draw a comparison from its file of numbers. ValueError if it holds anything else."""
    numbers = read_json(Path(path), finite=False)
    try:
        draw_numbers(numbers, out)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{path} does not hold the numbers of a comparison; move it away, and "
                         "python evaluate.py compare --json makes one") from None


def draw_numbers(numbers, path):
    """Draw a comparison as bars with standard errors, a chart per experiment.

    numbers: what `gather_numbers` returns.
    """
    plt = pyplot()
    if plt is None:
        return
    groups, is_share = numbers["groups"], numbers["metric"] == "accuracy"
    figure, axes = plt.subplots(1, len(groups), figsize=(6.5 * len(groups), 4.4),
                                layout="constrained", squeeze=False, sharey=True)
    for group, ax in zip(groups, axes[0]):
        columns = list(dict.fromkeys(row["column"] for row in group["rows"]))
        draw_bars(ax, group["rows"], columns, is_share)
        ax.set_title(group["run"], fontsize=10)
        ax.set_xticks(range(len(columns)), columns)
        ax.set_xlabel(explain_columns(numbers["data"]))
        ax.legend(fontsize=8, title="phi written from", title_fontsize=8, ncol=2,
                  loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes[0][0].set_ylabel("share of answers right" if is_share
                          else "change in nats per token (less is better)")
    if is_share:
        axes[0][0].set_ylim(0, 1.05)
    else:
        for ax in axes[0]:
            ax.axhline(0, color="#222222", linewidth=0.8)
    say(f"picture in {save_picture(figure, path)}")


def draw_bars(ax, rows, columns, is_share):
    """Draw a bar per row of the table in each column. In nats the first row is what they change."""
    labels = list(dict.fromkeys(row["phi"] for row in rows))
    cells = {(row["phi"], row["column"]): row for row in rows}
    alone = {column: cells[labels[0], column] for column in columns}
    labels = labels if is_share else labels[1:]
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        shown = [shown_cell(cells[label, column], None if is_share else alone[column])
                 for column in columns]
        means, errors = zip(*shown)
        shift = (i - (len(labels) - 1) / 2) * width
        ax.bar([column + shift for column in range(len(means))], means, width,
               yerr=tuple(error or 0 for error in errors),
               label=label, color=color_of(label), error_kw={"linewidth": 0.8})


def shown_cell(row, alone):
    """(mean, standard error) of a cell; its change from theta alone, if that is given.

    Older files have the means of the runs alone, from which the same follows for several runs.
    """
    if "shown" in row:
        return row["shown"]
    if alone is None:
        return row["mean"], row["standard_error"]
    change = [own - other for own, other in zip(row["per_run"], alone["per_run"])]
    return mean_and_error(torch.tensor(change, dtype=torch.float64)[:, None])


def draw_exposure(curves, out):
    """Draw the ratio of sequential to static loss on the left, and both losses on the right."""
    plt = pyplot()
    if plt is None:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for label, curve in curves.items():
        color = curve["color"]
        left.plot(RATIOS, divide(curve["sequential"], curve["static"]), color=color, label=label)
        right.plot(RATIOS, curve["static"], color=color, linestyle="--")
        right.plot(RATIOS, curve["sequential"], color=color)
    left.set(xlabel="mask ratio (decoding goes right)", ylabel="sequential / static loss",
             xlim=(1, 0.1))
    right.set(xlabel="mask ratio", ylabel="nats per masked token (dashed: static)", xlim=(1, 0.1))
    left.legend(fontsize=7)
    say(f"picture in {save_picture(figure, out)}")
