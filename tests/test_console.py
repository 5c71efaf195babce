"""What fits a terminal, and what has a colour there."""
import io
import re
import sys

import pytest

import console
from compare import format_cell
from test_compare import ACCURACY, NATS


class Terminal(io.StringIO):
    """A terminal to print to, with an encoding."""

    def __init__(self, encoding="utf-8"):
        super().__init__()
        self.name = encoding

    encoding = property(lambda self: self.name)

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """terminal(columns, encoding): from now on the output is one."""
    def make(columns, encoding="utf-8"):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr(sys, "stdout", Terminal(encoding))
    return make


ROWS = [("", ["16 x1", "16 x2", "32 x1"]), ("nothing", [".03±.01", "1.00±.00", ".5"])]


def test_a_grid_goes_on_below_where_columns_do_not_fit(terminal):
    """The label takes 7 columns and 2 spaces, the cells 7, 8 and 5, with 2 spaces between them."""
    terminal(40)
    assert console.format_grid(ROWS, numbers=True) == (
        "           16 x1     16 x2  32 x1\n"
        "nothing  .03±.01  1.00±.00     .5")
    terminal(40)
    wide = [(label, cells * 2) for label, cells in ROWS]
    blocks = console.format_grid(wide, numbers=True).split("\n\n")
    assert blocks == [console.format_grid(ROWS, numbers=True)] * 2
    for columns in (40, 60, 80, 100):
        terminal(columns)
        for count in range(1, 12):
            many = [(label, cells[:1] * count) for label, cells in ROWS]
            parts = console.format_grid(many).split("\n\n")
            assert max(len(line) for part in parts for line in part.splitlines()) <= columns
            sizes = [part.count("16 x1") for part in parts]
            assert sum(sizes) == count and max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes)


def test_a_cell_that_fits_nowhere_still_stands_there(terminal):
    terminal(40)
    assert console.format_grid([("a", ["x" * 99, "y"])]).split() == ["a", "x" * 99, "a", "y"]


def test_colours_and_wide_characters_do_not_move_a_column(terminal):
    terminal(80)
    rows = [("a", [console.paint("ab", "right"), "|"]), ("b", ["日", "|"]), ("c", ["e\u0301x", "|"])]
    plain = re.sub("\033\\[[0-9;]*m", "", console.format_grid(rows)).splitlines()
    assert plain == ["a  ab  |", "b  日  |", "c  e\u0301x  |"]


def test_only_a_terminal_has_colours_and_only_if_its_user_wants_them(terminal, monkeypatch):
    terminal(80)
    assert console.paint("a", "wrong") == "\033[31ma\033[0m"
    assert console.paint("\033[2J", "wrong") == "\033[31m\\x1b[2J\033[0m"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert console.paint("a", "wrong") == "a"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert console.paint("a", "wrong") == "a"


def test_signs_are_those_that_the_output_can_say(terminal):
    for encoding, signs in (("utf-8", "✓✗±"), ("cp1252", "+-±"), ("ascii", "+-+-")):
        terminal(80, encoding)
        assert "".join(map(console.sign, ("right", "wrong", "error"))) == signs


def test_prose_is_folded_for_a_terminal_alone(terminal, monkeypatch):
    text = "- one two three four five six seven eight nine\n\n  ten"
    terminal(40)
    assert console.fold(text) == "- one two three four five six seven\n  eight nine\n\n  ten"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert console.fold(text) == text


def test_answers_stand_below_each_other_with_signs(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = console.format_answers(
        [("question", ["owl", None, "fox", None]), ("answer", ["owl", "jade", "fox", "teal"])],
        [None, "jade", None, "ruby"], words=True)
    assert words.splitlines() == [
        "question:          owl ?      fox ?",
        "answer:            owl jade ✓ fox teal ✗",
        "The right answer:      jade       ruby"]
    text = console.format_answers([("answer", list("a\nxd"))], [None, "\n", "c", "d"], words=False)
    assert [line.rstrip() for line in text.splitlines()] == [
        "answer:            a⏎xd", "                     ✗", "The right answer:   ⏎cd"]
    assert "right" not in console.format_answers([("answer", ["a", "b"])], [None, None], True)


@pytest.mark.parametrize("data, mean, error, change, text", [
    (ACCURACY, 0.025, 0.008, False, ".03±.01"), (ACCURACY, 1.0, 0.0, False, "1.00±.00"),
    (ACCURACY, 0.999, 0.001, False, "1.00±.00"), (NATS, 3.6871, 0.2321, False, "3.687±.232"),
    (NATS, -0.0213, 1.5, True, "-.021±1.500"), (NATS, 0.5, 0.01, True, "+.500±.010"),
    (NATS, 10.25, float("nan"), True, "+10.250±nan")])
def test_a_cell_of_a_table(data, mean, error, change, text):
    assert format_cell(data, mean, error, change) == text


@pytest.mark.parametrize("text, room, shown", [
    ("short", 80, "prompt: short"), ("x" * 33 + "end", 40, "prompt: ..." + "x" * 26 + "end")])
def test_a_long_prompt_shows_its_end(monkeypatch, text, room, shown):
    monkeypatch.setenv("COLUMNS", str(room))
    assert console.show_end("prompt", text) == shown and len(shown) <= room
