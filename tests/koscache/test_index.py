import os
from pathlib import Path

import lmdb
import pytest

from kos.s3.object_response import ObjectMeta
from koscache import index as ix
from koscache.content import Location, make_record, object_hash
from koscache.disk import OsDisk, StoreFailed
from koscache.index import Environment, IndexBroken, IndexFull, Pointer

KEY = ix.block_key(b"c" * 16, 7)
LOCATION = Location((9 << 32) + 1, 4096, 8 << 20, (1 << 64) - 1, True)
POINTER = Pointer(format=1, index=3, boot_id="x", clean=False, trusted=True, starts=0, block_bytes=1, map_bytes=1 << 20)


def test_a_location_comes_back_only_under_its_own_key() -> None:
    for location in (LOCATION, LOCATION._replace(verified=False)):
        value = ix.encode_location(KEY, location)
        assert ix.decode_location(KEY, value) == location
        assert ix.decode_location(ix.block_key(b"c" * 16, 8), value) is None
        for bit in range(len(value) * 8):
            wrong = bytearray(value)
            wrong[bit >> 3] ^= 1 << (bit & 7)
            assert ix.decode_location(KEY, bytes(wrong)) is None
        assert ix.decode_location(KEY, value[:-1]) is None
        assert ix.decode_location(KEY, b"") is None


def test_block_keys_sort_by_content_and_number() -> None:
    assert ix.block_key(b"c" * 16, 1) < ix.block_key(b"c" * 16, 256) < ix.block_key(b"d" * 16, 0)
    assert ix.parse_block_key(KEY) == (b"c" * 16, 7)


def test_a_record_comes_back_only_under_its_own_key() -> None:
    record = make_record("b", "k", ObjectMeta('"e"', 1, "", ()), validated_at=1.0, fence=2)
    hashed = object_hash("b", "k")
    value = ix.encode_record(hashed, "b", "k", record)
    named = ix.decode_record(hashed, value)
    assert named is not None
    assert (named.bucket, named.key, named.record) == ("b", "k", record)
    assert ix.record_content(value) == record.content
    assert ix.decode_record(object_hash("b", "l"), value) is None
    for byte in range(len(value)):
        wrong = bytearray(value)
        wrong[byte] ^= 0x40
        assert ix.decode_record(hashed, bytes(wrong)) is None
    assert ix.decode_record(hashed, b"short") is None


def test_the_pointer_is_replaced_whole(tmp_path: Path) -> None:
    disk = OsDisk()
    assert ix.read_pointer(disk, str(tmp_path)) is None
    ix.write_pointer(disk, str(tmp_path), POINTER)
    assert ix.read_pointer(disk, str(tmp_path)) == POINTER
    assert os.listdir(tmp_path) == ["CURRENT"]
    for garbage in (b"", b"{", b'{"index": "x"}', b"\xff\xfe"):
        (tmp_path / "CURRENT").write_bytes(garbage)
        assert ix.read_pointer(disk, str(tmp_path)) is None


def test_index_directories_are_found_by_number() -> None:
    assert ix.index_numbers(["index-0000000012", "segments", "index-x", "index-0000000002"]) == [2, 12]
    assert ix.index_path("/d", 12) == "/d/index-0000000012"


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "index").mkdir()
    return str(tmp_path / "index")


def test_one_process_shares_one_environment(path: str) -> None:
    writer = Environment.attach(path, 1 << 20, writable=True)
    reader = Environment.attach(path, 1 << 20, writable=False)
    assert reader is writer
    reader.detach()
    with writer.write() as txn:
        txn.put(KEY, b"v", db=writer.blocks)
    writer.detach()
    again = Environment.attach(path, 1 << 20, writable=False)
    assert again.env.begin(again.blocks).get(KEY) == b"v"
    upgraded = Environment.attach(path, 1 << 20, writable=True)
    with upgraded.write() as txn:
        txn.put(KEY, b"w", db=upgraded.blocks)
    assert again.env.begin(again.blocks).get(KEY) == b"w"
    again.detach()
    upgraded.detach()


def test_a_failed_write_leaves_nothing(path: str) -> None:
    environment = Environment.attach(path, 1 << 20, writable=True)
    with pytest.raises(RuntimeError), environment.write() as txn:
        txn.put(KEY, b"v", db=environment.blocks)
        raise RuntimeError
    assert environment.env.begin(environment.blocks).get(KEY) is None
    environment.detach()


def test_errors_are_told_apart(path: str) -> None:
    environment = Environment.attach(path, 64 << 10, writable=True)
    with pytest.raises(IndexFull), environment.write() as txn:
        for number in range(10_000):
            txn.put(ix.block_key(b"c" * 16, number), bytes(100), db=environment.blocks)
    with pytest.raises(IndexBroken), ix.index_errors():
        raise lmdb.CorruptedError
    with pytest.raises(StoreFailed), ix.index_errors():
        raise lmdb.DiskError
    environment.detach()


def test_revise_removes_and_replaces_in_one_pass(path: str) -> None:
    environment = Environment.attach(path, 8 << 20, writable=True)
    count = 3 * ix.CHANGES_MAX
    keys = [ix.block_key(b"c" * 16, number) for number in range(count)]
    with environment.write() as txn:
        for number, key in enumerate(keys):
            txn.put(key, ix.encode_location(key, LOCATION._replace(segment=number % 3)), db=environment.blocks)
        txn.put(keys[0], b"garbage", db=environment.blocks)

    def judge(location: Location) -> Location | None:
        return None if location.segment == 1 else location._replace(verified=location.segment == 2)

    assert environment.revise(judge) == (count // 3 + 1, count // 3 - 1)
    with environment.read() as txn:
        left = {key: ix.decode_location(key, value) for key, value in txn.cursor(environment.blocks)}
    assert set(left) == {key for number, key in enumerate(keys) if number % 3 != 1 and number != 0}
    assert all(each is not None and each.verified is (each.segment == 2) for each in left.values())
    assert environment.revise(lambda location: None) == (len(left), 0)
    environment.detach()


def test_used_bytes_follow_what_is_stored(path: str) -> None:
    environment = Environment.attach(path, 8 << 20, writable=True)
    empty = environment.used_bytes()
    with environment.write() as txn:
        for number in range(5000):
            txn.put(ix.block_key(b"c" * 16, number), bytes(100), db=environment.blocks)
    full = environment.used_bytes()
    with environment.write() as txn:
        txn.drop(environment.blocks, delete=False)
    assert empty < environment.used_bytes() + 1 <= full
    assert 5000 * 120 <= full <= environment.file_bytes()
    environment.detach()
