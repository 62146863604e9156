"""`ciphertune plan`: what a round would cost under each method, before anything runs. Needs no model, only its shapes.

Bytes and ciphertexts are exact (`planning.py`); seconds and memory are extrapolated from a sample (`calibration.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ciphertune import wire
from ciphertune.calibration import Calibration
from ciphertune.columns import basis_ranks
from ciphertune.crypto.base import blocks_for
from ciphertune.launch import app_folder
from ciphertune.outputs import writing
from ciphertune.plan import FACTORS, HeadShape, LayerShape
from ciphertune.planning import loads, methods_of, settle
from ciphertune.ranks import Contributor
from ciphertune.scores import size
from ciphertune.settings import Settings, ckks_params
from ciphertune.shapes import model_shapes
from ciphertune.split import component_size, head_size
from ciphertune.versions import versions

_FLOAT32 = 4  # bytes
_WORD = 8  # bytes of a residue in memory
_SUMS = 3  # ciphertexts in the server's memory per ciphertext of a sum: the old sum, the update, the new sum
_COPIES = 4  # of a product's ciphertexts in memory: one by one, joined, in the message, as its bytes


@dataclass(frozen=True)
class Forecast:
    """What a round costs: means over clients and rounds; peaks of memory are the largest of any client and round."""

    method: str
    bytes_up: float  # of one client
    bytes_down: float
    over_plaintext: float  # both ways, over float32 of what `fedavg` moves: both factors and the heads
    ciphertexts_up: float
    ciphertexts_down: float
    seal_seconds: float  # of one client
    unseal_seconds: float
    add_seconds: float  # of the server, for all clients
    release_seconds: float  # until each client has its bytes
    client_memory: int  # bytes beside Python, its libraries and the model
    server_memory: int  # bytes beside Python, its libraries and Flower's own


def forecast(
    settings: Settings,
    layers: tuple[LayerShape, ...],
    heads: tuple[HeadShape, ...],
    calibration: Calibration,
    rounds: Sequence[int] = (),
) -> Forecast:
    """What a round of the settings' method costs: over the given rounds (from 0), by default all of the settings'.

    All clients take part in each. Raises FederationError when they are too few.
    """
    session, people = settle(settings, layers, heads)
    plan, alike = session.plan, Counter[tuple[object, ...]]()
    last: dict[tuple[object, ...], int] = {}
    for round_ in rounds or range(settings.federation.rounds):
        key = (plan.factors(round_), plan.left_out(round_), plan.rate(round_))
        alike[key] += 1
        last[key] = round_
    found = [(alike[key], _round(settings, session, people, round_, calibration)) for key, round_ in last.items()]

    def over_rounds(name: str) -> Any:
        values = [(count, getattr(one, name)) for count, one in found]
        if name.endswith("_memory"):
            return max(value for _, value in values)
        return sum(count * value for count, value in values) / sum(count for count, _ in values)

    return Forecast(settings.method.name, *(over_rounds(f.name) for f in fields(Forecast)[1:]))


def _round(
    settings: Settings, session: wire.Session, people: tuple[Contributor, ...], round_: int, calibration: Calibration
) -> Forecast:
    """The forecast of one round."""
    plan, public, count = session.plan, session.public, len(people)
    sample, real = calibration.sample(settings, plan, people, round_), loads(session, people, round_)
    # what a sample of a product stands for travels in the clear
    separate = plan.aggregate == "separate"
    like = real if separate else loads(replace(session, public=session.clear), people, round_)
    up, down = sum(x.up for x in like), sum(x.down for x in like)
    largest_up, largest_down = max(x.up for x in like), max(x.down for x in like)
    served = largest_down if separate else up
    blocks_up, blocks_down = sum(x.ciphertexts_up for x in real), sum(x.ciphertexts_down for x in real)
    # what `fedavg` moves: up what each client trains, down what all hold
    enough = max(1, settings.federation.min_contributors)
    held = sorted(c.rank for c in people)[-min(enough, count)]
    components = sum(min(c.rank, held) + held for c in people)
    plain = components * component_size(plan, FACTORS) + 2 * count * head_size(plan)
    found = Forecast(
        method=settings.method.name,
        bytes_up=sum(x.up for x in real) / count,
        bytes_down=sum(x.down for x in real) / count,
        over_plaintext=sum(x.up + x.down for x in real) / (_FLOAT32 * plain),
        ciphertexts_up=blocks_up / count,
        ciphertexts_down=blocks_down / count,
        seal_seconds=sample.seal * up / count + sample.touch * sample.sealing.beyond(up / count),
        unseal_seconds=sample.unseal * down / count + sample.touch * sample.unsealing.beyond(down / count),
        add_seconds=sample.add * up + sample.touch * sample.serving.beyond(served),
        release_seconds=sample.release * largest_down + sample.encode * down,
        client_memory=round(max(sample.sealing.at(largest_up), sample.unsealing.at(largest_down))),
        server_memory=round(sample.serving.at(served)),
    )
    if not public.encrypts:
        return found
    most_up, most_down = max(x.ciphertexts_up for x in real), max(x.ciphertexts_down for x in real)
    if separate:
        if settings.crypto.packed:
            return found
        params = ckks_params(settings.crypto)  # SEAL's memory, which a sample does not see
        ciphertext = 2 * params.poly_modulus_degree * len(params.widths) * _WORD
        return replace(found, server_memory=found.server_memory + _SUMS * most_down * ciphertext)
    each, block = calibration.blocks(settings.crypto), public.block_bytes
    rows = sum(c.rank * blocks_for(public, sum(plan.hidden(c.tier))) for c in people)
    return replace(
        found,
        seal_seconds=found.seal_seconds + each.encrypt * blocks_up / count,
        unseal_seconds=found.unseal_seconds + each.decrypt * blocks_down / count,
        add_seconds=found.add_seconds + each.check * blocks_up,
        release_seconds=found.release_seconds + each.multiply * rows * max(basis_ranks(plan, people)),
        client_memory=found.client_memory + _COPIES * block * max(most_up, most_down),
        server_memory=found.server_memory + block * (blocks_up + _COPIES * most_down),
    )


# --- the command ------------------------------------------------------------------------------------------------------


def plan(app: Path, words: Sequence[str], *, methods: str | None = None, out: Path | None = None) -> int:
    """Print what a round costs under each method, and write it as JSON to `out`. Runs nothing but the calibration.

    words: Hydra overrides, and the shorthands model=NAME (of a model that is no file of conf/model), rank=R (of all
    clients), clients=N.  methods: names with commas between, by default all that go with the overrides, but `local`.
    Raises SettingsError for a mistake in them.
    """
    conf = app_folder(app) / "conf"
    chosen, refused = methods_of(conf, words, methods)
    calibration, found = Calibration(), []
    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        for settings in progress.track(chosen, description="calibrating"):
            layers, heads = _shapes(settings)
            found.append(forecast(settings, layers, heads, calibration))
    layers, heads = _shapes(chosen[0])
    about = {
        "model": chosen[0].model.name,
        "layers": len(layers),
        "values_per_rank": sum(x.m + x.n for x in layers),
        "values_of_heads": sum(h.size for h in heads),
        "ranks": [c.rank for c in chosen[0].federation.clients],
        "rounds": chosen[0].federation.rounds,
        "calibration_seconds": calibration.seconds,
        "versions": versions(),
    }
    if out is not None:
        with writing(out, "--json"):
            out.write_text(json.dumps({"about": about, "methods": [asdict(f) for f in found]}, indent=2) + "\n")
    _print(found, about, refused)
    return 0


def _shapes(settings: Settings) -> tuple[tuple[LayerShape, ...], tuple[HeadShape, ...]]:
    return model_shapes(settings.model, len(settings.data.labels), [c.rank for c in settings.federation.clients])


def _print(found: Sequence[Forecast], about: dict[str, Any], refused: Sequence[str]) -> None:
    ranks = about["ranks"]
    spread = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    table = Table(
        title=f"{about['model']}, {about['layers']} layers, {len(ranks)} clients of {spread}: one round",
        caption=f"Per client, the mean of {about['rounds']} rounds; the server's for all clients. Bytes are exact. "
        "Seconds (of one processor) and memory follow from a sample timed here for "
        f"{about['calibration_seconds']:.1f} s, and leave out training, the negotiation, drawing noise, merging, and "
        "the memory of Python, Flower and the model.",
    )
    columns = ("up", "down", "/ plaintext", "ciphertexts", "client", "server", "client memory", "server memory")
    table.add_column("method")
    for column in columns:
        table.add_column(column, justify="right")
    for f in found:
        table.add_row(
            f.method,
            *(size(x) for x in (f.bytes_up, f.bytes_down)),
            f"{f.over_plaintext:.2f}",
            f"{f.ciphertexts_up:,.0f}" if f.ciphertexts_up else "-",
            *(_time(x) for x in (f.seal_seconds + f.unseal_seconds, f.add_seconds + f.release_seconds)),
            *(size(x) for x in (f.client_memory, f.server_memory)),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
    for line in refused:
        print(f"left out {line}")


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
