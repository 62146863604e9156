from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from ciphertune.errors import DataError
from ciphertune.lm import partition
from ciphertune.lm.data import ClientData, load_client_data
from ciphertune.lm.formats import Row, read_jsonl
from ciphertune.lm.partition import divide, load_hub
from ciphertune.settings import DataSettings, ModelSettings
from tests.tiny import tiny_tokenizer, write_lines

datasets = pytest.importorskip("datasets")
pytest.importorskip("flwr_datasets")

ROWS = [{"text": f"text {i}", "label": i % 3, "site": f"site {i % 7}"} for i in range(300)]
JSONL = DataSettings(source="jsonl", labels=("a", "b", "c"))
HUB = DataSettings(source="hf", labels=("a", "b", "c"))


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    return read_jsonl(write_lines(tmp_path / "all.jsonl", ROWS))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is sent or fetched, and nothing is kept between tests."""
    monkeypatch.setattr("flwr_datasets.federated_dataset.event", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def shares(rows: list[Row], data: DataSettings, clients: int = 4) -> list[list[str]]:
    return [[row.where for row in divide(rows, data, client=k, clients=clients)] for k in range(clients)]


@pytest.mark.parametrize(
    ("partition", "by"), [("iid", "label"), ("dirichlet", "label"), ("dirichlet", "site"), ("natural", "site")]
)
def test_every_row_goes_to_exactly_one_client(partition: str, by: str, rows: list[Row]) -> None:
    data = replace(JSONL, partition=partition, partition_by=by)
    divided = shares(rows, data)
    assert Counter(chain.from_iterable(divided)) == Counter(row.where for row in rows)
    assert all(divided)
    assert shares(rows, data) == divided


def test_none_gives_everything_to_everyone(rows: list[Row]) -> None:
    assert shares(rows, JSONL) == [[row.where for row in rows]] * 4


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_the_seed_decides(partition: str, rows: list[Row]) -> None:
    one, other = (shares(rows, replace(JSONL, partition=partition, seed=seed)) for seed in (0, 1))
    assert [set(part) for part in one] != [set(part) for part in other]


def largest_share(rows: list[Row], data: DataSettings) -> float:
    """The largest share that one label has in a client's rows, on average over the clients."""
    found = []
    for k in range(4):
        labels = Counter(row.values["label"] for row in divide(rows, data, client=k, clients=4))
        found.append(max(labels.values()) / labels.total())
    return sum(found) / 4


def test_a_small_alpha_separates_the_labels_and_a_large_one_mixes_them(rows: list[Row]) -> None:
    data = replace(JSONL, partition="dirichlet")
    assert largest_share(rows, replace(data, dirichlet_alpha=0.1)) > 0.6
    assert largest_share(rows, replace(data, dirichlet_alpha=1000.0)) < 0.4
    assert largest_share(rows, replace(data, partition="iid")) < 0.45


def test_equal_shares_of_a_sorted_file_are_mixed(tmp_path: Path) -> None:
    rows = read_jsonl(write_lines(tmp_path / "sorted.jsonl", sorted(ROWS, key=lambda row: row["label"])))
    divided = [divide(rows, replace(JSONL, partition="iid"), client=k, clients=4) for k in range(4)]
    assert [len(part) for part in divided] == [75] * 4
    assert all(len({row.values["label"] for row in part}) == 3 for part in divided)


def test_natural_groups_stay_whole(rows: list[Row]) -> None:
    data = replace(JSONL, partition="natural", partition_by="site")
    sites = [{row.values["site"] for row in divide(rows, data, client=k, clients=4)} for k in range(4)]
    assert sorted(map(len, sites)) == [1, 2, 2, 2]
    assert len(set.union(*sites)) == 7
    with pytest.raises(DataError, match="'site' has 7 values for 8 clients"):
        divide(rows, data, client=0, clients=8)


def test_values_of_mixed_types_divide(tmp_path: Path) -> None:
    mixed = [{"text": "t", "label": value} for value in [0, "a", 1, "b", 2.5] * 20]
    rows = read_jsonl(write_lines(tmp_path / "mixed.jsonl", mixed))
    divided = shares(rows, replace(JSONL, partition="dirichlet"))
    assert Counter(chain.from_iterable(divided)) == Counter(row.where for row in rows)


@pytest.mark.parametrize("partition", ["dirichlet", "natural"])
def test_a_key_that_is_not_there_is_named(partition: str, rows: list[Row]) -> None:
    with pytest.raises(DataError, match=r"all.jsonl:\d+: no key 'ward'.*found: 'text', 'label', 'site'"):
        divide(rows, replace(JSONL, partition=partition, partition_by="ward"), client=0, clients=4)


@pytest.mark.parametrize(("partition", "alpha", "clients"), [("dirichlet", 0.3, 400), ("dirichlet", 0.001, 50)])
def test_what_cannot_be_divided_is_one_line(partition: str, alpha: float, clients: int, rows: list[Row]) -> None:
    data = replace(JSONL, partition=partition, dirichlet_alpha=alpha)
    with pytest.raises(DataError, match=f"dirichlet among {clients} clients .*raise data.dirichlet_alpha") as caught:
        divide(rows, data, client=0, clients=clients)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ours", ["_key", "_named_labels", "Row"])
def test_a_defect_of_ours_is_not_blamed_on_the_data(
    ours: str, rows: list[Row], hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(partition, ours, broken)
    with pytest.raises(TypeError, match="a defect"):
        if ours == "_key":
            divide(rows, replace(JSONL, partition="dirichlet"), client=0, clients=4)
        else:
            load_hub(replace(HUB, dataset=hub), client=0, clients=4)


def test_an_error_that_no_data_explains_leaves_its_trace_in_the_log(
    rows: list[Row], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError):
        divide(rows, replace(JSONL, partition="dirichlet"), client=0, clients=400)
    assert not caplog.text

    def changed(*_: object) -> None:
        raise AttributeError("another version of the library")

    monkeypatch.setattr(datasets.Dataset, "from_dict", changed)
    with pytest.raises(DataError, match=r"\(AttributeError: another version of the library\): check data.partition"):
        divide(rows, replace(JSONL, partition="iid"), client=0, clients=4)
    assert "in changed" in caplog.text


def test_the_extra_is_named_when_it_is_missing(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flwr_datasets.partitioner", None)
    with pytest.raises(DataError, match=r'pip install "ciphertune\[hub\]"'):
        divide(rows, replace(JSONL, partition="iid"), client=0, clients=4)


def load(data: DataSettings, client: int = 0) -> ClientData:
    model = ModelSettings(task="classification", max_length=32)
    return load_client_data(data, model, tiny_tokenizer("bert"), client=client, clients=4)


def test_one_file_for_all_clients_with_a_common_held_out_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "all.jsonl", ROWS)
    held = write_lines(tmp_path / "held.jsonl", [{"text": "held", "label": "c"}] * 5)
    data = replace(JSONL, path=str(path), heldout_path=str(held), partition="iid")
    clients = [load(data, k) for k in range(4)]
    assert [len(c.train) for c in clients] == [75] * 4
    assert all(c.heldout == clients[0].heldout and len(c.heldout) == 5 for c in clients)
    assert len({e.input_ids for c in clients for e in c.train}) == 300
    own = load(replace(data, heldout_path="", heldout_fraction=0.2))
    assert (len(own.train), len(own.heldout)) == (60, 15)
    assert {e.input_ids for e in own.train + own.heldout} == {e.input_ids for e in clients[0].train}


def test_a_bad_line_is_reported_by_every_client(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "all.jsonl", [*ROWS, {"text": "t", "label": "z"}])
    for client in range(4):
        with pytest.raises(DataError, match=r"all.jsonl:301: unknown label 'z'"):
            load(replace(JSONL, path=str(path), partition="iid"), client)


def test_a_file_per_client_is_not_divided_again(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has a file per client: data.partition=iid"):
        load(replace(JSONL, path=str(tmp_path / "{client}.jsonl"), partition="iid"))


@pytest.fixture
def hub(tmp_path: Path) -> str:
    """A data set in the hub's layout, with a train and a test split, in a folder."""
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", ROWS)
    write_lines(folder / "test.jsonl", ROWS[:10])
    return str(folder)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "natural"])
def test_a_hub_data_set_is_divided(partition: str, hub: str) -> None:
    data = replace(HUB, dataset=hub, partition=partition, partition_by="site" if partition == "natural" else "label")
    divided = [[dict(row.values) for row in load_hub(data, client=k, clients=4)] for k in range(4)]
    found = sorted(json.dumps(row, sort_keys=True) for part in divided for row in part)
    assert found == sorted(json.dumps(row, sort_keys=True) for row in ROWS)
    assert divided[1] == [dict(row.values) for row in load_hub(data, client=1, clients=4)]


def test_a_hub_data_set_undivided(hub: str) -> None:
    assert len(load_hub(replace(HUB, dataset=hub), client=1, clients=4)) == 300
    assert len(load_hub(replace(HUB, dataset=hub, split="test"), client=1, clients=4)) == 10
    found = load(replace(HUB, dataset=hub, partition="iid"))
    assert (len(found.train), len(found.heldout)) == (67, 8)


def test_class_numbers_of_a_hub_data_set_become_names(tmp_path: Path) -> None:
    names = ["low", "middle", "high"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows: list[dict[str, Any]] = [{"text": f"text {i}", "label": i % 3} for i in range(9)]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    data = replace(HUB, dataset=str(tmp_path / "set"), heldout_fraction=0.0)
    # the user's order of labels is another than the data set's
    found = load_hub(replace(data, labels=("high", "low", "middle")), client=0, clients=1)
    assert {(row.values["text"], row.values["label"]) for row in found} == {
        (f"text {i}", names[i % 3]) for i in range(9)
    }
    with pytest.raises(DataError, match=r"set data.labels=\[low,middle,high\]"):
        load_hub(replace(data, labels=()), client=0, clients=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": ""}, "data.dataset is empty"),
        ({"dataset": "nobody/no-such-set"}, "data.dataset='nobody/no-such-set' cannot be loaded"),
        ({"split": "dev"}, "cannot be loaded.*'dev' is not present.*check data.dataset, data.subset, data.split"),
    ],
)
def test_a_hub_data_set_that_cannot_be_loaded(change: dict[str, str], message: str, hub: str) -> None:
    data = replace(HUB, partition="iid", **{"dataset": hub, **change})
    with pytest.raises(DataError, match=message) as caught:
        load_hub(data, client=0, clients=4)
    assert "\n" not in str(caught.value)


def test_a_bad_row_of_a_hub_data_set_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", [{"body": "x", "label": 1}] * 20)
    with pytest.raises(DataError, match=r"set\[train\] row 1: want the keys 'text' and 'label'"):
        load(replace(HUB, dataset=str(tmp_path / "set"), heldout_fraction=0.0))
