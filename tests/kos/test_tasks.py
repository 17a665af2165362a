"""Tasks: named, owned, noticed when they fail, gone after close."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

import pytest

from kos import metrics
from kos.tasks import Tasks, TasksClosed

ROOT = Path(__file__).parents[2]


async def forever() -> None:
    await asyncio.Event().wait()


async def fails() -> None:
    raise RuntimeError("on purpose")


async def test_names_and_results() -> None:
    tasks = Tasks("owner")

    async def answer() -> int:
        return 42

    task = tasks.spawn(answer(), "question")
    assert task.get_name() == "owner.question"
    assert tasks.names() == ["owner.question"]
    assert await task == 42
    assert len(tasks) == 0


async def test_a_failure_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    counter = metrics.TASK_FAILURES.labels("failing")
    before = counter._value.get()
    tasks = Tasks("failing")
    with caplog.at_level(logging.ERROR):
        task = tasks.spawn(fails(), "one")
        await asyncio.wait({task})
    assert counter._value.get() == before + 1
    assert caplog.records[0].__dict__["task"] == "failing.one"


async def test_close_cancels_and_is_final() -> None:
    tasks = Tasks("closing")
    task = tasks.spawn(forever(), "one")
    assert await tasks.close()
    assert task.cancelled()
    assert len(tasks) == 0
    with pytest.raises(TasksClosed):
        tasks.spawn(forever(), "late")


async def test_close_says_what_would_not_stop(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks("stubborn")
    release = asyncio.Event()

    async def will_not() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    task = tasks.spawn(will_not(), "one")
    await asyncio.sleep(0)
    assert not await tasks.close(timeout_s=0.01)
    assert caplog.records[-1].__dict__["tasks"] == "stubborn.one"
    release.set()
    await task


async def test_close_from_within() -> None:
    tasks = Tasks("within")
    other = tasks.spawn(forever(), "other")

    async def closer() -> bool:
        return await tasks.close()

    assert await tasks.spawn(closer(), "closer")
    assert other.cancelled()


def test_nobody_else_creates_tasks() -> None:
    creating = re.compile(r"\bcreate_task\(|\bensure_future\(|\bTaskGroup\(")
    for package in ("kos", "koscache", "kosproxy", "koscli", "mirror"):
        for path in (ROOT / package).rglob("*.py"):
            if path != ROOT / "kos" / "tasks.py":
                assert not creating.search(path.read_text()), f"{path}: tasks are started by kos.tasks.Tasks"
