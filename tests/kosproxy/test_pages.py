"""Pages on disk: what was put is what comes back, or nothing; never a pickle, never a failure, never too much space."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import diskcache
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kos.clock import Clock
from kosproxy import pages as module
from kosproxy.pages import Damaged, NotBytes, Page, PageDisk, Pages, PageStore, Unusable, digest, frame, unframe
from tests.fakes.clock import FakeClock

MIB = 1024 * 1024
PAGE = Page((1, 2**64 - 1), 1234.5, (("content-type", "application/xml"), ("x-odd", "\udcff")), b"<x/>" * 100)
KEY = digest(b"question")
ran: list[str] = []


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return ran.append, ("unpickled",)


@pytest.fixture
def store(tmp_path: Path) -> PageStore:
    return PageStore(str(tmp_path), 16 * MIB, 0)


@pytest.fixture
async def pages(store: PageStore) -> AsyncIterator[Pages]:
    made = Pages(store, FakeClock())
    yield made
    await made.close()


def database(tmp_path: Path) -> Path:
    return (tmp_path / "listings" / os.readlink(tmp_path / "listings" / "CURRENT")) / "cache.db"


def other(number: int, size: int = 10) -> Page:
    return Page((number, number), float(number), (), bytes([number % 256]) * size)


headers = st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=4).map(tuple)


@given(st.binary(max_size=40), st.integers(0, 2**64 - 1), st.floats(allow_nan=False), headers, st.binary(max_size=200))
def test_a_frame_gives_back_what_it_holds(key: bytes, value: int, when: float, head: Any, body: bytes) -> None:
    page = Page((value, 1), when, head, body)
    assert unframe(key, frame(key, page)) == page


@given(st.data())
def test_a_frame_that_is_not_whole_or_another_s_is_none(drawn: st.DataObject) -> None:
    framed = bytearray(frame(KEY, PAGE))
    at = drawn.draw(st.integers(0, len(framed) - 1))
    assert unframe(KEY, bytes(framed[:at])) is None
    framed[at] ^= drawn.draw(st.integers(1, 255))
    assert unframe(KEY, bytes(framed)) is None
    assert unframe(digest(b"another"), frame(KEY, PAGE)) is None


def test_what_was_put_comes_back_in_another_process(store: PageStore, tmp_path: Path) -> None:
    assert store.get(KEY) is None
    store.put(KEY, PAGE, None)
    assert store.get(KEY) == PAGE
    script = (
        "import sys; from kosproxy.pages import *; from kosproxy.pages import digest;"
        "s = PageStore(sys.argv[1], 16 << 20, 0); print(len(s.get(digest(b'question')).body));"
        "s.put(digest(b'theirs'), Page((7, 7), 0.0, (), b'theirs'), None)"
    )
    out = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(len(PAGE.body))
    assert store.get(digest(b"theirs")) == Page((7, 7), 0.0, (), b"theirs")


def test_a_page_is_gone_when_its_time_is_over(store: PageStore) -> None:
    store.put(KEY, PAGE, -1.0)
    assert store.get(KEY) is None


@pytest.mark.parametrize("value", ["text", 1, 1.5, None, Bomb(), bytearray(b"x"), [b"x"]])
def test_nothing_but_bytes_goes_in(tmp_path: Path, value: object) -> None:
    cache = diskcache.Cache(str(tmp_path), disk=PageDisk)
    with pytest.raises(NotBytes):
        cache.set(b"k", value)
    with pytest.raises(NotBytes):
        cache.set("k" if value is None else value, b"v")
    with (tmp_path / "file").open("wb+") as file, pytest.raises(NotBytes):
        cache.set(b"k", file, read=True)
    assert len(cache) == 0


@pytest.mark.parametrize("row", ["pickle", "pickle in a file", "text", "file", "number", "nothing"])
def test_a_hostile_row_is_a_miss_and_removed_and_its_file_is_not_touched(
    store: PageStore, tmp_path: Path, row: str
) -> None:
    store.put(KEY, PAGE, None)
    secret = tmp_path / "secret"
    secret.write_bytes(pickle.dumps(Bomb()))
    path = os.path.relpath(secret, database(tmp_path).parent)
    bomb = pickle.dumps(Bomb())
    mode, filename, value = {
        "pickle": (4, None, bomb),
        "pickle in a file": (4, path, None),
        "text": (3, path, None),
        "file": (2, path, None),
        "number": (1, None, 17),
        "nothing": (1, None, None),
    }[row]
    ran.clear()
    connection = sqlite3.connect(database(tmp_path))
    with connection:
        connection.execute("UPDATE Cache SET mode = ?, filename = ?, value = ?", (mode, filename, value))
    connection.close()
    with pytest.raises(Damaged):
        store.get(KEY)
    assert store.get(KEY) is None
    assert not ran and secret.exists()


def test_a_garbled_page_is_removed(store: PageStore, tmp_path: Path) -> None:
    store.put(KEY, PAGE, None)
    connection = sqlite3.connect(database(tmp_path))
    with connection:
        connection.execute("UPDATE Cache SET value = ?", (frame(digest(b"another"), PAGE),))
    connection.close()
    with pytest.raises(Damaged):
        store.get(KEY)
    assert store.get(KEY) is None


def _cut(path: Path) -> None:
    path.write_bytes(b"")


def _garble(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def _garble_behind_the_head(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))


def _drop_the_table(path: Path) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("DROP TABLE Cache")
    connection.close()


def _spoil_the_settings(path: Path) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("INSERT OR REPLACE INTO Settings VALUES ('get', 1)")
        connection.execute("INSERT OR REPLACE INTO Settings VALUES ('disk_min_file_size', 'x')")
    connection.close()


@pytest.mark.parametrize("damage", [_cut, _garble, _garble_behind_the_head, _drop_the_table])
@pytest.mark.parametrize("again", [False, True], ids=["open", "opened anew"])
async def test_a_damaged_database_is_replaced(tmp_path: Path, damage: Callable[[Path], None], again: bool) -> None:
    clock = FakeClock()
    pages = Pages(PageStore(str(tmp_path), 16 * MIB, 0), clock)
    for number in range(50):
        await pages.put(b"%d" % number, other(number, 5000), None)
    if again:
        await pages.close()
        pages._threads.shutdown(wait=True)
        pages = Pages(PageStore(str(tmp_path), 16 * MIB, 0), clock)
    before = database(tmp_path)
    if again and damage is not _drop_the_table:
        for beside in ("-wal", "-shm"):
            before.with_name(before.name + beside).unlink(missing_ok=True)
    damage(before)
    for number in range(50):
        found = await pages.get(b"%d" % number)
        assert found is None or found == other(number, 5000), "a page or none, whatever happened"
        await pages.put(b"%d" % number, other(number, 5000), None)
    clock.move(10.0)
    await pages.put(b"new", PAGE, None)
    clock.move(10.0)
    await pages.put(b"new", PAGE, None)
    assert await pages.get(b"new") == PAGE, "kept again after the pause"
    await pages.close()


async def test_settings_that_somebody_spoiled_are_replaced_with_the_database(tmp_path: Path) -> None:
    PageStore(str(tmp_path), 16 * MIB, 0).put(KEY, PAGE, None)
    _spoil_the_settings(database(tmp_path))
    clock = FakeClock()
    pages = Pages(PageStore(str(tmp_path), 16 * MIB, 0), clock)
    await pages.get(b"k")
    clock.move(10.0)
    await pages.put(b"k", PAGE, None)
    assert await pages.get(b"k") == PAGE
    await pages.close()


async def test_a_directory_that_goes_away_is_made_anew_and_all_workers_follow(tmp_path: Path) -> None:
    clock = FakeClock()
    one, two = (Pages(PageStore(str(tmp_path), 16 * MIB, 0), clock) for _ in range(2))
    await one.put(b"k", PAGE, None)
    assert await two.get(b"k") == PAGE
    shutil.rmtree(tmp_path / "listings")
    assert await one.get(b"k") is None
    await one.put(b"k", PAGE, None)
    assert await two.get(b"k") == PAGE, "two has followed the link"
    await two.put(b"l", PAGE, None)
    assert await one.get(b"l") == PAGE
    assert len(list((tmp_path / "listings").glob("pages-*"))) == 1
    await one.close()
    await two.close()


async def test_a_full_database_gives_its_room_back_and_caching_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    store = PageStore(str(tmp_path), 16 * MIB, 0)
    pages = Pages(store, clock)
    await pages.put(b"k", PAGE, None)
    before = database(tmp_path).parent

    def full(self: Any, *_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(diskcache.Cache, "set", full)
        await pages.put(b"l", PAGE, None)
    assert not pages.on
    assert await pages.get(b"k") is None, "left alone for a while"
    clock.move(10.0)
    assert await pages.get(b"k") is None
    assert not before.exists(), "its space is given back"
    await pages.put(b"k", PAGE, None)
    assert await pages.get(b"k") == PAGE
    await pages.close()


async def test_a_file_system_that_is_nearly_full_takes_no_page(tmp_path: Path) -> None:
    pages = Pages(PageStore(str(tmp_path), 16 * MIB, 1 << 60), FakeClock())
    await pages.put(b"k", PAGE, None)
    assert not pages.on
    await pages.close()


async def test_a_directory_that_cannot_be_made_is_a_miss(tmp_path: Path) -> None:
    (tmp_path / "listings").write_text("a file stands in the way")
    clock = FakeClock()
    pages = Pages(PageStore(str(tmp_path), 16 * MIB, 0), clock)
    assert await pages.get(b"k") is None
    assert not pages.on
    await pages.put(b"k", PAGE, None)
    (tmp_path / "listings").unlink()
    clock.move(10.0)
    await pages.put(b"k", PAGE, None)
    assert await pages.get(b"k") == PAGE
    await pages.close()


async def test_a_database_that_another_process_holds_locked_is_a_miss_and_not_a_wait(tmp_path: Path) -> None:
    PageStore(str(tmp_path), 16 * MIB, 0).put(digest(b"k"), PAGE, None)
    holder = sqlite3.connect(database(tmp_path), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    clock = FakeClock()
    pages = Pages(PageStore(str(tmp_path), 16 * MIB, 0), clock)
    started = asyncio.get_running_loop().time()
    assert await pages.get(b"k") is None
    assert asyncio.get_running_loop().time() - started < 5.0
    assert not pages.on
    holder.execute("ROLLBACK")
    holder.close()
    clock.move(10.0)
    assert await pages.get(b"k") == PAGE, "nothing was thrown away"
    await pages.close()


async def test_a_disk_that_hangs_is_a_miss_for_all_and_asked_no_more(
    pages: Pages, store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.05)
    release = asyncio.Event()
    asked: list[bytes] = []
    loop = asyncio.get_running_loop()

    def hang(key: bytes) -> None:
        asked.append(key)
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result()

    monkeypatch.setattr(store, "get", hang)
    found = await asyncio.gather(*(pages.get(b"%d" % number) for number in range(30)))
    assert found == [None] * 30
    assert len(asked) <= 8 and not pages.on
    release.set()


async def test_the_space_is_bounded_whatever_the_pages_lengths(tmp_path: Path) -> None:
    limit = 4 * MIB
    store = PageStore(str(tmp_path), limit, 0)
    largest = 0
    for number in range(400):
        store.put(digest(b"%d" % number), other(number, 300), None)
    for number in range(60):
        store.put(digest(b"large %d" % number), other(number, 400_000), None)
        largest = max(
            largest, sum(file.stat().st_size for file in (tmp_path / "listings").rglob("*") if file.is_file())
        )
    assert largest <= limit
    assert store.get(digest(b"large 59")) == other(59, 400_000)
    assert store.get(digest(b"1")) is None, "the oldest went"


async def test_a_page_that_is_too_long_is_not_kept(tmp_path: Path) -> None:
    pages = Pages(PageStore(str(tmp_path), 4 * MIB, 0), FakeClock())
    await pages.put(b"k", other(1, MIB), None)
    assert await pages.get(b"k") is None and pages.on
    await pages.close()


def test_workers_that_start_at_once_share_one_database(tmp_path: Path) -> None:
    script = (
        "import sys; from kosproxy.pages import *; from kosproxy.pages import digest;"
        "s = PageStore(sys.argv[1], 16 << 20, 0); s.put(digest(sys.argv[2].encode()), Page((1, 1), 0.0, (), b'x'), None)"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(number)]) for number in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    store = PageStore(str(tmp_path), 16 * MIB, 0)
    assert all(store.get(digest(str(number).encode())) is not None for number in range(4))
    assert len(list((tmp_path / "listings").glob("pages-*"))) == 1


async def test_the_real_clock_will_do(tmp_path: Path) -> None:
    pages = Pages(PageStore(str(tmp_path), 4 * MIB, 0), Clock())
    await pages.put(b"k", PAGE, 60.0)
    assert await pages.get(b"k") == PAGE
    await pages.close()
    assert await pages.get(b"k") is None, "closed"


def test_a_name_that_diskcache_would_expand_is_refused(tmp_path: Path) -> None:
    os.environ["KOS_TEST_NAME"] = "elsewhere"
    with pytest.raises(Unusable):
        PageStore(str(tmp_path / "$KOS_TEST_NAME"), 4 * MIB, 0).put(KEY, PAGE, None)
    del os.environ["KOS_TEST_NAME"]
    assert not (tmp_path / "elsewhere").exists()
