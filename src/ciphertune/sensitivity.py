"""How much each column of a LoRA layer gives away: the score that decides what SHE-LoRA encrypts (arXiv 2505.21051).

The scores are those of Wanda (arXiv 2306.11695, section 3), summed over the rows of the matrix: one per input feature.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ciphertune.adapter import FloatArray
from ciphertune.errors import RangeError

Vector = npt.NDArray[np.float64]

SCORES = ("wanda_weight", "wanda_adapter", "magnitude", "random")

_LOOK_AT = {
    "wanda_weight": "the base model's weights or its activations, try model.dtype=float32",
    "wanda_adapter": "the adapter, if training diverged, or the model's activations, try model.dtype=float32",
    "magnitude": "the adapter: if training diverged, lower training.learning_rate",
}


def scores(
    kind: str, *, a: FloatArray, weight: FloatArray, norms: FloatArray, generator: np.random.Generator
) -> Vector:
    """The sensitivity S (n,) of the columns of one layer, in float64; larger is more sensitive.

    kind: wanda_weight: (sum_k |W0_kj|) * ||x_j||, for round 1, when A is still random.
    wanda_adapter: (sum_k |A_kj|) * ||x_j||, SHE-LoRA's own. magnitude: sum_k |A_kj|. random: uniform in [0, 1).
    a: (r, n). weight: (n,) sums over the rows of |W0|. norms: (n,) L2 norm of each input feature over the calibration
    tokens. generator: used by random alone.
    Raises RangeError when a score is NaN or infinite, ValueError for another kind or shapes that do not fit.
    """
    if kind not in SCORES:
        raise ValueError(f"score {kind!r}: want one of {', '.join(SCORES)}")
    if a.ndim != 2 or not weight.shape == norms.shape == a.shape[1:]:
        raise ValueError(f"a {a.shape}, weight {weight.shape}, norms {norms.shape}: want (r, n), (n,), (n,)")
    with np.errstate(invalid="ignore", over="ignore"):  # reported below, in words
        found = _scores(kind, a.astype(np.float64), weight.astype(np.float64), norms.astype(np.float64), generator)
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise RangeError(
            f"score {kind} of column {bad[0]} is {found[bad[0]]} ({bad.size} of {found.size} columns are not finite): "
            f"look at {_LOOK_AT[kind]}"
        )
    return found


def _scores(kind: str, a: Vector, weight: Vector, norms: Vector, generator: np.random.Generator) -> Vector:
    if kind == "random":
        return generator.random(norms.size)
    if kind == "wanda_weight":
        return weight * norms
    columns: Vector = np.abs(a).sum(axis=0)  # inside the sum: entries of both signs must not cancel
    return columns if kind == "magnitude" else columns * norms


def top(score: FloatArray, count: int) -> npt.NDArray[np.int64]:
    """The `count` columns of largest `score` (n,), largest first; of equal scores the lower column first.

    Raises RangeError when a score is NaN, ValueError when `count` is not in 0 to n.
    """
    if score.ndim != 1 or not 0 <= count <= score.size:
        raise ValueError(f"{count} columns of scores {score.shape}: want (n,) and a count from 0 to n")
    missing = np.flatnonzero(np.isnan(score))
    if missing.size:
        raise RangeError(f"the score of column {missing[0]} is not a number: columns cannot be ordered by it")
    return np.argsort(-score.astype(np.float64), kind="stable")[:count].astype(np.int64)
