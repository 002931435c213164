"""The failure matrix, files: puts that fail, are cut, are late, or are never published.

What collection stands on: no snapshot and no bus entry names an object that is missing or not
whole, and each object that nobody names still has the write intent that tells it, also after that
intent has expired (C6, E4). The audit checks both in every test; and where an orphan is left,
collection finds it and touches nothing else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.coordinator import RangeEnd
from lakebus.errors import Unavailable
from storage.bus.interface import NewEntry, SchemaStale
from storage.catalog.interface import Commit
from storage.files.objects import LocalObjectStore
from storage.postgres.catalog import PostgresCatalog
from tests.conformance.harness import COLUMNS, entry_of
from tests.faults.disks import DiskPoint, no_space, watched_disk
from tests.faults.store import FaultyStore, Operation, Script, Seeded, StoreCall, StoreFault, Within
from tests.matrix.rig import named
from tests.matrix.worker_rig import WorkerRig, rig
from tests.matrix.worker_roles import DiskFate, FailpointFate

__all__ = ["rig"]

#: Payloads above this go to the object store first.
SPILL_BYTES = 1_000


def large_entry(rig: WorkerRig, ids: Sequence[int], *, key: str | None = None) -> NewEntry:
    """More than `SPILL_BYTES`, which no codec makes small."""
    note = random.Random(ids[0]).randbytes(3 * SPILL_BYTES).hex()
    return entry_of(rig.table, ids, key=key, note=note, ordering_key="one")


def payload_store(rig: WorkerRig, fault: StoreFault) -> FaultyStore:
    """The rig's folder behind a store where the first put of a payload goes wrong."""
    script = Script().on(Operation.PUT, fault, prefix="bus/")
    return FaultyStore(LocalObjectStore(rig.root), script)


async def refused_after_put(rig: WorkerRig, store: FaultyStore) -> NewEntry:
    """The table changes between the put of a payload and the append that was to name it. Returns
    the entry as the table takes it now."""
    entry = large_entry(rig, [1], key="k")
    append = asyncio.create_task(rig.lake.bus.append(entry))
    await store.reached()
    schema = dataclasses.replace(rig.table, version=2)
    await rig.lake.catalog.alter_table(schema=schema, expected_version=1)
    store.let_go()
    assert await append == SchemaStale((rig.table.table_id,))
    (part,) = entry.parts
    return dataclasses.replace(entry, parts=(dataclasses.replace(part, schema_version=2),))


def puts(store: FaultyStore, part: str) -> list[StoreCall]:
    wanted = (Operation.PUT, part)
    return [c for c in store.calls if (c.operation, c.key.partition("/")[0]) == wanted]


# --- M07: the object is there, and nobody refers to it ------------------------------------------


async def test_M07_a_spilled_payload_whose_append_is_refused_is_told_by_its_intent(
    rig: WorkerRig,
) -> None:
    store = payload_store(rig, StoreFault.HELD_AFTER)
    await rig.configure(store=store, claim_check_bytes=SPILL_BYTES, intent_ttl_s=1.0)
    again = await refused_after_put(rig, store)
    await rig.append_entry(again, [1])
    await rig.started()
    await rig.drain()
    found = await rig.audit()
    assert [Path(key).parent.name for key in found.orphans] == ["bus"]
    assert await rig.collect() == found.orphans
    after = await rig.audit()
    assert (after.files, after.orphans) == (found.files, frozenset())


@pytest.mark.parametrize("fault", [StoreFault.LOST_ANSWER, StoreFault.LATE_EFFECT])
async def test_M07_a_payload_whose_put_was_not_heard_of_is_sent_again_under_another_name(
    rig: WorkerRig, fault: StoreFault
) -> None:
    store = payload_store(rig, fault)
    await rig.configure(store=store, claim_check_bytes=SPILL_BYTES)
    entry = large_entry(rig, [1, 2], key="k")
    with pytest.raises(Unavailable):
        await rig.lake.bus.append(entry)
    await rig.append_entry(entry, [1, 2])
    await store.settle()
    await rig.started()
    await rig.drain()
    found = await rig.audit()
    assert len(found.orphans) == 1
    assert len({call.key for call in puts(store, "bus")}) == 2


async def test_M07_a_payload_whose_intent_was_collected_is_not_appended(rig: WorkerRig) -> None:
    store = payload_store(rig, StoreFault.HELD_AFTER)
    await rig.configure(store=store, claim_check_bytes=SPILL_BYTES)
    entry = large_entry(rig, [1], key="k")
    append = asyncio.create_task(rig.lake.bus.append(entry))
    await store.reached()
    (call,) = puts(store, "bus")
    await rig.look("DELETE FROM write_intent WHERE file_id = $1", Path(call.key).stem)
    (rig.root / call.key).unlink()  # as collection does, in this order
    store.let_go()
    with pytest.raises(Unavailable, match="send it again"):
        await append
    await rig.append_entry(entry, [1])
    await rig.started()
    await rig.drain()
    assert (await rig.audit()).orphans == frozenset()


async def test_M07_killed_between_the_put_of_a_payload_and_its_append(rig: WorkerRig) -> None:
    await rig.configure(claim_check_bytes=SPILL_BYTES)
    entry = large_entry(rig, [1], key="k")
    dying = await rig.process(disk=DiskFate(DiskPoint.FOLDER_SYNCED, "kill", "bus"))
    dying.tell("append", entry)
    await dying.dies()
    await rig.append_entry(entry, [1])
    await rig.started()
    await rig.drain()
    assert len((await rig.audit()).orphans) == 1


async def test_M07_a_file_whose_publish_never_comes_is_told_by_its_expired_intent(
    rig: WorkerRig,
) -> None:
    await rig.configure(intent_ttl_s=0.3)
    await rig.append([1], [2])
    dying = await rig.process(failpoint=FailpointFate("coordinator.after_stage", "kill"))
    await dying.ask("start")
    await dying.dies()
    await rig.started()
    await rig.drain()
    found = await rig.audit()
    (orphan,) = found.orphans
    await rig.pass_s(0.3)
    (intent,) = await rig.look(
        "SELECT kind, expires_at < clock_timestamp() AS expired FROM write_intent"
        " WHERE file_id = $1",
        Path(orphan).stem,
    )
    assert (intent["kind"], intent["expired"]) == ("data", True)
    assert await rig.collect() == {orphan}
    after = await rig.audit()
    assert (after.files, after.orphans) == (found.files, frozenset())


async def test_M07_a_canary_whose_worker_died_is_an_orphan_too(rig: WorkerRig) -> None:
    """Only an entry that failed alone before makes a worker prove itself."""
    await rig.configure(intent_ttl_s=1.0)
    rig.roles = dataclasses.replace(rig.roles, intent_ttl_s=1.0)
    await rig.append([1])
    paused = await rig.worker()
    await rig.claim_within(paused, 5.0)
    dying = await rig.process(failpoint=FailpointFate("stager.after_canary_put", "kill"))
    dying.tell("start")
    await dying.dies()
    (canary,) = rig.root.glob("canary/*.parquet")
    await rig.started()
    await rig.drain()
    found = await rig.audit()
    # With it go the names of the two claims whose workers wrote nothing.
    assert canary.relative_to(rig.root).as_posix() in await rig.collect()
    assert not canary.exists()
    assert list(rig.root.glob("canary/*")) == []  # a worker that lives deletes its own
    assert await rig.look("SELECT * FROM write_intent") == []
    assert (await rig.audit()).files == found.files


# --- M13: killed in the middle of a put ---------------------------------------------------------


@pytest.mark.parametrize("unnamed_files", [True, False])
async def test_M13_killed_at_each_step_of_a_put_nothing_torn_is_ever_named(
    rig: WorkerRig, unnamed_files: bool
) -> None:
    """One worker and one entry for each step, all at once."""
    rig.roles = dataclasses.replace(rig.roles, ranges_in_flight=1)
    await rig.configure(claim_entries_max=1, intent_ttl_s=1.0)
    await rig.append(*([n] for n in range(len(DiskPoint))))
    dying = [
        await rig.process(disk=DiskFate(point, "kill"), unnamed_files=unnamed_files)
        for point in DiskPoint
    ]
    for process in dying:
        process.tell("start")
    assert [await process.dies() for process in dying] == list(DiskPoint)
    assert (await rig.audit(drained=False)).files == ()

    await rig.started()
    await rig.drain()
    found = await rig.audit()
    # Linked, and linked and synced: whole objects that nobody names. Torn ones were never linked.
    assert len(found.orphans) == 2
    assert len(found.torn) == (0 if unnamed_files else 5)
    assert found.quarantined == {}
    # The intents of those that never got so far are orphans like theirs: their names are dead.
    assert await rig.collect() >= found.orphans
    after = await rig.audit()
    assert (after.files, after.orphans) == (found.files, frozenset())


@pytest.mark.parametrize("unnamed_files", [True, False])
async def test_M13_file_and_folder_are_synced_before_any_publish_names_them(
    rig: WorkerRig, unnamed_files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    await rig.configure()
    await rig.append([1], [2])
    publish = PostgresCatalog.publish

    async def noted(catalog: PostgresCatalog, number: object, commits: Sequence[Commit]) -> object:
        steps.extend(f"published {f.object_key.rpartition('/')[2]}" for f in commits[0].files)
        return await publish(catalog, number, commits)  # type: ignore[arg-type]

    monkeypatch.setattr(PostgresCatalog, "publish", noted)

    def on_point(point: DiskPoint, path: Path) -> None:
        if "tables" in path.parts:
            steps.append(f"{point} {path.name}" if path.suffix else point)

    with watched_disk(on_point, unnamed_files=unnamed_files):
        await rig.started()
        await rig.drain()
    (key,) = (await rig.audit()).files
    name = Path(key).name
    assert steps == [
        "opened",
        "half_written",
        "written",
        "file_synced",
        f"linked {name}",
        f"folder_synced {name}",
        f"published {name}",
    ]


# --- M14: two writers of one range --------------------------------------------------------------


@pytest.mark.parametrize("point", [DiskPoint.HALF_WRITTEN, DiskPoint.FILE_SYNCED])
async def test_M14_a_zombie_and_its_successor_write_one_range_under_two_names(
    rig: WorkerRig, point: DiskPoint
) -> None:
    await rig.configure()
    await rig.append([1, 2, 3])
    zombie = await rig.process(disk=DiskFate(point, "stop"))
    await zombie.ask("start")
    await zombie.stops()
    await rig.started()
    await rig.drain()
    before = await rig.audit()
    (published,) = before.files
    content = (rig.root / published).read_bytes()
    zombie.resume()
    await zombie.until_ended(RangeEnd.LEASE_LOST)

    after = await rig.audit()
    assert after.files == before.files
    assert after.snapshots == before.snapshots
    (late,) = after.orphans
    assert late != published
    assert (rig.root / late).read_bytes() == content  # the same rows: only the name was its own
    assert (rig.root / published).read_bytes() == content


# --- M15: the store fails -----------------------------------------------------------------------

#: The puts of one range, until one goes well, and how many objects nobody names afterwards.
PUTS: dict[str, tuple[tuple[StoreFault | None, ...], int]] = {
    "500 twice": ((StoreFault.ERROR, StoreFault.ERROR, None), 0),
    "throttled": ((StoreFault.THROTTLED, None), 0),
    "full, then slow": ((StoreFault.FULL, StoreFault.SLOW), 0),
    "answer lost": ((StoreFault.LOST_ANSWER, None), 1),
    "answer lost, then 500": ((StoreFault.LOST_ANSWER, StoreFault.ERROR, None), 1),
    "late twice": ((StoreFault.LATE_EFFECT, StoreFault.LATE_EFFECT, None), 2),
}


async def test_M15_a_store_that_fails_and_recovers_loses_nothing_and_counts_nothing(
    rig: WorkerRig,
) -> None:
    await rig.configure()
    orphans = 0
    for number, (case, (faults, left)) in enumerate(PUTS.items(), start=1):
        with named(case):
            script = Script().on(Operation.PUT, *faults, prefix="tables/")
            store = FaultyStore(LocalObjectStore(rig.root), script)
            worker = await rig.worker(store=store)
            await rig.append([10 * number], [10 * number + 1, 10 * number + 2])
            await worker.start()
            await rig.drain()
            await store.settle()
            await worker.coordinator.stop()
            assert [call.fault for call in puts(store, "tables")] == list(faults)
            assert worker.ended(RangeEnd.RELEASED) == len(faults) - 1
            assert worker.metrics.value("lakebus_ranges_claimed_total", attempt="1") == 0
            found = await rig.audit()
            orphans += left
            assert (len(found.files), len(found.orphans)) == (number, orphans)


@pytest.mark.parametrize("seed", [1, 2])
async def test_M15_a_store_that_fails_at_random_loses_nothing_and_counts_nothing(
    rig: WorkerRig, seed: int
) -> None:
    await rig.configure(claim_entries_max=2)
    shares = {
        StoreFault.ERROR: 0.15,
        StoreFault.THROTTLED: 0.1,
        StoreFault.LOST_ANSWER: 0.15,
        StoreFault.LATE_EFFECT: 0.1,
        StoreFault.SLOW: 0.1,
    }
    plan = Within(Seeded(seed, shares), ("tables/",))
    store = FaultyStore(LocalObjectStore(rig.root), plan, slow_s=0.02)
    await rig.append(*([n] for n in range(24)))
    worker = await rig.started(store=store)
    await rig.drain()
    await store.settle()
    found = await rig.audit()
    assert worker.ended(RangeEnd.RELEASED) > 0
    assert len(found.orphans) == sum(
        call.fault in (StoreFault.LOST_ANSWER, StoreFault.LATE_EFFECT) for call in store.calls
    )
    assert worker.metrics.value("lakebus_ranges_claimed_total", attempt="1") == 0
    assert found.quarantined == {}


async def test_M15_one_of_two_files_of_a_range_fails(rig: WorkerRig) -> None:
    await rig.configure()
    other = (await rig.lake.catalog.create_table(name="u", columns=COLUMNS)).schema
    await rig.append_entry(entry_of([rig.table, other], [1, 2]), [1, 2, 1, 2])
    script = Script().on(Operation.PUT, StoreFault.ERROR, prefix=f"tables/{other.table_id}/")
    worker = await rig.started(store=FaultyStore(LocalObjectStore(rig.root), script))
    await rig.drain()
    found = await rig.audit()
    assert worker.ended(RangeEnd.RELEASED) == 1
    assert (len(found.files), len(found.orphans), found.snapshots) == (2, 1, 4)


@pytest.mark.parametrize("unnamed_files", [True, False])
async def test_M15_a_full_disk_keeps_the_range_and_leaves_nothing_behind(
    rig: WorkerRig, unnamed_files: bool
) -> None:
    await rig.configure()
    for number, point in enumerate((DiskPoint.HALF_WRITTEN, DiskPoint.FILE_SYNCED), start=1):
        await rig.append([10 * number], [10 * number + 1])
        with watched_disk(no_space(point, part="tables"), unnamed_files=unnamed_files):
            worker = await rig.started(store=LocalObjectStore(rig.root))
            await worker.until_ended(RangeEnd.RELEASED, times=3)
            assert len((await rig.audit(drained=False)).files) == number - 1
        await rig.drain()  # there is space again
        await worker.coordinator.stop()
        found = await rig.audit()
        assert (len(found.files), found.orphans, found.torn) == (number, frozenset(), frozenset())
        assert found.quarantined == {}


async def test_M15_a_folder_that_cannot_be_synced_leaves_an_orphan_and_no_reference(
    rig: WorkerRig,
) -> None:
    await rig.configure()
    await rig.append([1], [2])
    with watched_disk(no_space(DiskPoint.FOLDER_SYNCED, part="tables")):
        worker = await rig.started()
        await worker.until_ended(RangeEnd.RELEASED)
        assert (await rig.audit(drained=False)).files == ()
    await rig.drain()
    found = await rig.audit()
    assert len(found.files) == 1
    assert len(found.orphans) == worker.ended(RangeEnd.RELEASED)
