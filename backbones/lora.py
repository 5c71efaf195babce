"""The outer LoRA, through PEFT."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from zlib import crc32

import torch

from backbones.families import FAMILIES
from files import model_folder, read_json


def lora_targets(config, scope, router):
    """Names of the layers that get a LoRA. The published run had it on the router of LLaDA-MoE too, an nn.Linear there."""
    family = FAMILIES[config.family]
    names = {"all": family.attention + family.ffn, "attention": family.attention}[scope]
    if router and not family.router:
        raise ValueError("--lora-router is for LLaDA-MoE: the router of the other models is no linear layer")
    return [*names] + [family.router] * router


def add_lora(backbone, rank, alpha, dropout, scope="all", router=False, dtype="float32", seed=0, targets=None):
    """Wrap the network in PEFT's LoRA; only its weights are trainable then."""
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", base_model_name_or_path=backbone.name,
                        target_modules=targets or lora_targets(backbone.config, scope, router),
                        exclude_modules=backbone.family.head)  # LLaDA-8B calls it ff_out too
    backbone.network.name_or_path = backbone.name  # where PEFT looks
    with torch.random.fork_rng(devices=[]):  # PEFT draws A from the global generator
        torch.manual_seed(seed)
        backbone.network = get_peft_model(backbone.network, config)
    for name, p in backbone.network.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(getattr(torch, dtype))
    return backbone


def lora_weights(backbone):
    """{key in PEFT's file: parameter}."""
    return {name.replace(".default.", "."): p for name, p in backbone.network.named_parameters() if "lora_" in name}


def weights_checksum(embedding, vectors):
    """Tells base weights of one shape apart, by some that are never quantised or adapted: embeddings and all norms; in bfloat16,
    as checkpoints come. (So a base that differs by a merged LoRA alone is not told apart.)"""
    some = torch.cat([embedding[:1024].flatten(), *vectors]).detach().to("cpu", torch.bfloat16)
    return f"{crc32(some.view(torch.int16).numpy().tobytes()):08x}"


def save_adapter(backbone, folder):
    """adapter_config.json and adapter_model.safetensors, as plain PEFT writes and reads them, and in base.json what it is for.
    Whole or not at all."""
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    backbone.network.save_pretrained(aside, save_embedding_layers=False)
    (aside / "base.json").write_text(json.dumps({"name": backbone.name, "checksum": backbone.weights_checksum()}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def read_adapter(folder, base):
    """An adapter's folder or hub id -> its LoraConfig fields, with base.json under made_for, and tensors. Only plain LoRA is taken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    folder = model_folder(folder)
    raw, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if raw.get("init_lora_weights") not in (True, False, None, "gaussian"):
        raise ValueError(f"{folder}: initialised by {raw['init_lora_weights']}, which changes the base weights too; not supported")
    odd = [key for key in ("use_dora", "use_rslora", "modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern",
                           "layer_replication", "fan_in_fan_out", "lora_bias") if raw.get(key)]
    if raw.get("peft_type") != "LORA" or odd or raw.get("bias", "none") != "none":
        raise ValueError(f"{folder}: only plain LoRA adapters are read, this one has {', '.join(odd) or raw.get('peft_type')}")
    if not isinstance(raw.get("r"), (int, float)) or not 0 < raw["r"] <= 1 << 16 or not isinstance(raw.get("lora_alpha"), (int, float)):
        raise ValueError(f"{folder}/adapter_config.json: r {raw.get('r')!r} and lora_alpha {raw.get('lora_alpha')!r} must be numbers")
    raw["r"], theirs = int(raw["r"]), str(raw.get("base_model_name_or_path") or "")
    ours, their = (name.rstrip("/").rpartition("/")[2].lower() for name in (base, theirs))
    # Shapes are checked in any case; Base and Instruct have the same. A path on someone's disk says nothing.
    published = "llada" in ours and "llada" in their and not Path(theirs).exists()
    if "merged with" in theirs + base and theirs != base or published and ours != their:
        raise ValueError(f"{folder} was made for {theirs}, not for {base}; if that is the same model, correct "
                         "base_model_name_or_path in its adapter_config.json")
    raw["made_for"] = read_json(folder / "base.json") if (folder / "base.json").exists() else {}
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing (an adapter must be in safetensors)") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if broken := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), ""):
        raise ValueError(f"{path}: {broken} holds numbers that are not finite; the file is damaged")
    return raw, tensors


def refuse_other_weights(raw, folder, base, own):
    """Of two bases with the same shapes, an adapter fits one. own: the checksum of that which is here."""
    made_for = raw["made_for"]
    if isinstance(made_for, dict) and made_for.get("checksum", own) != own:
        raise ValueError(f"{folder} was made for other weights ({made_for.get('name')}) than those of {base}; "
                         "remove its base.json to use it all the same")


def load_adapter(backbone, folder, dropout=0.0, dtype="float32"):
    """Put a trained adapter on the backbone, live and trainable. Every key must fit, and no layer may go without."""
    raw, tensors = read_adapter(folder, backbone.name)
    targets = sorted({key.rpartition(".lora_")[0].rpartition(".")[2] for key in tensors})
    allowed = lora_targets(backbone.config, "all", bool(backbone.family.router))
    if not targets or not set(targets) <= set(allowed):
        raise ValueError(f"{folder} adapts {', '.join(targets[:8]) or 'nothing'}; this model has {', '.join(allowed)}")
    add_lora(backbone, raw["r"], raw["lora_alpha"], dropout, dtype=dtype, targets=targets)
    places = lora_weights(backbone)
    wrong = [key for key in tensors.keys() | places.keys()
             if key not in tensors or key not in places or tensors[key].shape != places[key].shape]
    if wrong:
        raise ValueError(f"{folder} was made for another model: {len(wrong)} of {len(tensors)} keys do not fit, such as {min(wrong)}")
    refuse_other_weights(raw, folder, backbone.name, backbone.weights_checksum())
    for key, p in places.items():
        p.data.copy_(tensors[key])
    return backbone


def merge_adapter(source, folder, network, base, embed):
    """The same source of weights, with an adapter's W + (alpha / r) B A. Before quantisation: rounded once, not twice."""
    raw, tensors = read_adapter(folder, base)
    scale, weights = raw["lora_alpha"] / raw["r"], dict(network.named_parameters())
    stems = {key.rpartition(".lora_")[0] for key in tensors}
    for stem in sorted(stems):
        shapes = [tuple(tensors[f"{stem}.lora_{x}.weight"].shape) if f"{stem}.lora_{x}.weight" in tensors else None for x in "AB"]
        place = weights.get(stem.removeprefix("base_model.model.") + ".weight")
        if place is None or shapes != [(raw["r"], place.shape[1]), (place.shape[0], raw["r"])]:
            raise ValueError(f"{folder} was made for another model: its {stem} has no place here")
    vectors = [source(name, p.shape) for name, p in weights.items() if p.dim() == 1]
    refuse_other_weights(raw, folder, base, weights_checksum(source(f"{embed}.weight", weights[f"{embed}.weight"].shape), vectors))

    def with_adapter(name, shape):
        W, stem = source(name, shape), "base_model.model." + name.removesuffix(".weight")
        if stem not in stems:
            return W
        A, B = (tensors[f"{stem}.lora_{x}.weight"].to(W.device).float() for x in "AB")
        return (W.float() + scale * B @ A).to(W.dtype)
    return with_adapter
