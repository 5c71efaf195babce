"""What a block cache and a threshold change in a model's answers, and what they save.

    python bench.py --decoding --run RUN
    python bench.py --decoding --model FOLDER --data FILE

Answers to held-out prompts are decoded in each way of WAYS, one at a time. The first way is exact:
one token per forward pass, and each pass computes all positions anew. The others are compared with
it and with the true response:

    unlike      share of answer tokens that the exact way has otherwise
    right       share of answer tokens that the true response has, too
    nats        how improbable the model itself finds the answer, per token; see `own_nats`
    forwards    passes through the layers, per answer
    positions   tokens that the layers see in them, per answer

Where many answers do, as in real text, `right` is low for all ways. Then `nats` tells whether a
way's other answers are worse, but with care: a model finds it probable to repeat itself.
"""
from __future__ import annotations

import time

import torch

import memdlm
from backbones.block_cache import BLOCK_LENGTH, BlockCache, check_cache
from data import Sample, collate, read_data
from memory import write_memory
from runs import open_model, open_run, read_settings

WAYS = {"exact": {}, "exact, .95": dict(threshold=0.95), "exact, .9": dict(threshold=0.9),
        "exact, .7": dict(threshold=0.7), "cache": dict(make_look=BlockCache)}
WAYS |= {name.replace("exact", "cache"): way | WAYS["cache"]
         for name, way in WAYS.items() if "threshold" in way}


# ---- A model and its samples --------------------------------------------------------------------

def open_samples(run, model, file, changes, count, new):
    """A trained run, or a model with a file of data -> settings, backbone, at most `count` samples.

    A run is asked what was held out of its data; a model, the records of the file. Answers of a
    real model are cut to `new` tokens. Those of a toy stay whole.
    """
    if model:
        from backbones.text import ChatData, chat_turns
        s, _, opened = open_model(None, model, changes)
        records, bad = read_data(file, chat_turns)
        data = ChatData(opened.backbone, records, s.max_length, True, where=file, bad=bad)
        samples = (data.pairs["test"] + data.pairs["train"])[:count]
    else:
        with_data = read_settings(run).model != "toy"
        s, data, opened = open_run(run, with_data=with_data, **changes)
        column = list(data.columns)[len(data.columns) // 2]
        samples = [data.test(column, "decoding", number)
                   for number in range(data.count_tests(count))]
    if s.model != "toy":
        samples = [cut_answer(sample, new) for sample in samples]
    return s, opened.backbone, samples


def cut_answer(sample, new):
    """A sample up to the token `new` of its answer."""
    stop = [i for i, gap in enumerate(sample.answer) if gap][:new][-1] + 1
    return Sample(sample.prompt, sample.rest[:stop], sample.answer[:stop])


# ---- Decoding in every way ----------------------------------------------------------------------

def ways_of(backbone):
    """{name: the decoder's options} of the ways in which a model can decode.

    With a cache the exact way decodes in its blocks, too. So all ways fill them in one order.
    """
    try:
        check_cache(backbone)
    except ValueError:
        return {name: dict(threshold=1.0) | way for name, way in WAYS.items()
                if "make_look" not in way}
    return {name: dict(threshold=1.0, block_length=BLOCK_LENGTH) | way
            for name, way in WAYS.items()}


def count_forwards(backbone, work):
    """How many tokens the layers see in each forward pass of a piece of work, as a list."""
    sizes = []
    table = backbone.part("embed") if hasattr(backbone, "part") else backbone.embedding
    handle = table.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].numel()))
    try:
        work()
    finally:
        handle.remove()
    return sizes


def decode(backbone, s, batch, phi=None, **options):
    """Decode all maskable positions of a batch. Returns the last canvas [B, L]."""
    canvas = batch.x0
    for canvas in backbone.decoder(backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds,
                                   phi, **options):
        pass
    return canvas


def own_nats(backbone, s, batch, canvas, phi):
    """-log p of the answer on a canvas, summed over its tokens, by the model itself.

    The answer is split in halves at random. Each token is predicted from the prompt and the other
    half. The halves are the same for every canvas.
    """
    u = memdlm.uniform(batch.seeds, "halves", batch.x0.shape[1])
    odd = memdlm.rank_of(batch.maskable, u) % 2 == 1
    halves = [half for half in (batch.maskable & odd, batch.maskable & ~odd) if half.any()]
    return sum(float(memdlm.response_nll(backbone, s, canvas, half, batch.valid, phi).sum())
               for half in halves)


def measure_ways(s, backbone, samples):
    """{way: its row, a dict}, and the nats of the true responses."""
    batches = [collate([sample], [f"decoding {number}"], s.closed_book)
               for number, sample in enumerate(samples)]
    phis = [write_memory(s, backbone, batch) if s.closed_book else None for batch in batches]
    count, rows, exact = sum(int(batch.maskable.sum()) for batch in batches), {}, None

    def nats_of(canvases):
        return sum(own_nats(backbone, s, batch, canvas, phi)
                   for batch, canvas, phi in zip(batches, canvases, phis)) / count

    def share_like(canvases, others):
        return sum(int(((a == b) & batch.maskable).sum())
                   for a, b, batch in zip(canvases, others, batches)) / count

    truth = [batch.x0 for batch in batches]
    for name, options in ways_of(backbone).items():
        done, begin = [], time.process_time()
        sizes = count_forwards(backbone, lambda: done.extend(
            decode(backbone, s, batch, phi, **options) for batch, phi in zip(batches, phis)))
        seconds = time.process_time() - begin
        exact = exact or done  # the first way
        rows[name] = {
            "unlike": 1 - share_like(done, exact), "right": share_like(done, truth),
            "nats": nats_of(done), "forwards": len(sizes) / len(batches),
            "positions": sum(sizes) / len(batches), "seconds_per_token": seconds / count}
    return rows, nats_of(truth)


@torch.no_grad()
def measure_model(run, model, file, changes, count, new):
    """What bench.py writes of one model: the rows, and what they were measured on."""
    s, backbone, samples = open_samples(run, model, file, changes, count, new)
    rows, true_nats = measure_ways(s, backbone, samples)
    tokens = sum(sum(sample.answer) for sample in samples)
    return {"model": str(run or model), "answers": len(samples), "tokens": tokens, "ways": rows,
            "true_nats": true_nats}


def table_of(result):
    """The rows of a printed table, the head first."""
    head = f"{result['answers']} answers, {result['tokens']:,} tokens"
    out = [(head, "unlike exact", "right", "nats", "forwards", "positions", "CPU s / token")]
    for name, row in result["ways"].items():
        out.append((name, f"{row['unlike']:.3f}", f"{row['right']:.3f}", f"{row['nats']:.3f}",
                    f"{row['forwards']:.1f}", f"{row['positions']:,.0f}",
                    f"{row['seconds_per_token']:.4f}"))
    return out + [("true response", "", "1.000", f"{result['true_nats']:.3f}", "", "", "")]
