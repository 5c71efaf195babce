"""What is measured on each run of the paper's claims.

Every measure is a function of the run's settings, its model and the size of the comparison. It
returns a dict {key: number or list}, which joins the run's measures.json. Test samples and masks
depend on their names alone, so runs of all kinds meet the same ones.

A key ends with the way in which phi was written, for example "nats adapted". `ways_to_write` has
them all. Training itself writes phi from the answers. That way appears here only as "answers", and
no measure compares it with a model that has not seen them.
"""
from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import replace

import torch

import memdlm
from compare import RATIOS, mark_right, measure, write_phi
from data import collate
from runs import read_metrics
from settings import WRITTEN_FROM
from toy import tasks
from toy.data import ToyData
from toy.model import rotary, rotate


def inference_settings(s):
    """The inner loop that adapts a model to a prompt.

    It is the one that theta has learned to read, if training wrote phi from prompts. Otherwise it
    is the run's own design at the paper's eta.
    """
    if s.memory and s.memory_from == "prompt":
        return s
    return replace(s, inner_lr=0.1)


def ways_to_write(s):
    """The ways of writing phi: {way: (inner-loop settings, source)}, sources as in `write_phi`.

        alone           no phi at all: theta by itself
        adapted         from the prompt
        another         from the prompt of another sample
        cover           from the prompt, by four masks that cover all of it
        cover another   the same from the prompt of another sample
    """
    own, cover = inference_settings(s), replace(s, **WRITTEN_FROM["prompt"])
    return {"alone": (s, "nothing"), "adapted": (own, "prompt"), "another": (own, "another"),
            "cover": (cover, "prompt"), "cover another": (cover, "another")}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def held_out_batch(s, count):
    """Held-out samples of the run's own kind of data, with prompts of 32 tokens."""
    return ToyData(s.data).tests("32", range(count), False, "paper")


# ---- Retrieval and loss -------------------------------------------------------------------------

def measure_retrieval(s, model, size, lengths=None, ways=("alone", "adapted", "another")):
    """Share of answer tokens right, by task, prompt length and way.

    "in" and "beyond" are the means over the trained lengths and over the longer ones. Each task is
    a batch of its own: its answers have as many gaps as it has, so none waits for those of others.
    """
    lengths, out = lengths or size.lengths, {}
    for length in lengths:
        for task in tasks.RETRIEVAL:
            names = [f"paper {task} {length} {i}" for i in range(size.samples)]
            samples = [tasks.TASKS[task](random.Random(name), length) for name in names]
            batch = collate(samples, names, False)
            for way in ways:
                right = measure(model, *ways_to_write(s)[way], batch, "accuracy")
                out[f"{task} {length} {way}"] = right.mean().item()
        for way in ways:
            out[f"{length} {way}"] = mean(out[f"{task} {length} {way}"] for task in tasks.RETRIEVAL)
    for way in ways:
        for where, some in (("in", size.lengths[:2]), ("beyond", size.lengths[2:])):
            if some and set(some) <= set(lengths):
                out[f"{where} {way}"] = mean(out[f"{length} {way}"] for length in some)
    return out


def measure_own_retrieval(s, model, size):
    """Retrieval without the control."""
    return measure_retrieval(s, model, size, ways=("alone", "adapted"))


def measure_plain_retrieval(s, model, size):
    """Retrieval by theta alone."""
    return measure_retrieval(s, model, size, ways=("alone",))


def measure_short_retrieval(s, model, size):
    """Retrieval at the trained lengths only."""
    return measure_retrieval(s, model, size, size.lengths[:2], ("alone", "adapted"))


def measure_further_retrieval(s, model, size):
    """What the short one leaves out that a claim reads: longer prompts, and the control."""
    return (measure_retrieval(s, model, size, size.lengths[2:], ("alone",))
            | measure_retrieval(s, model, size, size.lengths[:2], ("another",)))


def measure_anchor_ratios(s, model, size):
    """Retrieval at the trained lengths with other anchors at inference (Fig. 8)."""
    out = {}
    for ratio in (0.4, 0.6, 0.8):
        changed = replace(s, anchor_ratio=ratio)
        scores = measure_retrieval(changed, model, size, size.lengths[:2], ("adapted",))
        out[f"in anchor {ratio}"] = scores["in adapted"]
    return out


def measure_nats(s, model, size, ways=("alone", "adapted", "answers")):
    """Cross-entropy on held-out samples of the run's own kind, by prompt length and way."""
    data, out = ToyData(s.data), {}
    sources = ways_to_write(s) | {"answers": (s, "answers")}
    if not s.memory or s.memory_from == "prompt":  # training writes no phi from answers
        ways = [way for way in ways if way != "answers"]
    for way in ways:
        for column in data.columns:
            batch = data.tests(column, range(2 * size.samples), False, "paper")
            nats = measure(model, *sources[way], batch, "nats")
            out[f"nats {column} {way}"] = nats.mean().item()
        out[f"nats {way}"] = mean(out[f"nats {column} {way}"] for column in data.columns)
    return out


def measure_short_nats(s, model, size):
    """Cross-entropy without the phi of training."""
    return measure_nats(s, model, size, ("alone", "adapted"))


def measure_cover_nats(s, model, size):
    """Cross-entropy with masks that cover the prompt."""
    return measure_nats(s, model, size, ("cover",))


def measure_kept(s, model, size):
    """What theta has kept and what it has learned: retrieval and loss at once, without phi."""
    return (measure_retrieval(s, model, size, size.lengths[:2], ("alone",))
            | measure_nats(s, model, size, ("alone",)))


def measure_recall(s, model, size):
    """Closed book: share of answers right, by column and way, and its means."""
    data, out = ToyData("dictionary"), {}
    sources, ways = ways_to_write(s), ["alone"]
    if s.closed_book:
        paper = replace(s, trajectory="consistent", inner_lr=0.3)
        sources["paper's masks"] = paper, "prompt"
        ways += ["cover", "cover another", "paper's masks"]
    for way in ways:
        for column in data.columns:
            batch = data.tests(column, range(2 * size.samples), s.closed_book, "paper")
            right = measure(model, *sources[way], batch, "accuracy")
            out[f"recall {column} {way}"] = right.mean().item()
        out[f"recall {way}"] = mean(out[f"recall {column} {way}"] for column in data.columns)
    return out


def measure_needle(s, model, size):
    """Answers right by how deep in the prompt the asked pair stands, from dictionaries.

    Each way has a table [lengths][5 depths]: the first fifth of the prompt to the last.
    """
    out = {way: [] for way in ("alone", "cover" if s.closed_book else "adapted")}
    for length in (16, 32, 64) if s.closed_book else size.lengths:
        names = [f"paper dictionary {length} {i}" for i in range(3 * size.samples)]
        rep = 1 if length < 128 else None
        samples = [tasks.dictionary(random.Random(name), length, rep=rep) for name in names]
        batch = collate(samples, names, s.closed_book)
        # In `rest` the key stands right before its value, which is the answer.
        depth = torch.tensor([5 * sample.prompt.index(key) // len(sample.prompt)
                              for sample in samples
                              for key, is_asked in zip(sample.rest, sample.answer[1:]) if is_asked])
        for way in out:
            inner, source = ways_to_write(s)[way]
            phi = write_phi(model, inner, source, batch)
            right = mark_right(model, inner, batch, phi)[batch.maskable]
            out[way].append([right[depth == d].double().mean().item() for d in range(5)])
    return {f"needle {way}": table for way, table in out.items()}


# ---- Attention ----------------------------------------------------------------------------------

def measure_attention(s, model, size):
    """Where the gaps of an answer look, at 1, 2 and 4 times the trained length, without phi.

    "entropy x2" is how widely attention is spread, in nats: log n if it is even over n tokens, 0
    if it goes to one. "on needle x2" is its share on the asked pair, wherever the prompt states
    it. Both are means over layers, heads and gaps, at the first step of decoding, when all gaps
    are open. phi would change nothing here: it acts on the last feed-forward, above all attention.
    """
    out = {}
    for times, length in zip((1, 2, 4), size.lengths[1:]):
        names = [f"paper attention {length} {i}" for i in range(size.samples)]
        samples = [tasks.dictionary(random.Random(name), length) for name in names]
        batch = collate(samples, names, False)
        xt = torch.where(batch.maskable, model.backbone.mask_id, batch.x0)
        with torch.no_grad(), attention_of(model.backbone, batch.maskable) as weights:
            model.backbone.blocks(model.backbone.embed(xt), batch.valid, 0, None)
        entropy, share = summarise_attention(torch.stack(weights), find_needles(samples, batch))
        out[f"entropy x{times}"], out[f"on needle x{times}"] = entropy, share
    return out


def find_needles(samples, batch):
    """For each gap the places of its key and value in the prompt, [gaps, L] bool.

    The gap stands right behind its key. The prompt is key, value, key, value ...
    """
    rows = []
    for sample in samples:
        for key, is_gap in zip(sample.rest, sample.answer[1:]):
            if is_gap:
                places = [i for i in range(0, len(sample.prompt), 2) if sample.prompt[i] == key]
                row = torch.zeros(batch.x0.shape[1], dtype=torch.bool)
                row[places] = True
                rows.append(row | row.roll(1))
    return torch.stack(rows)


@contextmanager
def attention_of(backbone, where):
    """What a toy's layers attend to from the positions `where`, while it runs.

    Yields a list that gets a tensor [N, heads, L] from each layer. The blocks keep no weights, so
    they are computed again from the same queries and keys.
    """
    found = []

    def look(attention, inputs):
        h, mask = inputs
        B, L, D = h.shape
        q, k = (projection(h).view(B, L, attention.heads, -1).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj))
        angles = rotary(L, D // attention.heads, h.device)
        q, k = rotate(q, *angles), rotate(k, *angles)
        scores = q @ k.mT / q.shape[-1] ** 0.5  # [B, heads, L, L]
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        found.append(scores.softmax(-1).transpose(1, 2)[where])
    handles = [layer.attn.register_forward_pre_hook(look) for layer in backbone.layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def summarise_attention(weights, needle):
    """The mean entropy, and the mean share on the needle. weights [..., N, heads, L], needle [N, L]

    The entropy is -sum a log a over all tokens that can be seen.
    """
    entropy = -torch.xlogy(weights, weights).sum(-1)
    share = (weights * needle[:, None]).sum(-1)
    return entropy.mean().item(), share.mean().item()


# ---- Exposure bias and mask ratios --------------------------------------------------------------

def measure_exposure(s, model, size):
    """Exposure bias (Fig. 3) by way, at each mask ratio and as means without the first ratio.

    "cooled" is theta alone with its logits divided by 3. It is less confident, but it decodes the
    same tokens in the same order.
    """
    batch, out = held_out_batch(s, 2 * size.samples), {}
    head = model.backbone.lm_head.weight
    for way in ("alone", "adapted", "cooled"):
        inner, source = ways_to_write(s)["alone" if way == "cooled" else way]
        phi = write_phi(model, inner, source, batch)
        head.data.div_(3 if way == "cooled" else 1)
        losses = memdlm.exposure_bias(model.backbone, inner, batch.x0, batch.maskable, batch.valid,
                                      batch.seeds, RATIOS, phi)
        head.data.mul_(3 if way == "cooled" else 1)
        curves = {name: losses[name].mean(1) for name in ("static", "sequential", "matched")}
        out |= {f"exposure {name} {way}": curve.tolist() for name, curve in curves.items()}
        for key, other in (("ratio", "static"), ("ratio matched", "matched")):
            ratio = curves["sequential"] / curves[other]
            out[f"{key} {way}"] = ratio[1:].mean().item()
        out[f"static {way}"] = curves["static"][1:].mean().item()
    return out


def measure_bins(s, model, size):
    """Loss by mask ratio, also with the phi of training, which has seen the answers."""
    batch, out = held_out_batch(s, 2 * size.samples), {}
    u = memdlm.uniform(batch.seeds, "bins", batch.x0.shape[1])
    rank, n = memdlm.rank_of(batch.maskable, u), batch.maskable.sum(1)
    sources = {way: ways_to_write(s)[way] for way in ("alone", "adapted")}
    if s.memory:
        sources["answers"] = s, "answers"
    for way, (inner, source) in sources.items():
        curve = []
        for ratio in RATIOS:
            count = (n * ratio).round().clamp(min=1).long()
            masked = batch.maskable & (rank < count[:, None])
            xt = torch.where(masked, model.backbone.mask_id, batch.x0)
            t = torch.full((len(n),), ratio)
            phi = write_phi(model, inner, source, batch, t, xt, masked)
            nll = memdlm.response_nll(model.backbone, inner, batch.x0, masked, batch.valid, phi)
            curve.append((nll.sum(1) / masked.sum(1)).mean().item())
        out[f"bins {way}"] = curve
    return out


# ---- Inside the memory --------------------------------------------------------------------------

def measure_inner_loss(s, model, size):
    """The loss of each stage of adapting to a prompt, before its step and after."""
    s, batch, backbone = inference_settings(s), held_out_batch(s, 2 * size.samples), model.backbone
    x0, valid = batch.prompt, batch.prompt_valid
    path = memdlm.prompt_stages(backbone, s, x0, valid, batch.seeds)

    def lower(states):
        return [memdlm.lower_layers(backbone, s, x, valid) for x in states]

    before, after = [], []
    for k in range(len(path)):
        # The stage once more shows what its step did.
        walk = path[:k + 1] + [path[k]]
        phi = memdlm.fresh_phi(backbone, s, batch.seeds)
        _, record = memdlm.inner_loop(backbone, s, walk, x0, valid, lower, phi)
        losses = record["inner"].tolist()
        before.append(losses[-2])
        after.append(losses[-1])
    return {"inner before": before, "inner after": after}


def measure_where(s, model, size):
    """Where phi lives: the norm of its change to each matrix, where it may change all of them."""
    s = replace(inference_settings(s), layer_fraction=1.0, scope="ffn+attn")
    phi = write_phi(model, s, "prompt", held_out_batch(s, size.samples))
    change = {name: s.alpha / s.rank * (B @ A).flatten(1).norm(dim=1).mean().item()
              for name, (A, B) in phi.items()}
    return {"where names": list(change), "where": list(change.values())}


def measure_order(s, model, size):
    """The decoding step at which each position of the response is committed, by way."""
    batch, backbone, out = held_out_batch(s, 2 * size.samples), model.backbone, {}
    for way in ("alone", "cover"):
        inner, source = ways_to_write(s)[way]
        phi = write_phi(model, inner, source, batch)
        waited = torch.zeros(batch.x0.shape)  # [B, L], in steps
        for x in memdlm.denoise(backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds,
                                phi):
            waited += (x == backbone.mask_id) & batch.maskable
        out[f"order {way}"] = waited[batch.maskable].view(len(waited), -1).mean(0).tolist()
    return out


MEASURES = {
    "retrieval": measure_retrieval,
    "retrieval_own": measure_own_retrieval,
    "retrieval_plain": measure_plain_retrieval,
    "retrieval_short": measure_short_retrieval,
    "retrieval_further": measure_further_retrieval,
    "anchor_ratios": measure_anchor_ratios,
    "nats": measure_nats,
    "nats_short": measure_short_nats,
    "nats_cover": measure_cover_nats,
    "kept": measure_kept,
    "recall": measure_recall,
    "needle": measure_needle,
    "attention": measure_attention,
    "exposure": measure_exposure,
    "bins": measure_bins,
    "inner": measure_inner_loss,
    "where": measure_where,
    "order": measure_order,
}


def read_training_curve(folder):
    """Cross-entropy per masked token in training, with memory ("curve") and without ("alone").

    "train" is the mean over the last quarter of the logged steps.
    """
    lines, _ = read_metrics(folder)
    trained = [line["ce"] for line in lines]
    alone = [line.get("ce_without", line["ce"]) for line in lines]
    half, quarter = len(lines) // 2, -(-len(lines) // 4)
    return {"curve steps": [line["step"] for line in lines],
            "curve": trained, "curve alone": alone,
            "train": mean(trained[-quarter:]), "train alone": mean(alone[-quarter:]),
            "train alone, first half": mean(alone[:half or 1])}
