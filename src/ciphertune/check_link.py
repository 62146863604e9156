"""The way to the SuperLink, for `ciphertune check`: reached, by TLS, with the right certificate, the clocks alike.

Only `/health` is asked for, which any proxy may answer as well: what counts is who answers.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from ciphertune.errors import SettingsError

_SECONDS = 10.0
_SOON = 14  # days
# Flower takes a node's signature that is up to 5 s from the future or 305 s old; a Date header has whole seconds.
_AHEAD, _BEHIND = 5.0, 300.0
_NAMES_DIFFER = (62, 64)  # OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_TOO_EARLY, _EXPIRED = 9, 10  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED


@dataclass(frozen=True)
class Link:
    """How the node will reach the SuperLink, as `flower-supernode` is told. roots: a file; empty: the system's."""

    address: str
    roots: str = ""
    insecure: bool = False


@dataclass(frozen=True)
class Answer:
    """What came back. until: end of the certificate's validity, None without TLS. ahead: seconds of this clock over the
    server's, None when it did not say.
    """

    text: str
    until: datetime | None
    ahead: float | None


def ask(link: Link) -> Answer:
    """Ask the SuperLink for its health. Raises SettingsError with the remedy when that does not work as it should."""
    host, port = _parts(link.address)
    context = None if link.insecure else _context(link.roots)
    if context is None:
        connection: http.client.HTTPConnection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    else:
        connection = http.client.HTTPSConnection(host, port, timeout=_SECONDS, context=context)
    try:
        connection.connect()
        until = _until(connection.sock)
        connection.request("GET", "/health")
        reply = connection.getresponse()
        now = datetime.now(UTC)
        reply.read(1 << 16)
    except (OSError, http.client.HTTPException) as error:
        raise SettingsError(_remedy(error, link)) from None
    finally:
        connection.close()
    if reply.status >= 500:
        raise SettingsError(f"{link.address} answers {reply.status}: the proxy is up, the SuperLink behind it is not")
    return Answer(
        f"{link.address} answers{' without TLS' if link.insecure else ', TLS verified'}", until, _ahead(reply, now)
    )


def certificate(answer: Answer) -> str:
    """How long the server's certificate is valid. Raises SettingsError when that is soon over."""
    if answer.until is None:
        return "none: the connection is not encrypted (--insecure)"
    days = (answer.until - datetime.now(UTC)).days
    if days < _SOON:
        raise SettingsError(f"valid until {answer.until:%Y-%m-%d}, {days} days: ask the server's operator to renew it")
    return f"valid until {answer.until:%Y-%m-%d}, {days} days"


def clock(answer: Answer) -> str:
    """This clock against the server's. Raises SettingsError when a node would be refused for it."""
    if answer.ahead is None:
        raise SettingsError(
            "the server sends no Date: compare this clock with a time server, e.g. `timedatectl status`"
        )
    seconds = round(abs(answer.ahead))
    told = f"{seconds} s {'ahead of' if answer.ahead > 0 else 'behind'} the server's"
    if not -_BEHIND <= answer.ahead <= _AHEAD:
        raise SettingsError(
            f"this clock is {told}, so this node's signature is refused: `timedatectl set-ntp true` on both"
        )
    return "as the server's, within a second or two" if seconds <= 2 else f"{told}: close enough"


def _parts(address: str) -> tuple[str, int]:
    """Raises SettingsError for what is not HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 1 << 16:
        raise SettingsError(f"--superlink {address!r}: want HOST:PORT, without https://")
    return host.strip("[]"), int(port)


def _context(roots: str) -> ssl.SSLContext:
    """Raises SettingsError when the file of root certificates cannot be used."""
    if roots and not Path(roots).is_file():
        raise SettingsError(f"--root-certificates {roots} does not exist: get ca.crt from the server's operator")
    try:
        return ssl.create_default_context(cafile=roots or None)
    except (OSError, ssl.SSLError):
        raise SettingsError(f"--root-certificates {roots} holds no certificate: get ca.crt anew") from None


def _until(sock: socket.socket | None) -> datetime | None:
    found = sock.getpeercert() if isinstance(sock, ssl.SSLSocket) else None
    if not found:
        return None
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(found["notAfter"])), UTC)


def _ahead(reply: http.client.HTTPResponse, now: datetime) -> float | None:
    """A Date header is cut to whole seconds: half a second is what it lacks in the mean."""
    try:
        then = parsedate_to_datetime(reply.headers["Date"])
    except (TypeError, ValueError):
        return None
    return (now - then.astimezone(UTC)).total_seconds() - 0.5


def _remedy(error: Exception, link: Link) -> str:
    """What to do about a connection that failed."""
    where = link.address
    if isinstance(error, ssl.SSLCertVerificationError):
        return _about_certificate(error, link)
    if isinstance(error, ssl.SSLError):
        return f"{where} does not answer in TLS: is it a SuperLink with --insecure, or another port?"
    if isinstance(error, socket.gaierror):
        return f"{where}: no such host: check the name"
    if isinstance(error, TimeoutError):
        return f"{where} does not answer within {_SECONDS:.0f} s: is a firewall in the way?"
    if isinstance(error, ConnectionRefusedError):
        return f"{where} refuses the connection: is the SuperLink, or its proxy, running, and is this its port?"
    if isinstance(error, http.client.HTTPException | ConnectionResetError):
        hint = ": it may want TLS, leave out --insecure" if link.insecure else ""
        return f"{where} answers something else than HTTP{hint}"
    return f"{where} cannot be reached: {getattr(error, 'strerror', None) or error}"


def _about_certificate(error: ssl.SSLCertVerificationError, link: Link) -> str:
    code, host = error.verify_code, _parts(link.address)[0]
    if code in _NAMES_DIFFER:
        return (
            f"the server's certificate is not for {host}: use a name that it was made for, or have one made for {host}"
        )
    if code == _EXPIRED:
        return f"the certificate of {link.address} has expired: ask its operator to renew it (or this clock is ahead)"
    if code == _TOO_EARLY:
        return f"the certificate of {link.address} is not valid yet: this clock is behind, `timedatectl set-ntp true`"
    roots = f"by {link.roots}" if link.roots else "by an authority of this system: give --root-certificates ca.crt"
    return f"the certificate of {link.address} is not signed {roots}: get the server's ca.crt, by a way you trust"
