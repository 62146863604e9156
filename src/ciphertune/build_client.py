"""Settings -> what only a client may hold. The server never imports this file."""

from __future__ import annotations

from ciphertune.crypto import keys
from ciphertune.crypto.clear import ClearPublic
from ciphertune.crypto.clear_secret import ClearSecret
from ciphertune.crypto.secret import SecretKey, SecretPart
from ciphertune.node import NodeSettings
from ciphertune.settings import CryptoSettings, ckks_params, packed_params


def generate_key(crypto: CryptoSettings) -> SecretKey:
    """A fresh key for the chosen backend."""
    if crypto.packed:
        from ciphertune.crypto import packed_secret

        return packed_secret.generate_key(packed_params(crypto))
    from ciphertune.crypto import ckks_secret

    return ckks_secret.generate_key(ckks_params(crypto))


def secret_part(crypto: CryptoSettings, node: NodeSettings) -> SecretPart:
    """The client's half of the backend, with the node's key. In simulation the first client makes the key.

    Raises KeyFileError.
    """
    if crypto.backend == "clear":
        return ClearSecret(ClearPublic(crypto.precision), crypto.bound)
    if node.simulated and not node.own_key:
        key = keys.load_or_create(node.key_file, lambda: generate_key(crypto))
    else:
        key = keys.load(node.key_file)
    return open_key(crypto, key, node.processes)


def fresh_part(crypto: CryptoSettings) -> SecretPart:
    """The client's half of the backend under a key that is never written anywhere."""
    if crypto.backend == "clear":
        return ClearSecret(ClearPublic(crypto.precision), crypto.bound)
    return open_key(crypto, generate_key(crypto))


def open_key(crypto: CryptoSettings, key: SecretKey, processes: int = 1) -> SecretPart:
    """The client's half of an encrypting backend under a key. processes: that share large updates, where it can.

    Raises KeyFileError when the key is of other parameters.
    """
    if crypto.packed:
        from ciphertune.crypto.packed_secret import PackedSecret

        return PackedSecret(packed_params(crypto), key, processes)
    from ciphertune.crypto.ckks_secret import CkksSecret

    return CkksSecret(ckks_params(crypto), key)
