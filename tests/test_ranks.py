"""Unequal ranks: each component is divided by the weight of those that have it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune.adapter import Adapter
from ciphertune.errors import FormatError
from ciphertune.plan import HeadShape, LayerShape, Plan
from ciphertune.ranks import Contributor, damped, divisors, to_mean
from ciphertune.split import join, pack
from tests.oracle import adapter_of, mean_factor, mean_head, plan_of

# ranks 2, 4 and 8 with 10, 30 and 60 of 100 samples
THREE = (Contributor(2, 10), Contributor(4, 30), Contributor(8, 60))
NESTED, PAD = plan_of(fit_rank="nested"), plan_of(fit_rank="pad")


def test_nested_divides_each_component_by_the_weight_of_the_clients_that_have_it() -> None:
    # components 0 and 1: all; 2 and 3: ranks 4 and 8; 4 to 7: rank 8 alone
    by_hand = [1.0, 1.0, 0.9, 0.9, 0.6, 0.6, 0.6, 0.6]
    assert divisors(NESTED, THREE, 100, 8) == pytest.approx(by_hand, rel=1e-15)
    assert divisors(NESTED, THREE[::-1], 100, 8) == pytest.approx(by_hand, rel=1e-15)
    assert divisors(NESTED, THREE, 100, 3) == pytest.approx(by_hand[:3], rel=1e-15)


def test_pad_divides_every_component_by_the_weight_of_all() -> None:
    assert divisors(PAD, THREE, 100, 8) == pytest.approx([1.0] * 8, rel=1e-15)


def test_clients_that_were_asked_and_did_not_reply_are_in_the_total_and_divided_out() -> None:
    assert divisors(NESTED, THREE, 200, 8) == pytest.approx([0.5, 0.5, 0.45, 0.45, 0.3, 0.3, 0.3, 0.3], rel=1e-15)
    assert divisors(PAD, THREE, 200, 8) == pytest.approx([0.5] * 8, rel=1e-15)


@pytest.mark.parametrize("plan", [NESTED, PAD], ids=["nested", "pad"])
def test_component_that_nobody_contributed_has_divisor_0(plan: Plan) -> None:
    assert divisors(plan, THREE[:2], 40, 6)[4:].tolist() == [0.0, 0.0]
    assert (divisors(plan, THREE[:2], 40, 6)[:4] > 0).all()


def test_mean_by_hand() -> None:
    """One layer of m=1 and a head of one entry: head | component 0 | component 1 | component 2."""
    layers, heads = (LayerShape("x", 1, 1),), (HeadShape("h", (1,)),)
    people = (Contributor(1, 20), Contributor(3, 60))  # of 100
    # sums of 0.2 x + 0.6 y: head 4 and 8, component 0: 2 and 6, components 1 and 2: 5 and 7 of the second alone
    packed = np.array([0.2 * 4 + 0.6 * 8, 0.2 * 2 + 0.6 * 6, 0.6 * 5, 0.6 * 7])
    nested = to_mean(packed, plan_of(layers=layers, heads=heads), ("b",), people, 100)
    assert nested == pytest.approx([7.0, 5.0, 5.0, 7.0], rel=1e-15)
    pad = to_mean(packed, plan_of(layers=layers, heads=heads, fit_rank="pad"), ("b",), people, 100)
    assert pad == pytest.approx([7.0, 5.0, 3.75, 5.25], rel=1e-15)


@pytest.mark.parametrize("plan", [NESTED, PAD], ids=["nested", "pad"])
def test_components_that_no_contributor_has_are_refused_and_never_divided_by_zero(plan: Plan) -> None:
    heads, component = 21, 11
    with np.errstate(all="raise"), pytest.raises(FormatError, match="none of its contributors has"):
        to_mean(np.ones(heads + 8 * component), plan, ("b",), THREE[:2], 40)
    assert to_mean(np.ones(heads + 4 * component), plan, ("b",), THREE[:2], 40).size == heads + 4 * component


@given(
    people=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 1000)), min_size=1, max_size=5),
    absent=st.integers(0, 1000),
    fit_rank=st.sampled_from(["nested", "pad"]),
    factors=st.sampled_from([("a",), ("b",), ("a", "b")]),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_mean_of_weighted_sums_is_the_oracles(
    people: list[tuple[int, int]], absent: int, fit_rank: str, factors: tuple[str, ...], seed: int
) -> None:
    plan = plan_of(fit_rank=fit_rank)
    clients = [adapter_of(plan, rank, seed + i) for i, (rank, _) in enumerate(people)]
    samples = [n for _, n in people]
    total = sum(samples) + absent
    packed = np.zeros(pack(max(clients, key=lambda c: c.rank), plan, factors).size)
    for client, n in zip(clients, samples, strict=True):
        values = pack(client, plan, factors)
        packed[: values.size] += values * (n / total)
    mean = to_mean(packed, plan, factors, [Contributor(r, n) for r, n in people], total)
    expected = [mean_head(clients, samples, h.name).ravel() for h in plan.heads]
    for k in range(max(r for r, _ in people)):
        for layer in plan.layers:
            expected += [mean_factor(clients, samples, layer.name, f, fit_rank)[k] for f in factors]
    assert mean == pytest.approx(np.concatenate(expected), rel=1e-12, abs=1e-13)


def _whole(trained: Adapter, base: Adapter) -> dict[str, dict[str, np.ndarray]]:
    """By hand: a client's components, and what it holds beyond them."""
    found = {}
    for name, f in trained.layers.items():
        a, b = base.layers[name].a.copy(), base.layers[name].b.copy()
        a[: f.rank], b[:, : f.rank] = f.a, f.b
        found[name] = {"a": a, "b": b}
    return found


@given(
    people=st.lists(st.tuples(st.sampled_from([2, 4, 8]), st.integers(1, 1000)), min_size=1, max_size=5),
    factors=st.sampled_from([("a",), ("b",), ("a", "b")]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_mean_of_damped_updates_is_that_of_the_whole_adapters_of_all(
    people: list[tuple[int, int]], factors: tuple[str, ...], seed: int
) -> None:
    plan, top = plan_of(tiers=(2, 4, 8)), max(rank for rank, _ in people)
    base, samples = adapter_of(plan, 8, seed), [n for _, n in people]
    clients = [adapter_of(plan, rank, seed + 1 + i) for i, (rank, _) in enumerate(people)]
    total = sum(samples)
    reach = [sum(n for rank, n in people if rank >= tier) / total or 1.0 for tier in plan.tiers]
    packed = np.zeros(pack(base.first(top), plan, factors).size)
    for client, n in zip(clients, samples, strict=True):
        values = pack(damped(client, base, plan.tiers, reach), plan, factors)
        packed[: values.size] += values * (n / total)
    mean = join(to_mean(packed, plan, factors, [Contributor(r, n) for r, n in people], total), plan, factors, base)
    wholes = [_whole(client, base) for client in clients]
    for name, found in mean.layers.items():
        for factor in factors:
            expected = np.average([whole[name][factor] for whole in wholes], axis=0, weights=samples)
            np.testing.assert_allclose(getattr(found, factor), expected, rtol=1e-11, atol=1e-12)
        if factors == ("b",):  # and so is that of the updates, since all hold one A
            exact = np.average([whole[name]["b"] @ base.layers[name].a for whole in wholes], axis=0, weights=samples)
            np.testing.assert_allclose(found.b @ found.a, exact, rtol=1e-10, atol=1e-11)


def test_updates_of_equal_rank_are_not_touched() -> None:
    update = adapter_of(NESTED, 8, 1, np.float32)
    assert damped(update, adapter_of(NESTED, 8, 2, np.float32), (8,), (1.0,)) is update


@pytest.mark.parametrize("plan", [NESTED, PAD], ids=["nested", "pad"])
def test_the_divisors_of_many_contributors_take_memory_for_each_and_not_for_each_and_component(plan: Plan) -> None:
    """A server names contributors and their ranks; a matrix of 50,000 by 4096 would be 1.6 GB."""
    many = [Contributor(1 + k % 4096, 1 + k % 7) for k in range(50_000)]
    tracemalloc.start()
    found = divisors(plan, many, 50_000, 4096)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20e6
    ranks, samples = np.array([c.rank for c in many]), np.array([c.samples for c in many])
    for k in (0, 1, 2047, 4095):
        who = samples[ranks > k] if plan is NESTED else samples
        assert found[k] == pytest.approx(who.sum() / 50_000, rel=1e-12)
