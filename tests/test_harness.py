"""lm-evaluation-harness on our models: its own tasks, unmodified, on small local data of the same form. Offline."""
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from data import Sample
import torch
from test_cli import TINY, refused

import evaluate
import generate
from backbones.tiny import write_tiny
from paper.harness import harness, read_scores, task_metadata
from paper.tables import print_tables
import memdlm
import train

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a toy run on bytes, a tiny LLaDA-MoE, and data named like the hub's, which the harness then finds here."""
    root = tmp_path_factory.mktemp("harness")
    subprocess.run([sys.executable, ROOT / "train.py", *TINY, "--data", "python", "--prompt-length", "24", "--response-length", "8",
                    "--no-control", "--table-samples", "0", "--out", "run"], cwd=root, check=True, capture_output=True)
    for name in ("llada-moe", "llada2.1-mini"):
        write_tiny(name, root / name)
    people = [{"input": f"{name} went to the {place}. Bo slept.", "question": f"Where is {name}?", "target": place}
              for name, place in (("Ann", "hall"), ("Mary", "office"), ("John", "yard"), ("Eve", "attic"))]
    questions = [{"context": "What is red ? color\nWho is Bo ? person", "question": "Who is Ann ?", "answers": ["person"],
                  "all_classes": ["color", "person"], "input": "Who is Ann ?", "length": 9, "dataset": "trec", "language": "en"}] * 2
    local_data(root / "RMT-team/babilong-1k-samples", {("1k", "qa1"): people, ("2k", "qa1"): people[:3]})
    local_data(root / "Xnhyacinth/LongBench", {("trec", "test"): questions})
    return root


def local_data(folder, splits):
    """A data set in the hub's layout: {(configuration, split): rows}."""
    lines = ["---", "configs:"]
    for (config, split), rows in splits.items():
        (folder / config).mkdir(parents=True)
        (folder / config / f"{split}.json").write_text(json.dumps(rows))
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {config}/{split}.json"]
    (folder / "README.md").write_text("\n".join([*lines, "---"]))


def asked(place, which="llada-moe", **options):
    where = {"run": str(place / "run")} if which == "run" else {"model": str(place / which), "rank": 4, "alpha": 8.0}
    return harness()(**where, **options)


def requests(*arguments):
    return [SimpleNamespace(args=a) for a in arguments]


CONTEXTS = ["Hi there, who are you and what?", "a", "What comes after three? I wonder, what", "", "Hello"]


@pytest.mark.parametrize("which", ["run", "llada-moe", "llada2.1-mini"])
@pytest.mark.parametrize("adapt", [False, True])
def test_a_batch_of_requests_is_answered_like_each_alone(place, which, adapt):
    """In their order, each with its own phi; and as generate.py answers."""
    model = asked(place, which, adapt=adapt, batch_size=3)
    jobs = requests(*((c, {"max_gen_toks": 6 if i % 2 else 9, "until": []}) for i, c in enumerate(CONTEXTS)))
    together = model.generate_until(jobs, disable_tqdm=True)
    model.batch = 1
    assert together == model.generate_until(jobs, disable_tqdm=True)
    ids = model.tokenizer.encode(CONTEXTS[2])
    sample = Sample(ids, [0] * 9, [True] * 9)
    options = {"seed": "0 2"} | ({"threshold": 0.95} if which == "llada2.1-mini" else {})
    own, = generate.answer(model.s, model.data, model.model, [sample], adapt, options)
    assert own.text == together[2]


def test_stop_strings_and_long_prompts(place, monkeypatch):
    model = asked(place, max_length=20)
    monkeypatch.setattr(type(model), "answer", lambda self, group: ["one\ntwo;three"] * len(group))
    answer = lambda until: model.generate_until(requests(("x", {"max_gen_toks": 4, "until": until})), disable_tqdm=True)[0]
    assert [answer(u) for u in ([], ["\n"], [";", "\n"], "two", [""])] == ["one\ntwo;three", "one", "one", "one\n", "one\ntwo;three"]
    text = "abcdefghijklmnopqrstuvwxyz"
    assert model.tokenizer.decode(model.ids(text, 4)) == text[-16:] and model.cut == 1
    assert model.tokenizer.decode(model.ids("abc", 4)) == "abc" and model.cut == 1


def test_likelihood_by_monte_carlo_against_all_masks(place, monkeypatch):
    """n = 3: the mean over k = 1..3 and all masks of k of the three tokens, of n / k times the loss at them. The losses are
    made up, so that what else is masked matters a lot."""
    monkeypatch.setattr(memdlm, "response_nll", lambda backbone, s, x0, masked, valid, phi=None: masked * masked.sum(
        1, keepdim=True) ** 2 * torch.arange(masked.shape[1]) * (1 if phi is None else 2))
    model = asked(place, mc_samples=4000, batch_size=100)
    (value, greedy), = model.loglikelihood(requests(("What is it? ", "It.")), disable_tqdm=True)
    prompt, rest = (model.tokenizer.encode(t) for t in ("What is it? ", "It."))
    x0, exact = torch.tensor([prompt + rest]), 0.0
    for k in (1, 2, 3):
        for chosen in itertools.combinations(range(3), k):
            masked = torch.zeros_like(x0, dtype=torch.bool)
            masked[0, [len(prompt) + i for i in chosen]] = True
            nll = memdlm.response_nll(model.backbone, model.s, x0, masked, torch.ones_like(masked)).sum()
            exact -= float(nll) * 3 / k / 3 / math.comb(3, k)
    assert value == pytest.approx(exact, rel=0.03) and greedy is False
    said = model.generate_until(requests(("What is it? ", {"max_gen_toks": 3})), disable_tqdm=True)[0]
    assert len(model.tokenizer.encode(said)) != 3 or model.loglikelihood(requests(("What is it? ", said)), disable_tqdm=True)[0][1]
    again, = model.loglikelihood(requests(("What is it? ", "It.")), disable_tqdm=True)
    assert again[0] == value
    model.adapt, model.mc = True, 100
    assert model.loglikelihood(requests(("What is it? ", "It.")), disable_tqdm=True)[0][0] != value
    assert model.loglikelihood_rolling(requests(("It.",)))[0] < 0
    assert model.loglikelihood(requests(("x", "")), disable_tqdm=True) == [(0.0, True)]


@pytest.mark.slow
def test_the_harness_runs_its_own_tasks_and_leaves_its_own_files(place, tmp_path):
    """BABILong at two lengths, the limit counting from the first sample of each; with and without adaptation."""
    command = ["--tasks", "babilong_qa1", "--lengths", "1024,2048", "--limit", "2", "--batch-size", "2"]
    for which, adapt in ((["--model", place / "llada-moe", "--load-4bit"], ["--adapt"]), ([place / "run"], [])):
        out = tmp_path / f"out{len(adapt)}"
        code, said, err = run_here(place, [*which, *command, *adapt, "--out", out])
        assert code == 0, err[-2000:]
        scores = json.loads((out / "scores.json").read_text())
        assert [(r["task"], r["length"], r["metric"], r["samples"], r["adapt"]) for r in scores] == [
            ("babilong_qa1", n, "acc", 2, bool(adapt)) for n in (1024, 2048)]
        assert said.count("babilong_qa1") == 2
        for length in (1024, 2048):
            results, = (out / str(length)).rglob("results_*.json")
            samples, = (out / str(length)).rglob("samples_babilong_qa1_*.jsonl")
            assert json.loads(results.read_text())["n-samples"]["babilong_qa1"]["effective"] == 2
            rows = [json.loads(line) for line in samples.read_text().splitlines()]
            assert [r["doc"]["target"] for r in rows] == ["hall", "office"] and all(len(r["resps"][0]) == 1 for r in rows)


def run_here(place, arguments):
    """evaluate.py with `place` as the working directory, where the local data are found."""
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", *map(str, arguments)], cwd=place, capture_output=True, text=True,
                          env=ENV)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_longbench_and_the_harness_command_line(place, tmp_path):
    code, said, err = run_here(place, [place / "run", "--tasks", "longbench_trec", "--out", tmp_path / "o"])
    assert code == 0 and "classification_score" in said, err[-2000:]
    code, said, err = run_here(place, ["lm_eval", "run", "--model", "memdlm", "--model_args",
                                            f"model={place / 'llada-moe'},adapt=True,inner_lr=0.2", "--tasks", "babilong_qa1",
                                            "--metadata", '{"max_seq_lengths":"1k"}', "--limit", "2", "--batch_size", "2"])
    assert code == 0 and "babilong_qa1" in said, err[-2000:]


@pytest.mark.slow
def test_a_ruler_task_that_cannot_fit_ends_in_one_line(place, tmp_path):
    code, said, err = run_here(place, ["--model", place / "llada-moe", "--tasks", "ruler_vt", "--lengths", "1024", "--wait", "8",
                                            "--out", tmp_path / "o"])
    assert code == 2 and "error: the task's samples were not made in time" in err and "Traceback" not in err


def test_ruler_reports_lengths_that_it_did_not_measure_and_these_are_left_out():
    results = {"results": {"ruler_vt": {"alias": "x", "sample_len": 2, "1024,none": 0.4, "1024_stderr,none": "N/A", "4096,none": -1},
                           "babilong_qa1": {"acc,none": 0.5, "acc_stderr,none": 0.1}},
               "n-samples": {"ruler_vt": {"effective": 5, "original": 500}}}
    assert read_scores(results, 1024) == [{"task": "ruler_vt", "metric": "1024", "value": 0.4, "samples": 5},
                                                   {"task": "babilong_qa1", "metric": "acc", "value": 0.5, "samples": None}]


def test_each_family_is_told_its_length_in_its_own_way():
    assert task_metadata("niah_multivalue", 4096, "t") == {"max_seq_lengths": [4096], "tokenizer": "t"}
    assert task_metadata("babilong_longctx", 32768, "t") == {"max_seq_lengths": "32k"}
    assert task_metadata("longbench_trec", 4096, "t") == {}


@pytest.mark.slow
def test_chat_template_and_refusals(place, cli):
    model = asked(place)
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>" and "/" not in model.tokenizer_name
    assert model.tokenizer.encode(text)[0] == model.tokenizer.added["<role>"]
    words = ["--steps", "1", "--batch", "2", "--no-control", "--table-samples", "0", "--width", "16", "--heads", "2"]
    assert cli(train, *words, "--out", "words")[0] == 0
    assert "train on bytes: --data python" in refused(cli(evaluate, "words", "--tasks", "babilong_qa1"))
    code, _, err = cli(evaluate, place / "run", "--tasks", "no_such_task")  # the harness warns of its own first
    assert code == 2 and "error: lm-evaluation-harness has no task 'no_such_task'" in err
    assert "unrecognized arguments" in refused(cli(evaluate, place / "run", place / "run", "--tasks", "babilong_qa1"))


@pytest.mark.parametrize("line, command, flag", [
    ("--limit 3", "compare", "--limit"), ("--adapt", "compare", "--adapt"),
    ("compare --load-4bit", "compare", "--load-4bit"), ("--seeds 3", "compare", "--seeds"),
    ("--exposure --inner-lr 0.1", "exposure", "--inner-lr"),
    ("exposure --picture p", "exposure", "--picture"),
    ("--tasks x --exposure", "tasks", "--exposure"), ("tasks x --samples 5", "tasks", "--samples"),
    ("--paper toy --tasks x", "tasks", "--paper"), ("paper runs/a --quick", "paper", "--quick"),
    ("tasks x run another", "tasks", "another"), ("claims --limit 3", "claims", "--limit")])
def test_a_flag_that_would_do_nothing_is_refused(cli, line, command, flag):
    message = refused(cli(evaluate, *line.split()))
    assert f"unrecognized arguments: {flag}" in message and f"evaluate.py {command} --help" in message


@pytest.mark.parametrize("old, new", [
    ("", "compare"), ("runs/a runs/b --samples 5", "compare runs/a runs/b --samples 5"),
    ("runs/a --exposure --out x", "exposure runs/a --out x"), ("--paper", "paper"),
    ("--paper scores", "paper scores"), ("--paper toy --quick", "claims --quick"),
    ("--tasks a,b runs/a --adapt", "tasks a,b runs/a --adapt"),
    ("runs/a --adapt --tasks a,b", "tasks a,b runs/a --adapt"),
    ("--tasks=a,b --limit 3", "tasks a,b --limit 3"), ("claims --quick", "claims --quick")])
def test_old_spellings_go_on_working(old, new):
    assert evaluate.new_spelling(old.split()) == new.split()


def test_the_papers_tables_with_ours_beside_them(tmp_path, capsys):
    score = {"model": "LLaDA-MoE", "task": "ruler_vt", "length": 4096, "metric": "4096", "value": 0.5, "samples": 9, "other": {}}
    baba = score | {"task": "babilong_longctx", "length": 1024, "metric": "acc", "memory": True, "adapt": True}
    rows = [score | {"memory": False, "adapt": False, "other": {"memory": False}}, score | {"memory": True, "adapt": True, "value": 0.75},
            score | {"memory": False, "adapt": True, "value": 0.25, "other": {"memory": False}}, baba | {"value": 0.61, "other": {"clip": "none"}},
            score | {"memory": True, "adapt": True, "value": 0.99, "other": {"inner_lr": 0.3}}]  # another eta: not the paper's row
    (tmp_path / "a").mkdir()
    (tmp_path / "a/scores.json").write_text(json.dumps(rows))
    print_tables(tmp_path)
    out = capsys.readouterr().out.splitlines()
    cells = lambda start: next(line for line in out if line.startswith(f"| {start} |")).split(" | ")
    assert cells("MDLM")[3] == "99.40 / 50.00" and cells("train-only")[3] == "99.52 / -"
    assert cells("train & inference")[3] == "99.60 / 75.00" and cells("MDLM, adapted")[3] == "- / 25.00"
    assert "| clipping: none | 68.2 | 61.00 |" in out and "| default | 68.4 | - |" in out
