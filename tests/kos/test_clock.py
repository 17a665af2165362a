"""The clock, and the clock of the tests."""

from __future__ import annotations

import asyncio
import random

from kos.clock import Clock
from tests.fakes.clock import FakeClock, settle


async def test_the_real_clock() -> None:
    clock = Clock(random.Random(1))
    before = clock.monotonic()
    await clock.sleep(-1)
    assert clock.monotonic() >= before
    assert clock.now() > 1.7e9
    assert all(1 <= clock.jitter(1, 2) <= 2 for _ in range(100))


async def test_sleepers_wake_in_order_and_may_sleep_again() -> None:
    clock = FakeClock()
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, *naps: float) -> None:
        for nap in naps:
            await clock.sleep(nap)
            woken.append((name, clock.monotonic() - 1000))

    tasks = [asyncio.ensure_future(sleeper("a", 3, 1)), asyncio.ensure_future(sleeper("b", 1, 1, 5))]
    await clock.advance(2.5)
    assert woken == [("b", 1), ("b", 2)]
    await clock.advance(10)
    assert woken[2:] == [("a", 3), ("a", 4), ("b", 7)]
    assert clock.now() == FakeClock().now() + 12.5
    await asyncio.gather(*tasks)


async def test_a_cancelled_sleeper_is_no_sleeper() -> None:
    clock = FakeClock()
    task = asyncio.ensure_future(clock.sleep(5))
    await settle()
    assert clock.sleepers == 1
    task.cancel()
    await settle()
    assert clock.sleepers == 0
    await clock.advance(10)
    assert task.cancelled()


def test_a_jump_leaves_monotonic_time_alone() -> None:
    clock = FakeClock()
    before = clock.monotonic()
    clock.jump(-3600)
    assert clock.monotonic() == before
    assert clock.now() == FakeClock().now() - 3600
