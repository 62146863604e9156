"""Real processes on 127.0.0.1: a SuperLink, SuperNodes, runs. Each is ended by its own process id."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment_in(folder: Path) -> dict[str, str]:
    """The environment of processes whose files all lie in `folder`."""
    return os.environ | {
        "FLWR_HOME": str(folder / "flwr"),
        "CIPHERTUNE_HOME": str(folder / "server"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[ExitStack, dict[str, str]]]:
    """Processes entered here are ended by their own id."""
    with ExitStack() as stack:
        yield stack, environment_in(tmp_path)


def start(stack: ExitStack, environment: dict[str, str], log: Path, *words: str) -> subprocess.Popen[bytes]:
    """A process whose words go to `log`, through this one: what limits its files does not limit what it says."""
    process = subprocess.Popen(words, env=environment, cwd=log.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    log.touch()

    def keep(stream: IO[bytes]) -> None:
        with log.open("ab", buffering=0) as file:
            while data := os.read(stream.fileno(), 1 << 16):
                file.write(data)

    threading.Thread(target=keep, args=(process.stdout,), daemon=True).start()

    def end() -> None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            kill(process)

    stack.callback(end)
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    """What a power cut does to a machine: the process and all that descend from it are gone at once."""
    family = []
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(20)


def supernode(
    stack: ExitStack, environment: dict[str, str], log: Path, port: int, config: str
) -> subprocess.Popen[bytes]:
    """A SuperNode of the SuperLink on `port`."""
    words = ("--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port()), "--node-config", config)
    return start(stack, environment, log, "flower-supernode", *words)


def wait_until(true: Callable[[], Any], what: str, seconds: float = 900.0) -> None:
    """Look again and again; fails when it never becomes true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: no {what}"
        time.sleep(0.05)


def superlink(
    stack: ExitStack, environment: dict[str, str], log: Path, port: int, *words: str
) -> subprocess.Popen[bytes]:
    """A SuperLink that answers; `words` replace `--insecure`."""
    address = ["--host", "127.0.0.1", "--port", str(port)]
    link = start(stack, environment, log, "flower-superlink", *(words or ("--insecure",)), *address)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and link.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            break
        except OSError:
            time.sleep(0.3)
    return link


def connection(environment: dict[str, str], name: str, port: int) -> None:
    """Name an insecure SuperLink on this port in Flower's configuration."""
    home = Path(environment["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{name}"\n[superlink.{name}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
