"""The control store's schema, version by version: Alembic's scripts, run by whoever joins.

Owns: bringing a database of any earlier version, or an empty one, to the present one; refusing a later one. Does not own:
what the present one is (kos.control.tables).

A script that only adds, with defaults, leaves cluster.least_schema alone: nodes of before go on with what it made, also when
they are restarted, so nodes can be upgraded one after the other, and back. One after which they would go wrong sets it to its
own revision.

Invariant: one upgrades at a time, in one transaction: others wait, then find nothing to do; a failure leaves what was.

There is no env.py, and scripts take `op` as an argument: what Alembic offers for import belongs to the whole process, and two
upgrades at once in one process would write to each other's databases.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext, MigrationStep
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, insert, select

from kos.control.database import Database
from kos.control.errors import SchemaTooNew
from kos.control.tables import CLUSTER

# It tells at each start which plug-ins it has and which statements it will not run in a transaction.
logging.getLogger("alembic").setLevel(logging.WARNING)

#: Of PostgreSQL's advisory locks, which are numbers: "kosctrl" in ASCII, and nobody else's in this database.
_LOCK: Final = int.from_bytes(b"kosctrl")

#: The earliest of the schemas whose code can go on with the present one.
_LEAST: Final = "0001"

#: How long all of it may take, the wait for other nodes' upgrades included.
UPGRADE_S: Final = 60.0


async def upgrade(database: Database) -> None:
    """Bring the database to the present schema; of no effect if it is. Any number of nodes may do so at once. Raises
    SchemaTooNew, ControlUnavailable."""
    await database.prepare()
    # Raised outside the transaction's task, for it is no fault of the database's.
    newer = await database.transaction(lambda connection: connection.run_sync(_upgrade), timeout_s=UPGRADE_S)
    if newer is not None:
        raise SchemaTooNew(f"{database.place}: {newer}")


def _upgrade(connection: Connection) -> str | None:
    """What is wrong, if the schema is too new."""
    if connection.dialect.name == "postgresql":
        # The session's own limits are control.timeout_s; waiting for others, or a large table, takes longer.
        for limit in ("statement_timeout", "idle_in_transaction_session_timeout"):
            connection.exec_driver_sql(f"SET LOCAL {limit} = '{UPGRADE_S:g}s'")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
    # SQLite: the transaction began with the lock to write.
    scripts = ScriptDirectory(Path(__file__).parent)
    head = scripts.get_current_head()
    assert head is not None

    def steps(heads: tuple[str, ...], _: MigrationContext) -> list[MigrationStep]:
        missing = list(scripts.iterate_revisions(head, heads))
        return [MigrationStep.upgrade_from_script(scripts.revision_map, script) for script in reversed(missing)]

    context = MigrationContext.configure(connection, opts={"fn": steps})
    for found in context.get_current_heads():
        try:
            scripts.get_revision(found)
        except CommandError:
            least = connection.execute(select(CLUSTER.c.least_schema)).scalar_one_or_none()
            if least is None or least > head:
                return f"its schema is {found!r}, of a newer kos; this one knows it up to {head!r}"
            return None
    context.run_migrations(op=Operations(context))
    if connection.execute(select(CLUSTER.c.id)).one_or_none() is None:
        # Somebody has emptied the tables.
        connection.execute(insert(CLUSTER).values(id=1, view_version=0, last_incarnation=0, least_schema=_LEAST))
    return None
