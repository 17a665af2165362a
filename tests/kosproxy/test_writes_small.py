"""Uploads that are held whole: verified before the origin is asked, sent again, and no connection kept by a slow client."""

from __future__ import annotations

import base64
import gc
import hashlib
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kos.s3 import completion
from kos.s3.sigv4 import presign
from kosproxy.exchange import Exchange
from tests.conditions import eventually
from tests.fakes.proxy import ACCESS_KEY, NOW, SECRET_KEY
from tests.fakes.writer import HOST, UNSIGNED, Client, Setup, ask, signed, writer

TRAILERS = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    with writer(tmp_path, connections=2, retries=2, held_bodies_bytes=9 << 20, body_timeout_s=5.0) as one:
        yield one


def crc32(body: bytes) -> str:
    return base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()


def with_trailer(body: bytes, value: str, name: str = "x-amz-checksum-crc32") -> tuple[bytes, dict[str, str]]:
    framed = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    headers = {"content-encoding": "aws-chunked", "x-amz-decoded-content-length": str(len(body)), "x-amz-trailer": name}
    return framed + f"0\r\n{name}:{value}\r\n\r\n".encode(), headers


@pytest.mark.parametrize("size", [1, 4096, 200_000])
def test_what_fails_its_check_is_never_begun(setup: Setup, size: int) -> None:
    body = b"x" * size
    for headers in ({"content-md5": "A" * 22 + "=="}, {"x-amz-checksum-crc32": crc32(b"other")}):
        assert ask(setup, signed("PUT", "/bucket/k", (), headers, UNSIGNED, size), body).code == "BadDigest"
    assert setup.origin.requests == [] and setup.carrier.writes == []


@pytest.mark.parametrize("size", [1, 60_000, 200_000])
@pytest.mark.parametrize("fault", [{"close": True, "reset": True}, {"status": 503}, {"close": True, "after": "head"}])
def test_what_is_held_is_sent_again(setup: Setup, size: int, fault: dict[str, object]) -> None:
    setup.origin.fault(**fault)
    body = bytes(range(256)) * (size // 256) + b"e" * (size % 256)
    wire, headers = with_trailer(body, crc32(body))
    assert ask(setup, signed("PUT", "/bucket/k", (), headers, TRAILERS, len(wire)), wire).status == 200
    first, second = setup.origin.requests
    assert second.body == body and second.headers["x-amz-checksum-crc32"] == crc32(body)
    assert first.headers["content-length"] == second.headers["content-length"] == str(size)
    assert setup.carrier.writes == [("bucket", ("k",))]


@pytest.mark.parametrize(
    "headers",
    [
        {"if-none-match": "*"},
        {"if-match": '"e"'},
        {"x-amz-copy-source-if-match": "e", "x-amz-copy-source": "/bucket/k"},
    ],
)
def test_a_conditional_write_is_not_sent_again(setup: Setup, headers: dict[str, str]) -> None:
    """Interleaving: carried out, the answer lost; a second time it would be told that the object is there already."""
    setup.origin.fault(close=True)
    answer = ask(setup, signed("PUT", "/bucket/k", (), headers, UNSIGNED, 0))
    assert (answer.status, answer.code) == (503, "ServiceUnavailable") and len(setup.origin.requests) == 1


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("PUT", "/other", ()),
        ("DELETE", "/bucket", ()),
        ("DELETE", "/bucket/k", (("uploadId", "u"),)),
        ("POST", "/bucket/k", (("uploads", ""),)),
        ("POST", "/bucket/k", (("uploadId", "u"),)),
        ("PUT", "/bucket/k", (("renameObject", ""),)),
    ],
)
def test_what_can_be_done_once_only_is_not_sent_again(
    setup: Setup, method: str, path: str, query: tuple[tuple[str, str], ...]
) -> None:
    setup.origin.fault(close=True)
    assert ask(setup, signed(method, path, query, {}, UNSIGNED, 0)).status == 503
    assert len(setup.origin.requests) == 1


@pytest.mark.parametrize("size", [1000, 250_000])
def test_slow_clients_hold_no_connection_to_the_origin(setup: Setup, size: int) -> None:
    """Two connections, eight clients that have sent all but the last byte: a ninth is served."""
    waiting = [Client(setup).send(signed("PUT", f"/bucket/slow{n}", length=size), b"x" * (size - 1)) for n in range(8)]
    assert ask(setup, signed("PUT", "/bucket/quick", length=1), b"q").status == 200
    assert [each.key for each in setup.origin.requests] == ["quick"]
    for client in waiting:
        assert client.send(b"x").answer().status == 200
        client.abort()
    assert setup.origin.count(key="slow7") == 1


def test_a_large_upload_takes_its_connection_with_its_first_bytes(setup: Setup) -> None:
    waiting = [Client(setup).send(signed("PUT", f"/bucket/slow{n}", length=1_000_000)) for n in range(8)]
    assert ask(setup, signed("PUT", "/bucket/quick", length=1), b"q").status == 200
    assert [each.key for each in setup.origin.requests] == ["quick"] and setup.proxy.origin._places._value == 2
    for client in waiting:
        client.abort()
    eventually(lambda: len(setup.proxy.lines) == 9)


@pytest.mark.parametrize("size", [4095, 4096, 4097, 8193])
@pytest.mark.parametrize("form", ["plain", "md5", "header", "trailer"])
@pytest.mark.parametrize("cut", [1, 1500, 4096, 100_000])
def test_around_the_size_up_to_which_bodies_are_held(tmp_path: Path, size: int, form: str, cut: int) -> None:
    body = bytes(number % 251 for number in range(size))
    wire, headers, payload = body, {}, UNSIGNED
    if form == "md5":
        headers = {"content-md5": base64.b64encode(hashlib.md5(body).digest()).decode()}
    elif form == "header":
        headers = {"x-amz-checksum-crc32": crc32(body)}
    elif form == "trailer":
        payload, (wire, headers) = TRAILERS, with_trailer(body, crc32(body))
    with writer(tmp_path, relay_buffer_bytes=4096) as setup:
        head = signed("PUT", "/bucket/k", (), headers, payload, len(wire))
        step = max(cut, size // 50)
        assert ask(setup, head, *(wire[at : at + step] for at in range(0, len(wire), step))).status == 200
        found = setup.origin.get("bucket", "k")
        assert found is not None and found.body == body
        (request,) = setup.origin.requests
        assert ("x-amz-trailer" in request.headers) == (form == "trailer" and size > 4096)
        assert found.checksums == ({"x-amz-checksum-crc32": crc32(body)} if form in ("header", "trailer") else {})
        assert setup.proxy.parts is not None and setup.proxy.parts.held.bytes == 0


# -- documents

SETTINGS = [
    ("PUT", "/bucket", (("lifecycle", ""),)),
    ("PUT", "/bucket", (("cors", ""),)),
    ("PUT", "/bucket", (("tagging", ""),)),
    ("PUT", "/bucket", (("policy", ""),)),
    ("PUT", "/bucket", (("object-lock", ""),)),
    ("PUT", "/bucket/k", (("retention", ""),)),
    ("PUT", "/bucket/k", (("legal-hold", ""),)),
    ("PUT", "/bucket/k", (("tagging", ""),)),
    ("PUT", "/bucket/k", (("acl", ""),)),
    ("POST", "/bucket", (("delete", ""),)),
]
DOCUMENT = b"<Delete><Object><Key>k</Key></Object></Delete>"


@pytest.mark.parametrize(("method", "path", "query"), SETTINGS)
@pytest.mark.parametrize("size", [0, 300_000])
@pytest.mark.parametrize("checksum", ["none", "header", "trailer"])
def test_a_document_gets_the_md5_that_older_stores_demand(
    setup: Setup, method: str, path: str, query: tuple[tuple[str, str], ...], size: int, checksum: str
) -> None:
    document = DOCUMENT + b" " * size
    wire, headers, payload = document, {}, UNSIGNED
    if checksum == "header":
        headers = {"x-amz-checksum-crc32": crc32(document), "x-amz-sdk-checksum-algorithm": "CRC32"}
    elif checksum == "trailer":
        wire, headers = with_trailer(document, crc32(document))
        payload = TRAILERS
    old = setup.origin.fault(times=None, where=lambda asked: "content-md5" not in asked.headers, status=400)
    assert ask(setup, signed(method, path, query, headers, payload, len(wire)), wire).status == 200
    assert old.used == 0
    (request,) = setup.origin.requests
    assert request.body == document
    assert request.headers["content-md5"] == base64.b64encode(hashlib.md5(document).digest()).decode()
    assert request.headers.get("x-amz-checksum-crc32") == (None if checksum == "none" else crc32(document))
    assert "x-amz-trailer" not in request.headers


def test_a_document_keeps_the_md5_of_its_client_and_is_checked_against_it(setup: Setup) -> None:
    right, wrong = (base64.b64encode(hashlib.md5(text).digest()).decode() for text in (DOCUMENT, b"other"))
    query = (("lifecycle", ""),)
    head = signed("PUT", "/bucket", query, {"content-md5": wrong}, UNSIGNED, len(DOCUMENT))
    assert ask(setup, head, DOCUMENT).code == "BadDigest"
    head = signed("PUT", "/bucket", query, {"content-md5": right}, UNSIGNED, len(DOCUMENT))
    assert ask(setup, head, DOCUMENT).status == 200
    (request,) = setup.origin.requests
    assert [value for name, value in request.raw_headers if name.lower() == "content-md5"] == [right]


def test_nothing_is_added_to_an_object(setup: Setup) -> None:
    for path, query in (("/bucket/k", ()), ("/bucket/k", (("partNumber", "1"), ("uploadId", "u")))):
        ask(setup, signed("PUT", path, query, {}, UNSIGNED, 3), b"abc")
    assert ["content-md5" in each.headers for each in setup.origin.requests] == [False, False]


def test_documents_are_bounded_each_and_together(setup: Setup) -> None:
    query, limit = (("delete", ""),), completion.REQUEST_MAX_BYTES
    answer = ask(setup, signed("POST", "/bucket", query, {}, UNSIGNED, limit + 1))
    assert (answer.status, answer.code) == (400, "MaxMessageLengthExceeded")
    first = Client(setup).send(signed("POST", "/bucket", query, {}, UNSIGNED, limit), b"<Delete>")
    proxy = setup.proxy
    eventually(lambda: proxy.parts is not None and proxy.parts.held.bytes == limit)
    answer = ask(setup, signed("POST", "/bucket", query, {}, UNSIGNED, 2 << 20))
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "SlowDown", "1")
    # Small ones are not held back by it.
    assert ask(setup, signed("POST", "/bucket", query, {}, UNSIGNED, len(DOCUMENT)), DOCUMENT).status == 200
    first.abort()
    eventually(lambda: proxy.parts is not None and proxy.parts.held.bytes == 0)
    document = DOCUMENT + b" " * (1 << 20)
    assert ask(setup, signed("POST", "/bucket", query, {}, UNSIGNED, len(document)), document).status == 200
    eventually(lambda: proxy.parts is not None and proxy.parts.held.bytes == 0)


def test_the_checksum_behind_a_completion_speaks_of_its_document_and_the_headers_of_the_object(setup: Setup) -> None:
    document = b"<CompleteMultipartUpload><Part/></CompleteMultipartUpload>"
    wire, headers = with_trailer(document, crc32(document))
    speaking = {
        "x-amz-checksum-crc32": "AAAAAA==-3",
        "x-amz-checksum-type": "COMPOSITE",
        "x-amz-mp-object-size": "77",
        "if-none-match": "*",
    }
    query = (("uploadId", "u"),)
    more = headers | speaking | {"x-amz-sdk-checksum-algorithm": "CRC32"}
    ask(setup, signed("POST", "/bucket/k", query, more, TRAILERS, len(wire)), wire)
    (request,) = setup.origin.requests
    assert request.body == document and {name: request.headers[name] for name in speaking} == speaking
    assert "x-amz-sdk-checksum-algorithm" not in request.headers and "content-md5" not in request.headers
    wire, headers = with_trailer(document, crc32(b"other"))
    assert ask(setup, signed("POST", "/bucket/k", query, headers, TRAILERS, len(wire)), wire).code == "BadDigest"
    assert len(setup.origin.requests) == 1


def test_headers_about_checksums_reach_the_origin(setup: Setup) -> None:
    headers = {"x-amz-checksum-algorithm": "CRC64NVME", "x-amz-checksum-type": "FULL_OBJECT"}
    assert ask(setup, signed("POST", "/bucket/k", (("uploads", ""),), headers, UNSIGNED, 0)).status == 200
    (request,) = setup.origin.requests
    assert {name: request.headers[name] for name in headers} == headers


# -- what is tolerated, and bodies as they are


def test_what_clients_add_reaches_the_origin(setup: Setup) -> None:
    headers = {
        "x-amz-acl": "private",
        "x-amz-storage-class": "STANDARD_IA",
        "x-amz-expected-bucket-owner": "123456789012",
        "x-amz-checksum-blake3": "AAAA",
    }
    assert ask(setup, signed("PUT", "/bucket/k", (("x-id", "PutObject"),), headers, UNSIGNED, 1), b"x").status == 200
    (request,) = setup.origin.requests
    assert {name: request.headers[name] for name in headers} == headers and request.query == {"x-id": "PutObject"}


@pytest.mark.parametrize("status", [200, 409])
def test_making_a_bucket_that_is_there_is_answered_as_the_origin_does(setup: Setup, status: int) -> None:
    if status == 409:
        setup.origin.fault(method="PUT", status=409, code="BucketAlreadyOwnedByYou")
    answer = ask(setup, signed("PUT", "/bucket", (), {"x-amz-bucket-object-lock-enabled": "false"}, UNSIGNED, 0))
    assert answer.status == status and (status == 200 or answer.code == "BucketAlreadyOwnedByYou")
    assert setup.origin.requests[0].headers["x-amz-bucket-object-lock-enabled"] == "false"


@pytest.mark.parametrize(
    ("sent", "stored"), [("gzip", "gzip"), ("aws-chunked,gzip", "gzip"), ("gzip,br", "gzip,br"), ("aws-chunked", None)]
)
@pytest.mark.parametrize("size", [100, 400_000])
def test_a_packed_body_stays_packed(setup: Setup, sent: str, stored: str | None, size: int) -> None:
    body = b"\x1f\x8b" + b"no gzip at all, and nobody's business" * (size // 37)
    wire, headers = with_trailer(body, crc32(body))
    if "aws-chunked" not in sent:
        wire, headers = body, {}
    payload = TRAILERS if "aws-chunked" in sent else UNSIGNED
    head = signed("PUT", "/bucket/k", (), headers | {"content-encoding": sent}, payload, len(wire))
    assert ask(setup, head, wire).status == 200
    found = setup.origin.get("bucket", "k")
    assert found is not None and found.body == body and found.headers.get("content-encoding") == stored


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("GET", "/bucket", (("list-type", "2"),)),
        ("GET", "/bucket/k", (("attributes", ""),)),
        ("GET", "/bucket/k", (("uploadId", "u"),)),
        ("PUT", "/bucket/k", ()),
        ("HEAD", "/bucket", ()),
    ],
)
def test_what_a_client_can_unpack_is_not_asked_of_the_origin(
    setup: Setup, method: str, path: str, query: tuple[tuple[str, str], ...]
) -> None:
    # Signed with it: the signature is verified with what the client sent.
    signed_query = presign(
        method, path, query, HOST, access_key=ACCESS_KEY, secret_key=SECRET_KEY, region="us-east-1", now=NOW,
        expires_s=60, headers={"accept-encoding": "gzip, deflate"},
    )  # fmt: skip
    lines = f"{method} {path}?{signed_query} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 0\r\nAccept-Encoding: "
    assert ask(setup, (lines + "gzip\r\n\r\n").encode(), head_only=method == "HEAD").status == 403
    assert ask(setup, (lines + "gzip, deflate\r\n\r\n").encode(), head_only=method == "HEAD").status != 403
    assert [each.headers["accept-encoding"] for each in setup.origin.requests] == ["identity"]


def test_a_chunked_request_without_a_length(setup: Setup) -> None:
    """As SDKs upload over https; and without any word on its length a body is refused."""
    body = b"streamed" * 100
    wire, headers = with_trailer(body, crc32(body))
    framed = b"".join(b"%x\r\n%b\r\n" % (len(cut), cut) for cut in (wire[:300], wire[300:])) + b"0\r\n\r\n"
    headers["transfer-encoding"] = "chunked"
    assert ask(setup, signed("PUT", "/bucket/k", (), headers, TRAILERS), framed).status == 200
    found = setup.origin.get("bucket", "k")
    assert found is not None and found.body == body
    del headers["x-amz-decoded-content-length"]
    for refused in (
        signed("PUT", "/bucket/k", (), headers, TRAILERS),
        signed("PUT", "/bucket/k", (), {"transfer-encoding": "chunked"}),
        signed("PUT", "/bucket/k"),
        signed("PUT", "/bucket/k", (("partNumber", "1"), ("uploadId", "u"))),
    ):
        answer = ask(setup, refused)
        assert (answer.status, answer.code) == (411, "MissingContentLength")


def test_five_gibibytes_and_one_more(setup: Setup) -> None:
    client = Client(setup).send(signed("PUT", "/bucket/k", headers={"expect": "100-continue"}, length=5 << 30))
    assert client.answer().status == 100
    client.abort()
    answer = ask(setup, signed("PUT", "/bucket/k", length=(5 << 30) + 1))
    assert (answer.status, answer.code) == (400, "EntityTooLarge")
    headers = {"x-amz-decoded-content-length": str((5 << 30) + 1), "content-encoding": "aws-chunked"}
    assert ask(setup, signed("PUT", "/bucket/k", (), headers, TRAILERS, 10)).code == "EntityTooLarge"


def test_many_writers_at_once_are_each_answered(setup: Setup) -> None:
    answers: list[int] = []

    def put(number: int) -> None:
        answers.append(ask(setup, signed("PUT", f"/bucket/{number}", length=9), b"%09d" % number).status)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 40
    for number in range(40):
        found = setup.origin.get("bucket", str(number))
        assert found is not None and found.body == b"%09d" % number


@pytest.mark.parametrize(
    ("method", "path", "query", "size"),
    [
        ("PUT", "/bucket/k", (), 10),
        ("PUT", "/bucket/k", (), 5_000_000),
        ("POST", "/bucket", (("delete", ""),), 5_000_000),
    ],
)
def test_no_body_is_asked_for_while_the_origin_is_known_to_be_away(
    setup: Setup, method: str, path: str, query: tuple[tuple[str, str], ...], size: int
) -> None:
    setup.origin.call(setup.origin.down())
    for _ in range(3):
        assert ask(setup, signed("PUT", "/bucket/k", length=1), b"x").status == 503
    client = Client(setup).send(signed(method, path, query, {"expect": "100-continue"}, UNSIGNED, size))
    answer = client.answer()
    assert (answer.status, answer.code) == (503, "ServiceUnavailable") and int(answer.headers["retry-after"]) >= 1
    client.abort()


SIZE = 200_000


def breaks_off(setup: Setup) -> None:
    client = Client(setup).send(signed("PUT", "/bucket/k", length=SIZE), b"x" * (SIZE - 1))
    eventually(lambda: held() == 1, "it is being received")
    client.abort()


def breaks_off_on_its_way(setup: Setup) -> None:
    client = Client(setup).send(signed("PUT", "/bucket/k", length=8 * SIZE), b"x" * (4 * SIZE))
    eventually(lambda: setup.origin.count(method="PUT") >= 1, "it has begun")
    client.abort()


def fails_its_check(setup: Setup) -> None:
    head = signed("PUT", "/bucket/k", (), {"content-md5": "A" * 22 + "=="}, UNSIGNED, 8 * SIZE)
    assert ask(setup, head, b"x" * 8 * SIZE).code == "BadDigest"


def is_not_answered(setup: Setup) -> None:
    setup.origin.fault(close=True, times=3)
    assert ask(setup, signed("PUT", "/bucket/k", length=SIZE), b"x" * SIZE).status == 503


def is_not_completed(setup: Setup) -> None:
    setup.origin.fault(close=True)
    assert ask(setup, signed("POST", "/bucket/k", (("uploadId", "u"),), length=SIZE), b"x" * SIZE).status == 503


def held() -> int:
    return sum(isinstance(each, Exchange) for each in gc.get_objects())


@pytest.mark.parametrize(
    "fails", [breaks_off, breaks_off_on_its_way, fails_its_check, is_not_answered, is_not_completed]
)
def test_a_write_that_fails_leaves_its_body_not_to_the_collector(setup: Setup, fails: Callable[[Setup], None]) -> None:
    # It comes seldom where little is made but large: some hundred MB of bodies could wait for it.
    assert ask(setup, signed("PUT", "/bucket/k", length=0)).status == 200
    setup.origin.forget()
    gc.collect()
    gc.disable()
    try:
        fails(setup)
        eventually(lambda: held() == 0, "all of it is gone")
    finally:
        gc.enable()
