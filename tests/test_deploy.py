"""What lies in deploy/ and docker-compose.yml, without starting any of it."""

from __future__ import annotations

import re
import shlex
import shutil
import ssl
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CONF, ROOT
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store

from ciphertune.flower import node_config
from ciphertune.node import node_settings
from ciphertune.settings import compose

UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))
EXAMPLES = sorted((ROOT / "deploy/nodes").glob("*.env"))
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
NODES = ("supernode-a", "supernode-b", "supernode-c")


def certificates(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "deploy/certificates.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


# --- certificates -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("certificates") / "etc"
    done = certificates(found, "superlink.example", "10.1.2.3")
    assert done.returncode == 0, done.stderr
    return found


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_certificate_is_good_for_the_names_given_and_this_machine_and_no_other(folder: Path) -> None:
    import ipaddress

    authority, server = load(folder / "public/ca.crt"), load(folder / "server/server.crt")
    policy = PolicyBuilder().store(Store([authority])).max_chain_depth(0)
    for name in ("superlink.example", "localhost"):
        policy.build_server_verifier(x509.DNSName(name)).verify(server, [])
    for address in ("10.1.2.3", "127.0.0.1"):
        policy.build_server_verifier(x509.IPAddress(ipaddress.ip_address(address))).verify(server, [])
    with pytest.raises(x509.verification.VerificationError):
        policy.build_server_verifier(x509.DNSName("elsewhere.example")).verify(server, [])
    assert (server.not_valid_after_utc - server.not_valid_before_utc).days == 90
    assert (authority.not_valid_after_utc - authority.not_valid_before_utc).days == 730
    key = authority.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey) and key.curve.key_size == 384


def test_what_is_private_can_be_read_by_its_owner_alone(folder: Path) -> None:
    modes = {p.relative_to(folder).as_posix(): stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()}
    assert modes == {
        "authority/ca.key": 0o600,
        "public/ca.crt": 0o644,
        "server/server.crt": 0o644,
        "server/server.key": 0o600,
        "superexec/secret": 0o600,
    }
    assert len((folder / "superexec/secret").read_bytes()) == 64


def test_nothing_is_overwritten_and_renewal_keeps_the_authority_and_the_secret(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "etc"
    shutil.copytree(folder, copy)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    done = certificates(copy, "superlink.example")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "remove" in done.stderr
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
    shutil.rmtree(copy / "server")
    assert certificates(copy, "superlink.example").returncode == 0
    changed = {p.parent.name for p, data in before.items() if p.read_bytes() != data}
    assert changed == {"server"}
    ssl.create_default_context(cafile=copy / "public/ca.crt")
    (copy / "authority/ca.key").unlink()
    shutil.rmtree(copy / "server")
    done = certificates(copy, "superlink.example")
    assert done.returncode == 2 and "cannot sign without it" in done.stderr and not (copy / "server").exists()


@pytest.mark.parametrize("name", ["https://superlink.example", "superlink.example:8443", "-x.example", "a b", "a_b"])
def test_what_is_no_name_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    done = certificates(tmp_path / "etc", "--", name)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "etc").exists()


# --- node settings, units ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_read_the_same_by_systemd_and_a_shell_and_is_a_node_of_its_own(path: Path) -> None:
    lines = dict(line.split("=", 1) for line in path.read_text().splitlines() if not line.startswith("#"))
    script = f'. {shlex.quote(str(path))}; printf "%s\\n%s" "$SUPERLINK" "$NODE_CONFIG"'
    shell = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split("\n")
    assert shell == [lines["SUPERLINK"], lines["NODE_CONFIG"][1:-1]] and "'" not in lines["NODE_CONFIG"][1:-1]
    node = node_settings(compose(CONF, "data=jsonl"), node_config(shell[1]), 1, node_id=1)
    assert node.name == path.stem and not node.simulated and node.own_key


def test_the_examples_differ_in_rank() -> None:
    assert len({re.search(r"rank=(\d+)", path.read_text())[1] for path in EXAMPLES}) == len(EXAMPLES) == 3  # type: ignore[index]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.stem)
def test_a_unit_is_valid_and_hardened(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    here = Path(sys.executable).parent
    text = text.replace("/opt/ciphertune/.venv/bin/", f"{here}/").replace("/usr/bin/caddy", "/bin/true")
    unit = tmp_path / path.name
    unit.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert done.returncode == 0 and path.name not in done.stderr, done.stderr
    limit = ["systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager", str(unit)]
    done = subprocess.run(limit, capture_output=True, text=True)
    if "unrecognized option" in done.stderr:  # before version 250
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout
    wanted = ["User=ciphertune", "NoNewPrivileges=yes", "CapabilityBoundingSet=", "ProtectSystem=strict"]
    assert {*wanted, "ProtectHome=yes", "ReadOnlyPaths=/etc/ciphertune", "UMask=0077"} <= set(text.splitlines())


def test_the_units_run_the_commands_of_the_guide() -> None:
    guide = " ".join((ROOT / "docs/deployment.md").read_text().replace("\\\n", " ").replace('"', "").split())
    for path in UNITS:
        command = re.search(r"^ExecStart=/\S*/(.+?)(?<!\\)$", path.read_text(), re.MULTILINE | re.DOTALL)
        assert command
        words = (
            command[1].replace("\\\n", " ").replace("/opt/ciphertune/", "").replace("{", "").replace("}", "").split()
        )
        assert " ".join(w for w in words if w not in ("--adapter", "caddyfile")) in guide, path.name


def test_the_commands_of_the_readme_are_those_of_the_guide_which_are_run() -> None:
    """tests/test_deployment_guide.py runs every block of the guide."""
    (block,) = re.findall(r"<!-- guide -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    guide = "\n".join(re.findall(r"-->\n *```bash\n(.*?)```", (ROOT / "docs/deployment.md").read_text(), re.DOTALL))
    run = {" ".join(line.split()) for line in guide.replace("\\\n", " ").splitlines()}
    lines = [" ".join(x.split()) for x in block.replace("\\\n", " ").splitlines() if x and not x.startswith("#")]
    assert len(lines) == 6 and set(lines) <= run


# --- docker-compose.yml -----------------------------------------------------------------------------------------------


def mounts(service: str) -> dict[str, str]:
    return {v.split(":")[0]: v for v in COMPOSE["services"][service].get("volumes", ())}


def test_only_the_nodes_and_the_service_that_makes_it_mount_the_key() -> None:
    having = {name for name in COMPOSE["services"] if "keys" in mounts(name)}
    assert having == {"keys", *NODES}
    assert all(mounts(name)["keys"].endswith(":ro") for name in NODES)
    assert {name for name in COMPOSE["services"] if "authority" in mounts(name)} == {"certificates"}
    assert {name for name in COMPOSE["services"] if "server" in mounts(name)} == {"certificates", "superlink"}


def test_every_service_is_locked_down_and_nothing_is_open_to_the_network() -> None:
    for service in COMPOSE["services"].values():
        assert service["user"] == "10001:10001" and service["read_only"] is True and service["cap_drop"] == ["ALL"]
        assert "ports" not in service and "privileged" not in service
    assert all(network["internal"] for network in COMPOSE["networks"].values())


def test_the_nodes_have_ranks_budgets_and_data_of_their_own() -> None:
    found: list[dict[str, Any]] = [node_config(COMPOSE["services"][n]["environment"]["NODE_CONFIG"]) for n in NODES]
    for key in ("name", "rank", "budget", "partition-id"):
        assert len({node[key] for node in found}) == len(NODES)
    volumes = [set(mounts(name)) - {"public", "keys"} for name in NODES]
    assert [len(v) for v in volumes] == [1, 1, 1] and len(set.union(*volumes)) == 3


def test_what_goes_into_the_image_is_named_one_by_one() -> None:
    lines = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert lines[0] == "*" and not {"!.", "!*", "!tests", "!runs"} & set(lines)
    for pattern in ("**/*.key", "**/*.key.*.old", "**/*.id", "**/*.offer"):
        assert lines.index(pattern) > max(i for i, line in enumerate(lines) if line.startswith("!"))
