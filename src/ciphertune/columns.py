"""The layout of a product's messages: which columns of A are secret, and in which order everything travels.

Columns travel in the order of their codes (`crypto/indices.py`), so the server never sees a column number. A budget's
columns are the first ones of the plan's list, so budgets are nested; slots are filled tier by tier, over all layers:

    update, clear      per layer: B scaled (m, r) | clear columns of A weighted (r, n - hidden)
    update, secret     heads | component 0: tier 0 of all layers, tier 1 of all layers, ... | component 1: ...
    aggregate, clear   per layer: Q (m, R) | clear columns of M (R, n - hidden)
    aggregate, secret  heads | row 0 of M: as a component of an update | row 1 ...

A client of a smaller budget fills a prefix of each component's slots. Each component, and the heads, has ciphertexts
of its own. The aggregate of a layer is Q M; hidden are then the columns of the largest budget among its contributors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ciphertune.adapter import Adapter, FloatArray
from ciphertune.plan import Plan
from ciphertune.ranks import Contributor
from ciphertune.split import Counts, Vector, check_shape, cut, head_size, pack_heads

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Slots:
    """What the slots of one component hold, in order: the layer's index in the plan, and the column's code."""

    layer: Codes  # (count,)
    code: Codes  # (count,)


def slots(plan: Plan, tier: int) -> Slots:
    """Slots of one component of a client of this tier of budgets; those of a lower tier are a prefix."""
    layers: list[Codes] = []
    codes: list[Codes] = []
    before = (0,) * len(plan.layers)
    for t in range(tier + 1 if plan.budgets else 0):
        now = plan.hidden(t)
        for i, (low, high) in enumerate(zip(before, now, strict=True)):
            layers.append(np.full(high - low, i, np.int64))
            codes.append(np.array(plan.columns[i][low:high], np.int64))
        before = now
    return Slots(_joined(layers), _joined(codes))


def clear_codes(plan: Plan, tier: int) -> list[Codes]:
    """Per layer: the codes of the columns that a client of this tier sends in the clear, ascending."""
    hidden = plan.hidden(tier)
    codes = plan.columns or ((),) * len(plan.layers)
    return [
        np.setdiff1d(np.arange(x.n), np.array(c[:h], np.int64))
        for x, c, h in zip(plan.layers, codes, hidden, strict=True)
    ]


def basis_ranks(plan: Plan, contributors: Sequence[Contributor]) -> tuple[int, ...]:
    """R per layer: the columns of Q and rows of M of an aggregate."""
    total = sum(c.rank for c in contributors)
    if plan.aggregate == "stack":
        return (total,) * len(plan.layers)
    cap = min(total, plan.rank_cap) if plan.rank_cap else total
    return tuple(min(x.m, cap) for x in plan.layers)


def update_counts(plan: Plan, who: Contributor) -> Counts:
    """(clear, secret) values of each segment of an update."""
    hidden = plan.hidden(who.tier)
    clear = [who.rank * size for x, h in zip(plan.layers, hidden, strict=True) for size in (x.m, x.n - h)]
    return tuple(clear), (head_size(plan), *(sum(hidden),) * (0 if plan.select == "dropped" else who.rank))


def aggregate_tier(plan: Plan, contributors: Sequence[Contributor]) -> int:
    """The tier whose columns are secret in an aggregate: the largest of its contributors; -1 where none are."""
    return -1 if plan.select == "dropped" else max(c.tier for c in contributors)


def aggregate_counts(plan: Plan, contributors: Sequence[Contributor]) -> Counts:
    """(clear, secret) values of each segment of an aggregate."""
    hidden, basis = plan.hidden(aggregate_tier(plan, contributors)), basis_ranks(plan, contributors)
    clear = [r * size for x, h, r in zip(plan.layers, hidden, basis, strict=True) for size in (x.m, x.n - h)]
    return tuple(clear), (head_size(plan), *(sum(hidden),) * max(basis, default=0))


@dataclass(frozen=True)
class Factors:
    """One layer as the server works on it, columns of the right factor by code: left (m, r), right (r, n - hidden)."""

    left: Vector
    right: Vector


def split_columns(adapter: Adapter, plan: Plan, tier: int, codes: Sequence[Codes], weight: float) -> list[list[Vector]]:
    """An update's (clear, secret) segments: B times its scale, A and the heads times `weight`.

    codes: per layer, the code of each column, shape (n,). Raises PlanMismatchError for an adapter of another shape.
    """
    check_shape(adapter, plan)
    found = [adapter.layers[x.name] for x in plan.layers]
    by_code = [in_code_order(f.a.astype(np.float64) * weight, c) for f, c in zip(found, codes, strict=True)]
    clear: list[Vector] = []
    for factors, a, shown in zip(found, by_code, clear_codes(plan, tier), strict=True):
        clear += [np.ravel(factors.b.astype(np.float64) * factors.scale), np.ravel(a[:, shown])]
    where = slots(plan, tier)
    rows = np.zeros((0 if plan.select == "dropped" else adapter.rank, where.code.size))
    for i, a in enumerate(by_code):
        here = where.layer == i
        rows[:, here] = a[: rows.shape[0], where.code[here]]
    return [clear, [pack_heads(adapter, plan) * weight, *rows]]


def read_clear(values: Vector, plan: Plan, ranks: Sequence[int], tier: int) -> list[Factors]:
    """The clear part of an update (one rank for all layers) or of an aggregate (R per layer)."""
    shapes = [
        shape
        for x, h, r in zip(plan.layers, plan.hidden(tier), ranks, strict=True)
        for shape in ((x.m, r), (r, x.n - h))
    ]
    pieces = cut(values, tuple(a * b for a, b in shapes))
    shaped = [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    return [Factors(left, right) for left, right in zip(shaped[::2], shaped[1::2], strict=True)]


def join_columns(clear: Sequence[Factors], rows: Vector, plan: Plan, tier: int) -> list[Vector]:
    """M per layer, columns by code, shape (R, n): the clear columns and the decrypted rows, shape (R, slots)."""
    where, out = slots(plan, tier), []
    for i, (layer, found, shown) in enumerate(zip(plan.layers, clear, clear_codes(plan, tier), strict=True)):
        m = np.zeros((found.right.shape[0], layer.n))
        m[:, shown] = found.right
        here = where.layer == i
        m[:, where.code[here]] = rows[: m.shape[0], here]
        out.append(m)
    return out


def in_code_order(a: FloatArray, codes: Codes) -> FloatArray:
    """Columns of a, (r, n), moved from their numbers to their codes: column j is at codes[j], codes being (n,)."""
    out = np.empty_like(a)
    out[:, codes] = a
    return out


def in_column_order(a: FloatArray, codes: Codes) -> FloatArray:
    """The inverse of `in_code_order`: of (r, n) by code, column j is the one at codes[j]."""
    return a[:, codes]


def _joined(arrays: Sequence[Codes]) -> Codes:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
