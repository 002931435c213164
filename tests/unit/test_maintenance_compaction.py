"""Compaction over the in-memory lake, with real files: what must not change does not (E1, D8, D12),
nobody is in anybody's way (E2, C7), and whatever happens in the middle only costs work (C5, C6)."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lakebus.errors import MalformedRequest
from lakebus.schemas import Column, TableSchema
from storage.files.objects import MemoryObjectStore
from storage.maintenance.compaction import compact, settings_of_attempt
from storage.maintenance.interface import Swap, SwapOperation, SwapOutcome, Swapped
from storage.maintenance.jobs import JobKind
from storage.maintenance.settings import MaintenanceSettings
from storage.maintenance.swapping import SwapLost, SwapWork, run_swap
from tests.unit.compaction_rig import (
    Lake,
    Overlay,
    at_publish,
    filled,
    job_of,
    memory_lake,
)

QUERIES = (
    "SELECT count(*), sum(id), min(ts), max(note) FROM t",
    "SELECT id % 7, count(*), sum(length(note)) FROM t GROUP BY 1 ORDER BY 1",
    "SELECT * FROM t ORDER BY 1, 2, 3",
)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return memory_lake(tmp_path)[0]


# --- what it does ----------------------------------------------------------------------------


async def test_E1_rows_and_places_are_the_same_after_a_compaction(lake: Lake) -> None:
    table = await filled(lake)
    before, at = await lake.rows(table), await lake.head_id()
    report = await lake.compact()
    assert report["files_in"] == 10
    assert report["files_out"] == 1
    assert report["rows_in"] == report["rows_out"] == 100
    assert report["rows_removed"] == 0
    assert report["hash_sum_before"] == report["hash_sum_after"] != f"{0:032x}"
    assert report["snapshot_id"] == await lake.head_id() == at + 1
    assert report["skipped"] == []
    assert report["mb_per_s"] > 0
    assert len(await lake.live(table)) == 1
    assert await lake.rows(table) == before
    snapshot = await lake.catalog.snapshot(at + 1)
    assert snapshot.operation == "compact"
    json.dumps(report)
    assert lake.noted[-1]["files_in"] == 10


async def test_D8_every_snapshot_answers_as_before(lake: Lake) -> None:
    """The trap of DuckLake #673: a flush that changed history."""

    table = await lake.create()
    answers = {}
    for number in range(18):
        await lake.write(table, range(number * 5, number * 5 + 5))
        at = await lake.head_id()
        answers[at] = await lake.answers(table, QUERIES, at)
        if number % 9 == 8:
            await lake.compact()
    assert len(await lake.live(table)) < 8
    for at, wanted in answers.items():
        assert await lake.answers(table, QUERIES, at) == wanted


async def test_nothing_due_means_nothing_published(lake: Lake) -> None:
    table = await filled(lake, 7)
    at = await lake.head_id()
    report = await lake.compact()
    assert report["swaps"] == 0
    assert report["snapshot_id"] is None
    assert await lake.head_id() == at
    assert len(await lake.live(table)) == 7


async def test_E5_a_dry_run_lists_what_would_be_merged(lake: Lake) -> None:
    table = await filled(lake)
    at, files = await lake.head_id(), await lake.live(table)
    report = await lake.compact(dry_run=True)
    assert report["rewrites"] == 1
    assert report["files_in"] == 10
    assert report["bytes_in"] == sum(file.size_bytes for file in files)
    [planned] = report["planned"]
    assert planned["inputs"] == [str(file.file_id) for file in files]
    assert planned["table"] == "events"
    assert await lake.head_id() == at
    assert await lake.live(table) == files
    json.dumps(report)


async def test_the_most_urgent_table_comes_first_and_the_budget_ends_the_job(lake: Lake) -> None:
    few, many = await filled(lake, 9), await lake.create("many")
    for number in range(20):
        await lake.write(many, [number])
    report = await lake.compact(budget_bytes=1)
    assert [line["table"] for line in report["tables"]] == ["many"]
    assert len(await lake.live(few)) == 9
    report = await lake.compact()
    assert [line["table"] for line in report["tables"]] == ["events"]


async def test_one_table_by_its_id_and_no_other(lake: Lake) -> None:
    one, other = await filled(lake, 9), await lake.create("other")
    for number in range(9):
        await lake.write(other, [number])
    await lake.compact(table=other.table_id)
    assert len(await lake.live(one)) == 9
    assert len(await lake.live(other)) == 1
    assert (await lake.compact(table=99))["swaps"] == 0


@pytest.mark.parametrize(
    "parameters",
    [
        {"full": 1},
        {"small": 1},
        {"full": True, "small": True},
        {"budget_s": 0},
        {"tabel": 1},
        {"table": "events"},
    ],
)
async def test_parameters_that_mean_nothing_are_refused(
    lake: Lake, parameters: dict[str, Any]
) -> None:
    with pytest.raises(MalformedRequest):
        await lake.compact(**parameters)


async def test_a_full_rewrite_brings_everything_to_the_newest_layout_once(lake: Lake) -> None:
    table = await filled(lake, 3)
    wanted = dataclasses.replace(table, sort_by=("note",), partition_by=("bucket(2, id)",))
    schema = (await lake.catalog.alter_table(schema=wanted, expected_version=1)).schema
    before = await lake.rows(table)
    report = await lake.compact(full=True)
    assert report["rows_removed"] == 0
    files = await lake.live(table)
    assert {file.partition for file in files} == {
        '{"bucket(2, id)":"0"}',
        '{"bucket(2, id)":"1"}',
    }
    assert {file.layout for file in files} == {"note"}
    assert {file.schema_version for file in files} == {schema.version}
    assert await lake.rows(table) == before
    assert (await lake.compact(full=True))["swaps"] == 0


async def test_a_column_added_after_the_plan_is_not_lost(lake: Lake) -> None:
    """The schema of a rewrite is never older than one of its inputs."""

    table = await filled(lake, 8)
    wider = dataclasses.replace(table, columns=(*table.columns, Column(0, "more", "bigint")))
    context = lake.context()
    real = context.upkeep.live_files
    asked = 0

    async def late(table_id: int) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:  # the plan's: everything below happens right before it
            schema = (await lake.catalog.alter_table(schema=wider, expected_version=1)).schema
            await lake.write(schema, [900, 901], more={"more": pa.array([1, 2], pa.int64())})
        return await real(table_id)

    context = dataclasses.replace(context, upkeep=Overlay(context.upkeep, live_files=late))
    report = await compact(context, job_of(JobKind.COMPACT, {}))
    assert report["files_in"] == 9
    assert await lake.ask(table, "SELECT id, more FROM t WHERE more IS NOT NULL ORDER BY 1") == [
        (900, 1),
        (901, 2),
    ]


async def test_a_store_without_local_files_is_downloaded_and_checked(tmp_path: Path) -> None:
    lake, _ = memory_lake(tmp_path, store=MemoryObjectStore())
    table = await lake.create()
    for number in range(8):
        await lake.write(table, [number])
    report = await lake.compact()
    assert report["files_in"] == 8
    assert [file.rows for file in await lake.live(table)] == [8]


# --- others at the same time -----------------------------------------------------------------


async def test_C7_appends_during_every_swap_never_conflict(lake: Lake) -> None:
    table = await filled(lake, 40)
    number = 1_000

    async def append() -> None:
        nonlocal number
        number += 1
        await lake.write(table, [number])

    async with at_publish(append, times=None):
        report = await lake.compact()
    assert report["swaps_lost"] == 0
    assert report["swaps"] > 0
    found = {row[3] for row in await lake.rows(table)}
    assert found == {*range(400), *range(1_001, number + 1)}


async def test_C7_a_busy_writer_does_not_starve_compaction(lake: Lake) -> None:
    """The trap of Iceberg #4996: a compaction that can never commit against a busy writer."""

    table = await filled(lake, 8)
    stop = asyncio.Event()
    written = 0

    async def writer() -> None:
        nonlocal written
        while not stop.is_set():
            await lake.write(table, [10_000 + written])
            written += 1

    task = asyncio.create_task(writer())
    try:
        for _ in range(3):
            report = await lake.compact()
            assert report["swaps_lost"] == 0
    finally:
        stop.set()
        await task
    assert written > 0
    await lake.compact()
    assert len(await lake.live(table)) <= 8
    assert len(await lake.rows(table)) == 80 + written


async def drop_first_file(lake: Lake, table: TableSchema) -> set[int]:
    """A delete that takes a whole file; answers the ids it removed."""

    victim = (await lake.live(table))[0]
    path = lake.store.local_path(victim.object_key)
    assert path is not None
    gone = await lake.ask(table, f"SELECT id FROM read_parquet('{path}')")
    work = SwapWork(table, SwapOperation.DELETE, parts=(), dropped=(victim,))
    await run_swap(lake.context(), work)
    return {row[0] for row in gone}


async def test_E2_a_compaction_that_meets_a_delete_gives_up_and_plans_afresh(lake: Lake) -> None:
    table = await filled(lake, 12)
    gone: set[int] = set()

    async def delete() -> None:
        # Its own publish comes by the same place; it is armed once.
        gone.update(await drop_first_file(lake, table))

    async with at_publish(delete):
        report = await lake.compact()
    assert report["swaps_lost"] == 1
    assert report["swaps"] == 1
    assert len(gone) == 10
    assert {row[3] for row in await lake.rows(table)} == set(range(120)) - gone
    assert len(await lake.live(table)) == 1


async def test_E2_a_delete_that_meets_a_compaction_loses_and_changes_nothing(lake: Lake) -> None:
    table = await filled(lake, 12)
    before = await lake.rows(table)

    async def compaction() -> None:
        await lake.compact()

    async with at_publish(compaction):
        with pytest.raises(SwapLost):
            await drop_first_file(lake, table)
    assert await lake.rows(table) == before
    assert len(await lake.live(table)) == 1


async def test_a_table_whose_files_are_always_taken_is_skipped_and_said(lake: Lake) -> None:
    table = await filled(lake, 30)
    context = lake.context()

    async def lose(swap: Swap) -> Swapped:
        return Swapped(SwapOutcome.INPUTS_LOST)

    context = dataclasses.replace(context, upkeep=Overlay(context.upkeep, publish_swap=lose))
    report = await compact(context, job_of(JobKind.COMPACT, {}))
    assert report["swaps"] == 0
    assert report["swaps_lost"] == 5
    [skipped] = report["skipped"]
    assert skipped["table"] == "events"
    assert len(await lake.live(table)) == 30


async def test_a_drop_in_the_middle_ends_the_rewrite_quietly(lake: Lake) -> None:
    table = await filled(lake, 8)

    async def drop() -> None:
        ticket = await lake.catalog.begin_drop(name=table.name)
        await lake.catalog.finish_drop(ticket)

    async with at_publish(drop):
        report = await lake.compact()
    assert report["swaps"] == 0
    assert report["skipped"] == []


async def test_a_name_used_again_is_another_table(lake: Lake) -> None:
    table = await filled(lake, 8)
    ticket = await lake.catalog.begin_drop(name=table.name)
    await lake.catalog.finish_drop(ticket)
    await lake.create(table.name)
    work = SwapWork(table, SwapOperation.COMPACT, parts=())
    with pytest.raises(SwapLost):
        await run_swap(lake.context(), work)


# --- attempts --------------------------------------------------------------------------------


async def test_every_attempt_rewrites_half_as_much_at_once(lake: Lake) -> None:
    """A rewrite that takes longer than its process lives would otherwise be begun for ever."""

    settings = MaintenanceSettings()
    files = [settings_of_attempt(settings, n).inputs_max for n in (0, 1, 2, 3, 50)]
    assert files == [2_000, 2_000, 1_000, 500, 31]
    sizes = [settings_of_attempt(settings, n).input_bytes_max >> 20 for n in (1, 2, 50)]
    assert sizes == [1_024, 512, 256]  # two finished files
    least = settings_of_attempt(dataclasses.replace(settings, inputs_max=10), 50)
    assert least.inputs_max == 10

    table = await filled(lake, 40)
    before = await lake.rows(table)
    lake.settings = dataclasses.replace(lake.settings, inputs_max=40)
    job = dataclasses.replace(job_of(JobKind.COMPACT, {}), attempt=2)
    report = await compact(lake.context(), job)
    assert (report["files_in"], report["swaps"]) == (40, 2)
    assert await lake.rows(table) == before
