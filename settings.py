"""What a run can be told: its settings, what each kind of data sets differently, and the flags.

A setting is one field of `Settings`. The field carries its group, help text, choices and limits,
and from these come the flags of every script, the groups of --help, the checks and settings.json.
"""
from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

import memdlm
from backbones.config import ATTENTION
from console import printable
from files import check_target, nearest
from memdlm import setting
from objectives import OBJECTIVES

GROUPS = {  # what --help says of each group of settings
    "method": "how the model is trained with memory",
    "inner loop": "how phi is written, in training and at inference",
    "run": "what is trained, and for how long",
    "optimisation": "the outer step",
    "data": "what it is trained on",
    "toy": "the tiny model",
    "real models": "what is trained of a real model",
    "loading": "how a model is opened",
}


@dataclass
class Settings(memdlm.Settings):
    """Everything a run can be told. The defaults are the paper's where the paper has one."""
    model: str = setting("run", "toy", "'toy', the tiny model of toy/model.py; or a real model: a "
        "hub id or a folder")
    steps: int = setting("run", 500, "outer steps", low=1, high=1e9)
    epochs: float = setting("run", 0.0, "passes over the data, in place of --steps",
        low=0, high=1e6)
    seed: int = setting("run", 0, "decides initial weights, data and masks",
        low=-1e18, high=1e18)
    control: bool = setting("run", True, "also train the run's control (the baseline) for the "
        "table at the end")
    log_every: int = setting("run", 10, "steps between lines of metrics.jsonl", low=1, high=1e9)
    save_every: int = setting("run", 100, "steps between checkpoints", low=1, high=1e9)
    sample_every: int = setting("run", 100, "steps between printed samples, 0 for none",
        low=0, high=1e9)
    eval_every: int = setting("run", 0, "steps between evaluations on held-out samples, 0 for none",
        low=0, high=1e9)
    eval_samples: int = setting("run", 32, "held-out samples in an evaluation", low=1, high=1e9)
    table_samples: int = setting("run", 100, "held-out samples per cell of the table at the end, 0 "
        "for no table", low=0, high=1e9)

    batch: int = setting("optimisation", 32, "samples per micro-batch, on each process",
        low=1, high=1e6)
    accumulate: int = setting("optimisation", 1, "micro-batches per step, on each process",
        low=1, high=1e6)
    lr: float = setting("optimisation", 2e-5, "beta, peak learning rate of the outer AdamW; a "
        "warm-up, then a cosine", low=0, high=1e30)
    warmup: float = setting("optimisation", 0.1, "share of the steps with rising learning rate",
        low=0, high=1)
    weight_decay: float = setting("optimisation", 0.0, "of the outer AdamW", low=0, high=1e3)
    grad_clip: float = setting("optimisation", 1.0, "norm at which the gradient of theta is "
        "clipped; phi has no part in it", low=0, high=math.inf)
    objective: str = setting("optimisation", "mdlm", "the outer loss: mdlm (the paper), or one "
        "said to help against exposure bias: papl (planner-aware weights), own (also learn from "
        "own predictions), bell (middle noise levels more often)", list(OBJECTIVES))
    optimizer: str = setting("optimisation", "adamw", "AdamW, or bitsandbytes' with 8-bit moments, "
        "which may live in the host's memory (paged)", ["adamw", "adamw8bit", "paged_adamw8bit"])

    data: str = setting("data", "dictionary", "dictionary, languages, retrieval, prose, python, "
        "pydoc (toy); a .jsonl, .json or .csv file (also .gz), or .parquet; a folder of "
        "save_to_disk; or a hub id, id:split or id/subset:split")
    max_records: int = setting("data", 100_000, "records that are read of a file or a data set, "
        "from its beginning; 0 for all", low=0, high=1e9)
    skip_bad: bool = setting("data", False, "leave out records of a data file that cannot be used "
        "instead of stopping at the first")
    prompt_length: int = setting("data", 256, "toy, text: longest prompt in bytes",
        low=1, high=1 << 20)
    response_length: int = setting("data", 64, "toy, text: length of the response in bytes",
        low=1, high=1 << 20)
    max_length: int = setting("data", 4096, "real models: longest sample in tokens, template "
        "included; longer ones are left out", low=1, high=1 << 20)
    truncate: bool = setting("data", False, "cut the response of longer samples instead, as the "
        "published script does")
    turns: str = setting("data", "last", "real models: which of the assistant's turns are learned: "
        "the last, as in the paper, or all", ["last", "all"])
    split_seed: int = setting("data", 42, "real models: which 5 % of the data are held out",
        low=-1e18, high=1e18)
    eos_loss: bool = setting("data", False, "padding is end tokens that are noised and predicted "
        "too, as in the published code")

    width: int = setting("toy", 64, "D", low=1, high=1 << 14)
    layers: int = setting("toy", 2, "number of blocks", low=1, high=1000)
    heads: int = setting("toy", 4, "attention heads", low=1, high=1 << 10)
    from_run: str = setting("toy", "", "start from the weights of this run folder, to fine-tune "
        "them on other data")
    toy_lora: bool = setting("toy", False, "keep the weights of --from-run and train a LoRA on "
        "them, as real models do")

    lora: bool = setting("real models", True, "train a LoRA (through PEFT) on frozen weights; "
        "--no-lora trains all weights")
    lora_rank: int = setting("real models", 32, "rank of the outer LoRA", low=1, high=1 << 16)
    lora_alpha: float = setting("real models", 64.0, "its product is scaled by alpha / rank",
        low=1e-9, high=1 << 20)
    lora_dropout: float = setting("real models", 0.05, "dropout on its input", low=0, high=1)
    lora_scope: str = setting("real models", "all", "attention and all experts, or attention alone",
        ["all", "attention"])
    lora_router: bool = setting("real models", False, "also on the router of LLaDA-MoE, as the "
        "published run had it")
    lora_dtype: str = setting("real models", "float32", "precision in which the LoRA is kept; "
        "bfloat16 goes with the 8-bit optimisers, which round at random then",
        ["float32", "bfloat16"])
    checkpointing: bool = setting("real models", True, "recompute the activations below the fast "
        "weights instead of keeping them")

    load_4bit: bool = setting("loading", False, "quantise the layers of the blocks to 4 bits (nf4, "
        "double quantisation)")
    dtype: str = setting("loading", "auto", "precision of the weights that are not quantised, and "
        "of the computation: auto is bfloat16 on a GPU, on a CPU the file's",
        ["auto", "bfloat16", "float32"])
    device: str = setting("loading", "auto", "where a real model runs: auto is a GPU if there is "
        "one", ["auto", "cuda", "cpu"])
    attention: str = setting("loading", "auto", "where a token looks: everywhere (full); or, for "
        "LLaDA2.x and SDAR in training and adaptation, not beyond its block (block), as they "
        "decode; or, for models trained left to right, not to its right (causal), in the N lower "
        "layers alone (causal:N), or in the prompt alone (causal-prompt); auto is what the "
        "model's config.json says, else full")
    shift: bool = setting("loading", False, "predict a token from the place before it, as models "
        "trained left to right have learned to; such a model needs it in all commands")
    from_adapter: str = setting("loading", "", "start from this LoRA: a folder or hub id in PEFT's "
        "format")
    merge: bool = setting("loading", False, "add --from-adapter to the weights, before they are "
        "quantised, and train a new LoRA")
    threads: int = setting("loading", 0, "CPU threads, 0 for PyTorch's choice", low=0, high=1 << 10)

    def __post_init__(self):
        super().__post_init__()
        if self.model == "toy" and 12 * self.layers * self.width**2 > 1 << 28:
            raise ValueError(f"a toy of {self.layers} layers of width {self.width} would have more "
                             "than 268 million weights; that is no toy")
        if self.model == "toy" and (self.load_4bit or self.from_adapter):
            raise ValueError("--load-4bit and --from-adapter are for real models; the toy trains "
                             "all of its weights")
        if self.model == "toy" and self.turns == "all":
            raise ValueError("--turns all is for real models; a sample of the toy has one response")
        if self.attention != "auto" and not ATTENTION.fullmatch(self.attention):
            raise ValueError(f"attention is {self.attention!r:.80}; it must be one of auto, full, "
                             "block, causal-prompt, causal, causal:N with N from 1 (causal:20)")
        if self.shift and self.model == "toy":
            raise ValueError("--shift is for real models that were trained left to right")
        if self.toy_lora and (self.model != "toy" or not self.from_run):
            raise ValueError("--toy-lora is for a toy that starts --from-run")
        if self.from_run and self.model != "toy":
            raise ValueError("--from-run is for the toy; a real model starts --from-adapter")
        if self.merge and not self.from_adapter:
            raise ValueError("--merge needs --from-adapter")
        self._check_training()

    def _check_training(self):
        """ValueError where order or objective do not go with the rest."""
        if self.order == "second" and self.model != "toy":
            raise ValueError("--order second is for the toy: a real model takes the gradients of "
                             "its logits at once, to save memory, and these have no second "
                             "derivative")
        if self.order == "second" and not self.memory:
            raise ValueError("--order second goes through the inner loop, which --no-memory leaves "
                             "out")
        if self.order == "second" and self.inner_loss != "ce":
            raise ValueError(f"--order second needs --inner-loss ce: {self.inner_loss} has a "
                             "teacher that is a constant, so the gradient would not be exact")
        if self.objective == "own" and self.memory:
            raise ValueError("--objective own is a baseline without memory: add --no-memory")
        if self.closed_book and self.data in ("languages", "python", "pydoc"):
            raise ValueError(f"--closed-book leaves no question in {self.data}; use it with "
                             "--data dictionary")


# What a real model's run sets: the paper's settings, in the memory of one GPU.
REAL = dict(data="Yukang/LongAlpaca-12k", epochs=5.0, batch=1, accumulate=32, skip_bad=True,
            control=False, table_samples=0, log_every=1, save_every=25, sample_every=50,
            eval_every=50)

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
# ... and by what phi is written from. A phi that a batch of 32 shares learns 1/32 as much from
# each sample, so each sample has its own here. Written from the response, phi holds the answers of
# the outer loss. Trained from scratch at the paper's eta of 0.1, theta comes to rely on it and is
# lost without. At 0.003 it is not.
WRITTEN_FROM = {
    "response": dict(per_sample=True, inner_lr=0.003),
    "prompt": dict(per_sample=True, inner_lr=0.3, trajectory="cover:4"),
}


def settings_from_flags(given):
    """Settings from the flags given on the command line: the flag, else the recipe's, else the
    default."""
    if given.get("model", "toy") != "toy":
        steps_given = {"epochs": 0.0} if "steps" in given else {}
        return Settings(**{**REAL, **steps_given, **given})
    data = given.get("data", Settings.data)
    values = {**RECIPES.get(data, RECIPES["file"]), **given}
    written_from = values.setdefault("memory_from", Settings.memory_from)
    values = {**WRITTEN_FROM.get(written_from, {}), **values}
    # A closed book needs a memory, and a question beside the prompt.
    closed = (values.get("memory", True) and written_from == "prompt"
              and data in ("dictionary", "retrieval"))
    return Settings(**{"closed_book": closed, **values})


def flags_between(base, s, names=None):
    """The flags, as words of a command line, that turn the settings `base` into s.

    names: of the settings that count, all if None.
    """
    words = []
    for f in fields(Settings):
        value = getattr(s, f.name)
        if value == getattr(base, f.name) or (names is not None and f.name not in names):
            continue
        flag = f.name.replace("_", "-")
        if f.type == "bool":
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif str(value)[:1] in ("", "-"):  # by itself it would be taken for a flag
            words.append(f"--{flag}={value}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def command_of(s):
    """The flags of train.py that make these settings, and no more than are needed.

    The number of steps is left out where it follows from --epochs.
    """
    plain = Settings(data=REAL["data"] if s.model != "toy" else Settings.data)
    first = {name: getattr(s, name) for name in ("model", "data")}
    usual = settings_from_flags(first)
    # The recipes ask for these two as well.
    more = {name: getattr(s, name) for name in ("memory", "memory_from")
            if getattr(s, name) != getattr(usual, name)}
    base = settings_from_flags(first | more)
    if s.epochs:
        base = replace(base, steps=s.steps)
    elif s.steps != base.steps:
        base = replace(base, epochs=0.0)  # --steps turns it off
    return [*flags_between(plain, s, first), *flags_between(usual, s, more),
            *flags_between(base, s)]


def control_settings(s):
    """The run to compare with: same data, seed and steps, no memory, and sight of the prompt.

    The masks are the same too, unless the memory's book is closed: then its samples are shorter.
    """
    return replace(s, memory=False, closed_book=False, order="first")


def names_of(*groups):
    """The names of the settings in these groups, in order."""
    return [f.name for f in fields(Settings) if f.metadata["group"] in groups]


# What a command line may change in a trained run.
CHANGEABLE = names_of("inner loop", "loading") + ["closed_book"]


def add_flags(parser, names):
    """One flag for each of these settings, under the heading of its group.

    Flags that are not given stay absent, so that recipes and saved runs can speak.
    """
    places = {}
    for f in fields(Settings):
        group = f.metadata["group"]
        if f.name in names:
            if group not in places:
                places[group] = parser.add_argument_group(group, GROUPS[group])
            add_flag(places[group], f)


def add_flag(place, f):
    """The flag of one setting, with its defaults in the help text."""
    recipes = {"real models": REAL}
    recipes |= {f"toy {kind}": values for kind, values in RECIPES.items()}
    recipes |= {f"toy, from {source}": values for source, values in WRITTEN_FROM.items()}
    defaults = [f"default {f.default}"]
    defaults += [f"{kind} {values[f.name]}" for kind, values in recipes.items() if f.name in values]
    text = f"{f.metadata['help']} [{'; '.join(defaults)}]".replace("%", "%%")
    options = dict(default=argparse.SUPPRESS, help=text)
    if f.type == "bool":
        options |= dict(action=argparse.BooleanOptionalAction)
    else:
        choices = f.metadata["choices"]
        options |= dict(type={"int": int, "float": float, "str": str}[f.type], choices=choices,
                        metavar=None if choices else f.name.upper())
    place.add_argument("--" + f.name.replace("_", "-"), **options)


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one line.

    first: what a beginner needs, a list of flags and of names without a flag. --help shows these,
    --help-all shows everything in groups. Without a list --help shows everything.
    """

    def __init__(self, first=(), **options):
        # So far right that --memory and --no-memory stand on one line with what they do.
        form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=26)
        super().__init__(formatter_class=form,
                         usage="%(prog)s [FLAGS]", allow_abbrev=False, add_help=False, **options)
        self.first = [*first, "--help-all"] if first else []
        show = dict(action=ShowHelp, nargs=0, dest=argparse.SUPPRESS)
        self.add_argument("-h", "--help", **show, help="show this and stop")
        if first:
            self.add_argument("--help-all", **show, help="show all flags, in groups, and stop")

    def format_first_help(self):
        """The description, and the flags in `first` in that order, without a recipe's defaults.

        A flag that is off has no --no- here.
        """
        actions = {name: action for action in self._actions
                   for name in action.option_strings or [action.dest]}
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        formatter.start_section("the flags to begin with")
        for name in self.first:
            action = copy(actions[name])
            action.help = re.sub(r" \[([^\]]*;[^\]]*|default (True|False))\]$", "", action.help)
            if not getattr(Settings, action.dest, True):
                action.option_strings = action.option_strings[:1]
            formatter.add_argument(action)
        formatter.end_section()
        return formatter.format_help()

    def error(self, message):
        """Refuse in one line, with the nearest name if a flag or a choice is mistyped."""
        kind, _, rest = message.partition(": ")
        if kind == "unrecognized arguments" and rest.startswith("-"):
            flag = rest.split()[0].partition("=")[0]
            flags = [name for action in self._actions for name in action.option_strings]
            message += nearest(flag, flags)
        elif found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += nearest(found[1], re.findall(r"[\w.+&-]+", found[2]))
        joiner = " See" if message.endswith("?") else "; see"
        refuse(f"{message}{joiner} {self.prog} --help")


def file_to_write(text):
    """The type of a flag that names a file to write: refused at once where none can be."""
    try:
        check_target(Path(text))
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def picture_to_write(text):
    """The same for a picture that matplotlib draws. Without an ending it will be a PNG."""
    ending = Path(file_to_write(text)).suffix.lower()
    if ending not in ("", ".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp"):
        raise argparse.ArgumentTypeError(f"{text} ends in {ending}; give .png, .svg, .pdf, .jpg or "
                                         ".webp")
    return text


def check_files(arguments, *names):
    """ValueError if two of these flags name one file: it would be overwritten."""
    flags = {}
    for name in names:
        if getattr(arguments, name, None):
            other = flags.setdefault(Path(getattr(arguments, name)).resolve(), name)
            if other != name:
                raise ValueError(f"--{other} and --{name} name the same file; give two names")


class ShowHelp(argparse.Action):
    """--help and --help-all."""

    def __call__(self, parser, values, namespace, flag=None):
        short = parser.first and flag != "--help-all"
        print(parser.format_first_help() if short else parser.format_help(), end="")
        parser.exit()


def refuse(message, end=SystemExit):
    """One line that says what is wrong, exit code 2. end: the exception that ends the program."""
    print(f"error: {printable(message)}", file=sys.stderr)
    raise end(2)


@contextlib.contextmanager
def one_line(kinds=(ValueError, OSError)):
    """Bad input within is the user's to mend: its message without the traceback."""
    try:
        yield
    except kinds as error:
        refuse(" ".join(str(error).split()))


@contextlib.contextmanager
def enough_memory():
    """Running out of memory within is told in one line that names what to turn."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # PyTorch's own errors are RuntimeErrors
        text = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and (
                "can't allocate memory" not in text):
            raise
        where = "the GPU's memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        refuse(f"{where} is too small for this ({' '.join(text.split())[:120]}). What helps, in "
               "this order: --load-4bit, --checkpointing, --batch 1 with more --accumulate, "
               "--optimizer adamw8bit, a smaller --max-length, --lora-rank 16; --plan counts")
