"""What the clear factor B gives away by itself: its gradient is a sum of outer products d_t (A x_t)^T over tokens t.

Its rows are combinations of A x_t, which is what is left of a token's row after A: r numbers instead of n. A is known
where the round's start is, so the dictionary is looked up through it, by the same sparse recovery as `span` (the span
test of DAGER, arXiv 2405.15586, carried over to the other factor of LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ciphertune.audit.attack import NOTHING, Attempt, Target
from ciphertune.audit.known import Matrix, Moved
from ciphertune.audit.pursuit import Block, Floats
from ciphertune.audit.recovery import look_up


def attack(target: Target) -> Iterator[Attempt]:
    """One attempt; it needs B and the A that it was trained beside."""
    seen = [m for m in target.layers.values() if m.b is not None and m.start is not None and np.abs(m.b).max() > 0]
    if not seen:
        yield Attempt("b_factor", "adapted", NOTHING, "no change of B can be read")
        return
    found = look_up([_block(m) for m in seen], target.words(), noise=target.noise)
    yield Attempt("b_factor", "adapted", found)


def _block(layer: Moved) -> Block:
    assert layer.b is not None and layer.start is not None
    start = layer.start

    def through(rows: Floats) -> Floats:
        return rows @ start.T.astype(rows.dtype)

    return Block(_principal(layer.b), through)


def _principal(b: Matrix) -> Matrix:
    """(m, r) as at most r combinations that hold the same: singular values times right singular vectors."""
    _, s, vt = np.linalg.svd(b, full_matrices=False)
    return np.asarray(s[:, None] * vt)
