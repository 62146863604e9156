"""Progress of local training as plain lines: a client's output goes to a log, where bars that redraw are unreadable."""

from __future__ import annotations

import time

MARK = "ciphertune |"  # by which `ciphertune run` finds our lines in Flower's log


def note(who: str, text: str) -> None:
    """One line in a client's log."""
    print(f"{MARK}   {who}: {text}", flush=True)


class Progress:
    """Call it once per step; it prints at most one line per `every` seconds."""

    def __init__(self, who: str, what: str, every: float = 5.0) -> None:
        self._head = f"{MARK}   {who} {what}"
        self._every, self._start = every, time.perf_counter()
        self._next = self._start + every

    def __call__(self, step: int, steps: int, loss: float) -> None:
        """Report that `step` of `steps` is done at this training loss."""
        now = time.perf_counter()
        if now >= self._next and step < steps:
            left = (now - self._start) / step * (steps - step)
            print(f"{self._head}: step {step}/{steps}, loss {loss:.3f}, {left:.0f} s left", flush=True)
            self._next = now + self._every
