"""Cost by live files, 10 to 1,000,000, in a lake of 1,000 tables and 100,000 snapshots: publishing,
loading the manifest, keeping it up to date, and P14: a snapshot at random resolved and a point
look-up pruned.

A window: `size` live files, `repetitions`. See `benchmarks.growth` for how it is run.
"""

from __future__ import annotations

import gc
import random
import time
from typing import Any

from benchmarks import manifest as made_up
from benchmarks import windows
from benchmarks.growth.counters import resident_bytes
from benchmarks.growth.lake import EVENTS, FIRST_EVENT, GrowingLake, growing_lake
from benchmarks.growth.point import Held, Point, advances
from benchmarks.manifest import resolve_and_prune
from lakebus.errors import LakebusError
from storage.files.constants import Number, interval_of
from storage.files.predicates import Predicate, within
from storage.reading.barrier import Barrier
from storage.reading.manifest import Manifest
from storage.reading.resolve import Resolver, SnapshotChoice
from storage.reading.watcher import HeadWatcher
from storage.rows.types import parse_type

RESOLVED = 1_000
#: A load that took longer is not repeated.
_LONG_LOAD_S = 20.0
#: More files than this in one table are not asked for: a query of it lists them all anyway.
ONE_TABLE_MAX = 100_000
_BIGINT = parse_type("bigint")


class FilesBySize:
    def __init__(self, lake: GrowingLake, *, since: int) -> None:
        self._lake, self._since = lake, since
        self._rng = random.Random(14)
        postgres = lake.postgres
        barrier = Barrier(
            catalog=postgres.catalog,
            bus=postgres.bus,
            watcher=HeadWatcher(postgres.catalog),
            codec=postgres.codec,
        )
        self._resolver = Resolver(catalog=postgres.catalog, barrier=barrier)

    async def window(self, *, size: int, repetitions: int) -> dict[str, Any]:
        lake, point = self._lake, Point(self._lake.meter)
        await lake.fill_files(size)
        for _ in range(repetitions):
            await point.publications(lake)
        manifest, failure = await self._load(point, repetitions)
        if manifest is not None:
            for _ in range(repetitions):
                await advances(point, lake, manifest)
                await self._resolve(point, manifest, size)
        for _ in range(repetitions if size <= ONE_TABLE_MAX else 0):
            await _one_table(point, size)
        return point.figures(
            size=size, tables=len(lake.schemas), snapshots=(await lake.head()).snapshot_id,
            failed=failure,
        )  # fmt: skip

    async def _load(self, point: Point, repetitions: int) -> tuple[Manifest | None, str]:
        """Cold: a new manifest each time. The last stays for what follows."""

        head = await self._lake.head()
        manifest: Manifest | None = None
        for _ in range(repetitions):
            manifest = None
            gc.collect()
            before = resident_bytes()
            began, cpu = time.perf_counter(), time.process_time()
            manifest = Manifest(self._lake.postgres.catalog)
            try:
                async with Held() as held:
                    await manifest.at(head.snapshot_id, head)
            except LakebusError as error:
                return None, f"the manifest was not loaded: {error}"
            took_s = time.perf_counter() - began
            point.note("load the manifest, ms", took_s * 1000)
            point.note("load the manifest, CPU ms", (time.process_time() - cpu) * 1000)
            point.note("load the manifest, ms in which the process answers nobody", held.longest_ms)
            gc.collect()
            if "manifest, MiB" not in point.curves:  # later ones find memory that was given back
                point.note("manifest, MiB", (resident_bytes() - before) / 2**20)
            if took_s > _LONG_LOAD_S:
                break
        return manifest, ""

    async def _resolve(self, point: Point, manifest: Manifest, size: int) -> None:
        head = await self._lake.head()

        async def find(snapshot_id: int) -> None:
            await self._resolver.fixed(SnapshotChoice(snapshot_id=snapshot_id), head=head)

        found = await resolve_and_prune(
            manifest,
            head,
            tables=[schema.name for schema in self._lake.schemas.values()],
            snapshots=range(self._since, head.snapshot_id + 1),
            predicate=lambda chance: _event(FIRST_EVENT + chance.randrange(size) * EVENTS),
            draws=RESOLVED,
            chance=self._rng,
            find=find,
        )
        point.note_times("resolve a snapshot and prune", found.all_ms)
        point.note_times("resolve and prune, without the catalog's answer", found.both_ms)
        point.note_times("prune", found.prune_ms)
        point.calls += RESOLVED


async def _one_table(point: Point, size: int) -> None:
    """All files in one table: made up, in this process."""

    catalog = made_up.MadeUpCatalog(files=size, tables=1, snapshots=1_000, seed=14)
    manifest = Manifest(catalog)  # type: ignore[arg-type]
    head = await catalog.head()
    found = await resolve_and_prune(
        manifest, head, tables=["t0"], snapshots=range(1_000, 1_001),
        predicate=made_up.any_value, draws=20, chance=random.Random(1),
    )  # fmt: skip
    point.note_times("prune, all files in one table", found.prune_ms)


def _event(number: int) -> Predicate:
    value = interval_of(_BIGINT, Number(str(number)))
    assert value is not None
    return within(1, _BIGINT, least=value, most=value)


async def main() -> None:
    order = await windows.order()
    async with growing_lake(order["dsn"]) as lake:
        await lake.add_tables(order["tables"])
        since = (await lake.head()).snapshot_id
        await lake.fill_snapshots(order["snapshots"])
        await windows.serve(FilesBySize(lake, since=since).window)


if __name__ == "__main__":
    windows.run(main())
