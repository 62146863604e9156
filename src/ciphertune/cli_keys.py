"""`ciphertune keys`: make, look at, compare and replace the key that all clients share, and hand it to another lab."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ciphertune.errors import CiphertuneError, KeyFileError, SettingsError

if TYPE_CHECKING:
    from ciphertune.crypto.recipients import Recipient
    from ciphertune.crypto.secret import SecretKey
    from ciphertune.settings import CryptoSettings

_OVERRIDES = "the run's method and crypto overrides: they set the parameters"


def add_keys(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `keys` and its actions to the command line."""
    group = commands.add_parser("keys", help="make, compare, replace and hand over key files")
    actions = group.add_subparsers(required=True, metavar="action")

    def add(name: str, action: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        one = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        one.set_defaults(action=action)
        return one

    create = add("create", _create, "make the key that all clients of a federation share")
    create.add_argument("overrides", nargs="*", help=_OVERRIDES)
    create.add_argument("--out", required=True, help="file to write, or a folder; nothing is ever overwritten")
    show = add("show", _show, "print the fingerprint of a key file, an offer or a public key; never the key itself")
    show.add_argument("file", type=Path)
    check = add("check", _check, "compare a key file with another, with a fingerprint, or with what a run needs")
    check.add_argument("file", type=Path)
    check.add_argument(
        "overrides",
        nargs="*",
        metavar="with",
        help="another key file, or a fingerprint as hexadecimal digits or words; and overrides of a run "
        "(exit status 0: they agree, 1: they do not)",
    )
    rotate = add("rotate", _rotate, "put a new key in the place of an old one, which is kept beside it")
    rotate.add_argument("file", type=Path)
    rotate.add_argument("overrides", nargs="*", help=f"{_OVERRIDES} (default: those of the old key)")
    for one in (create, show, check, rotate):
        one.add_argument("--app", type=Path, default=Path(), help="folder of the Flower app (default: here)")

    identity = add(
        "identity", _identity, "make a key pair to be sent keys under: FILE stays here, FILE.pub is given away"
    )
    identity.add_argument("--out", type=Path, required=True, help="file to write; never overwritten")
    offer = add("offer", _offer, "encrypt a key file for another lab, so that it may travel by mail or the server")
    offer.add_argument("file", type=Path)
    offer.add_argument("--to", type=Path, required=True, metavar="FILE.pub", help="the other lab's public key")
    offer.add_argument("--out", type=Path, required=True, help="file to write; never overwritten")
    accept = add("accept", _accept, "take the key out of an offer that was made for this lab")
    accept.add_argument("file", type=Path, metavar="offer")
    accept.add_argument("--identity", type=Path, required=True, help="the private key that the offer was made for")
    accept.add_argument("--out", required=True, help="key file to write, or a folder; nothing is ever overwritten")
    accept.add_argument(
        "--expect", nargs="+", metavar="WORD", help="the fingerprint that the sender told you: words, or digits"
    )
    accept.add_argument("--replace", action="store_true", help="in the place of an old key, which is kept beside it")


def _create(options: argparse.Namespace) -> int:
    from ciphertune.build_client import generate_key
    from ciphertune.crypto import keys

    key, path = generate_key(_wanted(options)), _file(options.out)
    keys.save(key, path)
    print(f"wrote {path} (mode 600)")
    _tell(key.fingerprint)
    print("hand it to every client with `ciphertune keys offer`, and never to the server")
    return 0


def _show(options: argparse.Namespace) -> int:
    from ciphertune.crypto import handover, keys, recipients

    path: Path = options.file
    start = _start(path)
    if start.startswith(keys.MAGIC):
        key = keys.load(path)
        _tell(key.fingerprint)
        print(f"parameters  {_parameters(key.params_digest, options.app)}")
        print(f"file        {_about(path)}")
    elif b"BEGIN CIPHERTUNE KEY OFFER" in start:
        offer, _ = handover.read(path)
        _tell(offer.fingerprint)
        print(f"parameters  {_parameters(offer.params_digest, options.app)}")
        print(f"for         {recipients.shown(offer.recipient)}")
        print("not proven before it is accepted: anybody can make an offer that says this")
    elif b"PUBLIC KEY-----" in start or start.startswith((b"ssh-", b"ecdsa-")):
        _tell_recipient(recipients.read_recipient(path))
    elif start:
        raise KeyFileError(f"{path} is neither a key file, nor an offer of one, nor a public key")
    else:
        keys.load(path)  # absent, empty, or not ours to read: says which
    return 0


def _check(options: argparse.Namespace) -> int:
    from ciphertune.crypto import keys, words
    from ciphertune.presets import params_digest

    overrides = [word for word in options.overrides if "=" in word]
    told = [word for word in options.overrides if "=" not in word]
    if not options.overrides:
        raise KeyFileError(
            f"nothing to compare {options.file} with: give another key file, a fingerprint, or a run's overrides"
        )
    key, agrees = keys.load(options.file), True
    other = _fingerprint(told) if told else b""
    options.overrides = overrides
    wanted = params_digest(_wanted(options)) if overrides else b""
    _tell(key.fingerprint)
    if told:
        agrees = words.agree(key.fingerprint, other)
        print("same key" if agrees else f"another key: {words.spoken(other)} was given")
    if overrides:
        fits = key.params_digest == wanted
        was = _parameters(key.params_digest, options.app)
        print(f"made for the parameters of this run: {was}" if fits else f"made for other parameters: {was}")
        agrees = agrees and fits
    return 0 if agrees else 1


def _rotate(options: argparse.Namespace) -> int:
    from ciphertune.build_client import generate_key
    from ciphertune.crypto import keys

    crypto = _wanted(options) if options.overrides else _crypto_of(keys.load(options.file), options)
    key = generate_key(crypto)
    _tell_kept(*keys.rotate(options.file, key))
    print(f"wrote {options.file} (mode 600)")
    _tell(key.fingerprint)
    print("hand it to every client with `ciphertune keys offer`; a run that is under way goes on with the old key only")
    return 0


def _identity(options: argparse.Namespace) -> int:
    from ciphertune.crypto.recipients import create_identity

    recipient = create_identity(options.out)
    print(f"wrote {options.out} (mode 600: it stays here) and {options.out}.pub (to be given away)")
    _tell_recipient(recipient)
    return 0


def _offer(options: argparse.Namespace) -> int:
    from ciphertune.crypto import handover, keys
    from ciphertune.crypto.private_files import write_new
    from ciphertune.crypto.recipients import read_recipient

    key, recipient = keys.load(options.file), read_recipient(options.to)
    write_new(options.out, handover.seal(key, recipient).encode(), "an offer", 0o644)
    print(f"wrote {options.out}")
    _tell_recipient(recipient)
    print("ask its owner by telephone whether these are the words of that public key, then read them those of the key:")
    _tell(key.fingerprint)
    return 0


def _accept(options: argparse.Namespace) -> int:
    from ciphertune.crypto import handover, keys, words
    from ciphertune.crypto.recipients import read_identity

    path = _file(options.out)
    expected = words.parse(" ".join(options.expect)) if options.expect else None
    key = handover.open_(options.file, read_identity(options.identity, lambda: _passphrase(options.identity)))
    if expected is not None and not words.agree(key.fingerprint, expected):
        raise KeyFileError(
            f"offer {options.file} holds another key than the one expected, nothing was written. "
            f"It holds: {words.spoken(key.fingerprint)}. Expected: {words.spoken(expected)}"
        )
    if options.replace:
        _tell_kept(*keys.rotate(path, key))
    else:
        keys.save(key, path)
    print(f"wrote {path} (mode 600)")
    _tell(key.fingerprint)
    if expected is None:
        print("an offer does not prove who made it: compare these words with the sender by telephone before you use it")
    return 0


# --- what they have in common -----------------------------------------------------------------------------------------


def _file(out: str) -> Path:
    """The key file that `--out` means: it, or in a folder that is there or ends with a slash, ciphertune.key."""
    path = Path(out).expanduser()
    try:
        return path / "ciphertune.key" if out.endswith("/") or path.is_dir() else path
    except OSError as error:  # a name that is too long
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from None


def _wanted(options: argparse.Namespace) -> CryptoSettings:
    """What the overrides ask for. Raises SettingsError where that needs no key."""
    from ciphertune.launch import app_folder
    from ciphertune.settings import compose

    crypto = compose(app_folder(options.app) / "conf", options.overrides).crypto
    if crypto.backend == "clear":
        raise SettingsError("these settings encrypt nothing and use no key: name a method or crypto=... that does")
    return crypto


def _crypto_of(key: SecretKey, options: argparse.Namespace) -> CryptoSettings:
    """The named parameters that a key was made for. Raises SettingsError where none is."""
    from ciphertune.launch import app_folder
    from ciphertune.presets import preset

    found = preset(key.params_digest, app_folder(options.app) / "conf")
    if found is None:
        raise SettingsError(f"{options.file} was made for parameters of its own: give the overrides it was made with")
    return found[1]


def _parameters(digest: bytes, app: Path) -> str:
    """What a key was made for, as far as the app's folder tells."""
    from ciphertune.launch import app_folder
    from ciphertune.presets import preset

    try:
        found = preset(digest, app_folder(app) / "conf")
    except CiphertuneError:
        return f"digest {digest.hex()} (in the app's folder, or with --app, this names them)"
    return f"crypto={found[0]}" if found else f"digest {digest.hex()}, none of conf/crypto"


def _fingerprint(told: Sequence[str]) -> bytes:
    """Of another key file, or as somebody told it."""
    from ciphertune.crypto import keys, words

    text = " ".join(told)
    try:
        is_file = len(told) == 1 and (bool(set(text) & set("./")) or Path(text).exists())
    except OSError:  # longer than the name of a file can be
        is_file = False
    return keys.load(Path(text)).fingerprint if is_file else words.parse(text)


def _tell(fingerprint: bytes) -> None:
    """A key's fingerprint: as messages and logs have it, and to be read out."""
    from ciphertune.crypto import words

    print(f"fingerprint {fingerprint.hex()}\nwords       {words.spoken(fingerprint)}")


def _tell_kept(old: SecretKey, kept: Path) -> None:
    print(f"the old key, fingerprint {old.fingerprint.hex()}, is kept in {kept}")


def _tell_recipient(recipient: Recipient) -> None:
    from ciphertune.crypto import words

    print(f"public key  {recipient.name}\nwords       {words.spoken(recipient.digest)}")


def _start(path: Path) -> bytes:
    """The first bytes of a file, to see of which kind it is; none where it cannot be read, which is said later."""
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def _about(path: Path) -> str:
    """Mode, owner and time of a file."""
    import pwd
    from datetime import datetime

    found = path.stat()
    try:
        owner = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:  # no name in this container
        owner = str(found.st_uid)
    written = datetime.fromtimestamp(found.st_mtime).astimezone().isoformat(" ", "minutes")
    return f"mode {found.st_mode & 0o777:03o}, owner {owner}, written {written}"


def _passphrase(path: Path) -> bytes:
    """Ask for it where there is somebody to ask: it is never an argument or a variable of the environment."""
    import getpass

    if not sys.stdin.isatty():
        raise KeyFileError(f"identity {path} is locked with a passphrase: run this in a terminal, which can ask for it")
    try:
        return getpass.getpass(f"passphrase of {path}: ").encode()
    except EOFError:
        raise KeyFileError(f"no passphrase was given for identity {path}") from None
