"""The daemon as a process and as a peer: ready, second daemon, SIGTERM, kill -9, batches, full queues."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kos import config as options
from kos.config import Cluster, Config, Listen
from kos.errors import ConfigError
from kos.tasks import Tasks
from koscache import ipc
from koscache.cluster.view import MemberState
from koscache.content import Record, Small, body_checksum
from koscache.daemon import Daemon
from koscache.disk import StoreFailed
from koscache.fence import Fence
from koscache.keeper import Keeper
from koscache.leases import Here
from koscache.store import Store
from tests.conditions import until
from tests.fakes.cache_node import KIB, CacheNode, settings
from tests.fakes.clock import FakeClock
from tests.fakes.ports import free_ports

CONFIG = """
region: test
listen: {{s3: "127.0.0.1:0", admin: "127.0.0.1:0", peer: "127.0.0.1:0"}}
origin: {{endpoint: "http://127.0.0.1:9", access_key: AK, secret_key: SK}}
cache: {{dir: "{directory}", size: 64MiB, block_size: 64KiB, segment_size: 1MiB, index_size: 8MiB, min_free: 0B}}
credentials: [{{access_key: AK, secret_key: SK}}]
control: {{url: "sqlite:///{directory}/control.db"}}
"""


class Process:
    """One daemon process; status: what it tells its supervisor."""

    def __init__(self, config: Path) -> None:
        read_fd, write_fd = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "koscache.daemon_main", "--config", str(config)],
            env={**os.environ, "KOS_STATUS_FD": str(write_fd)},
            pass_fds=[write_fd],
            cwd=Path(__file__).parents[2],
        )
        os.close(write_fd)
        self.status = os.fdopen(read_fd)

    def told(self) -> dict[str, Any]:
        line = self.status.readline()
        return json.loads(line) if line else {"state": "gone"}

    def until(self, state: str) -> dict[str, Any]:
        while (told := self.told())["state"] not in (state, "gone"):
            continue
        return told

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.status.close()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "kos.yaml"
    path.write_text(CONFIG.format(directory=tmp_path / "cache"))
    return path


@pytest.fixture
def running(config: Path) -> Iterator[Process]:
    process = Process(config)
    yield process
    process.end()


def test_it_says_ready_and_exits_cleanly(running: Process, tmp_path: Path) -> None:
    assert running.until("ready")["caching"] == "on"
    assert (tmp_path / "cache" / ipc.SOCKET_NAME).exists()
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0


def test_a_second_daemon_of_one_directory_is_refused(running: Process, config: Path) -> None:
    running.until("ready")
    second = Process(config)
    try:
        assert second.process.wait(20) == 78
        assert "another daemon" in second.until("failed")["reason"]
    finally:
        second.end()
    assert running.process.poll() is None


def test_after_kill_9_it_is_back(running: Process, config: Path) -> None:
    running.until("ready")
    running.process.kill()
    running.process.wait()
    again = Process(config)
    try:
        assert again.until("ready")["caching"] == "on"
    finally:
        again.end()


async def test_a_directory_that_cannot_be_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    node = CacheNode(tmp_path, workers=0)
    await node.origin.start()
    node.config = settings(tmp_path / "cache", node.origin.endpoint)
    with pytest.raises(ConfigError):
        await node.start_daemon()
    await node.stop_daemon()
    await node.origin.stop()


async def test_junk_from_a_worker_ends_that_worker_only(tmp_path: Path) -> None:
    async with CacheNode(tmp_path, workers=1) as node:
        reader, writer = await asyncio.open_unix_connection(Path(node.config.cache.dir) / ipc.SOCKET_NAME)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await reader.read() == b""
        writer.close()
        node.origin.put("b", "k", b"x" * 70 * KIB)
        assert await node.read("b", "k") == b"x" * 70 * KIB
        await node.settled()
        assert node.fast("b", "k") is not None


async def test_no_descriptor_and_no_task_is_left(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    tasks_before = asyncio.all_tasks()
    async with CacheNode(tmp_path, workers=2) as node:
        for each in range(5):
            node.origin.put("b", f"k{each}", os.urandom(100 * KIB))
            await node.read("b", f"k{each}", worker=each % 2)
        await node.settled()
    await until(lambda: asyncio.all_tasks() == tasks_before)
    await until(lambda: set(os.listdir("/proc/self/fd")) <= before | {str(_listing())})


def _listing() -> int:
    """The descriptor that listing the directory itself takes."""
    fd = os.open("/proc/self/fd", os.O_RDONLY)
    os.close(fd)
    return fd


# --- the store's thread -----------------------------------------------------------------------------------------------


class Recording:
    """A store that writes down what it is asked, and fails on demand."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fail = False
        self.gone: list[int] = []

    def put_small(self, smalls: list[Small]) -> list[bool]:
        self.calls.append(("small", [small.number for small in smalls]))
        if self.fail:
            raise StoreFailed("no")
        return [True] * len(smalls)

    def put_record(self, bucket: str, key: str, record: Record) -> bool:
        self.calls.append(("record", key))
        return True

    def locate(self, content: bytes, number: int) -> Any:
        return None

    def evict(self, need_bytes: int = 0) -> list[int]:
        gone, self.gone = self.gone, []
        return gone

    def close(self) -> None:
        self.calls.append(("close", None))


RECORD = Record('"e"', 5, "", (), (), False, b"c" * 16, 1.5, 7)


def small(number: int) -> Small:
    return Small(b"c" * 16, number, b"body", body_checksum(b"body"), "b", "k", None)


async def keeper_of(store: Recording, **options: Any) -> tuple[Keeper, Tasks, list[Any]]:
    tasks, told = Tasks("test"), []
    keeper = Keeper(
        lambda: store,  # type: ignore[arg-type, return-value]
        tasks,
        queue_bytes=options.get("queue_bytes", 1 << 20),
        evicted=lambda segments: told.append(("evicted", segments)),
        failed=lambda failure: told.append(("failed", failure.reason)),
        drained=lambda: told.append("drained"),
    )
    await keeper.open()
    return keeper, tasks, told


async def test_commits_that_come_together_share_a_transaction_in_order() -> None:
    store = Recording()
    keeper, tasks, _ = await keeper_of(store)
    answers: list[Any] = []
    for number in range(3):
        keeper.put_small(small(number), answers.append)
    keeper.put_record("b", "k", RECORD, answers.append)
    keeper.put_small(small(3), answers.append)
    keeper.start()
    await until(lambda: len(answers) == 5)
    assert store.calls == [("small", [0, 1, 2]), ("record", "k"), ("small", [3])]
    await tasks.close()
    await keeper.close()


async def test_a_failing_store_answers_everyone_and_is_told_once_a_batch() -> None:
    store = Recording()
    store.fail = True
    keeper, tasks, told = await keeper_of(store)
    answers: list[Any] = []
    for number in range(3):
        keeper.put_small(small(number), answers.append)
    keeper.start()
    await until(lambda: len(answers) == 3)
    assert all(isinstance(each, StoreFailed) for each in answers)
    assert told == [("failed", "no")]
    await tasks.close()
    await keeper.close()


async def test_what_is_queued_is_carried_out_before_the_store_closes() -> None:
    store = Recording()
    keeper, _, _ = await keeper_of(store)
    answers: list[Any] = []
    keeper.put_small(small(1), answers.append)
    await keeper.close()
    assert answers == [True]
    assert store.calls == [("small", [1]), ("close", None)]


async def test_a_full_queue_is_said_and_so_is_its_end() -> None:
    store = Recording()
    store.gone = [7]
    keeper, tasks, told = await keeper_of(store, queue_bytes=2000)
    for number in range(10):
        keeper.put_small(small(number), lambda _: None)
    assert keeper.full
    keeper.start()
    await until(lambda: "drained" in told)
    assert not keeper.full
    assert ("evicted", [7]) in told
    await tasks.close()
    await keeper.close()


async def test_a_small_block_needs_no_extent() -> None:
    keeper, tasks, _ = await keeper_of(Recording())
    answers: list[Any] = []
    keeper.reserve(b"c" * 16, 0, 5, True, answers.append)
    keeper.start()
    await until(lambda: len(answers) == 1)
    assert answers == [None]
    assert not isinstance(answers[0], Here)
    await tasks.close()
    await keeper.close()


# --- writes, and a cluster ----------------------------------------------------------------------------------------------

SLOT, OTHER = 5, 6
REQUEST_TIMEOUT_S = 100.0


class Worker:
    """A worker as the daemon sees it, by hand. heard: what it was told, in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unframer = ipc.Unframer(ipc.ToWorker, 1 << 24)
        self.heard: list[Any] = []
        self._asks = 0

    @classmethod
    async def connect(cls, config: Config) -> Worker:
        with ipc.socket_address(config.cache.dir) as path:
            worker = cls(*await asyncio.open_unix_connection(path))
        worker.say(ipc.Hello(os.getpid()))
        await worker.hear(ipc.Welcome)
        return worker

    def say(self, *messages: ipc.Message) -> None:
        self._writer.write(b"".join(map(ipc.frame, messages)))

    async def hear(self, kind: type, count: int = 1) -> Any:
        """Waits until there are so many of these; the last."""
        while len(found := [message for message in self.heard if isinstance(message, kind)]) < count:
            received = await self._reader.read(65536)
            assert received, "the daemon is gone"
            self.heard += self._unframer.feed(received)
        return found[-1]

    async def in_order(self) -> None:
        """All that was said has been heard."""
        self._asks += 1
        self.say(ipc.Ping(self._asks))
        while ipc.Done(self._asks, True) not in self.heard:
            self.heard += self._unframer.feed(await self._reader.read(65536))

    async def ask_end(self, *tokens: int) -> bool:
        self._asks += 1
        ask = self._asks
        self.say(ipc.AskEnd(ask, list(tokens)))
        while True:
            for message in self.heard:
                if isinstance(message, ipc.Done) and message.ask == ask:
                    return message.ok
            received = await self._reader.read(65536)
            assert received, "the daemon is gone"
            self.heard += self._unframer.feed(received)

    def die(self) -> None:
        self._writer.transport.abort()


class Member:
    """One daemon of a static cluster, and its fence as workers see it."""

    def __init__(self, config: Config, clock: FakeClock) -> None:
        self.config = config
        self.daemon = Daemon(config, lambda: Store.open(config.cache, clock), clock, Tasks("daemon"))
        self._fence: Fence | None = None
        self._running = True

    @property
    def fence(self) -> Fence:
        if self._fence is None:
            self._fence = Fence.open(self.config.cache.dir, alone=False)
        return self._fence

    async def stop(self) -> None:
        """Once."""
        if self._running:
            self._running = False
            await self.daemon.close()
        if self._fence is not None:
            self._fence.close()
            self._fence = None

    @property
    def writes(self) -> int:
        """That its hub has not been told the end of, or is still waiting to have heard of."""
        hub = self.daemon._hub
        assert hub is not None
        return len(hub.writes._writes)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr("koscache.fence.boot_ns", lambda: int(clock.monotonic() * 1e9))
    monkeypatch.setattr("koscache.cluster.hub.boot_ns", lambda: int(clock.monotonic() * 1e9))
    return clock


@pytest.fixture
async def members(tmp_path: Path, clock: FakeClock) -> AsyncIterator[Callable[..., Any]]:
    """members("w", "a"): daemons of a cluster that trust each other; members(): one that is in none."""
    made: list[Member] = []

    async def make(*names: str) -> list[Member]:
        addresses = {name: f"127.0.0.1:{port}" for name, port in zip(names, free_ports(len(names)), strict=True)}
        listed = tuple(options.Member(name=name, peer="127.0.0.1:9", cluster=at) for name, at in addresses.items())
        for name in names or ("alone",):
            config = settings(tmp_path / name, "http://127.0.0.1:9", origin_request_timeout_s=REQUEST_TIMEOUT_S)
            if names:
                config = msgspec.structs.replace(
                    config,
                    cluster=Cluster(membership="static", name=name, secret="s" * 16, lease_s=2.0),
                    listen=Listen(peer="127.0.0.1:9", cluster=addresses[name]),
                    members=listed,
                )
            made.append(Member(config, clock))
            await made[-1].daemon.start()

        async def trusting() -> bool:
            await clock.advance(0.1)
            return all(member.fence.trusted() for member in made)

        if names:
            await until(trusting)
        return made

    yield make
    for member in made:
        await member.stop()


async def test_outside_a_cluster_no_end_is_waited_for(members: Callable[..., Any]) -> None:
    (alone,) = await members()
    worker = await Worker.connect(alone.config)
    worker.say(ipc.WriteBegin(1, [SLOT]))
    assert not await worker.ask_end(1)
    worker.say(ipc.AskCluster(7, "status", b""))
    assert await worker.hear(ipc.ClusterSaid) == ipc.ClusterSaid(7, b"", "this node is in no cluster")
    assert not [message for message in worker.heard if isinstance(message, ipc.ClusterView)]
    worker.die()


async def test_a_worker_is_told_of_the_members_at_once_and_when_they_change(members: Callable[..., Any]) -> None:
    (w,) = await members("w")
    worker = await Worker.connect(w.config)
    view = await worker.hear(ipc.ClusterView)
    assert view.name == "w"
    assert [(member.name, member.state) for member in view.view.members] == [("w", MemberState.ACTIVE)]
    assert [type(message) for message in worker.heard] == [ipc.Welcome, ipc.ClusterView]
    await w.daemon._hub.set_state(MemberState.DRAINING)
    assert (await worker.hear(ipc.ClusterView, 2)).view.members[0].state is MemberState.DRAINING
    worker.die()


async def test_the_end_of_a_write_is_answered_when_every_node_has_heard_of_it(members: Callable[..., Any]) -> None:
    w, a = await members("w", "a")
    worker = await Worker.connect(w.config)
    before = a.fence.value(SLOT)
    worker.say(ipc.WriteBegin(1, [SLOT]))
    await until(lambda: not a.fence.vouching(SLOT))
    begun = a.fence.value(SLOT)
    assert begun != before
    assert await worker.ask_end(1)
    assert a.fence.value(SLOT) != begun
    assert a.fence.vouching(SLOT)
    assert not await worker.ask_end(1)  # a write ends once
    assert w.writes == 0
    worker.die()


async def test_the_end_of_several_is_answered_when_all_are_heard_of(members: Callable[..., Any]) -> None:
    w, a = await members("w", "a")
    worker = await Worker.connect(w.config)
    for token in range(1, 21):
        worker.say(ipc.WriteBegin(token, [100 + token, 200 + token]))
    await until(lambda: not a.fence.vouching(220))
    before = [a.fence.value(slot) for token in range(1, 21) for slot in (100 + token, 200 + token)]
    assert await worker.ask_end(*range(1, 21))
    after = [a.fence.value(slot) for token in range(1, 21) for slot in (100 + token, 200 + token)]
    assert not any(one == other for one, other in zip(before, after, strict=True))
    assert w.writes == 0
    worker.die()


@pytest.mark.parametrize("outcomes", [(True, True), (True, False), (False, True)])
async def test_it_is_answered_once_and_by_all_outcomes_together(
    members: Callable[..., Any], outcomes: tuple[bool, bool]
) -> None:
    (w,) = await members("w")
    endings: list[asyncio.Future[bool]] = []

    def end(handle: int) -> asyncio.Future[bool]:
        endings.append(asyncio.get_running_loop().create_future())
        return endings[-1]

    w.daemon._hub.writes.end = end
    worker = await Worker.connect(w.config)
    worker.say(ipc.WriteBegin(1, [SLOT]), ipc.WriteBegin(2, [OTHER]), ipc.AskEnd(77, [1, 2]))
    await worker.in_order()
    assert len(endings) == 2
    endings[1].set_result(outcomes[1])
    await worker.in_order()
    assert ipc.Done(77, True) not in worker.heard
    assert ipc.Done(77, False) not in worker.heard
    endings[0].set_result(outcomes[0])
    await worker.hear(ipc.Done, 3)
    assert [message for message in worker.heard if isinstance(message, ipc.Done) and message.ask == 77] == [
        ipc.Done(77, all(outcomes))
    ]
    worker.die()


@pytest.mark.parametrize("tokens", [(99,), (1, 99), (99, 1), (1, 1), ()])
async def test_what_the_daemon_does_not_know_has_not_been_heard_of(
    members: Callable[..., Any], tokens: tuple[int, ...]
) -> None:
    """It was told to another daemon; what this one does know among it is not kept as if it went on."""
    w, a = await members("w", "a")
    worker = await Worker.connect(w.config)
    worker.say(ipc.WriteBegin(1, [SLOT]))
    await until(lambda: not a.fence.vouching(SLOT))
    assert not await worker.ask_end(*tokens)
    if 1 not in tokens:
        worker.say(ipc.WriteEnd(1))
    await until(lambda: w.writes == 0)
    await until(lambda: a.fence.vouching(SLOT))
    worker.die()


async def test_a_write_whose_end_nobody_asks_for_is_told_all_the_same(members: Callable[..., Any]) -> None:
    w, a = await members("w", "a")
    worker = await Worker.connect(w.config)
    worker.say(ipc.WriteBegin(1, [SLOT]))
    await until(lambda: not a.fence.vouching(SLOT))
    begun = a.fence.value(SLOT)
    worker.say(ipc.WriteEnd(1), ipc.WriteEnd(1), ipc.WriteEnd(77))
    await until(lambda: a.fence.vouching(SLOT))
    assert a.fence.value(SLOT) != begun
    assert w.writes == 0
    worker.die()


async def test_workers_writes_are_told_apart(members: Callable[..., Any]) -> None:
    """Each numbers its own."""
    w, a = await members("w", "a")
    one, other = await Worker.connect(w.config), await Worker.connect(w.config)
    one.say(ipc.WriteBegin(1, [SLOT]))
    other.say(ipc.WriteBegin(1, [OTHER]))
    await until(lambda: not a.fence.vouching(SLOT) and not a.fence.vouching(OTHER))
    assert await one.ask_end(1)
    assert a.fence.vouching(SLOT)
    assert not a.fence.vouching(OTHER)
    assert await other.ask_end(1)
    for worker in (one, other):
        worker.die()


async def test_a_worker_that_dies_leaves_its_writes_to_the_daemon_until_they_must_have_ended(
    members: Callable[..., Any], clock: FakeClock
) -> None:
    """The origin may carry them out as long as a request may take: all that time they are marked elsewhere."""
    w, a = await members("w", "a")
    worker = await Worker.connect(w.config)
    worker.say(ipc.WriteBegin(1, [SLOT]), ipc.WriteBegin(2, [OTHER]))
    await until(lambda: not a.fence.vouching(SLOT) and not a.fence.vouching(OTHER))
    own, others = w.fence.value(SLOT), a.fence.value(SLOT)
    worker.die()
    await until(lambda: w.fence.value(SLOT) != own)
    await until(lambda: w.writes == 1)  # both together, for as long as it takes

    async def renewed(seconds: float) -> None:
        for _ in range(int(seconds / 0.5)):
            await clock.advance(0.5)
            await until(lambda: a.fence.trusted() and w.fence.trusted())

    await renewed(REQUEST_TIMEOUT_S / 4)
    assert not a.fence.vouching(SLOT)
    assert not a.fence.vouching(OTHER)
    own, now = w.fence.value(SLOT), a.fence.value(SLOT)
    assert now != others
    await clock.advance(REQUEST_TIMEOUT_S)
    await until(lambda: w.fence.value(SLOT) != own and w.writes == 0)
    await until(lambda: a.fence.value(SLOT) != now)


async def test_a_worker_that_dies_without_a_write_passes_nothing(members: Callable[..., Any]) -> None:
    w, a = await members("w", "a")
    worker, other = await Worker.connect(w.config), await Worker.connect(w.config)
    worker.say(ipc.WriteBegin(1, [SLOT]))
    assert await worker.ask_end(1)
    before = w.fence.value(SLOT), a.fence.value(SLOT)
    worker.die()
    await until(lambda: len(w.daemon._sessions) == 1)
    await other.in_order()
    assert (w.fence.value(SLOT), a.fence.value(SLOT)) == before
    assert w.writes == 0
    other.die()


async def test_outside_a_cluster_a_worker_that_dies_passes_its_writes_twice(
    members: Callable[..., Any], clock: FakeClock
) -> None:
    (alone,) = await members()
    worker = await Worker.connect(alone.config)
    worker.say(ipc.WriteBegin(1, [SLOT]))
    await worker.in_order()
    before = alone.fence.value(SLOT)
    worker.die()
    await until(lambda: alone.fence.value(SLOT) != before)
    first = alone.fence.value(SLOT)
    await clock.advance(REQUEST_TIMEOUT_S - 1)
    assert alone.fence.value(SLOT) == first
    await clock.advance(2)
    assert alone.fence.value(SLOT) != first


async def test_questions_about_the_cluster_are_answered(members: Callable[..., Any]) -> None:
    (w,) = await members("w")
    worker = await Worker.connect(w.config)
    worker.say(ipc.Counted(10, 7), ipc.AskCluster(3, "status", b"{}"))
    said = await worker.hear(ipc.ClusterSaid)
    assert (said.ask, said.failed) == (3, "")
    assert json.loads(said.body)["name"] == "w"
    worker.die()


async def test_a_daemon_that_stops_answers_nothing_more_and_ceases_to_trust(members: Callable[..., Any]) -> None:
    w, a = await members("w", "a")
    worker = await Worker.connect(w.config)
    worker.say(ipc.WriteBegin(1, [SLOT]))
    await until(lambda: not a.fence.vouching(SLOT))
    fence = Fence.open(w.config.cache.dir, alone=False)
    await w.stop()
    assert not fence.trusted()
    assert a.fence.trusted()
    assert not a.fence.vouching(SLOT)  # what was about to be carried out may still be
    assert (Path(w.config.cache.dir) / "resigned.json").exists()
    fence.close()
    worker.die()
