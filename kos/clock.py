"""Time and chance, injected everywhere so that tests own both.

Owns: wall-clock time, monotonic time, sleeping, jitter. Does not own: timeouts of sockets (asyncio.timeout).

Invariant: now() is for what other machines see (signatures, ages, dates) and may jump; monotonic() is for how long
something took and never goes back. Both in seconds.
"""

from __future__ import annotations

import asyncio
import random
import time


class Clock:
    """The real one; tests use tests.fakes.clock.FakeClock."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds from an arbitrary start."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait; never less than one turn of the loop."""
        await asyncio.sleep(max(seconds, 0.0))

    def jitter(self, low: float, high: float) -> float:
        """A random number from low to high, evenly spread."""
        return self._rng.uniform(low, high)
