"""What the apps say: plain lines, for their output goes to a log, where bars that redraw are unreadable."""

from __future__ import annotations

import logging
import time
import traceback

MARK = "ciphertune |"  # by which `ciphertune run` finds our lines in Flower's log


def printable(text: str) -> str:
    """Text from the wire as it may be shown: nothing in it moves the cursor or starts a line."""
    return "".join(c if c.isprintable() else "?" for c in text)


def say(text: str) -> None:
    """One line for people, whatever is in the text."""
    print(f"{MARK} {printable(text)}", flush=True)


def log_trace(error: BaseException) -> None:
    """Where an error came from, for the log. Its own text may be from the wire."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logging.getLogger("ciphertune").warning("%s: %s\n%s", type(error).__name__, printable(str(error))[:500], where)


def note(who: str, text: str) -> None:
    """One line in a client's log."""
    say(f"  {who}: {text}")


class Progress:
    """Call it once per step; it prints at most one line per `every` seconds."""

    def __init__(self, who: str, what: str, every: float = 5.0) -> None:
        self._head = f"  {who} {what}"
        self._every, self._start = every, time.perf_counter()
        self._next = self._start + every

    def __call__(self, step: int, steps: int, loss: float) -> None:
        """Report that `step` of `steps` is done at this training loss."""
        now = time.perf_counter()
        if now >= self._next and step < steps:
            left = (now - self._start) / step * (steps - step)
            say(f"{self._head}: step {step}/{steps}, loss {loss:.3f}, {left:.0f} s left")
            self._next = now + self._every
