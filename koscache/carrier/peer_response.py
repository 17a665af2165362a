"""A peer's answer, its head read and its body still on the way: to be taken as kos.origin.response.OriginResponse is, or
streamed on to a client without being looked at.

Owns: the ways to take the body (whole and bounded, in pieces, straight into a sink, as a StreamPiece), silence in it, giving
the connection back. Does not own: the connection's making (koscache.carrier.peer_pool), splicing (kosproxy.splicing).

Invariant: exactly the announced bytes are taken from the socket, and only then is the connection used again; a body that
ends early or stands still closes it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Final

from multidict import CIMultiDict

from kos import metrics
from kos.errors import OriginBroken
from kos.origin.sink import BodySink
from koscache.carrier.peer_connection import Head, PeerConnection
from koscache.carrier.peer_wire import CHECKSUM_HEADER
from koscache.carrier.types import StreamPiece

#: Received at once where nobody says how much.
_PIECE_BYTES: Final = 256 * 1024
#: What is received of one body before the loop looks after the others.
_TURN_BYTES: Final = 4 * 1024 * 1024
_PEER: Final = ("peer",)


class PeerResponse:
    """status and headers are there; take the body by one of read, pieces, into, stream, then release() or close().

    content_length: of the body that follows. member: who answered. attempts: as of an origin's answer.
    """

    __slots__ = (
        "_broken_told", "_connection", "_delivery", "_done", "_early", "_finished", "_left", "_loop", "_unwaited", "_waiter",
        "attempts", "content_length", "headers", "keep_alive", "member", "status", "timeout_s",
    )  # fmt: skip

    def __init__(
        self,
        member: str,
        connection: PeerConnection,
        head: Head,
        early: memoryview,
        timeout_s: float,
        finished: Callable[[PeerConnection, bool], None],
        broken: Callable[[], None],
    ) -> None:
        """early: of the body, received with the head. finished: gets the connection back, and whether it can be used
        again; called once. broken: told of a body that was not completed by its sender."""
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._early = early
        self._left = head.length  # of the body, those of _early among them
        self._finished = finished
        self._broken_told = broken
        self._done = False
        self._delivery: _Delivery | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._unwaited = 0
        self.member = member
        self.status = head.status
        self.headers: CIMultiDict[str] = head.headers
        self.content_length = head.length
        self.keep_alive = head.keep_alive
        self.timeout_s = timeout_s
        self.attempts = 1

    # --- as an origin's answer ------------------------------------------------------------------------------------

    async def read(self, limit: int) -> bytes:
        """The whole body, of at most `limit` bytes; OriginBroken if it is longer, breaks off, or stands still."""
        if self._left > limit:
            self.close()
            raise OriginBroken(f"{self.member}: the answer is longer than {limit} bytes")
        pieces: list[bytes] = []
        while self._left:
            pieces.append(await self.receive(self._left))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body in the pieces in which it comes; the peer is held back while nobody asks. OriginBroken as read."""
        while self._left:
            yield await self.receive(_PIECE_BYTES)

    async def into(self, sink: BodySink, length: int) -> None:
        """Put the next `length` bytes of the body into the sink, received right there.

        With the whole body taken the connection is kept for the next question, with less it is closed. OriginBroken says
        how many bytes came if they are not all; whatever the sink raises comes out as it is.
        """
        if self._left < length:
            announced = self.content_length
            self.close()
            raise OriginBroken(f"{self.member}: announced {announced} bytes where {length} were wanted")
        self._delivery = delivery = _Delivery(self._loop, self, self._connection, sink, length)
        try:
            await delivery.run()
        finally:
            self._delivery = None
            self.release()

    def resume(self) -> None:
        """The sink, which had returned False, has room again."""
        if self._delivery is not None:
            self._delivery.resume()

    def release(self) -> None:
        """Done with it: keeps the connection if the body was taken whole, else closes it. Idempotent."""
        self._finish(self._left == 0 and self.keep_alive)

    def close(self) -> None:
        """Close the connection, whatever is still on the way. Whoever waits for it gets OriginBroken. Idempotent."""
        self._finish(False)

    def discard(self) -> None:
        """Nobody looks at the body: keeps the connection if all of it is here."""
        self._finish(self._left == len(self._early) and self.keep_alive)

    def _finish(self, keep: bool) -> None:
        if self._done:
            return
        self._done = True
        taken = self.content_length - self._left
        if taken:
            metrics.BYTE_COUNTS.add(_PEER, taken)
        if not keep:
            self._connection.close()  # wakes whoever watches it
        self._finished(self._connection, keep)

    # --- streaming on ---------------------------------------------------------------------------------------------

    def stream(self, length: int) -> StreamPiece:
        """The next `length` bytes of the body, for whoever can pass them on unseen."""
        assert 0 < length <= self._left, "as much as was announced"
        return StreamPiece(self, length)

    @property
    def socket(self) -> socket.socket:
        return self._connection.socket

    def early(self, limit: int) -> memoryview:
        data = self._early[:limit]
        self._early = self._early[limit:]
        self._left -= len(data)
        return data

    def took(self, count: int) -> None:
        self._left -= count
        assert self._left >= 0, "more than was announced"

    def watch(self, readable: Callable[[], None] | None) -> None:
        self._connection.watch(readable)

    def expect(self, count: int) -> None:
        """Heeded if the peer has it all in its store: what is being filled there comes as it comes."""
        if CHECKSUM_HEADER in self.headers:
            self._connection.expect(count)

    async def receive(self, limit: int) -> bytes:
        """The next bytes of the body: at least one, at most limit. Raises OriginBroken. Not at its end."""
        assert self._left > 0, "nothing is left of it"
        limit = min(limit, self._left)
        data = bytes(self.early(limit))
        while not data:
            if self._unwaited >= _TURN_BYTES:
                self._unwaited = 0
                await asyncio.sleep(0)
            data = self._receive_now(limit)
            if not data:
                await self._arrival()
        return data

    def _receive_now(self, limit: int) -> bytes:
        """b"": nothing is there."""
        try:
            data = self._connection.socket.recv(limit)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise self.broken(error.strerror or str(error)) from error
        if not data:
            raise self.broken("closed the connection")
        self._unwaited += len(data)
        self.took(len(data))
        return data

    async def _arrival(self) -> None:
        self._unwaited = 0
        self._waiter = waiter = self._loop.create_future()
        timer = self._loop.call_later(self.timeout_s, self._silent)
        self._connection.watch(self._arrived)
        try:
            await waiter
        finally:
            timer.cancel()
            self._connection.watch(None)
            self._waiter = None

    def _arrived(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _silent(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self.broken(f"nothing for {self.timeout_s:g} s"))

    def broken(self, reason: str) -> OriginBroken:
        if self._done:
            return OriginBroken(f"{self.member}: the answer was given up")
        self._broken_told()
        taken = self.content_length - self._left
        self.close()
        return OriginBroken(f"{self.member}: {reason} (after {taken} of {self.content_length} bytes)")


def checksum_of(response: PeerResponse) -> int | None:
    """xxh3_64 of the whole block that the answer's bytes are of, where the peer had it whole."""
    text = response.headers.get(CHECKSUM_HEADER, "")
    try:
        return int(text, 16) if text else None
    except ValueError:
        return None


class _Delivery:
    """Bytes of one body on their way into one sink. resume() is the sink's."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        response: PeerResponse,
        connection: PeerConnection,
        sink: BodySink,
        length: int,
    ) -> None:
        self._loop = loop
        self._response = response
        self._connection = connection
        self._sink = sink
        self._missing = length
        self._paused = False
        self._heard_at = loop.time()
        # One timer for the whole body, moved on when it rings, instead of one set anew for every piece.
        self._timer = loop.call_later(response.timeout_s, self._look)
        self._done: asyncio.Future[None] = loop.create_future()

    async def run(self) -> None:
        """Returns when all bytes are in the sink; raises OriginBroken, or what the sink raised."""
        self._turn()
        try:
            await self._done
        finally:
            self._timer.cancel()
            self._connection.watch(None)

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._heard_at = self._loop.time()
            self._loop.call_soon(self._turn)

    def _look(self) -> None:
        now = self._loop.time()
        due_at = (now if self._paused else self._heard_at) + self._response.timeout_s
        if due_at <= now:
            self._end(self._response.broken(f"nothing for {self._response.timeout_s:g} s"))
        else:
            self._timer = self._loop.call_at(due_at, self._look)

    def _end(self, error: BaseException | None) -> None:
        self._timer.cancel()
        self._connection.watch(None)
        if not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)

    def _turn(self) -> None:
        if self._paused or self._done.done():
            return
        try:
            wait = self._receive()
        except Exception as error:
            self._end(error)  # the sink's, or that the answer broke off
            return
        if not self._missing:
            self._end(None)
        elif wait:
            self._connection.watch(self._turn)
        else:
            self._connection.watch(None)

    def _receive(self) -> bool:
        """Fill the sink with what is there. False: it is full, or everything is in it."""
        response, sink, budget = self._response, self._sink, _TURN_BYTES
        while self._missing and budget > 0:
            room = sink.get_buffer()[: self._missing]
            data = response.early(len(room))
            if data:
                count = len(data)
                room[:count] = data
            else:
                count = self._receive_now(room)
                if not count:
                    return True
            self._missing -= count
            budget -= count
            self._heard_at = self._loop.time()
            if not sink.received(count):
                self._paused = self._missing > 0
                return False
            if count < len(room) and not data:
                return True  # that was all, most likely
        return True

    def _receive_now(self, room: memoryview) -> int:
        """0: nothing is there."""
        try:
            count = self._connection.socket.recv_into(room)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._response.broken(error.strerror or str(error)) from error
        if not count:
            raise self._response.broken("closed the connection")
        self._response.took(count)
        return count
