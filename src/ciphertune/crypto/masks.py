"""Masks that only clients read: a bitmap under deterministic authenticated encryption (AES-SIV, RFC 5297).

Deterministic on purpose: equal masks of one round are equal bytes, so the server can see that its clients agree, and
nothing else. Two rounds never share the associated data. Only clients load this file.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from ciphertune.crypto.base import mask_bytes
from ciphertune.errors import FormatError

Mask = npt.NDArray[np.bool_]


def close(mask: Mask, material: bytes, context: bytes) -> bytes:
    """A mask (entries,) for those who hold the material (64 bytes) and know the context."""
    return AESSIV(material).encrypt(np.packbits(mask).tobytes(), [context]) if mask.size else b""


def open_(data: bytes, entries: int, material: bytes, context: bytes) -> Mask:
    """The inverse of `close`. Raises FormatError for another length, key or context, or changed bytes."""
    if len(data) != mask_bytes(entries):
        raise FormatError(f"a mask of {len(data)} bytes where {mask_bytes(entries)} are expected")
    if not entries:
        return np.zeros(0, bool)
    try:
        bits = AESSIV(material).decrypt(data, [context])
    except InvalidTag:
        raise FormatError("the message's mask was made under another key or for another round, or is damaged") from None
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=entries).astype(bool)
