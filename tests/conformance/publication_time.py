"""C4: publication times, and times that are closed before they are read."""

from __future__ import annotations

import datetime as dt
import itertools

import pytest

from lakebus.errors import TimeInFuture
from lakebus.schemas import TableSchema
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import LakeHarness


async def test_C4_publication_times_strictly_increase(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 6)
    worker = lake.worker()
    for n in range(6):
        await worker.publish_one()
        if n == 3:
            await lake.create("u")
            await lake.restart()
            worker = lake.worker()
    snapshots = list(await lake.catalog.snapshots(limit=100))[::-1]
    times = [snapshot.published_at for snapshot in snapshots]
    ids = [snapshot.snapshot_id for snapshot in snapshots]
    assert times == sorted(set(times))
    assert ids == list(range(1, len(ids) + 1))
    assert [s.parent_id for s in snapshots] == [None, *ids[:-1]]


async def test_C4_a_time_resolves_to_the_newest_snapshot_at_or_before_it(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 3)
    worker = lake.worker()
    for _ in range(3):
        await lake.advance_s(0.002)
        await worker.publish_one()
    snapshots = list(await lake.catalog.snapshots(limit=100))
    microsecond = dt.timedelta(microseconds=1)
    for newer, older in itertools.pairwise(snapshots):
        assert await lake.catalog.snapshot_at(newer.published_at) == newer
        assert await lake.catalog.snapshot_at(newer.published_at - microsecond) == older


async def test_C4_an_answered_time_is_closed(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 4)
    for n in range(4):
        worker, view = lake.worker(), await lake.second()
        await lake.advance_s(0.002)
        now = (await lake.catalog.head()).now
        answer = await view.catalog.snapshot_at(now)
        published = await worker.publish_one()
        assert published.published_at is not None
        assert published.published_at > now
        if n == 1:
            await lake.restart()  # what was closed stays closed
        assert await lake.catalog.snapshot_at(now) == answer


async def test_C4_a_schema_change_takes_its_time_after_what_is_closed(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.advance_s(0.002)
    now = (await lake.catalog.head()).now
    answer = await lake.catalog.snapshot_at(now)
    await lake.create("u")
    assert (await lake.catalog.head()).published_at > now
    assert await lake.catalog.snapshot_at(now) == answer


async def test_C4_a_time_that_has_not_come_is_not_closed(
    lake: LakeHarness, table: TableSchema
) -> None:
    head = await lake.catalog.head()
    with pytest.raises(TimeInFuture):
        await lake.catalog.snapshot_at(head.now + dt.timedelta(hours=1))
    await lake.accept_many(table, 1)
    published = await lake.worker().publish_one()
    assert published.published_at is not None
    assert published.published_at < head.now + dt.timedelta(hours=1)
