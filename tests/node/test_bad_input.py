"""Wrong input from clients, operators and the origin: a clear answer, nothing stored, nothing hangs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.fakes.http import exchange, read_answer, signed
from tests.fakes.node import Node, client, node
from tests.fakes.origin import FakeOrigin


def test_a_bad_signature(shared_node: Node, origin: FakeOrigin) -> None:
    answer = exchange(signed(shared_node, "PUT", "/b/bad", body=b"x", secret_key="wrong"))
    assert (answer.status, answer.code) == (403, "SignatureDoesNotMatch")
    assert answer.headers["content-type"] == "application/xml" and b"<RequestId>" in answer.body
    assert origin.get("b", "bad") is None


def test_a_changed_path_or_query_does_not_verify(shared_node: Node, origin: FakeOrigin) -> None:
    origin.put("b", "signed", b"x")
    origin.put("b", "other", b"y")
    request = signed(shared_node, "GET", "/b/signed")
    request.head = request.head.replace(b"/b/signed", b"/b/other")
    assert exchange(request).code == "SignatureDoesNotMatch"
    request = signed(shared_node, "GET", "/b/signed")
    request.head = request.head.replace(b"/b/signed ", b"/b/signed?versionId=1 ")
    assert exchange(request).code == "SignatureDoesNotMatch"


def test_an_error_to_a_head_has_no_body(shared_node: Node, origin: FakeOrigin) -> None:
    answer = exchange(signed(shared_node, "HEAD", "/b/absent-for-head"))
    assert answer.status == 404 and answer.body == b"" and answer.headers["x-amz-request-id"]
    answer = exchange(signed(shared_node, "HEAD", "/b/x", secret_key="wrong"))
    assert answer.status == 403 and answer.body == b""


def test_ten_mb_of_headers(shared_node: Node, origin: FakeOrigin) -> None:
    request = signed(shared_node, "GET", "/b/x")
    junk = b"".join(b"x-junk-%d: %s\r\n" % (n, b"j" * 1000) for n in range(10_000))
    request.head = request.head[:-2] + junk + b"\r\n"
    try:
        connection = request.open()
    except (ConnectionResetError, BrokenPipeError):
        return  # refused while still being sent: as clear as it gets
    with connection:
        answer = read_answer(connection)
    assert answer.status in (0, 400, 431)
    assert exchange(signed(shared_node, "GET", "/b/absent")).status == 404


@pytest.mark.parametrize(
    "raw",
    [
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /b/k HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET /b/k HTTP/1.1\r\nContent-Length: abc\r\n\r\n",
        b"GET /b/%zz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PUT /b/k HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_no_proper_http(shared_node: Node, origin: FakeOrigin, raw: bytes) -> None:
    request = signed(shared_node, "GET", "/")
    request.head, request.body = raw, b""
    answer = exchange(request)
    assert 400 <= answer.status < 500
    assert b"<Error>" in answer.body and answer.code
    assert origin.requests == []


def test_a_body_shorter_than_announced(shared_node: Node, origin: FakeOrigin) -> None:
    answer = exchange(signed(shared_node, "PUT", "/b/shorter", body=b"12345", length=10), half_close=True)
    assert answer.status in (0, 400)
    assert origin.get("b", "shorter") is None


def test_a_body_longer_than_announced_is_cut_where_it_was_to_end(shared_node: Node, origin: FakeOrigin) -> None:
    """What follows the announced length is, in HTTP, the next request, and no proper one: no part of the object, and
    when it comes in the same read the parser refuses both."""
    with signed(shared_node, "PUT", "/b/longer", body=b"1234567890", length=5).open() as connection:
        first = read_answer(connection).status
        assert first in (200, 400)
        assert read_answer(connection).status in (0, 400)
    stored = origin.get("b", "longer")
    assert (stored is None) if first == 400 else (stored is not None and stored.body == b"12345")


def test_a_payload_hash_that_does_not_hold(shared_node: Node, origin: FakeOrigin) -> None:
    answer = exchange(signed(shared_node, "PUT", "/b/hash", payload="0" * 64, body=b"not that"))
    assert (answer.status, answer.code) == (400, "XAmzContentSHA256Mismatch")
    assert origin.get("b", "hash") is None


@pytest.mark.parametrize(
    "headers",
    [
        {"content-md5": "AAAAAAAAAAAAAAAAAAAAAA=="},
        {"x-amz-checksum-crc32": "AAAAAA=="},
        {"x-amz-checksum-crc32c": "AAAAAA=="},
        {"x-amz-checksum-crc64nvme": "AAAAAAAAAAA="},
        {"x-amz-checksum-sha1": "AAAAAAAAAAAAAAAAAAAAAAAAAAA="},
        {"x-amz-checksum-sha256": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="},
    ],
)
def test_a_checksum_that_does_not_hold(shared_node: Node, origin: FakeOrigin, headers: dict[str, str]) -> None:
    answer = exchange(signed(shared_node, "PUT", "/b/sum", headers=headers, body=b"other bytes" * 1000))
    assert (answer.status, answer.code) == (400, "BadDigest")
    assert origin.get("b", "sum") is None


def test_a_put_without_a_length(shared_node: Node, origin: FakeOrigin) -> None:
    request = signed(shared_node, "PUT", "/b/nolength", length=None)
    assert (exchange(request).status, exchange(request).code) == (411, "MissingContentLength")
    request = signed(shared_node, "PUT", "/b/nolength", length=None)
    request.head = request.head[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
    request.body = b"5\r\nhello\r\n0\r\n\r\n"
    assert exchange(request).status == 411
    assert origin.get("b", "nolength") is None


@pytest.mark.parametrize("spoil", ["signature", "bytes", "short", "long", "junk"])
def test_a_garbled_signed_chunk(shared_node: Node, origin: FakeOrigin, spoil: str) -> None:
    body = {
        "signature": b"5;chunk-signature=" + b"0" * 64 + b"\r\nhello\r\n0;chunk-signature=" + b"0" * 64 + b"\r\n\r\n",
        "bytes": b"5;chunk-signature=" + b"a" * 64 + b"\r\nHELLO\r\n0;chunk-signature=" + b"b" * 64 + b"\r\n\r\n",
        "short": b"5;chunk-signature=" + b"a" * 64 + b"\r\nhel",
        "long": b"500;chunk-signature=" + b"a" * 64 + b"\r\nhello\r\n",
        "junk": b"this is no chunk at all, not even nearly one" * 3,
    }[spoil]
    headers = {"content-encoding": "aws-chunked", "x-amz-decoded-content-length": "5"}
    payload = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
    answer = exchange(signed(shared_node, "PUT", "/b/chunk", headers=headers, payload=payload, body=body))
    assert answer.status in (400, 403) and answer.code
    assert origin.get("b", "chunk") is None


def test_expect_is_answered_only_after_the_signature_was_checked(shared_node: Node, origin: FakeOrigin) -> None:
    request = signed(shared_node, "PUT", "/b/expect", length=5, secret_key="wrong")
    request.head = request.head[:-2] + b"Expect: 100-continue\r\n\r\n"
    with request.open() as connection:
        assert connection.recv(20).startswith(b"HTTP/1.1 403")
    request = signed(shared_node, "PUT", "/b/expect", length=5)
    request.head = request.head[:-2] + b"Expect: 100-continue\r\n\r\n"
    with request.open() as connection:
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"hello")
        assert read_answer(connection).status == 200
    stored = origin.get("b", "expect")
    assert stored is not None and stored.body == b"hello"


def test_gzip_bodies_are_not_unpacked(kos: Any, origin: FakeOrigin) -> None:
    import gzip

    packed = gzip.compress(b"some text" * 100)
    kos.put_object(Bucket="b", Key="packed.gz", Body=packed, ContentEncoding="gzip")
    stored = origin.get("b", "packed.gz")
    assert stored is not None and stored.body == packed and stored.headers["content-encoding"] == "gzip"
    for _ in range(2):
        answer = kos.get_object(Bucket="b", Key="packed.gz")
        assert answer["ContentEncoding"] == "gzip" and answer["Body"].read() == packed


def test_a_wrong_endpoint_is_answered_quickly(own_directory: Path) -> None:
    with node(own_directory, "http://127.0.0.1:9", {"origin": {"retries": 1, "retry_base": "20ms"}}) as one:
        for key in ("a", "b", "c"):
            answer = exchange(signed(one, "GET", f"/b/{key}"))
            assert answer.status == 503 and answer.code in ("ServiceUnavailable", "SlowDown")
            assert int(answer.headers["retry-after"]) >= 1
            answer = exchange(signed(one, "PUT", f"/b/{key}", body=b"hello"))
            assert answer.status == 503


def test_wrong_origin_credentials_are_passed_on(own_directory: Path) -> None:
    origin = FakeOrigin(secrets={"right": "right"})
    with origin.in_thread():
        origin.put("b", "k", b"x")
        with node(own_directory, origin.endpoint, {}) as one:
            with pytest.raises(ClientError) as refusal:
                client(one.s3_url).get_object(Bucket="b", Key="k")
            assert refusal.value.response["Error"]["Code"] == "InvalidAccessKeyId"
            assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
            assert "origin" in one.log_path.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("colour: blue\n", ["colour", "region"]),
        ("workers: many\n", ["workers", "many"]),
        ("cache: {dir: /tmp/x, size: 100Gb}\n", ["cache.size", "100Gb", "GiB"]),
        ("cache: {dir: /tmp/x, sise: 100GiB}\n", ["cache.sise", "size"]),
        ("rules: [{match: '*', freshness: sometimes}]\n", ["freshness", "sometimes", "immutable"]),
        ("listen: {s3: nowhere}\n", ["listen.s3", "nowhere"]),
        ("region: [\n", []),
    ],
)
def test_a_bad_configuration_is_refused_with_what_is_allowed(tmp_path: Path, text: str, said: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    for command in (["check-config", str(path)], ["up", "--config", str(path)]):
        done = subprocess.run(
            [sys.executable, "-m", "koscli", *command], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode not in (0, 1), done
        for word in [str(path), *said]:
            assert word in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
