"""Compaction and retention on PostgreSQL while rows keep coming: what each snapshot answers stays
the same (D8), rows keep their places (D12), nobody waits for a rewrite (C7)."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from cluster.migrate import upgrade
from lakebus.clock import SystemClock
from lakebus.schemas import TableSchema
from storage.bus.settings import BusSettings
from storage.files.objects import LocalObjectStore
from storage.maintenance import swapping
from storage.maintenance.rewrite import rewrite
from storage.maintenance.rewriting import RewriteRequest, Rewritten
from storage.postgres import PostgresLake
from tests.unit.compaction_rig import SETTINGS, Lake, Row

QUERIES = (
    "SELECT count(*), sum(id), min(ts), max(note) FROM t",
    "SELECT id % 7, count(*), sum(length(note)) FROM t GROUP BY 1 ORDER BY 1",
    "SELECT * FROM t ORDER BY 1, 2, 3",
)
_OPEN = """
SELECT count(*) FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
   AND backend_type = 'client backend'"""
DAY = dt.timedelta(days=1)


@pytest.fixture
async def lake(database_dsn: str, tmp_path: Path) -> AsyncIterator[Lake]:
    await upgrade(database_dsn)
    store = LocalObjectStore(tmp_path / "objects")
    opened = await PostgresLake.open(
        database_dsn, bus_settings=BusSettings(shards=2), object_store=store
    )
    try:
        yield Lake(
            bus=opened.bus,
            catalog=opened.catalog,
            upkeep=opened.upkeep,
            folder=tmp_path,
            store=store,
            settings=dataclasses.replace(SETTINGS, snapshot_keep_s=0.0, snapshot_keep_count=20),
        )
    finally:
        await opened.close()
        store.close()


class Writer:
    """Rows that keep coming, one file an entry, and what snapshots answered when they were new."""

    def __init__(self, lake: Lake, table: TableSchema) -> None:
        self._lake, self._table = lake, table
        self._stop = asyncio.Event()
        self._wrote = asyncio.Condition()
        self.written: list[int] = []
        self.answers: dict[int, list[list[Row]]] = {}

    async def write(self, age_days: float = 0.0) -> None:
        number = len(self.written)
        ids = range(number, number + 3)
        ts = SystemClock().utc_now() - age_days * DAY
        await self._lake.write(self._table, ids, ts=ts)
        self.written += ids
        async with self._wrote:
            self._wrote.notify_all()

    async def more(self, entries: int) -> None:
        """Waits until so many more have been written."""

        wanted = len(self.written) + 3 * entries
        async with self._wrote:
            await self._wrote.wait_for(lambda: len(self.written) >= wanted)

    async def look(self) -> None:
        at = await self._lake.head_id()
        self.answers[at] = await self._lake.answers(self._table, QUERIES, at)

    async def run(self) -> None:
        while not self._stop.is_set():
            await self.write()

    def stop(self) -> None:
        self._stop.set()

    async def check(self, *, oldest: int = 0) -> int:
        """Every answer again; how many were compared."""

        compared = 0
        for at, wanted in self.answers.items():
            if at >= oldest:
                assert await self._lake.answers(self._table, QUERIES, at) == wanted, at
                compared += 1
        return compared


async def test_D8_answers_stay_the_same_before_during_and_after_while_rows_keep_coming(
    lake: Lake,
) -> None:
    """The trap of DuckLake #673, where a flush changed history."""

    rule = {"rows": {"column": "ts", "for_s": 30 * 86_400}}
    table = await lake.create(retention=rule)
    writer = Writer(lake, table)
    for number in range(24):
        await writer.write(age_days=90.0 if number % 3 == 0 else 0.0)
        if number % 4 == 3:
            await writer.look()
    task = asyncio.create_task(writer.run())
    totals = {"swaps": 0, "swaps_lost": 0}
    try:
        for _ in range(3):
            await writer.more(8)
            report = await lake.compact()
            await writer.look()
            await writer.check()
            totals = {name: totals[name] + report[name] for name in totals}
    finally:
        writer.stop()
        await task
    # The trap of Iceberg #4996: each round committed although files came in all the time.
    assert totals["swaps"] >= 3
    assert totals["swaps_lost"] == 0
    rows = await lake.rows(table)
    assert sorted(row[3] for row in rows) == sorted(writer.written)
    assert len({row[:3] for row in rows}) == len(rows)  # D12: each place once

    before = rows
    report = await lake.retain(table=table.table_id)
    assert report["rows_removed"] == 24
    limit = SystemClock().utc_now().replace(tzinfo=None) - 30 * DAY
    assert await lake.rows(table) == [row for row in before if row[4] >= limit]
    await writer.look()
    assert await writer.check() == len(writer.answers)

    expired = await lake.retain()
    oldest = expired["snapshots"]["oldest_snapshot_id"]
    assert expired["snapshots"]["first"] is not None
    assert 0 < await writer.check(oldest=oldest) < len(writer.answers)


async def test_no_transaction_is_open_while_files_are_rewritten(
    lake: Lake, database_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap of DuckLake #1463: a merge that keeps the catalog's transaction open."""

    table = await lake.create()
    writer = Writer(lake, table)
    for _ in range(8):
        await writer.write()
    seen: list[int] = []

    async def open_transactions() -> int:
        connection = await asyncpg.connect(database_dsn)
        try:
            return int(await connection.fetchval(_OPEN))
        finally:
            await connection.close()

    def watched(request: RewriteRequest) -> Rewritten:
        seen.append(asyncio.run(open_transactions()))
        return rewrite(request)

    monkeypatch.setattr(swapping, "rewrite", watched)
    report = await lake.compact()
    assert report["swaps"] == 1
    assert seen == [0]


async def test_C7_two_compactors_at_once_only_lose_work(lake: Lake) -> None:
    table = await lake.create()
    writer = Writer(lake, table)
    for _ in range(30):
        await writer.write()
    await writer.look()
    before = await lake.rows(table)
    reports = await asyncio.gather(*(lake.compact() for _ in range(3)))
    assert sum(report["swaps"] for report in reports) >= 1
    assert await lake.rows(table) == before
    assert await writer.check() == 1
    named = {file.file_id for file in await lake.live(table)}
    assert len(named) == 1


async def test_E2_retention_and_compaction_at_once_end_with_the_right_rows(lake: Lake) -> None:
    rule = {"rows": {"column": "ts", "for_s": 30 * 86_400}}
    table = await lake.create(retention=rule)
    writer = Writer(lake, table)
    for number in range(16):
        await writer.write(age_days=90.0 if number % 2 else 0.0)
    young = [i for n in range(0, 16, 2) for i in range(3 * n, 3 * n + 3)]
    await asyncio.gather(lake.compact(), lake.retain(), lake.compact(), lake.retain())
    await lake.retain()
    assert sorted(row[3] for row in await lake.rows(table)) == young


async def test_E4_a_rewrite_that_dies_leaves_only_intents(
    lake: Lake, database_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = await lake.create()
    writer = Writer(lake, table)
    for _ in range(8):
        await writer.write()
    files, before = await lake.live(table), await lake.rows(table)

    class _Died(BaseException):
        pass

    async def dies(*_: Any) -> Any:
        raise _Died

    monkeypatch.setattr(swapping, "publish_once", dies)
    with pytest.raises(_Died):
        await lake.compact()
    assert await lake.live(table) == files
    assert await lake.rows(table) == before
    known = {file.file_id for file in files}
    intents = {intent.file_id for intent in await lake.upkeep.intents()}
    found = set()
    async for key, _ in lake.store.list("tables/"):
        found.add(uuid.UUID(Path(key).stem))
    assert found - known
    assert found - known <= intents
