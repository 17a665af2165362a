"""How a client's question is put to the origin: what is kept, moved and refused on the way."""

from __future__ import annotations

import pytest

from kos.errors import S3Error
from kos.s3.head import RequestHead
from kos.s3.names import uri_encode
from kos.s3.sigv4 import Identity, Payload
from kosproxy.outbound import question


def asked(query: dict[str, str], headers: dict[str, str], *, presigned: bool) -> tuple[dict[str, str], dict[str, str]]:
    raw_query = "&".join(f"{uri_encode(name, False)}={uri_encode(value, False)}" for name, value in query.items())
    identity = Identity("key", Payload.UNSIGNED, None, "", "", "", b"", presigned)
    pairs, out = question(RequestHead("PUT", "/bucket/key", raw_query, {"host": "kos", **headers}), identity)
    return dict(pairs), dict(out)


def test_connection_takes_no_signed_header_away() -> None:
    headers = {"x-amz-server-side-encryption": "aws:kms", "content-md5": "m", "connection": "close"}
    for named in ("x-amz-server-side-encryption", "X-Amz-Server-Side-Encryption, content-md5, keep-alive"):
        _, out = asked({}, headers | {"connection": named, "keep-alive": "1", "te": "trailers"}, presigned=False)
        assert out == {"x-amz-server-side-encryption": "aws:kms", "content-md5": "m"}


def test_what_was_moved_into_a_presigned_query_becomes_headers_again() -> None:
    query = {"X-Amz-Acl": "private", "X-Amz-Expires": "60", "versionId": "1", "x-id": "PutObject"}
    assert asked(query, {}, presigned=True) == ({"versionId": "1", "x-id": "PutObject"}, {"x-amz-acl": "private"})
    assert asked({"x-amz-acl": "private"}, {}, presigned=False) == ({"x-amz-acl": "private"}, {})
    assert asked({"x-amz-acl": "private"}, {"x-amz-acl": "sent"}, presigned=True) == ({}, {"x-amz-acl": "sent"})


@pytest.mark.parametrize("name", ["x-amz-decoded-content-length", "X-Amz-Trailer", "x-amz-content-sha256"])
def test_how_the_body_is_framed_is_said_anew(name: str) -> None:
    assert asked({name: "7"}, {}, presigned=True) == ({}, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-amz-meta-a", "b\r\nx-amz-acl: public-read"),
        ("x-amz-meta-a", "\0"),
        ("x-amz-meta-a\r\nx-amz-acl", "public-read"),
        ("x-amz-acl:public-read ", "x"),
        ("x-amz-meta-é", "x"),
        ("x-amz-meta-\udcff", "x"),
    ],
)
def test_what_cannot_be_a_header_is_refused(name: str, value: str) -> None:
    with pytest.raises(S3Error) as refused:
        asked({name: value}, {}, presigned=True)
    assert refused.value.code == "InvalidArgument"
