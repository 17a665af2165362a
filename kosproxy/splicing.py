"""Bytes of another node onto a client's socket without passing through this process: socket -> pipe -> socket.

Owns: the pipes and their number, the order head -> bytes, waiting for either side, a peer's silence, and the rule that a
stream holds no pipe while nothing is in it. Does not own: the two sockets (the relay has a duplicate of the client's, the
stream is its response's), the clock of a client that takes nothing (the connection asks silent_s()).

    peer's socket ──fill──▶ pipe ──pour──▶ client's socket          a pipe is filled again when it is empty, so what was
                                                                    taken from the peer and not delivered is in one pipe
Where no pipe is left a stream copies: slow clients can use up the pipes, and must not hold up the others.

Invariant: `done` is called exactly once for every `start`. If the peer breaks off, everything that came from it has been
delivered before: piece.taken bytes are at the client, in order, and not one more.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
from collections.abc import Callable
from typing import Final, Protocol

from koscache.carrier import StreamPiece
from kosproxy.relay import Done, RelayFailed

#: One fill. A pipe has a slot for each page, so it holds as much only where pages come whole; see bench/peer_get.
WINDOW_BYTES: Final = 1024 * 1024
#: What one connection may move before the loop looks after the others.
TURN_BYTES: Final = 4 * 1024 * 1024
#: Pipes of a worker. What is in them is the kernel's memory: 32 MiB at most. An unprivileged user has 64 MiB for all of
#: his pipes (/proc/sys/fs/pipe-user-pages-soft); beyond that they stay small, which costs wake-ups and nothing else.
PIPES_MAX: Final = 32
#: One copy, where there is no pipe.
_COPY_BYTES: Final = 64 * 1024
#: As much of a body that is sure to come soon is waited for before it is taken: each wake-up costs as much as 50 KiB.
_EXPECTED_BYTES: Final = 256 * 1024

_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Vessel(Protocol):
    """What bytes are carried in. held: how many are in it."""

    held: int

    def fill(self, source: int, count: int) -> int:
        """Takes at most count bytes; 0 at the end. BlockingIOError: nothing is there. Only when it is empty."""

    def pour(self, target: int) -> int:
        """Hands on what the target takes of what is held. BlockingIOError: nothing."""

    def close(self) -> None: ...


class Pipe:
    __slots__ = ("_in", "_out", "held")

    def __init__(self) -> None:
        self._out, self._in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held = 0
        with contextlib.suppress(OSError):  # more than this user may have: it works with less
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, WINDOW_BYTES)

    def fill(self, source: int, count: int) -> int:
        self.held = os.splice(source, self._in, count, flags=_FLAGS)
        return self.held

    def pour(self, target: int) -> int:
        count = os.splice(self._out, target, self.held, flags=_FLAGS)
        self.held -= count
        return count

    def close(self) -> None:
        os.close(self._in)
        os.close(self._out)


class Copy:
    """Does what a pipe does, in memory."""

    __slots__ = ("_left", "held")

    def __init__(self) -> None:
        self._left = memoryview(b"")
        self.held = 0

    def fill(self, source: int, count: int) -> int:
        self._left = memoryview(os.read(source, min(count, _COPY_BYTES)))
        self.held = len(self._left)
        return self.held

    def pour(self, target: int) -> int:
        count = os.write(target, self._left)
        self._left = self._left[count:]
        self.held -= count
        return count

    def close(self) -> None:
        """Nothing to close."""


class Pipes:
    """The pipes of a worker: made when needed, at most `most`, kept empty."""

    def __init__(self, most: int = PIPES_MAX) -> None:
        self._left = most
        self._free: list[Pipe] = []
        self._closed = False

    def take(self) -> Vessel:
        """An empty one."""
        if self._free:
            return self._free.pop()
        if self._left > 0:
            with contextlib.suppress(OSError):  # no descriptor left: there are none for clients either
                pipe = Pipe()
                self._left -= 1
                return pipe
        return Copy()

    def give(self, vessel: Vessel) -> None:
        """Done with it. What it still holds is lost with it."""
        if not isinstance(vessel, Pipe):
            return
        if vessel.held or self._closed:
            vessel.close()
            self._left += 1
        else:
            self._free.append(vessel)

    def close(self) -> None:
        """Closes all, those in use when they are given back."""
        self._closed = True
        for pipe in self._free:
            pipe.close()
        self._left += len(self._free)
        self._free.clear()


class Splicer:
    """Sends one StreamPiece at a time on one connection. Not to be used while the transport holds unsent bytes, or while
    the relay sends."""

    __slots__ = (
        "_closed",
        "_done",
        "_early_left",
        "_front",
        "_has_left",
        "_heard_at",
        "_leaving",
        "_loop",
        "_piece",
        "_pipes",
        "_socket",
        "_soon",
        "_timer",
        "_to_come",
        "_vessel",
        "_watching",
        "busy",
        "head_left",
        "moved_at",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, client: socket.socket, pipes: Pipes) -> None:
        """client: a socket that no transport watches; it stays its owner's, who closes this one first."""
        self._loop = loop
        self._socket = client
        self._pipes = pipes
        self._piece: StreamPiece | None = None
        self._front: list[memoryview] = []  # in memory: what is left of the head, and of what came with the peer's
        self._early_left = 0
        self._to_come = 0  # bytes that the peer's socket still owes
        self._vessel: Vessel | None = None
        self._done: Done | None = None
        self._leaving: Callable[[], None] = _nothing
        self._has_left = False
        self._watching = False
        self._soon: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard_at = 0.0
        self._closed = False
        self.busy = False
        #: of the head: what is not sent yet. All of it until the peer's first byte is here.
        self.head_left = 0
        #: loop time of the last byte that the client took
        self.moved_at = 0.0

    def silent_s(self, now: float) -> float:
        """For how long the client has taken nothing of what is here for it. now: loop time."""
        return now - self.moved_at if self._watching else 0.0

    def start(self, head: bytes, piece: StreamPiece, done: Done, leaving: Callable[[], None]) -> None:
        """Send head, then the piece, then call done(None); done(reason) when the client is gone. done may be called at once.
        leaving: called before, when the first byte has left.

        When the peer breaks off that is done(None) with piece.failure set; then head_left says whether the head has left.
        """
        assert not self.busy, "one piece at a time"
        if self._closed:
            done(RelayFailed("the connection is closed"))
            return
        stream = piece.stream
        self.busy = True
        self._piece = piece
        self._done = done
        self._leaving = leaving
        self._has_left = False
        self.head_left = len(head)
        early = stream.early(piece.length)
        self._front = [part for part in (memoryview(head), early) if part]
        self._early_left = len(early)
        self._to_come = piece.length - len(early)
        self._heard_at = self.moved_at = self._loop.time()
        self._timer = self._loop.call_later(stream.timeout_s, self._look)
        self._turn()

    async def send(self, head: bytes, piece: StreamPiece, leaving: Callable[[], None]) -> None:
        """start() for a coroutine."""
        waiter: asyncio.Future[None] = self._loop.create_future()

        def done(failure: BaseException | None) -> None:
            if waiter.done():
                return
            if failure is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(failure)

        self.start(head, piece, done, leaving)
        try:
            await waiter
        except asyncio.CancelledError:
            self.abort(RelayFailed("cancelled"))
            raise

    def abort(self, reason: BaseException) -> None:
        """Stop; done(reason) follows at once."""
        if self.busy:
            self._finish(reason)

    def close(self) -> None:
        """The connection is lost."""
        self._closed = True
        self.abort(RelayFailed("the client is gone"))

    # --- the way of the bytes ---------------------------------------------------------------------------------------

    def _turn(self) -> None:
        if not self.busy:
            return  # called soon, or by a stream that was closed, and meanwhile it is over
        self._soon = None
        piece = self._piece
        assert piece is not None
        try:
            finished = self._move(piece)
        except OSError as gone:
            self._finish(RelayFailed(gone.strerror or str(gone)))
            return
        if finished:
            self._finish(None)

    def _move(self, piece: StreamPiece) -> bool:
        """Move what can be moved. True: all is delivered, or no more will come; False: something is waited for. Raises
        OSError when the client is gone."""
        budget = TURN_BYTES
        while True:
            count, held = 0, 0 if self._vessel is None else self._vessel.held
            if self._to_come and not held:
                if budget <= 0:
                    return self._await_nobody(piece)
                count = held = self._fill(piece)
                budget -= count
            # The head does not leave alone: as long as no byte is here it may still be told that there will be none.
            if (held or self._early_left) and not self._send_front(piece, more=held > 0):
                return self._await_client(piece)
            if held and not self._pour(piece):
                return self._await_client(piece)
            if not self._to_come:
                return True
            if not count and not held:
                return self._await_peer(piece)

    def _send_front(self, piece: StreamPiece, *, more: bool) -> bool:
        """Send what is in memory, all of it (True). more: something follows at once."""
        front = self._front
        while front:
            try:
                taken = self._socket.sendmsg(front, (), socket.MSG_MORE if more else 0)
            except BlockingIOError:
                return False
            of_head = min(taken, self.head_left)
            self.head_left -= of_head
            self._early_left -= taken - of_head
            self._moved(piece, taken - of_head)
            while taken:
                part = front[0][taken:]
                taken -= len(front[0]) - len(part)
                front[:1] = [part] if part else []
        return True

    def _pour(self, piece: StreamPiece) -> bool:
        """Hand on what is in the vessel, all of it (True)."""
        vessel = self._vessel
        assert vessel is not None
        try:
            self._moved(piece, vessel.pour(self._socket.fileno()))
        except BlockingIOError:
            return False
        return vessel.held == 0

    def _moved(self, piece: StreamPiece, count: int) -> None:
        if not self._has_left:
            self._has_left = True
            self._leaving()
        piece.taken += count
        self.moved_at = self._loop.time()

    def _fill(self, piece: StreamPiece) -> int:
        """Take what the peer has sent: so many bytes. 0: nothing is there; if it will not come, that is all there is."""
        if self._vessel is None:
            self._vessel = self._pipes.take()
        stream = piece.stream
        try:
            count = self._vessel.fill(stream.socket.fileno(), min(self._to_come, WINDOW_BYTES))
        except BlockingIOError:
            return 0
        except OSError as error:
            self._peer_failed(piece, error.strerror or str(error))
            return 0
        if not count:
            self._peer_failed(piece, "closed the connection")
            return 0
        stream.took(count)
        self._to_come -= count
        self._heard_at = self._loop.time()
        return count

    def _peer_failed(self, piece: StreamPiece, reason: str) -> None:
        piece.failure = piece.stream.broken(reason)
        self._to_come = 0

    # --- waiting ----------------------------------------------------------------------------------------------------

    def _await_peer(self, piece: StreamPiece) -> bool:
        self._ignore_client()
        self._put_vessel_back()
        piece.stream.expect(min(self._to_come, _EXPECTED_BYTES))
        piece.stream.watch(self._turn)
        return False

    def _await_client(self, piece: StreamPiece) -> bool:
        piece.stream.watch(None)
        if not self._watching:
            self._watching = True
            self.moved_at = self._loop.time()  # its silence begins now, whatever the peer's was
            self._loop.add_writer(self._socket.fileno(), self._turn)
        return False

    def _await_nobody(self, piece: StreamPiece) -> bool:
        piece.stream.watch(None)
        self._ignore_client()
        if self._soon is None:
            self._soon = self._loop.call_soon(self._turn)
        return False

    def _ignore_client(self) -> None:
        if self._watching:
            self._watching = False
            self._loop.remove_writer(self._socket.fileno())

    def _put_vessel_back(self) -> None:
        vessel, self._vessel = self._vessel, None
        if vessel is not None:
            self._pipes.give(vessel)

    def _look(self) -> None:
        """One timer for the whole piece, moved on when it rings. While the client is waited for, the peer's silence is none:
        nothing is taken from it."""
        piece = self._piece
        assert piece is not None
        now, timeout_s = self._loop.time(), piece.stream.timeout_s
        due_at = (now if self._watching else max(self._heard_at, self.moved_at)) + timeout_s
        if due_at <= now:
            self._peer_failed(piece, f"nothing for {timeout_s:g} s")
            self._finish(None)
        else:
            self._timer = self._loop.call_at(due_at, self._look)

    def _finish(self, failure: BaseException | None) -> None:
        piece, self._piece = self._piece, None
        assert piece is not None
        self.busy = False
        piece.stream.watch(None)
        piece.stream.expect(1)  # whoever takes what follows may want less
        self._ignore_client()
        self._put_vessel_back()
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._front = []
        self._early_left = 0
        done, self._done, self._leaving = self._done, None, _nothing
        assert done is not None
        done(failure)


def _nothing() -> None:
    """Nobody wants to know."""
