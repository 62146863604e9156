"""Negotiation: which columns the clients of each budget encrypt (SHE-LoRA, arXiv 2505.21051, section on negotiation).

Per layer the budgets are walked upwards in tiers. A tier adds columns named by its own clients (share a), columns named
by most clients (share b) and those most sensitive to anybody (share c), so the sets of growing budgets are nested.

Two differences from the paper. It searches a, b and c by Bayesian optimisation; here all 66 mixes in steps of 0.1 are
tried, which is deterministic. And scores are order-only: a client sends its columns most sensitive first and no score,
so the server's risk is computed on levels (k for the first of k columns, 1 for the last). `own_coverage` is the exact
figure, by scores that only the client has.

Columns are codes here (`crypto/indices.py`): nothing in this file needs to know a column's number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ciphertune.errors import FederationError, FormatError
from ciphertune.plan import column_count
from ciphertune.sensitivity import top

Ints = npt.NDArray[np.int64]

# Tenths of a, b and c, larger a first, then larger b: the first of the best is the one that ties prefer.
_MIXES = np.array([(a, b, 10 - a - b) for a in range(10, -1, -1) for b in range(10 - a, -1, -1)])
_NEVER = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Wish:
    """What one client asks for. `parse_wish` makes it from what came over the wire."""

    name: str
    budget: float
    columns: tuple[Ints, ...]  # per layer: codes, most sensitive first, column_count(n, budget) of them


@dataclass(frozen=True)
class Negotiated:
    """What the clients encrypt, and what each of them gets of what it asked for."""

    budgets: tuple[float, ...]  # ascending, distinct
    columns: tuple[tuple[int, ...], ...]  # per layer: codes; those of budgets[t] are the first column_count(n, it)
    mix: tuple[float, float, float]  # a, b, c
    coverage: Mapping[str, float]  # per client: share of its columns that its tier encrypts; 1 when it asked for none
    risk: Mapping[str, float]  # per client: share of its levels that stay clear; 0 when it asked for none


def parse_wish(name: str, budget: object, values: object, widths: Sequence[int]) -> Wish:
    """The wish of client `name`, from what `json.loads` gave, for layers of `widths` columns.

    Raises FormatError, naming the client and what is wrong, on anything that is not a list of as many codes per layer
    as the budget pays for. Values are not quoted: they are untrusted and may be of any size.
    """
    # A comparison with NaN is false, one with an integer of any size is safe.
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 <= budget <= 1:
        raise FormatError(f"client {name} asks for columns with a budget that is no number from 0 to 1")
    share = float(budget) + 0.0  # -0.0 becomes 0.0
    if not isinstance(values, list):
        raise FormatError(f"client {name} asks for columns in a {type(values).__name__}, not in a list per layer")
    if len(values) != len(widths):
        raise FormatError(f"client {name} has a plan for other layers: {len(values)} of them, expected {len(widths)}")
    columns = []
    for layer, (codes, n) in enumerate(zip(values, widths, strict=True)):
        if fault := _fault(codes, n, column_count(n, share)):
            raise FormatError(f"client {name}, layer number {layer}: {fault}")
        columns.append(np.array(codes, np.int64))
    return Wish(name, share, tuple(columns))


def _fault(codes: object, n: int, count: int) -> str:
    """What is wrong with one layer's codes, empty when nothing is."""
    if not isinstance(codes, list):
        return f"its columns are a {type(codes).__name__}, not a list"
    if len(codes) != count:
        return f"it names {len(codes)} columns, its budget pays for {count}"
    if not all(type(c) is int for c in codes):  # bool is an int too
        return "a column is not a whole number"
    if not all(0 <= c < n for c in codes):
        return f"a column is out of range, want 0 to {n - 1}"
    return "it names a column twice" if len(set(codes)) != len(codes) else ""


class _Layer:
    """The wishes for one layer, as positions in `codes`, the (u,) ascending codes that anybody named."""

    def __init__(self, n: int, wishes: Sequence[Wish], layer: int, budgets: Sequence[float]) -> None:
        self.counts = [column_count(n, b) for b in budgets]
        self.codes = np.unique(np.concatenate([w.columns[layer] for w in wishes]))
        self.named = [np.searchsorted(self.codes, w.columns[layer]) for w in wishes]
        number, best = self._votes(self.named)
        ties = np.arange(self.codes.size)  # ascending codes
        self.common = np.lexsort((ties, best, -number))
        self.sensitive = np.lexsort((ties, -number, best))
        self.clients = []
        for budget in budgets:
            number, best = self._votes([x for w, x in zip(wishes, self.named, strict=True) if w.budget == budget])
            self.clients.append(np.lexsort((ties, best, -number))[: np.count_nonzero(number)])

    def _votes(self, named: Sequence[Ints]) -> tuple[Ints, Ints]:
        """How many of `named` hold each code, and its smallest position in one of them; both (u,)."""
        number, best = np.zeros(self.codes.size, np.int64), np.full(self.codes.size, _NEVER, np.int64)
        for at in named:
            number[at] += 1
            best[at] = np.minimum(best[at], np.arange(at.size))
        return number, best

    def walk(self) -> npt.NDArray[np.int32]:
        """The tier at which each mix takes each code, _NEVER for none; shape (mixes, u).

        The last list always suffices: a tier of k columns has a client that names k different ones, so while fewer
        than k are taken, one of the named is left.
        """
        entered = np.full((len(_MIXES), self.codes.size), _NEVER, np.int32)
        before = 0
        for tier, count in enumerate(self.counts):
            step, before = count - before, count
            if step == 0:  # another budget pays for as many
                continue
            left = step - _take(entered, tier, self.clients[tier], _MIXES[:, 0] * step // 10)
            left -= _take(entered, tier, self.common, _MIXES[:, 1] * step // 10)
            _take(entered, tier, self.sensitive, left)
        return entered

    def picked(self, mix: int) -> tuple[int, ...]:
        """The codes that a mix takes, those of lower tiers first, ascending within a tier."""
        entered = self.walk()[mix]
        return tuple(self.codes[np.argsort(entered, kind="stable")[: self.counts[-1]]].tolist())


def _take(entered: npt.NDArray[np.int32], tier: int, order: Ints, most: Ints) -> Ints:
    """Per mix, let the first `most` codes of `order` that are still free enter at `tier`; how many did, (mixes,)."""
    listed = entered[:, order]
    free = listed == _NEVER
    new = free & (np.cumsum(free, axis=1) <= most[:, None])
    entered[:, order] = np.where(new, np.int32(tier), listed)
    return np.asarray(np.count_nonzero(new, axis=1))


def negotiate(widths: Sequence[int], wishes: Sequence[Wish]) -> Negotiated:
    """The columns per layer and tier of budgets, at the mix that is best for the client that gets least.

    a, b and c maximise (smallest coverage - largest risk), compared exactly; of equal ones the largest a, then the
    largest b. The result does not depend on the order of the wishes. Wishes must fit `widths` (see `parse_wish`) and
    have different names, else ValueError. Raises FederationError when there is none.
    """
    if not wishes:
        raise FederationError("no client has asked for columns: nothing to negotiate")
    if len({w.name for w in wishes}) != len(wishes):
        raise ValueError("two wishes have the same name")
    budgets = tuple(sorted({w.budget for w in wishes}))
    layers = [_Layer(n, wishes, i, budgets) for i, n in enumerate(widths)]
    covered, exposed = _shares(layers, [budgets.index(w.budget) for w in wishes])
    worth = [min(c) - max(r) for c, r in zip(covered, exposed, strict=True)]
    best = worth.index(max(worth))
    return Negotiated(
        budgets,
        tuple(layer.picked(best) for layer in layers),
        (float(_MIXES[best, 0] / 10), float(_MIXES[best, 1] / 10), float(_MIXES[best, 2] / 10)),
        {w.name: float(x) for w, x in zip(wishes, covered[best], strict=True)},
        {w.name: float(x) for w, x in zip(wishes, exposed[best], strict=True)},
    )


def _shares(layers: Sequence[_Layer], tiers: Sequence[int]) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
    """Coverage and risk of each client (its tier in `tiers`) under each mix: [mix][client]."""
    hits = np.zeros((len(_MIXES), len(tiers)), np.int64)
    missed = np.zeros_like(hits)
    asked, levels = [0] * len(tiers), [0] * len(tiers)
    for layer in layers:
        entered = layer.walk()
        for i, tier in enumerate(tiers):
            named = layer.named[i]
            inside = entered[:, named] <= tier
            hits[:, i] += np.count_nonzero(inside, axis=1)
            missed[:, i] += ~inside @ np.arange(named.size, 0, -1)
            asked[i] += named.size
            levels[i] += named.size * (named.size + 1) // 2
    covered = [[Fraction(h, a) if a else Fraction(1) for h, a in zip(x, asked, strict=True)] for x in hits.tolist()]
    exposed = [[Fraction(m, s) if s else Fraction(0) for m, s in zip(x, levels, strict=True)] for x in missed.tolist()]
    return covered, exposed


def own_coverage(
    scores: Sequence[npt.NDArray[np.float64]], hidden: Sequence[Sequence[int]], budget: float
) -> tuple[float, float]:
    """A client's exact coverage and risk by its own scores: (share of its columns hidden, share of their score clear).

    Per layer, `scores` are (n,), finite and not negative; `hidden` are the column numbers, not codes, that the client's
    tier encrypts. (1, 0) for a client that asks for nothing; the risk of scores that are all zero is 0.
    """
    hits = asked = 0
    clear = total = 0.0
    for score, columns in zip(scores, hidden, strict=True):
        wanted = top(score, column_count(score.size, budget))
        inside = np.isin(wanted, np.asarray(columns, np.int64))
        hits, asked = hits + int(inside.sum()), asked + wanted.size
        clear, total = clear + float(score[wanted][~inside].sum()), total + float(score[wanted].sum())
    return (hits / asked if asked else 1.0), (clear / total if total else 0.0)
