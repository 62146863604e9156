"""Admission, sampling and what a client still has to be sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.aggregation import SeparateSum, cut
from ciphertune.crypto.ckks_secret import CkksSecret, generate_key
from ciphertune.crypto.clear import ClearPublic
from ciphertune.crypto.clear_secret import ClearSecret
from ciphertune.crypto.params import CkksParams
from ciphertune.errors import FederationError, FormatError, KeyMismatchError, PlanMismatchError, SettingsMismatchError
from ciphertune.exchange import seal, unseal
from ciphertune.federation import Federation
from ciphertune.hello import Hello, parse_hello
from ciphertune.negotiation import parse_wish
from ciphertune.plan import LayerShape, Plan
from ciphertune.ranks import Contributor
from ciphertune.settings import CryptoSettings, FederationSettings, Settings
from ciphertune.versions import code_digest
from ciphertune.wire import Session, encode

SETTINGS = Settings(
    crypto=CryptoSettings(backend="clear", precision="float64"), federation=FederationSettings(min_contributors=1)
)
LAYERS = (LayerShape("one", 5, 3), LayerShape("two", 2, 4))


def hello(name: str, rank: int = 2, **changes: Any) -> Hello:
    base = Hello(
        node_id=1,
        client=None,
        name=name,
        rank=rank,
        budget=0.5,
        samples=10,
        heldout=5,
        simulated=False,
        key=bytes(16),
        parameters=ClearPublic("float64").digest().hex(),
        settings=SETTINGS.digest().hex(),
        code=code_digest(),
        initial="ab" * 8,
        layers=LAYERS,
        heads=(),
    )
    return replace(base, **changes)


def settled(*hellos: Hello) -> Federation:
    federation = Federation(SETTINGS, 3)
    assert federation.settle(hellos) == []
    return federation


def test_the_larger_group_with_one_key_stays_and_the_other_is_told_both_fingerprints() -> None:
    federation = Federation(SETTINGS, 3)
    refused = federation.settle([hello("a"), hello("b", key=b"\1" * 16), hello("c")])
    assert [m.name for m in federation.members] == ["a", "c"]
    ((who, reason),) = refused
    assert who.name == "b" and "01" * 16 in reason and "00" * 16 in reason


def test_two_sides_of_equal_size_cannot_be_settled() -> None:
    with pytest.raises(FederationError, match=r"holds key .* holds .*give all clients one key file"):
        Federation(SETTINGS, 3).settle([hello("a"), hello("b", key=b"\1" * 16)])


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"key": b"\2" * 16}, KeyMismatchError),
        ({"settings": "00" * 16}, SettingsMismatchError),
        ({"code": "00" * 8}, SettingsMismatchError),
        ({"layers": LAYERS[:1]}, PlanMismatchError),
        ({"initial": "cd" * 8}, PlanMismatchError),
        ({"rank": 1}, PlanMismatchError),
        ({"name": "a"}, FormatError),
    ],
)
def test_a_late_client_that_does_not_fit_is_refused(changes: dict[str, Any], error: type[Exception]) -> None:
    federation = settled(hello("a"), hello("b"))
    with pytest.raises(error):
        federation.admit(hello("late", **changes) if "name" not in changes else hello("a"), [1])
    assert len(federation.members) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../x"},
        {"name": None},
        {"rank": 0},
        {"rank": 10**9},
        {"budget": float("nan")},
        {"budget": -0.01},
        {"budget": 1.01},
        {"budget": 10**400},
        {"budget": True},
        {"budget": "0.5"},
        {"budget": None},
        {"samples": 0},
        {"samples": "many"},
        {"samples": float("inf")},
        {"samples": 10**12},
        {"heldout": 0},
        {"key": "zz"},
        {"key": "00"},
        {"initial": "<script>"},
        {"identity": ""},
        {"identity": ["00" * 16]},
        {"layers": [["x", 0, 4]]},
        {"layers": [["x", 2**40, 4]]},
        {"layers": 7},
        {"heads": [["h", [2, -1]]]},
    ],
)
def test_a_greeting_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    good = {
        "name": "a",
        "rank": 2,
        "budget": 0.25,
        "samples": 3,
        "heldout": 3,
        "simulated": False,
        "key": "00" * 16,
        "parameters": "00" * 16,
        "settings": "00" * 16,
        "code": "00" * 8,
        "initial": "00" * 8,
        "identity": "00" * 16,
        "layers": [["x", 3, 4]],
        "heads": [["h", [2, 3]]],
    }
    found = parse_hello(good, 1, None)
    assert (found.layers, found.budget) == ((LayerShape("x", 3, 4),), 0.25)
    with pytest.raises(FormatError):
        parse_hello(good | changes, 1, None)
    for key in changes:
        with pytest.raises(FormatError):
            parse_hello({k: v for k, v in good.items() if k != key}, 1, None)


def test_sampling_asks_the_share_but_never_fewer_than_could_be_released() -> None:
    federation = settled(*(hello(f"c{k}") for k in range(10)))
    federation.settings = replace(SETTINGS, federation=FederationSettings(fraction=0.3, min_contributors=2))
    assert len(federation.sample(0, federation.members)) == 3
    federation.settings = replace(SETTINGS, federation=FederationSettings(fraction=0.01, min_contributors=2))
    assert len(federation.sample(0, federation.members)) == 2


def _adapter(rank: int, value: float) -> Adapter:
    return Adapter(
        {x.name: LoraFactors(np.full((rank, x.n), value), np.full((x.m, rank), value), 2.0) for x in LAYERS}, {}
    )


def test_a_client_that_was_away_is_sent_the_newest_value_of_every_factor_and_component() -> None:
    """Rounds alternate B and A; rank 8 took part in rounds 0 and 1 only. Who returns must end like who stayed."""
    federation = settled(hello("low", 2), hello("high", 8), hello("stayed", 8))
    session, secret = federation.session, ClearSecret(ClearPublic("float64"), 1e9)
    low, high, stayed = federation.members
    states = {m.name: _adapter(8, 0.0) for m in federation.members}

    def bring_up(member: Any) -> None:
        for message, link in federation.catch_up(member):
            assert link == session  # the plan of a sum of factors never changes
            data = encode(message, link)
            states[member.name], _ = unseal(
                data, link, secret, round_=message.round, rank=message.rank, base=states[member.name]
            )
            member.have = message.round

    for round_ in range(5):
        bring_up(stayed)
        chosen = [low, high] if round_ < 2 else [low]
        sum_ = federation.open_round(round_, chosen)
        for member in chosen:
            bring_up(member)
            update = _adapter(member.hello.rank, round_ + 1.0)
            sent = seal(
                update, session, secret, round_=round_, sender=member.number, samples=10, total=10 * len(chosen)
            )
            sum_.add(sent, sender=member.number, who=federation.contributor(member))
        federation.close_round(sum_)
    # it holds round 0; round 1 has the newest of A above the second component, 3 and 4 the newest below
    assert [m.round for m, _ in federation.catch_up(high)] == [1, 3, 4]
    bring_up(stayed)
    high.have = -1
    states["high"] = _adapter(8, 0.0)
    assert [m.round for m, _ in federation.catch_up(high)] == [0, 1, 3, 4]
    bring_up(high)
    for name in ("one", "two"):
        for got, want in ((states["high"].layers[name], states["stayed"].layers[name]),):
            assert np.array_equal(got.a, want.a) and np.array_equal(got.b, want.b)
    assert states["high"].layers["one"].b[0].tolist() == [5.0, 5.0] + [1.0] * 6
    assert states["high"].layers["one"].a[:, 0].tolist() == [4.0, 4.0] + [2.0] * 6


def test_of_products_only_the_last_is_sent_and_under_the_plan_it_was_made_under() -> None:
    """It replaces everything; columns may have been negotiated anew since."""
    names = {"share": "both", "select": "negotiated", "aggregate": "product", "fit_rank": "svd"}
    settings = replace(SETTINGS, method=replace(SETTINGS.method, **names))
    federation = Federation(settings, 3)
    federation.settle([hello(n, r, settings=settings.digest().hex()) for n, r in (("a", 2), ("b", 8))])
    secret, (a, b) = ClearSecret(ClearPublic("float64"), 1e9), federation.members
    assert federation.session.plan.tiers == (2, 8)
    assert not federation.covered(a)  # nothing was negotiated so far
    plans = []
    for round_, columns in enumerate(([[0, 1], [2, 3]], [[2, 0], [1, 0]], [[1, 2], [0, 3]])):
        federation.negotiate([parse_wish(m.name, 0.5, columns, [3, 4]) for m in (a, b)])
        plans.append(federation.session.plan)
        sum_ = federation.open_round(round_, [a, b])
        for member in (a, b):
            assert federation.contributor(member) == Contributor(member.hello.rank, 10, 0)
            update, sender = _adapter(member.hello.rank, round_ + 1.0), member.number
            sent = seal(update, federation.session, secret, round_=round_, sender=sender, samples=10, total=20)
            sum_.add(sent, sender=sender, who=federation.contributor(member))
        federation.close_round(sum_)
    assert len({p.digest() for p in plans}) == 3
    federation.negotiate([parse_wish(m.name, 0.5, [[0, 1], [0, 1]], [3, 4]) for m in (a, b)])
    for have, member in ((-1, a), (0, a), (1, b)):
        member.have = have
        ((message, link),) = federation.catch_up(member)
        assert (message.round, link.plan) == (2, plans[2]) and link.plan != federation.session.plan
        base = _adapter(member.hello.rank, 0.0)
        got, _ = unseal(encode(message, link), link, secret, round_=2, rank=message.rank, base=base)
        for x in LAYERS:  # all clients sent 3 everywhere, at ranks 2 and 8: on average 3 * 3 * 5 components
            assert got.layers[x.name].delta() == pytest.approx(np.full((x.m, x.n), 2.0 * 9 * 5), rel=1e-12)
    a.have = 2
    assert federation.catch_up(a) == []


def test_tiers_are_the_ranks_that_enough_clients_reach() -> None:
    def tiers(present: list[int], enough: int) -> tuple[int, ...]:
        federation = Federation(SETTINGS, 3)
        federation.settings = replace(
            SETTINGS, federation=FederationSettings(min_clients=enough, min_contributors=enough)
        )
        agreed = [hello(f"c{k}", r, settings=federation.settings.digest().hex()) for k, r in enumerate(present)]
        federation.settle(agreed)
        return federation.session.plan.tiers

    assert tiers([2, 4, 8, 8], 2) == (2, 4, 8)
    assert tiers([4, 8, 8, 16], 2) == (4, 8)
    assert tiers([4, 8, 8, 16], 4) == (4,)
    assert tiers([8, 4, 4], 2) == (4,)
    with pytest.raises(FederationError, match=r"fewer than federation\.min_contributors=3"):
        tiers([4, 8], 3)


def test_a_client_on_a_node_that_was_started_anew_is_taken_back_and_sent_everything() -> None:
    federation = settled(hello("a"), hello("b", node_id=7))
    federation.members[1].have = 5
    with pytest.raises(FormatError, match="another node is called b already"):
        federation.admit(hello("b", node_id=9), [1, 7, 9])
    member = federation.admit(hello("b", node_id=9), [1, 9])
    assert (member.number, member.have, member.hello.node_id) == (2, -1, 9) and len(federation.members) == 2


@pytest.mark.parametrize("select", ["none", "all"])
def test_components_that_fewer_than_the_minimum_contributed_are_never_released(select: str) -> None:
    method = replace(SETTINGS.method, select=select)
    settings = replace(SETTINGS, method=method, federation=FederationSettings(min_clients=2, min_contributors=2))
    federation = Federation(settings, 3)
    digest = settings.digest().hex()
    federation.settle([hello(n, r, settings=digest) for n, r in (("a", 2), ("b", 8), ("c", 8))])
    assert federation.session.plan.tiers == (2, 8)
    secret = ClearSecret(ClearPublic("float64"), 1e9)
    low, high, _ = federation.members
    sum_ = federation.open_round(0, [low, high])  # only one of the two clients of rank 8 is asked
    for member in (low, high):
        update = _adapter(member.hello.rank, 1.0)
        sent = seal(update, federation.session, secret, round_=0, sender=member.number, samples=10, total=20)
        sum_.add(sent, sender=member.number, who=federation.contributor(member))
    released = federation.close_round(sum_)
    assert released.rank == 2
    values = np.frombuffer(released.clear + released.secret)
    assert values.size == 2 * sum(x.m for x in LAYERS) and (values == 1.0).all()


def test_no_ciphertext_that_a_lower_rank_gets_holds_a_component_above_it() -> None:
    params = CkksParams(4096, (54, 20), 40, 64.0)
    secret = CkksSecret(params, generate_key(params))
    plan = Plan(LAYERS, (), 2.0, (2, 8), "alternate", "all", "nested")
    session = Session(1, plan, bytes(16), secret.fingerprint, secret.public, ClearPublic(), 64.0)
    sum_ = SeparateSum(session, 0, 20)
    for number in (1, 2):
        sent = seal(_adapter(8, 1.0), session, secret, round_=0, sender=number, samples=10, total=20)
        sum_.add(sent, sender=number, who=Contributor(8, 10))
    message = cut(sum_.release(2), session, 2)
    every_slot = secret.decrypt(message.secret, len(message.secret) // params.block_bytes * params.slots)
    shared = 2 * sum(x.m for x in LAYERS)
    assert np.allclose(every_slot[:shared], 1.0, atol=1e-6) and np.allclose(every_slot[shared:], 0.0, atol=1e-6)


def test_the_share_of_a_tier_is_that_of_the_weight_asked_without_those_below_that_were_silent() -> None:
    federation = settled(hello("low", 2, samples=30), hello("high", 8, samples=10), hello("top", 8, samples=20))
    low, high, top = federation.members
    assert federation.session.plan.tiers == (2, 8)
    assert federation.shares([low, high, top]) == (1.0, 30 / 60)
    assert federation.shares([low, top]) == (1.0, 20 / 50)
    assert federation.shares([high, top]) == (1.0, 1.0)
    assert federation.shares([low]) == (1.0, 1.0)  # nobody trains what is above it
    low.silent = True
    assert federation.shares([low, high, top]) == (1.0, 1.0)


def test_two_clients_of_a_huge_rank_do_not_decide_what_the_others_hold() -> None:
    """The settings do: eight times the largest rank that they name."""
    federation = settled(*(hello(f"n{k}", rank) for k, rank in enumerate((4, 4, 4, 4096, 4096))))
    assert federation.session.plan.tiers == (4, federation.settings.most_held)
    assert 64 <= federation.settings.most_held < 4096
    assert [federation.contributor(m).rank for m in federation.members] == [4, 4, 4] + [
        federation.settings.most_held
    ] * 2
