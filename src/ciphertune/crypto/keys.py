"""Key files: the one place where a secret key meets the disk.

offset  size
   0      8   magic "CTKEY" 0 0 1
   8     16   digest of the encryption parameters
  24      8   length of the material
  32      ?   material: residues of the secret key modulo every prime, NTT order, 8 bytes each, little-endian
 -32     32   SHA-256 of all that precedes
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

from ciphertune.crypto.private_files import read_private, temporary, write_new
from ciphertune.crypto.secret import SecretKey
from ciphertune.durable import keep_names
from ciphertune.errors import KeyFileError

MAGIC = b"CTKEY\0\0\1"
_HEAD = struct.Struct("<8s16sQ")
_DIGEST = 32


def pack(key: SecretKey) -> bytes:
    """The bytes of a key file."""
    material = key.reveal()
    body = _HEAD.pack(MAGIC, key.params_digest, len(material)) + material
    return body + hashlib.sha256(body).digest()


def unpack(data: bytes, name: str) -> SecretKey:
    """The inverse of `pack`. name: of the data, in errors. Raises KeyFileError: no key file, cut off, damaged."""
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise KeyFileError(f"{name} is not a ciphertune key file of version 1")
    whole = _HEAD.size + _DIGEST
    if len(data) >= _HEAD.size:
        _, digest, length = _HEAD.unpack_from(data)
        whole += length
    if len(data) < whole:
        raise KeyFileError(f"{name} is cut off after {len(data)} bytes: copy it again")
    if len(data) != whole or hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise KeyFileError(f"{name} is damaged: copy it again")
    return SecretKey(data[_HEAD.size : -_DIGEST], digest)


def save(key: SecretKey, path: Path) -> None:
    """Write a key file that only its owner can read. Raises KeyFileError when the file exists."""
    write_new(path, pack(key), "a key file")


def load(path: Path) -> SecretKey:
    """Read a key file. Raises KeyFileError when it is absent, damaged, somebody else's or readable by others."""
    absent = f"make one with `ciphertune keys create --out {path}`, or copy the one that the other clients use"
    return unpack(read_private(path, "key file", absent), f"key file {path}")


def rotate(path: Path, new: SecretKey) -> tuple[SecretKey, Path]:
    """Put a new key in the place of the one in `path`.

    Returns the old key and where it is kept: `path`.<8 digits of its fingerprint>.old. At every moment `path` holds one
    of the two whole. Of two rotations at once one is refused. Raises KeyFileError.
    """
    old = load(path)
    if old.fingerprint == new.fingerprint:
        raise KeyFileError(f"{path} holds this key already")
    path = path.resolve()  # the file itself, not a link to it
    kept = path.with_name(f"{path.name}.{old.fingerprint.hex()[:8]}.old")
    with temporary(path, pack(new)) as written:
        try:
            os.link(path, kept)
        except FileExistsError:
            raise KeyFileError(
                f"{kept} exists: another rotation of this key is under way or was cut off; try again, and if that "
                "does not help, remove that file first"
            ) from None
        try:
            written.replace(path)
        except BaseException:
            kept.unlink()
            raise
        keep_names(path.parent)
    return old, kept


def load_or_create(path: Path, create: Callable[[], SecretKey]) -> SecretKey:
    """The key in `path`, made by `create()` if there is none, in a folder that only this user can enter.

    Safe when several processes start at once.
    """
    _close(path.parent)
    if not path.exists():
        try:
            save(create(), path)
        except KeyFileError:
            if not path.exists():  # else another process was faster
                raise
    return load(path)


def _close(folder: Path) -> None:
    """Make a folder that only its owner can enter, or close one that others can."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise KeyFileError(f"cannot write in {folder}: {error.strerror}") from None
