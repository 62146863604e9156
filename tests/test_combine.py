"""Combinations of encrypted rows: what a client decrypts is the float64 sum of products, within the printed bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from conftest import CONF
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune.crypto.base import blocks_for
from ciphertune.crypto.ckks_secret import CkksSecret, generate_key
from ciphertune.crypto.clear import ClearPublic
from ciphertune.crypto.clear_secret import ClearSecret
from ciphertune.crypto.params import CkksParams
from ciphertune.crypto.secret import SecretPart
from ciphertune.errors import FormatError, KeyFileError, SettingsError
from ciphertune.settings import ckks_params, compose
from tests.oracle import PRODUCT, SEALED, Matrix, body_of, residues, shared_secret

SLOTS = PRODUCT.slots
LENGTHS = {  # values of each row
    "one value": (1, 1, 1),
    "part of a block": (700, 700),
    "one block": (SLOTS, SLOTS, SLOTS),
    "several blocks": (2 * SLOTS + 100,) * 4,
    "unequal lengths": (2 * SLOTS + 100, 300, SLOTS, 2 * SLOTS + 100, 0, SLOTS + 1),
    "one row": (SLOTS + 5,),
}
CASES = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


@dataclass(frozen=True)
class Case:
    """Rows, and what they are combined with: three results from values of four groups."""

    rows: list[Matrix]  # (count,) each, or shorter
    coefficients: Matrix  # (3, rows, 4)
    groups: npt.NDArray[np.int64]  # (count,)
    added: Matrix  # (3, count)

    @property
    def padded(self) -> Matrix:
        """All rows as long as the longest, (rows, count)."""
        out = np.zeros((len(self.rows), self.groups.size))
        for row, values in zip(out, self.rows, strict=True):
            row[: values.size] = values
        return out

    @property
    def expected(self) -> Matrix:
        """out[p, j] = sum_k coefficients[p, k, groups[j]] rows[k][j] + added[p, j], number by number."""
        out = self.added.copy()
        for p in range(out.shape[0]):
            for k, row in enumerate(self.padded):
                for j, group in enumerate(self.groups):
                    out[p, j] += self.coefficients[p, k, group] * row[j]
        return out

    def bound(self, secret: SecretPart) -> Matrix:
        """The printed bound of each value, (3, count). A row takes part in the blocks that it has."""
        public = secret.public
        takes_part = np.zeros(self.padded.shape)
        for row, values in zip(takes_part, self.rows, strict=True):
            row[: blocks_for(public, values.size) * public.slots] = 1.0
        coefficients = np.sqrt(np.sum((self.coefficients[:, :, self.groups] * takes_part) ** 2, axis=1))
        values = np.sqrt(np.sum(self.padded**2, axis=0))
        return np.vectorize(public.product_error_bound)(coefficients, values, np.abs(self.expected))


def case_of(lengths: Sequence[int], seed: int = 0) -> Case:
    """Of group 1 every coefficient is zero; the last result is of zero coefficients and nothing added."""
    rng, count = np.random.default_rng(seed), max(lengths)
    groups = rng.integers(0, 4, count)
    coefficients = rng.normal(0, 1, (3, len(lengths), 4))
    coefficients[:, :, 1] = 0.0
    added = rng.normal(0, 1, (3, count))
    coefficients[2], added[2] = 0.0, 0.0
    return Case([rng.normal(0, 0.3, n) for n in lengths], coefficients, groups, added)


def combined(case: Case, secret: SecretPart) -> Matrix:
    """What a client decrypts of the combination that the server made, (3, count)."""
    bodies = [secret.encrypt(row) for row in case.rows]
    out = secret.public.combine(bodies, case.coefficients, case.groups, case.added)
    assert {len(body) for body in out} == {blocks_for(secret.public, case.groups.size) * secret.public.block_bytes}
    return np.array([secret.decrypt(body, case.groups.size, product=True) for body in out])


# ------------------------------------------------------------------------------------------------------ right results


def test_the_parameters_of_these_tests_are_the_shipped_ones() -> None:
    assert ckks_params(compose(CONF, ["method=she_lora"]).crypto) == PRODUCT


@CASES
def test_encrypted_combination_is_the_sum_of_products_within_the_printed_bound(lengths: tuple[int, ...]) -> None:
    case, secret = case_of(lengths), shared_secret(PRODUCT)
    error, bound = np.abs(combined(case, secret) - case.expected), case.bound(secret)
    worst = np.unravel_index(np.argmax(error / bound), error.shape)
    print(f"rows of {lengths}: error {error[worst]:.2e}, bound {bound[worst]:.2e} there, {bound.max():.2e} at most")
    assert (error <= bound).all()
    assert error[worst] > bound[worst] / 1000  # not vacuous
    assert np.abs(case.expected).max() > 1e4 * bound.max()  # and far below the values


@pytest.mark.parametrize("precision", ["float32", "float64"])
@CASES
def test_combination_in_the_clear_is_the_sum_of_products(lengths: tuple[int, ...], precision: str) -> None:
    case, secret = case_of(lengths), ClearSecret(ClearPublic(precision), 16.0)
    error, bound = np.abs(combined(case, secret) - case.expected), case.bound(secret)
    print(f"rows of {lengths}, {precision}: error {error.max():.2e}, bound {bound.max():.2e}")
    assert (error <= bound).all()
    if precision == "float32" and max(lengths) > 1:
        assert error.max() > bound.max() / 1000  # not vacuous
    if precision == "float64":
        assert error.max() <= 1e-14


def test_group_of_zero_coefficients_gets_what_is_added_and_nothing_of_the_rows() -> None:
    case, secret = case_of((SLOTS + 7,) * 3), shared_secret(PRODUCT)
    found, bound = combined(case, secret), case.bound(secret)
    zero = case.groups == 1
    assert zero.sum() > 100 and (np.abs(case.padded[:, zero]).max() > 0.5)
    assert (np.abs(found - case.added)[:, zero] <= bound[:, zero]).all()
    assert (np.abs(found[2]) <= bound[2]).all()  # the result without any coefficient


def test_values_and_coefficients_of_the_largest_size_stay_within_the_bound() -> None:
    """16 in a row, 1024 as a coefficient: 2^14, which is all that the modulus carries with a bit to spare."""
    secret, signs = shared_secret(PRODUCT), np.where(np.arange(SLOTS) % 3 == 0, -1.0, 1.0)
    case = Case([16.0 * signs], np.full((3, 1, 4), 1024.0), np.zeros(SLOTS, np.int64), np.zeros((3, SLOTS)))
    assert np.abs(case.expected).max() == PRODUCT.largest == secret.public.largest
    assert (np.abs(combined(case, secret) - case.expected) <= case.bound(secret)).all()
    other = replace(case, coefficients=case.coefficients / 2, added=np.tile(8192.0 * signs, (3, 1)))
    assert (np.abs(combined(other, secret) - case.expected) <= case.bound(secret)).all()


def test_products_past_the_modulus_wrap_without_a_word_which_is_why_factors_are_checked() -> None:
    secret = shared_secret(PRODUCT)
    case = Case([np.full(SLOTS, 16.0)], np.full((3, 1, 4), 3000.0), np.zeros(SLOTS, np.int64), np.zeros((3, SLOTS)))
    modulus = math.prod(secret.public.moduli) / 2.0 ** (PRODUCT.scale_bits + PRODUCT.coefficient_bits)
    wrapped = combined(case, secret)
    assert (np.abs(wrapped - (48_000.0 - modulus)) <= case.bound(secret)).all()  # not 48000


def test_combination_that_is_read_as_a_sum_is_absurd() -> None:
    case, secret = case_of((700, 700)), shared_secret(PRODUCT)
    (body, *_) = secret.public.combine(
        [secret.encrypt(r) for r in case.rows], case.coefficients, case.groups, case.added
    )
    assert np.abs(secret.decrypt(body, 700)).max() > 1e6 * PRODUCT.bound


@given(
    lengths=st.lists(st.integers(1, 2 * SLOTS), min_size=1, max_size=4),
    size=st.sampled_from([1e-6, 1.0, 16.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_combination_is_within_the_bound(lengths: list[int], size: float, seed: int) -> None:
    case, secret = case_of(lengths, seed), shared_secret(PRODUCT)
    case = replace(case, rows=[np.clip(r * size / 0.3, -16, 16) for r in case.rows])
    assert (np.abs(combined(case, secret) - case.expected) <= case.bound(secret)).all()


@pytest.mark.parametrize("backend", ["clear", "encrypted"])
def test_combining_changes_nothing_that_it_is_given_and_gives_the_same_again(backend: str) -> None:
    secret = shared_secret(PRODUCT) if backend == "encrypted" else ClearSecret(ClearPublic("float64"), 16.0)
    case = case_of((SLOTS + 1, 30))
    bodies = [bytearray(secret.encrypt(row)) for row in case.rows]
    given_: list[bytes] = [bytes(b) for b in bodies]
    kept = [x.copy() for x in (case.coefficients, case.groups, case.added)]
    out = secret.public.combine(given_, case.coefficients, case.groups, case.added)
    assert given_ == bodies
    assert all(np.array_equal(a, b) for a, b in zip((case.coefficients, case.groups, case.added), kept, strict=True))
    assert secret.public.combine(given_, case.coefficients, case.groups, case.added) == out


def test_no_values_make_no_ciphertexts() -> None:
    nothing = shared_secret(PRODUCT).public.combine([b"", b""], np.ones((2, 2, 1)), np.zeros(0, int), np.zeros((2, 0)))
    assert nothing == [b"", b""]


# ------------------------------------------------------------------------------------------------------ the parameters


def test_largest_result_follows_from_the_modulus_and_both_scales() -> None:
    # 44 + 42 bits, of which 36 + 34 are the product's scale: q/2 is 2^15, and one bit is kept spare
    assert PRODUCT.largest == 2.0**14
    assert replace(PRODUCT, coefficient_bits=30).largest == 2.0**18
    assert SEALED.largest == 2.0 ** (54 - 2 - 40)
    assert ClearPublic().largest == math.inf


def test_bound_above_the_largest_result_is_refused_and_the_message_names_both_scales() -> None:
    assert replace(PRODUCT, bound=2.0**14).bound == 2.0**14
    with pytest.raises(SettingsError) as caught:
        replace(PRODUCT, bound=2.0**14 + 1)
    assert str(caught.value) == (
        "crypto.bound=16385 at scale_bits=36 and coefficient_bits=34 could wrap around the 86-bit modulus: "
        "lower the bound to 16384 or lower scale_bits"
    )
    with pytest.raises(SettingsError, match="coefficient_bits=45 could wrap around"):
        replace(PRODUCT, coefficient_bits=45)
    with pytest.raises(SettingsError) as caught:
        replace(SEALED, bound=4097.0)
    assert "coefficient_bits" not in str(caught.value)


def test_bound_of_a_product_is_nine_deviations_of_its_two_kinds_of_noise() -> None:
    # of a slot: fresh noise of variance 42/4 + 1/4, and coefficients rounded to integers, variance 1/4; each N times
    fresh, rounding = math.sqrt(4096 * 10.75) / 2**36, math.sqrt(4096 / 4) / 2**34
    assert PRODUCT.product_error_bound(3.0, 0.0, 0.0) == pytest.approx(9 * (3 * fresh + fresh * rounding), rel=1e-12)
    assert PRODUCT.product_error_bound(0.0, 5.0, 0.0) == pytest.approx(9 * (5 + fresh) * rounding, rel=1e-12)
    both = PRODUCT.product_error_bound(3.0, 5.0, 0.0)
    assert both == pytest.approx(9 * math.sqrt((3 * fresh) ** 2 + (5 * rounding) ** 2), rel=1e-6)
    assert PRODUCT.product_error_bound(3.0, 5.0, 1000.0) - both == pytest.approx(1000 * 2.0**-46, rel=1e-6)


def test_parameters_that_only_add_refuse_to_multiply() -> None:
    secret = shared_secret(SEALED)
    body = secret.encrypt(np.ones(5))
    with pytest.raises(SettingsError, match=r"coefficient_bits=0: these parameters only add; use crypto=ckks_product"):
        secret.public.combine([body], np.ones((1, 1, 1)), np.zeros(5, int), np.zeros((1, 5)))


def test_key_made_for_another_scale_of_coefficients_is_refused() -> None:
    """One key encrypts one kind of message: a run with other parameters needs a key of its own."""
    for other in (replace(PRODUCT, coefficient_bits=33), replace(PRODUCT, coefficient_bits=0)):
        with pytest.raises(KeyFileError, match="other encryption parameters"):
            CkksSecret(other, generate_key(PRODUCT))


# -------------------------------------------------------------------------------------------------------- hostile bytes


def refused(row: bytes, reason: str) -> None:
    """By the check that comes first, and by the combination itself, wherever the row stands."""
    secret = shared_secret(PRODUCT)
    good, count = secret.encrypt(np.ones(2 * SLOTS)), 2 * SLOTS
    with pytest.raises(FormatError, match=reason):
        secret.public.check(row)
    for rows in ([row, good], [good, row]):
        with pytest.raises(FormatError, match=reason):
            secret.public.combine(rows, np.ones((1, 2, 1)), np.zeros(count, int), np.zeros((1, count)))


def forged(params: CkksParams = PRODUCT) -> tuple[bytes, npt.NDArray[np.uint64]]:
    body = shared_secret(params).encrypt(np.ones(2 * params.slots))
    return body, residues(body, params)


@pytest.mark.parametrize("cut", [1, 8, PRODUCT.block_bytes // 2, PRODUCT.block_bytes - 1])
def test_row_of_a_block_cut_short_is_refused(cut: int) -> None:
    refused(forged()[0][:-cut], "no whole number of")


@pytest.mark.parametrize("prime", [0, 1])
@pytest.mark.parametrize("block", [0, 1])
def test_row_with_a_residue_that_is_not_below_its_prime_is_refused(prime: int, block: int) -> None:
    _, values = forged()
    values[block, 1, prime, 99] = shared_secret(PRODUCT).public.moduli[prime]
    refused(body_of(values, PRODUCT), "residue that is not below its modulus")


@pytest.mark.parametrize("block", [0, 1])
def test_row_whose_second_polynomial_is_zero_is_refused(block: int) -> None:
    _, values = forged()
    values[block, 1] = 0
    refused(body_of(values, PRODUCT), "second polynomial is zero")


@given(row=st.binary(min_size=1, max_size=200), fill=st.sampled_from([b"\xff", b"\x80"]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_row_of_any_other_bytes_is_refused(row: bytes, fill: bytes) -> None:
    public = shared_secret(PRODUCT).public
    for bad in (row, row.ljust(PRODUCT.block_bytes, fill)):
        with pytest.raises(FormatError):
            public.combine([bad], np.ones((1, 1, 1)), np.zeros(5, int), np.zeros((1, 5)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_row_in_the_clear_that_is_not_finite_is_refused(bad: float) -> None:
    public, row = ClearPublic("float64"), np.array([1.0, bad, 2.0]).tobytes()
    for broken, reason in ((row, "NaN or infinite"), (row[:-1], "no whole number")):
        with pytest.raises(FormatError, match=reason):
            public.check(broken)
        with pytest.raises(FormatError, match=reason):
            public.combine([broken], np.ones((1, 1, 1)), np.zeros(3, int), np.zeros((1, 3)))


def test_only_sums_that_hide_nothing_are_left_out_and_any_other_refusal_of_seal_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ciphertune.crypto.ckks import Multiplier

    class Refusing:
        def add(self, *_: object) -> None:
            raise RuntimeError("scale mismatch")

    multiplier = Multiplier(shared_secret(PRODUCT).public)
    monkeypatch.setattr(multiplier, "_evaluator", Refusing())
    with pytest.raises(RuntimeError, match="scale mismatch"):
        multiplier._plus(None, None)
