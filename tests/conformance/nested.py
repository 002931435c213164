"""Lists, structs and maps from an entry on the bus to SQL and the change feed: D1, D8, D12."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lakebus.schemas import Column, TableSchema
from storage.bus.interface import NewEntry
from storage.reading.changes import ChangesRequest, Window
from storage.reading.resolve import SnapshotChoice
from storage.rows.decode import JSON, decode_rows
from storage.rows.fingerprint import fingerprint
from storage.rows.segment import EntryPart
from tests.conformance.fixtures import OpenLake
from tests.conformance.sql import SqlStack, sql_stack

_COLUMNS = (
    Column(0, "id", "bigint"),
    Column(0, "tags", "varchar[]"),
    Column(0, "s", 'struct(a integer, "order" decimal(9,2)[])'),
    Column(0, "m", "map(varchar, uuid)"),
)
_UUID = "0f2b4c1e-0000-4000-8000-000000000000"
_LATE = Column(0, "late", "struct(x struct(y timestamptz[]))")


@pytest.fixture
async def nested_stack(open_lake: OpenLake, tmp_path: Path) -> AsyncIterator[SqlStack]:
    async with sql_stack(await open_lake(claim_entries_max=1), tmp_path) as made:
        yield made


async def test_D1_D12_nested_values_are_read_and_told_as_they_were_accepted(
    nested_stack: SqlStack,
) -> None:
    lake = nested_stack.lake
    table = (await lake.catalog.create_table(name="t", columns=_COLUMNS)).schema
    assert [column.type for column in table.columns] == [column.type for column in _COLUMNS]
    first = {"id": 1, "tags": ["a", None], "s": {"a": 7, "order": ["1.5"]}, "m": {"k": _UUID}}
    before = await _publish(nested_stack, table, [first, {"id": 2, "tags": [], "m": {}}])

    columns = (*table.columns, _LATE)
    wider = dataclasses.replace(table, columns=columns)
    altered = await lake.catalog.alter_table(schema=wider, expected_version=1)
    assert altered.schema.columns[-1].type == _LATE.type
    late = {"x": {"y": ["2026-01-31T12:00:00+01:00"]}}
    after = await _publish(nested_stack, altered.schema, [{"id": 3, "late": late}])

    sql = (
        "SELECT id, tags[1], s.a, m['k'], s.\"order\"[1]::VARCHAR, late.x.y[1]::VARCHAR FROM t"
        " ORDER BY id"
    )
    assert await nested_stack.rows(sql) == [
        [1, "a", 7, _UUID, "1.50", None],
        [2, None, None, None, None, None],
        [3, None, None, None, None, "2026-01-31 11:00:00+00"],
    ]
    choice = SnapshotChoice(snapshot_id=before)
    assert await nested_stack.rows("SELECT count(*), count(s) FROM t", snapshot=choice) == [[2, 1]]
    window = Window(before - 1, after)
    page = await nested_stack.replica.changes.page(ChangesRequest("t", window))
    told = [row[4:] for row in json.loads(page.body)]
    assert told == [
        ["1", ["a", None], {"a": 7, "order": ["1.50"]}, {"k": _UUID}, None],
        ["2", [], None, {}, None],
        ["3", None, None, None, {"x": {"y": ["2026-01-31T11:00:00.000000Z"]}}],
    ]


async def _publish(stack: SqlStack, table: TableSchema, rows: list[dict[str, Any]]) -> int:
    """The snapshot that the rows came with."""

    batch = decode_rows(table, JSON, json.dumps(rows).encode(), rows_max=99).batch
    part = EntryPart(table.table_id, table.version, batch)
    entry = NewEntry(
        principal_id=1,
        target=table.name,
        parts=(part,),
        fingerprint=fingerprint([part]),
        idempotency_key=None,
        ordering_key="one",
        rejects=(),
        first_attempt_at=None,
    )
    await stack.lake.accept(entry)
    published = await stack.writer.publish_one()
    assert published.snapshot_id is not None
    return published.snapshot_id
