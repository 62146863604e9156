"""A LoRA adapter as plain numbers: the values every later step works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True)
class LoraFactors:
    """The two factors of one adapted layer: its update is ``dW = scale * b @ a`` (LoRA, arXiv 2106.09685, section 4.1).

    a: shape (r, n), one row per component.  b: shape (m, r), one column per component.
    scale: ``alpha / r``; the same for every client of a federation, so that components mean the same at every rank.
    Raises ValueError when the shapes do not fit together.
    """

    a: FloatArray
    b: FloatArray
    scale: float

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(
                f"a {self.a.shape} and b {self.b.shape} are not factors of one matrix: want (r, n), (m, r)"
            )

    @property
    def rank(self) -> int:
        """Number of components, r."""
        return int(self.a.shape[0])

    def delta(self) -> npt.NDArray[np.float64]:
        """The full update, shape (m, n), in float64. In a run only `merging` forms it."""
        return self.scale * (self.b.astype(np.float64) @ self.a.astype(np.float64))


@dataclass(frozen=True)
class Adapter:
    """Everything a client trains: LoRA factors per layer, and the task heads, both in sorted order of their names."""

    layers: Mapping[str, LoraFactors]
    heads: Mapping[str, FloatArray]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(sorted(self.layers.items()))))
        object.__setattr__(self, "heads", MappingProxyType(dict(sorted(self.heads.items()))))

    @property
    def rank(self) -> int:
        """The common rank of all layers (0 when there is none)."""
        return max((f.rank for f in self.layers.values()), default=0)

    def first(self, rank: int) -> Adapter:
        """The first `rank` components of every layer, and the heads."""
        layers = {name: LoraFactors(f.a[:rank], f.b[:, :rank], f.scale) for name, f in self.layers.items()}
        return Adapter(layers, self.heads)


def difference(one: Adapter, two: Adapter) -> Adapter:
    """Factor by factor and head by head, `one` minus `two`, of the same shapes."""
    layers = {n: LoraFactors(f.a - two.layers[n].a, f.b - two.layers[n].b, f.scale) for n, f in one.layers.items()}
    return Adapter(layers, {n: h - two.heads[n] for n, h in one.heads.items()})


def in_bfloat16(adapter: Adapter) -> Adapter:
    """The adapter with every value rounded to the nearest bfloat16 (8 bits, ties to even), still in float32."""

    def rounded(values: FloatArray) -> FloatArray:
        bits = values.astype(np.float32).view(np.uint32)
        kept = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
        return np.where(np.isfinite(values), kept.view(np.float32), values).astype(np.float32)

    layers = {name: LoraFactors(rounded(f.a), rounded(f.b), f.scale) for name, f in adapter.layers.items()}
    return Adapter(layers, {name: rounded(head) for name, head in adapter.heads.items()})
