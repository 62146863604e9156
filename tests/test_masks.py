"""Masks that only clients read: the published test vector, equal masks are equal bytes, and nothing forged opens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune.crypto import masks
from ciphertune.crypto.base import mask_bytes
from ciphertune.errors import FormatError

KEY, OTHER_KEY, CONTEXT = bytes(range(64)), bytes(range(1, 65)), b"run 1 round 2 tier 0"


def mask_of(entries: int, seed: int = 0) -> masks.Mask:
    return np.random.default_rng(seed).random(entries) < 0.5


def test_a_closed_mask_is_aes_siv_of_its_bitmap_as_rfc_5297_has_it() -> None:
    """Appendix A.1: deterministic authenticated encryption. The bitmap's first bit is the highest of its byte."""
    key = bytes.fromhex("fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0 f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    context = bytes.fromhex("101112131415161718191a1b1c1d1e1f2021222324252627")
    plain = bytes.fromhex("112233445566778899aabbccddee")
    output = bytes.fromhex("85632d07c6e8f37f950acd320a2ecc93 40c02b9690c4dc04daef7f6afe5c")
    bits = [bool(byte >> (7 - i) & 1) for byte in plain for i in range(8)]
    assert masks.close(np.array(bits), key, context) == output
    assert masks.open_(output, 112, key, context).tolist() == bits


@given(entries=st.integers(0, 3000), seed=st.integers(0, 99), context=st.binary(max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_is_closed_opens_as_it_was_and_is_as_long_as_announced(entries: int, seed: int, context: bytes) -> None:
    mask = mask_of(entries, seed)
    data = masks.close(mask, KEY, context)
    assert len(data) == mask_bytes(entries) == (16 + (entries + 7) // 8 if entries else 0)
    found = masks.open_(data, entries, KEY, context)
    assert found.dtype == np.bool_ and np.array_equal(found, mask)


def test_equal_masks_are_equal_bytes_and_any_difference_changes_every_part_of_them() -> None:
    mask = mask_of(2000)
    data = masks.close(mask, KEY, CONTEXT)
    assert masks.close(mask.copy(), KEY, CONTEXT) == data
    flipped = mask.copy()
    flipped[-1] ^= True  # the last entry: in a stream cipher only the last byte would differ
    for other in (
        masks.close(flipped, KEY, CONTEXT),
        masks.close(mask, KEY, CONTEXT[:-1] + b"1"),
        masks.close(mask, OTHER_KEY, CONTEXT),
    ):
        assert not any(other[i : i + 8] == data[i : i + 8] for i in range(0, len(data), 8))


def test_the_bitmap_does_not_occur_in_the_bytes() -> None:
    for mask in (mask_of(4096), np.ones(4096, bool), np.zeros(4096, bool)):
        bitmap, data = np.packbits(mask).tobytes(), masks.close(mask, KEY, CONTEXT)
        windows = {bitmap[i : i + 8] for i in range(len(bitmap) - 7)}
        assert not any(data[i : i + 8] in windows for i in range(len(data) - 7))


def test_every_single_bit_flip_is_refused() -> None:
    data = bytearray(masks.close(mask_of(100), KEY, CONTEXT))
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError, match="another key or for another round, or is damaged"):
            masks.open_(bytes(data), 100, KEY, CONTEXT)
        data[bit // 8] ^= 1 << bit % 8
    assert np.array_equal(masks.open_(bytes(data), 100, KEY, CONTEXT), mask_of(100))


def test_another_key_or_context_is_refused() -> None:
    data = masks.close(mask_of(100), KEY, CONTEXT)
    for key, context in ((OTHER_KEY, CONTEXT), (KEY, b"run 1 round 3 tier 0"), (KEY, b"")):
        with pytest.raises(FormatError, match="another key or for another round"):
            masks.open_(data, 100, key, context)


@pytest.mark.parametrize("entries", [0, 96, 105, 2000])
def test_another_length_is_refused_before_it_is_opened(entries: int) -> None:
    data = masks.close(mask_of(100), KEY, CONTEXT)
    with pytest.raises(FormatError, match=f"a mask of 29 bytes where {mask_bytes(entries)} are expected"):
        masks.open_(data, entries, KEY, CONTEXT)
    for cut in (data[:-1], data + b"\0", b""):
        with pytest.raises(FormatError, match="bytes where 29 are expected"):
            masks.open_(cut, 100, KEY, CONTEXT)
