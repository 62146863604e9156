"""The straight line of a client: `seal` what it learned, `unseal` what all learned. Read this first."""

from __future__ import annotations

import numpy as np

from ciphertune import wire
from ciphertune.adapter import Adapter
from ciphertune.crypto.clear import parse
from ciphertune.crypto.secret import SecretPart, check_range
from ciphertune.errors import RangeError
from ciphertune.ranks import Contributor, to_mean
from ciphertune.split import Parts, counts, join, split


def seal(
    adapter: Adapter,
    session: wire.Session,
    secret: SecretPart,
    *,
    round_: int,
    sender: int,
    samples: int,
    total: int,
) -> bytes:
    """The update of one client, weighted by `samples / total` and encrypted, as bytes for the server.

    Raises RangeError for values that are not finite or exceed the session's bound, PlanMismatchError
    for an adapter of another shape.
    """
    if not 1 <= samples <= total:
        raise RangeError(f"weight {samples}/{total} is not between 0 and 1: the server's total is wrong")
    factors = session.plan.factors(round_)
    parts = split(adapter, session.plan, factors)
    check_range(parts.clear, session.bound)
    check_range(parts.secret, session.bound)
    weight = samples / total
    message = wire.Message(
        kind=wire.UPDATE,
        factors=factors,
        round=round_,
        sender=sender,
        rank=adapter.rank,
        total=total,
        contributors=(Contributor(adapter.rank, samples),),
        clear=(parts.clear * weight).astype(session.clear.dtype).tobytes(),
        secret=secret.encrypt(parts.secret * weight) if parts.secret.size else b"",
    )
    return wire.encode(message, session)


def unseal(
    data: bytes, session: wire.Session, secret: SecretPart, *, round_: int, rank: int, base: Adapter
) -> tuple[Adapter, wire.Message]:
    """The mean of a round, written over `base`, and the message it came in.

    rank: of the aggregate's prefix, at most the base's. Components that nobody contributed keep the base's values, and
    so do factors that did not travel. Raises WireError.
    """
    message = wire.decode(data, session, wire.Expected(wire.AGGREGATE, round_, 0, rank))
    clear_count, secret_count = counts(session.plan, message.factors, rank)
    clear = parse(message.clear, session.clear.dtype)
    hidden = secret.decrypt(message.secret, secret_count) if secret_count else np.zeros(0)
    args = (session.plan, message.factors, message.contributors, message.total)
    parts = Parts(to_mean(clear, *args) if clear_count else clear, to_mean(hidden, *args) if secret_count else hidden)
    for part in (parts.clear, parts.secret):
        # an undetected wrong key, a wrapped sum or a false total shows as absurd numbers, never as an exception
        if part.size and not np.abs(part).max() <= 2 * session.bound:
            raise RangeError(f"the mean of round {round_} holds values above crypto.bound={session.bound:g}")
    return join(parts, session.plan, message.factors, base), message
