"""The server releases no sum whose mean the clients would refuse for its noise: weights too small beside the total."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import pytest
from federations import Lab, rounds, said, summary
from flwr.app import Error, Message

from ciphertune import exchange, flower, wire
from ciphertune.aggregation import SeparateSum
from ciphertune.crypto.secret import SecretPart
from ciphertune.errors import RangeError, TooFewError
from ciphertune.product import ProductSum
from ciphertune.ranks import Contributor
from ciphertune.wire import Session
from tests.oracle import adapter_of, encrypted, mean_factor, negotiated_plan, plan_of, rows_of
from tests.test_hostile_product import parties

ENCRYPTED = {"sealed": "method=sealed", "she_lora": "method=she_lora"}


def boastful(then: Callable[[Message], Message]) -> Callable[[Message, int], Message]:
    """client-3 joins with a thousand million examples; `then` is what becomes of its updates."""

    def tamper(reply: Message, source: int) -> Message:
        if source == 103 and reply.metadata.message_type == "query.join":
            values, _ = flower.unpack(reply.content)
            reply.content = flower.pack(values | {"samples": 10**9})
        return then(reply) if source == 103 and reply.metadata.message_type == "train" else reply

    return tamper


def died(reply: Message) -> Message:
    question = Message(flower.pack({}), reply.metadata.src_node_id, "train", group_id=reply.metadata.group_id)
    question.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return Message(Error(7, "gone"), reply_to=question)


@pytest.mark.parametrize("method", ENCRYPTED)
def test_a_client_that_states_far_too_many_examples_and_stays_silent_does_not_end_the_run(
    lab: Lab, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    run = lab(f"{ENCRYPTED[method]} federation.min_clients=4", tamper=boastful(died))
    text = said(capsys)
    assert summary(run)["status"] == "completed" and "RangeError" not in text
    assert "of the weight that was asked: too little for a precise mean" in text and "it is begun again" in text
    assert "round 2/2: 3 of 3 clients" in text  # those that had answered, with weights among themselves
    taken = [(x["round"], x["node"]) for x in rounds(run) if x["stage"] == "update"]
    assert taken == [(r, f"client-{k}") for r in range(2) for k in range(3)]


def test_an_aggregate_that_the_clients_would_refuse_is_neither_stored_nor_sent(lab: Lab) -> None:
    """The first attempt is not precise. In later ones one more client is gone: the run ends, without an aggregate."""
    tries = []

    def tamper(reply: Message, source: int) -> Message:
        if source == 102 and reply.metadata.message_type == "train":
            tries.append(source)
            return died(reply) if len(tries) > 1 else reply
        return boastful(died)(reply, source)

    with pytest.raises(TooFewError, match="2 usable updates"):
        lab("method=sealed federation.min_contributors=3 federation.min_clients=4 name=one", tamper=tamper)
    assert not list((lab.runs / "one").glob("server/*"))


# ------------------------------------------------------------------------------------------------- the sums themselves


def released(session: Session, secret: SecretPart, people: Sequence[Contributor], total: int) -> wire.Message:
    """The aggregate of adapters drawn from the sender's number, as the server releases it."""
    sum_ = (SeparateSum if session.plan.aggregate == "separate" else ProductSum)(session, 0, total)
    for sender, who in enumerate(people, 1):
        adapter = adapter_of(session.plan, who.rank, sender)
        data = exchange.seal(
            adapter, session, secret, round_=0, sender=sender, samples=who.samples, total=total, tier=who.tier
        )
        sum_.add(data, sender=sender, who=who)
    return sum_.release(2)


def test_components_that_only_light_clients_have_are_kept_back_and_the_others_released() -> None:
    """One lab of a hundred million examples and rank 2, two of a hundred with rank 8."""
    session, secret = encrypted(plan_of())
    people = Contributor(2, 10**8), Contributor(8, 100), Contributor(8, 100)
    message = released(session, secret, people, 10**8 + 200)
    assert message.rank == 2 and message.contributors == people
    base = adapter_of(session.plan, 8, 0)
    mean, _ = exchange.unseal(wire.encode(message, session), session, secret, round_=0, rank=2, base=base)
    clients = [adapter_of(session.plan, c.rank, i) for i, c in enumerate(people, 1)]
    for layer in mean.layers:
        wanted = mean_factor(clients, [c.samples for c in people], layer, "b", "nested")
        assert np.abs(rows_of(mean, layer, "b")[:2] - wanted[:2]).max() < 1e-3
        assert np.array_equal(rows_of(mean, layer, "b")[2:], rows_of(base, layer, "b")[2:])


@pytest.mark.parametrize("kind", ["separate", "product"])
def test_what_the_server_releases_every_client_takes_and_what_it_does_not_they_would_refuse(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, secret = encrypted(plan_of()) if kind == "separate" else parties("encrypted", negotiated_plan())
    people = Contributor(2, 30), Contributor(2, 50)
    outcomes = []
    for total in (10**k for k in range(2, 9)):
        with monkeypatch.context() as patch:
            try:
                message = released(session, secret, people, total)
            except TooFewError as error:
                assert "too little for a precise mean" in str(error)
                for module in ("aggregation", "product"):
                    patch.setattr(f"ciphertune.{module}.check_precise", lambda *_: 2)
                message = released(session, secret, people, total)
                outcomes.append(False)
            else:
                outcomes.append(True)
        with nullcontext() if outcomes[-1] else pytest.raises(RangeError, match="too little for a precise mean"):
            base = adapter_of(session.plan, 2, 0)
            exchange.unseal(wire.encode(message, session), session, secret, round_=0, rank=message.rank, base=base)
    assert outcomes == sorted(outcomes, reverse=True) and {True, False} == set(outcomes)
