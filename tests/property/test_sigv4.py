"""Signatures against botocore's: what it signs is accepted here, and what is signed here it would have signed alike."""

from __future__ import annotations

import string
from datetime import UTC, datetime
from unittest.mock import patch
from urllib.parse import quote

import pytest
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import example, given
from hypothesis import strategies as st

from kos.errors import S3Error
from kos.s3 import names, sigv4
from kos.s3.head import RequestHead

ACCESS_KEY, SECRET_KEY, REGION = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "eu-central-1"
SECRETS = {ACCESS_KEY: SECRET_KEY}
HOST = "127.0.0.1:9000"
NOW = 1700000000.0
CREDENTIALS = Credentials(ACCESS_KEY, SECRET_KEY)

odd_text = st.text(st.sampled_from("aZ09-._~ +é%/&=?#;:@!$'()*,[]\"\\<>^`{|}\t日\U0001f600"), max_size=24)
keys = st.one_of(odd_text, st.text(max_size=12).filter(lambda text: text.isprintable()))
queries = st.lists(st.tuples(odd_text.filter(bool).map("p".__add__), odd_text), max_size=5)
header_values = st.text(st.sampled_from(string.ascii_letters + string.digits + "  ,;=/+\"'"), max_size=20)
headers_sent = st.dictionaries(
    st.sampled_from(["range", "accept-encoding", "content-type", "if-match", "x-amz-meta-a", "x-amz-checksum-mode"]),
    header_values,
)
unique_queries = queries.map(lambda pairs: list(dict(pairs).items()))  # botocore presigns a repeated name once


class _FixedClock:
    @staticmethod
    def get_current_datetime(remove_tzinfo: bool = True) -> datetime:
        moment = datetime.fromtimestamp(NOW, UTC)
        return moment.replace(tzinfo=None) if remove_tzinfo else moment


@pytest.fixture(autouse=True, scope="module")
def fixed_clock() -> object:
    with patch("botocore.auth.get_current_datetime", _FixedClock.get_current_datetime):
        yield


def split_url(url: str) -> tuple[str, str]:
    target = url.removeprefix(f"http://{HOST}")
    path, _, query = target.partition("?")
    return path, query


def encoded(pairs: list[tuple[str, str]]) -> str:
    return "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in pairs)


@given(keys, queries, headers_sent, st.sampled_from(["GET", "PUT", "DELETE"]))
@example("a b/+é//../%2F~", [("prefix", "a+b c"), ("p", "a"), ("p-1", "b"), ("p", "")], {"range": "a  b"}, "GET")
def test_what_botocore_signs_in_the_header(
    key: str, query: list[tuple[str, str]], headers: dict[str, str], method: str
) -> None:
    url = f"http://{HOST}/bucket/{quote(key, safe='/~')}?{encoded(query)}"
    request = AWSRequest(method, url, headers=headers | {"host": HOST})
    S3SigV4Auth(CREDENTIALS, "s3", REGION).add_auth(request)
    path, raw_query = split_url(url)
    sent = {name.lower(): value.strip() for name, value in request.headers.items()}
    identity = sigv4.verify(RequestHead(method, path, raw_query, sent), SECRETS, NOW)
    assert identity.access_key == ACCESS_KEY
    assert names.split_target(path, HOST, None) == ("bucket", key or None)


@given(keys, unique_queries, headers_sent, st.integers(1, 604800))
@example("a b/+é//../%2F~", [("response-content-type", "text/plain; charset=utf-8")], {"x-amz-meta-a": "1"}, 60)
def test_what_botocore_presigns(
    key: str, query: list[tuple[str, str]], headers: dict[str, str], expires_s: int
) -> None:
    url = f"http://{HOST}/bucket/{quote(key, safe='/~')}?{encoded(query)}"
    request = AWSRequest("GET", url, headers=headers | {"host": HOST})
    S3SigV4QueryAuth(CREDENTIALS, "s3", REGION, expires=expires_s).add_auth(request)
    path, raw_query = split_url(request.url)
    sent = {name.lower(): value.strip() for name, value in request.headers.items()}
    head = RequestHead("GET", path, raw_query, sent)
    assert sigv4.verify(head, SECRETS, NOW + expires_s).presigned
    with pytest.raises(S3Error, match="SignatureDoesNotMatch"):
        sigv4.verify(head._replace(raw_path=path + "x"), SECRETS, NOW)


@given(keys, queries, headers_sent)
def test_signing_as_botocore_does(key: str, query: list[tuple[str, str]], headers: dict[str, str]) -> None:
    unsigned = ("range", "accept-encoding", "if-match")
    headers = {name: value.strip() for name, value in headers.items() if name not in unsigned} | {"host": HOST}
    path, canonical_query = f"/bucket/{names.encode_key(key)}", sigv4.canonical_query(query)
    request = AWSRequest("PUT", f"http://{HOST}{path}?{canonical_query}", headers=headers)
    request.headers["X-Amz-Content-SHA256"] = "UNSIGNED-PAYLOAD"
    S3SigV4Auth(CREDENTIALS, "s3", REGION).add_auth(request)
    added = sigv4.sign_headers(
        "PUT", path, canonical_query, headers, access_key=ACCESS_KEY, secret_key=SECRET_KEY, session_token=None,
        region=REGION, now=NOW,
    )  # fmt: skip
    identity = sigv4.verify(RequestHead("PUT", path, canonical_query, headers | added), SECRETS, NOW)
    assert identity.amz_date == added["x-amz-date"] == request.headers["X-Amz-Date"]
    if request.headers["X-Amz-Content-SHA256"] == "UNSIGNED-PAYLOAD":
        assert added["authorization"] == request.headers["Authorization"]


@given(keys, unique_queries, st.integers(1, 604800))
def test_presigning_as_botocore_does(key: str, query: list[tuple[str, str]], expires_s: int) -> None:
    path = f"/bucket/{names.encode_key(key)}"
    request = AWSRequest("GET", f"http://{HOST}{path}?{encoded(query)}", headers={"host": HOST})
    S3SigV4QueryAuth(CREDENTIALS, "s3", REGION, expires=expires_s).add_auth(request)
    ours = sigv4.presign(
        "GET", path, query, HOST, access_key=ACCESS_KEY, secret_key=SECRET_KEY, region=REGION, now=NOW,
        expires_s=expires_s,
    )  # fmt: skip
    assert ours.rpartition("=")[2] == request.url.rpartition("=")[2]


@given(st.text(max_size=30), st.text(max_size=60), st.text(max_size=60), st.text(max_size=30))
@example("/", "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=", "AWS4-HMAC-SHA256 Credential=", "Fri, 24 May 2013")
def test_nothing_but_refusals_for_rubbish(path: str, query: str, authorization: str, date: str) -> None:
    for headers in ({"authorization": authorization, "date": date, "host": HOST}, {"host": HOST, "date": date}, {}):
        raw = [text.encode("utf-8", "replace").decode() for text in (path, query)]
        with pytest.raises(S3Error):
            sigv4.verify(RequestHead("GET", "/" + raw[0], raw[1], headers), SECRETS, NOW)


@given(st.binary(max_size=40))
def test_paths_of_any_bytes_have_one_canonical_form(raw: bytes) -> None:
    wire = "/" + quote(raw, safe="/")
    canonical = names.canonical_path(wire)
    assert names.canonical_path(canonical) == canonical
    assert names.canonical_path("/" + "".join(f"%{byte:02x}" if byte != 0x2F else "/" for byte in raw)) == canonical
