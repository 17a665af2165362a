"""AWS Signature Version 2 in the query of a URL: what boto3 still makes by default for endpoints that are not AWS's.

Owns: the string to sign, the form of the three parameters (AWSAccessKeyId, Expires, Signature), and the verdict. Does not
own: which mechanism a request uses (kos.s3.authentication), version 4 (kos.s3.sigv4). The Authorization header of
version 2 is not spoken: every client that signs its own requests knows version 4.

Invariant: what decides over the request is signed. Version 2 covers the method, the path, the x-amz-* headers,
Content-Type, Content-MD5 and the query parameters in _SIGNED; a request with any other parameter that might name an
operation is refused, since whoever holds a link could have added it. Not covered, as in S3 itself: Range and
conditions, and the parameters that steer a listing. Also as in S3: values are signed decoded, so that an "&" in one reads
like the next parameter. Who signs names that others have chosen (of a download, say) needs version 4.

Clients move x-amz-*, Content-Type and Content-MD5 into the query. There they count like the headers, which come first
where both are given; so a link works whether its user sends the headers again or not.

A bucket has two strings to sign where the path names it without a slash at its end: the one with the path as it was sent,
and that of boto3, which signs the slash and does not send it.

Version 2 says nothing of the body: it counts as unsigned unless x-amz-content-sha256 gives its hash. aws-chunked bodies
with signatures need version 4.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/userguide/RESTAuthentication.html; the list of parameters is longer
now than that page has it, and is that of the AWS SDKs.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, NamedTuple

from kos.errors import S3Error
from kos.s3 import names
from kos.s3 import sigv4_claim as claims
from kos.s3.head import RequestHead
from kos.s3.prepared_hmac import PreparedHmac
from kos.s3.sigv4 import Identity, Payload, payload_of

#: The parameters that are part of the string to sign.
_SIGNED: Final = frozenset(
    {
        "accelerate", "acl", "analytics", "cors", "defaultObjectAcl", "delete", "inventory", "lifecycle", "location",
        "logging", "metrics", "notification", "object-lock", "partNumber", "policy", "replication", "requestPayment",
        "response-cache-control", "response-content-disposition", "response-content-encoding",
        "response-content-language", "response-content-type", "response-expires", "restore", "select", "select-type",
        "storageClass", "tagging", "torrent", "uploadId", "uploads", "versionId", "versioning", "versions", "website",
    }
)  # fmt: skip
#: What may be there unsigned: which part of a listing is wanted.
_LISTING: Final = frozenset(
    {
        "continuation-token", "delimiter", "encoding-type", "fetch-owner", "key-marker", "list-type", "marker",
        "max-keys", "max-parts", "max-uploads", "part-number-marker", "prefix", "start-after", "upload-id-marker",
        "version-id-marker",
    }
)  # fmt: skip
#: Headers besides x-amz-* that clients move into the query.
_MOVED: Final = frozenset({"content-md5", "content-type"})

_EXPIRES: Final = re.compile(r"[0-9]{1,12}", re.ASCII)
_KEY_CACHE_COUNT: Final = 1024


class Claimed(NamedTuple):
    """What a request says of its signature, parsed: all of the check but the time and the secret.

    A pure function of the head, so it may be kept with it. expires: epoch seconds, the last at which it counts. to_sign:
    the string, and the other one that a bucket has, else None. moved: headers that stand in the query, names in lower
    case.
    """

    access_key: str
    expires: int
    to_sign: bytes
    or_to_sign: bytes | None
    provided: str
    payload: Payload
    payload_sha256: str | None
    moved: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        """Without the signature."""
        return f"Claimed({self.access_key}, {self.expires})"

    @property
    def in_query(self) -> bool:
        """See kos.s3.authentication.Claimed."""
        return True

    def is_claim(self, name: str) -> bool:
        """See kos.s3.authentication.Claimed."""
        lower = name.lower()
        return name in claims.VERSION_2_PARAMETERS or lower in _MOVED or lower.startswith("x-amz-")

    def check(self, secrets: Mapping[str, str], now: float) -> Identity:
        """See kos.s3.authentication.Claimed. Raises AccessDenied (expired), InvalidAccessKeyId, SignatureDoesNotMatch."""
        _check_signature(self, secrets, now)
        return Identity(self.access_key, self.payload, self.payload_sha256, self.provided, "", "", b"", True)

    def holds(self, secrets: Mapping[str, str], now: float) -> bool:
        """See kos.s3.authentication.Claimed."""
        try:
            _check_signature(self, secrets, now)
        except S3Error:
            return False
        return True


def claim_of(head: RequestHead, domain: str | None) -> Claimed:
    """What a request claims whose query has all three parameters. domain: of virtual-hosted style, None for path style.

    S3Error: InvalidArgument (signed elsewhere as well), AccessDenied (a parameter given twice; an Expires that is no
    time), InvalidToken (session tokens are unknown here), InvalidRequest (a parameter that version 2 does not cover, a
    body that it cannot cover).
    """
    headers = head.headers
    found: dict[str, str] = {}
    moved: dict[str, str] = {}
    signed: list[tuple[str, str]] = []
    for piece in head.raw_query.split("&"):
        raw_name, equals, raw_value = piece.partition("=")
        name, value = names.query_decode(raw_name), names.query_decode(raw_value)
        lower = name.lower()
        if name in claims.VERSION_2_PARAMETERS:
            if name in found:
                claims.refuse_version_2()
            found[name] = value
        elif name in _SIGNED:
            signed.append((name, f"{name}={value}" if equals else name))
        elif lower in _MOVED or lower.startswith("x-amz-"):
            moved[lower] = f"{moved[lower]},{value}" if lower in moved else value
        elif name and name not in _LISTING and not lower.startswith("x-"):
            raise S3Error(
                "InvalidRequest",
                f"Signature version 2 does not cover the parameter {claims.printable(name)}. "
                f"Please use {claims.ALGORITHM}.",
            )
    if "authorization" in headers or "x-amz-algorithm" in moved or "x-amz-signature" in moved:
        claims.refuse_two_mechanisms()
    amz = moved | headers if moved else headers
    if not claims.TOKEN_HEADERS.isdisjoint(amz):
        raise S3Error("InvalidToken")
    expires = found["Expires"]
    if not _EXPIRES.fullmatch(expires):
        message = f"Invalid date (should be seconds since epoch): {claims.printable(expires)}"
        raise S3Error("AccessDenied", message)
    lines = "".join([f"{name}:{amz[name]}\n" for name in sorted(amz) if name.startswith("x-amz-")])
    text = f"{head.method}\n{amz.get('content-md5', '')}\n{amz.get('content-type', '')}\n{expires}\n{lines}"
    path, parameters = _path(head, domain), _signed_parameters(signed)
    to_sign = f"{text}{path}{parameters}".encode("utf-8", "surrogateescape")
    or_to_sign = None
    if path.find("/", 1) < 0 and path != "/" and "%" not in path:  # an encoded slash may stand before a key
        or_to_sign = f"{text}{path}/{parameters}".encode("utf-8", "surrogateescape")
    payload, payload_sha256 = payload_of(amz.get("x-amz-content-sha256", Payload.UNSIGNED.value))
    if payload not in (Payload.UNSIGNED, Payload.SIGNED):
        raise S3Error("InvalidRequest", f"A body in signed or trailed chunks needs {claims.ALGORITHM}.")
    return Claimed(
        found["AWSAccessKeyId"], int(expires), to_sign, or_to_sign, found["Signature"], payload, payload_sha256,
        tuple(moved.items()),
    )  # fmt: skip


def _path(head: RequestHead, domain: str | None) -> str:
    """The bucket if the host names it, and the path exactly as sent."""
    bucket = names.bucket_of_host(head.headers.get("host", ""), domain) if domain else None
    return head.raw_path if bucket is None else f"/{bucket}{head.raw_path}"


def _signed_parameters(signed: list[tuple[str, str]]) -> str:
    """By name, values decoded."""
    if not signed:
        return ""
    signed.sort(key=lambda pair: pair[0])
    return "?" + "&".join([text for _, text in signed])


def _check_signature(claimed: Claimed, secrets: Mapping[str, str], now: float) -> None:
    access_key, expires, to_sign, or_to_sign, provided, *_ = claimed
    if now > expires:
        raise S3Error(
            "AccessDenied",
            "Request has expired",
            extra={"Expires": claims.iso_time(expires), "ServerTime": claims.iso_time(now)},
        )
    secret = secrets.get(access_key)
    if secret is None:
        raise S3Error("InvalidAccessKeyId", extra={"AWSAccessKeyId": claims.printable(access_key)})
    # compare_digest takes ASCII text only; what else a client may have sent is wrong anyway.
    if provided.isascii():
        key = _signing_key(secret)
        if hmac.compare_digest(key.sign(to_sign), provided):
            return
        if or_to_sign is not None and hmac.compare_digest(key.sign(or_to_sign), provided):
            return
    raise S3Error(
        "SignatureDoesNotMatch",
        extra={
            "AWSAccessKeyId": access_key,
            "StringToSign": claims.printable(to_sign.decode("utf-8", "surrogateescape")),
            "SignatureProvided": claims.printable(provided),
        },
    )


class _SigningKey(PreparedHmac):
    """A secret, ready to sign."""

    __slots__ = ()

    def sign(self, text: bytes) -> str:
        """The signature in Base64."""
        return base64.b64encode(self.digest(text)).decode("ascii")


@lru_cache(maxsize=_KEY_CACHE_COUNT)
def _signing_key(secret: str) -> _SigningKey:
    return _SigningKey(secret.encode(), "sha1")
