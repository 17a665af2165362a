"""AWS Signature Version 4 for S3: checking what clients signed, signing what goes to an origin.

Owns: the canonical request, the string to sign, derived keys, and the verdict. Does not own: which mechanism a request
uses (kos.s3.authentication), the form of what a request says of its signature (kos.s3.sigv4_claim), bodies
(kos.s3.aws_chunked and kos.s3.checksums take the Identity and go on from there), or who may do what.

Invariant: verify returns an Identity only after the signature over this very request was computed anew and compared in
constant time. What is remembered between requests are pure functions of their arguments (how a query or a path is
encoded, what a credential says, a derived key), never a verdict.

The region in a credential's scope is whatever the client signed with: clients differ in their default, and kos stands
for one region only. Service and terminator must be "s3" and "aws4_request".

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-authenticating-requests.html and the pages below it
(header-based, query-string, streaming), https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final, NamedTuple, NoReturn

from kos.errors import S3Error
from kos.s3 import names
from kos.s3 import sigv4_claim as claims
from kos.s3.head import RequestHead
from kos.s3.prepared_hmac import PreparedHmac
from kos.s3.sigv4_claim import ALGORITHM, AUTH_PARAMETERS, EXPIRES_MAX_S, Claim, PresignClaim, canonical_query

__all__ = [
    "ALGORITHM", "AUTH_PARAMETERS", "EMPTY_SHA256", "EXPIRES_MAX_S", "SKEW_MAX_S", "UNSIGNED_PAYLOAD", "Identity",
    "Payload", "canonical_query", "chunk_signature", "payload_of", "presign", "sign_headers", "trailer_signature",
    "verify",
]  # fmt: skip

EMPTY_SHA256: Final = hashlib.sha256(b"").hexdigest()
UNSIGNED_PAYLOAD: Final = "UNSIGNED-PAYLOAD"
SKEW_MAX_S: Final = 15 * 60

# Remembered per process: 4 096 paths of at most 512 characters are 5 MB at worst; 1 024 derived keys 1 MB.
_PATH_CACHE_COUNT: Final = 4096
_PATH_CACHE_LENGTH_MAX: Final = 512
_KEY_CACHE_COUNT: Final = 1024

#: Besides x-amz-*: what is signed towards an origin. The rest may be changed on the way by a well-meaning proxy.
_SIGNED_TO_ORIGIN: Final = frozenset({"host", "content-type", "content-md5"})


class Payload(enum.Enum):
    """How the body is covered by the signature, as x-amz-content-sha256 says."""

    UNSIGNED = UNSIGNED_PAYLOAD
    SIGNED = "sha256"
    STREAMING_SIGNED = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
    STREAMING_SIGNED_TRAILER = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
    STREAMING_UNSIGNED_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"


_PAYLOADS: Final[dict[str, Payload]] = {payload.value: payload for payload in Payload if payload is not Payload.SIGNED}


class Identity(NamedTuple):
    """Who signed a request, and what is needed to check the body that follows.

    payload_sha256: lower-case hex if payload is SIGNED, else None. seed_signature: the request's own signature, from
    which chunk signatures go on. scope: "date/region/s3/aws4_request". signing_key: the key derived for that scope.
    """

    access_key: str
    payload: Payload
    payload_sha256: str | None
    seed_signature: str
    scope: str
    amz_date: str
    signing_key: bytes
    presigned: bool

    def __repr__(self) -> str:
        """Without signature and key: an identity may end up in a log."""
        return f"Identity({self.access_key}, {self.payload.name}, {self.scope}, presigned={self.presigned})"


class _SigningKey(PreparedHmac):
    """A derived key, ready to sign."""

    __slots__ = ("key",)

    def __init__(self, key: bytes) -> None:
        super().__init__(key, "sha256")
        self.key = key

    def sign(self, text: bytes) -> str:
        """The signature in hex."""
        return self.digest(text).hex()


class Claimed(NamedTuple):
    """What a request says of its signature, parsed: all of the check but the time and the secret.

    A pure function of the head, so it may be kept with it. not_before, not_after: epoch seconds between which it counts.
    canonical: the canonical request. to_sign: the string to sign. said_time: the request's own time as sent, for the
    error. presigned: its query's claim, None for one in the header.
    """

    claim: Claim
    amz_date: str
    not_before: float
    not_after: float
    canonical: str
    to_sign: bytes
    provided: str
    payload_hash: str
    said_time: str
    presigned: PresignClaim | None

    def __repr__(self) -> str:
        """Without the signature."""
        return f"Claimed({self.claim.credential.access_key}, {self.claim.credential.scope})"

    @property
    def access_key(self) -> str:
        """See kos.s3.authentication.Claimed."""
        return self.claim.credential.access_key

    @property
    def in_query(self) -> bool:
        """See kos.s3.authentication.Claimed."""
        return self.presigned is not None

    @property
    def moved(self) -> tuple[tuple[str, str], ...]:
        """See kos.s3.authentication.Claimed."""
        return () if self.presigned is None else self.presigned.moved

    def is_claim(self, name: str) -> bool:
        """See kos.s3.authentication.Claimed."""
        return self.presigned is not None and name.lower().startswith("x-amz-")

    def check(self, secrets: Mapping[str, str], now: float) -> Identity:
        """The second half of verify(): the time, the secret, and the signature computed anew and compared."""
        key = _check_signature(self, secrets, now)
        credential = self.claim.credential
        payload, payload_sha256 = _PAYLOADS.get(self.payload_hash), None
        if payload is None:
            payload, payload_sha256 = payload_of(self.payload_hash)
        return Identity(
            credential.access_key, payload, payload_sha256, self.provided, credential.scope, self.amz_date, key,
            self.presigned is not None,
        )  # fmt: skip

    def holds(self, secrets: Mapping[str, str], now: float) -> bool:
        """check() for who only wants to know whether the signature is right."""
        try:
            _check_signature(self, secrets, now)
        except S3Error:
            return False
        return True


def verify(head: RequestHead, secrets: Mapping[str, str], now: float) -> Identity:
    """Who signed this request; S3Error if nobody did, or not so that it may count.

    secrets: access key -> secret key. now: epoch seconds. Errors are S3's: AccessDenied (anonymous, expired, headers
    not signed), InvalidAccessKeyId, SignatureDoesNotMatch, RequestTimeTooSkewed, InvalidToken (session tokens are
    unknown here), AuthorizationHeaderMalformed, AuthorizationQueryParametersError, InvalidArgument, InvalidRequest.
    """
    return claim_of(head).check(secrets, now)


def claim_of(head: RequestHead) -> Claimed:
    """The first half of verify(): everything that the head alone decides. Raises S3Error as verify() does."""
    headers = head.headers
    authorization = headers.get("authorization")
    rest, provided = claims.cut_signature(head.raw_query)
    presigned = claims.presign_claim(rest) if "X-Amz-" in rest else None
    if presigned is None:
        if provided is not None:
            claims.refuse_incomplete_query()
        if authorization is None:
            claims.refuse_unclaimed(head)
        return _claimed_in_header(head, authorization)
    if authorization is not None:
        claims.refuse_two_mechanisms()
    if provided is None:
        claims.refuse_incomplete_query()
    if "AWSAccessKeyId=" in rest and claims.is_version_2(rest):
        claims.refuse_two_mechanisms()
    if not claims.TOKEN_HEADERS.isdisjoint(headers):
        raise S3Error("InvalidToken")
    claim, amz_date, signed_at, expires_s, payload_hash, query, _ = presigned
    payload_hash = headers.get("x-amz-content-sha256") or payload_hash or UNSIGNED_PAYLOAD
    canonical = _canonical_request(head, claim, query, payload_hash)
    return Claimed(
        claim, amz_date, signed_at - SKEW_MAX_S, signed_at + expires_s, canonical,
        _string_to_sign(canonical, amz_date, claim.credential.scope), provided, payload_hash, "", presigned,
    )  # fmt: skip


def _claimed_in_header(head: RequestHead, authorization: str) -> Claimed:
    headers = head.headers
    text, provided = claims.cut_header_signature(authorization)
    claim = claims.header_claim(text)
    if not provided:
        claims.refuse_header(claims.HEADER_NEEDS)
    if "AWSAccessKeyId=" in head.raw_query and claims.is_version_2(head.raw_query):
        claims.refuse_two_mechanisms()
    if not claims.TOKEN_HEADERS.isdisjoint(headers):
        raise S3Error("InvalidToken")
    amz_date, signed_at = claims.header_date(headers)
    if amz_date[:8] != claim.credential.date:
        claims.refuse_header(claims.wrong_date(claim.credential.date, amz_date))
    payload_hash = headers.get("x-amz-content-sha256")
    if payload_hash is None:
        raise S3Error("InvalidRequest", "Missing required header for this request: x-amz-content-sha256")
    query = head.raw_query
    canonical = _canonical_request(head, claim, claims.canonical_raw_query(query) if query else "", payload_hash)
    said_time = headers.get("x-amz-date") or headers.get("date", "")
    return Claimed(
        claim, amz_date, signed_at - SKEW_MAX_S, signed_at + SKEW_MAX_S, canonical,
        _string_to_sign(canonical, amz_date, claim.credential.scope), provided, payload_hash, said_time, None,
    )  # fmt: skip


def _canonical_request(head: RequestHead, claim: Claim, query: str, payload_hash: str) -> str:
    """The canonical request; S3Error AccessDenied if a header that must be signed is not."""
    headers = head.headers
    signed_names = claim.signed_names
    for name in headers:
        if name[:6] == "x-amz-" and name not in signed_names:
            _refuse_unsigned(headers, claim)
    if "host" not in signed_names:
        _refuse_unsigned(headers, claim)
    lines = _header_lines(headers, signed_names)
    raw_path = head.raw_path
    path = _known_path(raw_path) if len(raw_path) <= _PATH_CACHE_LENGTH_MAX else names.canonical_path(raw_path)
    return f"{head.method}\n{path}\n{query}\n{lines}\n{claim.signed_headers}\n{payload_hash}"


def payload_of(payload_hash: str) -> tuple[Payload, str | None]:
    """What x-amz-content-sha256 says: the kind, and the body's hash in lower-case hex where it gives one.

    Raises InvalidArgument for anything else.
    """
    payload = _PAYLOADS.get(payload_hash)
    return (Payload.SIGNED, _hex_sha256(payload_hash)) if payload is None else (payload, None)


def _check_signature(claimed: Claimed, secrets: Mapping[str, str], now: float) -> bytes:
    """The derived key, if the signature is right and this is the time for it; raises S3Error as verify() does."""
    claim, _, not_before, not_after, canonical, to_sign, provided, _, said_time, presigned = claimed
    if not not_before <= now <= not_after:
        if presigned is not None:
            _refuse_time(presigned, now)
        raise S3Error(
            "RequestTimeTooSkewed",
            extra={
                "RequestTime": said_time,
                "ServerTime": claims.iso_time(now),
                "MaxAllowedSkewMilliseconds": str(SKEW_MAX_S * 1000),
            },
        )
    access_key, date, region, _ = claim.credential
    secret = secrets.get(access_key)
    if secret is None:
        raise S3Error("InvalidAccessKeyId", extra={"AWSAccessKeyId": claims.printable(access_key)})
    key = _signing_key(secret, date, region)
    # compare_digest takes ASCII text only; what else a client may have sent is wrong anyway.
    if not provided.isascii() or not hmac.compare_digest(key.sign(to_sign), provided):
        raise S3Error(
            "SignatureDoesNotMatch",
            extra={
                "AWSAccessKeyId": access_key,
                "StringToSign": claims.printable(to_sign.decode("utf-8", "surrogateescape")),
                "SignatureProvided": claims.printable(provided),
                "CanonicalRequest": claims.printable(canonical),
            },
        )
    return key.key


def _header_lines(headers: Mapping[str, str], signed_names: tuple[str, ...]) -> str:
    """The canonical headers: exactly the listed ones, runs of blanks as one; one that is not there counts as empty."""
    lines = ""
    for name in signed_names:
        value = headers.get(name, "")
        if "  " in value:
            value = " ".join([word for word in value.split(" ") if word])
        lines += f"{name}:{value}\n"
    return lines


def _string_to_sign(canonical: str, amz_date: str, scope: str) -> bytes:
    digest = hashlib.sha256(canonical.encode("utf-8", "surrogateescape")).hexdigest()
    return f"AWS4-HMAC-SHA256\n{amz_date}\n{scope}\n{digest}".encode("utf-8", "surrogateescape")


def _sign(canonical: str, amz_date: str, scope: str, key: _SigningKey) -> str:
    return key.sign(_string_to_sign(canonical, amz_date, scope))


def _hex_sha256(text: str) -> str:
    try:
        well_formed = len(text) == 64 and len(bytes.fromhex(text)) == 32
    except ValueError:
        well_formed = False
    if not well_formed:
        raise S3Error(
            "InvalidArgument",
            "x-amz-content-sha256 must be UNSIGNED-PAYLOAD, STREAMING-UNSIGNED-PAYLOAD-TRAILER, "
            "STREAMING-AWS4-HMAC-SHA256-PAYLOAD, STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER, or a valid sha256 value.",
            extra={"ArgumentName": "x-amz-content-sha256", "ArgumentValue": claims.printable(text)},
        )
    return text.lower()


@lru_cache(maxsize=_KEY_CACHE_COUNT)
def _signing_key(secret: str, date: str, region: str) -> _SigningKey:
    key = ("AWS4" + secret).encode()
    for part in (date, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode("utf-8", "surrogateescape"), "sha256")
    return _SigningKey(key)


_known_path = lru_cache(maxsize=_PATH_CACHE_COUNT)(names.canonical_path)


def _refuse_time(presigned: PresignClaim, now: float) -> NoReturn:
    """A presigned request after its time, or further before it than clocks may differ."""
    expired = now > presigned.signed_at
    raise S3Error(
        "AccessDenied",
        "Request has expired" if expired else "Request is not yet valid",
        extra={
            "X-Amz-Expires": str(presigned.expires_s),
            "Expires": claims.iso_time(presigned.signed_at + presigned.expires_s),
            "ServerTime": claims.iso_time(now),
        },
    )


def _refuse_unsigned(headers: Iterable[str], claim: Claim) -> NoReturn:
    must = ["host", *(name for name in headers if name.startswith("x-amz-"))]
    raise S3Error(
        "AccessDenied",
        "There were headers present in the request which were not signed",
        extra={
            "HeadersNotSigned": ", ".join(claims.printable(name) for name in must if name not in claim.signed_names)
        },
    )


# -- signing -----------------------------------------------------------------------------------------------------------


def sign_headers(
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str] | Iterable[tuple[str, str]],
    *,
    access_key: str,
    secret_key: str,
    session_token: str | None,
    region: str,
    now: float,
    payload_hash: str = UNSIGNED_PAYLOAD,
) -> dict[str, str]:
    """The headers to add to a request to an origin: x-amz-date, x-amz-content-sha256, authorization, and the token's.

    path and query: as they will be on the wire, in canonical form (names.encode_key, canonical_query). headers: those
    of the request, "host" with its port among them; host, content-type, content-md5 and x-amz-* are signed. now: epoch
    seconds. payload_hash: hex, UNSIGNED_PAYLOAD or a streaming form.
    """
    amz_date = claims.amz_time(now)
    added = {"x-amz-date": amz_date, "x-amz-content-sha256": payload_hash}
    if session_token:
        added["x-amz-security-token"] = session_token
    fields: dict[str, str] = {}
    for name, value in headers.items() if isinstance(headers, Mapping) else headers:
        name = name.lower()
        if (name in _SIGNED_TO_ORIGIN or name.startswith("x-amz-")) and name not in added:
            fields[name] = f"{fields[name]},{value.strip()}" if name in fields else value.strip()
    fields.update(added)
    signed_names = tuple(sorted(fields))
    scope = f"{amz_date[:8]}/{region}/s3/aws4_request"
    signed_headers = ";".join(signed_names)
    canonical = f"{method}\n{path}\n{query}\n{_header_lines(fields, signed_names)}\n{signed_headers}\n{payload_hash}"
    signature = _sign(canonical, amz_date, scope, _signing_key(secret_key, amz_date[:8], region))
    added["authorization"] = (
        f"{ALGORITHM} Credential={access_key}/{scope}, SignedHeaders={signed_headers}, Signature={signature}"
    )
    return added


def presign(
    method: str,
    path: str,
    query: Iterable[tuple[str, str]],
    host: str,
    *,
    access_key: str,
    secret_key: str,
    session_token: str | None = None,
    region: str,
    now: float,
    expires_s: int,
    headers: Mapping[str, str] | None = None,
) -> str:
    """The whole query of a presigned URL. path: encoded; query: decoded pairs; headers: further ones to be signed."""
    amz_date = claims.amz_time(now)
    scope = f"{amz_date[:8]}/{region}/s3/aws4_request"
    fields = {name.lower(): value.strip() for name, value in (headers or {}).items()} | {"host": host}
    signed_names = tuple(sorted(fields))
    signed_headers = ";".join(signed_names)
    pairs = [
        *query,
        ("X-Amz-Algorithm", ALGORITHM),
        ("X-Amz-Credential", f"{access_key}/{scope}"),
        ("X-Amz-Date", amz_date),
        ("X-Amz-Expires", str(expires_s)),
        ("X-Amz-SignedHeaders", signed_headers),
    ]
    if session_token:
        pairs.append(("X-Amz-Security-Token", session_token))
    payload_hash = fields.get("x-amz-content-sha256", UNSIGNED_PAYLOAD)
    text = canonical_query(pairs)
    canonical = f"{method}\n{path}\n{text}\n{_header_lines(fields, signed_names)}\n{signed_headers}\n{payload_hash}"
    return f"{text}&X-Amz-Signature={_sign(canonical, amz_date, scope, _signing_key(secret_key, amz_date[:8], region))}"


def chunk_signature(signing_key: bytes, amz_date: str, scope: str, previous: str, chunk_sha256: str) -> str:
    """The signature of one aws-chunked chunk, given the signature before it (the seed for the first)."""
    text = f"AWS4-HMAC-SHA256-PAYLOAD\n{amz_date}\n{scope}\n{previous}\n{EMPTY_SHA256}\n{chunk_sha256}"
    return hmac.digest(signing_key, text.encode(), "sha256").hex()


def trailer_signature(signing_key: bytes, amz_date: str, scope: str, previous: str, trailers_sha256: str) -> str:
    """The signature of the trailers; trailers_sha256 is over "name:value\\n" lines, previous that of the last chunk."""
    text = f"AWS4-HMAC-SHA256-TRAILER\n{amz_date}\n{scope}\n{previous}\n{trailers_sha256}"
    return hmac.digest(signing_key, text.encode(), "sha256").hex()
