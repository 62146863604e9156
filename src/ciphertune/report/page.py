"""`report.html` of a run: one page that loads nothing, made from what the server wrote into the run folder."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ciphertune.comparison import SHARES
from ciphertune.comparison import shown as without_folders
from ciphertune.errors import SettingsError
from ciphertune.plan import Plan
from ciphertune.report import figures, plans, words
from ciphertune.report.skeleton import render
from ciphertune.report.source import Run, mappings, number, pick, read_run, score, text
from ciphertune.runs import write
from ciphertune.scores import size

_MOST_ATTACKS = 40


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run folder, `report.html` in it unless told otherwise; returns where.

    Raises SettingsError when the folder holds no run or the file cannot be written.
    """
    path = out or folder / "report.html"
    made = page(read_run(folder)).encode(errors="replace")
    if path.is_dir():
        raise SettingsError(f"{path} is a folder: name a file with --out")
    try:
        write(path, made)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror}): give another --out") from None
    return path


def page(run: Run) -> str:
    """The whole page as HTML."""
    plan, metric = plans.read_plan(run), figures.metric_of(run)
    covered = plans.coverage(run, plan)
    lost = ["plan.json is damaged or of another version: its columns are not shown."] if run.plan and not plan else []
    return render(
        "report.html",
        title=text(run.settings.get("name")) or text(run.name),
        status=status(run),
        sentence=sentence(run, plan),
        cards=cards(run, metric),
        faults=[*run.faults, *lost],
        metric=metric,
        clients=clients(run, metric),
        everybody={key: show(score(run.summary.get(key), metric), metric) for key in ("base", "local", "federated")},
        figures=figures.figures(run, covered),
        wishes=plans.wishes(run) if covered else [],
        **_plan(run, plan),
        **_privacy(run, plan),
        **_adapter(run),
        overrides=_overrides(run),
        versions=[(text(k), text(v)) for k, v in run.versions.items()],
        share=share,
    )


def _plan(run: Run, plan: Plan | None) -> dict[str, Any]:
    shared = plans.components(run, plan)
    return {
        "layers": len(plan.layers) if plan else 0,
        "modules": plans.modules(plan),
        "components": [
            (name, _count(n, "client") if n else "nobody: each stays with its client") for name, n in shared
        ],
        "dropped": pick(run.settings, "method", "select") == "dropped",
    }


def _privacy(run: Run, plan: Plan | None) -> dict[str, Any]:
    heads = bool(plan and plan.heads)
    return {
        "protection": words.protection(run),
        "seen": words.seen(run, heads=heads),
        "entries": 2 + heads,  # rows of `seen` that are about updates
        "limits": words.limits(run),
        "audit": audit(run),
    }


def _adapter(run: Run) -> dict[str, Any]:
    return {
        "adapters": run.adapters,
        "simulated": run.simulated,
        "completed": run.summary.get("status") == "completed",
        "snippet": words.snippet(run, run.adapters[0] if run.adapters else ""),
        "quantized": pick(run.settings, "model", "quantization") not in (None, "none"),
    }


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
        "reason": f"summary.json is missing: the run still goes on, or was cut off after {_count(rounds, 'round')}",
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
    each = f" of {_count(int(steps), 'step')}" if steps else ""
    done = f"by {_count(len(people), 'client')} in {_count(len(run.at(stage='round')), 'round')}{each}"
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


def clients(run: Run, metric: str) -> list[dict[str, Any]]:
    """Who took part, and what came of it for each, as far as it is known."""
    members = {str(m.get("name")): m for m in mappings(run.plan.get("members"))}
    nodes = run.summary.get("nodes")
    nodes = {str(k): v for k, v in nodes.items() if isinstance(v, Mapping)} if isinstance(nodes, Mapping) else {}
    lines = defaultdict(list)
    for line in run.lines:
        lines[line["node"]].append(line)
    spoke = {x["node"] for x in run.at(stage="update")}
    known = {n: {**members.get(n, {}), **nodes.get(n, {})} for n in sorted({*members, *nodes, *spoke}, key=_natural)}
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
        "protection": duration(sum(x.get("seconds", 0) for x in lines if x["stage"] in figures.CRYPTOGRAPHY)),
        "epsilon": number(pick(known, "epsilon", "server")),
    }


def audit(run: Run) -> dict[str, Any] | None:
    """What `ciphertune audit` found, in the types that the page wants; None where it was not run."""
    found = run.audit
    if found is None:
        return None
    attacks = mappings(found.get("attacks"))
    ranked = sorted(attacks, key=lambda a: number(a.get("recall")) or 0.0, reverse=True)
    member = found.get("membership")
    return {
        "passed": found.get("passed") is True,
        "verdict": text(found.get("verdict"), 1000) or "no verdict was written down",
        "clear_tensors": number(found.get("clear_tensors")),
        "rows": [
            {
                **{k: text(a.get(k), 300) for k in ("name", "form", "node", "note")},
                **{k: number(a.get(k)) for k in ("round", "batch", "recall", "rouge1", "rouge2", "chance")},
            }
            for a in ranked[:_MOST_ATTACKS]
        ],
        "more": max(0, len(attacks) - _MOST_ATTACKS),
        "membership": {k: number(member.get(k)) for k in ("auroc", "low", "high", "tpr_at_1_fpr", "control")}
        if isinstance(member, Mapping)
        else None,
        "metadata": [text(x, 300) for x in found["metadata"]] if isinstance(found.get("metadata"), list) else [],
    }


def show(value: float | None, metric: str) -> str:
    """A score for people."""
    if value is None:
        return "-"
    return f"{value:.1%}" if metric in SHARES else f"{value:.3f}"


def share(value: float | None) -> str:
    """A share of one for people: 1.25 %."""
    return "-" if value is None else f"{100 * value:.3g} %"


def duration(seconds: float) -> str:
    """Seconds for people: 4 min 10 s."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60} s"


def _natural(name: str) -> tuple[str, int, str]:
    """Orders lab-2 before lab-10."""
    head = name.rstrip("0123456789")
    return head, len(name) - len(head), name


def _overrides(run: Run) -> str:
    """What the run was asked for, without the folders of this machine."""
    asked = text(run.settings.get("overrides"), 4000)
    try:
        return " ".join(without_folders(word) for word in shlex.split(asked))
    except ValueError:  # cut off in the middle of a quotation
        return ""


def _count(number_: int, what: str) -> str:
    return f"{number_} {what}" + ("" if number_ == 1 else "s")
