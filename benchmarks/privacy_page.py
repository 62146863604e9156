"""docs/privacy.md from benchmarks/results/privacy.json (benchmarks/privacy.py); written by benchmarks/tables.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from privacy import (
    BATCHES,
    COMMON,
    GRADIENT_BATCHES,
    GRADIENT_RANKS,
    HIDDEN,
    LENGTHS,
    MEMBER_BATCH,
    MEMBER_STEPS,
    MEMBERS,
    METHODS,
    OUT,
    ROUNDS,
    SEEDS,
    STEPS,
    cells,
)

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
        "benchmarks/privacy.py --models FOLDER --data FOLDER` fills. It measures four attacks, not all there could "
        "be: what is read here can be read, what is not read here may be read by a better attack. Only where nothing "
        "travels in the clear is there nothing to attack.",
        "",
        "Recall is the share of the distinct tokens of the client's text that an attack names, means over seeds with "
        "their standard deviation; chance is the recall of the same answer against texts that the client never had. "
        f"Seeds {', '.join(map(str, SEEDS))}: none of the attack's constants was chosen while looking at them.",
        "",
        *_gradient(found),
        "## What clients of this package send",
        "",
        "Two clients, two rounds, AdamW, the real messages. Each entry is recall *over chance* in round 1, in round 2, "
        "and of what both rounds name together against the texts of both. In round 1 B starts at zero, so one step "
        "leaves A where it was. `ciphertune audit` prints the same for a run of your own. Settings: "
        f"`{COMMON}`.",
        "",
    ]
    for kind, what in KINDS.items():
        lines += [f"### {what}", ""]
        for attack, title in ATTACKS.items():
            lines += [f"{title}:", "", *_table(found, kind, attack), ""]
        title = "How much of the text in its order: ROUGE-1 / ROUGE-2 (F1) of the adapted span attack in round 2"
        lines += [f"{title}:", "", *_rouge(found, kind), ""]
    lines += _clear(found)
    lines += _membership(found)
    lines += _metadata(found)
    lines += _missing(found)
    return "\n".join(lines) + "\n"


def _gradient(found: dict[str, Rows]) -> list[str]:
    columns = [(r, b) for r in GRADIENT_RANKS for b in GRADIENT_BATCHES]
    lines = [
        "## The gradient of one batch",
        "",
        "The setting of the attack's paper (DAGER, arXiv 2405.15586): gradients of A of the first layer's query and "
        f"value at an adapter that has moved, MiniLM-L6, sentences of {LENGTHS[0]} to {LENGTHS[1]} "
        "tokens. Hidden: columns of A that the "
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


def _head(columns: Sequence[tuple[int, int]]) -> list[str]:
    return [
        "| method | " + " | ".join(f"batch {b}, {k} step{'s' * (k > 1)}" for b, k in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]


def _table(found: dict[str, Rows], kind: str, attack: str) -> list[str]:
    columns = [(b, k) for k in STEPS for b in BATCHES]
    lines = _head(columns)
    for method in METHODS:
        entries = []
        for b, k in columns:
            rows = [x for x in found.get(f"{kind}/{method}/{b}/{k}", []) if x["attack"] == attack]
            rounds = [_spread([x["recall"] - x["chance"] for x in rows if x["round"] == r]) for r in (0, 1, None)]
            # where no round names a token there is nothing to put together
            entries.append(" / ".join(r for r in rounds if r != "-") if rows else "-")
        if any(e != "-" for e in entries):
            lines.append(f"| `{method}` | " + " | ".join(entries) + " |")
    return lines


def _rouge(found: dict[str, Rows], kind: str) -> list[str]:
    columns = [(b, k) for k in STEPS for b in BATCHES]
    lines = _head(columns)
    for method in METHODS:
        entries = []
        for b, k in columns:
            rows = found.get(f"{kind}/{method}/{b}/{k}", [])
            rows = [x for x in rows if x["attack"] == "span adapted" and x["round"] == 1]
            shown = [f"{statistics.mean(x[name] for x in rows):.2f}" for name in ("rouge1", "rouge2") if rows]
            entries.append(" / ".join(shown) or "-")
        if any(e != "-" for e in entries):
            lines.append(f"| `{method}` | " + " | ".join(entries) + " |")
    return lines


def _membership(found: dict[str, Rows]) -> list[str]:
    """How well the finished adapter tells its members."""
    lines = [
        "## What the finished adapter tells: membership",
        "",
        "Whoever gets the adapter, a client too, may ask whether a text was trained on. "
        f"{ROUNDS} rounds of {MEMBER_STEPS} steps, batch {MEMBER_BATCH} (`{MEMBERS}`); members against as many others "
        "by their loss and by Min-K%. AUROC 0.5 is guessing; in brackets the mean ends of the bootstrap's 95 %. "
        "The last column is the base model, before tuning. Encryption does not change what an adapter learned; noise "
        "(`dp_lora`) does.",
        "",
        "| model, method | AUROC of the loss | of Min-K% | found at 1 % false positives | base model |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        for method in METHODS:
            if rows := found.get(f"membership/{kind}/{method}", []):
                low, high = (statistics.mean(x[end] for x in rows) for end in ("low", "high"))
                parts = [_spread([x[name] for x in rows]) for name in ("auroc", "min_k", "tpr_at_1_fpr", "control")]
                parts[0] += f" ({low:.2f} to {high:.2f})"
                lines.append(f"| {KINDS[kind].split(',')[0]}, `{method}` | " + " | ".join(parts) + " |")
    return [*lines, ""] if lines[-1][:5] != "|---|" else []


def _metadata(found: dict[str, Rows]) -> list[str]:
    """What one run of each method states beside the updates."""
    lines = []
    for method in METHODS:
        rows = found.get(f"membership/encoder/{method}", [])
        if rows:
            lines.append(f"- `{method}`: {'; '.join(rows[0]['facts'])}.")
    if not lines:
        return []
    head = (
        "What the server learns beside the updates, from one run each of the above. Of a run over a network it also "
        "knows addresses, when each reply came, and the seconds and held-out losses that clients report."
    )
    return ["## Metadata", "", head, "", *lines, ""]


def _clear(found: dict[str, Rows]) -> list[str]:
    """Which methods showed nothing, from the numbers."""
    said = []
    for method in METHODS:
        cells_ = {c: rows for c, rows in found.items() if c.split("/")[0] in KINDS and c.split("/")[1] == method}
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
