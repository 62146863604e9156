"""The straight line of a client: `seal` what it learned, `unseal` what all learned. Read this first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ciphertune import wire
from ciphertune.adapter import Adapter
from ciphertune.columns import Codes, basis_ranks, check_shape, in_column_order, join_columns, read_clear, split_columns
from ciphertune.crypto.base import blocks_for, check_range
from ciphertune.crypto.clear import parse
from ciphertune.crypto.indices import permutation
from ciphertune.crypto.secret import SecretPart
from ciphertune.errors import RangeError
from ciphertune.product import reach
from ciphertune.ranks import Contributor, divisors, reparameterise, to_mean
from ciphertune.split import Vector, join, join_heads, split

# of an entry of a mean; entries of trained factors are of the order of 0.01 to 1
_LARGEST_ERROR = 1e-3
# of an entry of M where nothing is encrypted: far above anything that training makes, far below overflow
_LARGEST_PRODUCT = 1e9


def seal(
    adapter: Adapter,
    session: wire.Session,
    secret: SecretPart,
    *,
    round_: int,
    sender: int,
    samples: int,
    total: int,
    tier: int = 0,
) -> bytes:
    """The update of one client, weighted by `samples / total` and encrypted, as bytes for the server.

    tier: of the plan's budgets, how much of A this client hides (method.aggregate=product).
    Raises RangeError for values that are not finite or exceed the session's bound, PlanMismatchError
    for an adapter of another shape.
    """
    if not 1 <= samples <= total:
        raise RangeError(f"weight {samples}/{total} is not between 0 and 1: the server's total is wrong")
    plan = session.plan
    for tensor in (*adapter.heads.values(), *(x for f in adapter.layers.values() for x in (f.a, f.b))):
        check_range(tensor, session.bound)
    factors, weight, rank = plan.factors(round_), samples / total, plan.shared(adapter.rank)
    if plan.aggregate == "product":
        _check_reach(adapter, session)
        clear, hidden = split_columns(adapter, plan, tier, codes_of(session, secret), weight)
    else:
        parts = split(adapter, plan, factors)
        clear, hidden = ([x * weight for x in part] for part in (parts.clear, parts.secret))
    message = wire.Message(
        kind=wire.UPDATE,
        factors=factors,
        round=round_,
        sender=sender,
        rank=rank,
        total=total,
        contributors=(Contributor(rank, samples, tier),),
        clear=b"".join(values.astype(session.clear.dtype).tobytes() for values in clear),
        secret=b"".join(secret.encrypt(values) for values in hidden),
    )
    return wire.encode(message, session)


def unseal(
    data: bytes, session: wire.Session, secret: SecretPart, *, round_: int, rank: int, base: Adapter
) -> tuple[Adapter, wire.Message]:
    """The mean of a round, written over `base`, and the message it came in.

    rank: components in the aggregate, at most the base's, or of a product what the server announced. Components and
    factors that did not travel keep the base's values. Raises WireError.
    """
    message = wire.decode(data, session, wire.Expected(wire.AGGREGATE, round_, 0, rank))
    clear, segments = parse(message.clear, session.clear.dtype), _decrypted(message, session, secret)
    _precise_enough(message, session)
    if session.plan.aggregate == "product":
        adapter = _from_product(clear, segments, message, session, codes_of(session, secret), base)
    else:
        packed = np.concatenate([clear, *segments])
        mean = to_mean(packed, session.plan, message.factors, message.contributors, message.total)
        adapter = join(mean, session.plan, message.factors, base)
    for tensor in (*adapter.heads.values(), *(x for f in adapter.layers.values() for x in (f.a, f.b))):
        if tensor.size and not np.abs(tensor).max() <= 2 * session.bound:
            raise _absurd(round_, session.bound)
    return adapter, message


def _within(values: Vector, largest: float) -> bool:
    return values.size == 0 or bool(np.abs(values).max() <= largest)  # false for NaN


def _absurd(round_: int, bound: float) -> RangeError:
    """An undetected wrong key, a wrapped sum or a forged total shows as absurd numbers, never as an exception."""
    return RangeError(f"the mean of round {round_} holds values above crypto.bound={bound:g}")


def codes_of(session: wire.Session, secret: SecretPart) -> list[Codes]:
    """The code of each column, per layer of the plan: the same for all holders of the key, another in each run."""
    material = secret.derive(f"column codes of run {session.run}".encode())
    return [permutation(material, x.name, x.n) for x in session.plan.layers]


def _from_product(
    clear: Vector,
    segments: Sequence[Vector],
    message: wire.Message,
    session: wire.Session,
    codes_by_layer: Sequence[Codes],
    base: Adapter,
) -> Adapter:
    """The best adapter of the base's rank for the summed products, divided by the weight that contributed."""
    plan, share = session.plan, sum(c.samples for c in message.contributors) / message.total
    check_shape(base, plan)
    tier, basis = max(c.tier for c in message.contributors), basis_ranks(plan, message.contributors)
    factors = read_clear(clear, plan, basis, tier)
    rows = np.stack(segments[1:]) if len(segments) > 1 else np.zeros((0, 0))
    layers = {}
    products = join_columns(factors, rows, plan, tier)
    for layer, found, m, codes in zip(plan.layers, factors, products, codes_by_layer, strict=True):
        # LAPACK may never return from infinite values; Q is orthonormal
        if not (_within(m / share, min(session.public.largest, _LARGEST_PRODUCT)) and _within(found.left, 1.01)):
            raise _absurd(message.round, session.bound)
        layers[layer.name] = reparameterise(found.left, in_column_order(m, codes) / share, base.layers[layer.name])
    return Adapter(layers, join_heads(segments[0] / share, plan, base))


def _check_reach(adapter: Adapter, session: wire.Session) -> None:
    """Refuse scaled factors above the bound, or whose product could wrap around the modulus. Raises RangeError."""
    for name, factors in adapter.layers.items():
        check_range(factors.b * factors.scale, session.bound)
        largest = session.bound * reach(factors.b * factors.scale)
        if largest > session.public.largest:
            raise RangeError(
                f"factor B of {name} could make products of {largest:.3g}, above the {session.public.largest:.3g} that "
                "the encryption parameters carry: training diverged, or lower crypto.bound for every client"
            )


def _precise_enough(message: wire.Message, session: wire.Session) -> None:
    """Refuse a sum whose weights are so small that dividing by them would raise the noise above the values."""
    people = message.contributors
    if session.plan.aggregate == "product":  # divided as a whole; coefficients and values of the order of 1
        shares = np.array([sum(c.samples for c in people) / message.total])
        noise = session.public.product_error_bound(1.0, 1.0, 1.0)
    else:
        shares = divisors(session.plan, people, message.total, message.rank)
        noise = session.public.error_bound(len(people), 1.0)
    if not shares.all() or noise / shares.min() > _LARGEST_ERROR:
        raise RangeError(
            f"the contributors of round {message.round} have {shares.min():.1e} of the weight that was asked: "
            "too little for a precise mean; a client states far too many samples, or too few replied"
        )


def _decrypted(message: wire.Message, session: wire.Session, secret: SecretPart) -> list[Vector]:
    """The values of each encrypted segment. Of a product all but the first, the heads, are combinations."""
    _, counted = wire.counts(session.plan, message.kind, message.factors, message.rank, message.contributors)
    found, at = [], 0
    for i, count in enumerate(counted):
        size = blocks_for(session.public, count) * session.public.block_bytes
        product = session.plan.aggregate == "product" and i > 0
        found.append(secret.decrypt(message.secret[at : at + size], count, product=product))
        at += size
    return found
