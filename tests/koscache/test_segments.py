import errno
import os
from pathlib import Path

import pytest

from koscache.content import Extent, body_checksum
from koscache.disk import StoreFailed
from koscache.layout import PAGE, FileHeader, Kind
from koscache.segments import (
    Packed,
    Sealer,
    SegmentFile,
    parse_segment_name,
    read_footer,
    read_segment,
    segment_path,
    walk_regions,
)
from tests.fakes.faulty_disk import FaultyDisk

SIZE = 256 << 10
C = b"c" * 16


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


def make(disk: FaultyDisk, tmp_path: Path, kind: Kind = Kind.LARGE, segment: int = 1) -> SegmentFile:
    (tmp_path / "segments").mkdir(exist_ok=True)
    header = FileHeader(segment, kind, 16 << 10, SIZE, 0x77)
    return SegmentFile.create(disk, segment_path(str(tmp_path), segment), header)


def reserve(segment: SegmentFile, number: int, length: int) -> Extent:
    extent = segment.reserve(C, number, length)
    assert extent is not None
    return extent


def packed(number: int, body: bytes, payload: bytes = b"p" * 40) -> Packed:
    return Packed(C, number, body_checksum(body), payload, body)


def test_names() -> None:
    assert segment_path("/d", 0xAB) == "/d/segments/00000000000000ab.seg"
    assert parse_segment_name("00000000000000ab.seg") == 0xAB
    for wrong in ("ab.seg", "00000000000000ab", "zz000000000000ab.seg", "00000000000000ab.seg.new"):
        assert parse_segment_name(wrong) is None


def test_a_new_segment_is_allocated_whole(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path)
    found = os.stat(segment.path)
    assert (found.st_size, found.st_blocks * 512 >= SIZE) == (SIZE, True)


@pytest.mark.parametrize("call", ["allocate", "write", "open"])
def test_a_segment_that_cannot_be_made_leaves_no_file(disk: FaultyDisk, tmp_path: Path, call: str) -> None:
    disk.fail(call, errno.ENOSPC)
    with pytest.raises(StoreFailed, match="No space left"):
        make(disk, tmp_path)
    assert os.listdir(tmp_path / "segments") == []


def test_extents_are_aligned_and_never_overlap(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path)
    extents = [reserve(segment, number, length) for number, length in enumerate((1, 4096, 4097, 16384))]
    end = PAGE
    for extent in extents:
        assert extent.offset % PAGE == 0
        assert extent.offset >= end + PAGE  # its header's page
        end = extent.offset + extent.length


def test_a_reservation_is_no_entry_until_committed(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path)
    first, second, third = (reserve(segment, number, 5000) for number in range(3))
    segment.commit(second, 4000, 42, b"payload")  # shrunk
    segment.abandon(third.offset)
    walk = walk_regions(disk, segment.fd, segment.header, SIZE)
    assert [(each.number, each.body_offset, each.body_length, each.checksum) for each in walk.blocks] == [
        (1, second.offset, 4000, 42)
    ]
    assert walk.clean
    assert walk.position == segment.position
    assert set(segment.outstanding) == {first.offset}


def test_a_reservation_never_grows(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path)
    extent = reserve(segment, 0, 5000)
    with pytest.raises(AssertionError):
        segment.commit(extent, 5001, 0, b"")


def test_room_is_kept_for_the_footer(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path)
    extents = []
    while (extent := segment.reserve(C, len(extents), 4096)) is not None:
        extents.append(extent)
    for extent in extents:
        segment.commit(extent, 4096, 1, b"p" * 4000)
    segment.write_footer()()
    regions = read_footer(disk, segment.fd, segment.header, SIZE)
    assert regions is not None
    assert len(regions) == len(extents)
    assert max(each.offset + each.length for each in regions) <= SIZE - len(segment.table)


def test_small_blocks_are_packed_in_one_write(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path, Kind.SMALL)
    bodies = [os.urandom(100 * number + 1) for number in range(20)]
    disk.calls.clear()
    locations = segment.pack([packed(number, body) for number, body in enumerate(bodies)])
    assert [call for call, _ in disk.calls] == ["write"]
    for body, location in zip(bodies, locations, strict=True):
        assert os.pread(segment.fd, location.length, location.offset) == body
    walk = walk_regions(disk, segment.fd, segment.header, SIZE)
    assert [each.number for each in walk.blocks] == list(range(20))
    assert walk.clean


def test_a_full_segment_packs_as_many_as_fit(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path, Kind.SMALL)
    blocks = [packed(number, os.urandom(2000)) for number in range(200)]
    count = len(segment.pack(blocks))
    assert 100 < count < 125
    assert segment.pack(blocks[count:]) == []
    segment.write_footer()()
    regions = read_footer(disk, segment.fd, segment.header, SIZE)
    assert regions is not None
    assert len(regions) == count


def test_a_failed_pack_places_nothing_and_the_next_one_goes_on(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path, Kind.SMALL)
    segment.pack([packed(0, b"a" * 500)])
    disk.fail("write", errno.ENOSPC, short=True)
    with pytest.raises(StoreFailed):
        segment.pack([packed(number, b"b" * 500) for number in range(1, 9)])
    (location,) = segment.pack([packed(9, b"c" * 700)])
    assert os.pread(segment.fd, 700, location.offset) == b"c" * 700
    assert [each.number for each in segment.regions()] == [0, 9]


def test_a_failed_reservation_takes_no_space(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path)
    disk.fail("write", errno.EIO)
    with pytest.raises(StoreFailed):
        segment.reserve(C, 0, 100)
    assert segment.position == PAGE
    assert not segment.outstanding


def test_a_body_cannot_pass_for_an_entry(disk: FaultyDisk, tmp_path: Path) -> None:
    """An object that is itself a piece of a segment file, byte for byte, makes no entries."""
    segment = make(disk, tmp_path)
    extent = reserve(segment, 0, 8192)
    body = os.pread(segment.fd, 8192, 0)  # a file header and a region header
    os.pwrite(segment.fd, body, extent.offset)
    segment.commit(extent, 8192, body_checksum(body), b"")
    assert [each.number for each in walk_regions(disk, segment.fd, segment.header, SIZE).blocks] == [0]


def test_a_garbled_header_ends_the_walk_uncleanly(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path)
    extents = [reserve(segment, number, 4096) for number in range(3)]
    for extent in extents:
        segment.commit(extent, 4096, 1, b"")
    os.pwrite(segment.fd, b"\xff", extents[1].offset - PAGE + 20)
    walk = walk_regions(disk, segment.fd, segment.header, SIZE)
    assert not walk.clean
    assert [each.number for each in walk.blocks] == [0]


def test_a_sealed_segment_is_read_by_its_footer_and_walked_without(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path, Kind.SMALL)
    segment.pack([packed(number, os.urandom(50), os.urandom(900)) for number in range(150)])  # a footer above 64 KiB
    assert len(segment.table) > 64 << 10
    mtime = segment.write_footer()()
    assert mtime == os.stat(segment.path).st_mtime_ns
    by_footer = read_segment(disk, segment.fd, 1, 16 << 10)
    assert by_footer is not None
    assert by_footer.sealed
    os.pwrite(segment.fd, b"\xff", SIZE - 64 - 100)
    walked = read_segment(disk, segment.fd, 1, 16 << 10)
    assert walked is not None
    assert not walked.sealed
    assert walked.blocks == by_footer.blocks == segment.regions()


def test_a_file_of_another_name_or_block_size_is_none(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path)
    assert read_segment(disk, segment.fd, 2, 16 << 10) is None
    assert read_segment(disk, segment.fd, 1, 8 << 10) is None
    os.pwrite(segment.fd, b"\xff", 3)
    assert read_segment(disk, segment.fd, 1, 16 << 10) is None


def test_a_resumed_segment_goes_on_behind_what_was_handed_out(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path)
    done, lost = reserve(segment, 0, 4096), reserve(segment, 1, 4096)
    segment.commit(done, 4096, 1, b"p")
    walk = walk_regions(disk, segment.fd, segment.header, SIZE)
    resumed = SegmentFile.resume(disk, segment.path, segment.fd, walk)
    assert resumed.regions() == segment.regions()
    extent = resumed.reserve(C, 2, 4096)
    assert extent is not None
    assert extent.offset >= lost.offset + lost.length + PAGE


def test_the_trailer_is_written_after_the_sync_of_all_else(disk: FaultyDisk, tmp_path: Path) -> None:
    segment = make(disk, tmp_path)
    segment.commit(reserve(segment, 0, 100), 100, 1, b"")
    disk.calls.clear()
    segment.write_footer()()
    assert [call for call, _ in disk.calls] == ["write", "sync", "write", "sync", "sync_dir"]


def test_a_sealer_tells_of_failures(disk: FaultyDisk, tmp_path: Path) -> None:
    sealer = Sealer()
    good, bad = make(disk, tmp_path), make(disk, tmp_path, segment=2)
    disk.fail("sync", errno.EIO, path=os.path.basename(bad.path))
    for segment in (good, bad):
        sealer.submit(segment, segment.write_footer())
    ended = sealer.collect(wait=True)
    assert [(each.segment, each.error is None) for each in ended] == [(good, True), (bad, False)]
    assert len(sealer) == 0
    sealer.close()
