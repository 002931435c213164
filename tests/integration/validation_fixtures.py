"""Fixtures of the validator's tests: a lake on PostgreSQL, with a table that has a past."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cluster.migrate import upgrade
from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile
from storage.maintenance.interface import SwapOutcome
from tests.integration.validation_rig import ValidatedLake, postgres_lake
from tests.postgres_server import copy_database, drop_database, fresh_database, run_elsewhere


@pytest.fixture(scope="module")
def template(postgres_dsn: str) -> Iterator[str]:
    made = fresh_database(postgres_dsn)
    run_elsewhere(lambda: upgrade(made))
    yield made
    drop_database(made)


@pytest.fixture
async def lake(template: str, tmp_path: Path) -> AsyncIterator[ValidatedLake]:
    dsn = await copy_database(template)
    try:
        async with postgres_lake(dsn, tmp_path) as opened:
            yield opened
    finally:
        await asyncio.to_thread(drop_database, dsn)


@pytest.fixture
async def table(lake: ValidatedLake) -> TableSchema:
    """A table with a past: appends, a compaction, and appends after it."""

    made = await lake.create()
    for _ in range(3):
        await lake.write(made)
    assert await lake.compact(made) is SwapOutcome.PUBLISHED
    await lake.write(made)
    return made


@pytest.fixture
async def file(lake: ValidatedLake, table: TableSchema) -> DataFile:
    return (await lake.upkeep.live_files(table.table_id))[-1]
