"""The store in ordinary life: what goes in comes out, and it keeps to its size."""

import contextlib
import dataclasses
import errno
import os
from pathlib import Path

import pytest

from kos.errors import ConfigError
from koscache.content import Commit, Extent, Refusal, Refused, body_checksum
from koscache.disk import StoreFailed
from koscache.store import Store
from tests.fakes.block_store import (
    KIB,
    MIB,
    Settings,
    Thing,
    disk_bytes,
    fill,
    hits,
    open_store,
    read,
    reserve,
    small,
    write_extent,
)
from tests.fakes.clock import FakeClock
from tests.fakes.faulty_disk import FaultyDisk


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(str(tmp_path / "cache"))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def commit_of(thing: Thing, number: int, extent: Extent, store: Store) -> Commit:
    body = thing.block(number)
    return Commit(
        extent, thing.content, number, len(body), body_checksum(body), thing.bucket, thing.key, thing.record(store)
    )


def test_blocks_and_records_come_back(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    assert store.recovery.index == "new"
    things = [Thing(f"k{number}", size) for number, size in enumerate((1, 5000, 16 * KIB, 16 * KIB + 1, 100 * KIB))]
    for thing in things:
        fill(store, thing)
    assert hits(store, settings.dir, things) == sum(len(thing.numbers()) for thing in things)
    for thing in things:
        record = store.record("b", thing.key)
        assert record is not None
        assert (record.etag, record.size, record.content) == (thing.etag, thing.size, thing.content)
    assert store.record("b", "other") is None
    assert store.locate(b"x" * 16, 0) is None
    store.close()


def test_small_blocks_are_packed_with_their_records(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    things = [Thing(f"s{number}", number * 13 + 1) for number in range(100)]
    assert store.put_small([small(store, thing) for thing in things]) == [True] * 100
    assert hits(store, settings.dir, things) == 100
    assert all(store.record("b", thing.key) is not None for thing in things)
    assert len(os.listdir(os.path.join(settings.dir, "segments"))) == 1
    store.close()


def test_an_empty_object_needs_no_room(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    thing = Thing("empty", 0)
    assert store.put_small([small(store, thing)]) == [True]
    record = store.record("b", "empty")
    assert record is not None
    assert record.size == 0
    store.close()


def test_a_small_body_that_does_not_hold_is_not_kept(settings: Settings, clock: FakeClock) -> None:
    """A replica answered an empty body under right headers: neither the body nor the record stays."""
    store = open_store(settings, clock)
    right = small(store, Thing("a", 100))
    empty = small(store, Thing("b", 100))
    short = small(store, Thing("c", 100))
    wrong = small(store, Thing("d", 100))
    given = [
        right,
        type(empty)(empty.content, 0, b"", empty.checksum, "b", "b", empty.record),
        type(short)(short.content, 0, short.body[:99], body_checksum(short.body[:99]), "b", "c", short.record),
        type(wrong)(wrong.content, 0, wrong.body, wrong.checksum ^ 1, "b", "d", wrong.record),
    ]
    assert store.put_small(given) == [True, False, False, False]
    assert [store.record("b", key) is not None for key in "abcd"] == [True, False, False, False]
    assert [store.locate(each.content, 0) is not None for each in given] == [True, False, False, False]
    store.close()


def test_an_uncommitted_extent_is_never_found(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    thing = Thing("k", 5000)
    extent = reserve(store, thing, 0)
    write_extent(extent, thing.block(0))
    assert store.locate(thing.content, 0) is None
    store.abandon(extent)
    assert store.commit([commit_of(thing, 0, extent, store)]) == [False]
    assert store.locate(thing.content, 0) is None
    store.abandon(extent)
    store.close()


def test_a_commit_must_fit_its_reservation(settings: Settings, clock: FakeClock) -> None:
    """One block's bytes in another's place; a block that came back truncated."""
    store = open_store(settings, clock)
    thing, other = Thing("k", 20 * KIB), Thing("l", 20 * KIB)
    right = commit_of(thing, 0, reserve(store, thing, 0), store)

    def wrong(**changes: object) -> Commit:
        fields = {name: getattr(right, name) for name in right.__struct_fields__}
        return Commit(**{**fields, "extent": reserve(store, thing, 0), **changes})  # type: ignore[arg-type]

    assert store.commit(
        [
            wrong(content=other.content),
            wrong(number=1),
            wrong(length=right.length - 1),
            wrong(length=right.length + 1),
            wrong(length=0),
            wrong(record=other.record(store)),
            wrong(extent=Extent(99, 8192, 16 * KIB, "/nowhere")),
            right,
            right,
        ]
    ) == [False] * 7 + [True, False]
    store.close()


def test_a_reservation_has_the_size_of_a_block_at_most(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    assert store.reserve(b"c" * 16, 0, settings.block_bytes + 1) == Refused(Refusal.TOO_LARGE)
    assert store.reserve(b"c" * 16, 0, 0) == Refused(Refusal.TOO_LARGE)
    store.close()


def test_a_newer_record_is_not_replaced_by_an_older_one(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    now = clock.now()
    old, new = Thing("k", 10, version=1), Thing("k", 10, version=2)
    before_write = old.record(store, validated_at=now - 5)
    late = old.record(store, validated_at=now + 0.0)
    store.fence.bump(store.fence.slot("b", "k"))
    after_write = new.record(store, validated_at=now - 2)
    assert store.put_record("b", "k", after_write)
    assert not store.put_record("b", "k", before_write)
    assert not store.put_record("b", "k", late), "validated later, but before the write was answered"
    assert store.record("b", "k") == after_write
    store.drop_record("b", "k")
    assert store.put_record("b", "k", before_write)
    assert store.put_record("b", "k", after_write)
    store.close()


def test_of_two_records_behind_no_write_the_later_stays(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    now = clock.now()
    old, new = Thing("k", 10, version=1), Thing("k", 10, version=2)
    assert store.put_record("b", "k", new.record(store, validated_at=now - 1))
    assert not store.put_record("b", "k", old.record(store, validated_at=now - 2))
    assert store.put_record("b", "k", old.record(store, validated_at=now - 0.5))
    store.close()


def test_a_record_from_the_future_does_not_stay_for_ever(settings: Settings, clock: FakeClock) -> None:
    """The clock was set back by a year."""
    store = open_store(settings, clock)
    assert store.put_record("b", "k", Thing("k", 1, 1).record(store, validated_at=clock.now() + 3e7))
    assert store.put_record("b", "k", Thing("k", 1, 2).record(store, validated_at=clock.now()))
    store.close()


def test_the_size_is_a_hard_limit_at_every_moment(settings: Settings, clock: FakeClock) -> None:
    """The cache grew to twice its size: nothing is made before there is room, and room is counted when it is free."""
    store = open_store(settings, clock)
    for number in range(400):
        fill(store, Thing(f"k{number}", 15 * KIB))
        if number % 3 == 0:
            store.put_small([small(store, Thing(f"s{number}-{each}", 1500)) for each in range(5)])
        assert disk_bytes(settings.dir) <= settings.size_bytes
        assert store.stats().used_bytes <= settings.size_bytes
    stats = store.stats()
    assert stats.evicted_segments > 10
    assert stats.segment_bytes > settings.size_bytes - settings.index_bytes - 10 * MIB - 3 * settings.segment_bytes
    store.close()


def test_evicted_segments_count_until_released(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    number = 0
    gone: list[int] = []
    while not gone:
        thing = Thing(f"k{number}", 16 * KIB)
        extent = store.reserve(thing.content, 0, 16 * KIB)
        if isinstance(extent, Refused):
            break
        store.commit([commit_of(thing, 0, extent, store)])
        gone = store.evict()
        number += 1
    assert gone
    assert store.stats().evicted_unreleased_bytes == len(gone) * settings.segment_bytes
    assert store.evict() == [], "what is on its way need not be evicted twice"
    refusals = 0
    for each in range(200):
        extent = store.reserve(b"x" * 16, each, 16 * KIB)
        if isinstance(extent, Refused):
            assert extent.reason is Refusal.NO_SPACE
            refusals += 1
        else:
            store.abandon(extent)
            gone += store.evict()
    assert refusals > 0
    for segment in gone:
        store.released(segment)
    assert store.stats().evicted_unreleased_bytes == 0
    assert isinstance(store.reserve(b"y" * 16, 0, 16 * KIB), Extent)
    store.close()


def test_a_reader_with_the_file_open_reads_on_after_eviction(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    first = Thing("first", 16 * KIB)
    fill(store, first)
    location = store.locate(first.content, 0)
    assert location is not None
    with open(os.path.join(settings.dir, "segments", f"{location.segment:016x}.seg"), "rb") as file:
        for number in range(300):
            fill(store, Thing(f"k{number}", 16 * KIB))
        assert store.locate(first.content, 0) is None
        file.seek(location.offset)
        assert file.read(location.length) == first.block(0)
    store.close()


@pytest.mark.parametrize("size", [1500, 16 * KIB])
def test_what_is_read_stays(settings: Settings, clock: FakeClock, size: int) -> None:
    store = open_store(settings, clock)
    hot, cold = Thing("hot", size), Thing("cold", size)

    def put(thing: Thing) -> None:
        if size > settings.small_bytes:
            fill(store, thing)
            return
        store.put_small([small(store, thing)])
        for gone in store.evict():
            store.released(gone)

    put(hot)
    put(cold)
    for number in range(4000 if size < 2000 else 400):
        put(Thing(f"k{number}", size))
        store.touched([(hot.content, 0)])
    assert store.stats().evicted_segments > 10
    assert hits(store, settings.dir, [hot]) == 1
    assert store.record("b", "hot") is not None
    assert hits(store, settings.dir, [cold]) == 0
    assert store.record("b", "cold") is None, "a record goes with its last block"
    assert store.stats().rescued_bytes > 0
    store.close()


def test_when_everything_is_hot_room_is_made_all_the_same(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    things = [Thing(f"k{number}", 16 * KIB) for number in range(300)]
    store.touched([(each.content, 0) for each in things])
    for thing in things:
        fill(store, thing)
        store.touched([(thing.content, 0)])
        assert disk_bytes(settings.dir) <= settings.size_bytes
    hits(store, settings.dir, things)
    store.close()


def test_pinned_versions_stay_until_their_time_is_over(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    pinned = [Thing(f"p{number}", 16 * KIB) for number in range(40)]
    for thing in pinned:
        fill(store, thing)
        assert store.pin(thing.content, clock.now() + 100)
    for number in range(300):
        fill(store, Thing(f"k{number}", 16 * KIB))
    assert hits(store, settings.dir, pinned) == 40
    store.unpin(pinned[0].content)
    store.close()
    store = open_store(settings, clock)  # pins outlive the daemon
    for number in range(300):
        fill(store, Thing(f"l{number}", 16 * KIB))
    assert hits(store, settings.dir, pinned) in (39, 40)
    clock._now += 101
    for number in range(300):
        fill(store, Thing(f"m{number}", 16 * KIB))
    assert hits(store, settings.dir, pinned) == 0
    store.close()


def test_pins_do_not_break_the_size_limit(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    things = [Thing(f"p{number}", 16 * KIB) for number in range(300)]
    for thing in things:
        store.pin(thing.content, clock.now() + 100)
        fill(store, thing)
        assert disk_bytes(settings.dir) <= settings.size_bytes
    assert hits(store, settings.dir, things) > 0
    store.close()


def test_records_without_blocks_do_not_fill_the_index(tmp_path: Path, clock: FakeClock) -> None:
    settings = Settings(str(tmp_path / "cache"), index_bytes=512 * KIB)
    store = open_store(settings, clock)
    kept = Thing("kept", 100)
    store.put_small([small(store, kept)])
    for number in range(6000):
        thing = Thing(f"head{number}", 100)
        assert store.put_record("b", thing.key, thing.record(store))
    assert store.stats().index_bytes <= settings.index_bytes + 64 * KIB
    assert 0 < store.stats().records < 6000
    assert hits(store, settings.dir, [kept]) == 1
    assert store.record("b", "kept") is not None
    store.close()


def test_a_full_index_evicts_segments(tmp_path: Path, clock: FakeClock) -> None:
    settings = Settings(str(tmp_path / "cache"), index_bytes=1 * MIB, size_bytes=14 * MIB)
    store = open_store(settings, clock)
    things = [Thing(f"s{number}", 100) for number in range(4000)]
    gone: list[int] = []
    for begin in range(0, 4000, 50):
        store.put_small([small(store, thing) for thing in things[begin : begin + 50]])
        gone += store.evict()
    assert gone
    assert hits(store, settings.dir, things) > 100
    assert store.stats().index_bytes <= settings.index_bytes + 64 * KIB
    store.close()


def test_the_file_system_is_never_filled_up(tmp_path: Path, clock: FakeClock) -> None:
    settings = Settings(str(tmp_path / "cache"), min_free_bytes=100 * MIB)
    disk = FaultyDisk()
    store = open_store(settings, clock, disk=disk)
    disk.free = 100 * MIB + settings.segment_bytes - 1
    assert store.reserve(b"c" * 16, 0, 100) == Refused(Refusal.DISK_NEARLY_FULL)
    disk.free = 100 * MIB + settings.segment_bytes
    assert isinstance(store.reserve(b"c" * 16, 0, 100), Extent)
    store.close()


def test_a_file_system_that_others_fill_shrinks_the_cache(tmp_path: Path, clock: FakeClock) -> None:
    settings = Settings(str(tmp_path / "cache"), min_free_bytes=10 * MIB)
    disk = FaultyDisk()
    store = open_store(settings, clock, disk=disk)
    for number in range(60):
        fill(store, Thing(f"k{number}", 16 * KIB))
    disk.free = 10 * MIB - 3 * settings.segment_bytes
    gone = store.evict()
    assert 3 <= len(gone) <= 5
    store.close()


@pytest.mark.parametrize("changes", [{"size_bytes": 9 * MIB}, {"block_bytes": 2 * MIB}])
def test_a_size_that_cannot_work_is_a_configuration_error(
    settings: Settings, clock: FakeClock, changes: dict[str, int]
) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        open_store(dataclasses.replace(settings, **changes), clock)


def test_segments_get_smaller_in_a_small_store(settings: Settings, clock: FakeClock) -> None:
    store = open_store(dataclasses.replace(settings, segment_bytes=256 * MIB), clock)
    fill(store, Thing("k", 16 * KIB))
    (name,) = os.listdir(os.path.join(settings.dir, "segments"))
    assert os.stat(os.path.join(settings.dir, "segments", name)).st_size <= 2 * MIB // 8
    store.close()


def test_one_directory_has_one_store(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    with pytest.raises(StoreFailed, match="in use by another daemon"):
        open_store(settings, clock)
    store.close()
    store.close()
    open_store(settings, clock).close()


def test_verify_drops_what_is_not_right(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    good, bad = Thing("good", 10_000), Thing("bad", 10_000)
    fill(store, good)
    fill(store, bad)
    location = store.locate(bad.content, 0)
    assert location is not None
    with open(os.path.join(settings.dir, "segments", f"{location.segment:016x}.seg"), "r+b") as file:
        file.seek(location.offset + 5000)
        byte = file.read(1)
        file.seek(location.offset + 5000)
        file.write(bytes([byte[0] ^ 1]))
    assert store.verify(good.content, 0)
    assert not store.verify(bad.content, 0)
    assert store.locate(bad.content, 0) is None
    assert not store.verify(bad.content, 0)
    assert store.stats().bad_blocks == 1
    store.close()


# ---- a disk that fails


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["write", "allocate", "open"])
def test_a_failing_disk_raises_and_leaves_the_store_right(
    settings: Settings, clock: FakeClock, call: str, code: int
) -> None:
    disk = FaultyDisk()
    store = open_store(settings, clock, disk=disk)
    things = [Thing(f"k{number}", 16 * KIB) for number in range(12)]
    for thing in things:
        fill(store, thing)
    disk.fail(call, code, path="segments", times=None)
    with pytest.raises(StoreFailed, match=os.strerror(code)):
        for number in range(20):
            fill(store, Thing(f"x{number}", 16 * KIB))
    smalls = [Thing(f"s{number}", 1000) for number in range(3)]
    with pytest.raises(StoreFailed):
        store.put_small([small(store, thing) for thing in smalls])
    assert all(store.record("b", thing.key) is None for thing in smalls)
    disk.heal()
    store._space.collect(wait=True)
    with contextlib.suppress(StoreFailed):
        store.evict()  # tells what failed in the background before the disk was well again
    assert hits(store, settings.dir, things) == 12
    store.probe()
    fill(store, Thing("after", 16 * KIB))
    assert store.put_small([small(store, thing) for thing in smalls]) == [True] * 3
    assert hits(store, settings.dir, [*things, *smalls, Thing("after", 16 * KIB)]) == 16
    store.close()
    store = open_store(settings, clock)
    assert hits(store, settings.dir, [*things, *smalls, Thing("after", 16 * KIB)]) == 16
    store.close()


def test_a_write_that_stops_half_way_makes_no_entry(settings: Settings, clock: FakeClock) -> None:
    disk = FaultyDisk()
    store = open_store(settings, clock, disk=disk)
    thing = Thing("k", 16 * KIB)
    extent = reserve(store, thing, 0)
    write_extent(extent, thing.block(0))
    disk.fail("write", errno.ENOSPC, path="segments", short=True)
    with pytest.raises(StoreFailed):
        store.commit([commit_of(thing, 0, extent, store)])
    assert store.locate(thing.content, 0) is None
    fill(store, thing)
    store.close(clean=False)
    store = open_store(settings, clock)
    assert hits(store, settings.dir, [thing]) == 1
    store.close()


def test_a_torn_header_costs_no_other_block(settings: Settings, clock: FakeClock) -> None:
    """A walk ends at it; but the segment is sealed as soon as its last fill ends, and then its footer is read."""
    disk = FaultyDisk()
    store = open_store(settings, clock, disk=disk)
    things = [Thing(f"k{number}", 16 * KIB) for number in range(4)]
    extents = [reserve(store, thing, 0) for thing in things]
    disk.fail("write", errno.EIO, path="segments", short=True)
    with pytest.raises(StoreFailed):
        store.commit([commit_of(things[0], 0, extents[0], store)])
    for thing, extent in list(zip(things, extents, strict=True))[1:]:
        write_extent(extent, thing.block(0))
        assert store.commit([commit_of(thing, 0, extent, store)]) == [True]
    store.close(clean=False)
    os.unlink(os.path.join(settings.dir, "CURRENT"))
    store = open_store(settings, clock)
    assert hits(store, settings.dir, things) == 3
    store.close()


def test_a_segment_that_cannot_be_removed_counts_until_it_is(settings: Settings, clock: FakeClock) -> None:
    disk = FaultyDisk()
    store = open_store(settings, clock, disk=disk)
    disk.fail("unlink", errno.EIO, path="segments", times=None)
    with pytest.raises(StoreFailed, match="removing"):
        for number in range(300):
            fill(store, Thing(f"k{number}", 16 * KIB))
            assert disk_bytes(settings.dir) <= settings.size_bytes
    disk.heal()
    for number in range(300):
        fill(store, Thing(f"l{number}", 16 * KIB))
        assert disk_bytes(settings.dir) <= settings.size_bytes
    assert store.stats().evicted_unreleased_bytes == 0
    store.close()


def test_a_failed_commit_gives_up_the_whole_batch(settings: Settings, clock: FakeClock) -> None:
    disk = FaultyDisk()
    store = open_store(settings, clock, disk=disk)
    things = [Thing(f"k{number}", 10_000) for number in range(3)]
    commits = [commit_of(thing, 0, reserve(store, thing, 0), store) for thing in things]
    disk.fail("write", errno.EIO, path="segments", after=1)
    with pytest.raises(StoreFailed):
        store.commit(commits)
    assert all(store.locate(thing.content, 0) is None for thing in things)
    assert store.commit(commits) == [False] * 3
    store.close()


def test_probe_fails_as_long_as_the_disk_does(settings: Settings, clock: FakeClock) -> None:
    disk = FaultyDisk()
    store = open_store(settings, clock, disk=disk)
    disk.fail("write", errno.EROFS, path="probe", times=None)
    with pytest.raises(StoreFailed, match="Read-only"):
        store.probe()
    disk.heal()
    store.probe()
    assert "probe" not in os.listdir(settings.dir)
    store.close()


def test_a_failed_seal_is_told_and_its_blocks_are_checked_again(settings: Settings, clock: FakeClock) -> None:
    """After a failed fdatasync the kernel forgets which pages it could not write."""
    disk = FaultyDisk()
    store = open_store(settings, clock, disk=disk)
    things = [Thing(f"k{number}", 16 * KIB) for number in range(6)]
    for thing in things:
        fill(store, thing)
    location = store.locate(things[-1].content, 0)
    assert location is not None
    assert location.verified
    disk.fail("sync", errno.EIO, path=f"{location.segment:016x}")
    with pytest.raises(StoreFailed, match="sealing"):
        for number in range(100):
            fill(store, Thing(f"more{number}", 16 * KIB))
    location = store.locate(things[-1].content, 0)
    assert location is not None
    assert not location.verified
    assert hits(store, settings.dir, things) == 6
    assert store.evict() == []
    store.close()


def test_a_block_that_cannot_be_read_is_a_bad_block(settings: Settings, clock: FakeClock) -> None:
    disk = FaultyDisk()
    store = open_store(settings, clock, disk=disk)
    thing = Thing("k", 10_000)
    fill(store, thing)
    disk.fail("read", errno.EIO, path="segments")
    assert not store.verify(thing.content, 0)
    assert store.locate(thing.content, 0) is None
    store.close()


def test_a_failing_rescue_still_frees_the_room(settings: Settings, clock: FakeClock) -> None:
    disk = FaultyDisk()
    store = open_store(settings, clock, disk=disk)
    hot = Thing("hot", 16 * KIB)
    fill(store, hot)
    store.touched([(hot.content, 0)])
    disk.fail("copy", errno.EIO, times=None)
    with pytest.raises(StoreFailed, match="moving"):
        for number in range(300):
            fill(store, Thing(f"k{number}", 16 * KIB))
    assert store.locate(hot.content, 0) is None
    for gone in store.evict():
        store.released(gone)
    fill(store, Thing("after", 16 * KIB))
    assert hits(store, settings.dir, [Thing("after", 16 * KIB)]) == 1
    store.close()


def test_an_index_that_breaks_is_not_trusted_again(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    things = [Thing(f"k{number}", 16 * KIB) for number in range(10)]
    for thing in things:
        fill(store, thing)
    store._distrust()
    store.close()
    store = open_store(settings, clock)
    assert (store.recovery.index, store.recovery.reason) == ("rebuilt", "the index was seen broken")
    assert hits(store, settings.dir, things) == 10
    store.close()


def test_reading_uses_the_right_file(settings: Settings, clock: FakeClock) -> None:
    store = open_store(settings, clock)
    thing = Thing("k", 10)
    fill(store, thing)
    location = store.locate(thing.content, 0)
    assert location is not None
    assert read(settings.dir, location) == thing.block(0)
    store.close()
