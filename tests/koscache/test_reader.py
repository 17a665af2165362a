import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from koscache.disk import SegmentGone, StoreFailed
from koscache.reader import Reader
from koscache.segments import segment_path
from koscache.store import Store
from tests.fakes.block_store import BOOT, KIB, OTHER_BOOT, Settings, Thing, fill, open_store, small
from tests.fakes.clock import FakeClock


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(str(tmp_path / "cache"))


@pytest.fixture
def store(settings: Settings) -> Store:
    return open_store(settings, FakeClock())


@pytest.fixture
def reader(settings: Settings, store: Store) -> Reader:
    reader = Reader(settings.dir, boot_id=BOOT)
    assert reader.open()
    return reader


def body_of(reader: Reader, thing: Thing, number: int = 0) -> bytes | None:
    location = reader.locate(thing.content, number)
    if location is None:
        return None
    fd = reader.borrow(location.segment)
    try:
        return os.pread(fd, location.length, location.offset)
    finally:
        reader.give_back(location.segment)


def evict_all(store: Store) -> list[int]:
    gone: list[int] = []
    for number in range(200):
        thing = Thing(f"filler{number}", 16 * KIB)
        extent = store.reserve(thing.content, 0, 16 * KIB)
        store.abandon(extent)  # type: ignore[arg-type]
        went = store.evict()
        for segment in went:
            store.released(segment)
        gone += went
    return gone


def test_with_no_store_everything_is_a_miss(settings: Settings) -> None:
    reader = Reader(settings.dir, boot_id=BOOT)
    assert not reader.open()
    assert reader.record("b", "k") is None
    assert reader.locate(b"c" * 16, 0) is None
    assert reader.locate_run(b"c" * 16, 0, 3) is None
    assert reader.blocks(b"c" * 16) == []
    assert reader.fence.bump(reader.fence.slot("b", "k")), "writes bump the fence before there is a daemon"
    store = open_store(settings, FakeClock())
    assert reader.fence.current(), "the daemon takes over the fence that is there"
    fill(store, Thing("k", 10))
    assert reader.reopen()
    assert reader.record("b", "k") is not None
    reader.close()
    store.close()


def test_a_reader_sees_what_the_store_committed(store: Store, reader: Reader) -> None:
    thing, packed = Thing("k", 40 * KIB), Thing("s", 700)
    fill(store, thing)
    store.put_small([small(store, packed)])
    record = reader.record("b", "k")
    assert record == thing.record(store)
    assert reader.record("b", "k") is record, "decoded once"
    assert [body_of(reader, thing, number) for number in range(3)] == [thing.block(number) for number in range(3)]
    assert body_of(reader, packed) == packed.block(0)
    run = reader.locate_run(thing.content, 0, 3)
    assert run == [reader.locate(thing.content, number) for number in range(3)]
    assert reader.locate_run(thing.content, 0, 4) is None
    assert reader.locate_run(thing.content, 2, 3) == run[2:]
    assert reader.blocks(thing.content) == list(enumerate(run))
    changed = thing.record(store, validated_at=5.0)
    store.put_record("b", "k", changed)
    assert reader.record("b", "k") == changed
    store.drop_record("b", "k")
    assert reader.record("b", "k") is None
    reader.close()
    store.close()


def test_decoded_records_are_bounded(store: Store, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koscache.reader._DECODED_MAX", 10)
    things = [Thing(f"k{number}", 10) for number in range(50)]
    store.put_small([small(store, thing) for thing in things])
    for thing in things:
        assert reader.record("b", thing.key) is not None
    assert len(reader._decoded) == 10
    reader.close()
    store.close()


def test_an_evicted_segment_is_gone_unless_borrowed(store: Store, reader: Reader) -> None:
    borrowed, other = Thing("a", 16 * KIB), Thing("b", 16 * KIB)
    fill(store, borrowed)
    location = reader.locate(borrowed.content, 0)
    assert location is not None
    fd = reader.borrow(location.segment)
    assert reader.borrow(location.segment) == fd
    gone = evict_all(store)
    assert location.segment in gone
    assert reader.locate(borrowed.content, 0) is None
    assert not reader.drop(location.segment)
    with pytest.raises(SegmentGone):
        reader.borrow(location.segment)
    assert os.pread(fd, location.length, location.offset) == borrowed.block(0), "to the end, whatever happens"
    assert not reader.give_back(location.segment)
    assert reader.give_back(location.segment), "closed now: acknowledge"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(SegmentGone):
        reader.borrow(location.segment)
    assert reader.drop(location.segment)
    assert reader.drop(other.size)
    reader.close()
    store.close()


def test_a_segment_that_nobody_borrows_is_closed_at_once(store: Store, reader: Reader) -> None:
    thing = Thing("a", 16 * KIB)
    fill(store, thing)
    assert body_of(reader, thing) == thing.block(0)
    (segment,) = reader.held()
    assert reader.drop(segment)
    assert reader.held() == []
    reader.close()
    store.close()


def test_descriptors_are_bounded(settings: Settings, store: Store) -> None:
    reader = Reader(settings.dir, open_max=3, boot_id=BOOT)
    assert reader.open()
    things = [Thing(f"k{number}", 16 * KIB) for number in range(60)]
    for thing in things:
        fill(store, thing)
    for thing in things:
        assert body_of(reader, thing) == thing.block(0)
        assert len(reader.held()) <= 3
    locations = [reader.locate(thing.content, 0) for thing in things[::7]]
    fds = {location.segment: reader.borrow(location.segment) for location in locations if location is not None}
    assert len(fds) > 3
    assert len(set(fds.values())) == len(fds), "what is lent is never closed"
    for segment in fds:
        reader.give_back(segment)
    reader.close()
    store.close()


def test_a_reader_follows_a_new_index(settings: Settings, store: Store, reader: Reader) -> None:
    thing = Thing("k", 100)
    fill(store, thing)
    assert reader.record("b", "k") is not None
    store.close(clean=False)
    assert reader.record("b", "k") is not None, "hits go on while the daemon is away"
    assert body_of(reader, thing) == thing.block(0)
    os.unlink(os.path.join(settings.dir, "CURRENT"))
    store = open_store(settings, FakeClock())
    assert store.recovery.index == "rebuilt"
    old = reader.record("b", "k")
    assert old is not None
    assert old.fence != 0, "the old index is still mapped"
    assert reader.reopen()
    new = reader.record("b", "k")
    assert new is not None
    assert new.fence == 0
    assert reader.reopen()
    store.close()
    reader.close()


def test_a_reader_notices_a_new_fence(settings: Settings, store: Store, reader: Reader) -> None:
    store.close()
    os.unlink(os.path.join(settings.dir, "fence"))
    store = open_store(settings, FakeClock())
    slot = reader.fence.slot("b", "k")
    assert reader.fence.value(slot) != store.fence.value(slot)
    reader.reopen()
    assert reader.fence.value(slot) == store.fence.value(slot)
    store.close()
    reader.close()


def test_reopen_lets_go_of_segments_that_went_meanwhile(settings: Settings, store: Store, reader: Reader) -> None:
    thing = Thing("k", 16 * KIB)
    fill(store, thing)
    assert body_of(reader, thing) == thing.block(0)
    evict_all(store)
    assert reader.held() != []
    assert reader.reopen()
    assert reader.held() == []
    store.close()
    reader.close()


def test_a_garbled_index_is_a_miss(settings: Settings, store: Store) -> None:
    store.close()
    (path,) = Path(settings.dir).glob("index-*/data.mdb")
    path.write_bytes(os.urandom(path.stat().st_size))
    reader = Reader(settings.dir, boot_id=BOOT)
    assert not reader.open()
    assert reader.record("b", "k") is None
    assert reader.errors_count == 1
    reader.close()


def test_a_reader_without_a_fence_does_not_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(StoreFailed):
        Reader(str(path), boot_id=OTHER_BOOT).open()


def test_a_new_boot_fences_every_record(settings: Settings, store: Store) -> None:
    thing = Thing("k", 10)
    fill(store, thing)
    store.close()
    store = open_store(settings, FakeClock(), boot_id=OTHER_BOOT)
    reader = Reader(settings.dir, boot_id=OTHER_BOOT)
    assert reader.open()
    record = reader.record("b", "k")
    assert record is not None
    assert record.fence != reader.fence.value_of("b", "k")
    reader.close()
    store.close()


def test_threads_read_while_the_store_writes_and_evicts(store: Store, reader: Reader) -> None:
    """Looking up, borrowing and reading from three threads: only right bytes, or a miss."""
    things = [Thing(f"k{number}", 9000) for number in range(250)]
    stop = threading.Event()
    wrong: list[str] = []
    served = [0, 0, 0]

    def run(thread: int) -> None:
        rng = random.Random(thread)
        while not stop.is_set():
            thing = rng.choice(things)
            try:
                body = body_of(reader, thing)
            except SegmentGone:
                continue
            if body is not None:
                served[thread] += 1
                if body != thing.block(0):
                    wrong.append(thing.key)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thing in things:
        fill(store, thing)
    while not all(served):
        fill(store, random.choice(things))
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    reader.close()
    store.close()


def test_another_process_reads_the_same(settings: Settings, store: Store) -> None:
    thing = Thing("k", 10_000)
    fill(store, thing)
    script = (
        "import os, sys\n"
        "from koscache.reader import Reader\n"
        "reader = Reader(sys.argv[1], boot_id=sys.argv[2])\n"
        "assert reader.open()\n"
        "record = reader.record('b', 'k')\n"
        "location = reader.locate(record.content, 0)\n"
        "fd = reader.borrow(location.segment)\n"
        "sys.stdout.buffer.write(os.pread(fd, location.length, location.offset))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, settings.dir, BOOT], capture_output=True, check=True)
    assert done.stdout == thing.block(0)
    store.close()


def test_a_reader_cannot_write_the_index(settings: Settings, store: Store) -> None:
    store.close()
    reader = Reader(settings.dir, boot_id=BOOT)
    assert reader.open()
    assert reader._environment is not None
    with pytest.raises(StoreFailed), reader._environment.write():
        pass
    reader.close()


def test_paths(settings: Settings, reader: Reader, store: Store) -> None:
    assert reader.segment_path(5) == segment_path(settings.dir, 5)
    reader.close()
    store.close()
    shutil.rmtree(settings.dir)


def test_what_is_remembered_of_the_index_never_outlives_a_change_of_it(
    settings: Settings, store: Store, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koscache.reader._FOUND_MAX", 3)
    things = [Thing(f"k{number}", 20 * KIB) for number in range(5)]

    def agree() -> None:
        for thing in things:
            for _ in range(2):
                found = reader.first("b", thing.key)
                record = reader.record("b", thing.key)
                assert (None if found is None else found.record) == record
                if found is not None and record is not None:
                    assert found.location == reader.locate(record.content, 0)
                    assert found.slot == reader.fence.slot("b", thing.key)
        assert len(reader._found) <= 3

    agree()
    for thing in things:
        fill(store, thing)
        agree()
    assert reader.first("b", "k4") is reader.first("b", "k4"), "looked up once while nothing changes"
    store.put_record("b", "k0", Thing("k0", 20 * KIB, version=1).record(store, validated_at=9.0))
    agree()
    store.drop_record("b", "k1")
    agree()
    for segment in evict_all(store):
        reader.drop(segment)
    agree()
    assert reader.first("b", "k4") is None, "its blocks were evicted, and the record with the last one"
    store.close(clean=False)
    agree()
    os.unlink(os.path.join(settings.dir, "CURRENT"))
    store = open_store(settings, FakeClock())
    reader.reopen()
    agree()
    store.close()
    reader.close()
