"""A tiny random checkpoint of any family, to try the whole path on a CPU.

    python -m backbones.tiny llada-moe FOLDER

The folder looks like one from the hub: config.json, weights in shards, a tokenizer of bytes with a
chat template. It also has pairs.jsonl to train on.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

from backbones.checkpoint import hub_weights, load_backbone
from backbones.families import TINY

TEMPLATE = (
    "{% for m in messages %}{{ '<role>' + "
    "{'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'}[m['role']] "
    "+ '</role>' + m['content'] + '<|role_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}")


def byte_tokenizer():
    """A tokenizer of bytes with the special tokens and a chat template like LLaDA-MoE's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        mask_token="<|mask|>", additional_special_tokens=["<|role_end|>", "<role>", "</role>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_tiny(name, folder, seed=0, shards=2):
    """Write a random model of a few hundred thousand weights into the folder.

    name: a key of TINY. The folder is made if it is missing.
    """
    folder, tokenizer = Path(folder), byte_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    ids = tokenizer.get_added_vocab()
    raw = TINY[name] | {"mask_token_id": ids["<|mask|>"], "eos_token_id": ids["<|endoftext|>"]}
    raw |= {"pad_token_id": raw["eos_token_id"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    backbone = load_backbone(raw, random=True, dtype="float32", device="cpu", seed=seed)
    write_shards(hub_weights(backbone.network), folder, shards)
    pairs = [{"prompt": f"What is {a} plus {b}?", "response": f"{a} plus {b} is {a + b}."}
             for a in range(10) for b in range(6)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")


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


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in TINY:
        sys.exit(f"usage: python -m backbones.tiny {{{','.join(TINY)}}} FOLDER "
                 "writes a tiny random model in the hub's layout")
    name, folder = sys.argv[1:]
    write_tiny(name, folder)
    print(f"{folder}: a tiny {name}; try: python train.py --model {folder} "
          f"--data {folder}/pairs.jsonl --load-4bit")


if __name__ == "__main__":
    main()
