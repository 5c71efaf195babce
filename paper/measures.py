"""What is measured on each run."""
from __future__ import annotations

import json
import random
from dataclasses import replace

import torch

import memdlm
from compare import RATIOS, mark_right, measure, write_phi
from data import collate
from settings import WRITTEN_FROM
from toy import tasks
from toy.data import ToyData


def at_inference(s):
    """The inner loop that adapts to a prompt: the paper's eta, the run's own design; or what the run has learned to read."""
    return s if s.memory and s.memory_from == "prompt" else replace(s, inner_lr=0.1)


def sources_of(s):
    """What phi is written from: name -> inner-loop settings, source."""
    inner, cover = at_inference(s), replace(s, **WRITTEN_FROM["prompt"])
    return {"alone": (s, "nothing"), "adapted": (inner, "prompt"), "another": (inner, "another"),
            "cover": (cover, "prompt"), "cover another": (cover, "another")}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def retrieval(s, model, size, lengths=None, names=("alone", "adapted", "another")):
    """Share of answer tokens right, by task, length and row. "in" and "beyond": means inside and outside the trained lengths."""
    out, lengths = {}, lengths or size.lengths
    for length in lengths:
        named = [(task, f"paper {task} {length} {i}") for task in tasks.RETRIEVAL for i in range(size.samples)]
        samples = [tasks.TASKS[task](random.Random(name), length) for task, name in named]
        batch = collate(samples, [name for _, name in named], False)
        for row in names:
            right = measure(model, *sources_of(s)[row], batch, "accuracy").view(len(tasks.RETRIEVAL), size.samples).mean(1)
            out |= {f"{task} {length} {row}": x for task, x in zip(tasks.RETRIEVAL, right.tolist())}
            out[f"{length} {row}"] = right.mean().item()
    for row in names:
        for where, some in (("in", lengths[:2]), ("beyond", lengths[2:])):
            if some:
                out[f"{where} {row}"] = mean(out[f"{length} {row}"] for length in some)
    return out


def retrieval_short(s, model, size):
    return retrieval(s, model, size, size.lengths[:2], ("alone", "adapted"))


def nats(s, model, size, names=("alone", "adapted", "another", "cover", "cover another")):
    """Cross-entropy on held-out samples of the run's own kind, by length and row, and their means."""
    data, out = ToyData(s.data), {}
    sources = {row: sources_of(s)[row] for row in names}
    if s.memory and s.memory_from == "response":
        sources["answers"] = s, "answers"
    for row, (inner, source) in sources.items():
        for column in data.columns:
            batch = data.tests(column, range(2 * size.samples), False, "paper")
            out[f"nats {column} {row}"] = measure(model, inner, source, batch, "nats").mean().item()
        out[f"nats {row}"] = mean(out[f"nats {column} {row}"] for column in data.columns)
    return out


def nats_short(s, model, size):
    return nats(s, model, size, ("alone", "adapted"))


def exposure(s, model, size):
    """Exposure bias (Fig. 3) for each row, and for the same model with logits / 3: as confident in the same order."""
    batch, out = ToyData(s.data).tests("32", range(2 * size.samples), False, "paper"), {}
    head = model.backbone.lm_head.weight
    for row in ("alone", "adapted", "cover", "cooled"):
        inner, source = sources_of(s)["alone" if row == "cooled" else row]
        phi = write_phi(model, inner, source, batch)
        head.data.div_(3 if row == "cooled" else 1)
        losses = memdlm.exposure_bias(model.backbone, inner, batch.x0, batch.maskable, batch.valid, batch.seeds,
                                      RATIOS, phi)
        head.data.mul_(3 if row == "cooled" else 1)
        static, sequential, matched = (losses[name].mean(1) for name in ("static", "sequential", "matched"))
        out |= {f"exposure {name} {row}": x.tolist()
                for name, x in (("static", static), ("sequential", sequential), ("matched", matched))}
        out |= {f"ratio {row}": (sequential / static)[1:].mean().item(),
                f"ratio matched {row}": (sequential / matched)[1:].mean().item(),
                f"static {row}": static[1:].mean().item()}
    return out


def bins(s, model, size):
    """Loss by mask ratio, also with the phi of training, which has seen the answers."""
    batch, out = ToyData(s.data).tests("32", range(2 * size.samples), False, "paper"), {}
    rank, n = memdlm.rank_of(batch.maskable, memdlm.uniform(batch.seeds, "bins", batch.x0.shape[1])), batch.maskable.sum(1)
    sources = {row: sources_of(s)[row] for row in ("alone", "adapted")} | ({"answers": (s, "answers")} if s.memory else {})
    for row, (inner, source) in sources.items():
        curve = []
        for ratio in RATIOS:
            masked = batch.maskable & (rank < (n * ratio).round().clamp(min=1).long()[:, None])
            xt = torch.where(masked, model.backbone.mask_id, batch.x0)
            phi = write_phi(model, inner, source, batch, torch.full((len(n),), ratio), xt, masked)
            nll = memdlm.response_nll(model.backbone, inner, batch.x0, masked, batch.valid, phi)
            curve.append((nll.sum(1) / masked.sum(1)).mean().item())
        out[f"bins {row}"] = curve
    return out


def anchor_ratios(s, model, size):
    """Retrieval inside the trained lengths with other anchors at inference (Fig. 8)."""
    return {f"in anchor {ratio}": retrieval(replace(s, anchor_ratio=ratio), model, size, size.lengths[:2],
                                            ("adapted",))["in adapted"]
            for ratio in (0.2, 0.4, 0.6, 0.8)}


def inner(s, model, size):
    """Loss of each stage of adapting to a prompt, before its step and after."""
    s, batch = at_inference(s), ToyData(s.data).tests("32", range(2 * size.samples), False, "paper")
    x0, valid, backbone = batch.prompt, batch.prompt_valid, model.backbone
    masked = memdlm.at_least_one(valid, memdlm.uniform(batch.seeds, "prompt anchor", x0.shape[1]), s.anchor_ratio)
    path = memdlm.stages(s, x0, masked, valid, torch.full((len(x0),), s.anchor_ratio), batch.seeds, backbone.mask_id,
                         weighted=False)
    pairs = []
    for k in range(len(path)):  # the stage once more shows what its step did
        _, record = memdlm.inner_loop(backbone, s, path[:k + 1] + path[k:k + 1], x0, valid,
                                      lambda x: memdlm.lower_layers(backbone, s, x, valid).detach(),
                                      memdlm.fresh_phi(backbone, s, batch.seeds))
        pairs.append(record["inner"][-2:].tolist())
    return {"inner before": [before for before, _ in pairs], "inner after": [after for _, after in pairs]}


def where(s, model, size):
    """Where phi lives: norm of the change it makes to each matrix, if it may change all of them."""
    s = replace(at_inference(s), layer_fraction=1.0, scope="ffn+attn")
    batch = ToyData(s.data).tests("32", range(size.samples), False, "paper")
    phi = write_phi(model, s, "prompt", batch)
    change = {name: s.alpha / s.rank * (B @ A).flatten(1).norm(dim=1).mean().item() for name, (A, B) in phi.items()}
    return {"where names": list(change), "where": list(change.values())}


def order(s, model, size):
    """When each position of the response is committed, by row."""
    batch, out = ToyData(s.data).tests("32", range(2 * size.samples), False, "paper"), {}
    for row in ("alone", "cover"):
        inner_s, source = sources_of(s)[row]
        phi, when = write_phi(model, inner_s, source, batch), torch.zeros(batch.x0.shape)
        for x in memdlm.denoise(model.backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds, phi):
            when += (x == model.backbone.mask_id) & batch.maskable  # steps that a position still waits
        out[f"order {row}"] = when[batch.maskable].view(len(when), -1).mean(0).tolist()
    return out


def needle(s, model, size):
    """Answers right by how deep in the prompt the pair stands: [lengths][5 depths], for each row. From dictionaries."""
    out = {row: [] for row in ("alone", "cover" if s.closed_book else "adapted")}
    for length in (16, 32, 64) if s.closed_book else size.lengths:
        named = [f"paper dictionary {length} {i}" for i in range(3 * size.samples)]
        samples = [tasks.dictionary(random.Random(name), length, rep=1 if length < 128 else None) for name in named]
        batch = collate(samples, named, s.closed_book)
        depth = torch.tensor([5 * sample.prompt.index(key) // len(sample.prompt) for sample in samples
                              for key, asked in zip(sample.rest, sample.answer[1:]) if asked])
        for row in out:
            inner_s, source = sources_of(s)[row]
            right = mark_right(model, inner_s, batch, write_phi(model, inner_s, source, batch))[batch.maskable]
            out[row].append([right[depth == d].double().mean().item() for d in range(5)])
    return {f"needle {row}": table for row, table in out.items()}


def recall(s, model, size):
    """Closed book: answers right by column, for each row; and their means."""
    data, out = ToyData("dictionary"), {}
    sources = sources_of(s) | {"paper's masks": (replace(s, trajectory="consistent", inner_lr=0.3), "prompt")}
    for row in ("alone", "cover", "cover another", "paper's masks") if s.closed_book else ("alone",):
        for column in data.columns:
            batch = data.tests(column, range(2 * size.samples), s.closed_book, "paper")
            out[f"recall {column} {row}"] = measure(model, *sources[row], batch, "accuracy").mean().item()
        out[f"recall {row}"] = mean(out[f"recall {column} {row}"] for column in data.columns)
    return out


MEASURES = {f.__name__: f for f in (retrieval, retrieval_short, nats, nats_short, exposure, bins,
                                    anchor_ratios, inner, where, order, needle, recall)}


def dynamics(folder):
    """The training curve: cross-entropy per masked token as trained, and without memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line["ce"] for line in lines]
    alone = [line.get("ce_without", line["ce"]) for line in lines]
    half, last = len(lines) // 2, -(-len(lines) // 4)
    return {"curve steps": [line["step"] for line in lines], "curve": trained, "curve alone": alone,
            "train": mean(trained[-last:]), "train alone": mean(alone[-last:]),
            "train alone, first half": mean(alone[:half or 1])}
