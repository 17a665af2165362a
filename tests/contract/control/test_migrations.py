"""The schema: from nothing, again, by many at once, and never back."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

import msgspec
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import CheckConstraint, Connection, inspect, text
from sqlalchemy.ext.asyncio import AsyncConnection

from kos.config import Control
from kos.control import migrations
from kos.control.database import Database
from kos.control.errors import ControlUnavailable, SchemaMissing, SchemaTooNew
from kos.control.members import MemberRow, Members
from kos.control.tables import METADATA

Databases = Callable[[], Database]

#: A node that starts: upgrades and looks.
NODE = """
import asyncio, sys
from kos.config import Control
from kos.control import migrations
from kos.control.database import Database
from kos.control.members import MemberRow, Members, new_holder

async def start(url, name):
    database = Database(Control(url=url, timeout_s=30.0))
    await migrations.upgrade(database)
    me = MemberRow(name=name, incarnation=0, peer="p:1", cluster="c:1", weight=1)
    joined = await Members(database).join(me, new_holder(), 60)
    await database.close()
    print(joined.version)

asyncio.run(start(*sys.argv[1:]))
"""


async def tables(database: Database) -> set[str]:
    def names(connection: Connection) -> list[str]:
        return inspect(connection).get_table_names()

    return set(await database.transaction(lambda connection: connection.run_sync(names)))


async def test_tables_that_are_gone_are_told_as_such_and_made_anew(databases: Databases) -> None:
    """Somebody has set up the database anew under a running cluster."""
    one, other = Members(databases()), databases()
    await migrations.upgrade(other)
    me = MemberRow(name="a", incarnation=0, peer="p:1", cluster="c:1", weight=1)
    joined = await one.join(me, 7, 600.0)

    async def empty(connection: AsyncConnection) -> None:
        for table in await connection.run_sync(lambda plain: inspect(plain).get_table_names()):
            await connection.execute(text(f"DROP TABLE {table}"))

    await other.transaction(empty)
    for _ in range(2):
        with pytest.raises(SchemaMissing):
            await one.heartbeat("a", joined.incarnation, 7, 600.0, "{}", joined.version)
        with pytest.raises(SchemaMissing):
            await one.join(me, 7, 600.0, joined.version)
    await migrations.upgrade(other)
    again = await one.join(me, 7, 600.0, joined.version)
    assert again.version > joined.version
    assert not again.resumed
    assert (await one.heartbeat("a", again.incarnation, 7, 600.0, "{}", again.version)).rows is None


async def test_from_nothing_and_again(databases: Databases) -> None:
    database = databases()
    await migrations.upgrade(database)
    assert await tables(database) == {*METADATA.tables, "alembic_version"}
    before = await Members(database).read()
    await migrations.upgrade(databases())
    assert await Members(database).read() == before


async def test_what_the_scripts_make_is_what_the_code_expects(databases: Databases) -> None:
    database = databases()
    await migrations.upgrade(database)

    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), METADATA))

    assert await database.transaction(lambda connection: connection.run_sync(differences)) == []

    def checks(connection: Connection) -> set[str | None]:
        found = inspect(connection)
        return {check["name"] for table in METADATA.tables for check in found.get_check_constraints(table)}

    expected = {
        constraint.name
        for table in METADATA.tables.values()
        for constraint in table.constraints
        if isinstance(constraint, CheckConstraint)
    }
    assert await database.transaction(lambda connection: connection.run_sync(checks)) == expected


async def test_by_many_at_once_in_one_process(databases: Databases) -> None:
    several = [databases() for _ in range(6)]
    await asyncio.gather(*(migrations.upgrade(database) for database in several))
    for database in several:
        assert (await Members(database).read()).version == 0


async def test_by_many_processes_at_once(control: Control, databases: Databases) -> None:
    started = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", NODE, control.url, f"n{number}", stdout=asyncio.subprocess.PIPE
        )
        for number in range(5)
    ]
    printed = await asyncio.gather(*(node.communicate() for node in started))
    assert sorted(int(stdout) for stdout, _ in printed) == [1, 2, 3, 4, 5]


async def test_a_newer_schema_is_refused_and_left_alone(databases: Databases) -> None:
    database = databases()
    await migrations.upgrade(database)

    async def newer(connection: AsyncConnection) -> None:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        await connection.execute(text("UPDATE cluster SET least_schema = '9998'"))
        await connection.execute(text("CREATE TABLE later (id INTEGER)"))

    await database.transaction(newer)
    with pytest.raises(SchemaTooNew, match=r"'9999', of a newer kos.*'0001'"):
        await migrations.upgrade(databases())
    assert "later" in await tables(database)
    # A node that runs already goes on: whoever wrote the newer one saw to it that it can.
    assert (await Members(database).read()).version == 0


async def test_a_newer_schema_that_this_one_can_go_on_with_is_left_alone(databases: Databases) -> None:
    """So nodes are upgraded one after the other, and back."""
    database = databases()
    await migrations.upgrade(database)

    async def newer(connection: AsyncConnection) -> None:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        await connection.execute(text("ALTER TABLE members ADD COLUMN later INTEGER NOT NULL DEFAULT 1"))

    await database.transaction(newer)
    await migrations.upgrade(databases())
    store, me = Members(database), MemberRow(name="a", incarnation=0, peer="p:1", cluster="c:1", weight=1)
    joined = await store.join(me, 7, 600.0)
    assert (await store.heartbeat("a", joined.incarnation, 7, 600.0, "{}", -1, joined.beats)).rows is not None


async def test_a_backup_of_an_older_schema_is_told_as_such(databases: Databases) -> None:
    database = databases()
    await migrations.upgrade(database)
    store, me = Members(database), MemberRow(name="a", incarnation=0, peer="p:1", cluster="c:1", weight=1)
    joined = await store.join(me, 7, 600.0)
    await database.transaction(lambda connection: connection.execute(text("ALTER TABLE members DROP COLUMN beats")))
    with pytest.raises(SchemaMissing):
        await store.heartbeat("a", joined.incarnation, 7, 600.0, "{}")


async def test_a_script_that_fails_leaves_nothing(databases: Databases) -> None:
    database = databases()

    async def in_the_way(connection: AsyncConnection) -> None:
        await connection.execute(text("CREATE TABLE members (id INTEGER)"))

    await database.prepare()
    await database.transaction(in_the_way)
    with pytest.raises(ControlUnavailable, match="already exists"):
        await migrations.upgrade(database)
    assert await tables(database) == {"members"}


async def test_nobody_waits_for_ever_for_another_upgrade(
    control: Control, databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding, waiting = databases(), Database(msgspec.structs.replace(control, timeout_s=0.3))
    held, done = asyncio.Event(), asyncio.Event()

    async def hold(connection: AsyncConnection) -> None:
        if connection.dialect.name == "postgresql":
            await connection.execute(text(f"SELECT pg_advisory_xact_lock({migrations._LOCK})"))
        held.set()
        await done.wait()

    monkeypatch.setattr(migrations, "UPGRADE_S", 0.3)
    await holding.prepare()
    holder = asyncio.get_running_loop().create_task(holding.transaction(hold))
    await held.wait()
    try:
        with pytest.raises(ControlUnavailable):
            await migrations.upgrade(waiting)
    finally:
        done.set()
        await holder
        await waiting.close()
    monkeypatch.undo()
    await migrations.upgrade(holding)
