"""One round of exchange per method: bytes per client, seconds per stage, ratios to plaintext FedAvg of both factors.

    python benchmarks/round.py            adapter shapes of the embedded model, ranks 2, 4, 8, 8
    python benchmarks/round.py --hidden 2048 --layers 16 --repeat 3

Two rounds of each method are timed, so that a method which alternates between the factors counts both. Bytes are exact;
seconds depend on the machine, so read the ratios. Results go to benchmarks/results/round.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ciphertune import wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.aggregation import SeparateSum, cut
from ciphertune.build import make_plan, session
from ciphertune.build_client import generate_key
from ciphertune.crypto.clear import ClearPublic
from ciphertune.crypto.clear_secret import ClearSecret
from ciphertune.crypto.secret import SecretPart
from ciphertune.exchange import seal, unseal
from ciphertune.plan import LayerShape
from ciphertune.ranks import Contributor
from ciphertune.settings import Settings, ckks_params, compose
from ciphertune.versions import versions

ROOT = Path(__file__).parents[1]
METHODS = ("fedavg", "full_he", "sealed")
RANKS, SAMPLES = (2, 4, 8, 8), (400, 600, 1000, 1200)


def shapes(hidden: int, layers: int) -> tuple[LayerShape, ...]:
    """q, k, v, o and the three matrices of the feed-forward block (8/3 of the width) of a Llama."""
    if hidden == 0:
        config = json.loads((ROOT / "src/ciphertune/assets/base/config.json").read_text())
        hidden, layers, wide = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    else:
        wide = hidden * 8 // 3
    sizes = {"q": (hidden, hidden), "k": (hidden, hidden), "v": (hidden, hidden), "o": (hidden, hidden)}
    sizes |= {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}
    return tuple(LayerShape(f"{i:02d}.{name}", m, n) for i in range(layers) for name, (m, n) in sizes.items())


def adapter(layers: tuple[LayerShape, ...], rank: int, rng: np.random.Generator) -> Adapter:
    """Random factors of the size that training gives them."""
    return Adapter(
        {
            x.name: LoraFactors(
                rng.normal(0, 0.05, (rank, x.n)).astype(np.float32),
                rng.normal(0, 0.05, (x.m, rank)).astype(np.float32),
                2.0,
            )
            for x in layers
        },
        {},
    )


def secret(settings: Settings) -> SecretPart:
    """A client's half with a fresh key."""
    if settings.crypto.backend == "clear":
        return ClearSecret(ClearPublic(settings.crypto.precision), settings.crypto.bound)
    from ciphertune.crypto.ckks_secret import CkksSecret

    return CkksSecret(ckks_params(settings.crypto), generate_key(settings.crypto))


def measure(method: str, layers: tuple[LayerShape, ...], repeat: int) -> dict[str, Any]:
    """Means over clients and the two rounds; seconds are medians over repeats."""
    settings = compose(ROOT / "conf", [f"method={method}"])
    plan = make_plan(settings, layers, (), tuple(sorted(set(RANKS))))
    part = secret(settings)
    link = session(settings, plan, run=1, key_fingerprint=part.fingerprint)
    rng = np.random.default_rng(0)
    clients = [adapter(layers, rank, rng) for rank in RANKS]
    seconds: dict[str, list[float]] = defaultdict(list)
    up: list[int] = []
    down: list[int] = []
    for _ in range(repeat):
        once: dict[str, float] = defaultdict(float)
        up, down = [], []
        for round_ in (0, 1):
            total = SeparateSum(link, round_, sum(SAMPLES))
            for k, mine in enumerate(clients):
                start = time.perf_counter()
                data = seal(mine, link, part, round_=round_, sender=k + 1, samples=SAMPLES[k], total=sum(SAMPLES))
                once["client seal"] += (time.perf_counter() - start) / (2 * len(RANKS))
                start = time.perf_counter()
                total.add(data, sender=k + 1, who=Contributor(RANKS[k], SAMPLES[k]))
                once["server add"] += (time.perf_counter() - start) / 2
                up.append(len(data))
            start = time.perf_counter()
            aggregate = total.release(2)
            answers = [wire.encode(cut(aggregate, link, rank), link) for rank in RANKS]
            once["server release"] += (time.perf_counter() - start) / 2
            for mine, data in zip(clients, answers, strict=True):
                start = time.perf_counter()
                unseal(data, link, part, round_=round_, rank=mine.rank, base=mine)
                once["client unseal"] += (time.perf_counter() - start) / (2 * len(RANKS))
                down.append(len(data))
        for stage, value in once.items():
            seconds[stage].append(value)
    return {
        "bytes_up": statistics.fmean(up),
        "bytes_down": statistics.fmean(down),
        "seconds": {stage: statistics.median(values) for stage, values in seconds.items()},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=0, help="width of the model (default: the embedded one)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/round.json")
    options = parser.parse_args()
    layers = shapes(options.hidden, options.layers)
    results = {m: measure(m, layers, options.repeat) for m in track(METHODS, description="methods")}
    base = results["fedavg"]
    for result in results.values():
        result["ratio_up"] = result["bytes_up"] / base["bytes_up"]
        result["ratio_down"] = result["bytes_down"] / base["bytes_down"]
        result["ratio_total"] = (result["bytes_up"] + result["bytes_down"]) / (base["bytes_up"] + base["bytes_down"])
        result["ratio_seconds"] = sum(result["seconds"].values()) / sum(base["seconds"].values())
    about = {
        "layers": len(layers),
        "values_of_both_factors_per_rank": sum(x.m + x.n for x in layers),
        "ranks": RANKS,
        "samples": SAMPLES,
        "repeat": options.repeat,
        "machine": platform.machine(),
        "versions": versions(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "methods": results}, indent=2) + "\n")
    table = Table(title="per client and round")
    for column in ("method", "up", "down", "total / fedavg", *base["seconds"], "seconds / fedavg"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, r in results.items():
        stages = [f"{s * 1000:.1f} ms" for s in r["seconds"].values()]
        row = [f"{r['bytes_up'] / 1e3:.1f} kB", f"{r['bytes_down'] / 1e3:.1f} kB", f"{r['ratio_total']:.2f}"]
        table.add_row(method, *row, *stages, f"{r['ratio_seconds']:.1f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
