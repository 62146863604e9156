"""The commands of docs/deployment.md, as they stand there, with three labs on 127.0.0.1. Slow."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from conftest import ROOT
from processes import free_port
from tiny import SENTENCES, write_lines

TEXT = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
# (who runs it and when, the commands)
BLOCKS = [
    (who, textwrap.dedent(block)) for who, block in re.findall(r"<!-- (.+?) -->\n *```bash\n(.*?)```", TEXT, re.DOTALL)
]
LABS = ("lab-a", "lab-b", "lab-c")
RANKS = {"lab-a": 4, "lab-b": 8, "lab-c": 16}
CADDY = shutil.which("caddy")


class Guide:
    """The parties' folders and ports, and their commands with these in the place of those of the page."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack, self.used = folder, stack, set[str]()
        self.port = free_port()
        self.runtime = {party: free_port() for party in ("server", *LABS)}  # of the nodes
        self.proxy = free_port() if CADDY else self.port
        for party in ("server", *LABS):
            for name in ("etc", "var", "srv", "home"):
                (folder / party / name).mkdir(parents=True)

    def fits(self, text: str, party: str) -> str:
        """Text of the page or of an example for this test's folders and ports."""
        where = self.folder / party
        for old, new in (
            ("/etc/ciphertune", f"{where}/etc"),
            ("/var/lib/ciphertune", f"{where}/var"),
            ("/srv/ciphertune", f"{where}/srv"),
            ("superlink.example:8443", f"127.0.0.1:{self.proxy}"),
            ("superlink.example", "127.0.0.1"),
            ("127.0.0.1:8000", f"127.0.0.1:{self.port}"),
            ("127.0.0.1:9094", f"127.0.0.1:{self.runtime[party]}"),
            (":8443", f":{self.proxy}"),
            ("flower-superlink ", f"flower-superlink --port {self.port} "),
            ("flower-supernode ", f"flower-supernode --port {self.runtime[party]} "),
            ("deploy/Caddyfile", f"{where}/etc/Caddyfile"),
        ):
            text = text.replace(old, new)
        return text

    def block(self, who: str, word: str) -> str:
        """The one block of `who` that holds `word`."""
        (found,) = [text for at, text in BLOCKS if at.split(",")[0] == who and word in text]
        self.used.add(found)
        return found

    def run(self, who: str, word: str, party: str = "", status: int = 0, **changes: str) -> str:
        """Run a block of the page to its end; what it printed."""
        text = self.block(who, word)
        for old, new in changes.items():
            text = text.replace(old.replace("_", "-"), new)
        script = f"set -eu\n{self.fits(text, party or 'server')}"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=ROOT,
            env=self.environment(party or "server"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == status, script + done.stdout + done.stderr + self.logs()
        return done.stdout + done.stderr

    def start(self, who: str, word: str, party: str = "") -> Path:
        """Start a block of the page whose last command stays; its log."""
        party = party or "server"
        text = re.sub(r"^(\w+=\S+ )?((flower-\w+|caddy) )", r"\1exec \2", self.block(who, word), flags=re.MULTILINE)
        log = self.folder / f"{party}-{word.split()[0]}.log"
        file = self._stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            ["bash", "-c", f"set -eu\n{self.fits(text, party)}"],
            cwd=ROOT,
            env=self.environment(party),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        self._stack.callback(end, process)
        return log

    def environment(self, party: str) -> dict[str, str]:
        """A user's environment, with the virtual environment activated."""
        return os.environ | {
            "HOME": str(self.folder / party / "home"),
            "FLWR_HOME": str(self.folder / party / "home/.flwr"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def logs(self) -> str:
        """The ends of all logs, for a failure."""
        return "".join(f"\n--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in self.folder.glob("*.log"))


def end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started: a SuperNode that was refused leaves its SuperExec behind."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)


def wait_for(what: Callable[[], bool], guide: Guide, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, guide.logs()
        time.sleep(0.5)


@pytest.fixture
def guide(tmp_path: Path) -> Iterator[Guide]:
    with ExitStack() as stack:
        yield Guide(tmp_path, stack)


def start_server(guide: Guide) -> None:
    etc = guide.folder / "server/etc"
    guide.run("server", "certificates.py")
    guide.start("server stays", "flower-superlink")
    guide.start("server stays", "flower-superexec")
    (etc / "Caddyfile").write_text(guide.fits((ROOT / "deploy/Caddyfile").read_text(), "server"))
    if CADDY:
        guide.start("server stays", "caddy")
    trusted = ssl.create_default_context(cafile=etc / "public/ca.crt")

    def up() -> bool:
        try:
            urllib.request.urlopen(f"https://127.0.0.1:{guide.proxy}/health", timeout=2, context=trusted).close()
        except OSError:
            return False
        return True

    wait_for(up, guide)
    guide.run("server", "curl")
    guide.run("operator", "config.toml")


def status(path: str, port: int, cafile: Path, method: str = "POST") -> int:
    """Of a request with exactly this path."""
    connection = http.client.HTTPSConnection(
        "127.0.0.1", port, timeout=20, context=ssl.create_default_context(cafile=cafile)
    )
    connection.request(method, path, b"")
    found = connection.getresponse().status
    connection.close()
    return found


@pytest.mark.slow
def test_three_labs_run_the_guide_with_tls_and_node_authentication(guide: Guide) -> None:
    start_server(guide)
    server = guide.folder / "server"
    with pytest.raises((urllib.error.URLError, OSError)):  # in the clear
        urllib.request.urlopen(f"http://127.0.0.1:{guide.port}/health", timeout=5)
    guide.run("lab-a", "keys create", "lab-a")
    for number, lab in enumerate(LABS):
        where = guide.folder / lab
        if lab != "lab-a":
            shutil.copy(guide.folder / "lab-a/etc/lab.key", where / "etc/lab.key")  # docs/keys.md
        shutil.copy(server / "etc/public/ca.crt", where / "etc/ca.crt")
        rows = [{"text": f"{text} {i}"} for text in SENTENCES for i in range(3 + number)]
        write_lines(where / "srv/data.jsonl", rows)
        guide.run("lab", "ssh-keygen", lab, lab_a=lab)
        guide.run("lab", "cp deploy", lab, lab_a=lab)
        settings = where / "etc/node.env"
        settings.write_text(guide.fits(settings.read_text(), lab))
        shutil.copy(where / "etc/node.pub", server / f"etc/{lab}.pub")
    checked = {lab: guide.run("lab", "ciphertune check", lab) for lab in LABS}
    assert all("TLS verified" in text and "to do" not in text for text in checked.values())

    stranger = guide.start("lab stays", "flower-supernode", "lab-c")  # not registered yet
    wait_for(lambda: "Failed to activate SuperNode" in stranger.read_text(errors="replace"), guide)
    for lab in LABS:
        guide.run("operator", "supernode register", lab_a=lab)
    for lab in LABS:
        guide.start("lab stays", "flower-supernode", lab)

    def online() -> bool:
        return guide.run("operator", "supernode list").lower().count("online") == len(LABS)

    wait_for(online, guide)
    for lab in LABS:
        guide.run("lab", "curl", lab)
    shown = guide.run("operator", "ciphertune run")
    assert "round 2/2: 3 of 3 clients" in shown, shown + guide.logs()
    (folder,) = (server / "var/runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["encrypted_fraction"] == 1.0
    assert {name: node["rank"] for name, node in summary["nodes"].items()} == RANKS
    for lab in LABS:
        adapter = guide.folder / lab / f"var/runs/{folder.name}/clients/{lab}/adapter/adapter_model.safetensors"
        assert adapter.is_file()
    material = (guide.folder / "lab-a/etc/lab.key").read_bytes()[32:96]
    assert not [p for p in server.rglob("*") if p.is_file() and material in p.read_bytes()]

    guide.run("operator", "flwr run . lab")
    listed = listing(guide, "list", "lab")["runs"]
    assert "finished:completed" in [run["status"] for run in listed]
    (number,) = [run["run-id"] for run in listed if run["status"] != "finished:completed"]
    wait_for(lambda: "run folder" in log(guide, number), guide)  # so that there is something to see
    assert "run folder" in guide.run("operator", "flwr stop", RUN=str(number))
    assert {run["run-id"]: run["status"] for run in listing(guide, "list", "lab")["runs"]}[number] == "finished:stopped"
    nodes = listing(guide, "supernode", "list", "lab")["nodes"]
    guide.run("operator", "unregister", ID=str(nodes[0]["node-id"]))
    left = listing(guide, "supernode", "list", "lab")["nodes"]
    assert {node["node-id"] for node in left if node["status"] == "online"} == {node["node-id"] for node in nodes[1:]}
    assert guide.used == {text for _, text in BLOCKS if CADDY or "caddy run" not in text}


def log(guide: Guide, run: str) -> str:
    """What the server's part of a run has said."""
    command = ["flwr", "log", run, "lab", "--show"]
    environment = guide.environment("server")
    done = subprocess.run(command, cwd=guide.folder, env=environment, capture_output=True, text=True, check=False)
    return done.stdout


def listing(guide: Guide, *words: str) -> dict[str, list[dict[str, str]]]:
    """What one of Flower's commands prints as JSON."""
    done = subprocess.run(
        ["flwr", *words, "--format", "json"],
        cwd=guide.folder,
        env=guide.environment("server"),
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, list[dict[str, str]]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not CADDY, reason="caddy is not installed: the proxy of deploy/Caddyfile cannot be tried")
def test_the_proxy_lets_nodes_through_and_nobody_submit_a_run(guide: Guide) -> None:
    start_server(guide)
    trusted = guide.folder / "server/etc/public/ca.crt"
    assert status("/health", guide.proxy, trusted, "GET") == 200
    assert status("/v1/fleet/pull-messages", guide.proxy, trusted) not in (403, 404, 502)
    for path in (
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "//v1/control/start-run",
        "/V1/CONTROL/start-run",
        "/docs",
        "/openapi.json",
        "/",
    ):
        assert status(path, guide.proxy, trusted) == 403, path
    assert status("/v1/control/start-run", guide.port, trusted) not in (403, 404)  # there is something to protect
