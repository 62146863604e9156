"""Differential privacy of a client's updates: clip, add Gaussian noise, account for what was released.

Each client protects its whole update by itself, before it leaves (Gaussian mechanism, Dwork and Roth 2014, appendix A;
client-level clipping after McMahan et al., arXiv 1710.06963). The guarantee is per client: replacing all of its data by
nothing changes its update by at most the clipping norm; its scores, sample counts and times are not covered. Epsilon
comes from dp-accounting's Renyi accountant (arXiv 1702.07476). Noise is added in floating point, whose known leak
(Mironov 2012) is not closed.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
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
    shared: int,
    *,
    clip: float,
    noise_multiplier: float,
    generator: np.random.Generator,
) -> Adapter:
    """`base` plus what the update changed in the heads and the first `shared` components of the factors that travel,
    clipped and noised; the rest as the base has it.

    clip: largest L2 norm of the whole change.  noise: per entry, of standard deviation ``noise_multiplier * clip``.
    """
    places = [(name, f) for name in update.layers for f in factors]
    changes = [_shared(update, *at, shared) - _shared(base, *at, shared) for at in places]
    changes += [update.heads[h] - base.heads[h] for h in base.heads]
    norm = float(np.sqrt(sum(float(np.square(c, dtype=np.float64).sum()) for c in changes)))
    shrink = min(1.0, clip / norm) if norm else 1.0
    noisy = [c * shrink + generator.normal(0.0, noise_multiplier * clip, c.shape) for c in changes]
    layers = {n: LoraFactors(f.a.copy(), f.b.copy(), f.scale) for n, f in base.layers.items()}
    for (name, f), change in zip(places, noisy, strict=False):
        _shared(Adapter(layers, {}), name, f, shared)[...] = _shared(base, name, f, shared) + change
    heads = zip(base.heads.items(), noisy[len(places) :], strict=True)
    return Adapter(layers, {h: (v + change).astype(v.dtype) for (h, v), change in heads})


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
    accounting, rdp = _library()  # missing, it is found before anything is started
    if not method.epsilon:
        return method.noise_multiplier

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

    The server reads every update that is sent to it, with the client's own noise alone. Another client sees means:
    there the noise of all contributors but itself adds up, and the client's part is scaled by its weight.
    """

    multiplier: float
    delta: float

    def __post_init__(self) -> None:
        self._server: dict[str, Counter[int]] = defaultdict(
            Counter
        )  # client -> round -> times that it may have sent it
        self._client: dict[str, list[float]] = {}

    def asked(self, name: str, round_: int) -> None:
        """A client was asked for an update, which it may have sent whether or not it was seen to arrive. Asked for a
        round again, it sends the same one again, which gives away nothing more.
        """
        self._server[name][round_] += 1

    def declined(self, name: str, round_: int) -> None:
        """The client answered, once, that it sends none."""
        self._server[name][round_] -= 1

    def state(self) -> dict[str, Any]:
        """What other clients were given so far, as plain values; whom the server asked stands in rounds.jsonl."""
        return {"client": self._client}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._client = {name: list(map(float, zs)) for name, zs in state["client"].items()}

    def released(self, people: Mapping[str, tuple[float, int]]) -> None:
        """An aggregate of these contributors went out. people: weight and shared components of each.

        A component is the sum of those that have it alone, so the one with the least noise counts.
        """
        for name, (weight, rank) in people.items():
            least = math.inf
            for component in {r for _, r in people.values() if r <= rank}:
                squares = {n: w**2 for n, (w, r) in people.items() if r >= component}
                # the worst observer knows the largest noise: its own
                own = max((s for n, s in squares.items() if n != name), default=0.0)
                least = min(least, math.sqrt(max(weight**2, sum(squares.values()) - own)))
            self._client.setdefault(name, []).append(self.multiplier * least / weight)

    def report(self) -> dict[str, dict[str, float]]:
        """Epsilon per client and view."""
        sent = {name: sum(times > 0 for times in rounds.values()) for name, rounds in self._server.items()}
        return {
            name: {
                "server": epsilon([self.multiplier] * count, self.delta),
                "client": epsilon(self._client.get(name, []), self.delta),
            }
            for name, count in sent.items()
            if count
        }


def _shared(adapter: Adapter, name: str, factor: Factor, shared: int) -> npt.NDArray[np.floating]:
    """A view of the first components of a factor."""
    found = adapter.layers[name]
    return found.a[:shared] if factor == "a" else found.b[:, :shared]


def _library() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError:
        raise SettingsError("method.noise=gaussian needs an accountant: pip install 'ciphertune[dp]'") from None
    return dp_accounting, rdp
