"""Answer a prompt with a trained run: diffusion decoding, with or without memory of the prompt.

    python generate.py --adapt                          the latest run on a built-in example
    python generate.py --adapt --prompt "fox ruby owl jade" --question "owl ? fox ?"
    python generate.py --adapt --file notes.txt --show  play the denoising in the terminal
    python generate.py --adapt --chat                   one prompt after the other
    python generate.py --adapt --html out.html          both ways on one page, with a slider
    python generate.py --model inclusionAI/LLaDA2.1-mini --load-4bit --adapt --mode quality --prompt "..." --prompt "..."

--adapt runs the inner loop on the prompt first (section 4.5) and shows the answer without memory beside it.
The settings are those the run was trained with; the flags of the inner loop change them.
"""
from __future__ import annotations

import html
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm


import memdlm
from backbones.block_diffusion import MODES
from data import collate
from files import write_whole
from runs import open_model
from settings import Parser, add_flags, names_of, one_line


class Answer(NamedTuple):
    label: str
    text: str
    frames: callable  # () -> per decoding step a list of (piece of text, state); states: given, masked, new, done
    losses: list  # inner loss at each step of the inner loop, empty without memory


def answer(s, data, model, samples, use_memory, options):
    """Decode samples together, each with its own phi -> [Answer]. options: keywords of the decoder, and `seed`."""
    options = dict(options)
    seed = options.pop("seed")
    batch, phi, losses = collate(samples, [seed] * len(samples), s.closed_book), None, []
    if use_memory:
        phi, record = memdlm.adapt(model.backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
        losses = record["inner"].tolist()
        if record["skipped"]:
            print(f"warning: {int(record['skipped'])} inner steps were not finite and were left out", file=sys.stderr)
    canvases = [batch.x0.masked_fill(batch.maskable, model.backbone.mask_id)]
    steps = model.backbone.decoder(model.backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds, phi, **options)
    for x in tqdm(steps, desc="denoising", unit="step", leave=False, delay=1):
        canvases.append(x)
    label = "with memory of the prompt" if use_memory else "without memory"
    return [one_answer(data, label, [c[row].tolist()[:len(v)] for c in canvases], v, losses)
            for row, v in enumerate(m[:int(n)].tolist() for m, n in zip(batch.maskable, batch.valid.sum(1)))]


def one_answer(data, label, canvases, fill, losses):
    def frames():
        return [frame(data.tokenizer, now, before, fill) for now, before in zip(canvases, canvases[:1] + canvases)]

    text = reply_text(data.tokenizer, [t for t, gap in zip(canvases[-1], fill) if gap])
    return Answer(label, text, frames, losses)


def reply_text(tokenizer, ids):
    """The text of decoded tokens, up to the first that ends a reply."""
    for stop in getattr(tokenizer, "stop_ids", [tokenizer.eos_id]):
        ids = until_eos(ids, stop)
    return tokenizer.decode(ids)


def until_eos(ids, eos_id):
    return ids[:ids.index(eos_id)] if eos_id in ids else ids


def frame(tokenizer, now, before, fill):
    """One canvas as (piece, state) pairs; `new` is what this step has revealed."""
    mask = tokenizer.mask_id
    states = ["given" if not gap else "masked" if a == mask else "new" if b == mask else "done"
              for a, b, gap in zip(now, before, fill)]
    return [("?" if state == "masked" else piece, state) for piece, state in zip(tokenizer.pieces(now), states)]


COLORS = {"given": "\033[2m", "masked": "\033[90m", "new": "\033[30;43m", "done": "\033[1m"}


def line_of(frame, joiner, colored):
    """A frame as one line: masks grey, what was just revealed marked, the rest settled."""
    return joiner.join(f"{COLORS[state]}{piece}\033[0m" if colored else piece for piece, state in frame)


def play(answers, joiner, delay):
    """Reprint the canvas in place, step by step. Plain lines where the output is not a terminal, or NO_COLOR is set."""
    live = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for a in answers:
        print(f"{a.label}:")
        for number, one in enumerate(a.frames()):
            tail = one[-60:] if joiner else one[-160:]
            text = f"  {number:3}  {line_of(tail, joiner, live)}"
            if live and number:
                print(f"\033[{rows}F\033[J", end="")
            print(text, flush=True)
            rows = 1 + sum(len(piece) + len(joiner) for piece, _ in tail) // max(20, os.get_terminal_size().columns) \
                if live else 1
            if live:
                time.sleep(delay)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>MemDLM denoising</title>
<style>
body{font:16px/1.7 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.2rem}h2{font-size:1rem;margin:1.5rem 0 .3rem}
.prompt,.panel{font-family:ui-monospace,monospace;white-space:pre-wrap;border:1px solid #ddd;border-radius:6px;padding:.7rem}
.prompt{color:#555;background:#fafafa}.given{color:#888}.masked{color:#bbb}.new{background:#f0c040}.done{color:#000}
input{width:70%;vertical-align:middle}button{font:inherit;margin-right:.6rem}
</style>
<h1>Denoising, step by step</h1>
<div class="prompt">PROMPT</div>
<p><button id="play">play</button><input id="at" type="range" min="0" max="1000" value="0" aria-label="time">
<span id="step"></span></p>
<div id="panels"></div>
<p>Grey ? is masked, yellow was revealed in this step, black is settled. NOTE</p>
<script>
const panels = DATA;
const at = document.getElementById("at"), box = document.getElementById("panels");
const views = panels.map(p => {
  const h = document.createElement("h2"), d = document.createElement("div");
  h.textContent = p.label; d.className = "panel"; box.append(h, d); return d;
});
function draw() {                       // one timeline for all panels, however many steps each has
  panels.forEach((p, i) => {
    const n = p.frames.length - 1, k = Math.round(at.value / 1000 * n);
    views[i].replaceChildren(...p.frames[k].map(([piece, state]) => {
      const s = document.createElement("span"), all = document.createElement("span");
      s.className = state; s.textContent = piece; all.append(s, p.joiner); return all; }));
    document.getElementById("step").textContent = "step " + k + " of " + n;
  });
}
let timer = null;
at.oninput = draw;
document.getElementById("play").onclick = () => {
  clearInterval(timer); if (at.value >= 1000) at.value = 0;
  const n = Math.max(...panels.map(p => p.frames.length - 1), 1);
  timer = setInterval(() => { at.value = +at.value + 1000 / n; draw(); if (at.value >= 1000) clearInterval(timer); }, 300);
};
draw();
</script></html>
"""


def write_page(path, prompt, answers, joiner, note):
    """One self-contained page: every token goes through JSON and textContent, or html.escape; nothing is fetched."""
    panels = [{"label": a.label, "frames": a.frames(), "joiner": joiner} for a in answers]
    script = json.dumps(panels).replace("<", "\\u003c")  # no text can close the script element
    parts = {"PROMPT": html.escape(prompt), "NOTE": html.escape(note), "DATA": script}
    head, _, rest = PAGE.partition("PROMPT")
    middle, _, rest = rest.partition("NOTE")
    script_head, _, tail = rest.partition("DATA")
    page = head + parts["PROMPT"] + middle + parts["NOTE"] + script_head + parts["DATA"] + tail
    write_whole(Path(path), lambda aside: aside.write_text(page, encoding="utf-8"))


def decoding(arguments, model):
    """The decoder's keywords from the flags. A flag that this model's decoder does not have is refused."""
    both = dict(steps=arguments.steps, temperature=arguments.temperature, seed=arguments.seed)
    if model.backbone.decoder is memdlm.denoise:
        wrong = [name for name in ("mode", "threshold", "edit_threshold") if getattr(arguments, name) is not None]
        other = dict(block_length=arguments.block_length, cfg_scale=arguments.cfg_scale, remasking=arguments.remasking)
    else:
        wrong = [name for name, usual in (("block_length", None), ("cfg_scale", 0.0), ("remasking", "low_confidence"))
                 if getattr(arguments, name) != usual]
        threshold, edit = MODES[arguments.mode or "plain"]
        other = dict(threshold=threshold if arguments.threshold is None else arguments.threshold,
                     edit_threshold=edit if arguments.edit_threshold is None else arguments.edit_threshold)
    if wrong:
        raise ValueError(f"--{wrong[0].replace('_', '-')} is not for this model, whose decoder is "
                         f"{model.backbone.decoder.__name__.replace('_', ' ')}")
    return both | other


def respond(s, data, model, samples, arguments, truth=None, texts=None):
    """Decode, without memory and (with --adapt) with it, and print, play or write the results."""
    options = decoding(arguments, model)
    both = [answer(s, data, model, samples, memory, options) for memory in ([False, True] if arguments.adapt else [False])]
    texts = texts or [data.tokenizer.decode(sample.prompt) for sample in samples]
    for sample, prompt, *answers in zip(samples, texts, *both):
        show(s, data, sample, prompt.strip(), answers, arguments, truth)


def show(s, data, sample, prompt, answers, arguments, truth):
    joiner = " " if data.words else ""
    if arguments.show:
        play(answers, joiner, arguments.delay)
    book = " (the decoder does not see it)" if s.closed_book else ""
    print(f"prompt{book}: {prompt if len(prompt) < 400 else prompt[:180] + ' [...] ' + prompt[-180:]}")
    if not all(sample.answer):
        shown = ["?" if gap else data.tokenizer.decode([token]) for token, gap in zip(sample.rest, sample.answer)]
        print(f"question: {joiner.join(piece for piece in shown if piece)}")
    for a in answers:
        losses = f"   [inner loss {' > '.join(f'{x:.2f}' for x in a.losses)}]" if a.losses else ""
        print(f"{a.label}: {a.text}{losses}")
    note = ""
    if truth is not None:
        note = f"The right answer: {data.tokenizer.decode(until_eos(truth, data.tokenizer.eos_id))}"
        print(note)
    if arguments.html:
        write_page(arguments.html, f"prompt{book}: {prompt}", answers, joiner, note)
        print(f"page written to {arguments.html}")


def chat(s, data, model, arguments):
    """A prompt a line. Generated words: a line with a ? is a question about the last prompt."""
    asks = data.words and data.kind != "languages"
    print("type pairs to remember (fox ruby owl jade), then ask (owl ?); quit ends" if data.kind == "dictionary"
          else "type a prompt" + (", then a question with ? for each gap" if asks else "") + "; quit ends")
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
            sample = data.ask(prompt, line) if asks else data.ask(line, length=arguments.length)
        except ValueError as error:
            print(f"error: {error}")
            continue
        respond(s, data, model, [sample], arguments, texts=[prompt if asks else line])


def parse():
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, help="run folder [default the latest]")
    parser.add_argument("--adapt", action="store_true", help="write the prompt into fast weights first")
    parser.add_argument("--prompt", action="append", help="the prompt; give several to decode them as one batch")
    parser.add_argument("--question", default="", help="visible to the decoder after the prompt; ? is a gap")
    parser.add_argument("--file", type=Path, help="read the prompt from a file")
    parser.add_argument("--chat", action="store_true", help="read prompts from the keyboard")
    parser.add_argument("--show", action="store_true", help="play the denoising in the terminal")
    parser.add_argument("--delay", type=float, default=0.15, help="seconds per step of --show [default 0.15]")
    parser.add_argument("--html", metavar="FILE", help="write the denoising as one self-contained page")
    parser.add_argument("--length", type=int, default=0, help="tokens to generate [default as in training]")
    parser.add_argument("--steps", type=int, help="forward passes [default one per token]")
    parser.add_argument("--block-length", type=int, help="decode in blocks of this many tokens, left to right [one block]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token [default 0]")
    parser.add_argument("--cfg-scale", type=float, default=0.0, help="classifier-free guidance, 0 for none [default 0]")
    parser.add_argument("--remasking", choices=["low_confidence", "random"], default="low_confidence",
                        help="where to commit first [default low_confidence]")
    parser.add_argument("--seed", type=int, default=0, help="decides masks, noise and the built-in example [default 0]")
    block = parser.add_argument_group("LLaDA2.x", "decodes in blocks of 32; --steps is per block")
    block.add_argument("--mode", choices=list(MODES), help="plain: threshold 0.95, as in the paper; speed and quality: LLaDA2.1 "
                       "with token editing, 0.5 / 0.0 and 0.7 / 0.5 [default plain]")
    block.add_argument("--threshold", type=float, help="commit what is more probable than this")
    block.add_argument("--edit-threshold", type=float, help="replace a token where another is more probable than this")
    full = parser.add_argument_group("full models without a run")
    full.add_argument("--model", help="a hub id or a folder, in place of --run")
    add_flags(parser, names_of("inner loop", "loading") + ["closed_book"])
    return parser.parse_args()


def main():
    arguments = parse()
    with one_line():
        for name in ("length", "delay", "temperature"):
            if getattr(arguments, name) < 0:
                raise ValueError(f"--{name} is {getattr(arguments, name)}; it must not be negative")
        for name in ("steps", "block_length"):
            if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")
        changes = {name: getattr(arguments, name) for name in names_of("inner loop", "loading") + ["closed_book"] if hasattr(arguments, name)}
        s, data, model = open_model(arguments.run, arguments.model, changes)
        if arguments.chat:
            return chat(s, data, model, arguments)
        texts, truth = arguments.prompt, None
        if arguments.file:
            texts = [arguments.file.read_text(encoding="utf-8")]
        if texts is None and s.model != "toy":
            raise ValueError("no prompt: give --prompt, --file or --chat")
        if texts is None:
            column = list(data.columns)[len(data.columns) // 2]
            samples = [data.test(column, "example", arguments.seed)]
            truth = [t for t, gap in zip(samples[0].rest, samples[0].answer) if gap]
        else:
            samples = [data.ask(text, arguments.question, arguments.length) for text in texts]
        respond(s, data, model, samples, arguments, truth, texts)


if __name__ == "__main__":
    main()
