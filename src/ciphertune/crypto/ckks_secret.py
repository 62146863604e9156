"""CKKS through TenSEAL's CKKSVector, the client's half: key generation, encryption, decryption."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import tenseal as ts

from ciphertune.crypto import codec
from ciphertune.crypto.base import check_range
from ciphertune.crypto.ckks import CkksPublic, context_bytes
from ciphertune.crypto.params import CkksParams
from ciphertune.crypto.secret import SecretKey
from ciphertune.errors import KeyFileError


def generate_key(params: CkksParams) -> SecretKey:
    """A fresh ternary secret key from SEAL's own generator (which seeds itself from the operating system).

    The material is the key's residues modulo every prime, in NTT order: a file format of ours, not TenSEAL's bytes.
    """
    fresh = ts.context(
        ts.SCHEME_TYPE.CKKS,
        params.poly_modulus_degree,
        coeff_mod_bit_sizes=list(params.coeff_mod_bits),
        encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC,
        n_threads=1,
    )
    body = codec.blob_body(codec.Scratch().saved(fresh.secret_key().data.save))
    words = codec.tail_words(body, params.poly_modulus_degree * len(params.coeff_mod_bits))
    return SecretKey(words.tobytes(), params.digest())


class CkksSecret:
    """Encrypts and decrypts under one key. Symmetric: there is no public key and none is needed."""

    def __init__(self, params: CkksParams, key: SecretKey) -> None:
        self.public = CkksPublic(params)
        self.fingerprint = key.fingerprint
        self._context = _secret_context(params, key)
        self._key = key
        self._bound = params.bound

    def encrypt(self, values: npt.NDArray[np.float64]) -> bytes:
        """Values -> ceil(count / slots) ciphertexts, the last one padded with zeros."""
        check_range(values, self._bound)
        slots = self.public.slots
        padded = np.zeros(-(-values.size // slots) * slots)
        padded[: values.size] = values
        return b"".join(
            self.public.block(ts.ckks_vector(self._context, chunk)) for chunk in padded.reshape(-1, slots).tolist()
        )

    def decrypt(self, body: bytes, count: int, *, terms: int = 1, product: bool = False) -> npt.NDArray[np.float64]:
        """The first `count` values. Lengths come from the caller, never from the bytes."""
        out: list[float] = []
        for proto in self.public.protos(body, count, product=product):
            out += ts.ckks_vector_from(self._context, proto).decrypt()
        return np.array(out[:count], np.float64)

    def derive(self, purpose: bytes) -> bytes:
        """See `SecretPart.derive`."""
        return self._key.derive(purpose)

    def __repr__(self) -> str:
        return f"CkksSecret(fingerprint={self.fingerprint.hex()})"

    def __reduce__(self) -> str:
        raise TypeError("a secret key cannot be pickled")  # TenSEAL's context ends the process at protocols 0 and 1


def _secret_context(params: CkksParams, key: SecretKey) -> Any:
    """The keyless context with the secret key appended to its protobuf (field 3)."""
    words = key.words(params.digest(), params.poly_modulus_degree * len(params.coeff_mod_bits))
    parms_id = CkksPublic(params).context.seal_context().data.key_parms_id()
    # SEAL stores a secret key as a plaintext in NTT form: parms_id 32 | count 8 | scale 8 | array
    meta = struct.pack("<4QQd", *parms_id, words.size, 1.0)
    blob = codec.with_header(meta + codec.seal_array(words))
    try:
        return ts.context_from(context_bytes(params) + codec.field(3, codec.field(1, blob)), n_threads=1)
    except (RuntimeError, ValueError):
        raise KeyFileError(f"key {key.fingerprint.hex()} is not valid under its parameters") from None
