"""Files that a client keeps for itself: written so that they outlive the machine, and named when they did not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from stat import S_ISDIR
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from ciphertune import merging, runs, state, wishes
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.errors import StateError
from ciphertune.node import NodeSettings
from ciphertune.norms import check_mean, keep_norms

MINE = Adapter({"q": LoraFactors(np.ones((2, 3)), np.ones((4, 2)), 1.0)}, {"head": np.ones(3)})


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_anyone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    sync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        about = os.fstat(handle)
        done.append(("folder", 0) if S_ISDIR(about.st_mode) else ("file", about.st_size))
        sync(handle)

    def renamed(source: Any, target: Any) -> None:
        done.append(("name", 0))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(os, "rename", renamed)
    runs.write(tmp_path / "new/x", b"12345")
    assert done == [("folder", 0), ("file", 5), ("name", 0), ("folder", 0)]  # first the one that holds the new folder
    assert (tmp_path / "new/x").read_bytes() == b"12345"


def test_what_excludes_a_client_or_costs_privacy_is_on_the_disk_before_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(os.fstat(handle).st_size))
    folder = runs.ServerFolder(tmp_path)
    path = tmp_path / "rounds.jsonl"
    for stage in ("update", runs.FAULT, runs.ASKED, runs.DECLINED):
        before = len(seen)
        folder.line(0, stage, "lab-0")
        assert seen[before:] == ([] if stage == "update" else [path.stat().st_size])


def test_what_cannot_get_its_name_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(IsADirectoryError):
        runs.write(tmp_path / "x", b"12345")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def _budget(folder: Path) -> None:
    node = NodeSettings.__new__(NodeSettings)
    for name, value in (("budget", float("nan")), ("folder", folder)):
        object.__setattr__(node, name, value)
    wishes.budget_of(node, 7, [], None)  # type: ignore[arg-type]


KEPT: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object], str]] = {
    "releases": (
        "releases-7",
        lambda f: state.count_release(f, 7),
        lambda f: state.count_release(f, 7),
        "write into it how many updates this node sent",
    ),
    "identity": (
        "identity-7",
        lambda f: state.identity(f, 7),
        lambda f: state.identity(f, 7),
        "put it back from a copy",
    ),
    "adapter": (
        "adapter.safetensors",
        lambda f: state.save_state(f / "state/adapter.safetensors", MINE, run=7, round_=1),
        lambda f: state.load_state(f / "state/adapter.safetensors", MINE, run=7),
        "remove it, and the server sends what is missing",
    ),
    "norms": (
        "norms-7.json",
        lambda f: keep_norms(f, 7, 1, MINE),
        lambda f: check_mean(f, 7, 1, MINE, 10.0),
        "remove it, and the next mean is taken unchecked",
    ),
    "budget": (
        "budget-7.json",
        lambda f: runs.write(f / "state/budget-7.json", b"0.25"),
        _budget,
        "remove it, and the budget is measured again",
    ),
    "merged": (
        "merged-7.safetensors",
        lambda f: merging.merge(f, 7, 0, replace(MINE, heads={})),
        lambda f: merging.merged(f, 7),
        "start a new run under another name",
    ),
}


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"{", b"[1]", b'{"round": 1, "norms": [1]}', b"-1"])
@pytest.mark.parametrize("case", KEPT)
def test_a_damaged_file_of_a_client_is_named_with_the_remedy(tmp_path: Path, case: str, damage: bytes) -> None:
    name, make, read, remedy = KEPT[case]
    make(tmp_path)
    read(tmp_path)
    (tmp_path / "state" / name).write_bytes(damage)
    with pytest.raises(StateError, match=rf"{name} cannot be read back \(.*\): {remedy}"):
        read(tmp_path)


@pytest.mark.parametrize("noise", ["1", "null", '[1, 2, "x"]', "[[1], [1]]", "[[1, 2], [1, 2], null]"])
def test_an_adapter_whose_noise_cannot_be_read_is_named(tmp_path: Path, noise: str) -> None:
    path = tmp_path / "adapter.safetensors"
    state.save_state(path, MINE, run=7, round_=1)
    with safe_open(path, framework="numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata | {"noise": noise})
    with pytest.raises(StateError, match=r"cannot be read back \(it is damaged\): remove it"):
        state.load_state(path, MINE, run=7)


def test_an_adapter_of_another_rank_is_named(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    state.save_state(path, MINE, run=7, round_=1)
    other = Adapter({"q": LoraFactors(np.ones((4, 3)), np.ones((4, 4)), 1.0)}, MINE.heads)
    with pytest.raises(StateError, match=r"cannot be read back \(another rank or model\): remove it"):
        state.load_state(path, other, run=7)


def test_a_marker_that_cannot_be_read_back_is_no_rounds(tmp_path: Path) -> None:
    """It only says which round was begun; an unreadable one says of none."""
    state.begin_round(tmp_path, 7, 3)
    (tmp_path / "state/before/round").write_bytes(b"\xff")
    state.rewind(tmp_path, 7, 3)
    state.begin_round(tmp_path, 7, 3)
    assert (tmp_path / "state/before/round").read_text() == "7 3"
