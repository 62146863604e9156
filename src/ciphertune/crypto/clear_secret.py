"""The client's half of the backend without encryption."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from ciphertune.crypto.base import check_range
from ciphertune.crypto.clear import ClearPublic, parse
from ciphertune.errors import FormatError


class ClearSecret:
    """Stands where a key would stand; there is none."""

    fingerprint = bytes(16)

    def __init__(self, public: ClearPublic, bound: float) -> None:
        self.public = public
        self._bound = bound

    def encrypt(self, values: npt.NDArray[np.float64]) -> bytes:
        """The values themselves. Raises RangeError as an encrypting backend would."""
        check_range(values, self._bound)
        return values.astype(self.public.dtype).tobytes()

    def decrypt(self, body: bytes, count: int, *, terms: int = 1, product: bool = False) -> npt.NDArray[np.float64]:
        """The values themselves."""
        values = parse(body, self.public.dtype)
        if values.size != count:
            raise FormatError(f"{values.size} values where the plan has {count}")
        return values

    def derive(self, purpose: bytes) -> bytes:
        """The same for everybody: without a key there is nothing to derive from."""
        return hashlib.sha256(b"no key" + purpose).digest()
