"""What the server asks of a client in one message. Public; it comes over the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ciphertune.errors import FormatError
from ciphertune.plan import Plan


@dataclass(frozen=True)
class Terms:
    """What the parties settled among themselves. With the settings and the model's shapes it makes the plan."""

    tiers: tuple[int, ...]  # of ranks
    budgets: tuple[float, ...]  # of columns to encrypt, where the method negotiates them
    columns: tuple[tuple[int, ...], ...]  # their codes per layer

    @staticmethod
    def of(plan: Plan) -> Terms:
        """The terms in a plan."""
        return Terms(plan.tiers, plan.budgets, plan.columns)

    def plain(self) -> dict[str, Any]:
        """Values for JSON."""
        return {"tiers": self.tiers, "budgets": self.budgets, "columns": self.columns}


@dataclass(frozen=True)
class Announced:
    """An aggregate that comes along: its round, the rank it is cut to, and the terms it was made under."""

    round: int
    rank: int
    terms: Terms


@dataclass(frozen=True)
class Task:
    """One request. Numbers are checked for range only; the plan checks the terms."""

    round: int
    sender: int  # the number the server gave this client
    total: int  # samples of all clients asked
    terms: Terms  # of this round
    base: int  # the round whose mean the server believes this client to hold, -1 for none
    aggregates: tuple[Announced, ...]  # oldest first
    rounds: int
    shares: tuple[float, ...]  # per tier, the weight of the clients asked that reach it, of all their weight


def parse_task(values: Mapping[str, Any]) -> Task:
    """The task in a message. Raises FormatError."""
    try:
        numbers = {k: int(values[k]) for k in ("round", "sender", "total", "base", "rounds")}
        terms = [_terms(t) for t in values["terms"]]
        pairs = [(int(r), int(k), int(i)) for r, k, i in values["aggregates"]]
        if not all(0 <= i < len(terms) for _, _, i in pairs):
            raise ValueError
        aggregates = tuple(Announced(r, k, terms[i]) for r, k, i in pairs)
        shares = tuple(float(x) for x in values["shares"])
        found = Task(terms=terms[0], aggregates=aggregates, shares=shares, **numbers)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FormatError("the server's task is not readable") from error
    counted = (found.round, found.sender, found.rounds, *(x for a in aggregates for x in (a.round, a.rank)))
    if not all(0 <= n < 2**32 for n in counted) or not 0 <= found.total < 2**63:
        raise FormatError("the server's task holds impossible numbers")
    falling = all(1 >= x >= y > 0 for x, y in pairwise((1.0, *shares)))
    if not shares or len(shares) != len(terms[0].tiers) or shares[0] != 1 or not falling:
        raise FormatError("the server's task does not say of each tier what share of the clients' weight reaches it")
    return found


def _terms(values: Mapping[str, Any]) -> Terms:
    return Terms(
        tuple(int(t) for t in values["tiers"]),
        tuple(float(b) for b in values["budgets"]),
        tuple(tuple(int(c) for c in codes) for codes in values["columns"]),
    )
