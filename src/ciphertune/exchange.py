"""The straight line of a client: `seal` what it learned, `unseal` what all learned. Read this first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ciphertune import pruning, wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.columns import (
    Codes,
    aggregate_tier,
    basis_ranks,
    in_column_order,
    join_columns,
    read_clear,
    split_columns,
)
from ciphertune.crypto import masks
from ciphertune.crypto.base import blocks_for, check_range, mask_bytes
from ciphertune.crypto.clear import parse
from ciphertune.crypto.indices import permutation
from ciphertune.crypto.secret import SecretPart
from ciphertune.errors import FormatError, PlanMismatchError, RangeError
from ciphertune.plan import Plan
from ciphertune.precision import imprecise, precise_rank
from ciphertune.product import reach
from ciphertune.ranks import Contributor, reparameterise, to_mean
from ciphertune.split import Vector, check_shape, head_size, join, join_heads, pack

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
    guide: Adapter | None = None,
) -> bytes:
    """The update of one client, weighted by `samples / total` and encrypted, as bytes for the server.

    tier: of the plan's budgets, how much of A this client hides (method.aggregate=product).  guide: what a mask shared
    by all clients follows from: the last mean, or for select=entries its change since the start; the same at all.
    Raises RangeError for values that are not finite or exceed the session's bound, PlanMismatchError
    for an adapter of another shape.
    """
    if not 1 <= samples <= total:
        raise RangeError(f"weight {samples}/{total} is not between 0 and 1: the server's total is wrong")
    plan = session.plan
    for tensor in (*adapter.heads.values(), *(x for f in adapter.layers.values() for x in (f.a, f.b))):
        check_range(tensor, session.bound)
    _check_norm(adapter, session, round_)
    factors, weight, rank = plan.factors(round_), samples / total, plan.shared(adapter.rank)
    mask = b""
    if plan.aggregate == "separate":
        packed = pack(adapter, plan, factors)
        keep = _kept(packed, guide, plan, round_, rank)
        clear, hidden = pruning.divide(packed, weight, plan, round_, rank, keep)
        if keep is not None and plan.left_out(round_):
            mask = _closed(keep, session, secret, round_, rank)
    else:
        _check_reach(adapter, session)
        clear, hidden = split_columns(adapter, plan, tier, codes_of(session, secret), weight)
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
        mask=mask,
    )
    return wire.encode(message, session)


def unseal(
    data: bytes, session: wire.Session, secret: SecretPart, *, round_: int, rank: int, base: Adapter
) -> tuple[Adapter, wire.Message]:
    """The mean of a round, written over `base`, and the message it came in; of stacks, an adapter to be merged.

    rank: components in the aggregate, at most the base's, or of a product what the server announced. Components and
    factors that did not travel keep the base's values. Raises WireError.
    """
    message = wire.decode(data, session, wire.Expected(wire.AGGREGATE, round_, 0, rank))
    clear, segments = parse(message.clear, session.clear.dtype), _decrypted(message, session, secret)
    people, needed = message.contributors, max(1, message.rank)
    if precise_rank(session, round_, people, message.total) < needed:
        raise RangeError(imprecise(session, round_, people, message.total, needed))
    if session.plan.aggregate != "separate":
        adapter = _from_product(clear, segments, message, session, codes_of(session, secret), base)
    else:
        keep = _opened(message, session, secret)
        packed, weights = pruning.unite(clear, segments, session.plan, round_, message.rank, keep)
        if weights is None:
            mean = to_mean(packed, session.plan, message.factors, message.contributors, message.total)
        else:  # half of the smallest weight is zero with the noise of encryption
            least = min(c.samples for c in people) / message.total / 2
            mean = np.where(weights > least, packed / np.maximum(weights, least), 0.0)
        adapter = join(mean, session.plan, message.factors, base)
    # a mean of values within the bound is within it; factors of a product are made anew
    most = session.bound * (1.01 if session.plan.aggregate == "separate" else 2.0)
    for tensor in (*adapter.heads.values(), *(x for f in adapter.layers.values() for x in (f.a, f.b))):
        if tensor.size and not np.abs(tensor).max() <= most:
            raise _absurd(round_, session.bound)
    return adapter, message


def enough(message: wire.Message, plan: Plan, minimum: int) -> None:
    """Refuse what an honest server would not have released; a lying one can still name more than there were."""
    needed = message.rank if plan.aggregate == "separate" else 1
    if sum(c.rank >= needed for c in message.contributors) < minimum:
        raise PlanMismatchError(f"the aggregate of round {message.round} has fewer than {minimum} contributors")


def _within(values: Vector, largest: float) -> bool:
    return values.size == 0 or bool(np.abs(values).max() <= largest)  # false for NaN


def _absurd(round_: int, bound: float) -> RangeError:
    """An undetected wrong key, a wrapped sum or a forged total shows as absurd numbers, never as an exception."""
    return RangeError(f"the mean of round {round_} holds values above crypto.bound={bound:g}")


def _kept(packed: Vector, guide: Adapter | None, plan: Plan, round_: int, rank: int) -> pruning.Mask | None:
    """The entries that a round's pruning or selection leaves, None where it leaves all."""
    factors = plan.factors(round_)
    if rate := plan.left_out(round_):
        if guide is None:
            raise PlanMismatchError(f"this node holds no mean from which the mask of round {round_} would follow")
        return pruning.choose(pack(guide, plan, factors), plan, factors, rank, rate)
    if plan.prune == "own" and (rate := plan.rate(round_)):
        return pruning.choose(packed, plan, factors, rank, rate)
    return None


def _closed(keep: pruning.Mask, session: wire.Session, secret: SecretPart, round_: int, rank: int) -> bytes:
    """The mask as it travels: per tier, without the heads."""
    bits, out = keep[head_size(session.plan) :], b""
    for tier, entries in enumerate(pruning.mask_entries(session.plan, session.plan.factors(round_), round_, rank)):
        out += masks.close(bits[:entries], _mask_key(secret), _mask_context(session, round_, tier))
        bits = bits[entries:]
    return out


def _opened(message: wire.Message, session: wire.Session, secret: SecretPart) -> pruning.Mask | None:
    """The mask of an aggregate, None where there is none. Raises FormatError."""
    entries = pruning.mask_entries(session.plan, message.factors, message.round, message.rank)
    if not entries:
        return None
    found, at = [np.ones(head_size(session.plan), bool)], 0
    for tier, count in enumerate(entries):
        data = message.mask[at : at + mask_bytes(count)]
        found.append(masks.open_(data, count, _mask_key(secret), _mask_context(session, message.round, tier)))
        at += mask_bytes(count)
    counted = wire.counts(session.plan, message.kind, message.round, message.rank, message.contributors)[1]
    if [int(bits.sum()) for bits in found[1:]] != [counted[0] - head_size(session.plan), *counted[1:]]:
        raise FormatError("the message's mask leaves another number of entries than the plan")
    return np.concatenate(found)


def _mask_key(secret: SecretPart) -> bytes:
    return secret.derive(b"mask, first half") + secret.derive(b"mask, second half")


def _mask_context(session: wire.Session, round_: int, tier: int) -> bytes:
    return f"run {session.run} round {round_} tier {tier}".encode()


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
    """The summed products, divided by the weight that contributed, as the best adapter of the base's rank; where
    they are to be merged, as an adapter of all components.
    """
    plan, share = session.plan, sum(c.samples for c in message.contributors) / message.total
    check_shape(base, plan)
    tier, basis = aggregate_tier(plan, message.contributors), basis_ranks(plan, message.contributors)
    factors = read_clear(clear, plan, basis, tier)
    rows = np.stack(segments[1:]) if len(segments) > 1 else np.zeros((0, 0))
    layers = {}
    products = join_columns(factors, rows, plan, tier)
    for layer, found, m, codes in zip(plan.layers, factors, products, codes_by_layer, strict=True):
        # LAPACK may never return from infinite values; a basis is orthonormal
        most = session.bound * 1.01 if plan.fit_rank == "merge" else 1.01
        if not (_within(m / share, min(session.public.largest, _LARGEST_PRODUCT)) and _within(found.left, most)):
            raise _absurd(message.round, session.bound)
        old, mean = base.layers[layer.name], in_column_order(m, codes) / share
        if plan.fit_rank == "merge":
            layers[layer.name] = LoraFactors(mean, found.left / old.scale, old.scale)
        else:
            layers[layer.name] = reparameterise(found.left, mean, old)
    return Adapter(layers, join_heads(segments[0] / share, plan, base))


def _check_norm(adapter: Adapter, session: wire.Session, round_: int) -> None:
    """Refuse an update above the norm that the server would leave this client out for. Raises RangeError."""
    factors = session.plan.factors(round_)
    parts = [x for f in adapter.layers.values() for x in (("a" in factors) * f.a, ("b" in factors) * f.b)]
    if session.plan.aggregate != "separate":
        parts = [x for f in adapter.layers.values() for x in (f.a, f.scale * f.b)]
    norm = math.sqrt(sum(float(np.square(x, dtype=np.float64).sum()) for x in (*parts, *adapter.heads.values())))
    if session.max_norm and norm > session.max_norm:
        raise RangeError(
            f"the update has norm {norm:.4g}, above federation.max_norm={session.max_norm:g}: training diverged, or "
            "raise it for every client"
        )


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


def _decrypted(message: wire.Message, session: wire.Session, secret: SecretPart) -> list[Vector]:
    """The values of each encrypted segment. Of a product all but the first, the heads, are combinations."""
    _, counted = wire.counts(session.plan, message.kind, message.round, message.rank, message.contributors)
    found, at = [], 0
    terms = wire.terms_of(session.plan, message.round, message.contributors, len(counted))
    for i, count in enumerate(counted):
        size = blocks_for(session.public, count) * session.public.sum_bytes(terms[i])
        product = session.plan.aggregate == "product" and i > 0
        found.append(secret.decrypt(message.secret[at : at + size], count, terms=terms[i], product=product))
        at += size
    return found
