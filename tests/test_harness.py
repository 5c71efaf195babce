"""lm-evaluation-harness on our models, and the command line of evaluate.py. Offline.

The harness's own tasks run unmodified, on small local data that has the form of the hub's.
"""
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cli import TINY, refused

import evaluate
import generate
import memdlm
import train
from backbones.block_cache import BlockCache
from backbones.tiny import write_tiny
from data import Sample, collate
from paper.harness import make_harness_class, read_scores, task_metadata
from paper.scores import add_scores, load_scores
from paper.tables import print_tables

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a toy run on bytes, tiny real models, and data named like the hub's.

    The harness finds the data here when this folder is the working directory.
    """
    root = tmp_path_factory.mktemp("harness")
    subprocess.run([sys.executable, ROOT / "train.py", *TINY, "--data", "python",
                    "--prompt-length", "24", "--response-length", "8", "--no-control",
                    "--table-samples", "0", "--out", "run"],
                   cwd=root, check=True, capture_output=True)
    for name in ("llada-moe", "llada2.1-mini"):
        write_tiny(name, root / name)
    people = [{"input": f"{name} went to the {place}. Bo slept.", "question": f"Where is {name}?",
               "target": place}
              for name, place in (("Ann", "hall"), ("Mary", "office"), ("John", "yard"),
                                  ("Eve", "attic"))]
    question = {"context": "What is red ? color\nWho is Bo ? person", "question": "Who is Ann ?",
                "answers": ["person"], "all_classes": ["color", "person"],
                "input": "Who is Ann ?", "length": 9, "dataset": "trec", "language": "en"}
    write_data_set(root / "RMT-team/babilong-1k-samples",
                   {("1k", "qa1"): people, ("2k", "qa1"): people[:3]})
    write_data_set(root / "Xnhyacinth/LongBench", {("trec", "test"): [question] * 2})
    return root


def write_data_set(folder, splits):
    """A data set in the hub's layout. splits: {(configuration, split): records}."""
    lines = ["---", "configs:"]
    for (config, split), records in splits.items():
        (folder / config).mkdir(parents=True)
        (folder / config / f"{split}.json").write_text(json.dumps(records))
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}",
                  f"    path: {config}/{split}.json"]
    (folder / "README.md").write_text("\n".join([*lines, "---"]))


def open_harness(place, which="llada-moe", **options):
    """The Harness of the toy run or of a tiny real model."""
    if which == "run":
        return make_harness_class()(run=str(place / "run"), **options)
    return make_harness_class()(model=str(place / which), rank=4, alpha=8.0, **options)


def make_requests(*arguments):
    return [SimpleNamespace(args=a) for a in arguments]


# ---- Answers and likelihoods --------------------------------------------------------------------

CONTEXTS = ["Hi there, who are you and what?", "a", "What comes after three? I wonder, what", "",
            "Hello"]


@pytest.mark.parametrize("which", ["run", "llada-moe", "llada2.1-mini"])
@pytest.mark.parametrize("adapt", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_batch_of_requests_is_answered_like_each_alone(place, which, adapt):
    """In their order, each with its own phi; and as generate.py answers."""
    model = open_harness(place, which, adapt=adapt, batch_size=3)
    requests = make_requests(*((context, {"max_gen_toks": 6 if i % 2 else 9, "until": []})
                               for i, context in enumerate(CONTEXTS)))
    together = model.generate_until(requests, disable_tqdm=True)
    model.batch_size = 1
    assert together == model.generate_until(requests, disable_tqdm=True)
    ids = model.tokenizer.encode(CONTEXTS[2])
    sample = Sample(ids, [0] * 9, [True] * 9)
    options = {"threshold": 0.95} if which == "llada2.1-mini" else {}
    batch, phi = collate([sample], ["0 2"], False), None
    if adapt:
        phi, _ = memdlm.adapt(model.backbone, model.s, batch.prompt, batch.prompt_valid, ["0 2"])
    own, = generate.answer(model.s, model.data, model.model, [sample], phi, "0 2", **options)
    assert own.text == together[2]


def test_another_objective_is_not_the_papers(place):
    model = open_harness(place, "llada-moe")
    usual = model.describe_method()["other"]
    model.s = replace(model.s, objective="papl")
    assert model.describe_method()["other"] == usual | {"objective": "papl"} != usual


def test_options_of_the_decoder(place):
    """They reach it as from generate.py, belong to a score's key, and are refused in one line."""
    given = dict(block_length=4, threshold=0.1, cache="block")
    model = open_harness(place, "llada-moe", **given)
    options = model.decoder_options()
    assert options["make_look"] is BlockCache
    assert (options["block_length"], options["threshold"]) == (4, 0.1)
    assert model.describe_method()["options"].items() >= given.items()
    requests = make_requests(("Hello", {"max_gen_toks": 9, "until": []}))
    text, = model.generate_until(requests, disable_tqdm=True)
    ids = model.tokenizer.encode("Hello")
    own, = generate.answer(model.s, model.data, model.model, [Sample(ids, [0] * 9, [True] * 9)],
                           False, "0 0", **options)
    assert own.text == text
    for which, wrong, message in (
            ("llada-moe", dict(threshold=1.5), "between 0 and 1"),
            ("llada-moe", dict(threshold="x"), "between 0 and 1"),
            ("llada-moe", dict(cache="all"), "none or block"),
            ("llada-moe", dict(block_length=-1), "whole number"),
            ("llada2.1-mini", dict(cache="block"), "always keeps"),
            ("llada2.1-mini", dict(block_length=4), "not for this model"),
            ("run", dict(cache="block"), "small enough")):
        with pytest.raises(ValueError, match=message):
            open_harness(place, which, **wrong)


def test_stop_strings_and_long_prompts(place, monkeypatch):
    model = open_harness(place, max_length=20)
    said = "one\ntwo;three"
    monkeypatch.setattr(type(model), "decode", lambda self, jobs: [said] * len(jobs))

    def answer(until):
        request = make_requests(("x", {"max_gen_toks": 4, "until": until}))
        return model.generate_until(request, disable_tqdm=True)[0]

    assert answer([]) == said
    assert answer(["\n"]) == "one"
    assert answer([";", "\n"]) == "one"
    assert answer("two") == "one\n"
    assert answer([""]) == said
    text = "abcdefghijklmnopqrstuvwxyz"
    decode = model.tokenizer.decode
    assert decode(model.encode_prompt(text, 4)) == text[-16:] and model.cut == 1
    assert decode(model.encode_prompt("abc", 4)) == "abc" and model.cut == 1


def invented_nll(backbone, s, x0, masked, valid, phi=None):
    """A loss that depends a lot on what else is masked."""
    factor = 1 if phi is None else 2
    return masked * masked.sum(1, keepdim=True) ** 2 * torch.arange(masked.shape[1]) * factor


def test_likelihood_by_monte_carlo_against_all_masks(place, monkeypatch):
    """n = 3: the mean over k = 1..3 and all masks of k of the three tokens, of n / k times the loss
    at them."""
    monkeypatch.setattr(memdlm, "response_nll", invented_nll)
    model = open_harness(place, mc_samples=4000, batch_size=100)

    def score(context, continuation):
        request = make_requests((context, continuation))
        return model.loglikelihood(request, disable_tqdm=True)

    (value, greedy), = score("What is it?", "It.")
    prompt, rest = (model.tokenizer.encode(t) for t in ("What is it?", "It."))
    x0, exact = torch.tensor([prompt + rest]), 0.0
    for k in (1, 2, 3):
        for chosen in itertools.combinations(range(3), k):
            masked = torch.zeros_like(x0, dtype=torch.bool)
            masked[0, [len(prompt) + i for i in chosen]] = True
            nll = memdlm.response_nll(model.backbone, model.s, x0, masked,
                                      torch.ones_like(masked)).sum()
            exact -= float(nll) * 3 / k / 3 / math.comb(3, k)
    assert value == pytest.approx(exact, rel=0.03) and greedy is False
    said, = model.generate_until(make_requests(("What is it?", {"max_gen_toks": 3})),
                                 disable_tqdm=True)
    assert len(model.tokenizer.encode(said)) != 3 or score("What is it?", said)[0][1]
    again, = score("What is it?", "It.")
    assert again[0] == value
    model.mc_samples = 100
    alone, = score("", "It.")
    model.adapt = True
    assert score("What is it?", "It.")[0][0] != value
    assert score("", "It.")[0] == alone  # there is no prompt to write phi from
    assert model.loglikelihood_rolling(make_requests(("It.",)))[0] < 0


@pytest.mark.slow
def test_chat_template_and_refusals(place, cli):
    model = open_harness(place)
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>"
    assert "/" not in model.tokenizer_name
    assert model.tokenizer.encode(text)[0] == model.tokenizer.added["<role>"]
    words = ["--steps", "1", "--batch", "2", "--no-control", "--table-samples", "0",
             "--width", "16", "--heads", "2"]
    assert cli(train, *words, "--out", "words")[0] == 0
    line = refused(cli(evaluate, "words", "--tasks", "babilong_qa1"))
    assert "train on bytes: --data python" in line
    run = place / "run"
    code, _, err = cli(evaluate, run, "--tasks", "no_such_task")  # the harness itself warns first
    assert code == 2 and "error: lm-evaluation-harness has no task 'no_such_task'" in err
    line = refused(cli(evaluate, run, run, "--tasks", "babilong_qa1"))
    assert "unrecognized arguments" in line


# ---- The harness's own tasks --------------------------------------------------------------------

def run_evaluate(place, arguments):
    """evaluate.py with `place` as the working directory, where the local data are found."""
    result = subprocess.run([sys.executable, ROOT / "evaluate.py", *map(str, arguments)],
                            cwd=place, capture_output=True, text=True, env=ENV)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("which, adapt", [("llada-moe", True), ("run", False)])
def test_the_harness_runs_its_own_tasks_and_leaves_its_own_files(place, tmp_path, which, adapt):
    """BABILong at two lengths, the limit counting from the first sample of each."""
    command = ["--model", place / which, "--load-4bit"] if which != "run" else [place / which]
    command += ["--tasks", "babilong_qa1", "--lengths", "1024,2048", "--limit", "2",
                "--batch-size", "2", *(["--adapt"] if adapt else []), "--out", tmp_path]
    code, said, err = run_evaluate(place, command)
    assert code == 0, err[-2000:]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [(r["task"], r["length"], r["metric"], r["samples"], r["adapt"]) for r in scores] == [
        ("babilong_qa1", n, "acc", 2, adapt) for n in (1024, 2048)]
    assert said.count("babilong_qa1") == 2
    for length in (1024, 2048):
        results, = (tmp_path / str(length)).rglob("results_*.json")
        samples, = (tmp_path / str(length)).rglob("samples_babilong_qa1_*.jsonl")
        numbers = json.loads(results.read_text())["n-samples"]
        assert numbers["babilong_qa1"]["effective"] == 2
        records = [json.loads(line) for line in samples.read_text().splitlines()]
        assert [r["doc"]["target"] for r in records] == ["hall", "office"]
        assert all(len(r["resps"][0]) == 1 for r in records)


@pytest.mark.slow
def test_longbench_and_the_harness_command_line(place, tmp_path):
    code, said, err = run_evaluate(place, [place / "run", "--tasks", "longbench_trec",
                                           "--out", tmp_path / "o"])
    assert code == 0 and "classification_score" in said, err[-2000:]
    model_args = f"model={place / 'llada-moe'},adapt=True,inner_lr=0.2"
    code, said, err = run_evaluate(place, [
        "lm_eval", "run", "--model", "memdlm", "--model_args", model_args,
        "--tasks", "babilong_qa1", "--metadata", '{"max_seq_lengths":"1k"}', "--limit", "2",
        "--batch_size", "2"])
    assert code == 0 and "babilong_qa1" in said, err[-2000:]


@pytest.mark.slow
def test_a_ruler_task_that_cannot_fit_ends_in_one_line(place, tmp_path):
    code, said, err = run_evaluate(place, [
        "--model", place / "llada-moe", "--tasks", "ruler_vt", "--lengths", "1024", "--wait", "8",
        "--out", tmp_path / "o"])
    assert code == 2 and "error: the task's samples were not made in time" in err
    assert "Traceback" not in err


def test_every_score_of_the_harness_is_kept_under_its_own_name():
    """All metrics, filters, groups and errors, also scores below zero.

    RULER reports lengths that it did not measure as -1. These are no scores.
    """
    ruler = {"alias": "x", "sample_len": 2, "1024,none": 0.4, "1024_stderr,none": "N/A",
             "4096,none": -1}
    maths = {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1,
             "exact_match,flexible": 0.5, "exact_match_stderr,flexible": "N/A",
             "gain,none": -1.0, "4096,none": -1, "my_stderr,none": 0.3, "bits,none": None}
    results = {"results": {"ruler_vt": ruler, "maths": maths, "all": {"acc,none": 0.5,
                                                                      "sample_len": 7}},
               "n-samples": {"ruler_vt": {"effective": 5, "original": 500}}}
    assert read_scores(results, 1024) == [
        {"task": "ruler_vt", "metric": "1024", "value": 0.4, "samples": 5},
        {"task": "maths", "metric": "exact_match", "value": 0.25, "samples": None,
         "filter": "strict", "stderr": 0.1},
        {"task": "maths", "metric": "exact_match", "value": 0.5, "samples": None,
         "filter": "flexible"},
        {"task": "maths", "metric": "gain", "value": -1.0, "samples": None},
        {"task": "maths", "metric": "4096", "value": -1, "samples": None},
        {"task": "maths", "metric": "my_stderr", "value": 0.3, "samples": None},
        {"task": "maths", "metric": "bits", "value": None, "samples": None},
        {"task": "all", "metric": "acc", "value": 0.5, "samples": 7}]


def test_each_suite_is_told_its_length_in_its_own_way():
    ruler = {"max_seq_lengths": [4096], "tokenizer": "t"}
    assert task_metadata("niah_multivalue", 4096, "t") == ruler
    assert task_metadata("babilong_longctx", 32768, "t") == {"max_seq_lengths": "32k"}
    assert task_metadata("longbench_trec", 4096, "t") == {}


# ---- What is refused, before anything is loaded -------------------------------------------------

@pytest.mark.parametrize("task, lengths, wrong", [
    ("babilong_qa1", "1500", 1500), ("babilong_longctx", "4096,1023", 1023),
    ("babilong_qa6", "4096", 4096), ("babilong", "1024", 1024), ("ruler_vt", "0", 0)])
def test_a_length_that_a_task_does_not_have_is_refused(cli, task, lengths, wrong):
    """Before the model is looked for: there is none of this name."""
    line = refused(cli(evaluate, "tasks", task, "--model", "no/where", "--lengths", lengths))
    assert f"{task} has no length {wrong}; it has " in line


@pytest.mark.parametrize("flags, part", [
    ("--lengths 4k", "a length is '4k'"), ("--lengths 4096,", "a length is ''"),
    ("--lengths=-1", "a length is -1"), ("--limit 0", "limit"), ("--limit 2.5", "limit"),
    ("--limit nan", "limit"), ("--limit -0.5", "limit"), ("--num-fewshot -1", "--num-fewshot is"),
    ("--wait 0", "--wait is 0"), ("--batch-size 0", "--batch-size is 0"), ("--steps -1", "--steps"),
    ("--mc-samples 0", "--mc-samples is 0"), ("--max-length -5", "--max-length is -5"),
    ("--wait 99999999999", "wait is 99999999999"), ("runs/a", "not both")])
def test_numbers_out_of_their_range_are_refused(cli, flags, part):
    words = ["tasks", "babilong_qa1", "--model", "no/where", *flags.split()]
    assert part in refused(cli(evaluate, *words))


@pytest.mark.parametrize("options, part", [
    ({"batch_size": "auto"}, "batch_size is 'auto'"), ({"batch_size": "auto:4"}, "'auto:4'"),
    ({"batch_size": 0}, "batch_size is 0"), ({"batch_size": "two"}, "batch_size is 'two'"),
    ({"mc_samples": 0}, "mc_samples is 0"), ({"mc_samples": 1.5}, "mc_samples is 1.5"),
    ({"steps": -1}, "steps is -1"), ({"max_length": -1}, "max_length is -1"),
    ({"seed": "x"}, "seed is 'x'"), ({"adapt": "yes"}, "adapt is 'yes'"),
    ({"mode": "fast"}, "mode is 'fast'"), ({"pretrained": "x"}, "unknown argument 'pretrained'"),
    ({"lr": 0.1}, "unknown argument 'lr'"), ({"inner_lr": "big"}, "inner_lr is 'big'"),
    ({"rank": -1}, "rank is -1"), ({"rank": 4.5}, "rank is 4.5"), ({"mode": "speed"}, "LLaDA2.x"),
    ({"run": "runs/a"}, "not both"), ({"closed_book": True}, "unknown argument 'closed_book'")])
def test_arguments_of_the_model_are_known_and_in_range(place, options, part):
    with pytest.raises(ValueError, match=part) as error:
        make_harness_class()(model=str(place / "llada-moe"), **options)
    assert "\n" not in str(error.value)


def test_what_the_harness_passes_on_its_own_is_taken(place):
    model = make_harness_class().create_from_arg_string(
        f"model={place / 'llada-moe'},rank=4,alpha=8.0,adapt=True",
        {"batch_size": "3", "max_batch_size": 64, "device": "cuda:0", "trust_remote_code": True})
    assert model.batch_size == 3 and model.adapt is True and model.s.rank == 4


# ---- The command line of evaluate.py ------------------------------------------------------------

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
    assert f"unrecognized arguments: {flag}" in message
    assert f"evaluate.py {command} --help" in message


@pytest.mark.parametrize("old, new", [
    ("", "compare"), ("runs/a runs/b --samples 5", "compare runs/a runs/b --samples 5"),
    ("runs/a --exposure --out x", "exposure runs/a --out x"), ("--paper", "paper"),
    ("--paper scores", "paper scores"), ("--paper toy --quick", "claims --quick"),
    ("--tasks a,b runs/a --adapt", "tasks a,b runs/a --adapt"),
    ("runs/a --adapt --tasks a,b", "tasks a,b runs/a --adapt"),
    ("--tasks=a,b --limit 3", "tasks a,b --limit 3"), ("claims --quick", "claims --quick")])
def test_old_spellings_go_on_working(old, new):
    assert evaluate.respell(old.split()) == new.split()


# ---- scores.json ------------------------------------------------------------------------------

ROW = {"task": "babilong_qa1", "metric": "acc", "length": 1024, "model": "LLaDA-MoE",
       "weights": "w", "run": "runs/a", "adapter": None, "memory": True, "adapt": True, "other": {},
       "options": {}, "limit": None, "value": 0.5, "samples": 9, "longest": 1000, "cut": 0}


@pytest.mark.parametrize("change", [
    {"task": "babilong_qa2"}, {"metric": "f1"}, {"filter": "strict"}, {"length": 2048},
    {"weights": "v"}, {"run": "runs/b"}, {"adapter": "x"}, {"memory": False}, {"adapt": False},
    {"other": {"inner_lr": 0.3}}, {"options": {"chat_template": True}}, {"limit": 2}], ids=str)
def test_only_a_score_of_the_same_name_is_replaced(tmp_path, change):
    path = tmp_path / "new" / "scores.json"
    add_scores(path, [ROW])
    add_scores(path, [ROW | change])
    assert load_scores(path) == [ROW, ROW | change]
    again = ROW | {"value": 0.25, "samples": 8, "longest": 2, "cut": 1, "stderr": 0.1}
    add_scores(path, [again])
    assert load_scores(path) == [ROW | change, again]


def test_a_name_in_a_file_of_scores_does_not_steer_the_terminal(tmp_path, cli):
    (tmp_path / "scores.json").write_text(json.dumps([ROW | {"task": "a\033[2Jb", "run": "\033c"}]))
    code, out, _ = cli(evaluate, "paper", tmp_path)
    assert code == 0 and "a\\x1b[2Jb" in out and "\033" not in out


def test_old_files_are_read_and_damaged_ones_refused(tmp_path, cli):
    old = {key: ROW[key] for key in ("task", "metric", "length", "model", "memory", "adapt",
                                     "other", "value", "samples")}
    path = tmp_path / "scores.json"
    path.write_text(json.dumps([old, old | {"value": 0.1}]))
    add_scores(path, [ROW])
    assert load_scores(path) == [old, old | {"value": 0.1}, ROW]
    for text in ("[", "{}", "[3]", "[{}]", json.dumps([old | {"other": [1]}]), "9", "\ufffe",
                 json.dumps([old, old | {"memory": "x"}]), json.dumps([old | {"filter": 3}]),
                 json.dumps([old | {"run": ["x"]}])):
        path.write_text(text)
        assert "scores.json" in refused(cli(evaluate, "paper", tmp_path))
        line = refused(cli(evaluate, "tasks", "babilong_qa1", "--model", "no/where", "--out",
                           tmp_path))
        assert "scores.json" in line
        assert path.read_text() == text


@pytest.mark.slow
def test_three_commands_give_three_rows_in_the_default_folder(place, tmp_path):
    """C1: a base model, a run without memory of the prompts, and the same with it."""
    for name in ("run", "llada-moe", "RMT-team"):
        (tmp_path / name).symlink_to(place / name)
    common = ["--lengths", "1024", "--limit", "1", "--out", "results/lm_eval"]
    for words in (["--model", "llada-moe"], ["run"], ["run", "--adapt"], ["run", "--adapt"]):
        code, _, err = run_evaluate(tmp_path, ["tasks", "babilong_qa1", *words, *common[:4]])
        assert code == 0, err[-2000:]
    rows = load_scores(tmp_path / "results/lm_eval/scores.json")
    assert [(row["run"], row["weights"], row["adapt"], row["memory"]) for row in rows] == [
        (None, "llada-moe", False, None), ("run", "toy", False, True), ("run", "toy", True, True)]
    assert all(row["limit"] == 1 and row["samples"] == 1 and row["longest"] > 100 for row in rows)
    code, said, _ = run_evaluate(tmp_path, ["paper"])
    assert code == 0 and said.count("babilong_qa1 | 1024 | acc") == 3
    assert "LLaDA-MoE llada-moe | not trained here" in said and "toy run | train-only" in said


# ---- The paper's tables -------------------------------------------------------------------------

def test_the_papers_tables_with_ours_beside_them(tmp_path, capsys):
    ruler = {"model": "LLaDA-MoE", "task": "ruler_vt", "length": 4096, "metric": "4096",
             "value": 0.5, "samples": 9, "other": {}}
    mdlm = ruler | {"memory": False, "other": {"memory": False}}
    adapted = ruler | {"memory": True, "adapt": True}
    babilong = adapted | {"task": "babilong_longctx", "length": 1024, "metric": "acc"}
    scores = [mdlm | {"adapt": False}, adapted | {"value": 0.75},
              mdlm | {"adapt": True, "value": 0.25},
              babilong | {"value": 0.61, "other": {"clip": "none"}},
              adapted | {"value": 0.99, "other": {"inner_lr": 0.3}}]  # not the paper's eta
    (tmp_path / "a").mkdir()
    (tmp_path / "a/scores.json").write_text(json.dumps(scores))
    print_tables(tmp_path)
    lines = capsys.readouterr().out.splitlines()

    def cells(method):
        """The cells of a method's row in the first table."""
        rows = [line for line in lines if line.startswith(f"| {method} |")]
        return rows[0].split(" | ")

    assert cells("MDLM")[3] == "99.40 / 50.00" and cells("train-only")[3] == "99.52 / -"
    assert cells("train & inference")[3] == "99.60 / 75.00"
    assert cells("MDLM, adapted")[3] == "- / 25.00"
    assert "| clipping: none | 68.2 | 61.00 |" in lines and "| default | 68.4 | - |" in lines


def test_a_line_of_a_table_never_mixes_models_limits_or_settings(tmp_path, capsys):
    whole = ROW | {"task": "ruler_vt", "length": 4096, "metric": "4096"}
    longer = whole | {"length": 8192, "metric": "8192", "value": 0.125}
    add_scores(tmp_path / "scores.json", [
        whole, longer, whole | {"run": "runs/b", "value": 0.75},
        longer | {"limit": 20, "samples": 20, "value": 0.25},
        whole | {"options": {"num_fewshot": 2}, "value": 1.0},
        whole | {"run": None, "memory": None, "value": 0.0625},
        whole | {"filter": "strict", "value": 0.9}, whole | {"task": "mine", "value": -3.5},
        whole | {"memory": False, "adapt": False, "limit": 0.5, "samples": 250}])
    print_tables(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    found = {cells[0][2:]: (cells[3], cells[4]) for cells in
             (line.split(" | ") for line in lines[:lines.index("Table 1, LLaDA2.1 (percent; "
                                                               "paper / ours)")]) if cells[3:]}
    ours = "train & inference"
    assert found[f"{ours}, runs/a"] == ("99.60 / 50.00", "95.80 / 12.50")
    assert found[f"{ours}, runs/b"] == ("99.60 / 75.00", "95.80 / -")
    assert found[f"{ours}, runs/a, limit 20"] == ("99.60 / -", "95.80 / 25.00 (20 samples)")
    assert found[f"{ours}, runs/a, num_fewshot 2"] == ("99.60 / 100.00", "95.80 / -")
    assert found["MDLM, limit 0.5"] == ("99.40 / 50.00 (250 samples)", "78.84 / -")
    assert found["not trained here, adapted"] == ("- / 6.25", "- / -")
    assert "not trained here" not in found and found["MDLM, adapted"] == ("- / -", "- / -")
    assert "| mine | 4096 | 4096 | -3.5 | 9 | LLaDA-MoE runs/a | train & inference |  |" in lines
