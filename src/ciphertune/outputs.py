"""Files that a user asked for by name: a mistake in the name is one line, and is found before the work is done."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ciphertune.errors import SettingsError


@contextmanager
def writing(path: Path, option: str) -> Iterator[None]:
    """Around the writing of what a user named by an option: raises SettingsError where that cannot be."""
    try:
        yield
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror or error}): give another {option}") from None


def check_writable(path: Path, option: str) -> None:
    """Raise SettingsError unless a file can be written there: asked before work whose result would be lost."""
    with writing(path, option):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = next(p for p in path.absolute().parents if p.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
