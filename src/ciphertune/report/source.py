"""What a run folder holds, as far as it can be read: a run may have failed, been cut off, or be of an older version.

Nothing here is trusted: names and layers were sent by clients, and a file may be damaged. A line of rounds.jsonl is
taken when all that it says has the right type, and named when it is left out; other values are looked at when used.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ciphertune.errors import SettingsError

_COUNTS = (
    "seconds", "bytes_up", "bytes_down", "clear_bytes", "cipher_bytes", "values_clear", "values_cipher", "samples",
    "loss", "train_loss", "contributors",
)  # fmt: skip
_LARGEST = 1e18
_NAMED_FAULTS = 5


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
    lines = _lines(folder / "rounds.jsonl", faults)
    settings = _settings(folder / "settings.yaml", faults)
    found = {
        name: _json(folder / f"{name}.json", faults, wanted=name != "audit")
        for name in ("versions", "plan", "summary", "audit")
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
        audit=found["audit"] or None,
        faults=tuple(faults),
        adapters=tuple(adapters),
        simulated=clients.is_dir(),
    )


def pick(values: Any, *path: str) -> Any:
    """A nested value, None where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def number(value: Any) -> float | None:
    """A finite number that is not negative, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= _LARGEST else None


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


def _lines(path: Path, faults: list[str]) -> list[Mapping[str, Any]]:
    kept: list[Mapping[str, Any]] = []
    damaged: list[int] = []
    for place, line in enumerate(_read(path, faults).splitlines(), 1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if _is_line(values):
            kept.append(values)
        elif line.strip():
            damaged.append(place)
    if damaged:
        shown = ", ".join(map(str, damaged[:_NAMED_FAULTS])) + (", ..." if len(damaged) > _NAMED_FAULTS else "")
        word = "line" if len(damaged) == 1 else "lines"
        faults.append(f"{path.name}: {len(damaged)} damaged {word} left out ({word} {shown}).")
    return kept


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


def _json(path: Path, faults: list[str], *, wanted: bool) -> dict[str, Any]:
    if not wanted and not path.is_file():
        return {}
    try:
        values = json.loads(_read(path, faults) or "{}")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        faults.append(f"{path.name} is damaged and was left out.")
    return values if isinstance(values, dict) else {}


def _settings(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(_read(path, faults) or "{}")
    except (yaml.YAMLError, RecursionError):
        values = None
    if not isinstance(values, dict):
        faults.append(f"{path.name} is damaged and was left out.")
    return values if isinstance(values, dict) else {}


def _read(path: Path, faults: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        faults.append(f"{path.name} is missing.")
        return ""
