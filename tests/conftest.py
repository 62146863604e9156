"""Shared fixtures: one thread for torch, a small federation of tiny models, and where real models lie if they do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder with real models and data; tests that want it are skipped where it is absent."""
    folder = Path(os.environ.get("CIPHERTUNE_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no real models in {folder}")
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights."""
    from tiny import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def lab(tmp_path: Path, llama: Path) -> Callable[..., Any]:
    """Run a whole federation of tiny models in this process: `lab("method=fedavg", nodes={...})`."""
    from federations import Lab

    return Lab(tmp_path, llama)
