"""Pruned and partly encrypted methods as whole federations: every client derives the mask of a round for itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONF
from federations import Lab, rounds, said, summary
from flwr.app import Message
from grid import simulated
from safetensors.numpy import load_file

from ciphertune import client, flower
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.errors import FederationError
from ciphertune.lm import model
from ciphertune.settings import compose
from tests.oracle import BODY, largest, mean_factor, rows_of

RANKS = (2, 4, 8, 8)
FROM_THE_START = "method.prune_schedule=fixed method.prune_from=0 method.prune_until=4"
TWO_OF_RANK_16 = "federation.clients='[{rank:16},{rank:16}]' federation.min_clients=2"
ATTENTION = "model.targets=[q_proj,k_proj,v_proj,o_proj]"


def recorded(run: Path, node: int, round_: int, kind: str) -> Adapter:
    """What a client sent, before pruning, or what it was given."""
    values = load_file(run / f"clients/client-{node}/round_{round_:04d}/{kind}.safetensors")
    layers = {
        n[:-2]: LoraFactors(values[n].astype(np.float64), values[f"{n[:-2]}.b"].astype(np.float64), 2.0)
        for n in sorted(values)
        if n.endswith(".a")
    }
    assert len(layers) == 4 and len(values) == 8  # no heads
    return Adapter(layers, {})


def updates(run: Path, round_: int) -> dict[str, dict[str, Any]]:
    return {r["node"]: r for r in rounds(run) if r["stage"] == "update" and r["round"] == round_}


def samples_of(run: Path, nodes: list[int]) -> list[int]:
    return [summary(run)["nodes"][f"client-{k}"]["samples"] for k in nodes]


def gone(reply: Message, source: int) -> Message:
    """The answer of client-3 to the second round of training is lost."""
    if source == 103 and reply.metadata.message_type == "train" and reply.metadata.group_id == "1":
        failed = {"error": "OSError", "line": "disk full", "name": "client-3", "simulated": True}
        reply.content = flower.pack(failed, flower.unpack(reply.content)[1])
    return reply


@pytest.mark.parametrize("mean", ["all", "kept"])
def test_pruning_by_ones_own_mask_lowers_the_loss(lab: Lab, mean: str) -> None:
    run = lab(f"method=fedshield method.prune_mean={mean} {FROM_THE_START}")
    found = summary(run)
    assert found["status"] == "completed" and found["federated"]["loss"] < found["base"]["loss"]
    assert {r["values_clear"] for k in (0, 1) for r in updates(run, k).values()} == {0}


@pytest.mark.parametrize(
    ("method", "travels"),
    [("fedshield", (("a", "b"), ("a", "b"), ("a", "b"))), ("sealed", (("b",), ("a",), ("b",)))],
    ids=["fedshield", "sealed"],
)
def test_a_client_left_out_of_a_round_rejoins_with_the_mask_of_the_others(
    lab: Lab, capsys: pytest.CaptureFixture[str], method: str, travels: tuple[tuple[str, ...], ...]
) -> None:
    """Unequal ranks, and what each client is given is the mean of those that took part, where the mask keeps it."""
    run = lab(
        f"method={method} method.prune=agreed {FROM_THE_START} federation.rounds=3 record_updates=true", tamper=gone
    )
    assert "left out client-3: OSError: disk full" in said(capsys)
    here = [sorted(updates(run, k)) for k in range(3)]
    everybody = [f"client-{k}" for k in range(4)]
    assert here == [everybody, everybody[:3], everybody]
    for round_, rate in enumerate((0.0, 0.275, 0.35)):  # nobody prunes before there is a mean
        nodes = [0, 1, 2] if round_ == 1 else [0, 1, 2, 3]
        sent = [recorded(run, k, round_, "update") for k in nodes]
        for node, rank in enumerate(RANKS):
            got = recorded(run, node, round_, "received")
            if round_:
                held = recorded(run, node, round_ - 1, "received")
            # components from 4 on had one client alone in round 1: their sum was not released
            shared = min(rank, 4) if round_ == 1 else rank
            for layer in got.layers:
                for factor in travels[round_]:
                    found, keep = rows_of(got, layer, factor)[:shared], np.ones((shared, 1), bool)
                    mean = mean_factor(sent, samples_of(run, nodes), layer, factor, "nested")[:shared]
                    if round_:
                        keep = largest(rows_of(held, layer, factor), (2, 4, 8), rate)[:shared]
                        assert 0.25 < (~keep).mean() < 0.4
                    assert np.abs(found - np.where(keep, mean, 0.0)).max() < 1e-6
                    assert (found == 0).sum() == (~keep).sum()
    assert summary(run)["federated"]["loss"] < summary(run)["base"]["loss"]


@pytest.mark.parametrize("crypto", ["ckks", "clear"])
def test_what_travels_falls_with_the_scaled_rates_round_by_round(lab: Lab, crypto: str) -> None:
    words = f"method=fedshield method.prune=agreed method.prune_target=0.9 crypto={crypto}"
    run = lab(f"{words} federation.rounds=5 {ATTENTION} {TWO_OF_RANK_16}", nodes=simulated(2))
    # from 40/200 to all of 5 rounds: at round 1 the first rate, then (0.9 - 0.2) / 4 more in each
    rates = (0.0, 0.2, 0.375, 0.55, 0.725)
    sizes = [16 * n for n in (32, 32, 32, 16, 32, 16, 32, 32) for _ in range(2)]  # A and B of q, k, v, o; two blocks
    for round_, rate in enumerate(rates):
        kept = sum(s - round(rate * s) for s in sizes)
        for line in updates(run, round_).values():
            blocks = math.ceil(kept / 2048) * 2 * 4096 * 7
            values, size = ((0, kept), blocks) if crypto == "ckks" else ((kept, 0), 4 * kept)
            assert (line["values_clear"], line["values_cipher"]) == values
            assert line["clear_bytes"] + line["cipher_bytes"] == size
            assert line["bytes_up"] == 122 + size + (16 + sum(sizes) // 8 if round_ else 0) + 32
    down = [{line["bytes_down"] for line in updates(run, k).values()} for k in range(5)]
    up = [{line["bytes_up"] for line in updates(run, k).values()} for k in range(5)]
    assert all(len(x) == 1 for x in [*up, *down])
    assert [x.pop() - 16 for x in down[1:]] == [x.pop() for x in up[:-1]]  # one contributor more: 16 bytes
    assert summary(run)["federated"]["loss"] < summary(run)["base"]["loss"]


def test_a_share_of_the_entries_is_encrypted_from_the_second_round_on(lab: Lab) -> None:
    run = lab("method=maskcrypt method.fraction=0.25 record_updates=true")
    sizes = [(32, 32, 32, 16), (2, 2, 4)]
    for round_ in (0, 1):
        for node, rank in enumerate(RANKS):
            tensors = [w * k for w in sizes[0] for k in sizes[1][: (2, 4, 8).index(rank) + 1] for _ in range(2)]
            secret = sum(tensors) if round_ == 0 else sum(s - round(0.75 * s) for s in tensors)
            line = updates(run, round_)[f"client-{node}"]
            assert (line["values_clear"], line["values_cipher"]) == (sum(tensors) - secret, secret)
        sent = [recorded(run, k, round_, "update") for k in range(4)]
        for node in range(4):
            got = recorded(run, node, round_, "received")
            for layer in got.layers:
                for factor in ("a", "b"):
                    mean = mean_factor(sent, samples_of(run, [0, 1, 2, 3]), layer, factor, "nested")
                    assert np.abs(rows_of(got, layer, factor) - mean).max() < 1e-6
    assert summary(run)["federated"]["loss"] < summary(run)["base"]["loss"]


def test_the_entries_that_travel_in_the_clear_are_those_that_changed_least_since_the_start(lab: Lab) -> None:
    run = lab("method=maskcrypt method.fraction=0.25 record_updates=true record_server_view=true")
    settings = compose(CONF, f"{lab.base} method=maskcrypt")
    start = model.load(settings.model, rank=8, device="cpu", seed=settings.seed).read()
    held, sent = recorded(run, 3, 0, "received"), recorded(run, 3, 1, "update")
    weight = samples_of(run, [3])[0] / sum(samples_of(run, [0, 1, 2, 3]))
    expected = []
    for layer in sent.layers:
        for factor in ("a", "b"):
            change = rows_of(held, layer, factor).astype(np.float32) - rows_of(start, layer, factor)
            shown = ~largest(change, (2, 4, 8), 0.75)
            expected.append((rows_of(sent, layer, factor) * weight)[shown])
    values = np.sort(np.concatenate(expected))
    data = (run / "server_view/round_0001/client-3.msg").read_bytes()
    clear = np.frombuffer(data[BODY : BODY + 4 * values.size], "<f4")
    assert values.size == updates(run, 1)["client-3"]["values_clear"] > 1000
    assert np.abs(np.sort(clear) - values).max() < 1e-7


@pytest.mark.parametrize("who", ["client-3", "client-0"])
def test_clients_whose_masks_differ_are_named_and_a_round_of_too_few_that_agree_is_refused(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """One client holds another mean than the rest when the second round begins."""
    catch_up = client._catch_up

    def another(one: client.Client, task: Any, received: Any) -> Any:
        adapter, noise = catch_up(one, task, received)
        if one.node.name == who and task.round == 1:
            layers = {n: LoraFactors(np.roll(f.a, 1, -1), f.b, f.scale) for n, f in adapter.layers.items()}
            adapter = Adapter(layers, adapter.heads)
        return adapter, noise

    monkeypatch.setattr(client, "_catch_up", another)
    more = f"method=fedshield method.prune=agreed {FROM_THE_START}"
    refused = "holds another aggregate than they do"
    if who == "client-3":  # the last to answer: the others agree
        run = lab(more)
        assert sorted(updates(run, 1)) == ["client-0", "client-1", "client-2"]
        text = said(capsys)
        assert f"left out {who}: " in text and refused in text
        return
    with pytest.raises(FederationError, match="1 usable updates"):
        lab(more)
    text = said(capsys)
    assert all(f"left out client-{k}: " in text for k in (1, 2, 3)) and text.count(refused) >= 3
