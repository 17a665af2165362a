"""Whatever is found in the directory, what is served afterwards is right, and what was sealed is kept."""

import dataclasses
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from koscache.content import Refused
from koscache.index import Pointer
from koscache.recovery import STARTS_FORGOTTEN_S, STARTS_MAX, RecoveryPolicy, Trust, judge_index
from koscache.store import Store
from tests.fakes.block_store import (
    KIB,
    MIB,
    OTHER_BOOT,
    Settings,
    Thing,
    fill,
    hits,
    open_store,
    reserve,
    small,
    write_extent,
    write_extent_by,
)
from tests.fakes.clock import FakeClock
from tests.fakes.faulty_disk import FaultyDisk

LARGE = [Thing(f"k{number}", 16 * KIB) for number in range(30)]
SMALL = [Thing(f"s{number}", 1500) for number in range(150)]
THINGS = [*LARGE, *SMALL]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(str(tmp_path / "cache"))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def filled(settings: Settings, clock: FakeClock) -> Store:
    store = open_store(settings, clock)
    for thing in LARGE:
        fill(store, thing)
    for begin in range(0, len(SMALL), 10):
        assert all(store.put_small([small(store, thing) for thing in SMALL[begin : begin + 10]]))
    store.evict()
    return store


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a store that crashed; to be copied."""
    path = tmp_path_factory.mktemp("crashed") / "cache"
    filled(Settings(str(path)), FakeClock()).close(clean=False)
    return path


def index_file(settings: Settings) -> Path:
    (found,) = Path(settings.dir).glob("index-*/data.mdb")
    return found


def segment_files(settings: Settings) -> list[Path]:
    return sorted((Path(settings.dir) / "segments").iterdir())


def pointer(settings: Settings) -> Pointer:
    return msgspec.json.decode((Path(settings.dir) / "CURRENT").read_bytes(), type=Pointer)


# ---- the judgement


GOOD = Pointer(format=1, index=3, boot_id="b", clean=False, trusted=True, starts=0, block_bytes=8, map_bytes=1 << 20)


@pytest.mark.parametrize(
    ("found", "numbers", "expected"),
    [
        (None, [], Trust.NO_INDEX),
        (None, [3], Trust.NO_POINTER),
        (GOOD, [3], Trust.SAME_BOOT),
        (GOOD, [2], Trust.WILL_NOT_OPEN),
        (msgspec.structs.replace(GOOD, boot_id="other"), [3], Trust.OTHER_BOOT),
        (msgspec.structs.replace(GOOD, boot_id="other", clean=True), [3], Trust.CLEAN),
        (msgspec.structs.replace(GOOD, trusted=False), [3], Trust.SEEN_BROKEN),
        (msgspec.structs.replace(GOOD, starts=STARTS_MAX), [3], Trust.KILLS),
        (msgspec.structs.replace(GOOD, format=2), [3], Trust.OTHER_FORMAT),
        (msgspec.structs.replace(GOOD, block_bytes=9), [3], Trust.OTHER_BLOCK_SIZE),
    ],
)
def test_trust(found: Pointer | None, numbers: list[int], expected: Trust) -> None:
    assert judge_index(found, numbers, "b", 8) is expected


# ---- restarts that lose nothing


@pytest.mark.parametrize("boot", ["boot-one", OTHER_BOOT])
def test_a_clean_close_keeps_everything(settings: Settings, clock: FakeClock, boot: str) -> None:
    """The cache was wiped by a restart."""
    filled(settings, clock).close()
    store = open_store(settings, clock, boot_id=boot)
    assert (store.recovery.index, store.recovery.reason) == ("trusted", "closed cleanly")
    assert (store.recovery.kept, store.recovery.dropped) == (len(THINGS), 0)
    locations = [store.locate(thing.content, 0) for thing in THINGS]
    assert all(location is not None and location.verified for location in locations)
    assert hits(store, settings.dir, THINGS) == len(THINGS)
    fenced = store.fence.created
    assert fenced is (boot == OTHER_BOOT)
    store.close()


def test_a_crash_keeps_everything(settings: Settings, clock: FakeClock) -> None:
    store = filled(settings, clock)
    torn = reserve(store, Thing("torn", 16 * KIB), 0)
    write_extent(torn, b"half")
    store.close(clean=False)
    store = open_store(settings, clock)
    assert store.recovery.index == "trusted"
    assert store.recovery.kept == len(THINGS)
    assert store.locate(Thing("torn", 16 * KIB).content, 0) is None
    assert hits(store, settings.dir, THINGS) == len(THINGS)
    for thing in THINGS:
        record = store.record("b", thing.key)
        assert record is not None
        assert record.fence == store.fence.value_of("b", thing.key)
    store.close()


def test_a_worker_that_outlives_the_daemon_writes_into_nobodys_block(settings: Settings, clock: FakeClock) -> None:
    """Its extent was reserved by the daemon that died; the next one hands those bytes to nobody."""
    store = filled(settings, clock)
    extent = reserve(store, Thing("old", 16 * KIB), 0)
    store.close(clean=False)
    store = open_store(settings, clock)
    later = [Thing(f"later{number}", 16 * KIB) for number in range(10)]
    for thing in later:
        fill(store, thing)
    write_extent(extent, b"\xff" * extent.length)
    assert hits(store, settings.dir, [*THINGS, *later]) == len(THINGS) + 10
    store.close()


def test_many_crashes_do_not_eat_the_space(settings: Settings, clock: FakeClock) -> None:
    """Each restart goes on filling the segments that the last one left half full."""
    filled(settings, clock).close()
    before = len(segment_files(settings))
    for number in range(12):
        store = open_store(settings, clock)
        store.put_small([small(store, Thing(f"again{number}", 100))])
        clock._now += STARTS_FORGOTTEN_S
        clock._monotonic += STARTS_FORGOTTEN_S + 1
        store.evict()
        store.close(clean=False)
    assert len(segment_files(settings)) <= before + 1
    store = open_store(settings, clock)
    assert hits(store, settings.dir, THINGS) == len(THINGS)
    store.close()


def test_an_index_that_kills_its_daemon_is_given_up(settings: Settings, clock: FakeClock) -> None:
    filled(settings, clock).close()
    for _ in range(STARTS_MAX + 1):
        open_store(settings, clock).close(clean=False)
    store = open_store(settings, clock)
    assert store.recovery.reason == "the index was opened too often by daemons that died"
    assert hits(store, settings.dir, THINGS) == len(THINGS)
    store.close()


# ---- a lost index


def delete_pointer(settings: Settings) -> None:
    (Path(settings.dir) / "CURRENT").unlink()


def garble_pointer(settings: Settings) -> None:
    (Path(settings.dir) / "CURRENT").write_bytes(os.urandom(100))


def delete_index(settings: Settings) -> None:
    shutil.rmtree(index_file(settings).parent)


def delete_index_file(settings: Settings) -> None:
    index_file(settings).unlink()


def garble_index(settings: Settings) -> None:
    path = index_file(settings)
    path.write_bytes(os.urandom(path.stat().st_size))


def empty_index(settings: Settings) -> None:
    index_file(settings).write_bytes(b"")


def cut_index(settings: Settings) -> None:
    path = index_file(settings)
    os.truncate(path, path.stat().st_size // 2)


def zero_index(settings: Settings) -> None:
    path = index_file(settings)
    path.write_bytes(bytes(path.stat().st_size))


LOSSES = [
    delete_pointer,
    garble_pointer,
    delete_index,
    delete_index_file,
    garble_index,
    empty_index,
    cut_index,
    zero_index,
]


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("policy", list(RecoveryPolicy))
def test_a_lost_index_is_built_anew_from_the_segments(
    settings: Settings, clock: FakeClock, lose: Callable[[Settings], None], clean: bool, policy: RecoveryPolicy
) -> None:
    filled(settings, clock).close(clean=clean)
    lose(settings)
    store = open_store(settings, clock, policy=policy)
    assert store.recovery.index in ("rebuilt", "trusted")
    assert store.recovery.kept == len(THINGS)
    for thing in THINGS:
        location = store.locate(thing.content, 0)
        assert location is not None
        assert not location.verified, "nobody has looked at these bytes yet"
        record = store.record("b", thing.key)
        assert record is not None
        assert (record.validated_at, record.fence) == (0.0, 0), "must be revalidated before use"
        assert record.etag == thing.etag
    assert hits(store, settings.dir, THINGS) == len(THINGS)
    assert all((location := store.locate(each.content, 0)) is not None and location.verified for each in THINGS)
    store.close()
    store = open_store(settings, clock)
    assert store.recovery.index == "trusted"
    assert hits(store, settings.dir, THINGS) == len(THINGS)
    store.close()


def test_a_rebuilt_store_uses_new_numbers(settings: Settings, clock: FakeClock) -> None:
    """A worker may still hold descriptors of the old segments and map the old index."""
    store = filled(settings, clock)
    ids = set(store._space.live)
    number = pointer(settings).index
    store.close(clean=False)
    shutil.rmtree(settings.dir)
    store = open_store(settings, FakeClock(clock.now() + 1))
    fill(store, LARGE[0])
    assert pointer(settings).index > number
    assert not ids & set(store._space.live)
    assert min(store._space.live) > max(ids)
    store.close()


def test_segment_numbers_rise_over_every_restart(settings: Settings, clock: FakeClock) -> None:
    seen: list[int] = []
    for restart in range(6):
        store = open_store(settings, clock)
        for number in range(20):
            fill(store, Thing(f"{restart}-{number}", 16 * KIB))
        fresh = [segment for segment in sorted(store._space.live) if segment not in seen]
        assert not seen or not fresh or min(fresh) > max(seen)
        seen += fresh
        store.close(clean=restart % 2 == 0)
        if restart == 3:
            delete_pointer(settings)


def test_another_block_size_drops_everything(settings: Settings, clock: FakeClock) -> None:
    filled(settings, clock).close()
    store = open_store(dataclasses.replace(settings, block_bytes=8 * KIB), clock)
    assert store.recovery.reason == "block_size was changed: everything is dropped"
    assert store.recovery.kept == 0
    assert segment_files(settings) == []
    store.close()


def test_a_smaller_size_is_kept_at_once(settings: Settings, clock: FakeClock) -> None:
    filled(settings, clock).close()
    smaller = dataclasses.replace(settings, size_bytes=settings.size_bytes - MIB - 300 * KIB)
    store = open_store(smaller, clock)
    assert store.stats().used_bytes <= smaller.size_bytes
    assert store.evict()
    assert 0 < hits(store, settings.dir, THINGS) < len(THINGS)
    store.close()


# ---- segments that are not as they were left


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_cut(path: Path) -> None:
    os.truncate(path, 40_000)


def damage_cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def damage_longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(os.urandom(1000))


def damage_garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def damage_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def damage_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * 64)


def damage_first_region(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 64)


def damage_zero_region(path: Path) -> None:
    """A header that is gone looks as if the segment ended there."""
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(64))


def damage_bodies(path: Path) -> None:
    rng = random.Random(1)
    with path.open("r+b") as file:
        for at in range(4096 + 4096, path.stat().st_size - 4096, 3000):
            file.seek(at + rng.randrange(1000))
            file.write(b"\x00\xff")


def damage_footer(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 200)
        file.write(b"\xff" * 100)


def damage_swap(path: Path) -> None:
    """One block's bytes, header and all, in another's place."""
    raw = bytearray(path.read_bytes())
    raw[4096 : 4096 + 20480], raw[24576 : 24576 + 20480] = raw[24576 : 24576 + 20480], raw[4096 : 4096 + 20480]
    path.write_bytes(raw)


def damage_other_segment(path: Path) -> None:
    """Another segment's file under this one's name."""
    other = next(each for each in sorted(path.parent.iterdir()) if each != path)
    shutil.copyfile(other, path)


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("which", ["sealed", "filling"])
@pytest.mark.parametrize("index", ["trusted", "lost", "other boot"])
@pytest.mark.parametrize("policy", list(RecoveryPolicy))
def test_a_damaged_segment_never_gives_a_wrong_byte(
    crashed: Path,
    settings: Settings,
    clock: FakeClock,
    damage: Callable[[Path], None],
    which: str,
    index: str,
    policy: RecoveryPolicy,
) -> None:
    shutil.copytree(crashed, settings.dir)
    store = open_store(settings, clock)
    place = store.locate((LARGE[0] if which == "sealed" else LARGE[-1]).content, 0)
    assert place is not None
    store.close(clean=False)
    path = Path(settings.dir) / "segments" / f"{place.segment:016x}.seg"
    damage(path)
    if index == "lost":
        delete_pointer(settings)
    store = open_store(settings, clock, boot_id=OTHER_BOOT if index == "other boot" else "boot-one", policy=policy)
    in_segment = sum(
        (found := store.locate(each.content, 0)) is not None and found.segment == place.segment for each in THINGS
    )
    others = sum(
        (found := store.locate(each.content, 0)) is not None and found.segment != place.segment for each in THINGS
    )
    assert in_segment <= 6
    assert others >= len(THINGS) - 6, "what was whole is kept"
    assert hits(store, settings.dir, THINGS) >= others
    later = [Thing(f"later{number}", 16 * KIB) for number in range(60)]
    for thing in later:
        fill(store, thing)
    hits(store, settings.dir, [*THINGS, *later])
    store.close()
    store = open_store(settings, clock)
    hits(store, settings.dir, [*THINGS, *later])
    store.close()


def test_lenient_keeps_what_can_be_read_and_strict_does_not(settings: Settings, clock: FakeClock) -> None:
    kept = {}
    for policy in RecoveryPolicy:
        shutil.rmtree(settings.dir, ignore_errors=True)
        store = filled(settings, clock)
        place = store.locate(LARGE[0].content, 0)
        assert place is not None
        store.close()
        damage_bodies(Path(settings.dir) / "segments" / f"{place.segment:016x}.seg")
        damage_first = Path(settings.dir) / "segments" / f"{place.segment:016x}.seg"
        os.utime(damage_first)
        store = open_store(settings, clock, policy=policy)
        kept[policy] = store.recovery.kept
        store.close()
    assert kept[RecoveryPolicy.LENIENT] == len(THINGS)
    assert kept[RecoveryPolicy.STRICT] < len(THINGS)


def test_files_that_nobody_knows_are_removed(settings: Settings, clock: FakeClock) -> None:
    filled(settings, clock).close()
    known = segment_files(settings)
    shutil.copyfile(known[0], known[0].with_name(f"{(1 << 60):016x}.seg"))
    store = open_store(settings, clock)
    assert segment_files(settings) == known
    store.close()


def test_an_object_that_looks_like_a_segment_makes_no_entries(settings: Settings, clock: FakeClock) -> None:
    """A client uploads pieces of this very store's files; the index is lost; nothing of them comes back as an entry."""
    store = filled(settings, clock)
    pieces = [path.read_bytes()[at : at + 16 * KIB] for path in segment_files(settings)[:3] for at in (0, 4096, 24576)]
    from koscache.content import Commit, body_checksum, content_id

    for number, piece in enumerate(pieces):
        content = content_id("b", f"evil{number}", '"e"', len(piece))
        extent = store.reserve(content, 0, len(piece))
        assert not isinstance(extent, Refused)
        write_extent(extent, piece)
        commit = Commit(extent, content, 0, len(piece), body_checksum(piece), "b", f"evil{number}", None)
        assert store.commit([commit]) == [True]
    store.close(clean=False)
    delete_pointer(settings)
    store = open_store(settings, clock)
    assert store.recovery.kept == len(THINGS) + len(pieces)
    assert hits(store, settings.dir, THINGS) == len(THINGS)
    store.close()


# ---- power


@pytest.mark.parametrize("seed", range(25))
def test_a_power_failure_never_gives_a_wrong_byte(settings: Settings, clock: FakeClock, seed: int) -> None:
    rng = random.Random(seed)
    disk = FaultyDisk()
    store = open_store(settings, clock, disk=disk)
    write = write_extent_by(disk)
    things = [Thing(f"k{number}", rng.choice((900, 9000, 16 * KIB, 40 * KIB))) for number in range(60)]
    for thing in things:
        if thing.size < 1000:
            store.put_small([small(store, thing)])
        else:
            fill(store, thing, write=write)
    store.evict()
    store._space.collect(wait=True)
    sealed = {
        segment
        for segment in store._space.live
        if segment not in store._space._writing and segment not in store._space._sealing
    }
    kept = [
        (thing, number)
        for thing in things
        for number in thing.numbers()
        if (location := store.locate(thing.content, number)) is not None and location.segment in sealed
    ]
    store.close(clean=False)
    disk.power_loss(rng)
    store = open_store(settings, clock, disk=disk, boot_id=OTHER_BOOT)
    assert store.recovery.index == "rebuilt"
    hits(store, settings.dir, things)
    for thing, number in kept:
        assert store.locate(thing.content, number) is not None, "sealed means synced"
    for number in range(30):
        fill(store, Thing(f"l{number}", 16 * KIB), write=write)
    hits(store, settings.dir, [*things, *(Thing(f"l{number}", 16 * KIB) for number in range(30))])
    store.close()


# ---- how long it takes


def test_sealed_segments_are_read_by_one_table_each(settings: Settings, clock: FakeClock) -> None:
    """100 GiB of segments of 256 MiB are 400, to be read within a second: 2.5 ms for each of 31 entries. The bound here
    is ten times wider, for slow machines; what counts are the reads."""
    large = dataclasses.replace(
        settings, size_bytes=64 * MIB, block_bytes=4 * KIB, segment_bytes=300 * KIB, index_bytes=8 * MIB
    )
    store = open_store(large, clock)
    while len(store._space.live) < 100:
        thing = Thing(f"k{random.random()}", 4 * KIB)
        fill(store, thing)
    store.close()
    delete_pointer(large)
    disk = FaultyDisk()
    began = time.perf_counter()
    store = open_store(large, clock, disk=disk)
    seconds = time.perf_counter() - began
    segments = store.recovery.segments
    assert segments >= 100
    reads = [path for call, path in disk.calls if call == "read" and path.endswith(".seg")]
    assert len(reads) <= 2 * segments + 100  # a header and a table; the one that was being filled is walked
    assert seconds / segments < 0.025
    assert store.recovery.kept >= 30 * 99
    store.close()


def test_a_full_index_keeps_the_newest_segments(settings: Settings, clock: FakeClock) -> None:
    roomy = dataclasses.replace(settings, size_bytes=20 * MIB)
    store = open_store(roomy, clock)
    things = [Thing(f"s{number}", 300) for number in range(3000)]
    for begin in range(0, 3000, 50):
        assert all(store.put_small([small(store, thing) for thing in things[begin : begin + 50]]))
    store.close()
    delete_pointer(settings)
    store = open_store(dataclasses.replace(roomy, index_bytes=768 * KIB), clock)
    assert 0 < store.recovery.segments_dropped < 20
    kept = [thing for thing in things if store.locate(thing.content, 0) is not None]
    assert 0 < len(kept) < 3000
    assert kept[-1] == things[-1]
    assert 0 < hits(store, settings.dir, things) <= len(kept)
    store.close()
