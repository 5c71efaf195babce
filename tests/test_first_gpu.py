"""The first minutes on a GPU: what can be tested without one."""
import json
import shlex
import sys
import time

import pytest
import torch

import bench
import first_gpu
import kernels
from test_bench import ON_A_GPU
from test_cli import refused

ABOUT = {"device": "Test GPU-1 (x)", "driver": "1", "torch": "2"}
GOOD = ['-c "print(\'fine\')"']


def run(steps, folder, about=ABOUT):
    done = first_gpu.run_steps(steps, about, folder)
    assert json.loads((folder / "gpu_test_gpu_1_x.json").read_text())["steps"] == done
    return done, (folder / "gpu_test_gpu_1_x.md").read_text()


def test_without_a_gpu_one_line(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no GPU here" in refused(cli(first_gpu, "--out", tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_a_failure_is_recorded_and_loses_nothing_and_the_next_call_goes_on(tmp_path, capsys):
    count = tmp_path / "count"
    once = f'-c "open(r\'{count}\', \'a\').write(\'x\')"'
    flag = tmp_path / "mended"
    bad = f'-c "import os, sys; print(7); sys.exit(not os.path.exists(r\'{flag}\'))"'
    steps = {"first": [once], "second": [bad, once], "third": GOOD}
    done, page = run(steps, tmp_path)
    assert [result["ok"] for result in done.values()] == [True, False, True]
    assert done["second"]["exit_code"] == 1 and done["second"]["last_lines"] == ["7"]
    assert "| second | failed, exit code 1 |" in page and "## Failed: second" in page
    assert "driver 1" in page and count.read_text() == "x"  # the rest of the second did not run
    assert "    fine\n" in capsys.readouterr().out
    flag.write_text("")
    done, page = run(steps, tmp_path)
    assert all(result["ok"] for result in done.values()) and "Failed" not in page
    assert count.read_text() == "xx" and "was done before" in capsys.readouterr().out
    assert list(done) == list(steps)
    run(steps, tmp_path, ABOUT | {"torch": "3"})  # what others measured does not count
    assert count.read_text() == "xxxx"


@pytest.mark.parametrize("text", ["[]", '{"about": {}}', '{"steps": [1]}', '{"steps": {"a": 1}}',
                                  '{"steps": {"a": {"ok": false, "commands": [], "seconds": 1}}}'])
def test_a_damaged_file_of_results_is_one_line(tmp_path, text):
    (tmp_path / "gpu_test_gpu_1_x.json").write_text(text)
    with pytest.raises(ValueError, match="is not what this program writes; move it away"):
        first_gpu.run_steps({"first": GOOD}, ABOUT, tmp_path)


def test_a_command_that_takes_too_long_ends():
    begin = time.monotonic()
    code, tail = first_gpu.run_command(
        ["-c", "import time; print(1, flush=True); time.sleep(60)"], limit=1)
    assert code and tail == ["1", "stopped after 1 s"] and time.monotonic() - begin < 15


def test_the_page_has_times_memory_and_kernels(tmp_path):
    measured = {"length": 2048, "planned_total": 15 * 2**30, "plain step": [0.5, 2**33],
                "MemDLM step": [0.75, 14 * 2**30], "forward pass": [0.1, 1],
                "prompt adaptation": None, "decoding 32 tokens": [3.2, 1],
                "decoding 32 with a cache": [0.32, 1]}
    profiled = {"profile": {"MemDLM": kernels.summarise(ON_A_GPU, 0.1)}}
    result = {"commands": [], "ok": True, "seconds": 9}
    page = first_gpu.make_page(ABOUT, {"a": result | {"measured": measured},
                                       "b": result | {"measured": profiled}, "c": result})
    assert ("| a | 2,048 | 0.500 | 0.750 | 0.100 | does not fit | 0.100 | 0.010 | 15.0 | 14.0 |"
            in page)
    assert "| b | MemDLM | 0.100 | 100 | 5 | 40% |" in page
    tables = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert tables == [4] * 5 + [11] * 3 + [7] * 3


def test_the_command_lines_are_understood(monkeypatch):
    """Every step of bench.py, up to where it would measure."""
    asked = []
    monkeypatch.setattr(bench, "measure_real", lambda name, *rest: asked.append(name) or {})
    monkeypatch.setattr(bench, "middle_case", lambda name, *rest, device: asked.append(device))
    monkeypatch.setattr(bench, "real_case", lambda name, *rest: asked.append(name))
    monkeypatch.setattr(bench, "measure_profile", lambda case: asked.append("profile") or {})
    monkeypatch.setattr(bench, "cap_memory", lambda gib: asked.append(gib))
    monkeypatch.setattr(bench, "write_json", lambda *rest, **options: None)
    monkeypatch.setattr(bench.experts, "pads", bench.experts.pads)  # to be put back
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    for commands in first_gpu.make_steps(16).values():
        words = shlex.split(commands[0])
        if words[0] == "bench.py":
            monkeypatch.setattr(sys, "argv", words)
            bench.main()
    assert asked[:2] == ["cuda", "profile"] and asked.count("profile") == 3
    assert asked.count("llada-moe") == 3 and asked.index("llada2.1-mini") == asked.index(16) + 1
