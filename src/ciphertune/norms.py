"""A fuse against a poisoned mean: what comes back is compared with what this client itself sent in that round.

Under encryption nobody but the clients can see that one of them sent something far outside. They see it in the mean.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ciphertune.adapter import Adapter
from ciphertune.errors import RangeError, StateError
from ciphertune.ranks import update_norm
from ciphertune.runs import read_values, write_json


def norms(adapter: Adapter) -> tuple[float, float]:
    """The norm of what the layers add up to, sqrt(sum ||s B A||^2), and that of the heads."""
    return update_norm(adapter), float(
        np.sqrt(sum(np.square(h, dtype=np.float64).sum() for h in adapter.heads.values()))
    )


def keep_norms(folder: Path, run: int, round_: int, update: Adapter) -> None:
    """Note the norms of the update that this client sends."""
    write_json(_path(folder, run), {"round": round_, "norms": norms(update)})


def check_mean(folder: Path, run: int, round_: int, mean: Adapter, most: float) -> None:
    """Raise RangeError for a mean whose norm is above `most` times that of this client's own update of that round.

    0 allows any. A round in which this client sent nothing is not checked: what it sent earlier says little. Raises
    StateError where what it sent cannot be read back.
    """
    path = _path(folder, run)
    kept_round, kept = _kept(path) if most and path.is_file() else (-1, ())
    if kept_round != round_:
        return
    for found, sent in zip(norms(mean), kept, strict=True):
        if sent and not found <= most * sent:
            raise RangeError(
                f"the mean of round {round_ + 1} has norm {found:.3g}, {found / sent:.0f} times that of this client's "
                f"own update (federation.max_mean_norm={most:g}): another client sent something far outside, and under "
                "encryption the server cannot see which. End this run and find out among the labs before the next one; "
                "with federation.max_mean_norm=0 it would be taken"
            )


def _kept(path: Path) -> tuple[int, tuple[float, float]]:
    remedy = "remove it, and the next mean is taken unchecked"
    values = read_values(path, remedy)
    try:
        layers, heads = (float(x) for x in values["norms"])
        return int(values["round"]), (layers, heads)
    except (KeyError, TypeError, ValueError):
        raise StateError(f"{path} cannot be read back (it is damaged): {remedy}") from None


def _path(folder: Path, run: int) -> Path:
    return folder / "state" / f"norms-{run:x}.json"
