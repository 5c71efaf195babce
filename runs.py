"""Runs: what turns settings, or the folder of a run, into a model.

A run's folder holds

    settings.json        all settings; with it the folder is a run
    origin.json          checksums of the code and of a data file, and versions
    model.safetensors    what was trained, the moments of AdamW, and the step
    adapter/             of a real model with a LoRA: the same LoRA in PEFT's format, with a card
    metrics.jsonl, ...   what train.py and evaluate.py add
    lock                 while the run is trained: the process that trains it

`build` makes a model with initial weights from settings. `open_run` makes the trained model from
a folder. A checkpoint holds only what is trained: the weights below a LoRA come from where they
came from before, and a checksum says if they are others now.
"""
from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import console
from data import name_part, read_data
from files import (
    MOST_SAVED, file_checksum, folder_checksum, lock_folder, nearest, open_tensors, read_json,
    read_tensor, refuse_links, remove_unfinished, write_json, write_tensors, write_text,
    write_whole,
)
from objectives import OBJECTIVES
from settings import RECIPES, Settings


# ---- Settings -> model --------------------------------------------------------------------------

def build(s, training=True, device=None, say=console.say):
    """Settings -> data, MemDLM with initial weights from the seed.

    say(text) is called with what a user may want to know. Without `training`, a real model reads
    no data file: its data can only `ask`. ValueError, one line, where something does not fit.
    """
    if s.threads:
        torch.set_num_threads(s.threads)
    built = build_toy(s) if s.model == "toy" else build_real(s, training, device, say)
    if not s.threads and sum(p.numel() for p in built[1].parameters()) < 1e6:
        # Threads that share so little wait for each other most of the time. Beside other work on
        # the machine an answer of a second took a minute.
        torch.set_num_threads(1)
    return built


def build_toy(s):
    """The tiny model. With --toy-lora: a LoRA on the frozen weights of another run."""
    from toy.data import ToyData
    from toy.model import ToyConfig, ToyDLM
    data = ToyData(s.data, s.prompt_length, s.response_length, s.skip_bad, s.max_records)
    vocab_size, mask_id = data.tokenizer.vocab_size, data.tokenizer.mask_id
    toy = ToyDLM(ToyConfig(vocab_size, mask_id, s.width, s.layers, s.heads), s.seed)
    model = OBJECTIVES[s.objective](toy, s)
    if s.toy_lora:
        load_checkpoint(s.from_run, model)
        add_toy_lora(s, model.requires_grad_(False).backbone)
    return data, model


def add_toy_lora(s, backbone):
    """Put a LoRA on all matrices of a toy's blocks."""
    from peft import LoraConfig, inject_adapter_in_model
    config = LoraConfig(r=s.lora_rank, lora_alpha=s.lora_alpha, lora_dropout=s.lora_dropout,
                        target_modules=list(backbone.matrices(0, "ffn+attn")))
    with torch.random.fork_rng(devices=[]):  # PEFT draws A from the global generator
        torch.manual_seed(s.seed)
        inject_adapter_in_model(config, backbone)


def build_real(s, training, device, say):
    """A real model: the data, then the plan of its memory, then the weights.

    The data come first so that a mistake in a file is found before minutes of loading.
    """
    from backbones.checkpoint import describe, load_backbone
    from backbones.convert import describe_conversion
    from backbones.families import read_config
    from backbones.lora import add_lora, load_adapter
    from backbones.text import ChatData, chat_turns
    config, records, bad, device = read_config(s.model), [], 0, device or pick_device(s)
    if training:
        refuse_slow(config, s, device)
        if s.load_4bit and not s.lora and (s.merge or not s.from_adapter):
            raise ValueError("4-bit weights cannot be trained themselves: leave out --no-lora or "
                             "--load-4bit")
        records, bad = read_data(s.data, chat_turns, s.skip_bad, s.max_records)
        say(plan_memory(config, s, device))
    merge = s.from_adapter if s.merge else ""
    backbone = load_backbone(s.model, s.load_4bit, s.dtype, device, s.attention, s.checkpointing,
                             merge, shift=s.shift)
    if s.from_adapter and not merge:
        load_adapter(backbone, s.from_adapter, s.lora_dropout, s.lora_dtype)
    elif s.lora:
        add_lora(backbone, s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_scope, s.lora_router,
                 s.lora_dtype, s.seed)
    elif not s.load_4bit:
        backbone.requires_grad_(True)
    say(describe(backbone))
    if backbone.config.left_to_right and training:
        say(console.fold(describe_conversion(backbone)))
    where = name_part(s.data, len(records) + bad, s.max_records)
    data = ChatData(backbone, records, s.max_length, s.truncate, s.split_seed, where, bad, s.seed,
                    s.skip_bad, s.turns)
    return data, OBJECTIVES[s.objective](backbone, s)


def pick_device(s):
    """The device of a real model, as torch names it. ValueError if there is none of its kind."""
    there_is_a_gpu = torch.cuda.is_available()
    if s.device == "cuda" and not there_is_a_gpu:
        raise ValueError("--device cuda: PyTorch finds no GPU here")
    return "cuda" if there_is_a_gpu and s.device != "cpu" else "cpu"


def refuse_slow(config, s, device):
    """ValueError if a large model would be trained on a CPU that nobody asked for."""
    from backbones.checkpoint import human_count
    from backbones.plan import empty_network
    if device == "cpu" and s.device == "auto":
        count = sum(p.numel() for p in empty_network(config).parameters())
        if count > 1e9:
            raise ValueError(f"PyTorch finds no GPU here, and on a CPU {human_count(count)} "
                             "parameters train for weeks; say --device cpu if you mean it")


def plan_memory(config, s, device, room=None):
    """The lines that say how much memory a run will take. room: bytes, if not the device's."""
    from backbones.plan import memory_plan, plan_text
    kind = torch.device(device).type
    if kind == "cuda" and torch.cuda.is_available():
        room, _ = torch.cuda.mem_get_info(device)  # what other programs have left
    elif kind == "cpu":
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return plan_text(memory_plan(config, s, s.max_length, kind), room, kind)


def peak_memory():
    """The most memory that this process has had, in MiB."""
    import resource  # not on every system
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


# ---- Folder -> model ----------------------------------------------------------------------------

def open_run(folder, with_data=True, **changes):
    """A trained run: settings (with changes), data, model in eval mode."""
    s = replace(read_settings(folder), **changes)
    data, model = build(s, training=with_data)
    load_checkpoint(folder, model)
    return s, data, model.requires_grad_(False).eval()


TRAINED_TOY = Path(__file__).parent / "toy" / "trained"  # it comes with the repository


def open_model(run, model, changes):
    """A run, or a real model without one. Returns what open_run returns.

    Without either: the latest run, or the toy that comes along if there is none yet. ValueError if
    both are given, or the toy, which knows nothing without a run.
    """
    if run and model:
        raise ValueError(f"give a run ({run}) or a model ({model}), not both")
    if model == "toy":
        raise ValueError("--model is for real models; a toy answers from its run: give --run, or "
                         "leave both out")
    if not model:
        if not run and not list(Path("runs").glob("*/settings.json")):
            console.say("no run of your own yet: this is the toy that comes with the repository")
            run = TRAINED_TOY
        return open_run(run or latest_run(), with_data=False, **changes)
    s = Settings(model=model, lora=False, **changes)
    data, memory_model = build(s, training=False)
    if memory_model.backbone.config.left_to_right and not s.from_adapter:
        console.say(f"{model} was trained left to right, not yet as a diffusion model; first: "
                    f"python train.py --model {model}")
    return s, data, memory_model.requires_grad_(False).eval()


def latest_run(root="runs"):
    """The run folder that was written to last."""
    found = [path.parent for path in Path(root).glob("*/settings.json")]
    if not found:
        raise ValueError(f"there is no run in {root}/ yet; make one with: "
                         "python train.py --model toy")
    return max(found, key=last_written)


def last_written(folder):
    """When a run, or its control, wrote settings, weights or metrics last, in nanoseconds."""
    times = [0]
    for place in (folder, folder / "control"):
        for name in ("settings.json", "model.safetensors", "metrics.jsonl"):
            with contextlib.suppress(OSError):  # it is not there yet
                times.append((place / name).lstat().st_mtime_ns)
    return max(times)


KINDS = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def read_settings(folder):
    """The settings of a run folder. ValueError if it is none, or if they are not sound."""
    path = Path(folder) / "settings.json"
    refuse_links(*run_folders(folder))
    if not path.exists():
        runs = [str(path.parent) for path in Path("runs").glob("*/settings.json")]
        raise ValueError(f"{folder} is not a run folder: it has no settings.json"
                         f"{nearest(str(folder), runs)}")
    values = read_json(path, finite=False)  # some settings may be infinite
    if isinstance(values, dict):
        values.pop("experts", None)  # older runs could choose how experts are computed
    odd = "its content is no object"
    if isinstance(values, dict):
        known = {f.name: f for f in fields(Settings)}
        odd = ", ".join(f"{name!r:.80} is {value!r:.80}, which is no "
                        + (known[name].type if name in known else "setting")
                        for name, value in values.items()
                        if name not in known or type(value) not in KINDS[known[name].type])
    if odd:
        raise ValueError(f"{path} is not the settings of a run: {odd:.300}")
    return Settings(**values)


# ---- Checkpoints --------------------------------------------------------------------------------

# The state of an optimiser: first PyTorch's names, then those of bitsandbytes.
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")


def trained_parameters(model):
    """{name: parameter} of what is trained: all of the toy, the LoRA of a real model."""
    return {name: p for name, p in model.backbone.named_parameters() if p.requires_grad}


def save_checkpoint(folder, model, optimizer, step, processes=1):
    """Write the weights, the optimiser's state and the step as one safetensors file.

    One file is renamed once, so these always belong together.
    """
    tensors = {}
    for name, p in trained_parameters(model).items():
        tensors[f"model.{name}"] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            # "qmap" is the table of levels of an 8-bit optimiser, the same for all tensors.
            if not key.startswith("qmap"):
                tensors[f"adamw.{key}.{name}"] = torch.as_tensor(value)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    state = {"step": step, "processes": processes, "base": base_checksum(model.backbone)}
    # The adapter comes first: a run that is killed between the two repeats some steps and then
    # writes both.
    if model.backbone.has_lora:
        from backbones.lora import save_adapter
        save_adapter(model.backbone, folder / "adapter")
    # One entry of metadata, because the order of several in the file is random.
    metadata = {"state": json.dumps(state)}
    write_whole(folder / "model.safetensors", lambda path: write_tensors(path, tensors, metadata))


def load_checkpoint(folder, model, optimizer=None, processes=1):
    """Fill the model, and the optimiser if there is one, from a run folder. Returns the step.

    ValueError if the checkpoint is damaged or belongs to another model, to other base weights, or
    (with an optimiser) to another number of processes.
    """
    path = Path(folder) / "model.safetensors"
    refuse_links(*run_folders(folder))
    tensors, state = read_checkpoint(path)
    before = state["processes"]
    if optimizer and before != processes:
        raise ValueError(f"{folder} was trained by {before} processes; with {processes} its steps "
                         f"would be others. Resume it with {before}, or with --out start another "
                         "run")
    base = base_checksum(model.backbone)
    if state.get("base", base) != base:
        raise ValueError(f"{path} was trained on other base weights than those that are there now")
    parameters = trained_parameters(model)
    for name, p in parameters.items():
        saved = tensors.get(f"model.{name}")
        if saved is None or saved.shape != p.shape:
            raise ValueError(f"{path} belongs to another model: {name} should be {list(p.shape)}, "
                             f"is {'missing' if saved is None else list(saved.shape)}")
        if not saved.isfinite().all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite; the file is "
                             "damaged")
        p.data.copy_(saved)
    if optimizer:
        load_moments(optimizer, parameters, tensors)
    return state["step"]


def read_checkpoint(path):
    """The tensors of a checkpoint, and its state: step, processes, the checksum of its base."""
    if not path.exists():
        raise ValueError(f"{path}: no such file; the run saved nothing yet")
    try:
        file = open_tensors(path, MOST_SAVED)
        state = json.loads(file.metadata()["state"])
        for key in ("step", "processes"):
            if type(state[key]) is not int or not 0 <= state[key] < 10**9:
                raise ValueError(f"its {key} is {state[key]!r:.80}")
        return {name: read_tensor(file, name, path) if name.startswith("model.")
                else file.get_tensor(name) for name in file.keys()}, state
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a checkpoint of this program: {error}") from None


def load_moments(optimizer, parameters, tensors):
    """Give an optimiser the state that a checkpoint has of each parameter."""
    for number, (name, p) in enumerate(parameters.items()):
        saved = {key: tensors[f"adamw.{key}.{name}"] for key in MOMENTS
                 if f"adamw.{key}.{name}" in tensors}
        if not saved:
            continue
        if hasattr(optimizer, "init_state"):  # of bitsandbytes: it makes its buffers itself
            optimizer.init_state(optimizer.param_groups[0], p, 0, number)
            state = optimizer.state[p]
            check_moments(saved, {key: torch.as_tensor(state[key]) for key in MOMENTS
                                  if key in state}, name)
            for key, value in saved.items():
                is_tensor = torch.is_tensor(state[key])
                state[key] = state[key].copy_(value) if is_tensor else int(value)
        else:
            check_moments(saved, {"step": torch.tensor(0.0), "exp_avg": p, "exp_avg_sq": p}, name)
            # The count of steps lives on the CPU, unless AdamW is fused.
            stays = () if optimizer.param_groups[0]["fused"] else ("step",)
            optimizer.state[p] = {key: value if key in stays else value.to(p.device)
                                  for key, value in saved.items()}


def check_moments(saved, wanted, name):
    """ValueError unless a checkpoint has an optimiser's state of a parameter as it is `wanted`:
    tensors of the same names, shapes and kinds of numbers, which are finite."""
    for key in saved.keys() | wanted.keys():
        value, like = saved.get(key), wanted.get(key)
        fits = (value is not None and like is not None and value.shape == like.shape
                and value.dtype == like.dtype and bool(value.isfinite().all()))
        if not fits or (key in ("step", "exp_avg_sq") and bool((value < 0).any())):
            raise ValueError(f"the checkpoint is damaged: {key} of {name} is not what the "
                             "optimiser keeps of it")


def base_checksum(backbone):
    """A checksum of the weights that a LoRA stands on. None where all weights are trained."""
    if all(p.requires_grad for p in backbone.parameters()):
        return None
    return backbone.weights_checksum()


# ---- Folders ------------------------------------------------------------------------------------

def run_folders(folder):
    """The folders in which a run and its control write."""
    places = Path(folder), Path(folder) / "control"
    return [place / name for place in places for name in ("", "adapter", "tensorboard")]


def pick_folder(s):
    """Make a new folder: runs/<data>[-baseline], numbered if there is one already.

    Of several processes that pick at once, each gets a folder of its own: only one can make it.
    """
    model = "" if s.model == "toy" else Path(s.model).name + "-"
    name = model + Path(s.data).stem + ("" if s.memory else "-baseline")
    folder, number = Path("runs") / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = Path("runs") / f"{name}-{number}"


def whole_run(folder):
    """The run that a folder is part of: a control lies in the folder of its run."""
    is_control = folder.name == "control" and (folder.parent / "settings.json").exists()
    return folder.parent if is_control else folder


def missing_folders(folder):
    """The folders that must be made for this one, itself first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


@contextlib.contextmanager
def hold_run(folder, made=()):
    """Lock a run's folder. ValueError if another process trains the run.

    made: folders that were made for it. They go again if the start fails and leaves them empty.
    """
    try:
        refuse_links(*run_folders(folder))
        with lock_folder(folder):
            remove_unfinished(*run_folders(folder))
            yield
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # it is not empty
                place.rmdir()


def write_settings(s, folder):
    """Make a folder a run's. settings.json comes last: with it the folder is a run."""
    folder.mkdir(parents=True, exist_ok=True)
    origin = folder / "origin.json"
    is_new = not origin.exists()
    try:
        if is_new:
            write_json(origin, find_origin(s), indent=2)
        write_json(folder / "settings.json", asdict(s), indent=2)
    except BaseException:
        if is_new:
            origin.unlink(missing_ok=True)
        raise


def find_origin(s):
    """What else makes a run this run: {name: checksum of a file of code or data, or a version}."""
    here = Path(__file__).parent
    wing = here / ("toy" if s.model == "toy" else "backbones")
    code = [here / f"{name}.py" for name in ("memdlm", "objectives", "data", "train")]
    code += sorted(wing.glob("*.py"))
    origin = {"torch": torch.__version__}
    origin |= {path.relative_to(here).as_posix(): file_checksum(path) for path in code}
    if s.data in ("python", "pydoc"):
        origin["python"] = sys.version.split()[0]
    elif Path(s.data).is_file():
        origin["data"] = file_checksum(s.data)
    elif s.data not in RECIPES and Path(s.data).is_dir():
        origin["data"] = folder_checksum(s.data)
    return origin


def find_run_to_resume(argument, given, anyway=False):
    """Settings and folder of the run to go on with. argument: its folder, or "latest".

    Flags that are given may repeat its settings, not change them. ValueError if one does, or if
    code or data have changed and `anyway` is False.
    """
    folder = latest_run() if argument == "latest" else Path(argument)
    s = read_settings(folder)
    if not anyway:
        check_origin(folder, s)
    for name, value in given.items():
        before = getattr(s, name)
        if before != value:
            raise ValueError(f"{folder} was started with {name} {before}, not {value}: that would "
                             "be another run; leave the flag out, or start anew without --resume")
    return s, folder


def check_origin(folder, s):
    """ValueError if code, data or PyTorch are no longer those that the run was started with."""
    before, now = read_origin(folder), find_origin(s)
    differs = [f"{name} ({value}, now {now.get(name, 'missing')})"
               for name, value in before.items() if value != now.get(name)]
    if differs:
        raise ValueError(f"{folder} was started with another {', another '.join(differs)}: going "
                         "on would make a run that nobody can repeat. Bring that back, start "
                         "anew, or say --anyway")


def read_origin(folder):
    """The content of origin.json, {} if there is none. ValueError if no run wrote it."""
    path = folder / "origin.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if not all(len(name) < 100 and len(value) < 100 for name, value in before.items()):
            raise ValueError("too long")
        return before
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged, so nobody can tell whether code or data have "
                         "changed; say --anyway to go on all the same") from None


# ---- Metrics ------------------------------------------------------------------------------------

def read_metrics(folder):
    """The lines of metrics.jsonl as dicts, and how many lines there are that no run wrote.

    The last line of a run that was killed may be half. It does not count.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return [], 0
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    sound = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, RecursionError, OverflowError):
            sound.append(check_metrics(json.loads(line)))
    return sound, len(lines) - len(sound)


def check_metrics(values):
    """A line of metrics, which holds a step, numbers and lists of numbers; else TypeError."""
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise TypeError("no line of metrics")
    for value in values.values():
        for number in value if isinstance(value, list) else [value]:
            if type(number) not in (int, float):
                raise TypeError("no number")
            float(number)  # OverflowError if no float is that large
    return values


def trim_metrics(folder, step):
    """Leave in metrics.jsonl the lines before `step`: a resumed run writes the others again."""
    path = folder / "metrics.jsonl"
    if path.exists():
        lines, damaged = read_metrics(folder)
        if damaged:
            console.say(f"{path}: {damaged} damaged lines were left out")
        kept = [json.dumps(line) + "\n" for line in lines if 0 <= line["step"] < step]
        write_text(path, "".join(kept))
