"""Connections that stay taken between calls: only sound ones, and never at anybody's expense."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest

from cluster.migrate import upgrade
from lakebus.clock import new_uuid
from lakebus.errors import OutcomeUnknown, Unavailable
from lakebus.schemas import Column
from storage.bus.settings import BusSettings
from storage.postgres import PostgresLake
from storage.postgres.failures import writing
from storage.postgres.pool import Pool, PoolSettings
from tests.conformance.harness import entry_of
from tests.faults.proxy import Act, Proxy, Rule
from tests.matrix.connection_rig import own_server
from tests.postgres_server import run_elsewhere

_PID = "SELECT pg_backend_pid()"


@pytest.fixture
async def pool(postgres_dsn: str) -> AsyncIterator[Pool]:
    made = Pool(postgres_dsn, name="tested", settings=PoolSettings(size_max=1))
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def wide_pool(postgres_dsn: str) -> AsyncIterator[Pool]:
    made = Pool(postgres_dsn, name="tested", settings=PoolSettings(size_max=4))
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


# --- servers that go and come back ----------------------------------------------------------------


def end_unseen(dsn: str, *pids: int) -> None:
    """Ends sessions while our event loop stands still, so that it has read nothing of their end."""

    async def end() -> None:
        other = await asyncpg.connect(dsn)
        try:
            for one in pids:
                assert await other.fetchval("SELECT pg_terminate_backend($1, 10000)", one)
        finally:
            await other.close()

    run_elsewhere(end)


async def write(pool: Pool, statement: str = _PID) -> int:
    """As calls do whose commit matters."""
    async with pool.connection() as connection:
        with writing():
            found = await connection.fetchval(statement)
    assert isinstance(found, int)
    return found


async def several(pool: Pool, count: int) -> set[int]:
    """So many sessions, which then lie idle side by side."""

    async def one() -> int:
        async with pool.connection() as connection:
            await here.wait()
            found = await connection.fetchval(_PID)
            assert isinstance(found, int)
            return found

    here = asyncio.Barrier(count)
    return set(await asyncio.gather(*(one() for _ in range(count))))


async def test_A6_a_session_ended_while_idle_costs_nobody_an_answer(
    wide_pool: Pool, postgres_dsn: str
) -> None:
    """Not even when the loop has had no turn since: a write would be lost, its outcome unknown."""
    first = await several(wide_pool, 4)
    assert len(first) == 4
    end_unseen(postgres_dsn, *first)
    for _ in range(4):
        assert await write(wide_pool) not in first


async def test_A6_a_session_ended_while_it_worked_is_unknown_and_the_next_call_works(
    wide_pool: Pool, postgres_dsn: str
) -> None:
    first = await several(wide_pool, 3)
    with pytest.raises(OutcomeUnknown):
        await write(wide_pool, "SELECT pg_terminate_backend(pg_backend_pid())")
    # The server has said why: it is there, and so are the other sessions.
    assert await pid(wide_pool) in first


async def test_a_session_that_the_servers_idle_limit_ended_is_not_used(postgres_dsn: str) -> None:
    pool = Pool(
        f"{postgres_dsn}?idle_session_timeout=50", name="idle", settings=PoolSettings(size_max=1)
    )
    await pool.open()
    try:
        first = await pid(pool)

        async def gone() -> None:
            other = await asyncpg.connect(postgres_dsn)
            try:
                while await other.fetchval("SELECT 1 FROM pg_stat_activity WHERE pid = $1", first):
                    await asyncio.sleep(0.01)  # an end gives no signal
            finally:
                await other.close()

        run_elsewhere(gone)
        assert await write(pool) != first
    finally:
        await pool.close()


async def test_a_restarted_server_is_unavailable_while_it_is_away_and_nothing_is_unknown() -> None:
    server = own_server()
    run_elsewhere(server.start)
    try:
        pool = Pool(server.dsn, name="tested", settings=PoolSettings(size_max=3))
        await pool.open()
        try:
            first = await several(pool, 3)
            run_elsewhere(server.stop)
            for _ in range(3):
                with pytest.raises(Unavailable):
                    await write(pool)
            run_elsewhere(server.start)
            assert await write(pool) not in first
        finally:
            await pool.close()
    finally:
        run_elsewhere(server.stop)


async def test_B11_one_call_finds_that_the_server_vanished_and_the_next_does_not_wait(
    postgres_dsn: str,
) -> None:
    """Half-open connections: whatever is sent on them vanishes, and new ones reach a server."""
    async with Proxy.before(postgres_dsn) as proxy:
        settings = PoolSettings(size_max=4, statement_ms=300)
        pool = Pool(proxy.dsn(postgres_dsn), name="tested", settings=settings)
        await pool.open()
        try:
            first = await several(pool, 4)
            # Strikes the connections that are open, none to come.
            proxy.arm(Rule(act=Act.DROP, times=None)).lift()
            with pytest.raises(OutcomeUnknown):
                await write(pool)
            began_s = time.monotonic()
            assert await pid(pool) not in first
            assert time.monotonic() - began_s < settings.command_s
        finally:
            await pool.close()


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
