"""The tables of compare.py, on numbers small enough to work out by hand."""
import json
from types import SimpleNamespace

import pytest
import torch

import compare
import evaluate
import memdlm
import train
from compare import (
    Experiment, add_noise, compute_cells, find_control, list_rows, measure, split_evenly,
    state_findings, write_phi,
)
from data import Sample, collate
from files import read_json
from memdlm import MemDLM
from settings import Settings, control_settings
from toy.model import ToyConfig, ToyDLM

NATS = SimpleNamespace(metric="nats", kind="languages", columns={"32": {}})
ACCURACY = SimpleNamespace(metric="accuracy", kind="dictionary", columns={"32": {}})


def make_model(s):
    return MemDLM(ToyDLM(ToyConfig(30, 1, width=16, layers=2, heads=2)).eval(), s)


# Prompts of 5, 3 and 8 tokens.
SAMPLES = [Sample(list(range(4, 4 + n)), [9, 10, 11, 12], [False, True, True, True])
           for n in (5, 3, 8)]


def make_batch():
    return collate(SAMPLES, ["a", "b", "c"], False)


# ---- What phi is written from -------------------------------------------------------------------

@pytest.mark.parametrize("source, prompts", [("prompt", (0, 1, 2)), ("another", (2, 0, 1))])
def test_phi_of_a_row_is_that_of_the_own_or_the_neighbours_prompt(source, prompts):
    """Each against one prompt alone, without padding, under the seed of the sample it is for."""
    s, batch = Settings(rank=4, alpha=8.0), make_batch()
    model = make_model(s)
    phi = write_phi(model, s, source, batch)
    for b, prompt in enumerate(prompts):
        length = int(batch.prompt_valid[prompt].sum())
        ids = batch.prompt[prompt:prompt + 1, :length]
        alone, _ = memdlm.adapt(model.backbone, s, ids, ids >= 0, [batch.seeds[b]])
        for name, pair in alone.items():
            for own, want in zip(phi[name], pair):
                torch.testing.assert_close(own[b], want[0], rtol=1e-4, atol=1e-6)


def test_a_row_that_says_the_same_twice_keeps_its_role():
    """A run trained with the paper's masks has its own row and the paper's in one."""
    for s in (Settings(memory_from="prompt", inner_lr=0.3), Settings(memory=False),
              Settings(memory_from="prompt", trajectory="cover:4"), Settings(inner_lr=0.1)):
        rows = list_rows(s)
        assert len({row.label for row in rows}) == len(rows)
        roles = [row.role for row in rows if row.role]
        want = ["alone", "leak", "other", "own"] if s.memory_from == "response" and s.memory else [
            "alone", "other", "own"]
        assert sorted(roles) == want
    own = next(row for row in list_rows(Settings(inner_lr=0.003)) if row.role == "own")
    assert own.label == "its prompt, cover:4, eta 0.3"
    assert (own.s.trajectory, own.s.inner_lr, own.source) == ("cover:4", 0.3, "prompt")


# ---- Measuring ----------------------------------------------------------------------------------

def test_accuracy_is_the_share_of_answer_tokens_that_decoding_gets_right():
    s, batch = Settings(), make_batch()
    model = make_model(s)
    *_, canvas = memdlm.denoise(model.backbone, s, batch.x0, batch.maskable, batch.valid,
                                batch.seeds)
    want = []
    for b, length in enumerate((5, 3, 8)):
        answers = range(length + 1, length + 4)
        # The model is random. Its own answers become right ones: all, one and none of them.
        for i in answers:
            batch.x0[b, i] = int(canvas[b, i]) if i - length <= (3, 1, 0)[b] else 2
        want.append(sum(bool(canvas[b, i] == batch.x0[b, i]) for i in answers) / 3)
    got = measure(model, s, "nothing", batch, "accuracy").tolist()
    assert want == pytest.approx([1, 1 / 3, 0]) and got == pytest.approx(want)


def test_every_held_out_sample_has_a_mask_and_so_a_loss():
    samples = [Sample([4, 5], [6, 7], [True, True])] * 200
    batch, model = collate(samples, range(200), False), make_model(Settings())
    t, xt, masked = add_noise(model, batch, "nats")
    u = memdlm.uniform(range(200), "anchor", 4)
    assert (u[:, 2:] >= t[:, None]).all(1).any()  # by chance alone some would have none
    assert masked.any(1).all() and not masked[:, :2].any() and (xt[masked] == 1).all()
    assert measure(model, Settings(), "nothing", batch, "nats").isfinite().all()


def test_samples_are_split_evenly_and_none_is_lost():
    for samples, most, sizes in ((101, 50, [33, 34, 34]), (51, 50, [25, 26]), (50, 50, [50]),
                                 (4, 2, [2, 2]), (3, 2, [3]), (5, 2, [2, 3]), (1, 2, [1])):
        ranges = split_evenly(samples, most)
        assert [len(numbers) for numbers in ranges] == sizes
        assert [i for numbers in ranges for i in numbers] == list(range(samples))


def write_pairs(path, count):
    """Records whose prompts and answers differ, for the toy."""
    path.write_text("".join(json.dumps({"prompt": f"{chr(97 + n) * 4} is", "response": f"{n}!"})
                            + "\n" for n in range(count)))


TINY_RUN = ["--model", "toy", "--steps", "1", "--batch", "2", "--layers", "1", "--width", "16",
            "--table-samples", "0", "--no-control", "--threads", "1", "--heads", "1"]


@pytest.mark.parametrize("records, held_out", [(5, 2), (30, 3), (1, 1)])
def test_no_held_out_sample_counts_twice(cli, tmp_path, records, held_out):
    """200 samples are asked for. A pair that was measured again would make errors look small."""
    write_pairs(tmp_path / "my.jsonl", records)
    assert cli(train, "--data", "my.jsonl", *TINY_RUN)[0] == 0
    code, out, err = cli(evaluate, "--json", "o.json", "--picture", "o.png")
    assert code == 0, err
    numbers = read_json(tmp_path / "o.json")
    assert numbers["samples"] == held_out and (tmp_path / "o.png").stat().st_size > 1000
    rows = [row for group in numbers["groups"] for row in group["rows"]]
    assert all((row["standard_error"] is None) == (held_out == 1) for row in rows)
    assert any("another" in row["phi"] for row in rows) == (held_out > 1)
    if held_out == 1:
        assert "a single sample" in out and "another prompt, since only one is held out" in out
    else:
        assert f"standard error over {held_out} samples" in out
    code, out, err = cli(evaluate, "exposure", "--samples", "9")
    assert code == 0 and "sequential/static" in out, err


def test_exposure_is_the_mean_over_samples_whatever_the_batches(monkeypatch):
    s = Settings()
    data = SimpleNamespace(count_tests=lambda most: 3, columns={"x": {}}, tests=lambda column, n,
                           closed_book: collate([SAMPLES[i] for i in n], list(n), False))
    monkeypatch.setattr(compare, "open_run", lambda folder: (s, data, make_model(s)))
    curves = {}
    for most in (1, 3):
        torch.manual_seed(0)
        monkeypatch.setattr(compare, "REAL_CHUNK", most)
        monkeypatch.setattr(compare, "TOY_CHUNK", most)
        monkeypatch.setattr(compare, "split_evenly", lambda n, most: [
            range(i, i + most) for i in range(0, n, most)])
        curves[most] = compare.measure_exposure("r", 200)
    for label, curve in curves[1].items():
        for name in ("static", "sequential", "matched"):
            assert curve[name] == pytest.approx(curves[3][label][name], rel=1e-4)


# ---- Means, errors, findings --------------------------------------------------------------------

def make_experiment(s, seeds=(0,), **rows):
    """An experiment with one column. rows: {role: numbers [runs][samples]}."""
    values = {(role, "32"): torch.tensor(numbers).double() for role, numbers in rows.items()}
    return Experiment(s, list(seeds), values, {role: role for role in rows})


def test_cells_in_nats_are_paired_differences():
    """Samples of 1, 2 and 6 nats; with phi 2, 4 and 9. The differences are 1, 2 and 3:

        mean 2, standard deviation 1, standard error 1 / sqrt(3)

    Over two seeds with means 2 and 5 the error is 3 / sqrt(2) / sqrt(2).
    """
    one = make_experiment(Settings(), alone=[[1, 2, 6]], own=[[2, 4, 9]])
    assert compute_cells(NATS, one, "own") == [pytest.approx((2, 3 ** -0.5))]
    assert compute_cells(NATS, one, "alone") == [pytest.approx((3, (7 / 3) ** 0.5))]
    assert compute_cells(ACCURACY, one, "own") == [pytest.approx((5, (13 / 3) ** 0.5))]
    two = make_experiment(Settings(), (0, 1), alone=[[1, 2, 6], [0, 0, 0]],
                          own=[[2, 4, 9], [4, 5, 6]])
    assert compute_cells(NATS, two, "own") == [pytest.approx((3.5, 1.5))]


def test_the_findings_by_hand():
    s = Settings(data="languages")
    memory = make_experiment(s, alone=[[2.0, 3.0]], own=[[1.0, 2.5]], other=[[2.0, 2.0]],
                             leak=[[0.5, 1.0]])
    control = make_experiment(control_settings(s), alone=[[2.5, 3.25]], own=[[2.0, 2.75]],
                              other=[[2.0, 2.0]])
    text = state_findings(NATS, [memory, control])
    assert "2.500 alone, 1.750 with phi of own, 2.000 with phi of another prompt" in text
    # Against the baseline, sample by sample: -.5 and -.25 alone, -1 and -.25 adapted.
    assert "paired: -0.3750 +-0.1250 alone, -0.6250 +-0.3750 with the same adaptation" in text
    # The loss with phi of the answers is lower by 1.75: they leak. Nothing leaks if it is higher.
    assert "With phi of the answers, which is what training itself sees, 0.750" in text
    honest = make_experiment(s, alone=[[2.0]], own=[[1.0]], other=[[2.0]], leak=[[2.5]])
    assert "leakage" not in state_findings(NATS, [honest])
    right = make_experiment(s, alone=[[0.2]], own=[[0.4]], other=[[0.2]], leak=[[0.9]])
    assert "leakage" in state_findings(ACCURACY, [right])
    # Runs of other seeds are no pairs.
    unpaired = control._replace(seeds=[1])
    assert "paired" not in state_findings(NATS, [memory, unpaired])


def test_a_control_is_the_run_without_memory_whatever_its_seed_and_inner_loop():
    s = Settings(data="languages", seed=3)
    wanted, rows = make_experiment(s, alone=[[1.0]]), dict(alone=[[1.0]])
    fits = Settings(data="languages", memory=False, seed=8, inner_lr=0.7, trajectory="cover:2")
    others = [Settings(data="languages", memory=False, lr=1.0),
              Settings(data="prose", memory=False),
              Settings(data="languages", memory=False, min_t=0.5),
              Settings(data="languages", inner_lr=0.7)]
    others = [make_experiment(other, **rows) for other in others]
    assert find_control(wanted, others) is None
    control = make_experiment(fits, **rows)
    assert find_control(wanted, [*others, wanted, control]) is control
    assert find_control(control, [wanted, control]) is None
