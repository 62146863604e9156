"""What a client says of itself when it joins, as the server checks it; `greeting.py` is the client's side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ciphertune.errors import FormatError
from ciphertune.node import NAME
from ciphertune.plan import HeadShape, LayerShape, Plan
from ciphertune.scores import number

_MAX_EXAMPLES = 10**9
_HEX = re.compile(r"[0-9a-f]{16,64}")


@dataclass(frozen=True)
class Hello:
    """What a client says of itself when it joins, checked."""

    node_id: int
    client: int | None  # which client a simulated node plays
    name: str
    rank: int
    budget: float  # share of the columns of A it encrypts, where the method negotiates them
    samples: int
    heldout: int  # examples
    simulated: bool
    key: bytes
    parameters: str
    settings: str
    code: str
    initial: str
    layers: tuple[LayerShape, ...]
    heads: tuple[HeadShape, ...]
    identity: str = ""  # random, of this run: who else comes by its name is not it


def parse_hello(values: dict[str, Any], node_id: int, client: int | None) -> Hello:
    """Check what came over the wire. Raises FormatError."""
    try:
        if not all(isinstance(values[k], str) for k in ("name", "identity")):
            raise TypeError
        hello = Hello(
            node_id=node_id,
            client=client,
            name=values["name"],
            rank=int(values["rank"]),
            budget=number(values["budget"], 0.0, 1.0),
            samples=int(values["samples"]),
            heldout=int(values["heldout"]),
            simulated=values["simulated"] is True,
            key=bytes.fromhex(values["key"]),
            **{k: str(values[k]) for k in ("parameters", "settings", "code", "initial", "identity")},
            layers=tuple(LayerShape(str(n), int(m), int(k)) for n, m, k in values["layers"]),
            heads=tuple(HeadShape(str(n), tuple(int(d) for d in s)) for n, s in values["heads"]),
        )
        Plan.from_json(Plan(hello.layers, hello.heads, 1.0, (hello.rank,), "both", "none", "pad").to_json())
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FormatError("the client's greeting is not readable") from error
    digests = (hello.parameters, hello.settings, hello.code, hello.initial, hello.identity)
    if not NAME.fullmatch(hello.name) or len(hello.key) != 16 or not all(_HEX.fullmatch(d) for d in digests):
        raise FormatError("the client's greeting is not readable")
    for what, count in (("training", hello.samples), ("held-out", hello.heldout)):
        if not 1 <= count <= _MAX_EXAMPLES:
            raise FormatError(f"{hello.name} has {count} {what} examples: want 1 to {_MAX_EXAMPLES}")
    return hello
