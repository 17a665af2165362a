"""The fence: what makes a write through this node seen by every later read on it, with no daemon and no message.

A file of 2^20 slots of 64 bits for objects, and 2^16 for listings (koscache.directories), that all processes of the node
map. A record carries the value that its object's slot had *before* the origin was asked for it; a write changes the slot
before its origin request and again after the answer, before the client is answered. A record whose value is not the
slot's present one must be revalidated.

    reader: v = slot; GET -> old bytes ............................ stores record(v): differs from the slot: fenced
    writer:                 bump; PUT ......... 200; bump; answer

In a cluster the daemon bumps for the writes of other nodes, and three more things stand here that all workers must see
at once (docs/consistency.md): until when records may be trusted and vouched for, the epoch, which is mixed into every value,
and which objects are marked: being written by another node. A node that is alone trusts always.

Owns: the file, its making and its slots. Does not own: when to bump (carrier, daemon) or what fenced means (content.judge).

Invariant: a slot never holds a value twice, and never 0. Values are unique, not counted up: two processes that bump at
once leave one of two fresh values, and both differ from every value that a record can carry.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import struct
import time
from collections.abc import Iterable
from typing import Final

from xxhash import xxh3_64_intdigest

from koscache.content import object_slot_hash, versions_slot_hash
from koscache.directories import bucket_slot_hash, directories, directory, directory_slot_hash

SLOTS: Final = 1 << 20
_MASK: Final = SLOTS - 1
#: Apart from the objects' slots: every write below a directory passes that directory's, so that objects which shared a slot
#: with a busy bucket's "" would never be fresh. 512 KiB; a node has few directories that are written to and listed.
LISTING_SLOTS: Final = 1 << 16
_LISTING_MASK: Final = LISTING_SLOTS - 1
_HEADER_BYTES: Final = 4096
_MARKS_AT: Final = _HEADER_BYTES + (SLOTS + LISTING_SLOTS) * 8
FENCE_BYTES: Final = _MARKS_AT + SLOTS
#: In the header, one cache line each would be more than is needed: they are written a few times a second.
_WORDS_AT: Final = 1024
_TRUST: Final = 0
_VOUCH: Final = 1
_EPOCH: Final = 2
_INCARNATION: Final = 3
_WORDS: Final = 4
#: Of trust that does not end.
FOREVER_NS: Final = (1 << 63) - 1
_MARK_MAX: Final = 255
_MAGIC: Final = b"kosfence"
_VERSION: Final = 3
_HEADER: Final = struct.Struct("<8sII64s")  # magic, version, slots, boot id; then xxh3_64 of it
_CHECK: Final = struct.Struct("<Q")


def boot_ns() -> int:
    """The clock that leases are measured by: one for all processes, going on while the machine is suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def read_boot_id() -> str:
    """The kernel's id of this boot; a fresh random one where there is none, so that nothing is trusted wrongly."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return f"none-{random.SystemRandom().getrandbits(64):016x}"


class Fence:
    """The mapped slots. bump and value are one access to memory, from any thread of any process.

    alone: this node is in no cluster, so nobody can write without its knowing.
    """

    def __init__(self, fd: int, path: str, *, created: bool, alone: bool = True) -> None:
        self.created = created
        self.alone = alone
        self._path = path
        found = os.fstat(fd)
        self._identity = (found.st_dev, found.st_ino)
        self._map = mmap.mmap(fd, FENCE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._bytes = memoryview(self._map)
        self._words = self._bytes[_WORDS_AT : _WORDS_AT + 8 * _WORDS].cast("Q")
        self._slots = self._bytes[_HEADER_BYTES:_MARKS_AT].cast("Q")
        self._marks = self._bytes[_MARKS_AT:]
        self._random = random.Random(os.urandom(32)).getrandbits

    @classmethod
    def open(cls, cache_dir: str, boot_id: str | None = None, *, alone: bool = True) -> Fence:
        """Maps the directory's fence; makes a new one if there is none or it is of another boot or garbled.

        Raises OSError. After a boot the slots are new, so every record is revalidated once: bumps that only the page
        cache knew may be lost with the machine.
        """
        boot_id = boot_id or read_boot_id()
        path = os.path.join(cache_dir, "fence")
        fd = _open_valid(path, boot_id)
        if fd is not None:
            return _mapped(cls, fd, path, created=False, alone=alone)
        with open(os.path.join(cache_dir, "fence.lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two workers may come here at once; the second finds the first one's
            fd = _open_valid(path, boot_id)
            created = fd is None
            if fd is None:
                fd = _create(path, boot_id)
        return _mapped(cls, fd, path, created=created, alone=alone)

    def slot(self, bucket: str, key: str) -> int:
        """Which slot an object, or a version by its name, has. Two objects may share one: a bump then costs the other a
        revalidation."""
        return object_slot_hash(bucket, key) & _MASK

    def versions_slot(self, bucket: str, key: str) -> int:
        """Which slot all versions of a key but the null version have: for writes that may change or remove such ones."""
        return versions_slot_hash(bucket, key) & _MASK

    def listing_slots(self, bucket: str, prefix: str) -> tuple[int, int]:
        """The slots that a listing of the prefix depends on: of its bucket, of its directory."""
        return (
            SLOTS + (bucket_slot_hash(bucket) & _LISTING_MASK),
            SLOTS + (directory_slot_hash(bucket, directory(prefix)) & _LISTING_MASK),
        )

    def listing_values(self, bucket: str, prefix: str) -> tuple[int, int]:
        """The present values of listing_slots(). Read them before the origin request whose answer they will vouch for."""
        of_bucket, of_directory = self.listing_slots(bucket, prefix)
        return self.value(of_bucket), self.value(of_directory)

    def directory_slots(self, bucket: str, keys: Iterable[str]) -> set[int]:
        """The slots of all listings that a write of these keys may change; see koscache.directories."""
        return {SLOTS + (directory_slot_hash(bucket, home) & _LISTING_MASK) for home in directories(keys)}

    def bucket_slot(self, bucket: str) -> int:
        """The slot of all listings of a bucket, for writes to the bucket itself."""
        return SLOTS + (bucket_slot_hash(bucket) & _LISTING_MASK)

    def value(self, slot: int) -> int:
        """The slot's present value. Read it before the origin request whose answer it will vouch for."""
        return self._slots[slot] ^ self._words[_EPOCH]

    def value_of(self, bucket: str, key: str) -> int:
        """value(slot(bucket, key))."""
        return self._slots[object_slot_hash(bucket, key) & _MASK] ^ self._words[_EPOCH]

    def bump(self, slot: int) -> int:
        """Gives the slot a value that it never had, and returns it."""
        self._slots[slot] = self.unused_value()
        return self.value(slot)

    def unused_value(self) -> int:
        """One that no slot ever had.

        Time in ns makes values of forked processes (same random state) differ, random bits those of one nanosecond.
        """
        return time.time_ns() ^ self._random(64) or 1

    def bump_all(self, slots: Iterable[int]) -> None:
        """Gives each of the slots a value that it never had. They may get the same one: none is compared with another's."""
        value = self.unused_value()
        present = self._slots
        for slot in slots:
            present[slot] = value

    # --- in a cluster

    def trusted(self) -> bool:
        """Whether records may be used without asking the origin: every write of any node would have been heard of."""
        return self.alone or self._words[_TRUST] > boot_ns()

    def vouching(self, slot: int) -> bool:
        """Whether another node may be told, as a truth to keep, what a record of this slot says: look at the record's value
        again afterwards."""
        return self.alone or (self._marks[slot] == 0 and self._words[_VOUCH] > boot_ns())

    def trust(self, until_ns: int, vouch_until_ns: int) -> None:
        """For the daemon: until when (boot_ns) records may be trusted, and vouched for."""
        self._words[_TRUST] = until_ns
        self._words[_VOUCH] = vouch_until_ns

    @property
    def trusted_until_ns(self) -> int:
        return self._words[_TRUST]

    def stop_vouching(self) -> None:
        """For a daemon that has just started: it does not know of what its predecessor marked. Trust stays as it was."""
        self._words[_VOUCH] = 0
        self._marks[:] = bytes(SLOTS)

    @property
    def incarnation(self) -> int:
        """Of the member whose records these values speak of; 0: of none. Set it when the epoch has been begun that it needs."""
        return self._words[_INCARNATION]

    @incarnation.setter
    def incarnation(self, incarnation: int) -> None:
        self._words[_INCARNATION] = incarnation

    @property
    def epoch(self) -> int:
        return self._words[_EPOCH]

    def new_epoch(self) -> None:
        """Makes every value another one than it was, so that nothing is used before the origin has confirmed it."""
        self._words[_EPOCH] = self._random(64)

    def mark(self, slots: Iterable[int]) -> None:
        """For the daemon alone: another node writes these; marks add up. Slots of listings have none."""
        marks = self._marks
        for slot in slots:
            if slot < SLOTS and marks[slot] < _MARK_MAX:
                marks[slot] += 1

    def unmark(self, slots: Iterable[int]) -> None:
        """Takes back one mark(). 255 at a time is all that is counted: such a slot stays marked until the daemon restarts."""
        marks = self._marks
        for slot in slots:
            if slot < SLOTS and 0 < marks[slot] < _MARK_MAX:
                marks[slot] -= 1

    def current(self) -> bool:
        """Whether the mapped file is still the one at its path; if not, open anew."""
        try:
            found = os.stat(self._path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def close(self) -> None:
        self._words.release()
        self._slots.release()
        self._marks.release()
        self._bytes.release()
        self._map.close()


def _mapped(cls: type[Fence], fd: int, path: str, *, created: bool, alone: bool) -> Fence:
    try:
        return cls(fd, path, created=created, alone=alone)
    finally:
        os.close(fd)


def _header(boot_id: str) -> bytes:
    header = _HEADER.pack(_MAGIC, _VERSION, SLOTS, boot_id.encode()[:64])
    return header + _CHECK.pack(xxh3_64_intdigest(header))


def _open_valid(path: str, boot_id: str) -> int | None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    wanted = _header(boot_id)
    if os.fstat(fd).st_size == FENCE_BYTES and os.pread(fd, len(wanted), 0) == wanted:
        return fd
    os.close(fd)
    return None


def _random_slots() -> bytes:
    while True:
        slots = os.urandom((SLOTS + LISTING_SLOTS) * 8)
        if bytes(8) not in slots:  # no slot is 0; fails once in 2^41 times
            return slots


def _create(path: str, boot_id: str) -> int:
    """Written whole beside and renamed: nobody ever maps half a fence. All its pages are allocated, so that a full disk
    cannot turn a bump into SIGBUS."""
    beside = f"{path}.new"
    fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        os.posix_fallocate(fd, 0, FENCE_BYTES)
        os.pwrite(fd, _header(boot_id), 0)
        body = memoryview(_random_slots())
        written = 0
        while written < len(body):
            written += os.pwrite(fd, body[written:], _HEADER_BYTES + written)
        os.rename(beside, path)
    except BaseException:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    return fd
