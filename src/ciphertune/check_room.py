"""Room on a node, for `ciphertune check`: what a run writes and holds, against what there is."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import psutil

from ciphertune.calibration import Calibration
from ciphertune.check_parts import Node, weights
from ciphertune.errors import SettingsError
from ciphertune.forecast import forecast
from ciphertune.scores import size
from ciphertune.settings import ClientSettings

_BASE = 800 << 20  # bytes of a client's process with Python, torch and transformers loaded, and of its SuperNode
_SPARE = 256 << 20  # bytes that a run should leave free on a disk
_LARGEST_HEADER = 1 << 27  # of a file of weights


def disk(node: Node) -> str:
    """Room for what a run writes on this node. Raises SettingsError where there is too little."""
    place = next(p for p in (node.own.folder, *node.own.folder.parents) if p.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise SettingsError(f"{place} cannot be written by this user: chown it, or set run-dir in --node-config")
    free, needed = shutil.disk_usage(place).free, disk_needed(node)
    if free < needed + _SPARE:
        raise SettingsError(
            f"{size(free)} free in {place}, a run writes about {size(needed)}: make room, or set run-dir"
        )
    return f"about {size(needed)} needed, {size(free)} free in {place}"


def disk_needed(node: Node) -> int:
    """Bytes that a run leaves at most: seven adapters in float32 (state and moments of both kinds, each also as before
    the round, and the result), another while one is replaced, two a round where updates are recorded; and eight bytes
    for every token and its label, of which there are fewer than characters.
    """
    layers, heads = node.shapes
    adapter = 4 * (_held(node) * sum(x.m + x.n for x in layers) + sum(h.size for h in heads))
    recorded = node.settings.federation.rounds if node.settings.record_updates else 0
    *_, characters = node.texts
    return adapter * (8 + 2 * recorded) + characters * 2 * 8


def _held(node: Node) -> int:
    """The components that this node will hold, as far as the settings tell the other clients' ranks."""
    method, own = node.settings.method, node.own.rank
    others = [c.rank for c in node.settings.federation.clients]
    return max([own, *others]) if method.common else own


def memory(node: Node) -> str:
    """Memory against the planner's estimate, with the model's weights where they are not on a GPU.

    Raises SettingsError where there is too little.
    """
    free, needed = psutil.virtual_memory().available, memory_needed(node)
    if free < needed:
        raise SettingsError(
            f"{size(free)} available, a client takes about {size(needed)} before it trains: end other programs, or "
            "use a machine with more memory"
        )
    return f"about {size(needed)} needed before training, {size(free)} available"


def memory_needed(node: Node) -> int:
    """Bytes of a client while it seals and opens messages; what training takes comes on top."""
    from ciphertune.lm.base import pick_device

    settings, own = node.settings, node.own
    each = 2 if settings.model.dtype == "bfloat16" else 4
    held = parameters(node.folder) * each if pick_device(own.device).type == "cpu" else 0
    if not node.shapes[0]:
        return _BASE + held
    count, budget = max(2, settings.federation.min_clients), 1.0 if math.isnan(own.budget) else own.budget
    clients = (ClientSettings(rank=_held(node), budget=budget),) * count  # all like this one
    alike = replace(settings.federation, clients=clients, min_clients=count)
    planned = forecast(replace(settings, federation=alike), *node.shapes, Calibration(), rounds=(0,))
    return _BASE + held + planned.client_memory


def parameters(folder: Path) -> int:
    """How many weights the folder holds; of a file without a header that says so, one for every two bytes."""
    total = 0
    for path in weights(folder):
        if path.suffix != ".safetensors":
            total += path.stat().st_size // 2
            continue
        with path.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _LARGEST_HEADER)))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total
