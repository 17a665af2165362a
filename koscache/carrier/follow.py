"""A block whose bytes are arriving, and reading behind them.

Owns: Growing, the watermark that one writer moves and any number of readers wait on. Does not own: who fills (fill), or
what a reader does when a fill ends badly (body).

Invariant: bytes below the watermark are in the file (or in `body`) and stay right; outcome is set once, and after it the
watermark never moves.
"""

from __future__ import annotations

import asyncio

from koscache.content import Extent
from koscache.ipc import BlockOutcome, Refusal


class Growing:
    """One block being filled, by this worker (local) or another one. to_origin: by asking the origin, not another node.

    extent: where; None for a small block, whose bytes are in `body` once they are all here. refusal, retry_after_s: what
    the origin said, when outcome is REFUSED or UNAVAILABLE and this worker asked it.
    """

    __slots__ = (
        "_waiting",
        "body",
        "extent",
        "length",
        "local",
        "outcome",
        "refusal",
        "retry_after_s",
        "to_origin",
        "watermark",
    )

    def __init__(
        self, length: int, extent: Extent | None, *, local: bool, watermark: int = 0, to_origin: bool = True
    ) -> None:
        self.to_origin = to_origin
        self.length = length
        self.extent = extent
        self.local = local
        self.watermark = watermark
        self.body: bytes | None = None
        self.outcome: BlockOutcome | None = None
        self.refusal: Refusal | None = None
        self.retry_after_s = 0.0
        self._waiting: list[asyncio.Future[None]] = []

    def advance(self, watermark: int) -> None:
        if self.outcome is None and watermark > self.watermark:
            self.watermark = min(watermark, self.length)
            self._wake()

    def end(self, outcome: BlockOutcome) -> None:
        if self.outcome is not None:
            return
        if outcome is BlockOutcome.COMMITTED and (self.extent is not None or self.body is not None):
            self.watermark = self.length
        self.outcome = outcome
        self._wake()

    async def past(self, position: int) -> bool:
        """Waits until there are bytes past `position` (True), or the fill has ended without them (False).

        Bounded by the leader: its origin timeouts and retries here, the daemon's lease timeout and the link's watch for
        a leader in another worker.
        """
        while self.watermark <= position:
            if self.outcome is not None:
                return False
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future
        return True

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
