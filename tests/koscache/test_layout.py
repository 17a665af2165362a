import pytest

from koscache.layout import (
    LARGE_PAYLOAD_MAX,
    PAGE,
    REGION_HEADER_BYTES,
    TRAILER_BYTES,
    FileHeader,
    Kind,
    Region,
    RegionKind,
    Trailer,
    footer_checksum,
    large_region_bytes,
    pack_file_header,
    pack_region,
    pack_row,
    pack_trailer,
    parse_file_header,
    parse_region,
    parse_rows,
    parse_trailer,
    small_region_bytes,
)

HEADER = FileHeader(
    segment=(5 << 32) + 7, kind=Kind.LARGE, block_bytes=8 << 20, size=256 << 20, nonce=0xABCDEF0123456789
)
REGION = Region(RegionKind.BLOCK, 8192, 12288, b"c" * 16, 3, 12288, 5000, 0x1234, b"payload")


def test_a_file_header_comes_back() -> None:
    page = pack_file_header(HEADER)
    assert len(page) == PAGE
    assert parse_file_header(page) == HEADER


@pytest.mark.parametrize("byte", range(48))
def test_a_file_header_with_one_bit_wrong_is_none(byte: int) -> None:
    for bit in range(8):
        page = bytearray(pack_file_header(HEADER))
        page[byte] ^= 1 << bit
        assert parse_file_header(bytes(page)) is None
    assert parse_file_header(b"") is None
    assert parse_file_header(bytes(PAGE)) is None


def test_a_region_comes_back_at_its_place() -> None:
    packed = pack_region(REGION, HEADER.nonce)
    assert len(packed) == REGION_HEADER_BYTES + len(REGION.payload)
    assert parse_region(packed, 0, 8192, HEADER.nonce) == REGION
    assert parse_region(b"xx" + packed + b"yy", 2, 8192, HEADER.nonce) == REGION


def test_a_region_is_none_anywhere_else() -> None:
    """One block's bytes in another's place: a header that was copied says nothing."""
    packed = pack_region(REGION, HEADER.nonce)
    assert parse_region(packed, 0, 4096, HEADER.nonce) is None
    assert parse_region(packed, 0, 8192, HEADER.nonce ^ 1) is None
    assert parse_region(packed[:-1], 0, 8192, HEADER.nonce) is None
    assert parse_region(b"", 0, 8192, HEADER.nonce) is None


def test_a_region_with_one_bit_wrong_is_none() -> None:
    packed = pack_region(REGION, HEADER.nonce)
    for at in range(len(packed) * 8):
        wrong = bytearray(packed)
        wrong[at >> 3] ^= 1 << (at & 7)
        assert parse_region(bytes(wrong), 0, 8192, HEADER.nonce) is None, f"bit {at}"


def test_a_body_never_reaches_out_of_its_region() -> None:
    packed = pack_region(REGION._replace(body_length=REGION.length), HEADER.nonce)
    assert parse_region(packed, 0, 8192, HEADER.nonce) is None


def test_rows_come_back_and_one_bad_one_spoils_all() -> None:
    other = REGION._replace(offset=20480, body_offset=24576, payload=b"")
    footer = b"".join(pack_row(each.offset, pack_region(each, HEADER.nonce)) for each in (REGION, other))
    rows = parse_rows(footer, HEADER.nonce)
    assert rows is not None
    assert list(rows) == [REGION, other]
    assert parse_rows(footer[:-1], HEADER.nonce) is None
    assert parse_rows(footer, HEADER.nonce + 1) is None
    reserved = REGION._replace(kind=RegionKind.RESERVED)
    assert parse_rows(pack_row(8192, pack_region(reserved, HEADER.nonce)), HEADER.nonce) is None


def test_a_trailer_holds_for_one_file_of_one_size() -> None:
    trailer = Trailer(rows=2, footer_offset=1000, footer_length=200, footer_checksum=footer_checksum(b"x"))
    raw = pack_trailer(HEADER, 8192, trailer)
    assert len(raw) == TRAILER_BYTES
    assert parse_trailer(raw, HEADER, 8192) == trailer
    assert parse_trailer(raw, HEADER, 4096) is None, "cut short: what is now at the end is no trailer"
    assert parse_trailer(raw, HEADER._replace(nonce=1), 8192) is None
    assert parse_trailer(raw, HEADER._replace(segment=1), 8192) is None
    for byte in range(TRAILER_BYTES):
        wrong = bytearray(raw)
        wrong[byte] ^= 1
        assert parse_trailer(bytes(wrong), HEADER, 8192) is None


def test_sizes() -> None:
    assert large_region_bytes(1) == 2 * PAGE
    assert large_region_bytes(PAGE) == 2 * PAGE
    assert large_region_bytes(PAGE + 1) == 3 * PAGE
    assert small_region_bytes(0, 1) == 72
    assert REGION_HEADER_BYTES + LARGE_PAYLOAD_MAX == PAGE
