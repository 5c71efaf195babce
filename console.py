"""The terminal: what is shown there, and the ways in which a user ends the work.

Every script begins with `begin`, before torch is imported. From then on no character and no closed
pipe can end a training, and a Ctrl-C ends all other work with one line. Texts from elsewhere (a
prompt, a name, a model's output) go through `printable`, so they cannot steer the terminal. Tables
and answers fit the terminal's width. Colours are for terminals alone, and never say what a sign
does not say too.
"""
from __future__ import annotations

import atexit
import contextlib
import io
import os
import re
import shutil
import signal
import sys
import textwrap
from unicodedata import combining, east_asian_width

# What a terminal takes for a command: control characters, except tabs and the ends of lines; and
# the characters that turn the direction of reading. Half a surrogate pair is no character at all.
COMMANDS = re.compile("[\0-\b\v\f\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
                      "\ufffe\uffff]|\r(?!\n)")


# ---- What is shown ------------------------------------------------------------------------------

def printable(text):
    """A text with \\xNN or \\uNNNN in place of each character that would steer a terminal."""
    return COMMANDS.sub(lambda found: escape(ord(found[0])), text)


def escape(code):
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def say(text):
    """Print a text that may hold what others have written."""
    print(printable(text))


# ---- What fits, and what has a colour -----------------------------------------------------------

COLORS = {"right": "\033[32m", "wrong": "\033[31m", "given": "\033[2m", "strong": "\033[1m"}
PLAIN = "\033[0m"


def has_colors():
    """Whether the output is a terminal whose user wants colours (NO_COLOR is not set)."""
    return (sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb")


def paint(text, color):
    """A text in one of COLORS. It is made printable before, since a colour is a command itself."""
    text = printable(text)
    return f"{COLORS[color]}{text}{PLAIN}" if text and color and has_colors() else text


def sign(name):
    """A sign, or what stands for it where the output's encoding has no such character."""
    best, plain = {"right": "✓+", "wrong": "✗-", "error": ("±", "+-"), "end": "⏎ "}[name]
    try:
        best.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return plain
    return best


def terminal_width():
    """How many columns a line may have: the terminal's, and 80 where there is none."""
    return max(40, shutil.get_terminal_size((80, 24)).columns)


def width_of(text):
    """How many columns of a terminal a text takes. Colours take none, some characters take two."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1
               for c in re.sub("\033\\[[0-9;]*m", "", text))


def fold(text):
    """Break the lines of a text between words where they are wider than the terminal.

    In a file or a pipe they stay whole: whoever searches there searches by lines.
    """
    if not sys.stdout.isatty():
        return text
    folded = []
    for line in text.splitlines():
        indent = max(2, len(line) - len(line.lstrip()))
        folded += textwrap.wrap(line, min(100, terminal_width()), subsequent_indent=" " * indent,
                                break_long_words=False, break_on_hyphens=False) or [""]
    return "\n".join(folded)


def format_grid(rows, gap=2, numbers=False):
    """Rows of (label, cells) as lines of text, in which the cells of a column are aligned.

    Columns that do not fit the terminal are dealt out evenly to blocks, one below the other.
    gap: spaces between columns. numbers: align them on the right.
    """
    first = max(len(label) for label, _ in rows)
    widths = [max(map(width_of, column)) for column in zip(*(cells for _, cells in rows))]
    room, count = terminal_width() - first - 2 + gap, len(widths)
    for blocks in range(1, count + 1):
        edges = [-(-count * i // blocks) for i in range(blocks + 1)]
        ranges = [range(*pair) for pair in zip(edges, edges[1:])]
        if all(sum(widths[i] + gap for i in block) <= room for block in ranges):
            break
    parts = []
    for block in ranges:
        lines = []
        for label, cells in rows:
            line = f"{label:{first}}  "
            for i in block:
                space = " " * (widths[i] - width_of(cells[i]))
                line += (space + cells[i] if numbers else cells[i] + space) + " " * gap
            lines.append(line.rstrip())
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def format_answers(answers, truth, words):
    """Decoded answers, token below token, each judged by what would be right, which comes last.

        without memory:    owl ruby ✗ fox ruby ✓
        with memory:       owl jade ✓ fox ruby ✓
        The right answer:      jade       ruby

    answers: [(label, pieces)], with None for a token that is asked for. truth: the right piece of
    each token, None where it was given or where nobody knows. words: whether tokens are words. Of
    other texts only what is wrong has a sign, on a line of its own.
    """
    rows, signs = [], {True: sign("right"), False: sign("wrong"), None: ""}
    colors = {True: "right", False: "wrong", None: "given"}
    for label, pieces in answers:
        judged = [None if None in pair else pair[0] == pair[1] for pair in zip(pieces, truth)]
        cells = ["?" if piece is None else one_row(piece) for piece in pieces]
        if words:
            cells = [f"{cell} {signs[verdict]}".rstrip() for cell, verdict in zip(cells, judged)]
        cells = [paint(cell, colors[verdict]) for cell, verdict in zip(cells, judged)]
        rows.append((f"{label}:", cells))
        if not words and False in judged:
            rows.append(("", [signs[False] if verdict is False else "" for verdict in judged]))
    if any(truth):
        rows.append(("The right answer:", [printable(one_row(right or "")) for right in truth]))
    return format_grid(rows, gap=1 if words else 0)


def one_row(text):
    """A text that stays on its line."""
    return text.replace("\r\n", "\n").replace("\n", sign("end")).replace("\t", " ")


def show_end(label, text):
    """A line with a text's end, as much as fits."""
    text, room = one_row(text), terminal_width() - len(label) - 2
    return printable(f"{label}: {text if len(text) <= room else '...' + text[3 - room:]}")


# ---- A reader who goes away ---------------------------------------------------------------------

class Output(io.FileIO):
    """Standard output or standard error, whose reader may go away.

    Once nobody reads, what is written is forgotten. The first time, only work that `goes_on` does
    not notice. Other work ends, with the exit code of a program that died of a broken pipe.
    """

    def __init__(self, number, goes_on):
        super().__init__(number, "w", closefd=False)
        self.goes_on = goes_on

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if not self.goes_on:
                self.goes_on = True
                if isinstance(error, BrokenPipeError):
                    raise SystemExit(128 + 13) from None
                raise
            return len(data)


def open_output(number, stream, goes_on):
    """A text stream like `stream` on an `Output`. It escapes what its encoding cannot say."""
    raw = Output(number, goes_on)
    if stream is None:  # it was closed when the program began
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    buffer = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace",
                            line_buffering=stream.line_buffering,
                            write_through=stream.write_through)


# ---- How a script begins and ends ---------------------------------------------------------------

def begin(goes_on=False):
    """Make the terminal safe, and let signals end the program in one line.

    goes_on: the work is worth finishing when nobody reads what it prints.
    """
    # Pieces of a GPU's memory can grow then, so that less of it is lost between them.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would take its place
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    # A byte that is no text comes through, and is refused where a prompt is read.
    sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout = open_output(1, sys.stdout, goes_on)
    sys.stderr = open_output(2, sys.stderr, goes_on)
    atexit.register(flush_output)
    catch_signals(end_work)


def flush_output():
    """Write what is left at the end. Nobody is there any more to catch an error.

    It is the last function that is called at the end. After a signal the program leaves here:
    Python forgets our handlers next, so the alarm that is set would kill it while it cleans up.
    """
    try:
        sys.stdout.flush()
    except SystemExit:
        pass
    except OSError as error:
        print(f"error: the output could not be written: {error}", file=sys.stderr)
        os._exit(2)
    if ENDED_BY:
        sys.stderr.flush()
        os._exit(128 + ENDED_BY[-1])


def catch_signals(handler):
    """Have Ctrl-C, SIGTERM and SIGHUP handled. A hang-up that is ignored (nohup) stays ignored."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
        if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGINT:
            signal.signal(number, handler)


def end_work(number, frame=None):
    """End the program after a signal: one line, and no traceback."""
    def leave(*_):
        os._exit(128 + number)

    # The exception below cleans up on its way out. A library may turn it into one of its own, or
    # forget it, most of all while it is imported. Then the program ends without.
    sys.excepthook = sys.unraisablehook = leave
    signal.signal(number, leave)
    if hasattr(signal, "SIGALRM"):  # Windows has none
        signal.signal(signal.SIGALRM, leave)
        signal.alarm(3)
    ENDED_BY.append(number)
    print(f"\n{printable(LAST_WORDS[-1])}", file=sys.stderr)
    sys.exit(128 + number)


ENDED_BY = []  # the signal that ends the program
LAST_WORDS = ["stopped"]  # what is said at a signal; the last of them is in force


@contextlib.contextmanager
def last_words(text):
    """What a signal within says."""
    LAST_WORDS.append(text)
    try:
        yield
    finally:
        LAST_WORDS.pop()
