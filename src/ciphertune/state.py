"""An adapter in a safetensors file: a client's state between messages, and the recordings for the audit."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.errors import StateError
from ciphertune.noise import Noise
from ciphertune.runs import write


def record(path: Path, adapter: Adapter, **metadata: str) -> None:
    """Write all factors (`<layer>.a`, `<layer>.b`) and heads, with metadata."""
    tensors = {name: np.ascontiguousarray(head) for name, head in adapter.heads.items()}
    for name, factors in adapter.layers.items():
        tensors[f"{name}.a"] = np.ascontiguousarray(factors.a)
        tensors[f"{name}.b"] = np.ascontiguousarray(factors.b)
    write(path, save(tensors, metadata=metadata))


def count_release(folder: Path, run: int) -> int:
    """Count one more update that leaves this node in this run, before it leaves; returns how many it is now.

    Raises StateError where the count cannot be read back.
    """
    path = folder / "state" / f"releases-{run:x}"
    sent = path.read_bytes() if path.is_file() else b"0"
    if not sent.isdigit():
        raise StateError(f"{path} cannot be read back (it is damaged): write into it how many updates this node sent")
    write(path, str(int(sent) + 1).encode())
    return int(sent) + 1


def identity(folder: Path, run: int) -> str:
    """A random number that this node keeps for a run, and tells the server alone: nobody else can come by its name.

    Raises StateError where it cannot be read back.
    """
    path = folder / "state" / f"identity-{run:x}"
    if not path.is_file():
        write(path, secrets.token_hex(16).encode())
    found = path.read_bytes()
    if not re.fullmatch(rb"[0-9a-f]{32}", found):
        raise StateError(
            f"{path} cannot be read back (it is damaged): put it back from a copy, or remove it before the run begins"
        )
    return found.decode()


def begin_round(folder: Path, run: int, round_: int) -> None:
    """Keep what training is about to change, in case the round is asked for again."""
    before, marker = folder / "state" / "before", folder / "state" / "before" / "round"
    if _is(marker, run, round_):
        return
    marker.unlink(missing_ok=True)
    for name in _changing(run):
        _copy(folder / "state" / name, before / name)
    write(marker, f"{run} {round_}".encode())


def rewind(folder: Path, run: int, round_: int) -> None:
    """Where this round was begun before, go back to what was there then: the server lost the first attempt."""
    before = folder / "state" / "before"
    if _is(before / "round", run, round_):
        for name in _changing(run):
            _copy(before / name, folder / "state" / name)


def _changing(run: int) -> tuple[str, ...]:
    return "adapter.safetensors", f"optimizer-{run:x}.safetensors"


def _is(marker: Path, run: int, round_: int) -> bool:
    return marker.is_file() and marker.read_text(errors="replace") == f"{run} {round_}"


def _copy(source: Path, target: Path) -> None:
    """Make the target what the source is: absent where that is absent."""
    if source.is_file():
        write(target, source.read_bytes())
    else:
        target.unlink(missing_ok=True)


def save_state(path: Path, adapter: Adapter, *, run: int, round_: int, noise: Noise | None = None) -> None:
    """The adapter as of the mean of `round_` of `run`, and the encryption's noise in it (None: no mean is in it)."""
    noise = noise or Noise.none(adapter.rank)
    record(path, adapter, run=str(run), round=str(round_), noise=noise.to_json())


def load_state(path: Path, like: Adapter, *, run: int) -> tuple[Adapter, int, Noise]:
    """The stored adapter, its round and noise; `like`, -1 and none when nothing is stored, or only another run's.

    Raises StateError when the file is damaged or not of `like`'s shape.
    """
    if not path.exists():
        return like, -1, Noise.none(like.rank)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            round_ = int(metadata["round"])
            if metadata["run"] != str(run):
                return like, -1, Noise.none(like.rank)
            layers = {
                name: LoraFactors(file.get_tensor(f"{name}.a"), file.get_tensor(f"{name}.b"), old.scale)
                for name, old in like.layers.items()
            }
            heads = {name: file.get_tensor(name) for name in like.heads}
        stored = Adapter(layers, heads)
        if any(
            stored.layers[n].a.shape != f.a.shape or stored.layers[n].b.shape != f.b.shape
            for n, f in like.layers.items()
        ):
            raise StateError(
                f"{path} cannot be read back (another rank or model): remove it, and the server sends what is missing"
            )
        return stored, round_, Noise.from_json(metadata["noise"], like.rank)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StateError(
            f"{path} cannot be read back (it is damaged): remove it, and the server sends what is missing"
        ) from error
