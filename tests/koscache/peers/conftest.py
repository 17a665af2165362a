"""Peers' tests run on both loops: uvloop, as workers do, and asyncio's own, which watches descriptors differently."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import psutil
import pytest
import uvloop

from tests.conditions import until


def pytest_asyncio_loop_factories(config: Any, item: Any) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture(autouse=True)
async def no_descriptor_is_left_open() -> AsyncIterator[None]:
    """Whatever a test did, it leaves as many descriptors as it found."""
    here = psutil.Process(os.getpid())
    with contextlib.closing(await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)):
        pass  # what the loop opens for itself when it first listens
    before = here.num_fds()
    yield
    await until(lambda: here.num_fds() <= before)
