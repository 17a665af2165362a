"""Bytes of segment files onto a connection through this process, where they have to be seen (TLS): the counterpart of
kosproxy.relay, with the same face.

Owns: the order head -> slices, reading from the page cache on the loop and from the disk on a thread, stopping as long
as the client does not take what it was given. Does not own the borrowed descriptors of the slices (the caller gives them
back once it was told `done`), the transport, or the clock of a client that takes nothing: what it has not taken is in
the transport, and the connection looks after that.

Invariant: as kosproxy.relay's: `done` is called exactly once for every `start`, and not before the last use of the
slices' descriptors. At most one piece is in memory, besides what of it the kernel has not taken.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Final, Protocol

from kosproxy.relay import WINDOW_BYTES, Done, RelayFailed, Sender, Slice, failure_of

#: Read, encrypted and sent at once. Of 16 to 256 KiB the cheapest: what is read is still in the core's own cache when
#: it is encrypted, and again when the kernel copies it.
PIECE_BYTES: Final = 64 * 1024
#: What one connection may send before the loop looks after the others: about half a millisecond of encrypting.
TURN_BYTES: Final = 1024 * 1024


class Outlet(Protocol):
    """What is used of a connection."""

    @property
    def transport(self) -> asyncio.Transport | None: ...
    @property
    def writing_paused(self) -> bool: ...


class Copier(Sender):
    """Sends one response at a time on one connection."""

    __slots__ = (
        "_buffer",
        "_closed",
        "_done",
        "_executor",
        "_failure",
        "_head",
        "_index",
        "_loop",
        "_outlet",
        "_position",
        "_slices",
        "_soon",
        "_thread",
        "busy",
        "sent_bytes",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, outlet: Outlet, executor: Executor, buffer: memoryview) -> None:
        """executor: for reads that wait for the disk. buffer: PIECE_BYTES, shared by all copiers of a loop."""
        self._loop = loop
        self._outlet: Outlet | None = outlet
        self._executor = executor
        self._buffer = buffer
        self._head = b""
        self._slices: Sequence[Slice] = ()
        self._index = 0
        self._position = 0
        self._done: Done | None = None
        self._failure: BaseException | None = None
        self._thread: asyncio.Future[bytes] | None = None
        self._soon: asyncio.Handle | None = None
        self._closed = False
        self.busy = False
        #: bytes that the transport was given for the present response, head included
        self.sent_bytes = 0

    @property
    def running(self) -> asyncio.Future[bytes] | None:
        return self._thread

    def start(self, head: bytes, slices: Sequence[Slice], done: Done) -> None:
        """Send head, then slices, then call done(None); done(reason) when that failed. done may be called at once; the
        transport may then still hold the last piece."""
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
        self._turn()

    def resume(self) -> None:
        """The client has taken all that it was given."""
        if self.busy and self._thread is None and self._soon is None:
            self._turn()

    def abort(self, reason: BaseException) -> None:
        """Stop sending; done(reason) follows at once, or as soon as a running thread has let go of its slice."""
        if not self.busy:
            return
        self._failure = reason
        if self._thread is None:
            self._finish(reason)

    def close(self) -> None:
        """The connection is lost: abort what is being sent."""
        self._closed = True
        self.abort(RelayFailed("the client is gone"))
        # It holds this copier: were it held in turn, both would stay until the collector comes to objects of their age.
        self._outlet = None

    def silent_s(self, now: float) -> float:
        """0: what the client does not take is in the transport, which the connection watches."""
        return 0.0

    def _turn(self) -> None:
        self._soon = None
        try:
            finished = self._send_some()
        except OSError as failure:
            self._finish(RelayFailed(str(failure)))
            return
        if finished:
            self._finish(None)

    def _send_some(self) -> bool:
        """Send until all is sent (True), the client does not take it, the turn is over or a thread reads (False)."""
        budget = TURN_BYTES
        buffer, slices = self._buffer, self._slices
        while self._index < len(slices):
            if self._outlet is None or self._outlet.writing_paused:
                return False
            piece = slices[self._index]
            left = piece.length - self._position
            if left == 0:
                self._index += 1
                self._position = 0
                continue
            if budget <= 0:
                self._soon = self._loop.call_soon(self._turn)
                return False
            # The head travels in the first piece, in the same records.
            start = len(self._head) if len(self._head) <= PIECE_BYTES // 2 else 0
            count = min(left, PIECE_BYTES - start)
            try:
                taken = os.preadv(
                    piece.fd, (buffer[start : start + count],), piece.offset + self._position, os.RWF_NOWAIT
                )
            except OSError:
                # Not in the page cache, or a file system that cannot say.
                self._read_in_thread(piece, count)
                return False
            if taken == 0:
                raise OSError("the segment file ended early")
            if start:
                buffer[:start] = self._head
                self._head = b""
            self._position += taken
            self._write(buffer[: start + taken])
            budget -= taken
        if self._head:
            self._write(b"")
        return True

    def _write(self, data: bytes | memoryview) -> None:
        transport = None if self._outlet is None else self._outlet.transport
        if transport is None or transport.is_closing():
            raise OSError("the client is gone")
        head, self._head = self._head, b""
        for part in (head, data):
            if part:
                transport.write(part)
                self.sent_bytes += len(part)

    def _read_in_thread(self, piece: Slice, count: int) -> None:
        at = piece.offset + self._position
        ahead = min(WINDOW_BYTES, piece.length - self._position)
        self._thread = self._loop.run_in_executor(self._executor, _read_waiting_for_disk, piece.fd, at, count, ahead)
        self._thread.add_done_callback(self._thread_ended)

    def _thread_ended(self, thread: asyncio.Future[bytes]) -> None:
        self._thread = None
        failure = failure_of(thread, self._failure)
        if failure is None and not thread.result():
            failure = RelayFailed("the segment file ended early")
        if failure is None:
            data = thread.result()
            self._position += len(data)
            try:
                self._write(data)
            except OSError as gone:
                failure = RelayFailed(str(gone))
        if failure is not None:
            self._finish(failure)
        else:
            self._turn()

    def _finish(self, failure: BaseException | None) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        self.busy = False
        self._head = b""
        self._slices = ()
        done, self._done = self._done, None
        assert done is not None
        done(failure)


def _read_waiting_for_disk(fd: int, offset: int, count: int, ahead: int) -> bytes:
    """Runs in a thread. The advice lets the disk bring in what comes next as well, so that the loop finds it there."""
    os.posix_fadvise(fd, offset, ahead, os.POSIX_FADV_WILLNEED)
    return os.pread(fd, count, offset)
