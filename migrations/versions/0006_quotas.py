"""Quotas of a key: what its principal may take with it, in place of the settings'.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: None = None
depends_on: None = None


def upgrade() -> None:
    op.add_column(
        "api_key",
        sa.Column("quotas", pg.JSONB(), nullable=False, server_default="{}"),
        schema="lakebus",
    )


def downgrade() -> None:
    op.drop_column("api_key", "quotas", schema="lakebus")
