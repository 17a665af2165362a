"""Writes and everything forwarded: what reaches the origin, what the cache forgets and when, what the client hears."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import random
import re
import socket
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kos.s3.sigv4 import presign
from tests.conditions import eventually
from tests.fakes.proxy import ACCESS_KEY, NOW, SECRET_KEY
from tests.fakes.writer import HOST, UNSIGNED, Client, Setup, ask, signed, writer


@pytest.fixture(params=[True], ids=["trailers"])
def trailing(request: Any) -> bool:
    return bool(request.param)


@pytest.fixture
def setup(tmp_path: Path, trailing: bool) -> Iterator[Setup]:
    with writer(tmp_path, trailing_checksums=trailing) as one:
        yield one


def test_a_put_reaches_the_origin_and_is_forgotten(setup: Setup) -> None:
    body = b"some bytes" * 100_000
    headers = {
        "x-amz-meta-colour": "blue",
        "content-type": "text/odd",
        "content-encoding": "gzip",
        "x-amz-acl": "private",
    }
    answer = ask(setup, signed("PUT", "/bucket/a%20key//%C3%A9", (), headers, UNSIGNED, len(body)), body)
    assert answer.status == 200 and answer.headers["etag"].strip('"') == hashlib.md5(body).hexdigest()
    stored = setup.origin.get("bucket", "a key//é")
    assert stored is not None and stored.body == body
    for name, value in headers.items():
        if name != "x-amz-acl":
            assert stored.headers[name] == value
    (request,) = setup.origin.requests
    assert request.headers["x-amz-acl"] == "private" and request.headers["content-length"] == str(len(body))
    assert "kostestkey" not in request.headers["authorization"]
    assert setup.carrier.writes == [("bucket", ("a key//é",))]
    (line,) = setup.proxy.lines
    assert (line.operation, line.status, line.key, line.lane, line.origin_requests) == (
        "PutObject", 200, "a key//é", "slow", 1,
    )  # fmt: skip


def test_the_client_hears_of_a_write_after_the_fence_was_passed(setup: Setup) -> None:
    hold = setup.origin.hold(method="PUT", at="answer")
    client = Client(setup).send(signed("PUT", "/bucket/k", length=1), b"x")
    hold.wait_reached()
    assert setup.carrier.fenced == [("bucket", ("k",))] and setup.carrier.writes == []
    hold.release()
    assert client.answer().status == 200
    assert setup.carrier.fenced == [] and setup.carrier.writes == [("bucket", ("k",))]
    client.abort()


def test_a_client_that_goes_away_in_the_middle_leaves_no_object(setup: Setup) -> None:
    client = Client(setup).send(signed("PUT", "/bucket/k", length=1_000_000), b"x" * 500_000)
    eventually(lambda: setup.origin.requests)
    client.abort()
    eventually(lambda: setup.carrier.writes)
    assert setup.origin.get("bucket", "k") is None
    eventually(lambda: setup.proxy.lines)
    assert setup.proxy.lines[0].status in (400, 499)


def test_a_client_that_goes_away_at_the_end_does_not_end_the_write(setup: Setup) -> None:
    hold = setup.origin.hold(method="PUT", at="answer")
    client = Client(setup).send(signed("PUT", "/bucket/k", length=5), b"hello")
    hold.wait_reached()
    client.abort()
    eventually(lambda: setup.proxy.edge is not None and not setup.proxy.edge.connections)
    assert setup.carrier.fenced == [("bucket", ("k",))]
    hold.release()
    eventually(lambda: setup.carrier.writes)
    stored = setup.origin.get("bucket", "k")
    assert stored is not None and stored.body == b"hello"
    eventually(lambda: setup.proxy.lines)


def test_a_body_that_stands_still_is_given_up(setup: Setup) -> None:
    client = Client(setup).send(signed("PUT", "/bucket/k", length=1_000_000), b"x" * 500_000)
    answer = client.answer()
    assert (answer.status, answer.code, answer.headers["connection"]) == (400, "RequestTimeout", "close")
    assert client.file.read() == b""
    assert setup.origin.get("bucket", "k") is None and setup.carrier.writes == [("bucket", ("k",))]
    client.abort()


def test_an_empty_body_is_checked_before_the_origin_is_asked(setup: Setup) -> None:
    assert ask(setup, signed("PUT", "/bucket/k", payload="0" * 64, length=0)).code == "XAmzContentSHA256Mismatch"
    assert setup.origin.requests == []
    assert ask(setup, signed("PUT", "/bucket/k", payload=hashlib.sha256(b"").hexdigest(), length=0)).status == 200
    (request,) = setup.origin.requests
    assert request.headers["x-amz-content-sha256"] == hashlib.sha256(b"").hexdigest()


def test_a_body_that_fails_its_check_ends_the_origins_connection(setup: Setup) -> None:
    body = b"x" * 3_000_000
    answer = ask(setup, signed("PUT", "/bucket/k", headers={"content-md5": "A" * 22 + "=="}, length=len(body)), body)
    assert (answer.status, answer.code) == (400, "BadDigest")
    assert setup.origin.get("bucket", "k") is None and setup.carrier.writes == [("bucket", ("k",))]


def chunked(body: bytes, trailer: bytes) -> bytes:
    chunks = [body[at : at + 70_000] for at in range(0, len(body), 70_000)]
    encoded = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return encoded + b"0\r\n" + trailer + b"\r\n\r\n"


@pytest.mark.parametrize("trailing", [True, False], indirect=True)
@pytest.mark.parametrize("size", [0, 1, 200_000, 1_000_000])
@pytest.mark.parametrize("fits", [True, False])
def test_a_trailing_checksum(setup: Setup, trailing: bool, size: int, fits: bool) -> None:
    body = b"b" * size
    checksum = base64.b64encode(zlib.crc32(body if fits else b"other").to_bytes(4, "big"))
    wire = chunked(body, b"x-amz-checksum-crc32:" + checksum)
    headers = {
        "content-encoding": "aws-chunked",
        "x-amz-decoded-content-length": str(size),
        "x-amz-trailer": "x-amz-checksum-crc32",
        "x-amz-sdk-checksum-algorithm": "CRC32",
    }
    answer = ask(setup, signed("PUT", "/bucket/k", (), headers, "STREAMING-UNSIGNED-PAYLOAD-TRAILER", len(wire)), wire)
    stored = setup.origin.get("bucket", "k")
    if not fits:
        assert answer.code == "BadDigest" and stored is None
        return
    assert answer.status == 200 and stored is not None and stored.body == body
    assert "content-encoding" not in stored.headers
    (request,) = setup.origin.requests
    if size == 1_000_000 and trailing:
        assert request.headers["x-amz-trailer"] == "x-amz-checksum-crc32"
        assert request.headers["x-amz-content-sha256"] == "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
        return
    assert "x-amz-trailer" not in request.headers and request.headers["content-length"] == str(size)
    if size == 1_000_000:
        # An algorithm that no value follows would be refused.
        assert not any(name.startswith("x-amz-checksum-") for name in request.headers)
        assert "x-amz-sdk-checksum-algorithm" not in request.headers
    else:
        assert request.headers["x-amz-checksum-crc32"] == checksum.decode()
        assert request.headers["x-amz-sdk-checksum-algorithm"] == "CRC32"


def test_many_small_chunks(setup: Setup) -> None:
    body = bytes(range(250)) * 4000
    wire = b"".join(b"258\r\n%b\r\n" % body[at : at + 600] for at in range(0, 999_600, 600))
    wire += b"190\r\n%b\r\n0\r\n\r\n" % body[999_600:]
    headers = {"content-encoding": "aws-chunked", "x-amz-decoded-content-length": str(len(body))}
    head = signed("PUT", "/bucket/k", (), headers, "STREAMING-UNSIGNED-PAYLOAD-TRAILER", len(wire))
    assert ask(setup, head, wire).status == 200
    stored = setup.origin.get("bucket", "k")
    assert stored is not None and stored.body == body


def test_expect_is_answered_after_authentication_and_an_early_refusal_closes(setup: Setup) -> None:
    client = Client(setup).send(signed("PUT", "/bucket/k", headers={"expect": "100-continue"}, length=5))
    assert client.answer().status == 100
    client.send(b"hello")
    assert client.answer().status == 200
    # There is nothing to wait for, but a client that is answered at once may lose count of the answers.
    client.send(signed("PUT", "/bucket/empty", headers={"expect": "100-continue"}, length=0))
    assert [client.answer().status for _ in range(2)] == [100, 200]
    unsigned = re.sub(
        rb"Signature=\w", b"Signature=x", signed("PUT", "/k", headers={"expect": "100-continue"}, length=5)
    )
    client.send(unsigned)
    answer = client.answer()
    assert answer.status in (400, 403) and answer.headers["connection"] == "close"
    assert client.file.read() == b""
    client.abort()


def test_an_early_error_of_the_origin_is_relayed(setup: Setup) -> None:
    setup.origin.fault(method="PUT", status=403, code="AccessDenied", early=True)
    client = Client(setup).send(signed("PUT", "/bucket/k", length=30_000_000), b"x" * 3_000_000)
    threading.Thread(target=_send_quietly, args=(client.socket, b"x" * 27_000_000)).start()
    answer = client.answer()
    # The origin closes with our bytes unread: the reset that follows may overtake its answer.
    assert (answer.status, answer.code) in ((403, "AccessDenied"), (503, "ServiceUnavailable"))
    assert setup.carrier.writes == [("bucket", ("k",))]
    client.abort()


def _send_quietly(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # refused half-way is what is being tested
        connection.sendall(data)


def test_delete_objects_forgets_each_of_them(setup: Setup) -> None:
    for key in ("a", "b/é", "c"):
        setup.origin.put("bucket", key, b"x")
    body = "<Delete><Object><Key>a</Key></Object><Object><Key>b/é</Key></Object></Delete>".encode()
    headers = {"content-md5": base64.b64encode(hashlib.md5(body).digest()).decode()}
    answer = ask(setup, signed("POST", "/bucket", (("delete", ""),), headers, UNSIGNED, len(body)), body)
    assert answer.status == 200 and b"<Deleted>" in answer.body
    assert setup.carrier.writes == [("bucket", ("a", "b/é"))]
    assert setup.origin.get("bucket", "a") is None and setup.origin.get("bucket", "c") is not None
    assert ask(setup, signed("POST", "/bucket", (("delete", ""),), {}, UNSIGNED, 4), b"<xx/").code == "MalformedXML"


def test_deleting_versions_forgets_versions_and_deleting_objects_does_not(setup: Setup) -> None:
    body = b"<Delete><Object><Key>a</Key></Object><Object><Key>b</Key><VersionId>v</VersionId></Object></Delete>"
    headers = {"content-md5": base64.b64encode(hashlib.md5(body).digest()).decode()}
    ask(setup, signed("POST", "/bucket", (("delete", ""),), headers, UNSIGNED, len(body)), body)
    ask(setup, signed("DELETE", "/bucket/k"))
    ask(setup, signed("DELETE", "/bucket/k", (("versionId", "v"),)))
    assert setup.carrier.version_writes == [("b",), (), ("k",)]


def test_a_long_completion_keeps_the_client_waiting_with_blanks_but_ends_after_the_fence(setup: Setup) -> None:
    blanks, document = b" " * 1000, b"<CompleteMultipartUploadResult/>"
    raw = b"HTTP/1.1 200 OK\r\ncontent-type: application/xml\r\nconnection: close\r\n\r\n" + blanks + document
    setup.origin.fault(method="POST", raw=raw)
    answer = ask(setup, signed("POST", "/bucket/k", (("uploadId", "u"),), {}, UNSIGNED, 2), b"<>")
    assert answer.status == 200 and answer.body == blanks + document
    assert setup.carrier.writes == [("bucket", ("k",))]


@pytest.mark.parametrize(
    ("method", "query", "headers"),
    [("DELETE", (), {}), ("PUT", (), {"x-amz-copy-source": "/bucket/source"}), ("PUT", (("tagging", ""),), {})],
)
def test_other_writes_forget_their_key(
    setup: Setup, method: str, query: tuple[tuple[str, str], ...], headers: dict[str, str]
) -> None:
    setup.origin.put("bucket", "source", b"x")
    setup.origin.put("bucket", "k", b"y")
    ask(setup, signed(method, "/bucket/k", query, headers))
    assert setup.carrier.writes == [("bucket", ("k",))]


def test_an_origin_that_is_away_is_said_quickly_and_the_fence_is_passed(setup: Setup) -> None:
    setup.origin.call(setup.origin.down())
    answer = ask(setup, signed("PUT", "/bucket/k", length=1), b"x")
    assert (answer.status, answer.code) == (503, "ServiceUnavailable") and int(answer.headers["retry-after"]) >= 1
    assert setup.carrier.writes == [("bucket", ("k",))]
    answer = ask(setup, signed("GET", "/bucket", (("list-type", "2"),)))
    assert answer.status == 503 and answer.headers["x-amz-request-id"]


def test_what_is_forwarded_passes_unchanged(setup: Setup) -> None:
    for key in ("a", "b"):
        setup.origin.put("bucket", key, b"x")
    answer = ask(setup, signed("GET", "/bucket", (("list-type", "2"), ("prefix", "a +&é"))))
    assert answer.status == 200 and b"ListBucketResult" in answer.body
    assert setup.origin.requests[-1].query["prefix"] == "a +&é"
    answer = ask(setup, signed("HEAD", "/bucket"), head_only=True)
    assert answer.status == 200 and "x-kos-cache" not in answer.headers
    answer = ask(setup, signed("GET", "/bucket/absent", (), {"x-amz-expected-bucket-owner": "1"}))
    assert answer.status in (400, 404) and answer.headers["x-kos-cache"] == "bypass;reason=expected_bucket_owner"
    assert setup.carrier.writes == [] and setup.carrier.opens == 0


def test_a_presigned_put_keeps_what_was_moved_into_the_query(setup: Setup) -> None:
    query = presign(
        "PUT", "/bucket/k", [("x-amz-meta-colour", "blue"), ("x-id", "PutObject")], HOST,
        access_key=ACCESS_KEY, secret_key=SECRET_KEY, region="us-east-1", now=NOW, expires_s=60,
    )  # fmt: skip
    answer = ask(setup, f"PUT /bucket/k?{query} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 1\r\n\r\nx".encode())
    assert answer.status == 200
    (request,) = setup.origin.requests
    assert request.headers["x-amz-meta-colour"] == "blue" and request.query == {"x-id": "PutObject"}
    assert "X-Amz" not in request.raw_query


def signed_chunks(body: bytes, chunk_bytes: int = 65536) -> tuple[bytes, bytes]:
    """(head, wire) of a PUT whose chunks are signed."""
    chunks = [body[at : at + chunk_bytes] for at in range(0, len(body), chunk_bytes)] + [b""]
    wire_length = sum(len(b"%x;chunk-signature=" % len(chunk)) + 64 + 4 + len(chunk) for chunk in chunks)
    headers = {"content-encoding": "aws-chunked,gzip", "x-amz-decoded-content-length": str(len(body))}
    head = signed("PUT", "/bucket/k", (), headers, "STREAMING-AWS4-HMAC-SHA256-PAYLOAD", wire_length)
    seed = re.search(rb"Signature=([0-9a-f]{64})", head)
    date = re.search(rb"x-amz-date: (\d{8}T\d{6}Z)", head)
    assert seed is not None and date is not None
    key = ("AWS4" + SECRET_KEY).encode()
    for part in (date[1][:8], b"us-east-1", b"s3", b"aws4_request"):
        key = hmac.digest(key, part, "sha256")
    scope = date[1][:8].decode() + "/us-east-1/s3/aws4_request"
    previous, wire = seed[1].decode(), b""
    empty = hashlib.sha256(b"").hexdigest()
    for chunk in chunks:
        text = "\n".join(
            ["AWS4-HMAC-SHA256-PAYLOAD", date[1].decode(), scope, previous, empty, hashlib.sha256(chunk).hexdigest()]
        )
        previous = hmac.digest(key, text.encode(), "sha256").hex()
        wire += b"%x;chunk-signature=%b\r\n%b\r\n" % (len(chunk), previous.encode(), chunk)
    return head, wire


@pytest.mark.parametrize(
    ("size", "chunk_bytes"), [(100_000, 65536), (5_000_000, 65536), (3_000_000, 1 << 20), (300_000, 700)]
)
def test_signed_chunks(setup: Setup, size: int, chunk_bytes: int) -> None:
    body = random.Random(size).randbytes(size)
    head, wire = signed_chunks(body, chunk_bytes)
    assert ask(setup, head, wire).status == 200
    stored = setup.origin.get("bucket", "k")
    assert stored is not None and stored.body == body and stored.headers["content-encoding"] == "gzip"
    for at in (chunk_bytes // 2, len(wire) // 2, len(wire) - 200):
        spoiled = bytearray(wire)
        spoiled[at] ^= 1
        answer = ask(setup, head, bytes(spoiled))
        assert (answer.status, answer.code) in ((403, "SignatureDoesNotMatch"), (400, "IncompleteBody"))
    stored = setup.origin.get("bucket", "k")
    assert stored is not None and stored.body == body


def test_a_wrong_chunk_is_refused_before_more_is_sent(setup: Setup) -> None:
    """Though chunks are unpacked ahead of those that are passed on: nothing waits for a client that waits itself."""
    head, wire = signed_chunks(bytes(2_000_000))
    spoiled = bytearray(wire)
    spoiled[300_000] ^= 1
    client = Client(setup).send(head, bytes(spoiled[:1_000_000]))
    answer = client.answer()
    assert (answer.status, answer.code) == (403, "SignatureDoesNotMatch")
    client.abort()
    assert setup.origin.get("bucket", "k") is None


def test_a_client_that_leaves_while_chunks_are_unpacked(setup: Setup) -> None:
    head, wire = signed_chunks(bytes(3_000_000))
    client = Client(setup).send(head, wire[:2_000_000])
    eventually(lambda: setup.origin.requests)
    client.abort()
    eventually(lambda: setup.carrier.writes)
    assert setup.origin.get("bucket", "k") is None
    head, wire = signed_chunks(b"afterwards" * 50_000)
    assert ask(setup, head, wire).status == 200
