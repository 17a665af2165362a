"""A clock that stands still until a test moves it.

Sleepers wake in the order of their times when `advance` passes them, each before the next is looked at, so a sleeper
that sleeps again within the same stretch is woken again. Chance is seeded.
"""

from __future__ import annotations

import asyncio
import heapq
import random

from kos.clock import Clock

#: turns of the loop granted to whatever a wake-up sets off, before time moves on
_SETTLE_TURNS = 20


class FakeClock(Clock):
    """now() starts at 2030-01-01 00:00:00 UTC unless told otherwise; monotonic() starts at 1000."""

    def __init__(self, now: float = 1893456000.0, seed: int = 0) -> None:
        super().__init__(random.Random(seed))
        self._now = now
        self._monotonic = 1000.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0
        self.slept: list[float] = []

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleepers, (self._monotonic + seconds, self._count, future))
        await future

    @property
    def sleepers(self) -> int:
        """How many are asleep."""
        return sum(1 for _, _, future in self._sleepers if not future.done())

    def move(self, seconds: float) -> None:
        """Let time pass without waking anybody (for code that does not sleep)."""
        self._now += seconds
        self._monotonic += seconds

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back; monotonic time does not notice."""
        self._now += seconds

    async def advance(self, seconds: float) -> None:
        """Let time pass, waking sleepers at their times."""
        until = self._monotonic + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= until:
            at, _, future = heapq.heappop(self._sleepers)
            self.move(max(at - self._monotonic, 0.0))
            if not future.done():
                future.set_result(None)
            await settle()
        self.move(until - self._monotonic)


async def settle(turns: int = _SETTLE_TURNS) -> None:
    """Let everything run that can run without time or I/O."""
    for _ in range(turns):
        await asyncio.sleep(0)
