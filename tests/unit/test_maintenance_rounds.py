"""What one compaction takes on, what it publishes together, and what a further attempt knows."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lakebus.schemas import TableSchema
from storage.maintenance.compaction import compact
from storage.maintenance.interface import SwapOperation
from storage.maintenance.jobs import Job, JobKind
from storage.maintenance.retention import retain
from storage.maintenance.swapping import SwapWork, run_swap
from tests.unit.compaction_rig import NOW, SETTINGS, Lake, at_publish, filled, job_of, memory_lake

DAYS = tuple(f'{{"day(ts)": "2026-06-0{day}"}}' for day in (1, 2, 3))


class Killed(Exception):
    """Stands in for the end of the process."""


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return memory_lake(tmp_path)[0]


async def by_day(lake: Lake, files: int) -> TableSchema:
    """A table with so many files in each of three days."""

    table = await lake.create(partition_by=["day(ts)"])
    for number in range(files):
        for day, partition in enumerate(DAYS):
            ids = range(number * 30 + day * 10, number * 30 + day * 10 + 10)
            await lake.write(table, ids, ts=NOW + dt.timedelta(days=day), partition=partition)
    return table


# --- together --------------------------------------------------------------------------------


async def test_small_rewrites_of_a_table_are_published_together(lake: Lake) -> None:
    table = await by_day(lake, 8)
    before, at = await lake.rows(table), await lake.head_id()
    report = await lake.compact()
    assert (report["swaps"], report["files_in"], report["files_out"]) == (1, 24, 3)
    assert await lake.head_id() == at + 1
    assert sorted(str(file.partition) for file in await lake.live(table)) == list(DAYS)
    assert await lake.rows(table) == before


async def test_no_more_is_published_together_than_one_rewrite_may_take(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, inputs_max=20)
    lake = memory_lake(tmp_path, settings=settings)[0]
    table = await by_day(lake, 8)
    report = await lake.compact()
    assert (report["swaps"], report["files_in"], report["files_out"]) == (2, 24, 3)
    assert len(await lake.live(table)) == 3


async def test_E2_one_lost_input_loses_the_swap_and_the_rest_is_merged_again(lake: Lake) -> None:
    table = await by_day(lake, 9)
    before = await lake.rows(table)
    gone = (await lake.live(table))[0]
    kept = [row for row in before if row[3] not in range(10)]

    async def take() -> None:
        work = SwapWork(table, SwapOperation.DELETE, parts=(), dropped=(gone,))
        await run_swap(lake.context(), work)

    async with at_publish(take):
        report = await lake.compact()
    assert (report["swaps"], report["swaps_lost"]) == (1, 1)
    assert (report["files_in"], report["files_out"]) == (26, 3)
    assert await lake.rows(table) == kept


# --- what comes in meanwhile ------------------------------------------------------------------


async def test_files_that_come_in_meanwhile_are_left_to_the_next_job(lake: Lake) -> None:
    table = await filled(lake, 10)
    other = await lake.create("other")
    for number in range(8):
        await lake.write(other, range(number * 10, number * 10 + 10))

    async def flood() -> None:
        for number in range(9):
            await lake.write(table, range(1000 + number * 10, 1010 + number * 10))

    async with at_publish(flood):
        report = await lake.compact()
    assert {line["table"]: line["swaps"] for line in report["tables"]} == {"events": 1, "other": 1}
    assert (len(await lake.live(table)), len(await lake.live(other))) == (10, 1)
    await lake.compact()
    assert len(await lake.live(table)) == 1


async def test_what_a_job_made_is_merged_on_by_it(lake: Lake) -> None:
    """Tiers fill up within one job, whatever it made them of."""

    settings = dataclasses.replace(lake.settings, inputs_max=8)
    table = await filled(lake, 64)
    report = await compact(lake.context(settings=settings), job_of(JobKind.COMPACT, {}))
    assert report["files_in"] > 64
    assert len(await lake.live(table)) < 8


# --- attempts --------------------------------------------------------------------------------


def again(job: Job, report: Mapping[str, Any]) -> Job:
    """The next attempt of a job whose last one had noted this and died."""

    return dataclasses.replace(job, attempt=job.attempt + 1, report=report)


async def test_an_attempt_that_died_is_counted_in_the_report_of_the_next(lake: Lake) -> None:
    first, second = await filled(lake, 10), await lake.create("second")
    for number in range(9):
        await lake.write(second, range(number * 10, number * 10 + 10))
    job = job_of(JobKind.COMPACT, {})
    died = 0

    async def die() -> None:
        nonlocal died
        died += 1
        if died == 2:
            raise Killed

    with pytest.raises(Killed):
        async with at_publish(die, times=None):
            await compact(lake.context(), job)
    noted = lake.noted[-1]
    assert (noted["swaps"], noted["last_fruitful_attempt"]) == (1, 1)

    report = await compact(lake.context(), again(job, noted))
    assert (report["swaps"], report["files_in"], report["files_out"]) == (2, 19, 2)
    assert report["last_fruitful_attempt"] == 2
    assert [line["table"] for line in report["tables"]] == ["events", "second"]
    assert report["hash_sum_before"] == report["hash_sum_after"]
    assert int(report["hash_sum_after"], 16) > 0
    assert len(await lake.live(first)) == len(await lake.live(second)) == 1


async def test_only_attempts_without_a_result_make_rewrites_smaller(lake: Lake) -> None:
    settings = dataclasses.replace(lake.settings, inputs_max=24)
    await filled(lake, 24)
    job = dataclasses.replace(
        job_of(JobKind.COMPACT, {}), attempt=5, report={"last_fruitful_attempt": 4}
    )
    assert job.fruitless_attempts == 1
    report = await compact(lake.context(settings=settings), job)
    assert (report["swaps"], report["files_in"]) == (1, 24)


async def test_retention_counts_its_attempts_together_too(lake: Lake) -> None:
    rule = {"rows": {"column": "ts", "for_s": 86_400}}
    table = await lake.create(retention=rule)
    await lake.write(table, range(10), ts=NOW - dt.timedelta(days=3))
    await lake.write(table, range(10, 20))
    job = job_of(JobKind.RETAIN, {})
    report = await retain(lake.context(), job)
    assert (report["rows_removed"], report["last_fruitful_attempt"]) == (10, 1)
    report = await retain(lake.context(), again(job, report))
    assert (report["rows_removed"], report["last_fruitful_attempt"]) == (10, 1)
    assert len(report["tables"]) == 1
