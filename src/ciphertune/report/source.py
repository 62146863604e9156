"""What a run folder holds, as far as it can be read: a run may have failed, been cut off, or be of an older version.

Nothing here is trusted: names and layers were sent by clients, and a file may be damaged. A line of rounds.jsonl is
taken when all that it says has the right type, and named when it is left out; other values are looked at when used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ciphertune.errors import SettingsError, StateError
from ciphertune.progress import printable
from ciphertune.runs import damage, number, read_lines, read_values


@dataclass(frozen=True)
class Run:
    """A run folder. faults: what is missing or damaged, in sentences. adapters: the clients whose adapter is in it."""

    name: str
    settings: Mapping[str, Any]
    versions: Mapping[str, Any]
    plan: Mapping[str, Any]
    lines: tuple[Mapping[str, Any], ...]  # each with round, stage and node, and no figure that is none
    summary: Mapping[str, Any]
    audit: Mapping[str, Any] | None
    faults: tuple[str, ...]
    adapters: tuple[str, ...]
    simulated: bool  # server and clients left their files in one folder

    def at(self, round_: int | None = None, stage: str | None = None) -> list[Mapping[str, Any]]:
        """The lines of a round, of a stage, or both."""
        lines = self.lines if round_ is None else self._by_round.get(round_, [])
        return [x for x in lines if stage is None or x["stage"] == stage]

    @cached_property
    def _by_round(self) -> Mapping[int, list[Mapping[str, Any]]]:
        found: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for line in self.lines:
            found[line["round"]].append(line)
        return found

    @cached_property
    def rounds(self) -> list[int]:
        """Rounds in which something was trained, ascending."""
        return sorted({x["round"] for x in self.lines if x["stage"] in ("update", "aggregate", "round")})


def read_run(folder: Path) -> Run:
    """All of it. Raises SettingsError when the folder does not hold a run."""
    if not (folder / "settings.yaml").is_file() and not (folder / "summary.json").is_file():
        raise SettingsError(f"{folder} is not the folder of a run: give one with a settings.yaml, such as runs/NAME")
    faults: list[str] = []
    lines = _lines(folder, faults)
    settings = _values(folder / "settings.yaml", faults)
    found = {
        name: _values(folder / f"{name}.json", faults)
        for name in ("versions", "plan", "summary", "audit")
        if name != "audit" or (folder / "audit.json").is_file()
    }
    clients = folder / "clients"
    try:
        adapters = sorted(p.parts[-3] for p in clients.glob("*/adapter/adapter_config.json"))
    except OSError:  # another user's
        adapters = []
    return Run(
        name=folder.resolve().name,
        settings=settings,
        versions=found["versions"],
        plan=found["plan"],
        lines=tuple(lines),
        summary=found["summary"],
        audit=found.get("audit") or None,
        faults=tuple(faults),
        adapters=tuple(adapters),
        simulated=clients.is_dir(),
    )


def pick(values: Any, *path: str) -> Any:
    """A nested value, None where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def text(value: Any, longest: int = 200) -> str:
    """A value as a short text in one line; empty for None. What cannot be shown, or turns text around, is a `?`."""
    found = "" if value is None else str(value)[: longest + 1].replace("\n", " ")
    found = "".join(c if c.isprintable() else "?" for c in found)
    return found if len(found) <= longest else found[: longest - 1] + "…"


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """The dictionaries in a list; none where it is no list."""
    return [x for x in value if isinstance(x, Mapping)] if isinstance(value, list) else []


def score(values: Any, metric: str) -> float | None:
    """A loss, or one of the metrics beside it, of a line or of a summary's `base`, `local` or `federated`."""
    return number(pick(values, "loss") if metric == "loss" else pick(values, "metric", metric))


def _lines(folder: Path, faults: list[str]) -> list[Mapping[str, Any]]:
    try:
        kept, damaged = read_lines(folder)
    except StateError as error:
        faults.append(f"{_named(error, folder)}.")
        return []
    if damaged:
        faults.append(f"rounds.jsonl: {damage(damaged)}.")
    elif not kept and not (folder / "rounds.jsonl").is_file():
        faults.append("rounds.jsonl is missing.")
    return list(kept)


def _values(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        return read_values(path)
    except StateError as error:
        if path.is_file():
            faults.append(f"{_named(error, path.parent)}; it was left out.")
        else:
            faults.append(f"{path.name} is missing.")
        return {}


def _named(error: Exception, folder: Path) -> str:
    """The error, without this machine's folders."""
    return printable(str(error)).replace(f"{folder}/", "")
