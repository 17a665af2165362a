"""An origin, a lane to it, and both event loops."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop

from kos.clock import Clock
from kos.config import Origin
from kos.origin.breaker import State
from kos.origin.credentials import Credentials, StaticCredentials
from kos.origin.lane import OriginLane
from tests.fakes.clock import FakeClock
from tests.fakes.origin import FakeOrigin

KEYS = Credentials("AKORIGIN", "origin-secret")


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, int]] = []
        self.failures: list[str] = []
        self.states: list[State] = []

    def answered(self, operation: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.answers.append((operation, status))

    def failed(self, reason: str) -> None:
        self.failures.append(reason)

    def breaker(self, state: State) -> None:
        if not self.states or self.states[-1] is not state:
            self.states.append(state)


class Buffer:
    """A sink in memory with room pieces of `room` bytes. pause_after: says False once that many bytes are in."""

    def __init__(self, size: int, room: int = 64 * 1024, pause_after: int | None = None) -> None:
        self.bytes = bytearray(size)
        self.room = room
        self.at = 0
        self.pause_after = pause_after
        self.paused = asyncio.Event()

    def get_buffer(self) -> memoryview:
        assert not self.paused.is_set(), "asked for room while paused"
        return memoryview(self.bytes)[self.at : self.at + self.room]

    def received(self, n: int) -> bool:
        assert 0 < n <= self.room
        self.at += n
        if self.pause_after is not None and self.at >= self.pause_after:
            self.pause_after = None
            self.paused.set()
            return False
        return True


class QuickClock(FakeClock):
    """Sleeps take no time but are written down. The date is today's, or no signature would hold."""

    def now(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.move(seconds)
        await asyncio.sleep(0)


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    """Every test here runs on both: bodies take different ways through them."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
async def origin() -> AsyncIterator[FakeOrigin]:
    async with FakeOrigin(secrets={KEYS.access_key: KEYS.secret_key}) as origin:
        origin.create_bucket("b")
        yield origin


@pytest.fixture
def seen() -> Seen:
    return Seen()


MakeLane = Callable[..., Awaitable[OriginLane]]


@pytest.fixture
async def make_lane(origin: FakeOrigin, seen: Seen) -> AsyncIterator[MakeLane]:
    lanes: list[OriginLane] = []

    async def make(clock: Clock | None = None, resolver: Any = None, **options: Any) -> OriginLane:
        options.setdefault("endpoint", origin.endpoint)
        options.setdefault("retry_base_s", 0.001)
        config = Origin(**options)
        lane = OriginLane(config, StaticCredentials(KEYS), clock or Clock(), observer=seen, resolver=resolver)
        await lane.start()
        lanes.append(lane)
        return lane

    yield make
    for lane in lanes:
        for _ in range(10):
            await asyncio.sleep(0)
        assert lane._places._value == lane._origin.connections, "a connection's place was lost or given back twice"
        assert lane._waiting == 0
        await lane.close()


@pytest.fixture
async def lane(make_lane: MakeLane) -> OriginLane:
    return await make_lane()


@pytest.fixture(scope="session")
def big() -> bytes:
    """3 MiB and a bit: more than any socket buffer hands over at once."""
    return os.urandom(3 * 1024 * 1024 + 137)
