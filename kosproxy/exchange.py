"""One request and its response in the slow lane.

Owns: the order head -> body -> end on the wire, framing (a length, or chunks where none is known), what became of the
request for the log and the metrics, 100 Continue. Does not own: what is answered (handlers), error documents
(kosproxy.render), the connection (kosproxy.server).

Invariant: a response is completed only when exactly the announced bytes went out; whatever ends early ends with the
connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aiohttp.http import HttpVersion11
from aiohttp.web_request import BaseRequest

from kos import metrics
from kos.errors import OriginBroken
from kos.s3.head import RequestHead, headers_from_raw
from kos.s3.object_response import render_head
from kos.s3.operation import Operation
from koscache.carrier import StreamPiece
from kosproxy.access_log import UNKNOWN, Line, printable, time_text
from kosproxy.parts import Parts
from kosproxy.relay import Slice
from kosproxy.render import NO_BODY, cache_note
from kosproxy.server import Connection

#: Up to here head and body are copied together into one write; above, two writes cost less than the copy.
_JOIN_BYTES: Final = 64 * 1024
#: Of a stream that has to be seen: read, encrypted and sent at once.
COPY_BYTES: Final = 64 * 1024

Header = tuple[str, str]


class Exchange:
    """See the module. All sending methods raise ConnectionError when the client is gone."""

    def __init__(self, parts: Parts, connection: Connection, request: BaseRequest) -> None:
        self.parts = parts
        self.connection = connection
        self.request = request
        message = request._message
        self.head = head_of(message.method, message.path, message.raw_headers)
        self.request_id = parts.request_ids.next()
        self.keep_alive = not message.should_close and message.version >= HttpVersion11
        self.operation: Operation | None = None
        self.access_key: str | None = None
        self.phase: str | None = None
        self.reason: str | None = None
        self.error: str | None = None
        self.origin_requests = 0
        self.status = 0
        self.sent_bytes = 0
        #: where the body comes from, for kos_bytes_total; None: not counted as an object's
        self.body_source: str | None = None
        self._started = parts.clock.monotonic()
        self._first_byte: float | None = None
        self._pending = b""
        self._announced: int | None = 0
        self._chunked = False
        self._logged = False
        self.expects_continue = (
            self.head.headers.get("expect", "").lower() == "100-continue" and message.version >= HttpVersion11
        )

    # -- request

    async def continue_body(self) -> None:
        """Ask a client that waits for it to send its body."""
        if self.expects_continue:
            self.expects_continue = False
            await self.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    # -- response

    @property
    def cache_note(self) -> str | None:
        """The value of x-kos-cache; None where the cache has no part in the request."""
        return None if self.phase is None else cache_note(self.phase, self.reason)

    def has_body(self, status: int) -> bool:
        """Whether HTTP lets a response with this status to this request have a body."""
        return self.head.method != "HEAD" and status not in NO_BODY

    @property
    def begun(self) -> bool:
        """Whether any of the response has left: from then on a failure can only be shown by breaking off."""
        return self._first_byte is not None

    async def respond(self, status: int, headers: Sequence[Header], body: bytes = b"") -> None:
        """A whole response. headers holds Content-Length, which for HEAD and 304 may speak of a body that is not sent."""
        self.begin(status, headers, len(body))
        if body:
            await self.write(body)
        await self.finish()

    def begin(self, status: int, headers: Sequence[Header], body_bytes: int | None) -> None:
        """Make the head; it leaves with the first piece of the body, or with finish().

        body_bytes: how many will follow; None for chunks, and then headers must hold no Content-Length.
        """
        assert not self.begun
        framing: list[Header] = []
        if self.expects_continue:
            # The client may or may not send the body now: there is no telling where its next request begins.
            self.keep_alive = False
            self.connection.close_after_answer()
        self._chunked = False
        if body_bytes is None:
            if self.request.version >= HttpVersion11:
                self._chunked = True
                framing.append(("Transfer-Encoding", "chunked"))
            else:
                self.keep_alive = False
        if not self.keep_alive or self.connection.draining:
            self.keep_alive = False
            framing.append(("Connection", "close"))
        self.status = status
        self._announced = body_bytes
        self._pending = render_head(status, [*headers, *framing])

    async def write(self, data: bytes) -> None:
        """Bytes of the body."""
        if not data:
            return
        self.sent_bytes += len(data)
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._pending and len(data) <= _JOIN_BYTES:
            data, self._pending = self._pending + data, b""
        else:
            await self._flush()
        self._leaving()
        await self.connection.send(data)

    async def relay(self, piece: Slice) -> None:
        """A piece of a file as part of the body."""
        assert not self._chunked
        relay = self.connection.relay()
        await self.connection.settle()
        head, self._pending = self._pending, b""
        self._leaving()
        try:
            await relay.send(head, (piece,))
        finally:
            self.sent_bytes += max(0, relay.sent_bytes - len(head))

    async def stream(self, piece: StreamPiece) -> None:
        """What another node sends, as part of the body. When that node breaks off nothing is raised: see StreamPiece; as
        long as nothing has left, the head has not either."""
        assert not self._chunked
        if self.connection.socket is None:
            await self._copy(piece)
            return
        splicer = self.connection.splicer()
        await self.connection.settle()
        head, self._pending = self._pending, b""
        try:
            await splicer.send(head, piece, self._leaving)
        finally:
            self.sent_bytes += piece.taken
            if head and splicer.head_left == len(head):
                self._pending = head

    async def _copy(self, piece: StreamPiece) -> None:
        """A stream whose bytes have to be seen."""
        while piece.taken < piece.length:
            try:
                data = await piece.stream.receive(min(piece.length - piece.taken, COPY_BYTES))
            except OriginBroken as broken:
                piece.failure = broken
                return
            await self.write(data)
            piece.taken += len(data)

    def leave(self) -> None:
        """Let the head go now, if it has not gone yet: the first byte may take long. No await."""
        head, self._pending = self._pending, b""
        transport = self.connection.transport
        if head and transport is not None:
            self._leaving()
            transport.write(head)

    async def finish(self) -> None:
        """The body is complete."""
        if self._announced is not None and self.sent_bytes != self._announced:
            raise BrokenOff(f"{self.sent_bytes} of {self._announced} bytes")
        await self._flush()
        if self._chunked:
            await self.connection.send(b"0\r\n\r\n")

    def break_off(self) -> None:
        """The response cannot be completed: let the client see that."""
        self.keep_alive = False
        self.connection.drop()

    async def _flush(self) -> None:
        head, self._pending = self._pending, b""
        if head:
            self._leaving()
            await self.connection.send(head)

    def _leaving(self) -> None:
        if self._first_byte is None:
            self._first_byte = self.parts.clock.monotonic()

    # -- afterwards

    def record(self) -> None:
        """Count the request and log it; once."""
        if self._logged:
            return
        self._logged = True
        parts, operation = self.parts, self.operation
        name = operation.op.name if operation is not None else UNKNOWN
        metrics.REQUEST_COUNTS.add((name, str(self.status), "slow", self.phase or "none"))
        if self.sent_bytes and self.body_source is not None:
            metrics.BYTE_COUNTS.add((self.body_source,), self.sent_bytes)
        if not parts.access_log.enabled:
            return
        end = parts.clock.monotonic()
        first = end if self._first_byte is None else self._first_byte
        parts.access_log.write(
            Line(
                time=time_text(parts.clock.now()),
                request_id=self.request_id,
                client=self.connection.client,
                key_id=self.access_key,
                operation=name,
                bucket=operation.bucket if operation is not None else None,
                key=printable(operation.key) if operation is not None else None,
                range=printable(self.head.headers.get("range")),
                status=self.status,
                error=self.error,
                bytes=self.sent_bytes,
                lane="slow",
                phase=self.phase,
                reason=self.reason,
                origin_requests=self.origin_requests,
                first_byte_ms=round((first - self._started) * 1000, 3),
                total_ms=round((end - self._started) * 1000, 3),
            )
        )


class BrokenOff(ConnectionError):
    """The body ended before, or went beyond, what the head had announced."""


def head_of(method: str, target: str, raw_headers: Sequence[tuple[bytes, bytes]]) -> RequestHead:
    """A request's head from what aiohttp's parser saw, with nothing of the target normalised.

    The absolute form of the target (RFC 9112 section 3.2.2) is cut down to its path; a fragment stays where it is.
    """
    if not target.startswith("/"):
        _, scheme, rest = target.partition("://")
        if scheme:
            authority, slash, path = rest.partition("/")
            target = slash + path if slash else "/" + authority[len(authority.partition("?")[0]) :]
    raw_path, _, raw_query = target.partition("?")
    return RequestHead(method, raw_path, raw_query, headers_from_raw(raw_headers))
