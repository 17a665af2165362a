import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kos.s3.object_response import ObjectMeta
from koscache.content import (
    Freshness,
    Record,
    block_count,
    block_length,
    content_id,
    is_immutable,
    judge,
    make_record,
    object_hash,
    split,
    split_name,
    storable,
    version_name,
)

META = ObjectMeta('"e"', 10, "Mon, 01 Jan 2024 00:00:00 GMT", (("content-type", "x/y"),), (("crc32", "AA=="),), True)


def test_a_content_id_differs_with_each_of_its_parts() -> None:
    ids = {
        content_id("b", "k", '"e"', 1),
        content_id("c", "k", '"e"', 1),
        content_id("b", "l", '"e"', 1),
        content_id("b", "k", '"f"', 1),
        content_id("b", "k", '"e"', 2),
        content_id("bk", "", '"e"', 1),
        content_id("b", 'k\0"e"', "", 1),  # a key cannot take the place of the next part ...
    }
    assert len(ids) == 7
    assert all(len(each) == 16 for each in ids)


@given(
    st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4), st.text(max_size=4), st.integers(0, 9)), max_size=9)
)
def test_content_ids_are_equal_only_for_equal_versions(versions: list[tuple[str, str, str, int]]) -> None:
    # S3 allows a NUL in keys and nowhere else among the four parts
    cleaned = [(b.replace("\0", ""), k, e.replace("\0", ""), size) for b, k, e, size in versions]
    assert len({content_id(*each) for each in cleaned}) == len(set(cleaned))


@given(st.text(max_size=9), st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=9))
def test_a_version_has_a_name_that_gives_key_and_id_back(key: str, version_id: str) -> None:
    assert split_name(version_name(key, version_id)) == (key, version_id)
    assert is_immutable(version_name(key, version_id)) is (version_id != "null")


def test_a_key_is_its_own_name() -> None:
    assert split_name("k/\0v\0l") == ("k/\0v\0l", None) and not is_immutable("k/\0v\0l")


def test_versions_of_the_same_bytes_share_their_blocks() -> None:
    current = make_record("b", "k", META, validated_at=1.0, fence=2)
    version = make_record("b", version_name("k", "v1"), META, validated_at=1.0, fence=2)
    assert current.content == version.content


def test_names_with_surrogates_can_be_hashed() -> None:
    assert object_hash("b", "k\udcff") != object_hash("b", "k")


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 64))
def test_split_covers_the_range_once_and_in_order(start: int, length: int, block: int) -> None:
    stop = start + length
    at = start
    for number, offset, piece in split(start, stop, block):
        assert number * block + offset == at
        assert 0 < piece <= block - offset
        at += piece
    assert at == max(start, stop)


@given(st.integers(0, 1000), st.integers(1, 64))
def test_blocks_add_up_to_the_object(size: int, block: int) -> None:
    count = block_count(size, block)
    assert sum(block_length(size, number, block) for number in range(count)) == size
    assert block_length(size, count, block) == 0


def test_a_record_travels_through_msgpack_and_gives_its_meta_back() -> None:
    record = make_record("b", "k", META, validated_at=12.5, fence=(1 << 64) - 1)
    there = msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=Record)
    assert there == record
    assert there.meta == META
    assert there.meta is there.meta
    assert there.content == content_id("b", "k", '"e"', 10)


def test_a_revalidated_record_is_the_same_version() -> None:
    record = make_record("b", "k", META, validated_at=1.0, fence=2)
    later = record.revalidated(5.0, 6)
    assert (later.validated_at, later.fence, later.content, later.meta) == (5.0, 6, record.content, record.meta)


def test_a_header_that_is_not_utf8_cannot_be_kept() -> None:
    assert storable(META)
    assert not storable(ObjectMeta('"e"', 1, "", (("x-amz-meta-a", "\udcff"),)))
    assert not storable(ObjectMeta("\udcff", 1, "", ()))


@pytest.mark.parametrize(
    ("validated_at", "fence", "slot", "fresh_s", "expected"),
    [
        (100.0, 7, 7, 30.0, Freshness.FRESH),
        (69.0, 7, 7, 30.0, Freshness.EXPIRED),
        (70.0, 7, 7, 30.0, Freshness.EXPIRED),
        (100.0, 7, 7, 0.0, Freshness.EXPIRED),
        (0.5, 7, 7, math.inf, Freshness.FRESH),
        (100.0, 7, 8, math.inf, Freshness.FENCED),
        (100.0, 0, 0, math.inf, Freshness.FENCED),
        (101.0, 7, 7, 30.0, Freshness.EXPIRED),  # from the future: its age is not known
    ],
)
def test_freshness(validated_at: float, fence: int, slot: int, fresh_s: float, expected: Freshness) -> None:
    record = make_record("b", "k", META, validated_at=validated_at, fence=fence)
    freshness, age = judge(record, slot, 100.0, fresh_s)
    assert freshness is expected
    assert age == max(100.0 - validated_at, 0.0)


def test_what_is_not_known_is_absent() -> None:
    assert judge(None, 1, 100.0, 30.0) == (Freshness.ABSENT, 0.0)
