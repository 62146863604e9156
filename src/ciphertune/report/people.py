"""Who took part in a run, and what came of it for each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ciphertune.report.figures import CRYPTOGRAPHY
from ciphertune.report.show import duration, natural, share, show
from ciphertune.report.source import Run, mappings, pick, score, text
from ciphertune.runs import number
from ciphertune.scores import size


def clients(run: Run, metric: str) -> list[dict[str, Any]]:
    """Who took part, and what came of it for each, as far as it is known."""
    members = {str(m.get("name")): m for m in mappings(run.plan.get("members"))}
    nodes = run.summary.get("nodes")
    nodes = {str(k): v for k, v in nodes.items() if isinstance(v, Mapping)} if isinstance(nodes, Mapping) else {}
    lines = defaultdict(list)
    for line in run.lines:
        lines[line["node"]].append(line)
    spoke = {x["node"] for x in run.at(stage="update")}
    known = {n: {**members.get(n, {}), **nodes.get(n, {})} for n in sorted({*members, *nodes, *spoke}, key=natural)}
    return [_client(name, known[name], lines[name], metric) for name in known]


def _client(name: str, known: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    updates = [x for x in lines if x["stage"] == "update"]
    up, down = traffic(known, updates)
    return {
        "name": text(name, 64),
        **{k: number(known.get(k)) for k in ("rank", "budget", "samples")},
        **{k: show(score(known.get(k), metric), metric) for k in ("base", "local", "federated")},
        "updates": len(updates),
        "up": up,
        "down": down,
        "encrypted": share(encrypted(updates)),
        "protection": duration(sum(x.get("seconds", 0) for x in lines if x["stage"] in CRYPTOGRAPHY)),
        "epsilon": number(pick(known, "epsilon", "server")),
    }


def traffic(known: Mapping[str, Any], updates: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Bytes up and down of a client in a round: as the summary has it, else from the updates that were sent so far."""
    shown = []
    for key in ("bytes_up", "bytes_down"):
        each = [x[key] for x in updates if x.get(key)]  # what came down before the first round is nothing
        value = number(known.get(key))
        value = value if value is not None else sum(each) / len(each) if each else None
        shown.append("-" if value is None else size(value))
    return shown[0], shown[1]


def encrypted(updates: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of the values of updates that were encrypted."""
    hidden, clear = (sum(x.get(k, 0) for x in updates) for k in ("values_cipher", "values_clear"))
    return hidden / (hidden + clear) if hidden + clear else None
