"""Files around keys: private ones are refused when others could read them; all are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ciphertune.durable import keep_names, make_folder
from ciphertune.errors import KeyFileError

_MAX_BYTES = 1 << 24


def read_private(path: Path, what: str, absent: str) -> bytes:
    """The bytes of a file that is this user's and nobody else's.

    what: the file is, in errors.  absent: what to do when there is none.

    The opened file is judged, not its name: a link is followed, and what it leads to must be private.
    Raises KeyFileError with the remedy.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer does not block
    except FileNotFoundError:
        raise KeyFileError(f"{what} {path} does not exist: {absent}") from None
    except OSError as error:
        raise KeyFileError(f"cannot read {what} {path}: {error.strerror}") from None
    try:
        _check_private(os.fstat(descriptor), path, what)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read {what} {path}: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _check_private(found: os.stat_result, path: Path, what: str) -> None:
    """Raise KeyFileError unless it is a regular file of this user that nobody else may read or change."""
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise KeyFileError(f"cannot read {what} {path}: it is {kind}")
    if found.st_uid != os.geteuid():
        raise KeyFileError(
            f"{what} {path} belongs to user {found.st_uid}, not to user {os.geteuid()} who runs this, so somebody else "
            f"can read or change it: chown {os.geteuid()} {path}"
        )
    if found.st_mode & 0o077:
        raise KeyFileError(f"{what} {path} is readable by others (mode {found.st_mode & 0o777:03o}): chmod 600 {path}")


def read_public(path: Path, what: str, most: int) -> bytes:
    """The bytes of a file that need not be private. Raises KeyFileError."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read {what} {path}: {error.strerror}") from None
    if len(data) > most:
        raise KeyFileError(f"{path} is too large for a {what}")
    return data


def write_new(path: Path, data: bytes, what: str, mode: int = 0o600) -> None:
    """Write a file that did not exist, in a folder that is made (mode 700) if need be.

    Raises KeyFileError when it exists, also when another process makes it in the same moment, or cannot be written.
    """
    with temporary(path, data, mode) as written:
        try:
            os.link(written, path)  # atomic, and refuses to overwrite
        except FileExistsError:
            raise KeyFileError(f"{path} exists: {what} is never overwritten; choose another name") from None
        keep_names(path.parent)


@contextmanager
def temporary(path: Path, data: bytes, mode: int = 0o600) -> Iterator[Path]:
    """A file with this content beside `path`, on the disk for good before anything is done with it; gone afterwards.

    Raises KeyFileError for every error of the operating system, inside too.
    """
    if not path.name:
        raise KeyFileError(f"{path} is a folder: give the name of a file in it")
    beside = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}")
    try:
        make_folder(path.parent, 0o700)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        yield beside
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
