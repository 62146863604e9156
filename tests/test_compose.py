"""docker-compose.yml, really run: `make compose-test`. Slow.

CIPHERTUNE_BASE and CIPHERTUNE_TORCH_INDEX say where the image comes from, where that is not a registry and PyTorch's
own index. COMPOSE_OVERRIDES="experiment=smoke" runs less than the default.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT

PROJECT = f"ciphertune-test-{os.getpid()}"
RANKS = {"a": 2, "b": 4, "c": 8}
_OVERRIDES = os.environ.get("COMPOSE_OVERRIDES", "").split()
LESS = ["ciphertune", "run", "--superlink", "lab", "federation.min_clients=3", *_OVERRIDES] if _OVERRIDES else []
SERVERS = ("superlink", "superexec")
PROGRAMS = (*SERVERS, *(f"supernode-{k}" for k in RANKS))
# Prints the files, of all that this user can read, that are key files or hold the given bytes.
SEARCH = """
import os, sys
wanted, found, seen = bytes.fromhex(sys.argv[1]), [], 0
for top, folders, files in os.walk('/'):
    folders[:] = [f for f in folders if os.path.join(top, f) not in ('/proc', '/sys', '/dev')]
    for name in files:
        path = os.path.join(top, name)
        try:
            if not os.path.isfile(path):
                continue
            with open(path, 'rb') as file:
                data = file.read(8 if path.startswith(('/usr', '/lib')) else -1)
        except OSError:
            continue
        seen += 1
        if data[:5] == b'CTKEY' or (wanted and wanted in data):
            found.append(path)
print(seen, *found)
"""


def _missing() -> str:
    """Why there is nothing to run it with, or nothing."""
    if os.environ.get("COMPOSE_TEST") != "1":
        return "it builds an image and runs eight rounds in containers: `make compose-test`"
    if not shutil.which("docker"):
        return "docker is not installed"
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"`{' '.join(command)}` fails, so no container can be started: {done.stderr.strip()[:200]}"
    return ""


def compose(*words: str, check: bool = True, timeout: float = 3600) -> subprocess.CompletedProcess[str]:
    command = ["docker", "compose", "--progress", "plain", "-p", PROJECT, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0 or not check, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def inside(service: str, *words: str, user: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run words in the container of a service, as its own user unless another is given."""
    return compose("exec", "-T", *(["-u", user] if user else []), service, *words, check=check)


def inspect(service: str) -> dict[str, Any]:
    number = compose("ps", "-a", "-q", service).stdout.split()[0]
    done = subprocess.run(["docker", "inspect", number], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)[0]
    return found


@pytest.fixture(scope="module")
def federation() -> Iterator[str]:
    """`docker compose up -d && docker compose run --rm cli`; what the run printed. Its exit status is 0."""
    if reason := _missing():
        pytest.skip(reason)
    try:
        compose("up", "-d")
        yield compose("run", "--rm", "-T", "cli", *LESS).stdout
    finally:
        compose("--profile", "cli", "down", "--volumes", "--remove-orphans", check=False)


@pytest.mark.slow
def test_the_run_completes_and_every_client_has_the_adapter_in_its_own_volume(federation: str) -> None:
    assert re.search(r"^round (\d+)/\1: 3 of 3 clients" if LESS else r"^round 8/8: 3 of 3 clients", federation, re.M)
    volumes = set()
    for letter in RANKS:
        script = f"cat /data/runs/*/clients/lab-{letter}/adapter/adapter_config.json"
        assert json.loads(inside(f"supernode-{letter}", "sh", "-c", script).stdout)["r"] == sorted(RANKS.values())[-2]
        script = (
            f"test -s /data/runs/*/clients/lab-{letter}/adapter/adapter_model.safetensors && ls /data/runs/*/clients"
        )
        assert inside(f"supernode-{letter}", "sh", "-c", script).stdout.split() == [f"lab-{letter}"]
        volumes.add(next(m["Name"] for m in inspect(f"supernode-{letter}")["Mounts"] if m["Destination"] == "/data"))
    assert len(volumes) == len(RANKS)
    summary = json.loads(inside("superexec", "sh", "-c", "cat /runs/runs/*/summary.json").stdout)
    assert summary["status"] == "completed" and summary["encrypted_fraction"] == 1.0


@pytest.mark.slow
def test_no_server_container_can_read_a_key_file_not_even_as_root(federation: str) -> None:
    script = "import sys; print(open('/keys/lab.key', 'rb').read()[32:96].hex())"
    material = inside("supernode-a", "python", "-c", script).stdout.strip()
    assert len(material) == 128
    for service in SERVERS:
        for user in ("", "0"):
            seen, *found = inside(service, "python", "-c", SEARCH, material, user=user).stdout.split()
            assert int(seen) > 1000 and found == []
        mounted = {m["Destination"]: m["Name"] for m in inspect(service)["Mounts"] if m["Type"] == "volume"}
        assert not {f"{PROJECT}_keys", f"{PROJECT}_authority"} & set(mounted.values())
    assert inside("supernode-b", "python", "-c", SEARCH, material).stdout.split()[1:] == ["/keys/lab.key"]  # it can see


@pytest.mark.slow
def test_containers_run_as_a_user_without_rights_on_a_file_system_that_they_cannot_write(federation: str) -> None:
    for service in PROGRAMS:
        about = inspect(service)
        assert about["HostConfig"]["ReadonlyRootfs"] and about["HostConfig"]["CapDrop"] == ["ALL"]
        assert not about["HostConfig"]["PortBindings"] and about["State"]["Health"]["Status"] == "healthy"
        assert inside(service, "id", "-u").stdout.strip() == "10001"
        assert inside(service, "touch", "/app/x", check=False).returncode != 0
    assert inside("supernode-a", "touch", "/keys/x", check=False).returncode != 0


@pytest.mark.slow
def test_the_superlink_speaks_tls_only_and_only_the_authority_of_the_volume_vouches_for_it(federation: str) -> None:
    ask = (
        "import ssl, urllib.request as u; print(u.urlopen('{}://superlink:8000/health', timeout=9, context={}).status)"
    )
    own = "ssl.create_default_context(cafile='/certificates/public/ca.crt')"
    assert inside("supernode-a", "python", "-c", ask.format("https", own)).stdout.strip() == "200"
    done = inside("supernode-a", "python", "-c", ask.format("https", "ssl.create_default_context()"), check=False)
    assert done.returncode != 0 and "CERTIFICATE_VERIFY_FAILED" in done.stderr
    assert inside("supernode-a", "python", "-c", ask.format("http", None), check=False).returncode != 0


@pytest.mark.slow
def test_the_image_holds_no_secret(federation: str) -> None:
    start = ["docker", "run", "--rm", "--user", "0", "ciphertune"]
    seen, *found = _run(*start, "python", "-c", SEARCH, "").split()
    assert int(seen) > 1000 and found == []
    assert _run(*start, "find", "/certificates", "/keys", "/data", "/runs", "/state", "-type", "f") == ""


def _run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout
