"""CKKS: what is encrypted comes back within the printed bound, and nothing else comes back at all."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tenseal as ts

from ciphertune import exchange, wire
from ciphertune.aggregation import SeparateSum
from ciphertune.crypto import keys
from ciphertune.crypto.base import blocks_for
from ciphertune.crypto.ckks import CkksPublic, CkksSum, context_bytes
from ciphertune.crypto.ckks_secret import CkksSecret, generate_key
from ciphertune.crypto.params import CkksParams
from ciphertune.crypto.secret import SecretKey
from ciphertune.errors import FormatError, KeyFileError, KeyMismatchError, RangeError
from ciphertune.ranks import Contributor
from ciphertune.wire import Session
from tests.oracle import (
    FULL_HE,
    SEALED,
    adapter_of,
    blank,
    body_of,
    coefficients,
    decrypted,
    encrypted,
    forge,
    key_residues,
    modular_sum,
    plan_of,
    residues,
    shared_secret,
)

PARAMS = pytest.mark.parametrize("params", [SEALED, FULL_HE], ids=["sealed", "full_he"])


def numbers(count: int, seed: int = 0, largest: float = 1.0) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).uniform(-largest, largest, count)


def summed(public: CkksPublic, bodies: Sequence[bytes]) -> bytes:
    total = CkksSum(public)
    for body in bodies:
        total.add(body)
    return total.result(total.blocks())


# ------------------------------------------------------------------------------------------------------ right results


@PARAMS
def test_what_is_encrypted_comes_back_within_the_bound(params: CkksParams) -> None:
    secret = shared_secret(params)
    for count in (1, params.slots - 1, params.slots, params.slots + 1, 3 * params.slots + 5):
        values = numbers(count, count)
        body = secret.encrypt(values)
        assert len(body) == blocks_for(secret.public, count) * params.block_bytes
        back = secret.decrypt(body, count)
        assert back.shape == (count,)
        assert np.abs(back - values).max() <= params.error_bound(1, 1.0)


@PARAMS
@pytest.mark.parametrize("clients", [1, 4, 64])
def test_sum_is_within_the_printed_bound_and_the_bound_is_not_vacuous(params: CkksParams, clients: int) -> None:
    secret = shared_secret(params)
    terms = [numbers(params.slots, i, 1 / clients) for i in range(clients)]
    expected = np.sum(terms, axis=0)
    found = secret.decrypt(summed(secret.public, [secret.encrypt(t) for t in terms]), params.slots)
    error = float(np.abs(found - expected).max())
    bound = params.error_bound(clients, 1.0)
    print(f"N={params.poly_modulus_degree}, {clients} clients: error {error:.2e}, bound {bound:.2e}")
    assert bound / 20 < error <= bound


@PARAMS
def test_values_as_large_as_the_bound_survive(params: CkksParams) -> None:
    secret = shared_secret(params)
    values = np.where(np.arange(params.slots) % 3 == 0, -params.bound, params.bound)
    half = summed(secret.public, [secret.encrypt(values / 2), secret.encrypt(values / 2)])
    assert np.abs(secret.decrypt(half, params.slots) - values).max() <= params.error_bound(2, params.bound)


def test_largest_bound_that_is_accepted_does_not_wrap_around() -> None:
    params = CkksParams(4096, (54, 20), 40, 4096.0)
    secret = CkksSecret(params, generate_key(params))
    for values in (np.full(params.slots, 4096.0), np.full(params.slots, -4096.0), numbers(params.slots, 1, 4096.0)):
        back = secret.decrypt(secret.encrypt(values), params.slots)
        assert np.abs(back - values).max() <= params.error_bound(1, 4096.0)


def test_sums_past_the_modulus_wrap_without_a_word_which_is_why_the_bound_is_checked() -> None:
    loose = CkksParams(4096, (54, 20), 40, 4096.0)
    secret = CkksSecret(loose, generate_key(loose))
    body = secret.encrypt(np.full(loose.slots, 3000.0))
    wrapped = secret.decrypt(summed(secret.public, [body] * 3), loose.slots)
    assert np.abs(wrapped - (9000 - 2**14)).max() < 1e-3  # not 9000


@PARAMS
def test_shorter_vectors_are_prefixes_and_add_up_block_by_block(params: CkksParams) -> None:
    secret = shared_secret(params)
    counts = (params.slots // 2, 2 * params.slots, params.slots + 1, 3 * params.slots - 7)
    terms = [numbers(count, count, 0.25) for count in counts]
    expected = np.zeros(max(counts))
    for term in terms:
        expected[: term.size] += term
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        body = summed(secret.public, [secret.encrypt(terms[i]) for i in order])
        assert len(body) == 3 * params.block_bytes
        assert np.abs(secret.decrypt(body, max(counts)) - expected).max() <= params.error_bound(4, 1.0)


@PARAMS
def test_aggregate_is_the_residues_added_modulo_each_prime(params: CkksParams) -> None:
    secret = shared_secret(params)
    bodies = [secret.encrypt(numbers(count, count)) for count in (10, params.slots + 1, 5)]
    assert summed(secret.public, bodies) == modular_sum(bodies, params, secret.public.moduli)


def test_wire_bytes_are_ckks_by_its_definition() -> None:
    """c0 + c1 s modulo q, evaluated at the roots of unity: computed without SEAL."""
    key = generate_key(SEALED)
    secret = CkksSecret(SEALED, key)
    values = numbers(SEALED.slots, 3, SEALED.bound)
    body = summed(secret.public, [secret.encrypt(values / 4), secret.encrypt(3 * values / 4)])
    by_hand = decrypted(residues(body, SEALED)[0], key.reveal(), SEALED, secret.public.moduli[0])
    assert np.abs(by_hand - values).max() <= SEALED.error_bound(2, SEALED.bound)
    assert np.abs(by_hand - secret.decrypt(body, SEALED.slots)).max() <= 2.0**-44 * SEALED.bound


def test_first_blocks_of_a_result_are_a_prefix_of_the_whole() -> None:
    secret = shared_secret()
    total = CkksSum(secret.public)
    total.add(secret.encrypt(numbers(3 * SEALED.slots)))
    assert total.blocks() == 3
    assert [len(total.result(k)) for k in range(4)] == [k * SEALED.block_bytes for k in range(4)]
    assert total.result(3).startswith(total.result(2))


@PARAMS
def test_aggregation_leaves_the_bytes_of_a_clients_message_as_they_were(params: CkksParams) -> None:
    """TenSEAL's `a += b` overwrites `a`, which would be the first client's message."""
    secret = shared_secret(params)
    bodies = [bytes(bytearray(secret.encrypt(numbers(params.slots + 1, i)))) for i in range(3)]
    copies = [bytearray(b) for b in bodies]
    public = secret.public
    firsts = public.vectors(bodies[0])
    once = summed(public, bodies)
    assert all(body == kept for body, kept in zip(bodies, copies, strict=True))
    assert b"".join(public.block(v) for v in firsts) == bodies[0]
    assert summed(public, bodies) == once


def test_sum_given_out_is_not_changed_by_what_is_added_later() -> None:
    secret = shared_secret()
    total = CkksSum(secret.public)
    body = secret.encrypt(numbers(10))
    total.add(body)
    early = total.result(1)
    total.add(secret.encrypt(numbers(10, 1)))
    assert early == body
    assert total.result(1) != body


def test_refusal_at_a_later_block_leaves_the_earlier_blocks_of_the_sum_as_they_were() -> None:
    """The second block cancels the sum's second polynomial: SEAL refuses the sum, after the first block was added."""
    secret = shared_secret()
    total = CkksSum(secret.public)
    body = secret.encrypt(numbers(2 * SEALED.slots))
    total.add(body)
    (q,) = secret.public.moduli
    values = residues(body, SEALED)
    values[1] = (q - values[1]) % q
    with pytest.raises(FormatError, match="refused to add"):
        total.add(body_of(values, SEALED))
    assert total.result(2) == body


@PARAMS
def test_two_encryptions_of_the_same_values_have_nothing_in_common(params: CkksParams) -> None:
    secret = shared_secret(params)
    values = numbers(params.slots)
    one, two = (residues(secret.encrypt(values), params) for _ in range(2))
    for poly in range(2):
        for prime in range(len(params.widths)):
            assert np.mean(one[0, poly, prime] == two[0, poly, prime]) < 0.01


def test_lengths_come_from_the_caller_and_never_from_the_bytes() -> None:
    secret = shared_secret()
    body = secret.encrypt(numbers(5))
    for wrong in (SEALED.slots + 1, 10_000_000, 2**31, 0):
        with pytest.raises(FormatError, match="ciphertexts where the plan has"):
            secret.decrypt(body, wrong)
    assert secret.decrypt(body, 5).size == 5
    assert secret.decrypt(b"", 0).size == 0


def test_long_vectors_are_cut_here_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    secret = shared_secret()
    secret.decrypt(secret.encrypt(numbers(2 * SEALED.slots + 1)), 2 * SEALED.slots + 1)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------------- refusals


@PARAMS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 64.0001, -1e300])
def test_value_that_encryption_cannot_carry_is_refused(params: CkksParams, bad: float) -> None:
    secret = shared_secret(params)
    values = np.zeros(params.slots + 1)
    values[-1] = bad
    with pytest.raises(RangeError, match=r"NaN or infinite" if not np.isfinite(bad) else r"above crypto\.bound=64"):
        secret.encrypt(values)
    values[-1] = params.bound
    assert len(secret.encrypt(values)) == 2 * params.block_bytes


def update(session: Session, secret: CkksSecret, seed: int = 0, sender: int = 1) -> bytes:
    adapter = adapter_of(session.plan, 8, seed)
    return exchange.seal(adapter, session, secret, round_=0, sender=sender, samples=50, total=100)


def aggregate_of(session: Session, secret: CkksSecret) -> bytes:
    total = SeparateSum(session, 0, 100)
    for sender in (1, 2):
        total.add(update(session, secret, sender, sender), sender=sender, who=Contributor(8, 50))
    return wire.encode(total.release(2), session)


@PARAMS
def test_wrong_key_is_refused_by_its_fingerprint_before_anything_is_decrypted(params: CkksParams) -> None:
    plan = plan_of()
    ours, secret = encrypted(plan, secret=shared_secret(params))
    theirs, other = encrypted(plan, secret=shared_secret(params, 1))
    data, base = aggregate_of(ours, secret), adapter_of(plan, 8, 9)
    with pytest.raises(KeyMismatchError, match=other.fingerprint.hex()):
        exchange.unseal(data, theirs, other, round_=0, rank=8, base=base)
    with pytest.raises(KeyMismatchError):
        SeparateSum(ours, 0, 100).add(update(theirs, other), sender=1, who=Contributor(8, 50))


@PARAMS
def test_wrong_key_under_a_forged_fingerprint_is_refused_by_the_size_of_the_values(params: CkksParams) -> None:
    plan = plan_of()
    ours, secret = encrypted(plan, secret=shared_secret(params))
    theirs, other = encrypted(plan, secret=shared_secret(params, 1))
    data, base = aggregate_of(ours, secret), adapter_of(plan, 8, 9)
    exchange.unseal(data, ours, secret, round_=0, rank=8, base=base)
    with pytest.raises(RangeError, match="above crypto"):
        exchange.unseal(
            forge(data, key=other.fingerprint), theirs, other, round_=0, rank=8, base=adapter_of(plan, 8, 9)
        )


@PARAMS
def test_two_keys_in_one_sum_are_refused_by_the_size_of_the_values(params: CkksParams) -> None:
    """TenSEAL adds ciphertexts of different keys without a word; only clients can notice a forged fingerprint."""
    plan = plan_of()
    ours, secret = encrypted(plan, secret=shared_secret(params))
    theirs, other = encrypted(plan, secret=shared_secret(params, 1))
    total = SeparateSum(ours, 0, 100)
    total.add(update(ours, secret), sender=1, who=Contributor(8, 50))
    forged = forge(update(theirs, other, 1, 2), key=secret.fingerprint)
    total.add(forged, sender=2, who=Contributor(8, 50))
    with pytest.raises(RangeError, match="above crypto"):
        exchange.unseal(
            wire.encode(total.release(2), ours), ours, secret, round_=0, rank=8, base=adapter_of(plan, 8, 9)
        )


def test_wrong_key_decrypts_to_absurd_numbers_and_raises_nothing_by_itself() -> None:
    body = shared_secret().encrypt(numbers(SEALED.slots))
    absurd = shared_secret(SEALED, 1).decrypt(body, SEALED.slots)
    assert np.abs(absurd).max() > 1000 * SEALED.bound


def test_key_of_other_parameters_is_refused() -> None:
    with pytest.raises(KeyFileError, match="other encryption parameters"):
        CkksSecret(FULL_HE, generate_key(SEALED))


def test_key_of_a_wrong_size_is_refused() -> None:
    short = SecretKey(generate_key(SEALED).reveal()[:-8], SEALED.digest())
    with pytest.raises(KeyFileError, match="8191 residues where 8192 are expected"):
        CkksSecret(SEALED, short)


def test_a_failed_unseal_leaves_the_base_as_it_was() -> None:
    plan = plan_of()
    ours, secret = encrypted(plan)
    theirs, other = encrypted(plan, secret=shared_secret(SEALED, 1))
    base = blank(adapter_of(plan, 8, 9))
    forged = forge(aggregate_of(ours, secret), key=other.fingerprint)
    with pytest.raises(RangeError):
        exchange.unseal(forged, theirs, other, round_=0, rank=8, base=base)
    assert all((f.a == 7).all() and (f.b == 7).all() for f in base.layers.values())
    assert all((h == 7).all() for h in base.heads.values())


# ------------------------------------------------------------------------------------------------ what the server has


@PARAMS
def test_public_context_has_no_key_of_any_kind(params: CkksParams) -> None:
    context = CkksPublic(params).context
    assert not context.has_secret_key()
    assert not context.has_galois_keys()
    assert not context.has_relin_keys()
    with pytest.raises(ValueError, match="symmetric"):  # there is no public key in symmetric encryption
        context.public_key()
    for getter in ("secret_key", "galois_keys", "relin_keys"):
        with pytest.raises(ValueError, match=r"doesn't hold|[Nn]o |not"):
            getattr(context, getter)()
    # a context with Galois keys has 35 MB, one with a secret key 50 KB
    assert len(context_bytes(params)) < 128
    assert len(context.serialize(False, False, False, False)) < 128


@PARAMS
def test_public_context_cannot_decrypt(params: CkksParams) -> None:
    secret = shared_secret(params)
    (vector,) = secret.public.vectors(secret.encrypt(numbers(5)))
    with pytest.raises(ValueError, match="secret_key"):
        vector.decrypt()


@PARAMS
def test_clients_context_has_no_galois_or_relinearisation_keys_either(params: CkksParams) -> None:
    context: Any = shared_secret(params)._context
    assert context.has_secret_key()
    assert not context.has_galois_keys()
    assert not context.has_relin_keys()


# ------------------------------------------------------------------------------------------------------------- the key


@PARAMS
def test_key_survives_a_file_and_decrypts_what_was_encrypted_before(params: CkksParams, tmp_path: Path) -> None:
    key = generate_key(params)
    values = numbers(100)
    body = CkksSecret(params, key).encrypt(values)
    keys.save(key, tmp_path / "secret.key")
    again = keys.load(tmp_path / "secret.key")
    assert again.fingerprint == key.fingerprint
    assert np.abs(CkksSecret(params, again).decrypt(body, 100) - values).max() <= params.error_bound(1, 1.0)


def test_fresh_process_with_the_key_file_decrypts(tmp_path: Path) -> None:
    key, values = generate_key(SEALED), numbers(50)
    (tmp_path / "body").write_bytes(CkksSecret(SEALED, key).encrypt(values))
    keys.save(key, tmp_path / "secret.key")
    script = """
import json, sys
from pathlib import Path
from ciphertune.crypto import keys
from ciphertune.crypto.ckks_secret import CkksSecret
from ciphertune.crypto.params import CkksParams
secret = CkksSecret(CkksParams(4096, (54, 20), 40, 64.0), keys.load(Path("secret.key")))
print(json.dumps(secret.decrypt(Path("body").read_bytes(), 50).tolist()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.array(json.loads(done.stdout)) - values).max() <= SEALED.error_bound(1, 1.0)


def test_keys_are_fresh_full_size_and_ternary() -> None:
    """The table of secure moduli holds for uniform ternary secrets: coefficients -1, 0, 1, a third of each."""
    q = shared_secret().public.moduli[0]
    found = []
    for key in (generate_key(SEALED), generate_key(SEALED)):
        assert key.params_digest == SEALED.digest()
        found.append(coefficients(key_residues(key.reveal(), SEALED)[0], q).astype(int))
    for ternary in found:
        assert set(ternary) == {-1, 0, 1}
        assert all(abs(np.mean(ternary == value) - 1 / 3) < 0.05 for value in (-1, 0, 1))
    assert abs(np.mean(found[0] == found[1]) - 1 / 3) < 0.05


def test_secret_key_shows_nothing_of_itself() -> None:
    key = generate_key(SEALED)
    secret = CkksSecret(SEALED, key)
    material = key.reveal()
    shown = [repr(key), str(key), f"{key}", f"{key!r}", f"{key:}", "%s" % key, repr([key]), repr({"key": key})]  # noqa: UP031
    shown += [repr(secret), str(secret), repr((secret,))]
    record = logging.LogRecord("x", 10, "x", 1, "%s %r", (key, secret), None)
    shown.append(record.getMessage())
    for text in shown:
        assert key.fingerprint.hex() in text
        assert len(text) < 200
        assert material[:4].hex() not in text
        assert repr(material[:4])[2:-1] not in text
    assert not hasattr(key, "__dict__")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_secret_key_cannot_be_pickled(protocol: int) -> None:
    key = generate_key(SEALED)
    for thing in (key, [key], {"key": key}, shared_secret()):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(thing, protocol)
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy(key)


def test_fingerprint_is_no_part_of_the_key_and_covers_its_parameters() -> None:
    key = generate_key(SEALED)
    assert key.fingerprint not in key.reveal()
    assert SecretKey(key.reveal(), FULL_HE.digest()).fingerprint != key.fingerprint
    flipped = bytearray(key.reveal())
    flipped[-1] ^= 1
    assert SecretKey(bytes(flipped), key.params_digest).fingerprint != key.fingerprint


def test_tenseal_in_place_addition_overwrites_its_left_side_which_is_why_sums_are_not_in_place() -> None:
    secret = shared_secret()
    one, two = (secret.public.vectors(secret.encrypt(numbers(5, i)))[0] for i in range(2))
    before = secret.public.block(one)
    three = one + two
    assert secret.public.block(one) == before
    one += two
    assert secret.public.block(one) == secret.public.block(three) != before
    assert isinstance(one, ts.CKKSVector)
