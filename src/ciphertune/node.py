"""What one node knows about itself: Flower's `--node-config`, with defaults per client for simulation."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ciphertune.errors import SettingsError
from ciphertune.settings import ClientSettings, DataSettings, Settings

KEYS = (
    "name",
    "rank",
    "budget",
    "seconds-per-round",
    "upstream",
    "data-path",
    "key-file",
    "device",
    "run-dir",
    "partition-id",
    "num-partitions",
    "allow-clear",
    "crypto-processes",
)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it becomes a folder


@dataclass(frozen=True)
class NodeSettings:
    """One client. folder: its part of the run folder. key_file: the one given, or where simulated ones make theirs."""

    name: str
    index: int  # which part of a divided data set; -1 when the node does not say
    clients: int
    rank: int
    budget: float  # share of the columns of A to encrypt; NaN: from a measured profile and the next two
    seconds_per_round: float  # that encryption and its upload may take
    upstream: float  # bytes per second, 0 where not given
    data_path: str
    key_file: Path
    device: str
    folder: Path
    simulated: bool
    own_key: bool  # the key file was given: it is never made
    processes: int = 1  # that share the encryption of a large update

    def part(self, data: DataSettings) -> int:
        """Which part of the data is this node's. Raises SettingsError when it must say so and does not."""
        own_file = (
            data.source == "jsonl" and data.partition == "none" and (self.data_path or "{client}" not in data.path)
        )
        if self.index < 0 and not own_file:
            raise SettingsError(
                "this node does not say which part of the data is its own: start it with --node-config "
                f"'name=\"NAME\" partition-id=K num-partitions={self.clients}' (K from 0 to {self.clients - 1}), "
                "or with its own data-path"
            )
        return max(0, self.index)


def home() -> Path:
    """Where run folders go unless something else is said: $CIPHERTUNE_HOME, by default ~/.ciphertune."""
    return Path(os.environ.get("CIPHERTUNE_HOME", "~/.ciphertune")).expanduser()


def run_name(settings: Settings, run_id: int) -> str:
    """Name of the run folder: every party of a run derives the same one."""
    return Path(settings.resume).name or settings.name or f"{settings.method.name}-{run_id % (1 << 32):08x}"


def run_folder(settings: Settings, run_id: int, runs_dir: str = "", *, server: bool = True) -> Path:
    """The run folder of this machine. server: where `resume` is a path, and not the name of the run alone."""
    above = str(Path(settings.resume).parent) if server and len(Path(settings.resume).parts) > 1 else ""
    root = Path(runs_dir or above or settings.runs_dir or "runs").expanduser()
    return (root if root.is_absolute() else home() / root) / run_name(settings, run_id)


def in_simulation() -> bool:
    """Whether Flower's simulation engine runs this process: it runs clients in Ray's actors, a SuperNode never does.

    Nothing that a node's settings, a run or a server says decides it: a node that took itself for a simulated one would
    send in the clear, make a key of its own and show the server the text of its errors.
    """
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def node_settings(
    settings: Settings,
    config: Mapping[str, Any],
    run_id: int,
    *,
    node_id: int,
    client: int | None = None,
    simulated: bool = False,
) -> NodeSettings:
    """The node's own settings over the defaults of its client number.

    client: which of the federation's clients a simulated node plays now (a node may play several).  simulated: server
    and clients share this machine (`in_simulation`); a real node is held to what its owner allows.
    Raises SettingsError naming the node setting.
    """
    unknown = sorted(set(config) - set(KEYS))
    if unknown:
        raise SettingsError(f"unknown node setting {unknown[0]}: --node-config knows {', '.join(KEYS)}")
    index = client if simulated and client is not None else _number(config, "partition-id", int, -1)
    clients = settings.federation.clients
    parts = _number(config, "num-partitions", int, len(clients))
    default = clients[index % len(clients)] if index >= 0 else ClientSettings(rank=settings.model.rank)
    name = str(config.get("name", f"client-{index}" if simulated else f"node-{node_id % (1 << 32):08x}"))
    if not NAME.fullmatch(name):
        raise SettingsError(f"node setting name={name!r}: use letters, digits, '.', '_' and '-', at most 64 of them")
    folder = run_folder(settings, run_id, str(config.get("run-dir", "")), server=simulated) / "clients"
    key_file = str(config.get("key-file", default.key_file))
    if not simulated:
        _check_protection(settings, config, key_file)
    node = NodeSettings(
        name=name,
        index=index,
        clients=max(len(clients), parts) if simulated else parts,
        rank=_number(config, "rank", int, default.rank),
        budget=_number(config, "budget", float, math.nan if "seconds-per-round" in config else default.budget),
        seconds_per_round=_number(config, "seconds-per-round", float, 0.0),
        upstream=_number(config, "upstream", float, 0.0),
        data_path=str(config.get("data-path", default.data_path)),
        key_file=Path(key_file).expanduser() if key_file else folder / "secret.key",
        device=str(config.get("device", default.device)),
        folder=folder / name,
        simulated=simulated,
        processes=_number(config, "crypto-processes", int, 1 if simulated else min(8, os.cpu_count() or 1)),
        own_key=bool(key_file),
    )
    if not 1 <= node.rank <= 4096:
        raise SettingsError(f"node setting rank={node.rank} is out of range: want 1 to 4096")
    if not 1 <= node.processes <= 256:
        raise SettingsError(f"node setting crypto-processes={node.processes} is out of range: want 1 to 256")
    _check_budget(node, measured="budget" not in config and "seconds-per-round" in config)
    return node


def _check_budget(node: NodeSettings, *, measured: bool) -> None:
    """Raise SettingsError for a budget that is none, or a time that none can be found for."""
    if not (measured or 0.0 <= node.budget <= 1.0):
        raise SettingsError(f"node setting budget={node.budget} is out of range: want 0 to 1")
    if (measured and not 0.0 < node.seconds_per_round <= 1e6) or not 0.0 <= node.upstream <= 1e12:
        raise SettingsError(
            f"node settings seconds-per-round={node.seconds_per_round:g} and upstream={node.upstream:g}: want seconds "
            "above 0, and bytes per second or nothing"
        )


def _check_protection(settings: Settings, config: Mapping[str, Any], key_file: str) -> None:
    """A real node sends nothing in the clear unless its owner said so, and has a key. Raises SettingsError."""
    method, backend = settings.method, settings.crypto.backend
    if (backend == "clear" or method.select != "all") and config.get("allow-clear") is not True:
        parts = {"negotiated": "B and most columns of A", "entries": "most entries of its updates"}
        part = parts.get(method.select, "this node's update") if backend != "clear" else "this node's update"
        raise SettingsError(
            f"method={method.name} with crypto={backend} would send {part} in the "
            "clear: it refuses unless it was started with --node-config 'allow-clear=true'"
        )
    if not key_file and settings.crypto.backend != "clear":
        raise SettingsError(
            "this node has no key file: make one with `ciphertune keys create --out FILE`, hand it to every client, "
            "and start the node with --node-config 'key-file=\"FILE\"'"
        )


def _number(config: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = config.get(key, default)
    number = isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > 1e15
    if not number or (kind is int and (value != value or value != int(value))):
        raise SettingsError(f"node setting {key}={value!r} is of the wrong type: want {kind.__name__}")
    return kind(value)
