"""The block store as the daemon uses it: the one writer of index and segments of a node.

    reserve -> (a worker writes the body into the extent) -> commit | abandon        large blocks
    put_small                                                                         small ones, body and all
    put_record, drop_record                                                           what is known of objects
    evict -> (workers close the segments) -> released                                 room
    touched, pin, verify, scrub_step                                                  what stays, what is right
    segments, of_segment, of_objects, numbers                                         what there is

Owns: the order of things on disk (body, header, index), the byte limit, reactions to a full index. Does not own:
leases, messages, threads (daemon).

Invariant: an entry is in the index only after its whole body and its header are in the file; everything that the index
names is right even if the process dies at any instruction.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol, TypeVar

from koscache import index as ix
from koscache.content import (
    Commit,
    Extent,
    Location,
    Record,
    Refused,
    Small,
    StoreConfig,
    block_length,
    body_checksum,
)
from koscache.disk import Disk, OsDisk, StoreFailed, disk_errors, lock_directory
from koscache.eviction import Touches
from koscache.evictor import Evictor
from koscache.fence import FENCE_BYTES, Fence, read_boot_id
from koscache.index import IndexBroken, IndexFull
from koscache.inventory import Inventory, ObjectsPage, Place, SegmentPage
from koscache.layout import LARGE_PAYLOAD_MAX, PAGE
from koscache.pins import Pins
from koscache.records import Records, payload
from koscache.recovery import (
    STARTS_FORGOTTEN_COUNT,
    STARTS_FORGOTTEN_S,
    Recovered,
    Recovery,
    RecoveryPolicy,
    RecoveryReport,
    Trust,
    mark,
)
from koscache.scrub import Judged, Scrubber, ScrubReport
from koscache.segments import Packed
from koscache.space import SEGMENTS_WANTED, Limits, Space, Stats, work_out_limits

__all__ = ["RecoveryPolicy", "RecoveryReport", "ScrubReport", "Stats", "Store", "StoreFailed"]

_T = TypeVar("_T")
_INDEX_TRIES: Final = 4
_SWEEP_RECORDS: Final = 5000
_HOUSEKEEPING_S: Final = 60.0
_SMALL_PAYLOAD_MAX: Final = 16 << 10


class WallClock(Protocol):
    """kos.clock.Clock has it; seconds."""

    def now(self) -> float: ...
    def monotonic(self) -> float: ...


class Store:
    """All methods are synchronous, may block on the disk, and must be called from one thread at a time.

    Every method may raise StoreFailed; then what was asked for did not happen and the store is still consistent. After
    StoreFailed, close() and open() again bring back what the disk has.
    """

    @classmethod
    def open(
        cls,
        config: StoreConfig,
        clock: WallClock,
        *,
        disk: Disk | None = None,
        policy: RecoveryPolicy = RecoveryPolicy.LENIENT,
        boot_id: str | None = None,
    ) -> Store:
        """Recovers what is in config.dir, or begins anew.

        One Store per directory: StoreFailed if another process has it. ConfigError if size_bytes is too small.
        """
        limits = work_out_limits(config)
        disk = disk or OsDisk()
        boot_id = boot_id or read_boot_id()
        began = clock.monotonic()
        with disk_errors("opening the store"):
            disk.make_dir(config.dir)
        lock = lock_directory(config.dir)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, lock)
            with disk_errors("opening the fence"):
                fence = Fence.open(config.dir, boot_id)
            undo.callback(fence.close)
            recovered = Recovery(config, disk, clock, boot_id, policy).run()
            undo.callback(recovered.environment.detach)
            for segment in recovered.filling:
                undo.callback(segment.close)
            store = cls(config, clock, disk, limits, lock, fence, recovered, began)
            undo.pop_all()
        return store

    def __init__(
        self,
        config: StoreConfig,
        clock: WallClock,
        disk: Disk,
        limits: Limits,
        lock: int,
        fence: Fence,
        recovered: Recovered,
        began: float,
    ) -> None:
        """Use open()."""
        self.fence = fence
        self._config = config
        self._clock = clock
        self._disk = disk
        self._lock = lock
        self._pointer = recovered.pointer
        self._environment = recovered.environment
        self._space = Space(
            config.dir,
            disk,
            self._environment,
            limits,
            recovered.segments,
            recovered.filling,
            recovered.next_segment,
        )
        self._records = Records(self._environment, fence, clock)
        self._touches = Touches()
        self._pins = Pins()
        self._evictor = Evictor(disk, self._environment, self._space, self._touches, self._pins, config.small_bytes)
        self._inventory = Inventory(self._environment, self._space, self._touches)
        self._scrubber = Scrubber(disk, self._space, self.locate, self._judged)
        self._spare_bytes = limits.segment * (2 if limits.budget >= 2 * SEGMENTS_WANTED * limits.segment else 1)
        self._goal_max = limits.budget // 2
        self._opened_at = self._housekept_at = clock.monotonic()
        self._bad_count = 0
        self._transactions_count = 0
        self._closed = False
        self._pins.read(self._environment)
        self._space.settle()
        while self._space.lacks(0) and self._evictor.evict_one(clock.now()):  # the size was made smaller
            continue
        self.recovery = self._report(recovered, began)

    def _report(self, recovered: Recovered, began: float) -> RecoveryReport:
        index = "trusted" if recovered.trust.holds else "new" if recovered.trust is Trust.NO_INDEX else "rebuilt"
        with self._environment.read() as txn:
            kept = txn.stat(self._environment.blocks)["entries"]
        return RecoveryReport(
            index,
            recovered.trust.value,
            kept,
            recovered.dropped,
            len(recovered.segments),
            recovered.segments_dropped,
            self._clock.monotonic() - began,
        )

    # ---- large blocks

    def reserve(self, content: bytes, number: int, length: int) -> Extent | Refused:
        """Space for one block of at most `length` bytes. Never evicts: on NO_SPACE call evict()."""
        return self._space.reserve(content, number, length)

    def commit(self, commits: Sequence[Commit]) -> list[bool]:
        """Makes filled extents findable, in one transaction. Records inside go to disk only, not into the index.

        False: not an extent that is out (an earlier daemon's, abandoned, committed already), or one that was reserved
        for another block, or a length that cannot be. It is dead space then.
        """
        placed: list[tuple[bytes, Location]] = []
        done: list[bool] = []
        try:
            for commit in commits:
                fits = self._fits(commit)
                done.append(fits)
                if fits:
                    kept = payload(commit.bucket, commit.key, commit.record, LARGE_PAYLOAD_MAX)
                    location = self._space.commit(commit.extent, commit.length, commit.checksum, kept)
                    placed.append((ix.block_key(commit.content, commit.number), location))
                else:
                    self.abandon(commit.extent)
            self._transact(lambda txn: self._put_blocks(txn, placed))
        except BaseException:
            for commit in commits[len(done) :]:
                self.abandon(commit.extent)
            raise
        self._space.settle()
        return done

    def _fits(self, commit: Commit) -> bool:
        segment = self._space.writing(commit.extent)
        if segment is None:
            return False
        reserved = segment.outstanding[commit.extent.offset]
        if (reserved.content, reserved.number) != (commit.content, commit.number):
            return False
        if not 0 < commit.length <= reserved.body_length:
            return False
        return commit.record is None or self._is_block_of(commit.record, commit)

    def _is_block_of(self, record: Record, block: Commit | Small) -> bool:
        """Whether a block has the length that it must have in that version of the object."""
        length = block.length if isinstance(block, Commit) else len(block.body)
        wanted = block_length(record.size, block.number, self._config.block_bytes)
        return record.content == block.content and length == wanted

    def abandon(self, extent: Extent) -> None:
        """The fill failed: dead space until the segment is evicted. Unknown extents are ignored."""
        segment = self._space.writing(extent)
        if segment is not None:
            segment.abandon(extent.offset)
            self._space.settle()

    # ---- small blocks

    def put_small(self, smalls: Sequence[Small]) -> list[bool]:
        """Packs bodies and puts their records, in one transaction.

        False: no room for the body, or its checksum or length does not hold. A record whose body does not hold is not
        put either; one whose body had no room is. The body of an empty object is "" and needs no room.
        """
        done = [self._holds(small) for small in smalls]
        right = [small for small, holds in zip(smalls, done, strict=True) if holds]
        packed = [
            Packed(
                small.content,
                small.number,
                small.checksum,
                payload(small.bucket, small.key, small.record, _SMALL_PAYLOAD_MAX),
                small.body,
            )
            for small in right
            if small.body
        ]
        locations = self._space.pack(packed) if packed else []
        placed = [
            (ix.block_key(block.content, block.number), location)
            for block, location in zip(packed, locations, strict=False)
        ]

        def put(txn: ix.Transaction) -> None:
            self._put_blocks(txn, placed)
            for small in right:
                if small.record is not None:
                    self._records.put(txn, small.bucket, small.key, small.record)

        self._transact(put)
        unplaced = {(block.content, block.number) for block in packed[len(locations) :]}
        return [
            holds and (small.content, small.number) not in unplaced for small, holds in zip(smalls, done, strict=True)
        ]

    def _holds(self, small: Small) -> bool:
        if len(small.body) > self._config.block_bytes:
            return False
        if small.body and body_checksum(small.body) != small.checksum:
            return False
        return small.record is None or self._is_block_of(small.record, small)

    # ---- records

    def put_record(self, bucket: str, key: str, record: Record) -> bool:
        """Keeps the record; False if the index has one that is newer (see koscache.records), which stays."""
        return self._transact(lambda txn: self._records.put(txn, bucket, key, record))

    def drop_record(self, bucket: str, key: str) -> None:
        """Forgets what is known of the object. Its blocks stay: they are right for their version for ever."""
        self._transact(lambda txn: self._records.drop(txn, bucket, key))

    def record(self, bucket: str, key: str) -> Record | None:
        with self._index(), self._environment.read() as txn:
            return self._records.get(txn, bucket, key)

    # ---- looking up

    def locate(self, content: bytes, number: int) -> Location | None:
        key = ix.block_key(content, number)
        with self._index(), self._environment.read() as txn:
            value = txn.get(key, db=self._environment.blocks)
        location = None if value is None else ix.decode_location(key, value)
        return location if location is not None and location.segment in self._space.live else None

    def segments(self) -> list[int]:
        """See koscache.inventory."""
        return self._inventory.segments()

    def of_segment(self, segment: int, start: int, hot: bool) -> SegmentPage:
        """See koscache.inventory."""
        with self._index():
            return self._inventory.of_segment(segment, start, hot)

    def of_objects(self, start: Place, hot: bool) -> ObjectsPage:
        """See koscache.inventory."""
        with self._index():
            return self._inventory.of_objects(start, hot)

    def numbers(self, content: bytes) -> list[int]:
        """See koscache.inventory."""
        with self._index():
            return self._inventory.numbers(content)

    def _put_blocks(self, txn: ix.Transaction, placed: Sequence[tuple[bytes, Location]]) -> None:
        for key, location in placed:
            if location.segment not in self._space.live:
                continue  # went already, when room was made for this very transaction
            txn.put(key, ix.encode_location(key, location), db=self._environment.blocks)
            self._touches.discard(key)
        self._space.note_moved(txn)

    def _transact(self, work: Callable[[ix.Transaction], _T]) -> _T:
        """One write transaction; when the index is full, room is made in it and the work done again."""
        with self._index():
            return self._transact_in_room(work)

    def _transact_in_room(self, work: Callable[[ix.Transaction], _T]) -> _T:
        self._make_index_room()
        for attempt in range(_INDEX_TRIES):
            try:
                with self._environment.write() as txn:
                    outcome = work(txn)
                self._space.moved_noted()
                self._transactions_count += 1
                return outcome
            except IndexFull:
                if attempt + 1 == _INDEX_TRIES or not self._shrink_index():
                    self._distrust()  # built anew, it gets no fuller than it may
                    raise
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _index(self) -> Iterator[None]:
        """Around all that touches the index: one that is broken is remembered as such."""
        try:
            yield
        except IndexBroken:
            self._distrust()
            raise

    def _distrust(self) -> None:
        """The next open() builds the index anew."""
        if self._pointer.trusted:
            self._pointer = mark(self._disk, self._config.dir, self._pointer, trusted=False)

    # ---- room

    def evict(self, need_bytes: int = 0) -> list[int]:
        """Frees room for need_bytes, keeps a spare segment and min_free_bytes, and does what else is due.

        Returns every segment that went since the last call, also those that had to go inside other calls: broadcast
        them, then call released(segment) for each when all workers have closed it. Cheap when there is nothing to do:
        call it after every batch. Raises StoreFailed also for what failed in the background (a seal).
        """
        with self._index():
            self._space.collect()
            self._space.settle()
            self._keep_house()
            goal = min(max(need_bytes, self._spare_bytes), self._goal_max)
            while self._space.lacks(goal) and self._evictor.evict_one(self._clock.now()):
                continue
            self._make_index_room()
        if self._space.failure is not None:
            failure, self._space.failure = self._space.failure, None
            raise failure
        gone, self._evictor.gone = self._evictor.gone, []
        return gone

    def released(self, segment: int) -> None:
        """No worker holds the evicted segment any more: its bytes are free."""
        self._space.released(segment)

    def _make_index_room(self) -> None:
        for _ in range(_INDEX_TRIES):
            if not self._environment.is_filling_up() or not self._shrink_index():
                return

    def _shrink_index(self) -> bool:
        """Drops records without blocks, and when there are hardly any, the oldest segment. False: nothing went."""
        dropped = self._evictor.sweep_records(_SWEEP_RECORDS)
        if dropped > _SWEEP_RECORDS // 10:
            return True
        return self._evictor.evict_one(self._clock.now()) or dropped > 0

    def _keep_house(self) -> None:
        now = self._clock.monotonic()
        lived = now - self._opened_at >= STARTS_FORGOTTEN_S or self._transactions_count >= STARTS_FORGOTTEN_COUNT
        if lived and self._pointer.starts:
            self._pointer = mark(self._disk, self._config.dir, self._pointer, starts=0)
        if now - self._housekept_at < _HOUSEKEEPING_S:
            return
        self._housekept_at = now
        with ix.index_errors():
            self._environment.env.reader_check()  # readers that were killed pin pages
        self._expire_pins()

    # ---- what stays

    def touched(self, blocks: Sequence[tuple[bytes, int]]) -> None:
        """Blocks that were read; lossy by design. They move on instead of going when their segment is evicted."""
        for content, number in blocks:
            self._touches.add(ix.block_key(content, number))

    def pin(self, content: bytes, until: float) -> bool:
        """Holds the blocks of a version until the epoch second `until`. False when too many versions are pinned."""
        if not self._pins.add(content, until):
            self._expire_pins()
            if not self._pins.add(content, until):
                return False
        self._transact(lambda txn: self._pins.keep(self._environment, txn, [content]))
        return True

    def unpin(self, content: bytes) -> None:
        self._pins.discard(content)
        self._transact(lambda txn: self._pins.keep(self._environment, txn, [content]))

    def _expire_pins(self) -> None:
        over = self._pins.expire(self._clock.now())
        if over:
            self._transact(lambda txn: self._pins.keep(self._environment, txn, over))

    # ---- what is right

    def verify(self, content: bytes, number: int) -> bool:
        """Reads a block and checks it; a good one becomes verified, a bad one is dropped. False: not there (any
        more)."""
        location = self.locate(content, number)
        if location is None:
            return False
        good = self._space.checksum(location) == location.checksum
        self._judge(content, number, location, good=good)
        return good and location.segment in self._space.live

    def _judged(self, judged: Judged) -> None:
        self._judge(judged.region.content, judged.region.number, judged.location, good=judged.good)

    def _judge(self, content: bytes, number: int, location: Location, *, good: bool) -> None:
        if good and location.verified:
            return
        key = ix.block_key(content, number)
        if good:
            value = ix.encode_location(key, location._replace(verified=True))
            self._transact(lambda txn: txn.put(key, value, db=self._environment.blocks))
        else:
            self._bad_count += 1
            self._transact(lambda txn: txn.delete(key, db=self._environment.blocks))

    def scrub_step(self, budget_bytes: int) -> ScrubReport:
        """Checks the next budget_bytes of the store."""
        return self._scrubber.step(budget_bytes)

    def probe(self) -> None:
        """Tries whether disk and index take a write again; StoreFailed if not. For turning caching on again."""
        path = os.path.join(self._config.dir, "probe")
        with disk_errors("probing the disk"):
            fd = self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                self._disk.write(fd, bytes(PAGE), 0)
                self._disk.sync(fd)
            finally:
                self._disk.close(fd)
                self._disk.unlink(path)
        self._transact(lambda txn: txn.put(b"probe", b"", db=self._environment.meta))

    def stats(self) -> Stats:
        environment = self._environment
        with environment.read() as txn:
            records = txn.stat(environment.objects)["entries"]
            blocks = txn.stat(environment.blocks)["entries"]
        with disk_errors("asking for the index' size"):
            index_bytes = environment.file_bytes()
        return Stats(
            size_bytes=self._config.size_bytes,
            segment_bytes=self._space.live_bytes,
            evicted_unreleased_bytes=self._space.evicted_bytes,
            index_bytes=index_bytes,
            fence_bytes=FENCE_BYTES,
            records=records,
            blocks=blocks,
            segments=len(self._space.live),
            evicted_segments=self._evictor.segments_count,
            evicted_blocks=self._evictor.blocks_count,
            rescued_bytes=self._evictor.rescued_bytes,
            bad_blocks=self._bad_count,
        )

    def close(self, *, clean: bool = True) -> None:
        """Syncs everything and leaves the clean mark; if the disk does not let it, there is none, and no exception.

        clean=False: ends as a crash would, only that the process lives on.
        """
        if self._closed:
            return
        self._closed = True
        self._scrubber.close()
        try:
            self._space.close(clean=clean)
            if clean:
                with ix.index_errors():
                    self._environment.env.sync(True)
                if self._pointer.trusted:
                    mark(self._disk, self._config.dir, self._pointer, clean=True, starts=0)
        except StoreFailed:
            clean = False  # the next open() judges by what it finds
        finally:
            self._environment.detach()
            self.fence.close()
            os.close(self._lock)
