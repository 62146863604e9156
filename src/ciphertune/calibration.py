"""What the parts of a round take on this machine, in memory and seconds of one processor: small rounds that really run.

A sample has the method, the ranks and the encryption of the round it stands for, and fewer or smaller layers; what it
takes is stated per byte of message. Products of ciphertexts grow with the square of the ranks, not with the bytes: the
sample of such a method is in the clear, and ciphertexts are timed one by one.
"""

from __future__ import annotations

import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import process_time

import numpy as np

from ciphertune import exchange, wire
from ciphertune.aggregation import cut
from ciphertune.build import round_sum, session
from ciphertune.build_client import fresh_part
from ciphertune.crypto.secret import SecretPart
from ciphertune.plan import Plan
from ciphertune.planning import smaller, synthetic
from ciphertune.ranks import Contributor
from ciphertune.settings import CryptoSettings, Settings

# what is timed is timed so often, and the shortest counts: other work on the machine only adds
_TRIALS = 2


@dataclass(frozen=True)
class Line:
    """Memory over bytes of messages, both in bytes, from two small rounds of which the smaller had `seen` of them."""

    start: float
    slope: float
    seen: float

    def at(self, size: float) -> float:
        """Memory at the peak."""
        return self.start + self.slope * size

    def beyond(self, size: float) -> float:
        """How much more that is than at `seen`."""
        return max(0.0, self.slope * (size - self.seen))


@dataclass(frozen=True)
class Sample:
    """What a small round took: seconds of each stage per byte of a message, and bytes of memory at the peak."""

    seal: float  # of the update
    unseal: float  # of the aggregate
    add: float  # of the update
    release: float  # of the aggregate
    encode: float  # of the aggregate, for each client that it is sent to
    sealing: Line  # over the update
    unsealing: Line  # over the aggregate
    serving: Line  # over the aggregate; of a product, over all updates together
    touch: float  # seconds per byte of memory above that, which the system has to hand out to a process first


@dataclass(frozen=True)
class Blocks:
    """Seconds that one ciphertext takes, where a method multiplies; multiply: per plaintext factor."""

    encrypt: float
    decrypt: float
    check: float
    multiply: float


class Calibration:
    """Samples, each measured once. Keys are made for it and forgotten with it. seconds: what measuring took."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._touch = 0.0
        self._secrets: dict[CryptoSettings, SecretPart] = {}
        self._samples: dict[object, Sample] = {}
        self._blocks: dict[CryptoSettings, Blocks] = {}

    def sample(self, settings: Settings, plan: Plan, people: tuple[Contributor, ...], round_: int) -> Sample:
        """The sample of a round. people: all who contribute to it."""
        separate = plan.aggregate == "separate"
        crypto = settings.crypto if separate else replace(settings.crypto, backend="clear")
        small, few = smaller(plan, people, crypto.backend != "clear")
        masked = (plan.left_out(round_) > 0, plan.rate(round_) > 0)
        # what a sample does not depend on
        fit_rank = "nested" if separate else small.fit_rank
        alike = replace(small, share="both", weighting="samples", fit_rank=fit_rank)
        key = (alike, few, sum(c.rank for c in people), crypto, plan.factors(round_), masked)
        if key not in self._samples:
            with self._counted():
                secret = self._secret(crypto)
                self._touch = self._touch or _touching()
                link = session(settings, small, run=0, key_fingerprint=secret.fingerprint)
                link = replace(link, public=secret.public)
                larger, _ = smaller(plan, people, crypto.backend != "clear", times=2)
                found = _sample(link, replace(link, plan=larger), secret, few, round_, self._touch)
                self._samples[key] = _for_all(found, link, secret, few, people)
        return self._samples[key]

    def blocks(self, crypto: CryptoSettings) -> Blocks:
        """What ciphertexts take that are multiplied."""
        if crypto not in self._blocks:
            with self._counted():
                self._blocks[crypto] = _block_costs(self._secret(crypto))
        return self._blocks[crypto]

    @contextmanager
    def _counted(self) -> Iterator[None]:
        start = process_time()
        yield
        self.seconds += process_time() - start

    def _secret(self, crypto: CryptoSettings) -> SecretPart:
        if crypto not in self._secrets:
            self._secrets[crypto] = fresh_part(crypto)
        return self._secrets[crypto]


# --- measuring --------------------------------------------------------------------------------------------------------


class _Watch:
    """Seconds, bytes of messages and peaks of memory, by name. Memory is what Python and numpy allocate."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.size: dict[str, int] = defaultdict(int)
        self.memory: dict[str, int] = defaultdict(int)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = process_time()
        yield
        self.seconds[stage] += process_time() - start

    @contextmanager
    def peak(self, who: str) -> Iterator[None]:
        if not tracemalloc.is_tracing():
            yield
            return
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        yield
        self.memory[who] += tracemalloc.get_traced_memory()[1] - before


def _sample(
    link: wire.Session,
    larger: wire.Session,
    secret: SecretPart,
    people: tuple[Contributor, ...],
    round_: int,
    touch: float,
) -> Sample:
    """What a round takes: seconds of the smaller one, memory from both."""
    tracing, separate = tracemalloc.is_tracing(), link.plan.aggregate == "separate"
    if not tracing:
        tracemalloc.start()
    try:
        less, more = (_round(x, secret, people, round_) for x in (link, larger))
    finally:
        if not tracing:
            tracemalloc.stop()
    runs = [_round(link, secret, people, round_).seconds for _ in range(_TRIALS)]
    best = {stage: min(run[stage] for run in runs) for stage in runs[0]}
    return Sample(
        seal=best["seal"] / less.size["seal"],
        unseal=best["unseal"] / less.size["unseal"],
        add=best["add"] / less.size["add"],
        release=best["release"] / less.size["unseal"],
        encode=best["encode"] / less.size["unseal"],
        sealing=_line(less, more, "seal", "seal", kinds=len(set(people))),
        unsealing=_line(less, more, "unseal", "unseal"),
        serving=_line(less, more, "server", "unseal" if separate else "add"),
        touch=touch,
    )


def _line(less: _Watch, more: _Watch, memory: str, size: str, kinds: int = 1) -> Line:
    (x, y), (z, w) = ((one.size[size] / kinds, one.memory[memory] / kinds) for one in (less, more))
    slope = (w - y) / (z - x) if z > x else w / z  # the sample is all there is
    return Line(w - slope * z, slope, x)


def _for_all(
    sample: Sample, link: wire.Session, secret: SecretPart, few: tuple[Contributor, ...], all_: tuple[Contributor, ...]
) -> Sample:
    """A sample of few clients, corrected for all of them."""
    if len(all_) == len(few):
        return sample
    if link.plan.aggregate == "product":  # the basis takes time with the square of all ranks together
        ranks = sum(c.rank for c in all_) / sum(c.rank for c in few)
        return replace(sample, release=sample.release * ranks**2)
    if not secret.public.encrypts or link.plan.aggregate != "separate":
        return sample
    # a sum of many may travel as something else than one of few
    public, count = secret.public, len(all_)
    (add, decrypt), (added, decrypted) = (_summed(secret, n) for n in (len(few), count))
    return replace(
        sample,
        add=sample.add + max(0.0, added - add) / public.block_bytes,
        unseal=max(0.0, sample.unseal * public.sum_bytes(len(few)) + decrypted - decrypt) / public.sum_bytes(count),
    )


def _summed(secret: SecretPart, count: int) -> tuple[float, float]:
    """Seconds per ciphertext of adding one of `count` of them, and of decrypting their sum."""
    public, watch = secret.public, _Watch()
    body, total = secret.encrypt(np.full(public.slots, 0.02 / count)), public.aggregator()
    with watch.time("add"):
        for _ in range(count):
            total.add(body)
    data = total.result(1)
    with watch.time("decrypt"):
        for _ in range(_TRIALS):
            secret.decrypt(data, public.slots, terms=count)
    return watch.seconds["add"] / count, watch.seconds["decrypt"] / _TRIALS


def _touching() -> float:
    """Seconds per byte that writing to fresh memory takes more than writing to memory that was written to before."""
    size = 1 << 26
    used = np.frombuffer(bytearray(size), np.uint8)
    start = process_time()
    used.fill(1)
    middle = process_time()
    fresh = b"\1" * size  # as messages are; numpy asks the system for larger pages
    return max(0.0, (process_time() - middle) - (middle - start)) / len(fresh)


def _round(link: wire.Session, secret: SecretPart, people: tuple[Contributor, ...], round_: int) -> _Watch:
    """A whole round of synthetic adapters, with one client of each kind to seal."""
    watch, total = _Watch(), sum(c.samples for c in people)
    updates: dict[Contributor, bytes] = {}
    for who in dict.fromkeys(people):
        with watch.peak("seal"):
            adapter = synthetic(link.plan, who.rank, seed=1)
            with watch.time("seal"):
                data = exchange.seal(
                    adapter,
                    link,
                    secret,
                    round_=round_,
                    sender=1,
                    samples=who.samples,
                    total=total,
                    tier=who.tier,
                    guide=adapter,
                )
        updates[who] = data
        watch.size["seal"] += len(data)
    with watch.peak("server"):
        sum_ = round_sum(link, round_, total)
        for sender, who in enumerate(people, 1):
            expected = wire.Expected(wire.UPDATE, round_, 1, who.rank, total, who.samples, who.tier)
            data = wire.encode(replace(wire.decode(updates[who], link, expected), sender=sender), link)
            watch.size["add"] += len(data)
            with watch.time("add"):
                sum_.add(data, sender=sender, who=who)
        with watch.time("release"):
            whole = sum_.release(1)
        with watch.time("encode"):
            answer = wire.encode(cut(whole, link, whole.rank), link)
    watch.size["unseal"] = len(answer)
    del sum_, data
    with watch.peak("unseal"):
        base = synthetic(link.plan, max(c.rank for c in people), seed=1)
        with watch.time("unseal"):
            exchange.unseal(answer, link, secret, round_=round_, rank=whole.rank, base=base)
    return watch


def _block_costs(secret: SecretPart) -> Blocks:
    public, rng = secret.public, np.random.default_rng(0)
    rows, results = 4, 8
    watch = _Watch()
    with watch.time("encrypt"):
        body = secret.encrypt(rng.normal(0.0, 0.02, rows * public.slots))
    with watch.time("check"):
        public.check(body)
    blocks = [body[i * public.block_bytes :][: public.block_bytes] for i in range(rows)]
    groups, added = np.zeros(public.slots, np.int64), np.zeros((results, public.slots))
    with watch.time("multiply"):
        combined = public.combine(blocks, rng.normal(0.0, 0.5, (results, rows, 1)), groups, added)
    with watch.time("decrypt"):
        secret.decrypt(b"".join(combined), results * public.slots, product=True)
    took = watch.seconds
    return Blocks(
        took["encrypt"] / rows, took["decrypt"] / results, took["check"] / rows, took["multiply"] / (rows * results)
    )
