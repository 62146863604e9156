"""The stored examples: what is read back is what was stored, and only for the run it was stored for."""

from __future__ import annotations

from pathlib import Path

import pytest

from ciphertune.lm.cache import load_data, save_data
from ciphertune.lm.data import ClientData, Encoded

TEXT = ClientData((Encoded((1, 5, 9), (-100, 5, 9)), Encoded((2,), (2,))), (Encoded((7, 8), (-100, 8)),), "two lines")
CLASSES = ClientData((Encoded((1, 5, 9), 1), Encoded((2,), 0)), (Encoded((7, 8), 1),), "labelled")
NO_HELDOUT = ClientData((Encoded((1, 5), (1, 5)),), (), "no held-out")


@pytest.mark.parametrize("data", [TEXT, CLASSES, NO_HELDOUT], ids=lambda d: d.description)
def test_stored_examples_are_read_back_as_they_were(data: ClientData, tmp_path: Path) -> None:
    save_data(tmp_path / "d", data, run=3)
    assert load_data(tmp_path / "d", run=3) == data


def test_examples_of_another_run_or_a_damaged_file_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "d"
    assert load_data(path, run=3) is None
    save_data(path, TEXT, run=3)
    assert load_data(path, run=4) is None
    path.write_bytes(path.read_bytes()[:40])
    assert load_data(path, run=3) is None
