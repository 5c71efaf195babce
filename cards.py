"""Cards: the README.md beside an adapter or a checkpoint, as the hub shows it.

A card says what the weights are, where they come from, what was measured and how to load them. The
licence is the user's to choose. Names and settings may come from anywhere. So only ids of the hub
stand in the head of a card, which is YAML; elsewhere they stand in code, where nothing is markup.
"""
from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from backbones import smollm2
from console import printable
from files import HUB_ID, write_text
from runs import read_metrics, read_origin
from settings import Settings, command_of, flags_between, names_of

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what --model smollm2 is on the hub
TAGS = ["memdlm", "diffusion-language-model", "masked-diffusion"]


# ---- Text ---------------------------------------------------------------------------------------

def code(text):
    """A text from anywhere as a piece of code within a line, or a table, of Markdown."""
    text = " ".join(printable(text).split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text or not text else ""
    return fence + space + text + space + fence


def code_block(kind, text):
    """Lines of code as a block of Markdown."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{kind}\n{printable(text)}\n{fence}"


def command_block(words):
    """A command as a block, on one line."""
    return code_block("bash", " ".join(shlex.join(words).split("\n")))


def on_hub(name):
    """A name if it is an id of the hub, and no folder or file here; else None."""
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def head_of(fields):
    """The head of a card. fields: {name: an id of the hub, or a list of them}."""
    lines = []
    for name, value in fields.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {each}" for each in value)]
        else:
            lines.append(f"{name}: {value}")
    return "\n".join(["---", *lines, "---"])


# ---- What a run was -----------------------------------------------------------------------------

def base_of(s):
    """The id of the base model on the hub, or None if it is a folder here."""
    return SMOLLM2 if smollm2.is_meant(s.model) else on_hub(s.model)


def head_fields(s, folder, kind):
    """What the head of a card says. folder: of the run. kind: more fields, {name: value}."""
    base, here = base_of(s), Path(s.data).exists() or had_file(folder)
    data = on_hub("/".join(s.data.partition(":")[0].split("/")[:2]))  # id/subset:split
    return ({"base_model": base} if base else {}) | kind | (
        {"datasets": [data]} if data and not here else {})


def had_file(folder):
    """Was a run started with data in a file or a folder, which may be gone by now?"""
    try:
        return "data" in read_origin(folder)
    except ValueError:  # it is damaged: nobody knows
        return True


def describe_run(s, folder, step, processes):
    """The part of a card that both kinds have: what was trained on what, and what came out."""
    method = (f"MemDLM, arXiv 2603.22241, phi written from the {s.memory_from}" if s.memory
              else "plain masked diffusion (MDLM), without memory")
    rows = [("base model", code(s.model)), ("data", code(s.data)),
            ("method", method),
            ("steps", f"{step} of {s.steps}, {s.batch * s.accumulate * processes} samples each"),
            ("seed", s.seed), *measured(s, folder), ("versions", versions(s))]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    command = ["python", "train.py", *command_of(s)]
    if processes > 1:
        command[:1] = ["accelerate", "launch", "--num_processes", str(processes)]
    settings = json.dumps(asdict(s), indent=1)
    return [table, caution(s), "## How it was trained", command_block(command),
            "All settings:", code_block("json", settings)]


def measured(s, folder):
    """Rows of a card with the losses of a run, as far as they were measured."""
    lines, _ = read_metrics(folder)
    held_out = [line for line in lines if "held_out_ce" in line]
    if not held_out:
        return [("held-out loss", "not measured (`--eval-every` does)")]
    last = held_out[-1]
    what = f"nats per masked token, {s.eval_samples} samples, after step {last['step'] + 1}"
    names = {"held_out_ce": "with phi" if s.memory else "", "held_out_ce_without": "without phi"}
    return [(f"held-out loss {name}".strip(), f"{last[key]:.4f} ({what})")
            for key, name in names.items() if key in last]


def caution(s):
    """What a reader must know before comparing the losses, or nothing."""
    if not s.memory or s.memory_from != "response":
        return ""
    return ("The loss with phi compares with nothing: phi is written from the very answers that "
            "are then predicted. Compare the loss without phi.")


def versions(s):
    """The versions of the packages that a run used."""
    names = ["torch", "transformers", "safetensors"]
    names += ["peft"] * s.lora + ["bitsandbytes"] * (s.load_4bit or "8bit" in s.optimizer)
    found = [f"Python {sys.version.split()[0]}"]
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


LICENCE = ("## Licence\n\nNone is stated here: whoever publishes these weights chooses one, within "
           "what the licences of the base model and of the data allow.")


# ---- The two kinds ------------------------------------------------------------------------------

def write_adapter_card(s, folder, step, processes=1):
    """Write the card of a run's adapter, beside the adapter."""
    head = head_of(head_fields(s, folder, {"library_name": "peft", "tags": ["lora", *TAGS]}))
    if s.merge:
        how = [f"It stands on {code(s.model)} with the adapter {code(s.from_adapter)} merged, "
               "and loads only together with that. Its run folder answers:",
               command_block(["python", "generate.py", "--run", "RUN", "--prompt", "..."])]
    else:
        how = load_adapter_text(s)
    parts = [head, "# A LoRA trained with MemDLM",
             "A LoRA for a masked diffusion language model. phi, the fast weights, is no part of "
             "it: phi is written anew for each prompt.",
             *describe_run(s, folder, step, processes), "## How to load it", *how, LICENCE]
    write_text(folder / "adapter" / "README.md", "\n\n".join(filter(None, parts)) + "\n")


def load_adapter_text(s):
    """How an adapter is loaded: with our command, and with PEFT."""
    known = flags_between(Settings(model=s.model), s, [*names_of("inner loop"), "shift",
                                                      "attention", "load_4bit"])
    words = ["python", "generate.py", "--model", s.model, "--from-adapter", "ADAPTER", *known]
    if s.memory:
        words.append("--adapt")
    name = json.dumps(base_of(s) or s.model)
    snippet = ("from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
               f"base = AutoModelForCausalLM.from_pretrained({name})\n"
               'model = PeftModel.from_pretrained(base, "ADAPTER")')
    sight = smollm2.is_meant(s.model) or s.shift or s.attention != "auto"
    return ["ADAPTER is this folder, or its id on the hub.",
            command_block([*words, "--prompt", "..."]),
            "With PEFT, on the base as the transformers library loads it. Take the class that the "
            "base's own card names, with the head for tokens. If the base brings code of its own, "
            "the library asks for trust_remote_code=True: read that code first.",
            code_block("python", snippet),
            "There the base looks left only, if it was trained so. With the command above it "
            "computes what it did in training." if sight else ""]


def write_model_card(s, run, folder, step, processes=1):
    """Write the card of a checkpoint that export.py wrote from a run."""
    kind = {"base_model_relation": "finetune"} if base_of(s) else {}
    head = head_of(head_fields(s, run, {**kind, "tags": TAGS}))
    what = "with a trained LoRA merged into them" if s.lora else "trained further"
    parts = [head, "# A masked diffusion language model trained with MemDLM",
             f"The weights of {code(s.model)}, {what}. phi, "
             "the fast weights, is no part of them: it is written anew for each prompt.",
             *describe_run(s, run, step, processes), "## How to load it",
             "MODEL is this folder, or its id on the hub. The folder brings no code of its own.",
             command_block(["python", "generate.py", "--model", "MODEL", "--prompt", "..."]),
             LICENCE]
    write_text(folder / "README.md", "\n\n".join(filter(None, parts)) + "\n")
