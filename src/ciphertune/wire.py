"""Message <-> bytes. Everything is checked before anything is used: lengths follow from the plan, never from the bytes.

    offset  size
       0      8   magic "CTUNE" 0 0 2 (wire version 2)
       8      1   kind: 1 update (client to server), 2 aggregate (server to client)
       9      1   factors: 0 none, 1 a, 2 b, 3 both
      10     16   digest of the encryption parameters
      26     16   key fingerprint (zeros without a key)
      42     16   digest of the plan
      58     16   digest of the settings
      74      8   run
      82      4   round
      86      4   sender: the number the server gave the client, 0 for the server
      90      4   rank: the components in the message, a tier of the plan; of a product the contributors' largest rank
      94      8   total: samples of all clients asked this round; weights are samples / total
     102      4   number of contributors k (1 in an update)
     106   16*k   rank 4, tier of budgets 4, samples 8 of each contributor
       ?      ?   clear part: as many values as the plan says
       ?      ?   secret part: whole blocks, as many as each segment of the plan needs
       ?      ?   mask: where the clients share one, per tier, encrypted for the clients (crypto/masks.py)
      -32     32  SHA-256 of all that precedes (against damage; authenticity is the transport's task)
All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from ciphertune import columns, pruning
from ciphertune.crypto.base import PublicPart, blocks_for, mask_bytes
from ciphertune.crypto.clear import ClearPublic
from ciphertune.errors import (
    FormatError,
    KeyMismatchError,
    ParameterMismatchError,
    PlanMismatchError,
    RoundMismatchError,
    SettingsMismatchError,
)
from ciphertune.plan import Factor, Plan
from ciphertune.ranks import Contributor
from ciphertune.split import Counts

MAGIC = b"CTUNE\0\0\2"
UPDATE, AGGREGATE = 1, 2
_HEAD = struct.Struct("<8sBB16s16s16s16sQIIIQI")
_CONTRIBUTOR = struct.Struct("<IIQ")
_FACTORS: dict[tuple[Factor, ...], int] = {(): 0, ("a",): 1, ("b",): 2, ("a", "b"): 3}
_DIGEST = 32
_MAX_CONTRIBUTORS = 1_000_000
_ONE_KEY = (
    "; a run keeps the key it began with: put that key file back on the node (`ciphertune keys rotate` keeps the old "
    "one beside the new), or start a new run"
)


@dataclass(frozen=True)
class Session:
    """What all messages of a run have in common. Public."""

    run: int
    plan: Plan
    settings_digest: bytes
    key_fingerprint: bytes
    public: PublicPart  # of the secret part
    clear: ClearPublic  # of the clear part
    bound: float  # largest absolute value of an update, hence of a weighted sum
    max_norm: float = 0.0  # of an update's factors and heads, 0 for none; the server checks what it can read


@dataclass(frozen=True)
class Message:
    """One update or aggregate."""

    kind: int
    factors: tuple[Factor, ...]
    round: int
    sender: int
    rank: int
    total: int
    contributors: tuple[Contributor, ...]
    clear: bytes
    secret: bytes
    mask: bytes = b""


@dataclass(frozen=True)
class Expected:
    """What the receiver knows about the message it waits for. None: taken from the message, after range checks."""

    kind: int
    round: int
    sender: int
    rank: int
    total: int | None = None
    samples: int | None = None
    tier: int = 0  # of an update


def encode(message: Message, session: Session) -> bytes:
    """The bytes of a message."""
    head = _HEAD.pack(
        MAGIC,
        message.kind,
        _FACTORS[message.factors],
        _parameters(session),
        session.key_fingerprint,
        session.plan.digest(),
        session.settings_digest,
        session.run,
        message.round,
        message.sender,
        message.rank,
        message.total,
        len(message.contributors),
    )
    people = b"".join(_CONTRIBUTOR.pack(c.rank, c.tier, c.samples) for c in message.contributors)
    body = b"".join((head, people, message.clear, message.secret, message.mask))
    return body + hashlib.sha256(body).digest()


def decode(data: bytes, session: Session, expected: Expected) -> Message:
    """The message in `data`. Raises the WireError that names the first thing that does not match."""
    if len(data) < _HEAD.size + _CONTRIBUTOR.size + _DIGEST:
        raise FormatError(f"{len(data)} bytes are too few for a message")
    magic, kind, factors, parameters, key, plan, settings, run, round_, sender, rank, total, people = _HEAD.unpack_from(
        data
    )
    if magic != MAGIC:
        raise FormatError("not a ciphertune message of wire version 2")
    # The order gives the most telling error: who made it, with what, for which run.
    _same(parameters, _parameters(session), ParameterMismatchError, "encryption parameters")
    _same(key, session.key_fingerprint, KeyMismatchError, "key", _ONE_KEY)
    _same(settings, session.settings_digest, SettingsMismatchError, "settings")
    _same(plan, session.plan.digest(), PlanMismatchError, "plan")
    for name, found, wanted in (
        ("kind", kind, expected.kind),
        ("run", run, session.run),
        ("round", round_, expected.round),
        ("sender", sender, expected.sender),
        ("rank", rank, expected.rank),
        ("factors", factors, _FACTORS[session.plan.factors(expected.round)]),
        ("total", total, total if expected.total is None else expected.total),
    ):
        if found != wanted:
            raise RoundMismatchError(f"the message is of {name} {found}, expected {wanted}")
    return _decode_body(data, session, expected, people, total)


def _decode_body(data: bytes, session: Session, expected: Expected, people: int, total: int) -> Message:
    at = _HEAD.size + people * _CONTRIBUTOR.size
    if not 1 <= people <= _MAX_CONTRIBUTORS or (expected.kind == UPDATE and people != 1) or len(data) < at + _DIGEST:
        raise FormatError(f"the message names {people} contributors")
    named = (_CONTRIBUTOR.unpack_from(data, _HEAD.size + i * _CONTRIBUTOR.size) for i in range(people))
    contributors = tuple(Contributor(rank, samples, tier) for rank, tier, samples in named)
    if session.plan.aggregate == "separate" and expected.rank not in session.plan.tiers:
        raise FormatError(f"rank {expected.rank} is no tier of the plan: {', '.join(map(str, session.plan.tiers))}")
    check_contributors(contributors, total, session.plan)
    if expected.samples is not None:
        wanted = Contributor(expected.rank, expected.samples, expected.tier)
        if contributors[0] != wanted:
            raise RoundMismatchError(f"the message is weighted by {contributors[0]}, expected {wanted}")
    factors = session.plan.factors(expected.round)
    parts = sizes(session, expected.kind, expected.round, expected.rank, contributors)
    if len(data) != at + sum(parts) + _DIGEST:
        raise FormatError(f"{len(data)} bytes where {at + sum(parts) + _DIGEST} are expected")
    view = memoryview(data)
    if hashlib.sha256(view[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise FormatError("the message is damaged: its SHA-256 does not match")
    return Message(
        kind=expected.kind,
        factors=factors,
        round=expected.round,
        sender=expected.sender,
        rank=expected.rank,
        total=total,
        contributors=contributors,
        clear=bytes(view[at : at + parts[0]]),
        secret=bytes(view[at + parts[0] : at + parts[0] + parts[1]]),
        mask=bytes(view[at + parts[0] + parts[1] : -_DIGEST]),
    )


def counts(plan: Plan, kind: int, round_: int, rank: int, contributors: Sequence[Contributor]) -> Counts:
    """(clear, secret) values of each segment of a message; each secret segment has blocks of its own."""
    if plan.aggregate == "separate":
        return pruning.counts(plan, plan.factors(round_), round_, rank)
    if kind == UPDATE:
        return columns.update_counts(plan, contributors[0])
    return columns.aggregate_counts(plan, contributors)


def terms_of(plan: Plan, round_: int, contributors: Sequence[Contributor], segments: int) -> list[int]:
    """How many updates each encrypted segment of a message is the sum of: those of the ranks that reach its tier."""
    if plan.aggregate != "separate":
        return [1] * segments  # product: combinations, and heads in ciphertexts of which a sum is no longer
    ranks = sorted(c.rank for c in contributors)
    terms = [len(ranks) - bisect_left(ranks, tier) for tier in plan.tiers]
    each = 2 if pruning.counts_kept(plan, round_) else 1  # segments of a tier
    return [k for k in terms for _ in range(each)][:segments]


def sizes(
    session: Session, kind: int, round_: int, rank: int, contributors: Sequence[Contributor]
) -> tuple[int, int, int]:
    """Bytes of the clear part, the secret part and the mask of a message; rank: the components in it."""
    plan = session.plan
    clear, secret = counts(plan, kind, round_, rank, contributors)
    hidden = sum(
        blocks_for(session.public, entries) * session.public.sum_bytes(terms)
        for entries, terms in zip(secret, terms_of(plan, round_, contributors, len(secret)), strict=True)
    )
    mask = pruning.mask_entries(plan, plan.factors(round_), round_, rank) if plan.aggregate == "separate" else ()
    return (
        sum(clear) * session.clear.block_bytes,
        hidden,
        sum(mask_bytes(entries) for entries in mask),
    )


def message_size(session: Session, kind: int, round_: int, rank: int, contributors: Sequence[Contributor]) -> int:
    """Bytes of a whole message, as `encode` makes it; rank: the components in it."""
    parts = sum(sizes(session, kind, round_, rank, contributors))
    return _HEAD.size + len(contributors) * _CONTRIBUTOR.size + parts + _DIGEST


def update_size(session: Session, round_: int, who: Contributor) -> int:
    """Bytes of one client's update."""
    return message_size(session, UPDATE, round_, who.rank, (who,))


def check_contributors(contributors: Sequence[Contributor], total: int, plan: Plan) -> None:
    """Raise FormatError unless ranks and budgets are possible, and weights are positive and sum to at most 1."""
    if not all(plan.accepts(c.rank, c.tier) and c.samples >= 1 for c in contributors):
        raise FormatError("a contributor has an impossible rank or budget, or no samples")
    if sum(c.samples for c in contributors) > total:
        raise FormatError("the contributors' samples exceed the total: the sum could wrap around")


def _parameters(session: Session) -> bytes:
    return hashlib.sha256(session.public.digest() + session.clear.digest()).digest()[:16]


def _same(found: bytes, wanted: bytes, error: type[Exception], what: str, remedy: str = "") -> None:
    if found != wanted:
        raise error(f"the message was made under another {what}: it has {found.hex()}, here is {wanted.hex()}{remedy}")


@dataclass(frozen=True)
class Heading:
    """What an update or aggregate says of itself, unchecked."""

    key_fingerprint: bytes
    plan: bytes  # its digest
    run: int
    round: int
    sender: int
    rank: int
    tier: int  # of the first contributor


def heading(data: bytes) -> Heading:
    """Read the beginning of a message; only `decode` says whether it holds. Raises FormatError for too few bytes."""
    if len(data) < _HEAD.size + _CONTRIBUTOR.size:
        raise FormatError(f"{len(data)} bytes are too few for a message")
    _, _, _, _, key, plan, _, run, round_, sender, rank, _, _ = _HEAD.unpack_from(data)
    return Heading(key, plan, run, round_, sender, rank, _CONTRIBUTOR.unpack_from(data, _HEAD.size)[1])
