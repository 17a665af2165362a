"""Bodies of answers received straight into the reader's own buffer: recv_into, no copy, TLS included.

Owns: taking an aiohttp connection over for the length of one body and giving it back, and everything that kos knows of
aiohttp's inside. Does not own: what happens to the bytes (a BodySink), requests and heads (aiohttp, kos.origin.lane).

How: while a body is wanted in a sink, the connection's transport gets a BufferedProtocol of ours instead of aiohttp's
(transport.set_protocol, which asyncio and uvloop support on the fly). Subclassing aiohttp's protocol would not do:
uvloop gives no buffers to anything that is also an asyncio.Protocol. When the last byte is in, aiohttp's protocol is
put back and its payload stream is told that it is at its end, upon which aiohttp returns the connection to its pool.
aiohttp makes a new parser for every request, so the one that never saw this body's end is not missed.

What is used of aiohttp and is not in its documentation (tests/kos/origin/test_sink.py says which is gone if one goes):
StreamReader.feed_eof, StreamReader.exception, StreamReader.is_eof, ResponseHandler.read_timeout and .start_timeout,
ClientSession._retry_connection.

Invariant: a connection goes back to the pool only if exactly the announced body was taken from it; else it is closed.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol

from aiohttp import ClientError, ClientResponse, ClientSession, StreamReader

from kos.errors import OriginBroken


class BodySink(Protocol):
    """Where a body goes. Neither method may block or raise for the origin's faults."""

    def get_buffer(self) -> memoryview:
        """Room for the next bytes: writable, not empty. Not called after received() said False, until resume()."""

    def received(self, n: int) -> bool:
        """n bytes were put at the beginning of the last buffer. False: read no more until resume() is called."""


class Delivery:
    """One body on its way into one sink. resume() is the sink's; run() is the lane's."""

    def __init__(self, response: ClientResponse, sink: BodySink, length: int, read_timeout_s: float) -> None:
        self._response = response
        self._sink = sink
        self._length = length
        self._read_timeout_s = read_timeout_s
        self._delivered = 0
        self._resumed: Final = asyncio.Event()
        self._resumed.set()
        self._receiver: _Receiver | None = None

    def resume(self) -> None:
        """The sink has room again. Harmless at any time."""
        self._resumed.set()
        if self._receiver is not None:
            self._receiver.resume()

    async def run(self) -> None:
        """Returns when `length` bytes are in the sink; OriginBroken says how many came if they are not."""
        _stop_timer(self._response)
        try:
            await self._drain_stream()
            if self._delivered < self._length:
                if announced_length(self._response) is None:
                    await self._copy_stream()
                else:
                    await self._receive()
        except ClientError as error:
            raise self._broken(str(error)) from error
        except TimeoutError as error:
            raise self._broken(f"nothing from the origin for {self._read_timeout_s:g} s") from error
        finally:
            # With the announced body complete the connection is in the pool already and this does nothing.
            self._response.close()

    def _broken(self, reason: str) -> OriginBroken:
        return OriginBroken(f"{reason} (after {self._delivered} of {self._length} bytes)")

    async def _drain_stream(self) -> None:
        """Hand over what aiohttp received with the head. Ends with its stream empty and no await since."""
        stream = self._response.content
        while self._delivered < self._length:
            # Reading may make aiohttp parse more that it had held back, so this goes on until there is really nothing.
            data = stream.read_nowait()
            if not data:
                break
            await self._copy(data)
        if self._delivered == self._length and _is_complete(self._response, self._length):
            _finish(stream)
        elif self._delivered < self._length and stream.is_eof():
            raise self._broken("the origin's body ended early")

    async def _copy_stream(self) -> None:
        """A body in chunks: aiohttp must read its framing, so its bytes are copied once."""
        while self._delivered < self._length:
            async with asyncio.timeout(self._read_timeout_s):
                data = await self._response.content.readany()
            if not data:
                raise self._broken("the origin's body ended early")
            await self._copy(data)

    async def _copy(self, data: bytes) -> None:
        rest = memoryview(data)[: self._length - self._delivered]
        while rest:
            room = self._sink.get_buffer()
            n = min(len(room), len(rest))
            room[:n] = rest[:n]
            rest = rest[n:]
            self._delivered += n
            self._resumed.clear()
            if self._sink.received(n):
                self._resumed.set()
            else:
                await self._resumed.wait()

    async def _receive(self) -> None:
        connection = self._response.connection
        transport = None if connection is None else connection.transport
        if connection is None or transport is None or transport.is_closing():
            raise self._broken("the origin closed the connection")
        assert connection.protocol is not None
        missing = self._length - self._delivered
        receiver = _Receiver(transport, connection.protocol, self._sink, missing, self._read_timeout_s)
        self._receiver = receiver
        ended: _Ended | None = None
        try:
            await receiver.done
        except _Ended as error:
            ended = error
        finally:
            self._receiver = None
            self._delivered = self._length - receiver.remaining
            receiver.give_back()
        if ended is not None:
            raise self._broken(str(ended)) from ended.__cause__
        if _is_complete(self._response, self._length):
            _finish(self._response.content)


class _Ended(Exception):
    """The connection ended, or stood still, before the body was complete."""


class _Receiver(asyncio.BufferedProtocol):
    """Stands in for aiohttp's protocol while one body is received."""

    __slots__ = (
        "_heard_at",
        "_http",
        "_loop",
        "_paused",
        "_sink",
        "_timeout_s",
        "_timer",
        "_transport",
        "done",
        "remaining",
    )

    def __init__(
        self, transport: asyncio.Transport, http: asyncio.Protocol, sink: BodySink, remaining: int, timeout_s: float
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._http = http
        self._sink = sink
        self._timeout_s = timeout_s
        self._paused = False
        self.remaining = remaining
        self.done: asyncio.Future[None] = self._loop.create_future()
        self._heard_at = self._loop.time()
        self._timer = self._loop.call_at(self._heard_at + timeout_s, self._look)
        transport.set_protocol(self)
        transport.resume_reading()  # aiohttp pauses when its own stream was full

    def give_back(self) -> None:
        """aiohttp's protocol has the connection again, whatever happened."""
        self._timer.cancel()
        if self._transport.get_protocol() is self:
            self._transport.set_protocol(self._http)
            if self._paused and not self._transport.is_closing():
                self._transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        try:
            room = self._sink.get_buffer()
        except Exception as error:
            self._end(error)  # the loop only closes the connection and forgets why
            raise
        return room if len(room) <= self.remaining else room[: self.remaining]

    def buffer_updated(self, nbytes: int) -> None:
        self.remaining -= nbytes
        self._heard_at = self._loop.time()
        try:
            wants_more = self._sink.received(nbytes)
        except Exception as error:
            self._end(error)
            return
        if self.remaining == 0:
            # Given back here and not when the waiter wakes: the next bytes on this connection are not the body's.
            self.give_back()
            if not self.done.done():
                self.done.set_result(None)
        elif not wants_more and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._heard_at = self._loop.time()
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def eof_received(self) -> bool:
        self._end(_Ended("the origin closed the connection"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        ended = _Ended("the connection to the origin was lost")
        ended.__cause__ = exc
        self._end(ended)
        self._http.connection_lost(exc)

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()

    def _look(self) -> None:
        """One timer for the whole body, moved on when it rings, instead of one set anew for every piece."""
        now = self._loop.time()
        due_at = (now if self._paused else self._heard_at) + self._timeout_s
        if due_at <= now:
            self._end(_Ended(f"nothing from the origin for {self._timeout_s:g} s"))
        else:
            self._timer = self._loop.call_at(due_at, self._look)

    def _end(self, error: BaseException) -> None:
        self._timer.cancel()
        if not self.done.done():
            self.done.set_exception(error)


def announced_length(response: ClientResponse) -> int | None:
    """Content-Length of the answer; None if the body is framed otherwise."""
    if "transfer-encoding" in response.headers:
        return None
    return response.content_length


def own_retries_only(session: ClientSession) -> None:
    """aiohttp sends again by itself when a kept connection turns out to be dead; whether that may be is kos' to say."""
    assert hasattr(session, "_retry_connection")
    session._retry_connection = False


def _stop_timer(response: ClientResponse) -> None:
    """aiohttp's read timer knows neither bytes that it does not see nor a sink that is full; ours takes over."""
    connection = response.connection
    protocol: Any = None if connection is None else connection.protocol
    if protocol is not None:
        protocol.read_timeout = None
        protocol.start_timeout()


def _is_complete(response: ClientResponse, length: int) -> bool:
    return announced_length(response) == length


def _finish(stream: StreamReader) -> None:
    """Tell aiohttp that this body is over; it then returns the connection to its pool."""
    if not stream.is_eof() and stream.exception() is None:
        stream.feed_eof()
