"""runs.py and settings.py: what a flag says reaches the model, the data, and the folder."""
import json
import os
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer

import runs
from backbones.checkpoint import load_backbone
from backbones.experts import Stack
from backbones.lora import add_lora, lora_weights, save_adapter
from backbones.text import ChatData, chat_turns
from runs import (
    build, find_origin, latest_run, open_model, open_run, read_settings, save_checkpoint,
    write_settings,
)
from settings import Settings, control_settings, settings_from_flags


# ---- Flags -> settings --------------------------------------------------------------------------

def test_defaults_of_a_run_are_the_papers():
    """The experiments of the paper, and the published script where the paper is silent."""
    s = settings_from_flags({"model": "x"})
    assert (s.lr, s.warmup, s.weight_decay, s.grad_clip) == (2e-5, 0.1, 0.0, 1.0)
    assert (s.lora, s.lora_rank, s.lora_alpha, s.lora_dropout) == (True, 32, 64.0, 0.05)
    assert (s.lora_scope, s.optimizer, s.attention) == ("all", "adamw", "auto")  # auto: full
    assert (s.epochs, s.batch * s.accumulate, s.max_length) == (5.0, 32, 4096)
    assert (s.data, s.skip_bad, s.truncate, s.eos_loss) == (
        "Yukang/LongAlpaca-12k", True, False, False)
    assert (s.seed, s.split_seed, s.memory, s.control) == (0, 42, True, False)


def test_a_flag_comes_before_a_recipe_and_a_recipe_before_a_default():
    for given, want in (
            ({}, dict(memory_from="prompt", inner_lr=0.3, trajectory="cover:4", closed_book=True,
                      lr=3e-3, steps=1000)),
            ({"inner_lr": 0.7, "lr": 0.5, "trajectory": "consistent"},
             dict(inner_lr=0.7, lr=0.5, trajectory="consistent", steps=1000)),
            ({"memory": False}, dict(closed_book=False, memory=False)),
            ({"memory_from": "response"}, dict(closed_book=False, inner_lr=0.003,
                                               trajectory="consistent")),
            ({"closed_book": False}, dict(closed_book=False, inner_lr=0.3)),
            ({"data": "languages"}, dict(closed_book=False, inner_lr=0.003, steps=350)),
            ({"data": "my.jsonl"}, dict(closed_book=False, batch=16, steps=1000)),
            ({"model": "x", "steps": 7}, dict(steps=7, epochs=0.0)),
            ({"model": "x", "steps": 7, "epochs": 2.0}, dict(epochs=2.0))):
        s = settings_from_flags(given)
        assert {name: getattr(s, name) for name in want} == want, given


def test_a_control_differs_in_its_memory_alone():
    s = settings_from_flags({"seed": 3, "inner_lr": 0.7})
    control = control_settings(s)
    assert (control.memory, control.closed_book) == (False, False)
    assert s.memory and s.closed_book
    assert replace(control, memory=True, closed_book=True) == s


# ---- Settings -> model --------------------------------------------------------------------------

@pytest.fixture
def real(tiny_models, tmp_path):
    """Settings of a run of a tiny real model that are no defaults."""
    lines = [{"prompt": f"p{i}", "response": "r" * (i + 1)} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Settings(
        model=str(tiny_models / "llada-moe"), data=str(tmp_path / "pairs.jsonl"), max_length=60,
        truncate=True, split_seed=7, seed=3, lora_rank=8, lora_alpha=6.0, lora_dropout=0.25,
        lora_scope="attention", lora_dtype="bfloat16", rank=8)


def build_quietly(s):
    return build(s, say=lambda text: None)


def test_every_setting_of_a_real_model_reaches_it(real):
    data, model = build_quietly(real)
    assert data.note.startswith(f"{real.data}: 40 samples kept")
    few = build_quietly(replace(real, max_records=30, turns="all"))[0]
    assert few.note.startswith(f"the first 30 records of {real.data} (--max-records): 30 samples")
    assert few.turns == "all" and data.turns == "last"
    backbone = model.backbone
    lora = [m for m in backbone.modules() if isinstance(m, LoraLayer)]
    assert {m.scaling["default"] for m in lora} == {0.75}
    assert {m.lora_dropout["default"].p for m in lora} == {0.25}
    weights = lora_weights(backbone)
    assert {p.dtype for p in weights.values()} == {torch.bfloat16}
    assert {key.rpartition(".lora_")[0].rpartition(".")[2] for key in weights} == {
        "q_proj", "k_proj", "v_proj", "o_proj"}
    assert backbone.checkpointing
    assert not build_quietly(replace(real, checkpointing=False))[1].backbone.checkpointing

    plain = load_backbone(real.model)
    seeded = lora_weights(add_lora(plain, 8, 6.0, 0.25, "attention", dtype="bfloat16", seed=3))
    assert all(torch.equal(weights[key], seeded[key]) for key in seeded)
    records = [chat_turns(json.loads(line)) for line in open(real.data)]
    same = ChatData(plain, records, 60, True, 7, seed=3)
    assert data.pairs == same.pairs and data.train(None, 0, 0) == same.train(None, 0, 0)
    lengths = [len(s.prompt) + len(s.rest) for part in data.pairs.values() for s in part]
    assert len(lengths) == 40 and max(lengths) == 60  # some were cut


def test_an_adapter_to_start_from_gets_the_runs_dropout(real, tmp_path):
    save_adapter(add_lora(load_backbone(real.model), 4, 8.0, 0.0), tmp_path / "adapter")
    s = replace(real, from_adapter=str(tmp_path / "adapter"))
    modules = [*build_quietly(s)[1].modules()]
    lora = [m for m in modules if isinstance(m, LoraLayer)]
    stacks = [m for m in modules if isinstance(m, Stack)]
    assert {m.lora_dropout["default"].p for m in lora} == {m.dropout for m in stacks} == {0.25}
    # alpha and rank are the adapter's.
    assert {m.scaling["default"] for m in lora} == {m.scaling for m in stacks} == {2.0}


def test_a_run_is_opened_without_dropout_and_without_gradients(real, tmp_path):
    _, model = build_quietly(real)
    folder = tmp_path / "run"
    write_settings(real, folder)
    for p in lora_weights(model.backbone).values():
        p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(p.numel()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    save_checkpoint(folder, model, optimizer, 1)
    s, _, opened = open_run(folder, with_data=False, inner_lr=0.7)
    assert s == replace(real, inner_lr=0.7) == opened.s
    assert not any(module.training for module in opened.modules())
    assert not any(p.requires_grad for p in opened.parameters())
    saved, read = lora_weights(model.backbone), lora_weights(opened.backbone)
    assert all(torch.equal(saved[key], read[key]) for key in saved)


def test_a_model_without_a_run_takes_the_flags_of_the_inner_loop(real):
    s, _, model = open_model(None, real.model, {"inner_lr": 0.7, "trajectory": "cover:3"})
    assert (s.inner_lr, s.trajectory, s.lora) == (0.7, "cover:3", False) and model.s == s
    assert not any(module.training for module in model.modules())


# ---- Folders ------------------------------------------------------------------------------------

def test_the_latest_run_is_the_one_that_was_started_last(tmp_path):
    for age, name in ((30, "b"), (10, "c"), (20, "a")):
        write_settings(Settings(), tmp_path / name)
        for path in (*(tmp_path / name).iterdir(), tmp_path / name):
            os.utime(path, (10 ** 9 - age, 10 ** 9 - age))
    assert latest_run(tmp_path) == tmp_path / "c"


def test_origin_names_all_code_that_makes_the_numbers_and_stays_as_it_was(tmp_path, monkeypatch):
    toy, real = find_origin(Settings()), find_origin(Settings(model="x"))
    shared = {"torch", "memdlm.py", "data.py", "train.py"}
    assert {"toy/model.py", "toy/tasks.py", "toy/data.py", "toy/tokenizer.py"} | shared <= set(toy)
    assert {"backbones/blocks.py", "backbones/experts.py", "backbones/lora.py",
            "backbones/text.py"} | shared <= set(real)
    write_settings(Settings(), tmp_path / "run")
    before = (tmp_path / "run/origin.json").read_text()
    monkeypatch.setattr(runs, "find_origin", lambda s: {"torch": "9.9"})
    write_settings(Settings(), tmp_path / "run")  # as a resumed run does, with --anyway
    assert (tmp_path / "run/origin.json").read_text() == before


def test_a_run_of_the_time_when_experts_could_be_chosen_opens(tmp_path):
    write_settings(Settings(steps=7), tmp_path)
    path = tmp_path / "settings.json"
    for old in ("loop", "grouped"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"experts": old}))
        assert read_settings(tmp_path).steps == 7


def test_data_in_a_folder_are_noticed_when_they_change(tmp_path, monkeypatch):
    """By a byte at either end of a file, by its size or by its name; not by a new cache."""
    data, file = tmp_path / "saved", tmp_path / "saved/train/data-0.arrow"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"a" * 100 + b"b" * (3 << 20) + b"c")
    s = Settings(data=str(data))
    write_settings(s, tmp_path / "run")
    runs.check_origin(tmp_path / "run", s)
    (file.parent / "cache-1234.arrow").write_bytes(b"x")
    runs.check_origin(tmp_path / "run", s)
    whole = file.read_bytes()
    for changed in (b"A" + whole[1:], whole[:-1] + b"C", whole[:100] + b"b" + whole[100:],
                    whole[:2 << 20] + b"b" + whole[2 << 20:]):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="started with another data .*, now "):
            runs.check_origin(tmp_path / "run", s)
    file.write_bytes(whole)
    runs.check_origin(tmp_path / "run", s)
    file.rename(file.with_name("data-1.arrow"))
    with pytest.raises(ValueError, match="started with another data"):
        runs.check_origin(tmp_path / "run", s)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dictionary").mkdir()  # not what this toy is trained on
    assert "data" not in find_origin(Settings())
