"""Who brings a block: the table of blocks that are on their way into the store, as this worker knows it.

Owns: one entry for each block that this worker asked the daemon about, leads or follows; what the daemon says of them.
Does not own: the bytes' way (fill), reading them (body), the decision (koscache.leases).

Invariant: for one block this worker has at most one question open and at most one Growing; all its readers share it. An
entry leaves when the block is in the index or the fill has failed, so that a reader who looks at the index first and here
second finds one of the two.
"""

from __future__ import annotations

import asyncio
from typing import Any

from kos import metrics
from kos.tasks import TasksClosed
from koscache import ipc
from koscache.carrier.context import Context
from koscache.carrier.fetch import OnRequest
from koscache.carrier.fill import Fill
from koscache.carrier.follow import Growing
from koscache.carrier.ticket import Ticket
from koscache.content import Extent, Location, Record, block_length
from koscache.ipc import BlockOutcome, PassReason
from koscache.leases import NO_LEASE

BlockKey = tuple[bytes, int]
#: What answers a question: the block's place (None: look again), a fill to read behind, or why not.
Source = Growing | PassReason | None


class Blocks:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._growing: dict[BlockKey, Growing] = {}
        self._asking: dict[BlockKey, asyncio.Future[Source]] = {}
        self._verifying: dict[BlockKey, asyncio.Future[bool]] = {}
        self._fills: dict[int, Fill] = {}
        self._followed: dict[int, tuple[BlockKey, Growing]] = {}

    @property
    def fills(self) -> int:
        return len(self._fills)

    def here(self, record: Record, number: int) -> Location | None:
        """The block's place in the store, when its bytes can be relied on."""
        location = self._context.reader.locate(record.content, number)
        if location is None or not location.verified:
            return None
        length = block_length(record.size, number, self._context.cache.block_bytes)
        return location if location.length == length else None

    def unverified(self, record: Record, number: int) -> bool:
        """Whether the store has it, but nobody has looked at its bytes since recovery."""
        location = self._context.reader.locate(record.content, number)
        return location is not None and not location.verified

    def growing(self, record: Record, number: int) -> Growing | None:
        return self._growing.get((record.content, number))

    def ask(
        self, bucket: str, key: str, record: Record, number: int, *, touch: bool, on_request: OnRequest,
        ahead: bool = False,
        ticket: Ticket | None = None,
        direct: bool = False,
        only: str | None = None,
    ) -> asyncio.Future[Source]:  # fmt: skip
        """Asks the daemon who brings the block, once for all readers of this worker.

        ticket: an answer of the origin whose body begins with the block; used if this worker is to lead, closed if the
        block comes another way, left in the ticket if it is to be passed through. Await the future shielded: it belongs
        to all who ask. ahead: nobody waits for it yet. direct, only: where this worker gets it from, if it is to lead.

        Nothing is asked twice: not while a question is open, nor while the block is growing.
        """
        at = (record.content, number)
        asked = self._asking.get(at)
        growing = self._growing.get(at)
        if asked is not None or growing is not None:
            if ticket is not None:
                ticket.close()
            if asked is not None:
                return asked
            return _resolved(growing)
        future: asyncio.Future[Source] = asyncio.get_running_loop().create_future()
        self._asking[at] = future
        if ticket is not None:
            ticket.offered = True
        length = block_length(record.size, number, self._context.cache.block_bytes)
        to_origin = self._to_origin(bucket, key, record, number, ticket, direct, only)

        def reply(message: Any) -> None:
            del self._asking[at]
            source = self._answered(message, at, bucket, key, record, length, on_request, ticket, to_origin, only)
            if ticket is not None:
                ticket.settled(passed=isinstance(source, PassReason))
            if not future.done():
                future.set_result(source)

        content = record.content
        self._context.link.ask(
            lambda ask: ipc.AskBlock(
                ask, bucket, key, content, number, length, touch, ahead, record, to_origin, direct
            ),
            reply,
        )
        return future

    def _answered(
        self, message: Any, at: BlockKey, bucket: str, key: str, record: Record, length: int, on_request: OnRequest,
        ticket: Ticket | None, to_origin: bool, only: str | None,
    ) -> Source:  # fmt: skip
        if isinstance(message, ipc.BlockLead):
            return self._lead(
                message.lease, message.extent, at, bucket, key, record, length, on_request, ticket, to_origin, only
            )
        if isinstance(message, ipc.BlockFollow):
            growing = Growing(
                length, message.extent, local=False, watermark=message.watermark, to_origin=message.to_origin
            )
            self._growing[at] = growing
            self._followed[message.lease] = (at, growing)
            return growing
        if isinstance(message, ipc.BlockPass):
            return message.reason
        return None if isinstance(message, ipc.BlockHere) else PassReason.DAEMON_AWAY

    def _lead(
        self, lease: int, extent: Extent | None, at: BlockKey, bucket: str, key: str, record: Record, length: int,
        on_request: OnRequest, ticket: Ticket | None, to_origin: bool, only: str | None,
    ) -> Source:  # fmt: skip
        growing = Growing(length, extent, local=True, to_origin=to_origin)
        response = None if ticket is None else ticket.take()
        start = at[1] * self._context.cache.block_bytes
        fill = Fill(
            self._context, growing, lease, bucket, key, record, start, response, on_request, direct=to_origin, only=only
        )
        try:
            self._context.tasks.spawn(self._run(fill, at, growing), "fill")
        except TasksClosed:
            self._context.link.tell(ipc.BlockFailed(lease, BlockOutcome.LEADER_GAVE_UP))
            if response is not None:
                response.close()
            return PassReason.DAEMON_AWAY
        self._growing[at] = growing
        self._fills[lease] = fill
        return growing

    def _to_origin(
        self, bucket: str, key: str, record: Record, number: int, ticket: Ticket | None, direct: bool, only: str | None
    ) -> bool:
        """Whether the block comes from the origin. What the origin has begun to send, it sends to the end: who brings a block
        on behalf of another node may wait for such a fill, and so for no node."""
        if direct or only is not None:
            return direct
        if ticket is not None and ticket.of_origin:
            return True
        return not self._context.upstream.remote(bucket, key, record, number)

    async def _run(self, fill: Fill, at: BlockKey, growing: Growing) -> None:
        lease = fill.lease
        metrics.FILLS_IN_FLIGHT.inc()
        try:
            await fill.run()
        finally:
            metrics.FILLS_IN_FLIGHT.dec()
            if self._fills.get(lease) is fill:
                del self._fills[lease]
            if self._growing.get(at) is growing:
                del self._growing[at]

    def hold(self, record: Record, number: int, body: bytes) -> Growing | None:
        """A small block that is on its way to the daemon; whoever looks here meanwhile reads it. See let_go()."""
        at = (record.content, number)
        if at in self._growing or at in self._asking:
            return None
        growing = Growing(len(body), None, local=True)
        growing.body = body
        growing.advance(len(body))
        self._growing[at] = growing
        return growing

    def let_go(self, record: Record, number: int, growing: Growing | None, stored: bool) -> None:
        """The daemon has the small block, or could not keep it."""
        if growing is not None:
            growing.end(BlockOutcome.COMMITTED if stored else BlockOutcome.DISK_FAILED)
            if self._growing.get((record.content, number)) is growing:
                del self._growing[record.content, number]

    async def verify(self, record: Record, number: int) -> bool:
        """Has the daemon check a block that recovery kept. False: it is gone now, fill it anew (or the daemon is away)."""
        at = (record.content, number)
        asked = self._verifying.get(at)
        if asked is None:
            asked = self._verifying[at] = asyncio.get_running_loop().create_future()
            mine = asked

            def reply(message: Any) -> None:
                del self._verifying[at]
                if not mine.done():
                    mine.set_result(isinstance(message, ipc.Done) and message.ok)

            self._context.link.ask(lambda ask: ipc.AskVerify(ask, at[0], at[1]), reply)
        return await asyncio.shield(asked)

    # --- what the daemon says -------------------------------------------------------------------------------------

    def pushed(self, message: ipc.Message) -> None:
        if isinstance(message, ipc.Progress):
            followed = self._followed.get(message.lease)
            if followed is not None:
                followed[1].advance(message.watermark)
        elif isinstance(message, ipc.BlockEnded):
            self._ended(message.lease, message.outcome)
        elif isinstance(message, ipc.Followed):
            fill = self._fills.get(message.lease)
            if fill is not None:
                fill.follow()

    def _ended(self, lease: int, outcome: BlockOutcome) -> None:
        followed = self._followed.pop(lease, None)
        if followed is not None:
            at, growing = followed
            if self._growing.get(at) is growing:
                del self._growing[at]
            growing.end(outcome)

    def link_down(self) -> None:
        """Leases are held by connection: they are gone. Fills go on for those who read behind them in this worker."""
        for fill in self._fills.values():
            fill.lease = NO_LEASE
        self._fills.clear()
        for lease in list(self._followed):
            self._ended(lease, BlockOutcome.LEADER_DIED)


def _resolved(growing: Growing | None) -> asyncio.Future[Source]:
    future: asyncio.Future[Source] = asyncio.get_running_loop().create_future()
    future.set_result(growing)
    return future
