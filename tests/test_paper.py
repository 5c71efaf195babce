"""The claims, their statistics and the report, on made-up results with known answers; and the runs themselves, in tiny."""
import json
import re
from pathlib import Path

import pytest
import torch

import evaluate
from paper import runs as paper
from paper.claims import T95, claims, judged, paired, summary, verdict
from paper.report import FAR, PAPER, page, report

TINY = paper.Size(2, 2, 2, 2, 2, 3, (20, 24, 32, 40), True)


def test_quantiles_of_t_hold_95_percent():
    for freedom, t in T95.items():
        x = torch.linspace(0, t, 200_001, dtype=torch.float64)
        density = (1 + x * x / freedom) ** (-(freedom + 1) / 2)
        scale = torch.lgamma(torch.tensor((freedom + 1) / 2)) - torch.lgamma(torch.tensor(freedom / 2))
        inside = 2 * float(torch.trapezoid(density, x)) * float(scale.exp()) / (freedom * torch.pi) ** 0.5
        assert abs(inside - 0.95) < 5e-5, freedom


def test_summary_by_hand():
    mean, error, half = summary([1.0, 2.0, 6.0])  # variance 7, standard error sqrt(7 / 3)
    assert mean == 3 and abs(error - (7 / 3) ** 0.5) < 1e-12 and abs(half - 4.303 * (7 / 3) ** 0.5) < 1e-12


@pytest.mark.parametrize("differences, expect, word", [
    ([0.1, 0.11, 0.12], "more", "reproduced"),
    ([0.1, 0.11, 0.12], "less", "reversed"),
    ([-0.1, -0.11, -0.12], "less", "reproduced"),
    ([0.1, -0.1, 0.1], "more", "not reproduced"),
    ([0.0, 0.0, 0.0], "more", "not reproduced"),
    ([1.0, 2.0], "more", "not reproduced"),
    ([0.001, -0.001, 0.0], "same", "reproduced"),
    ([0.1, 0.11, 0.12], "same", "reversed"),
    ([0.1, -0.1, 0.0], "same", "not reproduced"),
    ([0.3], "more", "not run"), ([], "more", "not run")])
def test_verdicts(differences, expect, word):
    assert verdict(differences, expect) == word


def test_a_false_positive_is_as_rare_as_said():
    noise = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)).tolist()
    words = [verdict(row, "more") for row in noise]
    assert abs(words.count("reproduced") / 4000 - 0.025) < 0.01 and abs(words.count("reversed") / 4000 - 0.025) < 0.01


def test_seeds_are_paired_and_gaps_left_out():
    results = {"a": [{"x": 1.0}, None, {"x": 3.0}, {"x": 9.0}], "b": [{"x": 0.5}, {"x": 7.0}, {"x": 2.0}, {}]}
    assert paired(results, ("a", "x"), ("b", "x")) == [0.5, 1.0]
    assert paired(results, ("a", "x"), ("nobody", "x")) == []


def made_up(effect):
    """Results in which every measure of every claim is equal, but for MemDLM's retrieval at trained lengths without phi."""
    results = {}
    for seed in range(5):
        for claim in claims():
            for run, key in (claim.first, claim.second):
                seeds = results.setdefault(run, [{} for _ in range(5)])
                seeds[seed][key] = 0.4 + 0.01 * seed + (effect + 0.001 * seed if (run, key) == ("memdlm", "in alone") else 0)
    return results


def test_a_planted_effect_is_found_where_it_is_and_nowhere_else():
    for effect, word in ((0.1, "reproduced"), (-0.1, "reversed")):
        rows = judged(made_up(effect))
        touched = [row for row in rows if ["memdlm", "in alone"] in (row["first"], row["second"])]
        assert len(touched) > 3 and rows[0]["verdict"] == word and rows[0]["agree"] == ("5 of 5" if effect > 0 else "0 of 5")
        for row in rows:
            if row not in touched:
                assert row["verdict"] == ("reproduced" if row["expect"] == "same" else "not reproduced"), row


def test_every_run_that_a_claim_or_table_names_is_in_the_plan():
    runs = paper.plan(paper.SIZES["full"])
    named = {place[0] for claim in claims() for place in (claim.first, claim.second)} | set(PAPER)
    assert named | {run for _, memory, plain in FAR for run in (memory, plain)} <= set(runs)
    bases = {run.settings["from_run"] for run in runs.values() if "from_run" in run.settings}
    assert bases == {"base", "base, 4 layers", "base, 3 x steps"} and bases <= set(runs)
    assert set(runs) - named - bases - {run for row in FAR for run in row[1:]} == set()  # and none is made for nothing
    left_out = named - set(paper.plan(paper.SIZES["quick"]))
    assert left_out == {f"{run}, {what}" for run in ("lora mdlm", "lora memdlm") for what in ("4 layers", "3 x steps")} | {
        "lora mdlm, 4 layers, lr x 0.5"}
    assert not left_out & {row["first"][0] for row in judged({name: [] for name in paper.plan(paper.SIZES["quick"])})}


def test_runs_are_done_once_and_again_only_if_they_would_differ(tmp_path):
    def times():
        return {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.rglob("measures.json")}
    first = paper.run_all(TINY, tmp_path, 1, 1, ["base", "mdlm, half the steps"])
    before = times()
    assert set(before) == {"base", "mdlm, half the steps"}
    again = paper.run_all(TINY, tmp_path, 1, 1, ["base", "mdlm, half the steps"])
    assert times() == before and again == first
    (tmp_path / "0" / "mdlm, half the steps" / "measures.json").unlink()  # as if it had been cut off while measuring
    assert paper.run_all(TINY, tmp_path, 1, 1, ["base", "mdlm, half the steps"]) == first
    assert times()["base"] == before["base"]
    paper.run_all(TINY._replace(tuned=6), tmp_path, 1, 1, ["base", "mdlm, half the steps"])
    assert times()["base"] == before["base"] and times() != before


def test_a_run_that_diverges_is_recorded_and_not_counted(tmp_path):
    s = paper.settings_of(paper.Run(dict(data="languages", memory=False, steps=3, lr=1e30, warmup=0.0), ()), 0, tmp_path)
    paper.train_and_measure(s, ("nats",), tmp_path / "0" / "x", TINY)
    saved = paper.finished_measures(tmp_path / "0" / "x", s)
    assert saved == {"diverged": 1.0} and "not finite" in (tmp_path / "0" / "x" / "log.txt").read_text()


def test_page_escapes_everything():
    nasty = "<script>' onload='x\"&"
    text = page(nasty, nasty, [(nasty, nasty, [[nasty], [nasty]], [(nasty, b"png")])])
    assert nasty not in text and "<script" not in text and "' onload='" not in text
    assert text.count("&lt;script&gt;&#x27; onload=&#x27;x&quot;&amp;") == 9


@pytest.mark.slow
def test_the_whole_thing_in_tiny(tmp_path, capsys):
    """All runs with a few steps: every claim and every table cell gets its number, and the report holds them."""
    results = paper.run_all(TINY, tmp_path, 2, 2)
    rows = judged(results)
    assert [row["claim"] for row in rows if "mean" not in row] == []
    where = report(results, TINY, tmp_path / "out")
    text, summary_text = where.read_text(), (tmp_path / "out" / "summary.md").read_text()
    assert text.count("data:image/png;base64") == 8 and "http" not in text
    assert "| - |" not in summary_text.split("## How far")[0] and "nan" not in summary_text
    for row in rows:
        assert row["claim"] in summary_text
    values = json.loads((tmp_path / "out" / "values.json").read_text())
    assert values["runs"]["mdlm"][1]["in alone"] == round(results["mdlm"][1]["in alone"], 5)


def test_command_line(cli, monkeypatch, tmp_path):
    code, _, err = cli(evaluate, "--paper", "toy", "--jobs", "0")
    assert code == 2 and "at least 1" in err and len(err.splitlines()) == 1
    monkeypatch.setitem(paper.SIZES, "quick", TINY)
    monkeypatch.setattr(paper, "plan", lambda size, plan=paper.plan: {
        k: r for k, r in plan(size).items() if k in ("base", "mdlm")})
    code, out, err = cli(evaluate, "--paper", "toy", "--quick", "--jobs", "1", "--seeds", "1", "--out", "p")
    assert code == 0 and "Fig. 5" in out and (tmp_path / "p/quick/report.html").exists()


def test_readme_quotes_the_summary():
    root = Path(__file__).parent.parent
    readme, whole = (root / "README.md").read_text(), (root / "results" / "paper_toy.md").read_text()
    section = readme.split("## Ours against the paper's")[1].split("\n## ")[0]
    quoted = [line for line in section.splitlines() if line.startswith("| ") and "±" in line]
    assert len(quoted) > 20 and all(line in whole for line in quoted)
