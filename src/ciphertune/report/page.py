"""`report.html` of a run: one page that loads nothing, made from what the server wrote into the run folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ciphertune.comparison import shown
from ciphertune.outputs import writing
from ciphertune.plan import Plan
from ciphertune.report import figures, plans, words
from ciphertune.report.audited import audit
from ciphertune.report.cards import cards, sentence, status
from ciphertune.report.people import clients
from ciphertune.report.show import count, share, show
from ciphertune.report.skeleton import render
from ciphertune.report.source import Run, pick, read_run, score, text
from ciphertune.runs import write


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run folder, `report.html` in it unless told otherwise; returns where.

    Raises SettingsError when the folder holds no run or the file cannot be written.
    """
    path = out or folder / "report.html"
    made = page(read_run(folder)).encode(errors="replace")
    with writing(path, "--out"):
        write(path, made)
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
        "components": [(name, count(n, "client") if n else "nobody: they do not train") for name, n in shared],
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


def _overrides(run: Run) -> str:
    """What the run was asked for, without the folders of this machine."""
    asked = text(run.settings.get("overrides"), 4000)
    try:
        return " ".join(shown(word) for word in shlex.split(asked))
    except ValueError:  # cut off in the middle of a quotation
        return ""
