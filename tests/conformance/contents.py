"""All that a lake's database holds, taken out and put back: a backup and its restore for tests.

Much quicker than copies of databases, whose dropping waits for a checkpoint of the whole server. A
database that is rolled back for real, files and all, is in `tests/matrix/test_rewind.py`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import asyncpg

from storage.names import SCHEMA
from storage.tables import metadata

_SEQUENCES = "SELECT sequencename FROM pg_sequences WHERE schemaname = $1"
_TABLES = [table.name for table in metadata.sorted_tables]


@dataclass(frozen=True, slots=True)
class Contents:
    """`tables` in PostgreSQL's binary copy format; `sequences` as (last value, is called)."""

    tables: dict[str, bytes]
    sequences: dict[str, tuple[int, bool]]


async def read_contents(connection: asyncpg.Connection[asyncpg.Record]) -> Contents:
    """As of one instant: what is committed later is in no part of it."""

    tables = {}
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        names = [row["sequencename"] for row in await connection.fetch(_SEQUENCES, SCHEMA)]
        for name in _TABLES:
            copied = io.BytesIO()
            await connection.copy_from_table(
                name, schema_name=SCHEMA, output=copied, format="binary"
            )
            tables[name] = copied.getvalue()
    sequences = {}
    for name in names:
        row = await connection.fetchrow(f"SELECT last_value, is_called FROM {SCHEMA}.{name}")
        assert row is not None
        sequences[name] = (row["last_value"], row["is_called"])
    return Contents(tables, sequences)


async def write_contents(
    connection: asyncpg.Connection[asyncpg.Record], contents: Contents
) -> None:
    """Nobody may use the lake meanwhile; who only looks at it may be in the way of the locks."""

    while True:
        try:
            return await _write(connection, contents)
        except asyncpg.DeadlockDetectedError:
            continue  # it was rolled back, and whoever looked has seen what he looked for


async def _write(connection: asyncpg.Connection[asyncpg.Record], contents: Contents) -> None:
    async with connection.transaction():
        await connection.execute(
            "TRUNCATE " + ", ".join(f"{SCHEMA}.{name}" for name in contents.tables)
        )
        for name, copied in contents.tables.items():
            await connection.copy_to_table(
                name, schema_name=SCHEMA, source=io.BytesIO(copied), format="binary"
            )
        for name, (value, is_called) in contents.sequences.items():
            await connection.execute(
                "SELECT setval($1::text::regclass, $2, $3)", f"{SCHEMA}.{name}", value, is_called
            )
