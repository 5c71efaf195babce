"""The paper's claims on a pretrained base: texts, arms and page, without the packages."""
import json
import random
import re
from dataclasses import fields

import pytest
import torch

from memdlm import MemDLM
from paper import conversion, pretrained
from paper.ladder import pretrained_rows
from settings import Parser, Settings, add_flags, settings_from_flags
from tests.tiny_models import tiny_backbone


@pytest.fixture
def corpus(monkeypatch):
    """Rows whose words say which film they are of, so that a leak would show."""
    rows = [{"category": kind, "movie_name": f"film {film}",
             "text": " ".join(f"{kind}{film}w{number}x{i}" for i in range(80))}
            for film in range(60) for number in range(4) for kind in ("plot", "fresh", "rotten")]
    for room in (conversion, pretrained):
        monkeypatch.setattr(room, "read_corpus", lambda: rows)
    return rows


def test_a_question_has_one_answer_and_it_stands_in_the_text():
    words = [f"word{i}" for i in range(40)]
    for codes in (1, 4, 16):
        record, code = pretrained.make_question(random.Random(codes), words, codes)
        found = dict(re.findall(r"(\w+)'s locker code is (\d{4})\.", record["prompt"]))
        name = re.search(r"What is (\w+)'s", record["prompt"])[1]
        assert len(found) == codes and len(set(found.values())) == codes and found[name] == code
        assert record["response"] == f"{name}'s locker code is {code}."
        assert re.findall(r"word\d+", record["prompt"]) == words
    record, _ = pretrained.make_question(random.Random(1), [], 2)
    assert record == pretrained.make_question(random.Random(1), [], 2)[0]


def test_whole_films_are_held_out_and_reviews_are_no_plots(corpus):
    train, held_out = pretrained.make_reviews()
    films = [{re.search(r"\D(\d+)w", record["response"])[1] for record in part}
             for part in (train, held_out)]
    assert not films[0] & films[1] and len(films[0] | films[1]) == 60 and films[1]
    assert all("plot" not in record["response"] for record in train + held_out)
    records = pretrained.make_base_records(1)
    assert records != pretrained.make_base_records(2)
    asked = [record for record in records if "locker" in record["prompt"]]
    assert 2 * len(asked) == len(records)
    assert all("fresh" not in str(record) and "rotten" not in str(record) for record in records)


def test_the_arms_differ_in_what_their_names_say():
    parser = Parser([])
    add_flags(parser, [field.name for field in fields(Settings)])

    def settings(flags):
        return settings_from_flags(vars(parser.parse_args([*flags, "--model", "smollm2"])))
    arms = {name: settings([*pretrained.RECIPE, *flags]) for name, flags in pretrained.ARMS.items()}
    plain = vars(arms["mdlm"])
    for name, expected in {
            pretrained.SHARED: {"memory"},
            pretrained.PER_SAMPLE: {"memory", "inner_lr", "per_sample"},
            "mdlm, half the rate": {"lr"}, "mdlm, equal compute": {"steps"}}.items():
        assert {key for key, value in vars(arms[name]).items() if value != plain[key]} == expected
    shared, half = arms[pretrained.SHARED], arms["mdlm, half the rate"]
    paper = Settings()
    assert (shared.inner_lr, shared.rank, shared.layer_fraction, shared.inner_steps) == (
        paper.inner_lr, paper.rank, paper.layer_fraction, paper.inner_steps)
    assert shared.lora_rank == 32 and not shared.per_sample and half.lr == plain["lr"] / 2


def test_without_phi_nothing_is_written_and_with_another_prompt_another_thing():
    backbone = tiny_backbone("smollm2")
    s = Settings()
    model = MemDLM(backbone, s)
    samples = [pretrained.Sample([5 + i, 6, 7, 8], [9, 10 + i], [False, True]) for i in range(3)]
    batch, = pretrained.batches_of(samples, ["a", "b", "c"])
    ways = pretrained.ways_to_write(s, True)
    phi = {way: pretrained.write_phi(model, *ways[way], batch) for way in ways}
    assert phi["alone"] is None and list(pretrained.ways_to_write(s, False)) == ["alone"]
    name = next(iter(phi["adapted"]))
    own, other = phi["adapted"][name][1], phi["another"][name][1]
    assert own.abs().sum() > 0 and not torch.equal(own, other)
    assert ways["adapted"][0].inner_lr == 0.1 and ways["adapted"][0].trajectory == "consistent"


def test_the_page_counts_finished_seeds_and_judges_pairs(tmp_path):
    def measures(shift):
        keys = [f"{key} {way}" for key in ("codes", "nats 0.5", *(
            f"codes {codes}" for codes in pretrained.CODES)) for way in ("alone", "adapted",
                                                                         "another")]
        return dict.fromkeys([*keys, "ratio alone", "closed own", "closed another"], shift) | {
            "seconds": 120}
    results = {seed: {name: measures(0.5 + 0.1 * (name == "mdlm") + 0.001 * int(seed))
                      for name in ("raw", "base", *pretrained.ARMS)} for seed in ("0", "1", "2")}
    del results["2"][pretrained.PER_SAMPLE]
    page = pretrained.make_page(results)
    assert "Seeds that are finished: 1 of 5. Until the last one no verdict below" in page
    row = next(line for line in page.splitlines() if line.startswith("| mdlm |"))
    assert row.count("0.60 ± 0.00") == 7 and row.endswith("| 2 |")
    claim = next(line for line in page.splitlines() if "lower loss on held-out reviews than mdlm, "
                 "phi shared" in line)
    assert "-0.100" in claim and "2 of 2" in claim and claim.endswith("reproduced |")
    assert "not run" in next(line for line in page.splitlines() if "mdlm, phi per sample" in line)
    rows = {row["claim"]: row for row in pretrained.make_rows(results)}
    row = rows["lower loss on held-out reviews than mdlm, phi shared, eta .1"]
    assert row["differences"] == pytest.approx([-0.1, -0.1]) and row["expect"] == "less"
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps(list(rows.values())))
    judged = pretrained_rows([], path)
    assert len(judged) == len(rows) and all(row["base"] == "SmolLM2-135M" for row in judged)


def test_the_raw_weights_are_measured_once_and_nothing_twice(corpus, tmp_path, monkeypatch):
    for name in ("RUNS", "RESULTS", "LADDER"):
        monkeypatch.setattr(pretrained, name, tmp_path / name)
    (tmp_path / "RESULTS").mkdir()
    asked = []

    def make_and_measure(name, seed, reviews):
        asked.append((name, seed))
        return {"codes alone": 0.5}
    monkeypatch.setattr(pretrained, "make_and_measure", make_and_measure)
    for _ in range(2):
        pretrained.run_pretrained((1, 2))
    assert len(asked) == len({*asked}) == 2 * (2 + len(pretrained.ARMS)) - 1
    assert [seed for name, seed in asked if name == "raw"] == ["1"]
    results = json.loads((tmp_path / "RESULTS" / "pretrained.json").read_text())
    assert results["2"]["raw"] == results["1"]["raw"]
    # The table of claims gets its rows when the last seed is done: no verdict on the way.
    assert not (tmp_path / "LADDER").exists()
    pretrained.run_pretrained()
    assert len(json.loads((tmp_path / "LADDER").read_text())) == len(list(pretrained.make_claims()))
