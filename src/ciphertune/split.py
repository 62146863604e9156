"""Adapter <-> the flat vectors that travel: a clear part and a secret part.

Both are packed densely over all layers, components outermost, so that a client of lower rank sends a *prefix* of what a
client of higher rank sends, and block i of every message holds the same entries:

    heads | component 0 of all layers | component 1 of all layers | ...
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ciphertune.adapter import Adapter, FloatArray, LoraFactors
from ciphertune.errors import PlanMismatchError
from ciphertune.plan import Factor, Plan

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Parts:
    """What a client sends: `clear` is readable by the server, `secret` is encrypted. Both (count,), float64."""

    clear: Vector
    secret: Vector


def component_size(plan: Plan, factors: tuple[Factor, ...]) -> int:
    """Entries of one component over all layers: a row of A has n, a column of B has m."""
    return sum((x.n if f == "a" else x.m) for x in plan.layers for f in factors)


def head_size(plan: Plan) -> int:
    """Entries of all heads."""
    return sum(h.size for h in plan.heads)


def counts(plan: Plan, factors: tuple[Factor, ...], rank: int) -> tuple[int, int]:
    """(clear, secret) entries in a message of a client of `rank`."""
    total = head_size(plan) + rank * component_size(plan, factors)
    return (total, 0) if plan.select == "none" else (0, total)


def split(adapter: Adapter, plan: Plan, factors: tuple[Factor, ...]) -> Parts:
    """Pack the heads and the given factors. Raises PlanMismatchError when the adapter is not of the plan's shape."""
    _check(adapter, plan)
    pieces = [np.ravel(adapter.heads[h.name]) for h in plan.heads]
    for k in range(adapter.rank):
        for layer in plan.layers:
            found = adapter.layers[layer.name]
            pieces += [found.a[k] if f == "a" else found.b[:, k] for f in factors]
    packed = np.concatenate(pieces).astype(np.float64) if pieces else np.zeros(0)
    empty = np.zeros(0)
    return Parts(packed, empty) if plan.select == "none" else Parts(empty, packed)


def join(parts: Parts, plan: Plan, factors: tuple[Factor, ...], base: Adapter) -> Adapter:
    """`base` with its heads and the given factors replaced: the inverse of `split`.

    Parts of a lower rank than the base's replace its first components. Raises PlanMismatchError.
    """
    _check(base, plan)
    packed = parts.clear if plan.select == "none" else parts.secret
    size = component_size(plan, factors)
    rank = (packed.size - head_size(plan)) // size if size else 0
    if packed.size != head_size(plan) + rank * size or rank > base.rank:
        raise PlanMismatchError(f"{packed.size} values do not fit an adapter of rank {base.rank} of this plan")
    heads: dict[str, FloatArray] = {}
    at = 0
    for head in plan.heads:
        heads[head.name] = packed[at : at + head.size].reshape(head.shape).astype(base.heads[head.name].dtype)
        at += head.size
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


def _check(adapter: Adapter, plan: Plan) -> None:
    rank = adapter.rank
    for layer in plan.layers:
        found = adapter.layers.get(layer.name)
        if found is None or found.a.shape != (rank, layer.n) or found.b.shape != (layer.m, rank):
            raise PlanMismatchError(f"layer {layer.name} of the adapter is not ({layer.m}, {layer.n}) as the plan says")
    for head in plan.heads:
        if head.name not in adapter.heads or adapter.heads[head.name].shape != head.shape:
            raise PlanMismatchError(f"head {head.name} of the adapter is not {head.shape} as the plan says")
    if len(adapter.layers) != len(plan.layers) or len(adapter.heads) != len(plan.heads):
        raise PlanMismatchError("the adapter has layers or heads that the plan does not know")
