"""Bringing a database to the schema of this version, and refusing to work on any other.

Three things make a database ours: the tables (Alembic, `migrations/versions/`), the functions and
views (`storage/sql/`, installed again after each upgrade), and the record of which functions were
installed (the comment on the schema). All of it changes in ONE transaction under an advisory lock,
so a failed or doubled upgrade leaves the database as it was.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

import migrations
from lakebus.errors import StartRefused, Unavailable
from storage.postgres.failures import AWAY
from storage.sql import fingerprint, install_statements
from storage.tables import SCHEMA

_LOCK = 7203_0001
_FAILED: tuple[type[Exception], ...] = (*AWAY, sa.exc.DBAPIError)
_MARK = re.compile(r"lakebus functions ([0-9a-f]{16})")


@dataclass(frozen=True, slots=True)
class SchemaState:
    """What a database holds of lakebus; `revision` is None where there is nothing."""

    revision: str | None
    functions: str | None

    @property
    def empty(self) -> bool:
        return self.revision is None

    @property
    def up_to_date(self) -> bool:
        return self.revision == newest_revision() and self.functions == fingerprint()


def newest_revision() -> str:
    """The schema revision that this version of lakebus works on."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    if head is None:
        raise StartRefused("This installation has no migrations; install lakebus again.")
    return head


async def upgrade(dsn: str) -> SchemaState:
    """Bring the database to the newest schema; does nothing if it is there. Safe to repeat."""
    async with _transaction(dsn) as connection:
        await connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        state = await _state(connection)
        if state.up_to_date:
            return state
        _require_ancestor(state)
        await connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        await connection.run_sync(_run_alembic)
        await _install_functions(connection)
        return await _state(connection)


async def current(dsn: str) -> SchemaState:
    """What the database holds now."""
    async with _transaction(dsn) as connection:
        return await _state(connection)


async def require_known_schema(dsn: str) -> None:
    """Raise StartRefused, with the command that helps, unless the schema is this version's."""
    state = await current(dsn)
    if state.empty:
        raise StartRefused("The database holds no lakebus schema. Run `lakebus migrate`.")
    _require_ancestor(state)
    if not state.up_to_date:
        raise StartRefused(
            f"The database has the schema {state.revision} with the functions {state.functions};"
            f" this version of lakebus works on {newest_revision()} with {fingerprint()}."
            " Run `lakebus migrate` (make a backup first)."
        )


def _require_ancestor(state: SchemaState) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if state.revision is not None and state.revision not in known:
        raise StartRefused(
            f"The database has the schema {state.revision}, which this version of lakebus does not"
            " know: a newer version made it. Install that version, or restore a backup of this one."
        )


def _config() -> Config:
    """Alembic's configuration, made here because a wheel carries no alembic.ini."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    return config


def _run_alembic(connection: sa.Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def _install_functions(connection: AsyncConnection) -> None:
    # Many statements in one text: only the driver's own connection takes that.
    raw = await connection.get_raw_connection()
    driver = raw.driver_connection
    if driver is None:
        raise Unavailable("The database closed the connection during the upgrade; try again.")
    await driver.execute(f"SET LOCAL search_path = {SCHEMA}")
    for script in install_statements():
        await driver.execute(script)
    await driver.execute(f"COMMENT ON SCHEMA {SCHEMA} IS 'lakebus functions {fingerprint()}'")


async def _state(connection: AsyncConnection) -> SchemaState:
    table = await connection.scalar(sa.text(f"SELECT to_regclass('{SCHEMA}.schema_version')"))
    if table is None:
        return SchemaState(revision=None, functions=None)
    revision = await connection.scalar(sa.text(f"SELECT version_num FROM {SCHEMA}.schema_version"))
    comment = await connection.scalar(
        sa.text("SELECT obj_description(to_regnamespace(:name), 'pg_namespace')"), {"name": SCHEMA}
    )
    mark = _MARK.search(comment or "")
    return SchemaState(revision=revision, functions=mark[1] if mark else None)


@asynccontextmanager
async def _transaction(dsn: str) -> AsyncIterator[AsyncConnection]:
    parts = urlsplit(dsn)
    if parts.scheme not in ("postgres", "postgresql"):
        raise StartRefused("The DSN of the database must begin with postgresql://.")
    url = urlunsplit(parts._replace(scheme="postgresql+asyncpg"))
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            yield connection
    except _FAILED as error:
        if not _is_away(error):
            raise
        raise Unavailable(
            f"The database at {parts.hostname}:{parts.port or 5432} cannot be reached: {error}."
        ) from error
    finally:
        await engine.dispose()


def _is_away(error: BaseException) -> bool:
    """Whether there was no connection, or it broke; by what the driver said beneath SQLAlchemy."""
    if isinstance(error, sa.exc.DBAPIError):
        cause = None if error.orig is None else error.orig.__cause__
        return error.connection_invalidated or isinstance(cause, AWAY)
    return True
