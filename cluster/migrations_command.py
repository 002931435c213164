"""`lakebus migrate`: on the external database, or on the embedded one while nothing else runs."""

from __future__ import annotations

from cluster import migrate
from cluster.embedded_postgres import EmbeddedPostgres
from cluster.schema_state import SchemaState
from cluster.stack_files import StackFiles
from lakebus.settings import Settings


async def migrate_now(settings: Settings) -> str:
    """Bring the database of these settings to the newest schema; says what it is now."""
    if settings.postgres.dsn is not None:
        return _words(await migrate.upgrade(settings.postgres.dsn.get_secret_value()))
    files = StackFiles(settings.data_dir)
    files.make()
    with files.locked():  # a running stack has migrated its own database already
        async with EmbeddedPostgres.from_settings(files.root, settings.postgres) as server:
            return _words(await migrate.upgrade(server.dsn))


def _words(state: SchemaState) -> str:
    return f"The database has schema {state.revision} with functions {state.functions}."
