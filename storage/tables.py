"""Table definitions of the control plane: the one description of the PostgreSQL database.

Migrations build these tables and a test proves that both are the same database. Everything lives in
the schema `lakebus`, so that an external database can be shared. Sequences, views and functions
are in `storage/sql/` and installed after each upgrade.

How the tables divide (why it is safe is told at `storage/sql/functions/`):

* one-row-per-shard counters are three tables, so that append, claim and publish never wait for
  each other;
* `bus_segment_0..3` and `idem_0..2` are rings of insert-only tables emptied by TRUNCATE: no dead
  rows, no vacuum debt, never partitioned by state;
* `lake` is one row: the head. Whoever publishes locks it first.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from storage.names import KEY_RING, SCHEMA, SEGMENT_RING

metadata = sa.MetaData(
    schema=SCHEMA,
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
    },
)

_TIME = sa.DateTime(timezone=True)
_ROW_STORE: dict[str, Any] = {"postgresql_with": {"fillfactor": "20"}}


def _required(name: str, kind: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False)


def _one_row(table: str) -> sa.Column[bool]:
    """A primary key that can only be true: the table holds one row at most."""

    check = sa.CheckConstraint("one_row", name=f"{table}_one_row")
    return sa.Column("one_row", sa.Boolean, check, primary_key=True)


# --- the lake and its history --------------------------------------------------------------

lake = sa.Table(
    "lake",
    metadata,
    _one_row("lake"),
    _required("lake_id", sa.Uuid),
    _required("token_secret", sa.LargeBinary),
    _required("history_serial", sa.Integer),
    _required("snapshot_id", sa.BigInteger),
    _required("published_at", _TIME),
    _required("closed_until", _TIME),
    _required("oldest_snapshot_id", sa.BigInteger),
    _required("publish_count", sa.BigInteger),
    _required("watermark", pg.ARRAY(sa.BigInteger)),
    sa.Column("erasure_count", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("erasures_serial", sa.Integer, nullable=False, server_default="1"),
    sa.Column("erasures_owed", pg.ARRAY(sa.Integer), nullable=False, server_default="{}"),
)

history = sa.Table(
    "history",
    metadata,
    sa.Column("history_serial", sa.Integer, primary_key=True, autoincrement=False),
    _required("history_id", sa.Uuid),
    sa.Column("parent_serial", sa.Integer),
    _required("fork_snapshot_id", sa.BigInteger),
    _required("fork_positions", pg.ARRAY(sa.BigInteger)),
    _required("began_at", _TIME),
    # Closed on both sides of the fork; later times, until the line began, are the lost line's.
    sa.Column("fork_time", _TIME),
    sa.Column("reason", sa.Text),
    # What the line runs on. Null: not bound yet, or the server does not tell.
    sa.Column("system_identifier", sa.BigInteger),
    sa.Column("timeline", sa.Integer),
)

# --- tables and files ----------------------------------------------------------------------

lake_table = sa.Table(
    "lake_table",
    metadata,
    sa.Column("table_id", sa.Integer, primary_key=True, autoincrement=False),
    _required("name", sa.Text),
    _required("state", sa.Text),
    _required("version", sa.Integer),
    _required("last_column_id", sa.Integer),
    _required("first_snapshot", sa.BigInteger),
    sa.Column("last_snapshot", sa.BigInteger),
    sa.Column("closing_positions", pg.ARRAY(sa.BigInteger)),
    sa.CheckConstraint("state IN ('open', 'closing', 'dropped')", name="lake_table_state"),
    sa.Index(
        "lake_table_live_name", "name", unique=True, postgresql_where=sa.text("state <> 'dropped'")
    ),
)

table_schema = sa.Table(
    "table_schema",
    metadata,
    sa.Column("table_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    _required("first_snapshot", sa.BigInteger),
    sa.Column("last_snapshot", sa.BigInteger),
    _required("definition", pg.JSONB),
    sa.Index("table_schema_first_snapshot_idx", "first_snapshot"),
    sa.Index("table_schema_last_snapshot_idx", "last_snapshot"),
)

snapshot = sa.Table(
    "snapshot",
    metadata,
    sa.Column("snapshot_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("parent_id", sa.BigInteger),
    _required("history_serial", sa.Integer),
    _required("published_at", _TIME),
    _required("operation", sa.Text),
    _required("watermark", pg.ARRAY(sa.BigInteger)),
    _required("summary", pg.JSONB),
    _required("publication_id", sa.Uuid),
    sa.Column("expired_at", _TIME),
    sa.UniqueConstraint("publication_id"),
    sa.UniqueConstraint("published_at"),
)

data_file = sa.Table(
    "data_file",
    metadata,
    sa.Column("file_id", sa.Uuid, primary_key=True),
    _required("table_id", sa.Integer),
    _required("schema_version", sa.Integer),
    _required("first_snapshot", sa.BigInteger),
    sa.Column("last_snapshot", sa.BigInteger),
    _required("object_key", sa.Text),
    _required("rows", sa.BigInteger),
    _required("size_bytes", sa.BigInteger),
    _required("sha256", sa.Text),
    _required("statistics", sa.Text),
    sa.Column("partition", sa.Text),
    sa.Column("layout", sa.Text, nullable=False, server_default=""),
    sa.Index("data_file_first_snapshot_idx", "first_snapshot"),
    sa.Index(
        "data_file_last_snapshot_idx",
        "last_snapshot",
        postgresql_where=sa.text("last_snapshot IS NOT NULL"),
    ),
    # Asked by compaction: what is live in one table?
    sa.Index("data_file_live_idx", "table_id", postgresql_where=sa.text("last_snapshot IS NULL")),
)

write_intent = sa.Table(
    "write_intent",
    metadata,
    sa.Column("file_id", sa.Uuid, primary_key=True),
    _required("kind", sa.Text),
    _required("owner", sa.Uuid),
    _required("expires_at", _TIME),
    sa.Column("table_id", sa.Integer),
)

# --- maintenance ---------------------------------------------------------------------------

tag = sa.Table(
    "tag",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    _required("snapshot_id", sa.BigInteger),
    _required("created_at", _TIME),
    _required("created_by", sa.Text),
    sa.Index("tag_snapshot_id_idx", "snapshot_id"),
)

pin = sa.Table(
    "pin",
    metadata,
    sa.Column("pin_id", sa.Uuid, primary_key=True),
    _required("kind", sa.Text),
    # Every snapshot from here on is pinned; null: only those named.
    sa.Column("floor", sa.BigInteger),
    _required("snapshot_ids", pg.ARRAY(sa.BigInteger)),
    # Null: until it is released.
    sa.Column("expires_at", _TIME),
    _required("note", sa.Text),
    **_ROW_STORE,
)

condemned_file = sa.Table(
    "condemned_file",
    metadata,
    sa.Column("file_id", sa.Uuid, primary_key=True),
    _required("object_key", sa.Text),
    sa.Column("table_id", sa.Integer),
    _required("reason", sa.Text),
    sa.Column("size_bytes", sa.BigInteger),
    _required("state", sa.Text),
    _required("condemned_at", _TIME),
    sa.Column("deleted_at", _TIME),
    sa.CheckConstraint(
        "state IN ('condemned', 'deleting', 'deleted')", name="condemned_file_state"
    ),
    sa.Index("condemned_file_state_condemned_at_idx", "state", "condemned_at"),
)

erasure = sa.Table(
    "erasure",
    metadata,
    sa.Column("erasure_id", sa.Uuid, primary_key=True),
    _required("table_id", sa.Integer),
    _required("began_at", _TIME),
    sa.Column("ended_at", _TIME),
    _required("owed", sa.Boolean),
)

erased_file = sa.Table(
    "erased_file",
    metadata,
    sa.Column("file_id", sa.Uuid, primary_key=True),
    _required("erasure_id", sa.Uuid),
    _required("table_id", sa.Integer),
    _required("first_snapshot", sa.BigInteger),
    _required("last_snapshot", sa.BigInteger),
    _required("rows", sa.BigInteger),
    _required("files", sa.Integer),
    _required("size_bytes", sa.BigInteger),
    sa.Index("erased_file_first_snapshot_idx", "first_snapshot"),
)

job = sa.Table(
    "job",
    metadata,
    sa.Column("job_id", sa.Uuid, primary_key=True),
    _required("kind", sa.Text),
    sa.Column("table_id", sa.Integer),
    _required("parameters", pg.JSONB),
    _required("dry_run", sa.Boolean),
    _required("requested_by", sa.Text),
    sa.Column("principal_id", sa.Integer),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("fingerprint", sa.LargeBinary),
    _required("state", sa.Text),
    _required("attempt", sa.Integer),
    _required("epoch", sa.BigInteger),
    sa.Column("owner", sa.Uuid),
    sa.Column("expires_at", _TIME),
    _required("not_before", _TIME),
    _required("created_at", _TIME),
    sa.Column("started_at", _TIME),
    sa.Column("ended_at", _TIME),
    _required("report", pg.JSONB),
    sa.Column("error", pg.JSONB),
    sa.CheckConstraint("state IN ('queued', 'running', 'done', 'failed')", name="job_state"),
    sa.Index("job_created_at_idx", "created_at"),
    sa.Index(
        "job_open_idx",
        "state",
        "not_before",
        postgresql_where=sa.text("state IN ('queued', 'running')"),
    ),
    sa.Index(
        "job_idempotency_key_idx",
        "principal_id",
        "kind",
        "idempotency_key",
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    ),
)

job_schedule = sa.Table(
    "job_schedule",
    metadata,
    sa.Column("kind", sa.Text, primary_key=True),
    _required("next_at", _TIME),
)

# --- the bus -------------------------------------------------------------------------------

bus_state = sa.Table(
    "bus_state",
    metadata,
    _one_row("bus_state"),
    _required("shards", sa.Integer),
    _required("segment_ring", sa.Integer),
    _required("segment_ring_since", _TIME),
    _required("key_ring", sa.Integer),
    _required("key_ring_since", _TIME),
)

bus_ring = sa.Table(
    "bus_ring",
    metadata,
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("ring", sa.SmallInteger, primary_key=True, autoincrement=False),
    sa.Column("began_at", _TIME),
    sa.Column("left_at", _TIME),
    sa.Column("left_positions", pg.ARRAY(sa.BigInteger)),
    sa.Column("terminal_at", _TIME),
    sa.CheckConstraint("kind IN ('segment', 'key')", name="bus_ring_kind"),
)

bus_shard = sa.Table(
    "bus_shard",
    metadata,
    sa.Column("shard", sa.Integer, primary_key=True, autoincrement=False),
    _required("next_append", sa.BigInteger),
    _required("appended_bytes", sa.BigInteger),
    **_ROW_STORE,
)

bus_claim = sa.Table(
    "bus_claim",
    metadata,
    sa.Column("shard", sa.Integer, primary_key=True, autoincrement=False),
    _required("next_claim", sa.BigInteger),
    **_ROW_STORE,
)

bus_done = sa.Table(
    "bus_done",
    metadata,
    sa.Column("shard", sa.Integer, primary_key=True, autoincrement=False),
    _required("terminal_bytes", sa.BigInteger),
    **_ROW_STORE,
)

bus_log = sa.Table(
    "bus_log",
    metadata,
    sa.Column("shard", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("lo", sa.BigInteger, primary_key=True, autoincrement=False),
    _required("hi", sa.BigInteger),
    _required("segment_id", sa.BigInteger),
    _required("segment_ring", sa.SmallInteger),
    _required("key_ring", sa.SmallInteger),
    sa.Column("payload_key", sa.Text),
    _required("history_serial", sa.Integer),
    _required("accepted_at", _TIME),
    _required("expires_at", _TIME),
    _required("ordinals", pg.ARRAY(sa.SmallInteger)),
    _required("entry_indexes", pg.ARRAY(sa.LargeBinary)),
    _required("entry_bytes", pg.ARRAY(sa.Integer)),
    _required("principals", pg.ARRAY(sa.Integer)),
    _required("targets", pg.ARRAY(sa.Text)),
    _required("row_counts", pg.ARRAY(sa.Integer)),
    _required("reject_counts", pg.ARRAY(sa.Integer)),
    _required("table_ids", pg.ARRAY(sa.Integer)),
    sa.Index("bus_log_segment_id_idx", "segment_id", unique=True),
)

bus_segments = [
    sa.Table(
        f"bus_segment_{ring}",
        metadata,
        sa.Column("segment_id", sa.BigInteger, primary_key=True, autoincrement=False),
        _required("payload", sa.LargeBinary),
        postgresql_with={
            "autovacuum_vacuum_insert_threshold": "-1",
            "toast.autovacuum_enabled": "true",
        },
    )
    for ring in range(SEGMENT_RING)
]

bus_lease = sa.Table(
    "bus_lease",
    metadata,
    sa.Column("lease_id", sa.BigInteger, primary_key=True, autoincrement=False),
    _required("shard", sa.Integer),
    _required("lo", sa.BigInteger),
    _required("hi", sa.BigInteger),
    _required("epoch", sa.BigInteger),
    _required("state", sa.Text),
    sa.Column("owner", sa.Uuid),
    # Expiry is not indexed on purpose: the table holds a few rows, and renewals stay HOT.
    sa.Column("expires_at", _TIME),
    sa.Column("claimed_at", _TIME),
    _required("not_before", _TIME),
    _required("attempt", sa.Integer),
    _required("lone_failures", sa.Integer),
    sa.Column("canary_epoch", sa.BigInteger),
    sa.Column("last_error", sa.Text),
    sa.CheckConstraint("state IN ('leased', 'ready')", name="bus_lease_state"),
    postgresql_with={
        "fillfactor": "20",
        "autovacuum_vacuum_threshold": "50",
        "autovacuum_vacuum_scale_factor": "0",
        "autovacuum_vacuum_cost_delay": "0",
    },
)

published_range = sa.Table(
    "published_range",
    metadata,
    sa.Column("shard", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("lo", sa.BigInteger, primary_key=True, autoincrement=False),
    _required("hi", sa.BigInteger),
    _required("snapshot_id", sa.BigInteger),
    _required("commit_id", sa.Uuid),
    _required("owner", sa.Uuid),
    _required("published_at", _TIME),
    # Asked by the claim of an expired lone entry: has its owner published since it claimed?
    sa.Index("published_range_owner_published_at_idx", "owner", "published_at"),
    # Asked by the change feed: what was published between two snapshots?
    sa.Index("published_range_snapshot_id_idx", "snapshot_id"),
)

bus_quarantine = sa.Table(
    "bus_quarantine",
    metadata,
    sa.Column("quarantine_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    _required("kind", sa.Text),
    _required("history_serial", sa.Integer),
    _required("shard", sa.Integer),
    _required("position", sa.BigInteger),
    _required("principal_id", sa.Integer),
    _required("target", sa.Text),
    _required("table_ids", pg.ARRAY(sa.Integer)),
    _required("rows", sa.Integer),
    _required("reason", sa.Text),
    _required("attempts", sa.Integer),
    _required("by_crash", sa.Boolean),
    _required("created_at", _TIME),
    sa.Column("successor_batch_id", sa.Text),
    sa.Column("dropped_at", _TIME),
    sa.Column("payload", sa.LargeBinary),
    sa.CheckConstraint("kind IN ('entry', 'rejects')", name="bus_quarantine_kind"),
    sa.Index("bus_quarantine_shard_position_idx", "shard", "position"),
)

idempotency_keys = [
    sa.Table(
        f"idem_{ring}",
        metadata,
        sa.Column("key_hash", sa.LargeBinary, primary_key=True),
        _required("fingerprint", sa.LargeBinary),
        _required("segment_id", sa.BigInteger),
        _required("ordinal", sa.SmallInteger),
        _required("schema_versions", sa.Text),
        postgresql_with={"autovacuum_vacuum_insert_threshold": "-1"},
    )
    for ring in range(KEY_RING)
]

# --- people and processes ------------------------------------------------------------------

principal = sa.Table(
    "principal",
    metadata,
    sa.Column("principal_id", sa.Integer, sa.Identity(always=True), primary_key=True),
    _required("name", sa.Text),
    _required("created_at", _TIME),
    sa.UniqueConstraint("name"),
)

api_key = sa.Table(
    "api_key",
    metadata,
    sa.Column("key_id", sa.Text, primary_key=True),
    _required("principal_id", sa.Integer),
    _required("secret_hash", sa.LargeBinary),
    _required("scopes", pg.JSONB),
    _required("label", sa.Text),
    _required("created_at", _TIME),
    *(sa.Column(name, _TIME) for name in ("expires_at", "last_used_at", "revoked_at")),
    sa.Column("quotas", pg.JSONB, nullable=False, server_default="{}"),
    sa.ForeignKeyConstraint(
        ["principal_id"], [f"{SCHEMA}.principal.principal_id"], name="api_key_principal_fk"
    ),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("audit_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    _required("at", _TIME),
    _required("principal", sa.Text),
    _required("action", sa.Text),
    _required("subject", sa.Text),
    _required("detail", pg.JSONB),
)

actor_endpoint = sa.Table(
    "actor_endpoint",
    metadata,
    sa.Column("role", sa.Text, primary_key=True),
    sa.Column("instance", sa.Text, primary_key=True),
    _required("host", sa.Text),
    _required("port", sa.Integer),
    _required("seen_at", _TIME),
    postgresql_with={"fillfactor": "50"},
)
