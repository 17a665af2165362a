"""The daemon as a process and as a peer: ready, second daemon, SIGTERM, kill -9, batches, full queues."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kos.errors import ConfigError
from kos.tasks import Tasks
from koscache import ipc
from koscache.content import Record, Small, body_checksum
from koscache.disk import StoreFailed
from koscache.keeper import Keeper
from koscache.leases import Here
from tests.conditions import until
from tests.fakes.cache_node import KIB, CacheNode, settings

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
