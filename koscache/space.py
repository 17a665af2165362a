"""The space of the store: which segments there are, which are being filled, how much may still be taken.

    OPEN ──full──▶ closing (extents still out) ──▶ sealing (waits for the disk) ──▶ sealed ──evicted──▶ unlinked
    ──released──▶ free

Owns: handing out space, sealing, the byte account, file descriptors for writing. Does not own: the index of entries
(store), the choice of the segment that goes (eviction).

Invariant: live + evicted-but-not-released segment bytes never exceed the budget, which is the configured size less the
whole index and the fence: the limit holds at every moment, not on average.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec
from xxhash import xxh3_64

from kos.errors import ConfigError
from koscache import index as ix
from koscache.content import Extent, Location, Refusal, Refused, StoreConfig
from koscache.disk import Disk, StoreFailed, disk_errors
from koscache.fence import FENCE_BYTES
from koscache.index import Environment, SegmentRow, SegmentState
from koscache.layout import (
    LARGE_ROW_MAX,
    PAGE,
    SEGMENT_BYTES_MAX,
    FileHeader,
    Kind,
    Region,
    large_region_bytes,
)
from koscache.segments import Packed, Sealer, SegmentFile, open_read, read_segment, segment_path

_READ_PIECE: Final = 1 << 20
#: CURRENT, lock files, the socket, directories
_ODDS_BYTES: Final = 256 << 10
#: fewer, and two kinds of active segments, one being sealed and one spare have no place
_SEGMENTS_MIN: Final = 4
#: smaller ones are made if fewer would fit, so that an eviction never takes more than an eighth
SEGMENTS_WANTED: Final = 8


class Limits(NamedTuple):
    """All bytes. budget: for segments alone. min_free: of the file system."""

    budget: int
    segment: int
    block: int
    min_free: int


class Stats(msgspec.Struct, frozen=True):
    """Bytes used by kind (all count against size_bytes) and counters since open()."""

    size_bytes: int
    segment_bytes: int
    evicted_unreleased_bytes: int
    index_bytes: int
    fence_bytes: int
    records: int
    blocks: int
    segments: int
    evicted_segments: int
    evicted_blocks: int
    rescued_bytes: int
    bad_blocks: int

    @property
    def used_bytes(self) -> int:
        """Files on the disk now."""
        return self.segment_bytes + self.evicted_unreleased_bytes + self.index_bytes + self.fence_bytes


class Space:
    """One thread at a time."""

    def __init__(
        self,
        cache_dir: str,
        disk: Disk,
        environment: Environment,
        limits: Limits,
        rows: dict[int, SegmentRow],
        filling: Sequence[SegmentFile],
        next_segment: int,
    ) -> None:
        self._dir = cache_dir
        self._disk = disk
        self._environment = environment
        self._limits = limits
        self._next = next_segment
        self.live = {segment: row.size for segment, row in rows.items()}  # oldest first
        self.evicted: dict[int, int] = {}
        self._stuck: dict[int, bool] = {}  # evicted, the file could not be removed -> released since
        self.live_bytes = sum(self.live.values())
        self.evicted_bytes = 0
        self._writing = {each.id: each for each in sorted(filling, key=lambda each: each.id)}
        self._active: dict[Kind, SegmentFile] = {}
        self._sealing: dict[int, SegmentFile] = {}
        self._moved: set[int] = set()  # segments with entries that no index row knows of yet
        self._sealer = Sealer()
        self.failure: StoreFailed | None = None
        for (
            each
        ) in self._writing.values():  # the newest of each kind is filled further, the others are sealed by settle()
            self._active[each.header.kind] = each

    # ---- handing out

    def reserve(self, content: bytes, number: int, length: int) -> Extent | Refused:
        """Raises StoreFailed."""
        if not 0 < length <= self._limits.block:
            return Refused(Refusal.TOO_LARGE)
        active = self._active.get(Kind.LARGE)
        extent = None if active is None else active.reserve(content, number, length)
        if extent is None:
            fresh = self._replace(Kind.LARGE)
            if isinstance(fresh, Refusal):
                return Refused(fresh)
            extent = fresh.reserve(content, number, length)
            assert extent is not None, "a segment holds at least one block"
        return extent

    def pack(self, blocks: Sequence[Packed]) -> list[Location]:
        """Places of the first so many blocks for which there is room. Raises StoreFailed, having placed none that
        count."""
        placed: list[Location] = []
        while len(placed) < len(blocks):
            active = self._active.get(Kind.SMALL)
            step = [] if active is None else active.pack(blocks[len(placed) :])
            if active is not None and step:
                self._moved.add(active.id)
                placed += step
                continue
            fresh = self._replace(Kind.SMALL)
            if isinstance(fresh, Refusal):
                break
            step = fresh.pack(blocks[len(placed) :])
            if not step:
                break
            self._moved.add(fresh.id)
            placed += step
        return placed

    def writing(self, extent: Extent) -> SegmentFile | None:
        """The segment of an extent that is out; None for any other extent."""
        segment = self._writing.get(extent.segment)
        return segment if segment is not None and extent.offset in segment.outstanding else None

    def commit(self, extent: Extent, length: int, checksum: int, payload: bytes) -> Location:
        """See SegmentFile.commit."""
        segment = self._writing[extent.segment]
        try:
            location = segment.commit(extent, length, checksum, payload)
        except StoreFailed:
            # Perhaps half a header: a walk would end there. Sealed, the segment has a footer that names the others.
            if self._active.get(segment.header.kind) is segment:
                del self._active[segment.header.kind]
            raise
        self._moved.add(segment.id)
        return location

    def note_moved(self, txn: ix.Transaction) -> None:
        """Tells the index how far the segments go in which entries were placed; in the transaction that makes them
        known."""
        for segment in self._moved:
            each = self._writing.get(segment)
            if each is not None:
                row = SegmentRow(SegmentState.OPEN, each.size, 0, each.position)
                txn.put(ix.segment_key(segment), ix.encode_segment(row), db=self._environment.segments)

    def moved_noted(self) -> None:
        """The transaction was committed."""
        self._moved.clear()

    def may_grow(self) -> Refusal | None:
        """Whether one more segment may be made; None: yes. Raises StoreFailed."""
        if self.live_bytes + self.evicted_bytes + self._limits.segment > self._limits.budget:
            return Refusal.NO_SPACE
        if self._file_system_room() < self._limits.segment:
            return Refusal.DISK_NEARLY_FULL
        return None

    def lacks(self, goal_bytes: int) -> bool:
        """Whether less than goal_bytes are free or on their way to be (evicted, and not yet released)."""
        free = self._limits.budget - self.live_bytes - self.evicted_bytes
        return min(free, self._file_system_room()) + self.evicted_bytes < goal_bytes

    def _file_system_room(self) -> int:
        with disk_errors("asking for free space"):
            return self._disk.free_bytes(self._dir) - self._limits.min_free

    def _replace(self, kind: Kind) -> SegmentFile | Refusal:
        """A fresh segment for a full one. Refused: the full one stays, something shorter may still fit."""
        refusal = self.may_grow()
        if refusal is not None:
            return refusal
        header = FileHeader(self._next, kind, self._limits.block, self._limits.segment, secrets.randbits(64))
        self._next += 1
        fresh = SegmentFile.create(self._disk, segment_path(self._dir, header.segment), header)
        row = SegmentRow(SegmentState.OPEN, header.size, 0, fresh.position)
        try:
            with self._environment.write() as txn:
                txn.put(ix.segment_key(fresh.id), ix.encode_segment(row), db=self._environment.segments)
                txn.put(ix.NEXT_SEGMENT, ix.segment_key(self._next), db=self._environment.meta)
        except StoreFailed:
            fresh.close()
            with disk_errors("removing a segment"):
                self._disk.unlink(fresh.path)
            raise
        self.live[fresh.id] = fresh.size
        self.live_bytes += fresh.size
        self._writing[fresh.id] = fresh
        self._active[kind] = fresh
        self.settle()
        return fresh

    # ---- sealing

    def settle(self) -> None:
        """Seals what is full and has no extent out. A failing disk is noted in `failure`, not raised."""
        for segment in list(self._writing.values()):
            if segment.outstanding or self._active.get(segment.header.kind) is segment:
                continue
            del self._writing[segment.id]
            try:
                finish = segment.write_footer()
            except StoreFailed as error:
                self.failure = error  # it has no footer then; recovery can walk it
                segment.close()
                continue
            self._sealing[segment.id] = segment
            self._sealer.submit(segment, finish)

    def collect(self, *, wait: bool = False) -> None:
        """Notes the seals that have ended, and removes files that could not be removed before. Raises StoreFailed
        (index)."""
        self._unlink_stuck()
        ended = self._sealer.collect(wait=wait)
        if not ended:
            return
        failed = [each for each in ended if each.error is not None]
        for each in ended:
            del self._sealing[each.segment.id]
            each.segment.close()
        if failed:
            self.failure = StoreFailed(f"sealing a segment: {failed[0].error}")
        with self._environment.write() as txn:
            for each in failed:
                # After a failed fdatasync nobody knows which pages reached the disk: what is read back later may be
                # old bytes. So every block is checked before its next use.
                self._environment.put_unverified(txn, each.segment.id, each.segment.regions())
            for each in ended:
                row = SegmentRow(SegmentState.SEALED, each.segment.size, each.mtime_ns, each.segment.position)
                txn.put(ix.segment_key(each.segment.id), ix.encode_segment(row), db=self._environment.segments)

    @property
    def seals_waiting(self) -> int:
        return len(self._sealing)

    # ---- going

    def evictable(self) -> list[int]:
        """Segments that nobody fills or seals, the one that goes next first."""
        return [segment for segment in self.live if segment not in self._writing and segment not in self._sealing]

    def requeue(self, segment: int) -> None:
        """To the end of the queue."""
        self.live[segment] = self.live.pop(segment)

    def regions(self, segment: int) -> list[Region]:
        """Every entry that the segment's file names. Raises StoreFailed, also when it cannot be sure of all."""
        writing = self._writing.get(segment) or self._sealing.get(segment)
        if writing is not None:
            return writing.regions()
        fd = open_read(self._disk, segment_path(self._dir, segment))
        try:
            with disk_errors("reading a segment's table"):
                walk = read_segment(self._disk, fd, segment, self._limits.block)
        finally:
            self._disk.close(fd)
        if walk is None or not walk.clean:
            raise StoreFailed("a segment's table is garbled")
        return walk.blocks

    def open_segment(self, segment: int) -> int:
        """A descriptor for reading; the caller closes it. Raises StoreFailed."""
        return open_read(self._disk, segment_path(self._dir, segment))

    def checksum(self, location: Location) -> int | None:
        """xxh3_64 of the bytes that are there now; None: they cannot be read whole."""
        try:
            fd = self.open_segment(location.segment)
        except StoreFailed:
            return None
        hashed = xxh3_64()
        try:
            for at in range(0, location.length, _READ_PIECE):
                length = min(_READ_PIECE, location.length - at)
                piece = self._disk.read(fd, length, location.offset + at)
                if len(piece) != length:
                    return None
                hashed.update(piece)
        except OSError:
            return None
        finally:
            self._disk.close(fd)
        return hashed.intdigest()

    def copy_body(self, source: int, region: Region, extent: Extent) -> None:
        """A body from another segment into an extent, in the kernel. Raises StoreFailed."""
        target = self._writing[extent.segment]
        with disk_errors("moving a block"):
            self._disk.copy(source, target.fd, region.body_length, region.body_offset, extent.offset)

    def gone(self, segment: int) -> None:
        """The index has forgotten the segment: unlink it. Its bytes stay counted until released()."""
        size = self.live.pop(segment)
        self.live_bytes -= size
        self.evicted[segment] = size
        self.evicted_bytes += size
        self._stuck[segment] = False
        self._unlink_stuck()

    def released(self, segment: int) -> None:
        """Its bytes are free, unless its file could not be removed yet."""
        if segment in self._stuck:
            self._stuck[segment] = True
        else:
            self.evicted_bytes -= self.evicted.pop(segment, 0)

    def _unlink_stuck(self) -> None:
        for segment, is_released in list(self._stuck.items()):
            try:
                self._disk.unlink(segment_path(self._dir, segment))
            except OSError as error:
                self.failure = StoreFailed(f"removing a segment: {error}")
                return
            del self._stuck[segment]
            if is_released:
                self.released(segment)

    def files(self) -> Iterator[str]:
        """Paths of the live segments."""
        return (segment_path(self._dir, segment) for segment in self.live)

    # ---- the end

    def close(self, *, clean: bool) -> None:
        """Finishes seals; if clean, syncs what is being filled and notes its mtime. Raises StoreFailed."""
        self.collect(wait=True)
        self._sealer.close()
        if clean:
            rows: dict[int, SegmentRow] = {}
            with disk_errors("syncing segments"):
                for each in self._writing.values():
                    rows[each.id] = SegmentRow(SegmentState.OPEN, each.size, each.sync(), each.position)
                self._disk.sync_dir(os.path.dirname(segment_path(self._dir, 0)))
            with self._environment.write() as txn:
                for segment, row in rows.items():
                    txn.put(ix.segment_key(segment), ix.encode_segment(row), db=self._environment.segments)
        for each in self._writing.values():
            each.close()
        self._writing.clear()


def work_out_limits(config: StoreConfig) -> Limits:
    """Works out the segments' budget and size. Raises ConfigError with the arithmetic."""
    budget = config.size_bytes - config.index_bytes - FENCE_BYTES - _ODDS_BYTES
    least = large_region_bytes(config.block_bytes) + 2 * PAGE + LARGE_ROW_MAX
    least = -(-least // PAGE) * PAGE
    wanted = min(config.segment_bytes, budget // SEGMENTS_WANTED, SEGMENT_BYTES_MAX - PAGE)
    segment = max(wanted // PAGE * PAGE, least)
    if budget < _SEGMENTS_MIN * segment:
        needed = _SEGMENTS_MIN * least + config.index_bytes + FENCE_BYTES + _ODDS_BYTES
        raise ConfigError(
            f"cache.size is {config.size_bytes} bytes; with index_size {config.index_bytes} and block_size "
            f"{config.block_bytes} it must be at least {needed}: {_SEGMENTS_MIN} segments of {least}, the index, and "
            f"{FENCE_BYTES + _ODDS_BYTES} for the fence and odds"
        )
    return Limits(budget, segment, config.block_bytes, config.min_free_bytes)
