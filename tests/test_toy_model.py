"""The tiny transformer against loops over positions and heads, and its initial weights."""
import json
import math

import pytest
import torch

import memdlm
from compare import list_rows, measure
from runs import (
    TRAINED_TOY, build, open_model, open_run, read_checkpoint, read_settings, save_checkpoint,
    write_settings,
)
from settings import Settings, settings_from_flags
from toy.model import ToyConfig, ToyDLM


def plain_forward(model, ids):
    """Logits [n][V] of one sample: float64, one position, head and channel at a time."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    heads, width = model.config.heads, model.config.width
    size = width // heads

    def norm(x, name):
        return x / (x.square().mean() + 1e-6).sqrt() * w[name]

    def shifted(rows):
        """The left half of the channels comes from the token to the left; the first has none."""
        half = width // 2
        before = [torch.zeros(width).double(), *rows[:-1]]
        return [torch.cat([b[:half], x[half:]]) for b, x in zip(before, rows)]

    def turn(x, position):
        out = x.clone()
        for i in range(size // 2):
            angle = position * 10000.0 ** (-2 * i / size)
            a, b = x[i], x[i + size // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    h = [w["embedding.weight"][i] for i in ids]
    for layer in range(model.num_layers):
        at = f"layers.{layer}."
        x, out = shifted([norm(row, at + "norm1.weight") for row in h]), []
        q, k, v = ([w[f"{at}attn.{name}_proj.weight"] @ row for row in x] for name in "qkv")
        for i in range(len(h)):
            parts = []
            for head in range(heads):
                own = slice(head * size, (head + 1) * size)
                scores = torch.stack([turn(q[i][own], i) @ turn(k[j][own], j) / size ** 0.5
                                      for j in range(len(h))])
                parts.append(sum(p * v[j][own] for j, p in enumerate(scores.softmax(0))))
            out.append(w[at + "attn.o_proj.weight"] @ torch.cat(parts))
        h = [row + more for row, more in zip(h, out)]
        x = shifted([norm(row, at + "norm2.weight") for row in h])
        gate, up, down = (w[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        h = [row + down @ ((gate @ y) * (gate @ y).sigmoid() * (up @ y)) for row, y in zip(h, x)]
    return torch.stack([w["lm_head.weight"] @ norm(row, "norm.weight") for row in h])


def test_the_forward_pass_against_loops():
    model = ToyDLM(ToyConfig(20, 1, width=16, layers=2, heads=2))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():  # no number is alike, not even in the norms
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    ids = torch.tensor([[3, 7, 3, 19, 4, 0, 0]])
    valid = torch.tensor([[True] * 5 + [False] * 2])
    logits = model.head(model.blocks(model.embed(ids), valid, 0, None))[0, :5]
    want = plain_forward(model, [3, 7, 3, 19, 4])
    torch.testing.assert_close(logits.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("phi_of", ["nothing", "all", "each"])
def test_what_is_read_is_as_if_everything_were_computed(phi_of):
    """The last feed-forward runs where it is read: values and all gradients are the same."""
    model = ToyDLM(ToyConfig(30, 1, width=16, layers=2, heads=2))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 30, (3, 9), generator=generator)
    valid = torch.arange(9) < torch.tensor([[9], [6], [7]])
    need = valid & (torch.rand(3, 9, generator=generator) < 0.4)
    need[1] = False
    need[2, 3:] = False
    assert need.sum(1).tolist() == [4, 0, 1]
    s = Settings(rank=3, alpha=6.0)
    seeds = {"nothing": [], "all": ["a"], "each": ["a", "b", "c"]}[phi_of]
    phi = memdlm.fresh_phi(model, s, seeds) if seeds else {}
    phi = {name: tuple((w + 0.1).requires_grad_() for w in pair) for name, pair in phi.items()}
    leaves = [*model.parameters(), *(w for pair in phi.values() for w in pair)]
    seen, out = [], []
    model.layers[-1].mlp.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[:2]))
    for rows in (None, need):
        h = memdlm.lower_layers(model, s, ids, valid)
        h = memdlm.upper_layers(model, s, h, valid, phi, rows)[need]
        out.append([h, *torch.autograd.grad(model.head(h).square().sum(), leaves)])
    assert seen == [(3, 9), (3, 4)]
    for all_, few in zip(*out):
        torch.testing.assert_close(few, all_, rtol=1e-4, atol=1e-5)


def test_initial_weights_come_from_the_seed_alone():
    config = ToyConfig(50, 1, width=64, layers=2, heads=4)
    torch.manual_seed(1)
    one = ToyDLM(config, 3).state_dict()
    torch.manual_seed(2)
    same, other = ToyDLM(config, 3).state_dict(), ToyDLM(config, 4).state_dict()
    for name, w in one.items():
        assert torch.equal(w, same[name])
        assert torch.equal(w, other[name]) == (w.dim() == 1), name


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_initial_weights_have_the_spread_of_gpt_2(layers):
    """1 / sqrt(in), the embedding .02; what writes into the residual: less by sqrt(2 layers)."""
    model = ToyDLM(ToyConfig(200, 1, width=64, layers=layers, heads=4))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
            continue
        std = 0.02 if name == "embedding.weight" else p.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * layers) ** 0.5
        assert float(p.detach().std()) == pytest.approx(std, rel=0.05), name


# ---- The toy that comes along -------------------------------------------------------------------

def test_the_trained_toy_has_its_numbers():
    """It is measured as in the table of evaluate.py. Another CPU may round a few answers away."""
    numbers = json.loads((TRAINED_TOY / "numbers.json").read_text())
    wanted = numbers["share of answers right"]
    s, data, model = open_run(TRAINED_TOY)
    assert sum(file.stat().st_size for file in TRAINED_TOY.iterdir()) < 350_000
    for row in list_rows(s):
        batch = data.tests("32 x2", range(numbers["samples per cell"]), s.closed_book)
        share = measure(model, row.s, row.source, batch, data.metric).mean().item()
        assert share == pytest.approx(wanted[row.label]["32 x2"], abs=0.02), row.label
    assert wanted["its prompt, cover:4, eta 0.3"]["32 x2"] > 0.8
    assert wanted["another prompt, cover:4, eta 0.3"]["32 x2"] < 0.06


def test_the_trained_toy_was_trained_as_a_run_of_today_is():
    """The settings of `python train.py` are those that it has; else make it again."""
    s = read_settings(TRAINED_TOY)
    assert s == settings_from_flags({"model": "toy", "control": False, "table_samples": 0})
    tensors, state = read_checkpoint(TRAINED_TOY / "model.safetensors")
    assert state["step"] == s.steps and not [name for name in tensors if "adamw" in name]


def test_without_a_run_the_trained_toy_answers(tmp_path, monkeypatch, capsys):
    """And with one the latest run does."""
    monkeypatch.chdir(tmp_path)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    s, _, _ = open_model(None, None, {"rank": 16})
    assert threads == [1]  # it is too small to share
    assert s.rank == 16 and s.steps == 1000
    assert "comes with the repository" in capsys.readouterr().out
    own = Settings(steps=7, width=16, layers=1, heads=2)
    _, model = build(own)
    write_settings(own, tmp_path / "runs" / "own")
    save_checkpoint(tmp_path / "runs" / "own", model, torch.optim.AdamW(model.parameters()), 7)
    s, _, _ = open_model(None, None, {"threads": 3})
    assert threads == [1, 1, 3]  # of `build` above, and what was asked for
    assert s.steps == 7 and not capsys.readouterr().out
