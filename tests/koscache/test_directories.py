"""Directories of keys and prefixes, and that a write passes the slot of every listing that may show its key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koscache import directories as module
from koscache.directories import DEPTH_MAX, directories, directory
from koscache.fence import SLOTS, Fence

keys = st.one_of(st.text("ab/", max_size=12), st.text("/", max_size=2 * DEPTH_MAX), st.text(max_size=40))


@pytest.fixture(scope="module")
def fence(tmp_path_factory: pytest.TempPathFactory) -> Fence:
    return Fence.open(str(tmp_path_factory.mktemp("fence")), "boot")


@pytest.mark.parametrize(
    ("prefix", "home"),
    [
        ("", ""),
        ("a", ""),
        ("a/", "a/"),
        ("a/b", "a/"),
        ("a//b", "a//"),
        ("/", "/"),
        ("//x", "//"),
        ("a/" * 32 + "x", "a/" * 32),
        ("a/" * 33 + "x", "a/" * 32),
        ("/" * 1024, "/" * 32),
    ],
)
def test_the_directory_of_a_prefix(prefix: str, home: str) -> None:
    assert directory(prefix) == home


def test_the_directories_of_keys() -> None:
    assert directories([]) == set()
    assert directories(["x"]) == {""}
    assert directories(["a/b/c"]) == {"", "a/", "a/b/"}
    assert directories(["a/b/"]) == {"", "a/", "a/b/"}
    assert directories(["//x", "a/y"]) == {"", "/", "//", "a/"}
    assert len(directories(["a/" * 500])) == DEPTH_MAX + 1


@given(st.lists(keys, max_size=5))
def test_several_keys_have_the_directories_of_each(several: list[str]) -> None:
    assert directories(several) == {home for key in several for home in directories([key])}


@given(keys, st.data())
def test_every_prefix_of_a_key_lies_in_one_of_its_directories(key: str, drawn: st.DataObject) -> None:
    prefix = key[: drawn.draw(st.integers(0, len(key)))]
    assert directory(prefix) in directories([key])
    assert key.startswith(directory(prefix))


@given(keys, st.data())
def test_a_write_passes_the_slot_of_every_listing_that_may_show_its_key(
    fence: Fence, key: str, drawn: st.DataObject
) -> None:
    prefix = key[: drawn.draw(st.integers(0, len(key)))]
    before = fence.listing_values("b", prefix)
    elsewhere = fence.listing_values("c", prefix)
    fence.bump_all(fence.directory_slots("b", [key]))
    after = fence.listing_values("b", prefix)
    assert after[1] != before[1] and after[0] == before[0]
    assert fence.listing_values("c", prefix) == elsewhere


def test_a_write_leaves_other_directories_alone(fence: Fence) -> None:
    before = [fence.listing_values("b", prefix) for prefix in ("a/x/", "b/", "a/b/c/")]
    fence.bump_all(fence.directory_slots("b", ["a/b/k"]))
    assert [fence.listing_values("b", prefix) for prefix in ("a/x/", "b/", "a/b/c/")] == before


def test_a_write_to_the_bucket_itself_passes_the_slot_of_all_its_listings(fence: Fence) -> None:
    before = [fence.listing_values("b", prefix) for prefix in ("", "a/", "z/z/z/")]
    fence.bump(fence.bucket_slot("b"))
    assert all(fence.listing_values("b", p)[0] != was[0] for p, was in zip(("", "a/", "z/z/z/"), before, strict=True))


def test_slots_of_listings_are_no_object_s(fence: Fence) -> None:
    slots = {*fence.listing_slots("b", "a/b"), *fence.directory_slots("b", ["a/b", "k"]), fence.bucket_slot("b")}
    assert min(slots) >= SLOTS
    assert max(fence.slot("b", f"k{number}") for number in range(1000)) < SLOTS


def test_a_directory_and_a_bucket_of_one_name_have_slots_of_their_own() -> None:
    assert module.directory_slot_hash("b", "") != module.bucket_slot_hash("b")
    assert module.directory_slot_hash("b", "") != module.directory_slot_hash("b", "/")
