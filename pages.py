"""Pages and a picture to look at: a denoising that plays, and what phi holds.

Each is one file that fetches nothing. A denoising has a panel for each way to answer. A panel has a
box for every token of the answer; it shows a mask until the step that commits its token. Then it
shows the token: green with ✓ where it is right, red with ✗ where it is wrong. `draw_panel` draws
it, for the page with its slider as for the picture of the README, which plays again and again.

    Denoising   heading, sentence, prompt, [Panel]     what was asked, and the ways to answer
    Panel       title, [Piece]                         one way to answer
    Piece       [(step, text)], right or wrong         one token, and what stood there from when

The second page, `write_inspection`, shows what memory.py has measured.
"""
from __future__ import annotations

import html
import string
from statistics import fmean
from typing import NamedTuple
from xml.sax.saxutils import escape

from colors import EDGE, GREY, INK, MASK, NEW, PAPER, RIGHT, WRONG, color_of
from console import printable, width_of
from files import write_text

END = "∎"  # stands for the token that ends a reply


class Piece(NamedTuple):
    """One token of an answer, or one that stands between them."""
    history: list          # [(step from which it stands there, text)]; given ones have step 0
    right: bool | None     # of the last text; None where nobody knows
    given: bool = False


class Panel(NamedTuple):
    """One way to answer."""
    title: str
    pieces: list
    words: bool            # a token is a word, so it stands apart

    @property
    def steps(self):
        return max((step for piece in self.pieces for step, _ in piece.history), default=0)

    @property
    def heading(self):
        """The title, with how many tokens are right where that is known."""
        known = [piece.right for piece in self.pieces if piece.right is not None]
        return f"{self.title}: {sum(known)} of {len(known)} right" if known else self.title

    @property
    def text(self):
        return (" " if self.words else "").join(piece.history[-1][1] for piece in self.pieces)


class Denoising(NamedTuple):
    """A question and its answers."""
    heading: str
    about: str             # a sentence on what memory is
    prompt_label: str
    prompt: list           # [(text, whether it is asked for)]: the pairs, or one long text
    panels: list
    notes: list


def make_panel(title, frames, right, words, stops=()):
    """A Panel from the frames of a decoding.

    frames: per step a list of (piece, state), as `generate.make_frame` makes them. right: the right
    piece of each token after the prompt, None where nobody knows. stops: the pieces that end a
    reply; what is behind the first of them is left out.
    """
    pieces, before = [], len(frames[-1]) - len(right)  # the prompt of an open book
    is_reply = all(state != "given" for _, state in frames[-1][before:])
    for position in range(max(0, before), len(frames[-1])):
        history = []
        for step, frame in enumerate(frames):
            piece, state = frame[position]
            if state != "masked" and (not history or history[-1][1] != piece):
                history.append((step, piece))
        if not history or history[-1][1] == "<sep>":
            continue
        last = history[-1][1]
        ends = is_reply and last in stops
        want = right[position - before]
        pieces.append(Piece([(step, END if text in stops else text) for step, text in history],
                            want if want is None else want == last,
                            frames[-1][position][1] == "given"))
        if ends:
            break
    return Panel(title, pieces, words)


# ---- Drawing ------------------------------------------------------------------------------------

CHARACTER = 8.4  # pixels of a letter
STYLE = f"""text{{font:14px ui-monospace,Menlo,Consolas,monospace;fill:{INK};white-space:pre}}
.mask rect{{fill:{MASK}}}.mask text,.dim{{fill:{GREY}}}.token rect{{fill:{PAPER}}}
.right rect{{fill:{RIGHT}}}.wrong rect{{fill:{WRONG}}}.right text,.wrong text{{fill:{PAPER}}}
.wrong .under{{fill:{WRONG};font-size:11px}}.title{{font-weight:700}}"""


def draw_panel(panel, left, top, width):
    """The tokens of a panel, line by line -> their SVG elements, and the y below them.

    Words stand apart in boxes. Other tokens follow each other as in a text, on a grid of letters.
    A token that is not given has a group for its mask, and one for each text that stood there, with
    the step from which it stands there in data-from.
    """
    out, x, y = [], left, top
    gap, line = (8, 36) if panel.words else (0, 28)
    if not panel.words and any(piece.right is False for piece in panel.pieces):
        line = 42  # room for a sign below
    sizes = [piece_size(piece, panel.words, width) for piece in panel.pieces]
    for i, piece in enumerate(panel.pieces):
        texts, size = piece_texts(piece, panel.words), sizes[i]
        # A word that is given stays on one line with the answer behind it.
        pair = piece.given and panel.words and sizes[i + 1:i + 2]
        if x > left and x + size + (gap + pair[0] if pair else 0) > left + width:
            x, y = left, y + line
        out += draw_piece(piece, texts, x, y, size, panel.words)
        x += size + gap
        if not panel.words and texts[-1].endswith("⏎"):
            x, y = left, y + line
    return out, y + line


def piece_texts(piece, words):
    """What is shown of a token from each of its steps; words have the sign of right or wrong."""
    texts = [one_line(text) for _, text in piece.history]
    if words and piece.right is not None:
        texts[-1] += " ✓" if piece.right else " ✗"
    return texts


def piece_size(piece, words, width):
    """How wide the box of a token is, in pixels."""
    texts = piece_texts(piece, words)
    columns = max(map(width_of, texts if words else texts[-1:]))  # a text has no holes at the end
    if words and not piece.given:
        columns = max(3, columns + 2)
    return min(columns, int(width / CHARACTER)) * CHARACTER


def draw_piece(piece, texts, x, y, size, apart):
    """The elements of one token in a box of `size` pixels."""
    indent, height = (CHARACTER, 28) if apart else (0, 24)
    indent *= not piece.given
    most = int((size - 2 * indent) / CHARACTER + 0.01)
    texts = [text if width_of(text) <= most else text[:most - 1] + "…" for text in texts]
    if piece.given:
        return [draw_text(x + indent, y + height - 9, texts[0], "dim" * (not apart))]
    shape = 'rx="5"' if apart else 'shape-rendering="crispEdges"'
    box = f'<rect x="{x:.1f}" y="{y}" width="{size:.1f}" height="{height}" {shape}/>'
    out = [f'<g class="mask">{box}'
           f'{draw_text(x + size / 2 - CHARACTER / 2, y + height - 9, "?")}</g>']
    for (step, _), text in zip(piece.history, texts):
        kind, sign = "", ""
        if (step, text) == (piece.history[-1][0], texts[-1]) and piece.right is not None:
            kind = " right" if piece.right else " wrong"
            if not piece.right and not apart:
                sign = draw_text(x + size / 2 - 4, y + height + 11, "✗", "under")
        out.append(f'<g class="token{kind}" data-from="{step}">{box}'
                   f'{draw_text(x + indent, y + height - 9, text)}{sign}</g>')
    return out


def draw_text(x, y, words, kind=""):
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.0f}"{kind}>{escape(printable(words))}</text>'


def one_line(text):
    """A token as it is shown on a line of its own: control characters have a sign."""
    return printable(text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")) or " "


def wrap(parts, width):
    """Parts (text, asked) as lines of parts that fit into `width` pixels. Long ones are split."""
    units = [(unit, asked) for text, asked in parts
             for unit in ([text] if len(parts) > 1 else text.split())]
    gap, lines, used = (3 if len(parts) > 1 else 1), [[]], 0
    for text, asked in units:
        size = width_of(text) + gap
        if lines[-1] and (used + size - gap) * CHARACTER > width:
            lines.append([])
            used = 0
        lines[-1].append((text, asked, used * CHARACTER))
        used += size
    return lines


# ---- As a picture that plays --------------------------------------------------------------------

WIDTH, LINE = 860, 26    # pixels: of the picture, of a line of the prompt
STEP, PAUSE = 1.2, 4.0   # seconds: of a step, and before it plays again
MOST_LINES = 8           # of the prompt


def write_animation(path, denoising):
    """Write a denoising as one SVG that plays by itself. Nothing in it is fetched or executed.

    Where the reader's system asks for less motion it shows the end.
    """
    steps = max([1, *(panel.steps for panel in denoising.panels)])
    seconds = (steps + 1) * STEP + PAUSE
    body, y = [draw_text(24, 34, denoising.heading, "title")], 62
    lines = wrap(denoising.prompt, WIDTH - 48)
    for line in lines[:MOST_LINES]:
        body += [draw_text(24 + x, y, text, "" if asked else "dim") for text, asked, x in line]
        y += LINE
    if len(lines) > MOST_LINES:
        body.append(draw_text(24, y, "...", "dim"))
        y += LINE
    for panel in denoising.panels:
        y += 12
        body += [f'<rect x="24" y="{y + 4}" width="12" height="12" rx="2" '
                 f'fill="{color_of(family(panel.title))}"/>',
                 draw_text(44, y + 16, panel.heading, "title")]
        part, y = draw_panel(panel, 24, y + LINE + 4, WIDTH - 48)
        body += part
    y += 12
    plays = [f'.token[data-from="{step}"]{{animation:from{step} {seconds:g}s step-end infinite}}'
             f"@keyframes from{step}{{0%{{opacity:0}}{100 * step * STEP / seconds:.2f}%"
             "{opacity:1}100%{opacity:1}}" for step in range(1, steps + 1)]
    style = "\n".join([STYLE, *plays,
                       "@media (prefers-reduced-motion:reduce){.token{animation:none!important}}"])
    svg = "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" '
        f'viewBox="0 0 {WIDTH} {y}" role="img"><title>{escape(denoising.heading)}</title>',
        f"<style>{style}</style>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{y - 2}" rx="8" fill="{PAPER}" '
        f'stroke="{EDGE}"/>', *body, "</svg>\n"])
    write_text(path, svg)


def family(title):
    """The name of a way without the number of its sample: "with memory of the prompt, 2"."""
    return title.partition(",")[0]


# ---- As a page ----------------------------------------------------------------------------------

BASE = f"""*{{box-sizing:border-box}}
body{{font:16px/1.6 system-ui,sans-serif;max-width:76rem;margin:1.5rem auto;padding:0 1rem;
color:{INK};background:{PAPER}}}
h1{{font-size:1.3rem;margin:0 0 .3rem}}h2{{font-size:1rem;margin:1.4rem 0 .4rem}}
h3{{font-size:.95rem;margin:0 0 .5rem}}p{{margin:.4rem 0;max-width:62rem}}
.swatch{{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.5em}}
.box,.panel{{border:1px solid {EDGE};border-radius:8px;padding:.8rem}}
.box{{max-height:15rem;overflow:auto;font-family:ui-monospace,Menlo,Consolas,monospace;
font-size:14px;overflow-wrap:anywhere}}
.text{{white-space:pre-wrap;color:#555}}.dim{{color:{GREY}}}
.pair{{display:inline-block;border:1px solid {EDGE};border-radius:5px;padding:0 .5em;
margin:.15rem .3rem .15rem 0;color:#555}}
.asked{{border-color:{INK};color:{INK};font-weight:600}}
button:focus-visible,input:focus-visible,.box:focus-visible{{outline:3px solid #0072b2}}"""

# $title, $style, $body and $steps are filled in.
PAGE = string.Template("""\
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
$style
.panels{display:grid;gap:1rem}.panel{min-width:0}svg{max-width:100%;height:auto;display:block}
.narrow{display:none}.later{visibility:hidden}
.new rect{stroke:$new;stroke-width:3}.new:not(.right):not(.wrong) rect{fill:$new}
.controls{position:sticky;top:0;background:#fff;padding:.5rem 0;display:flex;flex-wrap:wrap;
gap:.5rem;align-items:center;z-index:1}
.controls input{flex:1;min-width:3rem}button{font:inherit;padding:.15rem .7rem;min-width:2.6rem}
@media(min-width:64rem){.two{grid-template-columns:1fr 1fr}}
@media(max-width:40rem){.wide{display:none}.narrow{display:block}}
</style></head><body>
<div class="controls"><button id="play">play</button><button id="back" aria-label="one step back"
>&#9664;</button><button id="on" aria-label="one step on">&#9654;</button><input id="at"
type="range" min="0" max="$steps" value="$steps" aria-label="step"><span id="step"></span></div>
$body
<p class="dim">Arrow keys go step by step, space plays and pauses.</p>
<script>
const steps = $steps, find = id => document.getElementById(id);
const tokens = [...document.querySelectorAll("[data-from]")];
let now = steps, timer = null;
function show(step) {
  now = Math.max(0, Math.min(steps, step));
  for (const token of tokens) {
    const from = +token.dataset.from;
    token.classList.toggle("later", from > now);
    token.classList.toggle("new", from === now && now > 0);
  }
  find("at").value = now;
  find("step").textContent = "step " + now + " of " + steps;
}
function pause() {
  clearInterval(timer); timer = null; find("play").textContent = "play";
}
function play() {                      // a short answer slowly, a long one within half a minute
  const stride = Math.ceil(steps / 200);
  if (now >= steps) show(0);
  find("play").textContent = "pause";
  timer = setInterval(() => {
    show(now + stride); if (now >= steps) pause();
  }, Math.max(120, Math.min(1000, 10000 / steps)));
}
const turn = () => timer === null ? play() : pause();
const go = step => { pause(); show(step); };
find("play").onclick = turn;
find("back").onclick = () => go(now - 1);
find("on").onclick = () => go(now + 1);
find("at").oninput = () => go(+find("at").value);
document.onkeydown = event => {
  const moves = {ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: steps};
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key in moves) go(moves[event.key]);
  else if (event.key === " " && event.target.tagName !== "BUTTON") turn();
  else return;
  event.preventDefault();
};
const wanted = location.hash.match(/^#(\\d+)$$/);  // page.html#3 opens at step 3
if (wanted) show(+wanted[1]);
else if (matchMedia("(prefers-reduced-motion: reduce)").matches) show(steps);
else { show(0); play(); }
</script></body></html>
""")

WIDE, NARROW = 536, 322  # pixels of a panel: beside the other, and on a phone


def write_page(path, denoisings):
    """Write questions and answers as one page, which plays by itself once.

    Without scripts it shows the end. Every text goes through `html.escape`, so none is read as
    HTML. It plays on one clock, however many steps each answer has.
    """
    steps = max([1, *(panel.steps for each in denoisings for panel in each.panels)])
    body = "\n".join(format_question(each) for each in denoisings)
    page = PAGE.substitute(title=escape(denoisings[0].heading), style=f"{BASE}\n{STYLE}", new=NEW,
                           body=body, steps=steps)
    write_text(path, page)


def format_question(denoising):
    """A question as HTML: the prompt, the answers beside each other, and what can be said."""
    panels = denoising.panels
    about = "".join(f"<p>{quote(text)}</p>" for text in [denoising.about, legend(panels)])
    notes = "".join(f"<p>{quote(note)}</p>" for note in denoising.notes)
    two = " two" if len(panels) > 1 else ""
    return (f"<h1>{quote(denoising.heading)}</h1>{about}"
            f"<h2>{quote(denoising.prompt_label)}</h2>{format_prompt(denoising.prompt)}"
            f'<h2>The answer</h2><div class="panels{two}">'
            f"{''.join(map(format_panel, panels))}</div>{notes}")


def legend(panels):
    """What the colours and signs of these panels mean."""
    pieces = [piece for panel in panels for piece in panel.pieces]
    known = {piece.right for piece in pieces} - {None}
    ends = any(text == END for piece in pieces for _, text in piece.history)
    return ("? is still masked, yellow is new in this step."
            + " ✓ on green is right, ✗ on red is wrong." * bool(known)
            + f" {END} ends the reply." * ends)


def format_prompt(parts):
    """The prompt as HTML: its pairs, those that are asked for in bold, or its text."""
    if len(parts) > 1:
        inner = "".join(f'<span class="pair{" asked" * asked}">{quote(text)}</span>'
                        for text, asked in parts)
        return f'<div class="box" tabindex="0">{inner}</div>'
    return f'<div class="box text" tabindex="0">{quote(parts[0][0])}</div>'


def format_panel(panel):
    """A panel as HTML: its drawing for a wide and for a narrow window."""
    drawings = ""
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        elements, height = draw_panel(panel, 0, 0, width)
        drawings += (f'<svg class="{kind}" width="{width}" height="{height}" role="img" '
                     f'viewBox="0 0 {width} {height}" aria-label="{quote(panel.text)}">'
                     f"{''.join(elements)}</svg>")
    return f'<div class="panel">{format_title(panel.title, panel.heading)}{drawings}</div>'


def format_title(name, text):
    """A heading with the colour of its name."""
    return (f'<h3><span class="swatch" style="background:{color_of(family(name))}"></span>'
            f"{quote(text)}</h3>")


def quote(text):
    """A text that is nothing but text in HTML, and steers nothing."""
    return html.escape(printable(text))


# ---- As a page on what phi holds ----------------------------------------------------------------

class Part(NamedTuple):
    """One token of two answers to the same question."""
    without: str
    with_memory: str
    right: str | None     # what should stand there, None where nobody knows
    given: bool


class Report(NamedTuple):
    """What the phi of one prompt holds, as memory.inspect_memory measures it."""
    about: str
    prompt_label: str
    prompt: list          # as in Denoising
    norms: dict           # {name of a matrix: norm, or a list with the norm of each expert}
    losses_without: dict  # {name: mean loss of the prompt without this part of phi}
    tokens: list          # [(text, loss before, loss after, how often it had a loss)]
    answers: list         # for each sample a list of Part
    words: bool


BEFORE, AFTER = color_of("without memory"), color_of("with memory of the prompt")

INSPECTION = string.Template("""\
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>What phi holds</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
$style
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
th,td{padding:.3rem .5rem;text-align:right;border:2px solid #fff;white-space:nowrap}
td b{display:block;font-size:14px}.yes{color:#00694e}.no{color:#a33b00}
.experts{display:flex;flex-wrap:wrap;gap:2px;margin:.2rem 0 .8rem}
.experts i{width:14px;height:14px;border:1px solid #d8d8d8}
.tokens{display:flex;flex-wrap:wrap;gap:4px;align-items:stretch}
.tokens div{border:1px solid #d8d8d8;border-radius:4px;padding:1px 5px;font-size:12px;
min-width:4.6rem;max-width:100%}
.tokens b{display:block;font-size:13px;white-space:pre-wrap;min-height:1.4em;
font-weight:400;overflow-wrap:anywhere}
.tokens u{display:block;height:5px;margin:1px 0}.tokens .given{border-color:#fff;min-width:0}
.tokens .differs{border:2px solid #222;background:#fff7de}
.box{font-size:12px;max-height:32rem}
@media(max-width:40rem){th,td{padding:.2rem .3rem;font-size:12px}}
</style></head><body>
$body
</body></html>
""")


def write_inspection(path, reports):
    """Write what the phi of each prompt holds as one page that needs no script."""
    body = "\n".join(format_report(report) for report in reports)
    write_text(path, INSPECTION.substitute(style=BASE, body=body))


def format_report(report):
    """One prompt's part of the page: a heading, a sentence and a panel for each question."""
    share = sum(times > 0 for *_, times in report.tokens) / len(report.tokens)
    fell = sum(after < before for _, before, after, _ in report.tokens)
    before, after = (fmean(token[i] for token in report.tokens) for i in (1, 2))
    changed = [sum(part.without != part.with_memory for part in parts if not part.given)
               for parts in report.answers]
    asked = [sum(not part.given for part in parts) for parts in report.answers]
    several = len(report.answers) > 1
    answers = "".join(
        f"<h3>{f'Sample {number + 1}: ' * several}{changed[number]} of {asked[number]} tokens "
        f"change</h3>{score(parts)}{format_parts(parts, report.words)}"
        for number, parts in enumerate(report.answers))
    return f"""<h1>What phi holds</h1><p>{quote(report.about)}</p>
<h2>{quote(report.prompt_label)}</h2>{format_prompt(report.prompt)}
<h2>Where it was written</h2><p>How to read it: a number is the Frobenius norm of what phi adds to
a matrix, (alpha / r) B A. At 0 the matrix is as before; the darker, the further it was moved. Below
it is the loss of the prompt if this part of phi alone is taken away, against {after:.2f} with all
of phi and {before:.2f} without any: the higher, the more this part holds.</p>
{format_norms(report)}
<h2>What was learned of the prompt</h2><p>How to read it: each token is masked once and predicted
from the others. Its loss in nats, before phi was written (grey bar) and after (blue): ▼ it fell,
▲ it rose. 0 is known for sure. Dots count the inner steps that had a loss at this token; without
a dot it was never asked for. Here {share:.0%} of the tokens have one, {fell} of
{len(report.tokens)} losses fell, and the mean went from {before:.2f} to {after:.2f}.</p>
{format_tokens(report.tokens)}
<h2>What changes when phi is removed</h2><p>How to read it: upper line with phi, lower line without,
which is the model as it was. A token in a frame with ≠ is there because of phi.
{"✓ is right, ✗ is wrong." * any(part.right is not None for part in sum(report.answers, []))}</p>
{answers}"""


def split_name(name):
    """The name of a matrix -> its layer, and its name within: 3, "mlp.up_proj"."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return (0, name) if at is None else (int(parts[at]), ".".join(parts[at + 1:]))


def format_norms(report):
    """A table of the norms, layer by matrix. Of a stack of experts it has all of them together."""
    whole, experts = {}, ""
    most = max(flatten(report.norms.values()))
    for name, norm in report.norms.items():
        whole[split_name(name)] = sum(x * x for x in flatten([norm])) ** 0.5, name
        if isinstance(norm, list):
            layer, matrix = split_name(name)
            experts += format_experts(f"layer {layer}, {matrix}", norm, most)
    layers, matrices = (list(dict.fromkeys(names)) for names in zip(*whole))
    shared = {matrix.partition(".")[0] + "." for matrix in matrices}
    shared = shared.pop() if len(shared) == 1 else ""
    most, rows = max(norm for norm, _ in whole.values()), ""
    for layer in layers:
        cells = ""
        for matrix in matrices:
            norm, name = whole.get((layer, matrix), (None, ""))
            cells += "<td></td>" if norm is None else (
                f'<td style="{shade(norm / most)}"><b>{norm:.3g}</b>'
                f"without {report.losses_without[name]:.2f}</td>")
        rows += f"<tr><th>layer {layer}</th>{cells}</tr>"
    head = "".join(f"<th>{quote(matrix.removeprefix(shared))}</th>" for matrix in matrices)
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>{experts}'


def flatten(values):
    """Numbers and lists of numbers as one list."""
    return [x for value in values for x in (value if isinstance(value, list) else [value])]


def format_experts(name, norms, most):
    """A small square for each expert of a stack, and in words which moved most."""
    order = sorted(range(len(norms)), key=lambda i: -norms[i])
    first = ", ".join(f"{i} ({norms[i]:.3g})" for i in order[:3])
    idle = sum(norm == 0 for norm in norms)
    squares = "".join(f'<i style="{shade(norm / most)}" title="expert {i}: {norm:.3g}"></i>'
                      for i, norm in enumerate(norms))
    return (f"<p>{quote(name)}: {len(norms)} experts, from 0 on the left. Moved most: {first}. "
            f'Not moved, since no token went there: {idle}.</p><div class="experts">{squares}'
            "</div>")


def shade(share):
    """A background between white and blue, with letters that can be read on it."""
    red, green, blue = (round(255 + share * (part - 255)) for part in (0, 114, 178))
    return f"background:#{red:02x}{green:02x}{blue:02x};color:{PAPER if share > 0.7 else INK}"


def format_tokens(tokens):
    """The tokens of a prompt with their losses before and after, as bars and as numbers."""
    most, out = max([0.1, *(max(token[1:3]) for token in tokens)]), []
    for text, before, after, times in tokens:
        sign = "▼" if after < before else "▲" if after > before else "="
        bars = "".join(f'<u style="width:{100 * loss / most:.0f}%;background:{color}"></u>'
                       for loss, color in ((before, BEFORE), (after, AFTER)))
        dots = "•" * times if times <= 4 else f"•x{times}"
        out.append(f"<div><b>{show_piece(text)}</b>{bars}{before:.2f} {sign} {after:.2f} "
                   f"{dots}</div>")
    return f'<div class="box tokens" tabindex="0">{"".join(out)}</div>'


def score(parts):
    """How many tokens are right with phi and without, if that is known."""
    known = [part for part in parts if part.right is not None and not part.given]
    if not known:
        return ""
    counts = [sum(said == part.right for part, said in zip(known, column))
              for column in zip(*((part.with_memory, part.without) for part in known))]
    return f"<p>{counts[0]} of {len(known)} are right with phi, {counts[1]} without.</p>"


def format_parts(parts, words):
    """Two answers, token by token: with phi above, without it below."""
    out = []
    for part in parts:
        if part.given:
            out.append(f'<div class="given"><b>{show_piece(part.without)}</b></div>')
            continue
        differs = part.without != part.with_memory
        lines = [show_piece(said) + judge(said, part.right)
                 for said in (part.with_memory, part.without)]
        sign = "≠ " if differs else "= "
        out.append(f'<div class="{"differs" * differs}"><b>{lines[0]}</b><b class="dim">{sign}'
                   f"{lines[1]}</b></div>")
    return f'<div class="box tokens" tabindex="0">{"".join(out)}</div>'


def judge(said, right):
    """The sign of right or wrong, if it is known."""
    if right is None:
        return ""
    return ' <span class="yes">✓</span>' if said == right else ' <span class="no">✗</span>'


def show_piece(text):
    """A token on its own, as HTML. One that is nothing but spaces is seen too."""
    return quote(one_line(text) if text.strip(" ") or not text else "␣" * len(text))
