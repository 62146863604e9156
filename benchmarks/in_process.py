"""A whole federation in this process: the real ServerApp and ClientApp, their messages through bytes, no Ray.

What every message would read from disk anew, settings, tokenizer and base model, is kept from one to the next, and
the evaluation of the same weights on the same examples is not repeated.

    python benchmarks/in_process.py RUNS_DIR --clients 4 --seeds 3 method=sealed experiment=smoke

Bytes, sums and adapters are those of `ciphertune run` under the same seed; seconds are not, since the clients take
turns. Each is in RUNS_DIR/seed-N.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from flwr.app import Context, RecordDict  # noqa: E402
from grid import LocalGrid, simulated  # noqa: E402

import server_app.app  # noqa: E402
from ciphertune import run_config  # noqa: E402
from ciphertune.lm import evaluate  # noqa: E402
from ciphertune.lm import model as lm_model  # noqa: E402
from ciphertune.settings import ModelSettings  # noqa: E402

_compose = functools.lru_cache(maxsize=8)(run_config.compose)
_load_tokenizer = functools.lru_cache(maxsize=2)(lm_model.load_tokenizer)
_load_base = lm_model.load_base
_BASES: dict[str, Any] = {}
_evaluated = evaluate.evaluate
_EVALUATED: dict[bytes, Any] = {}


def _kept_base(settings: ModelSettings, tokenizer: Any, labels: Any, *where: Any) -> Any:
    """A copy of the base model as it was read: adapters change the modules that they are put into."""
    key = repr((settings, tuple(labels), where))
    if key not in _BASES:
        _BASES.clear()
        _BASES[key] = _load_base(settings, tokenizer, labels, *where)
    return copy.deepcopy(_BASES[key])


def _evaluate(model: Any, data: Any, settings: Any) -> Any:
    """The evaluation; that of equal weights on equal examples once, as of equal ranks or before the first round."""
    digest = hashlib.blake2b(repr((model.task, settings.eval_batch_size, data)).encode())
    for name, tensor in model.model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    if (key := digest.digest()) not in _EVALUATED:
        _EVALUATED[key] = _evaluated(model, data, settings)
    return _EVALUATED[key]


def federate(words: list[str], runs: Path, clients: int, seed: int) -> Path:
    """Run it; its folder, in which nothing else was. Raises what the ServerApp raises."""
    folder = runs / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    own = [f"seed={seed}", f"data.seed={seed}", f"name={folder.name}"]
    config = {"overrides": shlex.join([*words, *own]), "num-server-rounds": 0, "runs-dir": str(runs)}
    grid = LocalGrid(simulated(clients), config)
    kept = {"load_tokenizer": _load_tokenizer, "load_base": _kept_base}
    with (
        patch.object(server_app.app, "draw"),
        patch.object(run_config, "compose", _compose),
        patch.multiple(lm_model, **kept),
        patch.object(evaluate, "evaluate", _evaluate),
    ):
        server_app.app.app(grid, Context(grid.run_id, 1, {}, RecordDict(), config))
    return folder


def main() -> None:
    """Run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("words", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_intermixed_args()
    for seed in range(options.seeds):
        federate(options.words, options.runs.resolve(), options.clients, seed)


if __name__ == "__main__":
    main()
