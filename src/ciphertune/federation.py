"""Who takes part, on the server's side: admission, the plan, weights, and what each client still has to be sent."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ciphertune import wire
from ciphertune.aggregation import SeparateSum, cut
from ciphertune.build import make_plan, public_part, round_sum, session
from ciphertune.errors import (
    CiphertuneError,
    FederationError,
    FormatError,
    KeyMismatchError,
    ParameterMismatchError,
    PlanMismatchError,
    SettingsMismatchError,
)
from ciphertune.hello import Hello
from ciphertune.negotiation import Negotiated, Wish, negotiate
from ciphertune.plan import FACTORS, Plan
from ciphertune.product import ProductSum
from ciphertune.ranks import LARGEST_NORM, Contributor, tier_shares
from ciphertune.settings import Settings
from ciphertune.versions import code_digest

RoundSum = SeparateSum | ProductSum


@dataclass
class Member:
    """An admitted client. number: its sender id on the wire, from 1. have: the last round whose mean it holds.

    silent: the last round that it was asked in was closed without an update of its own.
    """

    number: int
    hello: Hello
    have: int = -1
    silent: bool = False

    @property
    def name(self) -> str:
        """Its name in logs and files."""
        return self.hello.name


class Federation:
    """Members, plan and history of one run. Holds nothing secret."""

    def __init__(self, settings: Settings, run: int) -> None:
        self.settings, self.run = settings, run
        self._digest = settings.digest().hex()
        self.members: list[Member] = []
        self.excluded: dict[str, str] = {}  # name -> why
        self._session: wire.Session | None = None
        # oldest first; only what some client might still need, each with the plan it was made under
        self.history: list[tuple[wire.Message, Plan]] = []
        self.next_round = 0  # the first that has no aggregate yet

    @property
    def settled(self) -> bool:
        """Whether there is a plan."""
        return self._session is not None

    @property
    def session(self) -> wire.Session:
        """What all messages are bound to, once the plan is made."""
        assert self._session is not None
        return self._session

    @session.setter
    def session(self, session: wire.Session) -> None:
        self._session = session

    def settle(self, hellos: Sequence[Hello]) -> list[tuple[Hello, str]]:
        """Make the plan from the first greetings, unless there is one. Returns those left out, each with the reason.

        Clients with different keys, models or starting points cannot be summed; the largest group that agrees stays.
        Raises FederationError when there is no largest one.
        """
        agreed = self.fitting(hellos)
        if not self.settled:
            self.session = self._agree(hellos)
        refused: list[tuple[Hello, str]] = []
        for hello in sorted(hellos, key=lambda h: h not in agreed):  # whoever comes first sets what all start from
            try:
                self.admit(hello, [h.node_id for h in hellos])
            except CiphertuneError as error:
                refused.append((hello, str(error)))
        return refused

    def fitting(self, hellos: Sequence[Hello]) -> list[Hello]:
        """Those that can work together, one per name: under the plan, or before there is one the largest group.

        None while two groups are the largest.
        """
        if self.settled:
            return list({h.name: h for h in hellos if self._refusal(h) is None}.values())
        groups = [*self._groups(hellos), list[Hello](), list[Hello]()]
        return groups[0] if len(groups[0]) > len(groups[1]) else []

    def _groups(self, hellos: Sequence[Hello]) -> list[list[Hello]]:
        """Those that agree with each other, largest group first; with the server, too, unless nobody does."""
        ours = [h for h in hellos if (h.settings, h.code, h.parameters) == self._own]
        found: dict[tuple[Any, ...], dict[str, Hello]] = {}
        for hello in ours or hellos:
            found.setdefault(_common(hello), {}).setdefault(hello.name, hello)
        return sorted((list(group.values()) for group in found.values()), key=len, reverse=True)

    @cached_property
    def _own(self) -> tuple[str, str, str]:
        """Settings, code and parameters of this server."""
        return self._digest, code_digest(), public_part(self.settings.crypto).digest().hex()

    def _agree(self, hellos: Sequence[Hello]) -> wire.Session:
        """What the largest group of clients that agree have in common."""
        agreed, *others = self._groups(hellos)
        first = agreed[0]
        if others and len(others[0]) == len(agreed):
            raise FederationError(f"the clients do not agree and no side is larger: {_difference(others[0][0], first)}")
        plan = make_plan(self.settings, first.layers, first.heads, self._tiers([h.rank for h in agreed]))
        found = session(self.settings, plan, run=self.run, key_fingerprint=first.key)
        if first.parameters != self._own[2]:
            raise FederationError("the clients' encryption library or parameters differ from the server's")
        return found

    def _tiers(self, present: Sequence[int]) -> tuple[int, ...]:
        """The ranks to which enough clients reach for an aggregate to be released.

        Raises FederationError when the clients are fewer than that.
        """
        enough = self.settings.federation.min_contributors
        if self.settings.method.aggregate != "separate" and len(present) >= enough:
            # every component of everybody is in the one sum, but one client must not decide what all have to carry
            reached = sorted(present)[-enough]
            return tuple(sorted({min(r, 2 * reached) for r in present}))
        if self.settings.method.common:  # what these reach everybody has to hold
            present = [min(r, self.settings.most_held) for r in present]
        tiers = tuple(t for t in sorted(set(present)) if sum(r >= t for r in present) >= enough)
        if not tiers:
            raise FederationError(
                f"{len(present)} clients can work together, fewer than federation.min_contributors={enough}"
            )
        return tiers

    def admit(self, hello: Hello, online: Collection[int]) -> Member:
        """Take in one client under the settled plan, or take it back on a new node. Raises the error that says why not.

        online: ids of the nodes that are connected now.
        """
        if refusal := self._refusal(hello):
            raise refusal
        known = next((m for m in self.members if m.name == hello.name), None)
        if known is None:
            known = Member(len(self.members) + 1, hello)
            self.members.append(known)
        elif known.hello.node_id in online:
            raise FormatError(f"another node is called {hello.name} already: give each its own name in --node-config")
        else:  # the same client on a node that was started anew
            known.hello, known.have = hello, -1
        return known

    def _refusal(self, hello: Hello) -> CiphertuneError | None:
        """Why a client cannot take part under the settled plan, on whichever node it is."""
        plan = self.session.plan
        if hello.settings != self._digest:
            return SettingsMismatchError(f"{hello.name} runs under other settings than the server")
        if hello.code != code_digest():
            return SettingsMismatchError(
                f"{hello.name} runs other code ({hello.code}) than the server ({code_digest()}): install one version"
            )
        if hello.key != self.session.key_fingerprint:
            return KeyMismatchError(
                f"{hello.name} holds key {hello.key.hex()}, the others hold {self.session.key_fingerprint.hex()}: "
                "give it the key file of the others"
            )
        if hello.parameters != self._own[2]:
            return ParameterMismatchError(f"{hello.name} encrypts under other parameters than the server")
        if (hello.layers, hello.heads) != (plan.layers, plan.heads):
            return PlanMismatchError(f"{hello.name} adapts other layers than the plan: check its model and targets")
        if not plan.shared(hello.rank):
            return PlanMismatchError(f"{hello.name} has rank {hello.rank}, below the plan's lowest, {plan.tiers[0]}")
        if self.members and hello.initial != self.members[0].hello.initial:
            return PlanMismatchError(f"{hello.name} starts from another adapter: check its model and seed")
        if hello.name in self.excluded:
            return FederationError(f"{hello.name} is excluded from this run: {self.excluded[hello.name]}")
        known = next((m for m in self.members if m.name == hello.name), None)
        if known and known.hello.identity not in ("", hello.identity):
            return FormatError(
                f"another client has joined this run as {hello.name}: give each its own name in --node-config; a node "
                "that lost its run folder is another client, too"
            )
        return None

    def negotiate(self, wishes: Sequence[Wish]) -> Negotiated:
        """Make the plan anew with the columns that follow from these wishes. Raises FederationError for too few."""
        if len(wishes) < self.settings.federation.min_contributors:
            raise FederationError(
                f"{len(wishes)} clients said which columns they want encrypted, fewer than "
                f"federation.min_contributors={self.settings.federation.min_contributors}"
            )
        plan = self.session.plan
        found = negotiate([x.n for x in plan.layers], wishes)
        self.session = replace(self.session, plan=replace(plan, budgets=found.budgets, columns=found.columns))
        return found

    @property
    def admitted(self) -> list[Member]:
        """The members that are not excluded."""
        return [m for m in self.members if m.name not in self.excluded]

    def covered(self, member: Member) -> bool:
        """Whether the plan has a budget as large as this member's."""
        plan = self.session.plan
        return not plan.negotiates or member.hello.budget <= max(plan.budgets, default=-1.0)

    def sample(self, round_: int, available: Sequence[Member]) -> list[Member]:
        """The clients asked in a round: a share of the available ones, at least `min_contributors`. The same ones when
        the round is begun again.
        """
        federation = self.settings.federation
        wanted = max(federation.min_contributors, round(federation.fraction * len(available)))
        if self.settings.crypto.packed:
            wanted = min(wanted, self.settings.crypto.max_updates)
        draw = random.Random(f"{self.settings.seed} {round_}")  # noqa: S311 - sampling of clients, not a secret
        chosen = draw.sample(list(available), min(wanted, len(available)))
        return sorted(chosen, key=lambda m: m.number)

    def open_round(self, round_: int, chosen: Sequence[Member]) -> RoundSum:
        """An empty sum for the round."""
        return round_sum(self.session, round_, self.total(chosen))

    def total(self, chosen: Sequence[Member]) -> int:
        """The denominator of a round's weights."""
        return sum(self.contributor(m).samples for m in chosen)

    def shares(self, chosen: Sequence[Member]) -> tuple[float, ...]:
        """Per tier of ranks, what share of the weight of `chosen` trains its components."""
        people, silent = [self.contributor(m) for m in chosen], [m.silent for m in chosen]
        return tier_shares(self.session.plan.tiers, people, silent)

    def close_round(self, sum_: RoundSum) -> wire.Message:
        """Release the aggregate and remember it. Raises FederationError when too few contributed."""
        aggregate = sum_.release(self.settings.federation.min_contributors)
        self.history.append((aggregate, self.session.plan))
        self.history = _needed(self.history, -1, self.session.plan.tiers[-1])
        self.next_round = aggregate.round + 1
        return aggregate

    def catch_up(self, member: Member) -> list[tuple[wire.Message, wire.Session]]:
        """The aggregates this member lacks, oldest first, each cut to what it holds, and the session of each."""
        rank = self.session.plan.held(self.contributor(member).rank)
        found = [(m, replace(self.session, plan=p)) for m, p in _needed(self.history, member.have, rank)]
        return [(cut(m, session, rank), session) for m, session in found]

    def contributor(self, member: Member) -> Contributor:
        """What a member's update counts as: the components it shares, its weight, its tier of budgets."""
        plan, hello = self.session.plan, member.hello
        tier = plan.tier(hello.budget) if self.covered(member) else 0
        weight = hello.samples if plan.weighting == "samples" else LARGEST_NORM
        return Contributor(plan.shared(hello.rank), weight, tier)


def _needed(history: Sequence[tuple[wire.Message, Plan]], have: int, rank: int) -> list[tuple[wire.Message, Plan]]:
    """Those after round `have` that still hold the newest value of some factor's component below `rank`."""
    covered = dict.fromkeys(FACTORS, 0)
    found: list[tuple[wire.Message, Plan]] = []
    for message, plan in reversed(history):
        if message.round <= have or (found and plan.aggregate == "product"):  # the last product replaces everything
            break
        if plan.aggregate == "stack":  # and every stack is merged
            found.append((message, plan))
        elif any(min(message.rank, rank) > covered[f] for f in message.factors):
            found.append((message, plan))
            for factor in message.factors:
                covered[factor] = max(covered[factor], min(message.rank, rank))
    return found[::-1]


def _common(hello: Hello) -> tuple[Any, ...]:
    return hello.key, hello.parameters, hello.settings, hello.code, hello.initial, hello.layers, hello.heads


def _difference(one: Hello, two: Hello) -> str:
    if one.key != two.key:
        return f"{one.name} holds key {one.key.hex()}, {two.name} holds {two.key.hex()}: give all clients one key file"
    if one.settings != two.settings or one.code != two.code:
        return f"{one.name} and {two.name} run under different settings or code"
    if one.parameters != two.parameters:
        return f"{one.name} and {two.name} encrypt under different parameters"
    return f"{one.name} and {two.name} start from different models or adapters"
