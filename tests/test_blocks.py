"""The blocks: against the library, by hand, and as backbones that memdlm.py asks."""
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from backbones.backbone import Backbone
from backbones.blocks import Context, GroupRouter, RMSNorm, attend, rotary, rotate
from backbones.checkpoint import hub_weights, load_backbone
import backbones.experts as experts_module
from backbones.experts import Experts, Stack
from backbones.families import PUBLISHED, TINY, translate
from backbones.lora import add_lora, lora_targets
import memdlm
from memdlm import MemDLM
from settings import Settings
from tiny_models import (EACH, FAST, LIBRARY, all_logits, empty_network, library_model, one_sample,
                         random_batch, tiny_backbone, to_library)


# ---- Shapes and architectures -------------------------------------------------------------------

@pytest.mark.slow
def test_published_shapes_count_as_published():
    """Parameters and tensors of the checkpoints, of the adapters that were released, and of phi."""
    for name, parameters, tensors in (("llada-8b", 8_015_581_184, None),
                                      ("llada-moe", 7_356_880_896, 3219), ("llada2.1-mini",
                                                                           16_255_643_392, 14813)):
        state = hub_weights(empty_network(name))
        assert sum(v.numel() for v in state.values()) == parameters
        assert tensors in (None, len(state))
    # With rank 32. An expert's matrices count one by one, as PEFT would count them.
    for name, router, modules, lora, adapted, phi in (
            ("llada-moe", True, 3152, 311_459_840, 384, 37.7e6),
            ("llada2.1-mini", False, 14692, 1_206_632_448, 1542, 126.3e6)):
        network, config = empty_network(name), translate(PUBLISHED[name])
        targets = lora_targets(config, "all", router)
        adaptable = [m for n, m in network.named_modules()
                     if isinstance(m, (nn.Linear, Stack)) and n.rpartition(".")[2] in targets]
        assert count_matrices(adaptable) == modules and count_low_rank(adaptable) == lora
        backbone = Backbone(network, config)
        fast = backbone.matrices(memdlm.first_fast_layer(config.layers, 0.10), "ffn").values()
        assert count_matrices(fast) == adapted
        assert abs(count_low_rank(fast) - phi) < 0.1e6


def count_matrices(modules):
    return sum(getattr(m, "experts", 1) for m in modules)


def count_low_rank(modules):
    return sum(getattr(m, "experts", 1) * 32 * (m.in_features + m.out_features) for m in modules)


def compare_with_library(name):
    """Ours and the library's logits [2, 9, V], and the gradients of a sum of them by name."""
    ours, theirs = tiny_backbone(name).requires_grad_(True), library_model(name)
    theirs.load_state_dict(to_library(name, hub_weights(ours.network), theirs.state_dict()))
    x0, valid = random_batch([9, 9]).x0, torch.ones(2, 9, dtype=torch.bool)
    h = theirs.model.embed_tokens(x0)
    position = theirs.model.rotary_emb(h, torch.arange(9)[None])
    for layer in theirs.model.layers:  # a mask that hides nothing
        h = layer(h, attention_mask=torch.zeros(1, 1, 9, 9), position_embeddings=position)
    expected = theirs.lm_head(theirs.model.norm(h))
    if name == "dream-7b":  # the logits of a token stand where the token before it is
        expected = torch.stack([expected[:, max(i - 1, 0)] for i in range(9)], dim=1)
    got = all_logits(ours, x0, valid)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    for logits in (got, expected):
        (logits * weights).sum().backward()
    grads = {key: p.grad for key, p in theirs.named_parameters()}
    for p in ours.network.parameters():
        p.data = p.grad
    own = to_library(name, hub_weights(ours.network), grads)
    return got.detach(), expected.detach(), own, grads


@pytest.mark.parametrize("name", LIBRARY)
def test_the_blocks_are_those_of_the_library_without_the_causal_mask(name):
    got, expected, own, grads = compare_with_library(name)
    assert (expected[0] - got[1]).abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert own.keys() == grads.keys()
    for key, grad in grads.items():
        assert (own[key] - grad).norm() <= 1e-4 * grad.norm() and grad.norm() > 0, key


def test_group_router_by_hand():
    """Four groups of two; the bias decides who is chosen, the weights are the unbiased sigmoids,
    normalised and scaled."""
    c = replace(translate(TINY["llada2.1-mini"]), width=8)
    router = GroupRouter(c)
    router.weight.data = torch.eye(8)
    x = torch.tensor([[3.0, -3, 1, 0.9, 0, 0, 2, -5]])
    score = x[0].sigmoid()
    router.expert_bias = torch.tensor([0, 0, 0, 0, 0.7, 0.7, 0, 0.0])
    # group sums: .953+.047, .731+.711, (.5+.7)*2, .881+.007 -> groups 2 and 1; of their four the
    # best two are 4 and 5
    weights, chosen = router(x)
    assert set(chosen[0].tolist()) == {4, 5}
    torch.testing.assert_close(weights, torch.full((1, 2), 2.5 / 2))
    router.expert_bias = torch.zeros(8)
    # Now groups 1 and {0 or 2, both about 1.0}: 0 has .9526 + .0474 = 1.0000 as 2 has 1.0.
    weights, chosen = router(x)
    assert 2 in chosen[0].tolist() and chosen[0, 0] in (0, 2)
    torch.testing.assert_close(weights.sum(), torch.tensor(2.5))
    torch.testing.assert_close(weights[0] / 2.5, score[chosen[0]] / score[chosen[0]].sum())


def test_experts_are_what_a_loop_over_tokens_gives():
    backbone = tiny_backbone("llada-moe")
    layer = backbone.part("layers")[1]
    mlp, own = layer.mlp, hub_weights(layer)
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0))
    weights, chosen = mlp.gate(x).flatten(0, 1).softmax(-1).topk(2, dim=-1)
    out = mlp.experts(x, weights, chosen, {}).view(-1, 64)
    for i, token in enumerate(x.view(-1, 64)):
        expected = sum(
            w * plain_feed_forward(own, f"mlp.experts.{e}", token)
            for w, e in zip(weights[i], chosen[i].tolist()))
        torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-6)
    assert (weights.sum(-1) < 0.9).any()  # not renormalised


# ---- Rows, padding, fast weights ----------------------------------------------------------------

@pytest.mark.parametrize("name, attention",
                         [*((n, "full") for n in FAST), ("llada2.1-mini", "block"),
                          ("smollm2", "causal:2")])
def test_a_padded_batch_equals_its_single_samples(name, attention):
    """Logits, the MemDLM step with a phi for each sample, and adaptation to prompts of different
    lengths."""
    backbone = tiny_backbone(name, attention=attention)
    batch = random_batch([40, 11, 67])
    s = Settings(per_sample=True, rank=4, alpha=8.0, scope="ffn+attn", layer_fraction=0.5)
    together = all_logits(backbone, batch.x0, batch.valid)
    model = MemDLM(backbone, s)
    t, xt = torch.tensor([0.5, 0.9, 0.3]), batch.x0.clone()
    masked = batch.maskable & (memdlm.uniform(batch.seeds, "x", 67) < t[:, None])
    xt[masked] = backbone.mask_id
    nll, record, _ = model.memdlm_step(batch, t, xt, masked)
    phi, adapted = memdlm.adapt(backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
    for b in range(3):
        one, n = one_sample(batch, b), int(batch.valid[b].sum())
        torch.testing.assert_close(
            all_logits(backbone, one.x0, one.valid)[0], together[b, :n], rtol=1e-4, atol=2e-5)
        own, _, _ = model.memdlm_step(one, t[b:b + 1], xt[b:b + 1, :n], masked[b:b + 1, :n])
        torch.testing.assert_close(own[0], nll[b, :n], rtol=1e-4, atol=2e-5)
        # ... and for one sample, sharing phi or not is the same.
        shared, _, _ = MemDLM(backbone, replace(s, per_sample=False)).memdlm_step(
            one, t[b:b + 1], xt[b:b + 1, :n], masked[b:b + 1, :n])
        torch.testing.assert_close(shared, own)
        single, _ = memdlm.adapt(backbone, s, one.prompt, one.prompt_valid, one.seeds)
        for key in phi:
            for w, v in zip(phi[key], single[key]):
                torch.testing.assert_close(w[b], v[0], rtol=1e-3, atol=2e-6)
    assert any(B.abs().sum() > 0 for _, B in phi.values())


@pytest.mark.parametrize("name", EACH)
def test_phi_zero_is_the_plain_model_to_the_last_bit_and_adaptation_leaves_no_trace(name):
    backbone, batch = tiny_backbone(name), random_batch([20, 9])
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    s = Settings(layer_fraction=0.5)
    plain = all_logits(backbone, batch.x0, batch.valid)
    phi = memdlm.fresh_phi(backbone, s, [1, 2])
    assert torch.equal(plain, all_logits(backbone, batch.x0, batch.valid, phi, s))
    backbone.train()
    backbone.part("layers")[1].eval()
    modes = [m.training for m in backbone.modules()]
    phi, _ = memdlm.adapt(backbone, s, batch.prompt, batch.prompt_valid, [1, 2])
    assert modes == [m.training for m in backbone.modules()]
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert torch.equal(plain, all_logits(backbone, batch.x0, batch.valid))
    assert not torch.allclose(plain, all_logits(backbone, batch.x0, batch.valid, phi, s))


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_checkpointing_changes_no_gradient(name):
    results = []
    for checkpointing in (False, True):
        backbone = tiny_backbone(name, checkpointing=checkpointing)
        add_lora(backbone, 4, 8.0, 0.1)
        torch.manual_seed(0)
        loss, _ = MemDLM(backbone.train(), Settings(rank=4, alpha=8.0))(random_batch([12, 30]))
        loss.backward()
        results.append({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    assert all(torch.allclose(results[0][n], results[1][n], atol=1e-7) for n in results[0])


def test_dropout_is_off_while_adapting():
    backbone = add_lora(tiny_backbone("llada-moe"), 4, 8.0, 0.5)
    for name, p in backbone.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    backbone.train()
    batch = random_batch([12])
    runs = [
        memdlm.adapt(backbone, Settings(), batch.prompt, batch.prompt_valid, [0])[0]
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for key in runs[0] for a, b in zip(runs[0][key], runs[1][key]))


# ---- Only the rows that are read ----------------------------------------------------------------

@pytest.mark.parametrize("per_sample", [False, True])
def test_rows_that_are_read_are_as_if_all_were_computed(name_of, per_sample):
    """The last layer asks and runs its feed-forward there alone; values and the gradients of theta
    and phi are the same."""
    backbone, batch = tiny_backbone(name_of), random_batch([40, 11, 67])
    backbone.requires_grad_(True)
    s = Settings(rank=4, alpha=8.0, layer_fraction=0.5)
    need = batch.maskable & (torch.rand(batch.x0.shape, generator=torch.Generator().manual_seed(1))
                             < 0.3)
    need[1] = False  # nothing is read of this sample
    phi = memdlm.fresh_phi(backbone, s, batch.seeds if per_sample else batch.seeds[:1])
    phi = {
        n: (a, torch.randn(b.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
        for n, (a, b) in phi.items()
    }
    phi = {n: tuple(w.requires_grad_() for w in pair) for n, pair in phi.items()}
    leaves = [w for pair in phi.values() for w in pair] + list(backbone.parameters())
    out = []
    for rows_read in (None, need):
        h = memdlm.upper_layers(backbone, s, memdlm.lower_layers(
            backbone, s, batch.x0, batch.valid), batch.valid, phi, rows_read)[need]
        out.append(
            (h, torch.autograd.grad(backbone.head(h).square().sum(), leaves, allow_unused=True)))
    assert torch.allclose(out[0][0], out[1][0], atol=1e-5)
    for a, b in zip(out[0][1], out[1][1]):
        a, b = (torch.zeros(1) if g is None else g for g in (a, b))
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-6


def test_unread_rows_skip_the_feed_forward():
    backbone, batch = tiny_backbone("llada-moe"), random_batch([20, 20])
    seen = []
    backbone.core.model.layers[-1].mlp.experts.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))
    need = torch.zeros_like(batch.valid)
    need[0, 3:6] = True
    for rows_read in (need, None, torch.zeros_like(need)):
        memdlm.upper_layers(backbone, Settings(),
                            memdlm.lower_layers(backbone, Settings(), batch.x0, batch.valid),
                            batch.valid, None, rows_read)
    # As many of each sample as the one that needs the most, three. With gradients, all weights
    # must take part even if nothing is read, for DDP.
    assert seen == [6, 40, 40]
    with torch.no_grad():
        h = memdlm.lower_layers(backbone, Settings(), batch.x0, batch.valid)
        memdlm.upper_layers(backbone, Settings(), h, batch.valid, None, torch.zeros_like(need))
    assert seen == [6, 40, 40]


# ---- What the host waits for --------------------------------------------------------------------

@pytest.mark.parametrize("padded", [False, True])
def test_a_step_reads_at_most_one_number_back_per_moe_layer(padded, monkeypatch):
    """Masks live on the host, hidden states on the device.

    Nothing that is computed from hidden states is read, but, where products are padded, how many
    rows the fullest expert of a layer has, once a pass.
    """
    backbone, passes, reads = tiny_backbone("llada-moe"), [], []
    add_lora(backbone, 8, 16.0, 0.05)
    monkeypatch.setattr(experts_module, "pads", lambda x: padded)
    for m in backbone.modules():
        if isinstance(m, Experts):
            m.register_forward_hook(lambda *a: passes.append(1))
    for method in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "numpy"):
        def spy(self, *a, real=getattr(torch.Tensor, method), method=method, **k):
            code = sys._getframe(1).f_code
            if "backbones" in code.co_filename or "memdlm.py" in code.co_filename:
                reads.append((code.co_name, method))
            return real(self, *a, **k)
        monkeypatch.setattr(torch.Tensor, method, spy)
    # Of masks and counts of masks; and on a CPU alone, which test_pretend_gpu.py sees, if a step of
    # the inner loop was taken.
    on_the_host = {"blocks", "mask", "rows_needed", "numbers_of", "stage_loss", "sgd_step"}
    for s in (Settings(rank=8), Settings(rank=8, memory=False)):
        reads.clear(), passes.clear()
        MemDLM(backbone.train(), s)(random_batch([30, 20]), report=False)[0].backward()
        of_device = [read for read in reads if read[0] not in on_the_host]
        assert of_device == [("sort_tokens", "__int__")] * len(passes) * padded
        assert len(passes) >= 4


# ---- Against loops ------------------------------------------------------------------------------

def plain_norm(x, weight):
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def plain_turn(x, position):
    """Half of a head's 16 channels are rotated: channel i with channel i + 4, theta = 600000."""
    out = x.clone()
    for i in range(4):
        angle = position * 600000.0 ** (-2 * i / 8)
        out[i] = x[i] * math.cos(angle) - x[i + 4] * math.sin(angle)
        out[i + 4] = x[i + 4] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def plain_feed_forward(w, path, x):
    gate, up, down = (w[f"{path}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return down @ ((gate @ x) * (gate @ x).sigmoid() * (up @ x))


def plain_route(score, bias):
    """{expert: its weight}. Four groups of two experts; the bias chooses and does not weigh."""
    ranked = score + bias
    worth = [float(ranked[2 * g] + ranked[2 * g + 1]) for g in range(4)]
    best = sorted(range(4), key=lambda g: -worth[g])[:2]
    open_experts = [e for g in best for e in (2 * g, 2 * g + 1)]
    chosen = sorted(open_experts, key=lambda e: -float(ranked[e]))[:2]
    return {e: 2.5 * score[e] / sum(score[e] for e in chosen) for e in chosen}


def plain_llada2(w, ids):
    """Logits of a tiny LLaDA2: 4 query heads on 2 key heads of 16 channels, 1 dense layer of 4."""
    h = [w["model.word_embeddings.weight"][i] for i in ids]
    for layer in range(4):
        at = f"model.layers.{layer}."
        q, k, v, out = [], [], [], []
        for i, row in enumerate(h):
            x = plain_norm(row, w[at + "input_layernorm.weight"])
            heads = (w[at + "attention.query_key_value.weight"] @ x).view(8, 16)
            norms = [w[f"{at}attention.{name}_layernorm.weight"] for name in ("query", "key")]
            q.append([plain_turn(plain_norm(x, norms[0]), i) for x in heads[:4]])
            k.append([plain_turn(plain_norm(x, norms[1]), i) for x in heads[4:6]])
            v.append(heads[6:])
        for i in range(len(h)):
            parts = []
            for head in range(4):  # heads 0 and 1 read key head 0, heads 2 and 3 key head 1
                scores = torch.stack([q[i][head] @ key[head // 2] / 4 for key in k])
                parts.append(sum(p * values[head // 2]
                                 for p, values in zip(scores.softmax(0), v)))
            out.append(w[at + "attention.dense.weight"] @ torch.cat(parts))
        for i, more in enumerate(out):
            h[i] = h[i] + more
            x = plain_norm(h[i], w[at + "post_attention_layernorm.weight"])
            if layer == 0:
                h[i] = h[i] + plain_feed_forward(w, at + "mlp", x)
                continue
            score = (w[at + "mlp.gate.weight"] @ x).sigmoid()
            route = plain_route(score, w[at + "mlp.gate.expert_bias"])
            h[i] = h[i] + plain_feed_forward(w, at + "mlp.shared_experts", x) + sum(
                weight * plain_feed_forward(w, f"{at}mlp.experts.{e}", x)
                for e, weight in route.items())
    return torch.stack([w["lm_head.weight"] @ plain_norm(row, w["model.norm.weight"])
                        for row in h])


@torch.no_grad()
def test_llada2_against_loops_over_positions_heads_and_experts():
    """In float64, one position, head and expert at a time. The library has no such model."""
    backbone = tiny_backbone("llada2.1-mini")
    w = {name: p.double() for name, p in hub_weights(backbone.network).items()}
    ids = [5, 17, 5, 250, 99, 3]
    x0 = torch.tensor([ids + [7, 7]])
    valid = torch.tensor([[True] * 6 + [False] * 2])
    got = all_logits(backbone, x0, valid)[0, :6].double()
    torch.testing.assert_close(got, plain_llada2(w, ids), rtol=1e-3, atol=1e-3)


def test_the_routers_bias_chooses_but_does_not_weigh():
    """Groups of two. The bias lifts expert 1 above 0 and 3 above 2; the weights are without it.

        expert       0    1    2    3    4    5    6    7
        sigmoid     .5   .4   .3   .2   .1   .1   .1   .1
        with bias   .5  1.4   .3  2.2   .1   .1   .1   .1       chosen: 3 and 1
        weight          2.5 * .4 / .6   2.5 * .2 / .6
    """
    router = GroupRouter(replace(translate(TINY["llada2.1-mini"]), width=8))
    router.weight.data = torch.eye(8)
    router.expert_bias = torch.tensor([0, 1.0, 0, 2.0, 0, 0, 0, 0])
    score = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1]])
    weights, chosen = router(score.logit())
    assert chosen.tolist() == [[3, 1]]
    torch.testing.assert_close(weights, torch.tensor([[2.5 * 0.2 / 0.6, 2.5 * 0.4 / 0.6]]))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (4, 1)])
def test_neighbouring_query_heads_share_a_key_head(heads, kv_heads):
    """heads / kv_heads neighbours read the same keys: of 6 on 2 the first three the first."""
    generator = torch.Generator().manual_seed(heads)
    q = torch.randn(1, 5, heads, 8, generator=generator)
    k, v = torch.randn(2, 1, 5, kv_heads, 8, generator=generator)
    still = Context(torch.ones(5, 8), torch.zeros(5, 8), None, None, None, {})
    out = attend(q, k, v, still, 0).view(5, heads, 8)
    for head in range(heads):
        own = head // (heads // kv_heads)
        p = (q[0, :, head] @ k[0, :, own].T / 8 ** 0.5).softmax(-1)
        torch.testing.assert_close(out[:, head], p @ v[0, :, own])


def test_a_norm_by_hand():
    """(3, 1): the mean of the squares is 5. With eps = 4 it is divided by sqrt(9), then * 2, 3."""
    norm = RMSNorm(2, eps=4.0)
    norm.weight.data = torch.tensor([2.0, 3.0])
    torch.testing.assert_close(norm(torch.tensor([3.0, 1.0])), torch.tensor([2.0, 1.0]))


def test_a_norm_in_bfloat16_is_rounded_before_and_after_the_weight():
    """The square mean is not rounded, the normal is, and so is its product with the weight."""
    norm, generator = RMSNorm(64, eps=1e-6).to(torch.bfloat16), torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(64, generator=generator).to(torch.bfloat16)
    x = (5 * torch.randn(200, 64, generator=generator)).to(torch.bfloat16)
    wide = x.float()
    normal = (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()).to(torch.bfloat16)
    want = (normal.float() * norm.weight.float()).to(torch.bfloat16)
    assert (norm(x) == want).float().mean() > 0.999  # where rounding is no tie
    once = (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.float())
    assert (once.to(torch.bfloat16) == want).float().mean() < 0.9


@pytest.mark.parametrize("name, dim, theta, exact", [
    ("llada-8b", 16, 500000.0, True), ("llada-moe", 16, 50000.0, False),
    ("llada2.1-mini", 8, 600000.0, False)])
def test_angles_of_far_positions_in_a_bfloat16_model(name, dim, theta, exact):
    """Position 300 does not exist in bfloat16, its angle must all the same.

    LLaDA-8B rotates in float32. The others round cos and sin to the model's precision.
    """
    raw = TINY[name] | {"mask_token_id": 301, "eos_token_id": 300}
    backbone = load_backbone(raw, random=True, dtype="bfloat16", device="cpu")
    seen = []

    class Spy(nn.Module):
        layer = 0

        def forward(self, h, context):
            seen.append((context.cos, context.sin))
            return h

    layers = backbone.part("layers")
    layers[0] = Spy()
    ids = torch.ones(1, 302, dtype=torch.long)
    backbone.blocks(backbone.embed(ids), ids > 0, 0, 1)
    for function, table in zip((math.cos, math.sin), seen[0]):
        assert table.dtype == (torch.float32 if exact else torch.bfloat16)
        for position in (1, 257, 300, 301):
            want = [function(position * theta ** (-2 * (i % (dim // 2)) / dim))
                    for i in range(dim)]
            assert table[position].tolist() == pytest.approx(want, abs=1e-4 if exact else 4e-3)


def test_a_rotation_in_float32_is_rounded_once():
    """What LLaDA-8B's queries in bfloat16 become, against the same in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 9, 16, generator=generator).to(torch.bfloat16)
    out = rotate(x, *rotary(torch.arange(9), 16, 500000.0, torch.float32))
    assert out.dtype == torch.bfloat16
    for i in range(9):
        for c in range(8):
            angle = i * 500000.0 ** (-2 * c / 16)
            a, b = x[0, :, i, c].double(), x[0, :, i, c + 8].double()
            pair = (a * math.cos(angle) - b * math.sin(angle),
                    b * math.cos(angle) + a * math.sin(angle))
            for got, want in zip((out[0, :, i, c], out[0, :, i, c + 8]), pair):
                torch.testing.assert_close(got.double(), want, rtol=2 ** -8, atol=1e-6)
