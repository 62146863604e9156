"""Who is waited for: a greeting that cannot be used does not end a run that enough others are about to join."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from conftest import CONF
from federations import Lab, said
from flwr.app import Message
from grid import DeployedGrid
from test_hostile_messages import named

from ciphertune import flower
from ciphertune.errors import FederationError
from ciphertune.federation import Federation
from ciphertune.settings import Settings, compose
from server_app.door import Door


class Gathering:
    """A deployment of real clients of which some come later: one more at each look."""

    def __init__(self, lab: Lab, folder: Path, overrides: str, monkeypatch: pytest.MonkeyPatch) -> None:
        text = f"{lab.base} method=fedavg {overrides}"
        self.nodes, self.later = named(folder, 4), list[int]()
        self.settings: Settings = compose(CONF, text)
        self.grid = DeployedGrid(
            {}, {"overrides": text, "num-server-rounds": 0, "runs-dir": str(lab.runs)}, self.tamper
        )
        self.federation = Federation(self.settings, 4242)
        self.changes: dict[int, dict[str, Any]] = {}  # node -> what its greeting says instead
        monkeypatch.setattr("server_app.door.time.sleep", self.sleep)

    def tamper(self, reply: Message, source: int) -> Message:
        values, sent = flower.unpack(reply.content)
        reply.content = flower.pack(values | self.changes.get(source % 10, {}), sent)
        return reply

    def sleep(self, seconds: float) -> None:
        if not self.later:
            raise TimeoutError
        k = self.later.pop(0)
        if k < 0:
            del self.grid.nodes[~k]
            return
        self.grid.nodes[k] = self.nodes[k % 10]

    def gather(self, *first: int, then: tuple[int, ...]) -> list[str]:
        """Names of those that can take part. then: who comes, 10 + k on k's second node, or who goes, as ~k."""
        self.grid.nodes = {k: self.nodes[k % 10] for k in first}
        self.later = list(then)
        door = Door(self.settings, self.federation)
        door.gather(self.grid)
        return sorted(m.name for m in door.online(self.grid))


WRONG: dict[str, dict[str, Any]] = {
    "another key": {"key": "77" * 16},
    "other code": {"code": "00" * 8},
    "other settings": {"settings": "00" * 16},
    "other parameters": {"parameters": "00" * 16},
    "another start": {"initial": "ab" * 8},
    "the name of another": {"name": "lab-1"},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_client_that_cannot_work_with_the_others_does_not_count_as_one_that_has_joined(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    some = Gathering(lab, tmp_path, "federation.min_clients=3", monkeypatch)
    some.changes[0] = WRONG[case]
    names = some.gather(0, 1, 2, then=(3,))
    assert "2 of at least 3 clients (federation.min_clients) have joined, 1 others" in said(capsys)
    assert len(names) == 3 and set(names) == {"lab-1", "lab-2", "lab-3"}


def test_many_greetings_under_another_server_do_not_outvote_the_clients_of_this_one(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = Gathering(lab, tmp_path, "federation.min_clients=2", monkeypatch)
    some.changes = {0: WRONG["other settings"], 1: WRONG["other settings"]}
    assert some.gather(0, 1, 2, then=(3,)) == ["lab-2", "lab-3"]


def test_while_no_side_is_larger_the_others_are_waited_for(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = Gathering(lab, tmp_path, "federation.min_clients=2", monkeypatch)
    some.changes[0] = WRONG["another key"]
    assert some.gather(0, 1, then=(2,)) == ["lab-1", "lab-2"]


def test_clients_that_never_agree_end_the_run_with_both_keys_once_the_time_is_up(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = time.sleep
    some = Gathering(lab, tmp_path, "federation.min_clients=2 federation.wait_timeout=1", monkeypatch)
    some.changes[0] = WRONG["another key"]
    monkeypatch.setattr("server_app.door.time.sleep", sleep)
    with pytest.raises(FederationError, match=r"no side is larger: .* holds key .* holds .*: give all clients one key"):
        some.gather(0, 1, then=())


def test_a_lab_that_starts_its_node_again_before_the_run_begins_takes_part_on_the_new_one(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = Gathering(lab, tmp_path, "federation.min_clients=3", monkeypatch)
    assert some.gather(0, 1, then=(~0, 10, 2)) == ["lab-0", "lab-1", "lab-2"]
    assert {m.hello.node_id for m in some.federation.members} == {10, 1, 2}


def test_a_node_that_went_does_not_count_as_one_that_has_joined(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = Gathering(lab, tmp_path, "federation.min_clients=3", monkeypatch)
    assert some.gather(0, 1, then=(~0, 2, 3)) == ["lab-1", "lab-2", "lab-3"]


def test_a_node_that_only_seemed_to_be_there_gives_way_in_the_next_round(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lab's new node is refused while the old one is connected, and asked again."""
    some = Gathering(lab, tmp_path, "federation.min_clients=3", monkeypatch)
    some.grid.nodes = {k: some.nodes[k % 10] for k in (0, 1, 2, 10)}
    door = Door(some.settings, some.federation)
    door.gather(some.grid)
    first = next(m.hello.node_id for m in some.federation.members if m.name == "lab-0")
    del some.grid.nodes[first]
    door.greet_new(some.grid)
    assert {m.hello.node_id for m in door.online(some.grid)} == {1, 2, 10 - first}


def test_a_resumed_run_does_not_count_a_client_that_was_excluded(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = Gathering(lab, tmp_path, "federation.min_clients=3", monkeypatch)
    assert len(some.gather(0, 1, 2, 3, then=())) == 4
    some.federation.excluded["lab-0"] = "unusable messages"
    for member in some.federation.members:  # as it is read back: nobody is on a node that is known
        member.hello = member.hello.__class__(**{**member.hello.__dict__, "node_id": 0})
    assert some.gather(10, 11, 12, then=(13,)) == ["lab-1", "lab-2", "lab-3"]


def test_a_resumed_run_does_not_wait_for_more_clients_than_are_left(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = Gathering(lab, tmp_path, "federation.min_clients=4", monkeypatch)
    some.gather(0, 1, 2, 3, then=())
    some.federation.excluded["lab-0"] = "unusable messages"
    assert some.gather(10, 11, 12, 13, then=()) == ["lab-1", "lab-2", "lab-3"]


def test_why_a_client_cannot_take_part_is_said_once_and_while_the_others_are_waited_for(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = Gathering(lab, tmp_path, "federation.min_clients=2", monkeypatch)
    some.changes[0] = {"error": "SettingsMismatchError", "line": "another version is installed"}
    heard: list[str] = []
    go_on = some.sleep

    def sleep(seconds: float) -> None:
        heard.append(said(capsys))
        go_on(seconds)

    monkeypatch.setattr("server_app.door.time.sleep", sleep)
    assert some.gather(0, 1, then=(2,)) == ["lab-1", "lab-2"]
    line = "left out lab-0: SettingsMismatchError: another version is installed"
    assert line in heard[0]
    assert "".join([*heard, said(capsys)]).count(line) == 1
