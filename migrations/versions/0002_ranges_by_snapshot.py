"""Published ranges can be found by their snapshot: what the change feed asks.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: None = None
depends_on: None = None


def upgrade() -> None:
    op.create_index(
        "published_range_snapshot_id_idx", "published_range", ["snapshot_id"], schema="lakebus"
    )


def downgrade() -> None:
    op.drop_index("published_range_snapshot_id_idx", table_name="published_range", schema="lakebus")
