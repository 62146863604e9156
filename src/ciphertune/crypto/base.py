"""What the server may hold. No argument and no result of anything here can carry a secret.

The client's counterpart, which holds a key, is `SecretPart` in `crypto/secret.py`; the server never imports it.
"""

from __future__ import annotations

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
        """The first `blocks` blocks of the sum, `blocks * public.block_bytes` bytes."""


class PublicPart(Protocol):
    """The public half of a backend: sizes, digest, bounds and sums."""

    @property
    def slots(self) -> int:
        """Values in one block."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on the wire, up and down."""

    @property
    def encrypts(self) -> bool:
        """False for the oracle backend, whose blocks anybody reads."""

    def digest(self) -> bytes:
        """16 bytes over the parameters and the byte layout."""

    def error_bound(self, contributors: int, magnitude: float) -> float:
        """Largest absolute error of a decrypted sum of `contributors` vectors whose sum is at most `magnitude`."""

    def aggregator(self) -> Aggregator:
        """An empty sum."""


def blocks_for(public: PublicPart, values: int) -> int:
    """Blocks that `values` values take."""
    return -(-values // public.slots)


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
