"""The carrier: what a worker does with the cache, in one place.

Owns: the public calls, putting the parts together, reporting touches, letting go of evicted segments, fencing writes.
Does not own: any of the parts' work (see the package's other modules), decisions of the node (the daemon).

Invariant: nothing here waits for the daemon on the way of a hit, and no call waits for ever: a daemon that is away costs
storing, not serving.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Final

from kos.clock import Clock
from kos.config import Config
from kos.errors import ConfigError, S3Error
from kos.rules import Rules
from kos.s3.object_response import Part, sole_part
from kos.tasks import Tasks
from koscache import ipc
from koscache.carrier.blocks import Blocks
from koscache.carrier.body import Body
from koscache.carrier.context import BufferPool, Context, Origin
from koscache.carrier.fetch import OnRequest
from koscache.carrier.link import Link
from koscache.carrier.open import Opener
from koscache.carrier.parts import Parts
from koscache.carrier.peers import Peers
from koscache.carrier.types import FilePiece, Opened, Peek, Phase, Reason, Sight, Want
from koscache.carrier.upstream import Upstream
from koscache.content import VERSION_MARK, Freshness, Location, Record, judge, rule_of
from koscache.disk import StoreFailed
from koscache.reader import Reader, SegmentGone
from koscache.touchmap import TouchMap

_log: Final = logging.getLogger("koscache.carrier")

#: Touches are told so often; more than so many blocks in between are not remembered (they are a hint, not a record).
_TOUCH_EVERY_S: Final = 1.0
_TOUCHES_MAX: Final = 8192
#: Writes of unknown end that are remembered until they must have ended; 65 536 x 200 bytes. Only an origin that fails for
#: long makes so many; then the oldest counts as ended.
_UNSETTLED_MAX: Final = 65_536
#: And so many fence slots of theirs (a deletion of 1000 keys in as many deep directories has 34 000): 40 MB of ints.
_UNSETTLED_SLOTS_MAX: Final = 1_000_000
#: Fence slots in one message to the daemon: at most 41 KB, below the least that cache.ipc_message may be.
_SLOTS_A_MESSAGE: Final = 8192
#: Blocks that are looked up at once, the loop standing still: with blocks of 8 MiB an object of 2 GiB.
_RUN_MAX: Final = 256
#: All buffers of a worker for fills from the origin together, and as much for those from other nodes. One is enough for a fill,
#: and fills wait for each other's.
_BUFFERS_BYTES: Final = 32 * 1024 * 1024
_ANY: Final = Want()
#: Fills of a worker at which it takes no more from a node that is about to leave.
_TAKEN_MAX: Final = 16
#: How often a daemon that is away is looked for by who must tell it of a write.
_DAEMON_EVERY_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class CarrierStats:
    """For readyz and tests. fills: led by this worker. flights: opens on their way. asking: questions to the daemon."""

    connected: bool
    caching: bool
    reason: str
    fills: int
    flights: int
    asking: int


@dataclass(slots=True, eq=False)
class Writing:
    """A write under way, for who carries it out. end_known: False when its answer is here and says nothing of an earlier attempt,
    or is that it failed, so that the origin may still carry it out."""

    end_known: bool = True


@dataclass(slots=True, eq=False)
class _Write:
    """A write under way, or one whose end is unknown. until: monotonic seconds, when it must have ended. tokens: under
    which the daemon was told of it. slots: of the fence."""

    until: float
    tokens: list[int]
    slots: list[int]


class Carrier:
    """One per worker; all calls on the worker's loop. The reader may be unopened; start() opens it.

    config: of the node. origin: a started kos.origin.lane.OriginLane. tasks: owner of the fills and of the link. peers,
    touches: in a cluster.
    """

    def __init__(
        self,
        config: Config,
        reader: Reader,
        origin: Origin,
        rules: Rules,
        clock: Clock,
        tasks: Tasks,
        peers: Peers | None = None,
        touches: TouchMap | None = None,
    ) -> None:
        cache = config.cache
        self._reader = reader
        self._rules = rules
        self._clock = clock
        self._tasks = tasks
        self._block_bytes = cache.block_bytes
        self._link = Link(cache, clock, tasks, self)
        buffers, peer_buffers = (
            BufferPool(cache.fill_buffer_bytes, _buffers_max(cache.fill_buffer_bytes, config.origin.connections))
            for _ in range(2)
        )
        threads = ThreadPoolExecutor(cache.write_threads, thread_name_prefix="fill")
        self._upstream = Upstream(config, rules, peers, touches, clock, tasks, reader.locate)
        self._context = Context(
            config, reader, origin, rules, clock, tasks, self._link, buffers, peer_buffers, threads, self._upstream
        )
        self._write_wait_s = config.cluster.write_wait_s if config.cluster.enabled else None
        self._blocks = Blocks(self._context)
        self._opener = Opener(self._context, self._blocks)
        self._parts = Parts(self._context)
        self._touches: dict[tuple[bytes, int], None] = {}
        self._tokens = count(1)
        #: all that the daemon is to end should this worker die: those under way, and the unsettled
        self._writes: set[_Write] = set()
        #: writes that the origin may still carry out, the oldest first
        self._unsettled: deque[_Write] = deque()
        self._unsettled_slots = 0
        self._indexed = False

    async def start(self) -> None:
        """Opens the index and looks for the daemon; neither needs to be there.

        Raises ConfigError when there can be no fence: then no write could be seen by the node's other workers.
        """
        try:
            self._indexed = self._reader.open()
        except StoreFailed as error:
            raise ConfigError(f"cache.dir: {self._context.cache.dir}: {error.reason}") from error
        if self._context.cache.enabled:
            await self._link.start()
        self._tasks.spawn(self._report(), "touches")

    async def close(self) -> None:
        """Ends the link. The owner of the tasks closes them (before or after), which gives up the fills in flight."""
        await self._link.close()
        self._upstream.close()
        self._context.threads.shutdown(wait=True, cancel_futures=True)

    @property
    def caching(self) -> bool:
        """Whether what is read now gets stored."""
        return self._link.caching

    @property
    def reason(self) -> str:
        """Why not; empty when it does."""
        if not self._context.cache.enabled:
            return "cache.enabled is false"
        return self._link.reason

    def stats(self) -> CarrierStats:
        return CarrierStats(
            self._link.up, self.caching, self.reason, self._blocks.fills, self._opener.flights, self._link.waiting
        )

    def counted(self, reads: int, hits: int) -> None:
        """This worker has answered so many more reads of objects, so many of them without the origin: for the daemon to tell."""
        if reads and self._write_wait_s is not None:
            self._link.tell(ipc.Counted(reads, hits))

    # --- reading ----------------------------------------------------------------------------------------------------

    def peek(self, bucket: str, key: str, now: float | None = None) -> Peek:
        """What the index says of the key now (epoch seconds). No await; cheapest while the index rests."""
        reader = self._reader
        # Not rule_of() for what is no version: a plain hit has no call to spare.
        rule = rule_of(self._rules, bucket, key) if key[:1] == VERSION_MARK else self._rules.match(bucket, key)
        found = reader.first(bucket, key)
        if not reader.fence.trusted():
            rule = self._context.rule(bucket, key)
        if found is None:
            return Peek(None, Freshness.ABSENT, 0.0, rule, None)
        record, slot, location, _ = found
        freshness, age_s = judge(
            record, reader.fence.value(slot), self._clock.now() if now is None else now, rule.freshness
        )
        return Peek(record, freshness, age_s, rule, location)

    def piece(self, record: Record, location: Location, start: int, stop: int) -> FilePiece | None:
        """cached() for a slice of the first block, whose place peek() told; None when it is not to be had from there."""
        if not location.verified or stop > location.length:
            return None
        fd = self._borrow(location.segment)
        if fd is None:
            return None
        self._touched(record.content, 0)
        return FilePiece(fd, location.offset + start, stop - start, location.segment)

    def sight(self, bucket: str, key: str, start: int, stop: int) -> Sight | None:
        """What it takes to serve the slice of the first block again, for read_again; None if that may not be now."""
        found = self._reader.first(bucket, key)
        if found is None or found.location is None:
            return None
        record, location = found.record, found.location
        if not location.verified or stop > location.length or record.fence == 0:
            return None
        fresh_s = self._context.rule(bucket, key).freshness
        valid_from = -math.inf if fresh_s == math.inf else record.validated_at
        return Sight(found, location, record.fence, valid_from, record.validated_at + fresh_s, start, stop)

    def still(self, sight: Sight, now: float) -> bool:
        """Whether the slice may be served again from where it was. now: epoch seconds. No await.

        It is the same decision as peek() and piece() make, for as long as the index rests: fresh by time, not fenced, the
        same place. It holds until the next await; then look again.
        """
        return sight.valid_from <= now < sight.valid_until and self._reader.still(sight.found, sight.fence)

    def read_again(self, sight: Sight, buffer: memoryview) -> memoryview | None:
        """The slice's bytes, in `buffer`, right after still(); None if they are not in memory. No descriptor is lent."""
        found, location, _, _, _, start, stop = sight
        into = buffer[: stop - start]
        if not self._reader.read_now(location.segment, location.offset + start, into):
            return None
        self._touched(found.record.content, 0)
        return into

    def cached(self, record: Record, bucket: str, key: str, start: int, stop: int) -> list[FilePiece] | None:
        """The slice [start, stop) of the version, if all its blocks are in the store and verified; else None.

        Their descriptors are borrowed: give_back(pieces) when sent. Notes the touches. No await. None as well for more
        than a few hundred blocks, because the loop would stand still: a Body walks through them in turn.
        """
        block = self._block_bytes
        first, last = start // block, -(-stop // block)
        if last - first > _RUN_MAX:
            return None
        locations = self._reader.locate_run(record.content, first, last)
        if locations is None:
            return None
        pieces: list[FilePiece] = []
        for number, location in enumerate(locations, first):
            begin = number * block
            at = max(start - begin, 0)
            end = min(stop - begin, block)
            fd = self._borrow(location.segment) if location.verified and end <= location.length else None
            if fd is None:
                self.give_back(pieces)
                return None
            pieces.append(FilePiece(fd, location.offset + at, end - at, location.segment))
        for number in range(first, last):
            self._touched(record.content, number)
        return pieces

    def give_back(self, pieces: Iterable[FilePiece]) -> None:
        """The pieces of cached() are sent; their descriptors may be closed."""
        for piece in pieces:
            self._give_back(piece.segment)

    async def open(self, bucket: str, key: str, want: Want, *, direct: bool = False, gone: str = "") -> Opened:
        """Finds out which version there is, asking the origin if the record does not do: once for all who ask at a time.

        direct: for a peer, so no other peer is asked. gone: an ETag that the origin is known to have no more.

        Raises S3Error ServiceUnavailable or SlowDown with Retry-After when the origin cannot be asked and nothing may be
        served stale; OriginRefused when it answered with an error. Cancelling it never cancels the question.
        """
        if gone:
            record = self._reader.record(bucket, key)
            if record is not None and record.etag == gone:
                self._context.forget(bucket, key, record)
        return await self._opener.open(bucket, key, want, direct=direct)

    def vouches(self, bucket: str, key: str, record: Record) -> bool:
        """Whether another node may keep this record, which was opened just now, as if it had it from the origin. No await.

        The mark is looked at before the value: a write of another node marks the slot before it changes the value.
        """
        fence = self._reader.fence
        slot = fence.slot(bucket, key)
        return fence.vouching(slot) and record.fence == fence.value(slot) != 0

    def version(self, bucket: str, key: str, record: Record, want: Want = _ANY) -> Opened:
        """As open(), of a version that the caller knows to have been there."""
        return Opened(bucket, key, record, Phase.HIT, Reason.FRESH, None, 0, want)

    def ahead(self, bucket: str, key: str, record: Record, numbers: Sequence[int]) -> None:
        """Has these blocks of the version brought into the store, from the origin, as far as there is room. No await."""
        self._bring(bucket, key, record, numbers, None)

    def take(self, bucket: str, key: str, record: Record, numbers: Sequence[int], source: str) -> bool:
        """As ahead(), from the node `source`, which is about to leave. False: there is no room now, ask again. No await."""
        if not self.caching or self._blocks.fills >= _TAKEN_MAX:
            return False
        self._bring(bucket, key, record, numbers, source)
        return True

    def _bring(self, bucket: str, key: str, record: Record, numbers: Sequence[int], source: str | None) -> None:
        if not self.caching:
            return
        for number in numbers:
            if self._blocks.growing(record, number) is None and self._reader.locate(record.content, number) is None:
                self._blocks.ask(
                    bucket, key, record, number, touch=False, on_request=_uncounted, ahead=True,
                    direct=source is None, only=source,
                )  # fmt: skip

    def block_checksum(self, record: Record, number: int) -> int | None:
        """xxh3_64 of the whole block, if it is in the store and verified. No await."""
        location = self._blocks.here(record, number)
        return None if location is None else location.checksum

    def body(self, opened: Opened, start: int, stop: int, *, direct: bool = False) -> Body:
        """The slice [start, stop) of what was opened. Close it, and then `opened`. direct: ask no other peer for it."""
        return Body(self._context, self._blocks, opened, start, stop, self._touched, self._give_back, direct=direct)

    def listing_values(self, bucket: str, prefix: str) -> tuple[int, int]:
        """What a page of a listing of the prefix is guarded by: the present values of its two fence slots.

        Read them before the origin is asked; the page counts for as long as they are the same. No await.
        """
        fence = self._reader.fence
        if not fence.trusted():
            # Values that nothing was kept under, or ever will be found under.
            return fence.unused_value(), fence.unused_value()
        return fence.listing_values(bucket, prefix)

    def known_part(self, bucket: str, record: Record, number: int) -> Part | None:
        """Part `number` of the version, if it is known without asking the origin. No await.

        Raises S3Error InvalidPartNumber when it is known that there is none.
        """
        return sole_part(record.meta, number) or self._parts.known(bucket, record, number)

    async def find_part(self, opened: Opened, number: int, on_request: OnRequest) -> Part | None:
        """known_part() of what was opened, or what the origin says; None when only the origin can answer a read of it.

        on_request: called for each request that it costs. Raises what known_part() raises; S3Error ServiceUnavailable or
        SlowDown when the origin cannot be asked.
        """
        return sole_part(opened.record.meta, number) or await self._parts.find(opened, number, on_request)

    # --- writing ----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def writing(
        self, bucket: str, keys: Sequence[str], *, versions: Collection[str] = (), bucket_itself: bool = False
    ) -> AsyncIterator[Writing]:
        """Around the origin request of a write, from before it until its answer is here.

        keys: whose current object (and null version) the write may change. versions: those keys of which it may change or
        remove other versions as well: deleting a version, and whatever changes what a version shows beside its bytes.
        bucket_itself: the bucket may be made or removed by it, or answer otherwise (policy, versioning).

        Afterwards no record of these that was validated before counts, in any worker, and no page of a listing that may
        show one of the keys (or is of the bucket, if bucket_itself), on any node: it raises S3Error ServiceUnavailable if not
        all nodes of a cluster can be told in time. When it is left by an exception
        or cancellation, or its end is unknown, the origin may still carry the write out, so the fence is passed once more when
        it must have ended.
        """
        fence = self._reader.fence
        passed = {fence.slot(bucket, key) for key in keys} | fence.directory_slots(bucket, keys)
        if versions:
            passed |= {fence.versions_slot(bucket, key) for key in versions} | fence.directory_slots(bucket, versions)
        if bucket_itself:
            passed.add(fence.bucket_slot(bucket))
        slots = sorted(passed)
        self._bump(slots)
        write = _Write(0.0, self._tell_begun(slots), slots)
        self._writes.add(write)
        ended = False
        writing = Writing()
        try:
            yield writing
        except S3Error as refused:
            # What kos itself refused (a checksum, a length) never was a whole request for the origin.
            ended = refused.status < 500
            raise
        else:
            self._bump(slots)
            if self._write_wait_s is not None and writing.end_known:
                await self._heard_everywhere(write, self._write_wait_s)
            elif self._write_wait_s is not None:
                await self._pass_everywhere(slots, self._write_wait_s)
            ended = writing.end_known
        finally:
            self._bump(slots)
            if ended:
                self._tell_ended(write)
            else:
                # Should this worker die before that, the daemon does it: it has not heard the end of the write.
                write.until = self._clock.monotonic() + self._context.config.origin.request_timeout_s
                self._unsettled.append(write)
                self._unsettled_slots += len(slots)
                while len(self._unsettled) > _UNSETTLED_MAX or self._unsettled_slots > _UNSETTLED_SLOTS_MAX:
                    self._settle()

    async def _pass_everywhere(self, slots: list[int], wait_s: float) -> None:
        """As _heard_everywhere(), of a write that goes on: what was answered so far every node is to have heard of."""
        passing = _Write(0.0, self._tell_begun(slots), slots)
        self._writes.add(passing)
        try:
            await self._heard_everywhere(passing, wait_s)
        finally:
            self._tell_ended(passing)

    async def _heard_everywhere(self, write: _Write, wait_s: float) -> None:
        """Returns when every node of the cluster has heard of the write. Raises S3Error when not within wait_s."""
        left_s = wait_s
        while left_s > 0:
            asked_at = self._clock.monotonic()
            tokens = write.tokens
            said: Any = None
            if self._link.welcome:
                write.tokens = []  # the daemon ends them; should it die, all is said again under new ones
                said = await self._link.answer(partial(_ask_end, tokens))
            if isinstance(said, ipc.Done):
                if said.ok:
                    return
                break
            await self._clock.sleep(_DAEMON_EVERY_S)
            left_s -= self._clock.monotonic() - asked_at
        raise S3Error(
            "ServiceUnavailable",
            "The origin has carried this out, but not all nodes of the cluster could be told of it. Send it again.",
            headers={"Retry-After": "1"},
        )

    def _settle(self) -> None:
        """Passes the fence for the oldest write whose end is unknown, and tells the daemon that it has ended."""
        write = self._unsettled.popleft()
        self._unsettled_slots -= len(write.slots)
        self._bump(write.slots)
        self._tell_ended(write)

    def _tell_begun(self, slots: list[int]) -> list[int]:
        """Says that these slots are about to be written under; the tokens that it said it with."""
        if len(slots) <= _SLOTS_A_MESSAGE:
            token = next(self._tokens)
            self._link.tell(ipc.WriteBegin(token, slots))
            return [token]
        tokens: list[int] = []
        for first in range(0, len(slots), _SLOTS_A_MESSAGE):
            tokens.append(next(self._tokens))
            self._link.tell(ipc.WriteBegin(tokens[-1], slots[first : first + _SLOTS_A_MESSAGE]))
        return tokens

    def _tell_ended(self, write: _Write) -> None:
        self._writes.discard(write)
        for token in write.tokens:
            self._link.tell(ipc.WriteEnd(token))

    def _bump(self, slots: list[int]) -> None:
        # The fence is asked for each time: a new daemon may have made a new file.
        self._reader.fence.bump_all(slots)

    # --- segments and touches ---------------------------------------------------------------------------------------

    def _borrow(self, segment: int) -> int | None:
        try:
            return self._reader.borrow(segment)
        except SegmentGone:
            return None

    def _give_back(self, segment: int) -> None:
        if self._reader.give_back(segment):
            self._link.tell(ipc.Released(segment))

    def _touched(self, content: bytes, number: int) -> None:
        if len(self._touches) < _TOUCHES_MAX:
            self._touches[content, number] = None

    async def _report(self) -> None:
        while True:
            await self._clock.sleep(_TOUCH_EVERY_S)
            while self._unsettled and self._unsettled[0].until <= self._clock.monotonic():
                self._settle()
            if self._touches:
                touches, self._touches = self._touches, {}
                self._link.tell(ipc.Touches(list(touches)))
            if not self._indexed and self._link.up:
                self._reopen()

    def _reopen(self) -> None:
        try:
            self._indexed = self._reader.reopen()
        except StoreFailed as error:
            self._indexed = False
            _log.error("index not opened", extra={"reason": error.reason})

    # --- link.Receiver ----------------------------------------------------------------------------------------------

    def link_up(self) -> None:
        """A daemon is there, perhaps another one than before, perhaps with another index. It knows of no write yet."""
        self._reopen()
        for write in self._writes:
            before, write.tokens = write.tokens, self._tell_begun(write.slots)
            for token in before:  # it may have been said in the moment before the welcome
                self._link.tell(ipc.WriteEnd(token))

    def link_down(self) -> None:
        self._blocks.link_down()

    def pushed(self, message: ipc.Message) -> None:
        if isinstance(message, ipc.ClusterView):
            self._upstream.viewed(message.name, message.view)
        elif isinstance(message, ipc.Evicted):
            for segment in message.segments:
                if self._reader.drop(segment):
                    self._link.tell(ipc.Released(segment))
        else:
            self._blocks.pushed(message)


def _ask_end(tokens: list[int], ask: int) -> ipc.Message:
    return ipc.AskEnd(ask, tokens)


def _uncounted() -> None:
    """Requests for what nobody in particular asked for."""


def _buffers_max(buffer_bytes: int, connections: int) -> int:
    """Two for each connection that may bring a body, as far as _BUFFERS_BYTES go: 32 of 1 MiB by default."""
    return min(2 * connections, max(1, _BUFFERS_BYTES // buffer_bytes))
