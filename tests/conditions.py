"""Waiting for something that happens by itself: a condition and a deadline, never a fixed sleep."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def until(condition: Callable[[], Any | Awaitable[Any]], timeout_s: float = 20.0, what: str = "") -> Any:
    """Wait until condition() is true, and return what it gave; fail loudly at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        held = condition()
        if inspect.isawaitable(held):
            held = await held
        if held:
            return held
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what or inspect.getsource(condition).strip()}")
        await asyncio.sleep(0.001)


def eventually(condition: Callable[[], object], what: str = "", timeout_s: float = 60.0) -> None:
    """As until, for tests without a loop: what another process or thread does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what or inspect.getsource(condition).strip()}")
        time.sleep(0.01)
