"""Block-causal attention and block diffusion."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import memdlm
from backbones.backbone import Backbone
from backbones.block_diffusion import MODES, block_diffusion
from backbones.checkpoint import load_backbone
from settings import Settings
from tiny_models import EACH, all_logits, one_sample, random_batch, tiny_backbone


def test_block_causal_attention_against_a_mask_by_hand():
    """A token sees its own block of 32 and those before it. Nobody sees padding."""
    backbone = tiny_backbone("llada2.1-mini", attention="block")
    valid = torch.arange(70)[None] < torch.tensor([[70], [40]])
    mask = backbone.mask(valid, torch.zeros(2, 70, 1), None)
    for b in range(2):
        for q in range(70):
            for k in range(70):
                assert bool(mask[b, 0, q, k]) == (k // 32 <= q // 32 and bool(valid[b, k]))
    batch = random_batch([70])
    changed = batch.x0.clone()
    changed[0, 64:] = 7
    a, b = (all_logits(backbone, x, batch.valid) for x in (batch.x0, changed))
    torch.testing.assert_close(a[:, :64], b[:, :64])
    assert not torch.allclose(a[:, 64:], b[:, 64:])
    with pytest.raises(ValueError, match="--attention block is for LLaDA2.x"):
        tiny_backbone("llada-moe", attention="block")


def naive_block_diffusion(backbone, s, x, fill, phi, threshold, edit_threshold, extra_steps=16,
                          eos=True):
    """Decode one row and compute everything anew at every step, with the block-causal mask.

    This is written from the description of the decoder.
    """
    backbone.attention = "block"
    n, width = x.shape[1], -(-x.shape[1] // 32) * 32
    prompt = int((~fill).sum())
    canvas = torch.full((1, width), backbone.mask_id)
    canvas[0, :prompt] = x[0, :prompt]
    everything = torch.ones(1, width, dtype=torch.bool)
    for start in range(prompt // 32 * 32, width, 32):
        positions, looks = [i for i in range(start, start + 32) if i >= prompt], 0
        seen = slice(0, start + 32)
        while True:
            masks = [i for i in positions if canvas[0, i] == backbone.mask_id]
            if not masks and (edit_threshold is None or looks >= extra_steps):
                break
            looks += not masks
            out = all_logits(backbone, canvas[:, seen], everything[:, seen], phi, s)[0].double()
            out[:, backbone.mask_id] = -math.inf
            p, best = out.softmax(-1).max(-1)
            commit = [i for i in masks if p[i] > threshold]
            if masks and not commit:
                commit = [max(masks, key=lambda i: p[i])]
            edits = []
            if edit_threshold is not None:
                edits = [i for i in positions if i not in masks
                         and best[i] != canvas[0, i] and p[i] > edit_threshold]
            for i in [*commit, *edits]:
                canvas[0, i] = best[i]
            if not masks and not edits:
                break
        if any(canvas[0, i] == backbone.config.eos_id for i in positions):
            canvas[0, start + 32:] = backbone.config.eos_id
            break
    backbone.attention = "full"
    return canvas[:, :n]


SLOW_CASES = [(0.95, None, False), (0.95, None, True), (0.2, None, True), (0.2, 0.0, False),
              (0.3, 0.25, False), (0.3, 0.25, True)]


@pytest.mark.parametrize("threshold, edit, adapted", [
    (0.2, 0.0, True),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)])
def test_block_diffusion_with_its_cache_equals_recomputing_everything(threshold, edit, adapted):
    """Rows of different lengths are decoded together, and each alone without a cache."""
    backbone, s = tiny_backbone("llada2.1-mini"), Settings(layer_fraction=0.5, rank=4, alpha=8.0)
    for seed in range(2):
        batch = random_batch([70, 40, 85], seed=seed)
        prompts = torch.tensor([[37], [3], [64]])
        fill = batch.valid & (torch.arange(85) >= prompts)
        given, phi, own = batch.valid & ~fill, None, None
        if adapted:
            phi, _ = memdlm.adapt(backbone, s, batch.x0, given, batch.seeds)
        *_, out = block_diffusion(backbone, s, batch.x0, fill, batch.valid, batch.seeds, phi,
                                  threshold, edit)
        assert (out[fill] != backbone.mask_id).all()
        assert torch.equal(out[given], batch.x0[given])
        for b in range(3):
            one = one_sample(batch, b)
            row = slice(b, b + 1), slice(0, one.x0.shape[1])
            if adapted:
                own = {name: (A[b:b + 1], B[b:b + 1]) for name, (A, B) in phi.items()}
            expected = naive_block_diffusion(backbone, s, one.x0, fill[row], own, threshold, edit)
            assert torch.equal(out[row], expected)


def test_phi_is_gone_while_decoding_pauses():
    backbone, batch = tiny_backbone("llada2.1-mini"), random_batch([70])
    plain = all_logits(backbone, batch.x0, batch.valid)
    phi, _ = memdlm.adapt(backbone, Settings(), batch.x0, batch.valid, [0])
    fill = torch.arange(70)[None] >= 20
    steps = block_diffusion(backbone, Settings(), batch.x0, fill, batch.valid, [0], phi)
    next(steps)
    assert torch.equal(plain, all_logits(backbone, batch.x0, batch.valid))


@pytest.mark.parametrize("stop", [0, 1])
def test_a_row_ends_with_its_turn_or_its_text(tiny_models, stop):
    """The places that it did not need are filled with the end of text."""
    loaded = load_backbone(str(tiny_models / "llada2.1-mini"))
    token = loaded.tokenizer.stop_ids[stop]

    class Says(Backbone):
        looks = 0

        def head(self, h):
            self.looks += 1
            return 9.0 * F.one_hot(torch.full(h.shape[:-1], token), self.vocab_size)

    backbone = Says(loaded.network, loaded.config, loaded.tokenizer)
    x, fill = torch.ones(1, 300, dtype=torch.long), torch.arange(300)[None] >= 10
    for canvas in block_diffusion(backbone, Settings(), x, fill, torch.ones_like(fill), [0]):
        pass
    assert backbone.looks == 1
    assert (canvas[0, 10:32] == token).all() and (canvas[0, 32:] == loaded.config.eos_id).all()


def test_steps_per_block_share_the_block():
    backbone, batch = tiny_backbone("llada2.1-mini"), random_batch([64])
    fill = torch.arange(64)[None] >= 32
    backbone.config = replace(backbone.config, eos_ids=(319,))
    for steps in (1, 5, 10, 20, 24, 32, 40):
        canvases = list(block_diffusion(backbone, Settings(), batch.x0, fill, batch.valid, [0],
                                        threshold=1.0, steps=steps))
        assert len(canvases) == min(steps, 32)
        taken = [int((a != b).sum()) for a, b in zip(canvases, canvases[1:])]
        assert not taken or max(taken) - min(taken) <= 1


class Stubborn(Backbone):
    """Its head prefers the mask token everywhere. The second best changes at every look."""
    looks = 0

    def head(self, h):
        self.looks += 1
        out = torch.zeros(*h.shape[:-1], self.vocab_size)
        out[..., self.mask_id] = 50
        out[..., 10 + self.looks % 2] = 20
        return out


@pytest.mark.parametrize("edit", [None, 0.0])
def test_block_diffusion_is_bounded_and_never_writes_a_mask(edit):
    model = tiny_backbone("llada2.1-mini")
    backbone, batch = Stubborn(model.network, model.config), random_batch([70])
    fill = torch.arange(70)[None] >= 5
    for canvas in block_diffusion(backbone, Settings(), batch.x0, fill, batch.valid, [0],
                                  threshold=0.95, edit_threshold=edit):
        pass
    assert (canvas != backbone.mask_id).all() and backbone.looks <= 3 * (32 + 16)


def test_cached_decoding_computes_few_positions():
    """Each new token costs at most 33 positions, and the prompt is computed once.

    If nothing is sure, a block takes 32 steps of 32 positions, and one pass more to keep it.
    """
    backbone, computed = tiny_backbone("llada2.1-mini"), []
    embed = backbone.embed

    def count_and_embed(ids):
        computed.append(ids.shape[1])
        return embed(ids)

    backbone.embed = count_and_embed
    batch = random_batch([256 + 64])
    fill = torch.arange(320)[None] >= 256
    backbone.config = replace(backbone.config, eos_ids=(319,))  # never said
    for _ in block_diffusion(backbone, Settings(), batch.x0, fill, batch.valid, [0], threshold=1.0):
        pass
    assert sum(computed) <= 256 + 33 * 64 and computed[0] == 256


@pytest.mark.parametrize("name", EACH)
def test_temperature_is_seeded_and_different_seeds_differ(name):
    backbone, batch = tiny_backbone(name), random_batch([40])
    fill = torch.arange(40)[None] >= 10

    def run(seed):
        for x in backbone.decoder(backbone, Settings(), batch.x0, fill, batch.valid, [seed],
                                  temperature=1.0):
            pass
        return x

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


class Sayer(Backbone):
    """It has the same logits at each position, whatever stands there."""

    def __init__(self, model, logits):
        super().__init__(model.network, model.config, model.tokenizer)
        self.logits = logits

    def blocks(self, h, *_):
        return h

    def head(self, h):
        return self.logits.repeat(*h.shape[:-1], 1)


def decode(backbone, fill, seeds=(0,), **options):
    """The canvases [1, L] of a text of ones, decoded where `fill`."""
    x = torch.ones(fill.shape, dtype=torch.long)
    return list(block_diffusion(backbone, Settings(), x, fill, torch.ones_like(fill), list(seeds),
                                **options))


def test_a_token_is_committed_if_it_is_surer_than_the_threshold():
    """Here p is 1 to the last bit. Nothing is surer than 1, so each look commits one token."""
    sure = torch.full((320,), -300.0)
    sure[5] = 300.0
    backbone = Sayer(tiny_backbone("llada2.1-mini"), sure)
    fill = torch.arange(64)[None] >= 32
    assert len(decode(backbone, fill, threshold=1.0)) == 32
    assert len(decode(backbone, fill, threshold=0.999)) == 1


def test_a_stop_in_the_prompt_does_not_end_the_reply():
    """The prompt may hold ends of turns, also in the block in which the reply begins."""
    backbone = Sayer(tiny_backbone("llada2.1-mini"), F.one_hot(torch.tensor(5), 320) * 99.0)
    fill = torch.arange(100)[None] >= 40
    x = torch.ones(1, 100, dtype=torch.long)
    x[0, 35] = backbone.stop_ids[0]
    *_, canvas = block_diffusion(backbone, Settings(), x, fill, fill | True, [0])
    assert torch.equal(canvas[0, :40], x[0, :40]) and (canvas[0, 40:] == 5).all()


def test_each_look_and_each_block_draws_anew():
    """Two tokens have the same odds, and each look commits one: two blocks of 32 fair coins."""
    even = torch.full((320,), -300.0)
    even[[5, 6]] = 0.0
    backbone = Sayer(tiny_backbone("llada2.1-mini"), even)
    fill, ones = torch.arange(96)[None] >= 32, []
    for seed in range(4):
        *_, canvas = decode(backbone, fill, [seed], threshold=1.0, temperature=1.0)
        first, second = canvas[0, 32:64] == 6, canvas[0, 64:] == 6
        assert not torch.equal(first, second)
        assert first.any() and not first.all()
        ones += [int(first.sum()), int(second.sum())]
        agree = int((first == second).sum())
        assert 5 < agree < 27  # of 32. Fewer than one in 10,000 fall outside.
    assert len(set(ones)) > 2 and abs(sum(ones) - 128) < 40


def test_modes_are_those_of_llada2_1():
    assert MODES == {"plain": (0.95, None), "speed": (0.5, 0.0), "quality": (0.7, 0.5)}


def test_a_sample_ends_with_its_last_block():
    """Samples of 40 and 100 tokens. The first is decoded up to place 63 and no further."""
    backbone = Sayer(tiny_backbone("llada2.1-mini"), F.one_hot(torch.tensor(5), 320) * 99.0)
    x, lengths = torch.ones(2, 100, dtype=torch.long), torch.tensor([[40], [100]])
    valid = torch.arange(100) < lengths
    fill = valid & (torch.arange(100) >= 8)
    *_, canvas = block_diffusion(backbone, Settings(), x, fill, valid, [0, 1])
    assert (canvas[:, :8] == 1).all() and (canvas[0, 8:64] == 5).all()
    assert (canvas[0, 64:] == 1).all() and (canvas[1, 8:] == 5).all()
