"""Lines of history are bound to a server and its timeline, and say why and from when they differ.

A line that exists already is bound at the next start; what it was bound to before cannot be known.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: None = None
depends_on: None = None


def upgrade() -> None:
    for column in (
        sa.Column("fork_time", sa.DateTime(timezone=True)),
        sa.Column("reason", sa.Text()),
        sa.Column("system_identifier", sa.BigInteger()),
        sa.Column("timeline", sa.Integer()),
    ):
        op.add_column("history", column, schema="lakebus")


def downgrade() -> None:
    for name in ("timeline", "system_identifier", "reason", "fork_time"):
        op.drop_column("history", name, schema="lakebus")
