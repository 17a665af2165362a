"""The block store as workers read it: index and segments, straight from the files, with no word to the daemon.

Owns: this process's view of the index, its open segment descriptors and how often each is lent. Does not own: any
change to the store; whether a record is fresh (content.judge).

Invariant: every answer is from one committed state of the index, and a descriptor that is lent stays open. Between
looking up and borrowing the segment may go: SegmentGone, which is a miss. Once borrowed, its bytes can be read to the
end, because segments are only unlinked, never written over.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Final, NamedTuple

import lmdb

from koscache import index as ix
from koscache.content import Location, Record, object_hash
from koscache.disk import OsDisk, SegmentGone, disk_errors
from koscache.fence import Fence
from koscache.index import Environment, Named
from koscache.segments import segment_path

__all__ = ["Reader", "SegmentGone"]

#: decoded records kept; of about 2 KiB each
_DECODED_MAX: Final = 8192
#: finds of first() kept; they share their records with the above, mostly
_FOUND_MAX: Final = 8192


class Found(NamedTuple):
    """An object's record, the fence slot that may speak against it, and the place of its first block if that is here.
    state: of the index that says so."""

    record: Record
    slot: int
    location: Location | None
    state: int


class _Held:
    __slots__ = ("borrows", "dropped", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.borrows = 0
        self.dropped = False


class Reader:
    """Safe to use from several threads. Works with no daemon running; finds nothing while no index exists."""

    fence: Fence

    def __init__(self, cache_dir: str, *, open_max: int = 1024, boot_id: str | None = None, alone: bool = True) -> None:
        """open_max: segment descriptors kept open when nobody borrows them. boot_id: for tests. alone: see Fence."""
        self._alone = alone
        self._dir = cache_dir
        self._open_max = open_max
        self._boot_id = boot_id
        self._disk = OsDisk()
        self._environment: Environment | None = None
        self._lock = threading.Lock()
        self._decoded: dict[bytes, tuple[bytes, Named]] = {}
        self._found: dict[tuple[str, str], Found] = {}
        self._found_in = -1  # the state of the index that _found is of: its transaction, and how often it was changed
        self._attached = 0  # for another one
        self._held: dict[int, _Held] = {}  # least recently lent first, roughly
        self.errors_count = 0

    def open(self) -> bool:
        """Opens the fence (made if missing) and the index.

        False when there is no usable index (yet): everything is a miss, reopen() later. Raises StoreFailed when there
        can be no fence: then this process must not serve hits or carry writes as if nobody else did.
        """
        with disk_errors("opening the fence"):
            self._disk.make_dir(self._dir)
            self.fence = Fence.open(self._dir, self._boot_id, alone=self._alone)
        return self._follow_pointer()

    def reopen(self) -> bool:
        """Follows CURRENT to its index, and the fence to its file; for when the daemon says hello.

        Also drops segments whose file went while no daemon was there to say so.
        """
        for segment in self.held():
            if not os.path.exists(segment_path(self._dir, segment)):
                self.drop(segment)
        if not self.fence.current():
            with disk_errors("opening the fence"):
                self.fence = Fence.open(self._dir, self._boot_id, alone=self._alone)
        return self._follow_pointer()

    def _follow_pointer(self) -> bool:
        with disk_errors("reading CURRENT"):
            pointer = ix.read_pointer(self._disk, self._dir)
        with self._lock:
            present = self._environment
            if pointer is None or not pointer.trusted or pointer.format != ix.FORMAT:
                self._detach()
                return False
            path = os.path.realpath(ix.index_path(self._dir, pointer.index))
            if present is not None and (present.path, present.map_bytes) == (path, pointer.map_bytes):
                return True
            self._detach()
            try:
                self._environment = Environment.attach(path, pointer.map_bytes, writable=False)
            except (lmdb.Error, OSError):
                self.errors_count += 1
                return False
            return True

    def _detach(self) -> None:
        self._decoded.clear()
        self._found.clear()
        self._found_in = -1
        self._attached += 1
        if self._environment is not None:
            self._environment.detach()
            self._environment = None

    # ---- looking up

    def record(self, bucket: str, key: str) -> Record | None:
        """What is known of an object. A few microseconds; the same object comes back while nothing changed."""
        hashed = object_hash(bucket, key)
        with self._lock:
            environment = self._environment
            if environment is None:
                return None
            try:
                txn = environment.env.begin(environment.objects)
                value = txn.get(hashed)
                txn.abort()
            except lmdb.Error:
                self.errors_count += 1
                return None
            if value is None:
                return None
            named = self._decode(hashed, value)
        return named.record if named is not None and named.key == key and named.bucket == bucket else None

    def first(self, bucket: str, key: str) -> Found | None:
        """record() and locate() of block 0 in one, from one state of the index.

        What was found is remembered as long as the index stays as it is, which one look at its transaction number tells:
        a node that only serves hits looks each object up once.
        """
        with self._lock:
            environment = self._environment
            if environment is None:
                return None
            try:
                txn = environment.env.begin(environment.objects)
                try:
                    state = self._attached << 64 | txn.id()
                    if state != self._found_in:
                        self._found.clear()
                        self._found_in = state
                    found = self._found.get((bucket, key))
                    if found is None:
                        found = self._look_up(txn, environment, bucket, key, state)
                        if found is not None:
                            if len(self._found) >= _FOUND_MAX:
                                self._found.clear()
                            self._found[bucket, key] = found
                    return found
                finally:
                    txn.abort()
            except lmdb.Error:
                self.errors_count += 1
                return None

    def still(self, found: Found, fence: int) -> bool:
        """Whether the index is in the state in which it said `found`, the fence slot still has the value `fence`, and this
        is to be trusted."""
        with self._lock:
            environment = self._environment
            slots = self.fence
            if environment is None or slots.value(found.slot) != fence or not slots.trusted():
                return False
            try:
                txn = environment.env.begin(environment.objects)
                state = self._attached << 64 | txn.id()
                txn.abort()
            except lmdb.Error:
                self.errors_count += 1
                return False
            return state == found.state

    def read_now(self, segment: int, offset: int, into: memoryview) -> bool:
        """Fills `into` from a segment that is open, if the bytes are in memory. Never waits for a disk."""
        with self._lock:
            held = self._held.get(segment)
            if held is None or held.dropped:
                return False
            try:
                return os.preadv(held.fd, (into,), offset, os.RWF_NOWAIT) == len(into)
            except OSError:
                return False

    def _look_up(self, txn: Any, environment: Environment, bucket: str, key: str, state: int) -> Found | None:
        hashed = object_hash(bucket, key)
        value = txn.get(hashed)
        if value is None:
            return None
        named = self._decode(hashed, value)
        if named is None or named.key != key or named.bucket != bucket:
            return None
        block = ix.block_key(named.record.content, 0)
        place = txn.get(block, db=environment.blocks)
        location = None if place is None else ix.decode_location(block, place)
        return Found(named.record, self.fence.slot(bucket, key), location, state)

    def _decode(self, hashed: bytes, value: bytes) -> Named | None:
        """Whose record an entry of the index is, and the record: the same one while the entry's bytes are the same."""
        known = self._decoded.get(hashed)
        if known is not None and known[0] == value:
            return known[1]
        named = ix.decode_record(hashed, value)
        if named is not None:
            if len(self._decoded) >= _DECODED_MAX and hashed not in self._decoded:
                del self._decoded[next(iter(self._decoded))]
            self._decoded[hashed] = (value, named)
        return named

    def locate(self, content: bytes, number: int) -> Location | None:
        """Where a block is; look at `verified` before serving from there."""
        key = ix.block_key(content, number)
        with self._lock:
            environment = self._environment
            if environment is None:
                return None
            try:
                txn = environment.env.begin(environment.blocks)
                value = txn.get(key)
                txn.abort()
            except lmdb.Error:
                self.errors_count += 1
                return None
        return None if value is None else ix.decode_location(key, value)

    def locate_run(self, content: bytes, first: int, stop: int) -> list[Location] | None:
        """All blocks first..stop-1 from one state of the index, or None if any is missing."""
        if stop == first + 1:
            location = self.locate(content, first)
            return None if location is None else [location]
        locations: list[Location] = []
        with self._lock:
            environment = self._environment
            if environment is None:
                return None
            try:
                with environment.env.begin(environment.blocks) as txn:
                    for number in range(first, stop):
                        key = ix.block_key(content, number)
                        value = txn.get(key)
                        location = None if value is None else ix.decode_location(key, value)
                        if location is None:
                            return None
                        locations.append(location)
            except lmdb.Error:
                self.errors_count += 1
                return None
        return locations

    def blocks(self, content: bytes) -> list[tuple[int, Location]]:
        """Every cached block of a version, by number; for explaining, not for serving."""
        found: list[tuple[int, Location]] = []
        with self._lock:
            environment = self._environment
            if environment is None:
                return found
            try:
                with environment.env.begin(environment.blocks) as txn, txn.cursor() as cursor:
                    more = cursor.set_range(ix.block_key(content, 0))
                    while more and cursor.key().startswith(content):
                        location = ix.decode_location(cursor.key(), cursor.value())
                        if location is not None:
                            found.append((ix.parse_block_key(cursor.key())[1], location))
                        more = cursor.next()
            except lmdb.Error:
                self.errors_count += 1
        return found

    # ---- descriptors

    def borrow(self, segment: int) -> int:
        """A read-only descriptor, good until give_back. Raises SegmentGone, also if it cannot be opened for another
        reason."""
        with self._lock:
            held = self._held.get(segment)
            if held is not None:
                if held.dropped:
                    raise SegmentGone(segment)
                if held.borrows == 0:
                    self._held[segment] = self._held.pop(segment)  # to the end: closed last
                held.borrows += 1
                return held.fd
            try:
                fd = self._disk.open(segment_path(self._dir, segment), os.O_RDONLY)
            except FileNotFoundError as error:
                raise SegmentGone(segment) from error
            except OSError as error:  # too many open files, a failing disk: no better than gone
                self.errors_count += 1
                raise SegmentGone(segment) from error
            held = self._held[segment] = _Held(fd)
            held.borrows = 1
            self._close_idle()
            return fd

    def _close_idle(self) -> None:
        while len(self._held) > self._open_max:
            idle = next((segment for segment, held in self._held.items() if held.borrows == 0), None)
            if idle is None:
                return
            self._close(idle)

    def _close(self, segment: int) -> None:
        self._disk.close(self._held.pop(segment).fd)

    def give_back(self, segment: int) -> bool:
        """True when this closed a segment that was dropped meanwhile: acknowledge it to the daemon now."""
        with self._lock:
            held = self._held[segment]
            held.borrows -= 1
            assert held.borrows >= 0, "given back more often than borrowed"
            if held.borrows or not held.dropped:
                return False
            self._close(segment)
            return True

    def drop(self, segment: int) -> bool:
        """The daemon evicted it. True: closed now, acknowledge. False: lent; the last give_back says True."""
        with self._lock:
            held = self._held.get(segment)
            if held is None:
                return True
            if held.borrows:
                held.dropped = True
                return False
            self._close(segment)
            return True

    def held(self) -> list[int]:
        """The segments that this process has open."""
        with self._lock:
            return list(self._held)

    def segment_path(self, segment: int) -> str:
        return segment_path(self._dir, segment)

    def close(self) -> None:
        """Closes the index and every descriptor, lent or not. The fence stays mapped for writes that are still
        running."""
        with self._lock:
            self._detach()
            for segment in list(self._held):
                self._close(segment)
