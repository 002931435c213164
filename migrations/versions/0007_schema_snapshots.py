"""Table shapes by the snapshots they begin and end with: readers look for new ones after each
publication, which must not read the shapes of all tables.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: None = None
depends_on: None = None

_COLUMNS = ("first_snapshot", "last_snapshot")


def upgrade() -> None:
    for column in _COLUMNS:
        op.create_index(f"table_schema_{column}_idx", "table_schema", [column], schema="lakebus")


def downgrade() -> None:
    for column in _COLUMNS:
        op.drop_index(f"table_schema_{column}_idx", "table_schema", schema="lakebus")
