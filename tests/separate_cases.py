"""Shared by the tests of the methods that sum factors apart: a round from seal to unseal, and its errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ciphertune import build, exchange, wire
from ciphertune.adapter import Adapter
from ciphertune.aggregation import SeparateSum, cut
from ciphertune.crypto.clear import ClearPublic
from ciphertune.crypto.clear_secret import ClearSecret
from ciphertune.crypto.secret import SecretPart
from ciphertune.plan import HeadShape, LayerShape
from ciphertune.ranks import Contributor
from ciphertune.settings import ckks_params, compose, packed_params
from ciphertune.wire import Session
from tests.oracle import Matrix, adapter_of, cohort, mean_factor, mean_head, shared_secret, truncated

CONF = Path(__file__).parent.parent / "conf"
IN_FLOAT64 = ("crypto=clear", "crypto.precision=float64")
RANKS, SAMPLES = (2, 4, 8, 8), (37, 5, 120, 64)
# one component has 450 (B) or 600 (A) values: no whole number of them fills a ciphertext of 2048 or 4096
LAYERS = (LayerShape("block.q", 300, 200), LayerShape("block.v", 150, 400))
HEADS = (HeadShape("classifier.bias", (3,)), HeadShape("classifier.weight", (3, 6)))


def constant(rate: float) -> tuple[str, ...]:
    """Pruning at the same rate in every round."""
    words = ("prune_start", rate), ("prune_target", rate), ("prune_from", 0), ("prune_until", 1)
    return ("method.prune_schedule=fixed", *(f"method.{name}={value}" for name, value in words))


class Round:
    """One round of a method with clients of the given ranks, and what each of them ends up with.

    held: what all of them hold before the round, each at its rank.  absent: samples of one that was asked in vain.
    """

    def __init__(
        self,
        overrides: Sequence[str],
        round_: int,
        *,
        ranks: Sequence[int] = RANKS,
        samples: Sequence[int] = SAMPLES,
        absent: int = 0,
        clients: Sequence[Adapter] = (),
        held: Adapter | None = None,
        layers: tuple[LayerShape, ...] = LAYERS,
        heads: tuple[HeadShape, ...] = HEADS,
        key: int = 0,
    ) -> None:
        self.settings, self.round = compose(CONF, list(overrides)), round_
        self.plan = build.make_plan(self.settings, layers, heads, tuple(sorted(set(ranks))))
        self.session, self.secret = self._parties(key)
        self.clients = list(clients) or cohort(self.plan, ranks, round_, seed=round_)
        self.held = held or adapter_of(self.plan, max(ranks), 77)
        self.samples, self.total = list(samples), sum(samples) + absent
        most = self.samples
        if self.plan.weighting == "norm":  # the server knows no client's norm, only the largest there may be
            self.samples, self.total = [norm(c) for c in self.clients], 10**9 * (len(ranks) + (absent > 0))
            most = [10**9] * len(ranks)
        self.sent = [self.seal(i) for i in range(len(ranks))]
        self.who = [Contributor(c.rank, n) for c, n in zip(self.clients, most, strict=True)]
        sum_ = SeparateSum(self.session, round_, self.total)
        self.messages = [
            sum_.add(data, sender=i + 1, who=who) for i, (data, who) in enumerate(zip(self.sent, self.who, strict=True))
        ]
        self.released = sum_.release(2)
        self.received = [self.receive(client) for client in self.clients]

    def seal(self, i: int, **changes: Any) -> bytes:
        """The update of client number i (from 0)."""
        client = self.clients[i]
        named = {
            "round_": self.round,
            "sender": i + 1,
            "samples": self.samples[i],
            "total": self.total,
            "guide": truncated(self.held, client.rank),
        }
        return exchange.seal(client, self.session, changes.pop("secret", self.secret), **(named | changes))

    def receive(self, base: Adapter, **changes: Any) -> Adapter:
        """What a client that holds `base` ends with. changes: of the aggregate, on its way to it."""
        message = cut(self.released, self.session, base.rank)
        data = wire.encode(replace(message, **changes), self.session)
        return exchange.unseal(data, self.session, self.secret, round_=self.round, rank=message.rank, base=base)[0]

    def _parties(self, key: int) -> tuple[Session, SecretPart]:
        crypto = self.settings.crypto
        secret: SecretPart
        if crypto.backend == "clear":
            secret = ClearSecret(ClearPublic(crypto.precision), crypto.bound)
        else:
            secret = shared_secret(packed_params(crypto) if crypto.packed else ckks_params(crypto), key)
        return build.session(self.settings, self.plan, run=9, key_fingerprint=secret.fingerprint), secret

    def bound(self, k: int | None = None) -> float:
        """Largest error of component k's mean (of a head's without k): that of the sum over the divisor."""
        have = [n for c, n in zip(self.clients, self.samples, strict=True) if k is None or c.rank > k]
        divisor = sum(have if self.plan.fit_rank == "nested" else self.samples) / self.total
        largest = max(
            float(np.abs(x).max())
            for c in self.clients
            for x in [*c.heads.values(), *(m for f in c.layers.values() for m in (f.a, f.b))]
        )
        parts = [p for p, used in ((self.session.public, "secret"), (self.session.clear, "clear")) if self._uses(used)]
        return max(p.error_bound(len(self.clients), largest * divisor) for p in parts) / divisor

    def _uses(self, part: str) -> bool:
        return any(getattr(message, part) for message in self.messages)

    def errors(self, fit_rank: str, travels: Sequence[str]) -> list[tuple[float, float, float]]:
        """(error, bound, size) of every mean that a client got, against the oracle."""
        found = []
        for client in self.received:
            for name, factors in client.layers.items():
                for factor in travels:
                    expected = mean_factor(self.clients, self.samples, name, factor, fit_rank)
                    rows = factors.a if factor == "a" else factors.b.T
                    for k in range(client.rank):
                        found.append((gap(rows[k], expected[k]), self.bound(k), float(np.abs(expected).max())))
            for name, head in client.heads.items():
                expected = mean_head(self.clients, self.samples, name)
                found.append((gap(head, expected), self.bound(), float(np.abs(expected).max())))
        return found


def norm(adapter: Adapter) -> int:
    """HetLoRA's weight: the Frobenius norm of the whole update, in millionths."""
    dense = [f.scale * np.einsum("mk,kn->mn", f.b, f.a) for f in adapter.layers.values()]
    return round(1e6 * float(np.sqrt(sum((d**2).sum() for d in dense))))


def gap(found: Matrix, expected: Matrix) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())
