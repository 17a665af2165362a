"""Members of a cluster, and the row by which their changes are ordered."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0001"
down_revision = None


def upgrade(op: Operations) -> None:
    cluster = op.create_table(
        "cluster",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("view_version", sa.BigInteger, nullable=False),
        sa.Column("last_incarnation", sa.BigInteger, nullable=False),
        sa.Column("least_schema", sa.Text, nullable=False),
        sa.CheckConstraint("id = 1", name="cluster_one_row"),
    )
    op.bulk_insert(cluster, [{"id": 1, "view_version": 0, "last_incarnation": 0, "least_schema": revision}])
    op.create_table(
        "members",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("incarnation", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.BigInteger, nullable=False),
        sa.Column("peer", sa.Text, nullable=False),
        sa.Column("cluster", sa.Text, nullable=False),
        sa.Column("weight", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("joined_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.Column("beats", sa.BigInteger, nullable=False),
        sa.Column("report", sa.Text, nullable=False),
        sa.CheckConstraint("weight > 0", name="members_weight"),
        sa.CheckConstraint("state IN ('active', 'draining')", name="members_state"),
    )
