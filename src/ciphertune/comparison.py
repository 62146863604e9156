"""What a comparison found: run folders -> figures per row and seed -> the result files (for people: charts.py)."""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ciphertune.errors import SettingsError, StateError
from ciphertune.runs import Line, read_lines, read_summary, read_values, write, write_json
from ciphertune.scores import Score, mean, size
from ciphertune.settings import Settings
from ciphertune.versions import code_digest, versions

SHARES = ("accuracy", "f1")  # metrics shown as percentages
STAGES = ("load", "unseal", "evaluate", "score", "train", "seal", "aggregate", "save")  # of a round, in order
_PATHS = ("model.name", "data.path", "data.heldout_path")
_HAS = ("base", "local", "federated")


@dataclass(frozen=True)
class Row:
    """A line of the comparison. words: its own overrides, its method among them. slug: its name in file names."""

    name: str
    slug: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One run: a row under one seed, with the words it is started by and the settings these come to."""

    row: Row
    seed: int
    words: tuple[str, ...]
    settings: Settings
    folder: Path
    log: Path

    @property
    def label(self) -> str:
        """The cell for people."""
        return f"{self.row.name}, seed {self.seed}"


def is_done(cell: Cell) -> bool:
    """Whether the run is finished. Raises SettingsError when it was made under other settings or by other code."""
    remedy = f"give another --out, or delete {cell.folder}"
    try:
        if read_summary(cell.folder).get("status") != "completed":
            return False
        then, now = _flat(read_values(cell.folder / "settings.yaml")), _flat(asdict(cell.settings))
        code = read_values(cell.folder / "versions.json").get("code")
        read_run(cell.folder)
    except StateError as error:
        raise SettingsError(f"{cell.folder} holds a run that cannot be read back ({error}): {remedy}") from None
    for key in sorted({*then, *now} - {"overrides", "name", "runs_dir", "resume"}):
        if then.get(key) != now.get(key):
            raise SettingsError(
                f"{cell.folder} holds a run with {key}={then.get(key)!r}, not {now.get(key)!r}: {remedy}"
            )
    if code != code_digest():
        raise SettingsError(f"{cell.folder} holds a run of other code ({code}, now {code_digest()}): {remedy}")
    return True


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys; a tuple is the list that YAML makes of it."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{where}{key}.")
        else:
            flat[where + key] = json.loads(json.dumps(value))
    return flat


def check_removable(folder: Path) -> None:
    """Raise SettingsError unless what is there came from a run: an unfinished one is removed before the next try."""
    ours = any((folder / name).exists() for name in ("settings.yaml", "clients", "flower.log"))
    if folder.is_symlink() or (folder.exists() and not ours and any(folder.iterdir())):
        raise SettingsError(f"{folder} is in the way and is not a run folder: give another --out, or move it")


def write_results(out: Path, common: Sequence[str], states: Mapping[Cell, str]) -> None:
    """Write all result files of what is finished so far. states: completed | failed | not run, per cell."""
    from ciphertune.charts import markdown, page

    found = results(out.name, common, states)
    write_json(out / "compare.json", found)
    write(out / "compare.csv", _csv(found).encode())
    write(out / "compare.md", markdown(found).encode())
    write(out / "compare.html", page(found).encode())


def results(title: str, common: Sequence[str], states: Mapping[Cell, str]) -> dict[str, Any]:
    """Everything that is known, as plain values. Folders of models and data are named by their last part alone."""
    rows: dict[str, Any] = {}
    for cell, state in states.items():
        row = rows.setdefault(
            cell.row.name,
            {
                "method": cell.settings.method.name,
                "overrides": [shown(w) for w in cell.row.words],
                "seeds": {},
                "status": {},
            },
        )
        row["status"][str(cell.seed)] = state
        if state == "completed":
            row["seeds"][str(cell.seed)] = read_run(cell.folder)
    for row in rows.values():
        row["mean"], row["std"] = _over_seeds(row["seeds"].values())
    about = {
        "name": title,
        "overrides": [shown(w) for w in common],
        "rows": list(rows),
        "seeds": sorted({cell.seed for cell in states}),
        "runs": len(states),
        "completed": sum(s == "completed" for s in states.values()),
        "versions": versions(),
    }
    return {"about": about, "rows": rows}


def shown(word: str) -> str:
    """An override without the folders of this machine."""
    key, equals, value = word.partition("=")
    if key.lstrip("+") in _PATHS:
        return key + equals + value.strip("'\"").rstrip("/").rsplit("/", 1)[-1]
    if key.lstrip("+") == "data.dataset":  # a name on the hub
        return word
    return key + equals + re.sub(r"[^,:=\[\]{}'\"]*/", "", value)


def read_run(folder: Path) -> dict[str, Any]:
    """The figures of one finished run. seconds: of its rounds, which unlike the whole run every row has alike.

    Raises StateError where a file is damaged: means over seeds must not leave a part of a run out.
    """
    summary = read_summary(folder)
    lines, damaged = read_lines(folder)
    if damaged:
        raise StateError(f"{folder / 'rounds.jsonl'} is damaged in line {damaged[0]}")
    try:
        return _figures_of(summary, lines)
    except (KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{folder} lacks figures of a finished run ({error})") from None


def _figures_of(summary: Mapping[str, Any], lines: list[Line]) -> dict[str, Any]:
    return {
        **{key: summary[key] for key in (*_HAS, "bytes_up", "bytes_down", "encrypted_fraction")},
        "seconds": round(sum(x["seconds"] for x in lines if x["stage"] == "round"), 3),
        "seconds_run": summary["seconds"],
        "seconds_by_stage": stage_seconds(lines, summary["rounds"]),
        "rounds": _course(lines, summary),
    }


def stage_seconds(lines: Iterable[Mapping[str, Any]], rounds: int) -> dict[str, float]:
    """Seconds per stage, all clients and the server together, without those of training alone.

    A client's answer begins with `load`; after the last round, one that trained is of training alone.
    """
    answers: list[list[Mapping[str, Any]]] = []
    for line in lines:
        if "seconds" not in line or line["stage"] == "round":
            continue
        if line["stage"] == "load" or not answers or answers[-1][0]["node"] != line["node"]:
            answers.append([])
        answers[-1].append(line)
    total: dict[str, float] = defaultdict(float)
    for answer in answers:
        if answer[0]["round"] < rounds or all(x["stage"] != "train" for x in answer):
            for line in answer:
                total[line["stage"]] += line["seconds"]
    return {stage: round(seconds, 3) for stage, seconds in total.items()}


def _course(lines: Iterable[dict[str, Any]], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Before each round and after the last: bytes per client so far, and the held-out scores when measured.

    The scores are plain means over the clients: rounds.jsonl does not say on how much text each was measured.
    """
    nodes, spent, course = summary["nodes"].values(), 0.0, []
    by_round: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_round[line["round"]].append(line)
    for round_ in range(summary["rounds"]):
        updates = sorted((x for x in by_round[round_] if x["stage"] == "update"), key=lambda x: str(x["node"]))
        course.append({"round": round_, "bytes_so_far": spent, **_plain_mean(updates)})
        for line in by_round[round_]:
            if line["stage"] == "negotiation":
                spent += (line["bytes_up"] + line["bytes_down"]) / max(1, len(nodes))
        spent += sum(x["bytes_up"] + x["bytes_down"] for x in updates) / max(1, len(nodes))
    last = _plain_mean([n["federated"] for n in nodes if n["federated"]])
    return [*course, {"round": summary["rounds"], "bytes_so_far": spent, **last}]


def _plain_mean(scores: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    found = mean([Score(s["loss"], s["metric"], 1.0) for s in scores if "loss" in s])
    return found.as_dict() if found else {"loss": None, "metric": None}


def _figures(run: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one run under flat names, in the order of the table."""
    flat: dict[str, float] = {}
    for key in _HAS:
        prefix = "" if key == "federated" else f"{key}_"
        if run[key]:
            flat |= {f"{prefix}{k}": v for k, v in {"loss": run[key]["loss"], **run[key]["metric"]}.items()}
    return flat | {k: run[k] for k in ("bytes_up", "bytes_down", "encrypted_fraction", "seconds")}


def _over_seeds(runs: Iterable[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float | None]]:
    """Mean and sample standard deviation of every figure; the deviation of one seed is None."""
    values: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for key, value in _figures(run).items():
            values[key].append(value)
    means = {key: statistics.fmean(found) for key, found in values.items()}
    return means, {key: deviation(found) for key, found in values.items()}


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation, None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def metric_names(found: Mapping[str, Any]) -> list[str]:
    """Names of the metrics beside the loss, in the order in which runs report them."""
    runs = [run for row in found["rows"].values() for run in row["seeds"].values() if run["federated"]]
    return list(dict.fromkeys(name for run in runs for name in run["federated"]["metric"]))


def table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The comparison as text: header and lines; base and alone once, from the first row that measured them."""
    scores = ["loss", *metric_names(found)]
    header = ["row", *scores, "up per round", "down per round", "encrypted", "seconds", "seeds"]
    lines = []
    for key, label in (("base", "base model, not tuned"), ("local", "each client alone, settings of {}")):
        for name, row in [(n, r) for n, r in found["rows"].items() if f"{key}_loss" in r["mean"]][:1]:
            cells = [_cell(row, f"{key}_{score}", score) for score in scores]
            lines.append([label.format(name), *cells, "-", "-", "-", "-", str(len(row["seeds"]))])
    for name, row in found["rows"].items():
        names = [*scores, "bytes_up", "bytes_down", "encrypted_fraction", "seconds"]
        count = f"{len(row['seeds'])}" + (f" of {len(row['status'])}" if len(row["seeds"]) < len(row["status"]) else "")
        lines.append([name, *(_cell(row, key, key) for key in names), count])
    return header, lines


def _cell(row: Mapping[str, Any], key: str, kind: str) -> str:
    """Mean and deviation for people."""
    if key not in row["mean"]:
        return "-"
    spread = row["std"][key]
    return _show(row["mean"][key], kind) + ("" if spread is None else f" ± {_show(spread, kind, digits=2)}")


def _show(value: float, kind: str, digits: int = 4) -> str:
    if kind.startswith("bytes"):
        return size(value)
    if kind in SHARES:
        return f"{value:.1%}"
    if kind == "encrypted_fraction":
        return f"{100 * value:.3g}%"
    return f"{value:.1f}" if kind == "seconds" else f"{value:.4f}" if kind == "loss" else f"{value:.{digits}g}"


def _csv(found: Mapping[str, Any]) -> str:
    """One line per row and seed."""
    flat = {
        (name, seed): _figures(row["seeds"][seed]) | _prefixed(row["seeds"][seed]["seconds_by_stage"])
        for name, row in found["rows"].items()
        for seed in row["seeds"]
    }
    columns = list(dict.fromkeys(key for figures in flat.values() for key in figures))
    out = StringIO()
    writer = csv.DictWriter(out, ["row", "method", "seed", "status", *columns], lineterminator="\n")
    writer.writeheader()
    for name, row in found["rows"].items():
        for seed, state in row["status"].items():
            start = {"row": name, "method": row["method"], "seed": seed, "status": state}
            writer.writerow(start | flat.get((name, seed), {}))
    return out.getvalue()


def _prefixed(stages: Mapping[str, float]) -> dict[str, float]:
    return {f"seconds_{stage}": seconds for stage, seconds in stages.items()}
