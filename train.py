"""Train a masked diffusion language model with MemDLM, or the MDLM baseline.

    python train.py --model toy                     closed-book memory, seen to work within minutes on a CPU
    python train.py --model toy --data languages    the method as published, with the controls it needs
    python train.py --model toy --data python       real text (the source of Python's own library)
    python train.py --model toy --data my.jsonl     your own {"prompt": ..., "response": ...} lines
    python train.py --model toy --no-memory         the baseline: same data, same masks, no inner loop
    python train.py --model inclusionAI/LLaDA-MoE-7B-A1B-Base --load-4bit          a full model, on one GPU
    accelerate launch train.py --model ...          the same on several
    python train.py --resume                        go on where the latest run stopped, exactly

Every run leaves a folder: settings.json, origin.json (checksums of code and data), model.safetensors (what was trained, and the
optimiser), metrics.jsonl, loss.png, and for a full model adapter/, the LoRA in PEFT's format.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from zlib import crc32

import torch
from tqdm import tqdm

import memdlm
from memdlm import MemDLM, setting


# ---- Settings: one dataclass, from which come the flags, their help, and settings.json ------------------

@dataclass
class Settings(memdlm.Settings):
    model: str = setting("toy", "'toy', the tiny model of toy/model.py; or a full model: a hub id or a folder")
    data: str = setting("dictionary", "dictionary, languages, retrieval, python, pydoc (toy), a .jsonl / .json file, or a "
                        "hub id (full models)")
    steps: int = setting(500, "outer steps")
    epochs: float = setting(0.0, "passes over the data, in place of --steps")
    batch: int = setting(32, "samples per micro-batch, on each process")
    accumulate: int = setting(1, "micro-batches per step, on each process")
    lr: float = setting(2e-5, "beta, peak learning rate of the outer AdamW; cosine after a warm-up")
    warmup: float = setting(0.1, "share of the steps with rising learning rate")
    weight_decay: float = setting(0.0, "of the outer AdamW")
    grad_clip: float = setting(1.0, "norm at which the gradient of theta is clipped; phi has no part in it")
    control: bool = setting(True, "also train the run's control (the baseline) for the table at the end")
    seed: int = setting(0, "decides initial weights, data and masks")
    width: int = setting(64, "toy: D")
    layers: int = setting(2, "toy: number of blocks")
    heads: int = setting(4, "toy: attention heads")
    prompt_length: int = setting(256, "text: longest prompt, in bytes")
    response_length: int = setting(64, "text: length of the response, in bytes")
    skip_bad: bool = setting(False, "leave out malformed lines of a data file instead of stopping at the first")
    log_every: int = setting(10, "steps between lines of metrics.jsonl")
    save_every: int = setting(100, "steps between checkpoints")
    sample_every: int = setting(100, "steps between printed samples, 0 for none")
    table_samples: int = setting(100, "held-out samples per cell of the table at the end, 0 for no table")
    from_run: str = setting("", "start from the weights of this run folder, to fine-tune them on other data")
    toy_lora: bool = setting(False, "toy: keep the weights of --from-run and train a LoRA on them, as full models do")
    threads: int = setting(0, "CPU threads, 0 for PyTorch's choice")
    eval_every: int = setting(0, "steps between evaluations on held-out samples, 0 for none")
    eval_samples: int = setting(32, "held-out samples in an evaluation")
    load_4bit: bool = setting(False, "quantise the layers of the blocks to 4 bits (nf4, double quantisation)")
    dtype: str = setting("auto", "precision of the weights that are not quantised, and of the computation: auto is bfloat16 on "
                         "a GPU, on a CPU the file's", ["auto", "bfloat16", "float32"])
    attention: str = setting("full", "LLaDA2.x in training and adaptation: full, as in the published run, or block, the "
                             "block-causal mask it decodes with", ["full", "block"])
    experts: str = setting("loop", "of MoE layers: one after the other, or grouped, all in one product per projection (fewer and "
                           "larger kernels; a layer's weights are put together first)", ["loop", "grouped"])
    lora: bool = setting(True, "train a LoRA (through PEFT) on frozen weights; --no-lora trains all weights")
    lora_rank: int = setting(32, "rank of the outer LoRA")
    lora_alpha: float = setting(64.0, "its product is scaled by alpha / rank")
    lora_dropout: float = setting(0.05, "dropout on its input")
    lora_scope: str = setting("all", "attention and all experts, or attention alone", ["all", "attention"])
    lora_router: bool = setting(False, "also on the router of LLaDA-MoE, as the published run had it")
    lora_dtype: str = setting("float32", "precision in which the LoRA is kept; bfloat16 goes with the 8-bit optimisers, which "
                              "round at random then", ["float32", "bfloat16"])
    from_adapter: str = setting("", "start from this LoRA: a folder or hub id in PEFT's format")
    merge: bool = setting(False, "add --from-adapter to the weights, before they are quantised, and train a new LoRA")
    optimizer: str = setting("adamw", "AdamW, or bitsandbytes' with 8-bit moments, which may live in the host's memory (paged)",
                             ["adamw", "adamw8bit", "paged_adamw8bit"])
    checkpointing: bool = setting(True, "recompute the activations below the fast weights instead of keeping them")
    max_length: int = setting(4096, "longest sample in tokens, template included; longer ones are left out")
    truncate: bool = setting(False, "cut the response of longer samples instead, as the published script does")
    split_seed: int = setting(42, "which 5 % of the data are held out")
    eos_loss: bool = setting(False, "padding is end tokens that are noised and predicted too, as in the published code")

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "batch", "prompt_length", "response_length", "log_every", "save_every", "accumulate",
                     "lora_rank", "max_length", "eval_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        # A run folder may come from a stranger: nothing in it may ask for a model without end.
        highest = dict(lr=1e30, warmup=1, weight_decay=1e3, grad_clip=math.inf, lora_dropout=1, steps=1e9, epochs=1e6, batch=1e6,
                       width=1 << 14, layers=1000, heads=1 << 10, prompt_length=1 << 20, response_length=1 << 20,
                       max_length=1 << 20, lora_rank=1 << 16)
        for name, high in highest.items():
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and {high:g}")
        if self.model == "toy" and (self.load_4bit or self.from_adapter):
            raise ValueError("--load-4bit and --from-adapter are for full models; the toy trains all of its weights")
        if self.toy_lora and (self.model != "toy" or not self.from_run):
            raise ValueError("--toy-lora is for a toy that starts --from-run")
        if self.from_run and self.model != "toy":
            raise ValueError("--from-run is for the toy; a full model starts --from-adapter")
        if self.experts == "grouped" and (self.rank % 8 or self.lora_rank % 8):
            raise ValueError(f"--experts grouped needs ranks that are multiples of 8, not {self.rank} and {self.lora_rank}")
        if self.merge and not self.from_adapter:
            raise ValueError("--merge needs --from-adapter")
        if self.closed_book and self.data in ("languages", "python", "pydoc"):
            raise ValueError(f"--closed-book leaves no question in {self.data}; use it with --data dictionary")


# What a full model's run sets: the paper's settings, in the memory of one GPU.
FULL = dict(data="Yukang/LongAlpaca-12k", epochs=5.0, batch=1, accumulate=32, skip_bad=True, control=False, table_samples=0, log_every=1,
            save_every=25, sample_every=50, eval_every=50)

# What a toy run sets differently from the paper, by kind of data ("file": your own) ...
RECIPES = {
    "dictionary": dict(memory_from="prompt", layers=1, steps=1000, lr=3e-3),
    "languages": dict(steps=350, lr=3e-3),
    "prose": dict(steps=350, lr=1e-3),
    "retrieval": dict(steps=2000, lr=3e-3),
    "python": dict(steps=500, batch=16, lr=3e-3, prompt_length=128, response_length=32),
    "pydoc": dict(steps=500, batch=16, lr=3e-3, prompt_length=128, response_length=32),
    "file": dict(steps=1000, batch=16, lr=3e-3),
}
# ... and by what phi is written from. A phi shared by a batch of 32 writes 1/32 as much into each sample, so each has
# its own here. Written from the response, phi holds the answers of the outer loss; trained from scratch at the
# paper's eta of 0.1 theta comes to rely on it and is lost without. 0.003 is the strength at which it is not.
WRITTEN_FROM = {
    "response": dict(per_sample=True, inner_lr=0.003),
    "prompt": dict(per_sample=True, inner_lr=0.3, trajectory="cover:4"),
}


def recipe(given):
    """Settings from the flags given on the command line: flag, else recipe, else default."""
    if given.get("model", "toy") != "toy":
        return Settings(**{**FULL, **({"epochs": 0.0} if "steps" in given else {}), **given})
    data = given.get("data", Settings.data)
    values = {**RECIPES.get(data, RECIPES["file"]), **given}
    written_from = values.setdefault("memory_from", Settings.memory_from)
    values = {**WRITTEN_FROM.get(written_from, {}), **values}
    # A closed book needs a memory, and a question beside the prompt.
    closed = values.get("memory", True) and written_from == "prompt" and data in ("dictionary", "retrieval")
    return Settings(**{"closed_book": closed, **values})


def control(s):
    """The run to compare with: same data, seed and steps, no memory, and sight of the prompt. The masks are the same
    too, unless the memory's book is closed: then the rows have other lengths."""
    return replace(s, memory=False, closed_book=False)


def add_flags(parser, names=None):
    """One flag per setting. Flags that are not given stay absent, so that recipes and saved runs can speak."""
    only_full = list(Settings.__dataclass_fields__)
    only_full = only_full[only_full.index("eval_every"):]
    full = parser if names else parser.add_argument_group("full models")
    for f in fields(Settings):
        if names is not None and f.name not in names:
            continue
        recipes = {"full models": FULL} | {f"toy {kind}": r for kind, r in RECIPES.items()} | {f"toy, from {x}": r for x, r in WRITTEN_FROM.items()}
        special = [f"{kind} {values[f.name]}" for kind, values in recipes.items() if f.name in values]
        text = f"{f.metadata['help']} [{'; '.join([f'default {f.default}', *special])}]".replace("%", "%%")
        choices = f.metadata["choices"]
        kind = (dict(action=argparse.BooleanOptionalAction) if f.type == "bool" else
                dict(type={"int": int, "float": float, "str": str}[f.type], choices=choices,
                     metavar=None if choices else f.name.upper()))
        place = full if f.name in only_full else parser
        place.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **kind)


def refuse(message):
    """One line that says what is wrong, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def one_line():
    """Bad input within is the user's to mend: its message without the traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        refuse(" ".join(str(error).split()))


# ---- Run folders ---------------------------------------------------------------------------------------

def write_whole(path, write):
    """Write a file so that it is either the old one or the new one, never half: aside, to disk, then renamed."""
    aside = path.with_name(path.name + ".tmp")
    try:
        write(aside)
        with open(aside, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def trained(model):
    """{name: parameter} of what is trained: all of the toy, the LoRA of a full model."""
    return {name: p for name, p in model.backbone.named_parameters() if p.requires_grad}


def save(folder, model, optimizer, step, processes=1):
    """Weights, AdamW's moments and the step in one safetensors file: one rename, so they always belong together."""
    from safetensors.torch import save_file
    tensors = {f"model.{name}": p.detach() for name, p in trained(model).items()}
    for name, p in trained(model).items():
        tensors |= {f"adamw.{key}.{name}": torch.as_tensor(value) for key, value in optimizer.state.get(p, {}).items()
                    if not key.startswith("qmap")}  # the 8-bit optimisers' table of levels, the same for all
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    state = {"step": step, "processes": processes, "base": base_of(model.backbone)}
    if getattr(model.backbone, "has_lora", False):  # first: what is cut off between the two is done again
        import llada
        llada.save_adapter(model.backbone, folder / "adapter")
    # One entry of metadata: the order of several in the file is random.
    write_whole(folder / "model.safetensors", lambda path: save_file(tensors, path, {"state": json.dumps(state)}))


def base_of(backbone):
    """A checksum of the weights that a LoRA stands on, None where all are trained."""
    if all(p.requires_grad for p in backbone.parameters()):
        return None
    if hasattr(backbone, "checksum"):
        return backbone.checksum()
    return f"{crc32(b''.join(p.detach().cpu().numpy().tobytes() for p in backbone.parameters() if not p.requires_grad)):08x}"


def load(folder, model, optimizer=None, processes=1):
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
    own = base_of(model.backbone)
    if state.get("base", own) != own:
        raise ValueError(f"{path} was trained on other base weights than those that are there now")
    named = trained(model)
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
    toy = ["toy/model.py", "toy/tasks.py", "toy/tokenizer.py"]
    names = ["memdlm.py", "train.py", "toy/data.py", "toy/text.py", *(toy if s.model == "toy" else ["llada.py"])]
    out = {"torch": torch.__version__} | {name: checksum(Path(__file__).parent / name) for name in names}
    if s.data in ("python", "pydoc"):
        out["python"] = sys.version.split()[0]
    elif Path(s.data).is_file():
        out["data"] = checksum(s.data)
    return out


def checksum(path):
    return f"{crc32(Path(path).read_bytes()):08x}"


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
        return build_full(s, training, device, say)
    from toy.data import ToyData
    from toy.model import ToyConfig, ToyDLM
    data = ToyData(s.data, s.prompt_length, s.response_length, s.skip_bad)
    config = ToyConfig(data.tokenizer.vocab_size, data.tokenizer.mask_id, s.width, s.layers, s.heads)
    model = MemDLM(ToyDLM(config, s.seed), s)
    if s.toy_lora:
        from peft import LoraConfig, inject_adapter_in_model
        load(s.from_run, model)
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):  # PEFT draws A from the global generator
            torch.manual_seed(s.seed)
            inject_adapter_in_model(LoraConfig(r=s.lora_rank, lora_alpha=s.lora_alpha, lora_dropout=s.lora_dropout,
                                               target_modules=list(model.backbone.matrices(0, "ffn+attn"))), model.backbone)
    return data, model


def build_full(s, training, device, say):
    """A full model: its data first, so that a mistake in a file costs no minutes, then the plan, then the weights."""
    import llada
    from toy.text import read_records
    config, records = llada.config_of(s.model), ([], 0)
    if training:
        if s.load_4bit and not s.lora and (s.merge or not s.from_adapter):
            raise ValueError("4-bit weights cannot be trained themselves: leave out --no-lora or --load-4bit")
        path = llada.find_data(s.data)
        records = read_records(path, llada.messages, s.skip_bad)
        room = torch.cuda.get_device_properties(device or 0).total_memory if torch.cuda.is_available() else None
        say(llada.plan_text(llada.plan(config, s, s.max_length), room))
    merge = s.from_adapter if s.merge else ""
    backbone = llada.load(s.model, s.load_4bit, s.dtype, device, s.attention, s.checkpointing, merge, experts=s.experts)
    if s.from_adapter and not merge:
        llada.load_adapter(backbone, s.from_adapter, s.lora_dropout, s.lora_dtype)
    elif s.lora:
        llada.add_lora(backbone, s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_scope, s.lora_router, s.lora_dtype, s.seed)
    elif not s.load_4bit:
        backbone.requires_grad_(True)
    say(llada.describe(backbone))
    data = llada.ChatData(backbone, records[0], s.max_length, s.truncate, s.split_seed, s.data, records[1],
                          s.seed)
    return data, MemDLM(backbone, s)


def open_run(folder, with_data=True, **changes):
    """A trained run: settings (with changes), data, model in eval mode."""
    s = replace(read_settings(folder), **changes)
    data, model = build(s, training=with_data)
    load(folder, model)
    return s, data, model.requires_grad_(False).eval()


def open_model(run, model, changes):
    """A run (None: the latest), or a full model without one: settings with changes, data, model in eval mode."""
    if not model:
        return open_run(run or latest_run(), with_data=False, **changes)
    s = Settings(model=model, lora=False, **changes)
    data, memory_model = build(s, training=False)
    return s, data, memory_model.requires_grad_(False).eval()


# ---- The loop ------------------------------------------------------------------------------------------

def make_batch(s, data, step, part=0, parts=1):
    """Micro-batch `part` of the `parts` of a step. It follows from seed and step alone, so resuming needs no saved random
    state, and N processes see what one process with N times the accumulation would."""
    from toy.data import collate
    numbers = range((step * parts + part) * s.batch, (step * parts + part + 1) * s.batch)
    names = [f"{s.seed} {step} {number - step * parts * s.batch}" for number in numbers]
    samples = [data.train(random.Random(f"data {name}"), step / s.steps, number) for name, number in zip(names, numbers)]
    batch = collate(samples, names, s.closed_book)
    if s.eos_loss:
        # Differs from our default: in the published run, padding is end tokens with labels, masked and predicted like the
        # response and visible to it. Then a sample's loss depends on what it is batched with.
        pad = ~batch.valid
        batch = replace(batch, x0=batch.x0.masked_fill(pad, data.tokenizer.eos_id), maskable=batch.maskable | pad,
                        valid=batch.valid | pad)
    return batch


def learning_rate(s, step):
    """Linear warm-up, then a cosine down to zero."""
    warm = s.warmup * s.steps
    if step < warm:
        return s.lr * min(1, (step + 1) / warm)  # (a warm-up may be shorter than a step)
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, s.steps - warm)))


def example(s, data, model, step):
    """A held-out sample, denoised: the question with gaps, the model's answer, the truth."""
    columns = list(data.columns)
    batch = data.tests(columns[step % len(columns)], [step], s.closed_book, name="sample")
    if s.model != "toy":  # the first words of the reply
        first = batch.maskable & (batch.maskable.cumsum(1) <= 32)
        end = int(first[0].nonzero().max()) + 1
        batch = replace(batch, x0=batch.x0[:, :end], maskable=first[:, :end], valid=batch.valid[:, :end])
    phi = None
    if s.memory and s.memory_from == "prompt":
        phi, _ = memdlm.adapt(model.backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
    canvas = batch.x0
    for canvas in decoder(model.backbone)(model.backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds, phi):
        pass
    show, answer = data.tokenizer.decode, batch.maskable[0]
    right = int((canvas[0] == batch.x0[0])[answer].sum())
    prompt, seen = show(batch.prompt[0].tolist()), 0 if s.closed_book else int(batch.prompt_valid[0].sum())
    if len(prompt) > 60:
        prompt = "... " + prompt[-60:].partition(" ")[2]
    rest = show(canvas[0][seen:].tolist())
    return (f"  sample at step {step}: {prompt!r} -> {rest!r}, {right} of {int(answer.sum())} right; "
            f"truth {show(batch.x0[0][answer].tolist())!r}")


def decoder(backbone):
    """Block diffusion for LLaDA2.x, low-confidence remasking for the others."""
    return getattr(backbone, "decoder", memdlm.denoise)


class Stop:
    """Ctrl-C and SIGTERM ask for a stop; the loop then saves and leaves. A second Ctrl-C leaves at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


def open_metrics(folder, step):
    """metrics.jsonl for appending, without the lines that a resumed run will write again."""
    path = folder / "metrics.jsonl" if folder else Path(os.devnull)
    if folder and path.exists():
        kept = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        kept = [line for line in kept if json.loads(line)["step"] < step]
        write_whole(path, lambda aside: aside.write_text("".join(kept)))
    return open(path, "a", buffering=1)


def make_optimizer(s, parameters):
    if s.optimizer == "adamw":
        # Fused where it can be: the other kinds make temporary copies of everything that is trained.
        return torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay, fused=parameters[0].is_cuda or None)
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(f"--optimizer {s.optimizer} needs bitsandbytes, which is not installed: pip install bitsandbytes") from None
    kind = getattr(bitsandbytes.optim, {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}[s.optimizer])

    class Rounding(kind):
        """bfloat16 weights have 8 bits: an update of 2e-5 on a weight of 0.02 would be rounded away, each time. So the step
        is taken in float32 and rounded at random, up as often as it is near: the mean of many steps is then right."""

        def update_step(self, group, p, gindex, pindex):
            if p.dtype is not torch.bfloat16:
                return super().update_step(group, p, gindex, pindex)
            # By a stand-in: a parameter that changes its type, even for a moment, loses the hooks by which DDP exchanges gradients.
            wide = torch.nn.Parameter(p.detach().float())
            wide.grad, p.grad = p.grad.float(), None
            self.state[wide] = self.state[p]
            super().update_step(group, wide, gindex, pindex)
            del self.state[wide]
            p.data.copy_(round_at_random(wide.detach()))

    return Rounding(parameters, lr=s.lr, weight_decay=s.weight_decay)


def round_at_random(x):
    """float32 -> bfloat16, to one of the two neighbours, the nearer one more often: right on average."""
    low = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)  # what is cut off, and a random carry
    return ((x.view(torch.int32) + low) & -65536).view(torch.float32).to(torch.bfloat16)


class Processes:
    """One process, or those that `accelerate launch` started: each works on its share of every step."""

    def __init__(self):
        self.accelerator, self.rank, self.count, self.device = None, 0, 1, None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs
            # Experts that no token chose have no gradient: DDP has to be told that this can happen.
            unused = DistributedDataParallelKwargs(find_unused_parameters=True)
            self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[unused])  # whatever its own settings say
            self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
            self.device = self.accelerator.device

    def wrap(self, model):
        if not self.accelerator:
            return model
        self.accelerator.free_memory()  # of the run before this one
        return self.accelerator.prepare(model)

    def total(self, value):
        """The sum over processes of a number or tensor."""
        return self.accelerator.reduce(torch.as_tensor(value, device=self.device), "sum") if self.accelerator else value

    def quiet_between(self, model, last):
        """Gradients are exchanged once per step, at its last micro-batch."""
        return contextlib.nullcontext() if last or not self.accelerator else self.accelerator.no_sync(model)


def step_seeds(s, step, processes):
    """For the two things that draw from the global generator, so that a resumed run draws the same: dropout, of its own on
    each process, and rounding at random, alike on all, for nobody compares their weights again."""
    return crc32(f"{s.seed} {step} {processes.rank}".encode()), crc32(f"{s.seed} {step} rounding".encode())


def outer_step(s, model, batches, report, processes):
    """Gradients of one step, summed over micro-batches and processes. Returns the record of numbers.

    Each micro-batch's loss is a mean over its own maskable tokens; weighted by its share of all of them, the sum is the loss
    of one large batch (Eq. 2's mean is over tokens), however it is cut.
    """
    counts = [int(batch.maskable.sum()) for batch in batches]
    all_tokens = max(1, int(processes.total(sum(counts))))
    sums = {}
    for i, (batch, count) in enumerate(zip(batches, counts)):
        with processes.quiet_between(model, i == len(batches) - 1):
            loss, record = model(batch, report)
            (loss * (count * processes.count / all_tokens)).backward()  # DDP takes the mean over processes
        masked = record.pop("masked")
        for name, value in record.items():
            # A loss is a mean over maskable tokens, a ce one over masked tokens, `inner` one over samples; skipped is a count.
            weight = {"loss": count, "ce": masked, "inner": len(batch.x0), "skipped": 1}[name.removesuffix("_without")]
            total, weights = sums.get(name, (0, 0))
            sums[name] = total + weight * value, weights + weight
    totals = {name: (processes.total(value), processes.total(weights)) for name, (value, weights) in sums.items()}
    return {name: value if name == "skipped" else value / max(1, int(weights)) for name, (value, weights) in totals.items()}


@torch.no_grad()
def held_out(s, data, model):
    """Cross-entropy per masked token of held-out samples, with memory and without, under the same masks every time."""
    model.eval()
    column, sums = next(iter(data.columns)), {}
    for start in range(0, s.eval_samples, s.batch):
        numbers = range(start, min(start + s.batch, s.eval_samples))
        _, record = model(data.tests(column, numbers, s.closed_book, name="held out"), True)
        for name in ("masked", "ce", "ce_without"):
            if name in record:
                sums[name] = sums.get(name, 0) + float(record[name]) * (1 if name == "masked" else int(record["masked"]))
    return {f"held_out_{name}": sums[name] / max(1, sums["masked"]) for name in ("ce", "ce_without") if name in sums}


def train(s, folder, resume, stop, processes):
    """Train one model into its folder. Returns the seconds it took."""
    with one_line():
        data, model = build(s, device=processes.device, say=print if processes.rank == 0 else lambda text: None)
        if s.epochs:
            if not hasattr(data, "pairs"):
                raise ValueError(f"--epochs needs a data set with an end; {s.data} has none, use --steps")
            per_step = s.batch * s.accumulate * processes.count
            s = replace(s, steps=max(1, math.ceil(s.epochs * len(data.pairs["train"]) / per_step)))
            model.s = s
        parameters = [p for p in model.parameters() if p.requires_grad]
        if parameters[0].dtype is torch.bfloat16 and s.optimizer == "adamw":
            raise ValueError("AdamW would round small updates of bfloat16 weights away: use --dtype float32 (--lora-dtype for a "
                             "LoRA) or --optimizer adamw8bit, which rounds at random")
        optimizer = make_optimizer(s, parameters)
        if s.from_run and not s.toy_lora:
            load(s.from_run, model)
        start = load(folder, model, optimizer, processes.count) if resume and (folder / "model.safetensors").exists() else 0
        if main := processes.rank == 0:
            open_folder(s, folder)
    if main:
        announce(s, folder, data, parameters, processes)
    wrapped, parts = processes.wrap(model), s.accumulate * processes.count
    began = time.perf_counter()
    with open_metrics(folder if main else None, start) as metrics, \
            tqdm(total=s.steps, initial=start, unit="step", disable=not main) as bar:
        for step in range(start, s.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(s, step)
            report = step % s.log_every == 0 or step == s.steps - 1
            wrapped.train()
            dropout, rounding = step_seeds(s, step, processes)
            torch.manual_seed(dropout)
            mine = range(processes.rank * s.accumulate, (processes.rank + 1) * s.accumulate)
            batches = [make_batch(s, data, step, part, parts) for part in mine]
            optimizer.zero_grad()
            record = outer_step(s, wrapped, batches, report, processes)
            norm = torch.nn.utils.clip_grad_norm_(parameters, s.grad_clip, error_if_nonfinite=False)
            if not norm.isfinite():
                refuse(f"step {step}: loss {float(record['loss'])} and gradient norm {norm.item()} are not finite; "
                       f"the checkpoint in {folder} is from before. Try a smaller --lr or --inner-lr")
            torch.manual_seed(rounding)
            optimizer.step()
            bar.update()
            if report and main:
                log(record, step, learning_rate(s, step), norm, time.perf_counter() - began, metrics, bar)
            if main:
                show_progress(s, data, model, step, metrics, bar)
            stopping = bool(processes.total(int(stop.signal is not None)))
            if main and ((step + 1) % s.save_every == 0 or step == s.steps - 1 or stopping):
                with one_line():
                    save(folder, model, optimizer, step + 1, processes.count)
            if stopping and step < s.steps - 1:
                bar.close()
                leave(folder, step, stop, main)
    if main:
        picture(folder)
    return time.perf_counter() - began


def leave(folder, step, stop, main):
    """After Ctrl-C or SIGTERM, with everything saved."""
    whole = folder.parent if folder.name == "control" else folder
    if main:
        print(f"stopped after step {step + 1} and saved; go on with: python train.py --resume {whole}")
    sys.exit(128 + (stop.signal or signal.SIGTERM))


def open_folder(s, folder):
    """settings.json last: with it the folder is a run."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "origin.json").exists():
        write_whole(folder / "origin.json", lambda path: path.write_text(json.dumps(origin(s), indent=2) + "\n"))
    write_whole(folder / "settings.json", lambda path: path.write_text(json.dumps(asdict(s), indent=2) + "\n"))


def announce(s, folder, data, parameters, processes):
    if data.note:
        print(data.note)
    kind = f"memory written from the {s.memory_from}" if s.memory else "no memory"
    share = f", {processes.count} processes" if processes.count > 1 else ""
    print(f"{folder}: {sum(p.numel() for p in parameters):,} trained weights, {kind}, {'closed' if s.closed_book else 'open'} "
          f"book, {s.steps} steps of {s.batch * s.accumulate * processes.count} samples{share}", flush=True)


def show_progress(s, data, model, step, metrics, bar):
    """Now and then: a sample, and the held-out loss."""
    if s.sample_every and step % s.sample_every == s.sample_every - 1:
        model.eval()
        bar.write(example(s, data, model, step + 1))
    if s.eval_every and (step % s.eval_every == s.eval_every - 1 or step == s.steps - 1):
        values = held_out(s, data, model)
        metrics.write(json.dumps({"step": step, **values}) + "\n")
        bar.write(f"  held out after step {step + 1}: " + ", ".join(f"{name[9:]} {x:.3f}" for name, x in values.items()))


def log(record, step, lr, norm, seconds, metrics, bar):
    """One line of metrics.jsonl, and the same numbers on the bar."""
    values = {name: torch.as_tensor(value).tolist() for name, value in record.items()}
    shown = {"ce with memory" if "inner" in values else "ce": f"{values['ce']:.3f}"}
    if "inner" in values:
        shown |= {"without": f"{values['ce_without']:.3f}", "inner": ">".join(f"{x:.2f}" for x in values["inner"])}
    if values.get("skipped"):
        shown["skipped"] = values["skipped"]
    bar.set_postfix(shown, refresh=False)
    metrics.write(json.dumps({"step": step, **values, "lr": lr, "grad_norm": norm.item(), "seconds": seconds}) + "\n")


# The same thing has the same colour in every picture; seen apart by the colour-blind too.
COLORS = {"MDLM": "#8C8C8C", "MDLM, adapted": "#000000", "train-only": "#E69F00", "train & inference": "#0072B2", "answers": "#CC79A7"}


def pyplot():
    """matplotlib, or None with a word on how to get it: pictures are worth having, not worth stopping for."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "legend.frameon": False,
                         "axes.titlesize": 10, "savefig.dpi": 120, "lines.linewidth": 1.3})
    return plt


def picture(folder):
    """loss.png: cross-entropy per masked token, with memory and without."""
    plt = pyplot()
    if plt is None:
        return
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    label, kind = ("with memory (phi has seen these answers)", "answers") if "inner" in lines[0] else ("no memory", "MDLM")
    if "inner" in lines[0] and read_settings(folder).memory_from == "prompt":
        label, kind = "with memory of the prompt", "train & inference"
    for key, text, color in (("ce", label, COLORS[kind]), ("ce_without", "without memory (theta alone)", COLORS["train-only"])):
        points = [(line["step"], line[key]) for line in lines if key in line]
        held = [(line["step"], line["held_out_" + key]) for line in lines if "held_out_" + key in line]
        if points:
            axes.plot(*zip(*points), color=color, linewidth=1.2, label=text, alpha=0.4 if held else 1)
        if held:
            axes.plot(*zip(*held), "o-", color=color, linewidth=1.2, markersize=4, label=text + ", held out")
    axes.set(xlabel="step", ylabel="nats per masked token", ylim=(0, None))
    axes.legend()
    figure.savefig(folder / "loss.png")
    plt.close(figure)


# ---- Command line --------------------------------------------------------------------------------------

def free_folder(s):
    """runs/<data>[-baseline], with a number behind it if there is one already."""
    model = "" if s.model == "toy" else Path(s.model).name + "-"
    name = model + Path(s.data).stem + ("" if s.memory else "-baseline")
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def resumed(argument, given, anyway=False):
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


def show_plan(s):
    import llada
    if s.model == "toy":
        raise ValueError("--plan is for full models; the toy takes a few hundred megabytes")
    room = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 24 * 2**30
    print(llada.plan_text(llada.plan(llada.config_of(s.model), s, s.max_length), room))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="run folder [default runs/ and the name of the data]")
    parser.add_argument("--plan", action="store_true", help="print the memory that the run would take, and stop (full models)")
    parser.add_argument("--resume", nargs="?", const="latest", metavar="RUN", help="go on with a run [default the latest]")
    parser.add_argument("--anyway", action="store_true", help="resume although code, data or PyTorch have changed since")
    add_flags(parser)
    given = vars(parser.parse_args())
    out, resume, plan, anyway = given.pop("out"), given.pop("resume"), given.pop("plan"), given.pop("anyway")
    with one_line():
        if plan:
            return show_plan(recipe(given))
        s, folder = resumed(resume, given, anyway) if resume else (recipe(given), None)
        folder = folder or Path(out or free_folder(s))
        if not resume and (folder / "settings.json").exists():
            raise ValueError(f"{folder} holds a run already: --resume {folder} goes on with it, "
                             "another --out starts anew")
    stop, processes = Stop(), Processes()
    seconds = train(s, folder, resume, stop, processes)
    if s.memory and s.control:
        print("\nnow its control: the same data and seed, without memory, with sight of the prompt")
        seconds += train(control(s), folder / "control", resume, stop, processes)
    if processes.rank:
        return
    if s.table_samples:
        from evaluate import panel
        panel([folder], s.table_samples, picture=folder / "panel.png")
    ask = "--show     answer a prompt from this run" if s.model == "toy" else '--prompt "..."     answer with this run'
    print(f"trained in {seconds:.0f} s. Look at the pictures in {folder}; next:\n"
          f"  python generate.py --adapt {ask}\n"
          f"  python evaluate.py                    compare runs, with more samples")


if __name__ == "__main__":
    main()
