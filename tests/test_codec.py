"""Residues to bytes and back, and the blobs that SEAL parses: only ever bytes that this package wrote."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune.crypto import codec
from ciphertune.crypto.ckks import CkksPublic, moduli
from ciphertune.crypto.ckks_secret import CkksSecret, generate_key
from ciphertune.crypto.clear import ClearPublic
from ciphertune.crypto.clear_secret import ClearSecret
from ciphertune.crypto.params import CkksParams
from ciphertune.errors import FormatError, SettingsError
from tests.oracle import FULL_HE, SEALED, body_of, first_primes, residues, shared_secret

PARAMS = pytest.mark.parametrize("params", [SEALED, FULL_HE], ids=["sealed", "full_he"])


def random_residues(rng: np.random.Generator, primes: list[int], degree: int) -> codec.Residues:
    rows = [[rng.integers(0, q, degree, np.uint64) for q in primes] for _ in range(2)]
    return np.array(rows, np.uint64)


def seal_context(params: CkksParams) -> Any:
    return CkksPublic(params).context.seal_context().data


def parms_id(params: CkksParams) -> bytes:
    return struct.pack("<4Q", *seal_context(params).first_parms_id())


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.lists(st.integers(14, 60), min_size=1, max_size=3),
    degree=st.sampled_from([1, 2, 16, 64]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_unpack_is_the_inverse_of_pack(seed: int, bits: list[int], degree: int) -> None:
    primes, widths = [(1 << b) - 1 for b in bits], [(b + 7) // 8 for b in bits]
    values = random_residues(np.random.default_rng(seed), primes, degree)
    values[1, 0, 0] |= 1
    block = codec.pack(values, widths)
    assert len(block) == 2 * degree * sum(widths)
    assert np.array_equal(codec.unpack(block, primes, widths, degree), values)


@PARAMS
def test_bytes_on_the_wire_are_the_residues_little_endian_and_nothing_else(params: CkksParams) -> None:
    public = CkksPublic(params)
    values = random_residues(np.random.default_rng(0), list(public.moduli), params.poly_modulus_degree)
    block = codec.pack(values, params.widths)
    assert block == body_of(values[None], params)
    assert np.array_equal(residues(block, params)[0], values)


@PARAMS
@pytest.mark.parametrize("above", [0, 1], ids=["q", "q+1"])
@pytest.mark.parametrize(("poly", "position"), [(0, 0), (0, -1), (1, 0), (1, -1)])
def test_residue_not_below_its_prime_is_refused(params: CkksParams, above: int, poly: int, position: int) -> None:
    public = CkksPublic(params)
    for i, q in enumerate(public.moduli):
        values = random_residues(np.random.default_rng(i), list(public.moduli), params.poly_modulus_degree)
        values[poly, i, position] = q - 1
        codec.unpack(codec.pack(values, params.widths), public.moduli, params.widths, params.poly_modulus_degree)
        values[poly, i, position] = q + above
        block = codec.pack(values, params.widths)
        with pytest.raises(FormatError, match="not below its modulus"):
            codec.unpack(block, public.moduli, params.widths, params.poly_modulus_degree)


@PARAMS
def test_ciphertext_whose_second_polynomial_is_zero_is_refused(params: CkksParams) -> None:
    public = CkksPublic(params)
    values = random_residues(np.random.default_rng(0), list(public.moduli), params.poly_modulus_degree)
    values[1] = 0
    arguments = (public.moduli, params.widths, params.poly_modulus_degree)
    with pytest.raises(FormatError, match="second polynomial is zero"):
        codec.unpack(codec.pack(values, params.widths), *arguments)
    values[1, -1, 5] = 1  # one residue suffices
    codec.unpack(codec.pack(values, params.widths), *arguments)


@PARAMS
def test_block_of_a_wrong_length_is_refused(params: CkksParams) -> None:
    public = CkksPublic(params)
    block = shared_secret(params).encrypt(np.ones(3))
    three_polynomials = block + block[: len(block) // 2]
    for wrong in (b"", block[:1], block[:-1], block + b"\0", three_polynomials, block + block):
        with pytest.raises(FormatError, match="a ciphertext of"):
            codec.unpack(wrong, public.moduli, params.widths, params.poly_modulus_degree)


@PARAMS
def test_body_that_is_no_whole_number_of_ciphertexts_is_refused(params: CkksParams) -> None:
    public = CkksPublic(params)
    body = shared_secret(params).encrypt(np.ones(params.slots + 1))
    for wrong in (body[:-1], body + b"\0", body[1:]):
        with pytest.raises(FormatError, match="no whole number"):
            public.protos(wrong)


@PARAMS
def test_ciphertext_blob_is_byte_for_byte_what_seal_writes_itself(params: CkksParams, tmp_path: Path) -> None:
    public = CkksPublic(params)
    block = shared_secret(params).encrypt(np.linspace(-1, 1, params.slots))
    values = codec.unpack(block, public.moduli, params.widths, params.poly_modulus_degree)
    ours = codec.seal_ciphertext(values, parms_id(params), 2.0**params.scale_bits)
    scratch, loaded = codec.Scratch(), seal.Ciphertext()
    (tmp_path / "blob").write_bytes(ours)
    loaded.load(seal_context(params), str(tmp_path / "blob"))
    assert codec.blob_body(scratch.saved(loaded.save)) == codec.blob_body(ours)


@PARAMS
def test_the_key_that_seal_is_given_is_the_key_of_the_file(params: CkksParams) -> None:
    key = generate_key(params)
    given: Any = CkksSecret(params, key)._context.secret_key().data
    body = codec.blob_body(codec.Scratch().saved(given.save))
    assert codec.tail_words(body, len(key.reveal()) // 8).tobytes() == key.reveal()


@PARAMS
def test_what_tenseal_parses_has_one_shape_whatever_bytes_came(params: CkksParams) -> None:
    """Length, header, number of polynomials and value count of the blob follow from the parameters alone."""
    public = CkksPublic(params)
    rng = np.random.default_rng(1)
    one, two = (random_residues(rng, list(public.moduli), params.poly_modulus_degree) for _ in range(2))
    words = 8 * one.size
    first, second = (public.protos(codec.pack(v, params.widths))[0] for v in (one, two))
    assert first != second
    assert len(first) == len(second)
    trailer = 9  # the scale, field 3
    assert first[: -words - trailer] == second[: -words - trailer]
    assert first[-trailer:] == second[-trailer:] == b"\x19" + struct.pack("<d", 2.0**40)
    assert first[-words - trailer : -trailer] == one.astype("<u8").tobytes()


def test_primes_are_the_largest_that_allow_a_number_theoretic_transform() -> None:
    assert moduli(SEALED) == tuple(first_primes(54, 4096, 1))
    large, small = first_primes(60, 8192, 2)  # one of the two is the special prime and carries no data
    assert set(moduli(FULL_HE)) < {large, small, *first_primes(40, 8192, 1)}
    assert [q.bit_length() for q in moduli(FULL_HE)] == [60, 40]


@pytest.mark.parametrize(("degree", "bits"), [(8192, (14, 20)), (4096, (14, 14, 14))])
def test_primes_that_do_not_exist_are_refused_as_a_setting(degree: int, bits: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match="not enough primes of these sizes"):
        CkksPublic(CkksParams(degree, bits, 10, 1e-6))


def test_blob_of_another_build_of_seal_is_refused() -> None:
    blob = codec.seal_array(np.ones((1, 1, 4), np.uint64))
    assert codec.blob_body(blob) == struct.pack("<Q4Q", 4, 1, 1, 1, 1)
    for wrong in (blob + b"\0", blob[:-1], blob[:5] + b"\x01" + blob[6:]):
        with pytest.raises(FormatError, match="not the pinned one"):
            codec.blob_body(wrong)


def test_varint_and_field_are_protobufs() -> None:
    # the examples of protobuf's own description of its encoding
    assert codec.varint(1) == b"\x01"
    assert codec.varint(150) == b"\x96\x01"
    assert codec.varint(2**64 - 1) == b"\xff" * 9 + b"\x01"
    assert codec.field(2, b"testing") == b"\x12\x07testing"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no files in memory")
def test_scratch_file_never_touches_the_disk_and_keeps_nothing() -> None:
    scratch = codec.Scratch()
    assert scratch.path.startswith("/proc/self/fd/")
    assert scratch.saved(lambda path: Path(path).write_bytes(b"a key")) == b"a key"
    assert Path(scratch.path).read_bytes() == b""


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_clear_values_that_are_no_whole_numbers_or_too_many_are_refused(precision: str) -> None:
    public = ClearPublic(precision)
    secret = ClearSecret(public, 64.0)
    body = secret.encrypt(np.array([1.0, -2.5, 64.0]))
    assert len(body) == 3 * public.block_bytes
    assert secret.decrypt(body, 3).tolist() == [1.0, -2.5, 64.0]
    for wrong in (body[:-1], body + b"\0", body[1:]):
        with pytest.raises(FormatError, match="no whole number"):
            public.aggregator().add(wrong)
        with pytest.raises(FormatError, match="no whole number"):
            secret.decrypt(wrong, 3)
    for count in (0, 2, 4, 2**31):
        with pytest.raises(FormatError, match=f"3 values where the plan has {count}"):
            secret.decrypt(body, count)
