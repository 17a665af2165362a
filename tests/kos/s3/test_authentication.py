"""A presigned request as one that is signed in its headers: what stands in the query counts as a header."""

from __future__ import annotations

import pytest

from kos.errors import S3Error
from kos.s3 import authentication, sigv4
from kos.s3.head import RequestHead
from kos.s3.names import parse_query

NOW = 1700000000.0
ACCESS_KEY, SECRET_KEY = "AKIDEXAMPLE", "secret"
HOST = "kos:9000"


def presigned(*query: tuple[str, str], method: str = "PUT", **headers: str) -> RequestHead:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    raw_query = sigv4.presign(
        method, "/b/k", query, HOST, access_key=ACCESS_KEY, secret_key=SECRET_KEY, region="r", now=NOW, expires_s=60,
        headers=sent,
    )  # fmt: skip
    return RequestHead(method, "/b/k", raw_query, {"host": HOST} | sent)


def undone(head: RequestHead) -> RequestHead:
    claimed = authentication.claim_of(head, None, version_2=True)
    claimed.check({ACCESS_KEY: SECRET_KEY}, NOW)
    return authentication.unpresigned(head, claimed)


def test_headers_in_the_query_are_headers_again() -> None:
    head = undone(
        presigned(
            ("X-Amz-Acl", "private"), ("x-amz-meta-a", "b c"), ("x-amz-checksum-crc32", "AAAAAA=="), ("versionId", "1"),
            ("x-id", "PutObject"), ("content-type", "text/plain"), x_amz_tagging="a=b", content_md5="m",
        )
    )  # fmt: skip
    assert head.headers == {
        "host": HOST, "content-md5": "m", "x-amz-tagging": "a=b", "x-amz-acl": "private", "x-amz-meta-a": "b c",
        "x-amz-checksum-crc32": "AAAAAA==",
    }  # fmt: skip
    # By version 4 only x-amz-* may be moved: what S3 does not read, kos does not either.
    assert parse_query(head.raw_query) == [("content-type", "text/plain"), ("versionId", "1"), ("x-id", "PutObject")]


def test_a_header_counts_before_the_query() -> None:
    head = undone(presigned(("x-amz-acl", "public-read"), x_amz_acl="private"))
    assert (head.headers["x-amz-acl"], head.raw_query) == ("private", "")


def test_one_that_is_given_twice_is_joined_like_a_header() -> None:
    head = undone(presigned(("x-amz-meta-a", "1"), ("X-Amz-Meta-A", "2")))
    assert head.headers["x-amz-meta-a"] in ("1,2", "2,1")


def test_authentication_is_gone() -> None:
    head = undone(presigned(("x-amz-date", "20200101T000000Z"), ("x-amz-signature", "s"), ("acl", ""), ("acl", "")))
    assert (head.headers, head.raw_query) == ({"host": HOST}, "acl=&acl=")


def test_a_request_that_is_signed_in_its_header_stays_as_it_is() -> None:
    headers = {"host": HOST}
    query = "x-amz-acl=private&Expires=1&Signature=s"
    headers |= sigv4.sign_headers(
        "PUT", "/b/k", "Expires=1&Signature=s&x-amz-acl=private", headers, access_key=ACCESS_KEY, secret_key=SECRET_KEY,
        session_token=None, region="r", now=NOW,
    )  # fmt: skip
    head = RequestHead("PUT", "/b/k", query, headers)
    assert undone(head) is head


@pytest.mark.parametrize("name", ["X-Amz-Content-Sha256", "x-amz-content-sha256"])
def test_the_bodys_hash_may_stand_in_the_query(name: str) -> None:
    head = presigned((name, "ab" * 32))
    # kos' own signer signs the usual word: what S3 does with the parameter is sign its value.
    with pytest.raises(S3Error) as refused:
        undone(head)
    assert refused.value.extra["CanonicalRequest"].endswith("\n" + "ab" * 32)


@pytest.mark.parametrize(
    "name", ["X-Amz-Security-Token", "x-amz-security-token", "X-Amz-S3session-Token", "x-amz-s3session-token"]
)
def test_session_tokens_in_the_query(name: str) -> None:
    with pytest.raises(S3Error) as refused:
        undone(presigned((name, "t")))
    assert refused.value.code == "InvalidToken"


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
        undone(presigned((name, value)))
    assert refused.value.code == "InvalidArgument"


def test_a_blank_in_the_query_may_be_sent_as_a_plus() -> None:
    head = presigned(("response-content-disposition", "attachment; filename=a+b c"), method="GET")
    assert "%20" in head.raw_query
    for raw_query in (head.raw_query.replace("%20", "+"), head.raw_query.replace("%3B", ";").replace("%2B", "%2b")):
        found = undone(head._replace(raw_query=raw_query))
        assert parse_query(found.raw_query) == [("response-content-disposition", "attachment; filename=a+b c")]
    with pytest.raises(S3Error) as refused:
        undone(head._replace(raw_query=head.raw_query.replace("%2B", "+")))
    assert refused.value.code == "SignatureDoesNotMatch"


def test_a_signature_in_capitals_is_another_one() -> None:
    head = presigned()
    start, _, signature = head.raw_query.rpartition("=")
    assert signature.upper() != signature
    with pytest.raises(S3Error) as refused:
        undone(head._replace(raw_query=f"{start}={signature.upper()}"))
    assert refused.value.code == "SignatureDoesNotMatch"


def test_an_encoded_slash_is_a_slash() -> None:
    query = sigv4.presign(
        "GET", "/b/x/y%2520z", (), HOST, access_key=ACCESS_KEY, secret_key=SECRET_KEY, region="r", now=NOW, expires_s=60
    )
    assert undone(RequestHead("GET", "/b/x%2Fy%2520z", query, {"host": HOST}))
    with pytest.raises(S3Error):
        undone(RequestHead("GET", "/b/x/y%20z", query, {"host": HOST}))
