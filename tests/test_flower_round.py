"""Whole federations over real Flower messages, in this process."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONF
from federations import Lab, rounds, said, summary
from flwr.app import ArrayRecord, Message
from grid import simulated
from peft import PeftModel
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from transformers import AutoModelForCausalLM

from ciphertune import client, flower
from ciphertune.adapter import Adapter
from ciphertune.client import Client
from ciphertune.lm import model as lm_model
from ciphertune.ranks import damped
from ciphertune.settings import compose

METHODS = ("sealed", "full_he", "fedavg")


@pytest.mark.parametrize("method", METHODS)
def test_four_clients_of_unequal_rank_finish_a_run(lab: Lab, method: str) -> None:
    run = lab(f"method={method}")
    found = summary(run)
    assert found["status"] == "completed"
    assert [n["rank"] for n in found["nodes"].values()] == [2, 4, 8, 8]
    assert found["federated"]["loss"] < found["base"]["loss"]
    assert found["encrypted_fraction"] == (0.0 if method == "fedavg" else 1.0)


def test_two_nodes_play_four_clients_when_flower_simulates_too_few(lab: Lab, tmp_path: Path) -> None:
    # in the clear: the noise of fresh encryption may change the last bit of a float32
    few = summary(lab("crypto=clear name=few", nodes=simulated(2)))
    lab.runs = tmp_path / "other"
    assert few["nodes"] == summary(lab("crypto=clear name=many", nodes=simulated(4)))["nodes"]


def test_encrypted_and_clear_runs_of_one_seed_end_at_the_same_loss(lab: Lab, tmp_path: Path) -> None:
    encrypted = summary(lab("method=sealed"))["federated"]["loss"]
    lab.runs = tmp_path / "clear"
    clear = summary(lab("method=sealed crypto=clear"))["federated"]["loss"]
    assert encrypted == pytest.approx(clear, abs=1e-5)


def test_the_saved_adapter_gives_the_logits_the_client_had(lab: Lab, llama: Path, monkeypatch: Any) -> None:
    logits: dict[str, torch.Tensor] = {}
    tokens = torch.tensor([[1, 5, 9, 40, 7]])
    from ciphertune import client as client_module

    def finish(client: Client, *args: Any) -> Any:
        report = original(client, *args)
        with torch.no_grad():
            logits[client.node.name] = client.model.model(tokens).logits
        return report

    original = client_module.finish
    monkeypatch.setattr(client_module, "finish", finish)
    run = lab("method=sealed")
    assert len(logits) == 4
    for name, expected in logits.items():
        base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        plain = base(tokens).logits
        tuned = PeftModel.from_pretrained(base, run / "clients" / name / "adapter").eval()
        with torch.no_grad():
            assert torch.allclose(tuned(tokens).logits, expected, atol=1e-6)
        assert not torch.allclose(plain, expected, atol=1e-3)


def test_the_released_adapter_is_the_mean_rounded_to_bfloat16_unless_asked_otherwise(lab: Lab, tmp_path: Path) -> None:
    def released(run: Path, name: str) -> dict[str, torch.Tensor]:
        return {
            key.removeprefix("base_model.model.").replace(".lora_A.weight", ".a").replace(".lora_B.weight", ".b"): value
            for key, value in load_torch(run / "clients" / name / "adapter/adapter_model.safetensors").items()
        }

    run = lab("method=sealed")
    lab.runs = tmp_path / "whole"
    whole = lab("method=sealed model.release=float32")
    # four terms of noise of variance 10.75 per coefficient, 256 deviations of that, at a scale of 2^32
    step = 2 ** math.ceil(math.log2(256 * math.sqrt(4 * 4096 * 10.75) / 2**32))
    for name in ("client-0", "client-3"):
        mean = load_torch(run / "clients" / name / "state/adapter.safetensors")
        kept = released(run, name)
        assert set(kept) == set(mean)
        for key in mean:
            assert torch.equal(kept[key], kept[key].bfloat16().float())
            assert torch.equal(kept[key], (kept[key] / step).round() * step)
            assert (kept[key] - mean[key]).abs().max() <= 4 * step + mean[key].abs().max() / 256
        mean = load_torch(whole / "clients" / name / "state/adapter.safetensors")
        assert all(torch.equal(value, mean[key]) for key, value in released(whole, name).items())
        assert any((mean[key] != mean[key].bfloat16().float()).any() for key in mean)


def test_clients_of_all_ranks_end_with_the_same_adapter(lab: Lab) -> None:
    run = lab("method=sealed federation.rounds=3")
    first, *others = (load_file(run / "clients" / f"client-{k}/state/adapter.safetensors") for k in range(4))
    assert {v.shape[0] for n, v in first.items() if n.endswith(".a")} == {8}
    assert all(np.array_equal(other[name], first[name]) for other in others for name in first)


def test_padded_clients_hold_the_beginning_of_the_others_adapter(lab: Lab) -> None:
    run = lab("method=hetlora federation.rounds=3")
    low, _, high, twin = (load_file(run / "clients" / f"client-{k}/state/adapter.safetensors") for k in range(4))
    assert all(np.array_equal(high[k], twin[k]) for k in high)
    for name in (n for n in low if n.endswith((".a", ".b"))):
        first = high[name][:2] if name.endswith(".a") else high[name][:, :2]
        assert low[name].shape == first.shape and np.array_equal(low[name], first)


def test_what_a_client_receives_is_the_weighted_mean_of_what_the_clients_sent(lab: Lab) -> None:
    run = lab("method=sealed record_updates=true")
    updates = [load_file(run / "clients" / f"client-{k}/round_0000/update.safetensors") for k in range(4)]
    received = load_file(run / "clients/client-3/round_0000/received.safetensors")
    samples = [summary(run)["nodes"][f"client-{k}"]["samples"] for k in range(4)]
    for name in (n for n in received if n.endswith(".b")):  # B travels in round 0
        for component, have in ((0, [0, 1, 2, 3]), (3, [1, 2, 3]), (7, [2, 3])):
            weights = np.array([samples[k] for k in have], np.float64)
            mean = sum(
                w * updates[k][name][:, component].astype(np.float64) for w, k in zip(weights, have, strict=True)
            )
            assert np.allclose(received[name][:, component], mean / weights.sum(), atol=1e-6)


def test_the_server_view_holds_exactly_the_bytes_that_came_and_no_float_of_the_update(lab: Lab) -> None:
    run = lab("method=sealed record_server_view=true record_updates=true")
    view = (run / "server_view/round_0000/client-3.msg").read_bytes()
    sent = {m.metadata.message_id: m for _, m in lab.grid.sent}  # type: ignore[union-attr]
    assert sent and len(view) == next(
        r["bytes_up"] for r in rounds(run) if r["stage"] == "update" and r["node"] == "client-3" and r["round"] == 0
    )
    update = load_file(run / "clients/client-3/round_0000/update.safetensors")
    weight = summary(run)["nodes"]["client-3"]["samples"] / sum(n["samples"] for n in summary(run)["nodes"].values())
    values = next(v for n, v in update.items() if n.endswith(".b")).ravel()
    values = values[values != 0][:50]
    for scaled in (values, (values * weight).astype(np.float32)):
        assert not any(v.tobytes() in view for v in scaled)


def test_every_round_is_written_down_with_seconds_and_bytes(lab: Lab) -> None:
    run = lab("method=sealed")
    found = rounds(run)
    for round_ in (0, 1):
        updates = [r for r in found if r["stage"] == "update" and r["round"] == round_]
        assert [u["node"] for u in updates] == ["client-0", "client-1", "client-2", "client-3"]
        for update in updates:
            assert update["bytes_up"] > update["cipher_bytes"] > 0 == update["clear_bytes"]
            assert update["values_cipher"] > 0 == update["values_clear"]
            assert (update["bytes_down"] > 0) == (round_ == 1)
        stages = {r["stage"] for r in found if r["round"] == round_ and "seconds" in r}
        assert stages >= {"load", "unseal", "evaluate", "train", "seal", "round"}
    for name in ("settings.yaml", "versions.json", "plan.json", "server/round_0001.msg"):
        assert (run / name).is_file()


def test_the_comparison_trains_every_client_alone_from_the_same_start(lab: Lab) -> None:
    found = summary(lab("federation.compare_local=true"))
    assert all(node["local"]["loss"] != node["federated"]["loss"] for node in found["nodes"].values())
    assert found["local"]["loss"] < found["base"]["loss"]


def _tampered(node: int, round_: int, change: Any) -> Any:
    """Change the update of one node in one round (rounds are counted from 0)."""

    def tamper(reply: Message, source: int) -> Message:
        is_update = not reply.has_error() and "payload" in reply.content
        if source == node and is_update and reply.metadata.group_id == str(round_):
            change(reply)
        return reply

    return tamper


def test_an_update_that_is_not_finite_leaves_that_client_out_and_the_round_goes_on(
    lab: Lab, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = lm_model.LoraModel.read, {"n": 0}

    def read(self: lm_model.LoraModel) -> Any:
        adapter = original(self)
        if self.components == 4 and self.frozen == "a":  # client-1 in round 0, after training
            calls["n"] += 1
            next(iter(adapter.layers.values())).b[:] = np.nan
        return adapter

    monkeypatch.setattr(lm_model.LoraModel, "read", read)
    run = lab("method=sealed")
    text = said(capsys)
    assert calls["n"] and re.search(r"round 1: left out client-1: RangeError: .*NaN or infinite", text)
    assert "round 1/2: 3 of 4 clients" in text and "round 2/2: 4 of 4 clients" in text
    assert summary(run)["status"] == "completed"


def test_a_client_left_out_of_one_round_is_brought_up_to_date_in_the_next(lab: Lab) -> None:
    def drop(reply: Message) -> None:
        reply.content["payload"] = ArrayRecord()

    run = lab("method=sealed federation.rounds=4", tamper=_tampered(103, 1, drop))
    states = [load_file(run / "clients" / f"client-{k}/state/adapter.safetensors") for k in (2, 3)]
    assert all(np.array_equal(states[0][n], states[1][n]) for n in states[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-1], "FormatError|bytes where"),
        (lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:], "damaged"),
        (lambda data: b"", "too few"),
        (lambda data: b"\xff" * len(data), "not a ciphertune message"),
    ],
)
def test_a_damaged_update_is_named_and_left_out(
    lab: Lab, capsys: pytest.CaptureFixture[str], change: Any, reason: str
) -> None:
    def damage(reply: Message) -> None:
        values, payload = flower.unpack(reply.content)
        reply.content = flower.pack(values, [change(payload[0])])

    run = lab("method=sealed", tamper=_tampered(102, 0, damage))
    assert re.search(f"round 1: left out client-2: .*({reason})", said(capsys))
    assert summary(run)["status"] == "completed"


def test_a_replayed_update_of_an_earlier_round_is_refused(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    kept: list[bytes] = []

    def tamper(reply: Message, source: int) -> Message:
        if source == 101 and "payload" in reply.content:
            values, payload = flower.unpack(reply.content)
            kept.append(payload[0])
            reply.content = flower.pack(values, [kept[0]])
        return reply

    lab("method=fedavg", tamper=tamper)
    assert "round 2: left out client-1: the message is of round 0, expected 1" in said(capsys)


def test_a_round_with_fewer_than_the_minimum_of_updates_fails_the_run_in_plain_words(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    def tamper(reply: Message, source: int) -> Message:
        if source != 103 and "payload" in reply.content:
            reply.content["payload"] = ArrayRecord()
        return reply

    with pytest.raises(Exception, match=r"fewer than federation\.min_contributors"):
        lab("method=sealed", tamper=tamper)
    (run,) = lab.runs.iterdir()
    assert summary(run)["status"] == "failed" and "min_contributors" in summary(run)["reason"]
    assert not list(run.glob("server/*.msg"))
    assert "run failed after" in said(capsys)


def test_fewer_clients_than_the_minimum_fail_the_run_at_once_in_simulation(lab: Lab) -> None:
    with pytest.raises(Exception, match=r"4 of at least 5 clients \(federation.min_clients\) have joined"):
        lab("federation.min_clients=5")


def test_fewer_clients_than_the_minimum_are_waited_for_and_then_fail_the_run(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = {7: {"name": "lab-a", "data-path": str(tmp_path / "lab-0.jsonl"), "allow-clear": True}}
    with pytest.raises(Exception, match=r"1 of at least 4 clients"):
        lab("method=fedavg federation.wait_timeout=1.5", nodes=nodes)
    assert "waiting up to 2 s: 1 of at least 4 clients (federation.min_clients) have joined (lab-a)" in said(capsys)


def test_a_client_with_another_key_is_left_out_and_both_fingerprints_are_shown(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ciphertune.cli import main

    for name in ("good", "other"):
        assert (
            main(["keys", "create", "--out", str(tmp_path / f"{name}.key"), "--app", str(Path(__file__).parents[1])])
            == 0
        )
    good, other = re.findall(r"fingerprint (\w+)", said(capsys))
    nodes = {
        k: {
            "name": f"lab-{k}",
            "data-path": str(tmp_path / f"lab-{k}.jsonl"),
            "rank": 2,
            "key-file": str(tmp_path / ("other.key" if k == 2 else "good.key")),
        }
        for k in range(4)
    }
    run = lab("federation.min_clients=3", nodes=nodes)
    assert f"left out lab-2: lab-2 holds key {other}, the others hold {good}" in said(capsys)
    assert set(summary(run)["nodes"]) == {"lab-0", "lab-1", "lab-3"}


def test_a_client_under_other_settings_is_refused(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    original = type(lab.grid).push_messages if lab.grid else None
    assert original is None
    import grid

    class Split(grid.LocalGrid):
        def push_messages(self, messages: Any) -> Any:
            ids = []
            for message in messages:
                config = dict(self.run_config)
                if message.metadata.dst_node_id == 101:
                    self.run_config = config | {"overrides": config["overrides"] + " training.learning_rate=0.5"}
                ids += list(super().push_messages([message]))
                self.run_config = config
            return ids

    import federations

    federations.LocalGrid, kept = Split, federations.LocalGrid  # type: ignore[misc]
    try:
        lab("federation.min_clients=3")
    finally:
        federations.LocalGrid = kept  # type: ignore[misc]
    assert re.search(r"left out client-1: SettingsMismatchError: this client's settings differ", said(capsys))


def test_a_real_nodes_error_text_stays_on_the_node(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes: dict[int, dict[str, Any]] = {
        k: {"name": f"lab-{k}", "data-path": str(tmp_path / f"lab-{k}.jsonl"), "rank": 2, "allow-clear": True}
        for k in range(3)
    }
    nodes[3] = {"name": "lab-3", "data-path": str(tmp_path / "secret-patients.jsonl"), "allow-clear": True}
    lab("method=fedavg federation.min_clients=3", nodes=nodes)
    lines = said(capsys).splitlines()
    server = [line for line in lines if "left out" in line]
    assert len(server) == 1 and "DataError: see its own log" in server[0] and "secret-patients" not in server[0]
    assert any(line.startswith("ciphertune | lab-3: DataError:") and "secret-patients" in line for line in lines)


def test_a_node_without_a_key_file_is_told_how_to_get_one(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = {5: {"name": "lab-a", "data-path": str(tmp_path / "lab-0.jsonl")}}
    with pytest.raises(Exception, match="0 of at least"):
        lab("federation.wait_timeout=1", nodes=nodes)
    assert "ciphertune keys create --out FILE" in said(capsys)


def test_a_fraction_of_the_clients_is_asked_and_the_others_catch_up(lab: Lab) -> None:
    run = lab("method=sealed federation.rounds=5 federation.fraction=0.5")
    asked = [[r["node"] for r in rounds(run) if r["stage"] == "update" and r["round"] == t] for t in range(5)]
    assert all(len(a) == 2 for a in asked) and len({tuple(a) for a in asked}) > 1
    high, twin = (load_file(run / "clients" / f"client-{k}/state/adapter.safetensors") for k in (2, 3))
    assert all(np.array_equal(high[n], twin[n]) for n in high)


@pytest.mark.parametrize("method", ["sealed", "fedavg", "rolora"])
def test_at_unequal_ranks_the_mean_is_that_of_the_whole_adapters_of_all(
    lab: Lab, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every client trains its own components within the one adapter that all hold."""
    trained: list[tuple[int, dict[str, Any]]] = []

    def seen(update: Adapter, base: Adapter, *more: Any) -> Adapter:
        whole = {}
        for name, own in update.layers.items():
            a, b = base.layers[name].a.astype(np.float64), base.layers[name].b.astype(np.float64)
            a[: own.rank], b[:, : own.rank] = own.a, own.b
            whole |= {f"{name}.a": a, f"{name}.b": b}
        trained.append((update.rank, whole))
        return damped(update, base, *more)

    monkeypatch.setattr(client, "damped", seen)
    run = lab(f"method={method} federation.rounds=3 record_updates=true")
    sizes = [r["samples"] for r in rounds(run) if r["stage"] == "update" and r["round"] == 0]
    for round_ in range(2):
        whole = trained[4 * round_ : 4 * round_ + 4]
        assert sorted(rank for rank, _ in whole) == [2, 4, 8, 8]
        for node in range(4):
            mean = load_file(run / f"clients/client-{node}/round_{round_:04d}/received.safetensors")
            for name in whole[0][1]:
                wanted = np.average([values[name] for _, values in whole], axis=0, weights=sizes)
                np.testing.assert_allclose(mean[name], wanted, atol=1e-5)


def test_components_that_only_one_client_has_do_not_train_and_are_not_sent(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it alone learned there would be missing in what the others get (docs/results.md: unequal ranks)."""
    ranks = "federation.clients=[{rank:4},{rank:8},{rank:8},{rank:16}]"
    run = lab(f"method=sealed federation.rounds=4 '{ranks}'")
    sent = {r["node"]: r["bytes_up"] for r in rounds(run) if r["stage"] == "update" and r["round"] == 0}
    assert sent["client-3"] == sent["client-2"] > sent["client-0"]
    saved = load_file(run / "clients/client-3/adapter/adapter_model.safetensors")
    other = load_file(run / "clients/client-2/adapter/adapter_model.safetensors")
    assert {v.shape[0] for n, v in saved.items() if "lora_A" in n} == {8}
    assert all(np.array_equal(saved[name], other[name]) for name in other)
    assert said(capsys).count("client-3: trains the first 8 components of its 16: too few clients have more") == 1


def test_padded_components_that_only_one_client_has_stay_as_they_were_drawn(lab: Lab) -> None:
    ranks = "federation.clients=[{rank:4},{rank:8},{rank:8},{rank:16}]"
    words = f"method=hetlora model.release=float32 '{ranks}'"
    saved = load_file(lab(words) / "clients/client-3/adapter/adapter_model.safetensors")
    settings = compose(CONF, f"{lab.base} {words}")
    fresh = lm_model.load(settings.model, rank=16, device="cpu", seed=settings.seed).read()
    for name, initial in fresh.layers.items():
        a, b = (next(v for k, v in saved.items() if f"{name}.{part}" in k) for part in ("lora_A", "lora_B"))
        assert np.array_equal(a[8:], initial.a[8:]) and not b[:, 8:].any()
        assert (a[:8] != initial.a[:8]).any() and b[:, :8].all()


def test_a_clients_data_is_read_once_so_that_its_weight_cannot_change_during_the_run(
    lab: Lab, monkeypatch: Any, tmp_path: Path
) -> None:
    from ciphertune import client as client_module

    original = client_module.join

    def join(client: Client) -> Any:
        if client.node.name == "client-2":  # new lines arrive after it has joined
            file = tmp_path / "lab-2.jsonl"
            file.write_text(file.read_text() * 3)
        return original(client)

    monkeypatch.setattr(client_module, "join", join)
    run = lab("method=sealed")
    found = [r["node"] for r in rounds(run) if r["stage"] == "update"]
    assert found.count("client-2") == 2  # no round was refused for a wrong weight


def test_one_step_that_goes_to_nan_does_not_exclude_the_client_from_later_rounds(
    lab: Lab, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from ciphertune.lm import train as lm_train

    original, state = lm_train.loss_sum, {"left": 1}

    def loss_sum(model: Any, batch: Any) -> Any:
        summed, logits = original(model, batch)
        if model.components == 4 and model.model.training and state["left"]:
            state["left"] -= 1
            summed = summed * float("nan")
        return summed, logits

    monkeypatch.setattr(lm_train, "loss_sum", loss_sum)
    run = lab("method=sealed federation.rounds=5")
    assert said(capsys).count("left out client-1") == 1
    found = [r["round"] for r in rounds(run) if r["stage"] == "update" and r["node"] == "client-1"]
    assert found == [1, 2, 3, 4]


def _reported(key: str, value: Any) -> Any:
    def tamper(reply: Message, source: int) -> Message:
        if source == 101 and "payload" in reply.content:
            values, payload = flower.unpack(reply.content)
            reply.content = flower.pack(values | {key: value}, payload)
        return reply

    return tamper


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss", 1e999),
        ("tokens", 10**400),
        ("train_loss", 10**400),
        ("seconds", {"train": 10**400}),
        ("metrics", {"perplexity": float("nan")}),
        ("error", "\udc00\x1b[2J"),
    ],
)
def test_a_report_made_to_end_the_run_leaves_only_its_sender_out(
    lab: Lab, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    run = lab("method=fedavg federation.rounds=1", tamper=_reported(key, value))
    assert "round 1/1: 3 of 4 clients" in said(capsys)
    assert summary(run)["status"] == "completed"
    assert not [r for r in rounds(run) if r["node"] == "client-1" and r["stage"] == "update"]


def test_a_key_file_that_was_named_is_never_made_even_in_simulation(lab: Lab, tmp_path: Path) -> None:
    clients = f"federation.clients=[{','.join(f'{{rank:4,key_file:{tmp_path}/no.key}}' for _ in range(4))}]"
    with pytest.raises(Exception, match=r"no\.key does not exist: make one with `ciphertune keys create"):
        lab(f"method=sealed '{clients}'")
    assert not (tmp_path / "no.key").exists()


def test_a_mistake_that_all_clients_share_is_said_once(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="client-0, client-1, client-2, client-3: ModelError"):
        lab("model.targets=[q_prj]")
    assert said(capsys).count("is no linear layer") == 1


def test_a_classifier_is_tuned_with_its_head_averaged_under_encryption(lab: Lab, tmp_path: Path) -> None:
    from tiny import SENTENCES, tiny_bert, write_lines

    model = tiny_bert(tmp_path / "bert")
    for k in range(4):
        rows = [{"text": t, "label": ("no", "yes")[i % 2]} for i, t in enumerate(SENTENCES[: 4 + k])]
        write_lines(tmp_path / f"class-{k}.jsonl", rows)
    run = lab(
        f"method=sealed model=classifier model.name={model} data.labels=[no,yes] "
        f"data.path={tmp_path}/class-{{client}}.jsonl "
        f"data.heldout_path={tmp_path}/class-3.jsonl model.max_length=32 record_updates=true federation.rounds=3"
    )
    found = summary(run)
    assert found["status"] == "completed" and set(found["federated"]["metric"]) == {"accuracy", "f1"}
    names = [n for n in load_file(run / "clients/client-0/state/adapter.safetensors") if "classifier" in n]
    assert names
    for round_ in (0, 1):  # the head travels in every round, whichever factor does
        updates = [load_file(run / f"clients/client-{k}/round_{round_:04d}/update.safetensors") for k in range(4)]
        received = load_file(run / f"clients/client-2/round_{round_:04d}/received.safetensors")
        weights = np.array([found["nodes"][f"client-{k}"]["samples"] for k in range(4)], np.float64)
        for name in names:
            mean = sum(w * u[name].astype(np.float64) for w, u in zip(weights, updates, strict=True)) / weights.sum()
            assert np.allclose(received[name], mean, atol=1e-6)


def test_a_hub_data_set_divided_by_a_natural_id_is_tuned_on(lab: Lab, tmp_path: Path) -> None:
    """The real loading code on a folder in the hub's layout: one site per client."""
    from tiny import SENTENCES, write_lines

    hub = tmp_path / "hub"
    hub.mkdir()
    rows = [{"text": t, "site": f"site-{i % 4}"} for i, t in enumerate(SENTENCES * 3)]
    write_lines(hub / "train.jsonl", rows)
    run = lab(
        f"data=hf data.dataset={hub} data.partition=natural data.partition_by=site data.heldout_path='' "
        "data.heldout_fraction=0.3 federation.rounds=1"
    )
    found = summary(run)
    assert found["status"] == "completed"
    assert [n["samples"] for n in found["nodes"].values()] == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("method", "factor"), [("sealed", 2.0), ("fedavg", 1.0), ("sealed method.rate_factor=0.5", 0.5)]
)
def test_a_factor_that_moves_alone_takes_twice_the_step(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, method: str, factor: float
) -> None:
    from ciphertune import client as client_module

    seen: list[float] = []

    def train(model: Any, data: Any, settings: Any, **more: Any) -> Any:
        seen.append(settings.learning_rate)
        return original(model, data, settings, **more)

    original = client_module.lm_train.train
    monkeypatch.setattr(client_module.lm_train, "train", train)
    lab(f"method={method} federation.rounds=1")
    assert seen == [0.01 * factor] * 4
