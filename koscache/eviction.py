"""Eviction: which segment goes, and which of its entries move on instead.

FIFO by segment with a second chance: the oldest segment goes whole; entries that were touched since they were
written, or are pinned, are copied to the newest. That is sequential writing, O(1) an entry, and needs no order among
entries.

    everything is touched  ->  at most RESCUE_SHARE of the segment is rescued, so each eviction frees the rest for good
    everything is pinned   ->  the segment goes to the end of the queue uncopied; if that holds for all of them, the
    oldest
                               goes all the same: the size limit is hard, a pin is not

Owns: the decision (pure), the memory of touches. Does not own: pins (pins), copying and unlinking (evictor).

Invariant: memory does not grow with the number of entries: touches are a bitmap of fixed size in which two entries may
share a bit, which costs at worst a needless copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

#: of the segment's bytes; half keeps a hot set of half the store, and frees at least half of each segment
RESCUE_SHARE: Final = 0.5
_TOUCH_BITS: Final = 1 << 24
_TOUCH_MASK: Final = _TOUCH_BITS - 1


class Fate(Enum):
    """What becomes of an entry of an evicted segment, and why."""

    MOVES_PINNED = "pinned"
    MOVES_TOUCHED = "touched"
    GOES_COLD = "cold"
    GOES_DEAD = "dead"  # the index has it elsewhere, or not at all
    GOES_OVER_SHARE = "over_share"  # hot, but enough was rescued from this segment

    @property
    def moves(self) -> bool:
        return self in (Fate.MOVES_PINNED, Fate.MOVES_TOUCHED)


class Candidate(NamedTuple):
    """An entry of the segment: bytes of its whole region, and whether it is alive, pinned, touched."""

    region_bytes: int
    alive: bool
    pinned: bool
    touched: bool


def decide(candidates: Sequence[Candidate], segment_bytes: int) -> list[Fate]:
    """The fate of every entry: the pinned first, then the touched, until RESCUE_SHARE of the segment is used up."""
    left = int(segment_bytes * RESCUE_SHARE)
    fates = [Fate.GOES_COLD if each.alive else Fate.GOES_DEAD for each in candidates]
    for pinned in (True, False):
        for place, each in enumerate(candidates):
            if not each.alive or each.pinned is not pinned or not (pinned or each.touched):
                continue
            if each.region_bytes > left:
                fates[place] = Fate.GOES_OVER_SHARE
                continue
            left -= each.region_bytes
            fates[place] = Fate.MOVES_PINNED if pinned else Fate.MOVES_TOUCHED
    return fates


def holds_too_many_pins(candidates: Iterable[Candidate], segment_bytes: int) -> bool:
    """Whether evicting the segment would drop pinned entries: another one should go first."""
    pinned = sum(each.region_bytes for each in candidates if each.alive and each.pinned)
    return pinned > int(segment_bytes * RESCUE_SHARE)


class Touches:
    """Which blocks were read since they were written; 2 MiB whatever the number of entries."""

    def __init__(self) -> None:
        self._bits = bytearray(_TOUCH_BITS // 8)

    def add(self, block_key: bytes) -> None:
        bit = xxh3_64_intdigest(block_key) & _TOUCH_MASK
        self._bits[bit >> 3] |= 1 << (bit & 7)

    def discard(self, block_key: bytes) -> None:
        bit = xxh3_64_intdigest(block_key) & _TOUCH_MASK
        self._bits[bit >> 3] &= ~(1 << (bit & 7)) & 0xFF

    def __contains__(self, block_key: bytes) -> bool:
        bit = xxh3_64_intdigest(block_key) & _TOUCH_MASK
        return bool(self._bits[bit >> 3] >> (bit & 7) & 1)
