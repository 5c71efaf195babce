"""All pictures of the repository, drawn again from the numbers that are stored beside them.

    python evaluate.py pictures                 those of results/
    python evaluate.py pictures runs/languages  those of a run: loss.png, panel.png
    python evaluate.py pictures --out FOLDER    into another folder

A picture shows what its file of numbers holds, and drawing it measures nothing:

    denoising.svg                  denoising.json    (made by the toy that comes along)
    closed_book.png                closed_book.json
    languages.png                  languages.json
    paper_*.png                    paper_toy.json and paper_curves.json
    conversion.png                 conversion.json, once a way is measured
    order.png                      order.json
    a run's loss.png, panel.png    its metrics.jsonl and panel.json
"""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import generate
from compare import draw_losses, draw_stored
from console import say
from data import collate
from files import read_json, write_json, write_whole
from memory import prompt_loss, write_memory
from pages import Denoising, Panel, Piece, write_animation
from runs import TRAINED_TOY, open_run

RESULTS = Path(__file__).parent.parent / "results"
CURVES = ("exposure", "dynamics", "needle")  # pictures of the claims that show lists of numbers


def draw_pictures(runs=(), out=None):
    """Draw the pictures of results/, or of runs. out: a folder, in place of where numbers lie."""
    for folder in map(Path, runs):
        target = Path(out or folder)
        target.mkdir(parents=True, exist_ok=True)
        draw_losses(folder, target / "loss.png")
        say(f"picture in {target / 'loss.png'}")
        if (folder / "panel.json").exists():
            draw_stored(folder / "panel.json", target / "panel.png")
    if not runs:
        target = Path(out or RESULTS)
        target.mkdir(parents=True, exist_ok=True)
        draw_results(target)


def draw_results(out):
    """Draw all of results/ into a folder."""
    write_animation(out / "denoising.svg", read_denoising(RESULTS / "denoising.json"))
    say(f"picture in {out / 'denoising.svg'}")
    for name in ("closed_book", "languages"):
        draw_stored(RESULTS / f"{name}.json", out / f"{name}.png")
    draw_claims(out)
    conversion = read_json(RESULTS / "conversion.json")
    if conversion["arms"]:
        from paper.conversion import draw_curves
        draw_curves(conversion, out / "conversion.png")
        say(f"picture in {out / 'conversion.png'}")
    from paper.order import draw_recall
    draw_recall(read_json(RESULTS / "order.json"), out / "order.png")
    say(f"picture in {out / 'order.png'}")


def draw_claims(out):
    """Draw the pictures of the claims. Single numbers and lists are stored apart."""
    from paper.report import draw_pictures as draw
    from paper.runs import Size
    whole = read_json(RESULTS / "paper_toy.json")
    size, lists = Size(**whole["size"]), read_json(RESULTS / "paper_curves.json")["runs"]
    images = draw(lists, size, CURVES) | draw(whole["runs"], size, ["frontier"])
    for name, (_, png) in images.items():
        path = out / f"paper_{name}.png"
        write_whole(path, lambda aside, png=png: aside.write_bytes(png))
        say(f"picture in {path}")


# ---- The README's animation ---------------------------------------------------------------------

def read_denoising(path):
    """The denoising that a JSON file holds. Where there is none, the toy makes it."""
    if not path.exists():
        write_json(path, make_denoising(), indent=1)
    whole = read_json(path)
    panels = [Panel(panel["title"], [Piece(**piece) for piece in panel["pieces"]], panel["words"])
              for panel in whole["panels"]]
    return Denoising(**whole | {"panels": panels})


def make_denoising():
    """What `generate.py --adapt` shows without a prompt, as plain values."""
    s, data, model = open_run(TRAINED_TOY)
    arguments = SimpleNamespace(
        adapt=True, seed=0, steps=None, temperature=0.0, block_length=None, cfg_scale=0.0,
        remasking="low_confidence", threshold=None, mode=None, edit_threshold=None, cache="none")
    question, note = generate.pick_example(s, data, model, arguments)
    batch = collate([question.sample], [0], s.closed_book)
    phi = write_memory(s, model.backbone, batch)
    losses = [prompt_loss(s, model.backbone, batch, way)[0] for way in (None, phi)]
    answers = [generate.answer(s, data, model, [question.sample], way, 0)[0]
               for way in (None, phi)]
    found = generate.make_denoising(s, data, question, answers, 1,
                                    [generate.state_losses(*losses), note])
    panels = [{"title": panel.title, "words": panel.words,
               "pieces": [piece._asdict() for piece in panel.pieces]} for panel in found.panels]
    return found._asdict() | {"panels": panels}
