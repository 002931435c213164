"""Connections that stay taken between calls: only sound ones, and never at anybody's expense."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from cluster.migrate import upgrade
from lakebus.clock import new_uuid
from lakebus.schemas import Column
from storage.bus.settings import BusSettings
from storage.postgres import PostgresLake
from storage.postgres.pool import Pool, PoolSettings
from tests.conformance.harness import entry_of

_PID = "SELECT pg_backend_pid()"


@pytest.fixture
async def pool(postgres_dsn: str) -> AsyncIterator[Pool]:
    made = Pool(postgres_dsn, name="tested", settings=PoolSettings(size_max=1))
    await made.open()
    yield made
    await made.close()


async def pid(pool: Pool) -> int:
    async with pool.connection() as connection:
        found = await connection.fetchval(_PID)
    assert isinstance(found, int)
    return found


async def test_a_session_serves_one_call_after_the_other_and_those_who_wait(pool: Pool) -> None:
    first = await pid(pool)
    assert {await pid(pool), *await asyncio.gather(*(pid(pool) for _ in range(20)))} == {first}


async def test_a_session_that_ended_while_nobody_used_it_is_not_used(
    pool: Pool, postgres_dsn: str
) -> None:
    first = await pid(pool)
    other = await asyncpg.connect(postgres_dsn)
    try:
        await other.execute("SELECT pg_terminate_backend($1, 10000)", first)
    finally:
        await other.close()
    second = await pid(pool)
    assert second != first
    assert await pid(pool) == second


async def test_a_session_whose_call_failed_goes_back_without_its_transaction(pool: Pool) -> None:
    async def fail() -> None:
        async with pool.connection() as connection:
            await connection.execute("BEGIN")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    async with pool.connection() as connection:
        assert not connection.is_in_transaction()
        await connection.execute("BEGIN")  # a call that ends well and leaves it open
    async with pool.connection() as connection:
        assert not connection.is_in_transaction()


async def test_F3_no_session_outlives_the_line_of_history_it_was_made_for(pool: Pool) -> None:
    first = await pid(pool)
    async with pool.connection() as used:
        await pool.renew()
        assert await used.fetchval(_PID) == first  # it ends with its call
    second = await pid(pool)
    await pool.renew()
    assert len({first, second, await pid(pool)}) == 3


async def test_P6_a_claim_of_a_lone_small_entry_brings_its_bytes(database_dsn: str) -> None:
    await upgrade(database_dsn)
    lake = await PostgresLake.open(database_dsn, bus_settings=BusSettings())
    try:
        table = (
            await lake.catalog.create_table(name="t", columns=(Column(0, "id", "bigint"),))
        ).schema
        await lake.bus.append(entry_of(table, [7]))
        claim = await lake.bus.claim(new_uuid())
        assert claim is not None
        assert not claim.more
        assert claim.brought is not None
        assert list(await lake.bus.read(claim)) == [claim.brought]
    finally:
        await lake.close()
