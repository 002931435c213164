"""The first schema: lake, history, catalog, bus, keys.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0001"
down_revision: str | None = None
branch_labels: None = None
depends_on: None = None


def upgrade() -> None:
    op.create_table(
        "actor_endpoint",
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("role", "instance", name=op.f("actor_endpoint_pkey")),
        schema="lakebus",
        postgresql_with={"fillfactor": "50"},
    )
    op.create_table(
        "audit",
        sa.Column("audit_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("detail", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("audit_id", name=op.f("audit_pkey")),
        schema="lakebus",
    )
    op.create_table(
        "bus_claim",
        sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("next_claim", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("shard", name=op.f("bus_claim_pkey")),
        schema="lakebus",
        postgresql_with={"fillfactor": "20"},
    )
    op.create_table(
        "bus_done",
        sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("terminal_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("shard", name=op.f("bus_done_pkey")),
        schema="lakebus",
        postgresql_with={"fillfactor": "20"},
    )
    op.create_table(
        "bus_lease",
        sa.Column("lease_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("lo", sa.BigInteger(), nullable=False),
        sa.Column("hi", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("owner", sa.Uuid(), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lone_failures", sa.Integer(), nullable=False),
        sa.Column("canary_epoch", sa.BigInteger(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.CheckConstraint("state IN ('leased', 'ready')", name="bus_lease_state"),
        sa.PrimaryKeyConstraint("lease_id", name=op.f("bus_lease_pkey")),
        schema="lakebus",
        postgresql_with={
            "fillfactor": "20",
            "autovacuum_vacuum_threshold": "50",
            "autovacuum_vacuum_scale_factor": "0",
            "autovacuum_vacuum_cost_delay": "0",
        },
    )
    op.create_table(
        "bus_log",
        sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("lo", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("hi", sa.BigInteger(), nullable=False),
        sa.Column("segment_id", sa.BigInteger(), nullable=False),
        sa.Column("segment_ring", sa.SmallInteger(), nullable=False),
        sa.Column("key_ring", sa.SmallInteger(), nullable=False),
        sa.Column("payload_key", sa.Text(), nullable=True),
        sa.Column("history_serial", sa.Integer(), nullable=False),
        sa.Column("accepted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ordinals", postgresql.ARRAY(sa.SmallInteger()), nullable=False),
        sa.Column("entry_indexes", postgresql.ARRAY(sa.LargeBinary()), nullable=False),
        sa.Column("entry_bytes", postgresql.ARRAY(sa.Integer()), nullable=False),
        sa.Column("principals", postgresql.ARRAY(sa.Integer()), nullable=False),
        sa.Column("targets", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("row_counts", postgresql.ARRAY(sa.Integer()), nullable=False),
        sa.Column("reject_counts", postgresql.ARRAY(sa.Integer()), nullable=False),
        sa.Column("table_ids", postgresql.ARRAY(sa.Integer()), nullable=False),
        sa.PrimaryKeyConstraint("shard", "lo", name=op.f("bus_log_pkey")),
        schema="lakebus",
    )
    op.create_index(
        "bus_log_segment_id_idx", "bus_log", ["segment_id"], unique=True, schema="lakebus"
    )
    op.create_table(
        "bus_quarantine",
        sa.Column("quarantine_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("history_serial", sa.Integer(), nullable=False),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("principal_id", sa.Integer(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("table_ids", postgresql.ARRAY(sa.Integer()), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("by_crash", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("successor_batch_id", sa.Text(), nullable=True),
        sa.Column("dropped_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("payload", sa.LargeBinary(), nullable=True),
        sa.CheckConstraint("kind IN ('entry', 'rejects')", name="bus_quarantine_kind"),
        sa.PrimaryKeyConstraint("quarantine_id", name=op.f("bus_quarantine_pkey")),
        schema="lakebus",
    )
    op.create_index(
        "bus_quarantine_shard_position_idx",
        "bus_quarantine",
        ["shard", "position"],
        unique=False,
        schema="lakebus",
    )
    op.create_table(
        "bus_ring",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("ring", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("began_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("left_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("left_positions", postgresql.ARRAY(sa.BigInteger()), nullable=True),
        sa.Column("terminal_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('segment', 'key')", name="bus_ring_kind"),
        sa.PrimaryKeyConstraint("kind", "ring", name=op.f("bus_ring_pkey")),
        schema="lakebus",
    )
    op.create_table(
        "bus_segment_0",
        sa.Column("segment_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("segment_id", name=op.f("bus_segment_0_pkey")),
        schema="lakebus",
        postgresql_with={
            "autovacuum_vacuum_insert_threshold": "-1",
            "toast.autovacuum_enabled": "true",
        },
    )
    op.create_table(
        "bus_segment_1",
        sa.Column("segment_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("segment_id", name=op.f("bus_segment_1_pkey")),
        schema="lakebus",
        postgresql_with={
            "autovacuum_vacuum_insert_threshold": "-1",
            "toast.autovacuum_enabled": "true",
        },
    )
    op.create_table(
        "bus_segment_2",
        sa.Column("segment_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("segment_id", name=op.f("bus_segment_2_pkey")),
        schema="lakebus",
        postgresql_with={
            "autovacuum_vacuum_insert_threshold": "-1",
            "toast.autovacuum_enabled": "true",
        },
    )
    op.create_table(
        "bus_segment_3",
        sa.Column("segment_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("segment_id", name=op.f("bus_segment_3_pkey")),
        schema="lakebus",
        postgresql_with={
            "autovacuum_vacuum_insert_threshold": "-1",
            "toast.autovacuum_enabled": "true",
        },
    )
    op.create_table(
        "bus_shard",
        sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("next_append", sa.BigInteger(), nullable=False),
        sa.Column("appended_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("shard", name=op.f("bus_shard_pkey")),
        schema="lakebus",
        postgresql_with={"fillfactor": "20"},
    )
    op.create_table(
        "bus_state",
        sa.Column("one_row", sa.Boolean(), nullable=False),
        sa.Column("shards", sa.Integer(), nullable=False),
        sa.Column("segment_ring", sa.Integer(), nullable=False),
        sa.Column("segment_ring_since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("key_ring", sa.Integer(), nullable=False),
        sa.Column("key_ring_since", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("one_row", name=op.f("bus_state_pkey")),
        schema="lakebus",
    )
    op.create_table(
        "data_file",
        sa.Column("file_id", sa.Uuid(), nullable=False),
        sa.Column("table_id", sa.Integer(), nullable=False),
        sa.Column("schema_version", sa.Integer(), nullable=False),
        sa.Column("first_snapshot", sa.BigInteger(), nullable=False),
        sa.Column("last_snapshot", sa.BigInteger(), nullable=True),
        sa.Column("object_key", sa.Text(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("statistics", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("file_id", name=op.f("data_file_pkey")),
        schema="lakebus",
    )
    op.create_index(
        "data_file_first_snapshot_idx",
        "data_file",
        ["first_snapshot"],
        unique=False,
        schema="lakebus",
    )
    op.create_index(
        "data_file_last_snapshot_idx",
        "data_file",
        ["last_snapshot"],
        unique=False,
        schema="lakebus",
        postgresql_where=sa.text("last_snapshot IS NOT NULL"),
    )
    op.create_table(
        "history",
        sa.Column("history_serial", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("history_id", sa.Uuid(), nullable=False),
        sa.Column("parent_serial", sa.Integer(), nullable=True),
        sa.Column("fork_snapshot_id", sa.BigInteger(), nullable=False),
        sa.Column("fork_positions", postgresql.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column("began_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("history_serial", name=op.f("history_pkey")),
        schema="lakebus",
    )
    op.create_table(
        "idem_0",
        sa.Column("key_hash", sa.LargeBinary(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("segment_id", sa.BigInteger(), nullable=False),
        sa.Column("ordinal", sa.SmallInteger(), nullable=False),
        sa.Column("schema_versions", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key_hash", name=op.f("idem_0_pkey")),
        schema="lakebus",
        postgresql_with={"autovacuum_vacuum_insert_threshold": "-1"},
    )
    op.create_table(
        "idem_1",
        sa.Column("key_hash", sa.LargeBinary(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("segment_id", sa.BigInteger(), nullable=False),
        sa.Column("ordinal", sa.SmallInteger(), nullable=False),
        sa.Column("schema_versions", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key_hash", name=op.f("idem_1_pkey")),
        schema="lakebus",
        postgresql_with={"autovacuum_vacuum_insert_threshold": "-1"},
    )
    op.create_table(
        "idem_2",
        sa.Column("key_hash", sa.LargeBinary(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("segment_id", sa.BigInteger(), nullable=False),
        sa.Column("ordinal", sa.SmallInteger(), nullable=False),
        sa.Column("schema_versions", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key_hash", name=op.f("idem_2_pkey")),
        schema="lakebus",
        postgresql_with={"autovacuum_vacuum_insert_threshold": "-1"},
    )
    op.create_table(
        "lake",
        sa.Column("one_row", sa.Boolean(), nullable=False),
        sa.Column("lake_id", sa.Uuid(), nullable=False),
        sa.Column("token_secret", sa.LargeBinary(), nullable=False),
        sa.Column("history_serial", sa.Integer(), nullable=False),
        sa.Column("snapshot_id", sa.BigInteger(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("oldest_snapshot_id", sa.BigInteger(), nullable=False),
        sa.Column("publish_count", sa.BigInteger(), nullable=False),
        sa.Column("watermark", postgresql.ARRAY(sa.BigInteger()), nullable=False),
        sa.PrimaryKeyConstraint("one_row", name=op.f("lake_pkey")),
        schema="lakebus",
    )
    op.create_table(
        "lake_table",
        sa.Column("table_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("last_column_id", sa.Integer(), nullable=False),
        sa.Column("first_snapshot", sa.BigInteger(), nullable=False),
        sa.Column("last_snapshot", sa.BigInteger(), nullable=True),
        sa.Column("closing_positions", postgresql.ARRAY(sa.BigInteger()), nullable=True),
        sa.CheckConstraint("state IN ('open', 'closing', 'dropped')", name="lake_table_state"),
        sa.PrimaryKeyConstraint("table_id", name=op.f("lake_table_pkey")),
        schema="lakebus",
    )
    op.create_index(
        "lake_table_live_name",
        "lake_table",
        ["name"],
        unique=True,
        schema="lakebus",
        postgresql_where=sa.text("state <> 'dropped'"),
    )
    op.create_table(
        "principal",
        sa.Column("principal_id", sa.Integer(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("principal_id", name=op.f("principal_pkey")),
        sa.UniqueConstraint("name", name=op.f("principal_name_key")),
        schema="lakebus",
    )
    op.create_table(
        "published_range",
        sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("lo", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("hi", sa.BigInteger(), nullable=False),
        sa.Column("snapshot_id", sa.BigInteger(), nullable=False),
        sa.Column("commit_id", sa.Uuid(), nullable=False),
        sa.Column("owner", sa.Uuid(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("shard", "lo", name=op.f("published_range_pkey")),
        schema="lakebus",
    )
    op.create_index(
        "published_range_owner_published_at_idx",
        "published_range",
        ["owner", "published_at"],
        unique=False,
        schema="lakebus",
    )
    op.create_table(
        "snapshot",
        sa.Column("snapshot_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("parent_id", sa.BigInteger(), nullable=True),
        sa.Column("history_serial", sa.Integer(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("watermark", postgresql.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column("summary", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("publication_id", sa.Uuid(), nullable=False),
        sa.Column("expired_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("snapshot_id", name=op.f("snapshot_pkey")),
        sa.UniqueConstraint("publication_id", name=op.f("snapshot_publication_id_key")),
        sa.UniqueConstraint("published_at", name=op.f("snapshot_published_at_key")),
        schema="lakebus",
    )
    op.create_table(
        "table_schema",
        sa.Column("table_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("first_snapshot", sa.BigInteger(), nullable=False),
        sa.Column("last_snapshot", sa.BigInteger(), nullable=True),
        sa.Column("definition", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("table_id", "version", name=op.f("table_schema_pkey")),
        schema="lakebus",
    )
    op.create_table(
        "write_intent",
        sa.Column("file_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("owner", sa.Uuid(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("file_id", name=op.f("write_intent_pkey")),
        schema="lakebus",
    )
    op.create_table(
        "api_key",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("principal_id", sa.Integer(), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("scopes", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["principal_id"], ["lakebus.principal.principal_id"], name="api_key_principal_fk"
        ),
        sa.PrimaryKeyConstraint("key_id", name=op.f("api_key_pkey")),
        schema="lakebus",
    )
    # Segments are compressed already; TOAST must not try again.
    for ring in range(4):
        op.execute(
            f"ALTER TABLE lakebus.bus_segment_{ring} ALTER COLUMN payload SET STORAGE EXTERNAL"
        )


def downgrade() -> None:
    raise RuntimeError("there is nothing before the first schema; drop the database instead")
