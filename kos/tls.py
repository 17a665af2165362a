"""A server's certificate: from two PEM files to an SSL context, and in which words that fails.

Owns: what kos accepts as a certificate and key, the versions and ciphers that it speaks, when the certificate ends.
Does not own: serving with it or noticing that the files changed (kosproxy.certificate), TLS towards the origin
(kos.origin.lane).

Invariant: a context from `load` holds a certificate and the key that fits it.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Final

from kos.config import Listen
from kos.errors import ConfigError

#: For TLS 1.2: forward secrecy (ECDHE) and authenticated encryption, nothing else, as RFC 9325 section 4.2 recommends.
#: The suites of TLS 1.3 all are of that kind and are not set here.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
#: A chain of certificates is a few KiB.
_FILE_BYTES_MAX: Final = 1 << 20

#: What OpenSSL says to another certificate's key: one of the same kind, one of another kind.
_ANOTHER_KEY: Final = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
_BEGIN: Final = "-----BEGIN CERTIFICATE-----"
_END: Final = "-----END CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A certificate ready to serve with. not_after: the end of its validity, seconds since the epoch."""

    context: ssl.SSLContext
    not_after: float


def load(listen: Listen) -> Loaded:
    """Read listen.tls_cert_file and listen.tls_key_file. Blocks on the disk; ConfigError names option, file and remedy."""
    cert, key = listen.tls_cert_file, listen.tls_key_file
    assert cert is not None and key is not None
    pem = _read("listen.tls_cert_file", cert)
    _read("listen.tls_key_file", key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[listen.tls_min_version]
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    # No renegotiation: a client could make the node compute handshakes without end on one connection.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    try:
        not_after = _not_after(pem)
    except ValueError as error:
        raise _refused(
            "listen.tls_cert_file", cert, str(error), "a certificate in PEM, the node's own first"
        ) from error
    try:
        context.load_cert_chain(cert, key, password=_no_passphrase)
    except ssl.SSLError as error:
        if error.reason in _ANOTHER_KEY:
            found = f"a key that does not fit the certificate in {cert}"
            raise _refused("listen.tls_key_file", key, found, "the key that the certificate was made for") from error
        found = f"no usable certificate and key: {(error.reason or str(error)).lower().replace('_', ' ')}"
        where = f"{cert} and {key}"
        raise _refused("listen.tls_cert_file, listen.tls_key_file", where, found, "PEM files") from error
    except _Encrypted as error:
        raise _refused("listen.tls_key_file", key, "a key with a passphrase", "a PEM key without one") from error
    except OSError as error:
        raise _refused("listen.tls_key_file", key, error.strerror or str(error), "a file that can be read") from error
    return Loaded(context, not_after)


class _Encrypted(Exception):
    """The key wants a passphrase."""


def _no_passphrase() -> str:
    # Without this OpenSSL would ask for it on the terminal and wait.
    raise _Encrypted


def _refused(option: str, path: str, found: str, allowed: str) -> ConfigError:
    return ConfigError(f"{option}: {path}: found {found}, allowed: {allowed}")


def _read(option: str, path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise _refused(option, path, error.strerror or str(error), "a PEM file that kos may read") from error
    if len(content) > _FILE_BYTES_MAX:
        raise _refused(option, path, f"more than {_FILE_BYTES_MAX} bytes", "a PEM file")
    return content.decode("latin-1")


def _not_after(pem: str) -> float:
    """The end of the first certificate's validity, seconds since the epoch. ValueError: that is no certificate."""
    _, begin, rest = pem.partition(_BEGIN)
    body, end, _ = rest.partition(_END)
    if not begin or not end:
        raise ValueError("no whole certificate")
    # Here and not above: its 9 MiB are for who speaks https.
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate((begin + body + end).encode("latin-1"))
        return certificate.not_valid_after_utc.timestamp()
    except (ValueError, x509.InvalidVersion) as error:
        raise ValueError("no certificate that can be read") from error
