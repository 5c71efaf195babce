"""Run folders: what turns a folder into a model."""
from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from zlib import crc32

import torch

from data import find_data_file, read_records
from files import file_checksum, write_whole
from memdlm import MemDLM
from settings import Settings


def trained_parameters(model):
    """{name: parameter} of what is trained: all of the toy, the LoRA of a full model."""
    return {name: p for name, p in model.backbone.named_parameters() if p.requires_grad}


def save_checkpoint(folder, model, optimizer, step, processes=1):
    """Weights, AdamW's moments and the step in one safetensors file: one rename, so they always belong together."""
    from safetensors.torch import save_file
    tensors = {f"model.{name}": p.detach() for name, p in trained_parameters(model).items()}
    for name, p in trained_parameters(model).items():
        tensors |= {f"adamw.{key}.{name}": torch.as_tensor(value) for key, value in optimizer.state.get(p, {}).items()
                    if not key.startswith("qmap")}  # the 8-bit optimisers' table of levels, the same for all
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    state = {"step": step, "processes": processes, "base": base_checksum(model.backbone)}
    if getattr(model.backbone, "has_lora", False):  # first: what is cut off between the two is done again
        from backbones.lora import save_adapter
        save_adapter(model.backbone, folder / "adapter")
    # One entry of metadata: the order of several in the file is random.
    write_whole(folder / "model.safetensors", lambda path: save_file(tensors, path, {"state": json.dumps(state)}))


def base_checksum(backbone):
    """A checksum of the weights that a LoRA stands on, None where all are trained."""
    if all(p.requires_grad for p in backbone.parameters()):
        return None
    if hasattr(backbone, "weights_checksum"):
        return backbone.weights_checksum()
    return f"{crc32(b''.join(p.detach().cpu().numpy().tobytes() for p in backbone.parameters() if not p.requires_grad)):08x}"


def load_checkpoint(folder, model, optimizer=None, processes=1):
    """Fill the model (and the optimiser) from a run folder. Returns the step. ValueError if they do not fit."""
    from safetensors import SafetensorError, safe_open
    path = Path(folder) / "model.safetensors"
    if not path.exists():
        raise ValueError(f"{path}: no such file; the run saved nothing yet")
    try:
        with safe_open(path, "pt") as file:
            tensors, state = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["state"])
            step, before = int(state["step"]), int(state["processes"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint of this program: {error}") from None
    if optimizer and before != processes:
        raise ValueError(f"{folder} was trained by {before} processes; with {processes} its steps would be others. Resume it with "
                         f"{before}, or with --out start another run")
    own = base_checksum(model.backbone)
    if state.get("base", own) != own:
        raise ValueError(f"{path} was trained on other base weights than those that are there now")
    named = trained_parameters(model)
    for name, p in named.items():
        saved = tensors.get(f"model.{name}")
        if saved is None or saved.shape != p.shape:
            raise ValueError(f"{path} belongs to another model: {name} should be {list(p.shape)}, "
                             f"is {'missing' if saved is None else list(saved.shape)}")
        if not saved.isfinite().all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite; the file is damaged")
        p.data.copy_(saved)
    for number, (name, p) in enumerate(named.items() if optimizer else ()):
        saved = {key: tensors[f"adamw.{key}.{name}"] for key in ADAMW if f"adamw.{key}.{name}" in tensors}
        if saved and hasattr(optimizer, "init_state"):  # bitsandbytes: makes its buffers itself
            optimizer.init_state(optimizer.param_groups[0], p, 0, number)
            for key, value in saved.items():
                held = optimizer.state[p][key]
                optimizer.state[p][key] = held.copy_(value) if torch.is_tensor(held) else int(value)
        elif saved:  # the count of steps lives on the CPU, unless AdamW is fused
            fused = optimizer.param_groups[0]["fused"]
            optimizer.state[p] = {key: value if key == "step" and not fused else value.to(p.device) for key, value in saved.items()}
    return step


ADAMW = ("step", "exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")  # torch's names, and bitsandbytes'


def read_settings(folder):
    """The settings of a run folder."""
    path = Path(folder) / "settings.json"
    try:
        values = json.loads(path.read_text())
        for f in fields(Settings):
            kind = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}[f.type]
            if type(values.get(f.name, f.default)) not in kind:
                raise TypeError(f"{f.name} is {values[f.name]!r}, which is no {f.type}")
        return Settings(**values)
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a run folder: it has no settings.json") from None
    except (json.JSONDecodeError, TypeError, AttributeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not the settings of a run: {error}") from None


def origin(s):
    """What else makes a run this run: checksums of the code and of a data file, and the versions underneath."""
    here, wing = Path(__file__).parent, "toy" if s.model == "toy" else "backbones"
    files = [here / "memdlm.py", here / "data.py", here / "train.py", *sorted((here / wing).glob("*.py"))]
    out = {"torch": torch.__version__} | {file.relative_to(here).as_posix(): file_checksum(file) for file in files}
    if s.data in ("python", "pydoc"):
        out["python"] = sys.version.split()[0]
    elif Path(s.data).is_file():
        out["data"] = file_checksum(s.data)
    return out


def check_origin(folder, s):
    """ValueError if going on with the run would mix two: its code, its data or PyTorch has changed since it was started."""
    path = folder / "origin.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    now = origin(s)
    differs = [f"{name} ({value}, now {now.get(name, 'missing')})" for name, value in before.items() if value != now.get(name)]
    if differs:
        raise ValueError(f"{folder} was started with another {', another '.join(differs)}: going on would make a run that nobody "
                         "can repeat. Bring that back, start anew, or say --anyway")


def latest_run(root="runs"):
    """The run folder written to last."""
    found = sorted(Path(root).glob("*/settings.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"there is no run in {root}/ yet; make one with: python train.py --model toy")
    return found[-1].parent


def build(s, training=True, device=None, say=print):
    """Settings -> data, MemDLM with initial weights from the seed. Without `training` a full model reads no data file."""
    if s.threads:
        torch.set_num_threads(s.threads)
    if s.model != "toy":
        return build_real(s, training, device, say)
    from toy.data import ToyData
    from toy.model import ToyConfig, ToyDLM
    data = ToyData(s.data, s.prompt_length, s.response_length, s.skip_bad)
    config = ToyConfig(data.tokenizer.vocab_size, data.tokenizer.mask_id, s.width, s.layers, s.heads)
    model = MemDLM(ToyDLM(config, s.seed), s)
    if s.toy_lora:
        from peft import LoraConfig, inject_adapter_in_model
        load_checkpoint(s.from_run, model)
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):  # PEFT draws A from the global generator
            torch.manual_seed(s.seed)
            inject_adapter_in_model(LoraConfig(r=s.lora_rank, lora_alpha=s.lora_alpha, lora_dropout=s.lora_dropout,
                                               target_modules=list(model.backbone.matrices(0, "ffn+attn"))), model.backbone)
    return data, model


def build_real(s, training, device, say):
    """A full model: its data first, so that a mistake in a file costs no minutes, then the plan, then the weights."""
    from backbones.checkpoint import describe, load_backbone
    from backbones.families import read_config
    from backbones.lora import add_lora, load_adapter
    from backbones.plan import memory_plan, plan_text
    from backbones.text import ChatData, chat_turns
    config, records = read_config(s.model), ([], 0)
    if training:
        if s.load_4bit and not s.lora and (s.merge or not s.from_adapter):
            raise ValueError("4-bit weights cannot be trained themselves: leave out --no-lora or --load-4bit")
        path = find_data_file(s.data)
        records = read_records(path, chat_turns, s.skip_bad)
        room = torch.cuda.get_device_properties(device or 0).total_memory if torch.cuda.is_available() else None
        say(plan_text(memory_plan(config, s, s.max_length), room))
    merge = s.from_adapter if s.merge else ""
    backbone = load_backbone(s.model, s.load_4bit, s.dtype, device, s.attention, s.checkpointing, merge, experts=s.experts)
    if s.from_adapter and not merge:
        load_adapter(backbone, s.from_adapter, s.lora_dropout, s.lora_dtype)
    elif s.lora:
        add_lora(backbone, s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_scope, s.lora_router, s.lora_dtype, s.seed)
    elif not s.load_4bit:
        backbone.requires_grad_(True)
    say(describe(backbone))
    data = ChatData(backbone, records[0], s.max_length, s.truncate, s.split_seed, s.data, records[1],
                          s.seed)
    return data, MemDLM(backbone, s)


def open_run(folder, with_data=True, **changes):
    """A trained run: settings (with changes), data, model in eval mode."""
    s = replace(read_settings(folder), **changes)
    data, model = build(s, training=with_data)
    load_checkpoint(folder, model)
    return s, data, model.requires_grad_(False).eval()


def open_model(run, model, changes):
    """A run (None: the latest), or a full model without one: settings with changes, data, model in eval mode."""
    if not model:
        return open_run(run or latest_run(), with_data=False, **changes)
    s = Settings(model=model, lora=False, **changes)
    data, memory_model = build(s, training=False)
    return s, data, memory_model.requires_grad_(False).eval()


def open_folder(s, folder):
    """settings.json last: with it the folder is a run."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "origin.json").exists():
        write_whole(folder / "origin.json", lambda path: path.write_text(json.dumps(origin(s), indent=2) + "\n"))
    write_whole(folder / "settings.json", lambda path: path.write_text(json.dumps(asdict(s), indent=2) + "\n"))


def free_folder(s):
    """runs/<data>[-baseline], with a number behind it if there is one already."""
    model = "" if s.model == "toy" else Path(s.model).name + "-"
    name = model + Path(s.data).stem + ("" if s.memory else "-baseline")
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def settings_to_resume(argument, given, anyway=False):
    """Settings and folder of the run to go on with. Flags may repeat its settings, not change them."""
    folder = Path(argument) if argument != "latest" else latest_run()
    s = read_settings(folder)
    if not anyway:
        check_origin(folder, s)
    for name, value in given.items():
        if getattr(s, name) != value:
            raise ValueError(f"{folder} was started with {name} {getattr(s, name)}, not {value}: that would be "
                             "another run; leave the flag out, or start anew without --resume")
    return s, folder
