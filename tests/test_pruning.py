"""Pruning: how much when, which entries, and what is sealed under a mask of a client's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune

from ciphertune import build, pruning, wire
from ciphertune.adapter import Adapter
from ciphertune.errors import FormatError, SettingsError, TooFewError
from ciphertune.plan import HeadShape, LayerShape, Plan
from ciphertune.settings import compose
from ciphertune.split import head_size, join, pack
from tests.oracle import SMALL_HEADS, SMALL_LAYERS, adapter_of, blank, largest, mean_head, mean_of_kept, plan_of
from tests.oracle import rows_of as rows
from tests.separate_cases import CONF, IN_FLOAT64, LAYERS, RANKS, SAMPLES, Round, constant

SHIELD = compose(CONF, ["method=fedshield"])
FACTORS = st.sampled_from([("a",), ("b",), ("a", "b")])


# -------------------------------------------------------------------------------------------------------- the schedule


def scheduled(first: float, last: float, begin: float, end: float, prune_: str = "own") -> Plan:
    return replace(plan_of(share="both"), prune=prune_, schedule=(first, last, begin, end))


def published(first: float, last: float, begin: float, end: float, t: Fraction) -> Fraction:
    """p_t = p_0 + (p_target - p_0) (t - t_eff) / (t_target - t_eff) from t_eff on, from t_target on p_target."""
    p0, p1, t0, t1 = map(Fraction, (first, last, begin, end))
    if t < t0:
        return Fraction(0)
    return p1 if t >= t1 else p0 + (p1 - p0) * (t - t0) / (t1 - t0)


@pytest.mark.parametrize("prune_", ["own", "agreed"])
def test_the_fixed_schedule_has_the_published_points(prune_: str) -> None:
    method = replace(SHIELD.method, prune_schedule="fixed", prune=prune_)
    plan = build.make_plan(replace(SHIELD, method=method), SMALL_LAYERS, SMALL_HEADS, (2,))
    assert [plan.rate(t) for t in (0, 1, 39)] == [0, 0, 0]
    assert plan.rate(40) == 0.2
    assert plan.rate(120) == pytest.approx(0.35, rel=1e-12)
    assert plan.rate(199) == pytest.approx(0.2 + 0.3 * 159 / 160, rel=1e-12)
    assert [plan.rate(t) for t in (200, 201, 10**6)] == [0.5, 0.5, 0.5]


RATES = st.floats(0, 0.999)


@given(RATES, RATES, st.floats(0, 1e4), st.floats(1e-3, 1e4), st.integers(0, 30_000))
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_the_rate_is_the_published_formula_and_never_leaves_its_range(
    one: float, two: float, begin: float, length: float, round_: int
) -> None:
    first, last = sorted((one, two))
    plan = scheduled(first, last, begin, begin + length)
    rate, exact = plan.rate(round_), published(*plan.schedule, Fraction(round_))
    assert abs(rate - exact) <= 1e-9
    assert rate == 0 if round_ < begin else first <= rate <= last * (1 + 2**-52)
    assert replace(plan, prune="none").rate(round_) == 0


def test_the_rate_is_never_above_the_last_one_not_even_by_a_rounding() -> None:
    plans_ = [scheduled(0.3, target / 1000, 40, 200) for target in range(700, 1000)]
    assert all(plan.rate(t) <= plan.schedule[1] for plan in plans_ for t in (199, 200, 10**6))


@given(rounds=st.integers(1, 5000), round_=st.integers(0, 10_000))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_scaled_schedule_is_the_fixed_one_over_the_rounds_of_the_run(rounds: int, round_: int) -> None:
    run = replace(SHIELD, federation=replace(SHIELD.federation, rounds=rounds))
    assert run.method.prune_schedule == "scaled"  # the default
    rate = build.make_plan(run, SMALL_LAYERS, SMALL_HEADS, (2,)).rate(round_)
    exact = published(0.2, 0.5, 40, 200, Fraction(200 * round_, rounds))
    assert rate == pytest.approx(float(exact), abs=1e-9)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("method.prune_until=40",), "method.prune_until=40 is not after method.prune_from=40"),
        (("method.prune_from=300",), "method.prune_until=200 is not after method.prune_from=300"),
        (("method.prune_target=0.1",), "method.prune_target=0.1 is below method.prune_start=0.2"),
        (("method.prune_start=-0.1",), "method.prune_start=-0.1 is out of range: want 0.0 to 0.999"),
        (("method.prune_target=1.0",), "method.prune_target=1.0 is out of range"),
        (("method.prune_target=nan",), "method.prune_target=nan is out of range"),
        (("method.prune_from=-1",), "method.prune_from=-1.0 is out of range"),
        (("method.prune_until=inf",), "method.prune_until=inf is out of range"),
        (("method.prune=theirs",), "method.prune='theirs' is not one of: none, own, agreed"),
        (("method.prune_schedule=cubic",), "method.prune_schedule='cubic' is not one of: fixed, scaled"),
        (("method.prune_mean=median",), "method.prune_mean='median' is not one of: all, kept"),
        (("method.select=none", "crypto=clear"), "method.prune=own with method.select=none"),
        (("method.select=entries",), "method.prune=own with method.select=entries"),
    ],
)
def test_a_bad_schedule_or_choice_is_refused_in_one_line_that_names_it(words: Sequence[str], part: str) -> None:
    with pytest.raises(SettingsError) as caught:
        compose(CONF, ["method=fedshield", *words])
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["fedavg", "flexlora", "she_lora", "flora", "maskcrypt"])
def test_a_method_that_cannot_be_pruned_is_refused(method: str) -> None:
    for whose in ("own", "agreed"):
        with pytest.raises(SettingsError, match=r"pruning needs method\.select=all and method\.aggregate=separate"):
            compose(CONF, [f"method={method}", f"method.prune={whose}"])


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": [0.5, 0.2, 40, 200]},
        {"schedule": [0.2, 0.5, 200, 40]},
        {"schedule": [0.2, 0.5, 40, 40]},
        {"schedule": [0.2, 1.0, 40, 200]},
        {"schedule": [-0.1, 0.5, 40, 200]},
        {"schedule": [0.2, 0.5, -1, 200]},
        {"schedule": [0.2, float("nan"), 40, 200]},
        {"schedule": [0.2, 0.5, 40, float("inf")]},
        {"schedule": [0.2, 0.5, 40]},
        {"schedule": [0.2, 0.5, 40, 200, 1]},
        {"schedule": 0.5},
        {"schedule": ["all", 0.5, 40, 200]},
        {"fraction": 0.0},
        {"fraction": 1.1},
        {"fraction": float("nan")},
    ],
    ids=str,
)
def test_a_plan_with_a_bad_schedule_or_share_is_a_format_error(change: dict[str, object]) -> None:
    good = json.loads(scheduled(0.2, 0.5, 40, 200).to_json())
    assert Plan.from_json(json.dumps(good)) == scheduled(0.2, 0.5, 40, 200)
    with pytest.raises(FormatError):
        Plan.from_json(json.dumps(good | change))


def test_every_choice_of_pruning_makes_another_plan_so_that_unlike_clients_never_add_up() -> None:
    plan = scheduled(0.2, 0.5, 40, 200)
    others = [scheduled(0.2, 0.5, 40, 201), scheduled(0.2, 0.5, 40, 200, "agreed"), replace(plan, prune_mean="kept")]
    others += [replace(plan, fraction=0.5), replace(plan, weighting="norm"), replace(plan, prune="none")]
    assert len({p.digest() for p in [plan, *others]}) == 7


# ------------------------------------------------------------------------------------------------------- which entries


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    sides = st.integers(1, 9)
    layers = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=3))
    heads = draw(st.lists(st.lists(st.integers(1, 4), max_size=2).map(tuple), max_size=2))
    return plan_of(
        share="both",
        layers=tuple(LayerShape(f"layer.{i}", m, n) for i, (m, n) in enumerate(layers)),
        heads=tuple(HeadShape(f"head.{i}", shape) for i, shape in enumerate(heads)),
        tiers=tuple(sorted(draw(st.sets(st.integers(1, 6), min_size=1, max_size=3)))),
    )


def chosen(adapter: Adapter, plan: Plan, factors: tuple[str, ...], rate: float) -> Adapter:
    """1 where `choose` keeps an entry of the adapter, 0 where it does not, 7 what does not travel."""
    rank = plan.shared(adapter.rank)
    keep = pruning.choose(pack(adapter, plan, factors), plan, factors, rank, rate)
    return join(keep.astype(float), plan, factors, blank(adapter))


def l1_unstructured(block: np.ndarray, rate: float) -> np.ndarray:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(block)))
    return prune.l1_unstructured(module, "weight", amount=rate).weight_mask.numpy()


@given(plan=plans(), factors=FACTORS, rate=st.floats(0, 0.999), seed=st.integers(0, 999))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_choice_is_torchs_l1_unstructured_of_each_tensor_and_tier_and_heads_remain(
    plan: Plan, factors: tuple[str, ...], rate: float, seed: int
) -> None:
    adapter = adapter_of(plan, plan.tiers[-1], seed)
    found = chosen(adapter, plan, factors, rate)
    for layer in plan.layers:
        for factor in factors:
            for low, high in zip([0, *plan.tiers], plan.tiers, strict=False):
                expected = l1_unstructured(rows(adapter, layer.name, factor)[low:high], rate)
                assert np.array_equal(rows(found, layer.name, factor)[low:high], expected)
    assert all((head == 1).all() for head in found.heads.values())


@given(plan=plans(), factors=FACTORS, rate=st.floats(0, 0.999), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_of_equal_entries_the_first_go_first_so_that_every_client_chooses_alike(
    plan: Plan, factors: tuple[str, ...], rate: float, seed: int
) -> None:
    coarse = adapter_of(plan, plan.tiers[-1], seed)
    for f in coarse.layers.values():  # values of -0.0, 0 and +-0.3: ties everywhere, of both signs
        for x in (f.a, f.b):
            x[...] = 0.3 * np.clip(np.round(x / 0.3), -1, 1)
    found = chosen(coarse, plan, factors, rate)
    for layer in plan.layers:
        for factor in factors:
            kept = rows(found, layer.name, factor)
            assert np.array_equal(kept, largest(rows(coarse, layer.name, factor), plan.tiers, rate))


@given(plan=plans(), factors=FACTORS, rate=st.floats(0, 0.999), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_counts_say_how_many_entries_the_choice_leaves_and_a_lower_rank_gets_a_prefix(
    plan: Plan, factors: tuple[str, ...], rate: float, seed: int
) -> None:
    packed = pack(adapter_of(plan, plan.tiers[-1], seed), plan, factors)
    whole = pruning.choose(packed, plan, factors, plan.tiers[-1], rate)
    at = 0
    for tier, rank in enumerate(plan.tiers):
        size = head_size(plan) + rank * sum({"a": x.n, "b": x.m}[f] for x in plan.layers for f in factors)
        keep = pruning.choose(packed[:size], plan, factors, rank, rate)
        assert np.array_equal(keep, whole[:size])
        assert pruning.chosen_counts(plan, factors, rank, rate)[tier] == keep[at:].sum()
        at = size


# ------------------------------------------------------------------------------------------------- a mask of one's own

OWN = ("method=fedshield", "method.prune=own")
EVERY_RATE = pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
BACKENDS = pytest.mark.parametrize("crypto", [IN_FLOAT64, ()], ids=["float64", "ckks"])


def sealed(run: Round, i: int, part: slice) -> Adapter:
    """What an update holds in some of its segments, decrypted, not weighted."""
    message, rank = run.messages[i], run.clients[i].rank
    counts, at, found = wire.counts(run.plan, wire.UPDATE, run.round, rank, message.contributors)[1], 0, []
    for count in counts:
        size = -(-count // run.session.public.slots) * run.session.public.block_bytes
        found.append(run.secret.decrypt(message.secret[at : at + size], count))
        at += size
    assert at == len(message.secret) and message.clear == message.mask == b""
    values = np.concatenate(found[part]) / (run.samples[i] / run.total)
    return join(values, run.plan, ("a", "b"), blank(run.clients[i]))


@BACKENDS
@EVERY_RATE
def test_of_each_tensor_exactly_the_rate_is_sealed_as_zeros_and_all_values_travel(
    rate: float, crypto: tuple[str, ...]
) -> None:
    run, whole = Round([*OWN, *constant(rate), *crypto], 1), Round([*OWN, *crypto], 1)
    for i, (client, one, other) in enumerate(zip(run.clients, run.sent, whole.sent, strict=True)):
        assert len(one) == len(other)  # zeros are encrypted like any value
        found = sealed(run, i, slice(None))
        for layer in LAYERS:
            for factor in ("a", "b"):
                got, own = rows(found, layer.name, factor), rows(client, layer.name, factor)
                keep = largest(own, run.plan.tiers, rate)
                for low, high in ((a, b) for a, b in ((0, 2), (2, 4), (4, 8)) if b <= client.rank):
                    assert (~keep[low:high]).sum() == round(rate * own[low:high].size)
                assert np.abs(got - np.where(keep, own, 0)).max() <= (1e-12 if crypto else 1e-5)
        assert all(np.abs(h - client.heads[n]).max() <= (1e-12 if crypto else 1e-5) for n, h in found.heads.items())


@BACKENDS
@EVERY_RATE
@pytest.mark.parametrize("who", ["all", "kept"])
@pytest.mark.parametrize("absent", [0, 74], ids=["all reply", "one asked does not reply"])
def test_the_mean_is_the_oracles_over_all_or_over_those_that_kept_the_entry(
    who: str, rate: float, crypto: tuple[str, ...], absent: int
) -> None:
    run = Round([*OWN, *constant(rate), f"method.prune_mean={who}", *crypto], 1, absent=absent)
    noise = run.session.public.error_bound(len(RANKS), 1.5)
    # kept: values and weights both have noise, and the mean may be of the lightest client alone
    bound = 1e-12 if crypto else 2.5 * noise / (min(SAMPLES) / run.total) if who == "kept" else run.bound(7)
    errors = []
    for got in run.received:
        for layer in LAYERS:
            for factor in ("a", "b"):
                found = rows(got, layer.name, factor)
                expected = mean_of_kept(run.clients, SAMPLES, layer.name, factor, (2, 4, 8), rate, who)[: got.rank]
                errors.append(np.abs(found - expected).max())
                if who == "kept" and rate > 0.5:
                    assert (expected == 0).sum() > 10 and (found[expected == 0] == 0).all()  # that nobody kept
        errors += [np.abs(h - mean_head(run.clients, SAMPLES, name)).max() for name, h in got.heads.items()]
    print(f"{who}, rate {rate}: error {max(errors):.2e}, bound {bound:.2e}")
    assert max(errors) <= bound
    assert crypto or max(errors) > bound / 1000  # not vacuous


def test_the_weights_of_what_was_kept_travel_beside_it_only_while_there_is_pruning() -> None:
    """Where nobody prunes, the mean over those that kept an entry is the mean over all: nothing more travels."""
    words = (
        *OWN,
        "method.prune_mean=kept",
        "method.prune_schedule=fixed",
        "method.prune_from=1",
        "method.prune_until=9",
    )
    first, later, plain = Round(words, 0), Round(words, 1), Round([*OWN, "method.prune=none"], 1)
    assert [len(m.secret) for m in first.messages] == [len(m.secret) for m in plain.messages]
    assert [len(m.secret) for m in later.messages] == [2 * len(m.secret) for m in plain.messages]
    for i, client in enumerate(later.clients):
        weights = sealed(later, i, slice(1, None, 2))
        for layer in LAYERS:
            keep = largest(rows(client, layer.name, "a"), later.plan.tiers, 0.2)
            assert np.abs(rows(weights, layer.name, "a") - keep).max() < 1e-5


def test_an_entry_that_only_a_client_of_tiny_weight_kept_is_too_imprecise_to_be_released() -> None:
    """As where all entries count: a mean of which noise could be more than 0.001 is no mean."""
    noise = Round([*OWN, *constant(0.5)], 1).session.public.error_bound(2, 1.0)
    assert noise / (5 / 10_000_005) > 1e-3
    with pytest.raises(TooFewError, match="too little for a precise mean"):
        Round([*OWN, *constant(0.5), "method.prune_mean=kept"], 1, ranks=(2, 2), samples=(5, 10_000_000))
