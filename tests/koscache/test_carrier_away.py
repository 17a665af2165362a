"""When the daemon is away, dies, comes back, or another worker dies; and disks that fail."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kos.clock import Clock
from kos.config import Config
from koscache import ipc
from koscache.carrier import Phase, Reason
from koscache.content import Commit, Extent, Refused
from koscache.disk import StoreFailed
from koscache.store import Store
from tests.conditions import until
from tests.fakes.cache_node import KIB, MIB, CacheNode, ShiftedClock

BLOCK = 64 * KIB


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[CacheNode]:
    async with CacheNode(tmp_path, workers=2) as node:
        yield node


async def test_without_a_daemon_misses_pass_through(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, daemon=False) as node:
        body = os.urandom(3 * BLOCK)
        node.origin.put("b", "k", body)
        opened, got = await node.get("b", "k")
        assert (got, opened.phase, opened.reason) == (body, Phase.BYPASS, Reason.DAEMON_AWAY)
        assert await node.read("b", "k", "bytes=70000-140000") == body[70000:140001]
        assert len(node.origin.requests) == 2
        assert not node.workers[0].carrier.caching
        assert node.workers[0].carrier.reason == "daemon away"
        results = await asyncio.gather(*(node.read("b", "k") for _ in range(10)))
        assert set(results) == {body}


async def test_hits_go_on_while_the_daemon_is_away_and_it_is_found_again(node: CacheNode) -> None:
    body = os.urandom(3 * BLOCK)
    node.origin.put("b", "k", body)
    node.origin.put("b", "cold", body)
    await node.read("b", "k")
    await node.settled()
    await node.stop_daemon()
    await until(lambda: not node.workers[0].carrier.caching)
    assert node.fast("b", "k") == body
    opened, got = await node.get("b", "k")
    assert (got, opened.phase) == (body, Phase.HIT)
    opened, got = await node.get("b", "cold")
    assert (got, opened.phase) == (body, Phase.BYPASS)
    await node.start_daemon()
    await until(lambda: all(worker.carrier.caching for worker in node.workers))
    assert node.fast("b", "k") == body
    assert await node.read("b", "cold") == body
    await node.settled()
    assert node.fast("b", "cold", worker=1) == body


async def test_an_expired_record_is_revalidated_without_the_daemon(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with CacheNode(tmp_path, clock=clock) as node:
        body = os.urandom(2 * BLOCK)
        node.origin.put("b", "k", body)
        await node.read("b", "k")
        await node.settled()
        await node.stop_daemon()
        await until(lambda: not node.workers[0].carrier.caching)
        clock.ahead_s += 31
        node.origin.forget()
        opened, got = await node.get("b", "k")
        assert (got, opened.phase) == (body, Phase.REVALIDATED)
        assert [each.status for each in node.origin.requests] == [304]


async def test_a_daemon_that_dies_in_the_middle_fails_nobody(node: CacheNode) -> None:
    body = os.urandom(4 * BLOCK)
    node.origin.put("b", "k", body)
    hold = node.origin.hold(times=None, at="body", body_bytes=20 * KIB)
    reading = [asyncio.ensure_future(node.read("b", "k", worker=each % 2)) for each in range(6)]
    await until(lambda: len(hold.held) >= 4)
    await node.stop_daemon()
    hold.release()
    assert set(await asyncio.gather(*reading)) == {body}
    await node.start_daemon()
    await until(lambda: all(worker.carrier.caching for worker in node.workers))
    assert await node.read("b", "k") == body
    await node.settled()
    assert node.fast("b", "k", worker=1) == body


async def test_a_daemon_that_answers_nothing_is_as_good_as_away(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, daemon=False, ipc_timeout_s=0.2) as node:
        silent = await asyncio.start_unix_server(
            lambda reader, writer: _welcome_and_nothing_else(writer), Path(node.config.cache.dir) / ipc.SOCKET_NAME
        )
        try:
            body = os.urandom(2 * BLOCK)
            node.origin.put("b", "k", body)
            await until(lambda: node.workers[0].carrier.caching)
            assert await node.read("b", "k") == body
        finally:
            silent.close()


def _welcome_and_nothing_else(writer: asyncio.StreamWriter) -> None:
    writer.write(ipc.frame(ipc.Welcome(True, "")))


async def test_a_daemon_that_speaks_nonsense_is_left(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, daemon=False) as node:
        garbled = await asyncio.start_unix_server(
            lambda reader, writer: writer.write(b"\xff\xff\xff\xff" * 4), Path(node.config.cache.dir) / ipc.SOCKET_NAME
        )
        try:
            node.origin.put("b", "k", b"body")
            assert await node.read("b", "k") == b"body"
        finally:
            garbled.close()


async def test_a_leader_that_dies_is_followed_by_one_of_its_followers(node: CacheNode) -> None:
    body = os.urandom(BLOCK)
    node.origin.put("b", "k", body)
    hold = node.origin.hold(times=1, at="body", body_bytes=20 * KIB)
    leading = asyncio.ensure_future(node.read("b", "k", worker=0))
    await hold.reached()
    following = [asyncio.ensure_future(node.read("b", "k", worker=1)) for _ in range(3)]
    await until(lambda: node.daemon is not None and node.daemon._leases.followers == 1)
    dying = node.workers[0]
    connection = dying.carrier._link._connection
    assert connection is not None
    dying.carrier._link._closed = True
    connection.abort("as if killed")
    assert set(await asyncio.gather(*following)) == {body}
    hold.release()
    assert await leading == body
    await node.settled()
    assert node.fast("b", "k", worker=1) == body
    assert len(node.origin.requests) == 2


LEADER = """
import asyncio, sys
sys.path.insert(0, {root!r})
import msgspec
from pathlib import Path
from kos.clock import Clock
from kos.config import Config
from kos.origin.credentials import from_config
from kos.origin.lane import OriginLane
from kos.rules import Rules
from kos.tasks import Tasks
from koscache.carrier import Carrier, Want
from koscache.reader import Reader

async def main():
    config = msgspec.json.decode({config!r}, type=Config)
    clock, tasks = Clock(), Tasks("worker")
    lane = OriginLane(config.origin, from_config(config.origin, clock), clock)
    await lane.start()
    carrier = Carrier(config, Reader(config.cache.dir), lane, Rules(config.rules), clock, tasks)
    await carrier.start()
    while not carrier.caching:
        await asyncio.sleep(0.01)
    opened = await carrier.open("b", "k", Want())
    body = carrier.body(opened, 0, opened.record.size)
    await anext(body)
    print("leading", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_leader_in_another_process_is_killed_and_a_follower_takes_over(node: CacheNode) -> None:
    body = os.urandom(BLOCK)
    node.origin.put("b", "k", body)
    hold = node.origin.hold(times=1, at="body", body_bytes=40 * KIB)
    root = str(Path(__file__).parents[2])
    script = LEADER.format(root=root, config=msgspec.json.encode(node.config).decode())
    leader = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    try:
        assert leader.stdout is not None
        assert await leader.stdout.readline() == b"leading\n"
        following = [asyncio.ensure_future(node.read("b", "k", worker=each)) for each in (0, 1)]
        await until(lambda: node.daemon is not None and node.daemon._leases.followers == 2)
    finally:
        leader.send_signal(signal.SIGKILL)
        await leader.wait()
    hold.release()
    assert await asyncio.gather(*following) == [body, body]
    assert len(node.origin.requests) == 2
    await node.settled()
    assert node.fast("b", "k") == body


async def test_a_worker_that_dies_in_the_middle_of_a_write_leaves_the_key_fenced(node: CacheNode) -> None:
    node.origin.put("b", "k", b"old")
    await node.read("b", "k")
    await node.settled()
    fence = node.workers[1].reader.fence
    slot = fence.slot("b", "k")
    link = node.workers[0].carrier._link
    link.tell(ipc.WriteBegin(1, [slot]))
    await until(lambda: node.daemon is not None and any(each.writes for each in node.daemon._sessions.values()))
    before = fence.value(slot)
    assert link._connection is not None
    link._connection.abort("as if killed")
    await until(lambda: fence.value(slot) != before)


async def test_a_daemon_that_comes_back_hears_of_the_writes_under_way(node: CacheNode) -> None:
    dying, other = node.workers

    def told() -> int:
        return 0 if node.daemon is None else sum(len(each.writes) for each in node.daemon._sessions.values())

    async with dying.carrier.writing("b", ["d/k"]):
        await until(lambda: told() == 1)
        await node.stop_daemon()
        await until(lambda: not dying.carrier.caching)
        async with dying.carrier.writing("b", ["d/l"]):
            await node.start_daemon()
            await until(lambda: told() == 2, what="both writes, one of which began without a daemon")
        await until(lambda: told() == 1)
        fence = other.reader.fence
        before = fence.value_of("b", "d/k"), fence.listing_values("b", "d/")[1]
        assert dying.carrier._link._connection is not None
        dying.carrier._link._connection.abort("as if killed")
        await until(
            lambda: fence.value_of("b", "d/k") != before[0] and fence.listing_values("b", "d/")[1] != before[1],
            what="the object and the listing are fenced",
        )
        await until(lambda: dying.carrier.caching)
    await until(lambda: told() == 0)


async def test_evicted_segments_are_closed_by_all_workers_and_only_then_free(tmp_path: Path) -> None:
    options: dict[str, Any] = {"size_bytes": 18 * MIB, "segment_bytes": 512 * KIB, "index_bytes": 4 * MIB}
    async with CacheNode(tmp_path, workers=2, **options) as node:
        bodies = {f"k{each}": os.urandom(4 * BLOCK) for each in range(40)}
        for key, body in bodies.items():
            node.origin.put("b", key, body)
        opened = None
        for at, (key, body) in enumerate(bodies.items()):
            assert await node.read("b", key, worker=at % 2) == body
            await node.settled()
            if at == 0:
                record = node.workers[0].carrier.peek("b", key).record
                assert record is not None
                opened = node.workers[0].carrier.cached(record, "b", key, 0, record.size)
        assert opened is not None
        held = opened[0].segment
        assert os.pread(opened[0].fd, opened[0].length, opened[0].offset) == bodies["k0"][: opened[0].length]
        assert node.daemon is not None
        daemon = node.daemon
        await until(lambda: set(daemon._closing_segments) <= {held})
        node.workers[0].carrier.give_back(opened)
        await until(lambda: not daemon._closing_segments)
        used = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())
        assert used <= 18 * MIB


async def test_holds_of_a_worker_that_dies_are_released(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, workers=2) as node:
        assert node.daemon is not None
        daemon = node.daemon
        daemon._closing_segments[77] = set(daemon._sessions)
        await node.stop_worker(node.workers[0])
        await until(lambda: len(daemon._sessions) == 1)
        assert daemon._closing_segments[77] == set(daemon._sessions)
        await node.stop_worker(node.workers[0])
        await until(lambda: 77 not in daemon._closing_segments)


class _Failing:
    """A store whose commits fail while `broken`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def _check(self) -> None:
        if self.broken:
            raise StoreFailed("no space left on device")

    def commit(self, commits: list[Commit]) -> list[bool]:
        self._check()
        return self._store.commit(commits)

    def reserve(self, content: bytes, number: int, length: int) -> Extent | Refused:
        self._check()
        return self._store.reserve(content, number, length)

    def probe(self) -> None:
        self._check()
        self._store.probe()


async def test_a_failing_store_turns_caching_off_serving_goes_on_and_it_comes_back(tmp_path: Path) -> None:
    stores: list[_Failing] = []

    def open_store(config: Config, clock: Clock) -> Any:
        stores.append(_Failing(Store.open(config.cache, clock)))
        return stores[-1]

    async with CacheNode(tmp_path, workers=2, open_store=open_store) as node:
        body = os.urandom(2 * BLOCK)
        for key in ("k1", "k2", "k3"):
            node.origin.put("b", key, body)
        assert await node.read("b", "k1") == body
        await node.settled()
        stores[-1].broken = True
        assert await node.read("b", "k2") == body
        await until(lambda: not any(worker.carrier.caching for worker in node.workers))
        assert node.workers[0].carrier.reason == "no space left on device"
        assert node.daemon is not None
        assert node.daemon.reason == "no space left on device"
        assert node.fast("b", "k1") == body
        opened, got = await node.get("b", "k3", worker=1)
        assert (got, opened.phase, opened.reason) == (body, Phase.BYPASS, Reason.CACHING_OFF)
        for store in stores:
            store.broken = False
        await until(lambda: all(worker.carrier.caching for worker in node.workers))
        assert await node.read("b", "k3") == body
        await node.settled()
        assert node.fast("b", "k3", worker=1) == body


async def test_a_worker_that_cannot_write_reads_on_past_the_failure(
    node: CacheNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = os.urandom(3 * BLOCK)
    node.origin.put("b", "k", body)
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("koscache.carrier.sink._hash_and_write", fail)
        assert await node.read("b", "k") == body
    await until(lambda: node.daemon is not None and not node.daemon.caching)
    assert node.daemon is not None
    assert "No space left" in node.daemon.reason


async def test_a_stalled_leader_loses_its_lease(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, workers=2, lease_timeout_s=0.3) as node:
        body = os.urandom(BLOCK)
        node.origin.put("b", "k", body)
        hold = node.origin.hold(times=1, at="body", body_bytes=20 * KIB)
        leading = asyncio.ensure_future(node.read("b", "k", worker=0))
        await hold.reached()
        assert await node.read("b", "k", worker=1) == body
        hold.release()
        assert await leading == body
        assert len(node.origin.requests) == 2


async def test_an_unverified_block_is_checked_before_its_first_use(node: CacheNode) -> None:
    body = os.urandom(2 * BLOCK)
    node.origin.put("b", "k", body)
    await node.read("b", "k")
    await node.settled()
    record = node.workers[0].carrier.peek("b", "k").record
    assert record is not None
    worker = node.workers[1]
    located = worker.reader.locate(record.content, 0)
    assert located is not None
    path = worker.reader.segment_path(located.segment)
    with open(path, "r+b") as file:
        file.seek(located.offset + 100)
        file.write(b"garbage")
    assert not await worker.carrier._blocks.verify(record, 0)
    assert await worker.carrier._blocks.verify(record, 1)
    assert worker.reader.locate(record.content, 0) is None, "what is wrong is dropped"
    assert await node.read("b", "k", worker=1) == body
    await node.settled()
    assert node.fast("b", "k") == body


async def test_a_store_recovered_after_a_crash_serves_what_is_right_and_refills_the_rest(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, workers=1) as node:
        bodies = {f"k{each}": os.urandom(3 * BLOCK) for each in range(4)}
        for key, body in bodies.items():
            node.origin.put("b", key, body)
            await node.read("b", key)
        await node.settled()
        await node.stop_daemon()
        for path in Path(node.config.cache.dir).glob("index*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        await node.start_daemon()
        await until(lambda: node.workers[0].carrier.caching)
        node.origin.forget()
        for key, body in bodies.items():
            assert await node.read("b", key) == body
        statuses = [each.status for each in node.origin.requests]
        assert statuses.count(304) == 4, "a rebuilt record is revalidated, its blocks are kept"
        # Whatever may have been written meanwhile: the headers are asked for anew as well.
        assert statuses.count(200) == 4 and len(statuses) == 8
