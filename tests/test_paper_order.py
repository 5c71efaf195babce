"""The comparison of first and second order: its task, its resuming, and its page."""
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import memdlm
from memdlm import MemDLM
from paper import order
from settings import Settings
from toy.model import ToyConfig, ToyDLM
from toy.tasks import WORDS
from toy.tokenizer import SEP, VALUES

TINY = dict(memory_from="prompt", closed_book=True, per_sample=True, width=16, heads=2, layers=1,
            batch=2, steps=4, save_every=2, lr=1e-3, rank=2, trajectory="cover:2", order="second")


def test_a_sample_states_each_pair_once_and_asks_for_some():
    for pairs in (2, 8, 128):
        sample = order.make_sample(random.Random(pairs), pairs)
        words = [WORDS.words[i] for i in sample.prompt]
        keys, values = words[::2], words[1::2]
        assert len(set(keys)) == len(keys) == pairs
        assert set(values) <= set(VALUES) and not set(keys) & set(VALUES)
        stated, rest = dict(zip(keys, values)), [WORDS.words[i] for i in sample.rest[1:]]
        assert sample.rest[0] == SEP and len(rest) == 2 * min(8, pairs)
        assert all(stated[key] == value for key, value in zip(rest[::2], rest[1::2]))
        assert sample.answer == [False] + [False, True] * min(8, pairs)


def test_prompts_grow_from_8_pairs_to_64():
    s = Settings(steps=1000, seed=1)
    sizes = [order.pairs_of_step(s, step) for step in range(1000)]
    assert set(sizes[:175]) == {8} and set(sizes[175:350]) == {8, 16}
    assert set(sizes[350:525]) == {16, 32} and set(sizes[525:]) == {32, 64}
    assert sizes == [order.pairs_of_step(s, step) for step in range(1000)]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The experiment in small: two levers and what follows, in this process, in an empty folder."""
    pool = SimpleNamespace(submit=lambda f, *rest: SimpleNamespace(result=lambda: f(*rest)))

    class Pool:
        def __init__(self, jobs):
            assert jobs == 1

        def __enter__(self):
            return pool

        def __exit__(self, *error):
            pass
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    for name, value in dict(RECIPE=TINY, OPEN=TINY, LEVERS={"a": {}, "b": dict(rank=4)},
                            ROUNDS={"c": dict(trajectory="cover:2x2")},
                            worker_pool=Pool, SAMPLES=32, MEASURED=(2, 64), TRAINED=(2, 4),
                            CONFIRMING={"headline": (0, 1), "rounds": (2, 3)},
                            draw_recall=lambda *rest: None).items():
        monkeypatch.setattr(order, name, value)
    return tmp_path


def test_a_setting_that_was_stopped_goes_on_exactly(tiny, monkeypatch):
    s = Settings(**TINY, threads=1)
    whole = order.train_setting(s, tiny / "whole")
    saved = order.save_checkpoint

    def stop(folder, model, optimizer, step):
        saved(folder, model, optimizer, step)
        raise KeyboardInterrupt
    monkeypatch.setattr(order, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        order.train_setting(s, tiny / "parted")
    monkeypatch.setattr(order, "save_checkpoint", saved)
    parted = order.train_setting(s, tiny / "parted")
    for a, b in zip(whole.model.parameters(), parted.model.parameters()):
        assert torch.equal(a, b)
    assert order.read_json(tiny / "parted/costs.json").keys() == {"settings", "0", "2", "4"}
    # Other settings do not go on with it. A run that diverges ends there, with its last weights.
    assert order.train_setting(replace(s, steps=2), tiny / "parted").steps == 2
    assert order.read_json(tiny / "parted/costs.json").keys() == {"settings", "0", "2"}
    net = order.train_setting(replace(s, lr=1e30, warmup=0.0, steps=50), tiny / "parted")
    assert 0 < net.steps < 50 and net.seconds > 0


def test_all_is_run_once_and_the_best_lever_is_the_headline(tiny, monkeypatch, capsys):
    run, runs, recall = order.run_setting, [], {"lever a": 0.3, "lever b": 0.4}

    def run_short(name, seed, settings):
        runs.append((name, seed))
        if name == "headline, second":
            assert settings == TINY | dict(rank=4, steps=3000)
        if name == "rounds, first":
            assert settings == TINY | dict(rank=4, trajectory="cover:2x2", order="first",
                                           steps=3000)
        result = run(name, seed, settings | dict(steps=2)) | {"steps": settings["steps"]}
        result["recall"]["own"]["64"] = recall.get(name, 0.5)
        return result | {"settings": settings}
    monkeypatch.setattr(order, "run_setting", run_short)
    order.run_order(["lever a"])
    assert runs == [("lever a", 100)]
    page = (tiny / "results/order.md").read_text()
    assert "Not run yet, or not for both orders." in page and "The best was" not in page
    order.run_order(["lever", "headline"])
    assert runs[1:] == [("lever b", 100), ("headline, second", 0), ("headline, second", 1),
                        ("headline, first", 0), ("headline, first", 1), ("lever c", 100)]
    assert "| c |" in (tiny / "results/order.md").read_text()
    page = (tiny / "results/order.md").read_text()
    assert "The best was: b." in page and "0.500 ± 0.000" in page and "diverged" not in page
    results = order.read_json(tiny / "results/order.json")
    results["lever a"]["100"]["steps"] = 3
    assert "| a (diverged after 3 steps) |" in order.make_page(results)
    order.run_order(["headline"])
    assert len(runs) == 7  # all of it is done
    order.run_order(["rounds"])
    assert runs[7:] == [(f"rounds, {which}", seed) for which in ("second", "first")
                        for seed in (2, 3)]
    results = order.read_json(tiny / "results/order.json")
    assert results["headline, second"]["1"]["seconds"] > 0
    results["lever a"]["100"]["settings"]["rank"] = 5  # the plan has changed since
    assert order.next_job(results, ()) == ("lever a", 100, TINY)
    assert order.next_job(results, ["steps 8"])[0] == "steps 8, second"
    capsys.readouterr()
    with pytest.raises(ValueError, match="no setting begins with 'head line'"):
        order.run_order(["head line"])


@pytest.mark.parametrize("trajectory", ["cover:2", "cover:4", "cover:3x2", "cover:1"])
def test_pairs_that_are_always_masked_together_are_found(trajectory):
    s = Settings(trajectory=trajectory, memory_from="prompt", closed_book=True)
    batch = order.make_batch([f"test 16 {number}" for number in range(6)], 16, True)
    masks, _ = memdlm.cover(s, batch.prompt_valid, batch.prompt_valid, None, batch.seeds)
    together, seen = order.masked_together(s, batch).tolist(), set()
    for b in range(6):
        stated = WORDS.decode(batch.prompt[b].tolist()).split()
        answer = WORDS.decode(batch.x0[b].tolist()).split()[-2 * 8:]
        for key in answer[::2]:
            place = stated.index(key)
            learned = any(mask[b, place + 1] and not mask[b, place] for mask in masks)
            assert together.pop(0) == (not learned)
            seen.add(learned)
    assert not together and seen == ({False} if trajectory == "cover:1" else {True, False})


def test_recall_is_that_of_its_parts(tiny):
    s = Settings(**TINY | dict(order.CLOSED, steps=1, trajectory="cover:2", rank=4), threads=1)
    net = ToyDLM(ToyConfig(WORDS.vocab_size, WORDS.mask_id, 16, 1, 2), 0)
    recall = order.measure_recall(s, MemDLM(net, s))
    for pairs in map(str, order.MEASURED):
        never, apart, together = (recall[way][pairs]
                                  for way in ("never apart", "apart", "together"))
        assert 0 < never < 1
        assert recall["own"][pairs] == pytest.approx(never * together + (1 - never) * apart)
    ways = {"alone", "own", "another"}
    open_book = replace(s, memory_from="response", closed_book=False)
    assert order.measure_recall(open_book, MemDLM(net, open_book)).keys() == ways


def test_the_finding_is_computed():
    def runs(order_name, recalls, seconds):
        return {str(seed): {"recall": {"own": {"64": x}}, "seconds": seconds}
                for seed, x in enumerate(recalls)}
    results = {"headline, first": runs("first", (0.5, 0.6, 0.4), 100),
               "headline, second": runs("second", (0.96, 0.97, 0.95), 250)}
    text = order.make_finding(results, "headline")
    assert "reaches .95 at 64 pairs: 0.960 ± 0.006, against 0.500 ± 0.058" in text
    assert "difference 0.460 ± 0.052, 3 seeds" in text and "2.5 times" in text
    results["headline, second"]["0"]["recall"]["own"]["64"] = 0.90
    assert "does not reach .95" in order.make_finding(results, "headline")
