"""Crashes and dropouts with real processes on 127.0.0.1: what is lost, what is kept, how it goes on. Slow."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import ROOT
from processes import BIN, connection, environment_in, free_port, kill, start, superlink, supernode, wait_until
from safetensors.numpy import load_file
from tiny import SENTENCES, write_lines

pytestmark = [pytest.mark.slow, pytest.mark.long]
RANKS = {"lab-a": 4, "lab-b": 16, "lab-c": 16}


class Labs:
    """A SuperLink and three labs with a key, data and folders of their own."""

    def __init__(self, stack: ExitStack, folder: Path, model: Path, *link: str) -> None:
        self.stack, self.folder, self.model = stack, folder, model
        self.environment, self.port = environment_in(folder), free_port()
        self.key = folder / "lab.key"
        words = [str(BIN / "ciphertune"), "keys", "create", "--out", str(self.key), "--app", str(ROOT)]
        subprocess.run(words, env=self.environment, check=True, capture_output=True)
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch, transformers, peft"], env=self.environment, check=True)
        self.patience = round(max(45.0, 10 * (time.monotonic() - started)))  # for a round, on this machine today
        self.link = superlink(stack, self.environment, folder / "superlink.log", self.port, *link)
        connection(self.environment, "lab", self.port)
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        for k, name in enumerate(RANKS):
            write_lines(folder / f"{name}.jsonl", [{"text": t} for t in SENTENCES[: 5 + k] * 2])
            (folder / name).mkdir()
            (folder / name / "lab.key").write_bytes(self.key.read_bytes())
            (folder / name / "lab.key").chmod(0o600)
            self.start(name)

    def start(self, name: str) -> None:
        config = f'name="{name}" rank={RANKS[name]} data-path="{self.folder}/{name}.jsonl" allow-clear=true '
        config += f'key-file="{self.folder}/{name}/lab.key" run-dir="{self.folder}/{name}"'
        self.nodes[name] = supernode(self.stack, self.environment, self.folder / f"{name}.log", self.port, config)

    def run(self, name: str, *overrides: str) -> Run:
        words = [
            "model=hf", f"model.name={self.model}", "model.max_length=32", "data=jsonl", "data.heldout_fraction=0.3",
            "federation.min_clients=3", "federation.clients=[{rank:4},{rank:8},{rank:8}]",
            "federation.compare_local=false", "training.steps=2", "training.batch_size=2", "training.threads=1",
            "record_updates=true", "model.release=float32", f"name={name}", *overrides,
        ]  # fmt: skip
        return Run(self, name, words)

    def asked(self, name: str) -> int:
        """How often a lab was asked to train, in all runs."""
        return self.log(name).count("Receiving: train message")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def workers(self, name: str) -> list[psutil.Process]:
        """The processes in which a lab works on messages."""
        found = []
        for process in psutil.Process(self.nodes[name].pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if any("flwr-clientapp" in word for word in process.cmdline()):
                    found.append(process)
        return found


class Run:
    """`ciphertune run --superlink`, in the background."""

    def __init__(self, labs: Labs, name: str, words: list[str]) -> None:
        self.labs, self.name, self.words = labs, name, words
        self.folder = labs.folder / "server/runs" / name
        self.out = labs.folder / f"{name}.out"
        command = [str(BIN / "ciphertune"), "run", "--app", str(ROOT), "--superlink", "lab", *words]
        self.process = start(labs.stack, labs.environment, self.out, *command)

    def said(self) -> str:
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def aggregated(self, round_: int) -> None:
        """Wait for a round's aggregate, from 0."""
        path = self.folder / f"server/round_{round_:04d}.msg"
        wait_until(lambda: path.exists() or self.process.poll() is not None, f"{path.name}: {self.said()}")
        assert path.exists(), self.said()

    def end(self) -> int:
        return self.process.wait(900)

    def resumed(self) -> Run:
        """The same once more, from where it was left."""
        return Run(self.labs, self.name, [*self.words, f"resume={self.folder}"])

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found

    def contributors(self) -> list[set[str]]:
        """Whose updates were added, per round."""
        lines = [json.loads(x) for x in (self.folder / "rounds.jsonl").read_text().splitlines()]
        updates = [(x["round"], x["node"]) for x in lines if x["stage"] == "update"]
        assert len(set(updates)) == len(updates)
        return [{n for r, n in updates if r == round_} for round_ in range(1 + max(r for r, _ in updates))]

    def adapter(self, name: str) -> dict[str, Any]:
        return load_file(self.labs.folder / name / self.name / "clients" / name / "adapter/adapter_model.safetensors")

    def check_mean(self, round_: int, who: set[str]) -> None:
        """What lab-b received is the mean in float64 of what those who took part had, weighted by their examples."""
        samples = {n: self.summary()["nodes"][n]["samples"] for n in who}
        parts = {n: self._recorded(n, round_, "update") for n in who}
        received, factor = self._recorded("lab-b", round_, "received"), "ab"[(round_ + 1) % 2]
        names = [n for n in received if n.endswith(f".{factor}")]
        assert names
        for name in names:
            for component in range(RANKS["lab-b"]):
                have = [n for n in sorted(who) if RANKS[n] > component]
                if len(have) < 2:
                    continue  # not released: it stays its client's own
                at = (component, slice(None)) if factor == "a" else (slice(None), component)
                mean = sum(samples[n] * parts[n][name][at].astype(np.float64) for n in have)
                assert np.abs(received[name][at] - mean / sum(samples[n] for n in have)).max() < 1e-5

    def _recorded(self, name: str, round_: int, what: str) -> dict[str, Any]:
        return load_file(
            self.labs.folder / name / self.name / "clients" / name / f"round_{round_:04d}/{what}.safetensors"
        )


def equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


@pytest.fixture(scope="module")
def labs(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[Labs]:
    with ExitStack() as stack:
        yield Labs(stack, tmp_path_factory.mktemp("labs"), llama)


ALL = {"lab-a", "lab-b", "lab-c"}


def test_a_supernode_killed_in_mid_round_is_done_without_and_catches_up_when_it_is_back(labs: Labs) -> None:
    asked = labs.asked("lab-c")
    run = labs.run("killed", "federation.rounds=4", "training.steps=40")
    wait_until(lambda: labs.asked("lab-c") == asked + 2 and labs.workers("lab-c"), f"second round: {run.said()}")
    kill(labs.nodes["lab-c"])
    labs.start("lab-c")
    assert run.end() == 0, run.said()
    assert run.contributors() == [ALL, {"lab-a", "lab-b"}, ALL, ALL], run.said()
    assert "round 2: left out lab-c: its process failed" in run.said()
    for round_, who in enumerate(run.contributors()[:3]):
        run.check_mean(round_, who)
    assert equal(run.adapter("lab-b"), run.adapter("lab-c"))


def test_a_client_that_is_slow_or_raises_or_has_a_full_disk_sits_the_round_out_and_comes_back(labs: Labs) -> None:
    asked, before = labs.asked("lab-c"), len(labs.log("lab-c"))
    run = labs.run(
        "stumbles", "federation.rounds=4", "model.targets=[all-linear]", f"federation.round_timeout={labs.patience}"
    )
    wait_until(lambda: labs.asked("lab-c") > asked, f"first round: {run.said()}")
    stopped: set[psutil.Process] = set()

    def stop() -> bool:
        """Whatever works on the first round's message gets nowhere: it is slower than the time limit."""
        for worker in labs.workers("lab-c"):
            with suppress(psutil.NoSuchProcess):
                worker.suspend()
                stopped.add(worker)
        return (run.folder / "server/round_0000.msg").exists() or run.process.poll() is not None

    wait_until(stop, f"end of the first round: {run.said()}")
    key = labs.folder / "lab-c/lab.key"
    key.rename(key.with_suffix(".away"))  # raises
    for worker in stopped:
        with suppress(psutil.NoSuchProcess):
            worker.resume()
    run.aggregated(1)
    key.with_suffix(".away").rename(key)
    node = psutil.Process(labs.nodes["lab-c"].pid)
    enough = (ROOT / "README.md").stat().st_size + 8192  # for Flower to unpack the bundle, not for the client's state
    for process in (node, *node.children(recursive=True)):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (enough, resource.RLIM_INFINITY))
    run.aggregated(2)
    for process in (node, *node.children(recursive=True)):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert run.end() == 0, run.said()
    two = {"lab-a", "lab-b"}
    assert run.contributors() == [two, two, two, ALL], run.said()
    for line in (
        f"1 of 3 clients did not answer within {labs.patience} s",
        "round 2: left out lab-c: KeyFileError: see its own log",
        "round 3: left out lab-c: OSError: see its own log",
    ):
        assert line in run.said()
    own = [x for x in labs.log("lab-c")[before:].splitlines() if "ciphertune | lab-c:" in x]
    assert [x for x in own if re.search(r"cannot read or write its files.*File too large; once that is mended", x)]
    for round_, who in enumerate(run.contributors()):
        run.check_mean(round_, who)
    assert equal(run.adapter("lab-b"), run.adapter("lab-c"))


def test_fewer_clients_than_the_minimum_are_waited_for_and_then_the_run_ends_with_everything_kept(labs: Labs) -> None:
    wait = labs.patience
    run = labs.run("few", "federation.rounds=3", f"federation.wait_timeout={wait}", "training.steps=1")
    run.aggregated(0)
    for name in ("lab-b", "lab-c"):
        kill(labs.nodes[name])
    assert run.end() == 1
    assert "1 usable updates, fewer than federation.min_contributors=2" in run.said()
    assert f"waiting up to {wait} s: only 1 clients are connected" in run.said()
    assert f"after {wait} s 1 clients are connected (lab-a), fewer than federation.min_contributors=2" in run.said()
    assert f"1 rounds are kept: `ciphertune run resume={run.folder}` goes on from there" in run.said()
    assert run.summary()["status"] == "failed" and "min_contributors" in run.summary()["reason"]
    kept = (run.folder / "server/round_0000.msg").read_bytes()
    for name in ("lab-b", "lab-c"):
        labs.start(name)
    again = run.resumed()
    assert again.end() == 0, again.said()
    assert (run.folder / "server/round_0000.msg").read_bytes() == kept
    assert again.contributors() == [ALL, ALL, ALL] and again.summary()["status"] == "completed"
    assert equal(run.adapter("lab-b"), run.adapter("lab-c"))


def test_a_superlink_killed_and_restarted_loses_no_aggregate_and_a_resumed_run_ends_bit_by_bit_as_an_uninterrupted_one(
    labs: Labs,
) -> None:
    words = ("method=fedavg", "federation.rounds=3")
    whole = labs.run("whole", *words)
    assert whole.end() == 0, whole.said()
    run = labs.run("cut", *words, "training.steps=2")
    run.aggregated(0)
    asked = labs.asked("lab-b")
    wait_until(lambda: labs.asked("lab-b") > asked and labs.workers("lab-b"), f"second round: {run.said()}")
    kill(labs.link)
    labs.link = superlink(labs.stack, labs.environment, labs.folder / "superlink-2.log", labs.port)
    run.end()
    for name in RANKS:  # a SuperNode ends itself when the SuperLink does not know it any more; its service starts it
        with suppress(subprocess.TimeoutExpired):
            labs.nodes[name].wait(60)
        kill(labs.nodes[name])
        labs.start(name)
    again = run.resumed()
    assert again.end() == 0, again.said()
    assert again.contributors() == [ALL, ALL, ALL]
    for name in RANKS:
        assert equal(again.adapter(name), whole.adapter(name)), name


def test_a_run_survives_a_superlink_with_a_database_and_process_isolation_that_is_killed_and_restarted(
    tmp_path: Path, llama: Path
) -> None:
    """What Flower keeps: neither `resume` nor another start of the nodes is needed."""
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef" * 4)
    secret.chmod(0o600)
    known = ("--superexec-auth-secret-file", str(secret))
    words = ("--insecure", "--isolation", "process", *known, "--database", str(tmp_path / "state.db"))
    with ExitStack() as stack:
        labs = Labs(stack, tmp_path, llama, *words)
        runtime = ("--insecure", "--runtime-api-address", f"127.0.0.1:{labs.port}", *known)
        start(stack, labs.environment, tmp_path / "superexec.log", "flower-superexec", *runtime)
        run = labs.run("kept", "method=fedavg", "federation.rounds=3")
        run.aggregated(0)
        asked = labs.asked("lab-b")
        wait_until(lambda: labs.asked("lab-b") > asked and labs.workers("lab-b"), f"second round: {run.said()}")
        kill(labs.link)
        superlink(stack, labs.environment, tmp_path / "superlink-2.log", labs.port, *words)
        wait_until((run.folder / "summary.json").exists, f"end of the run: {run.said()}")
        assert run.summary()["status"] == "completed", f"{run.summary()['reason']}: {run.said()}"
        assert run.contributors()[0] == run.contributors()[-1] == ALL
