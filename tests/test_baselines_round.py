"""The baselines as whole federations: what travels, what every client ends with, and every file of conf/method."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federations import Lab, rounds, said, summary
from flwr.app import Message
from grid import simulated
from safetensors.numpy import load_file
from tiny import SENTENCES, tiny_bert, write_lines
from transformers import AutoModelForCausalLM

from ciphertune import client, flower, state
from ciphertune.cli import _parse
from ciphertune.crypto.indices import permutation
from ciphertune.lm import cache as lm_cache
from ciphertune.lm import model as lm_model
from ciphertune.lm import train as lm_train
from ciphertune.settings import compose
from tests.baseline_cases import CONF, CONTRIBUTOR, DIGEST, HEADER, composed_once
from tests.oracle import Matrix, read

__all__ = ["composed_once"]  # a fixture for every test
RUN = 4242  # of federations.Lab
WHOLE = "model.release=float32"  # what is saved is not rounded
LONE = HEADER + CONTRIBUTOR + DIGEST  # bytes of an update without values
Values = dict[str, Matrix]


def values(run: Path, node: int, round_: int, kind: str = "update") -> Values:
    """What a client sent in a round, or the mean of it that it received."""
    return load_file(run / f"clients/client-{node}/round_{round_:04d}/{kind}.safetensors")


def finished(run: Path, node: int) -> Values:
    """The PEFT folder's adapter, with the names that `values` has."""
    found = load_file(run / f"clients/client-{node}/adapter/adapter_model.safetensors")
    short = {k.removeprefix("base_model.model."): v for k, v in found.items()}
    return {k.replace(".lora_A.weight", ".a").replace(".lora_B.weight", ".b"): v for k, v in short.items()}


def dense(update: Values) -> Values:
    """B A per layer, in float64."""
    layers = sorted(n[:-2] for n in update if n.endswith(".a"))
    return {n: update[f"{n}.b"].astype(np.float64) @ update[f"{n}.a"].astype(np.float64) for n in layers}


def mean(weights: Sequence[float], found: Sequence[Values]) -> Values:
    """The weighted mean, by name."""
    shares = np.array(weights, np.float64) / sum(weights)
    return {n: sum(w * f[n] for w, f in zip(shares, found, strict=True)) for n in found[0]}


def samples(run: Path, *nodes: int) -> list[float]:
    return [summary(run)["nodes"][f"client-{k}"]["samples"] for k in nodes]


def same(one: Values, two: Values) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(x, two[n]) for n, x in one.items())


def classifier(lab: Lab, text: Sequence[str] = SENTENCES, only: Sequence[int] = range(5)) -> str:
    """A task with a head; writes the data of the clients `only`, and as that of number 4 what is held out."""
    if not (lab.folder / "bert").exists():
        tiny_bert(lab.folder / "bert")
    for k in only:
        rows = [{"text": t, "label": ("no", "yes")[i % 2]} for i, t in enumerate(text[: 4 + k])]
        write_lines(lab.folder / f"class-{k}.jsonl", rows)
    return (
        f"model=classifier model.name={lab.folder}/bert data.labels=[no,yes] model.max_length=32 "
        f"data.path={lab.folder}/class-{{client}}.jsonl data.heldout_path={lab.folder}/class-4.jsonl"
    )


def failing(node: int, round_: int) -> Callable[[Message, int], Message]:
    """A client whose training of a round fails after the server asked for it."""

    def tamper(reply: Message, source: int) -> Message:
        if (source, reply.metadata.message_type, reply.metadata.group_id) == (node, "train", str(round_)):
            gone = {"error": "OSError", "line": "disk full", "name": f"client-{node - 100}", "simulated": True}
            reply.content = flower.pack(gone, [])
        return reply

    return tamper


# ---------------------------------------------------------------------------------------------------- every method file

FILES = sorted(p.stem for p in (CONF / "method").glob("*.yaml"))
PAPERS = {
    "dp_lora": "1710.06963",
    "fedavg": "2305.05644",
    "fedshield": "2506.05640",
    "drop_columns": "2505.21051",
    "ffa_lora": "2403.12313",
    "flexlora": "2402.11505",
    "flora": "2409.05976",
    "full_he": "2505.21051",
    "hetlora": "2401.06432",
    "maskcrypt": "IEEE TDSC 2024",
    "rolora": "2502.01755",
    "she_lora": "2505.21051",
}
OURS = {"local", "sealed"}  # of no paper
CLIENTS = "federation.clients='[{rank:4,budget:0.1},{rank:4,budget:0.3}]' federation.min_clients=2 training.steps=1"


@pytest.mark.parametrize("method", FILES)
def test_method_file_names_its_source_and_the_command_it_gives_runs(lab: Lab, method: str) -> None:
    command, source, *_ = (CONF / f"method/{method}.yaml").read_text().splitlines()
    found = re.fullmatch(r"# ciphertune (run [^()]+?)( \(.+\))?", command)
    assert found, command
    words = _parse(found[1].split()).overrides
    assert compose(CONF, words).method.name == method
    assert source.startswith("# ") and len(source) > 40
    assert method in OURS or PAPERS[method] in source
    run = lab(f"{' '.join(words)} {CLIENTS}", nodes=simulated(2))
    result = summary(run)
    assert (result["status"], result["method"], result["rounds"]) == ("completed", method, 2)
    updates = [(r["round"], r["node"]) for r in rounds(run) if r["stage"] == "update"]
    assert updates == [(k, f"client-{n}") for k in (0, 1) for n in range(2)]
    assert result["federated"]["loss"] != result["base"]["loss"]


# ---------------------------------------------------------------------------------------------------------------- local


def test_local_client_ends_exactly_where_training_directly_ends_and_sends_nothing(lab: Lab) -> None:
    more = f"method=local {WHOLE} {classifier(lab)} federation.rounds=3 record_server_view=true record_updates=true"
    run = lab(more)
    views = sorted((run / "server_view").rglob("*.msg"))
    assert len(views) == 12 and {len(v.read_bytes()) for v in views} == {LONE}
    assert {len(m.read_bytes()) for m in (run / "server").glob("*.msg")} == {LONE + 3 * CONTRIBUTOR}
    settings = compose(CONF, f"{lab.base} {more}")
    for node, rank in enumerate((2, 4, 8, 8)):
        name = f"client-{node}"
        data = lm_cache.load_data(run / f"clients/{name}/state/data.safetensors", run=RUN)
        model = lm_model.load(settings.model, rank=rank, labels=("no", "yes"), device="cpu", seed=settings.seed)
        for round_ in range(3):
            seed = int.from_bytes(hashlib.sha256(f"0 {name} {round_}".encode()).digest()[:4], "little")
            moments = lab.folder / f"{name}.safetensors"
            lm_train.train(model, data.train, settings.training, seed=seed, state=moments)
            state.record(lab.folder / "direct.safetensors", model.read())
            direct = load_file(lab.folder / "direct.safetensors")
            assert same(values(run, node, round_), direct)  # own components and heads go on from round to round
        assert same(finished(run, node), direct)
        first, last = values(run, node, 0), values(run, node, 2)
        assert all((first[n] != last[n]).any(axis=-1).all() for n in first if not n.endswith("bias"))


def test_local_client_does_not_notice_what_the_others_have(lab: Lab) -> None:
    more = f"method=local {classifier(lab)}"
    one = lab(more)
    lab.runs = lab.folder / "again"
    classifier(lab, [f"{t} again and again" for t in SENTENCES[::-1]], only=[0, 1, 2])
    two = lab(more)
    assert same(finished(one, 3), finished(two, 3))
    for node in range(3):
        assert not same(finished(one, node), finished(two, node))
        assert not same(finished(one, node), finished(one, 3))


# ----------------------------------------------------------------------------------------------------------- one factor


def test_ffa_lora_a_is_the_initial_one_to_the_bit_after_all_rounds_and_b_and_head_travel(lab: Lab) -> None:
    more = f"method=ffa_lora {WHOLE} {classifier(lab)} federation.rounds=3 record_updates=true record_server_view=true"
    run = lab(more)
    settings = compose(CONF, f"{lab.base} {more}")
    whole = lm_model.load(settings.model, rank=8, labels=("no", "yes"), device="cpu", seed=settings.seed).read()
    for node, rank in enumerate((2, 4, 8, 8)):
        model = lm_model.load(settings.model, rank=rank, labels=("no", "yes"), device="cpu", seed=settings.seed).read()
        sent = [values(run, node, k) for k in range(3)]
        for name, factors in model.layers.items():
            assert np.array_equal(finished(run, node)[f"{name}.a"], whole.layers[name].a)
            assert all(np.array_equal(found[f"{name}.a"], factors.a) for found in sent)
            assert all((found[f"{name}.b"] != 0).all() for found in sent)
        travels = sum(h.size for h in model.heads.values()) + sum(f.b.size for f in model.layers.values())
        for round_ in range(3):
            view = (run / f"server_view/round_{round_:04d}/client-{node}.msg").read_bytes()
            assert len(view) == LONE + 4 * travels
    for round_ in range(2):
        sent = [values(run, k, round_) for k in range(4)]
        heads = [{n: v for n, v in s.items() if not n.endswith((".a", ".b"))} for s in sent]
        assert heads[0]
        for n, expected in mean(samples(run, 0, 1, 2, 3), heads).items():
            assert np.allclose(values(run, 1, round_, "received")[n], expected, rtol=1e-6, atol=1e-7)


def test_rolora_alternates_and_is_sealed_without_encryption_to_the_bit(lab: Lab) -> None:
    runs = []
    for method in ("rolora", "sealed crypto=clear"):
        lab.runs = lab.folder / method[:6]
        runs.append(lab(f"method={method} federation.rounds=3 record_updates=true"))
    for node in range(4):
        for k in range(3):
            assert same(*(values(run, node, k) for run in runs))
        assert same(*(finished(run, node) for run in runs))
        sent = [values(runs[0], node, k) for k in range(3)]
        means = [values(runs[0], node, k, "received") for k in range(2)]
        for name in dense(sent[0]):
            a, b, rank = f"{name}.a", f"{name}.b", (2, 4, 8, 8)[node]
            for mean_ in means:  # of the eight components that all hold
                mean_[a], mean_[b] = mean_[a][:rank], mean_[b][:, :rank]
            assert np.array_equal(sent[1][b], means[0][b]) and np.array_equal(sent[2][a], means[1][a])
            assert (sent[1][a] != means[0][a]).any() and (sent[2][b] != means[1][b]).any()
            assert np.array_equal(sent[0][a], means[0][a])  # as drawn: it did not train and did not travel


# -------------------------------------------------------------------------------------------------------------- hetlora


def test_hetlora_weighs_by_the_norms_of_the_updates_also_when_one_asked_does_not_reply(lab: Lab) -> None:
    run = lab("method=hetlora federation.rounds=3 record_updates=true record_server_view=true", tamper=failing(101, 1))
    for round_, nodes in ((0, (0, 1, 2, 3)), (1, (0, 2, 3))):
        sent = [values(run, k, round_) for k in nodes]
        norms = [2.0 * float(np.sqrt(sum(np.square(d).sum() for d in dense(s).values()))) for s in sent]  # 16 / 8
        views = [(run / f"server_view/round_{round_:04d}/client-{k}.msg").read_bytes() for k in nodes]
        stated = [int(read(v, "contributor samples")) for v in views]
        assert stated == pytest.approx([1e6 * n for n in norms], abs=1.0)
        assert len(set(stated)) == len(nodes)
        padded = []
        for s in sent:
            a = {n: np.pad(x.astype(np.float64), ((0, 8 - len(x)), (0, 0))) for n, x in s.items() if n.endswith(".a")}
            b = {n: np.pad(x.astype(np.float64), ((0, 0), (0, 8 - x.shape[1]))) for n, x in s.items() if n not in a}
            padded.append(a | b)
        for n, expected in mean(norms, padded).items():
            for node, rank in ((0, 2), (3, 8)):
                mine = expected[:rank] if n.endswith(".a") else expected[:, :rank]
                assert np.abs(values(run, node, round_, "received")[n] - mine).max() < 1e-4 * np.abs(expected).max()


# ---------------------------------------------------------------------------------------------------------------- flora

TOKENS = torch.tensor([[1, 40, 7, 99, 250, 31, 5]])


def logits(model: Any) -> Matrix:
    with torch.inference_mode():
        return model(TOKENS).logits.numpy().astype(np.float64)


def test_flora_model_is_the_base_with_all_updates_so_far_and_the_adapter_starts_anew(
    lab: Lab, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds. client-3 is away in round 1; in round 2 client-2's process dies between merging and its state."""
    seen: dict[str, list[tuple[Matrix, Values]]] = {f"client-{k}": [] for k in range(4)}

    def spied(one: client.Client) -> dict[str, Any]:
        state.record(lab.folder / "spied.safetensors", one.model.read())
        seen[one.node.name].append((logits(one.model.model), load_file(lab.folder / "spied.safetensors")))
        return evaluate(one)

    def dying(path: Path, *args: Any, **more: Any) -> None:
        if "client-2" in str(path) and more["round_"] == 1 and not died:
            died.append(path)
            raise OSError("power cut")
        save_state(path, *args, **more)

    def away(reply: Message, source: int) -> Message:
        kind, round_ = reply.metadata.message_type, reply.metadata.group_id
        if lab.grid and (kind, round_, source) in (("train", "0", 103), ("train", "1", 100)):
            lab.grid.nodes = {k: v for k, v in everybody.items() if k != 103 or round_ == "1"}
        return reply

    died: list[Path] = []
    everybody, evaluate, save_state = simulated(4), client._evaluate, client.save_state
    monkeypatch.setattr(client, "_evaluate", spied)
    monkeypatch.setattr(client, "save_state", dying)
    ranks = "federation.clients='[{rank:4},{rank:8},{rank:8},{rank:8}]'"
    run = lab(f"method=flora {WHOLE} {ranks} federation.rounds=3 record_updates=true", tamper=away)
    assert died and summary(run)["status"] == "completed"

    took_part = [(0, 1, 2, 3), (0, 1, 2), (0, 1, 3)]
    found = [(r["round"], int(r["node"][-1])) for r in rounds(run) if r["stage"] == "update"]
    assert found == [(k, n) for k, nodes in enumerate(took_part) for n in nodes]
    model, totals = AutoModelForCausalLM.from_pretrained(llama).eval(), []
    merged: Values = {}
    by_hand = [logits(model)]
    for round_, nodes in enumerate(took_part):
        update = mean(samples(run, *nodes), [dense(values(run, k, round_)) for k in nodes])
        for name, change in update.items():
            merged[name] = merged.get(name, 0.0) + 2.0 * change  # alpha / r = 16 / 8
            with torch.no_grad():
                model.get_submodule(name).weight += torch.from_numpy(2.0 * change).float()
        totals.append({n: x.copy() for n, x in merged.items()})
        by_hand.append(logits(model))
    assert all(np.abs(x - y).max() > 0.01 for x, y in pairwise(by_hand))

    when = {0: (0, 1, 2, 3), 1: (0, 1, 2, 3), 2: (0, 1, 3), 3: (0, 2, 3)}  # rounds merged at each look of each client
    for node, merged_rounds in when.items():
        looks = seen[f"client-{node}"]
        start = looks[0][1]
        for (outputs, adapter), count in zip(looks, merged_rounds, strict=True):
            assert np.abs(outputs - by_hand[count]).max() < 1e-5 * np.abs(by_hand[count]).max()
            assert same(adapter, start)
        assert all(not x.any() for n, x in start.items() if n.endswith(".b"))
        kept = load_file(run / f"clients/client-{node}/adapter/merged.safetensors")
        for name, expected in totals[-1].items():
            assert np.abs(kept[name] - expected).max() < 1e-6 * np.abs(expected).max()
        assert same(finished(run, node), start)


def test_flora_works_when_one_client_alone_has_the_largest_rank(lab: Lab) -> None:
    run = lab("method=flora federation.clients='[{rank:2},{rank:8}]' federation.min_clients=2", nodes=simulated(2))
    assert summary(run)["status"] == "completed"


def test_flora_client_that_lost_its_sum_is_sent_all_of_it_again_or_stops(lab: Lab) -> None:
    def losing(reply: Message, source: int) -> Message:
        if (source, reply.metadata.message_type, reply.metadata.group_id) == (101, "train", "1"):
            (lost,) = lab.runs.rglob("client-1/state/merged-*")
            lost.unlink()  # its adapter's state says that it holds round 0
        return reply

    ranks = "federation.clients='[{rank:4},{rank:4}]' federation.min_clients=2"
    run = lab(f"method=flora {ranks}", nodes=simulated(2), tamper=losing)
    one, two = (run / f"clients/client-{k}/adapter/merged.safetensors" for k in (0, 1))
    assert not two.exists() or same(load_file(one), load_file(two))


# --------------------------------------------------------------------------------------------------------- drop_columns

BUDGETS = (0.0, 0.1, 0.3, 1.0)
DROP = "federation.clients='[{rank:2,budget:0.0},{rank:4,budget:0.1},{rank:8,budget:0.3},{rank:8,budget:1.0}]'"


def best(matrix: Matrix, rank: int) -> Matrix:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_drop_columns_negotiates_and_leaves_out_what_was_agreed(lab: Lab) -> None:
    run = lab(f"method=drop_columns {DROP} record_updates=true method.rank_cap=64")
    plan = json.loads((run / "plan.json").read_text())
    assert plan["budgets"] == list(BUDGETS)
    assert [r["node"] for r in rounds(run) if r["stage"] == "negotiation"] == [f"client-{k}" for k in range(4)]
    material = hashlib.sha256(f"no keycolumn codes of run {RUN}".encode()).digest()
    counts = (0, 3, 10, 32)  # of 32 columns
    for round_ in (0, 1):
        zeroed = []
        for node, count in enumerate(counts):
            sent = values(run, node, round_)
            for layer, agreed in zip(plan["layers"], plan["columns"], strict=True):
                by_column = permutation(material, layer["name"], 32)
                sent[f"{layer['name']}.a"][:, np.isin(by_column, agreed[:count])] = 0.0
            zeroed.append(dense(sent))
        expected = mean(samples(run, 0, 1, 2, 3), zeroed)
        for node, rank in enumerate((2, 4, 8, 8)):
            for name, got in dense(values(run, node, round_, "received")).items():
                assert np.abs(got - best(expected[name], rank)).max() < 1e-5 * np.abs(expected[name]).max()
    updates = [r for r in rounds(run) if r["stage"] == "update"]
    for r in updates:
        node = int(r["node"][-1])
        rank = (2, 4, 8, 8)[node]
        every = rank * (4 * 32 + 2 * 32 + 2 * 16)  # flexlora's: A of four layers, B of two query and two value layers
        assert r["bytes_up"] == LONE + 4 * (every - rank * 4 * counts[node])
        assert r["values_cipher"] == r["cipher_bytes"] == 0
    assert len(updates) == 8


def test_drop_columns_does_not_say_that_it_encrypts(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    clients = "federation.clients='[{rank:2,budget:0.2},{rank:2,budget:0.2}]' federation.min_clients=2"
    lab(f"method=drop_columns {clients} federation.rounds=1", nodes=simulated(2))
    assert not re.search(r"encrypts \d+|encrypt dropped", said(capsys))


# ------------------------------------------------------------------------------------------------------- unequal ranks


def test_a_client_that_stays_silent_does_not_shrink_what_the_others_send_in_the_next_round(lab: Lab) -> None:
    told: list[tuple[int, list[float]]] = []

    def spy(message: Message) -> None:
        values, _ = flower.unpack(message.content)
        told.append((values["round"], values["shares"]))

    run = lab("method=sealed federation.rounds=3", outgoing=("train", spy), tamper=failing(100, 0))
    low, *_ = weights = samples(run, 0, 1, 2, 3)
    without = 1 - low / sum(weights)
    assert [shares[1] for round_, shares in told if round_ == 0] == pytest.approx([without] * 4)
    assert [shares[1] for round_, shares in told if round_ == 1] == [1.0] * 4
    assert [shares[1] for round_, shares in told if round_ == 2] == pytest.approx([without] * 4)  # it answered again
