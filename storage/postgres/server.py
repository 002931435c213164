"""What a PostgreSQL server must be and have for the contract to hold on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import asyncpg

from lakebus.errors import StartRefused
from storage.postgres.failures import reading
from storage.postgres.rewind_acceptance import connection_to

MAJOR_MIN = 15
#: From this major version on the server itself ends a transaction whose client stopped between
#: two messages of one call, which no idle timeout covers. On 15 and 16 a client that is paused in
#: just these microseconds holds its locks until it goes on or its connection breaks.
TRANSACTION_TIMEOUT_SINCE = 17
_FACTS = """
SELECT name, setting FROM pg_settings
 WHERE name IN ('fsync', 'full_page_writes', 'server_version_num', 'server_version')"""


@dataclass(frozen=True, slots=True)
class ServerFound:
    """`gap` says which promise does not hold on this version, and what to do; empty: all hold."""

    version: str
    gap: str = ""


async def examine_server(connection: asyncpg.Connection[asyncpg.Record]) -> ServerFound:
    """Raises StartRefused on a server on which acknowledged rows could be lost (contract A1), or
    whose version is too old."""

    rows = await connection.fetch(_FACTS)
    return judge_server({row["name"]: row["setting"] for row in rows})


async def look_at_server(dsn: str) -> ServerFound:
    """The same by a connection of its own, whatever the database holds. Raises Unavailable, too."""

    async with connection_to(dsn) as connection:
        with reading():
            return await examine_server(connection)


def judge_server(facts: Mapping[str, str]) -> ServerFound:
    """`facts` are settings by name, as `pg_settings` has them. Raises StartRefused."""

    if facts["fsync"] != "on":
        raise StartRefused(
            "PostgreSQL runs with fsync=off, so a power failure would lose acknowledged rows: set "
            "fsync=on in postgresql.conf, restart PostgreSQL, then start lakebus again"
        )
    if facts["full_page_writes"] != "on":
        raise StartRefused(
            "PostgreSQL runs with full_page_writes=off, so a power failure could damage pages: set "
            "full_page_writes=on in postgresql.conf, restart PostgreSQL, then start lakebus again"
        )
    major = int(facts["server_version_num"]) // 10_000
    if major < MAJOR_MIN:
        raise StartRefused(
            f"PostgreSQL {major} is too old: lakebus works with 15 to 18; point the DSN at one"
        )
    gap = ""
    if major < TRANSACTION_TIMEOUT_SINCE:
        gap = (
            f"PostgreSQL {major} cannot end the transaction of a client that is paused in the "
            "middle of a call: such a client stops its shard, or publishing, until it goes on or "
            f"its connection breaks. PostgreSQL {TRANSACTION_TIMEOUT_SINCE} and newer end it after "
            "2.5 s"
        )
    return ServerFound(facts["server_version"], gap)
