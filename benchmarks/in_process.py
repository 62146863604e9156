"""A whole federation in this process: the real ServerApp and ClientApp, their messages through bytes, no Ray.

    python benchmarks/in_process.py RUNS_DIR --clients 4 --seeds 3 method=sealed experiment=smoke

Bytes, sums and adapters are those of `ciphertune run` under the same seed; seconds are not, since the clients take
turns. A run that is complete already is kept, so the same command goes on. Each is in RUNS_DIR/seed-N.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from flwr.app import Context, RecordDict  # noqa: E402
from grid import LocalGrid, simulated  # noqa: E402

import server_app.app  # noqa: E402
from ciphertune.runs import read_summary  # noqa: E402


def federate(words: list[str], runs: Path, clients: int, seed: int) -> Path:
    """Run it, unless it was; its folder. Raises what the ServerApp raises."""
    folder = runs / f"seed-{seed}"
    if folder.exists() and read_summary(folder).get("status") == "completed":
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    own = [f"seed={seed}", f"data.seed={seed}", f"name={folder.name}"]
    config = {"overrides": shlex.join([*words, *own]), "num-server-rounds": 0, "runs-dir": str(runs)}
    grid = LocalGrid(simulated(clients), config)
    with patch.object(server_app.app, "draw"):
        server_app.app.app(grid, Context(grid.run_id, 1, {}, RecordDict(), config))
    return folder


def main() -> None:
    """Run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("words", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_intermixed_args()
    for seed in range(options.seeds):
        federate(options.words, options.runs.resolve(), options.clients, seed)


if __name__ == "__main__":
    main()
