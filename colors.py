"""One colour for each name: a row of a table has the same in every picture and on every page.

The names are those that tables, pictures and pages show. A row of a comparison says what phi is
written from and how, so its hue is the source's: nothing is grey, its own prompt blue, another
prompt red, the answers purple. The colour-blind can tell these apart too.
"""
from __future__ import annotations

from zlib import crc32

INK, GREY, EDGE, PAPER, MASK = "#222222", "#767676", "#d8d8d8", "#ffffff", "#ececec"
RIGHT, WRONG, NEW = "#00694e", "#a33b00", "#f0c040"  # of an answer; what a step has revealed

COLORS = {
    # what phi is written from
    "nothing (theta alone)": "#8c8c8c",
    "its prompt, cover:4, eta 0.3": "#0072b2",
    "its prompt, paper's masks, eta 0.1": "#56b4e9",
    "its prompt, paper's masks, eta 0.3": "#a6cee3",
    "its prompt, paper's masks, eta 0.03": "#3f5fa8",
    "its prompt, paper's masks, eta 0.003": "#00406b",
    "another prompt, cover:4, eta 0.3": "#d55e00",
    "another prompt, paper's masks, eta 0.1": "#f4a582",
    "the answers, eta 0.1 (leaks)": "#8e4585",
    "the answers, eta 0.03 (leaks)": "#b3669e",
    "the answers, eta 0.003 (leaks)": "#cc79a7",
    # the paper's names
    "MDLM": "#8c8c8c", "MDLM, adapted": "#000000", "MDLM, logits / 3": "#000000",
    "train-only": "#e69f00", "train & inference": "#0072b2", "phi of the answers": "#cc79a7",
    # studies
    "two-way": "#8c8c8c", "lower 20 left": "#0072b2", "prompt left": "#d55e00",
    "first order": "#e69f00", "second order": "#0072b2",
    # training, and the pages
    "no memory": "#8c8c8c", "without memory": "#8c8c8c", "without memory (theta alone)": "#8c8c8c",
    "with memory of the prompt": "#0072b2", "with memory (phi has seen these answers)": "#cc79a7",
}

# Of rows that are not in the table: the first word of the name -> hue, as (red, green, blue).
HUES = {"its": (0, 60, 130), "another": (150, 50, 0), "the": (90, 20, 90)}


def color_of(name):
    """The colour of a name, as #rrggbb. One that is not in the table has a shade of its own."""
    if name in COLORS:
        return COLORS[name]
    share = crc32(name.encode()) % 97 / 140  # of white; up to 0.69
    parts = HUES.get(name.partition(" ")[0], (40, 90, 60))
    return "#" + "".join(f"{round(part + share * (255 - part)):02x}" for part in parts)
