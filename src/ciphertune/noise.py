"""How much noise of the encryption is in a mean, and the rounding that keeps it out of an adapter that is released.

What is decrypted is the sum and the noise of its ciphertexts, and noise at full precision gives the key away
(SECURITY.md, "CKKS and published decryptions"). A factor may have come rounds before the last aggregate, so its noise
is kept with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ciphertune import wire
from ciphertune.adapter import Adapter, FloatArray, LoraFactors, in_bfloat16
from ciphertune.pruning import counts_kept
from ciphertune.ranks import divisors

_DEVIATIONS = 9.0  # a backend's error bound is so many standard deviations

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """Standard deviations, or a little more, of the encryption's noise in the values of an adapter.

    a, b: in each row of A and column of B, (r,); where updates are summed as products, in the entries of the M that
    they were made from.  heads: in every head.
    """

    a: Vector
    b: Vector
    heads: float = 0.0

    @staticmethod
    def none(rank: int) -> Noise:
        """Of an adapter that nothing was decrypted into."""
        return Noise(np.zeros(rank), np.zeros(rank))

    def to_json(self) -> str:
        """As text, for the state file."""
        return json.dumps([self.a.tolist(), self.b.tolist(), self.heads])

    @staticmethod
    def from_json(text: str, rank: int) -> Noise:
        """The inverse of `to_json`. Raises ValueError for that of another rank."""
        try:
            a, b, heads = json.loads(text)
            found = Noise(np.array(a, np.float64), np.array(b, np.float64), float(heads))
        except (TypeError, RecursionError) as error:
            raise ValueError("no noise of an adapter") from error
        if not found.a.shape == found.b.shape == (rank,):
            raise ValueError("the noise of an adapter of another rank")
        return found


def after(old: Noise, message: wire.Message, session: wire.Session, adapter: Adapter) -> Noise:
    """The noise once an aggregate has been taken into an adapter. What it did not replace keeps the old one's.

    adapter: what it made.
    """
    public, plan, people = session.public, session.plan, message.contributors
    if not public.adds_noise:
        return old
    everyone = sum(c.samples for c in people) / message.total
    spread = public.error_bound(len(people), 0.0) / _DEVIATIONS
    heads = spread / everyone if plan.heads else 0.0
    if plan.aggregate != "separate":
        # the factors that were summed had been fitted as these are: a row of A no longer than `root`, a column of
        # scale * B neither, and those of all clients side by side make up the coefficients
        root = max((float(_rows(f).max()) for f in adapter.layers.values()), default=0.0)
        terms = max(1.0, np.sqrt(len(people)) * root), max(1.0, root)
        new = public.product_error_bound(*terms, 0.0) / _DEVIATIONS / everyone
        # a component whose singular value was only rounding keeps its row of A, with B = 0 (`reparameterise`)
        replaced = np.all([f.b.any(axis=0) for f in adapter.layers.values()], axis=0)
        return Noise(np.where(replaced, new, np.maximum(old.a, new)), np.full(old.b.shape, new), heads)
    shares = divisors(plan, people, message.total, message.rank)
    if counts_kept(plan, message.round):  # an entry may have come from one client alone, and be divided by a noisy sum
        shares = np.full(message.rank, min(c.samples for c in people) / message.total)
        spread *= float(np.hypot(1.0, _largest(adapter)))
    new_a, new_b = old.a.copy(), old.b.copy()
    for factor, into in (("a", new_a), ("b", new_b)):
        if factor in message.factors:
            into[: message.rank] = spread / shares
    return Noise(new_a, new_b, heads)


def released(adapter: Adapter, noise: Noise, *, product: bool) -> Adapter:
    """The adapter as it may leave its client: to multiples of at least 256 deviations of the noise, then to bfloat16.

    bfloat16 alone keeps 8 bits of however small a value. product: the factors were fitted to an M with the singular
    values S, as A = S^(1/2) V^T, so that a component carries the noise of M over the root of its singular value.
    """
    layers = {}
    for name, f in adapter.layers.items():
        a, b = noise.a, noise.b
        if product:
            root = _rows(f)
            a, b = (np.divide(x, root, out=np.zeros_like(x), where=root > 0) for x in (a, b / f.scale))
        layers[name] = LoraFactors(_coarse(f.a, a[:, None]), _coarse(f.b, b), f.scale)
    return in_bfloat16(Adapter(layers, {n: _coarse(h, np.array(noise.heads)) for n, h in adapter.heads.items()}))


def _rows(factors: LoraFactors) -> Vector:
    """The norm of each row of A: of fitted factors, the root of the singular value."""
    return np.asarray(np.linalg.norm(factors.a.astype(np.float64), axis=1))


def _coarse(values: FloatArray, noise: Vector) -> Vector:
    """The nearest multiples of powers of two that are at least 256 times the noise, which broadcasts to the values."""
    step = 2.0 ** np.ceil(np.log2(256 * np.where(noise > 0, noise, 1.0)))
    return np.where(noise > 0, np.rint(values.astype(np.float64) / step) * step, values)


def _largest(adapter: Adapter) -> float:
    """The largest absolute value in an adapter."""
    tensors = [*adapter.heads.values(), *(x for f in adapter.layers.values() for x in (f.a, f.b))]
    return max((float(np.abs(x).max()) for x in tensors if x.size), default=0.0)
