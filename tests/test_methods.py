"""Every method of conf/method that sums the factors apart, from seal to unseal, against the formula that defines it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from ciphertune import build
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.ranks import damped
from ciphertune.settings import compose
from tests.oracle import Matrix, adapter_of, cohort, mean_component_update, mean_factor, true_update
from tests.separate_cases import CONF, HEADS, IN_FLOAT64, LAYERS, RANKS, SAMPLES, Round, gap


@dataclass(frozen=True)
class Definition:
    """What a method is: which factors travel in rounds 0 and 1, whether encrypted, how components are averaged.

    weights: by training samples, or by the norm of each client's own update.
    """

    travels: tuple[tuple[str, ...], tuple[str, ...]]
    encrypted: bool
    fit_rank: str
    weights: str = "samples"


BOTH = (("a", "b"), ("a", "b"))
METHODS = {
    "dp_lora": Definition(BOTH, False, "nested"),  # of what clients send; clipping and noise: test_privacy.py
    "fedavg": Definition(BOTH, False, "nested"),
    "fedshield": Definition(BOTH, True, "nested"),  # not pruned yet; later rounds: test_pruning.py
    "ffa_lora": Definition((("b",), ("b",)), False, "nested"),
    "full_he": Definition(BOTH, True, "nested"),
    "hetlora": Definition(BOTH, False, "pad", "norm"),
    "local": Definition(((), ()), False, "nested"),
    "maskcrypt": Definition(BOTH, True, "nested"),  # what is encrypted from round 1 on: test_maskcrypt.py
    "rolora": Definition((("b",), ("a",)), False, "nested"),
    "sealed": Definition((("b",), ("a",)), True, "nested"),
}
# whole products: test_she_lora.py; without some columns: test_baselines.py
OTHERS = {"flexlora": "product", "she_lora": "product", "drop_columns": "product", "flora": "stack"}
RULES = {p.stem: compose(CONF, [f"method={p.stem}"]).method.aggregate for p in (CONF / "method").glob("*.yaml")}
FILES = sorted(name for name, rule in RULES.items() if rule == "separate")
EVERY = pytest.mark.parametrize("method", FILES)
SHARING = pytest.mark.parametrize("method", [name for name in FILES if name != "local"])  # which averages nothing
ROUNDS = pytest.mark.parametrize("round_", [0, 1])


def product(adapter: Adapter, layer: str) -> Matrix:
    factors = adapter.layers[layer]
    return factors.scale * np.einsum("mk,kn->mn", factors.b, factors.a)


# ------------------------------------------------------------------------------------------------------ every method


def test_every_method_file_is_defined_here_and_every_definition_has_a_file() -> None:
    assert set(FILES) == set(METHODS)


def test_every_other_method_file_sums_or_stacks_products() -> None:
    assert {name: rule for name, rule in RULES.items() if rule != "separate"} == OTHERS


@pytest.mark.parametrize("method", FILES)
def test_every_definition_is_weighted_and_fitted_as_its_file_says(method: str) -> None:
    settings = compose(CONF, [f"method={method}"]).method
    assert (settings.weighting, settings.fit_rank) == (METHODS[method].weights, METHODS[method].fit_rank)


@pytest.mark.parametrize("absent", [0, 74], ids=["all reply", "one asked does not reply"])
@ROUNDS
@SHARING
def test_method_is_its_formula_in_float64(method: str, round_: int, absent: int) -> None:
    definition = METHODS[method]
    run = Round([f"method={method}", *IN_FLOAT64], round_, absent=absent)
    for error, _, size in run.errors(definition.fit_rank, definition.travels[round_]):
        assert error <= 1e-12 * size


@pytest.mark.parametrize("absent", [0, 74], ids=["all reply", "one asked does not reply"])
@ROUNDS
@SHARING
def test_method_is_its_formula_under_its_own_encryption_within_the_computed_bound(
    method: str, round_: int, absent: int
) -> None:
    definition = METHODS[method]
    run = Round([f"method={method}"], round_, absent=absent)
    errors = run.errors(definition.fit_rank, definition.travels[round_])
    error, bound, _ = max(errors, key=lambda x: x[0] / x[1])
    print(f"{method}, round {round_}: error {error:.2e}, bound {bound:.2e}, {run.settings.crypto.backend}")
    assert all(e <= b for e, b, _ in errors)
    assert error > bound / 1000  # not vacuous


@ROUNDS
@EVERY
def test_only_the_defined_factors_travel_and_the_others_stay_the_clients_own(method: str, round_: int) -> None:
    travels = METHODS[method].travels[round_]
    run = Round([f"method={method}"], round_)
    for sent, got in zip(run.clients, run.received, strict=True):
        for name, factors in got.layers.items():
            for factor in ("a", "b"):
                same = np.array_equal(getattr(factors, factor), getattr(sent.layers[name], factor))
                assert same == (factor not in travels)
        # heads in every round, unless nothing is shared
        assert all((head != sent.heads[name]).any() == bool(travels) for name, head in got.heads.items())


@pytest.mark.parametrize(("method", "round_"), [(m, r) for m in FILES for r in (0, 1) if (m, r) != ("maskcrypt", 1)])
def test_what_travels_is_encrypted_whole_or_not_at_all(method: str, round_: int) -> None:
    definition = METHODS[method]
    run = Round([f"method={method}"], round_)
    assert run.session.public.encrypts == definition.encrypted
    per_component = sum({"a": x.n, "b": x.m}[f] for x in LAYERS for f in definition.travels[round_])
    for client, message in zip(run.clients, run.messages, strict=True):
        values = 21 + client.rank * per_component if definition.travels[round_] else 0
        if definition.encrypted:
            assert message.clear == b""
            tiers = [0, *(t for t in run.plan.tiers if t <= client.rank)]
            segments = [(b - a) * per_component + (21 if a == 0 else 0) for a, b in pairwise(tiers)]
            assert sum(segments) == values
            blocks = sum(-(-s // run.session.public.slots) for s in segments)
            assert len(message.secret) == blocks * run.session.public.block_bytes
        else:
            assert message.secret == b""
            assert len(message.clear) == 4 * values


@ROUNDS
@SHARING
def test_clients_of_every_rank_end_with_the_same_components(method: str, round_: int) -> None:
    """A lower rank holds the first components of a higher one, bit by bit, so that the next round starts equal."""
    run = Round([f"method={method}"], round_)
    highest = run.received[-1]
    for got in run.received:
        for name, factors in got.layers.items():
            assert np.array_equal(factors.a, highest.layers[name].a[: got.rank])
            assert np.array_equal(factors.b, highest.layers[name].b[:, : got.rank])
        assert all(np.array_equal(head, highest.heads[name]) for name, head in got.heads.items())


# ------------------------------------------------------------------------------- sealed: the sum of factors is the sum

SEALED_CRYPTO = pytest.mark.parametrize("crypto", [IN_FLOAT64, ()], ids=["float64", "packed"])


def tolerance(run: Round, layer: str, shared: str, components: Sequence[int]) -> float:
    """Of a sum over components of one factor's error times the shared other factor."""
    if not run.session.public.encrypts:
        return 1e-12
    factors = max(run.clients, key=lambda c: c.rank).layers[layer]
    rows = factors.a if shared == "a" else factors.b.T
    return factors.scale * sum(run.bound(k) * float(np.abs(rows[k]).max()) for k in components)


@SEALED_CRYPTO
@ROUNDS
def test_sealed_components_are_the_mean_updates_of_the_clients_that_have_them(
    round_: int, crypto: tuple[str, ...]
) -> None:
    run = Round(["method=sealed", *crypto], round_)
    shared = "a" if round_ == 0 else "b"
    for got in run.received:
        for name, factors in got.layers.items():
            for k in range(got.rank):
                found = factors.scale * np.outer(factors.b[:, k], factors.a[k])
                expected = mean_component_update(run.clients, run.samples, name, k)
                assert gap(found, expected) <= tolerance(run, name, shared, [k])


@SEALED_CRYPTO
@ROUNDS
def test_sealed_with_equal_ranks_is_exactly_the_true_update(round_: int, crypto: tuple[str, ...]) -> None:
    run = Round(["method=sealed", *crypto], round_, ranks=(8, 8, 8, 8))
    for got in run.received:
        for layer in LAYERS:
            error = gap(product(got, layer.name), true_update(run.clients, run.samples, layer.name))
            assert error <= tolerance(run, layer.name, "a" if round_ == 0 else "b", range(8))


@SEALED_CRYPTO
@ROUNDS
def test_sealed_with_padding_is_exactly_the_true_update_at_unequal_ranks_too(
    round_: int, crypto: tuple[str, ...]
) -> None:
    run = Round(["method=sealed", "method.fit_rank=pad", *crypto], round_)
    for layer in LAYERS:
        expected = true_update(run.clients, run.samples, layer.name)
        found = product(run.received[-1], layer.name)  # of rank 8; lower ranks hold its first components
        assert gap(found, expected) <= tolerance(run, layer.name, "a" if round_ == 0 else "b", range(8))
        assert gap(product(run.received[0], layer.name), expected) > 1e-3


@SEALED_CRYPTO
@ROUNDS
def test_sealed_is_exactly_the_true_update_at_unequal_ranks_where_all_answer(
    round_: int, crypto: tuple[str, ...]
) -> None:
    """Of the whole adapters: each client's own components, and beyond them those that all hold."""
    plan = Round(["method=sealed", *IN_FLOAT64], round_).plan
    base, clients = adapter_of(plan, 8, round_), cohort(plan, RANKS, round_, seed=round_)
    reach = [sum(n for r, n in zip(RANKS, SAMPLES, strict=True) if r >= t) / sum(SAMPLES) for t in plan.tiers]
    update = [damped(client, base, plan.tiers, reach) for client in clients]
    run = Round(["method=sealed", *crypto], round_, clients=update)
    got, wholes = run.receive(base), []
    for client in clients:
        layers = {}
        for name, held in base.layers.items():
            own, a, b = client.layers[name], held.a.copy(), held.b.copy()
            a[: own.rank], b[:, : own.rank] = own.a, own.b
            layers[name] = LoraFactors(a, b, own.scale)
        wholes.append(Adapter(layers, client.heads))
    for layer in LAYERS:
        expected = true_update(wholes, run.samples, layer.name)
        assert gap(product(got, layer.name), expected) <= tolerance(
            run, layer.name, "a" if round_ == 0 else "b", range(8)
        )
        assert gap(product(got, layer.name), true_update(clients, run.samples, layer.name)) > 1e-3


@SEALED_CRYPTO
@ROUNDS
def test_b_only_sends_b_in_every_round_and_is_exactly_the_true_update(round_: int, crypto: tuple[str, ...]) -> None:
    run = Round(["method=sealed", "method.share=b_only", *crypto], round_, ranks=(4, 4, 4), samples=(1, 20, 3))
    assert run.plan.factors(round_) == ("b",)
    for got in run.received:
        for layer in LAYERS:
            error = gap(product(got, layer.name), true_update(run.clients, run.samples, layer.name))
            assert error <= tolerance(run, layer.name, "a", range(4))


@SEALED_CRYPTO
def test_sealed_rounds_in_a_row_share_what_the_round_before_gave(crypto: tuple[str, ...]) -> None:
    """Round 1 trains A on the B that every client was given in round 0, at its own rank; round 2 the other way."""
    run = Round(["method=sealed", *crypto], 0)
    for round_ in (1, 2):
        trained = []
        for i, got in enumerate(run.received):
            own = adapter_of(run.plan, got.rank, 100 * round_ + i)
            layers = {
                name: LoraFactors(
                    own.layers[name].a if round_ == 1 else f.a, own.layers[name].b if round_ == 2 else f.b, f.scale
                )
                for name, f in got.layers.items()
            }
            trained.append(Adapter(layers, own.heads))
        run = Round(["method=sealed", *crypto], round_, clients=trained)
        for got in run.received:
            for name, factors in got.layers.items():
                for k in range(got.rank):
                    found = factors.scale * np.outer(factors.b[:, k], factors.a[k])
                    expected = mean_component_update(trained, run.samples, name, k)
                    assert gap(found, expected) <= tolerance(run, name, "b" if round_ == 1 else "a", [k])


# --------------------------------------------------------------------- both factors apart: not the mean of the updates


@pytest.mark.parametrize("method", ["fedavg", "full_he"])
@pytest.mark.parametrize("ranks", [RANKS, (8, 8, 8, 8)], ids=["unequal", "equal"])
def test_averaging_both_factors_apart_is_not_the_true_update(method: str, ranks: tuple[int, ...]) -> None:
    """mean(B) mean(A) is not mean(B A): the error that the papers accept, and that alternating avoids."""
    for overrides in ((f"method={method}", *IN_FLOAT64), (f"method={method}",)):
        run = Round(overrides, 0, ranks=ranks)
        for layer in LAYERS:
            expected = true_update(run.clients, run.samples, layer.name)
            deviation = gap(product(run.received[-1], layer.name), expected)
            assert deviation > 1e-3
            assert deviation > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("method", ["fedavg", "full_he"])
def test_padding_counts_a_missing_component_as_zero_when_both_factors_are_averaged(method: str) -> None:
    run = Round([f"method={method}", "method.fit_rank=pad", *IN_FLOAT64], 0)
    for error, _, size in run.errors("pad", ("a", "b")):
        assert error <= 1e-12 * size


# ------------------------------------------------------------------------------------------------- the oracle itself


def test_oracle_agrees_with_matrix_products_and_with_hand_made_numbers() -> None:
    plan = build.make_plan(compose(CONF, ["method=fedavg"]), LAYERS, HEADS, (2, 8))
    clients = [adapter_of(plan, rank, rank) for rank in (2, 8)]
    expected = 0.25 * clients[0].layers["block.q"].delta() + 0.75 * clients[1].layers["block.q"].delta()
    assert true_update(clients, (10, 30), "block.q") == pytest.approx(expected, rel=1e-12, abs=1e-14)
    nested, pad = (mean_factor(clients, (10, 30), "block.q", "a", fit) for fit in ("nested", "pad"))
    one, two = (c.layers["block.q"].a for c in clients)
    assert nested[1] == pytest.approx(0.25 * one[1] + 0.75 * two[1], rel=1e-12)
    assert nested[5] == pytest.approx(two[5], rel=1e-12)
    assert pad[5] == pytest.approx(0.75 * two[5], rel=1e-12)
