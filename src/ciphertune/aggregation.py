"""Aggregation on the server: additions of what it cannot read. Each rule states what it needs.

`separate`: the factors are summed apart. Needs no multiplication and no level; weights were applied by the clients.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ciphertune import wire
from ciphertune.crypto.clear import parse
from ciphertune.errors import FederationError, FormatError, RoundMismatchError
from ciphertune.ranks import Contributor


class SeparateSum:
    """The running sum of one round. Holds one sum, whatever the number of clients.

    session: the run.  round_: from 0.  total: samples of all clients asked, the denominator of every weight.
    """

    def __init__(self, session: wire.Session, round_: int, total: int) -> None:
        self._session, self._round, self._total = session, round_, total
        self._clear = session.clear.aggregator()
        self._secret = session.public.aggregator()
        self._contributors: dict[int, Contributor] = {}

    def add(self, data: bytes, *, sender: int, who: Contributor) -> wire.Message:
        """Check one update and add it. Raises WireError, leaving the sum as it was; a sender has one update."""
        if sender in self._contributors:
            raise RoundMismatchError(f"client {sender} has already contributed to round {self._round}")
        wire.check_contributors((*self._contributors.values(), who), self._total, self._session.plan)
        expected = wire.Expected(wire.UPDATE, self._round, sender, who.rank, self._total, who.samples)
        message = wire.decode(data, self._session, expected)
        clear = parse(message.clear, self._session.clear.dtype)  # both parts are good before either is added
        if clear.size and float(np.abs(clear).max()) > self._session.bound:
            raise FormatError(f"the clear part holds values above crypto.bound={self._session.bound:g}")
        self._secret.add(message.secret)
        self._clear.add(message.clear)
        self._contributors[sender] = who
        return message

    @property
    def contributors(self) -> int:
        """Updates in the sum."""
        return len(self._contributors)

    def release(self, minimum: int) -> wire.Message:
        """The aggregate, up to the largest tier to which at least `minimum` clients contributed.

        Raises FederationError when fewer than `minimum` contributed at all: the sum of one update *is* that update.
        """
        if self.contributors < max(1, minimum):
            raise FederationError(
                f"round {self._round}: {self.contributors} usable updates, fewer than federation.min_contributors="
                f"{minimum}; an aggregate of so few would show single updates to the others and is not released"
            )
        people = tuple(self._contributors[s] for s in sorted(self._contributors))
        whole = wire.Message(
            kind=wire.AGGREGATE,
            factors=self._session.plan.factors(self._round),
            round=self._round,
            sender=0,
            rank=max(c.rank for c in people),
            total=self._total,
            contributors=people,
            clear=self._clear.result(self._clear.blocks()),
            secret=self._secret.result(self._secret.blocks()),
        )
        return cut(whole, self._session, sorted((c.rank for c in people), reverse=True)[max(1, minimum) - 1])


def cut(message: wire.Message, session: wire.Session, rank: int) -> wire.Message:
    """The aggregate as a client that shares `rank` components needs it: a prefix of both parts."""
    rank = min(rank, message.rank)
    clear, secret = wire.sizes(session, message.factors, rank)
    return replace(message, rank=rank, clear=message.clear[:clear], secret=message.secret[:secret])
