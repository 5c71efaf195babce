"""One reader for every kind of data that people have, for the toy and for real models alike."""
import csv
import gzip
import json
import os
import re
import resource
import shutil
import time

import pytest

import generate
from backbones.checkpoint import load_backbone
from backbones.text import ChatData, SpecialToken, chat_turns
from backbones.tiny import TEMPLATE
from data import FORMS, parse_record, read_data
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
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(ROWS) if kind == "json" else lines)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz", "csv", "parquet", "saved", "splits"])
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
])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_pairs(tmp_path / name)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_small_file_cannot_unpack_to_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("data.UNPACKED", 1 << 20)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(bytes(1 << 24)))
    with pytest.raises(ValueError, match="unpacks to more than"):
        read_pairs(tmp_path / "bomb.jsonl.gz")


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


@pytest.mark.parametrize("template", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 20000000000 }}", "{{ 'a'.center(20000000000) }}",
    "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"])
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
    text = "a <|mask|> b<|endoftext|><role>"
    assert tokenizer.mask_id in tokenizer.encode(text)
    ids = tokenizer.encode(tokenizer.shield(text))
    assert not set(ids) & set(tokenizer.added.values()) and tokenizer.decode(ids) == text
    assert tokenizer.shield("nothing <special>") == "nothing <special>"
    with pytest.raises(SpecialToken):
        tokenizer.chat([turn("user", text)])
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("\ud83d")


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
        text = (copy / name).read_text().replace("<|mask|>", "<|other|>")
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
