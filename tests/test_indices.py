"""Column numbers <-> codes: a permutation per layer and key, and nothing but the key decides it."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import permutations

import numpy as np
import pytest
from Crypto.Cipher import AES  # another library than the code under test; a dependency of Flower
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune.crypto.indices import inverse, permutation

KEY = bytes(range(32))
MATERIAL = st.binary(min_size=32, max_size=32)


def by_hand(material: bytes, layer: str, n: int) -> list[int]:
    """HKDF by RFC 5869 from HMAC, AES block by block on explicit counters, ranks by sorting Python integers."""
    prk = hmac.new(bytes(32), material, hashlib.sha256).digest()
    key = hmac.new(prk, b"ciphertune column codes 1\0" + layer.encode() + b"\1", hashlib.sha256).digest()
    cipher = AES.new(key, AES.MODE_ECB)
    numbers = [int.from_bytes(cipher.encrypt(j.to_bytes(16, "big")), "big") for j in range(n)]
    ranks = {number: rank for rank, number in enumerate(sorted(numbers))}
    return [ranks[number] for number in numbers]


def keys(count: int) -> Iterable[bytes]:
    return (hashlib.sha256(b"%d" % i).digest() for i in range(count))


@given(material=MATERIAL, layer=st.text(max_size=20), n=st.integers(1, 700))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_second_implementation_agrees_exactly(material: bytes, layer: str, n: int) -> None:
    assert permutation(material, layer, n).tolist() == by_hand(material, layer, n)


@pytest.mark.parametrize("n", [1, 2, 256, 257, 4096, 70_000])  # the counter's last byte and its last two overflow
def test_a_second_implementation_agrees_at_real_widths(n: int) -> None:
    assert permutation(KEY, "model.layers.0.self_attn.q_proj", n).tolist() == by_hand(
        KEY, "model.layers.0.self_attn.q_proj", n
    )


@given(material=MATERIAL, n=st.integers(1, 5000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_codes_are_a_permutation_and_inverse_undoes_it(material: bytes, n: int) -> None:
    codes = permutation(material, "q", n)
    assert codes.dtype == np.int64 and codes.shape == (n,)
    assert sorted(codes.tolist()) == list(range(n))
    columns = inverse(codes)
    assert (columns[codes] == np.arange(n)).all() and (codes[columns] == np.arange(n)).all()
    assert (inverse(columns) == codes).all()


def test_inverse_by_hand() -> None:
    assert inverse(np.array([2, 0, 3, 1])).tolist() == [1, 3, 0, 2]  # column 0 has code 2, so code 2 is column 0


def test_equal_inputs_give_equal_codes_and_one_bit_of_the_key_or_a_letter_of_the_name_changes_them() -> None:
    codes = permutation(KEY, "q", 1000)
    assert (codes == permutation(bytes(KEY), "q", 1000)).all()
    others = [permutation(KEY[:-1] + bytes([KEY[-1] ^ 1]), "q", 1000)]
    others += [permutation(KEY, name, 1000) for name in ("Q", "q ", "q\0", "", "v")]
    for other in others:
        # two random permutations agree in one place on average, in 10 or more once in 10 million
        assert (codes == other).sum() < 10


def test_a_single_column_has_code_0() -> None:
    assert permutation(KEY, "q", 1).tolist() == [0] and inverse(np.array([0])).tolist() == [0]


@pytest.mark.parametrize("material", [b"", KEY[:31], KEY + b"\0", bytes(64)], ids=len)
def test_material_of_another_length_is_refused(material: bytes) -> None:
    with pytest.raises(ValueError, match=f"32 bytes, got {len(material)}"):
        permutation(material, "q", 5)


@pytest.mark.parametrize("n", [0, -1])
def test_a_layer_without_columns_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}"):
        permutation(KEY, "q", n)


def chi_square(codes_of: Callable[[bytes], Iterable[int]], samples: int) -> float:
    """Of the 24 permutations of 4 columns over many keys; 23 degrees of freedom."""
    seen = Counter(tuple(codes_of(key)) for key in keys(samples))
    expected = samples / 24
    return sum((seen[p] - expected) ** 2 / expected for p in permutations(range(4)))


def test_every_permutation_is_as_likely_over_many_keys() -> None:
    limit = 57.1  # exceeded by chance once in 10 000; the keys are fixed, so this never flickers
    assert chi_square(lambda key: permutation(key, "q", 4).tolist(), 4800) < limit
    # the bound can fail: rotations by a random amount, and ranks of numbers of 4 bits
    assert chi_square(lambda key: np.roll(range(4), key[0] % 4).tolist(), 4800) > limit
    assert chi_square(lambda key: np.argsort([x % 16 for x in key[:4]], kind="stable").tolist(), 4800) > limit


def test_every_code_is_as_likely_for_every_column() -> None:
    samples, n = 4000, 16
    codes = np.array([permutation(key, "v", n) for key in keys(samples)])
    seen = np.array([np.bincount(column, minlength=n) for column in codes.T])
    statistic = ((seen - samples / n) ** 2 / (samples / n)).sum(axis=1)
    assert statistic.max() < 50.5  # 15 degrees of freedom: once in 100 000 per column
