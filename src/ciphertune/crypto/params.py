"""CKKS parameters: derived facts, and the checks that refuse unsafe or overflowing ones."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from ciphertune.errors import SettingsError

# Largest log2 of the whole modulus for 128-bit security with a ternary secret, by ring degree
# ("Security Guidelines for Implementing Homomorphic Encryption", 2024, table 5.2).
SECURITY_128 = {2048: 53, 4096: 106, 8192: 214, 16384: 430}

# TenSEAL versions do not read each other's bytes, so the version is part of what must agree.
LIBRARY = "tenseal 0.3.18"

# SEAL draws noise from a centred binomial distribution with variance 42/4. Rounding the encoded message to integers
# adds at most 1/2 per coefficient; it is treated as independent noise of variance 1/4, which is a heuristic.
_NOISE_VARIANCE = 10.75
# 21 coins less 21 coins at most, and half a unit of rounding.
_LARGEST_NOISE = 21.5
# A slot is a signed sum of N such terms: more than 9 standard deviations off with probability below 2^-57 per slot.
_DEVIATIONS = 9.0

SCHEMES = ("ckks", "bfv")
SEED_BYTES = 64  # of SEAL's pseudo-random generator
# A sum of more travels with both polynomials: a client would spend longer on expanding more seeds than on receiving
# what they stand for over a usual line (benchmarks/crypto.py times both forms).
MOST_SEEDS = 8


@dataclass(frozen=True)
class CkksParams:
    """Parameters of CKKS (Cheon, Kim, Kim, Song, ASIACRYPT 2017).

    poly_modulus_degree: N, twice the slots.  coeff_mod_bits: bits of each prime, the last one is SEAL's special prime.
    scale_bits: log2 of the encoding scale.  bound: largest absolute value of a plaintext sum.
    coefficient_bits: log2 of the scale of plaintext factors, where ciphertexts are multiplied by such; 0: only sums.
    A product stays at the scale 2^(scale_bits + coefficient_bits): nothing is rescaled, so no level is used up.
    Raises SettingsError when security falls under 128 bit or a sum could wrap around the modulus.
    """

    poly_modulus_degree: int
    coeff_mod_bits: tuple[int, ...]
    scale_bits: int
    bound: float
    coefficient_bits: int = 0

    def __post_init__(self) -> None:
        degree, bits = self.poly_modulus_degree, self.coeff_mod_bits
        if degree not in SECURITY_128:
            raise SettingsError(
                f"crypto.poly_modulus_degree={degree} is not one of: {', '.join(map(str, SECURITY_128))}"
            )
        if len(bits) < 2 or not all(14 <= b <= 60 for b in bits):
            raise SettingsError(f"crypto.coeff_mod_bits={list(bits)}: want two or more primes of 14 to 60 bits")
        if sum(bits) > SECURITY_128[degree]:
            raise SettingsError(
                f"crypto.coeff_mod_bits={list(bits)} add up to {sum(bits)}, above the {SECURITY_128[degree]} "
                f"that 128-bit security allows at poly_modulus_degree={degree}"
            )
        if not 0 < self.bound < math.inf:
            raise SettingsError(f"crypto.bound={self.bound:g}: want a positive number")
        # Weights are at most 1 and sum to at most 1, so a weighted sum is no larger than its largest term.
        if self.scale_bits < 10 or self.bound > self.largest:
            raise SettingsError(
                f"crypto.bound={self.bound:g} at scale_bits={self.scale_bits}"
                + (f" and coefficient_bits={self.coefficient_bits}" if self.coefficient_bits else "")
                + f" could wrap around the {self.data_bits}-bit modulus: "
                f"lower the bound to {self.largest:g} or lower scale_bits"
            )

    @property
    def data_bits(self) -> int:
        """Bits of the modulus that carries data: all primes but the special one."""
        return sum(self.coeff_mod_bits[:-1])

    @property
    def largest(self) -> float:
        """Largest absolute value that a sum, or a sum of products, may take without wrapping around the modulus."""
        return 2.0 ** (self.data_bits - 2 - self.scale_bits - self.coefficient_bits)

    @property
    def slots(self) -> int:
        """Real values in one ciphertext."""
        return self.poly_modulus_degree // 2

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes of one residue on the wire, per data prime."""
        return tuple(-(-b // 8) for b in self.coeff_mod_bits[:-1])

    @property
    def block_bytes(self) -> int:
        """Bytes of one ciphertext on the wire: two polynomials of N residues per data prime."""
        return 2 * self.poly_modulus_degree * sum(self.widths)

    def digest(self) -> bytes:
        """16 bytes over everything that both ends must share to read each other."""
        text = json.dumps({"layout": 1, "library": LIBRARY, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).digest()[:16]

    def error_bound(self, contributors: int, magnitude: float) -> float:
        """Absolute error of a decrypted sum of `contributors` ciphertexts, but for a probability below 2^-57 per slot.

        Fresh symmetric noise per term, plus float64 rounding of encoder and decoder relative to `magnitude`.
        """
        noise = math.sqrt(contributors * self.poly_modulus_degree * _NOISE_VARIANCE) / 2.0**self.scale_bits
        return _DEVIATIONS * noise + magnitude * 2.0**-46

    def product_error_bound(self, coefficients: float, values: float, magnitude: float) -> float:
        """Absolute error of a decrypted sum of products of plaintext coefficients and encrypted values, per slot.

        coefficients, values: root of the sum of squares of the terms' coefficients, and of their values, in the slot.
        A term is (c + e_c)(v + e_v): fresh noise e_v in its ciphertext, and rounding e_c where its coefficients were
        encoded (N roundings to integers, taken as independent, variance 1/4 or less).
        magnitude: of the sum, for float64's rounding.
        """
        noise = math.sqrt(self.poly_modulus_degree * _NOISE_VARIANCE) / 2.0**self.scale_bits
        rounding = math.sqrt(self.poly_modulus_degree / 4) / 2.0**self.coefficient_bits
        spread = math.hypot(coefficients * noise, values * rounding) + noise * rounding
        return _DEVIATIONS * spread + magnitude * 2.0**-46


@dataclass(frozen=True)
class PackedParams:
    """Parameters of the packed backends: one prime, symmetric encryption, N real values in a ciphertext.

    scheme: ckks (Cheon, Kim, Kim, Song, ASIACRYPT 2017; two reals in a complex slot) or bfv (Brakerski, CRYPTO 2012;
    Fan, Vercauteren, ePrint 2012/144; fixed point, exact sums).  poly_modulus_degree: N.  modulus_bits: of the prime q.
    bound: largest absolute value of a sum.  max_updates: most updates in a sum.  plain_bits: bfv: bits of the plaintext
    modulus t. The scale follows: the largest power of two at which `bound` stays below a quarter of the modulus.
    Raises SettingsError when security falls under 128 bit, or a sum could wrap around a modulus.
    """

    scheme: str
    poly_modulus_degree: int
    modulus_bits: int
    bound: float
    max_updates: int
    plain_bits: int = 0

    def __post_init__(self) -> None:
        degree, bits = self.poly_modulus_degree, self.modulus_bits
        if self.scheme not in SCHEMES:
            raise SettingsError(f"scheme {self.scheme!r} is not one of: {', '.join(SCHEMES)}")
        if degree not in SECURITY_128:
            raise SettingsError(
                f"crypto.poly_modulus_degree={degree} is not one of: {', '.join(map(str, SECURITY_128))}"
            )
        most = min(60, SECURITY_128[degree])  # SEAL's largest prime
        if not 24 <= bits <= most:
            raise SettingsError(
                f"crypto.modulus_bits={bits} at poly_modulus_degree={degree}: want 24 to {most}, which keeps 128-bit "
                "security"
            )
        if not 0 < self.bound < math.inf:
            raise SettingsError(f"crypto.bound={self.bound:g}: want a positive number")
        if self.scheme == "bfv":
            self._check_noise()
        if self.scale_bits < 10:
            largest = 2.0 ** (self.carrier_bits - 12) / self._growth
            raise SettingsError(
                f"crypto.bound={self.bound:g} leaves {self.scale_bits} bits after the point in a "
                f"{self.carrier_bits}-bit modulus: lower the bound to {largest:g}, or raise "
                f"crypto.{'plain' if self.scheme == 'bfv' else 'modulus'}_bits"
            )

    def _check_noise(self) -> None:
        """BFV decrypts exactly while the noise of all terms stays below half of q / t: here below a quarter."""
        if not self.poly_modulus_degree.bit_length() < self.plain_bits <= min(60, self.modulus_bits - 4):
            raise SettingsError(
                f"crypto.plain_bits={self.plain_bits} with modulus_bits={self.modulus_bits}: want more than "
                f"{self.poly_modulus_degree.bit_length()} and at most {min(60, self.modulus_bits - 4)}"
            )
        # the largest there is, not the likely one: the same ciphertext may be added many times
        if _LARGEST_NOISE * self.max_updates >= 2.0 ** (self.modulus_bits - self.plain_bits - 2):
            raise SettingsError(
                f"the noise of crypto.max_updates={self.max_updates} updates could reach the "
                f"{self.plain_bits}-bit plaintext under a {self.modulus_bits}-bit modulus: lower max_updates or "
                "plain_bits, or raise modulus_bits"
            )

    @property
    def carrier_bits(self) -> int:
        """Bits of the modulus that a sum must not wrap around."""
        return self.plain_bits if self.scheme == "bfv" else self.modulus_bits

    @property
    def scale_bits(self) -> int:
        """log2 of the number that values are multiplied by before they are rounded to integers."""
        return self.carrier_bits - 2 - max(0, math.ceil(math.log2(self.bound * self._growth)))

    @property
    def _growth(self) -> float:
        """Largest coefficient of an encoding over its largest value: slots hold up to bound + i bound."""
        return math.sqrt(2) if self.scheme == "ckks" else 1.0

    @property
    def largest(self) -> float:
        """Largest absolute value that a sum may take: its coefficients stay below a quarter of the modulus."""
        return 2.0 ** (self.carrier_bits - 2 - self.scale_bits) / self._growth

    @property
    def slots(self) -> int:
        """Real values in one ciphertext."""
        return self.poly_modulus_degree

    @property
    def width(self) -> int:
        """Bytes of one residue on the wire."""
        return -(-self.modulus_bits // 8)

    @property
    def poly_bytes(self) -> int:
        """Bytes of one polynomial on the wire."""
        return self.poly_modulus_degree * self.width

    @property
    def block_bytes(self) -> int:
        """Bytes of a fresh ciphertext: one polynomial, and the seed of the other."""
        return SEED_BYTES + self.poly_bytes

    def sum_bytes(self, terms: int) -> int:
        """Bytes of a sum: one polynomial, and the seeds of all terms or, of many, the other polynomial."""
        return self.poly_bytes + (terms * SEED_BYTES if terms <= MOST_SEEDS else self.poly_bytes)

    def digest(self) -> bytes:
        """16 bytes over everything that both ends must share to read each other."""
        facts = {"layout": "packed 1", "library": LIBRARY, "scale_bits": self.scale_bits, "seeds": MOST_SEEDS}
        facts |= asdict(self)
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).digest()[:16]

    def error_bound(self, contributors: int, magnitude: float) -> float:
        """Absolute error of a decrypted sum, but for a probability below 2^-57 per value.

        ckks: as of `CkksParams`; a real and an imaginary part each take half of the noise, which is not made use of.
        bfv: each term was rounded up or down at random, without bias: less than one unit off, and by Hoeffding's
        inequality (1963, theorem 2) less than 4.5 sqrt(k) units for k of them.
        """
        unit = 2.0**-self.scale_bits
        if self.scheme == "bfv":
            return unit * min(float(contributors), 4.5 * math.sqrt(contributors)) + magnitude * 2.0**-50
        noise = math.sqrt(contributors * self.poly_modulus_degree * _NOISE_VARIANCE) * unit
        return _DEVIATIONS * noise + magnitude * 2.0**-46


def smallest_modulus(scheme: str, degree: int, bound: float, max_updates: int, wanted: float, plain_bits: int) -> int:
    """Bits of the smallest modulus, in whole bytes, that keeps the error of a mean at `wanted`.

    Raises SettingsError when none does.
    """
    reasons = []
    for bits in (b for b in (32, 40, 48, 56) if b <= SECURITY_128.get(degree, 60)):
        try:
            params = PackedParams(scheme, degree, bits, bound, max_updates, plain_bits)
        except SettingsError as error:
            reasons.append(str(error))
            continue
        found = params.error_bound(max_updates, bound)
        if found <= wanted:
            return bits
        reasons.append(f"{bits} bits leave an error of {found:.1e}")
    raise SettingsError(
        f"crypto.wanted_error={wanted:g} cannot be kept for crypto.max_updates={max_updates} updates up to "
        f"crypto.bound={bound:g} at poly_modulus_degree={degree}: {reasons[-1]}"
    )
