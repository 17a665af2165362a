"""The HTTP edge: connections, their limits and their clocks.

Owns: aiohttp's server protocol as S3 needs it (nothing unpacked or normalised, S3's limits, S3's XML for what is not
HTTP), the choice between the two lanes for every arriving request, holding back what a client pipelines behind a
response of the fast lane, idle time-outs, and draining. Does not own: what a request means (kosproxy.pipeline,
kosproxy.fastlane) or how bytes of files leave (kosproxy.relay).

Invariant: the fast lane sees a request only when nothing else is in work on its connection: no request of aiohttp's, no
half-parsed head, no unsent byte. So neither lane can ever write into the other's response.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any, Final, Protocol, cast

from aiohttp.http_exceptions import LineTooLong
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse
from aiohttp.web_server import Server

from kos.config import Limits
from kos.errors import S3Error
from kosproxy.copying import PIECE_BYTES, Copier
from kosproxy.relay import Relay
from kosproxy.splicing import Pipes, Splicer

_HEAD_END: Final = b"\r\n\r\n"
#: Fields of one head, and bytes of one: together at most 2 MiB of a head that is pipelined behind a running request
#: (the head of an idle connection is held to limits.header_bytes as a whole). S3 allows 8 KiB of headers.
_FIELDS_MAX: Final = 128
_FIELD_BYTES: Final = 16 * 1024
#: A client is heard out for this much after an answer that it did not wait for, so that it reads the answer instead of
#: a connection reset; then the connection closes whatever it does.
_DISCARD_BYTES: Final = 16 * 1024 * 1024
_DISCARD_S: Final = 5.0
#: Bytes that a client may pipeline behind a response of the fast lane before its connection is not read any more. What
#: one read brings comes on top: uvloop reads at most 256 KiB at once.
_HELD_BYTES: Final = 64 * 1024
#: SO_LINGER on, with no time: closing resets.
_NO_LINGER: Final = struct.pack("ii", 1, 0)


class Sent(StreamResponse):
    """What the handler gives back to aiohttp: the response is on the wire already, and this is whether to go on."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._keep_alive = keep_alive

    async def prepare(self, request: BaseRequest) -> None:
        """Nothing to prepare: the head went out before."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing to end."""


class Lanes(Protocol):
    """What the edge asks of the rest of the worker."""

    @property
    def fast(self) -> Callable[[Connection, bytes], bool]:
        """Answers data, one complete head, at once (True), or leaves it untouched (False)."""

    async def slow(self, request: BaseRequest, connection: Connection) -> Sent:
        """Answer one request; raises nothing but CancelledError and ConnectionError."""

    async def malformed(self, connection: Connection, error: S3Error) -> None:
        """Answer something that is no request."""


class Connection(RequestHandler):
    """One client's connection."""

    __slots__ = (
        "_clean",
        "_discarded_bytes",
        "_discarding",
        "_drained",
        "_drained_at",
        "_edge",
        "_fast",
        "_head_bytes",
        "_head_since",
        "_held",
        "_relay",
        "_splicer",
        "_stuck_bytes",
        "_waiting_since",
        "_wire",
        "client",
        "in_fast",
        "socket",
    )

    def __init__(self, edge: Edge, **options: Any) -> None:
        super().__init__(edge, **options)
        self._edge = edge
        self._fast = edge.lanes.fast
        # Whether the parser stands exactly between two requests.
        self._clean = True
        self._head_bytes = 0
        self._head_since = 0.0
        self._held = bytearray()
        self._relay: Relay | Copier | None = None
        self._splicer: Splicer | None = None
        self._discarding = False
        self._discarded_bytes = 0
        self._drained: asyncio.Future[None] | None = None
        # aiohttp forgets its transport when it closes it, which may be long before the last bytes have left.
        self._wire: asyncio.Transport | None = None
        self._stuck_bytes = 0
        self._waiting_since = 0.0
        #: whether a response of the fast lane is under way
        self.in_fast = False
        #: the transport's socket; None where bytes must not go past the transport (kosproxy.tls)
        self.socket: socket.socket | None = None
        #: the peer's address, for the log
        self.client = ""

    # -- what the lanes use

    @property
    def quiet(self) -> bool:
        """Whether a response may go past the transport: it is open and holds no unsent byte."""
        transport = self.transport
        return transport is not None and not transport.is_closing() and transport.get_write_buffer_size() == 0

    @property
    def draining(self) -> bool:
        """Whether no further request is wanted."""
        return self._edge.draining

    def relay(self) -> Relay | Copier:
        """What sends pieces of files on this connection, made when first needed."""
        if self._relay is None:
            if self.socket is not None:
                self._relay = Relay(self._loop, self.socket, self._edge.threads)
            else:
                self._relay = Copier(self._loop, self, self._edge.threads, self._edge.copy_buffer)
        return self._relay

    def splicer(self) -> Splicer:
        """What sends another node's bytes on this connection, made when first needed. Only where there is a socket."""
        if self._splicer is None:
            relay = self.relay()
            assert isinstance(relay, Relay), "TLS is copied"
            self._splicer = Splicer(self._loop, relay.socket, self._edge.pipes)
        return self._splicer

    async def send(self, data: bytes | memoryview) -> None:
        """Write through the transport and wait until the kernel has all of it. ConnectionError: the client is gone."""
        self._open_transport().write(data)
        if self._paused:
            await self._drain_helper()

    async def settle(self) -> None:
        """Wait until the kernel has all that was written before. ConnectionError: the client is gone."""
        if self._paused:
            await self._drain_helper()
        self._open_transport()

    def _open_transport(self) -> asyncio.WriteTransport:
        transport = self.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        return transport

    def answered_fast(self) -> None:
        """The fast lane's response is complete: the connection is idle again from now on."""
        self.in_fast = False
        self._next_keepalive_close_time = now = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(now, self._process_keepalive)
        if self._edge.draining:
            self.close_if_idle()
        elif self._held:
            self._loop.call_soon(self._let_go)

    def drop(self) -> None:
        """End the connection at once: what was announced will not be completed."""
        if self.transport is not None:
            self.transport.abort()

    def close_after_answer(self) -> None:
        """The body that the client announced will not be read to its end: do not wait for it."""
        self._lingering_time = 0.0

    # -- arriving bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        if self._edge.full or self._edge.draining:
            transport.write(self._edge.turned_away)
            self._force_close = True
            transport.close()
            return
        super().connection_made(transport)
        self._wire = transport
        # Nothing waits in the transport unnoticed: a sender is paused until the kernel has all it was given.
        transport.set_write_buffer_limits(high=0)
        if transport.get_extra_info("ssl_object") is None:
            self.socket = transport.get_extra_info("socket")
        peer = transport.get_extra_info("peername")
        self.client = str(peer[0]) if peer else ""

    def connection_lost(self, exc: BaseException | None) -> None:
        self._held.clear()
        self._end_discarding()
        super().connection_lost(exc)
        if self._splicer is not None:
            self._splicer.close()  # before the relay, whose socket it watches
        if self._relay is not None:
            self._relay.close()

    def pause_writing(self) -> None:
        """The kernel did not take all: from now on the client's silence is timed."""
        super().pause_writing()
        self._stuck_bytes = 0
        self._waiting_since = self._loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._waiting_since = 0.0
        if isinstance(self._relay, Copier):
            self._relay.resume()

    def eof_received(self) -> None:
        self._end_discarding()
        super().eof_received()

    def data_received(self, data: bytes) -> None:
        if not data:
            super().data_received(data)
        elif self._discarding:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > _DISCARD_BYTES:
                self._end_discarding()
        elif self.in_fast or self._held:
            self._hold(data)
        elif not (
            self._clean
            and data.endswith(_HEAD_END)
            and data.startswith((b"GET ", b"HEAD "))
            and self._idle()
            and self._fast(self, data)
        ):
            self._to_parser(data)

    def _idle(self) -> bool:
        """Whether aiohttp waits for a request and has none, and the client has taken what it was sent."""
        if self._messages or self._paused or self._force_close or self._close or self._edge.draining:
            return False
        waiter = self._waiter
        # Before its first request a connection's task may not have come to wait yet.
        return self._request_count == 0 if waiter is None else not waiter.done()

    def _hold(self, data: bytes) -> None:
        self._held += data
        if len(self._held) >= _HELD_BYTES and self.transport is not None:
            self.transport.pause_reading()

    def _let_go(self) -> None:
        """Work on what was held back, as if it arrived now."""
        if self.in_fast or not self._held:
            return
        data = bytes(self._held)
        self._held.clear()
        if self.transport is not None:
            self.transport.resume_reading()
            self.data_received(data)

    def _to_parser(self, data: bytes) -> None:
        idle = self._idle()
        before = len(self._messages)
        super().data_received(data)
        messages = self._messages
        if len(messages) > before:
            message, payload = messages[-1]
            # A head that began after the last complete one would end here as well, and so be a message itself.
            self._clean = (
                payload is EMPTY_PAYLOAD and data.endswith(_HEAD_END) and not self._upgraded and not self._buffer_paused
            )
            self._head_bytes = 0
            self._head_since = 0.0
            self._discarding = isinstance(message, _ErrInfo)
            if not isinstance(message, _ErrInfo) and message.upgrade and not self._upgraded:
                self._decline_upgrade(message, payload, data)
        else:
            self._clean = False
            if idle:
                self._head_bytes += len(data)
                self._head_since = self._head_since or self._loop.time()
                if self._head_bytes > self._edge.limits.header_bytes:
                    self.refuse(S3Error("RequestHeaderSectionTooLarge"))

    def _decline_upgrade(self, message: RawRequestMessage, payload: StreamReader, data: bytes) -> None:
        """The newest message asks for a protocol that nobody here speaks (Java's client asks for h2c each time that it
        connects). It is answered as if it had not asked, but what came along behind it in the same read aiohttp's parser
        has dropped: were the connection kept, the rest of that would be taken for a request."""
        if payload is not EMPTY_PAYLOAD or data.count(_HEAD_END) != 1 or not data.endswith(_HEAD_END):
            self._messages[-1] = (message._replace(should_close=True), payload)

    # -- what is no request

    def refuse(self, error: S3Error) -> None:
        """Answer a head that will never be complete, by aiohttp's own way for malformed ones."""
        self._head_since = 0.0
        self._discarding = True
        self._messages.append((_ErrInfo(status=400, exc=error, message=error.message), EMPTY_PAYLOAD))
        self._request_count += 1
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _make_error_handler(self, err_info: _ErrInfo) -> Callable[[BaseRequest], Awaitable[StreamResponse]]:
        async def answer(_: BaseRequest) -> StreamResponse:
            await self._edge.lanes.malformed(self, _as_s3_error(err_info.exc))
            await self._discard()
            return Sent(keep_alive=False)

        return answer

    async def _discard(self) -> None:
        """Let the client finish what it is sending, within bounds, so that it comes to read the answer."""
        transport = self.transport
        if transport is None or not self._discarding:
            return
        if transport.can_write_eof():
            transport.write_eof()
        self._drained = self._loop.create_future()
        timer = self._loop.call_later(_DISCARD_S, self._end_discarding)
        try:
            await self._drained
        finally:
            timer.cancel()
            self._drained = None

    def _end_discarding(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    # -- clocks

    def _process_keepalive(self) -> None:
        if self.in_fast and not self._force_close:
            # aiohttp knows nothing of a response of the fast lane and would take the connection for idle.
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        super()._process_keepalive()

    def check_clocks(self, now: float) -> None:
        """Called once in a while: end what has stopped moving."""
        limits = self._edge.limits
        if self._head_since and now - self._head_since > limits.header_timeout_s:
            self.refuse(S3Error("RequestTimeout"))
        if self._relay is not None and self._relay.silent_s(now) > limits.send_timeout_s:
            self._give_up()
        if self._splicer is not None and self._splicer.silent_s(now) > limits.send_timeout_s:
            self._give_up()
        if self._waiting_since and self._wire is not None:
            left = self._wire.get_write_buffer_size()
            if left != self._stuck_bytes:
                self._stuck_bytes = left
                self._waiting_since = now
            elif now - self._waiting_since > limits.send_timeout_s:
                self._give_up()

    def _give_up(self) -> None:
        """End the connection of a client that takes nothing: reset, for else the kernel goes on offering it what is in
        the socket's buffer (some MiB) for many minutes, and the client never hears of the end."""
        wire = self._wire
        if wire is None:
            return
        end = wire.get_extra_info("socket")
        if end is not None:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        wire.abort()

    def close_if_idle(self) -> None:
        """While draining: end the connection unless a response is under way."""
        waiter = self._waiter
        if not self._messages and not self.in_fast and waiter is not None and not waiter.done():
            self.force_close()


class Handshake(Protocol):
    """A client that is not yet a connection."""

    def check_clock(self, now: float, timeout_s: float) -> None: ...

    def abort(self) -> None: ...


class Edge(Server):
    """The listening side of one worker: makes connections, looks after their clocks, drains them."""

    def __init__(
        self, lanes: Lanes, limits: Limits, threads: Executor, turned_away: bytes, *, field_bytes: int = _FIELD_BYTES
    ) -> None:
        """turned_away: the whole response for a connection too many. threads: for file reads that wait for the disk.
        field_bytes: of one field of a head."""
        super().__init__(
            self._handle,
            handler_cancellation=True,
            loop=asyncio.get_running_loop(),
        )
        self.lanes = lanes
        self.limits = limits
        self.threads = threads
        self.turned_away = turned_away
        self.draining = False
        #: clients of a TLS port whose handshake is not done; they count as connections
        self.handshakes: set[Handshake] = set()
        #: for all copiers: nothing else runs between filling and sending it
        self.copy_buffer = memoryview(bytearray(PIECE_BYTES))
        self.pipes = Pipes()
        self._options: dict[str, Any] = {
            "keepalive_timeout": limits.keepalive_s,
            "access_log": None,
            "max_line_size": limits.header_bytes,
            "max_field_size": min(limits.header_bytes, field_bytes),
            "max_headers": _FIELDS_MAX,
            "lingering_time": min(_DISCARD_S, limits.body_timeout_s),
            "read_bufsize": limits.relay_buffer_bytes,
            "auto_decompress": False,
        }
        clocks = (limits.header_timeout_s, limits.send_timeout_s)
        self._interval_s = min(1.0, *(clock / 4 for clock in clocks))
        self._timer = self._loop.call_later(self._interval_s, self._check_clocks)

    @property
    def full(self) -> bool:
        """Whether the next client would be one too many."""
        return len(self._connections) + len(self.handshakes) >= self.limits.connections

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._options)

    async def _handle(self, request: BaseRequest) -> StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        return await self.lanes.slow(request, connection)

    def _check_clocks(self) -> None:
        now = self._loop.time()
        for connection in self.connections:
            assert isinstance(connection, Connection)
            connection.check_clocks(now)
        for handshake in tuple(self.handshakes):
            handshake.check_clock(now, self.limits.header_timeout_s)
        self._timer = self._loop.call_later(self._interval_s, self._check_clocks)

    async def drain(self, timeout_s: float) -> None:
        """Close what is idle, let responses under way finish for at most timeout_s, then end the rest."""
        self.draining = True
        for handshake in tuple(self.handshakes):
            handshake.abort()
        deadline = self._loop.time() + timeout_s
        while self._connections:
            for connection in self.connections:
                assert isinstance(connection, Connection)
                connection.close_if_idle()
            left_s = deadline - self._loop.time()
            if left_s <= 0:
                break
            await asyncio.sleep(min(0.02, left_s))
        self._timer.cancel()
        for connection in self.connections:
            assert isinstance(connection, Connection)
            connection.drop()
        await self.shutdown(1.0)
        self.pipes.close()


def _as_s3_error(error: BaseException) -> S3Error:
    """What S3 would say to what aiohttp's parser refused."""
    if isinstance(error, S3Error):
        return error
    if isinstance(error, LineTooLong) or "Too many headers" in str(error):
        return S3Error("RequestHeaderSectionTooLarge")
    return S3Error("InvalidRequest", "An error occurred when parsing the HTTP request.")
