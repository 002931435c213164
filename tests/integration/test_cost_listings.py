"""What a page of a listing reads of PostgreSQL, counted, when there is a long history behind it.

Sessions keep one generic plan a statement (`storage.postgres.pool`), so a condition like "$1 IS
NULL OR id < $1" cannot be a bound of an index: each page would read all that is newer, too.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial

import asyncpg
import pytest

from cluster.migrate import upgrade
from storage.bus.settings import BusSettings
from storage.maintenance.jobs import JobKind
from storage.postgres import PostgresLake
from storage.postgres.rewind import GuardSettings
from tests.postgres_server import drop_database, fresh_database, run_elsewhere

HISTORY = 100_000
#: Rows of one page.
PAGE = 20
#: Rows and index entries that a page may read: of each state one page, and what lies about.
READ_MAX = 8 * PAGE
_BEGAN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
_MIDDLE = _BEGAN + dt.timedelta(seconds=HISTORY / 2)
_FILL = (
    """INSERT INTO audit (at, principal, action, subject, detail)
       SELECT $1::timestamptz, 'p', 'a', 's', '{}' FROM generate_series(1, $2::integer)""",
    """INSERT INTO bus_quarantine (kind, history_serial, shard, position, principal_id, target,
                                   table_ids, rows, reason, attempts, by_crash, created_at)
       SELECT 'rejects', 1, 0, g, 1, 't', '{1}', 1, 'why', 1, false, $1::timestamptz
         FROM generate_series(1, $2::integer) g""",
    """INSERT INTO job (job_id, kind, parameters, dry_run, requested_by, state, attempt, epoch,
                        not_before, created_at, ended_at, report)
       SELECT gen_random_uuid(), 'compact', '{}', false, 'p', 'done', 1, 1, a, a, a, '{}'
         FROM generate_series(1, $2::integer) g,
              LATERAL (SELECT $1::timestamptz + g * interval '1 second' AS a)""",
    """INSERT INTO condemned_file (file_id, object_key, reason, state, condemned_at)
       SELECT gen_random_uuid(), 'k' || g, 'unreferenced',
              (ARRAY['condemned', 'deleting', 'deleted'])[1 + g % 3],
              $1::timestamptz + g * interval '1 second' FROM generate_series(1, $2::integer) g""",
)
_READ = """
SELECT ((SELECT sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))
           FROM pg_stat_user_tables WHERE relname = $1)
      + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname = $1))::bigint"""
_HAND_IN = "SELECT pg_stat_force_next_flush()"


@pytest.fixture(scope="module")
def filled(postgres_dsn: str) -> Iterator[str]:
    dsn = fresh_database(postgres_dsn)

    async def fill() -> None:
        await upgrade(dsn)
        connection = await asyncpg.connect(dsn, server_settings={"search_path": "lakebus"})
        try:
            for statement in _FILL:
                await connection.execute(statement, _BEGAN, HISTORY)
            await connection.execute("VACUUM ANALYZE")
        finally:
            await connection.close()

    try:
        run_elsewhere(fill)
        yield dsn
    finally:
        drop_database(dsn)


@pytest.fixture
async def lake(filled: str) -> AsyncIterator[PostgresLake]:
    opened = await PostgresLake.open(
        filled,
        bus_settings=BusSettings(),
        guard_settings=GuardSettings(marker_s=3_600, check_s=3_600),
    )
    yield opened
    await opened.close()


async def rows_read(
    lake: PostgresLake, relation: str, call: Callable[[], Awaitable[Sequence[object]]]
) -> int:
    """By the call, once its statement is prepared. It and what hands in the count are one after the
    other, so one kept session serves both."""

    async def counted() -> int:
        async with lake.pools[0].connection() as connection:
            await connection.execute(_HAND_IN)
            return int(await connection.fetchval(_READ, relation))

    await call()
    before = await counted()
    assert len(await call()) == PAGE
    return await counted() - before


async def test_P9_a_page_of_the_audit_log_reads_that_page(lake: PostgresLake) -> None:
    for before in (None, HISTORY // 2):
        read = await rows_read(
            lake, "audit", partial(lake.keys.audit_records, limit=PAGE, before=before)
        )
        assert PAGE <= read <= READ_MAX


async def test_P9_a_page_of_the_quarantine_reads_that_page(lake: PostgresLake) -> None:
    for before in (None, HISTORY // 2):
        read = await rows_read(
            lake,
            "bus_quarantine",
            partial(lake.bus.quarantine_items, limit=PAGE, before=before),
        )
        assert PAGE <= read <= READ_MAX


async def test_P9_one_item_of_the_quarantine_is_looked_up(lake: PostgresLake) -> None:
    async def twenty() -> Sequence[object]:
        found = [await lake.bus.quarantine_item(n) for n in range(1, PAGE + 1)]
        assert [one.quarantine_id for one in found if one is not None] == list(range(1, PAGE + 1))
        return found

    assert PAGE <= await rows_read(lake, "bus_quarantine", twenty) <= READ_MAX


@pytest.mark.parametrize("kind", [None, JobKind.COMPACT])
async def test_P9_a_page_of_the_jobs_reads_that_page(
    lake: PostgresLake, kind: JobKind | None
) -> None:
    for before in (None, _MIDDLE):
        read = await rows_read(
            lake, "job", partial(lake.jobs.jobs, limit=PAGE, before=before, kind=kind)
        )
        assert PAGE <= read <= READ_MAX


@pytest.mark.parametrize("state", [None, "condemned", "deleted"])
async def test_P9_a_page_of_the_condemned_files_reads_that_page(
    lake: PostgresLake, state: str | None
) -> None:
    for before in (None, _MIDDLE):
        found = await lake.upkeep.condemned(state=state, limit=PAGE, before=before)
        ages = [file.condemned_at for file in found]
        newest = _BEGAN + dt.timedelta(seconds=HISTORY) if before is None else before
        assert ages == sorted(ages, reverse=True)
        assert newest - ages[0] <= dt.timedelta(seconds=3)
        assert ages[0] - ages[-1] <= dt.timedelta(seconds=PAGE * (1 if state is None else 3))
        read = await rows_read(
            lake,
            "condemned_file",
            partial(lake.upkeep.condemned, state=state, limit=PAGE, before=before),
        )
        assert PAGE <= read <= READ_MAX
