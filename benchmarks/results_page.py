"""docs/results.md from benchmarks/results/grid/*.json (benchmarks/results.py); written by benchmarks/tables.py."""

from __future__ import annotations

import statistics
from typing import Any

from results import (
    AT_BYTES,
    CAUSAL,
    CLASSIFIER,
    COMMON,
    FEDSHIELD,
    PEERS,
    RANKS,
    RATE,
    RATES,
    RATES_OF,
    ROOT,
    ROUNDS,
    ROWS,
    SETS,
    cells,
    read,
    rows_of,
    words,
)

from ciphertune.settings import compose

Cell = dict[str, Any]

OURS = ("sealed", "she_lora", "fedshield agreed mask")


def _fedshield() -> str:
    """The setting of FedShield-LLM's cell, from what it composes to."""
    found = compose(ROOT / "conf", words(FEDSHIELD, "method=fedshield"))
    model, training, method, people = found.model, found.training, found.method, found.federation.clients
    return (
        f"{len(people)} clients of rank {people[0].rank} on {' and '.join(model.targets)} of the causal model, alpha "
        f"{model.alpha:g}, {model.max_length} tokens, {found.federation.rounds} rounds of {training.steps} steps of "
        f"batch {training.batch_size}, {training.schedule} learning rate from {training.learning_rate:g} to "
        f"{training.learning_rate_end:g}, the instructions divided at random (`experiment=fedshield_llama`). The "
        f"pruning rate rises from {method.prune_start:g} to {method.prune_target:g} over the rounds."
    )


def page() -> str:
    """The whole document."""
    known = {name: read(name) for name in cells()}
    lines = [
        "# All methods on real data",
        "",
        "Made by `python benchmarks/tables.py` from `benchmarks/results/grid/`, which `python benchmarks/results.py "
        "--models FOLDER --data FOLDER` fills. MiniLM-L6 (its own dropout off) with LoRA on query and value, and a "
        "causal model of four million parameters for the instructions (`medical_meadow_small`). Four clients of ranks "
        f"{' or '.join('/'.join(map(str, r)) for r in RANKS.values())}; {ROUNDS} rounds; the data divided at random or "
        "under Dirichlet 0.3 (by label, or the first word of the question). The base model computes in bfloat16, the "
        "adapters in float32. The real server and clients exchange real messages in one process "
        "(`benchmarks/in_process.py`).",
        "",
        "All methods have the same steps, batches, seeds and division, and one learning rate; methods that move one "
        "factor at a time take twice that (`method.rate_factor`). Nothing else was tuned. The metric is the mean over "
        "the clients, each with its own adapter on the common test set, before the adapter is rounded for release; ± "
        "is the standard deviation over the seeds. The learning rates were chosen by the same test sets. Of ranks "
        f"{'/'.join(map(str, RANKS['unequal']))} the components above {sorted(RANKS['unequal'])[-2]} are one client's "
        "alone: methods that average A and B apart neither train nor send them (`federation.min_contributors`); their "
        "clients, but for those of `hetlora`, all hold the others, and each trains its own first ones. Under methods "
        "that average products every client trains all of its rank and refits the sum to it. `flora` runs in float32: "
        "its merges would be lost in the rounding of bfloat16. `dp_lora` protects whole clients, of "
        f"which there are {len(RANKS['unequal'])}.",
        "",
        f"Settings of the classifiers: {_code(CLASSIFIER)}; of the causal model: {_code(CAUSAL)}; of all but "
        f"FedShield-LLM's setting: {_code(COMMON)}, and a learning rate that falls to a fifth.",
    ]
    if any(known.values()):
        lines += [
            "",
            "![every method on every set, division and choice of ranks, and its bytes](results.svg)",
            "",
            "Marks are means over the seeds, lines their standard deviation, the dotted line the base model.",
        ]
    for cell in RATES_OF:
        lines += _rates(cell, known.pop(cell))
    for name, cell in known.items():
        if cell:
            lines += ["", f"## {name.replace('-', ', ')}", "", *_cell(cell)]
        if cell and name == FEDSHIELD:
            lines += ["", _fedshield()]
    missing = {name: [r for r in rows_of(name) if r not in read(name)] for name in cells()}
    whole = [name for name, rows in missing.items() if len(rows) == len(rows_of(name))]
    part = {name: rows for name, rows in missing.items() if rows and name not in whole}
    lines += ["", "## Not run yet", ""]
    lines += [f"- {name.replace('-', ', ')}: {', '.join(f'`{row}`' for row in rows)}" for name, rows in part.items()]
    lines += [f"- whole: {', '.join(name.replace('-', ' ') for name in whole)}"] if whole else []
    return "\n".join([*lines, *([] if whole or part else ["Nothing."])]) + "\n"


def summary() -> list[str]:
    """README's table: one cell of every set."""
    found = {name: read(f"{name}-dirichlet-unequal") for name in SETS}
    known = {name: rows for name, rows in found.items() if rows}
    if not known:
        return ["Not run yet."]
    first = next(iter(known))
    heads = " | ".join(f"{name}: {metric_of(rows)[1]}" for name, rows in known.items())
    lines = [
        f"| Dirichlet 0.3, unequal ranks | {heads} | up per round, {first} | encrypted |",
        "|---|" + "---|" * (len(known) + 2),
    ]
    for row in (r for r in ROWS if r in known[first]):
        shown = []
        for rows in known.values():
            kind = metric_of(rows)[0]
            values = [value_of(s["federated"], kind) for s in rows[row]["seeds"].values()] if row in rows else []
            shown.append(_spread(values, kind) if values else "-")
        one = next(iter(known[first][row]["seeds"].values()))
        sizes = f"{one['bytes_up'] / 1e3:,.0f} kB | {one['encrypted_fraction']:.0%}"
        lines.append(f"| `{row}` | {' | '.join(shown)} | {sizes} |")
    spent = [
        s["seconds_by_stage"] for rows in found.values() for s in rows.get("sealed", {"seeds": {}})["seeds"].values()
    ]
    shares = [(s["seal"] + s["unseal"]) / (sum(s.values()) - s["aggregate"]) for s in spent]
    if shares:
        lines += [
            "",
            f"Of their clients' time {len(shares)} runs of `sealed` spent at most {max(shares):.1%} on cryptography.",
        ]
    return lines


def _rates(cell: str, rows: dict[str, Any]) -> list[str]:
    """How a learning rate was chosen."""
    if not rows:
        return []
    kind, label = metric_of(rows)
    what = cell.removeprefix("rates-")
    rates = RATES[what]
    lines = ["", f"## The learning rate of the {what}", "", f"| {RATES_OF[cell].replace('-', ', ')}: {label} | "]
    lines[-1] += " | ".join(rates) + " |"
    lines.append("|---|" + "---|" * len(rates))
    for method in dict.fromkeys(name.split()[0] for name in rows):
        found = [rows.get(f"{method} {rate}", {"seeds": {}})["seeds"].values() for rate in rates]
        values = [[value_of(s["federated"], kind) for s in seeds] for seeds in found]
        lines.append(f"| `{method}` | " + " | ".join(_spread(v, kind) if v else "-" for v in values) + " |")
    known = [m for m in ("fedavg", "sealed") if all(f"{m} {r}" in rows for r in rates)]
    means = {m: {r: _mean(rows[f"{m} {r}"], kind) for r in rates} for m in known}
    best = min if kind == "loss" else max
    if not known:
        return lines
    alone = "; ".join(f"`{m}` alone is best at {best(found, key=found.__getitem__)}" for m, found in means.items())
    of_both = {r: statistics.fmean(found[r] for found in means.values()) for r in rates}
    both = best(rates, key=of_both.__getitem__)
    gap = abs(of_both[both] - of_both[RATE[what]])
    taken = f"{RATE[what]}, which is worse by {_spread([gap], kind)}" if gap else RATE[what]
    return [*lines, "", f"{alone}. The best mean of both is at {both}; below, all take {taken}."]


def metric_of(rows: dict[str, Any]) -> tuple[str, str]:
    """What a cell is measured by, and how it is shown."""
    known = next(iter(next(iter(rows.values()))["seeds"].values()))["federated"]["metric"]
    return ("accuracy", "accuracy in %") if "accuracy" in known else ("loss", "loss, lower is better")


def _mean(row: dict[str, Any], kind: str) -> float:
    return statistics.fmean(value_of(s["federated"], kind) for s in row["seeds"].values())


def _cell(cell: Cell) -> list[str]:
    rows = {name: cell[name] for name in ROWS if name in cell}
    kind, label = metric_of(rows)
    out = [
        f"| method | {label} | against `fedavg`, same seeds | up per round | down per round | encrypted |",
        "|---|---|---|---|---|---|",
    ]
    base = [value_of(s["base"], kind) for s in next(iter(rows.values()))["seeds"].values()]
    out.append(f"| base model | {_spread(base, kind)} | - | - | - | - |")
    for name, row in rows.items():
        own = {seed: value_of(s["federated"], kind) for seed, s in row["seeds"].items()}
        other = {s: value_of(x["federated"], kind) for s, x in rows.get("fedavg", {"seeds": {}})["seeds"].items()}
        gaps = [own[s] - other[s] for s in own if s in other]
        against = _spread(gaps, kind, sign=True) if gaps and name != "fedavg" else "-"
        one = next(iter(row["seeds"].values()))
        sizes = f"{one['bytes_up'] / 1e3:,.0f} kB | {one['bytes_down'] / 1e3:,.0f} kB | {one['encrypted_fraction']:.0%}"
        out.append(f"| `{name}` | {_spread(list(own.values()), kind)} | {against} | {sizes} |")
    return [*out, *_same_bytes(cell, kind), *_losses(rows, kind)]


def _same_bytes(rows: dict[str, Any], kind: str) -> list[str]:
    """What the peers reach in runs of so many rounds that they move as many bytes as `sealed`."""
    parts = []
    for name in ("sealed", *(f"{peer}{AT_BYTES}" for peer in PEERS)):
        if name in rows:
            runs = list(rows[name]["seeds"].values())
            values = [value_of(s["federated"], kind) for s in runs]
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
        for other in (n for n in rows if n not in OURS):
            pairs = [
                value_of(s["federated"], kind) - value_of(rows[other]["seeds"][seed]["federated"], kind)
                for seed, s in rows[own]["seeds"].items()
                if seed in rows[other]["seeds"]
            ]
            worse = [-p if kind == "accuracy" else p for p in pairs]
            if len(worse) > 1 and statistics.fmean(worse) > statistics.stdev(worse):
                found.append(f"`{own}` to `{other}` by {_spread(worse, kind)}")
    return ["", f"**Loses** (mean of the pairs above their spread): {'; '.join(found)}."] if found else []


def value_of(score: dict[str, Any], kind: str) -> float:
    """A score as the tables show it: the loss, or the share in %."""
    return float(score["loss"] if kind == "loss" else 100 * score["metric"][kind])


def _spread(values: list[float], kind: str, *, sign: bool = False) -> str:
    digits = 3 if kind == "loss" else 1
    shown = f"{statistics.fmean(values):{'+' if sign else ''}.{digits}f}"
    return shown if len(values) < 2 else f"{shown} ± {statistics.stdev(values):.{digits}f}"


def _code(words: tuple[str, ...]) -> str:
    return " ".join(f"`{word}`" for word in words)
