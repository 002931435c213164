"""Cost by tables, 1 to 1,000, each with ten files: publishing one entry, planning a query that
names one table, listing, and making, changing and dropping a table.

Planning is the server's part of a query: the view of the newest snapshot, the table's schema, its
files pruned, and the text that the engine reads them with. A window: `size` tables, `repetitions`.
See `benchmarks.growth` for how it is run.
"""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import duckdb

from benchmarks import windows
from benchmarks.growth.lake import (
    EVENTS,
    FIRST_EVENT,
    GrowingLake,
    growing_lake,
)
from benchmarks.growth.point import Point, advances
from lakebus.schemas import Column, TableSchema
from storage.engine.plans import SHOW_TABLES, ParsedStatement
from storage.files.objects import LocalObjectStore
from storage.reading.listings import Listings
from storage.reading.manifest import Manifest, SnapshotView
from storage.reading.planning import Planner

FILES, PLANS, CHANGES = 10, 200, 5


class TablesBySize:
    def __init__(self, lake: GrowingLake, objects: LocalObjectStore) -> None:
        self._lake, self._objects = lake, objects
        self._rng = random.Random(18)
        self._database = duckdb.connect()
        self._changed = 0

    async def window(self, *, size: int, repetitions: int) -> dict[str, Any]:
        lake, point = self._lake, Point(self._lake.meter)
        await lake.add_tables(size)
        await lake.fill_files(size * FILES)
        for _ in range(repetitions):
            await point.publications(lake)
            await self._ask(point)
            await self._plan(point)
            await self._change(point)
        return point.figures(size=size, tables=len(lake.schemas))

    async def _ask(self, point: Point) -> None:
        catalog = self._lake.postgres.catalog
        name = self._lake.any_table().name
        await point.counted("look up a table", 50, lambda _: catalog.table(name))
        await point.counted("list the tables", 5, lambda _: catalog.tables())

    async def _plan(self, point: Point) -> None:
        manifest = Manifest(self._lake.postgres.catalog)
        head = await self._lake.head()
        await point.counted("load the manifest", 1, lambda _: manifest.at(head.snapshot_id, head))
        view = await manifest.at(head.snapshot_id, head)
        planner, listings = Planner(self._objects), Listings()
        statements = [self._statement(FILES * len(self._lake.schemas)) for _ in range(PLANS)]

        async def plan(number: int) -> None:
            await manifest.at(head.snapshot_id, head)
            planner.plan(
                view, statements[number], None, visible=_everything, ordered=False, pruning=True
            )

        async def show(_: int) -> None:
            listings.source(SHOW_TABLES, _in_order(view))

        await point.timed("plan a query", PLANS, plan)
        await point.timed("plan the same again", PLANS, plan)
        await point.timed("SHOW TABLES, first time", 1, show)
        await advances(point, self._lake, manifest)

    def _statement(self, files: int) -> ParsedStatement:
        """A range of one table, other each time: about half of its files are left out."""

        name = self._lake.any_table().name
        event = FIRST_EVENT + self._rng.randrange(files) * EVENTS
        sql = f"SELECT * FROM {name} WHERE event_id >= {event}"
        row = self._database.execute("SELECT json_serialize_sql(?)", [sql]).fetchone()
        assert row is not None
        return ParsedStatement(sql, "select", (name,), (), False, False, json.loads(row[0]))

    async def _change(self, point: Point) -> None:
        """Each change is a snapshot. The tables made here are dropped again."""

        catalog = self._lake.postgres.catalog
        self._changed += 1
        columns = (Column(0, "id", "bigint"), Column(0, "note", "varchar"))
        made: list[TableSchema] = []

        async def create(number: int) -> None:
            name = f"made_{self._changed}_{number}"
            made.append((await catalog.create_table(name=name, columns=columns)).schema)

        async def alter(number: int) -> None:
            wider = (*made[number].columns, Column(0, "more", "double"))
            change = dataclasses.replace(made[number], columns=wider)
            await catalog.alter_table(schema=change, expected_version=1)

        async def drop(number: int) -> None:
            await catalog.finish_drop(await catalog.begin_drop(name=made[number].name))

        await point.counted("make a table", CHANGES, create)
        await point.counted("add a column", CHANGES, alter)
        await point.counted("drop a table", CHANGES, drop)


def _everything(name: str) -> bool:
    return True


def _in_order(view: SnapshotView) -> list[TableSchema]:
    return [schema for _, schema in sorted(view.schemas().items())]


async def main() -> None:
    order = await windows.order()
    with tempfile.TemporaryDirectory(prefix="lakebus-growth-") as folder:
        objects = LocalObjectStore(Path(folder))
        async with growing_lake(order["dsn"]) as lake:
            await windows.serve(TablesBySize(lake, objects).window)
        objects.close()


if __name__ == "__main__":
    windows.run(main())
