"""The figures of a run's page: the metric's course, bytes by round, seconds by stage, and what the plan encrypts."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ciphertune.comparison import SHARES, STAGES, stage_seconds
from ciphertune.report.plans import Coverage
from ciphertune.report.skeleton import COLOURS, FAINT, LINE, TEXT, drawing, figure, svg
from ciphertune.report.source import Run, pick, score, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


CRYPTOGRAPHY = ("seal", "unseal", "aggregate")  # stages that a run in the clear would hardly need
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_PARTS = ("up, encrypted", "up, readable", "negotiation", "down")  # of a round's bytes
_MOST_CURVES, _MOST_LAYERS, _MOST_BINS = 30, 400, 256


def metric_of(run: Run) -> str:
    """What the course is drawn of: accuracy or F1 where the run measured it, else the loss."""
    scores = [pick(run.summary, key) for key in ("federated", "base", "local")] + list(run.lines)
    return next((m for m in SHARES if any(score(x, m) is not None for x in scores)), "loss")


def course(run: Run, metric: str) -> list[tuple[int, float]]:
    """Rounds done and the federation's mean: what clients measured before each round, and after the last one."""
    points = {}
    for round_ in run.rounds:
        said = [score(x, metric) for x in run.at(round_, "round")]
        each = [score(x, metric) for x in run.at(round_, "update")]  # an unfinished round has no mean of its own
        values = [v for v in said if v is not None] or [v for v in each if v is not None]
        if values:
            points[round_] = statistics.fmean(values)
    last = score(pick(run.summary, "federated"), metric)
    if last is not None and run.rounds:
        points[run.rounds[-1] + 1] = last
    return sorted(points.items())


def figures(run: Run, coverage: Coverage | None) -> dict[str, tuple[str, str]]:
    """Title and inline SVG of every figure that there is something to draw of."""
    metric = metric_of(run)
    names = {"course": f"Held-out {metric} against round", "bytes": "Bytes of one client by round",
             "seconds": "Seconds by stage", "plan": "Encrypted columns of A, by layer"}  # fmt: skip
    with drawing():
        drawn = {"course": _course(run, metric), "bytes": _bytes(run), "seconds": _seconds(run)}
        drawn["plan"] = _plan(coverage) if coverage else None
        return {key: (names[key], svg(one, key, names[key])) for key, one in drawn.items() if one}


def _course(run: Run, metric: str) -> Figure | None:
    """The mean as a line, clients thin behind it, the base model and training alone as levels."""
    from matplotlib.ticker import MaxNLocator

    points, scale = course(run, metric), 100.0 if metric in SHARES else 1.0
    if not points:
        return None
    drawn, axes = figure(3.1)
    label: dict[str, Any] = {"label": "each client"}
    for values in list(_by_client(run, metric).values())[:_MOST_CURVES]:
        axes.plot([p[0] for p in values], [scale * p[1] for p in values], color=FAINT, alpha=0.45, lw=0.9, **label)
        label = {}
    for key, name, colour, dash in (("base", "base model", TEXT, "--"), ("local", "each alone", COLOURS[1], ":")):
        level = score(pick(run.summary, key), metric)
        if level is not None:
            axes.axhline(scale * level, color=colour, linestyle=dash, linewidth=1.6, label=name)
    mean = [scale * p[1] for p in points]
    axes.plot([p[0] for p in points], mean, color=COLOURS[0], marker="o", markersize=4, lw=2, label="federated")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rounds done")
    axes.set_ylabel(f"{metric} (%)" if metric in SHARES else metric)
    axes.grid(alpha=0.7)
    drawn.legend(loc="outside lower center", ncols=4, columnspacing=1.2, handlelength=1.6, fontsize=9)
    return drawn


def _by_client(run: Run, metric: str) -> Mapping[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in run.at(stage="update"):
        value = score(line, metric)
        if value is not None:
            found[line["node"]].append((line["round"], value))
    nodes, last = pick(run.summary, "nodes"), run.rounds[-1] + 1
    for name in nodes if isinstance(nodes, Mapping) else ():
        value = score(pick(nodes, name, "federated"), metric)
        if value is not None:
            found[name].append((last, value))
    return {name: found[name] for name in sorted(found)}


def bytes_by_round(run: Run) -> Mapping[int, Mapping[str, float]]:
    """Mean bytes of the clients that sent an update in a round, by part."""
    table = {}
    for round_ in run.rounds:
        updates = run.at(round_, "update")
        parts: dict[str, float] = dict.fromkeys(_PARTS, 0.0)
        for line in updates:
            hidden = min(line.get("cipher_bytes", 0), line.get("bytes_up", 0))
            parts["up, encrypted"] += hidden
            parts["up, readable"] += line.get("bytes_up", 0) - hidden
            parts["down"] += line.get("bytes_down", 0)
        for line in run.at(round_, "negotiation"):
            parts["negotiation"] += line.get("bytes_up", 0)
            parts["down"] += line.get("bytes_down", 0)  # the aggregate that the client then need not be sent again
        table[round_] = {part: value / max(1, len(updates)) for part, value in parts.items()}
    return table


def _bytes(run: Run) -> Figure | None:
    """A bar per round, of what went up and came down."""
    from matplotlib.ticker import MaxNLocator

    table = bytes_by_round(run)
    largest = max((sum(parts.values()) for parts in table.values()), default=0.0)
    if not largest:
        return None
    divisor, unit = next((u for u in _UNITS if largest >= u[0]), _UNITS[-1])
    drawn, axes = figure(3.1)
    base = np.zeros(len(table))
    for part, colour in zip(_PARTS, (COLOURS[0], COLOURS[1], COLOURS[3], COLOURS[2]), strict=True):
        values = np.array([parts[part] for parts in table.values()]) / divisor
        if values.max() > 0.002 * largest / divisor:  # else nobody could see it: the headers of encrypted updates
            axes.bar([r + 1 for r in table], values, bottom=base, color=colour, label=part, width=0.8)
        base += values
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")
    axes.set_ylabel(f"{unit} per client")
    drawn.legend(loc="outside lower center", ncols=2, fontsize=9, handlelength=1.2)
    return drawn


def seconds_by_stage(run: Run) -> Mapping[str, float]:
    """Seconds of all clients and the server, without training alone, in the order of a round."""
    found = stage_seconds(run.lines, run.rounds[-1] + 1 if run.rounds else 0)
    return {s: found[s] for s in (*(s for s in STAGES if s in found), *sorted(set(found) - set(STAGES)))}


def _seconds(run: Run) -> Figure | None:
    """A bar per stage, what encryption needs in another colour."""
    found = seconds_by_stage(run)
    if not found:
        return None
    drawn, axes = figure(0.95 + 0.27 * len(found))
    axes.set_yticks(range(len(found)), [text(stage, 20) for stage in found])
    axes.invert_yaxis()
    kinds = {"sealing and adding": (COLOURS[0], CRYPTOGRAPHY), "the rest": (LINE, set(found) - set(CRYPTOGRAPHY))}
    for name, (colour, stages) in kinds.items():
        at = [i for i, stage in enumerate(found) if stage in stages]
        if at:
            axes.barh(at, [[*found.values()][i] for i in at], color=colour, height=0.68, label=name)
    top = max(found.values()) or 1.0
    for i, value in enumerate(found.values()):
        axes.text(value + 0.015 * top, i, f"{value:.3g}" if value < 100 else f"{value:.0f}", va="center", fontsize=9)
    axes.set_xlim(0, 1.14 * top)
    axes.set_xlabel("seconds, clients and server together")
    drawn.legend(loc="outside lower center", ncols=2, fontsize=9, handlelength=1.2)
    return drawn


def _plan(coverage: Coverage) -> Figure:
    """A row per layer, a place per code: the darker, the more clients encrypt the column."""
    from matplotlib.colors import LinearSegmentedColormap

    rows = np.array([_binned(row) for row in coverage.shares[:_MOST_LAYERS]])
    drawn, axes = figure(min(11.0, 1.15 + 0.17 * len(rows)))
    red, green, blue = (int(COLOURS[0][i : i + 2], 16) / 255 for i in (1, 3, 5))
    colours = LinearSegmentedColormap.from_list("", [(red, green, blue, 0.07), (red, green, blue, 1.0)])
    frame = (0.0, 100.0, len(rows) - 0.5, -0.5)
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=1, extent=frame)
    step = -(-len(rows) // 60)
    axes.set_yticks(range(0, len(rows), step), coverage.labels[: len(rows) : step], fontsize=7)
    axes.set_xticks([0, 50, 100], ["0", "50 %", "100 %"])
    axes.set_xlabel("column codes of the layer, ascending")
    bar = drawn.colorbar(image, ax=axes, location="bottom", aspect=50, pad=0.02, fraction=0.04)
    bar.set_ticks([0, 0.5, 1], labels=["no client", "half of the clients encrypt it", "all"])
    bar.outline.set_visible(False)
    return drawn


def _binned(row: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A layer's shares on the width that all rows have: means where it is wider, repeated where it is narrower."""
    edges = np.linspace(0, len(row), _MOST_BINS + 1)
    sums = np.interp(edges, np.arange(len(row) + 1), np.concatenate([[0.0], np.cumsum(row)]))
    return np.asarray(np.diff(sums) / np.diff(edges))
