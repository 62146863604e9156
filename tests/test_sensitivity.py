"""Scores and their order against plain Python loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune.errors import RangeError
from ciphertune.sensitivity import SCORES, scores, top

NUMBERS = st.floats(-1e6, 1e6, width=32)


def draw(seed: int, r: int = 3, n: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(r, n)).astype(np.float32)
    return {"a": a, "weight": rng.uniform(0, 9, n), "norms": rng.uniform(0, 9, n)}


def fresh(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def slow(kind: str, a: np.ndarray, weight: np.ndarray, norms: np.ndarray) -> list[float]:
    found = []
    for j in range(len(norms)):
        adapter = math.fsum(abs(float(a[k][j])) for k in range(len(a)))
        of_kind = {
            "wanda_weight": float(weight[j]) * float(norms[j]),
            "wanda_adapter": adapter * float(norms[j]),
            "magnitude": adapter,
        }
        found.append(of_kind[kind])
    return found


def slow_top(score: list[float], count: int) -> list[int]:
    """Take the best that is left, `count` times; the first of equals wins."""
    left, taken = list(range(len(score))), []
    for _ in range(count):
        best = left[0]
        for j in left:
            if score[j] > score[best]:
                best = j
        left.remove(best)
        taken.append(best)
    return taken


@pytest.mark.parametrize("kind", ["wanda_weight", "wanda_adapter", "magnitude"])
@given(seed=st.integers(0, 999), r=st.integers(1, 5), n=st.integers(1, 12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_each_score_is_its_formula(kind: str, seed: int, r: int, n: int) -> None:
    values = draw(seed, r, n)
    found = scores(kind, **values, generator=fresh())
    assert found.dtype == np.float64 and found.shape == (n,)
    np.testing.assert_allclose(found, slow(kind, **values), rtol=1e-13)


@pytest.mark.parametrize("kind", ["wanda_adapter", "magnitude"])
def test_entries_of_both_signs_do_not_cancel(kind: str) -> None:
    a = np.array([[1.0, 0.5, 0.0], [-1.0, 0.5, 0.0]], dtype=np.float32)
    found = scores(kind, a=a, weight=np.zeros(3), norms=np.full(3, 3.0), generator=fresh())
    factor = 1.0 if kind == "magnitude" else 3.0
    assert found.tolist() == [2 * factor, factor, 0.0]


@pytest.mark.parametrize("kind", SCORES)
def test_each_score_reads_only_what_it_names(kind: str) -> None:
    reads = {"wanda_weight": {"weight", "norms"}, "wanda_adapter": {"a", "norms"}, "magnitude": {"a"}, "random": set()}
    values = draw(1)
    before = scores(kind, **values, generator=fresh())
    for name, value in values.items():
        after = scores(kind, **{**values, name: 2 * value}, generator=fresh())
        np.testing.assert_array_equal(after, before * (2 if name in reads[kind] else 1))


def test_random_follows_from_the_generator_alone() -> None:
    one, same, other = (scores("random", **draw(2, n=50), generator=fresh(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert len(np.unique(one)) == 50 and one.min() >= 0 and one.max() < 1
    generator = fresh(1)
    first = scores("random", **draw(2), generator=generator)
    assert not np.array_equal(first, scores("random", **draw(2), generator=generator))  # layers differ


@pytest.mark.parametrize("kind", ["wanda_weight", "wanda_adapter", "magnitude"])
def test_no_other_score_draws_from_the_generator(kind: str) -> None:
    generator = fresh(4)
    scores(kind, **draw(0), generator=generator)
    assert generator.random() == fresh(4).random()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sums_are_of_float64_whatever_the_adapter_is(dtype: type[np.floating]) -> None:
    a = np.full((4000, 2), 0.1, dtype=dtype)
    found = scores("magnitude", a=a, weight=np.ones(2), norms=np.ones(2), generator=fresh())
    assert found == pytest.approx([4000 * float(dtype(0.1))] * 2, rel=1e-12)


def test_a_layer_without_input_scores_zero_and_not_nan() -> None:
    values = {**draw(3), "norms": np.zeros(7)}
    assert not scores("wanda_adapter", **values, generator=fresh()).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "where", "clue"),
    [
        ("wanda_weight", "weight", "base model"),
        ("wanda_weight", "norms", "activations"),
        ("wanda_adapter", "a", "adapter"),
        ("wanda_adapter", "norms", "activations"),
        ("magnitude", "a", "learning_rate"),
    ],
)
def test_a_score_that_is_not_finite_is_refused(kind: str, where: str, clue: str, bad: float) -> None:
    values = draw(4)
    values[where][..., 5] = bad
    with pytest.raises(RangeError, match=rf"score {kind} of column 5 is (nan|inf) \(1 of 7 .*{clue}") as caught:
        scores(kind, **values, generator=fresh())
    assert "\n" not in str(caught.value)
    assert np.isfinite(scores("random", **values, generator=fresh())).all()


@pytest.mark.filterwarnings("error")
def test_infinity_times_zero_and_overflow_are_refused_in_words_alone() -> None:
    values = {"a": np.zeros((2, 3)), "weight": np.full(3, 1e200), "norms": np.array([1.0, np.inf, 1e200])}
    with pytest.raises(RangeError, match="wanda_adapter of column 1 is nan"):
        scores("wanda_adapter", **values, generator=fresh())
    with pytest.raises(RangeError, match=r"wanda_weight of column 1 is inf \(2 of 3"):
        scores("wanda_weight", **values, generator=fresh())


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(ValueError, match="'fisher': want one of wanda_weight, wanda_adapter, magnitude, random"):
        scores("fisher", **draw(0), generator=fresh())


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("change", [{"weight": np.ones(6)}, {"norms": np.ones((7, 1))}, {"a": np.ones(7)}])
def test_shapes_that_do_not_fit_are_refused(kind: str, change: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"want \(r, n\), \(n,\), \(n,\)"):
        scores(kind, **{**draw(0), **change}, generator=fresh())


@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_top_is_the_best_that_is_left_each_time(data: st.DataObject) -> None:
    few = st.sampled_from([0.0, -0.0, 1.0, 2.5])  # many ties
    score = data.draw(st.lists(st.one_of(NUMBERS, few), max_size=30))
    count = data.draw(st.integers(0, len(score)))
    found = top(np.array(score, dtype=np.float64), count)
    assert found.dtype == np.int64
    assert found.tolist() == slow_top(score, count)


def test_of_equal_scores_the_lower_column_comes_first() -> None:
    assert top(np.array([1.0, 2.0, 1.0, 2.0, 1.0]), 4).tolist() == [1, 3, 0, 2]
    assert top(np.zeros(1000), 3).tolist() == [0, 1, 2]


def test_none_and_all() -> None:
    assert top(np.array([3.0, 1.0]), 0).shape == (0,)
    assert top(np.zeros(0), 0).shape == (0,)
    assert top(np.array([1.0, 3.0]), 2).tolist() == [1, 0]


@pytest.mark.parametrize("count", [-1, 3])
def test_top_refuses_a_count_that_is_not_there(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} columns of scores"):
        top(np.array([1.0, 2.0]), count)
    with pytest.raises(ValueError, match="want"):
        top(np.ones((2, 2)), 1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_top_refuses_nan(count: int) -> None:
    with pytest.raises(RangeError, match="column 1 is not a number"):
        top(np.array([1.0, np.nan, 2.0]), count)
