"""What this process is made of, for the handshake and the run folder."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("ciphertune", "flwr", "torch", "tenseal", "transformers", "peft", "hydra-core", "numpy")


@cache
def code_digest() -> str:
    """16 hex digits over the package's own source files: two parties with different ones must not work together."""
    root = Path(__file__).parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Package versions, Python and the code digest."""
    found = {"python": platform.python_version(), "code": code_digest()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
