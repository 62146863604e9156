"""Clients' reports -> figures of the federation. Reports come over the wire: only finite numbers are taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ciphertune.errors import FormatError, ReportError
from ciphertune.progress import printable
from ciphertune.settings import Settings

_METRICS = ("perplexity", "accuracy", "f1")
_STAGES = ("load", "unseal", "evaluate", "score", "train", "seal", "save")


@dataclass(frozen=True)
class Score:
    """Held-out loss and metrics. weight: what the mean over clients is weighted by."""

    loss: float
    metrics: Mapping[str, float]
    weight: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for summary.json."""
        return {"loss": self.loss, "metric": dict(self.metrics)}


def number(value: Any, low: float, high: float) -> float:
    """A number from a client. Raises ReportError unless it is one, finite, and in the range."""
    try:
        found = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        found = math.inf
    if not low <= found <= high:
        raise ReportError(
            f"the client reports {printable(str(value))[:40]} where a number from {low:g} to {high:g} is expected"
        )
    return found


def score_of(report: Mapping[str, Any], heldout: int, max_length: int) -> Score:
    """The score in a client's report, weighted by target tokens (perplexity) or examples.

    heldout: the examples it joined with. Raises FormatError.
    """
    metrics = report.get("metrics")
    if not isinstance(metrics, dict) or not set(metrics) <= set(_METRICS):
        raise FormatError("the client's report has no readable metrics")
    found = {name: number(value, 0.0, 1e300) for name, value in metrics.items()}
    tokens = number(report.get("tokens"), 1, heldout * max_length)
    return Score(number(report.get("loss"), 0.0, 1e6), found, tokens if "perplexity" in found else heldout)


@dataclass(frozen=True)
class Report:
    """What a client says of a round, checked: it decides nothing but what is shown."""

    score: Score | None  # None in a round without evaluation
    train_loss: float
    seconds: Mapping[str, float]


def seconds_of(values: Mapping[str, Any]) -> dict[str, float]:
    """The seconds per stage in a client's reply. Raises FormatError."""
    seconds = values.get("seconds", {})
    if not isinstance(seconds, dict) or not set(seconds) <= set(_STAGES):
        raise FormatError("the client's report has no readable seconds")
    return {stage: number(value, 0.0, 1e9) for stage, value in seconds.items()}


def report_of(values: Mapping[str, Any], heldout: int, max_length: int, *, evaluated: bool = True) -> Report:
    """The report in a client's reply. Raises FormatError."""
    return Report(
        score_of(values, heldout, max_length) if evaluated else None,
        number(values.get("train_loss", 0.0), 0.0, 1e6),
        seconds_of(values),
    )


def mean(scores: Sequence[Score]) -> Score | None:
    """Weighted mean over clients; perplexity is the exponential of the mean loss, F1 a mean of the clients' F1."""
    if not scores:
        return None
    total = sum(s.weight for s in scores)
    loss = sum(s.loss * s.weight for s in scores) / total
    names = [n for n in scores[0].metrics if all(n in s.metrics for s in scores)]
    metrics = {n: sum(s.metrics[n] * s.weight for s in scores) / total for n in names}
    if "perplexity" in metrics:
        metrics["perplexity"] = math.exp(min(loss, 690.0))
    return Score(loss, metrics, total)


def size(count: float) -> str:
    """Bytes for people: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def show(score: Score | None) -> str:
    """A score for people: 3.214 (perplexity 24.9)."""
    if score is None:
        return "-"
    extra = ", ".join(
        f"{name} {value:.1%}" if name in _SHARES else f"{name} {value:.4g}" for name, value in score.metrics.items()
    )
    return f"{score.loss:.3f}" + (f" ({extra})" if extra else "")


_SHARES = ("accuracy", "f1")


_SHARED = {"both": "A and B", "alternate": "A and B in turns", "b_only": "B alone", "none": "nothing is shared"}
_HIDDEN = {
    "none": "nothing encrypted",
    "all": "every entry encrypted",
    "negotiated": "the negotiated columns of A and the heads encrypted",
    "dropped": "some columns of A left out, nothing encrypted",
    "entries": "some entries encrypted",
}


def in_short(settings: Settings) -> str:
    """The method in one line: sealed: A and B in turns, every entry encrypted (ckks_packed)."""
    method, backend = settings.method, settings.crypto.backend
    parts = [_SHARED[method.share]]
    if method.share != "none":
        clear = backend == "clear"
        hidden = _HIDDEN["none" if clear and method.select != "dropped" else method.select]
        parts.append(hidden if clear else f"{hidden} ({backend})")
    return f"{method.name}: {', '.join(parts)}"


def lines_of_table(summary: Mapping[str, Any]) -> list[str]:
    """The table at the end of a run, as lines of text: base, every client alone, federated, and what travelled."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    nodes = summary.get("nodes", {})
    table = Table(
        title=f"{summary['method']}: {summary['rounds']} rounds, {len(nodes)} clients",
        caption="held-out loss, lower is better; base: not tuned; alone: as many steps without the others",
        title_justify="left",
        caption_justify="left",
    )
    for column in (
        "client",
        "rank",
        "examples",
        "base",
        "alone",
        "federated",
        "up / round",
        "down / round",
        "encrypted",
    ):
        table.add_column(column, justify="left" if column == "client" else "right")
    rows: Iterable[tuple[str, Mapping[str, Any]]] = [*nodes.items(), ("all", summary)]
    for name, row in rows:
        table.add_row(
            name,
            str(row.get("rank", "")),
            str(row.get("samples", "")),
            *(_cell(row.get(key)) for key in ("base", "local", "federated")),
            size(row["bytes_up"]),
            size(row["bytes_down"]),
            f"{row['encrypted_fraction']:.0%}",
            style="bold" if name == "all" else "",
        )
    out = StringIO()
    Console(file=out, width=118).print(table)
    return out.getvalue().rstrip().splitlines()


def _cell(values: Mapping[str, Any] | None) -> str:
    if not values:
        return "-"
    first = next(iter(values["metric"].items()), None)
    shown = f" ({first[1]:.1%})" if first and first[0] in _SHARES else ""
    return f"{values['loss']:.3f}{shown}"
