"""What happened, as the server keeps it: rounds.jsonl while the run goes on, summary.json at its end."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ciphertune import wire
from ciphertune.federation import Member
from ciphertune.runs import ServerFolder
from ciphertune.scores import Score, mean, score_of, seconds_of, show, size
from ciphertune.settings import Settings


class Ledger:
    """Figures of one run."""

    def __init__(self, settings: Settings, folder: ServerFolder) -> None:
        self._settings, self._folder = settings, folder
        self._members: dict[str, Member] = {}
        self._up: dict[str, list[int]] = defaultdict(list)
        self._down: dict[str, list[int]] = defaultdict(list)
        self._values = [0, 0]  # clear, secret
        self._seconds: dict[str, float] = defaultdict(float)
        self._before: dict[int, Score | None] = {}
        self._present: dict[int, int] = {}
        self._round_seconds: list[float] = []
        self._start = time.perf_counter()
        self._base: dict[str, Score] = {}
        self.local: dict[str, Score] = {}
        self.federated: dict[str, Score] = {}

    def sent(self, round_: int, member: Member, size_: int) -> None:
        """Bytes of aggregates that went to a client at the start of a round."""
        self._members[member.name] = member
        self._down[member.name].append(size_)

    def update(
        self,
        round_: int,
        member: Member,
        report: Mapping[str, Any],
        message: wire.Message,
        values: tuple[int, int],
        size_: int,
        seconds: float,
    ) -> None:
        """A usable update: its report, its (clear, secret) values, its bytes, the seconds the server took to add it."""
        encrypted = self._settings.crypto.backend != "clear"
        clear, secret = values if encrypted else (sum(values), 0)
        self._values[0] += clear
        self._values[1] += secret
        self._up[member.name].append(size_)
        self._seconds["aggregate"] += seconds
        score = score_of(report)
        if round_ == 0:
            self._base[member.name] = score
        self.stages(round_, member, report)
        self._folder.line(
            round_,
            "update",
            member.name,
            seconds=round(seconds, 6),
            bytes_up=size_,
            bytes_down=self._down[member.name][-1],
            clear_bytes=len(message.clear) if encrypted else len(message.clear) + len(message.secret),
            cipher_bytes=len(message.secret) if encrypted else 0,
            values_clear=clear,
            values_cipher=secret,
            samples=member.hello.samples,
            loss=score.loss,
            metric=dict(score.metrics),
            train_loss=_number(report.get("train_loss")),
        )

    def stages(self, round_: int, member: Member, report: Mapping[str, Any]) -> None:
        """The seconds a client says it spent, per stage."""
        for stage, seconds in seconds_of(report).items():
            self._seconds[stage] += seconds
            self._folder.line(round_, stage, member.name, seconds=round(seconds, 6))

    def score_before(self, round_: int, score: Score | None, present: int) -> None:
        """What the clients measured before they trained in this round, and how many contributed."""
        self._before[round_], self._present[round_] = score, present

    def close_round(self, round_: int, seconds: float) -> None:
        """A round is over."""
        self._round_seconds.append(seconds)
        self._folder.line(round_, "round", "server", seconds=round(seconds, 6), contributors=self._present[round_])

    def round_line(self, round_: int) -> str:
        """One line of progress."""
        rounds = self._settings.federation.rounds
        left = rounds - round_ - 1
        mean_round = sum(self._round_seconds) / len(self._round_seconds)
        # the comparison trains once more what all rounds trained
        seconds = mean_round * (left + 0.5 + (rounds if self._settings.federation.compare_local else 0))
        asked = len(self._members)
        return (
            f"round {round_ + 1}/{rounds}: {self._present[round_]} of {asked} clients, held-out loss before it "
            f"{show(self._before[round_])}, "
            f"up {size(self._last(self._up))} down {size(self._last(self._down))} per client, "
            f"{self.encrypted_fraction:.0%} encrypted, {seconds:.0f} s left"
        )

    @property
    def encrypted_fraction(self) -> float:
        """Share of the values that travelled encrypted."""
        return self._values[1] / max(1, sum(self._values))

    def finish(self, status: str, reason: str = "") -> dict[str, Any]:
        """Write and return the summary."""
        summary = {
            "status": status,
            **({"reason": reason} if reason else {}),
            "method": self._settings.method.name,
            "rounds": len(self._round_seconds),
            "seconds": round(time.perf_counter() - self._start, 3),
            "base": _score(mean(list(self._base.values()))),
            "local": _score(mean(list(self.local.values()))),
            "federated": _score(mean(list(self.federated.values()))),
            "bytes_up": _mean([b for v in self._up.values() for b in v]),
            "bytes_down": _mean([b for v in self._down.values() for b in v if b]),
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
            "bytes_up": _mean(self._up[name]),
            "bytes_down": _mean([b for b in self._down[name] if b]),
            "encrypted_fraction": self.encrypted_fraction,
        }

    @staticmethod
    def _last(figures: Mapping[str, list[int]]) -> float:
        return _mean([v[-1] for v in figures.values() if v])


def _score(score: Score | None) -> dict[str, Any] | None:
    return score.as_dict() if score else None


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
