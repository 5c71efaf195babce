"""What a cache and a threshold change: decoding.py against denoising by hand."""
from pathlib import Path

import pytest
import torch

import bench
import decoding
import memdlm
from backbones.block_diffusion import block_diffusion
from data import Sample, collate
from generate import count_right
from runs import open_run
from settings import Settings
from tiny_models import all_logits, random_batch, tiny_backbone

TOY = Path(__file__).parent.parent / "toy" / "trained"


def random_samples(count, new):
    """Prompts of 5 random tokens, and `new` more."""
    rows = random_batch([5 + new] * count).x0.tolist()
    return [Sample(row[:5], row[5:], [True] * new) for row in rows]


def test_the_exact_way_and_the_work_by_hand():
    """40 tokens after 5 in blocks of 32 and 8: the first look at a block sees all 45."""
    backbone, samples = tiny_backbone("smollm2"), random_samples(2, 40)
    rows, _ = decoding.measure_ways(Settings(), backbone, samples)
    assert list(rows) == list(decoding.WAYS) and rows["exact"]["unlike"] == 0
    assert rows["exact"]["forwards"] == rows["cache"]["forwards"] == 40
    assert rows["exact"]["positions"] == 40 * 45
    assert rows["cache"]["positions"] == 45 + 31 * 32 + 45 + 7 * 8
    right = 0
    for number, sample in enumerate(samples):
        batch = collate([sample], [f"decoding {number}"], False)
        *_, canvas = memdlm.denoise(backbone, Settings(), batch.x0, batch.maskable, batch.valid,
                                    batch.seeds, block_length=32)
        right += int((canvas == batch.x0)[:, 5:].sum())
    assert rows["exact"]["right"] == pytest.approx(right / 80)


def test_shares_by_hand(monkeypatch):
    """The exact way has one token of four wrong; the threshold .9 has another two wrong."""
    def decoder(backbone, s, x, fill, valid, seeds, phi, threshold, **rest):
        x = x.clone()
        for place in {1.0: [5], 0.9: [6, 7]}.get(threshold, []):
            x[:, place] += 1
        yield x
    backbone = tiny_backbone("smollm2")
    monkeypatch.setattr(memdlm, "denoise", decoder)
    backbone.decoder = decoder
    rows, _ = decoding.measure_ways(Settings(), backbone, random_samples(1, 4))
    assert [rows[name]["right"] for name in ("exact", "exact, .9", "cache, .7")] == [0.75, 0.5, 1]
    assert [rows[name]["unlike"] for name in ("exact", "exact, .9", "cache, .7")] == [0, 0.75, 0.25]


def test_nats_predict_each_token_once_from_the_other_half():
    backbone, (sample,) = tiny_backbone("smollm2"), random_samples(1, 7)
    batch, total = collate([sample], ["a"], False), 0.0
    rank = memdlm.rank_of(batch.maskable, memdlm.uniform(["a"], "halves", 12))
    for half in (0, 1):
        masked = batch.maskable & (rank % 2 == half)
        x = batch.x0.masked_fill(masked, backbone.mask_id)
        log_p = all_logits(backbone, x, batch.valid).log_softmax(-1)
        total -= float(log_p.gather(-1, batch.x0[..., None])[..., 0][masked].sum())
    assert decoding.own_nats(backbone, Settings(), batch, batch.x0, None) == pytest.approx(
        total, rel=1e-4)


def test_a_toy_answers_from_memory_as_generate_does():
    s, backbone, samples = decoding.open_samples(TOY, None, None, {}, 20, 1)
    with torch.no_grad():
        rows, _ = decoding.measure_ways(s, backbone, samples)
    _, data, model = open_run(TOY)
    right = sum(count_right(s, data, model, samples, True, {}))
    assert rows["exact"]["right"] == pytest.approx(right / sum(sum(x.answer) for x in samples))
    assert not any("cache" in name for name in rows) and rows["exact"]["right"] > 0.5


def test_models_that_keep_blocks_decode_without_this_cache():
    backbone = tiny_backbone("llada2.1-mini")
    assert backbone.decoder is block_diffusion
    assert decoding.ways_of(backbone)["exact"] == dict(threshold=1.0)
    assert len(decoding.ways_of(backbone)) == 4


@pytest.mark.parametrize("flags, says", [
    (["--run", "r"], "are for --decoding"), (["--decoding", "--model", "m"], "with --data FILE"),
    (["--decoding", "--run", "r", "--model", "m"], "takes --run FOLDER"),
    (["--decoding", "--run", "r", "--lr", "1"], "--lr is not for --decoding"),
    (["--decoding", "--run", "r"], "not a run folder"), (["--samples", "0"], "at least 1"),
    (["--model", "llada-mo"], "did you mean llada-moe?")])
def test_flags_that_do_not_fit_are_refused(cli, flags, says):
    code, _, err = cli(bench, *flags)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1
