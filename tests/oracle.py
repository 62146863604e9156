"""The slow, obvious computation in float64, written from the definitions of the methods, and the small cases it is for.

Notation: client i holds A_i (r_i, n), B_i (m, r_i), N_i samples and the common scale s;
dW_i = s B_i A_i, w_i = N_i / sum N.
Nothing here computes with the code under test: of the package only value types and constructors are used.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.crypto import packed_secret
from ciphertune.crypto.ckks_secret import CkksSecret, generate_key
from ciphertune.crypto.clear import ClearPublic
from ciphertune.crypto.clear_secret import ClearSecret
from ciphertune.crypto.params import CkksParams, PackedParams
from ciphertune.crypto.secret import SecretPart
from ciphertune.plan import HeadShape, LayerShape, Plan
from ciphertune.wire import Session

Matrix = npt.NDArray[np.float64]

SEALED = CkksParams(4096, (54, 20), 40, 64.0)  # conf/crypto/ckks.yaml
FULL_HE = CkksParams(8192, (60, 40, 60), 40, 64.0)  # conf/crypto/ckks_8192.yaml
PRODUCT = CkksParams(4096, (44, 42, 20), 36, 16.0, 34)  # conf/crypto/ckks_product.yaml

# ---------------------------------------------------------------------------------------------------- the methods


def weights(samples: Sequence[int]) -> list[float]:
    """w_i = N_i / sum N."""
    return [n / sum(samples) for n in samples]


def true_update(clients: Sequence[Adapter], samples: Sequence[int], layer: str) -> Matrix:
    """dW* = sum_i w_i s B_i A_i, shape (m, n)."""
    total = np.zeros((clients[0].layers[layer].b.shape[0], clients[0].layers[layer].a.shape[1]))
    for client, weight in zip(clients, weights(samples), strict=True):
        factors = client.layers[layer]
        for k in range(factors.rank):
            total += weight * factors.scale * np.outer(factors.b[:, k], factors.a[k])
    return total


def mean_component_update(clients: Sequence[Adapter], samples: Sequence[int], layer: str, k: int) -> Matrix:
    """Component k's update, averaged over the clients that have it: sum_i N_i s B_i[:, k] A_i[k] / sum_i N_i."""
    who = [(c.layers[layer], n) for c, n in zip(clients, samples, strict=True) if c.layers[layer].rank > k]
    return sum(n * f.scale * np.outer(f.b[:, k], f.a[k]) for f, n in who) / sum(n for _, n in who)


def mean_factor(clients: Sequence[Adapter], samples: Sequence[int], layer: str, factor: str, fit_rank: str) -> Matrix:
    """The factor averaged component by component, one row per component whatever the factor.

    nested: over the clients that have the component. pad: a client without it counts as zero.
    """
    rows = []
    for k in range(max(c.layers[layer].rank for c in clients)):
        total, divisor = 0.0, 0.0
        for client, n in zip(clients, samples, strict=True):
            found = client.layers[layer]
            if found.rank > k:
                total = total + n * (found.a[k] if factor == "a" else found.b[:, k])
            if found.rank > k or fit_rank == "pad":
                divisor += n
        rows.append(total / divisor)
    return np.array(rows)


def rows_of(adapter: Adapter, layer: str, factor: str) -> Matrix:
    """A factor with one row per component."""
    return adapter.layers[layer].a if factor == "a" else adapter.layers[layer].b.T


def largest(rows: Matrix, tiers: Sequence[int], rate: float) -> npt.NDArray[np.bool_]:
    """L1 unstructured pruning of one factor (a row per component), each tier of components for itself: what remains.

    All but round(rate * entries) of the smallest absolute values; of equal ones the first go first.
    """
    keep = np.ones(rows.shape, bool)
    for low, high in zip([0, *tiers], [t for t in tiers if t <= len(rows)], strict=False):
        entries = [(k, j) for k in range(low, high) for j in range(rows.shape[1])]
        entries.sort(key=lambda kj: abs(rows[kj]))  # sort keeps the order of equal ones
        for entry in entries[: round(rate * len(entries))]:
            keep[entry] = False
    return keep


def mean_of_kept(
    clients: Sequence[Adapter],
    samples: Sequence[int],
    layer: str,
    factor: str,
    tiers: Sequence[int],
    rate: float,
    who: str,
) -> Matrix:
    """The factor pruned by each client's own mask, averaged per entry over the clients that have the component.

    who: all, a pruned entry counts as zero; kept, it does not count, and is zero where nobody kept it.
    """
    rows = [rows_of(c, layer, factor) for c in clients]
    total, divisor = np.zeros(max(rows, key=len).shape), np.zeros(max(rows, key=len).shape)
    for found, n in zip(rows, samples, strict=True):
        keep = largest(found, tiers, rate)
        total[: len(found)] += n * np.where(keep, found, 0.0)
        divisor[: len(found)] += n * (keep if who == "kept" else 1)
    return np.divide(total, divisor, out=np.zeros_like(total), where=divisor > 0)


def mean_head(clients: Sequence[Adapter], samples: Sequence[int], head: str) -> Matrix:
    """Task heads are averaged with the sample weights, whatever the ranks."""
    return sum(w * c.heads[head] for c, w in zip(clients, weights(samples), strict=True))


# ------------------------------------------------------------------------------------------------- ring arithmetic


def residues(body: bytes, params: CkksParams) -> Matrix:
    """Wire blocks -> (blocks, 2, primes, N) residues, number by number."""
    widths = [(bits + 7) // 8 for bits in params.coeff_mod_bits[:-1]]
    degree = params.poly_modulus_degree
    numbers, at = [], 0
    while at < len(body):
        for width in widths:
            numbers += [int.from_bytes(body[at + j * width : at + (j + 1) * width], "little") for j in range(degree)]
            at += degree * width
    return np.array(numbers, np.uint64).reshape(-1, 2, len(widths), degree)


def body_of(values: npt.NDArray[np.uint64], params: CkksParams) -> bytes:
    """The inverse of `residues`."""
    widths = [(bits + 7) // 8 for bits in params.coeff_mod_bits[:-1]]
    return b"".join(
        b"".join(int(x).to_bytes(widths[i], "little") for x in row)
        for block in values
        for poly in block
        for i, row in enumerate(poly)
    )


def modular_sum(bodies: Sequence[bytes], params: CkksParams, moduli: Sequence[int]) -> bytes:
    """What adding ciphertexts is: residue by residue modulo each prime. Shorter bodies are prefixes."""
    terms = sorted((residues(b, params) for b in bodies), key=len, reverse=True)
    column = np.array(moduli, np.uint64)[:, None]
    total = terms[0].copy()
    for term in terms[1:]:
        total[: len(term)] = (total[: len(term)] + term) % column
    return body_of(total, params)


def key_residues(material: bytes, params: CkksParams) -> npt.NDArray[np.uint64]:
    """A key's material -> (primes, N), the special prime last."""
    return np.frombuffer(material, "<u8").reshape(len(params.coeff_mod_bits), -1)


def coefficients(values: npt.NDArray[np.uint64], q: int) -> npt.NDArray[np.object_]:
    """A polynomial from its values at the powers psi^(2e+1), stored in bit-reversed order of e; centred modulo q.

    psi is the smallest primitive 2N-th root of unity modulo q, as in SEAL.
    """
    degree = len(values)
    bits = degree.bit_length() - 1
    natural = np.array([int(values[int(f"{e:0{bits}b}"[::-1], 2)]) for e in range(degree)], object)
    some = next(r for g in range(2, q) if pow(r := pow(g, (q - 1) // (2 * degree), q), degree, q) == q - 1)
    square, odd = some * some % q, [some]
    while len(odd) < degree:
        odd.append(odd[-1] * square % q)
    inverse = pow(min(odd), -1, q)

    def transform(x: npt.NDArray[np.object_], root: int) -> npt.NDArray[np.object_]:
        if len(x) == 1:
            return x
        even, uneven = transform(x[::2], root * root % q), transform(x[1::2], root * root % q)
        twisted = _powers(root, len(even), q) * uneven % q
        return np.concatenate([(even + twisted) % q, (even - twisted) % q])

    found = transform(natural, inverse * inverse % q) * _powers(inverse, degree, q) * pow(degree, -1, q) % q
    return np.where(found > q // 2, found - q, found)


def decrypted(block: npt.NDArray[np.uint64], key: bytes, params: CkksParams, q: int) -> Matrix:
    """CKKS by its definition, modulo the first prime: the slots of (c0 + c1 s) / scale, slot i at exp(pi i/N)^(3^i)."""
    s = key_residues(key, params)[0].astype(object)
    plain = coefficients((block[0, 0].astype(object) + block[1, 0].astype(object) * s) % q, q).astype(np.float64)
    degree = len(plain)
    twisted = plain * np.exp(1j * np.pi * np.arange(degree) / degree)
    odd_powers = np.fft.ifft(twisted) * degree  # m at exp(pi i (2e + 1) / N)
    slots = [odd_powers[(pow(3, i, 2 * degree) - 1) // 2].real for i in range(degree // 2)]
    return np.array(slots) / 2.0**params.scale_bits


def _powers(root: int, count: int, q: int) -> npt.NDArray[np.object_]:
    out = [1]
    while len(out) < count:
        out.append(out[-1] * root % q)
    return np.array(out, object)


def first_primes(bits: int, degree: int, count: int) -> list[int]:
    """The `count` largest primes of `bits` bits that are 1 modulo 2N."""
    found: list[int] = []
    candidate = ((1 << bits) - 1) // (2 * degree) * (2 * degree) + 1
    while len(found) < count:
        if candidate < 1 << bits and _is_prime(candidate):
            found.append(candidate)
        candidate -= 2 * degree
    return found


def _is_prime(n: int) -> bool:
    """Miller and Rabin with the bases that decide every 64-bit number."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if n < 2 or any(n % p == 0 for p in bases):
        return n in bases
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        x = pow(base, odd, n)
        if x not in (1, n - 1) and not any((x := x * x % n) == n - 1 for _ in range(twos - 1)):
            return False
    return True


# ------------------------------------------------------------------------------------------- forging, by the layout

HEADER = struct.Struct("<8sBB16s16s16s16sQIIIQI")
OFFSETS = {
    "magic": (0, "8s"),
    "kind": (8, "B"),
    "factors": (9, "B"),
    "parameters": (10, "16s"),
    "key": (26, "16s"),
    "plan": (42, "16s"),
    "settings": (58, "16s"),
    "run": (74, "Q"),
    "round": (82, "I"),
    "sender": (86, "I"),
    "rank": (90, "I"),
    "total": (94, "Q"),
    "contributors": (102, "I"),
    "contributor rank": (106, "I"),
    "contributor tier": (110, "I"),
    "contributor samples": (114, "Q"),
}
BODY = 122  # where an update's values begin: it has one contributor


def read(data: bytes, name: str) -> int | bytes:
    """One field of a message."""
    offset, form = OFFSETS[name]
    return struct.unpack_from("<" + form, data, offset)[0]


def forge(data: bytes, **fields: int | bytes) -> bytes:
    """The message with fields replaced (spaces as underscores) and its SHA-256 made right again."""
    out = bytearray(data)
    for name, value in fields.items():
        offset, form = OFFSETS[name.replace("_", " ")]
        struct.pack_into("<" + form, out, offset, value)
    return rehashed(bytes(out[:-32]))


def rehashed(front: bytes) -> bytes:
    """Everything before the digest -> the whole message."""
    return front + hashlib.sha256(front).digest()


def with_body(data: bytes, body: bytes) -> bytes:
    """An update whose values are replaced by `body`, correctly framed."""
    return rehashed(data[:BODY] + body)


# ------------------------------------------------------------------------------------------------------- small cases

SMALL_LAYERS = (LayerShape("block.q", 7, 5), LayerShape("block.v", 4, 9))
SMALL_HEADS = (HeadShape("classifier.bias", (3,)), HeadShape("classifier.weight", (3, 6)))


def plan_of(
    *,
    share: str = "alternate",
    select: str = "all",
    fit_rank: str = "nested",
    layers: tuple[LayerShape, ...] = SMALL_LAYERS,
    heads: tuple[HeadShape, ...] = SMALL_HEADS,
    tiers: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8),
) -> Plan:
    """A plan of two layers of different shapes and a task head, in which every rank is a tier."""
    return Plan(layers, heads, 2.0, tiers, share, select, fit_rank)


def negotiated_plan() -> Plan:
    """A plan of a product: of tier 0 a client encrypts columns 3 | 8, 0 of the two layers, of tier 1 also 1 | 4, 2."""
    budgets, columns = (0.2, 0.4), ((3, 1), (8, 0, 4, 2))
    return Plan(SMALL_LAYERS, SMALL_HEADS, 2.0, (2, 8), "both", "negotiated", "svd", "product", 16, budgets, columns)


def adapter_of(plan: Plan, rank: int, seed: int, dtype: type = np.float64) -> Adapter:
    """Random factors and heads of the plan's shapes."""
    rng = np.random.default_rng(seed)
    layers = {
        x.name: LoraFactors(
            rng.normal(0, 0.3, (rank, x.n)).astype(dtype), rng.normal(0, 0.3, (x.m, rank)).astype(dtype), plan.scale
        )
        for x in plan.layers
    }
    return Adapter(layers, {h.name: rng.normal(0, 0.3, h.shape).astype(dtype) for h in plan.heads})


def cohort(plan: Plan, ranks: Sequence[int], round_: int, seed: int = 0) -> list[Adapter]:
    """Clients of a round: the factors that do not travel are one factor, cut to each rank; the rest differs."""
    common = adapter_of(plan, max(ranks), seed)
    clients = []
    for i, rank in enumerate(ranks):
        own = adapter_of(plan, rank, seed + 1 + i)
        layers = {}
        for name, factors in own.layers.items():
            a = factors.a if "a" in plan.factors(round_) else common.layers[name].a[:rank].copy()
            b = factors.b if "b" in plan.factors(round_) else common.layers[name].b[:, :rank].copy()
            layers[name] = LoraFactors(a, b, factors.scale)
        clients.append(Adapter(layers, own.heads))
    return clients


def truncated(adapter: Adapter, rank: int) -> Adapter:
    """The first components of an adapter: what a client of lower rank holds of it."""
    layers = {n: LoraFactors(f.a[:rank].copy(), f.b[:, :rank].copy(), f.scale) for n, f in adapter.layers.items()}
    return Adapter(layers, adapter.heads)


def blank(adapter: Adapter, dtype: type = np.float64) -> Adapter:
    """The shape of an adapter, every value 7."""
    layers = {
        n: LoraFactors(np.full(f.a.shape, 7, dtype), np.full(f.b.shape, 7, dtype), f.scale)
        for n, f in adapter.layers.items()
    }
    return Adapter(layers, {n: np.full(h.shape, 7, dtype) for n, h in adapter.heads.items()})


@cache
def shared_secret(params: Any = SEALED, number: int = 0) -> Any:
    """One key per number for the whole test process."""
    if isinstance(params, PackedParams):
        return packed_secret.PackedSecret(params, packed_secret.generate_key(params))
    return CkksSecret(params, generate_key(params))


def encrypted(plan: Plan, *, secret: CkksSecret | None = None, run: int = 11) -> tuple[Session, CkksSecret]:
    """A session under CKKS and its client half."""
    secret = shared_secret() if secret is None else secret
    clear = ClearPublic("float64")
    return Session(run, plan, b"s" * 16, secret.fingerprint, secret.public, clear, 64.0), secret


def in_the_clear(plan: Plan, *, precision: str = "float64", run: int = 11) -> tuple[Session, SecretPart]:
    """A session without encryption and its client half."""
    public = ClearPublic(precision)
    return Session(run, plan, b"s" * 16, bytes(16), public, public, 64.0), ClearSecret(public, 64.0)
