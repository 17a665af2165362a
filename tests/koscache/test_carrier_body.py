"""Bodies: ranges, small reads, looking ahead, broken connections, versions that change, limits."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kos.errors import OriginRefused, S3Error
from kos.s3.ranges import RangeSpec
from koscache.carrier import BytesPiece, Changed, FilePiece, Phase, Reason, Want
from tests.conditions import until
from tests.fakes.cache_node import KIB, MIB, CacheNode, take

BLOCK = 64 * KIB


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[CacheNode]:
    async with CacheNode(tmp_path, workers=2) as node:
        yield node


def sent_bytes(node: CacheNode) -> int:
    return sum(each.sent_bytes for each in node.origin.requests)


async def test_a_small_range_passes_through_at_first_and_fills_at_second_touch(node: CacheNode) -> None:
    """A 100-byte range pulled the whole object: not here."""
    body = os.urandom(5 * BLOCK)
    node.origin.put("b", "k", body)
    opened, got = await node.get("b", "k", "bytes=70000-70099")
    assert got == body[70000:70100]
    assert (opened.phase, opened.origin_requests) == (Phase.MISS, 1)
    assert sent_bytes(node) == 100
    await node.settled()
    assert await node.read("b", "k", "bytes=70100-70199", worker=1) == body[70100:70200]
    await node.settled()
    assert len(node.origin.requests) == 2
    assert sent_bytes(node) == 100 + BLOCK
    assert await node.read("b", "k", "bytes=65536-131071") == body[BLOCK : 2 * BLOCK]
    assert len(node.origin.requests) == 2


async def test_a_suffix_is_passed_through_as_it_is(node: CacheNode) -> None:
    body = os.urandom(5 * BLOCK)
    node.origin.put("b", "k", body)
    assert await node.read("b", "k", "bytes=-8") == body[-8:]
    assert (len(node.origin.requests), sent_bytes(node)) == (1, 8)


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-", 0, 300_000),
        ("bytes=100000-", 100_000, 300_000),
        ("bytes=60000-140000", 60_000, 140_001),
        ("bytes=-100000", 200_000, 300_000),
        ("bytes=65535-65536", 65_535, 65_537),
        ("bytes=299999-", 299_999, 300_000),
        ("bytes=0-999999999", 0, 300_000),
    ],
)
async def test_ranges_cold_and_hot(node: CacheNode, header: str, start: int, stop: int) -> None:
    """A range across two blocks came back truncated: not here."""
    body = os.urandom(300_000)
    node.origin.put("b", "k", body)
    for _ in range(4):
        assert await node.read("b", "k", header) == body[start:stop]
        await node.settled()
    assert await node.read("b", "k", header, worker=1) == body[start:stop]


async def test_a_range_outside_of_the_object_costs_no_body(node: CacheNode) -> None:
    node.origin.put("b", "k", b"x" * 100)
    with pytest.raises(S3Error) as outside:
        await node.read("b", "k", "bytes=100-200")
    assert outside.value.extra["ActualObjectSize"] == "100"
    with pytest.raises(S3Error):
        await node.read("b", "k", f"bytes={BLOCK}-")
    assert sum(each.sent_bytes for each in node.origin.requests if each.status in (200, 206)) == 0


async def test_a_stream_looks_ahead_within_its_window(node: CacheNode) -> None:
    """Once its first bytes are here, the window's other blocks are on their way, each by a connection of its own."""
    body = os.urandom(12 * BLOCK)
    node.origin.put("b", "k", body)
    first = node.origin.hold(at="head")
    hold = node.origin.hold(times=None, at="body", body_bytes=40 * KIB)
    reading = asyncio.ensure_future(node.read("b", "k"))
    await first.reached()
    assert len(node.origin.requests) == 1, "nothing holds up the first one"
    first.release()
    await until(lambda: len(hold.held) >= 3)  # fill_ahead is 4 blocks; once the first is through, it moves on by one
    assert len(hold.held) <= 4
    hold.release()
    assert await reading == body
    assert len(node.origin.requests) == 12


async def test_pieces_come_as_the_watermark_moves(node: CacheNode) -> None:
    body = os.urandom(BLOCK)
    node.origin.put("b", "k", body)
    hold = node.origin.hold(at="body", body_bytes=40 * KIB)
    opened = await node.open("b", "k")
    reading = node.workers[0].carrier.body(opened, 0, BLOCK)
    got = b""
    while len(got) < 32 * KIB:
        piece = await anext(reading)
        assert isinstance(piece, FilePiece)
        got += take(piece)
    hold.release()
    got += b"".join([take(piece) async for piece in reading])
    assert got == body
    await reading.aclose()
    opened.close()


async def test_followers_in_another_worker_read_behind_the_watermark(node: CacheNode) -> None:
    body = os.urandom(BLOCK)
    node.origin.put("b", "k", body)
    hold = node.origin.hold(at="body", body_bytes=40 * KIB)
    leading = asyncio.ensure_future(node.read("b", "k"))
    await hold.reached()
    opened = await node.open("b", "k", worker=1)
    following = node.workers[1].carrier.body(opened, 0, BLOCK)
    piece = await anext(following)
    assert isinstance(piece, FilePiece)
    got = take(piece)
    hold.release()
    got += b"".join([take(each) async for each in following])
    assert got == body
    assert await leading == body
    assert len(node.origin.requests) == 1
    await following.aclose()
    opened.close()


async def test_a_broken_connection_is_gone_on_with_from_where_it_broke(tmp_path: Path) -> None:
    async with CacheNode(
        tmp_path, workers=2, block_bytes=MIB, segment_bytes=4 * MIB, fill_buffer_bytes=64 * KIB
    ) as node:
        body = os.urandom(MIB)
        node.origin.put("b", "k", body)
        node.origin.fault(times=1, body_cut=700_000)
        node.origin.fault(times=1, body_cut=200_000, reset=True)
        assert await node.read("b", "k") == body
        starts = [int(each.headers["range"].removeprefix("bytes=").partition("-")[0]) for each in node.origin.requests]
        assert len(starts) == 3
        assert 0 == starts[0] < starts[1] <= 700_000
        assert starts[1] <= starts[2] <= starts[1] + 200_000
        assert all(each.headers["if-match"] for each in node.origin.requests[1:])
        await node.settled()
        assert node.fast("b", "k", worker=1) == body


async def test_an_origin_that_breaks_too_often_fails_all_readers_and_stores_nothing(node: CacheNode) -> None:
    body = os.urandom(BLOCK)
    node.origin.put("b", "k", body)
    node.origin.fault(times=None, method="GET", body_cut=1000)
    results = await asyncio.gather(*(node.read("b", "k", worker=each % 2) for each in range(6)), return_exceptions=True)
    assert all(isinstance(each, S3Error) and each.code == "ServiceUnavailable" for each in results)
    await node.settled()
    assert node.fast("b", "k") is None
    node.origin.heal()
    assert await node.read("b", "k") == body


@pytest.mark.parametrize("length", [-5, 5])
async def test_a_body_shorter_or_longer_than_announced_is_never_stored_wrongly(node: CacheNode, length: int) -> None:
    body = os.urandom(BLOCK)
    node.origin.put("b", "k", body)
    node.origin.fault(times=1, body_length=length)
    got = await asyncio.gather(node.read("b", "k"), return_exceptions=True)
    assert got[0] == body or isinstance(got[0], S3Error)
    await node.settled()
    assert await node.read("b", "k", worker=1) == body


async def test_an_object_that_changes_before_the_first_piece_is_opened_again(node: CacheNode) -> None:
    old, new = os.urandom(3 * BLOCK), os.urandom(3 * BLOCK)
    node.origin.put("b", "k", old)
    opened = await node.open("b", "k", Want(head_only=True))
    opened.close()
    await node.settled()
    node.origin.put("b", "k", new)
    opened = await node.open("b", "k")
    assert opened.phase is Phase.MISS
    body = node.workers[0].carrier.body(opened, 0, opened.record.size)
    with pytest.raises(Changed):
        await anext(body)
    await body.aclose()
    opened.close()
    opened, got = await node.get("b", "k")
    assert got == new
    assert opened.record.etag != ""


async def test_an_object_that_changes_in_the_middle_breaks_off_and_never_mixes(tmp_path: Path) -> None:
    """Torn metadata and body on a hot overwrite: not here."""
    async with CacheNode(tmp_path, workers=2, fill_ahead_bytes=0) as node:
        old, new = os.urandom(4 * BLOCK), os.urandom(4 * BLOCK)
        node.origin.put("b", "k", old)
        opened = await node.open("b", "k")
        body = node.workers[0].carrier.body(opened, 0, opened.record.size)
        got = b""
        while len(got) < BLOCK:
            got += take(await anext(body))
        node.origin.put("b", "k", new)
        with pytest.raises(Changed):
            while True:
                got += take(await anext(body))
        assert old.startswith(got)
        await body.aclose()
        opened.close()
        assert await node.read("b", "k", worker=1) == new


async def test_a_changed_block_tells_followers_in_other_workers(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, workers=2, fill_ahead_bytes=0) as node:
        old = os.urandom(2 * BLOCK)
        node.origin.put("b", "k", old)
        await node.read("b", "k", "bytes=0-65535")
        await node.settled()
        node.origin.put("b", "k", os.urandom(2 * BLOCK))
        hold = node.origin.hold(at="head")
        opened = [await node.open("b", "k", Want(range=RangeSpec(BLOCK, None)), worker=each) for each in (0, 1)]
        bodies = [node.workers[each].carrier.body(opened[each], BLOCK, 2 * BLOCK) for each in (0, 1)]
        firsts = [asyncio.ensure_future(anext(body)) for body in bodies]
        await hold.reached()
        hold.release()
        results = await asyncio.gather(*firsts, return_exceptions=True)
        assert all(isinstance(each, Changed) for each in results)
        for each in (0, 1):
            await bodies[each].aclose()
            opened[each].close()


async def test_fills_are_bounded_by_bytes_and_the_rest_passes_through(tmp_path: Path) -> None:
    """Fills limited by count, not bytes, took 21 GB: not here."""
    async with CacheNode(tmp_path, workers=2, fills_max_bytes=2 * BLOCK) as node:
        bodies = {f"k{each}": os.urandom(3 * BLOCK) for each in range(4)}
        for key, body in bodies.items():
            node.origin.put("b", key, body)
        hold = node.origin.hold(times=None, at="body", body_bytes=1)
        reading = [asyncio.ensure_future(node.read("b", key, worker=at % 2)) for at, key in enumerate(bodies)]
        await until(lambda: len(hold.held) >= 4)
        assert node.daemon is not None
        assert node.daemon._leases.granted_bytes <= 2 * BLOCK
        hold.release()
        assert await asyncio.gather(*reading) == list(bodies.values())
        await node.settled()
        assert node.daemon._leases.granted_bytes == 0


async def test_a_refused_fill_reads_the_answer_that_is_there(tmp_path: Path) -> None:
    """When the daemon refuses the lease, the answer that opened the object is streamed on: no second request."""
    async with CacheNode(tmp_path, fills_max_bytes=4 * KIB) as node:
        body = os.urandom(BLOCK)
        node.origin.put("b", "k", body)
        assert await node.read("b", "k") == body
        assert len(node.origin.requests) == 1
        assert node.fast("b", "k") is None


async def test_a_slow_reader_of_what_passes_through_holds_the_origin_back(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, fills_max_bytes=4 * KIB) as node:
        body = os.urandom(256 * BLOCK)
        node.origin.put("b", "k", body)
        opened = await node.open("b", "k")
        reading = node.workers[0].carrier.body(opened, 0, len(body))
        piece = await anext(reading)
        assert isinstance(piece, BytesPiece)
        assert len(piece.data) <= 512 * KIB
        await reading.aclose()
        opened.close()
        await node.settled()


async def test_403_on_a_block_is_relayed(node: CacheNode) -> None:
    node.origin.put("b", "k", os.urandom(3 * BLOCK))
    opened = await node.open("b", "k", Want(head_only=True))
    opened.close()
    await node.settled()
    node.origin.fault(times=None, status=403, code="AccessDenied")
    with pytest.raises(OriginRefused) as refused:
        await node.read("b", "k")
    assert refused.value.status == 403
    assert b"AccessDenied" in refused.value.body


async def test_a_body_given_up_early_gives_everything_back(node: CacheNode) -> None:
    body = os.urandom(8 * BLOCK)
    node.origin.put("b", "k", body)
    opened = await node.open("b", "k")
    reading = node.workers[0].carrier.body(opened, 0, len(body))
    await anext(reading)
    await reading.aclose()
    opened.close()
    await node.settled()
    reader = node.workers[0].reader
    assert all(reader._held[segment].borrows == 0 for segment in reader.held())
    opened, got = await node.get("b", "k")
    assert got == body
    assert opened.record is not None
    assert len(node.origin.requests) == 8


async def test_hits_are_remembered_as_touches_and_misses_have_a_reason(node: CacheNode) -> None:
    body = os.urandom(2 * BLOCK)
    node.origin.put("b", "k", body)
    await node.read("b", "k", f"bytes=0-{BLOCK - 1}")
    await node.settled()
    opened, got = await node.get("b", "k")
    assert (got, opened.phase, opened.reason) == (body, Phase.MISS, Reason.BLOCK)
    assert opened.origin_requests == 1
    carrier = node.workers[0].carrier
    assert (opened.record.content, 0) in carrier._touches
