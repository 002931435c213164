"""SQL beyond one snapshot of named tables: AT (D1, D2, D7), and lists of tables (D10)."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lakebus.clock import format_time
from lakebus.errors import (
    LakebusError,
    SnapshotExpired,
    SnapshotNotFound,
    SqlError,
    TableNotFound,
    TimeInFuture,
    TokenNotCovered,
)
from lakebus.schemas import Column
from storage.reading.resolve import SnapshotChoice
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, entry_of
from tests.conformance.sql import SqlStack, sql_stack


@pytest.fixture
async def surface(open_lake: OpenLake, tmp_path: Path) -> AsyncIterator[SqlStack]:
    async with sql_stack(await open_lake(claim_entries_max=1), tmp_path) as made:
        yield made


async def _publish(stack: SqlStack, table: Any, ids: list[int], **more: Any) -> int:
    await stack.lake.accept(entry_of(table, ids, **more))
    published = (await stack.writer.publish_one()).snapshot_id
    assert published is not None
    return published


async def test_D1_a_reference_with_at_reads_its_own_snapshot_in_its_own_schema(
    surface: SqlStack,
) -> None:
    lake = surface.lake
    t, u = await lake.create("t"), await lake.create("ns.u")
    first = await _publish(surface, t, [1], note="old")
    second = await _publish(surface, t, [2])
    third = await _publish(surface, u, [7, 8])
    columns = (dataclasses.replace(t.columns[0], name="key"), Column(0, "more", "varchar"))
    await lake.catalog.alter_table(
        schema=dataclasses.replace(t, columns=columns), expected_version=1
    )
    rows = surface.rows
    assert await rows(f"SELECT * FROM t AT (VERSION => {first})") == [[1, "old"]]
    assert await rows("SELECT count(*), min(key) FROM t") == [[2, 1]]
    # Several snapshots of one table, and of others, in one statement; names work as without AT.
    sql = (
        f"SELECT (SELECT count(*) FROM t AT (VERSION => {first})), count(*), max(t.id), "
        "(SELECT count(*) FROM t), (SELECT sum(ns.u.id) FROM NS.U AT (VERSION => ?)) "
        f"FROM T AT (VERSION => {second}) WHERE t.id = ?"
    )
    found, answer = await surface.ask(sql, integers="number", parameters=[third, 2])
    assert found == [[1, 1, 2, 2, 15]]
    assert answer.snapshots[0] == answer.snapshot_id == third + 1
    assert set(answer.snapshots[1:]) == {first, second, third}
    # Files are left out for one mention of a table, and not for another.
    assert (answer.files_scanned, answer.files_pruned) == (5, 1)
    unpruned, whole = await surface.ask(
        sql, integers="number", parameters=[third, 2], pruning=False
    )
    assert (unpruned, whole.files_pruned) == (found, 0)
    # At a time; the same name as a parameter and in a row.
    at = (await lake.catalog.snapshot(first)).published_at
    for parameters in ({"at": format_time(at), "n": 1}, {"at": at.isoformat(), "n": 1}):
        sql = "SELECT id + $n, $at <> '' FROM t o AT (TIMESTAMP => $at) WHERE o.id = $n"
        assert await rows(sql, parameters=parameters) == [[2, True]]
    assert await rows(f"SELECT id FROM t AT (TIMESTAMP => '{format_time(at)}')") == [[1]]
    assert await rows(f"DESCRIBE FROM t AT (VERSION => {first})") == [
        ["id", "BIGINT", "YES", None, None, None],
        ["note", "VARCHAR", "YES", None, None, None],
    ]
    explained = f"EXPLAIN SELECT * FROM t AT (VERSION => {first}), information_schema.columns"
    told = str(await rows(explained))
    assert "id" in told
    assert not any(ours in told for ours in ("$s", "$lists", ".parquet", "/", "secret")), told
    # A table that is gone is there before it went.
    await lake.catalog.finish_drop(await lake.catalog.begin_drop(name="ns.u"))
    with pytest.raises(TableNotFound):
        await rows("FROM ns.u")
    assert await rows(f"SELECT id FROM ns.u AT (VERSION => {third}) ORDER BY 1") == [[7], [8]]
    with pytest.raises(SqlError):
        await rows(f"SELECT key FROM t AT (VERSION => {first})")
    with pytest.raises(TableNotFound):
        await rows("FROM ns.u AT (VERSION => 1)")


async def test_D7_tokens_staleness_and_order_with_references_of_both_kinds(
    surface: SqlStack,
) -> None:
    """`max_staleness_ms` and tokens bind references without AT; `deterministic` binds all (D8)."""

    table = await surface.lake.create()
    first = await _publish(surface, table, [1, 3])
    accepted = await surface.lake.accept(entry_of(table, [2]))
    await surface.writer.publish_one()
    token = [accepted.receipt.visibility_token]
    sql = f"SELECT (SELECT count(*) FROM t), count(*) FROM t AT (VERSION => {first})"
    assert await surface.rows(sql, min_visibility_tokens=token) == [[3, 2]]
    at_first = SnapshotChoice(snapshot_id=first)
    with pytest.raises(TokenNotCovered):
        await surface.rows(sql, min_visibility_tokens=token, snapshot=at_first)
    # An older head may do where the caller says so, but what AT names stays what it is.
    ((rows, before),) = await surface.rows(sql, max_staleness_ms=60_000)
    assert (rows in (2, 3), before) == (True, 2)
    sums = f"SELECT list(id), sum(sin(id)) FROM t AT (VERSION => {first})"
    same = [await surface.rows(sums, deterministic=True) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0][0][0] == [1, 3]


async def test_D2_a_snapshot_that_at_cannot_read_keeps_its_own_error(surface: SqlStack) -> None:
    surface.lake.needs(Capability.EXPIRE_SNAPSHOTS)
    lake, table = surface.lake, await surface.lake.create()
    made = [await _publish(surface, table, [n]) for n in range(3)]
    gone_at = (await lake.catalog.snapshot(made[0])).published_at
    await lake.expire_snapshots(before=made[2])
    later = format_time((await lake.catalog.head()).now + dt.timedelta(hours=1))
    expected: list[tuple[str, Any, type[LakebusError]]] = [
        (f"VERSION => {made[0]}", None, SnapshotExpired),
        ("VERSION => ?", [made[1]], SnapshotExpired),
        (f"TIMESTAMP => '{format_time(gone_at)}'", None, SnapshotExpired),
        (f"VERSION => {made[2] + 1000}", None, SnapshotNotFound),
        (f"VERSION => {10**30}", None, SnapshotNotFound),
        (f"TIMESTAMP => '{later}'", None, TimeInFuture),
        ("TIMESTAMP => ?", [later], TimeInFuture),
        ("VERSION => ?", ["x"], SqlError),
        ("VERSION => ?", [True], SqlError),
        ("VERSION => ?", [None], SqlError),
        ("VERSION => ?", [], SqlError),
        ("TIMESTAMP => ?", ["2026-01-31T12:00:00"], SqlError),
        ("TIMESTAMP => ?", [12], SqlError),
    ]
    for choice, parameters, kind in expected:
        sql = f"SELECT count(*) FROM t, t AS o AT ({choice})"
        with pytest.raises(kind):
            await surface.rows(sql, parameters=parameters)
    assert await surface.rows(f"SELECT count(*) FROM t AT (VERSION => {made[2]})") == [[3]]


async def test_D10_lists_hold_the_tables_that_the_caller_may_see_and_no_others(
    surface: SqlStack,
) -> None:
    lake = surface.lake
    before = (await lake.catalog.head()).snapshot_id
    columns = (Column(0, "id", "bigint", nullable=False), Column(0, "price", "decimal(9,2)"))
    await lake.catalog.create_table(name="mine", columns=columns)
    for name in ("secret", "ns.mine", "ns.secret", "hidden.secret"):
        await lake.create(name)

    def visible(name: str) -> bool:
        return "secret" not in name

    async def ask(sql: str, **more: Any) -> list[list[Any]]:
        return (await surface.ask(sql, visible=visible, integers="number", **more))[0]

    assert await ask("SHOW TABLES") == [["mine"], ["ns.mine"]]
    assert await ask("SHOW TABLES FROM ns") == [["mine"]]
    assert [row[1:3] for row in await ask("SHOW ALL TABLES")] == [["main", "mine"], ["ns", "mine"]]
    assert await ask(
        "SELECT table_schema, table_name, table_type FROM information_schema.tables ORDER BY ALL"
    ) == [["main", "mine", "BASE TABLE"], ["ns", "mine", "BASE TABLE"]]
    assert await ask(
        "SELECT column_name, is_nullable, data_type, numeric_scale FROM information_schema.columns "
        "WHERE table_schema = 'main' ORDER BY ordinal_position"
    ) == [["id", "NO", "BIGINT", 0], ["price", "YES", "DECIMAL(9,2)", 2]]
    schemata = "SELECT schema_name FROM information_schema.schemata ORDER BY 1"
    assert await ask(schemata) == [["main"], ["ns"]]
    assert [row[:3] for row in await ask("DESCRIBE mine")] == [
        ["id", "BIGINT", "NO"],
        ["price", "DECIMAL(9,2)", "YES"],
    ]
    # Lists are those of the snapshot that is read, and a list beside a table is the same.
    at_before = SnapshotChoice(snapshot_id=before)
    assert await ask("SHOW TABLES", snapshot=at_before) == []
    assert await ask(schemata, snapshot=at_before) == [["main"]]
    both = "SELECT count(*) FROM ns.mine RIGHT JOIN information_schema.tables ON true"
    assert await ask(both) == [[2]]
    travelling = f"FROM {{}} AT (VERSION => {before})"
    for statement in ("DESCRIBE {}", "SHOW {}", travelling, "SHOW TABLES FROM {}"):
        refusals = []
        for name in ("hidden", "absent"):
            with pytest.raises(TableNotFound) as caught:
                await ask(statement.format(name))
            refusals.append((str(caught.value).replace(name, "…"), caught.value.members))
        assert refusals[0] == refusals[1], statement
