"""Make what a SuperLink needs for TLS: an authority of its own, and a certificate for the names it is reached by.

    python deploy/certificates.py FOLDER NAME [NAME ...]

FOLDER/authority/ca.key       signs; needed again for the next certificate, and by no running program
FOLDER/public/ca.crt          given to every lab and to whoever submits runs; valid 730 days
FOLDER/server/server.key,crt  the server's; valid 90 days, for every NAME, localhost and 127.0.0.1
FOLDER/superexec/secret       what a SuperExec in a process of its own proves itself with

Nothing is ever overwritten, and all but ca.crt and server.crt can be read by their owner alone. To renew, remove
FOLDER/server and run it again: the authority is used once more, and no lab has to do anything. A lab that must not
trust an authority any longer is given a new one.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
import secrets
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ciphertune.crypto.private_files import read_private, read_public, write_new
from ciphertune.errors import CiphertuneError, SettingsError

AUTHORITY_DAYS, SERVER_DAYS = 730, 90
_EARLY = timedelta(hours=1)  # for clocks that are behind this one
_NAME = re.compile(r"(?=.{1,253}$)(\*\.)?([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z0-9-]{1,63}")


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing in the folder. 0: done; 2: refused, with one line saying why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("names", nargs="+", metavar="NAME", help="host name or address of the server, without a port")
    options = parser.parse_args(arguments)
    try:
        certificate = make(options.folder, options.names)
    except CiphertuneError as error:
        print(f"certificates.py: {error}", file=sys.stderr)
        return 2
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    print(f"wrote {options.folder}/server, valid until {certificate.not_valid_after_utc:%Y-%m-%d}, for")
    print(*(f"  {name.value}" for name in names), sep="\n")
    print(f"give {options.folder}/public/ca.crt to every lab")
    return 0


def make(folder: Path, names: list[str]) -> x509.Certificate:
    """The server's certificate, and what else is missing. Raises SettingsError or KeyFileError before it overwrites."""
    wanted = [_general(name) for name in dict.fromkeys([*names, "localhost", "127.0.0.1"])]
    for file in (folder / "server/server.key", folder / "server/server.crt"):
        if file.exists():
            raise SettingsError(f"{file} exists and is never overwritten: to renew it, remove {folder}/server first")
    key, authority = _authority(folder)
    own = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(names[0], own.public_key(), authority.subject, SERVER_DAYS, authority.not_valid_after_utc)
    certificate = (
        builder.add_extension(x509.SubjectAlternativeName(wanted), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    write_new(folder / "server/server.key", _private(own), "a private key")
    write_new(
        folder / "server/server.crt", certificate.public_bytes(serialization.Encoding.PEM), "a certificate", 0o644
    )
    if not (folder / "superexec/secret").exists():
        write_new(folder / "superexec/secret", secrets.token_hex(32).encode(), "a secret")
    return certificate


def _authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The authority in the folder, or a new one. Raises KeyFileError or SettingsError when only half of it is there."""
    private, public = folder / "authority/ca.key", folder / "public/ca.crt"
    if private.exists() or public.exists():
        absent = f"the authority of {public} cannot sign without it; to begin anew, remove {public}"
        pem = read_private(private, "private key", absent)
        try:
            key = serialization.load_pem_private_key(pem, None)
            certificate = x509.load_pem_x509_certificate(read_public(public, "certificate", 1 << 16))
        except (ValueError, TypeError):
            raise SettingsError(f"{private} and {public} are no authority: remove both, and make one anew") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
            raise SettingsError(f"{private} and {public} do not belong together: remove both, and make one anew")
        return key, certificate
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ciphertune {secrets.token_hex(4)}")])
    certificate = (
        _builder(name, key.public_key(), name, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    write_new(private, _private(key), "a private key")
    write_new(public, certificate.public_bytes(serialization.Encoding.PEM), "a certificate", 0o644)
    return key, certificate


def _builder(
    subject: str | x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    days: int,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    if isinstance(subject, str):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject[:64])])
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(min(end, latest) if latest else end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, sign: bool) -> x509.KeyUsage:
    """For the authority to sign certificates, for the server to prove itself."""
    others = {
        "content_commitment": False,
        "key_encipherment": False,
        "data_encipherment": False,
        "key_agreement": False,
    }
    return x509.KeyUsage(
        digital_signature=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        encipher_only=False,
        decipher_only=False,
        **others,
    )


def _general(name: str) -> x509.GeneralName:
    """An address or a host name. Raises SettingsError for anything else."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not _NAME.fullmatch(name):
            raise SettingsError(f"{name!r} is no host name and no address: give it without a port") from None
        return x509.DNSName(name)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


if __name__ == "__main__":
    sys.exit(main())
