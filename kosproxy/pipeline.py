"""What happens to a request, in one fixed order: parse -> authenticate -> authorize -> dispatch -> render.

Authorizing is short: every configured key may do everything that the origin lets kos do, so who is authenticated is
authorized.

Owns: that order, and the last resort for everything that goes wrong on the way. Does not own: the steps (kos.s3 has the
pure ones, kosproxy.handlers the others), or the shortcut for hits (kosproxy.fastlane takes the same steps with the same
functions).

Invariant: nothing is dispatched that was not authenticated, but for preflights (kosproxy.handlers.preflight), and every
request gets one answer or a broken connection, never a second one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, NamedTuple

from aiohttp.web_request import BaseRequest

from kos import metrics
from kos.errors import OriginError, OriginRefused, S3Error
from kos.s3 import authentication
from kos.s3 import operation as operations
from kos.s3.object_response import render_head
from kos.s3.operation import Handling, Operation
from kos.s3.sigv4 import Identity
from koscache.carrier import Changed
from kosproxy import render
from kosproxy.access_log import UNKNOWN, Line, time_text
from kosproxy.exchange import Exchange
from kosproxy.fastlane import FastLane
from kosproxy.handlers.forward import forward, tell_refused
from kosproxy.handlers.get import read
from kosproxy.handlers.list import list_objects
from kosproxy.handlers.part import read_part
from kosproxy.handlers.preflight import Preflights, is_preflight
from kosproxy.handlers.write import write
from kosproxy.parts import Parts
from kosproxy.server import Connection, Sent

_log: Final = logging.getLogger("kosproxy.pipeline")
_HANDLERS: Final = {
    Handling.READ: read,
    Handling.PART: read_part,
    Handling.LIST: list_objects,
    Handling.WRITE: write,
    Handling.FORWARD: forward,
}
#: What the log says of a request whose client went away before it had an answer.
CLIENT_GONE: Final = 499


class Admitted(NamedTuple):
    """A request that may be carried out. identity: who signed it, None for a preflight, which nobody signs."""

    operation: Operation
    identity: Identity | None


class Pipeline:
    """Both lanes of one worker."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._preflights = Preflights(parts.config.limits.preflights)
        #: see kosproxy.server.Lanes
        self.fast: Callable[[Connection, bytes], bool] = FastLane(parts).answer

    async def slow(self, request: BaseRequest, connection: Connection) -> Sent:
        """See kosproxy.server.Lanes."""
        exchange = Exchange(self._parts, connection, request)
        admitted = await self._admit(exchange)
        if admitted is not None:
            if admitted.operation.handling is Handling.WRITE:
                # A write that has begun ends by itself, whatever becomes of the client: what it changed must be
                # forgotten after the origin's answer and not at some point before.
                name = f"{admitted.operation.op.name} {exchange.request_id}"
                await asyncio.shield(self._parts.tasks.spawn(self._answer(exchange, admitted), name))
            else:
                await self._answer(exchange, admitted)
        return Sent(keep_alive=exchange.keep_alive)

    async def _admit(self, exchange: Exchange) -> Admitted | None:
        """The request, if it may be carried out; None when it was refused and answered."""
        parts, head = self._parts, exchange.head
        try:
            listen = parts.config.listen
            exchange.operation = operation = operations.parse(head, listen.domain)
            if is_preflight(head, operation):
                return Admitted(operation, None)
            claimed = authentication.claim_of(head, listen.domain, version_2=listen.sigv2_query)
            identity = claimed.check(parts.secrets, parts.clock.now())
            exchange.access_key = identity.access_key
            if identity.presigned:
                # What a presigned query says instead of a header is a header from here on.
                exchange.head = head = authentication.unpresigned(head, claimed)
                exchange.operation = operation = operations.parse(head, listen.domain)
        except S3Error as failure:
            try:
                await self._fail(exchange, failure)
            except ConnectionError:
                exchange.break_off()
            finally:
                exchange.record()
            return None
        return Admitted(operation, identity)

    async def _answer(self, exchange: Exchange, admitted: Admitted) -> None:
        operation, identity = admitted
        try:
            try:
                if identity is None:
                    await self._preflights.answer(exchange, operation)
                else:
                    await _HANDLERS[operation.handling](exchange, operation, identity)
            except (S3Error, OriginError, Changed) as failure:
                await self._fail(exchange, failure)
            except ConnectionError:
                raise
            except Exception as failure:
                _log.exception("request failed", extra={"request_id": exchange.request_id})
                await self._fail(exchange, failure)
        except ConnectionError as gone:
            exchange.error = exchange.error or type(gone).__name__
            exchange.status = exchange.status or CLIENT_GONE
            exchange.break_off()
        except asyncio.CancelledError:
            exchange.error = exchange.error or "ClientGone"
            exchange.status = exchange.status or CLIENT_GONE
            exchange.break_off()
            raise
        finally:
            exchange.record()

    async def _fail(self, exchange: Exchange, failure: Exception) -> None:
        """Answer a failure, or break off when the answer has begun."""
        if exchange.begun:
            exchange.error = type(failure).__name__
            _log.warning("response broken off", extra={"request_id": exchange.request_id, "reason": str(failure)})
            exchange.break_off()
            return
        now = self._parts.clock.now()
        note = exchange.cache_note
        if isinstance(failure, OriginRefused):
            exchange.error = "OriginRefused"
            if failure.status == 403:
                tell_refused(exchange)
            answer = render.refused(failure, exchange.head, exchange.request_id, now, note)
        else:
            shown = render.as_s3_error(failure)
            exchange.error = shown.code
            answer = render.error(shown, exchange.head, exchange.request_id, now, note)
        await exchange.respond(answer.status, answer.headers, answer.body)

    async def malformed(self, connection: Connection, error: S3Error) -> None:
        """See kosproxy.server.Lanes."""
        parts = self._parts
        request_id = parts.request_ids.next()
        answer = render.error(error, None, request_id, parts.clock.now())
        metrics.REQUEST_COUNTS.add((UNKNOWN, str(answer.status), "slow", "none"))
        parts.access_log.write(
            Line(
                time=time_text(parts.clock.now()),
                request_id=request_id,
                client=connection.client,
                key_id=None,
                operation=UNKNOWN,
                bucket=None,
                key=None,
                range=None,
                status=answer.status,
                error=error.code,
                bytes=len(answer.body),
                lane="slow",
                phase=None,
                reason=None,
                origin_requests=0,
                first_byte_ms=0.0,
                total_ms=0.0,
            )
        )
        headers = [*answer.headers, ("Connection", "close")]
        try:
            await connection.send(render_head(answer.status, headers) + answer.body)
        except ConnectionError:
            connection.drop()
