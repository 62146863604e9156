"""Names of files and folders that stay, whatever ends the machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def keep_names(folder: Path) -> None:
    """Have the names in a folder on the disk for good, as far as its file system can."""
    with suppress(OSError):  # what was written is there all the same
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder and those above it, if they are not there, and have their names on the disk. Raises OSError."""
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True, mode=mode)
    for made in new:
        keep_names(made.parent)
