"""Large entries: their bytes lie in the object store, and the bus carries the name.

An object may outlive its use, never the other way round. Nothing that goes wrong with one is held
against the entry, and nothing about it is decided by what lies in the store.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.coordinator import RangeEnd
from lakebus.errors import OutcomeUnknown, Unavailable
from storage.bus.interface import Accepted, KeyTaken, NewEntry
from storage.files.objects import LocalObjectStore, ObjectStore
from storage.maintenance.checks.bus import check_payloads
from storage.maintenance.checks.strays import check_strays
from storage.maintenance.findings import Findings
from tests.conformance.harness import entry_of
from tests.failpoints.actions import Raise
from tests.failpoints.points import Failpoints
from tests.faults.store import StoreFault
from tests.matrix.test_worker_files import (
    large_entry,
    payload_store,
    puts,
    refused_after_put,
)
from tests.matrix.worker_rig import WorkerRig, rig
from tests.matrix.worker_roles import FailpointFate

__all__ = ["rig"]

#: A group takes so much, so `large_entry` (6,000 bytes) goes alone and is put.
SETTINGS: Mapping[str, Any] = {"group_bytes_max": 12_000, "claim_check_bytes": 1_000}


def small_entry(rig: WorkerRig, ids: Sequence[int]) -> NewEntry:
    return entry_of(rig.table, ids, ordering_key="one")


async def intents(rig: WorkerRig) -> int:
    (row,) = await rig.look("SELECT count(*) AS n FROM write_intent WHERE kind = 'payload'")
    return int(row["n"])


def objects(rig: WorkerRig) -> list[Path]:
    return sorted(rig.root.glob("bus/*.segment"))


async def faults(rig: WorkerRig) -> list[str]:
    """What the validator says of the bus and of the store."""
    findings, store = Findings(), LocalObjectStore(rig.root)
    await check_payloads(rig.lake.inspection, store, findings, contents=True)
    await check_strays(rig.lake.inspection, store, findings)
    return [f"{one.code}: {one.detail}" for one in findings.kept]


async def finished(rig: WorkerRig) -> None:
    """Everything is published and nothing is left over."""
    await rig.started()
    await rig.drain()
    found = await rig.audit()
    assert (found.orphans, found.quarantined) == (frozenset(), {})
    assert await intents(rig) == 0


# --- appending ----------------------------------------------------------------------------------


async def test_A9_a_large_entry_does_not_hold_up_its_shard(rig: WorkerRig) -> None:
    """Small entries of the same shard are acknowledged while its bytes are being put."""
    store = payload_store(rig, StoreFault.HELD_BEFORE)
    await rig.configure(store=store, **SETTINGS)
    large = asyncio.create_task(rig.append_entry(large_entry(rig, [1], key="k"), [1]))
    await store.reached()
    await rig.append([2], [3])
    assert not large.done()
    store.let_go()
    accepted = await large
    assert accepted.position == 2  # acceptance, not arrival, gives the place (A7)
    await finished(rig)


async def test_A3_a_replay_of_a_large_entry_puts_nothing(rig: WorkerRig) -> None:
    store = payload_store(rig, StoreFault.SLOW)
    await rig.configure(store=store, **SETTINGS)
    entry = large_entry(rig, [1], key="k")
    first = await rig.append_entry(entry, [1])
    again = await rig.lake.bus.append(entry)
    assert isinstance(again, KeyTaken)
    assert again.record.receipt == first.receipt
    assert len(puts(store, "bus")) == 1
    await finished(rig)


async def test_A5_two_large_entries_with_one_key_leave_one_object(rig: WorkerRig) -> None:
    store = payload_store(rig, StoreFault.HELD_AFTER)
    await rig.configure(store=store, **SETTINGS)
    entry = large_entry(rig, [1], key="k")
    late = asyncio.create_task(rig.lake.bus.append(entry))
    await store.reached()
    first = await rig.append_entry(entry, [1])
    store.let_go()
    outcome = await late
    assert isinstance(outcome, KeyTaken)
    assert outcome.record.receipt == first.receipt
    assert len(puts(store, "bus")) == 2
    assert len(objects(rig)) == 1
    await finished(rig)


async def test_M07_a_large_entry_that_is_refused_leaves_nothing_behind(rig: WorkerRig) -> None:
    store = payload_store(rig, StoreFault.HELD_AFTER)
    await rig.configure(store=store, **SETTINGS)
    again = await refused_after_put(rig, store)
    assert (objects(rig), await intents(rig)) == ([], 0)
    await rig.append_entry(again, [1])
    await finished(rig)


async def test_M07_what_cannot_be_removed_at_once_is_told_by_its_intent(
    rig: WorkerRig, failpoints: Failpoints
) -> None:
    """And goes with a collection after the intent has expired, not before."""
    store = payload_store(rig, StoreFault.HELD_AFTER)
    await rig.configure(store=store, **SETTINGS, intent_ttl_s=2.0)
    failpoints.arm("claim_check.before_discard", Raise(Unavailable("the store is away")))
    again = await refused_after_put(rig, store)
    (left,) = objects(rig)
    assert await intents(rig) == 1
    await rig.append_entry(again, [1])
    assert await rig.lake.upkeep.condemn_orphans(older_than_s=0, limit=10) == []
    await rig.started()
    await rig.drain()
    assert await rig.collect() == {left.relative_to(rig.root).as_posix()}
    await finished(rig)


async def test_M07_killed_with_a_large_entry_put_and_not_appended(rig: WorkerRig) -> None:
    await rig.configure(**SETTINGS)
    entry = large_entry(rig, [1], key="k")
    dying = await rig.process(failpoint=FailpointFate("group_commit.after_carry", "kill"))
    dying.tell("append", entry)
    await dying.dies()
    assert (len(objects(rig)), await intents(rig)) == (1, 1)
    await rig.append_entry(entry, [1])
    await rig.started()
    await rig.drain()
    assert len((await rig.audit()).orphans) == 1


async def test_M04_the_object_of_an_append_that_was_not_heard_of_stays(
    rig: WorkerRig, failpoints: Failpoints
) -> None:
    await rig.configure(**SETTINGS)
    entry = large_entry(rig, [1], key="k")
    failpoints.arm("group_commit.after_append", Raise(OutcomeUnknown("the reply was lost")))
    with pytest.raises(OutcomeUnknown):
        await rig.lake.bus.append(entry)
    assert (len(objects(rig)), await intents(rig)) == (1, 0)
    outcome = await rig.lake.bus.append(entry)
    assert isinstance(outcome, KeyTaken)
    rig.accepted[0, 0] = [1]
    await finished(rig)


async def test_A1_a_large_entry_whose_put_fails_is_not_on_the_bus(rig: WorkerRig) -> None:
    store = payload_store(rig, StoreFault.ERROR)
    await rig.configure(store=store, **SETTINGS)
    entry = large_entry(rig, [1], key="k")
    with pytest.raises(Unavailable):
        await rig.lake.bus.append(entry)
    assert await rig.lake.bus.find_key(1, "t", "k") is None
    await rig.append_entry(entry, [1])
    await rig.started()
    await rig.drain()
    assert (await rig.audit()).orphans == frozenset()


async def test_C6_with_the_claim_check_off_large_entries_stay_in_the_database(
    rig: WorkerRig,
) -> None:
    await rig.configure(group_bytes_max=12_000, claim_check_bytes=0)
    await rig.append_entry(large_entry(rig, [1], key="k"), [1])
    assert objects(rig) == []
    await finished(rig)


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["missing", "damaged"])
async def test_B8_an_object_that_cannot_be_read_condemns_nobody(
    rig: WorkerRig, fault: str, tmp_path: Path
) -> None:
    """Its neighbours are published meanwhile; it waits, and goes on when the object is back,
    however often it has failed alone by then."""
    await rig.configure(**SETTINGS, quarantine_attempts=1)
    await rig.append([1], [2])
    await rig.append_entry(large_entry(rig, [3], key="k"), [3])
    await rig.append([4])
    (stored,) = objects(rig)
    saved = shutil.copy(stored, tmp_path / "saved")
    data = stored.read_bytes()
    stored.unlink()
    if fault == "damaged":
        stored.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    worker = await rig.started()
    await worker.until_ended(RangeEnd.PUBLISHED, times=2)
    await worker.until_ended(RangeEnd.FAILED, times=8)
    (lease,) = await rig.leases()
    assert (lease["lo"], lease["hi"], lease["lone_failures"]) == (2, 3, 0)
    assert "the bus lacks the bytes" in lease["last_error"]
    assert len((await rig.audit(drained=False)).files) >= 2
    (found,) = await faults(rig)
    assert found.startswith("payload_missing: ")
    stored.unlink(missing_ok=True)
    shutil.copy(saved, stored)
    await rig.drain()
    await worker.coordinator.stop()
    await finished(rig)


class OnceDamaged(LocalObjectStore):
    """Gives a payload with one wrong byte the first time, as a broken transfer may."""

    damaged = 0

    async def get(self, key: str) -> bytes:
        data = await super().get(key)
        if key.startswith("bus/") and not self.damaged:
            self.damaged += 1
            return data[:-1] + bytes([data[-1] ^ 1])
        return data


async def test_B7_bytes_damaged_on_their_way_are_asked_for_again(rig: WorkerRig) -> None:
    await rig.configure(**SETTINGS)
    await rig.append_entry(large_entry(rig, [1], key="k"), [1])
    store = OnceDamaged(rig.root)
    worker = await rig.started(store=store)
    await rig.drain()
    assert store.damaged == 1
    assert worker.ended(RangeEnd.FAILED) == 0
    assert (await rig.audit()).quarantined == {}


async def test_B10_a_range_that_was_read_and_not_published_keeps_its_object(
    rig: WorkerRig,
) -> None:
    """Nothing but terminal entries lets go of an object: the successor finds it."""
    await rig.configure(**SETTINGS)
    await rig.append_entry(large_entry(rig, [1], key="k"), [1])
    silent = await rig.worker()
    claim, _ = await rig.claim_within(silent, 5.0)
    await rig.stage(silent, claim)
    await rig.lake.bus.purge()
    assert len(objects(rig)) == 1
    assert await rig.lake.upkeep.condemned() == []
    await rig.started()
    await rig.drain()
    assert (await rig.audit()).quarantined == {}


# --- the end of an object -----------------------------------------------------------------------


async def _published(rig: WorkerRig, store: ObjectStore | None = None) -> NewEntry:
    """One large entry that is terminal, and its purge."""
    await rig.configure(store=store, **SETTINGS)
    entry = large_entry(rig, [1], key="k")
    await rig.append_entry(entry, [1])
    worker = await rig.started()
    await rig.drain()
    await worker.coordinator.stop()
    await rig.lake.bus.purge()
    return entry


async def test_E3_an_object_is_condemned_when_its_entry_is_terminal(rig: WorkerRig) -> None:
    """It stays for the safety window; the key still answers with the receipt."""
    entry = await _published(rig)
    (condemned,) = await rig.lake.upkeep.condemned()
    assert (condemned.state, condemned.reason) == ("condemned", "payload")
    (kept,) = objects(rig)
    assert await faults(rig) == []
    assert condemned.object_key == kept.relative_to(rig.root).as_posix()
    assert await rig.lake.upkeep.begin_deletes(window_s=3_600, limit=10) == []
    await rig.append_entry(large_entry(rig, [2]), [2])  # one that waits
    await rig.lake.bus.purge()
    assert condemned.object_key in await rig.collect()
    assert len(objects(rig)) == 1
    assert await faults(rig) == []
    outcome = await rig.lake.bus.append(entry)
    assert isinstance(outcome, KeyTaken)
    await finished(rig)


async def test_E7_emptying_the_bus_waits_for_no_window(rig: WorkerRig) -> None:
    """What a purge has condemned goes at once when the rows in it must be forgotten."""
    await _published(rig)
    await rig.append_entry(large_entry(rig, [2]), [2])  # not terminal: it stays
    emptied = await rig.lake.bus.empty({0: 1})
    assert (emptied.objects_deleted, len(objects(rig))) == (1, 1)
    assert [one.state for one in await rig.lake.upkeep.condemned()] == ["deleted"]
    await finished(rig)


async def test_E3_a_purge_looks_at_each_group_once(rig: WorkerRig, failpoints: Failpoints) -> None:
    """And at what it has not finished again: a pass that died lost nothing."""
    await rig.configure(**SETTINGS)
    failpoints.arm("payload_release.after_shard", Raise(Unavailable("the catalog went away")))
    accepted: list[Accepted] = []
    worker = await rig.started()
    for number in range(3):
        accepted.append(await rig.append_entry(large_entry(rig, [number]), [number]))
    await rig.drain()
    with pytest.raises(Unavailable):
        await rig.lake.bus.purge()
    failpoints.disarm("payload_release.after_shard")
    await rig.lake.bus.purge()
    assert len(await rig.lake.upkeep.condemned()) == len(accepted)
    await rig.append_entry(large_entry(rig, [9]), [9])
    await rig.drain()
    await worker.coordinator.stop()
    await rig.lake.bus.purge()
    assert len(await rig.lake.upkeep.condemned()) == len(accepted) + 1
    (row,) = await rig.look("SELECT count(payload_key) AS named FROM bus_log")
    assert row["named"] == 0
