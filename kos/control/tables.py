"""The tables of the control store, as the present code reads and writes them.

Owns: names, columns and what the database itself refuses; the store's clock. Does not own: how an existing database gets
there (kos.control.migrations, which a test holds equal to this module).

Invariant: times are seconds since the epoch by the store's clock, `now_s()`. No node's clock is ever compared with
them, for nodes' clocks differ.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import BigInteger, CheckConstraint, Column, ColumnElement, Double, Integer, MetaData, Table, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

METADATA: Final = MetaData()

#: One row. Whoever changes members locks it first: so changes have an order, and nobody waits for one who waits for him.
#: least_schema: whoever knows that version of the schema can go on with this one, so that an upgrade can be taken back.
CLUSTER: Final = Table(
    "cluster",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("view_version", BigInteger, nullable=False),
    Column("last_incarnation", BigInteger, nullable=False),
    Column("least_schema", Text, nullable=False),
    CheckConstraint("id = 1", name="cluster_one_row"),
)

MEMBERS: Final = Table(
    "members",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("incarnation", BigInteger, nullable=False),
    Column("holder", BigInteger, nullable=False),
    Column("peer", Text, nullable=False),
    Column("cluster", Text, nullable=False),
    Column("weight", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("joined_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("beats", BigInteger, nullable=False),
    Column("report", Text, nullable=False),
    CheckConstraint("weight > 0", name="members_weight"),
    CheckConstraint("state IN ('active', 'draining')", name="members_state"),
)


class _Now(FunctionElement[float]):
    type = Double()
    inherit_cache = True


def now_s() -> ColumnElement[float]:
    """The store's clock in a statement: seconds since the epoch, to a millisecond at least. It moves on within a
    transaction."""
    return _Now()


@compiles(_Now, "postgresql")
def _now_postgresql(element: _Now, compiler: SQLCompiler, **kw: Any) -> str:
    # Not now(), which is when the transaction began: it may have waited for a lock since.
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(_Now, "sqlite")
def _now_sqlite(element: _Now, compiler: SQLCompiler, **kw: Any) -> str:
    # unixepoch('subsec') would say it more plainly, but SQLite knows that only since 3.42. 2440587.5: 1970-01-01.
    return "((julianday('now') - 2440587.5) * 86400.0)"
