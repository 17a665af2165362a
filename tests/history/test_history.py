"""Randomized histories of concurrent operations under faults, judged by the consistency contract.

A failure prints its seed; KOS_HISTORY_SEED=n repeats that choice of operations, KOS_HISTORY_OPERATIONS their number.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conditions import eventually
from tests.fakes.node import Node, node
from tests.fakes.origin import FakeOrigin
from tests.history.ledger import Ledger
from tests.history.workload import Workload

FRESHNESS_S = {"short": 0.5, "always": 0.0, "immutable": float("inf")}
SETTINGS: dict[str, Any] = {
    # Small blocks and a small store: many blocks an object, and evictions all the time.
    "cache": {
        "size": "24MiB",
        "block_size": "64KiB",
        "segment_size": "1MiB",
        "index_size": "8MiB",
        "small_size": "16KiB",
        "random_read": "8KiB",
        "min_free": "1MiB",
    },
    "origin": {"retries": 2, "retry_base": "20ms", "breaker_open": "200ms", "read_timeout": "5s"},
    # Killed every few seconds, and wanted back at once: the usual back-off would leave the node down most of the time.
    "supervisor": {"restart_base": "50ms", "restart_max": "300ms"},
    "rules": [
        {"match": "short", "freshness": "500ms", "stale_if_error": "0s"},
        {"match": "always", "freshness": "always", "stale_if_error": "0s"},
        {"match": "immutable", "freshness": "immutable", "stale_if_error": "0s"},
        {"match": "*", "freshness": "30s"},
    ],
}


def seed() -> int:
    return int(os.environ.get("KOS_HISTORY_SEED", random.SystemRandom().randrange(10**6)))


async def history(directory: Path, operations: int, *, kills: bool) -> Workload:
    """Run one history with origin faults all along and, with `kills`, kill -9 of workers and of the daemon."""
    origin = FakeOrigin()
    with origin.in_thread():
        ledger = Ledger(FRESHNESS_S)
        ledger.watch(origin.store)
        work = Workload([], origin, ledger, seed())
        work.fill()
        with node(directory, origin.endpoint, SETTINGS) as one:
            work.s3_urls = [one.s3_url]
            ended = asyncio.Event()
            spoiler = asyncio.create_task(_spoil(one, origin, random.Random(f"{work.seed} spoiler"), ended, kills))
            try:
                await work.run(operations)
            finally:
                ended.set()
                await spoiler
            origin.heal()
            assert not work.violations, "\n".join(work.violations[:5]) + f"\n{work.outcomes}"
            await asyncio.to_thread(_nothing_leaked, one, origin)
    print(f"seed {work.seed}: {dict(work.outcomes)}")
    return work


async def _spoil(one: Node, origin: FakeOrigin, rng: random.Random, ended: asyncio.Event, kills: bool) -> None:
    """A fault now and then until the run has ended; the waits set the pace and make nothing come true."""
    while not ended.is_set():
        kind = rng.choices(["cut", "error", "close", "then", "kill"], weights=[4, 4, 2, 2, 3 if kills else 0], k=1)[0]
        if kind == "cut":
            origin.fault(times=rng.randrange(1, 4), method="GET", body_cut=rng.randrange(1, 50_000))
        elif kind == "error":
            origin.fault(times=rng.randrange(1, 6), status=rng.choice([500, 503]), code="SlowDown")
        elif kind == "close":
            origin.fault(times=rng.randrange(1, 3), close=True, reset=rng.random() < 0.5)
        elif kind == "then":
            place = ("short", f"short key/é+{rng.randrange(4)}")
            body = rng.randbytes(150_000)
            origin.fault(times=1, method="GET", key=place[1], then=lambda o, p=place, b=body: o.store.put(*p, b))
        else:
            await asyncio.to_thread(_kill, one, rng)
        try:
            await asyncio.wait_for(ended.wait(), rng.uniform(0.05, 0.4) if kind != "kill" else 2.0)
        except TimeoutError:
            continue


def _kill(one: Node, rng: random.Random) -> None:
    victims = one.worker_pids() if rng.random() < 0.6 else [one.daemon_pid()] if one.daemon_alive() else []
    if victims:
        os.kill(rng.choice(victims), signal.SIGKILL)


def _nothing_leaked(one: Node, origin: FakeOrigin) -> None:
    """Once all clients are gone: no open segment borrowed, no fill, no connection beyond the pools'."""
    eventually(lambda: one.ready().get("ready") is True, "the node is ready again")
    eventually(lambda: _sum_metric(one, "kos_fills_in_flight") == 0, "no fill in flight")
    for pid in one.worker_pids():
        process = psutil.Process(pid)
        eventually(lambda p=process: len(_client_connections(p, one)) == 0, "client connections closed")
        eventually(lambda p=process: p.num_fds() < 200, f"descriptors of {pid} given back")


def _client_connections(process: psutil.Process, one: Node) -> list[Any]:
    connections = process.net_connections(kind="tcp")
    return [c for c in connections if c.status == "ESTABLISHED" and c.laddr.port == one.s3_port]


def _sum_metric(one: Node, name: str) -> float:
    lines = [line for line in one.metrics().splitlines() if line.startswith(name) and not line.startswith("#")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def test_a_short_history_without_kills(tmp_path: Path) -> None:
    await history(tmp_path, 3_000, kills=False)


async def test_a_short_history_with_kills(tmp_path: Path) -> None:
    began = time.monotonic()
    await history(tmp_path, 4_000, kills=True)
    assert time.monotonic() - began < 100


@pytest.mark.slow
@pytest.mark.timeout(2400)
async def test_a_hundred_thousand_operations(tmp_path: Path) -> None:
    operations = int(os.environ.get("KOS_HISTORY_OPERATIONS", "100000"))
    work = await history(tmp_path, operations, kills=True)
    done = sum(work.outcomes[kind] for kind in ("get", "range", "put", "delete", "leave", "behind"))
    assert done >= operations * 0.9, work.outcomes
