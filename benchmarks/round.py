"""One round of exchange per method: bytes per client, seconds per stage, ratios to plaintext FedAvg of both factors.

    python benchmarks/round.py                         the embedded model, and 2 layers of a Llama of width 2048
    python benchmarks/round.py --hidden 4096 --layers 4 --repeat 3        only a Llama of this width

Two rounds of each method are made of real messages (`seal`, the server's sum, `unseal`), so that a method which
alternates between the factors counts both. Plaintext FedAvg sends both factors in float32, both ways. Bytes are exact;
those of a round of 1000 clients follow from `wire.message_size`. Seconds are of the processor; read them as ratios.
Results go to benchmarks/results/round.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
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
from ciphertune.build_client import fresh_part
from ciphertune.exchange import seal, unseal
from ciphertune.plan import LayerShape
from ciphertune.planning import loads
from ciphertune.ranks import Contributor
from ciphertune.settings import compose
from ciphertune.versions import versions

ROOT = Path(__file__).parents[1]
METHODS = {  # name: overrides
    "fedavg": ("method=fedavg",),
    "full_he": ("method=full_he",),
    "sealed": ("method=sealed",),  # crypto=ckks_packed
    "sealed crypto=ckks_packed_48": ("method=sealed", "crypto=ckks_packed_48"),
    "sealed crypto=bfv_packed": ("method=sealed", "crypto=bfv_packed"),
    "sealed crypto=ckks": ("method=sealed", "crypto=ckks"),
}
SAMPLES = (400, 600, 1000, 1200)  # of the four clients
MANY = 1000  # clients, where bytes are computed
# largest total bytes over those of plaintext FedAvg
AIMS = {"sealed": 1.0, "sealed crypto=ckks_packed_48": 1.15}


@dataclass(frozen=True)
class Shape:
    """A model's adapted layers, and the ranks of the four clients. hidden: its width, 0 for the embedded model."""

    name: str
    hidden: int
    layers: int
    ranks: tuple[int, ...]


EMBEDDED = Shape("embedded", 0, 4, (2, 4, 8, 8))


def llamas(hidden: int, layers: int) -> list[Shape]:
    """Equal ranks and unequal ones."""
    ranks = {"equal ranks": (16, 16, 16, 16), "unequal ranks": (8, 16, 16, 32)}
    return [Shape(f"{layers} layers of {hidden}, {name}", hidden, layers, r) for name, r in ranks.items()]


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


def many_bytes(link: wire.Session, ranks: tuple[int, ...]) -> tuple[float, float]:
    """Mean bytes up and down per client of a round of a thousand of these ranks."""
    people = tuple(Contributor(ranks[k % len(ranks)], 1) for k in range(MANY))
    found = [load for round_ in (0, 1) for load in loads(link, people, round_)]
    return statistics.fmean(load.up for load in found), statistics.fmean(load.down for load in found)


def measure(overrides: Sequence[str], shape: Shape, repeat: int) -> dict[str, Any]:
    """Means over clients and the two rounds; seconds are medians over repeats."""
    settings = compose(ROOT / "conf", overrides)
    layers, ranks = shapes(shape.hidden, shape.layers), shape.ranks
    plan = make_plan(settings, layers, (), tuple(sorted(set(ranks))))
    part = fresh_part(settings.crypto)
    link = session(settings, plan, run=1, key_fingerprint=part.fingerprint)
    rng = np.random.default_rng(0)
    clients = [adapter(layers, rank, rng) for rank in ranks]
    widest = max(clients, key=lambda mine: mine.rank)
    seconds: dict[str, list[float]] = defaultdict(list)
    up: list[int] = []
    down: list[int] = []
    for _ in range(repeat):
        once: dict[str, float] = defaultdict(float)
        up, down = [], []
        for round_ in (0, 1):
            total = SeparateSum(link, round_, sum(SAMPLES))
            for k, mine in enumerate(clients):
                start = time.process_time()
                data = seal(mine, link, part, round_=round_, sender=k + 1, samples=SAMPLES[k], total=sum(SAMPLES))
                once["client seal"] += (time.process_time() - start) / (2 * len(ranks))
                start = time.process_time()
                total.add(data, sender=k + 1, who=Contributor(ranks[k], SAMPLES[k]))
                once["server add"] += (time.process_time() - start) / 2
                up.append(len(data))
            start = time.process_time()
            aggregate = total.release(2)
            answers = [wire.encode(cut(aggregate, link, link.plan.held(rank)), link) for rank in ranks]
            once["server release"] += (time.process_time() - start) / 2
            for mine, data in zip(clients, answers, strict=True):
                start = time.process_time()
                rank = min(link.plan.held(mine.rank), aggregate.rank)
                unseal(data, link, part, round_=round_, rank=rank, base=widest)
                once["client unseal"] += (time.process_time() - start) / (2 * len(ranks))
                down.append(len(data))
        for stage, value in once.items():
            seconds[stage].append(value)
    up_many, down_many = many_bytes(link, ranks)
    return {
        "bytes_up": statistics.fmean(up),
        "bytes_down": statistics.fmean(down),
        "bytes_up_many": up_many,
        "bytes_down_many": down_many,
        "seconds": {stage: statistics.median(values) for stage, values in seconds.items()},
    }


def compare(shape: Shape, repeat: int) -> dict[str, Any]:
    """All methods at one shape, with ratios to plaintext FedAvg."""
    found = {m: measure(o, shape, repeat) for m, o in track(METHODS.items(), description=shape.name)}
    base = found["fedavg"]
    for result in found.values():
        result["ratio_up"] = result["bytes_up"] / base["bytes_up"]
        result["ratio_down"] = result["bytes_down"] / base["bytes_down"]
        result["ratio_total"] = (result["bytes_up"] + result["bytes_down"]) / (base["bytes_up"] + base["bytes_down"])
        many, plain = (r["bytes_up_many"] + r["bytes_down_many"] for r in (result, base))
        result["ratio_total_many"] = many / plain
        result["ratio_seconds"] = sum(result["seconds"].values()) / sum(base["seconds"].values())
    return found


def describe(shape: Shape, repeat: int) -> dict[str, Any]:
    """What the figures of a shape are of."""
    layers = shapes(shape.hidden, shape.layers)
    return {
        "layers": len(layers),
        "values_of_both_factors_per_rank": sum(x.m + x.n for x in layers),
        "ranks": shape.ranks,
        "samples": SAMPLES,
        "repeat": repeat,
    }


def aims(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, what came out, and whether that is enough."""

    def aim(name: str, wanted: float, value: float) -> dict[str, Any]:
        return {"name": name, "wanted": wanted, "found": value, "met": value <= wanted}

    out = []
    for shape, methods in found.items():
        for method, most in AIMS.items():
            r = methods[method]
            out.append(aim(f"{method}, {shape}: total bytes over fedavg", most, r["ratio_total"]))
            out.append(aim(f"{method}, {shape}: of {MANY} clients", most, r["ratio_total_many"]))
    return out


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=0, help="measure only Llamas of this width")
    parser.add_argument("--layers", type=int, default=2, help="of the Llamas")
    parser.add_argument("--repeat", type=int, default=5, help="of the larger shapes at most 2")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/round.json")
    options = parser.parse_args()
    chosen = llamas(options.hidden, options.layers) if options.hidden else [EMBEDDED, *llamas(2048, options.layers)]
    repeats = {shape: min(options.repeat, 2 if shape.hidden else options.repeat) for shape in chosen}
    load = round(os.getloadavg()[0], 2)
    found = {shape: compare(shape, repeats[shape]) for shape in chosen}
    first, *others = found
    results = {
        "about": describe(first, repeats[first])
        | {
            "shape": first.name,
            "many": MANY,
            "machine": platform.machine(),
            "load_before": load,
            "versions": versions(),
        },
        "methods": found[first],
        "shapes": {s.name: {"about": describe(s, repeats[s]), "methods": found[s]} for s in others},
        "aims": aims({s.name: methods for s, methods in found.items()}),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    for shape, methods in found.items():
        Console(width=160).print(_table(shape, methods))
    for aim in results["aims"]:
        print(f"{aim['name']}: {aim['found']:.3f}, aim at most {aim['wanted']:g}: {'met' if aim['met'] else 'MISSED'}")


def _table(shape: Shape, methods: dict[str, Any]) -> Table:
    table = Table(title=f"{shape.name}, ranks {'/'.join(map(str, shape.ranks))}: per client and round")
    stages = methods["fedavg"]["seconds"]
    milliseconds = [f"{stage}, ms" for stage in stages]
    for column in ("method", "up, kB", "down, kB", "/ fedavg", f"of {MANY}", *milliseconds, "/ fedavg"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for method, r in methods.items():
        times = [f"{s * 1000:.1f}" for s in r["seconds"].values()]
        row = [f"{r['bytes_up'] / 1e3:,.1f}", f"{r['bytes_down'] / 1e3:,.1f}"]
        row += [f"{r['ratio_total']:.3f}", f"{r['ratio_total_many']:.3f}"]
        table.add_row(method, *row, *times, f"{r['ratio_seconds']:.1f}")
    return table


if __name__ == "__main__":
    main()
