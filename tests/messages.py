"""One update and one aggregate of a small federation as bytes, and ways to damage them."""

from __future__ import annotations

import math
import random
import struct
from typing import Any

import pytest

from ciphertune import exchange, wire
from ciphertune.aggregation import SeparateSum
from ciphertune.crypto.secret import SecretPart
from ciphertune.ranks import Contributor
from ciphertune.wire import UPDATE, Expected, Session
from tests.oracle import BODY, OFFSETS, SEALED, adapter_of, encrypted, in_the_clear, plan_of, rehashed

RUN, ROUND, SENDER, RANK, SAMPLES, TOTAL = 11, 2, 3, 4, 30, 100
EXPECTED = Expected(UPDATE, ROUND, SENDER, RANK, TOTAL, SAMPLES)
WHO = Contributor(RANK, SAMPLES)

BACKENDS = pytest.mark.parametrize("backend", ["clear", "encrypted"])


def parties(backend: str = "clear", **plan: Any) -> tuple[Session, SecretPart]:
    made = plan_of(**plan)
    return encrypted(made) if backend == "encrypted" else in_the_clear(made)


def update(session: Session, secret: SecretPart, **changes: int) -> bytes:
    values = {"round_": ROUND, "sender": SENDER, "samples": SAMPLES, "total": TOTAL, "rank": RANK, "seed": 0} | changes
    adapter = adapter_of(session.plan, values.pop("rank"), values.pop("seed"))
    return exchange.seal(adapter, session, secret, **values)


def aggregate(session: Session, secret: SecretPart, round_: int = ROUND) -> bytes:
    total = SeparateSum(session, round_, TOTAL)
    for sender, rank in ((1, 8), (2, 8)):
        data = update(session, secret, sender=sender, rank=rank, seed=sender, round_=round_)
        total.add(data, sender=sender, who=Contributor(rank, SAMPLES))
    return wire.encode(total.release(2), session)


def mutated(good: bytes, rng: random.Random) -> bytes:
    """One of the ways to damage a message, from a flipped bit to a well-framed lie."""
    data = bytearray(good)
    kind = rng.randrange(10)
    if kind == 0:  # bits, anywhere
        for _ in range(rng.choice([1, 1, 1, 4, 50])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if kind == 1:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 2:
        return bytes(data) + rng.randbytes(rng.choice([1, 12, 1000, SEALED.block_bytes]))
    if kind == 3:
        return rng.randbytes(rng.choice([0, 1, 12, 150, 5000, len(data)]))
    if kind == 4:  # a header field of random content
        offset, form = rng.choice(list(OFFSETS.values()))
        data[offset : offset + struct.calcsize("<" + form)] = rng.randbytes(struct.calcsize("<" + form))
    elif kind == 5:  # bits of the header
        data[rng.randrange(BODY)] ^= 1 << rng.randrange(8)
    elif kind == 6:  # bits of the values: a well-formed update of other values
        for _ in range(rng.choice([1, 20])):
            data[rng.randrange(BODY, len(data) - 32)] ^= 1 << rng.randrange(8)
    elif kind == 7:  # a stretch of one byte
        start = rng.randrange(BODY, len(data) - 32)
        stop = min(len(data) - 32, start + rng.choice([8, 500, len(data)]))
        data[start:stop] = bytes([rng.choice([0, 255, 127])]) * (stop - start)
    elif kind == 8:  # a stretch cut out or put in
        start = rng.randrange(len(data) - 32)
        data[start : start + rng.choice([1, 8, SEALED.block_bytes])] = rng.randbytes(rng.choice([0, 1, 8]))
        data += bytes(32)
    else:  # a forged number in the clear
        start = BODY + 8 * rng.randrange((len(data) - 32 - BODY) // 8)
        number = rng.choice([math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324])
        data[start : start + 8] = struct.pack("<d", number)
    return rehashed(bytes(data[:-32]))
