"""How a client's question is put to the origin: what is kept, moved and refused on the way."""

from __future__ import annotations

import pytest

from kos.s3.head import RequestHead
from kos.s3.names import uri_encode
from kosproxy.outbound import question


def asked(query: dict[str, str], headers: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    raw_query = "&".join(f"{uri_encode(name, False)}={uri_encode(value, False)}" for name, value in query.items())
    pairs, out = question(RequestHead("PUT", "/bucket/key", raw_query, {"host": "kos", **headers}))
    return dict(pairs), dict(out)


def test_connection_takes_no_signed_header_away() -> None:
    headers = {"x-amz-server-side-encryption": "aws:kms", "content-md5": "m", "connection": "close"}
    for named in ("x-amz-server-side-encryption", "X-Amz-Server-Side-Encryption, content-md5, keep-alive"):
        _, out = asked({}, headers | {"connection": named, "keep-alive": "1", "te": "trailers"})
        assert out == {"x-amz-server-side-encryption": "aws:kms", "content-md5": "m"}


@pytest.mark.parametrize("name", ["X-Amz-Content-Sha256", "x-amz-security-token", "X-Amz-Date"])
def test_nothing_of_the_clients_authentication_goes_on(name: str) -> None:
    assert asked({name: "7", "x-id": "GetObject"}, {name.lower(): "7"}) == ({"x-id": "GetObject"}, {})


def test_a_query_goes_on_as_it_is() -> None:
    query = {"versionId": "1", "x-amz-acl": "private", "odd": "a+b c"}
    assert asked(query, {}) == (query, {})
