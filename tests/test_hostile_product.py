"""Hostile bytes where products are summed: what a member sends leaves that member out, and the round goes on."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from ciphertune import exchange, wire
from ciphertune.adapter import Adapter, LoraFactors
from ciphertune.crypto.clear import ClearPublic
from ciphertune.crypto.clear_secret import ClearSecret
from ciphertune.crypto.secret import SecretPart
from ciphertune.errors import CiphertuneError, RangeError, WireError
from ciphertune.plan import LayerShape, Plan
from ciphertune.product import ProductSum
from ciphertune.ranks import Contributor
from ciphertune.wire import Session
from tests.messages import BACKENDS, mutated
from tests.oracle import BODY, PRODUCT, adapter_of, blank, body_of, negotiated_plan, residues, shared_secret, with_body

MUTATIONS = 240
TOTAL, BOUND = 100, 16.0
WHO = (Contributor(8, 20, 0), Contributor(2, 30, 1), Contributor(4, 40, 1))
EXTREME = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of numpy, about infinities


def parties(backend: str, plan: Plan, precision: str = "float32") -> tuple[Session, SecretPart]:
    clear = ClearPublic(precision)
    secret = shared_secret(PRODUCT) if backend == "encrypted" else ClearSecret(clear, BOUND)
    return Session(11, plan, b"s" * 16, secret.fingerprint, secret.public, clear, BOUND), secret


def update(session: Session, secret: SecretPart, sender: int, *, b: float = 1.0) -> bytes:
    """A good update of member `sender`, from 1; its B is b times what is drawn."""
    who = WHO[sender - 1]
    drawn = adapter_of(session.plan, who.rank, sender)
    adapter = Adapter({n: LoraFactors(f.a, b * f.b, f.scale) for n, f in drawn.layers.items()}, drawn.heads)
    return exchange.seal(
        adapter, session, secret, round_=0, sender=sender, samples=who.samples, total=TOTAL, tier=who.tier
    )


def sum_of(session: Session, data: list[bytes]) -> ProductSum:
    """Of these updates, of members 1 to 3; those that are refused with a WireError are left out."""
    sum_ = ProductSum(session, 0, TOTAL)
    for sender, (one, who) in enumerate(zip(data, WHO, strict=True), 1):
        before = sum_.contributors
        try:
            sum_.add(one, sender=sender, who=who)
        except WireError:
            assert sum_.contributors == before
    return sum_


def unsealed(data: bytes, session: Session, secret: SecretPart, rank: int = 4, announced: int = 8) -> Adapter:
    base = blank(adapter_of(session.plan, rank, 0))
    try:
        return exchange.unseal(data, session, secret, round_=0, rank=announced, base=base)[0]
    finally:
        assert all((f.a == 7).all() and (f.b == 7).all() for f in base.layers.values())


def assert_usable(mean: Adapter) -> None:
    values = [x for f in mean.layers.values() for x in (f.a, f.b)] + list(mean.heads.values())
    assert all(np.abs(v).max() <= 2 * BOUND for v in values)


@EXTREME
@BACKENDS
def test_hostile_updates_leave_their_sender_out_or_count_as_its_update_and_the_round_goes_on(backend: str) -> None:
    (session, secret), rng = parties(backend, negotiated_plan()), random.Random(0)
    good = [update(session, secret, sender) for sender in (1, 2, 3)]
    outcomes = {"refused": 0, "taken": 0, "absurd": 0}
    for i in range(MUTATIONS):
        data = list(good)
        while data[i % 3] == good[i % 3]:
            data[i % 3] = mutated(good[i % 3], rng)
        sum_ = sum_of(session, data)
        message = sum_.release(2)
        try:
            assert_usable(unsealed(wire.encode(message, session), session, secret, announced=message.rank))
            outcomes["refused" if sum_.contributors == 2 else "taken"] += 1
        except (WireError, RangeError):
            assert sum_.contributors == 3
            outcomes["absurd"] += 1
    print(f"{backend}: {outcomes}")
    assert outcomes["refused"] > MUTATIONS / 2
    assert outcomes["taken"] + outcomes["absurd"] > MUTATIONS / 20  # so that what lies behind the frame was reached


@EXTREME
@BACKENDS
def test_client_survives_hostile_aggregates_of_products(backend: str) -> None:
    (session, secret), rng = parties(backend, negotiated_plan()), random.Random(1)
    good = wire.encode(sum_of(session, [update(session, secret, s) for s in (1, 2, 3)]).release(2), session)
    assert_usable(unsealed(good, session, secret))
    outcomes: dict[str, int] = {}
    for _ in range(MUTATIONS):
        try:
            assert_usable(unsealed(mutated(good, rng), session, secret, rank=rng.choice([1, 4, 8])))
            name = "taken"
        except CiphertuneError as error:
            name = type(error).__name__
            assert isinstance(error, WireError | RangeError)
        outcomes[name] = outcomes.get(name, 0) + 1
    print(f"{backend}: {outcomes}")
    assert outcomes["FormatError"] > MUTATIONS / 4
    assert "RangeError" in outcomes  # values that no honest mean has


def test_member_whose_rows_cancel_each_other_does_not_end_the_round() -> None:
    """Row 2 is minus row 1 modulo q, and their coefficients are equal: the sum hides nothing, so that SEAL refuses it.

    Equal here because B is zero, as it is before training; two equal columns of B would do as well.
    """
    session, secret = parties("encrypted", negotiated_plan())
    data = [update(session, secret, sender, b=float(sender > 1)) for sender in (1, 2, 3)]
    block, rows = PRODUCT.block_bytes, len(data[0]) - 32 - 8 * PRODUCT.block_bytes  # of 8 components, of a block each
    first = residues(data[0][rows : rows + block], PRODUCT)
    q = np.array(shared_secret(PRODUCT).public.moduli, np.uint64)[:, None]
    minus = body_of((q - first) % q, PRODUCT)
    data[0] = with_body(data[0], data[0][BODY : rows + block] + minus + data[0][rows + 2 * block : -32])
    assert sum_of(session, data).release(2).kind == wire.AGGREGATE


def test_members_cannot_together_push_what_is_added_in_the_clear_past_the_modulus() -> None:
    """Each one's B is just small enough, and its A as large as crypto.bound, not as crypto.bound times its weight."""
    layers, columns = (LayerShape("wide", 4096, 2048),), (tuple(range(2048)),)
    plan = replace(negotiated_plan(), layers=layers, heads=(), scale=1.0, budgets=(0.0, 1.0), columns=columns)
    session, secret = parties("encrypted", plan)
    sum_, rng = ProductSum(session, 0, TOTAL), np.random.default_rng(0)
    for sender, hostile in enumerate((False, False, True, True), 1):
        tier = 0 if hostile else 1
        b = np.full((4096, 1), 15.99) if hostile else rng.normal(0, 0.1, (4096, 1))
        adapter = Adapter({"wide": LoraFactors(rng.normal(0, 0.1, (1, 2048)), b, 1.0)}, {})
        data = exchange.seal(adapter, session, secret, round_=0, sender=sender, samples=25, total=TOTAL, tier=tier)
        if hostile:
            values = np.frombuffer(data[BODY:-32], "<f4").copy()
            values[4096:] = BOUND
            data = with_body(data, values.tobytes())
        try:
            sum_.add(data, sender=sender, who=Contributor(1, 25, tier))
        except WireError:
            assert hostile
    assert sum_.release(2).kind == wire.AGGREGATE


def test_numbers_that_overflow_are_refused_before_they_are_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK's singular value decomposition never returns for some matrices that hold an infinity."""
    original = np.linalg.svd

    def svd(m: np.ndarray, **options: bool) -> object:
        assert np.isfinite(m).all()
        return original(m, **options)

    session, secret = parties("clear", negotiated_plan(), "float64")
    data = wire.encode(sum_of(session, [update(session, secret, s) for s in (1, 2, 3)]).release(2), session)
    values = np.frombuffer(data[BODY + 32 : -32], "<f8").copy()  # of three contributors
    values[7 * 7 : 7 * 7 + 3] = (1.7e308, -1e308, 1e308)  # after Q of the first layer: M; 90 of 100 samples contributed
    forged = with_body(data, data[BODY : BODY + 32] + values.tobytes())
    monkeypatch.setattr(np.linalg, "svd", svd)
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(CiphertuneError):
        unsealed(forged, session, secret)


def test_heads_that_cancel_each_other_are_refused_when_they_come_and_the_round_goes_on() -> None:
    """Two clients of one mind: one's encrypted head is minus the other's modulo q, and SEAL refuses their sum."""
    session, secret = parties("encrypted", negotiated_plan())
    data = [update(session, secret, sender) for sender in (1, 2, 3)]
    block = PRODUCT.block_bytes
    at = [len(one) - 32 - (1 + who.rank) * block for one, who in zip(data, WHO, strict=True)]  # heads, then the rows
    first = residues(data[1][at[1] : at[1] + block], PRODUCT)
    q = np.array(shared_secret(PRODUCT).public.moduli, np.uint64)[:, None]
    minus = body_of((q - first) % q, PRODUCT)
    data[2] = with_body(data[2], data[2][BODY : at[2]] + minus + data[2][at[2] + block : -32])
    sum_ = ProductSum(session, 0, TOTAL)
    sum_.add(data[1], sender=2, who=WHO[1])
    with pytest.raises(WireError, match="refused to add"):
        sum_.add(data[2], sender=3, who=WHO[2])
    sum_.add(data[0], sender=1, who=WHO[0])
    assert sum_.contributors == 2 and sum_.release(2).kind == wire.AGGREGATE


def test_values_that_would_be_encrypted_are_bounded_where_nothing_is() -> None:
    """The dry run and flexlora: a head of 1e30 is refused at the server, not at every honest client."""
    session, secret = parties("clear", negotiated_plan())
    data = update(session, secret, 2)
    clear, hidden, _ = wire.sizes(session, wire.UPDATE, 0, WHO[1].rank, (WHO[1],))
    values = np.frombuffer(data[BODY + clear : -32], "<f4").copy()
    assert values.nbytes == hidden
    values[0] = 1e30
    forged = with_body(data, data[BODY : BODY + clear] + values.tobytes())
    with pytest.raises(WireError, match="holds values above"):
        ProductSum(session, 0, TOTAL).add(forged, sender=2, who=WHO[1])
