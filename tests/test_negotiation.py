"""Negotiation against its definition, computed with sets and fractions."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune.errors import FederationError, FormatError
from ciphertune.negotiation import Negotiated, Wish, negotiate, own_coverage, parse_wish
from ciphertune.plan import LayerShape, Plan, column_count
from ciphertune.sensitivity import top

# ------------------------------------------------------------------------------------------------------- the oracle

Columns = list[list[int]]  # per layer, most sensitive first
Client = tuple[str, float, Columns]
GRID = [(a, b, 10 - a - b) for a in range(11) for b in range(11 - a)]


def paid(n: int, budget: float) -> int:
    return 0 if budget == 0 else min(n, max(1, math.floor(budget * n + 0.5)))


def ranking(lists: Sequence[list[int]], first: str) -> list[int]:
    """Every code of the lists, by how many name it and by its best place, then by code."""

    def key(code: int) -> tuple[int, int, int]:
        places = [x.index(code) for x in lists if code in x]
        return (-len(places), min(places), code) if first == "count" else (min(places), -len(places), code)

    return sorted({code for x in lists for code in x}, key=key)


def sets(n: int, clients: Sequence[tuple[float, list[int]]], mix: tuple[int, int, int]) -> dict[float, set[int]]:
    """One layer: what the clients of each budget encrypt."""
    everybody = [named for _, named in clients]
    chosen: set[int] = set()
    result, before = {}, 0
    for tier in sorted({budget for budget, _ in clients}):
        step, before = paid(n, tier) - before, paid(n, tier)
        quota_a, quota_b = (math.floor(Fraction(share, 10) * step) for share in mix[:2])
        own = ranking([named for budget, named in clients if budget == tier], "count")
        chosen |= set([c for c in own if c not in chosen][:quota_a])
        common = ranking(everybody, "count")
        chosen |= set([c for c in common if c not in chosen][:quota_b])
        for code in ranking(everybody, "place"):
            if len(chosen) < before:
                chosen.add(code)
        result[tier] = set(chosen)
    return result


def shares(
    widths: Sequence[int], clients: Sequence[Client], mix: tuple[int, int, int]
) -> tuple[dict[str, Fraction], dict[str, Fraction]]:
    """Coverage and risk per client."""
    layers = [sets(n, [(budget, columns[i]) for _, budget, columns in clients], mix) for i, n in enumerate(widths)]
    coverage, risk = {}, {}
    for name, budget, columns in clients:
        asked = covered = levels = clear = 0
        for named, chosen in zip(columns, layers, strict=True):
            for place, code in enumerate(named):
                level = len(named) - place
                asked, levels = asked + 1, levels + level
                if code in chosen[budget]:
                    covered += 1
                else:
                    clear += level
        coverage[name] = Fraction(covered, asked) if asked else Fraction(1)
        risk[name] = Fraction(clear, levels) if levels else Fraction(0)
    return coverage, risk


def worth(widths: Sequence[int], clients: Sequence[Client], mix: tuple[int, int, int]) -> Fraction:
    coverage, risk = shares(widths, clients, mix)
    return min(coverage.values()) - max(risk.values())


# ----------------------------------------------------------------------------------------------------------- helpers


def wishes_of(widths: Sequence[int], clients: Sequence[Client]) -> list[Wish]:
    return [parse_wish(name, budget, json.loads(json.dumps(columns)), widths) for name, budget, columns in clients]


def tiers_of(widths: Sequence[int], found: Negotiated) -> list[dict[float, set[int]]]:
    return [
        {b: set(codes[: column_count(n, b)]) for b in found.budgets}
        for n, codes in zip(widths, found.columns, strict=True)
    ]


@st.composite
def federations(draw: st.DrawFn) -> tuple[list[int], list[Client]]:
    """Layers of up to 14 columns; clients whose tastes overlap, with budgets of 0, 1 and between."""
    widths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=3))
    some = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.31, 0.5, 0.7, 0.8, 1.0]) | st.floats(0.0, 1.0)
    budgets = draw(st.lists(some, min_size=1, max_size=5))
    clients = []
    for i, budget in enumerate(budgets):
        columns = [draw(st.permutations(range(n)))[: paid(n, budget)] for n in widths]
        clients.append((f"c{i}", budget, columns))
    return widths, clients


cases = settings(max_examples=150, deadline=None, derandomize=True)

# ------------------------------------------------------------------------------------------------------------- tests


@given(case=federations())
@cases
def test_the_best_mix_and_its_columns_are_the_oracles(case: tuple[list[int], list[Client]]) -> None:
    widths, clients = case
    found = negotiate(widths, wishes_of(widths, clients))
    best = max(GRID, key=lambda mix: (worth(widths, clients, mix), mix[0], mix[1]))
    assert found.mix == (best[0] / 10, best[1] / 10, best[2] / 10)
    assert found.budgets == tuple(sorted({budget for _, budget, _ in clients}))
    expected = [sets(n, [(b, columns[i]) for _, b, columns in clients], best) for i, n in enumerate(widths)]
    assert tiers_of(widths, found) == expected
    coverage, risk = shares(widths, clients, best)
    assert found.coverage == {name: float(x) for name, x in coverage.items()}
    assert found.risk == {name: float(x) for name, x in risk.items()}


@given(case=federations())
@cases
def test_tiers_are_nested_of_the_right_size_and_named_by_somebody(case: tuple[list[int], list[Client]]) -> None:
    widths, clients = case
    found = negotiate(widths, wishes_of(widths, clients))
    for i, (n, codes) in enumerate(zip(widths, found.columns, strict=True)):
        assert len(codes) == len(set(codes)) == column_count(n, found.budgets[-1])
        assert set(codes) <= {code for _, _, columns in clients for code in columns[i]}
        assert all(type(code) is int for code in codes)
        at = 0  # ascending within a tier: how much a code was wanted does not show
        for budget in found.budgets:
            tier, at = codes[at : column_count(n, budget)], column_count(n, budget)
            assert list(tier) == sorted(tier)
    layers = tuple(LayerShape(f"layer {i}", 3, n) for i, n in enumerate(widths))
    plan = Plan(
        layers, (), 2.0, (1,), "both", "negotiated", "svd", "product", 0, found.budgets, found.columns
    )  # raises FormatError on columns that are none
    assert Plan.from_json(plan.to_json()) == plan


@given(case=federations(), data=st.data())
@cases
def test_the_order_of_wishes_does_not_matter(case: tuple[list[int], list[Client]], data: st.DataObject) -> None:
    widths, clients = case
    wishes = wishes_of(widths, clients)
    assert negotiate(widths, data.draw(st.permutations(wishes))) == negotiate(widths, wishes)


@given(case=federations(), others=st.integers(0, 3))
@cases
def test_clients_that_ask_for_the_same_get_it(case: tuple[list[int], list[Client]], others: int) -> None:
    widths, [(_, budget, columns), *_] = case
    clients = [(f"same {i}", budget, columns) for i in range(1 + others)]
    found = negotiate(widths, wishes_of(widths, clients))
    assert [set(codes) for codes in found.columns] == [set(named) for named in columns]
    assert set(found.coverage.values()) == {1.0} and set(found.risk.values()) == {0.0}
    assert found.mix == (1.0, 0.0, 0.0)  # of equal mixes the largest a


def test_an_example_by_hand() -> None:
    """One layer of 10 columns; P and Q pay for 2, S for 5.

    First tier, 2 columns. Clients: 1 (two name it), 0, 2.  Common: 1 (three), 2 (two), 0, 5, 6, 7.
    Sensitivity: 2 (first for Q, named twice), 0, 5, 1, 6, 7.
      a = 1 gives {1, 0}: Q lacks 2, its first of two: coverage 1/2, risk 2/3, worth -1/6.
      a or b of 0.5 and more give one of 1 and then 2: {1, 2}; P lacks 0 in the same way.
      a and b of 0.4 and less give {2, 0}: P and Q lack 1, their second: coverage 1/2, risk 1/3, worth 1/6. Best.
    The largest such a is 0.4, then the largest b 0.4. Second tier, 3 more columns, floor(1.2) = 1 each of a and b:
      Clients: S's own first, 5.  Common: 1.  Sensitivity: 2, 0, 5, 1 are taken, so 6.
    S lacks 7, its fourth of five: coverage 4/5, risk 2/15, so P and Q decide.
    """
    clients: list[Client] = [("P", 0.2, [[0, 1]]), ("Q", 0.2, [[2, 1]]), ("S", 0.5, [[5, 1, 6, 7, 2]])]
    found = negotiate([10], wishes_of([10], clients))
    assert found.mix == (0.4, 0.4, 0.2)
    assert found.budgets == (0.2, 0.5)
    assert found.columns == ((0, 2, 1, 5, 6),)
    assert found.coverage == {"P": 0.5, "Q": 0.5, "S": 0.8}
    assert found.risk == {"P": 1 / 3, "Q": 1 / 3, "S": 2 / 15}


def test_shares_are_floored_in_whole_tenths() -> None:
    """Of 90 columns 0.7 is 63, while in floats 0.7 * 90 falls short of it; a wrong 62 would win in some of these."""
    assert int(0.7 * 90) == 62
    rng = np.random.default_rng(5)
    for _ in range(6):
        taste = rng.random(120)
        clients: list[Client] = [(str(i), 0.75, [np.argsort(taste + rng.random(120))[:90].tolist()]) for i in range(4)]
        found = negotiate([120], wishes_of([120], clients))
        best = max(GRID, key=lambda mix: (worth([120], clients, mix), mix[0], mix[1]))
        assert found.mix == (best[0] / 10, best[1] / 10, best[2] / 10)
        assert tiers_of([120], found) == [sets(120, [(b, columns[0]) for _, b, columns in clients], best)]


def test_two_budgets_that_pay_for_the_same_columns_in_a_layer() -> None:
    """5 columns: 0.1 and 0.25 both pay for one. The second tier adds nothing there, and 6 of 40 in the other layer."""
    widths = [5, 40]
    clients: list[Client] = [
        ("small", 0.1, [[3], [1, 2, 3, 4]]),
        ("large", 0.25, [[4], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]),
    ]
    found = negotiate(widths, wishes_of(widths, clients))
    assert found.columns == ((3,), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
    assert found.coverage == {"small": 1.0, "large": 10 / 11}
    assert found.risk == {"small": 0.0, "large": 1 / 56}


def test_budgets_of_nothing_and_of_everything() -> None:
    widths = [3, 4]
    clients: list[Client] = [("none", 0.0, [[], []]), ("all", 1.0, [[2, 0, 1], [3, 2, 1, 0]])]
    found = negotiate(widths, wishes_of(widths, clients))
    assert found.budgets == (0.0, 1.0) and found.columns == ((0, 1, 2), (0, 1, 2, 3))
    assert found.coverage == {"none": 1.0, "all": 1.0} and found.risk == {"none": 0.0, "all": 0.0}
    alone = negotiate(widths, wishes_of(widths, clients[:1]))
    assert alone.budgets == (0.0,) and alone.columns == ((), ()) and alone.coverage == {"none": 1.0}


def test_no_layers() -> None:
    found = negotiate([], [parse_wish("one", 0.5, [], [])])
    assert found.columns == () and found.coverage == {"one": 1.0} and found.risk == {"one": 0.0}


def test_nobody_asks_and_equal_names() -> None:
    with pytest.raises(FederationError, match="nothing to negotiate"):
        negotiate([4], [])
    with pytest.raises(ValueError, match="same name"):
        negotiate([4], wishes_of([4], [("x", 0.5, [[0, 1]]), ("x", 0.5, [[1, 2]])]))


@pytest.mark.parametrize(("layers", "budgets"), [(104, [0.00125] * 4), (26, [0.03, 0.06, 0.125, 0.25])])
def test_real_sizes_take_seconds(layers: int, budgets: list[float]) -> None:
    rng = np.random.default_rng(1)
    tastes = [rng.random(3200) for _ in range(layers)]
    wishes = [
        Wish(str(i), b, tuple(top(x + 0.3 * rng.random(3200), column_count(3200, b)) for x in tastes))
        for i, b in enumerate(budgets)
    ]
    start = time.perf_counter()
    found = negotiate([3200] * layers, wishes)
    assert time.perf_counter() - start < 5.0  # 0.2 s on one slow core
    assert all(len(codes) == column_count(3200, budgets[-1]) for codes in found.columns)


# ------------------------------------------------------------------------------------------------- untrusted wishes

GOOD = [[3, 0], [1, 5, 2]]  # half of 4 and of 6 columns


def test_a_good_wish_is_read() -> None:
    wish = parse_wish("ann", 0.5, GOOD, [4, 6])
    assert wish.name == "ann" and wish.budget == 0.5
    assert [c.tolist() for c in wish.columns] == GOOD and {c.dtype for c in wish.columns} == {np.dtype(np.int64)}
    assert parse_wish("ann", 1, [[0]], [1]).budget == 1.0
    zero = parse_wish("ann", -0.0, [[], []], [4, 6])
    assert math.copysign(1, zero.budget) == 1.0 and [c.shape for c in zero.columns] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        (None, "in a NoneType, not in a list per layer"),
        ({"0": [1]}, "in a dict, not in a list per layer"),
        ([[3, 0]], "plan for other layers: 1 of them, expected 2"),
        ([*GOOD, [1]], "plan for other layers: 3 of them, expected 2"),
        ([], "plan for other layers: 0 of them, expected 2"),
        ([[3, 0], "152"], "layer number 1: its columns are a str, not a list"),
        ([[3], [1, 5, 2]], "layer number 0: it names 1 columns, its budget pays for 2"),
        ([[3, 0], [1, 5, 2, 0]], "layer number 1: it names 4 columns, its budget pays for 3"),
        ([[3, 0], []], "layer number 1: it names 0 columns"),
        ([[3, 3], [1, 5, 2]], "layer number 0: it names a column twice"),
        ([[3, 4], [1, 5, 2]], "layer number 0: a column is out of range, want 0 to 3"),
        ([[3, -1], [1, 5, 2]], "layer number 0: a column is out of range, want 0 to 3"),
        ([[3, 10**5000], [1, 5, 2]], "layer number 0: a column is out of range, want 0 to 3"),
        ([[3, 0.0], [1, 5, 2]], "layer number 0: a column is not a whole number"),
        ([[3, False], [1, 5, 2]], "layer number 0: a column is not a whole number"),
        ([[3, "0"], [1, 5, 2]], "layer number 0: a column is not a whole number"),
        ([[3, [0]], [1, 5, 2]], "layer number 0: a column is not a whole number"),
        ([[3, math.nan], [1, 5, 2]], "layer number 0: a column is not a whole number"),
    ],
)
def test_a_wrong_wish_names_the_client_and_the_fault(values: object, fault: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_wish("ann", 0.5, values, [4, 6])
    assert "client ann" in str(caught.value) and fault in str(caught.value)


@pytest.mark.parametrize(
    "budget", [math.nan, math.inf, -math.inf, -1e-9, 1.0000001, 2, 10**400, True, "0.5", None, [0.5]], ids=str
)
def test_a_wrong_budget_is_refused(budget: object) -> None:
    with pytest.raises(FormatError, match="client ann asks for columns with a budget that is no number from 0 to 1"):
        parse_wish("ann", budget, GOOD, [4, 6])


scalars = st.none() | st.booleans() | st.integers() | st.integers(0, 6) | st.floats() | st.text(max_size=3)
anything = st.recursive(
    scalars, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=2), x, max_size=2)
)
nearly = st.lists(st.lists(st.integers(-1, 6) | scalars, min_size=1, max_size=4), min_size=1, max_size=3)


@given(budget=st.floats() | st.sampled_from([0.0, 0.5, 1.0]) | anything, values=anything | nearly)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_any_json_is_a_wish_or_a_format_error(budget: object, values: object) -> None:
    try:
        wish = parse_wish("ann", budget, values, [4, 6])
    except FormatError as error:
        assert "ann" in str(error) and len(str(error)) < 200
        return
    assert [c.tolist() for c in wish.columns] == values and 0.0 <= wish.budget <= 1.0
    for codes, n in zip(wish.columns, [4, 6], strict=True):
        assert len(set(codes.tolist())) == column_count(n, wish.budget) and set(codes.tolist()) <= set(range(n))


# -------------------------------------------------------------------------------------------------- a client's own view


def test_own_coverage_by_hand() -> None:
    # wanted: columns 1 (5), 3 (4) of the first layer and 0 (7), 2 (2) of the second; hidden of them: 1 and 0, 2
    scores = [np.array([1.0, 5.0, 3.0, 4.0]), np.array([7.0, 1.0, 2.0, 0.5])]
    assert own_coverage(scores, [[1, 0], [2, 0]], 0.5) == (0.75, pytest.approx(4 / 18, rel=1e-15))
    assert own_coverage(scores, [[3, 1], [2, 0]], 0.5) == (1.0, 0.0)
    assert own_coverage(scores, [[0, 2], [1, 3]], 0.5) == (0.0, 1.0)
    assert own_coverage(scores, [(), ()], 0.5) == (0.0, 1.0)


def test_own_coverage_of_nothing_asked_and_of_scores_that_are_zero() -> None:
    scores = [np.array([1.0, 5.0, 3.0, 4.0])]
    assert own_coverage(scores, [[1]], 0.0) == (1.0, 0.0)
    assert own_coverage([np.zeros(4)], [[3]], 0.5) == (0.0, 0.0)


@given(case=federations())
@cases
def test_own_coverage_agrees_with_the_servers_where_scores_are_levels(case: tuple[list[int], list[Client]]) -> None:
    widths, clients = case
    found = negotiate(widths, wishes_of(widths, clients))
    tiers = tiers_of(widths, found)
    for name, budget, columns in clients:
        scores = [np.zeros(n) for n in widths]
        for score, named in zip(scores, columns, strict=True):
            score[named] = np.arange(len(named), 0, -1)
        coverage, risk = own_coverage(scores, [sorted(x[budget]) for x in tiers], budget)
        assert coverage == found.coverage[name] and risk == pytest.approx(found.risk[name], abs=1e-12)
