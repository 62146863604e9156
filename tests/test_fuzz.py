"""Random and damaged bytes, for a bounded time: only a WireError comes of them, and a refusal changes no sum."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune import exchange, wire
from ciphertune.aggregation import SeparateSum
from ciphertune.crypto import codec
from ciphertune.crypto.packed import PackedPublic
from ciphertune.crypto.params import PackedParams
from ciphertune.errors import FormatError, RangeError, WireError
from ciphertune.ranks import Contributor
from ciphertune.wire import Session
from tests.messages import mutated
from tests.oracle import adapter_of, blank, encrypted, first_primes, forge, plan_of, rehashed, shared_secret

# both in a small ring
PARAMS = {
    "ckks": PackedParams("ckks", 2048, 40, 64.0, 1000),
    "bfv": PackedParams("bfv", 2048, 48, 64.0, 1000, 30),
}
SCHEMES = pytest.mark.parametrize("scheme", PARAMS)
MUTATIONS, SECONDS, SEED = 400, 60.0, 20_260_501
PLAN = plan_of(tiers=(2, 4))
TOTAL = 100_000
MEMBER = Contributor(4, 1)  # what every member but the first two counts as


def modulus(params: PackedParams) -> int:
    return first_primes(params.modulus_bits, params.poly_modulus_degree, 1)[0]


class Model:
    """What a sum of updates is, by the layout: per block the seeds in order, and the residues added modulo q."""

    def __init__(self, params: PackedParams) -> None:
        self._width, self._q = (params.modulus_bits + 7) // 8, modulus(params)
        self._size = 64 + params.poly_modulus_degree * self._width
        self._seeds: list[list[bytes]] = []
        self._public = PackedPublic(params)
        self._first: list[npt.NDArray[np.uint64]] = []

    def add(self, body: bytes) -> None:
        for i in range(len(body) // self._size):
            block = body[i * self._size : (i + 1) * self._size]
            digits = np.frombuffer(block[64:], np.uint8).reshape(-1, self._width).astype(np.uint64)
            values = (digits << (8 * np.arange(self._width, dtype=np.uint64))).sum(axis=1, dtype=np.uint64)
            if i == len(self._first):
                self._seeds.append([])
                self._first.append(np.zeros_like(values))
            self._seeds[i].append(block[:64])
            self._first[i] = (self._first[i] + values) % np.uint64(self._q)

    def result(self) -> bytes:
        parts = []
        for seeds, first in zip(self._seeds, self._first, strict=True):
            if len(seeds) <= 8:
                parts += [*sorted(seeds), self._bytes(first)]
            else:  # what SEAL makes of each seed
                second = np.sum([self._public.second(s) for s in seeds], axis=0, dtype=object) % self._q
                parts += [self._bytes(first), self._bytes(second.astype(np.uint64))]
        return b"".join(parts)

    def _bytes(self, values: npt.NDArray[np.uint64]) -> bytes:
        return values.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : self._width].tobytes()


class Server:
    """A sum with two good updates, what it should be, and a good update of a third member to be damaged."""

    def __init__(self, scheme: str) -> None:
        self.params = PARAMS[scheme]
        self.session, self.secret = parties(scheme)
        self.sum, self.model = SeparateSum(self.session, 0, TOTAL), Model(self.params)
        for sender in (1, 2):
            data = self.update(sender, TOTAL // 4)
            message = self.sum.add(data, sender=sender, who=Contributor(4, TOTAL // 4))
            self.model.add(message.secret)
        self.good = self.update(3, 1)
        self.aggregate = wire.encode(self.sum.release(2), self.session)

    def update(self, sender: int, samples: int) -> bytes:
        client = adapter_of(PLAN, 4, sender)
        return exchange.seal(client, self.session, self.secret, round_=0, sender=sender, samples=samples, total=TOTAL)

    def offer(self, data: bytes, sender: int) -> str:
        """Add it. What is refused leaves the sum as the model has it; any error but a WireError fails the test."""
        try:
            message = self.sum.add(data, sender=sender, who=MEMBER)
        except WireError as error:
            outcome = type(error).__name__
        else:
            self.model.add(message.secret)
            outcome = "taken"
        assert self.sum.release(1).secret == self.model.result()
        return outcome

    def receive(self, data: bytes) -> str:
        """What a client makes of an aggregate."""
        base = blank(adapter_of(PLAN, 4, 0))
        try:
            mean, _ = exchange.unseal(data, self.session, self.secret, round_=0, rank=4, base=base)
        except (WireError, RangeError) as error:
            assert all((f.a == 7).all() and (f.b == 7).all() for f in base.layers.values())
            return type(error).__name__
        values = [x for f in mean.layers.values() for x in (f.a, f.b)] + list(mean.heads.values())
        assert all(np.abs(v).max() <= 2 * self.session.bound for v in values)
        return "taken"


def parties(scheme: str) -> tuple[Session, Any]:
    return encrypted(PLAN, secret=shared_secret(PARAMS[scheme]))


@cache
def shared_server(scheme: str) -> Server:
    """One that nothing is added to."""
    return Server(scheme)


# --------------------------------------------------------------------------------------------------- damaged messages


@SCHEMES
def test_sum_is_exactly_what_was_taken_after_hundreds_of_damaged_updates(scheme: str) -> None:
    server, rng, outcomes = Server(scheme), random.Random(SEED), Counter[str]()
    for _ in range(MUTATIONS):
        sender = 3 + outcomes["taken"]  # what is taken counts as that member's update
        outcomes[server.offer(mutated(forge(server.good, sender=sender), rng), sender)] += 1
        if outcomes["taken"] == 100:
            break
    print(f"{scheme}: {dict(outcomes)}")
    assert outcomes["taken"] >= 20  # so that what lies behind the frame was reached
    assert {"FormatError", "RoundMismatchError"} <= set(outcomes)
    before = server.sum.contributors
    assert server.offer(forge(server.good, sender=9999), 9999) == "taken"
    assert server.sum.contributors == before + 1


@SCHEMES
def test_client_takes_nothing_absurd_from_hundreds_of_damaged_aggregates(scheme: str) -> None:
    server, rng, outcomes = shared_server(scheme), random.Random(SEED), Counter[str]()
    assert server.receive(server.aggregate) == "taken"
    for _ in range(MUTATIONS):
        outcomes[server.receive(mutated(server.aggregate, rng))] += 1
    print(f"{scheme}: {dict(outcomes)}")
    assert outcomes["FormatError"] > MUTATIONS / 4
    assert len(outcomes) >= 4
    assert server.receive(server.aggregate) == "taken"


# ------------------------------------------------------------------------------------------- random bytes, by structure


@st.composite
def bodies(draw: st.DrawFn, size: int) -> bytes:
    """Bytes of about a whole number of blocks: of one byte, random, or a good block's neighbourhood."""
    count, change = draw(st.integers(0, 3)), draw(st.sampled_from([0, 0, 0, 0, -1, 1, 5, 64, -64]))
    length = max(0, count * size + change)
    seed = draw(st.integers(0, 2**32 - 1))
    kind = draw(st.sampled_from(["zeros", "ones", "random", "below"]))
    if kind in ("zeros", "ones"):
        data = bytearray([0 if kind == "zeros" else 255]) * length
    else:
        data = bytearray(random.Random(seed).randbytes(length))
    if kind == "below":  # every byte so small that every residue is below its prime
        data = bytearray(b & 0x7F for b in data)
    for at, piece in draw(st.lists(st.tuples(st.integers(0, max(0, length - 1)), st.binary(max_size=9)), max_size=3)):
        data[at : at + len(piece)] = piece[: max(0, length - at)]
    return bytes(data)


def is_good(body: bytes, size: int, start: int, params: PackedParams) -> bool:
    """Whether these are whole blocks whose residues, from byte `start` of each on, are below the prime."""
    if len(body) % size:
        return False
    width, q = (params.modulus_bits + 7) // 8, modulus(params)
    rows = np.frombuffer(body, np.uint8).reshape(-1, size)[:, start:].reshape(-1, width).astype(np.uint64)
    return not ((rows << (8 * np.arange(width, dtype=np.uint64))).sum(axis=1) >= q).any()


@given(data=st.data(), scheme=st.sampled_from(list(PARAMS)))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_bytes_are_an_update_exactly_when_they_are_whole_blocks_of_residues_below_the_prime(
    data: st.DataObject, scheme: str
) -> None:
    params, public = PARAMS[scheme], parties(scheme)[1].public
    size = 64 + params.poly_modulus_degree * ((params.modulus_bits + 7) // 8)
    body, total, model = data.draw(bodies(size)), public.aggregator(), Model(params)
    start = parties(scheme)[1].encrypt(np.ones(1))
    for good in (start, start[:64] + bytes(size - 64)):
        total.add(good)
        model.add(good)
    if is_good(body, size, 64, params):
        public.check(body)
        total.add(body)
        model.add(body)
    else:
        for refuses in (public.check, total.add):
            with pytest.raises(FormatError):
                refuses(body)
    assert total.result(total.blocks()) == model.result()


@given(data=st.data(), scheme=st.sampled_from(list(PARAMS)), terms=st.sampled_from([1, 2, 8, 9, 100, 1000]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_bytes_are_a_sum_exactly_when_they_are_as_many_blocks_as_the_plan_has(
    data: st.DataObject, scheme: str, terms: int
) -> None:
    params, secret = PARAMS[scheme], parties(scheme)[1]
    whole = params.poly_modulus_degree * ((params.modulus_bits + 7) // 8)
    seeds = 64 * terms if terms <= 8 else 0
    size = whole + (seeds or whole)
    body, blocks = data.draw(bodies(size)), data.draw(st.integers(0, 3))
    count = max(0, blocks * params.slots - data.draw(st.integers(0, 5)))
    hides = seeds > 0 or all(any(body[at + whole : at + 2 * whole]) for at in range(0, len(body), size))
    if is_good(body, size, seeds, params) and len(body) == blocks * size and hides:
        assert secret.decrypt(body, count, terms=terms).shape == (count,)
    else:
        with pytest.raises(FormatError):
            secret.decrypt(body, count, terms=terms)


@given(
    data=st.binary(max_size=700) | bodies(2 * 16 * 5),
    bits=st.lists(st.integers(14, 60), min_size=1, max_size=3),
    degree=st.sampled_from([1, 2, 16]),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_ckks_residues_are_unpacked_or_refused_whatever_the_bytes(data: bytes, bits: list[int], degree: int) -> None:
    primes, widths = [(1 << b) - 1 for b in bits], [(b + 7) // 8 for b in bits]
    try:
        residues = codec.unpack(data, primes, widths, degree)
    except FormatError:
        return
    assert codec.pack(residues, widths) == data


@given(
    width=st.integers(1, 8),
    rows=st.integers(0, 3),
    columns=st.integers(0, 9),
    content=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_widened_bytes_are_little_endian_integers_and_cut_is_the_inverse(
    width: int, rows: int, columns: int, content: random.Random
) -> None:
    data = content.randbytes(rows * columns * width)
    found = codec.widen(np.frombuffer(data, np.uint8).reshape(rows, columns * width), width)
    expected = [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]
    assert found.shape == (rows, columns)
    assert found.ravel().tolist() == expected
    assert codec.cut(found.ravel(), width) == data


# ------------------------------------------------------------------------------------------------- well-framed messages


@given(
    scheme=st.sampled_from(list(PARAMS)),
    people=st.lists(
        st.builds(Contributor, st.sampled_from([0, 1, 2, 4, 5]), st.integers(0, TOTAL), st.sampled_from([0, 0, 0, 1])),
        max_size=5,
    ),
    rank=st.sampled_from([2, 4]),
    total=st.sampled_from([1, 5, TOTAL, 5 * TOTAL, 2**63]),
    length=st.sampled_from([0, 0, 0, 0, -1, 64, -64]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_aggregate_of_any_contributors_is_a_mean_or_refused(
    scheme: str, people: list[Contributor], rank: int, total: int, length: int
) -> None:
    """Rightly framed, as long as those contributors would make it, of the bytes of another sum."""
    server = shared_server(scheme)
    whole = PARAMS[scheme].poly_modulus_degree * ((PARAMS[scheme].modulus_bits + 7) // 8)
    tiers = [t for t in PLAN.tiers if t <= rank]
    size = sum(whole + min(whole, 64 * sum(c.rank >= tier for c in people)) for tier in tiers) + length
    message = server.sum.release(2)
    data = wire.encode(
        replace(message, contributors=tuple(people), total=total, rank=rank, secret=(message.secret * 3)[:size]),
        server.session,
    )
    base = blank(adapter_of(PLAN, 4, 0))
    outcome = None
    try:
        exchange.unseal(data, server.session, server.secret, round_=0, rank=rank, base=base)
        outcome = "taken"
    except (WireError, RangeError):
        pass
    possible = (
        people
        and all(c.rank in PLAN.tiers and c.tier == 0 and c.samples for c in people)
        and sum(c.samples for c in people) <= total
        and max(c.rank for c in people) >= rank
        and length == 0
    )
    assert possible or outcome is None
    assert all((f.b == 7).all() for f in base.layers.values())


@given(front=st.binary(max_size=300), tail=st.binary(max_size=64), framed=st.booleans(), known=st.integers(0, 150))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_bytes_whatever_escape_as_another_error(front: bytes, tail: bytes, framed: bool, known: int) -> None:
    for scheme in PARAMS:
        server = shared_server(scheme)
        for good in (server.good, server.aggregate):
            data = good[:known] + front + tail
            data = rehashed(data) if framed else data
            before = hashlib.sha256(server.sum.release(1).secret).digest()
            with pytest.raises(WireError):
                server.sum.add(data, sender=3, who=MEMBER)
            with pytest.raises(WireError):
                exchange.unseal(
                    data, server.session, server.secret, round_=0, rank=4, base=blank(adapter_of(PLAN, 4, 0))
                )
            assert hashlib.sha256(server.sum.release(1).secret).digest() == before


@pytest.mark.slow
def test_a_minute_of_damaged_messages_never_raises_another_error_and_never_changes_a_sum(tmp_path: Path) -> None:
    """The key and the noise are fresh, so the last message is kept: the seed alone does not bring it back."""
    print(f"seed {SEED}, last message in {tmp_path}")
    rng, outcomes = random.Random(SEED), Counter[str]()
    servers = {scheme: Server(scheme) for scheme in PARAMS}
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        scheme = rng.choice(list(PARAMS))
        if servers[scheme].sum.contributors > 120:  # a sum that keeps its seeds
            servers[scheme] = Server(scheme)
        server, sender = servers[scheme], servers[scheme].sum.contributors + 1
        data = forge(server.good, sender=sender)
        for _ in range(rng.choice([1, 1, 2, 3])):
            data = mutated(data, rng) if len(data) > 200 else data
        (tmp_path / "update").write_bytes(data)
        outcomes["update: " + server.offer(data, sender)] += 1
        data = mutated(server.aggregate, rng)
        (tmp_path / "aggregate").write_bytes(data)
        outcomes["aggregate: " + server.receive(data)] += 1
    print(dict(outcomes))
    assert sum(outcomes.values()) > 2000
    assert min(outcomes["update: taken"], outcomes["update: FormatError"], outcomes["aggregate: FormatError"]) > 50
