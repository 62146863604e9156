"""Which named encryption parameters of `conf/crypto/` a key was made for: a key file knows a digest only."""

from __future__ import annotations

from pathlib import Path

import yaml

from ciphertune.plain import build
from ciphertune.settings import CryptoSettings, ckks_params, packed_params


def params_digest(crypto: CryptoSettings) -> bytes:
    """What a key for these settings is bound to. Raises SettingsError when they are unsafe."""
    return (packed_params(crypto) if crypto.packed else ckks_params(crypto)).digest()


def preset(digest: bytes, conf_dir: Path) -> tuple[str, CryptoSettings] | None:
    """Name and settings of the file in `conf_dir`/crypto with this digest; None where there is none."""
    for path in sorted((conf_dir / "crypto").glob("*.yaml")):
        crypto = build(CryptoSettings, yaml.safe_load(path.read_text(encoding="utf-8")), "crypto.")
        if crypto.backend != "clear" and params_digest(crypto) == digest:
            return path.stem, crypto
    return None
