"""A tiny checkpoint of any family, to try the whole path on a CPU."""
from __future__ import annotations

import json
import sys
from pathlib import Path

from backbones.checkpoint import load_backbone
from backbones.families import TINY


TEMPLATE = ("{% for m in messages %}{{ '<role>' + {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'}[m['role']] "
            "+ '</role>' + m['content'] + '<|role_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}")


def byte_tokenizer():
    """A tokenizer of bytes, with the special tokens and a chat template like the published one's."""
    from tokenizers import Tokenizer as Fast, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|mask|>", "<|role_end|>", "<role>", "</role>"]
    tokenizer = Fast(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0], mask_token=special[1],
                                   additional_special_tokens=special[2:])
    fast.chat_template = TEMPLATE
    return fast


def write_tiny(name, folder, seed=0, shards=2):
    """A random model of a few hundred thousand weights in the hub's layout: config, sharded safetensors, tokenizer of bytes; with
    pairs.jsonl to train on."""
    from safetensors.torch import save_file
    folder, fast = Path(folder), byte_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    ids = fast.get_added_vocab()
    raw = TINY[name] | {"mask_token_id": ids["<|mask|>"], "eos_token_id": ids["<|endoftext|>"]}
    raw |= {"pad_token_id": raw["eos_token_id"], "dtype": "float32"}
    backbone = load_backbone(raw, random=True, dtype="float32", device="cpu", seed=seed)
    weights = {k: v.contiguous() for k, v in backbone.network.state_dict().items()}
    names, where = sorted(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({k: weights[k] for k in part}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    pairs = [{"prompt": f"What is {a} plus {b}?", "response": f"{a} plus {b} is {a + b}."} for a in range(10) for b in range(6)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in TINY:
        sys.exit(f"usage: python -m backbones.tiny {{{','.join(TINY)}}} FOLDER   writes a tiny random model in the hub's layout")
    write_tiny(sys.argv[1], sys.argv[2])
    print(f"{sys.argv[2]}: a tiny {sys.argv[1]}; try: python train.py --model {sys.argv[2]} --data {sys.argv[2]}/pairs.jsonl --load-4bit")
