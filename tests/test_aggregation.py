"""The server's sum: what it releases, to whom, and what it keeps to itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ciphertune import exchange, wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.aggregation import SeparateSum, cut
from ciphertune.crypto.secret import SecretPart
from ciphertune.errors import FederationError, FormatError
from ciphertune.plan import LayerShape, Plan
from ciphertune.ranks import Contributor
from ciphertune.wire import Session
from tests.oracle import BODY, SEALED, adapter_of, blank, encrypted, in_the_clear, modular_sum, plan_of

RANKS, SAMPLES, TOTAL = (2, 8, 4), (10, 50, 30), 100
BACKENDS = pytest.mark.parametrize("backend", ["clear", "encrypted"])
# 900 values per component, so that a component is no whole number of the 2048 values of a ciphertext
WIDE = (LayerShape("block.q", 600, 5), LayerShape("block.v", 300, 9))


def parties(backend: str, plan: Plan) -> tuple[Session, SecretPart]:
    return encrypted(plan) if backend == "encrypted" else in_the_clear(plan)


def updates(session: Session, secret: SecretPart) -> list[bytes]:
    return [
        exchange.seal(
            adapter_of(session.plan, rank, i), session, secret, round_=0, sender=i + 1, samples=n, total=TOTAL
        )
        for i, (rank, n) in enumerate(zip(RANKS, SAMPLES, strict=True))
    ]


def sum_of(session: Session, data: list[bytes], order: tuple[int, ...] = (0, 1, 2)) -> SeparateSum:
    total = SeparateSum(session, 0, TOTAL)
    for i in order:
        total.add(data[i], sender=i + 1, who=Contributor(RANKS[i], SAMPLES[i]))
    return total


@BACKENDS
@pytest.mark.parametrize("minimum", [2, 3, 4])
def test_aggregate_of_too_few_is_not_released(backend: str, minimum: int) -> None:
    """The sum of one update is that update: whoever holds the key would read it."""
    session, secret = parties(backend, plan_of())
    data = updates(session, secret)
    for few in range(min(minimum, 4)):
        total = sum_of(session, data, tuple(range(few)))
        with pytest.raises(FederationError, match=f"{few} usable updates, fewer than .*min_contributors={minimum}"):
            total.release(minimum)
    if minimum <= 3:
        released = sum_of(session, data, tuple(range(minimum))).release(minimum)
        assert len(released.contributors) == minimum


@pytest.mark.parametrize("minimum", [0, -1, 1])
def test_empty_aggregate_is_never_released(minimum: int) -> None:
    session, _ = in_the_clear(plan_of())
    with pytest.raises(FederationError, match="0 usable updates"):
        SeparateSum(session, 0, TOTAL).release(minimum)


def test_refused_updates_do_not_count_towards_the_minimum() -> None:
    session, secret = in_the_clear(plan_of())
    data = updates(session, secret)
    total = sum_of(session, data, (0,))
    with pytest.raises(FormatError):
        total.add(data[1][:-1], sender=2, who=Contributor(8, 50))
    with pytest.raises(FederationError):
        total.release(2)


@BACKENDS
def test_released_aggregate_names_its_contributors_and_ends_at_the_last_component_that_enough_have(
    backend: str,
) -> None:
    session, secret = parties(backend, plan_of())
    released = sum_of(session, updates(session, secret), (2, 0, 1)).release(1)
    assert released.contributors == tuple(Contributor(r, n) for r, n in zip(RANKS, SAMPLES, strict=True))
    assert (released.kind, released.round, released.sender, released.rank, released.total) == (2, 0, 0, 8, TOTAL)
    assert (released.clear == b"") == (session.plan.select == "all")
    # ranks 2, 8, 4: two have four components, all three have two; and never above those who contributed
    assert [sum_of(session, updates(session, secret)).release(n).rank for n in (1, 2, 3)] == [8, 4, 2]
    assert sum_of(session, updates(session, secret), (0, 2)).release(1).rank == 4


@BACKENDS
def test_order_of_arrival_does_not_matter(backend: str) -> None:
    session, secret = parties(backend, plan_of(layers=WIDE))
    data = updates(session, secret)
    orders = list(itertools.permutations(range(3)))
    results = [sum_of(session, data, order).release(2) for order in orders]
    if backend == "encrypted":
        assert all(r == results[0] for r in results)
    else:
        for result in results:
            assert np.frombuffer(result.secret) == pytest.approx(np.frombuffer(results[0].secret), rel=1e-12, abs=1e-15)


@BACKENDS
def test_sum_whose_contributors_outweigh_the_total_is_refused_when_the_update_comes(backend: str) -> None:
    """Each weight is below 1, together they exceed it: the sum could wrap around and every client would refuse it."""
    session, secret = parties(backend, plan_of())
    total = SeparateSum(session, 0, TOTAL)
    for sender in (1, 2):
        data = exchange.seal(
            adapter_of(session.plan, 4, sender), session, secret, round_=0, sender=sender, samples=60, total=TOTAL
        )
        if sender == 1:
            total.add(data, sender=sender, who=Contributor(4, 60))
    with pytest.raises(FormatError, match="exceed the total"):
        total.add(data, sender=2, who=Contributor(4, 60))
    assert total.contributors == 1


@pytest.mark.parametrize("layers", [WIDE, plan_of().layers], ids=["wide", "small"])
@BACKENDS
def test_cut_is_the_sum_of_everybodys_first_components(backend: str, layers: tuple[LayerShape, ...]) -> None:
    plan = plan_of(layers=layers)
    session, secret = parties(backend, plan)
    data = updates(session, secret)
    released = sum_of(session, data).release(1)
    heads, component = 21, sum(x.m for x in layers)
    bodies = [data[i][BODY:-32] for i in range(3)]
    for rank in (1, 2, 3, 4, 7, 8):
        part = cut(released, session, rank)
        assert (part.rank, part.contributors, part.total) == (rank, released.contributors, TOTAL)
        values = heads + rank * component
        if backend == "encrypted":
            blocks = -(-(heads + component) // 2048) + (rank - 1) * -(-component // 2048)
            length = blocks * 2 * 4096 * 7
            assert part.secret == modular_sum([b[:length] for b in bodies], SEALED, secret.public.moduli)  # type: ignore[attr-defined]
        else:
            expected = np.zeros(values)
            for body in bodies:
                found = np.frombuffer(body)[:values]
                expected[: found.size] += found
            assert np.array_equal(np.frombuffer(part.secret), expected)


@pytest.mark.parametrize("select", ["none", "all"])
@BACKENDS
def test_a_lower_rank_client_gets_exactly_the_first_components_of_what_a_higher_one_gets(
    backend: str, select: str
) -> None:
    plan = plan_of(layers=WIDE, select=select)
    session, secret = parties(backend, plan)
    released = sum_of(session, updates(session, secret)).release(1)

    def received(rank: int, base_rank: int) -> Adapter:
        base = blank(adapter_of(plan, base_rank, 0))
        data = wire.encode(cut(released, session, rank), session)
        return exchange.unseal(data, session, secret, round_=0, rank=min(rank, 8), base=base)[0]

    high = received(8, 8)
    for rank in (1, 2, 4):
        low = received(rank, rank)
        for name, factors in low.layers.items():
            assert np.array_equal(factors.b, high.layers[name].b[:, :rank])
            assert (factors.a == 7).all()
        assert all(np.array_equal(h, high.heads[n]) for n, h in low.heads.items())
        # the same bytes written over a base of higher rank leave its other components alone
        kept = received(rank, 8)
        assert all((f.b[:, rank:] == 7).all() for f in kept.layers.values())


def test_cut_above_the_aggregates_rank_is_the_aggregate_itself() -> None:
    session, secret = in_the_clear(plan_of())
    released = sum_of(session, updates(session, secret), (0, 2)).release(1)
    assert cut(released, session, 8) == released
    assert cut(released, session, 4) == released
    # a client of rank 8 keeps its own values where nobody contributed
    base = blank(adapter_of(session.plan, 8, 0))
    mean, message = exchange.unseal(
        wire.encode(released, session), session, secret, round_=0, rank=released.rank, base=base
    )
    assert message.rank == 4
    assert all((f.b[:, 4:] == 7).all() and (f.b[:, :4] != 7).any() for f in mean.layers.values())


@BACKENDS
def test_identical_updates_of_any_weights_have_themselves_as_mean(backend: str) -> None:
    session, secret = parties(backend, plan_of())
    same = adapter_of(session.plan, 8, 0)
    total = SeparateSum(session, 0, TOTAL)
    for sender, samples in enumerate((1, 7, 22), 1):
        data = exchange.seal(same, session, secret, round_=0, sender=sender, samples=samples, total=TOTAL)
        total.add(data, sender=sender, who=Contributor(8, samples))
    base = Adapter({n: LoraFactors(f.a * 0, f.b * 0, f.scale) for n, f in same.layers.items()}, same.heads)
    data = wire.encode(total.release(2), session)
    mean, _ = exchange.unseal(data, session, secret, round_=0, rank=8, base=base)
    error = max(np.abs(f.b - same.layers[n].b).max() for n, f in mean.layers.items())
    assert error <= session.public.error_bound(3, 1.0) * 100 / 30
