"""Carrying an eviction out: rescue what is hot, forget the rest, unlink the segment.

    read the segment's table -> which entries are alive, touched, pinned -> decide() -> copy those that move
    -> index: new places of the moved, then no places for the others, then the segment's row gone -> unlink

A crash leaves copies that nobody knows (dead space), or a segment that has fewer entries than its table says, or a
file that nobody knows (recovery unlinks it). A reader that looked an entry up before either opens the file in time or
finds it gone: a miss.

Owns: that order, and dropping records whose last block went. Does not own: the decision (eviction), space (space).

Invariant: an entry that moves is copied with its checksum as it was; nothing becomes verified by moving.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, NamedTuple

from koscache import index as ix
from koscache.content import Extent, Location, body_checksum
from koscache.disk import Disk, StoreFailed, disk_errors
from koscache.eviction import Candidate, Touches, decide, holds_too_many_pins
from koscache.index import Environment
from koscache.layout import LARGE_PAYLOAD_MAX, Region
from koscache.pins import Pins
from koscache.segments import Packed
from koscache.space import Space

#: bodies of small blocks that are held in memory while they move
_PACK_BYTES: Final = 4 << 20


class Moved(NamedTuple):
    region: Region
    location: Location


class Evictor:
    """One thread at a time."""

    def __init__(
        self, disk: Disk, environment: Environment, space: Space, touches: Touches, pins: Pins, small_bytes: int
    ) -> None:
        self._disk = disk
        self._environment = environment
        self._space = space
        self._touches = touches
        self._pins = pins
        self._small = small_bytes
        self._sweep_from = random.SystemRandom().randbytes(ix.OBJECT_HASH_BYTES)
        self.gone: list[int] = []
        self.segments_count = 0
        self.blocks_count = 0
        self.rescued_bytes = 0

    def evict_one(self, now: float) -> bool:
        """Evicts the next segment; False: none can go now. Raises StoreFailed."""
        victim = self._choose(now)
        if victim is None and self._space.seals_waiting:
            self._space.collect(wait=True)
            victim = self._choose(now)
        if victim is None:
            return False
        table = self._table(victim)
        regions = table or []
        candidates, alive = self._look_up(victim, regions, now)
        fates = decide(candidates, self._space.live[victim])
        moving = [region for region, fate in zip(regions, fates, strict=True) if fate.moves]
        moved = self._rescue(victim, moving, alive) if moving else []
        went = sum(each.alive for each in candidates) - len(moved)
        self._forget(victim, table, moved)
        self._space.gone(victim)
        self._space.settle()
        self.gone.append(victim)
        self.segments_count += 1
        self.blocks_count += went
        self.rescued_bytes += sum(each.location.length for each in moved)
        return True

    # ---- choosing

    def _choose(self, now: float) -> int | None:
        evictable = self._space.evictable()
        if not self._pins:
            return evictable[0] if evictable else None
        for segment in evictable:
            candidates, _ = self._look_up(segment, self._table(segment) or [], now)
            if not holds_too_many_pins(candidates, self._space.live[segment]):
                return segment
            self._space.requeue(segment)
        return evictable[0] if evictable else None

    def _table(self, segment: int) -> list[Region] | None:
        """None: it cannot be read. The segment goes all the same; its entries are then searched in the index."""
        try:
            return self._space.regions(segment)
        except StoreFailed:
            return None

    def _look_up(
        self, segment: int, regions: Sequence[Region], now: float
    ) -> tuple[list[Candidate], dict[int, Location]]:
        """Candidates in the regions' order, and by region offset where the index has those that are alive."""
        candidates: list[Candidate] = []
        alive: dict[int, Location] = {}
        with self._environment.read() as txn:
            for region in regions:
                key = ix.block_key(region.content, region.number)
                value = txn.get(key, db=self._environment.blocks)
                location = None if value is None else ix.decode_location(key, value)
                lives = (
                    location is not None
                    and location.segment == segment
                    and location.offset == region.body_offset
                    and location.length == region.body_length
                )
                if lives and location is not None:
                    alive[region.offset] = location
                pinned = self._pins.holds(region.content, now)
                candidates.append(Candidate(region.length, lives, pinned, key in self._touches))
        return candidates, alive

    # ---- moving

    def _rescue(self, victim: int, moving: Sequence[Region], alive: dict[int, Location]) -> list[Moved]:
        """Copies what can be copied. Running out of room or a failing disk ends it early: what was not moved goes."""
        moved: list[Moved] = []
        try:
            source = self._space.open_segment(victim)
        except StoreFailed as error:
            self._space.failure = error
            return moved
        try:
            large = [region for region in moving if region.body_length > self._small]
            small = [region for region in moving if region.body_length <= self._small]
            for region in large:
                location = self._move_large(source, region)
                if location is None:
                    break
                moved.append(Moved(region, location._replace(verified=alive[region.offset].verified)))
            self._move_small(source, small, moved)
        except StoreFailed as error:
            self._space.failure = error
        finally:
            self._disk.close(source)
        return moved

    def _move_large(self, source: int, region: Region) -> Location | None:
        extent = self._space.reserve(region.content, region.number, region.body_length)
        if not isinstance(extent, Extent):
            return None
        try:
            self._space.copy_body(source, region, extent)
        except StoreFailed:
            segment = self._space.writing(extent)
            if segment is not None:
                segment.abandon(extent.offset)
            raise
        payload = region.payload if len(region.payload) <= LARGE_PAYLOAD_MAX else b""
        return self._space.commit(extent, region.body_length, region.checksum, payload)

    def _move_small(self, source: int, regions: Sequence[Region], moved: list[Moved]) -> None:
        """In batches. The bodies pass through memory, so they are checked on the way: bad ones stay behind."""
        batch: list[Region] = []
        blocks: list[Packed] = []
        held = 0
        for region in (*regions, None):
            if region is None or held > _PACK_BYTES:
                places = self._space.pack(blocks)
                moved.extend(map(Moved, batch, places))
                if len(places) < len(blocks):
                    return
                batch, blocks, held = [], [], 0
            if region is None:
                return
            with disk_errors("moving a block"):
                body = self._disk.read(source, region.body_length, region.body_offset)
            if len(body) != region.body_length or body_checksum(body) != region.checksum:
                continue
            batch.append(region)
            blocks.append(Packed(region.content, region.number, region.checksum, region.payload, body))
            held += len(body)

    # ---- forgetting

    def _forget(self, victim: int, regions: Sequence[Region] | None, moved: Sequence[Moved]) -> None:
        """In steps, each right by itself: first the moved are found at their new places, then the others not at all,
        and when no entry is left in the segment, it goes."""
        environment = self._environment
        for begin in range(0, len(moved), ix.CHANGES_MAX):
            with environment.write() as txn:
                for region, location in moved[begin : begin + ix.CHANGES_MAX]:
                    key = ix.block_key(region.content, region.number)
                    txn.put(key, ix.encode_location(key, location), db=environment.blocks)
                    self._touches.discard(key)
                self._space.note_moved(txn)
        self._space.moved_noted()
        for begin in range(0, len(regions or ()), ix.CHANGES_MAX):
            with environment.write() as txn:
                self._forget_regions(txn, victim, (regions or ())[begin : begin + ix.CHANGES_MAX])
        if regions is None:
            environment.revise(lambda location: None if location.segment == victim else location)
        with environment.write() as txn:
            txn.delete(ix.segment_key(victim), db=environment.segments)

    def _forget_regions(self, txn: ix.Transaction, victim: int, regions: Sequence[Region]) -> None:
        environment = self._environment
        for region in regions:
            key = ix.block_key(region.content, region.number)
            value = txn.get(key, db=environment.blocks)
            present = None if value is None else ix.decode_location(key, value)
            if value is None or (present is not None and present.segment != victim):
                continue
            txn.delete(key, db=environment.blocks)
            self._touches.discard(key)
            if len(region.payload) > ix.OBJECT_HASH_BYTES:
                _drop_orphan(environment, txn, region.payload[: ix.OBJECT_HASH_BYTES], region.content)

    def sweep_records(self, count: int) -> int:
        """Looks at the next `count` records and drops those of which no block is here: HEAD requests and blocks that
        went leave them behind. Returns how many were dropped. Raises StoreFailed."""
        environment = self._environment
        dropped = 0
        with environment.write() as txn, txn.cursor(environment.objects) as cursor:
            more = cursor.set_range(self._sweep_from) or cursor.first()
            for _ in range(count):
                if not more:
                    more = False
                    break
                content = ix.record_content(cursor.value())
                if _has_blocks(environment, txn, content):
                    more = cursor.next()
                else:
                    more = cursor.delete() and bool(cursor.key())
                    dropped += 1
            self._sweep_from = cursor.key() if more else bytes(ix.OBJECT_HASH_BYTES)
        return dropped


def _has_blocks(environment: Environment, txn: ix.Transaction, content: bytes) -> bool:
    with txn.cursor(environment.blocks) as cursor:
        return cursor.set_range(ix.block_key(content, 0)) and cursor.key().startswith(content)


def _drop_orphan(environment: Environment, txn: ix.Transaction, object_hash: bytes, content: bytes) -> None:
    """Drops the object's record if it is of this version and no block of it is left."""
    value = txn.get(object_hash, db=environment.objects)
    if value is not None and ix.record_content(value) == content and not _has_blocks(environment, txn, content):
        txn.delete(object_hash, db=environment.objects)
