"""Shared by the tests of the methods that sum products: a round from seal to release, and what it says, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ciphertune import build, exchange, wire, wishes
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.columns import Factors, basis_ranks, in_column_order, join_columns, read_clear
from ciphertune.crypto.base import blocks_for
from ciphertune.crypto.clear import ClearPublic, parse
from ciphertune.crypto.clear_secret import ClearSecret
from ciphertune.crypto.secret import SecretPart
from ciphertune.federation import Federation, Member
from ciphertune.hello import Hello
from ciphertune.negotiation import Wish, parse_wish
from ciphertune.plan import HeadShape, LayerShape, Plan, column_count
from ciphertune.product import ProductSum
from ciphertune.ranks import Contributor
from ciphertune.settings import CryptoSettings, ckks_params, compose
from ciphertune.versions import code_digest
from tests.oracle import Matrix, adapter_of, shared_secret, true_update

CONF = Path(__file__).parent.parent / "conf"
IN_FLOAT64 = ("crypto=clear", "crypto.precision=float64")
SHE_LORA, CKKS = ("method=she_lora", *IN_FLOAT64), ("method=she_lora", "crypto.precision=float64")
BACKENDS = pytest.mark.parametrize("crypto", [SHE_LORA, CKKS], ids=["float64", "ckks"])
UNCUT = "method.rank_cap=72"  # the sum of RANKS
RANKS, SAMPLES, BUDGETS = (8, 16, 16, 32), (37, 5, 120, 64), (0.00125, 0.01, 0.01, 0.016)
OWN_SCALES = tuple(16.0 / r for r in RANKS)
# a budget pays for 1, 1, 1 and 1 columns of the first, for 1, 2, 2 and 3 of the others
LAYERS = (LayerShape("block.q", 96, 64), LayerShape("block.v", 48, 160), LayerShape("wide", 96, 200))
HEADS = (HeadShape("classifier.bias", (3,)), HeadShape("classifier.weight", (3, 6)))


class ProductRound:
    """One round: clients of unequal rank, budget and scale seal, the server sums and releases.

    numbers: per layer the sensitive columns, most sensitive first; by default in a random order of the layer's own.
    absent: samples of a client that was asked and did not reply.  scales: of each client, by default the plan's.
    """

    def __init__(
        self,
        overrides: Sequence[str],
        *,
        ranks: Sequence[int] = RANKS,
        samples: Sequence[int] = SAMPLES,
        budgets: Sequence[float] = BUDGETS,
        layers: tuple[LayerShape, ...] = LAYERS,
        numbers: Sequence[Sequence[int]] = (),
        scales: Sequence[float] = (),
        absent: int = 0,
    ) -> None:
        self.settings = compose(CONF, list(overrides))
        self.secret = secret_of(self.settings.crypto)
        tiers = tuple(sorted(set(ranks)))
        bare = build.make_plan(self.settings, layers, HEADS, tiers)
        session = build.session(self.settings, bare, run=9, key_fingerprint=self.secret.fingerprint)
        self.codes = exchange.codes_of(session, self.secret)
        shuffled = [np.random.default_rng(i).permutation(x.n).tolist() for i, x in enumerate(layers)]
        self.numbers = [list(x) for x in numbers or shuffled]
        self.plan = self._negotiated(bare, sorted(set(budgets))) if bare.select == "negotiated" else bare
        self.session = replace(session, plan=self.plan)
        self.samples, self.total = tuple(samples), sum(samples) + absent
        self.tiers = [self.plan.tier(b) for b in budgets]
        self.clients = [adapter_of(self.plan, rank, seed) for seed, rank in enumerate(ranks, 1)]
        if scales:
            self.clients = [scaled(c, s) for c, s in zip(self.clients, scales, strict=True)]
        self.sum = ProductSum(self.session, 0, self.total)
        self.sent = [self.seal(i) for i in range(len(ranks))]
        self.messages = [self.add(i, data) for i, data in enumerate(self.sent)]
        self.data = wire.encode(self.sum.release(2), self.session)
        expected = wire.Expected(wire.AGGREGATE, 0, 0, max(ranks))
        self.released = wire.decode(self.data, self.session, expected)

    def _negotiated(self, bare: Plan, budgets: Sequence[float]) -> Plan:
        columns = tuple(
            tuple(codes[numbers[: column_count(x.n, budgets[-1])]].tolist())
            for x, codes, numbers in zip(bare.layers, self.codes, self.numbers, strict=True)
        )
        return build.make_plan(self.settings, bare.layers, bare.heads, bare.tiers, tuple(budgets), columns)

    def seal(self, i: int) -> bytes:
        """The update of client number i (from 0)."""
        return exchange.seal(
            self.clients[i],
            self.session,
            self.secret,
            round_=0,
            sender=i + 1,
            samples=self.samples[i],
            total=self.total,
            tier=self.tiers[i],
        )

    def who(self, i: int) -> Contributor:
        """What the server knows of client number i."""
        return Contributor(self.clients[i].rank, self.samples[i], self.tiers[i])

    def add(self, i: int, data: bytes) -> wire.Message:
        """The server takes an update of client number i."""
        return self.sum.add(data, sender=i + 1, who=self.who(i))

    def received(self, base: Adapter) -> Adapter:
        """What a client that holds `base` ends with."""
        rank = max(c.rank for c in self.clients)
        return exchange.unseal(self.data, self.session, self.secret, round_=0, rank=rank, base=base)[0]

    @property
    def share(self) -> float:
        """The weight that contributed."""
        return sum(self.samples) / self.total

    def truth(self, layer: int) -> Matrix:
        """sum_i w_i s_i B_i A_i with w_i = N_i / total, shape (m, n)."""
        return self.share * true_update(self.clients, self.samples, self.plan.layers[layer].name)

    def hidden(self, layer: int, tier: int | None = None) -> list[int]:
        """Numbers of the columns that a tier encrypts, by default the highest of the contributors'."""
        tier = max(self.tiers) if tier is None else tier
        return self.numbers[layer][: self.plan.hidden(tier)[layer]]

    def shown(self, layer: int, tier: int | None = None) -> list[int]:
        """Numbers of the columns that a tier sends in the clear, ascending."""
        return sorted(set(range(self.plan.layers[layer].n)) - set(self.hidden(layer, tier)))

    def segments(self) -> list[Matrix]:
        """The aggregate's heads, then its rows of M, decrypted."""
        _, counts = wire.counts(self.plan, wire.AGGREGATE, ("a", "b"), 0, self.released.contributors)
        return decrypted(self.released.secret, counts, self.secret)

    def factors(self) -> list[Factors]:
        """Q and the clear columns of M per layer, by code."""
        ranks = basis_ranks(self.plan, self.released.contributors)
        return read_clear(parse(self.released.clear, self.session.clear.dtype), self.plan, ranks, max(self.tiers))

    def product(self) -> list[tuple[Matrix, Matrix]]:
        """Q and M per layer, columns of M by number."""
        clear, rows = self.factors(), self.segments()[1:]
        joined = join_columns(clear, np.array(rows), self.plan, max(self.tiers))
        return [(f.left, in_column_order(m, c)) for f, m, c in zip(clear, joined, self.codes, strict=True)]


# the sensitive columns: the last four, and others; the two layers have none in common
TAILS = ([63, 62, 61, 60, *range(0, 18, 2)], [159, 158, 157, 156, *range(1, 57, 2)])


@cache
def small(crypto: tuple[str, ...]) -> ProductRound:
    """Small unequal ranks, unequal budgets of 3 to 13 and 8 to 32 columns, unequal scales; one asked did not reply."""
    return ProductRound(
        [*crypto, UNCUT],
        ranks=(2, 4, 4, 8),
        budgets=(0.05, 0.1, 0.1, 0.2),
        layers=LAYERS[:2],
        numbers=TAILS,
        scales=(8.0, 4.0, 4.0, 2.0),
        absent=74,
    )


def whole(run: ProductRound, i: int) -> Matrix:
    """The update that a client with room for every component ends with, (m, n)."""
    return run.received(blank(run.plan, 72)).layers[run.plan.layers[i].name].delta()


def truth(run: ProductRound, i: int) -> Matrix:
    """The mean over those that contributed."""
    return true_update(run.clients, run.samples, run.plan.layers[i].name)


def precision(run: ProductRound) -> float:
    return 1e-6 if run.session.public.encrypts else 1e-10


def secret_of(crypto: CryptoSettings) -> SecretPart:
    """The client's half of a backend; one key per parameters for the whole test process."""
    if crypto.backend == "clear":
        return ClearSecret(ClearPublic(crypto.precision), crypto.bound)
    return shared_secret(ckks_params(crypto))


def decrypted(body: bytes, counts: Sequence[int], secret: SecretPart) -> list[Matrix]:
    """Segments of an aggregate: heads, which are a sum, then rows, which are combinations."""
    found, at = [], 0
    for i, count in enumerate(counts):
        size = blocks_for(secret.public, count) * secret.public.block_bytes
        found.append(secret.decrypt(body[at : at + size], count, product=i > 0))
        at += size
    assert at == len(body)
    return found


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """The adapter with another alpha / r."""
    return Adapter({n: LoraFactors(f.a, f.b, scale) for n, f in adapter.layers.items()}, adapter.heads)


def blank(plan: Plan, rank: int, scale: float = 2.0) -> Adapter:
    """A base to unseal into, in float64: every value 7."""
    layers = {x.name: LoraFactors(np.full((rank, x.n), 7.0), np.full((x.m, rank), 7.0), scale) for x in plan.layers}
    return Adapter(layers, {h.name: np.full(h.shape, 7.0) for h in plan.heads})


def gap(found: Matrix, expected: Matrix) -> float:
    """Relative error: the larger of Frobenius norm to norm, and largest entry to largest entry."""
    assert found.shape == expected.shape
    if not expected.size:
        return 0.0
    most = float(np.abs(found - expected).max() / np.abs(expected).max())
    return max(most, float(np.linalg.norm(found - expected) / np.linalg.norm(expected)))


def best(dense: Matrix, rank: int) -> Matrix:
    """The best approximation of a rank (Eckart and Young), by the SVD of the whole matrix."""
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def hello(run: ProductRound, name: str, node: int, rank: int, budget: float) -> Hello:
    return Hello(
        node_id=node,
        client=None,
        name=name,
        rank=rank,
        budget=budget,
        samples=10,
        heldout=5,
        simulated=False,
        key=run.secret.fingerprint,
        parameters=run.session.public.digest().hex(),
        settings=run.settings.digest().hex(),
        code=code_digest(),
        initial="ab" * 8,
        layers=run.plan.layers,
        heads=run.plan.heads,
    )


def wish_of(run: ProductRound, member: Member) -> Wish:
    """Random columns of its own, as they come over the wire."""
    rng = np.random.default_rng(member.number)
    scores = [rng.random(x.n) for x in run.plan.layers]
    named = wishes.wish(scores, run.codes, member.hello.budget)
    return parse_wish(member.name, member.hello.budget, named, [x.n for x in run.plan.layers])


def summed(run: ProductRound, federation: Federation, round_: int, members: Sequence[Member]) -> None:
    """A round of the members under the plan as it is, whose sum is the true one."""
    sum_, link = federation.open_round(round_, members), federation.session
    clients = [adapter_of(link.plan, m.hello.rank, m.number + 10 * round_) for m in members]
    for member, client in zip(members, clients, strict=True):
        data = exchange.seal(
            client,
            link,
            run.secret,
            round_=round_,
            sender=member.number,
            samples=10,
            total=10 * len(members),
            tier=wishes.agreed_tier(link.plan, member.hello.budget),
        )
        sum_.add(data, sender=member.number, who=federation.contributor(member))
    released = federation.close_round(sum_)
    base = blank(link.plan, 16)
    data = wire.encode(released, link)
    got, _ = exchange.unseal(data, link, run.secret, round_=round_, rank=released.rank, base=base)
    for layer in link.plan.layers:
        assert gap(got.layers[layer.name].delta(), true_update(clients, [10] * len(members), layer.name)) <= 1e-10
