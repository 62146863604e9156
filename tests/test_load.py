"""Many rounds with many clients: what the server keeps in memory and on disk does not grow with the rounds."""

from __future__ import annotations

import gc
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import CONF
from flwr.app import Context, Message, RecordDict
from grid import LocalGrid, simulated

import server_app.app
from ciphertune import exchange, flower, resume
from ciphertune.build import make_plan, session
from ciphertune.crypto.clear import ClearPublic
from ciphertune.crypto.clear_secret import ClearSecret
from ciphertune.plan import LayerShape
from ciphertune.planning import synthetic
from ciphertune.settings import Settings, compose
from ciphertune.task import Terms
from ciphertune.versions import code_digest

CLIENTS, ROUNDS, RANKS = 50, 80, (2, 4, 8, 16)
LAYERS = tuple(LayerShape(f"block.{i}", 12, 16) for i in range(2))
WORDS = (
    f"crypto=clear name=long federation.rounds={ROUNDS} federation.fraction=0.2 federation.compare_local=false "
    f"'federation.clients=[{','.join('{rank:2}' for _ in range(CLIENTS))}]' federation.min_clients={CLIENTS}"
)


@cache
def _settings() -> Settings:
    return compose(CONF, WORDS)


def client(message: Message, context: Context) -> Message:
    """A client that does not train: it sends an adapter that follows from its number."""
    settings, values = _settings(), flower.unpack(message.content)[0]
    k = int(context.node_config["partition-id"])
    rank, secret = RANKS[k % len(RANKS)], ClearSecret(ClearPublic("float32"), settings.crypto.bound)
    report = {"loss": 2.0, "metrics": {"perplexity": 7.4}, "tokens": 40, "train_loss": 2.0}
    if message.metadata.message_type == "query.join":
        hello = {
            "name": f"client-{k}", "simulated": True, "rank": rank, "budget": 0.0, "samples": 10 + k,
            "heldout": 4, "layers": [[x.name, x.m, x.n] for x in LAYERS], "heads": [], "key": bytes(16).hex(),
            "parameters": secret.public.digest().hex(), "settings": settings.digest().hex(), "code": code_digest(),
            "initial": "0" * 16, "identity": f"{k:032x}",
        }  # fmt: skip
        return flower.reply(message, hello)
    if message.metadata.message_type == "evaluate":
        return flower.reply(message, report)
    terms = Terms(*(tuple(values["terms"][0][key]) for key in ("tiers", "budgets", "columns")))
    link = session(settings, make_plan(settings, LAYERS, (), terms.tiers), run=values["run"], key_fingerprint=bytes(16))
    data = exchange.seal(
        synthetic(link.plan, rank, k),
        link,
        secret,
        round_=values["round"],
        sender=values["sender"],
        samples=10 + k,
        total=values["total"],
    )
    return flower.reply(message, report, [data])


@pytest.mark.slow
def test_neither_memory_nor_state_grow_with_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"overrides": WORDS, "num-server-rounds": 0, "runs-dir": str(tmp_path)}
    grid = LocalGrid(simulated(CLIENTS), config)
    used: list[int] = []

    def keep(*arguments: Any) -> None:
        original(*arguments)
        grid.sent.clear()
        grid.answered.clear()
        gc.collect()
        used.append(tracemalloc.get_traced_memory()[0])

    original = resume.keep
    monkeypatch.setattr("server_app.strategy.resume.keep", keep)
    monkeypatch.setattr("grid.app", client)
    tracemalloc.start()
    try:
        server_app.app.app(grid, Context(grid.run_id, 1, {}, RecordDict(), config))
    finally:
        tracemalloc.stop()
    assert len(used) == ROUNDS
    early, late = (sorted(used[at : at + 20])[10] for at in (20, 60))
    assert late - early < 40 * 1000  # an aggregate has more; what Flower notes of a round and the ledger, half of it
    server = tmp_path / "long/server"
    assert len(list(server.glob("state_*"))) == 2 and len(list(server.glob("plan-*"))) == 1
    sizes = [p.stat().st_size for p in server.glob("state_*")]
    assert max(sizes) < 40_000
    assert len(list(server.glob("round_*.msg"))) == ROUNDS
