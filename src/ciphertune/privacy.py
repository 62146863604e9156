"""Differential privacy of a client's updates: clip, add Gaussian noise, account for what was released.

Each client protects its whole update by itself, before it leaves (Gaussian mechanism, Dwork and Roth 2014, appendix A;
client-level clipping after McMahan et al., arXiv 1710.06963). The guarantee is per client: replacing all of its data by
nothing changes what it sends by at most the clipping norm. Epsilon comes from dp-accounting's Renyi accountant
(arXiv 1702.07476). Noise is added in floating point, whose known leak (Mironov 2012) is not closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.errors import SettingsError
from ciphertune.plan import Factor
from ciphertune.settings import MethodSettings

_LARGEST_MULTIPLIER = 1e4


def protect(
    update: Adapter,
    base: Adapter,
    factors: tuple[Factor, ...],
    *,
    clip: float,
    noise_multiplier: float,
    generator: np.random.Generator,
) -> Adapter:
    """`base` plus what the update changed in the factors that travel and the heads, clipped and noised.

    clip: largest L2 norm of the whole change.  noise: per entry, of standard deviation ``noise_multiplier * clip``.
    """
    names = [(name, f) for name in update.layers for f in factors]
    changes = [_of(update, *at) - _of(base, *at) for at in names] + [
        update.heads[h] - base.heads[h] for h in base.heads
    ]
    norm = float(np.sqrt(sum(float(np.square(c, dtype=np.float64).sum()) for c in changes)))
    shrink = min(1.0, clip / norm) if norm else 1.0
    noisy = [c * shrink + generator.normal(0.0, noise_multiplier * clip, c.shape) for c in changes]
    found = dict(zip([*names, *base.heads], noisy, strict=True))
    layers = {}
    for name, old in base.layers.items():
        new = {f: getattr(old, f) for f in ("a", "b")}
        for f in factors:
            new[f] = (new[f] + found[name, f]).astype(new[f].dtype)
        layers[name] = LoraFactors(new["a"], new["b"], old.scale)
    return Adapter(layers, {h: (v + found[h]).astype(v.dtype) for h, v in base.heads.items()})


def epsilon(multipliers: Sequence[float], delta: float) -> float:
    """Epsilon of releases that each had noise of so many times the sensitivity. 0 for none. Raises SettingsError."""
    if not multipliers:
        return 0.0
    accounting, rdp = _library()
    accountant = rdp.RdpAccountant()
    for z in multipliers:
        accountant.compose(accounting.GaussianDpEvent(z))
    return float(accountant.get_epsilon(delta))


def noise_multiplier(method: MethodSettings, rounds: int) -> float:
    """The noise multiplier of a run: as set, or what keeps every client within `method.epsilon` over all rounds.

    Raises SettingsError when the target cannot be reached with noise of up to 10,000 times the clipping norm.
    """
    if not method.epsilon:
        return method.noise_multiplier
    accounting, rdp = _library()

    def releases(z: float) -> Any:
        return accounting.SelfComposedDpEvent(accounting.GaussianDpEvent(z), rounds)

    if epsilon([_LARGEST_MULTIPLIER] * rounds, method.delta) > method.epsilon:
        raise SettingsError(
            f"method.epsilon={method.epsilon:g} cannot be reached in {rounds} rounds at method.delta={method.delta:g}: "
            "raise one of them, or lower federation.rounds"
        )
    return float(accounting.calibrate_dp_mechanism(rdp.RdpAccountant, releases, method.epsilon, method.delta))


@dataclass
class Spent:
    """What each client's updates have given away so far, to the server and to another client.

    The server reads every update, with the client's own noise alone. Another client sees the mean: there the noise of
    all contributors but itself adds up, and the client's part is scaled by its weight.
    """

    multiplier: float
    delta: float

    def __post_init__(self) -> None:
        self._server: dict[str, list[float]] = {}
        self._client: dict[str, list[float]] = {}

    def round(self, weights: dict[str, float]) -> dict[str, dict[str, float]]:
        """Count one round with these contributors and weights; returns epsilon per client and view."""
        squares = {name: w**2 for name, w in weights.items()}
        for name, weight in weights.items():
            self._server.setdefault(name, []).append(self.multiplier)
            others = max(s for n, s in squares.items() if n != name) if len(weights) > 1 else 0.0
            noise = np.sqrt(sum(squares.values()) - others)  # the worst observer knows the largest noise: its own
            self._client.setdefault(name, []).append(self.multiplier * float(noise) / weight)
        return {
            name: {"server": epsilon(zs, self.delta), "client": epsilon(self._client[name], self.delta)}
            for name, zs in self._server.items()
        }


def _of(adapter: Adapter, name: str, factor: Factor) -> npt.NDArray[np.floating]:
    found: npt.NDArray[np.floating] = getattr(adapter.layers[name], factor)
    return found


def _library() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError:
        raise SettingsError("method.noise=gaussian needs an accountant: pip install 'ciphertune[dp]'") from None
    return dp_accounting, rdp
