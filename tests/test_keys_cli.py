"""`ciphertune keys`, command by command."""

from __future__ import annotations

import base64
import getpass
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from ciphertune.cli import main
from ciphertune.crypto import keys, recipients, words
from ciphertune.presets import params_digest, preset
from ciphertune.settings import compose

Run = Callable[..., tuple[int, str, str]]
PRESETS = ("bfv_packed", "ckks", "ckks_8192", "ckks_packed", "ckks_packed_48", "ckks_product")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("create", "--out", path)`: exit status, output, errors. In the app's folder, like a user."""
    monkeypatch.chdir(ROOT)

    def call(*arguments: object) -> tuple[int, str, str]:
        status = main(["keys", *map(str, arguments)])
        done = capsys.readouterr()
        return status, done.out, done.err

    return call


def fingerprint(out: str) -> tuple[str, str]:
    """Digits and words, as printed last."""
    return re.findall(r"^fingerprint ([0-9a-f]{32})$", out, re.M)[-1], re.findall(r"^words +(.+)$", out, re.M)[-1]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def beside(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


# ------------------------------------------------------------------------------------------------------------- create


def test_create_writes_a_private_file_and_prints_its_fingerprint_as_digits_and_words(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "lab.key"
    old = os.umask(0)
    try:
        status, out, _ = run("create", "--out", path)
    finally:
        os.umask(old)
    key = keys.load(path)
    assert status == 0 and mode(path) == 0o600 and beside(path) == ["lab.key"]
    assert fingerprint(out) == (key.fingerprint.hex(), words.spoken(key.fingerprint))
    assert key.params_digest == params_digest(compose(ROOT / "conf").crypto)


@pytest.mark.parametrize("out", ["there", "new/", "there/"])
def test_create_in_a_folder_names_the_file_itself(run: Run, tmp_path: Path, out: str) -> None:
    (tmp_path / "there").mkdir()
    assert run("create", "--out", f"{tmp_path}/{out}")[0] == 0
    assert mode(tmp_path / out / "ciphertune.key") == 0o600


def test_create_never_overwrites_a_key(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "lab.key"
    run("create", "--out", path)
    before = path.read_bytes()
    status, out, err = run("create", "--out", path)
    assert (status, out) == (2, "") and "a key file is never overwritten" in err and err.count("\n") == 1
    assert path.read_bytes() == before and beside(path) == ["lab.key"]


def test_create_takes_its_parameters_from_the_overrides(run: Run, tmp_path: Path) -> None:
    assert run("create", "method=she_lora", "--out", tmp_path / "a.key")[0] == 0
    assert run("create", "crypto=bfv_packed", "--out", tmp_path / "b.key")[0] == 0
    assert keys.load(tmp_path / "a.key").params_digest == params_digest(
        compose(ROOT / "conf", "method=she_lora").crypto
    )
    assert keys.load(tmp_path / "b.key").params_digest == params_digest(
        compose(ROOT / "conf", "crypto=bfv_packed").crypto
    )


@pytest.mark.parametrize("override", ["crypto=clear", "method=fedavg", "crypto=nothing", "crypto.bound=0"])
def test_create_refuses_settings_without_a_key_and_bad_ones_in_one_line(
    run: Run, tmp_path: Path, override: str
) -> None:
    status, out, err = run("create", override, "--out", tmp_path / "lab.key")
    assert (status, out) == (2, "") and err.startswith("ciphertune: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------- show


def test_show_says_what_a_key_is_for_and_whose_and_never_the_key(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "lab.key"
    run("create", "--out", path)
    status, out, _ = run("show", path)
    assert status == 0 and fingerprint(out)[0] == keys.load(path).fingerprint.hex()
    assert "parameters  crypto=ckks_packed\n" in out
    assert re.search(r"^file        mode 600, owner \S+, written \d{4}-\d\d-\d\d \d\d:\d\d[+-]\d\d:\d\d$", out, re.M)


@pytest.mark.parametrize("name", PRESETS)
def test_every_named_choice_of_parameters_is_recognised(name: str) -> None:
    method = "she_lora" if name == "ckks_product" else "sealed"
    found = preset(params_digest(compose(ROOT / "conf", f"method={method} crypto={name}").crypto), ROOT / "conf")
    assert found is not None and found[0] == name


def test_every_file_in_conf_is_covered_by_these_tests() -> None:
    assert sorted([*PRESETS, "clear"]) == sorted(p.stem for p in (ROOT / "conf/crypto").glob("*.yaml"))


def test_show_outside_of_the_apps_folder_gives_the_digest_of_the_parameters(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lab.key"
    run("create", "--out", path)
    monkeypatch.chdir(tmp_path)
    digest = keys.load(path).params_digest.hex()
    assert f"parameters  digest {digest} (in the app's folder, or with --app, this names them)" in run("show", path)[1]
    assert "parameters  crypto=ckks_packed" in run("show", path, "--app", ROOT)[1]


def test_show_knows_parameters_that_have_no_name(run: Run, tmp_path: Path) -> None:
    run("create", "crypto.bound=32", "--out", tmp_path / "lab.key")
    assert "none of conf/crypto" in run("show", tmp_path / "lab.key")[1]


def test_show_refuses_what_is_no_key_in_one_line(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "lab.key"
    status, out, err = run("show", path)
    assert (status, out) == (2, "") and "does not exist: make one with `ciphertune keys create" in err
    path.write_text("some text")
    assert "is neither a key file, nor an offer of one, nor a public key" in run("show", path)[2]
    path.unlink()
    run("create", "--out", path)
    path.chmod(0o644)
    status, out, err = run("show", path)
    assert (status, out) == (2, "") and f"chmod 600 {path}" in err and err.count("\n") == 1


# -------------------------------------------------------------------------------------------------------------- check


def test_check_tells_equal_keys_from_different_ones_by_file_digits_and_words(run: Run, tmp_path: Path) -> None:
    one, copy, other = (tmp_path / f"{n}.key" for n in ("one", "copy", "other"))
    run("create", "--out", one)
    run("create", "--out", other)
    copy.touch(0o600)
    copy.write_bytes(one.read_bytes())
    digits, said = fingerprint(run("show", one)[1])
    for same in ([copy], [digits], [":".join(re.findall("..", digits))], [said], said.split()):
        status, out, _ = run("check", one, *same)
        assert status == 0 and out.endswith("same key\n")
    digits, said = fingerprint(run("show", other)[1])
    for different in ([other], [digits], said.split()):
        status, out, _ = run("check", one, *different)
        assert status == 1 and out.endswith(f"another key: {said} was given\n")


def test_check_tells_whether_a_key_was_made_for_the_parameters_of_a_run(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "lab.key"
    run("create", "--out", path)
    assert run("check", path, "method=sealed")[::2] == (0, "")
    assert run("check", path, "method=fedshield", "federation.rounds=3")[0] == 0  # the same parameters
    status, out, _ = run("check", path, "method=she_lora")
    assert status == 1 and out.endswith("made for other parameters: crypto=ckks_packed\n")
    digits, _ = fingerprint(out)
    assert run("check", path, digits, "method=sealed")[0] == 0
    assert run("check", path, digits, "method=she_lora")[0] == 1
    assert run("check", path, "0" * 32, "method=sealed")[0] == 1


@pytest.mark.parametrize(
    ("told", "part"),
    [
        ([], "nothing to compare"),
        (["acorn"], "has 12 words, not 1"),
        (["0" * 31], "has 32 hexadecimal digits, not 31"),
        (["no/such.key"], "no/such.key does not exist"),
        (["method=fedavg"], "use no key"),
        (["method=sealde"], "did you mean sealed?"),
    ],
)
def test_check_refuses_what_it_cannot_compare_with_in_one_line(
    run: Run, tmp_path: Path, told: list[str], part: str
) -> None:
    run("create", "--out", tmp_path / "lab.key")
    status, out, err = run("check", tmp_path / "lab.key", *told)
    assert (status, out) == (2, "") and part in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------- rotate


def test_rotate_makes_a_new_key_for_the_same_parameters_and_keeps_the_old_one(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "lab.key"
    run("create", "method=she_lora", "--out", path)
    old = keys.load(path)
    status, out, _ = run("rotate", path)
    new = keys.load(path)
    assert status == 0 and fingerprint(out) == (new.fingerprint.hex(), words.spoken(new.fingerprint))
    assert new.fingerprint != old.fingerprint and new.params_digest == old.params_digest
    kept = tmp_path / f"lab.key.{old.fingerprint.hex()[:8]}.old"
    assert f"the old key, fingerprint {old.fingerprint.hex()}, is kept in {kept}\n" in out
    assert keys.load(kept).fingerprint == old.fingerprint
    assert mode(path) == mode(kept) == 0o600 and beside(path) == ["lab.key", kept.name]


def test_rotate_changes_the_parameters_only_when_asked_to(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "lab.key"
    run("create", "crypto.bound=32", "--out", path)
    status, out, err = run("rotate", path)
    assert (status, out) == (2, "") and "made for parameters of its own: give the overrides it was made with" in err
    assert beside(path) == ["lab.key"]
    assert run("rotate", path, "crypto=bfv_packed")[0] == 0
    assert keys.load(path).params_digest == params_digest(compose(ROOT / "conf", "crypto=bfv_packed").crypto)


# ------------------------------------------------------------------------------------------------- offer and accept


@pytest.fixture
def sent(run: Run, tmp_path: Path) -> Path:
    """A folder with lab A's key, lab B's identity and an offer."""
    run("create", "--out", tmp_path / "a.key")
    run("identity", "--out", tmp_path / "b.id")
    assert run("offer", tmp_path / "a.key", "--to", tmp_path / "b.id.pub", "--out", tmp_path / "b.offer")[0] == 0
    return tmp_path


def accept(sent: Path, *more: str) -> list[object]:
    return ["accept", sent / "b.offer", "--identity", sent / "b.id", "--out", sent / "b.key", *more]


def test_an_accepted_key_is_the_one_that_was_offered_in_a_private_file(run: Run, sent: Path) -> None:
    old = os.umask(0)
    try:
        status, out, _ = run(*accept(sent))
    finally:
        os.umask(old)
    assert status == 0 and mode(sent / "b.key") == 0o600
    assert (sent / "b.key").read_bytes() == (sent / "a.key").read_bytes()
    assert fingerprint(out)[0] == keys.load(sent / "a.key").fingerprint.hex()
    assert "does not prove who made it: compare these words with the sender by telephone" in out


def test_with_the_fingerprint_that_the_sender_told_no_comparison_is_left_to_do(run: Run, sent: Path) -> None:
    digits, said = fingerprint(run("show", sent / "a.key")[1])
    for told in (said.split(), [said], [digits]):
        status, out, _ = run(*accept(sent, "--expect", *told))
        assert status == 0 and "telephone" not in out
        (sent / "b.key").unlink()


def test_an_offer_of_another_key_than_expected_is_refused_and_nothing_is_written(run: Run, sent: Path) -> None:
    status, out, err = run(*accept(sent, "--expect", *["acorn"] * 12))
    assert (status, out) == (2, "") and "another key than the one expected, nothing was written" in err
    assert words.spoken(keys.load(sent / "a.key").fingerprint) in err and not (sent / "b.key").exists()


def test_a_key_that_the_server_offers_in_place_of_the_labs_is_refused_by_its_words(run: Run, sent: Path) -> None:
    _, said = fingerprint(run("show", sent / "a.key")[1])
    run("create", "--out", sent / "servers.key")
    (sent / "b.offer").unlink()  # the server holds the public key as well, and sends an offer of its own
    run("offer", sent / "servers.key", "--to", sent / "b.id.pub", "--out", sent / "b.offer")
    status, _, err = run(*accept(sent, "--expect", said))
    assert status == 2 and "another key than the one expected" in err and not (sent / "b.key").exists()


def test_an_old_offer_replayed_after_a_rotation_gives_the_old_key_unless_the_new_one_is_expected(
    run: Run, sent: Path
) -> None:
    old = keys.load(sent / "a.key").fingerprint
    _, said = fingerprint(run("rotate", sent / "a.key")[1])
    status, _, err = run(*accept(sent, "--expect", said))
    assert status == 2 and words.spoken(old) in err and said in err and not (sent / "b.key").exists()
    assert run(*accept(sent))[0] == 0 and keys.load(sent / "b.key").fingerprint == old
    assert run("check", sent / "b.key", sent / "a.key")[0] == 1


def test_offer_and_accept_never_overwrite_anything(run: Run, sent: Path) -> None:
    for words_ in (["offer", sent / "a.key", "--to", sent / "b.id.pub", "--out", sent / "b.offer"], accept(sent)):
        (sent / "b.key").touch()
        before = {p: p.read_bytes() for p in sent.iterdir()}
        status, out, err = run(*words_)
        assert (status, out) == (2, "") and "is never overwritten" in err
        assert {p: p.read_bytes() for p in sent.iterdir()} == before


def test_accept_replaces_an_old_key_when_asked_to_and_keeps_it(run: Run, sent: Path) -> None:
    run(*accept(sent))
    old = keys.load(sent / "b.key").fingerprint
    run("rotate", sent / "a.key")
    (sent / "b.offer").unlink()
    run("offer", sent / "a.key", "--to", sent / "b.id.pub", "--out", sent / "b.offer")
    status, out, _ = run(*accept(sent, "--replace"))
    kept = sent / f"b.key.{old.hex()[:8]}.old"
    assert status == 0 and f"is kept in {kept}\n" in out and keys.load(kept).fingerprint == old
    assert run("check", sent / "b.key", sent / "a.key")[0] == 0
    status, _, err = run(*accept(sent, "--replace"))
    assert status == 2 and "holds this key already" in err


def test_the_sender_sees_whose_public_key_it_is_to_compare_it_by_telephone(run: Run, sent: Path) -> None:
    whose = recipients.read_recipient(sent / "b.id.pub")
    told = run("show", sent / "b.id.pub")[1]
    assert told == f"public key  {whose.name}\nwords       {words.spoken(whose.digest)}\n"
    out = run("offer", sent / "a.key", "--to", sent / "b.id.pub", "--out", sent / "again.offer")[1]
    assert told in out and "ask its owner by telephone" in out


def test_show_says_of_an_offer_what_anybody_can_read_in_it(run: Run, sent: Path) -> None:
    status, out, _ = run("show", sent / "b.offer")
    assert status == 0 and fingerprint(out)[0] == keys.load(sent / "a.key").fingerprint.hex()
    assert f"for         {recipients.shown(recipients.read_recipient(sent / 'b.id.pub').digest)}\n" in out
    assert "parameters  crypto=ckks_packed\n" in out and "not proven" in out


@pytest.mark.parametrize("what", ["wrong identity", "public key", "loose identity", "cut off", "no offer", "loose key"])
def test_what_is_wrong_with_a_hand_over_is_said_in_one_line_and_nothing_is_written(
    run: Run, sent: Path, what: str
) -> None:
    call = accept(sent)
    if what == "wrong identity":
        run("identity", "--out", sent / "c.id")
        call[3], part = sent / "c.id", "is for the owner of SHA256:"
    elif what == "public key":
        (sent / "b.id.pub").chmod(0o600)
        call[3], part = sent / "b.id.pub", "is no private key"
    elif what == "loose identity":
        (sent / "b.id").chmod(0o644)
        part = f"chmod 600 {sent / 'b.id'}"
    elif what == "cut off":
        (sent / "b.offer").write_text((sent / "b.offer").read_text()[:999])
        part = "is cut off: ask for it again"
    elif what == "no offer":
        (sent / "b.offer").write_text("hello")
        part = "holds no key offers"
    else:
        (sent / "a.key").chmod(0o644)
        call = ["offer", sent / "a.key", "--to", sent / "b.id.pub", "--out", sent / "x.offer"]
        part = f"chmod 600 {sent / 'a.key'}"
    before = sorted(sent.iterdir())
    status, out, err = run(*call)
    assert (status, out) == (2, "") and part in err and err.count("\n") == 1
    assert sorted(sent.iterdir()) == before


def test_a_locked_identity_is_asked_for_at_a_terminal_only(
    run: Run, sent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_keys_handover import private_key, write_pair

    locked = write_pair(sent / "locked", private_key("ssh-ed25519"), ssh=True, passphrase=b"pass phrase")
    run("offer", sent / "a.key", "--to", sent / "locked/id.pub", "--out", sent / "l.offer")
    call = ["accept", sent / "l.offer", "--identity", locked, "--out", sent / "l.key"]
    status, out, err = run(*call)
    assert (status, out) == (2, "") and "is locked with a passphrase: run this in a terminal" in err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(getpass, "getpass", lambda _: "wrong")
    assert "wrong passphrase, or damaged" in run(*call)[2]
    monkeypatch.setattr(getpass, "getpass", lambda _: "pass phrase")
    status, out, err = run(*call)
    assert status == 0 and "pass phrase" not in out + err


# -------------------------------------------------------------------------------------------------- what is never shown


def test_no_command_and_no_error_shows_anything_secret(run: Run, sent: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(*accept(sent))
    shown = [run("show", sent / n) for n in ("a.key", "b.offer", "b.id.pub", "b.id")]
    shown += [run("check", sent / "a.key", sent / "b.key"), run("check", sent / "a.key", "method=she_lora")]
    shown += [run(*accept(sent)), run("create", "--out", sent / "a.key"), run("identity", "--out", sent / "b.id")]
    (sent / "b.offer").write_text((sent / "b.offer").read_text().replace("A", "B"))
    shown += [run(*accept(sent, "--replace")), run("rotate", sent / "b.key"), run("rotate", sent / "a.key", "method=x")]
    damaged = bytearray((sent / "b.key").read_bytes())
    damaged[500] ^= 1
    (sent / "b.key").write_bytes(damaged)
    shown += [run("show", sent / "b.key"), run("rotate", sent / "b.key")]
    assert {status for status, _, _ in shown} == {0, 1, 2}
    text = "".join(out + err for _, out, err in shown) + caplog.text
    files = [p for p in sent.iterdir() if ".key" in p.name]
    assert len(files) == 3
    secrets = [p.read_bytes()[32:-32] for p in files] + [(sent / "b.id").read_bytes().splitlines()[1]]
    for secret in secrets:
        for at in range(0, len(secret) - 12, 12):
            part = secret[at : at + 12]
            for form in (part.hex(), base64.b64encode(part).decode(), part.decode("latin-1"), repr(part)[2:-1]):
                assert form not in text


# ---------------------------------------------------------------------------------------------- names that are no files


@pytest.mark.parametrize("out", [".", "/", ""])
def test_a_folder_where_a_file_is_to_be_written_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    key, identity = tmp_path / "lab.key", tmp_path / "lab"
    assert run("create", "--out", key)[0] == run("identity", "--out", identity)[0] == 0
    before = beside(key)
    monkeypatch.chdir(tmp_path)
    for words_ in (("identity",), ("offer", key, "--to", f"{identity}.pub")):
        status, _, err = run(*words_, "--out", out)
        assert status == 2 and err.count("\n") == 1 and "is a folder: give the name of a file in it" in err
    assert beside(key) == before


def test_a_name_or_a_fingerprint_of_any_length_is_one_line(run: Run, tmp_path: Path) -> None:
    key, long = tmp_path / "lab.key", "a" * 300
    assert run("create", "--out", key)[0] == 0
    for words_, part in (
        (("check", key, long), "32 hexadecimal digits, not 300"),
        (("check", key, "anchor" * 50), "is no word of a fingerprint"),
        (("check", key, f"./{long}"), "File name too long"),
        (("create", "--out", tmp_path / long), "File name too long"),
        (("identity", "--out", tmp_path / long), "File name too long"),
    ):
        status, _, err = run(*words_)
        assert status == 2 and err.count("\n") == 1 and part in err
    assert beside(key) == ["lab.key"]
