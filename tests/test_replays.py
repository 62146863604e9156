"""Replays, and updates that are stolen, damaged or of another weight: refused, and the sum stays as it was."""

from __future__ import annotations

import pytest

from ciphertune import exchange
from ciphertune.aggregation import SeparateSum
from ciphertune.errors import RangeError, RoundMismatchError, WireError
from ciphertune.wire import Message
from tests.messages import BACKENDS, RANK, ROUND, SAMPLES, SENDER, TOTAL, WHO, aggregate, parties, update
from tests.oracle import BODY, adapter_of, blank, forge, rehashed, with_body


@BACKENDS
def test_replay_of_an_earlier_round_is_refused(backend: str) -> None:
    session, secret = parties(backend)
    for earlier in (ROUND - 2, ROUND - 1):
        total = SeparateSum(session, ROUND, TOTAL)
        with pytest.raises(RoundMismatchError, match=f"round {earlier}, expected {ROUND}"):
            total.add(update(session, secret, round_=earlier), sender=SENDER, who=WHO)
        with pytest.raises(RoundMismatchError, match=f"round {earlier}, expected {ROUND}"):
            exchange.unseal(
                aggregate(session, secret, earlier),
                session,
                secret,
                round_=ROUND,
                rank=8,
                base=adapter_of(session.plan, 8, 0),
            )


def state(total: SeparateSum) -> Message:
    return total.release(1)


@BACKENDS
def test_second_update_of_one_sender_is_refused_and_leaves_the_sum_as_it_was(backend: str) -> None:
    session, secret = parties(backend)
    total = SeparateSum(session, ROUND, TOTAL)
    total.add(update(session, secret), sender=SENDER, who=WHO)
    before = state(total)
    for seed in (0, 1):
        with pytest.raises(RoundMismatchError, match=f"client {SENDER} has already contributed to round {ROUND}"):
            total.add(update(session, secret, seed=seed), sender=SENDER, who=WHO)
    assert state(total) == before
    assert total.contributors == 1


@BACKENDS
def test_update_of_another_client_cannot_be_sent_as_ones_own(backend: str) -> None:
    session, secret = parties(backend)
    total = SeparateSum(session, ROUND, TOTAL)
    stolen = update(session, secret, sender=SENDER)
    with pytest.raises(RoundMismatchError, match=f"sender {SENDER}, expected {SENDER + 1}"):
        total.add(stolen, sender=SENDER + 1, who=WHO)


@BACKENDS
def test_bad_update_leaves_the_sum_exactly_as_it_was_and_the_next_good_one_counts(backend: str) -> None:
    session, secret = parties(backend)
    total, alone = SeparateSum(session, ROUND, TOTAL), SeparateSum(session, ROUND, TOTAL)
    first, second = update(session, secret), update(session, secret, sender=4, seed=1)
    for sum_ in (total, alone):
        sum_.add(first, sender=SENDER, who=WHO)
    before = state(total)
    flipped = second[:200] + bytes([second[200] ^ 1]) + second[201:]
    bad = [second[:-1], b"", flipped, forge(second, key=b"k" * 16)]
    bad += [forge(second, contributor_samples=SAMPLES + 1), forge(second, round=0), rehashed(second[:-40])]
    if backend == "encrypted":
        bad.append(with_body(second, b"\xff" * (len(second) - BODY - 32)))
        bad.append(with_body(second, bytes(len(second) - BODY - 32)))
    for data in bad:
        with pytest.raises(WireError):
            total.add(data, sender=4, who=WHO)
        assert state(total) == before
    for sum_ in (total, alone):
        sum_.add(second, sender=4, who=WHO)
    assert state(total) == state(alone) != before


def test_a_weight_that_the_server_did_not_agree_to_is_refused() -> None:
    session, secret = parties()
    heavy = update(session, secret, samples=TOTAL)
    with pytest.raises(RoundMismatchError, match=r"weighted by .*samples=100, .*, expected .*samples=30, "):
        SeparateSum(session, ROUND, TOTAL).add(heavy, sender=SENDER, who=WHO)


@pytest.mark.parametrize(("samples", "total"), [(0, 100), (-1, 100), (101, 100), (1, 0)])
def test_seal_refuses_a_weight_outside_0_to_1(samples: int, total: int) -> None:
    session, secret = parties()
    with pytest.raises(RangeError, match="not between 0 and 1"):
        update(session, secret, samples=samples, total=total)


@BACKENDS
def test_seal_refuses_values_that_are_not_finite_or_above_the_bound(backend: str) -> None:
    for select in ("none", "all"):
        session, secret = parties(backend, select=select)
        for bad, reason in ((float("nan"), "NaN or infinite"), (64.5, "above crypto"), (float("-inf"), "NaN")):
            adapter = blank(adapter_of(session.plan, RANK, 0))
            adapter.layers["block.v"].b[2, 3] = bad
            with pytest.raises(RangeError, match=reason):
                exchange.seal(adapter, session, secret, round_=ROUND, sender=1, samples=1, total=100)
