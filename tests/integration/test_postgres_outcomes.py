"""What an error of PostgreSQL says about a write: refused, or not known (A6, C5)."""

from __future__ import annotations

import asyncpg
import pytest

from lakebus.errors import OutcomeUnknown, Unavailable
from storage.postgres.failures import writing


async def _run(connection: asyncpg.Connection[asyncpg.Record], *statements: str) -> None:
    with writing():
        for statement in statements:
            await connection.execute(statement)


async def test_A6_a_statement_that_was_refused_changed_nothing(database_dsn: str) -> None:
    connection = await asyncpg.connect(database_dsn)
    try:
        for statement in ("SELECT 1 / 0", "SET statement_timeout = 10; SELECT pg_sleep(5)"):
            with pytest.raises(Unavailable):
                await _run(connection, statement)
        assert await connection.fetchval("SELECT 1") == 1
    finally:
        await connection.close()


async def test_A6_a_session_that_was_ended_may_have_committed(database_dsn: str) -> None:
    """By its own time limit (PostgreSQL 17 and later), or by somebody else."""

    limited = await asyncpg.connect(database_dsn)
    version = limited.get_server_version().major
    endings: list[tuple[str, ...]] = [("SELECT pg_terminate_backend(pg_backend_pid())",)]
    if version >= 17:
        endings.append(("SET transaction_timeout = 20", "BEGIN", "SELECT pg_sleep(5)"))
    await limited.close()
    for statements in endings:
        connection = await asyncpg.connect(database_dsn)
        with pytest.raises(OutcomeUnknown):
            await _run(connection, *statements)
        connection.terminate()
