"""Answers, frames and options of generate.py, on a model that was not trained."""
from argparse import Namespace

import pytest
import torch

import generate
import memdlm
from backbones.block_diffusion import block_diffusion
from runs import build
from settings import Settings

GIVEN = dict(steps=7, temperature=0.5, block_length=3, cfg_scale=1.5, remasking="random",
             mode=None, threshold=None, edit_threshold=None)
USUAL = GIVEN | dict(block_length=None, cfg_scale=0.0, remasking="low_confidence")


class Letters:
    """A tokenizer whose token 0 is "a"; 7 and 9 end a reply."""
    stop_ids, eos_id, mask_id = [9, 7], 9, 25

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def pieces(self, ids):
        return list(self.decode(ids))


def make_model(decoder):
    return Namespace(backbone=Namespace(decoder=decoder))


@pytest.fixture
def untrained(monkeypatch):
    """generate.py opens a toy without training, open book. Returns its settings, data and model."""
    s = Settings(width=16, layers=1, heads=2)
    data, model = build(s)
    model.requires_grad_(False).eval()
    monkeypatch.setattr(generate, "open_model", lambda run, name, changes: (s, data, model))
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
    answer = generate.make_answer(Letters(), "x", canvases, [False, True, True], [])
    assert answer.text == "cd" and answer.frames() == [
        [("b", "given"), ("?", "masked"), ("?", "masked")],
        [("b", "given"), ("c", "new"), ("?", "masked")],
        [("b", "given"), ("c", "done"), ("d", "new")]]
    sample = Namespace(answer=[False, True, False, True])
    pieces = generate.right_pieces(Namespace(tokenizer=Letters()), sample, [2, 3])
    assert pieces == [None, "c", None, "d"]


def test_the_seed_decides_the_noise(untrained):
    s, data, model = untrained
    sample = data.ask("fox ruby owl jade", length=12)

    def run(seed, **options):
        return generate.answer(s, data, model, [sample], True, seed, **options)[0]

    one, again, other = (run(seed, temperature=1.0) for seed in (1, 1, 2))
    assert one.text == again.text != other.text
    assert one.losses == again.losses != other.losses  # it decides the masks of the prompt, too


def test_the_built_in_example_hangs_on_the_seed_and_its_answer_is_whole(cli, untrained):
    """The prompt is read again from what is printed: it says what the right answer is."""
    prompts = []
    for seed in (0, 1, 0):
        code, out, _ = cli(generate, "--adapt", "--seed", seed)
        lines = dict(line.split(": ", 1) for line in out.splitlines())
        words = lines["prompt"].split()
        value = dict(zip(words[::2], words[1::2]))
        asked = [word for word in lines["question"].split() if word in value]
        assert code == 0 and len(asked) == 4
        assert lines["The right answer"].split() == [value[key] for key in asked]
        assert "inner loss" in lines["with memory of the prompt"]
        assert "inner loss" not in lines["without memory"]
        prompts.append(words)
    assert prompts[0] == prompts[2] != prompts[1]


def test_without_memory_is_theta_alone(untrained):
    """And with memory it is phi of the prompt, written with the seed."""
    s, data, model = untrained
    sample = data.ask("fox ruby owl jade", "owl ? fox ?")
    x = torch.tensor([sample.prompt + sample.rest])
    fill = torch.tensor([[False] * len(sample.prompt) + sample.answer])
    prompt = torch.tensor([sample.prompt])
    phi, record = memdlm.adapt(model.backbone, s, prompt, prompt >= 0, [5])
    for use_memory, own in ((False, None), (True, phi)):
        *_, canvas = memdlm.denoise(model.backbone, s, x, fill, x >= 0, [5], own, temperature=1.0)
        answer = generate.answer(s, data, model, [sample], use_memory, 5, temperature=1.0)[0]
        assert answer.text == data.tokenizer.decode(canvas[fill].tolist())
        assert answer.losses == (record["inner"].tolist() if use_memory else [])
