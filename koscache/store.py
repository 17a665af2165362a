"""The block store as the daemon uses it (signatures first; bodies follow)."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import msgspec

from koscache.content import Commit, Extent, Location, Record, Refused, Small, StoreConfig
from koscache.disk import Disk, StoreFailed
from koscache.fence import Fence

__all__ = ["RecoveryReport", "ScrubReport", "Stats", "Store", "StoreFailed"]


class WallClock(Protocol):
    def now(self) -> float: ...
    def monotonic(self) -> float: ...


class RecoveryPolicy(Enum):
    LENIENT = "lenient"
    STRICT = "strict"


class RecoveryReport(msgspec.Struct, frozen=True):
    """What open() found. kept, dropped: blocks. index: "trusted" or "rebuilt" and reason why."""

    index: str
    reason: str
    kept: int
    dropped: int
    segments: int
    segments_dropped: int
    seconds: float


class ScrubReport(msgspec.Struct, frozen=True):
    """One scrub step. bad: (content, number) of entries dropped because their checksum did not hold."""

    bytes_read: int
    entries: int
    bad: tuple[tuple[bytes, int], ...]
    round_finished: bool


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
        return self.segment_bytes + self.evicted_unreleased_bytes + self.index_bytes + self.fence_bytes


class Store:
    """All methods are synchronous, may block on the disk, and must be called from one thread at a time.

    Every method may raise StoreFailed; then what was asked for did not happen and the store is still consistent.
    """

    recovery: RecoveryReport
    fence: Fence

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
        """Recovers what is in config.dir, or begins anew. One Store per directory (a lock file; StoreFailed if held)."""
        raise NotImplementedError

    def reserve(self, content: bytes, number: int, length: int) -> Extent | Refused:
        """Space for one block of exactly or at most `length` bytes. Never evicts: on NO_SPACE call evict()."""
        raise NotImplementedError

    def commit(self, commits: Sequence[Commit]) -> list[bool]:
        """Makes filled extents findable, in one transaction. False for an extent that this store did not hand out (an
        earlier daemon did) or that was abandoned. Records inside go to disk only, not into the index."""
        raise NotImplementedError

    def abandon(self, extent: Extent) -> None:
        """The fill failed: dead space until the segment is evicted. Unknown extents are ignored."""
        raise NotImplementedError

    def put_small(self, smalls: Sequence[Small]) -> list[bool]:
        """Packs bodies, one write and one transaction, and puts their records. False where there was no space (the record
        is put all the same)."""
        raise NotImplementedError

    def put_record(self, bucket: str, key: str, record: Record) -> bool:
        """Keeps the record unless the index has one that is newer (see recovery of races in the module's docstring)."""
        raise NotImplementedError

    def drop_record(self, bucket: str, key: str) -> None: ...

    def record(self, bucket: str, key: str) -> Record | None:
        raise NotImplementedError

    def locate(self, content: bytes, number: int) -> Location | None:
        raise NotImplementedError

    def touched(self, blocks: Sequence[tuple[bytes, int]]) -> None:
        """Blocks that were read; lossy by design. They move on instead of going when their segment is evicted."""

    def evict(self, need_bytes: int = 0) -> list[int]:
        """Frees room for need_bytes, keeps a spare segment and min_free_bytes, and returns every segment that went since the
        last call (also those that had to go inside other calls): broadcast them, then released(segment) for each when all
        workers have closed it. Cheap when there is nothing to do: call it after every batch."""
        raise NotImplementedError

    def released(self, segment: int) -> None:
        """No worker holds the evicted segment any more: its bytes are free."""

    def verify(self, content: bytes, number: int) -> bool:
        """Reads a block and checks it; a good one becomes verified, a bad one is dropped. False: not there (any more)."""
        raise NotImplementedError

    def scrub_step(self, budget_bytes: int) -> ScrubReport:
        """Checks the next budget_bytes of the store."""
        raise NotImplementedError

    def pin(self, content: bytes, until: float) -> bool:
        """Holds the blocks of a version until the epoch second `until`. False when too many are pinned."""
        raise NotImplementedError

    def unpin(self, content: bytes) -> None: ...

    def probe(self) -> None:
        """Tries whether the disk takes a write again; StoreFailed if not. For turning caching on again."""

    def stats(self) -> Stats:
        raise NotImplementedError

    def close(self) -> None:
        """Syncs and leaves the clean mark."""
