"""Metrics: cheap counts, and counts that survive the process that made them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter

from kos import metrics
from kos.node.admin import forget_process, metrics_page
from tests.fakes.clock import FakeClock, settle

ROOT = Path(__file__).parents[2]


def counter() -> Counter:
    return Counter("things", "things", ["kind"], registry=CollectorRegistry())


def value(of: Counter, kind: str) -> float:
    return float(of.labels(kind)._value.get())


def test_fast_counts_reach_the_counter_once() -> None:
    things = counter()
    fast = metrics.FastCounts(things)
    fast.add(("a",))
    fast.add(("a",), 2)
    fast.add(("b",), 10)
    assert value(things, "a") == 0
    fast.flush()
    fast.flush()
    assert (value(things, "a"), value(things, "b")) == (3, 10)


async def test_they_are_flushed_every_second_and_at_the_end() -> None:
    things, clock = counter(), FakeClock()
    fast = metrics.FastCounts(things)
    task = asyncio.ensure_future(metrics.flush_forever(clock, counts=[fast]))
    fast.add(("a",))
    await clock.advance(1)
    assert value(things, "a") == 1
    fast.add(("a",))
    await settle()
    task.cancel()
    await asyncio.wait({task})
    assert value(things, "a") == 2


def child(directory: Path, name: str, code: str) -> None:
    env = {**os.environ, metrics.MULTIPROC_DIR: str(directory), metrics.PROCESS: name, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", f"from kos import metrics\n{code}"], env=env, check=True, timeout=60)


def test_processes_add_up_and_a_new_one_goes_on_where_the_last_stopped(tmp_path: Path) -> None:
    count = "metrics.BYTES.labels('hit').inc({})\nmetrics.FILLS_IN_FLIGHT.set(3)"
    child(tmp_path, "worker-0", count.format(5))
    child(tmp_path, "worker-1", count.format(7))
    files = sorted(tmp_path.iterdir())
    page = metrics_page(tmp_path).decode()
    assert 'kos_bytes_total{source="hit"} 12.0' in page
    assert "kos_fills_in_flight 6.0" in page
    child(tmp_path, "daemon", "metrics.CACHING.set(1)")
    assert "kos_caching 1.0" in metrics_page(tmp_path).decode()
    forget_process("daemon", tmp_path)
    assert "\nkos_caching " not in metrics_page(tmp_path).decode()
    forget_process("worker-0", tmp_path)
    child(tmp_path, "worker-0", "metrics.BYTES.labels('hit').inc(100)")
    page = metrics_page(tmp_path).decode()
    assert 'kos_bytes_total{source="hit"} 112.0' in page
    assert "kos_fills_in_flight 3.0" in page
    assert {path for path in tmp_path.iterdir() if "worker" in path.name} == set(files)
    assert page.count("# TYPE kos_workers_restarts_total counter") == 1
