"""What happened, as the server keeps it: rounds.jsonl while the run goes on, summary.json at its end."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ciphertune import wire
from ciphertune.federation import Member
from ciphertune.privacy import Spent, noise_multiplier
from ciphertune.runs import ServerFolder
from ciphertune.scores import Report, Score, mean, show, size
from ciphertune.settings import Settings


class Ledger:
    """Figures of one run."""

    def __init__(self, settings: Settings, folder: ServerFolder, excluded: Mapping[str, str] | None = None) -> None:
        self._settings, self._folder = settings, folder
        self._excluded = {} if excluded is None else excluded  # client -> why; it may grow while the run goes on
        self._members: dict[str, Member] = {}
        self._up: dict[int, dict[str, int]] = defaultdict(dict)  # round -> client -> bytes
        self._down: dict[int, dict[str, int]] = defaultdict(dict)
        self._talk: dict[str, int] = {}  # bytes of negotiations, both ways, until the client trains
        self._sent: dict[str, int] = {}  # bytes of the last task
        self._asked: dict[int, int] = defaultdict(int)  # round -> clients asked to train, and updates that were usable
        self._added: dict[int, int] = defaultdict(int)
        self._values = [0, 0]  # clear, encrypted
        self._seconds: dict[str, float] = defaultdict(float)
        self._before: dict[int, Score | None] = {}
        self._round_seconds: list[float] = []
        method = settings.method
        self._spent = (
            Spent(noise_multiplier(method, settings.federation.rounds), method.delta)
            if method.noise != "none"
            else None
        )
        self._people: dict[str, tuple[float, int]] = {}  # this round's contributors: weight and shared components
        self._epsilon: dict[str, dict[str, float]] = {}
        self._start = time.perf_counter()
        self._cut = 0.0  # what the rank cap cost in the last round, in the layer where it cost most
        self._base: dict[str, Score] = {}
        self.local: dict[str, Score] = {}
        self.federated: dict[str, Score] = {}

    def asked(self, round_: int, member: Member, size_: int) -> None:
        """A client was asked to train, with that many bytes of aggregates."""
        self._members[member.name] = member
        self._asked[round_] += 1
        # what the negotiation brought, perhaps in a round in which this client did not train, counts from here
        self._down[round_][member.name] = size_ + self._talk.pop(member.name, 0)
        self._sent[member.name] = size_

    def negotiated(self, round_: int, member: Member, up: int, down: int) -> None:
        """A client was asked which columns it wants encrypted: bytes of its answer and of what it was sent."""
        self._talk[member.name] = self._talk.get(member.name, 0) + up + down
        self._folder.line(round_, "negotiation", member.name, bytes_up=up, bytes_down=down)

    def update(
        self, round_: int, member: Member, report: Report, message: wire.Message, values: tuple[int, int], size_: int
    ) -> None:
        """A usable update: the client's report, the message, its (clear, encrypted) values and its bytes."""
        clear, encrypted = values
        self._values[0] += clear
        self._values[1] += encrypted
        self._added[round_] += 1
        self._people[member.name] = message.contributors[0].samples / message.total, message.rank
        self._up[round_][member.name] = size_
        if round_ == 0 and report.score:
            self._base[member.name] = report.score
        self.stages(round_, member, report.seconds)
        payload = len(message.clear) + len(message.secret)
        self._folder.line(
            round_,
            "update",
            member.name,
            bytes_up=size_,
            bytes_down=self._sent[member.name],
            clear_bytes=len(message.clear) if encrypted else payload,
            cipher_bytes=len(message.secret) if encrypted else 0,
            values_clear=clear,
            values_cipher=encrypted,
            samples=member.hello.samples,
            **({"loss": report.score.loss, "metric": dict(report.score.metrics)} if report.score else {}),
            train_loss=report.train_loss,
        )

    def arrived(self, member: Member) -> None:
        """An update came, usable or not: where it has noise, this is what its sender gave away."""
        if self._spent:
            self._spent.arrived(member.name)
            self._members[member.name] = member

    def stages(self, round_: int, member: Member, spent: Mapping[str, float]) -> None:
        """The seconds a client says it spent, per stage."""
        for stage, seconds in spent.items():
            self._seconds[stage] += seconds
            self._folder.line(round_, stage, member.name, seconds=round(seconds, 6))

    def aggregated(self, round_: int, seconds: float, **extra: Any) -> None:
        """The seconds the server took to check and add the updates of a round, and what the rule says of itself."""
        self._cut = max(extra.get("truncation", {}).values(), default=0.0)
        self._seconds["aggregate"] += seconds
        self._folder.line(round_, "aggregate", "server", seconds=round(seconds, 6), **extra)

    def close_round(self, round_: int, before: Score | None, seconds: float) -> None:
        """A round is over. before: the mean of what the clients measured before they trained in it."""
        if self._spent:
            self._spent.released(self._people)
            self._epsilon = self._spent.report()
            for name, views in self._epsilon.items():
                found = {f"epsilon_{view}": value for view, value in views.items()}
                self._folder.line(round_, "privacy", name, **found, delta=self._settings.method.delta)
            self._people = {}
        self._before[round_] = before
        self._round_seconds.append(seconds)
        self._folder.line(
            round_, "round", "server", seconds=round(seconds, 6), contributors=self._added[round_], **_before(before)
        )

    def round_line(self, round_: int) -> str:
        """One line of progress."""
        rounds = self._settings.federation.rounds
        left = rounds - round_ - 1
        mean_round = sum(self._round_seconds) / len(self._round_seconds)
        # the comparison trains once more what all rounds trained
        seconds = mean_round * (left + 0.5 + (rounds if self._settings.federation.compare_local else 0))
        up, down = (_mean(list(x[round_].values())) for x in (self._up, self._down))
        return (
            f"round {round_ + 1}/{rounds}: {self._added[round_]} of {self._asked[round_]} clients, "
            f"held-out loss before it {show(self._before[round_])}, up {size(up)} down {size(down)} per client, "
            f"{self.encrypted_fraction:.0%} encrypted, {f'rank cap cut {self._cut:.1%}, ' if self._cut > 1e-4 else ''}"
            f"{self._worst()}{seconds:.0f} s left"
        )

    def _worst(self) -> str:
        """The largest epsilon so far, in words; empty without noise."""
        if not self._epsilon:
            return ""
        server, client = (max(views[v] for views in self._epsilon.values()) for v in ("server", "client"))
        return f"epsilon {server:.3g} to the server, {client:.3g} to another client, "

    @property
    def encrypted_fraction(self) -> float:
        """Share of the values that travelled encrypted."""
        return self._values[1] / max(1, sum(self._values))

    def finish(self, status: str, reason: str = "") -> dict[str, Any]:
        """Write and return the summary. Its means are over the clients that have every one of the figures."""
        self._epsilon = self._spent.report() if self._spent else {}
        columns = [c for c in (self._base, self.local, self.federated) if c]
        common = sorted(set.intersection(*(set(c) for c in columns))) if columns else []
        base, local, federated = (
            _score(mean([c[n] for n in common if n in c])) for c in (self._base, self.local, self.federated)
        )
        summary = {
            "status": status,
            **({"reason": reason} if reason else {}),
            **({"excluded": dict(self._excluded)} if self._excluded else {}),
            "method": self._settings.method.name,
            "rounds": len(self._round_seconds),
            "seconds": round(time.perf_counter() - self._start, 3),
            "base": base,
            "local": local,
            "federated": federated,
            "bytes_up": _mean([b for per in self._up.values() for b in per.values()]),
            "bytes_down": _mean([b for per in self._down.values() for b in per.values() if b]),
            "encrypted_fraction": self.encrypted_fraction,
            "seconds_by_stage": {k: round(v, 3) for k, v in self._seconds.items()},
            "nodes": {name: self._node(name) for name in sorted(self._members)},
        }
        self._folder.summary(summary)
        return summary

    def _node(self, name: str) -> dict[str, Any]:
        hello = self._members[name].hello
        up, down = ([per[name] for per in x.values() if per.get(name)] for x in (self._up, self._down))
        return {
            "rank": hello.rank,
            "samples": hello.samples,
            "base": _score(self._base.get(name)),
            "local": _score(self.local.get(name)),
            "federated": _score(self.federated.get(name)),
            "bytes_up": _mean(up),
            "bytes_down": _mean(down),
            "encrypted_fraction": self.encrypted_fraction,
            **({"epsilon": self._epsilon[name]} if name in self._epsilon else {}),
        }


def _before(score: Score | None) -> dict[str, Any]:
    return score.as_dict() if score else {}


def _score(score: Score | None) -> dict[str, Any] | None:
    return score.as_dict() if score else None


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0
