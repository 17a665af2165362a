"""Bytes of segment files onto a client's socket without passing through this process: sendfile with backpressure.

Owns: a duplicate of the connection's socket (the loop refuses to watch a descriptor that a transport watches), the order
head -> slices, waiting for a full socket, and the rule that nothing here blocks the loop: a window of a file that is not
in the page cache is sent from a thread. Does not own the borrowed descriptors of the slices (the caller gives them back
once it was told `done`), the transport, or what the bytes mean.

Invariant: `done` is called exactly once for every `start`, and not before the last use of the slices' descriptors: a
descriptor that were given back earlier could be another file's by the time a thread reads it.
"""

from __future__ import annotations

import abc
import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, Final, Protocol

#: One sendfile: large enough that the call costs nothing beside the copy, small enough that the residency of its two
#: ends says something about what is between them.
WINDOW_BYTES: Final = 1024 * 1024
#: What one connection may send before the loop looks after the others: about half a millisecond of copying.
TURN_BYTES: Final = 4 * 1024 * 1024

_FULL: Final = -1
_probe = bytearray(1)

Done = Callable[[BaseException | None], None]


class Slice(Protocol):
    """A piece of an open file; kos's carrier hands them out."""

    @property
    def fd(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...


class RelayFailed(ConnectionError):
    """The response could not be completed: the client is gone, or the file was shorter than the index says."""


def resident(fd: int, offset: int) -> bool:
    """Whether the byte at offset can be read without waiting for the disk.

    True at and after the end of the file as well (sendfile then sees the end by itself); False where the file system
    cannot say, because a thread is slow but a blocked loop stops everybody.
    """
    try:
        os.preadv(fd, (_probe,), offset, os.RWF_NOWAIT)
    except OSError:
        return False
    return True


def failure_of(thread: asyncio.Future[Any], aborted: BaseException | None) -> BaseException | None:
    """Why a response ends with this thread of it; None: it goes on. aborted: why it was to end before.

    What the thread raised is looked at in any case: else asyncio takes an aborted client's reset for an oversight.
    """
    if thread.cancelled():
        return aborted or RelayFailed("the worker is shutting down")
    error = thread.exception()
    return aborted or (None if error is None else RelayFailed(str(error)))


class Sender(abc.ABC):
    """What Relay and kosproxy.copying.Copier have in common."""

    __slots__ = ()
    _loop: asyncio.AbstractEventLoop

    @property
    @abc.abstractmethod
    def running(self) -> asyncio.Future[Any] | None:
        """The thread that reads a slice at this moment."""

    @abc.abstractmethod
    def start(self, head: bytes, slices: Sequence[Slice], done: Done) -> None: ...

    @abc.abstractmethod
    def abort(self, reason: BaseException) -> None: ...

    async def send(self, head: bytes, slices: Sequence[Slice]) -> None:
        """start() for a coroutine. Returns or raises only when no thread uses the slices any more."""
        waiter: asyncio.Future[None] = self._loop.create_future()

        def done(failure: BaseException | None) -> None:
            if waiter.done():
                return
            if failure is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(failure)

        self.start(head, slices, done)
        try:
            await waiter
        except asyncio.CancelledError:
            self.abort(RelayFailed("cancelled"))
            while (thread := self.running) is not None:
                # The thread reads at most one window: the cancellation is late, not lost.
                try:
                    await asyncio.wait((thread,))
                except asyncio.CancelledError:
                    continue
            raise


class Relay(Sender):
    """Sends one response at a time on one connection. Not to be used while the transport itself holds unsent bytes."""

    __slots__ = (
        "_closed",
        "_done",
        "_executor",
        "_failure",
        "_head",
        "_index",
        "_loop",
        "_position",
        "_slices",
        "_thread",
        "_watching",
        "busy",
        "moved_at",
        "sent_bytes",
        "socket",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: socket.socket, executor: Executor) -> None:
        """connection: the transport's socket, duplicated here; executor: for reads that wait for the disk."""
        self._loop = loop
        self._executor = executor
        #: the duplicate; whoever else watches it (kosproxy.splicing) is closed before this relay
        self.socket = socket.socket(
            connection.family, connection.type, connection.proto, fileno=os.dup(connection.fileno())
        )
        self._head: bytes | memoryview = b""
        self._slices: Sequence[Slice] = ()
        self._index = 0
        self._position = 0
        self._done: Done | None = None
        self._failure: BaseException | None = None
        self._thread: asyncio.Future[int] | None = None
        self._watching = False
        self._closed = False
        self.busy = False
        #: bytes that went out for the present response, head included
        self.sent_bytes = 0
        #: loop time of the last byte that the client took
        self.moved_at = 0.0

    @property
    def running(self) -> asyncio.Future[int] | None:
        return self._thread

    def silent_s(self, now: float) -> float:
        """For how long the client has taken nothing of what it is being sent. now: loop time."""
        return now - self.moved_at if self.busy else 0.0

    def start(self, head: bytes, slices: Sequence[Slice], done: Done) -> None:
        """Send head, then slices, then call done(None); done(reason) when that failed. done may be called at once."""
        assert not self.busy, "one response at a time"
        if self._closed:
            done(RelayFailed("the connection is closed"))
            return
        self.busy = True
        self._head = head
        self._slices = slices
        self._index = self._position = self.sent_bytes = 0
        self._done = done
        self._failure = None
        self.moved_at = self._loop.time()
        self._turn()

    def abort(self, reason: BaseException) -> None:
        """Stop sending; done(reason) follows at once, or as soon as a running thread has let go of its slice."""
        if not self.busy:
            return
        self._failure = reason
        if self._thread is None:
            self._finish(reason)

    def close(self) -> None:
        """The connection is lost: abort what is being sent and close the duplicate socket."""
        self._closed = True
        if self.busy:
            self.abort(RelayFailed("the client is gone"))
        if not self.busy:
            self.socket.close()

    def _turn(self) -> None:
        try:
            finished = self._send_some()
        except BlockingIOError:
            finished = False
        except OSError as failure:
            self._finish(RelayFailed(str(failure)))
            return
        if finished:
            self._finish(None)
        elif self._thread is None and not self._watching:
            self._watching = True
            self._loop.add_writer(self.socket.fileno(), self._turn)

    def _send_some(self) -> bool:
        """Send until all is sent (True), the socket is full, the turn is over or a thread was started (False)."""
        out = self.socket
        if self._head:
            taken = out.send(self._head, socket.MSG_MORE if self._slices else 0)
            self._moved(taken)
            if taken < len(self._head):
                self._head = memoryview(self._head)[taken:]
                return False
            self._head = b""
        slices = self._slices
        out_fd = out.fileno()
        budget = TURN_BYTES
        while self._index < len(slices):
            piece = slices[self._index]
            offset, left = piece.offset + self._position, piece.length - self._position
            if left == 0:
                self._index += 1
                self._position = 0
                continue
            if budget <= 0:
                return False
            count = min(left, WINDOW_BYTES)
            if not (resident(piece.fd, offset) and resident(piece.fd, offset + count - 1)):
                self._send_from_thread(out_fd, piece.fd, offset, count)
                return False
            taken = os.sendfile(out_fd, piece.fd, offset, count)
            self._took(taken)
            budget -= taken
            if taken < count:
                return False
        return True

    def _moved(self, taken: int) -> None:
        self.sent_bytes += taken
        self.moved_at = self._loop.time()

    def _took(self, taken: int) -> None:
        if taken == 0:
            raise OSError("the segment file ended early")
        self._position += taken
        self._moved(taken)

    def _send_from_thread(self, out_fd: int, fd: int, offset: int, count: int) -> None:
        if self._watching:
            self._watching = False
            self._loop.remove_writer(out_fd)
        self._thread = self._loop.run_in_executor(self._executor, _send_waiting_for_disk, out_fd, fd, offset, count)
        self._thread.add_done_callback(self._thread_ended)

    def _thread_ended(self, thread: asyncio.Future[int]) -> None:
        self._thread = None
        failure = failure_of(thread, self._failure)
        if failure is None and (taken := thread.result()) != _FULL:
            try:
                self._took(taken)
            except OSError as torn:
                failure = RelayFailed(str(torn))
        if failure is not None:
            self._finish(failure)
        elif thread.result() == _FULL:
            self._watching = True
            self._loop.add_writer(self.socket.fileno(), self._turn)
        else:
            self._turn()

    def _finish(self, failure: BaseException | None) -> None:
        if self._watching:
            self._watching = False
            self._loop.remove_writer(self.socket.fileno())
        self.busy = False
        self._head = b""
        self._slices = ()
        done, self._done = self._done, None
        if self._closed:
            self.socket.close()
        assert done is not None
        done(failure)


def _send_waiting_for_disk(out_fd: int, fd: int, offset: int, count: int) -> int:
    """Runs in a thread: bytes sent, or _FULL. The advice lets the disk bring in the whole window at once."""
    os.posix_fadvise(fd, offset, count, os.POSIX_FADV_WILLNEED)
    try:
        return os.sendfile(out_fd, fd, offset, count)
    except BlockingIOError:
        return _FULL
