"""Which rows of a dictionary a few linear combinations were made of.

`published`: the span test of DAGER (arXiv 2405.15586, section 3), with its fixed threshold.
`sparse`: multiple-measurement sparse Bayesian learning (Wipf and Rao, IEEE Trans. Signal Processing 55(7), 2007): every
candidate has a variance, the likelihood of the combinations raises those of true rows and drives the others to zero. It
needs neither fewer rows than combinations nor all coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Block:
    """Combinations, (k, c), and how a dictionary row (n,) becomes what they combine (c,)."""

    combinations: Matrix
    seen: Callable[[Floats], Floats]  # (rows, n) -> (rows, c)
    name: bytes = b""  # equal for blocks that see the same of a row; empty: not to be compared


@dataclass(frozen=True)
class Common:
    """What looks through one dictionary have in common: its second moment (c, c), and the `typical` sizes by place."""

    moment: Matrix
    sizes: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)


def span_distances(combinations: Matrix, rows: Floats) -> npt.NDArray[np.float64]:
    """Relative distance (rows,) of each candidate row (rows, n) to the span of the combinations (k, n), 0 to 1."""
    return distances_to(basis(combinations), rows)


def distances_to(span: Matrix, rows: Floats) -> npt.NDArray[np.float64]:
    """Relative distance (rows,) of each row (rows, n) to the span of orthonormal vectors (k, n), 0 to 1."""
    norms = np.maximum((rows.astype(np.float64) ** 2).sum(1), 1e-30)
    inside = ((rows @ span.T.astype(rows.dtype)).astype(np.float64) ** 2).sum(1)
    return np.asarray(np.sqrt(np.clip(1 - inside / norms, 0, 1)))


def explained(blocks: Sequence[Block], moments: Sequence[Matrix], rows: Floats) -> npt.NDArray[np.float64]:
    """How much of the combinations each candidate explains, (rows,). Divide by `typical` to compare candidates.

    moments: per block, the second moment (c, c) of the whole dictionary, so that what all rows share counts little.
    """
    gain = np.zeros(len(rows))
    for block, moment in zip(blocks, moments, strict=True):
        factor = np.linalg.cholesky(moment)
        u, s, _ = np.linalg.svd(np.linalg.solve(factor, block.combinations.T), full_matrices=False)
        flat = np.linalg.solve(factor.T, u[:, s > 1e-4 * s[0]]) if s.size and s[0] > 0 else np.zeros((len(factor), 0))
        d = block.seen(rows)
        gain += ((d @ flat.astype(d.dtype)).astype(np.float64) ** 2).sum(1)
    return gain


def typical(block: Block, moment: Matrix, rows: Floats) -> npt.NDArray[np.float64]:
    """The size of each candidate where what all rows share counts little, (rows,). Does not depend on combinations."""
    d = block.seen(rows)
    white = np.linalg.inv(np.linalg.cholesky(moment)).T
    return np.asarray(((d @ white.astype(d.dtype)).astype(np.float64) ** 2).sum(1))


def second_moment(block: Block, rows: Floats) -> Matrix:
    """Of a sample of the dictionary as the block sees it, (c, c), of trace c, a little of the identity added."""
    d = block.seen(rows).astype(np.float64)
    moment = d.T @ d
    width = len(moment)
    return np.asarray(moment / max(np.trace(moment), 1e-30) * width + 1e-2 * np.eye(width))


def sparse(blocks: Sequence[Block], rows: Floats, *, noise: float, steps: int = 40) -> npt.NDArray[np.float64]:
    """The variance of each candidate row, (rows,): 0 where it takes no part.

    noise: variance of what is not explained, as a share of the combinations' own.
    """
    shown = [_scaled(block, rows) for block in blocks]
    shown = [(d, y) for d, y in shown if y.size and np.abs(y).max() > 0]
    out = np.zeros(len(rows))
    if not shown or not len(rows):
        return out
    kept, variance = np.arange(len(rows)), np.full(len(rows), 1.0 / len(rows))
    for step in range(steps):
        explained, typical, energy = (np.zeros(kept.size) for _ in range(3))
        for d, y in shown:
            part = d[kept]
            cover = (part * variance[:, None]).T @ part
            cover[np.diag_indices_from(cover)] += noise
            solved = np.linalg.solve(cover, np.concatenate([part.T, y], 1))
            explained += ((part @ solved[:, kept.size :]) ** 2).sum(1)
            t = (part * solved[:, : kept.size].T).sum(1)
            typical += y.shape[1] * t
            energy += t
        variance = variance * np.sqrt(explained / np.maximum(typical, 1e-30))
        if step > 3:
            alive = variance * energy > 1e-3 * (variance * energy).max()
            kept, variance = kept[alive], variance[alive]
    out[kept] = variance
    return out


def _scaled(block: Block, rows: Floats) -> tuple[Matrix, Matrix]:
    """Candidates (rows, c) and combinations (c, k) whose mean squares are 1: one noise fits both."""
    d, y = block.seen(rows).astype(np.float64), block.combinations.T.astype(np.float64)
    return d / (np.sqrt(np.mean(d**2)) or 1.0), y / (np.sqrt(np.mean(y**2)) or 1.0)


def basis(combinations: Matrix) -> Matrix:
    """Orthonormal vectors (rank, n) of the span of the combinations (k, n); directions of less than 1e-5 are noise."""
    _, s, vt = np.linalg.svd(combinations, full_matrices=False)
    return np.asarray(vt[s > 1e-5 * s[0]] if s.size and s[0] > 0 else vt[:0])
