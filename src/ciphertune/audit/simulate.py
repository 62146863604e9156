"""A few rounds of a federation in this process, written down as a run writes them: what a client would send.

The clients are the real ones, key and all; only Flower and the network are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ciphertune import client as clients
from ciphertune import wire
from ciphertune.federation import Federation, Member
from ciphertune.hello import parse_hello
from ciphertune.negotiation import parse_wish
from ciphertune.node import NodeSettings, node_settings
from ciphertune.runs import ServerFolder
from ciphertune.settings import Settings
from ciphertune.task import Terms

RUN = 1  # the number of a run that Flower knows nothing of


def simulate(settings: Settings, rounds: int, *, number: int | None = None, finish: bool = False) -> Path:
    """Run the clients of the settings, or one of them, for `rounds` rounds; returns the run folder.

    finish: let every client keep the last mean as its adapter. Raises CiphertuneError as a real run would.
    """
    people = range(len(settings.federation.clients)) if number is None else [number]
    if len(people) < settings.federation.min_contributors or len(people) < settings.federation.min_clients:
        few = replace(settings.federation, min_clients=1, min_contributors=1)
        settings = replace(settings, federation=few)
    settings = replace(settings, record_server_view=True)
    config = {"partition-id": 0, "num-partitions": len(settings.federation.clients)}
    nodes = [node_settings(settings, config, RUN, node_id=k, client=k, simulated=True) for k in people]
    folder = ServerFolder(nodes[0].folder.parents[1])
    folder.start(settings, "")
    federation = Federation(settings, RUN)
    hellos = [_answer("join", settings, n, {}, [])[0] for n in nodes]
    federation.settle([parse_hello(h, k, k) for k, h in enumerate(hellos)])
    for round_ in range(rounds):
        _round(settings, federation, folder, nodes, round_)
    for member, node in zip(federation.members, nodes, strict=True) if finish else ():
        task, payload = _message(federation, rounds, member, 0)
        _answer("evaluate", settings, node, task, payload)
    return folder.path


def _round(
    settings: Settings, federation: Federation, folder: ServerFolder, nodes: Sequence[NodeSettings], round_: int
) -> None:
    by_name = {n.name: n for n in nodes}
    if settings.method.negotiates and round_ == 0:
        widths = [x.n for x in federation.session.plan.layers]
        wishes = []
        for member in federation.members:
            values, _ = _answer("wish", settings, by_name[member.name], _task(federation, round_, 0, 0), [])
            wishes.append(parse_wish(member.name, member.hello.budget, values["columns"], widths))
        federation.negotiate(wishes)
    folder.plan(federation.session.plan, federation.members, {"round": round_} if settings.method.negotiates else None)
    total = federation.total(federation.members)
    sum_ = federation.open_round(round_, federation.members)
    for member in federation.members:
        task, payload = _message(federation, round_, member, total)
        update = _answer("train", settings, by_name[member.name], task, payload)[1][0]
        folder.view(round_, member.name, update)
        sum_.add(update, sender=member.number, who=federation.contributor(member))
        member.have = max(member.have, round_ - 1)
    aggregate = federation.close_round(sum_)
    folder.aggregate(round_, wire.encode(aggregate, federation.session))


def _answer(
    what: str, settings: Settings, node: NodeSettings, values: dict[str, Any], payload: list[bytes]
) -> tuple[dict[str, Any], list[bytes]]:
    task = clients.task_of(what, values)
    return clients.handle(what, clients.open_client(settings, node, RUN, task), task, payload)


def _message(federation: Federation, round_: int, member: Member, total: int) -> tuple[dict[str, Any], list[bytes]]:
    """A task with the aggregates that the member lacks."""
    lacking = federation.catch_up(member)
    payload = [wire.encode(m, link) for m, link in lacking]
    return _task(federation, round_, member.number, total, member.have, lacking), payload


def _task(
    federation: Federation,
    round_: int,
    sender: int,
    total: int,
    base: int = -1,
    lacking: Sequence[tuple[wire.Message, wire.Session]] = (),
) -> dict[str, Any]:
    plans = list(dict.fromkeys([federation.session.plan, *(link.plan for _, link in lacking)]))
    return {
        "round": round_,
        "rounds": federation.settings.federation.rounds,
        "sender": sender,
        "total": total,
        "shares": federation.shares(federation.members),
        "terms": [Terms.of(plan).plain() for plan in plans],
        "base": base,
        "aggregates": [[m.round, m.rank, plans.index(link.plan)] for m, link in lacking],
    }
