"""What the store says that it has: all of it, each block once a way, the newest and the touched where they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from koscache.inventory import Held, Place, runs_of
from koscache.store import Store
from tests.fakes.block_store import KIB, MIB, Settings, Thing, fill, open_store, small
from tests.fakes.clock import FakeClock


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(str(tmp_path / "cache"))


def by_segment(store: Store, *, hot: bool) -> list[Held]:
    found: list[Held] = []
    for segment in store.segments():
        start: int | None = 0
        while start is not None:
            page = store.of_segment(segment, start, hot)
            found += page.held
            start = page.next
    return found


def by_object(store: Store, *, hot: bool) -> list[Held]:
    found: list[Held] = []
    place: Place | None = Place()
    while place is not None:
        page = store.of_objects(place, hot)
        found += page.held
        place = page.next
    return found


def names(found: list[Held]) -> list[tuple[str, int]]:
    return [(each.name, each.number) for each in found]


def test_every_block_is_found_both_ways(settings: Settings) -> None:
    store = open_store(settings, FakeClock())
    things = [Thing(f"k{number}", size) for number, size in enumerate((1, 16 * KIB, 100 * KIB, 300 * KIB))]
    for thing in things:
        fill(store, thing)
    store.put_small([small(store, Thing("small", 500))])
    wanted = sorted((thing.key, number) for thing in things for number in thing.numbers())
    assert sorted(names(by_segment(store, hot=False))) == sorted([*wanted, ("small", 0)])
    found = by_object(store, hot=False)
    assert sorted(names(found)) == sorted([*wanted, ("small", 0)])
    assert {each.length for each in found if each.name == "k3"} == {16 * KIB, 300 * KIB % (16 * KIB)}
    assert all(each.verified and each.bucket == "b" for each in found)
    assert by_segment(store, hot=True) == by_object(store, hot=True) == []
    assert store.numbers(things[2].content) == list(range(7))
    store.close()


def test_what_was_read_comes_the_newest_first(settings: Settings) -> None:
    store = open_store(settings, FakeClock())
    old, new = Thing("old", 64 * KIB), Thing("new", 160 * KIB)
    fill(store, old)
    fill(store, new)
    store.touched([(old.content, 1), (new.content, 2), (new.content, 8)])
    assert len(store.segments()) > 1
    assert names(by_segment(store, hot=True)) == [("new", 8), ("new", 2), ("old", 1)]
    assert sorted(names(by_object(store, hot=True))) == [("new", 2), ("new", 8), ("old", 1)]
    store.close()


def test_blocks_of_an_object_that_is_not_known_here_are_named_by_their_segment(settings: Settings) -> None:
    store = open_store(settings, FakeClock())
    foreign, changed = Thing("foreign", 40 * KIB), Thing("changed", 40 * KIB)
    fill(store, foreign, record=False)
    fill(store, changed)
    later = Thing("changed", 40 * KIB, version=2)
    store.put_record("b", "changed", later.record(store, validated_at=2.0))
    assert sorted(set(names(by_segment(store, hot=False)))) == [("foreign", number) for number in range(3)]
    assert by_object(store, hot=False) == [], "of the version that is known now there is no block"
    assert {each.record.content for each in by_segment(store, hot=False)} == {foreign.content}
    store.close()


def test_a_short_block_that_no_segment_names_is_found_by_its_object(settings: Settings) -> None:
    store = open_store(settings, FakeClock())
    thing = Thing("k", 700)
    store.put_record("b", "k", thing.record(store))
    store.put_small([small(store, thing, record=False)])
    assert by_segment(store, hot=False) == []
    assert names(by_object(store, hot=False)) == [("k", 0)]
    store.close()


def test_pages_are_bounded_and_go_on_where_the_last_one_ended(tmp_path: Path) -> None:
    large = Settings(str(tmp_path / "cache"), size_bytes=32 * MIB, segment_bytes=4 * MIB, index_bytes=8 * MIB)
    store = open_store(large, FakeClock())
    wide = Thing("wide", 600 * 16 * KIB)
    fill(store, wide)
    store.put_small([small(store, Thing(f"s{number:03d}", 50)) for number in range(700)])
    place: Place | None = Place()
    pages = []
    while place is not None:
        page = store.of_objects(place, False)
        pages.append(page.held)
        place = page.next
    assert max(map(len, pages)) <= 256
    assert len(pages) > 4
    found = [each for page in pages for each in page]
    assert len(found) == len(set(names(found))) == 1300
    assert len(by_segment(store, hot=False)) == 1300
    store.close()


def test_a_segment_that_is_gone_or_garbled_has_nothing(settings: Settings) -> None:
    store = open_store(settings, FakeClock())
    for number in range(3):
        fill(store, Thing(f"k{number}", 100 * KIB))
    assert store.of_segment(10_000, 0, False).held == []
    oldest = store.segments()[-1]
    store.close()
    (path,) = Path(settings.dir, "segments").glob(f"{oldest:016x}*")
    store = open_store(settings, FakeClock())
    path.write_bytes(bytes(path.stat().st_size))
    assert store.of_segment(oldest, 0, False) == ([], None)
    assert by_object(store, hot=False), "the index still says what there is"
    store.close()


def test_runs() -> None:
    assert runs_of([]) == []
    assert runs_of([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 6), (7, 9)]
