"""Chat messages, templates, special tokens, and chat data."""
import shutil
from dataclasses import replace

import pytest
import torch

import train
from backbones.checkpoint import load_backbone
from backbones.text import ChatData, SpecialToken, chat_turns
from backbones.tiny import TEMPLATE
from settings import Settings
from tiny_models import edit_json


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


PAIR = {"prompt": "Hi there", "response": "Hello."}
TALK = {"messages": [{"role": "system", "content": "Be brief."}, user("Who?"), assistant("Me.")]}


def test_records_become_chat_messages():
    assert chat_turns(PAIR) == [user("Hi there"), assistant("Hello.")]
    for record, prompt in (
            ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n\n1 2"),
            ({"instruction": "Say hi", "output": "hi"}, "Say hi"),
            ({"instruction": "Say", "input": "", "output": "ho"}, "Say")):
        assert chat_turns(record)[0]["content"] == prompt
    assert [turn["role"] for turn in chat_turns(TALK)] == ["system", "user", "assistant"]


def test_records_of_other_forms_are_refused():
    for bad in ({}, [], "x",
                {"prompt": "x"},
                {"prompt": "", "response": "y"},
                {"prompt": 3, "response": "y"},
                {"instruction": "x", "output": None},
                {"messages": []},
                {"messages": ["a", "b"]},
                {"messages": [user("a"), user("b")]},
                {"messages": [user("a"), assistant("")]}):
        with pytest.raises(ValueError):
            chat_turns(bad)


@pytest.fixture
def copy(tiny_models, tmp_path):
    """The folder of a tiny LLaDA-MoE that a test may change."""
    return shutil.copytree(tiny_models / "llada-moe", tmp_path / "model")


@pytest.fixture
def moe(tiny_models):
    return load_backbone(str(tiny_models / "llada-moe"))


def test_the_chat_template_splits_prompt_and_reply(folder):
    backbone = load_backbone(str(folder))
    prompt, reply = backbone.tokenizer.chat(chat_turns(TALK))
    text = backbone.tokenizer.hf.decode(prompt + reply)
    assert text == ("<role>SYSTEM</role>Be brief.<|role_end|><role>HUMAN</role>Who?<|role_end|>"
                    "<role>ASSISTANT</role>Me.<|role_end|>")
    assert backbone.tokenizer.hf.decode(reply) == "Me.<|role_end|>"
    mask = backbone.tokenizer.hf.mask_token
    for text in (f"a {mask} b", "<|endoftext|>", "<role>HUMAN</role>"):
        with pytest.raises(ValueError, match="special token"):
            backbone.tokenizer.chat([user(text)])


# Goes on with the header of the next turn, which is no part of the reply.
ALWAYS = TEMPLATE.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
# Ends a turn with a line break, which is no end for the tokenizer. So the template is not used,
# and the reply follows the plain prompt.
UNENDED = ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
           "{% if add_generation_prompt %}[assistant] {% endif %}")
# Refuses system turns.
STRICT = ("{% for m in messages %}{% if m['role'] == 'system' %}"
          "{{ raise_exception('no system role') }}{% endif %}{% endfor %}" + TEMPLATE)


@pytest.mark.parametrize("template, reply", [
    (ALWAYS, "Hello.<|role_end|>"),
    (UNENDED, "Hello.<|endoftext|>"),
    (None, "Hello.<|endoftext|>"),
    ("{{ raise_exception('no') }}", "Hello.<|endoftext|>")])
def test_templates_that_other_models_come_with(copy, template, reply):
    (copy / "chat_template.jinja").unlink()
    if template:
        (copy / "chat_template.jinja").write_text(template)
    backbone = load_backbone(str(copy))
    prompt, ids = backbone.tokenizer.chat(chat_turns(PAIR))
    decode = backbone.tokenizer.hf.decode
    assert decode(ids) == reply and ids[-1] in backbone.tokenizer.stop_ids
    assert backbone.tokenizer.templated == (template == ALWAYS)
    assert decode(prompt) == ("<role>HUMAN</role>Hi there<|role_end|><role>ASSISTANT</role>"
                              if template == ALWAYS else "Hi there\n\n")
    data = ChatData(backbone, [chat_turns(PAIR)] * 3)
    assert ("no usable chat template" in data.note) == (template != ALWAYS)


def test_a_template_that_refuses_a_role_is_one_line(copy):
    (copy / "chat_template.jinja").write_text(STRICT)
    tokenizer = load_backbone(str(copy)).tokenizer
    assert tokenizer.templated
    with pytest.raises(ValueError, match="refuses these messages: no system role"):
        tokenizer.chat(chat_turns(TALK))


def test_only_tokens_with_a_meaning_are_refused_in_text(copy):
    """The published tokenizers have 262 added tokens, and most of them mean nothing here.

    A paper on NLP that mentions [CLS] is kept.
    """
    from transformers import PreTrainedTokenizerFast
    fast = PreTrainedTokenizerFast.from_pretrained(copy)
    fast.add_special_tokens({"cls_token": "[CLS]", "bos_token": "<|startoftext|>"})
    fast.save_pretrained(copy)
    tokenizer = load_backbone(str(copy)).tokenizer
    assert tokenizer.chat([user("a [CLS] b")])
    for token in ("<|mask|>", "<|endoftext|>", "<|role_end|>", "<role>", "</role>",
                  "<|startoftext|>"):
        with pytest.raises(SpecialToken, match="special token"):
            tokenizer.chat([user(f"a {token} b")])


def test_the_models_mask_is_the_tokenizers_mask(copy):
    edit_json("config.json", mask_token_id=260)(copy)
    backbone = load_backbone(str(copy))
    assert backbone.mask_id == backbone.tokenizer.mask_id == 260


def test_filter_truncation_split_and_summary(moe):
    # A hundred replies of 1 to 100 tokens, a prompt that is too long, and a special token.
    pairs = [("p" * (i % 7 + 1), "r" * (i + 1)) for i in range(100)]
    pairs += [("x" * 500, "y"), ("a<|mask|>", "y")]
    records = [chat_turns({"prompt": prompt, "response": reply}) for prompt, reply in pairs]
    header = len(moe.tokenizer.chat(records[0])[0]) - 1  # tokens that the template adds to a prompt
    kept = sum(header + len(prompt) + len(reply) + 1 <= 100 for prompt, reply in pairs[:100])

    data = ChatData(moe, records, max_length=100, where="here", bad=3)
    lengths = {len(s.prompt) + len(s.rest) for part in data.pairs.values() for s in part}
    assert sum(map(len, data.pairs.values())) == kept and max(lengths) <= 100
    assert len(data.pairs["test"]) == kept // 20
    assert f"{100 - kept + 1} too long, 0 cut, 1 with special tokens" in data.note
    assert "3 malformed" in data.note and all(all(s.answer) for s in data.pairs["train"])
    cut = ChatData(moe, records, max_length=100, truncate=True)
    assert sum(map(len, cut.pairs.values())) == 100 and f"1 too long, {100 - kept} cut" in cut.note
    same, other = (ChatData(moe, records, max_length=100, split_seed=n) for n in (42, 43))
    assert same.pairs == data.pairs and other.pairs["test"] != data.pairs["test"]

    # Each epoch has all samples, in an order of its own.
    n = len(data.pairs["train"])
    first, second = ([data.train(None, 0, e * n + i) for i in range(n)] for e in range(2))
    in_order = lambda samples: sorted(samples, key=lambda s: (s.prompt, s.rest))
    assert in_order(first) == in_order(second) == in_order(data.pairs["train"])
    assert first != second
    with pytest.raises(ValueError, match="raise --max-length"):
        ChatData(moe, records, max_length=10)
    with pytest.raises(ValueError, match="two are needed, one to train and one to test$"):
        ChatData(moe, records[:1])


def test_padding_as_end_tokens_is_a_setting(tiny_models):
    s = Settings(model=str(tiny_models / "llada-moe"), eos_loss=True, batch=3)
    backbone = load_backbone(s.model)
    records = [chat_turns({"prompt": "p", "response": "r" * n}) for n in (1, 9, 20, 4, 5)]
    data = ChatData(backbone, records)
    plain, with_ends = (train.make_batch(replace(s, eos_loss=on), data, 0) for on in (False, True))
    pad = ~plain.valid
    assert pad.any() and not (plain.maskable & pad).any()
    assert with_ends.valid.all() and with_ends.maskable[pad].all()
    assert (with_ends.x0[pad] == backbone.config.eos_id).all()
    assert torch.equal(with_ends.x0[~pad], plain.x0[~pad])
    assert torch.equal(with_ends.maskable[~pad], plain.maskable[~pad])


# ---- What is kept of a sample -------------------------------------------------------------------


def test_a_truncated_reply_keeps_its_beginning(moe):
    """The prompt stays whole. The reply keeps as many tokens as fit behind it, and all are learned.

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


def test_a_reply_ends_at_the_first_end_behind_it(copy):
    """This template goes on with two more turns after the reply. They are no part of it."""
    more = "{{ '<role>HUMAN</role>more?<|role_end|><role>HUMAN</role>more?<|role_end|>' }}"
    template = TEMPLATE + "{% if messages[-1]['role'] == 'assistant' %}" + more + "{% endif %}"
    (copy / "chat_template.jinja").write_text(template)
    tokenizer = load_backbone(str(copy)).tokenizer
    assert tokenizer.templated
    reply = tokenizer.chat(chat_turns(PAIR))[1]
    assert tokenizer.hf.decode(reply) == "Hello.<|role_end|>"


def test_without_a_template_all_turns_are_read(moe):
    moe.tokenizer.templated = False
    prompt, reply = moe.tokenizer.chat(chat_turns(TALK))
    assert moe.tokenizer.hf.decode(prompt) == "Be brief.\n\nWho?\n\n"
    assert moe.tokenizer.hf.decode(reply) == "Me.<|endoftext|>"


def test_seeds_of_data_and_split_are_two(moe):
    """The run's seed decides the order of each epoch. split_seed decides which 5 % are held out."""
    records = [chat_turns({"prompt": "p", "response": f"r{i}"}) for i in range(60)]
    one, same, other = (ChatData(moe, records, seed=seed) for seed in (0, 0, 1))
    assert one.pairs == same.pairs == other.pairs
    orders = [[str(data.train(None, 0, n)) for n in range(57)] for data in (one, same, other)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    assert ChatData(moe, records, split_seed=1).pairs["test"] != one.pairs["test"]
    held_out = [sample.rest for sample in one.pairs["test"]]
    assert [one.test("held out", "test", n).rest for n in range(6)] == held_out * 2
    assert not {str(sample) for sample in one.pairs["test"]} & set(orders[0])


def test_a_prompt_may_fill_the_window_to_its_last_token(moe):
    """The tiny model has room for 8192 tokens of prompt and reply.

    The reply takes as many as are asked for. The default is 128.
    """
    header = len(moe.tokenizer.chat([user("x")])[0]) - 1
    data, room = ChatData(moe), 8192 - header
    assert len(data.ask("x" * (room - 20), length=20).prompt) == 8172
    assert data.ask("x", length=20).answer == [True] * 20
    assert len(data.ask("x").rest) == 128
    with pytest.raises(ValueError, match="8173 tokens, with 20 .* more than .* 8192"):
        data.ask("x" * (room - 19), length=20)
