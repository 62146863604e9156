"""SHE-LoRA as whole federations: negotiation over real messages, clients that come, go and answer badly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import Lab, rounds, said, summary
from flwr.app import Message
from grid import simulated
from safetensors.numpy import load_file

from ciphertune import exchange, flower, wishes
from ciphertune.build_client import generate_key
from ciphertune.crypto import keys
from ciphertune.errors import FederationError
from ciphertune.settings import compose

CONF = Path(__file__).parents[1] / "conf"
CLIENTS = "federation.clients='[{rank:2,budget:0.0},{rank:4,budget:0.1},{rank:8,budget:0.3},{rank:8,budget:1.0}]'"
SHE = f"method=she_lora {CLIENTS}"


def plan_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "plan.json").read_text())
    return found


def dense(run: Path, node: int, round_: int, kind: str) -> dict[str, Any]:
    """dW / scale per layer of what a client sent or got, in float64."""
    values = load_file(run / f"clients/client-{node}/round_{round_:04d}/{kind}.safetensors")
    layers = sorted(n[:-2] for n in values if n.endswith(".a"))
    return {n: values[f"{n}.b"].astype(np.float64) @ values[f"{n}.a"].astype(np.float64) for n in layers}


def best(matrix: Any, rank: int) -> Any:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("method", [SHE, f"{SHE} crypto=clear", "method=flexlora"], ids=["ckks", "clear", "flexlora"])
def test_every_client_receives_the_best_adapter_of_its_rank_for_the_true_update(lab: Lab, method: str) -> None:
    run = lab(f"{method} record_updates=true method.rank_cap=64")
    samples = np.array([n["samples"] for n in summary(run)["nodes"].values()], np.float64)
    for round_ in (0, 1):
        sent = [dense(run, k, round_, "update") for k in range(4)]
        for node, rank in enumerate((2, 4, 8, 8)):
            for layer, got in dense(run, node, round_, "received").items():
                true = sum(w * s[layer] for w, s in zip(samples / samples.sum(), sent, strict=True))
                assert np.abs(got - best(true, rank)).max() < 1e-5 * np.abs(true).max()
    assert summary(run)["federated"]["loss"] < summary(run)["base"]["loss"]


def test_she_lora_in_the_clear_is_flexlora(lab: Lab, tmp_path: Path) -> None:
    one = summary(lab(f"{SHE} crypto=clear method.rank_cap=64"))["federated"]["loss"]
    lab.runs = tmp_path / "flexlora"
    assert one == pytest.approx(summary(lab("method=flexlora"))["federated"]["loss"], abs=1e-4)


def test_each_client_encrypts_the_share_it_asked_for_and_the_plan_says_so(lab: Lab) -> None:
    run = lab(SHE)
    plan = plan_of(run)
    assert plan["budgets"] == [0.0, 0.1, 0.3, 1.0]
    assert [m["budget"] for m in plan["members"]] == [0.0, 0.1, 0.3, 1.0]
    assert all(len(set(codes)) == len(codes) == 32 for codes in plan["columns"])
    assert set(plan["negotiation"]["coverage"]) == set(plan["negotiation"]["risk"]) == {f"client-{k}" for k in range(4)}
    updates = {r["node"]: r for r in rounds(run) if r["stage"] == "update" and r["round"] == 0}
    hidden = {f"client-{k}": rank * 4 * columns for k, (rank, columns) in enumerate([(2, 0), (4, 3), (8, 10), (8, 32)])}
    assert {n: u["values_cipher"] for n, u in updates.items()} == hidden
    all_of = {f"client-{k}": rank * (4 * 32 + 2 * 32 + 2 * 16) for k, rank in enumerate((2, 4, 8, 8))}
    assert {n: u["values_clear"] + u["values_cipher"] for n, u in updates.items()} == all_of


def test_the_log_shows_coverage_and_risk_and_each_client_its_own(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab(SHE)
    text = said(capsys)
    assert "client-1: budget 10.000%, coverage" in text and "risk" in text
    assert "client-1: encrypts 12 of 128 columns of A" in text


def test_what_the_rank_cap_cost_is_written_down_per_layer(lab: Lab) -> None:
    run = lab(f"{SHE.replace('1.0', '0.5')} method.rank_cap=3")
    found = [r["truncation"] for r in rounds(run) if r["stage"] == "aggregate"]
    assert len(found) == 2
    assert all(len(t) == 4 and all(0.001 < v < 1 for v in t.values()) for t in found)


# ------------------------------------------------------------------------------------------------ what the server sees


def test_the_servers_view_holds_no_column_number_and_equal_columns_have_equal_codes(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes in every message are the keyed permutation of the numbers, the same for all clients."""
    numbers: dict[str, list[list[int]]] = {}
    secret: dict[str, list[list[int]]] = {}

    def kept(found: Any, codes: Any, share: float) -> Any:
        name = f"client-{len(numbers)}"
        secret[name] = [c.tolist() for c in codes]
        numbers[name] = [np.argsort(-s, kind="stable")[: max(1, int(share * s.size + 0.5))].tolist() for s in found]
        if share == 0:
            numbers[name] = [[] for _ in found]
        return original(found, codes, share)

    original = wishes.wish
    monkeypatch.setattr(wishes, "wish", kept)
    run = lab(f"{SHE} method.calibration_samples=4")
    assert len({json.dumps(c) for c in secret.values()}) == 1  # equal columns, equal codes, at every client
    codes = secret["client-0"]
    assert all(sorted(c) == list(range(32)) and c != list(range(32)) for c in codes)
    assert len({tuple(c) for c in codes}) == len(codes)  # another permutation in each layer
    grid = lab.grid
    assert grid is not None
    answers = [flower.unpack(r.content)[0] for _, r in grid.answered if "columns" in flower.unpack(r.content)[0]]
    assert [a["columns"] for a in answers] == [
        [[code[j] for j in layer] for code, layer in zip(codes, numbers[f"client-{k}"], strict=True)] for k in range(4)
    ]
    assert all("score" not in json.dumps(a["columns"]) for a in answers)
    assert {len(a["columns"][0]) for a in answers} == {0, 3, 10, 32}
    assert plan_of(run)["columns"] != numbers["client-3"]


def test_codes_differ_between_runs_of_one_key() -> None:
    from tests.oracle import encrypted, plan_of

    (one, secret), (two, _) = (encrypted(plan_of(), run=run) for run in (1, 2))
    assert [c.tolist() for c in exchange.codes_of(one, secret)] != [c.tolist() for c in exchange.codes_of(two, secret)]
    assert [c.tolist() for c in exchange.codes_of(one, secret)] == [c.tolist() for c in exchange.codes_of(one, secret)]


# ---------------------------------------------------------------------------------------- clients that come, go, fail


def lie(node: int, kind: str, change: Callable[[dict[str, Any]], Any], rounds_: tuple[str, ...] = ("0",)) -> Any:
    """Change the values of one node's answers of a kind."""

    def tamper(reply: Message, source: int) -> Message:
        asked = reply.metadata.message_type == kind and reply.metadata.group_id in rounds_
        if source == node and asked and not reply.has_error():
            values, payload = flower.unpack(reply.content)
            changed = change(values)
            reply.content = flower.pack(values if changed is None else changed, payload)
        return reply

    return tamper


# more of them in test_negotiation.py
BAD_WISHES = {
    "text": lambda v: v.update(columns="all"),
    "a column it may not name": lambda v: v["columns"][0].__setitem__(0, 32),
    "seconds that are none": lambda v: v.update(seconds={"score": "long"}),
    "an error": lambda v: {"error": "RangeError", "line": "NaN", "name": "client-2", "simulated": True},
}


@pytest.mark.parametrize("change", BAD_WISHES.values(), ids=BAD_WISHES)
def test_a_client_with_a_bad_wish_is_named_and_the_others_go_on(
    lab: Lab, capsys: pytest.CaptureFixture[str], change: Any
) -> None:
    run = lab(SHE, tamper=lie(102, "query.wish", change))
    assert summary(run)["status"] == "completed"
    assert "negotiation: left out client-2" in said(capsys)
    # the plan of the others has a budget above its own, so it takes part and hides no less than it asked for
    assert plan_of(run)["budgets"] == [0.0, 0.1, 1.0]
    hidden = [r["values_cipher"] for r in rounds(run) if r["stage"] == "update" and r["node"] == "client-2"]
    assert hidden == [8 * 4 * 32] * 2


def test_a_client_whose_budget_was_not_negotiated_waits_and_the_others_go_on(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    run = lab(SHE, tamper=lie(103, "query.wish", BAD_WISHES["text"]))
    assert "left out client-3: its budget 1 is above all that were negotiated" in said(capsys)
    assert {r["node"] for r in rounds(run) if r["stage"] == "update"} == {"client-0", "client-1", "client-2"}


def test_too_few_usable_wishes_end_the_run_in_plain_words(lab: Lab) -> None:
    def change(reply: Message, source: int) -> Message:
        for node in (100, 101, 102):
            reply = lie(node, "query.wish", BAD_WISHES["text"])(reply, source)
        return reply

    with pytest.raises(FederationError, match="1 clients said which columns they want encrypted, fewer than"):
        lab(SHE, tamper=change)


def test_a_client_that_answers_the_query_but_not_the_round_is_left_out_of_the_round_alone(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = {"error": "OSError", "line": "disk full", "name": "client-3", "simulated": True}
    run = lab(f"{SHE} record_updates=true method.rank_cap=64", tamper=lie(103, "train", lambda v: gone))
    assert "left out client-3: OSError: disk full" in said(capsys)
    first, second = ({r["node"] for r in rounds(run) if r["stage"] == "update" and r["round"] == k} for k in (0, 1))
    assert first == {"client-0", "client-1", "client-2"} and second == first | {"client-3"}
    samples = np.array([summary(run)["nodes"][f"client-{k}"]["samples"] for k in range(3)], np.float64)
    sent = [dense(run, k, 0, "update") for k in range(3)]
    for node in (0, 3):  # what only client-3 hides was clear at all that took part, and still every column is right
        rank = (2, 4, 8, 8)[node]
        for layer, got in dense(run, node, 0, "received").items():
            true = sum(w * s[layer] for w, s in zip(samples / samples.sum(), sent, strict=True))
            assert np.abs(got - best(true, rank)).max() < 1e-5 * np.abs(true).max()


def test_columns_are_negotiated_again_every_so_many_rounds_with_the_later_score(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []

    def spied(kind: str, *args: Any, **more: Any) -> Any:
        kinds.append(kind)
        return original(kind, *args, **more)

    original = wishes.score_columns
    monkeypatch.setattr(wishes, "score_columns", spied)
    run = lab(f"{SHE} federation.rounds=4 method.renegotiate_every=2")
    assert kinds == ["wanda_weight"] * 4 + ["wanda_adapter"] * 4
    assert [r["round"] for r in rounds(run) if r["stage"] == "negotiation"] == [0] * 4 + [2] * 4
    assert plan_of(run)["negotiation"]["round"] == 2
    assert summary(run)["status"] == "completed"  # aggregates of the old plan were read under the new one


def labs(lab: Lab, *budgets: float) -> dict[int, dict[str, Any]]:
    """Real nodes that share a key file."""
    path = lab.folder / "shared.key"
    if not path.exists():
        keys.save(generate_key(compose(CONF, "method=she_lora").crypto), path)
    return {
        200 + k: {
            "name": f"lab-{k}",
            "rank": 4,
            "budget": budget,
            "key-file": str(path),
            "data-path": str(lab.folder / f"lab-{k}.jsonl"),
            "run-dir": str(lab.runs),
            "allow-clear": True,
        }
        for k, budget in enumerate(budgets)
    }


@pytest.mark.parametrize(("budget", "again"), [(0.1, False), (0.6, True)], ids=["covered", "larger"])
def test_a_client_that_joins_later_gets_the_current_plan_or_a_new_one_when_it_hides_more(
    lab: Lab, budget: float, again: bool
) -> None:
    nodes = labs(lab, 0.2, 0.2, budget)
    late = {202: nodes.pop(202)}

    def join(reply: Message, source: int) -> Message:
        if reply.metadata.message_type == "train" and lab.grid:
            lab.grid.nodes |= late
        return reply

    run = lab("method=she_lora federation.rounds=3 federation.min_clients=2", nodes=nodes, tamper=join)
    who = [{r["node"] for r in rounds(run) if r["stage"] == "update" and r["round"] == k} for k in range(3)]
    assert who == [{"lab-0", "lab-1"}, {"lab-0", "lab-1", "lab-2"}, {"lab-0", "lab-1", "lab-2"}]
    assert plan_of(run)["budgets"] == ([0.2, 0.6] if again else [0.2])
    hidden = [r["values_cipher"] for r in rounds(run) if r["stage"] == "update" and r["node"] == "lab-2"]
    assert hidden == [4 * 4 * (19 if again else 6)] * 2  # never less than it asked for: 0.2 of 32 columns, or 0.6


def test_a_client_refuses_a_plan_that_hides_less_than_it_asked_for(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    def less(message: Any) -> None:
        values, payload = flower.unpack(message.content)
        values["terms"][0].update(budgets=[0.1], columns=[c[:3] for c in values["terms"][0]["columns"]])
        message.content = flower.pack(values, payload)

    with pytest.raises(FederationError, match="0 usable updates"):
        lab(SHE.replace("0.0}", "0.3}").replace("0.1}", "0.3}"), outgoing=("train", less))
    assert "above the plan's largest, 0.1: negotiate again" in said(capsys)


def test_a_client_sends_nothing_before_columns_were_negotiated(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    def none(message: Any) -> None:
        values, payload = flower.unpack(message.content)
        values["terms"][0].update(budgets=[], columns=[])
        message.content = flower.pack(values, payload)

    with pytest.raises(FederationError, match="0 usable updates"):
        lab(SHE, outgoing=("train", none))
    assert "before the columns to encrypt were negotiated" in said(capsys)


# ------------------------------------------------------------------------------------------------------------ budgets


def test_a_node_measures_its_budget_once_and_says_why(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = labs(lab, 0.2, 0.2)
    for node in nodes.values():
        del node["budget"]
        node["seconds-per-round"] = 10.0
    run = lab("method=she_lora federation.min_clients=2", nodes=nodes)
    text = said(capsys)
    assert text.count("lab-0: budget ") >= 1 and text.count("of the columns of A: ") == 2  # one line per node, not more
    assert [m["budget"] for m in plan_of(run)["members"]] == [1.0, 1.0]  # such a small model is encrypted in no time


def test_simulated_clients_take_the_budgets_of_the_federation(lab: Lab) -> None:
    run = lab("method=she_lora", nodes=simulated(4))
    assert [m["budget"] for m in plan_of(run)["members"]] == [0.00125, 0.01, 0.01, 0.016]


def test_an_own_scale_per_rank_is_honoured(lab: Lab) -> None:
    """alpha / r as PEFT has it: the update of each client counts with its own scale, and each gets its own back."""
    run = lab(f"{SHE} model.scaling=own record_updates=true method.rank_cap=64 federation.rounds=1")
    samples = np.array([n["samples"] for n in summary(run)["nodes"].values()], np.float64)
    scales = [16.0 / r for r in (2, 4, 8, 8)]
    sent = [dense(run, k, 0, "update") for k in range(4)]
    for node, rank in enumerate((2, 4, 8, 8)):
        for layer, got in dense(run, node, 0, "received").items():
            true = sum(w * c * s[layer] for w, c, s in zip(samples / samples.sum(), scales, sent, strict=True))
            assert np.abs(scales[node] * got - best(true, rank)).max() < 1e-5 * np.abs(true).max()


def test_what_the_rank_cap_cost_is_told_by_b_where_every_column_is_secret(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    run = lab(f"{SHE} method.rank_cap=3")
    assert all(min(r["truncation"].values()) > 0.001 for r in rounds(run) if r["stage"] == "aggregate")
    assert "rank cap cut" in said(capsys)


def test_negotiation_waits_for_clients_that_are_away(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = labs(lab, 0.2, 0.2)
    looks = iter([nodes, {}, {}, {}])  # joined, then away when the columns are to be negotiated, then back

    def seen(self: Any) -> Any:
        return list(next(looks, nodes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grid.LocalGrid.get_node_ids", seen)
        run = lab("method=she_lora federation.min_clients=2", nodes=nodes)
    assert summary(run)["status"] == "completed"
    assert "only 0 clients are connected" in said(capsys)


def test_one_client_does_not_decide_the_size_of_every_aggregate(lab: Lab) -> None:
    """The default cap follows from twice the rank that enough clients reach, whatever one of them claims."""
    clients = "federation.clients='[{rank:2},{rank:2},{rank:2},{rank:16}]'"
    assert plan_of(lab(f"method=she_lora {clients} federation.rounds=1"))["rank_cap"] == 8


def test_what_a_negotiation_moved_counts_for_the_client_when_it_trains(lab: Lab) -> None:
    run = lab(f"{SHE} federation.rounds=4 federation.fraction=0.5 method.renegotiate_every=1")
    lines, found = rounds(run), summary(run)
    updates = [r for r in lines if r["stage"] == "update"]
    assert len(updates) == 8 and found["bytes_up"] == np.mean([r["bytes_up"] for r in updates])
    talk = sum(r["bytes_up"] + r["bytes_down"] for r in lines if r["stage"] == "negotiation")
    tasks = sum(r["bytes_down"] for r in updates)
    assert tasks < found["bytes_down"] * 8 <= tasks + talk  # the rest waits for clients that did not train again
    assert {p.name for p in (run / "plans").iterdir()} == {f"round_000{k}.json" for k in range(4)}


def test_random_scores_do_not_follow_from_what_the_server_knows(lab: Lab, tmp_path: Path) -> None:
    """A public seed would tell the server which column each code of a random wish is."""

    def asked(name: str) -> list[list[int]]:
        numbers: list[list[int]] = []

        def kept(found: Any, codes: Any, share: float) -> Any:
            numbers.append([int(s.argmax()) for s in found])
            return original(found, codes, share)

        original = wishes.wish
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wishes, "wish", kept)
            lab.runs = tmp_path / name
            lab(f"{SHE} method.first_score=random federation.rounds=1")
        return numbers

    assert asked("one") != asked("two")  # another key, the same seed, names and rounds


def test_clients_evaluate_every_so_many_rounds_and_at_both_ends(lab: Lab) -> None:
    run = lab("federation.rounds=4 federation.evaluate_every=3")
    measured = {k: {"loss" in r for r in rounds(run) if r["stage"] == "update" and r["round"] == k} for k in range(4)}
    assert measured == {0: {True}, 1: {False}, 2: {False}, 3: {True}}
    found = summary(run)
    assert found["federated"]["loss"] < found["base"]["loss"]
