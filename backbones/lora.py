"""The LoRA that the outer loop trains, through PEFT, and its files.

An adapter is two files as plain PEFT writes and reads them, adapter_config.json and
adapter_model.safetensors. A third, base.json, says which weights the adapter was trained on, and
how: two bases can have the same shapes, and an adapter fits only one of them.
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from zlib import crc32

import torch
from torch import nn

from backbones.config import show
from backbones.experts import Stack, draw_kept, drop
from backbones.families import FAMILIES
from console import say
from files import (
    MOST_TENSORS, model_folder, open_tensors, read_json, read_tensor, write_json, write_tensors,
    write_whole,
)

# The fields of adapter_config.json that change nothing once the adapter is trained ...
HARMLESS = frozenset("""
    r lora_alpha base_model_name_or_path target_modules lora_dropout inference_mode revision
    task_type auto_mapping peft_version megatron_core qalora_group_size
    """.split())
# ... and those of PEFT's variants, with the values that make it a plain LoRA. Null always does.
PLAIN = dict(
    peft_type=("LORA",), bias=("none",), init_lora_weights=(True, False, "gaussian"),
    use_dora=(False,), use_rslora=(False,), use_qalora=(False,), use_bdlora=(False,),
    lora_bias=(False,), fan_in_fan_out=(False,), ensure_weight_tying=(False,), rank_pattern=({},),
    alpha_pattern=({},), loftq_config=({},), modules_to_save=([],), target_parameters=([],),
    layers_to_transform=([],), layers_pattern=([], ""), layer_replication=([],),
    trainable_token_indices=([], {}), alora_invocation_tokens=([],),
    exclude_modules=([], "", *(family.head for family in FAMILIES.values())))


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
    targets, network = targets or lora_targets(backbone.config, scope, router), backbone.network
    head = backbone.family.head  # LLaDA-8B gives a layer and the head one name
    backbone.lora_config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=targets,
        base_model_name_or_path=backbone.name, exclude_modules=head)
    named = [(name, module) for name, module in network.named_modules()
             if name.rpartition(".")[2] in targets and name != head]
    network.requires_grad_(False)
    network.name_or_path = backbone.name  # where PEFT looks
    with torch.random.fork_rng(devices=[]):  # A is drawn from the global generator
        torch.manual_seed(seed)
        # PEFT knows nothing of stacks of experts, so these have a LoRA of their own.
        stacks = [name for name, module in named if isinstance(module, Stack)]
        for name in stacks:
            network.get_submodule(name).add_lora(rank, alpha, dropout)
        if len(stacks) < len(named):
            theirs = replace(backbone.lora_config, exclude_modules=[head, *stacks])
            backbone.network = get_peft_model(network, theirs)
            for module in backbone.network.modules():
                if dropout and hasattr(module, "lora_dropout"):
                    module.lora_dropout["default"] = Dropout(dropout)
    for name, p in backbone.network.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_" in name:
            p.data = p.data.to(getattr(torch, dtype))
    return backbone


class Dropout(nn.Dropout):
    """The same in less time and memory on a CPU, where a training step would feel it."""

    def forward(self, x):
        if not (self.training and x.is_cpu):
            return super().forward(x)
        return drop(x, draw_kept(x, self.p), self.p)


def lora_weights(backbone):
    """{key in PEFT's file: the weight}. An expert's are views of its stack's."""
    weights = {}
    for path, module in backbone.core.named_modules():
        if isinstance(module, Stack):
            paths, parts = module.names(path), [module.lora_A, module.lora_B]
        elif hasattr(module, "lora_A"):
            paths, parts = [path], [[x["default"].weight] for x in (module.lora_A, module.lora_B)]
        else:
            continue
        for letter, part in zip("AB", parts):
            weights |= {f"base_model.model.{one}.lora_{letter}.weight": W
                        for one, W in zip(paths, () if part is None else part)}
    return weights


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
    config = backbone.lora_config.to_dict() | {"inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value
              for key, value in config.items()}
    base = {"name": backbone.name, "checksum": backbone.weights_checksum(),
            "attention": backbone.attention, "shift": backbone.config.shift}
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
    folder = model_folder(folder)
    raw, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    check_adapter_config(raw, folder)
    check_adapter_name(raw, folder, base)
    raw["r"] = int(raw["r"])  # it may be written as 8.0
    made_for = folder / "base.json"
    raw["made_for"] = read_json(made_for) if made_for.exists() else {}
    if not path.is_file():
        raise ValueError(f"{path} is missing (an adapter must be in safetensors)")
    file = open_tensors(path, 2 * MOST_TENSORS)
    tensors = {name: read_tensor(file, name, path).float() for name in file.keys()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {show(name)} holds numbers that are not finite; the file "
                             "is damaged")
    return raw, tensors


def check_adapter_config(raw, folder):
    """ValueError unless adapter_config.json describes a plain LoRA.

    As in a model's config.json, a field is taken if it is known and asks for what is computed
    here, or if it changes nothing.
    """
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: only plain LoRA adapters are read, this is none; its "
                         "adapter_config.json has no peft_type LORA")
    how = raw.get("init_lora_weights")
    if how is not None and how not in PLAIN["init_lora_weights"]:
        raise ValueError(f"{folder}: initialised by {show(how)}, which changes the base weights "
                         "too; not supported")
    for key, value in raw.items():
        if value is None or key in HARMLESS or (key in PLAIN and value in PLAIN[key]):
            continue
        why = "" if key in PLAIN else ", a field that this code does not know"
        raise ValueError(f"{folder}: only plain LoRA adapters are read, this one has {show(key)} "
                         f"{show(value)}{why}")
    for key, high in (("r", 1 << 16), ("lora_alpha", 1 << 20)):
        value = raw.get(key)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not 0 < value <= high or (key == "r" and value % 1):
            raise ValueError(f"{folder}/adapter_config.json: {key} {show(value)} must be a "
                             f"{'whole ' * (key == 'r')}number above 0, at most {high}")


def check_adapter_name(raw, folder, base):
    """ValueError if the adapter names another published model than `base`.

    Base and Instruct models have the same shapes, so only the name tells them apart. A path on
    someone's disk says nothing.
    """
    theirs = raw.get("base_model_name_or_path") or ""
    if not isinstance(theirs, str) or not theirs.isprintable() or len(theirs) > 1000:
        raise ValueError(f"{folder}: base_model_name_or_path is {show(theirs)}, which is no name")
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
        name = show(made_for.get("name"))
        raise ValueError(f"{folder} was made for other weights ({name}) than those "
                         f"of {base}; remove its base.json to use it all the same")


def check_sight(raw, folder, config):
    """ValueError if base.json says that the logits were at other places; a note on another sight.

    A model that looks both ways may well go on from one that looked left, so that is no error.
    """
    made_for = raw["made_for"] if isinstance(raw["made_for"], dict) else {}
    shift, attention = (made_for.get(key, getattr(config, key)) for key in ("shift", "attention"))
    if shift != config.shift:
        raise ValueError(f"{folder} was trained {'with' if shift else 'without'} --shift; "
                         f"{'add it' if shift else 'leave it out'}")
    if attention != config.attention and "causal" in f"{attention} {config.attention}":
        say(f"note: {folder} was trained with --attention {show(attention)}, not with "
            f"{config.attention} as here")


def check_places(tensors, network, config, rank, folder):
    """Names of the layers that an adapter adapts, and {key of its file: shape} of what they need.

    ValueError if a tensor belongs to anything else, such as a norm or an embedding. network: the
    model before it gets a LoRA.
    """
    family = FAMILIES[config.family]
    allowed = lora_targets(config, "all", bool(family.router))
    name_in = {key: key.rpartition(".lora_")[0].rpartition(".")[2] for key in tensors}
    targets, shapes = sorted(set(name_in.values())), {}
    odd = [show(key) for key, name in name_in.items() if name not in allowed]
    if odd or not targets:
        raise ValueError(f"{folder} adapts {odd[0] if odd else 'nothing'}; a LoRA on this model is "
                         f"on {', '.join(allowed)}")
    for path, module in network.named_modules():
        wanted = path.rpartition(".")[2] in targets and path != family.head
        if not wanted or not isinstance(module, (nn.Linear, Stack)):
            continue
        for name in module.names(path) if isinstance(module, Stack) else [path]:
            stem = f"base_model.model.{name}.lora_"
            shapes[stem + "A.weight"] = (rank, module.in_features)
            shapes[stem + "B.weight"] = (module.out_features, rank)
    wrong = [key for key, tensor in tensors.items() if tuple(tensor.shape) != shapes.get(key)]
    if wrong:
        raise ValueError(f"{folder} was made for another model: {len(wrong)} of {len(tensors)} "
                         f"keys do not fit, such as {show(min(wrong))}")
    return targets, shapes


def load_adapter(backbone, folder, dropout=0.0, dtype="float32"):
    """Put a trained adapter on the backbone, live and trainable. Returns the backbone.

    ValueError unless every key of the file fits and every layer gets its part.
    """
    raw, tensors = read_adapter(folder, backbone.name)
    targets, shapes = check_places(tensors, backbone.network, backbone.config, raw["r"], folder)
    missing = shapes.keys() - tensors.keys()
    if missing:
        raise ValueError(f"{folder} was made for another model: {len(missing)} keys do not fit: "
                         f"they are missing, such as {min(missing)}")
    refuse_other_weights(raw, folder, backbone.name, backbone.weights_checksum())
    check_sight(raw, folder, backbone.config)
    add_lora(backbone, raw["r"], raw["lora_alpha"], dropout, dtype=dtype, targets=targets)
    for key, weight in lora_weights(backbone).items():
        weight.data.copy_(tensors[key])
    return backbone


def merge_adapter(source, folder, network, base, config):
    """A source of weights like `source`, but with the adapter's product: W + (alpha / r) B A.

    The sum is made before W is quantised, so it is rounded once, not twice. source(name, shape)
    gives a tensor, as checkpoint.Shards does. network: the empty model. ValueError if the adapter
    is for another model.
    """
    raw, tensors = read_adapter(folder, base)
    scale, weights = raw["lora_alpha"] / raw["r"], dict(network.named_parameters())
    check_places(tensors, network, config, raw["r"], folder)
    stems = {key.rpartition(".lora_")[0] for key in tensors}
    for stem in stems:
        if not all(f"{stem}.lora_{x}.weight" in tensors for x in "AB"):
            raise ValueError(f"{folder} is damaged: of {stem} only A or only B is there")
    embed = FAMILIES[config.family].embed
    vectors = [source(name, p.shape) for name, p in weights.items() if p.dim() == 1]
    embedding = source(f"{embed}.weight", weights[f"{embed}.weight"].shape)
    refuse_other_weights(raw, folder, base, weights_checksum(embedding, vectors))
    check_sight(raw, folder, config)

    def with_adapter(name, shape):
        W, stem = source(name, shape), "base_model.model." + name.removesuffix(".weight")
        if stem not in stems:
            return W
        A, B = (tensors[f"{stem}.lora_{x}.weight"].to(W.device) for x in "AB")
        return (W.float() + scale * B @ A).to(W.dtype)
    return with_adapter
