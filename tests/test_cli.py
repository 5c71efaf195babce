"""The scripts as a user meets them: run folders, resuming, answers, tables, one-line errors."""
import errno
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

import bench
import console
import evaluate
import generate
import memdlm
import train
from backbones.checkpoint import load_backbone
from backbones.lora import add_lora, save_adapter
from backbones.tiny import write_tiny
from compare import measure_run
from runs import open_run, read_checkpoint
from settings import Settings
from toy.tokenizer import Bytes

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--steps", "6", "--batch", "2", "--width", "16", "--layers", "1", "--heads", "2",
        "--log-every", "1", "--save-every", "3", "--sample-every", "3", "--table-samples", "3",
        "--threads", "1"]

# Flags that follow those of TINY when the model is a real one.
REAL_TINY = ["--sample-every", "0", "--eval-every", "0", "--accumulate", "1", "--steps", "2",
             "--table-samples", "0"]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A folder with two tiny runs, made once. Tests may read it and must not change it.

    runs/words is closed-book and has a control. runs/bytes reads Python code as bytes.
    """
    folder = tmp_path_factory.mktemp("trained")
    words = ["--out", "runs/words"]
    code = ["--out", "runs/bytes", "--data", "python",
            "--prompt-length", "24", "--response-length", "8"]
    for flags in (words, code):
        subprocess.run([sys.executable, ROOT / "train.py", *TINY, *flags], cwd=folder,
                       check=True, capture_output=True)
    return folder


def metrics(folder):
    """metrics.jsonl without the times."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refused(result):
    """Check that a script ended with exit code 2 and one line. Returns the line."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, err)
    return lines[0]


# ---- training ------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, flags, says", [
    (generate, ["--adapt", "--html", "."], "--html: . is no plain file"),
    (generate, ["--inspect", "file/page.html"], "file is no folder that you may write to"),
    (generate, ["--svg", "/"], "--svg: / is no plain file"),
    (evaluate, ["exposure", "--out", "x.xyz"], "x.xyz ends in .xyz; give .png"),
    (evaluate, ["--json", "folder"], "--json: folder is no plain file"),
    (evaluate, ["--picture", "file/x.png"], "file is no folder"),
    (evaluate, ["--json", "x.png", "--picture", "./x.png"], "--json and --picture name the same"),
    (bench, ["--scale", "--json", "folder"], "--json: folder is no plain file")])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(cli, tmp_path, script, flags,
                                                                   says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert says in refused(cli(script, *flags))



def test_a_missing_file_is_not_called_a_model(cli):
    assert refused(cli(evaluate, "claims", "--again", "x.json")) == "error: x.json is missing"


def test_a_run_leaves_its_folder_and_prints_the_panel(cli, tmp_path):
    code, out, _ = cli(train, "--model", "toy", *TINY)
    folder = tmp_path / "runs" / "dictionary"
    assert code == 0
    assert {path.name for path in folder.iterdir()} == {
        "settings.json", "origin.json", "model.safetensors", "metrics.jsonl", "loss.png",
        "panel.png", "panel.json", "control"}
    assert [line["step"] for line in metrics(folder)] == list(range(6))
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["trajectory"] == "cover:4" and settings["steps"] == 6
    assert settings["closed_book"]
    control = json.loads((folder / "control" / "settings.json").read_text())
    assert not control["memory"] and not control["closed_book"]
    assert control["seed"] == settings["seed"]
    for text in ("nothing (theta alone)", "its prompt, cover:4", "another prompt, cover:4",
                 "paper's masks", "MDLM, sees the prompt", "sample at step 3: ", "of 4 right",
                 "The right answer:", "step 6 of 6: loss ", "python generate.py --adapt"):
        assert text in out, text


@pytest.mark.parametrize("data", ["languages", "dictionary"])
def test_the_baseline_sees_the_same_data_and_masks(cli, tmp_path, data):
    """At step 0 the weights are the same too.

    So the loss without memory equals the baseline's to the last bit.
    """
    flags = ["--data", data, "--no-control", "--no-closed-book", *TINY, "--table-samples", "0"]
    cli(train, *flags, "--out", "a")
    cli(train, *flags, "--no-memory", "--out", "b")
    assert metrics(tmp_path / "a")[0]["loss_without"] == metrics(tmp_path / "b")[0]["loss"]


@pytest.mark.parametrize("data", ["dictionary", "languages", "retrieval", "python", "pydoc"])
@pytest.mark.parametrize("memory", ["--memory", "--no-memory"])
def test_every_kind_of_data_trains_with_and_without_memory(cli, tmp_path, data, memory):
    flags = ["--data", data, memory, "--no-control", "--steps", "2",
             "--prompt-length", "32", "--response-length", "8"]
    assert cli(train, *TINY, *flags, "--table-samples", "0", "--out", "r")[0] == 0
    lines = metrics(tmp_path / "r")
    assert len(lines) == 2 and all(torch.tensor(line["loss"]).isfinite() for line in lines)


def test_same_seed_same_weights_other_seed_others(cli, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        cli(train, *TINY, "--no-control", "--table-samples", "0", "--seed", seed, "--out", name)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c


class StopAfter:
    """Takes the place of train.Stop, and stands for a Ctrl-C after a number of metrics lines.

    The loop may read `signal` more than once in a step, so it counts lines instead of reads.
    """

    def __init__(self, folder, step):
        self.folder, self.step = folder, step

    @property
    def signal(self):
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return 2 if len(lines) == self.step else None


@pytest.mark.parametrize("stop_after", [1, 3, 5])
@pytest.mark.parametrize("data", ["dictionary", "languages"])
def test_a_resumed_run_equals_an_uninterrupted_one(cli, tmp_path, monkeypatch, stop_after, data):
    flags = [*TINY, "--data", data, "--no-control", "--table-samples", "0"]
    cli(train, *flags, "--out", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train, "Stop", lambda: StopAfter(tmp_path / "parts", stop_after))
        code, out, _ = cli(train, *flags, "--out", "parts")
    assert code == 130 and f"stopped after step {stop_after}" in out and "--resume parts" in out
    # A kill after the checkpoint would leave such lines.
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": stop_after, "loss": 0}) + '\n{"step": 99, "lo')
    assert cli(train, "--resume", "parts")[0] == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_full_disk_keeps_the_previous_checkpoint(cli, tmp_path, monkeypatch):
    import safetensors.torch
    save_file, saved_steps = safetensors.torch.save_file, []

    def save_once(tensors, path, metadata):
        if saved_steps:
            Path(path).write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved_steps.append(str(json.loads(metadata["state"])["step"]))
        save_file(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", save_once)
    code, _, err = cli(train, *TINY, "--no-control", "--out", "r")
    assert code == 2 and "No space left on device" in err and "Traceback" not in err
    assert saved_steps == ["3"] and not list((tmp_path / "r").glob("*.tmp"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli(train, "--resume", "r")[0] == 0
    assert [line["step"] for line in metrics(tmp_path / "r")] == list(range(6))


def test_a_second_run_does_not_overwrite_the_first(cli, tmp_path):
    for _ in range(2):
        cli(train, *TINY, "--data", "languages", "--no-memory")
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {"languages-baseline", "languages-baseline-2"}


def test_the_learning_rate_warms_up_and_falls_to_zero():
    s = Settings(steps=100, lr=1.0)
    rates = [train.learning_rate(s, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0  # ten steps of warm-up
    assert rates[55] == pytest.approx(0.5) and rates[-1] < 1e-3


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(cli):
    code, _, err = cli(train, *TINY, "--no-control", "--no-memory",
                       "--lr", "1e30", "--grad-clip", "1e30")
    assert code == 2 and re.search(r"error: step \d: .*not finite", err) and "Traceback" not in err


# ---- generating ----------------------------------------------------------------------------------

def test_generate_answers_the_built_in_example_with_and_without_memory(cli, two_runs):
    code, out, _ = cli(generate, "--run", two_runs / "runs/words", "--adapt")
    assert code == 0
    for text in ("prompt (the decoder does not see it): ", "question: ", "without memory: ",
                 "with memory of the prompt: ", "inner loss", "The right answer: "):
        assert text in out
    again = cli(generate, "--run", two_runs / "runs/words", "--adapt")[1]
    assert again == out  # the seed decides


def test_generate_takes_a_prompt_a_file_and_a_conversation(cli, two_runs, tmp_path):
    words = ["--run", two_runs / "runs/words"]
    asked = ["--prompt", "fox ruby owl jade", "--question", "owl ? fox ?"]
    assert "ruby" in cli(generate, *words, *asked)[1]

    (tmp_path / "in.txt").write_text("def f(x):")
    code, out, _ = cli(generate, "--run", two_runs / "runs/bytes", "--file", "in.txt", "--adapt",
                       "--length", "5", "--block-length", "2", "--temperature", "0.7",
                       "--cfg-scale", "1", "--remasking", "random", "--show")
    assert code == 0 and "without memory:\n    0  def f(x):?????" in out

    talk = "owl ?\nfox ruby owl jade\nowl ?\nzzz ?\nquit\n"
    code, out, _ = cli(generate, *words, "--chat", "--adapt", stdin=talk)
    assert code == 0 and "first a prompt" in out and "with memory" in out
    assert "zzz" in out.split("error:")[1]


def test_the_page_is_self_contained_and_escapes_every_token(cli, two_runs, tmp_path):
    evil = "</script><b>&"
    flags = ["--run", two_runs / "runs/bytes", "--adapt", "--prompt", evil, "--html", "o.html"]
    assert cli(generate, *flags)[0] == 0
    page = (tmp_path / "o.html").read_text()
    assert "&lt;/script&gt;&lt;b&gt;&amp;" in page and "<b>" not in page
    assert page.count("</script>") == 1
    assert not re.search(r"https?://|src=|@import", page)
    for label in ("without memory", "with memory of the prompt"):
        assert label in page
    # Two panels, each for a wide and for a narrow window: up to 8 masks, one byte in each step.
    assert 4 <= page.count('class="mask"') <= 32 and page.count("<svg") == 4
    assert {*re.findall(r'class="token" data-from="(\d+)"', page)} <= {*"12345678"}


def test_settings_of_the_inner_loop_can_be_changed_at_generation(cli, two_runs, monkeypatch):
    stages, real = [], memdlm.adapt
    monkeypatch.setattr(memdlm, "adapt", lambda *arguments: (
        stages.append(len(real(*arguments)[1]["inner"])), real(*arguments))[1])
    flags = ["--run", two_runs / "runs/words", "--adapt", "--prompt", "fox ruby owl jade"]
    for more in ([], ["--trajectory", "consistent", "--inner-steps", "3"]):
        assert cli(generate, *flags, *more)[0] == 0
    assert stages == [4, 3]


# ---- comparing -----------------------------------------------------------------------------------

@pytest.mark.slow
def test_evaluate_groups_seeds_and_writes_numbers(cli, tmp_path):
    for seed in (0, 1):
        cli(train, *TINY, "--data", "languages", "--seed", seed, "--out", f"runs/{seed}")
    code, out, _ = cli(evaluate, "runs/0", "runs/1", "--samples", "4", "--json", "o.json",
                       "--picture", "o.png", "--trajectory", "cover:2")
    assert code == 0 and "2 seeds" in out
    assert "the answers, eta 0.003 (leaks)" in out and "its prompt, cover:2" in out
    numbers = json.loads((tmp_path / "o.json").read_text())
    assert len(numbers["groups"]) == 2 and (tmp_path / "o.png").exists()
    row = numbers["groups"][0]["rows"][0]
    assert len(row["per_run"]) == 2 and row["mean"] == pytest.approx(sum(row["per_run"]) / 2)
    spread = abs(row["per_run"][0] - row["per_run"][1]) / 2  # standard error of two values
    assert row["standard_error"] == pytest.approx(spread)


def test_evaluate_measures_what_a_loop_over_samples_measures(two_runs, monkeypatch):
    """Theta's own loss in nats, with each sample computed alone and its masks drawn again."""
    monkeypatch.chdir(two_runs)
    s, data, model = open_run("runs/bytes")
    backbone = model.backbone
    _, _, values, _ = measure_run(Path("runs/bytes"), 3, None)
    batch = data.tests("24", range(3), False)
    for i in range(3):
        x = batch.x0[i]
        maskable = [j for j in range(len(x)) if batch.maskable[i, j]]
        t = memdlm.uniform([batch.seeds[i]], "t", 1)[0, 0]
        u = memdlm.uniform([batch.seeds[i]], "anchor", len(x))[0]
        # If no token would be masked, the one with the smallest number is.
        hidden = [j for j in maskable if u[j] < t] or [min(maskable, key=lambda j: u[j])]
        seen = x.clone()
        seen[hidden] = backbone.mask_id
        h = backbone.blocks(backbone.embed(seen[None]), batch.valid[i:i + 1], 0, None)
        nll = -backbone.head(h)[0].log_softmax(-1)[hidden, x[hidden]].mean()
        measured = values["nothing (theta alone)", "24"][i].item()
        assert measured == pytest.approx(nll.item(), rel=1e-4)


def test_exposure_prints_both_losses_beside_the_ratio(cli, two_runs, tmp_path):
    code, out, _ = cli(evaluate, two_runs / "runs/bytes", "--exposure", "--samples", "3")
    assert code == 0 and (tmp_path / "exposure.png").exists()
    rows = {}
    for line in out.splitlines():
        if line.startswith("  s"):
            label, *numbers = line.split()
            rows[label] = [float(number) for number in numbers]
    for a, b, ratio in zip(rows["sequential"], rows["static"], rows["sequential/static"]):
        assert ratio == pytest.approx(a / b, abs=2e-3)


# ---- bad input: one line, exit code 2 ------------------------------------------------------------

@pytest.mark.parametrize("flags, says", [
    (["--model", "gpt9"], "no model 'gpt9' here"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--trajectory", "cover:0"], "cover:K"),
    (["--trajectory", "zigzag"], "zigzag"),
    (["--inner-steps", "1"], "inner_steps is 1"),
    (["--layer-fraction", "5"], "layer_fraction is 5"),
    (["--rank", "0"], "rank is 0"),
    (["--steps", "0"], "steps is 0"),
    (["--width", "30"], "width 30"),
    (["--data", "languages", "--closed-book"], "no question in languages"),
    (["--resume", "nowhere"], "nowhere is not a run folder"),
    (["--resume"], "there is no run in runs/ yet"),
])
def test_train_refuses(cli, flags, says):
    assert says in refused(cli(train, *flags))


def test_bad_lines_of_a_data_file_are_named_or_skipped(cli, tmp_path):
    good = json.dumps({"prompt": "what is up", "response": "the sky"})
    (tmp_path / "d.jsonl").write_text("\n".join([good] * 3 + ["{broken", good]))
    assert "d.jsonl, line 4" in refused(cli(train, *TINY, "--data", "d.jsonl"))
    code, out, _ = cli(train, *TINY, "--data", "d.jsonl", "--skip-bad", "--no-control")
    assert code == 0 and "4 pairs kept" in out and "1 malformed lines skipped" in out
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 300, "response": "y"}))
    assert "too long" in refused(cli(train, *TINY, "--data", "long.jsonl"))


@pytest.mark.parametrize("flags, says", [
    (["--run", "nowhere"], "nowhere is not a run folder"),
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt", "fox dragonfruit-soup"], "dragonfruit-soup"),
    (["--prompt", "<mask> fox"], "<mask>"),
    (["--prompt", "fox ruby " * 3000], "window"),
    (["--file", "nowhere.txt"], "nowhere.txt"),
    (["--steps", "0"], "--steps is 0"),
    (["--length", "-1"], "--length is -1"),
    (["--trajectory", "zigzag"], "zigzag"),
])
def test_generate_refuses(cli, two_runs, flags, says):
    flags = flags if "--run" in flags else ["--run", two_runs / "runs/words", *flags]
    assert says in refused(cli(generate, *flags))


def test_a_checkpoint_of_another_model_is_refused(cli, two_runs, tmp_path):
    shutil.copytree(two_runs / "runs/words", tmp_path / "r")
    path, weights = tmp_path / "r/settings.json", tmp_path / "r/model.safetensors"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "width": 32}))
    assert "belongs to another model" in refused(cli(generate, "--run", "r"))
    path.write_text(json.dumps({**settings, "wdith": 32}))
    assert "wdith" in refused(cli(generate, "--run", "r"))
    path.write_text(json.dumps(settings))
    weights.write_bytes(b"\x80\x04K\x01.")  # a pickle
    assert "not a checkpoint" in refused(cli(generate, "--run", "r"))
    weights.unlink()
    assert "saved nothing yet" in refused(cli(generate, "--run", "r"))


def test_resuming_with_other_settings_names_the_one_that_differs(cli, two_runs):
    line = refused(cli(train, "--resume", two_runs / "runs/words", "--inner-lr", "0.7"))
    assert "inner_lr 0.3, not 0.7" in line


def test_an_existing_run_is_not_overwritten(cli, two_runs):
    assert "holds a run already" in refused(cli(train, *TINY, "--out", two_runs / "runs/words"))


def test_a_run_needs_a_folder(cli, tmp_path):
    (tmp_path / "x").touch()
    assert "x is a file; give --out the name of a folder" in refused(cli(train, "--out", "x"))


def test_runs_of_different_data_are_not_compared(cli, two_runs):
    both = two_runs / "runs/words", two_runs / "runs/bytes"
    assert "different data" in refused(cli(evaluate, *both, "--samples", "2"))


# ---- the saved file, the start-up, the README ----------------------------------------------------

def test_the_checkpoint_holds_the_model_and_nothing_of_phi(two_runs):
    names = load_file(two_runs / "runs/words/model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"model", "adamw"}
    assert not [name for name in names if "lora" in name or "phi" in name]
    weights, states = ([name for name in names if name.startswith(kind)]
                       for kind in ("model.", "adamw."))
    assert len(states) == 3 * len(weights)  # AdamW keeps two averages and a count of steps


def test_help_is_quick_and_heavy_packages_stay_out():
    code = (
        "import sys; sys.argv = ['train.py', '--help-all']\nimport train\n"
        "try: train.main()\nexcept SystemExit: pass\n"
        "heavy = {'matplotlib', 'transformers', 'peft', 'bitsandbytes', 'datasets', 'lm_eval'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         check=True)
    assert "--inner-lr" in run.stdout and "toy, from prompt 0.3" in run.stdout


@pytest.mark.parametrize("line", ["train", "generate", "bench", "export", "first_gpu", "evaluate",
                                  "evaluate compare", "evaluate tasks", "evaluate claims"])
def test_help_fits_a_screen_and_help_all_has_the_rest(cli, monkeypatch, line):
    monkeypatch.setenv("COLUMNS", "100")
    script, *command = line.split()
    module = importlib.import_module(script)
    code, short, _ = cli(module, *command, "--help")
    assert code == 0 and len(short.splitlines()) <= 30
    assert max(map(len, short.splitlines())) <= 100
    if "--help-all" in short:
        code, full, _ = cli(module, *command, "--help-all")
        few = {*re.findall(r"^  (--[a-z0-9-]+)", short, re.M)}
        all_ = {*re.findall(r"^  (--[a-z0-9-]+)", full, re.M)}
        assert code == 0 and few < all_ and "--rank" in all_ and "--rank" not in few
    else:
        assert line in ("evaluate", "evaluate claims", "export", "first_gpu")


@pytest.mark.parametrize("line, says", [
    ("train --modle toy", "arguments: --modle toy; did you mean --model?"),
    ("train --stpes=3", "did you mean --steps?"),
    ("train --model toyy", "did you mean toy?"),
    ("train --model inclusionAI/LLaDA-MoE-7B-A1B-Bas", "mean inclusionAI/LLaDA-MoE-7B-A1B-Base?"),
    ("train --data dictionry", "did you mean dictionary?"),
    ("train --optimizer adam8bit", "did you mean adamw8bit?"),
    ("generate --mode sped", "did you mean speed?"),
    ("generate --run runs/wrds", "did you mean runs/words?"),
    ("evaluate comprae", "did you mean compare?"),
    ("evaluate claims --quik", "did you mean --quick?")])
def test_a_mistyped_name_gets_the_nearest(cli, two_runs, tmp_path, line, says):
    (tmp_path / "runs").symlink_to(two_runs / "runs")
    script, *words = line.split()
    assert says in refused(cli(importlib.import_module(script), *words))


def commands_of(*pages):
    """Every command line with one of our scripts in the code blocks of these pages, each once."""
    found = {}
    for page in pages:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M):
            for line in block.splitlines():
                line = line.partition("#")[0].replace("accelerate launch", "python").strip()
                if re.match(r"python (train|generate|evaluate|bench)\.py", line):
                    found[" ".join(line.split())] = None
    quick = ("python train.py --model toy", "python generate.py --adapt")
    return [pytest.param(c, marks=[] if c in quick else [pytest.mark.slow]) for c in found]


# Commands with these words need the hub's data, or take minutes or an hour. test_harness.py,
# test_paper.py, test_studies.py and test_real_models.py run small forms of them.
LONG = {"tasks", "claims", "lm_eval", "lora", "baselines", "order", "conversion", "pretrained"}


def tiny_folder(root, name):
    """A tiny checkpoint that stands for the published model of this name."""
    if not (root / name).exists():
        kinds = {"2.1": "llada2.1-mini", "moe": "llada-moe"}
        kind = next((kinds[part] for part in kinds if part in name.lower()), "llada-8b")
        write_tiny(kind, root / name)
    return name


def make_adapter(root, model, name):
    """A random adapter for the tiny model, under the name that the command gives it."""
    backbone = load_backbone(str(root / model))
    backbone.name = model
    save_adapter(add_lora(backbone, 4, 8.0, 0.0), root / name)


def shrink(script, words, root, two_runs, cli):
    """The words of a command, with sizes made tiny and with models, runs and data that exist."""
    value = {flag: words[i + 1] for i, flag in enumerate(words[:-1]) if flag.startswith("--")}
    words, model = list(words), value.get("--model", "toy")
    for i, word in enumerate(words):
        if word == "RUNS" or re.match(r"runs/(languages|closed|a$|b$)", word):
            words[i] = "runs/words"
        if word.startswith("causal:"):
            words[i] = "causal:1"  # tiny models have few layers
    if model != "toy" and script != "bench":
        words[words.index(model)] = tiny_folder(root, model)
        if "--plan" in words:
            return words
        if "--from-adapter" in value:
            make_adapter(root, model, value["--from-adapter"])
        if script == "generate":
            return words + ["--length", "8"]
        return words + ["--data", "my.jsonl"] * ("--data" not in value) + [*TINY, *REAL_TINY]
    if "runs/tiny-llada-moe-pairs" in words:
        tiny_folder(root, "tiny-llada-moe")
        flags = ["--model", "tiny-llada-moe", "--data", "tiny-llada-moe/pairs.jsonl"]
        assert cli(train, *flags, *TINY, *REAL_TINY)[0] == 0
        return words
    if script == "bench":
        return words
    if script == "train" and "--resume" not in words:
        return words + [*TINY, "--table-samples", "0"]
    (root / "runs").symlink_to(two_runs / "runs")
    if script == "generate":
        return words + ["--run", "runs/words"]
    if script == "evaluate" and words[:1] != ["paper"]:
        run = [] if "runs/words" in words else ["runs/words"]
        return words + run + ["--samples", "3"]
    return words


@pytest.mark.parametrize("command", commands_of("README.md", "results/README.md", "FAQ.md"))
def test_the_commands_of_the_pages_run(command, two_runs, tmp_path, cli):
    """As typed there, with sizes made tiny."""
    _, script, *words = shlex.split(command)
    script = script.removesuffix(".py")
    if LONG & {*words} or (script == "bench" and "--scale" not in words):
        return
    if "--log" in words:
        pytest.importorskip(words[words.index("--log") + 1])
    pairs = [json.dumps({"prompt": f"say {i}", "response": str(i)}) for i in range(9)]
    (tmp_path / "my.jsonl").write_text("\n".join(pairs))
    (tmp_path / "notes.txt").write_text("fox ruby owl jade")
    words = shrink(script, words, tmp_path, two_runs, cli)
    code, _, err = cli(importlib.import_module(script), *words, stdin="quit\n")
    assert code == 0, err[-2000:]


@pytest.mark.slow
def test_closed_book_memory_is_learned(cli, tmp_path):
    """This is the claim of the first screen, at a tenth of its size.

    Answers come only with the phi of the question's own prompt.
    """
    cli(train, "--steps", "200", "--lr", "4e-3", "--no-control", "--sample-every", "0",
        "--out", "r")
    _, _, values, roles = measure_run(tmp_path / "r", 100, None)
    score = {role: values[label, "16 x2"].mean().item() for role, label in roles.items()}
    assert score["own"] > 0.4 and score["other"] < 0.1 and score["alone"] < 0.1, score


# ---- the end of work -----------------------------------------------------------------------------

QUICK = [*TINY, "--width", "8", "--heads", "1", "--table-samples", "0", "--no-control"]


@pytest.fixture
def handlers():
    """Sets the handlers of signals, the hooks and the alarm back after the test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    hooks = sys.excepthook, sys.unraisablehook
    yield
    signal.alarm(0)
    sys.excepthook, sys.unraisablehook = hooks
    for number, handler in before.items():
        signal.signal(number, handler)


def begin_and_run(code, goes_on=True, **options):
    """Start a Python process that begins as a script does, and then runs this code."""
    code = f"import sys, console\nconsole.begin({goes_on})\n{code}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                            env={**os.environ, "PYTHONUNBUFFERED": ""}, **options)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["encoding"], ["pipe", "closed"]], ids=str)
def test_printing_never_ends_training(tmp_path, names):
    """The output has an encoding without emoji, a reader that goes away, or is closed."""
    pair = json.dumps({"prompt": "hi \U0001f600 there", "response": "b\xf6se \U0001f600"})
    (tmp_path / "d.jsonl").write_text("\n".join([pair] * 12))
    words = [sys.executable, str(ROOT / "train.py"), *QUICK, "--data", "d.jsonl", "--out"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
    command = shlex.join(words)
    shells = {"encoding": f"{command} encoding > log 2>&1",
              "pipe": f"{command} pipe 2>&1 | head -1",
              "closed": f"{command} closed <&- >&- 2>&-"}
    for name in names:
        subprocess.run(shells[name], shell=True, cwd=tmp_path, env=environment, check=True,
                       stdout=subprocess.DEVNULL)
        assert len(metrics(tmp_path / name)) == 6 and (tmp_path / name / "loss.png").exists(), name
    if "encoding" in names:
        log = (tmp_path / "log").read_text(encoding="cp1252")
        assert "sample at step 3" in log and "\\U0001f600" in log and "Traceback" not in log


def test_a_reader_that_goes_away_ends_other_work_quietly():
    code = "for i in range(100000): print(i)\nprint('done', file=sys.stderr)"
    for goes_on, expected in ((True, (0, "done\n")), (False, (141, ""))):
        run = begin_and_run(code, goes_on, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        run.stdout.close()
        assert (run.wait(), run.stderr.read()) == expected
        run.stderr.close()


def test_output_that_cannot_be_written_is_an_error_only_where_it_is_the_work():
    for goes_on, says in ((True, ""), (False, "error: the output could not be written")):
        with open("/dev/full", "w") as full:
            run = begin_and_run("print(1)", goes_on, stdout=full, stderr=subprocess.PIPE)
        _, err = run.communicate()
        assert run.returncode == (0 if goes_on else 2) and err.startswith(says)
        assert bool(err) == bool(says)


def test_closed_streams_are_not_taken_by_the_next_file(tmp_path):
    code = ("import os\nfile = open(sys.argv[1], 'w')\nprint('lost'), os.write(1, b'lost')\n"
            "assert file.fileno() > 2 and sys.stdin.read() == ''\nfile.write('kept')")
    words = [sys.executable, "-c", f"import sys, console\nconsole.begin()\n{code}",
             str(tmp_path / "o")]
    shell = shlex.join(words) + " <&- >&- 2>&-"
    assert subprocess.run(shell, shell=True, cwd=ROOT).returncode == 0
    assert (tmp_path / "o").read_text() == "kept"


@pytest.mark.parametrize("script", ["train", "generate", "evaluate", "bench"])
def test_a_ctrl_c_while_torch_is_imported_is_one_line(tmp_path, script):
    """A false torch sends the Ctrl-C while it is imported.

    Then it lets the exception pass, or raises another one, or swallows it.
    """
    send = "import os, signal, time\ntry: os.kill(os.getpid(), signal.SIGINT)\n"
    ways = ["finally: pass", "except BaseException: raise ImportError('odd')"]
    if script == "train":
        ways.append("except BaseException: time.sleep(9)")
    for way in ways:
        (tmp_path / "torch.py").write_text(send + way)
        run = subprocess.run([sys.executable, ROOT / f"{script}.py"], capture_output=True,
                             text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert (run.returncode, run.stderr.strip(), run.stdout) == (130, "stopped", "")


@pytest.mark.parametrize("script", ["train", "generate", "evaluate", "bench", "export"])
def test_a_ctrl_c_before_our_handlers_are_there_leaves_no_traceback(tmp_path, script):
    """A false textwrap, which console imports, sends it."""
    send = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "textwrap.py").write_text(send)
    run = subprocess.run([sys.executable, ROOT / f"{script}.py"], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (run.returncode, run.stderr, run.stdout) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_within_training(cli, tmp_path, monkeypatch, handlers, number):
    send = lambda s, data, model, step, *rest: step == 3 and os.kill(os.getpid(), number)
    monkeypatch.setattr(train, "show_progress", send)
    code, out, _ = cli(train, *QUICK, "--save-every", "100", "--out", "r")
    assert code == 128 + number and "stopped after step 4 and saved" in out
    assert read_checkpoint(tmp_path / "r/model.safetensors")[1]["step"] == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_is_told_by_the_exit_code_however_long_python_cleans_up(tmp_path, number):
    """Some module takes four seconds to go, when Python has forgotten our handlers."""
    code = f"""
import os, time
class Slow:
    def __del__(self, sleep=time.sleep): sleep(4)
sys.modules["slow"] = Slow()
open({str(tmp_path / "o")!r}, "w").write("kept")
os.kill(os.getpid(), {int(number)})
time.sleep(9)"""
    run = begin_and_run(code, False, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = run.communicate()
    assert (run.returncode, out, err.strip()) == (128 + number, "", "stopped")
    assert (tmp_path / "o").read_text() == "kept"


def test_a_hang_up_that_is_ignored_stays_ignored(cli, monkeypatch, handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    send = lambda *arguments: os.kill(os.getpid(), signal.SIGHUP)
    monkeypatch.setattr(train, "show_progress", send)
    assert cli(train, *QUICK, "--out", "r")[0] == 0


@pytest.mark.parametrize("where, says", [
    ("build", "stopped"),
    ("draw_losses", "is saved in r"),
    ("print_comparison", "is saved in r"),
])
def test_a_stop_before_and_after_the_loop_is_one_line_at_once(
        cli, tmp_path, monkeypatch, handlers, where, says):
    def send(*arguments, **options):
        # The losses are drawn for the run and for its control. The signal waits for the control.
        if where != "draw_losses" or arguments[0].name == "control":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, where, send)
    code, _, err = cli(train, *QUICK, "--control", "--table-samples", "3", "--out", "r")
    assert code == 130 and says in err.splitlines()[-1] and "Traceback" not in err
    assert (tmp_path / "r").exists() == (where != "build")


def test_a_signal_in_the_last_step_is_not_forgotten(cli, tmp_path, monkeypatch, handlers):
    send = lambda s, data, model, step, *rest: step == 5 and os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(train, "show_progress", send)
    code, out, _ = cli(train, *QUICK, "--out", "r")
    assert code == 130 and "stopped after step 6 and saved" in out
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli(train, "--resume", "r")[0] == 0


def test_a_stop_of_the_claims_says_how_to_go_on(monkeypatch, handlers, capsys):
    from paper import runs
    console.catch_signals(console.end_work)
    monkeypatch.setattr(runs, "run_all", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        runs.run_claims(True, 1, 1, "o")
    assert stop.value.code == 130 and "same command goes on" in capsys.readouterr().err


def test_a_chat_ends_with_its_input(cli, two_runs):
    code, out, err = cli(generate, "--run", two_runs / "runs/words", "--chat", stdin="")
    assert code == 0 and not err


# ---- texts from elsewhere ------------------------------------------------------------------------

PLAIN_TEXTS = ["a\tb\nc\r\nd", "na\xefve \u4f60\u597d \u0645\u0631\u062d\u0628\u0627",
               "\U0001f468\u200d\U0001f469 \u05d0\u200f!", "\xa0\xad"]


@pytest.mark.parametrize("text, shown", [
    ("\x1b[2J", "\\x1b[2J"),
    ("\x9b2J", "\\x9b2J"),
    ("a\rb", "a\\x0db"),
    ("\a\b\0\x7f", None),
    ("\u202eabc\u2066", "\\u202eabc\\u2066"),
    ("\ud83d", "\\ud83d"),
    ("\r\r\n", "\\x0d\r\n"),
    *((text, text) for text in PLAIN_TEXTS)])
def test_what_would_steer_a_terminal_is_shown(text, shown):
    assert console.printable(text) == (shown or "\\x07\\x08\\x00\\x7f")


def test_no_text_of_a_prompt_or_a_reply_steers_the_terminal(cli, two_runs, tmp_path, monkeypatch):
    evil = "x\x1b[2J\x9b\u202e\ry"
    monkeypatch.setattr(Bytes, "decode", lambda self, ids: evil)
    flags = ["--run", two_runs / "runs/bytes", "--prompt", evil, "--show", "--svg", "o.svg"]
    code, out, err = cli(generate, *flags, "--html", "o\x1b.html")
    assert code == 0 and out.count("x\\x1b[2J\\x9b\\u202e\\x0dy") >= 2 and "o\\x1b.html" in out
    assert not set("\x1b\x9b\u202e\r") & set(out + err)
    ElementTree.parse(tmp_path / "o.svg")
    run = ["--run", two_runs / "runs/bytes"]
    for flags in (["--run", evil], [*run, evil], [*run, "--trajectory", evil]):
        line = refused(cli(generate, *flags))
        assert "\\x1b[2J" in line and not set("\x1b\x9b\u202e\r") & set(line)
    assert "\\x1b" in refused(cli(train, "--data", evil))
