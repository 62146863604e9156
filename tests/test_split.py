"""Adapter to vectors and back: nothing lost, nothing moved, and a lower rank sends a prefix of a higher one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.errors import PlanMismatchError
from ciphertune.plan import HeadShape, LayerShape, Plan
from ciphertune.split import component_size, head_size, join, pack, segments
from tests.oracle import adapter_of, blank, plan_of

FACTORS = st.sampled_from([("a",), ("b",), ("a", "b")])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    sides = st.integers(1, 6)
    layers = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=3))
    heads = draw(st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), max_size=2))
    return plan_of(
        share=draw(st.sampled_from(["both", "alternate", "b_only"])),
        select=draw(st.sampled_from(["none", "all"])),
        layers=tuple(LayerShape(f"layer.{i}", m, n) for i, (m, n) in enumerate(layers)),
        heads=tuple(HeadShape(f"head.{i}", shape) for i, shape in enumerate(heads)),
    )


def assert_same(one: Adapter, two: Adapter, factors: tuple[str, ...] = ("a", "b")) -> None:
    assert one.layers.keys() == two.layers.keys()
    for name, layer in one.layers.items():
        for factor in factors:
            assert np.array_equal(getattr(layer, factor), getattr(two.layers[name], factor))
        assert layer.scale == two.layers[name].scale
    assert one.heads.keys() == two.heads.keys()
    assert all(np.array_equal(head, two.heads[name]) for name, head in one.heads.items())


@given(plan=plans(), rank=st.integers(1, 5), factors=FACTORS, seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_join_of_pack_is_the_adapter(plan: Plan, rank: int, factors: tuple[str, ...], seed: int) -> None:
    adapter = adapter_of(plan, rank, seed)
    values = pack(adapter, plan, factors)
    back = join(values, plan, factors, blank(adapter))
    assert_same(back, adapter, factors)
    for factor in {"a", "b"} - set(factors):  # what does not travel stays the base's
        assert all((getattr(f, factor) == 7).all() for f in back.layers.values())
    assert np.array_equal(pack(back, plan, factors), values)


@given(plan=plans(), rank=st.integers(1, 5), factors=FACTORS, tiers=st.sets(st.integers(1, 5), max_size=4).map(sorted))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_segments_say_how_long_the_vector_is_and_where_each_tier_ends(
    plan: Plan, rank: int, factors: tuple[str, ...], tiers: list[int]
) -> None:
    plan = replace(plan, tiers=tuple(sorted({*tiers, rank})))
    values = pack(adapter_of(plan, rank, 0), plan, factors)
    heads = sum(int(np.prod(h.shape)) for h in plan.heads)
    component = sum({"a": x.n, "b": x.m}[f] for x in plan.layers for f in factors)
    assert values.size == heads + rank * component and values.dtype == np.float64
    assert (head_size(plan), component_size(plan, factors)) == (heads, component)
    ends = np.cumsum(segments(plan, factors, rank))
    assert ends.tolist() == [heads + t * component for t in plan.tiers if t <= rank]


@given(plan=plans(), rank=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_where_nothing_is_shared_nothing_travels_and_the_base_stays(plan: Plan, rank: int, seed: int) -> None:
    plan = replace(plan, share="none")
    adapter = adapter_of(plan, rank, seed)
    assert plan.factors(0) == plan.factors(1) == () and head_size(plan) == 0
    assert pack(adapter, plan, ()).size == 0 and sum(segments(plan, (), rank)) == 0
    assert_same(join(np.zeros(0), plan, (), adapter), adapter)


@given(plan=plans(), low=st.integers(1, 4), more=st.integers(0, 4), factors=FACTORS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_lower_ranks_vector_is_a_prefix_of_a_higher_ranks(
    plan: Plan, low: int, more: int, factors: tuple[str, ...]
) -> None:
    high = adapter_of(plan, low + more, 0)
    cut = Adapter({n: LoraFactors(f.a[:low], f.b[:, :low], f.scale) for n, f in high.layers.items()}, high.heads)
    short, long = pack(cut, plan, factors), pack(high, plan, factors)
    assert np.array_equal(short, long[: short.size])
    # and the short one replaces the first components of a base of higher rank, no others
    back = join(short, plan, factors, blank(high))
    for name, layer in back.layers.items():
        for factor in factors:
            found = layer.a if factor == "a" else layer.b.T
            wanted = high.layers[name].a if factor == "a" else high.layers[name].b.T
            assert np.array_equal(found[:low], wanted[:low])
            assert (found[low:] == 7).all()


def test_order_is_heads_then_component_by_component_over_all_layers() -> None:
    plan = plan_of(
        layers=(LayerShape("one", 2, 3), LayerShape("two", 1, 2)), heads=(HeadShape("head", (2, 2)),), tiers=(2,)
    )
    one = LoraFactors(np.array([[1.0, 2, 3], [4, 5, 6]]), np.array([[10.0, 20], [30, 40]]), 2.0)
    two = LoraFactors(np.array([[7.0, 8], [9, 10]]), np.array([[50.0, 60]]), 2.0)
    adapter = Adapter({"two": two, "one": one}, {"head": np.array([[-1.0, -2], [-3, -4]])})
    head = [-1, -2, -3, -4]
    assert pack(adapter, plan, ("a",)).tolist() == [*head, 1, 2, 3, 7, 8, 4, 5, 6, 9, 10]
    assert pack(adapter, plan, ("b",)).tolist() == [*head, 10, 30, 50, 20, 40, 60]
    both = [*head, 1, 2, 3, 10, 30, 7, 8, 50, 4, 5, 6, 20, 40, 9, 10, 60]
    assert pack(adapter, plan, ("a", "b")).tolist() == both


def test_precision_of_the_base_is_kept_and_the_base_is_not_written_to() -> None:
    plan = plan_of()
    adapter, base = adapter_of(plan, 4, 0, np.float32), blank(adapter_of(plan, 4, 0), np.float32)
    back = join(pack(adapter, plan, ("a", "b")), plan, ("a", "b"), base)
    assert_same(back, adapter)
    assert {x.dtype for f in back.layers.values() for x in (f.a, f.b)} == {np.dtype(np.float32)}
    assert {h.dtype for h in back.heads.values()} == {np.dtype(np.float32)}
    assert all((f.a == 7).all() and (f.b == 7).all() for f in base.layers.values())
    for name in back.layers:
        back.layers[name].a[...] = 0
        back.layers[name].b[...] = 0
    assert all((f.a == 7).all() and (f.b == 7).all() for f in base.layers.values())


def test_changing_the_adapter_after_packing_does_not_change_what_is_sent() -> None:
    plan = plan_of(heads=(), layers=(LayerShape("only", 3, 4),))
    adapter = adapter_of(plan, 1, 0)
    values = pack(adapter, plan, ("a",))
    kept = values.copy()
    adapter.layers["only"].a[...] = 0
    assert np.array_equal(values, kept) and kept.any()


def wrong_adapters() -> dict[str, Adapter]:
    good = adapter_of(plan_of(), 4, 0)
    layers, heads = dict(good.layers), dict(good.heads)
    q, v = layers["block.q"], layers["block.v"]
    return {
        "a layer of another n": Adapter({**layers, "block.q": LoraFactors(q.a[:, :-1], q.b, 2.0)}, heads),
        "a layer of another m": Adapter({**layers, "block.q": LoraFactors(q.a, q.b[:-1], 2.0)}, heads),
        "m and n swapped": Adapter({**layers, "block.q": LoraFactors(q.b.T, q.a.T, 2.0)}, heads),
        "layers of unequal rank": Adapter({**layers, "block.v": LoraFactors(v.a[:3], v.b[:, :3], 2.0)}, heads),
        "a layer missing": Adapter({"block.q": q}, heads),
        "a layer too many": Adapter({**layers, "block.z": q}, heads),
        "another layer": Adapter({"block.q": q, "block.w": v}, heads),
        "no layers": Adapter({}, heads),
        "a head of another shape": Adapter(layers, {**heads, "classifier.bias": np.zeros(4)}),
        "a head transposed": Adapter(layers, {**heads, "classifier.weight": heads["classifier.weight"].T}),
        "a head missing": Adapter(layers, {"classifier.bias": heads["classifier.bias"]}),
        "a head too many": Adapter(layers, {**heads, "pooler": np.zeros(2)}),
    }


@pytest.mark.parametrize("name", wrong_adapters())
def test_adapter_of_another_shape_than_the_plan_is_refused(name: str) -> None:
    plan, wrong = plan_of(), wrong_adapters()[name]
    good = pack(adapter_of(plan, 4, 0), plan, ("b",))
    with pytest.raises(PlanMismatchError):
        pack(wrong, plan, ("b",))
    with pytest.raises(PlanMismatchError):
        join(good, plan, ("b",), wrong)


@pytest.mark.parametrize("change", [-1, 1, 10, -21])
def test_vector_that_is_no_whole_number_of_components_is_refused(change: int) -> None:
    plan = plan_of()
    base = adapter_of(plan, 4, 0)
    values = np.zeros(pack(base, plan, ("b",)).size + change)
    with pytest.raises(PlanMismatchError, match="do not fit an adapter of rank 4"):
        join(values, plan, ("b",), base)


def test_vector_of_a_higher_rank_than_the_base_is_refused() -> None:
    plan = plan_of()
    values = pack(adapter_of(plan, 5, 0), plan, ("b",))
    with pytest.raises(PlanMismatchError, match="do not fit an adapter of rank 4"):
        join(values, plan, ("b",), adapter_of(plan, 4, 0))


def test_vector_without_its_heads_is_refused() -> None:
    plan = plan_of()
    base = adapter_of(plan, 4, 0)
    with pytest.raises(PlanMismatchError):
        join(np.zeros(0), plan, ("b",), base)
    join(np.zeros(0), replace(plan, heads=()), ("b",), Adapter(base.layers, {}))


@given(plan=plans(), tiers=st.lists(st.integers(1, 6), min_size=1, unique=True).map(sorted), rank=st.integers(1, 8))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_segments_end_at_tiers_and_what_lies_above_the_last_one_reached_does_not_travel(
    plan: Plan, tiers: list[int], rank: int
) -> None:
    plan = replace(plan, tiers=tuple(tiers))
    adapter = adapter_of(plan, rank, 0)
    reached = [t for t in tiers if t <= rank]
    if not reached:
        with pytest.raises(PlanMismatchError, match="below the plan's lowest tier"):
            pack(adapter, plan, ("b",))
        return
    component = sum(x.m for x in plan.layers)
    assert pack(adapter, plan, ("b",)).size == head_size(plan) + reached[-1] * component
    ends = np.cumsum(segments(plan, ("b",), plan.shared(rank))) - head_size(plan)
    assert ends.tolist() == [t * component for t in reached]
    assert plan.shared(rank) == reached[-1]
