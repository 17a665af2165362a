"""Completions and copies that take long, and completions that are said twice."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from kos.clock import Clock
from tests.conditions import eventually
from tests.fakes.origin_store import Upload, Version
from tests.fakes.proxy import ACCESS_KEY, SECRET_KEY
from tests.fakes.writer import UNSIGNED, Answer, Client, Setup, ask, signed, writer

DECLARATION = b'<?xml version="1.0" encoding="UTF-8"?>\n'
COMPLETE: dict[str, Any] = {"method": "POST", "path": "/bucket/k", "query": (("uploadId", "u"),)}
COPY: dict[str, Any] = {"method": "PUT", "path": "/bucket/k", "headers": {"x-amz-copy-source": "/bucket/source"}}
PART_COPY: dict[str, Any] = COPY | {"query": (("partNumber", "1"), ("uploadId", "u"))}
THREE = pytest.mark.parametrize("what", [COMPLETE, COPY, PART_COPY], ids=["complete", "copy", "part copy"])


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    with writer(tmp_path, completion_wait_s=0.1) as one:
        yield one


class Slow:
    """A request whose client has been told to wait."""

    def __init__(self, setup: Setup, what: dict[str, Any], body: bytes = b"") -> None:
        self.client = Client(setup).send(signed(**what, length=len(body)), body)
        assert self.client.file.readline() == b"HTTP/1.1 200 OK\r\n"
        self.headers = {}
        while (line := self.client.file.readline().rstrip(b"\r\n")) != b"":
            name, _, value = line.decode("latin-1").partition(": ")
            self.headers[name.lower()] = value
        assert self.headers["transfer-encoding"] == "chunked" and "content-length" not in self.headers

    def chunk(self) -> bytes:
        size = int(self.client.file.readline(), 16)
        text = self.client.file.read(size)
        assert self.client.file.readline() == b"\r\n"
        return text

    def rest(self) -> bytes:
        body = b""
        while piece := self.chunk():
            body += piece
        return body

    def begins_with_blanks(self, blanks: int = 2) -> None:
        assert self.chunk() == DECLARATION
        assert [self.chunk() for _ in range(blanks)] == [b" "] * blanks


@THREE
def test_a_client_is_kept_waiting_by_blanks_and_then_told(setup: Setup, what: dict[str, Any]) -> None:
    setup.origin.put("bucket", "source", b"x")
    setup.origin.store.uploads["u"] = upload()
    hold = setup.origin.hold(at="answer")
    slow = Slow(setup, what, complete(b"x") if what is COMPLETE else b"")
    slow.begins_with_blanks()
    is_write = what is not PART_COPY
    assert setup.carrier.fenced == ([("bucket", ("k",))] if is_write else []) and setup.carrier.writes == []
    hold.release()
    document = slow.rest().lstrip(b" ")
    assert re.match(rb"<(CompleteMultipartUpload|Copy(Object|Part))Result>.*<ETag>", document)
    assert setup.carrier.writes == ([("bucket", ("k",))] if is_write else [])
    # The connection goes on.
    assert slow.client.send(signed("HEAD", "/bucket")).answer(head_only=True).status == 200
    slow.client.abort()


@THREE
def test_an_error_of_the_origin_comes_inside_the_200(setup: Setup, what: dict[str, Any]) -> None:
    hold = setup.origin.hold(at="answer")
    slow = Slow(setup, what, complete(b"x") if what is COMPLETE else b"")
    slow.begins_with_blanks()
    hold.release()
    document = slow.rest().lstrip(b" ")
    assert document.startswith(b"<Error><Code>NoSuch") and document.endswith(b"</Error>")
    assert slow.client.send(signed("HEAD", "/bucket")).answer(head_only=True).status == 200
    slow.client.abort()


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (
            b"HTTP/1.1 502 Bad Gateway\r\nconnection: close\r\ncontent-length: 13\r\n\r\n<html></html>",
            "InternalError",
        ),
        (b"HTTP/1.1 504 Gateway Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", "InternalError"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n<CompleteMul", "ServiceUnavailable"),
        (b"no http", "ServiceUnavailable"),
    ],
)
def test_a_broken_origin_is_an_error_inside_the_200(setup: Setup, raw: bytes, code: str) -> None:
    hold = setup.origin.hold(times=None, at="head")
    setup.origin._faults[0].raw = raw
    slow = Slow(setup, COPY)
    slow.begins_with_blanks(1)
    hold.release()
    document = slow.rest().lstrip(b" ")
    assert re.match(rb"<Error><Code>(\w+)</Code>", document).group(1).decode() == code  # type: ignore[union-attr]
    slow.client.abort()
    eventually(lambda: setup.proxy.lines)
    assert (setup.proxy.lines[0].status, setup.proxy.lines[0].error) == (200, code)
    assert setup.carrier.writes == [("bucket", ("k",))]


def test_a_lost_connection_to_the_origin_is_an_error_inside_the_200(setup: Setup) -> None:
    setup.origin.hold(at="answer")
    slow = Slow(setup, COPY)
    slow.begins_with_blanks(1)
    setup.origin.call(setup.origin.down())
    assert b"<Error><Code>ServiceUnavailable</Code>" in slow.rest()
    slow.client.abort()


def test_an_answer_that_the_origin_has_begun_keeps_its_headers(setup: Setup) -> None:
    """As S3 itself: 200 and its headers at once, blanks, then the document."""
    setup.origin.put("bucket", "source", b"x" * 100)
    hold = setup.origin.hold(at="body")
    setup.origin._faults[0].headers = {"x-amz-version-id": "v7", "content-length": None, "connection": "close"}
    slow = Slow(setup, COPY)
    assert slow.headers["x-amz-version-id"] == "v7" and slow.headers["x-amz-request-id"] != "FAKE1"
    slow.begins_with_blanks(1)
    hold.release()
    assert b"<CopyObjectResult>" in slow.rest()
    slow.client.abort()


def test_a_client_that_goes_away_while_it_waits_ends_nothing(setup: Setup) -> None:
    setup.origin.put("bucket", "source", b"x")
    hold = setup.origin.hold(at="answer")
    slow = Slow(setup, COPY)
    slow.begins_with_blanks(1)
    slow.client.abort()
    eventually(lambda: setup.proxy.edge is not None and not setup.proxy.edge.connections)
    assert setup.carrier.fenced == [("bucket", ("k",))]
    hold.release()
    eventually(lambda: setup.carrier.writes == [("bucket", ("k",))])
    eventually(lambda: setup.proxy.lines)
    assert setup.origin.get("bucket", "k") is not None


def test_a_client_of_http_1_0_gets_the_answer_when_it_is_there(setup: Setup) -> None:
    setup.origin.put("bucket", "source", b"x")
    hold = setup.origin.hold(at="answer")
    client = Client(setup).send(signed(**COPY, length=0).replace(b"HTTP/1.1", b"HTTP/1.0"))
    hold.wait_reached()
    # Longer than it takes until others are told to wait: another client's blanks show it.
    other = setup.origin.hold(at="answer")
    slow = Slow(setup, COPY)
    slow.begins_with_blanks(3)
    other.release()
    hold.release()
    assert client.file.readline().split()[1] == b"200"
    rest = client.file.read()
    assert b"content-length" in rest.lower() and b"chunked" not in rest and rest.endswith(b"</CopyObjectResult>")
    slow.client.abort()
    client.abort()


def test_boto3_takes_a_late_error_for_an_error_and_a_late_result_for_a_result(tmp_path: Path) -> None:
    with writer(tmp_path, clock=Clock(), retries=0, completion_wait_s=0.1) as setup:
        _try_with_boto3(setup)


def _try_with_boto3(setup: Setup) -> None:
    s3 = boto3.client(
        "s3", endpoint_url=setup.proxy.url, region_name="us-east-1", aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )  # fmt: skip
    for op in ("CopyObject", "CompleteMultipartUpload", "UploadPartCopy"):
        for fails in (True, False):
            _late(setup, s3, op, fails)


def _late(setup: Setup, s3: Any, op: str, fails: bool) -> None:
    setup.origin.put("bucket", "source", b"x" * 10)
    setup.origin.store.uploads["u"] = upload()
    parts = {"Parts": [{"PartNumber": 1, "ETag": hashlib.md5(b"x").hexdigest()}]}
    calls: dict[str, Any] = {
        "CopyObject": lambda: s3.copy_object(Bucket="bucket", Key="k", CopySource="bucket/source"),
        "CompleteMultipartUpload": lambda: s3.complete_multipart_upload(
            Bucket="bucket", Key="k", UploadId="u", MultipartUpload=parts
        ),
        "UploadPartCopy": lambda: s3.upload_part_copy(
            Bucket="bucket", Key="k", UploadId="u", PartNumber=1, CopySource="bucket/source"
        ),
    }
    fault = setup.origin.fault(op=op, delay_s=0.3, **({"status": 500, "code": "InternalError"} if fails else {}))
    if fails:
        with pytest.raises(ClientError) as refused:
            calls[op]()
        assert refused.value.response["Error"]["Code"] == "InternalError"
    else:
        answer = calls[op]()
        assert answer.get("ETag") or answer.get("CopyObjectResult", answer.get("CopyPartResult"))["ETag"]
        assert answer["ResponseMetadata"]["HTTPHeaders"]["transfer-encoding"] == "chunked"
    assert fault.used == 1


# -- completions that are said twice


def upload(body: bytes = b"x") -> Upload:
    part = Version(body, f'"{hashlib.md5(body).hexdigest()}"', 0.0, {}, {}, "null")
    return Upload("bucket", "k", {"x-amz-meta-colour": "blue"}, {1: part})


def complete(*bodies: bytes) -> bytes:
    parts = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{hashlib.md5(body).hexdigest()}</ETag></Part>"
        for number, body in enumerate(bodies, 1)
    )
    return f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()


def say(setup: Setup, document: bytes, headers: dict[str, str] | None = None) -> Answer:
    request = signed("POST", "/bucket/k", (("uploadId", "u"),), headers or {}, UNSIGNED, len(document))
    return ask(setup, request, document)


def test_a_completion_whose_answer_was_lost_succeeds_the_second_time(setup: Setup) -> None:
    setup.origin.store.uploads["u"] = upload()
    setup.origin.fault(close=True, reset=True)
    document = complete(b"x")
    assert say(setup, document).status == 503
    assert setup.origin.get("bucket", "k") is not None, "it was carried out"
    secret = {"x-amz-expected-bucket-owner": "1", "x-amz-mp-object-size": "1", "if-none-match": "*"}
    answer = say(setup, document, secret)
    etag = f'"{hashlib.md5(hashlib.md5(b"x").digest()).hexdigest()}-1"'
    assert answer.status == 200 and answer.headers["content-type"] == "application/xml"
    found = dict(re.findall(r"<(\w+)>([^<]*)</", answer.body.decode()))
    assert found == {
        "Location": "http://kos.test/bucket/k", "Bucket": "bucket", "Key": "k", "ETag": etag.replace('"', "&quot;"),
    }  # fmt: skip
    look = setup.origin.requests[-1]
    assert (look.method, look.headers["x-amz-expected-bucket-owner"]) == ("HEAD", "1")
    assert look.headers["x-amz-checksum-mode"] == "ENABLED" and "if-none-match" not in look.headers
    assert setup.carrier.writes == [("bucket", ("k",))] * 2
    assert setup.proxy.lines[-1].origin_requests == 2


def test_what_the_object_has_is_told(setup: Setup) -> None:
    etag = f'"{hashlib.md5(hashlib.md5(b"x").digest()).hexdigest()}-1"'
    checksums = {"x-amz-checksum-crc32": "AAAAAA==-1", "x-amz-checksum-type": "COMPOSITE"}
    setup.origin.put(
        "bucket", "k", b"x", {"x-amz-version-id": "v1", "x-amz-meta-a": "b"}, etag=etag, checksums=checksums
    )
    answer = say(setup, complete(b"x"))
    assert answer.status == 200 and answer.headers["x-amz-version-id"] == "v1" and "x-amz-meta-a" not in answer.headers
    assert b"<ChecksumCRC32>AAAAAA==-1</ChecksumCRC32>" in answer.body
    assert b"<ChecksumType>COMPOSITE</ChecksumType>" in answer.body


@pytest.mark.parametrize("why", ["no object", "another object", "another size", "opaque parts", "no xml", "head fails"])
def test_otherwise_there_is_no_such_upload(setup: Setup, why: str) -> None:
    document, headers = complete(b"x"), {}
    etag = f'"{hashlib.md5(hashlib.md5(b"x").digest()).hexdigest()}-1"'
    if why != "no object":
        setup.origin.put("bucket", "k", b"x", etag=etag if why != "another object" else '"other-1"')
    if why == "another size":
        headers = {"x-amz-mp-object-size": "2"}
    if why == "opaque parts":
        document = document.replace(hashlib.md5(b"x").hexdigest().encode(), b"opaque")
    if why == "no xml":
        document = b"<CompleteMultipartUpload>"
    if why == "head fails":
        setup.origin.fault(method="HEAD", status=403)
    answer = say(setup, document, headers)
    assert (answer.status, answer.code) == (404, "NoSuchUpload")
    looked = setup.origin.count(method="HEAD")
    assert looked == (0 if why in ("opaque parts", "no xml") else 1)


def test_other_errors_of_a_completion_are_the_origins(setup: Setup) -> None:
    setup.origin.store.uploads["u"] = upload()
    setup.origin.put("bucket", "k", b"here")
    assert say(setup, complete(b"x"), {"if-none-match": "*"}).code == "PreconditionFailed"
    assert say(setup, complete(b"x"), {"if-match": '"other"'}).code == "PreconditionFailed"
    assert say(setup, complete(b"x"), {"x-amz-mp-object-size": "9"}).code == "InvalidRequest"
    assert say(setup, complete(b"other")).code == "InvalidPart"
    assert say(setup, b"<what").code == "MalformedXML"
    assert setup.origin.count(method="HEAD") == 0
    setup.origin.fault(status=409, code="ConditionalRequestConflict")
    answer = say(setup, complete(b"x"), {"if-none-match": "*"})
    assert (answer.status, answer.code) == (409, "ConditionalRequestConflict")
    present = setup.origin.get("bucket", "k")
    assert present is not None and say(setup, complete(b"x"), {"if-match": present.etag}).status == 200


# -- whether the origin may still carry out what it said nothing good of


@pytest.mark.parametrize(
    "what", [COPY, {"method": "PUT", "path": "/bucket/k"}, {"method": "DELETE", "path": "/bucket/k"}]
)
@pytest.mark.parametrize(
    ("fault", "status", "settled"),
    [
        ({}, 200, True),
        ({"status": 412}, 412, True),
        ({"status": 503, "times": 2}, 503, False),  # two attempts
        ({"status": 500, "times": 2}, 500, False),
        ({"status": 504}, 200, False),  # the second attempt worked
        ({"close": True}, 200, False),
        ({"close": True, "times": 2}, 503, False),
    ],
)
def test_a_write_is_over_only_when_the_origin_is_known_to_be_done(
    setup: Setup, what: dict[str, Any], fault: dict[str, Any], status: int, settled: bool
) -> None:
    setup.origin.put("bucket", "source", b"x")
    if fault:
        setup.origin.fault(**fault)
    answer = ask(setup, signed(**what, length=0))
    assert answer.status == (204 if (status, what["method"]) == (200, "DELETE") else status)
    assert setup.carrier.settled == [settled]


@pytest.mark.parametrize(("status", "settled"), [(503, False), (500, False), (502, False), (504, False), (409, True)])
def test_a_write_that_is_said_once(setup: Setup, status: int, settled: bool) -> None:
    setup.origin.fault(status=status)
    headers = {"if-none-match": "*"}
    assert ask(setup, signed("PUT", "/bucket/k", (), headers, UNSIGNED, 0)).status == status
    assert setup.carrier.settled == [settled]


def test_an_error_inside_an_early_200_does_not_say_that_all_is_over(setup: Setup) -> None:
    error = b'<?xml version="1.0"?><Error><Code>InternalError</Code></Error>'
    setup.origin.fault(raw=b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n   " + error)
    answer = say(setup, complete(b"x"))
    assert (answer.status, answer.body) == (200, b"   " + error) and setup.carrier.settled == [False]
