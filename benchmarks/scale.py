"""One round at the size of a real model, held against what `ciphertune plan` says of it. Needs no weights.

    python benchmarks/scale.py                           Llama-2-7B, query and value, rank 32, four clients
    python benchmarks/scale.py --all                     with full_he, which takes gigabytes and minutes
    python benchmarks/scale.py --model Qwen/Qwen3-4B --rank 16 --methods sealed,she_lora

Factors are random, normal(0, 0.02). Every client and the server are processes of their own and hand each other files,
so each has its own peak of memory: the largest resident set, Python and its libraries included, and what it rose by
after these were loaded. A method that alternates sends B in the first round and A in the second: both are done. Bytes
are exact; seconds are of one processor and depend on the machine, so read them beside the forecast, which comes from a
calibration on the same machine. Results go to benchmarks/results/scale.json.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ciphertune import exchange, wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.aggregation import cut
from ciphertune.build import round_sum, session
from ciphertune.build_client import fresh_part, generate_key, open_key
from ciphertune.calibration import Calibration
from ciphertune.crypto import keys
from ciphertune.crypto.secret import SecretPart
from ciphertune.forecast import forecast
from ciphertune.planning import settings_of, settle
from ciphertune.shapes import model_shapes
from ciphertune.versions import versions

ROOT = Path(__file__).parents[1]
RUN, SAMPLES = 1, 100
Report = dict[str, Any]


class Work:
    """What all processes of a method's rounds know: the settings, the plan, who takes part, where files lie."""

    def __init__(self, options: argparse.Namespace) -> None:
        words = [f"model={options.model}", f"rank={options.rank}", f"clients={options.clients}"]
        self.settings = settings_of(ROOT / "conf", [*words, f"method={options.method}"])
        ranks = [c.rank for c in self.settings.federation.clients]
        self.layers, self.heads = model_shapes(self.settings.model, 0, ranks)
        bare, self.people = settle(self.settings, self.layers, self.heads)
        self.plan, self.folder, self.round, self.client = bare.plan, options.folder, options.round, options.client
        self.total = sum(c.samples for c in self.people)

    @cached_property
    def secret(self) -> SecretPart:
        """A client's half of the backend. Never touched by the server's process."""
        crypto = self.settings.crypto
        return fresh_part(crypto) if crypto.backend == "clear" else open_key(crypto, keys.load(self.folder / "key"))

    def link(self, fingerprint: bytes) -> wire.Session:
        """What all messages have in common."""
        return session(self.settings, self.plan, run=RUN, key_fingerprint=fingerprint)

    def factors(self, client: int, layer: int) -> LoraFactors:
        """A client's factors of one layer, the same in every process."""
        rng, shape, rank = np.random.default_rng([client, layer]), self.layers[layer], self.people[client].rank
        a, b = (rng.standard_normal(s, dtype=np.float32) for s in ((rank, shape.n), (shape.m, rank)))
        a *= np.float32(0.02)
        b *= np.float32(0.02)
        return LoraFactors(a, b, self.plan.scale)

    def adapter(self) -> Adapter:
        """All factors of this process's client."""
        return Adapter({x.name: self.factors(self.client, i) for i, x in enumerate(self.layers)}, {})


class Watch:
    """Seconds of the processor by stage, and what memory rose by since this was made."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._before = psutil.Process().memory_info().rss

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the seconds inside to a stage."""
        start = time.process_time()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.process_time() - start

    def report(self, **more: Any) -> Report:
        """What the process took; of getrusage's peak a process that was just started inherits its parent's."""
        status = Path("/proc/self/status").read_text()
        peak = 1024 * next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM:"))
        return {"seconds": self.seconds, "peak": peak, "beside": peak - self._before, **more}


# --- what the processes do --------------------------------------------------------------------------------------------


def seal(work: Work) -> Report:
    """A client: its update into a file."""
    secret = work.secret
    link, watch, who = work.link(secret.fingerprint), Watch(), work.people[work.client]
    mine = work.adapter()
    with watch.time("seal"):
        data = exchange.seal(
            mine,
            link,
            secret,
            round_=work.round,
            sender=work.client + 1,
            samples=who.samples,
            total=work.total,
            tier=who.tier,
            guide=mine,
        )
    (work.folder / f"update-{work.client}").write_bytes(data)
    return watch.report(bytes=len(data))


def serve(work: Work) -> Report:
    """The server: adds the updates one by one, and writes each client's answer."""
    link, watch = work.link((work.folder / "fingerprint").read_bytes()), Watch()
    total = round_sum(link, work.round, work.total)
    for k, who in enumerate(work.people):
        data = (work.folder / f"update-{k}").read_bytes()
        with watch.time("add"):
            total.add(data, sender=k + 1, who=who)
    del data
    with watch.time("release"):
        whole = total.release(work.settings.federation.min_contributors)
    for k, who in enumerate(work.people):
        with watch.time("release"):
            answer = wire.encode(cut(whole, link, link.plan.held(who.rank)), link)
        (work.folder / f"aggregate-{k}").write_bytes(answer)
    return watch.report(rank=whole.rank)


def unseal(work: Work) -> Report:
    """A client: the mean from its file, and how far it is from the truth in the first layer."""
    secret = work.secret
    link, watch = work.link(secret.fingerprint), Watch()
    mine, data = work.adapter(), (work.folder / f"aggregate-{work.client}").read_bytes()
    separate = work.plan.aggregate == "separate"
    rank = work.people[work.client].rank if separate else max(c.rank for c in work.people)
    with watch.time("unseal"):
        mean, _ = exchange.unseal(data, link, secret, round_=work.round, rank=rank, base=mine)
    found = watch.report(bytes=len(data))  # before the check, which takes memory of its own
    if separate:
        first = mean.layers[work.layers[0].name]
        found["error"] = max(_off(work, f, first) for f in work.plan.factors(work.round))
    return found


def _off(work: Work, factor: str, mean: LoraFactors) -> float:
    """Largest error of a factor of the first layer, where all clients have one rank."""
    all_ = [getattr(work.factors(k, 0), factor).astype(np.float64) for k in range(len(work.people))]
    weights = [c.samples / work.total for c in work.people]
    return float(np.abs(sum(w * x for w, x in zip(weights, all_, strict=True)) - getattr(mean, factor)).max())


def foresee(work: Work) -> Report:
    """The forecast of the rounds that are done, and the key that the clients share."""
    if work.settings.crypto.backend != "clear":
        key = generate_key(work.settings.crypto)
        keys.save(key, work.folder / "key")
    (work.folder / "fingerprint").write_bytes(work.secret.fingerprint)
    rounds = (0, 1) if work.plan.factors(0) != work.plan.factors(1) else (0,)
    calibration = Calibration()
    found = forecast(work.settings, work.layers, work.heads, calibration, rounds)
    return {
        "forecast": asdict(found),
        "calibration_seconds": calibration.seconds,
        "rounds": rounds,
        "layers": len(work.layers),
        "values_of_both_factors": sum(x.m + x.n for x in work.layers) * max(c.rank for c in work.people),
    }


PARTS: dict[str, Callable[[Work], Report]] = {"foresee": foresee, "seal": seal, "serve": serve, "unseal": unseal}


# --- the whole --------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, method: str, progress: Progress) -> Report:
    """Forecast and rounds of one method, each part a process of its own."""

    def part(name: str, round_: int = 0, client: int = 0) -> Report:
        words = ["--model", options.model, "--rank", options.rank, "--clients", options.clients, "--method", method]
        words += ["--part", name, "--folder", folder, "--round", round_, "--client", client]
        done = subprocess.run(
            [sys.executable, __file__, *map(str, words)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        progress.advance(task)
        found: Report = json.loads(done.stdout.splitlines()[-1])
        return found

    task = progress.add_task(method, total=None)
    with tempfile.TemporaryDirectory() as folder:
        said = part("foresee")
        clients, rounds = range(options.clients), said["rounds"]
        progress.update(task, total=1 + len(rounds) * (2 * options.clients + 1))
        up, down, server = [], [], []
        for r in rounds:
            up += [part("seal", r, k) for k in clients]
            server.append(part("serve", r))
            down += [part("unseal", r, k) for k in clients]
    return said | {
        "measured": {
            "bytes_up": fmean(x["bytes"] for x in up),
            "bytes_down": fmean(x["bytes"] for x in down),
            "seal_seconds": fmean(x["seconds"]["seal"] for x in up),
            "unseal_seconds": fmean(x["seconds"]["unseal"] for x in down),
            "add_seconds": fmean(x["seconds"]["add"] for x in server),
            "release_seconds": fmean(x["seconds"]["release"] for x in server),
            "client_memory": max(x["beside"] for x in (*up, *down)),
            "server_memory": max(x["beside"] for x in server),
            "client_peak": max(x["peak"] for x in (*up, *down)),
            "server_peak": max(x["peak"] for x in server),
            "largest_error": max((x["error"] for x in down if "error" in x), default=None),
        }
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Llama-2-7B", help="as for `ciphertune plan`")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--methods", default="fedavg,sealed", help="names with commas between")
    parser.add_argument("--all", action="store_true", help="with full_he")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/scale.json")
    for hidden, kind in (("--part", str), ("--method", str), ("--folder", Path), ("--round", int), ("--client", int)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](Work(options))))
        return
    methods = [*options.methods.split(","), *(["full_he"] if options.all else [])]
    with Progress() as progress:
        found = {method: measure(options, method, progress) for method in methods}
    about = {
        "model": options.model,
        "rank": options.rank,
        "clients": options.clients,
        **{k: found[methods[0]][k] for k in ("layers", "values_of_both_factors")},
        "machine": platform.machine(),
        "versions": versions(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "methods": found}, indent=2) + "\n")
    _print(found, about)
    for method, result in found.items():
        for way in ("bytes_up", "bytes_down"):
            if result["measured"][way] != result["forecast"][way]:
                sys.exit(f"{method}: {way} are {result['measured'][way]}, not {result['forecast'][way]}")


def _print(found: dict[str, Report], about: Report) -> None:
    title = f"{about['model']}, {about['layers']} layers, rank {about['rank']}, {about['clients']} clients: one round"
    table = Table(title=title, caption="memory: beside Python and its libraries; peak: with them")
    columns = ("up", "down", "seal", "unseal", "add", "release", "client memory", "server memory", "peaks")
    for column in ("method", "", *columns):
        table.add_column(column, justify="right" if column else "left")
    for method, result in found.items():
        for name in ("measured", "forecast"):
            r = result[name]
            sizes = [f"{r[k] / 1e6:.1f} MB" for k in ("bytes_up", "bytes_down")]
            stages = [f"{r[f'{k}_seconds']:.2g} s" for k in ("seal", "unseal", "add", "release")]
            memory = [f"{r[f'{k}_memory'] / 1e6:,.0f} MB" for k in ("client", "server")]
            peaks = (
                " / ".join(f"{r[f'{k}_peak'] / 1e6:,.0f} MB" for k in ("client", "server"))
                if "client_peak" in r
                else ""
            )
            table.add_row(method if name == "measured" else "", name, *sizes, *stages, *memory, peaks)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
