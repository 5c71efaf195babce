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

import argparse
import contextlib
import io
import itertools
import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import memdlm
from generate import INNER, LOADING, MODES, reply_text
from toy.data import collate
from toy.tasks import Sample
from train import (COLORS, Settings, add_flags, control, decoder, latest_run, one_line, open_model, open_run, pyplot,
                   read_settings, refuse, write_whole)

CHUNK = 50  # samples measured at once


class Row(NamedTuple):
    """A row of the table: what phi is written from."""
    label: str
    s: Settings       # of the inner loop
    source: str       # nothing, prompt, another or answers
    role: str = ""    # "own" and "other" mark the pair that the summary compares


# ---- What phi is written from: each row of the table --------------------------------------------------

def phi_of_prompt(model, s, batch, shift=0):
    """Prompt adaptation (4.5). shift=1 gives each sample the phi of its neighbour's prompt."""
    prompt, valid = batch.prompt.roll(shift, 0), batch.prompt_valid.roll(shift, 0)
    return memdlm.adapt(model.backbone, s, prompt, valid, batch.seeds)[0]


def phi_of_answers(model, s, batch, t, xt, masked):
    """What training writes: the inner loop on the noised response itself, and its answers."""
    h = memdlm.below(model.backbone, s, xt, batch.valid).detach()
    return memdlm.write_from_response(model.backbone, s, batch, t, xt, masked, h)[0]


def rows_for(s, changes):
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


# ---- Measuring ----------------------------------------------------------------------------------------

def noised(model, batch, metric):
    """t, xt, masked of held-out samples, the same for every model: everything masked for decoding, else noise as in training."""
    t = memdlm.uniform(batch.seeds, "t", 1)[:, 0]
    u = memdlm.uniform(batch.seeds, "anchor", batch.x0.shape[1])
    masked = batch.maskable if metric == "accuracy" else memdlm.at_least_one(batch.maskable, u, t[:, None])  # so that each has a loss
    return t, torch.where(masked, model.backbone.mask_id, batch.x0), masked


def written(model, s, source, batch, *anchor):
    """The phi of a row of the table; anchor: t, xt and masked, from which that of the answers is written."""
    return {"nothing": lambda: None,
            "prompt": lambda: phi_of_prompt(model, s, batch),
            "another": lambda: phi_of_prompt(model, s, batch, shift=1),
            "answers": lambda: phi_of_answers(model, s, batch, *anchor)}[source]()


def answered(model, s, batch, phi):
    """[B, L] bool: answer tokens that decoding got right."""
    canvas = batch.x0
    for canvas in memdlm.denoise(model.backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds, phi):
        pass
    return (canvas == batch.x0) & batch.maskable


def measure(model, s, source, batch, metric):
    """One number per sample, [B]: share of answer tokens right after decoding, or nats per masked answer token."""
    t, xt, masked = noised(model, batch, metric)
    phi = written(model, s, source, batch, t, xt, masked)
    if metric == "nats":
        return memdlm.response_nll(model.backbone, s, batch.x0, masked, batch.valid, phi).sum(1) / masked.sum(1)
    return answered(model, s, batch, phi).sum(1) / masked.sum(1)


def run_values(folder, samples, changes):
    """Settings, data and {(row label, column): [samples]} of one run, with the label of each role."""
    s, data, model = open_run(folder)
    values, roles = {}, {}
    chunks = -(-samples // (CHUNK if s.model == "toy" else 2))  # of nearly equal size: a chunk of one would have no other prompt
    edges = [samples * i // chunks for i in range(chunks + 1)]
    for row in tqdm(rows_for(s, changes), desc=f"measuring {folder}", unit="row", leave=False):
        if row.role:
            roles[row.role] = row.label
        for column in data.columns:
            parts = [measure(model, row.s, row.source, data.tests(column, range(start, end), s.closed_book), data.metric)
                     for start, end in zip(edges, edges[1:])]
            values[row.label, column] = torch.cat(parts).double()
    return s, data, values, roles


def kind_of(s):
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


def compare(folders, samples, changes=None):
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


def control_of(group, groups):
    """The group that is this one's control in all but the seed; without memory the inner loop's settings are idle."""
    idle = set(memdlm.Settings.__dataclass_fields__) - {"memory", "closed_book", "min_t"}
    wanted = same_but(control(group.s), "seed", *idle)
    return next((g for g in groups if group.s.memory and same_but(g.s, "seed", *idle) == wanted), None)


def summary(values):
    """[runs, n] -> mean and its standard error: over seeds if there are several, else over samples."""
    spread = values.mean(1) if len(values) > 1 else values[0]
    return values.mean().item(), (spread.std() / len(spread) ** 0.5).item() if len(spread) > 1 else float("nan")


# ---- Tables -------------------------------------------------------------------------------------------

def cells(data, group, label):
    """(mean, standard error) per column. In nats, all rows but the first are paired differences to the first:
    the spread between samples is far larger than what memory does to each of them."""
    rows = [(group.values[label, column], group.values[group.roles["alone"], column]) for column in data.columns]
    change = data.metric == "nats" and label != group.roles["alone"]
    return [summary(value - alone if change else value) for value, alone in rows]


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
        lines += ["", f"{kind_of(group.s)}  [{group.s.steps} steps; {spread}]",
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
        lines.append(f"- {kind_of(group.s)}: {alone:.3f} alone, {own:.3f} with phi of {group.roles['own']}, {other:.3f} "
                     "with phi of another prompt (means over columns).")
        base = control_of(group, groups)
        if base and group.s.closed_book:
            lines.append("  The decoder does not see the prompt; what it knows came through phi. Attention that sees "
                         f"the prompt, trained as many steps, reaches {base.mean('alone'):.3f}.")
        elif base and group.seeds == base.seeds:
            roles = [role for role in ("alone", "own") if group.roles[role] == base.roles[role]]
            pairs = [(role, *summary(group.all(role) - base.all(role))) for role in roles]
            lines.append("  Against the baseline, paired: " + ", ".join(
                f"{mean:+.4f} +-{error:.4f} {'alone' if role == 'alone' else 'with the same adaptation'}"
                for role, mean, error in pairs) + ".")
        if "leak" in group.roles and better(group.mean("leak"), alone):
            lines.append(f"  With phi of the answers, which is what training itself sees, {group.mean('leak'):.3f}. The gap "
                         "to theta alone is leakage: with a larger --inner-lr phi carries the answers, and theta need "
                         "not learn them.")
    return "\n".join(lines)


def panel(folders, samples=100, changes=None, save_to=None, picture=None):
    """Print the comparison of runs and what it says; optionally keep the numbers as JSON and a picture."""
    data, groups = compare([Path(folder) for folder in folders], samples, changes)
    print(f"\n{table(data, groups)}\n\n{findings(data, groups)}\n")
    if save_to:
        rows = [{"run": kind_of(g.s), "settings": asdict(g.s), "rows": [
            {"phi": label, "column": column, "mean": summary(value)[0], "standard_error": summary(value)[1],
             "per_run": value.mean(1).tolist()} for (label, column), value in g.values.items()]} for g in groups]
        whole = {"data": data.kind, "metric": data.metric, "samples": samples, "torch": torch.__version__, "groups": rows}
        write_whole(Path(save_to), lambda path: path.write_text(json.dumps(whole, indent=1) + "\n"))
        print(f"numbers in {save_to}")
    if picture:
        panel_picture(data, groups, picture)


def bar_color(memory, label):
    """By the first word of the row: what phi is written from."""
    return {"nothing": COLORS["train-only" if memory else "MDLM"], "its": COLORS["train & inference" if memory else "MDLM, adapted"],
            "another": "#56B4E9", "the": COLORS["answers"]}[label.split()[0]]



def panel_picture(data, groups, path):
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
        ax.set_title(kind_of(group.s), fontsize=10)
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


# ---- Exposure bias (Fig. 3) ---------------------------------------------------------------------------

RATIOS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]


def exposure(folders, samples, out):
    """Static, sequential and matched loss by mask ratio, for theta alone and with phi of the prompt."""
    curves = {}
    for folder in with_controls(folders):
        s, data, model = open_run(folder)
        batch = data.tests(list(data.columns)[0], range(samples), s.closed_book)
        for row in [row for row in rows_for(s, None) if row.role in ("alone", "own")]:
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
    exposure_picture(curves, out)
    print("Read the ratio beside the losses: a model with a worse static loss has a flatter ratio.")


def exposure_picture(curves, out):
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


# ---- lm-evaluation-harness ------------------------------------------------------------------------------

class Harness:
    """Through this lm-evaluation-harness asks our models.

    run: a run folder, or model (with adapter, load_4bit, ...) as in generate.py. adapt: write each prompt into phi
    first, one phi per request, whatever the batch. Settings of the inner loop may be given by name.
    """

    def __init__(self, run=None, model=None, adapt=False, batch_size=1, seed=0, mc_samples=128, max_length=0, steps=0,
                 mode="plain", max_batch_size=None, device=None, **settings):
        super().__init__()
        self.s, self.data, self.model = open_model(Path(run) if run else None, model, settings)
        self.adapt, self.batch, self.seed, self.mc, self.steps, self.mode = adapt, int(batch_size), seed, mc_samples, steps, mode
        if self.data.words:
            raise ValueError("the toy's word tasks have a vocabulary of their own and cannot read text; train on bytes: --data python")
        self.backbone, self.tokenizer, self.max_length = self.model.backbone, self.data.tokenizer, max_length
        self.cut = 0  # prompts that were longer than max_length

    # What the harness asks for when it uses a chat template, and for its cache and records.
    tokenizer_name = property(lambda self: str(getattr(self.backbone, "name", "toy")).replace("/", "__"))

    def chat_template(self, chat_template=False):
        return getattr(getattr(self.tokenizer, "hf", None), "chat_template", None)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        if self.chat_template() is None:
            raise ValueError("this model has no chat template")
        return self.tokenizer.hf.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt, tokenize=False)

    def get_model_info(self):
        return {"adapt": self.adapt, "settings": asdict(self.s)}

    def method(self):
        """What a score belongs to: the model, trained with memory or not, adapted or not, and what is not the paper's default."""
        defaults = memdlm.Settings()
        other = {f.name: getattr(self.s, f.name) for f in fields(defaults) if getattr(self.s, f.name) != getattr(defaults, f.name)}
        family = getattr(self.backbone, "family", "toy")
        return {"model": family, "memory": self.s.memory, "adapt": self.adapt, "other": other}

    def ids(self, text, room):
        """The prompt's tokens; with max_length its last ones, so that `room` more fit."""
        ids = self.tokenizer.encode(text)
        keep = max(1, self.max_length - room) if self.max_length else len(ids)
        self.cut += len(ids) > keep
        return ids[-keep:] if ids else ids

    def phi(self, batch):
        if not self.adapt or not batch.prompt_valid.any():
            return None
        return memdlm.adapt(self.backbone, self.s, batch.prompt, batch.prompt_valid, batch.seeds)[0]

    def generate_until(self, requests, disable_tqdm=False):
        """Greedy answers by the decoder of generate.py, cut at the task's stop strings."""
        signal.alarm(0)  # the task's samples are made: see `too_short`
        jobs = []
        for number, request in enumerate(requests):
            context, options = request.args
            room = int(options.get("max_gen_toks", 256))
            stops = options.get("until") or []
            jobs.append((room, number, self.ids(context, room), [stops] if isinstance(stops, str) else stops))
        answers = [""] * len(jobs)
        # Requests of one length after the other, so that a batch has little padding.
        jobs.sort(key=lambda job: (job[0], len(job[2]), job[1]))
        with tqdm(total=len(jobs), desc="generating", unit="request", disable=disable_tqdm) as bar:
            for group in self.batches(jobs):
                for (room, number, _, stops), text in zip(group, self.answer(group)):
                    for stop in stops:
                        text = text.split(stop)[0] if stop else text
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(group))
        if self.cut:
            print(f"{self.cut} prompts were cut to max_length {self.max_length}")
        return answers

    def batches(self, jobs):
        """Neighbours that ask for the same number of tokens, `batch_size` at a time."""
        for _, same in itertools.groupby(jobs, key=lambda job: job[0]):
            same = list(same)
            yield from (same[i:i + self.batch] for i in range(0, len(same), self.batch))

    def answer(self, group):
        samples = [Sample(ids, [0] * room, [True] * room) for room, _, ids, _ in group]
        batch = collate(samples, [f"{self.seed} {number}" for _, number, _, _ in group], False)
        options = dict(zip(("threshold", "edit_threshold"), MODES[self.mode])) if decoder(self.backbone) is not memdlm.denoise else {}
        for x in decoder(self.backbone)(self.backbone, self.s, batch.x0, batch.maskable, batch.valid, batch.seeds,
                                        self.phi(batch), steps=self.steps or None, **options):
            pass
        for row, fill in zip(x, batch.maskable):
            yield reply_text(self.tokenizer, row[fill].tolist())

    def loglikelihood(self, requests, disable_tqdm=False):
        """[(log p(continuation | context), would greedy decoding say it)], the former by Monte Carlo."""
        signal.alarm(0)
        results = []
        for number, request in enumerate(tqdm(requests, desc="scoring", unit="request", disable=disable_tqdm)):
            context, continuation = request.args
            both, prompt = self.tokenizer.encode(context + continuation), self.tokenizer.encode(context)
            prompt = both[:len(prompt)] if both[:len(prompt)] == prompt else prompt
            rest = both[len(prompt):]
            results.append(self.score(prompt, rest, f"{self.seed} {number}"))
            self.cache_hook.add_partial("loglikelihood", request.args, results[-1])
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [self.score([], self.tokenizer.encode(request.args[0]), f"{self.seed} {number}", False)[0]
                for number, request in enumerate(requests)]

    @torch.no_grad()
    def score(self, prompt, rest, name, greedy=True):
        """One continuation. Its likelihood is estimated as LLaDA's: mask k ~ U{1..n} of its n tokens, at random, and
        weight the loss at these by n / k; the mean over mc_samples such draws is a bound on log p."""
        if not rest:
            return 0.0, True
        n, batch = len(rest), collate([Sample(prompt, rest, [True] * len(rest))], [name], False)
        phi = self.phi(batch)
        total = 0.0
        for start in range(0, self.mc, self.batch):
            seeds = [f"{name} {i}" for i in range(start, min(start + self.batch, self.mc))]
            x0, open_ = batch.x0.expand(len(seeds), -1), batch.maskable.expand(len(seeds), -1)
            k = 1 + (memdlm.uniform(seeds, "mc", 1) * n).long()  # [b, 1]
            masked = open_ & (memdlm.order(open_, memdlm.uniform(seeds, "mc masks", x0.shape[1])) < k)
            own = phi and {key: tuple(w.expand(len(seeds), -1, -1) for w in pair) for key, pair in phi.items()}
            nll = memdlm.response_nll(self.backbone, self.s, x0, masked, torch.ones_like(open_), own)
            total += float((nll.sum(1) * n / k[:, 0]).sum())
        said = False
        if greedy:
            for x in memdlm.denoise(self.backbone, self.s, batch.x0, batch.maskable, batch.valid, [name], phi):
                if (x != batch.x0)[batch.maskable & (x != self.backbone.mask_id)].any():
                    break
            said = torch.equal(x, batch.x0)
        return -total / self.mc, said


def harness():
    """Harness as a class of lm_eval, which is imported only when it is wanted."""
    from lm_eval.api.model import LM
    return type("MemDLMHarness", (Harness, LM), {})


FAMILY = {"ruler": ("ruler", "niah"), "babilong": ("babilong",), "longbench": ("longbench",)}  # by how a task's name begins


def family(task):
    return next((name for name, starts in FAMILY.items() if task.startswith(starts)), "")


def task_metadata(task, length, tokenizer):
    """What a task's loader is told: RULER takes a list of lengths and a tokenizer, BABILong one length as a string."""
    if family(task) == "babilong":
        return {"max_seq_lengths": f"{length // 1024}k"}
    return {"max_seq_lengths": [length], "tokenizer": tokenizer} if family(task) == "ruler" else {}


def task_manager(tasks, metadata, include):
    """The harness's index of tasks. Of its 14,000 names only the paper's families are read, unless another is asked for:
    that takes a fifth of a second instead of twelve."""
    import lm_eval.tasks
    folder = Path(lm_eval.tasks.__file__).parent
    paths = [str(folder / name) for name in FAMILY] + ([include] if include else [])
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=paths, metadata=metadata)
    known = set(manager.all_tasks)
    if not set(tasks) <= known:
        manager = lm_eval.tasks.TaskManager(include_path=include, metadata=metadata)
        known = set(manager.all_tasks)
    if unknown := sorted(set(tasks) - known):
        raise ValueError(f"lm-evaluation-harness has no task {unknown[0]!r}; python evaluate.py lm_eval ls tasks lists them")
    return manager


def plain_tokenizer(model, folder):
    """A copy of the model's tokenizer without anything to execute: RULER's loader would run a repository's code."""
    hf = getattr(model.data.tokenizer, "hf", None)
    if hf is None:
        from llada import byte_tokenizer
        hf = byte_tokenizer()
    hf.save_pretrained(folder)
    return str(folder)


def punctuation_tables(folder):
    """RULER's needle tasks split essays into sentences with NLTK's tables, which it wants to download. Empty ones (no known
    abbreviations) do; they change where a needle may stand, not what is asked."""
    import nltk
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        tables = folder / "tokenizers" / "punkt_tab" / "english"
        tables.mkdir(parents=True)
        for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
            (tables / name).write_text("")
        nltk.data.path.append(str(folder))


def too_short(number, frame):
    # RULER's loaders catch every exception in the loop that never ends, so there is no other way out.
    print("error: the task's samples were not made in time: probably the smallest does not fit into this length with this "
          "tokenizer, and RULER's loader then searches for ever; ask for more with --lengths, or --wait longer", file=sys.stderr)
    sys.stderr.flush()
    os._exit(2)


@contextlib.contextmanager
def given_time(seconds):
    """RULER's loaders print every attempt, and some never end. The alarm is called off when the first request arrives."""
    signal.signal(signal.SIGALRM, too_short)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        signal.alarm(0)


def run_tasks(tasks, lengths, out, limit=None, num_fewshot=None, chat=False, include=None, wait=600, **model_args):
    """Tasks of lm-evaluation-harness, one length at a time: --limit counts from the first sample of each. Prints a table, and
    leaves the harness's own files in out/<length> and the table in out/scores.json."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker
    except ImportError:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install 'lm-eval[ruler,longbench]'") from None
    model, scores, out = harness()(**model_args), [], Path(out)
    given = {name: str(value) for name, value in model_args.items() if value is not None}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = plain_tokenizer(model, Path(scratch) / "tokenizer")
        if any(family(task) == "ruler" for task in tasks):
            punctuation_tables(Path(scratch) / "nltk")
        for task in tasks:
            for length in lengths if family(task) in ("ruler", "babilong") else [None]:
                tracker = EvaluationTracker(output_path=str(out / f"{length or 'full'}"))
                manager = task_manager([task], task_metadata(task, length, tokenizer), include)
                with given_time(wait if family(task) == "ruler" else 0):
                    results = simple_evaluate(
                        model=model, model_args=given, tasks=[task], task_manager=manager, limit=limit, num_fewshot=num_fewshot,
                        apply_chat_template=chat, bootstrap_iters=0, evaluation_tracker=tracker, log_samples=True)
                samples = results.pop("samples")
                tracker.save_results_aggregated(results=results, samples=samples)
                for name, rows in samples.items():
                    tracker.save_results_samples(task_name=name, samples=rows)
                rows = [row | {"length": length, **model.method()} for row in read_scores(results, length)]
                print_scores(rows)
                scores += rows
                write_whole(out / "scores.json", lambda path: path.write_text(json.dumps(scores, indent=1) + "\n"))
    print(f"scores in {out / 'scores.json'}, the harness's own files beside it")
    return scores


def read_scores(results, length):
    """Rows of the harness's result: task, metric, value and number of samples. RULER reports every length it knows, -1 where
    it measured none: these are left out."""
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric = key.partition(",")[0]
            if "," in key and not metric.endswith("_stderr") and isinstance(value, (int, float)) and value >= 0:
                if not metric.isdecimal() or metric == str(length):
                    n = results.get("n-samples", {}).get(task, {}).get("effective")
                    rows.append({"task": task, "metric": metric, "value": value, "samples": n})
    return rows


def print_scores(rows):
    for row in rows:
        print(f"{row['task']:28} {row['length'] or '':>6} {row['metric']:22} {row['value']:8.4f}  ({row['samples']} samples"
              f"{', adapted to each prompt' if row['adapt'] else ''})")


# ---- The paper's tables, with ours beside them -------------------------------------------------------------

METHODS = {(False, False): "MDLM", (True, False): "train-only", (True, True): "train & inference",
           (False, True): "MDLM, adapted"}  # the last one is the control that the paper lacks


def paper_tables(folder):
    """Each of the paper's tables: its numbers and, from every scores.json below the folder, ours. Blank where not run."""
    paper = json.loads((Path(__file__).parent / "results" / "paper.json").read_text())
    ours = [row for path in sorted(Path(folder).rglob("scores.json")) for row in json.loads(path.read_text())]

    def found(model, method, column, other):
        """The newest of our scores for a cell, in percent."""
        _, task, length, metric = column
        values = [r["value"] for r in ours if r["model"] == model and METHODS[r["memory"], r["adapt"]] == method and
                  (r["task"], r["length"], r["metric"]) == (task, length, metric) and
                  {k: v for k, v in r["other"].items() if k != "memory"} == other]
        return f"{100 * values[-1]:.2f}" if values else "-"

    for table in paper["tables"]:
        print(f"\n{table['name']} (percent; paper / ours)\n")
        print("| method | " + " | ".join(column[0] for column in table["columns"]) + " |\n|---" + "|---" * len(table["columns"]) + "|")
        for method in (*table["rows"], "MDLM, adapted"):
            numbers = table["rows"].get(method, [None] * len(table["columns"]))
            cells = [f"{'-' if x is None else f'{x:.2f}'} / {found(table['model'], method, column, {})}"
                     for x, column in zip(numbers, table["columns"])]
            print(f"| {method} | " + " | ".join(cells) + " |")
    ablations = paper["ablations"]
    print(f"\n{ablations['name']} (percent)\n\n| variant | paper | ours |\n|---|---|---|")
    for name, other, value in ablations["rows"]:
        print(f"| {name} | {value:.1f} | {found(ablations['model'], 'train & inference', ablations['column'], other)} |")
    print(f"\nOurs: {len(ours)} scores from {folder}, written by --tasks.")


def lm_eval_command():
    """lm_eval's own command line, with our models under the name `memdlm`."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    register_model("memdlm")(harness())
    cli_evaluate()


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders [default the latest]")
    parser.add_argument("--samples", type=int, default=200, help="held-out samples per cell [default 200]")
    parser.add_argument("--picture", metavar="FILE", help="also draw the table there")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    parser.add_argument("--exposure", action="store_true", help="the exposure-bias curves instead of the table")
    parser.add_argument("--paper", nargs="?", const="results", metavar="FOLDER", help="the paper's tables with our scores beside "
                        "them, from the scores.json files in a folder [default results]; or 'toy': its claims on the toy, in under two hours")
    parser.add_argument("--quick", action="store_true", help="with --paper toy: shorter runs, under ten minutes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="with --paper toy: runs at a time, a thread each [default all cores]")
    parser.add_argument("--seeds", type=int, help="with --paper toy [default 5, quick 3]")
    parser.add_argument("--out", help="picture of --exposure [exposure.png], folder of --tasks [results/lm_eval] and "
                        "--paper toy [runs/paper]")
    tasks = parser.add_argument_group("lm-evaluation-harness")
    tasks.add_argument("--tasks", help="its tasks, separated by commas: ruler_vt, ruler_cwe, niah_multivalue, babilong_qa1, "
                       "babilong_longctx, longbench_trec ...")
    tasks.add_argument("--lengths", default="4096", help="lengths in tokens for RULER and BABILong, each on its own [default 4096]")
    tasks.add_argument("--adapt", action="store_true", help="write each prompt into fast weights first")
    tasks.add_argument("--limit", type=int, help="only the first so many samples of each task and length")
    tasks.add_argument("--batch-size", type=int, default=1, help="requests decoded together [default 1]")
    tasks.add_argument("--num-fewshot", type=int, help="examples in the prompt [default the task's]")
    tasks.add_argument("--chat-template", action="store_true", help="put the prompt into the model's chat template")
    tasks.add_argument("--max-length", type=int, default=0, help="cut longer prompts from the left; 0: never [default 0]")
    tasks.add_argument("--steps", type=int, default=0, help="forward passes per answer, LLaDA2.x per block [default one per token]")
    tasks.add_argument("--mode", choices=list(MODES), default="plain", help="LLaDA2.x, as in generate.py [default plain]")
    tasks.add_argument("--mc-samples", type=int, default=128, help="Monte Carlo samples of a likelihood [default 128]")
    tasks.add_argument("--include-path", help="a folder with task files of your own")
    tasks.add_argument("--wait", type=int, default=600, help="seconds that RULER may take to make its samples [default 600]")
    tasks.add_argument("--model", help="a hub id or a folder, in place of a run")
    inner = [name for name in INNER if name != "closed_book"]  # what a run's decoder sees was settled in training
    add_flags(tasks, LOADING + inner)
    arguments = parser.parse_args()
    mode = ("--tasks" if arguments.tasks else "--paper toy" if arguments.paper == "toy" else "--paper" if arguments.paper
            else "--exposure" if arguments.exposure else "the table of runs")
    used = {"--tasks": ["runs", "tasks", "out", "lengths", "adapt", "limit", "batch_size", "num_fewshot", "chat_template", "max_length",
                        "steps", "mode", "mc_samples", "include_path", "wait", "model", *LOADING, *inner],
            "--paper toy": ["paper", "quick", "jobs", "seeds", "out"], "--paper": ["paper"], "--exposure": ["runs", "exposure", "samples", "out"],
            "the table of runs": ["runs", "samples", "json", "picture", *inner]}[mode]
    idle = [name for name, value in vars(arguments).items() if value != [] and value != parser.get_default(name) and name not in used]
    if idle:
        refuse(f"{'a run' if idle[0] == 'runs' else '--' + idle[0].replace('_', '-')} is not for {mode}")
    return arguments


def main():
    if sys.argv[1:2] == ["lm_eval"]:
        del sys.argv[1]
        return lm_eval_command()
    arguments = parse()
    changes = {name: getattr(arguments, name) for name in INNER if hasattr(arguments, name)}
    loading = {name: getattr(arguments, name) for name in LOADING if hasattr(arguments, name)}
    with one_line():
        if arguments.samples < 2:
            raise ValueError(f"--samples is {arguments.samples}; it must be at least 2")
        if arguments.paper == "toy":
            if min(arguments.jobs, arguments.seeds or 1) < 1:
                raise ValueError("--jobs and --seeds must be at least 1")
            from toy.paper import paper_toy
            return paper_toy(arguments.quick, arguments.jobs, arguments.seeds, arguments.out or "runs/paper")
        if arguments.paper:
            return paper_tables(arguments.paper)
        if arguments.tasks:
            lengths = [int(x) for x in arguments.lengths.split(",")]
            if len(arguments.runs) > 1:
                raise ValueError("--tasks takes one run or one --model at a time")
            run_tasks(arguments.tasks.split(","), lengths, arguments.out or "results/lm_eval", arguments.limit,
                      arguments.num_fewshot, arguments.chat_template, arguments.include_path, arguments.wait,
                      run=arguments.runs[0] if arguments.runs else None, model=arguments.model, adapt=arguments.adapt,
                      batch_size=arguments.batch_size, steps=arguments.steps, mode=arguments.mode, max_length=arguments.max_length,
                      mc_samples=arguments.mc_samples, **loading, **changes)
            return
        runs = arguments.runs or [latest_run()]
        for run in runs:
            read_settings(run)
        if arguments.exposure:
            exposure(runs, arguments.samples, arguments.out or "exposure.png")
        else:
            panel(runs, arguments.samples, changes, arguments.json, arguments.picture)


if __name__ == "__main__":
    main()
