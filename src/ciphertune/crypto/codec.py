"""Ciphertext residues <-> bytes, and the SEAL blobs built from them.

On the wire a ciphertext is nothing but its residues, so that its length is known beforehand and every value can be
checked. SEAL and TenSEAL only ever parse blobs that were written here:

    wire block       c0 mod q_0 .. c0 mod q_L | c1 mod q_0 .. c1 mod q_L     N residues each, ceil(bits / 8) bytes, LE
    SEAL ciphertext  header 16 | parms_id 32 | ntt 1 | polys 8 | N 8 | primes 8 | scale 8 | factor 8 | array
    seeded           as above with the first polynomial's array | header 16 | generator 1 | seed 64
    SEAL array       header 16 | count 8 | count * 8                         (uncompressed, SEAL 4.1)
    TenSEAL vector   protobuf: 1 sizes (packed varints), 2 ciphertext (bytes), 3 scale (double)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import zstandard

from ciphertune.crypto.params import SEED_BYTES
from ciphertune.errors import CiphertuneError, FormatError

Residues = npt.NDArray[np.uint64]

_SEAL_MAGIC = 0xA15E
_HEADER = struct.Struct("<HBBBBHQ")  # magic, header size, major, minor, compression, reserved, total size
_META = struct.Struct("<32sBQQQdQ")
_DECOMPRESSOR = zstandard.ZstdDecompressor()
_BLAKE2XB = 1  # the generator that expands a seed


def pack(residues: Residues, widths: Sequence[int]) -> bytes:
    """Residues of shape (polys, primes, N) -> bytes, each cut to its prime's width."""
    raw = np.ascontiguousarray(residues, dtype="<u8").view(np.uint8).reshape(*residues.shape, 8)
    return b"".join(np.ascontiguousarray(p[i, :, :w]).tobytes() for p in raw for i, w in enumerate(widths))


def cut(residues: Residues, width: int) -> bytes:
    """Residues (N,) -> the lowest `width` bytes of each."""
    raw = np.ascontiguousarray(residues, dtype="<u8").view(np.uint8).reshape(-1, 8)
    return raw[:, :width].tobytes()


def widen(data: npt.NDArray[np.uint8], width: int) -> Residues:
    """Bytes (rows, n * width) -> residues (rows, n)."""
    out = np.zeros((len(data), data.shape[1] // width, 8), np.uint8)
    out[..., :width] = data.reshape(*out.shape[:2], width)
    return out.view("<u8")[..., 0]


def unpack(block: bytes, moduli: Sequence[int], widths: Sequence[int], degree: int) -> Residues:
    """One wire block -> residues of shape (2, primes, degree).

    Raises FormatError for a wrong length, a residue not below its prime, or an all-zero second polynomial (such a
    "ciphertext" hides nothing and makes SEAL refuse the sum).
    """
    if len(block) != 2 * degree * sum(widths):
        raise FormatError(f"a ciphertext of {len(block)} bytes where {2 * degree * sum(widths)} are expected")
    out = np.zeros((2, len(moduli), degree, 8), np.uint8)
    at = 0
    for poly in range(2):
        for i, width in enumerate(widths):
            size = degree * width
            out[poly, i, :, :width] = np.frombuffer(block, np.uint8, size, at).reshape(degree, width)
            at += size
    residues = out.view("<u8")[..., 0]
    if (residues.max(axis=(0, 2)) >= np.array(moduli, np.uint64)).any():
        raise FormatError("a ciphertext holds a residue that is not below its modulus")
    if not residues[1].any():
        raise FormatError("a ciphertext whose second polynomial is zero hides nothing")
    return residues


def seal_ciphertext(residues: Residues, parms_id: bytes, scale: float, *, ntt: bool = True) -> bytes:
    """A SEAL ciphertext blob from residues of shape (2, primes, N)."""
    polys, primes, degree = residues.shape
    meta = _META.pack(parms_id, ntt, polys, degree, primes, scale, 1)
    return with_header(meta + seal_array(residues))


def seeded_ciphertext(residues: Residues, seed: bytes, parms_id: bytes, scale: float, ntt: bool) -> bytes:
    """A SEAL ciphertext blob whose second polynomial is given by the seed that it is expanded from.

    residues: of the first polynomial, (N,), one prime.
    """
    meta = _META.pack(parms_id, ntt, 2, residues.size, 1, scale, 1)
    return with_header(meta + seal_array(residues) + with_header(bytes([_BLAKE2XB]) + seed))


def split_seeded(blob: bytes, degree: int) -> tuple[Residues, bytes]:
    """First polynomial, (degree,), and seed of a seeded ciphertext that this process has just saved; one prime.

    Raises FormatError for a layout that the pinned TenSEAL does not write.
    """
    body = blob_body(blob)
    seed = body[-SEED_BYTES:]
    if len(body) != _META.size + _HEADER.size + 8 + 8 * degree + _HEADER.size + 1 + SEED_BYTES or (
        body[-SEED_BYTES - 1] != _BLAKE2XB
    ):
        raise FormatError("unexpected SEAL blob: this build of TenSEAL is not the pinned one")
    return np.frombuffer(body, "<u8", degree, _META.size + _HEADER.size + 8), seed


def seal_array(residues: Residues) -> bytes:
    """SEAL's serialised array of 64-bit words."""
    data = residues.astype("<u8").tobytes()
    return with_header(struct.pack("<Q", len(data) // 8) + data)


def blob_body(blob: bytes) -> bytes:
    """The body of a SEAL blob that this process has just saved, decompressed where SEAL compressed it.

    Raises FormatError for a header that the pinned TenSEAL does not write.
    """
    _, size, _, _, compression, _, total = _HEADER.unpack_from(blob)
    if total != len(blob) or compression not in (0, 2):
        raise FormatError("unexpected SEAL blob: this build of TenSEAL is not the pinned one")
    body = memoryview(blob)[size:]
    return _DECOMPRESSOR.decompressobj().decompress(body) if compression == 2 else bytes(body)


def tail_words(body: bytes, words: int) -> Residues:
    """The last `words` 64-bit words of a SEAL body: its array."""
    return np.frombuffer(body, "<u8", words, len(body) - 8 * words)


def tenseal_vector(blob: bytes, count: int, scale: float) -> bytes:
    """TenSEAL's protobuf of a vector with one ciphertext."""
    return field(1, varint(count)) + field(2, blob) + varint(3 << 3 | 1) + struct.pack("<d", scale)


def field(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    """A protobuf varint."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


class Scratch:
    """A file in memory: SEAL's Python binding saves and loads by path only, and a key must not touch the disk.

    keeps: what was written stays until the next use, which is faster: for ciphertexts, never for keys.
    Raises CiphertuneError where the system has no such files.
    """

    def __init__(self, *, keeps: bool = False) -> None:
        self._keeps = keeps
        if not hasattr(os, "memfd_create"):
            raise CiphertuneError("encryption needs files in memory, so that no key meets the disk: run it on Linux")
        self._fd = os.memfd_create("ciphertune", os.MFD_CLOEXEC)
        self.path = f"/proc/self/fd/{self._fd}"

    def saved(self, save: Callable[[str], object]) -> bytes:
        """What `save(path)` writes."""
        save(self.path)  # opens the file anew, which empties it
        data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        self._wipe()
        return data

    def load(self, blob: bytes, load: Callable[[str], object]) -> None:
        """Have `load(path)` read a blob that was written here."""
        os.pwrite(self._fd, blob, 0)  # SEAL does not read what an earlier, longer blob left behind it
        load(self.path)
        self._wipe()

    def load_again(self, tail: bytes, size: int, load: Callable[[str], object]) -> None:
        """As `load`, of the last blob, of that size, with another tail. Only where the file keeps it."""
        os.pwrite(self._fd, tail, size - len(tail))
        load(self.path)

    def _wipe(self) -> None:
        if not self._keeps:
            os.ftruncate(self._fd, 0)

    def __del__(
        self, truncate: Callable[[int, int], None] = os.ftruncate, close: Callable[[int], None] = os.close
    ) -> None:
        if "_fd" in self.__dict__:
            truncate(self._fd, 0)  # bound above: at the interpreter's end the module is gone before the last of us
            close(self._fd)


def with_header(body: bytes) -> bytes:
    """A SEAL blob around `body`, uncompressed."""
    return _HEADER.pack(_SEAL_MAGIC, _HEADER.size, 4, 3, 0, 0, _HEADER.size + len(body)) + body
