"""The read path with the real engine over real Parquet files (D1, D8, D10, D11)."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lakebus.errors import ResultTooLarge, SqlError, TableNotFound
from lakebus.schemas import Column
from storage.engine.engine import QueryEngine
from storage.engine.settings import EngineSettings
from storage.reading.query import QueryAnswer, QueryRequest
from storage.reading.resolve import SnapshotChoice
from tests.conformance.harness import SUITE_SETTINGS, entry_of
from tests.unit.reading_rig import FileWriter, MemoryHarness, Replica, everything


@dataclasses.dataclass
class Stack:
    lake: MemoryHarness
    writer: FileWriter
    replica: Replica

    async def ask(self, sql: str, **request: Any) -> tuple[list[list[Any]], QueryAnswer]:
        answer = await self.replica.service.query(QueryRequest(sql, **request), everything)
        try:
            return json.loads(await answer.read_all()), answer
        finally:
            await answer.aclose()

    async def rows(self, sql: str, **request: Any) -> list[list[Any]]:
        return (await self.ask(sql, integers="number", **request))[0]


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    objects, temporary = tmp_path / "objects", tmp_path / "temporary"
    objects.mkdir()
    lake = MemoryHarness(dataclasses.replace(SUITE_SETTINGS, claim_entries_max=1))
    writer = FileWriter(lake, objects)
    engine = QueryEngine(
        EngineSettings(
            allowed_directory=str(objects), temp_directory=str(temporary), spare=False, threads=1
        )
    )
    await engine.start()
    try:
        async with Replica(lake, engine=engine, store=writer.store) as replica:
            yield Stack(lake, writer, replica)
    finally:
        await engine.stop()


async def test_D1_a_query_reads_one_snapshot_of_all_its_tables(stack: Stack) -> None:
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
    stack: Stack,
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


async def test_D4_a_query_sees_the_rows_of_its_token(stack: Stack) -> None:
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


async def test_D11_pruning_changes_no_answer(stack: Stack) -> None:
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


async def test_a_kept_plan_is_not_taken_for_other_parameters(stack: Stack) -> None:
    table = await stack.lake.create()
    for n in range(3):
        await stack.lake.accept(entry_of(table, [n]))
        await stack.writer.publish_one()
    sql = "SELECT id FROM t WHERE id = ?"
    for value, expected in ((1, [[1]]), (True, [[1]]), ("1", [[1]]), (2, [[2]]), (9, [])):
        assert await stack.rows(sql, parameters=[value]) == expected


async def test_D1_an_old_snapshot_is_read_in_its_own_schema(stack: Stack) -> None:
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


async def test_D9_a_limit_is_a_typed_error(stack: Stack) -> None:
    table = await stack.lake.create()
    await stack.lake.accept(entry_of(table, list(range(10))))
    await stack.writer.publish_one()
    with pytest.raises(ResultTooLarge):
        await stack.rows("SELECT * FROM t", max_rows=9)
    assert len(await stack.rows("SELECT * FROM t", max_rows=10)) == 10


async def test_the_statistics_of_an_answer_add_up(stack: Stack) -> None:
    table = await stack.lake.create()
    await stack.lake.accept(entry_of(table, [1]))
    await stack.writer.publish_one()
    _, answer = await stack.ask("SELECT count(*) FROM t")
    statistics = answer.statistics()
    assert answer.row_count == 1
    assert all(float(str(statistics[k])) >= 0 for k in ("wait_ms", "plan_ms", "execute_ms"))
    assert statistics == answer.statistics()  # nothing counts on after the end
