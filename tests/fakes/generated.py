"""Bodies that are worked out from the offset instead of kept: objects of GiBs in a test's memory.

Invariant: equal bytes at two offsets mean nothing: the content repeats after PERIOD bytes, which is odd, so that blocks of
any power of two that were mixed up do not look alike.
"""

from __future__ import annotations

import functools
import hashlib
import random
from typing import Final

PERIOD: Final = (1 << 20) + 7919


class Generated:
    """size bytes, different for each seed. Slices like bytes; view() gives the bytes of at most PERIOD of them."""

    __slots__ = ("_pattern", "_start", "_stop", "seed")

    def __init__(self, seed: str, size: int) -> None:
        self.seed = seed
        self._pattern = _pattern(seed)
        self._start, self._stop = 0, size

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, which: slice) -> Generated:
        start, stop, step = which.indices(len(self))
        assert step == 1
        part = Generated(self.seed, 0)
        part._start, part._stop = self._start + start, self._start + max(start, stop)
        return part

    @property
    def etag(self) -> str:
        """As of an upload in parts: S3 says nothing of what such an ETag is made of."""
        return f'"{hashlib.md5(f"{self.seed} {len(self)}".encode()).hexdigest()}-{-(-len(self) // PERIOD)}"'

    def view(self) -> memoryview:
        assert len(self) <= PERIOD, "a piece at a time"
        at = self._start % PERIOD
        return self._pattern[at : at + len(self)]

    def holds(self, offset: int, received: bytes | memoryview) -> bool:
        """Whether these bytes are what stands at this offset."""
        for at in range(0, len(received), PERIOD):
            piece = received[at : at + PERIOD]
            if self[offset + at : offset + at + len(piece)].view() != piece:
                return False
        return True


@functools.lru_cache(maxsize=64)
def _pattern(seed: str) -> memoryview:
    """Twice over, so that any piece of at most PERIOD bytes is one slice."""
    return memoryview(random.Random(seed).randbytes(PERIOD) * 2)
