"""E3, E4, E5: pins, and how a file's life ends: unreferenced, condemned, deleting, deleted."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import Sequence

import pytest

from lakebus.clock import new_uuid
from lakebus.errors import SnapshotExpired, SnapshotNotFound
from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile
from storage.catalog.interface import CommitOutcome
from storage.maintenance.interface import SwapOutcome
from tests.conformance.harness import LakeHarness, entry_of
from tests.conformance.upkeep import (
    A_MOMENT_S,
    expire_all_but_the_head,
    files_of,
    swap_of,
    swapped,
)


async def condemned_ids(lake: LakeHarness, *, limit: int = 100) -> set[uuid.UUID]:
    """What a condemnation finds now."""

    return {one.file_id for one in await lake.upkeep.condemn(limit=limit)}


async def deleting_ids(lake: LakeHarness, *, limit: int = 100) -> set[uuid.UUID]:
    """What may be deleted once a moment has passed."""

    await lake.advance_s(A_MOMENT_S)
    return {one.file_id for one in await lake.upkeep.begin_deletes(window_s=0, limit=limit)}


async def catalogued_ids(lake: LakeHarness) -> set[uuid.UUID]:
    head = await lake.catalog.head()
    delta = await lake.catalog.manifest_delta(after=0, until=head.snapshot_id)
    return {file.file_id for file in delta.files}


def ids_of(files: Sequence[DataFile]) -> set[uuid.UUID]:
    return {file.file_id for file in files}


async def unreferenced(lake: LakeHarness, table: TableSchema, count: int = 2) -> set[uuid.UUID]:
    """Files that only expired snapshots needed."""

    files = await files_of(lake, table, count)
    await swapped(lake, table, files)
    await expire_all_but_the_head(lake)
    return ids_of(files)


# --- the life of a file's end ---------------------------------------------------------------------


async def test_E3_a_file_is_condemned_then_deleting_then_deleted(
    lake: LakeHarness, table: TableSchema
) -> None:
    gone = await unreferenced(lake, table)
    rows, head = await lake.rows_by_entry(), await lake.catalog.head()
    found = await lake.upkeep.condemn(limit=100)
    assert {one.file_id for one in found} == gone
    assert all(one.condemned_at > head.published_at for one in found)  # not when its life ended
    for one in found:
        assert (one.state, one.reason, one.table_id) == (
            "condemned",
            "unreferenced",
            table.table_id,
        )
        assert one.object_key == f"data/{one.file_id}.parquet"
        assert one.size_bytes == 100
    assert await condemned_ids(lake) == set()  # they are known to be
    assert not await lake.upkeep.begin_deletes(window_s=3_600, limit=100)  # the safety window
    await lake.advance_s(A_MOMENT_S)
    deleting = await lake.upkeep.begin_deletes(window_s=0, limit=100)
    assert {(one.file_id, one.state) for one in deleting} == {(one, "deleting") for one in gone}
    # A run that died here is answered the same again, in another process too.
    await lake.restart()
    assert list(await lake.upkeep.begin_deletes(window_s=3_600, limit=100)) == list(deleting)
    await lake.upkeep.note_deleted([one.file_id for one in deleting])
    assert not await lake.upkeep.begin_deletes(window_s=0, limit=100)
    deleted = await lake.upkeep.condemned(state="deleted")
    assert {one.file_id for one in deleted} == gone
    assert all(one.deleted_at is not None for one in deleted)
    assert await lake.rows_by_entry() == rows
    assert await lake.upkeep.forget_deleted(older_than_s=3_600, limit=100) == 0
    await lake.advance_s(A_MOMENT_S)
    assert await lake.upkeep.forget_deleted(older_than_s=0, limit=1) == 1
    assert await lake.upkeep.forget_deleted(older_than_s=0, limit=100) == 1
    assert not await lake.upkeep.condemned()


async def test_E3_files_of_retained_snapshots_are_never_condemned(
    lake: LakeHarness, table: TableSchema
) -> None:
    files = await files_of(lake, table, 3)
    await swapped(lake, table, files[:2])
    assert await condemned_ids(lake) == set()  # the snapshots before the swap can be read
    head = await lake.catalog.head()
    await lake.expire_snapshots(before=head.snapshot_id - 1)
    assert await condemned_ids(lake) == set()  # the last of them still can
    await lake.expire_snapshots(before=head.snapshot_id)
    assert await condemned_ids(lake) == ids_of(files[:2])


async def test_E3_files_of_a_dropped_table_go_when_its_snapshots_have_expired(
    lake: LakeHarness, table: TableSchema
) -> None:
    files = await files_of(lake, table, 2)
    await lake.catalog.finish_drop(await lake.catalog.begin_drop(name=table.name))
    assert await condemned_ids(lake) == set()
    await expire_all_but_the_head(lake)
    assert await condemned_ids(lake) == ids_of(files)


async def test_E3_a_tag_keeps_the_files_of_its_snapshot_until_it_is_dropped(
    lake: LakeHarness, table: TableSchema
) -> None:
    files = await files_of(lake, table, 2)
    await lake.upkeep.create_tag("a", files[0].first_snapshot, created_by="me")
    await swapped(lake, table, files)
    await expire_all_but_the_head(lake)
    # The second file is of a later snapshot than the tagged one.
    assert await condemned_ids(lake) == {files[1].file_id}
    assert await deleting_ids(lake) == {files[1].file_id}
    await lake.upkeep.drop_tag("a")
    assert await condemned_ids(lake) == {files[0].file_id}


async def test_E3_the_recheck_pardons_what_somebody_needs(
    lake: LakeHarness, table: TableSchema
) -> None:
    live, tagged, pinned = await files_of(lake, table, 3)
    await lake.upkeep.create_tag("a", tagged.first_snapshot, created_by="me")
    await lake.upkeep.pin(
        new_uuid(), kind="job", floor=None, snapshot_ids=[pinned.first_snapshot], ttl_s=60
    )
    await swapped(lake, table, [tagged, pinned])
    await expire_all_but_the_head(lake)
    claim_names = await lake.upkeep.register_intents(
        table.table_id, 1, owner=new_uuid(), ttl_s=3_600
    )
    needed = [live.file_id, tagged.file_id, pinned.file_id, *claim_names]
    before = await catalogued_ids(lake)
    for file_id in needed:
        await lake.condemn_regardless(file_id, f"data/{file_id}.parquet")
    assert await lake.upkeep.begin_deletes(window_s=60, limit=100, dry_run=True) == []
    assert len(await lake.upkeep.condemned(state="condemned")) == len(needed)
    assert await lake.upkeep.begin_deletes(window_s=60, limit=100) == []
    assert not await lake.upkeep.condemned()  # their records are gone
    assert await catalogued_ids(lake) == before  # the files are not
    assert live.file_id in ids_of(await lake.upkeep.live_files(table.table_id))


async def test_E3_a_file_unknown_to_the_catalog_may_be_deleted_once_condemned(
    lake: LakeHarness, table: TableSchema
) -> None:
    file_id = new_uuid()
    await lake.condemn_regardless(file_id, "bus/abandoned.segment")
    assert await deleting_ids(lake) == {file_id}


async def test_E5_every_step_of_collection_has_a_dry_run_and_a_limit(
    lake: LakeHarness, table: TableSchema
) -> None:
    gone = await unreferenced(lake, table, 3)
    would = await lake.upkeep.condemn(limit=2, dry_run=True)
    assert len(would) == 2
    assert not await lake.upkeep.condemned()
    first = await condemned_ids(lake, limit=2)
    assert first == {one.file_id for one in would}
    assert first | await condemned_ids(lake, limit=2) == gone
    await lake.advance_s(A_MOMENT_S)
    would = await lake.upkeep.begin_deletes(window_s=0, limit=2, dry_run=True)
    assert {one.state for one in await lake.upkeep.condemned()} == {"condemned"}
    assert {one.file_id for one in would} == await deleting_ids(lake, limit=2)
    assert len(would) == 2
    # What an earlier run left counts towards the limit.
    assert len(await lake.upkeep.begin_deletes(window_s=0, limit=2)) == 2
    await lake.upkeep.note_deleted([would[0].file_id])
    assert len(await lake.upkeep.begin_deletes(window_s=0, limit=2)) == 2
    assert {one.state for one in await lake.upkeep.condemned()} == {"deleting", "deleted"}


async def test_E5_records_are_listed_newest_first_in_pages(
    lake: LakeHarness, table: TableSchema
) -> None:
    made = []
    for _ in range(3):
        await lake.advance_s(A_MOMENT_S)
        made += await condemned_ids_of_an_orphan(lake, table)
    listed = await lake.upkeep.condemned()
    assert [one.file_id for one in listed] == made[::-1]
    (newest,) = await lake.upkeep.condemned(limit=1)
    rest = await lake.upkeep.condemned(before=newest.condemned_at)
    assert [newest, *rest] == list(listed)
    assert not await lake.upkeep.condemned(state="deleted")


async def condemned_ids_of_an_orphan(lake: LakeHarness, table: TableSchema) -> list[uuid.UUID]:
    await lake.upkeep.register_intents(table.table_id, 1, owner=new_uuid(), ttl_s=0)
    await lake.advance_s(A_MOMENT_S)
    found = await lake.upkeep.condemn_orphans(older_than_s=0, limit=100)
    return [one.file_id for one in found]


async def test_E4_the_catalog_tells_what_it_knows_of_names_in_the_store(
    lake: LakeHarness, table: TableSchema
) -> None:
    gone = await unreferenced(lake, table)
    (live,) = await lake.upkeep.live_files(table.table_id)
    (intended,) = await lake.upkeep.register_intents(
        table.table_id, 1, owner=new_uuid(), ttl_s=3_600
    )
    stranger, names = new_uuid(), [*gone, live.file_id, intended]
    known = dict.fromkeys([*gone, live.file_id], "used") | {intended: "intended"}
    assert await lake.upkeep.known_names([*names, stranger]) == known
    await condemned_ids(lake)  # there is a row of theirs still
    assert await lake.upkeep.known_names(names) == known
    await deleting_ids(lake)
    assert await lake.upkeep.known_names(names) == known | dict.fromkeys(gone, "deleting")
    await lake.upkeep.note_deleted(list(gone))
    assert await lake.upkeep.known_names(names) == known | dict.fromkeys(gone, "deleted")


async def test_E3_only_what_is_deleting_can_be_noted_as_deleted(
    lake: LakeHarness, table: TableSchema
) -> None:
    gone = await unreferenced(lake, table)
    await condemned_ids(lake)
    await lake.upkeep.note_deleted(list(gone))
    assert {one.state for one in await lake.upkeep.condemned()} == {"condemned"}


# --- orphans --------------------------------------------------------------------------------------


async def test_E4_an_intent_is_an_orphan_only_after_its_expiry_and_the_window(
    lake: LakeHarness, table: TableSchema
) -> None:
    live = await lake.upkeep.register_intents(table.table_id, 2, owner=new_uuid(), ttl_s=3_600)
    dead = await lake.upkeep.register_intents(table.table_id, 2, owner=new_uuid(), ttl_s=0)
    await lake.advance_s(A_MOMENT_S)
    assert not await lake.upkeep.condemn_orphans(older_than_s=60, limit=100)
    would = await lake.upkeep.condemn_orphans(older_than_s=0, limit=1, dry_run=True)
    assert len(would) == 1
    assert len(await lake.upkeep.intents()) == 4
    first = await lake.upkeep.condemn_orphans(older_than_s=0, limit=1)
    assert [one.file_id for one in first] == [one.file_id for one in would]
    rest = await lake.upkeep.condemn_orphans(older_than_s=0, limit=100)
    assert {one.file_id for one in (*first, *rest)} == set(dead)
    assert {one.file_id for one in await lake.upkeep.intents()} == set(live)
    for one in (*first, *rest):
        assert one.object_key == f"tables/{table.table_id}/{one.file_id}.parquet"
        assert (one.reason, one.state, one.table_id) == ("orphan", "condemned", table.table_id)
    assert await deleting_ids(lake) == set(dead)


async def test_C6_no_publish_can_name_a_file_whose_intent_was_collected(
    lake: LakeHarness, table: TableSchema
) -> None:
    files = await files_of(lake, table, 2)
    swap = await swap_of(lake, table, files, ttl_s=0)
    await lake.advance_s(A_MOMENT_S)
    await lake.upkeep.condemn_orphans(older_than_s=0, limit=100)
    assert (await lake.upkeep.publish_swap(swap)).outcome is SwapOutcome.INTENT_LOST
    assert swap.files[0].file_id in await deleting_ids(lake)


async def test_C6_a_file_whose_intent_was_consumed_is_no_orphan(
    lake: LakeHarness, table: TableSchema
) -> None:
    files = await files_of(lake, table, 2)
    swap = await swap_of(lake, table, files, ttl_s=0)
    await lake.advance_s(A_MOMENT_S)
    # Expired, and nobody has collected it yet: the writer was late and not too late.
    assert (await lake.upkeep.publish_swap(swap)).outcome is SwapOutcome.PUBLISHED
    assert not await lake.upkeep.condemn_orphans(older_than_s=0, limit=100)


async def test_C6_a_publish_and_a_collection_of_its_intents_never_both_win(
    lake: LakeHarness, table: TableSchema
) -> None:
    view = await lake.second()
    for n in range(6):
        await lake.accept(entry_of(table, [n], ordering_key=str(n)))
        worker = lake.worker()
        claim = await lake.claim_within(2.0, worker)
        commit = await worker.stage(claim)
        # As if it had been claimed long ago.
        published, orphans = await asyncio.gather(
            worker.publish(commit), view.upkeep.condemn_orphans(older_than_s=-7_200, limit=100)
        )
        condemned = commit.files[0].file_id in {one.file_id for one in orphans}
        lost = published.outcomes[commit.commit_id] is CommitOutcome.INTENT_LOST
        assert lost == condemned
        if lost:
            await lake.bus.release(claim.lease)
    assert not ids_of(await lake.upkeep.live_files(table.table_id)) & await deleting_ids(lake)


# --- pins -----------------------------------------------------------------------------------------


async def test_E3_a_pin_keeps_what_every_snapshot_from_its_floor_on_needs(
    lake: LakeHarness, table: TableSchema
) -> None:
    first, second, third = await files_of(lake, table, 3)
    await swapped(lake, table, [first])
    floor = await swapped(lake, table, [second])
    pin_id = new_uuid()
    pin = await lake.upkeep.pin(pin_id, kind="reader", floor=floor, ttl_s=60, note="me")
    await swapped(lake, table, [third])
    assert list(await lake.upkeep.pins()) == [pin]
    await expire_all_but_the_head(lake)
    # Those that ended with the floor or before are of no snapshot that it protects.
    assert await condemned_ids(lake) == {first.file_id, second.file_id}
    await lake.upkeep.release_pin(pin_id)
    assert await condemned_ids(lake) == {third.file_id}
    assert not await lake.upkeep.pins()


async def test_E3_a_pin_of_snapshots_keeps_their_files_and_no_others(
    lake: LakeHarness, table: TableSchema
) -> None:
    first, second, third = await files_of(lake, table, 3)
    await lake.upkeep.pin(
        new_uuid(), kind="job", floor=None, snapshot_ids=[second.first_snapshot], ttl_s=None
    )
    await swapped(lake, table, [first, second, third])
    await expire_all_but_the_head(lake)
    assert await condemned_ids(lake) == {third.file_id}


async def test_E3_an_expired_pin_keeps_nothing(lake: LakeHarness, table: TableSchema) -> None:
    pin_id = new_uuid()
    floor = (await lake.catalog.head()).snapshot_id
    await lake.upkeep.pin(pin_id, kind="reader", floor=floor, ttl_s=60)
    gone = await unreferenced(lake, table)
    await lake.upkeep.pin(pin_id, kind="reader", floor=floor, ttl_s=1)  # renewed in time
    assert await condemned_ids(lake) == set()
    await lake.advance_s(1.01)
    assert not await lake.upkeep.pins()
    with pytest.raises(SnapshotExpired) as caught:
        await lake.upkeep.pin(pin_id, kind="reader", floor=floor, ttl_s=60)  # too late
    head = await lake.catalog.head()
    assert caught.value.members == {"oldest_snapshot_id": head.oldest_snapshot_id}
    assert await condemned_ids(lake) == gone
    assert (await lake.upkeep.pin(pin_id, kind="reader", floor=head.snapshot_id, ttl_s=60)).floor


async def test_E3_a_pin_is_granted_only_for_what_is_retained(
    lake: LakeHarness, table: TableSchema
) -> None:
    files = await files_of(lake, table, 3)
    tagged_id = files[0].first_snapshot
    await lake.upkeep.create_tag("a", tagged_id, created_by="me")
    head_id = await expire_all_but_the_head(lake)
    pin_id = new_uuid()
    for floor, ids in (
        (head_id - 1, []),
        (None, [head_id - 1]),
        (head_id, [head_id, tagged_id + 1]),
    ):
        with pytest.raises(SnapshotExpired):
            await lake.upkeep.pin(pin_id, kind="job", floor=floor, snapshot_ids=ids, ttl_s=60)
    with pytest.raises(SnapshotNotFound):
        await lake.upkeep.pin(pin_id, kind="job", floor=None, snapshot_ids=[10**6], ttl_s=60)
    assert not await lake.upkeep.pins()
    ids = [tagged_id, head_id]
    pin = await lake.upkeep.pin(pin_id, kind="job", floor=head_id, snapshot_ids=ids, ttl_s=60)
    assert (pin.floor, pin.snapshot_ids, pin.kind) == (head_id, (tagged_id, head_id), "job")
    # A refused change leaves the pin as it was.
    with pytest.raises(SnapshotExpired):
        await lake.upkeep.pin(pin_id, kind="job", floor=head_id - 1, ttl_s=60)
    assert list(await lake.upkeep.pins()) == [pin]


async def test_E3_a_pin_may_be_renewed_below_the_oldest_snapshot_and_never_widened(
    lake: LakeHarness, table: TableSchema
) -> None:
    files = await files_of(lake, table, 3)
    pin_id, floor = new_uuid(), files[1].first_snapshot
    await lake.upkeep.pin(pin_id, kind="reader", floor=floor, ttl_s=60)
    await lake.upkeep.pin(pin_id, kind="reader", floor=None, snapshot_ids=[floor], ttl_s=60)
    await lake.upkeep.pin(pin_id, kind="reader", floor=floor, ttl_s=60)
    await swapped(lake, table, files)
    await expire_all_but_the_head(lake)
    with pytest.raises(SnapshotExpired):
        await lake.upkeep.pin(pin_id, kind="reader", floor=floor - 1, ttl_s=60)
    for renewed in (floor, floor + 1):
        pin = await lake.upkeep.pin(pin_id, kind="reader", floor=renewed, ttl_s=60)
        assert pin.floor == renewed
    with pytest.raises(SnapshotExpired):
        await lake.upkeep.pin(pin_id, kind="reader", floor=floor, ttl_s=60)  # given up before
    # What it protects by its floor it may name one by one instead, without a gap.
    await lake.upkeep.pin(pin_id, kind="reader", floor=None, snapshot_ids=[floor + 1], ttl_s=60)
    await lake.upkeep.pin(pin_id, kind="reader", floor=None, snapshot_ids=[floor + 1], ttl_s=60)
    assert await condemned_ids(lake) == set()


async def test_E3_pins_survive_a_restart(lake: LakeHarness, table: TableSchema) -> None:
    pin = await lake.upkeep.pin(new_uuid(), kind="backup", floor=1, ttl_s=None, note="b")
    timed = await lake.upkeep.pin(new_uuid(), kind="reader", floor=1, ttl_s=60)
    await lake.restart()
    assert list(await lake.upkeep.pins()) == [timed, pin]
    assert timed.expires_at is not None
    assert timed.expires_at.tzinfo == dt.UTC
