"""What goes wrong in practice.

Runs are killed, prompts are odd, files are broken or come from strangers. Nothing may be lost, run,
or written where it should not be. What cannot be used is refused in one line.
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from safetensors.torch import load_file, save_file

import backbones.lora as lora
import evaluate
import files
import generate
import memdlm
import runs
import train
from backbones.checkpoint import load_backbone
from backbones.families import PUBLISHED, translate
from backbones.lora import add_lora, read_adapter, save_adapter
from backbones.tiny import write_tiny
from runs import build, load_checkpoint, read_settings, save_checkpoint
from settings import Settings
from test_cli import refused
from toy import text
from toy.model import ToyConfig, ToyDLM

sys.path.insert(0, str(Path(__file__).parent))
import crash  # noqa: E402
import soak  # noqa: E402

# Mutated inputs per fuzzer; a person may start many more.
MANY = int(os.environ.get("MEMDLM_FUZZ", 2000))
V, MASK = 24, 1


def toy_model(layers=2):
    return ToyDLM(ToyConfig(V, MASK, width=16, layers=layers, heads=2),
                  seed=0).requires_grad_(False).eval()


def state(model):
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    return weights, [m.training for m in model.modules()], hooks


def same_state(model, before):
    now = state(model)
    same_weights = all(torch.equal(p, before[0][name]) for name, p in now[0].items())
    return same_weights and now[1:] == before[1:]


TINY = ["--steps", "6", "--batch", "2", "--width", "16", "--layers", "1", "--heads", "2",
        "--log-every", "1", "--save-every", "3", "--sample-every", "0", "--table-samples", "0",
        "--threads", "1", "--no-control"]


# ---- Kills and signals ---------------------------------------------------------------------------

@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing(tmp_path, monkeypatch):
    """A run is killed a dozen times, half of them while it writes a checkpoint.

    crash.py forks, so it has a process of its own.
    """
    run = subprocess.run([sys.executable, crash.__file__, "--kills", "12"], capture_output=True,
                         text=True, timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["kills"] == 12 and report["while_saving"] > 1
    assert report["different"] == report["unreadable"] == 0
    assert report["most_repeated"] <= crash.EVERY and report["runs"] >= 1


def test_the_soak_test_tells_growth_from_noise():
    noise = random.Random(0)
    # Megabytes after each round: 50 more in the first six rounds, then the same with some noise.
    flat = [400 + 50 * min(1, i / 6) + noise.uniform(-4, 4) for i in range(60)]
    for levels, leak in ((flat, 0.75), (flat[:30], 2)):
        assert not soak.growth(levels)[2]
        assert soak.growth([level + leak * i for i, level in enumerate(levels)])[2]


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_say_how_to_go_on(tmp_path, number, code):
    flags = [*crash.FLAGS, "--steps", "3000", "--save-every", "1000", "--out", "r"]
    run = subprocess.Popen([sys.executable, train.__file__, *flags], cwd=tmp_path,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (tmp_path / "r/metrics.jsonl").exists() or crash.last_step(tmp_path / "r") < 3:
        time.sleep(0.05)
    run.send_signal(number)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == code and "saved; go on with: python train.py --resume r" in out
    assert 3 < crash.saved_step(tmp_path / "r") < 3000


def test_resume_names_what_has_changed(cli, tmp_path, monkeypatch):
    pairs = tmp_path / "d.jsonl"
    pairs.write_text("\n".join(json.dumps({"prompt": f"p {i}", "response": "r"}) for i in range(8)))
    assert cli(train, *TINY, "--data", "d.jsonl", "--out", "r")[0] == 0
    assert cli(train, "--resume", "r")[0] == 0
    pairs.write_text(pairs.read_text() + "\n" + json.dumps({"prompt": "one more", "response": "r"}))
    assert "another data (" in refused(cli(train, "--resume", "r"))
    assert cli(train, "--resume", "r", "--anyway")[0] == 0
    pairs.unlink()
    assert "now missing" in refused(cli(train, "--resume", "r"))
    origin = json.loads((tmp_path / "r/origin.json").read_text())
    assert {"torch", "memdlm.py", "train.py", "toy/model.py", "toy/data.py"} <= set(origin)
    assert "llada.py" not in origin
    (tmp_path / "r/origin.json").write_text(json.dumps(origin | {"memdlm.py": "0", "torch": "1.0"}))
    line = refused(cli(train, "--resume", "r"))
    assert "memdlm.py (0, now" in line and "torch (1.0, now" in line and "--anyway" in line


# ---- Prompts and masks ---------------------------------------------------------------------------

def test_an_empty_prompt_is_refused_or_leaves_the_model_as_it_was(cli, tmp_path):
    model = toy_model()
    before = state(model)
    for shape in ((1, 0), (0, 5)):
        try:
            memdlm.adapt(model, memdlm.Settings(), torch.zeros(shape, dtype=torch.long),
                         torch.zeros(shape, dtype=torch.bool), [0] * shape[0])
        except (ValueError, RuntimeError, IndexError):
            pass
        assert same_state(model, before)
    # One of two prompts has no valid token and gets no memory. The other gets all of its own.
    prompt, valid = torch.randint(2, V, (2, 6)), torch.tensor([[True] * 6, [False] * 6])
    phi, record = memdlm.adapt(model, memdlm.Settings(), prompt, valid, [0, 1])
    alone, _ = memdlm.adapt(model, memdlm.Settings(), prompt[:1], valid[:1], [0])
    for name, (A, B) in phi.items():
        assert B[1].abs().max() == 0 and B[0].abs().max() > 0
        assert torch.allclose(B[0], alone[name][1][0], atol=1e-7)


def test_prompts_of_one_to_three_tokens_are_adapted():
    model = toy_model()
    for n in (1, 2, 3):
        for seed in range(8):
            phi, record = memdlm.adapt(model, memdlm.Settings(), torch.randint(2, V, (1, n)),
                                       torch.ones(1, n, dtype=torch.bool), [seed])
            assert any(B.abs().max() > 0 for _, B in phi.values()) and record["inner"].min() > 0


def test_masks_in_the_prompt_are_left_and_cost_no_answer():
    model = toy_model()
    x = torch.tensor([[5, MASK, 7, 0, 0, 0]])
    fill = torch.tensor([[False] * 3 + [True] * 3])
    for canvas in memdlm.denoise(model, memdlm.Settings(), x, fill, torch.ones_like(fill), [0]):
        pass
    assert torch.equal(canvas[0, :3], x[0, :3]) and (canvas[0, 3:] != MASK).all()


def test_a_model_that_loves_the_mask_never_says_it():
    model = toy_model()
    model.lm_head.weight.zero_()  # all logits are equal; then the mask's is by far the largest
    for bias in (0.0, 50.0):
        model.lm_head.register_forward_hook(lambda module, inputs, out, bias=bias: out.index_add(
            1, torch.tensor([MASK]), torch.full((len(out), 1), bias)))
        fill = torch.ones(2, 5, dtype=torch.bool)
        for canvas in memdlm.denoise(model, memdlm.Settings(), torch.zeros(2, 5, dtype=torch.long),
                                     fill, fill, [0, 1], temperature=1.0):
            pass
        assert (canvas != MASK).all()


def test_two_memories_on_one_model_do_not_know_each_other():
    """phi is a value. Two of different kinds act where they are given, and nowhere else."""
    model, x, valid = toy_model(), torch.randint(2, V, (1, 6)), torch.ones(1, 6, dtype=torch.bool)
    one, two = (memdlm.Settings(inner_lr=0.5),
                memdlm.Settings(inner_lr=0.5, adapter="full", layer_fraction=1.0, scope="ffn+attn"))
    first, second = (memdlm.adapt(model, s, x, valid, [0])[0] for s in (one, two))

    def out(s, phi):
        return memdlm.upper_layers(model, s, memdlm.lower_layers(model, s, x, valid), valid, phi)

    plain, with_first, with_second = out(one, None), out(one, first), out(two, second)
    assert not torch.equal(plain, with_first) and not torch.equal(with_first, with_second)
    assert torch.equal(out(one, first), with_first) and torch.equal(out(two, None), plain)


def test_after_decoding_with_memory_nothing_of_it_is_left():
    model, x, valid = toy_model(), torch.randint(2, V, (1, 6)), torch.ones(1, 6, dtype=torch.bool)
    before, s = state(model), memdlm.Settings(inner_lr=1.0)
    plain = memdlm.response_nll(model, s, x, valid, valid)
    phi, _ = memdlm.adapt(model, s, x, valid, [0])
    list(memdlm.denoise(model, s, x, valid, valid, [0], phi))
    assert same_state(model, before)
    assert torch.equal(memdlm.response_nll(model, s, x, valid, valid), plain)


@pytest.mark.slow
def test_a_thousand_prompts_leave_weights_and_modes_bit_for_bit_and_memory_flat():
    model, s = toy_model(), memdlm.Settings(trajectory="cover:4", inner_lr=0.3)
    model.layers[0].train()  # an odd mode, to be kept
    before, levels = state(model), []
    generator = torch.Generator().manual_seed(0)
    for i in range(1000):
        x = torch.randint(2, V, (1, 1 + i % 40), generator=generator)
        valid = torch.ones_like(x, dtype=torch.bool)
        phi, _ = memdlm.adapt(model, s, x, valid, [i])
        if i % 10 == 0:
            list(memdlm.denoise(model, s, x, valid, valid, [i], phi, steps=2))
        if i in (200, 999) and sys.platform == "linux":
            levels.append(soak.resident())
    assert same_state(model, before)
    assert not levels or levels[1] - levels[0] < 20, levels


def test_a_diverging_inner_loop_is_cut_off_and_the_model_is_as_before():
    model, x, valid = toy_model(), torch.randint(2, V, (1, 9)), torch.ones(1, 9, dtype=torch.bool)
    before = state(model)
    s = memdlm.Settings(inner_lr=1e9, clip="none", inner_steps=4)
    phi, record = memdlm.adapt(model, s, x, valid, [0])
    assert same_state(model, before)
    assert all(torch.isfinite(w).all() for pair in phi.values() for w in pair)


# ---- Data ----------------------------------------------------------------------------------------

GOOD = json.dumps({"prompt": "what is up", "response": "the sky"})


@pytest.mark.parametrize("line, says", [
    ('{"prompt": "a", "response": ""}', "'response' is empty"),
    ('{"prompt": "a", "response": 3}', "'response' must be text, not int"),
    ('{"prompt": null, "response": "b"}', "'prompt' must be text, not NoneType"),
    ('["a", "b"]', "must be a JSON object, not list"),
    ('{"prompt": "a", "prompt": "c", "response": "b"}', "'prompt' stands twice"),
    ('{"prompt": "a"}', "no 'response'"),
    ('{"prompt": "\\ud800", "response": "b"}', "line 2"),
    ("{" * 200_000, "line 2"),
    ("[" * 200_000, "line 2"),
    ("{broken", "line 2"), ("nonsense", "line 2"), ("\x00", "line 2")])
def test_a_bad_line_is_named_by_its_number_or_skipped_and_counted(tmp_path, line, says):
    path = tmp_path / "d.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match="line 2") as error:
        text.read_pairs(path)
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert text.read_pairs(path, skip_bad=True) == ([("what is up", "", "the sky")] * 2, 1)


def test_windows_lines_byte_order_marks_and_gigantic_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.encode() + b"\r\n")
    assert text.read_pairs(path) == ([("what is up", "", "the sky")] * 2, 0)
    path.write_text(json.dumps({"prompt": "x" * 20_000_000, "response": "y"}) + "\n" + GOOD)
    assert len(text.read_pairs(path)[0]) == 2
    umlauts = json.dumps({"prompt": "ä", "response": "ö"}, ensure_ascii=False)
    for encoding in ("utf-16", "latin-1"):
        path.write_bytes(f"{GOOD}\n{umlauts}".encode(encoding))
        with pytest.raises(ValueError, match="not UTF-8"):
            text.read_pairs(path)


@pytest.mark.parametrize("name", ["<mask>", "<pad>", "<eos>", "<|mask|>", "<|endoftext|>", "<sep>"])
def test_the_names_of_special_tokens_in_text_are_text(tmp_path, name):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": f"a {name} b", "response": name}))
    (pair,), _ = text.read_pairs(path)
    sample = text.pair_sample(pair, 256, 64)
    # The special tokens have the ids 0 to 3. Bytes follow them.
    assert min(sample.prompt) > 3 and text.BYTES.decode(sample.prompt) == f"a {name} b"
    answer = [i for i, wanted in zip(sample.rest, sample.answer) if wanted]
    assert min(answer[:len(name)]) > 3  # behind these stands the end


def mutate(data, rng):
    """Change a few random bytes: flip, cut or double them, or insert what breaks parsers."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[i % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[i:i + rng.randint(1, 20)]
        elif kind == 2:
            data[i:i] = data[max(0, i - rng.randint(1, 30)):i]
        elif kind == 3:
            data[i:i] = rng.choice([b"\n", b'"', b"{", b"[", b"}", b"\\u0000", b"\\ud800", b"1e999",
                                    b"-1", b"NaN", b"null", b"\xff", b"99999999999999"])
        else:
            data[i:i] = bytes(rng.randrange(256) for _ in range(3))
    return bytes(data)


def test_fuzz_the_data_reader(tmp_path):
    """Each of many damaged files is read or refused in one line. What is read is text."""
    rng, path, read = random.Random(0), tmp_path / "d.jsonl", 0
    records = [json.loads(GOOD), {"instruction": "do", "input": "it", "output": "done"},
               {"prompt": "ä", "question": "?", "response": "ö"}]
    sources = ["\n".join(map(json.dumps, records)).encode(), json.dumps(records).encode()]
    for i in range(MANY):
        path.write_bytes(mutate(sources[i % 2], rng))
        try:
            pairs, _ = text.read_pairs(path, skip_bad=bool(rng.randrange(2)))
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        read += 1
        for pair in pairs:
            assert all(isinstance(part, str) for part in pair)
            assert pair[0].strip() and pair[2].strip()
            try:
                text.pair_sample(pair, 256, 64)
            except ValueError as error:
                assert "fit" in str(error)
    assert MANY / 20 < read < MANY


# ---- Files from strangers ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "m"
    write_tiny("llada-moe", folder)
    return folder


ODD = [None, True, -1, 0, 1, 3, 10**9, 10**30, 1e400, 0.5, "a", "", [], {}, [1], {"a": 1},
       "../../etc/passwd", float("nan"), [[]] * 3, 2**31]


def test_fuzz_the_translation_of_a_config():
    """Up to three fields hold something odd. The config is refused or stays within bounds."""
    rng, taken = random.Random(1), 0
    good = [raw | {"mask_token_id": 5, "eos_token_id": 6} for raw in PUBLISHED.values()]
    for i in range(MANY):
        raw = dict(good[i % len(good)])
        for name in rng.sample(list(raw), rng.randint(1, 3)):
            if rng.random() < 0.2:
                del raw[name]
            else:
                raw[name] = rng.choice(ODD)
        try:
            config = translate(raw)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            continue
        taken += 1
        assert 1 <= config.layers <= 1000 and 1 <= config.width <= 1 << 20
        assert 1 <= config.vocab_size <= 1 << 24
        assert 0 <= config.experts <= 1 << 14 and config.heads >= 1
    assert 0 < taken < MANY / 2


@pytest.mark.slow
def test_fuzz_adapters(tmp_path, hub):
    """A damaged adapter is loaded with finite weights, or refused in one line."""
    backbone = load_backbone(str(hub))
    add_lora(backbone, 8, 16.0, 0.0, scope="attention")
    save_adapter(backbone, tmp_path / "a")
    parts = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()
             if path.suffix in (".json", ".safetensors")}
    rng, loaded = random.Random(2), 0
    for i in range(MANY // 2):
        for name, data in parts.items():
            if name.endswith("json"):
                data = mutate(data, rng)
            else:  # only the header is damaged, which holds names, shapes and offsets
                size = 8 + int.from_bytes(data[:8], "little")
                data = mutate(data[:size], rng) + data[size:] if i % 3 else data
            (tmp_path / "a" / name).write_bytes(data)
        try:
            raw, tensors = read_adapter(str(tmp_path / "a"), "m")
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        loaded += 1
        assert all(torch.isfinite(t).all() for t in tensors.values()) and 0 < raw["r"] <= 1 << 16
    assert loaded < MANY / 2
    # An adapter that is whole, but has a weight that is not a number, is refused.
    for name, data in parts.items():
        (tmp_path / "a" / name).write_bytes(data)
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        read_adapter(str(tmp_path / "a"), "m")


def test_fuzz_checkpoints_of_runs(cli, tmp_path):
    """A damaged model.safetensors is loaded with finite weights or refused in one line."""
    assert cli(train, *TINY, "--data", "languages", "--out", "r")[0] == 0
    path, rng, loaded = tmp_path / "r/model.safetensors", random.Random(3), 0
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    s = read_settings(tmp_path / "r")
    for i in range(MANY // 4):
        path.write_bytes(mutate(whole[:size], rng) + whole[size:] if i % 3 else mutate(whole, rng))
        _, model = build(s)
        try:
            step = load_checkpoint(tmp_path / "r", model)
        except ValueError as error:
            assert "\n" not in str(error) and "model.safetensors" in str(error)
            continue
        loaded += 1
        assert all(p.isfinite().all() for p in model.parameters()) and isinstance(step, int)
    assert loaded < MANY / 4


@hypothesis_settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(
    st.sampled_from([f.name for f in fields(Settings)] + ["__class__", "nonsense"]),
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
              st.lists(st.integers(), max_size=2))))
def test_settings_of_a_strange_run_are_sound_or_refused(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("r")
    (folder / "settings.json").write_text(json.dumps(asdict(Settings()) | values))
    try:
        s = read_settings(folder)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    for f in fields(s):
        kind = {"int": int, "float": (int, float), "str": str, "bool": bool}[f.type]
        assert isinstance(getattr(s, f.name), kind), f.name
    assert s.width <= 1 << 14 and s.layers <= 1000


def test_bombs_are_refused_before_anything_is_built(cli, tmp_path, hub):
    for values in ({"width": 10**9}, {"layers": 10**9}, {"heads": 10**9},
                   {"prompt_length": 10**12}, {"lr": 1e300}, {"batch": 10**10}):
        (tmp_path / "r").mkdir(exist_ok=True)
        (tmp_path / "r/settings.json").write_text(json.dumps(asdict(Settings()) | values))
        assert "must lie between" in refused(cli(generate, "--run", "r"))
    raw = json.loads((hub / "config.json").read_text())
    for values in ({"num_hidden_layers": 10**9}, {"vocab_size": 10**12}, {"num_experts": 10**9}):
        with pytest.raises(ValueError, match=next(iter(values))):
            translate(raw | values)


@pytest.mark.parametrize("values, says", [
    ({"threads": 5000}, "threads is 5000; it must lie"), ({"steps": True}, "'steps' is True"),
    ({"lr": float("nan")}, "lr is nan"), ({"lr": float("inf")}, "lr is inf"),
    ({"grad_clip": float("nan")}, "grad_clip is nan"), ({"lr": 10**400}, "lr is 1000"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf"), ({"seed": 10**40}, "seed is 1000"),
    ({"split_seed": -10**40}, "split_seed is -1000"), ({"min_t": float("nan")}, "min_t is nan"),
    ({"width": 16384, "layers": 1000}, "more than 268 million weights"),
    ({"trajectory": "cover:1000000000"}, "K x R from 1 to 1000"),
    ({"trajectory": "cover:" + "9" * 5000}, "K x R from 1 to 1000"),
    ({"trajectory": "cover:1000x1000"}, "K x R from 1 to 1000"),
    ({"trajectory": "x" * 10**6}, "trajectory is 'xxx"), ({"\x1b[2J": 1}, r"'\\x1b\[2J' is 1"),
    ({"rank": 1 << 20}, "rank is 1048576"), ("[]", "its content is no object"),
    ('{"steps": 3, "steps": 4}', "'steps' stands twice"), ("[" * 10**5, "recursion"),
    (" " * (1 << 24) + " ", "no file of at most 16 MB")])
def test_settings_that_no_run_can_have_are_refused_in_one_line(tmp_path, values, says):
    text = values if isinstance(values, str) else json.dumps(asdict(Settings()) | values)
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        read_settings(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_settings_from_a_pipe_are_not_waited_for_and_infinity_may_be_a_setting(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"grad_clip": float("inf")}))
    assert read_settings(tmp_path).grad_clip == float("inf")
    (tmp_path / "settings.json").unlink()
    os.mkfifo(tmp_path / "settings.json")
    with pytest.raises(ValueError, match="a link or a special file"):
        read_settings(tmp_path)


def change_tensor(key, change):
    return lambda tensors, state: tensors.update({key: change(tensors[key])})


@pytest.mark.parametrize("change, says", [
    *((lambda tensors, state, step=step: state.update(step=step), "its step is")
      for step in (-3, 10**9, 5.0, True, "5", None)),
    (lambda tensors, state: state.update(processes=0.5), "its processes is 0.5"),
    (lambda tensors, state: state.clear(), "not a checkpoint of this program: 'step'"),
    (change_tensor("model.norm.weight", lambda x: x.long()), "holds I64"),
    (change_tensor("model.norm.weight", lambda x: x.to(torch.float8_e4m3fn)), "holds F8_E4M3"),
    (change_tensor("adamw.exp_avg.norm.weight", lambda x: x[:3]), "exp_avg of norm.weight"),
    (change_tensor("adamw.exp_avg.norm.weight", lambda x: x / 0), "exp_avg of norm.weight"),
    (change_tensor("adamw.exp_avg_sq.norm.weight", lambda x: x - 1), "exp_avg_sq of norm.weight"),
    (change_tensor("adamw.step.norm.weight", lambda x: x.new_zeros(3)), "step of norm.weight"),
    (lambda tensors, state: tensors.pop("adamw.step.norm.weight"), "step of norm.weight")])
def test_a_checkpoint_holds_what_its_optimiser_keeps(tmp_path, change, says):
    _, model = build(Settings(width=16, layers=1, heads=2, threads=1))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    save_checkpoint(tmp_path, model, optimizer, 5)
    assert load_checkpoint(tmp_path, model, optimizer) == 5
    tensors, state = load_file(tmp_path / "model.safetensors"), dict(step=5, processes=1, base=None)
    change(tensors, state)
    save_file(tensors, tmp_path / "model.safetensors", {"state": json.dumps(state)})
    with pytest.raises(ValueError, match=says) as error:
        load_checkpoint(tmp_path, model, optimizer)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_numbers_are_refused_by_name(tmp_path, hub):
    shutil.copytree(hub, tmp_path / "m")
    path = next((tmp_path / "m").glob("*00001*.safetensors"))
    tensors = load_file(path)
    name = sorted(n for n, t in tensors.items() if t.dim() == 2)[0]
    tensors[name][0, 0] = float("inf")
    save_file(tensors, path, {"format": "pt"})
    says = re.escape(f"{name} holds numbers that are not finite")
    with pytest.raises(ValueError, match=says):
        load_backbone(str(tmp_path / "m"))


def test_pickles_and_code_in_a_folder_are_not_touched(cli, tmp_path):
    """A run folder with pickles for weights and a script is refused. Nothing of it has run."""
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/owned",))

    assert cli(train, *TINY, "--data", "languages", "--out", "r")[0] == 0
    for name in ("model.safetensors", "pytorch_model.bin", "optimizer.pt"):
        (tmp_path / "r" / name).write_bytes(pickle.dumps(Evil()))
    (tmp_path / "r/toy.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    before = {path for path in tmp_path.rglob("*")}
    assert "not a checkpoint" in refused(cli(generate, "--run", "r", "--prompt", "ba be"))
    assert {path for path in tmp_path.rglob("*")} == before and not (tmp_path / "owned").exists()


# ---- Masks, schedules and decoding under random circumstances ------------------------------------

@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 14), st.integers(1, 14),
       st.sampled_from([0.0, 0.7]), st.sampled_from(["low_confidence", "random"]),
       st.integers(0, 1000))
def test_decoding_fills_each_gap_once_and_nothing_else(rows, length, steps, block, temperature,
                                                       remasking, seed):
    model, generator = toy_model(1), torch.Generator().manual_seed(seed)
    x = torch.randint(2, V, (rows, length), generator=generator)
    valid = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    fill = valid & (torch.rand(rows, length, generator=generator) < 0.6)
    canvases = list(memdlm.denoise(
        model, memdlm.Settings(), x, fill, valid, list(range(rows)), steps=steps,
        block_length=block, temperature=temperature, remasking=remasking))
    before = torch.where(fill, MASK, x)
    for canvas in canvases:
        assert torch.equal(canvas[~fill], x[~fill])
        assert ((canvas == before) | (before == MASK))[fill].all()
        before = canvas
    assert not canvases or (canvases[-1][fill] != MASK).all()
    assert bool(canvases) == bool(fill.any())


@hypothesis_settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sampled_from(["consistent", "pre_only", "anchor_only", "inconsistent", "cover:1",
                        "cover:3", "cover:50"]),
       st.integers(2, 6), st.floats(1, 5), st.floats(0, 1),
       st.sampled_from(["clean", "anchor_tokens"]), st.booleans(), st.integers(0, 10**6))
def test_stages_stay_within_what_may_be_masked(trajectory, steps, scale, ratio, target, weighted,
                                               seed):
    s = memdlm.Settings(trajectory=trajectory, inner_steps=steps, pre_scale=scale,
                        anchor_ratio=ratio, stage1_target=target)
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(2, V, (3, 11), generator=generator)
    maskable = torch.rand(3, 11, generator=generator) < 0.6
    t = torch.rand(3, generator=generator)
    masked = maskable & (torch.rand(3, 11, generator=generator) < t[:, None])
    for stage in memdlm.stages(s, x0, masked, maskable, t, [seed, 1, 2], MASK, weighted):
        hidden = stage.x == MASK
        assert not (hidden & ~maskable).any() and not (stage.targets & ~hidden).any()
        assert torch.equal(stage.x[~hidden], x0[~hidden])
        assert stage.weight.isfinite().all() and (stage.weight >= 0).all()


# ---- Run folders of strangers, and runs at once --------------------------------------------------

SMALL = [*TINY, "--width", "8", "--heads", "1", "--data", "languages"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run that is to be copied, made once."""
    folder = tmp_path_factory.mktemp("small")
    s = settings_of(SMALL)
    train.train(s, folder / "r", None, SimpleNamespace(signal=None), train.Processes())
    return folder / "r"


def settings_of(flags):
    """The settings of these flags, which need no command line."""
    parser = train.Parser()
    train.add_flags(parser, Settings.__dataclass_fields__)
    return train.settings_from_flags(vars(parser.parse_args(flags)))


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo"])
@pytest.mark.parametrize("name", ["settings.json", "origin.json", "model.safetensors", "lock",
                                  "metrics.jsonl", "loss.png", "metrics.jsonl.tmp", "adapter",
                                  "adapter/base.json", "control", "control/metrics.jsonl"])
def test_a_run_folder_that_leads_elsewhere_is_refused(cli, tmp_path, small_run, name, kind):
    shutil.copytree(small_run, tmp_path / "r")
    place, victim = tmp_path / "r" / name, tmp_path / "victim"
    place.parent.mkdir(exist_ok=True)
    victim.write_bytes(place.read_bytes() if place.exists() else b"{}")
    before = victim.read_bytes()
    place.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "link":
        place.symlink_to(victim)
    else:
        os.link(victim, place)
    for command in ((train, "--resume", "r"), (generate, "--run", "r"), (evaluate, "r")):
        line = refused(cli(*command))
        assert f"r/{name} is a link or a special file" in line
    if name != "settings.json":
        (tmp_path / "r/settings.json").unlink()  # it is no run, so --out may take it
        assert "is a link or a special file" in refused(cli(train, *SMALL, "--out", "r"))
    assert victim.read_bytes() == before


def test_a_file_is_written_under_a_fresh_name_and_for_all_to_read(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("secret")
    for name in ("o.tmp", "o"):
        (tmp_path / name).symlink_to(victim)
    for write in (lambda path: path.write_text("new"),
                  lambda path: files.write_tensors(path, {"a": torch.zeros(2)}, {})):
        files.write_whole(tmp_path / "o", write)
        assert (tmp_path / "o").is_file() and not (tmp_path / "o").is_symlink()
        assert (tmp_path / "o").stat().st_mode & 0o777 == 0o666 & ~current_umask()
    assert victim.read_text() == "secret" and (tmp_path / "o.tmp").is_symlink()
    with pytest.raises(OSError, match="o could not be written"):
        files.write_text(tmp_path / "no" / "o", "new")
    for place in (tmp_path, Path("/dev/null"), Path("/dev/stdout")):
        with pytest.raises(OSError, match="no plain file"):
            files.write_text(place, "new")
    assert len(list(tmp_path.iterdir())) == 3


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_name_that_is_taken_is_not_opened(tmp_path, monkeypatch):
    """Even a stranger who guessed the random name would not be written to."""
    (tmp_path / "victim").write_text("secret")
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "00" * size)
    (tmp_path / f"{'00' * 8}.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="File exists"):
        files.write_text(tmp_path / "o", "new")
    assert (tmp_path / "victim").read_text() == "secret" and not (tmp_path / "o").exists()


def test_what_a_killed_run_left_is_removed_and_nothing_else(cli, tmp_path, small_run):
    shutil.copytree(small_run, tmp_path / "r")
    ours = ["0123456789abcdef.tmp", ".tmpAb3dEf", "control/00000000000000ff.tmp"]
    theirs = ["mine.tmp", "0123.tmp", "0123456789abcdef.tmp2", "control/notes"]
    (tmp_path / "r/control").mkdir()
    for name in ours + theirs:
        (tmp_path / "r" / name).write_text("x")
    (tmp_path / "r/00112233445566ff.tmp").mkdir()
    assert cli(train, "--resume", "r")[0] == 0
    left = {str(path.relative_to(tmp_path / "r")) for path in (tmp_path / "r").rglob("*")}
    assert not left & set(ours) and left >= {*theirs, "00112233445566ff.tmp"} and "lock" not in left


def test_starts_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: runs.pick_folder(Settings()), range(8)))
    assert len(folders) == 8 and Path("runs/dictionary-8") in folders


@pytest.mark.parametrize("out", [["--out", "a/b"], []])
def test_a_start_that_fails_leaves_nothing(cli, tmp_path, monkeypatch, out):
    refused(cli(train, *SMALL, *out, "--data", "nowhere.jsonl"))
    refused(cli(train, *SMALL, *out, "--heads", "3"))
    with monkeypatch.context() as patch:
        write = runs.write_json
        patch.setattr(runs, "write_json", lambda path, *rest, **options: write(path, *rest)
                      if path.name == "origin.json" else write(Path("no/such"), *rest))
        refused(cli(train, *SMALL, *out))
    assert not list(tmp_path.iterdir())
    (tmp_path / "a/b").mkdir(parents=True)
    refused(cli(train, *SMALL, "--out", "a/b", "--data", "nowhere.jsonl"))
    assert (tmp_path / "a/b").is_dir()


def test_a_run_is_trained_by_one_process_at_a_time(cli, tmp_path, small_run):
    shutil.copytree(small_run, tmp_path / "r")
    shutil.copytree(small_run, tmp_path / "r/control")
    begun, child = os.pipe(), os.fork()
    if child == 0:  # it holds the run until it is killed
        with runs.hold_run(tmp_path / "r"):
            os.write(begun[1], b"x")
            time.sleep(60)
            os._exit(1)
    os.read(begun[0], 1)
    for folder in ("r", "r/control"):
        line = refused(cli(train, "--resume", folder))
        assert f"process {child} trains it" in line
    assert cli(generate, "--run", "r")[0] == 0
    (tmp_path / "r/settings.json").rename(tmp_path / "s")
    assert f"process {child} trains it" in refused(cli(train, *SMALL, "--out", "r"))
    (tmp_path / "s").rename(tmp_path / "r/settings.json")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "r/lock").exists()
    assert cli(train, "--resume", "r")[0] == 0 and not (tmp_path / "r/lock").exists()


def test_without_locks_of_the_system_nothing_is_locked(cli, tmp_path, small_run, monkeypatch):
    shutil.copytree(small_run, tmp_path / "r")
    monkeypatch.setattr(files, "fcntl", None)
    assert cli(train, "--resume", "r")[0] == 0


def test_only_the_first_process_makes_a_folder_and_locks_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    second = SimpleNamespace(is_first=False)
    assert train.start_run(None, Settings(), second)[1] == [] and not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes, whose free bytes can be set."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")

    def leave_free(size):
        (folder / "fill").unlink(missing_ok=True)
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        (folder / "fill").write_bytes(b"\0" * (free - size))
    yield folder, leave_free
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full_costs_the_file_that_is_written_and_no_more(cli, small_disk):
    folder, leave_free = small_disk
    for free, left in ((0, None), (4096, None), (8192, None),
                       (12288, {"settings.json", "origin.json", "metrics.jsonl"}),
                       (40960, {"settings.json", "origin.json", "metrics.jsonl"})):
        leave_free(free)
        code, out, err = cli(train, *SMALL, "--out", folder / "r")
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and "No space left" in lines[0], (free, err)
        assert lines[0].startswith(f"error: {folder / 'r'}/") and err.endswith(lines[0] + "\n")
        names = {path.name for path in (folder / "r").iterdir()} if left else None
        assert names == left if left else not (folder / "r").exists()
        shutil.rmtree(folder / "r", ignore_errors=True)


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(cli, small_disk, monkeypatch):
    folder, leave_free = small_disk
    show = train.show_progress
    def fill(s, data, model, step, *rest):
        show(s, data, model, step, *rest)
        if step == 3:  # after the first checkpoint
            leave_free(0)
    with monkeypatch.context() as patch:
        patch.setattr(train, "show_progress", fill)
        code, _, err = cli(train, *SMALL, "--out", folder / "r")
    assert code == 2 and "No space left" in err and "Traceback" not in err
    (folder / "fill").unlink()
    assert cli(train, "--resume", folder / "r")[0] == 0
    assert [line["step"] for line in crash.metrics(folder / "r")] == list(range(6))


def test_a_picture_that_cannot_be_written_does_not_cost_the_run(cli, small_disk, monkeypatch):
    folder, leave_free = small_disk
    save = train.save_checkpoint
    def fill(run, model, optimizer, step, *rest):
        save(run, model, optimizer, step, *rest)
        if step == 6:
            leave_free(0)
    monkeypatch.setattr(train, "save_checkpoint", fill)
    code, out, err = cli(train, *SMALL, "--table-samples", "2", "--out", folder / "r")
    assert code == 0 and "no loss.png: " in out and "No space left" in out, out
    assert "nothing (theta alone)" in out and "python generate.py" in out
    assert crash.saved_step(folder / "r") == 6
    assert not (folder / "r/panel.png").exists() and not list((folder / "r").glob("*.tmp"))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1}', '{"torch": null}', "\xff",
                                  "[" * 100_000, '{"a": "' + "x" * 1000 + '"}'])
def test_a_damaged_origin_is_named_and_need_not_block(cli, tmp_path, small_run, text):
    shutil.copytree(small_run, tmp_path / "r")
    (tmp_path / "r/origin.json").write_text(text, encoding="latin-1")
    line = refused(cli(train, "--resume", "r"))
    assert "origin.json is damaged" in line and "--anyway" in line and len(line) < 400
    assert cli(train, "--resume", "r", "--anyway")[0] == 0


def test_damaged_lines_of_metrics_are_left_out(cli, tmp_path, small_run):
    shutil.copytree(small_run, tmp_path / "r")
    path = tmp_path / "r/metrics.jsonl"
    sound = path.read_bytes()
    odd = [b"3", b"[]", b"null", b"{}", b'{"step": "1"}', b'{"step": true, "ce": 1}', b"\xff\xfe",
           b'{"step": 1, "ce": "x"}', b'{"step": 1, "inner": [[1]]}', b'{"step": 1.5}', b"",
           b'{"step": 1, "ce": 1' + b"0" * 400 + b"}", b"[" * 100_000,
           b'{"step": 1, "a": 1' + b"0" * 5000 + b"}"]
    for lines in (odd, [b'{"step": -3}', b'{"step": 7}', b'{"step": 1' + b"0" * 30 + b"}"]):
        path.write_bytes(b"\n".join(lines) + b"\n" + sound + b'{"half": ')
        code, out, _ = cli(train, "--resume", "r")
        assert code == 0 and path.read_bytes() == sound
        assert (f"{len(odd)} damaged lines were left out" in out) == (lines is odd)
    path.unlink()
    assert cli(train, "--resume", "r")[0] == 0  # there is nothing to draw


def test_the_latest_run_is_the_one_written_to_last(tmp_path):
    names = ["settings.json", "model.safetensors", "metrics.jsonl", "control/metrics.jsonl"]
    for run in ("a", "b"):
        (tmp_path / run / "control").mkdir(parents=True)
        for name in names:
            (tmp_path / run / name).write_text("x")
            os.utime(tmp_path / run / name, (100, 100))
    for seconds, name in enumerate(names, 101):
        for run in ("a", "b"):
            os.utime(tmp_path / run / name, (2 * seconds, 2 * seconds))
            assert runs.latest_run(tmp_path) == tmp_path / run
            os.utime(tmp_path / run, (9999, 9999))  # the folder's own time does not count


def test_an_adapter_is_whole_at_every_moment(tmp_path, hub, monkeypatch):
    """The adapter can be read at each rename. A save that fails leaves the one before."""
    backbone = add_lora(load_backbone(str(hub)), 4, 8.0, 0.0, scope="attention")
    save_adapter(backbone, tmp_path / "a")
    before, moments = read_adapter(str(tmp_path / "a"), "m")[1], []
    with torch.no_grad():
        for p in backbone.parameters():
            p += p.requires_grad
    replace = os.replace

    def watch(source, target):
        raw, tensors = read_adapter(str(tmp_path / "a"), "m")
        moments.append(Path(target).name)
        assert raw["made_for"] and all(torch.equal(tensors[key], before[key]) for key in before)
        if len(moments) == 6:
            raise OSError(28, "No space left on device")
        replace(source, target)
    monkeypatch.setattr(os, "replace", watch)
    with monkeypatch.context() as patch:
        patch.setattr(lora, "write_tensors", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            save_adapter(backbone, tmp_path / "a")
    moments.append("")
    with pytest.raises(OSError, match="No space"):
        save_adapter(backbone, tmp_path / "a")
    save_adapter(backbone, tmp_path / "a")
    assert moments[-1] == "adapter_model.safetensors"
    after = read_adapter(str(tmp_path / "a"), "m")[1]
    assert all(torch.equal(after[key], before[key] + 1) for key in before)
    assert len(list((tmp_path / "a").iterdir())) == 3
