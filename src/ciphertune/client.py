"""One client of one run. Flower starts a new process per message, so everything it knows lies in files of its node.

<run>/clients/<node>/state/adapter.safetensors     the last mean it was given, with the round it came from
<run>/clients/<node>/state/optimizer-*.safetensors AdamW's moments
<run>/clients/<node>/state/before/                 both as they were before the last round it trained in
<run>/clients/<node>/state/data.safetensors        its examples, encoded
<run>/clients/<node>/adapter/                      the finished adapter, a PEFT folder
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ciphertune import exchange, merging, wire, wishes
from ciphertune.adapter import Adapter, difference
from ciphertune.build import make_plan, session
from ciphertune.build_client import secret_part
from ciphertune.crypto.secret import SecretPart
from ciphertune.errors import PlanMismatchError
from ciphertune.greeting import join, shapes
from ciphertune.lm import cache as lm_cache
from ciphertune.lm import data as lm_data
from ciphertune.lm import evaluate as lm_evaluate
from ciphertune.lm import model as lm_model
from ciphertune.lm import train as lm_train
from ciphertune.node import NodeSettings
from ciphertune.noise import Noise, after, released
from ciphertune.norms import check_mean, keep_norms
from ciphertune.plan import Plan
from ciphertune.progress import Progress, note
from ciphertune.ranks import damped, norm_weight
from ciphertune.release import protected
from ciphertune.settings import Settings
from ciphertune.state import begin_round, load_state, record, rewind, save_state
from ciphertune.task import Task, Terms, parse_task

_STATE = "state/adapter.safetensors"


@dataclass
class Client:
    """The parts that the messages of one client share, opened once per process and message."""

    settings: Settings
    node: NodeSettings
    run: int
    model: lm_model.LoraModel
    data: lm_data.ClientData
    secret: SecretPart
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds inside to `stage`."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def plan(self, terms: Terms) -> Plan:
        """The plan that follows from this client's own settings and model: the server's say is in the terms alone."""
        layers, heads = shapes(self.model.read())
        return make_plan(self.settings, layers, heads, terms.tiers, terms.budgets, terms.columns)

    def session(self, plan: Plan) -> wire.Session:
        """What all messages under this plan have in common."""
        return session(self.settings, plan, run=self.run, key_fingerprint=self.secret.fingerprint)

    @cached_property
    def budget(self) -> float:
        """The share of the columns of A that this client encrypts, where the method negotiates them."""
        if not self.settings.method.negotiates:
            return 0.0
        return wishes.budget_of(self.node, self.run, shapes(self.model.read())[0], self.secret)


def task_of(what: str, values: dict[str, Any]) -> Task | None:
    """The task in a message; a client that joins or trains alone has none. Raises FormatError."""
    return None if what in ("join", "alone") else parse_task(values)


def open_client(settings: Settings, node: NodeSettings, run: int, task: Task | None) -> Client:
    """Key, then data, then model: the cheap mistakes are found first. Raises CiphertuneError."""
    start = time.perf_counter()
    rank = node.rank if task is None else _held(settings, node, task)
    secret = secret_part(settings.crypto, node)
    data = _data(settings, node, run)
    model = lm_model.load(
        settings.model, rank=rank, labels=settings.data.labels, device=node.device, seed=settings.seed
    )
    return Client(settings, node, run, model, data, secret, {"load": time.perf_counter() - start})


def _held(settings: Settings, node: NodeSettings, task: Task) -> int:
    """How many components the adapter has in this task. Raises PlanMismatchError for more than the server may ask."""
    if not settings.method.common:
        return node.rank
    found = max(task.terms.tiers)
    if not 1 <= found <= settings.most_held:
        raise PlanMismatchError(
            f"the server wants this client to hold {found} components, {settings.most_held} at most are expected"
        )
    return found


def _data(settings: Settings, node: NodeSettings, run: int) -> lm_data.ClientData:
    """The examples as they were when this node joined: its weight must not change while the run goes on."""
    node.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = node.folder / "state" / "data.safetensors"
    data = lm_cache.load_data(path, run=run)
    if data is None:
        tokenizer = lm_model.load_tokenizer(settings.model)
        part = node.part(settings.data)
        data = lm_data.load_client_data(
            settings.data, settings.model, tokenizer, client=part, clients=node.clients, path=node.data_path
        )
        lm_cache.save_data(path, data, run=run)
    return data


def handle(
    what: str, client: Client, task: Task | None, received: Sequence[bytes]
) -> tuple[dict[str, Any], list[bytes]]:
    """Answer one message: join | wish | train | evaluate | alone. Returns the report and what travels.

    task: what `task_of` found, which the client was opened for.
    """
    if task is None:
        return (join if what == "join" else alone)(client), []
    if what == "train":
        update, report = train_round(client, task, received)
        return report, [update]
    if what == "wish":
        return wish(client, task, received), []
    return finish(client, task, received), []


def wish(client: Client, task: Task, received: Sequence[bytes]) -> dict[str, Any]:
    """Score the columns of A on this client's own examples, and name those it wants encrypted, by their codes."""
    client.model.write(_catch_up(client, task, received)[0])
    method, plan = client.settings.method, client.plan(task.terms)
    with client.timed("score"):
        kind = method.first_score if task.round == 0 else method.score
        # random scores from a public seed would tell which column each code is
        drawn = client.secret.derive(f"scores {client.run} {client.node.name} {task.round}".encode())
        found = wishes.score_columns(
            kind, client.model, client.data, client.settings, plan.layers, seed=int.from_bytes(drawn, "little")
        )
        codes = exchange.codes_of(client.session(plan), client.secret)
        wishes.keep_scores(client.node.folder, client.run, found)
    return {"columns": wishes.wish(found, codes, client.budget), "seconds": client.seconds}


def train_round(client: Client, task: Task, received: Sequence[bytes]) -> tuple[bytes, dict[str, Any]]:
    """Take the last means, measure them, train, seal. Returns the update and the report of plain values."""
    initial = client.model.read()
    adapter, _ = _catch_up(client, task, received)
    client.model.write(adapter)
    report = _evaluate(client) if client.settings.federation.evaluates(task.round) else {}
    plan = client.plan(task.terms)
    tier, link = wishes.agreed_tier(plan, client.budget), client.session(plan)
    if plan.budgets:
        codes = exchange.codes_of(link, client.secret)
        wishes.tell_coverage(client.node, client.run, plan, client.budget, codes)
    factors = plan.factors(task.round)
    rank = client.node.rank if plan.share == "none" else plan.shared(client.node.rank)
    if rank < 1:
        raise PlanMismatchError(f"rank {client.node.rank} is below the plan's lowest tier, {plan.tiers[0]}")
    client.model.freeze("" if len(factors) != 1 else "a" if factors == ("b",) else "b", rank)
    if rank < client.node.rank and task.round == 0:
        few = "too few clients have more for a mean of theirs to be released, or the settings allow no more"
        note(client.node.name, f"trains the first {rank} components of its {client.node.rank}: {few}")
    progress = Progress(client.node.name, f"round {task.round + 1}/{task.rounds}")
    training, factor = client.settings.training, client.settings.method.rate_factor
    begin_round(client.node.folder, client.run, task.round)
    with client.timed("train"):
        result = lm_train.train(
            client.model,
            client.data.train,
            replace(training, learning_rate=factor * training.rate(task.round, client.settings.federation.rounds)),
            seed=seed(client, task.round),
            # products and stacks give every client new factors, to which the moments of the old ones mean nothing
            state=None
            if plan.aggregate != "separate"
            else client.node.folder / "state" / f"optimizer-{client.run:x}.safetensors",
            progress=progress,
        )
    trained = client.model.read()
    guide = difference(adapter, initial) if plan.select == "entries" else adapter
    # what is held beyond the client's own components did not train, and is the others' to send
    update = protected(client, trained.first(rank), adapter.first(rank), task)
    if plan.common:
        if task.shares[plan.tiers.index(rank)] < len(client.data.train) / task.total:
            raise PlanMismatchError("the server says that fewer clients train what this one trains than this one alone")
        update = damped(update, adapter, plan.tiers, task.shares)
    if client.settings.record_updates:
        record(client.node.folder / f"round_{task.round:04d}" / "update.safetensors", update)
    with client.timed("seal"):
        data = exchange.seal(
            update,
            link,
            client.secret,
            round_=task.round,
            sender=task.sender,
            samples=norm_weight(update) if plan.weighting == "norm" else len(client.data.train),
            total=task.total,
            tier=tier,
            guide=guide.first(rank),
        )
    keep_norms(client.node.folder, client.run, task.round, update)
    if plan.share == "none":
        save_state(client.node.folder / _STATE, trained, run=client.run, round_=task.round)
    return data, report | {"train_loss": result.loss, "seconds": client.seconds}


def finish(client: Client, task: Task, received: Sequence[bytes]) -> dict[str, Any]:
    """Take the last mean, measure it, and leave it, rounded, as a PEFT folder."""
    mean, noise = _catch_up(client, task, received)
    client.model.write(mean)
    report = _evaluate(client)
    with client.timed("save"):
        if client.settings.model.release == "bfloat16":
            client.model.write(released(mean, noise, product=client.settings.method.aggregate == "product"))
        client.model.save(client.node.folder / "adapter")
        merging.keep_beside(client.node.folder, client.run)
    return report | {"seconds": client.seconds}


def alone(client: Client) -> dict[str, Any]:
    """The same number of steps from the same start without the others: what joining must beat. Nothing is kept."""
    progress, training = Progress(client.node.name, "alone"), client.settings.training
    with client.timed("train"):
        training = replace(training, steps=training.steps * client.settings.federation.rounds)
        client.model.freeze("")
        lm_train.train(client.model, client.data.train, training, seed=seed(client, 0), progress=progress)
    return _evaluate(client) | {"seconds": client.seconds}


def seed(client: Client, round_: int) -> int:
    """Seed of one client's batches in one round."""
    return lm_train.batch_seed(client.settings.seed, client.node.name, round_)


def _catch_up(client: Client, task: Task, received: Sequence[bytes]) -> tuple[Adapter, Noise]:
    """This node's adapter after the aggregates that came along, and the noise in it.

    Raises PlanMismatchError when earlier ones are missing.
    """
    path = client.node.folder / _STATE
    initial = client.model.read()
    rewind(client.node.folder, client.run, task.round)
    adapter, at, noise = load_state(path, initial, run=client.run)
    if at >= task.round:  # two aggregates of one round, subtracted, would show who is in one of them alone
        raise PlanMismatchError(f"this node holds the mean of round {at}, and is asked for round {task.round} again")
    if client.settings.method.fit_rank == "merge" and merging.merged_at(client.node.folder, client.run) < at:
        adapter, at = initial, -1  # the state without what was merged is worth nothing: ask for everything
    if at < task.base:
        raise PlanMismatchError(f"this node holds the mean of round {at}, the server expects {task.base}")
    if len(task.aggregates) != len(received):
        raise PlanMismatchError(f"{len(received)} aggregates came along where {len(task.aggregates)} were announced")
    with client.timed("unseal"):
        for found, data in zip(task.aggregates, received, strict=True):
            link, at = client.session(client.plan(found.terms)), found.round
            adapter, message = exchange.unseal(data, link, client.secret, round_=at, rank=found.rank, base=adapter)
            exchange.enough(message, link.plan, client.settings.federation.min_contributors)
            own = adapter.first(link.plan.shared(client.node.rank))  # as much as it sent of it
            check_mean(client.node.folder, client.run, at, own, client.settings.federation.max_mean_norm)
            noise = after(noise, message, link, adapter)
            if link.plan.fit_rank == "merge":
                merging.merge(client.node.folder, client.run, at, adapter)
                adapter = Adapter(initial.layers, adapter.heads)  # started anew on the merged model
    if client.settings.method.fit_rank == "merge":
        client.model.add_to_base(merging.merged(client.node.folder, client.run))
    if received:
        save_state(path, adapter, run=client.run, round_=at, noise=noise)
        if client.settings.record_updates:
            record(client.node.folder / f"round_{at:04d}" / "received.safetensors", adapter)
    return adapter, noise


def _evaluate(client: Client) -> dict[str, Any]:
    with client.timed("evaluate"):
        found = lm_evaluate.evaluate(client.model, client.data.heldout, client.settings.training)
    return {"loss": found.loss, "metrics": dict(found.metrics), "tokens": found.tokens}
