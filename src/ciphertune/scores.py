"""Clients' reports -> figures of the federation. Reports come over the wire: only finite numbers are taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ciphertune.errors import FormatError


@dataclass(frozen=True)
class Score:
    """Held-out loss and metrics, and the number of held-out examples they are over."""

    loss: float
    metrics: Mapping[str, float]
    heldout: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for summary.json."""
        return {"loss": self.loss, "metric": dict(self.metrics), "heldout": self.heldout}


def score_of(report: Mapping[str, Any]) -> Score:
    """The score in a client's report. Raises FormatError."""
    try:
        metrics = {str(k)[:40]: float(v) for k, v in dict(report["metrics"]).items()}
        score = Score(float(report["loss"]), metrics, int(report["heldout"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError("the client's report is not readable") from error
    if not math.isfinite(score.loss) or score.heldout < 1 or len(metrics) > 20:
        raise FormatError(f"the client reports an impossible score (loss {score.loss})")
    return score


def seconds_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Seconds per stage in a client's report; anything that is no number is left out."""
    found = report.get("seconds")
    if not isinstance(found, dict):
        return {}
    return {str(k)[:20]: float(v) for k, v in list(found.items())[:20] if isinstance(v, int | float)}


def mean(scores: Sequence[Score]) -> Score | None:
    """Mean weighted by held-out examples; perplexity is the exponential of the mean loss."""
    if not scores:
        return None
    total = sum(s.heldout for s in scores)
    loss = sum(s.loss * s.heldout for s in scores) / total
    names = [n for n in scores[0].metrics if all(n in s.metrics for s in scores)]
    metrics = {n: sum(s.metrics[n] * s.heldout for s in scores) / total for n in names}
    if "perplexity" in metrics:
        metrics["perplexity"] = math.exp(min(loss, 700.0))
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


def lines_of_table(summary: Mapping[str, Any]) -> list[str]:
    """The table at the end of a run, as lines of text: base, every client alone, federated, and what travelled."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    nodes = summary.get("nodes", {})
    table = Table(title=f"{summary['method']}: {summary['rounds']} rounds, {len(nodes)} clients", title_justify="left")
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
