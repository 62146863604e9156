"""CKKS through TenSEAL's CKKSVector, the public half: contexts without any key, checked parsing, sums.

The server uses this file. It builds its context from the parameters alone, so no key ever exists in its process. It
adds, and multiplies by plaintexts where a method needs it; Galois and relinearisation keys are never made because
nothing here rotates, or multiplies ciphertexts with each other.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import tenseal as ts
import tenseal.sealapi as seal

from ciphertune.crypto import codec
from ciphertune.crypto.base import Aggregator
from ciphertune.crypto.params import CkksParams
from ciphertune.errors import FormatError, SettingsError

FloatVector = npt.NDArray[np.float64]

_SYMMETRIC = 1  # TenSEAL's encryption type, field 4 of its context


class CkksPublic:
    """Sizes, digest and sums of CKKS ciphertexts: one block is one ciphertext of N/2 values."""

    encrypts = True
    adds_noise = True

    def __init__(self, params: CkksParams) -> None:
        self.params = params
        self.slots = params.slots
        self.block_bytes = params.block_bytes
        self.context = context(params)
        self.moduli = moduli(params)
        self.scale = 2.0**params.scale_bits
        self._scratch = codec.Scratch()
        first = self.context.seal_context().data.first_parms_id()
        self._parms_id = struct.pack("<4Q", *first)

    def digest(self) -> bytes:
        """16 bytes over the parameters."""
        return self.params.digest()

    def error_bound(self, contributors: int, magnitude: float) -> float:
        """See `CkksParams.error_bound`."""
        return self.params.error_bound(contributors, magnitude)

    def sum_bytes(self, terms: int) -> int:
        """Two polynomials, however many are summed."""
        return self.block_bytes

    def aggregator(self) -> Aggregator:
        """An empty sum."""
        return CkksSum(self)

    @property
    def largest(self) -> float:
        """See `CkksParams.largest`."""
        return self.params.largest

    def product_error_bound(self, coefficients: float, values: float, magnitude: float) -> float:
        """See `CkksParams.product_error_bound`."""
        return self.params.product_error_bound(coefficients, values, magnitude)

    def check(self, body: bytes) -> None:
        """Raise FormatError unless the bytes are whole ciphertexts with residues below their primes."""
        self.protos(body)

    def combine(
        self,
        rows: Sequence[bytes],
        coefficients: npt.NDArray[np.float64],
        groups: npt.NDArray[np.int64],
        added: npt.NDArray[np.float64],
    ) -> list[bytes]:
        """See `PublicPart.combine`. Plaintext products slot by slot: one factor in depth, no rotation, no key."""
        multiplier = Multiplier(self)
        out: list[list[bytes]] = [[] for _ in added]
        for start in range(0, groups.size, self.slots):
            at, here = start // self.slots * self.block_bytes, groups[start : start + self.slots]
            found = [(k, row[at : at + self.block_bytes]) for k, row in enumerate(rows) if at < len(row)]
            terms = [(k, self.vectors(block)[0].ciphertext()[0]) for k, block in found]
            for p, blocks in enumerate(out):
                factors = [coefficients[p, k, here] for k, _ in terms]
                total = multiplier.sum([c for _, c in terms], factors, added[p, start : start + self.slots])
                blocks.append(self._pack(total))
        return [b"".join(blocks) for blocks in out]

    def vectors(self, body: bytes, count: int | None = None) -> list[Any]:
        """Checked wire blocks -> CKKSVector each, in the keyless context. Raises FormatError."""
        return [ts.ckks_vector_from(self.context, proto) for proto in self.protos(body, count)]

    def protos(self, body: bytes, count: int | None = None, *, product: bool = False) -> list[bytes]:
        """Checked wire blocks -> TenSEAL protobuf each; `count` values in all, every slot of every block by default.

        product: the blocks are combinations, at the scale of a product. Raises FormatError for bytes that are not so
        many whole blocks.
        """
        if len(body) % self.block_bytes:
            raise FormatError(f"{len(body)} bytes are no whole number of {self.block_bytes}-byte ciphertexts")
        blocks = len(body) // self.block_bytes
        count = blocks * self.slots if count is None else count
        if -(-count // self.slots) != blocks:
            raise FormatError(f"{blocks} ciphertexts where the plan has {-(-count // self.slots)}")
        scale = self.scale * 2.0**self.params.coefficient_bits if product else self.scale
        return [
            self._proto(
                body[i * self.block_bytes : (i + 1) * self.block_bytes], min(self.slots, count - i * self.slots), scale
            )
            for i in range(blocks)
        ]

    def _proto(self, block: bytes, count: int, scale: float) -> bytes:
        residues = codec.unpack(block, self.moduli, self.params.widths, self.params.poly_modulus_degree)
        blob = codec.seal_ciphertext(residues, self._parms_id, scale)
        return codec.tenseal_vector(blob, count, scale)

    def block(self, vector: Any) -> bytes:
        """One CKKSVector of one ciphertext -> wire block."""
        (ciphertext,) = vector.ciphertext()
        return self._pack(ciphertext)

    def _pack(self, ciphertext: Any) -> bytes:
        shape = (2, len(self.moduli), self.params.poly_modulus_degree)
        if (ciphertext.size(), ciphertext.coeff_modulus_size(), ciphertext.poly_modulus_degree()) != shape:
            raise FormatError(f"unexpected ciphertext shape: want {shape}")
        body = codec.blob_body(self._scratch.saved(ciphertext.save))
        words = codec.tail_words(body, shape[0] * shape[1] * shape[2])
        return codec.pack(words.reshape(shape), self.params.widths)


class CkksSum:
    """A running sum of vectors of ciphertexts."""

    def __init__(self, public: CkksPublic) -> None:
        self._public = public
        self._sum: list[Any] = []

    def add(self, body: bytes) -> None:
        """Add one vector; see `Aggregator.add`."""
        new = self._public.vectors(body)
        try:
            # not in place: a refusal halfway must leave the sum as it was
            both = [old + term for old, term in zip(self._sum, new, strict=False)]
        except Exception as error:  # TenSEAL raises ValueError or RuntimeError, without a common base
            raise FormatError("TenSEAL refused to add a ciphertext") from error
        self._sum = both + self._sum[len(new) :] + new[len(both) :]

    def blocks(self) -> int:
        """Ciphertexts of the longest vector so far."""
        return len(self._sum)

    def result(self, blocks: int) -> bytes:
        """The first `blocks` ciphertexts of the sum."""
        return b"".join(self._public.block(v) for v in self._sum[:blocks])


class Multiplier:
    """Ciphertexts times plaintext vectors, through SEAL: TenSEAL would encode the vectors at the ciphertexts' scale."""

    def __init__(self, public: CkksPublic) -> None:
        if not public.params.coefficient_bits:
            raise SettingsError("crypto.coefficient_bits=0: these parameters only add; use crypto=ckks_product")
        context = public.context.seal_context().data
        self._encoder, self._evaluator = seal.CKKSEncoder(context), seal.Evaluator(context)
        self._scale = 2.0**public.params.coefficient_bits
        self._product_scale = public.scale * self._scale

    def sum(self, terms: Sequence[Any], factors: Sequence[FloatVector], added: FloatVector) -> Any:
        """``sum_k factors[k] * terms[k] + added`` as one ciphertext, at the product scale; at least one term.

        Terms that cancel each other's second polynomial, which only a client that sends no honest ciphertexts can make,
        hide nothing, and SEAL refuses the sum: they are left out of it.
        """
        total: Any = None
        for term, factor in zip(terms, factors, strict=True):
            product = self._times(term, self._factor(factor))
            total = product if total is None else self._plus(total, product)
        if total is None:
            smallest = np.full(factors[-1].shape, 1.0 / self._scale)
            total = self._times(terms[-1], self._factor(smallest))
        if added.any():
            plain = seal.Plaintext()
            self._encoder.encode(added.tolist(), self._product_scale, plain)
            self._evaluator.add_plain_inplace(total, plain)
        return total

    def _times(self, term: Any, factor: Any) -> Any:
        product = seal.Ciphertext()
        self._evaluator.multiply_plain(term, factor, product)
        return product

    def _plus(self, one: Any, two: Any) -> Any:
        total = seal.Ciphertext()
        try:
            self._evaluator.add(one, two, total)
        except RuntimeError as error:
            if "transparent" not in str(error):
                raise
            return None
        return total

    def _factor(self, values: FloatVector) -> Any:
        plain = seal.Plaintext()
        self._encoder.encode(values.tolist(), self._scale, plain)
        if plain.is_zero():  # times zero SEAL refuses: the result would hide nothing. The smallest step does no harm
            self._encoder.encode(1.0 / self._scale, self._scale, plain)
        return plain


def moduli(params: CkksParams) -> tuple[int, ...]:
    """The data primes, as SEAL chooses them."""
    return tuple(p.value() for p in _primes(params)[:-1])


def _primes(params: CkksParams) -> list[Any]:
    try:
        return list(seal.CoeffModulus.Create(params.poly_modulus_degree, list(params.coeff_mod_bits)))
    except (RuntimeError, ValueError) as error:
        raise SettingsError(
            f"crypto.coeff_mod_bits={list(params.coeff_mod_bits)}: there are not enough primes of these sizes at "
            f"poly_modulus_degree={params.poly_modulus_degree}; use larger ones"
        ) from error


def context_bytes(params: CkksParams) -> bytes:
    """TenSEAL's protobuf of a context with no key in it: 1 parameters, 2 flags and scale, 4 encryption type."""
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(params.poly_modulus_degree)
    parameters.set_coeff_modulus(_primes(params))
    blob = codec.Scratch().saved(parameters.save)
    flags = (
        codec.varint(2 << 3) + codec.varint(7) + codec.varint(3 << 3 | 1) + struct.pack("<d", 2.0**params.scale_bits)
    )
    return codec.field(1, blob) + codec.field(2, flags) + codec.varint(4 << 3) + codec.varint(_SYMMETRIC)


@cache
def context(params: CkksParams) -> Any:
    """A TenSEAL context that can add and nothing else."""
    return ts.context_from(context_bytes(params), n_threads=1)
