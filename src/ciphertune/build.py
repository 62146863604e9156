"""Settings -> public parts. With `build_client` the only place where a name is looked up. Safe for the server."""

from __future__ import annotations

from ciphertune.aggregation import SeparateSum
from ciphertune.crypto.base import PublicPart
from ciphertune.crypto.clear import ClearPublic
from ciphertune.plan import MAX_RANK, HeadShape, LayerShape, Plan
from ciphertune.product import ProductSum
from ciphertune.settings import CryptoSettings, Settings, ckks_params, packed_params
from ciphertune.wire import Session


def public_part(crypto: CryptoSettings) -> PublicPart:
    """The public half of the chosen backend."""
    if crypto.backend == "clear":
        return ClearPublic(crypto.precision)
    if crypto.packed:
        from ciphertune.crypto.packed import PackedPublic

        return PackedPublic(packed_params(crypto))
    from ciphertune.crypto.ckks import CkksPublic

    return CkksPublic(ckks_params(crypto))


def make_plan(
    settings: Settings,
    layers: tuple[LayerShape, ...],
    heads: tuple[HeadShape, ...],
    tiers: tuple[int, ...],
    budgets: tuple[float, ...] = (),
    columns: tuple[tuple[int, ...], ...] = (),
) -> Plan:
    """The plan that follows from the settings, the shapes of the model, and what was negotiated: tiers of ranks and
    of budgets, and the codes of the columns to encrypt. Every party makes the same one. Raises FormatError.
    """
    method = settings.method
    cap = method.rank_cap or min(MAX_RANK, max(tiers, default=0) * (2 if method.select == "negotiated" else 1))
    return Plan(
        layers=layers,
        heads=heads,
        scale=settings.model.alpha / settings.model.rank,
        tiers=tiers,
        share=method.share,
        select=method.select,
        fit_rank=method.fit_rank,
        aggregate=method.aggregate,
        rank_cap=cap if method.aggregate == "product" else 0,
        budgets=budgets,
        prune=method.prune,
        schedule=prune_schedule(settings),
        prune_mean=method.prune_mean,
        weighting=method.weighting,
        fraction=method.fraction if method.select == "entries" else 1.0,
        columns=columns,
    )


def prune_schedule(settings: Settings) -> tuple[float, float, float, float]:
    """First rate, last rate, first round, last round of pruning; scaled: the fixed course over this run's rounds."""
    method = settings.method
    by = settings.federation.rounds / method.prune_until if method.prune_schedule == "scaled" else 1.0
    return method.prune_start, method.prune_target, method.prune_from * by, method.prune_until * by


def session(settings: Settings, plan: Plan, *, run: int, key_fingerprint: bytes) -> Session:
    """What all messages of a run have in common."""
    return Session(
        run=run,
        plan=plan,
        settings_digest=settings.digest(),
        key_fingerprint=key_fingerprint,
        public=public_part(settings.crypto),
        clear=ClearPublic(settings.crypto.precision),
        bound=settings.crypto.bound,
        max_norm=settings.federation.max_norm,
    )


def round_sum(session: Session, round_: int, total: int) -> SeparateSum | ProductSum:
    """An empty sum for a round; total: samples of all clients asked, the denominator of every weight."""
    kind = SeparateSum if session.plan.aggregate == "separate" else ProductSum
    return kind(session, round_, total)
