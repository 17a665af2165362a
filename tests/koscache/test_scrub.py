import os
from pathlib import Path

import pytest

from koscache.content import Location
from koscache.store import Store
from tests.fakes.block_store import KIB, Settings, Thing, fill, hits, open_store, small
from tests.fakes.clock import FakeClock

LARGE = [Thing(f"k{number}", 16 * KIB) for number in range(20)]
SMALL = [Thing(f"s{number}", 1500) for number in range(100)]
THINGS = [*LARGE, *SMALL]
TOTAL = sum(thing.size for thing in THINGS)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(str(tmp_path / "cache"))


@pytest.fixture
def store(settings: Settings) -> Store:
    store = open_store(settings, FakeClock())
    for thing in LARGE:
        fill(store, thing)
    assert all(store.put_small([small(store, thing) for thing in SMALL]))
    return store


def rot(settings: Settings, location: Location) -> None:
    fd = os.open(os.path.join(settings.dir, "segments", f"{location.segment:016x}.seg"), os.O_RDWR)
    byte = os.pread(fd, 1, location.offset + location.length // 2)
    os.pwrite(fd, bytes([byte[0] ^ 0x10]), location.offset + location.length // 2)
    os.close(fd)


@pytest.mark.parametrize("budget", [1000, 7777, 100_000, 10_000_000])
def test_a_round_reads_every_byte_once_in_bounded_steps(store: Store, budget: int) -> None:
    read = entries = 0
    for _ in range(TOTAL // budget + 10):
        report = store.scrub_step(budget)
        assert report.bytes_read <= budget
        assert report.bad == ()
        read += report.bytes_read
        entries += report.entries
        if report.round_finished:
            break
    assert (read, entries) == (TOTAL, len(THINGS))
    store.close()


def test_bad_entries_are_found_dropped_and_told(store: Store, settings: Settings) -> None:
    rotten = [LARGE[3], LARGE[19], SMALL[0], SMALL[77]]
    for thing in rotten:
        location = store.locate(thing.content, 0)
        assert location is not None
        rot(settings, location)
    bad: list[tuple[bytes, int]] = []
    for _ in range(1000):
        report = store.scrub_step(20_000)
        bad += report.bad
        if report.round_finished:
            break
    assert sorted(bad) == sorted((thing.content, 0) for thing in rotten)
    assert store.stats().bad_blocks == 4
    assert hits(store, settings.dir, THINGS) == len(THINGS) - 4
    store.close()


def test_what_was_unverified_is_verified_by_a_round(store: Store, settings: Settings) -> None:
    store.close()
    os.unlink(os.path.join(settings.dir, "CURRENT"))
    store = open_store(settings, FakeClock())
    while not store.scrub_step(50_000).round_finished:
        continue
    for thing in THINGS:
        location = store.locate(thing.content, 0)
        assert location is not None
        assert location.verified
    store.close()


def test_segments_may_go_while_they_are_read(store: Store, settings: Settings) -> None:
    finished = 0
    for number in range(300):
        finished += store.scrub_step(3000).round_finished
        thing = Thing(f"more{number}", 16 * KIB)
        fill(store, thing)
        assert hits(store, settings.dir, [thing]) == 1
    assert store.stats().evicted_segments > 10
    assert store.stats().bad_blocks == 0
    store.close()


def test_an_empty_store_is_scrubbed_at_once(settings: Settings) -> None:
    store = open_store(settings, FakeClock())
    assert store.scrub_step(1000).round_finished
    store.close()
