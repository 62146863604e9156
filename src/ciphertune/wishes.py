"""A client's side of the negotiation: how much of A it can afford to encrypt, and which columns it asks for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ciphertune import budget
from ciphertune.adapter import Adapter
from ciphertune.columns import Codes
from ciphertune.crypto.indices import inverse
from ciphertune.crypto.secret import SecretPart
from ciphertune.errors import PlanMismatchError, StateError
from ciphertune.lm import activations
from ciphertune.lm.data import ClientData
from ciphertune.lm.model import LoraModel
from ciphertune.negotiation import own_coverage
from ciphertune.node import NodeSettings
from ciphertune.plan import LayerShape, Plan, column_count
from ciphertune.progress import note
from ciphertune.runs import write
from ciphertune.sensitivity import scores, top
from ciphertune.settings import Settings

Scores = npt.NDArray[np.float64]


def budget_of(node: NodeSettings, run: int, layers: Sequence[LayerShape], secret: SecretPart) -> float:
    """The share of A's columns that this node encrypts in this run: as configured, or measured once and kept.

    Raises SettingsError for a time that none can be found for, StateError where the kept one cannot be read back.
    """
    if not math.isnan(node.budget):
        return node.budget
    path = node.folder / "state" / f"budget-{run:x}.json"
    if path.is_file():
        return _kept_budget(path)
    public = secret.public
    found = budget.choose(
        budget.measure(secret.encrypt, public.slots, node.upstream),
        [x.n for x in layers],
        node.rank,
        slots=public.slots,
        block_bytes=public.block_bytes,
        seconds=node.seconds_per_round,
    )
    note(node.name, f"budget {found.value:g} of the columns of A: {found.reason}")
    write(path, json.dumps(found.value).encode())
    return found.value


def _kept_budget(path: Path) -> float:
    try:
        found = float(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = math.nan
    if not 0 <= found <= 1:
        raise StateError(f"{path} cannot be read back (it is damaged): remove it, and the budget is measured again")
    return found


def score_columns(
    kind: str, model: LoraModel, data: ClientData, settings: Settings, layers: Sequence[LayerShape], *, seed: int
) -> list[Scores]:
    """A score per column of each layer, (n,), on this client's own examples. Raises RangeError, DataError."""
    needed = kind.startswith("wanda")
    adapter: Adapter = model.read()
    samples = settings.method.calibration_samples
    norms = activations.input_norms(model, data.train, settings.training, samples=samples) if needed else {}
    weight = activations.weight_columns(model) if kind == "wanda_weight" else {}
    generator = np.random.default_rng(seed)
    found = []
    for x in layers:
        nothing = np.zeros(x.n)
        found.append(
            scores(
                kind,
                a=adapter.layers[x.name].a,
                weight=weight.get(x.name, nothing),
                norms=norms.get(x.name, nothing),
                generator=generator,
            )
        )
    return found


def wish(found: Sequence[Scores], codes: Sequence[Codes], share: float) -> list[list[int]]:
    """Per layer the codes of the most sensitive columns that a budget pays for, most sensitive first.

    found, codes: (n,) per layer, by column number.  share: of a layer's columns, 0 to 1.
    """
    return [c[top(s, column_count(s.size, share))].tolist() for s, c in zip(found, codes, strict=True)]


def keep_scores(folder: Path, run: int, found: Sequence[Scores]) -> None:
    """Keep the scores, (n,) per layer in the plan's order, on the node until it knows which columns it got.

    Raises OSError where they cannot be written.
    """
    write(_scores_file(folder, run), save({f"{i:05d}": s for i, s in enumerate(found)}))


def agreed_tier(plan: Plan, share: float) -> int:
    """Which of the plan's budgets this client has. Raises PlanMismatchError when it would hide less than it asked."""
    if not plan.negotiates:
        return 0
    if not plan.budgets:
        raise PlanMismatchError("the server asks for an update before the columns to encrypt were negotiated")
    return plan.tier(share)


def tell_coverage(node: NodeSettings, run: int, plan: Plan, share: float, codes: Sequence[Codes]) -> None:
    """Say once, in this node's log, what it got of what it asked for, by its own scores.

    share: this node's budget, of A's columns.  codes: (n,) per layer, the code of each column. Damaged scores are said.
    """
    path = _scores_file(node.folder, run)
    if not path.is_file():
        return
    try:
        found = [s for _, s in sorted(load_file(path).items())]
    except (SafetensorError, OSError) as error:
        note(node.name, f"cannot say what it got of what it asked for: {path.name} is unreadable ({error})")
        return
    finally:
        path.unlink(missing_ok=True)
    counts = plan.hidden(plan.tier(share))
    hidden = [
        inverse(by_column)[np.array(coded[:count], np.int64)].tolist()
        for by_column, coded, count in zip(codes, plan.columns, counts, strict=True)
    ]
    coverage, risk = own_coverage(found, hidden, share)
    note(
        node.name,
        f"{'encrypts' if plan.select == 'negotiated' else 'leaves out'} "
        f"{sum(counts)} of {sum(x.n for x in plan.layers)} columns of A, "
        f"{coverage:.0%} of those it asked for; {risk:.0%} of their sensitivity stays clear",
    )


def _scores_file(folder: Path, run: int) -> Path:
    return folder / "state" / f"scores-{run:x}.safetensors"
