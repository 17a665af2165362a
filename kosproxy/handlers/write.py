"""Everything that changes objects: carried out by the origin, and forgotten by the cache.

Owns: which keys a write changes, and that the client hears of its end only after the cache has forgotten them. Does not
own: how forgetting works (koscache.carrier.writing), asking the origin (kosproxy.handlers.forward).

Invariant: the last bytes of the answer leave after the fence was passed for the second time. An answer may begin before:
a completion of many parts answers 200 at once, sends blanks for minutes so that nobody times out, and says at its end
whether it worked.
"""

from __future__ import annotations

from kos.s3 import xml
from kos.s3.operation import Op, Operation
from kos.s3.sigv4 import Identity
from kosproxy.exchange import Exchange
from kosproxy.handlers.forward import ask, relay_head
from kosproxy.inbound import Inbound
from kosproxy.outbound import Outbound, document, outbound


async def write(exchange: Exchange, operation: Operation, identity: Identity) -> None:
    """Carry out a write. Runs in a task of the worker's own: a client that goes away does not end it half-way.

    Raises S3Error, OriginError before the head has left; ConnectionError when the client is gone.
    """
    assert operation.bucket is not None
    inbound = Inbound(exchange, operation, identity)
    keys, versions, request = await _prepare(exchange, operation, identity, inbound)
    held = b""
    gone: ConnectionError | None = None
    async with (
        exchange.parts.carrier.writing(operation.bucket, keys, versions=versions),
        await ask(exchange, operation, request) as response,
    ):
        relay_head(exchange, response)
        if exchange.has_body(response.status):
            async for data in response.pieces():
                if held and gone is None:
                    try:
                        await exchange.write(held)
                    except ConnectionError as error:
                        # Nobody listens any more, but how it ends still decides when the fence is passed.
                        gone = error
                held = data
    if gone is not None:
        raise gone
    await exchange.write(held)
    await exchange.finish()


async def _prepare(
    exchange: Exchange, operation: Operation, identity: Identity, inbound: Inbound
) -> tuple[list[str], list[str], Outbound]:
    """The keys that the write changes, those of which it may change versions, and the request that carries it out."""
    if operation.op is Op.DeleteObjects:
        body = await inbound.read(xml.DELETE_REQUEST_MAX_BYTES)
        request = xml.parse_delete_request(body)
        versions = [item.key for item in request.items if item.version_id is not None]
        return [item.key for item in request.items], versions, document(exchange.head, identity, inbound, body)
    trailing = exchange.parts.config.origin.trailing_checksums
    keys = list(operation.forgets)
    question = await outbound(exchange.head, identity, inbound, trailing_checksums=trailing)
    return keys, keys if operation.changes_versions else [], question
