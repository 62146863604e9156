"""What FLoRA merges into the base model (arXiv 2409.05976): the sum of all updates so far, dense, in a client's files.

Dense is what the method asks for: with every round the rank of what was merged grows. It takes the memory of the
adapted weights once more, so this is for comparison at small sizes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ciphertune.adapter import Adapter
from ciphertune.errors import StateError
from ciphertune.runs import write

Weights = dict[str, npt.NDArray[np.float32]]


def merged(folder: Path, run: int) -> Weights:
    """The sum so far per layer, shape (m, n); empty before the first. Raises StateError for a damaged file."""
    return _read(_file(folder, run))[0]


def merged_at(folder: Path, run: int) -> int:
    """The last round in the sum, -1 for none."""
    return _read(_file(folder, run))[1]


def merge(folder: Path, run: int, round_: int, adapter: Adapter) -> None:
    """Add the update of a round to the sum, once."""
    total, at = _read(_file(folder, run))
    if round_ <= at:  # the process ended between this and the client's own state
        return
    for name, factors in adapter.layers.items():
        total[name] = (total.get(name, 0.0) + factors.delta()).astype(np.float32)
    write(_file(folder, run), save(total, metadata={"round": str(round_)}))


def keep_beside(folder: Path, run: int) -> None:
    """Put the sum into the finished adapter's folder: it is to be added to the base model's weights."""
    if _file(folder, run).is_file():
        shutil.copyfile(_file(folder, run), folder / "adapter" / "merged.safetensors")


def _read(path: Path) -> tuple[Weights, int]:
    if not path.is_file():
        return {}, -1
    try:
        with safe_open(path, framework="numpy") as file:
            found: Weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            return found, int(file.metadata()["round"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path} cannot be read back (it is damaged): start a new run under another name") from error


def _file(folder: Path, run: int) -> Path:
    return folder / "state" / f"merged-{run:x}.safetensors"
