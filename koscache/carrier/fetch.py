"""Asking the origin for a slice of one known version.

Owns: the headers of such a request (Range, If-Match) and the judgement of its answer. Does not own: retries, what becomes
of the bytes.

Invariant: an answer that is returned carries bytes of exactly the version asked for, from exactly the position asked for.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html (If-Match, Range; 412, 416).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable

from kos.errors import OriginBroken, OriginError, OriginRefused, OriginUnavailable, S3Error
from kos.origin.response import OriginResponse
from koscache.carrier.context import CHECKSUM_MODE, Context
from koscache.carrier.ticket import Response
from koscache.carrier.types import Changed
from koscache.content import Record
from koscache.ipc import Refusal

#: Bytes of an error document that are kept to be relayed.
REFUSAL_MAX_BYTES = 64 * 1024
_REFUSAL_HEADERS_MAX_BYTES = 16 * 1024

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,20})-([0-9]{1,20})/([0-9]{1,20})", re.ASCII)

OnRequest = Callable[[], None]


def content_range(response: OriginResponse) -> tuple[int, int, int] | None:
    """(start, stop, size of the whole) of a 206, half-open; None when it does not say."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    return None if match is None else (int(match[1]), int(match[2]) + 1, int(match[3]))


def retry_after_s(response: OriginResponse) -> float:
    """Retry-After in seconds, at most a minute; 1 when it is absent or a date."""
    with contextlib.suppress(ValueError):
        return min(max(float(response.headers.get("Retry-After", "1")), 0.0), 60.0)
    return 1.0


async def refusal(response: OriginResponse) -> Refusal:
    """The error answer, read as far as it may be kept; closes the response."""
    try:
        body = await response.read(REFUSAL_MAX_BYTES)
    except OriginError:
        body = b""
    finally:
        response.close()
    headers: list[tuple[bytes, bytes]] = []
    left = _REFUSAL_HEADERS_MAX_BYTES
    for name, value in response.headers.items():
        field = name.encode("utf-8", "surrogateescape"), value.encode("utf-8", "surrogateescape")
        left -= len(field[0]) + len(field[1])
        if left < 0:
            break  # it must fit into a message
        headers.append(field)
    return Refusal(response.status, tuple(headers), body)


def refused(said: Refusal) -> OriginRefused:
    headers = [
        (name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape"))
        for name, value in said.headers
    ]
    return OriginRefused(said.status, headers, said.body)


def unavailable(response: OriginResponse) -> OriginUnavailable:
    """What a 5xx or 429 means; closes the response."""
    response.close()
    slow = response.status in (429, 503)
    reason = "SlowDown" if slow else f"origin answered {response.status}"
    return OriginUnavailable(reason, retry_after_s=retry_after_s(response))


def service_unavailable(reason: str, retry_after_s: float) -> S3Error:
    """What a client is told when the origin cannot be asked."""
    code = "SlowDown" if reason == "SlowDown" else "ServiceUnavailable"
    message = None if code == "SlowDown" else f"The origin is not available: {reason}"
    return S3Error(code, message, headers={"Retry-After": str(max(1, math.ceil(retry_after_s)))})


async def fetch(
    context: Context, bucket: str, key: str, record: Record, start: int, stop: int, on_request: OnRequest
) -> OriginResponse:
    """The origin's answer with bytes [start, stop) of record's version, unread.

    A 200 with the whole object is taken when start is 0; then more than stop bytes may follow. Raises Changed,
    OriginRefused, OriginUnavailable, OriginBroken.
    """
    on_request()
    headers = [("Range", f"bytes={start}-{stop - 1}"), CHECKSUM_MODE]
    if record.etag:
        headers.append(("If-Match", record.etag))
    response = await context.ask("GET", bucket, key, headers)
    status = response.status
    if status in (404, 412, 416):
        response.close()
        raise Changed(f"origin answered {status} to a read of {record.etag}")
    if status == 429 or status >= 500:
        raise unavailable(response)
    if status not in (200, 206):
        raise refused(await refusal(response))
    if response.headers.get("ETag", "").strip() != record.etag:
        response.close()
        raise Changed(f"origin has {response.headers.get('ETag')} instead of {record.etag}")
    if status == 206:
        got = content_range(response)
        if got is not None and got[2] != record.size:
            response.close()
            raise Changed(f"origin has {got[2]} bytes instead of {record.size}")
        if got != (start, stop, record.size):
            response.close()
            raise OriginBroken(f"asked for {start}-{stop - 1}, got {response.headers.get('Content-Range')}")
    elif start != 0 or response.content_length != record.size:
        response.close()
        raise OriginBroken("a whole object in answer to a range")
    return response


async def fetch_block(
    context: Context,
    bucket: str,
    key: str,
    record: Record,
    start: int,
    stop: int,
    on_request: OnRequest,
    *,
    direct: bool = False,
    only: str | None = None,
) -> Response:
    """Bytes [start, stop) of record's version, which lie in one block, to be kept here: from the node that keeps it, or from
    the origin. direct: from the origin alone. only: from that node rather than from others. Raises as fetch() does.
    """
    upstream = context.upstream
    number = start // context.cache.block_bytes
    remote = not direct and (only is not None or upstream.remote(bucket, key, record, number))
    if remote:
        try:
            theirs = await upstream.ask_owners(bucket, key, record, start, stop, fill=True, only=only)
        except OriginUnavailable:
            theirs = None  # there, perhaps not here
        if theirs is not None:
            return theirs
    return await fetch(context, bucket, key, record, start, stop, on_request)
