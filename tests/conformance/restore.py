"""F3, and what D2, D5 and D6 say of lost lines: a lake that goes back to a backup.

Everything is done twice where it matters: a second restore of the same backup loses the line that
the first one began, and must not give anything that line gave.
"""

from __future__ import annotations

import datetime as dt

import pytest

from lakebus.errors import HistoryLost, TokenHistoryLost
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import Accepted, KeyTaken
from storage.catalog.interface import CommitOutcome
from storage.reading.barrier import AnyToken
from storage.reading.resolve import SnapshotChoice
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, LakeHarness, entry_of
from tests.conformance.reader import reading


async def test_F3_no_number_of_a_lost_line_is_given_again(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.RESTORE)
    await lake.accept_many(table, 1)
    await lake.drain()
    backup = await lake.take_backup()
    given: list[dict[str, set[object]]] = [await _give(lake)]
    for _ in range(2):
        await lake.restore(backup)
        given.append(await _give(lake))
    for kind in given[0]:
        numbers = [number for line in given for number in line[kind]]
        assert len(numbers) == len(set(numbers)), kind


async def _give(lake: LakeHarness) -> dict[str, set[object]]:
    """Makes the lake give numbers of every kind; `t` is as the backup has it."""

    current = await lake.catalog.table("t")
    assert current is not None
    lost = await lake.create("lost")
    altered = await lake.catalog.alter_table(
        schema=TableSchema(
            current.schema.table_id,
            "t",
            0,
            (*current.schema.columns, Column(0, "more", "bigint")),
        ),
        expected_version=current.schema.version,
    )
    accepted = await lake.accept_many(altered.schema, 2)
    worker = lake.worker()
    claim = await worker.claim()
    poison = [accepted[0].position]
    published = await worker.publish(await worker.stage(claim, quarantine=poison))
    (quarantined,) = await lake.bus.quarantine_items()
    return {
        "history": {(await lake.catalog.identity()).history},
        "table": {lost.table_id},
        "version": {altered.schema.version},
        "column": {altered.schema.columns[-1].column_id},
        "batch": {one.receipt.batch_id for one in accepted},
        "position": {(one.shard, one.position) for one in accepted},
        "lease": {claim.lease.lease_id},
        "epoch": {claim.lease.epoch},
        "snapshot": {published.snapshot_id, altered.snapshot_id},
        "time": {published.published_at},
        "quarantine": {quarantined.quarantine_id},
    }


async def test_F3_what_the_backup_holds_is_published_and_the_tail_beyond_it_is_gone(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=2)
    lake.needs(Capability.RESTORE)
    table = await lake.create()
    entries = [entry_of(table, [n], key=f"k{n}", ordering_key=str(n % 3)) for n in range(12)]
    kept = [await lake.accept(entry) for entry in entries]
    worker = lake.worker()
    await worker.publish_one()  # terminal at the backup
    held = await worker.claim()  # leased at the backup
    returned = await worker.claim()
    await lake.bus.release(returned.lease)
    backup = await lake.take_backup()
    tail = [entry_of(table, [n], key=f"k{n}", ordering_key=str(n % 3)) for n in range(12, 18)]
    lost = [await lake.accept(entry) for entry in tail]
    await lake.drain()
    await lake.restore(backup)

    published = await lake.drain()
    assert published, "what waited in the backup was never claimed"
    assert await lake.rows_by_entry() == {(one.shard, one.position): 1 for one in kept}
    head = await lake.catalog.head()
    assert head.watermark == dict(await lake.bus.ends())
    for status in await lake.bus.shard_status():
        assert status.backlog_bytes == 0
    for entry, one in zip(entries, kept, strict=True):
        again = await lake.bus.append(entry)
        assert isinstance(again, KeyTaken)
        assert again.record.receipt == one.receipt
    # Their receipts died with the line, and their keys with them: a retry is a new entry, once.
    for entry, one in zip(tail, lost, strict=True):
        anew = await lake.bus.append(entry)
        assert isinstance(anew, Accepted)
        assert anew.receipt.batch_id != one.receipt.batch_id
        assert isinstance(await lake.bus.append(entry), KeyTaken)
        assert await lake.bus.batch(one.receipt.batch_id) is None
    await lake.drain()
    assert len(await lake.rows_by_entry()) == len(entries) + len(tail)
    assert await lake.bus.renew([held.lease]) == []


async def test_B1_what_waits_through_a_restore_is_claimed_within_the_budgets(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=3)
    lake.needs(Capability.RESTORE)
    table = await lake.create()
    accepted = await lake.accept_many(table, 8)
    worker = lake.worker()
    await lake.bus.release((await worker.claim()).lease)
    await lake.restore(await lake.take_backup())
    worker = lake.worker()
    sizes, covered = [], set()
    for _ in range(3):
        lease = (await worker.claim()).lease
        sizes.append(lease.hi - lease.lo)
        covered |= set(range(lease.lo, lease.hi))
    assert max(sizes) <= 3
    assert covered == {one.position for one in accepted}
    assert await lake.bus.claim(worker.owner) is None


@pytest.mark.parametrize("claimed", ["before the backup", "on the lost line"])
async def test_F3_a_zombie_of_the_lost_line_changes_nothing(
    lake: LakeHarness, table: TableSchema, claimed: str
) -> None:
    """Also with a lease that the backup knows, number and epoch alike."""

    lake.needs(Capability.RESTORE)
    accepted = await lake.accept_many(table, 3)
    if claimed == "before the backup":
        zombie = await lake.worker().claim()
        backup = await lake.take_backup()
    else:
        backup = await lake.take_backup()
        zombie = await lake.worker().claim()
    staged = await lake.worker().stage(zombie)
    await lake.restore(backup)
    before = await lake.catalog.head()
    late = await lake.worker().publish(staged)
    assert late.outcomes == {staged.commit_id: CommitOutcome.LEASE_LOST}
    assert (await lake.catalog.head()).snapshot_id == before.snapshot_id
    assert await lake.bus.renew([zombie.lease]) == []
    heir = await lake.worker().claim()
    assert heir.lease.epoch > zombie.lease.epoch
    assert heir.lone_failures == heir.attempt == 0, "a restore is nobody's failure"
    await lake.worker().publish(await lake.worker().stage(heir))
    again = await lake.worker().publish(staged)
    assert again.outcomes == {staged.commit_id: CommitOutcome.LEASE_LOST}
    assert await lake.rows_by_entry() == {(one.shard, one.position): 1 for one in accepted}


async def test_D2_ids_and_times_of_every_lost_line_have_their_own_error(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.RESTORE)
    kept = await lake.catalog.head()
    await lake.advance_s(0.01)
    closed = (await lake.catalog.head()).now
    await lake.advance_s(0.001)
    # From here on this time means one snapshot for ever (C4), and the backup knows.
    assert (await lake.catalog.snapshot_at(closed)).snapshot_id == kept.snapshot_id
    backup = await lake.take_backup()
    lost_ids, lost_times = [], []
    for name in ("first", "second"):
        await lake.advance_s(0.01)
        await lake.create(name)
        head = await lake.catalog.head()
        lost_ids.append(head.snapshot_id)
        lost_times += [head.published_at, head.published_at + dt.timedelta(microseconds=1)]
        await lake.advance_s(0.01)
        await lake.restore(backup)
    for snapshot_id in lost_ids:
        with pytest.raises(HistoryLost, match=str(snapshot_id)):
            await lake.catalog.snapshot(snapshot_id)
    for time in lost_times:
        with pytest.raises(HistoryLost):
            await lake.catalog.snapshot_at(time)
    assert (await lake.catalog.snapshot_at(closed)).snapshot_id == kept.snapshot_id
    assert (await lake.catalog.snapshot(kept.snapshot_id)).published_at == kept.published_at
    head = await lake.catalog.head()
    assert head.published_at > max(lost_times)
    assert (await lake.catalog.snapshot_at(head.published_at)).snapshot_id == head.snapshot_id


async def test_D5_tokens_are_judged_by_every_fork_on_their_way(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.RESTORE)
    oldest = await lake.accept(entry_of(table, [1], ordering_key="one"))
    await lake.drain()
    await lake.restore(await lake.take_backup())
    middle = await lake.accept(entry_of(table, [2], ordering_key="one"))
    await lake.drain()
    async with reading(lake) as reader:
        floor = (await reader.read()).token
    backup = await lake.take_backup()
    lost = await lake.accept(entry_of(table, [3], ordering_key="one"))
    await lake.drain()
    async with reading(lake) as reader:
        lost_read = await reader.read()
    await lake.restore(backup)
    newest = await lake.accept(entry_of(table, [4], ordering_key="one"))
    await lake.drain()
    honoured: list[AnyToken] = [
        oldest.receipt.visibility_token,
        middle.receipt.visibility_token,
        newest.receipt.visibility_token,
        floor,
    ]
    async with reading(lake) as reader:
        read = await reader.read(tokens=honoured)  # merged in the words of the newest line (D6)
        places = {(one.shard, one.position) for one in (oldest, middle, newest)}
        assert set(read.rows) == {("t", place) for place in places}
        assert read.token.history == (await lake.catalog.identity()).history
        lost_tokens: list[AnyToken] = [lost.receipt.visibility_token, lost_read.token]
        for token in lost_tokens:
            with pytest.raises(TokenHistoryLost):
                await reader.read(tokens=[token])
            with pytest.raises(TokenHistoryLost):
                await reader.read(tokens=[*honoured, token])
        with pytest.raises(HistoryLost):
            await reader.read(SnapshotChoice(snapshot_id=lost_read.snapshot_id))


async def test_A12_a_drop_that_was_begun_before_the_backup_is_finished_after_it(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.RESTORE)
    await lake.accept_many(table, 2)
    ticket = await lake.catalog.begin_drop(name="t")
    backup = await lake.take_backup()
    await lake.drain()
    await lake.catalog.finish_drop(ticket)
    await lake.restore(backup)
    assert await lake.catalog.closing_tables() == [ticket]
    await lake.drain()
    snapshot_id = await lake.catalog.finish_drop(ticket)
    assert (await lake.catalog.head()).snapshot_id == snapshot_id
    assert await lake.catalog.tables() == []


async def test_B10_a_restored_bus_is_purged_as_any_other(open_lake: OpenLake) -> None:
    lake = await open_lake(segment_ring_rotate_bytes=1, segment_ring_rotate_age_s=0.001)
    lake.needs(Capability.RESTORE)
    table = await lake.create()
    for n in range(4):
        await lake.accept(entry_of(table, [n], note="x" * 60_000, ordering_key="one"))
    await lake.bus.purge()
    await lake.restore(await lake.take_backup())
    await lake.drain()
    rows = await lake.rows_by_entry()
    for n in range(4):
        await lake.accept(entry_of(table, [n], note="y" * 60_000, ordering_key="one"))
        await lake.advance_s(0.002)
        await lake.bus.purge()
    await lake.drain()
    await lake.bus.purge()
    assert len(await lake.rows_by_entry()) == len(rows) + 4 == 8
