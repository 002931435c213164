"""Erasures: what they took from which snapshots, and that readers notice them.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: None = None
depends_on: None = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    for column in (
        sa.Column("erasure_count", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("erasures_serial", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("erasures_owed", pg.ARRAY(sa.Integer()), nullable=False, server_default="{}"),
    ):
        op.add_column("lake", column, schema="lakebus")
    # A line of history from before has no erasure to do again.
    op.execute("UPDATE lakebus.lake SET erasures_serial = history_serial")
    op.create_table(
        "erasure",
        sa.Column("erasure_id", sa.Uuid(), primary_key=True),
        sa.Column("table_id", sa.Integer(), nullable=False),
        sa.Column("began_at", _TIME, nullable=False),
        sa.Column("ended_at", _TIME),
        sa.Column("owed", sa.Boolean(), nullable=False),
        schema="lakebus",
    )
    op.create_table(
        "erased_file",
        sa.Column("file_id", sa.Uuid(), primary_key=True),
        sa.Column("erasure_id", sa.Uuid(), nullable=False),
        sa.Column("table_id", sa.Integer(), nullable=False),
        sa.Column("first_snapshot", sa.BigInteger(), nullable=False),
        sa.Column("last_snapshot", sa.BigInteger(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("files", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        schema="lakebus",
    )
    op.create_index(
        "erased_file_first_snapshot_idx", "erased_file", ["first_snapshot"], schema="lakebus"
    )


def downgrade() -> None:
    for table in ("erased_file", "erasure"):
        op.drop_table(table, schema="lakebus")
    for name in ("erasures_owed", "erasures_serial", "erasure_count"):
        op.drop_column("lake", name, schema="lakebus")
