"""config.json from the hub, from people's fine-tunes and from strangers: what is known is read,
anything else is named and refused."""
import json
import time

import pytest

from backbones.families import PUBLISHED, translate
from files import read_json

# The published files, field by field, as the hub has them.
LLADA_8B = dict(
    activation_type="silu", alibi=False, alibi_bias_max=8.0, architectures=["LLaDAModelLM"],
    attention_dropout=0.0, attention_layer_norm=False, attention_layer_norm_with_affine=True,
    auto_map={"AutoConfig": "configuration_llada.LLaDAConfig"}, bias_for_layer_norm=False,
    block_group_size=1, block_type="llama", d_model=4096, embedding_dropout=0.0,
    embedding_size=126464, eos_token_id=126081, flash_attention=False, include_bias=False,
    include_qkv_bias=False, init_cutoff_factor=None, init_device="meta", init_fn="mitchell",
    init_std=0.02, input_emb_norm=False, layer_norm_type="rms", layer_norm_with_affine=True,
    mask_token_id=126336, max_sequence_length=4096, mlp_hidden_size=12288, mlp_ratio=4,
    model_type="llada", multi_query_attention=None, n_heads=32, n_kv_heads=32, n_layers=32,
    pad_token_id=126081, precision="amp_bf16", residual_dropout=0.0, rms_norm_eps=1e-05, rope=True,
    rope_full_precision=True, rope_theta=500000.0, scale_logits=False,
    transformers_version="4.46.3", use_cache=False, vocab_size=126464, weight_tying=False)
LLADA_MOE = dict(
    architectures=["LLaDAMoEModel"], attention_bias=False, attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_lladamoe.LLaDAConfig"}, clip_qkv=None,
    dense_intermediate_size=8192, expert_intermediate_size=1024, hidden_act="silu",
    hidden_size=2048, initializer_range=0.02, max_position_embeddings=8192, model_type="llada",
    moe_layer_freq=[1] * 16, moe_router_enable_expert_bias=False,
    moe_router_score_function="softmax", norm_topk_prob=None, num_attention_heads=16,
    num_experts=64, num_experts_per_tok=8, num_hidden_layers=16, num_key_value_heads=16,
    output_router_logits=False, pad_token_id=156892, partial_rotary_factor=1, qk_layernorm=True,
    rms_norm_eps=1e-05, rope_scaling=None, rope_theta=50000, routed_scaling_factor=1,
    router_aux_loss_coef=0.01, router_num_group=None, router_topk_group=None,
    shared_expert_intermediate_size=None, tie_word_embeddings=False, torch_dtype="bfloat16",
    transformers_version="4.53.2", use_cache=False, vocab_size=157184)
LLADA2_MINI = dict(
    architectures=["LLaDA2MoeModelLM"], attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"}, dtype="bfloat16",
    embedding_dropout=0.0, first_k_dense_replace=1, head_dim=128, hidden_act="silu",
    hidden_size=2048, initializer_range=0.02, intermediate_size=5120,
    max_position_embeddings=32768, max_window_layers=28, model_type="llada2_moe",
    moe_intermediate_size=512, moe_router_enable_expert_bias=True, n_group=8, norm_head=False,
    norm_softmax=False, norm_topk_prob=True, num_attention_heads=16, num_experts=256,
    num_experts_per_tok=8, num_hidden_layers=20, num_key_value_heads=4, num_shared_experts=1,
    output_dropout=0.0, output_router_logits=False, pad_token_id=156892,
    partial_rotary_factor=0.5, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=600000,
    rotary_dim=64, routed_scaling_factor=2.5, router_dtype="fp32", score_function="sigmoid",
    sliding_window=4096, tie_word_embeddings=False, topk_group=4, transformers_version="4.57.1",
    use_bias=False, use_cache=False, use_qkv_bias=False, use_rmsnorm=True,
    use_sliding_window=False, using_split_qkv_in_self_attention=False, vocab_size=157184)
HUB = {"llada-8b": LLADA_8B, "llada-moe": LLADA_MOE, "llada2.1-mini": LLADA2_MINI}
DEFAULT = {"rope_type": "default"}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 50000}


def sizes(config):
    """All of a Config but tokens and precision, which the published files name in part."""
    return {key: value for key, value in vars(config).items()
            if key not in ("mask_id", "eos_ids", "stored")}


@pytest.mark.parametrize("name", HUB)
def test_the_published_files_are_read_and_our_rows_say_the_same(name):
    assert sizes(translate(HUB[name])) == sizes(translate(PUBLISHED[name]))


@pytest.mark.parametrize("name", HUB)
def test_what_the_library_writes_beside_them_changes_nothing(name):
    """PretrainedConfig's own fields, of this version and, recorded, of 4.57 with its generation."""
    from transformers import PretrainedConfig
    old = dict(
        add_cross_attention=False, bad_words_ids=None, begin_suppress_tokens=None,
        chunk_size_feed_forward=0, decoder_start_token_id=None, diversity_penalty=0.0,
        do_sample=False, early_stopping=False, encoder_no_repeat_ngram_size=0,
        finetuning_task=None, is_decoder=False, is_encoder_decoder=False, label2id={"LABEL_0": 0},
        length_penalty=1.0, max_length=20, min_length=0, no_repeat_ngram_size=0,
        num_beam_groups=1, num_beams=1, num_return_sequences=1, output_scores=False, prefix=None,
        pruned_heads={}, remove_invalid_values=False, repetition_penalty=1.0,
        return_dict_in_generate=False, temperature=1.0, tf_legacy_loss=False,
        tie_encoder_decoder=False, top_k=50, top_p=1.0, torchscript=False, typical_p=1.0,
        use_bfloat16=False, _attn_implementation="eager", unsloth_version="2025.9.1")
    ours = HUB[name]
    written = PretrainedConfig().to_dict() | old | ours
    assert translate(written) == translate(ours)


@pytest.mark.parametrize("name, values", [
    ("llada-moe", {"rope_parameters": DEFAULT}), ("llada-moe", {"rope_scaling": DEFAULT}),
    ("llada-moe", {"rope_parameters": {}, "rope_scaling": {}}),
    ("llada-8b", {"rope_scaling": {"type": "default", "rope_theta": 500000}}),
    ("llada2.1-mini", {"rope_parameters": DEFAULT | {"rope_theta": 600000.0,
                                                     "partial_rotary_factor": 0.5}}),
    ("llada2.1-mini", {"rotary_dim": None}), ("llada2.1-mini", {"sliding_window": None}),
    ("llada-moe", {"shared_expert_intermediate_size": -1}), ("llada-moe", {"router_num_group": -2}),
    ("llada-moe", {"num_key_value_heads": None}), ("llada-8b", {"n_kv_heads": None}),
    ("llada-moe", {"moe_layer_freq": 1}), ("llada-moe", {"never_heard_of": None}),
    ("llada2.1-mini", {"_moe_implementation": "fused", "embedding_dropout": 0.1}),
    ("llada-8b", {"quantization_config": None, "torch_dtype": "float16"})])
def test_other_words_for_the_same_model(name, values):
    assert translate(HUB[name] | values) == translate(HUB[name])


@pytest.mark.parametrize("name, values, says", [
    ("llada-moe", {"rope_parameters": YARN}, "rope_parameters: 'rope_type' is 'yarn'"),
    ("llada-moe", {"rope_scaling": YARN}, "rope_scaling: 'rope_type' is 'yarn'"),
    ("llada-8b", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'type' is 'linear'"),
    ("llada-moe", {"rope_scaling": {"factor": 4.0}}, "rope_scaling: 'factor' is 4.0"),
    ("llada-moe", {"rope_parameters": DEFAULT | {"mrope_section": [8, 4, 4]}}, "'mrope_section'"),
    ("llada-moe", {"rope_parameters": DEFAULT, "rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
    ("llada-moe", {"rope_parameters": {"rope_type": "default", "type": "longrope"}}, "'longrope'"),
    ("llada-moe", {"rope_parameters": "yarn"}, "rope_parameters is 'yarn'"),
    ("llada-moe", {"rope_scaling": [1]}, r"rope_scaling is \[1\]"),
    ("llada-moe", {"rope_parameters": {"rope_theta": 10000}}, "rope_theta is 50000, but 10000 in"),
    ("llada-moe", {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4},
                   "rope_scaling": {"rope_theta": 1e5}}, "rope_theta is 10000.0, but 100000.0 in"),
    ("llada-moe", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is"),
    ("llada-8b", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is"),
    ("llada2.1-mini", {"rotary_dim": 32}, "rotary_dim is 32"),
    ("llada2.1-mini", {"partial_rotary_factor": 0, "rotary_dim": None}, "rotated channels 0"),
    ("llada2.1-mini", {"image_token_offset": 157184}, "'image_token_offset' is 157184"),
    ("llada-moe", {"attn_logit_softcapping": 30.0}, "'attn_logit_softcapping' is 30.0"),
    ("llada-8b", {"\x1b[2Ja\nb": "x" * 10**6}, r"'\\x1b\[2Ja\\nb' is 'xxx"),
    ("llada-8b", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ("llada-8b", {"multi_query_attention": True}, "multi_query_attention is True"),
    ("llada-8b", {"rope_full_precision": False}, "rope_full_precision is False"),
    ("llada-8b", {"is_decoder": True}, "is_decoder is True"),
    ("llada-8b", {"n_heads": 24, "n_kv_heads": 24}, "24 heads do not share a width of 4096"),
    ("llada-moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64"),
    ("llada-moe", {"router_num_group": 8}, "router_num_group is 8"),
    ("llada2.1-mini", {"norm_softmax": True}, "norm_softmax is True"),
    ("llada2.1-mini", {"moe_router_enable_expert_bias": False}, "enable_expert_bias is False"),
    ("llada2.1-mini", {"first_k_dense_replace": 21}, "21 dense layers are more than all 20"),
    ("llada2.1-mini", {"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
    *((name, {key: {"quant_method": how, "bits": 4}}, f"{key} is .*{how}.* quantised weights")
      for name, key, how in [("llada-8b", "quantization_config", "gptq"),
                             ("llada-moe", "quantization_config", "bitsandbytes"),
                             ("llada2.1-mini", "compression_config", "compressed-tensors"),
                             ("llada-8b", "quantization", "affine")]),
    ("llada-moe", {"mask_token_id": 157184}, "mask token's id is 157184, outside the vocabulary"),
    ("llada-moe", {"mask_token_id": True}, "mask token's id is True"),
    ("llada-moe", {"mask_token_id": 5.0}, "mask token's id is 5.0"),
    ("llada-moe", {"eos_token_id": [3, -1]}, "end token's id is -1"),
    ("llada-moe", {"eos_token_id": "</s>"}, "end token's id is '</s>'"),
    ("llada-moe", {"eos_token_id": [[3]]}, r"end token's id is \[3\]")])
def test_other_mathematics_are_named_and_refused(name, values, says):
    with pytest.raises(ValueError, match=says) as error:
        translate(HUB[name] | values)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_another_architecture_is_refused_as_such():
    gemma = dict(model_type="gemma3", tie_word_embeddings=True, rope_scaling=YARN, sliding_window=1)
    with pytest.raises(ValueError, match="model_type 'gemma3' is not supported; supported are"):
        translate(gemma)


def test_ends_are_all_that_are_named_and_the_padding_is_none():
    assert translate(LLADA_MOE).eos_ids == () and translate(LLADA_MOE).eos_id is None
    config = translate(LLADA_MOE | {"eos_token_id": [7, 8, 7]})
    assert config.eos_ids == (7, 8) and config.eos_id == 7
    assert translate(LLADA_8B).eos_ids == (126081,)


@pytest.mark.parametrize("values", [
    dict(num_hidden_layers=1000, num_experts=1 << 14), dict(num_hidden_layers=1000, num_experts=64),
    dict(num_attention_heads=1 << 20, num_key_value_heads=1 << 20, head_dim=1 << 20)])
def test_a_size_in_its_range_is_not_enough_if_the_product_is_absurd(values):
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="are about .* tensors|a matrix of"):
        translate(LLADA_MOE | values)
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize("text, says", [
    ('{"a": NaN}', "the number NaN is not finite"), ('{"a": -Infinity}', "-Infinity"),
    ('{"a": 1e999}', "1e999 is not finite"),
    ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
    ("[" * 10**6, "recursion"), ('{"a":' * 10**5, "recursion"), ("", "is not JSON"),
    ('{"a": ' + "9" * 5000 + "}", "is not JSON"), ('"' + "x" * (1 << 24) + '"', "no file of at")])
def test_json_that_says_two_things_or_no_number_is_refused(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_json_numbers_are_what_they_were(tmp_path):
    values = {"a": 1e-05, "b": -3, "c": 2.5, "d": [0.0, 1e30], "e": {"f": 10**20}}
    (tmp_path / "x.json").write_text(json.dumps(values))
    assert read_json(tmp_path / "x.json") == values
