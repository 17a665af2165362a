"""Signatures: AWS's published examples, and every refusal."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from kos.errors import S3Error
from kos.s3 import sigv4
from kos.s3.head import RequestHead
from kos.s3.sigv4 import EMPTY_SHA256, Identity, Payload

# https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, sigv4-query-string-auth.html,
# sigv4-streaming.html and sigv4-streaming-trailers.html: keys, bucket, times and signatures are those of the pages.
ACCESS_KEY = "AKIAIOSFODNN7EXAMPLE"
SECRET_KEY = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
SECRETS = {ACCESS_KEY: SECRET_KEY}
NOW = 1369353600.0  # 2013-05-24T00:00:00Z
DATE = "20130524T000000Z"
SCOPE = "20130524/us-east-1/s3/aws4_request"
HOST = "examplebucket.s3.amazonaws.com"


def authorization(signed_headers: str, signature: str, *, scope: str = SCOPE, access_key: str = ACCESS_KEY) -> str:
    return f"AWS4-HMAC-SHA256 Credential={access_key}/{scope},SignedHeaders={signed_headers},Signature={signature}"


def signed(
    method: str = "GET",
    path: str = "/test.txt",
    query: str = "",
    *,
    now: float = NOW,
    secret: str = SECRET_KEY,
    payload_hash: str = EMPTY_SHA256,
    **more: str,
) -> RequestHead:
    """A request signed by kos's own signer (which the tests against botocore vouch for)."""
    headers = {"host": HOST} | {name.replace("_", "-"): value for name, value in more.items()}
    headers |= sigv4.sign_headers(
        method, path, query, headers, access_key=ACCESS_KEY, secret_key=secret, session_token=None, region="us-east-1",
        now=now, payload_hash=payload_hash,
    )  # fmt: skip
    return RequestHead(method, path, query, headers)


def presigned(*, expires_s: int = 86400, now: float = NOW, method: str = "GET", **more: str) -> RequestHead:
    headers = {name.replace("_", "-"): value for name, value in more.items()}
    query = sigv4.presign(
        method, "/test.txt", [], HOST, access_key=ACCESS_KEY, secret_key=SECRET_KEY, region="us-east-1", now=now,
        expires_s=expires_s, headers=headers,
    )  # fmt: skip
    return RequestHead(method, "/test.txt", query, {"host": HOST} | headers)


def refused(head: RequestHead, *, now: float = NOW, secrets: dict[str, str] = SECRETS) -> S3Error:
    with pytest.raises(S3Error) as caught:
        sigv4.verify(head, secrets, now)
    return caught.value


HEADER_EXAMPLES = {
    "get object with range": (
        RequestHead("GET", "/test.txt", "", {"range": "bytes=0-9", "x-amz-content-sha256": EMPTY_SHA256}),
        "host;range;x-amz-content-sha256;x-amz-date",
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
    ),
    "put object": (
        RequestHead(
            "PUT",
            "/test%24file.text",
            "",
            {
                "date": "Fri, 24 May 2013 00:00:00 GMT",
                "x-amz-storage-class": "REDUCED_REDUNDANCY",
                "x-amz-content-sha256": "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072",
            },
        ),
        "date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class",
        "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
    ),
    "get bucket lifecycle": (
        RequestHead("GET", "/", "lifecycle", {"x-amz-content-sha256": EMPTY_SHA256}),
        "host;x-amz-content-sha256;x-amz-date",
        "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
    ),
    "list objects": (
        RequestHead("GET", "/", "max-keys=2&prefix=J", {"x-amz-content-sha256": EMPTY_SHA256}),
        "host;x-amz-content-sha256;x-amz-date",
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
    ),
}


def example(name: str) -> RequestHead:
    head, signed_headers, signature = HEADER_EXAMPLES[name]
    common = {"host": HOST, "x-amz-date": DATE, "authorization": authorization(signed_headers, signature)}
    return head._replace(headers=head.headers | common)


@pytest.mark.parametrize("name", HEADER_EXAMPLES)
def test_published_header_examples(name: str) -> None:
    head = example(name)
    identity = sigv4.verify(head, SECRETS, NOW)
    assert identity.access_key == ACCESS_KEY
    assert identity.payload is Payload.SIGNED
    assert identity.payload_sha256 == head.headers["x-amz-content-sha256"]
    assert identity.scope == SCOPE and identity.amz_date == DATE and not identity.presigned


def test_put_example_written_without_escapes() -> None:
    head = example("put object")._replace(raw_path="/test$file.text")
    assert sigv4.verify(head, SECRETS, NOW).access_key == ACCESS_KEY


def test_query_order_does_not_matter() -> None:
    assert sigv4.verify(example("list objects")._replace(raw_query="prefix=J&max-keys=2"), SECRETS, NOW)


PRESIGNED_EXAMPLE = (
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2Faws4_request"
    "&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host"
    "&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
)


def test_published_presigned_example() -> None:
    identity = sigv4.verify(RequestHead("GET", "/test.txt", PRESIGNED_EXAMPLE, {"host": HOST}), SECRETS, NOW + 86400)
    assert identity.presigned and identity.payload is Payload.UNSIGNED and identity.payload_sha256 is None


@pytest.mark.parametrize("order", [slice(None, None, -1), slice(1, None), slice(None)])
def test_presigned_parameters_in_any_order(order: slice) -> None:
    pieces = PRESIGNED_EXAMPLE.split("&")[order]
    if len(pieces) < 6:
        pieces.append(PRESIGNED_EXAMPLE.split("&")[0])
    assert sigv4.verify(RequestHead("GET", "/test.txt", "&".join(pieces), {"host": HOST}), SECRETS, NOW).presigned


def test_presign_makes_the_published_url() -> None:
    assert presigned().raw_query == PRESIGNED_EXAMPLE


STREAMING = RequestHead(
    "PUT",
    "/examplebucket/chunkObject.txt",
    "",
    {
        "host": "s3.amazonaws.com",
        "x-amz-date": DATE,
        "x-amz-storage-class": "REDUCED_REDUNDANCY",
        "x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
        "content-encoding": "aws-chunked",
        "x-amz-decoded-content-length": "66560",
        "content-length": "66824",
        "authorization": authorization(
            "content-encoding;content-length;host;x-amz-content-sha256;x-amz-date;x-amz-decoded-content-length;"
            "x-amz-storage-class",
            "4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9",
        ),
    },
)


def chunk_chain(identity: Identity) -> list[str]:
    signatures = [identity.seed_signature]
    for chunk in (b"a" * 65536, b"a" * 1024, b""):
        digest = hashlib.sha256(chunk).hexdigest()
        signatures.append(
            sigv4.chunk_signature(identity.signing_key, identity.amz_date, identity.scope, signatures[-1], digest)
        )
    return signatures[1:]


def test_published_chunked_upload() -> None:
    identity = sigv4.verify(STREAMING, SECRETS, NOW)
    assert identity.payload is Payload.STREAMING_SIGNED
    assert chunk_chain(identity) == [
        "ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648",
        "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497",
        "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9",
    ]


def test_published_chunked_upload_with_trailer() -> None:
    headers = STREAMING.headers | {
        "x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER",
        "x-amz-trailer": "x-amz-checksum-crc32c",
        "authorization": authorization(
            "content-encoding;host;x-amz-content-sha256;x-amz-date;x-amz-decoded-content-length;x-amz-storage-class;"
            "x-amz-trailer",
            "106e2a8a18243abcf37539882f36619c00e2dfc72633413f02d3b74544bfeb8e",
        ),
    }
    identity = sigv4.verify(STREAMING._replace(headers=headers), SECRETS, NOW)
    assert identity.payload is Payload.STREAMING_SIGNED_TRAILER
    signatures = chunk_chain(identity)
    assert signatures == [
        "b474d8862b1487a5145d686f57f013e54db672cee1c953b3010fb58501ef5aa2",
        "1c1344b170168f8e65b41376b44b20fe354e373826ccbbe2c1d40a8cae51e5c7",
        "2ca2aba2005185cf7159c6277faf83795951dd77a3a99e6e65d5c9f85863f992",
    ]
    digest = hashlib.sha256(b"x-amz-checksum-crc32c:sOO8/Q==\n").hexdigest()
    trailer = sigv4.trailer_signature(identity.signing_key, identity.amz_date, identity.scope, signatures[-1], digest)
    assert trailer == "d81f82fc3505edab99d459891051a732e8730629a2e4a59689829ca17fe2e435"


# -- what breaks a signature -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"method": "HEAD"},
        {"raw_path": "/test.txt/"},
        {"raw_path": "//test.txt"},
        {"raw_path": "/./test.txt"},
        {"raw_path": "/test.txt%00"},
        {"raw_query": "versionId=1"},
        {"raw_query": "acl"},
    ],
)
def test_changed_request_line_is_noticed(change: dict[str, str]) -> None:
    assert refused(signed()._replace(**change)).code == "SignatureDoesNotMatch"
    query = {key: f"{PRESIGNED_EXAMPLE}&{value}" if key == "raw_query" else value for key, value in change.items()}
    assert refused(presigned()._replace(**query)).code == "SignatureDoesNotMatch"


@pytest.mark.parametrize(
    ("name", "value"),
    [("host", HOST + ":9000"), ("range", "bytes=0-8"), ("x-amz-content-sha256", "0" * 64), ("host", "")],
)
def test_changed_signed_header_is_noticed(name: str, value: str) -> None:
    head = example("get object with range")
    error = refused(head._replace(headers=head.headers | {name: value}))
    assert error.code == "SignatureDoesNotMatch" and error.status == 403


def test_missing_signed_header_is_noticed() -> None:
    head = example("get object with range")
    headers = {name: value for name, value in head.headers.items() if name != "range"}
    assert refused(head._replace(headers=headers)).code == "SignatureDoesNotMatch"


def test_mismatch_shows_what_was_computed() -> None:
    error = refused(signed(secret="wrong"))
    assert error.extra["AWSAccessKeyId"] == ACCESS_KEY
    assert error.extra["CanonicalRequest"].startswith("GET\n/test.txt\n\nhost:examplebucket.s3.amazonaws.com\n")
    assert error.extra["StringToSign"].startswith(f"AWS4-HMAC-SHA256\n{DATE}\n{SCOPE}\n")
    assert len(error.extra["SignatureProvided"]) == 64
    shown = error.extra["StringToSign"].rsplit("\n", 1)[1]
    assert shown == hashlib.sha256(error.extra["CanonicalRequest"].encode()).hexdigest()
    assert SECRET_KEY not in str(error.extra) and "wrong" not in str(error.extra)


@pytest.mark.parametrize("signature", ["é", "\udcff", "A" * 64, "0" * 63, "f" * 65, "0" * 64 + " x"])
def test_odd_signatures_do_not_match(signature: str) -> None:
    text = authorization("host;x-amz-content-sha256;x-amz-date", signature)
    head = RequestHead("GET", "/", "", signed().headers | {"authorization": text})
    assert refused(head).code == "SignatureDoesNotMatch"


def test_verdicts_are_not_remembered() -> None:
    head = presigned()
    for _ in range(2):
        assert sigv4.verify(head, SECRETS, NOW)
        assert refused(head, secrets={ACCESS_KEY: "other"}).code == "SignatureDoesNotMatch"
        assert refused(head._replace(raw_query=head.raw_query[:-1] + "x")).code == "SignatureDoesNotMatch"
        assert refused(head, now=NOW + 86401).message == "Request has expired"


def test_runs_of_blanks_count_as_one() -> None:
    head = signed("PUT", x_amz_meta_note="a b c")
    spaced = head._replace(headers=head.headers | {"x-amz-meta-note": "a   b c"})
    assert sigv4.verify(spaced, SECRETS, NOW)


def test_non_ascii_header_values() -> None:
    assert sigv4.verify(signed("PUT", x_amz_meta_note="gr\u00fc\u00df\udce9"), SECRETS, NOW)
    error = refused(signed("PUT", x_amz_meta_note="\udce9", secret="wrong"))
    assert "\ufffd" in error.extra["CanonicalRequest"]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_anonymous() -> None:
    error = refused(RequestHead("GET", "/bucket/key", "", {"host": HOST}))
    assert (error.code, error.status, error.message) == ("AccessDenied", 403, "Access Denied")
    assert refused(RequestHead("GET", "/b", "prefix=X-Amz-Signature", {"host": HOST})).code == "AccessDenied"


def test_unknown_key() -> None:
    for head in (signed(), presigned()):
        error = refused(head, secrets={"OTHER": SECRET_KEY})
        assert (error.code, error.status) == ("InvalidAccessKeyId", 403)
        assert error.extra == {"AWSAccessKeyId": ACCESS_KEY}


@pytest.mark.parametrize("skew_s", [-901, 901])
def test_skewed_time(skew_s: int) -> None:
    error = refused(signed(), now=NOW + skew_s)
    assert (error.code, error.status) == ("RequestTimeTooSkewed", 403)
    assert error.extra == {
        "RequestTime": DATE,
        "ServerTime": "2013-05-23T23:44:59Z" if skew_s < 0 else "2013-05-24T00:15:01Z",
        "MaxAllowedSkewMilliseconds": "900000",
    }


@pytest.mark.parametrize("skew_s", [-900, 0, 900])
def test_skew_within_fifteen_minutes(skew_s: int) -> None:
    assert sigv4.verify(signed(), SECRETS, NOW + skew_s)


def test_presigned_expiry() -> None:
    head = presigned(expires_s=60)
    assert sigv4.verify(head, SECRETS, NOW + 60)
    error = refused(head, now=NOW + 61)
    assert (error.code, error.status, error.message) == ("AccessDenied", 403, "Request has expired")
    assert error.extra == {
        "X-Amz-Expires": "60",
        "Expires": "2013-05-24T00:01:00Z",
        "ServerTime": "2013-05-24T00:01:01Z",
    }
    assert sigv4.verify(head, SECRETS, NOW - 900)
    assert refused(head, now=NOW - 901).message == "Request is not yet valid"


@pytest.mark.parametrize("expires_s", [1, 604800])
def test_presigned_for_up_to_a_week(expires_s: int) -> None:
    assert sigv4.verify(presigned(expires_s=expires_s), SECRETS, NOW)


@pytest.mark.parametrize("text", ["0", "-1", "604801", "9" * 30, "", "x", "1.5", "%C2%B2", "+1"])
def test_presigned_with_wrong_expires(text: str) -> None:
    query = PRESIGNED_EXAMPLE.replace("X-Amz-Expires=86400", f"X-Amz-Expires={text}")
    error = refused(RequestHead("GET", "/test.txt", query, {"host": HOST}))
    assert (error.code, error.status) == ("AuthorizationQueryParametersError", 400)


@pytest.mark.parametrize("name", ["Algorithm", "Credential", "Date", "Expires", "SignedHeaders", "Signature"])
def test_presigned_needs_all_parameters(name: str) -> None:
    pieces = PRESIGNED_EXAMPLE.split("&")
    left = [piece for piece in pieces if not piece.startswith(f"X-Amz-{name}=")]
    assert len(left) == 5
    error = refused(RequestHead("GET", "/test.txt", "&".join(left), {"host": HOST}))
    assert error.code == "AuthorizationQueryParametersError" and "requires" in error.message
    twice = [*pieces, next(piece for piece in pieces if piece not in left)]
    error = refused(RequestHead("GET", "/test.txt", "&".join(twice), {"host": HOST}))
    assert error.code == "AuthorizationQueryParametersError" and "more than once" in error.message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("AWS4-HMAC-SHA256", "AWS4-ECDSA-P256-SHA256", "X-Amz-Algorithm"),
        ("%2Fs3%2F", "%2Fec2%2F", "incorrect service"),
        ("aws4_request", "aws4", "incorrect terminal"),
        ("%2Faws4_request", "", "mal-formed"),
        ("%2Fus-east-1", "%2F", "mal-formed"),
        ("%2Fus-east-1", "%2Fus%0Aeast", "mal-formed"),
        ("AKIAIOSFODNN7EXAMPLE", "", "mal-formed"),
        ("%2F20130524", "%2F20130525", "credential date"),
        ("20130524T000000Z", "2013-05-24T00:00Z", "ISO8601"),
        ("20130524T000000Z", "20131324T000000Z", "ISO8601"),
        ("SignedHeaders=host", "SignedHeaders=Host", "SignedHeaders"),
        ("SignedHeaders=host", "SignedHeaders=host;", "SignedHeaders"),
        ("SignedHeaders=host", "SignedHeaders=host%0Arange", "SignedHeaders"),
        ("SignedHeaders=host", "SignedHeaders=host" + "%3Ba" * 256, "SignedHeaders"),
    ],
)
def test_malformed_presigned_query(old: str, new: str, words: str) -> None:
    assert old in PRESIGNED_EXAMPLE
    error = refused(RequestHead("GET", "/test.txt", PRESIGNED_EXAMPLE.replace(old, new), {"host": HOST}))
    assert error.code == "AuthorizationQueryParametersError" and words in error.message


GOOD_HEADERS = "host;x-amz-content-sha256;x-amz-date"
MALFORMED = "AuthorizationHeaderMalformed"


def scoped(scope: str) -> str:
    return authorization(GOOD_HEADERS, "0" * 64, scope=scope)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (scoped("20130524/us-east-1/s3"), MALFORMED, "expecting"),
        (scoped("20130524/x/iam/aws4_request"), MALFORMED, "iam"),
        (scoped("20130524/x/s3/aws5"), MALFORMED, "aws5"),
        (scoped("20130525/x/s3/aws4_request"), MALFORMED, "date"),
        (authorization("Host", "0" * 64), MALFORMED, "lower-case"),
        (authorization("", "0" * 64), MALFORMED, "lower-case"),
        (authorization(GOOD_HEADERS, ""), MALFORMED, "three components"),
        ("AWS4-HMAC-SHA256", MALFORMED, "three components"),
        ("AWS4-HMAC-SHA256 Credential=a/20130524/x/s3/aws4_request", MALFORMED, "three components"),
        ("AWS4-HMAC-SHA256 Signature=a,Signature=b", MALFORMED, "three components"),
        ("AWS4-HMAC-SHA256 Credential=a,Credential=b,Signature=c", MALFORMED, "more than once"),
        ("AWS AKIAIOSFODNN7EXAMPLE:frJIUN8DYpKDtOLCwo//yllqDzg=", "InvalidRequest", "AWS4-HMAC-SHA256"),
        ("AWS4-ECDSA-P256-SHA256 Credential=a", "InvalidRequest", "AWS4-HMAC-SHA256"),
        ("Basic dXNlcjpwYXNz", "InvalidArgument", "Unsupported"),
        ("Bearer token", "InvalidArgument", "Unsupported"),
        ("", "InvalidArgument", "Unsupported"),
    ],
)  # fmt: skip
def test_malformed_authorization(text: str, code: str, words: str) -> None:
    head = signed()
    error = refused(head._replace(headers=head.headers | {"authorization": text}))
    assert error.code == code and words in error.message


def test_version_2_query() -> None:
    query = "AWSAccessKeyId=AKIAIOSFODNN7EXAMPLE&Expires=1175139620&Signature=NpgCjnDzrM%2BWFzoENXmpNDUsSn8%3D"
    assert refused(RequestHead("GET", "/test.txt", query, {"host": HOST})).code == "InvalidRequest"
    assert refused(signed()._replace(raw_query=query)).code == "InvalidArgument"


def test_two_mechanisms_at_once() -> None:
    head = presigned()
    error = refused(head._replace(headers=signed().headers))
    assert (error.code, error.status) == ("InvalidArgument", 400) and "Only one auth mechanism" in error.message


def test_session_tokens() -> None:
    head = signed()
    for name in ("x-amz-security-token", "x-amz-s3session-token"):
        assert refused(head._replace(headers=head.headers | {name: "t"})).code == "InvalidToken"
    head = presigned()
    assert refused(head._replace(raw_query=head.raw_query + "&X-Amz-Security-Token=t")).code == "InvalidToken"
    assert refused(head._replace(headers=head.headers | {"x-amz-security-token": "t"})).code == "InvalidToken"


def test_headers_that_must_be_signed() -> None:
    for head in (signed(), presigned()):
        error = refused(head._replace(headers=head.headers | {"x-amz-acl": "public-read", "x-other": "free"}))
        assert (error.code, error.extra) == ("AccessDenied", {"HeadersNotSigned": "x-amz-acl"})
    text = authorization("x-amz-content-sha256;x-amz-date", "0" * 64)
    error = refused(signed()._replace(headers=signed().headers | {"authorization": text}))
    assert (error.code, error.extra) == ("AccessDenied", {"HeadersNotSigned": "host"})


def test_payload_hash_is_needed_with_a_signed_header() -> None:
    headers = {name: value for name, value in signed().headers.items() if name != "x-amz-content-sha256"}
    error = refused(signed()._replace(headers=headers))
    assert error.code == "InvalidRequest" and "x-amz-content-sha256" in error.message


@pytest.mark.parametrize("payload_hash", ["", "0" * 63, "g" * 64, "STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD"])
def test_unknown_payload_hash(payload_hash: str) -> None:
    error = refused(signed(payload_hash=payload_hash))
    assert error.code == "InvalidArgument" and error.extra["ArgumentName"] == "x-amz-content-sha256"


@pytest.mark.parametrize("payload", [payload for payload in Payload if payload is not Payload.SIGNED])
def test_payload_kinds(payload: Payload) -> None:
    for head in (signed("PUT", payload_hash=payload.value), presigned(x_amz_content_sha256=payload.value)):
        identity = sigv4.verify(head, SECRETS, NOW)
        assert identity.payload is payload and identity.payload_sha256 is None


def test_payload_hash_of_a_presigned_request() -> None:
    identity = sigv4.verify(presigned(method="PUT", x_amz_content_sha256="AB" * 32), SECRETS, NOW)
    assert identity.payload is Payload.SIGNED and identity.payload_sha256 == "ab" * 32
    query = sigv4.presign(
        "GET", "/k", [("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD")], HOST, access_key=ACCESS_KEY, secret_key=SECRET_KEY,
        region="us-east-1", now=NOW, expires_s=60,
    )  # fmt: skip
    identity = sigv4.verify(RequestHead("GET", "/k", query, {"host": HOST}), SECRETS, NOW)
    assert identity.payload is Payload.UNSIGNED


@pytest.mark.parametrize("date", ["Fri, 24 May 2013 00:00:00 GMT", "Fri, 24 May 2013 02:00:00 +0200", DATE])
def test_date_header_in_place_of_x_amz_date(date: str) -> None:
    headers = {"host": HOST, "date": date, "x-amz-content-sha256": EMPTY_SHA256}
    names = "date;host;x-amz-content-sha256"
    lines = "".join(f"{name}:{headers[name]}\n" for name in names.split(";"))
    canonical = f"GET\n/k\n\n{lines}\n{names}\n{EMPTY_SHA256}"
    key = sigv4.verify(signed(), SECRETS, NOW).signing_key
    text = f"AWS4-HMAC-SHA256\n{DATE}\n{SCOPE}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    headers["authorization"] = authorization(names, hmac.digest(key, text.encode(), "sha256").hex())
    assert sigv4.verify(RequestHead("GET", "/k", "", headers), SECRETS, NOW).amz_date == DATE


@pytest.mark.parametrize("date", ["", "yesterday", "20130524", "Fri, 99 May 2013 00:00:00 GMT", "x" * 100, "\udcff"])
def test_no_valid_date(date: str) -> None:
    for name in ("date", "x-amz-date"):
        headers = {key: value for key, value in signed().headers.items() if key != "x-amz-date"} | {name: date}
        error = refused(signed()._replace(headers=headers))
        assert error.code == "AccessDenied" and "valid Date" in error.message


def test_any_region_is_taken() -> None:
    for region in ("us-east-1", "eu-central-1", "garage", "X_y.1"):
        headers = {"host": HOST}
        headers |= sigv4.sign_headers(
            "GET", "/", "", headers, access_key=ACCESS_KEY, secret_key=SECRET_KEY, session_token=None, region=region,
            now=NOW,
        )  # fmt: skip
        assert sigv4.verify(RequestHead("GET", "/", "", headers), SECRETS, NOW).scope.split("/")[1] == region


def test_access_key_with_a_slash() -> None:
    headers = {"host": HOST}
    headers |= sigv4.sign_headers(
        "GET", "/", "", headers, access_key="team/a", secret_key="s", session_token=None, region="r", now=NOW
    )
    assert sigv4.verify(RequestHead("GET", "/", "", headers), {"team/a": "s"}, NOW).access_key == "team/a"


@pytest.mark.parametrize("path", ["/a%", "/a%2", "/a%zz"])
def test_broken_escapes_in_the_path(path: str) -> None:
    assert refused(presigned()._replace(raw_path=path)).code == "InvalidURI"


def test_identity_shows_no_secrets() -> None:
    identity = sigv4.verify(presigned(), SECRETS, NOW)
    assert identity.seed_signature not in repr(identity) and repr(identity.signing_key) not in repr(identity)


def test_signed_towards_an_origin() -> None:
    added = sigv4.sign_headers(
        "PUT", "/b/k", "partNumber=1&uploadId=u",
        [("Host", "o:9000"), ("Content-Type", "x/y"), ("User-Agent", "kos"), ("X-Amz-Meta-A", "1"),
         ("x-amz-meta-a", "2"), ("x-amz-date", "stale")],
        access_key=ACCESS_KEY, secret_key=SECRET_KEY, session_token="tok", region="r", now=NOW,
    )  # fmt: skip
    assert list(added) == ["x-amz-date", "x-amz-content-sha256", "x-amz-security-token", "authorization"]
    assert (
        "SignedHeaders=content-type;host;x-amz-content-sha256;x-amz-date;x-amz-meta-a;x-amz-security-token"
        in (added["authorization"])
    )
