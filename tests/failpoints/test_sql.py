"""SQL failpoints, and that a normal lake has none of them."""

from __future__ import annotations

import asyncio
import time

import asyncpg
import pytest

from cluster.migrate import upgrade
from cluster.schema_state import current, require_known_schema
from storage.sql import install_statements
from tests.failpoints.markers import all_markers, sql_with_calls
from tests.failpoints.sql import (
    SqlBarrier,
    SqlDelay,
    SqlError,
    SqlFailpoints,
    SqlPause,
    SqlTerminate,
    install_sql_failpoints,
)

A, B = "publish.after_head_lock", "publish.after_fence"
_FUNCTIONS = """
SELECT p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')' AS name, p.prosrc
  FROM pg_proc p WHERE p.pronamespace = 'lakebus'::regnamespace ORDER BY 1"""


async def functions(dsn: str) -> dict[str, str]:
    connection = await asyncpg.connect(dsn)
    try:
        return {row["name"]: row["prosrc"] for row in await connection.fetch(_FUNCTIONS)}
    finally:
        await connection.close()


async def test_a_normal_lake_holds_no_call_and_a_marked_one_differs_in_the_markers_alone(
    database_dsn: str,
) -> None:
    await upgrade(database_dsn)
    normal = await functions(database_dsn)
    assert len(normal) > 10
    assert not [name for name, source in normal.items() if "reach_failpoint" in source]
    assert not [name for name in normal if "failpoint" in name]

    state = await current(database_dsn)
    await install_sql_failpoints(database_dsn)
    marked = await functions(database_dsn)
    calls = sum(source.count("reach_failpoint(") for name, source in marked.items())
    assert calls == sum(marker.in_sql for marker in all_markers().values())
    for name, source in normal.items():
        assert marked[name] == sql_with_calls(source)
    # The product takes the database for its own: nothing is installed over the failpoints.
    await require_known_schema(database_dsn)
    assert await upgrade(database_dsn) == state
    assert await functions(database_dsn) == marked


def test_markers_stand_only_where_a_statement_may() -> None:
    for script in install_statements():
        changed = sql_with_calls(script)
        assert len(changed.splitlines()) == len(script.splitlines())


@pytest.fixture
async def marked_dsn(database_dsn: str) -> str:
    await upgrade(database_dsn)
    await install_sql_failpoints(database_dsn)
    return database_dsn


async def reach(dsn: str, name: str = A, *, times: int = 1) -> float:
    """Seconds that so many arrivals took, each in a transaction of its own."""
    connection = await asyncpg.connect(dsn)
    began = time.monotonic()
    try:
        for _ in range(times):
            await connection.execute(f"SELECT lakebus.reach_failpoint('{name}')")
    finally:
        connection.terminate()
    return time.monotonic() - began


async def test_errors_come_after_skip_and_survive_their_rollback(marked_dsn: str) -> None:
    async with SqlFailpoints(marked_dsn) as sql:
        await sql.arm(A, SqlError("40P01"), skip=1, times=2)
        await reach(marked_dsn)
        for count in (1, 2):
            with pytest.raises(asyncpg.DeadlockDetectedError, match=A):
                await reach(marked_dsn)
            assert await sql.hits(A) == count
        await reach(marked_dsn, times=3)
        assert await sql.hits(A) == 2
        await sql.arm(A, SqlError("40001"))
        with pytest.raises(asyncpg.SerializationError):
            await reach(marked_dsn)


async def test_a_backend_ends_its_own_connection(marked_dsn: str) -> None:
    async with SqlFailpoints(marked_dsn) as sql:
        await sql.arm(A, SqlTerminate())
        with pytest.raises(asyncpg.ConnectionDoesNotExistError, match="administrator"):
            await reach(marked_dsn)


async def test_a_delay_and_a_pause_hold_one_and_no_other(marked_dsn: str) -> None:
    async with SqlFailpoints(marked_dsn) as sql:
        await sql.arm(A, SqlDelay(0.05))
        assert await reach(marked_dsn) >= 0.05
        assert await reach(marked_dsn) < 0.05

        await sql.arm(A, SqlPause())
        held = asyncio.create_task(reach(marked_dsn))
        await sql.reached(A)
        await reach(marked_dsn)
        assert not held.done()
        await sql.resume(A)
        await held

        await sql.arm(A, SqlPause())
        held = asyncio.create_task(reach(marked_dsn))
        await sql.reached(A)
        await sql.disarm(A)
        await held


async def test_a_pause_that_nobody_ends_fails(marked_dsn: str) -> None:
    async with SqlFailpoints(marked_dsn) as sql:
        await sql.arm(A, SqlPause(within_s=0.02))
        with pytest.raises(asyncpg.RaiseError, match="nobody resumed"):
            await reach(marked_dsn)


async def test_a_barrier_opens_for_each_round(marked_dsn: str) -> None:
    async with SqlFailpoints(marked_dsn) as sql:
        await sql.arm(A, SqlBarrier(2), times=None)
        first = asyncio.create_task(reach(marked_dsn, times=5))
        await sql.reached(A)
        assert not first.done()
        await asyncio.gather(first, reach(marked_dsn, times=5))
        assert await sql.hits(A) == 10
        await sql.arm(A, SqlBarrier(2, within_s=0.02))
        with pytest.raises(asyncpg.RaiseError, match="did not come"):
            await reach(marked_dsn)


async def test_armed_and_never_reached_is_a_failure(marked_dsn: str) -> None:
    async def forget_one() -> None:
        async with SqlFailpoints(marked_dsn) as sql:
            await sql.arm(A, SqlDelay(0))
            await sql.arm(B, SqlError("40001"))
            await reach(marked_dsn)

    with pytest.raises(AssertionError, match=f"never reached: {B}"):
        await forget_one()
    await reach(marked_dsn, B)  # and nothing stays armed
