"""A whole federation in one process: the real ServerApp and ClientApp over a grid that sends bytes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from flwr.app import Context, RecordDict
from grid import LocalGrid, Tamper, simulated
from tiny import SENTENCES, write_lines

import server_app.app


class Lab:
    """Four clients of ranks 2, 4, 8, 8 with unequal amounts of text, unless the call says otherwise."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        for k in range(4):
            write_lines(folder / f"lab-{k}.jsonl", [{"text": t} for t in SENTENCES[: 3 + k] * 2])
        write_lines(folder / "heldout.jsonl", [{"text": t} for t in SENTENCES[-3:]])
        self.base = (
            f"model=hf model.name={model} model.max_length=32 data=jsonl data.path={folder}/lab-{{client}}.jsonl "
            f"data.heldout_path={folder}/heldout.jsonl federation.rounds=2 federation.compare_local=false "
            "training.steps=2 training.batch_size=2 training.threads=1 training.learning_rate=0.01"
        )
        self.grid: LocalGrid | None = None

    def __call__(
        self,
        overrides: str = "",
        *,
        nodes: dict[int, dict[str, Any]] | None = None,
        tamper: Tamper | None = None,
        outgoing: Any = None,
        page: bool = False,
    ) -> Path:
        """Run it; returns the run folder. Raises what the ServerApp raises. page: also draw it."""
        config = {"overrides": f"{self.base} {overrides}", "num-server-rounds": 0, "runs-dir": str(self.runs)}
        self.grid = LocalGrid(simulated(4) if nodes is None else nodes, config, tamper, outgoing)
        with nullcontext() if page else patch.object(server_app.app, "draw"):
            server_app.app.app(self.grid, Context(self.grid.run_id, 1, {}, RecordDict(), config))
        (found,) = self.runs.iterdir()
        return found


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def rounds(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out
