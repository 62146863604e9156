"""Unequal ranks: from an aggregate to what each client holds.

nested: all hold the same components, each trains its own first ones.  pad: each holds its own.  svd: the best
approximation at the client's rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ciphertune.adapter import Adapter, FloatArray, LoraFactors
from ciphertune.errors import FormatError, RangeError
from ciphertune.plan import Factor, Plan
from ciphertune.split import component_size, head_size

# of the largest singular value: what travels has the precision of float32
_NEGLIGIBLE = 1e-6


# The largest weight where clients are weighted by the norm of their update, in units of 1e-6.
LARGEST_NORM = 10**9


@dataclass(frozen=True)
class Contributor:
    """One client's part in a round: its rank, its weight (training samples) and its place among the plan's budgets."""

    rank: int
    samples: int
    tier: int = 0


def divisors(plan: Plan, contributors: Sequence[Contributor], total: int, rank: int) -> npt.NDArray[np.float64]:
    """Divisor per component, shape (rank,), for sums of values weighted by `samples / total`.

    nested: component k is averaged over the clients that train it (see `damped`).  pad: a client without component k
    counts as zero there (HetLoRA, arXiv 2401.06432, section 3.2), so the divisor is the same everywhere. 0 where nobody
    contributed.
    """
    ranks = np.array([c.rank for c in contributors], np.int64)
    weights = np.array([c.samples for c in contributors], np.float64) / total
    order = np.argsort(ranks, kind="stable")
    without = np.searchsorted(ranks[order], np.arange(rank), side="right")  # contributors that lack each component
    if plan.fit_rank == "pad":
        return np.where(without < len(ranks), weights.sum(), 0.0)
    rest = np.append(np.cumsum(weights[order][::-1])[::-1], 0.0)  # weight of those from each place on
    return np.asarray(rest[without])


def to_mean(
    packed: npt.NDArray[np.float64],
    plan: Plan,
    factors: tuple[Factor, ...],
    contributors: Sequence[Contributor],
    total: int,
) -> npt.NDArray[np.float64]:
    """A packed weighted sum, (count,) as `split.pack` packs it -> the packed mean, (count,).

    contributors: all whose updates are in the sum.  total: samples of all clients asked, the denominator of the weights
    in it.  Heads are divided by everybody's weight, components by `divisors`. Raises FormatError when the sum holds
    components that nobody contributed.
    """
    heads, size = head_size(plan), component_size(plan, factors)
    rank = (packed.size - heads) // size if size else 0
    per_component = divisors(plan, contributors, total, rank)
    if not per_component.all():
        raise FormatError("the aggregate holds components that none of its contributors has")
    everyone = sum(c.samples for c in contributors) / total
    return np.asarray(packed / np.concatenate([np.full(heads, everyone), np.repeat(per_component, size)]))


def tier_shares(tiers: Sequence[int], people: Sequence[Contributor], silent: Sequence[bool]) -> tuple[float, ...]:
    """What share of the weight of `people` reaches each tier, in (0, 1], never more than of the tier below.

    Of those of smaller rank the silent ones do not count: what one that sends nothing says of its weight must not
    shrink what the others send.
    """
    found = [1.0]
    for tier in tiers:
        reach = sum(c.samples for c in people if c.rank >= tier)
        below = sum(c.samples for c, is_silent in zip(people, silent, strict=True) if c.rank < tier and not is_silent)
        found.append(min(found[-1], reach / (reach + below)) if reach else found[-1])
    return tuple(found[1:])


def damped(update: Adapter, base: Adapter, tiers: Sequence[int], shares: Sequence[float]) -> Adapter:
    """An update with every component's change since `base` times the share of the clients' weight that trains it.

    Clients of smaller rank hold that component and leave it as it is. `to_mean` averages over the others alone, so with
    this the mean is that of the whole adapters of all: sum of w_i B_i A in a round that shares A.
    base: of the update's rank or a larger one.  tiers: ascending.  shares: of each tier, in (0, 1].
    """
    if all(share == 1 for share in shares):
        return update
    per_tier = np.repeat(np.asarray(shares, np.float64), np.diff([0, *tiers]))[: update.rank]

    def toward(new: FloatArray, old: FloatArray, by: npt.NDArray[np.float64]) -> FloatArray:
        return (old + by * (new.astype(np.float64) - old)).astype(new.dtype)

    layers = {}
    for name, found in update.layers.items():
        old, n = base.layers[name], found.rank
        a, b = toward(found.a, old.a[:n], per_tier[:, None]), toward(found.b, old.b[:, :n], per_tier)
        layers[name] = LoraFactors(a, b, found.scale)
    return Adapter(layers, update.heads)


def update_norm(adapter: Adapter) -> float:
    """The Frobenius norm of all layers' scale * B A together, from the small Gram matrices."""
    square = 0.0
    for f in adapter.layers.values():
        a, b = f.a.astype(np.float64), f.b.astype(np.float64)
        square += f.scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
    return float(np.sqrt(max(0.0, square))) if np.isfinite(square) else float("inf")


def norm_weight(adapter: Adapter) -> int:
    """The weight of a client by the norm of its update, in units of 1e-6 (HetLoRA, arXiv 2401.06432, section 3.2).

    At least 1, at most LARGEST_NORM. Heads are weighted by it as well. Raises RangeError for one that is not finite.
    """
    norm = update_norm(adapter)
    if not np.isfinite(norm):
        raise RangeError("the update holds NaN or infinite values: lower training.learning_rate or look at the data")
    return int(min(LARGEST_NORM, max(1, round(1e6 * norm))))


def reparameterise(q: FloatArray, m: FloatArray, base: LoraFactors) -> LoraFactors:
    """The best factors of ``q @ m`` at the rank and scale of `base` (SHE-LoRA, arXiv 2505.21051; FlexLoRA 2402.11505).

    q: (m, R) with orthonormal columns.  m: (R, n).  With the thin SVD m = U S V^T: B = q U S^(1/2) / scale,
    A = S^(1/2) V^T, cut to the rank. No (m, n) array is formed. A component whose singular value is only rounding would
    stay near zero for ever, its gradient with it: it keeps `base`'s row of A, and gets B = 0.
    """
    u, s, vt = np.linalg.svd(m.astype(np.float64), full_matrices=False)
    alive = int((s[: base.rank] > s[0] * _NEGLIGIBLE).sum()) if s.size else 0
    root = np.sqrt(s[:alive])
    a, b = base.a.astype(np.float64), np.zeros(base.b.shape)
    a[:alive] = root[:, None] * vt[:alive]
    b[:, :alive] = (q.astype(np.float64) @ u[:, :alive]) * root / base.scale
    return LoraFactors(a.astype(base.a.dtype), b.astype(base.b.dtype), base.scale)
