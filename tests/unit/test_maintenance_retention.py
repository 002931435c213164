"""Row retention and the expiry of snapshots: exactly the old rows go, and what shows them goes when
its time has come (E1, E2, E5, E8)."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import hashlib
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lakebus.errors import Fault, MalformedRequest
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import ColumnStatistics, DataFile
from storage.maintenance import swapping
from storage.maintenance.jobs import JobKind
from storage.maintenance.retention import Age, Cut, retain
from storage.maintenance.rewrite import rewrite
from storage.maintenance.rewriting import RewriteRequest, Rewritten
from storage.memory_clock import ManualClock
from tests.failpoints.actions import Pause, Run
from tests.failpoints.markers import markers_of
from tests.failpoints.points import Failpoints
from tests.unit.compaction_rig import NOW, SETTINGS, Lake, job_of, memory_lake

DAY = dt.timedelta(days=1)
RULE = {"rows": {"column": "ts", "for_s": 90 * 86_400}}


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return memory_lake(tmp_path)[0]


def days_ago(days: float) -> dt.datetime:
    return NOW - days * DAY


async def ids(lake: Lake, table: TableSchema) -> set[int]:
    return {row[3] for row in await lake.rows(table)}


# --- what a file's bounds say ----------------------------------------------------------------


def a_table(kind: str, for_s: int = 86_400) -> TableSchema:
    return TableSchema(
        1,
        "t",
        1,
        (Column(1, "ts", kind),),
        retention={"rows": {"column": "ts", "for_s": for_s}},
    )


def a_file(least: str | None, most: str | None, *, nulls: int = 0, rows: int = 100) -> DataFile:
    bounds = {1: ColumnStatistics(nulls, least, most)}
    return DataFile(_ID, 1, 1, "k", rows, 1, "", bounds)


_ID = uuid.UUID(int=1)


def micros(time: dt.datetime) -> str:
    return str((time - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1))


@pytest.mark.parametrize(
    ("least", "most", "nulls", "wanted"),
    [
        (5.0, 1.1, 0, Age.OLD),
        (5.0, 1.0, 0, Age.MIXED),  # the newest row lies at the cut itself, and is kept
        (5.0, 1.1, 1, Age.MIXED),  # the NULL is kept
        (1.0, 0.0, 0, Age.YOUNG),
        (1.1, 0.0, 0, Age.YOUNG),  # a tenth is old: not worth a rewrite
        (1.5, 0.0, 0, Age.MIXED),
        (2.1, -20.0, 0, Age.MIXED),  # few, but twice too old
    ],
)
def test_the_bounds_of_a_file_decide(least: float, most: float, nulls: int, wanted: Age) -> None:
    cut = Cut.of(a_table("timestamptz"), NOW)
    assert cut is not None
    file = a_file(micros(days_ago(least)), micros(days_ago(most)), nulls=nulls)
    assert cut.age(file) is wanted


def test_unknown_bounds_are_counted_and_a_missing_column_is_young() -> None:
    cut = Cut.of(a_table("date"), NOW)
    assert cut is not None
    assert cut.age(a_file(None, "2026-06-01")) is Age.UNKNOWN
    assert cut.age(a_file(None, "2026-05-01")) is Age.OLD
    assert cut.age(a_file(None, None)) is Age.UNKNOWN
    assert cut.age(a_file(None, None, nulls=100)) is Age.YOUNG
    assert cut.age(dataclasses.replace(a_file(None, None), statistics={})) is Age.YOUNG


def test_a_day_is_old_when_all_of_it_is() -> None:
    cut = Cut.of(a_table("date"), NOW)  # noon of the first of June: the cut is noon of 31 May
    assert cut is not None
    assert cut.age(a_file("2026-05-30", "2026-05-30")) is Age.OLD
    assert cut.age(a_file("2026-05-31", "2026-05-31")) is Age.YOUNG
    assert cut.old_sql() == "\"ts\" < DATE '2026-05-31'"


def test_a_table_without_a_rule_keeps_everything() -> None:
    assert Cut.of(dataclasses.replace(a_table("date"), retention={}), NOW) is None
    gone: dict[str, object] = {"rows": {"column": "other", "for_s": 5}}
    assert Cut.of(dataclasses.replace(a_table("date"), retention=gone), NOW) is None


def test_a_rule_of_a_thousand_years_is_no_overflow() -> None:
    cut = Cut.of(a_table("timestamp", for_s=1_000 * 366 * 86_400), NOW)
    assert cut is not None
    assert cut.age(a_file("0", micros(NOW))) is Age.YOUNG
    assert "TIMESTAMP '10" in cut.old_sql()


# --- rows ------------------------------------------------------------------------------------


async def test_E1_whole_files_and_parts_go_in_one_swap_and_nothing_else(lake: Lake) -> None:
    table = await lake.create(retention=RULE)
    await lake.write(table, range(10), ts=days_ago(100))
    mixed = [days_ago(160)] * 5 + [days_ago(1)] * 4 + [None]
    await lake.write(table, range(10, 20), ts=mixed)
    await lake.write(table, range(20, 30), ts=days_ago(2))
    before, at = await lake.rows(table), await lake.head_id()
    report = await lake.retain()
    assert report["swaps"] == 1
    assert report["rows_removed"] == 15
    assert report["hash_sum_before"] != report["hash_sum_after"]
    assert report["snapshot_id"] == at + 1 == await lake.head_id()
    [line] = report["tables"]
    assert (line["files_dropped"], line["files_rewritten"], line["rows_removed"]) == (1, 1, 15)
    assert await ids(lake, table) == set(range(15, 30))
    kept = [row for row in before if row[3] >= 15]
    assert await lake.rows(table) == kept  # with their places, and the row without a time
    snapshot = await lake.catalog.snapshot(at + 1)
    assert snapshot.operation == "retain"
    assert await lake.rows(table, at) == before  # D8: earlier snapshots show what they showed
    json.dumps(report)
    assert (await lake.retain())["swaps"] == 0


@pytest.mark.parametrize("kind", ["timestamp", "timestamptz", "date"])
async def test_the_cut_is_the_same_for_bounds_and_for_rows(lake: Lake, kind: str) -> None:
    """Just before it is old, at it is not; whatever the type."""

    rule = {"rows": {"column": "at", "for_s": 86_400}}
    columns = (Column(0, "id", "bigint"), Column(0, "at", kind))
    change = await lake.catalog.create_table(name="typed", columns=columns, retention=rule)
    step = DAY if kind == "date" else dt.timedelta(microseconds=1)
    edge = NOW - DAY
    times: Sequence[dt.datetime] = [edge - 3 * DAY, edge - step, edge, edge + step, NOW]
    arrow = {
        "timestamp": pa.timestamp("us"),
        "timestamptz": pa.timestamp("us", tz="UTC"),
        "date": pa.date32(),
    }[kind]
    values = [t.date() if kind == "date" else t.replace(tzinfo=None) for t in times]
    at = pa.array(values, pa.date32() if kind == "date" else pa.timestamp("us"))
    await lake.write(change.schema, range(5), more={"at": at.cast(arrow)})
    report = await lake.retain()
    assert report["rows_removed"] == 2
    left = await lake.ask(change.schema, "SELECT id FROM t ORDER BY 1")
    assert left == [(2,), (3,), (4,)]


async def test_a_file_of_nothing_but_old_rows_and_nulls_keeps_the_nulls(lake: Lake) -> None:
    table = await lake.create(retention=RULE)
    await lake.write(table, [1, 2, 3], ts=[days_ago(100), None, days_ago(120)])
    assert (await lake.retain())["rows_removed"] == 2
    assert await ids(lake, table) == {2}


async def test_a_few_old_rows_wait_until_they_are_twice_as_old(tmp_path: Path) -> None:
    lake, memory = memory_lake(tmp_path)
    table = await lake.create(retention=RULE)
    await lake.write(table, range(100), ts=[days_ago(91)] + [days_ago(1)] * 98 + [NOW])
    assert (await lake.retain())["rows_removed"] == 0
    clock = memory.clock
    assert isinstance(clock, ManualClock)
    # Let the rows stay young by writing none, and the old one grow old.
    clock.advance_s(3 * 86_400)
    assert (await lake.retain())["rows_removed"] == 0
    changed = dataclasses.replace(table, retention={"rows": {"column": "ts", "for_s": 45 * 86_400}})
    await lake.catalog.alter_table(schema=changed, expected_version=1)
    assert (await lake.retain())["rows_removed"] == 1
    assert await ids(lake, table) == set(range(1, 100))


async def test_tables_without_a_rule_are_left_alone(lake: Lake) -> None:
    table = await lake.create()
    await lake.write(table, range(5), ts=days_ago(10_000))
    assert (await lake.retain())["swaps"] == 0
    assert await ids(lake, table) == set(range(5))


async def test_E5_a_dry_run_counts_and_changes_nothing(lake: Lake) -> None:
    table = await lake.create(retention=RULE)
    whole = await lake.write(table, range(10), ts=days_ago(100))
    part = await lake.write(table, range(10, 20), ts=[days_ago(160)] * 5 + [days_ago(1)] * 5)
    at = await lake.head_id()
    report = await lake.retain(dry_run=True)
    [line] = report["tables"]
    assert line["rows_removed"] == 15
    assert line["dropped"] == [str(whole.file_id)]
    assert line["rewritten"] == [str(part.file_id)]
    assert report["dry_run"] is True
    assert await lake.head_id() == at
    json.dumps(report)


async def test_the_budget_leaves_the_rest_to_the_next_job(lake: Lake) -> None:
    table = await lake.create(retention=RULE)
    for number in range(3):
        await lake.write(table, [number, 10 + number], ts=[days_ago(160), days_ago(1)])
    report = await lake.retain(budget_bytes=1)
    assert report["tables"][0]["files_deferred"] == 2
    assert report["rows_removed"] == 1
    assert (await lake.retain())["rows_removed"] == 2
    assert await ids(lake, table) == {10, 11, 12}


async def test_partitions_stay_apart(lake: Lake) -> None:
    table = await lake.create(retention=RULE, partition_by=("bucket(2, id)",))
    for number in range(4):
        wanted = [i for i in range(100) if _bucket(i) == number % 2][number : number + 4]
        times = [days_ago(160), days_ago(160), days_ago(1), days_ago(1)]
        partition = json.dumps({"bucket(2, id)": str(number % 2)}, separators=(",", ":"))
        await lake.write(table, wanted, ts=times, partition=partition)
    await lake.retain()
    assert sorted(str(file.partition) for file in await lake.live(table)) == [
        '{"bucket(2, id)":"0"}',
        '{"bucket(2, id)":"1"}',
    ]


def _bucket(value: int) -> int:
    return int.from_bytes(hashlib.md5(str(value).encode()).digest()[:4], "big") % 2


@pytest.mark.parametrize("parameters", [{"for": 1}, {"budget_bytes": -1}, {"table": True}])
async def test_parameters_that_mean_nothing_are_refused(
    lake: Lake, parameters: dict[str, Any]
) -> None:
    with pytest.raises(MalformedRequest):
        await lake.retain(**parameters)


# --- others at the same time -----------------------------------------------------------------


async def half_old(lake: Lake, files: int = 10) -> TableSchema:
    table = await lake.create(retention=RULE)
    for number in range(files):
        times = [days_ago(160), days_ago(1)]
        await lake.write(table, [number, 100 + number], ts=times)
    return table


async def test_E2_a_compaction_that_meets_retention_plans_afresh(lake: Lake) -> None:
    table = await half_old(lake)

    async def retention() -> None:
        assert (await lake.retain())["rows_removed"] == 10

    with Failpoints() as points:
        points.arm("swapping.before_publish", Run(retention))
        report = await lake.compact()
    assert report["swaps_lost"] == 1
    assert report["rows_removed"] == 0
    assert await ids(lake, table) == set(range(100, 110))


async def test_E2_a_retention_that_meets_a_compaction_plans_afresh(lake: Lake) -> None:
    table = await half_old(lake)

    async def compaction() -> None:
        assert (await lake.compact())["swaps"] == 1

    with Failpoints() as points:
        points.arm("swapping.before_publish", Run(compaction))
        report = await lake.retain()
    assert report["swaps_lost"] == 1
    assert report["rows_removed"] == 10
    assert await ids(lake, table) == set(range(100, 110))


async def test_C7_appends_during_retention_stay(lake: Lake) -> None:
    table = await half_old(lake)

    async def append() -> None:
        await lake.write(table, [500], ts=days_ago(200))
        await lake.write(table, [501], ts=NOW)

    with Failpoints() as points:
        points.arm("swapping.before_publish", Run(append))
        report = await lake.retain()
    assert report["swaps_lost"] == 0
    assert await ids(lake, table) == {*range(100, 110), 500, 501}


async def test_a_rule_that_was_lifted_meanwhile_takes_nothing(lake: Lake) -> None:
    table = await half_old(lake)

    async def lift() -> None:
        changed = dataclasses.replace(table, retention={})
        await lake.catalog.alter_table(schema=changed, expected_version=1)

    with Failpoints() as points:
        points.arm("swapping.after_pin", Run(lift))
        report = await lake.retain()
    assert report["swaps"] == 0
    assert len(await ids(lake, table)) == 20


async def test_a_column_of_the_same_name_is_not_the_same_column(lake: Lake) -> None:
    """Between plan and rewrite `ts` is renamed and another `ts` is added."""

    table = await half_old(lake)

    async def swap_names() -> None:
        renamed = tuple(
            dataclasses.replace(c, name="was") if c.name == "ts" else c for c in table.columns
        )
        changed = dataclasses.replace(table, columns=(*renamed, Column(0, "ts", "timestamp")))
        await lake.catalog.alter_table(schema=changed, expected_version=1)

    with Failpoints() as points:
        points.arm("swapping.after_pin", Run(swap_names))
        await lake.retain()
    assert len(await lake.ask(table, "SELECT id FROM t")) == 20


# --- faults ----------------------------------------------------------------------------------


async def test_E1_a_rewrite_that_takes_too_much_is_never_published(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums that add up do not say that the right rows went: the old ones are counted anew."""

    table = await half_old(lake)

    def greedy(request: RewriteRequest) -> Rewritten:
        return rewrite(dataclasses.replace(request, keep_sql="id = 105"))

    monkeypatch.setattr(swapping, "rewrite", greedy)
    with pytest.raises(Fault, match="left out 19 rows where 10 are old"):
        await lake.retain()
    assert len(await ids(lake, table)) == 20


async def test_a_damaged_file_stops_its_table_only(lake: Lake) -> None:
    table = await half_old(lake, 2)
    other = await lake.create("other", retention=RULE)
    await lake.write(other, [1], ts=days_ago(100))
    path = lake.store.local_path((await lake.live(table))[0].object_key)
    assert path is not None
    path.chmod(0o644)
    path.write_bytes(b"nothing")
    report = await lake.retain()
    assert [line["table"] for line in report["skipped"]] == ["events"]
    assert await ids(lake, other) == set()


# --- snapshots -------------------------------------------------------------------------------


async def test_E8_snapshots_expire_only_when_both_are_exceeded(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, snapshot_keep_s=60.0, snapshot_keep_count=3)
    lake, memory = memory_lake(tmp_path, settings=settings)
    table = await lake.create()
    for number in range(6):
        await lake.write(table, [number])
    head = await lake.head_id()
    assert (await lake.retain())["snapshots"]["first"] is None  # all are young
    clock = memory.clock
    assert isinstance(clock, ManualClock)
    clock.advance_s(61)
    planned = (await lake.retain(dry_run=True))["snapshots"]
    assert (planned["first"], planned["last"]) == (1, head - 3)
    assert (await lake.catalog.snapshot(1)).snapshot_id == 1
    assert (await lake.retain())["snapshots"] == planned
    assert (await lake.catalog.head()).oldest_snapshot_id == head - 2


async def test_E5_one_run_expires_no_more_than_its_limit(tmp_path: Path) -> None:
    settings = dataclasses.replace(
        SETTINGS, snapshot_keep_s=0.001, snapshot_keep_count=1, expire_max=2
    )
    lake, memory = memory_lake(tmp_path, settings=settings)
    table = await lake.create()
    for number in range(6):
        await lake.write(table, [number])
    clock = memory.clock
    assert isinstance(clock, ManualClock)
    clock.advance_s(10)
    assert (await lake.retain())["snapshots"]["last"] == 2
    assert (await lake.retain())["snapshots"]["last"] == 4
    only_rows = await lake.retain(table=table.table_id)
    assert only_rows["snapshots"] is None


@pytest.mark.parametrize("point", markers_of("retention"))
async def test_a_crash_while_snapshots_expire_is_taken_up_by_the_next_job(
    tmp_path: Path, point: str
) -> None:
    settings = dataclasses.replace(SETTINGS, snapshot_keep_s=0.001, snapshot_keep_count=1)
    lake, memory = memory_lake(tmp_path, settings=settings)
    table = await lake.create()
    for number in range(4):
        await lake.write(table, [number])
    clock = memory.clock
    assert isinstance(clock, ManualClock)
    clock.advance_s(10)
    with Failpoints() as points:
        armed = points.arm(point, Pause())
        task = asyncio.create_task(retain(lake.context(), job_of(JobKind.RETAIN, {})))
        await armed.reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await lake.retain()
    head = await lake.catalog.head()
    assert head.oldest_snapshot_id == head.snapshot_id
    assert await ids(lake, table) == set(range(4))
