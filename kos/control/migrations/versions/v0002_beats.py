"""Heartbeats of a member, counted: a store that has lost some of them shows it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0002"
down_revision = "0001"


def upgrade(op: Operations) -> None:
    # With a default, for nodes of before that join while others are newer.
    op.add_column("members", sa.Column("beats", sa.BigInteger, nullable=False, server_default="0"))
