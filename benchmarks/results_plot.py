"""docs/results.svg: every method on every cell of the grid, and its bytes; written by benchmarks/tables.py."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from results import RANKS, ROWS, SETS, read
from results_page import metric_of, value_of

from ciphertune.report.skeleton import COLOURS, FAINT, LINE, drawing

DIVISIONS = {
    f"{division}-{ranks}": f"{words}, {ranks} ranks"
    for division, words in (("iid", "IID"), ("dirichlet", "Dirichlet 0.3"))
    for ranks in RANKS
}
MARKERS = "o^sD"


def points() -> dict[str, Any]:
    """What is drawn: {set: {division: {method: [a value per seed]}}}, and each method's bytes up in the first set."""
    drawn: dict[str, Any] = {"values": {}, "base": {}, "label": {}, "up": {}}
    for name in SETS:
        for division in DIVISIONS:
            rows = {row: found for row, found in read(f"{name}-{division}").items() if row in ROWS}
            if not rows:
                continue
            kind, drawn["label"][name] = metric_of(rows)
            drawn["values"].setdefault(name, {})[division] = {
                row: [value_of(s["federated"], kind) for s in found["seeds"].values()] for row, found in rows.items()
            }
            seeds = next(iter(rows.values()))["seeds"].values()
            drawn["base"].setdefault(name, statistics.fmean(value_of(s["base"], kind) for s in seeds))
            for row, found in rows.items():
                drawn["up"].setdefault(row, next(iter(found["seeds"].values()))["bytes_up"] / 1e6)
    return drawn


def digest(drawn: dict[str, Any]) -> str:
    """Of the figures drawn: two versions of matplotlib write the same picture in other words."""
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def is_current(path: Path) -> bool:
    """Whether the file shows today's results."""
    found = re.search(r"of results ([0-9a-f]{64})", path.read_text(encoding="utf-8")) if path.is_file() else None
    return bool(found) and found[1] == digest(points())


def plot(path: Path) -> None:
    """A panel per set, a line per method, a mark per cell with its standard deviation over the seeds."""
    from matplotlib.figure import Figure

    drawn = points()
    names = [row for row in ROWS if row in drawn["up"]]
    at = np.arange(len(names), dtype=float)
    with drawing():
        figure = Figure(figsize=(13, 0.42 * len(names) + 1.6), layout="constrained", facecolor="white")
        axes = figure.subplots(1, len(drawn["values"]) + 1, sharey=True, squeeze=False)[0]
        for axis, (name, divisions) in zip(axes, drawn["values"].items(), strict=False):
            axis.axvline(drawn["base"][name], color=FAINT, linestyle=":", linewidth=1, label="base model")
            for shift, (division, words) in enumerate(DIVISIONS.items()):
                values = divisions.get(division, {})
                own = [row for row in names if row in values]
                axis.errorbar(
                    [statistics.fmean(values[row]) for row in own],
                    [at[names.index(row)] + 0.18 * (shift - 1.5) for row in own],
                    xerr=[statistics.stdev(values[row]) if len(values[row]) > 1 else 0.0 for row in own],
                    fmt=MARKERS[shift], color=COLOURS[shift], markersize=4, linewidth=1, label=words,
                )  # fmt: skip
            axis.set_title(name)
            axis.set_xlabel(drawn["label"][name])
        axes[-1].barh(at, [drawn["up"][row] for row in names], color=FAINT, height=0.5)
        axes[-1].set_title("bytes up")
        axes[-1].set_xlabel(f"MB per client and round, {next(iter(drawn['values']))}")
        axes[0].set_yticks(at, names)
        axes[0].invert_yaxis()
        for axis in axes:
            axis.grid(axis="x", color=LINE)
            axis.set_axisbelow(True)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figure.savefig(
            path,
            format="svg",
            metadata={"Date": None, "Description": f"Made by benchmarks/tables.py of results {digest(drawn)}"},
        )
