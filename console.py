"""The terminal: what is shown there, and the ways in which a user ends the work.

Every script begins with `begin`, before torch is imported. From then on no character and no closed
pipe can end a training, and a Ctrl-C ends all other work with one line. Texts from elsewhere (a
prompt, a name, a model's output) go through `printable`, so they cannot steer the terminal.
"""
from __future__ import annotations

import atexit
import contextlib
import io
import os
import re
import signal
import sys

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
