"""Where the bytes of a block land: buffers from the pool, hashed and written by a thread, never by the loop.

Owns: two buffers of one fill at most, the hash, the order of writes. Does not own: the extent, retries, the lease.

Invariant: `written` bytes from the extent's start are in the file, and the hash is of exactly these; one write of a fill
is in work at any time. When the disk is slower than the origin, reading pauses: nothing piles up.

    socket ──recv_into──▶ buffer A (filling) │ buffer B (being hashed and written) ──▶ watermark moves
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable
from typing import Any

from xxhash import xxh3_64

from kos import metrics
from koscache.carrier.context import BufferPool, Context

#: A part of a buffer is written when the last write is so long ago: readers behind a slow origin do not wait for a full one.
_IDLE_S = 0.02
_IDLE_BYTES = 4096


class FileSink:
    """A kos.origin.sink.BodySink over one extent. fd: writable. offset: of the extent in the file. length: of the block.
    source: as of kos_bytes_total, of what comes now; None: who sends it counts."""

    def __init__(self, context: Context, fd: int, offset: int, length: int, moved: Callable[[int], None]) -> None:
        self._pool: BufferPool = context.buffers
        self._pools = context.buffers, context.peer_buffers
        self._threads = context.threads
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._offset = offset
        self._length = length
        self._moved = moved
        self._hash: Any = xxh3_64()
        self._filling: bytearray | None = None
        self._view = memoryview(b"")
        self._filled = 0
        self._spare: bytearray | None = None
        self._writing = False
        self._last_write = -math.inf  # the first bytes go at once: a reader may wait for them
        self._idle: asyncio.Future[None] | None = None
        self._paused = False
        self._resume: Callable[[], None] | None = None
        self._stop: Callable[[], None] | None = None
        self.received_bytes = 0
        self.written = 0
        self.error: OSError | None = None
        self.source: str | None = "origin"

    async def attach(self, resume: Callable[[], None], stop: Callable[[], None], *, peer: bool) -> None:
        """Makes room for the answer that will be read next. resume: go on reading; stop: give it up, the disk failed. peer: it is
        another node's, not the origin's.

        Buffers are waited for by who has a connection, and given back before the next connection is waited for: so those
        who hold buffers can always end, and those who wait for one will get it. What another node sends it may still be bringing
        itself, from the origin, and needs buffers there: so those of the two kinds never wait for each other, or all nodes would.
        """
        self._resume = resume
        self._stop = stop
        self._paused = False
        if self._filling is None:
            self._pool = self._pools[peer]
            self._fill_into(await self._pool.take())

    # --- BodySink -------------------------------------------------------------------------------------------------

    def get_buffer(self) -> memoryview:
        assert self._filling is not None, "read while paused"
        room = min(len(self._filling), self._filled + self._length - self.received_bytes)
        return self._view[self._filled : room]

    def received(self, count: int) -> bool:
        """count bytes are in the buffer. False: stop reading until resume."""
        assert self._filling is not None
        if self.error is not None:
            return True  # what still comes of an answer that is being given up
        self._filled += count
        self.received_bytes += count
        full = self._filled == len(self._filling) or self.received_bytes == self._length
        if not self._writing and (full or self._filled >= _IDLE_BYTES):
            now = self._loop.time()
            if full or now - self._last_write >= _IDLE_S:
                self._last_write = now
                self._write()
                full = False
        # With everything received there is nothing to hold back, and nothing that a resume would be told for.
        self._paused = (full or self._filling is None) and self.received_bytes < self._length
        return not self._paused

    # --- writing --------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        buffer, count = self._filling, self._filled
        assert buffer is not None
        assert not self._writing
        at = self._offset + self.written
        # Not run_in_executor: the futures that it chains cost the loop as much as the write costs the thread.
        self._threads.submit(_write_and_tell, self._hash, self._fd, buffer, count, at, self._loop, self._wrote)
        self._writing = True
        self._spare, spare = None, self._spare
        self._fill_into(spare or (self._pool.take_now() if self.received_bytes < self._length else None))

    def _fill_into(self, buffer: bytearray | None) -> None:
        self._view.release()
        self._filling = buffer
        self._filled = 0
        if buffer is not None:
            self._view = memoryview(buffer)

    def _wrote(self, buffer: bytearray, count: int, error: Exception | None) -> None:
        self._writing = False
        if error is not None:
            self.error = error if isinstance(error, OSError) else OSError(str(error))
            self._filled = 0
            if self._filling is None:
                self._fill_into(buffer)
            else:
                self._pool.give(buffer)
            self._rest()
            if self._stop is not None and self._resume is not None:
                self._stop()
                self._resume()  # whoever delivers into this sink must not wait for ever
            return
        self.written += count
        if self.source is not None:
            metrics.BYTE_COUNTS.add((self.source,), count)
        if self._filling is None:
            self._fill_into(buffer)
        else:
            self._spare = buffer
            if self._filled and (self._filled == len(self._filling) or self.received_bytes == self._length):
                self._write()
        self._moved(self.written)
        if not self._writing:
            self._rest()
        if self._paused and self._resume is not None and self._filling is not None and self._filled == 0:
            self._paused = False
            self._resume()

    def _rest(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def flush(self) -> None:
        """Writes what was received; afterwards written == received_bytes. Raises OSError."""
        while self.error is None and (self._writing or self._filled):
            if not self._writing:
                self._write()
            await self.rest()
        if self.error is not None:
            raise self.error

    async def rest(self) -> None:
        """Waits until no thread works for this sink (the descriptor may then be closed)."""
        if self._writing:
            self._idle = self._loop.create_future()
            await asyncio.shield(self._idle)

    def checksum(self) -> int:
        return int(self._hash.intdigest())

    def release(self) -> None:
        """After rest() or flush(): the buffers go back to the pool."""
        assert not self._writing, "a thread still reads the buffer"
        self._view.release()
        for buffer in (self._filling, self._spare):
            if buffer is not None:
                self._pool.give(buffer)
        self._filling = self._spare = None
        self._filled = 0


def _write_and_tell(
    hasher: Any,
    fd: int,
    buffer: bytearray,
    count: int,
    offset: int,
    loop: asyncio.AbstractEventLoop,
    wrote: Callable[[bytearray, int, Exception | None], None],
) -> None:
    """In a thread; tells the loop how it went, in every case."""
    failure: Exception | None = None
    try:
        _hash_and_write(hasher, fd, buffer, count, offset)
    except Exception as error:
        failure = error
    loop.call_soon_threadsafe(wrote, buffer, count, failure)


def _hash_and_write(hasher: Any, fd: int, buffer: bytearray, count: int, offset: int) -> None:
    with memoryview(buffer)[:count] as view:
        hasher.update(view)
        written = os.pwrite(fd, view, offset)
        while written < count:  # a short write is legal, and usual just before ENOSPC
            written += os.pwrite(fd, view[written:], offset + written)
