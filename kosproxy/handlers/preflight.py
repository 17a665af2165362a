"""Preflights: before a page may use another site's bucket, its browser asks that bucket whether it may (CORS).

A browser does not sign this question, and S3 answers it to anybody: what it learns is the bucket's CORS rules, which are
public by nature. So kos passes it on for clients that it does not know, and the origin decides.

Owns: which request is a preflight, what of it goes on, and how many do at a time. Does not own: the request that the
browser sends afterwards, which must be signed like any other.

Invariant: an unknown client can make kos ask the origin OPTIONS with three headers, and nothing else: no query, no body,
no other method or header of its own choice goes out under kos' signature; and never more than limits.preflights of them
at a time for a worker, so that they cannot take the connections of those who are known.

Source: https://fetch.spec.whatwg.org/#cors-preflight-fetch; https://docs.aws.amazon.com/AmazonS3/latest/API/RESTOPTIONSobject.html
"""

from __future__ import annotations

from typing import Final

from kos.errors import S3Error
from kos.s3.head import RequestHead
from kos.s3.operation import Op, Operation
from kosproxy.exchange import Exchange
from kosproxy.handlers.forward import relay

_QUESTION: Final = ("origin", "access-control-request-method", "access-control-request-headers")
_NEEDED: Final = frozenset({"origin", "access-control-request-method"})
#: Whoever sends one of these is no browser that asks beforehand, and has to be known.
_STRANGE: Final = frozenset({"authorization", "transfer-encoding"})


def is_preflight(head: RequestHead, operation: Operation) -> bool:
    """Whether a request is one that nobody signs. The URL may be a presigned one: its signature is for another method."""
    headers = head.headers
    return (
        operation.op is Op.Preflight
        and operation.bucket is not None
        and headers.keys() >= _NEEDED
        and _STRANGE.isdisjoint(headers)
        and headers.get("content-length", "0") == "0"
    )


class Preflights:
    """Those of one worker; limit: how many at a time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running = 0

    async def answer(self, exchange: Exchange, operation: Operation) -> None:
        """Ask the origin and relay its answer. Raises SlowDown, and OriginError before the head has left."""
        if self._running >= self._limit:
            raise S3Error("SlowDown", headers={"Retry-After": "1"})
        self._running += 1
        try:
            await _pass_on(exchange, operation)
        finally:
            self._running -= 1


async def _pass_on(exchange: Exchange, operation: Operation) -> None:
    asked = exchange.head.headers
    exchange.origin_requests += 1
    # A 403 is the rules' answer and not about kos' credentials: nobody is told of it.
    async with await exchange.parts.origin.request(
        "OPTIONS",
        operation.bucket,
        operation.key,
        headers=[(name, asked[name]) for name in _QUESTION if name in asked],
        retry=False,
        operation=operation.op.name,
    ) as response:
        await relay(exchange, response)
