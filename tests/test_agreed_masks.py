"""One mask for all: it follows from the last mean, at every client alike; no server reads it, forged it is refused."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from ciphertune import exchange, pruning, wire
from ciphertune.adapter import Adapter
from ciphertune.aggregation import SeparateSum
from ciphertune.errors import FederationError, FormatError, PlanMismatchError, RangeError, WireError
from ciphertune.plan import LayerShape
from ciphertune.split import pack
from tests.messages import mutated
from tests.oracle import SMALL_LAYERS, largest, mean_factor, rows_of, truncated
from tests.separate_cases import IN_FLOAT64, LAYERS, RANKS, SAMPLES, Round, constant, gap

AGREED = ("method=fedshield", "method.prune=agreed")
BACKENDS = pytest.mark.parametrize("crypto", [IN_FLOAT64, ()], ids=["float64", "ckks"])
EVERY_RATE = pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
# (words, fit of ranks, factors that travel in rounds 1 and 2)
METHODS = {
    "fedshield": (AGREED, "nested", (("a", "b"), ("a", "b"))),
    "fedshield padded": ((*AGREED, "method.fit_rank=pad"), "pad", (("a", "b"), ("a", "b"))),
    "sealed": (("method=sealed", "method.prune=agreed"), "nested", (("a",), ("b",))),
}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


@cache
def half(round_: int = 1, *words: str) -> Round:
    """Half of the entries are pruned, in float64."""
    return Round([*AGREED, *constant(0.5), *IN_FLOAT64, *words], round_)


def cut_in_tiers(mask: bytes, plan_sizes: Sequence[int]) -> list[bytes]:
    """A mask as it travels: 16 bytes and a bit per entry for each tier."""
    out = []
    for entries in plan_sizes:
        size = 16 + math.ceil(entries / 8)
        out.append(mask[:size])
        mask = mask[size:]
    assert mask == b""
    return out


TIERS = (2 * 1050, 2 * 1050, 4 * 1050)  # entries: a component of A has 600, of B 450


# ----------------------------------------------------------------------------------------------------------- the mean


@BACKENDS
@EVERY_RATE
@EVERY_METHOD
def test_the_mean_is_the_oracles_where_the_mask_of_the_last_mean_keeps_and_zero_elsewhere(
    method: str, rate: float, crypto: tuple[str, ...]
) -> None:
    """Clients of every rank: each derives from its own part of the last mean the same mask as the others."""
    words, fit_rank, travels = METHODS[method]
    for round_ in (1, 2):
        run = Round([*words, *constant(rate), *crypto], round_, absent=74)
        worst = 0.0
        for got, sent in zip(run.received, run.clients, strict=True):
            for layer in LAYERS:
                for factor in ("a", "b"):
                    found = rows_of(got, layer.name, factor)
                    if factor not in travels[round_ - 1]:
                        assert np.array_equal(found, rows_of(sent, layer.name, factor))
                        continue
                    keep = largest(rows_of(run.held, layer.name, factor), run.plan.tiers, rate)[: got.rank]
                    mean = mean_factor(run.clients, SAMPLES, layer.name, factor, fit_rank)[: got.rank]
                    assert (found[~keep] == 0).all() and (found[keep] != 0).all()
                    worst = max(worst, gap(found[keep], mean[keep]))
        bound = 1e-12 if crypto else run.bound(7)
        print(f"{method}, round {round_}, rate {rate}: error {worst:.2e}, bound {bound:.2e}")
        assert worst <= bound
        assert crypto or worst > bound / 1000  # not vacuous


def test_a_lower_rank_gets_the_first_components_of_a_higher_one_and_the_heads_are_whole() -> None:
    run = half()
    for got in run.received:
        for name, factors in got.layers.items():
            assert np.array_equal(factors.a, run.received[-1].layers[name].a[: got.rank])
            assert np.array_equal(factors.b, run.received[-1].layers[name].b[:, : got.rank])
        assert all((head != 0).all() for head in got.heads.values())


@BACKENDS
def test_the_first_round_has_no_mean_to_follow_and_is_not_pruned(crypto: tuple[str, ...]) -> None:
    run, plain = (Round([*words, *crypto], 0) for words in ((*AGREED, *constant(0.5)), ("method=fedshield",)))
    assert [len(data) for data in run.sent] == [len(data) for data in plain.sent]
    assert all(m.mask == b"" for m in [*run.messages, run.released])
    for error, bound, size in run.errors("nested", ("a", "b")):
        assert error <= (1e-12 * size if crypto else bound)
    run.seal(0, guide=None)


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_a_rate_that_removes_nothing_leaves_the_mean_whole(rate: float) -> None:
    """At 0 there is no mask at all; at 0.01 of 10 entries there is one that keeps all."""
    layers = (LayerShape("tiny", 5, 5),)
    run = Round([*AGREED, *constant(rate), *IN_FLOAT64], 1, ranks=(2, 2), samples=(3, 4), layers=layers)
    assert len(run.messages[0].mask) == (16 + 3 if rate else 0)
    for error, _, size in run.errors("nested", ("a", "b")):
        assert error <= 1e-12 * size


@BACKENDS
def test_a_rate_that_removes_everything_sends_no_value_and_leaves_zeros(crypto: tuple[str, ...]) -> None:
    run = Round([*AGREED, *constant(0.999), *crypto], 1, ranks=(2, 2), samples=(3, 4), layers=SMALL_LAYERS, heads=())
    assert all(m.secret == m.clear == b"" for m in [*run.messages, run.released])
    assert all((f.a == 0).all() and (f.b == 0).all() for got in run.received for f in got.layers.values())


# ---------------------------------------------------------------------------------------------------------- the bytes


@EVERY_RATE
def test_ciphertexts_and_bytes_fall_with_the_share_that_is_kept_within_one_ciphertext_per_tier(rate: float) -> None:
    layers = (LayerShape("wide", 3000, 5000), LayerShape("narrow", 900, 100))
    words = ([*AGREED, *constant(rate)], ["method=fedshield"])
    run, plain = (Round(w, 1, ranks=(4, 8), samples=(3, 4), layers=layers) for w in words)
    # by hand: per tier 4 components of two tensors A and two tensors B, and the 21 values of the heads in the first
    kept = sum(4 * w - round(rate * 4 * w) for w in (5000, 100, 3000, 900))
    ciphertexts, mask = [math.ceil((kept + 21) / 4096), math.ceil(kept / 4096)], 16 + 4 * 9000 // 8
    blocks = [64 + 5 * 4096, 64 + 5 * 4096, 2 * 64 + 5 * 4096]  # a seed of each update
    before = [len(m.secret) / block for m, block in zip((*plain.messages, plain.released), blocks, strict=True)]
    for i, (message, tiers) in enumerate(zip((*run.messages, run.released), (1, 2, 1), strict=True)):
        assert len(message.secret) == blocks[i] * sum(ciphertexts[:tiers]) and message.clear == b""
        assert len(message.mask) == mask * tiers
        assert abs(len(message.secret) // blocks[i] - (1 - rate) * before[i]) <= tiers
    assert before == [9, 18, 9]
    for data, message, tiers in zip(run.sent, run.messages, (1, 2), strict=True):
        assert len(data) == 122 + len(message.secret) + mask * tiers + 32  # nothing else travels


@EVERY_RATE
def test_announced_sizes_are_those_of_the_messages(rate: float) -> None:
    for run in (Round([*AGREED, *constant(rate), *crypto], 1) for crypto in (IN_FLOAT64, ())):
        for who, message in zip(run.who, run.messages, strict=True):
            announced = wire.sizes(run.session, wire.UPDATE, 1, who.rank, [who])
            assert announced == (len(message.clear), len(message.secret), len(message.mask))
        announced = wire.sizes(run.session, wire.AGGREGATE, 1, 8, run.released.contributors)
        assert announced == (0, len(run.released.secret), len(run.released.mask))


# --------------------------------------------------------------------------------------------- what the server can see


def test_equal_masks_are_equal_bytes_within_a_round_and_a_lower_ranks_is_a_prefix() -> None:
    run = half()
    longest = run.messages[-1].mask
    assert run.messages[-2].mask == longest == run.released.mask
    assert [longest[: len(m.mask)] for m in run.messages] == [m.mask for m in run.messages]
    assert [len(m.mask) for m in run.messages[:3]] == [279, 2 * 279, 2 * 279 + 541]
    assert len({*cut_in_tiers(longest, TIERS)}) == 3


def test_one_mask_has_other_bytes_in_every_round_tier_run_and_under_every_key() -> None:
    """The server cannot tell whether a mask changed from one round to the next."""
    run = half()
    held = truncated(run.held, 8)  # equal tiers: components 2 and 3 as 0 and 1
    for f in held.layers.values():
        f.a[2:4], f.b[:, 2:4] = f.a[:2], f.b[:, :2]
    masks = [Round([*AGREED, *constant(0.5), *IN_FLOAT64], r, held=held).messages[-1].mask for r in (1, 2, 3)]
    link = replace(run.session, run=10)
    other = exchange.seal(run.clients[3], link, run.secret, round_=1, sender=4, samples=1, total=2, guide=held)
    masks.append(wire.decode(other, link, wire.Expected(wire.UPDATE, 1, 4, 8)).mask)
    for number in (0, 1):
        encrypted = Round([*AGREED, *constant(0.5)], 1, held=held, key=number)
        masks.append(encrypted.messages[-1].mask)
    pieces = [piece for mask in masks for piece in cut_in_tiers(mask, TIERS)]
    blocks = [piece[i : i + 8] for piece in pieces for i in range(0, len(piece) - 7, 8)]
    assert len(set(blocks)) == len(blocks)


def test_neither_the_bitmap_nor_its_complement_occurs_in_any_byte_that_travels() -> None:
    run = Round([*AGREED, *constant(0.5)], 1)
    plan = run.plan
    keep = pruning.choose(pack(run.held, plan, ("a", "b")), plan, ("a", "b"), 8, 0.5)[21:]
    windows = set()
    for bits in np.split(keep, np.cumsum(TIERS)[:-1]):
        for found in (bits, ~bits, bits[::-1]):
            packed = np.packbits(found).tobytes()
            windows |= {packed[i : i + 8] for i in range(len(packed) - 7)}
    assert len(windows) > 2000
    for data in (*run.sent, wire.encode(run.released, run.session)):
        assert not any(data[i : i + 8] in windows for i in range(len(data) - 7))


# ------------------------------------------------------------------------------------------------ clients that disagree


def changed(held: Adapter, component: int) -> Adapter:
    """Another mean: the largest value of one component is gone, so that its mask leaves something else."""
    found = truncated(held, held.rank)
    row = found.layers["block.v"].a[component]
    row[np.abs(row).argmax()] = 0.0
    return found


def test_a_client_that_holds_another_mean_is_refused_by_name_and_the_others_sum_stays_as_it_was() -> None:
    run = half()
    for component, ranks_affected in ((0, {2, 4, 8}), (3, {4, 8}), (7, {8})):
        sum_, alone = (SeparateSum(run.session, 1, run.total) for _ in range(2))
        for s in (sum_, alone):
            s.add(run.sent[3], sender=4, who=run.who[3])
        before = sum_.release(1)
        for i, rank in enumerate(RANKS[:3]):
            odd = run.seal(i, guide=truncated(changed(run.held, component), rank))
            if rank in ranks_affected:
                with pytest.raises(
                    PlanMismatchError, match=r"digest [0-9a-f]{16}\) is not that .*digest [0-9a-f]{16}\)"
                ):
                    sum_.add(odd, sender=i + 1, who=run.who[i])
                assert sum_.release(1) == before
            for s in (sum_, alone):
                s.add(run.sent[i], sender=i + 1, who=run.who[i])
            before = sum_.release(1)
        assert before == alone.release(1)
        assert before.contributors == run.released.contributors and before.mask == run.released.mask


def test_a_round_whose_masks_differ_is_refused_whoever_answers_first() -> None:
    """Nobody can tell who holds the right mean, so all that differ from the first are named and too few are left."""
    run = half()
    sum_ = SeparateSum(run.session, 1, run.total)
    sum_.add(run.seal(2, guide=changed(run.held, 0)), sender=3, who=run.who[2])
    for i in (0, 1, 3):
        with pytest.raises(PlanMismatchError, match="its client holds another aggregate than they do"):
            sum_.add(run.sent[i], sender=i + 1, who=run.who[i])
    with pytest.raises(FederationError, match="1 usable updates"):
        sum_.release(2)


def test_a_client_without_a_mean_says_so() -> None:
    with pytest.raises(PlanMismatchError, match="holds no mean from which the mask of round 1 would follow"):
        half().seal(0, guide=None)


# ------------------------------------------------------------------------------------------------- forged and damaged


def other_mask(change: str) -> bytes:
    """A mask of the right length that is not the one of this round; all tiers, that is 279, 279 and 541 bytes."""
    mask = half().messages[-1].mask
    if change == "another key":
        return Round([*AGREED, *constant(0.5)], 1, key=1).messages[-1].mask
    if change == "another round":
        return half(2).messages[-1].mask
    if change == "another tier":
        return mask[279:558] + mask[:279] + mask[558:]
    bit = random.Random(change).randrange(8 * len(mask))
    return mask[: bit // 8] + bytes([mask[bit // 8] ^ 1 << bit % 8]) + mask[bit // 8 + 1 :]


@pytest.mark.parametrize(
    "change", ["another key", "another round", "another tier", *(f"a bit, {i}" for i in range(20))]
)
def test_a_mask_of_another_key_round_or_tier_or_with_one_bit_flipped_is_refused_by_the_client(change: str) -> None:
    run = Round([*AGREED, *constant(0.5)], 1) if change == "another key" else half()
    assert len(other_mask(change)) == len(run.released.mask) and other_mask(change) != run.released.mask
    with pytest.raises(FormatError, match="mask was made under another key or for another round, or is damaged"):
        run.receive(run.clients[3], mask=other_mask(change))
    assert run.receive(run.clients[3]).rank == 8


@pytest.mark.parametrize("length", [0, 278, 280])
def test_a_mask_of_another_length_is_refused_by_server_and_client(length: int) -> None:
    run = half()
    message = replace(run.messages[0], mask=(run.messages[0].mask + bytes(9))[:length])
    sum_ = SeparateSum(run.session, 1, run.total)
    with pytest.raises(FormatError, match="bytes where"):
        sum_.add(wire.encode(message, run.session), sender=1, who=run.who[0])
    assert sum_.contributors == 0
    with pytest.raises(FormatError, match="bytes where"):
        run.receive(run.clients[0], mask=message.mask)


def test_a_mask_where_the_round_has_none_is_refused() -> None:
    run = half(0)
    sum_ = SeparateSum(run.session, 0, run.total)
    with pytest.raises(FormatError, match="bytes where"):
        sum_.add(wire.encode(replace(run.messages[0], mask=b"m"), run.session), sender=1, who=run.who[0])


def test_a_mask_that_leaves_another_number_of_entries_than_the_plan_is_refused() -> None:
    """Made with the key, for this round: by a client that prunes at another rate."""
    run = half()
    for rate in (0.3, 0.501, 0.7):
        mask = Round([*AGREED, *constant(rate), *IN_FLOAT64], 1).messages[-1].mask
        for base in run.clients:
            with pytest.raises(FormatError, match="leaves another number of entries than the plan"):
                run.receive(base, mask=mask[: {2: 279, 4: 558, 8: 1099}[base.rank]])


def test_a_mask_that_leaves_more_in_one_tier_and_as_many_less_in_another_is_refused() -> None:
    run = Round([*AGREED, *constant(0.5), *IN_FLOAT64], 1, ranks=(2, 4, 4), samples=(1, 2, 3))
    more, less = (
        Round([*AGREED, *constant(r), *IN_FLOAT64], 1, ranks=(2, 4, 4), samples=(1, 2, 3)).messages[-1].mask
        for r in (0.3, 0.7)
    )
    with pytest.raises(FormatError):
        run.receive(run.clients[2], mask=more[:279] + less[279:])


def test_hostile_bytes_are_refused_as_such_and_leave_the_sum_as_it_was() -> None:
    rng, run = random.Random(0), Round([*AGREED, *constant(0.5), *IN_FLOAT64], 1, layers=SMALL_LAYERS)
    sum_, refused = SeparateSum(run.session, 1, run.total), 0
    sum_.add(run.sent[3], sender=4, who=run.who[3])
    before = sum_.release(1)
    aggregate = wire.encode(run.released, run.session)
    for _ in range(1500):
        trial = SeparateSum(run.session, 1, run.total)
        trial.add(run.sent[3], sender=4, who=run.who[3])
        try:
            trial.add(mutated(run.sent[2], rng), sender=3, who=run.who[2])
        except WireError:
            refused += 1
            assert trial.release(1) == before
        try:
            exchange.unseal(mutated(aggregate, rng), run.session, run.secret, round_=1, rank=8, base=run.clients[3])
        except (WireError, RangeError):
            refused += 1
    assert 1500 < refused < 3000
