"""Every task has a name and an owner: the only place that creates tasks.

Owns: starting tasks, noticing that one failed, cancelling them all within a bounded time.
Does not own: what a failure means; an owner that cares awaits the task it was given.

Invariant: after close() nothing of this owner runs, or the log says what would not stop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from kos import metrics

T = TypeVar("T")

_log: Final = logging.getLogger("kos.tasks")


class TasksClosed(RuntimeError):
    """A task was to be started on an owner that is closed or closing."""


class Tasks:
    """The tasks of one owner, whose name is the first part of theirs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._running: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._running)

    def names(self) -> list[str]:
        """Names of the running tasks, for logs and leak checks."""
        return sorted(task.get_name() for task in self._running)

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a coroutine as the task OWNER.name. Raises TasksClosed after close()."""
        if self._closed:
            coroutine.close()
            raise TasksClosed(f"{self.name}.{name}: its owner is closed")
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self.name}.{name}")
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    async def close(self, timeout_s: float = 10.0) -> bool:
        """Cancel all tasks and wait at most timeout_s for them to end; False if some did not.

        May be called from one of the owner's own tasks, which is left alone: it ends by itself.
        """
        self._closed = True
        current = asyncio.current_task()
        waiting = {task for task in self._running if task is not current}
        for task in waiting:
            task.cancel(f"{self.name} closes")
        if not waiting:
            return True
        _, stuck = await asyncio.wait(waiting, timeout=timeout_s)
        if stuck:
            names = ", ".join(sorted(task.get_name() for task in stuck))
            _log.error("tasks did not stop", extra={"owner": self.name, "tasks": names, "waited_s": timeout_s})
        return not stuck

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            # Told even though an owner may await it as well: most tasks are never awaited, and then this is all.
            metrics.TASK_FAILURES.labels(self.name).inc()
            _log.error("task failed", extra={"task": task.get_name()}, exc_info=error)
