"""No encryption: the oracle that the other backends are tested against, and the dry run. Never for real data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ciphertune.crypto.base import Aggregator
from ciphertune.errors import FormatError

_TYPES = {"float32": "<f4", "float64": "<f8"}


class ClearSum:
    """A running float64 sum of plain vectors."""

    def __init__(self, dtype: np.dtype[np.floating]) -> None:
        self._dtype = dtype
        self._sum = np.zeros(0)

    def add(self, body: bytes) -> None:
        """Add one vector; see `Aggregator.add`."""
        values = parse(body, self._dtype)
        if values.size > self._sum.size:
            self._sum = np.concatenate([self._sum, np.zeros(values.size - self._sum.size)])
        self._sum[: values.size] += values

    def blocks(self) -> int:
        """Values of the longest vector so far."""
        return self._sum.size

    def result(self, blocks: int) -> bytes:
        """The first `blocks` values of the sum."""
        return self._sum[:blocks].astype(self._dtype).tobytes()


class ClearPublic:
    """Sizes and sums of plain vectors: one block is one value."""

    encrypts = False
    adds_noise = False
    slots = 1

    def __init__(self, precision: str = "float32") -> None:
        self.dtype: np.dtype[np.floating] = np.dtype(_TYPES[precision])
        self.precision = precision

    @property
    def block_bytes(self) -> int:
        """Bytes of one value."""
        return self.dtype.itemsize

    def digest(self) -> bytes:
        """16 bytes naming this backend and its precision."""
        return hashlib.sha256(f"clear {self.precision}".encode()).digest()[:16]

    def error_bound(self, contributors: int, magnitude: float) -> float:
        """Rounding of the terms and of the sum to the wire's precision."""
        return (contributors + 1) * magnitude * float(np.finfo(self.dtype).eps)

    largest = math.inf

    def sum_bytes(self, terms: int) -> int:
        """A value, however many are summed."""
        return self.block_bytes

    def aggregator(self) -> Aggregator:
        """An empty sum."""
        return ClearSum(self.dtype)

    def check(self, body: bytes) -> None:
        """Raise FormatError for values that are not finite."""
        parse(body, self.dtype)

    def combine(
        self,
        rows: Sequence[bytes],
        coefficients: npt.NDArray[np.float64],
        groups: npt.NDArray[np.int64],
        added: npt.NDArray[np.float64],
    ) -> list[bytes]:
        """See `PublicPart.combine`."""
        total = added.copy()
        for k, row in enumerate(rows):
            values = parse(row, self.dtype)
            total[:, : values.size] += coefficients[:, k, groups[: values.size]] * values
        return [row.astype(self.dtype).tobytes() for row in total]

    def product_error_bound(self, coefficients: float, values: float, magnitude: float) -> float:
        """Rounding of each value and of the result to the wire's precision (Cauchy and Schwarz on the terms)."""
        return (coefficients * values + magnitude) * float(np.finfo(self.dtype).eps)


def parse(body: bytes, dtype: np.dtype[np.floating]) -> npt.NDArray[np.float64]:
    """Finite values from bytes. Raises FormatError."""
    if len(body) % dtype.itemsize:
        raise FormatError(f"{len(body)} bytes are no whole number of {dtype} values")
    values = np.frombuffer(body, dtype).astype(np.float64)
    if not np.isfinite(values).all():
        raise FormatError("the clear part holds NaN or infinite values")
    return values
