"""The plan of a run for people: which columns are encrypted by how many, who shares which components."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ciphertune.errors import FormatError
from ciphertune.plan import Plan
from ciphertune.report.source import Run, mappings, pick, text
from ciphertune.runs import number


@dataclass(frozen=True)
class Coverage:
    """Per layer: its name, and for every column, by code, the share of the clients that encrypt it, shape (n,)."""

    labels: list[str]
    shares: list[npt.NDArray[np.float64]]


def read_plan(run: Run) -> Plan | None:
    """The plan, checked as one that came over the wire; what an older version did not have is as by default."""
    defaults = {f.name: f.default for f in fields(Plan) if f.default is not MISSING}
    try:
        return Plan.from_json(json.dumps(defaults | dict(run.plan))) if run.plan else None
    except FormatError:
        return None


def coverage(run: Run, plan: Plan | None) -> Coverage | None:
    """What is encrypted of which column, where the clients negotiated it."""
    budgets = [b for m in mappings(run.plan.get("members")) if (b := number(m.get("budget"))) is not None]
    if plan is None or not plan.budgets or not budgets:
        return None
    tiers = [plan.tier(b) for b in budgets if b <= plan.budgets[-1]]
    hidden = [plan.hidden(t) for t in tiers]
    shares = []
    for i, (layer, codes) in enumerate(zip(plan.layers, plan.columns, strict=True)):
        row = np.zeros(layer.n)
        for counts in hidden:
            row[list(codes[: counts[i]])] += 1 / len(budgets)
        shares.append(row)
    return Coverage(short([x.name for x in plan.layers]), shares)


def short(names: Sequence[str]) -> list[str]:
    """Layer names without the beginning that all of them have."""
    parts = [n.split(".") for n in names]
    same = next((i for i, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1), 0)
    return [text(".".join(p[same:]), 40) for p in parts]


def modules(plan: Plan | None) -> list[str]:
    """The kinds of modules that are adapted, such as q_proj, in order."""
    return list(dict.fromkeys(text(x.name.rpartition(".")[2], 40) for x in plan.layers)) if plan else []


def wishes(run: Run) -> list[Mapping[str, Any]]:
    """Per client: its budget, and the coverage and risk that the last negotiation gave it, None where not known."""
    found = run.plan.get("negotiation")
    return [
        {
            "name": text(member.get("name")),
            "budget": number(member.get("budget")),
            "coverage": number(pick(found, "coverage", str(member.get("name")))),
            "risk": number(pick(found, "risk", str(member.get("name")))),
        }
        for member in mappings(run.plan.get("members"))
    ]


def components(run: Run, plan: Plan | None) -> list[tuple[str, int]]:
    """Which components are averaged over how many clients, lowest first; none where updates are summed."""
    if plan is None or plan.aggregate != "separate" or plan.share == "none":
        return []
    ranks = [int(r) for m in mappings(run.plan.get("members")) if (r := number(m.get("rank"))) is not None]
    below, rows = 0, []
    for tier in plan.tiers:
        rows.append((f"{below + 1} to {tier}" if tier > below + 1 else f"{tier}", sum(r >= tier for r in ranks)))
        below = tier
    if ranks and max(ranks) > below:
        rows.append((f"above {below}", 0))
    return rows
