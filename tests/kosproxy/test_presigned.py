"""Presigned requests and preflights through a worker: what is checked, what the origin is asked, what is refused."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kos import config
from kos.s3.object_response import ObjectMeta
from kos.s3.sigv4 import presign
from tests.conditions import eventually
from tests.fakes.carrier import FakeCarrier
from tests.fakes.links import version_2
from tests.fakes.origin import FakeOrigin
from tests.fakes.proxy import ACCESS_KEY, NOW, SECRET_KEY, Proxy
from tests.fakes.writer import HOST, Answer, Client, Setup, ask, signed, writer

BODY = b"signed by a link"
CRC32 = base64.b64encode(zlib.crc32(BODY).to_bytes(4, "big")).decode()
SHA256 = base64.b64encode(hashlib.sha256(BODY).digest()).decode()
MD5 = base64.b64encode(hashlib.md5(BODY).digest()).decode()


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    with writer(tmp_path, preflights=2) as one:
        yield one


def wire(method: str, target: str, headers: dict[str, str] | None = None, length: int | None = None) -> bytes:
    lines = {"Host": HOST} | (headers or {})
    if length is not None:
        lines["Content-Length"] = str(length)
    return (f"{method} {target} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n").encode()


def link(version: int, method: str, path: str, query: tuple[tuple[str, str], ...] = (), **headers: str) -> str:
    """The target of a link. Headers are signed and must be sent."""
    if version == 2:
        return f"{path}?{version_2(method, path, query, **headers)}"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    text = presign(
        method, path, query, HOST, access_key=ACCESS_KEY, secret_key=SECRET_KEY, region="us-east-1", now=NOW,
        expires_s=600, headers=named,
    )  # fmt: skip
    return f"{path}?{text}"


def put(setup: Setup, version: int, *query: tuple[str, str], path: str = "/bucket/k", body: bytes = BODY) -> Answer:
    return ask(setup, wire("PUT", link(version, "PUT", path, query), length=len(body)), body)


both = pytest.mark.parametrize("version", [2, 4])


@both
def test_a_put_by_a_link(setup: Setup, version: int) -> None:
    query = (("x-amz-meta-colour", "blue and  red"), ("x-amz-acl", "private"), ("x-id", "PutObject"))
    assert put(setup, version, *query, path="/bucket/a%20b").status == 200
    (request,) = setup.origin.requests
    # The question of a client that had signed in its header: nothing of the link is left.
    assert request.raw_query == "x-id=PutObject"
    assert request.headers["x-amz-meta-colour"] == "blue and  red" and request.headers["x-amz-acl"] == "private"
    assert request.headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=origin/")
    stored = setup.origin.get("bucket", "a b")
    assert stored is not None and stored.body == BODY
    assert setup.carrier.writes == [("bucket", ("a b",))]
    eventually(lambda: setup.proxy.lines, "the line is written after the answer")
    (line,) = setup.proxy.lines
    assert (line.operation, line.key_id, line.status) == ("PutObject", ACCESS_KEY, 200)


@both
@pytest.mark.parametrize(
    ("name", "right", "wrong", "code"),
    [
        ("x-amz-checksum-crc32", CRC32, "AAAAAA==", "BadDigest"),
        ("x-amz-checksum-sha256", SHA256, base64.b64encode(bytes(32)).decode(), "BadDigest"),
        ("x-amz-checksum-sha256", SHA256, "no base64", "InvalidRequest"),
        ("content-md5", MD5, base64.b64encode(bytes(16)).decode(), "BadDigest"),
    ],
)
def test_what_the_query_promises_of_the_body_is_checked(
    setup: Setup, version: int, name: str, right: str, wrong: str, code: str
) -> None:
    if version == 4 and name == "content-md5":
        return  # not read from a query there
    more = (("x-amz-sdk-checksum-algorithm", name.rpartition("-")[2].upper()),) if "checksum" in name else ()
    answer = put(setup, version, (name, wrong), *more)
    assert (answer.status, answer.code) == (400, code)
    assert setup.origin.get("bucket", "k") is None
    assert put(setup, version, (name, right), *more).status == 200
    stored = setup.origin.get("bucket", "k")
    assert stored is not None and stored.body == BODY
    assert setup.origin.requests[-1].headers[name] == right


def test_the_hash_of_the_body_in_the_query_is_checked(setup: Setup) -> None:
    digest = hashlib.sha256(BODY).hexdigest()
    query = (("x-amz-content-sha256", digest),)
    assert put(setup, 2, *query, body=b"another").code == "XAmzContentSHA256Mismatch"
    assert put(setup, 2, *query).status == 200
    assert setup.origin.requests[-1].headers["x-amz-content-sha256"] == digest


@both
def test_signed_headers_are_sent_and_go_on(setup: Setup, version: int) -> None:
    headers = {
        "content-type": "text/odd", "content-md5": MD5, "x-amz-meta-a": "1", "x-amz-checksum-crc32": CRC32,
        "x-amz-server-side-encryption": "AES256", "x-amz-tagging": "a=b", "x-amz-acl": "private",
    }  # fmt: skip
    target = link(version, "PUT", "/bucket/k", **{name.replace("-", "_"): value for name, value in headers.items()})
    answer = ask(setup, wire("PUT", target, {k.title(): v for k, v in headers.items()}, len(BODY)), BODY)
    assert answer.status == 200
    (request,) = setup.origin.requests
    assert {name: request.headers[name] for name in headers} == headers
    for name in headers:
        changed = {k: v + "x" if k == name else v for k, v in headers.items()}
        assert ask(setup, wire("PUT", target, changed, len(BODY)), BODY).code == "SignatureDoesNotMatch"
    assert ask(setup, wire("PUT", target, headers | {"x-amz-grant-read": "x"}, len(BODY)), BODY).status == 403
    assert len(setup.origin.requests) == 1


@both
def test_multipart_by_links(setup: Setup, version: int) -> None:
    created = ask(setup, signed("POST", "/bucket/m", (("uploads", ""),), length=0))
    upload_id = created.body.partition(b"<UploadId>")[2].partition(b"</UploadId>")[0].decode()
    part = (("partNumber", "1"), ("uploadId", upload_id), ("x-amz-checksum-crc32", "AAAAAA=="))
    assert put(setup, version, *part, path="/bucket/m").code == "BadDigest"
    etag = put(setup, version, *part[:2], path="/bucket/m").headers["etag"]
    body = (
        f"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>{etag}</ETag></Part></CompleteMultipartUpload>"
    ).encode()
    target = link(version, "POST", "/bucket/m", (("uploadId", upload_id),))
    assert ask(setup, wire("POST", target, length=len(body)), body).status == 200
    stored = setup.origin.get("bucket", "m")
    assert stored is not None and stored.body == BODY
    assert ("bucket", ("m",)) in setup.carrier.writes
    assert ask(setup, wire("DELETE", link(version, "DELETE", "/bucket/m"))).status == 204
    assert setup.origin.get("bucket", "m") is None


@both
def test_a_copy_by_a_link_is_a_copy(setup: Setup, version: int) -> None:
    setup.origin.put("bucket", "source", b"copied")
    assert put(setup, version, ("x-amz-copy-source", "/bucket/source"), body=b"").status == 200
    stored = setup.origin.get("bucket", "k")
    assert stored is not None and stored.body == b"copied"
    eventually(lambda: setup.proxy.lines, "the line is written after the answer")
    (line,) = setup.proxy.lines
    assert line.operation == "CopyObject"


def test_version_2_can_be_switched_off(tmp_path: Path) -> None:
    carrier = FakeCarrier(tmp_path / "store")
    carrier.put("bucket", "k", BODY, ObjectMeta(etag='"e"', size=len(BODY), last_modified="", headers=()))
    with Proxy(carrier, listen=config.Listen(sigv2_query=False)).running() as proxy:
        setup = Setup(proxy, carrier, FakeOrigin())
        answer = ask(setup, wire("GET", link(2, "GET", "/bucket/k")))
        assert (answer.status, answer.code) == (400, "InvalidRequest") and b"AWS4-HMAC-SHA256" in answer.body
        assert ask(setup, wire("GET", link(4, "GET", "/bucket/k"))).body == BODY
    carrier.close_file()


# -- preflights --------------------------------------------------------------------------------------------------------

ASKING = {
    "Origin": "https://app.example",
    "Access-Control-Request-Method": "PUT",
    "Access-Control-Request-Headers": "content-type",
}


@pytest.mark.parametrize("target", ["/bucket/k", "/bucket", link(2, "PUT", "/bucket/k"), link(4, "PUT", "/bucket/k")])
def test_a_preflight_needs_no_signature(setup: Setup, target: str) -> None:
    """The last two are what a browser asks before it uses a link: signed, but for another method."""
    allowed = {"access-control-allow-origin": "https://app.example", "vary": "Origin, Access-Control-Request-Method"}
    setup.origin.fault(method="OPTIONS", raw=raw_answer("200 OK", allowed))
    extra = {"X-Amz-Acl": "public-read", "Cookie": "c", "X-Odd": "1", "Accept": "*/*"}
    answer = ask(setup, wire("OPTIONS", target, ASKING | extra))
    assert answer.status == 200 and {name: answer.headers[name] for name in allowed} == allowed
    (request,) = setup.origin.requests
    assert (request.method, request.raw_query) == ("OPTIONS", "")
    own = {"accept-encoding", "authorization", "host", "user-agent", "x-amz-content-sha256", "x-amz-date"}
    assert request.headers.keys() - own == {name.lower() for name in ASKING}
    eventually(lambda: setup.proxy.lines, "the line is written after the answer")
    (line,) = setup.proxy.lines
    assert (line.operation, line.key_id, line.origin_requests) == ("Preflight", None, 1)


def test_what_the_rules_forbid_is_told_as_it_is(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    setup.origin.fault(
        method="OPTIONS", raw=raw_answer("403 Forbidden", {}, b"<Error><Code>AccessForbidden</Code></Error>")
    )
    answer = ask(setup, wire("OPTIONS", "/bucket/k", ASKING))
    assert (answer.status, answer.code) == (403, "AccessForbidden")
    assert not caplog.records, "a stranger cannot fill the log with refusals that are not about kos"


def raw_answer(status: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("target", "headers", "length"),
    [
        ("/bucket/k", {}, None),
        ("/bucket/k", {"Origin": "https://app.example"}, None),
        ("/bucket/k", {"Access-Control-Request-Method": "PUT"}, None),
        ("/", ASKING, None),
        ("/bucket/k", ASKING, 3),
        ("/bucket/k", ASKING | {"Authorization": "Basic eA=="}, None),
    ],
)
def test_whatever_is_no_preflight_must_be_signed(
    setup: Setup, target: str, headers: dict[str, str], length: int | None
) -> None:
    answer = ask(setup, wire("OPTIONS", target, headers, length), b"x" * (length or 0))
    assert answer.code == ("InvalidArgument" if "Authorization" in headers else "AccessDenied")
    assert setup.origin.requests == []
    for method in ("GET", "HEAD", "PUT", "DELETE", "POST"):
        assert ask(setup, wire(method, "/bucket/k", ASKING, 0), head_only=method == "HEAD").status == 403
    assert setup.origin.requests == []


def test_preflights_at_a_time_are_bounded(setup: Setup) -> None:
    hold = setup.origin.hold(2, method="OPTIONS", at="answer")
    waiting = [Client(setup).send(wire("OPTIONS", "/bucket/k", ASKING)) for _ in range(2)]
    eventually(lambda: len(hold.held) == 2, "both have reached the origin")
    answer = ask(setup, wire("OPTIONS", "/bucket/k", ASKING))
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "SlowDown", "1")
    assert put(setup, 4).status == 200, "those who are known are not held up"
    hold.release()
    statuses = {client.answer().status for client in waiting}
    assert 503 not in statuses
    for client in waiting:
        client.abort()
    assert ask(setup, wire("OPTIONS", "/bucket/k", ASKING)).status in statuses
