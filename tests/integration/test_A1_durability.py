"""A1: what a receipt promises must not depend on how somebody set PostgreSQL up."""

from __future__ import annotations

import asyncpg
import pytest

from cluster.migrate import upgrade
from lakebus.errors import StartRefused
from storage.bus.settings import BusSettings
from storage.postgres import PostgresLake
from tests.postgres_server import fresh_database, running_postgres


async def test_A1_the_server_refuses_to_start_on_fsync_off() -> None:
    with running_postgres(durable=False) as dsn:
        database = fresh_database(dsn)
        await upgrade(database)
        with pytest.raises(StartRefused, match="fsync=on"):
            await PostgresLake.open(database, bus_settings=BusSettings())


async def test_A1_every_session_commits_synchronously_whatever_the_server_says(
    database_dsn: str,
) -> None:
    connection = await asyncpg.connect(database_dsn)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    await connection.close()
    await upgrade(database_dsn)
    lake = await PostgresLake.open(database_dsn, bus_settings=BusSettings())
    try:
        for pool in lake.pools:
            async with pool.connection() as session:
                assert await session.fetchval("SHOW synchronous_commit") == "on"
    finally:
        await lake.close()
