"""Figures as a reader of the page wants them."""

from __future__ import annotations

from ciphertune.comparison import SHARES


def show(value: float | None, metric: str) -> str:
    """A score for people."""
    if value is None:
        return "-"
    return f"{value:.1%}" if metric in SHARES else f"{value:.3f}"


def share(value: float | None) -> str:
    """A share of one for people: 1.25 %."""
    return "-" if value is None else f"{100 * value:.3g} %"


def duration(seconds: float) -> str:
    """Seconds for people: 4 min 10 s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.95 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def count(number: int, what: str) -> str:
    """A number of things: 1 round, 2 rounds."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def natural(name: str) -> tuple[str, int, str]:
    """Orders lab-2 before lab-10."""
    head = name.rstrip("0123456789")
    return head, len(name) - len(head), name
