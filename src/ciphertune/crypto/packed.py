"""The packed backends, the public half: fresh ciphertexts of one polynomial and a seed, and their sums.

A ciphertext (c0, c1) of symmetric encryption has a uniformly random c1, which a 64-byte seed stands for. So a client
sends c0 and the seed, half of the bytes. Of a sum the server keeps the sum of the c0 and, while they are few, all
seeds: clients expand them. Adding the c0 is adding residues modulo q, done here on integers; SEAL expands seeds, from
blobs that were written here, and adds what comes of them. Neither scheme matters to the server.

    fresh     seed 64 | c0                  N residues of ceil(bits / 8) bytes each, little-endian
    sum of k  k seeds, ascending | c0       up to MOST_SEEDS of them
              c0 | c1                       else
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal

from ciphertune.crypto import codec
from ciphertune.crypto.base import Aggregator
from ciphertune.crypto.codec import Residues
from ciphertune.crypto.params import MOST_SEEDS, SEED_BYTES, PackedParams
from ciphertune.errors import FormatError, SettingsError

_SCHEME = {"ckks": seal.SCHEME_TYPE.CKKS, "bfv": seal.SCHEME_TYPE.BFV}


class PackedPublic:
    """Sizes, digest and sums: one block is one ciphertext of N values."""

    encrypts = True

    def __init__(self, params: PackedParams) -> None:
        self.params = params
        self.slots = params.slots
        self.adds_noise = params.scheme == "ckks"
        self.block_bytes = params.block_bytes
        self.context, self.modulus, self.plain_modulus = _context(params)
        self._scratch, self._evaluator = codec.Scratch(keeps=True), seal.Evaluator(self.context)
        self._parms_id = struct.pack("<4Q", *self.context.first_parms_id())

    def digest(self) -> bytes:
        """16 bytes over the parameters."""
        return self.params.digest()

    def error_bound(self, contributors: int, magnitude: float) -> float:
        """See `PackedParams.error_bound`."""
        return self.params.error_bound(contributors, magnitude)

    def sum_bytes(self, terms: int) -> int:
        """See `PackedParams.sum_bytes`."""
        return self.params.sum_bytes(terms)

    def aggregator(self) -> Aggregator:
        """An empty sum."""
        return PackedSum(self)

    @property
    def largest(self) -> float:
        """See `PackedParams.largest`."""
        return self.params.largest

    def check(self, body: bytes) -> None:
        """Raise FormatError unless the bytes are whole fresh ciphertexts with residues below the prime."""
        self.fresh(body)

    def combine(
        self,
        rows: Sequence[bytes],
        coefficients: npt.NDArray[np.float64],
        groups: npt.NDArray[np.int64],
        added: npt.NDArray[np.float64],
    ) -> list[bytes]:
        """These parameters only add. Raises SettingsError."""
        raise SettingsError("a packed backend only adds: use crypto=ckks_product")

    def product_error_bound(self, coefficients: float, values: float, magnitude: float) -> float:
        """These parameters only add. Raises SettingsError."""
        raise SettingsError("a packed backend only adds: use crypto=ckks_product")

    # --- bytes --------------------------------------------------------------------------------------------------------

    def fresh(self, body: bytes) -> tuple[npt.NDArray[np.uint8], Residues]:
        """Seeds (blocks, 64) and first polynomials (blocks, N) of fresh ciphertexts. Raises FormatError."""
        blocks = self._blocks(body, self.block_bytes)
        return blocks[:, :SEED_BYTES], self._residues(blocks[:, SEED_BYTES:])

    def summed(self, body: bytes, terms: int) -> tuple[list[list[bytes]], Residues]:
        """Seeds of each block, or none where both polynomials travelled, and residues (blocks, 1 or 2, N)."""
        self.check_terms(terms)
        blocks, seeds = self._blocks(body, self.sum_bytes(terms)), self._seeds(terms)
        found = [[row[i : i + SEED_BYTES].tobytes() for i in range(0, seeds, SEED_BYTES)] for row in blocks]
        residues = self._residues(blocks[:, seeds:])
        return found, residues.reshape(len(blocks), 1 if seeds else 2, self.slots)

    def pack_sum(self, seeds: Sequence[bytes], residues: Sequence[Residues]) -> bytes:
        """The inverse of `summed`: the bytes of one block.

        seeds: SEED_BYTES each, in any order, none where the sum travels with both polynomials.  residues: (N,) words
        below the modulus, one array per polynomial that travels.
        """
        return b"".join((*sorted(seeds), *(codec.cut(r, self.params.width) for r in residues)))

    def check_terms(self, terms: int) -> None:
        """Raise FormatError unless the parameters carry a sum of so many updates."""
        if not 1 <= terms <= self.params.max_updates:
            raise FormatError(
                f"a sum of {terms} updates: crypto.max_updates={self.params.max_updates} allows 1 to that"
            )

    def keeps_seeds(self, terms: int) -> bool:
        """Whether a sum of that many travels with seeds."""
        return self._seeds(terms) > 0

    def _seeds(self, terms: int) -> int:
        return terms * SEED_BYTES if terms <= MOST_SEEDS else 0

    def _blocks(self, body: bytes, size: int) -> npt.NDArray[np.uint8]:
        if len(body) % size:
            raise FormatError(f"{len(body)} bytes are no whole number of {size}-byte ciphertexts")
        return np.frombuffer(body, np.uint8).reshape(len(body) // size, size)

    def _residues(self, data: npt.NDArray[np.uint8]) -> Residues:
        residues = codec.widen(data, self.params.width)
        if residues.size and int(residues.max()) >= self.modulus:
            raise FormatError("a ciphertext holds a residue that is not below its modulus")
        return residues

    # --- SEAL ---------------------------------------------------------------------------------------------------------

    def expanded(self, residues: Residues, seeds: Sequence[bytes]) -> Any:
        """SEAL's ciphertext of first polynomial `residues` whose second one is the sum of what the seeds stand for.

        residues: (N,) words below the modulus.  seeds: at least one, SEED_BYTES each. `fresh` and `summed` check both.
        """
        total, term, evaluator = self._loaded(self._seeded(residues, seeds[0])), seal.Ciphertext(), self._evaluator
        if len(seeds) > 1:
            blob = self._seeded(np.zeros_like(residues), seeds[1])
            self._scratch.load(blob, lambda path: term.load(self.context, path))
            evaluator.add_inplace(total, term)
            for seed in seeds[2:]:  # only the seed differs
                self._scratch.load_again(seed, len(blob), lambda path: term.load(self.context, path))
                evaluator.add_inplace(total, term)
        return total

    def whole(self, residues: Residues) -> Any:
        """SEAL's ciphertext of both polynomials, (2, N). Raises FormatError when the second is zero."""
        if not residues[1].any():
            raise FormatError("a ciphertext whose second polynomial is zero hides nothing")
        return self._loaded(
            codec.seal_ciphertext(residues[:, None], self._parms_id, self._blob_scale, ntt=self._ntt),
        )

    def add_seeds(self, ciphertext: Any, seeds: Sequence[bytes]) -> Any:
        """Add what seeds stand for to a ciphertext of which only the second polynomial counts; None: an empty one."""
        term = self.expanded(np.zeros(self.slots, np.uint64), seeds)
        if ciphertext is None:
            return term
        self._evaluator.add_inplace(ciphertext, term)
        return ciphertext

    def second(self, *seeds: bytes) -> Residues:
        """The sum of the second polynomials that seeds stand for, (N,)."""
        return self.second_of(self.expanded(np.zeros(self.slots, np.uint64), seeds))

    def second_of(self, ciphertext: Any) -> Residues:
        """The second polynomial of SEAL's ciphertext, (N,)."""
        body = codec.blob_body(self._scratch.saved(ciphertext.save))
        return codec.tail_words(body, self.slots)

    def _seeded(self, residues: Residues, seed: bytes) -> bytes:
        return codec.seeded_ciphertext(residues, seed, self._parms_id, self._blob_scale, self._ntt)

    def _loaded(self, blob: bytes) -> Any:
        ciphertext = seal.Ciphertext()
        self._scratch.load(blob, lambda path: ciphertext.load(self.context, path))
        return ciphertext

    @property
    def _ntt(self) -> bool:
        return self.params.scheme == "ckks"

    @property
    def _blob_scale(self) -> float:
        return 2.0**self.params.scale_bits if self.params.scheme == "ckks" else 1.0


class PackedSum:
    """A running sum: the first polynomials added up, and of each block the seeds or, past a number, their sum."""

    def __init__(self, public: PackedPublic) -> None:
        self._public = public
        self._first = np.zeros((0, public.slots), np.uint64)
        self._second: dict[int, Any] = {}  # of blocks with more terms than seeds travel
        self._seeds: list[list[bytes]] = []
        self._terms: list[int] = []

    def add(self, body: bytes) -> None:
        """Add one vector; see `Aggregator.add`."""
        seeds, residues = self._public.fresh(body)
        self._public.check_terms(1 + max(self._terms[: len(residues)], default=0))
        missing = len(residues) - len(self._first)
        if missing > 0:
            self._first = np.concatenate([self._first, np.zeros((missing, self._public.slots), np.uint64)])
            self._seeds += [[] for _ in range(missing)]
            self._terms += [0] * missing
        _add(self._first[: len(residues)], residues, self._public.modulus)
        for i, seed in enumerate(seeds):
            self._seeds[i].append(seed.tobytes())
            self._terms[i] += 1
            if not self._public.keeps_seeds(self._terms[i]):
                self._fold(i)

    def _fold(self, block: int) -> None:
        self._second[block] = self._public.add_seeds(self._second.get(block), self._seeds[block])
        self._seeds[block] = []

    def blocks(self) -> int:
        """Ciphertexts of the longest vector so far."""
        return len(self._first)

    def result(self, blocks: int) -> bytes:
        """The first `blocks` ciphertexts of the sum."""
        parts = []
        for i in range(min(blocks, len(self._first))):
            second = [self._public.second_of(self._second[i])] if i in self._second else []
            parts.append(self._public.pack_sum(self._seeds[i], [self._first[i], *second]))
        return b"".join(parts)


def _add(total: Residues, term: Residues, modulus: int) -> None:
    """``total += term`` modulo q, in place; both below q, which has at most 60 bits."""
    np.add(total, term, out=total)
    np.subtract(total, np.uint64(modulus), out=total, where=total >= np.uint64(modulus))


@cache
def _context(params: PackedParams) -> tuple[Any, int, int]:
    """SEAL's context, which holds no key; the modulus q; the plaintext modulus t, 0 where there is none."""
    degree = params.poly_modulus_degree
    parameters = seal.EncryptionParameters(_SCHEME[params.scheme])
    parameters.set_poly_modulus_degree(degree)
    plain, plain_bits = 0, params.plain_bits if params.scheme == "bfv" else 0
    try:
        primes = seal.CoeffModulus.Create(degree, [params.modulus_bits])
        parameters.set_coeff_modulus(primes)
        if params.scheme == "bfv":
            modulus = seal.PlainModulus.Batching(degree, params.plain_bits)
            parameters.set_plain_modulus(modulus)
            plain = int(modulus.value())
    except (RuntimeError, ValueError) as error:
        sizes = f"modulus_bits={params.modulus_bits}" + (f", plain_bits={params.plain_bits}" if plain_bits else "")
        raise SettingsError(f"crypto.{sizes}: there is no such prime at poly_modulus_degree={degree}") from error
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():
        raise SettingsError(f"SEAL refuses the parameters: {context.parameters_error_message()}")
    return context, int(primes[0].value()), plain
