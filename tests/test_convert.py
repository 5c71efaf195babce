"""From left to right to diffusion: where tokens look, the mask, and the checkpoint of it."""
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import export
import memdlm
import train
from backbones.checkpoint import hub_weights, load_backbone, write_shards
from backbones.convert import choose_sight
from backbones.families import PUBLISHED, TINY, translate
from backbones.tiny import MERGING_TEMPLATE, byte_tokenizer, write_tiny
from compare import write_phi
from data import Sample, collate
from runs import build, open_run
from settings import Settings
from test_cli import refused
from tiny_models import all_logits, edit_json, library_model, tiny_backbone, to_library

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"llama": "smollm2", "qwen2": "qwen2.5-coder-0.5b", "qwen3": "qwen3-0.6b"}


def batch_of(*lengths, closed_book=False, seed=0):
    """Samples of random tokens. lengths: (of the prompt, of the response) of each."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(1, 256, (n,), generator=generator).tolist()
    samples = [Sample(tokens(a), tokens(b), [True] * b) for a, b in lengths]
    return collate(samples, list(range(len(samples))), closed_book)


# ---- A prompt that looks left, a response that looks both ways ----------------------------------

def test_prompts_look_left_and_responses_both_ways():
    """Change one token at a time, and see which others notice."""
    backbone, batch = tiny_backbone("smollm2", attention="causal-prompt"), batch_of((3, 4))
    before = all_logits(backbone, batch.x0, batch.valid)[0]
    for i in range(7):
        x = batch.x0.clone()
        x[0, i] = 256 + i
        differs = (all_logits(backbone, x, batch.valid)[0] - before).abs().amax(1) > 1e-6
        # A token of the prompt notices what stands at it or before it, the response everything.
        assert differs.tolist() == [i <= j or j >= 3 for j in range(7)], i


@pytest.mark.parametrize("name", ["smollm2", "qwen3-0.6b", "dream-7b"])
def test_the_library_computes_the_same_under_this_mask(name):
    ours, theirs = tiny_backbone(name, attention="causal-prompt"), library_model(name)
    theirs.load_state_dict(to_library(name, hub_weights(ours.network), theirs.state_dict()),
                           strict=False)
    batch = batch_of((4, 5))
    seen = torch.tensor([[j <= i or i >= 4 for j in range(9)] for i in range(9)])
    mask = torch.zeros(9, 9).masked_fill(~seen, -1e30)[None, None]
    expected = theirs(batch.x0, attention_mask=mask).logits
    if ours.config.shift:
        expected = torch.cat([expected[:, :1], expected[:, :-1]], dim=1)
    torch.testing.assert_close(all_logits(ours, batch.x0, batch.valid), expected, atol=1e-4,
                               rtol=1e-4)


def test_a_batch_of_several_prompts_equals_its_samples():
    backbone = tiny_backbone("smollm2", attention="causal-prompt")
    lengths = [(2, 6), (5, 2), (0, 4)]
    batch = batch_of(*lengths)
    whole = all_logits(backbone, batch.x0, batch.valid)
    for b, (prompt, response) in enumerate(lengths):
        n = prompt + response
        sample = Sample(batch.x0[b, :prompt].tolist(), batch.x0[b, prompt:n].tolist(),
                        [True] * response)
        alone = collate([sample], [0], False)
        torch.testing.assert_close(whole[b:b + 1, :n], all_logits(backbone, alone.x0, alone.valid))


def test_only_a_prompt_is_causal_and_only_a_response_looks_both_ways():
    ours, causal, full = (tiny_backbone("smollm2", attention=attention)
                          for attention in ("causal-prompt", "causal", "full"))
    batch = batch_of((6, 3))
    assert torch.equal(all_logits(ours, batch.prompt, batch.prompt_valid),
                       all_logits(causal, batch.prompt, batch.prompt_valid))
    closed = batch_of((6, 3), closed_book=True)
    assert torch.equal(all_logits(ours, closed.x0, closed.valid),
                       all_logits(full, closed.x0, closed.valid))


def test_adapting_writes_the_phi_of_a_causal_model():
    """The prompt is all there is then."""
    batch, s = batch_of((9, 3), (5, 4)), Settings(model="x", rank=4, alpha=8)
    phis = [memdlm.adapt(tiny_backbone("smollm2", attention=attention), s, batch.prompt,
                         batch.prompt_valid, batch.seeds)[0]
            for attention in ("causal-prompt", "causal", "full")]
    for name, pair in phis[0].items():
        torch.testing.assert_close(pair, phis[1][name])
        assert not torch.allclose(pair[1], phis[2][name][1])


@pytest.mark.parametrize("changes", [
    dict(memory=False), dict(memory_from="response"), dict(memory_from="prompt"),
    dict(memory_from="prompt", closed_book=True), dict(memory=False, eos_loss=True)])
def test_training_and_decoding_know_where_the_response_begins(tiny_models, changes):
    """In every kind of training, in its held-out loss and its samples, nothing is refused."""
    folder = tiny_models / "smollm2"
    s = Settings(model=str(folder), data=str(folder / "pairs.jsonl"), attention="causal-prompt",
                 lora_rank=4, rank=4, alpha=8.0, device="cpu", batch=2, eval_samples=2, **changes)
    data, model = build(s)
    batch = train.make_batch(s, data, 0)
    loss, _ = model(batch)
    loss.backward()
    assert loss.isfinite() and batch.valid.response_at.tolist() == (
        [0, 0] if s.closed_book else batch.prompt_valid.sum(1).tolist())
    train.measure_held_out(s, data, model)
    train.describe_sample(s, data, model, 1)
    test = data.tests("held out", [0, 1], s.closed_book)
    write_phi(model, s, "another", test)
    *_, canvas = model.backbone.decoder(model.backbone, s, test.x0, test.maskable, test.valid,
                                        test.seeds)
    assert not (canvas == model.backbone.mask_id)[test.valid].any()


@pytest.mark.slow
def test_likelihoods_and_answers_of_tasks_know_it_too(tiny_models):
    """Draws scored together equal draws scored alone. The row of a score says how tokens look."""
    from paper.harness import make_harness_class
    options = dict(model=str(tiny_models / "smollm2"), attention="causal-prompt", adapt=True,
                   mc_samples=4, rank=4, alpha=8.0, device="cpu")
    together, alone = (make_harness_class()(batch_size=size, **options) for size in (4, 1))
    a, b = (harness.score([65, 66, 67], [68, 69], "name") for harness in (together, alone))
    assert a[0] == pytest.approx(b[0], rel=1e-5) and a[1] == b[1]
    assert together.describe_method()["options"]["attention"] == "causal-prompt"
    full = make_harness_class()(batch_size=4, **options | {"attention": "full"})
    assert full.score([65, 66, 67], [68, 69], "name")[0] != pytest.approx(a[0], rel=1e-5)
    assert "attention" not in full.describe_method()["options"]


def test_what_causal_prompt_cannot_do_is_refused():
    backbone, batch = tiny_backbone("smollm2", attention="causal-prompt"), batch_of((3, 4))
    with pytest.raises(ValueError, match="where the response begins"):
        all_logits(backbone, batch.x0, batch.valid.clone())
    for name in ("sdar-1.7b", "llada2.1-mini"):
        with pytest.raises(ValueError, match="--attention causal-prompt is for models that see"):
            tiny_backbone(name, attention="causal-prompt")
        with pytest.raises(ValueError, match="--shift is for models that see the whole text"):
            tiny_backbone(name, shift=True)
    with pytest.raises(ValueError, match="--shift is for real models"):
        Settings(shift=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_look_everywhere_unless_told_otherwise(name):
    config = translate(PUBLISHED[name])
    assert choose_sight(config, "auto", False).attention == "full"
    left = replace(config, attention="causal:2")
    assert choose_sight(left, "auto", False).attention == "causal:2"
    assert choose_sight(left, "full", False).attention == "full"


def test_shift_predicts_a_token_from_the_place_before_it():
    plain, shifted = tiny_backbone("smollm2"), tiny_backbone("smollm2", shift=True)
    batch = batch_of((3, 4))
    a, b = (all_logits(backbone, batch.x0, batch.valid) for backbone in (plain, shifted))
    assert torch.equal(b[:, 1:], a[:, :-1]) and torch.equal(b[:, 0], a[:, 0])


# ---- A model without a mask ---------------------------------------------------------------------

def write_left_to_right(kind, folder, spare, tied=True):
    """A tiny model that says what comes next. spare: rows of its embedding that no token has."""
    hf = byte_tokenizer(None, template=MERGING_TEMPLATE, marks=("<|im_start|>", "<|im_end|>"))
    raw = TINY[KINDS[kind]] | {
        "vocab_size": len(hf) + spare, "eos_token_id": hf.get_added_vocab()["<|im_end|>"],
        "dtype": "float32", "tie_word_embeddings": tied}
    backbone = load_backbone(raw | {"mask_token_id": 0}, random=True, device="cpu")
    folder.mkdir()
    hf.save_pretrained(folder)
    del raw["mask_token_id"]
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": kind}))
    write_shards(hub_weights(backbone.network), folder, 1)
    pairs = [{"prompt": f"{a} and {b}?", "response": f"{a + b}."} for a in range(8)
             for b in range(5)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return backbone, len(hf)


@pytest.mark.parametrize("spare", [0, 1, 7])
@pytest.mark.parametrize("kind, tied", [("llama", True), ("llama", False), ("qwen2", True),
                                        ("qwen3", False)])
def test_a_mask_is_the_first_row_without_a_token(tmp_path, kind, tied, spare):
    """Its row begins as the mean of all tokens' rows. Nothing else changes."""
    before, tokens = write_left_to_right(kind, tmp_path / "model", spare, tied)
    after = load_backbone(str(tmp_path / "model"), device="cpu")
    assert after.config.left_to_right and after.mask_id == tokens == after.tokenizer.mask_id
    assert after.vocab_size == after.tokenizer.vocab_size == tokens + max(1, spare)
    old, new = before.part("embed").weight, after.part("embed").weight
    torch.testing.assert_close(new[tokens], old[:tokens].mean(0))
    assert torch.equal(new[:tokens], old[:tokens])
    assert torch.equal(new[tokens + 1:], old[tokens + 1:])
    head, theirs = after.part("head")(torch.eye(64)), before.part("head")(torch.eye(64))
    torch.testing.assert_close(head[:, :tokens], theirs[:, :tokens])
    torch.testing.assert_close(head[:, tokens], theirs[:, :tokens].mean(1))


def test_a_model_of_that_name_with_a_mask_is_a_diffusion_model_already(tmp_path):
    folder = tmp_path / "model"
    before, tokens = write_left_to_right("qwen2", folder, 7)
    edit_json("config.json", mask_token_id=tokens + 2)(folder)
    after = load_backbone(str(folder), device="cpu")
    assert not after.config.left_to_right and after.mask_id == tokens + 2
    assert torch.equal(after.part("embed").weight, before.part("embed").weight)


def test_converting_says_what_it_does(tmp_path, capsys):
    write_left_to_right("llama", tmp_path / "model", 0)
    s = Settings(model=str(tmp_path / "model"), data=str(tmp_path / "model" / "pairs.jsonl"),
                 attention="causal:2", shift=True, device="cpu", lora_rank=4)
    build(s)
    said = " ".join(capsys.readouterr().out.split())
    assert "was trained left to right. Here it is a diffusion model: the 2 lower layers look " \
        "left only" in said and "predicted from the place before it" in said


# ---- Trained, written, opened again -------------------------------------------------------------

def train_here(folder, *flags):
    """Train with train.py in a folder."""
    small = ["--steps", "3", "--batch", "2", "--accumulate", "1", "--lr", "1e-2", "--rank", "4",
             "--lora-rank", "4", "--eval-samples", "2", "--sample-every", "0", "--threads", "1",
             "--data", "model/pairs.jsonl", "--model", "model", "--out", "run"]
    subprocess.run([sys.executable, ROOT / "train.py", *small, *flags], cwd=folder, check=True,
                   capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--attention", "causal-prompt", "--shift"], ["--attention", "causal:1", "--no-memory"],
    ["--no-lora", "--shift"]], ids=" ".join)
def test_a_run_becomes_a_checkpoint_that_computes_the_same(tmp_path, monkeypatch, flags):
    write_left_to_right("qwen3", tmp_path / "model", 0)
    train_here(tmp_path, *flags)
    monkeypatch.chdir(tmp_path)
    export.export("run", "written")
    assert {path.name for path in Path("written").iterdir()} >= {
        "config.json", "tokenizer.json", "model.safetensors.index.json"}
    card = Path("written/README.md").read_text()
    assert "| steps | 3 of 3, 2 samples each |" in card and "train.py --model model" in card
    assert ("merged into them" in card) == ("--no-lora" not in flags)
    _, data, model = open_run("run", with_data=False)
    written = load_backbone("written", device="cpu")  # no flag says what the run's flags said
    assert not written.config.left_to_right and written.config.family == "a2d-qwen3"
    batch = collate([Sample(data.tokenizer.encode("What?"), data.tokenizer.encode("This."),
                            [True] * 5)], [0], False)
    torch.testing.assert_close(all_logits(written, batch.x0, batch.valid),
                               all_logits(model.backbone, batch.x0, batch.valid))
    assert written.mask_id == model.backbone.mask_id == written.tokenizer.hf.mask_token_id
    assert written.stop_ids == model.backbone.stop_ids
    assert written.tokenizer.chat([{"role": "user", "content": "a"}]) == data.tokenizer.chat(
        [{"role": "user", "content": "a"}])


@pytest.mark.slow
def test_a_written_checkpoint_can_be_trained_on(tmp_path, cli):
    write_left_to_right("llama", tmp_path / "model", 3)
    train_here(tmp_path, "--shift", "--no-memory")
    for command in (["export.py", "run", "written"],
                    ["train.py", "--model", "written", "--data", "model/pairs.jsonl", "--steps",
                     "1", "--lora-rank", "4", "--rank", "4", "--accumulate", "1", "--out", "two"],
                    ["generate.py", "--run", "two", "--adapt", "--prompt", "1 and 2?", "--length",
                     "4"],
                    ["generate.py", "--model", "written", "--prompt", "a [MASK:2] b"]):
        script = importlib.import_module(command[0].removesuffix(".py"))
        code, _, err = cli(script, *command[1:])
        assert code == 0, err


def test_what_cannot_be_written_is_refused(tmp_path, tiny_models):
    toy = ROOT / "toy" / "trained"
    with pytest.raises(ValueError, match="export.py is for real models"):
        export.export(toy, tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    run = tmp_path / "run"
    run.mkdir()
    settings = Settings(model=str(tiny_models / "smollm2"), from_adapter="x", merge=True)
    (run / "settings.json").write_text(json.dumps(settings.__dict__))
    with pytest.raises(ValueError, match="with another one merged"):
        export.export(run, tmp_path / "new")
    (run / "settings.json").write_text(json.dumps(replace(settings, merge=False).__dict__))
    with pytest.raises(ValueError, match="is not empty"):
        export.export(run, tmp_path / "full")


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, tiny_models, monkeypatch, cli):
    """The library of tensors has an error of its own for a full disk."""
    def write(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    model, run = str(tiny_models / "qwen3-0.6b"), tmp_path / "run"
    run.mkdir()
    (run / "settings.json").write_text(json.dumps(Settings(model=model).__dict__))
    state = {"step": 1, "processes": 1}
    monkeypatch.setattr(export, "read_checkpoint", lambda path: ({}, state))
    opened = load_backbone(model)
    monkeypatch.setattr(export, "load_backbone", lambda *names, **options: opened)
    monkeypatch.setattr("safetensors.torch.save_file", write)
    line = refused(cli(export, run, "new"))
    assert line == "error: new could not be written: I/O error: No space left on device"
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    monkeypatch.setattr(export, "load_backbone", None)  # nothing is loaded before it is refused
    for place in ("file", "file/new"):
        assert "file is no folder that you may write to" in refused(cli(export, run, place))


@pytest.mark.parametrize("field, value", [("attention", "left"), ("attention", 3), ("shift", 2)])
def test_a_config_that_asks_for_another_sight_is_refused(tmp_path, field, value):
    write_tiny("smollm2", tmp_path / "model")
    edit_json("config.json", **{field: value})(tmp_path / "model")
    with pytest.raises(ValueError, match=field):
        load_backbone(str(tmp_path / "model"))
