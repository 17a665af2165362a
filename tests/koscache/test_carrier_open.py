"""Opening objects: origin requests counted, single flight over workers, revalidation, what is not stored."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kos.config import ALWAYS, IMMUTABLE, Rule
from kos.errors import OriginRefused, S3Error
from koscache.carrier import Freshness, Phase, Reason, Want
from tests.conditions import until
from tests.fakes.cache_node import KIB, CacheNode, ShiftedClock


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[CacheNode]:
    async with CacheNode(tmp_path, workers=2) as node:
        yield node


@pytest.mark.parametrize("size", [1, 100, 4 * KIB, 4 * KIB + 1, 64 * KIB])
async def test_a_cold_object_of_one_block_costs_one_request_and_then_none(node: CacheNode, size: int) -> None:
    body = os.urandom(size)
    node.origin.put("b", "k", body)
    opened, got = await node.get("b", "k")
    assert (got, opened.phase, opened.reason) == (body, Phase.MISS, Reason.COLD)
    await node.settled()
    assert node.fast("b", "k", worker=0) == body
    assert node.fast("b", "k", worker=1) == body
    opened, got = await node.get("b", "k", worker=1)
    assert (got, opened.phase, opened.reason) == (body, Phase.HIT, Reason.FRESH)
    assert len(node.origin.requests) == 1


async def test_a_large_cold_object_costs_one_request_a_block(node: CacheNode) -> None:
    body = os.urandom(64 * KIB * 9 + 17)
    node.origin.put("b", "k", body)
    assert await node.read("b", "k") == body
    assert len(node.origin.requests) == 10
    await node.settled()
    assert node.fast("b", "k", worker=1) == body
    assert len(node.origin.requests) == 10


async def test_100_concurrent_cold_gets_over_two_workers_cost_one_request_a_block(node: CacheNode) -> None:
    body = os.urandom(64 * KIB * 3)
    node.origin.put("b", "k", body)
    got = await asyncio.gather(*(node.read("b", "k", worker=each % 2) for each in range(100)))
    assert all(each == body for each in got)
    assert len(node.origin.requests) == 3
    assert node.origin.count(key="k", method="GET") == 3


async def test_100_concurrent_cold_gets_of_something_small_cost_one_request(node: CacheNode) -> None:
    node.origin.put("b", "k", b"little")
    got = await asyncio.gather(*(node.read("b", "k", worker=each % 2) for each in range(100)))
    assert set(got) == {b"little"}
    assert len(node.origin.requests) == 1


async def test_an_empty_object(node: CacheNode) -> None:
    node.origin.put("b", "k", b"")
    assert await node.read("b", "k") == b""
    assert len(node.origin.requests) == 2  # the range of the first one says nothing of an empty object
    await node.settled()
    opened, got = await node.get("b", "k", worker=1)
    assert (got, opened.phase) == (b"", Phase.HIT)
    assert len(node.origin.requests) == 2


async def test_checksums_are_asked_for_with_one_whole_get(node: CacheNode) -> None:
    body = os.urandom(64 * KIB * 3)
    node.origin.put("b", "k", body, checksums={"x-amz-checksum-crc32": "AAAAAA=="})
    opened, got = await node.get("b", "k", want=Want(checksum_mode=True))
    assert got == body
    assert opened.record.checksums_known
    assert node.origin.count(method="GET", key="k") == 3


@pytest.fixture
async def clock() -> ShiftedClock:
    return ShiftedClock()


@pytest.fixture
async def ruled(tmp_path: Path, clock: ShiftedClock) -> AsyncIterator[CacheNode]:
    rules = (
        Rule(match="b/always/*", freshness=ALWAYS),
        Rule(match="b/for-ever/*", freshness=IMMUTABLE),
        Rule(match="*", freshness=30.0, stale_if_error_s=100.0),
    )
    async with CacheNode(tmp_path, workers=2, clock=clock, rules=rules, origin_retries=0) as node:
        yield node


async def test_an_expired_record_is_revalidated_once_for_all(ruled: CacheNode, clock: ShiftedClock) -> None:
    body = os.urandom(100 * KIB)
    ruled.origin.put("b", "k", body)
    assert await ruled.read("b", "k") == body
    await ruled.settled()
    ruled.origin.forget()
    clock.ahead_s += 31
    assert ruled.workers[0].carrier.peek("b", "k").freshness is Freshness.EXPIRED
    results = await asyncio.gather(*(ruled.get("b", "k", worker=each % 2) for each in range(20)))
    assert {got for _, got in results} == {body}
    assert Phase.REVALIDATED in {opened.phase for opened, _ in results}
    assert [(each.method, each.status) for each in ruled.origin.requests] == [("GET", 304)]
    await ruled.settled()
    assert ruled.workers[1].carrier.peek("b", "k").freshness is Freshness.FRESH


async def test_a_new_version_behind_our_back_is_seen_when_the_record_expires(
    ruled: CacheNode, clock: ShiftedClock
) -> None:
    ruled.origin.put("b", "k", b"old" * 10_000)
    await ruled.read("b", "k")
    await ruled.settled()
    ruled.origin.put("b", "k", b"new" * 10_000)
    assert await ruled.read("b", "k", worker=1) == b"old" * 10_000
    clock.ahead_s += 31
    opened, got = await ruled.get("b", "k", worker=1)
    assert (got, opened.phase, opened.reason) == (b"new" * 10_000, Phase.MISS, Reason.CHANGED)
    assert len(ruled.origin.requests) == 2


async def test_always_asks_and_never_joins_a_question_that_was_sent_before(ruled: CacheNode) -> None:
    ruled.origin.put("b", "always/k", b"old")
    hold = ruled.origin.hold(at="answer")
    first = asyncio.ensure_future(ruled.read("b", "always/k"))
    await hold.reached()
    ruled.origin.put("b", "always/k", b"new")
    second = asyncio.ensure_future(ruled.read("b", "always/k"))
    third = asyncio.ensure_future(ruled.read("b", "always/k", worker=1))
    await asyncio.sleep(0)
    hold.release()
    assert await first == b"old"
    assert await second == b"new"
    assert await third == b"new"


async def test_immutable_is_never_asked_about_again(ruled: CacheNode, clock: ShiftedClock) -> None:
    ruled.origin.put("b", "for-ever/k", b"body")
    await ruled.read("b", "for-ever/k")
    await ruled.settled()
    clock.ahead_s += 10**8
    assert ruled.fast("b", "for-ever/k") == b"body"
    opened, _ = await ruled.get("b", "for-ever/k", worker=1)
    assert opened.phase is Phase.HIT
    assert len(ruled.origin.requests) == 1


async def test_a_write_is_seen_by_the_next_read_in_every_worker(ruled: CacheNode) -> None:
    ruled.origin.put("b", "for-ever/k", b"old")
    assert await ruled.read("b", "for-ever/k") == b"old"
    await ruled.settled()
    async with ruled.workers[0].carrier.writing("b", ["for-ever/k"]):
        ruled.origin.put("b", "for-ever/k", b"new")
    assert ruled.workers[1].carrier.peek("b", "for-ever/k").freshness is Freshness.FENCED
    assert await ruled.read("b", "for-ever/k", worker=1) == b"new"


async def test_a_read_after_a_write_never_joins_an_open_from_before_it(ruled: CacheNode) -> None:
    """reader A asks, the origin answers old, slowly; the write is answered; reader B must not get A's answer."""
    ruled.origin.put("b", "k", b"old")
    hold = ruled.origin.hold(at="answer", method="GET")
    before = asyncio.ensure_future(ruled.read("b", "k"))
    await hold.reached()
    async with ruled.workers[1].carrier.writing("b", ["k"]):
        ruled.origin.put("b", "k", b"new")
    after = [asyncio.ensure_future(ruled.read("b", "k", worker=each)) for each in (0, 1)]
    assert [await each for each in after] == [b"new", b"new"]
    hold.release()
    assert await before == b"old"
    await ruled.settled()
    assert await ruled.read("b", "k") == b"new"


async def test_a_failed_or_cancelled_write_passes_the_fence_as_well(ruled: CacheNode) -> None:
    ruled.origin.put("b", "k", b"old")
    await ruled.read("b", "k")
    await ruled.settled()
    fence = ruled.workers[0].reader.fence
    before = fence.value_of("b", "k")
    with pytest.raises(RuntimeError):
        async with ruled.workers[0].carrier.writing("b", ["k"]):
            between = fence.value_of("b", "k")
            raise RuntimeError("the client went away")
    assert len({before, between, fence.value_of("b", "k")}) == 3


async def test_the_origin_is_down_stale_is_served_as_long_as_the_rule_says(
    ruled: CacheNode, clock: ShiftedClock
) -> None:
    ruled.origin.put("b", "k", b"body")
    await ruled.read("b", "k")
    await ruled.settled()
    await ruled.origin.down()
    clock.ahead_s += 31
    opened, got = await ruled.get("b", "k", worker=1)
    assert (got, opened.phase, opened.reason) == (b"body", Phase.STALE, Reason.ORIGIN_DOWN)
    assert opened.age_s is not None
    assert 31 <= opened.age_s < 60
    clock.ahead_s += 100
    with pytest.raises(S3Error) as refused:
        await ruled.read("b", "k")
    assert refused.value.code == "ServiceUnavailable"
    assert int(refused.value.headers["Retry-After"]) >= 1


async def test_what_was_written_since_is_never_served_stale(ruled: CacheNode) -> None:
    ruled.origin.put("b", "k", b"body")
    await ruled.read("b", "k")
    await ruled.settled()
    async with ruled.workers[0].carrier.writing("b", ["k"]):
        pass
    await ruled.origin.down()
    for worker in (0, 1):
        with pytest.raises(S3Error):
            await ruled.read("b", "k", worker=worker)


async def test_a_500_is_the_origin_being_down_and_slow_down_is_passed_on(ruled: CacheNode) -> None:
    ruled.origin.put("b", "k", b"body")
    ruled.origin.fault(times=1, status=500)
    with pytest.raises(S3Error) as failed:
        await ruled.read("b", "k")
    assert failed.value.code == "ServiceUnavailable"
    ruled.origin.fault(times=1, status=503, code="SlowDown", retry_after="7")
    with pytest.raises(S3Error) as slow:
        await ruled.read("b", "k")
    assert (slow.value.code, slow.value.headers["Retry-After"]) == ("SlowDown", "7")


async def test_a_refusal_reaches_all_who_wait_and_drops_the_record(ruled: CacheNode, clock: ShiftedClock) -> None:
    hold = ruled.origin.hold(at="answer")
    reading = [asyncio.ensure_future(ruled.read("b", "nothing", worker=each % 2)) for each in range(10)]
    await hold.reached()
    hold.release()
    results = await asyncio.gather(*reading, return_exceptions=True)
    assert all(isinstance(each, OriginRefused) and each.status == 404 for each in results)
    assert all(b"NoSuchKey" in each.body for each in results if isinstance(each, OriginRefused))
    assert len(ruled.origin.requests) <= 2  # who came to the daemon after the answer asks for himself

    ruled.origin.put("b", "k", b"body")
    await ruled.read("b", "k")
    await ruled.settled()
    ruled.origin.remove("b", "k")
    clock.ahead_s += 31
    with pytest.raises(OriginRefused):
        await ruled.read("b", "k")
    await until(lambda: ruled.workers[0].carrier.peek("b", "k").record is None)
    await ruled.origin.down()
    with pytest.raises(S3Error):
        await ruled.read("b", "k")


@pytest.mark.parametrize("cache_control", ["no-store", "private, max-age=5", "max-age=0, NO-STORE"])
async def test_no_store_and_private_are_never_stored(node: CacheNode, cache_control: str) -> None:
    body = os.urandom(150 * KIB)
    node.origin.put("b", "k", body, {"cache-control": cache_control})
    results = await asyncio.gather(*(node.get("b", "k", worker=each % 2) for each in range(6)))
    assert all(got == body for _, got in results)
    assert {opened.phase for opened, _ in results} == {Phase.BYPASS}
    await node.settled()
    assert node.workers[0].carrier.peek("b", "k").record is None
    assert node.fast("b", "k") is None


async def test_without_an_etag_nothing_is_stored_and_one_answer_is_the_body(node: CacheNode) -> None:
    body = os.urandom(150 * KIB)
    node.origin.put("b", "k", body)
    node.origin.fault(times=None, headers={"etag": None})
    opened, got = await node.get("b", "k")
    assert (got, opened.phase, opened.reason) == (body, Phase.BYPASS, Reason.NO_ETAG)
    await node.settled()
    assert node.workers[0].carrier.peek("b", "k").record is None


async def test_head_costs_one_request_and_makes_a_record(node: CacheNode) -> None:
    node.origin.put("b", "k", b"x" * 5000, checksums={"x-amz-checksum-crc32": "AAAAAA=="})
    opened = await node.open("b", "k", Want(head_only=True))
    assert (opened.record.size, opened.phase) == (5000, Phase.MISS)
    assert opened.record.checksums
    opened.close()
    await node.settled()
    opened = await node.open("b", "k", Want(head_only=True), worker=1)
    assert opened.phase is Phase.HIT
    assert [each.method for each in node.origin.requests] == ["HEAD"]


async def test_a_conditional_read_of_something_cold_asks_by_head(node: CacheNode) -> None:
    node.origin.put("b", "k", b"x" * 5000)
    assert await node.read("b", "k", want=Want(conditional=True)) == b"x" * 5000
    assert [each.method for each in node.origin.requests] == ["HEAD", "GET"]


async def test_checksums_missing_in_a_record_are_completed_by_one_head(node: CacheNode) -> None:
    node.origin.put("b", "k", b"x" * 5000, checksums={"x-amz-checksum-crc32": "AAAAAA=="})
    await node.read("b", "k")
    await node.settled()
    opened, got = await node.get("b", "k", want=Want(checksum_mode=True))
    assert opened.record.checksums_known
    assert opened.record.checksums
    assert got == b"x" * 5000
    await node.settled()
    opened, _ = await node.get("b", "k", want=Want(checksum_mode=True), worker=1)
    assert opened.phase is Phase.HIT
    assert [each.method for each in node.origin.requests] == ["GET", "HEAD"]


async def test_a_clients_going_away_does_not_end_the_question_nor_the_fill(node: CacheNode) -> None:
    body = os.urandom(60 * KIB)
    node.origin.put("b", "k", body)
    hold = node.origin.hold(at="answer")
    reading = asyncio.ensure_future(node.read("b", "k"))
    await hold.reached()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    hold.release()
    await node.settled()
    assert node.fast("b", "k", worker=1) == body
    assert len(node.origin.requests) == 1


async def test_a_leaders_cancellation_does_not_fail_its_followers(node: CacheNode) -> None:
    body = os.urandom(60 * KIB)
    node.origin.put("b", "k", body)
    hold = node.origin.hold(at="body", body_bytes=20 * KIB)
    leader = asyncio.ensure_future(node.read("b", "k"))
    await hold.reached()
    followers = [asyncio.ensure_future(node.read("b", "k", worker=each)) for each in (0, 1)]
    await asyncio.sleep(0)
    leader.cancel()
    hold.release()
    assert [await each for each in followers] == [body, body]
    assert len(node.origin.requests) == 1
