"""What only a client may hold: a key, and the operations that need one. The server's modules never import this file."""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ciphertune.crypto.base import PublicPart


class SecretKey:
    """Secret key material of one backend under one set of parameters. Its repr shows the fingerprint only."""

    __slots__ = ("_material", "params_digest")

    def __init__(self, material: bytes, params_digest: bytes) -> None:
        self._material = bytes(material)
        self.params_digest = params_digest

    def reveal(self) -> bytes:
        """The raw key material. Named so that every use stands out in a review."""
        return self._material

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that identify the key and, being a hash of a key of full entropy, tell nothing else about it."""
        return hashlib.sha256(b"ciphertune key fingerprint 1" + self.params_digest + self._material).digest()[:16]

    def __repr__(self) -> str:
        return f"SecretKey(fingerprint={self.fingerprint.hex()})"

    def __reduce__(self) -> str:
        raise TypeError("a secret key cannot be pickled")


class SecretPart(Protocol):
    """The client's half of a backend."""

    @property
    def public(self) -> PublicPart:
        """Sizes, digest and bounds."""

    @property
    def fingerprint(self) -> bytes:
        """16 bytes naming the key; zeros where there is none."""

    def encrypt(self, values: npt.NDArray[np.float64]) -> bytes:
        """Encrypt (count,) values into ceil(count / slots) blocks. Raises RangeError: NaN, infinite, over the bound."""

    def decrypt(self, body: bytes, count: int) -> npt.NDArray[np.float64]:
        """The first `count` values of a vector. Raises WireError on bytes that are no vector of that many blocks."""
