"""What a client says of itself when it joins."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from ciphertune.adapter import Adapter
from ciphertune.plan import HeadShape, LayerShape
from ciphertune.state import identity
from ciphertune.versions import code_digest

if TYPE_CHECKING:
    from ciphertune.client import Client


def shapes(adapter: Adapter) -> tuple[tuple[LayerShape, ...], tuple[HeadShape, ...]]:
    """What a plan says of an adapter, independent of its rank."""
    layers = tuple(LayerShape(name, f.b.shape[0], f.a.shape[1]) for name, f in adapter.layers.items())
    return layers, tuple(HeadShape(name, h.shape) for name, h in adapter.heads.items())


def join(client: Client) -> dict[str, Any]:
    """What the server must know to make the plan, as plain values."""
    initial = client.model.read()
    layers, heads = shapes(initial)
    return {
        "name": client.node.name,
        "identity": identity(client.node.folder, client.run),
        "simulated": client.node.simulated,
        "rank": client.node.rank,
        "budget": client.budget,
        "samples": len(client.data.train),
        "heldout": len(client.data.heldout),
        "layers": [[x.name, x.m, x.n] for x in layers],
        "heads": [[h.name, list(h.shape)] for h in heads],
        "key": client.secret.fingerprint.hex(),
        "parameters": client.secret.public.digest().hex(),
        "settings": client.settings.digest().hex(),
        "code": code_digest(),
        "initial": initial_digest(initial),
    }


def initial_digest(adapter: Adapter) -> str:
    """Digest of the first component of every layer and of the heads: all clients must start from the same adapter."""
    total = hashlib.sha256()
    for name, factors in adapter.layers.items():
        total.update(name.encode() + np.ascontiguousarray(factors.a[0], np.float32).tobytes())
    for name, head in adapter.heads.items():
        total.update(name.encode() + np.ascontiguousarray(head, np.float32).tobytes())
    return total.hexdigest()[:16]
