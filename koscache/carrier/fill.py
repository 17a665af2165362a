"""Leading a fill: origin to extent (or, small, to a message), with the watermark moving and the connection mended.

Owns: one block of which this worker has the lease, from the grant to the commit's answer. Does not own: who gets leases
(blocks, and the daemon), who reads behind (body).

Invariant: a fill belongs to the worker, not to the request that caused it: no client's going away ends it. It ends with
exactly one of: committed, or the daemon told why not, or the connection to the daemon lost (which says it all).
"""

from __future__ import annotations

import asyncio
import logging
import os

from kos import metrics
from kos.errors import OriginBroken, OriginRefused, OriginUnavailable
from koscache import ipc
from koscache.carrier.context import Context
from koscache.carrier.fetch import OnRequest, fetch_block
from koscache.carrier.follow import Growing
from koscache.carrier.peer_response import PeerResponse, checksum_of
from koscache.carrier.sink import FileSink
from koscache.carrier.ticket import Response
from koscache.carrier.types import Changed
from koscache.content import Extent, Record, body_checksum
from koscache.ipc import BlockOutcome, Refusal
from koscache.leases import NO_LEASE

_log = logging.getLogger("koscache.carrier")

#: Progress is told so often even when nobody follows, as a sign of life (the daemon's lease_timeout is longer).
_SIGN_OF_LIFE_S = 1.0
_PAUSE_MAX_S = 2.0


class _Ended(Exception):
    def __init__(self, outcome: BlockOutcome, reason: str) -> None:
        self.outcome = outcome
        self.reason = reason


class Fill:
    """start: of the block in the object. response: an answer whose body begins at `start`, or None to ask for one. direct:
    ask the origin alone. only: ask that node rather than others."""

    def __init__(
        self,
        context: Context,
        growing: Growing,
        lease: int,
        bucket: str,
        key: str,
        record: Record,
        start: int,
        response: Response | None,
        on_request: OnRequest,
        *,
        direct: bool = False,
        only: str | None = None,
    ) -> None:
        self._context = context
        self._growing = growing
        self._bucket = bucket
        self._key = key
        self._record = record
        self._start = start
        self._response = response
        self._on_request = on_request
        self._direct = direct
        self._only = only
        #: the other node, if bytes came from one, and what it says that the whole block's checksum is
        self._member: str | None = None
        self._expected: int | None = None
        self._told_at = context.clock.monotonic()
        self.lease = lease
        self.followed = False

    async def run(self) -> None:
        """Until committed or failed; never raises but for cancellation."""
        growing = self._growing
        try:
            if growing.extent is None:
                checksum = await self._receive_small()
            else:
                checksum = await self._receive(growing.extent)
            if self._member is not None:
                await self._compare(checksum, self._member)
        except _Ended as ended:
            self._fail(ended.outcome, ended.reason)
            return
        except BaseException:
            self._fail(BlockOutcome.LEADER_GAVE_UP, "fill ended")
            raise
        if self.lease == NO_LEASE:
            growing.end(BlockOutcome.LEADER_DIED)
            return
        lease, body = self.lease, growing.body
        done = await self._context.link.answer(lambda ask: ipc.BlockDone(ask, lease, checksum, body))
        stored = isinstance(done, ipc.Done) and done.ok
        growing.end(BlockOutcome.COMMITTED if stored else BlockOutcome.DISK_FAILED)

    async def _compare(self, checksum: int, member: str) -> None:
        """What another node sent is kept only if it is what that node has. What it cannot tell it has not kept itself: then
        it passed on what the origin sent."""
        expected, upstream = self._expected, self._context.upstream
        number = self._start // self._context.cache.block_bytes
        if expected is None:
            expected = await upstream.checksum(self._bucket, self._key, self._record, number, member)
        if expected is not None and expected != checksum:
            metrics.PEER_BLOCKS_BAD.labels(member).inc()
            upstream.bad(self._record, number)
            raise _Ended(BlockOutcome.LEADER_GAVE_UP, f"a block of {member} is not what its checksum says")

    def _fail(self, outcome: BlockOutcome, reason: str) -> None:
        if outcome not in (BlockOutcome.CHANGED, BlockOutcome.REFUSED, BlockOutcome.LEADER_GAVE_UP):
            _log.warning("fill failed: %s: %s", outcome.name, reason)
        if self._response is not None:
            self._response.close()
        if self.lease != NO_LEASE:
            self._context.link.tell(ipc.BlockFailed(self.lease, outcome, reason))
        self._growing.end(outcome)

    def follow(self) -> None:
        """Somebody in another worker reads behind. A small block is seen there when it is in the index, and not before."""
        if self._growing.extent is not None:
            self.followed = True
            self._tell(self._growing.watermark)

    def _moved(self, watermark: int) -> None:
        self._growing.advance(watermark)
        if self.lease != NO_LEASE:
            now = self._context.clock.monotonic()
            if self.followed or now - self._told_at >= _SIGN_OF_LIFE_S:
                self._told_at = now
                self._tell(watermark)

    def _tell(self, watermark: int) -> None:
        if self.lease != NO_LEASE:
            self._context.link.tell(ipc.Progress(self.lease, watermark))

    # --- receiving ------------------------------------------------------------------------------------------------

    async def _receive_small(self) -> int:
        length = self._growing.length

        async def attempt() -> bytes:
            response = await self._answer(0)
            try:
                body = await response.read(length)
            finally:
                response.release()
            if len(body) != length:
                raise OriginBroken(f"{len(body)} bytes instead of {length}")
            return body

        attempts = 0
        while True:
            try:
                body = await attempt()
            except (OriginBroken, OriginUnavailable, OriginRefused, Changed) as error:
                attempts += await self._failed_attempt(error, attempts)
            else:
                if self._member is None:
                    metrics.BYTE_COUNTS.add(("origin",), length)
                self._growing.body = body
                self._growing.advance(length)
                return body_checksum(body)

    async def _receive(self, extent: Extent) -> int:
        context, length = self._context, self._growing.length
        try:
            fd = await asyncio.get_running_loop().run_in_executor(context.threads, _open, extent.path)
        except OSError as error:
            raise _Ended(BlockOutcome.DISK_FAILED, f"{extent.path}: {error.strerror}") from error
        sink = FileSink(context, fd, extent.offset, length, self._moved)
        try:
            await self._receive_into(sink)
            return sink.checksum()
        except OSError as error:
            raise _Ended(BlockOutcome.DISK_FAILED, f"{extent.path}: {error.strerror or error}") from error
        finally:
            try:
                await sink.rest()  # a thread may still write: never to a descriptor that has become another file's
            finally:
                sink.release()
                os.close(fd)

    async def _receive_into(self, sink: FileSink) -> None:
        length = self._growing.length
        attempts = 0
        while True:
            try:
                response = await self._answer(sink.received_bytes)
                peer = isinstance(response, PeerResponse)
                sink.source = None if peer else "origin"
                try:
                    await sink.attach(response.resume, response.close, peer=peer)
                    await response.into(sink, length - sink.received_bytes)
                finally:
                    response.close()
                if sink.received_bytes != length:
                    raise OriginBroken(f"{sink.received_bytes} bytes instead of {length}")
                await sink.flush()
                return
            except (OriginBroken, OriginUnavailable, OriginRefused, Changed) as error:
                await sink.flush()  # raises OSError when it was the disk that broke it off
                sink.release()
                attempts += await self._failed_attempt(error, attempts)

    async def _answer(self, position: int) -> Response:
        """The answer that was brought along, or a new one from `position` of the block on."""
        response, self._response = self._response, None
        if response is None:
            start, stop = self._start + position, self._start + self._growing.length
            response = await fetch_block(
                self._context, self._bucket, self._key, self._record, start, stop, self._on_request,
                direct=self._direct, only=self._only,
            )  # fmt: skip
        if isinstance(response, PeerResponse):
            self._member, self._expected = response.member, checksum_of(response)
        else:
            # To the end, so that who brings a block on behalf of another node may wait for this fill.
            self._direct = self._growing.to_origin = True
        return response

    async def _failed_attempt(self, error: Exception, attempts: int) -> int:
        """Waits and returns when another attempt makes sense, else raises _Ended. attempts: before this one. How many attempts
        at the origin this one was: one, or none."""
        growing, origin = self._growing, self._context.config.origin
        if isinstance(error, Changed):
            self._context.forget(self._bucket, self._key, self._record)
            raise _Ended(BlockOutcome.CHANGED, str(error)) from error
        if isinstance(error, OriginRefused):
            headers = tuple((n.encode("utf-8", "surrogateescape"), v.encode("utf-8", "surrogateescape"))
                            for n, v in error.headers)  # fmt: skip
            growing.refusal = Refusal(error.status, headers, error.body)
            raise _Ended(BlockOutcome.REFUSED, str(error)) from error
        if isinstance(error, OriginUnavailable):
            growing.retry_after_s = error.retry_after_s
        if self._member is not None and not self._direct:
            self._direct = True  # another node broke off: its word that it is well is worth little now
            return 0
        if attempts >= origin.retries:
            raise _Ended(BlockOutcome.UNAVAILABLE, str(error)) from error
        clock = self._context.clock
        pause = min(origin.retry_base_s * 2**attempts, _PAUSE_MAX_S)
        await clock.sleep(clock.jitter(pause / 2, pause))
        return 1


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
