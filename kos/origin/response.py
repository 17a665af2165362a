"""The origin's answer to one request, its head read and its body still on the way.

Owns: the ways to take the body (whole and bounded, in pieces, straight into a sink), and giving the connection back.
Does not own: the request (kos.origin.lane), the buffered receive (kos.origin.sink).

Invariant: after the `async with` the connection is in the pool (body taken whole) or closed (anything else).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import TracebackType

from aiohttp import ClientError, ClientResponse
from multidict import CIMultiDictProxy

from kos.errors import OriginBroken
from kos.origin.sink import BodySink, Delivery, announced_length


class OriginResponse:
    """status and headers are there; take the body by one of read, pieces, into. An async context manager.

    content_length: of the header, so of a HEAD's object too; None if there is none. attempts: how often it was asked
    for; what became of a write's earlier attempts may be unknown.
    """

    __slots__ = (
        "_delivery",
        "_has_body",
        "_on_broken",
        "_read_timeout_s",
        "_response",
        "attempts",
        "content_length",
        "headers",
        "status",
    )

    def __init__(
        self, response: ClientResponse, *, has_body: bool, read_timeout_s: float, on_broken: Callable[[str], None]
    ) -> None:
        self._response = response
        self._has_body = has_body
        self._read_timeout_s = read_timeout_s
        self._on_broken = on_broken
        self._delivery: Delivery | None = None
        self.attempts = 1
        self.status = response.status
        self.headers: CIMultiDictProxy[str] = response.headers
        self.content_length = response.content_length

    @property
    def raw_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """As they came, repeated ones and their order kept."""
        return self._response.raw_headers

    async def read(self, limit: int) -> bytes:
        """The whole body, of at most `limit` bytes; OriginBroken if it is longer, breaks off, or stands still."""
        if self._has_body and (self.content_length or 0) > limit:
            raise self._too_long(limit)
        pieces, size = [], 0
        stream = self._response.content
        try:
            while piece := await stream.readany():
                size += len(piece)
                if size > limit:
                    raise self._too_long(limit)
                pieces.append(piece)
        except (ClientError, TimeoutError) as error:
            self.close()
            raise self._broken(f"{error or 'nothing from the origin'} (after {size} bytes)") from error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _too_long(self, limit: int) -> OriginBroken:
        self.close()
        return self._broken(f"the origin's answer is longer than {limit} bytes")

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body in the pieces in which it comes; the origin is held back while nobody asks. OriginBroken as read."""
        received = 0
        try:
            while data := await self._response.content.readany():
                received += len(data)
                yield data
        except (ClientError, TimeoutError) as error:
            self.close()
            raise self._broken(f"{error or 'nothing from the origin'} (after {received} bytes)") from error

    async def into(self, sink: BodySink, length: int) -> None:
        """Put the first `length` bytes of the body into the sink, received right there.

        With the whole body taken the connection is kept for the next request, with less it is closed. OriginBroken says
        how many bytes came if they are not all; whatever the sink raises comes out as it is.
        """
        announced = announced_length(self._response) if self._has_body else 0
        if announced is not None and announced < length:
            self.close()
            raise self._broken(f"the origin announced {announced} bytes where {length} were wanted")
        self._delivery = Delivery(self._response, sink, length, self._read_timeout_s)
        try:
            await self._delivery.run()
        except OriginBroken as error:
            self._on_broken(error.reason)
            raise

    def resume(self) -> None:
        """The sink, which had returned False, has room again."""
        if self._delivery is not None:
            self._delivery.resume()

    def release(self) -> None:
        """Done with it: keeps the connection if the body was taken whole (or there is none), else closes it."""
        if self._response.content.is_eof():
            self._response.release()
        else:
            self._response.close()

    def close(self) -> None:
        """Close the connection, whatever is still on the way."""
        self._response.close()

    def _broken(self, reason: str) -> OriginBroken:
        self._on_broken(reason)
        return OriginBroken(reason)

    async def __aenter__(self) -> OriginResponse:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
