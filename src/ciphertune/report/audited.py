"""What `ciphertune audit` left in a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ciphertune.report.source import Run, mappings, text
from ciphertune.runs import number

_MOST_ATTACKS = 40


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
