"""Whole runs on real models and data: every method, and `sealed` once more without encryption under the same seed.

    python benchmarks/real.py sst2_minilm --model MINILM --train TRAIN.jsonl --test TEST.jsonl
    python benchmarks/real.py instructions_llama --model LLAMA --train TRAIN.jsonl --test TEST.jsonl

Models and data are not part of this repository. Results go to benchmarks/results/real_<experiment>.json: metrics of
base, alone and federated, bytes, seconds per stage, and the difference that encryption made.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from ciphertune.versions import versions

ROOT = Path(__file__).parents[1]
# name of the row -> overrides
ROWS = {
    "sealed": ["method=sealed"],
    "sealed, not encrypted": ["method=sealed", "crypto=clear"],
    "fedavg": ["method=fedavg"],
    "full_he": ["method=full_he"],
}
PAIRS = (("sealed", "sealed, not encrypted"), ("full_he", "fedavg"))


def run(experiment: str, overrides: list[str], runs: Path, *, alone: bool) -> dict[str, Any]:
    """One run through the command line; its summary."""
    name = f"{experiment}-{datetime.now():%Y%m%d-%H%M%S}"
    words = [f"experiment={experiment}", *overrides, f"name={name}", f"federation.compare_local={str(alone).lower()}"]
    command = [sys.executable, "-m", "ciphertune.cli", "run", "--app", str(ROOT), "--runs-dir", str(runs), *words]
    print("$ ciphertune run", shlex.join(w for w in words if "path=" not in w and "model.name=" not in w), flush=True)
    subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((runs / name / "summary.json").read_text())
    return found


def main() -> None:
    """Run all rows and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=ROOT / "benchmarks/runs")
    parser.add_argument("overrides", nargs="*", help="more overrides for every row")
    options = parser.parse_intermixed_args()
    files = [f"model.name={options.model}", f"data.path={options.train}", f"data.heldout_path={options.test}"]
    rows: dict[str, Any] = {}
    for name, overrides in ROWS.items():
        # training alone does not depend on the method: once is enough
        rows[name] = run(
            options.experiment, [*overrides, *files, *options.overrides], options.runs, alone=name == "sealed"
        )
    differences = {
        f"{one} against {two}": {
            "loss": rows[one]["federated"]["loss"] - rows[two]["federated"]["loss"],
            **{
                k: rows[one]["federated"]["metric"][k] - rows[two]["federated"]["metric"][k]
                for k in rows[one]["federated"]["metric"]
            },
        }
        for one, two in PAIRS
    }
    about = {"model": options.model.name, "data": options.train.parent.name, "overrides": options.overrides}
    result = {"about": about | {"versions": versions()}, "difference_by_encryption": differences, "rows": rows}
    out = ROOT / f"benchmarks/results/real_{options.experiment}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out.relative_to(ROOT)}")
    for pair, values in differences.items():
        print(f"{pair}: " + ", ".join(f"{k} differs by {v:.2e}" for k, v in values.items()))


if __name__ == "__main__":
    main()
