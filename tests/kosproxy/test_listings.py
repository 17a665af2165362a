"""What bounds listings in one worker, and what becomes of a flight that cannot bring a page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kos.config import Origin, Rule
from kos.errors import OriginRefused, OriginUnavailable
from kos.origin.credentials import from_config
from kos.origin.lane import OriginLane
from kos.rules import Rules
from kos.s3.listing import Question
from kos.tasks import Tasks
from koscache.fence import Fence
from kosproxy import listings as module
from kosproxy.listings import Failed, Found, Listings, Passed
from kosproxy.pages import Page, Pages, PageStore
from tests.conditions import until
from tests.fakes.clock import FakeClock
from tests.fakes.origin import FakeOrigin

MIB = 1024 * 1024


class Scene:
    """One worker's listings over a real lane, a real fence and real pages."""

    def __init__(self, directory: Path, origin: FakeOrigin, *rules: Rule) -> None:
        self.origin = origin
        self.clock = FakeClock()
        self.tasks = Tasks("test")
        self.fence = Fence.open(str(directory), "boot")
        settings = Origin(endpoint=origin.endpoint, access_key="k", secret_key="s", retries=0, breaker_failures=100)
        self.lane = OriginLane(settings, from_config(settings, self.clock), self.clock)
        self.pages = Pages(PageStore(str(directory), 64 * MIB, 0), self.clock)
        self.listings = Listings(self.pages, self.fence, self.lane, Rules(rules), self.clock, self.tasks)

    async def find(self, prefix: str = "k") -> Found | Passed | Failed:
        return await self.listings.find(Question("b", 2, prefix=prefix), "ListObjectsV2")

    async def close(self) -> None:
        await self.tasks.close()
        await self.pages.close()
        await self.lane.close()
        self.fence.close()


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with FakeOrigin() as origin:
        origin.put("b", "k", b"x")
        made = Scene(tmp_path, origin, Rule(match="b/zz/*", freshness=0.0), Rule(match="*", listings=60.0))
        await made.lane.start()
        yield made
        await made.close()


def phase(found: Found | Passed | Failed) -> str:
    assert isinstance(found, Found), found
    return f"{found.phase};{found.reason}"


async def test_the_reasons_of_a_miss(scene: Scene) -> None:
    assert phase(await scene.find("a")) == "miss;cold"
    assert phase(await scene.find("a")) == "hit;fresh"
    await until(lambda: scene.listings.flights == 0)
    scene.fence.bump_all(scene.fence.directory_slots("b", ["abc"]))
    assert phase(await scene.find("a")) == "miss;fenced"
    await until(lambda: scene.listings.flights == 0)
    scene.clock.jump(61.0)
    assert phase(await scene.find("a")) == "miss;expired"
    await until(lambda: scene.listings.flights == 0)
    scene.clock.jump(-3600.0)
    assert phase(await scene.find("a")) == "miss;expired", "a page from the future has no known age"


async def test_who_comes_together_asks_once_though_time_goes_by_while_the_disk_is_asked(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, looked = scene.pages.get, 0

    async def slowly(key: bytes) -> Page | None:
        nonlocal looked
        found = await look(key)
        scene.clock.move(0.001)
        looked += 1
        return found

    monkeypatch.setattr(scene.pages, "get", slowly)
    hold = scene.origin.hold(times=None, op="ListObjectsV2")
    asking = [asyncio.create_task(scene.find()) for _ in range(20)]
    await hold.reached()
    await until(lambda: looked == 20)
    hold.release()
    assert [phase(await each) for each in asking] == ["miss;cold"] * 20
    assert len(hold.held) == 1


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0])
async def test_a_clock_that_is_set_makes_no_flight_younger_or_older(scene: Scene, step_s: float) -> None:
    hold = scene.origin.hold(times=None, op="ListObjectsV2")
    asking = [asyncio.create_task(scene.find())]
    await hold.reached()
    scene.clock.jump(step_s)
    asking.append(asyncio.create_task(scene.find()))
    await asyncio.sleep(0)
    scene.clock.jump(-step_s)
    scene.clock.move(60.0)
    asking.append(asyncio.create_task(scene.find()))
    await until(lambda: len(hold.held) == 2)
    hold.release()
    assert [phase(await each) for each in asking] == ["miss;cold"] * 3
    assert scene.origin.count(op="ListObjectsV2") == 2, (
        "the last came when the first flight was as old as a page may be"
    )


async def test_who_waits_holds_no_page_that_is_out_of_date(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    look, made, gone = scene.pages.get, 0, 0

    class Watched(Page):
        def __del__(self) -> None:
            nonlocal gone
            gone += 1

    async def watched(key: bytes) -> Page | None:
        nonlocal made
        found = await look(key)
        if found is None:
            return None
        made += 1
        return Watched(*found)

    await scene.find()
    await until(lambda: scene.listings.flights == 0)
    scene.clock.jump(61.0)
    monkeypatch.setattr(scene.pages, "get", watched)
    hold = scene.origin.hold(op="ListObjectsV2")
    asking = [asyncio.create_task(scene.find()) for _ in range(20)]
    await hold.reached()
    await until(lambda: made == 20)
    await until(lambda: gone == 20)
    hold.release()
    assert [phase(await each) for each in asking] == ["miss;expired"] * 20


async def test_always_means_a_request_for_each_who_asks(scene: Scene) -> None:
    hold = scene.origin.hold(times=None, op="ListObjectsV2")
    asking = [asyncio.create_task(scene.find("zz/")) for _ in range(4)]
    await until(lambda: len(hold.held) == 4)
    hold.release()
    assert [phase(await each) for each in asking] == ["miss;cold"] * 4


@pytest.mark.parametrize("announced", [True, False])
async def test_a_page_that_is_too_long_is_passed_through(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    monkeypatch.setattr(module, "PAGE_BYTES_MAX", 100)
    if not announced:
        body = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + b"x" * 200
        scene.origin.fault(raw=body, op="ListObjectsV2")
    assert await scene.find() == Passed("too_large")
    await until(lambda: scene.listings.flights == 0)
    assert scene.listings._flying_bytes == 0


async def test_pages_on_their_way_are_bounded_in_number_and_bytes(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FLIGHTS_MAX", 2)
    hold = scene.origin.hold(times=None, op="ListObjectsV2")
    asking = [asyncio.create_task(scene.find(prefix)) for prefix in ("a", "b")]
    await until(lambda: len(hold.held) == 2)
    assert await scene.find("c") == Passed("busy")
    hold.release()
    assert [phase(await each) for each in asking] == ["miss;cold"] * 2
    await until(lambda: scene.listings.flights == 0)
    monkeypatch.setattr(module, "_FLYING_BYTES_MAX", 10)
    assert await scene.find("d") == Passed("busy")


async def test_pages_on_their_way_to_clients_are_bounded(scene: Scene) -> None:
    assert scene.listings.take(100 * MIB)
    assert not scene.listings.take(100 * MIB)
    assert scene.listings.take(1 * MIB)
    scene.listings.give_back(101 * MIB)
    assert scene.listings.take(500 * MIB), "one is always sent"


async def test_all_who_wait_hear_that_the_worker_closes(scene: Scene) -> None:
    hold = scene.origin.hold(op="ListObjectsV2")
    asking = [asyncio.create_task(scene.find())]
    await hold.reached()
    asking += [asyncio.create_task(scene.find()) for _ in range(2)]
    await asyncio.sleep(0)
    await scene.tasks.close()
    for found in await asyncio.gather(*asking):
        assert isinstance(found, Failed) and isinstance(found.failure, OriginUnavailable)
    with pytest.raises(OriginUnavailable):
        await scene.find("other")
    hold.release()


async def test_who_leaves_takes_nothing_from_the_others(scene: Scene) -> None:
    hold = scene.origin.hold(op="ListObjectsV2")
    first = asyncio.create_task(scene.find())
    await hold.reached()
    second = asyncio.create_task(scene.find())
    await asyncio.sleep(0)
    first.cancel()
    hold.release()
    assert phase(await second) == "miss;cold"
    assert first.cancelled() and scene.origin.count(op="ListObjectsV2") == 1


async def test_a_refusal_is_told_to_all_and_not_kept(scene: Scene) -> None:
    for _ in range(2):
        found = await scene.listings.find(Question("nowhere", 2), "ListObjectsV2")
        assert isinstance(found, Failed) and isinstance(found.failure, OriginRefused)
        assert (found.failure.status, found.reason, found.origin_requests) == (404, "refused", 1)
        await until(lambda: scene.listings.flights == 0)


async def test_an_outage_serves_a_stale_page_but_not_a_fenced_one_nor_one_too_old(scene: Scene) -> None:
    await scene.find("a")
    await until(lambda: scene.listings.flights == 0)
    scene.origin.fault(times=None, status=503)
    scene.clock.jump(100.0)
    found: Any = await scene.find("a")
    assert phase(found) == "stale;origin_down" and found.age_s == 100.0
    scene.clock.jump(3600.0)
    too_old = await scene.find("a")
    assert isinstance(too_old, Failed) and too_old.reason == "origin_down"
    scene.clock.jump(-3600.0)
    scene.fence.bump(scene.fence.bucket_slot("b"))
    assert isinstance(await scene.find("a"), Failed)


async def test_a_write_while_the_origin_fails_keeps_a_stale_page_from_being_used(scene: Scene) -> None:
    await scene.find("a")
    await until(lambda: scene.listings.flights == 0)
    scene.clock.jump(100.0)

    def write(_: FakeOrigin) -> None:
        scene.fence.bump_all(scene.fence.directory_slots("b", ["abc"]))

    scene.origin.fault(status=503, then=write)
    assert isinstance(await scene.find("a"), Failed)
