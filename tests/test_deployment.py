"""A real deployment on 127.0.0.1: a SuperLink, two SuperNodes with settings of their own, one run. Slow."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT
from pages import check_harmless
from processes import BIN, connection, free_port, started, superlink, supernode
from tiny import SENTENCES, write_lines

__all__ = ["started"]  # a fixture


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sealed", pytest.param("she_lora", marks=pytest.mark.long)])
def test_two_labs_with_keys_and_data_of_their_own_tune_a_model_over_a_superlink(
    started: tuple[ExitStack, dict[str, str]], tmp_path: Path, llama: Path, method: str
) -> None:
    stack, environment = started
    key = tmp_path / "lab.key"
    made = [str(BIN / "ciphertune"), "keys", "create", "--out", str(key), "--app", str(ROOT), f"method={method}"]
    subprocess.run(made, env=environment, check=True, capture_output=True)
    port = free_port()
    superlink(stack, environment, tmp_path / "superlink.log", port)
    for name, rank in (("lab-a", 4), ("lab-b", 8)):
        data = write_lines(tmp_path / f"{name}.jsonl", [{"text": t} for t in SENTENCES])
        config = f'name="{name}" rank={rank} data-path="{data}" key-file="{key}" run-dir="{tmp_path / name}"'
        if method == "she_lora":  # it sends some of A in the clear, which a node must be told to do
            config += " allow-clear=true " + ("budget=0.1" if rank == 4 else "seconds-per-round=20 upstream=1000000")
        supernode(stack, environment, tmp_path / f"{name}.log", port, config)
    connection(environment, "lab", port)
    overrides = [
        f"method={method}", "model=hf", f"model.name={llama}", "model.max_length=32", "data=jsonl",
        "data.heldout_fraction=0.3",
        "federation.rounds=2", "federation.min_clients=2", "federation.clients=[{rank:4},{rank:8}]",
        "federation.compare_local=false", "training.steps=2", "training.batch_size=2", "name=two-labs",
    ]  # fmt: skip
    run = [str(BIN / "ciphertune"), "run", "--app", str(ROOT), "--superlink", "lab", *overrides]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=500, check=False)
    logs = "".join((tmp_path / f"{n}.log").read_text(errors="replace")[-3000:] for n in ("superlink", "lab-a", "lab-b"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "round 2/2: 2 of 2 clients" in done.stdout
    summary = json.loads((tmp_path / "server/runs/two-labs/summary.json").read_text())
    assert summary["status"] == "completed" and (summary["encrypted_fraction"] == 1.0) == (method == "sealed")
    assert summary["encrypted_fraction"] > 0.1
    assert {n: v["rank"] for n, v in summary["nodes"].items()} == {"lab-a": 4, "lab-b": 8}
    page = check_harmless((tmp_path / "server/runs/two-labs/report.html").read_text())
    assert "The server has no adapter and cannot make one." in page.text and "lab-b" in page.texts
    for name in ("lab-a", "lab-b"):
        assert (tmp_path / name / f"two-labs/clients/{name}/adapter/adapter_model.safetensors").is_file()
    server = [p for p in (tmp_path / "server").rglob("*") if p.is_file()]
    assert server and not [p for p in server if p.suffix == ".key" or "safetensors" in p.name]
    material = key.read_bytes()[32:96]
    assert not [p for p in server if material in p.read_bytes()]


@pytest.mark.slow
def test_a_supernode_that_is_started_with_a_partition_alone_sends_nothing_in_the_clear(
    started: tuple[ExitStack, dict[str, str]], tmp_path: Path, llama: Path
) -> None:
    """So Flower's own guides start one, and so a simulated node looks; it is none."""
    stack, environment = started
    data = write_lines(tmp_path / "patients.jsonl", [{"text": t} for t in SENTENCES])
    port, log = free_port(), tmp_path / "lab.log"
    superlink(stack, environment, tmp_path / "superlink.log", port)
    supernode(stack, environment, log, port, "partition-id=0 num-partitions=3")
    connection(environment, "lab", port)
    overrides = [
        "method=fedavg", "model=hf", f"model.name={llama}", "data=jsonl", f"data.path={data}", "name=clear",
        "federation.min_clients=2", "federation.wait_timeout=60", "federation.compare_local=false",
        "record_server_view=true",
    ]  # fmt: skip
    run = [str(BIN / "ciphertune"), "run", "--app", str(ROOT), "--superlink", "lab", *overrides]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=500, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said + log.read_text(errors="replace")[-3000:]
    assert "0 of at least 2 clients" in said and "SettingsError: see its own log" in said
    assert "would send this node's update in the clear: it refuses unless" in log.read_text(errors="replace")
    assert not list((tmp_path / "server").rglob("*.msg"))
