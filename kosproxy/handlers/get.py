"""GetObject and HeadObject through the cache.

Owns: opening, the answer's head, sending the pieces in order, and starting over when the object changes before anything
was sent. Does not own: where pieces come from (koscache.carrier), which headers an answer has (kos.s3.object_response).

Invariant: head and body of a response come from one Opened, hence from one version of the object.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

from kos.errors import OriginError, OriginRefused, S3Error
from kos.s3 import object_response, ranges
from kos.s3.conditions import CONDITION_HEADERS
from kos.s3.head import RequestHead
from kos.s3.object_response import Part
from kos.s3.operation import Operation
from kos.s3.sigv4 import Identity
from koscache.carrier import Changed, FilePiece, Opened, Phase, Reason, StreamPiece, Want, version_name
from kosproxy.exchange import Exchange

#: An object that changes faster than it can be opened this often is answered with "try again".
OPENS_MAX: Final = 5
_FROM_STORE: Final = frozenset({Phase.HIT, Phase.STALE, Phase.REVALIDATED})


def want_of(head: RequestHead) -> Want:
    """What the carrier has to know of the request."""
    headers = head.headers
    spec = ranges.parse(headers.get("range"))
    # No ranged answer carries checksums; but If-Range may make a whole one of it.
    may_be_whole = spec is None or "if-range" in headers
    return Want(
        head_only=head.method == "HEAD",
        range=spec,
        checksum_mode=may_be_whole and headers.get("x-amz-checksum-mode", "").upper() == "ENABLED",
        conditional="if-range" in headers or not CONDITION_HEADERS.isdisjoint(headers),
    )


def name_of(operation: Operation) -> str:
    """What the carrier calls the object that is read: its key, or a name for the version that is asked for."""
    key, version_id = operation.key, operation.version_id
    assert key is not None
    return key if version_id is None else version_name(key, version_id)


async def read(exchange: Exchange, operation: Operation, identity: Identity) -> None:
    """Answer an object read. Raises S3Error, OriginError before the head has left; ConnectionError afterwards."""
    want = want_of(exchange.head)
    for _ in range(OPENS_MAX):
        try:
            async with opening(exchange, operation, want) as opened:
                await send(exchange, operation, opened)
                return
        except Changed:
            if exchange.begun:
                raise
    raise changes_too_fast()


def changes_too_fast() -> S3Error:
    """What a reader is told whose object was another one each time it was opened."""
    return S3Error("SlowDown", "The object changes faster than it can be read.", headers={"Retry-After": "1"})


@contextlib.asynccontextmanager
async def opening(exchange: Exchange, operation: Operation, want: Want) -> AsyncIterator[Opened]:
    """The object that is read, open; what became of the request so far is noted. Raises S3Error, OriginError."""
    assert operation.bucket is not None
    try:
        opened = await exchange.parts.carrier.open(operation.bucket, name_of(operation), want)
    except OriginRefused:
        exchange.phase, exchange.reason = Phase.MISS, "refused"
        exchange.origin_requests += 1
        raise
    except (S3Error, OriginError):
        exchange.phase, exchange.reason = Phase.MISS, Reason.ORIGIN_DOWN
        raise
    try:
        exchange.phase, exchange.reason = opened.phase, opened.reason
        exchange.origin_requests += opened.origin_requests
        yield opened
    finally:
        opened.close()


def answer_of(
    exchange: Exchange, operation: Operation, opened: Opened, part: Part | None = None
) -> object_response.ObjectAnswer:
    """Status, headers and slice of the answer. Raises S3Error: a condition that failed, a range that is outside."""
    return object_response.answer(
        exchange.head,
        operation.params,
        opened.record.meta,
        cache_note=exchange.cache_note or "",
        age_s=None if opened.age_s is None else int(opened.age_s),
        request_id=exchange.request_id,
        date=object_response.http_date(exchange.parts.clock.now()),
        part=part,
    )


async def send(exchange: Exchange, operation: Operation, opened: Opened, part: Part | None = None) -> None:
    """The answer to a read of what was opened. Raises as read() does, and Changed."""
    parts = exchange.parts
    answer = answer_of(exchange, operation, opened, part)
    if answer.start == answer.stop and exchange.reason == Reason.BLOCK:
        # Not all of the body is here, but none of it is wanted (304): the record was enough.
        exchange.phase, exchange.reason = Phase.HIT, Reason.FRESH
        answer = answer_of(exchange, operation, opened, part)
    exchange.begin(answer.status, answer.headers, answer.stop - answer.start)
    if answer.start == answer.stop:
        await exchange.finish()
        return
    exchange.body_source = "hit" if exchange.phase in _FROM_STORE else "fill"
    body = parts.carrier.body(opened, answer.start, answer.stop)
    try:
        async for piece in body:
            if isinstance(piece, FilePiece):
                await exchange.relay(piece)
            elif isinstance(piece, StreamPiece):
                await exchange.stream(piece)
            else:
                await exchange.write(piece.data)
        await exchange.finish()
    finally:
        await body.aclose()
        exchange.origin_requests += body.origin_requests
