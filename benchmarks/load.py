"""Many clients of unequal ranks, a share of them asked in each round: is the server's memory flat?

    python benchmarks/load.py                                   50 clients, 20 % of them in each of 20 rounds
    python benchmarks/load.py --clients 8 --rounds 4 --fraction 0.5

A whole simulated run of the embedded model by `ciphertune run`. The ServerApp's process is looked at five times a
second; a round's figure is the largest resident set in it. That process also holds Flower's simulation engine, which
hands the messages to the clients. Growth is the slope of a straight line through the second half of the rounds.
Results go to benchmarks/results/load.json; seconds depend on the machine and on what else it does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ciphertune.runs import read_lines
from ciphertune.versions import versions

ROOT = Path(__file__).parents[1]
RANKS = (2, 4, 8, 16)
MOST_GROWTH = 0.002  # of the server's memory, per round


def server_of(parent: psutil.Process) -> psutil.Process | None:
    """The process of the ServerApp among the descendants of `ciphertune run`."""
    for process in parent.children(recursive=True):
        try:
            if any(Path(word).name == "flwr-simulation" for word in process.cmdline()):
                return process
        except psutil.Error:
            continue
    return None


def watch(run: subprocess.Popen[bytes], folder: Path, rounds: int) -> list[float]:
    """The server's largest resident set per round, in MiB; first before the first round, last after the last one."""
    peaks = [0.0] * (rounds + 2)
    parent, server = psutil.Process(run.pid), None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("rounds", total=rounds)
        while run.poll() is None:
            done = len(list(folder.glob("server/round_*.msg")))
            started = (folder / "plan.json").exists()
            progress.update(task, completed=done)
            try:
                server = server or server_of(parent)
                at = done + started
                peaks[at] = max(peaks[at], server.memory_info().rss / 2**20 if server else 0.0)
            except psutil.Error:
                server = None
            time.sleep(0.2)
        progress.update(task, completed=rounds)
    return peaks


def slope(values: Sequence[float]) -> float:
    """Growth per step of the straight line that fits best."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])


def report(folder: Path, peaks: Sequence[float]) -> dict[str, Any]:
    """Figures per round, and the growth over the second half of them."""
    lines, _ = read_lines(folder)
    ends = [line for line in lines if line["stage"] == "round"]
    updates = [line for line in lines if line["stage"] == "update"]
    states = sorted(folder.glob("server/state_*.json"))
    found = [
        {
            "round": end["round"] + 1,
            "seconds": end["seconds"],
            "contributors": end["contributors"],
            "server_mib": round(peaks[end["round"] + 1], 1),
            "bytes_up": sum(u["bytes_up"] for u in updates if u["round"] == end["round"]),
        }
        for end in ends
    ]
    late = [r["server_mib"] for r in found[len(found) // 2 :]]
    growth = slope(late)
    return {
        "before_mib": round(peaks[0], 1),
        "after_mib": round(peaks[-1], 1),  # all clients evaluate
        "rounds": found,
        "growth_mib_per_round": round(growth, 3),
        "state_bytes": states[-1].stat().st_size,
        "different_clients": len({u["node"] for u in updates}),
        "aim": {
            "name": "growth per round",
            "wanted": MOST_GROWTH,
            "found": round(growth / late[-1], 5),
            "met": growth / late[-1] <= MOST_GROWTH,
        },
    }


def main() -> None:
    """Run it, watch it, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fraction", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/load.json")
    options = parser.parse_args()
    clients = ",".join(f"{{rank:{RANKS[k % len(RANKS)]}}}" for k in range(options.clients))
    overrides = [
        "name=load",
        f"federation.clients=[{clients}]",
        f"federation.min_clients={options.clients}",
        f"federation.fraction={options.fraction}",
        f"federation.rounds={options.rounds}",
        f"federation.evaluate_every={options.rounds}",
        "federation.compare_local=false",
        f"training.steps={options.steps}",
        "training.threads=1",
        "data.max_heldout=8",
    ]
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "ciphertune.cli", "run", "--app", str(ROOT), "--runs-dir", runs, *overrides]
        log = Path(runs) / "out.log"
        with log.open("wb") as out:
            run = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
            peaks = watch(run, Path(runs) / "load", options.rounds)
        if run.returncode:
            sys.exit(log.read_text(errors="replace")[-3000:])
        found = report(Path(runs) / "load", peaks)
    about = {k: getattr(options, k) for k in ("clients", "fraction", "steps")} | {"ranks": RANKS}
    about |= {"machine": platform.machine(), "cpus": os.cpu_count(), "overrides": overrides[2:], "versions": versions()}
    options.out.write_text(json.dumps({"about": about, **found}, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "rounds"}))


if __name__ == "__main__":
    main()
