"""The two doors, `ciphertune run` and `flwr run .`: real Flower processes on 127.0.0.1 (slow), and mistakes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from ciphertune import cli_report
from ciphertune.cli import main

METHODS = ", ".join(sorted(p.stem for p in (ROOT / "conf/method").glob("*.yaml")))
SMALL = ["experiment=smoke", "training.steps=1", "data.max_heldout=8", "training.threads=1"]


def ciphertune(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ciphertune.cli", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["method=seald"], f"unknown method=seald; did you mean sealed? Valid: {METHODS}\n"),
        (["federation.round=2"], "unknown setting federation.round; did you mean federation.rounds?"),
        (["model.rank=0"], "model.rank=0 is out of range"),
        (["federation.min_clients=5"], "federation.min_clients=5, but 4 clients are simulated"),
        (["data=jsonl"], "data=jsonl needs data.path=FILE"),
        (["model=hf"], "model.name is empty"),
        (["model=hf", "model.name=/no/such/folder"], "'/no/such/folder' is not a folder on this machine"),
        (["~model"], "bad override '~model'"),
    ],
)
def test_a_mistake_ends_with_one_line_and_status_2_before_anything_is_started(
    words: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--app", str(ROOT), "--runs-dir", str(tmp_path), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("ciphertune: ") and part in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "more"])
def test_a_place_where_no_run_can_be_kept_is_named_before_anything_is_started(
    below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ciphertune.launch._own_superlink", None)
    (tmp_path / "file").write_text("kept")
    place = tmp_path / "file" / below
    assert main(["run", "--app", str(ROOT), "--runs-dir", str(place), "model=embedded"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"no run can be kept in {place} (" in err and "--runs-dir" in err
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_is_no_app_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--app", str(tmp_path)]) == 2
    assert "is not the folder of a Flower app" in capsys.readouterr().err
    (tmp_path / "pyproject.toml").write_bytes(b"[tool.flwr]\nname = '\xff'\n")
    assert main(["run", "--app", str(tmp_path)]) == 2
    assert "is not the folder of a Flower app" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/run/x"), "ciphertune: /run/x: Permission denied\n"),
        (OSError(28, "No space left on device"), "ciphertune: No space left on device\n"),
        (OSError("odd"), "ciphertune: odd\n"),
    ],
)
def test_a_file_that_nobody_thought_of_is_one_line(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(cli_report, "_report", fail)
    assert main(["report", "runs/x"]) == 2
    assert capsys.readouterr().err == said


def test_a_run_folder_is_never_written_into_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "settings.yaml").write_text("kept")
    assert main(["run", "--app", str(ROOT), "--runs-dir", str(tmp_path), "name=mine"]) == 2
    assert "holds another run already" in capsys.readouterr().err
    assert (tmp_path / "mine" / "settings.yaml").read_text() == "kept"


@pytest.mark.slow
def test_ciphertune_run_prints_the_table_and_exits_0(tmp_path: Path) -> None:
    done = ciphertune("run", "--runs-dir", str(tmp_path), "name=ok", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 2/2: 4 of 4 clients" in done.stdout and "100% encrypted" in done.stdout
    for column in ("base", "alone", "federated", "up / round"):
        assert column in done.stdout
    assert "INFO" not in done.stdout
    assert json.loads((tmp_path / "ok/summary.json").read_text())["status"] == "completed"
    for k in range(4):
        assert (tmp_path / f"ok/clients/client-{k}/adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "sealed"])
def test_a_run_is_audited_as_a_user_does_it(method: str, tmp_path: Path) -> None:
    two = ["federation.clients=[{rank:4},{rank:8}]", "federation.min_clients=2", "federation.compare_local=false"]
    words = [f"method={method}", "record_server_view=true", *two, *SMALL]
    done = ciphertune("run", "--runs-dir", str(tmp_path), "name=it", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    viewed = ciphertune("view", str(tmp_path / "it"), "--out", str(tmp_path / "view"))
    audited = ciphertune("audit", str(tmp_path / "it"))
    assert viewed.returncode == audited.returncode == 0, viewed.stderr + audited.stderr
    said, found = " ".join(audited.stdout.split()), json.loads((tmp_path / "it/audit.json").read_text())
    assert f"4 messages, {found['clear_tensors']} clear tensors" in viewed.stdout
    read = [(r["round"], r["recall"]) for r in found["attacks"] if r["recall"] > 0]
    if method == "sealed":
        assert "passed: nothing to attack: 0 clear tensors" in said and found["clear_tensors"] == 0
        assert read == []
    else:
        assert "of the tokens of client-" in said and "nothing to attack" not in said
        assert found["clear_tensors"] >= 4 * 2 and {1, None} <= {round_ for round_, _ in read}
    assert found["membership"]["members"] > 0 and any("training examples: client-0" in x for x in found["metadata"])


@pytest.mark.slow
def test_ciphertune_run_exits_1_and_says_why_when_the_run_fails(tmp_path: Path) -> None:
    done = ciphertune("run", "--runs-dir", str(tmp_path), "name=bad", "model.targets=[q_prj]", *SMALL)
    assert done.returncode == 1
    assert (
        "client-0, client-1, client-2, client-3: ModelError: model.targets: 'q_prj' is no linear layer" in done.stdout
    )
    assert "ended as finished:failed" in done.stderr and "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_ending_ciphertune_run_ends_every_process_it_started(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ciphertune.cli", "run", "--runs-dir", str(tmp_path), "name=cut", *SMALL]
    environment = os.environ | {"CIPHERTUNE_TEST_MARK": str(tmp_path)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "client-0" in line:
            break
    assert len(_marked(str(tmp_path))) > 3
    process.terminate()
    assert process.wait(60) == 130
    deadline = time.monotonic() + 15
    while (left := _marked(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


def _marked(mark: str) -> list[str]:
    """Processes that inherited the mark of a test in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"CIPHERTUNE_TEST_MARK={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " ")[:100])
        except OSError:
            continue
    return found


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Flower's own local SuperLink, on ports and in a folder of this test, ended by its process id."""
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        ports = [str(probe.getsockname()[1]) for probe in (one, two)]
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path / "flwr"),
        "CIPHERTUNE_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": ports[0],
        "FLWR_LOCAL_CONTROL_API_PORT": ports[1],
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    yield environment
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(w.endswith(b"flower-superlink") for w in words) and ports[0].encode() in words:
            os.kill(int(process.name), signal.SIGTERM)


@pytest.mark.slow
def test_flwr_run_alone_works_with_flowers_defaults_and_installs_nothing(
    flower_home: dict[str, str], tmp_path: Path
) -> None:
    """Two simulated nodes, dependency installation on: what a newcomer's machine does."""
    overrides = f'overrides="{" ".join(SMALL)} federation.compare_local=false"'
    command = ["flwr", "run", ".", "--stream", "--run-config", overrides]
    done = subprocess.run(command, cwd=ROOT, env=flower_home, capture_output=True, text=True, timeout=400, check=False)
    assert "No additional application dependencies needed installation" in done.stdout, done.stdout + done.stderr
    assert "2 simulated SuperNodes" in done.stdout and "round 2/2: 4 of 4 clients" in done.stdout
    listed = ["flwr", "list", "--format", "json"]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        shown = subprocess.run(listed, cwd=ROOT, env=flower_home, capture_output=True, text=True, check=True).stdout
        status = json.loads(shown)["runs"][0]["status"]
        if status.startswith("finished"):
            break
    assert status == "finished:completed"
    assert len(list((tmp_path / "home/runs").glob("sealed-*/clients/*/adapter"))) == 4
