"""What must not happen whatever the origin, the daemon or the disk does: wrong bytes, leaks, and waiting for ever."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kos.clock import Clock
from kos.config import Config, Rule
from kos.errors import S3Error
from koscache import ipc
from koscache.carrier import Phase, Reason, Want
from koscache.content import Record
from koscache.store import Store
from tests.conditions import until
from tests.fakes.cache_node import KIB, CacheNode, ShiftedClock

BLOCK = 64 * KIB


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[CacheNode]:
    async with CacheNode(tmp_path, workers=2) as node:
        yield node


async def test_an_answer_for_a_daemon_that_died_says_nothing_to_its_successor(tmp_path: Path) -> None:
    """The first lease of one daemon is not the first lease of the next: else b would get the record of a."""
    async with CacheNode(tmp_path) as node:
        bodies = {key: os.urandom(3 * BLOCK) for key in ("a", "b")}
        for key, body in bodies.items():
            node.origin.put("b", key, body)
        holds = {key: node.origin.hold(key=key, at="head") for key in bodies}
        first = asyncio.ensure_future(node.read("b", "a"))
        await holds["a"].reached()
        await node.stop_daemon()
        await until(lambda: not node.workers[0].carrier.caching)
        await node.start_daemon()
        await until(lambda: node.workers[0].carrier.caching)
        second = asyncio.ensure_future(node.read("b", "b"))
        await holds["b"].reached()
        holds["a"].release()
        assert await first == bodies["a"]
        await until(lambda: node.workers[0].carrier.stats().flights == 1)
        record = node.workers[0].carrier.peek("b", "b").record
        holds["b"].release()
        assert await second == bodies["b"]
        assert record is None


async def test_an_answer_without_etag_and_length_gives_its_connection_back(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, origin_connections=2, origin_read_timeout_s=0.5) as node:
        raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
        fault = node.origin.fault(times=None, raw=raw)
        for _ in range(4):
            with pytest.raises(S3Error) as refused:
                await node.read("b", "k")
            assert refused.value.code == "ServiceUnavailable"
        fault.end()
        node.origin.put("b", "k", b"body")
        assert await node.read("b", "k") == b"body"


async def test_a_large_object_with_a_weak_etag_is_read_whole(node: CacheNode) -> None:
    body = os.urandom(3 * BLOCK)
    node.origin.put("b", "k", body, etag='W/"weak"')
    opened, got = await node.get("b", "k")
    assert (got, opened.phase, opened.reason) == (body, Phase.BYPASS, Reason.NO_ETAG)


async def test_checksums_that_a_304_cannot_bring_are_fetched_without_a_daemon(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with CacheNode(tmp_path, clock=clock) as node:
        body = os.urandom(2 * BLOCK)
        node.origin.put("b", "k", body)
        await node.read("b", "k")  # a ranged answer: no checksums
        await node.settled()
        await node.stop_daemon()
        await until(lambda: not node.workers[0].carrier.caching)
        clock.ahead_s += 31
        node.origin.forget()
        _, got = await node.get("b", "k", want=Want(checksum_mode=True))
        assert got == body
        assert len(node.origin.requests) <= 2


async def test_a_fresh_record_without_checksums_is_served_while_the_origin_is_down(node: CacheNode) -> None:
    body = os.urandom(2 * BLOCK)
    node.origin.put("b", "k", body)
    await node.read("b", "k")
    await node.settled()
    await node.origin.down()
    opened, got = await node.get("b", "k", want=Want(checksum_mode=True))
    assert (got, opened.phase) == (body, Phase.HIT)


class _StuckStore:
    """A store whose disk takes no record while it is stuck: the thread stands still."""

    def __init__(self, store: Store, stuck: threading.Event) -> None:
        self._store = store
        self._go = stuck

    def put_small(self, smalls: list[Any]) -> list[bool]:
        self._go.wait()
        return self._store.put_small(smalls)

    def put_record(self, bucket: str, key: str, record: Record) -> bool:
        self._go.wait()
        return self._store.put_record(bucket, key, record)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


async def test_a_disk_that_stands_still_holds_up_no_read(tmp_path: Path) -> None:
    go = threading.Event()

    def open_store(config: Config, clock: Clock) -> Any:
        return _StuckStore(Store.open(config.cache, clock), go)

    rules = (Rule(match="*", freshness=0.0),)
    options: dict[str, Any] = {"ipc_timeout_s": 0.2, "lease_timeout_s": 0.5, "origin_read_timeout_s": 0.4}
    async with CacheNode(tmp_path, workers=2, rules=rules, open_store=open_store, **options) as node:
        try:
            node.origin.put("b", "k", b"one")
            node.origin.put("b", "large", os.urandom(2 * BLOCK))
            async with asyncio.timeout(10):
                for worker in (0, 1, 0, 1):
                    assert await node.read("b", "k", worker=worker) == b"one"
                    assert len(await node.read("b", "large", worker=worker)) == 2 * BLOCK
        finally:
            go.set()


class _BuggyStore(_StuckStore):
    def put_record(self, bucket: str, key: str, record: Record) -> bool:
        raise RuntimeError("a bug")


async def test_a_bug_in_the_store_turns_caching_off_and_holds_up_nobody(tmp_path: Path) -> None:
    def open_store(config: Config, clock: Clock) -> Any:
        return _BuggyStore(Store.open(config.cache, clock), threading.Event())

    async with CacheNode(tmp_path, open_store=open_store) as node:
        body = os.urandom(2 * BLOCK)
        node.origin.put("b", "k", body)
        async with asyncio.timeout(5):
            assert await node.read("b", "k") == body
            await until(lambda: not node.workers[0].carrier.caching)
            assert await node.read("b", "k") == body
        assert "a bug" in node.workers[0].carrier.reason


async def test_garbage_in_a_reason_is_no_garbage_between_the_processes(node: CacheNode) -> None:
    node.origin.fault(times=None, raw=b"HTTP/1.1 200 OK\r\nContent-Length: \xff\xfe\r\nX-\xff: \xfe\r\n\r\n")
    for worker in (0, 1):
        async with asyncio.timeout(5):
            with pytest.raises(S3Error) as refused:
                await node.read("b", "k", worker=worker)
        assert refused.value.code == "ServiceUnavailable"
    assert all(worker.carrier.caching for worker in node.workers)


async def test_headers_too_large_for_the_index_are_passed_on_and_end_no_connection(node: CacheNode) -> None:
    body = os.urandom(2 * BLOCK)
    node.origin.put("b", "k", body)
    node.origin.fault(times=None, headers={f"x-amz-meta-{each}": "x" * 30000 for each in range(200)})
    lost = [worker.carrier._link._lost for worker in node.workers]
    opened, got = await node.get("b", "k")
    assert (got, opened.phase, opened.reason) == (body, Phase.BYPASS, Reason.NO_STORE)
    assert not any(each.is_set() for each in lost)
    assert all(worker.carrier.caching for worker in node.workers)


async def test_a_clock_that_is_set_back_delays_nobody(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with CacheNode(tmp_path, clock=clock) as node:
        node.origin.put("b", "k", b"body")
        node.origin.fault(status=503, then=lambda _: setattr(clock, "ahead_s", -3600.0))
        assert await node.read("b", "k") == b"body"
        assert len(node.origin.requests) <= 3


async def test_a_peer_that_reads_nothing_holds_up_no_close(tmp_path: Path) -> None:
    """A stopped worker leaves the daemon's socket full; the daemon ends all the same."""
    async with CacheNode(tmp_path) as node:
        assert node.daemon is not None
        with ipc.socket_address(node.config.cache.dir) as path:
            _, writer = await asyncio.open_unix_connection(path)
        sessions = node.daemon._sessions
        await until(lambda: len(sessions) == 2)
        stopped = sessions[max(sessions)].connection
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        while stopped._transport is not None and stopped._transport.get_write_buffer_size() == 0:
            stopped.send(ipc.Caching(True, "x" * 60000))
        async with asyncio.timeout(8):
            await node.stop_daemon()
        writer.close()


async def test_fills_share_the_buffers_that_there_are(tmp_path: Path) -> None:
    """More fills than buffers, each with a connection of its own: they take turns, and nobody waits for ever."""
    options: dict[str, Any] = {"fill_buffer_bytes": 16 * KIB, "fill_ahead_bytes": 16 * BLOCK, "origin_connections": 8}
    async with CacheNode(tmp_path, **options) as node:
        pool = node.workers[0].carrier._context.buffers
        pool._left = 2
        bodies = {f"k{each}": os.urandom(16 * BLOCK) for each in range(6)}
        for key, body in bodies.items():
            node.origin.put("b", key, body)
        async with asyncio.timeout(30):
            got = await asyncio.gather(*(node.read("b", key) for key in bodies))
        assert got == list(bodies.values())
        await node.settled()
        assert len(pool._free) == 2


async def test_a_check_that_takes_too_long_holds_up_no_read(tmp_path: Path) -> None:
    """Blocks that recovery kept are checked before their first use, unless the disk stands still."""
    go = threading.Event()
    go.set()

    class StuckCheck(_StuckStore):
        def verify(self, content: bytes, number: int) -> bool:
            go.wait()
            return self._store.verify(content, number)

    def open_store(config: Config, clock: Clock) -> Any:
        return StuckCheck(Store.open(config.cache, clock), go)

    async with CacheNode(tmp_path, ipc_timeout_s=0.3) as node:
        body = os.urandom(3 * BLOCK)
        node.origin.put("b", "k", body)
        await node.read("b", "k")
        await node.settled()
        record = node.workers[0].carrier.peek("b", "k").record
        await node.stop_daemon()
        for path in Path(node.config.cache.dir).glob("index*"):
            shutil.rmtree(path)
        node._open_store = open_store
        await node.start_daemon()
        await until(lambda: node.workers[0].carrier.caching)
        assert record is not None
        assert node.workers[0].carrier._blocks.unverified(record, 0)
        go.clear()
        try:
            async with asyncio.timeout(10):
                assert await node.read("b", "k") == body
        finally:
            go.set()
