"""The secret key: its file, and why the server is never given a decrypted value."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import numpy.typing as npt
import pytest
import tenseal.sealapi as seal
from conftest import CONF
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune import build_client
from ciphertune.crypto import codec, keys
from ciphertune.crypto.ckks import CkksPublic, CkksSum
from ciphertune.crypto.ckks_secret import CkksSecret, generate_key
from ciphertune.crypto.params import CkksParams
from ciphertune.crypto.secret import SecretKey
from ciphertune.errors import CiphertuneError, KeyFileError
from ciphertune.settings import compose
from tests.oracle import SEALED, key_residues, residues


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lab" / "secret.key"


def small_key(byte: int = 1) -> SecretKey:
    """A key is opaque to its file; this one is short."""
    return SecretKey(bytes([byte]) * 64, b"d" * 16)


# ------------------------------------------------------------------------------------------------------- the key file


def test_what_is_saved_is_loaded(path: Path) -> None:
    key = generate_key(SEALED)
    keys.save(key, path)
    back = keys.load(path)
    assert (back.reveal(), back.params_digest, back.fingerprint) == (key.reveal(), key.params_digest, key.fingerprint)


def test_file_has_the_documented_layout_and_nothing_is_left_beside_it(path: Path) -> None:
    keys.save(small_key(), path)
    data = path.read_bytes()
    front = b"CTKEY\0\0\1" + b"d" * 16 + (64).to_bytes(8, "little") + b"\1" * 64
    assert data == front + hashlib.sha256(front).digest()
    assert [p.name for p in path.parent.iterdir()] == ["secret.key"]


def test_save_never_overwrites_a_key(path: Path) -> None:
    keys.save(small_key(1), path)
    before = path.read_bytes()
    with pytest.raises(KeyFileError, match="exists: a key file is never overwritten"):
        keys.save(small_key(2), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["secret.key"]


def test_of_many_who_save_at_once_one_succeeds_and_its_key_is_whole(path: Path) -> None:
    barrier = Barrier(8)

    def save(number: int) -> str:
        barrier.wait()
        try:
            keys.save(small_key(number), path)
            return "saved"
        except KeyFileError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(save, range(8)))
    assert said.count("saved") == 1
    assert sum("is never overwritten" in s for s in said) == 7
    assert keys.load(path).fingerprint == small_key(said.index("saved")).fingerprint
    assert [p.name for p in path.parent.iterdir()] == ["secret.key"]


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_full_disk_is_one_clear_line_and_leaves_nothing_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(KeyFileError, match=f"cannot write {path}: No space left on device"):
        keys.save(small_key(), path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_can_read_a_saved_key_whatever_the_umask(path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        keys.save(small_key(), path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700  # it was made for the key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o601, 0o777])
def test_key_that_others_can_touch_is_refused_with_the_remedy(path: Path, mode: int) -> None:
    keys.save(small_key(), path)
    path.chmod(mode)
    with pytest.raises(KeyFileError) as caught:
        keys.load(path)
    assert f"readable by others (mode {mode:03o}): chmod 600 {path}" in str(caught.value)
    path.chmod(0o600)
    assert keys.load(path).fingerprint == small_key().fingerprint


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_key_that_only_its_owner_can_read_is_accepted(path: Path, mode: int) -> None:
    keys.save(small_key(), path)
    path.chmod(mode)
    assert keys.load(path).reveal() == small_key().reveal()


def test_absent_file_names_the_remedy(path: Path) -> None:
    with pytest.raises(KeyFileError) as caught:
        keys.load(path)
    assert f"{path} does not exist: make one with `ciphertune keys create --out {path}`, or copy" in str(caught.value)


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"cannot read key file .*: it is a folder"):
        keys.load(tmp_path)


def test_a_pipe_in_place_of_a_file_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(KeyFileError, match=r"cannot read key file .*: it is no regular file"):
        keys.load(tmp_path / "pipe")


def test_key_of_another_user_is_refused_with_the_remedy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.save(small_key(), path)
    me, owner = os.geteuid() + 4242, path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: me)
    with pytest.raises(KeyFileError) as caught:
        keys.load(path)
    assert f"belongs to user {owner}, not to user {me}" in str(caught.value)
    assert str(caught.value).endswith(f": chown {me} {path}")


def test_a_link_is_judged_by_the_file_it_leads_to(path: Path, tmp_path: Path) -> None:
    keys.save(small_key(), path)
    link = tmp_path / "link.key"
    link.symlink_to(path)
    assert keys.load(link).fingerprint == small_key().fingerprint
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="readable by others"):
        keys.load(link)


@pytest.mark.parametrize("length", [0, 3, 8, 20, 31, 32, 100, 127])
def test_key_that_was_cut_off_is_called_so_with_the_remedy(path: Path, length: int) -> None:
    keys.save(small_key(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(KeyFileError) as caught:
        keys.load(path)
    reason = f"is cut off after {length} bytes: copy it again" if length else "is not a ciphertune key file"
    assert f"key file {path} {reason}" in str(caught.value)


def test_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(KeyFileError, match="cannot write"):
        keys.save(small_key(), tmp_path / "file" / "secret.key")
    with pytest.raises(KeyFileError, match="cannot write"):
        keys.load_or_create(tmp_path / "file" / "secret.key", small_key)


def damaged(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(
        KeyFileError, match=r"(is damaged|is cut off .*): copy it again|is not a ciphertune key file of version 1"
    ):
        keys.load(path)


def test_every_truncation_and_extension_of_a_key_file_is_refused(path: Path) -> None:
    keys.save(small_key(), path)
    good = path.read_bytes()
    for length in range(len(good)):
        damaged(path, good[:length])
    for extra in (b"\0", b"\0" * 32, good):
        damaged(path, good + extra)
    path.write_bytes(good)
    keys.load(path)


def test_every_flipped_bit_of_a_key_file_is_refused(path: Path) -> None:
    keys.save(small_key(), path)
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        damaged(path, bytes(data))


def test_well_hashed_file_of_another_version_or_length_is_refused(path: Path) -> None:
    keys.save(small_key(), path)
    front = path.read_bytes()[:-32]
    for wrong in (b"CTKEY\0\0\2" + front[8:], front[:24] + (63).to_bytes(8, "little") + front[32:], front + b"\0"):
        damaged(path, wrong + hashlib.sha256(wrong).digest())
    path.write_bytes(front + hashlib.sha256(front).digest())
    keys.load(path)


@given(content=st.binary(max_size=300))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_other_file_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("key") / "secret.key"
    path.touch(0o600)
    for data in (content, b"CTKEY\0\0\1" + content, b"CTKEY\0\0\1" + bytes(16) + b"\xff" * 8 + content):
        damaged(path, data)


def test_error_texts_show_nothing_of_the_key(path: Path) -> None:
    key = generate_key(SEALED)
    keys.save(key, path)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(KeyFileError) as caught:
        keys.load(path)
    assert str(caught.value) == f"key file {path} is damaged: copy it again"
    with pytest.raises(KeyFileError) as caught:
        CkksSecret(CkksParams(4096, (54, 20), 39, 64.0), key)
    assert key.reveal()[:8].hex() not in str(caught.value)
    assert key.fingerprint.hex() in str(caught.value)


# --------------------------------------------------------------------------------------- secrets for another purpose


def hkdf(material: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, no salt (section 2.2: as many zeros as a hash has bytes) and one block of output."""
    extracted = hmac.new(bytes(32), material, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\1", hashlib.sha256).digest()


def test_the_hkdf_of_this_test_is_rfc_5869s() -> None:
    """Appendix A.3: no salt, no info, the first 32 bytes."""
    assert hkdf(b"\x0b" * 22, b"").hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"


@given(material=st.binary(min_size=1, max_size=200), purpose=st.binary(max_size=50))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_derived_secret_is_hkdf_of_the_material_for_the_parameters_and_the_purpose(
    material: bytes, purpose: bytes
) -> None:
    derived = SecretKey(material, b"d" * 16).derive(purpose)
    assert derived == hkdf(material, b"ciphertune derived 1" + b"d" * 16 + purpose)


def test_derived_secrets_differ_by_purpose_by_key_and_by_parameters() -> None:
    key = generate_key(SEALED)
    purposes = [b"", b"column codes of run 1", b"column codes of run 2", b"column codes of run 11"]
    found = [key.derive(p) for p in purposes]
    found += [generate_key(SEALED).derive(purposes[1]), SecretKey(key.reveal(), b"d" * 16).derive(purposes[1])]
    assert len(set(found)) == len(found)
    assert {len(x) for x in found} == {32}
    assert key.derive(purposes[1]) == found[1]
    assert key.fingerprint not in found[1]  # which is in the clear on every message


def test_a_derived_secret_is_the_same_for_all_holders_of_a_key_file_and_shows_nothing_of_it(path: Path) -> None:
    key = generate_key(SEALED)
    keys.save(key, path)
    before = repr(key)
    mine, theirs = CkksSecret(SEALED, key), CkksSecret(SEALED, keys.load(path))
    derived = mine.derive(b"column codes of run 7")
    assert theirs.derive(b"column codes of run 7") == derived == key.derive(b"column codes of run 7")
    material = key.reveal()
    assert len(derived) == 32 < len(material)
    assert not any(derived[i : i + 8] in material for i in range(25))
    assert repr(key) == before == f"SecretKey(fingerprint={key.fingerprint.hex()})"
    assert derived.hex() not in repr(mine) and not hasattr(key, "__dict__")


# ----------------------------------------------------------------------------------------------------------- rotation


def test_a_rotated_key_takes_the_place_of_the_old_one_which_is_kept_as_private_as_it_was(path: Path) -> None:
    keys.save(small_key(1), path)
    before = path.read_bytes()
    old, kept = keys.rotate(path, small_key(2))
    assert old.fingerprint == small_key(1).fingerprint and keys.load(path).fingerprint == small_key(2).fingerprint
    assert kept.name == f"secret.key.{old.fingerprint.hex()[:8]}.old" and kept.read_bytes() == before
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()} == {0o600}
    assert len(list(path.parent.iterdir())) == 2


def test_a_key_can_be_rotated_again_and_again_and_every_old_one_is_kept(path: Path) -> None:
    keys.save(small_key(0), path)
    kept = [keys.rotate(path, small_key(k))[1] for k in range(1, 5)]
    assert [keys.load(p).fingerprint for p in kept] == [small_key(k).fingerprint for k in range(4)]


def test_a_link_to_a_key_still_leads_to_it_after_a_rotation(path: Path, tmp_path: Path) -> None:
    keys.save(small_key(1), path)
    link = tmp_path / "link.key"
    link.symlink_to(path)
    _, kept = keys.rotate(link, small_key(2))
    assert link.is_symlink() and keys.load(path).fingerprint == small_key(2).fingerprint
    assert kept.parent == path.parent


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_rotation_that_fails_leaves_the_old_key_alone(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    keys.save(small_key(1), path)
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(KeyFileError, match="No space left on device"):
        keys.rotate(path, small_key(2))
    assert keys.load(path).fingerprint == small_key(1).fingerprint
    assert [p.name for p in path.parent.iterdir()] == ["secret.key"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "error"), KeyboardInterrupt()])
def test_a_rotation_cut_off_at_its_last_step_leaves_the_old_key_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    keys.save(small_key(1), path)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((KeyFileError, KeyboardInterrupt)):
        keys.rotate(path, small_key(2))
    assert keys.load(path).fingerprint == small_key(1).fingerprint
    assert [p.name for p in path.parent.iterdir()] == ["secret.key"]


def test_of_two_rotations_at_once_one_is_refused_and_no_key_is_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.save(small_key(1), path)
    original = keys.load

    def slow(p: Path) -> SecretKey:
        found = original(p)
        monkeypatch.setattr(keys, "load", original)
        keys.rotate(path, small_key(2))  # another process, while this one works
        return found

    monkeypatch.setattr(keys, "load", slow)
    with pytest.raises(KeyFileError, match="another rotation of this key is under way or was cut off"):
        keys.rotate(path, small_key(3))
    assert keys.load(path).fingerprint == small_key(2).fingerprint
    held = {original(p).fingerprint for p in path.parent.iterdir()}
    assert held == {small_key(1).fingerprint, small_key(2).fingerprint}


def test_a_key_is_not_rotated_to_itself_nor_is_one_that_cannot_be_used(path: Path) -> None:
    keys.save(small_key(1), path)
    with pytest.raises(KeyFileError, match="holds this key already"):
        keys.rotate(path, small_key(1))
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        keys.rotate(path, small_key(2))
    assert [p.name for p in path.parent.iterdir()] == ["secret.key"]


# -------------------------------------------------------------------------------------------- made by whoever is first


@pytest.mark.parametrize("before", [None, 0o700, 0o755, 0o777])
def test_a_key_that_is_made_by_itself_lies_in_a_folder_that_only_its_owner_can_enter(
    path: Path, before: int | None
) -> None:
    if before is not None:
        path.parent.mkdir()
        path.parent.chmod(before)
    old = os.umask(0)
    try:
        keys.load_or_create(path, small_key)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_load_or_create_makes_a_key_once(path: Path) -> None:
    first = keys.load_or_create(path, lambda: small_key(1))
    second = keys.load_or_create(path, lambda: small_key(2))
    assert first.fingerprint == second.fingerprint == small_key(1).fingerprint


def test_load_or_create_takes_the_key_of_another_process_that_was_faster(path: Path) -> None:
    def slow() -> SecretKey:
        keys.save(small_key(1), path)  # another process, between the look and the save
        return small_key(2)

    assert keys.load_or_create(path, slow).fingerprint == small_key(1).fingerprint


def test_load_or_create_says_so_when_the_key_there_cannot_be_used(path: Path) -> None:
    keys.save(small_key(), path)
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        keys.load_or_create(path, lambda: small_key(2))


def test_processes_that_start_at_once_end_with_one_key(path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from ciphertune.crypto import keys
from ciphertune.crypto.ckks_secret import generate_key
from ciphertune.crypto.params import CkksParams
path = Path(sys.argv[1])
def create():
    key = generate_key(CkksParams(4096, (54, 20), 40, 64.0))
    print(key.fingerprint.hex(), flush=True)
    sys.stdin.readline()  # all have looked and found none, and have made one of their own
    return key
print(keys.load_or_create(path, create).fingerprint.hex())
"""
    command = [sys.executable, "-c", script, str(path)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(3)
    ]
    made = [p.stdout.readline().strip() for p in started if p.stdout]
    assert len(set(made)) == 3
    for process in started:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    held = [process.communicate(timeout=60)[0].strip() for process in started]
    assert len(set(held)) == 1
    assert held[0] in made
    assert keys.load(path).fingerprint.hex() == held[0]
    assert [p.name for p in path.parent.iterdir()] == ["secret.key"]


# -------------------------------------------------------------------------- why the server never gets a decrypted value


class Eavesdropper:
    """What the server has: parameters, the ciphertext sums of two rounds, and, here, what a client decrypted them to.

    A sum satisfies c0 + c1 s = m modulo q in every slot of the number-theoretic transform. CKKSVector decodes the real
    part only, so a published m gives the sum of the equations of each pair of conjugate slots (i, N-1-i): one equation
    for two slots of s. Two rounds give two, and m is known exactly once it is known to float64.
    """

    def __init__(self, public: CkksPublic) -> None:
        self.public, (self.q,) = public, public.moduli
        self.context = public.context.seal_context().data
        self.encoder = seal.CKKSEncoder(self.context)

    def message(self, published: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
        """m + conjugate of m, in the slots of the transform."""
        plain = seal.Plaintext()
        self.encoder.encode(published.tolist(), 2 * self.public.scale, plain)
        return codec.tail_words(codec.blob_body(codec.Scratch().saved(plain.save)), 4096)

    def key(self, sums: list[bytes], published: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.uint64]:
        """The secret key modulo q, or what comes out instead."""
        q, n = self.q, self.public.params.poly_modulus_degree
        polys = [residues(body, self.public.params)[0, :, 0].astype(object) for body in sums]
        plains = [self.message(values).astype(object) for values in published]
        low, high = np.arange(n // 2), n - 1 - np.arange(n // 2)
        (a, b, e), (c, d, f) = (
            (p[1][low], p[1][high], (m[low] - p[0][low] - p[0][high]) % q) for p, m in zip(polys, plains, strict=True)
        )
        inverse = np.array([pow(int(x), -1, q) for x in (a * d - b * c) % q], object)
        found = np.zeros(n, object)
        found[low], found[high] = (e * d - b * f) * inverse % q, (a * f - e * c) * inverse % q
        return found.astype(np.uint64)


def two_rounds(secret: CkksSecret, clients: int = 10) -> tuple[list[bytes], list[npt.NDArray[np.float64]]]:
    """The server's sums of two rounds, and what a client decrypts them to."""
    rng = np.random.default_rng(0)
    sums = []
    for _ in range(2):
        total = CkksSum(secret.public)
        for _ in range(clients):
            total.add(secret.encrypt(rng.normal(0, 0.05, SEALED.slots)))
        sums.append(total.result(1))
    return sums, [secret.decrypt(body, SEALED.slots) for body in sums]


def test_whoever_is_given_float64_decrypted_sums_recovers_the_key() -> None:
    """Hence no decrypted value ever goes to the server: not for evaluation, not as a checkpoint, not as the result."""
    key = generate_key(SEALED)
    secret = CkksSecret(SEALED, key)
    sums, published = two_rounds(secret)
    found = Eavesdropper(CkksPublic(SEALED)).key(sums, published)
    true = key_residues(key.reveal(), SEALED)[0]
    assert np.array_equal(found, true)

    # and with it any single client's update, of any round
    material = np.stack([found, np.zeros_like(found)]).tobytes()  # the special prime plays no part in decryption
    stolen = CkksSecret(SEALED, SecretKey(material, SEALED.digest()))
    private = np.random.default_rng(1).uniform(-1, 1, SEALED.slots)
    read = stolen.decrypt(secret.encrypt(private), SEALED.slots)
    assert np.abs(read - private).max() <= SEALED.error_bound(1, 1.0)


def test_the_mean_in_float64_gives_the_key_away_as_the_sum_does() -> None:
    key = generate_key(SEALED)
    sums, published = two_rounds(CkksSecret(SEALED, key))
    means = [values / 10 for values in published]
    found = Eavesdropper(CkksPublic(SEALED)).key(sums, [values * 10 for values in means])
    assert np.mean(found == key_residues(key.reveal(), SEALED)[0]) > 0.9


def _as_bfloat16(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


@pytest.mark.parametrize(
    "rounded", [lambda x: x.astype(np.float32).astype(np.float64), _as_bfloat16], ids=["float32", "bfloat16"]
)
def test_rounded_values_resist_this_simple_attack_which_is_no_proof(
    rounded: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
) -> None:
    """A released adapter is rounded. The attack above then finds nothing; a better one is not excluded."""
    key = generate_key(SEALED)
    sums, published = two_rounds(CkksSecret(SEALED, key))
    found = Eavesdropper(CkksPublic(SEALED)).key(sums, [rounded(values) for values in published])
    assert np.mean(found == key_residues(key.reveal(), SEALED)[0]) < 0.01


@pytest.mark.parametrize("rotates", [False, True])
def test_the_folder_is_on_the_disk_for_good_once_the_key_is_in_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, rotates: bool
) -> None:
    """A name that only the system's memory holds is lost with the power: of a rotation, both names."""
    if rotates:
        keys.save(small_key(1), path)
    synced: list[list[str]] = []
    above: list[bool] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        about = os.fstat(descriptor)
        if stat.S_ISDIR(about.st_mode) and not os.path.samestat(about, path.parent.stat()):
            above.append(os.path.samestat(about, path.parent.parent.stat()))  # it holds the new folder's name
        elif stat.S_ISDIR(about.st_mode):
            assert keys.load(path).fingerprint == small_key(2).fingerprint
            synced.append([p.name for p in path.parent.iterdir() if not p.name.startswith(".")])
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if rotates:
        _, kept = keys.rotate(path, small_key(2))
        assert len(synced) == 1 and set(synced[0]) == {path.name, kept.name}
    else:
        keys.save(small_key(2), path)
        assert synced == [[path.name]] and above == [True]


def test_without_files_in_memory_nothing_that_needs_a_key_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    for crypto in ("ckks_packed", "bfv_packed", "ckks"):
        with pytest.raises(CiphertuneError, match="so that no key meets the disk: run it on Linux"):
            build_client.generate_key(compose(CONF, ["method=sealed", f"crypto={crypto}"]).crypto)
