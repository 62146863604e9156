"""The encoded examples of a client in a file, so that a run reads its data once and keeps to it until the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ciphertune.lm.data import ClientData, Encoded
from ciphertune.runs import write


def save_data(path: Path, data: ClientData, *, run: int) -> None:
    """Write the examples of `run`: token ids and labels in a row, with the length of each."""
    tensors: dict[str, npt.NDArray[np.int64]] = {}
    for name, examples in (("train", data.train), ("heldout", data.heldout)):
        labels = [(e.labels,) if isinstance(e.labels, int) else e.labels for e in examples]
        tensors[f"{name}.ids"] = _flat([e.input_ids for e in examples])
        tensors[f"{name}.lengths"] = np.array([len(e.input_ids) for e in examples], np.int64)
        tensors[f"{name}.labels"] = _flat(labels)
    classes = any(isinstance(e.labels, int) for e in (*data.train, *data.heldout))
    write(path, save(tensors, metadata={"run": str(run), "classes": str(classes), "description": data.description}))


def load_data(path: Path, *, run: int) -> ClientData | None:
    """The examples stored for `run`; None when there are none, or the file cannot be read back."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            if about.get("run") != str(run):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        train, heldout = (_examples(tensors, name, about["classes"] == "True") for name in ("train", "heldout"))
        return ClientData(train, heldout, about["description"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None  # it is only a cache: read the data again


def _flat(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    return np.array([x for row in rows for x in row], np.int64)


def _examples(tensors: dict[str, npt.NDArray[np.int64]], name: str, classes: bool) -> tuple[Encoded, ...]:
    ends = np.cumsum(tensors[f"{name}.lengths"])
    ids = np.split(tensors[f"{name}.ids"], ends[:-1]) if ends.size else []
    flat = tensors[f"{name}.labels"]
    labels = flat.tolist() if classes else [tuple(x.tolist()) for x in np.split(flat, ends[:-1])] if ends.size else []
    return tuple(Encoded(tuple(i.tolist()), label) for i, label in zip(ids, labels, strict=True))
