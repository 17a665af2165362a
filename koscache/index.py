"""The index: one LMDB environment, written by the daemon, read by every worker of the node.

    objects   object hash (16)          -> seal, content id, bucket, key, record
    blocks    content id (16), number   -> seal, location
    segments  segment id                -> SegmentRow
    meta      next_segment, pin:<content id>

Index directories are numbered and never used again (`index-0000000003`); the file CURRENT names the one in use. So a
reader that still maps an old one reads old truths, never somebody else's pages.

Owns: the environment, its keys and values, CURRENT. Does not own: when an index may be trusted (recovery).

Invariant: every value carries a seal over its key and itself. Written without fsync and mapped by many processes, an
index page can rot like any other; a value whose seal does not hold is no value, so rot costs a miss, never a wrong
byte.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import Final, TypeAlias

import lmdb
import msgspec
from xxhash import xxh3_64_intdigest

from koscache.content import CONTENT_BYTES, Location, Record
from koscache.disk import Disk, StoreFailed
from koscache.layout import Region

FORMAT: Final = 1
#: Entries changed in one transaction where many are to be changed. LMDB copies every page that it touches (about four an
#: entry, 8 MiB in all) and can use the old ones again only two transactions later: FREE_BYTES is three times that.
CHANGES_MAX: Final = 512
FREE_BYTES: Final = 24 << 20
#: processes x threads of a node that may look things up at one moment
READERS_MAX: Final = 1024
_SPARE_TRANSACTIONS: Final = 8
_POINTER: Final = "CURRENT"
_INDEX_PREFIX: Final = "index-"

_LOCATION: Final = struct.Struct("<IQIIQB")  # seal, segment, offset, length, checksum, verified
_BLOCK_KEY: Final = struct.Struct(">16sI")
_SEAL: Final = struct.Struct("<I")
_SEGMENT_KEY: Final = struct.Struct(">Q")
_SEAL_BYTES: Final = _SEAL.size
_CONTENT_END: Final = _SEAL_BYTES + CONTENT_BYTES
OBJECT_HASH_BYTES: Final = 16
NEXT_SEGMENT: Final = b"next_segment"


class IndexFull(StoreFailed):
    """The map is full: evict, then try again."""


class IndexBroken(StoreFailed):
    """The environment cannot be used any more; closing and opening the store rebuilds it."""


class Named(msgspec.Struct, frozen=True, array_like=True):
    """A record with the names it belongs to: the index is by hash, and a hash alone is not believed."""

    bucket: str
    key: str
    record: Record


class SegmentState(IntEnum):
    OPEN = 0  # being filled, or full and not yet sealed
    SEALED = 1


class SegmentRow(msgspec.Struct, frozen=True, array_like=True):
    """size: bytes of the file. mtime_ns: of the file when it was sealed or closed; another one later means that
    somebody wrote to it. position: no entry that the index has ends behind it."""

    state: SegmentState
    size: int
    mtime_ns: int
    position: int


class Pointer(msgspec.Struct, frozen=True):
    """What CURRENT says. clean: closed properly, everything synced. trusted: False after the index was seen broken.
    starts: openings since it last lived for a while; an index that kills its daemon is not opened for ever."""

    format: int
    index: int
    boot_id: str
    clean: bool
    trusted: bool
    starts: int
    block_bytes: int
    map_bytes: int


#: all transactions give bytes, never views into the map
Transaction: TypeAlias = "lmdb.Transaction[bytes]"

_encoder = msgspec.msgpack.Encoder()
_named_decoder = msgspec.msgpack.Decoder(Named)
_row_decoder = msgspec.msgpack.Decoder(SegmentRow)


def block_key(content: bytes, number: int) -> bytes:
    return _BLOCK_KEY.pack(content, number)


def parse_block_key(key: bytes) -> tuple[bytes, int]:
    content, number = _BLOCK_KEY.unpack(key)
    return content, number


def encode_location(key: bytes, location: Location) -> bytes:
    body = _LOCATION.pack(0, *location)[_SEAL_BYTES:]
    return _SEAL.pack(xxh3_64_intdigest(key + body) & 0xFFFFFFFF) + body


def decode_location(key: bytes, value: bytes) -> Location | None:
    """None: the value is not what was written under this key."""
    if len(value) != _LOCATION.size:
        return None
    seal, segment, offset, length, checksum, verified = _LOCATION.unpack(value)
    if seal != xxh3_64_intdigest(key + value[_SEAL_BYTES:]) & 0xFFFFFFFF:
        return None
    return Location(segment, offset, length, checksum, verified == 1)


def unverified(segment: int, region: Region) -> tuple[bytes, bytes]:
    """Key and value of an entry as a segment's table has it."""
    key = block_key(region.content, region.number)
    location = Location(segment, region.body_offset, region.body_length, region.checksum, False)
    return key, encode_location(key, location)


def encode_record(object_hash: bytes, bucket: str, key: str, record: Record) -> bytes:
    body = record.content + _encoder.encode(Named(bucket, key, record))
    return _SEAL.pack(xxh3_64_intdigest(object_hash + body) & 0xFFFFFFFF) + body


def decode_record(object_hash: bytes, value: bytes) -> Named | None:
    """None: the value is not what was written under this key. The caller compares bucket and key."""
    if len(value) < _CONTENT_END:
        return None
    if _SEAL.unpack_from(value)[0] != xxh3_64_intdigest(object_hash + value[_SEAL_BYTES:]) & 0xFFFFFFFF:
        return None
    try:
        return _named_decoder.decode(value[_CONTENT_END:])
    except msgspec.MsgspecError:  # a seal that holds over another version's fields
        return None


def record_content(value: bytes) -> bytes:
    """The content id of an objects value, without decoding it."""
    return value[_SEAL_BYTES:_CONTENT_END]


def encode_segment(row: SegmentRow) -> bytes:
    return _encoder.encode(row)


def decode_segment(value: bytes) -> SegmentRow | None:
    try:
        return _row_decoder.decode(value)
    except msgspec.MsgspecError:
        return None


def segment_key(segment: int) -> bytes:
    return _SEGMENT_KEY.pack(segment)


def parse_segment_key(key: bytes) -> int:
    return int(_SEGMENT_KEY.unpack(key)[0])


# ---- CURRENT and the numbered directories


def index_path(cache_dir: str, number: int) -> str:
    return os.path.join(cache_dir, f"{_INDEX_PREFIX}{number:010d}")


def index_numbers(names: list[str]) -> list[int]:
    """The numbers of the index directories among the names of a directory, rising."""
    found = (name.removeprefix(_INDEX_PREFIX) for name in names if name.startswith(_INDEX_PREFIX))
    return sorted(int(number) for number in found if number.isdigit())


def read_pointer(disk: Disk, cache_dir: str) -> Pointer | None:
    """None: absent or garbled."""
    try:
        fd = disk.open(os.path.join(cache_dir, _POINTER), os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        raw = disk.read(fd, 4096, 0)
    finally:
        disk.close(fd)
    try:
        return msgspec.json.decode(raw, type=Pointer)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def write_pointer(disk: Disk, cache_dir: str, pointer: Pointer) -> None:
    """Atomically and durably."""
    path = os.path.join(cache_dir, _POINTER)
    fd = disk.open(f"{path}.new", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        disk.write(fd, msgspec.json.encode(pointer) + b"\n", 0)
        disk.sync(fd)
    finally:
        disk.close(fd)
    disk.rename(f"{path}.new", path)
    disk.sync_dir(cache_dir)


# ---- the environment


class Environment:
    """One open LMDB environment with its databases, shared by all who attached to it in this process.

    LMDB must not be opened twice by one process; so attach() hands out the open one, and a writer that attaches to
    what a reader opened before opens it anew in place (only where daemon and worker share a process: tests).
    """

    _shared: Final[dict[str, Environment]] = {}
    _lock: Final = threading.Lock()

    def __init__(self, path: str, map_bytes: int, *, writable: bool) -> None:
        self.path = path
        self.map_bytes = map_bytes
        self._holders = 0
        self._open(writable=writable)

    def _open(self, *, writable: bool) -> None:
        self.writable = writable
        self.env = lmdb.open(
            self.path,
            map_size=self.map_bytes,
            readonly=not writable,
            create=writable,
            mode=0o640,
            max_dbs=4,
            max_readers=READERS_MAX,
            max_spare_txns=_SPARE_TRANSACTIONS,
            sync=False,
            meminit=False,
            readahead=False,
        )
        try:
            self.objects = self.env.open_db(b"objects", create=writable)
            self.blocks = self.env.open_db(b"blocks", create=writable)
            self.segments = self.env.open_db(b"segments", create=writable)
            self.meta = self.env.open_db(b"meta", create=writable)
        except BaseException:
            self.env.close()
            raise

    @classmethod
    def attach(cls, path: str, map_bytes: int, *, writable: bool) -> Environment:
        """Raises lmdb.Error or OSError. Every attach() wants its detach()."""
        path = os.path.realpath(path)
        with cls._lock:
            found = cls._shared.get(path)
            if found is None:
                found = cls(path, map_bytes, writable=writable)
                cls._shared[path] = found
            elif writable and not found.writable:
                found.env.close()
                found.map_bytes = map_bytes
                found._open(writable=True)
            found._holders += 1
            return found

    def detach(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self.env.close()
                del self._shared[self.path]

    def file_bytes(self) -> int:
        """What the environment takes on the disk; it never shrinks."""
        return sum(os.stat(os.path.join(self.path, name)).st_size for name in ("data.mdb", "lock.mdb"))

    def is_filling_up(self) -> bool:
        """Whether something should go, because LMDB needs free pages even to delete: a fifth of the map, FREE_BYTES at
        least, two thirds where the map is small."""
        free = max(self.map_bytes // 5, min(FREE_BYTES, self.map_bytes * 2 // 3))
        return self.used_bytes() > self.map_bytes - free

    def used_bytes(self) -> int:
        """Bytes of pages that hold something now; the rest of the map is free or becomes so."""
        with self.read() as txn:
            used = 2
            for database in (self.objects, self.blocks, self.segments, self.meta):
                found = txn.stat(database)
                used += found["branch_pages"] + found["leaf_pages"] + found["overflow_pages"]
            return int(used * found["psize"])

    def revise(self, judge: Callable[[Location], Location | None]) -> tuple[int, int]:
        """Goes through every block: None removes it, another location replaces it; one whose seal does not hold is
        removed. In many small transactions, see CHANGES_MAX. Returns (removed, replaced). Raises StoreFailed."""
        removed = replaced = 0
        after: bytes | None = b""
        while after is not None:
            with self.write() as txn, txn.cursor(self.blocks) as cursor:
                more = cursor.set_range(after) if after else cursor.first()
                left = CHANGES_MAX
                while more and left:
                    key = cursor.key()
                    location = decode_location(key, cursor.value())
                    wanted = None if location is None else judge(location)
                    if wanted is None:
                        more = cursor.delete() and bool(cursor.key())  # then stands on the next one
                        removed += 1
                        left -= 1
                        continue
                    if wanted != location:
                        cursor.put(key, encode_location(key, wanted))
                        replaced += 1
                        left -= 1
                    more = cursor.next()
                after = cursor.key() if more else None
        return removed, replaced

    def put_unverified(self, txn: Transaction, segment: int, regions: Iterable[Region]) -> int:
        """Puts the segment's entries, to be checked before use, where the index has them in this segment or not at all.
        Returns how many."""
        put = 0
        for region in regions:
            key, value = unverified(segment, region)
            present = txn.get(key, db=self.blocks)
            location = None if present is None else decode_location(key, present)
            if location is None or location.segment == segment:
                txn.put(key, value, db=self.blocks)
                put += 1
        return put

    @contextlib.contextmanager
    def write(self) -> Iterator[Transaction]:
        """A write transaction: committed at the end, undone by any exception. lmdb's errors become StoreFailed."""
        with index_errors(), self.env.begin(write=True) as txn:
            yield txn

    @contextlib.contextmanager
    def read(self) -> Iterator[Transaction]:
        with index_errors(), self.env.begin() as txn:
            yield txn


@contextlib.contextmanager
def index_errors() -> Iterator[None]:
    """Turns lmdb's errors into StoreFailed: full, broken for good, or just failed (the disk)."""
    try:
        yield
    except (lmdb.MapFullError, lmdb.TxnFullError) as error:
        raise IndexFull(f"index full: {error}") from error
    except lmdb.DiskError as error:
        raise StoreFailed(f"index: {error}") from error
    except lmdb.Error as error:
        raise IndexBroken(f"index broken: {error}") from error
