"""No statistics of the columns that no plan is made by.

Making those of the log's arrays took most of autovacuum's time while rows came in. Takes no lock
that an append or a publication waits for.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: None = None
depends_on: None = None

#: The log is looked up by shard and position, or by segment; what its arrays hold is only read.
_LOG = (
    "ordinals",
    "entry_indexes",
    "entry_bytes",
    "principals",
    "targets",
    "row_counts",
    "reject_counts",
    "table_ids",
)
#: Keys are looked up one by one in a unique index, whatever their values are.
_KEYS = ("key_hash", "fingerprint", "segment_id", "ordinal", "schema_versions")
_COLUMNS = {"bus_log": _LOG, "idem_0": _KEYS, "idem_1": _KEYS, "idem_2": _KEYS}


def upgrade() -> None:
    _set_target("0")


def downgrade() -> None:
    _set_target("-1")


def _set_target(target: str) -> None:
    for table, columns in _COLUMNS.items():
        changes = ", ".join(f"ALTER COLUMN {column} SET STATISTICS {target}" for column in columns)
        op.execute(f"ALTER TABLE lakebus.{table} {changes}")
