"""One data set divided among clients by flwr-datasets, the same way on every client."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ciphertune.errors import DataError
from ciphertune.lm.formats import Row
from ciphertune.progress import log_trace
from ciphertune.settings import DataSettings

_KEY = "key"


def divide(rows: Sequence[Row], data: DataSettings, *, client: int, clients: int) -> list[Row]:
    """The rows of `client` among `clients`: every row belongs to exactly one of them.

    iid: equal shares. dirichlet: the shares of each value of data.partition_by are drawn from a Dirichlet
    distribution (arXiv 1905.12022, section 4). natural: whole groups of one data.partition_by value, dealt out in turn.
    Raises DataError when the rows lack that key or cannot be divided so.
    """
    if data.partition == "none":
        return list(rows)
    order = np.random.default_rng(data.seed).permutation(len(rows)).tolist()  # a file is often sorted
    columns: dict[str, list[Any]] = {"row": order}
    if data.partition != "iid":
        columns[_KEY] = [_key(rows[i], data.partition_by) for i in order]
    with _one_line(data, clients):
        from datasets import Dataset

        partitioner = _partitioner(data, clients, _KEY)
        partitioner.dataset = Dataset.from_dict(columns)
        share = _share(partitioner.load_partition, partitioner, data, client, clients)
    return [rows[record["row"]] for record in share]


def load_hub(data: DataSettings, *, client: int, clients: int) -> list[Row]:
    """The rows of `client` in data.dataset, a data set of the Hugging Face hub or a folder of data files.

    Class numbers become class names where the data set knows them. Raises DataError when it cannot be loaded.
    """
    if not data.dataset:
        raise DataError("data.dataset is empty: name a data set of the hub, e.g. data.dataset=stanfordnlp/sst2")
    with _one_line(data, clients):
        from flwr_datasets import FederatedDataset

        whole = data.partition == "none"
        partitioner = None if whole else _partitioner(data, clients, data.partition_by)
        federated = FederatedDataset(
            dataset=data.dataset,
            subset=data.subset or None,
            partitioners={} if whole else {data.split: partitioner},
            seed=data.seed,
        )
        if partitioner is None:
            split = federated.load_split(data.split)
            records, features = list(split), split.features
        else:
            assigned = federated.partitioners[data.split]
            features = assigned.dataset.features
            records = _share(federated.load_partition, assigned, data, client, clients)
    named = _named_labels(features, data)
    return [
        Row(f"{data.dataset}[{data.split}] row {number}", named(dict(record)))
        for number, record in enumerate(records, start=1)
    ]


def _partitioner(data: DataSettings, clients: int, column: str) -> Any:
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner

    if data.partition == "iid":
        return IidPartitioner(num_partitions=clients)
    if data.partition == "natural":
        return NaturalIdPartitioner(partition_by=column)
    return DirichletPartitioner(
        num_partitions=clients,
        partition_by=column,
        alpha=data.dirichlet_alpha,
        min_partition_size=2,  # one to train on, one held out
        self_balancing=True,  # else a small alpha leaves some clients with next to nothing
        seed=data.seed,
    )


def _share(load: Callable[[int], Any], partitioner: Any, data: DataSettings, client: int, clients: int) -> list[Any]:
    """The records of `client`. There may be more natural groups than clients: each takes every clients-th one."""
    if data.partition != "natural":
        return list(load(client))
    groups = int(partitioner.num_partitions)
    if groups < clients:
        raise DataError(
            f"data.partition=natural: {data.partition_by!r} has {groups} values for {clients} clients; "
            "use fewer clients or another data.partition"
        )
    return [record for group in range(client, groups, clients) for record in load(group)]


def _key(row: Row, column: str) -> str:
    if column not in row.values:
        found = ", ".join(map(repr, row.values)) or "none"
        raise DataError(f"{row.where}: no key {column!r} to divide by (data.partition_by); found: {found}")
    return str(row.values[column])


def _named_labels(features: Any, data: DataSettings) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What turns the data set's class numbers into names, where data.labels holds those names."""
    names = list(getattr(features.get("label") if features else None, "names", None) or [])
    if names and not data.labels:
        raise DataError(f"data.labels is empty: set data.labels=[{','.join(names)}]")
    if not names or not set(names) <= set(data.labels):
        return lambda record: record
    return lambda record: {**record, "label": names[record["label"]]} if _is_class(record, names) else record


def _is_class(record: dict[str, Any], names: list[str]) -> bool:
    value = record.get("label")
    return isinstance(value, int) and 0 <= value < len(names)


@contextlib.contextmanager
def _one_line(data: DataSettings, clients: int) -> Iterator[None]:
    """Around calls into datasets and flwr-datasets: their errors as one DataError, no retry warnings, no progress bars.

    An error that neither data nor a connection explains leaves its trace in the log.
    """
    source = f"data.dataset={data.dataset!r}" if data.source == "hf" else "the data file"
    try:
        with warnings.catch_warnings(), np.errstate(invalid="raise"), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except ImportError as error:
        wanted = f"data.source={data.source} with data.partition={data.partition}"
        raise DataError(f'{wanted} needs {error.name}: pip install "ciphertune[hub]"') from None
    except Exception as error:  # the hub, the network, pyarrow, the partitioners: no common base class
        if not isinstance(error, OSError | ValueError | ArithmeticError):
            log_trace(error)
        text = (str(error).strip().splitlines() or [""])[0][:200]
        remedy = (
            "raise data.dirichlet_alpha, change data.seed or use fewer clients"
            if data.partition == "dirichlet" and isinstance(error, ValueError | FloatingPointError)
            else "check data.dataset, data.subset, data.split and the connection"
            if data.source == "hf"
            else "check data.partition and data.partition_by"
        )
        raise DataError(
            f"{source} cannot be loaded and divided by {data.partition} among {clients} clients "
            f"({type(error).__name__}: {text}): {remedy}"
        ) from error
