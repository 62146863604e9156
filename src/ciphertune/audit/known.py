"""What the server can compute from what it saw: how far the first layers' factors moved in a round.

An update holds the factors after training, so the attacker subtracts those before it. It knows them as far as they
follow from public values: the initial adapter from the run's seed, and later ones from the means that the server made,
where those are in the clear. Where part of a mean is encrypted (`she_lora`) the start of a round is unknown, but its
visible rows lie in the row space of the visible part of the mean, which is projected out instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from ciphertune import columns, exchange, wire
from ciphertune.adapter import Adapter
from ciphertune.aggregation import cut
from ciphertune.audit.view import Seen, View
from ciphertune.columns import Codes
from ciphertune.crypto.clear import ClearPublic, parse
from ciphertune.crypto.clear_secret import ClearSecret
from ciphertune.errors import DataError, WireError

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moved:
    """One layer of one update, as the attacker works on it.

    a: (r, c) change of the visible columns of A, times `projection` where there is one.  columns: (c,) their numbers.
    projection: (c, c).  b: (m, r) change of B.  start: (r, n) A before the round.  None where it cannot be computed.
    """

    a: Matrix | None
    columns: Codes
    projection: Matrix | None
    b: Matrix | None
    start: Matrix | None


def moved(view: View, one: Seen, initial: Adapter, layers: Sequence[str]) -> dict[str, Moved]:
    """What the attacker knows of the given layers of an update. initial: of at least the update's rank.

    Raises DataError where an aggregate that the server had is gone or damaged.
    """
    before = start_of(view, one, initial)
    found = {}
    for name in layers:
        layer = one.layers.get(name)
        if layer is None:
            continue
        n = initial.layers[name].a.shape[1]
        where, shown = np.arange(n), np.arange(n)
        if layer.codes is not None:
            where = column_numbers(view, name, initial)[layer.codes]
            shown = np.flatnonzero(where >= 0)
        start = None if before is None else before.layers[name]
        a, projection = None, None
        if layer.a is not None:
            a = layer.a[:, shown].astype(np.float64)
            if start is not None:
                a = _change(a, start.a[: a.shape[0], where[shown]])
            else:
                assert layer.codes is not None
                a, shown, projection = _outside_the_mean(
                    view, one, name, layer.a.astype(np.float64), layer.codes, shown
                )
        b = None
        if layer.b is not None and start is not None:
            scale = start.scale if one.plan.aggregate != "separate" else 1.0
            b = layer.b.astype(np.float64) / scale - start.b[:, : layer.b.shape[1]]
        rank = one.message.rank
        found[name] = Moved(
            a, where[shown], projection, b, None if start is None else start.a[:rank].astype(np.float64)
        )
    return found


def start_of(view: View, one: Seen, initial: Adapter) -> Adapter | None:
    """The adapter that the client began the round with, None where the server cannot know it.

    Raises DataError where the server did know it and its aggregate is gone: a wrong start would hide what can be read.
    """
    own = initial.first(one.message.rank)
    if one.round == 0 or one.plan.fit_rank == "merge" or one.plan.share == "none":
        return own
    if one.link.public.encrypts:
        return None
    secret = ClearSecret(ClearPublic(view.settings.crypto.precision), view.settings.crypto.bound)
    for round_ in range(one.round):
        message, link = _aggregate(view, round_, one)
        message = cut(message, link, own.rank)
        data = wire.encode(message, link)
        own = exchange.unseal(data, link, secret, round_=message.round, rank=message.rank, base=own)[0]
    return own


def column_numbers(view: View, layer: str, initial: Adapter) -> Codes:
    """Which column each code of a layer stands for, (n,), -1 for codes that nobody showed.

    The codes are keyed, but the columns of the first round are still close to the initial adapter's, which is public:
    the assignment of least squared distance, over all clients' first updates.
    """
    a = initial.layers[layer].a.astype(np.float64)
    cost, counts = np.zeros((a.shape[1],) * 2), np.zeros(a.shape[1])
    for one in view.seen:
        found = one.layers.get(layer)
        if one.round or found is None or found.a is None or found.codes is None:
            continue
        rows = a[: found.a.shape[0]]
        near = (found.a**2).sum(0)[:, None] + (rows**2).sum(0)[None] - 2 * found.a.T @ rows
        cost[found.codes] += near / found.a.shape[0]
        counts[found.codes] += 1
    shown = np.flatnonzero(counts)
    out = np.full(a.shape[1], -1)
    if shown.size:
        codes, numbers = linear_sum_assignment(cost[shown] / counts[shown, None])
        out[shown[codes]] = numbers
    return out


def _outside_the_mean(
    view: View, one: Seen, name: str, a: Matrix, codes: Codes, shown: npt.NDArray[np.intp]
) -> tuple[Matrix | None, npt.NDArray[np.intp], Matrix | None]:
    """The visible columns outside the row space of the visible part of the last mean: there the start is zero."""
    if one.plan.aggregate != "product":
        return None, shown, None
    message, link = _aggregate(view, one.round - 1, one)
    plan, at = link.plan, [x.name for x in link.plan.layers].index(name)
    tier = columns.aggregate_tier(plan, message.contributors)
    clear = parse(message.clear, link.clear.dtype)
    m = columns.read_clear(clear, plan, columns.basis_ranks(plan, message.contributors), tier)[at].right
    both = np.isin(codes, columns.clear_codes(plan, tier)[at])
    shown = np.array([i for i in shown if both[i]], np.intp)
    mean = np.zeros((m.shape[0], plan.layers[at].n))
    mean[:, columns.clear_codes(plan, tier)[at]] = m
    rows = mean[:, codes[shown]]
    _, s, vt = np.linalg.svd(rows, full_matrices=False)
    basis = vt[s > 1e-6 * s[0]] if s.size and s[0] > 0 else vt[:0]
    projection = np.eye(shown.size) - basis.T @ basis
    return a[:, shown] @ projection, shown, projection


def _aggregate(view: View, round_: int, one: Seen) -> tuple[wire.Message, wire.Session]:
    """The server's own aggregate of a round and the session it was made in. Raises DataError."""
    path = view.folder / "server" / f"round_{round_:04d}.msg"
    if not path.is_file():
        raise DataError(f"{path} is missing: without it nobody knows from where round {one.round + 1} began")
    try:
        head = wire.heading(data := path.read_bytes())
        link = next((s.link for s in view.seen if s.plan.digest() == head.plan), one.link)
        return wire.decode(data, link, wire.Expected(wire.AGGREGATE, round_, 0, head.rank)), link
    except (OSError, WireError) as error:
        raise DataError(f"{path} cannot be used ({error}): put it back from a copy") from None


def _change(after: Matrix, before: npt.NDArray[np.floating]) -> Matrix:
    """After minus before; nothing where that is no more than the wire's rounding."""
    found = after - before
    return found if found.size and np.abs(found).max() > 1e-6 * np.abs(before).max() else np.zeros_like(found)
