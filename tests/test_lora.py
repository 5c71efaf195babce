"""Adapters: saved, loaded, merged, refused."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import memdlm
from backbones.backbone import Backbone, build_network
from backbones.checkpoint import hub_weights, load_backbone, load_weights
from backbones.families import FAMILIES
from backbones.lora import add_lora, load_adapter, lora_weights, merge_adapter, save_adapter
from tiny_models import (
    all_logits, random_batch, random_lora, take_stacks_apart, tiny_backbone,
)


@pytest.mark.slow
@pytest.mark.parametrize("name, router", [("llada-8b", False), ("llada-moe", False),
                                          ("llada-moe", True), ("llada2.1-mini", False)])
def test_adapters_save_in_peft_format_and_load_live_merged_and_with_plain_peft(
        name, router, tmp_path):
    from peft import PeftModel
    batch = random_batch([12, 7])
    backbone = random_lora(tiny_backbone(name), router=router)
    expected = all_logits(backbone, batch.x0, batch.valid)
    plain = all_logits(tiny_backbone(name), batch.x0, batch.valid)
    assert not torch.allclose(expected, plain, atol=1e-2)
    save_adapter(backbone, tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors"}
    keys = load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    head = f"base_model.model.{FAMILIES[backbone.config.family].head}."
    assert not any(key.startswith(head) for key in keys)
    if name == "llada-moe":
        assert "base_model.model.model.layers.3.mlp.experts.5.up_proj.lora_A.weight" in keys
        assert ("base_model.model.model.layers.3.mlp.gate.lora_A.weight" in keys) == router
    live = load_adapter(tiny_backbone(name), str(tmp_path / "adapter"))
    assert torch.equal(all_logits(live, batch.x0, batch.valid), expected)
    other = tiny_backbone(name)
    single = take_stacks_apart(other.network)
    other.network = PeftModel.from_pretrained(single, tmp_path / "adapter")
    torch.testing.assert_close(all_logits(other, batch.x0, batch.valid), expected)
    # The way back: what PEFT writes of its own, for single experts, is read as ours.
    other.network.save_pretrained(tmp_path / "theirs")
    theirs = load_adapter(tiny_backbone(name), str(tmp_path / "theirs"))
    assert torch.equal(all_logits(theirs, batch.x0, batch.valid), expected)
    # Merging adds the adapter to the weights of a checkpoint on disk, before they are quantised.
    weights = hub_weights(tiny_backbone(name).network)
    network = build_network(backbone.config)
    source = merge_adapter(lambda key, shape: weights[key], str(tmp_path / "adapter"), network,
                           name, backbone.config)
    load_weights(network, source, torch.float32, "cpu")
    merged = Backbone(network.eval(), backbone.config)
    torch.testing.assert_close(all_logits(merged, batch.x0, batch.valid), expected, rtol=1e-3,
                               atol=1e-3)


@pytest.mark.slow
def test_adapters_that_do_not_fit_are_refused(tmp_path):
    source = tmp_path / "adapter"
    save_adapter(random_lora(tiny_backbone("llada-moe")), source)
    up = "base_model.model.model.layers.{}.mlp.experts.0.up_proj.lora_A.weight"
    extra = {up.format(9): torch.zeros(4, 64)}
    on_head = {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}
    other_base = "x/LLaDA-MoE-Instruct"
    cases = {
        "made for another model|adapts": lambda c, w: None,  # LLaDA2.1 below
        "only plain LoRA": lambda c, w: c.update(use_dora=True),
        "modules_to_save": lambda c, w: c.update(modules_to_save=["lm_head"]),
        "r 0": lambda c, w: c.update(r=0),
        "keys do not fit": lambda c, w: w.pop(up.format(0)),
        "1 of .* keys do not fit": lambda c, w: w.update(extra),
        "adapts .*lm_head": lambda c, w: w.update(on_head),
        "initialised by .pissa": lambda c, w: c.update(init_lora_weights="pissa"),
        f"was made for {other_base}": lambda c, w: c.update(base_model_name_or_path=other_base),
    }
    for says, change in cases.items():
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = load_file(folder / "adapter_model.safetensors")
        change(config, weights)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(weights, folder / "adapter_model.safetensors")
        backbone = tiny_backbone("llada2.1-mini" if says.startswith("made") else "llada-moe")
        backbone.name = "x/LLaDA-MoE-Base"
        with pytest.raises(ValueError, match=says) as error:
            load_adapter(backbone, str(folder))
        assert "\n" not in str(error.value)


def test_the_name_of_the_base_is_compared_where_it_says_something(tmp_path):
    backbone = random_lora(tiny_backbone("llada-moe"))
    save_adapter(backbone, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    base = "x/LLaDA-MoE-Base"
    mixed = f"{base} merged with y"
    for theirs, ours, fits in ((None, base, True),
                               ("models/my-moe", base, True),
                               ("other/LLaDA-MoE-Base", base, True),
                               ("other/LLaDA-MoE-Chat", base, False),
                               (mixed, base, False),
                               (mixed, mixed, True)):
        config = json.loads(path.read_text()) | {"base_model_name_or_path": theirs}
        path.write_text(json.dumps(config))
        other = tiny_backbone("llada-moe")
        other.name = ours
        if fits:
            load_adapter(other, str(tmp_path / "adapter"))
        else:
            with pytest.raises(ValueError, match="was made for"):
                load_adapter(other, str(tmp_path / "adapter"))


@pytest.fixture(scope="module")
def adapter(tiny_models, tmp_path_factory):
    """A tiny model's folder, and an adapter for it. Do not change them."""
    folder = tmp_path_factory.mktemp("lora") / "a"
    save_adapter(random_lora(load_backbone(str(tiny_models / "llada-moe"))), folder)
    return str(tiny_models / "llada-moe"), folder


def change_adapter(adapter, tmp_path, config=None, weights=None):
    """A copy with other fields in its config, and with a function applied to its tensors."""
    shutil.copytree(adapter, tmp_path / "b")
    path, file = tmp_path / "b/adapter_config.json", tmp_path / "b/adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    tensors = load_file(file)
    if weights:
        weights(tensors)
    save_file(tensors, file)
    return str(tmp_path / "b")


STEM = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def put(stem, rows, columns):
    """A function that adds a LoRA on a layer [rows, columns]."""
    return lambda w: w.update({f"base_model.model.{stem}.lora_A.weight": torch.zeros(4, columns),
                               f"base_model.model.{stem}.lora_B.weight": torch.zeros(rows, 4)})


@pytest.mark.parametrize("config", [
    {"r": 4.0}, {"exclude_modules": "lm_head"}, {"never_heard_of": None}, {"use_dora": None},
    {"init_lora_weights": "gaussian", "task_type": "CAUSAL_LM", "peft_version": "0.99"},
    {"layers_to_transform": [], "alora_invocation_tokens": None, "rank_pattern": {}}])
def test_other_words_for_a_plain_lora(adapter, tmp_path, config):
    model, folder = adapter
    folder = change_adapter(folder, tmp_path, config)
    load_adapter(load_backbone(model), folder)
    load_backbone(model, merge=folder)


@pytest.mark.parametrize("config, weights, says", [
    *(({key: value}, None, f"has '{key}'") for key, value in [
        ("alora_invocation_tokens", [258, 259]), ("never_heard_of", 1), ("use_rslora", True),
        ("corda_config", {"a": 1}), ("eva_config", {"a": 1}), ("loftq_config", {"loftq_bits": 4}),
        ("trainable_token_indices", [3]), ("layers_to_transform", [0]), ("bias", "all"),
        ("exclude_modules", ["q_proj"]), ("rank_pattern", {"q_proj": 8}), ("lora_bias", True),
        ("use_qalora", True), ("megatron_config", {"a": 1}), ("ensure_weight_tying", True)]),
    *(({"lora_alpha": alpha}, None, says) for alpha, says in [
        (float("nan"), "NaN is not finite"), (float("inf"), "Infinity is not finite"),
        (1e308, "lora_alpha 1e.308 must be"), (0, "lora_alpha 0 must be"),
        ("8", "lora_alpha '8'"), (True, "lora_alpha True"), (None, "lora_alpha None")]),
    *(({"r": r}, None, says) for r, says in [
        (8.9, "r 8.9 must be a whole number"), (True, "r True"), ([4], r"r \[4\]"),
        (65536, "224 of 224 keys do not fit"), (10**6, "r 1000000 must be")]),
    ({"init_lora_weights": "eva"}, None, "initialised by 'eva'"),
    ({"peft_type": "IA3"}, None, "has no peft_type LORA"),
    ({"base_model_name_or_path": "\x1b[2J"}, None, r"is '\\x1b\[2J', which is no name"),
    (None, lambda w: w.update({STEM + "A.weight": w[STEM + "A.weight"].long()}), "holds I64"),
    (None, lambda w: w.update({STEM + "A.weight": w[STEM + "A.weight"].double() + 1e300}),
     "not finite"),
    (None, put("model.layers.0.input_layernorm", 64, 64), "adapts .*input_layernorm"),
    (None, put("model.layers.0.self_attn.q_norm", 16, 16), "adapts .*q_norm"),
    (None, put("model.embed_tokens", 64, 320), "adapts .*embed_tokens"),
    (None, put("lm_head", 320, 64), "adapts .*lm_head"),
    (None, lambda w: w.update({"model.norm.weight": torch.zeros(64)}), "adapts 'model.norm"),
    (None, lambda w: w.update({STEM[:-5] + "lora_magnitude_vector": torch.zeros(64)}),
     "1 of 225 keys do not fit"),
    (None, lambda w: w.update({STEM + "A.weight": torch.zeros(64)}), "1 of 224 keys do not fit"),
    (None, lambda w: w.pop(STEM + "A.weight"), "they are missing|only A or only B"),
    (None, lambda w: w.clear(), "adapts nothing")])
def test_other_adapters_are_named_and_refused_live_and_merged(adapter, tmp_path, config, weights,
                                                              says):
    model, folder = adapter
    folder = change_adapter(folder, tmp_path, config, weights)
    for use in (lambda: load_adapter(load_backbone(model), folder),
                lambda: load_backbone(model, merge=folder)):
        with pytest.raises(ValueError, match=says) as error:
            use()
        assert str(error.value).isprintable()


def test_the_head_of_llada_8b_has_a_layers_name_and_is_not_merged_into(tiny_models, tmp_path):
    model = str(tiny_models / "llada-8b")
    save_adapter(random_lora(load_backbone(model)), tmp_path / "a")
    head = put("model.transformer.ff_out", 320, 64)
    folder = change_adapter(tmp_path / "a", tmp_path, None, head)
    for use in (lambda: load_adapter(load_backbone(model), folder),
                lambda: load_backbone(model, merge=folder)):
        with pytest.raises(ValueError, match="2 of 58 keys do not fit"):
            use()


def test_an_adapter_on_other_weights_of_the_same_shape_is_refused(tiny_models, tmp_path):
    for seed in (0, 1):
        shutil.copytree(tiny_models / "llada-moe", tmp_path / str(seed))
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


def test_an_adapter_says_where_logits_were_and_how_tokens_looked(tmp_path, tiny_models, capsys):
    model = str(tiny_models / "qwen3-0.6b")
    trained = random_lora(load_backbone(model, shift=True, attention="causal:2"))
    save_adapter(trained, tmp_path / "a")
    uses = (lambda **sight: load_adapter(load_backbone(model, **sight), str(tmp_path / "a")),
            lambda **sight: load_backbone(model, merge=str(tmp_path / "a"), **sight))
    for use in uses:
        use(shift=True, attention="causal:2")
        assert capsys.readouterr().out == ""
        use(shift=True)
        assert "was trained with --attention 'causal:2', not with full" in capsys.readouterr().out
        with pytest.raises(ValueError, match="was trained with --shift; add it"):
            use(attention="causal:2")
    (tmp_path / "a/base.json").write_text("{}")  # as of a stranger, who says nothing
    for use in uses:
        use()
    assert capsys.readouterr().out == ""


def test_lora_gradients_reach_every_adapted_layer():
    backbone = random_lora(tiny_backbone("llada-moe"), router=True)
    # The batch has no masks, for these are all alike and would go to the same experts.
    batch = random_batch([60, 60, 60])
    h = backbone.train().blocks(backbone.embed(batch.x0), batch.valid, 0, None)
    memdlm.token_nll(backbone, h, batch.x0, batch.valid).mean().backward()
    for name, p in backbone.named_parameters():
        assert p.requires_grad == ("lora_" in name), name
        assert not p.requires_grad or (p.grad is not None and p.grad.any()), name


# ---- Scale, seed and scope, by hand -------------------------------------------------------------

@pytest.mark.parametrize("alpha", [3.0, 12.0])
def test_the_product_is_scaled_by_alpha_over_rank_live_and_merged(alpha, tmp_path):
    """W + (alpha / 4) B A of one matrix, with alpha / r = 3 / 4 and 3."""
    backbone = add_lora(tiny_backbone("llada-8b"), 4, alpha, 0.0)
    generator = torch.Generator().manual_seed(0)
    for p in lora_weights(backbone).values():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    save_adapter(backbone, tmp_path / "adapter")
    path = "model.transformer.blocks.2.up_proj"
    A, B = (load_file(tmp_path / "adapter/adapter_model.safetensors")[
        f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
    weights = tiny_backbone("llada-8b").network.state_dict()
    W = weights[f"{path}.weight"]
    want = W.double() + alpha / 4 * B @ A

    x = torch.randn(5, 64, generator=generator)
    live = load_adapter(tiny_backbone("llada-8b"), str(tmp_path / "adapter"))
    for one in (backbone, live):
        out = one.core.get_submodule(path)(x)
        torch.testing.assert_close(out.double(), x.double() @ want.T, rtol=1e-4, atol=1e-5)

    network = build_network(backbone.config)

    def merged(dtype):
        source = merge_adapter(lambda key, shape: weights[key].to(dtype), str(tmp_path / "adapter"),
                               network, "llada-8b", backbone.config)
        return source(f"{path}.weight", W.shape)

    torch.testing.assert_close(merged(torch.float32).double(), want, rtol=1e-5, atol=1e-6)
    # In bfloat16 the sum is rounded once. Product and sum, each rounded, would often differ.
    (tmp_path / "adapter/base.json").unlink()
    low = W.bfloat16()
    once = (low.double() + alpha / 4 * B @ A).bfloat16()
    twice = low + (alpha / 4 * B @ A).bfloat16()
    assert (merged(torch.bfloat16) == once).float().mean() > 0.999
    assert (twice == once).float().mean() < 0.95


def test_the_seed_decides_a_and_b_is_zero():
    made = [lora_weights(add_lora(tiny_backbone("llada-8b"), 4, 8.0, 0.0, seed=seed))
            for seed in (1, 1, 2)]
    for key, p in made[0].items():
        assert torch.equal(p, made[1][key])
        assert torch.equal(p, made[2][key]) == ("lora_B" in key)
        assert bool(p.any()) == ("lora_A" in key)


@pytest.mark.parametrize("scope, names", [
    ("attention", {"q_proj", "k_proj", "v_proj", "attn_out"}),
    ("all", {"q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"})])
def test_a_scope_adapts_its_layers_of_every_block_and_not_the_head(scope, names):
    """LLaDA-8B's head is called ff_out, like a layer of its blocks. It is left alone."""
    keys = lora_weights(add_lora(tiny_backbone("llada-8b"), 4, 8.0, 0.0, scope))
    stems = {key.rpartition(".lora_")[0].removeprefix("base_model.model.") for key in keys}
    assert stems == {f"model.transformer.blocks.{i}.{name}" for i in range(4) for name in names}


def test_a_loaded_adapter_has_the_dropout_and_precision_that_were_asked_for(tmp_path):
    save_adapter(random_lora(tiny_backbone("llada-8b")), tmp_path / "adapter")
    live = load_adapter(tiny_backbone("llada-8b"), str(tmp_path / "adapter"), 0.25, "bfloat16")
    rates = {m.p for m in live.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}
    assert {p.dtype for p in lora_weights(live).values()} == {torch.bfloat16}


def test_an_adapter_of_experts_alone_is_read(tmp_path):
    """PEFT has nothing to do then: there is no plain linear layer among what is adapted."""
    whole = random_lora(tiny_backbone("llada-moe"))
    save_adapter(whole, tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    tensors = {key: w for key, w in load_file(path).items() if ".experts." in key}
    save_file(tensors, path)
    live, batch = load_adapter(tiny_backbone("llada-moe"), str(tmp_path / "a")), random_batch([9])
    assert live.has_lora and lora_weights(live).keys() == tensors.keys()
    assert {n.rpartition(".")[2] for n, p in live.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B"}
    save_adapter(live, tmp_path / "b")
    again = load_file(tmp_path / "b/adapter_model.safetensors")
    assert all(torch.equal(again[key], w) for key, w in tensors.items())
    plain = all_logits(tiny_backbone("llada-moe"), batch.x0, batch.valid)
    assert not torch.allclose(all_logits(live, batch.x0, batch.valid), plain, atol=1e-2)
