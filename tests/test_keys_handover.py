"""Handing a key over: only the one it was made for opens an offer, and nothing in it can be changed."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa, x448, x25519
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from hypothesis import given, settings
from hypothesis import strategies as st

from ciphertune.crypto import handover, keys, recipients, words
from ciphertune.crypto.secret import SecretKey
from ciphertune.errors import KeyFileError

KEY = SecretKey(bytes(range(256)) * 8, b"digest of params")
needs_ssh = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="no OpenSSH here")
SSH = ("ssh-ed25519", "ecdsa-256", "ecdsa-384", "ecdsa-521", "ssh-rsa")
KINDS = ("x25519", *SSH)
WRONG = re.compile(
    r"is damaged: ask for it again|is cut off: ask for it again|key offers: want one|is not a ciphertune key offer"
    r"|is for the owner of SHA256:"
)


def private_key(kind: str) -> Any:
    if kind == "x25519":
        return x25519.X25519PrivateKey.generate()
    if kind == "ssh-ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if kind == "ssh-rsa":
        return rsa.generate_private_key(65537, 2048)
    return ec.generate_private_key({"256": ec.SECP256R1(), "384": ec.SECP384R1(), "521": ec.SECP521R1()}[kind[-3:]])


def write_pair(folder: Path, key: Any, *, ssh: bool, passphrase: bytes = b"") -> Path:
    """A private key and its .pub in the form of OpenSSH, or in PEM."""
    how = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    form = serialization.PrivateFormat.OpenSSH if ssh else serialization.PrivateFormat.PKCS8
    folder.mkdir(exist_ok=True)
    path = folder / "id"
    path.touch(0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, how))
    public = (
        (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        if ssh
        else (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    path.with_name("id.pub").write_bytes(key.public_key().public_bytes(*public) + b" someone@lab\n" * ssh)
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A private key of every kind; its public key is beside it."""
    root = tmp_path_factory.mktemp("pairs")
    return {kind: write_pair(root / kind, private_key(kind), ssh=kind in SSH) for kind in KINDS}


def identity(path: Path) -> recipients.Identity:
    def nobody() -> bytes:
        raise AssertionError("no passphrase is needed")

    return recipients.read_identity(path, nobody)


def recipient(path: Path) -> recipients.Recipient:
    return recipients.read_recipient(path.with_name(path.name + ".pub"))


def offer(path: Path, to: Path, key: SecretKey = KEY) -> Path:
    path.write_text(handover.seal(key, recipient(to)))
    return path


# ----------------------------------------------------------------------------------------------------------- offers


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipient_gets_exactly_the_key_that_was_offered(pairs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    found = handover.open_(offer(tmp_path / "o", pairs[kind]), identity(pairs[kind]))
    assert (found.reveal(), found.params_digest, found.fingerprint) == (
        KEY.reveal(),
        KEY.params_digest,
        KEY.fingerprint,
    )


def test_an_offer_has_the_documented_layout(pairs: dict[str, Path], tmp_path: Path) -> None:
    path = offer(tmp_path / "o", pairs["x25519"])
    lines = path.read_text().splitlines()
    assert (lines[0], lines[-1]) == (
        "-----BEGIN CIPHERTUNE KEY OFFER-----",
        "-----END CIPHERTUNE KEY OFFER-----",
    )
    data = base64.b64decode("".join(lines[1:-1]))
    public = serialization.load_pem_public_key(pairs["x25519"].with_name("id.pub").read_bytes())
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    head = b"CTOFFER\1" + hashlib.sha256(der).digest() + KEY.fingerprint + KEY.params_digest
    assert data[:72] == head
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    private = serialization.load_pem_private_key(pairs["x25519"].read_bytes(), None)
    assert isinstance(private, x25519.X25519PrivateKey)
    assert suite.decrypt(data[72:], private, info=head) == keys.pack(KEY)


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ecdsa-384", "ssh-rsa"])
def test_keys_in_pem_are_the_same_recipients_as_in_the_form_of_openssh(tmp_path: Path, kind: str) -> None:
    key = private_key(kind)
    pem, ssh = write_pair(tmp_path / "pem", key, ssh=False), write_pair(tmp_path / "ssh", key, ssh=True)
    assert recipient(pem).digest == recipient(ssh).digest == identity(pem).recipient.digest
    assert handover.open_(offer(tmp_path / "o", pem), identity(ssh)).fingerprint == KEY.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_else_opens_an_offer_and_the_error_names_both_public_keys(
    pairs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    path = offer(tmp_path / "o", pairs[kind])
    others = {k: p for k, p in pairs.items() if k != kind}
    others["same kind"] = write_pair(tmp_path / "twin", private_key(kind), ssh=kind in SSH)
    for other in others.values():
        with pytest.raises(KeyFileError) as caught:
            handover.open_(path, identity(other))
        assert recipients.shown(recipient(pairs[kind]).digest) in str(caught.value)
        assert recipient(other).name in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_offer_whose_name_was_changed_to_another_recipient_is_not_opened_by_them(
    pairs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    path = offer(tmp_path / "o", pairs[kind])
    _, data = handover.read(path)
    twin = write_pair(tmp_path / "twin", private_key(kind), ssh=kind in SSH)
    rewrite(path, data[:8] + recipient(twin).digest + data[40:])
    with pytest.raises(KeyFileError, match="is damaged: ask for it again"):
        handover.open_(path, identity(twin))


def rewrite(path: Path, data: bytes) -> None:
    """An offer of other bytes, in a form that is in order."""
    path.write_text("\n".join((handover.BEGIN, base64.b64encode(data).decode(), handover.END)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_changed_byte_of_an_offer_is_refused(pairs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    path, who = offer(tmp_path / "o", pairs[kind]), identity(pairs[kind])
    _, data = handover.read(path)
    head = 72 + (256 + 12 if kind == "ssh-rsa" else 133)  # the header, and what was agreed with the recipient's key
    for at in {*range(0, head, 1 if kind == "x25519" else 7), *range(head, len(data), 97), len(data) - 1}:
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        rewrite(path, bytes(changed))
        with pytest.raises(KeyFileError, match=WRONG):
            handover.open_(path, who)


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_flipped_bit_anywhere_in_the_text_gives_no_other_key(
    pairs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, at: float, bit: int
) -> None:
    path = offer(tmp_path_factory.getbasetemp() / "flipped", pairs["x25519"])
    text = bytearray(path.read_bytes())
    text[int(at * len(text))] ^= 1 << bit
    path.write_bytes(bytes(text))
    try:  # a bit that base64 does not use, or one of a space, changes nothing
        assert handover.open_(path, identity(pairs["x25519"])).reveal() == KEY.reveal()
    except KeyFileError as error:
        assert WRONG.search(str(error))


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_of_an_offer_is_refused(pairs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    path, who = offer(tmp_path / "o", pairs[kind]), identity(pairs[kind])
    text, (_, data) = path.read_text(), handover.read(path)
    for length in {*range(0, len(text) - 2, 61), len(handover.BEGIN), len(text) - 2}:  # the last line's end may go
        path.write_text(text[:length])
        with pytest.raises(KeyFileError, match=WRONG):
            handover.open_(path, who)
    for length in {0, 7, 8, 71, 72, 73, 100, len(data) - 1}:
        rewrite(path, data[:length])
        with pytest.raises(KeyFileError, match=WRONG):
            handover.open_(path, who)
    rewrite(path, data + b"\0")
    with pytest.raises(KeyFileError, match=WRONG):
        handover.open_(path, who)


def test_what_mail_does_to_text_does_not_hurt_an_offer(pairs: dict[str, Path], tmp_path: Path) -> None:
    path, who = offer(tmp_path / "o", pairs["x25519"]), identity(pairs["x25519"])
    text = path.read_text()
    for mailed in (
        text.replace("\n", "\r\n"),
        "Dear colleagues,\n\nhere it is.\n" + text + "\nBest wishes\n",
        "\n".join("   " + line + "  " for line in text.splitlines()),
        text.rstrip("\n"),
    ):
        path.write_bytes(mailed.encode())
        assert handover.open_(path, who).fingerprint == KEY.fingerprint


def test_a_file_of_two_offers_is_refused(pairs: dict[str, Path], tmp_path: Path) -> None:
    path = offer(tmp_path / "o", pairs["x25519"])
    path.write_text(path.read_text() * 2)
    with pytest.raises(KeyFileError, match="holds 2 key offers: want one"):
        handover.read(path)


@given(content=st.binary(max_size=300))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_other_file_is_no_offer(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "other"
    for data in (
        content,
        f"{handover.BEGIN}\n".encode() + content,
        f"{handover.BEGIN}\n".encode() + base64.b64encode(content) + f"\n{handover.END}".encode(),
    ):
        path.write_bytes(data)
        with pytest.raises(KeyFileError, match=WRONG):
            handover.read(path)


def test_an_offer_that_holds_another_key_than_it_says_is_refused(
    pairs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = keys.pack(SecretKey(b"other" * 100, KEY.params_digest))
    monkeypatch.setattr(keys, "pack", lambda _: packed)
    path = offer(tmp_path / "o", pairs["x25519"])
    with pytest.raises(KeyFileError, match="holds another key than it says: do not use it"):
        handover.open_(path, identity(pairs["x25519"]))


def test_two_offers_of_one_key_to_one_lab_have_no_ciphertext_in_common(pairs: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        one, two = (handover.read(offer(tmp_path / n, pairs[kind]))[1] for n in ("a", "b"))
        assert one[:72] == two[:72]
        blocks = [{data[i : i + 16] for i in range(72, len(data) - 15)} for data in (one, two)]
        assert not blocks[0] & blocks[1]


def test_an_offer_shows_nothing_of_the_key(pairs: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        path = offer(tmp_path / "o", pairs[kind])
        found, data = handover.read(path)
        assert (found.fingerprint, found.params_digest) == (KEY.fingerprint, KEY.params_digest)
        assert not any(KEY.reveal()[i : i + 8] in data for i in range(len(KEY.reveal()) - 8))
        assert len(data) < len(keys.pack(KEY)) + 72 + 300


# ---------------------------------------------------------------------------------------------------- public keys


@needs_ssh
def test_a_public_key_is_shown_as_ssh_keygen_shows_it(pairs: dict[str, Path]) -> None:
    for kind in SSH:
        public = pairs[kind].with_name("id.pub")
        said = subprocess.run(["ssh-keygen", "-lf", public], capture_output=True, text=True, check=True).stdout
        assert recipients.shown(recipient(pairs[kind]).digest) == said.split()[1]


@needs_ssh
def test_keys_that_ssh_keygen_makes_can_be_used(tmp_path: Path) -> None:
    for number, kind in enumerate((["ed25519"], ["ecdsa", "-b", "384"], ["rsa", "-b", "2048"])):
        path = tmp_path / str(number)
        subprocess.run(["ssh-keygen", "-q", "-t", *kind, "-N", "", "-C", "two words", "-f", path], check=True)
        assert handover.open_(offer(tmp_path / "o", path), identity(path)).fingerprint == KEY.fingerprint


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
def test_keys_that_openssl_makes_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "id"
    path.touch(0o600)
    subprocess.run(["openssl", "genpkey", "-algorithm", "X25519", "-out", path], check=True)
    path.chmod(0o600)
    subprocess.run(["openssl", "pkey", "-in", path, "-pubout", "-out", tmp_path / "id.pub"], check=True)
    assert handover.open_(offer(tmp_path / "o", path), identity(path)).fingerprint == KEY.fingerprint


def refused(path: Path, content: bytes, part: str) -> None:
    path.write_bytes(content)
    with pytest.raises(KeyFileError) as caught:
        handover.seal(KEY, recipients.read_recipient(path))
    assert part in str(caught.value)


def ssh_line(kind: bytes, *parts: bytes) -> bytes:
    blob = b"".join(len(part).to_bytes(4, "big") + part for part in (kind, *parts))
    return kind + b" " + base64.b64encode(blob)


def test_public_keys_that_cannot_be_encrypted_to_are_refused_with_the_remedy(
    pairs: dict[str, Path], tmp_path: Path
) -> None:
    path, remedy = tmp_path / "x.pub", "make an identity with `ciphertune keys identity --out lab.id`"
    raw = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    refused(
        path, ssh_line(b"sk-ssh-ed25519@openssh.com", raw, b"ssh:"), "hardware token, which can only sign: " + remedy
    )
    pem = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    for key in (
        x448.X448PrivateKey.generate(),
        ed448.Ed448PrivateKey.generate(),
        ec.generate_private_key(ec.SECP256K1()),
    ):
        refused(path, key.public_key().public_bytes(*pem), remedy)
    short = rsa.generate_private_key(65537, 1024).public_key().public_bytes(*pem)
    refused(path, short, "RSA key of 1024 bits is too short to encrypt to: " + remedy)
    line = pairs["ssh-ed25519"].with_name("id.pub").read_bytes()
    refused(path, line + line, "holds 2 lines where one public key is expected")
    refused(path, b"", "holds 0 lines")
    refused(path, b"ssh-dss AAAA", "is no public key of these kinds: ssh-ed25519,")
    refused(path, b"ssh-ed25519-cert-v01@openssh.com AAAA", "is no public key of these kinds")
    refused(path, b"restrict " + line, "is no public key of these kinds")
    refused(path, b"ssh-ed25519 AAAA", "is damaged or no public key: ask for it again")
    refused(path, b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "is damaged or no public key")
    refused(path, b"\xff\xfe\x00" * 10, "is no public key of these kinds")
    refused(path, b"a" * 100_000, "is too large for a public key")
    refused(path, pairs["ssh-ed25519"].read_bytes(), "is a private key: its owner keeps it")
    with pytest.raises(KeyFileError, match=r"cannot read public key .*: No such file"):
        recipients.read_recipient(tmp_path / "absent.pub")


def test_points_of_small_order_are_refused(tmp_path: Path) -> None:
    pem = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    for point in (bytes(32), b"\1" + bytes(31)):
        public = x25519.X25519PublicKey.from_public_bytes(point).public_bytes(*pem)
        refused(tmp_path / "x.pub", public, "is no valid key: ask for it again")
        refused(tmp_path / "e.pub", ssh_line(b"ssh-ed25519", point), "no valid one: ask for it again")


def test_comments_and_empty_lines_around_a_public_key_do_not_matter(pairs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.pub"
    path.write_bytes(b"# lab b\n\n" + pairs["ecdsa-384"].with_name("id.pub").read_bytes() + b"\n")
    assert recipients.read_recipient(path).digest == recipient(pairs["ecdsa-384"]).digest


# ----------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_an_identity_is_private_whatever_the_umask_and_its_public_key_is_not(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        made = recipients.create_identity(tmp_path / "lab.id")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "lab.id").stat().st_mode) == 0o600
    assert (tmp_path / "lab.id.pub").stat().st_mode & 0o777 == 0o644 & ~umask
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lab.id", "lab.id.pub"]
    assert recipient(tmp_path / "lab.id").digest == made.digest == identity(tmp_path / "lab.id").recipient.digest
    assert "PRIVATE" not in (tmp_path / "lab.id.pub").read_text()
    assert handover.open_(offer(tmp_path / "o", tmp_path / "lab.id"), identity(tmp_path / "lab.id")).reveal()


@pytest.mark.parametrize("there", ["lab.id", "lab.id.pub"])
def test_an_identity_never_overwrites_anything_and_leaves_no_half_of_itself(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("kept")
    with pytest.raises(KeyFileError, match="is never overwritten"):
        recipients.create_identity(tmp_path / "lab.id")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(there, "kept")]


def test_an_identity_that_others_can_read_is_refused(pairs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "id"
    path.write_bytes(pairs["ssh-ed25519"].read_bytes())
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match=r"is readable by others \(mode 640\): chmod 600"):
        identity(path)


@pytest.mark.parametrize("ssh", [True, False])
def test_a_locked_identity_is_opened_by_its_passphrase_and_by_no_other(tmp_path: Path, ssh: bool) -> None:
    path = write_pair(tmp_path / "locked", private_key("ecdsa-384"), ssh=ssh, passphrase=b"four words or so")
    who = recipients.read_identity(path, lambda: b"four words or so")
    assert handover.open_(offer(tmp_path / "o", path), who).fingerprint == KEY.fingerprint
    for wrong in (b"three words", b""):
        with pytest.raises(KeyFileError) as caught:
            recipients.read_identity(path, lambda wrong=wrong: wrong)
        assert str(caught.value) == f"cannot open identity {path}: wrong passphrase, or damaged"


def test_what_is_no_identity_is_refused(pairs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "id"
    path.touch(0o600)
    for content, part in (
        (pairs["x25519"].with_name("id.pub").read_bytes(), "is no private key: --identity wants the one that belongs"),
        (b"", "is no private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "wrong passphrase, or damaged"),
        (pairs["ssh-rsa"].read_bytes()[:600], "wrong passphrase, or damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(KeyFileError) as caught:
            identity(path)
        assert part in str(caught.value)
    with pytest.raises(KeyFileError, match="does not exist: make an identity with"):
        identity(tmp_path / "absent")


def test_nothing_secret_is_in_the_repr_of_an_identity(pairs: dict[str, Path]) -> None:
    for path in pairs.values():
        shown = repr(identity(path)) + repr(identity(path).recipient) + str(identity(path).key)
        assert "PRIVATE KEY-----" not in shown and re.search(r"[0-9a-f]{64}", shown) is None


def test_the_words_of_a_recipient_follow_from_the_whole_public_key(pairs: dict[str, Path]) -> None:
    said = {words.spoken(recipient(path).digest) for path in pairs.values()}
    assert len(said) == len(pairs)
