"""The top of the page: how the run ended, what it was, and the four figures that a reader wants first."""

from __future__ import annotations

from collections.abc import Mapping

from ciphertune.plan import Plan
from ciphertune.report import figures, plans, words
from ciphertune.report.audited import audit
from ciphertune.report.people import clients, encrypted, traffic
from ciphertune.report.show import count, duration, share, show
from ciphertune.report.source import Run, pick, score, text
from ciphertune.runs import number
from ciphertune.scores import size


def status(run: Run) -> Mapping[str, str]:
    """How the run ended: one word, its kind (good, bad, open), and why."""
    said, reason = text(run.summary.get("status"), 40), text(run.summary.get("reason"), 1000)
    if said == "completed":
        return {"word": said, "kind": "good", "reason": reason}
    if said:
        return {"word": said, "kind": "bad", "reason": reason or "no reason was written down"}
    rounds = len(run.at(stage="round"))
    return {
        "word": "not finished",
        "kind": "open",
        "reason": f"summary.json is missing: the run still goes on, or was cut off after {count(rounds, 'round')}",
    }


def sentence(run: Run, plan: Plan | None) -> str:
    """What was tuned, by whom, for how long, by which method."""
    people, settings = clients(run, "loss"), run.settings
    model = words.folder_name(text(pick(settings, "model", "name")))
    method, crypto = text(pick(settings, "method", "name")), text(pick(settings, "crypto", "backend"))
    ranks = sorted({int(c["rank"]) for c in people if c["rank"] is not None})
    shown = ", ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]} to {ranks[-1]}"
    of_rank = f" of {'rank' if len(ranks) == 1 else 'ranks'} {shown}" if ranks else ""
    kinds = plans.modules(plan)
    targets = f" on {', '.join(kinds) if len(kinds) <= 4 else f'{len(kinds)} kinds of layers'}" if kinds else ""
    steps = number(pick(settings, "training", "steps"))
    each = f" of {count(int(steps), 'step')}" if steps else ""
    done = f"by {count(len(people), 'client')} in {count(len(run.at(stage='round')), 'round')}{each}"
    return (
        f"Base model {model or 'unknown'}, LoRA{of_rank}{targets}, tuned {done if people else 'by nobody'}. "
        f"Method {method or 'unknown'}, encryption {crypto or 'unknown'}."
    )


def cards(run: Run, metric: str) -> list[dict[str, str]]:
    """The four figures that a reader wants first."""
    return [_result(run, metric), _cost(run), _server(run), _audited(run)]


def _result(run: Run, metric: str) -> dict[str, str]:
    final, points = score(run.summary.get("federated"), metric), figures.course(run, metric)
    value = final if final is not None else points[-1][1] if points else None
    if value is None:
        return {"head": "Result", "value": "none", "note": "Nothing was measured.", "kind": ""}
    base, alone = (score(run.summary.get(key), metric) for key in ("base", "local"))
    before = f"{show(base, metric)} → " if base is not None else ""
    what = f"held-out {metric}, " + ("base → federated" if before else "federated")
    what += "" if final is not None else ", before the last round"
    note = what + (f"; each alone {show(alone, metric)}" if alone is not None else "")
    return {"head": "Result", "value": before + show(value, metric), "note": note, "kind": ""}


def _cost(run: Run) -> dict[str, str]:
    talk = [x for x in run.lines if x["stage"] in ("update", "negotiation")]
    total = sum(x.get("bytes_up", 0) + x.get("bytes_down", 0) for x in talk)
    up, down = traffic(run.summary, run.at(stage="update"))
    seconds = number(run.summary.get("seconds")) or sum(x.get("seconds", 0) for x in run.at(stage="round"))
    ways = [f"{up} ↑", f"{down} ↓"]
    note = f"up and down per client and round; {size(total)} and {duration(seconds)} in all"
    return {"head": "Cost", "value": " ".join(w.replace(" ", "\u00a0") for w in ways), "note": note, "kind": ""}


def _server(run: Run) -> dict[str, str]:
    kind, hidden = words.protection(run), encrypted(run.at(stage="update"))
    if hidden is None:
        return {"head": "Encrypted", "value": "nothing sent", "note": "No update left a client.", "kind": ""}
    value = f"{share(hidden)} of the values"
    colour = {"all": "good", "some": "bad", "none": "bad"}.get(kind, "")
    return {"head": "Encrypted", "value": value, "note": words.headline(run), "kind": colour}


def _audited(run: Run) -> dict[str, str]:
    found = audit(run)
    if not found:
        return {"head": "Audit", "value": "not audited", "kind": "",
                "note": "Nobody has attacked this run's messages to see what they give away."}  # fmt: skip
    value, kind = ("passed", "good") if found["passed"] else ("failed", "bad")
    return {"head": "Audit", "value": value, "note": text(found["verdict"], 160), "kind": kind}
