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
import shlex
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
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
SETS = (*LABELS, "medical_meadow_small")
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
    "flora": "",
    "drop_columns": "",
    "maskcrypt": "",
    "full_he": "",
}
CLASSIFIER = (
    "model=classifier",
    "model.max_length=40",
    "data.max_heldout=200",
    "training.steps=8",
    "training.batch_size=8",
    "training.learning_rate=4e-3",
    "training.learning_rate_end=8e-4",
)
CAUSAL = (
    "model=hf",
    "model.targets=[q_proj,v_proj,up_proj,down_proj]",
    "model.max_length=96",
    "data.max_heldout=200",
    "training.steps=8",
    "training.batch_size=8",
    "training.learning_rate=4e-3",
    "training.learning_rate_end=8e-4",
)
ROUNDS = 10
COMMON = (
    "data=jsonl",
    "model.dtype=bfloat16",
    "training.schedule=cosine",
    "federation.compare_local=false",
    f"federation.rounds={ROUNDS}",
    f"federation.evaluate_every={ROUNDS}",
)
BUDGET = 0.1  # of A's columns, for the methods that negotiate
# the setting of FedShield-LLM at our scale, for what it is compared with there, and `sealed`
FEDSHIELD = "fedshield-setting"
# how the classifiers' learning rate was chosen: one cell under others as well
RATES_CELL, RATES = "rates", ("2e-3", "4e-3", "8e-3")
PEERS, AT_BYTES = ("fedavg", "flexlora", "rolora"), " at sealed's bytes"
_WRITING = threading.Lock()
FEDSHIELD_ROWS = ("fedavg", "fedshield", "fedshield agreed mask", "sealed")


def cells() -> list[str]:
    """Names of all cells."""
    grid = [f"{data}-{division}-{ranks}" for ranks in RANKS for division in ("iid", "dirichlet") for data in SETS]
    return [RATES_CELL, FEDSHIELD, *grid]


def rows_of(cell: str) -> dict[str, str]:
    """Names of a cell's rows, and their own overrides."""
    if cell == RATES_CELL:
        ends = {rate: f"training.learning_rate={rate} training.learning_rate_end={float(rate) / 5:g}" for rate in RATES}
        return {f"{m} {rate}": f"method={m} {words}" for m in ("fedavg", "sealed") for rate, words in ends.items()}
    named = {row: ROWS[row] or f"method={row}" for row in (FEDSHIELD_ROWS if cell == FEDSHIELD else ROWS)}
    return named | same_bytes(read(cell)["rows"])


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


def overrides(cell: str, options: argparse.Namespace, work: Path) -> list[str]:
    """What all rows of a cell have in common."""
    if cell == FEDSHIELD:
        folder = options.data / "medical_meadow_small"
        words = ["experiment=fedshield_llama", f"model.name={options.models / 'llama-4m'}", *COMMON[1:4]]
        return [*words, f"data.path={folder / 'train.jsonl'}", f"data.heldout_path={folder / 'test.jsonl'}"]
    data, division, ranks = (cell if cell != RATES_CELL else "sst2-iid-unequal").split("-")
    clients = ",".join(f"{{rank:{rank},budget:{BUDGET}}}" for rank in RANKS[ranks])
    words = [*COMMON, f"data.partition={division}"]
    words += [f"federation.clients=[{clients}]", f"data.heldout_path={options.data / data / 'test.jsonl'}"]
    train = options.data / data / "train.jsonl"
    if data in LABELS:
        words += [*CLASSIFIER, f"data.labels={LABELS[data]}", f"model.name={options.models / 'minilm-l6'}"]
    else:
        words += [*CAUSAL, f"model.name={options.models / 'llama-4m'}", "data.partition_by=kind"]
        train = with_kinds(train, work / f"{data}.jsonl")
    return [*words, f"data.path={train}"]


def with_kinds(source: Path, out: Path) -> Path:
    """The lines with the question's first word as their kind, where it is one of the ten commonest: for Dirichlet."""
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    words = [(line["input"].split() or ["none"])[0].lower() for line in lines]
    common = {word for word, _ in Counter(words).most_common(10)}
    for line, word in zip(lines, words, strict=True):
        line["kind"] = word if word in common else "other"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return out


def run(cell: str, row: str, options: argparse.Namespace) -> None:
    """Run a row of a cell under all seeds and keep its figures. Raises CalledProcessError."""
    out = options.work / cell / "".join(c for c in row if c.isalnum())
    common, own = overrides(cell, options, options.work), shlex.split(rows_of(cell)[row])
    chosen = {w.partition("=")[0] for w in own}
    words = [*(w for w in common if w.partition("=")[0] not in chosen), *own]
    clients = len(compose(ROOT / "conf", words).federation.clients)
    command = [sys.executable, str(ROOT / "benchmarks/in_process.py"), str(out), "--clients", str(clients)]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("wb") as log:
        command += ["--seeds", str(options.seeds), *words]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    found = {
        "overrides": own,
        "seeds": {str(seed): figures(read_run(out / f"seed-{seed}")) for seed in range(options.seeds)},
        "versions": versions(),
    }
    with _WRITING:
        kept = read(cell)
        kept["overrides"] = [shown(w) for w in common]
        kept["rows"][row] = found
        write_json(GRID / f"{cell}.json", kept)
    shutil.rmtree(out)


def read(cell: str) -> dict[str, Any]:
    """What is known of a cell."""
    path = GRID / f"{cell}.json"
    found: dict[str, Any] = {"cell": cell, "overrides": [], "rows": {}}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else found


def figures(one: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one run."""
    names = ("base", "federated", "bytes_up", "bytes_down", "encrypted_fraction", "seconds")
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
    every = [*ROWS, *(f"{peer}{AT_BYTES}" for peer in PEERS), *rows_of(RATES_CELL)]
    wanted = [row.strip() for row in options.rows.split(",") if row.strip()] or every
    if unknown := [row for row in wanted if row not in every]:
        parser.error(f"--rows {unknown[0]}: want some of {', '.join(every)}")
    jobs = [
        (cell, row)
        for cell in cells()
        if fnmatch.fnmatch(cell, options.cells)
        for row in wanted
        if row in rows_of(cell) and row not in read(cell)["rows"]
    ]
    if not jobs:
        parser.exit(0, "nothing is missing\n")
    GRID.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failed = 0
    with Progress(*columns) as progress, ThreadPoolExecutor(options.parallel) as pool:
        task = progress.add_task("rows", total=len(jobs))
        running = {pool.submit(run, cell, row, options): (cell, row) for cell, row in jobs}
        try:
            for done in as_completed(running):
                cell, row = running[done]
                if isinstance(error := done.exception(), subprocess.CalledProcessError):
                    failed += 1
                    progress.console.print(f"{cell}, {row}: failed; see {error.cmd[2]}/log.txt")
                elif error:
                    raise error
                progress.update(task, description=f"{cell}: {row}", advance=1)
        finally:  # an interrupt ends what runs, and nothing more is begun
            pool.shutdown(cancel_futures=True)
    if failed:
        parser.exit(1, f"{failed} of {len(jobs)} rows failed; the same command tries them again\n")


if __name__ == "__main__":
    main()
