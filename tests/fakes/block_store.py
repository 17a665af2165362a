"""What tests of the block store need: small settings, objects with known bytes, fills as a worker does them, and the
check that matters: whatever the store gives out are the right bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kos.clock import Clock
from kos.s3.object_response import ObjectMeta
from koscache.content import (
    Commit,
    Extent,
    Location,
    Record,
    Refused,
    Small,
    block_count,
    block_length,
    body_checksum,
    content_id,
    make_record,
)
from koscache.disk import Disk, OsDisk
from koscache.fence import FENCE_BYTES
from koscache.segments import segment_path
from koscache.store import RecoveryPolicy, Store

KIB = 1 << 10
MIB = 1 << 20
BOOT = "boot-one"
OTHER_BOOT = "boot-two"


@dataclass(frozen=True)
class Settings:
    """A store of 16 KiB blocks in 128 KiB segments; about 2 MiB for segments."""

    dir: str
    size_bytes: int = 2 * MIB + 2 * MIB + FENCE_BYTES + 256 * KIB
    block_bytes: int = 16 * KIB
    segment_bytes: int = 128 * KIB
    index_bytes: int = 2 * MIB
    min_free_bytes: int = 0
    small_bytes: int = 2 * KIB


class QuickDisk(OsDisk):
    """Does not wait for the platter. What survives a process survives it as well."""

    def sync(self, fd: int) -> None:
        os.fstat(fd)

    def sync_dir(self, path: str) -> None:
        os.stat(path)


def open_store(
    settings: Settings,
    clock: Clock,
    *,
    disk: Disk | None = None,
    boot_id: str = BOOT,
    policy: RecoveryPolicy = RecoveryPolicy.LENIENT,
) -> Store:
    return Store.open(settings, clock, disk=disk or QuickDisk(), boot_id=boot_id, policy=policy)


@dataclass(frozen=True)
class Thing:
    """An object version whose bytes follow from its name."""

    key: str
    size: int
    version: int = 0
    bucket: str = "b"

    @property
    def etag(self) -> str:
        return f'"{self.version}"'

    @property
    def content(self) -> bytes:
        return content_id(self.bucket, self.key, self.etag, self.size)

    def block(self, number: int, block_bytes: int = 16 * KIB) -> bytes:
        length = block_length(self.size, number, block_bytes)
        return random.Random(f"{self.bucket}/{self.key}/{self.version}/{self.size}/{number}").randbytes(length)

    def numbers(self, block_bytes: int = 16 * KIB) -> range:
        return range(block_count(self.size, block_bytes))

    def record(self, store: Store, *, validated_at: float = 1.0) -> Record:
        meta = ObjectMeta(self.etag, self.size, "Mon, 01 Jan 2024 00:00:00 GMT", (("content-type", "x/y"),))
        fence = store.fence.value_of(self.bucket, self.key)
        return make_record(self.bucket, self.key, meta, validated_at=validated_at, fence=fence)


def write_extent(extent: Extent, body: bytes) -> None:
    """As a worker does: straight into the file."""
    fd = os.open(extent.path, os.O_RDWR)
    try:
        assert os.pwrite(fd, body, extent.offset) == len(body)
    finally:
        os.close(fd)


def write_extent_by(disk: Disk) -> Callable[[Extent, bytes], None]:
    """Through a disk that may lose it."""

    def write(extent: Extent, body: bytes) -> None:
        fd = disk.open(extent.path, os.O_RDWR)
        try:
            disk.write(fd, body, extent.offset)
        finally:
            disk.close(fd)

    return write


def reserve(store: Store, thing: Thing, number: int) -> Extent:
    """Space for a block; evicts and releases as long as that helps."""
    length = len(thing.block(number))
    for _ in range(4):
        extent = store.reserve(thing.content, number, length)
        if not isinstance(extent, Refused):
            return extent
        for gone in store.evict(length):
            store.released(gone)
    raise AssertionError(f"no space: {extent.reason}")


def fill(
    store: Store, thing: Thing, *, write: Callable[[Extent, bytes], None] = write_extent, record: bool = True
) -> None:
    """The object's record and all of its blocks, as large blocks."""
    known = thing.record(store)
    if record:
        store.put_record(thing.bucket, thing.key, known)
    for number in thing.numbers():
        extent = reserve(store, thing, number)
        body = thing.block(number)
        write(extent, body)
        commit = Commit(extent, thing.content, number, len(body), body_checksum(body), thing.bucket, thing.key, known)
        assert store.commit([commit]) == [True]
    for gone in store.evict():
        store.released(gone)


def small(store: Store, thing: Thing, *, record: bool = True) -> Small:
    body = thing.block(0)
    known = thing.record(store) if record else None
    return Small(thing.content, 0, body, body_checksum(body), thing.bucket, thing.key, known)


def read(cache_dir: str | Path, location: Location) -> bytes:
    with open(segment_path(str(cache_dir), location.segment), "rb") as file:
        file.seek(location.offset)
        return file.read(location.length)


def served(store: Store, cache_dir: str | Path, thing: Thing, number: int) -> bytes | None:
    """What a reader would get for a block, checking it first when it is unverified, as readers must."""
    location = store.locate(thing.content, number)
    if location is None:
        return None
    if not location.verified and not store.verify(thing.content, number):
        return None
    return read(cache_dir, location)


def hits(store: Store, cache_dir: str | Path, things: list[Thing]) -> int:
    """How many blocks are served; every one of them rightly, or AssertionError."""
    count = 0
    for thing in things:
        for number in thing.numbers():
            body = served(store, cache_dir, thing, number)
            if body is not None:
                assert body == thing.block(number), f"wrong bytes of {thing} block {number}"
                count += 1
    return count


def disk_bytes(cache_dir: str | Path) -> int:
    """What the directory takes, by allocated or apparent size, whichever is more."""
    total = 0
    for directory, _, names in os.walk(cache_dir):
        for name in names:
            found = os.stat(os.path.join(directory, name))
            apparent = found.st_size if name != "data.mdb" else 0
            total += max(found.st_blocks * 512, apparent)
    return total
