"""The plan: what every party of a run knows about what travels. Public, and digested into every message."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ciphertune.errors import FormatError, PlanMismatchError

Factor = str  # "a" | "b"
FACTORS: tuple[Factor, ...] = ("a", "b")

# A plan comes over the wire; these stop a hostile one from asking for the impossible.
_MAX_LAYERS, _MAX_DIMENSION, MAX_RANK, _MAX_TIERS = 10_000, 1 << 24, 4096, 1000


@dataclass(frozen=True)
class LayerShape:
    """One adapted layer: W0 has shape (m, n)."""

    name: str
    m: int
    n: int


@dataclass(frozen=True)
class HeadShape:
    """One tensor of the task head."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


def column_count(n: int, budget: float) -> int:
    """Columns of a layer of `n` that a budget pays for: the nearest number, and at least one above a budget of 0."""
    return 0 if budget == 0 else min(n, max(1, int(budget * n + 0.5)))


@dataclass(frozen=True)
class Plan:
    """Layers and heads in the order in which they are packed, and the method's choices that shape a message.

    Raises FormatError for sizes that no real plan has: it comes over the wire.
    """

    layers: tuple[LayerShape, ...]
    heads: tuple[HeadShape, ...]
    scale: float  # alpha / r, common to all clients
    tiers: tuple[int, ...]  # ascending; a message holds the components up to one of these
    share: str  # both | alternate | b_only | none
    select: str  # none | all | negotiated | dropped | entries
    fit_rank: str  # nested | pad | svd | merge
    aggregate: str = "separate"  # separate | product | stack
    rank_cap: int = 0  # product: largest rank of an aggregate, 0 for none
    budgets: tuple[float, ...] = ()  # negotiated: ascending; a client encrypts the columns of one of these
    columns: tuple[tuple[int, ...], ...] = ()  # negotiated: codes per layer; those of a budget are the first ones
    prune: str = "none"  # none | own | agreed
    schedule: tuple[float, ...] = (0.0, 0.0, 0.0, 1.0)  # pruning: first rate, last rate, first round, last round
    prune_mean: str = "all"  # own: a pruned entry counts as zero in the mean, or (kept) does not count
    fraction: float = 1.0  # select=entries: share of the entries to encrypt
    weighting: str = "samples"  # samples | norm

    def __post_init__(self) -> None:
        self._check_columns()
        sizes = [d for x in self.layers for d in (x.m, x.n)] + [d for h in self.heads for d in h.shape]
        if (
            len(self.layers) + len(self.heads) > _MAX_LAYERS
            or not all(1 <= d <= _MAX_DIMENSION for d in sizes)
            or not 1 <= len(self.tiers) <= _MAX_TIERS
            or not 1 <= self.tiers[0] <= self.tiers[-1] <= MAX_RANK
            or list(self.tiers) != sorted(set(self.tiers))
            or not (math.isfinite(self.scale) and self.scale > 0)
        ):
            raise FormatError("the plan asks for impossible sizes")

    def _check_columns(self) -> None:
        if not (0 <= self.rank_cap <= MAX_RANK and len(self.budgets) <= _MAX_TIERS):
            raise FormatError("the plan asks for impossible sizes")
        first, last, begin, end = self.schedule if len(self.schedule) == 4 else (1.0, 0.0, 0.0, 0.0)
        if not (0 <= first <= last < 1 and 0 <= begin < end < math.inf and 0 < self.fraction <= 1):
            raise FormatError("the plan's pruning schedule or share of entries is none")
        if list(self.budgets) != sorted(set(self.budgets)) or not all(0.0 <= b <= 1.0 for b in self.budgets):
            raise FormatError("the plan's budgets are not ascending shares")
        if len(self.columns) != (len(self.layers) if self.budgets else 0):
            raise FormatError(f"the plan names columns of {len(self.columns)} layers, it has {len(self.layers)}")
        for layer, codes in zip(self.layers, self.columns, strict=False):
            if len(codes) != column_count(layer.n, self.budgets[-1]) or len(set(codes)) != len(codes):
                raise FormatError(f"the plan's columns of layer {layer.name} are not as many as its largest budget")
            if not all(0 <= c < layer.n for c in codes):
                raise FormatError(f"the plan names a column that layer {layer.name} does not have")

    def rate(self, round_: int) -> float:
        """The share of entries pruned in a round (FedShield-LLM, arXiv 2506.05640), never above the last rate."""
        first, last, begin, end = self.schedule
        if self.prune == "none" or round_ < begin:
            return 0.0
        return min(last, first + (last - first) * min(1.0, max(0.0, (round_ - begin) / (end - begin))))

    def left_out(self, round_: int) -> float:
        """The share of entries that a mask which all clients share takes out of what is encrypted in a round.

        0 means that there is no mask. The mask comes from the last aggregate, so the first round has none.
        """
        if round_ == 0:
            return 0.0
        if self.select == "entries":
            return 1.0 - self.fraction
        return self.rate(round_) if self.prune == "agreed" else 0.0

    @property
    def negotiates(self) -> bool:
        """Whether the clients negotiate columns, to encrypt them or to leave them out."""
        return self.select in ("negotiated", "dropped")

    def tier(self, budget: float) -> int:
        """Index of the smallest of the plan's budgets that is no less than `budget`.

        A client never hides fewer columns than it asked for. Raises PlanMismatchError when none is as large.
        """
        if not self.budgets:
            return 0
        found = next((i for i, b in enumerate(self.budgets) if b >= budget), None)
        if found is None:
            raise PlanMismatchError(
                f"a budget of {budget:g} is above the plan's largest, {self.budgets[-1]:g}: negotiate again"
            )
        return found

    def hidden(self, tier: int) -> tuple[int, ...]:
        """Columns per layer that a client of this tier of budgets hides; of tier -1, none."""
        if not self.budgets or tier < 0:
            return (0,) * len(self.layers)
        return tuple(column_count(x.n, self.budgets[tier]) for x in self.layers)

    def accepts(self, rank: int, tier: int) -> bool:
        """Whether a contributor of this rank and tier of budgets can be."""
        known = rank in self.tiers if self.aggregate == "separate" else 1 <= rank <= MAX_RANK
        return known and 0 <= tier < max(1, len(self.budgets))

    def shared(self, rank: int) -> int:
        """How many components a client of `rank` shares: the largest tier it reaches, 0 when it reaches none.

        What it has above that does not train: too few clients have as many for an aggregate to be released, and what
        it alone learned there would be missing in what the others get. A product mixes the components of all clients,
        so every component takes part in it.
        """
        if self.aggregate != "separate":
            return rank
        return max((t for t in self.tiers if t <= rank), default=0)

    def held(self, rank: int) -> int:
        """How many components a client that shares `rank` is sent and holds."""
        return self.tiers[-1] if self.common else rank

    @property
    def common(self) -> bool:
        """As `MethodSettings.common`."""
        return self.fit_rank == "nested" and self.share != "none"

    def factors(self, round_: int) -> tuple[Factor, ...]:
        """The factors that are trained and travel in a round (from 0).

        alternate: B in even rounds, A in odd ones (RoLoRA, arXiv 2502.01755, algorithm 1); b_only: always B (FFA-LoRA,
        arXiv 2403.12313, section 4); both: A and B; none: each client keeps what it learned.
        """
        if self.share in ("both", "none"):
            return FACTORS if self.share == "both" else ()
        return ("b",) if self.share == "b_only" or round_ % 2 == 0 else ("a",)

    def digest(self) -> bytes:
        """16 bytes over the whole plan."""
        return self._digest

    @cached_property
    def _digest(self) -> bytes:
        return hashlib.sha256(self.to_json().encode()).digest()[:16]

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan in `text`. Raises FormatError when it is not a sane one."""
        try:
            raw: dict[str, Any] = json.loads(text)
            plan = Plan(
                layers=tuple(LayerShape(str(x["name"]), int(x["m"]), int(x["n"])) for x in raw.pop("layers")),
                heads=tuple(HeadShape(str(x["name"]), tuple(map(int, x["shape"]))) for x in raw.pop("heads")),
                scale=float(raw.pop("scale")),
                tiers=tuple(map(int, raw.pop("tiers"))),
                **{
                    k: str(raw[k])
                    for k in ("share", "select", "fit_rank", "aggregate", "prune", "prune_mean", "weighting")
                },
                schedule=tuple(map(float, raw["schedule"])),
                fraction=float(raw["fraction"]),
                rank_cap=int(raw["rank_cap"]),
                budgets=tuple(map(float, raw["budgets"])),
                columns=tuple(tuple(map(int, codes)) for codes in raw["columns"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise FormatError("the plan is not readable") from error
        return plan
