"""The databases that the control store is written for; each test gets an empty one of each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from kos.config import Control
from kos.control import migrations
from kos.control.database import Database
from kos.control.members import Members
from tests.fakes.postgres import Postgres, postgres

__all__ = ["control", "databases", "postgres", "stores"]

#: Longer than by default: the machine that runs tests may be busy, and none of these waits for it to pass.
TIMEOUT_S = 20.0


@pytest.fixture(params=["sqlite", "postgresql"])
async def control(request: pytest.FixtureRequest, tmp_path: Path) -> Control:
    """An empty database."""
    if request.param == "sqlite":
        return Control(url=f"sqlite:///{tmp_path}/made/for it/control.db", timeout_s=TIMEOUT_S)
    server: Postgres = request.getfixturevalue("postgres")
    return Control(url=server.url(await server.new_database()), timeout_s=TIMEOUT_S)


@pytest.fixture
async def databases(control: Control) -> AsyncIterator[Callable[[], Database]]:
    """Opens the database anew, as each node does."""
    async with AsyncExitStack() as opened:

        def open_one() -> Database:
            database = Database(control)
            opened.push_async_callback(database.close)
            return database

        yield open_one


@pytest.fixture
async def stores(databases: Callable[[], Database]) -> tuple[Members, Members]:
    """Of two nodes at one database."""
    one, other = databases(), databases()
    await migrations.upgrade(one)
    return Members(one), Members(other)
