"""The examples of one client, to train on and held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ciphertune.errors import DataError
from ciphertune.lm.formats import Encoded, Line, Row, check_rows, encode, read_jsonl
from ciphertune.lm.partition import divide, load_hub
from ciphertune.settings import DataSettings, ModelSettings

__all__ = ["ClientData", "Encoded", "client_lines", "load_client_data"]

_CHUNK = 1024  # lines tokenised at once


@dataclass(frozen=True)
class ClientData:
    """What one client trains on and is judged on."""

    train: Sequence[Encoded]
    heldout: Sequence[Encoded]  # may be empty when data.heldout_fraction is 0
    description: str  # one line for people


def load_client_data(
    data: DataSettings, model: ModelSettings, tokenizer: Any, *, client: int, clients: int, path: str = ""
) -> ClientData:
    """The data of client number `client` of `clients`, the same whenever it is called with the same arguments.

    tokenizer: a transformers tokenizer. path: this node's own data file, instead of data.path.
    All rows are checked before any is tokenised. Raises DataError with the file and line of what is wrong.
    """
    name, train, heldout = client_lines(data, model, client=client, clients=clients, path=path)
    train_examples, lost = _encode(train, tokenizer, model.max_length, data.max_train)
    heldout_examples, lost_heldout = _encode(heldout, tokenizer, model.max_length, data.max_heldout)
    if not train_examples:
        raise DataError(f"{name}: no training example is left for client {client} of {clients}")
    dropped = f" ({lost + lost_heldout} lines without a usable token dropped)" if lost + lost_heldout else ""
    description = f"{name}: {len(train_examples)} training and {len(heldout_examples)} held-out examples{dropped}"
    return ClientData(tuple(train_examples), tuple(heldout_examples), description)


def client_lines(
    data: DataSettings, model: ModelSettings, *, client: int, clients: int, path: str = ""
) -> tuple[str, list[Line], list[Line]]:
    """What `load_client_data` makes examples of: a name, the training lines and the held-out lines, all checked.

    Raises DataError with the file and line of what is wrong.
    """
    if not 0 <= client < clients:
        raise DataError(f"client number {client} is not among {clients} clients: want 0 to {clients - 1}")
    if data.source == "embedded":
        return _embedded(model, client, clients)
    return _rows(data, model, client, clients, path)


def _embedded(model: ModelSettings, client: int, clients: int) -> tuple[str, list[Line], list[Line]]:
    """One topic per client; all topics' held-out text together, so that every client is judged on the same."""
    from ciphertune.lm.embedded import tuning_topics

    if model.task != "causal_lm":
        raise DataError("data=embedded has no labels: for model.task=classification use data=jsonl or data=hf")
    topics = tuning_topics(clients)
    heldout = [Line(text) for topic in topics for text in topic.heldout]
    return f"topic {topics[client].name}", [Line(text) for text in topics[client].train], heldout


def _rows(
    data: DataSettings, model: ModelSettings, client: int, clients: int, path: str
) -> tuple[str, list[Line], list[Line]]:
    """A name, the training lines and the held-out lines of a file or a hub data set, all checked."""
    if data.source == "hf":
        name, own = f"{data.dataset}[{data.split}]", load_hub(data, client=client, clients=clients)
    else:
        name, own = _file_rows(data, model, client, clients, path)
    lines = check_rows(own, model.task, data.labels)
    if not data.heldout_path:
        return name, *_split(lines, data)
    heldout = read_jsonl(_path(data.heldout_path, client), "data.heldout_path")
    return name, lines, check_rows(heldout, model.task, data.labels)


def _file_rows(data: DataSettings, model: ModelSettings, client: int, clients: int, path: str) -> tuple[str, list[Row]]:
    """This client's rows of its file, or of the one file that all share when data.partition divides it."""
    chosen = path or data.path
    if not chosen:
        raise DataError("data.path is empty: give a file of JSON lines, or each node its own data-path")
    if "{client}" in chosen and data.partition != "none":
        raise DataError(f"data.path={chosen} has a file per client: data.partition={data.partition} divides one file")
    file = _path(chosen, client)
    rows = read_jsonl(file, "the node's data-path" if path else "data.path")
    if data.partition != "none":
        check_rows(rows, model.task, data.labels)  # a bad line is reported whichever client gets it
    own = divide(rows, data, client=client, clients=clients)
    return file.name if data.partition == "none" else f"{file.name} ({data.partition})", own


def _split(lines: list[Line], data: DataSettings) -> tuple[list[Line], list[Line]]:
    """The last share of the lines in a seeded order is held out: at least one, if any is asked for and two exist."""
    order = np.random.default_rng(data.seed).permutation(len(lines)).tolist()
    count = round(data.heldout_fraction * len(lines))
    if data.heldout_fraction > 0 and len(lines) > 1:
        count = min(max(count, 1), len(lines) - 1)
    kept = len(lines) - count
    return [lines[i] for i in order[:kept]], [lines[i] for i in order[kept:]]


def _encode(lines: list[Line], tokenizer: Any, max_length: int, most: int) -> tuple[list[Encoded], int]:
    """All examples of `lines`, or the first `most` when that is not 0; and how many lines gave none."""
    examples: list[Encoded] = []
    dropped = 0
    for start in range(0, len(lines), _CHUNK):
        made, lost = encode(lines[start : start + _CHUNK], tokenizer, max_length)
        examples += made
        dropped += lost
        if most and len(examples) >= most:
            return examples[:most], dropped
    return examples, dropped


def _path(template: str, client: int) -> Path:
    return Path(template.replace("{client}", str(client))).expanduser()
