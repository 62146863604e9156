"""Handing a key to another lab: encrypted to that lab's public key, so that the file may travel by mail or the server.

An offer is text: base64 between two marker lines, of

offset  size
   0      8   magic "CTOFFER" 1
   8     32   SHA-256 of the recipient's public key (as `ssh-keygen -l` has it; X25519: of its SubjectPublicKeyInfo)
  40     16   fingerprint of the key
  56     16   digest of its encryption parameters
  72      ?   the key file, encrypted: HPKE (RFC 9180, base mode) to X25519 or a NIST curve, with AES-256-GCM; to RSA:
              a fresh AES key under RSA-OAEP with SHA-256, nonce 12, AES-256-GCM. Bytes 0 to 72 are bound to it.

Nothing in an offer says who made it: that is what the telephone is for.
"""

from __future__ import annotations

import base64
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from ciphertune.crypto import keys
from ciphertune.crypto.private_files import read_public
from ciphertune.crypto.recipients import Identity, PrivateKey, PublicKey, Recipient, shown
from ciphertune.crypto.secret import SecretKey
from ciphertune.errors import KeyFileError

BEGIN, END = "-----BEGIN CIPHERTUNE KEY OFFER-----", "-----END CIPHERTUNE KEY OFFER-----"
_MAGIC = b"CTOFFER\1"
_HEAD = struct.Struct("<8s32s16s16s")
_MAX_TEXT = 1 << 25
_OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
_SUITES = {
    "secp256r1": (KEM.P256, KDF.HKDF_SHA256),
    "secp384r1": (KEM.P384, KDF.HKDF_SHA384),
    "secp521r1": (KEM.P521, KDF.HKDF_SHA512),
}


@dataclass(frozen=True)
class Offer:
    """What anybody can read in an offer. Nothing of it is to be believed before the offer has been opened."""

    recipient: bytes
    fingerprint: bytes
    params_digest: bytes


def seal(key: SecretKey, recipient: Recipient) -> str:
    """An offer of the key that only this recipient can open. Raises KeyFileError when it cannot be encrypted to."""
    head = _HEAD.pack(_MAGIC, recipient.digest, key.fingerprint, key.params_digest)
    try:
        body = head + _encrypt(keys.pack(key), recipient.key, head)
    except ValueError:  # a point of small order
        raise KeyFileError(f"{recipient.name} is no valid key: ask for it again") from None
    return "\n".join((BEGIN, *_lines(base64.b64encode(body).decode()), END, ""))


def read(path: Path) -> tuple[Offer, bytes]:
    """What anybody can read in an offer, and its bytes. Raises KeyFileError when it is none, cut off or damaged."""
    lines = [line.strip() for line in read_public(path, "offer", _MAX_TEXT).decode("ascii", "replace").splitlines()]
    if lines.count(BEGIN) != 1:
        raise KeyFileError(f"{path} holds {lines.count(BEGIN) or 'no'} key offers: want one")
    lines = lines[lines.index(BEGIN) + 1 :]
    if END not in lines:
        raise KeyFileError(f"offer {path} is cut off: ask for it again")
    try:
        data = base64.b64decode("".join(lines[: lines.index(END)]), validate=True)
    except ValueError:
        raise KeyFileError(f"offer {path} is damaged: ask for it again") from None
    if data[:8] != _MAGIC:
        raise KeyFileError(f"{path} is not a ciphertune key offer of version 1")
    if len(data) <= _HEAD.size:
        raise KeyFileError(f"offer {path} is cut off: ask for it again")
    return Offer(*_HEAD.unpack_from(data)[1:]), data


def open_(path: Path, identity: Identity) -> SecretKey:
    """The key in an offer. Raises KeyFileError: for somebody else, damaged, or not what it says."""
    offer, data = read(path)
    if offer.recipient != identity.recipient.digest:
        raise KeyFileError(
            f"offer {path} is for the owner of {shown(offer.recipient)}, and the identity is "
            f"{identity.recipient.name}: name the identity it was made for, or ask for an offer to this one"
        )
    try:
        content = _decrypt(data[_HEAD.size :], identity.key, data[: _HEAD.size])
    except (InvalidTag, ValueError):
        raise KeyFileError(f"offer {path} is damaged: ask for it again") from None
    key = keys.unpack(content, f"the key in offer {path}")
    if (key.fingerprint, key.params_digest) != (offer.fingerprint, offer.params_digest):
        raise KeyFileError(f"offer {path} holds another key than it says: do not use it, and ask who made it")
    return key


def _suite(key: PublicKey | PrivateKey) -> Suite:
    if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey):
        return Suite(*_SUITES[key.curve.name], AEAD.AES_256_GCM)
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _encrypt(content: bytes, key: PublicKey, head: bytes) -> bytes:
    if not isinstance(key, rsa.RSAPublicKey):
        return _suite(key).encrypt(content, key, info=head)
    once, nonce = AESGCM.generate_key(256), os.urandom(12)
    return key.encrypt(once, _OAEP) + nonce + AESGCM(once).encrypt(nonce, content, head)


def _decrypt(data: bytes, key: PrivateKey, head: bytes) -> bytes:
    if not isinstance(key, rsa.RSAPrivateKey):
        return _suite(key).decrypt(data, key, info=head)
    size = key.key_size // 8
    once = key.decrypt(data[:size], _OAEP)
    return AESGCM(once).decrypt(data[size : size + 12], data[size + 12 :], head)


def _lines(text: str) -> list[str]:
    return [text[at : at + 76] for at in range(0, len(text), 76)]
