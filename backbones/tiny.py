"""A tiny random checkpoint of any family, to try the whole path on a CPU.

    python -m backbones.tiny llada-moe FOLDER            a tokenizer of bytes
    python -m backbones.tiny llada-moe FOLDER merging    one that merges, as published ones do

The folder looks like one from the hub: config.json, weights in shards, a tokenizer with a chat
template. It also has pairs.jsonl to train on.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

from backbones.checkpoint import hub_weights, load_backbone, write_shards
from backbones.families import FAMILIES, TINY, translate

TEMPLATE = (
    "{% for m in messages %}{{ '<role>' + "
    "{'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'}[m['role']] "
    "+ '</role>' + m['content'] + '<|role_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}")


# Turns between <|im_start|> and <|im_end|>, as Qwen's.
MERGING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

# How a ByteLevel tokenizer spells a space and a line end.
SPACE, LINE_END = "Ġ", "Ċ"
# Joined are letters, a space with the letter behind it, spaces, and line ends.
MERGES = [("t", "h"), ("th", "e"), (SPACE, "the"), (SPACE, "a"), (SPACE, "B"), (SPACE, "C"),
          ("i", "n"), ("p", "l"), (SPACE, SPACE), (LINE_END, LINE_END), ("u", "s")]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_tokenizer(mask_token="<|mask|>", merges=(), template=TEMPLATE,
                   marks=("<|role_end|>", "<role>", "</role>")):
    """A tokenizer of bytes with special tokens and a chat template, those of LLaDA-MoE's shape.

    merges: pairs of pieces that are joined. With any, the text is first split into words.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [left + right for left, right in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if merges:
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(SPLIT), "isolated"), inner.pre_tokenizer])
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        mask_token=mask_token, additional_special_tokens=list(marks))
    tokenizer.chat_template = template
    return tokenizer


def merging_tokenizer(mask_token="<|mask|>"):
    """A tokenizer that merges, whose template ends a turn with another token than a text."""
    return byte_tokenizer(mask_token, MERGES, MERGING_TEMPLATE,
                          ("<|im_start|>", "<|im_end|>", "<|end|>"))


TOKENIZERS = {"bytes": byte_tokenizer, "merging": merging_tokenizer}


def write_tiny(name, folder, seed=0, shards=2, tokenizer="bytes"):
    """Write a random model of a few hundred thousand weights into the folder.

    name: a key of TINY. tokenizer: a key of TOKENIZERS. The folder is made if it is missing. With
    the merging tokenizer three files name three ends: config.json <|end|>, the tokenizer
    <|endoftext|>, the template <|im_end|>.
    """
    mask_token = FAMILIES[translate(TINY[name]).family].mask_token
    folder, hf = Path(folder), TOKENIZERS[tokenizer](mask_token)
    folder.mkdir(parents=True, exist_ok=True)
    hf.save_pretrained(folder)
    ids = hf.get_added_vocab()
    end = ids.get("<|end|>", ids["<|endoftext|>"])
    raw = TINY[name] | {"mask_token_id": ids[mask_token], "eos_token_id": end}
    raw |= {"pad_token_id": ids["<|endoftext|>"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    backbone = load_backbone(raw, random=True, dtype="float32", device="cpu", seed=seed)
    write_shards(hub_weights(backbone.network), folder, shards)
    pairs = [{"prompt": f"What is {a} plus {b}?", "response": f"{a} plus {b} is {a + b}."}
             for a in range(10) for b in range(6)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")


def main():
    name, folder, tokenizer = [*sys.argv[1:], "bytes"][:3] if len(sys.argv) in (3, 4) else [""] * 3
    if name not in TINY or tokenizer not in TOKENIZERS:
        sys.exit(f"usage: python -m backbones.tiny {{{','.join(TINY)}}} FOLDER "
                 f"[{'|'.join(TOKENIZERS)}] writes a tiny random model in the hub's layout")
    write_tiny(name, folder, tokenizer=tokenizer)
    print(f"{folder}: a tiny {name}; try: python train.py --model {folder} "
          f"--data {folder}/pairs.jsonl --load-4bit")


if __name__ == "__main__":
    main()
