"""The way to the database: what a URL means, and that whatever may be wrong with it ends in time and is named."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from kos.config import Control
from kos.control import migrations
from kos.control.database import Database
from kos.control.errors import ControlUnavailable
from kos.control.members import MemberRow, Members, MemberState
from kos.errors import ConfigError
from tests.fakes.ports import free_ports
from tests.fakes.postgres import PASSWORD, Postgres

T = TypeVar("T")

LIMIT_S = 0.5
#: What a busy machine may take longer; far less than the two seconds that a driver grants a silent server.
SLACK_S = 1.0

ME = MemberRow(name="a", incarnation=0, peer="a:9002", cluster="a:9003", weight=100)

QUESTIONS: dict[str, Callable[[Members], Awaitable[object]]] = {
    "join": lambda store: store.join(ME, 1, 60.0),
    "heartbeat": lambda store: store.heartbeat("a", 1, 1, 60.0, "{}"),
    "expel": lambda store: store.expel("a", 1),
    "leave": lambda store: store.leave("a", 1, 1),
    "set_state": lambda store: store.set_state("a", MemberState.DRAINING),
    "read": lambda store: store.read(),
}


@asynccontextmanager
async def opened(control: Control) -> AsyncIterator[Database]:
    database = Database(control)
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def unavailable(within_s: float = LIMIT_S, match: str | None = None) -> AsyncIterator[None]:
    """The block must raise ControlUnavailable, in time."""
    started = time.monotonic()
    with pytest.raises(ControlUnavailable, match=match) as caught:
        yield
    assert time.monotonic() - started < within_s + SLACK_S
    assert PASSWORD not in str(caught.value)
    assert "\n" not in str(caught.value)


async def refuses(database: Database, question: str, match: str | None = None) -> None:
    async with unavailable(match=match):
        await QUESTIONS[question](Members(database))


async def refuses_everything(control: Control, match: str | None = None) -> None:
    """Each question, of a node of its own: at once, so that a test takes no longer than one of them may."""
    async with AsyncExitStack() as nodes:
        databases = [await nodes.enter_async_context(opened(control)) for _ in QUESTIONS]
        await asyncio.gather(
            *(refuses(database, question, match) for database, question in zip(databases, QUESTIONS, strict=True))
        )


# What a URL means


@pytest.mark.parametrize(
    "url",
    ["sqlite:///", "sqlite:///:memory:", "postgresql+psycopg://h/d", "sqlite+pysqlite:///x"],
)
def test_urls_that_name_nothing_usable(url: str) -> None:
    with pytest.raises(ConfigError, match=r"control\.url"):
        Database(Control(url=url))


def test_places_have_no_password() -> None:
    for url in ("postgresql://u:secret@h1:1,h2:2/d?sslmode=require", "postgresql+asyncpg://u:secret@h1:1,h2:2/d"):
        assert Database(Control(url=url, password="secret")).place == "postgresql://h1:1,h2:2/d"
    assert Database(Control(url="sqlite:////a/b%20c?d")).place == "/a/b%20c?d"


async def test_odd_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a b?c=d#e%20"
    async with opened(Control(url=f"sqlite:///{path}")) as database:
        await migrations.upgrade(database)
    assert path.is_file()


async def test_sqlite_files_have_a_write_ahead_log(tmp_path: Path) -> None:
    async with opened(Control(url=f"sqlite:///{tmp_path}/c.db")) as database:
        await migrations.upgrade(database)
    connection = sqlite3.connect(tmp_path / "c.db")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


async def test_the_password_may_stand_beside_the_url(postgres: Postgres) -> None:
    name = await postgres.new_database()
    for url in (postgres.url(name, password=None), postgres.url(name, password="wrong")):
        async with opened(Control(url=url, password=PASSWORD)) as database:
            await migrations.upgrade(database)
    async with opened(Control(url=postgres.url(name, password="wrong"))) as database, unavailable(3.0, "password"):
        await Members(database).read()
    async with opened(Control(url=postgres.url("absent"))) as database, unavailable(3.0, "does not exist"):
        await Members(database).read()


async def test_urls_of_libpq(postgres: Postgres) -> None:
    """Options and several hosts: whichever answers."""
    name, (nobody,) = await postgres.new_database(), free_ports(1)
    url = f"postgresql://postgres@127.0.0.1:{nobody},127.0.0.1:{postgres.port}/{name}?sslmode=prefer"
    async with opened(Control(url=url, password=PASSWORD)) as database:
        await migrations.upgrade(database)


# Transactions


async def test_what_fails_half_way_has_not_happened(tmp_path: Path, postgres: Postgres) -> None:
    name = await postgres.new_database()
    for url in (f"sqlite:///{tmp_path}/c.db", postgres.url(name)):
        async with opened(Control(url=url)) as database:
            await migrations.upgrade(database)
            await Members(database).join(ME, 1, 60.0)

            async def half(connection: AsyncConnection) -> None:
                await connection.execute(text("UPDATE members SET weight = 7"))
                await connection.execute(text("UPDATE nothing SET weight = 7"))

            with pytest.raises(ControlUnavailable):
                await database.transaction(half)
            assert (await Members(database).read()).rows[0].weight == 100


async def test_a_transaction_whose_caller_is_cancelled_has_not_happened(tmp_path: Path, postgres: Postgres) -> None:
    name = await postgres.new_database()
    for url in (f"sqlite:///{tmp_path}/c.db", postgres.url(name)):
        async with opened(Control(url=url)) as database:
            await migrations.upgrade(database)
            await Members(database).join(ME, 1, 60.0)
            begun = asyncio.Event()

            async def stay(connection: AsyncConnection, begun: asyncio.Event = begun) -> None:
                await connection.execute(text("UPDATE members SET weight = 7"))
                begun.set()
                await asyncio.Event().wait()

            task = asyncio.get_running_loop().create_task(database.transaction(stay))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await Members(database).read()).rows[0].weight == 100
            # Its lock is gone as well.
            assert await Members(database).set_state("a", MemberState.ACTIVE)


async def test_connections_are_few(postgres: Postgres) -> None:
    name = await postgres.new_database()
    async with opened(Control(url=postgres.url(name), timeout_s=30.0)) as database:
        await migrations.upgrade(database)
        await Members(database).join(ME, 1, 60.0)
        await asyncio.gather(*(Members(database).heartbeat("a", 1, 1, 60.0, "{}") for _ in range(50)))
        watcher = await postgres.connect()
        count = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND application_name = 'kos'"
        assert await watcher.fetchval(count, name) <= 2
        await watcher.close()


# What may be wrong


async def test_nothing_listens() -> None:
    (port,) = free_ports(1)
    control = Control(url=f"postgresql://u:x@127.0.0.1:{port}/d", password=PASSWORD, timeout_s=LIMIT_S)
    await refuses_everything(control, "refused|failed")
    async with opened(control) as database, unavailable(match="refused|failed"):
        await migrations.upgrade(database)


async def test_a_server_that_accepts_and_never_answers() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with listening(silent) as url:
        await refuses_everything(Control(url=url, timeout_s=LIMIT_S))
        # And of one node as many as there are, though it has few connections.
        async with opened(Control(url=url, timeout_s=LIMIT_S)) as database:
            await asyncio.gather(*(refuses(database, question) for question in QUESTIONS))


async def test_a_server_that_is_something_else() -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        await reader.read()
        writer.close()

    async with listening(http) as url:
        await refuses_everything(Control(url=url, timeout_s=LIMIT_S))


async def test_a_server_that_falls_silent(postgres: Postgres) -> None:
    """Its process stands still while the connection is up. When it goes on, so does everything."""
    name = await postgres.new_database()
    await upgrade_patiently(postgres.url(name))
    async with AsyncExitStack() as nodes:
        databases = {}
        for question in QUESTIONS:
            databases[question] = await nodes.enter_async_context(
                opened(Control(url=postgres.url(name), timeout_s=LIMIT_S))
            )
            await patiently(Members(databases[question]).read)
        backends = await backends_of(postgres, name)
        for pid in backends:
            os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.gather(*(refuses(database, question) for question, database in databases.items()))
        finally:
            for pid in backends:
                os.kill(pid, signal.SIGCONT)
        for database in databases.values():
            await patiently(Members(database).read)


async def test_closing_does_not_wait_for_a_silent_server(postgres: Postgres) -> None:
    name = await postgres.new_database()
    await upgrade_patiently(postgres.url(name))
    database = Database(Control(url=postgres.url(name), timeout_s=LIMIT_S))
    await patiently(Members(database).read)
    (backend,) = await backends_of(postgres, name)
    os.kill(backend, signal.SIGSTOP)
    try:
        started = time.monotonic()
        await database.close()
        assert time.monotonic() - started < LIMIT_S + SLACK_S
    finally:
        os.kill(backend, signal.SIGCONT)


async def test_a_server_that_was_restarted_is_asked_again(postgres: Postgres) -> None:
    """Nobody hears of the connections that broke in between."""
    name = await postgres.new_database()
    async with opened(Control(url=postgres.url(name), timeout_s=30.0)) as database:
        await migrations.upgrade(database)
        store = Members(database)
        await store.join(ME, 1, 60.0)
        for _ in range(2):
            postgres.stop()
            postgres.start()
            await store.heartbeat("a", 1, 1, 60.0, "{}")
        postgres.stop()
        try:
            async with unavailable(30.0):
                await store.heartbeat("a", 1, 1, 60.0, "{}")
        finally:
            postgres.start()
        await store.heartbeat("a", 1, 1, 60.0, "{}")
        postgres.stop()
        postgres.start()
        assert await store.set_state("a", MemberState.ACTIVE)


async def test_a_lock_that_is_never_let_go(postgres: Postgres) -> None:
    """Only who needs it is kept waiting: a heartbeat is not, and the view can be read."""
    name = await postgres.new_database()
    await upgrade_patiently(postgres.url(name))
    async with opened(Control(url=postgres.url(name), timeout_s=LIMIT_S)) as database:
        store = Members(database)
        await patiently(lambda: store.join(ME, 1, 60.0))
        other = await postgres.connect(name)
        transaction = other.transaction()
        await transaction.start()
        await other.execute("SELECT * FROM cluster FOR UPDATE")
        async with unavailable():
            await store.join(ME, 2, 60.0)
        async with unavailable():
            await store.expel("a", 1)
        await patiently(lambda: store.heartbeat("a", 1, 1, 60.0, "{}"))
        await patiently(store.read)
        await transaction.rollback()
        await other.close()
        # What was given up was given up at the server as well.
        await patiently(lambda: store.heartbeat("a", 1, 1, 60.0, "{}"))


async def test_a_node_that_vanishes_in_a_transaction_blocks_nobody_for_long(postgres: Postgres) -> None:
    name = await postgres.new_database()
    await upgrade_patiently(postgres.url(name))
    holding = asyncio.Event()

    async def vanish(connection: AsyncConnection) -> None:
        await connection.execute(text("SELECT * FROM cluster FOR UPDATE"))
        holding.set()
        await asyncio.Event().wait()

    async with opened(Control(url=postgres.url(name), timeout_s=LIMIT_S)) as lost:
        # A caller who would wait for ever, of a database whose limit is short: only the server can end this.
        task = asyncio.get_running_loop().create_task(lost.transaction(vanish, timeout_s=3600.0))
        await holding.wait()
        async with opened(Control(url=postgres.url(name), timeout_s=20.0)) as database:
            assert (await Members(database).join(ME, 1, 60.0)).version == 1
        task.cancel()
        await asyncio.wait({task})


@pytest.fixture
async def locked(tmp_path: Path) -> AsyncIterator[Control]:
    """A database with its schema that somebody else is writing to and does not finish."""
    control = Control(url=f"sqlite:///{tmp_path}/c.db", timeout_s=LIMIT_S)
    await upgrade_patiently(control.url)
    other = sqlite3.connect(tmp_path / "c.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    yield control
    other.close()


async def test_a_locked_file(locked: Control) -> None:
    writes = [question for question in QUESTIONS if question != "read"]
    async with AsyncExitStack() as nodes:
        databases = [await nodes.enter_async_context(opened(locked)) for _ in writes]
        await asyncio.gather(
            *(refuses(database, question, "locked") for database, question in zip(databases, writes, strict=True))
        )
    async with opened(locked) as database:
        async with unavailable(match="locked"):
            await migrations.upgrade(database)
        # Of one node several wait for one another, but no longer.
        await asyncio.gather(*(refuses(database, question) for question in writes))
        # Readers do not mind.
        assert (await patiently(Members(database).read)).version == 0


async def test_closing_while_what_was_given_up_is_still_waiting(locked: Control) -> None:
    """Nothing stays behind: the loop of a node that stops would wait for it."""
    async with opened(locked) as database:
        await asyncio.gather(*(refuses(database, "join") for _ in range(8)))
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A directory that one may read and not write; root, who may all, is somebody else meanwhile."""
    directory = Path(tempfile.mkdtemp(prefix="kos-control-"))
    directory.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield directory
    finally:
        if root:
            os.seteuid(0)
        directory.chmod(0o755)
        shutil.rmtree(directory)


async def test_a_directory_that_cannot_be_written(unprivileged: Path) -> None:
    async with opened(Control(url=f"sqlite:///{unprivileged}/control.db", timeout_s=LIMIT_S)) as database:
        async with unavailable(match="unable to open"):
            await migrations.upgrade(database)
        async with unavailable(match="unable to open"):
            await Members(database).read()
    async with (
        opened(Control(url=f"sqlite:///{unprivileged}/below/control.db", timeout_s=LIMIT_S)) as database,
        unavailable(match="Permission denied"),
    ):
        await migrations.upgrade(database)


async def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with (
        opened(Control(url=f"sqlite:///{tmp_path}/file/control.db", timeout_s=LIMIT_S)) as database,
        unavailable(match="exists|Not a directory"),
    ):
        await migrations.upgrade(database)


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "c.db").write_bytes(b"something else\n" * 1000)
    async with (
        opened(Control(url=f"sqlite:///{tmp_path}/c.db", timeout_s=LIMIT_S)) as database,
        unavailable(match="not a database"),
    ):
        await migrations.upgrade(database)


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """The URL of a database that answers like this."""
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"postgresql://u@127.0.0.1:{server.sockets[0].getsockname()[1]}/d"


async def upgrade_patiently(url: str) -> None:
    async with opened(Control(url=url, timeout_s=30.0)) as database:
        await migrations.upgrade(database)


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """For what has to succeed, of a database whose short limit a busy machine may exceed."""
    for _ in range(20):
        try:
            return await ask()
        except ControlUnavailable:
            continue
    return await ask()


async def backends_of(postgres: Postgres, name: str) -> list[int]:
    watcher = await postgres.connect()
    try:
        query = "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND application_name = 'kos'"
        return [row["pid"] for row in await watcher.fetch(query, name)]
    finally:
        await watcher.close()
