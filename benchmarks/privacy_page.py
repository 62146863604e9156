"""docs/privacy.md from benchmarks/results/privacy.json (benchmarks/privacy.py); written by benchmarks/tables.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from privacy import BATCHES, COMMON, GRADIENT_BATCHES, GRADIENT_RANKS, HIDDEN, METHODS, OUT, SEEDS, STEPS, cells

Rows = list[dict[str, Any]]

KINDS = {
    "encoder": "MiniLM-L6 on SST-2, LoRA of rank 8 on query and value",
    "causal": "A Llama of 4.2 million parameters on stories, LoRA of rank 8 on query and value",
}
ATTACKS = {
    "span adapted": "The span attack, adapted",
    "span published": "The span attack as published",
    "b_factor adapted": "B alone",
}


def page() -> str:
    """The whole document."""
    found: dict[str, Rows] = json.loads(OUT.read_text())["cells"] if OUT.is_file() else {}
    lines = [
        "# What a server can read, measured",
        "",
        "Made by `python benchmarks/tables.py` from `benchmarks/results/privacy.json`, which `python "
        "benchmarks/privacy.py --models FOLDER --data FOLDER` fills. It measures two attacks, not all that there could "
        "be: what is read here can be read, what is not read here may be read by a better attack. Only where nothing "
        "travels in the clear is there nothing to attack.",
        "",
        "Recall is the share of the distinct tokens of the client's text that an attack names, means over seeds with "
        "their standard deviation; chance is the recall of the same answer against texts that the client never had. "
        "The constants of the adapted attack were chosen while looking at seeds 0 and 1.",
        "",
        *_gradient(found),
        "## What clients of this package send",
        "",
        "Two clients, two rounds, AdamW, the real messages. Each entry is recall *over chance* in round 1, then in "
        "round 2. In round 1 B starts at zero, so one step leaves A where it was. `ciphertune audit` prints the same "
        f"for a run of your own. Settings: `{COMMON}`.",
        "",
    ]
    for kind, what in KINDS.items():
        lines += [f"### {what}", ""]
        for attack, title in ATTACKS.items():
            lines += [f"{title}:", "", *_table(found, kind, attack), ""]
    lines += _clear(found)
    lines += _missing(found)
    return "\n".join(lines) + "\n"


def _gradient(found: dict[str, Rows]) -> list[str]:
    columns = [(r, b) for r in GRADIENT_RANKS for b in GRADIENT_BATCHES]
    lines = [
        "## The gradient of one batch",
        "",
        "The setting of the attack's paper (DAGER, arXiv 2405.15586): gradients of A of the first layer's query and "
        "value at an adapter that has moved, MiniLM-L6, sentences of 14 to 18 tokens. Hidden: columns of A that the "
        "attacker lacks, at random. Recall, and in brackets how much of what was named is true.",
        "",
        "| step, hidden columns, attack | " + " | ".join(f"rank {r}, batch {b}" for r, b in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    kinds = [("sgd", h, f) for h in HIDDEN for f in ("published", "adapted")]
    for optimizer, hidden, form in [*kinds, ("adamw", 0.0, "published"), ("adamw", 0.0, "adapted")]:
        cells_ = []
        for r, b in columns:
            rows = [
                x for x in found.get(f"gradient/{optimizer}/{r}/{b}", []) if x["hidden"] == hidden and x["form"] == form
            ]
            read = _spread([x["recall"] for x in rows])
            cells_.append(f"{read} ({statistics.mean(x['precision'] for x in rows):.2f})" if rows else "-")
        name = "one step of SGD" if optimizer == "sgd" else "one step of AdamW"
        if any(c != "-" for c in cells_):
            lines.append(f"| {name}, {hidden:.2%}, {form} | " + " | ".join(cells_) + " |")
    return [*lines, ""]


def _table(found: dict[str, Rows], kind: str, attack: str) -> list[str]:
    columns = [(b, k) for k in STEPS for b in BATCHES]
    lines = [
        "| method | " + " | ".join(f"batch {b}, {k} step{'s' * (k > 1)}" for b, k in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for method in METHODS:
        entries = []
        for b, k in columns:
            rows = [x for x in found.get(f"{kind}/{method}/{b}/{k}", []) if x["attack"] == attack]
            rounds = [_spread([x["recall"] - x["chance"] for x in rows if x["round"] == r]) for r in (0, 1)]
            entries.append(" / ".join(rounds) if rows else "-")
        if any(e != "-" for e in entries):
            lines.append(f"| `{method}` | " + " | ".join(entries) + " |")
    return lines


def _clear(found: dict[str, Rows]) -> list[str]:
    """Which methods showed nothing, from the numbers."""
    said = []
    for method in METHODS:
        cells_ = {cell: rows for cell, rows in found.items() if cell.split("/")[1] == method}
        if cells_ and not any(x["clear_tensors"] for rows in cells_.values() for x in rows):
            runs = sum(len({x["seed"] for x in rows}) for rows in cells_.values())
            said.append(
                f"`{method}` showed 0 clear tensors in {runs} run{'s' * (runs > 1)}: there was nothing to attack."
            )
    return [" ".join(said), ""] if said else []


def _missing(found: dict[str, Rows]) -> list[str]:
    every = [(c, s) for c in cells() for s in SEEDS]
    lacking = [c for c, s in every if not any(r["seed"] == s for r in found.get(c, []))]
    if not lacking:
        return []
    return [
        f"Not run yet: {len(lacking)} of {len(every)} combinations of cell and seed, `-` or no row. Entries without ± "
        "have one seed: take them for a first look."
    ]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    shown = f"{statistics.mean(values):.2f}"
    return f"{shown} ± {statistics.stdev(values):.2f}" if len(values) > 1 else shown
