"""What a node says of itself, and what simulation fills in."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import federations
import pytest
from conftest import CONF
from federations import Lab
from grid import DeployedGrid, simulated

from ciphertune import flower
from ciphertune.errors import FederationError, SettingsError
from ciphertune.node import in_simulation, node_settings, run_folder
from ciphertune.settings import ClientSettings, CryptoSettings, FederationSettings, Settings, compose

SETTINGS = Settings(
    federation=FederationSettings(clients=(ClientSettings(rank=2), ClientSettings(rank=4, budget=0.5))),
    runs_dir="/runs",
)


def node(config: dict[str, Any], client: int | None = None) -> Any:
    played = set(config) == {"partition-id", "num-partitions"}
    return node_settings(SETTINGS, config, 7, node_id=99, client=client, simulated=played)


def test_simulation_takes_each_clients_defaults_from_the_federation() -> None:
    first, second = node({"partition-id": 0, "num-partitions": 2}), node({"partition-id": 1, "num-partitions": 2})
    assert (first.rank, second.rank, second.budget) == (2, 4, 0.5)
    assert (first.name, first.simulated, first.clients) == ("client-0", True, 2)


def test_a_simulated_node_plays_the_client_it_is_asked_to() -> None:
    assert node({"partition-id": 0, "num-partitions": 1}, client=1).rank == 4


def test_a_real_nodes_own_settings_win() -> None:
    config = {"name": "lab-a", "rank": 16, "budget": 0.25, "data-path": "/d", "key-file": "/k", "device": "cpu"}
    found = node({**config, "partition-id": 1})
    assert (found.name, found.rank, found.budget, found.data_path) == ("lab-a", 16, 0.25, "/d")
    assert (found.key_file, found.simulated) == (Path("/k"), False)


def test_a_node_that_says_how_long_encryption_may_take_gets_its_budget_from_a_measured_profile() -> None:
    real = {"name": "lab-a", "key-file": "/k", "partition-id": 1}
    found = node({**real, "seconds-per-round": 5, "upstream": 1e6})
    assert math.isnan(found.budget) and (found.seconds_per_round, found.upstream) == (5.0, 1e6)
    assert node({**real, "seconds-per-round": 5}).upstream == 0.0  # not given
    assert node({**real, "seconds-per-round": 5, "budget": 0.25}).budget == 0.25  # what is stated wins
    assert node(real).budget == 0.5  # neither: the federation's


def test_a_real_node_cannot_be_told_by_the_server_to_play_another_client() -> None:
    assert node({"name": "lab-a", "key-file": "/k", "partition-id": 0}, client=1).index == 0


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"rnak": 4}, "unknown node setting rnak"),
        ({"name": "lab-a"}, "no key file"),
        ({"partition-id": 0, "num-partitions": 2, "rank": 4}, "no key file"),
        ({"name": "../etc", "key-file": "/k"}, r"name='../etc'"),
        ({"name": "a", "key-file": "/k", "rank": 0}, "rank=0"),
        ({"name": "a", "key-file": "/k", "rank": 2.5}, "rank=2.5"),
        ({"name": "a", "key-file": "/k", "rank": "8"}, "rank='8'"),
        ({"name": "a", "key-file": "/k", "budget": 1.01}, "budget=1.01"),
        ({"name": "a", "key-file": "/k", "budget": -0.1}, "budget=-0.1"),
        ({"name": "a", "key-file": "/k", "budget": math.nan}, "budget=nan is out of range: want 0 to 1"),
        ({"name": "a", "key-file": "/k", "budget": math.nan, "seconds-per-round": 5}, "budget=nan"),
        ({"name": "a", "key-file": "/k", "budget": "0.5"}, "budget='0.5'"),
        ({"name": "a", "key-file": "/k", "seconds-per-round": 0}, "seconds-per-round=0"),
        ({"name": "a", "key-file": "/k", "seconds-per-round": -3.5}, "seconds-per-round=-3.5"),
        ({"name": "a", "key-file": "/k", "seconds-per-round": math.nan}, "seconds-per-round=nan"),
        ({"name": "a", "key-file": "/k", "seconds-per-round": math.inf}, "seconds-per-round=inf"),
        ({"name": "a", "key-file": "/k", "seconds-per-round": "5"}, "seconds-per-round='5'"),
        ({"name": "a", "key-file": "/k", "seconds-per-round": 5, "upstream": -1}, "upstream=-1"),
        ({"name": "a", "key-file": "/k", "budget": 0.5, "upstream": -1}, "upstream=-1"),
        ({"name": "a", "key-file": "/k", "seconds-per-round": 5, "upstream": math.nan}, "upstream=nan"),
    ],
)
def test_a_bad_node_setting_is_named(config: dict[str, Any], part: str) -> None:
    with pytest.raises(SettingsError) as caught:
        node(config)
    assert part in str(caught.value)


def test_all_parties_derive_the_same_run_folder_name() -> None:
    assert run_folder(Settings(runs_dir="/r"), 7) == Path("/r/sealed-00000007")
    assert run_folder(Settings(name="mine"), 7, "/own") == Path("/own/mine")


def test_a_relative_folder_is_under_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIPHERTUNE_HOME", "/somewhere")
    assert run_folder(Settings(name="mine"), 7) == Path("/somewhere/runs/mine")


@pytest.mark.parametrize("method", [{"select": "none", "name": "fedavg"}, {}], ids=["fedavg", "sealed"])
def test_a_real_node_refuses_to_send_in_the_clear_unless_it_was_started_to(method: dict[str, str]) -> None:
    """Settings come with the run, so a server or submitter could ask for it: the node's own setting decides."""
    clear = replace(SETTINGS, method=replace(SETTINGS.method, **method), crypto=CryptoSettings(backend="clear"))
    config = {"name": "lab-a", "key-file": "/k"}
    for refused in (config, {**config, "allow-clear": False}, {**config, "allow-clear": "yes"}):
        with pytest.raises(SettingsError, match="in the clear: it refuses unless"):
            node_settings(clear, refused, 7, node_id=99)
    assert not node_settings(clear, {**config, "allow-clear": True}, 7, node_id=99).simulated


def test_a_real_node_refuses_to_send_b_and_most_of_a_in_the_clear_unless_it_was_started_to() -> None:
    """SHE-LoRA encrypts a few columns: what `sealed` protects lies open, so it needs the same word."""
    settings = compose(CONF, ["method=she_lora"])
    config = {"name": "lab-a", "key-file": "/k"}
    for refused in (config, {**config, "allow-clear": False}, {**config, "allow-clear": "true"}):
        with pytest.raises(SettingsError, match="would send B and most columns of A in the clear: it refuses unless"):
            node_settings(settings, refused, 7, node_id=99)
    assert node_settings(settings, {**config, "allow-clear": True}, 7, node_id=99).name == "lab-a"
    with pytest.raises(SettingsError, match="no key file"):  # what is encrypted needs a key all the same
        node_settings(settings, {"name": "lab-a", "allow-clear": True}, 7, node_id=99)
    clear = compose(CONF, ["method=she_lora", "crypto=clear"])
    with pytest.raises(SettingsError, match="would send this node's update in the clear"):
        node_settings(clear, config, 7, node_id=99)
    parts = {"partition-id": 0, "num-partitions": 4}
    assert node_settings(settings, parts, 7, node_id=99, simulated=True).simulated


def test_a_simulation_of_more_nodes_than_the_federation_lists_has_as_many_clients() -> None:
    found = node({"partition-id": 5, "num-partitions": 6})
    assert (found.clients, found.index, found.rank, found.name) == (6, 5, 4, "client-5")


@pytest.mark.parametrize("config", [{"rank": math.inf}, {"rank": math.nan}, {"budget": 10**400}, {"rank": True}])
def test_numbers_that_are_none_are_of_the_wrong_type(config: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="is of the wrong type"):
        node({"name": "a", "key-file": "/k", **config})


# ------------------------------------------------------------------------------------ simulated, or a lab's own machine

# what Flower's simulation gives a node, and also what its guides start a SuperNode with
PARTS = {"partition-id": 0, "num-partitions": 3}


@pytest.mark.parametrize(
    ("overrides", "part"),
    [("method=fedavg", "would send this node's update in the clear"), ("method=sealed", "this node has no key file")],
)
def test_a_real_node_that_says_no_more_than_a_simulated_one_refuses_to_send_in_the_clear_or_to_make_a_key(
    overrides: str, part: str
) -> None:
    with pytest.raises(SettingsError, match=part):
        node_settings(compose(CONF, overrides), PARTS, 7, node_id=99)


@pytest.mark.parametrize("method", ["fedavg", "sealed"])
def test_between_machines_such_nodes_send_nothing_no_text_of_an_error_and_make_no_key(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(federations, "LocalGrid", DeployedGrid)
    with pytest.raises(FederationError, match="0 of at least 4 clients"):
        lab(f"method={method} federation.wait_timeout=1", nodes=simulated(4))
    assert lab.grid is not None and len(lab.grid.answered) == 4
    for _, reply in lab.grid.answered:
        values, payload = flower.unpack(reply.content)
        assert values == {"error": "SettingsError", "line": "", "name": values["name"], "simulated": False}
        assert payload == []
    assert not list(lab.runs.rglob("secret.key"))


def test_this_process_is_no_simulation() -> None:
    assert not in_simulation()


@pytest.mark.slow
def test_an_actor_of_flowers_simulation_knows_that_it_is_one_and_the_process_that_started_it_that_it_is_none() -> None:
    code = """
import json, ray
from flwr.simulation.ray_transport.ray_actor import ClientAppActor
from ciphertune.node import in_simulation
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
def app():
    return lambda message, context: in_simulation()
inside = ray.get(ClientAppActor.remote().run.remote(app, None, "0", None))[1]
print(json.dumps([inside, in_simulation()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [True, False]
