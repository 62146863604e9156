"""Column-aware aggregation: the sum of products of clear and encrypted factors, in a basis that all clients share.

SHE-LoRA (arXiv 2505.21051) sums ``dW* = sum_i w_i s_i B_i A_i`` where some columns of A_i are encrypted. Done naively
that is m ciphertexts per column. Here the thin QR decomposition of the stacked, clear factors B,

    [s_1 B_1 .. s_C B_C] = Q [C_1 .. C_C],     Q (m, R),     hence dW* = Q M,     M = sum_i C_i (w_i A_i)   (R, n),

leaves R rows: M is computed in the clear where all clients are clear, and by plaintext products where one is not.
Needs one multiplication by plaintexts, no rotation and no key. A column that one client hides and another does not
reaches the encrypted sum from both: the second one's part is added to the ciphertext.

`stack` (FLoRA, arXiv 2409.05976) is the same sum with the factors side by side: Q = [s_i B_i], M = [w_i A_i].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ciphertune import wire
from ciphertune.aggregation import check_norm, check_precise, check_weighted, opened, readable, too_few
from ciphertune.columns import Codes, Factors, aggregate_tier, basis_ranks, clear_codes, read_clear, slots
from ciphertune.crypto.base import blocks_for
from ciphertune.errors import FormatError, RoundMismatchError
from ciphertune.ranks import Contributor
from ciphertune.split import Vector, head_size


@dataclass(frozen=True)
class _Update:
    who: Contributor
    layers: list[Factors]
    rows: list[bytes]  # one vector of blocks per component


class ProductSum:
    """The updates of one round, and their product sum. Holds all of them: the basis needs every B.

    session: the run.  round_: from 0.  total: samples of all clients asked, the denominator of every weight.
    truncation: after `release`, per layer, what the rank cap cost: the norm of what was cut from the clear part of M
    over the norm of that part (`shared_basis`). What it cost in the encrypted part the server cannot know.
    """

    def __init__(self, session: wire.Session, round_: int, total: int) -> None:
        self._session, self._round, self._total = session, round_, total
        self._updates: dict[int, _Update] = {}
        self._heads = session.public.aggregator()
        self.truncation: dict[str, float] = {}

    @property
    def extra(self) -> dict[str, dict[str, float]]:
        """What to write down about the round."""
        return {"truncation": self.truncation} if self.truncation else {}

    def add(self, data: bytes, *, sender: int, who: Contributor) -> wire.Message:
        """Check one update and keep it. Raises WireError, leaving the rest as it was; a sender has one update."""
        if sender in self._updates:
            raise RoundMismatchError(f"client {sender} has already contributed to round {self._round}")
        plan, public = self._session.plan, self._session.public
        message, clear = opened(data, self._session, self._round, sender, who, self._total)
        wire.check_contributors((*(u.who for u in self._updates.values()), who), self._total, plan)
        layers = read_clear(clear, plan, (who.rank,) * len(plan.layers), who.tier)
        check_weighted(np.concatenate([np.ravel(x.right) for x in layers] or [clear]), self._session.bound, message)
        weight = message.contributors[0].samples / message.total
        parts = [y for x in layers for y in (x.left, x.right / weight)]
        check_norm([*parts, readable(message, self._session) / weight], self._session)
        largest = self._session.bound * max((reach(x.left) for x in layers), default=0.0)
        if largest > public.largest:
            raise FormatError(f"a factor B is so large that the product could reach {largest:.3g} and wrap around")
        public.check(message.secret)
        head_bytes = blocks_for(public, head_size(plan)) * public.block_bytes
        row_bytes = blocks_for(public, sum(plan.hidden(who.tier))) * public.block_bytes
        each = 0 if plan.select == "dropped" else who.rank
        rows = [message.secret[head_bytes + k * row_bytes :][:row_bytes] for k in range(each)]
        self._heads.add(message.secret[:head_bytes])
        self._updates[sender] = _Update(who, layers, rows)
        return message

    @property
    def contributors(self) -> int:
        """Updates held."""
        return len(self._updates)

    def release(self, minimum: int) -> wire.Message:
        """The aggregate. Raises TooFewError when fewer than `minimum` contributed, for one update's sum is itself, or
        with so little of the weight that no client could take it.
        """
        if self.contributors < max(1, minimum):
            raise too_few(self._round, self.contributors, minimum)
        updates = [self._updates[s] for s in sorted(self._updates)]
        plan, public = self._session.plan, self._session.public
        people = tuple(u.who for u in updates)
        check_precise(self._session, self._round, people, self._total)
        tier = aggregate_tier(plan, people)
        where, by_tier = slots(plan, tier), {t: clear_codes(plan, t) for t in {tier, *(c.tier for c in people)}}
        basis = basis_ranks(plan, people)
        coefficients = np.zeros((max(basis, default=0), sum(c.rank for c in people), len(plan.layers)))
        added = np.zeros((coefficients.shape[0], where.code.size))
        clear: list[Vector] = []
        for i, layer in enumerate(plan.layers):
            here = where.layer == i
            right = [by_code(u.layers[i].right, by_tier[u.who.tier][i], layer.n) for u in updates]
            left, in_clear = [u.layers[i].left for u in updates], [a[:, by_tier[tier][i]] for a in right]
            weights = [u.who.samples / self._total for u in updates]
            if plan.aggregate == "stack":
                q, c, m = np.concatenate(left, axis=1), np.eye(basis[i]), np.concatenate(in_clear)
            else:
                q, c, m, self.truncation[layer.name] = shared_basis(left, in_clear, basis[i], weights)
            if where.code.size and public.encrypts:  # elsewhere M is clear, and a run can be repeated bit by bit
                q, c, m = turned(q, c, m)
            coefficients[: basis[i], :, i] = c
            # a client that leaves a hidden column clear has zeros in its ciphertext's place, and its part here
            added[: basis[i], here] = c @ np.concatenate([a[:, where.code[here]] for a in right])
            clear += [np.ravel(q), np.ravel(m)]
        rows = public.combine([r for u in updates for r in u.rows], coefficients, where.layer, added)
        return wire.Message(
            kind=wire.AGGREGATE,
            factors=plan.factors(self._round),
            round=self._round,
            sender=0,
            rank=max(c.rank for c in people),
            total=self._total,
            contributors=people,
            clear=np.concatenate([np.zeros(0), *clear]).astype(self._session.clear.dtype).tobytes(),
            secret=self._heads.result(self._heads.blocks()) + b"".join(rows),
        )


def by_code(clear: Vector, codes: Codes, n: int) -> Vector:
    """Clear columns (r, count) at the places of their codes, (r, n), with zeros where a column is encrypted."""
    out = np.zeros((clear.shape[0], n))
    out[:, codes] = clear
    return out


def shared_basis(
    left: Sequence[Vector], right: Sequence[Vector], rank: int, weights: Sequence[float]
) -> tuple[Vector, Vector, Vector, float]:
    """Q (m, rank), C (rank, sum r_i), M (rank, n) and M's relative error, for ``sum_i left_i right_i = Q M``.

    left: (m, r_i) each.  right: (r_i, n) each, the part in the clear.  weights: of the clients. The basis is turned to
    the directions that matter most to the clear part, and after them to those of the weighted left factors; when `rank`
    is less than all that Q needs, the last ones are cut. The error is that of the clear part of M, or where nothing is
    clear that of the weighted left factors.
    """
    q, c = np.linalg.qr(np.concatenate(left, axis=1))
    m = c @ np.concatenate(right)
    weighted = c * np.concatenate([np.full(b.shape[1], w) for b, w in zip(left, weights, strict=True)])
    seen = m if m.any() else weighted
    tiny = 1e-6 * (float(np.linalg.norm(m)) or 1.0) / (float(np.linalg.norm(weighted)) or 1.0)
    gram = m @ m.T + tiny**2 * (weighted @ weighted.T)
    u = np.linalg.eigh(gram)[1][:, ::-1][:, :rank]  # left singular vectors of both together
    norm = float(np.linalg.norm(seen))
    lost = float(np.linalg.norm(seen - u @ (u.T @ seen))) / norm if norm and q.shape[1] > rank else 0.0
    return q @ u, u.T @ c, u.T @ m, lost


def turned(q: Vector, c: Vector, m: Vector) -> tuple[Vector, Vector, Vector]:
    """The same product in a basis drawn at random (Haar measure), from the operating system's randomness.

    All clients get Q and M whole. In a basis that follows from the factors, rows of M could be one client's A: of a
    bare QR decomposition the last ones are. In a random one Q and M say no more than their product and Q's span.
    """
    rotation, r = np.linalg.qr(np.random.default_rng().normal(size=(q.shape[1], q.shape[1])))
    rotation *= np.sign(np.diag(r))
    return q @ rotation, rotation.T @ c, rotation.T @ m


def reach(left: npt.NDArray[np.floating]) -> float:
    """A bound on how much ``C = Q^T left`` can enlarge an entry: on the largest sum of a row's absolute values.

    left: (m, r), a client's B times its scale; Q has orthonormal columns. A row of C has no larger norm than `left` has
    as an operator, and sqrt(r) times that bounds the sum. 0 for an empty `left`.
    """
    gram = left.T.astype(np.float64) @ left.astype(np.float64)
    return float(np.sqrt(left.shape[1] * max(0.0, np.linalg.eigvalsh(gram)[-1]))) if left.size else 0.0
