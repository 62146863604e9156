"""A hostile node among real Flower processes: the SuperLink takes what it sends, Flower in the server cannot. Slow."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT
from processes import BIN, connection, free_port, started, superlink, supernode
from tiny import SENTENCES, write_lines

__all__ = ["started"]  # a fixture

# Loaded by every process of the hostile node: in the first round the message is of a type that Flower does not know,
# in the second it says, inside, that it comes from another node.
HOSTILE = """
import flwr.app.metadata
from flwr.app import Message
flwr.app.metadata.validate_message_type = lambda kind: True
original = Message.deflate

def deflate(self):
    meta = self.metadata
    if not (meta.reply_to_message_id and meta.message_type == "train"):
        return original(self)
    if meta.group_id == "0":
        return original(self).replace(b"train", b"drain")
    node = meta.src_node_id
    meta.__dict__["_src_node_id"] = 12345
    try:
        return original(self)
    finally:
        meta.__dict__["_src_node_id"] = node

Message.deflate = deflate
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_hostile_node_is_left_out_and_excluded_and_the_server_process_goes_on(
    started: tuple[ExitStack, dict[str, str]], tmp_path: Path, llama: Path
) -> None:
    stack, environment = started
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile/sitecustomize.py").write_text(HOSTILE)
    port = free_port()
    superlink(stack, environment, tmp_path / "superlink.log", port)
    for name in ("lab-a", "lab-b", "lab-c"):
        data = write_lines(tmp_path / f"{name}.jsonl", [{"text": t} for t in SENTENCES])
        config = f'name="{name}" rank=4 data-path="{data}" run-dir="{tmp_path / name}" allow-clear=true'
        path = f"{tmp_path / 'hostile'}{os.pathsep}{environment.get('PYTHONPATH', '')}"
        more = {"PYTHONPATH": path} if name == "lab-c" else {}
        supernode(stack, environment | more, tmp_path / f"{name}.log", port, config)
    connection(environment, "lab", port)
    overrides = [
        "method=fedavg", "model=hf", f"model.name={llama}", "model.max_length=32", "data=jsonl",
        "data.heldout_fraction=0.3", "federation.rounds=3", "federation.min_clients=3", "federation.exclude_after=2",
        "federation.clients=[{rank:4},{rank:4},{rank:4}]", "federation.compare_local=false", "training.steps=2",
        "training.batch_size=2", "name=hostile",
    ]  # fmt: skip
    run = [str(BIN / "ciphertune"), "run", "--app", str(ROOT), "--superlink", "lab", *overrides]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=700, check=False)
    logs = "".join((tmp_path / f"{n}.log").read_text(errors="replace")[-3000:] for n in ("superlink", "lab-c"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "round 1: left out lab-c: its reply is not a message of Flower (ValueError)" in done.stdout
    assert "round 2: left out lab-c: its reply comes from node 12345" in done.stdout
    assert "excluded lab-c from the run: unusable messages in 2 rounds" in done.stdout
    for line in ("round 1/3: 2 of 3 clients", "round 2/3: 2 of 3 clients", "round 3/3: 2 of 2 clients"):
        assert line in done.stdout
    summary = json.loads((tmp_path / "server/runs/hostile/summary.json").read_text())
    assert summary["status"] == "completed" and list(summary["excluded"]) == ["lab-c"]
