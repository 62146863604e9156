"""The run folder: what a run leaves behind, the server's writers, and what reads it back."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ciphertune.durable import keep_names, make_folder
from ciphertune.errors import ResumeError, SettingsError, StateError
from ciphertune.events import Events
from ciphertune.federation import Member
from ciphertune.plan import Plan
from ciphertune.settings import Settings
from ciphertune.versions import versions

# Stages of rounds.jsonl whose lines stand when a round is begun again: a client's fault; that it was asked for an
# update with noise, which it may have sent; that it answered without one.
FAULT, ASKED, DECLINED = "fault", "asked", "declined"
_LASTING = (FAULT, ASKED, DECLINED)
_COUNTS = (
    "seconds", "bytes_up", "bytes_down", "clear_bytes", "cipher_bytes", "values_clear", "values_cipher", "samples",
    "loss", "train_loss", "contributors",
)  # fmt: skip
_LARGEST = 1e18
_NAMED_FAULTS = 5

Line = dict[str, Any]


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
            if stage in _LASTING:  # the only record of who is excluded, and of what privacy cost
                file.flush()
                os.fsync(file.fileno())
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
        for line in _text(path).splitlines() if path.is_file() else []:
            found = _line(line)  # none where its writer was ended in the middle of it
            stays = found is not None and (found["round"] < round_ or found["stage"] in (but, *_LASTING))
            (kept if stays else off).append(line + "\n")
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
    return read_values(path) if path.is_file() else {}


def read_values(path: Path, remedy: str = "put it back from a copy") -> dict[str, Any]:
    """The values in a JSON file, or in a YAML file, which must have names. Raises StateError, which says the remedy."""
    try:
        data = path.read_text(encoding="utf-8")
        found = yaml.safe_load(data) if path.suffix == ".yaml" else json.loads(data)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = (error.strerror if isinstance(error, OSError) else "") or "it is damaged"
    else:
        if isinstance(found, dict):
            return found
        why = "it holds no names with values"
    raise StateError(f"{path} cannot be read back ({why}): {remedy}")


def read_lines(folder: Path) -> tuple[list[Line], list[int]]:
    """The lines of rounds.jsonl that say when, what and who, and the numbers of the damaged ones, from 1.

    A cut-off run may have no such file, and half a line at its end. Raises StateError for a file that cannot be read.
    """
    path = folder / "rounds.jsonl"
    lines = _text(path).splitlines() if path.is_file() else []
    found = [_line(line) for line in lines]
    damaged = [at for at, (line, good) in enumerate(zip(lines, found, strict=True), 1) if good is None and line.strip()]
    return [good for good in found if good is not None], damaged


def damage(numbers: Sequence[int]) -> str:
    """Which lines of rounds.jsonl are damaged, for people."""
    shown = ", ".join(map(str, numbers[:_NAMED_FAULTS])) + (", ..." if len(numbers) > _NAMED_FAULTS else "")
    word = "line" if len(numbers) == 1 else "lines"
    return f"{len(numbers)} damaged {word} left out ({word} {shown})"


def number(value: Any) -> float | None:
    """A finite number that is not negative, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= _LARGEST else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise StateError(f"{path} cannot be read back ({error.strerror}): check its permissions") from None


def _line(text: str) -> Line | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if _is_line(values) else None


def _is_line(values: Any) -> bool:
    """Whether a line says when, what and who, and every figure in it is one."""
    if not isinstance(values, dict) or not all(isinstance(values.get(k), str) for k in ("stage", "node")):
        return False
    round_ = values.get("round")
    if type(round_) is not int or not 0 <= round_ < 10**6:
        return False
    metric = values.get("metric", {})
    figures: Iterable[Any] = [values[k] for k in _COUNTS if k in values]
    if not isinstance(metric, dict):
        return False
    return all(number(x) is not None for x in (*figures, *metric.values()))


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. What is written stays, whatever ends the machine after this."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else the new name could be on the disk before the data
        temporary.replace(path)
    except OSError:  # a full disk has no room for half a file
        temporary.unlink(missing_ok=True)
        raise
    keep_names(path.parent)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON, indented, whole or not at all."""
    write(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
