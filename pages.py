"""A denoising to look at: a page with a slider, and a picture that plays by itself.

Both are one file that fetches nothing. The page steps through the canvas token by token. The
picture is an SVG for a README: every token of an answer has a box, which shows a mask until the
step that commits its token; then the token, green where it is right and red where it is wrong. The
panels, without memory and with it, play on one clock, again and again.
"""
from __future__ import annotations

import html
import json
import string
from typing import NamedTuple
from xml.sax.saxutils import escape

from console import printable
from files import write_text

# ---- As a page ----------------------------------------------------------------------------------

# $prompt, $note and $panels are filled in; a dollar sign of the page's own is written $$.
PAGE = string.Template("""\
<!doctype html><html lang="en"><meta charset="utf-8"><title>MemDLM denoising</title>
<style>
body{font:16px/1.7 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.2rem}h2{font-size:1rem;margin:1.5rem 0 .3rem}
.prompt,.panel{font-family:ui-monospace,monospace;white-space:pre-wrap;border:1px solid #ddd;
border-radius:6px;padding:.7rem}
.prompt{color:#555;background:#fafafa}
.given{color:#888}.masked{color:#bbb}.new{background:#f0c040}.done{color:#000}
input{width:70%;vertical-align:middle}button{font:inherit;margin-right:.6rem}
</style>
<h1>Denoising, step by step</h1>
<div class="prompt">$prompt</div>
<p><button id="play">play</button><input id="at" type="range" min="0" max="1000" value="0"
aria-label="time">
<span id="step"></span></p>
<div id="panels"></div>
<p>Grey ? is masked, yellow was revealed in this step, black is settled. $note</p>
<script>
const panels = $panels;
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
  timer = setInterval(() => {
    at.value = +at.value + 1000 / n; draw(); if (at.value >= 1000) clearInterval(timer);
  }, 300);
};
draw();
</script></html>
""")


def write_page(path, prompt, answers, joiner, note):
    """Write the denoising of answers as one page that needs nothing from elsewhere.

    Every text goes through html.escape, or through JSON and textContent, so none is read as HTML.
    """
    panels = [{"label": each.label, "frames": each.frames(), "joiner": joiner} for each in answers]
    script = json.dumps(panels).replace("<", "\\u003c")  # no text can close the script element
    page = PAGE.substitute(prompt=html.escape(printable(prompt)), note=html.escape(note),
                           panels=script)
    write_text(path, page)


# ---- As a picture that plays --------------------------------------------------------------------

WIDTH, LINE, CHARACTER = 860, 26, 8.4  # pixels: of the picture, of a line, of a letter
STEP, PAUSE = 1.2, 4.0                 # seconds: of a step, and before it plays again
INK, GREY, PAPER, EDGE = "#222222", "#8a8a8a", "#ffffff", "#d8d8d8"
RIGHT, WRONG, MASK = "#00694e", "#a33b00", "#ececec"


class Panel(NamedTuple):
    """One way to decode the same question."""
    title: str
    pieces: list  # (text, step that commits it or 0 if it was given, whether right or None)


def make_panel(title, frames, truth):
    """A Panel from the frames of a decoding.

    frames: per step a list of (piece, state), as `generate.make_frame` makes them. truth: the right
    piece of each token after the prompt, None where nothing was asked; or None if nobody knows.
    """
    pieces, before = [], len(frames[-1]) - len(truth or frames[-1])  # the prompt of an open book
    for position, (piece, state) in enumerate(frames[-1]):
        if position < before or piece == "<sep>":
            continue
        step = sum(frame[position][1] == "masked" for frame in frames)
        right = truth[position - before] == piece if truth else None
        pieces.append((piece, step, right))
    return Panel(title, pieces)


def write_animation(path, heading, prompt, panels):
    """Write the panels as one self-contained SVG. Nothing in it is fetched or executed."""
    steps = max(step for panel in panels for _, step, _ in panel.pieces)
    seconds = (steps + 1) * STEP + PAUSE
    body, y = [text(24, 34, heading, INK, bold=True)], 62
    for line in wrap(prompt, WIDTH - 48):
        body.append(text(24, y, line, GREY))
        y += LINE
    for panel in panels:
        y += 12
        body.append(text(24, y + 16, panel.title, INK, bold=True))
        y += LINE + 4
        part, y = draw_pieces(panel.pieces, y, seconds)
        body += part
        y += LINE
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    svg = "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="ui-monospace, Menlo, '
        f'Consolas, monospace" font-size="14" role="img"><title>{escape(heading)}</title>',
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{y - 2}" rx="8" fill="{PAPER}" '
        f'stroke="{EDGE}"/>', *body, "</svg>\n"])
    write_text(path, svg)


def draw_pieces(pieces, y, seconds):
    """The tokens of a panel as boxes, line by line -> their elements, and the y below them."""
    out, x = [], 24
    for piece, step, right in pieces:
        width = round(max(3, len(piece) + 2) * CHARACTER)
        if x + width > WIDTH - 24:
            x, y = 24, y + LINE + 10
        if step == 0:
            out.append(text(x + CHARACTER, y + 19, piece, INK))
        else:
            color, sign = {True: (RIGHT, " ✓"), False: (WRONG, " ✗"), None: (INK, "")}[right]
            width += round(len(sign) * CHARACTER)
            box = f'<rect x="{x}" y="{y}" width="{width}" height="28" rx="5" fill='
            out += [f'{box}"{MASK}"/>', text(x + width / 2 - 4, y + 19, "?", GREY),
                    f'<g>{appear(step * STEP / seconds, seconds)}{box}"{color}"/>'
                    f'{text(x + CHARACTER, y + 19, piece + sign, PAPER)}</g>']
        x += width + 8
    return out, y + LINE


def appear(share, seconds):
    """Hidden until this share of the clock has passed, then shown."""
    return (f'<animate attributeName="opacity" values="0;1;1" keyTimes="0;{share:.4f};1" '
            f'calcMode="discrete" dur="{seconds:g}s" repeatCount="indefinite"/>')


def text(x, y, words, color, bold=False):
    weight = ' font-weight="700"' if bold else ""
    words = escape(printable(words))  # XML has no control characters
    return f'<text x="{x:g}" y="{y:g}" fill="{color}"{weight}>{words}</text>'


def wrap(words, width):
    """A text in lines that fit into `width` pixels."""
    lines = [""]
    for word in words.split():
        if lines[-1] and (len(lines[-1]) + 1 + len(word)) * CHARACTER > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
