"""One row per family of models: everything that is special about it.

Adding a model means a block in blocks.py if its mathematics is new, a row here, and a row in the
tests. Everything else asks the row.
"""
from __future__ import annotations

from pathlib import Path
from typing import Callable, NamedTuple

import memdlm
from backbones.block_diffusion import block_diffusion
from backbones.blocks import (
    LLaDA2Block, LLaDABlock, LLaDAMoEBlock, LlamaBlock, Qwen2Block, Qwen3Block,
)
from backbones.config import Config, Fields, show
from files import model_folder, read_json


class Family(NamedTuple):
    """What is special about a family of models."""
    title: str              # as people write it
    model_types: tuple      # what config.json calls it
    marker: str             # a field that only this family has among those of its model_type
    translate: Callable     # Fields -> dict of Config's fields
    block: type             # of one layer
    embed: str              # where a checkpoint keeps what
    layers: str
    norm: str
    head: str
    attention: tuple        # names of the linear layers of a block, the output's last
    ffn: tuple
    router: str             # the router's name if it is a linear layer, else ""
    head_norms: bool        # queries and keys are normalised per head
    rotary_in_float32: bool  # else rotation is in the model's precision
    block_length: int       # of a block, which sees itself and those before; 0: all sees all
    decoder: Callable
    mask_token: str         # what the tokenizer calls the mask
    turn_ends: tuple        # tokens that end a turn, besides the end of text
    turn_marks: tuple       # tokens that structure a chat
    published: dict         # name -> config.json of a published model
    tiny: dict              # what a tiny model of the family changes in that


def _dense(fields):
    """LLaDA-8B's config.json, in OLMo's words."""
    fields.only(
        block_type=("llama",), layer_norm_type=("rms",), activation_type=("silu",),
        alibi=(None, False), include_bias=(None, False), include_qkv_bias=(None, False),
        attention_layer_norm=(None, False), weight_tying=(False,), clip_qkv=(None,),
        rope=(None, True), scale_logits=(None, False), input_emb_norm=(None, False),
        rope_full_precision=(None, True), partial_rotary_factor=(None, 1),
        layer_norm_with_affine=(None, True), bias_for_layer_norm=(None, False),
        multi_query_attention=(None, False), block_group_size=(None, 1),
        tie_word_embeddings=(None, False))
    # The sizes stand in other fields, and what has no part in this block asks nothing.
    fields.ignore("mlp_ratio", "alibi_bias_max", "attention_layer_norm_with_affine", "precision",
                  "flash_attention", "init_device", "init_fn", "init_std", "init_cutoff_factor")
    number = fields.number
    width, heads = number("d_model"), number("n_heads")
    head_dim = fields.share(width, heads)
    return dict(
        vocab_size=number("embedding_size", "vocab_size", high=1 << 24), width=width,
        layers=number("n_layers", high=1000), heads=heads,
        kv_heads=number("n_kv_heads", "n_heads"), head_dim=head_dim,
        rotary_dim=head_dim, rope_theta=number("rope_theta", high=1e12, kind=float),
        eps=number("rms_norm_eps", low=0, high=1, kind=float), ffn=number("mlp_hidden_size"),
        dense_layers=number("n_layers", high=1000),
        max_length=number("max_sequence_length", high=1 << 30))


def _moe(fields):
    """LLaDA-MoE's config.json."""
    fields.only(
        attention_bias=(None, False), clip_qkv=(None,), qk_layernorm=(True,),
        tie_word_embeddings=(None, False), moe_router_enable_expert_bias=(None, False),
        partial_rotary_factor=(None, 1),
        shared_expert_intermediate_size=(None, 0, -1), hidden_act=("silu",),
        moe_router_score_function=(None, "softmax"), norm_topk_prob=(None, False),
        router_num_group=(None, 1, 0, -1, -2), router_topk_group=(None, 1, 0, -1, -2),
        routed_scaling_factor=(None, 1))
    fields.ignore("dense_intermediate_size")  # there is no dense layer
    frequency = fields.get("moe_layer_freq")
    frequency = 1 if frequency is None else frequency
    if any(layer != 1 for layer in (frequency if isinstance(frequency, list) else [frequency])):
        raise ValueError(f"{fields.name}: dense layers (moe_layer_freq with a 0) are a variant "
                         "that this code does not compute")
    return _sizes(fields) | _experts(fields) | dict(
        expert_ffn=fields.number("expert_intermediate_size"), ffn=0, dense_layers=0)


def _moe2(fields):
    """LLaDA2.x's config.json."""
    fields.only(
        use_bias=(False,), use_qkv_bias=(None, False), use_qk_norm=(None, True),
        tie_word_embeddings=(None, False),
        score_function=(None, "sigmoid"), hidden_act=("silu",), norm_head=(None, False),
        use_sliding_window=(None, False), norm_topk_prob=(None, True), norm_softmax=(None, False),
        use_rmsnorm=(None, True), using_split_qkv_in_self_attention=(None, False),
        moe_router_enable_expert_bias=(None, True), router_dtype=(None, "fp32", "float32"))
    fields.ignore("sliding_window", "max_window_layers")  # of a window that is not used
    number, sizes = fields.number, _sizes(fields)
    rotary_dim, share = fields.get("rotary_dim"), fields.get("partial_rotary_factor")
    if share is not None or rotary_dim is None:
        share = number("partial_rotary_factor", low=0, high=1, kind=float)
        fields.only(rotary_dim=(None, int(sizes["head_dim"] * share)))  # two names of one thing
        rotary_dim = int(sizes["head_dim"] * share)
    else:
        rotary_dim = number("rotary_dim")
    expert_ffn = number("moe_intermediate_size")
    return sizes | _experts(fields) | dict(
        rotary_dim=rotary_dim, expert_ffn=expert_ffn, ffn=number("intermediate_size"),
        dense_layers=number("first_k_dense_replace", low=0),
        shared=expert_ffn * number("num_shared_experts", low=0),
        groups=number("n_group"), top_groups=number("topk_group"),
        routed_scale=number("routed_scaling_factor", low=0, kind=float))


def _sizes(fields):
    """The sizes under the library's usual names."""
    number = fields.number
    width, heads = number("hidden_size"), number("num_attention_heads")
    head_dim = number("head_dim") if fields.get("head_dim") else fields.share(width, heads)
    return dict(
        vocab_size=number("vocab_size", high=1 << 24), width=width,
        layers=number("num_hidden_layers", high=1000), heads=heads,
        kv_heads=number("num_key_value_heads", "num_attention_heads"), head_dim=head_dim,
        rotary_dim=head_dim,
        rope_theta=number("rope_theta", high=1e12, kind=float),
        eps=number("rms_norm_eps", low=0, high=1, kind=float),
        max_length=number("max_position_embeddings", high=1 << 30))


def _experts(fields):
    """How many experts there are, and how many a token uses."""
    number = fields.number
    return dict(experts=number("num_experts", high=1 << 14), top_k=number("num_experts_per_tok"))


def _llama(fields, biases=(None, False)):
    """The library's config.json of Llama and Qwen3. biases: what attention_bias may be."""
    fields.only(
        hidden_act=("silu",), attention_bias=biases, mlp_bias=(None, False),
        use_sliding_window=(None, False), use_mrope=(None, False), pretraining_tp=(None, 1),
        tie_word_embeddings=(None, False, True), is_llama_config=(None, True),
        rope_interleaved=(None, False), partial_rotary_factor=(None, 1))
    fields.ignore("sliding_window", "max_window_layers")  # of a window that is not used
    sizes = _sizes(fields)
    kinds = fields.get("layer_types")
    if kinds not in (None, ["full_attention"] * sizes["layers"]):
        fields.refuse("layer_types", kinds)
    return sizes | dict(ffn=fields.number("intermediate_size"), dense_layers=sizes["layers"],
                        tied=bool(fields.get("tie_word_embeddings")))


# What the library calls models that say what comes next. Some of that name are diffusion models
# already: their config.json or tokenizer names a mask.
LEFT_TO_RIGHT = ("llama", "qwen2", "qwen3")


def _qwen2(fields):
    """Qwen2's and Qwen2.5's config.json. Its queries, keys and values always have a bias."""
    return _llama(fields, biases=(None, True))


def _dream(fields):
    """Dream's config.json: Qwen2.5's. Token i is predicted by the hidden state of token i - 1."""
    return _qwen2(fields) | dict(shift=True)


def _sdar(fields):
    """SDAR's config.json: Qwen3's, and how long a block is."""
    fields.ignore("debug", "ep_size", "fuse_cross_entropy", "micro_forward", "skip_checkpoint",
                  "use_deepep")  # of its training
    sizes = _llama(fields)
    if fields.get("block_size") is not None:
        sizes["block_length"] = fields.number("block_size", high=1 << 12)
    return sizes


# A tiny model's widths are multiples of 64, the block in which bitsandbytes quantises.
FAMILIES = {
    "llada": Family(
        title="LLaDA", model_types=("llada",), marker="n_layers", translate=_dense,
        block=LLaDABlock, embed="model.transformer.wte", layers="model.transformer.blocks",
        norm="model.transformer.ln_f", head="model.transformer.ff_out",
        attention=("q_proj", "k_proj", "v_proj", "attn_out"),
        ffn=("ff_proj", "up_proj", "ff_out"), router="", head_norms=False,
        rotary_in_float32=True, block_length=0, decoder=memdlm.denoise,
        mask_token="<|mdm_mask|>", turn_ends=("<|eot_id|>",),
        turn_marks=("<|start_header_id|>", "<|end_header_id|>"),
        published={"llada-8b": dict(
            model_type="llada", d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32,
            mlp_hidden_size=12288, vocab_size=126464, embedding_size=126464, block_type="llama",
            layer_norm_type="rms", activation_type="silu", rms_norm_eps=1e-5,
            rope_theta=500000.0, max_sequence_length=4096, weight_tying=False,
            mask_token_id=126336, eos_token_id=126081)},
        tiny=dict(d_model=64, n_layers=4, n_heads=4, n_kv_heads=4, mlp_hidden_size=128,
                  vocab_size=320, embedding_size=320, eos_token_id=300, mask_token_id=301)),
    "llada_moe": Family(
        title="LLaDA-MoE", model_types=("llada", "lladamoe", "llada_moe"), marker="num_experts",
        translate=_moe, block=LLaDAMoEBlock, embed="model.embed_tokens", layers="model.layers",
        norm="model.norm", head="lm_head", attention=("q_proj", "k_proj", "v_proj", "o_proj"),
        ffn=("gate_proj", "up_proj", "down_proj"), router="gate", head_norms=True,
        rotary_in_float32=False, block_length=0, decoder=memdlm.denoise,
        mask_token="<|mask|>", turn_ends=("<|role_end|>",),
        turn_marks=("<role>", "</role>"),
        published={"llada-moe": dict(
            model_type="llada", hidden_size=2048, num_hidden_layers=16, num_attention_heads=16,
            num_key_value_heads=16, expert_intermediate_size=1024, num_experts=64,
            num_experts_per_tok=8, vocab_size=157184, rms_norm_eps=1e-5, rope_theta=50000,
            hidden_act="silu", qk_layernorm=True, max_position_embeddings=8192,
            eos_token_id=156892, mask_token_id=156895)},
        tiny=dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=4, num_experts=8, num_experts_per_tok=2,
                  expert_intermediate_size=64, vocab_size=320, eos_token_id=300,
                  mask_token_id=301)),
    "llada2": Family(
        title="LLaDA2.x", model_types=("llada2_moe", "llada2_moe_21", "llada21_moe"),
        marker="", translate=_moe2, block=LLaDA2Block, embed="model.word_embeddings",
        layers="model.layers", norm="model.norm", head="lm_head",
        attention=("query_key_value", "dense"), ffn=("gate_proj", "up_proj", "down_proj"),
        router="", head_norms=True, rotary_in_float32=False, block_length=32,
        decoder=block_diffusion, mask_token="<|mask|>",
        turn_ends=("<|role_end|>",), turn_marks=("<role>", "</role>"),
        published={"llada2.1-mini": dict(
            model_type="llada2_moe", hidden_size=2048, num_hidden_layers=20,
            num_attention_heads=16, num_key_value_heads=4, head_dim=128, intermediate_size=5120,
            moe_intermediate_size=512, num_experts=256, num_experts_per_tok=8,
            num_shared_experts=1, n_group=8, topk_group=4, routed_scaling_factor=2.5,
            first_k_dense_replace=1, vocab_size=157184, rms_norm_eps=1e-6, rope_theta=600000,
            partial_rotary_factor=0.5, hidden_act="silu", use_bias=False,
            max_position_embeddings=32768, eos_token_id=156892, mask_token_id=156895)},
        tiny=dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
                  n_group=4, topk_group=2, intermediate_size=128, moe_intermediate_size=64,
                  vocab_size=320, eos_token_id=300, mask_token_id=301)),
}


# ---- The dense models of the library's names ----------------------------------------------------

_TINY_DENSE = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                   num_key_value_heads=2, intermediate_size=128, vocab_size=320,
                   eos_token_id=300, mask_token_id=301)
# A2D: an autoregressive model's weights, trained on without the causal mask.
FAMILIES["a2d-qwen3"] = Family(
    title="Qwen3 (A2D)", model_types=("a2d-qwen3", "qwen3"), marker="", translate=_llama,
    block=Qwen3Block, embed="model.embed_tokens", layers="model.layers", norm="model.norm",
    head="lm_head", attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    ffn=("gate_proj", "up_proj", "down_proj"), router="", head_norms=True,
    rotary_in_float32=False, block_length=0, decoder=memdlm.denoise,
    mask_token="<|mask|>", turn_ends=("<|im_end|>",),
    turn_marks=("<|im_start|>",),
    published={"qwen3-0.6b": dict(
        model_type="a2d-qwen3", hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, intermediate_size=3072, vocab_size=151936,
        rms_norm_eps=1e-6, rope_theta=1000000, hidden_act="silu", tie_word_embeddings=True,
        max_position_embeddings=40960, eos_token_id=151645, mask_token_id=151669)},
    tiny=_TINY_DENSE | dict(head_dim=32))
FAMILIES["a2d-qwen2"] = FAMILIES["a2d-qwen3"]._replace(
    title="Qwen2 (A2D)", model_types=("a2d-qwen2", "qwen2"), translate=_qwen2, block=Qwen2Block,
    head_norms=False,
    published={"qwen2.5-coder-0.5b": dict(
        model_type="a2d-qwen2", hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, intermediate_size=4864, vocab_size=151936, rms_norm_eps=1e-6,
        rope_theta=1000000, hidden_act="silu", tie_word_embeddings=True,
        max_position_embeddings=32768, eos_token_id=151645, mask_token_id=151665)},
    tiny=_TINY_DENSE)
FAMILIES["a2d-llama"] = FAMILIES["a2d-qwen3"]._replace(
    title="Llama (A2D)", model_types=("a2d-llama", "llama"), block=LlamaBlock, head_norms=False,
    turn_ends=("<|eot_id|>", "<|im_end|>"),
    turn_marks=("<|start_header_id|>", "<|end_header_id|>", "<|im_start|>"),
    published={"smollm2": dict(  # SmolLM2-135M-Instruct; see smollm2.py
        model_type="a2d-llama", hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536, vocab_size=49152, rms_norm_eps=1e-5,
        rope_theta=100000, hidden_act="silu", tie_word_embeddings=True,
        max_position_embeddings=8192, eos_token_id=2, mask_token_id=16)},
    tiny=_TINY_DENSE)
FAMILIES["sdar"] = FAMILIES["a2d-qwen3"]._replace(
    title="SDAR", model_types=("sdar",), translate=_sdar, block_length=4,
    decoder=block_diffusion, mask_token="<|MASK|>",
    published={"sdar-1.7b": dict(
        model_type="sdar", hidden_size=2048, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, intermediate_size=6144, vocab_size=151936,
        rms_norm_eps=1e-6, rope_theta=1000000, hidden_act="silu", tie_word_embeddings=False,
        max_position_embeddings=32768, eos_token_id=151643, mask_token_id=151669,
        block_size=4)},
    tiny=_TINY_DENSE | dict(head_dim=32))
FAMILIES["dream"] = FAMILIES["a2d-qwen2"]._replace(
    title="Dream", model_types=("Dream",), translate=_dream,
    published={"dream-7b": dict(
        model_type="Dream", hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, intermediate_size=18944, vocab_size=152064, rms_norm_eps=1e-6,
        rope_theta=1000000, hidden_act="silu", tie_word_embeddings=False,
        max_position_embeddings=131072, eos_token_id=151643, mask_token_id=151666)},
    tiny=_TINY_DENSE)

PUBLISHED = {name: raw for family in FAMILIES.values() for name, raw in family.published.items()}
TINY = {name: raw | family.tiny for family in FAMILIES.values()
        for name, raw in family.published.items()}


def read_config(model):
    """The configuration of a model, before any of its weights are fetched."""
    return translate(*read_raw(model))


def read_raw(model):
    """The content of a model's config.json, and how to call it."""
    if model in PUBLISHED and not Path(model).is_dir():
        return PUBLISHED[model], "config.json"
    path = model_folder(model, ["config.json"]) / "config.json"
    return read_json(path), str(path)


def translate(raw, name="config.json"):
    """A config.json as a dict -> Config.

    ValueError if it is of another architecture, or of a variant with other mathematics.
    """
    fields = Fields(raw, name)
    kind = fields.raw.get("model_type")
    for key, family in FAMILIES.items():
        if kind in family.model_types and (not family.marker or family.marker in fields.raw):
            converted = key.startswith("a2d-")
            scaling = fields.read_common(may_scale=converted)
            sizes = family.translate(fields) | dict(rope_scaling=scaling)
            if converted:
                sizes |= fields.read_conversion()
            config = Config(family=key, **sizes, **fields.special_ids(sizes["vocab_size"]),
                            left_to_right=kind in LEFT_TO_RIGHT,
                            stored=fields.get("dtype") or fields.get("torch_dtype"))
            config.check(name)
            fields.refuse_unknown()
            return config
    known = []
    for family in FAMILIES.values():
        marker = f" with {family.marker}" if family.marker else ""
        known.append(f"{family.title} ({', '.join(family.model_types)}{marker})")
    raise ValueError(f"{name}: model_type {show(kind)} is not supported; supported are "
                     f"{', '.join(known)}; other architectures have no code here")
