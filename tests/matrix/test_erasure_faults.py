"""The transactions of an erasure, killed at each statement, and its emptying of the bus (E7)."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

from lakebus.clock import new_uuid
from lakebus.errors import OutcomeUnknown
from storage.files.objects import MemoryObjectStore
from storage.maintenance.erasing import Replacement
from storage.maintenance.erasure_records import write_record
from storage.postgres import PostgresLake
from storage.postgres.erasures import compare_erasures
from tests.conformance.harness import LakeView
from tests.conformance.upkeep import files_of, swap_of
from tests.conformance.worker import Worker
from tests.failpoints.actions import Raise
from tests.failpoints.markers import markers_of
from tests.failpoints.points import Failpoints
from tests.matrix.rig import MatrixLake, keyed_entries, killed_at_each
from tests.matrix.test_purge_faults import Crashed, objects

pytestmark = pytest.mark.usefixtures("patient_sessions")


async def test_E7_an_erasure_killed_at_any_statement_changes_nothing(
    matrix_lake: MatrixLake,
) -> None:
    lake, table = matrix_lake, await matrix_lake.create()
    files, erasure_id = await files_of(lake, table, 2), new_uuid()
    await lake.erasing.begin(erasure_id, table.table_id)
    new = (await swap_of(lake, table, files[:1])).files[0]
    taken = [
        Replacement(files[0].file_id, 0, new, adopted=False),
        Replacement(files[1].file_id, 1, None, adopted=False),
    ]
    await killed_at_each(
        lake,
        markers_of("replace_files"),
        lambda: lake.erasing.replace(erasure_id, table.table_id, taken),
        OutcomeUnknown,
    )
    (left,) = await lake.upkeep.live_files(table.table_id)
    assert (left.file_id, left.first_snapshot) == (new.file_id, files[0].first_snapshot)

    names = await lake.upkeep.register_intents(table.table_id, 1, owner=new_uuid(), ttl_s=60)
    await killed_at_each(
        lake,
        markers_of("erase_strays"),
        lambda: lake.erasing.erase_strays(table.table_id, names),
        OutcomeUnknown,
    )
    publication_id = new_uuid()
    await killed_at_each(
        lake,
        markers_of("finish_erasure"),
        lambda: lake.erasing.finish(erasure_id, table.table_id, publication_id, {}),
        OutcomeUnknown,
    )
    doomed = {one.file_id for one in await lake.erasing.doomed(table.table_id)}
    assert doomed == {files[0].file_id, files[1].file_id, *names}
    assert (await lake.catalog.head()).erasures == 1


async def test_E7_what_is_owed_after_a_restore_is_noted_whole_or_not_at_all(
    matrix_lake: MatrixLake,
) -> None:
    lake, table, store = matrix_lake, await matrix_lake.create(), MemoryObjectStore()
    for _ in range(2):
        erasure_id = new_uuid()
        record = {"erasure_id": str(erasure_id), "table_id": table.table_id}
        await write_record(store, erasure_id, record)
    await lake.execute("UPDATE lakebus.lake SET erasures_serial = 0")
    pool = lake.erasing._pool  # type: ignore[attr-defined]
    await killed_at_each(
        lake, markers_of("owe_erasures"), lambda: compare_erasures(pool, store=store)
    )
    assert len(await lake.jobs.jobs()) == 2


async def test_E7_leaving_a_ring_killed_at_any_statement_changes_nothing(
    matrix_lake: MatrixLake,
) -> None:
    lake, table = matrix_lake, await matrix_lake.create()
    await files_of(lake, table, 2)
    ends = await lake.bus.ends()
    places = [*markers_of("leave_segments"), *markers_of("switch_segments")]
    await killed_at_each(lake, places, lambda: lake.bus.empty(ends))
    assert (await lake.bus.empty(ends)).bytes_left == 0


@pytest.mark.parametrize("point", markers_of("emptying"))
async def test_E7_an_emptying_of_the_bus_that_dies_is_done_by_the_next(
    matrix_lake: MatrixLake, failpoints: Failpoints, point: str
) -> None:
    """Claim-check objects and segments alike; keys still answer with their receipts."""

    lake, table = matrix_lake, await matrix_lake.create()
    await files_of(lake, table, 1)  # an entry whose bytes are in the ring
    store = MemoryObjectStore()
    settings = dataclasses.replace(lake.settings, claim_check_bytes=1)
    spilling = await PostgresLake.open(lake.dsn, bus_settings=settings, object_store=store)
    view = LakeView(spilling.bus, spilling.catalog, spilling.jobs, spilling.upkeep)
    try:
        entries = keyed_entries(table, range(4))
        await lake.offer(entries, view)
        await Worker(bus=view.bus, catalog=view.catalog, files=lake.files).publish_one()
        assert (await objects(lake, store))[1]
        ends = await view.bus.ends()
        failpoints.arm(point, Raise(Crashed()))
        with contextlib.suppress(Crashed):
            await view.bus.empty(ends)
        await view.bus.empty(ends)
        emptied = await view.bus.empty(ends)
        assert emptied.bytes_left == 0
        named_now, kept = await objects(lake, store)
        assert not named_now
        doomed = {one.object_key for one in await spilling.upkeep.condemned(state="deleting")}
        assert kept == doomed, "an object that nobody will ever delete"
        await lake.offer_again(entries)
    finally:
        await spilling.close()
