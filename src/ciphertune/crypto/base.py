"""What the server may hold. No argument and no result of anything here can carry a secret.

The client's counterpart, which holds a key, is `SecretPart` in `crypto/secret.py`; the server never imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ciphertune.errors import RangeError


class Aggregator(Protocol):
    """A running sum of encrypted vectors.

    Vectors may differ in length: a client of lower rank has fewer blocks; block i sums over those that have it.
    """

    def add(self, body: bytes) -> None:
        """Add one vector of whole blocks. Raises WireError on bytes that are none, and leaves the sum as it was."""

    def blocks(self) -> int:
        """Blocks of the longest vector so far."""

    def result(self, blocks: int) -> bytes:
        """The first `blocks` blocks of the sum, `public.sum_bytes` each."""


class PublicPart(Protocol):
    """The public half of a backend: sizes, digest, bounds and sums."""

    @property
    def slots(self) -> int:
        """Values in one block."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of an update."""

    def sum_bytes(self, terms: int) -> int:
        """Bytes of one block of a sum of `terms` updates, or of a combination (terms = 1)."""

    @property
    def encrypts(self) -> bool:
        """False for the oracle backend, whose blocks anybody reads."""

    @property
    def adds_noise(self) -> bool:
        """Whether a decrypted sum carries the encryption's noise, from which the key could be computed."""

    def digest(self) -> bytes:
        """16 bytes over the parameters and the byte layout."""

    def error_bound(self, contributors: int, magnitude: float) -> float:
        """Largest absolute error of a decrypted sum of `contributors` vectors whose sum is at most `magnitude`."""

    def aggregator(self) -> Aggregator:
        """An empty sum."""

    @property
    def largest(self) -> float:
        """Largest absolute value that a sum or a combination may take; above it, it would come out wrong."""

    def check(self, body: bytes) -> None:
        """Raise WireError unless the bytes are whole blocks that can be added and combined."""

    def combine(
        self,
        rows: Sequence[bytes],
        coefficients: npt.NDArray[np.float64],
        groups: npt.NDArray[np.int64],
        added: npt.NDArray[np.float64],
    ) -> list[bytes]:
        """Encrypted rows combined: ``out[p] = sum_k coefficients[p, k, groups] * rows[k] + added[p]``, per value.

        rows: K vectors of whole blocks; a shorter one counts as zero beyond its end.  coefficients: (P, K, G), one
        per group of values.  groups: (count,), the group of each value.  added: (P, count), in the clear.
        Returns P vectors. Raises WireError.
        """

    def product_error_bound(self, coefficients: float, values: float, magnitude: float) -> float:
        """Largest absolute error of a decrypted combination.

        coefficients, values: root of the sum of squares of its terms' coefficients and values.
        magnitude: of the result.
        """


def blocks_for(public: PublicPart, values: int) -> int:
    """Blocks that `values` values take."""
    return -(-values // public.slots)


def mask_bytes(entries: int) -> int:
    """Bytes of an encrypted mask of that many entries: a bitmap and 16 bytes of AES-SIV; nothing for none."""
    return 16 + -(-entries // 8) if entries else 0


def check_range(values: npt.NDArray[np.floating], bound: float) -> None:
    """Raise RangeError unless every value is finite and at most `bound` in absolute value."""
    if values.size == 0:
        return
    finite = np.isfinite(values)
    if not finite.all():
        raise RangeError(
            f"{int((~finite).sum())} of {values.size} values of the update are NaN or infinite: "
            "lower training.learning_rate or look at the data"
        )
    largest = float(np.abs(values).max())
    if largest > bound:
        raise RangeError(
            f"a value of the update is {largest:.4g}, above crypto.bound={bound:g}: "
            "training diverged, or raise the bound for every client"
        )
