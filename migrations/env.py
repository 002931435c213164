"""Alembic's entry: runs the migrations on the connection that `cluster/migrate.py` hands over."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from storage.names import SCHEMA
from storage.tables import metadata


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table="schema_version",
        version_table_schema=SCHEMA,
        include_schemas=True,
        compare_server_default=True,
        # One transaction for the whole way: a failed upgrade leaves the database as it was.
        transactional_ddl=True,
        transaction_per_migration=False,
    )
    context.run_migrations()


run(context.config.attributes["connection"])
