"""Differential privacy: what is clipped, how much noise there is, and what epsilon that is, by independent formulas."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from ciphertune import exchange
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.errors import RangeError, SettingsError
from ciphertune.plan import HeadShape, LayerShape
from ciphertune.privacy import Spent, epsilon, noise_multiplier, protect
from ciphertune.settings import MethodSettings, compose
from tests.baseline_cases import CONF, noise_in_mean
from tests.oracle import Matrix, adapter_of, in_the_clear, plan_of

BOTH, DELTA = ("a", "b"), 1e-5


# ------------------------------------------------------------------------------------------------- independent formulas


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def exact_epsilon(mu: float, delta: float) -> float:
    """Of mu-Gaussian differential privacy (Dong, Roth and Su, arXiv 1905.02383, corollary 2.13), by bisection.

    Composed Gaussian mechanisms of sensitivity 1 and noise z_i are mu-GDP with mu^2 = sum 1/z_i^2 (corollary 3.3).
    """
    low, high = 0.0, mu**2 / 2 + 10 * mu + 10
    for _ in range(200):
        eps = (low + high) / 2
        found = normal_cdf(-eps / mu + mu / 2) - math.exp(eps) * normal_cdf(-eps / mu - mu / 2)
        low, high = (low, eps) if found <= delta else (eps, high)
    return high


def renyi_epsilon(mu: float, delta: float) -> float:
    """min over alpha of alpha mu^2 / 2 + log(1/delta) / (alpha - 1) (Mironov, arXiv 1702.07476, propositions 3, 7)."""
    orders = 1 + np.geomspace(1e-3, 1e5, 100_001)
    return float((orders * mu**2 / 2 - math.log(delta) / (orders - 1)).min())


@pytest.mark.parametrize(("mu", "eps"), [(1.0, 1.0), (0.5, 0.5), (4.0, 9.0)])
def test_the_exact_formula_agrees_with_the_overlap_of_two_normal_distributions(mu: float, eps: float) -> None:
    """delta is what of N(mu, 1) lies above e^eps times N(0, 1), here by adding it up."""
    x = np.linspace(-20, 20, 400_001)
    above = np.maximum(np.exp(-((x - mu) ** 2) / 2) - np.exp(eps - x**2 / 2), 0)
    delta = float(above.sum() * (x[1] - x[0]) / math.sqrt(2 * math.pi))
    assert exact_epsilon(mu, delta) == pytest.approx(eps, abs=1e-6)


# -------------------------------------------------------------------------------------------------------------- protect


class Silent:
    """A generator whose noise is zero, and that keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, float, tuple[int, ...]]] = []

    def normal(self, loc: float, scale: float, size: tuple[int, ...]) -> Matrix:
        self.asked.append((loc, scale, size))
        return np.zeros(size)


def pair(seed: int = 0) -> tuple[Adapter, Adapter]:
    plan = plan_of(tiers=(4,))
    return adapter_of(plan, 4, seed), adapter_of(plan, 4, seed + 1)


def change(of: Adapter, base: Adapter, factors: Sequence[str] = BOTH) -> Matrix:
    """Everything that travels, less the base's, in a row."""
    pieces = [getattr(f, x) - getattr(base.layers[n], x) for n, f in of.layers.items() for x in factors]
    return np.concatenate([np.ravel(p) for p in [*pieces, *(h - base.heads[n] for n, h in of.heads.items())]])


def silenced(update: Adapter, base: Adapter, factors: Sequence[str] = BOTH, clip: float = 1.0) -> Adapter:
    return protect(update, base, tuple(factors), 99, clip=clip, noise_multiplier=1.0, generator=Silent())  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", [1e-3, 0.5, 2.0])
@pytest.mark.parametrize("factors", [("a", "b"), ("a",), ("b",)], ids=["both", "a", "b"])
def test_a_larger_change_is_clipped_to_exactly_the_norm_over_factors_and_heads_together(
    factors: tuple[str, ...], clip: float
) -> None:
    update, base = pair()
    before, after = change(update, base, factors), change(silenced(update, base, factors, clip), base, factors)
    assert np.linalg.norm(before) > clip
    assert np.linalg.norm(after) == pytest.approx(clip, rel=1e-12)
    assert after == pytest.approx(before * clip / np.linalg.norm(before), rel=1e-9, abs=1e-15)  # one factor for all


def test_a_smaller_change_is_not_scaled_and_no_change_stays_none() -> None:
    update, base = pair()
    norm = float(np.linalg.norm(change(update, base)))
    assert change(silenced(update, base, clip=norm * 1.001), base) == pytest.approx(change(update, base), abs=1e-15)
    assert not change(silenced(base, base), base).any()


@pytest.mark.parametrize("factors", [("a",), ("b",), ()], ids=["a", "b", "heads alone"])
def test_what_does_not_travel_stays_the_bases_and_does_not_count(factors: tuple[str, ...]) -> None:
    update, base = pair()
    found = silenced(update, base, factors)
    for name, old in base.layers.items():
        for factor in {"a", "b"} - set(factors):
            assert np.array_equal(getattr(found.layers[name], factor), getattr(old, factor))
    loud = {n: LoraFactors(*(x if k in factors else x * 1e6 for k, x in (("a", f.a), ("b", f.b))), f.scale)
            for n, f in update.layers.items()}  # fmt: skip
    assert np.array_equal(change(silenced(Adapter(loud, update.heads), base, factors), base), change(found, base))


def test_noise_is_asked_for_every_entry_that_travels_at_the_multiplier_times_the_clipping_norm() -> None:
    update, base = pair()
    generator = Silent()
    protect(update, base, ("b",), 99, clip=0.5, noise_multiplier=3.0, generator=generator)  # type: ignore[arg-type]
    shapes = [f.b.shape for f in base.layers.values()] + [h.shape for h in base.heads.values()]
    assert generator.asked == [(0.0, 1.5, shape) for shape in shapes]


@pytest.mark.parametrize("size", [0.0, 1e-3, 100.0], ids=["no change", "small", "clipped"])
def test_noise_has_mean_0_and_the_standard_deviation_it_should_whatever_the_change(size: float) -> None:
    """In every tensor and over all 24,000 entries; the bounds are five standard errors, 2.3 % over all."""
    plan = plan_of(layers=(LayerShape("q", 300, 200), LayerShape("v", 400, 600)), heads=(HeadShape("h", (9, 99)),))
    base, other = (adapter_of(plan, 16, seed) for seed in (1, 2))
    layers = {
        n: LoraFactors(f.a + size * other.layers[n].a, f.b + size * other.layers[n].b, f.scale)
        for n, f in base.layers.items()
    }
    update = Adapter(layers, {n: h + size * other.heads[n] for n, h in base.heads.items()})
    clip, z = 0.7, 1.3
    generator = np.random.default_rng(5)
    found = protect(update, base, BOTH, 99, clip=clip, noise_multiplier=z, generator=generator)
    noise = change(found, base) - change(silenced(update, base, clip=clip), base)
    ends = np.cumsum([x.size for f in base.layers.values() for x in (f.a, f.b)])
    for part in (noise, *np.split(noise, ends)):
        assert abs(part.mean()) <= 5 * z * clip / math.sqrt(part.size)
        assert part.std() == pytest.approx(z * clip, rel=5 / math.sqrt(2 * part.size))
    assert noise.size > 24_000 and np.unique(noise).size == noise.size  # no value is used twice
    ordered, steps = np.sort(noise / (z * clip)), (np.arange(noise.size) + 0.5) / noise.size
    assert max(abs(normal_cdf(x) - s) for x, s in zip(ordered, steps, strict=True)) < 1.95 / math.sqrt(noise.size)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_diverged_is_refused_and_never_sent(value: float) -> None:
    update, base = pair()
    update.layers["block.q"].b[0, 0] = value
    session, secret = in_the_clear(plan_of(share="both", select="none", tiers=(4,)))
    with np.errstate(invalid="ignore"):
        found = silenced(update, base)
    with pytest.raises(RangeError, match="NaN or infinite"):
        exchange.seal(found, session, secret, round_=0, sender=1, samples=1, total=2)


# ------------------------------------------------------------------------------------------------------------- epsilon

# mu from 0.1 to 20
CASES = [(z, k) for z in (0.5, 1.0, 2.0, 10.0) for k in (1, 8, 100)]


@pytest.mark.parametrize("delta", [1e-5, 1e-8])
@pytest.mark.parametrize(("z", "k"), CASES)
def test_epsilon_lies_between_the_exact_value_and_the_textbook_bound_and_near_the_first(
    z: float, k: int, delta: float
) -> None:
    mu, found = math.sqrt(k) / z, epsilon([z] * k, delta)
    assert exact_epsilon(mu, delta) <= found <= renyi_epsilon(mu, delta)
    assert found <= 1.2 * exact_epsilon(mu, delta)


def test_epsilon_of_releases_of_unequal_noise_is_that_of_their_sum() -> None:
    zs = (0.8, 3.0, 1.5, 50.0)
    mu, found = math.sqrt(sum(z**-2 for z in zs)), epsilon(zs, DELTA)
    assert exact_epsilon(mu, DELTA) <= found <= min(renyi_epsilon(mu, DELTA), 1.2 * exact_epsilon(mu, DELTA))
    assert found == pytest.approx(epsilon([1 / mu], DELTA), rel=1e-9)


def test_epsilon_grows_with_rounds_and_falls_with_noise_and_is_0_for_nothing() -> None:
    by_rounds = [epsilon([1.0] * k, DELTA) for k in (0, 1, 2, 4, 8)]
    by_noise = [epsilon([z], DELTA) for z in (0.5, 1.0, 2.0, 4.0)]
    assert by_rounds[0] == 0 and all(a < b for a, b in pairwise(by_rounds))
    assert all(a > b > 0 for a, b in pairwise(by_noise))
    assert epsilon([1.0], 1e-8) > epsilon([1.0], 1e-5)


# -------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("rounds_", [1, 8, 200])
@pytest.mark.parametrize("target", [0.5, 2.0, 8.0, 50.0])
def test_a_target_is_kept_and_no_noise_is_wasted(target: float, rounds_: int) -> None:
    z = noise_multiplier(MethodSettings(noise="gaussian", epsilon=target), rounds_)
    assert exact_epsilon(math.sqrt(rounds_) / z, DELTA) <= epsilon([z] * rounds_, DELTA) <= target
    assert epsilon([0.98 * z] * rounds_, DELTA) > target


def test_without_a_target_the_multiplier_is_the_one_that_was_set() -> None:
    assert noise_multiplier(MethodSettings(noise="gaussian", noise_multiplier=0.7), 8) == 0.7


def test_a_target_that_cannot_be_reached_is_refused_before_anything_runs_in_one_line() -> None:
    with pytest.raises(SettingsError, match=r"method.epsilon=0.001 cannot be reached in 8 rounds") as caught:
        compose(CONF, "method=dp_lora method.epsilon=0.001 federation.rounds=8")
    assert "\n" not in str(caught.value) and "federation.rounds" in str(caught.value)
    assert compose(CONF, "method=dp_lora method.epsilon=1 method.clip=0.1 federation.rounds=8").method.epsilon == 1


@pytest.mark.parametrize("method", ["flexlora", "she_lora", "flora", "drop_columns"])
def test_noise_on_products_and_stacks_is_refused_because_their_sensitivity_is_another(method: str) -> None:
    with pytest.raises(SettingsError, match=r"method.noise=gaussian with method.aggregate=\w+: want separate"):
        compose(CONF, f"method={method} method.noise=gaussian")


@pytest.mark.parametrize("noise", ["method.noise_multiplier=100", "method.epsilon=0.1"])
def test_noise_above_the_bound_of_what_may_travel_is_refused_before_anything_runs(noise: str) -> None:
    """Of a thousand entries the largest has more than three standard deviations: here 300 and 144, the bound is 64."""
    with pytest.raises(SettingsError, match=r"crypto\.bound"):
        compose(CONF, f"method=dp_lora {noise} federation.rounds=2")


WITHOUT = "method.noise=gaussian needs an accountant: pip install 'ciphertune[dp]'"


def test_a_missing_accountant_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    for call in (
        lambda: epsilon([1.0], DELTA),
        lambda: noise_multiplier(MethodSettings(epsilon=8.0), 8),
        lambda: compose(CONF, "method=dp_lora method.epsilon=8"),
    ):
        with pytest.raises(SettingsError) as caught:
            call()
        assert str(caught.value) == WITHOUT
    assert compose(CONF, "method=fedavg").method.noise == "none"


def test_a_missing_accountant_is_found_before_anything_runs_without_a_target_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(SettingsError, match=re.escape(WITHOUT)):
        compose(CONF, "method=dp_lora")


# ---------------------------------------------------------------------------------------------------------------- Spent


def counted(spent: Spent, weights: dict[str, float], round_: int = 0) -> dict[str, dict[str, float]]:
    """One round of clients of one rank."""
    for name in weights:
        spent.asked(name, round_)
    spent.released({name: (w, 4) for name, w in weights.items()})
    return spent.report()


def test_the_servers_view_counts_each_clients_own_rounds_only() -> None:
    spent, both = Spent(0.9, DELTA), {"a": 0.5, "b": 0.5}
    seen = [counted(spent, w, k) for k, w in enumerate((both, {"a": 0.4, "c": 0.6}, both))]
    for found, counts in zip(seen, ({"a": 1, "b": 1}, {"a": 2, "b": 1, "c": 1}, {"a": 3, "b": 2, "c": 1}), strict=True):
        assert {n: v["server"] for n, v in found.items()} == {n: epsilon([0.9] * k, DELTA) for n, k in counts.items()}


def test_another_clients_view_is_by_the_noise_of_all_but_the_worst_observer() -> None:
    spent, weights = Spent(0.9, DELTA), {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}
    for k in (1, 2):
        found = counted(spent, weights, k)
        for name in weights:
            assert found[name]["client"] == pytest.approx(
                epsilon([noise_in_mean(0.9, weights, name)] * k, DELTA), rel=1e-9
            )
    assert found["a"]["client"] > found["b"]["client"] > found["d"]["client"]


def test_another_client_learns_less_the_more_contribute_and_with_two_as_much_as_the_server() -> None:
    found = [counted(Spent(1.0, DELTA), {f"c{i}": 1 / n for i in range(n)})["c0"] for n in (2, 3, 5, 20)]
    assert found[0]["client"] == pytest.approx(found[0]["server"], rel=1e-12)  # it takes its own noise out
    assert 0 < found[0]["client"] < math.inf
    assert all(a["client"] > b["client"] for a, b in pairwise(found))
    assert len({v["server"] for v in found}) == 1


def test_a_round_without_a_client_costs_it_nothing_in_either_view() -> None:
    spent = Spent(1.0, DELTA)
    before = counted(spent, {"a": 0.3, "b": 0.3, "c": 0.4})["c"]
    assert counted(spent, {"a": 0.5, "b": 0.5}, 1)["c"] == before
