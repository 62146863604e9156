"""Encrypted sums against peers in one run: seconds, bytes and error, as ratios to what everybody uses.

    python benchmarks/crypto.py                                    1 million values, four clients: a few minutes
    python benchmarks/crypto.py --values 100000 --clients 10

Every row encrypts, adds and decrypts the same values in turn, as often as --repeat says, so that what else runs on the
machine hits all alike. A ratio is the median of the ratios to row A within one repetition. Seconds are of the
processor (wall time stands beside them in the results), bytes of the messages' bodies. Row A is CKKSVector as
TenSEAL's tutorials have it: N=8192, [60, 40, 60], public key, `serialize()`.

Two rows are not what they would be in earnest:
- masking is a cost model of SecAgg+ (Bell et al., CCS 2020), not an implementation. Each client expands one mask of
  its own and one per neighbour with AES-CTR and adds them modulo 2^32 to fixed-point values (clipping and precision as
  Flower's defaults); the server expands every client's own mask. Key agreement and secret shares count as bytes, not as
  seconds; nobody drops out. Neighbours: 2 log2(clients), or all. Unlike under every other row that hides anything, the
  server reads the sum.
- column has one column of 32 values per ciphertext, as SHE-LoRA's published code, with row A's parameters: measured on
  a few columns and scaled to all values; sums only.

Results go to benchmarks/results/crypto.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tenseal as ts
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ciphertune.build_client import generate_key
from ciphertune.crypto.ckks_secret import CkksSecret
from ciphertune.crypto.packed_secret import PackedSecret
from ciphertune.settings import ckks_params, compose, packed_params
from ciphertune.versions import versions

ROOT = Path(__file__).parents[1]
Vector = npt.NDArray[np.float64]
FLOAT = 4  # bytes of a value in the clear
MANY = 1000  # clients, of the sums whose bytes are computed
COLUMN, COLUMNS = 32, 16  # values of a column, and how many of them are measured
BASE = "ckksvector"  # row A
OURS = ("ckks", "ckks_8192", "ckks_packed", "ckks_packed_48", "bfv_packed")  # files of conf/crypto/
TENSEAL = {  # primes at N=8192, scale 2^40
    BASE: ("A: CKKSVector [60, 40, 60]", (60, 40, 60)),
    "nvflare": ("NVFlare [60, 40, 40]", (60, 40, 40)),
    "fedshield": ("FedShield [60, 40, 40, 60]", (60, 40, 40, 60)),
}
STAGES = ("client encrypt", "server add", "server release", "client decrypt", "client decrypt many")
# Largest ratio to row A, of the packed CKKS backends; "many" is a sum so large that it travels as two polynomials.
AIMS = {"client encrypt": 0.20, "client decrypt": 0.35, "client decrypt many": 0.35, "up": 0.105}
AIMED = ("ckks_packed", "ckks_packed_48")


class Peer(Protocol):
    """One way to sum what the server should not read. A message is a list of its parts."""

    label: str

    def encrypt(self, client: int, values: Vector) -> list[bytes]:
        """The message of a client."""

    def added(self, messages: Sequence[list[bytes]]) -> Any:
        """The server loads and adds all of them."""

    def release(self, total: Any) -> list[bytes]:
        """What the clients are sent."""

    def decrypt(self, answer: list[bytes], count: int) -> Vector:
        """The sum."""

    def up(self, message: list[bytes]) -> int:
        """Bytes a client sends."""

    def down(self, answer: list[bytes], clients: int) -> int:
        """Bytes a client receives, for a sum of that many."""

    def many(self, answer: list[bytes]) -> list[bytes] | None:
        """The same sum as one of many clients would travel, where that differs."""


class Plaintext:
    """float32 in the clear."""

    label = "plaintext float32"

    def encrypt(self, client: int, values: Vector) -> list[bytes]:
        """See `Peer`."""
        return [values.astype(np.float32).tobytes()]

    def added(self, messages: Sequence[list[bytes]]) -> Any:
        """See `Peer`."""
        total = np.zeros(len(messages[0][0]) // FLOAT, np.float64)
        for (body,) in messages:
            total += np.frombuffer(body, np.float32)
        return total

    def release(self, total: Any) -> list[bytes]:
        """See `Peer`."""
        return [total.astype(np.float32).tobytes()]

    def decrypt(self, answer: list[bytes], count: int) -> Vector:
        """See `Peer`."""
        return np.frombuffer(answer[0], np.float32).astype(np.float64)[:count]

    def up(self, message: list[bytes]) -> int:
        """See `Peer`."""
        return sum(map(len, message))

    def down(self, answer: list[bytes], clients: int) -> int:
        """See `Peer`."""
        return sum(map(len, answer))

    def many(self, answer: list[bytes]) -> list[bytes] | None:
        """See `Peer`."""
        return None


class Masking(Plaintext):
    """The cost model of SecAgg+: see the top of this file."""

    # Flower's defaults: values in [-8, 8] in 2^22 steps, sums modulo 2^32
    clip, steps = 8.0, 2**22
    public_keys = 2 * 32  # of X25519, to each neighbour
    share = 2 * 32 + 28  # shares of the mask's seed and of the secret key, sealed with AES-GCM; opened ones are 32 each

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self.neighbours = min(clients - 1, 2 * math.ceil(math.log2(max(clients, 2))))
        self.label = f"masking (cost model), {self.neighbours} peers"
        self._master = os.urandom(16)

    @property
    def overhead(self) -> int:
        """Bytes of keys and shares, in either direction."""
        return self.public_keys + self.neighbours * (self.share + 32)

    def encrypt(self, client: int, values: Vector) -> list[bytes]:
        """See `Peer`."""
        clipped = np.clip(values, -self.clip, self.clip)
        total = np.rint(clipped * (self.steps / (2 * self.clip))).astype(np.int64).astype(np.uint32)
        total += self._mask(client, client, values.size)
        for other in self._around(client):
            mask = self._mask(min(client, other), max(client, other), values.size)
            if client < other:
                total += mask
            else:
                total -= mask
        return [total.tobytes()]

    def added(self, messages: Sequence[list[bytes]]) -> Any:
        """See `Peer`."""
        total = np.zeros(len(messages[0][0]) // 4, np.uint32)
        for client, (body,) in enumerate(messages):
            total += np.frombuffer(body, np.uint32)
            total -= self._mask(client, client, total.size)
        return total.astype(np.int32) * (2 * self.clip / self.steps)

    def up(self, message: list[bytes]) -> int:
        """See `Peer`."""
        return super().up(message) + self.overhead

    def down(self, answer: list[bytes], clients: int) -> int:
        """See `Peer`."""
        return super().down(answer, clients) + Masking(clients).neighbours * (self.public_keys + self.share)

    def _around(self, client: int) -> list[int]:
        """Neighbours on a ring: half of them on either side, or everybody."""
        if self.neighbours == self._clients - 1:
            return [k for k in range(self._clients) if k != client]
        reach = range(1, self.neighbours // 2 + 1)
        return [(client + sign * d) % self._clients for d in reach for sign in (1, -1)]

    def _mask(self, one: int, two: int, count: int) -> npt.NDArray[np.uint32]:
        """As many values as a seed that both know stands for; the clients' own where they are the same."""
        counter = one.to_bytes(4, "big") + two.to_bytes(4, "big") + bytes(8)
        stream = Cipher(algorithms.AES(self._master), modes.CTR(counter)).encryptor()
        return np.frombuffer(stream.update(bytes(4 * count)), np.uint32)


class TensealVector(Plaintext):
    """CKKSVector as TenSEAL's tutorials have it: `size` values in each ciphertext, public key, `serialize()`."""

    def __init__(self, label: str, primes: Sequence[int], size: int = 4096) -> None:
        self.label = label
        self._size = size
        self._context = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=list(primes))
        self._context.global_scale = 2.0**40
        self._server = ts.context_from(self._context.serialize(save_secret_key=False))

    def encrypt(self, client: int, values: Vector) -> list[bytes]:
        """See `Peer`."""
        chunks = (values[i : i + self._size].tolist() for i in range(0, values.size, self._size))
        return [ts.ckks_vector(self._context, chunk).serialize() for chunk in chunks]

    def added(self, messages: Sequence[list[bytes]]) -> Any:
        """See `Peer`."""
        total = [ts.ckks_vector_from(self._server, part) for part in messages[0]]
        for message in messages[1:]:
            for vector, part in zip(total, message, strict=True):
                vector += ts.ckks_vector_from(self._server, part)
        return total

    def release(self, total: Any) -> list[bytes]:
        """See `Peer`."""
        return [vector.serialize() for vector in total]

    def decrypt(self, answer: list[bytes], count: int) -> Vector:
        """See `Peer`."""
        found = [ts.ckks_vector_from(self._context, part).decrypt() for part in answer]
        return np.concatenate([np.array(part) for part in found])[:count]


class Ours(Plaintext):
    """A backend of this package, as conf/crypto/ has it."""

    def __init__(self, name: str, clients: int) -> None:
        crypto = compose(ROOT / "conf", [f"crypto={name}"]).crypto
        key = generate_key(crypto)
        self._secret = (
            PackedSecret(packed_params(crypto), key) if crypto.packed else CkksSecret(ckks_params(crypto), key)
        )
        self._packed, self._terms = crypto.packed, clients
        primes = [crypto.modulus_bits] if crypto.packed else list(crypto.coeff_mod_bits)
        self.label = f"{name} {primes}"

    def encrypt(self, client: int, values: Vector) -> list[bytes]:
        """See `Peer`."""
        return [self._secret.encrypt(values)]

    def added(self, messages: Sequence[list[bytes]]) -> Any:
        """See `Peer`."""
        total = self._secret.public.aggregator()
        for (body,) in messages:
            total.add(body)
        return total

    def release(self, total: Any) -> list[bytes]:
        """See `Peer`."""
        return [total.result(total.blocks())]

    def decrypt(self, answer: list[bytes], count: int) -> Vector:
        """See `Peer`. A sum in the form of many has more terms than it is of: the form tells."""
        blocks = -(-count // self._secret.public.slots)
        whole = len(answer[0]) == blocks * self._secret.public.sum_bytes(MANY)
        return self._secret.decrypt(answer[0], count, terms=MANY if whole else self._terms)

    def down(self, answer: list[bytes], clients: int) -> int:
        """See `Peer`."""
        public = self._secret.public
        return len(answer[0]) // public.sum_bytes(self._terms) * public.sum_bytes(clients)

    def many(self, answer: list[bytes]) -> list[bytes] | None:
        """See `Peer`. Of a packed backend: with both polynomials instead of a polynomial and the seeds."""
        secret = self._secret
        if not isinstance(secret, PackedSecret):
            return None
        public, terms = secret.public, self._terms
        if public.sum_bytes(terms) == public.sum_bytes(MANY):
            return answer
        blocks = []
        for seeds, residues in zip(*public.summed(answer[0], terms), strict=True):
            second = np.zeros_like(residues[0])
            for seed in seeds:
                second = (second + public.second(seed)) % np.uint64(public.modulus)
            blocks.append(public.pack_sum([], [residues[0], second]))
        return [b"".join(blocks)]


class Clock:
    """Seconds per stage, of the processor and of the wall."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.wall: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str, share: float = 1.0) -> Iterator[None]:
        """Count what runs inside, times `share`."""
        start, wall = time.process_time(), time.perf_counter()
        yield
        self.seconds[name] += (time.process_time() - start) * share
        self.wall[name] += (time.perf_counter() - wall) * share


def peers(clients: int) -> dict[str, Peer]:
    """All rows, in the order of the table."""
    found: dict[str, Peer] = {"plaintext": Plaintext(), "masking": Masking(clients)}
    found |= {name: TensealVector(label, primes) for name, (label, primes) in TENSEAL.items()}
    found["column"] = TensealVector("one column each, scaled", TENSEAL[BASE][1], COLUMN)
    return found | {name: Ours(name, clients) for name in OURS}


def once(peer: Peer, updates: Sequence[Vector], scale: float) -> tuple[Clock, dict[str, float]]:
    """One round of a row: seconds per client or, of the server, per update; sizes per value. scale: to all values."""
    clock, clients, count = Clock(), len(updates), updates[0].size
    messages = []
    for client, values in enumerate(updates):
        with clock.stage("client encrypt", scale / clients):
            messages.append(peer.encrypt(client, values))
    with clock.stage("server add", scale / clients):
        total = peer.added(messages)
    with clock.stage("server release", scale):
        answer = peer.release(total)
    with clock.stage("client decrypt", scale):
        found = peer.decrypt(answer, count)
    error = float(np.abs(found - np.sum(updates, axis=0)).max())
    if (other := peer.many(answer)) is not None:
        with clock.stage("client decrypt many", scale):
            found = peer.decrypt(other, count)
        error = max(error, float(np.abs(found - np.sum(updates, axis=0)).max()))
    sizes = {
        "up": statistics.fmean(peer.up(m) for m in messages) / count,
        "down": peer.down(answer, clients) / count,
        "down_many": peer.down(answer, MANY) / count,
        "error": error,
    }
    return clock, sizes


def measure(values: int, repeat: int, clients: int) -> dict[str, dict[str, Any]]:
    """All rows, in turn."""
    rng = np.random.default_rng(0)
    # already weighted, so that the sum is the mean
    updates = [rng.normal(0, 0.05, values) / clients for _ in range(clients)]
    columns = min(COLUMNS, max(1, values // COLUMN))
    few = [u[: columns * COLUMN] for u in updates]
    rows = peers(clients)
    clocks: dict[str, list[Clock]] = defaultdict(list)
    sizes: dict[str, dict[str, float]] = {}
    for name in track([name for _ in range(repeat) for name in rows], description="rows in turn"):
        used = few if name == "column" else updates
        clock, sizes[name] = once(rows[name], used, values / used[0].size)
        clocks[name].append(clock)
    out = {}
    for name, peer in rows.items():
        mine, base = clocks[name], clocks[BASE]
        stages = [stage for stage in STAGES if stage in mine[0].seconds]
        ratios = {
            stage: statistics.median(
                one.seconds[stage] / a.seconds[stage.removesuffix(" many")] for one, a in zip(mine, base, strict=True)
            )
            for stage in stages
        }
        ratios |= {way: sizes[name][way] / sizes[BASE][way] for way in ("up", "down", "down_many")}
        out[name] = {
            "label": peer.label,
            "seconds": {stage: statistics.median(c.seconds[stage] for c in mine) for stage in stages},
            "wall_seconds": {stage: statistics.median(c.wall[stage] for c in mine) for stage in stages},
            "bytes_per_value": {way: sizes[name][way] for way in ("up", "down", "down_many")},
            "error_of_mean": sizes[name]["error"],
            "over_a": ratios,
        } | ({"scaled_from_values": columns * COLUMN} if name == "column" else {})
    return out


def aims(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, what came out, and whether that is enough; ratios to row A."""
    return [
        {
            "name": f"{name}: {what}",
            "wanted": most,
            "found": rows[name]["over_a"][what],
            "met": rows[name]["over_a"][what] <= most,
        }
        for name in AIMED
        for what, most in AIMS.items()
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/crypto.json")
    options = parser.parse_args()
    if options.values < COLUMN or options.repeat < 1 or not 2 <= options.clients <= MANY:
        parser.error(f"want --values from {COLUMN}, --repeat from 1, --clients from 2 to {MANY}")
    about = {
        "values": options.values,
        "clients": options.clients,
        "many": MANY,
        "repeat": options.repeat,
        "seconds": "of the processor, medians; client: per client, server add: per update, server release: per round",
        "of_many": "a sum that travels as two polynomials: its bytes are computed, its seconds measured",
        "over_a": "medians of the ratios to row A within a repetition",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions(),
    }
    rows = measure(options.values, options.repeat, options.clients)
    found = aims(rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "rows": rows, "aims": found}, indent=2) + "\n")
    _print(rows, found, options.values)


def _print(rows: dict[str, dict[str, Any]], found: list[dict[str, Any]], values: int) -> None:
    table = Table(title=f"{values:,} values; in brackets over row A")
    for column in ("row", *STAGES, "up B/value", "down B/value", f"of {MANY}", "error"):
        table.add_column(column, justify="left" if column == "row" else "right", no_wrap=column == "row")
    for r in rows.values():
        times = [f"{r['seconds'][s]:.3g} ({r['over_a'][s]:.3f})" if s in r["seconds"] else "-" for s in STAGES]
        sizes = [f"{r['bytes_per_value'][w]:.2f} ({r['over_a'][w]:.3f})" for w in ("up", "down", "down_many")]
        table.add_row(r["label"], *times, *sizes, f"{r['error_of_mean']:.1e}")
    Console(width=210).print(table)
    for aim in found:
        print(
            f"{aim['name']}: {aim['found']:.3f} of row A, aim at most {aim['wanted']:g}: "
            f"{'met' if aim['met'] else 'MISSED'}"
        )


if __name__ == "__main__":
    main()
