"""SHE-LoRA (arXiv 2505.21051) at the shapes of OpenLLaMA-3B: bytes, ciphertexts and seconds per stage, against peers.

    python benchmarks/she_lora.py                                  both settings, about three minutes
    python benchmarks/she_lora.py --setting B --budgets 0.01 0.016
    python benchmarks/she_lora.py --plot cost.svg                  also cost against budget (needs matplotlib)

Factors are random, no model is needed. The stages are those of `exchange` and `product`, timed where they are called.
Peers on the same machine: one column per ciphertext, as the published code has it (extrapolated from samples); the
whole of A, packed as the other methods pack it; both factors in the clear. Bytes are exact; seconds depend on the
machine, so read the ratios. They are seconds of the processor and the least of all repetitions, ours and the peers', so
that what else runs on the machine counts as little as can be: with one BLAS thread (OMP_NUM_THREADS=1) that is the time
it takes on an idle machine. Wall time of our own stages stands beside them.
Results go to benchmarks/results/she_lora.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tenseal as ts
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tables import she_lora_table

from ciphertune import exchange, product, wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.build import make_plan, session
from ciphertune.columns import split_columns
from ciphertune.crypto.base import blocks_for
from ciphertune.crypto.ckks import Multiplier
from ciphertune.crypto.ckks_secret import CkksSecret, generate_key
from ciphertune.crypto.clear import ClearPublic
from ciphertune.negotiation import Wish, negotiate
from ciphertune.plan import LayerShape, column_count
from ciphertune.product import ProductSum
from ciphertune.ranks import Contributor
from ciphertune.settings import CryptoSettings, ckks_params, compose
from ciphertune.versions import versions

ROOT = Path(__file__).parents[1]
WIDTH = 3200  # of OpenLLaMA-3B; every adapted layer is (WIDTH, WIDTH)
SAMPLES = (400, 600, 1000, 1200)
SAMPLE, FEW = 32, 8  # repetitions of what is extrapolated: cheap operations, and those of many milliseconds
FLOAT = 4  # bytes of a value in the clear


@dataclass(frozen=True)
class Setting:
    """Adapted layers, the ranks of the four clients, and the budgets that all of them have in turn."""

    layers: int
    ranks: tuple[int, ...]
    budgets: tuple[float, ...]

    @property
    def rank(self) -> float:
        """Mean over clients."""
        return statistics.fmean(self.ranks)


SETTINGS = {
    "A": Setting(104, (4, 4, 4, 4), (0.00125, 0.25)),  # q, k, v and o of 26 blocks, as in the published code's own run
    "B": Setting(26, (8, 16, 16, 32), (0.00125, 0.01, 0.016, 0.25)),  # q of 26 blocks, ranks of the paper
}

# Reported by the method's authors' code in their own runs, NOT measured here, per client: four clients of rank 4, 104
# pairs of factors, on their machine, wall time. The multiplication is that of four workers (`worker_seconds`: their
# sum); bytes and encryption are theirs over four clients, the plaintext is both factors.
# From github.com/icloudsheep/SHE-LoRA, benchmark_outputs/she_ckks/*/summary.json: the run 20260730_095855_023864 has
# one column per ciphertext, 20260806_131144_369999 has four.
REPORTED: dict[str, dict[float, dict[str, Any]]] = {
    "reported": {
        0.00125: {
            "ciphertexts_up": 416,
            "bytes_up": 108_558_523,
            "cipher_bytes_up": 97_908_923,
            "seconds": {
                "client seal": 5.004,
                "server multiply": 146.6,
                "client decrypt": 0.405,
                "client svd": 271.4,
            },
            "worker_seconds": 557.4,
        },
        0.25: {
            "ciphertexts_up": 83_200,
            "bytes_up": 19_592_500_579,
            "cipher_bytes_up": 19_581_850_979,
            "seconds": {
                "client seal": 733.6,
                "server multiply": 28_420.7,
                "client decrypt": 162.1,
                "client svd": 420.7,
            },
            "worker_seconds": 109_139.1,
        },
    },
    "reported_packed": {
        0.00125: {
            "ciphertexts_up": 104,
            "bytes_up": 35_153_459,
            "cipher_bytes_up": 24_477_235,
            "bytes_down": 65_262_496,
            "seconds": {
                "client seal": 1.371,
                "server multiply": 179.8,
                "client decrypt": 0.420,
                "client svd": 312.7,
            },
            "worker_seconds": 696.9,
        },
        0.25: {
            "ciphertexts_up": 20_800,
            "bytes_up": 4_906_137_329,
            "cipher_bytes_up": 4_895_461_105,
            "bytes_down": 10_927_930_624,
            "seconds": {
                "client seal": 262.3,
                "server multiply": 32_517.5,
                "client decrypt": 138.1,
                "client svd": 306.1,
            },
            "worker_seconds": 125_850.6,
        },
    },
}
PEERS = {
    "reported": "as reported by the authors' code, one column per ciphertext; multiplication on four workers",
    "reported_packed": "as reported by the authors' code, four columns per ciphertext; multiplication on four workers",
    "column": "one column per ciphertext, N=8192, public key; measured here, extrapolated from samples. "
    "server multiply: one vector-matrix product per column, as the authors' code computes it. "
    "server products: m ciphertext-plaintext products per column instead, without the sums over them. "
    "client svd: of a dense (m, n) float32 matrix, measured once, times the layers",
    "whole_a": "all of A packed densely under conf/crypto/ckks.yaml, B not sent; seconds extrapolated from a sample",
    "plaintext": "both factors in the clear, float32",
}
# Of setting A at the smallest budget; megabytes and seconds.
AIMS = {"bytes_up": 12e6, "cipher_bytes_up": 1e6, "server multiply": 5.0, "client svd": 3.0}


class Clock:
    """Seconds per stage, of the processor and of the wall, added up over the calls of what it wraps, and the arguments
    of each stage's last call.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.wall: dict[str, float] = defaultdict(float)
        self.last: dict[str, tuple[Any, ...]] = {}

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, with its seconds counted."""

        def wrapped(*args: Any, **options: Any) -> Any:
            self.last[stage] = args
            start, start_wall = time.process_time(), time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds[stage] += time.process_time() - start
                self.wall[stage] += time.perf_counter() - start_wall

        return wrapped


@dataclass(frozen=True)
class Federation:
    """What a round needs: the run, a key, and the trained adapters."""

    link: wire.Session
    part: CkksSecret
    clients: list[Adapter]


def crypto(*overrides: str) -> CryptoSettings:
    """Encryption settings as configured."""
    return compose(ROOT / "conf", overrides).crypto


def factors(rank: int, scale: float, rng: np.random.Generator) -> LoraFactors:
    """Random factors of one layer, of the size that training gives them."""
    a, b = (rng.normal(0, 0.05, shape).astype(np.float32) for shape in ((rank, WIDTH), (WIDTH, rank)))
    return LoraFactors(a, b, scale)


def federation(setting: Setting, budget: float) -> Federation:
    """Four clients of the same budget. A larger budget's random columns begin with those of a smaller one."""
    settings = compose(ROOT / "conf", ["method=she_lora"])
    layers = tuple(LayerShape(f"{i:03d}", WIDTH, WIDTH) for i in range(setting.layers))
    rng = np.random.default_rng(0)
    count = column_count(WIDTH, budget)
    columns = tuple(tuple(rng.permutation(WIDTH)[:count].tolist()) for _ in layers)
    plan = make_plan(settings, layers, (), tuple(sorted(set(setting.ranks))), (budget,), columns)
    params = ckks_params(settings.crypto)
    part = CkksSecret(params, generate_key(params))
    clients = [Adapter({x.name: factors(r, plan.scale, rng) for x in layers}, {}) for r in setting.ranks]
    return Federation(session(settings, plan, run=1, key_fingerprint=part.fingerprint), part, clients)


def one_round(fed: Federation, progress: Progress) -> tuple[dict[str, Any], Clock, wire.Message]:
    """One round of the real functions: sizes, seconds, and the aggregate."""
    clock, link, part, people = Clock(), fed.link, fed.part, len(fed.clients)
    plan, total = link.plan, sum(SAMPLES)
    blocks = blocks_for(link.public, sum(plan.hidden(0)))
    terms = sum(c.rank for c in fed.clients)
    task = progress.add_task("  server multiply", total=blocks * terms * min(plan.rank_cap, terms))
    original = Multiplier.sum

    def counted(multiplier: Multiplier, found: Sequence[Any], *rest: Any) -> Any:
        progress.advance(task, len(found))
        return original(multiplier, found, *rest)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Multiplier, "sum", counted))
        for stage, where, name in (
            ("client split", exchange, "split_columns"),
            ("client encrypt", part, "encrypt"),
            ("client decrypt", part, "decrypt"),
            ("client svd", exchange, "reparameterise"),
            ("server basis", product, "shared_basis"),
            ("server multiply", link.public, "combine"),
        ):
            stack.enter_context(patch.object(where, name, clock.timed(stage, getattr(where, name))))
        sum_ = ProductSum(link, 0, total)
        seal, unseal = clock.timed("client seal", exchange.seal), clock.timed("client unseal", exchange.unseal)
        up, secret = [], []
        for k, mine in enumerate(fed.clients):
            data = seal(mine, link, part, round_=0, sender=k + 1, samples=SAMPLES[k], total=total)
            message = clock.timed("server add", sum_.add)(data, sender=k + 1, who=Contributor(mine.rank, SAMPLES[k]))
            up.append(len(data))
            secret.append(len(message.secret))
        aggregate = clock.timed("server release", sum_.release)(2)
        answer = clock.timed("server encode", wire.encode)(aggregate, link)
        for mine in fed.clients:
            unseal(answer, link, part, round_=0, rank=aggregate.rank, base=mine)
    done = int(progress.tasks[-1].completed)
    progress.remove_task(task)
    size = link.public.block_bytes
    sizes = {
        "ciphertexts_up": statistics.fmean(secret) / size,
        "ciphertexts_up_per_client": [s // size for s in secret],
        "bytes_up": statistics.fmean(up),
        "bytes_up_per_client": up,
        "cipher_bytes_up": statistics.fmean(secret),
        "cipher_bytes_up_per_client": secret,
        "ciphertexts_down": len(aggregate.secret) // size,
        "bytes_down": len(answer),
        "cipher_bytes_down": len(aggregate.secret),
        "basis_rank": min(plan.rank_cap, terms),
        "plaintext_products": done,
        "truncation": max(sum_.truncation.values()),
    }
    for stage in clock.seconds:
        share = people if stage.startswith("client") else 1
        clock.seconds[stage] /= share
        clock.wall[stage] /= share
    return sizes, clock, aggregate


def precision(fed: Federation, clock: Clock, aggregate: wire.Message) -> dict[str, float]:
    """Largest error of the decrypted combinations against the same ones in float64, and the bound on it."""
    _, coefficients, groups, added = clock.last["server multiply"]
    codes, public = exchange.codes_of(fed.link, fed.part), fed.link.public
    rows = [
        row
        for mine, samples in zip(fed.clients, SAMPLES, strict=True)
        for row in split_columns(mine, fed.link.plan, 0, codes, samples / sum(SAMPLES))[1][1:]
    ]
    exact = ClearPublic("float64").combine([r.tobytes() for r in rows], coefficients, groups, added)
    size, error, largest = blocks_for(public, groups.size) * public.block_bytes, 0.0, 0.0
    for p, row in enumerate(exact):
        want = np.frombuffer(row)
        found = fed.part.decrypt(aggregate.secret[p * size : (p + 1) * size], groups.size, product=True)
        error, largest = max(error, float(np.abs(found - want).max())), max(largest, float(np.abs(want).max()))
    values = float(np.sqrt(sum(r * r for r in rows)).max())
    bound = public.product_error_bound(float(np.linalg.norm(coefficients, axis=1).max()), values, largest)
    return {"error": error, "error_bound": bound, "largest_value": largest}


def measure(setting: Setting, budget: float, repeat: int, progress: Progress) -> dict[str, Any]:
    """Sizes, and seconds as the least of `repeat` rounds; client seconds are means over the clients."""
    fed = federation(setting, budget)
    rounds = []
    for _ in range(repeat):
        sizes, clock, aggregate = one_round(fed, progress)
        rounds.append(clock)
    least = {
        name: {stage: min(found[stage] for found in of) for stage in of[0]}
        for name, of in (("seconds", [c.seconds for c in rounds]), ("wall_seconds", [c.wall for c in rounds]))
    }
    return {**sizes, **least, **precision(fed, clock, aggregate)}


def negotiation_seconds(setting: Setting, budget: float, repeat: int) -> float:
    """The server's part of the negotiation, each client naming random columns."""
    rng = np.random.default_rng(1)
    count = column_count(WIDTH, budget)
    wishes = [
        Wish(str(k), budget, tuple(rng.permutation(WIDTH)[:count] for _ in range(setting.layers)))
        for k in range(len(setting.ranks))
    ]
    return per_call(lambda: negotiate([WIDTH] * setting.layers, wishes), repeat)


def per_call(call: Callable[[], Any], times: int) -> float:
    """Least seconds of the processor in a call."""
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def column_units(ranks: Sequence[int], progress: Progress) -> dict[int, dict[str, float]]:
    """Per rank: what one column in one ciphertext costs, as published: CKKSVector, public key, Galois keys."""
    chosen = crypto("method=sealed", "crypto=ckks_8192")
    context = ts.context(
        ts.SCHEME_TYPE.CKKS,
        chosen.poly_modulus_degree,
        coeff_mod_bit_sizes=list(chosen.coeff_mod_bits),
        n_threads=1,
    )
    context.global_scale = 2.0**chosen.scale_bits
    context.generate_galois_keys()
    rng, units = np.random.default_rng(2), {}
    for rank in progress.track(ranks, description="  one column per ciphertext"):
        column, b = rng.normal(0, 0.05, rank).tolist(), rng.normal(0, 0.05, (WIDTH, rank))
        plain = ts.plain_tensor(b.T)
        sealed = ts.ckks_vector(context, column).serialize()
        loaded = ts.ckks_vector_from(context, sealed)
        answer = loaded.mm(plain).serialize()
        if not np.allclose(ts.ckks_vector_from(context, answer).decrypt(), b @ column, atol=1e-6):
            raise SystemExit("one column per ciphertext: the product decrypts to something else")
        row = b[0].tolist()
        units[rank] = {
            "bytes_up": float(len(sealed)),
            "bytes_down": float(len(answer)),
            "client seal": per_call(lambda c=column: ts.ckks_vector(context, c).serialize(), SAMPLE),
            "server multiply": per_call(
                lambda s=sealed, p=plain: ts.ckks_vector_from(context, s).mm(p).serialize(), FEW
            ),
            "server products": per_call(lambda x=loaded, r=row: x * r, SAMPLE),
            "client decrypt": per_call(lambda a=answer: ts.ckks_vector_from(context, a).decrypt(), SAMPLE),
        }
    return units


def column_peer(setting: Setting, budget: float, units: dict[int, dict[str, float]], svd: float) -> dict[str, Any]:
    """One column per ciphertext, extrapolated to all columns and clients."""
    count = column_count(WIDTH, budget)
    columns, clients = setting.layers * count, len(setting.ranks)
    mean = {k: statistics.fmean(units[r][k] for r in setting.ranks) for k in units[setting.ranks[0]]}
    shown = FLOAT * setting.rank * setting.layers * (2 * WIDTH - count)
    return {
        "ciphertexts_up": columns,
        "bytes_up": mean["bytes_up"] * columns + shown,
        "cipher_bytes_up": mean["bytes_up"] * columns,
        "bytes_down": mean["bytes_down"] * columns + shown,
        "seconds": {
            "client seal": mean["client seal"] * columns,
            "server multiply": mean["server multiply"] * columns * clients,
            "server products": mean["server products"] * columns * clients * WIDTH,
            "client decrypt": mean["client decrypt"] * columns,
            "client svd": svd * setting.layers,
        },
    }


def dense_svd_seconds(setting: Setting) -> float:
    """One SVD of one layer's dense mean update, float32."""
    rng = np.random.default_rng(3)
    dense = sum(factors(r, 1.0, rng).delta() for r in setting.ranks) / len(setting.ranks)
    return per_call(lambda: np.linalg.svd(dense.astype(np.float32), full_matrices=False), 1)


def whole_a_peer(setting: Setting) -> dict[str, Any]:
    """All of A in ciphertexts for sums, seconds extrapolated from a sample of blocks."""
    params = ckks_params(crypto("method=sealed", "crypto=ckks"))
    part = CkksSecret(params, generate_key(params))
    blocks = statistics.fmean(blocks_for(part.public, setting.layers * WIDTH * r) for r in setting.ranks)
    values = np.random.default_rng(4).normal(0, 0.05, part.public.slots)
    body = part.encrypt(values)
    size = blocks * part.public.block_bytes
    return {
        "ciphertexts_up": blocks,
        "bytes_up": size,
        "cipher_bytes_up": size,
        "bytes_down": size,
        "seconds": {
            "client seal": per_call(lambda: part.encrypt(values), SAMPLE) * blocks,
            "client decrypt": per_call(lambda: part.decrypt(body, values.size), SAMPLE) * blocks,
        },
    }


def plaintext_peer(setting: Setting) -> dict[str, Any]:
    """Both factors, float32, in the clear."""
    size = FLOAT * setting.rank * setting.layers * 2 * WIDTH
    return {"ciphertexts_up": 0, "bytes_up": size, "cipher_bytes_up": 0, "bytes_down": size, "seconds": {}}


def ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """A peer's figures over ours; above 1 ours is smaller."""
    flat = [{k: v for k, v in x.items() if isinstance(v, int | float)} | x["seconds"] for x in (ours, peer)]
    return {
        k: flat[1][k] / flat[0][k]
        for k in ("bytes_up", "cipher_bytes_up", "bytes_down", "client seal", "server multiply", "client svd")
        if k in flat[1] and flat[0][k] and flat[1][k]
    }


def run(name: str, setting: Setting, repeat: int, progress: Progress) -> dict[str, Any]:
    """All budgets of one setting, and its peers."""
    units = column_units(sorted(set(setting.ranks)), progress)
    task = progress.add_task("  dense SVD", total=None)
    svd = dense_svd_seconds(setting)
    progress.remove_task(task)
    fixed = {"whole_a": whole_a_peer(setting), "plaintext": plaintext_peer(setting)}
    budgets = {}
    for budget in progress.track(setting.budgets, description=f"setting {name}"):
        ours = measure(setting, budget, repeat, progress)
        if name == "A":
            ours["negotiate_seconds"] = negotiation_seconds(setting, budget, repeat)
        peers = {k: v[budget] for k, v in REPORTED.items() if name == "A" and budget in v}
        peers["column"] = column_peer(setting, budget, units, svd)
        compared = {k: ratios(ours, v) for k, v in (peers | fixed).items()}
        budgets[str(budget)] = {"she_lora": ours, "peers": peers, "peer_over_she_lora": compared}
    return {
        **asdict(setting),
        "columns_per_layer": {str(b): column_count(WIDTH, b) for b in setting.budgets},
        "per_column": {str(r): u for r, u in units.items()},
        "dense_svd_seconds": svd,
        "budgets": budgets,
        "peers": fixed,
    }


def aims(found: dict[str, Any]) -> dict[str, Any]:
    """What was aimed at in setting A, what came out, and whether that is enough."""
    ours = found["budgets"][str(SETTINGS["A"].budgets[0])]["she_lora"]
    got = {k: ours["seconds"][k] if " " in k else ours[k] for k in AIMS}
    return {k: {"below": limit, "measured": got[k], "met": got[k] < limit} for k, limit in AIMS.items()}


def plot(found: dict[str, Any], path: Path) -> None:
    """Cost against budget in setting B: upload on the left, seconds on the right."""
    from matplotlib.figure import Figure

    results = list(found["budgets"].values())
    x = [100 * float(b) for b in found["budgets"]]
    ours, theirs = [r["she_lora"] for r in results], [r["peers"]["column"] for r in results]
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for rows, who, style in ((ours, "she_lora", "o-"), (theirs, "1 column per ciphertext*", "s--")):
        left.plot(x, [r["bytes_up"] / 1e6 for r in rows], style, color="C0", label=who)
        left.plot(x, [r["cipher_bytes_up"] / 1e6 for r in rows], style, color="C1", label=f"{who}, ciphertext")
        for i, stages in enumerate((("client seal",), ("server multiply",), ("client decrypt", "client svd"))):
            seconds = [sum(r["seconds"][s] for s in stages) for r in rows]
            right.plot(
                x, seconds, style, color=f"C{i}", label=f"{who}: {' + '.join(stages).replace('+ client svd', '+ SVD')}"
            )
    for peer, label, style in (("whole_a", "all of A encrypted", "-."), ("plaintext", "A and B in the clear", ":")):
        left.axhline(found["peers"][peer]["bytes_up"] / 1e6, color="grey", ls=style, label=label)
    for axes, what in ((left, "upload per client, MB"), (right, "seconds")):
        axes.set(xscale="log", yscale="log", xlabel="columns encrypted, %", ylabel=what)
        axes.minorticks_off()
        axes.set_xticks(x, [f"{v:g}" for v in x])
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    ranks = ", ".join(map(str, found["ranks"]))
    figure.suptitle(f"{found['layers']} layers of {WIDTH} x {WIDTH}, ranks {ranks}   (* extrapolated from samples)")
    figure.savefig(path)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=(*SETTINGS, "all"), default="all")
    parser.add_argument("--budgets", type=float, nargs="+", help="of setting B, shares of the columns from 0 to 1")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/she_lora.json")
    parser.add_argument("--plot", type=Path, help="write cost against budget of setting B here")
    options = parser.parse_args()
    if options.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib, which ciphertune does not depend on: pip install matplotlib")
    if options.plot and options.setting == "A":
        parser.error("--plot shows setting B: leave out --setting A")
    if not all(0 < b <= 1 for b in options.budgets or ()):
        parser.error("--budgets are shares of the columns, above 0 and at most 1")
    chosen = {k: v for k, v in SETTINGS.items() if options.setting in (k, "all")}
    if options.budgets and "B" in chosen:
        chosen["B"] = Setting(chosen["B"].layers, chosen["B"].ranks, tuple(sorted(set(options.budgets))))
    about = {
        "shape": [WIDTH, WIDTH],
        "samples": SAMPLES,
        "repeat": options.repeat,
        "peers": PEERS,
        "seconds": "of the processor, the least of all repetitions; wall_seconds: of the wall; reported: of the wall",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "blas_threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load_before": os.getloadavg()[0],
        "versions": versions(),
    }
    console = Console(width=190)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        found = {name: run(name, setting, options.repeat, progress) for name, setting in chosen.items()}
    results = {"about": about, "settings": found} | ({"aims": aims(found["A"])} if "A" in found else {})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    head, _, *rows = she_lora_table(results)
    table = Table(
        title="per client and round, the server's per round; seconds of the processor, of the reported ones wall time"
    )
    for i, column in enumerate(head.strip("| ").split(" | ")):
        table.add_column(column, justify="right" if i > 1 else "left")
    for row in rows:
        if row.startswith("|"):
            table.add_row(*row[2:-2].replace("`", "").split(" | "))
    console.print(table)
    for name, aim in results.get("aims", {}).items():
        verdict = "met" if aim["met"] else "MISSED"
        console.print(f"{name}: {aim['measured']:.4g}, aim below {aim['below']:.4g}: {verdict}")
    if options.plot:
        plot(found["B"], options.plot)


if __name__ == "__main__":
    main()
