"""Many readers, sinks of all sizes, an origin that misbehaves: never a wrong byte, never a lost connection's place."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kos.errors import OriginBroken, OriginUnavailable
from kos.origin.lane import OriginLane
from tests.fakes.origin import FakeOrigin

from .conftest import Buffer

MakeLane = Callable[..., Awaitable[OriginLane]]


class Sums:
    def __init__(self) -> None:
        self.whole = self.broken = self.left = 0


async def read_somehow(lane: OriginLane, chance: random.Random, body: bytes, sums: Sums) -> None:
    start = chance.randrange(len(body))
    stop = min(len(body), start + chance.choice([1, 100, 70_000, 600_000, len(body)]))
    wanted = body[start:stop]
    headers = {"range": f"bytes={start}-{stop - 1}"}
    way = chance.choice(["into", "into", "into", "into_paused", "into_part", "iter", "read", "leave", "cancel"])
    sink = Buffer(len(wanted), chance.choice([1_000, 65_536, 262_144, 1 << 20]))
    try:
        async with await lane.request("GET", "b", "k", headers=headers) as response:
            if response.content_length != len(wanted):  # an origin that ignores ranges, or announces nonsense
                sums.left += 1
                return
            if way in ("into", "into_part"):
                length = len(wanted) if way == "into" else chance.randrange(len(wanted)) + 1
                await response.into(sink, length)
                assert sink.at == length
            elif way in ("into_paused", "cancel"):
                sink.pause_after = chance.randrange(len(wanted)) + 1
                taking = asyncio.ensure_future(response.into(sink, len(wanted)))
                pausing = asyncio.ensure_future(sink.paused.wait())
                await asyncio.wait([taking, pausing], return_when=asyncio.FIRST_COMPLETED)
                pausing.cancel()
                if way == "cancel":
                    taking.cancel()
                sink.paused.clear()
                response.resume()
                await asyncio.wait([taking])
                if not taking.cancelled():
                    taking.result()
            elif way == "iter":
                assert b"".join([piece async for piece in response.pieces()]) == wanted
            elif way == "read":
                assert await response.read(len(wanted)) == wanted
            sums.whole += sink.at == len(wanted)
    except (OriginBroken, OriginUnavailable):
        sums.broken += 1
    assert bytes(sink.bytes[: sink.at]) == wanted[: sink.at]


FAULTS: list[dict[str, Any]] = [
    {"body_cut": 0},
    {"body_cut": 50_000},
    {"body_cut": 300_000, "reset": True},
    {"close": True},
    {"close": True, "reset": True},
    {"status": 503},
    {"ignore_range": True},
    {"headers": {"connection": "close"}},
    {"body_length": 1000},
    {"raw": b"nonsense\r\n\r\n"},
]


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_bytes_are_right(make_lane: MakeLane, origin: FakeOrigin, big: bytes, seed: int) -> None:
    print("seed", seed)
    chance = random.Random(seed)
    lane = await make_lane(connections=5, breaker_failures=1000, read_timeout_s=10.0)
    body = big[:1_500_000]
    origin.put("b", "k", body)
    sums = Sums()

    async def reader() -> None:
        for _ in range(25):
            if chance.random() < 0.3:
                origin.fault(**chance.choice(FAULTS))
            await read_somehow(lane, chance, body, sums)

    await asyncio.gather(*(reader() for _ in range(8)))
    assert origin.busiest <= 5
    assert sums.whole > 50 and sums.broken, vars(sums)
