"""From a hub id or a folder to a backbone: shards, 4 bits, random weights.

First the network is built without any values (on PyTorch's "meta" device). Then its parameters get
their values one at a time. So the host never holds more than one parameter besides the model.
"""
from __future__ import annotations

import logging
import re
from dataclasses import replace

import torch
from torch import nn

from backbones.backbone import Backbone, build_network
from backbones.config import end_ids
from backbones.experts import Experts
from backbones.families import FAMILIES, PUBLISHED, translate
from backbones.lora import merge_adapter
from backbones.text import Tokenizer
from files import model_folder, read_json

# bitsandbytes warns of an optional CPU kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def load_backbone(model, load_4bit=False, dtype="auto", device=None, attention="full",
                  checkpointing=False, merge="", random=False, seed=0, experts="loop"):
    """A hub id or a folder in the hub's layout -> Backbone, frozen and in eval mode.

    random: `model` is a name of PUBLISHED or a config.json as a dict, and the weights are random.
    dtype: auto (bfloat16 on a GPU, the file's on a CPU), bfloat16 or float32. merge: the folder of
    an adapter that is added to the weights before they are rounded. experts: loop or grouped, see
    Experts. A ValueError says in one line what does not fit.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if random:
        folder, raw = None, PUBLISHED[model] if isinstance(model, str) else model
        source = random_source(device, seed)
    else:
        folder = model_folder(model)
        raw, source = read_json(folder / "config.json"), Shards(folder)
    config = translate(raw, str(folder / "config.json") if folder else "config")
    if folder and (folder / "generation_config.json").exists():
        ends = end_ids(read_json(folder / "generation_config.json"), folder)
        config = replace(config, eos_ids=(*dict.fromkeys([*config.eos_ids, *ends]),))
    family, tokenizer = FAMILIES[config.family], None
    if folder and (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer(folder, config)
    config = set_special_ids(config, tokenizer, guess=random)
    if attention == "block" and not family.block_length:
        raise ValueError(f"--attention block is for LLaDA2.x; {family.title} attends fully")
    dtype = choose_dtype(dtype, raw, device)
    with torch.device("meta"):
        network = build_network(config)
        for module in network.modules():
            if isinstance(module, Experts):
                module.grouped = experts == "grouped"
        if load_4bit:
            to_4bit(network, config, dtype)
    weights = merge_adapter(source, merge, network, model, family.embed) if merge else source
    load_weights(network, weights, dtype, device)
    if folder:
        source.finish()
    if tokenizer:
        tokenizer.mask_id, tokenizer.eos_id = config.mask_id, config.eos_id
    network.is_loaded_in_4bit = load_4bit  # where PEFT looks
    if device.type == "cuda":
        # TF32: products in float32, above all the LoRA's, on tensor cores.
        torch.set_float32_matmul_precision("high")
    name = (model if folder else "random weights") + (f" merged with {merge}" if merge else "")
    return Backbone(network, config, tokenizer, attention, checkpointing, name).eval()


def choose_dtype(dtype, raw, device):
    """The precision of weights and computation, as torch names it."""
    if dtype == "auto":
        stored = raw.get("dtype") or raw.get("torch_dtype")
        dtype = "bfloat16" if device.type == "cuda" or stored == "bfloat16" else "float32"
    return getattr(torch, dtype)


def set_special_ids(config, tokenizer, guess=False):
    """The config with the ids of mask and end.

    They come from config.json, else from the tokenizer. guess: else from the family's row, which
    is good enough for random weights.
    """
    family = FAMILIES[config.family]
    mask, eos = config.mask_id, config.eos_id
    if tokenizer:
        mask = tokenizer.mask_id if mask is None else mask
        eos = tokenizer.eos_id if eos is None else eos
    if guess:
        mask = family.mask_id if mask is None else mask
        eos = family.eos_id if eos is None else eos
    ends = dict.fromkeys([eos, *config.eos_ids])
    for what, key, i in [("mask", "mask_token_id", mask),
                         *(("end", "eos_token_id", end) for end in ends)]:
        if i is None:
            raise ValueError(f"neither config.json nor the tokenizer says which token is the "
                             f"{what}; set {key} in config.json")
        if type(i) is not int or not 0 <= i < config.vocab_size:
            raise ValueError(f"the {what} token's id is {i!r}, outside the vocabulary of "
                             f"{config.vocab_size}; set {key} in config.json")
    if mask in ends:
        raise ValueError(f"mask and end token have the same id, {mask}; correct mask_token_id in "
                         "config.json")
    return replace(config, mask_id=mask, eos_id=eos)


def load_weights(network, source, dtype, device):
    """Give every parameter and buffer its values. source(name, shape) -> tensor.

    ValueError if one of the values is not finite.
    """
    for path, module in network.named_modules():
        empties = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, empty in empties:
            value = source(f"{path}.{name}", empty.shape)
            if not value.isfinite().all():
                raise ValueError(f"{path}.{name} holds numbers that are not finite; the "
                                 "checkpoint is damaged")
            if hasattr(empty, "quant_type"):  # Params4bit is quantised on its way to the device
                value = type(empty)(value.to(dtype), requires_grad=False, quant_type="nf4",
                                    compress_statistics=True, module=module).to(device)
            elif isinstance(empty, nn.Parameter):
                value = nn.Parameter(value.to(device, dtype), requires_grad=False)
            else:  # the router's bias is stored in float32 and stays so
                value = value.to(device, torch.float32)
            setattr(module, name, value)


# ---- Where weights come from --------------------------------------------------------------------

class Shards:
    """The safetensors files of a model folder. shards(name, shape) reads that tensor from disk."""

    def __init__(self, folder):
        self.folder, self.opened, self.used = folder, {}, set()
        index = folder / "model.safetensors.index.json"
        if index.exists():
            # The name of each tensor -> the name of its file.
            self.file_of = read_json(index).get("weight_map", {})
            for file in set(self.file_of.values()):
                if not re.fullmatch(r"[\w.-]+\.safetensors", str(file)):
                    raise ValueError(f"{index} names the file {file!r}, which is not a safetensors "
                                     "file beside it")
        else:
            file, names = self.open_file("model.safetensors")
            self.file_of = dict.fromkeys(names, "model.safetensors")

    def open_file(self, name):
        """The open file of this name, and the names of its tensors. Each is opened once."""
        from safetensors import SafetensorError, safe_open
        if name not in self.opened:
            path = self.folder / name
            if not path.exists():
                raise ValueError(f"{path} is missing")
            try:
                file = safe_open(path, "pt")
                self.opened[name] = file, set(file.keys())
            except SafetensorError as error:
                raise ValueError(f"{path} is not a safetensors file: {error}") from None
        return self.opened[name]

    def __call__(self, name, shape):
        if name not in self.file_of:
            raise ValueError(f"{self.folder}: the checkpoint has no {name}")
        file, names = self.open_file(self.file_of[name])
        if name not in names:
            raise ValueError(f"{self.folder / self.file_of[name]} has no {name}, though the "
                             "index says so")
        found = file.get_slice(name).get_shape()
        if list(found) != list(shape):
            raise ValueError(f"{self.folder}: {name} should be {list(shape)}, is {list(found)}")
        self.used.add(name)
        return file.get_tensor(name)

    def finish(self):
        """ValueError unless everything in the files was asked for."""
        left = sorted(set(self.file_of) - self.used)
        if left:
            some = ", ".join(left[:3]) + (" ..." if len(left) > 3 else "")
            raise ValueError(f"{self.folder}: {len(left)} weights of the checkpoint have no place "
                             f"in the model: {some}")


def random_source(device, seed=0):
    """In place of Shards: random numbers of the same shapes, made one tensor at a time."""
    generator = torch.Generator(device).manual_seed(seed)

    def tensor(name, shape):
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        return torch.empty(shape, device=device).normal_(0, 0.02, generator=generator)
    return tensor


# ---- 4 bits -------------------------------------------------------------------------------------

def quantisable(network, config):
    """{name: nn.Linear} of the blocks, without routers: what --load-4bit quantises."""
    family = FAMILIES[config.family]
    return {name: module for name, module in network.named_modules()
            if type(module) is nn.Linear and name != family.head
            and name.rpartition(".")[2] != family.router}


def to_4bit(network, config, dtype):
    """Replace the quantisable layers by bitsandbytes' nf4 with double quantisation.

    The network has no values yet. ValueError if bitsandbytes is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise ValueError("--load-4bit needs bitsandbytes, which is not installed: "
                         "pip install bitsandbytes") from None
    found = quantisable(network, config)
    if not found:
        raise ValueError("--load-4bit found no linear layer to quantise")
    for path, old in found.items():
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=dtype,
                                compress_statistics=True, quant_type="nf4", device="meta")
        # On some CPUs bitsandbytes switches in eval mode to a fused product that has no gradient.
        # Adapting to a prompt would then silently do nothing.
        new.support_avx512bf16_for_cpu = False
        place, _, name = path.rpartition(".")
        setattr(network.get_submodule(place), name, new)


# ---- What was loaded ----------------------------------------------------------------------------

def describe(backbone):
    """One line: what was loaded."""
    in_4bit = [m for m in backbone.modules()
               if hasattr(m, "quant_state") and hasattr(m, "in_features")]
    adapted = sum(hasattr(m, "lora_A") for m in backbone.modules())
    packed = sum(m.weight.numel() for m in in_4bit)
    unpacked = sum(m.in_features * m.out_features for m in in_4bit)
    lora, total = 0, unpacked - packed
    for name, p in backbone.named_parameters():
        if "lora_" in name:
            lora += p.numel()
        else:
            total += p.numel()
    size = sum(p.numel() * p.element_size() for p in backbone.parameters())
    return (f"{backbone.title}: {human_count(total)} parameters, {len(in_4bit):,} layers in 4-bit, "
            f"{adapted:,} with LoRA ({human_count(lora)} parameters), {size / 2**30:.3g} GiB on "
            f"{next(backbone.parameters()).device}")


def human_count(n):
    """7356880896 -> "7.36 billion"."""
    return f"{n / 1e9:.3g} billion" if n >= 1e9 else f"{n / 1e6:.3g} million"
