"""Chat messages, templates, special tokens, and chat data."""
import shutil
from dataclasses import replace

import pytest
import torch

from backbones.checkpoint import load_backbone
from backbones.text import ChatData, SpecialToken, chat_turns
from backbones.tiny import TEMPLATE
import train
from settings import Settings
from tiny_models import edit_json


RECORDS = [{"prompt": "Hi there", "response": "Hello."}, {
    "instruction": "Add", "input": "1 2", "output": "3"
}, {"instruction": "Say hi", "output": "hi"}, {"instruction": "Say", "input": "", "output": "ho"}, {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"},
                 {"role": "assistant", "content": "Me."}]
}]


def test_records_become_chat_messages():
    turns = [chat_turns(r) for r in RECORDS]
    assert turns[0] == [{"role": "user", "content": "Hi there"},
                        {"role": "assistant", "content": "Hello."}]
    assert turns[1][0]["content"] == "Add\n\n1 2" and turns[2][0]["content"] == "Say hi" and turns[
        3][0]["content"] == "Say"
    assert [t["role"] for t in turns[4]] == ["system", "user", "assistant"]
    for bad in ({}, {"prompt": "x"}, {"prompt": "", "response": "y"}, {
            "prompt": 3, "response": "y"
    }, [], "x", {"messages": []}, {
            "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    }, {"messages": [{"role": "user", "content": "a"},
                     {"role": "assistant",
                      "content": ""}]}, {"messages": ["a",
                                                      "b"]}, {"instruction": "x", "output": None}):
        with pytest.raises(ValueError):
            chat_turns(bad)


def test_the_chat_template_splits_prompt_and_reply(folder):
    backbone = load_backbone(str(folder))
    prompt, reply = backbone.tokenizer.chat(chat_turns(RECORDS[4]))
    text = backbone.tokenizer.hf.decode(prompt + reply)
    assert text == ("<role>SYSTEM</role>Be brief.<|role_end|><role>HUMAN</role>Who?<|role_end|>"
                    "<role>ASSISTANT</role>Me.<|role_end|>")
    assert backbone.tokenizer.hf.decode(reply) == "Me.<|role_end|>"
    for text in ("a <|mask|> b", "<|endoftext|>", "<role>HUMAN</role>"):
        with pytest.raises(ValueError, match="special token"):
            backbone.tokenizer.chat([{"role": "user", "content": text}])


ALWAYS = TEMPLATE.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
UNENDED = ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
           "{% if add_generation_prompt %}[assistant] {% endif %}")
STRICT = ("{% for m in messages %}{% if m['role'] == 'system' %}"
          "{{ raise_exception('no system role') }}{% endif %}{% endfor %}" + TEMPLATE)


# Goes on with the next turn's header: not part of the reply.
# Its end of turn is no token of this tokenizer: prompt and reply are joined.
@pytest.mark.parametrize("template, reply", [
    (ALWAYS, "Hello.<|role_end|>"),
    (UNENDED, "Hello.<|endoftext|>"),
    (None, "Hello.<|endoftext|>"), ("{{ raise_exception('no') }}", "Hello.<|endoftext|>")])
def test_templates_that_other_models_come_with(tiny_models, tmp_path, template, reply):
    folder = tmp_path / "model"
    shutil.copytree(tiny_models / "llada-moe", folder)
    (folder / "chat_template.jinja").unlink()
    if template:
        (folder / "chat_template.jinja").write_text(template)
    backbone = load_backbone(str(folder))
    prompt, ids = backbone.tokenizer.chat(chat_turns(RECORDS[0]))
    decode = backbone.tokenizer.hf.decode
    assert decode(ids) == reply and ids[-1] in backbone.tokenizer.stop_ids
    assert backbone.tokenizer.templated == (template == ALWAYS)
    assert decode(prompt) == ("<role>HUMAN</role>Hi there<|role_end|><role>ASSISTANT</role>"
                              if template == ALWAYS else "Hi there\n\n")
    data = ChatData(backbone, [chat_turns(RECORDS[0])] * 3)
    assert ("no usable chat template" in data.note) == (template != ALWAYS)


def test_a_template_that_refuses_a_role_is_one_line(tiny_models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_models / "llada-moe", folder)
    (folder / "chat_template.jinja").write_text(STRICT)
    tokenizer = load_backbone(str(folder)).tokenizer
    assert tokenizer.templated
    with pytest.raises(ValueError, match="refuses these messages: no system role"):
        tokenizer.chat(chat_turns(RECORDS[4]))


def test_only_tokens_with_a_meaning_are_refused_in_text(tiny_models, tmp_path):
    """The published tokenizers have 262 added tokens; [CLS] in a paper on NLP is no reason to
    drop it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_models / "llada-moe", folder)
    from transformers import PreTrainedTokenizerFast
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    fast.add_special_tokens({"cls_token": "[CLS]", "bos_token": "<|startoftext|>"})
    fast.save_pretrained(folder)
    tokenizer = load_backbone(str(folder)).tokenizer
    assert tokenizer.chat([{"role": "user", "content": "a [CLS] b"}])
    for token in ("<|mask|>", "<|endoftext|>", "<|role_end|>", "<role>", "</role>",
                  "<|startoftext|>"):
        with pytest.raises(SpecialToken, match="special token"):
            tokenizer.chat([{"role": "user", "content": f"a {token} b"}])


def test_the_models_mask_is_the_tokenizers_mask(tiny_models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_models / "llada-moe", folder)
    edit_json("config.json", mask_token_id=260)(folder)
    backbone = load_backbone(str(folder))
    assert backbone.mask_id == backbone.tokenizer.mask_id == 260


def test_filter_truncation_split_and_summary(tiny_models):
    backbone = load_backbone(str(tiny_models / "llada-moe"))
    records = [
        chat_turns({"prompt": "p" * (i % 7 + 1), "response": "r" * (i + 1)}) for i in range(100)
    ]
    records += [
        chat_turns({"prompt": "x" * 500, "response": "y"}),
        chat_turns({"prompt": "a<|mask|>", "response": "y"})
    ]
    overhead = len(backbone.tokenizer.chat(records[0])[0]) - 1
    data = ChatData(backbone, records, max_length=100, where="here", bad=3)
    lengths = {len(s.prompt) + len(s.rest) for part in data.pairs.values() for s in part}
    kept = sum(overhead + i % 7 + 1 + i + 1 + 1 <= 100 for i in range(100))
    assert sum(map(len, data.pairs.values())) == kept and max(lengths) <= 100
    assert len(
        data.pairs["test"]
    ) == kept // 20 and f"{100 - kept + 1} too long, 0 cut, 1 with special tokens" in data.note
    assert "3 malformed" in data.note and all(all(s.answer) for s in data.pairs["train"])
    cut = ChatData(backbone, records, max_length=100, truncate=True)
    assert sum(map(len, cut.pairs.values())) == 100 and f"1 too long, {100 - kept} cut" in cut.note
    again, other = (ChatData(backbone, records, max_length=100, split_seed=n) for n in (42, 43))
    assert again.pairs == data.pairs and other.pairs["test"] != data.pairs["test"]
    n = len(data.pairs["train"])
    epochs = [[data.train(None, 0, e * n + i) for i in range(n)] for e in range(2)]
    key = lambda s: (s.prompt, s.rest)
    assert sorted(epochs[0], key=key) == sorted(epochs[1], key=key) == sorted(
        data.pairs["train"], key=key) and epochs[0] != epochs[1]
    with pytest.raises(ValueError, match="raise --max-length"):
        ChatData(backbone, records, max_length=10)


def test_padding_as_end_tokens_is_a_setting(tiny_models):
    s = Settings(model=str(tiny_models / "llada-moe"), eos_loss=True, batch=3)
    backbone = load_backbone(s.model)
    data = ChatData(backbone,
                    [chat_turns({"prompt": "p", "response": "r" * n}) for n in (1, 9, 20, 4, 5)])
    ours, theirs = (train.make_batch(replace(s, eos_loss=on), data, 0) for on in (False, True))
    pad = ~ours.valid
    assert pad.any() and not (ours.maskable & pad).any()
    assert theirs.valid.all() and (theirs.x0[pad]
                                   == backbone.config.eos_id).all() and theirs.maskable[pad].all()
    assert torch.equal(theirs.x0[~pad], ours.x0[~pad]) and torch.equal(
        theirs.maskable[~pad], ours.maskable[~pad])


# ---- What is kept of a sample -------------------------------------------------------------------

@pytest.fixture
def moe(tiny_models):
    return load_backbone(str(tiny_models / "llada-moe"))


def test_a_truncated_reply_keeps_its_beginning(moe):
    """The prompt whole, and as much of the reply as fits behind it; every token of it is learned.

    A reply that just fits keeps its end of turn.
    """
    records = [chat_turns({"prompt": "ask", "response": word}) for word in ("abcdef", "xyz")]
    prompt, long = moe.tokenizer.chat(records[0])
    short = moe.tokenizer.chat(records[1])[1]
    assert (len(long), len(short)) == (7, 4)  # with the end of turn
    data = ChatData(moe, records, max_length=len(prompt) + 4, truncate=True)
    kept = {tuple(sample.rest) for part in data.pairs.values() for sample in part}
    assert kept == {tuple(long[:4]), tuple(short)}
    assert moe.tokenizer.decode(long[:4]) == "abcd" and short[-1] in moe.tokenizer.stop_ids
    for part in data.pairs.values():
        assert all(s.prompt == prompt and s.answer == [True] * 4 for s in part)


def test_a_reply_ends_at_the_first_end_behind_it(tiny_models, tmp_path):
    """This template goes on with two more turns after the reply. They are no part of it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_models / "llada-moe", folder)
    more = "{{ '<role>HUMAN</role>more?<|role_end|><role>HUMAN</role>more?<|role_end|>' }}"
    template = TEMPLATE + "{% if messages[-1]['role'] == 'assistant' %}" + more + "{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_backbone(str(folder)).tokenizer
    assert tokenizer.templated
    reply = tokenizer.chat(chat_turns(RECORDS[0]))[1]
    assert tokenizer.hf.decode(reply) == "Hello.<|role_end|>"


def test_without_a_template_all_turns_are_read(moe):
    moe.tokenizer.templated = False
    prompt, reply = moe.tokenizer.chat(chat_turns(RECORDS[4]))
    assert moe.tokenizer.hf.decode(prompt) == "Be brief.\n\nWho?\n\n"
    assert moe.tokenizer.hf.decode(reply) == "Me.<|endoftext|>"


def test_seeds_of_data_and_split_are_two(moe):
    """The run's seed decides the order of each epoch. Which 5 % are held out, split_seed alone."""
    records = [chat_turns({"prompt": "p", "response": f"r{i}"}) for i in range(60)]
    one, same, other = (ChatData(moe, records, seed=seed) for seed in (0, 0, 1))
    assert one.pairs == same.pairs == other.pairs
    orders = [[str(data.train(None, 0, n)) for n in range(57)] for data in (one, same, other)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    assert ChatData(moe, records, split_seed=1).pairs["test"] != one.pairs["test"]
    held_out = [data_sample.rest for data_sample in one.pairs["test"]]
    assert [one.test("held out", "test", n).rest for n in range(6)] == held_out * 2
    assert not {str(sample) for sample in one.pairs["test"]} & set(orders[0])


def test_a_prompt_may_fill_the_window_to_its_last_token(moe):
    """The tiny model has room for 8192 tokens. What is asked for counts; 128 is usual."""
    wrapped = len(moe.tokenizer.chat([{"role": "user", "content": "x"}])[0]) - 1
    data, room = ChatData(moe), 8192 - wrapped
    assert len(data.ask("x" * (room - 20), length=20).prompt) == 8172
    assert data.ask("x", length=20).answer == [True] * 20
    assert len(data.ask("x").rest) == 128
    with pytest.raises(ValueError, match="8173 tokens, with 20 .* more than .* 8192"):
        data.ask("x" * (room - 19), length=20)
