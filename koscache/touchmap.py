"""Which names were asked for before, remembered by all workers of a node together, roughly.

Two maps of 2^24 bits in a file that all of them map: a name sets a bit in the young one; it was asked for before if that bit
was set in either. When a quarter of the young one is set it becomes the old one, and an empty one begins: so of some four
million names the last are remembered, at 4 MiB, however many there are.

Owns: the file and the bits. Does not own: what follows from a name's being asked for again (koscache.carrier.upstream).

Invariant: nothing depends on an answer being right. Two names may share a bit, two workers may undo each other's, and a crash
may lose all of it: then a block is copied at the first touch, or at the third.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

from xxhash import xxh3_64_intdigest

_BITS: Final = 1 << 24
_MAP_BYTES: Final = _BITS // 8
_FILL_MAX: Final = _BITS // 4
#: How often the young map's bits are counted: some milliseconds each time.
_COUNT_EVERY: Final = 1 << 16
_NAME: Final = "touches"
_YOUNG_AT: Final = 2 * _MAP_BYTES  # which of the two is the young one: 0 or 1
_FILE_BYTES: Final = 2 * _MAP_BYTES + mmap.PAGESIZE


class TouchMap:
    """Raises OSError when the file cannot be made."""

    def __init__(self, cache_dir: str) -> None:
        fd = os.open(os.path.join(cache_dir, _NAME), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            # Allocated, so that a full disk is an error here and no SIGBUS later.
            os.posix_fallocate(fd, 0, _FILE_BYTES)
            self._map = mmap.mmap(fd, _FILE_BYTES)
        finally:
            os.close(fd)
        self._countdown = _COUNT_EVERY

    def seen(self, name: bytes) -> bool:
        """Whether the name was touched before."""
        byte, bit = self._place(name)
        return bool((self._map[byte] | self._map[_MAP_BYTES + byte]) & bit)

    def touch(self, name: bytes) -> bool:
        """Remembers the name; whether it was touched before."""
        byte, bit = self._place(name)
        before = self._map[byte] | self._map[_MAP_BYTES + byte]
        at = byte + _MAP_BYTES * (self._map[_YOUNG_AT] & 1)
        self._map[at] |= bit
        self._countdown -= 1
        if self._countdown == 0:
            self._countdown = _COUNT_EVERY
            self._turn_over()
        return bool(before & bit)

    def close(self) -> None:
        self._map.close()

    def _place(self, name: bytes) -> tuple[int, int]:
        bit = xxh3_64_intdigest(name) & (_BITS - 1)
        return bit >> 3, 1 << (bit & 7)

    def _turn_over(self) -> None:
        young = self._map[_YOUNG_AT] & 1
        at = young * _MAP_BYTES
        if int.from_bytes(self._map[at : at + _MAP_BYTES], "little").bit_count() < _FILL_MAX:
            return
        old = (1 - young) * _MAP_BYTES
        self._map[old : old + _MAP_BYTES] = bytes(_MAP_BYTES)
        self._map[_YOUNG_AT] = 1 - young
