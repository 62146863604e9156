"""The run folder: what a run leaves behind, and the server's writers."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ciphertune.errors import ResumeError, SettingsError
from ciphertune.events import Events
from ciphertune.federation import Member
from ciphertune.plan import Plan
from ciphertune.settings import Settings
from ciphertune.versions import versions

# Stages of rounds.jsonl whose lines stand when a round is begun again: a client's fault; that it was asked for an
# update with noise, which it may have sent; that it answered without one.
FAULT, ASKED, DECLINED = "fault", "asked", "declined"
_LASTING = (FAULT, ASKED, DECLINED)


class ServerFolder:
    """The server's files: settings, versions, plan, rounds, summary, the aggregates, and its view when recorded."""

    def __init__(self, path: Path, *, resumed: bool = False) -> None:
        self.path, self._resumed = path, resumed
        self._events: Events | None = None
        self._check()
        path.mkdir(parents=True, exist_ok=True)

    def _check(self) -> None:
        if not self._resumed and (self.path / "settings.yaml").exists():
            raise SettingsError(f"run folder {self.path} holds another run already: choose another name=...")

    def hold(self) -> None:
        """Keep other servers out of the folder until `release` or the end of this process.

        Raises ResumeError, or SettingsError where another has begun a run in it meanwhile.
        """
        lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check()
        except BlockingIOError:
            lock.close()
            raise ResumeError(f"another server works in {self.path}: wait until it has ended, or end it") from None
        except BaseException:
            lock.close()
            raise
        self._lock = lock

    def open_log(self, log: str) -> None:
        """Keep a log of this kind beside rounds.jsonl."""
        if log == "tensorboard":
            self._events = Events(self.path / "tensorboard")

    def release(self) -> None:
        """Let others in."""
        self._lock.close()

    def start(self, settings: Settings, overrides: str) -> None:
        """Settings as resolved, the overrides they came from, and the versions."""
        text = yaml.safe_dump({"overrides": overrides, **_plain(asdict(settings))}, sort_keys=False)
        write(self.path / "settings.yaml", text.encode())
        write_json(self.path / "versions.json", versions())

    def plan(self, plan: Plan, members: Sequence[Member], negotiation: Mapping[str, Any] | None = None) -> None:
        """The plan, who takes part, and where columns were negotiated what each client got of what it asked for."""
        shown = ("name", "rank", "samples", "budget") if plan.negotiates else ("name", "rank", "samples")
        people = [{"number": m.number, **{k: getattr(m.hello, k) for k in shown}} for m in members]
        extra = {"negotiation": negotiation} if negotiation else {}
        values = {"digest": plan.digest().hex(), "members": people, **extra, **asdict(plan)}
        write_json(self.path / "plan.json", values)
        if negotiation:  # of every negotiation, for the messages that were made under it
            write_json(self.path / "plans" / f"round_{negotiation['round']:04d}.json", values)

    def line(self, round_: int, stage: str, node: str, **values: Any) -> None:
        """One line of rounds.jsonl, and of the log beside it if there is one."""
        with (self.path / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"round": round_, "stage": stage, "node": node, **values}) + "\n")
        if self._events:
            self._events.line(round_, stage, node, values)

    def aggregate(self, round_: int, data: bytes) -> None:
        """The aggregate as the server holds it."""
        write(self.path / "server" / f"round_{round_:04d}.msg", data)

    def state(self, round_: int, values: Mapping[str, Any], plans: Iterable[Plan]) -> None:
        """What a later process needs to go on after this round; of earlier rounds the last is kept."""
        for plan in plans:
            path = self.path / "server" / f"plan-{plan.digest().hex()}.json"
            if not path.exists():
                write(path, plan.to_json().encode())
        write_json(self.path / "server" / f"state_{round_:04d}.json", values)
        (self.path / "server" / f"state_{round_ - 2:04d}.json").unlink(missing_ok=True)

    def cut(self, round_: int, *, but: str = "") -> None:
        """Move the lines of this round and later ones out of rounds.jsonl: they are done again.

        Those of the stage `but` stay, and those of a stage that always does.
        """
        path = self.path / "rounds.jsonl"
        kept: list[str] = []
        off: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                found = json.loads(line)
                (kept if found["round"] < round_ or found["stage"] in (but, *_LASTING) else off).append(line + "\n")
            except (ValueError, KeyError, TypeError):  # its writer was ended in the middle of it
                off.append(line + "\n")
        with (self.path / "interrupted.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(off)
        write(path, "".join(kept).encode())

    def lasting(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl that stand whatever is begun again; of a file that `cut` has gone through."""
        path = self.path / "rounds.jsonl"
        found = map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.is_file() else ())
        return [line for line in found if line["stage"] in _LASTING]

    def view(self, round_: int, node: str, data: bytes) -> None:
        """Exactly the bytes the server got from one client."""
        write(self.path / "server_view" / f"round_{round_:04d}" / f"{node}.msg", data)

    def summary(self, values: Mapping[str, Any]) -> None:
        """The outcome."""
        write_json(self.path / "summary.json", values)
        if self._events:
            self._events.finish(values)
            self._events = None


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a run folder, or an empty dict while there is none."""
    path = folder / "summary.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(data)
    except OSError:  # a full disk has no room for half a file
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON, indented, whole or not at all."""
    write(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
