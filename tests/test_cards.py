"""The cards of adapters and checkpoints: whole, loadable, and safe with any name."""
import json
import re
import shlex
from dataclasses import replace

import pytest
import yaml

from cards import code, code_block, measured, write_adapter_card
from settings import Parser, Settings, add_flags, command_of, settings_from_flags

REAL = "inclusionAI/LLaDA-MoE-7B-A1B-Base"


def parse(words):
    """The settings that train.py makes of these words."""
    parser = Parser()
    add_flags(parser, Settings.__dataclass_fields__)
    return settings_from_flags(vars(parser.parse_args(words)))


@pytest.mark.parametrize("words", [
    "", "--data languages", "--no-memory", "--memory-from response --lr 0.5", "--data my.jsonl",
    "--no-closed-book --steps 7 --threads 1", "--data retrieval --grad-clip inf",
    f"--model {REAL}", f"--model {REAL} --steps 7", f"--model {REAL} --steps 500",
    f"--model {REAL} --epochs 2 --load-4bit --no-skip-bad --seed -3",
    f"--model {REAL} --no-memory --data=-x --eval-every 0 --trajectory cover:4",
    f"--model {REAL} --memory-from prompt --from-adapter 'a b' --epochs 0"])
def test_a_command_makes_the_settings_again(words):
    s = parse(shlex.split(words))
    assert parse(command_of(s)) == s
    if s.epochs:  # when training begins, the steps are counted
        assert command_of(replace(s, steps=123)) == command_of(s)
    given = {word.split("=")[0] for word in shlex.split(words) if word.startswith("--")}
    assert {word.split("=")[0] for word in command_of(s) if word.startswith("--")} <= given | {
        "--epochs"}


def write_card(tmp_path, s, *lines):
    """An adapter's card as text, its head as YAML, and the rest."""
    (tmp_path / "adapter").mkdir(exist_ok=True)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_adapter_card(s, tmp_path, 40, 2)
    text = (tmp_path / "adapter/README.md").read_text()
    _, head, rest = re.split("^---\n", text, maxsplit=2, flags=re.M)
    return text, yaml.safe_load(head), rest


def test_a_card_says_what_was_trained_and_measured_and_how_to_load_it(tmp_path):
    s = parse(["--model", REAL, "--load-4bit", "--inner-lr", "0.2", "--lr", "1e-4"])
    s = replace(s, steps=60)
    text, head, rest = write_card(
        tmp_path, s, {"step": 9, "held_out_ce": 3.0, "held_out_ce_without": 3.5},
        {"step": 19, "loss": 4.0}, {"step": 19, "held_out_ce": 2.25, "held_out_ce_without": 2.75})
    assert head == {"base_model": REAL, "library_name": "peft", "datasets": [
        "Yukang/LongAlpaca-12k"], "tags": ["lora", "memdlm", "diffusion-language-model",
                                          "masked-diffusion"]}
    for part in ("| steps | 40 of 60, 64 samples each |", "| seed | 0 |",
                 "| held-out loss with phi | 2.2500 (nats per masked token, 32 samples, after step "
                 "20) |", "| held-out loss without phi | 2.7500 (", "compares with nothing",
                 f"accelerate launch --num_processes 2 train.py --model {REAL} --inner-lr 0.2 "
                 "--lr 0.0001 --load-4bit", f"python generate.py --model {REAL} --from-adapter "
                 "ADAPTER --inner-lr 0.2 --load-4bit --adapt", "PeftModel.from_pretrained(base",
                 "| versions | Python 3.", ", torch ", ", peft ", ", bitsandbytes ", "Licence"):
        assert part in rest, part
    block = re.search("```json\n(.*?)\n```", rest, re.S)[1]
    assert Settings(**json.loads(block)) == s
    assert "license" not in head and str(tmp_path) not in text


def test_numbers_are_those_that_were_measured(tmp_path):
    s = Settings(model=REAL, memory=False)
    _, _, rest = write_card(tmp_path, s, {"step": 3, "loss": 1.0})
    assert "| held-out loss | not measured" in rest and "compares with nothing" not in rest
    _, _, rest = write_card(tmp_path, s, {"step": 3, "held_out_ce": 1.5})
    assert "| held-out loss | 1.5000 (" in rest and "without phi |" not in rest
    assert "--adapt" not in rest and "without memory |" in rest
    assert measured(s, tmp_path / "nowhere")[0][1].startswith("not")


EVIL = "a/b\n---\nlicense: mit\n`````\n| x | y |\n# T \x1b[2J '\"$(x) <script>: {}"


@pytest.mark.parametrize("name", [EVIL, "../up", "--- x", "a: b/c", "`", "x y/z: w", "me/é"])
def test_no_name_breaks_a_card(tmp_path, name):
    """Only ids of the hub are in its head. Elsewhere a name stays within its code."""
    s = Settings(model=name, data=name, from_adapter=name)
    _, head, rest = write_card(tmp_path, s)
    assert head.keys() == {"library_name", "tags"} and "\x1b" not in rest
    plain, _, _ = write_card(tmp_path, replace(s, model="m", data="d", from_adapter="a"))
    shape = lambda text: [line for line in text.splitlines()
                          if re.match(r"#|\| |---", line) and not line.startswith("| base")
                          and not line.startswith("| data")]
    outside = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", rest, flags=re.S | re.M)
    assert shape(outside) == shape(re.sub("^```.*?^```$", "", plain.split("---\n")[2],
                                          flags=re.S | re.M))
    assert "license: mit" not in re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", outside, flags=re.S)


def test_code_has_a_fence_that_is_longer_than_what_it_holds():
    assert code("a") == "`a`" and code("a`b") == "`` a`b ``" and code("`") == "`` ` ``"
    assert code("a\n b|c") == r"`a b\|c`"
    assert code_block("x", "```\n````") == "`````x\n```\n````\n`````"


def test_a_folder_is_no_base_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me/model").mkdir(parents=True)
    (tmp_path / "me/data").write_text("")
    head = write_card(tmp_path, Settings(model="me/model", data="me/data"))[1]
    assert head.keys() == {"library_name", "tags"}
    head = write_card(tmp_path, Settings(model="me/other", data="me/set/part:test"))[1]
    assert (head["base_model"], head["datasets"]) == ("me/other", ["me/set"])
    # A file that was there when the run began is none of the hub's, wherever it is now.
    for text, known in (('{"torch": "2"}', True), ('{"data": "0123abcd"}', False), ("{", False)):
        (tmp_path / "origin.json").write_text(text)
        head = write_card(tmp_path, Settings(model="me/other", data="my/pairs.jsonl"))[1]
        assert ("datasets" in head) == known
    (tmp_path / "origin.json").unlink()
    head = write_card(tmp_path, Settings(model="smollm2"))[1]
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for s, told in ((Settings(model="smollm2"), True), (Settings(model=REAL), False)):
        assert ("the base looks left only" in write_card(tmp_path, s)[2]) == told


def test_an_adapter_on_a_merged_base_names_its_run(tmp_path):
    s = Settings(model=REAL, from_adapter="me/first", merge=True)
    rest = write_card(tmp_path, s)[2]
    assert "`me/first` merged" in rest and "generate.py --run RUN" in rest
    assert "PeftModel" not in rest
