"""Tiny random models of every family, for several test files.

A new family is tested as soon as it has its row in backbones/families.py. If the transformers
library has the same architecture, it gets a row in LIBRARY too.
"""
import json

import pytest
import torch
from torch import nn

from backbones.backbone import build_network
from backbones.blocks import FeedForward, GroupRouter
from backbones.checkpoint import hub_weights, load_backbone
from backbones.experts import Experts, Stack
from backbones.families import PUBLISHED, TINY, translate
from backbones.lora import add_lora, lora_weights
import memdlm
from memdlm import Batch
from settings import Settings

NAMES = list(TINY)  # of every family
# What any of them has special, one of these has: the others run with the slow tests.
FAST = ("llada-8b", "llada-moe", "llada2.1-mini", "qwen3-0.6b", "dream-7b")
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES]


def empty_network(name):
    with torch.device("meta"):
        network = build_network(translate(PUBLISHED[name]))
    return network


def tiny_backbone(name, seed=0, **options):
    """Tiny random backbone with weights large enough that attention, router and φ matter."""
    raw = TINY[name] | {"mask_token_id": 301, "eos_token_id": 300, "pad_token_id": 300}
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


def random_batch(lengths, prompt=5, seed=0):
    """A batch of rows of these lengths, padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 256, (n,), generator=generator) for n in lengths]
    x0 = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    valid = torch.arange(x0.shape[1]) < torch.tensor(lengths)[:, None]
    maskable = valid & (torch.arange(x0.shape[1]) >= prompt)
    return Batch(x0, maskable, valid, list(range(len(lengths))), x0, valid)


def one_sample(batch, b):
    n = int(batch.valid[b].sum())
    cut = lambda x: x[b:b + 1, :n]
    return Batch(cut(batch.x0), cut(batch.maskable), cut(batch.valid), [batch.seeds[b]],
                 cut(batch.prompt), cut(batch.prompt_valid))


def all_logits(backbone, x, valid, phi=None, s=None):
    s = s or Settings()
    return backbone.head(
        memdlm.upper_layers(backbone, s, memdlm.lower_layers(backbone, s, x, valid), valid, phi))


def library_model(name, **rotation):
    """The library's model of the same architecture, made to look both ways.

    rotation: what its rope_parameters say beside theta.
    """
    import transformers
    c = translate(TINY[name])
    common = dict(
        vocab_size=c.vocab_size, hidden_size=c.width, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
        rms_norm_eps=c.eps, tie_word_embeddings=c.tied,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta} | rotation)
    model = LIBRARY[name](transformers, c, common)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model.eval()


def make_llama(transformers, c, common):
    config = transformers.LlamaConfig(intermediate_size=c.ffn, **common)
    return transformers.LlamaForCausalLM(config)


def make_qwen3_moe(transformers, c, common):
    config = transformers.Qwen3MoeConfig(
        num_experts=c.experts, num_experts_per_tok=c.top_k, moe_intermediate_size=c.expert_ffn,
        norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[],
        intermediate_size=c.expert_ffn, **common)
    return transformers.Qwen3MoeForCausalLM(config)


def make_qwen2(transformers, c, common):
    config = transformers.Qwen2Config(intermediate_size=c.ffn, **common)
    return transformers.Qwen2ForCausalLM(config)


def make_qwen3(transformers, c, common):
    config = transformers.Qwen3Config(intermediate_size=c.ffn, **common)
    return transformers.Qwen3ForCausalLM(config)


# The test row of a model: its class in the transformers library, where it has one.
LIBRARY = {"llada-8b": make_llama, "llada-moe": make_qwen3_moe, "qwen3-0.6b": make_qwen3,
           "qwen2.5-coder-0.5b": make_qwen2, "smollm2": make_llama, "sdar-1.7b": make_qwen3,
           "dream-7b": make_qwen2}


def to_library(name, own, keys):
    """Tensors under a checkpoint's names -> the same under the library's names, `keys`."""
    renamed = {"llada-8b": [
        ("model.embed_tokens", "model.transformer.wte"), ("lm_head", "model.transformer.ff_out"),
        ("model.norm", "model.transformer.ln_f"), ("model.layers", "model.transformer.blocks"),
        ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ff_norm"),
        ("self_attn.o_proj", "attn_out"), ("self_attn.", ""), ("mlp.gate_proj", "ff_proj"),
        ("mlp.up_proj", "up_proj"), ("mlp.down_proj", "ff_out")]}
    experts, out = translate(TINY[name]).experts, {}
    for key in keys:
        if ".experts.gate_up_proj" in key:
            stem = key.removesuffix("gate_up_proj")
            out[key] = torch.stack([torch.cat([own[f"{stem}{e}.{part}_proj.weight"]
                                               for part in ("gate", "up")])
                                    for e in range(experts)])
        elif ".experts.down_proj" in key:
            stem = key.removesuffix("down_proj")
            out[key] = torch.stack([own[f"{stem}{e}.down_proj.weight"] for e in range(experts)])
        else:
            place = key
            for old, new in renamed.get(name, ()):
                place = place.replace(old, new)
            if place == "lm_head.weight" and place not in own:  # tied
                place = "model.embed_tokens.weight"
            out[key] = own[place]
    return out


def dequantised(backbone):
    """{name: the weights of a layer in 4 bits, unpacked}"""
    from bitsandbytes.functional import dequantize_4bit
    unpacked = {}
    for name, m in backbone.network.named_modules():
        if isinstance(m, Stack) and m.quant_state is not None:
            unpacked[name] = m.unpacked(torch.float32)
        elif hasattr(getattr(m, "weight", None), "quant_state"):
            unpacked[name] = dequantize_4bit(m.weight.data, m.weight.quant_state)
    return unpacked


class SingleExperts(nn.ModuleList):
    """The experts of a layer as a checkpoint names them, one after the other, for plain PEFT."""

    def forward(self, x, weights, chosen, fullest=None):
        rows, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        for number, expert in enumerate(self):
            token, choice = (chosen == number).nonzero(as_tuple=True)
            share = weights[token, choice, None] * expert(rows[token])
            out = out.index_add(0, token, share)
        return out.view_as(x)


def take_stacks_apart(network):
    """The network with every stack as single linear layers of the same weights."""
    weights = hub_weights(network)
    for path, module in [*network.named_modules()]:
        if isinstance(module, Experts):
            stack, (outer, _, name) = module.gate_proj, path.rpartition(".")
            single = SingleExperts(FeedForward(stack.in_features, stack.out_features)
                                   for _ in range(stack.experts))
            setattr(network.get_submodule(outer), name, single)
    network.load_state_dict(weights)
    return network


def random_lora(backbone, seed=0, router=False, **options):
    add_lora(backbone, 4, 8.0, 0.0, router=router, **options)
    generator = torch.Generator().manual_seed(seed)
    for key, p in lora_weights(backbone).items():
        p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return backbone


def edit_json(file, **changes):
    """A function that changes fields of a JSON file in a folder; None removes one."""
    def change(copy):
        raw = json.loads((copy / file).read_text())
        for key, value in changes.items():
            raw.pop(key, None)
            if value is not None:
                raw[key] = value
        (copy / file).write_text(json.dumps(raw))
    return change
