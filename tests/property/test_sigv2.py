"""Signature version 2 against botocore's: what it signs is accepted, any change of it is not, and rubbish is refused."""

from __future__ import annotations

import string
from unittest.mock import patch
from urllib.parse import quote

import pytest
from botocore.auth import HmacV1QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import assume, example, given
from hypothesis import strategies as st

from kos.errors import S3Error
from kos.s3 import authentication, names, sigv2
from kos.s3.head import RequestHead

ACCESS_KEY, SECRET_KEY = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
SECRETS = {ACCESS_KEY: SECRET_KEY}
DOMAIN = "kos.test"
NOW = 1700000000.0

odd_text = st.text(st.sampled_from("aZ09-._~ +é%/&=?#;:@!$'()*,[]\"\\<>^`{|}\t日\U0001f600"), max_size=24)
keys = odd_text.filter(bool)
covered = st.sampled_from(["acl", "versionId", "uploadId", "partNumber", "tagging", "response-content-type", "delete"])
free = st.sampled_from(["prefix", "x-id", "max-keys", "x-odd"])
queries = st.dictionaries(st.one_of(covered, free), odd_text, max_size=4)
header_values = st.text(st.sampled_from(string.ascii_letters + string.digits + "  ,;=/+\"'"), max_size=20).map(
    str.strip
)
headers_sent = st.dictionaries(
    st.sampled_from(["content-type", "content-md5", "x-amz-meta-a", "x-amz-acl", "x-amz-copy-source"]), header_values
)
methods = st.sampled_from(["GET", "HEAD", "PUT", "DELETE", "POST"])


@pytest.fixture(autouse=True, scope="module")
def fixed_clock() -> object:
    with patch("botocore.auth.time.time", lambda: NOW):
        yield


def linked(
    method: str, key: str, query: dict[str, str], headers: dict[str, str], expires_s: int, virtual: bool
) -> RequestHead:
    """The request of somebody who opens a link that botocore made, and sends none of the headers again."""
    host = f"bucket.{DOMAIN}:9000" if virtual else f"{DOMAIN}:9000"
    path = "/" + quote(key, safe="/~")
    encoded = "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())
    request = AWSRequest(
        method, f"http://{host}{path if virtual else '/bucket' + path}?{encoded}", headers=dict(headers)
    )
    request.auth_path = f"/bucket{path}"
    HmacV1QueryAuth(Credentials(ACCESS_KEY, SECRET_KEY), expires=expires_s).add_auth(request)
    path, _, raw_query = request.url.removeprefix(f"http://{host}").partition("?")
    return RequestHead(method, path, raw_query, {"host": host})


def claimed(head: RequestHead) -> authentication.Claimed:
    return authentication.claim_of(head, DOMAIN, version_2=True)


@given(methods, keys, queries, headers_sent, st.integers(0, 10**9), st.booleans())
@example("GET", "a b/+é//../%2F~", {"response-content-type": "a+b c; é"}, {}, 60, True)
def test_what_botocore_signs(
    method: str, key: str, query: dict[str, str], headers: dict[str, str], expires_s: int, virtual: bool
) -> None:
    head = linked(method, key, query, headers, expires_s, virtual)
    claim = claimed(head)
    assert isinstance(claim, sigv2.Claimed)
    assert claim.check(SECRETS, NOW + expires_s).access_key == ACCESS_KEY
    assert not claim.holds(SECRETS, NOW + expires_s + 1)
    assert not claim.holds({ACCESS_KEY: SECRET_KEY + "x"}, NOW)
    # Whether or not the headers are sent again, and what they say arrives.
    assert claimed(head._replace(headers=head.headers | headers)).holds(SECRETS, NOW)
    plain = authentication.unpresigned(head, claim)
    assert plain.headers == head.headers | headers
    assert dict(names.parse_query(plain.raw_query)) == query


CHANGES = ("method", "path", "header", "dropped header", "override", "added override", "expires", "bucket", "signature")


@given(methods, keys, queries, headers_sent, st.booleans(), st.sampled_from(CHANGES), st.data())
def test_any_change_of_what_is_covered_is_noticed(
    method: str,
    key: str,
    query: dict[str, str],
    headers: dict[str, str],
    virtual: bool,
    change: str,
    data: st.DataObject,
) -> None:
    head = linked(method, key, query, headers, 60, virtual)
    sent = head._replace(headers=head.headers | headers)
    pieces = sent.raw_query.split("&")
    if change == "method":
        changed = sent._replace(method=data.draw(methods.filter(lambda other: other != method)))
    elif change == "path":
        changed = sent._replace(raw_path=sent.raw_path + data.draw(st.sampled_from(["/", "x", "%20", "//.."])))
    elif change == "header":
        assume(headers)
        name = data.draw(st.sampled_from(sorted(headers)))
        changed = sent._replace(headers=sent.headers | {name: headers[name] + "x"})
    elif change == "dropped header":
        moved = [piece for piece in pieces if piece.startswith(("x-amz-", "content-")) and not piece.endswith("=")]
        assume(moved)
        gone = data.draw(st.sampled_from(moved))
        # Neither sent nor in the link any more.
        changed = head._replace(raw_query="&".join(piece for piece in pieces if piece != gone))
    elif change == "override":
        signed = [name for name in query if name not in ("prefix", "x-id", "max-keys", "x-odd")]
        assume(signed)
        name = data.draw(st.sampled_from(signed))
        changed = sent._replace(
            raw_query="&".join(piece + "x" if piece.startswith(name + "=") else piece for piece in pieces)
        )
    elif change == "added override":
        changed = sent._replace(raw_query=sent.raw_query + "&response-expires=never")
    elif change == "expires":
        changed = sent._replace(
            raw_query=sent.raw_query.replace(f"Expires={int(NOW) + 60}", f"Expires={int(NOW) + 61}")
        )
    elif change == "bucket":
        if virtual:
            changed = sent._replace(headers=sent.headers | {"host": f"other.{DOMAIN}"})
        else:
            changed = sent._replace(raw_path=sent.raw_path.replace("/bucket/", "/other/", 1))
    else:
        changed = sent._replace(raw_query=sent.raw_query.replace("Signature=", "Signature=A"))
    assert changed != sent
    assert claimed(sent).holds(SECRETS, NOW) and not claimed(changed).holds(SECRETS, NOW)


pieces = st.one_of(
    st.sampled_from(
        ["AWSAccessKeyId=a", "Expires=1", "Signature=s", "X-Amz-Signature=s", "acl", "x-amz-acl=%ff", "Expires="]
    ),
    st.text(max_size=12),
)


@given(st.text(max_size=20), st.lists(pieces, max_size=6), st.text(max_size=20), st.booleans())
def test_nothing_but_refusals_for_rubbish(path: str, query: list[str], host: str, virtual: bool) -> None:
    """The text of a head comes from bytes that were read as UTF-8: no lone surrogates but those of escaped bytes."""
    raw = [text.encode("utf-8", "replace").decode() for text in (path, "&".join(query), host)]
    head = RequestHead("GET", "/" + raw[0], raw[1], {"host": raw[2]})
    with pytest.raises(S3Error):
        authentication.claim_of(head, DOMAIN if virtual else None, version_2=True).check(SECRETS, NOW)
