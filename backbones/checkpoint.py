"""From a hub id or a folder to a backbone: shards, 4 bits, random weights.

First the network is built without any values (on PyTorch's "meta" device). Then its parameters get
their values one at a time. So the host never holds more than one parameter besides the model.
"""
from __future__ import annotations

import json
import logging
import re
from dataclasses import replace

import torch
from torch import nn

from backbones.backbone import Backbone, build_network
from backbones.config import check_id, read_ends, show
from backbones import convert, smollm2
from backbones.experts import Stack
from backbones.families import FAMILIES, PUBLISHED, translate
from backbones.lora import merge_adapter
from backbones.text import Tokenizer
from files import MOST_TENSORS, model_folder, open_tensors, read_json, read_tensor

# How the tensors are called that stand for quantised weights (GPTQ, AWQ, bitsandbytes, fp8, MLX).
QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales?|biases|SCB|quant_map|nested_quant_map|absmax|nested_absmax"
    r"|weight_(scale|scale_inv|packed|shape|zero_point|format)|input_scale|quant_state\..*)$")

# bitsandbytes warns of an optional CPU kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def load_backbone(model, load_4bit=False, dtype="auto", device=None, attention="auto",
                  checkpointing=False, merge="", random=False, seed=0, shift=False):
    """A hub id or a folder in the hub's layout -> Backbone, frozen and in eval mode.

    random: `model` is a name of PUBLISHED or a config.json as a dict, and the weights are random.
    dtype: auto (bfloat16 on a GPU, the file's on a CPU), bfloat16 or float32. merge: the folder of
    an adapter that is added to the weights before they are rounded. attention, shift: see
    convert.choose_sight. A ValueError says in one line what does not fit.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if random:
        raw, tokenizer = PUBLISHED[model] if isinstance(model, str) else model, None
        config, source = translate(raw), random_source(device, seed)
        config, source = set_special_ids(config, tokenizer, "the model", source)
    else:
        open_files = open_package if smollm2.is_meant(model) else open_folder
        config, raw, source, tokenizer = open_files(model)
    config = convert.choose_sight(config, attention, shift)
    dtype = choose_dtype(dtype, raw, device)
    with torch.device("meta"):
        network = build_network(config)
        if load_4bit:
            to_4bit(network, config, dtype)
    weights = merge_adapter(source, merge, network, model, config) if merge else source
    load_weights(network, weights, dtype, device)
    if not random:
        source.finish()
    if tokenizer:
        tokenizer.mask_id, tokenizer.eos_id = config.mask_id, config.eos_id
        tokenizer.vocab_size = config.vocab_size
    network.is_loaded_in_4bit = load_4bit  # where PEFT looks
    if device.type == "cuda":
        # TF32: products in float32, above all the LoRA's, on tensor cores.
        torch.set_float32_matmul_precision("high")
    name = ("random weights" if random else model) + (f" merged with {merge}" if merge else "")
    return Backbone(network, config, tokenizer, config.attention, checkpointing, name).eval()


def open_folder(model):
    """A hub id or a folder -> config, config.json as a dict, source of weights, tokenizer."""
    folder = model_folder(model)
    raw, source, tokenizer = read_json(folder / "config.json"), Shards(folder), None
    config = translate(raw, str(folder / "config.json"))
    config = add_generation_ends(config, folder / "generation_config.json")
    if config.tied:
        config = replace(config, tied=source.is_tied(config))
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer(folder, config)
    source.refuse_few(config)
    config, source = set_special_ids(config, tokenizer, folder, source)
    return config, raw, source, tokenizer


def open_package(model):
    """The same of the model that comes inside a package."""
    file = smollm2.Gguf(smollm2.find_file())
    raw, hf = PUBLISHED[model], smollm2.read_tokenizer(file.fields)
    config = replace(translate(raw), left_to_right=True)
    return config, raw, smollm2.PackagedWeights(file, config), Tokenizer(model, config, hf)


def choose_dtype(dtype, raw, device):
    """The precision of weights and computation, as torch names it."""
    if dtype == "auto":
        stored = raw.get("dtype") or raw.get("torch_dtype")
        dtype = "bfloat16" if device.type == "cuda" or stored == "bfloat16" else "float32"
    return getattr(torch, dtype)


def add_generation_ends(config, path):
    """The config with the ends that generation_config.json names, too, if there is one."""
    raw = read_json(path) if path.exists() else {}
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not the settings of a generation")
    return replace(config, eos_ids=read_ends(raw, config.vocab_size, path, config.eos_ids))


def set_special_ids(config, tokenizer, where, source):
    """The config with the ids of mask and ends, which nobody guesses; and the source of weights.

    The mask is the one in config.json, else the tokenizer's. A model that was trained left to
    right has none and gets one. The ends are all that the files of the model name and the
    tokenizer's own. where: the model's folder, for the error.
    """
    mask, ends = config.mask_id, config.eos_ids
    if tokenizer:
        mask = tokenizer.mask_id if mask is None else mask
        theirs = {"eos_token_id": tokenizer.eos_id}
        ends = read_ends(theirs, config.vocab_size, where, ends)
    config = replace(config, left_to_right=config.left_to_right and mask is None)
    if config.left_to_right:
        config, source = convert.add_mask(config, tokenizer, source)
        mask = config.mask_id
    if mask is None or not ends:
        what, key = ("mask", "mask_token_id") if mask is None else ("end", "eos_token_id")
        raise ValueError(f"{where}: neither config.json nor a tokenizer names the {what} token; "
                         f"put its id into config.json as {key}")
    check_id(mask, config.vocab_size, "mask", "mask_token_id", where)
    if mask in ends:
        raise ValueError(f"{where}: mask and end token have the same id, {mask}; correct "
                         "mask_token_id in config.json")
    return replace(config, mask_id=mask, eos_ids=ends), source


def load_weights(network, source, dtype, device):
    """Give every parameter and buffer its values. source(name, shape) -> tensor.

    ValueError if one of the values is not finite, or too large for the precision.
    """
    for path, module in network.named_modules():
        empties = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, empty in empties:
            # The router's bias is stored in float32 and stays so.
            wanted = dtype if isinstance(empty, nn.Parameter) else torch.float32
            value = read_weight(module, f"{path}.{name}", empty.shape, source, wanted)
            if not value.isfinite().all():
                raise ValueError(f"{path}.{name} holds numbers that are not finite; the "
                                 "checkpoint is damaged")
            if hasattr(empty, "quant_type"):  # Params4bit is quantised on its way to the device
                value = type(empty)(value, requires_grad=False, quant_type="nf4",
                                    compress_statistics=True, module=module).to(device)
            elif getattr(module, "in_4bit", False):
                value = nn.Parameter(module.quantise(value.to(device)), requires_grad=False)
            elif isinstance(empty, nn.Parameter):
                value = nn.Parameter(value.to(device), requires_grad=False)
            else:
                value = value.to(device)
            setattr(module, name, value)


def read_weight(module, name, shape, source, dtype):
    """The values of a parameter. A stack of experts is put together from the weights of each."""
    if not isinstance(module, Stack):
        return source(name, shape).to(dtype)
    names = module.names(name.removesuffix(".weight"))
    return torch.stack([source(f"{one}.weight", shape[1:]).to(dtype) for one in names])


def hub_weights(network):
    """{name in a checkpoint: tensor}: a stack of experts is taken apart."""
    weights = network.state_dict()
    for path, module in network.named_modules():
        if isinstance(module, Stack):
            stack = weights.pop(f"{path}.weight")
            weights |= {f"{name}.weight": W for name, W in zip(module.names(path), stack)}
    return weights


def write_shards(weights, folder, shards):
    """Weights as several safetensors files with an index, as the hub has them."""
    from safetensors.torch import save_file
    names, file_of = sorted(weights), {}
    for i in range(shards):
        file, part = f"model-{i + 1:05}-of-{shards:05}.safetensors", names[i::shards]
        save_file({name: weights[name].contiguous() for name in part}, folder / file,
                  {"format": "pt"})
        file_of |= dict.fromkeys(part, file)
    size = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


# ---- Where weights come from --------------------------------------------------------------------

class Shards:
    """The safetensors files of a model folder. shards(name, shape) reads that tensor from disk."""

    def __init__(self, folder):
        self.folder, self.opened, self.used = folder, {}, set()
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self.file_of = read_index(index)
        else:
            _, names = self.open_file("model.safetensors")
            self.file_of = dict.fromkeys(names, "model.safetensors")
        if len(self.file_of) > MOST_TENSORS:
            raise ValueError(f"{folder}: {len(self.file_of):,} tensors are more than any model "
                             f"has; at most {MOST_TENSORS:,} are read")
        for name in self.file_of:
            if QUANTISED.search(name):
                raise ValueError(f"{folder}: {name[:200]} is part of quantised weights, which are "
                                 "not read; take the model's own files, which --load-4bit "
                                 "quantises")

    def open_file(self, name):
        """The open file of this name, and the names of its tensors. Each is opened once."""
        if name not in self.opened:
            file = open_tensors(self.folder / name)
            self.opened[name] = file, set(file.keys())
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
        return read_tensor(file, name, self.folder / self.file_of[name])

    def refuse_few(self, config):
        """ValueError if a model is far larger than what is here, before minutes of building it."""
        needed = config.layers * 7 + 3 * config.experts * (config.layers - config.dense_layers)
        if needed > 2 * len(self.file_of):
            raise ValueError(f"{self.folder}: by its config.json the model has {needed:,} tensors "
                             f"or more, the checkpoint {len(self.file_of):,}")

    def is_tied(self, config):
        """Is the head the embedding, as config.json says?

        A file may hold the head beside the embedding: as a copy, or, as some converted models do
        in spite of their config.json, as a head of its own, which then is what was trained.
        """
        family, shape = FAMILIES[config.family], (config.vocab_size, config.width)
        if f"{family.head}.weight" not in self.file_of:
            return True
        head, embedding = (self(f"{name}.weight", shape) for name in (family.head, family.embed))
        return torch.equal(head, embedding)

    def finish(self):
        """ValueError unless everything in the files was asked for."""
        left = sorted(set(self.file_of) - self.used)
        if left:
            some = ", ".join(left[:3]) + (" ..." if len(left) > 3 else "")
            raise ValueError(f"{self.folder}: {len(left)} weights of the checkpoint have no place "
                             f"in the model: {some}")


def read_index(path):
    """The name of each tensor -> the name of its file, which lies beside the index."""
    raw = read_json(path)
    file_of = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(file_of, dict):
        raise ValueError(f"{path} has no weight_map, which says where each weight is")
    for file in file_of.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ValueError(f"{path} names the file {show(file)}, which is not a safetensors "
                             "file beside it")
    return file_of


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
    """{name: nn.Linear or Stack} of the blocks, without routers: what --load-4bit quantises."""
    family = FAMILIES[config.family]
    return {name: module for name, module in network.named_modules()
            if type(module) in (nn.Linear, Stack) and name != family.head
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
        if isinstance(old, Stack):
            old.in_4bit = True
            continue
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=old.bias is not None,
                                compute_dtype=dtype, compress_statistics=True, quant_type="nf4",
                                device="meta")
        # On some CPUs bitsandbytes switches in eval mode to a fused product that has no gradient.
        # Adapting to a prompt would then silently do nothing.
        new.support_avx512bf16_for_cpu = False
        place, _, name = path.rpartition(".")
        setattr(network.get_submodule(place), name, new)


# ---- What was loaded ----------------------------------------------------------------------------

def describe(backbone):
    """One line: what was loaded."""
    def layers_of(module):  # a stack counts as what a checkpoint has for it
        return getattr(module, "experts", 1)

    in_4bit = [m for m in backbone.modules()
               if hasattr(m, "in_features") and getattr(m, "quant_state", None) is not None]
    adapted = sum(layers_of(m) for m in backbone.modules()
                  if getattr(m, "lora_A", None) is not None)
    packed = sum(m.weight.numel() for m in in_4bit)
    unpacked = sum(layers_of(m) * m.in_features * m.out_features for m in in_4bit)
    lora, total = 0, unpacked - packed
    for name, p in backbone.named_parameters():
        if "lora_" in name:
            lora += p.numel()
        else:
            total += p.numel()
    size = sum(p.numel() * p.element_size() for p in backbone.parameters())
    parts = [f"{backbone.title}: {human_count(total)} parameters"]
    if in_4bit:
        parts.append(f"{sum(map(layers_of, in_4bit)):,} layers in 4-bit")
    if adapted:
        parts.append(f"{adapted:,} with LoRA ({human_count(lora)} parameters)")
    device = next(backbone.parameters()).device
    return ", ".join([*parts, f"{size / 2**30:.3g} GiB on {device}"])


def human_count(n):
    """7356880896 -> "7.36 billion"."""
    return f"{n / 1e9:.3g} billion" if n >= 1e9 else f"{n / 1e6:.3g} million"
