"""bench.py made ready for a GPU: what a step spends its time on, a cap on memory, rows at once.

There is no GPU here. What one would say is made up, and only what is done with it is tested.
"""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import bench
import kernels
from test_cli import ROOT, refused

TINY = ["--model", "llada-moe", "--random", "--tiny", "--length", "32", "--repeats", "1",
        "--new-tokens", "2"]


def event(key, count, host=0, gpu=0, on_gpu=False, annotation=False):
    """As the profiler tells it; times in microseconds."""
    return SimpleNamespace(
        key=key, count=count, self_cpu_time_total=host, self_device_time_total=gpu,
        device_type=DeviceType.CUDA if on_gpu else DeviceType.CPU, is_user_annotation=annotation)


LONG = "void at::native::vectorized_elementwise_kernel<4, at::native::" + "Functor<float>, " * 9
ON_A_GPU = [
    event("aten::mm", 40, host=3000, gpu=9000), event("cudaLaunchKernel", 90, host=1000),
    event("cuLaunchKernelEx", 10), event("cudaStreamSynchronize", 3), event("cudaMemcpyAsync", 5),
    event("cudaDeviceSynchronize", 1), event("cudaEventSynchronize", 2),
    event("gemm", 40, gpu=30_000, on_gpu=True), event(LONG, 60, gpu=10_000, on_gpu=True),
    event("a step", 1, gpu=99_000, on_gpu=True, annotation=True)]


def test_a_profile_tells_launches_waits_and_how_busy_the_gpu_is():
    summary = kernels.summarise(ON_A_GPU, seconds=0.1)
    assert (summary["launches"], summary["waits"]) == (100, 5)
    assert summary["busy"] == pytest.approx(0.4)
    assert summary["kernels"] == [["gemm", 40, 30.0, 0.75], [LONG, 60, 10.0, 0.25]]
    assert summary["operations"][:2] == [["aten::mm", 40, 3.0, 0.75],
                                         ["cudaLaunchKernel", 90, 1.0, 0.25]]
    text = kernels.summary_text("x" * 30, summary)
    assert max(map(len, text.splitlines())) <= 100
    assert "100 launches, the host waits 5 times, kernels run 40% of the time" in text
    assert "  vectorized_elementwise_kernel<4, Functor" in text
    assert len(kernels.summarise(ON_A_GPU, 0.1, most=1)["operations"]) == 1


def test_the_profiler_is_read():
    x = torch.ones(8, 8)
    events = kernels.record(lambda: (x @ x).exp(), cuda=False)
    rows = kernels.summarise(events, 1.0)["operations"]
    assert {"aten::mm", "aten::exp"} <= {name for name, *_ in rows}
    assert sum(share for *_, share in rows) == pytest.approx(1)


@pytest.mark.slow
def test_the_profiler_says_nothing():
    """In a process of its own: what it says is settled at its first use in a process."""
    code = "import kernels, torch; kernels.record(lambda: torch.ones(8) + 1, cuda=False)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_the_profile_of_a_tiny_model(cli, tmp_path):
    code, out, err = cli(bench, *TINY, "--profile", "--json", "p.json")
    assert code == 0 and not err and "llada-moe, MemDLM step: " in out
    assert "launches" not in out and max(map(len, out.splitlines()[1:])) <= 100
    profile = json.loads((tmp_path / "p.json").read_text())["profile"]
    calls = {label: dict((row[0], row[1]) for row in profile[label]["operations"])
             for label in ("plain", "MemDLM")}
    assert calls["MemDLM"]["aten::mm"] > calls["plain"]["aten::mm"] > 100
    assert 0.1 < sum(row[3] for row in profile["plain"]["operations"]) <= 1


def test_the_cap_needs_a_gpu_and_a_size_that_it_has(cli, monkeypatch):
    assert "--memory-cap needs a GPU" in refused(cli(bench, *TINY, "--memory-cap", "4"))
    assert "goes with --model" in refused(cli(bench, "--memory-cap", "4"))
    shares = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    assert bench.cap_memory(20) == 20 * 2**30 and shares == [0.25]
    for gib in (0, -1, 81, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--memory-cap is .* at most 80.0"):
            bench.cap_memory(gib)


def test_what_does_not_fit_is_said_and_the_rest_is_measured(cli, tmp_path, monkeypatch):
    whole = bench.works_of

    def too_large(*arguments):
        works = whole(*arguments)
        works["prompt adaptation"] = raise_out_of_memory
        return works

    def raise_out_of_memory(seed):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "works_of", too_large)
    code, out, _ = cli(bench, *TINY, "--json", "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 and "prompt adaptation              does not fit in memory" in out
    assert result["prompt adaptation"] is None and result["decoding 2 with a cache"][0] > 0
    assert out.index("MemDLM step ") < out.index("forward pass") < out.index("decoding 2 tokens")


def test_a_table_prints_its_rows_as_they_come(capsys):
    table = bench.Table(bench.STEPS, bench.WIDEST)
    head = capsys.readouterr().out.splitlines()
    table.add(["llada2.1-mini, 32k words", "1.008", "2.036", "2.02", "1.91", "1.90", "59.2",
               "112.8"])
    row = capsys.readouterr().out.splitlines()
    assert len(row) == 1 and [len(line) for line in head + row] == [100] * 3
    assert [i for i, c in enumerate(row[0]) if c == "|"] == [
        i for i, c in enumerate(head[0]) if c == "|"]
    bench.Table(bench.DECODING, bench.WIDEST)
    assert len(capsys.readouterr().out.splitlines()[0]) <= 100


def test_experts_are_multiplied_as_told(cli, monkeypatch):
    ways = []
    monkeypatch.setattr(bench.experts, "pads", bench.experts.pads)  # to be put back
    monkeypatch.setattr(bench, "measure_profile",
                        lambda case: ways.append(bench.experts.pads(None)) or {})
    for way in ("grouped", "padded"):
        assert cli(bench, *TINY, "--profile", "--experts", way)[0] == 0
    assert ways == [False, True]
