"""From a hub id or a folder to a Backbone: shards, 4 bits, random weights."""
from __future__ import annotations

import logging
import re
from dataclasses import replace

import torch
from torch import nn

from backbones.backbone import Backbone, build_network
from backbones.experts import Experts
from backbones.families import FAMILIES, PUBLISHED, translate
from backbones.lora import merge_adapter
from backbones.text import Tokenizer
from files import model_folder, read_json


logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it warns of an optional CPU kernel


class Shards:
    """The safetensors files of a model folder. Called with a name and a shape, gives that tensor, read from disk now."""

    def __init__(self, folder):
        self.folder, self.open, self.used = folder, {}, set()
        index = folder / "model.safetensors.index.json"
        if index.exists():
            names = read_json(index).get("weight_map", {})
            for file in set(names.values()):
                if not re.fullmatch(r"[\w.-]+\.safetensors", str(file)):
                    raise ValueError(f"{index} names the file {file!r}, which is not a safetensors file beside it")
            self.where = names
        else:
            self.where = dict.fromkeys(self.file("model.safetensors")[1], "model.safetensors")

    def file(self, name):
        from safetensors import SafetensorError, safe_open
        if name not in self.open:
            if not (self.folder / name).exists():
                raise ValueError(f"{self.folder / name} is missing")
            try:
                file = safe_open(self.folder / name, "pt")
                self.open[name] = file, set(file.keys())
            except SafetensorError as error:
                raise ValueError(f"{self.folder / name} is not a safetensors file: {error}") from None
        return self.open[name]

    def __call__(self, name, shape):
        if name not in self.where:
            raise ValueError(f"{self.folder}: the checkpoint has no {name}")
        file, names = self.file(self.where[name])
        if name not in names:
            raise ValueError(f"{self.folder / self.where[name]} has no {name}, though the index says so")
        found = file.get_slice(name).get_shape()
        if list(found) != list(shape):
            raise ValueError(f"{self.folder}: {name} should be {list(shape)}, is {list(found)}")
        self.used.add(name)
        return file.get_tensor(name)

    def finish(self):
        """Everything that is in the files must have been asked for."""
        if left := sorted(set(self.where) - self.used):
            raise ValueError(f"{self.folder}: {len(left)} weights of the checkpoint have no place in the model: "
                             f"{', '.join(left[:3])}{' ...' if len(left) > 3 else ''}")


def random_source(device, seed=0):
    """In place of a checkpoint: the same shapes, random numbers, made where they are needed and one at a time."""
    generator = torch.Generator(device).manual_seed(seed)

    def tensor(name, shape):
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        return torch.empty(shape, device=device).normal_(0, 0.02, generator=generator)
    return tensor


def quantisable(network, config):
    """{name: nn.Linear} of the blocks but the router: what --load-4bit quantises."""
    return {name: m for name, m in network.named_modules() if type(m) is nn.Linear and name != FAMILIES[config.family].head
            and name.rpartition(".")[2] != FAMILIES[config.family].router}


def to_4bit(network, config, dtype):
    """Replace every linear layer of the blocks but the router by bitsandbytes' nf4 with double quantisation."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise ValueError("--load-4bit needs bitsandbytes, which is not installed: pip install bitsandbytes") from None
    found = quantisable(network, config)
    if not found:
        raise ValueError("--load-4bit found no linear layer to quantise")
    for path, old in found.items():
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=dtype, compress_statistics=True,
                                quant_type="nf4", device="meta")
        # On some CPUs bitsandbytes switches in eval mode to a fused product that has no gradient: adapting to a prompt would
        # silently do nothing.
        new.support_avx512bf16_for_cpu = False
        place, _, name = path.rpartition(".")
        setattr(network.get_submodule(place), name, new)


def load_weights(network, source, dtype, device):
    """Give every parameter its values, one at a time, so that the host holds no more than one of them."""
    for path, module in network.named_modules():
        for name, empty in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            value = source(f"{path}.{name}", empty.shape)
            if not value.isfinite().all():
                raise ValueError(f"{path}.{name} holds numbers that are not finite; the checkpoint is damaged")
            if hasattr(empty, "quant_type"):  # Params4bit: quantised on its way to the device
                value = type(empty)(value.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True,
                                    module=module).to(device)
            elif isinstance(empty, nn.Parameter):
                value = nn.Parameter(value.to(device, dtype), requires_grad=False)
            else:  # the router's bias is stored in float32 and stays so
                value = value.to(device, torch.float32)
            setattr(module, name, value)


def load_backbone(model, load_4bit=False, dtype="auto", device=None, attention="full", checkpointing=False, merge="", random=False,
         seed=0, experts="loop"):
    """A hub id, a folder in the hub's layout, or (random=True) a name of PUBLISHED or a config -> Backbone, frozen.

    dtype: auto (bfloat16 on a GPU, the file's on a CPU), bfloat16 or float32. merge: folder of an adapter that is added
    to the weights before they are rounded. experts: loop, or grouped (see Experts). ValueError says in one line what does not fit.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if random:
        folder, raw, source = None, PUBLISHED[model] if isinstance(model, str) else model, random_source(device, seed)
    else:
        folder = model_folder(model)
        raw, source = read_json(folder / "config.json"), Shards(folder)
    config = translate(raw, str(folder / "config.json") if folder else "config")
    tokenizer = Tokenizer(folder, config) if folder and (folder / "tokenizer.json").exists() else None
    config = special_ids(config, tokenizer)
    if attention == "block" and not FAMILIES[config.family].block_length:
        raise ValueError(f"--attention block is for LLaDA2.x; {FAMILIES[config.family].title} attends fully")
    if dtype == "auto":
        stored = raw.get("dtype") or raw.get("torch_dtype")
        dtype = "bfloat16" if device.type == "cuda" or stored == "bfloat16" else "float32"
    dtype = getattr(torch, dtype)
    with torch.device("meta"):
        network = build_network(config)
        for module in network.modules():
            if isinstance(module, Experts):
                module.grouped = experts == "grouped"
        if load_4bit:
            to_4bit(network, config, dtype)
    load_weights(network, merge_adapter(source, merge, network, model, FAMILIES[config.family].embed) if merge else source, dtype, device)
    if folder:
        source.finish()
    if tokenizer:
        tokenizer.mask_id, tokenizer.eos_id = config.mask_id, config.eos_id
    network.is_loaded_in_4bit = load_4bit  # where PEFT looks
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # float32 products, the LoRA's above all, on tensor cores (TF32)
    name = model if folder else "random weights"
    name += f" merged with {merge}" if merge else ""
    return Backbone(network, config, tokenizer, attention, checkpointing, name).eval()


def special_ids(config, tokenizer):
    """The ids of mask and end: from config.json, else from the tokenizer, else the published ones."""
    family = FAMILIES[config.family]
    mask, eos = family.mask_id, family.eos_id
    given = (config.mask_id, tokenizer.mask_id if tokenizer else None, mask), (config.eos_id, tokenizer.eos_id if tokenizer else None, eos)
    mask, eos = (next(i for i in ids if i is not None) for ids in given)
    for what, i in (("mask", mask), ("end", eos)):
        if not isinstance(i, int) or not 0 <= i < config.vocab_size:
            raise ValueError(f"the {what} token's id is {i!r}, outside the vocabulary of {config.vocab_size}; "
                             f"set {'mask' if what == 'mask' else 'eos'}_token_id in config.json")
    if mask == eos:
        raise ValueError(f"mask and end token have the same id, {mask}; correct mask_token_id in config.json")
    return replace(config, mask_id=mask, eos_id=eos)


def describe(backbone):
    """One line: what was loaded."""
    is_4bit = [m for m in backbone.modules() if hasattr(m, "quant_state") and hasattr(m, "in_features")]
    adapted = sum(hasattr(m, "lora_A") for m in backbone.modules())
    lora = sum(p.numel() for n, p in backbone.named_parameters() if "lora_" in n)
    packed = sum(m.weight.numel() for m in is_4bit)
    whole = sum(m.in_features * m.out_features for m in is_4bit)
    total = sum(p.numel() for n, p in backbone.named_parameters() if "lora_" not in n) - packed + whole
    size = sum(p.numel() * p.element_size() for p in backbone.parameters())
    return (f"{backbone.title}: {human_count(total)} parameters, {len(is_4bit):,} layers in 4-bit, {adapted:,} with "
            f"LoRA ({human_count(lora)} parameters), {size / 2**30:.3g} GiB on {next(backbone.parameters()).device}")


def human_count(n):
    return f"{n / 1e9:.3g} billion" if n >= 1e9 else f"{n / 1e6:.3g} million"
