"""What schema a database has, and refusing to work on any other than this version's.

Asked by every process at its start and by each job of maintenance, so it imports none of what
changes a schema (`cluster.migrate`).
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from lakebus.errors import StartRefused, Unavailable
from migrations.revisions import revisions
from storage.names import SCHEMA
from storage.postgres.failures import AWAY
from storage.sql import fingerprint

_FAILED: tuple[type[Exception], ...] = (*AWAY, TimeoutError)
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
    if not revisions():
        raise StartRefused("This installation has no migrations; install lakebus again.")
    return revisions()[-1]


async def current(dsn: str) -> SchemaState:
    """What the database holds now. Raises Unavailable, StartRefused."""
    async with _connection(dsn) as connection, connection.transaction(readonly=True):
        return await read_state(connection)


async def require_known_schema(dsn: str) -> None:
    """Raise StartRefused, with the command that helps, unless the schema is this version's."""
    state = await current(dsn)
    if state.empty:
        raise StartRefused("The database holds no lakebus schema. Run `lakebus migrate`.")
    require_ancestor(state)
    if not state.up_to_date:
        raise StartRefused(
            f"The database has the schema {state.revision} with the functions {state.functions};"
            f" this version of lakebus works on {newest_revision()} with {fingerprint()}."
            " Run `lakebus migrate` (make a backup first)."
        )


def require_ancestor(state: SchemaState) -> None:
    """Raise StartRefused for a schema that a newer version made."""
    if state.revision is not None and state.revision not in revisions():
        raise StartRefused(
            f"The database has the schema {state.revision}, which this version of lakebus does not"
            " know: a newer version made it. Install that version, or restore a backup of this one."
        )


async def read_state(connection: Any) -> SchemaState:
    """By a connection of the driver."""
    table = await connection.fetchval(f"SELECT to_regclass('{SCHEMA}.schema_version')")
    if table is None:
        return SchemaState(revision=None, functions=None)
    revision = await connection.fetchval(f"SELECT version_num FROM {SCHEMA}.schema_version")
    comment = await connection.fetchval(
        f"SELECT obj_description(to_regnamespace('{SCHEMA}'), 'pg_namespace')"
    )
    mark = _MARK.search(comment or "")
    return SchemaState(revision=revision, functions=mark[1] if mark else None)


def require_dsn(dsn: str) -> None:
    """Raise StartRefused for what is no DSN of PostgreSQL."""
    if urlsplit(dsn).scheme not in ("postgres", "postgresql"):
        raise StartRefused("The DSN of the database must begin with postgresql://.")


def away(dsn: str, error: BaseException) -> Unavailable:
    """What is said where no connection was to be had, or it broke."""
    parts = urlsplit(dsn)
    return Unavailable(
        f"The database at {parts.hostname}:{parts.port or 5432} cannot be reached: {error}."
    )


@asynccontextmanager
async def _connection(dsn: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    require_dsn(dsn)
    try:
        # No cache: each statement is sent once.
        connection = await asyncpg.connect(dsn, statement_cache_size=0)
        try:
            yield connection
        finally:
            await connection.close()
    except _FAILED as error:
        raise away(dsn, error) from error
