"""Which names were asked for before: by whom does not matter, for how long does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from koscache import touchmap
from koscache.touchmap import TouchMap


def names(first: int, count: int) -> list[bytes]:
    return [b"name %d" % each for each in range(first, first + count)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Maps of 8192 bits, of which 2048 may be set, counted every 100 touches."""
    monkeypatch.setattr(touchmap, "_BITS", 1 << 13)
    monkeypatch.setattr(touchmap, "_MAP_BYTES", 1 << 10)
    monkeypatch.setattr(touchmap, "_FILL_MAX", 1 << 11)
    monkeypatch.setattr(touchmap, "_COUNT_EVERY", 100)
    monkeypatch.setattr(touchmap, "_YOUNG_AT", 2 << 10)
    monkeypatch.setattr(touchmap, "_FILE_BYTES", (2 << 10) + 4096)
    return 1 << 11


def test_the_second_touch_knows_of_the_first(tmp_path: Path) -> None:
    touches = TouchMap(str(tmp_path))
    assert not touches.seen(b"a")
    assert not touches.touch(b"a")
    assert touches.seen(b"a")
    assert touches.touch(b"a")
    assert not touches.seen(b"b")
    touches.close()


def test_looking_is_no_touch(tmp_path: Path) -> None:
    touches = TouchMap(str(tmp_path))
    assert not touches.seen(b"a")
    assert not touches.seen(b"a")
    assert not touches.touch(b"a")
    touches.close()


def test_all_who_map_it_share_what_they_know(tmp_path: Path) -> None:
    one, other = TouchMap(str(tmp_path)), TouchMap(str(tmp_path))
    one.touch(b"a")
    assert other.seen(b"a")
    script = "import sys; from koscache.touchmap import TouchMap; t = TouchMap(sys.argv[1]); print(t.touch(b'a'), t.touch(b'b'))"
    out = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "False"]
    assert one.seen(b"b")
    one.close()
    other.close()


def test_what_was_touched_outlives_those_who_touched_it(tmp_path: Path) -> None:
    first = TouchMap(str(tmp_path))
    first.touch(b"a")
    first.close()
    again = TouchMap(str(tmp_path))
    assert again.seen(b"a")
    again.close()


def test_a_name_is_hardly_ever_taken_for_another(tmp_path: Path) -> None:
    """2^24 bits: of names that were never touched one in some hundred seems to have been, after 2^17 others."""
    touches = TouchMap(str(tmp_path))
    count = 1 << 17
    for name in names(0, count):
        touches.touch(name)
    wrong = sum(touches.seen(name) for name in names(count, 10_000))
    assert wrong < 200  # 78 are to be expected
    assert all(touches.seen(name) for name in names(0, count))
    touches.close()


def test_a_full_map_becomes_the_old_one_and_is_forgotten_when_the_next_is_full(tmp_path: Path, small: int) -> None:
    touches = TouchMap(str(tmp_path))
    early = names(0, 100)
    for name in early:
        touches.touch(name)
    turned = 100
    while touches._map[touchmap._YOUNG_AT] == 0:
        touches.touch(names(turned, 1)[0])
        turned += 1
    assert small < turned < 2 * small
    assert all(touches.seen(name) for name in early)
    later = names(1_000_000, 100)
    for name in later:
        touches.touch(name)
    more = 2_000_000
    while touches._map[touchmap._YOUNG_AT] == 1:
        touches.touch(names(more, 1)[0])
        more += 1
    assert all(touches.seen(name) for name in later)
    # A quarter of the bits is set by others, whatever was touched.
    assert sum(touches.seen(name) for name in early) < 60
    touches.close()


def test_what_is_touched_again_lives_on(tmp_path: Path, small: int) -> None:
    touches = TouchMap(str(tmp_path))
    touches.touch(b"often")
    for each in range(10 * small):
        touches.touch(b"name %d" % each)
        if each % 500 == 0:
            assert touches.touch(b"often")
    touches.close()


def test_a_file_of_another_length_is_made_as_long_as_it_must_be(tmp_path: Path) -> None:
    (tmp_path / "touches").write_bytes(b"\x01")
    touches = TouchMap(str(tmp_path))
    assert os.stat(tmp_path / "touches").st_size == touchmap._FILE_BYTES
    touches.touch(b"a")
    assert touches.seen(b"a")
    touches.close()


def test_garbage_in_it_is_only_a_wrong_guess(tmp_path: Path) -> None:
    (tmp_path / "touches").write_bytes(os.urandom(touchmap._FILE_BYTES))
    touches = TouchMap(str(tmp_path))
    for name in names(0, 1000):
        touches.touch(name)
    assert all(touches.seen(name) for name in names(0, 1000))
    touches.close()


def test_all_its_pages_are_there(tmp_path: Path) -> None:
    TouchMap(str(tmp_path)).close()
    assert os.stat(tmp_path / "touches").st_blocks * 512 >= touchmap._FILE_BYTES


def test_where_it_cannot_be_made_that_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "touches").mkdir()
    with pytest.raises(OSError):
        TouchMap(str(tmp_path))
    with pytest.raises(OSError):
        TouchMap(str(tmp_path / "no such"))
