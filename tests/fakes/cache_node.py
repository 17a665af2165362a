"""A node without its HTTP edge: a fake origin, a real daemon over a real store, and carriers, all on one loop.

    async with CacheNode(tmp_path, workers=2, block_bytes=64 * KIB) as node:
        node.origin.put("b", "k", body)
        got = await node.read("b", "k")             # through worker 0; node.read(..., worker=1)
Each carrier has a reader, tasks and a connection of its own, as in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kos.clock import Clock
from kos.config import Cache, Config, Credential, Origin, Rule
from kos.origin.credentials import from_config
from kos.origin.lane import OriginLane
from kos.rules import Rules
from kos.s3 import ranges
from kos.tasks import Tasks
from koscache.carrier import BytesPiece, Carrier, FilePiece, Opened, Piece, Want
from koscache.daemon import Daemon
from koscache.keeper import Storing
from koscache.reader import Reader
from koscache.store import Store
from tests.conditions import until
from tests.fakes.origin import FakeOrigin

KIB = 1024
MIB = 1024 * KIB


def settings(directory: Path, endpoint: str, *, rules: tuple[Rule, ...] = (), **cache: Any) -> Config:
    """A small node's configuration; origin options are given with the prefix `origin_`."""
    origin = {name.removeprefix("origin_"): cache.pop(name) for name in list(cache) if name.startswith("origin_")}
    options: dict[str, Any] = {
        "dir": str(directory),
        "size_bytes": 64 * MIB,
        "block_bytes": 64 * KIB,
        "segment_bytes": 1 * MIB,
        "index_bytes": 8 * MIB,
        "min_free_bytes": 0,
        "small_bytes": 4 * KIB,
        "random_read_bytes": 8 * KIB,
        "fill_ahead_bytes": 256 * KIB,
        "fills_max_bytes": 16 * MIB,
        "fill_buffer_bytes": 16 * KIB,
        "scrub_bytes_per_s": 0,
    } | cache
    return Config(
        region="test",
        origin=Origin(
            endpoint=endpoint, access_key="AK", secret_key="SK", **({"retries": 2, "retry_base_s": 0.001} | origin)
        ),
        cache=Cache(**options),
        credentials=(Credential(access_key="AK", secret_key="SK"),),
        rules=rules,
    )


@dataclass(slots=True)
class Worker:
    carrier: Carrier
    reader: Reader
    origin: OriginLane
    tasks: Tasks


class CacheNode:
    def __init__(
        self,
        directory: Path,
        *,
        workers: int = 1,
        rules: tuple[Rule, ...] = (),
        clock: Clock | None = None,
        daemon: bool = True,
        open_store: Callable[[Config, Clock], Storing] | None = None,
        **options: Any,
    ) -> None:
        self._directory = directory / "cache"
        self._options = options
        self._rules = rules
        self._count = workers
        self._with_daemon = daemon
        self._open_store = open_store or (lambda config, clock: Store.open(config.cache, clock))
        self.clock = clock or Clock()
        self.origin = FakeOrigin()
        self.workers: list[Worker] = []
        self.daemon: Daemon | None = None
        self._daemon_tasks: Tasks | None = None

    async def __aenter__(self) -> CacheNode:
        await self.origin.start()
        self.origin.create_bucket("b")
        self.config = settings(self._directory, self.origin.endpoint, rules=self._rules, **self._options)
        if self._with_daemon:
            await self.start_daemon()
        for _ in range(self._count):
            await self.add_worker()
        return self

    async def __aexit__(self, *_: object) -> None:
        for worker in list(self.workers):
            await self.stop_worker(worker)
        await self.stop_daemon()
        await self.origin.stop()

    async def start_daemon(self) -> None:
        self._daemon_tasks = Tasks("daemon")
        config, clock = self.config, self.clock
        self.daemon = Daemon(config, lambda: self._open_store(config, clock), clock, self._daemon_tasks)
        await self.daemon.start()

    async def stop_daemon(self) -> None:
        daemon, self.daemon = self.daemon, None
        if daemon is not None:
            await daemon.close()

    async def add_worker(self) -> Worker:
        tasks = Tasks("worker")
        lane = OriginLane(self.config.origin, from_config(self.config.origin, self.clock), self.clock)
        await lane.start()
        reader = Reader(self.config.cache.dir)
        carrier = Carrier(self.config, reader, lane, Rules(self.config.rules), self.clock, tasks)
        await carrier.start()
        worker = Worker(carrier, reader, lane, tasks)
        self.workers.append(worker)
        if self.daemon is not None:
            await until(lambda: carrier.stats().reason != "daemon away")
        return worker

    async def stop_worker(self, worker: Worker) -> None:
        self.workers.remove(worker)
        await worker.tasks.close()
        await worker.carrier.close()
        await worker.origin.close()
        worker.reader.close()
        worker.reader.fence.close()

    async def open(self, bucket: str, key: str, want: Want | None = None, *, worker: int = 0) -> Opened:
        return await self.workers[worker].carrier.open(bucket, key, want or Want())

    async def read(
        self, bucket: str, key: str, header: str | None = None, *, worker: int = 0, want: Want | None = None
    ) -> bytes:
        """As a GET does, through the slow way; header: Range."""
        return (await self.get(bucket, key, header, worker=worker, want=want))[1]

    async def get(
        self, bucket: str, key: str, header: str | None = None, *, worker: int = 0, want: Want | None = None
    ) -> tuple[Opened, bytes]:
        carrier = self.workers[worker].carrier
        want = want or Want(range=ranges.parse(header))
        opened = await carrier.open(bucket, key, want)
        try:
            start, stop = 0, opened.record.size
            if want.range is not None:
                start, stop = ranges.resolve(want.range, opened.record.size)
            body = carrier.body(opened, start, stop)
            try:
                got = b"".join([take(piece) async for piece in body])
            finally:
                await body.aclose()
            opened.origin_requests += body.origin_requests
            return opened, got
        finally:
            opened.close()

    def fast(self, bucket: str, key: str, *, worker: int = 0) -> bytes | None:
        """As the fast lane does; None when it has to give up."""
        carrier = self.workers[worker].carrier
        record = carrier.peek(bucket, key).record
        if record is None:
            return None
        pieces = carrier.cached(record, bucket, key, 0, record.size)
        if pieces is None:
            return None
        got = b"".join(take(piece) for piece in pieces)
        carrier.give_back(pieces)
        return got

    async def settled(self) -> None:
        """No fill and no open is on its way in any worker."""
        await until(
            lambda: all(
                (stats := worker.carrier.stats()).fills == stats.flights == 0 and stats.asking == 0
                for worker in self.workers
            )
        )


def take(piece: Piece) -> bytes:
    if isinstance(piece, BytesPiece):
        return piece.data
    assert isinstance(piece, FilePiece)
    got = os.pread(piece.fd, piece.length, piece.offset)
    assert len(got) == piece.length, "a piece is bytes that are in the file"
    return got


class ShiftedClock(Clock):
    """The real one, whose wall clock a test may move ahead: records expire without anybody waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s
