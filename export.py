"""Write a trained run of a real model as a checkpoint, in the layout of the hub.

    python export.py RUN FOLDER
    python generate.py --model FOLDER --prompt "..."
    python train.py --model FOLDER                       train on, now with memory

A LoRA is merged into the weights. The folder has config.json, the weights in safetensors, the
tokenizer with its chat template, and a README.md that says what was trained and measured. A model
that was trained left to right becomes one of type a2d-... there, with its mask, where its tokens
look, and whether its logits are shifted.
"""
from __future__ import annotations

if __name__ == "__main__":  # first of all: a Ctrl-C may come while torch is imported
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback, until `begin` takes it
    import console
    console.begin()

import contextlib
import math
import shutil
from pathlib import Path

from backbones.checkpoint import hub_weights, load_backbone, write_shards
from backbones.families import read_raw
from cards import write_model_card
from console import say
from files import check_target, write_json
from runs import open_run, read_checkpoint, read_settings
from settings import Parser, enough_memory, one_line

SHARD = 4 << 30  # bytes in a file of weights, about


def export(run, folder):
    """Write the model of a run into a new folder. Returns the model.

    ValueError if that cannot be done.
    """
    s, folder = read_settings(run), Path(folder)
    check_target(folder / "config.json")
    if s.model == "toy":
        raise ValueError("export.py is for real models; a toy's run folder is all there is of it")
    if s.merge:
        raise ValueError(f"{run} trained a LoRA on weights with another one merged; export the "
                         "run of that one first, and train on it")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder")
    if s.lora:
        backbone = load_backbone(s.model, dtype=s.dtype, device="cpu", attention=s.attention,
                                 shift=s.shift, merge=str(Path(run) / "adapter"))
    else:
        _, _, model = open_run(run, with_data=False, device="cpu")
        backbone = model.backbone
    weights = {name: weight.detach() for name, weight in hub_weights(backbone.network).items()}
    name_mask(backbone.tokenizer.hf, backbone.mask_id)
    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    stored = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    _, state = read_checkpoint(Path(run) / "model.safetensors")
    with whole_or_nothing(folder):
        backbone.tokenizer.hf.save_pretrained(folder)
        write_shards(weights, folder, math.ceil(size / SHARD))
        write_model_card(s, Path(run), folder, state["step"], state["processes"])
        # config.json comes last: with it the folder is a model.
        write_json(folder / "config.json", describe(backbone.config, read_raw(s.model)[0], stored),
                   indent=2)
    return backbone


@contextlib.contextmanager
def whole_or_nothing(folder):
    """A folder to write into, new or empty. If that fails it goes again. OSError says why."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ValueError) or not isinstance(error, Exception):
            raise
        # For a full disk the libraries of tokenizers and tensors have errors of their own.
        raise OSError(f"{folder} could not be written: {error}") from None


def name_mask(hf, mask):
    """Let a tokenizer of the transformers library know the mask, for programs that ask it.

    A new token gets the number behind all others. Only if that is the mask's, it is its name.
    """
    if hf.mask_token is None:
        name = hf.convert_ids_to_tokens(mask) if mask < len(hf) else "<|mask|>"
        if name is not None and mask <= len(hf):
            hf.add_special_tokens({"mask_token": name})


def describe(config, raw, stored):
    """config.json of the new checkpoint. raw: that of the model it was made from."""
    # The classes and the code are those of the old model.
    old = ("architectures", "auto_map", "torch_dtype", "attention", "shift")
    raw = {key: value for key, value in raw.items() if key not in old}
    raw |= {"dtype": stored, "mask_token_id": config.mask_id, "eos_token_id": [*config.eos_ids]}
    if config.family.startswith("a2d-"):
        raw |= {"model_type": config.family, "vocab_size": config.vocab_size,
                "tie_word_embeddings": config.tied}
        raw |= {"attention": config.attention} if config.attention != "full" else {}
        raw |= {"shift": True} if config.shift else {}
    return raw


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("run", help="the folder of a run")
    parser.add_argument("folder", help="the folder to write, which is new")
    arguments = parser.parse_args()
    with one_line(), enough_memory():
        backbone = export(arguments.run, arguments.folder)
        say(f"{arguments.folder}: {backbone.title}; try: python generate.py "
            f'--model {arguments.folder} --prompt "..."')


if __name__ == "__main__":
    main()
