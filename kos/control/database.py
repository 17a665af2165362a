"""The way to the control store's database: SQLite or PostgreSQL, by the same statements.

Owns: the engine, its few connections, how long anything may take, and turning whatever goes wrong into
ControlUnavailable. Does not own: tables, statements and what they mean.

Invariant: a question ends within Control.timeout_s, answered or not, whatever the database or the way to it does.

A connection that broke since it was last used (the database was restarted) is noticed only by using it; so a question that
finds its connection broken is asked once more on a new one. The answer may be all that was lost: every change in
kos.control can be made twice.

PostgreSQL is reached directly, or through a pooler that keeps a session together: settings of the session matter here.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import asyncpg
from sqlalchemy import URL, AsyncAdaptedQueuePool
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from kos.config import Control
from kos.control.errors import ControlUnavailable, SchemaMissing
from kos.errors import ConfigError
from kos.tasks import Tasks

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]

#: Connections kept, and how many more there may be for as long as they are in use. PostgreSQL allows 100 in all unless
#: told otherwise, each a process of its own: with one kept by each node a cluster of some eighty nodes gets by.
_KEPT: Final = 1
_MORE: Final = 1

#: SQLite gives up waiting for a lock after this part of the time, so that it says itself what was the matter.
_LOCK_PART: Final = 0.8
#: How soon to try again what SQLite refuses at once instead of waiting.
_AGAIN_S: Final = 0.01

_NO_SCHEMA: Final = (asyncpg.UndefinedTableError.sqlstate, asyncpg.UndefinedColumnError.sqlstate)

#: Errors of a database, or of the way to it. Some of the drivers' own pass through SQLAlchemy as they are.
_FAILURES: Final = (
    SQLAlchemyError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    sqlite3.Error,
    OSError,  # TimeoutError is one
)


class Database:
    """The database that control.url names; nothing is opened before something is asked. Raises ConfigError for a URL that
    names none which kos can use. place: what it is, for logs: no password in it."""

    def __init__(self, control: Control) -> None:
        self.timeout_s: Final = control.timeout_s
        self._path: Final = _sqlite_path(control.url)
        self._single: AsyncEngine
        if self._path is not None:
            self.place = str(self._path)
            self._engine = _sqlite_engine(self._path, control.timeout_s)
            # The driver begins no transaction by itself, so a statement outside one is committed as it ends.
            self._single = self._engine
        else:
            dsn = _postgresql_dsn(control.url)
            self.place = _without_password(dsn)
            self._engine = _postgresql_engine(dsn, control)
            self._single = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._tasks = Tasks("control")
        self._given_up: set[asyncio.Task[Any]] = set()

    async def single(self, work: Work[T]) -> T:
        """What work gives, each of its statements a transaction of its own: for one, or for several that need no common
        moment. It may be run twice. Raises ControlUnavailable within timeout_s."""

        async def ask() -> T:
            async with self._single.connect() as connection:
                return await work(connection)

        return await self._bounded(ask, self.timeout_s)

    async def transaction(self, work: Work[T], *, timeout_s: float | None = None) -> T:
        """What work gives, once its statements have been committed together. It may be run twice. timeout_s: in place of the
        configured one, for what is known to take long. Raises ControlUnavailable by then."""

        async def ask() -> T:
            async with self._engine.connect() as connection:
                if self._path is not None:
                    # The lock to write, at once: later it would be refused to one who has read what another has changed.
                    await connection.exec_driver_sql("BEGIN IMMEDIATE")
                given = await work(connection)
                await connection.commit()
                return given

        return await self._bounded(ask, timeout_s or self.timeout_s)

    async def prepare(self) -> None:
        """Make what SQLite needs and does not make itself: the directory, and the write-ahead log, with which a writer and
        its readers do not wait for each other. Raises ControlUnavailable within timeout_s."""
        path = self._path
        if path is None:
            return

        async def ask() -> None:
            await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
            async with self._single.connect() as connection:
                await _use_wal(connection)

        await self._bounded(ask, self.timeout_s)

    async def close(self) -> None:
        """Close the connections; nothing may be asked any more. Takes three times timeout_s at most."""
        if self._given_up:
            # Cancelled again while it closes its connection, SQLAlchemy would leave a task behind that waits for a thread
            # of aiosqlite's which is no more, and holds up the end of the loop.
            await asyncio.wait(self._given_up, timeout=self.timeout_s)
        await self._tasks.close(self.timeout_s)
        # A server that says nothing is not waited for: cancelled, the driver drops the connection.
        with suppress(TimeoutError):
            async with asyncio.timeout(self.timeout_s):
                await self._engine.dispose()

    async def _bounded(self, ask: Callable[[], Awaitable[T]], timeout_s: float) -> T:
        # asyncio.timeout would wait for what it has cancelled, and SQLAlchemy grants a server that says nothing two seconds
        # more for its farewell. Here the task sees to that alone, and its connection counts as in use until then.
        task = self._tasks.spawn(self._outcome(ask), "question")
        try:
            done, _ = await asyncio.wait({task}, timeout=timeout_s)
        finally:
            if not task.done():
                task.cancel("nobody waits for it any more")
                self._given_up.add(task)
                task.add_done_callback(self._given_up.discard)
        if not done:
            raise ControlUnavailable(f"{self.place}: no answer within {timeout_s:g} s")
        outcome = task.result()
        if isinstance(outcome, ControlUnavailable):
            raise outcome
        return outcome

    async def _outcome(self, ask: Callable[[], Awaitable[T]]) -> T | ControlUnavailable:
        """The error as a value: a task that raises is taken for a fault of ours, and logged as one."""
        again = True
        while True:
            try:
                return await ask()
            except ControlUnavailable as error:
                return error
            except _FAILURES as error:
                if _no_schema(error):
                    return SchemaMissing(f"{self.place}: {_reason(error)}")
                if not (again and isinstance(error, DBAPIError) and error.connection_invalidated):
                    return ControlUnavailable(f"{self.place}: {_reason(error)}")
                again = False


def _no_schema(error: BaseException) -> bool:
    """There is no such table, or no such column: whoever put back an older one has put it in this one's place."""
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    # SQLite has no number for it.
    return state in _NO_SCHEMA or any(said in str(error.orig) for said in ("no such table", "no such column"))


def _sqlite_path(url: str) -> Path | None:
    """The file of sqlite:///PATH, None if it is another database. ConfigError for one that only this process would see."""
    scheme, found, path = url.partition(":///")
    if not found or scheme != "sqlite":
        return None
    if path in ("", ":memory:"):
        raise ConfigError(f"control.url: {url!r} is no file that others can open; allowed: sqlite:///PATH")
    return Path(path)


def _sqlite_engine(path: Path, timeout_s: float) -> AsyncEngine:
    return create_async_engine(
        URL.create("sqlite+aiosqlite", database=str(path)),
        connect_args={"timeout": timeout_s * _LOCK_PART, "isolation_level": None},
        poolclass=AsyncAdaptedQueuePool,
        pool_size=_KEPT,
        max_overflow=_MORE,
        pool_timeout=timeout_s,
    )


def _postgresql_dsn(url: str) -> str:
    scheme, _, rest = url.partition("://")
    if scheme not in ("postgresql", "postgresql+asyncpg"):
        raise ConfigError(f"control.url: scheme {scheme!r}; allowed: sqlite:///PATH or postgresql://HOST/NAME")
    return f"postgresql://{rest}"


def _postgresql_engine(dsn: str, control: Control) -> AsyncEngine:
    limit = str(round(control.timeout_s * 1000))
    settings = {
        "application_name": "kos",
        "statement_timeout": limit,
        # A node that vanishes within a transaction would hold its locks until the kernel of the other side gives it up,
        # by default after two hours.
        "idle_in_transaction_session_timeout": limit,
    }

    async def connect() -> Any:
        # The driver reads the URL, not SQLAlchemy: so it may say whatever libpq understands (sslmode, several hosts).
        return await asyncpg.connect(
            dsn, password=control.password, timeout=control.timeout_s, server_settings=settings
        )

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        isolation_level="READ COMMITTED",
        pool_size=_KEPT,
        max_overflow=_MORE,
        pool_timeout=control.timeout_s,
    )


def _without_password(dsn: str) -> str:
    parts = urlsplit(dsn)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


async def _use_wal(connection: AsyncConnection) -> None:
    """Of no effect on a file that has one, and on a file system that allows none: what there is then does as well."""
    while True:
        try:
            await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            return
        except DBAPIError as error:
            # Who switches it on needs the file for a moment for himself, and is refused at once, whatever the timeout for
            # locks, if others are about to do the same. Whoever waits for this has a deadline.
            if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY:
                raise
        await asyncio.sleep(_AGAIN_S)


def _reason(error: BaseException) -> str:
    """One line: without the statement and the hints that SQLAlchemy adds."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__
