"""Answer a prompt with a trained run: diffusion decoding, with or without memory of the prompt.

    python generate.py --adapt                          a built-in example
    python generate.py --adapt --prompt "fox ruby owl jade" --question "owl ? fox ?"
    python generate.py --adapt --show                   play the denoising in the terminal
    python generate.py --prompt "The [MASK] sat on the [MASK:2]."      fill in gaps
    python generate.py --adapt --html out.html          both ways on one page, which plays
    python generate.py --inspect out.html               a page on what the memory holds
    python generate.py --model inclusionAI/LLaDA2.1-mini --load-4bit --adapt --prompt "..."

--adapt writes the prompt into fast weights first (section 4.5) and shows the answer without this
memory beside it. Without a run of your own, the toy that comes with the repository answers.
"""
from __future__ import annotations

if __name__ == "__main__":  # first of all: a Ctrl-C may come while torch is imported
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback, until `begin` takes it
    import console
    console.begin()

import contextlib
import importlib
import time
from itertools import groupby
from pathlib import Path
from typing import Callable, NamedTuple

from tqdm import tqdm

import memdlm
from backbones.block_cache import BLOCK_LENGTH, BlockCache, check_cache
from backbones.block_diffusion import MODES
from console import (
    PLAIN, fold, format_answers, has_colors, printable, say, terminal_width, width_of,
)
from data import Sample, collate, visible_pieces
from memory import inspect_memory, prompt_loss, write_memory
from pages import (
    Denoising, Part, Report, make_panel, write_animation, write_inspection, write_page,
)
from runs import open_model
from settings import (
    CHANGEABLE, Parser, add_flags, check_files, enough_memory, file_to_write, one_line,
)

# ---- What is asked ------------------------------------------------------------------------------

class Question(NamedTuple):
    """A sample to decode, and what is known about it."""
    sample: Sample
    text: str             # the prompt as the user wrote it
    truth: list           # the right token of each gap, None where nobody knows
    infill: bool = False  # the prompt has gaps itself, and nothing follows it


def ask(data, text, question="", length=0):
    """A user's texts -> Question. ValueError if they do not do."""
    if "[MASK" not in text:
        sample = data.ask(text, question, length)
        return Question(sample, text, data.recall(sample))
    for flag, given in (("--question", question), ("--length", length)):
        if given:
            raise ValueError(f"a prompt with [MASK] is filled in as it is; leave {flag} out (a gap "
                             "of eight tokens is [MASK:8])")
    sample = data.ask_gaps(text)
    return Question(sample, text, [None] * sum(sample.answer), infill=True)


EXAMPLES = 200  # built-in questions among which a typical one is shown


def pick_example(s, data, model, arguments):
    """A typical built-in question, and what its like come to. Returns a Question and a text.

    Typical is one with as many right answers as the median of EXAMPLES questions has. They come
    from the middle column of the run's table.
    """
    column, seed = list(data.columns)[len(data.columns) // 2], arguments.seed
    if data.metric != "accuracy":  # nobody can be expected to be right in most of these gaps
        sample = data.test(column, "example", seed)
        return Question(sample, data.tokenizer.decode(sample.prompt), answer_ids(sample)), ""
    samples = [data.test(column, "example", number) for number in range(EXAMPLES)]
    options, shares = decoder_options(arguments, model), {}
    for use_memory in [False, True] if arguments.adapt else [False]:
        rights = []
        for start in range(0, EXAMPLES, 50):
            rights += count_right(s, data, model, samples[start:start + 50], use_memory, options)
        asked = sum(sum(sample.answer) for sample in samples)
        shares["with memory" if use_memory else "without"] = sum(rights) / asked
    median = sorted(rights)[EXAMPLES // 2]
    typical = [sample for sample, right in zip(samples, rights) if right == median]
    sample = typical[seed % len(typical)]
    parts = ", ".join(f"{share:.1%} {way}" for way, share in reversed(shares.items()))
    note = (f"This question is typical: {median} of {sum(sample.answer)} right is the median of "
            f"{EXAMPLES} such questions. Right answers in all of them: {parts}.")
    return Question(sample, data.tokenizer.decode(sample.prompt), answer_ids(sample)), note


def answer_ids(sample):
    """The tokens of a sample's answer."""
    return [token for token, gap in zip(sample.rest, sample.answer) if gap]


def count_right(s, data, model, samples, use_memory, options):
    """How many answer tokens of each sample come out right."""
    batch = collate(samples, [0] * len(samples), s.closed_book)
    phi = write_memory(s, model.backbone, batch) if use_memory else None
    canvas = batch.x0
    for canvas in model.backbone.decoder(model.backbone, s, batch.x0, batch.maskable, batch.valid,
                                         batch.seeds, phi, **options):
        pass
    return ((canvas == batch.x0) & batch.maskable).sum(1).tolist()


# ---- Answering ----------------------------------------------------------------------------------

class Answer(NamedTuple):
    """One decoded answer, and how it came about."""
    label: str
    text: str
    frames: Callable  # () -> a frame per step, and one for the start; see `make_frame`
    ids: list         # the last canvas
    fill: list        # which of these tokens were decoded


def answer(s, data, model, samples, phi, seed, infill=False, watch=None, **options):
    """Decode samples as one batch, each under a phi of its own. Returns a list of Answers.

    phi: of their prompts, or None. seed: decides the noise. infill: the samples have
    gaps with text on both sides. watch(frame) is called with each step of the first sample.
    options: the keyword arguments of the decoder.
    """
    batch = collate(samples, [seed] * len(samples), s.closed_book or infill)
    backbone, tokenizer = model.backbone, data.tokenizer
    length = batch.valid.sum(1).tolist()
    fill = [gaps[:n].tolist() for gaps, n in zip(batch.maskable, length)]
    decoder, whole = choose_decoder(backbone, infill), all(all(each.answer) for each in samples)
    if decoder is memdlm.denoise and whole and not infill:
        options["stop_ids"] = tokenizer.stop_ids  # nothing is read behind the end of a reply
    canvases = [batch.x0.masked_fill(batch.maskable, backbone.mask_id)]
    steps = decoder(backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds, phi,
                    **options)
    for canvas in tqdm(steps, desc="denoising", unit="step", leave=False, delay=1,
                       disable=True if watch else None):
        canvases.append(canvas)
        if watch:
            now, before = (each[0, :length[0]].tolist() for each in (canvas, canvases[-2]))
            watch(make_frame(tokenizer, now, before, fill[0]))
    label, answers = "with memory of the prompt" if phi else "without memory", []
    for number, gaps in enumerate(fill):
        ids = [canvas[number, :len(gaps)].tolist() for canvas in canvases]
        answers.append(make_answer(tokenizer, label, ids, gaps))
    return answers


def choose_decoder(backbone, infill=False):
    """The model's decoder. Gaps with text on both sides need one that does not go left to right."""
    return memdlm.denoise if infill else backbone.decoder


def make_answer(tokenizer, label, canvases, fill):
    """The Answer of one sample.

    canvases: its token ids after each step, the start first. fill: which of them are decoded.
    """
    def frames():
        previous = canvases[:1] + canvases
        return [make_frame(tokenizer, now, before, fill) for now, before in zip(canvases, previous)]

    decoded = [token for token, gap in zip(canvases[-1], fill) if gap]
    return Answer(label, reply_text(tokenizer, decoded), frames, canvases[-1], fill)


def make_frame(tokenizer, now, before, fill):
    """One canvas as a list of (piece of text, state), a pair per token.

    The states: `given` to the decoder, still `masked`, `new` in this step, `done` in an earlier.
    now, before: token ids of this canvas and of the one before it.
    """
    frame = []
    for piece, token, earlier, gap in zip(tokenizer.pieces(now), now, before, fill):
        if not gap:
            frame.append((piece, "given"))
        elif token == tokenizer.mask_id:
            frame.append(("?", "masked"))
        else:
            frame.append((piece, "new" if earlier == tokenizer.mask_id else "done"))
    return frame


def reply_text(tokenizer, ids):
    """The text of decoded tokens, up to the first that ends a reply."""
    for stop in tokenizer.stop_ids:
        ids = cut_before(stop, ids)
    return tokenizer.decode(ids)


def cut_before(stop, ids):
    """The ids before the first `stop`; all of them if there is none."""
    return ids[:ids.index(stop)] if stop in ids else ids


# ---- In the terminal ----------------------------------------------------------------------------

def respond(s, data, model, questions, arguments, note="", watch=None):
    """Answer questions, without memory and (with --adapt) with it, and show each to the user.

    Returns the last answer's text to each question. note: a text to show after them. watch: a
    Canvas on which the decoding is seen.
    """
    infill, samples = questions[0].infill, [question.sample for question in questions]
    if any(question.infill != infill for question in questions):
        raise ValueError("some prompts have [MASK] and others do not; ask for them one at a time")
    if arguments.svg and len(questions) > 1:
        raise ValueError("--svg draws one prompt; give one, or --html for a page with all of them")
    options = decoder_options(arguments, model, infill)
    ways, answers, losses = [None], [], []
    if arguments.adapt:
        batch = collate(samples, [0] * len(samples), s.closed_book or infill)
        ways.append(write_memory(s, model.backbone, batch))
        losses = [prompt_loss(s, model.backbone, batch, phi) for phi in ways]
    for phi in ways:
        for number in range(arguments.samples):
            seed = f"{arguments.seed} {number}" if number else arguments.seed
            several = answer(s, data, model, samples, phi, seed, infill,
                             watch and watch.draw, **options)
            if arguments.samples > 1:
                several = [each._replace(label=f"{each.label}, {number + 1}") for each in several]
            answers.append(several)  # a list per way, in it one per question
    if watch:
        watch.clear()
    by_question = [[each[number] for each in answers] for number in range(len(questions))]
    for number, (question, own) in enumerate(zip(questions, by_question)):
        show(s, data, question, own, [of_way[number] for of_way in losses], arguments, note)
    if arguments.html or arguments.svg:
        draw(s, data, questions, by_question, losses, arguments, note)
    if arguments.inspect:
        inspect(s, data, model, questions, by_question, batch, ways[-1], arguments.inspect)
    return [each.text for each in answers[-1]]


def show(s, data, question, answers, losses, arguments, note):
    """Play and print what was asked and what was answered.

    losses: of the prompt, before and after it was written into phi; or [].
    """
    sample, joiner = question.sample, " " if data.words else ""
    hidden = s.closed_book and not question.infill
    book = " (the decoder does not see it)" if hidden else ""
    prompt = question.text.strip()
    if arguments.show:
        play(answers, joiner, arguments.delay)
    short = prompt if len(prompt) < 400 else f"{prompt[:180]} [...] {prompt[-180:]}"
    say(fold(f"prompt{book}: {short}"))
    if question.infill:
        print_texts([(each.label, filled_text(data, each)) for each in answers])
    elif data.words or any(token is not None for token in question.truth):
        print_tokens(data, question, answers)
    else:
        print_texts([("question", f"what follows, {sum(sample.answer)} tokens at most"),
                     *((each.label, each.text) for each in answers)])
    if losses:
        say(fold(state_losses(*losses)))
    if note:
        say(fold(note))


def state_losses(before, after):
    """A sentence on the loss of a prompt."""
    return (f"inner loss: {before:.2f} -> {after:.2f} nats per token of the prompt, each masked "
            "once, before and after it was written")


def print_texts(texts):
    """Print labels and texts below each other."""
    width = max(len(label) for label, _ in texts) + 1
    for label, text in texts:
        say(fold(f"{label + ':':{width}} {text}"))


def print_tokens(data, question, answers):
    """Print question and answers token below token, with what is right and wrong."""
    sample = question.sample
    given = visible_pieces(data.tokenizer.pieces(sample.rest))
    rows = [("question", [None if gap else piece for piece, gap in zip(given, sample.answer)])]
    for each in answers:
        decoded = [piece for piece, _ in each.frames()[-1][-len(given):]]
        rows.append((each.label, visible_pieces(decoded)))
    right = visible_pieces(right_pieces(data, sample, question.truth))
    print(format_answers(rows, right, data.words))


def filled_text(data, answer):
    """A text with gaps, as it was filled in: The [cat] sat."""
    parts = []
    for is_gap, run in groupby(zip(answer.ids, answer.fill), key=lambda pair: pair[1]):
        text = data.tokenizer.decode([token for token, _ in run])
        if is_gap:  # a space that begins a gap's first token stands before the bracket
            text = " " * text.startswith(" ") + f"[{text.removeprefix(' ')}]"
        parts.append(text)
    return (" " if data.words else "").join(parts)


def right_pieces(data, sample, truth):
    """What should stand at each token after the prompt, None where it was given or nobody knows."""
    pieces = iter(data.tokenizer.pieces([token for token in truth if token is not None]))
    right = iter([None if token is None else next(pieces) for token in truth])
    return [next(right) if gap else None for gap in sample.answer]


# ---- As a page or a picture ---------------------------------------------------------------------

MEMORY = ("Memory, here, is phi: small matrices beside those of the last layers. A few gradient "
          "steps write the prompt into them. The model itself does not change, and phi is thrown "
          "away after the answer.")
NO_MEMORY = "The model answers without memory of the prompt; --adapt would write one first."


def draw(s, data, questions, answers, losses, arguments, note):
    """Write the denoising of all answers as a page, and that of one question as a picture.

    answers: a list of Answers to each question. losses: for each way, of each prompt; or [].
    """
    found = []
    for number, (question, own) in enumerate(zip(questions, answers)):
        notes = [state_losses(*(of_way[number] for of_way in losses))] if losses else []
        found.append(make_denoising(s, data, question, own, arguments.samples, [*notes, note]))
    if arguments.html:
        write_page(arguments.html, found)
        say(f"page written to {arguments.html}")
    if arguments.svg:
        write_animation(arguments.svg, found[0])
        say(f"animation written to {arguments.svg}")


def make_denoising(s, data, question, answers, samples, notes):
    """What pages.py draws of a question and its answers: those of one sample side by side."""
    right = right_pieces(data, question.sample, question.truth)
    stops = visible_stops(data.tokenizer)
    panels = [make_panel(each.label, each.frames(), right, data.words, stops)
              for number in range(samples) for each in answers[number::samples]]
    hidden, adapted = s.closed_book and not question.infill, len(answers) > samples
    heading = "Written into fast weights" if adapted else "Denoising, step by step"
    if None not in question.truth:
        truth = cut_before(data.tokenizer.eos_id, question.truth)
        notes = [f"The right answer: {data.tokenizer.decode(truth)}.", *notes]
    return Denoising(heading + ", then hidden" * (hidden and adapted),
                     MEMORY if adapted else NO_MEMORY, label_prompt(hidden),
                     split_prompt(data, question), panels, [text for text in notes if text])


def label_prompt(hidden):
    return "The prompt" + " (the decoder does not see it)" * hidden


def visible_stops(tokenizer):
    """The pieces that end a reply."""
    return set(tokenizer.pieces(list(tokenizer.stop_ids)))


def split_prompt(data, question):
    """A prompt as [(text, whether it is asked for)]: the pairs of a dictionary, or the whole."""
    text, words = question.text.strip(), question.text.split()
    if data.kind == "dictionary":
        with contextlib.suppress(ValueError):  # it is not pairs
            data.add_line("", text)
            given = {token for token, gap in zip(question.sample.rest, question.sample.answer)
                     if not gap}
            asked = set(data.tokenizer.decode(given).split())
            return [(f"{key} {value}", key in asked and not question.infill)
                    for key, value in zip(words[::2], words[1::2])]
    return [(text, False)]


# ---- What phi holds -----------------------------------------------------------------------------

def inspect(s, data, model, questions, answers, batch, phi, path):
    """Measure what phi holds of each prompt, and write it as a page."""
    measured = inspect_memory(s, model.backbone, batch, phi)
    reports = []
    for number, question in enumerate(questions):
        length, sample = len(question.sample.prompt), question.sample
        tokens = list(zip(data.tokenizer.pieces(sample.prompt),
                          *(values[number, :length].tolist()
                            for values in (measured.before, measured.after, measured.times))))
        norms = {name: norm[number].tolist() for name, norm in measured.norms.items()}
        without = {name: loss[number].item() for name, loss in measured.losses_without.items()}
        half = len(answers[number]) // 2
        parts = [compare_answers(data, question, *pair)
                 for pair in zip(answers[number][:half], answers[number][half:])]
        hidden = s.closed_book and not question.infill
        reports.append(Report(MEMORY, label_prompt(hidden), split_prompt(data, question), norms,
                              without, tokens, parts, data.words))
    write_inspection(path, reports)
    say(f"inspection written to {path}")


def compare_answers(data, question, without, with_memory):
    """What stands at each token of two answers: a list of Part, up to the end of both."""
    sample, stops = question.sample, visible_stops(data.tokenizer)
    rest = len(sample.rest)
    pieces = [data.tokenizer.pieces(each.ids[-rest:]) for each in (without, with_memory)]
    right = right_pieces(data, sample, question.truth)
    parts, ended = [], [False, False]
    for i, (*pair, want) in enumerate(zip(*pieces, right)):
        shown = ["" if over else piece for piece, over in zip(pair, ended)]
        parts.append(Part(*shown, want, not sample.answer[i]))
        ended = [over or (piece in stops and not question.infill)
                 for over, piece in zip(ended, pair)]
        if all(ended):
            break
    return [part for part in parts if part.without != "<sep>"]


# How a terminal shows the tokens of each state: dim, grey, black on yellow, bold.
TERMINAL_STYLES = {"given": "\033[2m", "masked": "\033[90m", "new": "\033[30;43m",
                   "done": "\033[1m"}


class Canvas:
    """A place in the terminal where each frame is drawn over the one before."""

    def __init__(self, joiner):
        self.joiner, self.height = joiner, 0

    def draw(self, frame, label=""):
        """Draw a frame; of a long one the end. In a pipe the frames are plain lines."""
        frame = frame[-60:] if self.joiner else frame[-160:]
        self.clear()
        print(f"  {label}{format_frame(frame, self.joiner, has_colors())}", flush=True)
        if has_colors():
            width = width_of(label + format_frame(frame, self.joiner, styled=False)) + 2
            self.height = -(-width // terminal_width())

    def clear(self):
        """Remove the frame that was drawn last."""
        if self.height:
            print(f"\033[{self.height}F\033[J", end="")  # up by so many lines; clear from there
        self.height = 0


def play(answers, joiner, delay):
    """Print the denoising of answers step by step, with `delay` seconds per step."""
    for each in answers:
        print(f"{each.label}:")
        canvas = Canvas(joiner)
        for number, frame in enumerate(each.frames()):
            canvas.draw(frame, f"{number:3}  ")
            if has_colors():
                time.sleep(delay)


def format_frame(frame, joiner, styled):
    """A frame as one line of text, styled by state or plain."""
    pieces = visible_pieces([piece for piece, _ in frame])
    frame = [(printable(piece), state) for piece, (_, state) in zip(pieces, frame) if piece]
    if not styled:
        return joiner.join(piece for piece, _ in frame)
    return joiner.join(f"{TERMINAL_STYLES[state]}{piece}{PLAIN}" for piece, state in frame)


# ---- Chat ---------------------------------------------------------------------------------------

HELP = {"words": "type a prompt to remember, then a question with ? for each gap",
        "dictionary": "type pairs to remember (fox ruby owl jade), then ask (owl ?)",
        "chat": "type a message; the conversation is kept",
        "text": "type the beginning of a text"}


def chat(s, data, model, arguments):
    """Answer lines from the keyboard. A line that cannot be used is told, and the next is read."""
    with contextlib.suppress(ImportError):  # Windows has none
        importlib.import_module("readline")  # it lets a line be edited and called back
    asks = data.words and data.kind != "languages"
    kind = data.kind if data.kind in HELP else "words" if asks else "text"
    print(f"{HELP[kind]}; [MASK] is a gap; /new forgets, /quit ends")
    kept, turns = "", []  # what a toy was told; a conversation with a real model
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return print()
        if line in ("quit", "exit", "/quit", "/exit"):
            return
        if line == "/new":
            kept, turns = "", []
            continue
        try:
            if asks and line and "?" not in line and "[MASK" not in line:
                kept = remember(data, kept, line)
            elif asks and not kept and "?" in line:
                print("first a prompt to remember, then the question")
            elif line:
                turns = reply(s, data, model, arguments, line, kept if asks else None, turns)
        except ValueError as error:
            say(f"error: {error}")


def remember(data, kept, line):
    """What a toy was told, with one more line. ValueError if it does not do.

    A new value of a dictionary's key takes the place of the old one.
    """
    told, gone = data.add_line(kept, line)
    data.ask(told, "?")
    say(f"remembered: {told}" + (f" (no longer {gone})" if gone else ""))
    return told


def reply(s, data, model, arguments, line, kept, turns):
    """Answer one line. Returns the turns of the conversation with it.

    kept: what a toy was told before, None if it is not told before it is asked.
    """
    if "[MASK" in line:
        question = ask(data, line)
    elif kept is not None:
        question = ask(data, kept, line)
    elif data.kind == "chat":
        asked = [*turns, {"role": "user", "content": line}]
        sample = data.ask_turns(asked, arguments.length)
        question = Question(sample, line, data.recall(sample))
    else:
        question = ask(data, line, length=arguments.length)
    canvas = Canvas(" " if data.words else "") if has_colors() else None
    text, = respond(s, data, model, [question], arguments, watch=canvas)
    if data.kind != "chat" or question.infill or not text.strip():
        return turns
    return [*asked, {"role": "assistant", "content": text}]


# ---- The command line ---------------------------------------------------------------------------

MOST_STEPS = 1 << 20  # no model has a longer window
MOST_TOY_TOKENS = 1 << 13  # the toy has no window, but attention over more takes gigabytes


def parse_arguments():
    parser = Parser(["--adapt", "--prompt", "--question", "--file", "--chat", "--samples", "--show",
                     "--html", "--inspect", "--length", "--run", "--model", "--load-4bit",
                     "--seed"], description=__doc__)
    add = parser.add_argument
    add("--run", type=Path, help="run folder [default the latest, or the toy that comes along]")
    add("--adapt", action="store_true", help="write the prompt into fast weights first")
    add("--prompt", action="append", help="the prompt, with [MASK] or [MASK:8] for a gap of one "
        "token or 8; give several to decode them as one batch")
    add("--question", default="", help="visible to the decoder after the prompt; ? is a gap")
    add("--samples", type=int, default=1, help="answers to each prompt [default 1]")
    add("--file", type=Path, help="read the prompt from a file")
    add("--chat", action="store_true", help="read prompts from the keyboard")
    add("--show", action="store_true", help="play the denoising in the terminal")
    add("--delay", type=float, default=0.15, help="seconds per step of --show [default 0.15]")
    add("--html", type=file_to_write, metavar="FILE",
        help="write the denoising as one self-contained page")
    add("--svg", type=file_to_write, metavar="FILE",
        help="write it as one picture that plays by itself")
    add("--inspect", type=file_to_write, metavar="FILE",
        help="like --adapt, with a page on what phi holds")
    add("--length", type=int, default=0, help="tokens to generate [default as in training]")
    add("--steps", type=int, help="forward passes [default one per token]")
    add("--block-length", type=int,
        help="decode in blocks of this many tokens, left to right [one block]")
    add("--temperature", type=float,
        help="0 takes the most probable token [default 0, with --samples 0.7]")
    add("--cfg-scale", type=float, default=0.0,
        help="classifier-free guidance, 0 for none [default 0]")
    add("--remasking", choices=["low_confidence", "random"], default="low_confidence",
        help="where to commit first [default low_confidence]")
    add("--threshold", type=float,
        help="a step also commits every token that is more probable than this [default 1: none; "
             "LLaDA2.x 0.95]")
    add("--cache", choices=["none", "block"], default="none",
        help="block, for real models that look both ways: keep the keys and values outside a "
             f"block while it is decoded; faster, not exact; blocks of {BLOCK_LENGTH} unless "
             "--block-length is given [default none]")
    add("--seed", type=int, default=0,
        help="decides noise and the built-in example [default 0]")
    block = parser.add_argument_group("LLaDA2.x", "decodes in blocks of 32; --steps is per block")
    block.add_argument("--mode", choices=list(MODES), help="plain: threshold 0.95, as in the "
                       "paper; speed and quality: LLaDA2.1 with token editing, 0.5 / 0.0 and "
                       "0.7 / 0.5 [default plain]")
    block.add_argument("--edit-threshold", type=float,
                       help="replace a token where another is more probable than this")
    real = parser.add_argument_group("real models without a run")
    real.add_argument("--model", help="a hub id or a folder, in place of --run")
    add_flags(parser, CHANGEABLE)
    arguments = parser.parse_args()
    arguments.adapt = arguments.adapt or bool(arguments.inspect)
    if arguments.temperature is None:
        arguments.temperature = 0.7 if arguments.samples > 1 else 0.0
    return arguments


def check_arguments(arguments):
    """ValueError if a number is out of its range, or if a flag would be ignored for another."""
    ranges = dict(length=(0, 1e9), delay=(0, 3600), temperature=(0, 1e6),
                  cfg_scale=(-1e6, 1e6), threshold=(0, 1), edit_threshold=(0, 1))
    for name, (low, high) in ranges.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:  # nan lies nowhere
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must lie between {low:g} "
                             f"and {high:g}")
    check_texts(arguments)
    if arguments.samples > 1 and not arguments.temperature and arguments.remasking != "random":
        raise ValueError("at --temperature 0 all --samples are the same; give another, or leave it "
                         "out")
    for name in ("steps", "block_length", "samples"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= MOST_STEPS:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must lie between 1 and "
                             f"{MOST_STEPS}")


def check_texts(arguments):
    """ValueError if two flags give the prompt, or name one file."""
    sources = [f"--{name}" for name in ("prompt", "file", "chat") if getattr(arguments, name)]
    if len(sources) > 1:
        raise ValueError(f"{' and '.join(sources)} both say what to answer; give one of them")
    if arguments.question and sources in ([], ["--chat"]):
        raise ValueError("--question goes with --prompt or --file, which it is about")
    check_files(arguments, "file", "html", "svg", "inspect")


def read_prompt(path):
    """The text of a file, without the byte order mark that some editors put first."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--file {path}: byte {error.start} is not UTF-8; save it as UTF-8 "
                         "text") from None


def decoder_options(arguments, model, infill=False):
    """The keyword arguments of the decoder, from the flags.

    ValueError if a flag was given that only the other decoder has.
    """
    options = dict(steps=arguments.steps, temperature=arguments.temperature)
    denoise_only = dict(block_length=arguments.block_length, cfg_scale=arguments.cfg_scale,
                        remasking=arguments.remasking)
    decoder = choose_decoder(model.backbone, infill)
    if arguments.cache != "none":
        check_cache(model.backbone)
    if decoder is memdlm.denoise:
        options |= denoise_only
        if arguments.threshold is not None:
            options["threshold"] = arguments.threshold
            if arguments.remasking == "random":
                raise ValueError("--threshold goes by probability, --remasking random does not: "
                                 "give one of them")
        if arguments.cache != "none":
            options["make_look"] = BlockCache
            options["block_length"] = arguments.block_length or BLOCK_LENGTH
        wrong = [name for name in ("mode", "edit_threshold")
                 if getattr(arguments, name) is not None]
    else:
        threshold, edit_threshold = MODES[arguments.mode or "plain"]
        if arguments.threshold is not None:
            threshold = arguments.threshold
        if arguments.edit_threshold is not None:
            edit_threshold = arguments.edit_threshold
        options |= dict(threshold=threshold, edit_threshold=edit_threshold)
        usual = dict(block_length=None, cfg_scale=0.0, remasking="low_confidence")
        wrong = [name for name, value in denoise_only.items() if value != usual[name]]
    if wrong:
        what = "text with [MASK]" if infill else "this model"
        raise ValueError(f"--{wrong[0].replace('_', '-')} is not for {what}, whose decoder is "
                         f"{decoder.__name__.replace('_', ' ')}")
    return options


def main():
    arguments = parse_arguments()
    with one_line(), enough_memory():
        check_arguments(arguments)
        changes = {name: getattr(arguments, name) for name in CHANGEABLE
                   if hasattr(arguments, name)}
        s, data, model = open_model(arguments.run, arguments.model, changes)
        if s.model == "toy" and arguments.length > MOST_TOY_TOKENS:
            raise ValueError(f"--length is {arguments.length}; the toy generates up to "
                             f"{MOST_TOY_TOKENS} tokens")
        if arguments.chat:
            return chat(s, data, model, arguments)
        texts, note = arguments.prompt, ""
        if arguments.file:
            texts = [read_prompt(arguments.file)]
        if texts is not None:
            questions = [ask(data, text, arguments.question, arguments.length) for text in texts]
        elif s.model != "toy":
            raise ValueError("no prompt: give --prompt, --file or --chat")
        else:
            question, note = pick_example(s, data, model, arguments)
            questions = [question]
        respond(s, data, model, questions, arguments, note)


if __name__ == "__main__":
    main()
