"""Train a masked diffusion language model with MemDLM, or the MDLM baseline.

    python train.py --model toy                     closed-book memory, seen to work within minutes on a CPU
    python train.py --model toy --data languages    the method as published, with the controls it needs
    python train.py --model toy --data python       real text (the source of Python's own library)
    python train.py --model toy --data my.jsonl     your own {"prompt": ..., "response": ...} lines
    python train.py --model toy --no-memory         the baseline: same data, same masks, no inner loop
    python train.py --resume                        go on where the latest run stopped, exactly

Every run leaves a folder: settings.json, model.safetensors (weights and optimiser), metrics.jsonl, loss.png.
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

import torch
from tqdm import tqdm

import memdlm
from memdlm import MemDLM, setting


# ---- Settings: one dataclass, from which come the flags, their help, and settings.json ------------------

@dataclass
class Settings(memdlm.Settings):
    model: str = setting("toy", "'toy', the tiny model of toy/model.py")
    data: str = setting("dictionary", "dictionary, languages, retrieval, python, pydoc, or a .jsonl / .json file")
    steps: int = setting(500, "outer steps")
    batch: int = setting(32, "samples per step")
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
    threads: int = setting(0, "CPU threads, 0 for PyTorch's choice")

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "batch", "prompt_length", "response_length", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.model != "toy":
            raise ValueError(f"unknown model {self.model!r}; this version trains 'toy'")
        if self.closed_book and self.data in ("languages", "python", "pydoc"):
            raise ValueError(f"--closed-book leaves no question in {self.data}; use it with --data dictionary")


# What a toy run sets differently from the paper, by kind of data ("file": your own) ...
RECIPES = {
    "dictionary": dict(memory_from="prompt", layers=1, steps=1000, lr=3e-3),
    "languages": dict(steps=350, lr=3e-3),
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
    for f in fields(Settings):
        if names is not None and f.name not in names:
            continue
        recipes = {f"toy {kind}": r for kind, r in RECIPES.items()} | {f"toy, from {x}": r for x, r in WRITTEN_FROM.items()}
        special = [f"{kind} {values[f.name]}" for kind, values in recipes.items() if f.name in values]
        text = f"{f.metadata['help']} [{'; '.join([f'default {f.default}', *special])}]".replace("%", "%%")
        choices = f.metadata["choices"]
        kind = (dict(action=argparse.BooleanOptionalAction) if f.type == "bool" else
                dict(type={"int": int, "float": float, "str": str}[f.type], choices=choices,
                     metavar=None if choices else f.name.upper()))
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **kind)


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


def save(folder, model, optimizer, step):
    """Weights, AdamW's moments and the step in one safetensors file: one rename, so they always belong together."""
    from safetensors.torch import save_file
    tensors = {f"model.{name}": p.detach() for name, p in model.backbone.named_parameters()}
    for name, p in model.backbone.named_parameters():
        tensors |= {f"adamw.{key}.{name}": value for key, value in optimizer.state.get(p, {}).items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(folder / "model.safetensors", lambda path: save_file(tensors, path, {"step": str(step)}))


def load(folder, model, optimizer=None):
    """Fill the model (and the optimiser) from a run folder. Returns the step. ValueError if they do not fit."""
    from safetensors import SafetensorError, safe_open
    path = Path(folder) / "model.safetensors"
    if not path.exists():
        raise ValueError(f"{path}: no such file; the run saved nothing yet")
    try:
        with safe_open(path, "pt") as file:
            tensors, step = {name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["step"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint of this program: {error}") from None
    named = dict(model.backbone.named_parameters())
    for name, p in named.items():
        saved = tensors.get(f"model.{name}")
        if saved is None or saved.shape != p.shape:
            raise ValueError(f"{path} belongs to another model: {name} should be {list(p.shape)}, "
                             f"is {'missing' if saved is None else list(saved.shape)}")
        p.data.copy_(saved)
    for name, p in named.items() if optimizer else ():
        optimizer.state[p] = {key: tensors[f"adamw.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return step


def read_settings(folder):
    """The settings of a run folder."""
    path = Path(folder) / "settings.json"
    try:
        values = json.loads(path.read_text())
        return Settings(**values)
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a run folder: it has no settings.json") from None
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not the settings of a run: {error}") from None


def latest_run(root="runs"):
    """The run folder written to last."""
    found = sorted(Path(root).glob("*/settings.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"there is no run in {root}/ yet; make one with: python train.py --model toy")
    return found[-1].parent


def build(s):
    """Settings -> data, MemDLM with initial weights from the seed."""
    from toy.data import ToyData
    from toy.model import ToyConfig, ToyDLM
    if s.threads:
        torch.set_num_threads(s.threads)
    data = ToyData(s.data, s.prompt_length, s.response_length, s.skip_bad)
    config = ToyConfig(data.tokenizer.vocab_size, data.tokenizer.mask_id, s.width, s.layers, s.heads)
    return data, MemDLM(ToyDLM(config, s.seed), s)


def open_run(folder, **changes):
    """A trained run: settings (with changes), data, model in eval mode."""
    s = replace(read_settings(folder), **changes)
    data, model = build(s)
    load(folder, model)
    return s, data, model.eval()


# ---- The loop ------------------------------------------------------------------------------------------

def make_batch(s, data, step):
    """The batch of a step follows from seed and step alone, so resuming needs no saved random state."""
    from toy.data import collate
    names = [f"{s.seed} {step} {i}" for i in range(s.batch)]
    return collate([data.train(random.Random(f"data {name}"), step / s.steps) for name in names], names, s.closed_book)


def learning_rate(s, step):
    """Linear warm-up, then a cosine down to zero."""
    warm = s.warmup * s.steps
    if step < warm:
        return s.lr * (step + 1) / warm
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, s.steps - warm)))


def example(s, data, model, step):
    """A held-out sample, denoised: the question with gaps, the model's answer, the truth."""
    columns = list(data.columns)
    batch = data.tests(columns[step % len(columns)], [step], s.closed_book, name="sample")
    phi = None
    if s.memory and s.memory_from == "prompt":
        phi, _ = memdlm.adapt(model.backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
    canvas = batch.x0
    for canvas in memdlm.denoise(model.backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds, phi):
        pass
    show, answer = data.tokenizer.decode, batch.maskable[0]
    right = int((canvas[0] == batch.x0[0])[answer].sum())
    prompt, seen = show(batch.prompt[0].tolist()), 0 if s.closed_book else int(batch.prompt_valid[0].sum())
    if len(prompt) > 60:
        prompt = "... " + prompt[-60:].partition(" ")[2]
    rest = show(canvas[0][seen:].tolist())
    return (f"  sample at step {step}: {prompt!r} -> {rest!r}, {right} of {int(answer.sum())} right; "
            f"truth {show(batch.x0[0][answer].tolist())!r}")


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
    path = folder / "metrics.jsonl"
    if path.exists():
        kept = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        kept = [line for line in kept if json.loads(line)["step"] < step]
        write_whole(path, lambda aside: aside.write_text("".join(kept)))
    return open(path, "a", buffering=1)


def train(s, folder, resume, stop):
    """Train one model into its folder. Returns the seconds it took."""
    with one_line():
        data, model = build(s)
        optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=s.weight_decay)
        start = load(folder, model, optimizer) if resume and (folder / "model.safetensors").exists() else 0
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "settings.json", lambda path: path.write_text(json.dumps(asdict(s), indent=2) + "\n"))
    if data.note:
        print(data.note)
    parameters = sum(p.numel() for p in model.parameters())
    kind = f"memory written from the {s.memory_from}" if s.memory else "no memory"
    print(f"{folder}: {parameters:,} weights, {kind}, {'closed' if s.closed_book else 'open'} book, {s.steps} steps")
    began = time.perf_counter()
    with open_metrics(folder, start) as metrics, tqdm(total=s.steps, initial=start, unit="step") as bar:
        for step in range(start, s.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(s, step)
            report = step % s.log_every == 0 or step == s.steps - 1
            model.train()
            loss, record = model(make_batch(s, data, step), report)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip, error_if_nonfinite=False)
            if not norm.isfinite():
                refuse(f"step {step}: loss {loss.item()} and gradient norm {norm.item()} are not finite; "
                       f"the checkpoint in {folder} is from before. Try a smaller --lr or --inner-lr")
            optimizer.step()
            bar.update()
            if report:
                log(record, step, learning_rate(s, step), norm, time.perf_counter() - began, metrics, bar)
            if s.sample_every and step % s.sample_every == s.sample_every - 1:
                model.eval()
                bar.write(example(s, data, model, step + 1))
            if (step + 1) % s.save_every == 0 or step == s.steps - 1 or stop.signal:
                with one_line():
                    save(folder, model, optimizer, step + 1)
            if stop.signal and step < s.steps - 1:
                bar.close()
                whole = folder.parent if folder.name == "control" else folder
                print(f"stopped after step {step + 1} and saved; go on with: python train.py --resume {whole}")
                sys.exit(128 + stop.signal)
    picture(folder)
    return time.perf_counter() - began


def log(record, step, lr, norm, seconds, metrics, bar):
    """One line of metrics.jsonl, and the same numbers on the bar."""
    values = {name: value.tolist() for name, value in record.items()}
    shown = {"ce with memory" if "inner" in values else "ce": f"{values['ce']:.3f}"}
    if "inner" in values:
        shown |= {"without": f"{values['ce_without']:.3f}", "inner": ">".join(f"{x:.2f}" for x in values["inner"])}
    if values.get("skipped"):
        shown["skipped"] = values["skipped"]
    bar.set_postfix(shown, refresh=False)
    metrics.write(json.dumps({"step": step, **values, "lr": lr, "grad_norm": norm.item(), "seconds": seconds}) + "\n")


def pyplot():
    """matplotlib, or None with a word on how to get it: pictures are worth having, not worth stopping for."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def picture(folder):
    """loss.png: cross-entropy per masked token, with memory and without."""
    plt = pyplot()
    if plt is None:
        return
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    label = "with memory (phi has seen these answers)" if "inner" in lines[0] else "no memory"
    if "inner" in lines[0] and read_settings(folder).memory_from == "prompt":
        label = "with memory of the prompt"
    for key, text, color in (("ce", label, "#0072B2"), ("ce_without", "without memory (theta alone)", "#D55E00")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), color=color, linewidth=1.2, label=text)
    axes.set(xlabel="step", ylabel="nats per masked token", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)


# ---- Command line --------------------------------------------------------------------------------------

def free_folder(s):
    """runs/<data>[-baseline], with a number behind it if there is one already."""
    name = Path(s.data).stem + ("" if s.memory else "-baseline")
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def resumed(argument, given):
    """Settings and folder of the run to go on with. Flags may repeat its settings, not change them."""
    folder = Path(argument) if argument != "latest" else latest_run()
    s = read_settings(folder)
    for name, value in given.items():
        if getattr(s, name) != value:
            raise ValueError(f"{folder} was started with {name} {getattr(s, name)}, not {value}: that would be "
                             "another run; leave the flag out, or start anew without --resume")
    return s, folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="run folder [default runs/ and the name of the data]")
    parser.add_argument("--resume", nargs="?", const="latest", metavar="RUN", help="go on with a run [default the latest]")
    add_flags(parser)
    given = vars(parser.parse_args())
    out, resume = given.pop("out"), given.pop("resume")
    with one_line():
        s, folder = resumed(resume, given) if resume else (recipe(given), None)
        folder = folder or Path(out or free_folder(s))
        if not resume and (folder / "settings.json").exists():
            raise ValueError(f"{folder} holds a run already: --resume {folder} goes on with it, "
                             "another --out starts anew")
    stop = Stop()
    seconds = train(s, folder, resume, stop)
    if s.memory and s.control:
        print("\nnow its control: the same data and seed, without memory, with sight of the prompt")
        seconds += train(control(s), folder / "control", resume, stop)
    if s.table_samples:
        from evaluate import panel
        panel([folder], s.table_samples, picture=folder / "panel.png")
    print(f"trained in {seconds:.0f} s. Look at the pictures in {folder}; next:\n"
          f"  python generate.py --adapt --show     answer a prompt from this run\n"
          f"  python evaluate.py                    compare runs, with more samples")


if __name__ == "__main__":
    main()
