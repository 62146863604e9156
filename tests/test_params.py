"""CKKS parameters: what is refused, what the digest covers, what the error bound says."""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from ciphertune.crypto import params as params_module
from ciphertune.crypto.params import CkksParams
from ciphertune.errors import SettingsError
from ciphertune.settings import ckks_params, compose
from tests.oracle import FULL_HE, SEALED

CONF = Path(__file__).parent.parent / "conf"
# "Security Guidelines for Implementing Homomorphic Encryption" (2024), ternary secret, 128 bit
LARGEST_MODULUS = {2048: 53, 4096: 106, 8192: 214, 16384: 430}


def test_the_usual_4096_54_55_is_refused_as_less_than_128_bit_secure() -> None:
    with pytest.raises(SettingsError, match=r"\[54, 55\] add up to 109, above the 106 that 128-bit security allows"):
        CkksParams(4096, (54, 55), 40, 64.0)


@pytest.mark.parametrize(
    ("degree", "bits"),
    [(2048, (33, 20)), (4096, (53, 53)), (8192, (60, 60, 60, 34)), (16384, (60,) * 6 + (35, 35))],
)
def test_modulus_at_the_2024_bound_is_accepted_and_one_bit_more_is_refused(degree: int, bits: tuple[int, ...]) -> None:
    assert sum(bits) == LARGEST_MODULUS[degree]
    assert CkksParams(degree, bits, 10, 1.0).slots == degree // 2
    with pytest.raises(SettingsError, match="128-bit security"):
        CkksParams(degree, (*bits[:-1], bits[-1] + 1), 10, 1.0)


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "crypto").glob("*.yaml")))
def test_every_shipped_crypto_choice_is_128_bit_secure(name: str) -> None:
    method = "she_lora" if name == "ckks_product" else "sealed"
    crypto = compose(CONF, [f"method={method}", f"crypto={name}"]).crypto
    if crypto.backend == "clear":
        assert name == "clear"
    else:
        assert sum(crypto.coeff_mod_bits) <= LARGEST_MODULUS[crypto.poly_modulus_degree]
        assert ckks_params(crypto).bound == crypto.bound


@pytest.mark.parametrize("degree", [0, 1024, 4095, 32768, -4096])
def test_unknown_ring_degree_is_refused(degree: int) -> None:
    with pytest.raises(SettingsError, match=f"poly_modulus_degree={degree} is not one of"):
        CkksParams(degree, (30, 20), 10, 1.0)


@pytest.mark.parametrize("bits", [(), (54,), (54, 13), (61, 20), (0, 20)])
def test_impossible_primes_are_refused(bits: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match="two or more primes of 14 to 60 bits"):
        CkksParams(4096, bits, 10, 1.0)


def test_bound_that_could_wrap_around_the_modulus_is_refused_and_the_message_names_the_largest() -> None:
    # q has 54 bits, so q/2 / 2^40 = 2^13; one bit is kept spare
    assert CkksParams(4096, (54, 20), 40, 4096.0).bound == 4096.0
    with pytest.raises(SettingsError, match="could wrap around the 54-bit modulus: lower the bound to 4096 "):
        CkksParams(4096, (54, 20), 40, 4096.5)
    with pytest.raises(SettingsError, match="wrap around"):
        CkksParams(4096, (54, 20), 48, 64.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_bound_that_is_no_positive_number_is_refused(bound: float) -> None:
    with pytest.raises(SettingsError, match=r"crypto\.bound"):
        CkksParams(4096, (54, 20), 40, bound)


def test_scale_too_small_to_carry_anything_is_refused() -> None:
    with pytest.raises(SettingsError, match="scale_bits=9"):
        CkksParams(4096, (54, 20), 9, 1.0)


def test_digest_changes_with_every_field_and_with_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {
        "poly_modulus_degree": 8192,
        "coeff_mod_bits": (54, 21),
        "scale_bits": 39,
        "bound": 63.0,
        "coefficient_bits": 4,
    }
    assert set(changed) == {f.name for f in fields(CkksParams)}
    digests = {replace(SEALED, **{name: value}).digest() for name, value in changed.items()}
    assert SEALED.digest() == replace(SEALED).digest()
    monkeypatch.setattr(params_module, "LIBRARY", "tenseal 0.3.16")
    digests.add(SEALED.digest())
    monkeypatch.undo()
    digests.add(SEALED.digest())
    assert len(digests) == len(changed) + 2
    assert {len(d) for d in digests} == {16}


def test_the_library_named_in_the_digest_is_the_one_installed() -> None:
    assert f"tenseal {importlib.metadata.version('tenseal')}" == params_module.LIBRARY


@pytest.mark.parametrize("params", [SEALED, FULL_HE], ids=["sealed", "full_he"])
def test_error_bound_grows_with_the_square_root_of_the_contributors(params: CkksParams) -> None:
    one = params.error_bound(1, 0.0)
    # nine standard deviations of N noise terms with variance 42/4 + 1/4, at the encoding scale
    expected = 9 * math.sqrt(params.poly_modulus_degree * 10.75) / 2**params.scale_bits
    assert one == pytest.approx(expected, rel=1e-12)
    for contributors in (4, 64, 1000):
        assert params.error_bound(contributors, 0.0) == pytest.approx(math.sqrt(contributors) * one, rel=1e-12)


def test_error_bound_grows_with_the_magnitude_of_the_sum() -> None:
    assert SEALED.error_bound(4, 64.0) > SEALED.error_bound(4, 1.0) > SEALED.error_bound(4, 0.0)


def test_sizes_follow_from_the_parameters() -> None:
    assert (SEALED.slots, SEALED.data_bits, SEALED.widths, SEALED.block_bytes) == (2048, 54, (7,), 2 * 4096 * 7)
    assert (FULL_HE.slots, FULL_HE.data_bits, FULL_HE.widths) == (4096, 100, (8, 5))
    assert FULL_HE.block_bytes == 2 * 8192 * 13
