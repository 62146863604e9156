"""Shared fixtures: one thread for torch, and a small federation of tiny models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--screenshots FOLDER`: keep what the browser tests see."""
    parser.addoption("--screenshots", default="", help="folder for the pictures of test_report_browser.py")


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
