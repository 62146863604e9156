"""What every backend promises, asked of each in turn: the shipped parameters of conf/crypto, and the oracle."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ciphertune import exchange, wire
from ciphertune.adapter import Adapter
from ciphertune.aggregation import SeparateSum
from ciphertune.crypto import ckks_secret, keys, packed_secret
from ciphertune.crypto.base import PublicPart
from ciphertune.crypto.ckks_secret import CkksSecret
from ciphertune.crypto.packed_secret import PackedSecret
from ciphertune.crypto.params import CkksParams, PackedParams
from ciphertune.crypto.secret import SecretKey, SecretPart
from ciphertune.errors import (
    FormatError,
    KeyFileError,
    KeyMismatchError,
    ParameterMismatchError,
    PlanMismatchError,
    RangeError,
    RoundMismatchError,
    SettingsMismatchError,
    WireError,
)
from ciphertune.ranks import Contributor
from ciphertune.settings import ckks_params, compose, packed_params
from ciphertune.wire import Session
from tests.oracle import (
    BODY,
    adapter_of,
    blank,
    encrypted,
    forge,
    in_the_clear,
    mean_factor,
    mean_head,
    plan_of,
    rehashed,
    shared_secret,
)
from tests.vectors import make

CONF = Path(__file__).parent.parent / "conf"
# bytes of a block of 1, 10 and 1000 updates. CKKS: two polynomials of N residues; packed: one, and 64 bytes per seed
# until that is as long as the other
SIZES = {
    "clear": (8, 8, 8),
    "ckks": (2 * 4096 * 7,) * 3,
    "ckks_8192": (2 * 8192 * (8 + 5),) * 3,
    "ckks_product": (2 * 4096 * (6 + 6),) * 3,
    "ckks_packed": (64 + 4096 * 5, 512 + 4096 * 5, 2 * 4096 * 5),
    "ckks_packed_48": (64 + 4096 * 6, 512 + 4096 * 6, 2 * 4096 * 6),
    "bfv_packed": (64 + 4096 * 6, 512 + 4096 * 6, 2 * 4096 * 6),
}
NAMES = tuple(SIZES)
EACH = pytest.mark.parametrize("name", NAMES)
WITH_A_KEY = pytest.mark.parametrize("name", NAMES[1:])
LARGEST = {  # crypto.bound
    name: 16.0
    if name == "ckks_product"
    else 45.0
    if name.startswith("ckks_packed")
    else 48.0
    if name == "bfv_packed"
    else 64.0
    for name in NAMES
}

RUN, ROUND, RANK, TOTAL = 11, 2, 4, 100
PLAN = plan_of(tiers=(2, RANK))
SAMPLES = (60, 40)  # of senders 1 and 2: all that were asked

Vector = npt.NDArray[np.float64]


@cache
def params_of(name: str) -> CkksParams | PackedParams:
    method = "she_lora" if name == "ckks_product" else "sealed"
    crypto = compose(CONF, [f"method={method}", f"crypto={name}"]).crypto
    return packed_params(crypto) if crypto.packed else ckks_params(crypto)


def parties(name: str, number: int = 0, **changes: Any) -> tuple[Session, Any]:
    """A session of the backend, and its client half with key `number`."""
    if name == "clear":
        session, secret = in_the_clear(PLAN, run=RUN)
    else:
        session, secret = encrypted(PLAN, secret=shared_secret(params_of(name), number), run=RUN)
    return replace(session, bound=LARGEST[name], **changes), secret


def secret_of(name: str, number: int = 0) -> Any:
    return parties(name, number)[1]


def key_of(params: CkksParams | PackedParams) -> SecretKey:
    if isinstance(params, PackedParams):
        return packed_secret.generate_key(params)
    return ckks_secret.generate_key(params)


def holder(params: CkksParams | PackedParams, key: SecretKey) -> SecretPart:
    return PackedSecret(params, key) if isinstance(params, PackedParams) else CkksSecret(params, key)


def numbers(count: int, seed: int = 0, largest: float = 1.0) -> Vector:
    return np.random.default_rng(seed).uniform(-largest, largest, count)


def summed(public: PublicPart, bodies: Sequence[bytes]) -> bytes:
    total = public.aggregator()
    for body in bodies:
        total.add(body)
    return total.result(total.blocks())


# ------------------------------------------------------------------------------------------------------ right results


@EACH
def test_what_is_encrypted_comes_back_within_the_bound_whatever_the_length(name: str) -> None:
    secret = secret_of(name)
    slots = secret.public.slots
    for count in (1, slots - 1, slots, slots + 1, 2 * slots + 5):
        values = numbers(count, count)
        body = secret.encrypt(values)
        assert len(body) == -(-count // slots) * SIZES[name][0]
        back = secret.decrypt(body, count)
        assert back.shape == (count,) and back.dtype == np.float64
        assert np.abs(back - values).max(initial=0.0) <= secret.public.error_bound(1, 1.0)


@EACH
@pytest.mark.parametrize(("clients", "size"), [(1, 0), (8, 1), (10, 2), (1000, 2)])
def test_sum_is_within_the_printed_bound_and_of_the_promised_size(name: str, clients: int, size: int) -> None:
    secret = secret_of(name)
    count = min(500, secret.public.slots) if secret.public.encrypts else 500
    rng = np.random.default_rng(clients)
    terms = [rng.uniform(0.5, 1, count) / clients for _ in range(clients)]
    expected = np.array([math.fsum(column) for column in np.array(terms).T])
    body = summed(secret.public, [secret.encrypt(t) for t in terms])
    blocks = -(-count // secret.public.slots)
    assert len(body) == blocks * SIZES[name][size] == blocks * secret.public.sum_bytes(clients)
    error = float(np.abs(secret.decrypt(body, count, terms=clients) - expected).max())
    bound = secret.public.error_bound(clients, 1.0)
    print(f"{name}, {clients} clients: error {error:.2e}, bound {bound:.2e}")
    assert error <= bound
    # the bound is not vacuous. One value in the clear is itself
    assert error > bound / 1000 if (name, clients) != ("clear", 1) else error == 0


@EACH
def test_values_as_large_as_the_bound_survive_alone_and_as_a_sum(name: str) -> None:
    secret, most = secret_of(name), LARGEST[name]
    values = np.where(np.arange(secret.public.slots + 3) % 3 == 0, -most, most)
    for parts in (1, 4):
        body = summed(secret.public, [secret.encrypt(values / parts) for _ in range(parts)])
        found = secret.decrypt(cut_block(body, secret.public, parts), secret.public.slots, terms=parts)
        assert np.abs(found - values[: secret.public.slots]).max() <= secret.public.error_bound(parts, most)


def cut_block(body: bytes, public: PublicPart, terms: int, block: int = 0) -> bytes:
    """One block of a sum in which all blocks have as many terms."""
    return body[block * public.sum_bytes(terms) :][: public.sum_bytes(terms)]


@EACH
def test_shorter_vectors_are_prefixes_and_every_order_gives_the_same_sum(name: str) -> None:
    secret = secret_of(name)
    public, slots = secret.public, secret.public.slots
    counts = (slots // 2 + 1, 2 * slots, slots + 1, 3 * slots - slots // 2)
    vectors = [numbers(count, count, 0.25) for count in counts]
    expected = np.zeros(3 * slots)
    for vector in vectors:
        expected[: vector.size] += vector
    bodies = [secret.encrypt(v) for v in vectors]
    reach = [-(-count // slots) for count in counts]
    terms = [sum(r > block for r in reach) for block in range(max(reach))]
    results = set()
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        body = summed(public, [bodies[i] for i in order])
        assert len(body) == sum(public.sum_bytes(t) for t in terms)
        at = 0
        for block, k in enumerate(terms):
            found = secret.decrypt(body[at : at + public.sum_bytes(k)], slots, terms=k)
            assert np.abs(found - expected[block * slots :][:slots]).max() <= public.error_bound(k, 1.0)
            at += public.sum_bytes(k)
        results.add(body)
    assert len(results) == 1 or name == "clear"  # floats round differently


@EACH
def test_no_values_are_no_bytes_and_change_no_sum(name: str) -> None:
    """A tier of which nothing is encrypted has an empty segment."""
    secret = secret_of(name)
    assert secret.encrypt(np.zeros(0)) == b""
    assert secret.decrypt(b"", 0).shape == (0,)
    secret.public.check(b"")
    body, total = secret.encrypt(numbers(3)), secret.public.aggregator()
    total.add(b"")
    assert (total.blocks(), total.result(0)) == (0, b"")
    total.add(body)
    total.add(b"")
    assert total.result(total.blocks()) == body


@EACH
def test_nothing_that_is_given_in_is_changed_or_looked_at_again(name: str) -> None:
    secret = secret_of(name)
    public, slots = secret.public, secret.public.slots
    values = numbers(slots + 1)
    kept = values.copy()
    values.flags.writeable = False
    bodies = [secret.encrypt(values) for _ in range(3)]
    assert np.array_equal(values, kept)
    copies = [bytes(bytearray(b)) for b in bodies]
    once = summed(public, bodies)
    assert bodies == copies
    assert summed(public, bodies) == once
    buffers: list[Any] = [bytearray(b) for b in bodies]
    total = public.aggregator()
    for buffer in buffers:
        total.add(buffer)
        buffer[:] = bytes(len(buffer))
    assert total.result(total.blocks()) == once
    given = bytes(bytearray(once))
    public.check(bodies[0])
    secret.decrypt(once[: public.sum_bytes(3)], slots, terms=3)
    assert once == given


@EACH
def test_sum_given_out_is_not_changed_by_what_is_added_later(name: str) -> None:
    secret = secret_of(name)
    total = secret.public.aggregator()
    body = secret.encrypt(numbers(3))
    total.add(body)
    early = total.result(1)
    kept = bytes(bytearray(early))
    total.add(secret.encrypt(numbers(3, 1)))
    assert early == kept == body[: SIZES[name][0]]
    assert total.result(1) != early
    assert total.result(0) == b""


@EACH
def test_decryption_is_told_how_many_updates_it_is_the_sum_of_and_never_reads_it(name: str) -> None:
    secret = secret_of(name)
    public, slots = secret.public, secret.public.slots
    values = numbers(slots)
    body = summed(public, [secret.encrypt(values / 4) for _ in range(4)])
    assert np.abs(secret.decrypt(body, slots, terms=4) - values).max() <= public.error_bound(4, 1.0)
    for wrong in (1, 2, 3, 5, 1000):
        if public.sum_bytes(wrong) != public.sum_bytes(4):
            with pytest.raises(FormatError):
                secret.decrypt(body, slots, terms=wrong)
    for count in (slots + 1, 2**31):
        with pytest.raises(FormatError):
            secret.decrypt(body, count, terms=4)


# -------------------------------------------------------------------------------------------------- before encryption


def forbid_encryption(monkeypatch: pytest.MonkeyPatch, secret: Any) -> None:
    def encrypts(*_: Any) -> None:
        raise AssertionError("a block was encrypted")

    if isinstance(secret, PackedSecret):
        monkeypatch.setattr(secret, "_block", encrypts)
    elif isinstance(secret, CkksSecret):
        monkeypatch.setattr(ckks_secret.ts, "ckks_vector", encrypts)


@EACH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.0 + 2**-20, -1.5, -1e300], ids=str)
def test_value_that_cannot_be_carried_is_refused_before_anything_is_encrypted(
    name: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = secret_of(name)
    values = np.zeros(2 * secret.public.slots + 1)
    values[-1] = bad * LARGEST[name]
    forbid_encryption(monkeypatch, secret)
    with pytest.raises(RangeError, match=r"above crypto\.bound" if np.isfinite(bad) else "NaN or infinite"):
        secret.encrypt(values)
    values[-1] = LARGEST[name]
    if secret.public.encrypts:  # the values themselves were all that was wrong
        with pytest.raises(AssertionError, match="a block was encrypted"):
            secret.encrypt(values)


# --------------------------------------------------------------------------------------------------- through the wire

Make = Callable[..., bytes]


def client(sender: int) -> Adapter:
    return adapter_of(PLAN, RANK, sender)


def update(session: Session, secret: SecretPart, *, sender: int = 2, round_: int = ROUND) -> bytes:
    return exchange.seal(
        client(sender), session, secret, round_=round_, sender=sender, samples=SAMPLES[sender - 1], total=TOTAL
    )


def aggregate(session: Session, secret: SecretPart, *, round_: int = ROUND) -> bytes:
    total = SeparateSum(session, round_, TOTAL)
    for sender, samples in enumerate(SAMPLES, 1):
        data = update(session, secret, sender=sender, round_=round_)
        total.add(data, sender=sender, who=Contributor(RANK, samples))
    return wire.encode(total.release(2), session)


@cache
def good(name: str, sender: int = 0) -> bytes:
    """The honest update of a sender, or the aggregate."""
    return update(*parties(name), sender=sender) if sender else aggregate(*parties(name))


def of_another_key(name: str, make: Make) -> list[bytes]:
    if name == "clear":
        return [forge(make(*parties(name)), key=b"k" * 16)]
    return [make(*parties(name, 1))]


def of_other_parameters(name: str, make: Make) -> list[bytes]:
    return [make(*parties(other)) for other in NAMES if other != name]


def of_another_session(**changes: Any) -> Callable[[str, Make], list[bytes]]:
    return lambda name, make: [make(*parties(name, **changes))]


def of_an_earlier_round(name: str, make: Make) -> list[bytes]:
    session, secret = parties(name)
    return [make(session, secret, round_=earlier) for earlier in (0, 1)]


def truncated(name: str, make: Make) -> list[bytes]:
    data, block = make(*parties(name)), SIZES[name][0]
    lengths = (1, 8, 105, 121, BODY, len(data) // 2, len(data) - 33, len(data) - 32, len(data) - 1)
    return [b"", *(data[:n] for n in lengths), *(rehashed(data[: -32 - n]) for n in (1, 8, block))]


def extended(name: str, make: Make) -> list[bytes]:
    data, block = make(*parties(name)), SIZES[name][0]
    return [data + b"\0", data + data, *(rehashed(data[:-32] + b"\1" * n) for n in (1, 8, 64, block))]


def bit_flipped(name: str, make: Make) -> list[bytes]:
    data = make(*parties(name))
    places = [*range(len(data) - 40, len(data)), *range(BODY + 16, len(data), len(data) // 20)]
    return [data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in places]


def of_too_many_contributors(name: str, make: Make) -> list[bytes]:
    return [forge(make(*parties(name)), contributors=n) for n in (0, 3, 1000, 1_000_000, 1_000_001, 2**32 - 1)]


def not_below_the_modulus(name: str, make: Make) -> list[bytes]:
    """Residues, or of the oracle NaN, correctly framed."""
    data = make(*parties(name))
    start = len(data) - 32 - SIZES[name][0]
    return [rehashed(data[: len(data) - 32 - n] + b"\xff" * n) for n in (8, 4096, len(data) - 32 - start)]


HOSTILE: dict[str, tuple[type[WireError], Callable[[str, Make], list[bytes]]]] = {
    "another key": (KeyMismatchError, of_another_key),
    "other parameters": (ParameterMismatchError, of_other_parameters),
    "another plan": (PlanMismatchError, of_another_session(plan=plan_of(tiers=(2, RANK), fit_rank="pad"))),
    "other settings": (SettingsMismatchError, of_another_session(settings_digest=b"t" * 16)),
    "a replayed round": (RoundMismatchError, of_an_earlier_round),
    "another run": (RoundMismatchError, of_another_session(run=RUN + 1)),
    "truncated": (FormatError, truncated),
    "extended": (FormatError, extended),
    "bit-flipped": (FormatError, bit_flipped),
    "too many contributors": (FormatError, of_too_many_contributors),
    "not below the modulus": (FormatError, not_below_the_modulus),
}
CASES = pytest.mark.parametrize("case", HOSTILE)


@EACH
@CASES
def test_hostile_update_is_refused_by_its_own_error_and_leaves_the_sum_as_it_was(name: str, case: str) -> None:
    error, make_hostile = HOSTILE[case]
    session, _ = parties(name)
    total = SeparateSum(session, ROUND, TOTAL)
    total.add(good(name, 1), sender=1, who=Contributor(RANK, SAMPLES[0]))
    before = wire.encode(total.release(1), session)
    for data in make_hostile(name, update):
        with pytest.raises(WireError) as caught:
            total.add(data, sender=2, who=Contributor(RANK, SAMPLES[1]))
        assert type(caught.value) is error
        assert wire.encode(total.release(1), session) == before
        assert total.contributors == 1
    total.add(good(name, 2), sender=2, who=Contributor(RANK, SAMPLES[1]))
    alone = SeparateSum(session, ROUND, TOTAL)
    for sender, samples in enumerate(SAMPLES, 1):
        alone.add(good(name, sender), sender=sender, who=Contributor(RANK, samples))
    assert wire.encode(total.release(2), session) == wire.encode(alone.release(2), session) != before


@EACH
@CASES
def test_hostile_aggregate_is_refused_by_its_own_error_and_leaves_the_base_as_it_was(name: str, case: str) -> None:
    error, make_hostile = HOSTILE[case]
    session, secret = parties(name)
    base = blank(adapter_of(PLAN, RANK, 0))
    for data in make_hostile(name, aggregate):
        with pytest.raises(WireError) as caught:
            exchange.unseal(data, session, secret, round_=ROUND, rank=RANK, base=base)
        assert type(caught.value) is error
        assert all((f.a == 7).all() and (f.b == 7).all() for f in base.layers.values())
        assert all((h == 7).all() for h in base.heads.values())


@EACH
def test_aggregate_is_the_weighted_mean_within_the_bound(name: str) -> None:
    session, secret = parties(name)
    clients, tolerance = [client(1), client(2)], session.public.error_bound(2, 2.0)
    base = blank(adapter_of(PLAN, RANK, 0))
    mean, _ = exchange.unseal(good(name), session, secret, round_=ROUND, rank=RANK, base=base)
    for layer, factors in mean.layers.items():
        assert np.abs(factors.b.T - mean_factor(clients, SAMPLES, layer, "b", "nested")).max() <= tolerance
    for head, values in mean.heads.items():
        assert np.abs(values - mean_head(clients, SAMPLES, head)).max() <= tolerance


@EACH
def test_second_update_of_a_sender_is_refused_and_leaves_the_sum_as_it_was(name: str) -> None:
    session, secret = parties(name)
    total = SeparateSum(session, ROUND, TOTAL)
    total.add(good(name, 1), sender=1, who=Contributor(RANK, SAMPLES[0]))
    before = total.release(1)
    with pytest.raises(RoundMismatchError, match="already contributed"):
        total.add(update(session, secret, sender=1), sender=1, who=Contributor(RANK, SAMPLES[0]))
    assert total.release(1) == before


@EACH
def test_aggregate_with_components_that_none_of_its_contributors_has_is_refused(name: str) -> None:
    """A hostile server names contributors of rank 2 in an aggregate of rank 4, of whatever length that has."""
    session, secret = parties(name)
    message = wire.decode(good(name), session, wire.Expected(wire.AGGREGATE, ROUND, 0, RANK))
    people = tuple(Contributor(2, c.samples) for c in message.contributors)
    base = blank(adapter_of(PLAN, RANK, 0))
    (first, second), public = wire.counts(PLAN, wire.AGGREGATE, ROUND, RANK, people)[1], session.public
    both = -(-first // public.slots) * public.sum_bytes(2)
    for terms in (0, 1, 2):
        size = both + -(-second // public.slots) * public.sum_bytes(terms)
        body = (message.secret + message.secret)[:size]
        data = wire.encode(replace(message, contributors=people, secret=body), session)
        with pytest.raises((WireError, RangeError)):
            exchange.unseal(data, session, secret, round_=ROUND, rank=RANK, base=base)
    assert all((f.b == 7).all() for f in base.layers.values())


# ----------------------------------------------------------------------------------------------------------- the keys


@WITH_A_KEY
def test_wrong_key_raises_nothing_by_itself_and_gives_wrong_numbers(name: str) -> None:
    secret, other = secret_of(name), secret_of(name, 1)
    values = numbers(secret.public.slots)
    body = secret.encrypt(values)
    wrong = other.decrypt(body, values.size)
    assert np.mean(np.abs(wrong - values) > 1.0) > 0.9
    assert other.fingerprint != secret.fingerprint


@WITH_A_KEY
def test_wrong_key_under_a_forged_fingerprint_is_refused_by_the_size_of_the_values(name: str) -> None:
    theirs, other = parties(name, 1)
    forged = forge(good(name), key=other.fingerprint)
    with pytest.raises(RangeError, match="above crypto"):
        exchange.unseal(forged, theirs, other, round_=ROUND, rank=RANK, base=blank(adapter_of(PLAN, RANK, 0)))


@WITH_A_KEY
def test_two_keys_in_one_sum_are_refused_by_the_size_of_the_values(name: str) -> None:
    """Only clients can notice an update under a forged fingerprint."""
    session, secret = parties(name)
    total = SeparateSum(session, ROUND, TOTAL)
    total.add(good(name, 1), sender=1, who=Contributor(RANK, SAMPLES[0]))
    forged = forge(update(*parties(name, 1)), key=secret.fingerprint)
    total.add(forged, sender=2, who=Contributor(RANK, SAMPLES[1]))
    data = wire.encode(total.release(2), session)
    with pytest.raises(RangeError, match="above crypto"):
        exchange.unseal(data, session, secret, round_=ROUND, rank=RANK, base=blank(adapter_of(PLAN, RANK, 0)))


@WITH_A_KEY
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_key_cannot_be_pickled(name: str, protocol: int) -> None:
    for thing in (key_of(params_of(name)), secret_of(name), [secret_of(name)]):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(thing, protocol)


@WITH_A_KEY
def test_key_shows_nothing_of_itself(name: str) -> None:
    key = key_of(params_of(name))
    secret, material = holder(params_of(name), key), key.reveal()
    for text in (repr(key), str(key), f"{key}", repr([key]), repr(secret), str(secret), repr({"x": secret})):
        assert key.fingerprint.hex() in text
        assert len(text) < 100
    assert key.fingerprint not in material
    assert all(key.derive(purpose) not in material for purpose in (b"", b"mask"))
    assert key.derive(b"mask") == secret.derive(b"mask") != secret.derive(b"other")


@WITH_A_KEY
def test_key_of_other_parameters_is_refused(name: str) -> None:
    for other in NAMES[1:]:
        if other != name:
            with pytest.raises(KeyFileError, match="other encryption parameters"):
                holder(params_of(name), key_of(params_of(other)))


@WITH_A_KEY
def test_key_of_a_wrong_size_or_of_impossible_residues_is_refused(name: str) -> None:
    params = params_of(name)
    material = key_of(params).reveal()
    for wrong in (material[:-8], material + bytes(8), b"", b"\xff" * len(material), material[:-8] + b"\xff" * 8):
        with pytest.raises(KeyFileError):
            holder(params, SecretKey(wrong, params.digest()))


@WITH_A_KEY
def test_key_survives_a_file_and_decrypts_what_was_encrypted_before(name: str, tmp_path: Path) -> None:
    params, values = params_of(name), numbers(100)
    key = key_of(params)
    body = holder(params, key).encrypt(values)
    keys.save(key, tmp_path / "secret.key")
    again = keys.load(tmp_path / "secret.key")
    assert (again.fingerprint, again.params_digest) == (key.fingerprint, params.digest())
    secret = holder(params, again)
    assert np.abs(secret.decrypt(body, 100) - values).max() <= secret.public.error_bound(1, 1.0)


# ----------------------------------------------------------------------------------------------------- stored messages

STORED = pytest.mark.parametrize("name", make.PARAMS)


@STORED
def test_sum_of_stored_updates_is_the_stored_aggregate_byte_for_byte(name: str) -> None:
    stored = make.load(name)
    for order in ((0, 1), (1, 0)):
        total = SeparateSum(stored.session, make.ROUND, make.TOTAL)
        for i in order:
            total.add(stored.updates[i], sender=i + 1, who=Contributor(1, make.SAMPLES[i]))
        assert wire.encode(total.release(2), stored.session) == stored.aggregate


@STORED
def test_stored_messages_decode_to_the_stored_values(name: str) -> None:
    stored = make.load(name)
    session, secret, tolerance = stored.session, stored.secret, stored.session.public.error_bound(2, 1.0)
    assert secret.fingerprint == stored.fingerprint
    for i, (values, data) in enumerate(zip(stored.clients, stored.updates, strict=True)):
        expected = wire.Expected(wire.UPDATE, make.ROUND, i + 1, 1, make.TOTAL, make.SAMPLES[i])
        message = wire.decode(data, session, expected)
        factors = values.layers["layer"]
        packed = np.concatenate([values.heads["head"], factors.a[0], factors.b[:, 0]])
        found = secret.decrypt(message.secret, packed.size)
        assert np.abs(found - packed * make.SAMPLES[i] / make.TOTAL).max() <= tolerance
    base = blank(stored.clients[0])
    mean, _ = exchange.unseal(stored.aggregate, session, secret, round_=make.ROUND, rank=1, base=base)
    for factor, found in (("a", mean.layers["layer"].a), ("b", mean.layers["layer"].b.T)):
        expected_mean = mean_factor(stored.clients, make.SAMPLES, "layer", factor, "nested")
        assert np.abs(found - expected_mean).max() <= tolerance
    assert np.abs(mean.heads["head"] - mean_head(stored.clients, make.SAMPLES, "head")).max() <= tolerance


@STORED
def test_update_made_now_has_the_header_and_the_length_of_the_stored_one(name: str) -> None:
    stored = make.load(name)
    for i, (values, data) in enumerate(zip(stored.clients, stored.updates, strict=True)):
        now = make.sealed(stored.session, stored.secret, values, i)
        assert (now[:BODY], len(now)) == (data[:BODY], len(data))
        assert (now == data) == (name == "clear")  # encryption never repeats


def test_stored_files_are_small() -> None:
    for path in make.FOLDER.glob("*.json"):
        assert path.stem in make.PARAMS
        assert path.stat().st_size < 120_000
