"""The strategy: it sends, waits, adds what it cannot read, and writes down what happened.

Replies are taken one at a time and added as they come, so that memory stays at one message and one sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from ciphertune import flower, wire
from ciphertune.errors import CiphertuneError, FederationError, FormatError
from ciphertune.federation import Federation, Hello, Member, parse_hello
from ciphertune.ledger import Ledger
from ciphertune.runs import ServerFolder
from ciphertune.scores import lines_of_table, mean, score_of, show
from ciphertune.settings import Settings
from ciphertune.split import counts
from ciphertune.versions import code_digest
from server_app.mail import exchange, open_reply, say


class EncryptedLora(Strategy):
    """Federated LoRA over opaque messages. Each hook of Flower's Strategy does its part; `start` is the loop."""

    def __init__(self, settings: Settings, folder: ServerFolder, run: int) -> None:
        self.settings, self.folder = settings, folder
        self.federation = Federation(settings, run)
        self.ledger = Ledger(settings, folder)
        self._chosen: list[Member] = []  # whom the messages of the current exchange go to
        self._asked: dict[str, Member] = {}  # message id -> whose reply it asks for
        self._seen: set[int] = set()  # nodes that were greeted
        self._simulated = False
        self._refusals: list[str] = []

    def summary(self) -> None:
        """Say what is about to happen."""
        method, crypto = self.settings.method, self.settings.crypto
        say(f"{method.name}: share {method.share}, encrypt {method.select}, ranks {method.fit_rank}, {crypto.backend}")
        say(f"run folder {self.folder.path}")

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self, grid: Grid) -> Result:
        """`start` with what the settings say."""
        federation = self.settings.federation
        return self.start(grid, ArrayRecord(), federation.rounds, federation.round_timeout)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Gather the clients, run the rounds, evaluate the end, compare with training alone.

        The arrays and configs of Flower's signature are not used: the first adapter follows from the seed. Raises
        FederationError in plain words when clients are too few or a round has too few usable updates.
        """
        if evaluate_fn is not None:
            raise FederationError("the server cannot evaluate what it cannot read: clients evaluate and report")
        self.summary()
        self.gather(grid)
        result, nothing = Result(), ConfigRecord()
        for round_ in range(num_rounds):
            self.greet_new(grid)
            started = time.perf_counter()
            replies = self.stream(grid, self.configure_train(round_, initial_arrays, nothing, grid), timeout)
            metrics = self.aggregate_train(round_, replies)[1]
            result.train_metrics_clientapp[round_ + 1] = metrics or MetricRecord()
            self.ledger.close_round(round_, time.perf_counter() - started)
            say(self.ledger.round_line(round_))
        replies = self.stream(grid, self.configure_evaluate(num_rounds, initial_arrays, nothing, grid), timeout)
        result.evaluate_metrics_clientapp[num_rounds] = self.aggregate_evaluate(num_rounds, replies) or MetricRecord()
        if self.settings.federation.compare_local:
            self.compare(grid, timeout)
        summary = self.ledger.finish("completed")
        for line in lines_of_table(summary):
            say(line)
        say(f"adapters in {self.folder.path / 'clients'}, one PEFT folder per client on its own machine")
        return result

    def fail(self, error: BaseException, seconds: float) -> None:
        """Write the summary of a run that failed, and say why in one line."""
        self.ledger.finish("failed", reason=f"{type(error).__name__}: {error}")
        say(f"run failed after {seconds:.0f} s: {error}")

    # --- who takes part -------------------------------------------------------------------------------------------

    def gather(self, grid: Grid) -> None:
        """Wait until enough clients have joined, then make the plan. Raises FederationError when they do not."""
        federation = self.settings.federation
        deadline = time.monotonic() + federation.wait_timeout
        hellos: list[Hello] = []
        said = ""
        while True:
            hellos += self.greet(grid, timeout=max(1.0, deadline - time.monotonic()))
            if len(hellos) >= federation.min_clients:
                break
            state = f"{len(hellos)} of at least {federation.min_clients} clients (federation.min_clients) have joined"
            if time.monotonic() > deadline or self._simulated:
                raise FederationError("; ".join([state, *self._refusals]))
            if state != said:
                said = state
                say(f"waiting up to {federation.wait_timeout:.0f} s: {state} ({', '.join(h.name for h in hellos)})")
            time.sleep(1.0)
        for hello, reason in self.federation.settle(hellos):
            self._refuse(hello.name, reason)
        members = self.federation.members
        if len(members) < federation.min_clients:
            state = f"{len(members)} clients can work together, federation.min_clients={federation.min_clients}"
            raise FederationError("; ".join([state, *self._refusals]))
        assert self.federation.session is not None
        self.folder.plan(self.federation.session.plan, [_row(m) for m in members])
        for member in members:
            say(f"  {member.name}: rank {member.hello.rank}, {member.hello.samples} examples")

    def greet(self, grid: Grid, timeout: float) -> list[Hello]:
        """Greet the nodes not seen before. Simulated nodes play several clients where there are too few nodes."""
        nodes = [n for n in grid.get_node_ids() if n not in self._seen]
        if not nodes:
            return []
        self._seen.update(nodes)
        hellos, simulated = self._join(grid, [(node, None) for node in nodes], timeout)
        if simulated:
            self._simulated = True
            wanted = range(len(nodes), len(self.settings.federation.clients))
            hellos += self._join(grid, [(nodes[k % len(nodes)], k) for k in wanted], timeout)[0]
        return sorted(hellos, key=lambda h: h.name)

    def _join(self, grid: Grid, whom: Sequence[tuple[int, int | None]], timeout: float) -> tuple[list[Hello], bool]:
        """The greetings of (node, client) pairs, and whether the nodes are simulated."""
        hellos, simulated = [], False
        messages = [Message(flower.pack({**self._common(), "client": c}), node, "query.join") for node, c in whom]
        for index, reply in exchange(grid, messages, timeout):
            node, client = whom[index]
            try:
                values = {} if reply.has_error() else flower.unpack(reply.content)[0]
                simulated |= bool(values.get("simulated"))
                hellos.append(parse_hello(open_reply(reply)[0], node, client))
            except CiphertuneError as error:
                self._refuse(f"client {client}" if client is not None else f"node {node % (1 << 32):08x}", str(error))
        return hellos, simulated

    def _refuse(self, who: str, reason: str) -> None:
        self._refusals.append(f"{who}: {reason}")
        say(f"left out {who}: {reason}")

    def greet_new(self, grid: Grid) -> None:
        """Let clients that came later join under the plan as it is."""
        if set(grid.get_node_ids()) <= self._seen:
            return
        for hello in self.greet(grid, timeout=self.settings.federation.wait_timeout):
            try:
                member = self.federation.admit(hello)
                say(f"  {member.name} joins: rank {hello.rank}, {hello.samples} examples")
            except CiphertuneError as error:
                self._refuse(hello.name, str(error))

    # --- Flower's hooks -------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per chosen client, with the aggregates it lacks."""
        self._chosen = self.federation.sample(self._online(grid))
        self._sum = self.federation.open_round(server_round, self._chosen)
        total = sum(m.hello.samples for m in self._chosen)
        return [self._task(member, "train", server_round, total) for member in self._chosen]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add each usable update as it comes; leave out the others with a line. Raises FederationError when too few."""
        scores = []
        for reply in replies:
            member = self._asked[reply.metadata.reply_to_message_id]
            try:
                values, payload = open_reply(reply)
                score = score_of(values)
                if len(payload) != 1:
                    raise FormatError(f"{len(payload)} payloads where one update is expected")
                if self.settings.record_server_view:
                    self.folder.view(server_round, member.name, payload[0])
                started = time.perf_counter()
                message = self._sum.add(payload[0], sender=member.number, who=self.federation.contributor(member))
                seconds = time.perf_counter() - started
                self.ledger.update(
                    server_round, member, values, message, self._counts(message), len(payload[0]), seconds
                )
                scores.append(score)
            except CiphertuneError as error:
                say(f"round {server_round + 1}: left out {member.name}: {error}")
                member.have = -1  # its state is unknown: send everything next time
            else:
                member.have = max(member.have, server_round - 1)
        aggregate = self.federation.close_round(self._sum)
        assert self.federation.session is not None
        self.folder.aggregate(server_round, wire.encode(aggregate, self.federation.session))
        self.ledger.score_before(server_round, mean(scores), len(aggregate.contributors))
        before = mean(scores)
        return None, MetricRecord({"heldout_loss": before.loss}) if before else None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The last mean, to every client."""
        self._chosen = self._online(grid)
        return [self._task(member, "evaluate", server_round, 0) for member in self._chosen]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Scores of the finished adapter. Raises FederationError when nobody could take it."""
        found = self._scores(replies, "evaluate", server_round)
        if not found:
            raise FederationError("no client could load and evaluate the final adapter")
        self.ledger.federated = found
        overall = mean(list(found.values()))
        assert overall is not None
        return MetricRecord({"heldout_loss": overall.loss})

    def compare(self, grid: Grid, timeout: float) -> None:
        """Every client trains alone for as many steps, from the same start."""
        say("for comparison: every client alone, the same number of steps")
        self._chosen = self._online(grid)
        messages = [self._task(m, "train.alone", self.settings.federation.rounds, 0, send=False) for m in self._chosen]
        self.ledger.local = self._scores(self.stream(grid, messages, timeout), "alone", self.settings.federation.rounds)

    def _online(self, grid: Grid) -> list[Member]:
        nodes = set(grid.get_node_ids())
        return [m for m in self.federation.members if m.hello.node_id in nodes]

    def _counts(self, message: wire.Message) -> tuple[int, int]:
        assert self.federation.session is not None
        clear, secret = counts(self.federation.session.plan, message.factors, message.rank)
        return sum(clear), sum(secret)

    # --- messages -------------------------------------------------------------------------------------------------

    def _common(self) -> dict[str, Any]:
        return {"settings": self.settings.digest().hex(), "code": code_digest()}

    def _task(self, member: Member, kind: str, round_: int, total: int, *, send: bool = True) -> Message:
        assert self.federation.session is not None
        aggregates = self.federation.catch_up(member) if send else []
        payload = [wire.encode(m, self.federation.session) for m in aggregates]
        values = {
            **self._common(),
            "client": member.hello.client,
            "round": round_,
            "rounds": self.settings.federation.rounds,
            "sender": member.number,
            "total": total,
            "tiers": self.federation.session.plan.tiers,
            "base": member.have,
            "aggregates": [[m.round, m.rank] for m in aggregates],
        }
        self.ledger.sent(round_, member, sum(map(len, payload)))
        return Message(flower.pack(values, payload), member.hello.node_id, kind, group_id=str(round_))

    def stream(self, grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Replies as they come, for at most `timeout` seconds; `_asked` says whose each one is."""
        for index, reply in exchange(grid, list(messages), timeout):
            self._asked[reply.metadata.reply_to_message_id] = self._chosen[index]
            yield reply

    def _scores(self, replies: Iterable[Message], stage: str, round_: int) -> dict[str, Any]:
        found = {}
        for reply in replies:
            member = self._asked[reply.metadata.reply_to_message_id]
            try:
                values, _ = open_reply(reply)
                found[member.name] = score_of(values)
                self.ledger.stages(round_, member, values)
                say(f"  {member.name} {stage}: held-out {show(found[member.name])}")
            except CiphertuneError as error:
                say(f"{stage}: left out {member.name}: {error}")
        return found


def _row(member: Member) -> dict[str, Any]:
    hello = member.hello
    return {"number": member.number, "name": member.name, "rank": hello.rank, "samples": hello.samples}
