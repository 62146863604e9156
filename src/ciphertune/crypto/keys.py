"""Key files: the one place where a secret key meets the disk.

offset  size
   0      8   magic "CTKEY" 0 0 1
   8     16   digest of the encryption parameters
  24      8   length of the material
  32      ?   material: residues of the secret key modulo every prime, NTT order, 8 bytes each, little-endian
 -32     32   SHA-256 of all that precedes
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import struct
from collections.abc import Callable
from pathlib import Path

from ciphertune.crypto.secret import SecretKey
from ciphertune.errors import KeyFileError

_MAGIC = b"CTKEY\0\0\1"
_HEAD = struct.Struct("<8s16sQ")
_MAX_BYTES = 1 << 24


def save(key: SecretKey, path: Path) -> None:
    """Write a key file that only its owner can read. Raises KeyFileError when the file exists."""
    material = key.reveal()
    body = _HEAD.pack(_MAGIC, key.params_digest, len(material)) + material
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(body + hashlib.sha256(body).digest())
        os.link(temporary, path)  # atomic, and refuses to overwrite
    except OSError as error:
        if path.exists():
            raise KeyFileError(f"{path} exists: a key file is never overwritten; choose another name") from None
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load(path: Path) -> SecretKey:
    """Read a key file. Raises KeyFileError when it is absent, readable by others, or damaged."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise KeyFileError(
            f"key file {path} does not exist: make one with `ciphertune keys create --out {path}`, or copy the one "
            "that the other clients use"
        ) from None
    except OSError as error:
        raise KeyFileError(f"cannot read key file {path}: {error.strerror}") from None
    if mode & 0o077:
        raise KeyFileError(f"key file {path} is readable by others (mode {mode & 0o777:03o}): chmod 600 {path}")
    if len(data) < _HEAD.size + 32 or data[:8] != _MAGIC:
        raise KeyFileError(f"{path} is not a ciphertune key file of version 1")
    _, digest, length = _HEAD.unpack_from(data)
    if len(data) != _HEAD.size + length + 32 or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise KeyFileError(f"key file {path} is damaged: copy it again")
    return SecretKey(data[_HEAD.size : -32], digest)


def load_or_create(path: Path, create: Callable[[], SecretKey]) -> SecretKey:
    """The key in `path`, made by `create()` if there is none. Safe when several processes start at once."""
    if not path.exists():
        try:
            save(create(), path)
        except KeyFileError:
            if not path.exists():  # else another process was faster
                raise
    return load(path)
