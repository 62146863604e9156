"""Whether the mean of a round would be precise: encryption's noise in a sum, over the weight that it is divided by.

The server asks before it releases an aggregate, a client before it takes one; both must come to the same answer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from ciphertune import wire
from ciphertune.pruning import counts_kept
from ciphertune.ranks import Contributor, divisors

# of an entry of a mean; entries of trained factors are of the order of 0.01 to 1
_LARGEST_ERROR = 1e-3


def precise_rank(session: wire.Session, round_: int, people: Sequence[Contributor], total: int) -> int:
    """The components, from the first, of which these contributors have a precise mean; of a product all or none.

    total: samples of all that were asked, the denominator of every weight.
    """
    plan, public, rank = session.plan, session.public, max([1, *(c.rank for c in people)])
    if plan.aggregate != "separate":  # divided as a whole; coefficients and values of the order of 1
        shares = np.full(rank, sum(c.samples for c in people) / total)
        noise = np.full(rank, public.product_error_bound(1.0, 1.0, 1.0))
    else:
        shares = divisors(plan, people, total, rank)
        ranks = sorted(c.rank for c in people)
        terms = [len(ranks) - bisect_right(ranks, k) for k in range(rank)]  # of each component
        if counts_kept(plan, round_):  # an entry that only one client kept; half of its weight is zero with the noise
            shares = np.full(rank, min(c.samples for c in people) / total / 2)
            terms = [len(ranks)] * rank
        noise = np.array([public.error_bound(count, 1.0) for count in terms])
    if not public.encrypts:
        noise = np.zeros(rank)  # floats in the clear are as precise as they are small
    return int(np.cumprod((shares > 0) & (noise <= _LARGEST_ERROR * shares)).sum())


def imprecise(session: wire.Session, round_: int, people: Sequence[Contributor], total: int, rank: int) -> str:
    """Why there is no mean of `rank` components."""
    if counts_kept(session.plan, round_):
        return (
            f"a contributor of round {round_ + 1} has {min(c.samples for c in people) / total:.1e} of the weight that "
            "was asked: too little for a precise mean of an entry that it alone kept; use method.prune_mean=all"
        )
    separate = session.plan.aggregate == "separate"
    share = sum(c.samples for c in people if c.rank >= rank or not separate) / total
    return (
        f"the contributors of round {round_ + 1} have {share:.1e} of the weight that was asked: too little for a "
        "precise mean; a client states far too many examples, or too few replied"
    )
