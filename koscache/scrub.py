"""The scrub: reads the store round and round, slowly, and drops what is not what was written.

Owns: its place in the round, also inside a block, so that no step reads more than its budget. Does not own: the pace
(the daemon calls step() with as many bytes as the rate allows), nor what dropping means (store).

Invariant: an entry is judged only by all of its bytes, read while the index had it at that very place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec
from xxhash import xxh3_64

from koscache.content import Location
from koscache.disk import Disk, StoreFailed
from koscache.layout import Region
from koscache.space import Space

_PIECE: Final = 1 << 20


class ScrubReport(msgspec.Struct, frozen=True):
    """One step. bad: (content, number) of the entries that were dropped. round_finished: the oldest segment is next."""

    bytes_read: int
    entries: int
    bad: tuple[tuple[bytes, int], ...]
    round_finished: bool


class Judged(NamedTuple):
    """What the store is told of an entry that was read whole."""

    region: Region
    location: Location
    good: bool


class Scrubber:
    """locate: where the index has a block now. judged: the store's reaction, for every entry read."""

    def __init__(
        self,
        disk: Disk,
        space: Space,
        locate: Callable[[bytes, int], Location | None],
        judged: Callable[[Judged], None],
    ) -> None:
        self._disk = disk
        self._space = space
        self._locate = locate
        self._judged = judged
        self._segment = -1  # the last one finished or the one in hand
        self._regions: list[Region] = []
        self._fd = -1
        self._offset = 0  # inside the last of _regions
        self._hash = xxh3_64()

    def step(self, budget_bytes: int) -> ScrubReport:
        """Reads at most budget_bytes. Raises StoreFailed (index); a block that the disk cannot read is a bad one."""
        left = budget_bytes
        entries = 0
        bad: list[tuple[bytes, int]] = []
        while left > 0:
            if not self._regions and not self._next_segment():
                return ScrubReport(budget_bytes - left, entries, tuple(bad), True)
            if not self._regions:
                continue
            region = self._regions[-1]
            location = self._locate(region.content, region.number)
            if (
                location is None
                or location[:3] != (self._segment, region.body_offset, region.body_length)
                or self._segment not in self._space.live
            ):
                self._next_region()
                continue
            length = min(left, _PIECE, region.body_length - self._offset)
            piece = self._read(region.body_offset + self._offset, length)
            left -= length
            self._hash.update(piece)
            self._offset += length
            if len(piece) == length and self._offset < region.body_length:
                continue
            good = len(piece) == length and self._hash.intdigest() == location.checksum
            entries += 1
            if not good:
                bad.append((region.content, region.number))
            self._next_region()
            self._judged(Judged(region, location, good))
        return ScrubReport(budget_bytes - left, entries, tuple(bad), False)

    def _read(self, offset: int, length: int) -> bytes:
        try:
            return self._disk.read(self._fd, length, offset)
        except OSError:
            return b""

    def _next_region(self) -> None:
        self._regions.pop()
        self._offset = 0
        self._hash = xxh3_64()

    def _next_segment(self) -> bool:
        """Takes up the next segment by id; False at the end of the round."""
        self.close()
        following = [segment for segment in self._space.live if segment > self._segment]
        if not following:
            self._segment = -1
            return False
        self._segment = min(following)
        try:
            self._fd = self._space.open_segment(self._segment)
            self._regions = self._space.regions(self._segment)
            self._regions.reverse()  # taken from the end
        except StoreFailed:  # cannot be read: its blocks are found out when they are used
            self._regions = []
        return True

    def close(self) -> None:
        """Lets go of the segment in hand."""
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._fd = -1
        self._regions = []
        self._offset = 0
        self._hash = xxh3_64()
