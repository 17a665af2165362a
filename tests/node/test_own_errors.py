"""Every error that kos gives by itself, over a real connection: its status, code and elements, its document, its ids.

The origin is never asked, but where a read has to know the object first. What a code is raised for in detail is tested
beside the code that raises it; here a code that no request could provoke would be seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from kos.errors import S3_CODES
from kos.s3 import sigv4
from tests.fakes.http import Exchange, Signed, exchange, signed
from tests.fakes.node import ACCESS_KEY, SECRET_KEY, Node
from tests.fakes.origin import FakeOrigin

#: What a request needs that is not like its neighbours: made when the node is there.
Made = Callable[[Node], Signed]

LONG = 5 * 1024**3 + 1
ONE_ZERO = "AAAAAA=="


class Provoked(NamedTuple):
    """One error. extra: elements of its document beyond the usual ones. asks: whether the origin was asked on the way."""

    code: str
    made: Made
    extra: Mapping[str, str] = {}
    asks: bool = False


def _signed(method: str, path: str, **arguments: object) -> Made:
    return lambda node: signed(node, method, path, **arguments)  # type: ignore[arg-type]


def _spoiled(method: str, path: str, old: bytes, new: bytes) -> Made:
    """A request changed after it was signed."""

    def made(node: Node) -> Signed:
        request = signed(node, method, path)
        assert old in request.head
        request.head = request.head.replace(old, new)
        return request

    return made


def _plain(method: str, target: str, *fields: str) -> Made:
    """A request without a signature in its header."""

    def made(node: Node) -> Signed:
        lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{node.s3_port}", *fields]
        return Signed(node.s3_port, "\r\n".join([*lines, "", ""]).encode(), b"")

    return made


def _skewed(node: Node) -> Signed:
    headers = {"host": f"127.0.0.1:{node.s3_port}"}
    added = sigv4.sign_headers(
        "GET", "/b/k", "", headers, access_key=ACCESS_KEY, secret_key=SECRET_KEY, session_token=None, region="us-east-1",
        now=time.time() - 3600,
    )  # fmt: skip
    return _plain("GET", "/b/k", *(f"{name}: {value}" for name, value in added.items()))(node)


def _chunked(trailer: bytes, chunks: bytes = b"5\r\nhello\r\n0\r\n") -> Made:
    headers = {
        "content-encoding": "aws-chunked",
        "x-amz-decoded-content-length": "5",
        "x-amz-trailer": "x-amz-checksum-crc32",
    }
    payload = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
    return _signed(
        "PUT", "/b/own", headers=headers, payload=payload, body=b"5\r\nhello\r\n0\r\n" + trailer + b"\r\n\r\n"
    )


_QUERY = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={key}%2F20260101%2Fus-east-1%2Fs3%2Faws4_request"
_LONG_LINK = "/b/k?" + _QUERY.format(key=ACCESS_KEY) + (
    "&X-Amz-Date=20260101T000000Z&X-Amz-Expires=604801&X-Amz-SignedHeaders=host&X-Amz-Signature=" + "0" * 64
)  # fmt: skip

ERRORS = {
    "no signature": Provoked("AccessDenied", _plain("GET", "/b/k")),
    "half an authorization": Provoked(
        "AuthorizationHeaderMalformed",
        _plain("GET", "/b/k", "Authorization: AWS4-HMAC-SHA256 Credential=x", "x-amz-content-sha256: UNSIGNED-PAYLOAD"),
    ),
    "half a link": Provoked("AuthorizationQueryParametersError", _plain("GET", "/b/k?" + _QUERY.format(key="x"))),
    "a link for too long": Provoked("AuthorizationQueryParametersError", _plain("GET", _LONG_LINK)),
    "a wrong checksum": Provoked(
        "BadDigest", _signed("PUT", "/b/own", headers={"x-amz-checksum-crc32": ONE_ZERO}, body=b"x")
    ),
    "a wrong trailer": Provoked("BadDigest", _chunked(b"x-amz-checksum-crc32:" + ONE_ZERO.encode())),
    "too large": Provoked(
        "EntityTooLarge",
        _signed("PUT", "/b/own", length=LONG),
        {"ProposedSize": str(LONG), "MaxSizeAllowed": str(5 * 1024**3)},
    ),
    "no chunk": Provoked("IncompleteBody", _chunked(b"", b"this is no chunk\r\n")),
    "an unknown key": Provoked(
        "InvalidAccessKeyId",
        _spoiled("GET", "/b/k", f"Credential={ACCESS_KEY}".encode(), b"Credential=stranger"),
        {"AWSAccessKeyId": "stranger"},
    ),
    "a negative number of keys": Provoked(
        "InvalidArgument", _signed("GET", "/b?max-keys=-1"), {"ArgumentName": "maxKeys", "ArgumentValue": "-1"}
    ),
    "no header": Provoked(
        "InvalidArgument",
        _signed("GET", "/b/there?response-content-type=a%0Ab"),
        {"ArgumentName": "response-content-type"},
        asks=True,
    ),
    "no bucket's name": Provoked("InvalidBucketName", _signed("GET", "/a*b/k"), {"BucketName": "a*b"}),
    "no MD5": Provoked(
        "InvalidDigest", _signed("PUT", "/b/own", headers={"content-md5": "short"}, body=b"x"), {"Content-MD5": "short"}
    ),
    "no such part": Provoked(
        "InvalidPartNumber",
        _signed("GET", "/b/there?partNumber=2"),
        {"PartNumberRequested": "2", "ActualPartCount": "1"},
        asks=True,
    ),
    "no such range": Provoked(
        "InvalidRange",
        _signed("GET", "/b/there", headers={"range": "bytes=10-"}),
        {"RangeRequested": "bytes=10-", "ActualObjectSize": "10"},
        asks=True,
    ),
    "two checksums": Provoked(
        "InvalidRequest",
        _signed("PUT", "/b/own", headers={"x-amz-checksum-crc32": ONE_ZERO, "x-amz-checksum-crc32c": ONE_ZERO}, body=b"x"),
    ),
    "a token": Provoked("InvalidToken", _signed("GET", "/b/k", headers={"x-amz-security-token": "token"})),
    "no path": Provoked("InvalidURI", _signed("GET", "/b/%zz"), {"URI": "/b/%zz"}),
    "a long key": Provoked(
        "KeyTooLongError", _signed("GET", "/b/" + "k" * 1025), {"Size": "1025", "MaxSizeAllowed": "1024"}
    ),
    "another trailer": Provoked("MalformedTrailerError", _chunked(b"x-amz-checksum-sha1:" + ONE_ZERO.encode())),
    "no XML": Provoked("MalformedXML", _signed("POST", "/b?delete", body=b"<Delete>")),
    "a long document": Provoked(
        "MaxMessageLengthExceeded",
        _signed("POST", "/b?delete", length=9 << 20),
        {"MaxMessageLengthBytes": str(8 << 20)},
    ),
    "no method": Provoked(
        "MethodNotAllowed", _signed("PATCH", "/b/k"), {"Method": "PATCH", "ResourceType": "OBJECT"}
    ),
    "no length": Provoked("MissingContentLength", _signed("PUT", "/b/own", length=None)),
    "a form": Provoked("NotImplemented", _signed("POST", "/b", body=b"form")),
    "another version": Provoked(
        "PreconditionFailed",
        _signed("GET", "/b/there", headers={"if-match": '"other"'}),
        {"Condition": "If-Match"},
        asks=True,
    ),
    "a long head": Provoked("RequestHeaderSectionTooLarge", _signed("GET", "/b/k", headers={"x-long": "l" * 70_000})),
    "many fields": Provoked(
        "RequestHeaderSectionTooLarge", _plain("GET", "/b/k", *(f"x-field-{n}: 1" for n in range(200)))
    ),
    "an old date": Provoked("RequestTimeTooSkewed", _skewed, {"MaxAllowedSkewMilliseconds": "900000"}),
    "another secret": Provoked("SignatureDoesNotMatch", _signed("GET", "/b/k", secret_key="other")),
    "another path": Provoked("SignatureDoesNotMatch", _spoiled("GET", "/b/k", b"/b/k ", b"/b/l ")),
    "another body": Provoked(
        "XAmzContentSHA256Mismatch",
        _signed("PUT", "/b/own", payload="0" * 64, body=b"x"),
        {"ClientComputedContentSHA256": "0" * 64},
    ),
}  # fmt: skip

#: Codes that a healthy node cannot be made to give by one request, and why.
NOT_BY_A_REQUEST = {
    "InternalError": "a fault in kos itself",
    "NoSuchKey": "the origin's own, unless many wait for a HEAD",
    "NoSuchVersion": "the origin's own, unless many wait for a HEAD",
    "RequestTimeout": "takes a minute of silence",
    "ServiceUnavailable": "the origin must be away",
    "SlowDown": "a bound must be reached",
}


def test_every_code_is_provoked_or_cannot_be() -> None:
    provoked = {error.code for error in ERRORS.values()}
    assert provoked | NOT_BY_A_REQUEST.keys() == S3_CODES.keys()
    assert not provoked & NOT_BY_A_REQUEST.keys()


def _document(answer: Exchange) -> dict[str, str]:
    root = ElementTree.fromstring(answer.body)
    assert root.tag == "Error"
    return {child.tag: child.text or "" for child in root}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_as_s3_gives_it(shared_node: Node, origin: FakeOrigin, name: str) -> None:
    wanted = ERRORS[name]
    origin.put("b", "there", b"0123456789")
    answer = exchange(wanted.made(shared_node))
    assert (answer.status, answer.code) == (S3_CODES[wanted.code][0], wanted.code), answer.body
    assert answer.headers["content-type"] == "application/xml"
    assert answer.headers["date"]
    said = _document(answer)
    assert said["Code"] == wanted.code and said["Message"]
    assert said["RequestId"] == answer.headers["x-amz-request-id"]
    assert {element: said.get(element) for element in wanted.extra} == dict(wanted.extra)
    assert wanted.asks or origin.requests == []
    assert origin.get("b", "own") is None


def test_no_two_errors_have_one_id(shared_node: Node, origin: FakeOrigin) -> None:
    answers = [exchange(ERRORS[name].made(shared_node)) for name in ("no signature", "no path", "no signature")]
    assert len({answer.headers["x-amz-request-id"] for answer in answers}) == 3


@pytest.mark.parametrize(
    "path",
    ["/b/a%26b%3Cc%3E%22", "/b/%E2%82%AC", "/b/control%01character", "/b/%EF%BF%BF", "/b/]]%3E"],
)
def test_a_key_that_xml_cannot_hold_does_not_break_the_document(
    shared_node: Node, origin: FakeOrigin, path: str
) -> None:
    answer = exchange(signed(shared_node, "GET", path, secret_key="other"))
    assert answer.code == "SignatureDoesNotMatch"
    assert _document(answer)["Resource"] == path


@pytest.mark.parametrize("name", ["no signature", "another secret", "no path", "a long key", "no such range"])
def test_an_error_to_a_head_is_that_of_the_get_without_a_document(
    shared_node: Node, origin: FakeOrigin, name: str
) -> None:
    origin.put("b", "there", b"0123456789")
    wanted = ERRORS[name]
    # The method is signed as well, so it is another one from the start.
    request = {
        "no signature": _plain("HEAD", "/b/k"),
        "another secret": _signed("HEAD", "/b/k", secret_key="other"),
        "no path": _signed("HEAD", "/b/%zz"),
        "a long key": _signed("HEAD", "/b/" + "k" * 1025),
        "no such range": _signed("HEAD", "/b/there", headers={"range": "bytes=10-"}),
    }[name](shared_node)
    answer = exchange(request)
    assert (answer.status, answer.body) == (S3_CODES[wanted.code][0], b"")
    assert answer.headers["x-amz-request-id"]


def test_a_connection_goes_on_after_an_error(shared_node: Node, origin: FakeOrigin) -> None:
    """An error without a body left to be read is one answer like others."""
    origin.put("b", "there", b"0123456789")
    first, second = signed(shared_node, "GET", "/b/k", secret_key="other"), signed(shared_node, "GET", "/b/there")
    with Signed(first.port, first.head + second.head, b"").open() as connection:
        received = b""
        while b"0123456789" not in received:
            piece = connection.recv(1 << 16)
            assert piece, received
            received += piece
    assert received.startswith(b"HTTP/1.1 403") and b"HTTP/1.1 200" in received
