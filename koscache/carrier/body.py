"""The bytes of an open object, in order, as pieces that are there already.

Owns: the walk over the blocks of [start, stop), looking ahead, and what a reader does when a block cannot be had the way it
should: it follows, takes over, passes through, or gives up. Does not own: fills (fill), leases (blocks, the daemon).

Invariant: all pieces are of the version that was opened, contiguous from start, and together never longer than stop - start;
they are shorter only if an exception says so.

For each block, the first that holds:
    the answer that opened the object has it, for this client alone ─▶ read that answer
    it is in the store                                              ─▶ a piece of the segment
    it is being filled, here or by another worker                   ─▶ pieces up to the watermark, as it moves
    another node keeps it, and it is not to be copied               ─▶ what that node sends, unseen
    nobody has it: ask the daemon                                   ─▶ lead (then it is being filled here, from another
                                                                       node or the origin), follow, or pass: a request
                                                                       for these bytes, uncached
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Final

from kos import metrics
from kos.errors import OriginBroken, OriginUnavailable
from kos.origin.response import OriginResponse
from koscache.carrier.blocks import Blocks
from koscache.carrier.context import Context
from koscache.carrier.fetch import fetch, refused, service_unavailable
from koscache.carrier.follow import Growing
from koscache.carrier.peers import PeerResponse
from koscache.carrier.ticket import Response
from koscache.carrier.types import BytesPiece, Changed, FilePiece, Opened, Piece
from koscache.content import Location
from koscache.ipc import BlockOutcome, PassReason
from koscache.reader import SegmentGone

#: How often a block is looked for again: its leader died, or it was evicted between the look and the reading.
_ATTEMPTS: Final = 4
#: Steps in a row without a byte, after which a body gives up.
_FRUITLESS_MAX: Final = 8
#: Reasons that hold for the blocks after this one as well: one request for all of them is better than one for each.
_LASTING: Final = frozenset({PassReason.CACHING_OFF, PassReason.DAEMON_AWAY, PassReason.STORE_REFUSED})


class _Elsewhere:
    """Another node's, and not to be copied."""


_ELSEWHERE: Final = _Elsewhere()


class Body:
    """An async iterator of pieces. A piece is valid until the next one is asked for or the body is closed.

    Raises Changed (see there), S3Error when the origin is not available, OriginRefused, OriginBroken.
    origin_requests: how many this body caused.
    """

    def __init__(
        self,
        context: Context,
        blocks: Blocks,
        opened: Opened,
        start: int,
        stop: int,
        touched: Callable[[bytes, int], None],
        give_back: Callable[[int], None],
        *,
        direct: bool = False,
    ) -> None:
        assert 0 <= start <= stop <= opened.record.size, "a body is a slice of its object"
        self._context = context
        self._blocks = blocks
        self._opened = opened
        self._record = opened.record
        self._position = start
        self._stop = stop
        self._touched = touched
        self._give_back = give_back
        self._block_bytes = context.cache.block_bytes
        # A short read of a part: it does not fill a cold block at first touch, and there is nothing to look ahead to.
        self._touch = stop - start < min(context.cache.random_read_bytes, opened.record.size)
        self._ahead = start // self._block_bytes
        self._begun = False  # whether a piece was given out
        self._looking = False  # whether blocks ahead are asked for
        self._step: AsyncGenerator[Piece, None] | None = None
        self._fruitless = 0
        self._must_pass: PassReason | _Elsewhere | None = None
        self._upstream = context.upstream
        # For a peer, or with nobody to ask: other nodes have no part in it.
        self._direct = direct or context.upstream.alone
        self._serves = direct
        self._not_there = -1  # a block that no other node could give
        self._down: OriginUnavailable | None = None  # the origin, as this node found it
        self.origin_requests = 0

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> Piece:
        if self._begun and not self._looking:
            # Not before: a dozen requests that start together would hold up the one that the client waits for.
            self._looking = True
            ticket = self._opened.ticket
            if ticket is not None and not ticket.offered:
                # What is just passed through need not be brought as well.
                self._ahead = max(self._ahead, -(-ticket.stop // self._block_bytes))
            self._look_ahead(self._position // self._block_bytes)
        while self._position < self._stop:
            before = self._position
            try:
                if self._step is None:
                    self._step = await self._next_step()
                piece = await anext(self._step)
                self._begun = True
                return piece
            except StopAsyncIteration:
                self._step = None
                self._progress(before, None)
            except OriginBroken as error:
                # Gone on with from where it broke, by version: without an ETag that cannot be.
                self._step = None
                self._progress(before, error)
            except OriginUnavailable as error:
                self._step = None
                number = self._position // self._block_bytes
                if self._direct or number == self._not_there:
                    raise service_unavailable(error.reason, error.retry_after_s) from error
                # For this node, perhaps not for others. The reader asks them, not the fill: no fill waits for another node's.
                self._down = error
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Gives everything back. Fills go on."""
        step, self._step = self._step, None
        if step is not None:
            await step.aclose()

    def _progress(self, before: int, error: OriginBroken | None) -> None:
        """A step ended. Steps that bring nothing are bounded: then it is passed through, and then it is over."""
        if self._position > before:
            self._fruitless = 0
            return
        self._fruitless += 1
        if self._fruitless > _FRUITLESS_MAX or (error is not None and not self._record.etag):
            raise error or OriginBroken("the block could not be had in any way")
        if error is not None or self._fruitless > _FRUITLESS_MAX // 2:
            self._must_pass = PassReason.BUSY

    # --- the walk -------------------------------------------------------------------------------------------------

    async def _next_step(self) -> AsyncGenerator[Piece, None]:
        """Pieces from the position on: of its block, or of more when it passes through. May bring none: look again."""
        ticket = self._opened.ticket
        if ticket is not None and not ticket.offered and ticket.start <= self._position < ticket.stop:
            response = ticket.take()
            if response is not None:
                return self._through(response, ticket.start, min(ticket.stop, self._stop))
        number = self._position // self._block_bytes
        if self._looking:
            self._look_ahead(number)
        source: Location | Growing | PassReason | _Elsewhere | None = self._must_pass
        self._must_pass = None
        if source is None:
            source = _ELSEWHERE if self._down is not None else await self._source(number)
        if isinstance(source, Location):
            return self._from_store(number, source)
        if isinstance(source, Growing):
            return self._behind(number, source)
        if isinstance(source, _Elsewhere):
            return self._from_peer(number)
        return await self._pass(number, source)

    async def _source(self, number: int) -> Location | Growing | PassReason | _Elsewhere:
        if not self._opened.stored:
            return PassReason.CACHING_OFF
        blocks, opened, record = self._blocks, self._opened, self._record
        remote = (
            not self._direct
            and number != self._not_there
            and self._upstream.remote(opened.bucket, opened.key, record, number)
        )
        passes = remote  # asked once: it counts as a touch
        for attempt in range(_ATTEMPTS):
            location = blocks.here(record, number)
            if location is not None:
                return location
            growing = blocks.growing(record, number)
            if growing is not None and self._serves and not growing.to_origin:
                return PassReason.BUSY  # it may wait for the very node that this is for
            if growing is not None:
                return growing
            if blocks.unverified(record, number):
                try:
                    async with asyncio.timeout(self._context.cache.ipc_timeout_s):
                        verified = await blocks.verify(record, number)
                except TimeoutError:
                    return PassReason.BUSY
                if verified:
                    continue
                if blocks.unverified(record, number):
                    return PassReason.DAEMON_AWAY
            if passes and attempt == 0:
                passes = not self._upstream.copies(opened.bucket, opened.key, record, number)
            if passes or (remote and not self._context.link.caching):
                return _ELSEWHERE
            if not self._context.link.caching:
                return PassReason.DAEMON_AWAY  # or it is there and would say no: not worth waiting for
            asked = blocks.ask(
                opened.bucket, opened.key, record, number, touch=self._touch and not remote,
                on_request=self._counted, direct=self._direct,
            )  # fmt: skip
            try:
                async with asyncio.timeout(self._context.cache.ipc_timeout_s):
                    source = await asyncio.shield(asked)
            except TimeoutError:
                return _ELSEWHERE if remote else PassReason.BUSY
            if source is None or (source is PassReason.FIRST_TOUCH and not self._touch):
                continue
            if source is PassReason.FILLS_MAX and attempt == 0:
                continue  # perhaps the answer to somebody's looking ahead, which may take less than who waits
            return _ELSEWHERE if remote and isinstance(source, PassReason) else source
        return _ELSEWHERE if remote else PassReason.BUSY

    def _look_ahead(self, number: int) -> None:
        """Has the blocks of the window brought while this one is sent: a long link is filled by many connections."""
        context = self._context
        if self._touch or not self._opened.stored or not context.link.caching:
            return
        window = max(1, context.cache.fill_ahead_bytes // self._block_bytes)
        end = min(number + window, -(-self._stop // self._block_bytes))
        blocks, opened, record = self._blocks, self._opened, self._record
        elsewhere: list[int] = []
        # Not the block itself: whoever looks has it on its way, or is about to ask for it.
        for ahead in range(max(self._ahead, number + 1), end):
            if self._left_elsewhere(ahead):
                elsewhere.append(ahead)
            elif blocks.growing(record, ahead) is None and context.reader.locate(record.content, ahead) is None:
                blocks.ask(
                    opened.bucket,
                    opened.key,
                    record,
                    ahead,
                    touch=False,
                    ahead=True,
                    on_request=self._counted,
                    direct=self._direct,
                )
        if elsewhere:
            self._upstream.hint(opened.bucket, opened.key, record, elsewhere)
        self._ahead = max(self._ahead, end)

    def _left_elsewhere(self, number: int) -> bool:
        """Whether a block to come is another node's, and will be passed on without a copy."""
        if self._direct:
            return False
        bucket, key, record, upstream = self._opened.bucket, self._opened.key, self._record, self._upstream
        return upstream.remote(bucket, key, record, number) and not upstream.will_copy(bucket, key, record, number)

    def _counted(self) -> None:
        self.origin_requests += 1

    # --- the ways a block comes -------------------------------------------------------------------------------------

    def _end_in(self, number: int) -> int:
        """Where this body ends within the block, counted from the block's start."""
        return min(self._stop - number * self._block_bytes, self._block_bytes)

    async def _from_store(self, number: int, location: Location) -> AsyncGenerator[Piece, None]:
        try:
            fd = self._context.reader.borrow(location.segment)
        except SegmentGone:
            return  # looked for again: by then the index says so too
        try:
            at = self._position - number * self._block_bytes
            length = self._end_in(number) - at
            self._touched(self._record.content, number)
            yield FilePiece(fd, location.offset + at, length, location.segment)
            self._position += length
        finally:
            self._give_back(location.segment)

    async def _from_peer(self, number: int) -> AsyncGenerator[Piece, None]:
        """What another node sends of the block. Brings nothing if none can: then this node does as if it kept it."""
        opened, end = self._opened, number * self._block_bytes + self._end_in(number)
        try:
            response = await self._upstream.ask_owners(
                opened.bucket, opened.key, self._record, self._position, end, fill=not self._touch
            )
        except OriginUnavailable:
            response = None  # for that node, perhaps not for this one
        except Changed:
            self._context.forget(opened.bucket, opened.key, self._record)
            raise
        if response is None:
            self._not_there = number
            if self._down is not None:
                raise self._down
            return
        self._down = None
        try:
            piece = response.stream(end - self._position)
            yield piece
            self._position += piece.taken
            if piece.failure is not None:
                raise piece.failure
        finally:
            response.release()

    async def _behind(self, number: int, growing: Growing) -> AsyncGenerator[Piece, None]:
        begin, end = number * self._block_bytes, self._end_in(number)
        extent, fd = growing.extent, -1
        if not growing.local:
            metrics.FILL_FOLLOWERS.inc()
        try:
            while (at := self._position - begin) < end:
                if not await growing.past(at):
                    self._after_failure(growing)
                    return
                if growing.body is not None:
                    yield BytesPiece(growing.body[at:end])
                    self._position = begin + end
                    return
                assert extent is not None, "bytes of a small block come with its body"
                if fd < 0:
                    fd = self._context.reader.borrow(extent.segment)
                length = min(growing.watermark, end) - at
                yield FilePiece(fd, extent.offset + at, length, extent.segment)
                self._position += length
        except SegmentGone:
            return  # the fill is long over and its block evicted: looked for again
        finally:
            if not growing.local:
                metrics.FILL_FOLLOWERS.dec()
            if fd >= 0 and extent is not None:
                self._give_back(extent.segment)

    def _after_failure(self, growing: Growing) -> None:
        """The fill ended before this reader had its bytes. Returning looks for the block again."""
        outcome = growing.outcome
        # What the origin refused another worker with is known to that one alone: look again, and hear it oneself.
        if outcome is BlockOutcome.CHANGED or (outcome is BlockOutcome.REFUSED and growing.refusal is None):
            self._context.forget(self._opened.bucket, self._opened.key, self._record)
            raise Changed("the object changed while it was read")
        if growing.refusal is not None:
            raise refused(growing.refusal)
        if outcome is BlockOutcome.UNAVAILABLE:
            raise OriginUnavailable("no answer to the fill that was followed", retry_after_s=growing.retry_after_s)
        if outcome is BlockOutcome.DISK_FAILED:
            self._must_pass = _ELSEWHERE if not growing.to_origin else PassReason.STORE_REFUSED

    async def _pass(self, number: int, reason: PassReason) -> AsyncGenerator[Piece, None]:
        """Bytes from the origin to this client, uncached."""
        ticket = self._opened.ticket
        end = min(self._stop, (number + 1) * self._block_bytes)
        if ticket is not None and ticket.start <= self._position < ticket.stop:
            response = ticket.take()
            if response is not None:
                return self._through(response, ticket.start, min(ticket.stop, end))
        while reason in _LASTING and end < self._stop:
            if self._opened.stored and self._blocks.here(self._record, end // self._block_bytes) is not None:
                break
            end = min(self._stop, end + self._block_bytes)
        return self._through(await self._fetch(end), self._position, end)

    async def _fetch(self, end: int) -> OriginResponse:
        opened = self._opened
        try:
            return await fetch(
                self._context, opened.bucket, opened.key, self._record, self._position, end, self._counted
            )
        except Changed:
            self._context.forget(opened.bucket, opened.key, self._record)
            raise

    async def _through(self, response: Response, start: int, end: int) -> AsyncGenerator[Piece, None]:
        """Pieces of [position, end) from an answer whose body begins at `start` of the object."""
        skip = self._position - start
        try:
            async for data in response.pieces():
                if not isinstance(response, PeerResponse):
                    metrics.BYTE_COUNTS.add(("origin",), len(data))
                if skip >= len(data):
                    skip -= len(data)
                    continue
                piece = data[skip : skip + end - self._position]
                skip = 0
                yield BytesPiece(piece)
                self._position += len(piece)
                if self._position == end:
                    return
            raise OriginBroken(f"the origin's body ended at {self._position} instead of {end}")
        finally:
            response.release()
