"""Pruning, and other choices of entries: how much when, which, and how the parties agree on it.

FedShield-LLM (arXiv 2506.05640) prunes the LoRA factors more and more while the rounds go on. Every tensor is pruned
for itself, by absolute value; where ranks are unequal, so is every tier of components, to leave a lower rank a
prefix. Heads are never pruned. A choice is a mask over the vector that `split.pack` makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ciphertune.plan import Factor, Plan
from ciphertune.split import Counts, Vector, component_size, cut, head_size, segments

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tensor:
    """Where one tensor's entries of one tier lie in a packed vector: `block` is (components, values per component)."""

    start: int
    components: int
    stride: int
    offset: int
    width: int

    def of(self, packed: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """A view, shape (components, width)."""
        block = packed[self.start : self.start + self.components * self.stride]
        return block.reshape(self.components, self.stride)[:, self.offset : self.offset + self.width]

    @property
    def size(self) -> int:
        """Entries."""
        return self.components * self.width


def tensors(plan: Plan, factors: tuple[Factor, ...], rank: int) -> Iterator[tuple[int, Tensor]]:
    """(tier, tensor) of everything in a message that holds `rank` components, heads left out."""
    stride, start = component_size(plan, factors), head_size(plan)
    for tier, (low, high) in enumerate(pairwise([0, *(t for t in plan.tiers if t <= rank)])):
        offset = 0
        for layer in plan.layers:
            for f in factors:
                width = layer.n if f == "a" else layer.m
                yield tier, Tensor(start, high - low, stride, offset, width)
                offset += width
        start += (high - low) * stride


def pruned(size: int, rate: float) -> int:
    """Entries of a tensor that a rate removes: the nearest number, as torch.nn.utils.prune has it."""
    return min(size, round(rate * size))


def chosen_counts(plan: Plan, factors: tuple[Factor, ...], rank: int, rate: float) -> tuple[int, ...]:
    """Entries of each segment that remain at a rate."""
    found = list(segments(plan, factors, rank))
    for tier, tensor in tensors(plan, factors, rank):
        found[tier] -= pruned(tensor.size, rate)
    return tuple(found)


def counts(plan: Plan, factors: tuple[Factor, ...], round_: int, rank: int) -> Counts:
    """(clear, secret) entries of each segment of a message that holds `rank` components."""
    sizes = segments(plan, factors, rank)
    if plan.select == "none":
        return sizes, ()
    if rate := plan.left_out(round_):
        chosen = chosen_counts(plan, factors, rank, rate)
        rest = tuple(s - c for s, c in zip(sizes, chosen, strict=True)) if plan.select == "entries" else ()
        return rest, chosen
    return (), tuple(x for s in sizes for x in (s, s)) if counts_kept(plan, round_) else sizes


def counts_kept(plan: Plan, round_: int) -> bool:
    """Whether the weights of the entries that a client kept travel, encrypted, beside the entries."""
    return plan.prune == "own" and plan.prune_mean == "kept" and plan.rate(round_) > 0


def mask_entries(plan: Plan, factors: tuple[Factor, ...], round_: int, rank: int) -> tuple[int, ...]:
    """Entries per tier of the mask that travels, heads left out; none where there is no mask."""
    if not plan.left_out(round_):
        return ()
    first, *others = segments(plan, factors, rank)
    return first - head_size(plan), *others


def choose(scores: Vector, plan: Plan, factors: tuple[Factor, ...], rank: int, rate: float) -> Mask:
    """The entries that remain: in every tensor all but the share `rate` of the smallest |scores|; heads remain.

    scores: (count,), as packed. Of equal scores the first are removed first, on every machine.
    """
    keep = np.ones(scores.size, bool)
    for _, tensor in tensors(plan, factors, rank):
        order = np.argsort(np.abs(tensor.of(scores)), axis=None, kind="stable")
        inside = np.ones(tensor.size, bool)
        inside[order[: pruned(tensor.size, rate)]] = False
        tensor.of(keep)[...] = inside.reshape(tensor.components, tensor.width)
    return keep


def divide(
    packed: Vector, weight: float, plan: Plan, round_: int, rank: int, keep: Mask | None
) -> tuple[list[Vector], list[Vector]]:
    """A packed update, weighted -> its (clear, secret) segments. keep: the entries that were chosen, None for all."""
    factors = plan.factors(round_)
    sizes, values = segments(plan, factors, rank), packed * weight
    if keep is None:
        return (list(cut(values, sizes)), []) if plan.select == "none" else ([], list(cut(values, sizes)))
    if not plan.left_out(round_):  # a mask of the client's own: zeros travel as any value
        values = np.where(keep, values, 0.0)
        parts = list(cut(values, sizes))
        if counts_kept(plan, round_):
            weights = cut(np.where(keep, weight, 0.0), sizes)
            parts = [x for pair in zip(parts, weights, strict=True) for x in pair]
        return [], parts
    pairs = list(zip(cut(values, sizes), np.split(keep, np.cumsum(sizes)[:-1]), strict=True))
    rest = [v[~k] for v, k in pairs] if plan.select == "entries" else []
    return rest, [v[k] for v, k in pairs]


def unite(
    clear: Vector, secret: Sequence[Vector], plan: Plan, round_: int, rank: int, keep: Mask | None
) -> tuple[Vector, Vector | None]:
    """The inverse of `divide` on an aggregate: the packed sum and, where they travelled, the weights, (count,) each.

    clear: (entries,) that travelled in the clear.  secret: a vector per segment, or where kept entries are counted two,
    values and weights in turn.  keep: (count,) which entries are in `secret`, None for all. Raises ValueError where the
    lengths do not fit the mask, which `wire.decode` has checked.
    """
    if keep is None:
        if counts_kept(plan, round_):
            return np.concatenate(secret[::2]), np.concatenate(secret[1::2])
        return np.concatenate([clear, *secret]), None
    packed = np.zeros(keep.size)
    packed[keep] = np.concatenate(secret)
    if plan.select == "entries":
        packed[~keep] = clear
    return packed, None
