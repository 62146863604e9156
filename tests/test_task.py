"""What the server asks of a client: read back as it was sent, and refused as a whole when it makes no sense."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from conftest import CONF
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune import build, flower
from ciphertune.errors import FormatError
from ciphertune.plan import Plan
from ciphertune.settings import compose
from ciphertune.task import Announced, Task, Terms, parse_task
from tests.oracle import SMALL_HEADS, SMALL_LAYERS, negotiated_plan, plan_of

TERMS = [
    {"tiers": [2, 8], "budgets": [0.2, 0.4], "columns": [[3, 1], [8, 0, 4, 2]]},
    {"tiers": [2, 8], "budgets": [], "columns": []},
]
GOOD: dict[str, Any] = {
    "round": 5,
    "sender": 3,
    "total": 900,
    "base": 2,
    "rounds": 8,
    "terms": TERMS,
    "aggregates": [[3, 8, 1], [4, 8, 0]],
    "shares": [1.0, 0.4],
    "settings": "what else is in a message does not matter",
}


def sent(values: Any) -> Any:
    """As it arrives: through JSON."""
    return json.loads(json.dumps(values))


def test_a_task_is_read_field_by_field_and_each_aggregate_gets_its_own_terms() -> None:
    now, before = Terms((2, 8), (0.2, 0.4), ((3, 1), (8, 0, 4, 2))), Terms((2, 8), (), ())
    aggregates = (Announced(3, 8, before), Announced(4, 8, now))
    assert parse_task(sent(GOOD)) == Task(5, 3, 900, now, 2, aggregates, 8, (1.0, 0.4))
    first = parse_task(sent(GOOD | {"base": -1, "aggregates": [], "terms": TERMS[:1]}))
    assert (first.base, first.aggregates, first.terms) == (-1, (), now)


@pytest.mark.parametrize("plan", [plan_of(), negotiated_plan()], ids=["sum", "product"])
def test_the_terms_of_a_plan_survive_a_message(plan: Any) -> None:
    terms = Terms.of(plan)
    assert (terms.tiers, terms.budgets, terms.columns) == (plan.tiers, plan.budgets, plan.columns)
    changed = {"terms": [terms.plain()], "aggregates": [], "shares": [1.0] * len(plan.tiers)}
    values, _ = flower.unpack(flower.pack(GOOD | changed))
    assert parse_task(values).terms == terms


@given(
    terms=st.lists(
        st.builds(
            Terms,
            st.lists(st.integers(1, 4096), min_size=1, max_size=4).map(tuple),
            st.lists(st.floats(0, 1), max_size=4).map(tuple),
            st.lists(st.lists(st.integers(0, 2**24), max_size=4).map(tuple), max_size=4).map(tuple),
        ),
        min_size=1,
        max_size=3,
    ),
    numbers=st.fixed_dictionaries(
        {k: st.integers(0, 2**32 - 1) for k in ("round", "sender", "rounds")}
        | {"total": st.integers(0, 2**63 - 1), "base": st.integers(-1, 2**32 - 1)}
    ),
    announced=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2)), max_size=4),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_task_survives_json(
    terms: list[Terms], numbers: dict[str, int], announced: list[tuple[int, int, int]]
) -> None:
    named = [(r, k, i % len(terms)) for r, k, i in announced]
    shares = [1 / (1 + i) for i in range(len(terms[0].tiers))]
    values = numbers | {"terms": [t.plain() for t in terms], "aggregates": named, "shares": shares}
    found = parse_task(sent(values))
    assert found.shares == tuple(shares)
    assert {k: getattr(found, k) for k in numbers} == numbers
    assert found.terms == terms[0]
    assert found.aggregates == tuple(Announced(r, k, terms[i]) for r, k, i in named)


@pytest.mark.parametrize("index", [2, 3, -1, -2, 2**31, 2**64])
def test_an_aggregate_made_under_terms_that_are_not_there_is_refused(index: int) -> None:
    """Above all a negative one, which would count from the end of the list."""
    with pytest.raises(FormatError, match="not readable"):
        parse_task(sent(GOOD | {"aggregates": [[3, 8, 0], [4, 8, index]]}))


@pytest.mark.parametrize("key", sorted(set(GOOD) - {"settings"}))
def test_a_task_without_one_of_its_values_is_refused(key: str) -> None:
    with pytest.raises(FormatError, match="not readable"):
        parse_task({k: v for k, v in GOOD.items() if k != key})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": -1}, "impossible numbers"),
        ({"round": 2**32}, "impossible numbers"),
        ({"round": math.nan}, "not readable"),
        ({"round": math.inf}, "not readable"),
        ({"round": None}, "not readable"),
        ({"sender": -1}, "impossible numbers"),
        ({"sender": 2**32}, "impossible numbers"),
        ({"rounds": 2**32}, "impossible numbers"),
        ({"total": -1}, "impossible numbers"),
        ({"total": 2**63}, "impossible numbers"),
        ({"total": 10**400}, "impossible numbers"),
        ({"base": "none"}, "not readable"),
        ({"aggregates": [[-1, 8, 0]]}, "impossible numbers"),
        ({"aggregates": [[3, 2**32, 0]]}, "impossible numbers"),
        ({"aggregates": [[3, 8]]}, "not readable"),
        ({"aggregates": [[3, 8, 0, 0]]}, "not readable"),
        ({"aggregates": {"3": 8}}, "not readable"),
        ({"aggregates": None}, "not readable"),
        ({"terms": []}, "not readable"),
        ({"terms": {}}, "not readable"),
        ({"terms": TERMS[0]}, "not readable"),
        ({"terms": [[]]}, "not readable"),
        ({"terms": [{"tiers": [2], "budgets": []}]}, "not readable"),
        ({"terms": [TERMS[0] | {"tiers": 8}, TERMS[1]]}, "not readable"),
        ({"terms": [TERMS[0] | {"budgets": ["many"]}, TERMS[1]]}, "not readable"),
        ({"terms": [TERMS[0] | {"budgets": [10**400]}, TERMS[1]]}, "not readable"),
        ({"terms": [TERMS[0] | {"columns": [1, 2]}, TERMS[1]]}, "not readable"),
        ({"terms": [TERMS[0], TERMS[1] | {"columns": [[None]]}]}, "not readable"),  # of an aggregate, too
        ({"shares": None}, "not readable"),
        ({"shares": [1.0, "half"]}, "not readable"),
        ({"shares": [1.0]}, "share of the clients' weight"),
        ({"shares": [1.0, 0.4, 0.2]}, "share of the clients' weight"),
        ({"shares": [0.9, 0.4]}, "share of the clients' weight"),
        ({"shares": [0.4, 1.0]}, "share of the clients' weight"),
        ({"shares": [1.0, 0.0]}, "share of the clients' weight"),
        ({"shares": [1.0, -0.1]}, "share of the clients' weight"),
        ({"shares": [1.1, 0.4]}, "share of the clients' weight"),
        ({"shares": [1.0, math.nan]}, "share of the clients' weight"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_a_task_that_makes_no_sense_is_refused(changes: dict[str, Any], reason: str) -> None:
    parse_task(GOOD)
    with pytest.raises(FormatError, match=reason):
        parse_task(GOOD | changes)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(
    scalars, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5), x, max_size=4), max_leaves=12
)
small = st.integers(0, 2)
numbers = small | small | small | scalars
parts = st.lists(small, max_size=2) | st.just([]) | anything
nearly = st.fixed_dictionaries(
    dict.fromkeys(("round", "sender", "total", "base", "rounds"), numbers)
    | {
        "terms": st.lists(
            st.fixed_dictionaries({"tiers": parts, "budgets": parts, "columns": st.lists(parts, max_size=2)}),
            max_size=2,
        ),
        "aggregates": st.lists(st.lists(numbers, min_size=3, max_size=3), max_size=2),
        "shares": parts,
    }
)
one_change = st.tuples(st.sampled_from(sorted(GOOD)), anything | small).map(lambda x: GOOD | {x[0]: x[1]})


@given(values=anything | nearly | one_change)
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_any_json_is_a_task_or_a_format_error(values: Any) -> None:
    try:
        task = parse_task(sent(values))
    except FormatError as error:
        assert len(str(error)) < 200
        return
    for number in (task.round, task.sender, task.rounds, *(x for a in task.aggregates for x in (a.round, a.rank))):
        assert type(number) is int and 0 <= number < 2**32
    assert type(task.base) is int and 0 <= task.total < 2**63
    for terms in (task.terms, *(a.terms for a in task.aggregates)):
        assert {type(t) for t in terms.tiers} <= {int} and {type(b) for b in terms.budgets} <= {float}
        assert {type(c) for codes in terms.columns for c in codes} <= {int}


# ---------------------------------------------------------------------------------------- the plan that follows from it

METHODS = {name: compose(CONF, [f"method={name}"]) for name in ("sealed", "she_lora")}


def made(method: str, terms: Terms) -> Plan:
    """As a client makes it: layers and heads are its own model's."""
    return build.make_plan(METHODS[method], SMALL_LAYERS, SMALL_HEADS, terms.tiers, terms.budgets, terms.columns)


@given(
    method=st.sampled_from(sorted(METHODS)),
    tiers=st.lists(st.integers(-1, 5) | st.integers(), min_size=1, max_size=3),
    budgets=st.lists(st.sampled_from([0.0, 0.2, 0.4, 1.0]) | st.floats(), max_size=2),
    columns=st.just([]) | st.lists(st.lists(st.integers(-1, 9) | st.integers(), max_size=5), max_size=3),
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_any_terms_make_a_plan_or_a_format_error(
    method: str, tiers: list[int], budgets: list[float], columns: list[list[int]]
) -> None:
    terms = Terms(tuple(tiers), tuple(budgets), tuple(map(tuple, columns)))
    try:
        plan = made(method, terms)
    except FormatError:
        return
    assert Terms.of(plan) == terms
    assert all(b > a >= 1 for a, b in pairwise([*tiers, 4097]))
    assert len(columns) == (2 if budgets else 0)
    for codes, n in zip(columns, (5, 9), strict=False):
        assert len(set(codes)) == len(codes) and set(codes) <= set(range(n))


def test_terms_of_a_negotiation_make_its_plan() -> None:
    plan = replace(negotiated_plan(), schedule=build.prune_schedule(METHODS["she_lora"]))
    assert made("she_lora", Terms.of(plan)) == plan


@pytest.mark.parametrize("method", sorted(METHODS))
def test_terms_without_any_tier_are_refused(method: str) -> None:
    with pytest.raises(FormatError, match="impossible sizes"):
        made(method, Terms((), (), ()))
