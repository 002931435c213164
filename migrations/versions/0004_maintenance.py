"""Tags, pins, condemned files, jobs; partition and layout of files; the table of a write intent.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: None = None
depends_on: None = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("data_file", sa.Column("partition", sa.Text()), schema="lakebus")
    op.add_column(
        "data_file",
        sa.Column("layout", sa.Text(), nullable=False, server_default=""),
        schema="lakebus",
    )
    op.create_index(
        "data_file_live_idx",
        "data_file",
        ["table_id"],
        schema="lakebus",
        postgresql_where=sa.text("last_snapshot IS NULL"),
    )
    op.add_column("write_intent", sa.Column("table_id", sa.Integer()), schema="lakebus")
    op.create_table(
        "tag",
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("snapshot_id", sa.BigInteger(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        schema="lakebus",
    )
    op.create_index("tag_snapshot_id_idx", "tag", ["snapshot_id"], schema="lakebus")
    op.create_table(
        "pin",
        sa.Column("pin_id", sa.Uuid(), primary_key=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("floor", sa.BigInteger()),
        sa.Column("snapshot_ids", pg.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column("expires_at", _TIME),
        sa.Column("note", sa.Text(), nullable=False),
        schema="lakebus",
        postgresql_with={"fillfactor": "20"},
    )
    op.create_table(
        "condemned_file",
        sa.Column("file_id", sa.Uuid(), primary_key=True),
        sa.Column("object_key", sa.Text(), nullable=False),
        sa.Column("table_id", sa.Integer()),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger()),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("condemned_at", _TIME, nullable=False),
        sa.Column("deleted_at", _TIME),
        sa.CheckConstraint(
            "state IN ('condemned', 'deleting', 'deleted')", name="condemned_file_state"
        ),
        schema="lakebus",
    )
    op.create_index(
        "condemned_file_state_condemned_at_idx",
        "condemned_file",
        ["state", "condemned_at"],
        schema="lakebus",
    )
    op.create_table(
        "job",
        sa.Column("job_id", sa.Uuid(), primary_key=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("table_id", sa.Integer()),
        sa.Column("parameters", pg.JSONB(), nullable=False),
        sa.Column("dry_run", sa.Boolean(), nullable=False),
        sa.Column("requested_by", sa.Text(), nullable=False),
        sa.Column("principal_id", sa.Integer()),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("fingerprint", sa.LargeBinary()),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("owner", sa.Uuid()),
        sa.Column("expires_at", _TIME),
        sa.Column("not_before", _TIME, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("started_at", _TIME),
        sa.Column("ended_at", _TIME),
        sa.Column("report", pg.JSONB(), nullable=False),
        sa.Column("error", pg.JSONB()),
        sa.CheckConstraint("state IN ('queued', 'running', 'done', 'failed')", name="job_state"),
        schema="lakebus",
    )
    op.create_index("job_created_at_idx", "job", ["created_at"], schema="lakebus")
    op.create_index(
        "job_open_idx",
        "job",
        ["state", "not_before"],
        schema="lakebus",
        postgresql_where=sa.text("state IN ('queued', 'running')"),
    )
    op.create_index(
        "job_idempotency_key_idx",
        "job",
        ["principal_id", "kind", "idempotency_key"],
        unique=True,
        schema="lakebus",
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_table(
        "job_schedule",
        sa.Column("kind", sa.Text(), primary_key=True),
        sa.Column("next_at", _TIME, nullable=False),
        schema="lakebus",
    )


def downgrade() -> None:
    for table in ("job_schedule", "job", "condemned_file", "pin", "tag"):
        op.drop_table(table, schema="lakebus")
    op.drop_column("write_intent", "table_id", schema="lakebus")
    op.drop_index("data_file_live_idx", "data_file", schema="lakebus")
    for name in ("layout", "partition"):
        op.drop_column("data_file", name, schema="lakebus")
