"""A comparison for people: its table as Markdown, and with charts as one HTML page that needs no network."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ciphertune.comparison import SHARES, STAGES, deviation, metric_names, table
from ciphertune.report.skeleton import COLOURS, PANEL, drawing, figure, render, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # 8 markers and 7 colours: 56 rows differ
_LINES = ("-", "--", "-.", ":")
_HATCHES = ("", "///", "\\\\\\", "xxx", "---", "|||", "+++", "//")  # lines: circles would make a page of megabytes


def page(found: Mapping[str, Any]) -> str:
    """The results as one HTML page. Everything from the user is escaped; the page may load nothing."""
    about = found["about"]
    header, lines = table(found)
    return render(
        "compare.html",
        title=about["name"],
        header=header,
        lines=lines,
        notes=notes(found),
        charts=charts(found),
        common=" ".join(about["overrides"]),
        own=[(name, " ".join(row["overrides"])) for name, row in found["rows"].items()],
        made=", ".join(f"{name} {version}" for name, version in about["versions"].items()),
    )


def markdown(found: Mapping[str, Any]) -> str:
    """The table, how to read it, and what was asked for."""
    header, lines = table(found)
    rule = ["---", *["---:"] * (len(header) - 1)]
    text = "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in (header, rule, *lines))
    own = "\n".join(f"- {_escaped(n)}: {_escaped(' '.join(r['overrides']))}" for n, r in found["rows"].items())
    about = found["about"]
    common = f"Overrides of all rows: {_escaped(' '.join(about['overrides'])) or 'none'}. Of each row:\n\n{own}"
    return "\n\n".join([f"# {_escaped(about['name'])}", text, *notes(found), common]) + "\n"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is: row names come from the user."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)


def notes(found: Mapping[str, Any]) -> list[str]:
    """How to read the table, in sentences."""
    about = found["about"]
    seeds, done = about["seeds"], f"{about['completed']} of {about['runs']} runs are finished."
    spread = "Mean ± sample standard deviation over seeds" if len(seeds) > 1 else "One seed, so no deviation; seed"
    return [
        f"{spread} {', '.join(map(str, seeds))}. Under one seed all rows have the same division of the data and the "
        f"same first adapter, unless a row's own overrides say otherwise. {done}",
        "Bytes are those of one client in one round. Seconds are those of the rounds on this machine, without start, "
        "last evaluation and training alone; they compare methods only when nothing else ran beside them.",
    ]


def charts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Title and inline SVG of each chart; none while no run is finished."""
    rows = {name: row for name, row in found["rows"].items() if row["seeds"]}
    if not rows:
        return []
    metric = next(iter(metric_names(found)), "loss")
    label = f"held-out {metric}" + (" (%)" if metric in SHARES else "")
    # a row keeps its colour and marker while others are still to come
    place = {name: index for index, name in enumerate(found["rows"])}
    with drawing():
        drawn = [
            (f"{label} against round", _curves(rows, place, metric, label, by_bytes=False)),
            (f"{label} against MB per client", _curves(rows, place, metric, label, by_bytes=True)),
            ("seconds by stage", _stage_bars(rows)),
            ("values that travelled encrypted", _encrypted_bars(rows)),
        ]
        return [(title, svg(one, f"c{number}", title)) for number, (title, one) in enumerate(drawn)]


def _course(row: Mapping[str, Any], metric: str) -> list[tuple[int, float, float, float]]:
    """Round, MB per client, mean and deviation of the metric: the rounds before which every seed measured it."""
    points, scale = [], 100.0 if metric in SHARES else 1.0
    for same in zip(*(run["rounds"] for run in row["seeds"].values()), strict=False):
        measured = [x["loss"] if metric == "loss" else (x["metric"] or {}).get(metric) for x in same]
        values = [value for value in measured if value is not None]
        if len(values) == len(measured):
            spread = scale * (deviation(values) or 0.0)
            bytes_ = statistics.fmean(x["bytes_so_far"] for x in same)
            points.append((same[0]["round"], bytes_ / 1e6, scale * statistics.fmean(values), spread))
    return points


def _curves(rows: Mapping[str, Any], place: Mapping[str, int], metric: str, label: str, *, by_bytes: bool) -> Figure:
    """A line per row, with a marker where it was measured and a band of one deviation."""
    from matplotlib.ticker import MaxNLocator

    # a legend entry may not begin with an underscore, so the names are given one by one and made harmless
    names = ["\u200b" + textwrap.shorten(name, 44, placeholder="…") for name in rows]
    drawn, axes = figure(3.3 + 0.2 * -(-len(rows) // (1 if max(map(len, names)) > 18 else 3)))
    lines = []
    for name, row in rows.items():
        index, points = place[name], _course(row, metric)
        x = [p[1] if by_bytes else p[0] for p in points]
        low, high = [p[2] - p[3] for p in points], [p[2] + p[3] for p in points]
        colour = COLOURS[index % len(COLOURS)]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        style: dict[str, Any] = {"marker": _MARKERS[index % len(_MARKERS)], "linestyle": _LINES[index % len(_LINES)]}
        lines += axes.plot(x, [p[2] for p in points], color=colour, markersize=5, linewidth=1.6, **style)
    if not by_bytes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("MB per client, up and down" if by_bytes else "rounds done")
    axes.set_ylabel(label)
    axes.grid(alpha=0.7)
    drawn.legend(lines, names, loc="outside lower center", ncols=1 if max(map(len, names)) > 18 else 3, frameon=False)
    return drawn


def _stage_bars(rows: Mapping[str, Any]) -> Figure:
    """A bar per row: the mean over seeds of the seconds spent in each stage."""
    drawn, axes = _bars(rows, extra=0.9)
    found = {stage for row in rows.values() for run in row["seeds"].values() for stage in run["seconds_by_stage"]}
    stages = [s for s in STAGES if s in found] + sorted(found - set(STAGES))
    left = [0.0] * len(rows)
    for index, stage in enumerate(stages):
        runs = [row["seeds"].values() for row in rows.values()]
        values = [statistics.fmean(run["seconds_by_stage"].get(stage, 0.0) for run in one) for one in runs]
        style: dict[str, Any] = {"hatch": _HATCHES[index % len(_HATCHES)], "edgecolor": PANEL, "linewidth": 0}
        colour = COLOURS[index % len(COLOURS)]
        axes.barh(range(len(rows)), values, left=left, height=0.65, color=colour, label=stage, **style)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_xlabel("seconds, clients and server together")
    drawn.legend(loc="outside lower center", ncols=4, frameon=False)
    return drawn


def _encrypted_bars(rows: Mapping[str, Any]) -> Figure:
    """A bar per row, with its figure beside it."""
    drawn, axes = _bars(rows)
    values = [100 * row["mean"]["encrypted_fraction"] for row in rows.values()]
    axes.barh(range(len(rows)), values, height=0.65, color=COLOURS[0])
    for index, value in enumerate(values):
        axes.text(value + 1, index, f"{value:.3g}%", va="center")
    axes.set_xlim(0, 115)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("% of the values")
    return drawn


def _bars(rows: Mapping[str, Any], extra: float = 0.0) -> tuple[Figure, Axes]:
    names = ["\n".join(textwrap.wrap(textwrap.shorten(name, 44, placeholder="…"), 18)) for name in rows]
    drawn, axes = figure(1.0 + extra + 0.45 * len(rows))
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()  # the first row on top
    return drawn, axes
