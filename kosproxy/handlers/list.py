"""ListObjects and ListObjectsV2 through the cache.

Owns: the client's answer: its head, and what is passed through because the cache must not or cannot answer it. Does not
own: what a question is (kos.s3.listing), where its answer comes from (kosproxy.listings).

Invariant: the body is the origin's own, whole; what kos refuses by itself it refuses as S3 does.
"""

from __future__ import annotations

from kos.s3 import listing
from kos.s3.operation import Operation
from kos.s3.sigv4 import Identity
from koscache.carrier import Phase, Reason
from kosproxy.exchange import Exchange
from kosproxy.handlers.forward import forward
from kosproxy.listings import Failed, Found, Passed
from kosproxy.render import common


async def list_objects(exchange: Exchange, operation: Operation, identity: Identity) -> None:
    """Answer a listing. Raises S3Error, OriginError before the head has left; ConnectionError afterwards."""
    assert operation.bucket is not None
    headers = exchange.head.headers
    reason = operation.bypass_reason or listing.bypass_reason(operation.params, headers)
    if reason is not None:
        await _pass(exchange, operation, identity, reason)
        return
    question = listing.parse(operation.bucket, operation.params, headers)
    listings = exchange.parts.listings
    if listings is None:
        await _pass(exchange, operation, identity, Reason.CACHING_OFF)
        return
    found = await listings.find(question, operation.op.name)
    if isinstance(found, Passed):
        await _pass(exchange, operation, identity, found.reason)
        return
    exchange.origin_requests += found.origin_requests
    if isinstance(found, Failed):
        exchange.phase, exchange.reason = Phase.MISS, found.reason
        raise found.failure
    size = len(found.page.body)
    if not listings.take(size):
        await _pass(exchange, operation, identity, Reason.BUSY)
        return
    try:
        await _send(exchange, found)
    finally:
        listings.give_back(size)


async def _pass(exchange: Exchange, operation: Operation, identity: Identity, reason: str) -> None:
    exchange.phase, exchange.reason = Phase.BYPASS, reason
    await forward(exchange, operation, identity)


async def _send(exchange: Exchange, found: Found) -> None:
    exchange.phase, exchange.reason = found.phase, found.reason
    body = found.page.body
    headers = common(exchange.request_id, exchange.parts.clock.now())
    headers.append(("x-kos-cache", exchange.cache_note or ""))
    if found.age_s is not None:
        headers.append(("Age", str(int(found.age_s))))
    headers += found.page.headers
    headers.append(("Content-Length", str(len(body))))
    exchange.begin(200, headers, len(body))
    step = exchange.parts.config.limits.relay_buffer_bytes
    for at in range(0, len(body), step):
        await exchange.write(body[at : at + step])
    await exchange.finish()
