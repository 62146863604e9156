"""Why the server never gets a decrypted value: with ciphertexts and decryptions alone, the secret key follows.

A ciphertext is c0 + c1 s = m + e modulo q. Whoever holds (c0, c1) and knows m + e in every coefficient divides, point
by point of the transformed polynomials. Li and Micciancio, EUROCRYPT 2021, section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tenseal.sealapi as seal

from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.crypto import codec
from ciphertune.crypto.packed import PackedPublic
from ciphertune.crypto.packed_secret import PackedSecret, generate_key
from ciphertune.crypto.params import PackedParams
from ciphertune.noise import Noise, released

Vector = npt.NDArray[np.float64]

SLOTS = 4096


def server_attack(public: PackedPublic, body: bytes, terms: int, decrypted: Vector) -> list[int]:
    """The secret key's residues, from a sum as the server holds it and its decryption: nothing else is used."""
    ((seeds,), residues) = public.summed(body, terms)
    summed, known = public.expanded(residues[0, 0], seeds), public.expanded(np.zeros(SLOTS, np.uint64), seeds)
    evaluator, plain = seal.Evaluator(public.context), seal.Plaintext()
    if public.params.scheme == "ckks":
        values = (decrypted[: SLOTS // 2] + 1j * decrypted[SLOTS // 2 :]).tolist()
        seal.CKKSEncoder(public.context).encode(values, 2.0**public.params.scale_bits, plain)
        evaluator.add_plain_inplace(known, plain)
    else:
        units = np.rint(decrypted * 2.0**public.params.scale_bits).astype(int).tolist()
        seal.BatchEncoder(public.context).encode(units, plain)
        evaluator.add_plain_inplace(known, plain)  # times q / t, as in a ciphertext
        evaluator.transform_to_ntt_inplace(known)
        evaluator.transform_to_ntt_inplace(summed)
    c0, c1 = polynomials(summed)
    message, _ = polynomials(known)
    q = public.modulus
    return [(m - x) * pow(y, -1, q) % q if y else 0 for m, x, y in zip(message, c0, c1, strict=True)]


def polynomials(ciphertext: Any) -> tuple[list[int], list[int]]:
    """Both polynomials of SEAL's ciphertext."""
    words = codec.tail_words(codec.blob_body(codec.Scratch().saved(ciphertext.save)), 2 * SLOTS)
    return words[:SLOTS].tolist(), words[SLOTS:].tolist()


def attacked(params: PackedParams, release: Callable[[Vector], Vector], size: float = 0.05) -> float:
    """The share of the key that the server computes from one round of two clients, of whose sum it gets `release`.

    size: standard deviation of the clients' values; 0: all are zero, as a factor that got no gradient.
    """
    key = generate_key(params)
    secret = PackedSecret(params, key)
    rng = np.random.default_rng(0)
    total = secret.public.aggregator()
    for _ in range(2):
        total.add(secret.encrypt(rng.normal(0, size, SLOTS)))
    body = total.result(1)
    found = server_attack(PackedPublic(params), body, 2, release(secret.decrypt(body, SLOTS, terms=2)))
    material = np.frombuffer(key.reveal(), "<u8").tolist()
    return sum(a == b for a, b in zip(found, material, strict=True)) / SLOTS


def rounded(values: Vector, noise: float = 0.0) -> Vector:
    """As a client rounds the adapter that it saves; without `noise`, to bfloat16 alone."""
    wrapped = Adapter({"x": LoraFactors(values[None].astype(np.float32), np.zeros((1, 1), np.float32), 1.0)}, {})
    kept = released(wrapped, Noise(np.array([noise]), np.array([noise])), product=False)
    return kept.layers["x"].a[0].astype(np.float64)


CKKS = pytest.mark.parametrize("bits", [40, 48])


@CKKS
def test_one_decrypted_ckks_sum_gives_the_server_the_whole_key_so_it_never_gets_one(bits: int) -> None:
    assert attacked(PackedParams("ckks", SLOTS, bits, 45.0, 1000), lambda values: values) == 1.0


@CKKS
@pytest.mark.parametrize("size", [0.05, 1e-4, 1e-6, 1e-8, 0.0])
def test_the_same_attack_fails_on_values_rounded_as_an_adapter_is_before_release(bits: int, size: float) -> None:
    params = PackedParams("ckks", SLOTS, bits, 45.0, 1000)
    noise = params.error_bound(2, 0.0) / 9
    assert attacked(params, lambda values: rounded(values, noise), size) < 0.01


@CKKS
def test_bfloat16_alone_would_give_the_key_away_where_a_factor_is_zero(bits: int) -> None:
    assert attacked(PackedParams("ckks", SLOTS, bits, 45.0, 1000), rounded, 0.0) == 1.0


def test_the_same_attack_fails_on_an_exact_bfv_sum() -> None:
    assert attacked(PackedParams("bfv", SLOTS, 48, 45.0, 1000, 30), lambda values: values) < 0.01
