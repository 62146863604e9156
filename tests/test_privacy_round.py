"""dp_lora as whole federations: what a client sends, and what it is said to have given away."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import Lab, rounds, said, summary
from flwr.app import Message
from grid import Wire, simulated
from safetensors.numpy import load_file

from ciphertune import flower, release
from ciphertune.adapter import Adapter
from ciphertune.errors import FederationError
from ciphertune.privacy import epsilon, noise_multiplier, protect
from ciphertune.settings import MethodSettings
from tests.baseline_cases import composed_once, noise_in_mean
from tests.oracle import Matrix

__all__ = ["composed_once"]  # a fixture for every test
DELTA = 1e-5
FOUR = "federation.clients='[{rank:4},{rank:4},{rank:4},{rank:4}]'"


def named(run: Path, node: int, round_: int, kind: str) -> dict[str, Matrix]:
    return load_file(run / f"clients/client-{node}/round_{round_:04d}/{kind}.safetensors")


def flat(values: dict[str, Matrix], base: dict[str, Matrix]) -> Matrix:
    return np.concatenate([np.ravel(v - base[n]).astype(np.float64) for n, v in sorted(values.items())])


def failing(node: int, round_: str, change_: dict[str, Any]) -> Any:
    def tamper(reply: Message, source: int) -> Message:
        if source == node and reply.metadata.message_type == "train" and reply.metadata.group_id == round_:
            values, payload = flower.unpack(reply.content)
            reply.content = flower.pack({**values, **change_}, () if "error" in change_ else payload)
        return reply

    return tamper


def test_federation_clips_and_noises_what_it_sends_and_writes_down_epsilon_every_round(lab: Lab) -> None:
    clip, z = 0.1, 0.02
    more = f"method=dp_lora {FOUR} method.clip={clip} method.noise_multiplier={z} record_updates=true"
    gone = {"error": "OSError", "line": "disk full", "name": "client-3", "simulated": True}
    run = lab(more, tamper=failing(103, "1", gone))
    lab.runs = lab.folder / "again"
    again = lab(more)

    noise = []
    for node in range(4):  # of one seed: what was learned in round 0 is equal, so the difference is that of the noises
        one, two = (named(r, node, 0, "update") for r in (run, again))
        noise.append(flat(one, two))
    noises = np.concatenate(noise)
    assert noises.std() == pytest.approx(math.sqrt(2) * z * clip, rel=5 / math.sqrt(2 * noises.size))
    for node in range(3):  # the change of round 1 from the mean of round 0
        sent = flat(named(run, node, 1, "update"), named(run, node, 0, "received"))
        expected = clip * math.sqrt(1 + sent.size * z**2)  # training moves every entry by about 0.01, 0.3 in all
        assert np.linalg.norm(sent) == pytest.approx(expected, rel=0.1)

    lines = [r for r in rounds(run) if r["stage"] == "privacy"]
    assert [(r["round"], r["node"]) for r in lines] == [(k, f"client-{n}") for k in (0, 1) for n in range(4)]
    assert {r["delta"] for r in lines} == {DELTA}
    releases = {(k, f"client-{n}"): 1 if n == 3 else k + 1 for k in (0, 1) for n in range(4)}
    for r in lines:
        assert r["epsilon_server"] == pytest.approx(epsilon([z] * releases[r["round"], r["node"]], DELTA))
        assert 0 < r["epsilon_client"] < r["epsilon_server"]
    nodes = summary(run)["nodes"]
    for r in lines[4:]:
        assert nodes[r["node"]]["epsilon"] == {"server": r["epsilon_server"], "client": r["epsilon_client"]}
    counts = {n: v["samples"] for n, v in nodes.items()}
    zs = [
        noise_in_mean(z, counts, "client-0"),
        noise_in_mean(z, {n: c for n, c in counts.items() if n != "client-3"}, "client-0"),
    ]
    assert nodes["client-0"]["epsilon"]["client"] == pytest.approx(epsilon(zs, DELTA), rel=1e-9)


def test_federation_keeps_a_target_over_all_rounds_and_says_so(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    run = lab("method=dp_lora method.epsilon=20 federation.clients='[{rank:4},{rank:4}]' federation.min_clients=2",
              nodes=simulated(2))  # fmt: skip
    found = [n["epsilon"]["server"] for n in summary(run)["nodes"].values()]
    assert all(0.99 * 20 < e <= 20 for e in found)
    z = noise_multiplier(MethodSettings(epsilon=20.0), 2)
    text = said(capsys)
    assert f"client-0: update 2 of 2 with noise {z:.3g} x clip 1; epsilon 20 (delta 1e-05)" in text
    assert "epsilon 20 to the server, 20 to another client" in text


def test_a_server_that_states_fewer_rounds_does_not_get_less_noise(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def spied(*args: Any, **more: Any) -> Adapter:
        used.append(more["noise_multiplier"])
        return protect(*args, **more)

    def fewer(message: Any) -> None:
        values, payload = flower.unpack(message.content)
        message.content = flower.pack({**values, "rounds": 1}, payload)

    monkeypatch.setattr(release, "protect", spied)
    clients = "federation.clients='[{rank:4},{rank:4}]' federation.min_clients=2"
    with suppress(FederationError):  # refusing such a task would do as well
        lab(f"method=dp_lora method.epsilon=20 {clients}", nodes=simulated(2), outgoing=("train", fewer))
    assert all(z >= noise_multiplier(MethodSettings(epsilon=20.0), 2) for z in used)


def test_a_server_gets_no_second_release_of_a_round_by_asking_for_other_components(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    """First it asks for one component, and then for all."""
    asked = []

    def narrow(message: Message) -> None:
        values, payload = flower.unpack(message.content)
        asked.append(values["round"])
        if len(asked) <= 2:
            values["terms"] = [{**terms, "tiers": [1]} for terms in values["terms"]]
        message.content = flower.pack(values, payload)

    clients = "federation.clients='[{rank:4},{rank:4}]' federation.min_clients=2"
    words = f"method=dp_lora {clients} record_updates=true"
    with pytest.raises(FederationError, match="0 usable updates"):
        lab(words, nodes=simulated(2), outgoing=("train", narrow))
    assert lab.grid is not None and asked == [0] * 6  # two clients, three attempts
    sent = [r for _, r in lab.grid.answered if r.metadata.message_type == "train" and "payload" in r.content]
    assert len(sent) == 2
    assert "the server asks for other components than in an earlier round" in said(capsys)


THREE = "federation.clients='[{rank:2},{rank:4},{rank:4}]' federation.min_clients=3 federation.rounds=1"


def test_a_component_that_two_clients_have_hides_no_more_than_the_noise_of_two(lab: Lab) -> None:
    """Components 2 and 3 are the sum of client-1 and client-2 alone, so each reads the other's as the server does."""
    nodes = summary(lab(f"method=dp_lora {THREE}", nodes=simulated(3)))["nodes"]
    for name in ("client-1", "client-2"):
        assert nodes[name]["epsilon"]["client"] >= 0.999 * nodes[name]["epsilon"]["server"]


def test_an_update_that_reached_the_server_counts_even_when_it_is_left_out_of_the_sum(lab: Lab) -> None:
    run = lab(f"method=dp_lora {THREE}", nodes=simulated(3), tamper=failing(100, "0", {"train_loss": "long"}))
    assert summary(run)["nodes"]["client-0"]["epsilon"]["server"] == pytest.approx(epsilon([1.0], DELTA))


def test_the_change_of_what_travels_is_clipped_to_the_same_norm_at_every_rank(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []

    def spied(update: Adapter, base: Adapter, *args: Any, **more: Any) -> Adapter:
        found = protect(update, base, *args, **more)
        pairs = [(f, base.layers[n]) for n, f in found.layers.items()]
        travels = [x for f, old in pairs for x in (f.a - old.a, f.b - old.b)]
        norms.append((update.rank, math.sqrt(sum(float(np.square(x).sum()) for x in travels))))
        return found

    monkeypatch.setattr(release, "protect", spied)
    more = "method=dp_lora method.clip=0.1 method.noise_multiplier=0.001 federation.rounds=1"
    lab(f"{more} federation.clients='[{{rank:2}},{{rank:4}},{{rank:8}}]' federation.min_clients=3", nodes=simulated(3))
    assert [rank for rank, _ in norms] == [2, 4, 4]
    assert [norm for _, norm in norms] == pytest.approx([0.1] * 3, rel=0.01)


def test_an_update_that_was_asked_for_counts_whatever_is_heard_of_it_unless_its_client_says_that_it_sent_none(
    lab: Lab,
) -> None:
    """Late, cut off or unreadable, it was sent, and whoever holds the server's line has it."""

    def tamper(reply: Message, source: int) -> Message | Wire:
        if reply.metadata.message_type != "train" or source not in (100, 101):
            return reply
        if source == 101:
            reply.content = flower.pack({"error": "OSError", "line": "", "name": "client-1", "simulated": True})
            return reply
        return [{"0" * 64: b"garbage"}]

    nodes = summary(lab(f"method=dp_lora {FOUR} federation.rounds=1", tamper=tamper))["nodes"]
    assert nodes["client-0"]["epsilon"]["server"] == pytest.approx(epsilon([1.0], DELTA))
    assert nodes["client-2"]["epsilon"]["server"] == pytest.approx(epsilon([1.0], DELTA))
    assert "epsilon" not in nodes["client-1"]


def test_an_error_after_an_update_of_the_same_round_takes_nothing_back(lab: Lab) -> None:
    """The first attempt comes to nothing, for only one update is usable; in the second its client fails."""
    seen: list[int] = []

    def tamper(reply: Message, source: int) -> Message:
        if reply.metadata.message_type == "train":
            seen.append(source)
            if (source == 100) == (seen.count(source) > 1):  # client-0 in the second attempt, the others in the first
                reply.content = flower.pack({"error": "OSError", "line": "", "name": "", "simulated": True})
        return reply

    nodes = summary(lab(f"method=dp_lora {FOUR} federation.rounds=1", tamper=tamper))["nodes"]
    assert [n["epsilon"]["server"] for n in nodes.values()] == [pytest.approx(epsilon([1.0], DELTA))] * 4
