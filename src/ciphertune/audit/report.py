"""The audit's outcome: values for JSON, and the rule by which it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ciphertune.audit.membership import FEWEST, Membership
from ciphertune.audit.view import View


@dataclass(frozen=True)
class Row:
    """One form of one attack on one update, or on all of a client's (round None)."""

    name: str
    form: str
    round: int | None
    node: str | None
    batch: int | None
    recall: float
    rouge1: float | None
    rouge2: float | None
    chance: float
    note: str = ""

    @property
    def over(self) -> float:
        """Recall over chance."""
        return self.recall - self.chance


@dataclass(frozen=True)
class Report:
    """What `ciphertune audit` found."""

    attacks: Sequence[Row]
    membership: Membership | None
    metadata: Sequence[str]
    verdict: str
    clear_tensors: int
    max_recall: float | None
    passed: bool

    def plain(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "attacks": [asdict(r) for r in self.attacks],
            "membership": asdict(self.membership) if self.membership else None,
            "metadata": list(self.metadata),
            "verdict": self.verdict,
            "clear_tensors": self.clear_tensors,
            "max_recall": self.max_recall,
            "passed": self.passed,
        }


def judge(
    view: View, rows: Sequence[Row], membership: Membership | None, metadata: Sequence[str], max_recall: float | None
) -> Report:
    """Fails where a method that says it encrypts everything shows a tensor, where a message cannot be explained, or an
    attack reads more than `max_recall` over chance.
    """
    worst = max(rows, key=lambda r: r.over, default=None)
    exposed = view.says_encrypted and view.clear_tensors > 0
    over = max_recall is not None and worst is not None and worst.over > max_recall
    said = []
    if exposed:
        said.append(f"the settings say that everything is encrypted, but {_first_readable(view)} can be read")
    elif view.broken:
        said.append(f"{len(view.broken)} messages do not decode: {_first_readable(view)}")
    if not view.clear_tensors:
        said.append("nothing to attack: 0 clear tensors")
    elif worst is not None:
        where = "all rounds" if worst.round is None else f"round {worst.round + 1}"
        said.append(
            f"{worst.name} ({worst.form}) read {worst.recall:.0%} of the tokens of {worst.node} in {where}; "
            f"by chance it would have {worst.chance:.0%}"
        )
    if over:
        said.append(f"that is more than --max-recall {max_recall:g} over chance")
    if membership and min(membership.members, membership.others) < FEWEST:
        metadata = [*metadata, f"membership was inferred on fewer than {FEWEST} texts a side: mind the interval"]
    passed = not (exposed or over or view.broken)
    return Report(tuple(rows), membership, tuple(metadata), "; ".join(said), view.clear_tensors, max_recall, passed)


def _first_readable(view: View) -> str:
    if view.broken:
        where, why = next(iter(view.broken.items()))
        return f"round/client {where} ({why})"
    one = next(s for s in view.seen if s.clear_tensors)
    name = next(n for n in one.tensors() if not n.endswith(".codes"))
    return f"{name} of {one.node} in round {one.round + 1}"
