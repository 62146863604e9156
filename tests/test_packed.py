"""The packed backends: a ciphertext is a polynomial and a seed, its sums are exact, and all of it by definition."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tenseal.sealapi as seal
import yaml
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune import exchange, wire
from ciphertune.aggregation import SeparateSum, cut
from ciphertune.crypto import packed
from ciphertune.crypto.base import PublicPart
from ciphertune.crypto.packed import PackedPublic
from ciphertune.crypto.packed_secret import PackedSecret, generate_key
from ciphertune.crypto.params import PackedParams, smallest_modulus
from ciphertune.errors import CiphertuneError, FormatError, SettingsError
from ciphertune.precision import precise_rank
from ciphertune.ranks import Contributor
from ciphertune.settings import compose, packed_params
from tests.oracle import (
    adapter_of,
    blank,
    coefficients,
    encrypted,
    first_primes,
    forge,
    mean_factor,
    mean_head,
    plan_of,
    shared_secret,
)

ROOT = Path(__file__).parent.parent
CKKS_40 = PackedParams("ckks", 4096, 40, 45.0, 1000)  # conf/crypto/ckks_packed.yaml
CKKS_48 = PackedParams("ckks", 4096, 48, 45.0, 1000)  # conf/crypto/ckks_packed_48.yaml
BFV = PackedParams("bfv", 4096, 48, 48.0, 1000, 30)  # conf/crypto/bfv_packed.yaml
SMALL = PackedParams("ckks", 2048, 40, 64.0, 1000)
SEEDS = 8  # a sum of more travels with both polynomials
SMALL_BFV = PackedParams("bfv", 2048, 40, 64.0, 1000, 23)
# "Security Guidelines for Implementing Homomorphic Encryption" (2024), ternary secret, 128 bit
LARGEST_MODULUS = {2048: 53, 4096: 106, 8192: 214, 16384: 430}

SHIPPED = pytest.mark.parametrize("params", [CKKS_40, CKKS_48, BFV], ids=["ckks_40", "ckks_48", "bfv"])
RINGS = pytest.mark.parametrize("params", [SMALL, SMALL_BFV], ids=["ckks", "bfv"])

Vector = npt.NDArray[np.float64]
Polynomial = npt.NDArray[np.uint64]


def numbers(count: int, seed: int = 0, largest: float = 1.0) -> Vector:
    return np.random.default_rng(seed).uniform(-largest, largest, count)


def modulus(params: PackedParams) -> int:
    return first_primes(params.modulus_bits, params.poly_modulus_degree, 1)[0]


def plain_modulus(params: PackedParams) -> int:
    return first_primes(params.plain_bits, params.poly_modulus_degree, 1)[0]


def width(params: PackedParams) -> int:
    return (params.modulus_bits + 7) // 8


def summed(public: PublicPart, bodies: Sequence[bytes]) -> bytes:
    total = public.aggregator()
    for body in bodies:
        total.add(body)
    return total.result(total.blocks())


# -------------------------------------------------------------------------------------------- the bytes, by definition


def polynomial(data: bytes, params: PackedParams) -> Polynomial:
    digits = np.frombuffer(data, np.uint8).reshape(params.poly_modulus_degree, width(params)).astype(np.uint64)
    return (digits << (8 * np.arange(width(params), dtype=np.uint64))).sum(axis=1, dtype=np.uint64)


def data_of(values: Polynomial, params: PackedParams) -> bytes:
    return b"".join(int(x).to_bytes(width(params), "little") for x in values)


def fresh(body: bytes, params: PackedParams) -> list[tuple[bytes, Polynomial]]:
    """Blocks of an update -> (seed, first polynomial) each."""
    size = 64 + params.poly_modulus_degree * width(params)
    assert len(body) % size == 0
    return [(body[i : i + 64], polynomial(body[i + 64 : i + size], params)) for i in range(0, len(body), size)]


def seeds_of(body: bytes, params: PackedParams, terms: int) -> list[bytes]:
    """Of a sum of one block that travels with seeds."""
    assert len(body) == 64 * terms + params.poly_modulus_degree * width(params)
    return [body[i : i + 64] for i in range(0, 64 * terms, 64)]


# ------------------------------------------------------------------------------------------------------- SEAL, directly


@cache
def context(params: PackedParams) -> Any:
    scheme = seal.SCHEME_TYPE.CKKS if params.scheme == "ckks" else seal.SCHEME_TYPE.BFV
    parameters = seal.EncryptionParameters(scheme)
    parameters.set_poly_modulus_degree(params.poly_modulus_degree)
    parameters.set_coeff_modulus(seal.CoeffModulus.Create(params.poly_modulus_degree, [params.modulus_bits]))
    if params.scheme == "bfv":
        plain = seal.PlainModulus.Batching(params.poly_modulus_degree, params.plain_bits)
        parameters.set_plain_modulus(plain)
    return seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)


class Seal:
    """SEAL's own encryptor under a key of its own, and its ciphertexts in full."""

    def __init__(self, params: PackedParams, path: Path) -> None:
        self.params, self._path = params, path / "seal"
        self.context = context(params)
        self._encryptor = seal.Encryptor(self.context, seal.KeyGenerator(self.context).secret_key())

    def encrypt(self, seed: int) -> tuple[bytes, Any]:
        """(wire block, full ciphertext) of random values."""
        plain, degree = seal.Plaintext(), self.params.poly_modulus_degree
        values = np.random.default_rng(seed).integers(-1000, 1000, degree)
        if self.params.scheme == "ckks":
            seal.CKKSEncoder(self.context).encode(values[: degree // 2].astype(float).tolist(), 2.0**20, plain)
        else:
            seal.BatchEncoder(self.context).encode(values.tolist(), plain)
        self._encryptor.encrypt_symmetric(plain).save(str(self._path))  # the second polynomial as its seed
        body = self._body()
        first = np.frombuffer(body, "<u8", degree, 73 + 16 + 8)  # after metadata, the array's header and its count
        full = seal.Ciphertext()
        full.load(self.context, str(self._path))
        return body[-64:] + data_of(first, self.params), full

    def polynomials(self, ciphertext: Any) -> npt.NDArray[np.uint64]:
        """(2, N)."""
        assert ciphertext.size() == 2
        ciphertext.save(str(self._path))
        degree = self.params.poly_modulus_degree
        return np.frombuffer(self._body()[-16 * degree :], "<u8").reshape(2, degree)

    def _body(self) -> bytes:
        raw = self._path.read_bytes()
        assert raw[:2] == b"\x5e\xa1"
        return zstandard.ZstdDecompressor().decompressobj().decompress(raw[16:]) if raw[5] == 2 else raw[16:]


@RINGS
def test_second_polynomial_of_a_seed_is_the_one_that_seal_expands_it_to(params: PackedParams, tmp_path: Path) -> None:
    public, by_seal = PackedPublic(params), Seal(params, tmp_path)
    for i in range(5):
        block, full = by_seal.encrypt(i)
        (seed, first), both = fresh(block, params)[0], by_seal.polynomials(full)
        assert np.array_equal(first, both[0])
        assert np.array_equal(public.second(seed), both[1])


@RINGS
def test_sum_is_seals_own_evaluator_residue_by_residue_before_and_past_the_threshold(
    params: PackedParams, tmp_path: Path
) -> None:
    public, by_seal, evaluator = PackedPublic(params), Seal(params, tmp_path), seal.Evaluator(context(params))
    total, q = public.aggregator(), modulus(params)
    reference, seeds = None, []
    for k in range(1, 30):
        block, full = by_seal.encrypt(k)
        total.add(block)
        seeds.append(block[:64])
        if reference is None:
            reference = full
        else:
            evaluator.add_inplace(reference, full)
        if k in (1, 2, SEEDS, SEEDS + 1, 29):
            first, second = by_seal.polynomials(reference)
            found = total.result(1)
            if k <= SEEDS:
                assert found == b"".join(sorted(seeds)) + data_of(first, params)
                assert np.array_equal(np.sum([public.second(s) for s in seeds], axis=0) % q, second)
            else:
                assert found == data_of(first, params) + data_of(second, params)


@SHIPPED
def test_sum_is_the_integers_added_modulo_the_prime(params: PackedParams) -> None:
    """By Python's own integers, on a few residues."""
    secret, q, size = shared_secret(params), modulus(params), width(params)
    bodies = [secret.encrypt(numbers(5, i)) for i in range(7)]
    body = summed(secret.public, bodies)
    for j in (0, 1, 17, params.poly_modulus_degree - 1):
        terms = [int.from_bytes(b[64 + j * size : 64 + (j + 1) * size], "little") for b in bodies]
        assert all(t < q for t in terms) and sum(terms) >= q  # so that there is something to reduce
        at = 64 * len(bodies) + j * size
        assert int.from_bytes(body[at : at + size], "little") == sum(terms) % q


def test_largest_residues_of_the_largest_prime_add_up_without_overflow() -> None:
    params = PackedParams("ckks", 4096, 60, 64.0, 1000)
    public, q = PackedPublic(params), modulus(params)
    block = bytes(64) + data_of(np.full(4096, q - 1, np.uint64), params)
    total = public.aggregator()
    for k in range(1, 20):
        total.add(block)
        start = 64 * k if k <= SEEDS else 0
        first = total.result(1)[start : start + 4096 * width(params)]
        assert set(polynomial(first, params)) == {(q - 1) * k % q}


# ------------------------------------------------------------------------------------------------------ sizes and seeds


@SHIPPED
def test_fresh_ciphertext_is_a_seed_and_one_polynomial(params: PackedParams) -> None:
    secret = shared_secret(params)
    degree = params.poly_modulus_degree
    for count, blocks in ((1, 1), (degree, 1), (degree + 1, 2), (3 * degree, 3)):
        assert len(secret.encrypt(numbers(count))) == blocks * (64 + degree * width(params))
    assert secret.encrypt(np.zeros(0)) == b""
    assert params.block_bytes == params.sum_bytes(1) == 64 + degree * width(params)


@SHIPPED
def test_sum_carries_the_seeds_of_up_to_eight_updates_in_order_and_of_more_the_second_polynomial(
    params: PackedParams,
) -> None:
    secret, polynomial_bytes = shared_secret(params), params.poly_modulus_degree * width(params)
    blocks, total, seeds = [secret.encrypt(np.zeros(1)) for _ in range(10)], secret.public.aggregator(), []
    rng = np.random.default_rng(0)
    for k in range(1, 30):
        seed = rng.bytes(64)  # any seed stands for some polynomial
        total.add(seed + blocks[k % 10][64:])
        seeds.append(seed)
        body = total.result(1)
        assert len(body) == params.sum_bytes(k) == polynomial_bytes + (64 * k if k <= SEEDS else polynomial_bytes)
        if k <= SEEDS:
            assert seeds_of(body, params, k) == sorted(seeds)


@RINGS
def test_both_forms_of_a_sum_decrypt_to_the_same_numbers(params: PackedParams) -> None:
    """The largest sum with seeds, and by hand the same one with both polynomials: one ciphertext, so equal numbers."""
    secret, q = shared_secret(params), modulus(params)
    public, slots = secret.public, params.poly_modulus_degree
    most = SEEDS
    vectors = [numbers(slots, i, 1 / most) for i in range(most)]
    with_seeds = summed(public, [secret.encrypt(v) for v in vectors])
    seeds = seeds_of(with_seeds, params, most)
    second = np.sum([public.second(s) for s in seeds], axis=0) % q
    in_full = with_seeds[64 * most :] + data_of(second, params)
    found = secret.decrypt(with_seeds, slots, terms=most)
    assert np.abs(found - np.sum(vectors, axis=0)).max() <= params.error_bound(most, 1.0)
    for terms in (most + 1, most + 2, 1000):
        assert np.array_equal(secret.decrypt(in_full, slots, terms=terms), found)


@RINGS
def test_sum_just_past_the_threshold_is_right_in_every_order(params: PackedParams) -> None:
    secret = shared_secret(params)
    public, slots = secret.public, params.poly_modulus_degree
    count = SEEDS + 3
    vectors = [numbers(slots, i, 1 / count) for i in range(count)]
    bodies = [secret.encrypt(v) for v in vectors]
    body = summed(public, bodies)
    found = secret.decrypt(body, slots, terms=count)
    assert np.abs(found - np.sum(vectors, axis=0)).max() <= params.error_bound(count, 1.0)
    for seed in range(3):
        random.Random(seed).shuffle(bodies)
        assert summed(public, bodies) == body


def test_each_block_of_a_sum_has_the_form_that_follows_from_its_own_number_of_terms() -> None:
    secret = shared_secret(SMALL)
    long, short = [secret.encrypt(numbers(4096, i, 0.01)) for i in range(3)], secret.encrypt(numbers(5, 9, 0.001))
    total = secret.public.aggregator()
    for body in [*long, *[short] * SEEDS]:
        total.add(body)
    body = total.result(2)
    assert len(body) == 2 * 2048 * 5 + 3 * 64 + 2048 * 5
    first, second = body[: 2 * 2048 * 5], body[2 * 2048 * 5 :]
    assert seeds_of(second, SMALL, 3) == sorted(b[SMALL.block_bytes :][:64] for b in long)
    assert total.result(1) == first
    expected = np.sum([numbers(4096, i, 0.01) for i in range(3)], axis=0)
    assert np.abs(secret.decrypt(second, 2048, terms=3) - expected[2048:]).max() <= SMALL.error_bound(3, 1.0)
    expected[:5] += SEEDS * numbers(5, 9, 0.001)
    tolerance = SEEDS * SMALL.error_bound(11, 1.0)  # one ciphertext many times is no sum of independent noise
    assert np.abs(secret.decrypt(first, 2048, terms=SEEDS + 3) - expected[:2048]).max() <= tolerance


@pytest.mark.parametrize("params", [SMALL, PackedParams("bfv", 2048, 48, 64.0, 1000, 30)], ids=["ckks", "bfv"])
def test_round_of_more_clients_than_the_threshold_gives_each_rank_its_mean(params: PackedParams) -> None:
    """Through the wire: segment 0 is a sum of them all, in full, segment 1 one of 6, with seeds."""
    plan = plan_of(tiers=(1, 2))
    session, secret = encrypted(plan, secret=shared_secret(params))
    ranks = [2] * 6 + [1] * 15
    clients = [adapter_of(plan, rank, i) for i, rank in enumerate(ranks)]
    samples = [10 + i % 7 for i in range(len(ranks))]
    total = SeparateSum(session, 0, sum(samples))
    for sender, (client, n) in enumerate(zip(clients, samples, strict=True), 1):
        data = exchange.seal(client, session, secret, round_=0, sender=sender, samples=n, total=sum(samples))
        total.add(data, sender=sender, who=Contributor(client.rank, n))
    data = wire.encode(total.release(2), session)
    size = params.poly_modulus_degree * width(params)
    assert len(data) == 106 + 16 * len(ranks) + 2 * size + size + 6 * 64 + 32
    mean, _ = exchange.unseal(data, session, secret, round_=0, rank=2, base=blank(adapter_of(plan, 2, 0)))
    for layer in mean.layers:
        expected = mean_factor(clients, samples, layer, "b", "nested")
        tolerance = params.error_bound(len(ranks), 2.0), params.error_bound(6, 2.0) * sum(samples) / sum(samples[:6])
        for k in range(2):
            assert np.abs(mean.layers[layer].b[:, k] - expected[k]).max() <= tolerance[k]
    for head, values in mean.heads.items():
        assert np.abs(values - mean_head(clients, samples, head)).max() <= params.error_bound(len(ranks), 2.0)
    short = wire.encode(cut(total.release(2), session, 1), session)  # what a client of rank 1 gets: a prefix
    low, _ = exchange.unseal(short, session, secret, round_=0, rank=1, base=blank(adapter_of(plan, 1, 0)))
    assert len(short) == len(data) - size - 6 * 64
    assert all(np.array_equal(low.layers[n].b[:, 0], f.b[:, 0]) for n, f in mean.layers.items())


@SHIPPED
def test_two_encryptions_of_the_same_values_have_nothing_in_common(params: PackedParams) -> None:
    secret = shared_secret(params)
    values = numbers(2 * params.slots)
    one, two = (fresh(secret.encrypt(values), params) for _ in range(2))
    blocks = [*one, *two]
    assert len({seed for seed, _ in blocks}) == 4
    for i, (_, first) in enumerate(blocks):
        for _, other in blocks[:i]:
            assert np.mean(first == other) < 0.01


@RINGS
def test_no_seed_ever_comes_twice(params: PackedParams) -> None:
    secret = shared_secret(params)
    body = secret.encrypt(np.zeros(1000 * params.slots))
    seeds = [seed for seed, _ in fresh(body, params)]
    assert len(seeds) == len(set(seeds)) == 1000
    bits = np.unpackbits(np.frombuffer(b"".join(seeds), np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / math.sqrt(bits.size)


# -------------------------------------------------------------------------------------------- the schemes, without SEAL


def ternary(secret: PackedSecret, params: PackedParams) -> npt.NDArray[np.int64]:
    """The secret polynomial's coefficients."""
    material = np.frombuffer(secret._key.reveal(), "<u8")
    return coefficients(material, modulus(params)).astype(np.int64)


@cache
def known(params: PackedParams) -> tuple[PackedSecret, npt.NDArray[np.int64]]:
    secret = PackedSecret(params, generate_key(params))
    return secret, ternary(secret, params)


def slots_of(plain: Vector, params: PackedParams) -> npt.NDArray[np.complex128]:
    """The complex slots of a polynomial: slot i is its value at exp(pi i 3^i / N), over the scale."""
    degree = params.poly_modulus_degree
    values = np.fft.ifft(plain * np.exp(1j * np.pi * np.arange(degree) / degree)) * degree
    return values[[(pow(3, i, 2 * degree) - 1) // 2 for i in range(degree // 2)]] / 2.0**params.scale_bits


@given(seed=st.integers(0, 2**32 - 1), largest=st.sampled_from([1e-3, 1.0, 64.0]))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_value_i_is_a_real_part_and_value_i_plus_half_n_the_imaginary_part_of_slot_i(seed: int, largest: float) -> None:
    """c0 + c1 s modulo q, evaluated at the roots of unity: computed without SEAL but for what the seed stands for."""
    secret, _ = known(SMALL)
    q, values = modulus(SMALL), numbers(SMALL.slots, seed, largest)
    ((own, first),) = fresh(secret.encrypt(values), SMALL)
    s = np.frombuffer(secret._key.reveal(), "<u8").astype(object)
    plain = coefficients((first + secret.public.second(own).astype(object) * s) % q, q).astype(np.float64)
    found = slots_of(plain, SMALL)
    half, tolerance = SMALL.slots // 2, SMALL.error_bound(1, largest)
    assert np.abs(found.real - values[:half]).max() <= tolerance
    assert np.abs(found.imag - values[half:]).max() <= tolerance


def negacyclic(values: Polynomial, s: npt.NDArray[np.int64], q: int) -> npt.NDArray[np.int64]:
    """``values * s`` modulo X^N + 1 and q; s is ternary, so that no sum of N terms leaves 64 bits."""
    extended = np.concatenate([-values.astype(np.int64), values.astype(np.int64)])
    degree = len(values)
    total = np.zeros(degree, np.int64)
    for j in np.flatnonzero(s):
        total += s[j] * extended[degree - j : 2 * degree - j]
    return total % q


def test_bfv_is_bfv_by_its_definition_and_its_noise_stays_below_what_max_updates_assumes() -> None:
    """round(t / q (c0 + c1 s)) modulo t at the roots of unity; the noise is what that is away from a whole number."""
    secret, s = known(BFV)
    public, q, t, degree = secret.public, modulus(BFV), plain_modulus(BFV), 4096
    assert (public.modulus, public.plain_modulus) == (q, t)
    vectors = [numbers(degree, i, 0.064) for i in range(100)]
    bodies = [secret.encrypt(v) for v in vectors]
    body = summed(public, bodies * 10)  # as many as max_updates
    first, second = polynomial(body[: degree * 6], BFV), polynomial(body[degree * 6 :], BFV)
    phase = (first.astype(np.int64) + negacyclic(second, s, q)) % q
    message = np.array([(2 * int(p) * t + q) // (2 * q) % t for p in phase], object)
    noise = [min(r := (int(p) * t - int(m) * q) % (q * t), q * t - r) / t for p, m in zip(phase, message, strict=True)]
    # 100 independent ciphertexts ten times each: the deviation of 10000 of them
    deviation = math.sqrt(100 * 10.75) * 10
    print(f"noise {max(noise):.0f}: {max(noise) / deviation:.1f} deviations, capacity {q / t / 2:.0f}")
    assert deviation < max(noise) < 9 * deviation < q / t / 2
    some = next(r for g in range(2, t) if pow(r := pow(g, (t - 1) // (2 * degree), t), degree, t) == t - 1)
    powers = np.array([pow(some, k, t) for k in range(2 * degree)], np.int64)
    step = int(np.flatnonzero(powers == powers[1::2].min())[0])
    found = secret.decrypt(body, degree, terms=1000) * 2.0**22
    for i in [*range(5), *range(2046, 2053), 4090, 4095]:
        power = pow(3, i % 2048, 2 * degree) * (1 if i < 2048 else -1)
        value = int((message.astype(np.int64) * powers[power * step * np.arange(degree) % (2 * degree)] % t).sum() % t)
        assert (value if value <= t // 2 else value - t) == found[i]


def test_bfv_sums_are_the_exact_integers_that_were_encrypted() -> None:
    secret = shared_secret(BFV)
    unit = 2.0**22
    bodies = [secret.encrypt(numbers(BFV.slots + 1, i, 64.0 / 12)) for i in range(12)]
    each = [np.rint(secret.decrypt(b, BFV.slots + 1) * unit).astype(np.int64) for b in bodies]
    found = secret.decrypt(summed(secret.public, bodies), BFV.slots + 1, terms=12)
    assert np.array_equal(found * unit, np.sum(each, axis=0))
    for i, integers in enumerate(each):
        away = integers - numbers(BFV.slots + 1, i, 64.0 / 12) * unit
        assert np.abs(away).max() < 1
        assert away.min() < -0.9 and away.max() > 0.9  # up or down at random


def test_bfv_rounding_has_no_bias() -> None:
    """3/10 of a unit: up three times of ten. 200 encryptions of 2048 values; five standard deviations are allowed."""
    secret = shared_secret(SMALL_BFV)
    unit = 2.0**SMALL_BFV.scale_bits
    values = np.where(np.arange(SMALL_BFV.slots) % 2, 0.3, -7.7) / unit
    found = np.array([secret.decrypt(secret.encrypt(values), values.size) for _ in range(200)]) * unit
    assert set(np.unique(found)) == {-8.0, -7.0, 0.0, 1.0}
    deviation = math.sqrt(0.3 * 0.7 / (found.size / 2))
    for part, expected in ((found[:, 1::2], 0.3), (found[:, ::2], -7.7)):
        assert abs(part.mean() - expected) < 5 * deviation
    away = found.sum(axis=0) - 200 * values * unit
    bound = SMALL_BFV.error_bound(200, 0.0) * unit
    assert np.abs(away).max() <= bound == pytest.approx(4.5 * math.sqrt(200))
    assert np.abs(away).max() > bound / 10


def test_rounding_is_different_in_every_slot_and_at_every_client() -> None:
    values = np.full(BFV.slots, 0.5) / 2.0**22
    one, two = (PackedSecret(BFV, shared_secret(BFV)._key) for _ in range(2))
    first, again, other = (s.decrypt(s.encrypt(values), values.size) * 2.0**22 for s in (one, one, two))
    for x, y in ((first, again), (first, other), (first[:-1], first[1:])):
        assert abs(np.mean(x == y) - 0.5) < 0.06


# --------------------------------------------------------------------------------------------------- the largest values


def worst_for_a_coefficient(params: PackedParams, at: int) -> Vector:
    """Values within the bound that make coefficient `at` of a CKKS polynomial as large as can be: up to sqrt(2)."""
    degree = params.poly_modulus_degree
    powers = np.array([pow(3, i, 2 * degree) for i in range(degree // 2)])
    angle = np.pi * powers * at / degree
    return params.bound * np.concatenate([np.where(np.cos(angle) < 0, -1.0, 1.0), np.where(np.sin(angle) < 0, -1.0, 1)])


LARGEST: dict[str, Callable[[PackedParams], Vector]] = {
    "all +": lambda p: np.full(p.slots, p.bound),
    "all -": lambda p: np.full(p.slots, -p.bound),
    "+ in the real, - in the imaginary parts": lambda p: np.repeat([p.bound, -p.bound], p.slots // 2),
    "alternating": lambda p: np.tile([p.bound, -p.bound], p.slots // 2),
    "random signs": lambda p: np.random.default_rng(0).choice([p.bound, -p.bound], p.slots),
    "worst for coefficient 0": lambda p: worst_for_a_coefficient(p, 0),
    "worst for coefficient 1": lambda p: worst_for_a_coefficient(p, 1),
    "worst for coefficient N/4, of all the largest": lambda p: worst_for_a_coefficient(p, p.slots // 4),
    "worst for coefficient 3N/4": lambda p: worst_for_a_coefficient(p, 3 * p.slots // 4),
    "worst for the last coefficient": lambda p: worst_for_a_coefficient(p, p.slots - 1),
}
# as shipped; with about as few bits left after the point as may be; and of other sizes
EDGES = [
    CKKS_40,
    CKKS_48,
    BFV,
    PackedParams("ckks", 4096, 40, 2.0**27, 1000),
    PackedParams("ckks", 4096, 40, 1.0, 1000),
    PackedParams("ckks", 2048, 24, 2048.0, 10),
    PackedParams("bfv", 4096, 48, 2.0**18, 1000, 30),
    PackedParams("bfv", 2048, 40, 0.5, 100, 24),
]


@pytest.mark.parametrize("params", EDGES, ids=lambda p: f"{p.scheme}-{p.modulus_bits}-{p.bound:g}")
@pytest.mark.parametrize("pattern", LARGEST)
def test_bound_in_every_slot_survives_alone_and_as_a_sum(params: PackedParams, pattern: str) -> None:
    secret, values = shared_secret(params), LARGEST[pattern](params)
    assert set(np.abs(values)) == {params.bound}
    assert params.largest >= params.bound
    for parts in (1, 5):
        body = summed(secret.public, [secret.encrypt(values / parts) for _ in range(parts)])
        error = np.abs(secret.decrypt(body, params.slots, terms=parts) - values).max()
        assert error <= params.error_bound(parts, params.bound)


@pytest.mark.parametrize("bits", [24, 32, 40, 48, 56, 60])
@pytest.mark.parametrize("bound", [2.0**-20, 0.25, 0.5, 0.75, 1.0, 3.0])
def test_every_small_bound_that_is_accepted_can_be_encrypted(bits: int, bound: float) -> None:
    try:
        params = PackedParams("ckks", 4096, bits, bound, 1000)
    except SettingsError:
        assert bound < 1
        return
    secret = PackedSecret(params, generate_key(params))
    values = numbers(params.slots, 0, bound)
    error = np.abs(secret.decrypt(secret.encrypt(values), params.slots) - values).max()
    assert error <= params.error_bound(1, bound)


@SHIPPED
def test_sums_past_the_modulus_wrap_without_a_word_which_is_why_the_bound_is_checked(params: PackedParams) -> None:
    secret = shared_secret(params)
    body = secret.encrypt(np.full(params.slots, 45.0))
    wrapped = secret.decrypt(summed(secret.public, [body] * 7), params.slots, terms=7)
    q = plain_modulus(params) if params.scheme == "bfv" else modulus(params)
    assert np.abs(wrapped - 315).max() > 100 and np.abs(wrapped).max() <= 2**0.5 * q / 2 ** (params.scale_bits + 1)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("degree", LARGEST_MODULUS)
@pytest.mark.parametrize("scheme", ["ckks", "bfv"])
def test_modulus_up_to_the_2024_bound_and_seals_largest_prime_is_accepted_and_one_bit_more_is_refused(
    degree: int, scheme: str
) -> None:
    most, plain = min(60, LARGEST_MODULUS[degree]), 20 if scheme == "bfv" else 0
    assert PackedPublic(PackedParams(scheme, degree, most, 1.0, 10, plain)).modulus.bit_length() == most
    with pytest.raises(SettingsError, match=f"modulus_bits={most + 1} at .*={degree}: want 24 to {most}, .*128-bit"):
        PackedParams(scheme, degree, most + 1, 1.0, 10, plain)
    with pytest.raises(SettingsError, match=f"modulus_bits=23 .*want 24 to {most}"):
        PackedParams(scheme, degree, 23, 1.0, 10, plain)


@pytest.mark.parametrize("degree", [0, 1024, 4095, 32768, -4096])
def test_unknown_ring_degree_is_refused(degree: int) -> None:
    with pytest.raises(SettingsError, match=f"poly_modulus_degree={degree} is not one of: 2048, 4096, 8192, 16384"):
        PackedParams("ckks", degree, 40, 64.0, 1000)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_bound_that_is_no_positive_number_is_refused(bound: float) -> None:
    for params in (CKKS_40, BFV):
        with pytest.raises(SettingsError, match=r"crypto\.bound"):
            replace(params, bound=bound)


@pytest.mark.parametrize(("params", "what"), [(CKKS_40, "modulus"), (CKKS_48, "modulus"), (BFV, "plain")])
def test_bound_that_leaves_no_bits_is_refused_and_the_message_names_the_largest(
    params: PackedParams, what: str
) -> None:
    with pytest.raises(SettingsError, match=rf"lower the bound to .*, or raise crypto\.{what}_bits") as caught:
        replace(params, bound=1e12)
    found = re.search(r"lower the bound to ([0-9.e+]+)", str(caught.value))
    most = float(found[1]) if found else 0.0
    assert 10 <= replace(params, bound=most * 0.999).scale_bits <= 11  # the message rounds to six digits
    with pytest.raises(SettingsError, match="leaves 9 bits"):
        replace(params, bound=most * 1.001)


def test_bound_uses_the_modulus_up_to_a_sixteenth_and_at_most_a_quarter_of_it() -> None:
    for base in (CKKS_40, CKKS_48, BFV):
        size = plain_modulus(base) if base.scheme == "bfv" else modulus(base)
        for bound in (1.0, 1.01, 3.0, 63.9, 64.0, 100.0):
            params = replace(base, bound=bound)
            assert size / 16 * 0.999 < bound * 2**params.scale_bits <= size / 4 * 1.001


def test_noise_that_could_reach_the_plaintext_is_refused() -> None:
    # a quarter of q / t is 2^(48 - 30 - 2); a term's noise is at most 21 coins and half a unit of rounding
    most = int(2**16 / 21.5)
    assert replace(BFV, max_updates=most).max_updates == most
    with pytest.raises(SettingsError, match=f"noise of crypto.max_updates={most + 1} updates could reach the 30-bit"):
        replace(BFV, max_updates=most + 1)
    with pytest.raises(
        SettingsError, match="under a 40-bit modulus: lower max_updates or plain_bits, or raise modulus"
    ):
        replace(BFV, modulus_bits=40)


def test_sum_of_max_updates_at_the_edge_of_the_noise_is_exact() -> None:
    params = PackedParams("bfv", 2048, 40, 64.0, 95, 27)
    with pytest.raises(SettingsError, match="could reach"):
        replace(params, plain_bits=28, max_updates=1000)
    secret = shared_secret(params)
    bodies = [secret.encrypt(numbers(params.slots, i, 64.0 / 95)) for i in range(95)]
    for terms in (bodies, bodies[:1] * 95):  # the noise of one ciphertext, 95 times, is no sum of independent noise
        exact = np.sum([secret.decrypt(b, params.slots) for b in terms], axis=0)
        assert np.array_equal(secret.decrypt(summed(secret.public, terms), params.slots, terms=95), exact)


def test_sum_of_more_updates_than_the_parameters_allow_is_refused_or_right() -> None:
    """Past max_updates the noise of BFV may reach the plaintext, and nothing in the numbers would show it."""
    params = PackedParams("bfv", 2048, 40, 64.0, 1, 30)
    plan = plan_of(tiers=(1,))
    session, secret = encrypted(plan, secret=shared_secret(params))
    client, count = adapter_of(plan, 1, 0), 200
    total = SeparateSum(session, 0, count)
    one = exchange.seal(client, session, secret, round_=0, sender=1, samples=1, total=count)
    try:
        for sender in range(1, count + 1):  # all say the same, with the same noise
            total.add(forge(one, sender=sender), sender=sender, who=Contributor(1, 1))
        data = wire.encode(total.release(2), session)
        mean, _ = exchange.unseal(data, session, secret, round_=0, rank=1, base=blank(adapter_of(plan, 1, 0)))
    except CiphertuneError:
        return
    for layer, factors in mean.layers.items():
        assert np.abs(factors.b - client.layers[layer].b).max() <= count * params.error_bound(1, 1.0)


@pytest.mark.parametrize("plain", [0, 1, 13, 45, 48, 60])
def test_plaintext_modulus_out_of_range_is_refused(plain: int) -> None:
    with pytest.raises(
        SettingsError, match=f"plain_bits={plain} with modulus_bits=48: want more than 13 and at most 44"
    ):
        replace(BFV, plain_bits=plain, max_updates=1)


def test_sizes_of_plaintext_modulus_for_which_there_is_no_prime_are_refused_as_a_setting() -> None:
    found = 0
    for plain in range(13, 21):
        params = PackedParams("bfv", 2048, 53, 1.0, 1, plain)
        try:
            assert PackedPublic(params).plain_modulus == plain_modulus(params)
            found += 1
        except SettingsError as error:
            assert f"plain_bits={plain}" in str(error)
    assert found > 3


def test_digest_changes_with_every_field_and_with_nothing_else() -> None:
    changed = {
        "scheme": "ckks",
        "poly_modulus_degree": 8192,
        "modulus_bits": 49,
        "bound": 63.0,
        "max_updates": 999,
        "plain_bits": 29,
    }
    assert set(changed) == {f.name for f in fields(PackedParams)}
    digests = {replace(BFV, **{name: value}).digest() for name, value in changed.items()}
    assert len(digests | {BFV.digest()}) == len(changed) + 1
    assert BFV.digest() == replace(BFV).digest()
    assert {len(d) for d in digests} == {16}


def test_digest_changes_with_the_scale_that_follows_from_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a version that derives another scale would read numbers twice as large, without a word."""
    before = CKKS_40.digest()
    less = CKKS_40.scale_bits - 1
    monkeypatch.setattr(PackedParams, "scale_bits", property(lambda _: less))
    assert CKKS_40.digest() != before


@RINGS
def test_ciphertext_that_is_none_is_refused_and_leaves_the_sum_as_it_was(params: PackedParams) -> None:
    secret, q = shared_secret(params), modulus(params)
    body, total = secret.encrypt(numbers(2 * params.slots)), secret.public.aggregator()
    total.add(body)
    before = total.result(2)
    size = len(body) // 2
    bad = [body[:-1], body + b"\0", body[:63], body[64:], body[: size + 64]]
    for at in (64, size - width(params), size + 64, 2 * size - width(params)):
        for residue in (q, q + 1, 256 ** width(params) - 1):
            number = residue.to_bytes(width(params), "little")
            bad.append(body[:at] + number + body[at + width(params) :])
    for wrong in bad:
        for refuses in (total.add, secret.public.check, lambda b: secret.decrypt(b, 2 * params.slots)):
            with pytest.raises(FormatError):
                refuses(wrong)
        assert total.result(2) == before and total.blocks() == 2
    top = (q - 1).to_bytes(width(params), "little")
    total.add(body[:64] + top + body[64 + width(params) :])
    assert total.result(2) != before


@RINGS
def test_sum_in_full_whose_second_polynomial_is_zero_or_not_below_the_modulus_is_refused(params: PackedParams) -> None:
    secret, size = shared_secret(params), params.poly_modulus_degree * width(params)
    body = summed(secret.public, [secret.encrypt(numbers(5))] * 200)
    assert len(body) == 2 * size
    with pytest.raises(FormatError, match="hides nothing"):
        secret.decrypt(body[:size] + bytes(size), 5, terms=200)
    for at in (0, size - width(params), size, 2 * size - width(params)):
        with pytest.raises(FormatError, match="not below its modulus"):
            secret.decrypt(body[:at] + b"\xff" * width(params) + body[at + width(params) :], 5, terms=200)
    for wrong in (body[:-1], body + b"\0", body[:size], b""):
        with pytest.raises(FormatError):
            secret.decrypt(wrong, 5, terms=200)


@pytest.mark.parametrize("seed", [bytes(64), b"\xff" * 64, bytes(range(64))], ids=["zeros", "ones", "counting"])
@RINGS
def test_any_seed_whatever_is_taken_and_expanded(params: PackedParams, seed: bytes) -> None:
    """A client may choose its seed; it only harms its own update."""
    secret = shared_secret(params)
    good, total = secret.encrypt(numbers(5)), secret.public.aggregator()
    for _ in range(200):
        total.add(seed + good[64:])
    assert secret.decrypt(total.result(1), 5, terms=200).shape == (5,)
    assert secret.public.second(seed).any()


def test_packed_backends_refuse_to_multiply() -> None:
    public = PackedPublic(CKKS_40)
    one, none = np.ones((1, 1, 1)), np.zeros((1, 1))
    with pytest.raises(SettingsError, match="only adds"):
        public.combine([], one, np.zeros(1, np.int64), none)
    with pytest.raises(SettingsError, match="only adds"):
        public.product_error_bound(1.0, 1.0, 1.0)


# ------------------------------------------------------------------------------------------------- the smallest modulus


def worst_error(scheme: str, degree: int, bits: int, bound: float, updates: int, plain: int) -> float:
    """By the definitions: nine deviations of N k noise terms, or 4.5 sqrt(k) roundings, in units after the point."""
    unit = 2.0 ** -PackedParams(scheme, degree, bits, bound, updates, plain).scale_bits
    if scheme == "bfv":
        return unit * min(updates, 4.5 * math.sqrt(updates)) + bound * 2.0**-50
    return 9 * math.sqrt(updates * degree * 10.75) * unit + bound * 2.0**-46


@given(
    degree=st.sampled_from([2048, 4096, 8192, 16384]),
    bound=st.sampled_from([1.5, 16.0, 64.0, 100.0]),
    updates=st.sampled_from([1, 4, 1000, 100_000]),
    wanted=st.floats(-12, 0).map(lambda x: 10.0**x),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_smallest_modulus_is_the_smallest_that_keeps_the_wanted_error(
    degree: int, bound: float, updates: int, wanted: float
) -> None:
    allowed = [bits for bits in (32, 40, 48, 56) if bits <= LARGEST_MODULUS[degree]]
    good = [bits for bits in allowed if worst_error("ckks", degree, bits, bound, updates, 0) <= wanted]
    if good:
        bits = smallest_modulus("ckks", degree, bound, updates, wanted, 0)
        assert bits == good[0]
        assert PackedParams("ckks", degree, bits, bound, updates).error_bound(updates, bound) <= wanted
    else:
        with pytest.raises(SettingsError, match=rf"wanted_error={wanted:g} cannot be kept .*max_updates={updates} "):
            smallest_modulus("ckks", degree, bound, updates, wanted, 0)


def test_smallest_modulus_of_bfv_is_the_smallest_that_has_room_for_the_noise() -> None:
    assert worst_error("bfv", 4096, 48, 64.0, 1000, 30) < 1e-4
    assert smallest_modulus("bfv", 4096, 64.0, 1000, 1e-4, 30) == 48
    assert smallest_modulus("bfv", 4096, 64.0, 100, 1e-3, 24) == 40
    for wanted, plain, reason in ((1e-9, 30, "leave an error of"), (1e-4, 50, "could reach the 50-bit plaintext")):
        with pytest.raises(SettingsError, match=f"wanted_error={wanted:g} cannot be kept .*{reason}"):
            smallest_modulus("bfv", 4096, 64.0, 1000, wanted, plain)


def test_smallest_modulus_is_chosen_where_the_settings_name_none() -> None:
    words = ["method=sealed", "crypto=ckks_packed", "crypto.modulus_bits=0"]
    for wanted, bits in ((1e-2, 32), (1e-4, 40), (1e-6, 48), (1e-9, 56)):
        crypto = compose(ROOT / "conf", [*words, f"crypto.wanted_error={wanted}"]).crypto
        assert packed_params(crypto) == replace(CKKS_40, modulus_bits=bits)
    with pytest.raises(SettingsError, match="wanted_error=1e-14 cannot be kept"):
        compose(ROOT / "conf", [*words, "crypto.wanted_error=1e-14"])


# ------------------------------------------------------------------------------------------- security, and who has what


def test_every_shipped_packed_choice_is_within_the_128_bit_bound_with_the_prime_that_seal_uses() -> None:
    found = {}
    for path in (ROOT / "conf" / "crypto").glob("*.yaml"):
        raw = yaml.safe_load(path.read_text())
        if raw["backend"].endswith("_packed"):
            params = packed_params(compose(ROOT / "conf", ["method=sealed", f"crypto={path.stem}"]).crypto)
            found[path.stem] = params
            q = PackedPublic(params).modulus
            assert math.log2(q) <= raw["modulus_bits"] <= LARGEST_MODULUS[raw["poly_modulus_degree"]]
            assert q == modulus(params)
    assert found == {"ckks_packed": CKKS_40, "ckks_packed_48": CKKS_48, "bfv_packed": BFV}


@RINGS
def test_keys_are_fresh_full_size_and_ternary(params: PackedParams) -> None:
    """The table of secure moduli holds for uniform ternary secrets: coefficients -1, 0, 1, a third of each."""
    found = [ternary(PackedSecret(params, generate_key(params)), params) for _ in range(2)]
    for s in found:
        assert s.size == params.poly_modulus_degree and set(s) == {-1, 0, 1}
        assert all(abs(np.mean(s == value) - 1 / 3) < 0.06 for value in (-1, 0, 1))
    assert abs(np.mean(found[0] == found[1]) - 1 / 3) < 0.06


def test_servers_module_has_no_name_and_no_object_that_could_decrypt() -> None:
    public = PackedPublic(CKKS_40)
    total: Any = public.aggregator()
    for thing in (packed, public, total, PackedPublic, type(total)):
        assert not [name for name in dir(thing) if any(x in name.lower() for x in ("secret", "decrypt", "encryptor"))]
    held = [*vars(public).values(), *vars(total).values()]
    assert not [x for x in held if isinstance(x, (seal.SecretKey, seal.Decryptor, seal.Encryptor, seal.KeyGenerator))]
    for make in (seal.Decryptor, seal.Encryptor):  # SEAL's context holds no key: one must be given
        with pytest.raises(TypeError):
            make(public.context)
    shared_secret(CKKS_40)  # a client in the same process shares SEAL's context, and leaves no key in it
    with pytest.raises(TypeError):
        seal.Decryptor(public.context)


def test_server_loads_no_module_that_can_hold_a_key() -> None:
    code = """
import json, sys
from ciphertune.build import public_part
from ciphertune.settings import CryptoSettings
bfv = CryptoSettings(backend="bfv_packed", modulus_bits=48, plain_bits=30)
for crypto in (CryptoSettings(backend="ckks_packed"), bfv):
    total = public_part(crypto).aggregator()
    total.add(bytes(64 + 4096 * crypto.modulus_bits // 8))
    assert len(total.result(1)) == 64 + 4096 * crypto.modulus_bits // 8
print(json.dumps(sorted(n for n in sys.modules if n.startswith("ciphertune"))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert "ciphertune.crypto.packed" in loaded
    assert not [name for name in loaded if "secret" in name or name.endswith((".keys", ".masks", ".indices"))]


def test_the_servers_memory_does_not_grow_with_the_number_of_clients() -> None:
    secret, blocks = shared_secret(SMALL), 8
    bodies = [secret.encrypt(np.zeros(blocks * SMALL.slots)) for _ in range(3)]
    peaks = []
    for clients in (8, 300):
        tracemalloc.start()
        total = secret.public.aggregator()
        for i in range(clients):
            total.add(bodies[i % 3])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    polynomial = 8 * blocks * SMALL.slots
    assert peaks[0] < 6 * polynomial  # the sum, an update as bytes and as residues, and what numpy needs on the way
    assert peaks[1] < peaks[0] + 2 * polynomial  # where there were seeds are second polynomials


def test_a_component_that_two_of_a_thousand_clients_have_is_as_precise_as_a_sum_of_two() -> None:
    """Its noise is that of its own contributors: a precise mean is not refused for what others add elsewhere."""
    people = (*[Contributor(2, 10)] * 2, *[Contributor(1, 10)] * 998)
    session, _ = encrypted(plan_of(tiers=(1, 2)), secret=shared_secret(CKKS_40))
    assert precise_rank(session, 0, people, 10_000) == 2
    assert precise_rank(session, 0, (*[Contributor(2, 1)] * 2, *people[2:]), 100_000) == 1
