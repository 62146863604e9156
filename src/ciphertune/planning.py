"""Before a run: the settings that are asked for, what the parties would settle, and what they would then exchange.

Bytes and ciphertexts come from the functions that the wire uses, so they are exact. At the end, what small rounds of
the same kind are made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ciphertune import wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.build import public_part
from ciphertune.checks import check
from ciphertune.crypto.base import blocks_for
from ciphertune.errors import SettingsError
from ciphertune.federation import Federation
from ciphertune.hello import Hello
from ciphertune.negotiation import Wish
from ciphertune.plan import MAX_RANK, HeadShape, LayerShape, Plan, column_count
from ciphertune.ranks import Contributor
from ciphertune.settings import Settings, compose
from ciphertune.versions import code_digest

_MOST_CLIENTS = 1000  # of the shorthand
SAMPLED = 8  # most clients of a sample
# values of a client's adapter in it: enough to fill ciphertexts, or caches where nothing is encrypted
_ENCRYPTED, _CLEAR = 1 << 15, 1 << 18
_MOST_LAYERS, _WIDEST = 2, 1024  # of the sample of a product


def methods_of(conf: Path, words: Sequence[str], methods: str | None) -> tuple[list[Settings], list[str]]:
    """The settings of each method, and why others do not go with the overrides. Raises SettingsError."""
    given = [w.partition("=")[2] for w in words if w.startswith("method=")] + ([methods] if methods is not None else [])
    if len(given) > 1:
        raise SettingsError(f"the methods are given as {' and as '.join(given)}")
    names = (
        [n.strip() for n in given[0].split(",")] if given else sorted(p.stem for p in (conf / "method").glob("*.yaml"))
    )
    found, refused, error = [], [], SettingsError("there is no method to plan for")
    for name in dict.fromkeys(names):
        if name == "local" and not given:
            continue
        try:
            found.append(settings_of(conf, [*(w for w in words if not w.startswith("method=")), f"method={name}"]))
        except SettingsError as reason:
            if given:
                raise
            error = reason
            refused.append(f"{name}: {reason}")
    if not found:
        raise error
    return found, refused


def settings_of(conf: Path, words: Sequence[str]) -> Settings:
    """The settings that overrides and shorthands ask for. Raises SettingsError."""
    given = {k: v for k, _, v in (w.partition("=") for w in words)}
    count, rank = _number(given, "clients", _MOST_CLIENTS), _number(given, "rank", MAX_RANK)
    rest = [w for w in words if w.partition("=")[0] not in ("clients", "rank")]
    model = given.get("model")
    if model and not (conf / "model" / f"{model}.yaml").is_file():
        rest = [w for w in rest if not w.startswith("model=")] + ["model=hf", f"model.name={model}"]
    settings = compose(conf, rest)
    federation = settings.federation
    if count:
        clients = tuple(federation.clients[i % len(federation.clients)] for i in range(count))
        least = federation.min_clients if "federation.min_clients" in given else count
        federation = replace(federation, clients=clients, min_clients=least)
    if rank:
        federation = replace(federation, clients=tuple(replace(c, rank=rank) for c in federation.clients))
    settings = replace(settings, federation=federation)
    check(settings)
    if federation.min_clients > len(federation.clients):
        raise SettingsError(
            f"federation.min_clients={federation.min_clients} exceeds the {len(federation.clients)} clients: no round "
            "would begin"
        )
    return settings


def _number(given: Mapping[str, str], key: str, largest: int) -> int:
    """The number in a shorthand, 0 where it is not given. Raises SettingsError."""
    text = given.get(key)
    if text is None:
        return 0
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or not 1 <= int(text) <= largest:
        raise SettingsError(f"{key}={text[:20]}: want a whole number from 1 to {largest}")
    return int(text)


def settle(
    settings: Settings, layers: tuple[LayerShape, ...], heads: tuple[HeadShape, ...]
) -> tuple[wire.Session, tuple[Contributor, ...]]:
    """What the server would settle if all clients of the settings joined, and what each counts as. Columns have no
    names yet: everybody asks for the first ones. Raises FederationError for too few clients.
    """
    negotiates, clients = settings.method.negotiates, settings.federation.clients
    # each client is admitted by a digest of the settings, which takes long over many clients
    short = replace(settings, federation=replace(settings.federation, clients=clients[:1]))
    federation, digest = Federation(short, 0), short.digest().hex()
    parameters = public_part(settings.crypto).digest().hex()
    hellos = [
        Hello(
            node_id=i,
            client=i,
            name=f"client-{i}",
            rank=client.rank,
            budget=client.budget if negotiates else 0.0,
            samples=1,
            heldout=1,
            simulated=True,
            key=bytes(16),
            parameters=parameters,
            settings=digest,
            code=code_digest(),
            initial="",
            layers=layers,
            heads=heads,
        )
        for i, client in enumerate(clients)
    ]
    federation.settle(hellos)
    if negotiates:
        shares = sorted({h.budget for h in hellos})
        named = {b: tuple(np.arange(column_count(x.n, b)) for x in layers) for b in shares}
        federation.negotiate([Wish(h.name, h.budget, named[h.budget]) for h in hellos])
    return federation.session, tuple(federation.contributor(m) for m in federation.members)


@dataclass(frozen=True)
class Load:
    """What one client sends and gets in a round: bytes of whole messages, and ciphertexts in them."""

    up: int
    down: int
    ciphertexts_up: int
    ciphertexts_down: int


def loads(session: wire.Session, people: tuple[Contributor, ...], round_: int) -> list[Load]:
    """What each of those who contribute to a round sends and gets in it."""
    found: dict[Contributor, Load] = {}
    for who in dict.fromkeys(people):
        rank = session.plan.held(who.rank) if session.plan.aggregate == "separate" else max(c.rank for c in people)
        up, blocks_up = _message(session, wire.UPDATE, round_, who.rank, (who,))
        down, blocks_down = _message(session, wire.AGGREGATE, round_, rank, people)
        found[who] = Load(up, down, blocks_up, blocks_down)
    return [found[who] for who in people]


def _message(
    session: wire.Session, kind: int, round_: int, rank: int, people: tuple[Contributor, ...]
) -> tuple[int, int]:
    """Bytes of a whole message, and the ciphertexts in it."""
    size = wire.message_size(session, kind, round_, rank, people)
    if not session.public.encrypts:
        return size, 0
    return size, sum(blocks_for(session.public, n) for n in wire.counts(session.plan, kind, round_, rank, people)[1])


# --- what a small round is made of ------------------------------------------------------------------------------------


def smaller(
    plan: Plan, people: tuple[Contributor, ...], encrypts: bool, times: int = 1
) -> tuple[Plan, tuple[Contributor, ...]]:
    """A plan of the same method and ranks, and those who contribute to its sample; or one that is `times` as large."""
    if plan.aggregate == "separate":
        highest = max(people, key=lambda c: c.rank)
        few = (highest,) * min(len(people), SAMPLED)
        layers = _layers(plan, highest.rank, times * (_ENCRYPTED if encrypts else _CLEAR))
    else:
        ordered = sorted(people, key=lambda c: (c.rank, c.tier))
        count = min(len(ordered), SAMPLED)
        few = tuple(ordered[-1 - i * len(ordered) // count] for i in range(count))
        widest = max(_WIDEST, 2 * sum(c.rank for c in few))
        step = max(1, len(plan.layers) // (times * _MOST_LAYERS))
        chosen = plan.layers[::step][: times * _MOST_LAYERS]
        layers = tuple(LayerShape(x.name, min(x.m, widest), min(x.n, widest)) for x in chosen)
    return _with_layers(plan, layers), few


def _with_layers(plan: Plan, layers: tuple[LayerShape, ...]) -> Plan:
    """The plan for other layers; under names of their own, so that those of equal shapes are equal."""
    columns = tuple(tuple(range(column_count(x.n, plan.budgets[-1]))) for x in layers) if plan.budgets else ()
    heads = plan.heads if layers == plan.layers else ()
    named = tuple(LayerShape(f"{i:05d}", x.m, x.n) for i, x in enumerate(layers))
    return replace(plan, layers=named, heads=heads, columns=columns)


def _layers(plan: Plan, rank: int, target: int) -> tuple[LayerShape, ...]:
    """The first layers, so that an adapter has about `target` values; one, and narrower, where that is too large."""
    chosen: list[LayerShape] = []
    values = 0
    for layer in plan.layers:
        if values >= target:
            break
        chosen.append(layer)
        values += rank * (layer.m + layer.n)
    if len(chosen) > 1 or values <= 2 * target:
        return tuple(chosen)
    (one,) = chosen
    return (LayerShape(one.name, max(1, one.m * target // values), max(1, one.n * target // values)),)


def synthetic(plan: Plan, rank: int, seed: int) -> Adapter:
    """An adapter of the plan's shapes: factors normal(0, 0.02) in float32, heads zero."""
    rng = np.random.default_rng(seed)

    def factor(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        values = rng.standard_normal(shape, dtype=np.float32)
        return np.multiply(values, np.float32(0.02), out=values)

    layers = {x.name: LoraFactors(factor(rank, x.n), factor(x.m, rank), plan.scale) for x in plan.layers}
    return Adapter(layers, {h.name: np.zeros(h.shape, np.float32) for h in plan.heads})
