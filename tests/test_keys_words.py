"""Fingerprints as words and digits."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciphertune.crypto import words
from ciphertune.errors import KeyFileError

PRINT = bytes(range(0, 256, 16))


def distance(one: str, two: str) -> int:
    """Levenshtein's."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one):
        left, row = row, [i + 1]
        for j, b in enumerate(two):
            row.append(min(left[j + 1] + 1, row[j] + 1, left[j] + (a != b)))
    return row[-1]


def test_the_words_are_256_short_ones_that_cannot_be_taken_for_each_other_or_for_digits() -> None:
    assert len(words.WORDS) == len({w[:4] for w in words.WORDS}) == 256
    assert all(w.isascii() and w.isalpha() and w.islower() and 4 <= len(w) <= 7 for w in words.WORDS)
    assert not [w for w in words.WORDS if set(w) <= set("abcdef")]
    assert min(distance(a, b) for a, b in combinations(words.WORDS, 2)) >= 3
    assert list(words.WORDS) == sorted(words.WORDS)


@given(fingerprint=st.binary(min_size=16, max_size=16))
def test_words_and_digits_lead_back_to_the_fingerprint(fingerprint: bytes) -> None:
    assert words.parse(words.spoken(fingerprint)) == fingerprint[:12]
    assert words.parse(fingerprint.hex()) == fingerprint
    assert words.agree(fingerprint, words.parse(words.spoken(fingerprint)))
    assert words.agree(fingerprint, words.parse(fingerprint.hex()))


@given(fingerprint=st.binary(min_size=16, max_size=16), bit=st.integers(0, 127))
def test_every_changed_bit_is_a_difference_in_digits_and_one_of_the_first_96_in_words(
    fingerprint: bytes, bit: int
) -> None:
    other = bytearray(fingerprint)
    other[bit // 8] ^= 1 << bit % 8
    assert not words.agree(fingerprint, words.parse(bytes(other).hex()))
    assert words.agree(fingerprint, words.parse(words.spoken(bytes(other)))) == (bit >= 96)


@pytest.mark.parametrize("form", ["{}", "  {}\n", "{}".upper()])
def test_what_people_write_is_understood(form: str) -> None:
    said = words.spoken(PRINT)
    for text in (said, said.upper(), said.replace(" ", "-"), said.replace(" ", ", ")):
        assert words.parse(form.format(text)) == PRINT[:12]
    pairs = [PRINT.hex()[i : i + 2] for i in range(0, 32, 2)]
    for text in (":".join(pairs), " ".join(pairs), PRINT.hex().upper()):
        assert words.parse(form.format(text)) == PRINT


@pytest.mark.parametrize(
    ("told", "part"),
    [
        ("", "has 12 words, not 0"),
        ("acorn " * 11, "has 12 words, not 11"),
        ("acorn " * 13, "has 12 words, not 13"),
        ("acorn " * 11 + "wafle", "'wafle' is no word of a fingerprint; did they say waffle?"),
        ("0" * 31, "has 32 hexadecimal digits, not 31"),
        ("0" * 33, "has 32 hexadecimal digits, not 33"),
        ("0" * 31 + "g", "is no word"),
        ("é" * 500, "is no word"),
    ],
)
def test_what_is_no_fingerprint_is_refused_and_the_word_is_named(told: str, part: str) -> None:
    with pytest.raises(KeyFileError) as caught:
        words.parse(told)
    assert part in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("length", range(12))
def test_nothing_shorter_than_the_words_agrees_with_anything(length: int) -> None:
    assert not words.agree(PRINT, PRINT[:length])
