"""Cost by snapshots, 1 to 100,000, in a lake of ten tables: publishing, reading an old snapshot by
its id and by a time, listing, and planning an expiry.

A window: `size` snapshots, `repetitions`. See `benchmarks.growth` for how it is run.
"""

from __future__ import annotations

import random
from typing import Any

from benchmarks import windows
from benchmarks.growth.lake import GrowingLake, growing_lake
from benchmarks.growth.point import Point, advances
from storage.maintenance.settings import MaintenanceSettings
from storage.reading.manifest import Manifest

CALLS, TABLES, PAGE = 100, 10, 100


class SnapshotsBySize:
    def __init__(self, lake: GrowingLake) -> None:
        self._lake = lake
        self._rng = random.Random(16)

    async def window(self, *, size: int, repetitions: int) -> dict[str, Any]:
        lake, point = self._lake, Point(self._lake.meter)
        await lake.fill_snapshots(size)
        snapshots = (await lake.head()).snapshot_id
        for _ in range(repetitions):
            await point.publications(lake)
            await self._read(point)
            await self._expire(point)
            await self._advance(point)
        return point.figures(size=size, snapshots=snapshots)

    async def _read(self, point: Point) -> None:
        catalog, head = self._lake.postgres.catalog, await self._lake.head()
        oldest = head.oldest_snapshot_id
        ids = [self._rng.randrange(oldest, head.snapshot_id + 1) for _ in range(CALLS)]
        times = [(await catalog.snapshot(one)).published_at for one in ids]
        await point.counted("read the head", CALLS, lambda _: catalog.head())
        await point.counted("resolve by id", CALLS, lambda n: catalog.snapshot(ids[n]))
        await point.counted("resolve AS OF a time", CALLS, lambda n: catalog.snapshot_at(times[n]))
        await point.counted("list the newest 100", 20, lambda _: catalog.snapshots(limit=PAGE))
        await point.counted(
            "list 100 before an old one", 20, lambda n: catalog.snapshots(limit=PAGE, before=ids[n])
        )

    async def _expire(self, point: Point) -> None:
        """A dry run: everything but the newest may go, as many as one job takes at most."""

        settings = MaintenanceSettings()

        async def plan(_: int) -> None:
            await self._lake.postgres.upkeep.expire_snapshots(
                keep_s=0.0,
                keep_count=settings.snapshot_keep_count,
                limit=settings.expire_max,
                dry_run=True,
            )

        await point.counted("plan an expiry of all", 3, plan)

    async def _advance(self, point: Point) -> None:
        manifest = Manifest(self._lake.postgres.catalog)
        head = await self._lake.head()
        await point.counted("load the manifest", 1, lambda _: manifest.at(head.snapshot_id, head))
        await advances(point, self._lake, manifest)


async def main() -> None:
    order = await windows.order()
    async with growing_lake(order["dsn"]) as lake:
        await lake.add_tables(order.get("tables", TABLES))
        await windows.serve(SnapshotsBySize(lake).window)


if __name__ == "__main__":
    windows.run(main())
