"""The bytes of a segment file: pure packing and parsing, no I/O.

    0        file header, one page: what the segment is, and its nonce
    4096     regions, one behind the other, each beginning with a 64-byte header that says how long it is
               RESERVED  space handed out for a fill; becomes a BLOCK by its header being written anew, or stays dead
               BLOCK     header, payload (object hash + index value of the record, so that both can be rebuilt), body
             large blocks: header and payload in a page of their own, body aligned to 4096, region a multiple of 4096
             small blocks: header, payload, body packed, region a multiple of 8
    ...      free
    end      footer: (offset, header, payload) of every BLOCK, side by side; then the trailer, the file's last 64 bytes

A reader of the file never searches bodies for headers: it walks from region to region, or reads the footer.

Owns: the format. Does not own: files (segments) or what a payload means (index).

Invariant: a region header is valid at one place only. Its checksum is seeded with the segment's random nonce and the
region's offset, so that neither a header copied elsewhere nor one that a client made up inside a body is ever taken
for one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

VERSION: Final = 1
PAGE: Final = 4096
REGION_HEADER_BYTES: Final = 64
TRAILER_BYTES: Final = 64
#: a large block's header page holds its region header and its payload
LARGE_PAYLOAD_MAX: Final = PAGE - REGION_HEADER_BYTES
#: offsets and lengths are 32 bits
SEGMENT_BYTES_MAX: Final = 1 << 32

_FILE_MAGIC: Final = b"kos-seg\x01"
_TRAILER_MAGIC: Final = b"kos-end\x01"
_REGION_MAGIC: Final = b"kos\xb1"
_MASK: Final = (1 << 64) - 1

_FILE: Final = struct.Struct("<8sHHIQQQ")  # magic, version, kind, block bytes, segment id, size, nonce
_REGION: Final = struct.Struct(
    "<4sB3xIIIIIIQ16s"
)  # magic, kind, payload, region, body offset, body, number, 0, checksum
_TRAILER: Final = struct.Struct("<8sQIIQQQQ")  # magic, segment, block bytes, rows, file size, footer at, length, check
_CHECK: Final = struct.Struct("<Q")
_ROW: Final = struct.Struct("<I")

ROW_BYTES: Final = _ROW.size + REGION_HEADER_BYTES
LARGE_ROW_MAX: Final = _ROW.size + PAGE


class Kind(IntEnum):
    """What goes into a segment: apart, because the one is aligned to pages and the other packed."""

    LARGE = 1
    SMALL = 2


class RegionKind(IntEnum):
    RESERVED = 1
    BLOCK = 2


class FileHeader(NamedTuple):
    segment: int
    kind: Kind
    block_bytes: int
    size: int
    nonce: int


class Region(NamedTuple):
    """A region as its header says. offset, body_offset: in the file. length: of the whole region. body_length of a
    RESERVED one is what may be filled."""

    kind: RegionKind
    offset: int
    length: int
    content: bytes
    number: int
    body_offset: int
    body_length: int
    checksum: int
    payload: bytes


class Trailer(NamedTuple):
    rows: int
    footer_offset: int
    footer_length: int
    footer_checksum: int


def align(offset: int, unit: int) -> int:
    """The next multiple of unit, which is a power of two."""
    return (offset + unit - 1) & -unit


def large_region_bytes(body_length: int) -> int:
    return PAGE + align(body_length, PAGE)


def small_region_bytes(payload_length: int, body_length: int) -> int:
    return align(REGION_HEADER_BYTES + payload_length + body_length, 8)


def pack_file_header(header: FileHeader) -> bytes:
    packed = _FILE.pack(
        _FILE_MAGIC, VERSION, header.kind, header.block_bytes, header.segment, header.size, header.nonce
    )
    return (packed + _CHECK.pack(xxh3_64_intdigest(packed))).ljust(PAGE, b"\0")


def parse_file_header(page: bytes) -> FileHeader | None:
    """None: not a segment file of this version, or garbled."""
    if len(page) < _FILE.size + _CHECK.size:
        return None
    if _CHECK.unpack_from(page, _FILE.size)[0] != xxh3_64_intdigest(page[: _FILE.size]):
        return None
    magic, version, kind, block_bytes, segment, size, nonce = _FILE.unpack_from(page)
    if magic != _FILE_MAGIC or version != VERSION or kind not in (Kind.LARGE, Kind.SMALL):
        return None
    return FileHeader(segment, Kind(kind), block_bytes, size, nonce)


def pack_region(region: Region, nonce: int) -> bytes:
    """Header and payload, without the body."""
    packed = _REGION.pack(
        _REGION_MAGIC,
        region.kind,
        len(region.payload),
        region.length,
        region.body_offset - region.offset,
        region.body_length,
        region.number,
        0,
        region.checksum,
        region.content,
    )
    return packed + _CHECK.pack(_region_check(packed, region.payload, nonce, region.offset)) + region.payload


def parse_region(buffer: bytes | memoryview, at: int, offset: int, nonce: int) -> Region | None:
    """The region whose header stands at buffer[at:] and at `offset` of the file. None: there is none, or it is
    garbled."""
    if len(buffer) - at < REGION_HEADER_BYTES or buffer[at : at + 4] != _REGION_MAGIC:
        return None
    fields = _REGION.unpack_from(buffer, at)
    _, kind, payload_length, length, body_at, body_length, number, _, checksum, content = fields
    payload = bytes(buffer[at + REGION_HEADER_BYTES : at + REGION_HEADER_BYTES + payload_length])
    if len(payload) != payload_length:
        return None
    wanted = _region_check(bytes(buffer[at : at + _REGION.size]), payload, nonce, offset)
    if _CHECK.unpack_from(buffer, at + _REGION.size)[0] != wanted:
        return None
    if kind not in (RegionKind.RESERVED, RegionKind.BLOCK) or body_at + body_length > length:
        return None
    return Region(RegionKind(kind), offset, length, content, number, offset + body_at, body_length, checksum, payload)


def payload_length_at(buffer: bytes | memoryview, at: int) -> int:
    """What the header at buffer[at:] says of its payload's length, unchecked; 0 if there is no header."""
    if len(buffer) - at < REGION_HEADER_BYTES or buffer[at : at + 4] != _REGION_MAGIC:
        return 0
    return int(_REGION.unpack_from(buffer, at)[2])


def pack_row(offset: int, header_and_payload: bytes) -> bytes:
    """A footer row: what stands at `offset` of the file, again."""
    return _ROW.pack(offset) + header_and_payload


def parse_rows(footer: bytes | bytearray, nonce: int) -> Iterator[Region] | None:
    """The regions of a footer; None as soon as one row is not what it should be (the caller then walks the file)."""
    regions: list[Region] = []
    view = memoryview(footer)
    at = 0
    while at < len(view):
        if len(view) - at < ROW_BYTES:
            return None
        (offset,) = _ROW.unpack_from(view, at)
        region = parse_region(view, at + _ROW.size, offset, nonce)
        if region is None or region.kind is not RegionKind.BLOCK:
            return None
        regions.append(region)
        at += ROW_BYTES + len(region.payload)
    return iter(regions)


def pack_trailer(header: FileHeader, file_size: int, trailer: Trailer) -> bytes:
    packed = _TRAILER.pack(
        _TRAILER_MAGIC,
        header.segment,
        header.block_bytes,
        trailer.rows,
        file_size,
        trailer.footer_offset,
        trailer.footer_length,
        trailer.footer_checksum,
    )
    return packed + _CHECK.pack(_seeded(packed, header.nonce, file_size))


def parse_trailer(raw: bytes, header: FileHeader, file_size: int) -> Trailer | None:
    """The trailer of a sealed segment, from the file's last 64 bytes; None: not sealed, cut short, or garbled."""
    if len(raw) != TRAILER_BYTES or raw[:8] != _TRAILER_MAGIC:
        return None
    if _CHECK.unpack_from(raw, _TRAILER.size)[0] != _seeded(raw[: _TRAILER.size], header.nonce, file_size):
        return None
    _, segment, _, rows, size, offset, length, checksum = _TRAILER.unpack_from(raw)
    if segment != header.segment or size != file_size or offset + length + TRAILER_BYTES > file_size:
        return None
    return Trailer(rows, offset, length, checksum)


def footer_checksum(footer: bytes | bytearray) -> int:
    return xxh3_64_intdigest(footer)


def _region_check(packed: bytes, payload: bytes, nonce: int, offset: int) -> int:
    return _seeded(packed + payload, nonce, offset)


def _seeded(body: bytes, nonce: int, offset: int) -> int:
    return xxh3_64_intdigest(body, seed=(nonce + offset) & _MASK)
