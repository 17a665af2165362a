"""What the store has, told a page at a time: for whoever gives it to other nodes, and for whoever shows it.

    by segment   the newest first: there is what was filled last, and what eviction moved on because it was read. Its table
                 names the object of each block, but for short ones that were filled without their record.
    by object    all blocks of all records, in no order that means anything. A node has no record of most objects of which it
                 keeps blocks for others.

Owns: these two ways through segments and index, pages. Does not own: either of them (space, index), what was read (eviction).

Invariant: no read transaction outlives a page, for one that stays open pins every page of the index that is replaced
meanwhile; nothing is held between pages but one segment's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from koscache import index as ix
from koscache.content import CONTENT_BYTES, Location, Record
from koscache.disk import StoreFailed
from koscache.eviction import Touches
from koscache.index import Environment, Named
from koscache.layout import Region
from koscache.space import Space

#: Entries, objects or blocks, that are looked at in one read transaction: two or three milliseconds.
_PAGE_ENTRIES: Final = 256


class Held(NamedTuple):
    """A block of the present version of an object, as far as this node knows. length: bytes."""

    bucket: str
    name: str
    record: Record
    number: int
    length: int
    verified: bool


class Place(NamedTuple):
    """Where a page begins: block `number` of an object's, by its hash, or of the next one that there is."""

    object_hash: bytes = b""
    number: int = 0


class SegmentPage(NamedTuple):
    """next: the entry to go on at; None at the segment's end."""

    held: list[Held]
    next: int | None


class ObjectsPage(NamedTuple):
    """next: where to go on; None at the end."""

    held: list[Held]
    next: Place | None


class Inventory:
    """One thread at a time: the store's."""

    def __init__(self, environment: Environment, space: Space, touches: Touches) -> None:
        self._environment = environment
        self._space = space
        self._touches = touches
        self._segment = -1
        self._table: list[Region] = []

    # ---- by segment

    def segments(self) -> list[int]:
        """The newest first; some may be gone when they are looked at."""
        return list(reversed(self._space.live))

    def of_segment(self, segment: int, start: int, hot: bool) -> SegmentPage:
        """Blocks of a segment, the last written first; `start`: the entry to begin at. hot: those alone that were read since they
        were written. None of a segment that is gone or whose table cannot be read. The first page reads all of the table, as
        an eviction does: 4 µs an entry."""
        if segment != self._segment:
            self._table, self._segment = self._read_table(segment), segment
        stop = start + _PAGE_ENTRIES
        held = self._look_up(segment, self._table[start:stop], hot)
        if stop < len(self._table):
            return SegmentPage(held, stop)
        self._segment, self._table = -1, []
        return SegmentPage(held, None)

    def _read_table(self, segment: int) -> list[Region]:
        if segment not in self._space.live:
            return []
        try:
            return self._space.regions(segment)[::-1]
        except StoreFailed:
            return []  # its blocks are found by their objects

    def _look_up(self, segment: int, regions: Sequence[Region], hot: bool) -> list[Held]:
        environment = self._environment
        held: list[Held] = []
        with environment.read() as txn:
            for region in regions:
                key = ix.block_key(region.content, region.number)
                hashed, kept = region.payload[: ix.OBJECT_HASH_BYTES], region.payload[ix.OBJECT_HASH_BYTES :]
                if not kept or (hot and key not in self._touches):
                    continue
                location = _location(key, txn.get(key, db=environment.blocks))
                if location is None or (location.segment, location.offset) != (segment, region.body_offset):
                    continue
                value = txn.get(hashed, db=environment.objects) or kept
                if ix.record_content(value) == region.content:  # else a later version is known
                    named = ix.decode_record(hashed, value)
                    if named is not None:
                        held.append(_held(named, region.number, location))
        return held

    # ---- by object

    def of_objects(self, start: Place, hot: bool) -> ObjectsPage:
        """Blocks of records, from `start` on. hot: those alone that were read since they were written."""
        environment = self._environment
        held: list[Held] = []
        left = _PAGE_ENTRIES
        with (
            environment.read() as txn,
            txn.cursor(environment.objects) as objects,
            txn.cursor(environment.blocks) as blocks,
        ):
            more = objects.set_range(start.object_hash) if start.object_hash else objects.first()
            while more:
                hashed, value = objects.item()
                if left <= 0:
                    return ObjectsPage(held, Place(hashed))
                left -= 1
                content = ix.record_content(value)
                named: Named | None = None
                found = blocks.set_range(ix.block_key(content, start.number if hashed == start.object_hash else 0))
                while found and blocks.key()[:CONTENT_BYTES] == content:
                    key = blocks.key()
                    _, number = ix.parse_block_key(key)
                    if left <= 0:
                        return ObjectsPage(held, Place(hashed, number))
                    left -= 1
                    location = _location(key, blocks.value())
                    if location is not None and (not hot or key in self._touches):
                        named = named or ix.decode_record(hashed, value)
                        if named is None:
                            break
                        held.append(_held(named, number, location))
                    found = blocks.next()
                more = objects.next()
        return ObjectsPage(held, None)

    def numbers(self, content: bytes) -> list[int]:
        """Which blocks of a version are here, rising."""
        found: list[int] = []
        with self._environment.read() as txn, txn.cursor(self._environment.blocks) as cursor:
            more = cursor.set_range(ix.block_key(content, 0))
            while more and cursor.key()[:CONTENT_BYTES] == content:
                found.append(ix.parse_block_key(cursor.key())[1])
                more = cursor.next()
        return found


def _location(key: bytes, value: bytes | None) -> Location | None:
    return None if value is None else ix.decode_location(key, value)


def _held(named: Named, number: int, location: Location) -> Held:
    return Held(named.bucket, named.key, named.record, number, location.length, location.verified)


def runs_of(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open runs of rising numbers: [0, 1, 2, 5] -> [(0, 3), (5, 6)]."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
