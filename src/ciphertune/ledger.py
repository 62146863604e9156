"""What happened, as the server keeps it: rounds.jsonl while the run goes on, summary.json at its end."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ciphertune import wire
from ciphertune.federation import Member
from ciphertune.privacy import Spent, noise_multiplier
from ciphertune.runs import ASKED, DECLINED, ServerFolder
from ciphertune.scores import Report, Score, mean, show, size
from ciphertune.settings import Settings


@dataclass
class _Sum:
    """A running sum, and the mean of what was added."""

    total: float = 0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass
class _Round:
    """The round that goes on. asked: clients; people: whose updates were usable, with weight and shared components."""

    asked: int = 0
    up: _Sum = field(default_factory=_Sum)
    down: _Sum = field(default_factory=_Sum)
    people: dict[str, tuple[float, int]] = field(default_factory=dict)
    before: Score | None = None


class Ledger:
    """Figures of one run. Of past rounds only sums stay in memory."""

    def __init__(self, settings: Settings, folder: ServerFolder, excluded: Mapping[str, str] | None = None) -> None:
        self._settings, self._folder = settings, folder
        self._excluded = {} if excluded is None else excluded  # client -> why; it may grow while the run goes on
        self._members: dict[str, Member] = {}
        self._up: dict[str, _Sum] = defaultdict(_Sum)  # client -> bytes
        self._down: dict[str, _Sum] = defaultdict(_Sum)
        self._talk: dict[str, int] = {}  # bytes of negotiations, both ways, until the client trains
        self._sent: dict[str, int] = {}  # bytes of the last task
        self._now = _Round()
        self._values = [0, 0]  # clear, encrypted
        self._seconds: dict[str, float] = defaultdict(float)
        self._rounds = _Sum()  # seconds
        method = settings.method
        self._spent = (
            Spent(noise_multiplier(method, settings.federation.rounds), method.delta)
            if method.noise != "none"
            else None
        )
        self._epsilon: dict[str, dict[str, float]] = {}
        self._start = time.perf_counter()
        self._cut = 0.0  # what the rank cap cost in the last round, in the layer where it cost most
        self._base: dict[str, Score] = {}
        self.local: dict[str, Score] = {}
        self.federated: dict[str, Score] = {}

    def state(self) -> dict[str, Any]:
        """What a later process needs to go on from the end of a round, as plain values."""
        return {
            "members": sorted(self._members),
            "up": {name: asdict(x) for name, x in self._up.items()},
            "down": {name: asdict(x) for name, x in self._down.items()},
            "talk": self._talk,
            "values": self._values,
            "seconds": self._seconds,
            "rounds": asdict(self._rounds),
            "spent": self._spent.state() if self._spent else None,
            "base": {name: asdict(x) for name, x in self._base.items()},
            "elapsed": time.perf_counter() - self._start,
        }

    def restore(self, state: Mapping[str, Any], members: Sequence[Member]) -> None:
        """Go on from what `state` returned. Raises KeyError, TypeError or ValueError for anything else."""
        self._members = {m.name: m for m in members if m.name in state["members"]}
        for mine, kept in ((self._up, state["up"]), (self._down, state["down"])):
            mine.update({name: _Sum(**x) for name, x in kept.items()})
        self._talk, self._values = dict(state["talk"]), list(state["values"])
        self._seconds.update(state["seconds"])
        self._rounds = _Sum(**state["rounds"])
        if self._spent:
            self._spent.restore(state["spent"])
        self._base = {name: Score(**x) for name, x in state["base"].items()}
        self._start -= float(state["elapsed"])

    def open_round(self) -> None:
        """A round begins, perhaps once more."""
        self._now = _Round()

    def asked(self, round_: int, member: Member, size_: int) -> None:
        """A client was asked to train, with that many bytes of aggregates."""
        self._members[member.name] = member
        self._now.asked += 1
        # what the negotiation brought, perhaps in a round in which this client did not train, counts from here
        down = size_ + self._talk.pop(member.name, 0)
        self._now.down.add(down)
        if down:
            self._down[member.name].add(down)
        self._sent[member.name] = size_
        if self._spent:  # whatever comes of it: late or unreadable, it was sent
            self._spent.asked(member.name, round_)
            self._folder.line(round_, ASKED, member.name)

    def declined(self, round_: int, member: Member) -> None:
        """A client answered that it could not train: it sent no update."""
        if self._spent:
            self._spent.declined(member.name, round_)
            self._folder.line(round_, DECLINED, member.name)

    def recall(self) -> None:
        """Take up whom a run that is resumed asked for updates with noise, also in a round that was cut off."""
        for line in self._folder.lasting() if self._spent else ():
            if self._spent and line["stage"] in (ASKED, DECLINED):
                count = self._spent.asked if line["stage"] == ASKED else self._spent.declined
                count(line["node"], line["round"])

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
        self._now.people[member.name] = message.contributors[0].samples / message.total, message.rank
        self._now.up.add(size_)
        self._up[member.name].add(size_)
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
            self._spent.released(self._now.people)
            self._epsilon = self._spent.report()
            for name, views in self._epsilon.items():
                found = {f"epsilon_{view}": value for view, value in views.items()}
                self._folder.line(round_, "privacy", name, **found, delta=self._settings.method.delta)
        self._now.before = before
        self._rounds.add(seconds)
        people = len(self._now.people)
        self._folder.line(round_, "round", "server", seconds=round(seconds, 6), contributors=people, **_before(before))

    def round_line(self, round_: int) -> str:
        """One line of progress."""
        rounds = self._settings.federation.rounds
        left = rounds - round_ - 1
        now = self._now
        # the comparison trains once more what all rounds trained
        seconds = self._rounds.mean * (left + 0.5 + (rounds if self._settings.federation.compare_local else 0))
        return (
            f"round {round_ + 1}/{rounds}: {len(now.people)} of {now.asked} clients, held-out loss before it "
            f"{show(now.before)}, up {size(now.up.mean)} down {size(now.down.mean)} per client, "
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
            "rounds": self._rounds.count,
            "seconds": round(time.perf_counter() - self._start, 3),
            "base": base,
            "local": local,
            "federated": federated,
            "bytes_up": _total(self._up.values()).mean,
            "bytes_down": _total(self._down.values()).mean,
            "encrypted_fraction": self.encrypted_fraction,
            "seconds_by_stage": {k: round(v, 3) for k, v in self._seconds.items()},
            "nodes": {name: self._node(name) for name in sorted(self._members)},
        }
        self._folder.summary(summary)
        return summary

    def _node(self, name: str) -> dict[str, Any]:
        hello = self._members[name].hello
        return {
            "rank": hello.rank,
            "samples": hello.samples,
            "base": _score(self._base.get(name)),
            "local": _score(self.local.get(name)),
            "federated": _score(self.federated.get(name)),
            "bytes_up": self._up[name].mean,
            "bytes_down": self._down[name].mean,
            "encrypted_fraction": self.encrypted_fraction,
            **({"epsilon": self._epsilon[name]} if name in self._epsilon else {}),
        }


def _before(score: Score | None) -> dict[str, Any]:
    return score.as_dict() if score else {}


def _score(score: Score | None) -> dict[str, Any] | None:
    return score.as_dict() if score else None


def _total(sums: Iterable[_Sum]) -> _Sum:
    whole = _Sum()
    for one in sums:
        whole = _Sum(whole.total + one.total, whole.count + one.count)
    return whole
