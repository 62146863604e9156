"""The span attack of DAGER (Petrov et al., arXiv 2405.15586): the rows of A's gradient are combinations of inputs.

published: a token is in the batch when its row lies within a fixed distance of the span of the whole gradient; columns
that cannot be read count as zero, which is why hiding some seems to help.
adapted: only the columns that can be read, in the gradient and in the dictionary; the layers that read the same input
together; sparse recovery instead of a threshold, so tokens may outnumber the combinations; noise for what AdamW does.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ciphertune.audit.attack import NOTHING, Attempt, Target
from ciphertune.audit.known import Matrix, Moved
from ciphertune.audit.pursuit import Block, Floats
from ciphertune.audit.recovery import look_up, passing

THRESHOLD = 1e-3  # relative distance to the span


def attack(target: Target) -> Iterator[Attempt]:
    """Both forms."""
    seen = [m for m in target.layers.values() if m.a is not None and m.a.size]
    if not seen:
        yield from (Attempt("span", form, NOTHING, "no column of A can be read") for form in ("published", "adapted"))
        return
    moves = any(np.abs(m.a).max() > 0 for m in seen if m.a is not None)
    note = "" if moves else "A did not move: where B is zero, A's gradient is"
    if not moves:
        yield from (Attempt("span", form, NOTHING, note) for form in ("published", "adapted"))
        return
    words = target.words()
    whole = np.concatenate([_in_place(m, words.width) for m in seen])
    yield Attempt("span", "published", passing(whole, words, THRESHOLD), note)
    found = look_up(blocks(seen), words, noise=target.noise)
    yield Attempt("span", "adapted", found, note)


def blocks(seen: list[Moved]) -> list[Block]:
    """One block of combinations per set of readable columns: layers that show the same ones are put together."""
    groups: dict[bytes, list[Moved]] = {}
    for layer in seen:
        key = layer.columns.tobytes() if layer.projection is None else f"{id(layer)}".encode()
        groups.setdefault(key, []).append(layer)
    return [_block(group) for group in groups.values()]


def _block(group: list[Moved]) -> Block:
    which, projection = group[0].columns, group[0].projection
    name = b"a " + which.tobytes() if projection is None else b""

    def shown(rows: Floats) -> Floats:
        found = rows[:, which]
        return found if projection is None else found @ projection.astype(found.dtype)

    return Block(np.concatenate([m.a for m in group if m.a is not None]), shown, name)


def _in_place(layer: Moved, width: int) -> Matrix:
    """The change of A with zeros in the columns that cannot be read, (r, n)."""
    assert layer.a is not None
    out = np.zeros((len(layer.a), width))
    out[:, layer.columns] = layer.a
    return out
