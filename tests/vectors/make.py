"""Stored messages, so that a later version provably still reads the bytes of this one.

    python -m tests.vectors.make            writes tests/vectors/<backend>.json anew

One file per backend: the values of two clients, a TEST key, both updates, and the aggregate that the server made of
them. The key is stored as its ternary coefficients; `material` makes the residues of a key file of it, by definition.
A file changes when the wire, the plan, a parameter or the pinned library does: then make it again, and say so in the
change log. tests/test_backends.py reads the files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ciphertune import exchange, wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.aggregation import SeparateSum
from ciphertune.crypto import ckks_secret, packed_secret
from ciphertune.crypto.clear import ClearPublic
from ciphertune.crypto.clear_secret import ClearSecret
from ciphertune.crypto.params import CkksParams, PackedParams
from ciphertune.crypto.secret import SecretKey, SecretPart
from ciphertune.plan import HeadShape, LayerShape, Plan
from ciphertune.ranks import Contributor
from ciphertune.wire import Session
from tests.oracle import coefficients, first_primes

FOLDER = Path(__file__).parent
RUN, ROUND, SAMPLES, TOTAL, BOUND = 7, 3, (30, 10), 40, 64.0
PLAN = Plan((LayerShape("layer", 4, 3),), (HeadShape("head", (2,)),), 2.0, (1,), "both", "all", "nested")
SETTINGS = hashlib.sha256(b"stored vectors").digest()[:16]
# the packed ones as shipped; of CKKS a small ring, since two polynomials per update make a large file
PARAMS: dict[str, CkksParams | PackedParams | None] = {
    "clear": None,
    "ckks": CkksParams(2048, (33, 20), 25, BOUND),
    "ckks_packed": PackedParams("ckks", 4096, 40, BOUND, 1000),
    "bfv_packed": PackedParams("bfv", 4096, 48, BOUND, 1000, 30),
}


@dataclass(frozen=True)
class Stored:
    """One file, read."""

    session: Session
    secret: SecretPart
    fingerprint: bytes  # as stored
    clients: tuple[Adapter, ...]
    updates: tuple[bytes, ...]
    aggregate: bytes


@cache
def load(name: str) -> Stored:
    """The stored messages of a backend."""
    raw = json.loads((FOLDER / f"{name}.json").read_text())
    assert raw["params"] == parameters(name)
    session, secret = parties(name, np.frombuffer(_unpacked(raw["key"]), np.int8), Plan.from_json(raw["plan"]))
    return Stored(
        session=session,
        secret=secret,
        fingerprint=bytes.fromhex(raw["fingerprint"]),
        clients=tuple(adapter(c) for c in raw["clients"]),
        updates=tuple(map(_unpacked, raw["updates"])),
        aggregate=_unpacked(raw["aggregate"]),
    )


def made(name: str) -> dict[str, Any]:
    """The content of a file, with a fresh key and fresh noise."""
    ternary = fresh_key(name)
    session, secret = parties(name, ternary, PLAN)
    rng = np.random.default_rng(4)
    clients = [
        {k: rng.normal(0, 0.3, shape).round(6).tolist() for k, shape in (("a", (1, 3)), ("b", (4, 1)), ("head", (2,)))}
        for _ in SAMPLES
    ]
    updates = [sealed(session, secret, adapter(c), i) for i, c in enumerate(clients)]
    total = SeparateSum(session, ROUND, TOTAL)
    for i, data in enumerate(updates):
        total.add(data, sender=i + 1, who=Contributor(1, SAMPLES[i]))
    return {
        "about": "python -m tests.vectors.make; the key is a test key; binary is zlib, base64",
        "params": parameters(name),
        "plan": PLAN.to_json(),
        "fingerprint": secret.fingerprint.hex(),
        "clients": clients,
        "key": _packed(ternary.tobytes()),
        "updates": [_packed(u) for u in updates],
        "aggregate": _packed(wire.encode(total.release(2), session)),
    }


def sealed(session: Session, secret: SecretPart, values: Adapter, number: int) -> bytes:
    """The update of client `number` (from 0), made now."""
    return exchange.seal(values, session, secret, round_=ROUND, sender=number + 1, samples=SAMPLES[number], total=TOTAL)


def adapter(values: dict[str, Any]) -> Adapter:
    """A stored client's values."""
    factors = LoraFactors(np.array(values["a"]), np.array(values["b"]), PLAN.scale)
    return Adapter({"layer": factors}, {"head": np.array(values["head"])})


def parties(name: str, ternary: npt.NDArray[np.int8], plan: Plan) -> tuple[Session, SecretPart]:
    """The session of the stored messages, and its client half under the key of these coefficients."""
    params, clear, secret = PARAMS[name], ClearPublic("float64"), None
    if isinstance(params, CkksParams):
        secret = ckks_secret.CkksSecret(params, SecretKey(material(ternary, params), params.digest()))
    elif params:
        secret = packed_secret.PackedSecret(params, SecretKey(material(ternary, params), params.digest()))
    chosen: SecretPart = secret or ClearSecret(clear, BOUND)
    return Session(RUN, plan, SETTINGS, chosen.fingerprint, chosen.public, clear, BOUND), chosen


def material(ternary: npt.NDArray[np.int8], params: CkksParams | PackedParams) -> bytes:
    """A key's residues modulo every prime: its polynomial at psi^(2e+1), in bit-reversed order of e.

    psi is the smallest primitive 2N-th root of unity; all primes are of different sizes here.
    """
    degree = params.poly_modulus_degree
    order = [int(f"{e:0{degree.bit_length() - 1}b}"[::-1], 2) for e in range(degree)]
    rows, exponents = [], np.arange(degree)
    for q in primes(params):
        some = next(r for g in range(2, q) if pow(r := pow(g, (q - 1) // (2 * degree), q), degree, q) == q - 1)
        powers = np.array([pow(some, k, q) for k in range(2 * degree)], np.int64)
        psi = powers[1::2].min()
        step = int(np.flatnonzero(powers == psi)[0])
        found = [int((powers[(2 * e + 1) * step * exponents % (2 * degree)] * ternary).sum()) % q for e in order]
        rows.append(np.array(found, "<u8"))
    return np.concatenate(rows).tobytes()


def primes(params: CkksParams | PackedParams) -> list[int]:
    """The largest primes of the parameters' sizes."""
    bits = params.coeff_mod_bits if isinstance(params, CkksParams) else (params.modulus_bits,)
    return [first_primes(b, params.poly_modulus_degree, 1)[0] for b in bits]


def fresh_key(name: str) -> npt.NDArray[np.int8]:
    """The ternary coefficients of a fresh key; none without encryption."""
    params = PARAMS[name]
    if not params:
        return np.zeros(0, np.int8)
    key = (ckks_secret if isinstance(params, CkksParams) else packed_secret).generate_key(params)  # type: ignore[arg-type]
    first = np.frombuffer(key.reveal(), "<u8")[: params.poly_modulus_degree]
    ternary = coefficients(first, primes(params)[0]).astype(np.int8)
    assert material(ternary, params) == key.reveal()
    return ternary


def parameters(name: str) -> dict[str, Any]:
    """The parameters of a backend as plain values."""
    params = PARAMS[name]
    return json.loads(json.dumps(asdict(params))) if params else {}


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


if __name__ == "__main__":
    for backend in PARAMS:
        path = FOLDER / f"{backend}.json"
        path.write_text(json.dumps(made(backend), indent=1) + "\n")
        print(f"{path}: {path.stat().st_size:,} bytes")
