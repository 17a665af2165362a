"""Completions and copies, which an origin may take minutes for: the client is kept waiting without timing out.

Owns: when an answer begins before the origin's is there, and how it goes on then. Does not own: the question
(kosproxy.outbound), what a write makes the cache forget (kosproxy.handlers.write).

As S3 does: 200 and the XML declaration, then a blank every limits.completion_wait, then the document that says what came
of it, which may be an error. Clients look for one in these three operations, because S3 itself sends it so. What is lost
by a status that was said too early: an error's status (its code stands in the document), and headers that come with the
origin's late answer, x-amz-version-id above all. An origin that begins its answer early itself has its own headers
passed on.

Invariant: the document leaves only when the caller says so, whole, after exactly one head.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from aiohttp.http import HttpVersion11

from kos.errors import KosError, OriginError, S3Error
from kos.origin.response import OriginResponse
from kos.s3 import xml
from kos.s3.operation import Op
from kosproxy.exchange import Exchange, Header
from kosproxy.render import as_s3_error, common, passed_on

#: Operations whose 200 may turn out to be an error.
WAITED_FOR: Final = frozenset({Op.CompleteMultipartUpload, Op.CopyObject, Op.UploadPartCopy})
#: Who says so may have given up waiting for somebody who still works. S3's own 503 is a refusal to begin, but proxies say
#: it also of a connection that they lost behind a whole request.
GAVE_UP: Final = frozenset({500, 502, 503, 504})
#: A result holds a key, a few checksums and an address; what an origin sends to keep the connection alive comes on top.
_ANSWER_MAX_BYTES: Final = 1024 * 1024
_DECLARATION: Final = b'<?xml version="1.0" encoding="UTF-8"?>\n'
_PROLOG: Final = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*(?:<\?xml[^>]*\?>)?[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Answer:
    """The origin's, whole: end-to-end headers without a length. attempts: see OriginResponse."""

    status: int
    headers: list[Header]
    body: bytes
    attempts: int = 1

    @property
    def failed(self) -> bool:
        """Whether the origin says, by its status or after an early 200, that it began and did not come to the end."""
        return self.status in GAVE_UP or (self.status == 200 and _is_error(self.body))


class Waiting:
    """One such request, whose client is told to wait."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        # HTTP/1.0 has no chunks, and without a length only the connection's end would tell success from failure.
        self._patient = exchange.request.version >= HttpVersion11
        self._early: OriginResponse | None = None
        self._gone: ConnectionError | None = None

    async def whole(self, response: OriginResponse) -> Answer:
        """Take the origin's answer. Raises OriginBroken."""
        async with response:
            self._early = response
            body = await response.read(_ANSWER_MAX_BYTES)
        return Answer(response.status, passed_on(response.headers), body, response.attempts)

    async def wait(self, answering: Callable[[], Awaitable[Answer]], name: str) -> Answer:
        """What `answering` gives. Raises what it raises: KosError. Cancelled, it cancels it."""
        exchange = self._exchange
        wait_s = exchange.parts.config.limits.completion_wait_s
        task = exchange.parts.tasks.spawn(_outcome(answering), f"{name} {exchange.request_id}")
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=wait_s if self._patient else None)
                if not task.done():
                    await self._blank()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
        outcome = task.result()
        if isinstance(outcome, KosError):
            try:
                raise outcome
            finally:
                del outcome, task  # it holds this frame, which would with all it holds wait for the collector
        return outcome

    async def _blank(self) -> None:
        exchange, early = self._exchange, self._early
        if early is not None and early.status != 200:
            return  # an error, whose document is on its way
        try:
            if not exchange.begun:
                headers = common(exchange.request_id, exchange.parts.clock.now())
                headers += [("Content-Type", "application/xml")] if early is None else passed_on(early.headers)
                exchange.begin(200, headers, None)
                await exchange.write(_DECLARATION)
            await exchange.write(b" ")
        except ConnectionError as error:
            # Nobody listens any more, but what comes of it still decides when the cache may trust the object again.
            self._gone = error
            self._patient = False

    async def tell(self, answer: Answer) -> None:
        """The origin's answer to the client, who may have been told 200 already. Raises ConnectionError."""
        exchange = self._exchange
        if self._gone is not None:
            raise self._gone
        if not exchange.begun:
            headers = common(exchange.request_id, exchange.parts.clock.now()) + answer.headers
            if exchange.has_body(answer.status):
                headers.append(("Content-Length", str(len(answer.body))))
                await exchange.respond(answer.status, headers, answer.body)
            else:
                await exchange.respond(answer.status, headers)
            return
        if not 200 <= answer.status < 300:
            exchange.error = "OriginRefused"
            if not _is_error(answer.body):
                failure = S3Error("InternalError", f"The origin answered with status {answer.status}.")
                await self._tell_error(failure)
                return
        await self._end(answer.body)

    async def fail(self, failure: S3Error | OriginError) -> None:
        """kos' own error. Raises it again if the answer has not begun; ConnectionError."""
        if self._gone is not None:
            raise self._gone
        if not self._exchange.begun:
            try:
                raise failure
            finally:
                del failure
        await self._tell_error(as_s3_error(failure))

    async def _tell_error(self, shown: S3Error) -> None:
        exchange = self._exchange
        exchange.error = shown.code
        resource = exchange.head.raw_path
        await self._end(xml.error_document(shown.code, shown.message, resource, exchange.request_id, shown.extra))

    async def _end(self, document: bytes) -> None:
        prolog = _PROLOG.match(document)
        await self._exchange.write(document if prolog is None else document[prolog.end() :])
        await self._exchange.finish()


async def _outcome(answering: Callable[[], Awaitable[Answer]]) -> Answer | KosError:
    # As a value: a task that raises counts as a failure of kos' own.
    try:
        return await answering()
    except (S3Error, OriginError) as failure:
        return failure


def _is_error(document: bytes) -> bool:
    try:
        return xml.read(document, _ANSWER_MAX_BYTES).name == "Error"
    except xml.UnreadableXML:
        return False
