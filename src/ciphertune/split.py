"""Adapter <-> the flat vector that travels, where factors are summed apart.

It is packed densely over all layers, components outermost, and cut into one segment per tier of ranks:

    heads | component 0 of all layers | component 1 | ...  up to the first tier    segment 0
    components of all layers                               up to the second tier   segment 1
    ...

A client of lower rank sends a *prefix* of the segments of a client of higher rank. Each segment is encrypted into
ciphertexts of its own, so that no ciphertext mixes components that different groups of clients may see.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from ciphertune.adapter import Adapter, FloatArray, LoraFactors
from ciphertune.errors import PlanMismatchError
from ciphertune.plan import Factor, Plan

Vector = npt.NDArray[np.float64]
Counts = tuple[tuple[int, ...], tuple[int, ...]]


def component_size(plan: Plan, factors: tuple[Factor, ...]) -> int:
    """Entries of one component over all layers: a row of A has n, a column of B has m."""
    return sum((x.n if f == "a" else x.m) for x in plan.layers for f in factors)


def head_size(plan: Plan) -> int:
    """Entries of all heads that travel."""
    return 0 if plan.share == "none" else sum(h.size for h in plan.heads)


def segments(plan: Plan, factors: tuple[Factor, ...], rank: int) -> tuple[int, ...]:
    """Entries of each segment of a message that holds `rank` components, which is a tier of the plan."""
    size = component_size(plan, factors)
    tiers = [t for t in plan.tiers if t <= rank]
    return tuple((head_size(plan) if i == 0 else 0) + (b - a) * size for i, (a, b) in enumerate(pairwise([0, *tiers])))


def pack(adapter: Adapter, plan: Plan, factors: tuple[Factor, ...]) -> Vector:
    """The heads and the shared components of the given factors, (count,).

    Raises PlanMismatchError when the adapter is not of the plan's shape, or of a rank below its lowest tier.
    """
    rank = plan.shared(adapter.rank)
    if rank < 1:
        raise PlanMismatchError(f"rank {adapter.rank} is below the plan's lowest tier, {plan.tiers[0]}")
    check_shape(adapter, plan)
    pieces: list[FloatArray] = [pack_heads(adapter, plan)[: head_size(plan)]]
    for k in range(rank):
        for layer in plan.layers:
            found = adapter.layers[layer.name]
            pieces += [found.a[k] if f == "a" else found.b[:, k] for f in factors]
    return np.concatenate(pieces).astype(np.float64)


def join(packed: Vector, plan: Plan, factors: tuple[Factor, ...], base: Adapter) -> Adapter:
    """`base` with its heads and the given factors replaced by what `pack` packed, (count,), in the types of `base`.

    Fewer components than the base has replace its first ones. Raises PlanMismatchError when `base` is not of the plan's
    shape, or the values are no whole number of components or more than it has.
    """
    check_shape(base, plan)
    size = component_size(plan, factors)
    rank = (packed.size - head_size(plan)) // size if size else 0
    if packed.size != head_size(plan) + rank * size or rank > base.rank:
        raise PlanMismatchError(f"{packed.size} values do not fit an adapter of rank {base.rank} of this plan")
    if plan.share == "none":
        return base
    heads, at = join_heads(packed, plan, base), head_size(plan)
    fresh = {x.name: {"a": base.layers[x.name].a.copy(), "b": base.layers[x.name].b.copy()} for x in plan.layers}
    for k in range(rank):
        for layer in plan.layers:
            for f in factors:
                width = layer.n if f == "a" else layer.m
                target = fresh[layer.name]["a"][k] if f == "a" else fresh[layer.name]["b"][:, k]
                target[...] = packed[at : at + width]
                at += width
    layers = {name: LoraFactors(f["a"], f["b"], base.layers[name].scale) for name, f in fresh.items()}
    return Adapter(layers, heads)


def pack_heads(adapter: Adapter, plan: Plan) -> Vector:
    """All heads in a row. Raises PlanMismatchError when they are not the plan's."""
    if len(adapter.heads) != len(plan.heads):
        raise PlanMismatchError("the adapter has heads that the plan does not know")
    for head in plan.heads:
        if head.name not in adapter.heads or adapter.heads[head.name].shape != head.shape:
            raise PlanMismatchError(f"head {head.name} of the adapter is not {head.shape} as the plan says")
    pieces = [np.ravel(adapter.heads[h.name]).astype(np.float64) for h in plan.heads]
    return np.concatenate([np.zeros(0), *pieces])


def join_heads(packed: Vector, plan: Plan, base: Adapter) -> dict[str, FloatArray]:
    """The inverse of `pack_heads`: each head in its shape, from the beginning of `packed`, in the types of `base`.

    packed: (count,), of at least the heads' sizes; what follows them is not looked at.
    """
    heads: dict[str, FloatArray] = {}
    for head, values in zip(plan.heads, cut(packed, tuple(h.size for h in plan.heads)), strict=True):
        heads[head.name] = values.reshape(head.shape).astype(base.heads[head.name].dtype)
    return heads


def cut(packed: Vector, sizes: tuple[int, ...]) -> tuple[Vector, ...]:
    """`packed`, (count,), in pieces of the given sizes, as views; what lies beyond their sum is left out."""
    ends = list(accumulate(sizes, initial=0))
    return tuple(packed[a:b] for a, b in pairwise(ends))


def check_shape(adapter: Adapter, plan: Plan) -> None:
    """Raise PlanMismatchError unless the adapter has the plan's layers and heads, at one rank."""
    if sorted(adapter.layers) != sorted(x.name for x in plan.layers):
        raise PlanMismatchError("the adapter has other layers than the plan")
    for layer in plan.layers:
        found = adapter.layers[layer.name]
        if found.a.shape != (adapter.rank, layer.n) or found.b.shape != (layer.m, adapter.rank):
            raise PlanMismatchError(f"layer {layer.name} of the adapter is not ({layer.m}, {layer.n}) as the plan says")
    pack_heads(adapter, plan)
