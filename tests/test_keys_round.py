"""Keys in a run: where simulation keeps its own, and what happens when a lab rotates its key in the middle."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CONF
from federations import Lab, rounds, said, summary
from flwr.app import Message

from ciphertune.build_client import generate_key
from ciphertune.crypto import keys
from ciphertune.crypto.secret import SecretKey
from ciphertune.settings import compose

CRYPTO = compose(CONF).crypto


@pytest.fixture
def labs(tmp_path: Path) -> dict[int, dict[str, Any]]:
    """Four real nodes, each with its own copy of one key file."""
    key = generate_key(CRYPTO)
    for k in range(4):
        keys.save(key, tmp_path / f"keys-{k}" / "lab.key")
    return {
        k: {
            "name": f"lab-{k}",
            "data-path": str(tmp_path / f"lab-{k}.jsonl"),
            "rank": 2,
            "key-file": str(tmp_path / f"keys-{k}" / "lab.key"),
        }
        for k in range(4)
    }


def rotate(node: dict[str, Any]) -> tuple[SecretKey, SecretKey]:
    """As `ciphertune keys rotate` does it: the old key and the new one."""
    new = generate_key(CRYPTO)
    old, _ = keys.rotate(Path(node["key-file"]), new)
    return old, new


def before_round(number: int, do: Callable[[], None]) -> tuple[str, Callable[[Message], None]]:
    """Do something once, when the first message of a round goes out."""
    done: list[int] = []

    def look(message: Message) -> None:
        if message.metadata.group_id == str(number) and not done:
            done.append(number)
            do()

    return "train", look


@pytest.mark.parametrize("at", [0, 1])
def test_a_lab_that_rotates_its_key_in_a_run_is_left_out_with_one_line_a_round_and_the_run_goes_on(
    lab: Lab, labs: dict[int, dict[str, Any]], capsys: pytest.CaptureFixture[str], at: int
) -> None:
    found: list[tuple[SecretKey, SecretKey]] = []
    run = lab("federation.rounds=2", nodes=labs, outgoing=before_round(at, lambda: found.append(rotate(labs[2]))))
    lines = said(capsys).splitlines()
    ((old, new),) = found
    for round_ in range(at, 2):
        server = [line for line in lines if f"round {round_ + 1}: left out lab-2" in line]
        assert len(server) == 1 and old.fingerprint.hex() in server[0] and new.fingerprint.hex() in server[0]
        assert "a run keeps the key it began with: put that key file back on the node" in server[0]
        assert {r["node"] for r in rounds(run) if r["stage"] == "update" and r["round"] == round_} == {
            "lab-0", "lab-1", "lab-3",
        }  # fmt: skip
    assert summary(run)["status"] == "completed"
    assert not any("Traceback" in line or "unexpected" in line for line in lines)


def test_a_lab_that_puts_the_old_key_back_is_taken_in_again(
    lab: Lab, labs: dict[int, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(labs[2]["key-file"])
    kept: list[Path] = []

    def look(message: Message) -> None:
        if message.metadata.group_id == "1" and not kept:
            kept.append(keys.rotate(path, generate_key(CRYPTO))[1])
        if message.metadata.group_id == "2" and kept[0].exists():
            kept[0].replace(path)

    run = lab("federation.rounds=3", nodes=labs, outgoing=("train", look))
    took_part = [{r["node"] for r in rounds(run) if r["stage"] == "update" and r["round"] == t} for t in range(3)]
    assert ["lab-2" in names for names in took_part] == [True, False, True]
    assert said(capsys).count("left out lab-2") == 1


def test_a_lab_that_comes_back_on_a_new_node_with_another_key_is_not_let_in(
    lab: Lab, labs: dict[int, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[tuple[SecretKey, SecretKey]] = []

    def restart() -> None:
        found.append(rotate(labs[2]))
        assert lab.grid
        lab.grid.nodes[77] = lab.grid.nodes.pop(2) | {"partition-id": 2}

    def look(message: Message) -> None:
        if message.metadata.group_id == "0" and message.metadata.dst_node_id == 3 and not found:
            restart()

    run = lab("federation.rounds=2", nodes=labs, outgoing=("train", look))
    ((old, new),) = found
    refused = f"left out lab-2: lab-2 holds key {new.fingerprint.hex()}, the others hold {old.fingerprint.hex()}: "
    assert refused + "give it the key file of the others" in said(capsys)
    assert summary(run)["status"] == "completed"


def test_a_run_whose_labs_all_rotate_their_keys_apart_ends_with_one_clear_line(
    lab: Lab, labs: dict[int, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def all_of_them() -> None:
        for node in labs.values():
            rotate(node)

    with pytest.raises(Exception, match="min_contributors"):
        lab("federation.rounds=2", nodes=labs, outgoing=before_round(1, all_of_them))
    lines = said(capsys).splitlines()
    assert sum("round 2: left out lab-" in line for line in lines) == 3 * 4  # it is begun three times
    assert len([line for line in lines if "run failed" in line]) == 1


def test_in_simulation_the_clients_make_one_key_in_a_folder_that_only_they_can_enter(lab: Lab) -> None:
    old = os.umask(0)
    try:
        run = lab("federation.rounds=1")
    finally:
        os.umask(old)
    path = run / "clients" / "secret.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.stat().st_uid == os.geteuid()
    material = keys.load(path).reveal()
    others = [p for p in run.rglob("*") if p.is_file() and "clients" not in p.relative_to(run).parts]
    assert others and not [p for p in others if material[:64] in p.read_bytes()]
    assert not list(run.glob("clients/.secret*"))
