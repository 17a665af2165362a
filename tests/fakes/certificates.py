"""An authority and certificates that it signs, for servers on the loopback: made once per test session.

ca_file() is what a client must trust; server() is a pair of files that a node serves with. make() makes further pairs,
for tests of what happens when they change. Everything lies in one temporary directory, removed at exit.
"""

from __future__ import annotations

import datetime
import functools
import ipaddress
import ssl
import tempfile
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_PEM = serialization.Encoding.PEM


class Pair(NamedTuple):
    """A certificate and its key, in files."""

    cert_file: Path
    key_file: Path

    def context(self) -> ssl.SSLContext:
        """For a server of a test's own."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.cert_file, self.key_file)
        return context


class _Authority(NamedTuple):
    directory: tempfile.TemporaryDirectory[str]
    key: ec.EllipticCurvePrivateKey
    cert: x509.Certificate
    file: Path


def ca_file() -> Path:
    """The authority's certificate: with it as the only trusted one, a client accepts every pair made here."""
    return _authority().file


@functools.cache
def server() -> Pair:
    """The session's pair: for 127.0.0.1, localhost, s3.kos.test and names below that, valid for a day."""
    return make(Path(_authority().directory.name), "node")


def client_context() -> ssl.SSLContext:
    """What trusts the authority and nobody else."""
    return ssl.create_default_context(cafile=str(ca_file()))


def make(directory: Path, name: str, *, lasts: datetime.timedelta = datetime.timedelta(days=1)) -> Pair:
    """A new pair NAME.crt, NAME.key in directory. lasts: from now, cut to seconds; a negative one has ended already."""
    authority = _authority()
    key = ec.generate_private_key(ec.SECP256R1())
    until = datetime.datetime.now(datetime.UTC).replace(microsecond=0) + lasts
    names: list[x509.GeneralName] = [
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.DNSName("localhost"),
        x509.DNSName("s3.kos.test"),
        x509.DNSName("*.s3.kos.test"),
        # Of "*.localhost" OpenSSL thinks as of "*.com": too much for one certificate.
        x509.DNSName("s3.localhost"),
        x509.DNSName("*.s3.localhost"),
    ]
    cert = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(authority.cert.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(until - datetime.timedelta(days=30))
        .not_valid_after(until)
        .add_extension(x509.SubjectAlternativeName(names), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), False)
        .sign(authority.key, hashes.SHA256())
    )
    pair = Pair(directory / f"{name}.crt", directory / f"{name}.key")
    pair.cert_file.write_bytes(cert.public_bytes(_PEM))
    pair.key_file.write_bytes(key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return pair


@functools.cache
def _authority() -> _Authority:
    directory = tempfile.TemporaryDirectory(prefix="kos-test-tls-")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kos test authority")])
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .add_extension(usage, True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA256())
    )
    file = Path(directory.name) / "ca.pem"
    file.write_bytes(cert.public_bytes(_PEM))
    return _Authority(directory, key, cert, file)
