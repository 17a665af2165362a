"""A certificate that changes while it is served with: what is taken, what is not, what is said about it."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kos import metrics
from kos.config import Listen
from kos.errors import ConfigError
from kosproxy.certificate import LOOK_EVERY_S, Certificate
from tests.conditions import until
from tests.fakes import certificates
from tests.fakes.certificates import Pair
from tests.fakes.clock import FakeClock

HOUR = datetime.timedelta(hours=1)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def listen(pair: Pair) -> Listen:
    return Listen(s3_tls="127.0.0.1:0", tls_cert_file=str(pair.cert_file), tls_key_file=str(pair.key_file))


def served(certificate: Certificate) -> int:
    """The serial number that a client sees now."""
    from cryptography import x509

    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = certificates.client_context().wrap_bio(back, there, server_hostname="localhost")
    server = certificate.context().wrap_bio(there, back, server_side=True)
    for _ in range(3):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    der = client.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


def now() -> float:
    return datetime.datetime.now(datetime.UTC).timestamp()


def failures() -> float:
    return float(metrics.TLS_RELOAD_FAILURES._value.get())


async def test_a_new_pair_is_taken_as_soon_as_it_is_whole(
    tmp_path: Path, threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """Rewritten one after the other, the certificate in two writes."""
    old = certificates.make(tmp_path, "served", lasts=HOUR)
    certificate = Certificate(listen(old))
    first, before = served(certificate), failures()
    assert not await certificate.renew(now(), threads)
    (tmp_path / "new").mkdir()
    new = certificates.make(tmp_path / "new", "served", lasts=3 * HOUR)
    pem = new.cert_file.read_bytes()
    with caplog.at_level(logging.INFO):
        for content in (b"", pem[:300], pem):
            old.cert_file.write_bytes(content)
            for _ in range(2):
                assert not await certificate.renew(now(), threads)
                assert served(certificate) == first
        assert failures() == before + 2, "each complaint once: no certificate, a key of another"
        said = [record.__dict__.get("reason", "") for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(said) == 2 and "tls_cert_file" in said[0] and "a key that does not fit" in said[1]
        old.key_file.write_bytes(new.key_file.read_bytes())
        assert await certificate.renew(now(), threads)
    assert served(certificate) != first
    assert certificate.not_after == pytest.approx(now() + 3 * 3600, abs=60)
    assert not await certificate.renew(now(), threads), "and nothing has changed since"


async def test_a_link_that_is_turned_to_another_directory(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    """As Kubernetes renews a mounted secret: tls.crt -> ..data/tls.crt, ..data -> a directory with a new name."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pair = certificates.make(tmp_path / name, "tls", lasts=HOUR)
    data = tmp_path / "..data"
    data.symlink_to("one")
    mounted = Pair(tmp_path / "tls.crt", tmp_path / "tls.key")
    for file in mounted:
        file.symlink_to(f"..data/{file.name}")
    certificate = Certificate(listen(mounted))
    first = served(certificate)
    fresh = tmp_path / "..data_tmp"
    fresh.symlink_to("two")
    os.replace(fresh, data)
    shutil.rmtree(tmp_path / "one")
    assert await certificate.renew(now(), threads)
    assert served(certificate) == served(Certificate(listen(pair))) != first


async def test_what_is_gone_for_a_while(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    pair = certificates.make(tmp_path, "served", lasts=HOUR)
    certificate = Certificate(listen(pair))
    first, before = served(certificate), failures()
    key = pair.key_file.read_bytes()
    pair.key_file.unlink()
    for _ in range(3):
        assert not await certificate.renew(now(), threads)
    assert failures() == before + 1
    pair.key_file.write_bytes(key)
    assert await certificate.renew(now(), threads)
    assert served(certificate) == first


async def test_an_expired_one_does_not_replace_a_valid_one(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    pair = certificates.make(tmp_path, "served", lasts=HOUR)
    certificate = Certificate(listen(pair))
    first = served(certificate)
    certificates.make(tmp_path, "served", lasts=-HOUR)
    assert not await certificate.renew(now(), threads)
    assert served(certificate) == first
    # An hour later neither is good: then the files' is what the operator wants.
    assert await certificate.renew(now() + 3700, threads)


async def test_asked_for_it_reads_again(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    certificate = Certificate(listen(certificates.make(tmp_path, "served", lasts=HOUR)))
    before = certificate.context()
    certificate.reload()
    assert await certificate.renew(now(), threads)
    assert certificate.context() is not before
    assert not await certificate.renew(now(), threads)


async def test_it_looks_by_itself(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    import asyncio

    pair = certificates.make(tmp_path, "served", lasts=HOUR)
    certificate = Certificate(listen(pair))
    clock = FakeClock(now())
    watching = asyncio.ensure_future(certificate.watch(clock, threads))
    await until(lambda: clock.sleepers)
    gauge = metrics.TLS_NOT_AFTER.labels("s3")._value
    assert gauge.get() == certificate.not_after
    first = certificate.not_after
    certificates.make(tmp_path, "served", lasts=2 * HOUR)
    await clock.advance(LOOK_EVERY_S)
    await until(lambda: certificate.not_after > first)
    assert gauge.get() == certificate.not_after
    watching.cancel()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda pair: pair.cert_file.unlink(), ["listen.tls_cert_file", ".crt", "No such file", "may read"]),
        (lambda pair: pair.key_file.unlink(), ["listen.tls_key_file", ".key", "No such file"]),
        (lambda pair: pair.cert_file.write_text("hello"), ["listen.tls_cert_file", "no whole certificate", "PEM"]),
        (lambda pair: pair.key_file.write_text("hello"), ["tls_key_file", ".key", "PEM files"]),
        (
            lambda pair: pair.cert_file.write_text(
                "-----BEGIN CERTIFICATE-----\nMIIBAAAA\n-----END CERTIFICATE-----\n"
            ),
            ["listen.tls_cert_file", "no certificate that can be read"],
        ),
        (lambda pair: encrypt(pair), ["listen.tls_key_file", "a key with a passphrase", "without one"]),
        (lambda pair: pair.cert_file.write_bytes(b"x" * (2 << 20)), ["listen.tls_cert_file", "more than"]),
        (lambda pair: another_kind(pair), ["listen.tls_key_file", "a key that does not fit the certificate in"]),
    ],
    ids=["no certificate", "no key", "no PEM", "no key PEM", "no DER", "passphrase", "huge", "another kind of key"],
)
def test_in_which_words_a_start_fails(tmp_path: Path, spoil: object, said: list[str]) -> None:
    pair = certificates.make(tmp_path, "served")
    spoil(pair)  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        Certificate(listen(pair))
    for words in said:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def another_kind(pair: Pair) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048)
    pair.key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def encrypt(pair: Pair) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(pair.key_file.read_bytes(), None)
    pair.key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )


@pytest.mark.parametrize("year", [2049, 2050, 2999])
def test_until_when_it_holds(tmp_path: Path, year: int) -> None:
    """Both forms of a time, the one with two digits of a year and the one with four."""
    wanted = datetime.datetime(year, 6, 1, 12, 30, 15, tzinfo=datetime.UTC)
    lasts = wanted - datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    certificate = Certificate(listen(certificates.make(tmp_path, "served", lasts=lasts)))
    assert certificate.not_after == pytest.approx(wanted.timestamp(), abs=2)
