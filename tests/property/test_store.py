"""The block store against a model of it, over generated histories with crashes, damage and failing disks.

The model is a set of versions that were ever committed. The store may forget any of them at any time (it is a cache) but
must never give other bytes than theirs, never exceed its size, and never give a record that a newer one has replaced.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from koscache.content import Commit, Extent, Record, Refused, body_checksum
from koscache.disk import SegmentGone, StoreFailed
from koscache.reader import Reader
from koscache.recovery import RecoveryPolicy
from koscache.store import Store
from tests.fakes.block_store import BOOT, KIB, Settings, Thing, disk_bytes, open_store, small, write_extent_by
from tests.fakes.clock import FakeClock
from tests.fakes.faulty_disk import FaultyDisk

KEYS = [f"k{number}" for number in range(12)]
SIZES = [0, 1, 700, 2 * KIB, 2 * KIB + 1, 10_000, 16 * KIB, 16 * KIB + 1, 60_000]
things = st.builds(Thing, key=st.sampled_from(KEYS), size=st.sampled_from(SIZES), version=st.integers(0, 3))
numbers = st.integers(0, 1_000_000)


def _place(extent: Extent) -> tuple[int, int]:
    return extent.segment, extent.offset


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.dir = tempfile.mkdtemp(prefix="kos-store-")
        self.settings = Settings(os.path.join(self.dir, "cache"), size_bytes=2 * 1024 * KIB + 10 * 1024 * KIB)
        self.clock = FakeClock()
        self.disk = FaultyDisk()
        self.boot = 0
        self.store: Store | None = None
        self.reader: Reader | None = None
        self.out: dict[Extent, tuple[Thing, int]] = {}
        self.ever: set[Thing] = set()
        self.newest: dict[str, Record] = {}
        self.unreleased: list[int] = []

    @property
    def boot_id(self) -> str:
        return f"{BOOT}-{self.boot}"

    def open(self, policy: RecoveryPolicy = RecoveryPolicy.LENIENT) -> None:
        self.store = open_store(self.settings, self.clock, disk=self.disk, boot_id=self.boot_id, policy=policy)
        self.reader = Reader(self.settings.dir, open_max=4, boot_id=self.boot_id)
        assert self.reader.open()
        self.out.clear()
        self.unreleased.clear()

    @initialize()
    def begin(self) -> None:
        self.open()

    def teardown(self) -> None:
        self.disk.heal()
        if self.reader is not None:
            self.reader.close()
        if self.store is not None:
            self.store.close()
        shutil.rmtree(self.dir)

    def running(self) -> Store:
        assert self.store is not None
        return self.store

    # ---- filling

    @rule(thing=things, numbers=numbers)
    def reserve(self, thing: Thing, numbers: int) -> None:
        if not thing.size or len(self.out) > 20:
            return
        number = numbers % len(thing.numbers())
        try:
            extent = self.running().reserve(thing.content, number, len(thing.block(number)))
        except StoreFailed:
            return
        if not isinstance(extent, Refused):
            assert extent not in self.out
            for other in self.out:
                apart = other.offset + other.length <= extent.offset or extent.offset + extent.length <= other.offset
                assert other.segment != extent.segment or apart, "two fills were given the same bytes"
            self.out[extent] = (thing, number)

    def write(self, extent: Extent, body: bytes) -> bool:
        try:
            write_extent_by(self.disk)(extent, body)
        except OSError:
            return False
        return True

    @precondition(lambda self: self.out)
    @rule(which=numbers, batch=st.integers(1, 5), with_record=st.booleans())
    def commit(self, which: int, batch: int, with_record: bool) -> None:
        commits = []
        for extent in random.Random(which).sample(sorted(self.out, key=_place), min(batch, len(self.out))):
            thing, number = self.out.pop(extent)
            body = thing.block(number)
            if not self.write(extent, body):
                self.running().abandon(extent)
                continue
            record = thing.record(self.running()) if with_record else None
            commits.append(
                Commit(extent, thing.content, number, len(body), body_checksum(body), "b", thing.key, record)
            )
            self.ever.add(thing)
        try:
            assert all(self.running().commit(commits))
        except StoreFailed:
            assert self.running().commit(commits) == [False] * len(commits)

    @precondition(lambda self: self.out)
    @rule(which=numbers, half=st.booleans())
    def abandon(self, which: int, half: bool) -> None:
        extent = random.Random(which).choice(sorted(self.out, key=_place))
        thing, number = self.out.pop(extent)
        if half:
            self.write(extent, thing.block(number)[::-1])
        self.running().abandon(extent)

    @rule(several=st.lists(things, min_size=1, max_size=20, unique_by=lambda thing: thing.key))
    def put_small(self, several: list[Thing]) -> None:
        several = [thing for thing in several if thing.size <= 2 * KIB]
        self.clock._now += 1
        now = self.clock.now()
        smalls = []
        for thing in several:
            each = small(self.running(), thing, record=False)
            record = thing.record(self.running(), validated_at=now)
            smalls.append(type(each)(each.content, 0, each.body, each.checksum, "b", thing.key, record))
        self.ever.update(several)
        try:
            self.running().put_small(smalls)
        except StoreFailed:
            return
        for each in smalls:
            assert each.record is not None
            self.newest[each.key] = each.record

    # ---- records

    @rule(thing=things, late=st.booleans())
    def put_record(self, thing: Thing, late: bool) -> None:
        store = self.running()
        if late and thing.key in self.newest:
            newest = self.newest[thing.key]
            if store.record("b", thing.key) == newest:
                older = thing.record(store).revalidated(newest.validated_at - 0.5, newest.fence)
                try:
                    assert not store.put_record("b", thing.key, older)
                except StoreFailed:
                    return
        self.clock._now += 1
        record = thing.record(store, validated_at=self.clock.now())
        try:
            assert store.put_record("b", thing.key, record)
        except StoreFailed:
            return
        self.newest[thing.key] = record

    @rule(key=st.sampled_from(KEYS))
    def written(self, key: str) -> None:
        """A write went by: what was known is fenced, and an answer from before it never comes back as good."""
        store = self.running()
        store.fence.bump(store.fence.slot("b", key))

    @rule(key=st.sampled_from(KEYS))
    def drop_record(self, key: str) -> None:
        try:
            self.running().drop_record("b", key)
        except StoreFailed:
            return
        self.newest.pop(key, None)

    # ---- room

    @rule(thing=things, number=numbers)
    def touch(self, thing: Thing, number: int) -> None:
        if thing.size:
            self.running().touched([(thing.content, number % len(thing.numbers()))])

    @rule(thing=things, seconds=st.integers(1, 50))
    def pin(self, thing: Thing, seconds: int) -> None:
        try:
            self.running().pin(thing.content, self.clock.now() + seconds)
        except StoreFailed:
            return

    @rule(need=st.sampled_from([0, 0, 0, 16 * KIB, 600 * KIB]))
    def evict(self, need: int) -> None:
        assert self.reader is not None
        try:
            gone = self.running().evict(need)
        except StoreFailed:
            return
        for segment in gone:
            assert not any(extent.segment == segment for extent in self.out), "evicted under a fill"
            assert self.reader.drop(segment)
        self.unreleased += gone

    @rule(count=st.integers(1, 5))
    def release(self, count: int) -> None:
        for segment in self.unreleased[:count]:
            self.running().released(segment)
        del self.unreleased[:count]

    @rule(seed=numbers)
    def churn(self, seed: int) -> None:
        """Enough to turn the whole store over once."""
        rng = random.Random(seed)
        for _ in range(60):
            thing = Thing(rng.choice(KEYS), rng.choice(SIZES[5:]), rng.randrange(4))
            self.fill(thing)
            self.evict_and_release()

    def fill(self, thing: Thing) -> None:
        store = self.running()
        for number in thing.numbers():
            body = thing.block(number)
            try:
                extent = store.reserve(thing.content, number, len(body))
                if isinstance(extent, Refused):
                    return
                if not self.write(extent, body):
                    store.abandon(extent)
                    return
                self.ever.add(thing)
                commit = Commit(
                    extent, thing.content, number, len(body), body_checksum(body), "b", thing.key, thing.record(store)
                )
                store.commit([commit])
            except StoreFailed:
                return

    def evict_and_release(self) -> None:
        assert self.reader is not None
        try:
            gone = self.running().evict()
        except StoreFailed:
            return
        for segment in gone:
            self.reader.drop(segment)
            self.running().released(segment)

    # ---- what goes wrong

    @rule(
        call=st.sampled_from(["write", "allocate", "sync", "read", "copy", "unlink", "open"]),
        code=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EROFS]),
        after=st.integers(0, 20),
        short=st.booleans(),
    )
    def fault(self, call: str, code: int, after: int, short: bool) -> None:
        self.disk.heal()
        self.disk.fail(call, code, path="segments", after=after, short=short and call == "write")

    @rule()
    def heal(self) -> None:
        self.disk.heal()

    @rule(
        how=st.sampled_from(["close", "kill", "power", "lost index", "bad index"]),
        policy=st.sampled_from(RecoveryPolicy),
        seed=numbers,
    )
    def restart(self, how: str, policy: RecoveryPolicy, seed: int) -> None:
        assert self.reader is not None
        self.disk.heal()
        self.reader.close()
        self.running().close(clean=how == "close")
        directory = Path(self.settings.dir)
        if how == "power":
            self.disk.power_loss(random.Random(seed))
            self.boot += 1
        elif how == "lost index":
            (directory / "CURRENT").unlink()
        elif how == "bad index":
            for path in directory.glob("index-*/data.mdb"):
                path.write_bytes(random.Random(seed).randbytes(50_000))
        self.open(policy)
        if how not in ("close", "kill"):
            for key in KEYS:
                record = self.running().record("b", key)
                assert record is None or record.fence == 0, "what was rebuilt must be revalidated"
            self.newest.clear()

    @rule(seed=numbers, cut=st.booleans())
    def rot(self, seed: int, cut: bool) -> None:
        """Somebody damages a segment while the daemon is away."""
        assert self.reader is not None
        self.disk.heal()
        self.reader.close()
        self.running().close(clean=False)
        rng = random.Random(seed)
        paths = sorted((Path(self.settings.dir) / "segments").iterdir())
        if paths:
            path = rng.choice(paths)
            if cut:
                os.truncate(path, rng.randrange(path.stat().st_size))
            else:
                with path.open("r+b") as file:
                    for _ in range(30):
                        file.seek(rng.randrange(path.stat().st_size - 8))
                        file.write(rng.randbytes(8))
        self.open()

    @rule()
    def scrub(self) -> None:
        try:
            self.running().scrub_step(200_000)
        except StoreFailed:
            return

    # ---- what must hold

    @invariant()
    def size_holds(self) -> None:
        if self.store is not None and not self.disk.faults:
            assert self.store.stats().used_bytes <= self.settings.size_bytes
            assert disk_bytes(self.settings.dir) <= self.settings.size_bytes

    @rule(seed=numbers)
    def read_everything(self, seed: int) -> None:
        """As a worker does: look up, have the unverified checked, borrow, read."""
        store, reader = self.running(), self.reader
        assert reader is not None
        for thing in sorted(self.ever, key=lambda thing: (thing.key, thing.size, thing.version)):
            for number in thing.numbers():
                location = reader.locate(thing.content, number)
                if location is None:
                    continue
                try:
                    if not location.verified and not store.verify(thing.content, number):
                        continue
                    fd = reader.borrow(location.segment)
                except (SegmentGone, StoreFailed):
                    continue
                try:
                    assert os.pread(fd, location.length, location.offset) == thing.block(number)
                finally:
                    reader.give_back(location.segment)

    @rule()
    def read_records(self) -> None:
        assert self.reader is not None
        for key in KEYS:
            record = self.reader.record("b", key)
            newest = self.newest.get(key)
            assert record == self.running().record("b", key)
            if record is not None and newest is not None and record.fence == newest.fence:
                assert record.validated_at >= newest.validated_at


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
