"""Whom a key is handed to: public keys, and the private ones that belong to them, of SSH or made here (X25519).

An Ed25519 key of SSH is used as the X25519 key it corresponds to; that this harms neither use is proven for HPKE's way
of encrypting (Thormarker, ePrint 2021/509).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519

from ciphertune.crypto.private_files import read_private, read_public, write_new
from ciphertune.errors import KeyFileError

CURVES = ("secp256r1", "secp384r1", "secp521r1")
_LEAST_RSA = 2048  # bits
_SSH = ("ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521")
_OWN = "make an identity with `ciphertune keys identity --out lab.id`"

PublicKey = x25519.X25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey
PrivateKey = x25519.X25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Recipient:
    """Whom an offer is for. digest: SHA-256 of the public key. key: what is encrypted to."""

    kind: str
    digest: bytes
    key: PublicKey

    @property
    def name(self) -> str:
        """As `ssh-keygen -l` shows a key."""
        return f"{self.kind} {shown(self.digest)}"


@dataclass(frozen=True, repr=False)
class Identity:
    """A recipient with the private key."""

    recipient: Recipient
    key: PrivateKey


def shown(digest: bytes) -> str:
    """A digest of a public key as `ssh-keygen -l` shows it."""
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def create_identity(path: Path) -> Recipient:
    """A new X25519 key pair: `path` (PKCS 8, mode 600) and `path`.pub. Raises KeyFileError when one of them exists."""
    key = x25519.X25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    write_new(path, private, "an identity")
    try:
        write_new(path.with_name(path.name + ".pub"), public, "a public key", 0o644)
    except BaseException:
        path.unlink()
        raise
    return _recipient(key.public_key())


def read_recipient(path: Path) -> Recipient:
    """The one public key in a file: a line of OpenSSH, or PEM. Raises KeyFileError for another kind of key."""
    data = read_public(path, "public key", 1 << 16)
    if b"PRIVATE KEY-----" in data:
        raise KeyFileError(f"{path} is a private key: its owner keeps it, and gives you the public one (.pub)")
    lines = [line for line in data.splitlines() if line.strip() and not line.startswith(b"#")]
    try:
        if lines and lines[0].startswith(b"-----BEGIN PUBLIC KEY-----"):
            return _recipient(serialization.load_pem_public_key(data))
        if len(lines) != 1:
            raise KeyFileError(f"{path} holds {len(lines)} lines where one public key is expected")
        kind = lines[0].split()[0].decode("ascii", "replace")
        if kind.startswith("sk-"):
            raise KeyFileError(f"{path} is a key on a hardware token, which can only sign: {_OWN}")
        if kind not in _SSH:
            raise KeyFileError(f"{path} is no public key of these kinds: {', '.join(_SSH)}, X25519 in PEM")
        return _recipient(serialization.load_ssh_public_key(lines[0]))
    except (ValueError, UnsupportedAlgorithm, IndexError):
        raise KeyFileError(f"{path} is damaged or no public key: ask for it again") from None


def read_identity(path: Path, passphrase: Callable[[], bytes]) -> Identity:
    """A private key: of SSH, or PEM. `passphrase` is asked for one where the key is locked.

    Raises KeyFileError, also when others could read the file.
    """
    data = read_private(path, "identity", _OWN)
    if b"PRIVATE KEY-----" not in data:
        raise KeyFileError(f"{path} is no private key: --identity wants the one that belongs to the public key")
    load = (
        serialization.load_ssh_private_key
        if b"BEGIN OPENSSH PRIVATE KEY" in data
        else serialization.load_pem_private_key
    )
    try:
        try:
            key = load(data, None)
        except TypeError:  # locked
            key = load(data, passphrase())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyFileError(f"cannot open identity {path}: wrong passphrase, or damaged") from None
    recipient = _recipient(key.public_key())
    if isinstance(key, ed25519.Ed25519PrivateKey):
        from nacl.bindings import crypto_sign_ed25519_sk_to_curve25519

        pair = key.private_bytes_raw() + key.public_key().public_bytes_raw()
        key = x25519.X25519PrivateKey.from_private_bytes(crypto_sign_ed25519_sk_to_curve25519(pair))
    assert isinstance(key, PrivateKey)
    return Identity(recipient, key)


def _recipient(key: object) -> Recipient:
    """What is shown of a public key, and what is encrypted to. Raises KeyFileError for kinds that cannot be."""
    if isinstance(key, x25519.X25519PublicKey):
        whole = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return Recipient("x25519", hashlib.sha256(whole).digest(), key)
    if isinstance(key, ed25519.Ed25519PublicKey):
        return Recipient("ssh-ed25519", serialization.ssh_key_fingerprint(key, hashes.SHA256()), _montgomery(key))
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < _LEAST_RSA:
            raise KeyFileError(f"an RSA key of {key.key_size} bits is too short to encrypt to: {_OWN}")
        return Recipient("ssh-rsa", serialization.ssh_key_fingerprint(key, hashes.SHA256()), key)
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in CURVES:
        kind = f"ecdsa-sha2-nistp{key.curve.key_size}"
        return Recipient(kind, serialization.ssh_key_fingerprint(key, hashes.SHA256()), key)
    raise KeyFileError(f"a key of this kind cannot be encrypted to: {_OWN}")


def _montgomery(key: ed25519.Ed25519PublicKey) -> x25519.X25519PublicKey:
    """The X25519 key that corresponds to an Ed25519 key (RFC 7748, section 4.1), by libsodium, which checks it."""
    from nacl.bindings import crypto_sign_ed25519_pk_to_curve25519
    from nacl.exceptions import CryptoError

    try:
        return x25519.X25519PublicKey.from_public_bytes(crypto_sign_ed25519_pk_to_curve25519(key.public_bytes_raw()))
    except CryptoError:
        raise KeyFileError("the Ed25519 key is no valid one: ask for it again") from None
