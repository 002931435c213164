"""Bringing a database to the schema of this version, and refusing to work on any other.

Three things make a database ours: the tables (Alembic, `migrations/versions/`), the functions and
views (`storage/sql/`, installed again after each upgrade), and the record of which functions were
installed (the comment on the schema). All of it changes in ONE transaction under an advisory lock,
so a failed or doubled upgrade leaves the database as it was.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

import migrations
from cluster.schema_state import SchemaState, away, read_state, require_ancestor, require_dsn
from lakebus.errors import Unavailable
from storage.names import SCHEMA
from storage.postgres.failures import AWAY
from storage.sql import fingerprint, install_statements

_LOCK = 7203_0001
_FAILED: tuple[type[Exception], ...] = (*AWAY, sa.exc.DBAPIError)


async def upgrade(dsn: str) -> SchemaState:
    """Bring the database to the newest schema; does nothing if it is there. Safe to repeat."""
    async with _transaction(dsn) as connection:
        await connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        state = await read_state(await _driver(connection))
        if state.up_to_date:
            return state
        require_ancestor(state)
        await connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        await connection.run_sync(_run_alembic)
        await _install_functions(connection)
        return await read_state(await _driver(connection))


def _run_alembic(connection: sa.Connection) -> None:
    # Made here, because a wheel carries no alembic.ini.
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def _driver(connection: AsyncConnection) -> Any:
    """The driver's own connection, in the same transaction."""
    driver = (await connection.get_raw_connection()).driver_connection
    if driver is None:
        raise Unavailable("The database closed the connection during the upgrade; try again.")
    return driver


async def _install_functions(connection: AsyncConnection) -> None:
    # Many statements in one text: only the driver's own connection takes that.
    driver = await _driver(connection)
    await driver.execute(f"SET LOCAL search_path = {SCHEMA}")
    for script in install_statements():
        await driver.execute(script)
    await driver.execute(f"COMMENT ON SCHEMA {SCHEMA} IS 'lakebus functions {fingerprint()}'")


@asynccontextmanager
async def _transaction(dsn: str) -> AsyncIterator[AsyncConnection]:
    require_dsn(dsn)
    url = urlunsplit(urlsplit(dsn)._replace(scheme="postgresql+asyncpg"))
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            yield connection
    except _FAILED as error:
        if not _is_away(error):
            raise
        raise away(dsn, error) from error
    finally:
        await engine.dispose()


def _is_away(error: BaseException) -> bool:
    """Whether there was no connection, or it broke; by what the driver said beneath SQLAlchemy."""
    if isinstance(error, sa.exc.DBAPIError):
        cause = None if error.orig is None else error.orig.__cause__
        return error.connection_invalidated or isinstance(cause, AWAY)
    return True
