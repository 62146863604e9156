"""Mutated replies, thousands of them, through the strategy: it survives each, and the others' sum stays right."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message
from grid import LocalGrid, Objects, simulated
from mutants import mutant
from safetensors.numpy import load_file

from ciphertune import flower, wire
from ciphertune.build import public_part
from ciphertune.errors import FederationError
from ciphertune.runs import ServerFolder
from ciphertune.settings import Settings, compose
from client_app.app import CONF
from server_app import mail
from server_app.strategy import EncryptedLora
from tests.federations import Lab
from tests.tiny import SENTENCES

NODES = tuple(simulated(4))
HOSTILE = NODES[1:]  # the first one is honest throughout
NOTHING = ConfigRecord()
EXTREME = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of numpy, about 1e308


class Recorded(LocalGrid):
    """Clients that answered once, and from then on send what they sent then, or a mutant of it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(simulated(4), config)
        self.good: dict[int, Objects] = {}
        self.asked: dict[int, Message] = {}
        self.mutate: Callable[[int], list[Objects] | None] = lambda node: None

    def record(self, messages: Iterable[Message]) -> None:
        """Let the clients answer."""
        for message_id in super().push_messages(list(messages)):
            message = self.messages[message_id]
            node = message.metadata.dst_node_id
            (self.good[node],) = self.replies.pop(message_id)
            self.asked[node] = message

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        if not self.good:
            return super().push_messages(messages)
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            message_id = self.asked[node].metadata.message_id
            message.metadata.__dict__["_message_id"] = message_id
            self.messages[message_id] = message
            self.replies[message_id] = self.mutate(node) or [self.good[node]]
            ids.append(message_id)
        return ids


class Running:
    """A strategy whose clients have joined, before its first round."""

    def __init__(self, folder: Path, model: Path, overrides: str) -> None:
        text = f"{Lab(folder, model).base} runs_dir={folder}/runs name=x federation.exclude_after=0 {overrides}"
        self.settings: Settings = compose(CONF, text)
        config = {"overrides": text, "num-server-rounds": 0, "runs-dir": str(folder / "runs")}
        self.run = folder / "runs/x"
        self.grid = Recorded(config)
        self.strategy = EncryptedLora(self.settings, ServerFolder(self.run), self.grid.run_id)
        self.strategy.door.gather(self.grid)
        self.taken: list[wire.Message] = []

    def ask(self) -> list[Message]:
        """The messages of a first round; what the server adds in it is kept in `taken`."""
        messages = list(self.strategy.configure_train(0, ArrayRecord(), NOTHING, self.grid))
        add, self.taken = self.strategy._sum.add, []

        def spied(*args: Any, **more: Any) -> wire.Message:
            self.taken.append(add(*args, **more))
            return self.taken[-1]

        self.strategy._sum.add = spied  # type: ignore[method-assign]
        return messages

    def round(self) -> wire.Message:
        """One round with what the grid makes of the replies. Returns the aggregate."""
        self.strategy.federation.history.clear()
        for member in self.strategy.federation.members:
            member.have = -1
        messages = self.ask()
        self.strategy.aggregate_train(0, self.strategy.stream(self.grid, messages, 60.0))
        return self.strategy.federation.history[-1][0]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "_POLL", 0.0)


def survive_rounds(running: Running, mutants: int, seed: int) -> dict[str, int]:
    """So many mutated updates, three in a round beside an honest one; what became of them."""
    grid, rng = running.grid, random.Random(seed)
    grid.record(running.ask())
    counts = {"sent": 0, "taken": 0}

    def mutate(node: int) -> list[Objects] | None:
        if node not in HOSTILE:
            return None
        counts["sent"] += 1
        return mutant(grid.good[node], rng, tuple(n for n in NODES if n != node))

    while counts["sent"] < mutants:
        grid.mutate = mutate
        aggregate = running.round()
        senders = [m.sender for m in running.taken]
        assert 1 in senders and len(set(senders)) == len(senders) == len(aggregate.contributors)
        counts["taken"] += len(senders) - 1
        if running.settings.crypto.backend == "clear" and running.settings.method.aggregate == "separate":
            assert_is_sum_of(aggregate, running.taken)
    grid.mutate = lambda node: None
    running.round()
    assert [m.sender for m in running.taken] == [1, 2, 3, 4]  # the honest updates of all are still accepted
    return counts


def assert_is_sum_of(aggregate: wire.Message, taken: list[wire.Message]) -> None:
    for part in ("clear", "secret"):
        total = np.zeros(max(len(getattr(m, part)) for m in taken) // 4)
        for message in taken:
            values = np.frombuffer(getattr(message, part), "<f4").astype(np.float64)
            total[: values.size] += values
        found = np.frombuffer(getattr(aggregate, part), "<f4")
        assert found == pytest.approx(total[: found.size], rel=1e-6, abs=1e-30)


def assert_clients_get_the_honest_mean(running: Running) -> None:
    """The real clients take the last aggregate: it is the float64 mean of the updates that they recorded."""
    grid, strategy = running.grid, running.strategy
    grid.good.clear()
    strategy.aggregate_evaluate(
        1, strategy.stream(grid, strategy.configure_evaluate(1, ArrayRecord(), NOTHING, grid), 60.0)
    )
    folder = running.run / "clients"
    updates = [load_file(folder / f"client-{k}/round_0000/update.safetensors") for k in range(4)]
    received = load_file(folder / "client-3/round_0000/received.safetensors")
    samples = [2 * len(SENTENCES[: 3 + k]) for k in range(4)]
    error = public_part(running.settings.crypto).error_bound(4, 1.0)
    for name in (n for n in received if n.endswith(".b")):
        for component, have in ((0, [0, 1, 2, 3]), (2, [1, 2, 3]), (7, [2, 3])):
            weight = sum(samples[k] for k in have)
            mean = sum(samples[k] * updates[k][name][:, component].astype(np.float64) for k in have) / weight
            difference = np.abs(received[name][:, component] - mean)
            assert (difference <= error * sum(samples) / weight + np.abs(mean) * 2**-23).all()


SHARES = {"sealed": 0.35, "fedavg": 0.25, "she_lora": 0.1}  # of all mutants; a tenth each greets, negotiates, evaluates


@EXTREME
@pytest.mark.parametrize("method", SHARES)
@pytest.mark.parametrize("mutants", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_server_survives_every_mutated_update_and_the_honest_ones_are_still_summed_exactly(
    tmp_path: Path, llama: Path, impatient: None, capsys: pytest.CaptureFixture[str], method: str, mutants: int
) -> None:
    common = "federation.min_contributors=1 federation.rounds=1 record_updates=true"
    running = Running(tmp_path, llama, f"method={method} {common} federation.min_clients=4")
    if method == "she_lora":
        strategy = running.strategy
        strategy._negotiate(running.grid, 0, strategy.door.online(running.grid), 60.0)
    counts = survive_rounds(running, round(SHARES[method] * mutants), seed=mutants)
    lines = capsys.readouterr().out.splitlines()
    left_out = sum("left out client-" in line for line in lines)
    assert left_out + counts["taken"] == counts["sent"] > counts["taken"] > 0  # each is said, by name
    assert all(line.startswith("ciphertune |") and line.isprintable() for line in lines)
    if method != "she_lora":
        assert_clients_get_the_honest_mean(running)
    with capsys.disabled():
        print(f"\n{method}: {counts}")


def exchanged(running: Running, mutants: int, seed: int, handle: Callable[[], None]) -> int:
    """Mutants of the recorded replies; `handle` sends the questions and takes what comes."""
    grid, rng, sent = running.grid, random.Random(seed), 0

    def mutate(node: int) -> list[Objects] | None:
        nonlocal sent
        sent += 1
        return mutant(grid.good[node], rng, tuple(n for n in NODES if n != node))

    grid.mutate = mutate
    while sent < mutants:
        handle()
    grid.mutate = lambda node: None
    return sent


@pytest.mark.parametrize("mutants", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_server_survives_every_mutated_answer_to_a_negotiation_and_an_evaluation(
    tmp_path: Path, llama: Path, impatient: None, mutants: int
) -> None:
    running = Running(tmp_path, llama, "method=she_lora federation.min_contributors=2 federation.min_clients=4")
    strategy, grid = running.strategy, running.grid
    online = strategy.door.online(grid)
    strategy._chosen = online
    grid.record([strategy._task(m, "query.wish", 0, 0)[0] for m in online])
    strategy._negotiate(grid, 0, online, 60.0)
    plan = strategy.federation.session.plan
    exchanged(running, round(0.1 * mutants), mutants, lambda: strategy._negotiate(grid, 0, online, 60.0))
    strategy._negotiate(grid, 0, online, 60.0)
    assert strategy.federation.session.plan == plan
    grid.good.clear()
    grid.record(strategy.configure_evaluate(1, ArrayRecord(), NOTHING, grid))

    def evaluate() -> None:
        try:
            messages = strategy.configure_evaluate(1, ArrayRecord(), NOTHING, grid)
            strategy.aggregate_evaluate(1, strategy.stream(grid, messages, 60.0))
        except FederationError as error:
            assert "no client could load" in str(error)

    exchanged(running, round(0.1 * mutants), mutants, evaluate)
    evaluate()
    assert len(strategy.ledger.federated) == 4


@pytest.mark.parametrize("mutants", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_server_survives_every_mutated_greeting_and_takes_in_the_honest_ones(
    tmp_path: Path, llama: Path, impatient: None, mutants: int
) -> None:
    running = Running(tmp_path, llama, "method=sealed federation.min_clients=4")
    grid, door = running.grid, running.strategy.door
    members = list(running.strategy.federation.members)
    grid.record([Message(flower.pack({**door.greeting(), "client": None}), n, "query.join") for n in NODES])

    def late() -> None:
        door._seen.clear()
        running.strategy.federation.members[:] = members[:1]
        door.greet_new(grid)

    exchanged(running, round(0.05 * mutants), mutants, late)

    # whoever is missing is not waited for
    door.settings = replace(door.settings, federation=replace(door.settings.federation, wait_timeout=0.0))

    def first() -> None:
        federation = running.strategy.federation
        door._seen.clear()
        door._refusals.clear()
        federation.members.clear()
        federation._session = None
        with contextlib.suppress(FederationError):
            door.gather(grid)

    exchanged(running, round(0.05 * mutants), mutants + 1, first)
    first()
    assert [m.name for m in running.strategy.federation.members] == [f"client-{k}" for k in range(4)]
