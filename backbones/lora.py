"""The LoRA that the outer loop trains, through PEFT, and its files.

An adapter is two files as plain PEFT writes and reads them, adapter_config.json and
adapter_model.safetensors. A third, base.json, says which weights the adapter was trained on. Two
bases can have the same shapes, and an adapter fits only one of them.
"""
from __future__ import annotations

from pathlib import Path
from zlib import crc32

import torch

from backbones.families import FAMILIES
from files import model_folder, read_json, write_json, write_tensors, write_whole


# ---- On a backbone ------------------------------------------------------------------------------

def lora_targets(config, scope, router):
    """Names of the layers that get a LoRA.

    router: also the router, as in the published run. ValueError if it is no linear layer.
    """
    family = FAMILIES[config.family]
    if router and not family.router:
        raise ValueError("--lora-router is for LLaDA-MoE: the router of the other models is no "
                         "linear layer")
    names = {"all": family.attention + family.ffn, "attention": family.attention}[scope]
    return [*names] + [family.router] * router


def add_lora(backbone, rank, alpha, dropout, scope="all", router=False, dtype="float32", seed=0,
             targets=None):
    """Wrap the network in PEFT's LoRA. From then on only the LoRA is trainable.

    targets: names of the layers, in place of scope and router. Returns the backbone.
    """
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none",
        base_model_name_or_path=backbone.name,
        target_modules=targets or lora_targets(backbone.config, scope, router),
        exclude_modules=backbone.family.head)  # LLaDA-8B gives a layer and the head one name
    backbone.network.name_or_path = backbone.name  # where PEFT looks
    with torch.random.fork_rng(devices=[]):  # PEFT draws A from the global generator
        torch.manual_seed(seed)
        backbone.network = get_peft_model(backbone.network, config)
    for p in lora_weights(backbone).values():
        p.data = p.data.to(getattr(torch, dtype))
    return backbone


def lora_weights(backbone):
    """{key in PEFT's file: parameter}."""
    named = backbone.network.named_parameters()
    return {name.replace(".default.", "."): p for name, p in named if "lora_" in name}


def weights_checksum(embedding, vectors):
    """A checksum that tells base weights of one shape apart.

    It covers the first embeddings and all norms, in bfloat16, as checkpoints come: these are never
    quantised or adapted. So it does not tell a base from the same base with a merged LoRA.
    """
    some = torch.cat([embedding[:1024].flatten(), *vectors]).detach().to("cpu", torch.bfloat16)
    return f"{crc32(some.view(torch.int16).numpy().tobytes()):08x}"


# ---- Its files ----------------------------------------------------------------------------------

def save_adapter(backbone, folder):
    """Write the adapter's folder. From the first save on, it is a whole adapter at any moment.

    The weights are one file, and the other two stay as they are from one save of a run to the next.
    So it does not matter between which files a run is killed.
    """
    config = backbone.network.peft_config["default"].to_dict() | {"inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value
              for key, value in config.items()}
    base = {"name": backbone.name, "checksum": backbone.weights_checksum()}
    tensors = {key: p.detach().cpu().contiguous() for key, p in lora_weights(backbone).items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", config, indent=2)
    write_json(folder / "base.json", base)
    write_whole(folder / "adapter_model.safetensors",
                lambda path: write_tensors(path, tensors, {"format": "pt"}))


def read_adapter(folder, base):
    """An adapter's folder or hub id -> its config as a dict, and its tensors.

    The dict has the content of base.json under `made_for`. base: the name of the model that the
    adapter will be used on. ValueError, one line, if it is not a plain LoRA for that model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    folder = model_folder(folder)
    raw, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    check_adapter_config(raw, folder)
    check_adapter_name(raw, folder, base)
    raw["r"] = int(raw["r"])  # it may be written as 8.0
    made_for = folder / "base.json"
    raw["made_for"] = read_json(made_for) if made_for.exists() else {}
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing (an adapter must be in safetensors)") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite; the file is "
                             "damaged")
    return raw, tensors


def check_adapter_config(raw, folder):
    """ValueError unless adapter_config.json describes a plain LoRA."""
    if raw.get("init_lora_weights") not in (True, False, None, "gaussian"):
        raise ValueError(f"{folder}: initialised by {raw['init_lora_weights']}, which changes the "
                         "base weights too; not supported")
    variants = ("use_dora", "use_rslora", "modules_to_save", "target_parameters", "rank_pattern",
                "alpha_pattern", "layer_replication", "fan_in_fan_out", "lora_bias")
    odd = [key for key in variants if raw.get(key)]
    if raw.get("peft_type") != "LORA" or odd or raw.get("bias", "none") != "none":
        raise ValueError(f"{folder}: only plain LoRA adapters are read, this one has "
                         f"{', '.join(odd) or raw.get('peft_type')}")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    good = isinstance(rank, (int, float)) and 0 < rank <= 1 << 16
    if not good or not isinstance(alpha, (int, float)):
        raise ValueError(f"{folder}/adapter_config.json: r {rank!r} and lora_alpha {alpha!r} must "
                         "be numbers")


def check_adapter_name(raw, folder, base):
    """ValueError if the adapter names another published model than `base`.

    Base and Instruct models have the same shapes, so only the name tells them apart. A path on
    someone's disk says nothing.
    """
    theirs = str(raw.get("base_model_name_or_path") or "")
    our_name, their_name = (model.rstrip("/").rpartition("/")[2].lower()
                            for model in (base, theirs))
    merged = "merged with" in theirs + base  # load_backbone calls it so
    published = "llada" in our_name and "llada" in their_name and not Path(theirs).exists()
    if (merged and theirs != base) or (published and our_name != their_name):
        raise ValueError(f"{folder} was made for {theirs}, not for {base}; if that is the same "
                         "model, correct base_model_name_or_path in its adapter_config.json")


def refuse_other_weights(raw, folder, base, own):
    """ValueError if base.json names other weights. own: the checksum of those that are here."""
    made_for = raw["made_for"]
    if isinstance(made_for, dict) and made_for.get("checksum", own) != own:
        raise ValueError(f"{folder} was made for other weights ({made_for.get('name')}) than those "
                         f"of {base}; remove its base.json to use it all the same")


def load_adapter(backbone, folder, dropout=0.0, dtype="float32"):
    """Put a trained adapter on the backbone, live and trainable. Returns the backbone.

    ValueError unless every key of the file fits and every layer gets its part.
    """
    raw, tensors = read_adapter(folder, backbone.name)
    targets = sorted({key.rpartition(".lora_")[0].rpartition(".")[2] for key in tensors})
    allowed = lora_targets(backbone.config, "all", bool(backbone.family.router))
    if not targets or not set(targets) <= set(allowed):
        raise ValueError(f"{folder} adapts {', '.join(targets[:8]) or 'nothing'}; this model has "
                         f"{', '.join(allowed)}")
    add_lora(backbone, raw["r"], raw["lora_alpha"], dropout, dtype=dtype, targets=targets)
    places = lora_weights(backbone)
    wrong = [key for key in tensors.keys() | places.keys()
             if key not in tensors or key not in places or tensors[key].shape != places[key].shape]
    if wrong:
        raise ValueError(f"{folder} was made for another model: {len(wrong)} of {len(tensors)} "
                         f"keys do not fit, such as {min(wrong)}")
    refuse_other_weights(raw, folder, backbone.name, backbone.weights_checksum())
    for key, p in places.items():
        p.data.copy_(tensors[key])
    return backbone


def merge_adapter(source, folder, network, base, embed):
    """A source of weights like `source`, but with the adapter's product: W + (alpha / r) B A.

    The sum is made before W is quantised, so it is rounded once, not twice. source(name, shape)
    gives a tensor, as checkpoint.Shards does. network: the empty model. embed: the path of its
    embedding. ValueError if the adapter is for another model.
    """
    raw, tensors = read_adapter(folder, base)
    scale, weights = raw["lora_alpha"] / raw["r"], dict(network.named_parameters())
    stems = {key.rpartition(".lora_")[0] for key in tensors}
    for stem in sorted(stems):
        parts = [tensors.get(f"{stem}.lora_{x}.weight") for x in "AB"]
        shapes = [None if part is None else tuple(part.shape) for part in parts]
        place = weights.get(stem.removeprefix("base_model.model.") + ".weight")
        if place is None or shapes != [(raw["r"], place.shape[1]), (place.shape[0], raw["r"])]:
            raise ValueError(f"{folder} was made for another model: its {stem} has no place here")
    vectors = [source(name, p.shape) for name, p in weights.items() if p.dim() == 1]
    embedding = source(f"{embed}.weight", weights[f"{embed}.weight"].shape)
    refuse_other_weights(raw, folder, base, weights_checksum(embedding, vectors))

    def with_adapter(name, shape):
        W, stem = source(name, shape), "base_model.model." + name.removesuffix(".weight")
        if stem not in stems:
            return W
        A, B = (tensors[f"{stem}.lora_{x}.weight"].to(W.device).float() for x in "AB")
        return (W.float() + scale * B @ A).to(W.dtype)
    return with_adapter
