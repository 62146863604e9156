"""The packed backends, the client's half: key generation, and N real values <-> one ciphertext.

ckks: a value and the value N/2 further on are real and imaginary part of one complex slot, so that nothing of the
ring is wasted. bfv: fixed point, rounded at random without bias; sums are exact and decryption adds no noise, so that
a decrypted sum tells nothing of the key. Both: symmetric encryption, SEAL's own generators.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal

from ciphertune.crypto import codec
from ciphertune.crypto.base import check_range
from ciphertune.crypto.packed import PackedPublic
from ciphertune.crypto.params import PackedParams
from ciphertune.crypto.secret import SecretKey
from ciphertune.crypto.workers import Workers
from ciphertune.errors import CiphertuneError, FormatError, KeyFileError

Vector = npt.NDArray[np.float64]

PARALLEL = 4_000_000  # values; below, starting a process takes longer than it saves


def generate_key(params: PackedParams) -> SecretKey:
    """A fresh ternary secret key from SEAL's own generator: its residues modulo the prime, in NTT order."""
    key = seal.KeyGenerator(PackedPublic(params).context).secret_key()
    body = codec.blob_body(codec.Scratch().saved(key.save))
    return SecretKey(codec.tail_words(body, params.poly_modulus_degree).tobytes(), params.digest())


class Encoder(Protocol):
    """N reals <-> SEAL's plaintext."""

    def encode(self, values: Vector) -> Any:
        """Of (N,) values."""

    def decode(self, plain: Any) -> Vector:
        """The inverse, up to rounding."""


class PackedSecret:
    """Encrypts and decrypts under one key.

    processes: how many share vectors of `PARALLEL` values or more; they start with the first such vector.
    """

    def __init__(self, params: PackedParams, key: SecretKey, processes: int = 1) -> None:
        self.public = PackedPublic(params)
        self.fingerprint = key.fingerprint
        self._key = key
        self._bound = params.bound
        self._processes = processes
        self._workers: Workers | None = None
        self._scratch = codec.Scratch(keeps=True)  # of ciphertexts
        context = self.public.context
        loaded = self._load(key, params)
        self._encryptor, self._decryptor = seal.Encryptor(context, loaded), seal.Decryptor(context, loaded)
        self._encoder: Encoder = _Ckks(self.public) if params.scheme == "ckks" else _Bfv(self.public)

    def _load(self, key: SecretKey, params: PackedParams) -> Any:
        words = key.words(params.digest(), params.poly_modulus_degree)
        # SEAL stores a secret key as a plaintext in NTT form: parms_id 32 | count 8 | scale 8 | array
        meta = struct.pack("<4QQd", *self.public.context.key_parms_id(), words.size, 1.0)
        loaded = seal.SecretKey()
        try:
            codec.Scratch().load(  # gone with the key in it
                codec.with_header(meta + codec.seal_array(words)), lambda path: loaded.load(self.public.context, path)
            )
        except (RuntimeError, ValueError):
            raise KeyFileError(f"key {key.fingerprint.hex()} is not valid under its parameters") from None
        return loaded

    def encrypt(self, values: Vector) -> bytes:
        """Values -> ceil(count / N) fresh ciphertexts, the last one padded with zeros."""
        check_range(values, self._bound)
        workers = self._helped(values.size)
        with self._dropped_on_error():
            return workers.encrypt(values) if workers else self._encrypted(values)

    def _encrypted(self, values: Vector) -> bytes:
        slots = self.public.slots
        padded = np.zeros(-(-values.size // slots) * slots)
        padded[: values.size] = values
        return b"".join(self._block(chunk) for chunk in padded.reshape(-1, slots))

    def _block(self, values: Vector) -> bytes:
        seeded = self._encryptor.encrypt_symmetric(self._encoder.encode(values))
        first, seed = codec.split_seeded(self._scratch.saved(seeded.save), self.public.slots)
        return seed + codec.cut(first, self.public.params.width)

    def decrypt(self, body: bytes, count: int, *, terms: int = 1, product: bool = False) -> Vector:
        """The first `count` values of a sum of `terms` vectors. Lengths come from the caller, never from the bytes."""
        if len(body) != -(-count // self.public.slots) * self.public.sum_bytes(terms):
            raise FormatError(f"{len(body)} bytes are no sum of {terms} updates of {count} values")
        workers = self._helped(count)
        with self._dropped_on_error():
            return workers.decrypt(body, count, terms) if workers else self._decrypted(body, count, terms)

    def _decrypted(self, body: bytes, count: int, terms: int) -> Vector:
        seeds, residues = self.public.summed(body, terms)
        out, plain = [np.zeros(0)], seal.Plaintext()
        for own, polynomials in zip(seeds, residues, strict=True):
            ciphertext = self.public.expanded(polynomials[0], own) if own else self.public.whole(polynomials)
            self._decryptor.decrypt(ciphertext, plain)
            out.append(self._encoder.decode(plain))
        return np.concatenate(out)[:count]

    def _helped(self, count: int) -> Workers | None:
        """The processes that share so many values, None where one does it alone."""
        if self._processes < 2 or count < PARALLEL:
            return None
        if self._workers is None:
            self._workers = Workers(self.public.params, self._key, self._processes)
        return self._workers

    @contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        """Processes of which one may have died, or another still holds an answer, are not asked again."""
        try:
            yield
        except CiphertuneError:
            self.close()
            raise

    def close(self) -> None:
        """End the processes, if any were started."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def derive(self, purpose: bytes) -> bytes:
        """See `SecretPart.derive`."""
        return self._key.derive(purpose)

    def __repr__(self) -> str:
        return f"PackedSecret(fingerprint={self.fingerprint.hex()})"

    def __reduce__(self) -> str:
        raise TypeError("a secret key cannot be pickled")


class _Ckks:
    """Two reals in a complex slot."""

    def __init__(self, public: PackedPublic) -> None:
        self._encoder, self._scale = seal.CKKSEncoder(public.context), 2.0**public.params.scale_bits
        self._plain = seal.Plaintext()

    def encode(self, values: Vector) -> Any:
        half = values.size // 2
        slots = np.empty(half, np.complex128)
        slots.real, slots.imag = values[:half], values[half:]
        self._encoder.encode(slots.tolist(), self._scale, self._plain)
        return self._plain

    def decode(self, plain: Any) -> Vector:
        found = self._encoder.decode_complex(plain)
        slots = np.fromiter(found, np.complex128, len(found))
        return np.concatenate([slots.real, slots.imag])


class _Bfv:
    """Fixed point in the plaintext modulus, one value in each of its N slots."""

    def __init__(self, public: PackedPublic) -> None:
        self._encoder, self._scale = seal.BatchEncoder(public.context), 2.0**public.params.scale_bits
        self._plain = seal.Plaintext()
        # rounding hides nothing; it only has to be unbiased and different at every client
        self._random = np.random.default_rng(secrets.randbits(128))

    def encode(self, values: Vector) -> Any:
        units = np.floor(values * self._scale + self._random.random(values.size)).astype(np.int64)
        self._encoder.encode(units.tolist(), self._plain)
        return self._plain

    def decode(self, plain: Any) -> Vector:
        found = self._encoder.decode_int64(plain)
        return np.fromiter(found, np.int64, len(found)) / self._scale
