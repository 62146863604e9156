"""Column numbers <-> codes: a permutation per layer, keyed by what the clients share and the server lacks.

SHE-LoRA (arXiv 2505.21051) hides column numbers from the server by an encoding; its published one has no key, so
anybody inverts it. This one is keyed, the same for all clients of a run, and by itself tells nothing about a column.

What the codes do NOT hide:
- Frequency. Equal columns have equal codes in all clients, for the server must count them: it sees how many clients
  name a coded column, and which ones.
- Order. A client sends its codes most sensitive first, so the server sees which coded column matters more to it.
- Most columns, to a server that tries. The clear columns of A travel in code order, and the initial adapter is public
  (its seed and its model are public settings). Matching clear columns against it, in the first round above all,
  recovers the codes of most columns; the encrypted ones are then among the few that are left.
The codes keep column numbers out of the server's view. They are no cryptographic protection against a server that
tries to match.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_MATERIAL_BYTES, _BLOCK_BYTES = 32, 16
_LABEL = b"ciphertune column codes 1\0"


def permutation(material: bytes, layer: str, n: int) -> npt.NDArray[np.int64]:
    """Codes of the columns of a layer, shape (n,): `codes[j]` is the code of column j, each of 0..n-1 once.

    The layer's key is HKDF-SHA256 of `material` (no salt; info: a version label and the layer's name). Column j has
    block j of the AES-256-CTR keystream from counter 0, as a 128-bit big-endian number; its code is that number's rank.
    Blocks of one key never repeat, so there are no ties. See the module for what codes do not hide.
    Raises ValueError when `material` is not 32 bytes or there is no column.
    """
    if len(material) != _MATERIAL_BYTES:
        raise ValueError(f"the codes need a secret of {_MATERIAL_BYTES} bytes, got {len(material)}")
    if n < 1:
        raise ValueError(f"a layer has at least one column, got n={n}")
    key = HKDF(SHA256(), _MATERIAL_BYTES, salt=None, info=_LABEL + layer.encode()).derive(material)
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK_BYTES))).encryptor().update(bytes(n * _BLOCK_BYTES))
    blocks = np.frombuffer(stream, ">u8").astype(np.uint64).reshape(n, 2)
    return inverse(np.lexsort((blocks[:, 1], blocks[:, 0])))


def inverse(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Columns by code, shape (n,), for codes by column: `columns[codes[j]] == j`. `codes` must be a permutation."""
    columns = np.empty(codes.size, np.int64)
    columns[codes] = np.arange(codes.size)
    return columns
