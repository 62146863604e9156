"""docs/results.md from benchmarks/results/grid/*.json (benchmarks/results.py); written by benchmarks/tables.py."""

from __future__ import annotations

import json
import statistics
from typing import Any

from results import (
    AT_BYTES,
    CAUSAL,
    CLASSIFIER,
    COMMON,
    FEDSHIELD,
    GRID,
    PEERS,
    RANKS,
    RATES,
    RATES_CELL,
    ROUNDS,
    ROWS,
    cells,
    rows_of,
)

Cell = dict[str, Any]

OURS = ("sealed", "she_lora", "fedshield agreed mask")
# which plaintext method sums the same numbers
TWINS = {"sealed": "rolora", "she_lora": "flexlora", "full_he": "fedavg", "maskcrypt": "fedavg"}


_FEDSHIELD = (
    "Three clients of rank 32 on query and value of the causal model, alpha 64, 20 rounds of 10 steps, cosine learning "
    "rate, the instructions divided at random (`experiment=fedshield_llama`). The pruning rate rises from 0.2 to 0.5 "
    "over the rounds (`method.prune_schedule=scaled`)."
)


def page() -> str:
    """The whole document."""
    known = {
        name: json.loads((GRID / f"{name}.json").read_text()) for name in cells() if (GRID / f"{name}.json").is_file()
    }
    lines = [
        "# All methods on real data",
        "",
        "Made by `python benchmarks/tables.py` from `benchmarks/results/grid/`, which `python benchmarks/results.py "
        "--models FOLDER --data FOLDER` fills. MiniLM-L6 with LoRA on query and value, and a causal model of four "
        "million parameters for the instructions (`medical_meadow_small`). Four clients of ranks "
        f"{' or '.join('/'.join(map(str, r)) for r in RANKS.values())}; {ROUNDS} rounds; the data divided at random or "
        "under Dirichlet 0.3 (by label, or the first word of the question). The base model computes in bfloat16, the "
        "adapters in float32. The real server and clients exchange real messages in one process "
        "(`benchmarks/in_process.py`).",
        "",
        "All methods have the same steps, batches, seeds and division, and one learning rate; methods that move one "
        "factor at a time take twice that (`method.rate_factor`). Nothing else was tuned. The metric is the mean over "
        "the clients, each with its own adapter on the common test set; ± is the standard deviation over the seeds.",
        "",
        f"Settings of the classifiers: {_code(CLASSIFIER)}; of the causal model: {_code(CAUSAL)}; of all: "
        f"{_code(COMMON)}.",
    ]
    lines += _rates(known.pop(RATES_CELL, {"rows": {}})["rows"])
    for name, cell in known.items():
        if cell["rows"]:
            lines += ["", f"## {name.replace('-', ', ')}", "", *_cell(cell)]
        if cell["rows"] and name == FEDSHIELD:
            lines += ["", _FEDSHIELD]
    missing = {name: [r for r in rows_of(name) if r not in known.get(name, {"rows": {}})["rows"]] for name in cells()}
    whole = [name for name, rows in missing.items() if len(rows) == len(rows_of(name))]
    part = {name: rows for name, rows in missing.items() if rows and name not in whole}
    lines += ["", "## Not run yet", ""]
    lines += [f"- {name.replace('-', ', ')}: {', '.join(f'`{row}`' for row in rows)}" for name, rows in part.items()]
    lines += [f"- whole: {', '.join(name.replace('-', ' ') for name in whole)}"] if whole else []
    return "\n".join([*lines, *([] if whole or part else ["Nothing."])]) + "\n"


def _rates(rows: dict[str, Any]) -> list[str]:
    """How the classifiers' learning rate was chosen."""
    if not rows:
        return []
    lines = ["", "## The learning rate of the classifiers", "", "| sst2, iid, unequal ranks: accuracy in % | "]
    lines[-1] += " | ".join(RATES) + " |"
    lines.append("|---|" + "---|" * len(RATES))
    for method in dict.fromkeys(name.split()[0] for name in rows):
        found = [rows.get(f"{method} {rate}", {"seeds": {}})["seeds"].values() for rate in RATES]
        values = [[_value(s["federated"], "accuracy") for s in seeds] for seeds in found]
        lines.append(f"| `{method}` | " + " | ".join(_spread(v, "accuracy") if v else "-" for v in values) + " |")
    means = {r: _mean_accuracy(rows, f"fedavg {r}") for r in RATES if f"fedavg {r}" in rows}
    best = max(means, key=means.__getitem__)
    rate = next(word.partition("=")[2] for word in CLASSIFIER if word.startswith("training.learning_rate="))
    return [*lines, "", f"`fedavg` is best at {best}; the classifiers below take {rate}."]


def _mean_accuracy(rows: dict[str, Any], name: str) -> float:
    return statistics.fmean(_value(s["federated"], "accuracy") for s in rows[name]["seeds"].values())


def _cell(cell: Cell) -> list[str]:
    rows = {name: cell["rows"][name] for name in ROWS if name in cell["rows"]}
    kind = "accuracy" if "accuracy" in next(iter(rows.values()))["seeds"]["0"]["federated"]["metric"] else "loss"
    label = "accuracy in %" if kind == "accuracy" else "loss"
    out = [
        f"| method | {label} | against `fedavg`, same seeds | up per round | down per round | encrypted |",
        "|---|---|---|---|---|---|",
    ]
    base = [_value(s["base"], kind) for s in next(iter(rows.values()))["seeds"].values()]
    out.append(f"| base model | {_spread(base, kind)} | - | - | - | - |")
    for name, row in rows.items():
        own = {seed: _value(s["federated"], kind) for seed, s in row["seeds"].items()}
        other = {s: _value(x["federated"], kind) for s, x in rows.get("fedavg", {"seeds": {}})["seeds"].items()}
        gaps = [own[s] - other[s] for s in own if s in other]
        against = _spread(gaps, kind, sign=True) if gaps and name != "fedavg" else "-"
        one = next(iter(row["seeds"].values()))
        sizes = f"{one['bytes_up'] / 1e3:,.0f} kB | {one['bytes_down'] / 1e3:,.0f} kB | {one['encrypted_fraction']:.0%}"
        out.append(f"| `{name}` | {_spread(list(own.values()), kind)} | {against} | {sizes} |")
    return [*out, *_same_bytes(cell["rows"], kind), *_losses(rows, kind)]


def _same_bytes(rows: dict[str, Any], kind: str) -> list[str]:
    """What the peers reach in runs of so many rounds that they move as many bytes as `sealed`."""
    parts = []
    for name in ("sealed", *(f"{peer}{AT_BYTES}" for peer in PEERS)):
        if name in rows:
            runs = list(rows[name]["seeds"].values())
            values = [_value(s["federated"], kind) for s in runs]
            spent = statistics.fmean(s["course"][-1][1] for s in runs) / 1e6
            rounds = runs[0]["course"][-1][0]
            parts.append(
                f"`{name.removesuffix(AT_BYTES)}` {_spread(values, kind)} ({rounds} rounds, {spent:.1f} MB per client)"
            )
    return ["", f"At the bytes that `sealed` moves: {'; '.join(parts)}."] if len(parts) > 1 else []


def _losses(rows: dict[str, Any], kind: str) -> list[str]:
    """Where a method of ours is worse than another of the table, by more than the spread of the pairs."""
    found = []
    for own in (n for n in OURS if n in rows):
        for other in (n for n in rows if n not in OURS and n != TWINS.get(own)):
            pairs = [
                _value(s["federated"], kind) - _value(rows[other]["seeds"][seed]["federated"], kind)
                for seed, s in rows[own]["seeds"].items()
                if seed in rows[other]["seeds"]
            ]
            worse = [-p if kind == "accuracy" else p for p in pairs]
            if len(worse) > 1 and statistics.fmean(worse) > statistics.stdev(worse):
                found.append(f"`{own}` to `{other}` by {_spread(worse, kind)}")
    return ["", f"**Loses** (mean of the pairs above their spread): {'; '.join(found)}."] if found else []


def _value(score: dict[str, Any], kind: str) -> float:
    return float(score["loss"] if kind == "loss" else 100 * score["metric"][kind])


def _spread(values: list[float], kind: str, *, sign: bool = False) -> str:
    digits = 3 if kind == "loss" else 1
    shown = f"{statistics.fmean(values):{'+' if sign else ''}.{digits}f}"
    return shown if len(values) < 2 else f"{shown} ± {statistics.stdev(values):.{digits}f}"


def _code(words: tuple[str, ...]) -> str:
    return " ".join(f"`{word}`" for word in words)
