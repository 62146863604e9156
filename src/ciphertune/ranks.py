"""Unequal ranks: what the components of an aggregate are divided by, so that each client gets a mean at its rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ciphertune.errors import FormatError
from ciphertune.plan import Factor, Plan
from ciphertune.split import component_size, head_size


@dataclass(frozen=True)
class Contributor:
    """One client's part in a round: its rank and its weight (training samples)."""

    rank: int
    samples: int


def divisors(plan: Plan, contributors: Sequence[Contributor], total: int, rank: int) -> npt.NDArray[np.float64]:
    """Divisor per component, shape (rank,), for sums of values weighted by `samples / total`.

    nested: component k is averaged over the clients that have it.  pad: a client without component k counts as zero
    there (HetLoRA, arXiv 2401.06432, section 3.2), so the divisor is the same everywhere. 0 where nobody contributed.
    """
    ranks = np.array([c.rank for c in contributors])
    weights = np.array([c.samples for c in contributors], np.float64) / total
    has = ranks[None, :] > np.arange(rank)[:, None]
    if plan.fit_rank == "pad":
        return np.asarray(np.where(has.any(axis=1), weights.sum(), 0.0))
    return np.asarray(np.where(has, weights[None, :], 0.0).sum(axis=1))


def to_mean(
    packed: npt.NDArray[np.float64],
    plan: Plan,
    factors: tuple[Factor, ...],
    contributors: Sequence[Contributor],
    total: int,
) -> npt.NDArray[np.float64]:
    """A packed weighted sum -> the packed mean. Raises FormatError when it holds components that nobody contributed."""
    heads, size = head_size(plan), component_size(plan, factors)
    rank = (packed.size - heads) // size if size else 0
    per_component = divisors(plan, contributors, total, rank)
    if not per_component.all():
        raise FormatError("the aggregate holds components that none of its contributors has")
    everyone = sum(c.samples for c in contributors) / total
    return np.asarray(packed / np.concatenate([np.full(heads, everyone), np.repeat(per_component, size)]))
