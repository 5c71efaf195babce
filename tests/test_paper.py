"""The paper's claims, their statistics and the report, on made-up results with known answers.

At the end the runs themselves, in tiny.
"""
import itertools
import json
import random
from pathlib import Path

import pytest
import torch

import evaluate
from paper import runs
from paper.claims import (
    CLAIMS, correct, judge, judge_claims, judge_rows, quantiles, subtract, summarise, weigh,
)
from paper.report import FAR, PAPER, build_page, judge_again, write_report

TINY = runs.Size(2, 2, 2, 2, 2, 3, (20, 24, 32, 40), True)


# ---- Statistics ---------------------------------------------------------------------------------

def share_of_t_within(half, freedom):
    """How much of Student's t lies within +-half: the integral of its density, by hand."""
    x = torch.linspace(0, half, 200_001, dtype=torch.float64)
    density = (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    above, below = (torch.tensor(n / 2, dtype=torch.float64) for n in (freedom + 1, freedom))
    scale = (torch.lgamma(above) - torch.lgamma(below)).exp() / (freedom * torch.pi) ** 0.5
    return 2 * float(torch.trapezoid(density, x) * scale)


@pytest.mark.parametrize("freedom", [1, 2, 4, 7, 30])
def test_quantiles_of_t_hold_95_percent(freedom):
    assert abs(share_of_t_within(quantiles(freedom)[0], freedom) - 0.95) < 1e-6


@pytest.mark.parametrize("n", [3, 5, 8])
def test_the_smallest_effect_that_could_be_seen_is_seen_four_times_in_five(n):
    effect = quantiles(n - 1)[1] / n ** 0.5  # in standard deviations
    noise = torch.randn(20_000, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    x = noise + effect
    t = x.mean(1) / (x.std(1) / n ** 0.5)
    assert abs((t > quantiles(n - 1)[0]).double().mean() - 0.8) < 0.01


def test_a_summary_by_hand():
    mean, error, half = summarise([1.0, 2.0, 6.0])  # variance 7, standard error sqrt(7 / 3)
    assert mean == 3
    assert abs(error - (7 / 3) ** 0.5) < 1e-12
    assert abs(half - 4.302653 * (7 / 3) ** 0.5) < 1e-5


def test_the_p_of_a_claim_by_hand():
    differences = [0.04, -0.01, 0.02, 0.05, 0.01]
    mean, error, _ = summarise(differences)
    outside = 1 - share_of_t_within(mean / error, 4)
    assert weigh(differences, "more")[0] == pytest.approx(outside, abs=1e-6)
    assert weigh(differences, "less") == (weigh(differences, "more")[0], "reversed")
    # "the same" is as likely as the nearer of the two edges allows: 0.02 here.
    near = [x - mean + 0.004 for x in differences]
    outside = 1 - share_of_t_within((0.02 - 0.004) / error, 4)
    assert weigh(near, "same") == (pytest.approx(outside, abs=1e-6), "reproduced")


def test_holm_against_all_subsets():
    """A claim's raised p is the worst of the plain n p_min over all subfamilies that hold it."""
    rng = random.Random(0)
    for n in (1, 2, 3, 5):
        for _ in range(20):
            chances = [rng.choice([rng.random(), rng.random() / 50, 0.01]) for _ in range(n)]
            by_hand = [max(min(1, len(some) * min(chances[j] for j in some))
                           for size in range(1, n + 1)
                           for some in itertools.combinations(range(n), size) if i in some)
                       for i in range(n)]
            assert correct(chances) == pytest.approx(by_hand)
    assert correct([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert correct([]) == []


def test_each_family_is_corrected_by_itself():
    found = [0.1, 0.12, 0.11, 0.04]  # p = .013
    rows = [dict(family=family, expect="more", differences=differences)
            for family, differences in (("small", found), ("large", found), ("large", [0.1] * 1),
                                        *[("large", [0.1, -0.1, 0.2, -0.2])] * 4)]
    small, large, once, *_ = judge_rows(rows)
    assert small["verdict"] == small["alone"] == large["alone"] == "reproduced"
    assert small["holm"] == small["p"] and large["holm"] == pytest.approx(5 * small["p"])
    assert large["verdict"] == "not reproduced"
    assert once["verdict"] == "not run" and "p" not in once


@pytest.mark.parametrize("differences, expect, verdict", [
    ([0.1, 0.11, 0.12], "more", "reproduced"),
    ([0.1, 0.11, 0.12], "less", "reversed"),
    ([-0.1, -0.11, -0.12], "less", "reproduced"),
    ([0.1, -0.1, 0.1], "more", "not reproduced"),
    ([0.0, 0.0, 0.0], "more", "not reproduced"),
    ([1.0, 2.0], "more", "not reproduced"),
    ([0.001, -0.001, 0.0], "same", "reproduced"),
    ([0.1, 0.11, 0.12], "same", "reversed"),
    ([0.1, -0.1, 0.0], "same", "not reproduced"),
    ([0.3], "more", "not run"),
    ([], "more", "not run"),
])
def test_verdicts(differences, expect, verdict):
    assert judge(differences, expect) == verdict


def test_a_false_positive_is_as_rare_as_the_report_says():
    noise = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)).tolist()
    verdicts = [judge(differences, "more") for differences in noise]
    assert abs(verdicts.count("reproduced") / 4000 - 0.025) < 0.01
    assert abs(verdicts.count("reversed") / 4000 - 0.025) < 0.01


def test_seeds_are_paired_and_gaps_left_out():
    results = {"a": [{"x": 1.0}, None, {"x": 3.0}, {"x": 9.0}],
               "b": [{"x": 0.5}, {"x": 7.0}, {"x": 2.0}, {}]}
    assert subtract(results, ("a", "x"), ("b", "x")) == [0.5, 1.0]
    assert subtract(results, ("a", "x"), ("nobody", "x")) == []


# ---- Claims -------------------------------------------------------------------------------------

PLANTED = ("memdlm", "in alone")


def made_up_results(effect):
    """Results without any difference, but for an effect in MemDLM's retrieval without phi."""
    results = {}
    for claim in CLAIMS:
        for run, key in (claim.first, claim.second):
            seeds = results.setdefault(run, [{} for _ in range(5)])
            for seed, measures in enumerate(seeds):
                extra = effect + 0.001 * seed if (run, key) == PLANTED else 0
                measures[key] = 0.4 + 0.01 * seed + extra
    return results


@pytest.mark.parametrize("effect, verdict, agree", [(0.1, "reproduced", "5 of 5"),
                                                    (-0.1, "reversed", "0 of 5")])
def test_a_planted_effect_is_found_where_it_is_and_nowhere_else(effect, verdict, agree):
    rows = judge_claims(made_up_results(effect))
    touched = [row for row in rows if list(PLANTED) in (row["first"], row["second"])]
    assert len(touched) > 3 and rows[0]["verdict"] == verdict and rows[0]["agree"] == agree
    for row in rows:
        if row not in touched:
            nothing = "reproduced" if row["expect"] == "same" else "not reproduced"
            assert row["verdict"] == nothing, row


def test_every_run_that_a_claim_or_table_names_is_in_the_plan():
    plan, quick = runs.plan_runs(runs.SIZES["full"]), runs.plan_runs(runs.SIZES["quick"])
    in_claims = {run for claim in CLAIMS for run, _ in (claim.first, claim.second)}
    named = in_claims | set(PAPER)
    far = {run for _, *pair in FAR for run in pair}
    bases = {run.settings["from_run"] for run in plan.values() if "from_run" in run.settings}
    assert bases == {"base", "base, 4 layers", "base, 3 x steps"}
    assert set(plan) == named | far | bases, "and none is made for nothing"
    few = {name for name, run in plan.items() if run.seeds == runs.FAR_SEEDS}
    assert few == far - in_claims - set(PAPER) - {"mdlm, lr x 0.3"}, "claims have all seeds"
    left_out = named - set(quick)
    assert left_out == {
        "lora mdlm, 4 layers", "lora memdlm, 4 layers", "lora mdlm, 3 x steps",
        "lora memdlm, 3 x steps", "lora mdlm, 4 layers, lr x 0.5"}
    rows = judge_claims({name: [] for name in quick})
    assert not left_out & {row["first"][0] for row in rows}


# ---- The report ---------------------------------------------------------------------------------

def test_the_page_escapes_everything():
    nasty = "<script>' onload='x\"&"
    section = (nasty, nasty, [[nasty], [nasty]], [(nasty, b"png")])
    text = build_page(nasty, nasty, [section])
    assert nasty not in text and "<script" not in text and "' onload='" not in text
    assert text.count("&lt;script&gt;&#x27; onload=&#x27;x&quot;&amp;") == 9


def test_the_page_of_results_quotes_the_summary():
    root = Path(__file__).parent.parent
    page = (root / "results" / "README.md").read_text()
    whole = (root / "results" / "paper_toy.md").read_text()
    section = page.split("\n## 5. ")[1].split("\n## ")[0]
    before, theta = section.split("\n### What memory does to theta")  # it has numbers of its own
    section = before + theta.partition("\n### ")[2]
    quoted = [line for line in section.splitlines() if line.startswith("| ") and "±" in line]
    assert len(quoted) > 60 and all(line in whole for line in quoted)


def test_an_earlier_report_is_judged_anew(tmp_path, capsys):
    before = Path(__file__).parent.parent / "results" / "paper_toy.json"
    path = tmp_path / "values.json"
    values = json.loads(before.read_text())
    for row in values["claims"]:  # as reports were before
        for key in ("family", "p", "holm", "seen", "alone"):
            del row[key]
        row["verdict"] = "?"
    path.write_text(json.dumps(values))
    judge_again(path)
    assert json.loads(path.read_text()) == json.loads(before.read_text())
    assert path.with_suffix(".md").read_text() == before.with_suffix(".md").read_text()
    assert "p, Holm" in capsys.readouterr().out
    path.write_text("{}")
    with pytest.raises(ValueError, match="no values.json"):
        judge_again(path)


# ---- The runs -----------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_run_is_made_again_only_if_it_would_differ(tmp_path):
    shorter = "mdlm, half the steps"

    def run(size=TINY):
        return runs.run_all(size, tmp_path, 1, 1, ["base", shorter])

    def times():
        return {path.parent.name: path.stat().st_mtime_ns
                for path in tmp_path.rglob("measures.json")}

    first, before = run(), times()
    assert set(before) == {"base", shorter}
    assert run() == first and times() == before
    # As if it had been cut off while it was measured.
    (tmp_path / "0" / shorter / "measures.json").unlink()
    assert run() == first and times()["base"] == before["base"]
    run(TINY._replace(tuned=6))
    assert times()["base"] == before["base"] and times() != before


def test_a_run_that_diverges_is_recorded_and_not_counted(tmp_path):
    values = dict(data="languages", memory=False, steps=3, lr=1e30, warmup=0.0)
    s, folder = runs.settings_of(runs.Run(values, ()), 0, tmp_path), tmp_path / "0" / "x"
    runs.train_and_measure(s, ("nats",), folder, TINY)
    assert runs.read_measures(folder, s) == {"diverged": 1.0}
    assert "not finite" in (folder / "log.txt").read_text()


def change_numbers(value):
    """The same measures, every number a little larger."""
    if isinstance(value, dict):
        return {key: change_numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [*map(change_numbers, value)]
    return value * 1.01 + 0.001 if isinstance(value, (int, float)) else value


@pytest.mark.slow
def test_the_whole_thing_in_tiny(tmp_path, capsys):
    """All runs with a few steps: every claim and table cell gets a number; the report has it.

    The second seed is the first one with other numbers: what its runs would add is time.
    """
    results = {name: [*measures, change_numbers(measures[0])]
               for name, measures in runs.run_all(TINY, tmp_path, 2, 1).items()}
    rows = judge_claims(results)
    assert [row["claim"] for row in rows if "mean" not in row] == []
    page = write_report(results, TINY, tmp_path / "out").read_text()
    assert page.count("data:image/png;base64") == 8 and "http" not in page
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| - |" not in summary.split("## How far")[0] and "nan" not in summary
    for row in rows:
        assert row["claim"] in summary
    values = json.loads((tmp_path / "out" / "values.json").read_text())
    measures = results["mdlm"][1]
    assert values["runs"]["mdlm"][1]["in alone"] == round(measures["in alone"], 5)


@pytest.mark.slow
def test_the_command_line(cli, monkeypatch, tmp_path):
    code, _, err = cli(evaluate, "claims", "--jobs", "0")
    assert code == 2 and "at least 1" in err and len(err.splitlines()) == 1

    def plan_two(size, plan_runs=runs.plan_runs):
        return {name: run for name, run in plan_runs(size).items() if name in ("base", "mdlm")}

    monkeypatch.setitem(runs.SIZES, "quick", TINY)
    monkeypatch.setattr(runs, "plan_runs", plan_two)
    flags = ["--quick", "--jobs", "1", "--seeds", "1", "--out", "p"]
    code, out, err = cli(evaluate, "claims", *flags)
    assert code == 0 and "Fig. 5" in out and (tmp_path / "p/quick/report.html").exists()
