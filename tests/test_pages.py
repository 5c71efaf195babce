"""The pages and the animation of pages.py, and what memory.py measures for them."""
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

import compare
import evaluate
import generate
import memdlm
import memory
import train
from colors import COLORS, color_of
from data import collate
from pages import (
    END, NARROW, Denoising, Panel, Part, Piece, Report, draw_panel, make_panel, split_name,
    write_animation, write_inspection, write_page,
)
from paper import pictures, report
from runs import TRAINED_TOY, build, open_run
from settings import Settings

ROOT = Path(__file__).parent.parent
EVIL = "<script>bad()</script>&\"'\x1b[2J"


def make_denoising(words=True, texts=("ruby", "jade")):
    """The first of two answers is right from step 2, the second wrong from step 1."""
    pieces = [Piece([(0, "fox")], None, True), Piece([(2, texts[0])], True),
              Piece([(0, "owl")], None, True), Piece([(1, texts[1])], False)]
    panels = [Panel("without memory", pieces, words),
              Panel("with memory of the prompt", pieces[:2], words)]
    return Denoising("Title", "About.", "The prompt", [("fox ruby", True), (EVIL, False)], panels,
                     [EVIL])


class Page(HTMLParser):
    """The tags and the texts of a page, without those of its script and style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        self.open = self.open[:len(self.open) - self.open[::-1].index(tag) - 1]

    def handle_data(self, text):
        if not {"script", "style"} & set(self.open):
            self.words.append(text)


# ---- What is drawn ------------------------------------------------------------------------------

def test_a_panel_follows_the_frames_of_a_decoding():
    """A token that is replaced keeps its history. What is behind the end is left out."""
    frames = [[("p", "given"), *[("?", "masked")] * 4],
              [("p", "given"), ("a", "new"), ("?", "masked"), ("?", "masked"), ("?", "masked")],
              [("p", "given"), ("b", "new"), ("?", "masked"), ("<e>", "new"), ("x", "new")],
              [("p", "given"), ("b", "done"), ("c", "new"), ("<e>", "done"), ("x", "done")]]
    panel = make_panel("way", frames, ["b", "d", None, "x"], False, {"<e>"})
    assert panel.pieces == [Piece([(1, "a"), (2, "b")], True), Piece([(3, "c")], False),
                            Piece([(2, END)], None)]
    assert panel.steps == 3 and panel.text == f"bc{END}" and panel.heading == "way: 1 of 2 right"
    whole = make_panel("way", frames, [None] * 4, False)
    assert [piece.history[-1][1] for piece in whole.pieces] == ["b", "c", "<e>", "x"]


@pytest.mark.parametrize("words", [True, False])
def test_no_token_leaves_its_panel_or_covers_another(words):
    texts = ["a" * 3, "word", "x" * 200, "\n", "你好", " the", "", "end"] * 6
    pieces = [Piece([(i, text)], i % 2 == 0) for i, text in enumerate(texts)]
    elements, bottom = draw_panel(Panel("way", pieces, words), 0, 0, NARROW)
    boxes = [tuple(map(float, box)) for element in elements if 'class="mask"' in element
             for box in re.findall(r'<rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"',
                                   element)]
    assert len(boxes) == len(texts)
    for i, (x, y, width, height) in enumerate(boxes):
        assert 0 <= x and x + width <= NARROW + 0.1 and y + height <= bottom
        for x2, y2, width2, height2 in boxes[:i]:
            assert x >= x2 + width2 - 0.11 or y >= y2 + height2
    assert "".join(elements).count("✗") == len(texts) // 2  # not by colour alone


def test_a_key_stays_on_the_line_of_its_answer():
    pieces = [Piece([(0, "hen")], None, True), Piece([(1, "x" * 20)], True),
              Piece([(0, "owl")], None, True), Piece([(1, "x" * 10)], True)]
    elements, _ = draw_panel(Panel("way", pieces, True), 0, 0, 300)
    key, = (element for element in elements if ">owl<" in element)
    assert 'x="0.0" y="55"' in key  # the second line


def test_the_animation_and_the_page_draw_the_same(tmp_path):
    write_animation(tmp_path / "o.svg", make_denoising())
    write_page(tmp_path / "o.html", [make_denoising()])
    page, svg = ((tmp_path / name).read_text() for name in ("o.html", "o.svg"))
    ElementTree.parse(tmp_path / "o.svg")
    token = re.compile(r'class="(token[^"]*)" data-from="(\d)".*?<text[^>]*>(.*?)</text>')
    assert token.findall(svg) == [("token right", "2", "ruby ✓"), ("token wrong", "1", "jade ✗"),
                                  ("token right", "2", "ruby ✓")]
    assert set(token.findall(page)) == set(token.findall(svg))
    # Four seconds of pause behind the last of two steps: 7.6 seconds in all.
    assert "animation:from2 7.6s step-end infinite" in svg and "31.58%{opacity:1}" in svg
    assert "prefers-reduced-motion" in svg and "prefers-reduced-motion" in page


def test_no_text_becomes_a_tag_and_nothing_is_fetched(tmp_path):
    parts = [Part(EVIL, "b", EVIL, False)]
    page = Report("About.", "The prompt", [(EVIL, False)], {EVIL: 1.0}, {EVIL: 2.0},
                    [(EVIL, 2.0, 1.0, 1)], [parts], True)
    write_page(tmp_path / "a.html", [make_denoising(texts=(EVIL, EVIL))])
    write_inspection(tmp_path / "b.html", [page])
    for name, scripts in (("a.html", 1), ("b.html", 0)):
        text = (tmp_path / name).read_text()
        page = Page(text)
        assert sum(tag == "script" for tag, _ in page.tags) == scripts
        assert "<script>bad()</script>&\"'\\x1b[2J" in "".join(page.words)
        assert "\x1b" not in text and ("meta", {"name": "viewport", "content":
                                       "width=device-width, initial-scale=1"}) in page.tags
        assert not re.search(r"https?://|url\(|@import", text)
        assert not any({"src", "href"} & attributes.keys() for _, attributes in page.tags)


def test_a_name_has_one_colour_and_an_unknown_one_a_shade_of_its_own():
    assert color_of("train-only") == COLORS["train-only"]
    own = [color_of(f"its prompt, cover:{k}, eta 0.2") for k in range(1, 9)]
    assert len(set(own)) == 8 and all(re.fullmatch("#[0-9a-f]{6}", color) for color in own)
    comparison = [name for name in COLORS if re.match("nothing|its|another|the", name)]
    assert len({COLORS[name] for name in comparison}) == len(comparison)


# ---- What phi holds -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def written():
    """Two prompts of different lengths in the toy's memory: settings, backbone, batch, phi."""
    s = Settings(width=16, layers=2, heads=2, rank=4, alpha=6.0, inner_lr=0.5)
    data, model = build(s)
    samples = [data.ask("fox ruby owl jade"), data.ask("fox teal owl jade elk red hen blue")]
    batch = collate(samples, [0, 0], False)
    return s, model.backbone, batch, memory.write_memory(s, model.backbone, batch)


def test_the_norm_is_that_of_the_whole_update(written):
    s, backbone, batch, phi = written
    for name, norm in memory.update_norms(s, phi).items():
        for b in range(2):
            A, B = (w[b].double() for w in phi[name])
            assert norm[b] == pytest.approx((6 / 4 * B @ A).norm().item(), rel=1e-6)
    stack = {"x": (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 4))}
    for b in range(2):
        for e in range(3):
            whole = (1.5 * stack["x"][1][b, e] @ stack["x"][0][b, e]).norm().item()
            assert memory.update_norms(s, stack)["x"][b, e] == pytest.approx(whole, rel=1e-5)
    delta = torch.randn(2, 6, 5)
    assert memory.update_norms(s, {"x": (delta,)})["x"][1] == pytest.approx(delta[1].norm().item())


@pytest.mark.parametrize("trajectory", ["consistent", "pre_only", "cover:3", "inconsistent"])
def test_the_targets_and_losses_are_those_of_the_inner_loop(written, trajectory):
    """Without a step every stage starts from an empty phi: its loss is the mean at its targets."""
    s, backbone, batch, _ = written
    s, seeds = replace(s, trajectory=trajectory, inner_lr=0.0, inner_steps=3), memory.prompt_seeds(
        batch)
    _, record = memdlm.adapt(backbone, s, batch.prompt, batch.prompt_valid, seeds)
    targets = memory.targets_of_writing(s, backbone, batch)
    assert len(targets) == len(record["inner"])
    for where, loss in zip(targets, record["inner"].tolist()):
        nll = memdlm.response_nll(backbone, s, batch.prompt, where, batch.prompt_valid)
        assert (nll.sum(1) / where.sum(1)).mean().item() == pytest.approx(loss, rel=1e-5)


def test_an_inspection_by_hand(written):
    """Losses before and after are those of the parts of cover:4; each prompt as if alone."""
    s, backbone, batch, phi = written
    found = memory.inspect_memory(s, backbone, batch, phi)
    assert found.times.sum(1).tolist() == [2, 2]  # one token, at the pre-anchor and the anchor
    valid, seeds = batch.prompt_valid, memory.prompt_seeds(batch)
    parts, _ = memdlm.cover(replace(s, trajectory="cover:4"), valid, valid, None, seeds)
    for losses, own in ((found.before, None), (found.after, phi)):
        assert not losses[~valid].any()
        for part in filter(torch.any, parts):
            nll = memdlm.response_nll(backbone, s, batch.prompt, part, valid, own)
            torch.testing.assert_close(losses[part], nll[part])
    assert (found.after.sum(1) < found.before.sum(1)).all()
    first, *_ = phi
    rest = {name: pair for name, pair in phi.items() if name != first}
    assert found.losses_without[first].tolist() == pytest.approx(
        memory.prompt_loss(s, backbone, batch, rest))
    still = replace(s, inner_lr=0.0)
    with pytest.raises(ValueError, match="nothing was written"):
        memory.inspect_memory(still, backbone, batch, memory.write_memory(still, backbone, batch))


def test_what_changes_is_compared_with_the_plain_model():
    """The lower line is the baseline's decoding, bit for bit, although phi was there before."""
    s, data, model = open_run(TRAINED_TOY)
    question = generate.ask(data, "fox ruby owl jade elk red hen blue")
    batch = collate([question.sample], [0], True)
    *_, canvas = memdlm.denoise(model.backbone, s, batch.x0, batch.maskable, batch.valid, [0])
    phi = memory.write_memory(s, model.backbone, batch)
    answers = [generate.answer(s, data, model, [question.sample], way, 0)[0] for way in (phi, None)]
    parts = generate.compare_answers(data, question, answers[1], answers[0])
    words = data.tokenizer.pieces(canvas[0].tolist())
    assert [part.without for part in parts] == words[1:]  # the first is the separator
    assert [part.right for part in parts if not part.given] == ["ruby", "jade", "red", "blue"]
    assert sum(part.without != part.with_memory for part in parts) >= 3


def test_the_pages_of_the_command_line(cli, two_prompts=("fox ruby owl jade", "elk red fox teal")):
    """--inspect writes the memory by itself. Several prompts and samples have all their parts."""
    flags = ["--prompt", two_prompts[0], "--prompt", two_prompts[1], "--samples", "2"]
    code, out, err = cli(generate, "--run", TRAINED_TOY, *flags, "--inspect", "i.html", "--html",
                         "p.html")
    assert code == 0 and "inspection written to i.html" in out, err
    with open("i.html") as file:
        page = Page(file.read())
    text = "".join(page.words)
    assert text.count("What phi holds") == 2 + 1 and text.count("How to read it") == 6
    assert text.count("Sample 2") == 2 and "layer 0" in text and "down_proj" in text
    with open("p.html") as file:
        assert file.read().count("with memory of the prompt, 2") == 2
    for more, says in ((["--inner-lr", "0"], "nothing was written"),
                       (["--svg", "o.svg"], "--svg draws one prompt"),
                       (["--inspect", "no/such.html"], "could not be written")):
        code, _, err = cli(generate, "--run", TRAINED_TOY, *flags, "--inspect", "j.html", *more)
        assert code == 2 and says in err and len(err.splitlines()) == 1


def test_a_layer_is_read_from_a_name():
    assert split_name("layers.0.mlp.up_proj") == (0, "mlp.up_proj")
    assert split_name("model.layers.27.mlp.experts.up_proj") == (27, "mlp.experts.up_proj")
    assert split_name("head") == (0, "head")


@pytest.mark.parametrize("name, more", [("llada-moe", []), ("llada2.1-mini", ["--mode", "speed"])])
def test_real_models_have_both_pages(cli, tiny_models, name, more):
    """A stack of experts has a square for each. A text with gaps has no end."""
    base = ["--model", tiny_models / name, "--html", "p.html", "--inspect", "i.html"]
    for prompt, rest in ((EVIL, ["--length", "9", *more]), ("The [MASK:2] sat.", [])):
        assert cli(generate, *base, "--prompt", prompt.replace("\x1b", ""), *rest)[0] == 0
        for file in ("p.html", "i.html"):
            page = Page(open(file).read())
            assert prompt.replace("\x1b", "") in "".join(page.words)
    experts = [attributes for tag, attributes in page.tags
               if "expert" in attributes.get("title", "")]
    assert len(experts) == 3 * 8


# ---- In a browser -------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                               "chrome", "chromium-headless-shell"))), None)
needs_browser = pytest.mark.skipif(not BROWSER, reason="no chromium or chrome is installed")


def see(tmp_path, script, *flags, name="o.html"):
    """What a script, which runs in the page, puts into the document's title."""
    page = (tmp_path / name).read_text().replace(
        "</body>", f"<script>setTimeout(() => {{document.title = {script}}}, 9000)</script></body>")
    (tmp_path / "seen.html").write_text(page)
    run = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--virtual-time-budget=10000",
         f"--user-data-dir={tmp_path}/browser", *flags, "--dump-dom",
         f"file://{tmp_path}/seen.html"], capture_output=True, text=True, timeout=120)
    return re.search(r"<title>(.*?)</title>", run.stdout, re.S)[1]


STATE = "find('step').textContent + ' ' + document.querySelectorAll('.later').length + ' ' + "
PRESS = ("(keys => keys.map(key => (document.dispatchEvent(new KeyboardEvent('keydown', {key})),"
         " now)).join())")


@pytest.mark.slow
@needs_browser
def test_a_browser_plays_the_page_once_and_follows_the_keys(tmp_path):
    write_page(tmp_path / "o.html", [make_denoising(texts=(EVIL, "jade"))])
    keys = PRESS + "(['ArrowLeft', 'ArrowLeft', 'ArrowLeft', 'ArrowRight', 'End', 'Home'])"
    assert see(tmp_path, STATE + keys) == "step 2 of 2 0 1,0,0,1,2,0"
    # Space plays from the start, and space again pauses there.
    assert see(tmp_path, PRESS + "([' ', ' ']) + timer") == "0,0null"
    still = see(tmp_path, STATE + "typeof bad", "--force-prefers-reduced-motion")
    assert still == "step 2 of 2 0 undefined"


@pytest.mark.slow
@needs_browser
def test_the_pages_fit_a_phone(tmp_path):
    """Panels stand side by side at 1280 pixels, below each other at 390, and nothing sticks out."""
    write_page(tmp_path / "o.html", [make_denoising(texts=("ruby", "x" * 90))])
    tokens = [("x" * 90, 2.0, 1.0, 3)] * 60
    write_inspection(tmp_path / "i.html", [Report(
        "About.", "The prompt", [("y" * 900, False)], {f"layers.{i}.mlp.up_proj": [1.0] * 64
                                                      for i in range(3)},
        {f"layers.{i}.mlp.up_proj": 1.0 for i in range(3)}, tokens,
        [[Part("z" * 90, "b", None, False)] * 30], False)])
    for name in ("o.html", "i.html"):
        inner = html.escape((tmp_path / name).read_text())
        frames = [f'<iframe srcdoc="{inner}" style="width:{width}px;height:800px;border:0">'
                  "</iframe>" for width in (1280, 390)]
        (tmp_path / "frames.html").write_text(
            f"<title></title><body>{''.join(frames)}</body>")
        look = ("[...document.querySelectorAll('iframe')].map(frame => {"
                "const page = frame.contentDocument, panels = [...page.querySelectorAll('.panel')];"
                "const tops = new Set(panels.map(panel => panel.getBoundingClientRect().top));"
                "return page.documentElement.scrollWidth - frame.clientWidth + ':' + tops.size})"
                ".join()")
        want = "0:1,0:2" if name == "o.html" else "0:0,0:0"
        assert see(tmp_path, look, "--window-size=1400,900", name="frames.html") == want, name


# ---- Pictures -----------------------------------------------------------------------------------

@pytest.mark.slow
def test_every_picture_of_the_readmes_is_drawn_again_from_stored_numbers(tmp_path, cli):
    pytest.importorskip("matplotlib")
    named = {name for page in ("README.md", "results/README.md", "results/conversion.md")
             for name in re.findall(r"!\[[^]]*\]\((?:results/)?(.*?)\)", (ROOT / page).read_text())}
    assert cli(evaluate, "pictures", "--out", tmp_path / "new")[0] == 0
    made = {path.name for path in (tmp_path / "new").iterdir()}
    assert named <= made and {path.name for path in ROOT.glob("results/*.png")} <= made
    assert (tmp_path / "new/denoising.svg").read_bytes() == (
        ROOT / "results/denoising.svg").read_bytes()


def test_a_stored_comparison_shows_the_numbers_of_the_table():
    """Changes follow from the runs' means. By hand: 1 - 3 and 2 - 5 are -2.5 +- 0.5."""
    bars = []
    ax = SimpleNamespace(bar=lambda x, means, width, yerr, **rest: bars.append(
        (means, yerr, rest["color"])))
    rows = [{"phi": "nothing (theta alone)", "column": "32", "mean": 4.0, "standard_error": 1.0,
             "per_run": [3.0, 5.0]},
            {"phi": "its prompt, cover:4, eta 0.3", "column": "32", "mean": 1.5,
             "standard_error": 0.5, "per_run": [1.0, 2.0]}]
    compare.draw_bars(ax, rows, ["32"], False)
    compare.draw_bars(ax, rows, ["32"], True)
    compare.draw_bars(ax, [rows[0] | {"shown": [7.0, 0.1]}], ["32"], True)
    blue, grey = color_of(rows[1]["phi"]), color_of(rows[0]["phi"])
    assert bars == [((-2.5,), (pytest.approx(0.5),), blue), ((4.0,), (1.0,), grey),
                    ((1.5,), (0.5,), blue), ((7.0,), (0.1,), grey)]
    assert grey == color_of("MDLM") != blue


def test_no_label_of_the_frontier_covers_another():
    plt = compare.pyplot()
    if plt is None:
        pytest.skip("no matplotlib")
    results = {"base": [{"in alone": 0.6}]} | {
        run: [{"nats alone": 4 + 0.01 * i, "in alone": 0.5 + 0.001 * i}]
        for runs in report.FRONTIER.values() for i, (run, _, _) in enumerate(runs[:4])}
    figure = report.draw_frontier(plt, results, None)
    for ax in figure.axes:
        boxes = [label.get_window_extent() for label in ax.texts if label.get_text() != "base"]
        assert len(boxes) >= 4
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    plt.close(figure)


def test_the_pictures_of_a_run_are_drawn_from_its_numbers(cli, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--model", "toy", "--width", "8", "--heads", "2", "--layers", "1", "--steps", "2",
             "--batch", "2", "--table-samples", "2", "--no-control", "--out", tmp_path / "r"]
    assert cli(train, *flags)[0] == 0
    whole = json.loads((tmp_path / "r/panel.json").read_text())
    assert whole["groups"][0]["rows"][0]["shown"][0] == whole["groups"][0]["rows"][0]["mean"]
    code, out, err = cli(evaluate, "pictures", tmp_path / "r", "--out", tmp_path / "n")
    assert code == 0 and {path.name for path in (tmp_path / "n").iterdir()} == {
        "loss.png", "panel.png"}, err
    code, _, err = cli(evaluate, "pictures", tmp_path)
    assert code == 2 and "settings.json" in err
    for text in ("{}", "[1]", "null", '{"groups": [3], "metric": "nats"}'):
        (tmp_path / "r/panel.json").write_text(text)
        code, _, err = cli(evaluate, "pictures", tmp_path / "r")
        assert code == 2 and "panel.json does not hold the numbers of a comparison" in err


@pytest.mark.slow
def test_the_stored_denoising_is_what_the_page_without_input_shows():
    stored = pictures.read_denoising(ROOT / "results/denoising.json")
    made = pictures.make_denoising()
    assert [tuple(part) for part in stored.prompt] == made["prompt"]
    for panel, own in zip(stored.panels, made["panels"], strict=True):
        assert panel.title == own["title"]
        assert json.loads(json.dumps(own["pieces"])) == [
            piece._asdict() for piece in panel.pieces]
