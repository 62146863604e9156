"""Sealed messages at the size of a real model through a SuperLink and two SuperNodes on 127.0.0.1. Needs no weights.

    python benchmarks/large_message.py                     Llama-2-7B, query and value, rank 80: about 100 MB each way
    python benchmarks/large_message.py --model Qwen/Qwen3-4B --rank 16

Real processes and the real path of a message: a client seals random factors, normal(0, 0.02), Flower carries the bytes,
the server checks and adds them, and the clients get the aggregate back and open it. Only training is left out. What
arrives is checked twice: by the SHA-256 in every message, and against the mean in float64. Two rounds: B, then A.

Memory is the largest resident set of each kind of process, Python and its libraries included. Seconds in transit are
those of an exchange less those of the slowest client's own work; they depend on the machine and on what else it does.
Results go to benchmarks/results/large_message.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from flwr.app import Context, Message
from flwr.serverapp import Grid
from rich.console import Console

from ciphertune import exchange, flower, wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.aggregation import SeparateSum, cut
from ciphertune.build import session
from ciphertune.build_client import generate_key, open_key
from ciphertune.crypto import keys
from ciphertune.launch import app_folder, end_tree
from ciphertune.planning import settings_of, settle
from ciphertune.shapes import model_shapes
from ciphertune.versions import versions

ROOT = Path(__file__).parents[1]
CLIENTS = 2
KINDS = ("flower-superlink", "flwr-serverapp", "flower-supernode", "flwr-clientapp", "flower-superexec")
APP = """[project]
name = "large-message"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "ciphertune"
[tool.flwr.app.components]
serverapp = "server:app"
clientapp = "client:app"
[tool.flwr.app.config]
root = "{root}"
model = "{model}"
rank = {rank}
fingerprint = "{fingerprint}"
out = "{out}"
"""
SERVER = """from flwr.serverapp import ServerApp
import large_message
app = ServerApp()
@app.main()
def main(grid, context):
    large_message.serve(grid, context)
"""
CLIENT = """from flwr.clientapp import ClientApp
import large_message
app = ClientApp()
@app.train()
def train(message, context):
    return large_message.answer(message, context)
"""


# --- in Flower's processes --------------------------------------------------------------------------------------------


class Work:
    """What both sides know: the settings, the plan, who takes part."""

    def __init__(self, config: dict[str, Any]) -> None:
        words = [f"model={config['model']}", f"rank={config['rank']}", f"clients={CLIENTS}", "method=sealed"]
        self.settings = settings_of(Path(config["root"]) / "conf", words)
        ranks = [c.rank for c in self.settings.federation.clients]
        self.layers, heads = model_shapes(self.settings.model, 0, ranks)
        bare, self.people = settle(self.settings, self.layers, heads)
        self.plan, self.total = bare.plan, sum(c.samples for c in self.people)

    def link(self, run: int, fingerprint: bytes) -> wire.Session:
        """What all messages have in common."""
        return session(self.settings, self.plan, run=run, key_fingerprint=fingerprint)

    def factors(self, client: int, layer: int) -> LoraFactors:
        """A client's factors of one layer, the same in every process."""
        rng, shape, rank = np.random.default_rng([client, layer]), self.layers[layer], self.people[client].rank
        a, b = (rng.standard_normal(s, dtype=np.float32) for s in ((rank, shape.n), (shape.m, rank)))
        return LoraFactors(a * np.float32(0.02), b * np.float32(0.02), self.plan.scale)

    def adapter(self, client: int) -> Adapter:
        """All factors of a client."""
        return Adapter({x.name: self.factors(client, i) for i, x in enumerate(self.layers)}, {})


def answer(message: Message, context: Context) -> Message:
    """A client: opens the aggregate that came along, and seals its update."""
    start = time.perf_counter()
    values, received = flower.unpack(message.content)
    work, me, round_ = Work(dict(context.run_config)), int(context.node_config["partition-id"]), values["round"]
    secret = open_key(work.settings.crypto, keys.load(Path(str(context.node_config["key-file"]))))
    link, who, mine = work.link(context.run_id, secret.fingerprint), work.people[me], work.adapter(me)
    report: dict[str, Any] = {}
    for data in received:
        mean, _ = exchange.unseal(data, link, secret, round_=round_ - 1, rank=who.rank, base=mine)
        report["off"] = max(_off(work, mean.layers[work.layers[0].name], f) for f in work.plan.factors(round_ - 1))
    update = []
    if values["wanted"]:
        update = [
            exchange.seal(
                mine, link, secret, round_=round_, sender=me + 1, samples=who.samples, total=work.total, tier=who.tier
            )
        ]
    return flower.reply(message, report | {"client": me, "seconds": time.perf_counter() - start}, update)


def _off(work: Work, mean: LoraFactors, factor: str) -> float:
    """Largest error of a factor of the first layer."""
    parts = [
        getattr(work.factors(k, 0), factor).astype(np.float64) * who.samples / work.total
        for k, who in enumerate(work.people)
    ]
    return float(np.abs(sum(parts) - getattr(mean, factor)).max())


def serve(grid: Grid, context: Context) -> None:
    """The server: two rounds and a last look, with the code that a run uses to wait, check and add."""
    from server_app.mail import exchange as wait_for
    from server_app.mail import open_reply

    config = dict(context.run_config)
    work = Work(config)
    link, found = work.link(context.run_id, bytes.fromhex(str(config["fingerprint"]))), []
    aggregate: list[bytes] = []
    while len(nodes := list(grid.get_node_ids())) < CLIENTS:
        time.sleep(0.5)
    for round_ in range(3):
        wanted = round_ < 2
        values = {"round": round_, "wanted": wanted}
        messages = [Message(flower.pack(values, aggregate), node, "train") for node in sorted(nodes)]
        start, busy = time.perf_counter(), [0.0]
        sum_ = SeparateSum(link, round_, work.total) if wanted else None
        row: dict[str, Any] = {"bytes_down": len(aggregate[0]) if aggregate else 0, "bytes_up": 0}
        most = [wire.update_size(link, round_, who) if wanted else 0 for who in work.people]
        for _, reply in wait_for(grid, messages, 3000, most):
            report, payload = open_reply(reply)
            busy.append(report["seconds"])
            if sum_:
                row["bytes_up"] = len(payload[0])
                sum_.add(payload[0], sender=report["client"] + 1, who=work.people[report["client"]])
            if "off" in report:
                row["largest_error"] = max(row.get("largest_error", 0.0), report["off"])
            del payload, reply
        row["seconds"] = time.perf_counter() - start
        row["client_seconds"], row["transit_seconds"] = max(busy), row["seconds"] - max(busy)
        found.append(row)
        if sum_:
            aggregate = [wire.encode(cut(sum_.release(CLIENTS), link, work.people[0].rank), link)]
    Path(str(config["out"])).write_text(json.dumps(found))


# --- the benchmark ----------------------------------------------------------------------------------------------------


class Peaks:
    """The largest resident set of each kind of process below this one, as the kernel keeps it."""

    def __init__(self) -> None:
        self.mib = dict.fromkeys(KINDS, 0.0)
        self._ended = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look five times a second."""
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:  # else a failure would wait for the thread for ever
            self._ended.set()
            thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    names = {Path(word).name for word in process.cmdline()[:3]}
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except (psutil.Error, OSError):
                    continue
                high = [int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
                for kind in names & set(KINDS):
                    self.mib[kind] = max(self.mib[kind], *high)


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Start everything, wait for the end of the run, end everything."""
    config = {"root": str(app_folder(ROOT)), "model": options.model, "rank": options.rank}
    key = generate_key(Work(config).settings.crypto)
    keys.save(key, folder / "lab.key")
    app, out, port = folder / "app", folder / "found.json", free_port()
    app.mkdir()
    fingerprint = open_key(Work(config).settings.crypto, key).fingerprint.hex()
    (app / "pyproject.toml").write_text(APP.format(**config, fingerprint=fingerprint, out=out))
    (app / "server.py").write_text(SERVER)
    (app / "client.py").write_text(CLIENT)
    shutil.copy(__file__, app / "large_message.py")
    home = folder / "flwr"
    home.mkdir()
    address = f"127.0.0.1:{port}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    )
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    log = folder / "log.txt"
    with ExitStack() as stack:
        file = stack.enter_context(log.open("wb"))

        def start(*words: str) -> None:
            process = subprocess.Popen(words, env=environment, cwd=folder, stdout=file, stderr=file)
            stack.callback(process.wait)
            stack.callback(end_tree, process.pid)

        start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        _until_up(port)
        for k in range(CLIENTS):
            own = f'partition-id={k} key-file="{folder}/lab.key"'
            words = ("--insecure", "--superlink", address, "--port", str(free_port()), "--node-config", own)
            start("flower-supernode", *words)
        command = ["flwr", "run", str(app), "here", "--stream"]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if not out.exists():
        sys.exit(done.stdout[-3000:] + done.stderr[-1000:] + log.read_text(errors="replace")[-3000:])
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def _until_up(port: int) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.3)


def main() -> None:
    """Run it, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Llama-2-7B", help="as for `ciphertune plan`")
    parser.add_argument("--rank", type=int, default=80)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/large_message.json")
    options = parser.parse_args()
    peaks, console = Peaks(), Console()
    with (
        tempfile.TemporaryDirectory() as folder,
        peaks.watched(),
        console.status("a SuperLink, two SuperNodes, two rounds and a last look"),
    ):
        found = run(options, Path(folder))
    result = {
        "about": {
            "model": options.model,
            "rank": options.rank,
            "clients": CLIENTS,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "versions": versions(),
        },
        "exchanges": found,
        "peak_mib": {kind: round(value, 1) for kind, value in peaks.mib.items()},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print_json(json.dumps({k: v for k, v in result.items() if k != "about"}))


if __name__ == "__main__":
    main()
