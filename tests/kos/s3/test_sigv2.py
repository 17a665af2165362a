"""Signature version 2 in the query: the published example, what it covers, and every refusal."""

from __future__ import annotations

import base64
import hashlib
import hmac
from urllib.parse import quote

import pytest

from kos.errors import S3Error
from kos.s3 import authentication, sigv2
from kos.s3.head import RequestHead
from kos.s3.sigv4 import Identity, Payload

# Of the page "Signing and Authenticating REST Requests": keys, bucket, time and signature.
ACCESS_KEY = "AKIAIOSFODNN7EXAMPLE"
SECRET_KEY = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
SECRETS = {ACCESS_KEY: SECRET_KEY}
EXPIRES = 1175139620
QUERY = f"AWSAccessKeyId={ACCESS_KEY}&Signature=NpgCjnDzrM%2BWFzoENXmpNDUsSn8%3D&Expires={EXPIRES}"
DOMAIN = "s3.amazonaws.com"
HOST = f"johnsmith.{DOMAIN}"
EXAMPLE = RequestHead("GET", "/photos/puppy.jpg", QUERY, {"host": HOST})


def verify(head: RequestHead, *, now: float = EXPIRES, secrets: dict[str, str] = SECRETS) -> Identity:
    return authentication.claim_of(head, DOMAIN, version_2=True).check(secrets, now)


def refused(head: RequestHead, *, now: float = EXPIRES, secrets: dict[str, str] = SECRETS) -> S3Error:
    with pytest.raises(S3Error) as caught:
        verify(head, now=now, secrets=secrets)
    return caught.value


def signed(
    text: str,
    target: str = "/b/k",
    method: str = "GET",
    secret: str = SECRET_KEY,
    expires: str = str(EXPIRES),
    **headers: str,
) -> RequestHead:
    """A request whose string to sign is written down by the test. text: with {} where the time belongs."""
    to_sign = text.format(expires).encode("utf-8", "surrogateescape")
    signature = base64.b64encode(hmac.digest(secret.encode(), to_sign, "sha1")).decode()
    path, _, query = target.partition("?")
    own = f"AWSAccessKeyId={ACCESS_KEY}&Expires={quote(expires)}&Signature={quote(signature, safe='')}"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return RequestHead(method, path, f"{query}&{own}" if query else own, {"host": "kos:9000"} | named)


def test_the_published_example() -> None:
    identity = verify(EXAMPLE)
    assert (identity.access_key, identity.payload, identity.payload_sha256) == (ACCESS_KEY, Payload.UNSIGNED, None)
    assert identity.presigned
    path_style = RequestHead("GET", "/johnsmith/photos/puppy.jpg", QUERY, {"host": DOMAIN})
    assert verify(path_style) == identity


@pytest.mark.parametrize(
    ("text", "target", "method", "headers"),
    [
        ("GET\n\n\n{}\n/b/k", "/b/k", "GET", {}),
        ("DELETE\n\n\n{}\n/b/k", "/b/k", "DELETE", {}),
        ("PUT\nmd5\ntext/x\n{}\n/b/k", "/b/k", "PUT", {"content_md5": "md5", "content_type": "text/x"}),
        ("PUT\nm+d=\ntext/x; a\n{}\n/b/k", "/b/k?content-md5=m%2Bd%3D&Content-Type=text%2Fx%3B+a", "PUT", {}),
        (
            "PUT\n\n\n{}\nx-amz-acl:private\nx-amz-meta-a:b  c\n/b/k",
            "/b/k?x-amz-meta-a=b%20%20c",
            "PUT",
            {"x_amz_acl": "private"},
        ),
        ("PUT\n\n\n{}\nx-amz-acl:sent\n/b/k", "/b/k?X-Amz-Acl=not", "PUT", {"x_amz_acl": "sent"}),
        ("GET\n\n\n{}\nx-amz-meta-a:1,2\n/b/k", "/b/k?x-amz-meta-a=1&X-Amz-Meta-A=2", "GET", {}),
        ("PUT\n\n\n{}\n/b/k?partNumber=3&uploadId=u/+ é", "/b/k?uploadId=u%2F%2B%20%C3%A9&partNumber=3", "PUT", {}),
        ("GET\n\n\n{}\n/b/k?acl", "/b/k?acl", "GET", {}),
        ("GET\n\n\n{}\n/b/k?acl=", "/b/k?acl=", "GET", {}),
        ("GET\n\n\n{}\n/b/k?versionId=2&versionId=1", "/b/k?versionId=2&versionId=1", "GET", {}),
        ("GET\n\n\n{}\n/b/k?response-expires=a b", "/b/k?response-expires=a+b&x-id=GetObject&x-odd=1", "GET", {}),
        ("GET\n\n\n{}\n/b", "/b?list-type=2&prefix=a&max-keys=1", "GET", {}),
        ("GET\n\n\n{}\n/b/?acl", "/b?acl", "GET", {}),
        ("GET\n\n\n{}\n/b/", "/b/", "GET", {}),
        ("GET\n\n\n{}\n/", "/", "GET", {}),
        ("GET\n\n\n{}\n/b/%41+%2f~//é", "/b/%41+%2f~//é", "GET", {}),
        ("GET\n\n\n{}\n/b/k", "/b/k", "GET", {"range": "bytes=0-1", "if_match": "x"}),
    ],
)
def test_what_the_string_to_sign_is_made_of(text: str, target: str, method: str, headers: dict[str, str]) -> None:
    assert verify(signed(text, target, method, **headers)).access_key == ACCESS_KEY


def test_virtual_hosted_style_names_the_bucket_in_the_string() -> None:
    text = "GET\n\n\n{}\n/bucket/k?acl"
    assert verify(signed(text, "/k?acl", host=f"bucket.{DOMAIN}:9000"))
    assert refused(signed(text, "/k?acl", host="other.example:9000")).code == "SignatureDoesNotMatch"


@pytest.mark.parametrize(
    "change",
    [
        {"method": "HEAD"},
        {"raw_path": "/photos/puppy.jpg/"},
        {"raw_path": "/photos/pupp%79.jpg"},
        {"raw_query": QUERY + "&acl"},
        {"raw_query": QUERY + "&versionId=1"},
        {"raw_query": QUERY + "&response-content-type=text/html"},
        {"raw_query": QUERY + "&x-amz-acl=public-read"},
        {"raw_query": QUERY + "&content-type=text/html"},
        {"raw_query": QUERY.replace("9620", "9621")},
        {"raw_query": QUERY.replace("Npg", "NPg")},
        {"raw_query": QUERY.replace("%3D", "")},
        {"raw_query": QUERY.replace("%2B", "+")},
        {"headers": {"host": HOST, "content-type": "text/html"}},
        {"headers": {"host": HOST, "content-md5": "x"}},
        {"headers": {"host": HOST, "x-amz-copy-source": "/other/k"}},
        {"headers": {"host": "other." + DOMAIN}},
    ],
)
def test_a_change_is_noticed(change: dict[str, str]) -> None:
    error = refused(EXAMPLE._replace(**change))  # type: ignore[arg-type]
    assert (error.code, error.status) == ("SignatureDoesNotMatch", 403)


def test_a_slash_that_was_not_sent_counts_for_a_bucket_alone() -> None:
    for text, target in (
        ("GET\n\n\n{}\n/b", "/b/"),
        ("GET\n\n\n{}\n/b/k/", "/b/k"),
        ("GET\n\n\n{}\n//", "/"),
        ("GET\n\n\n{}\n/b%2Fk/", "/b%2Fk"),
    ):
        assert refused(signed(text, target)).code == "SignatureDoesNotMatch"


def test_mismatch_shows_what_was_computed() -> None:
    error = refused(EXAMPLE, secrets={ACCESS_KEY: "other"})
    assert error.extra == {
        "AWSAccessKeyId": ACCESS_KEY,
        "StringToSign": f"GET\n\n\n{EXPIRES}\n/johnsmith/photos/puppy.jpg",
        "SignatureProvided": "NpgCjnDzrM+WFzoENXmpNDUsSn8=",
    }


@pytest.mark.parametrize(
    "parameter",
    [
        "attributes",
        "retention=",
        "legal-hold",
        "renameObject",
        "encryption",
        "session",
        "odd=1",
        "=1&z",
        "%61ttributes",
    ],
)
def test_a_parameter_that_is_not_covered_is_refused(parameter: str) -> None:
    """Whoever holds the link could have added it, and made another operation of it."""
    error = refused(EXAMPLE._replace(raw_query=f"{QUERY}&{parameter}"))
    assert error.code == "InvalidRequest" and "does not cover" in error.message


def test_expiry() -> None:
    error = refused(EXAMPLE, now=EXPIRES + 1)
    assert (error.code, error.status, error.message) == ("AccessDenied", 403, "Request has expired")
    assert error.extra == {"Expires": "2007-03-29T03:40:20Z", "ServerTime": "2007-03-29T03:40:21Z"}
    assert verify(EXAMPLE, now=0), "there is no earliest time, and no longest life"


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "+1", "1.5", "1 ", "\u00b2", "9" * 13, "Thu, 29 Mar 2007 03:40:20 GMT"]
)
def test_expires_that_is_no_time(text: str) -> None:
    error = refused(signed("GET\n\n\n{}\n/b/k", expires=text))
    assert (error.code, error.status) == ("AccessDenied", 403) and "seconds since epoch" in error.message


@pytest.mark.parametrize("name", ["AWSAccessKeyId", "Expires", "Signature"])
def test_all_three_are_needed_and_once(name: str) -> None:
    pieces = QUERY.split("&")
    left = [piece for piece in pieces if not piece.startswith(name)]
    error = refused(EXAMPLE._replace(raw_query="&".join(left)))
    assert (error.code, error.status) == ("AccessDenied", 403) and "requires the Signature" in error.message
    error = refused(EXAMPLE._replace(raw_query="&".join([*pieces, f"{name}=1"])))
    assert (error.code, error.status) == ("AccessDenied", 403) and "each of them once" in error.message


def test_one_alone_is_no_claim() -> None:
    for query in ("Expires=1", "prefix=AWSAccessKeyId", "prefix=Signature%3D"):
        error = refused(EXAMPLE._replace(raw_query=query))
        assert (error.code, error.message) == ("AccessDenied", "Access Denied")


@pytest.mark.parametrize(
    ("more", "headers"),
    [
        (
            "",
            {
                "authorization": "AWS4-HMAC-SHA256 Credential=a/20130524/x/s3/aws4_request,SignedHeaders=host,Signature=s"
            },
        ),
        ("", {"authorization": f"AWS {ACCESS_KEY}:x"}),
        ("&X-Amz-Algorithm=AWS4-HMAC-SHA256", {}),
        ("&X-Amz-Signature=s", {}),
    ],
)
def test_two_mechanisms_at_once(more: str, headers: dict[str, str]) -> None:
    head = EXAMPLE._replace(raw_query=QUERY + more, headers={"host": HOST} | headers)
    for version_2 in (True, False):
        with pytest.raises(S3Error) as caught:
            authentication.claim_of(head, DOMAIN, version_2=version_2)
        if version_2 or headers.get("authorization", "").startswith("AWS4"):
            assert caught.value.code == "InvalidArgument" and "Only one auth mechanism" in caught.value.message


def test_switched_off() -> None:
    with pytest.raises(S3Error) as caught:
        authentication.claim_of(EXAMPLE, DOMAIN, version_2=False)
    assert caught.value.code == "InvalidRequest" and "AWS4-HMAC-SHA256" in caught.value.message


def test_the_header_form_is_not_spoken() -> None:
    head = RequestHead("GET", "/photos/puppy.jpg", "", {"host": HOST, "authorization": f"AWS {ACCESS_KEY}:x"})
    error = refused(head)
    assert error.code == "InvalidRequest" and "AWS4-HMAC-SHA256" in error.message


def test_unknown_key() -> None:
    error = refused(EXAMPLE, secrets={})
    assert (error.code, error.extra) == ("InvalidAccessKeyId", {"AWSAccessKeyId": ACCESS_KEY})


@pytest.mark.parametrize("name", ["x-amz-security-token", "X-Amz-Security-Token", "x-amz-s3session-token"])
def test_session_tokens(name: str) -> None:
    assert refused(EXAMPLE._replace(raw_query=f"{QUERY}&{name}=t")).code == "InvalidToken"
    assert refused(EXAMPLE._replace(headers={"host": HOST, name.lower(): "t"})).code == "InvalidToken"


def test_what_is_said_of_the_body() -> None:
    digest = hashlib.sha256(b"x").hexdigest()
    text = "PUT\n\n\n{}\nx-amz-content-sha256:" + digest + "\n/b/k"
    for target, headers in (("/b/k", {"x_amz_content_sha256": digest}), (f"/b/k?x-amz-content-sha256={digest}", {})):
        identity = verify(signed(text, target, "PUT", **headers))
        assert (identity.payload, identity.payload_sha256) == (Payload.SIGNED, digest)
    for streaming in (payload for payload in Payload if payload.value.startswith("STREAMING")):
        error = refused(EXAMPLE._replace(headers={"host": HOST, "x-amz-content-sha256": streaming.value}))
        assert error.code == "InvalidRequest" and "AWS4-HMAC-SHA256" in error.message
    assert refused(EXAMPLE._replace(headers={"host": HOST, "x-amz-content-sha256": "x"})).code == "InvalidArgument"


@pytest.mark.parametrize("secret", ["s", "k" * 64, "k" * 65, "é/+" * 40])
def test_secrets_of_any_length(secret: str) -> None:
    assert verify(signed("GET\n\n\n{}\n/b/k", secret=secret), secrets={ACCESS_KEY: secret})


@pytest.mark.parametrize("signature", ["%C3%A9", "%FF", "", "a b"])
def test_odd_signatures_do_not_match(signature: str) -> None:
    query = f"AWSAccessKeyId={ACCESS_KEY}&Signature={signature}&Expires={EXPIRES}"
    assert refused(EXAMPLE._replace(raw_query=query)).code == "SignatureDoesNotMatch"


def test_verdicts_are_not_remembered() -> None:
    claimed = sigv2.claim_of(EXAMPLE, DOMAIN)
    for _ in range(2):
        assert claimed.holds(SECRETS, EXPIRES) and not claimed.holds(SECRETS, EXPIRES + 1)
        assert not claimed.holds({ACCESS_KEY: "other"}, EXPIRES) and not claimed.holds({}, EXPIRES)
    assert "Npg" not in repr(claimed) and "Npg" not in repr(claimed.check(SECRETS, EXPIRES))
