"""The origin's answer that opened an object, on its way to whoever uses its body.

Owns: that this answer is read by exactly one (a fill, or the client whose request it was) or closed. Does not own: the
answer's content.

Invariant: take() gives the answer out once; after close() nobody gets it and its connection is given back.

    made ──▶ the client's ──take──▶ read as a body
      └─offered─▶ a block was asked for: the daemon decides ──▶ lead: the fill takes it │ here, follow: closed
                                                             └─▶ pass: the client's (closed, if the client is gone)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from kos.origin.sink import BodySink


class Response(Protocol):
    """An answer with a body, of the origin or of another node."""

    status: int

    @property
    def content_length(self) -> int | None: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    async def read(self, limit: int) -> bytes: ...
    def pieces(self) -> AsyncIterator[bytes]: ...
    async def into(self, sink: BodySink, length: int) -> None: ...
    def resume(self) -> None: ...
    def release(self) -> None: ...
    def close(self) -> None: ...


class Ticket:
    """start, stop: the slice of the object that the answer's body is. of_origin: it is the origin's, not another node's."""

    __slots__ = ("_response", "of_origin", "offered", "start", "stop", "unwanted")

    def __init__(self, response: Response, start: int, stop: int, *, of_origin: bool = True) -> None:
        self._response: Response | None = response
        self.of_origin = of_origin
        self.start = start
        self.stop = stop
        #: a block was asked for that this answer may fill: whether it is the client's is decided by the daemon's answer
        self.offered = False
        #: the client went away
        self.unwanted = False

    def take(self) -> Response | None:
        """The answer, for the caller to read and close; None when another one has it or it is closed."""
        response, self._response = self._response, None
        return response

    def disown(self) -> None:
        """The client does not want it (any more); a fill may still take it."""
        self.unwanted = True
        if not self.offered:
            self.close()

    def settled(self, passed: bool) -> None:
        """The daemon has decided about the block. passed: it is not to be filled."""
        self.offered = False
        if not passed or self.unwanted:
            self.close()

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None
