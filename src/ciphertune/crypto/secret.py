"""What only a client may hold: a key, and the operations that need one. The server's modules never import this file."""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ciphertune.crypto.base import PublicPart
from ciphertune.errors import KeyFileError


class SecretKey:
    """Secret key material of one backend under one set of parameters. Its repr shows the fingerprint only."""

    __slots__ = ("_material", "params_digest")

    def __init__(self, material: bytes, params_digest: bytes) -> None:
        self._material = bytes(material)
        self.params_digest = params_digest

    def reveal(self) -> bytes:
        """The raw key material. Named so that every use stands out in a review."""
        return self._material

    def words(self, params_digest: bytes, count: int) -> npt.NDArray[np.uint64]:
        """The `count` residues of a key for these parameters. Raises KeyFileError: of others, cut off, or all zero."""
        name = f"key {self.fingerprint.hex()}"
        if self.params_digest != params_digest:
            raise KeyFileError(
                f"{name} was made for other encryption parameters: create one with the crypto settings of this run"
            )
        if len(self._material) != 8 * count:
            raise KeyFileError(f"{name} has {len(self._material) / 8:g} residues where {count} are expected")
        found = np.frombuffer(self._material, "<u8")
        if not found.any():
            raise KeyFileError(f"{name} is all zero: everybody could read what it encrypts")
        return found

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that identify the key and, being a hash of a key of full entropy, tell nothing else about it."""
        return hashlib.sha256(b"ciphertune key fingerprint 1" + self.params_digest + self._material).digest()[:16]

    def derive(self, purpose: bytes) -> bytes:
        """32 bytes for another purpose than encryption: HKDF-SHA256 (RFC 5869) over the material."""
        info = b"ciphertune derived 1" + self.params_digest + purpose
        return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(self._material)

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

    def decrypt(self, body: bytes, count: int, *, terms: int = 1, product: bool = False) -> npt.NDArray[np.float64]:
        """The first `count` values of a vector. Raises WireError on bytes that are no vector of that many blocks.

        terms: updates that it is the sum of.  product: it is a combination that the server made (`PublicPart.combine`).
        """

    def derive(self, purpose: bytes) -> bytes:
        """32 bytes that only the holders of the key can compute, and that tell nothing of the key; one per purpose."""
