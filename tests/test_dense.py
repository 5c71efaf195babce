"""What dense families have special: tied heads, shifted logits, blocks of 4, left-only layers."""
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from backbones.backbone import Backbone, build_network, shift_left, shift_right
from backbones.block_diffusion import block_diffusion
from backbones.blocks import scale_frequencies
from backbones.checkpoint import load_backbone
from backbones.families import PUBLISHED, TINY, translate
from backbones.lora import lora_weights
from backbones.tiny import write_tiny
from data import mark_response
from settings import Settings
from tiny_models import (
    all_logits, edit_json, empty_network, library_model, random_batch, random_lora, tiny_backbone,
    to_library,
)


# ---- Configurations -----------------------------------------------------------------------------

@pytest.mark.parametrize("name, parameters", [
    ("qwen3-0.6b", 596_049_920), ("qwen2.5-coder-0.5b", 494_032_768), ("smollm2", 134_515_008),
    ("sdar-1.7b", 2_031_739_904), ("dream-7b", 7_615_616_512)])
def test_published_shapes_count_as_published(name, parameters):
    assert sum(p.numel() for p in empty_network(name).parameters()) == parameters


# As on the hub, with all that is beside the sizes.
SDAR = dict(
    architectures=["SDARForCausalLM"], auto_map={"AutoConfig": "configuration_sdar.SDARConfig"},
    attention_bias=False, attention_dropout=0.0, attn_implementation="flex_attention",
    bos_token_id=151643, debug=False, eos_token_id=151643, block_size=4, mask_token_id=151669,
    ep_size=1, fuse_cross_entropy=True, initializer_range=0.02, max_window_layers=28,
    micro_forward=False, rope_scaling=None, skip_checkpoint=False, sliding_window=None,
    torch_dtype="bfloat16", use_cache=False, use_deepep=False, use_sliding_window=False)
A2D = dict(
    architectures=["A2DQwen2LMHeadModel"], attention_dropout=0.0, dtype="bfloat16",
    layer_types=["full_attention"] * 24, max_window_layers=24, pad_token_id=151643,
    rope_scaling=None, sliding_window=None, use_cache=False, use_mrope=False,
    use_sliding_window=False)


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)


def test_fields_that_published_configs_have_are_known():
    assert translate(PUBLISHED["sdar-1.7b"] | SDAR) == translate(PUBLISHED["sdar-1.7b"])
    name = "qwen2.5-coder-0.5b"
    assert translate(PUBLISHED[name] | A2D) == translate(PUBLISHED[name])
    plain = {key: value for key, value in PUBLISHED["sdar-1.7b"].items() if key != "block_size"}
    assert translate(plain).block_length == 0  # then it is the family's


@pytest.mark.parametrize("name, key, value", [
    ("qwen3-0.6b", "attention_bias", True), ("qwen2.5-coder-0.5b", "attention_bias", False),
    ("smollm2", "mlp_bias", True), ("qwen3-0.6b", "use_sliding_window", True),
    ("qwen2.5-coder-0.5b", "layer_types", ["full_attention"] * 23 + ["sliding_attention"]),
    ("qwen2.5-coder-0.5b", "layer_types", ["full_attention"] * 23),
    ("smollm2", "rope_scaling", {"rope_type": "yarn", "factor": 8.0}),
    ("sdar-1.7b", "rope_scaling", LLAMA3), ("llada-8b", "rope_parameters", LLAMA3),
    ("dream-7b", "rope_scaling", LLAMA3),
    ("smollm2", "hidden_act", "gelu"), ("smollm2", "pretraining_tp", 2),
    ("dream-7b", "block_size", 32), ("sdar-1.7b", "block_size", 0),
    ("llada-moe", "tie_word_embeddings", True), ("llada-8b", "tie_word_embeddings", True),
    ("llada2.1-mini", "tie_word_embeddings", True)])
def test_other_mathematics_are_refused(name, key, value):
    with pytest.raises(ValueError, match=key) as error:
        translate(PUBLISHED[name] | {key: value})
    assert "\n" not in str(error.value)


# ---- Llama 3's rotation -------------------------------------------------------------------------

@pytest.mark.parametrize("scaling", [(8.0, 1.0, 4.0, 64), (32.0, 0.5, 8.0, 64)])
def test_a_scaled_rotation_is_the_librarys(monkeypatch, scaling):
    """Logits and gradients of 200 tokens, three times the length of before, layers causal."""
    rotation = dict(zip(LLAMA3, ("llama3", *scaling)))
    monkeypatch.setitem(TINY, "smollm2", TINY["smollm2"] | {"rope_scaling": rotation})
    ours = tiny_backbone("smollm2", attention="causal").requires_grad_(True)
    assert ours.config.rope_scaling == scaling
    x, valid, logits = random_batch([200]).x0, torch.ones(1, 200, dtype=torch.bool), {}
    for kind in ("default", "llama3"):
        theirs = library_model("smollm2", **(rotation if kind == "llama3" else {}))
        own = ours.network.state_dict()
        theirs.load_state_dict(to_library("smollm2", own, theirs.state_dict()))
        for layer in theirs.model.layers:
            layer.self_attn.is_causal = True
        logits[kind] = theirs(x).logits
    got = all_logits(ours, x, valid)
    torch.testing.assert_close(got, logits["llama3"], rtol=1e-4, atol=1e-4)
    assert (got - logits["default"]).abs().max() > 0.1
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    for each in (got, logits["llama3"]):
        (each * weights).sum().backward()
    own = {key: p.grad for key, p in ours.network.named_parameters()}
    for key, p in theirs.named_parameters():
        assert (own[key] - p.grad).norm() <= 1e-4 * p.grad.norm() and p.grad.norm() > 0, key


def test_a_scaled_rotation_by_hand():
    """Within 64 tokens channels turn 8, 2.5 and .5 times: kept, half way, and 8 times slower."""
    turns = torch.tensor([8.0, 2.5, 0.5])
    got = scale_frequencies(turns * 2 * math.pi / 64, 8.0, 1.0, 4.0, 64) * 64 / (2 * math.pi)
    torch.testing.assert_close(got, torch.tensor([8.0, 2.5 * (1 + 1 / 8) / 2, 0.5 / 8]))


# Llama 3.2 1B's file, as on the hub.
LLAMA_32 = dict(
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=128000, eos_token_id=[128001, 128008, 128009], head_dim=64, hidden_act="silu",
    hidden_size=2048, initializer_range=0.02, intermediate_size=8192,
    max_position_embeddings=131072, mlp_bias=False, model_type="llama", num_attention_heads=32,
    num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05,
    rope_scaling=LLAMA3 | dict(factor=32.0, original_max_position_embeddings=8192),
    rope_theta=500000.0, tie_word_embeddings=True, torch_dtype="bfloat16",
    transformers_version="4.45.0.dev0", use_cache=True, vocab_size=128256)


def test_llama_32_is_read():
    config = translate(LLAMA_32)
    assert config.rope_scaling == (32.0, 1.0, 4.0, 8192) and config.left_to_right
    with torch.device("meta"):
        network = build_network(config)
    assert sum(p.numel() for p in network.parameters()) == 1_235_814_400


def test_a_scaled_rotation_in_either_place():
    plain = PUBLISHED["smollm2"]
    one = translate(plain | {"rope_scaling": LLAMA3})
    assert one.rope_scaling == (8.0, 1.0, 4.0, 64)
    inner = LLAMA3 | {"rope_theta": plain["rope_theta"]}
    without = {key: value for key, value in plain.items() if key != "rope_theta"}
    assert one == translate(without | {"rope_parameters": inner})
    assert one == translate(plain | {"rope_parameters": inner, "rope_scaling": LLAMA3})


@pytest.mark.parametrize("changes, says", [
    *(({key: value}, f"rope_scaling: {key} is {value}; it must be a number")
      for key in list(LLAMA3)[1:] for value in (None, float("nan"), float("inf"), True, -1)),
    ({"factor": "8"}, "rope_scaling: factor is '8'"), ({"factor": 0.5}, "factor is 0.5; it must"),
    ({"low_freq_factor": 4.0}, "low_freq_factor is 4.0, but it must be below high_freq_factor"),
    ({"low_freq_factor": 5.0}, "low_freq_factor is 5.0, but"),
    ({"original_max_position_embeddings": 64.5}, "original_max_position_embeddings is 64.5"),
    ({"type": "yarn"}, "rope_scaling: 'rope_type' is 'llama3'"),
    ({"attention_factor": 2.0}, "rope_scaling: 'attention_factor' is 2.0")])
def test_a_scaling_that_is_not_whole_is_refused(changes, says):
    with pytest.raises(ValueError, match=says) as error:
        translate(PUBLISHED["smollm2"] | {"rope_scaling": LLAMA3 | changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", [{"rope_type": "default"}, LLAMA3 | {"factor": 4.0}])
def test_two_scalings_that_do_not_agree_are_refused(other):
    with pytest.raises(ValueError, match="rope_parameters and rope_scaling do not agree"):
        translate(PUBLISHED["smollm2"] | {"rope_scaling": LLAMA3, "rope_parameters": other})


# ---- Tied heads ---------------------------------------------------------------------------------

def weights_of(folder):
    return {key: value for file in folder.glob("*.safetensors")
            for key, value in load_file(file).items()}


def with_head(folder, copy, head):
    """A copy of a folder whose weights are one file, with lm_head.weight too."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(weights_of(folder) | {"lm_head.weight": head}, copy / "model.safetensors")
    return load_backbone(str(copy))


def test_a_tied_head_is_the_embedding_whether_or_not_the_file_repeats_it(tiny_models, tmp_path):
    """Some converted checkpoints say "tied" and hold a head of their own: then it counts."""
    folder, batch = tiny_models / "qwen3-0.6b", random_batch([12, 7])
    embedding = weights_of(folder)["model.embed_tokens.weight"]
    assert "lm_head.weight" not in weights_of(folder)
    plain = load_backbone(str(folder))
    copy = with_head(folder, tmp_path / "copy", embedding.clone())
    own = with_head(folder, tmp_path / "own", embedding.flip(0))
    a, b, c = (all_logits(backbone, batch.x0, batch.valid) for backbone in (plain, copy, own))
    assert torch.equal(a, b) and not torch.allclose(a, c)
    torch.testing.assert_close(a.flip(-1), c)
    for backbone, tied in ((plain, True), (copy, True), (own, False)):
        names = [name for name, _ in backbone.network.named_parameters()]
        assert backbone.config.tied == tied and ("lm_head.weight" in names) != tied
        assert ("lm_head.weight" in backbone.network.state_dict()) != tied


def test_a_tied_head_is_never_adapted_and_is_trained_as_one_matrix():
    backbone, batch = tiny_backbone("qwen3-0.6b"), random_batch([12, 7])
    full = tiny_backbone("qwen3-0.6b").requires_grad_(True)
    assert not any("lm_head" in key or "embed" in key for key in lora_weights(
        random_lora(backbone)))
    all_logits(full, batch.x0, batch.valid).square().sum().backward()
    grad = full.part("embed").weight.grad
    unused = sorted(set(range(320)) - set(batch.x0.flatten().tolist()))
    assert grad[unused].abs().sum() > 0  # from the head: no input has these words


# ---- Shifted logits -----------------------------------------------------------------------------

def test_the_shift_by_hand():
    h = torch.arange(5.0).view(1, 5, 1)
    assert shift_right(h).flatten().tolist() == [0, 0, 1, 2, 3]
    need = torch.tensor([[True, False, False, True, True], [False, True, False, False, False]])
    assert shift_left(need).int().tolist() == [[1, 0, 1, 1, 0], [1, 0, 0, 0, 0]]
    # All that is read after the shift was computed before it.
    read = shift_left(need)[..., None].float()
    assert (shift_right(read)[..., 0][need] == 1).all()


def test_shifted_logits_of_the_rows_that_are_read():
    """Logits of token i are the unshifted model's at i - 1, also where few rows are computed."""
    backbone, batch = tiny_backbone("dream-7b"), random_batch([20, 9])
    whole = all_logits(backbone, batch.x0, batch.valid)
    need = torch.zeros_like(batch.valid)
    need[0, [0, 3, 4, 19]] = need[1, 8] = True
    h = backbone.blocks(backbone.embed(batch.x0), batch.valid, 0, None, need)
    torch.testing.assert_close(backbone.head(h)[need], whole[need])
    plain = Backbone(backbone.network, translate(TINY["qwen2.5-coder-0.5b"] | {
        "tie_word_embeddings": False}))
    torch.testing.assert_close(all_logits(plain, batch.x0, batch.valid)[:, :-1], whole[:, 1:])


# ---- Blocks of 4 --------------------------------------------------------------------------------

def test_sdar_sees_its_block_of_four_and_those_before():
    backbone = tiny_backbone("sdar-1.7b", attention="block")
    mask = backbone.mask(None, torch.zeros(1, 11, 1), None)
    for q in range(11):
        for k in range(11):
            assert bool(mask[q, k]) == (k // 4 <= q // 4)
    other = load_backbone(TINY["sdar-1.7b"] | {"block_size": 8}, random=True, attention="block")
    assert other.mask(None, torch.zeros(1, 9, 1), None).sum() == 8 * 8 + 9


def test_sdar_decodes_four_at_a_time():
    """Each look that commits fills gaps of one block only, and the blocks come in order."""
    backbone, batch = tiny_backbone("sdar-1.7b"), random_batch([17], prompt=6)
    done = 6
    steps = list(block_diffusion(backbone, Settings(), batch.x0, batch.maskable, batch.valid, [0],
                                 threshold=2.0))
    assert len(steps) == 14  # 6 to 19, a token a look: the last block is decoded whole
    for canvas in steps:
        filled = [i for i in range(6, 17) if canvas[0, i] != backbone.mask_id]
        assert all(i // 4 <= done // 4 for i in filled)
        while done < 17 and canvas[0, done] != backbone.mask_id:
            done += 1


# ---- Layers that look left only -----------------------------------------------------------------

@torch.no_grad()
def test_causal_attention_is_the_librarys():
    ours, theirs = tiny_backbone("smollm2", attention="causal"), library_model("smollm2")
    theirs.load_state_dict(to_library("smollm2", ours.network.state_dict(), theirs.state_dict()))
    for layer in theirs.model.layers:
        layer.self_attn.is_causal = True
    x = random_batch([9]).x0
    torch.testing.assert_close(all_logits(ours, x, torch.ones(1, 9, dtype=torch.bool)),
                               theirs(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention, left", [("full", 0), ("causal:1", 1), ("causal:3", 3),
                                             ("causal", 4)])
def test_the_lower_layers_look_left(attention, left):
    """A change of the last token reaches the first after the first layer that looks both ways."""
    backbone = tiny_backbone("smollm2", attention=attention)
    a = random_batch([9, 6])
    changed = a.x0.clone()
    changed[0, 8] = 7
    for stop in range(1, 5):
        h, g = (backbone.blocks(backbone.embed(x), a.valid, 0, stop)[0, 0] for x in (a.x0, changed))
        assert torch.equal(h, g) == (stop <= left)
    # Run in two parts, as memdlm.py does, it is the same.
    whole = backbone.blocks(backbone.embed(a.x0), a.valid, 0, None)
    half = backbone.blocks(backbone.embed(a.x0), a.valid, 0, 2)
    assert torch.equal(backbone.blocks(half, a.valid, 2, None), whole)


@pytest.mark.parametrize("name, attention", [
    ("smollm2", "full"), ("smollm2", "causal"), ("smollm2", "causal:1"), ("dream-7b", "full"),
    ("smollm2", "causal-prompt"), ("llada2.1-mini", "block"), ("sdar-1.7b", "block")])
def test_the_queries_that_are_read_see_what_they_saw_before(name, attention):
    """Only these ask in the last layer: at their own places, and under their own rows of a mask."""
    backbone, batch = tiny_backbone(name, attention=attention), random_batch([40, 13])
    valid = mark_response(batch.valid, torch.tensor([6, 3]))
    need = torch.zeros_like(valid)
    need[0, [2, 5, 31, 39]] = need[1, [0, 7]] = True
    whole, few = (backbone.blocks(backbone.embed(batch.x0), valid, 0, None, rows)[need]
                  for rows in (None, need))
    torch.testing.assert_close(few, whole, rtol=1e-4, atol=1e-5)


def test_an_attention_that_does_not_exist_is_refused():
    for attention in ("causal:0", "causal:x", "left", "causal:1.5", ""):
        with pytest.raises(ValueError, match="must be one of auto, full, block, causal"):
            Settings(model="x", attention=attention)
    with pytest.raises(ValueError, match="the model has 4 layers"):
        tiny_backbone("smollm2", attention="causal:5")


# ---- Special tokens -----------------------------------------------------------------------------

def test_a_mask_that_only_the_tokenizer_names(tmp_path):
    """SDAR-4B's config.json has no mask_token_id; its tokenizer calls the mask <|MASK|>."""
    write_tiny("sdar-1.7b", tmp_path)
    mask = json.loads((tmp_path / "config.json").read_text())["mask_token_id"]
    edit_json("config.json", mask_token_id=None)(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert backbone.mask_id == mask == backbone.tokenizer.added["<|MASK|>"]
