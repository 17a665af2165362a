"""Errors as S3 says them: the one place where status, headers and document of an error are made.

Owns: the form of kos' own errors and of those that the origin gave. Does not own: which error applies.

Invariant: every error has a request id, and none has a body where HTTP allows none (HEAD, 304).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kos.errors import OriginBroken, OriginRefused, OriginUnavailable, S3Error
from kos.s3.head import RequestHead
from kos.s3.object_response import http_date, render_head
from kos.s3.xml import error_document

#: Of the origin's answer, what belongs to its connection or is made anew.
DROPPED: Final = frozenset(
    {
        "connection", "content-length", "date", "keep-alive", "proxy-authenticate", "proxy-connection", "server", "te",
        "trailer", "transfer-encoding", "upgrade", "x-amz-id-2", "x-amz-request-id",
    }
)  # fmt: skip
NO_BODY: Final = frozenset({204, 304})


@dataclass(frozen=True, slots=True)
class Rendered:
    """A whole response."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


def cache_note(phase: str, reason: str | None) -> str:
    """The value of x-kos-cache: how the request was answered, and why so if it was no plain hit."""
    return phase if reason is None or phase == "hit" else f"{phase};reason={reason}"


def common(request_id: str, now: float) -> list[tuple[str, str]]:
    """What every response begins with. now: epoch seconds."""
    return [("x-amz-request-id", request_id), ("Date", http_date(now))]


def passed_on(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """The end-to-end headers of an answer of the origin's, without its length and without what kos makes anew."""
    named = headers.get("connection", "")
    dropped = DROPPED | {name.strip().lower() for name in named.split(",")} if named else DROPPED
    return [(name, value) for name, value in headers.items() if name.lower() not in dropped]


def error(
    failure: S3Error, head: RequestHead | None, request_id: str, now: float, cache_note: str | None = None
) -> Rendered:
    """One of kos' own errors."""
    headers = common(request_id, now)
    if cache_note is not None:
        headers.append(("x-kos-cache", cache_note))
    headers += failure.headers.items()
    resource = "" if head is None else head.raw_path
    body = error_document(failure.code, failure.message, resource, request_id, failure.extra)
    headers.append(("Content-Type", "application/xml"))
    if head is not None and head.method == "HEAD":
        return Rendered(failure.status, headers, b"")
    headers.append(("Content-Length", str(len(body))))
    return Rendered(failure.status, headers, body)


def refused(refusal: OriginRefused, head: RequestHead, request_id: str, now: float, cache_note: str | None) -> Rendered:
    """The origin's own error, passed on as it is under kos' request id."""
    headers = common(request_id, now)
    if cache_note is not None:
        headers.append(("x-kos-cache", cache_note))
    headers += [pair for pair in refusal.headers if pair[0].lower() not in DROPPED]
    if head.method == "HEAD" or refusal.status in NO_BODY:
        return Rendered(refusal.status, headers, b"")
    headers.append(("Content-Length", str(len(refusal.body))))
    return Rendered(refusal.status, headers, refusal.body)


def as_s3_error(failure: Exception) -> S3Error:
    """What a client is told of a failure that has no answer of its own."""
    if isinstance(failure, S3Error):
        return failure
    if isinstance(failure, OriginUnavailable):
        headers = {"Retry-After": str(max(1, math.ceil(failure.retry_after_s)))}
        return S3Error("ServiceUnavailable", "The origin cannot be reached. Try again.", headers=headers)
    if isinstance(failure, OriginBroken):
        return S3Error("ServiceUnavailable", "The origin's answer broke off. Try again.", headers={"Retry-After": "1"})
    return S3Error("InternalError")


def not_tls() -> bytes:
    """The whole response to a client that speaks plain http where https is expected."""
    failure = S3Error("InvalidRequest", "This port speaks https.")
    body = error_document(failure.code, failure.message, "", "-")
    headers = [("Content-Type", "application/xml"), ("Connection", "close"), ("Content-Length", str(len(body)))]
    return render_head(failure.status, headers) + body


def turned_away() -> bytes:
    """The whole response to a connection beyond the limit; made once, so it has neither date nor request id."""
    failure = S3Error("SlowDown")
    body = error_document(failure.code, failure.message, "", "-")
    headers = [
        ("Content-Type", "application/xml"),
        ("Retry-After", "1"),
        ("Connection", "close"),
        ("Content-Length", str(len(body))),
    ]
    return render_head(failure.status, headers) + body
