"""Selected entries: what a mask that all clients share chooses is encrypted, the rest travels in the clear."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ciphertune import wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.aggregation import SeparateSum
from ciphertune.crypto.clear import parse
from ciphertune.errors import FormatError, PlanMismatchError
from ciphertune.split import pack
from tests.oracle import Matrix, largest, mean_factor, mean_head, rows_of, truncated, with_body
from tests.separate_cases import HEADS, IN_FLOAT64, LAYERS, SAMPLES, Round, gap

MASKCRYPT = ("method=maskcrypt", "crypto.precision=float64")
BOTH = ("a", "b")
FRACTIONS = pytest.mark.parametrize("fraction", [0.1, 0.5, 0.93])
TIERS = ((0, 2), (2, 4), (4, 8))


def chosen(run: Round, rank: int, fraction: float) -> Matrix:
    """As packed: whether an entry belongs to the share of the largest of its tensor and tier; heads all do."""
    held, layers = truncated(run.held, rank), {}
    for layer in LAYERS:
        a, b = (largest(rows_of(held, layer.name, f), run.plan.tiers, 1 - fraction).astype(float) for f in BOTH)
        layers[layer.name] = LoraFactors(a, b.T, run.plan.scale)
    return pack(Adapter(layers, {h.name: np.ones(h.shape) for h in HEADS}), run.plan, BOTH).astype(bool)


def segments(run: Round, values: Matrix) -> list[Matrix]:
    """Cut where the tiers end: one component has 1050 values, the heads 21."""
    return [x for x in np.split(values, [21 + 1050 * high for _, high in TIERS]) if x.size]


def decrypted(run: Round, i: int, counts: list[int]) -> list[Matrix]:
    found, at, message = [], 0, run.messages[i]
    for count in counts:
        size = math.ceil(count / run.session.public.slots) * run.session.public.block_bytes
        found.append(run.secret.decrypt(message.secret[at : at + size], count))
        at += size
    assert at == len(message.secret)
    return found


@FRACTIONS
def test_the_clear_part_is_exactly_what_was_not_chosen_and_the_secret_part_what_was(fraction: float) -> None:
    run = Round([*MASKCRYPT, f"method.fraction={fraction}"], 1)
    for i, (client, message) in enumerate(zip(run.clients, run.messages, strict=True)):
        values = pack(client, run.plan, BOTH) * (run.samples[i] / run.total)
        keep = chosen(run, client.rank, fraction)
        pairs = list(zip(segments(run, values), segments(run, keep), strict=True))
        assert np.array_equal(parse(message.clear, np.dtype("<f8")), np.concatenate([v[~k] for v, k in pairs]))
        for found, (v, k) in zip(decrypted(run, i, [int(k.sum()) for _, k in pairs]), pairs, strict=True):
            assert gap(found, v[k]) < 1e-6
        # no chosen value is readable: random doubles do not occur twice
        assert not set(np.frombuffer(message.clear, "<f8")) & set(values[keep])


@FRACTIONS
def test_the_share_that_is_encrypted_is_the_fraction_of_each_tensor_within_rounding(fraction: float) -> None:
    run = Round([*MASKCRYPT, *IN_FLOAT64, f"method.fraction={fraction}"], 1)
    for who, message in zip(run.who, run.messages, strict=True):
        tiers = [high - low for low, high in TIERS if high <= who.rank]
        secret = [sum(size * k - round((1 - fraction) * size * k) for size in (200, 300, 400, 150)) for k in tiers]
        clear = [1050 * k - s for k, s in zip(tiers, secret, strict=True)]
        assert wire.counts(run.plan, wire.UPDATE, 1, who.rank, [who]) == (tuple(clear), (secret[0] + 21, *secret[1:]))
        assert (len(message.clear), len(message.secret)) == (8 * sum(clear), 8 * (sum(secret) + 21))
        assert abs(sum(secret) - fraction * 1050 * who.rank) <= 2 * len(tiers)  # half an entry per tensor


@pytest.mark.parametrize("crypto", [IN_FLOAT64, ()], ids=["float64", "ckks"])
@pytest.mark.parametrize("fraction", [1e-6, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("absent", [0, 74], ids=["all reply", "one asked does not reply"])
def test_the_mean_is_the_oracles_everywhere_whatever_was_encrypted(
    absent: int, fraction: float, crypto: tuple[str, ...]
) -> None:
    run = Round([*MASKCRYPT, f"method.fraction={fraction}", *crypto], 1, absent=absent)
    worst = 0.0
    for got in run.received:
        for layer in LAYERS:
            for factor in BOTH:
                expected = mean_factor(run.clients, SAMPLES, layer.name, factor, "nested")[: got.rank]
                worst = max(worst, gap(rows_of(got, layer.name, factor), expected))
        for name, head in got.heads.items():
            worst = max(worst, gap(head, mean_head(run.clients, SAMPLES, name)))
    bound = 1e-12 if crypto else run.bound(7)
    print(f"fraction {fraction}: error {worst:.2e}, bound {bound:.2e}")
    assert worst <= bound
    assert crypto or worst > bound / 1000  # not vacuous


def test_the_first_round_has_no_mean_to_follow_and_is_encrypted_whole() -> None:
    run = Round(MASKCRYPT, 0)
    for i, (client, message) in enumerate(zip(run.clients, run.messages, strict=True)):
        assert message.clear == message.mask == b""
        values = segments(run, pack(client, run.plan, BOTH) * (run.samples[i] / run.total))
        for found, expected in zip(decrypted(run, i, [x.size for x in values]), values, strict=True):
            assert gap(found, expected) < 1e-6
    run.seal(0, guide=None)


def test_heads_are_encrypted_however_small_the_share() -> None:
    run = Round([*MASKCRYPT, "method.fraction=1e-6"], 1)
    for i, (client, message) in enumerate(zip(run.clients, run.messages, strict=True)):
        heads = np.concatenate([client.heads[h.name].ravel() for h in HEADS]) * (run.samples[i] / run.total)
        assert len(message.clear) == 8 * 1050 * client.rank
        assert len(message.secret) == run.session.public.block_bytes  # of 21 values; other tiers have nothing secret
        assert gap(run.secret.decrypt(message.secret, 21), heads) < 1e-6


def test_which_entries_are_encrypted_is_the_same_at_every_client_and_a_lower_rank_has_a_prefix() -> None:
    run = Round(MASKCRYPT, 1)
    longest = run.messages[-1].mask
    assert [longest[: len(m.mask)] for m in run.messages] == [m.mask for m in run.messages]
    other = truncated(run.held, 8)
    other.layers["block.q"].b[:, 0] *= -3  # the mean of a client that missed a round
    sum_ = SeparateSum(run.session, 1, run.total)
    sum_.add(run.sent[3], sender=4, who=run.who[3])
    before = sum_.release(1)
    with pytest.raises(PlanMismatchError, match=r"the mask of the update \(digest "):
        sum_.add(run.seal(2, guide=other), sender=3, who=run.who[2])
    assert sum_.release(1) == before
    with pytest.raises(PlanMismatchError, match="holds no mean"):
        run.seal(0, guide=None)


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "NaN"), (46.0, "above crypto"), (44.0, "the client's weight")])
def test_a_clear_value_that_no_client_could_send_is_refused_before_its_secret_part_is_added(
    value: float, reason: str
) -> None:
    run = Round(MASKCRYPT, 1)
    sum_ = SeparateSum(run.session, 1, run.total)
    sum_.add(run.sent[3], sender=4, who=run.who[3])
    before = sum_.release(1)
    clear = np.frombuffer(run.messages[0].clear, "<f8").copy()
    clear[-1] = value
    bad = with_body(run.sent[0], clear.tobytes() + run.messages[0].secret + run.messages[0].mask)
    with pytest.raises(FormatError, match=reason):
        sum_.add(bad, sender=1, who=run.who[0])
    assert sum_.release(1) == before
    sum_.add(run.sent[0], sender=1, who=run.who[0])
