"""The block store as workers read it (signatures first; bodies follow)."""

from __future__ import annotations

from koscache.content import Location, Record
from koscache.disk import SegmentGone
from koscache.fence import Fence

__all__ = ["Reader", "SegmentGone"]


class Reader:
    """Safe to use from several threads. Works with no daemon running; finds nothing when no index exists yet."""

    fence: Fence

    def __init__(self, cache_dir: str, *, open_max: int = 1024) -> None:
        """open_max: segment descriptors kept open when nobody borrows them."""

    def open(self) -> bool:
        """Opens fence (made if missing) and index. False when there is no usable index yet: reopen() later."""
        raise NotImplementedError

    def reopen(self) -> bool:
        """The daemon said hello: follow CURRENT to its index and fence. Descriptors of segments stay."""
        raise NotImplementedError

    def record(self, bucket: str, key: str) -> Record | None:
        raise NotImplementedError

    def locate(self, content: bytes, number: int) -> Location | None:
        raise NotImplementedError

    def locate_run(self, content: bytes, first: int, stop: int) -> list[Location] | None:
        """All blocks first..stop-1 from one snapshot, or None if any is missing."""
        raise NotImplementedError

    def blocks(self, content: bytes) -> list[tuple[int, Location]]:
        """Every cached block of a version, by number (explain)."""
        raise NotImplementedError

    def borrow(self, segment: int) -> int:
        """A read-only descriptor, good until give_back. Raises SegmentGone (also after drop)."""
        raise NotImplementedError

    def give_back(self, segment: int) -> bool:
        """True when this closed a segment that was dropped meanwhile: acknowledge it to the daemon now."""
        raise NotImplementedError

    def drop(self, segment: int) -> bool:
        """The daemon evicted it. True: closed now, acknowledge. False: borrowed; the last give_back says True."""
        raise NotImplementedError

    def check(self, location: Location) -> bool:
        """Reads a block and compares its checksum (blocks on the disk). Raises SegmentGone."""
        raise NotImplementedError

    def segment_path(self, segment: int) -> str:
        raise NotImplementedError

    def close(self) -> None: ...
