"""Hostile bytes: whatever is sent, only a CiphertuneError comes of it and the good sum stays right."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune import exchange, wire
from ciphertune.adapter import Adapter
from ciphertune.aggregation import SeparateSum
from ciphertune.crypto.ckks import CkksPublic
from ciphertune.crypto.secret import SecretPart
from ciphertune.errors import CiphertuneError, FormatError, RangeError, RoundMismatchError, WireError
from ciphertune.product import ProductSum
from ciphertune.ranks import Contributor
from ciphertune.wire import Session
from tests.messages import BACKENDS, mutated
from tests.oracle import (
    BODY,
    adapter_of,
    blank,
    encrypted,
    forge,
    in_the_clear,
    mean_factor,
    mean_head,
    modular_sum,
    negotiated_plan,
    plan_of,
    rehashed,
)

MUTATIONS = 2000
TOTAL = 10_000


def parties(backend: str) -> tuple[Session, SecretPart]:
    return in_the_clear(plan_of(select="none")) if backend == "clear" else encrypted(plan_of())


@cache
def shared_server(backend: str) -> Server:
    """One that nothing is added to."""
    return Server(backend)


class Server:
    """A sum with two good updates of rank 8, and every update since then that was taken in."""

    def __init__(self, backend: str) -> None:
        self.session, self.secret = parties(backend)
        self.clients = [adapter_of(self.session.plan, rank, seed) for seed, rank in enumerate((8, 8, 4))]
        self.samples = [60, 20]
        self.sum = SeparateSum(self.session, 0, TOTAL)
        self.taken: list[wire.Message] = []
        for sender, samples in enumerate(self.samples, 1):
            data = self.update(sender, samples)
            self.taken.append(self.sum.add(data, sender=sender, who=Contributor(8, samples)))

    def update(self, sender: int, samples: int = 1) -> bytes:
        """A good update; members from 3 on have rank 4."""
        client = self.clients[min(sender, 3) - 1]
        return exchange.seal(client, self.session, self.secret, round_=0, sender=sender, samples=samples, total=TOTAL)

    def aggregate(self) -> bytes:
        return wire.encode(self.sum.release(2), self.session)

    def offer(self, data: bytes, sender: int) -> CiphertuneError | None:
        """Add what a hostile member of rank 4 sends. Any other exception is a failure of the test."""
        try:
            self.taken.append(self.sum.add(data, sender=sender, who=Contributor(4, 1)))
        except CiphertuneError as error:
            return error
        return None

    def assert_sum_is_what_was_taken(self) -> None:
        released = self.sum.release(1)
        assert len(released.contributors) == len(self.taken) == self.sum.contributors
        public = self.session.public
        if isinstance(public, CkksPublic):
            assert released.secret == modular_sum([m.secret for m in self.taken], public.params, public.moduli)
        else:
            expected = np.zeros(len(released.clear) // 8)
            for message in self.taken:
                values = np.frombuffer(message.clear, "<f8")
                expected[: values.size] += values
            assert np.frombuffer(released.clear, "<f8") == pytest.approx(expected, rel=1e-12, nan_ok=True)

    def assert_good_sum_is_right(self) -> None:
        """Only the two good updates are in it: clients get their weighted mean."""
        base = blank(adapter_of(self.session.plan, 8, 0))
        mean, _ = exchange.unseal(self.aggregate(), self.session, self.secret, round_=0, rank=8, base=base)
        tolerance = self.session.public.error_bound(2, 1.0) * TOTAL / min(self.samples)
        for name, factors in mean.layers.items():
            expected = mean_factor(self.clients[:2], self.samples, name, "b", "nested")
            assert np.abs(factors.b.T - expected).max() <= tolerance
        for name, head in mean.heads.items():
            assert np.abs(head - mean_head(self.clients[:2], self.samples, name)).max() <= tolerance


# ------------------------------------------------------------------------------------------------------- the server


@BACKENDS
def test_sum_survives_thousands_of_hostile_updates_and_stays_right(backend: str) -> None:
    server, rng = Server(backend), random.Random(0)
    good = server.update(3)
    refused: dict[str, int] = {}
    sender = 3
    with np.errstate(over="ignore", invalid="ignore"):  # two members may send 1e308 each; both are refused by clients
        for _ in range(MUTATIONS):
            error = server.offer(mutated(forge(good, sender=sender), rng), sender)
            if error is None:
                sender += 1  # it counts as that member's update
            else:
                assert isinstance(error, WireError)
                refused[type(error).__name__] = refused.get(type(error).__name__, 0) + 1
        print(f"{backend}: refused {refused}, taken {len(server.taken) - 2} well-formed updates of other values")
        assert sum(refused.values()) > MUTATIONS / 2
        assert len(server.taken) > 100  # so that what lies behind the frame was reached
        assert set(refused) >= {"FormatError", "RoundMismatchError", "PlanMismatchError", "KeyMismatchError"}
        server.assert_sum_is_what_was_taken()


@BACKENDS
def test_only_unframed_damage_leaves_exactly_the_good_sum(backend: str) -> None:
    """Without a SHA-256 made right again nothing at all is taken in: the mean is that of the good updates."""
    server, rng = Server(backend), random.Random(1)
    good = server.update(3)
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(rng.choice([1, 1, 5])):
            damaged[rng.randrange(len(good))] ^= rng.randrange(1, 256)
        assert damaged == good or isinstance(server.offer(bytes(damaged), 3), WireError)
    server.assert_good_sum_is_right()


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_bytes_whatever_escape_as_another_exception(data: st.DataObject) -> None:
    server = shared_server(data.draw(st.sampled_from(["clear", "encrypted"])))
    good = server.update(3)
    front = data.draw(st.one_of(st.just(good[:-32]), st.binary(max_size=400), st.just(good[:BODY])))
    edits = data.draw(st.lists(st.tuples(st.integers(0, max(0, len(front) - 1)), st.binary(max_size=20)), max_size=4))
    out = bytearray(front)
    for at, piece in edits:
        out[at : at + len(piece)] = piece
    message = rehashed(bytes(out)) if data.draw(st.booleans()) else bytes(out)
    sum_ = SeparateSum(server.session, 0, TOTAL)
    try:
        sum_.add(message, sender=3, who=Contributor(4, 1))
    except WireError:
        assert sum_.contributors == 0
    else:
        assert len(message) == len(good)  # a well-formed update of other values
    server.assert_good_sum_is_right()


@given(tier=st.integers(0, 3) | st.integers(0, 2**32 - 1), agreed=st.integers(0, 1))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_an_update_that_hides_other_columns_than_agreed_is_refused_whatever_tier_it_names(
    tier: int, agreed: int
) -> None:
    session, secret = in_the_clear(negotiated_plan())
    adapter, sum_ = adapter_of(session.plan, 8, 0), ProductSum(session, 0, TOTAL)
    good = exchange.seal(adapter, session, secret, round_=0, sender=1, samples=1, total=TOTAL, tier=agreed)
    if tier != agreed:
        with pytest.raises(WireError) as caught:
            sum_.add(forge(good, contributor_tier=tier), sender=1, who=Contributor(8, 1, agreed))
        assert type(caught.value) is (RoundMismatchError if tier < 2 else FormatError)
        assert sum_.contributors == 0
    assert sum_.add(good, sender=1, who=Contributor(8, 1, agreed)).contributors == (Contributor(8, 1, agreed),)


@given(tiers=st.lists(st.integers(0, 3) | st.integers(0, 2**32 - 1), min_size=2, max_size=2))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_an_aggregate_whose_contributors_have_no_such_tiers_is_refused_by_the_client(tiers: list[int]) -> None:
    session, secret = in_the_clear(negotiated_plan())
    base, sum_ = adapter_of(session.plan, 8, 0), ProductSum(session, 0, TOTAL)
    for sender in (1, 2):
        client = adapter_of(session.plan, 8, sender)
        data = exchange.seal(
            client, session, secret, round_=0, sender=sender, samples=TOTAL // 2, total=TOTAL, tier=sender - 1
        )
        sum_.add(data, sender=sender, who=Contributor(8, TOTAL // 2, sender - 1))
    data = bytearray(wire.encode(sum_.release(2), session))
    for i, tier in enumerate(tiers):
        struct.pack_into("<I", data, 110 + 16 * i, tier)
    forged = rehashed(bytes(data[:-32]))
    if max(tiers) == 1:  # as many columns are encrypted as before
        exchange.unseal(forged, session, secret, round_=0, rank=8, base=base)
    else:
        with pytest.raises(FormatError, match="impossible rank or budget" if max(tiers) > 1 else "bytes where"):
            exchange.unseal(forged, session, secret, round_=0, rank=8, base=base)


# ------------------------------------------------------------------------------------------------------- the client


@BACKENDS
def test_client_survives_thousands_of_hostile_aggregates(backend: str) -> None:
    server, rng = Server(backend), random.Random(2)
    good = server.aggregate()
    base = blank(adapter_of(server.session.plan, 8, 0))
    outcomes: dict[str, int] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(MUTATIONS):
            try:
                mean, _ = unsealed(server, mutated(good, rng), base)
                name = "taken"
                values = [x for f in mean.layers.values() for x in (f.a, f.b)] + list(mean.heads.values())
                assert all(np.abs(v).max() <= 2 * server.session.bound for v in values)
            except CiphertuneError as error:
                name = type(error).__name__
                assert isinstance(error, WireError | RangeError)
            outcomes[name] = outcomes.get(name, 0) + 1
    print(f"{backend}: {outcomes}")
    assert outcomes["FormatError"] > MUTATIONS / 4
    assert "RangeError" in outcomes  # values that no honest mean has
    assert all((f.b == 7).all() for f in base.layers.values())
    server.assert_good_sum_is_right()


def unsealed(server: Server, data: bytes, base: Adapter) -> tuple[Adapter, wire.Message]:
    return exchange.unseal(data, server.session, server.secret, round_=0, rank=8, base=base)


@given(rank=st.integers(-5, 2**40), round_=st.integers(-5, 2**40), good=st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_servers_announcement_of_any_rank_and_round_is_survived(rank: int, round_: int, good: bool) -> None:
    """Round and rank of an aggregate are announced by the server beside it."""
    server = shared_server("clear")
    base = blank(adapter_of(server.session.plan, 8, 0))
    data = server.aggregate()
    if good and 0 <= rank < 2**32 and 0 <= round_ < 2**32:
        data = forge(data, rank=rank, round=round_, factors=2 if round_ % 2 == 0 else 1)
    with pytest.raises(WireError):
        exchange.unseal(data, server.session, server.secret, round_=round_, rank=rank if rank != 8 else 7, base=base)


def test_aggregate_of_a_higher_rank_than_the_client_has_is_refused() -> None:
    server = shared_server("clear")
    with pytest.raises(WireError, match="do not fit an adapter of rank 4"):
        unsealed(server, server.aggregate(), blank(adapter_of(server.session.plan, 4, 0)))


# --------------------------------------------------- the forged messages that break TenSEAL's own loader, in a process


def test_server_process_survives_every_class_of_message_that_breaks_tenseals_own_loader() -> None:
    """That one crashes, reads past the heap or accepts a third polynomial; our frame cannot express any of it."""
    done = subprocess.run([sys.executable, "-c", FORGERIES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert len(report["outcomes"]) > 60
    assert {name for name, found in report["outcomes"].items() if found != "FormatError"} == set()
    assert report["unchanged"]
    assert report["error"] <= report["bound"]
    assert report["honest message of the same member is taken"]
    assert report["grown_mb"] < 50, "a message was decompressed or believed"


FORGERIES = r"""
import hashlib, json, os, resource, struct
import numpy as np, tenseal as ts, tenseal.sealapi as seal, zstandard
from ciphertune import exchange, wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.aggregation import SeparateSum
from ciphertune.crypto.ckks_secret import CkksSecret, generate_key
from ciphertune.crypto.clear import ClearPublic
from ciphertune.crypto.codec import Scratch, field, varint
from ciphertune.crypto.params import CkksParams
from ciphertune.errors import CiphertuneError
from ciphertune.plan import LayerShape, Plan
from ciphertune.ranks import Contributor

params = CkksParams(4096, (54, 20), 40, 64.0)
secret = CkksSecret(params, generate_key(params))
plan = Plan((LayerShape("layer", 1000, 10),), (), 2.0, (4,), "b_only", "all", "nested")
session = wire.Session(5, plan, b"s" * 16, secret.fingerprint, secret.public, ClearPublic("float64"), 64.0)
rng = np.random.default_rng(0)
def update(sender):
    b = rng.normal(0, 0.3, (1000, 4))
    adapter = Adapter({"layer": LoraFactors(np.zeros((4, 10)), b, 2.0)}, {})
    return b, exchange.seal(adapter, session, secret, round_=0, sender=sender, samples=1, total=4)
total = SeparateSum(session, 0, 4)
(b1, one), (b2, two), (_, hostile) = update(1), update(2), update(3)
for sender, data in ((1, one), (2, two)):
    total.add(data, sender=sender, who=Contributor(4, 1))
before = total.release(2)

# what TenSEAL and SEAL themselves write, and the forgeries of it
context = secret.public.context
seal_context = context.seal_context().data
scratch = Scratch()
def held(blob):
    with open(scratch.path, "wb") as file:
        file.write(blob)
    return scratch.path
body = hostile[122:-32]
vector = secret.public.vectors(body)[0]
ciphertext = vector.ciphertext()[0]
raw = scratch.saved(ciphertext.save)
def tenseal(sizes, blobs, scale=2.0**40):
    head = field(1, b"".join(map(varint, sizes))) if sizes else b""
    return head + b"".join(field(2, b) for b in blobs) + varint(3 << 3 | 1) + struct.pack("<d", scale)
def header(compression, content):
    return struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, compression, 0, 16 + len(content)) + content
plain = zstandard.ZstdDecompressor().decompressobj().decompress(raw[16:]) if raw[5] == 2 else raw[16:]
huge = bytearray(plain)
struct.pack_into("<Q", huge, 33, 2**40)
three = seal.Ciphertext()
three.load(seal_context, held(raw))
three.resize(seal_context, 3)
other_scale = seal.Ciphertext()
other_scale.load(seal_context, held(raw))
other_scale.scale = 2.0**10
packer, zeros = zstandard.ZstdCompressor().compressobj(), bytes(1 << 20)
bomb = header(2, b"".join(packer.compress(zeros) for _ in range(1024)) + packer.flush())
assert len(bomb) < 1 << 20
insecure = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
insecure.set_poly_modulus_degree(1024)
insecure.set_coeff_modulus(seal.CoeffModulus.Create(1024, [50, 50, 50, 50]))
forgeries = {
    "nothing": b"",
    "twelve bytes": tenseal([1], [])[:12],
    "garbage": os.urandom(5000),
    "garbage of the right length": b"\xff" * 16 + os.urandom(len(body) - 16),
    "truncated": body[:-1000],
    "a block too few": body[: len(body) // 2],
    "a block too many": body + body[: len(body) // 2],
    "tenseal vector": tenseal([2048], [raw]),
    "tenseal's own bytes": vector.serialize(),
    "size beyond the slots": tenseal([5000], [raw]),
    "size 2^31": tenseal([2**31], [raw]),
    "size ten million": tenseal([10_000_000], [raw]),
    "two sizes, one ciphertext": tenseal([3, 3], [raw]),
    "one size, two ciphertexts": tenseal([3], [raw, raw]),
    "one size, no ciphertext": tenseal([3], []),
    "no size, one ciphertext": tenseal([], [raw]),
    "scale nan": tenseal([3], [raw], float("nan")),
    "size one, to be broadcast": tenseal([1], [raw]),
    "another scale inside the ciphertext": tenseal([3], [scratch.saved(other_scale.save)]),
    "three polynomials": tenseal([3], [scratch.saved(three.save)]),
    "three polynomials of residues": body + body[: len(body) // 4],
    "transparent": bytes(len(body)),
    "transparent second block": body[: 3 * len(body) // 4] + bytes(len(body) // 4),
    "zip bomb": tenseal([3], [bomb]),
    "zip bomb alone": bomb,
    "2^40 polynomials": tenseal([3], [header(0, bytes(huge))]),
    "uncompressed ciphertext": header(0, plain),
    "residues not below the modulus": body[:-7] + b"\xff" * 7,
    "insecure parameters": field(1, scratch.saved(insecure.save)) + field(2, b"") + varint(4 << 3) + varint(0),
    "a context": context.serialize(False, False, False, False),
    "a pickle": b"\x80\x04\x95" + bytes(100),
    "a message within the message": hostile,
}
front = hostile[:122]
def framed(content):
    return front + content + hashlib.sha256(front + content).digest()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
outcomes, before_mb = {}, peak()
for name, content in forgeries.items():
    padded = content[: len(body)].ljust(len(body), b"\xff")  # the right length, so that the values are looked at
    for kind, message in (("bare", content), ("framed", framed(content)), ("padded", framed(padded))):
        if message == hostile:
            continue
        try:
            total.add(message, sender=3, who=Contributor(4, 1))
            outcomes[f"{name}, {kind}"] = "taken"
        except CiphertuneError as error:
            outcomes[f"{name}, {kind}"] = type(error).__name__
base = Adapter({"layer": LoraFactors(np.zeros((4, 10)), np.zeros((1000, 4)), 2.0)}, {})
unchanged = total.release(2) == before
mean, _ = exchange.unseal(wire.encode(total.release(2), session), session, secret, round_=0, rank=4, base=base)
print(json.dumps({
    "outcomes": outcomes,
    "unchanged": unchanged,
    "error": float(np.abs(mean.layers["layer"].b - (b1 + b2) / 2).max()),
    "bound": 2 * params.error_bound(2, 1.0),
    "grown_mb": peak() - before_mb,
    "honest message of the same member is taken": bool(total.add(hostile, sender=3, who=Contributor(4, 1))),
}))
"""
