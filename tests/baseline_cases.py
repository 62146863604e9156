"""Shared by the tests of the baselines: a round in the clear in float64, from seal to unseal, and dense matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ciphertune import build, exchange, run_config, wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.aggregation import SeparateSum, cut
from ciphertune.crypto.clear import ClearPublic
from ciphertune.crypto.clear_secret import ClearSecret
from ciphertune.plan import HeadShape, LayerShape, column_count
from ciphertune.product import ProductSum
from ciphertune.ranks import LARGEST_NORM, Contributor
from ciphertune.settings import compose
from tests.oracle import Matrix, cohort

CONF = Path(__file__).parent.parent / "conf"
RANKS, SAMPLES = (2, 4, 8, 8), (37, 5, 120, 64)
LAYERS = (LayerShape("block.q", 30, 20), LayerShape("block.v", 16, 40))
HEADS = (HeadShape("classifier.bias", (3,)), HeadShape("classifier.weight", (3, 6)))
HEADER, CONTRIBUTOR, DIGEST = 106, 16, 32  # bytes of a message, as the layout in wire.py has them


@pytest.fixture(autouse=True)
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose the settings of a federation once and not for every message: that takes longer than all of its training.

    For a test file to import; the settings are frozen and depend on the arguments alone.
    """
    monkeypatch.setattr(run_config, "compose", cache(compose))


class Round:
    """One round of a method. samples: what each client's part is weighted by, for `weighting=norm` units of 1e-6.

    absent: clients that were asked and did not reply, of 74 samples each.  budgets: of the columns, in the order of
    `numbers`, which says per layer which columns are the most sensitive.  scales: of each client, else the plan's.
    """

    def __init__(
        self,
        *overrides: str,
        ranks: Sequence[int] = RANKS,
        samples: Sequence[int] = SAMPLES,
        round_: int = 0,
        absent: int = 0,
        budgets: Sequence[float] = (),
        scales: Sequence[float] = (),
        clients: Sequence[Adapter] = (),
    ) -> None:
        self.settings = compose(CONF, [*overrides, "crypto=clear", "crypto.precision=float64"])
        self.secret = ClearSecret(ClearPublic("float64"), self.settings.crypto.bound)
        plan = build.make_plan(self.settings, LAYERS, HEADS, tuple(sorted(set(ranks))))
        session = build.session(self.settings, plan, run=9, key_fingerprint=self.secret.fingerprint)
        codes = exchange.codes_of(session, self.secret)
        self.numbers = [np.random.default_rng(i).permutation(x.n).tolist() for i, x in enumerate(LAYERS)]
        if budgets:
            chosen = tuple(
                tuple(c[n[: column_count(x.n, max(budgets))]].tolist())
                for x, c, n in zip(LAYERS, codes, self.numbers, strict=True)
            )
            plan = replace(plan, budgets=tuple(sorted(set(budgets))), columns=chosen)
        self.plan, self.session, self.round = plan, replace(session, plan=plan), round_
        self.clients = list(clients) or cohort(plan, ranks, round_, seed=round_)
        if scales:
            self.clients = [with_scale(c, s) for c, s in zip(self.clients, scales, strict=True)]
        self.samples, norm = tuple(samples), plan.weighting == "norm"
        each = [LARGEST_NORM] * len(self.clients) if norm else list(samples)  # as the server knows them
        self.total = sum(each) + absent * (LARGEST_NORM if norm else 74)
        self.tiers = [plan.tier(b) for b in budgets or [0.0] * len(self.clients)]
        self.who = [Contributor(c.rank, n, t) for c, n, t in zip(self.clients, each, self.tiers, strict=True)]
        self.sum = self.empty()
        self.sent = [self.seal(i) for i in range(len(self.clients))]
        self.messages = [self.sum.add(data, sender=i, who=self.who[i - 1]) for i, data in enumerate(self.sent, 1)]
        self.released = self.sum.release(2)

    def empty(self) -> SeparateSum | ProductSum:
        """The round before any update."""
        kind = SeparateSum if self.plan.aggregate == "separate" else ProductSum
        return kind(self.session, self.round, self.total)

    def seal(self, i: int, samples: int = 0) -> bytes:
        """The update of client number i (from 0)."""
        return exchange.seal(
            self.clients[i],
            self.session,
            self.secret,
            round_=self.round,
            sender=i + 1,
            samples=samples or self.samples[i],
            total=self.total,
            tier=self.tiers[i],
        )

    def received(self, base: Adapter) -> Adapter:
        """What a client that holds `base` ends with; of a stack, what it has to merge."""
        message = cut(self.released, self.session, base.rank)
        data = wire.encode(message, self.session)
        return exchange.unseal(data, self.session, self.secret, round_=self.round, rank=message.rank, base=base)[0]

    def dropped(self, layer: int, client: int) -> list[int]:
        """The numbers of the columns that a client hides in a layer."""
        return self.numbers[layer][: self.plan.hidden(self.tiers[client])[layer]]


def with_scale(adapter: Adapter, scale: float) -> Adapter:
    """The adapter with another alpha / r."""
    return Adapter({n: LoraFactors(f.a, f.b, scale) for n, f in adapter.layers.items()}, adapter.heads)


def dense(factors: LoraFactors) -> Matrix:
    """dW = s B A, one component after the other."""
    return sum(factors.scale * np.outer(factors.b[:, k], factors.a[k]) for k in range(factors.rank))


def dense_norm(adapter: Adapter) -> float:
    """The Frobenius norm of all layers' dW together."""
    return float(np.linalg.norm([np.linalg.norm(dense(f), "fro") for f in adapter.layers.values()]))


def error(found: Matrix, expected: Matrix) -> float:
    """Largest error of an entry, relative to the largest entry."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def noise_in_mean(z: float, weights: dict[str, float], name: str) -> float:
    """Noise over sensitivity of `name` in the mean, for the observer among the others who knows most: its own noise."""
    return min(
        z * math.sqrt(sum(w**2 for n, w in weights.items() if n != observer)) / weights[name]
        for observer in set(weights) - {name}
    )
