"""The one error tree of kos, and the table of S3 error codes.

Owns: every exception type that crosses a module's border, and the HTTP status and default message of every S3 code that
kos raises itself. Does not own: rendering (kos.s3.xml) or deciding which error applies.

Invariant: "ours" and "theirs" never mix: what kos refuses by itself is an S3Error; what the origin said or failed to
say is an OriginError; what an operator must mend is a ConfigError.

Source of codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final


class KosError(Exception):
    """Root of everything that kos raises on purpose."""


class ConfigError(KosError):
    """The configuration cannot be used; the message names file, key, what was found and what is allowed."""


#: code -> (HTTP status, default message)
S3_CODES: Final[dict[str, tuple[int, str]]] = {
    "AccessDenied": (403, "Access Denied"),
    "AuthorizationHeaderMalformed": (400, "The authorization header that you provided is not valid."),
    "AuthorizationQueryParametersError": (400, "The authorization query parameters that you provided are not valid."),
    "BadDigest": (400, "The Content-MD5 or checksum value that you specified did not match what the server received."),
    "EntityTooLarge": (400, "Your proposed upload exceeds the maximum allowed object size."),
    "IncompleteBody": (400, "You did not provide the number of bytes specified by the Content-Length HTTP header."),
    "InternalError": (500, "An internal error occurred. Try again."),
    "InvalidAccessKeyId": (403, "The AWS access key ID that you provided does not exist in our records."),
    "InvalidArgument": (400, "Invalid Argument"),
    "InvalidBucketName": (400, "The specified bucket is not valid."),
    "InvalidDigest": (400, "The Content-MD5 or checksum value that you specified is not valid."),
    "InvalidPartNumber": (416, "The requested partnumber is not satisfiable"),
    "InvalidRange": (416, "The requested range is not satisfiable"),
    "InvalidRequest": (400, "Invalid Request"),
    "InvalidToken": (400, "The provided token is malformed or otherwise not valid."),
    "InvalidURI": (400, "The specified URI couldn't be parsed."),
    "KeyTooLongError": (400, "Your key is too long."),
    "MalformedTrailerError": (
        400,
        "The request contained trailing data that was not well-formed or did not conform to our published schema.",
    ),
    "MalformedXML": (
        400,
        "The XML that you provided was not well formed or did not validate against our published schema.",
    ),
    "MaxMessageLengthExceeded": (400, "Your request was too large."),
    "MethodNotAllowed": (405, "The specified method is not allowed against this resource."),
    "MissingContentLength": (411, "You must provide the Content-Length HTTP header."),
    "NoSuchKey": (404, "The specified key does not exist."),
    "NoSuchVersion": (404, "The specified version does not exist."),
    "NotImplemented": (501, "A header that you provided implies functionality that is not implemented."),
    "PreconditionFailed": (412, "At least one of the preconditions that you specified did not hold."),
    "RequestHeaderSectionTooLarge": (400, "Your request header section exceeds the maximum allowed size."),
    "RequestTimeTooSkewed": (403, "The difference between the request time and the server's time is too large."),
    "RequestTimeout": (
        400,
        "Your socket connection to the server was not read from or written to within the timeout period.",
    ),
    "ServiceUnavailable": (503, "Service is unable to handle request."),
    "SignatureDoesNotMatch": (
        403,
        "The request signature we calculated does not match the signature you provided. "
        "Check your key and signing method.",
    ),
    "SlowDown": (503, "Please reduce your request rate."),
    "XAmzContentSHA256Mismatch": (400, "The provided 'x-amz-content-sha256' header does not match what was computed."),
}


class S3Error(KosError):
    """An answer that kos itself gives in S3's form.

    code: a key of S3_CODES. message: replaces the default. extra: further elements of the XML document (for example
    ServerTime). headers: further response headers (for example Retry-After in seconds).
    """

    def __init__(
        self,
        code: str,
        message: str | None = None,
        *,
        extra: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        status, default = S3_CODES[code]
        self.code = code
        self.status = status
        self.message = default if message is None else message
        self.extra = dict(extra or {})
        self.headers = dict(headers or {})
        super().__init__(f"{code}: {self.message}")


class OriginError(KosError):
    """The origin failed, or refused."""


class OriginUnavailable(OriginError):
    """The origin could not be reached or is held back by the breaker; retry_after_s: when asking again makes sense."""

    def __init__(self, reason: str, *, retry_after_s: float = 1.0) -> None:
        self.reason = reason
        self.retry_after_s = retry_after_s
        super().__init__(reason)


class OriginBroken(OriginError):
    """The origin's answer broke off, was longer or shorter than announced, or was no proper HTTP."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class OriginRefused(OriginError):
    """The origin answered with an HTTP error; status, end-to-end headers and body (bounded), to be passed on."""

    def __init__(self, status: int, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        self.status = status
        self.headers = tuple(headers)
        self.body = body
        super().__init__(f"origin answered {status}")
