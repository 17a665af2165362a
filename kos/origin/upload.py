"""The body of a request to the origin, when it comes in pieces.

Owns: the promise about length and the last byte, and how long sending and the answer may take. Does not own: who sends
(aiohttp's writer, through `__aiter__`).

Invariant: the origin holds a whole body only if the pieces ended without an error and were as long as announced.
The last byte is therefore kept back until the iterator has ended, which is where a client's hash, checksum and length
are verified; an origin that waits for one more byte cannot make an object:

    piece, piece, last piece without its last byte → sent · iterator ends well → last byte · raises → connection closed
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable

from kos.errors import S3Error

Piece = bytes | bytearray | memoryview


class UploadBroken(Exception):
    """Tells aiohttp's writer to give up; the cause is in Upload.error."""


class Upload:
    """An async iterable for aiohttp over somebody's pieces.

    length: bytes announced, more than 0; S3Error IncompleteBody if that is not what comes. Pieces must not change after
    they were given. watch("source" | "sink" | "end") is called when the next piece is being waited for, when one is
    being sent, and when the last byte was given out.
    """

    def __init__(self, pieces: AsyncIterable[Piece], length: int, watch: Callable[[str], None]) -> None:
        assert length > 0
        self._pieces = pieces
        self._length = length
        self._watch = watch
        self._stopped = False
        self.started = False
        self.finished = False
        self.error: BaseException | None = None

    def take_error(self) -> BaseException:
        """The error, to be raised. It is not kept: its frames hold this object, and would with it wait for the collector."""
        error, self.error = self.error, None
        assert error is not None
        try:
            return error
        finally:
            del error

    def stop(self) -> None:
        """The origin answered already: give out nothing more."""
        self._stopped = True

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._give()

    async def _give(self) -> AsyncIterator[Piece]:
        self.started = True
        given, kept = 0, b""
        try:
            self._watch("source")
            async for piece in self._pieces:
                if self._stopped:
                    raise UploadBroken("answered early")
                size = len(piece)
                if given + len(kept) + size > self._length:
                    raise S3Error("IncompleteBody", f"The body is longer than the {self._length} bytes announced.")
                if size == 0:
                    continue
                if given + size == self._length:
                    kept = bytes(piece[-1:])
                    piece = piece[:-1]
                    size -= 1
                if size:
                    given += size
                    self._watch("sink")
                    yield piece
                    self._watch("source")
            if given + len(kept) != self._length:
                told = given + len(kept)
                raise S3Error("IncompleteBody", f"The body ended after {told} of {self._length} bytes announced.")
        except (asyncio.CancelledError, GeneratorExit):
            raise  # the request ended, not the body
        except BaseException as error:
            if not self._stopped:
                self.error = error
            raise
        self.finished = True
        self._watch("end")
        yield kept


async def in_pieces(body: bytes | bytearray | memoryview, size: int) -> AsyncIterator[memoryview]:
    """A body that is all there, in pieces of at most `size` bytes."""
    view = memoryview(body)
    for start in range(0, len(view), size):
        yield view[start : start + size]


class Patience:
    """How long one attempt may take to its answer's head, as its body moves on.

    left_s: until the request's deadline. stall_s: how long the origin may take no byte of the body. answer_s: from the
    body's end to the answer. Waiting for the client's bytes is not the origin's fault, so only the deadline bounds it.
    """

    __slots__ = ("_allowed_s", "_deadline", "_loop", "_timeout")

    def __init__(self, left_s: float, stall_s: float, answer_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + left_s
        self._allowed_s = {"source": left_s, "sink": stall_s, "end": answer_s}
        self._timeout: asyncio.Timeout | None = None

    def timeout(self) -> asyncio.Timeout:
        """To be entered around sending; until the first piece is asked for, aiohttp's connect timeout is enough."""
        self._timeout = asyncio.timeout_at(self._deadline)
        return self._timeout

    def watch(self, phase: str) -> None:
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(min(self._deadline, self._loop.time() + self._allowed_s[phase]))

    def end(self) -> None:
        self._timeout = None
