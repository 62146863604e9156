"""Aggregation on the server: additions of what it cannot read. Each rule states what it needs.

`separate` (here): the factors are summed apart. Needs no multiplication and no level; weights were applied by the
clients. `product` (product.py): sums of products, in a basis that all clients share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ciphertune import wire
from ciphertune.crypto.clear import parse
from ciphertune.errors import DisagreementError, FormatError, RoundMismatchError, TooFewError
from ciphertune.precision import imprecise, precise_rank
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
        self._samples = 0
        self._mask = b""

    def add(self, data: bytes, *, sender: int, who: Contributor) -> wire.Message:
        """Check one update and add it. Raises WireError, leaving the sum as it was; a sender has one update."""
        if sender in self._contributors:
            raise RoundMismatchError(f"client {sender} has already contributed to round {self._round}")
        message, clear = opened(data, self._session, self._round, sender, who, self._total)
        check_weighted(clear, self._session.bound, message)  # all parts are good before any is added
        weight = message.contributors[0].samples / message.total
        check_norm([x / weight for x in (clear, readable(message, self._session))], self._session)
        wire.check_contributors(message.contributors, self._total - self._samples, self._session.plan)
        mask = self._agreed(message)
        self._secret.add(message.secret)
        self._clear.add(message.clear)
        self._mask = mask
        (self._contributors[sender],) = message.contributors
        self._samples += message.contributors[0].samples
        return message

    @property
    def extra(self) -> dict[str, dict[str, float]]:
        """What to write down about the round: sums are exact."""
        return {}

    def _agreed(self, message: wire.Message) -> bytes:
        """The mask of the round so far: equal bytes at all, or updates cannot be added. Raises DisagreementError."""
        shorter, longer = sorted((self._mask, message.mask), key=len)
        if longer[: len(shorter)] != shorter:
            raise DisagreementError(
                f"the mask of the update (digest {_digest(message.mask)}) is not that of the others in this round "
                f"(digest {_digest(self._mask)}): its client holds another aggregate than they do"
            )
        return longer

    @property
    def contributors(self) -> int:
        """Updates in the sum."""
        return len(self._contributors)

    def release(self, minimum: int) -> wire.Message:
        """The aggregate, up to the largest tier to which at least `minimum` clients contributed and whose mean is
        precise.

        Raises TooFewError when fewer than `minimum` contributed at all: the sum of one update *is* that update. Also
        when no mean would be precise, and every client would refuse it.
        """
        if self.contributors < max(1, minimum):
            raise too_few(self._round, self.contributors, minimum)
        people = tuple(self._contributors[s] for s in sorted(self._contributors))
        precise = check_precise(self._session, self._round, people, self._total)
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
            mask=self._mask,
        )
        shared = sorted((c.rank for c in people), reverse=True)[max(1, minimum) - 1]
        return cut(whole, self._session, min(shared, precise))


def opened(
    data: bytes, session: wire.Session, round_: int, sender: int, who: Contributor, total: int
) -> tuple[wire.Message, npt.NDArray[np.float64]]:
    """An update and the values of its clear part, all within the bound. Raises WireError.

    who: what it counts as; where clients are weighted by a norm that only they know, its samples are the most allowed.
    """
    known = None if session.plan.weighting == "norm" else who.samples
    message = wire.decode(data, session, wire.Expected(wire.UPDATE, round_, sender, who.rank, total, known, who.tier))
    if message.contributors[0].samples > who.samples:
        raise FormatError(f"the update is weighted by {message.contributors[0].samples}, the most is {who.samples}")
    clear = parse(message.clear, session.clear.dtype)
    if clear.size and float(np.abs(clear).max()) > session.bound:
        raise FormatError(f"the clear part holds values above crypto.bound={session.bound:g}")
    if not session.public.encrypts:  # what would be encrypted can be looked at as well
        check_weighted(readable(message, session), session.bound, message)
    return message, clear


def _digest(mask: bytes) -> str:
    return hashlib.sha256(mask).hexdigest()[:16]


def check_weighted(values: npt.NDArray[np.float64], bound: float, message: wire.Message) -> None:
    """Raise FormatError unless values that a client weighted are within the bound times its weight.

    values: (count,), as they travel.  bound: crypto.bound, in the units of the factors before weighting.  message: the
    update that they are of, whose `samples / total` is the weight.
    """
    most = bound * message.contributors[0].samples / message.total
    if values.size and float(np.abs(values).max()) > most * (1 + 1e-6):  # rounding to float32
        raise FormatError(f"the message holds values above crypto.bound={bound:g} times the client's weight")


def readable(message: wire.Message, session: wire.Session) -> npt.NDArray[np.float64]:
    """The values of the secret part where nothing is encrypted."""
    return np.zeros(0) if session.public.encrypts else parse(message.secret, session.clear.dtype)


def check_norm(parts: Sequence[npt.NDArray[np.float64]], session: wire.Session) -> None:
    """Raise FormatError when the L2 norm of what can be read of an update is above `session.max_norm`; 0 allows any.

    parts: arrays of any shapes whose entries count together, in the units of the factors: without the client's weight.
    """
    norm = float(np.sqrt(sum(np.square(x).sum() for x in parts)))
    if session.max_norm and not norm <= session.max_norm * (1 + 1e-5):  # rounding to float32
        raise FormatError(
            f"what can be read of the update has norm {norm:.4g}, above federation.max_norm={session.max_norm:g}"
        )


def too_few(round_: int, found: int, minimum: int) -> TooFewError:
    """Why an aggregate is not released."""
    return TooFewError(
        f"round {round_ + 1}: {found} usable updates, fewer than federation.min_contributors="
        f"{minimum}; an aggregate of so few would show single updates to the others and is not released"
    )


def check_precise(session: wire.Session, round_: int, people: Sequence[Contributor], total: int) -> int:
    """The components of which a mean is precise. Raises TooFewError when there is none."""
    if not (found := precise_rank(session, round_, people, total)):
        raise TooFewError(f"round {round_ + 1}: nothing is released: {imprecise(session, round_, people, total, 1)}")
    return found


def cut(message: wire.Message, session: wire.Session, rank: int) -> wire.Message:
    """The aggregate as a client that shares `rank` components needs it: a prefix of both parts, or all of a product."""
    if session.plan.aggregate != "separate":
        return message
    rank = min(rank, message.rank)
    clear, secret, mask = wire.sizes(session, message.kind, message.round, rank, message.contributors)
    return replace(
        message, rank=rank, clear=message.clear[:clear], secret=message.secret[:secret], mask=message.mask[:mask]
    )
