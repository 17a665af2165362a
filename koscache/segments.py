"""Segment files: making, filling, sealing, and reading them back.

    create -> reserve ... commit | abandon        (bodies of large blocks are written by the workers, into their
    extents)
           -> pack                                (small blocks, whole)
           -> seal: footer, fdatasync, trailer, fdatasync; from then on nobody writes to the file, it is only unlinked

Owns: one file's positions, its table of entries, its outstanding extents. Does not own: which segment is filled next or
goes next (store, eviction), nor the index.

Invariant: space is handed out once. `position` only moves forward, and only past a region whose header is on the
file; a reservation keeps its bytes until the whole segment is gone, whatever becomes of the fill, because the worker
that had it may still be writing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NamedTuple

from koscache.content import Extent, Location
from koscache.disk import Disk, StoreFailed, disk_errors
from koscache.layout import (
    LARGE_ROW_MAX,
    PAGE,
    REGION_HEADER_BYTES,
    ROW_BYTES,
    TRAILER_BYTES,
    FileHeader,
    Kind,
    Region,
    RegionKind,
    Trailer,
    align,
    footer_checksum,
    large_region_bytes,
    pack_file_header,
    pack_region,
    pack_row,
    pack_trailer,
    parse_file_header,
    parse_region,
    parse_rows,
    parse_trailer,
    payload_length_at,
    small_region_bytes,
)

SEGMENTS_DIR: Final = "segments"
_SUFFIX: Final = ".seg"
_WINDOW: Final = 1 << 20
_TAIL_READ: Final = 64 << 10
#: segments whose seal waits for the disk; more, and the writer waits too, so dirty pages stay bounded
_SEALS_MAX: Final = 4


def segment_path(cache_dir: str, segment: int) -> str:
    return os.path.join(cache_dir, SEGMENTS_DIR, f"{segment:016x}{_SUFFIX}")


def parse_segment_name(name: str) -> int | None:
    """The id in a file name; None for a name that is none of ours."""
    stem = name.removesuffix(_SUFFIX)
    if stem == name or len(stem) != 16:
        return None
    try:
        return int(stem, 16)
    except ValueError:
        return None


class Packed(NamedTuple):
    """A small block to be packed."""

    content: bytes
    number: int
    checksum: int
    payload: bytes
    body: bytes


class SegmentFile:
    """A segment that is being filled. One thread at a time."""

    def __init__(self, disk: Disk, path: str, fd: int, header: FileHeader) -> None:
        self.header = header
        self.path = path
        self.size = header.size
        self.position = PAGE
        self.table = bytearray()
        self.rows = 0
        self.outstanding: dict[int, Region] = {}  # by body offset
        self._disk = disk
        self.fd = fd

    @property
    def id(self) -> int:
        return self.header.segment

    @classmethod
    def create(cls, disk: Disk, path: str, header: FileHeader) -> SegmentFile:
        """A preallocated file with its header. Raises StoreFailed and leaves nothing behind."""
        with disk_errors("making a segment"):
            fd = disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                disk.allocate(fd, header.size)
                disk.write(fd, pack_file_header(header), 0)
            except OSError:
                disk.close(fd)
                disk.unlink(path)
                raise
        return cls(disk, path, fd, header)

    @classmethod
    def resume(cls, disk: Disk, path: str, fd: int, walk: Walk) -> SegmentFile:
        """Goes on behind the last region of a file that was walked cleanly; reservations in it are dead space."""
        segment = cls(disk, path, fd, walk.header)
        segment.size = walk.size
        segment.position = walk.position
        for region in walk.blocks:
            segment._add_row(region.offset, pack_region(region, walk.header.nonce))
        return segment

    def _room(self, region_bytes: int, row_bytes: int) -> bool:
        owed = len(self.outstanding) * LARGE_ROW_MAX
        return self.position + region_bytes + len(self.table) + owed + row_bytes + TRAILER_BYTES <= self.size

    def reserve(self, content: bytes, number: int, length: int) -> Extent | None:
        """None: no room. Raises StoreFailed."""
        region_bytes = large_region_bytes(length)
        if not self._room(region_bytes, LARGE_ROW_MAX):
            return None
        at = self.position
        region = Region(RegionKind.RESERVED, at, region_bytes, content, number, at + PAGE, length, 0, b"")
        with disk_errors("reserving space"):
            self._disk.write(self.fd, pack_region(region, self.header.nonce), at)
        self.position += region_bytes
        self.outstanding[region.body_offset] = region
        return Extent(self.id, region.body_offset, length, self.path)

    def commit(self, extent: Extent, length: int, checksum: int, payload: bytes) -> Location:
        """Turns a filled reservation into an entry, body first, header now. payload: at most LARGE_PAYLOAD_MAX bytes.
        Raises StoreFailed; the reservation is dead space then."""
        reserved = self.outstanding.pop(extent.offset)
        assert 0 < length <= reserved.body_length, "a reservation may be shrunk, never grown"
        region = reserved._replace(kind=RegionKind.BLOCK, body_length=length, checksum=checksum, payload=payload)
        packed = pack_region(region, self.header.nonce)
        with disk_errors("committing a block"):
            self._disk.write(self.fd, packed, region.offset)
        self._add_row(region.offset, packed)
        return Location(self.id, region.body_offset, length, checksum, True)

    def abandon(self, offset: int) -> None:
        self.outstanding.pop(offset, None)

    def pack(self, blocks: Sequence[Packed]) -> list[Location]:
        """As many of the blocks, from the first on, as there is room for, in one write. Raises StoreFailed, having
        packed none."""
        written = bytearray()
        rows: list[tuple[int, bytes]] = []
        locations: list[Location] = []
        rows_bytes = 0
        for block in blocks:
            length = small_region_bytes(len(block.payload), len(block.body))
            rows_bytes += ROW_BYTES + len(block.payload)
            if not self._room(len(written) + length, rows_bytes):
                break
            at = self.position + len(written)
            body_at = at + REGION_HEADER_BYTES + len(block.payload)
            region = Region(
                RegionKind.BLOCK,
                at,
                length,
                block.content,
                block.number,
                body_at,
                len(block.body),
                block.checksum,
                block.payload,
            )
            packed = pack_region(region, self.header.nonce)
            rows.append((at, packed))
            written += packed
            written += block.body
            written += bytes(at + length - self.position - len(written))
            locations.append(Location(self.id, body_at, len(block.body), block.checksum, True))
        with disk_errors("packing small blocks"):
            self._disk.write(self.fd, written, self.position)
        self.position += len(written)
        for at, packed in rows:
            self._add_row(at, packed)
        return locations

    def _add_row(self, offset: int, header_and_payload: bytes) -> None:
        self.table += pack_row(offset, header_and_payload)
        self.rows += 1

    def write_footer(self, *, shorten: bool = False) -> Callable[[], int]:
        """Writes the footer and returns what remains to be done to seal, which may wait long for the disk: sync,
        trailer, sync; it returns the file's mtime in ns and may run in another thread. Raises StoreFailed, it raises
        OSError.

        shorten: cut the file behind the last region, so that a segment sealed early takes no more than it holds.
        """
        assert not self.outstanding, "sealed under a fill"
        length = len(self.table)
        size = align(self.position + length + TRAILER_BYTES, PAGE) if shorten else self.size
        at = size - TRAILER_BYTES - length
        trailer = pack_trailer(self.header, size, Trailer(self.rows, at, length, footer_checksum(self.table)))
        with disk_errors("writing a footer"):
            if size < self.size:
                self._disk.truncate(self.fd, size)
            self.size = size
            self._disk.write(self.fd, self.table, at)
        disk, fd, directory = self._disk, self.fd, os.path.dirname(self.path)

        def finish() -> int:
            disk.sync(fd)
            disk.write(fd, trailer, size - TRAILER_BYTES)
            disk.sync(fd)
            disk.sync_dir(directory)
            return disk.mtime_ns(fd)

        return finish

    def regions(self) -> list[Region]:
        """Every entry so far."""
        rows = parse_rows(self.table, self.header.nonce)
        assert rows is not None, "the table was made here"
        return list(rows)

    def sync(self) -> int:
        """fdatasync; the file's mtime in ns. Raises OSError."""
        self._disk.sync(self.fd)
        return self._disk.mtime_ns(self.fd)

    def close(self) -> None:
        self._disk.close(self.fd)


class Sealed(NamedTuple):
    """The outcome of a seal: mtime_ns of the file, or the disk's error."""

    segment: SegmentFile
    mtime_ns: int
    error: OSError | None


class Sealer:
    """Runs the waiting part of seals on one thread, so that commits do not wait for the disk."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kos-seal")
        self._running: dict[Future[int], SegmentFile] = {}

    def __len__(self) -> int:
        return len(self._running)

    def submit(self, segment: SegmentFile, finish: Callable[[], int]) -> None:
        if len(self._running) >= _SEALS_MAX:
            next(iter(self._running)).exception()  # waits for the oldest
        self._running[self._thread.submit(finish)] = segment

    def collect(self, *, wait: bool = False) -> list[Sealed]:
        """What has ended since the last call; with wait, everything."""
        ended: list[Sealed] = []
        for future in list(self._running):
            if not wait and not future.done():
                continue
            segment = self._running.pop(future)
            try:
                ended.append(Sealed(segment, future.result(), None))
            except OSError as error:
                ended.append(Sealed(segment, 0, error))
        return ended

    def close(self) -> None:
        self._thread.shutdown()


class Walk(NamedTuple):
    """What a file holds. blocks: its entries. position: behind the last region. clean: the walk ended where the file
    was never written to (or the footer was read), not at something garbled. sealed: read from a footer."""

    header: FileHeader
    size: int
    blocks: list[Region]
    position: int
    clean: bool
    sealed: bool


def read_header(disk: Disk, fd: int) -> FileHeader | None:
    return parse_file_header(disk.read(fd, PAGE, 0))


def read_footer(disk: Disk, fd: int, header: FileHeader, size: int) -> list[Region] | None:
    """The entries of a sealed segment, mostly by one read. None: not sealed, or garbled. Raises OSError."""
    tail_at = max(size - _TAIL_READ, 0)
    tail = disk.read(fd, size - tail_at, tail_at)
    trailer = parse_trailer(tail[-TRAILER_BYTES:], header, size)
    if trailer is None:
        return None
    if trailer.footer_offset >= tail_at:
        begin = trailer.footer_offset - tail_at
        footer = tail[begin : begin + trailer.footer_length]
    else:
        footer = disk.read(fd, trailer.footer_length, trailer.footer_offset)
    if footer_checksum(footer) != trailer.footer_checksum:
        return None
    rows = parse_rows(footer, header.nonce)
    return None if rows is None else list(rows)


def walk_regions(disk: Disk, fd: int, header: FileHeader, size: int) -> Walk:
    """Goes from region header to region header. Raises OSError."""
    step = PAGE if header.kind is Kind.LARGE else _WINDOW
    window, window_at = b"", 0
    blocks: list[Region] = []
    at = PAGE
    clean = True
    while at + REGION_HEADER_BYTES <= size:
        relative = at - window_at
        needed = REGION_HEADER_BYTES + payload_length_at(window, relative)
        if relative < 0 or relative + needed > len(window):
            window, window_at, relative = disk.read(fd, step, at), at, 0
            needed = REGION_HEADER_BYTES + payload_length_at(window, 0)
            if len(window) < needed <= size - at:
                window = disk.read(fd, needed, at)
        region = parse_region(window, relative, at, header.nonce)
        if region is None or at + region.length > size or region.length < REGION_HEADER_BYTES:
            clean = not any(window[relative : relative + REGION_HEADER_BYTES])
            break
        if region.kind is RegionKind.BLOCK:
            blocks.append(region)
        at += region.length
    return Walk(header, size, blocks, at, clean, False)


def read_segment(disk: Disk, fd: int, segment: int, block_bytes: int) -> Walk | None:
    """What a segment file of unknown state holds: by its footer, else by walking. None: not a file of this store.
    Raises OSError."""
    header = read_header(disk, fd)
    if header is None or header.segment != segment or header.block_bytes != block_bytes:
        return None
    size = disk.size(fd)
    regions = read_footer(disk, fd, header, size)
    if regions is not None:
        return Walk(header, size, regions, size, True, True)
    return walk_regions(disk, fd, header, size)


def open_read(disk: Disk, path: str) -> int:
    """A descriptor for reading. Raises StoreFailed."""
    try:
        return disk.open(path, os.O_RDONLY)
    except OSError as error:
        raise StoreFailed(f"opening a segment: {error}") from error
