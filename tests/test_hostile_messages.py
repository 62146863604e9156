"""Hostile and wrong messages through the whole server: real Flower messages, in Flower's own bytes.

Every client of these federations is real. What a hostile one does is done to its replies on their way.
"""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONF
from federations import Lab, rounds, said, summary
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from grid import DeployedGrid, LocalGrid, Objects, Wire, message_of, objects_of, set_metadata
from safetensors.numpy import load_file

from ciphertune import client, exchange, flower
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.aggregation import SeparateSum
from ciphertune.build import public_part
from ciphertune.errors import (
    DisagreementError,
    FederationError,
    FormatError,
    KeyMismatchError,
    RangeError,
    ReportError,
    RoundMismatchError,
)
from ciphertune.federation import Federation, Member
from ciphertune.norms import check_mean, keep_norms, norms
from ciphertune.ranks import Contributor
from ciphertune.runs import ServerFolder
from ciphertune.settings import compose
from ciphertune.state import identity
from server_app import mail
from server_app.conduct import Conduct, check_enough
from server_app.door import Door
from tests.messages import parties
from tests.oracle import BODY, PRODUCT, adapter_of, forge, plan_of, with_body
from tests.test_federation import SETTINGS, hello

OBSERVER = 3  # a client that is never hostile, of the largest rank


def payload(change: Callable[[bytes], bytes]) -> Callable[[Message], Message]:
    """A change of an update's bytes."""

    def apply(reply: Message) -> Message:
        values, (data,) = flower.unpack(reply.content)
        reply.content = flower.pack(values, [change(data)])
        return reply

    return apply


def header(**fields: int | bytes) -> Callable[[Message], Message]:
    """Fields of an update's header replaced, and its SHA-256 made right again."""
    return payload(lambda data: forge(data, **fields))


def metadata(**fields: Any) -> Callable[[Message], Message]:
    return lambda reply: set_metadata(reply, **fields)


def records(**changes: Any) -> Callable[[Message], Message]:
    """Records put in, or left out where they are None."""

    def apply(reply: Message) -> Message:
        found = dict(reply.content) | changes
        reply.content = RecordDict({name: record for name, record in found.items() if record is not None})
        return reply

    return apply


def array(**fields: Any) -> Callable[[Message], Message]:
    """What an array says of itself replaced."""

    def apply(reply: Message) -> Message:
        good = reply.content.array_records["payload"]["0000"]
        said_of_it = {"dtype": good.dtype, "shape": good.shape, "stype": good.stype, "data": good.data} | fields
        reply.content["payload"] = ArrayRecord({"0000": Array(**said_of_it)})
        return reply

    return apply


def objects(change: Callable[[Objects], Objects]) -> Callable[[Message], Wire]:
    return lambda reply: [change(objects_of(reply))]


def replaced(old: bytes, new: bytes, kind: bytes = b"Message ") -> Callable[[Objects], Objects]:
    """Bytes of the one object of a kind replaced."""

    def change(found: Objects) -> Objects:
        (name,) = (n for n, content in found.items() if content.startswith(kind))
        assert old in found[name]
        return found | {name: found[name].replace(old, new)}

    return change


def chunk_named(times: int) -> Callable[[Objects], Objects]:
    """The array's one chunk named many times: Flower would join it to an array of so many times its size."""
    return replaced(b'"arraychunk_ids": [0]', b'"arraychunk_ids": [%s]' % b",".join([b"0"] * times), b"Array ")


def failed(reply: Message) -> Message:
    return set_metadata(Message(Error(7, "No space left on device"), reply_to=reply), **_of(reply))


def _of(reply: Message) -> dict[str, Any]:
    return {k: getattr(reply.metadata, k) for k in ("src_node_id", "dst_node_id", "reply_to_message_id")}


def kinds() -> list[tuple[str, Callable[[Message], Message | Wire], str]]:
    """(name, what is done to the reply, why it is left out), one per round. Rounds are counted from 0."""
    junk = ConfigRecord({"json": ["{}"]})
    return [
        ("key", header(key=b"k" * 16), "made under another key: it has 6b6b"),
        ("plan", header(plan=b"p" * 16), "made under another plan"),
        ("settings", header(settings=b"s" * 16), "made under another settings"),
        ("parameters", header(parameters=b"e" * 16), "made under another encryption parameters"),
        ("round", header(round=3), r"of round 3, expected 4"),
        ("run", header(run=1), "of run 1, expected 4242"),
        ("member", header(sender=4), "of sender 4, expected 2"),
        ("weight", header(contributor_samples=100_000), "samples exceed the total"),
        ("copy", lambda reply: [objects_of(reply), objects_of(reply)], "2 replies came to one message"),
        ("node", metadata(src_node_id=103), "its reply comes from node 103: node 10. was asked"),
        ("message", metadata(reply_to_message_id="m0"), "its reply answers another message: node 10. was asked"),
        ("garbage", payload(lambda data: b"\xff" * len(data)), "not a ciphertune message"),
        ("nothing", payload(lambda data: b""), "0 bytes are too few"),
        ("longer", payload(lambda data: data + bytes(1 << 20)), "arrays are longer than any that are expected"),
        ("chunks", objects(chunk_named(1000)), "an array of 1000 chunks of .* is longer than any"),
        (
            "two",
            records(payload=ArrayRecord({k: Array("bytes", (1,), "ciphertune", b"x") for k in "ab"})),
            "2 payloads",
        ),
        ("none", records(payload=None), "0 payloads where one update is expected"),
        ("metric", records(payload=MetricRecord({"x": 1.0})), "not a message of this application"),
        ("extra", records(more=MetricRecord({"x": 1.0})), "other records than expected: 3"),
        ("config", records(ciphertune=junk), "values are not text"),
        ("dtype", array(dtype="float32"), "an array in it is not of its bytes"),
        ("shape", array(shape=(2**62,)), "an array in it is not of its bytes"),
        ("stype", array(stype="numpy.ndarray"), "an array in it is not of its bytes"),
        ("text", records(ciphertune=ConfigRecord({"json": '{"x": "' + "x" * (1 << 20) + '"}'})), "at most 65536"),
        ("deep", records(ciphertune=ConfigRecord({"json": "[" * 60_000})), "its values are not readable"),
        ("type", objects(replaced(b"Message", b"ConfigRecord")), r"not a message of Flower \(ValueError\)"),
        ("kind", objects(replaced(b"\x05train", b"\x05drain")), r"not a message of Flower \(ValueError\)"),
        ("lost", objects(lambda found: dict(list(found.items())[1:])), r"not a message of Flower \(KeyError\)"),
    ]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pauses between two looks for replies."""
    monkeypatch.setattr(mail, "_POLL", 0.0)


def is_update(reply: Message, round_: int) -> bool:
    return not reply.has_error() and "payload" in reply.content and reply.metadata.group_id == str(round_)


def expected_mean(run: Path, round_: int, name: str, who: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The float64 weighted mean per component of what these clients sent, and the weight of each component."""
    samples = {k: summary(run)["nodes"][f"client-{k}"]["samples"] for k in range(4)}
    total, weight = 0.0, 0.0
    for k in who:
        update = load_file(run / f"clients/client-{k}/round_{round_:04d}/update.safetensors")[name].astype(np.float64)
        rows = update if name.endswith(".a") else update.T  # a row per component
        padded = np.zeros((8, rows.shape[1]))
        padded[: len(rows)] = rows
        total = total + samples[k] * padded
        weight = weight + samples[k] * (np.arange(8) < len(rows))
    return total / weight[:, None], weight / sum(samples.values())


def assert_mean_is_that_of(run: Path, round_: int, who: list[int], overrides: str) -> None:
    """What the observer received is the mean of these clients' updates, within the error that is stated for it."""
    received = load_file(run / f"clients/client-{OBSERVER}/round_{round_:04d}/received.safetensors")
    factor = ".b" if round_ % 2 == 0 else ".a"
    error = public_part(compose(CONF, overrides).crypto).error_bound(len(who), 1.0)
    for name in (n for n in received if n.endswith(factor)):
        expected, weight = expected_mean(run, round_, name, who)
        rows = received[name].astype(np.float64)
        rows = rows if factor == ".a" else rows.T
        assert (np.abs(rows - expected) <= error / weight[:, None] + np.abs(expected) * 2**-23).all()
        assert np.abs(rows - expected_mean(run, round_, name, [0, 1, 2, 3])[0]).max() > 100 * error


def test_each_kind_of_wrong_message_leaves_its_sender_out_by_name_and_the_mean_is_that_of_the_others(
    lab: Lab, capsys: pytest.CaptureFixture[str], impatient: None
) -> None:
    """One kind per round; two clients take turns, so that each is back in the round after."""
    cases = kinds()

    def tamper(reply: Message, source: int) -> Message | Wire:
        round_ = int(reply.metadata.group_id or -1)
        if is_update(reply, round_) and source == 101 - round_ % 2:
            return cases[round_][1](reply)
        return reply

    run = lab(
        f"method=sealed federation.rounds={len(cases)} federation.exclude_after=0 record_updates=true "
        "training.steps=1 federation.evaluate_every=1000",
        tamper=tamper,
    )
    text, faults = said(capsys), {r["round"]: r for r in rounds(run) if r["stage"] == "fault"}
    assert summary(run)["status"] == "completed" and "excluded" not in summary(run)
    for round_, (name, _, reason) in enumerate(cases):
        hostile = 1 - round_ % 2
        assert re.search(f"round {round_ + 1}: left out client-{hostile}: .*{reason}", text), (name, reason)
        assert faults[round_]["node"] == f"client-{hostile}" and re.search(reason, faults[round_]["reason"])
        assert f"round {round_ + 1}/{len(cases)}: 3 of 4 clients" in text
        assert_mean_is_that_of(run, round_, [k for k in range(4) if k != hostile], "method=sealed")
    assert len(faults) == len(cases)
    assert text.count("left out") == len(cases)


def weighted(change: Callable[[np.ndarray], None], product: bool = False) -> Callable[[Message], Message]:
    """A change of the readable values of an update, of float32; of a product all before the ciphertexts."""

    def apply(data: bytes) -> bytes:
        end = len(data) - 32
        if product:
            end = BODY + (end - BODY) % PRODUCT.block_bytes
        values = np.frombuffer(data[BODY:end], "<f4").copy()
        change(values)
        return with_body(data, values.tobytes() + data[end:-32])

    return payload(apply)


def put(value: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[7] = value

    return change


def test_values_that_the_server_can_read_are_refused_when_they_are_not_numbers_or_above_the_bound(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        (put(np.nan), "holds NaN or infinite values"),
        (put(-np.inf), "holds NaN or infinite values"),
        (put(1e30), "values above crypto.bound"),
        (put(20.0), "above crypto.bound=64 times the client's weight"),  # of which it has a quarter or less
    ]

    def tamper(reply: Message, source: int) -> Message:
        round_ = int(reply.metadata.group_id or -1)
        return weighted(cases[round_][0])(reply) if source == 101 and is_update(reply, round_) else reply

    run = lab(f"method=fedavg federation.rounds={len(cases)} federation.exclude_after=0", tamper=tamper)
    text = said(capsys)
    for round_, (_, reason) in enumerate(cases):
        assert re.search(f"round {round_ + 1}: left out client-1: .*{reason}", text)
        assert f"round {round_ + 1}/{len(cases)}: 3 of 4 clients" in text
    assert summary(run)["status"] == "completed"


# ------------------------------------------------------------------------------------------------------- exclusion


def named(folder: Path, count: int = 4) -> dict[int, dict[str, Any]]:
    """Nodes of real labs, with names of their own."""
    return {
        k: {
            "name": f"lab-{k}",
            "data-path": str(folder / f"lab-{k}.jsonl"),
            "rank": 4,
            "allow-clear": True,
            "run-dir": str(folder / f"node-{k}"),
        }
        for k in range(count)
    }


def test_a_client_is_excluded_after_n_bad_rounds_and_stays_so_when_it_comes_back_on_another_node(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its bad rounds are the first and the third: good ones in between do not help it."""

    def tamper(reply: Message, source: int) -> Message:
        grid = lab.grid
        assert grid is not None
        if source == 1 and any(is_update(reply, r) for r in (0, 2)):
            return header(key=b"k" * 16)(reply)
        if source == 2 and is_update(reply, 3):  # lab-1 is started anew
            grid.nodes[77] = grid.nodes.pop(1)
        return reply

    overrides = "method=fedavg federation.rounds=6 federation.exclude_after=2"
    run = lab(overrides, nodes=named(tmp_path), tamper=tamper)
    text = said(capsys)
    assert text.count("excluded lab-1 from the run: unusable messages in 2 rounds") == 1
    assert re.search("excluded lab-1.* round 1: .*another key.*; round 3: .*another key", text)
    assert "left out lab-1: lab-1 is excluded from this run: unusable messages in 2 rounds" in text
    found = summary(run)
    assert found["status"] == "completed" and list(found["excluded"]) == ["lab-1"]
    assert [r["round"] for r in rounds(run) if r["stage"] == "fault"] == [0, 2]
    assert [r["round"] for r in rounds(run) if r["stage"] == "update" and r["node"] == "lab-1"] == [1]
    for later in (4, 5, 6):
        assert f"round {later}/6: 3 of 3 clients" in text
    grid = lab.grid
    assert grid is not None
    asked = [m.metadata.message_type for node, m in grid.sent if node == 77]
    assert asked == ["query.join"]  # it is told nothing more, not even the result


def test_no_client_is_excluded_for_what_may_happen_to_an_honest_one(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that dies, an error that it reports, a held-out loss that is not a number."""

    def tamper(reply: Message, source: int) -> Message:
        if source == 1 and is_update(reply, 0):
            return failed(reply)
        if source == 1 and is_update(reply, 1):
            reply.content = flower.pack({"error": "OSError", "line": "No space left on device", "name": "lab-1"})
        if source == 1 and is_update(reply, 2):
            values, sent = flower.unpack(reply.content)
            reply.content = flower.pack(values | {"loss": float("nan")}, sent)
        return reply

    run = lab("method=fedavg federation.rounds=4 federation.exclude_after=1", nodes=named(tmp_path), tamper=tamper)
    text = said(capsys)
    for round_, reason in enumerate(("Flower error 7", "No space left", "reports nan"), 1):
        assert re.search(f"round {round_}: left out lab-1: .*{reason}", text)
    assert "round 4/4: 4 of 4 clients" in text
    assert "excluded" not in summary(run) and "excluded lab" not in text


def test_a_hostile_node_that_takes_another_labs_name_does_not_get_that_lab_excluded(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes while lab-1 is there, then while lab-1 is away, each time from a node of its own, and sends nonsense."""
    nodes = named(tmp_path)
    thief = nodes[1] | {"run-dir": str(tmp_path / "thief")}

    def tamper(reply: Message, source: int) -> Message:
        grid = lab.grid
        assert grid is not None
        if source == 3 and is_update(reply, 0):
            grid.nodes[88] = thief
        if source == 3 and is_update(reply, 1):
            grid.nodes[99] = thief
            nodes[1] = grid.nodes.pop(1)
        if source == 3 and is_update(reply, 2):
            grid.nodes[11] = nodes[1]
        if source in (88, 99) and "ciphertune" in reply.content:
            assert not is_update(reply, int(reply.metadata.group_id or -1)), "it was asked for an update"
        return reply

    run = lab("method=fedavg federation.rounds=5 federation.exclude_after=1", nodes=nodes, tamper=tamper)
    text = said(capsys)
    assert text.count("left out lab-1: another client has joined this run as lab-1") == 2
    assert [r["round"] for r in rounds(run) if r["stage"] == "update" and r["node"] == "lab-1"] == [0, 1, 3, 4]
    assert "excluded" not in summary(run) and "excluded lab" not in text


def test_a_greeting_of_nonsense_under_another_labs_name_counts_against_nobody(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tamper(reply: Message, source: int) -> Message:
        grid = lab.grid
        assert grid is not None
        if source == 3 and is_update(reply, 0):
            grid.nodes[88] = grid.nodes[1] | {"run-dir": str(tmp_path / "thief")}
        if source == 88:
            values, _ = flower.unpack(reply.content)
            reply.content = flower.pack(values | {"rank": "many"})
        return reply

    run = lab("method=fedavg federation.rounds=3 federation.exclude_after=1", nodes=named(tmp_path), tamper=tamper)
    text = said(capsys)
    assert "left out lab-1: the client's greeting is not readable" in text
    assert "round 3/3: 4 of 4 clients" in text and "excluded" not in summary(run)


class Waited(Exception):
    """Instead of a pause before the next look."""


@pytest.mark.parametrize(("kind", "outcome"), [(DeployedGrid, Waited), (LocalGrid, FederationError)])
def test_a_node_that_claims_to_be_simulated_does_not_keep_a_deployment_from_waiting_for_the_others(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, outcome: type[Exception]
) -> None:
    """The kinds are Flower's own classes but for the wire."""

    def claim(reply: Message, source: int) -> Message:
        values, sent = flower.unpack(reply.content)
        reply.content = flower.pack(values | {"simulated": True}, sent)
        return reply

    def sleep(seconds: float) -> None:
        raise Waited

    overrides = f"{lab.base} method=fedavg federation.min_clients=3 'federation.clients=[{{rank:4}}]'"
    config = {"overrides": overrides, "num-server-rounds": 0, "runs-dir": str(lab.runs)}
    settings = compose(CONF, overrides)
    grid = kind(named(tmp_path, 1), config, claim)
    monkeypatch.setattr("server_app.door.time.sleep", sleep)
    door = Door(settings, Federation(settings, 4242))
    with pytest.raises(outcome):
        door.gather(grid)
    refused = ["lab-0: it says that it is simulated, and this run is between machines"]
    assert door._reasons() == (refused if kind is DeployedGrid else [])


# ------------------------------------------------------------------------------------------- the parts, one by one


def members(*names: str) -> Federation:
    federation = Federation(SETTINGS, 3)
    assert federation.settle([hello(n, node_id=i) for i, n in enumerate(names)]) == []
    return federation


def conduct(federation: Federation, path: Path) -> Conduct:
    path.mkdir(exist_ok=True)
    return Conduct(federation, ServerFolder(path))


def member(federation: Federation, name: str) -> Member:
    return next(m for m in federation.members if m.name == name)


def test_a_client_counts_as_faulty_once_per_round_whatever_it_sends(tmp_path: Path) -> None:
    federation = members("a", "b", "c")
    watch, a = conduct(federation, tmp_path / "run"), member(federation, "a")
    for _ in range(5):
        watch.left_out("round 1", 0, a, FormatError("x"))
    watch.left_out("round 2", 1, a, KeyMismatchError("y"))
    assert federation.excluded == {} and len(federation.admitted) == 3
    watch.left_out("round 6", 5, a, RoundMismatchError("z"))
    assert list(federation.excluded) == ["a"] and [m.name for m in federation.admitted] == ["b", "c"]
    assert [r["round"] for r in rounds(tmp_path / "run")] == [0, 1, 5]


def test_what_two_clients_contradict_each_other_in_counts_against_neither(tmp_path: Path) -> None:
    """Of two masks that differ the first counts, so a hostile client that is quick could get all others excluded."""
    federation = members("a", "b", "c")
    watch, a = conduct(federation, tmp_path / "run"), member(federation, "a")
    for round_ in range(10):
        watch.left_out("round", round_, a, DisagreementError("x"))
        watch.left_out("round", round_, a, ReportError("x"))
        watch.left_out("round", round_, a, FederationError("its process failed"))
    assert federation.excluded == {} and not (tmp_path / "run/rounds.jsonl").exists()


def test_faults_and_exclusions_are_taken_up_from_a_run_folder(tmp_path: Path) -> None:
    first = members("a", "b", "c")
    watch = conduct(first, tmp_path / "run")
    for round_ in range(3):
        watch.left_out("round", round_, member(first, "a"), FormatError("x"))
    for round_ in range(2):
        watch.left_out("round", round_, member(first, "b"), FormatError("x"))
    again = members("a", "b", "c")
    watch = conduct(again, tmp_path / "run")
    watch.recall()
    assert again.excluded == first.excluded and list(again.excluded) == ["a"]
    watch.left_out("round", 7, member(again, "b"), FormatError("x"))
    assert list(again.excluded) == ["a", "b"]


def test_a_run_whose_clients_were_excluded_to_below_the_minimum_fails_in_plain_words(tmp_path: Path) -> None:
    federation = members("a", "b")
    check_enough(federation)
    watch = conduct(federation, tmp_path / "run")
    for who in ("a", "b"):
        for round_ in range(3):
            watch.left_out("round", round_, member(federation, who), FormatError("of another run"))
    with pytest.raises(
        FederationError, match=r"0 clients are left, fewer than .*=1: excluded a: .*of another run.*; b:"
    ):
        check_enough(federation)


def test_a_node_keeps_its_identity_for_a_run_and_has_another_in_the_next(tmp_path: Path) -> None:
    one = identity(tmp_path / "a", 1)
    assert re.fullmatch("[0-9a-f]{32}", one) and identity(tmp_path / "a", 1) == one
    assert len({one, identity(tmp_path / "a", 2), identity(tmp_path / "b", 1)}) == 3


class Replies(LocalGrid):
    """What is pulled, look by look."""

    def __init__(self, *looks: list[Message | Objects]) -> None:
        super().__init__({}, {})
        self.looks = list(looks)

    def push_messages(self, messages: Any) -> Any:
        for message in messages:
            set_metadata(message, message_id="m0")
            self.messages["m0"] = message
        return ["m0"]

    def pull_messages(self, message_ids: Any) -> Any:
        if not self.looks:
            return super().pull_messages(message_ids)
        return [message_of(m) if isinstance(m, dict) else m for m in self.looks.pop(0)]


def asked(grid: LocalGrid, timeout: float = 5.0, most: int = 0) -> list[Message]:
    """What the strategy gets when node 7 is asked."""
    question = Message(flower.pack({}), 7, "train", group_id="0")
    return [reply for _, reply in mail.exchange(grid, [question], timeout, [most])]


def answer(node: int = 7, message_id: str = "m0", **values: Any) -> Message:
    question = set_metadata(Message(flower.pack({}), node, "train", group_id="0"), message_id=message_id)
    return Message(flower.pack(values), reply_to=question)


def test_a_stray_message_between_question_and_answer_harms_nobody(impatient: None) -> None:
    """A node may put messages into the SuperLink that answer nothing; the right reply comes after."""
    Replies()
    garbage = {"0" * 64: b"garbage"}
    grid = Replies([answer(node=9)], [answer(message_id="m5")], [garbage], [], [answer(good=1)])
    (reply,) = asked(grid)
    assert mail.open_reply(reply)[0] == {"good": 1}
    for stray in (answer(node=9), answer(message_id="m5")):
        (reply,) = asked(Replies([stray, answer(good=1)]))
        assert mail.open_reply(reply)[0] == {"good": 1}


@pytest.mark.parametrize(
    ("stray", "error"),
    [(lambda: answer(node=9), RoundMismatchError), (lambda: {"0" * 64: b"garbage"}, FormatError)],
)
def test_a_wrong_reply_with_nothing_after_it_is_its_senders_last_word(
    impatient: None, stray: Callable[[], Any], error: type[Exception]
) -> None:
    Replies()
    with pytest.raises(error):  # the SuperLink says that there is no other
        mail.open_reply(asked(Replies([stray()]))[0])
    silent = Replies([stray()], *([[]] * 1_000_000))
    with pytest.raises(error):  # nothing until the time is up
        mail.open_reply(asked(silent, timeout=0.2)[0])


def test_nothing_in_a_message_makes_the_server_allocate_more_than_came(impatient: None) -> None:
    """A chunk of 1 MB named 300 times in one array, and 300 arrays that share one: 300 MB if they were joined."""
    Replies()
    one = Array("bytes", (1 << 20,), "ciphertune", bytes(1 << 20))
    for times, arrays in ((300, 1), (1, 300)):
        reply = answer()
        reply.content["payload"] = ArrayRecord(
            {str(i): Array("bytes", (1 << 20,), str(i), one.data) for i in range(arrays)}
        )
        sent = objects_of(reply)
        for name in [n for n, content in sent.items() if content.startswith(b"Array ")]:
            named_often = b",".join([b"0"] * times)
            sent[name] = sent[name].replace(b'"arraychunk_ids": [0]', b'"arraychunk_ids": [%s]' % named_often)
        assert sum(map(len, sent.values())) < 2 << 20
        tracemalloc.start()
        try:
            (found,) = asked(Replies([sent]), most=100_000)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        with pytest.raises(FormatError, match="than any that"):
            mail.open_reply(found)
        assert peak < 16 << 20


def test_no_message_is_taken_where_flower_joins_arrays_by_code_that_nothing_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reply = answer()
    reply.content["payload"] = ArrayRecord({"0000": Array("bytes", (8,), "ciphertune", bytes(8))})
    assert mail.open_reply(asked(Replies([objects_of(reply)]), most=100)[0])[1] == [bytes(8)]
    monkeypatch.setattr(Array, "inflate", classmethod(flower._join))
    with pytest.raises(FederationError, match="nothing bounds what Flower makes of a message: install the flwr"):
        mail.open_reply(asked(Replies([objects_of(reply)]), timeout=0.3, most=100)[0])


def test_arrays_are_not_limited_where_nothing_was_said(tmp_path: Path) -> None:
    reply = answer()
    reply.content["payload"] = ArrayRecord({"0000": Array("bytes", (1 << 23,), "ciphertune", bytes(1 << 23))})
    assert len(flower.unpack(message_of(objects_of(reply)).content)[1][0]) == 1 << 23
    with flower.arrays_of(1 << 23):  # zeros: two chunks of 5 MB, of which one is shorter
        message_of(objects_of(reply))
    with flower.arrays_of((1 << 23) - 1), pytest.raises(FormatError, match="longer than any"):
        message_of(objects_of(reply))


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "3", '"x"', "null", "{" * 10, "[" * 9000, "1" * 5000, "{1: 2}"])
def test_values_that_are_no_names_and_values_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        flower.unpack(RecordDict({"ciphertune": ConfigRecord({"json": text})}))
    assert flower.unpack(RecordDict({"ciphertune": ConfigRecord({"json": json.dumps({"a": 1})})}))[0] == {"a": 1}


# ------------------------------------------------------------------------------------------------------------- norms


def larger(times: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values *= times

    return change


@pytest.mark.parametrize("method", ["fedavg", "she_lora"])
def test_an_update_whose_readable_part_is_far_outside_the_norm_bound_is_left_out(
    lab: Lab, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """Every value of it is within crypto.bound. Of she_lora the server reads B and most columns of A."""

    def tamper(reply: Message, source: int) -> Message:
        return weighted(larger(20.0), method == "she_lora")(reply) if source == 102 and is_update(reply, 0) else reply

    common = "federation.rounds=2 federation.max_norm=20"
    run = lab(f"method={method} {common}", tamper=tamper)
    text = said(capsys)
    found = re.search(
        r"round 1: left out client-2: what can be read of the update has norm ([\d.]+), above .*=20", text
    )
    assert found and 20 < float(found[1]) < 400
    assert "round 1/2: 3 of 4 clients" in text and "round 2/2: 4 of 4 clients" in text
    assert summary(run)["status"] == "completed"


@pytest.mark.parametrize("select", ["none", "all"])
def test_a_client_does_not_send_what_it_would_be_left_out_for(select: str) -> None:
    """The norm of all it trains in the round, encrypted or not, by the oracle's arithmetic."""
    session, secret = parties("encrypted" if select == "all" else "clear", select=select)
    adapter = adapter_of(session.plan, 4, 0)
    squares = [(f.b**2).sum() for f in adapter.layers.values()] + [(h**2).sum() for h in adapter.heads.values()]
    norm = float(np.sqrt(sum(squares)))  # B travels in even rounds

    def sealed(most: float) -> bytes:
        bounded = replace(session, max_norm=most)
        return exchange.seal(adapter, bounded, secret, round_=0, sender=1, samples=1, total=2)

    with pytest.raises(RangeError, match=rf"the update has norm {norm:.4g}, above federation\.max_norm"):
        sealed(norm * 0.999)
    data = sealed(norm * 1.001)
    bounded = replace(session, max_norm=norm * 1.001)
    SeparateSum(bounded, 0, 2).add(data, sender=1, who=Contributor(4, 1))
    if select == "none":
        with pytest.raises(FormatError, match=rf"has norm {norm:.4g}, above federation\.max_norm"):
            SeparateSum(replace(session, max_norm=norm * 0.999), 0, 2).add(data, sender=1, who=Contributor(4, 1))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """client-1 holds the key and sends, encrypted, a thousand times what it trained."""
    from ciphertune import client as client_module

    original = client_module.exchange.seal

    def seal(adapter: Adapter, *args: Any, **more: Any) -> bytes:
        if more["sender"] == 2 and more["round_"] == 1:
            layers = {n: LoraFactors(100 * f.a, f.b, f.scale) for n, f in adapter.layers.items()}
            adapter = Adapter(layers, adapter.heads)
        return original(adapter, *args, **more)

    monkeypatch.setattr(client_module.exchange, "seal", seal)


def test_clients_refuse_a_mean_that_one_of_them_poisoned_under_encryption_and_the_run_ends_in_plain_words(
    lab: Lab, capsys: pytest.CaptureFixture[str], poisoned: None
) -> None:
    with pytest.raises(Exception, match=r"0 usable updates, fewer than federation\.min_contributors"):
        lab("method=sealed federation.rounds=3 federation.exclude_after=1")
    text = said(capsys)
    assert "round 2/3: 4 of 4 clients" in text  # the server cannot see it
    for k in range(4):
        assert re.search(
            rf"round 3: left out client-{k}: RangeError: the mean of round 2 has norm .*, \d+ times that of this "
            r"client's own update \(federation\.max_mean_norm=10\).*End this run",
            text,
        )
    (run,) = lab.runs.iterdir()
    assert summary(run)["status"] == "failed" and "excluded" not in summary(run)  # nobody honest is blamed for it
    assert (run / "server/round_0001.msg").is_file()  # everything is kept
    before = load_file(run / "clients/client-0/state/adapter.safetensors")
    assert max(np.abs(v).max() for v in before.values()) < 1  # the poison was not taken


def test_a_poisoned_mean_is_taken_where_the_labs_say_so(lab: Lab, poisoned: None) -> None:
    run = lab("method=sealed federation.rounds=3 federation.max_mean_norm=0")
    after = load_file(run / "clients/client-0/state/adapter.safetensors")
    assert max(np.abs(v).max() for v in after.values()) > 1


def test_a_mean_is_held_against_the_clients_own_update_of_that_round_only(tmp_path: Path) -> None:
    own = adapter_of(plan_of(), 4, 0)
    keep_norms(tmp_path, 1, 3, own)

    def times(factor: float, of_heads: float = 1.0) -> Adapter:
        layers = {n: LoraFactors(f.a, factor * f.b, f.scale) for n, f in own.layers.items()}
        return Adapter(layers, {n: of_heads * h for n, h in own.heads.items()})

    squares = [(f.scale * f.b @ f.a) ** 2 for f in own.layers.values()]
    assert norms(own)[0] == pytest.approx(np.sqrt(sum(x.sum() for x in squares)), rel=1e-12)
    assert norms(own)[1] == pytest.approx(np.sqrt(sum((h**2).sum() for h in own.heads.values())), rel=1e-12)
    check_mean(tmp_path, 1, 3, times(9.9, 9.9), 10.0)
    for bad in (times(10.1), times(-10.1), times(1.0, 10.1), times(np.nan), times(1.0, np.nan)):
        with pytest.raises(RangeError, match="the mean of round 4 has norm"):
            check_mean(tmp_path, 1, 3, bad, 10.0)
        check_mean(tmp_path, 1, 3, bad, 0.0)
        check_mean(tmp_path, 1, 4, bad, 10.0)  # it sent nothing in that round
        check_mean(tmp_path, 2, 3, bad, 10.0)  # of another run


def test_a_server_does_not_decide_how_long_a_client_trains_alone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    train = client.lm_train.train

    def counted(model: Any, data: Any, settings: Any, **more: Any) -> Any:
        steps.append(settings.steps)
        return train(model, data, replace(settings, steps=1), **more)  # of a million it would be a long test

    def longer(message: Message) -> None:
        values, payload = flower.unpack(message.content)
        message.content = flower.pack({**values, "rounds": 10**6}, payload)

    monkeypatch.setattr(client.lm_train, "train", counted)
    lab("method=fedavg federation.compare_local=true", outgoing=("train.alone", longer))
    assert steps[-4:] == [2 * 2] * 4  # steps of a round, rounds


def test_a_server_does_not_decide_how_many_components_a_client_holds(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    def wide(message: Message) -> None:
        values, payload = flower.unpack(message.content)
        values["terms"] = [{**terms, "tiers": [*terms["tiers"][:-1], 100]} for terms in values["terms"]]
        message.content = flower.pack(values, payload)

    with pytest.raises(FederationError, match="0 usable updates"):
        lab("method=sealed", outgoing=("train", wide))
    assert "the server wants this client to hold 100 components, 64 at most are expected" in said(capsys)


def test_a_server_cannot_let_the_others_updates_count_for_nothing_unseen(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    """With tiny shares for all but one, the mean would be that one's update, and every other client would have it."""

    def tiny(message: Message) -> None:
        values, payload = flower.unpack(message.content)
        message.content = flower.pack({**values, "shares": [1.0, 1e-9, 1e-9]}, payload)

    with pytest.raises(FederationError, match="1 usable updates"):
        lab("method=sealed federation.rounds=1", outgoing=("train", tiny))
    assert said(capsys).count("the server says that fewer clients train what this one trains than this one alone") >= 3
