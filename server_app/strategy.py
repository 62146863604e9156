"""The strategy: it sends, waits, adds what it cannot read, and writes down what happened.

Replies are taken one at a time and added as they come, so that memory stays at one message and one sum.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from ciphertune import flower, resume, wire
from ciphertune.errors import CiphertuneError, FederationError, FormatError, TooFewError
from ciphertune.federation import Federation, Member
from ciphertune.ledger import Ledger
from ciphertune.progress import say
from ciphertune.runs import ServerFolder
from ciphertune.scores import Score, in_short, lines_of_table, mean, report_of, score_of, seconds_of, show
from ciphertune.settings import Settings
from ciphertune.task import Terms
from server_app.conduct import Conduct
from server_app.door import Door
from server_app.mail import declines, exchange, open_reply
from server_app.table import Table

_ATTEMPTS = 3  # at a round in which too few updates are usable


class EncryptedLora(Strategy):
    """Federated LoRA over opaque messages. Each hook of Flower's Strategy does its part; `start` is the loop."""

    def __init__(self, settings: Settings, folder: ServerFolder, run: int) -> None:
        self.settings, self.folder = settings, folder
        self.federation = Federation(settings, run)
        self.ledger = Ledger(settings, folder, self.federation.excluded)
        self.conduct = Conduct(self.federation, folder)
        self.door = Door(settings, self.federation)
        self.table = Table(settings, self.federation)
        self._chosen: list[Member] = []  # whom the messages of the current exchange go to
        self._aggregate: wire.Message | None = None  # of the round that was closed last
        self._asked: dict[str, Member] = {}  # message id -> whose reply it asks for
        self._scores_before: list[Score] = []
        self._answered: set[str] = set()  # whose updates were usable in an attempt at a round that came to nothing

    def summary(self) -> None:
        """Say what is about to happen."""
        say(in_short(self.settings))
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
        self.door.gather(grid)
        if not self.federation.next_round:
            self.folder.plan(self.federation.session.plan, self.federation.members)
        result, nothing = Result(), ConfigRecord()
        for round_ in range(self.federation.next_round, num_rounds):
            started = time.perf_counter()
            result.train_metrics_clientapp[round_ + 1] = self._round(grid, round_, timeout) or MetricRecord()
            self.ledger.close_round(round_, mean(self._scores_before), time.perf_counter() - started)
            assert self._aggregate is not None
            resume.keep(self.folder, self.federation, self.ledger, self._aggregate)
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

    def _round(self, grid: Grid, round_: int, timeout: float) -> MetricRecord | None:
        """One round; begun again while too few updates are usable. Raises TooFewError when that happens too often."""
        for left in reversed(range(_ATTEMPTS)):
            self.door.greet_new(grid)
            if self.table.due(round_, self.door.online(grid)):
                self._negotiate(grid, round_, self.door.wait_for_enough(grid), timeout)
            tasks = self.configure_train(round_, ArrayRecord(), ConfigRecord(), grid)
            try:
                return self.aggregate_train(round_, self.stream(grid, tasks, timeout))[1]
            except TooFewError as error:
                if not left:
                    raise
                say(f"{error}; it is begun again")
                self.folder.cut(round_, but="negotiation")  # which may stand
        raise AssertionError

    def fail(self, error: BaseException, seconds: float) -> None:
        """Say in one line why a run failed, and write its summary."""
        say(f"run failed after {seconds:.0f} s: {error or type(error).__name__}")
        try:
            self.ledger.finish("failed", reason=f"{type(error).__name__}: {error}")
        except (OSError, ValueError) as second:  # perhaps for the same reason
            say(f"no summary: {type(second).__name__}: {second}")
        if done := self.federation.next_round:
            say(f"{done} rounds are kept: `ciphertune run resume={self.folder.path}` goes on from there")

    # --- Flower's hooks -------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per chosen client, with the aggregates it lacks."""
        self._chosen = self._choose(server_round, self.table.seated(self.door.wait_for_enough(grid)))
        self._sum = self.federation.open_round(server_round, self._chosen)
        total, shares = self.federation.total(self._chosen), self.federation.shares(self._chosen)
        self.ledger.open_round()
        messages = []
        for member in self._chosen:
            message, size = self._task(member, "train", server_round, total, shares)
            self.ledger.asked(server_round, member, size)
            messages.append(message)
        return messages

    def _choose(self, round_: int, online: list[Member]) -> list[Member]:
        """Whom to ask. Where enough answered an earlier attempt, it failed for the weight of those that did not."""
        answered = [m for m in online if m.name in self._answered]
        self._answered.clear()
        if len(answered) >= self.settings.federation.min_contributors:
            return answered
        return self.federation.sample(round_, online)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add each usable update as it comes; leave out the others with a line. Raises FederationError when too few."""
        self._scores_before, seconds = [], 0.0
        for reply in replies:
            member = self._asked[reply.metadata.reply_to_message_id]
            started = time.perf_counter()
            if declines(reply):
                self.ledger.declined(server_round, member)
            try:
                self._take(server_round, member, reply)
                member.have = max(member.have, server_round - 1)
                self._answered.add(member.name)
            except CiphertuneError as error:
                self.conduct.left_out(f"round {server_round + 1}", server_round, member, error)
                member.have = -1  # its state is unknown: send everything next time
            seconds += time.perf_counter() - started
        started = time.perf_counter()
        self._aggregate = self.federation.close_round(self._sum)
        for member in self._chosen:
            member.silent = member.name not in self._answered
        self._answered.clear()
        if self._aggregate.rank < max(c.rank for c in self._aggregate.contributors):
            say(f"components above {self._aggregate.rank} were not averaged: too few, or too light, clients have them")
        self.ledger.aggregated(server_round, seconds + time.perf_counter() - started, **self._sum.extra)
        before = mean(self._scores_before)
        return None, MetricRecord({"heldout_loss": before.loss}) if before else None

    def _take(self, round_: int, member: Member, reply: Message) -> None:
        """Check one reply as a whole, then add its update. Raises CiphertuneError, and then nothing was added."""
        values, payload = open_reply(reply)
        evaluated = self.settings.federation.evaluates(round_)
        report = report_of(values, member.hello.heldout, self.settings.model.max_length, evaluated=evaluated)
        if len(payload) != 1:
            raise FormatError(f"{len(payload)} payloads where one update is expected")
        if self.settings.record_server_view:
            self.folder.view(round_, member.name, payload[0])
        message = self._sum.add(payload[0], sender=member.number, who=self.federation.contributor(member))
        self.ledger.update(round_, member, report, message, self._counts(message), len(payload[0]))
        if report.score:
            self._scores_before.append(report.score)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The last mean, to every client."""
        self._chosen = self.door.online(grid)
        return [self._task(member, "evaluate", server_round, 0)[0] for member in self._chosen]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Scores of the finished adapter. Raises FederationError when nobody could take it."""
        found = self._scores(replies, "evaluate", server_round)
        if not found:
            raise FederationError("no client could load and evaluate the final adapter")
        self.ledger.federated = found
        overall = mean(list(found.values()))
        assert overall is not None
        return MetricRecord({"heldout_loss": overall.loss})

    def _negotiate(self, grid: Grid, round_: int, online: list[Member], timeout: float) -> None:
        """Ask the clients which columns they want encrypted, and make the plan from their answers."""
        self._chosen = online
        asked = [self._task(member, "query.wish", round_, 0) for member in online]
        sent = {member.name: size for member, (_, size) in zip(online, asked, strict=True)}
        wishes = []
        for reply in self.stream(grid, [message for message, _ in asked], timeout):
            member = self._asked[reply.metadata.reply_to_message_id]
            try:
                values, _ = open_reply(reply, most=self.table.most_text)
                wish, seconds = self.table.wish(member, values), seconds_of(values)
                wishes.append(wish)
                self.ledger.stages(round_, member, seconds)
                self.ledger.negotiated(round_, member, len(json.dumps(values["columns"])), sent[member.name])
                member.have = max(member.have, round_ - 1)
            except CiphertuneError as error:
                self.conduct.left_out("negotiation", round_, member, error)
                member.have = -1
        outcome = self.table.settle(round_, online, wishes)
        if outcome:
            self.folder.plan(self.federation.session.plan, self.federation.members, negotiation=outcome)

    def compare(self, grid: Grid, timeout: float) -> None:
        """Every client trains alone for as many steps, from the same start."""
        say("for comparison: every client alone, the same number of steps")
        self._chosen = self.door.online(grid)
        rounds = self.settings.federation.rounds
        messages = [self._task(m, "train.alone", rounds, 0, send=False)[0] for m in self._chosen]
        self.ledger.local = self._scores(self.stream(grid, messages, timeout), "alone", rounds)

    def _counts(self, message: wire.Message) -> tuple[int, int]:
        plan = self.federation.session.plan
        found = wire.counts(plan, message.kind, message.round, message.rank, message.contributors)
        clear, secret = map(sum, found)
        return (clear, secret) if self.federation.session.public.encrypts else (clear + secret, 0)

    # --- messages -------------------------------------------------------------------------------------------------

    def _task(
        self, member: Member, kind: str, round_: int, total: int, shares: Sequence[float] = (), *, send: bool = True
    ) -> tuple[Message, int]:
        aggregates = self.federation.catch_up(member) if send else []
        payload = [wire.encode(m, link) for m, link in aggregates]
        plans = [self.federation.session.plan, *(link.plan for _, link in aggregates)]
        distinct = list(dict.fromkeys(plans))  # the current one first
        terms = [Terms.of(plan).plain() for plan in distinct]
        values = {
            **self.door.greeting(),
            "client": member.hello.client,
            "round": round_,
            "rounds": self.settings.federation.rounds,
            "sender": member.number,
            "total": total,
            "shares": shares or (1.0,) * len(plans[0].tiers),
            "terms": terms,
            "base": member.have,
            "aggregates": [[m.round, m.rank, distinct.index(link.plan)] for m, link in aggregates],
        }
        named = sum(len(json.dumps(t["columns"])) for t in terms if t["columns"])
        message = Message(flower.pack(values, payload), member.hello.node_id, kind, group_id=str(round_))
        return message, named + sum(map(len, payload))

    def stream(self, grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Replies as they come, for at most `timeout` seconds; `_asked` says whose each one is."""
        self._asked.clear()  # nobody answers earlier messages any more
        messages = list(messages)
        most = [self._most(m, member) for m, member in zip(messages, self._chosen, strict=True)]
        for index, reply in exchange(grid, messages, timeout, most):
            self._asked[reply.metadata.reply_to_message_id] = self._chosen[index]
            yield reply

    def _most(self, message: Message, member: Member) -> int:
        """Bytes of arrays that a reply may hold: an update's, and of any other none."""
        if message.metadata.message_type != "train":
            return 0
        round_, who = int(message.metadata.group_id), self.federation.contributor(member)
        return wire.update_size(self.federation.session, round_, who)

    def _scores(self, replies: Iterable[Message], stage: str, round_: int) -> dict[str, Score]:
        found: dict[str, Score] = {}
        for reply in replies:
            member = self._asked[reply.metadata.reply_to_message_id]
            try:
                values, _ = open_reply(reply)
                found[member.name] = score_of(values, member.hello.heldout, self.settings.model.max_length)
                self.ledger.stages(round_, member, seconds_of(values))
                say(f"  {member.name} {stage}: held-out {show(found[member.name])}")
            except CiphertuneError as error:
                self.conduct.left_out(stage, round_, member, error)
        return found
