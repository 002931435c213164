"""Reading with SQL over real Parquet files: D1, D4, D8 to D12 with the engine in between."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lakebus.errors import (
    LakebusError,
    QueryTimeout,
    ResultTooLarge,
    SnapshotExpired,
    SqlError,
    StatementNotAllowed,
    TableNotFound,
)
from lakebus.schemas import Column
from storage.reading.changes import ChangesPage, ChangesRequest, Place, Window
from storage.reading.query import QueryLimits, QueryRequest
from storage.reading.resolve import SnapshotChoice
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, LakeHarness, entry_of
from tests.conformance.sql import SqlStack, everything, sql_stack


@pytest.fixture
async def stack(open_lake: OpenLake, tmp_path: Path) -> AsyncIterator[SqlStack]:
    async with sql_stack(await open_lake(claim_entries_max=1), tmp_path) as made:
        yield made


async def test_D1_a_query_reads_one_snapshot_of_all_its_tables(stack: SqlStack) -> None:
    tables = [await stack.lake.create(name) for name in ("a", "b")]
    done = asyncio.Event()

    async def write() -> None:
        for n in range(25):
            await stack.lake.accept(entry_of(tables, [n, n + 1]))
            await stack.writer.publish_one()
        done.set()

    sql = "SELECT (SELECT count(*) FROM a), (SELECT sum(id) FROM a), count(*), sum(id) FROM b"
    counts: set[int] = set()

    async def look() -> None:
        while not done.is_set():
            ((rows_a, sum_a, rows_b, sum_b),) = await stack.rows(sql)
            assert (rows_a, sum_a) == (rows_b, sum_b)
            counts.add(rows_a)

    await asyncio.gather(write(), look(), look())
    assert len(counts) > 2
    assert await stack.rows("SELECT count(*) FROM a JOIN b USING (id)") == [[98]]


async def test_D8_fifty_deterministic_queries_at_fifty_snapshots_never_change(
    stack: SqlStack,
) -> None:
    lake, table = stack.lake, await stack.lake.create()
    sql = (
        "SELECT list(id), list(note), sum(sin(id)), avg(id / 7), arg_max(note, id),"
        " string_agg(note, ',') FROM t"
    )
    first: dict[int, tuple[list[list[Any]], dt.datetime]] = {}
    for n in range(50):
        ids = [n * 31 % 17, n, n * n % 101]
        await lake.accept(entry_of(table, ids, note=f"n{n % 5}", ordering_key=str(n % 3)))
        published = await stack.writer.publish_one()
        assert published.snapshot_id is not None
        rows, answer = await stack.ask(sql, deterministic=True)
        assert answer.snapshot_id == published.snapshot_id
        first[answer.snapshot_id] = (rows, answer.snapshot_time)
    assert len({json.dumps(rows) for rows, _ in first.values()}) == 50
    for snapshot_id, (rows, at) in first.items():
        for choice in (SnapshotChoice(snapshot_id=snapshot_id), SnapshotChoice(time=at)):
            again, answer = await stack.ask(sql, deterministic=True, snapshot=choice)
            assert (again, answer.snapshot_id) == (rows, snapshot_id)


async def test_D4_a_query_sees_the_rows_of_its_token(stack: SqlStack) -> None:
    table = await stack.lake.create()
    for n in range(3):
        accepted = await stack.lake.accept(entry_of(table, [n]))
        asking = asyncio.create_task(
            stack.rows(
                "SELECT count(*) FROM t WHERE id = $1",
                parameters=[n],
                min_visibility_tokens=[accepted.receipt.visibility_token],
            )
        )
        await stack.writer.publish_one()
        assert await asking == [[1]]


async def test_D11_pruning_changes_no_answer(stack: SqlStack) -> None:
    table = await stack.lake.create()
    for n in range(8):
        await stack.lake.accept(entry_of(table, [n * 10 + k for k in range(5)], note=f"n{n}"))
        await stack.writer.publish_one()
    statements: list[tuple[str, Any, int]] = [
        ("SELECT id FROM t WHERE id = 33 ORDER BY 1", None, 1),
        ("SELECT id FROM t WHERE id BETWEEN ? AND ? ORDER BY 1", [12, 31], 3),
        ("SELECT id FROM t WHERE note = $note AND id > 40 ORDER BY 1", {"note": "n6"}, 1),
        ("SELECT count(*) FROM t a LEFT JOIN t b ON a.id = b.id WHERE a.id < 3", None, 8),
        ("WITH u AS (SELECT * FROM t WHERE id > 70) SELECT count(*) FROM u", None, 1),
        ("SELECT id FROM t WHERE id IS NULL", None, 0),
        ("SELECT id, note FROM t ORDER BY id DESC LIMIT 3", None, 1),
        ("SELECT id FROM t ORDER BY id LIMIT 3 OFFSET 4", None, 2),
        ("SELECT id FROM t WHERE id % 2 = 0 ORDER BY id LIMIT 3", None, 8),
    ]
    for sql, parameters, most in statements:
        with_pruning, answer = await stack.ask(sql, parameters=parameters)
        without, whole = await stack.ask(sql, parameters=parameters, pruning=False)
        assert with_pruning == without, sql
        assert answer.files_scanned <= most, sql
        assert answer.files_scanned + answer.files_pruned == 8
        assert (whole.files_scanned, whole.files_pruned) == (8, 0)
        again, repeated = await stack.ask(sql, parameters=parameters)
        assert (again, repeated.files_scanned) == (with_pruning, answer.files_scanned)


async def test_a_kept_plan_is_not_taken_for_other_parameters(stack: SqlStack) -> None:
    table = await stack.lake.create()
    for n in range(3):
        await stack.lake.accept(entry_of(table, [n]))
        await stack.writer.publish_one()
    sql = "SELECT id FROM t WHERE id = ?"
    for value, expected in ((1, [[1]]), (True, [[1]]), ("1", [[1]]), (2, [[2]]), (9, [])):
        assert await stack.rows(sql, parameters=[value]) == expected


async def test_D1_an_old_snapshot_is_read_in_its_own_schema(stack: SqlStack) -> None:
    lake = stack.lake
    first = await lake.create()
    await lake.accept(entry_of(first, [1], note="old"))
    old = (await stack.writer.publish_one()).snapshot_id
    assert old is not None
    columns = (dataclasses.replace(first.columns[0], name="key"), Column(0, "more", "varchar"))
    changed = dataclasses.replace(first, columns=columns)
    await lake.catalog.alter_table(schema=changed, expected_version=1)
    assert await stack.rows("SELECT * FROM t") == [[1, None]]
    _, answer = await stack.ask("SELECT * FROM t")
    assert [c["name"] for c in answer.columns] == ["key", "more"]
    at = SnapshotChoice(snapshot_id=old)
    rows, answer = await stack.ask("SELECT * FROM t", snapshot=at, integers="number")
    assert rows == [[1, "old"]]
    assert [c["name"] for c in answer.columns] == ["id", "note"]
    with pytest.raises(SqlError):
        await stack.rows("SELECT key FROM t", snapshot=at)
    await lake.catalog.finish_drop(await lake.catalog.begin_drop(name="t"))
    with pytest.raises(TableNotFound):
        await stack.rows("SELECT * FROM t")
    assert await stack.rows("SELECT * FROM t", snapshot=at) == [[1, "old"]]
    await lake.catalog.create_table(name="t", columns=(Column(0, "other", "double"),))
    assert await stack.rows("SELECT * FROM t") == []
    assert await stack.rows("SELECT * FROM t", snapshot=at) == [[1, "old"]]


async def test_D9_a_limit_is_a_typed_error(stack: SqlStack) -> None:
    table = await stack.lake.create()
    await stack.lake.accept(entry_of(table, list(range(10))))
    await stack.writer.publish_one()
    with pytest.raises(ResultTooLarge):
        await stack.rows("SELECT * FROM t", max_rows=9)
    assert len(await stack.rows("SELECT * FROM t", max_rows=10)) == 10


async def test_the_statistics_of_an_answer_add_up(stack: SqlStack) -> None:
    table = await stack.lake.create()
    await stack.lake.accept(entry_of(table, [1]))
    await stack.writer.publish_one()
    _, answer = await stack.ask("SELECT count(*) FROM t")
    statistics = answer.statistics()
    assert answer.row_count == 1
    assert all(float(str(statistics[k])) >= 0 for k in ("wait_ms", "plan_ms", "execute_ms"))
    assert statistics == answer.statistics()  # nothing counts on after the end


# --- D9: bounds ---------------------------------------------------------------------------------

#: Runs for hours, ends at once when interrupted.
_LONG = "SELECT count(*) FROM t a, t b, t c, t d, t e, t f WHERE hash(a.id, f.id) % 7 = 1"


async def test_D9_the_bounds_of_a_query_are_typed_errors_never_shorter_answers(
    open_lake: OpenLake, tmp_path: Path
) -> None:
    lake = await open_lake()
    async with sql_stack(lake, tmp_path, limits=QueryLimits(bytes_max=50_000)) as stack:
        table = await lake.create()
        await lake.accept(entry_of(table, list(range(2_000)), note="n" * 100))
        await stack.writer.publish_one()
        for sql, limits, expected in (
            ("SELECT id FROM t", {"max_rows": 1_999}, ResultTooLarge),
            ("SELECT * FROM t", {}, ResultTooLarge),
            (_LONG, {"timeout_ms": 300}, QueryTimeout),
            ("SELECT list(repeat(note, 1000000)) FROM t", {}, LakebusError),
        ):
            with pytest.raises(expected):
                await stack.rows(sql, **limits)
            assert await stack.rows("SELECT count(*) FROM t") == [[2_000]], sql
        assert len(await stack.rows("SELECT id FROM t", max_rows=2_000)) == 2_000


async def test_D9_leaving_a_query_stops_its_work(stack: SqlStack) -> None:
    table = await stack.lake.create()
    await stack.lake.accept(entry_of(table, list(range(2_000))))
    await stack.writer.publish_one()
    asking = asyncio.create_task(stack.replica.service.query(QueryRequest(_LONG), everything))
    while stack.engine.status()["running"] == 0:
        await asyncio.sleep(0.005)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    left_s = time.monotonic()
    while stack.engine.status()["running"]:
        await asyncio.sleep(0.005)
    assert time.monotonic() - left_s < 0.25
    assert await stack.rows("SELECT count(*) FROM t") == [[2_000]]


async def test_D9_a_neighbour_of_a_dead_process_is_run_again_at_its_snapshot(
    stack: SqlStack,
) -> None:
    table = await stack.lake.create()
    await stack.lake.accept(entry_of(table, list(range(500))))
    first = (await stack.writer.publish_one()).snapshot_id
    sql = "SELECT count(*), sum(hash(a.id, b.id, c.id) % 7) FROM t a, t b, t c WHERE c.id < 60"
    asking = asyncio.create_task(stack.ask(sql))
    while stack.engine.status()["running"] == 0:
        await asyncio.sleep(0.005)
    await stack.lake.accept(entry_of(table, [1]))
    await stack.writer.publish_one()
    os.kill(stack.engine.status()["child_pid"], signal.SIGKILL)
    rows, answer = await asking
    assert (answer.snapshot_id, int(rows[0][0])) == (first, 500 * 500 * 60)
    assert stack.engine.status()["replacements"] == 1


# --- D10: what one may not see ------------------------------------------------------------------


async def test_D10_a_table_one_may_not_see_is_answered_like_one_that_is_not_there(
    stack: SqlStack,
) -> None:
    for name in ("mine", "secret", "secret_too"):
        schema = await stack.lake.create(name)
        await stack.lake.accept(entry_of(schema, [1]))
        await stack.writer.publish_one()

    def visible(name: str) -> bool:
        return name == "mine"

    async def refusal(sql: str) -> LakebusError:
        with pytest.raises(LakebusError) as caught:
            await stack.ask(sql, visible=visible)
        return caught.value

    for statement in (
        "SELECT * FROM {}",
        "SELECT (SELECT max(id) FROM {}) FROM mine",
        "WITH u AS (SELECT * FROM {}) SELECT * FROM u",
        "DESCRIBE {}",
        "SUMMARIZE {}",
        "EXPLAIN SELECT * FROM {}",
        "SELECT * FROM mine WHERE id IN (SELECT id FROM {})",
    ):
        hidden = await refusal(statement.format("secret"))
        absent = await refusal(statement.format("absent"))
        assert type(hidden) is type(absent) is TableNotFound, statement
        assert str(hidden).replace("secret", "absent") == str(absent)
        assert hidden.members == absent.members
    assert "secret" not in str(await refusal("SELECT * FROM secre"))
    rows, _ = await stack.ask("SELECT id FROM mine", visible=visible, integers="number")
    assert rows == [[1]]


async def test_D10_sql_reads_granted_tables_and_nothing_else(stack: SqlStack) -> None:
    await stack.lake.create()
    for sql in (
        "SELECT * FROM read_parquet('objects/**')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM duckdb_tables()",
        "SELECT * FROM pg_catalog.pg_class",
        "SELECT getenv('PATH')",
        "COPY t TO '/tmp/x'",
        "ATTACH '/tmp/x' AS x",
        "INSTALL httpfs",
        "SET memory_limit = '100GB'",
        "INSERT INTO t VALUES (1)",
        "PRAGMA database_list",
    ):
        with pytest.raises((StatementNotAllowed, TableNotFound, SqlError)):
            await stack.rows(sql)


# --- D12: the change feed -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Feed:
    """The change feed of the table `t`."""

    stack: SqlStack

    @property
    def lake(self) -> LakeHarness:
        return self.stack.lake

    async def page(self, after: int, until: int, **more: Any) -> ChangesPage:
        place = more.pop("place", Place())
        request = ChangesRequest("t", Window(after, until, place), **more)
        return await self.stack.replica.changes.page(request)

    async def rows(self, after: int, until: int, *, limit: int = 1_000) -> list[list[Any]]:
        """All pages of a window; snapshot, shard, position, row as numbers."""

        table = await self.lake.catalog.table("t")
        assert table is not None
        found: list[list[Any]] = []
        window = Window(after, until)
        while True:
            request = ChangesRequest("t", window, limit=limit, integers="number")
            page = await self.stack.replica.changes.page(request)
            rows = json.loads(page.body)
            assert len(rows) == page.row_count <= limit
            found += rows
            if page.cursor is None:
                return found
            window = Window.decode(page.cursor, table.schema.table_id)


@pytest.fixture
async def feed(open_lake: OpenLake, tmp_path: Path) -> AsyncIterator[Feed]:
    async with sql_stack(await open_lake(claim_entries_max=2), tmp_path) as made:
        yield Feed(made)


async def _write(feed: Feed, count: int, *, first: int = 0) -> list[int]:
    """`count` entries of two rows each on three shards; the snapshots they made."""

    table = await feed.lake.catalog.table("t")
    assert table is not None
    made = []
    for n in range(first, first + count):
        await feed.lake.accept(entry_of(table.schema, [n, -n], ordering_key=str(n % 5)))
        if n % 2:
            made.append((await feed.stack.writer.publish_one()).snapshot_id)
    while (published := await _rest(feed)) is not None:
        made.append(published)
    return [one for one in made if one is not None]


async def _rest(feed: Feed) -> int | None:
    head = await feed.lake.catalog.head()
    if head.watermark == dict(await feed.lake.bus.ends()):
        return None
    return (await feed.stack.writer.publish_one()).snapshot_id


async def test_D12_windows_hold_each_row_once_in_order_of_its_place(feed: Feed) -> None:
    await feed.lake.create()
    made = await _write(feed, 24)
    begin, end = made[0] - 1, made[-1]
    whole = await feed.rows(begin, end)
    assert len(whole) == 48
    places = [tuple(row[1:4]) for row in whole]
    assert places == sorted(places)
    assert len(set(places)) == 48
    assert {row[0] for row in whole} == set(made)
    assert sorted(abs(row[4]) for row in whole) == sorted([*range(24), *range(24)])
    # Small pages, and any split of the window, hold the same rows.
    for limit in (1, 5, 48):
        assert await feed.rows(begin, end, limit=limit) == whole
    for cut in (*made, begin):
        before, behind = await feed.rows(begin, cut), await feed.rows(cut, end)
        assert sorted(before + behind) == sorted(whole)
        assert all(row[0] <= cut for row in before)
        assert all(row[0] > cut for row in behind)
    # Rows keep their place when they are asked for again later.
    await _write(feed, 6, first=100)
    assert await feed.rows(begin, end) == whole


async def test_D12_the_feed_is_read_in_the_shape_of_its_last_snapshot(feed: Feed) -> None:
    schema = await feed.lake.create()
    made = await _write(feed, 2)
    renamed = dataclasses.replace(schema.columns[0], name="key")
    changed = dataclasses.replace(schema, columns=(renamed, Column(0, "more", "varchar")))
    change = await feed.lake.catalog.alter_table(schema=changed, expected_version=1)
    page = await feed.page(made[0] - 1, change.snapshot_id)
    names = [column["name"] for column in page.columns]
    assert names == ["$snapshot", "$shard", "$position", "$row", "key", "more"]
    assert [row[5] for row in json.loads(page.body)] == [None] * 4
    old = await feed.page(made[0] - 1, made[-1])
    assert [column["name"] for column in old.columns][4:] == ["id", "note"]


async def test_D12_an_empty_window_and_arrow_pages(feed: Feed) -> None:
    await feed.lake.create()
    made = await _write(feed, 4)
    empty = await feed.page(made[-1], made[-1])
    assert (empty.row_count, empty.cursor, json.loads(empty.body)) == (0, None, [])
    assert len(empty.columns) == 6
    cursor: str | None = Window(made[0] - 1, made[-1]).encode(1)
    pages: list[pa.Table] = []
    while cursor is not None:
        place = Window.decode(cursor, 1).place
        page = await feed.page(made[0] - 1, made[-1], place=place, limit=3, result_format="arrow")
        with pa.ipc.open_stream(page.body) as reader:
            pages.append(reader.read_all())
        assert pages[-1].num_rows == page.row_count <= 3
        cursor = page.cursor
    rows = pa.concat_tables(pages)
    assert rows.column_names[:4] == ["$snapshot", "$shard", "$position", "$row"]
    assert len(pages) > 2
    assert len(set(zip(*rows.select([1, 2, 3]).to_pydict().values(), strict=True))) == 8


async def test_D12_a_window_that_cannot_be_read_is_refused(feed: Feed) -> None:
    feed.lake.needs(Capability.EXPIRE_SNAPSHOTS)
    await feed.lake.create()
    made = await _write(feed, 4)
    with pytest.raises(TableNotFound):
        await feed.stack.replica.changes.page(ChangesRequest("nothing", Window(0, made[-1])))
    await feed.lake.expire_snapshots(before=made[-1])
    with pytest.raises(SnapshotExpired):
        await feed.page(0, made[0])
    assert len(await feed.rows(0, made[-1])) == 8  # only `until` must be retained
