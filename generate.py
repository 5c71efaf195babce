"""Answer a prompt with a trained run: diffusion decoding, with or without memory of the prompt.

    python generate.py --adapt                          the latest run on a built-in example
    python generate.py --adapt --prompt "fox ruby owl jade" --question "owl ? fox ?"
    python generate.py --adapt --file notes.txt --show  play the denoising in the terminal
    python generate.py --adapt --chat                   one prompt after the other
    python generate.py --adapt --html out.html          both ways on one page, with a slider
    python generate.py --adapt --svg out.svg            the same as a picture that plays
    python generate.py --model inclusionAI/LLaDA2.1-mini --load-4bit --adapt --mode quality \\
        --prompt "..." --prompt "..."

--adapt runs the inner loop on the prompt first (section 4.5) and shows the answer without memory
beside it. A run is decoded with the settings that it was trained with; the flags of the inner loop
change them.
"""
from __future__ import annotations

if __name__ == "__main__":  # first of all: a Ctrl-C may come while torch is imported
    import console
    console.begin()

import os
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

from tqdm import tqdm

import memdlm
from backbones.block_diffusion import MODES
from console import printable, say
from data import collate
from pages import make_panel, write_animation, write_page
from runs import open_model
from settings import CHANGEABLE, Parser, add_flags, one_line

# ---- Answering ----------------------------------------------------------------------------------

class Answer(NamedTuple):
    """One decoded answer, and how it came about."""
    label: str
    text: str
    frames: Callable  # () -> a frame per step, and one for the start; see `make_frame`
    losses: list      # inner loss of each stage, empty without memory


def answer(s, data, model, samples, use_memory, seed, **options):
    """Decode samples as one batch, each with a phi of its own. Returns a list of Answers.

    use_memory: write each prompt into phi first. seed: decides masks and noise. options: the
    keyword arguments of the decoder.
    """
    batch, phi, losses = collate(samples, [seed] * len(samples), s.closed_book), None, []
    backbone = model.backbone
    if use_memory:
        phi, record = memdlm.adapt(backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
        losses = record["inner"].tolist()
        if record["skipped"]:
            print(f"warning: {int(record['skipped'])} inner steps were not finite and were left "
                  "out", file=sys.stderr)
    canvases = [batch.x0.masked_fill(batch.maskable, backbone.mask_id)]
    steps = backbone.decoder(backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds, phi,
                             **options)
    canvases += tqdm(steps, desc="denoising", unit="step", leave=False, delay=1, disable=None)
    label = "with memory of the prompt" if use_memory else "without memory"
    answers = []
    for number, length in enumerate(batch.valid.sum(1).tolist()):
        fill = batch.maskable[number, :length].tolist()
        ids = [canvas[number, :length].tolist() for canvas in canvases]
        answers.append(make_answer(data.tokenizer, label, ids, fill, losses))
    return answers


def make_answer(tokenizer, label, canvases, fill, losses):
    """The Answer of one sample.

    canvases: its token ids after each step, the start first. fill: which of them are decoded.
    """
    def frames():
        previous = canvases[:1] + canvases
        return [make_frame(tokenizer, now, before, fill) for now, before in zip(canvases, previous)]

    decoded = [token for token, gap in zip(canvases[-1], fill) if gap]
    return Answer(label, reply_text(tokenizer, decoded), frames, losses)


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

def respond(s, data, model, samples, arguments, truth=None, texts=None):
    """Answer samples, without memory and (with --adapt) with it, and show each to the user.

    texts: the prompts as the user wrote them. truth: the ids of the right answer, if it is known.
    """
    options = decoder_options(arguments, model)
    ways = [False, True] if arguments.adapt else [False]
    answers = [answer(s, data, model, samples, memory, arguments.seed, **options)
               for memory in ways]  # a list per way, in it one per sample
    texts = texts or [data.tokenizer.decode(sample.prompt) for sample in samples]
    for number, sample in enumerate(samples):
        own = [each[number] for each in answers]
        show(s, data, sample, texts[number].strip(), own, arguments, truth)


def show(s, data, sample, prompt, answers, arguments, truth):
    """Play, print and write to a page what was asked and what was answered."""
    joiner = " " if data.words else ""
    if arguments.show:
        play(answers, joiner, arguments.delay)
    book = " (the decoder does not see it)" if s.closed_book else ""
    short = prompt if len(prompt) < 400 else f"{prompt[:180]} [...] {prompt[-180:]}"
    say(f"prompt{book}: {short}")
    if not all(sample.answer):
        pieces = ["?" if gap else data.tokenizer.decode([token])
                  for token, gap in zip(sample.rest, sample.answer)]
        say(f"question: {joiner.join(piece for piece in pieces if piece)}")
    for each in answers:
        path = " > ".join(f"{loss:.2f}" for loss in each.losses)
        say(f"{each.label}: {each.text}" + (f"   [inner loss {path}]" if path else ""))
    note = ""
    if truth is not None:
        right = data.tokenizer.decode(cut_before(data.tokenizer.eos_id, truth))
        note = f"The right answer: {right}"
        say(note)
    if arguments.html:
        write_page(arguments.html, f"prompt{book}: {prompt}", answers, joiner, note)
        say(f"page written to {arguments.html}")
    if arguments.svg:
        panels = [make_panel(each.label, each.frames(), truth and right_pieces(data, sample, truth))
                  for each in answers]
        heading = "Written into fast weights" + (", then hidden" if s.closed_book else "")
        write_animation(arguments.svg, heading, prompt, panels)
        say(f"animation written to {arguments.svg}")


def right_pieces(data, sample, truth):
    """What stands at each token that the decoder sees: the right piece in a gap, else None."""
    pieces, rest = iter(data.tokenizer.pieces(truth)), []
    for gap in sample.answer:
        rest.append(next(pieces) if gap else None)
    return rest


# How a terminal shows the tokens of each state: dim, grey, black on yellow, bold.
TERMINAL_STYLES = {"given": "\033[2m", "masked": "\033[90m", "new": "\033[30;43m",
                   "done": "\033[1m"}
PLAIN = "\033[0m"


def play(answers, joiner, delay):
    """Print the denoising of answers step by step, each step over the one before.

    Where the output is not a terminal, or NO_COLOR is set, the steps are plain lines. Of a long
    canvas only the end is shown. delay: seconds per step.
    """
    live = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for each in answers:
        print(f"{each.label}:")
        height = 0  # lines of the terminal that the previous step takes
        for number, frame in enumerate(each.frames()):
            tail = frame[-60:] if joiner else frame[-160:]
            if height:
                print(f"\033[{height}F\033[J", end="")  # up by this many lines; clear from there
            print(f"  {number:3}  {format_frame(tail, joiner, live)}", flush=True)
            if live:
                width = len(format_frame(tail, joiner, styled=False))
                height = 1 + width // max(20, os.get_terminal_size().columns)
                time.sleep(delay)


def format_frame(frame, joiner, styled):
    """A frame as one line of text, styled by state or plain."""
    frame = [(printable(piece), state) for piece, state in frame]
    if not styled:
        return joiner.join(piece for piece, _ in frame)
    return joiner.join(f"{TERMINAL_STYLES[state]}{piece}{PLAIN}" for piece, state in frame)


def chat(s, data, model, arguments):
    """Answer prompts from the keyboard, a line each.

    With generated words, a line with a ? is a question about the last prompt.
    """
    asks = data.words and data.kind != "languages"
    if data.kind == "dictionary":
        print("type pairs to remember (fox ruby owl jade), then ask (owl ?); quit ends")
    elif asks:
        print("type a prompt, then a question with ? for each gap; quit ends")
    else:
        print("type a prompt; quit ends")
    prompt = None
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return print()
        if line in ("quit", "exit"):
            return
        if not line:
            continue
        if asks and "?" not in line.split():
            prompt = line
            continue
        if asks and prompt is None:
            print("first a prompt to remember, then the question")
            continue
        try:
            if asks:
                sample = data.ask(prompt, line)
            else:
                prompt = line
                sample = data.ask(prompt, length=arguments.length)
        except ValueError as error:
            say(f"error: {error}")
            continue
        respond(s, data, model, [sample], arguments, texts=[prompt])


# ---- The command line ---------------------------------------------------------------------------

MOST_STEPS = 1 << 20  # no model has a longer window
MOST_TOY_TOKENS = 1 << 13  # the toy has no window, but attention over more takes gigabytes


def parse_arguments():
    parser = Parser(["--adapt", "--prompt", "--question", "--file", "--chat", "--show", "--html",
                     "--length", "--run", "--model", "--load-4bit", "--seed"], description=__doc__)
    add = parser.add_argument
    add("--run", type=Path, help="run folder [default the latest]")
    add("--adapt", action="store_true", help="write the prompt into fast weights first")
    add("--prompt", action="append", help="the prompt; give several to decode them as one batch")
    add("--question", default="", help="visible to the decoder after the prompt; ? is a gap")
    add("--file", type=Path, help="read the prompt from a file")
    add("--chat", action="store_true", help="read prompts from the keyboard")
    add("--show", action="store_true", help="play the denoising in the terminal")
    add("--delay", type=float, default=0.15, help="seconds per step of --show [default 0.15]")
    add("--html", metavar="FILE", help="write the denoising as one self-contained page")
    add("--svg", metavar="FILE", help="write it as one picture that plays by itself")
    add("--length", type=int, default=0, help="tokens to generate [default as in training]")
    add("--steps", type=int, help="forward passes [default one per token]")
    add("--block-length", type=int,
        help="decode in blocks of this many tokens, left to right [one block]")
    add("--temperature", type=float, default=0.0,
        help="0 takes the most probable token [default 0]")
    add("--cfg-scale", type=float, default=0.0,
        help="classifier-free guidance, 0 for none [default 0]")
    add("--remasking", choices=["low_confidence", "random"], default="low_confidence",
        help="where to commit first [default low_confidence]")
    add("--seed", type=int, default=0,
        help="decides masks, noise and the built-in example [default 0]")
    block = parser.add_argument_group("LLaDA2.x", "decodes in blocks of 32; --steps is per block")
    block.add_argument("--mode", choices=list(MODES), help="plain: threshold 0.95, as in the "
                       "paper; speed and quality: LLaDA2.1 with token editing, 0.5 / 0.0 and "
                       "0.7 / 0.5 [default plain]")
    block.add_argument("--threshold", type=float, help="commit what is more probable than this")
    block.add_argument("--edit-threshold", type=float,
                       help="replace a token where another is more probable than this")
    real = parser.add_argument_group("real models without a run")
    real.add_argument("--model", help="a hub id or a folder, in place of --run")
    add_flags(parser, CHANGEABLE)
    return parser.parse_args()


def check_arguments(arguments):
    """ValueError if a number is too small."""
    for name in ("length", "delay", "temperature"):
        value = getattr(arguments, name)
        if value < 0:
            raise ValueError(f"--{name} is {value}; it must not be negative")
    for name in ("steps", "block_length"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= MOST_STEPS:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must lie between 1 and "
                             f"{MOST_STEPS}")


def decoder_options(arguments, model):
    """The keyword arguments of the model's decoder, from the flags.

    ValueError if a flag was given that only the other decoder has.
    """
    options = dict(steps=arguments.steps, temperature=arguments.temperature)
    denoise_only = dict(block_length=arguments.block_length, cfg_scale=arguments.cfg_scale,
                        remasking=arguments.remasking)
    if model.backbone.decoder is memdlm.denoise:
        options |= denoise_only
        wrong = [name for name in ("mode", "threshold", "edit_threshold")
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
        decoder = model.backbone.decoder.__name__.replace("_", " ")
        raise ValueError(f"--{wrong[0].replace('_', '-')} is not for this model, whose decoder "
                         f"is {decoder}")
    return options


def main():
    arguments = parse_arguments()
    with one_line():
        check_arguments(arguments)
        changes = {name: getattr(arguments, name) for name in CHANGEABLE
                   if hasattr(arguments, name)}
        s, data, model = open_model(arguments.run, arguments.model, changes)
        if s.model == "toy" and arguments.length > MOST_TOY_TOKENS:
            raise ValueError(f"--length is {arguments.length}; the toy generates up to "
                             f"{MOST_TOY_TOKENS} tokens")
        if arguments.chat:
            return chat(s, data, model, arguments)
        texts, truth = arguments.prompt, None
        if arguments.file:
            texts = [arguments.file.read_text(encoding="utf-8")]
        if texts is not None:
            samples = [data.ask(text, arguments.question, arguments.length) for text in texts]
        elif s.model != "toy":
            raise ValueError("no prompt: give --prompt, --file or --chat")
        else:  # a built-in example, from the middle column of the toy's table
            column = list(data.columns)[len(data.columns) // 2]
            sample = data.test(column, "example", arguments.seed)
            truth = [token for token, gap in zip(sample.rest, sample.answer) if gap]
            samples = [sample]
        respond(s, data, model, samples, arguments, truth, texts)


if __name__ == "__main__":
    main()
