"""E3, E4, E5: the collection job, with a store that fails and with crashes between its steps."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lakebus.clock import SYSTEM_CHANCE, new_uuid
from lakebus.errors import MalformedRequest, Unavailable
from lakebus.schemas import Column, TableSchema
from storage.bus.memory import MemoryBus
from storage.catalog.memory import MemoryCatalog
from storage.catalog.memory_upkeep import MemoryUpkeep
from storage.engine.settings import EngineSettings
from storage.files.objects import MemoryObjectStore
from storage.maintenance.collection import collect
from storage.maintenance.interface import Swap, SwapOperation
from storage.maintenance.jobs import Job, JobContext, JobKind, JobState
from storage.maintenance.settings import MaintenanceSettings
from storage.memory_clock import ManualClock
from storage.memory_lake import MemoryLake
from storage.memory_state import FileRow
from tests.conformance.worker import fake_file
from tests.failpoints.actions import Pause, Run
from tests.failpoints.markers import markers_of
from tests.failpoints.points import Failpoints

_WINDOW_S = 100.0


class Store(MemoryObjectStore):
    """Counts how many deletes run at once; those of `broken` keys fail, all while it is `away`."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.broken: set[str] = set()
        self.running = self.most = self.deletes = 0

    async def delete(self, key: str) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        self.deletes += 1
        try:
            await asyncio.sleep(0)
            if self.away or key in self.broken:
                raise Unavailable("the store was told to fail")
            await super().delete(key)
        finally:
            self.running -= 1

    async def keys(self) -> set[str]:
        return {key async for key, _ in self.list()}


class Rig:
    """A lake with one table, whose objects are really there."""

    def __init__(self, tmp_path: Path, **settings: Any) -> None:
        self.clock = ManualClock()
        self.lake = MemoryLake(clock=self.clock, seed=3)
        self.catalog, self.upkeep = MemoryCatalog(self.lake), MemoryUpkeep(self.lake)
        self.store = Store()
        self.notes: list[Mapping[str, Any]] = []
        self._settings = MaintenanceSettings(
            **{"safety_window_s": _WINDOW_S, "orphan_window_s": _WINDOW_S, **settings}
        )
        self._tmp_path = tmp_path
        self.table: TableSchema

    async def start(self) -> None:
        columns = (Column(0, "id", "bigint"),)
        self.table = (await self.catalog.create_table(name="t", columns=columns)).schema

    def context(self) -> JobContext:
        async def note(report: Mapping[str, Any]) -> None:
            self.notes.append(report)

        return JobContext(
            catalog=self.catalog,
            upkeep=self.upkeep,
            bus=MemoryBus(self.lake),
            store=self.store,
            settings=self._settings,
            engine=EngineSettings(str(self._tmp_path), str(self._tmp_path)),
            temp_dir=self._tmp_path,
            clock=self.clock,
            chance=SYSTEM_CHANCE,
            note=note,
        )

    async def collect(self, *, dry_run: bool = False, **parameters: Any) -> Mapping[str, Any]:
        job = Job(
            job_id=new_uuid(),
            kind=JobKind.COLLECT,
            table_id=None,
            parameters=parameters,
            dry_run=dry_run,
            requested_by="test",
            state=JobState.RUNNING,
            attempt=1,
            created_at=self.lake.now(),
        )
        return await collect(self.context(), job)

    async def write(self, count: int, *, ttl_s: float = 60.0) -> list[uuid.UUID]:
        """Names with intents and objects."""

        names = await self.upkeep.register_intents(
            self.table.table_id, count, owner=new_uuid(), ttl_s=ttl_s
        )
        for name in names:
            await self.store.put_new(self.key(name), b"rows")
        return list(names)

    def key(self, name: uuid.UUID) -> str:
        return f"tables/{self.table.table_id}/{name}.parquet"

    async def add(self, count: int) -> list[uuid.UUID]:
        """Data files of a row, made by hand: no ingest runs here."""

        names = await self.write(count)
        first = self.lake.state.head_id + 1
        for name in names:
            file = fake_file(name, self.table.table_id, 1, 1)
            named = dataclasses.replace(file, object_key=self.key(name), first_snapshot=first)
            del self.lake.state.intents[name]
            self.lake.state.files[name] = FileRow(named, first)
        self.lake.next_snapshot("append", {}, at=self.lake.next_publish_time())
        return names

    async def unreferenced(self, count: int) -> list[uuid.UUID]:
        names = await self.add(count)
        swap = Swap(new_uuid(), self.table.table_id, SwapOperation.RETAIN, tuple(names), (), count)
        assert (await self.upkeep.publish_swap(swap)).snapshot_id
        self.clock.advance_s(1)
        await self.upkeep.expire_snapshots(keep_s=0, keep_count=1, limit=1_000)
        return names

    def wait(self) -> None:
        self.clock.advance_s(_WINDOW_S + 1)

    async def states(self) -> dict[uuid.UUID, str]:
        return {one.file_id: one.state for one in await self.upkeep.condemned()}


@pytest.fixture
async def rig(tmp_path: Path) -> Rig:
    rig = Rig(tmp_path)
    await rig.start()
    return rig


async def test_E3_only_what_was_condemned_for_the_window_is_deleted(rig: Rig) -> None:
    gone, live = await rig.unreferenced(3), await rig.add(2)
    report = await rig.collect()
    assert (report["condemned"], report["deleted"], report["condemned_bytes"]) == (3, 0, 300)
    assert await rig.store.keys() == {rig.key(name) for name in (*gone, *live)}
    rig.clock.advance_s(_WINDOW_S - 1)
    assert (await rig.collect())["deleted"] == 0
    rig.clock.advance_s(2)
    report = await rig.collect()
    assert (report["condemned"], report["deleted"], report["deletes_failed"]) == (0, 3, 0)
    assert {one["file_id"] for one in report["deleted_files"]} == {str(name) for name in gone}
    assert all(one["reason"] == "unreferenced" for one in report["deleted_files"])
    assert await rig.store.keys() == {rig.key(name) for name in live}
    assert await rig.states() == dict.fromkeys(gone, "deleted")
    assert report["limits"] == {
        "deletes_max": 10_000,
        "safety_window_s": _WINDOW_S,
        "orphan_window_s": _WINDOW_S,
    }
    assert rig.notes[-1] == {"step": "delete", "deleted": 3, "of": 3}


async def test_E4_orphans_go_after_their_window_and_strangers_never(rig: Rig) -> None:
    dead, alive = await rig.write(2, ttl_s=0.5), await rig.write(1, ttl_s=10_000)
    stranger = f"tables/9/{new_uuid()}.parquet"
    await rig.store.put_new(stranger, b"?")
    await rig.store.put_new("tables/9/notes.txt", b"?")
    assert (await rig.collect())["orphans"] == 0
    rig.clock.advance_s(_WINDOW_S)  # they expired, and not yet so long ago
    assert (await rig.collect())["orphans"] == 0
    rig.clock.advance_s(1)
    assert (await rig.collect())["orphans"] == 2
    rig.wait()
    report = await rig.collect(sweep=True)
    assert report["deleted"] == 2
    left = await rig.store.keys()
    assert left == {rig.key(alive[0]), stranger, "tables/9/notes.txt"}
    assert not left & {rig.key(name) for name in dead}
    sweep = report["sweep"]
    assert (sweep["objects"], sweep["unknown"], sweep["unknown_bytes"], sweep["late"]) == (
        3,
        2,
        2,
        0,
    )
    assert set(sweep["unknown_keys"]) == {stranger, "tables/9/notes.txt"}


async def test_E4_an_object_that_a_paused_writer_brings_late_goes_in_the_sweep(rig: Rig) -> None:
    names = await rig.unreferenced(2)
    await rig.collect()
    rig.wait()
    await rig.collect()
    await rig.store.put_new(rig.key(names[0]), b"late")
    would = await rig.collect(dry_run=True, sweep=True)
    assert would["sweep"]["late_keys"] == [rig.key(names[0])]
    assert await rig.store.keys() == {rig.key(names[0])}
    rig.store.away = True
    assert (await rig.collect(sweep=True))["sweep"]["late_failed"] == 1
    rig.store.away = False
    done = await rig.collect(sweep=True)
    assert (done["sweep"]["late"], done["sweep"]["late_bytes"]) == (1, 4)
    assert await rig.store.keys() == set()


async def test_E4_a_file_that_is_written_during_the_sweep_is_no_stranger(
    rig: Rig, failpoints: Failpoints
) -> None:
    await rig.write(1)

    async def publish() -> None:
        await rig.add(1)

    failpoints.arm("collection.after_listing", Run(publish))
    report = await rig.collect(sweep=True)
    assert report["sweep"]["unknown"] == 0


async def test_E5_a_dry_run_tells_what_each_step_would_do_and_changes_nothing(rig: Rig) -> None:
    gone = await rig.unreferenced(2)
    await rig.collect()
    orphans = await rig.write(1, ttl_s=1)
    rig.wait()
    fresh = await rig.unreferenced(1)
    before = rig.lake.backup()
    would = await rig.collect(dry_run=True)
    assert rig.lake.state == before
    assert len(await rig.store.keys()) == 4
    for step, names in (("condemned", fresh), ("orphans", orphans), ("deleted", gone)):
        assert would[step] == len(names)
        assert {one["file_id"] for one in would[f"{step}_files"]} == {str(n) for n in names}
    did = await rig.collect()
    for step in ("condemned", "orphans", "deleted"):
        assert did[f"{step}_files"][0]["object_key"] == would[f"{step}_files"][0]["object_key"]


async def test_E5_a_run_deletes_no_more_than_its_limit(tmp_path: Path) -> None:
    rig = Rig(tmp_path, deletes_max=3)
    await rig.start()
    await rig.unreferenced(5)
    assert (await rig.collect())["condemned"] == 3
    rig.wait()
    assert (await rig.collect())["deleted"] == 3
    rig.wait()
    assert (await rig.collect())["deleted"] == 2


async def test_E5_old_records_are_forgotten(tmp_path: Path) -> None:
    rig = Rig(tmp_path, deleted_keep_s=50.0)
    await rig.start()
    await rig.unreferenced(2)
    for expected in (0, 0, 2):
        assert (await rig.collect())["records_forgotten"] == expected
        rig.wait()
    assert await rig.states() == {}


async def test_E3_what_the_store_cannot_delete_is_deleted_by_the_next_run(rig: Rig) -> None:
    names = await rig.unreferenced(20)
    await rig.collect()
    rig.wait()
    rig.store.broken = {rig.key(names[0])}
    report = await rig.collect()
    assert (report["deleted"], report["deletes_failed"]) == (19, 1)
    assert 1 < rig.store.most <= 8
    assert (await rig.states())[names[0]] == "deleting"
    rig.store.broken = set()
    report = await rig.collect()
    assert (report["deleted"], report["deletes_failed"]) == (1, 0)
    assert await rig.store.keys() == set()


async def test_E3_a_store_that_is_away_is_not_asked_for_everything(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.start()
    await rig.unreferenced(600)
    await rig.collect()
    rig.wait()
    rig.store.away = True
    report = await rig.collect()
    assert (report["deleted"], report["deletes_failed"], rig.store.deletes) == (0, 600, 500)
    rig.store.away = False
    assert (await rig.collect())["deleted"] == 600


async def test_E3_an_object_that_is_gone_already_is_no_failure(rig: Rig) -> None:
    (name,) = await rig.unreferenced(1)
    await rig.store.delete(rig.key(name))
    await rig.collect()
    rig.wait()
    assert (await rig.collect())["deleted"] == 1
    assert await rig.states() == {name: "deleted"}


async def test_E3_a_crash_between_any_two_steps_loses_nothing_and_is_finished_by_the_next(
    tmp_path: Path, failpoints: Failpoints
) -> None:
    places = [name for name in markers_of("collection") if name != "collection.after_listing"]
    assert len(places) >= 5
    for place in places:
        rig = Rig(tmp_path)
        await rig.start()
        gone, live = await rig.unreferenced(3), await rig.add(2)
        orphans = await rig.write(1, ttl_s=1)
        await rig.collect()
        rig.wait()
        kept = await rig.unreferenced(1)
        failpoints.arm(place, Pause())
        task = asyncio.ensure_future(rig.collect())
        await failpoints.reached(place)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        failpoints.disarm(place)
        assert {rig.key(name) for name in (*live, *kept)} <= await rig.store.keys(), place
        await rig.collect()
        rig.wait()
        await rig.collect()
        states = await rig.states()
        assert states == dict.fromkeys((*gone, *orphans, *kept), "deleted"), place
        assert await rig.store.keys() == {rig.key(name) for name in live}, place


async def test_E3_two_collections_at_once_do_what_one_does(rig: Rig) -> None:
    await rig.unreferenced(5)
    await rig.collect()
    rig.wait()
    await asyncio.gather(rig.collect(), rig.collect())
    assert set((await rig.states()).values()) == {"deleted"}
    assert await rig.store.keys() == set()


async def test_a_collection_knows_its_parameters(rig: Rig) -> None:
    for parameters in ({"sweep": 1}, {"everything": True}):
        with pytest.raises(MalformedRequest):
            await rig.collect(**parameters)
