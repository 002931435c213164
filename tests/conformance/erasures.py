"""Erasures (E7): rows leave every snapshot, every replica, quarantine, the bus and restores."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lakebus.clock import new_uuid
from lakebus.errors import Fault, Forbidden, IdempotencyConflict, Unavailable
from lakebus.schemas import TableSchema
from storage.bus.interface import RejectSet
from storage.ingesting.deletes import DeleteAnswer
from storage.ingesting.erasures import ErasureService
from storage.ingesting.grants import Grant, Principal
from storage.ingesting.memory_keys import MemoryKeyStore
from storage.ingesting.table_cache import TableCache
from storage.maintenance.erasing import Replacement
from storage.maintenance.erasure import erase
from storage.maintenance.jobs import JobKind, JobState
from storage.reading.changes import ChangesRequest, Window
from storage.reading.query import QueryRequest
from storage.reading.resolve import SnapshotChoice
from tests.conformance.delete_rig import DeleteRig, delete_rig
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, LakeHarness, entry_of
from tests.conformance.sql import Replica, everything
from tests.conformance.upkeep import files_of, swap_of
from tests.failpoints.actions import Raise, Run
from tests.failpoints.markers import markers_of
from tests.failpoints.points import Failpoints

ADMIN = Principal(1, "someone", (Grant("admin"), Grant("query"), Grant("ingest")))
MARKER = "secret-7f3a"


class EraseRig(DeleteRig):
    """A rig whose service and workers are of erasures."""

    __slots__ = ()

    async def erase(self, where: str, **more: Any) -> DeleteAnswer:
        given = {"principal": ADMIN, **more}
        request = self.request(where, **given)
        asking = asyncio.ensure_future(self.service.delete(request, self.checker))
        while not asking.done():
            await self.erase_claimed()
            await asyncio.sleep(0.005)
        return await asking

    async def erase_claimed(self) -> Mapping[str, Any] | None:
        claim = await self.claim(JobKind.ERASE)
        if claim is None:
            return None
        try:
            report = await erase(self.context(claim), claim.job)
        except BaseException:
            await self.lake.jobs.give_back(claim, delay_s=0.0, error="it died")
            raise
        await self.lake.jobs.finish(claim, report)
        return report

    async def objects_with(self, marker: str) -> list[str]:
        """Objects of the lake's data that hold a text, as it was written."""

        store = self.stack.writer.store
        keys = [key async for key, _ in store.list("") if not key.startswith("erasures/")]
        return [key for key in keys if marker.encode() in await store.get(key)]

    async def histories(self, upto: int) -> dict[int, list[int]]:
        return {number: await self.ids(number) for number in range(2, upto + 1)}


@asynccontextmanager
async def erase_rig(lake: LakeHarness, folder: Path) -> AsyncIterator[EraseRig]:
    async with delete_rig(lake, folder) as made:
        service = ErasureService(
            jobs=lake.jobs,
            tables=TableCache(lake.catalog),
            resolver=made.stack.replica.resolver,
            codec=made.service._codec,
            keys=MemoryKeyStore(),
            bus=lake.bus,
        )
        yield EraseRig(made.stack, service, made.checker, folder)


@pytest.fixture
async def erasing(open_lake: OpenLake, tmp_path: Path) -> AsyncIterator[EraseRig]:
    async with erase_rig(await open_lake(claim_entries_max=1), tmp_path) as made:
        await made.lake.create()
        yield made


async def _tell(rig: EraseRig) -> tuple[int, dict[int, list[int]]]:
    """A history with a compaction, a delete and a tag, and what is left of it without row 1."""

    await rig.publish(1, 2, note=MARKER)
    await rig.publish(3, 4)
    await rig.compact()
    await rig.publish(1, 5)
    head = await rig.publish(6)
    await rig.lake.upkeep.create_tag("kept", head - 2, created_by="someone")
    before = await rig.histories(head)
    return head, {n: [i for i in ids if i != 1] for n, ids in before.items()}


async def test_E7_erasure_takes_rows_from_every_snapshot(erasing: EraseRig) -> None:
    head, left = await _tell(erasing)
    found = await erasing.erase("id = 1")
    assert found.done
    assert found.report is not None
    assert await erasing.histories(head) == left
    assert found.snapshot_id == head + 1
    assert await erasing.ids() == [2, 3, 4, 5, 6]
    assert found.deleted_rows == 2
    snapshot = await erasing.lake.catalog.snapshot(head + 1)
    assert snapshot.operation == "erase"
    runs = found.report["snapshots"]
    lost = {
        n: run["rows"]
        for run in runs
        for n in range(run["first_snapshot_id"], run["last_snapshot_id"] + 1)
    }
    first = await erasing.lake.catalog.table("t")
    assert first is not None
    assert max(lost) == head
    assert [lost[head], lost[head - 1], lost[head - 2]] == [2, 2, 1]
    # The rows that share a file with them keep their places and values.
    (again,) = await erasing.stack.rows("SELECT note FROM t WHERE id = 2")
    assert again == [MARKER]


async def test_E7_erasure_leaves_no_object_and_no_segment(erasing: EraseRig) -> None:
    erasing.own_cages = True
    await erasing.publish(1, 2, note=MARKER)
    await erasing.publish(3)
    await erasing.compact()
    await erasing.publish(4, note=f"{MARKER} too")
    # What a writer left behind who died before he published.
    store = erasing.stack.writer.store
    (live, *_) = await erasing.lake.upkeep.live_files(1)
    (stray,) = await erasing.lake.upkeep.register_intents(1, 1, owner=new_uuid(), ttl_s=60)
    await store.put_new(f"tables/1/{stray}.parquet", await store.get(live.object_key))
    assert await erasing.objects_with(MARKER)
    found = await erasing.erase("note LIKE ?", parameters=[f"{MARKER}%"])
    assert found.report is not None
    assert found.report["stray_objects"] == 1, found.report
    assert found.report["bus_bytes_left"] == 0
    assert not await erasing.objects_with(MARKER)
    # The bus says no more of them either.
    assert (await erasing.lake.bus.empty({0: 99, 1: 99, 2: 99})).bytes_left == 0
    condemned = await erasing.lake.upkeep.condemned(state="deleted")
    assert {one.reason for one in condemned} == {"erased"}
    assert not await erasing.lake.upkeep.condemned(state="deleting")
    records = [key async for key, _ in store.list("erasures/")]
    assert f"erasures/{found.job_id}.json" in records
    assert await erasing.ids() == [3]


async def test_E7_erasure_keeps_receipts_and_keys(erasing: EraseRig) -> None:
    table = await erasing.lake.catalog.table("t")
    assert table is not None
    entry = entry_of(table.schema, [1, 2], key="k")
    accepted = await erasing.lake.accept(entry)
    await erasing.stack.writer.publish_one()
    await erasing.erase("true")
    record = await erasing.lake.bus.find_key(1, "t", "k")
    assert record is not None
    assert record.receipt == accepted.receipt
    assert await erasing.ids() == []


async def test_E7_erasure_reaches_a_replica_with_warm_caches(erasing: EraseRig) -> None:
    head, left = await _tell(erasing)
    view = await erasing.lake.second()
    async with Replica(
        view, codec=erasing.service._codec, engine=erasing.stack.engine,
        store=erasing.stack.writer.store,
    ) as other:  # fmt: skip

        async def ids(snapshot_id: int) -> tuple[list[int], tuple[str, ...]]:
            choice = SnapshotChoice(snapshot_id=snapshot_id)
            request = QueryRequest("SELECT id FROM t ORDER BY id", snapshot=choice)
            answer = await other.service.query(request, everything)
            try:
                rows = json.loads(await answer.read_all())
                return [int(row[0]) for row in rows], answer.erasures
            finally:
                await answer.aclose()

        assert 1 in (await ids(head))[0]
        assert (await ids(head))[1] == ()
        found = await erasing.erase("id = 1")
        for number, expected in left.items():
            assert (await ids(number))[0] == expected
        # Affected snapshots carry the mark, later ones do not.
        assert (await ids(head))[1] == (str(found.job_id),)
        assert found.snapshot_id is not None
        assert (await ids(found.snapshot_id))[1] == ()
        fed: list[int] = []
        window: Window | None = Window(0, head)
        while window is not None:
            page = await other.changes.page(ChangesRequest("t", window, integers="number"))
            fed += [row[4] for row in json.loads(page.body)]
            window = None if page.cursor is None else Window.decode(page.cursor, 1)
        assert sorted(fed) == left[head]


async def test_E7_erasure_filters_entries_accepted_before_it(erasing: EraseRig) -> None:
    table = await erasing.lake.catalog.table("t")
    assert table is not None
    await erasing.lake.accept(entry_of(table.schema, [1, 2]))
    asking = asyncio.ensure_future(
        erasing.service.delete(erasing.request("id = 1", principal=ADMIN), erasing.checker)
    )
    while not await erasing.lake.jobs.jobs(kind=JobKind.ERASE):
        await asyncio.sleep(0.005)
    later = await erasing.lake.accept(entry_of(table.schema, [1, 9]))
    working = asyncio.ensure_future(erasing.erase_claimed())
    await asyncio.sleep(0)
    while not working.done():
        with contextlib.suppress(Exception):
            await asyncio.wait_for(erasing.stack.writer.publish_one(), 1)
        await asyncio.sleep(0.01)
    await working
    assert (await asking).done
    assert later.receipt
    assert await erasing.ids() == [1, 2, 9]


async def test_E7_erasure_reaches_quarantine(erasing: EraseRig) -> None:
    table = await erasing.lake.catalog.table("t")
    assert table is not None
    rejects = RejectSet(table.schema.table_id, 1, 1, b'{"rows":[{"value":{"id":"x"}}]}')
    worker = erasing.lake.worker()
    kept = []
    for ids in ([1, 2], [3]):
        await erasing.lake.accept(entry_of(table.schema, ids))
        claim = await worker.claim()
        kept.append(claim.lease.lo)
        await worker.publish(await worker.stage(claim, quarantine=[claim.lease.lo]))
    await erasing.lake.accept(entry_of(table.schema, [4], rejects=[rejects]))
    await erasing.stack.writer.publish_one()
    counted = await erasing.erase("id = 1", dry_run=True)
    assert counted.report is not None
    assert counted.report["quarantine_erased"] == 2
    assert all(item.payload for item in await erasing.lake.bus.quarantine_items())
    found = await erasing.erase("id = 1")
    assert found.report is not None
    assert found.report["quarantine_looked_at"] == 3
    assert found.report["quarantine_erased"] == 2
    items: dict[str, list[bool]] = {"entry": [], "rejects": []}
    for item in await erasing.lake.bus.quarantine_items():
        items[item.kind].append(bool(item.payload))
        if not item.payload:
            assert "erased" in item.reason
    assert sorted(items["entry"]) == [False, True]
    assert items["rejects"] == [False]
    assert await erasing.ids() == [4]


async def test_E7_erasure_and_a_compaction_in_between(
    erasing: EraseRig, failpoints: Failpoints
) -> None:
    head, left = await _tell(erasing)

    async def compact() -> None:
        await erasing.compact()

    failpoints.arm("erasure.before_replace", Run(compact))
    found = await erasing.erase("id = 1")
    assert found.snapshot_id is not None
    assert await erasing.histories(head) == left
    assert (await erasing.histories(found.snapshot_id))[found.snapshot_id - 1] == left[head]
    assert await erasing.ids() == [2, 3, 4, 5, 6]


_STEPS = [*markers_of("erasure")]
_STEPS.remove("erasure.after_quarantined")


@pytest.mark.parametrize("point", _STEPS)
async def test_E7_erasure_that_dies_is_done_in_the_end(erasing: EraseRig, point: str) -> None:
    head, left = await _tell(erasing)
    asking = asyncio.ensure_future(
        erasing.service.delete(
            erasing.request("id = 1", principal=ADMIN, idempotency_key="k"), erasing.checker
        )
    )
    while not await erasing.lake.jobs.jobs(kind=JobKind.ERASE):
        await asyncio.sleep(0.005)
    with Failpoints() as failpoints:
        failpoints.arm(point, Raise(KeyboardInterrupt()))
        with contextlib.suppress(KeyboardInterrupt):
            await erasing.erase_claimed()
    await erasing.erase_claimed()
    found = await asking
    assert found.state is JobState.DONE
    assert await erasing.histories(head) == left
    assert await erasing.ids() == [2, 3, 4, 5, 6]
    assert found.deleted_rows == 2
    assert not await erasing.lake.upkeep.condemned(state="deleting")
    again = await erasing.erase("id = 1", idempotency_key="k")
    assert again == dataclasses.replace(found, replayed=True)
    with pytest.raises(IdempotencyConflict):
        await erasing.erase("id = 2", idempotency_key="k")


async def test_E7_an_exchange_leaves_as_many_rows_as_it_says(
    lake: LakeHarness, table: TableSchema
) -> None:
    files, erasure_id = await files_of(lake, table, 2), new_uuid()
    await lake.erasing.begin(erasure_id, table.table_id)
    both = (await swap_of(lake, table, files)).files[0]
    for rows in (0, 1):  # an old file has one row, this one two
        wrong = Replacement(files[0].file_id, rows, both)
        with pytest.raises((Fault, Unavailable)):
            await lake.erasing.replace(erasure_id, table.table_id, [wrong])
    unintended = dataclasses.replace(both, file_id=new_uuid(), rows=1)
    lost = Replacement(files[0].file_id, 0, unintended)
    assert list(await lake.erasing.replace(erasure_id, table.table_id, [lost])) == []
    assert await lake.upkeep.live_files(table.table_id) == files
    assert (await lake.catalog.head()).erasures == 0


async def test_E7_erasure_needs_admin_and_a_dry_run_changes_nothing(erasing: EraseRig) -> None:
    head, left = await _tell(erasing)
    with pytest.raises(Forbidden):
        await erasing.erase(
            "id = 1", principal=dataclasses.replace(ADMIN, grants=(Grant("query"), Grant("ingest")))
        )
    counted = await erasing.erase("id = 1", dry_run=True)
    assert counted.deleted_rows == 2
    assert await erasing.ids(head) != left[head]
    assert (await erasing.lake.catalog.head()).erasures == 0
    assert not [key async for key, _ in erasing.stack.writer.store.list("erasures/")]


async def test_E7_erasure_is_done_again_before_a_restored_lake_is_read(
    open_lake: OpenLake, tmp_path: Path
) -> None:
    lake = await open_lake(claim_entries_max=1)
    lake.needs(Capability.RESTORE)
    (tmp_path / "one").mkdir()
    async with erase_rig(lake, tmp_path / "one") as rig:
        lake.keep_records_in(rig.stack.writer.store)
        await lake.create()
        await rig.publish(1, 2, note=MARKER)
        await rig.publish(3)
        head = await rig.head()
        backup = await lake.take_backup()
        await rig.erase("id = 1")
        await rig.publish(4)
        await lake.restore(backup)
        assert not await lake.erasing.erased()
        async with Replica(
            lake, codec=rig.service._codec, engine=rig.stack.engine,
            store=rig.stack.writer.store,
        ) as other:  # fmt: skip
            with pytest.raises(Unavailable, match="erased"):
                await _ids(other, head)
            assert await rig.erase_claimed() is not None
            # The object of the backup's file was deleted; what was left of it took its place.
            assert await _ids(other, head) == [2, 3]
        assert (await lake.catalog.head()).erasures_owed == frozenset()


async def _ids(replica: Replica, snapshot_id: int) -> list[int]:
    choice = SnapshotChoice(snapshot_id=snapshot_id)
    request = QueryRequest("SELECT id FROM t ORDER BY id", snapshot=choice)
    answer = await replica.service.query(request, everything)
    try:
        return [int(row[0]) for row in json.loads(await answer.read_all())]
    finally:
        await answer.aclose()
