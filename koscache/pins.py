"""Pins: versions whose blocks are held until a time.

Owns: which are held and until when, in memory and in the index' `meta`. Does not own: what being held means (eviction).

Invariant: every pin has an expiry, and there are at most PINS_MAX.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from koscache import index as ix
from koscache.index import Environment

PINS_MAX: Final = 100_000
_PREFIX: Final = b"pin:"
_UNTIL: Final = struct.Struct("<d")


class Pins:
    """Times in epoch seconds."""

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}

    def read(self, environment: Environment) -> None:
        """Takes over what the index kept."""
        with environment.read() as txn, txn.cursor(environment.meta) as cursor:
            more = cursor.set_range(_PREFIX)
            while more and cursor.key().startswith(_PREFIX):
                if len(cursor.value()) == _UNTIL.size:
                    self.add(cursor.key().removeprefix(_PREFIX), _UNTIL.unpack(cursor.value())[0])
                more = cursor.next()

    def keep(self, environment: Environment, txn: ix.Transaction, contents: Iterable[bytes]) -> None:
        """Makes the index agree about some versions."""
        for content in contents:
            until = self._until.get(content)
            if until is None:
                txn.delete(_PREFIX + content, db=environment.meta)
            else:
                txn.put(_PREFIX + content, _UNTIL.pack(until), db=environment.meta)

    def add(self, content: bytes, until: float) -> bool:
        """False: PINS_MAX are held already; perhaps some of them expire()."""
        if content not in self._until and len(self._until) >= PINS_MAX:
            return False
        self._until[content] = until
        return True

    def discard(self, content: bytes) -> None:
        self._until.pop(content, None)

    def holds(self, content: bytes, now: float) -> bool:
        return self._until.get(content, now) > now

    def expire(self, now: float) -> list[bytes]:
        """Forgets and returns those whose time is over."""
        over = [content for content, until in self._until.items() if until <= now]
        for content in over:
            del self._until[content]
        return over

    def __len__(self) -> int:
        return len(self._until)
