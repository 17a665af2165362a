"""Everything that the cache has no business with: asked of the origin under kos' own signature, bodies streamed both ways.

Owns: relaying the origin's answer. Does not own: how the question is put (kosproxy.outbound).

Invariant: what the origin answers reaches the client as it was, status, headers and bytes, except for what belongs to
one connection and the request id.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Final

from kos.errors import OriginError, S3Error
from kos.origin.response import OriginResponse
from kos.s3.operation import Op, Operation
from kos.s3.sigv4 import Identity
from koscache.carrier import Phase
from kosproxy.exchange import Exchange
from kosproxy.handlers.waiting import WAITED_FOR, Answer, Waiting
from kosproxy.inbound import Inbound
from kosproxy.outbound import Outbound, outbound
from kosproxy.render import common, passed_on

_log: Final = logging.getLogger("kosproxy.forward")
_READS: Final = frozenset({Op.GetObject, Op.HeadObject})
#: What can be carried out once only: the second time there is nothing to do, and the origin says so by an error.
_ONCE: Final = frozenset({Op.AbortMultipartUpload, Op.CreateBucket, Op.DeleteBucket, Op.RenameObject, Op.Unknown})


async def forward(exchange: Exchange, operation: Operation, identity: Identity) -> None:
    """Ask the origin and relay its answer. Raises S3Error, OriginError before the head has left."""
    if operation.op in _READS:
        exchange.phase, exchange.reason = Phase.BYPASS, operation.bypass_reason
    with contextlib.closing(Inbound(exchange, operation, identity)) as inbound:
        request = await question_of(exchange, operation, identity, inbound)
        if operation.op in WAITED_FOR:
            await _wait_for(exchange, operation, request)
            return
        async with await ask(exchange, operation, request) as response:
            await relay(exchange, response)


def check_origin(exchange: Exchange, inbound: Inbound) -> None:
    """Raises OriginUnavailable before a client is asked for a body that cannot be handed on now."""
    if exchange.expects_continue or inbound.length > exchange.parts.config.limits.relay_buffer_bytes:
        exchange.parts.origin.check()


async def question_of(exchange: Exchange, operation: Operation, identity: Identity, inbound: Inbound) -> Outbound:
    """The request that the origin is asked. Raises what outbound() and check_origin() raise."""
    settings = exchange.parts.config
    check_origin(exchange, inbound)
    return await outbound(
        exchange.head,
        operation,
        identity,
        inbound,
        whole_bytes=settings.limits.relay_buffer_bytes,
        trailing_checksums=settings.origin.trailing_checksums,
    )


async def _wait_for(exchange: Exchange, operation: Operation, request: Outbound) -> None:
    waiting = Waiting(exchange)

    async def answering() -> Answer:
        return await waiting.whole(await ask(exchange, operation, request))

    try:
        answer = await waiting.wait(answering, operation.op.name)
    except (S3Error, OriginError) as failure:
        await waiting.fail(failure)
    else:
        await waiting.tell(answer)


async def ask(exchange: Exchange, operation: Operation, request: Outbound) -> OriginResponse:
    """Send the question; the caller closes the answer."""
    head = exchange.head
    exchange.origin_requests += 1
    response = await exchange.parts.origin.request(
        head.method,
        operation.bucket,
        operation.key,
        query=request.query,
        headers=request.headers,
        body=request.body,
        content_length=request.content_length,
        payload_hash=request.payload_hash,
        operation=operation.op.name,
        retry=operation.op not in _ONCE,
    )
    if response.status == 403:
        tell_refused(exchange)
    return response


def tell_refused(exchange: Exchange) -> None:
    """Tell the operator of a 403 of the origin's: the client's own signature was right, so this is about kos'
    credentials or the origin's policy."""
    operation = exchange.operation
    assert operation is not None
    _log.warning(
        "the origin refused kos",
        extra={"request_id": exchange.request_id, "operation": operation.op.name, "bucket": operation.bucket},
    )


async def relay(exchange: Exchange, response: OriginResponse) -> None:
    """The origin's whole answer, as it comes. Raises ConnectionError, OriginBroken."""
    relay_head(exchange, response)
    if exchange.has_body(response.status):
        async for data in response.pieces():
            await exchange.write(data)
    await exchange.finish()


def relay_head(exchange: Exchange, response: OriginResponse) -> None:
    """Begin the client's response with the origin's status and headers."""
    headers = common(exchange.request_id, exchange.parts.clock.now())
    if exchange.cache_note is not None:
        headers.append(("x-kos-cache", exchange.cache_note))
    headers += passed_on(response.headers)
    length = response.content_length
    if not exchange.has_body(response.status):
        if length is not None and response.status != 204:
            headers.append(("Content-Length", str(length)))
        exchange.begin(response.status, headers, 0)
    else:
        if length is not None:
            headers.append(("Content-Length", str(length)))
        exchange.begin(response.status, headers, length)
