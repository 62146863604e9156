"""From combinations to a text: look through a whole dictionary, keep the best candidates, and order what is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ciphertune.audit.dictionary import Dictionary, Rows
from ciphertune.audit.pursuit import (
    Block,
    Common,
    basis,
    distances_to,
    explained,
    second_moment,
    span_distances,
    sparse,
    typical,
)

_CANDIDATES = 4000
_SAMPLE = 1000  # rows of each place that the dictionary's second moment is taken from
_LEFT_OUT = 5e-4  # share of the variance that the weakest tokens hold, which are left out
_MOST = 256  # tokens that an attack names
_FEW = 64  # columns: with so few, exact combinations are told apart by their span rather than by what explains them
_EXACT = 1e-2  # noise below which combinations count as exact, and what of their span may be left over


@dataclass(frozen=True)
class Recovered:
    """Tokens an attack names, in the order of the text as far as it knows it."""

    tokens: tuple[int, ...]

    @property
    def set(self) -> frozenset[int]:
        """Each token once."""
        return frozenset(self.tokens)


def look_up(blocks: Sequence[Block], words: Dictionary, *, noise: float) -> Recovered:
    """The tokens whose rows the combinations were made of."""
    blocks = [b for b in blocks if b.combinations.size and np.abs(b.combinations).max() > 0]
    if not blocks:
        return Recovered(())
    if len(blocks) == 1 and noise < _EXACT and blocks[0].combinations.shape[1] <= _FEW:
        spanning = _spanning(blocks[0], words)
        if spanning.tokens:
            return spanning
    places, tokens, rows = _candidates(blocks, words)
    return _ordered(places, tokens, sparse(blocks, rows, noise=noise))


def passing(combinations: np.ndarray, words: Dictionary, threshold: float) -> Recovered:
    """The tokens whose rows lie within `threshold` of the span of the combinations (k, n)."""
    places, tokens, close = [], [], []
    if not combinations.size or not np.abs(combinations).max() > 0:
        return Recovered(())
    for place, rows in words.all_rows():
        distance = span_distances(combinations, rows)
        inside = np.flatnonzero(distance < threshold)
        places.append(np.full(inside.size, place))
        tokens.append(words.tokens[inside])
        close.append(1 / np.maximum(distance[inside], 1e-9))
    return _ordered(np.concatenate(places), np.concatenate(tokens), np.concatenate(close), left_out=0.0)


def _spanning(block: Block, words: Dictionary) -> Recovered:
    """The rows nearest to the span of exact combinations, if they are what it is made of; else nothing.

    Where tokens outnumber the combinations a little, rows that are known to be there (the text's beginning, its end at
    any place) complete the span first: subspace-augmented MUSIC (Lee, Bresler and Junge, arXiv 1004.3071).
    """
    seen = [np.asarray(block.seen(rows), np.float64) for _, rows in words.all_rows()]  # distances are small
    best, used, found = _EXACT, 0, Recovered(())
    for frame in words.frames():
        if found.tokens and len(frame) > used:  # with fewer rows taken for granted it is the better answer
            break
        known = [seen[place][index] for place, index in frame]
        size = np.linalg.norm(block.combinations, axis=1).max()
        every = [*block.combinations / size, *(row / np.linalg.norm(row) for row in known)]
        span = basis(np.stack(every).astype(np.float64))
        if len(span) == block.combinations.shape[1]:
            continue
        distances = np.stack([distances_to(span, rows) for rows in seen])
        nearest = np.argsort(distances, axis=None)[: len(span)]
        places, which = np.unravel_index(nearest, distances.shape)
        rows = np.stack([seen[p][i] for p, i in zip(places, which, strict=True)])
        left = float(distances_to(basis(rows.astype(np.float64)), span).max())
        if left < best:
            weight = 1 / np.maximum(distances[places, which], 1e-9)
            found = _ordered(places, words.tokens[which], weight, left_out=0.0)
            best, used = left, len(frame)
    return found


def _candidates(blocks: Sequence[Block], words: Dictionary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places, tokens, rows) of the candidates that explain most."""
    if words.tokens.size * words.places <= _CANDIDATES:
        every = [(p, words.tokens, r) for p, r in words.all_rows()]
        return (
            np.concatenate([np.full(t.size, p) for p, t, _ in every]),
            np.concatenate([t for _, t, _ in every]),
            np.concatenate([r for _, _, r in every]),
        )
    known = [_common(block, words) for block in blocks]
    scores, where, which = [], [], []
    for place, rows in words.all_rows():
        size = sum(_sizes(block, found, place, rows) for block, found in zip(blocks, known, strict=True))
        found = explained(blocks, [x.moment for x in known], rows) / np.maximum(size, 1e-30)
        best = np.argsort(-found)[:_CANDIDATES]
        scores.append(found[best])
        where.append(np.full(best.size, place))
        which.append(best)
    top = np.argsort(-np.concatenate(scores), kind="stable")[:_CANDIDATES]
    places, indices = np.concatenate(where)[top], np.concatenate(which)[top]
    rows = np.empty((top.size, words.width), np.float32)
    for place in np.unique(places):
        here = places == place
        rows[here] = words.rows(int(place), indices[here])
    return places, words.tokens[indices], rows


def _common(block: Block, words: Dictionary) -> Common:
    if block.name in words.kept:
        return words.kept[block.name]
    generator = np.random.default_rng(0)
    sample = np.concatenate([words.sample(place, _SAMPLE, generator) for place in range(words.places)])
    found = Common(second_moment(block, sample))
    if block.name:
        words.kept[block.name] = found
    return found


def _sizes(block: Block, known: Common, place: int, rows: Rows) -> np.ndarray:
    if place not in known.sizes:
        known.sizes[place] = typical(block, known.moment, rows)
    return known.sizes[place]


def _ordered(places: np.ndarray, tokens: np.ndarray, weight: np.ndarray, left_out: float = _LEFT_OUT) -> Recovered:
    """Each token at the place where it weighs most, by place and then by weight; the weakest are left out."""
    total: dict[int, float] = {}
    best: dict[int, tuple[float, int]] = {}
    for place, token, w in zip(places.tolist(), tokens.tolist(), weight.tolist(), strict=True):
        if w > 0:
            total[token] = total.get(token, 0.0) + w
            best[token] = max(best.get(token, (0.0, 0)), (w, place))
    order = sorted(total, key=lambda t: -total[t])
    mass = np.cumsum([total[t] for t in order]) / max(sum(total.values()), 1e-30)
    kept = [t for t, m in zip(order, [0.0, *mass[:-1]], strict=False) if m < 1 - left_out][:_MOST]
    kept.sort(key=lambda t: (best[t][1], -best[t][0]))
    return Recovered(tuple(kept))
