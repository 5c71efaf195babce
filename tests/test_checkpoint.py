"""From a folder to a backbone: loading, refusals, 4 bits."""
import json
import os
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import memdlm
import train
from backbones.checkpoint import choose_dtype, describe, hub_weights, load_backbone
from backbones.experts import Stack
from backbones.families import FAMILIES, PUBLISHED, TINY, read_config, translate
from backbones.lora import add_lora
from data import read_data
from files import model_folder
from settings import Settings
from tiny_models import EACH, dequantised, edit_json, random_batch, tiny_backbone


# ---- Loading ------------------------------------------------------------------------------------

def test_a_checkpoint_loads_as_it_is_and_says_what_it_loaded(folder):
    backbone = load_backbone(str(folder))
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    ours = hub_weights(backbone.network)
    assert stored.keys() == ours.keys() and all(torch.equal(stored[k], ours[k]) for k in stored)
    assert backbone.mask_id == backbone.tokenizer.mask_id
    assert backbone.config.eos_id == backbone.tokenizer.eos_id
    assert not any(p.requires_grad for p in backbone.parameters()) and not backbone.training
    text = describe(backbone)
    size = sum(p.numel() for p in backbone.parameters())
    assert "layers" not in text and "LoRA" not in text and f"{size / 1e6:.3g} million" in text


def change_copy(folder, tmp_path, change):
    """Copy a model's folder, change something in the copy, and return its path."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy)
    return str(copy)


def edit_weights(change):
    def edit_one(copy):
        path = copy / "model-00001-of-00002.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
    return edit_one


def cut_one_weight(weights):
    key = next(key for key in weights if "q_proj" in key)
    weights[key] = weights[key][:1]


def edit_index(copy, change):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def drop_from_index(copy):
    edit_index(copy, lambda files: files.pop("lm_head.weight"))


def point_outside(copy):
    edit_index(copy, lambda files: files.update({"lm_head.weight": "../../secret.safetensors"}))


def extra_in_index(copy):
    extra = {"model.layers.0.mlp.expert_bias": "model-00001-of-00002.safetensors"}
    edit_index(copy, lambda files: files.update(extra))


@pytest.mark.parametrize("change, says", [
    (edit_json("config.json", model_type="gemma3"), "supported are LLaDA"),
    (edit_json("config.json", model_type="llada2_moe"), "use_bias is None"),
    (edit_json("config.json", num_experts=None), "supported are LLaDA"),
    (edit_json("config.json", rope_theta=None), "rope_theta is None"),
    (edit_json("config.json", num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    (edit_json("config.json", hidden_size="big"), "hidden_size is 'big'"),
    (edit_json("config.json", num_experts_per_tok=9), "do not fit together"),
    (edit_json("config.json", qk_layernorm=False), "a variant that this code does not compute"),
    (edit_json("config.json", moe_layer_freq=[1, 0, 1, 1]), "moe_layer_freq"),
    (edit_json("config.json", norm_topk_prob=True), "norm_topk_prob is True"),
    (edit_json("config.json", num_hidden_layers=5), "has no model.layers.4"),
    (edit_json("config.json", num_hidden_layers=3), "have no place in the model"),
    (edit_json("config.json", mask_token_id=5000), "outside the vocabulary"),
    (edit_json("config.json", eos_token_id=257, mask_token_id=257), "same id"),
    (edit_json("config.json", moe_layer_freq=0), "moe_layer_freq"),
    (lambda copy: (copy / "config.json").write_text("{"), "is not JSON"),
    (lambda copy: (copy / "config.json").unlink(), "config.json is missing"),
    (lambda copy: (copy / "model-00002-of-00002.safetensors").unlink(),
     "model-00002-of-00002.safetensors is missing"),
    (lambda copy: (copy / "model-00002-of-00002.safetensors").write_bytes(b"x" * 100),
     "is not a safetensors file"),
    (lambda copy: (copy / "tokenizer.json").write_text("{}"), "tokenizer cannot be read"),
    (drop_from_index, "has no lm_head.weight"),
    (point_outside, "not a safetensors file beside it"),
    (extra_in_index, "have no place"),
    (edit_weights(cut_one_weight), "should be [64, 64], is [1, 64]"),
    (edit_weights(lambda w: w.pop("lm_head.weight")), "though the index says so"),
])
def test_what_does_not_fit_is_refused_in_one_line(tiny_models, tmp_path, change, says):
    with pytest.raises(ValueError, match=says.replace("[", r"\[")) as error:
        load_backbone(change_copy(tiny_models / "llada-moe", tmp_path, change))
    assert "\n" not in str(error.value)


def retype(dtype, part):
    """A function that changes the dtype of the weights whose name holds `part`."""
    def change(copy):
        for path in copy.glob("*.safetensors"):
            weights = load_file(path)
            save_file({k: w.to(dtype) if part in k else w for k, w in weights.items()}, path)
    return change


def write(name, text):
    return lambda copy: (copy / name).write_text(text)


def replace_by(make):
    """A function that puts something else in the place of a file."""
    def at(name):
        def change(copy):
            (copy / name).unlink(missing_ok=True)
            make(copy / name)
        return change
    return at


def rename_tensor(suffix):
    def change(copy):
        path = copy / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        name = "model.layers.0.self_attn.q_proj.weight"
        index["weight_map"][name.replace(".weight", suffix)] = index["weight_map"].pop(name)
        path.write_text(json.dumps(index))
    return change


def many_tensors(n):
    """A function that leaves one file, whose header names n empty tensors."""
    def change(copy):
        for path in [*copy.glob("*.safetensors"), copy / "model.safetensors.index.json"]:
            path.unlink()
        empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        header = ("{" + ",".join(f'"{i}":{empty}' for i in range(n)) + "}").encode()
        (copy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return change


fifo, device = replace_by(os.mkfifo), replace_by(lambda path: path.symlink_to("/dev/zero"))
INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("change, says", [
    *((make(name), f"{name} is not a file") for make in (fifo, device)
      for name in ("config.json", INDEX, SHARD, "tokenizer.json", "generation_config.json")),
    (many_tensors(1_200_000), "1,200,000 tensors; at most"),
    (edit_json("config.json", num_hidden_layers=900), "the checkpoint 135"),
    *((write(INDEX, text), says) for text, says in [
        ("[1]", "has no weight_map"), ("{}", "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"lm_head.weight": ["a"]}}', "names the file ['a']"),
        ('{"weight_map": {"lm_head.weight": "/etc/x.safetensors"}}', "names the file '/etc/x"),
        ('{"weight_map": {"lm_head.weight": "..\\\\x.safetensors"}}', "names the file '..")]),
    *((retype(dtype, part), f"holds {says}, which is quantised or no weight") for dtype, part, says
      in [(torch.int8, "q_proj", "I8"), (torch.float8_e4m3fn, "up_proj", "F8_E4M3"),
          (torch.int64, "norm", "I64"), (torch.bool, "gate", "BOOL")]),
    (edit_weights(lambda w: w.update({k: w[k].double() * 1e300 for k in [min(w)]})), "not finite"),
    *((rename_tensor(suffix), f"q_proj{suffix} is part of quantised weights") for suffix in (
        ".qweight", ".scales", ".weight.absmax", ".weight_scale_inv", ".weight_packed",
        ".weight.quant_state.bitsandbytes__nf4", ".SCB"))])
def test_a_strangers_folder_is_refused_within_seconds(tiny_models, tmp_path, change, says):
    folder = change_copy(tiny_models / "llada-moe", tmp_path, change)
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        load_backbone(folder)
    assert str(error.value).isprintable() and time.perf_counter() - begin < 3


def no_tokenizer(copy):
    for path in copy.glob("token*"):
        path.unlink()


@pytest.mark.parametrize("missing, says", [("mask_token_id", "mask"), ("eos_token_id", "end")])
def test_mask_and_end_are_never_guessed(folder, tmp_path, missing, says):
    """Not from the family, and the end not from the padding; the tokenizer's are taken."""
    def change(copy):
        edit_json("config.json", **{missing: None})(copy)
    backbone = load_backbone(change_copy(folder, tmp_path, change))
    assert (backbone.mask_id, backbone.config.eos_ids) == (257, (256,))
    no_tokenizer(tmp_path / "copy")
    with pytest.raises(ValueError, match=f"names the {says} token; .* as {missing}"):
        load_backbone(str(tmp_path / "copy"))


@pytest.mark.parametrize("config, generation, ends", [
    (256, None, (256,)), ([7, 256], None, (7, 256)), (7, None, (7, 256)), (7, 8, (7, 8, 256)),
    (None, [9, 8], (9, 8, 256)), ([], [], (256,))])
def test_ends_are_those_of_both_files_and_of_the_tokenizer(tiny_models, tmp_path, config,
                                                           generation, ends):
    def change(copy):
        edit_json("config.json", eos_token_id=config)(copy)
        write("generation_config.json", json.dumps({"eos_token_id": generation}))(copy)
    config = load_backbone(change_copy(tiny_models / "llada-moe", tmp_path, change)).config
    assert config.eos_ids == ends and config.eos_id == ends[0]


@pytest.mark.parametrize("text, says", [
    ("[]", "not the settings of a generation"), ("{", "is not JSON"),
    ('{"eos_token_id": [7, 320]}', "end token's id is 320, outside the vocabulary of 320"),
    ('{"eos_token_id": 257}', "mask and end token have the same id, 257")])
def test_ends_of_a_generation_that_fit_nothing_are_refused(tiny_models, tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        load_backbone(change_copy(tiny_models / "llada-moe", tmp_path,
                                  write("generation_config.json", text)))


def test_fields_in_other_forms():
    moe, dense, two = (PUBLISHED[name] for name in ("llada-moe", "llada-8b", "llada2.1-mini"))
    plain = translate(moe)
    moved = {field: value for field, value in moe.items() if field != "rope_theta"}
    moved["rope_parameters"] = {"rope_theta": 50000, "rope_type": "default"}
    assert translate(moved) == plain == translate(moe | {"moe_layer_freq": 1})
    assert translate(moe | {"eos_token_id": [7, 8]}).eos_id == 7
    assert translate(two).rotary_dim == 64
    whole = {field: value for field, value in two.items() if field != "partial_rotary_factor"}
    assert translate(whole | {"rotary_dim": 64}).rotary_dim == 64
    for key in ("scale_logits", "input_emb_norm"):
        with pytest.raises(ValueError, match=key):
            translate(dense | {key: True})


def test_nothing_of_a_repository_is_run(tiny_models, tmp_path):
    def bait(copy):
        (copy / "modeling_llada.py").write_text("raise SystemExit('ran')")
        edit_json("config.json",
             auto_map={"AutoModel": "modeling_llada.LLaDA", "AutoConfig": "modeling_llada.C"})(copy)
        (copy / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/ran'\ntR.")
    assert load_backbone(change_copy(tiny_models / "llada-moe", tmp_path, bait)).vocab_size == 320


def test_the_hub_out_of_reach_is_one_quick_line(monkeypatch):
    import time
    begin = time.perf_counter()
    for call, name in ((model_folder, "nobody/nothing"), (read_config, "nobody/nothing"),
                       (read_data, "nobody/data")):
        with pytest.raises(ValueError, match="could not be fetched from the hub") as error:
            call(name)
        assert "\n" not in str(error.value) and "give" in str(error.value)
    assert time.perf_counter() - begin < 15


# ---- 4-bit --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, quantised", [("llada-8b", 28), ("llada-moe", 4 * (4 + 24)),
                                             ("llada2.1-mini", 4 * 2 + 3 + 3 * 27)])
def test_4bit_quantises_every_layer_of_the_blocks_and_nothing_else(name, quantised):
    import bitsandbytes as bnb
    backbone = tiny_backbone(name, load_4bit=True)
    layers = [m for m in backbone.network.modules() if isinstance(m, (bnb.nn.Linear4bit, Stack))]
    assert sum(getattr(m, "experts", 1) for m in layers) == quantised
    for m in layers:
        state = m.weight.quant_state if isinstance(m, bnb.nn.Linear4bit) else m.quant_state
        assert m.weight.dtype == torch.uint8 and state.quant_type == "nf4"
        assert state.nested and state.blocksize == 64
        assert not m.weight.requires_grad
    plain = [n for n, m in backbone.network.named_modules() if type(m) is nn.Linear]
    assert all(n == FAMILIES[backbone.config.family].head or n.endswith("mlp.gate") for n in plain)
    assert f"{quantised} layers in 4-bit" in describe(backbone)
    assert {w.shape[-1] for w in dequantised(backbone).values()} <= {64, 128}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", EACH)
def test_4bit_gradients_are_those_of_the_dequantised_weights(name, training, dtype):
    """The gradients are those of phi and of the LoRA.

    Both modes are tried: in eval mode bitsandbytes has a path without gradients on some CPUs.
    """
    raw = TINY[name] | {"mask_token_id": 301, "eos_token_id": 300}
    s, batch, results = Settings(rank=4, alpha=8.0, layer_fraction=0.5), random_batch([14, 8]), []
    quant = load_backbone(raw, load_4bit=True, random=True, dtype=dtype, device="cpu")
    plain = load_backbone(raw, random=True, dtype=dtype, device="cpu")
    for n, w in dequantised(quant).items():
        plain.network.get_submodule(n).weight.data = w.to(getattr(torch, dtype))
    kinds = {p.dtype for p in quant.parameters()}
    assert kinds - {torch.uint8} == {getattr(torch, dtype)}
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
        grads = [torch.zeros(1) if g is None else g.float().flatten() for g in grads]
        results.append(torch.cat(grads))
    ours, expected = results
    assert expected.norm() > 0
    # In bfloat16 single roundings differ. For a token on the edge, a router may then choose
    # another expert.
    tolerance = {"float32": 1e-4, "bfloat16": 0.05}[dtype]
    assert (ours - expected).norm() < tolerance * expected.norm()


def test_4bit_without_bitsandbytes_is_an_error(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        tiny_backbone("llada-moe", load_4bit=True)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        train.make_optimizer(Settings(optimizer="adamw8bit"), [nn.Parameter(torch.zeros(1))])


# ---- Precision and seeds ------------------------------------------------------------------------

@pytest.mark.parametrize("asked, stored, on_a_cpu, on_a_gpu", [
    ("auto", {"dtype": "bfloat16"}, "bfloat16", "bfloat16"),
    ("auto", {"torch_dtype": "bfloat16"}, "bfloat16", "bfloat16"),
    ("auto", {"dtype": "float32"}, "float32", "bfloat16"),
    ("auto", {}, "float32", "bfloat16"),
    ("float32", {"dtype": "bfloat16"}, "float32", "float32"),
    ("bfloat16", {"dtype": "float32"}, "bfloat16", "bfloat16")])
def test_auto_is_the_files_precision_on_a_cpu(asked, stored, on_a_cpu, on_a_gpu):
    for device, dtype in (("cpu", on_a_cpu), ("cuda", on_a_gpu)):
        assert choose_dtype(asked, stored, torch.device(device)) == getattr(torch, dtype)


def test_routers_are_neither_quantised_nor_rounded():
    """Their scores decide which expert is chosen. LLaDA2's bias stays in float32 everywhere."""
    for name, router in (("llada-moe", "gate.weight"), ("llada2.1-mini", "gate.expert_bias")):
        raw = TINY[name] | {"mask_token_id": 301, "eos_token_id": 300}
        backbone = load_backbone(raw, load_4bit=True, random=True, dtype="bfloat16", device="cpu")
        kinds = {key: value.dtype for key, value in backbone.network.state_dict().items()
                 if key.endswith(("gate.weight", "gate.expert_bias"))}
        wanted = torch.float32 if router.endswith("bias") else torch.bfloat16
        assert {kind for key, kind in kinds.items() if key.endswith(router)} == {wanted}
        assert torch.uint8 not in kinds.values() and len(kinds) >= 3


def test_random_weights_come_from_the_seed():
    raw = TINY["llada-8b"] | {"mask_token_id": 301, "eos_token_id": 300}
    made = [load_backbone(raw, random=True, device="cpu", seed=seed) for seed in (1, 1, 2)]
    one, same, other = (backbone.network.state_dict() for backbone in made)
    for key, w in one.items():
        assert torch.equal(w, same[key])
        assert torch.equal(w, other[key]) == (w.dim() == 1), key
