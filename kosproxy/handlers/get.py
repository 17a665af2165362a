"""GetObject and HeadObject through the cache.

Owns: opening, the answer's head, sending the pieces in order, and starting over when the object changes before anything
was sent. Does not own: where pieces come from (koscache.carrier), which headers an answer has (kos.s3.object_response).

Invariant: head and body of a response come from one Opened, hence from one version of the object.
"""

from __future__ import annotations

from typing import Final

from kos.errors import OriginError, OriginRefused, S3Error
from kos.s3 import object_response, ranges
from kos.s3.conditions import CONDITION_HEADERS
from kos.s3.head import RequestHead
from kos.s3.operation import Operation
from kos.s3.sigv4 import Identity
from koscache.carrier import Changed, FilePiece, Opened, Phase, Reason, Want, version_name
from kosproxy.exchange import Exchange

#: An object that changes faster than it can be opened this often is answered with "try again".
_OPENS_MAX: Final = 5
_FROM_STORE: Final = frozenset({Phase.HIT, Phase.STALE, Phase.REVALIDATED})


def want_of(head: RequestHead) -> Want:
    """What the carrier has to know of the request."""
    headers = head.headers
    return Want(
        head_only=head.method == "HEAD",
        range=ranges.parse(headers.get("range")),
        checksum_mode=headers.get("x-amz-checksum-mode", "").upper() == "ENABLED",
        conditional="if-range" in headers or not CONDITION_HEADERS.isdisjoint(headers),
    )


def name_of(operation: Operation) -> str:
    """What the carrier calls the object that is read: its key, or a name for the version that is asked for."""
    key, version_id = operation.key, operation.version_id
    assert key is not None
    return key if version_id is None else version_name(key, version_id)


async def read(exchange: Exchange, operation: Operation, identity: Identity) -> None:
    """Answer an object read. Raises S3Error, OriginError before the head has left; ConnectionError afterwards."""
    assert operation.bucket is not None
    name = name_of(operation)
    want = want_of(exchange.head)
    carrier = exchange.parts.carrier
    for _ in range(_OPENS_MAX):
        try:
            opened = await carrier.open(operation.bucket, name, want)
        except OriginRefused:
            exchange.phase, exchange.reason = Phase.MISS, "refused"
            exchange.origin_requests += 1
            raise
        except (S3Error, OriginError):
            exchange.phase, exchange.reason = Phase.MISS, Reason.ORIGIN_DOWN
            raise
        before = opened.origin_requests
        try:
            exchange.phase, exchange.reason = opened.phase, opened.reason
            await _send(exchange, operation, opened)
            return
        except Changed:
            if exchange.begun:
                raise
        finally:
            exchange.origin_requests += before
            opened.close()
    raise S3Error("SlowDown", "The object changes faster than it can be read.", headers={"Retry-After": "1"})


def _answer(exchange: Exchange, operation: Operation, opened: Opened) -> object_response.ObjectAnswer:
    return object_response.answer(
        exchange.head,
        operation.params,
        opened.record.meta,
        cache_note=exchange.cache_note or "",
        age_s=None if opened.age_s is None else int(opened.age_s),
        request_id=exchange.request_id,
        date=object_response.http_date(exchange.parts.clock.now()),
    )


async def _send(exchange: Exchange, operation: Operation, opened: Opened) -> None:
    parts = exchange.parts
    answer = _answer(exchange, operation, opened)
    if answer.start == answer.stop and opened.reason is Reason.BLOCK:
        # Not all of the body is here, but none of it is wanted (304): the record was enough.
        exchange.phase, exchange.reason = Phase.HIT, Reason.FRESH
        answer = _answer(exchange, operation, opened)
    exchange.begin(answer.status, answer.headers, answer.stop - answer.start)
    if answer.start == answer.stop:
        await exchange.finish()
        return
    exchange.body_source = "hit" if opened.phase in _FROM_STORE else "fill"
    body = parts.carrier.body(opened, answer.start, answer.stop)
    try:
        async for piece in body:
            if isinstance(piece, FilePiece):
                await exchange.relay(piece)
            else:
                await exchange.write(piece.data)
        await exchange.finish()
    finally:
        await body.aclose()
        exchange.origin_requests += body.origin_requests
