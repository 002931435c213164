"""The change feed with the real engine over real Parquet files (D12)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lakebus.errors import MalformedRequest, SnapshotExpired, TableNotFound
from lakebus.schemas import Column
from storage.engine.engine import QueryEngine
from storage.engine.settings import EngineSettings
from storage.reading.changes import ChangeReader, ChangesPage, ChangesRequest, Place, Window
from storage.reading.planning import Planner
from tests.conformance.harness import SUITE_SETTINGS, entry_of
from tests.unit.reading_rig import FileWriter, MemoryHarness, Replica


@dataclasses.dataclass
class Feed:
    lake: MemoryHarness
    writer: FileWriter
    replica: Replica
    reader: ChangeReader

    async def page(self, after: int, until: int, **more: Any) -> ChangesPage:
        place = more.pop("place", Place())
        return await self.reader.page(ChangesRequest("t", Window(after, until, place), **more))

    async def rows(self, after: int, until: int, *, limit: int = 1_000) -> list[list[Any]]:
        """All pages of a window; snapshot, shard, position, row as numbers."""

        table = await self.lake.catalog.table("t")
        assert table is not None
        found: list[list[Any]] = []
        window = Window(after, until)
        while True:
            request = ChangesRequest("t", window, limit=limit, integers="number")
            page = await self.reader.page(request)
            rows = json.loads(page.body)
            assert len(rows) == page.row_count <= limit
            found += rows
            if page.cursor is None:
                return found
            window = Window.decode(page.cursor, table.schema.table_id)


@pytest.fixture
async def feed(tmp_path: Path) -> AsyncIterator[Feed]:
    objects = tmp_path / "objects"
    objects.mkdir()
    lake = MemoryHarness(dataclasses.replace(SUITE_SETTINGS, claim_entries_max=2))
    writer = FileWriter(lake, objects)
    engine = QueryEngine(
        EngineSettings(
            allowed_directory=str(objects), temp_directory=str(tmp_path / "spill"), spare=False
        )
    )
    await engine.start()
    try:
        async with Replica(lake, engine=engine, store=writer.store) as replica:
            reader = ChangeReader(
                catalog=lake.catalog,
                resolver=replica.resolver,
                manifest=replica.manifest,
                planner=Planner(writer.store),
                engine=engine,
                ranges_max=3,
            )
            yield Feed(lake, writer, replica, reader)
    finally:
        await engine.stop()


async def _write(feed: Feed, count: int, *, first: int = 0) -> list[int]:
    """`count` entries of two rows each on three shards; the snapshots they made."""

    table = await feed.lake.catalog.table("t")
    assert table is not None
    made = []
    for n in range(first, first + count):
        await feed.lake.accept(entry_of(table.schema, [n, -n], ordering_key=str(n % 5)))
        if n % 2:
            made.append((await feed.writer.publish_one()).snapshot_id)
    while (published := await _rest(feed)) is not None:
        made.append(published)
    return [one for one in made if one is not None]


async def _rest(feed: Feed) -> int | None:
    head = await feed.lake.catalog.head()
    if head.watermark == dict(await feed.lake.bus.ends()):
        return None
    return (await feed.writer.publish_one()).snapshot_id


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
    first = await feed.page(made[0] - 1, made[-1], limit=3, result_format="arrow")
    with pa.ipc.open_stream(first.body) as reader:
        rows = reader.read_all()
    assert rows.column_names[:4] == ["$snapshot", "$shard", "$position", "$row"]
    assert rows.num_rows == 3
    assert first.cursor is not None
    rest = await feed.page(
        made[0] - 1,
        made[-1],
        place=Window.decode(first.cursor, 1).place,
        result_format="arrow",
    )
    assert (rest.row_count, rest.cursor) == (5, None)


async def test_D12_a_window_that_cannot_be_read_is_refused(feed: Feed) -> None:
    await feed.lake.create()
    made = await _write(feed, 4)
    with pytest.raises(TableNotFound):
        await feed.reader.page(ChangesRequest("nothing", Window(0, made[-1])))
    feed.lake.lake.expire_snapshots(before=made[-1])
    with pytest.raises(SnapshotExpired):
        await feed.page(0, made[0])
    assert len(await feed.rows(0, made[-1])) == 8  # only `until` must be retained


@pytest.mark.parametrize("text", ["", "x", "W10", "bnVsbA", "WzEsMiwzLDQsNSw2LDdd", "é", "[" * 99])
def test_a_damaged_cursor_is_refused(text: str) -> None:
    with pytest.raises(MalformedRequest):
        Window.decode(text, 1)


def test_a_cursor_is_good_for_its_table_only() -> None:
    window = Window(3, 9, Place(2, 2**40, 7))
    assert Window.decode(window.encode(5), 5) == window
    with pytest.raises(MalformedRequest):
        Window.decode(window.encode(5), 6)
