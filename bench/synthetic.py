"""Objects that nobody has to upload: their size is in their key and their bytes follow from it.

Owns: the mapping key -> size, ETag and bytes. Does not own: serving them (bench.origin) or asking for them.

Invariant: every byte is a function of the key and its position, so a client can check what it got without a copy of it;
the period of the bytes is an odd number of MiB, so blocks of a power of two in each other's place are noticed.
"""

from __future__ import annotations

import random
import zlib
from functools import lru_cache
from typing import Final

PERIOD_BYTES: Final = 61 << 20
_PAGE: Final = 4096
BUCKET: Final = "bench"


@lru_cache(maxsize=1)
def pattern() -> bytes:
    """The PERIOD_BYTES bytes that all objects are cut from; takes about a third of a second, once."""
    return random.Random(20).randbytes(PERIOD_BYTES)


def key_of(size: int, name: str) -> str:
    """The key of an object of `size` bytes."""
    return f"{size}/{name}"


def size_of(key: str) -> int | None:
    """The size of the object; None: there is no such object."""
    head, slash, _ = key.partition("/")
    return int(head) if slash and head.isascii() and head.isdigit() and len(head) < 15 else None


def base_of(key: str) -> int:
    """Where in the pattern the object begins; on a page, so that sendfile moves whole pages."""
    return zlib.crc32(key.encode()) % (PERIOD_BYTES // _PAGE) * _PAGE


def etag_of(key: str) -> str:
    return f'"{zlib.crc32(key.encode()):08x}{size_of(key) or 0:024x}"'


def matches(key: str, position: int, piece: bytes | bytearray | memoryview) -> bool:
    """Whether `piece` is what the object holds from `position` on."""
    whole, view = pattern(), memoryview(piece)
    done = 0
    while done < len(piece):
        at = (base_of(key) + position + done) % PERIOD_BYTES
        n = min(len(piece) - done, PERIOD_BYTES - at)
        # startswith is a memcmp; comparing memoryviews goes item by item.
        if not whole.startswith(view[done : done + n], at):
            return False
        done += n
    return True
