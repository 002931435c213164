"""The dumps of the end state tell the truth of both backends, and the checker understands them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import asyncpg
import pytest

from tests.conformance.harness import SUITE_SETTINGS, Backend, LakeHarness
from tests.conformance.memory import MemoryHarness
from tests.conformance.postgres import PostgresHarness, postgres_backend
from tests.history.anomalies import Kind
from tests.history.checker import Verdict, check
from tests.history.end_state import EndState, dump_memory, dump_postgres, read_database
from tests.history.lake_run import LakeRun
from tests.history.recorder import Recorder

Dump = Callable[[], Awaitable[EndState]]


@pytest.fixture(scope="module")
def postgres(postgres_dsn: str) -> Iterator[Backend]:
    with postgres_backend(postgres_dsn) as backend:
        yield backend


async def _run(lake: LakeHarness, dump: Dump, *, seed: int, restore: bool = False) -> LakeRun:
    """A whole run; with `restore` a part of it is lost on the way."""
    run = LakeRun(lake, Recorder.in_memory(seed=seed), seed=seed)
    await run.start()
    await run.run(40)
    await lake.restart()
    await run.run(20)
    if restore:
        backup = await lake.take_backup()
        await run.run(20)
        await lake.restore(backup)
        run.token = None  # it may name a snapshot that was lost
        await run.run(30)
    await run.finish()
    assert (await dump()).entries
    return run


def _judge(run: LakeRun, end_state: EndState) -> Verdict:
    return check(run.recorder.history(), end_state)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("seed", range(8))
async def test_a_memory_lake_is_dumped_truly(seed: int, restore: bool) -> None:
    lake = MemoryHarness(SUITE_SETTINGS)

    async def dump() -> EndState:
        return dump_memory(lake.lake, drained=True)

    run = await _run(lake, dump, seed=seed, restore=restore)
    end_state = await dump()
    verdict = _judge(run, end_state)
    assert verdict.ok, str(verdict)
    assert len(end_state.lines) == 1 + restore
    assert sum(row.hi - row.lo for row in end_state.ranges) == len(end_state.entries)
    assert end_state.quarantined


async def test_a_memory_lake_that_forgets_is_seen() -> None:
    lake = MemoryHarness(SUITE_SETTINGS)

    async def dump() -> EndState:
        return dump_memory(lake.lake, drained=True)

    run = await _run(lake, dump, seed=1)
    state = lake.lake.state
    del state.files[next(iter(state.files))]
    assert _judge(run, await dump()).kinds == {Kind.DANGLING_FILE}
    shard = next(shard for shard in state.shards if shard.log)
    del shard.log[max(shard.log)]
    shard.end = shard.watermark = shard.end - 1
    assert Kind.LOST_WRITE in _judge(run, await dump()).kinds


async def test_purged_positions_are_not_missed() -> None:
    lake = MemoryHarness(SUITE_SETTINGS)

    async def dump() -> EndState:
        return dump_memory(lake.lake, drained=True)

    run = await _run(lake, dump, seed=2)
    await lake.advance_s(2 * SUITE_SETTINGS.idempotency_window_s)
    await lake.bus.purge()
    end_state = await dump()
    assert end_state.entries == ()
    assert sum(hi - lo for _, lo, hi in end_state.purged) == sum(s.end for s in end_state.shards)
    verdict = _judge(run, end_state)
    assert verdict.ok, str(verdict)


# --- PostgreSQL ----------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", [False, True])
async def test_a_database_is_dumped_truly(postgres: Backend, restore: bool) -> None:
    async with postgres.open(SUITE_SETTINGS) as lake:
        assert isinstance(lake, PostgresHarness)
        dsn = lake.dsn

        async def dump() -> EndState:
            return await dump_postgres(dsn, drained=True)

        run = await _run(lake, dump, seed=3, restore=restore)
        end_state = await dump()
        verdict = _judge(run, end_state)
        assert verdict.ok, str(verdict)
        assert len(end_state.lines) == 1 + restore
        assert end_state.quarantined


#: What goes wrong in the database, and what the checker says to it.
_DAMAGES = [
    (
        """DELETE FROM lakebus.data_file WHERE file_id =
           (SELECT file_id FROM lakebus.data_file ORDER BY first_snapshot LIMIT 1)""",
        Kind.DANGLING_FILE,
    ),
    (
        """UPDATE lakebus.published_range SET hi = hi - 1 WHERE (shard, lo) =
           (SELECT shard, lo FROM lakebus.published_range ORDER BY shard, lo LIMIT 1)""",
        Kind.WATERMARK_HOLE,
    ),
    (
        """UPDATE lakebus.snapshot SET watermark = array_fill(0::bigint, ARRAY[3])
            WHERE snapshot_id = (SELECT max(snapshot_id) FROM lakebus.snapshot)""",
        Kind.WATERMARK_REGRESSION,
    ),
    ("DELETE FROM lakebus.bus_quarantine WHERE kind = 'entry'", Kind.LOST_WRITE),
]


async def test_damage_in_a_database_is_seen(postgres: Backend) -> None:
    async with postgres.open(SUITE_SETTINGS) as lake:
        assert isinstance(lake, PostgresHarness)
        dsn = lake.dsn

        async def dump() -> EndState:
            return await dump_postgres(dsn, drained=True)

        run = await _run(lake, dump, seed=5)
        connection = await asyncpg.connect(dsn)
        try:
            for statement, kind in _DAMAGES:
                transaction = connection.transaction()
                await transaction.start()
                await connection.execute(statement)
                damaged = await read_database(connection, drained=True)
                await transaction.rollback()
                verdict = _judge(run, damaged)
                assert kind in verdict.kinds, f"{statement}: {verdict}"
            assert _judge(run, await dump()).ok
        finally:
            await connection.close()
