"""Answers, frames and options of generate.py, on a model that was not trained."""
import json
import re
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import generate
import memdlm
import memory
from backbones.block_diffusion import block_diffusion
from backbones.text import ChatData
from data import PAD, collate
from runs import TRAINED_TOY, build, open_run
from settings import Settings
from test_cli import refused
from toy.data import ToyData

GIVEN = dict(steps=7, temperature=0.5, block_length=3, cfg_scale=1.5, remasking="random",
             mode=None, threshold=None, edit_threshold=None, cache="none")
USUAL = GIVEN | dict(block_length=None, cfg_scale=0.0, remasking="low_confidence")


class Letters:
    """A tokenizer whose token 0 is "a"; 7 and 9 end a reply."""
    stop_ids, eos_id, mask_id = [9, 7], 9, 25

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def pieces(self, ids):
        return list(self.decode(ids))


def test_a_frame_in_the_terminal_shows_no_separator():
    frame = [("<sep>", "given"), ("owl", "given"), ("?", "masked"), ("<eos>", "new")]
    assert generate.format_frame(frame, " ", styled=False) == "owl ?"
    assert generate.format_frame(frame, " ", styled=True) == (
        "\033[2mowl\033[0m \033[90m?\033[0m")


def make_model(decoder):
    return Namespace(backbone=Namespace(decoder=decoder))


@pytest.fixture
def untrained(monkeypatch):
    """generate.py opens a toy without training, open book. Returns its settings, data and model."""
    s = Settings(width=16, layers=1, heads=2)
    data, model = build(s)
    model.requires_grad_(False).eval()
    monkeypatch.setattr(generate, "open_model", lambda run, name, changes: (s, data, model))
    monkeypatch.setattr(generate, "EXAMPLES", 20)
    return s, data, model


def test_every_flag_of_a_decoder_reaches_it():
    options = generate.decoder_options(Namespace(**GIVEN), make_model(memdlm.denoise))
    assert options == dict(steps=7, temperature=0.5, block_length=3, cfg_scale=1.5,
                           remasking="random")
    # LLaDA2.1's own: speed commits what is surer than .5 and edits freely, quality .7 and .5.
    for flags, threshold, edit in (
            ({}, 0.95, None), ({"mode": "plain"}, 0.95, None), ({"mode": "speed"}, 0.5, 0.0),
            ({"mode": "quality"}, 0.7, 0.5), ({"threshold": 0.3}, 0.3, None),
            ({"threshold": 0.0, "edit_threshold": 0.0}, 0.0, 0.0),
            ({"mode": "quality", "edit_threshold": 0.0}, 0.7, 0.0)):
        options = generate.decoder_options(Namespace(**USUAL | flags), make_model(block_diffusion))
        assert options == dict(steps=7, temperature=0.5, threshold=threshold, edit_threshold=edit)


@pytest.mark.parametrize("ids, text", [
    ([1, 2, 9, 3, 7, 4, 9], "bc"), ([1, 7, 2, 7, 3, 9], "b"), ([1, 9, 2, 9, 3], "b"),
    ([7, 1], ""), ([1, 2], "bc"), ([], "")])
def test_a_reply_ends_at_its_first_stop(ids, text):
    """Whichever of the stops comes first, however many follow."""
    assert generate.reply_text(Letters(), ids) == text


def test_frames_say_what_is_new():
    """Given b; then two gaps are filled, c first and d in the second step."""
    canvases = [[1, 25, 25], [1, 2, 25], [1, 2, 3]]
    answer = generate.make_answer(Letters(), "x", canvases, [False, True, True])
    assert answer.text == "cd" and answer.frames() == [
        [("b", "given"), ("?", "masked"), ("?", "masked")],
        [("b", "given"), ("c", "new"), ("?", "masked")],
        [("b", "given"), ("c", "done"), ("d", "new")]]
    sample = Namespace(answer=[False, True, False, True])
    pieces = generate.right_pieces(Namespace(tokenizer=Letters()), sample, [2, 3])
    assert pieces == [None, "c", None, "d"]


def test_the_seed_decides_the_noise_and_the_prompt_the_memory(untrained):
    """The same prompt is written in the same way beside any other, whatever the seed."""
    s, data, model = untrained
    sample, other = data.ask("fox ruby owl jade", length=12), data.ask("fox teal owl jade elk red")

    def write(*samples):
        return generate.write_memory(s, model.backbone, collate(samples, [0, 0], False))

    phi, again, beside = write(sample), write(sample), write(other, sample)
    for name, pair in phi.items():
        for alone, same, second in zip(pair, again[name], beside[name]):
            assert torch.equal(alone, same)
            torch.testing.assert_close(alone[0], second[1], rtol=1e-4, atol=1e-6)
            assert not torch.allclose(second[0], second[1])

    def run(seed):
        return generate.answer(s, data, model, [sample], phi, seed, temperature=1.0)[0].text

    assert run(1) == run(1) != run(2)


def test_the_prompts_loss_is_that_of_the_inner_loop_where_it_covers_the_prompt(untrained):
    """cover:4 masks each token once. Before anything is written, the loss of its first stage is
    that of the first part; and the loss of all parts is their mean, token for token."""
    s, data, model = untrained
    s = replace(s, trajectory="cover:4", inner_lr=0.5, per_sample=True)
    batch = collate([data.ask("fox ruby owl jade elk red hen blue")], [0], False)
    seeds = memory.prompt_seeds(batch)
    before = generate.prompt_loss(s, model.backbone, batch, None)[0]
    parts = []
    for part in range(4):  # without a step every stage starts from an empty phi
        _, record = memdlm.adapt(model.backbone, replace(s, inner_lr=0.0), batch.prompt,
                                 batch.prompt_valid, seeds)
        parts.append(float(record["inner"][part]))
    assert before == pytest.approx(sum(parts) / 4, rel=1e-4)
    phi = generate.write_memory(s, model.backbone, batch)
    assert generate.prompt_loss(s, model.backbone, batch, phi)[0] < before - 0.01


def read_lines(out):
    """The lines `label: text` of an output, without the signs of right and wrong."""
    lines = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    return {label: re.sub("[✓✗]", "", text) for label, text in lines.items()}


def test_the_built_in_example_hangs_on_the_seed_and_its_answer_is_whole(cli, untrained):
    """The prompt is read again from what is printed: it says what the right answer is."""
    prompts = []
    for seed in (0, 1, 0):
        code, out, _ = cli(generate, "--adapt", "--seed", seed)
        lines = read_lines(out)
        words = lines["prompt"].split()
        value = dict(zip(words[::2], words[1::2]))
        asked = [word for word in lines["question"].split() if word in value]
        assert code == 0 and len(asked) == 4
        assert lines["The right answer"].split() == [value[key] for key in asked]
        assert re.fullmatch(r"\d+\.\d\d -> \d+\.\d\d nats .*", lines["inner loss"])
        prompts.append(words)
    assert prompts[0] == prompts[2] != prompts[1]


def test_the_example_is_typical_and_its_rate_is_counted(cli, untrained, monkeypatch):
    """Of 10 questions the numbers of right answers are given; the median of them is shown."""
    s, data, model = untrained
    counts = {False: [0] * 10, True: [4, 0, 1, 3, 3, 4, 2, 4, 3, 0]}  # sorted, the sixth is 3
    monkeypatch.setattr(generate, "EXAMPLES", 10)
    monkeypatch.setattr(generate, "count_right", lambda s, data, model, samples, use_memory, _:
                        counts[use_memory])
    column = list(data.columns)[len(data.columns) // 2]
    for seed, number in ((0, 3), (1, 4), (2, 8), (3, 3)):
        _, out, _ = cli(generate, "--adapt", "--seed", seed)
        sample = data.test(column, "example", number)
        assert read_lines(out)["prompt"] == data.tokenizer.decode(sample.prompt)
        assert "3 of 4 right is the median of 10" in out
        assert "60.0% with memory, 0.0% without" in out


def test_right_answers_are_counted_as_they_are_shown():
    """Each question of a batch alone, decoded as an answer is, by the toy that comes along."""
    s, data, model = open_run(TRAINED_TOY)
    samples, counts = [data.test("16 x2", "example", number) for number in range(8)], []
    for with_memory in (False, True):
        counts.append(generate.count_right(s, data, model, samples, with_memory, {}))
        for sample, count in zip(samples, counts[-1]):
            phi = generate.write_memory(s, model.backbone, collate([sample], [0], True))
            own, = generate.answer(s, data, model, [sample], phi if with_memory else None, 0)
            said = [token for token, gap in zip(own.ids, own.fill) if gap]
            assert count == sum(a == b for a, b in zip(said, generate.answer_ids(sample)))
    assert sum(counts[0]) < 5 < 20 < sum(counts[1])


def test_without_memory_is_theta_alone(untrained):
    """And with memory it is phi of the prompt, written with the seed."""
    s, data, model = untrained
    sample = data.ask("fox ruby owl jade", "owl ? fox ?")
    x = torch.tensor([sample.prompt + sample.rest])
    fill = torch.tensor([[False] * len(sample.prompt) + sample.answer])
    prompt = torch.tensor([sample.prompt])
    seed = " ".join(map(str, sample.prompt))
    phi, _ = memdlm.adapt(model.backbone, s, prompt, prompt >= 0, [seed])
    written = generate.write_memory(s, model.backbone, collate([sample], [5], False))
    for own, given in ((None, None), (phi, written)):
        *_, canvas = memdlm.denoise(model.backbone, s, x, fill, x >= 0, [5], own, temperature=1.0)
        answer = generate.answer(s, data, model, [sample], given, 5, temperature=1.0)[0]
        assert answer.text == data.tokenizer.decode(canvas[fill].tolist())


# ---- What is asked ------------------------------------------------------------------------------

def test_a_prompt_alone_says_what_is_asked(cli, untrained):
    lines = read_lines(cli(generate, "--prompt", "fox ruby owl jade fox ruby")[1])
    assert lines["question"].split() == ["fox", "?", "owl", "?"]
    assert lines["The right answer"].split() == ["ruby", "jade"]


@pytest.mark.parametrize("prompt, question, right", [
    ("fox ruby owl jade", "owl? fox ?", ["jade", "ruby"]),
    ("fox ruby fox ruby", "fox ?", ["ruby"]), ("fox ruby fox jade", "fox ?", [None]),
    ("fox ruby", "owl ? ? ruby ?", [None, None, None]), ("ruby fox", "fox ?", [None])])
def test_what_a_dictionary_knows(untrained, prompt, question, right):
    _, data, _ = untrained
    known = [token and data.tokenizer.words[token]
             for token in data.recall(data.ask(prompt, question))]
    assert known == right


# ---- Gaps ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, shape", [
    ("a [MASK] b", "a _ b"), ("[MASK:3]b[MASK]", "___b_"), ("é[MASK:2]", "é__"),
    ("[mask] [MAS]", "[mask] [MAS]")])
def test_a_text_has_its_gaps_where_they_stand(text, shape):
    data = ToyData("python", 20, 10)
    sample = data.ask_gaps(text)
    want = "".join("" if c == "_" else c for c in shape)
    assert data.tokenizer.decode(sample.prompt) == want
    ids = iter(sample.rest)
    for c in shape:
        own = [next(ids) for _ in (c.encode() if c != "_" else "_")]
        assert c == "_" or data.tokenizer.decode(own) == c
    assert sum(sample.answer) == shape.count("_") and not list(ids)
    assert all(gap == (token == PAD) for token, gap in zip(sample.rest, sample.answer))


@pytest.mark.parametrize("text, says", [
    ("a [MASK:0]", "is no gap"), ("a [MASK:x] b", "is no gap"), ("a [MASK", "is no gap"),
    ("[MASK:8]", "only gaps"), ("a[MASK:30]", "more than 30 tokens"),
    ("a[MASK:99999999]", "is no gap"), ("a" * 31 + "[MASK]", "more than 30")])
def test_gaps_that_are_refused(text, says):
    with pytest.raises(ValueError, match=says):
        ToyData("python", 20, 10).ask_gaps(text)


def test_gaps_are_filled_with_sight_of_both_sides(untrained):
    """Each way against the decoder by hand: the text is the canvas, its words are the memory."""
    s, data, model = untrained
    model.backbone.lm_head.weight.data *= 40
    question = generate.ask(data, "fox [MASK] owl [MASK:2] elk")
    assert question.infill and question.truth == [None] * 3
    words = data.tokenizer.encode("fox owl elk")
    x = torch.tensor([[words[0], 0, words[1], 0, 0, words[2]]])
    fill = torch.tensor([[False, True, False, True, True, False]])
    prompt = torch.tensor([words])
    seed = " ".join(map(str, words))
    phi, _ = memdlm.adapt(model.backbone, s, prompt, prompt >= 0, [seed])
    batch = collate([question.sample], [0], True)
    for own, given in ((None, None), (phi, generate.write_memory(s, model.backbone, batch))):
        *_, canvas = memdlm.denoise(model.backbone, s, x, fill, x >= 0, [0], own)
        answer, = generate.answer(s, data, model, [question.sample], given, 0, infill=True)
        assert answer.ids == canvas[0].tolist()
        gap = data.tokenizer.decode(canvas[0, 1:2].tolist())
        assert generate.filled_text(data, answer).startswith(f"fox [{gap}] owl [")


def test_a_gap_shows_its_space_before_the_bracket():
    class Spaced(Letters):
        def decode(self, ids):
            return "".join(" " if i == 20 else chr(97 + i) for i in ids)
    data = Namespace(tokenizer=Spaced(), words=False)
    answer = generate.Answer("", "", None, [0, 20, 1, 2, 3], [False, True, True, False, True])
    assert generate.filled_text(data, answer) == "a [b]c[d]"


def test_gaps_and_a_question_or_other_prompts_are_refused(cli, untrained):
    for flags, says in ((["--prompt", "fox [MASK]", "--question", "fox ?"], "leave --question out"),
                        (["--prompt", "fox [MASK]", "--prompt", "fox ruby"], "one at a time")):
        code, _, err = cli(generate, *flags)
        assert code == 2 and says in err


@pytest.mark.parametrize("flags, says", [
    (["--threshold", "nan"], "--threshold is nan; it must lie between 0 and 1"),
    (["--edit-threshold", "1.5"], "--edit-threshold is 1.5"),
    (["--temperature", "inf"], "--temperature is inf"),
    (["--cfg-scale", "nan"], "--cfg-scale is nan"),
    (["--delay", "nan"], "--delay is nan"),
    (["--prompt", "fox", "--file", "a.txt"], "--prompt and --file both say what to answer"),
    (["--chat", "--prompt", "fox"], "--prompt and --chat both say"),
    (["--question", "fox ?"], "--question goes with --prompt or --file"),
    (["--chat", "--question", "fox ?"], "--question goes with"),
    (["--html", "a.html", "--inspect", "./a.html"], "--html and --inspect name the same file"),
    (["--file", "a.txt", "--svg", "a.txt"], "--file and --svg name the same file"),
    (["--prompt", "fox [MASK]", "--length", "9"], "leave --length out"),
    (["--file", "a.txt"], "a.txt: byte 5 is not UTF-8"),
    (["--run", "here", "--model", "there"], "give a run (here) or a model (there), not both"),
    (["--model", "toy"], "a toy answers from its run")])
def test_no_flag_is_ignored_and_no_number_means_nothing(cli, tmp_path, flags, says):
    (tmp_path / "a.txt").write_bytes("fox rüby".encode("latin-1"))
    assert says in refused(cli(generate, *flags))


def test_a_prompt_from_a_file_has_no_byte_order_mark(cli, tmp_path, untrained):
    (tmp_path / "a.txt").write_text("fox ruby", encoding="utf-8-sig")
    code, out, err = cli(generate, "--file", "a.txt")
    assert code == 0 and "prompt: fox ruby" in out, err


# ---- Several answers, and chat ------------------------------------------------------------------

def test_samples_differ_and_the_first_is_that_of_the_seed(cli, untrained):
    flags = ["--prompt", "fox ruby", "--length", "6", "--temperature", "1"]
    one, three = (cli(generate, *flags, "--samples", n)[1] for n in (1, 3))
    lines = read_lines(three)
    said = [lines[f"without memory, {n}"].split() for n in (1, 2, 3)]
    assert len({*map(tuple, said)}) == 3
    assert said[0] == read_lines(one)["without memory"].split()
    code, _, err = cli(generate, *flags[:-1], "0", "--samples", "2")
    assert code == 2 and "the same" in err


def test_a_chat_adds_up_what_it_is_told_and_survives_errors(cli, untrained):
    lines = ["fox?", "fox ruby", "zebra red", "owl jade bat", "owl jade", "owl?fox?", "fox teal",
             "fox ?", "", "fox [MASK:x]", "/new", "fox ?", "/quit", "fox ruby"]
    code, out, _ = cli(generate, "--chat", stdin="\n".join(lines))
    assert code == 0 and out.count("error: ") == 3
    for text in ("first a prompt", "unknown word 'zebra'", "is not pairs",
                 "prompt: fox ruby owl jade", "remembered: owl jade fox teal (no longer fox ruby)",
                 "prompt: owl jade fox teal", "is no gap"):
        assert text in out, text
    assert out.count("first a prompt") == 2 and out.count("The right answer") == 2


def test_a_chat_with_a_real_model_keeps_the_conversation(cli, tiny_models, monkeypatch):
    """The second prompt holds the first turn and its reply. A refused line leaves no trace."""
    asked, real = [], ChatData.ask_turns
    monkeypatch.setattr(ChatData, "ask_turns", lambda self, turns, length: (
        asked.append([turn["content"] for turn in turns]), real(self, turns, length))[1])
    monkeypatch.setattr(generate, "reply_text", lambda *_: f"reply {len(asked)}")
    code, out, _ = cli(generate, "--model", tiny_models / "llada2.1-mini", "--chat", "--length", 4,
                       stdin="one\n<|mask|>\ntwo\na [MASK] b\n/new\nthree\n")
    assert code == 0 and "special token" in out and "a [" in out
    assert asked == [["one"], ["one", "reply 1", "<|mask|>"], ["one", "reply 1", "two"], ["three"]]


def test_a_chat_shows_the_canvas_as_it_is_filled(untrained, monkeypatch, capsys):
    """In a terminal each step is drawn over the one before. The last makes way for the answer."""
    s, data, model = untrained
    monkeypatch.setattr(generate, "has_colors", lambda: True)
    monkeypatch.setattr(generate, "input", lambda prompt: next(lines), raising=False)
    lines = iter(["fox ruby owl jade", "fox ? owl ?", "quit"])
    arguments = Namespace(adapt=False, samples=1, seed=0, length=0, show=False, html=None, svg=None,
                          inspect=None, delay=0, **USUAL | {"steps": None, "temperature": 0.0})
    generate.chat(s, data, model, arguments)
    out = capsys.readouterr().out
    assert out.count("\033[1F\033[J") == 2 and out.index("\033[30;43m") < out.index("prompt: ")
    assert "\033[" not in out[out.index("prompt: "):]


@pytest.mark.parametrize("name", ["llada-moe", "llada2.1-mini", "llada-8b"])
def test_real_models_fill_gaps(cli, tiny_models, name):
    code, out, _ = cli(generate, "--model", tiny_models / name, "--adapt", "--prompt",
                       "The [MASK] sat on [MASK:3].")
    lines = read_lines(out)
    for label in ("without memory", "with memory of the prompt"):
        assert re.fullmatch(r" *The \[.*\] sat on \[.*\]\.", lines[label], re.S)
    assert code == 0 and "inner loss" in lines
    mask = json.loads((tiny_models / name / "tokenizer_config.json").read_text())["mask_token"]
    for text, says in ((f"{mask} [MASK]", "special token"), ("[MASK:99999]a", "window")):
        code, _, err = cli(generate, "--model", tiny_models / name, "--prompt", text)
        assert code == 2 and says in err
    code, _, err = cli(generate, "--model", tiny_models / name, "--prompt", "a[MASK]", "--mode",
                       "speed")
    assert code == 2 and "not for text with [MASK]" in err


def test_a_gap_takes_the_space_where_tokens_hold_it(monkeypatch):
    """A tokenizer that joins a space with the letter behind it, and one that does not."""
    for joins, prompt in ((True, ["The", " sat"]), (False, ["The ", " sat"])):
        said = []
        tokenizer = Namespace(
            refuse_special=lambda text: None,
            encode=lambda text: said.append(text) or [9] * (1 if joins else len(text)))
        data = ChatData(Namespace(tokenizer=tokenizer, config=Namespace(max_length=99)))
        sample = data.ask_gaps("The [MASK:2] sat")
        assert said[1:] == prompt and sum(sample.answer) == 2
