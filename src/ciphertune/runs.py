"""The run folder: what a run leaves behind, and the server's writers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ciphertune.errors import SettingsError
from ciphertune.events import Events
from ciphertune.federation import Member
from ciphertune.plan import Plan
from ciphertune.settings import Settings
from ciphertune.versions import versions


class ServerFolder:
    """The server's files: settings, versions, plan, rounds, summary, the aggregates, and its view when recorded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: Events | None = None
        if (path / "settings.yaml").exists():
            raise SettingsError(f"run folder {path} holds another run already: choose another name=...")
        path.mkdir(parents=True, exist_ok=True)

    def start(self, settings: Settings, overrides: str) -> None:
        """Settings as resolved, the overrides they came from, and the versions."""
        text = yaml.safe_dump({"overrides": overrides, **_plain(asdict(settings))}, sort_keys=False)
        write(self.path / "settings.yaml", text.encode())
        write_json(self.path / "versions.json", versions())
        if settings.log == "tensorboard":
            self._events = Events(self.path / "tensorboard")

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
    temporary.write_bytes(data)
    temporary.replace(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON, indented, whole or not at all."""
    write(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
