"""All methods on real data: three text classifiers' sets and one of instructions, IID and Dirichlet, equal and unequal
ranks, three seeds, and FedShield-LLM's setting; `docs/results.md` shows what it found.

    python benchmarks/results.py --models FOLDER --data FOLDER               all that is missing
    python benchmarks/results.py ... --cells 'sst2-*' --rows sealed,fedavg   a part of it
    python benchmarks/tables.py                                              the page, from what is there

--models holds minilm-l6 and llama-4m, --data a folder per set with train.jsonl and test.jsonl. A cell is one set, one
division and one kind of ranks. Each row of a cell is run by `benchmarks/in_process.py` and kept in
benchmarks/results/grid/CELL.json, so that the whole, some hours on two cores, can be spread over days and machines.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import multiprocessing
import os
import shlex
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ciphertune.comparison import read_run, shown
from ciphertune.runs import write_json
from ciphertune.settings import compose
from ciphertune.versions import versions

ROOT = Path(__file__).parents[1]
GRID = ROOT / "benchmarks/results/grid"
LABELS = {
    "sst2": "[negative,positive]",
    "rotten_tomatoes": "[negative,positive]",
    "ag_news": "[World,Sports,Business,Sci/Tech]",
}
CAUSAL_SET = "medical_meadow_small"
SETS = (*LABELS, CAUSAL_SET)
RANKS = {"unequal": (4, 8, 8, 16), "equal": (8, 8, 8, 8)}
# every method, and its own overrides; local trains as all others and shares nothing
ROWS = {
    "fedavg": "",
    "sealed": "",
    "flexlora": "",
    "rolora": "",
    "she_lora": "",
    "fedshield": "",
    "fedshield agreed mask": "method=fedshield method.prune=agreed",
    "dp_lora epsilon 8": "method=dp_lora method.epsilon=8",
    "local": "",
    "ffa_lora": "",
    "hetlora": "",
    "flora": "method=flora model.dtype=float32",  # its merges would be lost in the rounding of bfloat16
    "drop_columns": "",
    "maskcrypt": "",
    "full_he": "",
}
CLASSIFIER = (
    "model=classifier",
    "model.max_length=32",
    "data.max_heldout=200",
    "training.steps=8",
    "training.batch_size=8",
    "training.group_by_length=true",
)
CAUSAL = (
    "model=hf",
    "model.targets=[q_proj,v_proj,up_proj,down_proj]",
    "model.max_length=96",
    "data.max_heldout=100",
    "training.steps=8",
    "training.batch_size=4",
)
RATE = {"classifiers": "4e-3", "causal model": "6e-3"}  # of the first round; the last round's is a fifth of it
ROUNDS = 8
BASE = ("model.dtype=bfloat16", "model.attention=eager", "federation.compare_local=false")
COMMON = (
    *BASE,
    "data=jsonl",
    "training.schedule=cosine",
    f"federation.rounds={ROUNDS}",
    f"federation.evaluate_every={ROUNDS}",
)
BUDGET = 0.1  # of A's columns, for the methods that negotiate
# the setting of FedShield-LLM at our scale, for what it is compared with there, and `sealed`
FEDSHIELD = "fedshield-setting"
# how the learning rates were chosen: two cells under others as well
RATES_OF = {"rates-classifiers": "sst2-iid-unequal", "rates-causal model": "medical_meadow_small-iid-unequal"}
RATES = {"classifiers": ("3e-3", "4e-3", "6e-3"), "causal model": ("4e-3", "6e-3", "8e-3")}
PEERS, AT_BYTES = ("fedavg", "flexlora", "rolora"), " at sealed's bytes"
Job = tuple[str, str]  # cell, row


@dataclass(frozen=True)
class Folders:
    """Where models, data and unfinished runs are."""

    models: Path = Path()
    data: Path = Path()
    work: Path = Path()

    def of(self, cell: str, row: str) -> Path:
        """Where a row's runs are."""
        return (self.work / cell / "".join(c for c in row if c.isalnum())).resolve()


FEDSHIELD_ROWS = ("fedavg", "fedshield", "fedshield agreed mask", "sealed")


def cells() -> list[str]:
    """Names of all cells."""
    unequal, equal = (
        [f"{data}-{division}-{ranks}" for division in ("iid", "dirichlet") for data in SETS] for ranks in RANKS
    )
    return [*unequal, FEDSHIELD, *RATES_OF, *equal]


def rows_of(cell: str) -> dict[str, str]:
    """Names of a cell's rows, and their own overrides."""
    return _named(cell) | (same_bytes(read(cell)) if cell.endswith("-iid-unequal") else {})


def _named(cell: str) -> dict[str, str]:
    """The rows that follow from nothing else."""
    if cell in RATES_OF:
        rates = RATES[cell.removeprefix("rates-")]
        return {f"{m} {r}": f"method={m} {' '.join(at_rate(r))}" for m in ("fedavg", "sealed") for r in rates}
    return {row: ROWS[row] or f"method={row}" for row in (FEDSHIELD_ROWS if cell == FEDSHIELD else ROWS)}


def read(cell: str) -> dict[str, Any]:
    """The rows of a cell that were run as they would be run today."""
    path = GRID / f"{cell}.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else {}

    def current(rows: dict[str, str]) -> dict[str, Any]:
        same = (
            r for r, own in rows.items() if r in kept and kept[r]["overrides"] == list(map(shown, words(cell, own)))
        )
        return {row: kept[row] for row in same}

    found = current(_named(cell))
    return found | (current(same_bytes(found)) if cell.endswith("-iid-unequal") else {})


def keep(cell: str, row: str, found: dict[str, Any]) -> None:
    """Write a row to its cell's file, from which rows of other settings go."""
    write_json(GRID / f"{cell}.json", {"cell": cell, "rows": read(cell) | {row: found}})


def same_bytes(rows: dict[str, Any]) -> dict[str, str]:
    """More rows, once `sealed` and a peer are known: the peer for so many rounds that it moves what `sealed` moved.

    Rounded up where more than a tenth of a round is left over. Each is a run of its own, with a learning rate that ends
    where the run does.
    """
    found: dict[str, str] = {}
    for peer in PEERS if "sealed" in rows else ():
        if peer in rows:
            up, down = (next(iter(rows[peer]["seeds"].values()))[k] for k in ("bytes_up", "bytes_down"))
            spent = next(iter(rows["sealed"]["seeds"].values()))["course"][-1][1]
            rounds = math.ceil((spent + down) / (up + down) - 0.1)  # nothing is sent down before the first round
            found[f"{peer}{AT_BYTES}"] = f"method={peer} federation.rounds={rounds}"
    return found


def words(cell: str, own: str, folders: Folders = Folders()) -> list[str]:
    """All overrides of a row: what its cell has in common, but for what it has of its own."""
    mine = shlex.split(own)
    chosen = {word.partition("=")[0] for word in mine}
    return [*(word for word in _common(cell, folders) if word.partition("=")[0] not in chosen), *mine]


def _common(cell: str, folders: Folders) -> list[str]:
    data, *rest = RATES_OF.get(cell, cell).split("-")
    if cell == FEDSHIELD:
        data = CAUSAL_SET
        found = ["experiment=fedshield_llama", f"model.name={folders.models / 'llama-4m'}", *BASE]
        found += ["model.max_length=96", f"federation.evaluate_every={ROUNDS}"]
    else:
        division, ranks = rest
        clients = ",".join(f"{{rank:{rank},budget:{BUDGET}}}" for rank in RANKS[ranks])
        found = [*COMMON, f"data.partition={division}", f"federation.clients=[{clients}]"]
    found += [f"data.heldout_path={folders.data / data / 'test.jsonl'}"]
    if cell == FEDSHIELD:
        return [*found, f"data.path={folders.data / data / 'train.jsonl'}"]
    found += at_rate(RATE["classifiers" if data in LABELS else "causal model"])
    if data in LABELS:
        found += [*CLASSIFIER, f"data.labels={LABELS[data]}", f"model.name={folders.work / 'minilm-l6'}"]
        return [*found, f"data.path={folders.data / data / 'train.jsonl'}"]
    found += [*CAUSAL, f"model.name={folders.models / 'llama-4m'}", "data.partition_by=kind"]
    return [*found, f"data.path={folders.work / data}.jsonl"]


def at_rate(rate: str) -> list[str]:
    """Overrides for a learning rate that falls to a fifth."""
    return [f"training.learning_rate={rate}", f"training.learning_rate_end={float(rate) / 5:g}"]


def prepare(folders: Folders) -> None:
    """MiniLM with no dropout of its own, and the instructions with their kinds."""
    model, out = folders.models / "minilm-l6", folders.work / "minilm-l6"
    out.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        (out / file.name).unlink(missing_ok=True)
        (out / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").unlink()
    write_json(out / "config.json", {k: 0.0 if k.endswith("dropout_prob") else v for k, v in config.items()})
    train = folders.data / CAUSAL_SET / "train.jsonl"
    lines = with_kinds([json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folders.work / f"{CAUSAL_SET}.jsonl").write_text(text, encoding="utf-8")


def with_kinds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines with the question's first word as their kind, where it is one of the ten commonest: for Dirichlet."""
    firsts = [(line["input"].split() or ["none"])[0].lower() for line in lines]
    common = {word for word, _ in Counter(firsts).most_common(10)}
    return [line | {"kind": word if word in common else "other"} for line, word in zip(lines, firsts, strict=True)]


def run(cell: str, row: str, seeds: int, folders: Folders) -> dict[str, Any]:
    """Run a row of a cell under all seeds, in a process kept for it; its figures. Raises what the ServerApp raises."""
    from in_process import federate

    out, chosen = folders.of(cell, row), words(cell, rows_of(cell)[row], folders)
    clients = len(compose(ROOT / "conf", chosen).federation.clients)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with (out / "log.txt").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    found = {str(seed): figures(read_run(federate(chosen, out, clients, seed))) for seed in range(seeds)}
    shutil.rmtree(out)
    return {"overrides": [shown(word) for word in chosen], "seeds": found, "versions": versions()}


def figures(one: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one run."""
    names = ("base", "federated", "bytes_up", "bytes_down", "encrypted_fraction", "seconds", "seconds_by_stage")
    course = [[r["round"], round(r["bytes_so_far"]), r["loss"], r["metric"]] for r in one["rounds"] if r["loss"]]
    return {name: one[name] for name in names} | {"course": course}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cells", default="*", help="of these alone, e.g. 'sst2-*' (default: all)")
    parser.add_argument("--rows", default="", help="of these alone (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--work", type=Path, default=ROOT / "comparisons", help="where unfinished runs are")
    options = parser.parse_args()
    every = dict.fromkeys([*ROWS, *(f"{peer}{AT_BYTES}" for peer in PEERS), *(r for c in RATES_OF for r in rows_of(c))])
    wanted = [row.strip() for row in options.rows.split(",") if row.strip()] or list(every)
    if unknown := [row for row in wanted if row not in every]:
        parser.error(f"--rows {unknown[0]}: want some of {', '.join(every)}")
    GRID.mkdir(parents=True, exist_ok=True)
    folders = Folders(options.models.resolve(), options.data.resolve(), options.work.resolve())
    prepare(folders)
    chosen = [cell for cell in cells() if fnmatch.fnmatch(cell, options.cells)]
    failed: set[Job] = set()
    while jobs := [job for job in missing(chosen, wanted) if job not in failed]:  # some rows follow from others
        failed |= run_all(jobs, options.parallel, options.seeds, folders)
    if failed:
        parser.exit(1, f"{len(failed)} rows failed; the same command tries them again\n")


def missing(chosen: list[str], wanted: list[str]) -> list[Job]:
    """The rows of these cells that are not known yet."""
    return [(c, row) for c in chosen for row in rows_of(c) if row in wanted and row not in read(c)]


def run_all(jobs: list[Job], parallel: int, seeds: int, folders: Folders) -> set[Job]:
    """Run them, and keep each as soon as it is known; those that failed."""
    failed = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    fresh = multiprocessing.get_context("spawn")
    with Progress(*columns) as progress, ProcessPoolExecutor(parallel, fresh) as pool:
        task = progress.add_task("rows", total=len(jobs))
        running = {pool.submit(run, *job, seeds, folders): job for job in jobs}
        try:
            for done in as_completed(running):
                cell, row = job = running[done]
                if isinstance(error := done.exception(), BrokenProcessPool) and done is not next(iter(running)):
                    progress.console.print(f"{cell}, {row}: lost with another row's process; it is tried again")
                elif error:
                    failed.add(job)
                    progress.console.print(f"{cell}, {row}: {error!r}; see {folders.of(cell, row)}/log.txt")
                else:
                    keep(cell, row, done.result())
                progress.update(task, description=f"{cell}: {row}", advance=1)
        finally:  # an interrupt ends what runs, and nothing more is begun
            pool.shutdown(cancel_futures=True)
    return failed


if __name__ == "__main__":
    main()
