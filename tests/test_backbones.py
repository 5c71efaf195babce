"""The real backbones on tiny random checkpoints.

Loading, 4-bit, adapters, masks, caches, data, and the plan.
"""
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from backbones.backbone import Backbone, build_network
from backbones.block_diffusion import block_diffusion
from backbones.blocks import GroupRouter
from backbones.checkpoint import describe, load_backbone, load_weights
import backbones.experts as experts_module
from backbones.experts import Experts, grouped_linear, stack_weights
from backbones.families import FAMILIES, PUBLISHED, TINY, read_config, translate
from backbones.lora import (add_lora, load_adapter, lora_targets, lora_weights, merge_adapter,
                            save_adapter)
from backbones.plan import kept_per_token, memory_plan, optimizer_bytes
from backbones.text import ChatData, SpecialToken, chat_turns
from backbones.tiny import TEMPLATE, write_tiny
from data import find_data_file
from files import model_folder
import memdlm
import train
from memdlm import Batch, MemDLM
from settings import Settings

NAMES = ["llada-8b", "llada-moe", "llada2.1-mini"]


def counts(name):
    with torch.device("meta"):
        network = build_network(translate(PUBLISHED[name]))
    return network


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for name in NAMES:
        write_tiny(name, root / name)
    return root


@pytest.fixture(params=NAMES)
def name_of(request):
    return request.param


@pytest.fixture(params=NAMES)
def folder(folders, request):
    return folders / request.param


def tiny(name, seed=0, **options):
    """Tiny random backbone with weights large enough that attention, router and φ matter."""
    raw = PUBLISHED[name] | TINY[name] | {
        "mask_token_id": 301, "eos_token_id": 300, "pad_token_id": 300
    }
    backbone = load_backbone(raw, random=True, dtype="float32", device="cpu", seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    for p in backbone.parameters():
        if p.dtype == torch.float32:
            spread = 0.15 if p.dim() > 1 else 0.3
            p.data = (p.dim() == 1) + spread * torch.randn(p.shape, generator=generator)
    for m in backbone.modules():
        if isinstance(m, GroupRouter):
            m.expert_bias = 0.1 * torch.randn(m.expert_bias.shape, generator=generator)
    return backbone


def rows(lengths, prompt=5, seed=0):
    """A batch of rows of these lengths, padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 256, (n,), generator=generator) for n in lengths]
    x0 = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    valid = torch.arange(x0.shape[1]) < torch.tensor(lengths)[:, None]
    maskable = valid & (torch.arange(x0.shape[1]) >= prompt)
    return Batch(x0, maskable, valid, list(range(len(lengths))), x0, valid)


def grouped(backbone, on):
    for m in backbone.modules():
        if isinstance(m, Experts):
            m.grouped = on


def alone(batch, b):
    n = int(batch.valid[b].sum())
    cut = lambda x: x[b:b + 1, :n]
    return Batch(cut(batch.x0), cut(batch.maskable), cut(batch.valid), [batch.seeds[b]],
                 cut(batch.prompt), cut(batch.prompt_valid))


def logits(backbone, x, valid, phi=None, s=None):
    s = s or Settings()
    return backbone.head(
        memdlm.upper_layers(backbone, s, memdlm.lower_layers(backbone, s, x, valid), valid, phi))


# ---- Shapes and architectures --------------------------------------------------------------------

@pytest.mark.slow
def test_published_shapes_count_as_published():
    """Parameters and tensors of the checkpoints, of the adapters that were released, and of phi."""
    for name, parameters, tensors in (("llada-8b", 8_015_581_184, None),
                                      ("llada-moe", 7_356_880_896, 3219), ("llada2.1-mini",
                                                                           16_255_643_392, 14813)):
        state = counts(name).state_dict()
        assert sum(v.numel() for v in state.values()) == parameters
        assert tensors in (None, len(state))
    for name, router, modules, lora, adapted, phi in (("llada-moe", True, 3152, 311_459_840, 384,
                                                       37.7e6), ("llada2.1-mini", False, 14692,
                                                                 1_206_632_448, 1542, 126.3e6)):
        network, config = counts(name), translate(PUBLISHED[name])
        targets = lora_targets(config, "all", router)
        linears = [
            m for n, m in network.named_modules()
            if isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets
        ]
        assert len(linears) == modules and sum(32 * (m.in_features + m.out_features)
                                               for m in linears) == lora
        backbone = Backbone(network, config)
        fast = backbone.matrices(memdlm.first_fast_layer(config.layers, 0.10), "ffn")
        assert len(fast) == adapted
        assert abs(sum(32 * (m.in_features + m.out_features) for m in fast.values()) - phi) < 0.1e6


def transformers_model(name):
    """The library's model of the same architecture, made to look both ways."""
    import transformers as hf
    c = translate(PUBLISHED[name] | TINY[name])
    common = dict(vocab_size=c.vocab_size, hidden_size=c.width, num_hidden_layers=c.layers,
                  num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
                  rms_norm_eps=c.eps, tie_word_embeddings=False,
                  rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})
    if name == "llada-8b":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(intermediate_size=c.ffn, **common))
    else:
        model = hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(num_experts=c.experts, num_experts_per_tok=c.top_k,
                              moe_intermediate_size=c.expert_ffn, norm_topk_prob=False,
                              decoder_sparse_step=1, mlp_only_layers=[],
                              intermediate_size=c.expert_ffn, **common))
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model.eval()


@pytest.mark.parametrize("name", ["llada-8b", "llada-moe"])
def test_the_blocks_are_those_of_the_library_without_the_causal_mask(name):
    ours, theirs = tiny(name), transformers_model(name)
    rename = [("model.embed_tokens", "model.transformer.wte"),
              ("lm_head", "model.transformer.ff_out"), ("model.norm", "model.transformer.ln_f"),
              ("model.layers", "model.transformer.blocks"), ("input_layernorm", "attn_norm"),
              ("post_attention_layernorm", "ff_norm"), ("self_attn.o_proj", "attn_out"),
              ("self_attn.", ""), ("mlp.gate_proj", "ff_proj"), ("mlp.up_proj", "up_proj"),
              ("mlp.down_proj", "ff_out")]
    weights = ours.network.state_dict()
    state = {}
    for key, value in theirs.state_dict().items():
        if ".experts.gate_up_proj" in key:
            stem = key.removesuffix("gate_up_proj")
            state[key] = torch.stack([
                torch.cat([weights[f"{stem}{e}.{p}_proj.weight"]
                           for p in ("gate", "up")])
                for e in range(len(value))
            ])
        elif ".experts.down_proj" in key:
            stem = key.removesuffix("down_proj")
            state[key] = torch.stack(
                [weights[f"{stem}{e}.down_proj.weight"] for e in range(len(value))])
        else:
            own = key
            for old, new in rename if name == "llada-8b" else ():
                own = own.replace(old, new)
            state[key] = weights[own]
    theirs.load_state_dict(state)
    batch = rows([9, 9])
    mask = torch.zeros(1, 1, 9, 9)
    with torch.no_grad():
        h = theirs.model.embed_tokens(batch.x0)
        position = theirs.model.rotary_emb(h, torch.arange(9)[None])
        for layer in theirs.model.layers:
            h = layer(h, attention_mask=mask, position_embeddings=position)
        expected = theirs.lm_head(theirs.model.norm(h))
        torch.testing.assert_close(logits(ours, batch.x0, batch.valid), expected, rtol=1e-4,
                                   atol=1e-4)
        assert (expected - logits(ours, batch.x0.flip(0), batch.valid)).abs().max() > 0.1


def test_group_router_by_hand():
    """Four groups of two; the bias decides who is chosen, the weights are the unbiased sigmoids,
    normalised and scaled."""
    c = replace(translate(PUBLISHED["llada2.1-mini"] | TINY["llada2.1-mini"]), width=8)
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
    backbone = tiny("llada-moe")
    mlp = backbone.part("layers")[1].mlp
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0))
    weights, chosen = mlp.gate(x).flatten(0, 1).softmax(-1).topk(2, dim=-1)
    out = mlp.experts(x, weights, chosen).view(-1, 64)
    for i, token in enumerate(x.view(-1, 64)):
        expected = sum(
            w * mlp.experts[e](token[None])[0] for w, e in zip(weights[i], chosen[i].tolist()))
        torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-6)
    assert (weights.sum(-1) < 0.9).any()  # not renormalised


# ---- Rows, padding, fast weights -----------------------------------------------------------------


@pytest.mark.parametrize("name, attention",
                         [*((n, "full") for n in NAMES), ("llada2.1-mini", "block")])
def test_a_padded_batch_equals_its_single_samples(name, attention):
    """Logits, the MemDLM step with a phi for each sample, and adaptation to prompts of different
    lengths."""
    backbone = tiny(name, attention=attention)
    batch, s = rows([40, 11, 67]), Settings(per_sample=True, rank=4, alpha=8.0, scope="ffn+attn",
                                            layer_fraction=0.5)
    together = logits(backbone, batch.x0, batch.valid)
    model = MemDLM(backbone, s)
    t, xt = torch.tensor([0.5, 0.9, 0.3]), batch.x0.clone()
    masked = batch.maskable & (memdlm.uniform(batch.seeds, "x", 67) < t[:, None])
    xt[masked] = backbone.mask_id
    nll, record, _ = model.memdlm_step(batch, t, xt, masked)
    phi, adapted = memdlm.adapt(backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
    for b in range(3):
        one, n = alone(batch, b), int(batch.valid[b].sum())
        torch.testing.assert_close(
            logits(backbone, one.x0, one.valid)[0], together[b, :n], rtol=1e-4, atol=2e-5)
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


@pytest.mark.parametrize("name", NAMES)
def test_phi_zero_is_the_plain_model_to_the_last_bit_and_adaptation_leaves_no_trace(name):
    backbone, batch = tiny(name), rows([20, 9])
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    s = Settings(layer_fraction=0.5)
    plain = logits(backbone, batch.x0, batch.valid)
    assert torch.equal(
        plain, logits(backbone, batch.x0, batch.valid, memdlm.fresh_phi(backbone, s, [1, 2]), s))
    backbone.train()
    backbone.part("layers")[1].eval()
    modes = [m.training for m in backbone.modules()]
    phi, _ = memdlm.adapt(backbone, s, batch.prompt, batch.prompt_valid, [1, 2])
    assert modes == [m.training for m in backbone.modules()]
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert torch.equal(plain, logits(backbone, batch.x0, batch.valid))
    assert not torch.allclose(plain, logits(backbone, batch.x0, batch.valid, phi, s))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name):
    results = []
    for checkpointing in (False, True):
        backbone = tiny(name, checkpointing=checkpointing)
        add_lora(backbone, 4, 8.0, 0.1)
        torch.manual_seed(0)
        loss, _ = MemDLM(backbone.train(), Settings(rank=4, alpha=8.0))(rows([12, 30]))
        loss.backward()
        results.append({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    assert all(torch.allclose(results[0][n], results[1][n], atol=1e-7) for n in results[0])


def test_dropout_is_off_while_adapting():
    backbone = add_lora(tiny("llada-moe"), 4, 8.0, 0.5)
    for name, p in backbone.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    backbone.train()
    batch = rows([12])
    runs = [
        memdlm.adapt(backbone, Settings(), batch.prompt, batch.prompt_valid, [0])[0]
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for key in runs[0] for a, b in zip(runs[0][key], runs[1][key]))


# ---- Loading -------------------------------------------------------------------------------------

def test_a_checkpoint_loads_as_it_is_and_says_what_it_loaded(folder):
    backbone = load_backbone(str(folder))
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    ours = backbone.network.state_dict()
    assert stored.keys() == ours.keys() and all(torch.equal(stored[k], ours[k]) for k in stored)
    assert backbone.mask_id == backbone.tokenizer.mask_id
    assert backbone.config.eos_id == backbone.tokenizer.eos_id
    assert not any(p.requires_grad for p in backbone.parameters()) and not backbone.training
    text = describe(backbone)
    size = sum(p.numel() for p in backbone.parameters())
    assert "0 layers in 4-bit" in text and f"{size / 1e6:.3g} million" in text


def broken(folder, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy)
    return str(copy)


def edit(file, **changes):
    def change(copy):
        raw = json.loads((copy / file).read_text())
        for key, value in changes.items():
            raw.pop(key, None)
            if value is not None:
                raw[key] = value
        (copy / file).write_text(json.dumps(raw))
    return change


def edit_weights(change):
    def edit_one(copy):
        path = copy / "model-00001-of-00002.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
    return edit_one


def drop_from_index(copy):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop("lm_head.weight")
    path.write_text(json.dumps(index))


def point_outside(copy):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../../secret.safetensors"
    path.write_text(json.dumps(index))


def extra_in_index(copy):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.mlp.expert_bias"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change, says",
    [(edit("config.json", model_type="llama"), "supported are LLaDA"),
     (edit("config.json", model_type="llada2_moe"), "use_bias is None"),
     (edit("config.json", num_experts=None), "supported are LLaDA"),
     (edit("config.json", rope_theta=None), "rope_theta is None"),
     (edit("config.json", num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
     (edit("config.json", hidden_size="big"), "hidden_size is 'big'"),
     (edit("config.json", num_experts_per_tok=9), "do not fit together"),
     (edit("config.json", qk_layernorm=False), "a variant that this code does not compute"),
     (edit("config.json", moe_layer_freq=[1, 0, 1, 1]), "moe_layer_freq"),
     (edit("config.json", norm_topk_prob=True), "norm_topk_prob is True"),
     (edit("config.json", num_hidden_layers=5), "has no model.layers.4"),
     (edit("config.json", num_hidden_layers=3), "have no place in the model"),
     (edit("config.json", mask_token_id=5000), "outside the vocabulary"),
     (edit("config.json", eos_token_id=257, mask_token_id=257), "same id"),
     (edit("config.json", moe_layer_freq=0), "moe_layer_freq"),
     (lambda copy: (copy / "config.json").write_text("{"), "is not JSON"),
     (lambda copy: (copy / "config.json").unlink(), "config.json is missing"),
     (lambda copy: (copy / "model-00002-of-00002.safetensors").unlink(),
      "model-00002-of-00002.safetensors is missing"),
     (lambda copy: (copy / "model-00002-of-00002.safetensors").write_bytes(b"x" * 100),
      "is not a safetensors file"),
     (lambda copy: (copy / "tokenizer.json").write_text("{}"), "tokenizer cannot be read"),
     (drop_from_index, "has no lm_head.weight"),
     (point_outside, "not a safetensors file beside it"), (extra_in_index, "have no place"),
     (edit_weights(lambda w: w.update({k: w[k][:1]
                                       for k in [next(k for k in w if "q_proj" in k)]})),
      "should be [64, 64], is [1, 64]"),
     (edit_weights(lambda w: w.pop("lm_head.weight")), "though the index says so"), ])
def test_what_does_not_fit_is_refused_in_one_line(folders, tmp_path, change, says):
    with pytest.raises(ValueError, match=says.replace("[", r"\[")) as error:
        load_backbone(broken(folders / "llada-moe", tmp_path, change))
    assert "\n" not in str(error.value)


def test_fields_in_other_forms():
    moe, dense, two = (PUBLISHED[name] for name in ("llada-moe", "llada-8b", "llada2.1-mini"))
    plain = translate(moe)
    moved = {k: v
             for k, v in moe.items()
             if k != "rope_theta"
             } | {"rope_parameters": {"rope_theta": 50000, "rope_type": "default"}}
    assert translate(moved) == plain == translate(moe | {"moe_layer_freq": 1})
    assert translate(moe | {"eos_token_id": [7, 8]}).eos_id == 7
    assert translate(two).rotary_dim == 64
    assert translate({k: v
                      for k, v in two.items()
                      if k != "partial_rotary_factor"} | {"rotary_dim": 64}).rotary_dim == 64
    for key in ("scale_logits", "input_emb_norm"):
        with pytest.raises(ValueError, match=key):
            translate(dense | {key: True})


def test_nothing_of_a_repository_is_run(folders, tmp_path):
    def bait(copy):
        (copy / "modeling_llada.py").write_text("raise SystemExit('ran')")
        edit("config.json",
             auto_map={"AutoModel": "modeling_llada.LLaDA", "AutoConfig": "modeling_llada.C"})(copy)
        (copy / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/ran'\ntR.")
    assert load_backbone(broken(folders / "llada-moe", tmp_path, bait)).vocab_size == 320


def test_the_hub_out_of_reach_is_one_quick_line(monkeypatch):
    import time
    begin = time.perf_counter()
    for call, name in ((model_folder, "nobody/nothing"), (read_config, "nobody/nothing"),
                       (find_data_file, "nobody/data")):
        with pytest.raises(ValueError, match="could not be fetched from the hub") as error:
            call(name)
        assert "\n" not in str(error.value) and "give" in str(error.value)
    assert time.perf_counter() - begin < 15


# ---- 4-bit ---------------------------------------------------------------------------------------

def dequantised(backbone):
    import bitsandbytes.functional as bf
    return {
        n: bf.dequantize_4bit(m.weight.data, m.weight.quant_state)
        for n, m in backbone.network.named_modules()
        if hasattr(m, "quant_state") and m.weight.quant_state is not None
    }


@pytest.mark.parametrize("name, quantised", [("llada-8b", 28), ("llada-moe", 4 * (4 + 24)),
                                             ("llada2.1-mini", 4 * 2 + 3 + 3 * 27)])
def test_4bit_quantises_every_layer_of_the_blocks_and_nothing_else(name, quantised):
    import bitsandbytes as bnb
    backbone = tiny(name, load_4bit=True)
    layers = {n: m for n, m in backbone.network.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == quantised
    for n, m in layers.items():
        state = m.weight.quant_state
        assert m.weight.dtype == torch.uint8 and state.quant_type == "nf4"
        assert state.nested and state.blocksize == 64
        assert not m.weight.requires_grad
    plain = [n for n, m in backbone.network.named_modules() if type(m) is nn.Linear]
    assert all(n == FAMILIES[backbone.config.family].head or n.endswith("mlp.gate") for n in plain)
    assert f"{quantised} layers in 4-bit" in describe(backbone)
    assert next(iter(dequantised(backbone).values())).shape[1] == 64


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_4bit_gradients_are_those_of_the_dequantised_weights(name, training, dtype):
    """phi's and the LoRA's, in train and in eval mode, where bitsandbytes has a path without
    gradients on some CPUs."""
    raw = PUBLISHED[name] | TINY[name] | {"mask_token_id": 301, "eos_token_id": 300}
    s, batch, results = Settings(rank=4, alpha=8.0, layer_fraction=0.5), rows([14, 8]), []
    quant = load_backbone(raw, load_4bit=True, random=True, dtype=dtype, device="cpu")
    plain = load_backbone(raw, random=True, dtype=dtype, device="cpu")
    for n, w in dequantised(quant).items():
        plain.network.get_submodule(n).weight.data = w.to(getattr(torch, dtype))
    assert {p.dtype
            for n, p in quant.named_parameters()
            if p.dtype != torch.uint8} == {getattr(torch, dtype)}
    for backbone in (quant, plain):
        add_lora(backbone, 4, 8.0, 0.0, seed=1)
        backbone.train(training)
        phi = memdlm.fresh_phi(backbone, s, [0])
        phi = {k: (A, B + 0.01) for k, (A, B) in phi.items()}
        leaves = [w.requires_grad_() for pair in phi.values() for w in pair]
        with memdlm.fast_weights(backbone, s, phi):
            h = backbone.blocks(backbone.embed(batch.x0), batch.valid, 0, None)
            loss = memdlm.token_nll(backbone, h, batch.x0, batch.maskable).mean()
        loras = [p for n, p in backbone.named_parameters() if "lora_B" in n]
        grads = torch.autograd.grad(loss, leaves + loras, allow_unused=True)
        results.append(
            torch.cat([torch.zeros(1) if g is None else g.float().flatten() for g in grads]))
    ours, expected = results
    assert expected.norm() > 0
    # In bfloat16 single roundings differ, and a router may choose another expert for a token on the
    # edge.
    assert (ours - expected).norm() < {"float32": 1e-4, "bfloat16": 0.05}[dtype] * expected.norm()


def test_4bit_without_bitsandbytes_is_an_error(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        tiny("llada-moe", load_4bit=True)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        train.make_optimizer(Settings(optimizer="adamw8bit"), [nn.Parameter(torch.zeros(1))])


# ---- Adapters ------------------------------------------------------------------------------------

def random_lora(backbone, seed=0, router=False, **options):
    add_lora(backbone, 4, 8.0, 0.0, router=router, **options)
    generator = torch.Generator().manual_seed(seed)
    for key, p in lora_weights(backbone).items():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return backbone


@pytest.mark.slow
@pytest.mark.parametrize("name, router", [("llada-8b", False), ("llada-moe", False),
                                          ("llada-moe", True), ("llada2.1-mini", False)])
def test_adapters_save_in_peft_format_and_load_live_merged_and_with_plain_peft(
        name, router, tmp_path):
    from peft import PeftModel
    batch = rows([12, 7])
    backbone = random_lora(tiny(name), router=router)
    expected, plain = logits(backbone, batch.x0, batch.valid), logits(tiny(name), batch.x0,
                                                                      batch.valid)
    assert not torch.allclose(expected, plain, atol=1e-2)
    save_adapter(backbone, tmp_path / "adapter")
    assert {p.name
            for p in (tmp_path / "adapter").iterdir()} >= {
                "adapter_config.json", "adapter_model.safetensors"
            }
    keys = load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    assert not any(
        key.startswith(f"base_model.model.{FAMILIES[backbone.config.family].head}.")
        for key in keys)
    if name == "llada-moe":
        assert "base_model.model.model.layers.3.mlp.experts.5.up_proj.lora_A.weight" in keys
        assert ("base_model.model.model.layers.3.mlp.gate.lora_A.weight" in keys) == router
    live = load_adapter(tiny(name), str(tmp_path / "adapter"))
    assert torch.equal(logits(live, batch.x0, batch.valid), expected)
    other = tiny(name)
    other.network = PeftModel.from_pretrained(other.network, tmp_path / "adapter")
    torch.testing.assert_close(logits(other, batch.x0, batch.valid), expected)
    # Merged: into the weights of a checkpoint on disk, before they would be quantised.
    weights = tiny(name).network.state_dict()
    network = build_network(backbone.config)
    source = merge_adapter(lambda key, shape: weights[key], str(tmp_path / "adapter"), network,
                           name, FAMILIES[backbone.config.family].embed)
    load_weights(network, source, torch.float32, "cpu")
    merged = Backbone(network.eval(), backbone.config)
    torch.testing.assert_close(logits(merged, batch.x0, batch.valid), expected, rtol=1e-3,
                               atol=1e-3)


@pytest.mark.slow
def test_adapters_that_do_not_fit_are_refused(tmp_path):
    source = tmp_path / "adapter"
    save_adapter(random_lora(tiny("llada-moe")), source)
    cases = {
        "made for another model|adapts": lambda c, w: None,  # LLaDA2.1 below
        "only plain LoRA": lambda c, w: c.update(use_dora=True),
        "modules_to_save": lambda c, w: c.update(modules_to_save=["lm_head"]),
        "r 0": lambda c, w: c.update(r=0),
        "keys do not fit": lambda c, w: w.pop(
            "base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight"),
        "1 of .* keys do not fit": lambda c, w: w.update({
            "base_model.model.model.layers.9.mlp.experts.0.up_proj.lora_A.weight": torch.zeros(
                4, 64)
        }),
        "adapts .*lm_head": lambda c, w: w.update(
            {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}),
        "initialised by pissa": lambda c, w: c.update(init_lora_weights="pissa"),
        "was made for x/LLaDA-MoE-Instruct": lambda c, w: c.update(base_model_name_or_path=
                                                                   "x/LLaDA-MoE-Instruct")
    }
    for says, change in cases.items():
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        config, weights = json.loads((folder / "adapter_config.json").read_text()), load_file(
            folder / "adapter_model.safetensors")
        change(config, weights)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(weights, folder / "adapter_model.safetensors")
        backbone = tiny("llada2.1-mini" if says.startswith("made") else "llada-moe")
        backbone.name = "x/LLaDA-MoE-Base"
        with pytest.raises(ValueError, match=says) as error:
            load_adapter(backbone, str(folder))
        assert "\n" not in str(error.value)


def test_the_name_of_the_base_is_compared_where_it_says_something(tmp_path):
    backbone = random_lora(tiny("llada-moe"))
    save_adapter(backbone, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    for theirs, ours, fits in ((None, "x/LLaDA-MoE-Base",
                                True), ("models/my-moe", "x/LLaDA-MoE-Base",
                                        True), ("other/LLaDA-MoE-Base", "x/LLaDA-MoE-Base", True),
                               ("other/LLaDA-MoE-Chat", "x/LLaDA-MoE-Base",
                                False), ("x/LLaDA-MoE-Base merged with y", "x/LLaDA-MoE-Base",
                                         False), ("x/LLaDA-MoE-Base merged with y",
                                                  "x/LLaDA-MoE-Base merged with y", True)):
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": theirs}))
        other = tiny("llada-moe")
        other.name = ours
        if fits:
            load_adapter(other, str(tmp_path / "adapter"))
        else:
            with pytest.raises(ValueError, match="was made for"):
                load_adapter(other, str(tmp_path / "adapter"))


def test_an_adapter_on_other_weights_of_the_same_shape_is_refused(folders, tmp_path):
    for seed in (0, 1):
        shutil.copytree(folders / "llada-moe", tmp_path / str(seed))
    for path in (tmp_path / "1").glob("*.safetensors"):
        save_file({k: t + 0.01 for k, t in load_file(path).items()}, path, {"format": "pt"})
    save_adapter(add_lora(load_backbone(str(tmp_path / "0")), 4, 8.0, 0.0), tmp_path / "a")
    load_adapter(load_backbone(str(tmp_path / "0"), load_4bit=True, dtype="bfloat16"),
                 str(tmp_path / "a"))
    for use in (lambda: load_adapter(load_backbone(str(tmp_path / "1")), str(tmp_path / "a")),
                lambda: load_backbone(str(tmp_path / "1"), merge=str(tmp_path / "a"))):
        with pytest.raises(ValueError, match="was made for other weights .*remove its base.json"):
            use()
    (tmp_path / "a/base.json").unlink()
    load_backbone(str(tmp_path / "1"), merge=str(tmp_path / "a"))


def test_lora_gradients_reach_every_adapted_layer():
    backbone = random_lora(tiny("llada-moe"), router=True)
    batch = rows([60, 60, 60])  # with no masks: alike, they would all go to the same experts
    memdlm.token_nll(backbone,
                     backbone.train().blocks(backbone.embed(batch.x0), batch.valid, 0, None),
                     batch.x0, batch.valid).mean().backward()
    without = [
        n for n, p in backbone.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not without and all(
        ("lora_" in n) == p.requires_grad for n, p in backbone.named_parameters())


# ---- Block-causal attention and block diffusion --------------------------------------------------

def test_block_causal_attention_against_a_mask_by_hand():
    """A token sees its own block of 32 and those before it, counted from the start; padding is
    seen by nobody."""
    backbone = tiny("llada2.1-mini", attention="block")
    valid = torch.arange(70)[None] < torch.tensor([[70], [40]])
    mask = backbone.mask(valid, torch.zeros(2, 70, 1), None)
    for b in range(2):
        for q in range(70):
            for k in range(70):
                assert bool(mask[b, 0, q, k]) == (k // 32 <= q // 32 and bool(valid[b, k]))
    batch = rows([70])
    changed = batch.x0.clone()
    changed[0, 64:] = 7
    a, b = (logits(backbone, x, batch.valid) for x in (batch.x0, changed))
    torch.testing.assert_close(a[:, :64], b[:, :64])
    assert not torch.allclose(a[:, 64:], b[:, 64:])
    with pytest.raises(ValueError, match="--attention block is for LLaDA2.x"):
        tiny("llada-moe", attention="block")


def naive_block_diffusion(backbone, s, x, fill, phi, threshold, edit_threshold, extra_steps=16,
                          eos=True):
    """One row, everything computed anew at every step with the block-causal mask; written from
    the description."""
    backbone.attention = "block"
    n, width = x.shape[1], -(-x.shape[1] // 32) * 32
    prompt = int((~fill).sum())
    canvas = torch.full((1, width), backbone.mask_id)
    canvas[0, :prompt] = x[0, :prompt]
    everything = torch.ones(1, width, dtype=torch.bool)
    for start in range(prompt // 32 * 32, width, 32):
        positions, looks = [i for i in range(start, start + 32) if i >= prompt], 0
        while True:
            masks = [i for i in positions if canvas[0, i] == backbone.mask_id]
            if not masks and (edit_threshold is None or looks >= extra_steps):
                break
            looks += not masks
            out = logits(backbone, canvas[:, :start + 32], everything[:, :start + 32], phi,
                         s)[0].double()
            out[:, backbone.mask_id] = -math.inf
            p, best = out.softmax(-1).max(-1)
            commit = [i for i in masks if p[i] > threshold
                      ] or (masks and [max(masks, key=lambda i: p[i])])
            edits = [] if edit_threshold is None else [
                i for i in positions
                if i not in masks and best[i] != canvas[0, i] and p[i] > edit_threshold
            ]
            for i in [*commit, *edits]:
                canvas[0, i] = best[i]
            if not masks and not edits:
                break
        said = [i for i in positions if canvas[0, i] == backbone.config.eos_id]
        if said:
            canvas[0, start + 32:] = backbone.config.eos_id
            break
    backbone.attention = "full"
    return canvas[:, :n]


@pytest.mark.parametrize(
    "threshold, edit, adapted",
    [(0.2, 0.0, True), *(pytest.param(*case, marks=pytest.mark.slow)
                         for case in ((0.95, None, False), (0.95, None, True), (0.2, None, True),
                                      (0.2, 0.0, False), (0.3, 0.25, False), (0.3, 0.25, True)))])
def test_block_diffusion_with_its_cache_equals_recomputing_everything(threshold, edit, adapted):
    """Rows of different lengths decoded together, against each alone without a cache."""
    backbone, s = tiny("llada2.1-mini"), Settings(layer_fraction=0.5, rank=4, alpha=8.0)
    for seed in range(2):
        batch = rows([70, 40, 85], seed=seed)
        prompts = torch.tensor([[37], [3], [64]])
        fill = batch.valid & (torch.arange(85) >= prompts)
        phi = memdlm.adapt(backbone, s, batch.x0, batch.valid
                           & ~fill, batch.seeds)[0] if adapted else None
        canvases = list(
            block_diffusion(backbone, s, batch.x0, fill, batch.valid, batch.seeds, phi, threshold,
                            edit))
        out = canvases[-1]
        assert (out[fill] != backbone.mask_id).all() and torch.equal(out[batch.valid & ~fill],
                                                                     batch.x0[batch.valid & ~fill])
        for b in range(3):
            one = alone(batch, b)
            own = {k: tuple(w[b:b + 1]
                            for w in pair)
                   for k, pair in phi.items()} if adapted else None
            expected = naive_block_diffusion(backbone, s, one.x0, fill[b:b + 1, :one.x0.shape[1]],
                                             own, threshold, edit)
            assert torch.equal(out[b:b + 1, :one.x0.shape[1]], expected)


def test_phi_is_gone_while_decoding_pauses():
    backbone, batch = tiny("llada2.1-mini"), rows([70])
    plain = logits(backbone, batch.x0, batch.valid)
    phi, _ = memdlm.adapt(backbone, Settings(), batch.x0, batch.valid, [0])
    steps = block_diffusion(backbone, Settings(), batch.x0,
                            torch.arange(70)[None] >= 20, batch.valid, [0], phi)
    next(steps)
    assert torch.equal(plain, logits(backbone, batch.x0, batch.valid))


@pytest.mark.parametrize("stop", [0, 1])
def test_a_row_ends_with_its_turn_or_its_text(folders, stop):
    """And what it did not need is filled up with the end of text."""
    loaded = load_backbone(str(folders / "llada2.1-mini"))
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
    assert backbone.looks == 1 and (canvas[0, 10:32]
                                    == token).all() and (canvas[0, 32:]
                                                         == loaded.config.eos_id).all()


def test_steps_per_block_share_the_block():
    backbone, batch = tiny("llada2.1-mini"), rows([64])
    fill = torch.arange(64)[None] >= 32
    backbone.config = replace(backbone.config, eos_id=319)
    for steps in (1, 5, 10, 20, 24, 32, 40):
        canvases = list(
            block_diffusion(backbone, Settings(), batch.x0, fill, batch.valid, [0], threshold=1.0,
                            steps=steps))
        assert len(canvases) == min(steps, 32)
        taken = [int((a != b).sum()) for a, b in zip(canvases, canvases[1:])]
        assert not taken or max(taken) - min(taken) <= 1


class Stubborn(Backbone):
    """Its head prefers the mask token everywhere, and otherwise a token that changes at every
    look."""
    looks = 0

    def head(self, h):
        self.looks += 1
        out = torch.zeros(*h.shape[:-1], self.vocab_size)
        out[..., self.mask_id] = 50
        out[..., 10 + self.looks % 2] = 20
        return out


@pytest.mark.parametrize("edit", [None, 0.0])
def test_block_diffusion_is_bounded_and_never_writes_a_mask(edit):
    model = tiny("llada2.1-mini")
    backbone, batch = Stubborn(model.network, model.config), rows([70])
    fill = torch.arange(70)[None] >= 5
    for canvas in block_diffusion(backbone, Settings(), batch.x0, fill, batch.valid, [0],
                                  threshold=0.95, edit_threshold=edit):
        pass
    assert (canvas != backbone.mask_id).all() and backbone.looks <= 3 * (32 + 16)


def test_cached_decoding_computes_few_positions():
    """At most prompt + 33 positions per new token:

    32 steps of 32 and one pass to keep the block, when nothing is sure.
    """
    backbone, computed = tiny("llada2.1-mini"), []
    real = backbone.embed
    backbone.embed = lambda ids: computed.append(ids.shape[1]) or real(ids)
    batch = rows([256 + 64])
    fill = torch.arange(320)[None] >= 256
    backbone.config = replace(backbone.config, eos_id=319)  # never said
    for _ in block_diffusion(backbone, Settings(), batch.x0, fill, batch.valid, [0], threshold=1.0):
        pass
    assert sum(computed) <= 256 + 33 * 64 and computed[0] == 256


@pytest.mark.parametrize("name", NAMES)
def test_temperature_is_seeded_and_different_seeds_differ(name):
    backbone, batch = tiny(name), rows([40])
    fill = torch.arange(40)[None] >= 10
    def run(seed):
        for x in backbone.decoder(backbone, Settings(), batch.x0, fill, batch.valid, [seed],
                                  temperature=1.0):
            pass
        return x
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


# ---- Text ----------------------------------------------------------------------------------------

RECORDS = [{"prompt": "Hi there", "response": "Hello."}, {
    "instruction": "Add", "input": "1 2", "output": "3"
}, {"instruction": "Say hi", "output": "hi"}, {"instruction": "Say", "input": "", "output": "ho"}, {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"},
                 {"role": "assistant", "content": "Me."}]
}]


def test_records_become_chat_messages():
    turns = [chat_turns(r) for r in RECORDS]
    assert turns[0] == [{"role": "user", "content": "Hi there"},
                        {"role": "assistant", "content": "Hello."}]
    assert turns[1][0]["content"] == "Add\n\n1 2" and turns[2][0]["content"] == "Say hi" and turns[
        3][0]["content"] == "Say"
    assert [t["role"] for t in turns[4]] == ["system", "user", "assistant"]
    for bad in ({}, {"prompt": "x"}, {"prompt": "", "response": "y"}, {
            "prompt": 3, "response": "y"
    }, [], "x", {"messages": []}, {
            "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    }, {"messages": [{"role": "user", "content": "a"},
                     {"role": "assistant",
                      "content": ""}]}, {"messages": ["a",
                                                      "b"]}, {"instruction": "x", "output": None}):
        with pytest.raises(ValueError):
            chat_turns(bad)


def test_the_chat_template_splits_prompt_and_reply(folder):
    backbone = load_backbone(str(folder))
    prompt, reply = backbone.tokenizer.chat(chat_turns(RECORDS[4]))
    text = backbone.tokenizer.hf.decode(prompt + reply)
    assert text == ("<role>SYSTEM</role>Be brief.<|role_end|><role>HUMAN</role>Who?<|role_end|>"
                    "<role>ASSISTANT</role>Me.<|role_end|>")
    assert backbone.tokenizer.hf.decode(reply) == "Me.<|role_end|>"
    for text in ("a <|mask|> b", "<|endoftext|>", "<role>HUMAN</role>"):
        with pytest.raises(ValueError, match="special token"):
            backbone.tokenizer.chat([{"role": "user", "content": text}])


ALWAYS = TEMPLATE.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
UNENDED = ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
           "{% if add_generation_prompt %}[assistant] {% endif %}")
STRICT = ("{% for m in messages %}{% if m['role'] == 'system' %}"
          "{{ raise_exception('no system role') }}{% endif %}{% endfor %}" + TEMPLATE)


# Goes on with the next turn's header: not part of the reply.
# Its end of turn is no token of this tokenizer: prompt and reply are joined.
@pytest.mark.parametrize("template, reply", [
    (ALWAYS, "Hello.<|role_end|>"),
    (UNENDED, "Hello.<|endoftext|>"),
    (None, "Hello.<|endoftext|>"), ("{{ raise_exception('no') }}", "Hello.<|endoftext|>")])
def test_templates_that_other_models_come_with(folders, tmp_path, template, reply):
    folder = tmp_path / "model"
    shutil.copytree(folders / "llada-moe", folder)
    (folder / "chat_template.jinja").unlink()
    if template:
        (folder / "chat_template.jinja").write_text(template)
    backbone = load_backbone(str(folder))
    prompt, ids = backbone.tokenizer.chat(chat_turns(RECORDS[0]))
    decode = backbone.tokenizer.hf.decode
    assert decode(ids) == reply and ids[-1] in backbone.tokenizer.stop_ids
    assert backbone.tokenizer.templated == (template == ALWAYS)
    assert decode(prompt) == ("<role>HUMAN</role>Hi there<|role_end|><role>ASSISTANT</role>"
                              if template == ALWAYS else "Hi there\n\n")
    data = ChatData(backbone, [chat_turns(RECORDS[0])] * 3)
    assert ("no usable chat template" in data.note) == (template != ALWAYS)


def test_a_template_that_refuses_a_role_is_one_line(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders / "llada-moe", folder)
    (folder / "chat_template.jinja").write_text(STRICT)
    tokenizer = load_backbone(str(folder)).tokenizer
    assert tokenizer.templated
    with pytest.raises(ValueError, match="refuses these messages: no system role"):
        tokenizer.chat(chat_turns(RECORDS[4]))


def test_only_tokens_with_a_meaning_are_refused_in_text(folders, tmp_path):
    """The published tokenizers have 262 added tokens; [CLS] in a paper on NLP is no reason to
    drop it."""
    folder = tmp_path / "model"
    shutil.copytree(folders / "llada-moe", folder)
    from transformers import PreTrainedTokenizerFast
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    fast.add_special_tokens({"cls_token": "[CLS]", "bos_token": "<|startoftext|>"})
    fast.save_pretrained(folder)
    tokenizer = load_backbone(str(folder)).tokenizer
    assert tokenizer.chat([{"role": "user", "content": "a [CLS] b"}])
    for token in ("<|mask|>", "<|endoftext|>", "<|role_end|>", "<role>", "</role>",
                  "<|startoftext|>"):
        with pytest.raises(SpecialToken, match="special token"):
            tokenizer.chat([{"role": "user", "content": f"a {token} b"}])


def test_the_models_mask_is_the_tokenizers_mask(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders / "llada-moe", folder)
    edit("config.json", mask_token_id=260)(folder)
    backbone = load_backbone(str(folder))
    assert backbone.mask_id == backbone.tokenizer.mask_id == 260


def test_filter_truncation_split_and_summary(folders):
    backbone = load_backbone(str(folders / "llada-moe"))
    records = [
        chat_turns({"prompt": "p" * (i % 7 + 1), "response": "r" * (i + 1)}) for i in range(100)
    ]
    records += [
        chat_turns({"prompt": "x" * 500, "response": "y"}),
        chat_turns({"prompt": "a<|mask|>", "response": "y"})
    ]
    overhead = len(backbone.tokenizer.chat(records[0])[0]) - 1
    data = ChatData(backbone, records, max_length=100, where="here", bad=3)
    lengths = {len(s.prompt) + len(s.rest) for part in data.pairs.values() for s in part}
    kept = sum(overhead + i % 7 + 1 + i + 1 + 1 <= 100 for i in range(100))
    assert sum(map(len, data.pairs.values())) == kept and max(lengths) <= 100
    assert len(
        data.pairs["test"]
    ) == kept // 20 and f"{100 - kept + 1} too long, 0 cut, 1 with special tokens" in data.note
    assert "3 malformed" in data.note and all(all(s.answer) for s in data.pairs["train"])
    cut = ChatData(backbone, records, max_length=100, truncate=True)
    assert sum(map(len, cut.pairs.values())) == 100 and f"1 too long, {100 - kept} cut" in cut.note
    again, other = (ChatData(backbone, records, max_length=100, split_seed=n) for n in (42, 43))
    assert again.pairs == data.pairs and other.pairs["test"] != data.pairs["test"]
    n = len(data.pairs["train"])
    epochs = [[data.train(None, 0, e * n + i) for i in range(n)] for e in range(2)]
    key = lambda s: (s.prompt, s.rest)
    assert sorted(epochs[0], key=key) == sorted(epochs[1], key=key) == sorted(
        data.pairs["train"], key=key) and epochs[0] != epochs[1]
    with pytest.raises(ValueError, match="raise --max-length"):
        ChatData(backbone, records, max_length=10)


def test_padding_as_end_tokens_is_a_setting(folders):
    s = Settings(model=str(folders / "llada-moe"), eos_loss=True, batch=3)
    backbone = load_backbone(s.model)
    data = ChatData(backbone,
                    [chat_turns({"prompt": "p", "response": "r" * n}) for n in (1, 9, 20, 4, 5)])
    ours, theirs = (train.make_batch(replace(s, eos_loss=on), data, 0) for on in (False, True))
    pad = ~ours.valid
    assert pad.any() and not (ours.maskable & pad).any()
    assert theirs.valid.all() and (theirs.x0[pad]
                                   == backbone.config.eos_id).all() and theirs.maskable[pad].all()
    assert torch.equal(theirs.x0[~pad], ours.x0[~pad]) and torch.equal(
        theirs.maskable[~pad], ours.maskable[~pad])


# ---- The plan ------------------------------------------------------------------------------------

def saved_bytes(function):
    """What autograd keeps of a forward pass, each storage once, without parameters."""
    seen = {}

    def pack(x):
        if not isinstance(x, nn.Parameter):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function()
    return sum(seen.values()), out


@pytest.mark.parametrize("lora_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_plans_activations_are_those_that_autograd_keeps(name, lora_dtype):
    """One layer, 256 tokens wide enough that nothing but the counted tensors matters."""
    raw = PUBLISHED[name] | TINY[name] | {"mask_token_id": 301, "eos_token_id": 300}
    raw |= {
        k: 4 * raw[k]
        for k in ("hidden_size", "d_model", "expert_intermediate_size", "moe_intermediate_size",
                  "mlp_hidden_size", "head_dim")
        if k in raw
    }
    backbone = load_backbone(raw, random=True, dtype="bfloat16", device="cpu", load_4bit=True)
    s = Settings(model="x", load_4bit=True, lora_rank=4, lora_dtype=lora_dtype, dtype="bfloat16",
                       optimizer="adamw8bit")
    add_lora(backbone, 4, 8.0, s.lora_dropout, dtype=lora_dtype)
    backbone.train()
    h = torch.randn(1, 256, backbone.config.width, dtype=torch.bfloat16, requires_grad=True)
    valid = torch.ones(1, 256, dtype=torch.bool)
    kept, _ = saved_bytes(lambda: backbone.blocks(h, valid, 2, 3))
    # As on a CPU.
    planned = 256 * kept_per_token(backbone.config, s, 2, mask={"float32": 4, "bfloat16": 2
                                                                }[lora_dtype])
    assert 0.95 < kept / planned < 1.08, (kept, planned)


def test_the_plan_counts_what_is_loaded():
    raw = PUBLISHED["llada-moe"] | TINY["llada-moe"] | {"mask_token_id": 301, "eos_token_id": 300}
    backbone = load_backbone(raw, random=True, dtype="bfloat16", device="cpu", load_4bit=True)
    s = Settings(model="x", load_4bit=True, dtype="bfloat16", lora_rank=4, rank=4)
    parts = [size for _, size in memory_plan(backbone.config, s, 100)]
    held = sum(p.numel() * p.element_size() for p in backbone.parameters())
    for m in backbone.modules():
        if hasattr(m, "quant_state"):
            q = m.weight.quant_state
            held += q.absmax.numel() * q.absmax.element_size() + q.state2.absmax.numel(
            ) * q.state2.absmax.element_size()
    assert abs(parts[0] - held) / held < 0.02
    add_lora(backbone, 4, 8.0, 0.0)
    lora = lora_weights(backbone).values()
    assert parts[1] == parts[2] == sum(4 * p.numel() for p in lora) and parts[3] == 2 * parts[1]
    for optimizer in ("adamw8bit", "paged_adamw8bit"):  # what bitsandbytes really makes
        for n in (4095, 4096, 65_600, 99_999):
            p = nn.Parameter(torch.ones(n))
            p.grad = torch.ones(n)
            made = train.make_optimizer(replace(s, optimizer=optimizer), [p])
            made.step()
            held = sum(v.numel() * v.element_size()
                       for k, v in made.state[p].items()
                       if torch.is_tensor(v) and "qmap" not in k)
            assert held == optimizer_bytes(optimizer, n, 4)
    phi = memdlm.fresh_phi(backbone, s, [0])
    assert parts[4] == 3 * sum(4 * w.numel() for pair in phi.values() for w in pair)


def test_rounding_at_random_is_right_on_average_and_keeps_what_bfloat16_can_hold():
    torch.manual_seed(0)
    x = torch.tensor([0.0, 1.0, -3.5, 2.0 ** -20, 1e30])
    exact = x.to(torch.bfloat16).float()
    assert all(
        torch.equal(train.round_at_random(exact), exact.to(torch.bfloat16)) for _ in range(20))
    x = torch.full((200_000,), 0.02 + 2e-5)
    rounded = train.round_at_random(x).float()
    assert len(rounded.unique()) == 2 and abs(rounded.mean() - x[0]) < 2e-6
    torch.testing.assert_close(train.round_at_random(-x).float().mean(), -x[0], rtol=1e-4, atol=0)


def test_small_updates_of_a_bfloat16_lora_are_not_lost():
    """A thousand steps of 2e-5 on weights of 0.02, where bfloat16's neighbours are 1.2e-4 apart."""
    import bitsandbytes as bnb
    s, moved = Settings(model="x", lora_dtype="bfloat16", optimizer="adamw8bit", lr=2e-5), {}
    for name, make in (("ours", lambda p: train.make_optimizer(s, p)),
                       ("plain", lambda p: bnb.optim.AdamW8bit(p, lr=2e-5, weight_decay=0.0))):
        torch.manual_seed(0)
        p = nn.Parameter(torch.full((8192,), 0.02, dtype=torch.bfloat16))
        optimizer, start = make([p]), 0.02
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[name] = float(start - p.detach().float().mean())
    assert abs(moved["ours"] - 200 * 2e-5) < 0.1 * 200 * 2e-5 and abs(
        moved["plain"]) < 0.02 * 200 * 2e-5


# ---- All experts in one product ------------------------------------------------------------------

@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("load_4bit", [False, True])
@pytest.mark.parametrize("name", ["llada-moe", "llada2.1-mini"])
def test_experts_at_once_are_the_experts_one_by_one(name, load_4bit, per_sample, adapter,
                                                    monkeypatch):
    """A whole training step with LoRA and fast weights:

    loss, inner losses and every gradient. Some experts are idle.
    """
    backbone = tiny(name, load_4bit=load_4bit)
    add_lora(backbone, 8, 16.0, 0.0)
    for i, (key, p) in enumerate(sorted(backbone.named_parameters())):
        if "lora_" in key:
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    s = Settings(per_sample=per_sample, rank=8, alpha=8.0, layer_fraction=0.5, adapter=adapter)
    calls, seen = [], {}
    real = grouped_linear
    monkeypatch.setattr(experts_module, "grouped_linear", lambda *a: calls.append(1) or real(*a))
    for on in (False, True):
        grouped(backbone, on)
        backbone.train().zero_grad()
        loss, record = MemDLM(backbone, s)(rows([12, 3, 9], prompt=1))
        loss.backward()
        seen[on] = loss.item(), record["inner"], {
            n: p.grad
            for n, p in backbone.named_parameters()
            if p.requires_grad
        }
        assert bool(calls) == on
        assert not any("fast" in m.__dict__ for m in backbone.modules())
    assert abs(seen[False][0] - seen[True][0]) < 1e-5 and torch.allclose(
        seen[False][1], seen[True][1], atol=1e-5)
    for key, want in seen[False][2].items():
        got = seen[True][2][key]
        assert got.abs().max() == 0 if want is None else (
            got - want).norm() <= 1e-5 * want.norm() + 1e-8, key


def test_all_weights_train_with_experts_at_once():
    backbone = tiny("llada-moe").requires_grad_(True)
    seen = []
    for on in (False, True):
        grouped(backbone, on)
        backbone.zero_grad()
        MemDLM(backbone, Settings(memory=False))(rows([40, 30]))[0].backward()
        seen.append({n: p.grad for n, p in backbone.named_parameters()})
    for key, want in seen[0].items():
        assert want is None or (seen[1][key] - want).norm() <= 1e-5 * want.norm() + 1e-9, key


def test_weights_put_side_by_side_are_bit_for_bit_those_unpacked_one_by_one():
    from bitsandbytes.functional import dequantize_4bit
    backbone = tiny("llada-moe", load_4bit=True)
    layers = [
        expert.up_proj for expert in next(m for m in backbone.modules() if isinstance(m, Experts))
    ]
    whole = stack_weights(layers, torch.float32)
    for got, layer in zip(whole, layers):
        want = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        assert torch.equal(got, want)


def test_settings_and_loading_choose_the_experts(folders):
    for experts in ("loop", "grouped"):
        backbone = load_backbone(str(folders / "llada-moe"), experts=experts)
        assert {m.grouped
                for m in backbone.modules()
                if isinstance(m, Experts)} == {experts == "grouped"}
    with pytest.raises(ValueError, match="multiples of 8"):
        Settings(model="x", experts="grouped", rank=12)


# ---- Only the rows that are read -----------------------------------------------------------------

@pytest.mark.parametrize("per_sample", [False, True])
def test_rows_that_are_read_are_as_if_all_were_computed(name_of, per_sample):
    """The last feed-forward runs on the needed rows alone; values and the gradients of theta and
    phi are the same."""
    backbone, batch = tiny(name_of), rows([40, 11, 67])
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
    backbone, batch = tiny("llada-moe"), rows([20, 20])
    seen = []
    backbone.core.model.layers[-1].mlp.experts.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))
    need = torch.zeros_like(batch.valid)
    need[0, 3:6] = True
    for rows_read in (need, None, torch.zeros_like(need)):
        memdlm.upper_layers(backbone, Settings(),
                            memdlm.lower_layers(backbone, Settings(), batch.x0, batch.valid),
                            batch.valid, None, rows_read)
    assert seen == [3, 40, 40]  # with gradients all must take part if none is read, for DDP
    with torch.no_grad():
        h = memdlm.lower_layers(backbone, Settings(), batch.x0, batch.valid)
        memdlm.upper_layers(backbone, Settings(), h, batch.valid, None, torch.zeros_like(need))
    assert seen == [3, 40, 40]


# ---- What the host waits for ---------------------------------------------------------------------

def test_a_step_reads_one_number_back_per_moe_layer(monkeypatch):
    """Masks live on the host, hidden states on the device.

    Nothing that is computed from hidden states is read, but each MoE layer's counts, once a pass;
    with all experts at once not even these.
    """
    backbone = tiny("llada-moe")
    add_lora(backbone, 8, 16.0, 0.05)
    passes = []
    for m in backbone.modules():
        if isinstance(m, Experts):
            m.register_forward_hook(lambda *a: passes.append(1))
    reads = []
    for method in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "numpy"):
        def spy(self, *a, real=getattr(torch.Tensor, method), method=method, **k):
            import sys
            caller = sys._getframe(1)
            name = caller.f_code.co_name
            if "backbones" in caller.f_code.co_filename or "memdlm.py" in caller.f_code.co_filename:
                reads.append((name, method))
            return real(self, *a, **k)
        monkeypatch.setattr(torch.Tensor, method, spy)
    # Of masks and counts of masks.
    on_the_host = {"blocks", "mask", "add_feed_forward", "stage_loss"}
    for on in (False, True):
        grouped(backbone, on)
        for s in (Settings(rank=8), Settings(rank=8, memory=False)):
            reads.clear(), passes.clear()
            MemDLM(backbone.train(), s)(rows([30, 20]), report=False)[0].backward()
            assert reads.count(
                ("run_one_by_one", "tolist")) == (0 if on else len(passes)) and len(passes) >= 4
            assert {name for name, _ in reads} - on_the_host <= {"run_one_by_one"}
