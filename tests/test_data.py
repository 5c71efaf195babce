"""One reader for every kind of data that people have, for the toy and for real models alike."""
import csv
import gzip
import json
import os
import re
import resource
import shutil
import time
from types import SimpleNamespace

import pytest

import generate
from backbones.checkpoint import load_backbone
from backbones.text import ChatData, SpecialToken, chat_turns
from backbones.tiny import TEMPLATE
from data import FORMS, parse_record, read_data
from settings import Settings
from toy.data import ToyData
from toy.text import make_pair, read_pairs

CODE = "def f(x):\n"
BODY = "    return x + 1\n"


def turn(role, content):
    """One turn of a conversation."""
    return {"role": role, "content": content}


SYSTEM = [turn("system", "Be brief."), turn("user", "One?"), turn("assistant", "1"),
          turn("user", "Two?"), turn("assistant", "2")]
SHAREGPT = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "One?"},
            {"from": "gpt", "value": "1", "weight": 0}, {"from": "human", "value": "Two?"},
            {"from": "gpt", "value": "2"}]


# ---- Records ------------------------------------------------------------------------------------

@pytest.mark.parametrize("record, turns, pair", [
    *(({ask: CODE, reply: BODY, "id": 7}, [turn("user", CODE), turn("assistant", BODY)],
       (CODE, "", BODY)) for ask, reply in FORMS),
    ({"prompt": "a", "response": "b", "completion": None},
     [turn("user", "a"), turn("assistant", "b")], ("a", "", "b")),
    ({"prompt": "a", "completion": "b", "response": None},
     [turn("user", "a"), turn("assistant", "b")], ("a", "", "b")),
    ({"instruction": "a", "input": " 1\n", "output": "b", "text": "a 1 b"},
     [turn("user", "a\n\n 1\n"), turn("assistant", "b")], ("a\n\n 1\n", "", "b")),
    ({"prompt": "a", "question": "q?", "response": "b"},
     [turn("user", "a\n\nq?"), turn("assistant", "b")], ("a", "q?", "b")),
    ({"messages": SYSTEM}, SYSTEM, ("Be brief.\n\nOne?\n\n1\n\nTwo?", "", "2")),
    ({"conversations": SHAREGPT}, SYSTEM, ("Be brief.\n\nOne?\n\n1\n\nTwo?", "", "2")),
    ({"messages": [turn("user", [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]),
                   turn("assistant", [{"type": "text", "text": "c"}])], "prompt": "a"},
     [turn("user", "a b"), turn("assistant", "c")], ("a b", "", "c")),
    ({"text": "Once upon a time"}, [turn("assistant", "Once upon a time")],
     ("", "", "Once upon a time")),
])
def test_both_readers_take_every_form_and_keep_white_space(record, turns, pair):
    before = json.dumps(record)
    assert chat_turns(record) == turns and make_pair(record) == pair
    assert json.dumps(record) == before


@pytest.mark.parametrize("record, says", [
    ({"input": "a", "label": 3}, "no 'prompt' in a record with input, label; taken are prompt"),
    ({}, "no 'prompt' in a record with nothing"),
    ({"messages": "hi"}, "'messages' must be a list"),
    ({"conversations": [{"from": "tool", "value": "x"}]}, "turn 1 of 'conversations' has the from"),
    ({"messages": [turn("user", "a"), turn("user", "b")]}, "the last the assistant's"),
    ({"messages": [turn("user", "a"), turn("assistant", " ")]}, "'content' is empty"),
    ({"messages": [turn("user", ["a"]), turn("assistant", "b")]}, "must be text, not list"),
    ({"messages": [turn(["user"], "a"), turn("assistant", "b")]}, "has the role ['user']"),
    ({"messages": [turn("user", "a"), turn("assistant", ""), *SYSTEM]},
     "turn 2 of 'messages': 'content' is empty"),
    ({"messages": [turn("user", [{"type": "image", "text": "a"}]), turn("assistant", "b")]},
     "turn 1 of 'messages': 'content' must be text, not list"),
    ({"messages": [turn("user", [{"type": "text", "text": "a", "file": "b"}]), *SYSTEM]},
     "turn 1 of 'messages': 'content' must be text, not list"),
    ({"messages": [turn("user", "a"), {**turn("assistant", "b"), "tool_calls": [{}]}]},
     "turn 2 of 'messages' has tool_calls"),
    ({"messages": [turn("tool" * 99, "a"), turn("assistant", "b")]}, " ...; known are system"),
    ({"prompt": "a", "response": "b", "completion": "c"},
     "has prompt and response, but also prompt and completion"),
    ({"messages": SYSTEM, "conversations": SHAREGPT}, "has messages, but also conversations"),
    ({f"key{i}": 1 for i in range(999)}, " ...; taken are prompt and response"),
    ({"text": "\ud83d"}, "half of a surrogate pair"),
    ({"conversations": [{"from": "human", "value": "\ud83d"}, {"from": "gpt", "value": "b"}]},
     "half of a surrogate pair"),
])
def test_a_record_of_no_known_form_is_refused_by_what_was_found(record, says):
    for read in (parse_record, chat_turns, make_pair):
        with pytest.raises(ValueError) as error:
            read(record)
        assert says in str(error.value) and "\n" not in str(error.value)


# ---- Files --------------------------------------------------------------------------------------

ROWS = [{"prompt": f"ä {i}", "response": f"b, \"{i}\"\n"} for i in range(30)]
PAIRS = [(row["prompt"], "", row["response"]) for row in ROWS]


def write_data(kind, folder):
    """ROWS as a file of this kind. Returns its path."""
    import datasets
    path, lines = folder / f"rows.{kind}", "\n".join(map(json.dumps, ROWS))
    if kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["prompt", "response"])
            table.writeheader()
            table.writerows(ROWS)
    elif kind.endswith(".gz"):
        plain = write_data(kind.removesuffix(".gz"), folder)
        path.write_bytes(gzip.compress(plain.read_bytes()))
    else:
        path.write_text(json.dumps(ROWS) if kind == "json" else lines)
    return path


KINDS = ["json", "jsonl", "csv", "json.gz", "jsonl.gz", "csv.gz", "parquet", "saved", "splits"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_records(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_data(kind, tmp_path)
    assert read_pairs(path) == (PAIRS, 0)
    turns, skipped = read_data(str(path), chat_turns)
    assert [(t[0]["content"], t[1]["content"]) for t in turns] == [(p, r) for p, _, r in PAIRS]
    assert skipped == 0
    data = ToyData(str(path))
    assert "30 pairs kept" in data.note


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl.gz", b"\x1f\x8b\x08broken", "cannot read"),
    ("a.jsonl.gz", gzip.compress(b'{"prompt": "a", "response": "b"}')[:-9], "cannot read"),
    ("a.parquet", b"PAR1 not really", "cannot read"),
    ("a.csv", b"prompt,answer\na,b\n", "row 1: no 'response' in a record with prompt, answer"),
    ("a.csv", b"prompt,response\na,b,c\n", "row 1: it has 3 cells for the 2 columns prompt"),
    ("a.csv", b'prompt,response\na,b\n\na,"b\n', "row 2: the row is no CSV: unexpected end"),
    ("a.csv", b"prompt,prompt\na,b\n", "each by a name of its own"),
    ("a.csv.gz", b"prompt,response\na,b\n", "Not a gzipped file"),
    ("a.tsv", b"prompt\tresponse\na\tb\n", "does not begin as JSON does; give .jsonl, .json"),
    ("a.tsv.gz", gzip.compress(b"prompt\tresponse\n"), "does not begin as JSON does; give .jsonl"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "line 1: not UTF-8; give UTF-8 text as .jsonl"),
    ("a.txt", b"Once upon a time", "does not begin as JSON does; give .jsonl, .json or .csv"),
])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_pairs(tmp_path / name)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_every_cell_of_a_table_of_text_is_text(tmp_path):
    """A number, and what other readers take for a missing value; an empty cell is no field."""
    content = ("\ufeffprompt,question,response,completion\r\n2+2,,4,\r\n\r\n"
               "NA,null,\"None, \"\"x\"\"\r\n\",\r\n")
    (tmp_path / "a.csv").write_bytes(content.encode())
    expected = [("2+2", "", "4"), ("NA", "null", 'None, "x"\r\n')]
    assert read_pairs(tmp_path / "a.csv") == (expected, 0)
    assert read_pairs(write_long_cell(tmp_path / "b.csv"))[0][0][0] == "x" * 200_000


def write_long_cell(path):
    path.write_text("prompt,response\n" + "x" * 200_000 + ",y\n")
    return path


def test_what_is_left_out_is_counted_and_named(tmp_path, capsys):
    lines = [json.dumps(row) for row in ROWS]
    lines[3], lines[7] = "{", json.dumps({"prompt": "a", "answer": 1})
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_pairs(tmp_path / "a.jsonl", skip_bad=True)[1] == 2
    line = capsys.readouterr().out
    assert "left out line 4, line 8; the last, line 8: no 'response' in a record with" in line


def test_fields_that_are_not_read_are_named(tmp_path, capsys):
    """Once each. What is read of one form is not of another; empty fields say nothing."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    rows = [{"prompt": "a", "response": "b", "question": "q", "input": "x", "id": 0},
            {"instruction": "a", "input": "x", "output": "b", "history": [["c", "d"]]},
            {"messages": turns, "system": "Be kind.", "tools": [], "name": None},
            {"text": "a", "id": 1}]
    path = tmp_path / "a.jsonl"
    for rows, says in ((rows, "history, id, input, messages: weight, system"), (ROWS, None)):
        path.write_text("\n".join(map(json.dumps, rows)))
        read_pairs(path)
        line = f"{path}: fields that are not read: {says}\n" if says else ""
        assert capsys.readouterr().out == line


@pytest.mark.parametrize("kind", ["json", "csv.gz", "jsonl.gz", "parquet"])
def test_an_ending_in_capitals_is_the_same(tmp_path, kind):
    path = write_data(kind, tmp_path)
    assert read_pairs(path.rename(tmp_path / path.name.upper())) == (PAIRS, 0)


def test_a_csv_may_begin_with_blank_lines_and_says_which_quote_is_open(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text('\n\nprompt,response\na,b\n')
    assert read_pairs(path) == ([("a", "", "b")], 0)
    path.write_text('prompt,response\na,b\nc,"d\ne,f\ng,h\n')
    assert read_pairs(path, skip_bad=True) == ([("a", "", "b")], 1)
    assert "row 2: the row is no CSV: unexpected end of data: a quote" in capsys.readouterr().out


def test_a_column_stands_once_and_a_missing_split_is_told(tmp_path):
    import datasets
    from pyarrow import parquet, table
    twice = table({"prompt": ["a"], "response": ["b"]}).append_column("prompt", [["c"]])
    parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="two of its columns have one name"):
        read_pairs(tmp_path / "a.parquet")
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match="no split 'train'; .* --data .*d/test"):
        read_pairs(tmp_path / "d")
    assert read_pairs(tmp_path / "d/test") == (PAIRS, 0)


# ---- The first records --------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_only_the_first_records_are_read_where_there_is_a_bound(tmp_path, kind):
    path = write_data(kind, tmp_path)
    for most, count in ((7, 7), (30, 30), (99, 30), (0, 30)):
        assert read_pairs(path, most=most) == (PAIRS[:count], 0)
    cut, whole = (ToyData(str(path), max_records=most).note for most in (7, 31))
    assert cut.startswith(f"the first 7 records of {path} (--max-records): 7 pairs kept")
    assert whole.startswith(f"{path}: 30 pairs kept")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "csv.gz"])
def test_what_comes_behind_the_bound_is_not_read(tmp_path, monkeypatch, kind):
    """Neither bytes that are no text, nor more bytes than may be unpacked."""
    monkeypatch.setattr("data.UNPACKED", 1 << 16)
    path = write_data(kind.removesuffix(".gz"), tmp_path)
    content = path.read_bytes() + b"\n\xff\n" + b"x\n" * (1 << 16)
    path = tmp_path / f"long.{kind}"
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    assert read_pairs(path, most=20) == (PAIRS[:20], 0)
    with pytest.raises(ValueError, match="not UTF-8"):
        read_pairs(path)


def test_a_large_set_of_the_hub_is_streamed_and_not_fetched(tmp_path, monkeypatch):
    """A set of two files of 30 rows, which says that it is large."""
    import datasets
    import huggingface_hub
    files = [write_data("jsonl", tmp_path), tmp_path / "other.jsonl"]
    shutil.copy(files[0], files[1])
    asked, load, seen = [], datasets.load_dataset, []

    class Hub:
        def repo_info(self, name, **options):
            asked.append(name)
            found = [SimpleNamespace(rfilename=f"data/{path.name}", size=1 << 29) for path in files]
            more = [SimpleNamespace(rfilename=name, size=1 << 40) for name in ("a.bin", "b.md")]
            return SimpleNamespace(siblings=[*found, *more])

    def load_streamed(name, subset, streaming):
        assert (name, subset, streaming) == ("some/data", None, True)
        rows = load("json", data_files=list(map(str, files)), streaming=True)
        return {"train": map(lambda row: seen.append(row) or row, rows["train"])}

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", load_streamed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    monkeypatch.setattr("data.FETCHED", (1 << 30) - 1)
    for _ in range(2):  # the same again
        assert read_data("some/data", make_pair, most=40) == (PAIRS + PAIRS[:10], 0)
    assert len(seen) == 80 and asked == ["some/data"] * 2
    monkeypatch.setattr("data.FETCHED", 1 << 30)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_data("some/data", make_pair, most=40) == (PAIRS + PAIRS[:10], 0)  # fetched
    monkeypatch.setattr("data.FETCHED", 0)
    assert read_data("some/data", make_pair) == (PAIRS * 2, 0)  # all of it is needed


def test_a_small_file_cannot_unpack_to_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("data.UNPACKED", 1 << 20)
    line = json.dumps(ROWS[0]).encode() + b"\n"
    for content in (bytes(1 << 24), line * (1 << 16)):
        (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match="unpacks to more than"):
            read_pairs(tmp_path / "bomb.jsonl.gz")
    (tmp_path / "long.jsonl").write_bytes(line * (1 << 15))  # no bound on a file that is as large
    assert len(read_pairs(tmp_path / "long.jsonl")[0]) == 1 << 15


def test_a_data_set_of_the_hub_by_subset_and_split(tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    for split, rows in (("train", ROWS[:20]), ("test", ROWS[20:])):
        text = "\n".join(map(json.dumps, rows))
        (tmp_path / f"{split}.jsonl").write_text(text)
    assert read_data("some/data", make_pair) == (PAIRS[:20], 0)
    assert read_data("some/data:test", make_pair) == (PAIRS[20:], 0)
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        read_data("some/data:dev")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: test.jsonl\n"
        "- config_name: large\n  data_files: train.jsonl\n---\n")
    assert read_data("some/data/small", make_pair) == (PAIRS[20:], 0)
    assert read_data("some/data/large:train", make_pair) == (PAIRS[:20], 0)
    with pytest.raises(ValueError, match="small.*large") as error:
        read_data("some/data")
    assert "\n" not in str(error.value)


def test_plain_text_trains_the_toy_by_windows(tmp_path):
    texts = [f"{i} " * 200 for i in range(20)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    data = ToyData(str(tmp_path / "t.jsonl"), 16, 8)
    assert "20 texts kept (18 to train, 2 held out)" in data.note
    sample = data.test("16", "test", 0)
    whole = data.tokenizer.decode(sample.prompt + sample.rest)
    held_out = [content.decode() for _, content in data.docs["test"]]
    assert len(sample.prompt) == 16 and any(whole in text for text in held_out)


# ---- Real models --------------------------------------------------------------------------------

REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<role>{{ m['role'] }}</role>{{ m['content'] }}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}<role>assistant</role>{% endif %}")


def test_a_record_that_the_template_refuses_is_named_or_skipped_and_counted(folder):
    backbone = load_backbone(str(folder))
    backbone.tokenizer.hf.chat_template = REFUSES_SYSTEM
    records = [chat_turns({"prompt": f"p{i}", "response": "r"}) for i in range(60)]
    records.insert(6, SYSTEM)
    with pytest.raises(ValueError, match="here, record 7: .*no system role"):
        ChatData(backbone, records, where="here")
    data = ChatData(backbone, records, where="here", skip_bad=True)
    assert "60 samples kept" in data.note and "1 refused by the chat template" in data.note


def test_a_template_that_fails_by_itself_is_one_line(folder):
    tokenizer = load_backbone(str(folder)).tokenizer
    endless = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    for template in ("{{ 1 / 0 }}", endless, "{{ x.y.z }}"):
        tokenizer.hf.chat_template = template
        with pytest.raises(ValueError, match="chat template refuses") as error:
            tokenizer.chat([turn("user", "a")])
        assert "\n" not in str(error.value)


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"]


@pytest.mark.parametrize("template", [
    "{{ 'a' * 20000000000 }}", "{{ 'a'.center(20000000000) }}",
    *(pytest.param(template, marks=pytest.mark.slow) for template in ENDLESS)])
def test_a_template_has_three_seconds_and_a_gigabyte(tiny_models, template):
    tokenizer = load_backbone(str(tiny_models / "llada-moe")).tokenizer
    good, tokenizer.hf.chat_template = tokenizer.hf.chat_template, template
    begin, limits = time.process_time(), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError, match="chat template refuses") as error:
        tokenizer.chat([turn("user", "a")])
    assert "\n" not in str(error.value) and time.process_time() - begin < 10
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    tokenizer.hf.chat_template = good
    assert tokenizer.chat([turn("user", "a")])


def test_a_tokenizer_of_no_sane_size_is_refused(tiny_models, tmp_path):
    shutil.copytree(tiny_models / "llada-moe", tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_bytes(b" " * (2 << 20))
    with pytest.raises(ValueError, match="no file of at most 1 MiB"):
        load_backbone(str(tmp_path / "m"))
    (tmp_path / "m" / "chat_template.jinja").unlink()
    os.mkfifo(tmp_path / "m" / "chat_template.jinja")
    with pytest.raises(ValueError, match="is not a file"):
        load_backbone(str(tmp_path / "m"))


def test_plain_text_trains_a_real_model_without_a_template(folder):
    tokenizer = load_backbone(str(folder)).tokenizer
    prompt, reply = tokenizer.chat(chat_turns({"text": "Once"}))
    assert prompt == [] and reply == tokenizer.encode("Once") + [tokenizer.eos_id]


def test_the_names_of_special_tokens_stay_characters_where_they_are_shielded(folder):
    tokenizer = load_backbone(str(folder)).tokenizer
    text = f"a {tokenizer.hf.mask_token} b<|endoftext|><role>"
    assert tokenizer.mask_id in tokenizer.encode(text)
    ids = tokenizer.encode(tokenizer.shield(text))
    assert not set(ids) & set(tokenizer.added.values()) and tokenizer.decode(ids) == text
    assert tokenizer.shield("nothing <special>") == "nothing <special>"
    with pytest.raises(SpecialToken):
        tokenizer.chat([turn("user", text)])
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("\ud83d")


# ---- Turns --------------------------------------------------------------------------------------

THREE = [turn("system", "S"), turn("user", "One?"), turn("assistant", "1!"), turn("user", "Two?"),
         turn("assistant", "22"), turn("user", "3?"), turn("assistant", "333")]


def bytes_said(parts):
    """[(text, is it said)] -> a mask of one place per byte; a special token stands as one byte."""
    return [said for text, said in parts for _ in text]


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace(
    "{% if add_generation_prompt %}", "").replace("{% endif %}", "")], ids=["usual", "always"])
def test_all_turns_are_learned_where_that_is_asked(tiny_models, tmp_path, template):
    """E stands for the end of a turn, < and > for <role> and </role>, each one token.

    The second template puts the header of a reply behind the last turn, whatever is asked.
    """
    copy = change_tokenizer(tiny_models / "llada-moe", tmp_path / "m", template)[0]
    backbone = load_backbone(str(copy))
    tokenizer = backbone.tokenizer
    head = "<SYSTEM>SE<HUMAN>One?E<ASSISTANT>"
    parts = [("1!E", True), ("<HUMAN>Two?E<ASSISTANT>", False), ("22E", True),
             ("<HUMAN>3?E<ASSISTANT>", False), ("333E", True)]
    prompt, rest, said = tokenizer.chat_all(THREE)
    assert len(prompt) == len(head) and said == bytes_said(parts)
    whole = tokenizer.render(THREE)
    assert whole.startswith(tokenizer.hf.decode(prompt + rest))
    assert prompt + rest == tokenizer.encode(whole)[:len(prompt + rest)]
    if template == TEMPLATE:
        assert prompt + rest == tokenizer.encode(whole)
    last = tokenizer.chat(THREE)
    assert last[0] + last[1] == prompt + rest and len(last[1]) == 4
    records = [THREE] * 3
    data = {turns: ChatData(backbone, records, turns=turns) for turns in ("last", "all")}
    for turns, mask in (("last", [True] * 4), ("all", said)):
        sample = data[turns].train(None, 0, 0)
        assert sample.answer == mask and sample.prompt + sample.rest == prompt + rest
        batch = data[turns].tests("held out", [0], False)
        assert batch.maskable[0].tolist() == [False] * len(sample.prompt) + mask
    assert "learned: all turns of the assistant" in data["all"].note
    assert "learned: the last turn of the assistant" in data["last"].note
    cut = ChatData(backbone, records, len(prompt) + 5, truncate=True, turns="all").train(None, 0, 0)
    assert cut.answer == [True] * 3 + [False] * 2


def test_turns_that_cannot_be_told_apart_are_refused(folder):
    """A template that shows earlier turns in another way, or without an end; or none at all."""
    tokenizer = load_backbone(str(folder)).tokenizer
    hidden = ("{% for m in messages %}<role>{% if m.role != 'assistant' or loop.last %}"
              "{{ m.content }}{% endif %}<|role_end|>{% endfor %}"
              "{% if add_generation_prompt %}<role>{% endif %}")
    unended = TEMPLATE.replace("'<|role_end|>'",
                               "('' if m['role'] == 'assistant' else '<|role_end|>')")
    for template, says in ((hidden, "leaves out an earlier turn"), (unended, "or its end"),
                           ("{{ messages | length }}" + TEMPLATE, "behind its generation")):
        tokenizer.hf.chat_template = template
        with pytest.raises(ValueError, match=says):
            tokenizer.chat_all(THREE)
    tokenizer.templated = False
    with pytest.raises(ValueError, match="needs a chat template"):
        tokenizer.chat_all(THREE)
    assert tokenizer.chat_all(THREE[:3])[2] == [True] * 3
    with pytest.raises(ValueError, match="--turns all is for real models"):
        Settings(turns="all")


# ---- Masks and ends -----------------------------------------------------------------------------

IM = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
      "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def change_tokenizer(folder, copy, template=TEMPLATE, add=(), **changes):
    """A copy of a model's folder whose tokenizer has another template and other special tokens."""
    from transformers import PreTrainedTokenizerFast
    shutil.copytree(folder, copy)
    hf = PreTrainedTokenizerFast.from_pretrained(copy)
    hf.add_special_tokens({"additional_special_tokens": list(add)},
                          replace_extra_special_tokens=False)
    hf.chat_template = template
    for name, token in changes.items():
        setattr(hf, name, token)
    hf.save_pretrained(copy)
    return copy, hf.get_added_vocab()


def edit_config(copy, **changes):
    """Change fields of a copy's config.json; ... stands for a field that is left out."""
    raw = json.loads((copy / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not Ellipsis}
    (copy / "config.json").write_text(json.dumps(raw))


def test_the_ends_are_those_of_all_files_and_of_the_template(tiny_models, tmp_path):
    """Four files, each with an end of its own; a reply ends at whichever comes first."""
    copy, ids = change_tokenizer(tiny_models / "llada-moe", tmp_path / "m", IM,
                                 ["<|im_start|>", "<|im_end|>", "<|a|>", "<|b|>"])
    edit_config(copy, eos_token_id=[ids["<|a|>"], 3])
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ids["<|b|>"]}))
    tokenizer = load_backbone(str(copy)).tokenizer
    assert tokenizer.templated
    assert set(tokenizer.stop_ids) == {3, *(ids[token] for token in (
        "<|a|>", "<|b|>", "<|im_end|>", "<|endoftext|>", "<|role_end|>"))}
    for end in ("<|im_end|>", "<|a|>", "<|b|>", "<|endoftext|>"):
        said = tokenizer.encode(f"Yo{end}\n<|im_start|>user\nand then?<|im_end|>")
        assert generate.reply_text(tokenizer, said) == "Yo"
    _, reply = tokenizer.chat([turn("user", "Hi"), turn("assistant", "Yo")])
    assert reply == tokenizer.encode("Yo<|im_end|>")
    with pytest.raises(SpecialToken):
        tokenizer.chat([turn("user", "a<|im_end|>b")])


def test_padding_is_no_end(tiny_models, tmp_path):
    copy, ids = change_tokenizer(tiny_models / "llada-moe", tmp_path / "m", add=["<|pad|>"],
                                 pad_token="<|pad|>")
    edit_config(copy, pad_token_id=ids["<|pad|>"], eos_token_id=...)
    backbone = load_backbone(str(copy))
    assert backbone.config.eos_id == ids["<|endoftext|>"]
    assert ids["<|pad|>"] not in backbone.stop_ids


def test_a_mask_that_no_file_names_is_not_guessed(tiny_models, tmp_path):
    """Neither where the tokenizer calls it something else, nor without a tokenizer."""
    copy, _ = change_tokenizer(tiny_models / "llada-8b", tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (copy / name).read_text().replace("<|mdm_mask|>", "<|other|>")
        text = re.sub(r'\s*"mask_token": "[^"]*",', "", text)
        (copy / name).write_text(text)
    edit_config(copy, mask_token_id=...)
    with pytest.raises(ValueError, match="names the mask token; put its id into config.json"):
        load_backbone(str(copy))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="names the mask token; put its id into config.json"):
        load_backbone(str(copy))


@pytest.mark.parametrize("changes, says", [
    ({"mask_token_id": 320}, "outside the vocabulary of 320"),
    ({"mask_token_id": "5"}, "outside the vocabulary"),
    ({"mask_token_id": True}, "outside the vocabulary"),
    ({"eos_token_id": [7, 400]}, "end token's id is 400"),
    ({"eos_token_id": [7, 256], "mask_token_id": 256}, "mask and end token have the same id"),
    ({"eos_token_id": [[7]]}, "outside the vocabulary"),
    ({"eos_token_id": "7"}, "outside the vocabulary"),
])
def test_ids_of_mask_and_ends_that_cannot_be_are_refused(tiny_models, tmp_path, changes, says):
    shutil.copytree(tiny_models / "llada-moe", tmp_path / "m")
    edit_config(tmp_path / "m", **changes)
    with pytest.raises(ValueError, match=re.escape(says)):
        load_backbone(str(tmp_path / "m"))
