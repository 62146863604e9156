"""The wire: a message is used only when every field is what the receiver expects, and is refused by name otherwise."""

from __future__ import annotations

import hashlib
import math
import tracemalloc
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune import exchange, wire
from ciphertune.aggregation import SeparateSum
from ciphertune.crypto.ckks import CkksPublic
from ciphertune.crypto.clear import ClearPublic
from ciphertune.errors import (
    FormatError,
    KeyMismatchError,
    ParameterMismatchError,
    PlanMismatchError,
    RangeError,
    RoundMismatchError,
    SettingsMismatchError,
    WireError,
)
from ciphertune.ranks import Contributor
from ciphertune.wire import AGGREGATE, UPDATE, Expected, Message, Session
from tests.messages import BACKENDS, EXPECTED, RANK, ROUND, RUN, SAMPLES, SENDER, TOTAL, WHO, aggregate, parties, update
from tests.oracle import (
    BODY,
    HEADER,
    OFFSETS,
    SEALED,
    adapter_of,
    encrypted,
    forge,
    in_the_clear,
    negotiated_plan,
    plan_of,
    read,
    rehashed,
    with_body,
)

# ---------------------------------------------------------------------------------------------------------- the layout


@BACKENDS
def test_message_has_the_documented_layout(backend: str) -> None:
    session, secret = parties(backend)
    data = update(session, secret)
    heads, component = 3 + 18, 7 + 4  # round 2 is even: B travels, whose columns have m entries
    values = heads + RANK * component
    # every rank is a tier of this plan, so each component is a segment of its own, the first one with the heads
    blocks = math.ceil((heads + component) / 2048) + (RANK - 1) * math.ceil(component / 2048)
    size = 8 * values if backend == "clear" else blocks * 2 * 4096 * 7
    assert len(data) == HEADER.size + 16 + size + 32
    assert {name: read(data, name) for name in OFFSETS} == {
        "magic": b"CTUNE\0\0\2",
        "kind": 1,
        "factors": 2,
        "parameters": hashlib.sha256(session.public.digest() + session.clear.digest()).digest()[:16],
        "key": session.key_fingerprint,
        "plan": session.plan.digest(),
        "settings": session.settings_digest,
        "run": RUN,
        "round": ROUND,
        "sender": SENDER,
        "rank": RANK,
        "total": TOTAL,
        "contributors": 1,
        "contributor rank": RANK,
        "contributor tier": 0,
        "contributor samples": SAMPLES,
    }
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()
    assert (session.key_fingerprint == bytes(16)) == (backend == "clear")


@pytest.mark.parametrize(("share", "round_", "code"), [("alternate", 0, 2), ("alternate", 1, 1), ("b_only", 1, 2)])
def test_the_factors_of_a_message_follow_from_the_plan_and_the_round(share: str, round_: int, code: int) -> None:
    session, secret = parties(share=share)
    assert read(update(session, secret, round_=round_), "factors") == code
    both, secret = parties(share="both")
    assert read(update(both, secret, round_=round_), "factors") == 3


@given(
    people=st.lists(
        st.builds(Contributor, st.integers(1, 8), st.integers(1, 2**40)), min_size=1, max_size=20, unique=True
    ),
    spare=st.integers(0, 2**40),
    round_=st.integers(0, 2**32 - 1),
    rank=st.integers(1, 8),
    content=st.randoms(use_true_random=False),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_what_is_encoded_is_decoded(
    people: list[Contributor], spare: int, round_: int, rank: int, content: Any
) -> None:
    session, _ = in_the_clear(plan_of(select="none"))
    factors = session.plan.factors(round_)
    size = 21 + rank * ((7 + 4) if factors == ("b",) else (5 + 9))
    total = sum(c.samples for c in people) + spare
    clear = content.randbytes(8 * size)
    message = Message(AGGREGATE, factors, round_, 0, rank, total, tuple(people), clear, b"")
    assert wire.decode(wire.encode(message, session), session, Expected(AGGREGATE, round_, 0, rank)) == message


@given(
    people=st.lists(
        st.builds(Contributor, st.integers(1, 8), st.integers(1, 2**40), st.integers(0, 1)), min_size=1, max_size=8
    ),
    spare=st.integers(0, 2**40),
    content=st.randoms(use_true_random=False),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_an_aggregate_of_products_is_decoded_by_the_ranks_and_budgets_of_its_contributors(
    people: list[Contributor], spare: int, content: Any
) -> None:
    session, _ = in_the_clear(negotiated_plan())
    total, basis = sum(c.samples for c in people) + spare, min(16, sum(c.rank for c in people))
    hidden = (2, 4) if any(c.tier == 1 for c in people) else (1, 2)
    shapes = [(min(m, basis), m + n - h) for (m, n), h in zip(((7, 5), (4, 9)), hidden, strict=True)]
    clear = content.randbytes(8 * sum(rank * size for rank, size in shapes))
    secret = content.randbytes(8 * (21 + min(7, basis) * sum(hidden)))
    message = Message(AGGREGATE, ("a", "b"), ROUND, 0, 8, total, tuple(people), clear, secret)
    data = wire.encode(message, session)
    assert wire.decode(data, session, Expected(AGGREGATE, ROUND, 0, 8)) == message
    with pytest.raises(FormatError, match="bytes where"):
        wire.decode(rehashed(data[:-40]), session, Expected(AGGREGATE, ROUND, 0, 8))


# ------------------------------------------------------------------------------------------- one field at a time

HEADER_FIELDS: list[tuple[str, int | bytes, type[WireError]]] = [
    ("magic", b"CTUNE\0\0\1", FormatError),
    ("magic", b"\x80\x04ctune\0", FormatError),
    ("kind", AGGREGATE, RoundMismatchError),
    ("kind", 0, RoundMismatchError),
    ("factors", 1, RoundMismatchError),
    ("factors", 3, RoundMismatchError),
    ("factors", 255, RoundMismatchError),
    ("parameters", b"p" * 16, ParameterMismatchError),
    ("key", b"k" * 16, KeyMismatchError),
    ("plan", b"p" * 16, PlanMismatchError),
    ("settings", b"t" * 16, SettingsMismatchError),
    ("run", RUN + 1, RoundMismatchError),
    ("round", ROUND - 1, RoundMismatchError),
    ("round", ROUND + 2, RoundMismatchError),
    ("sender", SENDER + 1, RoundMismatchError),
    ("sender", 0, RoundMismatchError),
    ("rank", RANK - 1, RoundMismatchError),
    ("rank", 2**32 - 1, RoundMismatchError),
    ("total", TOTAL + 1, RoundMismatchError),
    ("total", SAMPLES, RoundMismatchError),
    ("contributors", 0, FormatError),
    ("contributors", 2, FormatError),
    ("contributors", 2**32 - 1, FormatError),
    ("contributor rank", RANK + 1, RoundMismatchError),
    ("contributor rank", 0, FormatError),
    ("contributor rank", 9, FormatError),
    ("contributor tier", 1, FormatError),  # a plan without budgets has tier 0 alone
    ("contributor tier", 2**32 - 1, FormatError),
    ("contributor samples", SAMPLES + 1, RoundMismatchError),
    ("contributor samples", 0, FormatError),
    ("contributor samples", TOTAL + 1, FormatError),
    ("contributor samples", 2**64 - 1, FormatError),
]


def test_every_field_of_the_header_is_among_those_tampered_with() -> None:
    assert {name for name, _, _ in HEADER_FIELDS} == set(OFFSETS)


@pytest.mark.parametrize(("field", "value", "error"), HEADER_FIELDS, ids=[f"{n}={v!r}" for n, v, _ in HEADER_FIELDS])
@BACKENDS
def test_tampered_field_is_refused_by_its_own_error(
    backend: str, field: str, value: int | bytes, error: type[WireError]
) -> None:
    session, secret = parties(backend)
    data = update(session, secret)
    wire.decode(data, session, EXPECTED)
    assert read(data, field) != value
    with pytest.raises(WireError) as caught:
        wire.decode(forge(data, **{field.replace(" ", "_"): value}), session, EXPECTED)
    assert type(caught.value) is error


@pytest.mark.parametrize(("tier", "other"), [(0, 1), (1, 0)])
@BACKENDS
def test_update_of_another_tier_of_budgets_than_the_agreed_one_is_refused(backend: str, tier: int, other: int) -> None:
    """It decides which columns are in the clear. The length of the message follows from the tier it should have."""
    plan = negotiated_plan()
    session, secret = encrypted(plan) if backend == "encrypted" else in_the_clear(plan)
    data, expected = update(session, secret, tier=tier), replace(EXPECTED, tier=tier)
    assert read(data, "contributor tier") == tier
    assert wire.decode(data, session, expected).contributors == (Contributor(RANK, SAMPLES, tier),)
    for found, wanted in (
        (data, replace(expected, tier=other)),
        (forge(data, contributor_tier=other), expected),
        (update(session, secret, tier=other), expected),
    ):
        with pytest.raises(RoundMismatchError, match=f"weighted by .*expected .*tier={wanted.tier}"):
            wire.decode(found, session, wanted)
    for beyond in (2, 2**32 - 1):  # there are two budgets
        with pytest.raises(FormatError, match="impossible rank or budget"):
            wire.decode(forge(data, contributor_tier=beyond), session, expected)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"plan": plan_of(tiers=(2, 4, 8))}, PlanMismatchError),
        ({"plan": plan_of(fit_rank="pad")}, PlanMismatchError),
        ({"settings_digest": b"x" * 16}, SettingsMismatchError),
        ({"key_fingerprint": b"x" * 16}, KeyMismatchError),
        ({"public": CkksPublic(SEALED)}, ParameterMismatchError),
        ({"clear": ClearPublic("float32")}, ParameterMismatchError),
        ({"run": RUN + 1}, RoundMismatchError),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_message_of_another_session_is_refused_by_what_differs(change: dict[str, Any], error: type[WireError]) -> None:
    session, secret = parties()
    data = update(session, secret)
    with pytest.raises(WireError) as caught:
        wire.decode(data, replace(session, **change), EXPECTED)
    assert type(caught.value) is error


def test_every_field_of_a_session_tells_messages_apart_or_is_in_the_settings_digest() -> None:
    assert {f.name for f in fields(Session)} == {
        *("plan", "settings_digest", "key_fingerprint", "public", "clear", "run"),
        "bound",  # crypto.bound, digested with the settings
        "max_norm",  # federation.max_norm, too
    }


def test_error_names_what_was_found_and_what_was_expected() -> None:
    session, secret = parties()
    data = update(session, secret)
    with pytest.raises(RoundMismatchError, match=f"of round {ROUND}, expected {ROUND + 1}"):
        wire.decode(data, session, replace(EXPECTED, round=ROUND + 1))
    with pytest.raises(KeyMismatchError, match=f"another key: it has {(b'k' * 16).hex()}, here is {bytes(16).hex()}"):
        wire.decode(forge(data, key=b"k" * 16), session, EXPECTED)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("total", 2 * SAMPLES - 1, FormatError),
        ("contributor samples", TOTAL, FormatError),
        ("contributor rank", 9, FormatError),
        ("contributor rank", 0, FormatError),
        ("contributor tier", 1, FormatError),
        ("contributors", 1, FormatError),
        ("contributors", 3, FormatError),
        ("contributors", 1_000_001, FormatError),
        ("sender", 1, RoundMismatchError),
        ("kind", UPDATE, RoundMismatchError),
        ("rank", 7, RoundMismatchError),
    ],
)
@BACKENDS
def test_tampered_aggregate_is_refused_by_the_client(
    backend: str, field: str, value: int, error: type[WireError]
) -> None:
    session, secret = parties(backend)
    data, base = aggregate(session, secret), adapter_of(session.plan, 8, 0)
    exchange.unseal(data, session, secret, round_=ROUND, rank=8, base=base)
    with pytest.raises(WireError) as caught:
        exchange.unseal(
            forge(data, **{field.replace(" ", "_"): value}), session, secret, round_=ROUND, rank=8, base=base
        )
    assert type(caught.value) is error


@BACKENDS
def test_contributors_samples_that_exceed_the_total_are_refused(backend: str) -> None:
    """Weights that sum to more than 1 could carry a sum around the modulus."""
    session, secret = parties(backend)
    data, base = aggregate(session, secret), adapter_of(session.plan, 8, 0)
    exchange.unseal(forge(data, total=2 * SAMPLES), session, secret, round_=ROUND, rank=8, base=base)
    with pytest.raises(FormatError, match="exceed the total"):
        exchange.unseal(forge(data, total=2 * SAMPLES - 1), session, secret, round_=ROUND, rank=8, base=base)


@BACKENDS
def test_total_that_would_blow_the_mean_up_is_refused(backend: str) -> None:
    session, secret = parties(backend)
    data, base = aggregate(session, secret), adapter_of(session.plan, 8, 0)
    # of noise that is divided by so little nothing is left; floats are as precise as they are small, and absurd
    reason = "too little for a precise mean" if backend == "encrypted" else "above crypto.bound"
    with pytest.raises(RangeError, match=reason):
        exchange.unseal(forge(data, total=2**63), session, secret, round_=ROUND, rank=8, base=base)


def test_updates_and_aggregates_cannot_stand_for_each_other() -> None:
    session, secret = parties()
    with pytest.raises(RoundMismatchError, match="kind 1"):
        exchange.unseal(
            update(session, secret), session, secret, round_=ROUND, rank=RANK, base=adapter_of(session.plan, 8, 0)
        )
    with pytest.raises(RoundMismatchError, match="kind 2"):
        SeparateSum(session, ROUND, TOTAL).add(aggregate(session, secret), sender=1, who=Contributor(8, SAMPLES))


# --------------------------------------------------------------------------------------------------- damaged bytes


@pytest.mark.parametrize("make", [update, aggregate])
def test_every_single_bit_flip_anywhere_is_refused(make: Any) -> None:
    session, secret = parties()
    data = bytearray(make(session, secret))
    expected = EXPECTED if make is update else Expected(AGGREGATE, ROUND, 0, 8)
    wire.decode(bytes(data), session, expected)
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            wire.decode(bytes(data), session, expected)
        data[bit // 8] ^= 1 << bit % 8


@given(position=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_single_byte_change_of_an_encrypted_message_is_refused(position: float, change: int) -> None:
    session, secret = parties("encrypted")
    data = bytearray(update(session, secret))
    data[int(position * len(data))] ^= change
    with pytest.raises(WireError):
        wire.decode(bytes(data), session, EXPECTED)


def test_every_truncation_is_refused() -> None:
    session, secret = parties()
    data = update(session, secret)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            wire.decode(data[:length], session, EXPECTED)
    for length in range(BODY, len(data) - 32):  # with a SHA-256 that fits: the length itself is refused
        with pytest.raises(FormatError):
            wire.decode(rehashed(data[:length]), session, EXPECTED)


@BACKENDS
@pytest.mark.parametrize("extra", [1, 7, 8, 32, 2 * 4096 * 7])
def test_extended_message_is_refused(backend: str, extra: int) -> None:
    session, secret = parties(backend)
    data = update(session, secret)
    with pytest.raises(FormatError, match=f"{len(data) + extra} bytes where {len(data)} are expected"):
        wire.decode(rehashed(data[:-32] + bytes(extra)), session, EXPECTED)
    with pytest.raises(FormatError):
        wire.decode(data + bytes(extra), session, EXPECTED)


@pytest.mark.parametrize("data", [b"", b"\0", b"CTUNE\0\0\2", bytes(153)])
def test_empty_and_tiny_messages_are_refused(data: bytes) -> None:
    session, _ = parties()
    with pytest.raises(FormatError, match="too few"):
        wire.decode(data, session, EXPECTED)


def test_update_that_names_two_contributors_is_refused_even_when_its_length_is_right() -> None:
    session, secret = parties()
    message = wire.decode(update(session, secret), session, EXPECTED)
    two = wire.encode(replace(message, contributors=(WHO, WHO)), session)
    with pytest.raises(FormatError, match="names 2 contributors"):
        wire.decode(two, session, EXPECTED)


def test_aggregate_of_more_than_a_million_contributors_is_refused_even_when_its_length_is_right() -> None:
    session, secret = parties()
    data = aggregate(session, secret)
    people = data[106 : 106 + 16] * 1_000_001
    huge = forge(data[:106] + people + data[106 + 32 :], contributors=1_000_001, total=2**63)
    with pytest.raises(FormatError, match="names 1000001 contributors"):
        wire.decode(huge, session, Expected(AGGREGATE, ROUND, 0, 8))
    most = forge(data[:106] + people[16:] + data[106 + 32 :], contributors=1_000_000, total=2**63)
    assert len(wire.decode(most, session, Expected(AGGREGATE, ROUND, 0, 8)).contributors) == 1_000_000


def test_message_of_another_rank_in_disguise_is_refused_by_its_length() -> None:
    session, secret = parties()
    data = update(session, secret, rank=2)
    with pytest.raises(FormatError, match="bytes where"):
        wire.decode(forge(data, rank=RANK, contributor_rank=RANK), session, EXPECTED)


@pytest.mark.parametrize(
    ("count", "rank"), [(2**32 - 1, RANK), (1_000_000, RANK), (1, 2**32 - 1), (1_000_000, 2**32 - 1)]
)
def test_oversize_counts_are_refused_and_never_allocate(count: int, rank: int) -> None:
    """A hostile server may name any count and any rank; the client must notice before it makes room for them."""
    session, secret = parties()
    data = forge(aggregate(session, secret), contributors=count, rank=rank)
    tracemalloc.start()
    with pytest.raises(FormatError):
        wire.decode(data, session, Expected(AGGREGATE, ROUND, 0, rank))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_clear_part_that_is_not_finite_is_refused_by_server_and_client(value: float) -> None:
    session, secret = parties(select="none")
    data = update(session, secret)
    values = np.frombuffer(data[BODY:-32], "<f8").copy()
    values[-1] = value
    total = SeparateSum(session, ROUND, TOTAL)
    with pytest.raises(FormatError, match="NaN or infinite"):
        total.add(with_body(data, values.tobytes()), sender=SENDER, who=WHO)
    assert total.contributors == 0
