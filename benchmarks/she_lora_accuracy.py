"""SHE-LoRA against FlexLoRA in the clear on real data, and what its budget buys and costs.

    python benchmarks/she_lora_accuracy.py --model MINILM --data sst2=FOLDER --data rotten_tomatoes=FOLDER

A folder holds train.jsonl and test.jsonl (text, label 0 or 1). Four clients of ranks 4, 8, 8, 16, Dirichlet 0.3, three
seeds, by `ciphertune compare`, which goes on where it was cut off: 20 rounds of 8 steps on the first data set, 10 on
the others. On the first all clients then get other budgets, one seed, 10 rounds. Writes
benchmarks/results/she_lora_accuracy.json and docs/she_lora_budget.svg.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ciphertune.versions import versions

ROOT = Path(__file__).parents[1]
COMMON = ("experiment=sst2_minilm", "federation.compare_local=false")
LONG = ("federation.evaluate_every=20",)  # the experiment's own 20 rounds
SHORT = ("federation.rounds=10", "federation.evaluate_every=10")
RANKS = (4, 8, 8, 16)
BUDGETS = (0.0, 0.01, 0.25, 1.0)


def compare(out: Path, words: list[str], seeds: int) -> dict[str, Any]:
    """One grid of `ciphertune compare`; what it wrote."""
    command = [sys.executable, "-m", "ciphertune.cli", "compare", *words, "--seeds", str(seeds)]
    command += ["--app", str(ROOT), "--out", str(out)]
    print(
        "$ ciphertune compare", shlex.join(w for w in words if "path=" not in w and "model.name=" not in w), flush=True
    )
    subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return found


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row."""
    seeds = [{"seed": int(k), **s["federated"]} for k, s in sorted(row["seeds"].items())]
    values = [s["metric"]["accuracy"] for s in seeds]
    last = row["seeds"][max(row["seeds"])]
    return {
        "accuracy": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "loss": statistics.fmean(s["loss"] for s in seeds),
        "seeds": seeds,
        **{k: last[k] for k in ("bytes_up", "bytes_down", "encrypted_fraction", "seconds_by_stage")},
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy, bytes and seconds of cryptography against the budget."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "ciphertune"
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2))
    at = [str(f"{r['budget']:.0%}") for r in rows]
    series = (
        ("accuracy", [100 * r["accuracy"] for r in rows], "accuracy in %"),
        ("bytes", [(r["bytes_up"] + r["bytes_down"]) / 1e6 for r in rows], "MB per client and round"),
        ("seconds", [r["crypto_seconds"] for r in rows], "seconds of cryptography, whole run"),
    )
    for axis, (name, values, label) in zip(axes, series, strict=True):
        axis.plot(at, values, marker="o", color="#0072B2")
        axis.set_xlabel("columns of A that each client encrypts")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0 if name != "accuracy" else 50, top=100 if name == "accuracy" else None)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run the grids, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--work", type=Path, default=ROOT / "comparisons", help="where the comparisons go")
    options = parser.parse_args()
    sets = dict(word.split("=", 1) for word in options.data)
    result: dict[str, Any] = {"about": {"model": options.model.name, "ranks": RANKS, "versions": versions()}}
    result["data"] = {}
    for number, (name, folder) in enumerate(sets.items()):
        length = SHORT if number else LONG
        files = [f"model.name={options.model}", f"data.path={folder}/train.jsonl"]
        files += [f"data.heldout_path={folder}/test.jsonl"]
        found = compare(options.work / name, ["method=flexlora,she_lora", *COMMON, *length, *files], 3)["rows"]
        rows = {row: figures(values) for row, values in found.items()}
        pairs = zip(rows["she_lora"]["seeds"], rows["flexlora"]["seeds"], strict=True)
        gaps = [one["metric"]["accuracy"] - two["metric"]["accuracy"] for one, two in pairs]
        rows["difference"] = {"accuracy": statistics.fmean(gaps), "spread": statistics.stdev(gaps), "per_seed": gaps}
        result["data"][name] = rows
    name, folder = next(iter(sets.items()))
    words = [*COMMON, *SHORT, f"model.name={options.model}"]
    words += [f"data.path={folder}/train.jsonl", f"data.heldout_path={folder}/test.jsonl"]
    for budget in BUDGETS:
        clients = ",".join(f"{{rank:{rank},budget:{budget}}}" for rank in RANKS)
        words += ["--row", f"budget {budget}: method=she_lora federation.clients=[{clients}]"]
    found = compare(options.work / f"{name}-budgets", words, 1)["rows"]
    result["budgets"] = []
    for budget, row in zip(BUDGETS, found.values(), strict=True):
        kept = figures(row)
        kept["crypto_seconds"] = sum(kept["seconds_by_stage"].get(k, 0.0) for k in ("seal", "unseal", "aggregate"))
        result["budgets"].append({"budget": budget, **kept})
    result["budgets_data"] = name
    plot(result["budgets"], ROOT / "docs/she_lora_budget.svg")
    out = ROOT / "benchmarks/results/she_lora_accuracy.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
