"""The baselines from seal to unseal, each against the formula of its paper in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ciphertune import merging
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.errors import FormatError, RangeError, SettingsError, StateError
from ciphertune.ranks import LARGEST_NORM, norm_weight
from ciphertune.settings import compose
from tests.baseline_cases import (
    CONF,
    CONTRIBUTOR,
    DIGEST,
    HEADER,
    HEADS,
    LAYERS,
    RANKS,
    SAMPLES,
    Round,
    dense,
    dense_norm,
    error,
    with_scale,
)
from tests.oracle import Matrix, adapter_of, blank, cohort, forge, mean_factor, mean_head, plan_of, read, true_update

ABSENT = pytest.mark.parametrize("absent", [0, 1], ids=["all reply", "one asked does not reply"])


def heads_are_the_mean(got: Adapter, clients: Sequence[Adapter], samples: Sequence[float]) -> None:
    for head in HEADS:
        assert error(got.heads[head.name], mean_head(clients, samples, head.name)) <= 1e-12


def truth(run: Round, layer: str) -> Matrix:
    return true_update(run.clients, run.samples, layer)


# -------------------------------------------------------------------------------------------------------------- local


@pytest.mark.parametrize("round_", [0, 1, 2])
def test_local_message_is_the_header_alone_whatever_was_learned(round_: int) -> None:
    one = Round("method=local", round_=round_)
    others = [adapter_of(one.plan, rank, 100 + rank) for rank in RANKS]
    two = Round("method=local", round_=round_, clients=others)
    assert one.sent == two.sent  # the same bytes, so they hold nothing of the adapter
    assert [len(data) for data in one.sent] == [HEADER + CONTRIBUTOR + DIGEST] * 4
    assert all((m.factors, m.clear, m.secret, m.mask) == ((), b"", b"", b"") for m in one.messages)
    assert (one.released.clear, one.released.secret, one.released.mask) == (b"", b"", b"")


def test_local_aggregate_changes_nothing_at_a_client() -> None:
    run = Round("method=local")
    for client in run.clients:
        got = run.received(client)
        for name, factors in client.layers.items():
            assert np.array_equal(got.layers[name].a, factors.a) and np.array_equal(got.layers[name].b, factors.b)
        assert all(np.array_equal(got.heads[h], values) for h, values in client.heads.items())


# ----------------------------------------------------------------------------------------------------------- one factor


@ABSENT
@pytest.mark.parametrize(
    ("method", "round_", "travels"),
    [("ffa_lora", r, "b") for r in range(3)] + [("rolora", r, "bab"[r]) for r in range(3)],
)
def test_one_factor_and_the_heads_travel_and_are_averaged_and_the_other_stays(
    method: str, round_: int, travels: str, absent: int
) -> None:
    run = Round(f"method={method}", round_=round_, absent=absent)
    stays = "a" if travels == "b" else "b"
    width = sum(x.m if travels == "b" else x.n for x in LAYERS)
    for client, message in zip(run.clients, run.messages, strict=True):
        assert (message.factors, message.secret) == ((travels,), b"")
        assert len(message.clear) == 8 * (21 + client.rank * width)
        got = run.received(client)
        heads_are_the_mean(got, run.clients, SAMPLES)
        for name, factors in got.layers.items():
            assert np.array_equal(getattr(factors, stays), getattr(client.layers[name], stays))
            rows = factors.a if travels == "a" else factors.b.T
            assert error(rows, mean_factor(run.clients, SAMPLES, name, travels, "nested")[: client.rank]) <= 1e-12


@pytest.mark.parametrize(("method", "round_"), [("ffa_lora", 0), ("ffa_lora", 1), ("rolora", 0), ("rolora", 1)])
def test_with_equal_ranks_the_mean_of_one_factor_is_the_true_update(method: str, round_: int) -> None:
    run = Round(f"method={method}", ranks=(4, 4, 4), samples=(1, 20, 3), round_=round_)
    for name, factors in run.received(run.clients[0]).layers.items():
        assert error(dense(factors), truth(run, name)) <= 1e-12


# ------------------------------------------------------------------------------------------------------------- hetlora


@pytest.mark.parametrize("scale", [0.25, 2.0])
@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_norm_weight_is_the_frobenius_norm_of_the_dense_update(rank: int, scale: float) -> None:
    for seed in range(3):
        adapter = with_scale(adapter_of(plan_of(layers=LAYERS, heads=HEADS, tiers=(16,)), rank, seed), scale)
        assert norm_weight(adapter) == pytest.approx(1e6 * dense_norm(adapter), rel=1e-6)


def test_norm_weight_depends_on_the_update_and_not_on_how_it_is_factored() -> None:
    plan = plan_of(tiers=(16,))
    one = adapter_of(plan, 4, 0)
    split = {
        n: LoraFactors(np.concatenate([f.a, f.a]), np.concatenate([f.b * 0.25, f.b * 0.75], axis=1), f.scale)
        for n, f in one.layers.items()
    }
    assert norm_weight(Adapter(split, one.heads)) == pytest.approx(norm_weight(one), abs=1)
    turned = {n: LoraFactors(f.a * 8, f.b / 8, f.scale) for n, f in one.layers.items()}
    assert norm_weight(Adapter(turned, {})) == pytest.approx(norm_weight(one), abs=1)


@pytest.mark.parametrize(("times", "expected"), [(0.0, 1), (1e-12, 1), (1e9, LARGEST_NORM)])
def test_norm_weight_stays_between_1_and_its_limit(times: float, expected: int) -> None:
    one = adapter_of(plan_of(tiers=(4,)), 4, 0)
    layers = {n: LoraFactors(f.a, f.b * times, f.scale) for n, f in one.layers.items()}
    assert norm_weight(Adapter(layers, {})) == expected


def test_norm_weight_of_an_update_that_diverged_is_no_crash() -> None:
    one = adapter_of(plan_of(tiers=(1,)), 1, 0)
    layers = {n: LoraFactors(f.a, np.full_like(f.b, np.inf), f.scale) for n, f in one.layers.items()}
    with pytest.raises(RangeError, match="lower training"):
        norm_weight(Adapter(layers, {}))


def by_norm(ranks: Sequence[int] = RANKS) -> tuple[list[Adapter], list[int]]:
    """Clients whose updates differ in size by factors of 3, and their weights from the dense matrices."""
    plan = Round("method=hetlora").plan
    clients = []
    for i, client in enumerate(cohort(plan, ranks, 0, seed=5)):
        layers = {n: LoraFactors(f.a, f.b * 3.0 ** (i - 2), f.scale) for n, f in client.layers.items()}
        clients.append(Adapter(layers, client.heads))
    return clients, [round(1e6 * dense_norm(c)) for c in clients]


@ABSENT
def test_hetlora_is_the_zero_padded_mean_weighted_by_the_norms_of_the_updates(absent: int) -> None:
    clients, weights = by_norm()
    run = Round("method=hetlora", clients=clients, samples=weights, absent=absent)
    for client in clients:
        got = run.received(client)
        heads_are_the_mean(got, clients, weights)
        for name, factors in got.layers.items():
            for travels, rows in (("a", factors.a), ("b", factors.b.T)):
                assert error(rows, mean_factor(clients, weights, name, travels, "pad")[: client.rank]) <= 1e-12
    by_samples = mean_factor(clients, SAMPLES, "block.q", "a", "pad")
    assert error(run.received(clients[3]).layers["block.q"].a, by_samples) > 0.1


def test_hetlora_counts_a_component_that_a_client_lacks_as_zero() -> None:
    clients, weights = by_norm((2, 8, 8))
    run = Round("method=hetlora", ranks=(2, 8, 8), clients=clients, samples=weights)
    got, shares = run.received(clients[1]).layers["block.q"], np.array(weights) / sum(weights)
    assert 0.01 < shares[0] < 0.5
    one, two = (c.layers["block.q"] for c in clients[1:])
    assert error(got.a[2:], shares[1] * one.a[2:] + shares[2] * two.a[2:]) <= 1e-12
    assert error(got.b[:, 2:], shares[1] * one.b[:, 2:] + shares[2] * two.b[:, 2:]) <= 1e-12


def test_hetlora_weights_are_taken_from_the_messages_and_not_known_before() -> None:
    clients, weights = by_norm()
    run = Round("method=hetlora", clients=clients, samples=weights)
    assert [c.samples for c in run.released.contributors] == weights
    assert len(set(weights)) == 4 and {who.samples for who in run.who} == {LARGEST_NORM}
    assert run.released.total == 4 * LARGEST_NORM


@pytest.mark.parametrize(("samples", "accepted"), [(LARGEST_NORM, True), (LARGEST_NORM + 1, False)])
def test_hetlora_weight_above_the_limit_is_refused(samples: int, accepted: bool) -> None:
    run = Round("method=hetlora", samples=by_norm()[1])
    data, sum_ = run.seal(0, samples), run.empty()
    if accepted:
        assert sum_.add(data, sender=1, who=run.who[0]).contributors[0].samples == samples
        return
    with pytest.raises(FormatError, match=r"weighted by 1000000001, the most is 1000000000"):
        sum_.add(data, sender=1, who=run.who[0])
    assert sum_.contributors == 0


@pytest.mark.parametrize("stated", [0, 1])
def test_hetlora_weight_that_the_values_do_not_have_is_refused(stated: int) -> None:
    """Values of a large weight under a small one would pull the mean beyond the bound."""
    run = Round("method=hetlora", samples=by_norm()[1])
    data, sum_ = forge(run.seal(0, LARGEST_NORM), contributor_samples=stated), run.empty()
    assert read(data, "contributor samples") == stated
    with pytest.raises(FormatError, match=r"no samples|times the client's weight"):
        sum_.add(data, sender=1, who=run.who[0])
    assert sum_.contributors == 0


# --------------------------------------------------------------------------------------------------------------- flora


@ABSENT
@pytest.mark.parametrize("scales", [(), (8.0, 4.0, 2.0, 2.0)], ids=["one scale", "own scales"])
def test_flora_merges_exactly_the_true_update_at_unequal_ranks(scales: tuple[float, ...], absent: int) -> None:
    run = Round("method=flora", scales=scales, absent=absent)
    for client in run.clients:
        got = run.received(client)
        assert got.rank == sum(RANKS)  # nothing is cut, whatever the client's own rank
        heads_are_the_mean(got, run.clients, SAMPLES)
        for name, factors in got.layers.items():
            assert error(dense(factors), truth(run, name)) <= 1e-12


def test_flora_merges_the_same_whatever_the_ranks_that_the_updates_are_factored_in() -> None:
    one = Round("method=flora", ranks=(1, 2, 4), samples=(3, 2, 5))
    wider = []
    for client in one.clients:
        layers = {
            n: LoraFactors(np.concatenate([f.a * 2, f.a]), np.concatenate([f.b / 4, f.b / 2], axis=1), f.scale)
            for n, f in client.layers.items()
        }
        wider.append(Adapter(layers, client.heads))
    two = Round("method=flora", ranks=(2, 4, 8), samples=(3, 2, 5), clients=wider)
    for name, factors in two.received(wider[0]).layers.items():
        assert factors.rank == 14
        assert error(dense(factors), truth(one, name)) <= 1e-12


def test_flora_sends_both_factors_of_every_component_in_the_clear() -> None:
    run = Round("method=flora")
    for client, message in zip(run.clients, run.messages, strict=True):
        assert len(message.clear) == 8 * client.rank * sum(x.m + x.n for x in LAYERS)
        assert len(message.secret) == 8 * 21 and not run.session.public.encrypts
    assert len(run.released.clear) == 8 * sum(RANKS) * sum(x.m + x.n for x in LAYERS)


def test_flora_sum_of_three_rounds_is_exact_in_float32_and_no_round_counts_twice(tmp_path: Path) -> None:
    runs = [Round("method=flora", round_=k) for k in range(3)]
    expected = {x.name: np.zeros((x.m, x.n)) for x in LAYERS}
    for k, run in enumerate(runs):
        got = run.received(run.clients[0])
        for _ in range(2):  # the process ended after the sum was written and before its own state was: all comes again
            merging.merge(tmp_path, 7, k, got)
        for x in LAYERS:
            expected[x.name] += truth(run, x.name)
    merging.merge(tmp_path, 7, 0, runs[0].received(runs[0].clients[0]))  # and from the first round on
    found = merging.merged(tmp_path, 7)
    assert {str(w.dtype) for w in found.values()} == {"float32"} and set(found) == set(expected)
    for name, total in expected.items():
        assert error(found[name], total) <= 1e-6
    assert merging.merged(tmp_path, 8) == {}  # another run's


def test_flora_sum_that_is_damaged_is_refused_and_not_started_anew(tmp_path: Path) -> None:
    run = Round("method=flora")
    merging.merge(tmp_path, 7, 0, run.received(run.clients[0]))
    (path,) = (tmp_path / "state").iterdir()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StateError, match="cannot be read back"):
        merging.merged(tmp_path, 7)
    with pytest.raises(StateError, match="cannot be read back"):
        merging.merge(tmp_path, 7, 1, run.received(run.clients[0]))


# -------------------------------------------------------------------------------------------------------- drop_columns

UNCUT = "method.rank_cap=22"  # the sum of RANKS
BUDGETS = pytest.mark.parametrize(
    "budgets", [(0.2,) * 4, (0.0, 0.1, 0.1, 0.4), (0.05, 0.3, 0.3, 1.0)], ids=["equal", "unequal", "all of one"]
)


def without_dropped(run: Round) -> list[Adapter]:
    """The clients with the columns that each hides set to zero in A."""
    out = []
    for k, client in enumerate(run.clients):
        layers = {}
        for i, x in enumerate(LAYERS):
            f = client.layers[x.name]
            layers[x.name] = LoraFactors(np.where(np.isin(np.arange(x.n), run.dropped(i, k)), 0.0, f.a), f.b, f.scale)
        out.append(Adapter(layers, client.heads))
    return out


@ABSENT
@BUDGETS
def test_drop_columns_is_the_true_update_of_factors_whose_dropped_columns_are_zero(
    budgets: tuple[float, ...], absent: int
) -> None:
    run = Round("method=drop_columns", UNCUT, budgets=budgets, absent=absent)
    zeroed, roomy = without_dropped(run), blank(adapter_of(run.plan, 22, 0))
    got = run.received(with_scale(roomy, run.plan.scale))
    heads_are_the_mean(got, run.clients, SAMPLES)
    for name, factors in got.layers.items():
        expected = true_update(zeroed, SAMPLES, name)
        assert error(dense(factors), expected) <= 1e-10
        assert error(truth(run, name), expected) > 0.01  # not what nobody drops


def test_drop_columns_column_dropped_by_all_is_zero_and_by_some_is_the_sum_over_the_others() -> None:
    run = Round("method=drop_columns", UNCUT, budgets=(0.1, 0.1, 0.3, 0.3))
    got = run.received(blank(adapter_of(run.plan, 22, 0)))
    for i, x in enumerate(LAYERS):
        by_all, by_two = set(run.dropped(i, 0)), set(run.dropped(i, 2)) - set(run.dropped(i, 0))
        assert len(by_all) == round(0.1 * x.n) and len(by_two) == round(0.2 * x.n)
        update, shares = dense(got.layers[x.name]), np.array(SAMPLES) / sum(SAMPLES)
        assert np.abs(update[:, sorted(by_all)]).max() <= 1e-10
        for j in by_two:
            parts = [s * dense(c.layers[x.name])[:, j] for s, c in zip(shares[:2], run.clients[:2], strict=True)]
            assert error(update[:, j], sum(parts)) <= 1e-9  # divided by the weight of all: dropped counts as zero


def test_drop_columns_message_is_flexloras_less_the_dropped_columns() -> None:
    budgets = (0.0, 0.1, 0.3, 1.0)
    drop, flex = Round("method=drop_columns", budgets=budgets), Round("method=flexlora")
    for k, (one, two) in enumerate(zip(drop.sent, flex.sent, strict=True)):
        columns = sum(round(budgets[k] * x.n) for x in LAYERS)
        assert len(two) - len(one) == 8 * RANKS[k] * columns
    assert len(drop.released.clear) == len(flex.released.clear)  # what comes back holds every column


def test_drop_columns_values_of_dropped_columns_do_not_reach_the_message() -> None:
    one = Round("method=drop_columns", budgets=(0.1, 0.1, 0.3, 0.3))
    changed = []
    for k, client in enumerate(one.clients):
        layers = {}
        for i, x in enumerate(LAYERS):
            f = client.layers[x.name]
            layers[x.name] = LoraFactors(np.where(np.isin(np.arange(x.n), one.dropped(i, k)), 0.5, f.a), f.b, f.scale)
        changed.append(Adapter(layers, client.heads))
    two = Round("method=drop_columns", budgets=(0.1, 0.1, 0.3, 0.3), clients=changed)
    assert one.sent == two.sent


@pytest.mark.parametrize(
    "method", ["local", "ffa_lora", "rolora", "hetlora", "flora", "dp_lora", "drop_columns", "flexlora", "fedavg"]
)
def test_a_method_that_sends_in_the_clear_refuses_encryption_instead_of_pretending(method: str) -> None:
    with pytest.raises(SettingsError, match=f"method={method} sends everything in the clear: use crypto=clear"):
        compose(CONF, [f"method={method}", "crypto=ckks"])
