"""The studies beside the claims: attention, ways to take memory apart, baselines, the ladder.

Gradients of the parts are compared with those that autograd gives for the whole, attention with
sums by hand.
"""
import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import bench
import evaluate
import memdlm
from backbones.families import PUBLISHED, translate
from compare import measure
from data import collate
from paper import baselines, ladder, lora_rows, pretrained, runs, variants
from paper.claims import judge_rows
from paper.measures import (
    attention_of, find_needles, measure_retrieval, summarise_attention,
)
from paper.report import claims_table
from runs import build
from settings import Settings
from toy import tasks
from train import make_batch

TINY = runs.Size(2, 2, 2, 2, 2, 3, (20, 24, 32, 40), True)


@pytest.fixture
def toy():
    """Settings, model and a training batch of the tuned text."""
    s = Settings(data="prose", batch=3, per_sample=True, inner_lr=0.1, seed=5, threads=1)
    data, model = build(s, say=lambda text: None)
    return s, model.eval(), make_batch(s, data, 0)


# ---- Attention ----------------------------------------------------------------------------------

def test_entropy_and_share_by_hand():
    needle = torch.zeros(1, 8, dtype=torch.bool)
    needle[0, 2] = needle[0, 3] = True
    even = torch.full((1, 2, 8), 1 / 8)  # [gaps, heads, L]
    entropy, share = summarise_attention(even, needle)
    assert entropy == pytest.approx(torch.tensor(8.0).log().item()) and share == pytest.approx(0.25)
    for place, there in ((3, 1), (5, 0)):
        sharp = torch.zeros(1, 2, 8)
        sharp[..., place] = 1
        assert summarise_attention(sharp, needle) == (0, there)


def test_attention_is_that_of_the_model_brute_force(toy):
    backbone, outputs = toy[1].backbone, []
    samples = [tasks.dictionary(random.Random(length), length) for length in (20, 12)]
    batch = collate(samples, ["long", "padded"], False)
    layer = backbone.layers[0].attn
    layer.o_proj.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    caught = []
    layer.register_forward_pre_hook(lambda module, inputs: caught.append(inputs))
    with torch.no_grad(), attention_of(backbone, batch.maskable) as weights:
        backbone.blocks(backbone.embed(batch.x0), batch.valid, 0, None)
    assert len(weights) == backbone.num_layers
    # The weights times the values are what the block made of its heads.
    h, mask = caught[0]
    B, L, D = h.shape
    v = layer.v_proj(h).view(B, L, layer.heads, -1)
    rows = iter(weights[0])
    for b, i in batch.maskable.nonzero().tolist():
        row = next(rows)  # [heads, L]
        by_hand = sum(row[:, j, None] * v[b, j] for j in range(L) if batch.valid[b, j])
        assert torch.allclose(by_hand.flatten(), outputs[0][b, i], atol=1e-5)
        assert torch.allclose(row.sum(-1), torch.ones(layer.heads))
        assert not row[:, ~batch.valid[b]].any()


def test_needles_are_found_where_the_prompt_states_the_pair():
    sample = tasks.Sample([7, 70, 8, 80, 7, 70, 9, 90], [1, 8, 80, 7, 70],
                          [False, False, True, False, True])
    batch = collate([sample], ["x"], False)
    places = [row.nonzero().flatten().tolist() for row in find_needles([sample], batch)]
    assert places == [[2, 3], [0, 1, 4, 5]]


# ---- Memory taken apart -------------------------------------------------------------------------

def gradient(model, batch):
    model.zero_grad()
    loss, _ = model(batch)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def variant(name, toy):
    s, model, _ = toy
    return variants.VARIANTS[name](model.backbone, s).eval()


def test_without_a_write_every_part_is_plain_training(toy):
    """phi = 0 explains nothing and changes no path."""
    s, model, batch = toy
    plain = gradient(memdlm.MemDLM(model.backbone, replace(s, memory=False)), batch)
    still = replace(s, inner_lr=0.0), model, batch
    for name in ("another", "shuffled", "error", "path", "weights"):
        assert torch.allclose(gradient(variant(name, still), batch), plain, atol=1e-6), name


def test_error_and_path_are_the_two_factors_of_the_gradient(toy):
    """By the chain rule: error of phi through phi is MemDLM; each part swaps one factor."""
    s, model, batch = toy
    whole, plain = (gradient(memdlm.MemDLM(model.backbone, replace(s, memory=memory)), batch)
                    for memory in (True, False))

    class Both(variants.TwoPasses):
        @staticmethod
        def combine(head, plain, given_phi, target):
            error = variants.logit_error(head, given_phi, target)
            return (error * head(given_phi).float()).sum(-1)

    class Neither(variants.TwoPasses):
        @staticmethod
        def combine(head, plain, given_phi, target):
            return (variants.logit_error(head, plain, target) * head(plain).float()).sum(-1)

    assert torch.allclose(gradient(Both(model.backbone, s), batch), whole, atol=1e-5)
    assert torch.allclose(gradient(Neither(model.backbone, s), batch), plain, atol=1e-5)
    error, path = (gradient(variant(name, toy), batch) for name in ("error", "path"))
    apart = [(a - b).norm() / whole.norm() for a, b in ((error, whole), (path, whole),
                                                         (error, plain), (path, plain))]
    assert min(apart) > 1e-3, apart


def test_a_replaced_phi_is_what_it_says(toy):
    s, _, batch = toy
    phi = variant("plain", toy), memdlm.fresh_phi(toy[1].backbone, s, batch.seeds)
    written = {name: (A, torch.randn_like(B)) for name, (A, B) in phi[1].items()}
    noise = variant("noise", toy).replaced_phi(written, batch)
    another = variant("another", toy).replaced_phi(written, batch)
    for name, (A, B) in written.items():
        change, other = B @ A, noise[name][1] @ noise[name][0]
        assert torch.allclose(change.norm(dim=(1, 2)), other.norm(dim=(1, 2)), rtol=1e-4)
        assert (change * other).sum() / change.norm() / other.norm() < 0.5
        assert torch.equal(another[name][1][1], B[0]) and torch.equal(another[name][1][0], B[2])
    wrong = variants.shuffle(batch)
    assert torch.equal(wrong[~batch.maskable], batch.x0[~batch.maskable])
    for before, after, where in zip(batch.x0, wrong, batch.maskable):
        assert sorted(before[where].tolist()) == sorted(after[where].tolist())
    assert not torch.equal(wrong, batch.x0)


def test_an_update_gets_the_length_that_it_is_told():
    p, before = torch.nn.Parameter(torch.tensor([3.0, 4.0])), [torch.zeros(2)]
    assert variants.set_length([p], before, None) == 5
    assert variants.set_length([p], before, 10.0) == 10 and p.tolist() == [6, 8]


# ---- The studies --------------------------------------------------------------------------------

def test_what_a_line_says_between_its_points():
    points = [(2.0, 10.0), (1.0, 0.0), (4.0, 20.0)]
    assert lora_rows.read_off(1.5, points) == 5 and lora_rows.read_off(3.0, points) == 15
    assert lora_rows.read_off(0.9, points) is None and lora_rows.read_off(4.1, points) is None


def test_the_excess_is_what_is_kept_beyond_plain_tuning_at_the_same_loss():
    def at(nats, kept):
        return [{"nats alone": nats, "in alone": kept}]
    rates = [lora_rows.at_rate("mdlm", rate) for rate in lora_rows.RATES]
    results = {name: at(3 - 0.1 * i, 0.5 - 0.05 * i) for i, name in enumerate(rates)}
    results |= {"memdlm": at(2.75, 0.45), "noise": at(9.0, 0.1)}
    lora_rows.add_excess(results)
    assert results["memdlm"][0]["excess"] == pytest.approx(0.45 - 0.375)
    assert results["mdlm"][0]["excess"] == pytest.approx(0)
    assert "excess" not in results["noise"][0] and "excess, same compute" not in results["memdlm"]


@pytest.mark.parametrize("study, plan, claims", [
    (lora_rows, lora_rows.plan_lora(TINY), lora_rows.SENTENCES),
    (baselines, baselines.plan_baselines(TINY), list(baselines.list_claims()))])
def test_every_sentence_of_a_study_has_its_runs_and_every_run_a_use(study, plan, claims):
    named = {run for claim in claims for run, _ in (claim.first, claim.second)}
    needed = {need for run in plan.values() for need in runs.needs_of(run) if need}
    assert named | needed <= set(plan) and all(claim.family for claim in claims)
    if study is lora_rows:
        listed = {name for names, _ in lora_rows.list_parts(TINY) for name in names}
        assert listed == set(plan)
        rates = {name for name in plan if "lr x" in name or "same compute" in name}
        assert set(plan) - named - needed <= rates, "and those are read by the excess"


@pytest.mark.slow
def test_a_study_in_tiny(tmp_path):
    """A base, a pair, a replaced phi and a run at another's pace; the page says what there is."""
    plan, names = lora_rows.plan_lora(TINY), ["base", "mdlm", "memdlm", "noise",
                                              "mdlm at memdlm's pace"]
    for results in runs.run_parts(plan, [(names, 1)], TINY, tmp_path, 1, 20):
        lora_rows.write_lora_page(results, tmp_path)
    led, leader = (results[name][0] for name in ("mdlm at memdlm's pace", "memdlm"))
    assert led["moves"] == leader["moves"] != results["mdlm"][0]["moves"]
    assert set(path.name for path in tmp_path.iterdir()) == {"20", "lora.md", "lora.json"}
    assert json.loads((tmp_path / "lora.json").read_text())["first seed"] == 20
    assert "| mdlm at memdlm's pace |" in (tmp_path / "lora.md").read_text()


def test_a_task_decoded_apart_is_decoded_as_among_others(toy):
    """Retrieval by task has the numbers that a batch of all tasks has."""
    s, model, _ = toy
    size = SimpleNamespace(samples=3, lengths=(20, 24))
    apart = measure_retrieval(s, model, size, (20,), ("alone", "adapted"))
    names = [(task, f"paper {task} 20 {i}") for task in tasks.RETRIEVAL for i in range(3)]
    samples = [tasks.TASKS[task](random.Random(name), 20) for task, name in names]
    batch = collate(samples, [name for _, name in names], False)
    for way, source in (("alone", "nothing"), ("adapted", "prompt")):
        right = measure(model, replace(s, inner_lr=0.1), source, batch, "accuracy")
        together = right.view(len(tasks.RETRIEVAL), 3).mean(1).tolist()
        assert together == pytest.approx([apart[f"{task} 20 {way}"] for task in tasks.RETRIEVAL])
    assert "in alone" not in apart and "beyond alone" not in apart


# ---- The ladder ---------------------------------------------------------------------------------

TOY_CLAIM = {"place": "Table 1", "claim": "it helps", "expect": "more",
             "differences": [0.1, 0.11, 0.12], "family": "x"}


def test_the_pretrained_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """In a fresh clone, too: numbers are stored, and weights that arms need are made again."""
    done, measured = [], []

    def train_run(folder, flags):
        if "--model" in flags and flags[flags.index("--model") + 1].startswith("runs"):
            assert (tmp_path / flags[flags.index("--model") + 1] / "config.json").exists()
        folder.mkdir(parents=True)
        (folder / "cpu_seconds").write_text("60")
        done.append(f"{folder.parent.name} {folder.name}")
        return 60

    def write_config(folder, out):
        out.mkdir()
        (out / "config.json").write_text("{}")

    def measure_all(s, data, model, adapted):
        measured.append(adapted)
        return {"nats 0.5 alone": 6.0 + len(measured) / 100, "codes alone": 0.5}

    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    for name, fake in dict(train_run=train_run, export=write_config, measure_all=measure_all,
                           make_reviews=lambda: ([], []), make_base_records=lambda seed: [],
                           question_records=lambda codes, count: [],
                           open_model=lambda *rest: (None, None, None), LADDER=tmp_path / "rows",
                           open_run=lambda *rest, **more: (None, None, None)).items():
        monkeypatch.setattr(pretrained, name, fake)
    pretrained.run_pretrained(("1", "2", "3", "4"))
    assert len(done) == 4 * (1 + len(pretrained.ARMS)) and sum(measured) == 4 * 4
    assert len(measured) == len(done) + 1  # the weights as they came are measured once
    page = tmp_path / "results" / "pretrained.md"
    assert "no verdict below counts" in page.read_text() and not (tmp_path / "rows").exists()

    stored = json.loads((tmp_path / "results" / "pretrained.json").read_text())
    del stored["4"]["memdlm, shared"]
    (tmp_path / "results" / "pretrained.json").write_text(json.dumps(stored))
    shutil.rmtree(tmp_path / "runs")
    done.clear(), measured.clear()
    pretrained.run_pretrained()
    assert done[:3] == ["4 base", "4 memdlm-shared", "5 base"] and measured[0]
    assert len(measured) == 2 + len(pretrained.ARMS)
    assert "5 of 5" in page.read_text() and "no verdict" not in page.read_text()
    rows = json.loads((tmp_path / "rows").read_text())
    assert all(len(row["differences"]) == 5 for row in rows if "held-out" in row["claim"])


def test_rows_of_a_pretrained_base_are_data(tmp_path):
    row = {"base": "SmolLM2", "place": "Table 1", "claim": "it helps", "expect": "more",
           "differences": [-0.1, -0.12, -0.11]}
    path = tmp_path / "ladder.json"
    assert ladder.pretrained_rows([], path) == []
    path.write_text(json.dumps([row, row | {"base": "Qwen"}, row | {"claim": "alone here"}]))
    rows = ladder.pretrained_rows(judge_rows([TOY_CLAIM]), path)
    assert [(row["base"], row["verdict"]) for row in rows] == [
        ("toy", "reproduced"), ("SmolLM2", "reversed"), ("Qwen", "reversed"),
        ("SmolLM2", "reversed")]
    # Two claims on one base are a family of two.
    assert rows[1]["holm"] == pytest.approx(2 * rows[2]["holm"])
    table = claims_table(rows)
    assert table[0][:3] == ["place", "base", "claim"] and table[2][1] == "SmolLM2"
    assert "base" not in claims_table(judge_rows([TOY_CLAIM]))[0]
    for bad in ({"base": 3}, {"expect": "much"}, {"differences": ["x"]}, {"place": None}):
        path.write_text(json.dumps([row, row | bad]))
        with pytest.raises(ValueError, match="row 2"):
            ladder.read_rows(path)


def test_the_hours_of_a_large_model_follow_from_the_counted_work():
    c = translate(PUBLISHED["llada-moe"])
    s = Settings(model="llada-moe", batch=1, load_4bit=True)
    plain, inner = bench.step_flops(c, s, 4096)
    assert (plain / 1e12, (plain + inner) / 1e12) == (
        pytest.approx(ladder.PLAIN, abs=0.05), pytest.approx(ladder.WITH_MEMORY, abs=0.05))
    for length, forward in ladder.FORWARD.items():
        step, _ = bench.step_flops(c, s, length)
        assert forward == pytest.approx(step / 3e12, rel=0.005)
    assert ladder.hours(0.4 * 989 * 3600) == pytest.approx(1)


def test_the_doors_of_the_studies(cli):
    for name in ("lora", "baselines"):
        code, _, err = cli(evaluate, name, "--jobs", "0")
        assert code == 2 and "at least 1" in err and len(err.splitlines()) == 1
    code, _, err = cli(evaluate, "claims", "--first-seed", "-1")
    assert code == 2 and "--first-seed" in err
