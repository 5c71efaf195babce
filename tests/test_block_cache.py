"""The block cache, decoding by a threshold, and the early stop."""
from argparse import Namespace

import pytest
import torch

import bench
import decoding
import generate
import memdlm
from backbones.block_cache import BLOCK_LENGTH, BlockCache, places_of
from backbones.families import FAMILIES, TINY, translate
from data import Sample
from settings import Settings
from test_generate import USUAL
from test_memdlm import MASK, V, Table, decode, list_commits, make_batch, random_table
from tiny_models import all_logits, one_sample, random_batch, tiny_backbone

BOTH_WAYS = [name for name in TINY
             if FAMILIES[translate(TINY[name]).family].decoder is memdlm.denoise]
# Each run has a dense model, one with experts and one whose logits are shifted.
FAMILIES_RUN = [pytest.param(name, marks=[] if name in ("llada-8b", "llada-moe", "dream-7b")
                             else [pytest.mark.slow]) for name in BOTH_WAYS]
PHI = Settings(layer_fraction=0.5, rank=4, alpha=8.0)


class RefreshAlways(BlockCache):
    """Every look is taken for the first of its block."""

    def __call__(self, x, where, window, k):
        return super().__call__(x, where, window, 0)


def ragged_batch(backbone, adapted, seed=0):
    """Three rows of different lengths and prompts: the batch, its gaps, and phi."""
    batch, phi = random_batch([45, 30, 60], seed=seed), None
    fill = batch.valid & (torch.arange(60) >= torch.tensor([[20], [3], [51]]))
    fill[0, 25:28] = False  # words that are given, between the gaps
    if adapted:
        phi, _ = memdlm.adapt(backbone, PHI, batch.x0, batch.valid & ~fill, batch.seeds)
    return batch, fill, phi


def run(backbone, batch, fill, phi=None, **options):
    return list(memdlm.denoise(backbone, PHI, batch.x0, fill, batch.valid, batch.seeds, phi,
                               **options))


@pytest.mark.parametrize("adapted", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", FAMILIES_RUN)
def test_a_cache_that_is_always_refreshed_is_exact(name, adapted):
    backbone = tiny_backbone(name)
    batch, fill, phi = ragged_batch(backbone, adapted)
    for options in ({}, {"block_length": 8}, {"block_length": 7, "threshold": 0.03},
                    {"block_length": 8, "cfg_scale": 1.0}, {"block_length": 8, "steps": 9}):
        exact = run(backbone, batch, fill, phi, **options)
        cached = run(backbone, batch, fill, phi, make_look=RefreshAlways, **options)
        assert len(exact) == len(cached)
        assert all(torch.equal(a, b) for a, b in zip(exact, cached))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["full", "causal:1"])
@pytest.mark.parametrize("name", FAMILIES_RUN)
def test_a_later_look_at_an_unchanged_canvas_is_the_first(name, attention):
    """Nothing is stale then: also where lower layers look left, and where logits are shifted."""
    backbone = tiny_backbone(name, attention=attention)
    batch, fill, phi = ragged_batch(backbone, True)
    x = torch.where(fill, backbone.mask_id, batch.x0)
    window = fill & (fill.cumsum(1) <= 12)
    where = window & (fill.cumsum(1) % 3 > 0)
    look = BlockCache(backbone, PHI, batch.valid, phi)
    expected = memdlm.look_at_all(backbone, PHI, batch.valid, phi)(x, where, window, 0)
    for k in range(3):
        torch.testing.assert_close(look(x, where, window, k), expected, rtol=1e-4, atol=1e-4)


def rotate_by_hand(x, positions, theta):
    """x [heads, n, dim]: pairs (i, i + dim / 2) turned by position * theta ** (-2 i / dim)."""
    half = x.shape[-1] // 2
    angle = positions[:, None].float() * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def naive_look(backbone, stale, now, window):
    """Logits [L, V] of one row of LLaDA-8B, written out: what stands outside the block is stale.

    Two streams run through the layers. One is the whole canvas as it was at the block's first
    look. The other is the block as it is now, which reads the other's keys and values elsewhere.
    """
    c, everywhere = backbone.config, torch.arange(len(stale))
    old, new = backbone.embed(stale), backbone.embed(now)  # [L, D]

    def heads(matrix, x):
        return matrix(x).unflatten(-1, (-1, c.head_dim)).transpose(0, 1)  # [heads, L, dim]

    def attend(block, h, other):
        """Of h [L, D] on itself inside the window and on `other` outside of it."""
        x, y = block.attn_norm(h), block.attn_norm(other)
        q = rotate_by_hand(heads(block.q_proj, x), everywhere, c.rope_theta)
        seen = torch.where(window[:, None], x, y)
        k = rotate_by_hand(heads(block.k_proj, seen), everywhere, c.rope_theta)
        v, share = heads(block.v_proj, seen), c.heads // c.kv_heads
        k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
        weights = (q @ k.mT / c.head_dim ** 0.5).softmax(-1)
        return h + block.attn_out((weights @ v).transpose(0, 1).flatten(1))

    for block in backbone.part("layers"):
        new, old = attend(block, new, old), attend(block, old, old)
        new, old = (h + block.feed_forward(block.ff_norm(h)) for h in (new, old))
    return backbone.head(new)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [1.0, 0.045])
def test_the_cache_against_stale_keys_and_values_by_hand(threshold):
    """One row, and every look of it computed from the canvas at its block's beginning."""
    backbone, size = tiny_backbone("llada-8b"), 8
    batch = one_sample(random_batch([40], prompt=13), 0)
    fill = batch.maskable
    canvases = run(backbone, batch, fill, block_length=size, threshold=threshold,
                   make_look=BlockCache)
    x, expected = torch.where(fill, backbone.mask_id, batch.x0)[0], []
    for start in range(13, 40, size):
        window = (torch.arange(40) >= start) & (torch.arange(40) < start + size)
        stale = x.clone()
        while (gaps := window & (x == backbone.mask_id)).any():
            logits = naive_look(backbone, stale, x, window).double()
            logits[:, backbone.mask_id] = -torch.inf
            p, token = logits.softmax(-1).max(-1)
            p = torch.where(gaps, p, -1.0)
            commit = gaps & ((p > threshold) | (torch.arange(40) == p.argmax()))
            x = torch.where(commit, token, x)
            expected.append(x)
    assert len(canvases) == len(expected) and (len(expected) < 27) == (threshold < 1)
    assert all(torch.equal(a[0], b) for a, b in zip(canvases, expected))
    exact = run(backbone, batch, fill, block_length=size, threshold=threshold)
    assert not torch.equal(exact[-1], canvases[-1])  # or this test would not tell them apart


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", FAMILIES_RUN)
def test_a_batch_with_a_cache_is_its_samples(name, adapted):
    """Rows of different lengths, whose blocks stand in different places."""
    backbone = tiny_backbone(name)
    batch, fill, phi = ragged_batch(backbone, adapted)
    options = dict(block_length=6, threshold=0.03, make_look=BlockCache, temperature=0.5)
    together = run(backbone, batch, fill, phi, **options)[-1]
    for b in range(3):
        one, own = one_sample(batch, b), None
        if adapted:
            own = {key: tuple(w[b:b + 1] for w in pair) for key, pair in phi.items()}
        row = slice(b, b + 1), slice(0, one.x0.shape[1])
        assert torch.equal(run(backbone, one, fill[row], own, **options)[-1], together[row])


def test_what_is_computed_with_a_cache():
    """All positions at a block's first look, then those of the block, and phi is gone between."""
    backbone, batch = tiny_backbone("llada-8b"), random_batch([40], prompt=20)
    phi, _ = memdlm.adapt(backbone, PHI, batch.x0, batch.valid, [0])
    plain, seen = all_logits(backbone, batch.x0, batch.valid), []
    handle = backbone.part("embed").register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[1]))
    for number, _ in enumerate(memdlm.denoise(
            backbone, PHI, batch.x0, batch.maskable, batch.valid, [0], phi, block_length=10,
            steps=6, make_look=BlockCache)):
        if number == 1:
            now = all_logits(backbone, batch.x0, batch.valid)
            assert seen.pop() == 40 and torch.equal(plain, now)
    handle.remove()
    assert seen == [40, 10, 10] * 2


def test_guidance_has_a_cache_of_its_own():
    """What is blind to the prompt never reads keys and values of the prompt."""
    backbone, batch, seen = tiny_backbone("llada-8b"), random_batch([20], prompt=5), []

    class Watched(BlockCache):
        def __call__(self, x, where, window, k):
            seen.append((self, int(x[0, 0]), k))
            return super().__call__(x, where, window, k)

    run(backbone, batch, batch.maskable, block_length=5, cfg_scale=1.0, make_look=Watched)
    caches = {look for look, _, _ in seen}
    first = {token for _, token, _ in seen}
    assert len(caches) == 2 and first == {int(batch.x0[0, 0]), backbone.mask_id}
    for cache in caches:
        tokens, looks = zip(*[(token, k) for look, token, k in seen if look is cache])
        assert len({*tokens}) == 1 and looks == tuple(range(5)) * 3


def test_places_of_rows_with_fewer_gaps():
    window = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    places, own = places_of(window)
    assert places.tolist() == [[1, 3, 4], [2, 2, 2], [0, 0, 0]]
    assert own.tolist() == [[True] * 3, [True, False, False], [False] * 3]


# ---- Threshold and early stop -------------------------------------------------------------------

def table_of(tokens, probabilities):
    """Logits [L, V] under which each position has a token of a given probability."""
    logits = torch.zeros(len(tokens), V)
    logits[:, MASK] = -1e4
    for row, token, p in zip(logits, tokens, probabilities):
        row[token] = torch.log(torch.tensor(p / (1 - p) * (V - 2)))
    return logits


def test_a_threshold_by_hand():
    """Surer than .7 is committed at once; otherwise the schedule's one, the surest."""
    table = Table(table_of([1, 2, 3, 1, 2, 3], [0.5, 0.9, 0.6, 0.8, 0.75, 0.65]))
    batch = random_batch([6], prompt=0)
    steps = dict(threshold=0.7), [{1, 3, 4}, {5}, {2}, {0}]
    halves = dict(threshold=0.7, block_length=3), [{1}, {2}, {0}, {3, 4}, {5}]
    # Two per look by the schedule: 5 and 4 of the second half are sure already.
    scheduled = dict(threshold=0.7, steps=2), [{1, 3, 4}, {0, 2, 5}]
    low = dict(threshold=0.1), [{0, 1, 2, 3, 4, 5}]
    for options, commits in (steps, halves, scheduled, low):
        done = list_commits(decode(table, batch, **options))
        assert [step[0] for step in done] == commits
    assert decode(table, batch, threshold=0.1)[-1].tolist() == [[1, 2, 3, 1, 2, 3]]


@pytest.mark.parametrize("threshold", [1.0, 1.5])
def test_a_threshold_that_nothing_exceeds_is_the_schedule(threshold):
    table, batch = Table(300 * random_table(15)), make_batch()  # 1.0 to the last bit, many
    for options in ({}, {"steps": 4}, {"block_length": 3, "steps": 9}, {"remasking": "random"}):
        plain = decode(table, batch, **options)
        other = decode(table, batch, threshold=threshold, **options)
        assert len(plain) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(plain, other))


def test_the_threshold_of_a_row_does_not_hang_on_the_batch():
    """A short row has had its looks while a long one still needs some."""
    backbone = tiny_backbone("llada-8b")
    batch, fill, _ = ragged_batch(backbone, False)
    for steps in (None, 3):
        together = run(backbone, batch, fill, steps=steps, threshold=0.03, block_length=60)[-1]
        for b in range(3):
            one = one_sample(batch, b)
            row = slice(b, b + 1), slice(0, one.x0.shape[1])
            alone = run(backbone, one, fill[row], steps=steps, threshold=0.03, block_length=60)
            assert torch.equal(alone[-1], together[row])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", FAMILIES_RUN)
def test_an_early_stop_changes_nothing_up_to_the_end(name, cached):
    """Any token may end a row here, so that every row ends somewhere."""
    backbone, shorter = tiny_backbone(name), 0
    options = dict(block_length=8, make_look=BlockCache if cached else memdlm.look_at_all)
    for seed in range(3):
        batch, fill, phi = ragged_batch(backbone, True, seed)
        whole = run(backbone, batch, fill, phi, **options)
        stops = [int(whole[-1][0, 30]), int(whole[-1][1, 9])]
        early = run(backbone, batch, fill, phi, stop_ids=stops, **options)
        shorter += len(early) < len(whole)
        for a, b, gaps in zip(whole[-1], early[-1], fill):
            a, b = a[gaps].tolist(), b[gaps].tolist()
            end = min((a.index(stop) for stop in stops if stop in a), default=len(a))
            assert a[:end + 1] == b[:end + 1] and backbone.mask_id not in b
    assert shorter


def test_a_sample_stops_when_all_before_its_end_is_filled():
    """The end is the surest token, at the third gap of six. What stands before it comes next."""
    table = Table(table_of([1, 2, 4, 1, 2, 3], [0.5, 0.6, 0.9, 0.4, 0.45, 0.8]))
    canvases = decode(table, random_batch([6], prompt=0), stop_ids=[4])
    assert [step[0] for step in list_commits(canvases)] == [{2}, {5}, {1}, {0, 3, 4}]
    assert canvases[-1].tolist() == [[1, 2, 4, 4, 4, 3]]


# ---- Flags --------------------------------------------------------------------------------------

def options_for(backbone, **flags):
    return generate.decoder_options(Namespace(**USUAL | flags), Namespace(backbone=backbone))


def test_flags_of_the_cache_and_the_threshold():
    backbone = tiny_backbone("llada-8b")
    assert "make_look" not in options_for(backbone) and "threshold" not in options_for(backbone)
    options = options_for(backbone, cache="block", threshold=0.9)
    assert options["make_look"] is BlockCache and options["threshold"] == 0.9
    assert options["block_length"] == BLOCK_LENGTH == 32
    assert options_for(backbone, cache="block", block_length=8)["block_length"] == 8
    toy = Table(random_table(3))
    toy.decoder, toy.title = memdlm.denoise, "toy"
    for who, flags, message in (
            (tiny_backbone("llada2.1-mini"), dict(cache="block"), "always keeps"),
            (toy, dict(cache="block"), "small enough to decode exactly"),
            (backbone, dict(threshold=0.9, remasking="random"), "give one of them")):
        with pytest.raises(ValueError, match=message):
            options_for(who, **flags)


def test_generate_stops_a_reply_at_its_end_but_not_a_question(monkeypatch):
    """Gaps between given words are answers of their own: none of them ends the others."""
    backbone, told = tiny_backbone("llada-8b"), []

    def decoder(backbone, s, x, fill, valid, seeds, phi, **options):
        told.append(options.get("stop_ids"))
        yield x
    monkeypatch.setattr(memdlm, "denoise", decoder)
    backbone.decoder = decoder
    tokenizer = Namespace(stop_ids=[7, 9], decode=str)
    reply, question = Sample([1], [0, 0], [True, True]), Sample([1], [0, 0], [False, True])
    for samples in ([reply, reply], [reply, question]):
        generate.answer(PHI, Namespace(tokenizer=tokenizer), Namespace(backbone=backbone),
                        samples, None, 0)
    assert told == [[7, 9], None]


# ---- The model that shows what the cache changes ------------------------------------------------

def test_the_language_of_the_measurement():
    """Its texts are right by its own rule; other texts are not; the first way is the exact one."""
    language = bench.Language()
    batch = language.batch(0, 4, 96)
    assert batch.x0.shape == (4, 192) and language.share_right(batch.x0, 96) == 1
    assert batch.maskable.sum() == 4 * 96 and not batch.maskable[:, :96].any()
    wrong = batch.x0.clone()
    wrong[:, 150:] = (wrong[:, 150:] + 1) % 12
    wrong[:, 155::5] = language.space
    assert language.share_right(wrong, 96) < 0.8
    assert list(decoding.WAYS)[0] == "exact" and not decoding.WAYS["exact"]
    assert len(decoding.WAYS) == 8 and decoding.WAYS["cache, .7"]["threshold"] == 0.7


@pytest.mark.slow
def test_the_measurement_runs():
    rows = bench.measure_trade_off(2, 1)
    assert rows["exact"]["differ"] == 0 and rows["exact"]["looks"] == 96
    assert rows["exact"]["positions"] == 96 * 192
    assert rows["cache"]["positions"] == 3 * (192 + 31 * 32)
