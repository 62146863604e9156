"""The straight line of a client: `seal` what it learned, `unseal` what all learned. Read this first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ciphertune import wire
from ciphertune.adapter import Adapter
from ciphertune.crypto.base import blocks_for, check_range
from ciphertune.crypto.clear import parse
from ciphertune.crypto.secret import SecretPart
from ciphertune.errors import RangeError
from ciphertune.ranks import Contributor, divisors, to_mean
from ciphertune.split import counts, join, split

# of an entry of a mean; entries of trained factors are of the order of 0.01 to 1
_LARGEST_ERROR = 1e-3


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
    for tensor in (*adapter.heads.values(), *(x for f in adapter.layers.values() for x in (f.a, f.b))):
        check_range(tensor, session.bound)
    weight, rank = samples / total, session.plan.shared(adapter.rank)
    message = wire.Message(
        kind=wire.UPDATE,
        factors=factors,
        round=round_,
        sender=sender,
        rank=rank,
        total=total,
        contributors=(Contributor(rank, samples),),
        clear=b"".join((values * weight).astype(session.clear.dtype).tobytes() for values in parts.clear),
        secret=b"".join(secret.encrypt(values * weight) for values in parts.secret),
    )
    return wire.encode(message, session)


def unseal(
    data: bytes, session: wire.Session, secret: SecretPart, *, round_: int, rank: int, base: Adapter
) -> tuple[Adapter, wire.Message]:
    """The mean of a round, written over `base`, and the message it came in.

    rank: components in the aggregate, at most the base's. The others keep the base's values, and so do factors that did
    not travel. Raises WireError.
    """
    message = wire.decode(data, session, wire.Expected(wire.AGGREGATE, round_, 0, rank))
    packed = np.concatenate([parse(message.clear, session.clear.dtype), *_decrypted(message, session, secret)])
    _precise_enough(message, session)
    mean = to_mean(packed, session.plan, message.factors, message.contributors, message.total)
    if mean.size and not np.abs(mean).max() <= 2 * session.bound:
        # an undetected wrong key, a wrapped sum or a forged total shows as absurd numbers, never as an exception
        raise RangeError(f"the mean of round {round_} holds values above crypto.bound={session.bound:g}")
    return join(mean, session.plan, message.factors, base), message


def _precise_enough(message: wire.Message, session: wire.Session) -> None:
    """Refuse a sum whose weights are so small that dividing by them would raise the noise above the values."""
    shares = divisors(session.plan, message.contributors, message.total, message.rank)
    noise = session.public.error_bound(len(message.contributors), 1.0)
    if not shares.all() or noise / shares.min() > _LARGEST_ERROR:
        raise RangeError(
            f"the contributors of round {message.round} have {shares.min():.1e} of the weight that was asked: "
            "too little for a precise mean; a client states far too many samples, or too few replied"
        )


def _decrypted(message: wire.Message, session: wire.Session, secret: SecretPart) -> list[npt.NDArray[np.float64]]:
    """The values of each encrypted segment."""
    _, counted = counts(session.plan, message.factors, message.rank)
    found, at = [], 0
    for count in counted:
        size = blocks_for(session.public, count) * session.public.block_bytes
        found.append(secret.decrypt(message.secret[at : at + size], count))
        at += size
    return found
