"""E1, E2, E8: swaps, expiry and tags. What maintenance publishes is one more snapshot like any."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import pytest

from lakebus.clock import new_uuid
from lakebus.errors import OutcomeUnknown, SnapshotExpired, SnapshotNotFound, TagExists
from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile
from storage.catalog.interface import CommitOutcome
from storage.maintenance.interface import Swap, SwapOperation, SwapOutcome
from storage.reading.manifest import Manifest
from storage.reading.resolve import SnapshotChoice
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, LakeHarness, entry_of
from tests.conformance.reader import reading
from tests.conformance.worker import fake_file

#: Longer than publication times can run ahead of a clock that stands still.
A_MOMENT_S = 0.01


async def files_of(lake: LakeHarness, table: TableSchema, count: int) -> Sequence[DataFile]:
    """So many more files of one row each, every one in a snapshot of its own."""

    worker = lake.worker()
    for n in range(count):
        await lake.accept(entry_of(table, [n]))
        await worker.publish_one()
    return await lake.upkeep.live_files(table.table_id)


async def swap_of(
    lake: LakeHarness,
    table: TableSchema,
    inputs: Sequence[DataFile],
    *,
    ttl_s: float = 3_600.0,
    operation: SwapOperation = SwapOperation.COMPACT,
) -> Swap:
    """A compaction reduced to what the contract needs: one file with the rows of all inputs."""

    owner = lake.worker().owner
    (name,) = await lake.upkeep.register_intents(table.table_id, 1, owner=owner, ttl_s=ttl_s)
    rows = {
        place: count
        for file in inputs
        for place, count in lake.files.contents[file.file_id].items()
    }
    lake.files.write(name, rows)
    merged = fake_file(name, table.table_id, table.version, sum(rows.values()))
    inputs_named = tuple(file.file_id for file in inputs)
    return Swap(new_uuid(), table.table_id, operation, inputs_named, (merged,))


async def swapped(lake: LakeHarness, table: TableSchema, inputs: Sequence[DataFile]) -> int:
    """The snapshot of a swap of these inputs."""

    made = await lake.upkeep.publish_swap(await swap_of(lake, table, inputs))
    assert made.outcome is SwapOutcome.PUBLISHED
    assert made.snapshot_id is not None
    return made.snapshot_id


async def expire_all_but_the_head(lake: LakeHarness) -> int:
    """The head's id, which is the oldest snapshot now."""

    await lake.advance_s(A_MOMENT_S)
    expired = await lake.upkeep.expire_snapshots(keep_s=0, keep_count=1, limit=1_000)
    head = await lake.catalog.head()
    assert head.oldest_snapshot_id == head.snapshot_id == expired.oldest_snapshot_id
    return head.snapshot_id


# --- swaps ----------------------------------------------------------------------------------------


async def test_E1_a_swap_changes_files_and_no_row(lake: LakeHarness, table: TableSchema) -> None:
    files = await files_of(lake, table, 3)
    before, rows = await lake.catalog.head(), await lake.rows_by_entry()
    snapshot_id = await swapped(lake, table, files[:2])
    head = await lake.catalog.head()
    assert head.snapshot_id == snapshot_id == before.snapshot_id + 1
    assert head.watermark == before.watermark
    assert head.published_at > before.published_at
    assert await lake.rows_by_entry() == rows
    assert await lake.files.rows_at(lake.catalog, before.snapshot_id) == rows
    live = await lake.upkeep.live_files(table.table_id)
    assert [file.first_snapshot for file in live] == [files[2].first_snapshot, snapshot_id]
    snapshot = await lake.catalog.snapshot(snapshot_id)
    assert snapshot.operation == "compact"
    tables = snapshot.summary["tables"]
    assert isinstance(tables, dict)
    assert tables[str(table.table_id)] == {
        "files_added": 1,
        "rows_added": 2,
        "bytes_added": 200,
        "files_removed": 2,
        "rows_removed": 2,
        "bytes_removed": 200,
    }


async def test_E1_a_swap_that_changes_the_number_of_rows_is_refused(
    lake: LakeHarness, table: TableSchema
) -> None:
    files = await files_of(lake, table, 2)
    before = await lake.catalog.head()
    swap = await swap_of(lake, table, files)
    for wrong in (1, 3):
        bad = dataclasses.replace(swap, files=(dataclasses.replace(swap.files[0], rows=wrong),))
        assert (await lake.upkeep.publish_swap(bad)).outcome is SwapOutcome.ROWS_DIFFER
    told = dataclasses.replace(swap, rows_removed=1)
    assert (await lake.upkeep.publish_swap(told)).outcome is SwapOutcome.ROWS_DIFFER
    assert (await lake.catalog.head()).snapshot_id == before.snapshot_id
    # Nothing was consumed by that. What says how many rows it leaves out may leave them out.
    fewer = dataclasses.replace(
        swap,
        operation=SwapOperation.DELETE,
        files=(dataclasses.replace(swap.files[0], rows=1),),
        rows_removed=1,
        summary={"reason": "because"},
    )
    made = await lake.upkeep.publish_swap(fewer)
    assert made.outcome is SwapOutcome.PUBLISHED
    assert made.snapshot_id is not None
    snapshot = await lake.catalog.snapshot(made.snapshot_id)
    assert snapshot.operation == "delete"
    assert "because" in str(snapshot.summary)


async def test_E1_a_swap_may_leave_nothing(lake: LakeHarness, table: TableSchema) -> None:
    files = await files_of(lake, table, 2)
    names = tuple(file.file_id for file in files)
    swap = Swap(new_uuid(), table.table_id, SwapOperation.RETAIN, names, (), rows_removed=2)
    assert (await lake.upkeep.publish_swap(swap)).outcome is SwapOutcome.PUBLISHED
    assert not await lake.upkeep.live_files(table.table_id)
    assert await lake.rows_by_entry() == {}


async def test_E2_of_two_swaps_with_a_common_input_one_wins(
    lake: LakeHarness, table: TableSchema
) -> None:
    files = await files_of(lake, table, 3)
    rows = await lake.rows_by_entry()
    view = await lake.second()
    first, second = await swap_of(lake, table, files[:2]), await swap_of(lake, table, files[1:])
    made = await asyncio.gather(lake.upkeep.publish_swap(first), view.upkeep.publish_swap(second))
    assert sorted(one.outcome for one in made) == [SwapOutcome.INPUTS_LOST, SwapOutcome.PUBLISHED]
    assert len(await lake.upkeep.live_files(table.table_id)) == 2
    assert await lake.rows_by_entry() == rows


async def test_E2_inputs_must_be_live_files_of_the_table_each_named_once(
    lake: LakeHarness, table: TableSchema
) -> None:
    other = await lake.create("u")
    (stranger,) = await files_of(lake, other, 1)
    first, second = await files_of(lake, table, 2)
    before = await lake.catalog.head()
    for inputs in ((first.file_id, stranger.file_id), (first.file_id, first.file_id, new_uuid())):
        swap = dataclasses.replace(await swap_of(lake, table, [first, second]), inputs=inputs)
        assert (await lake.upkeep.publish_swap(swap)).outcome is SwapOutcome.INPUTS_LOST
    doubled = dataclasses.replace(
        await swap_of(lake, table, [first, second]), inputs=(first.file_id,) * 2
    )
    assert (await lake.upkeep.publish_swap(doubled)).outcome is SwapOutcome.INPUTS_LOST
    assert (await lake.catalog.head()).snapshot_id == before.snapshot_id
    assert len(await lake.upkeep.live_files(table.table_id)) == 2


async def test_E2_a_swap_in_a_dropped_table_is_lost_and_in_a_closing_one_is_not(
    lake: LakeHarness, table: TableSchema
) -> None:
    files = await files_of(lake, table, 2)
    ticket = await lake.catalog.begin_drop(name=table.name)
    await swapped(lake, table, files)
    late = await swap_of(lake, table, await lake.upkeep.live_files(table.table_id))
    dropped = await lake.catalog.finish_drop(ticket)
    assert (await lake.upkeep.publish_swap(late)).outcome is SwapOutcome.INPUTS_LOST
    assert (await lake.catalog.head()).snapshot_id == dropped
    assert await lake.rows_by_entry() == {}


async def test_C7_swaps_and_appends_never_make_each_other_lose(
    lake: LakeHarness, table: TableSchema
) -> None:
    files = await files_of(lake, table, 2)
    await lake.accept_many(table, 1)
    worker = lake.worker(await lake.second())
    commit, swap = await worker.stage(await worker.claim()), await swap_of(lake, table, files)
    published, made = await asyncio.gather(worker.publish(commit), lake.upkeep.publish_swap(swap))
    assert published.outcomes == {commit.commit_id: CommitOutcome.PUBLISHED}
    assert made.outcome is SwapOutcome.PUBLISHED
    assert sum((await lake.rows_by_entry()).values()) == 3
    assert len(await lake.upkeep.live_files(table.table_id)) == 2


async def test_C5_a_swap_whose_reply_was_lost_is_answered_from_its_record(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.LOST_REPLIES)
    files = await files_of(lake, table, 2)
    swap = await swap_of(lake, table, files)
    assert await lake.upkeep.swap_outcome(swap.publication_id) is None
    await lake.lose_next_reply("swap")
    with pytest.raises(OutcomeUnknown):
        await lake.upkeep.publish_swap(swap)
    view = await lake.second()
    outcome = await view.upkeep.swap_outcome(swap.publication_id)
    assert outcome is not None
    head = await view.catalog.head()
    assert (outcome.outcome, outcome.snapshot_id) == (SwapOutcome.PUBLISHED, head.snapshot_id)
    assert await view.upkeep.publish_swap(swap) == outcome
    assert (await view.catalog.head()).snapshot_id == head.snapshot_id


async def test_C6_a_swap_consumes_the_write_intents_of_its_files(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.REMOVE_INTENT)
    files = await files_of(lake, table, 2)
    before = await lake.catalog.head()
    lost = await swap_of(lake, table, files)
    await lake.remove_intent(lost.files[0].file_id)
    assert (await lake.upkeep.publish_swap(lost)).outcome is SwapOutcome.INTENT_LOST
    twice = await swap_of(lake, table, files)
    half = dataclasses.replace(twice.files[0], rows=1)
    bad = dataclasses.replace(twice, files=(half, half))
    assert (await lake.upkeep.publish_swap(bad)).outcome is SwapOutcome.INTENT_LOST
    assert (await lake.catalog.head()).snapshot_id == before.snapshot_id
    await lake.upkeep.publish_swap(twice)
    assert twice.files[0].file_id not in {one.file_id for one in await lake.upkeep.intents()}
    again = dataclasses.replace(twice, publication_id=new_uuid(), inputs=(twice.files[0].file_id,))
    assert (await lake.upkeep.publish_swap(again)).outcome is SwapOutcome.INTENT_LOST


async def test_C6_the_intents_of_a_claim_say_where_its_files_will_lie(
    lake: LakeHarness, table: TableSchema
) -> None:
    other = await lake.create("u")
    await lake.accept(entry_of([table, other], [1]))
    claim = await lake.worker().claim()
    found = {one.file_id: (one.kind, one.table_id) for one in await lake.upkeep.intents()}
    assert found == {file_id: ("data", table_id) for table_id, file_id in claim.file_ids.items()}


async def test_E1_partition_and_layout_are_kept_by_publish_and_swap(
    lake: LakeHarness, table: TableSchema
) -> None:
    for n in range(2):
        await lake.accept(entry_of(table, [n]))
        worker = lake.worker()
        commit = await worker.stage(await worker.claim())
        named = dataclasses.replace(commit.files[0], partition=f'{{"day(ts)": "{n}"}}', layout="id")
        await worker.publish(dataclasses.replace(commit, files=(named,)))
    files = await lake.upkeep.live_files(table.table_id)
    assert [(f.partition, f.layout) for f in files] == [
        ('{"day(ts)": "0"}', "id"),
        ('{"day(ts)": "1"}', "id"),
    ]
    swap = await swap_of(lake, table, files)
    marked = dataclasses.replace(swap.files[0], partition=None, layout="note,id")
    await lake.upkeep.publish_swap(dataclasses.replace(swap, files=(marked,)))
    head = await lake.catalog.head()
    delta = await lake.catalog.manifest_delta(after=0, until=head.snapshot_id)
    assert [(f.partition, f.layout, f.last_snapshot) for f in delta.files] == [
        ('{"day(ts)": "0"}', "id", head.snapshot_id),
        ('{"day(ts)": "1"}', "id", head.snapshot_id),
        (None, "note,id", None),
    ]


async def test_E1_live_files_are_counted_by_table_and_size(
    lake: LakeHarness, table: TableSchema
) -> None:
    other = await lake.create("u")
    await files_of(lake, table, 3)
    files = await files_of(lake, other, 2)
    await swapped(lake, other, files)
    counts = await lake.upkeep.file_counts(small_bytes=150)
    assert counts == {table.table_id: (3, 3), other.table_id: (1, 0)}


# --- expiry ---------------------------------------------------------------------------------------


async def test_E8_a_snapshot_expires_when_it_is_too_old_and_beyond_the_count(
    lake: LakeHarness, table: TableSchema
) -> None:
    await files_of(lake, table, 4)
    head = await lake.catalog.head()
    await lake.advance_s(A_MOMENT_S)
    for keep_s, keep_count in ((3_600.0, 1), (0.0, 1_000)):
        kept = await lake.upkeep.expire_snapshots(keep_s=keep_s, keep_count=keep_count, limit=100)
        assert (kept.first, kept.last, kept.tagged, kept.oldest_snapshot_id) == (None, None, 0, 1)
    would = await lake.upkeep.expire_snapshots(keep_s=0, keep_count=2, limit=100, dry_run=True)
    assert (await lake.catalog.head()).oldest_snapshot_id == 1
    done = await lake.upkeep.expire_snapshots(keep_s=0, keep_count=2, limit=100)
    assert would == done
    assert (done.first, done.last) == (1, head.snapshot_id - 2)
    assert (await lake.catalog.head()).oldest_snapshot_id == head.snapshot_id - 1
    with pytest.raises(SnapshotExpired):
        await lake.catalog.snapshot(head.snapshot_id - 2)
    retained = [one.snapshot_id for one in await lake.catalog.snapshots(limit=100)]
    assert retained == [head.snapshot_id, head.snapshot_id - 1]


async def test_E8_only_snapshots_older_than_the_age_expire(
    lake: LakeHarness, table: TableSchema
) -> None:
    files = await files_of(lake, table, 2)
    await lake.advance_s(0.5)
    await files_of(lake, table, 1)
    await lake.upkeep.expire_snapshots(keep_s=0.4, keep_count=1, limit=100)
    assert (await lake.catalog.head()).oldest_snapshot_id == files[-1].first_snapshot + 1


async def test_E8_the_head_never_expires(lake: LakeHarness, table: TableSchema) -> None:
    await files_of(lake, table, 1)
    head_id = await expire_all_but_the_head(lake)
    again = await lake.upkeep.expire_snapshots(keep_s=0, keep_count=0, limit=100)
    assert (again.first, again.oldest_snapshot_id) == (None, head_id)
    assert len(await lake.rows_by_entry()) == 1


async def test_E8_expiry_ends_the_oldest_first_and_no_more_than_it_may(
    lake: LakeHarness, table: TableSchema
) -> None:
    await files_of(lake, table, 4)
    await lake.advance_s(A_MOMENT_S)
    for n in (1, 3):
        done = await lake.upkeep.expire_snapshots(keep_s=0, keep_count=1, limit=2)
        assert (done.first, done.last, done.oldest_snapshot_id) == (n, n + 1, n + 2)
    nothing = await lake.upkeep.expire_snapshots(keep_s=0, keep_count=1, limit=0)
    assert (nothing.first, nothing.oldest_snapshot_id) == (None, 5)


async def test_E8_snapshots_are_counted_and_their_ids_never_subtracted(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.RESTORE)
    await files_of(lake, table, 3)
    await lake.restore(await lake.take_backup())
    await lake.advance_s(A_MOMENT_S)
    ids = [one.snapshot_id for one in await lake.catalog.snapshots(limit=100)]
    assert ids[0] > ids[1] + 1  # the hole of the restore
    await lake.upkeep.expire_snapshots(keep_s=0, keep_count=3, limit=100)
    assert [one.snapshot_id for one in await lake.catalog.snapshots(limit=100)] == ids[:3]


# --- tags -----------------------------------------------------------------------------------------


async def test_E8_a_tag_keeps_its_snapshot_for_ever(lake: LakeHarness, table: TableSchema) -> None:
    files = await files_of(lake, table, 2)
    tagged_id = files[0].first_snapshot
    await lake.upkeep.create_tag("release", tagged_id, created_by="me")
    before = await lake.files.rows_at(lake.catalog, tagged_id)
    await swapped(lake, table, files)
    ticket = await lake.catalog.begin_drop(name=table.name)
    await lake.catalog.finish_drop(ticket)
    await lake.advance_s(A_MOMENT_S)
    expired = await lake.upkeep.expire_snapshots(keep_s=0, keep_count=1, limit=100)
    assert expired.tagged == 1
    assert (await lake.catalog.snapshot(tagged_id)).snapshot_id == tagged_id
    with pytest.raises(SnapshotExpired):
        await lake.catalog.snapshot(tagged_id - 1)
    with pytest.raises(SnapshotExpired):
        await lake.catalog.snapshot(tagged_id + 1)
    kept = [one.snapshot_id for one in await lake.catalog.snapshots(limit=100)]
    assert kept == [expired.oldest_snapshot_id, tagged_id]
    assert await lake.files.rows_at(lake.catalog, tagged_id) == before
    assert len(before) == 1


async def test_E8_a_tagged_snapshot_is_read_by_every_replica(
    lake: LakeHarness, table: TableSchema
) -> None:
    files = await files_of(lake, table, 2)
    tagged_id = files[0].first_snapshot
    choice = SnapshotChoice(snapshot_id=tagged_id)
    async with reading(lake) as early:
        expected = (await early.read(choice)).rows  # loaded before the tag
        await lake.upkeep.create_tag("release", tagged_id, created_by="me")
        async with reading(lake) as middle:
            assert (await middle.read(choice)).rows == expected  # loaded before the expiry
            await swapped(lake, table, files)
            ticket = await lake.catalog.begin_drop(name=table.name)
            await lake.catalog.finish_drop(ticket)
            await expire_all_but_the_head(lake)
            await lake.upkeep.condemn(limit=100)
            await lake.advance_s(A_MOMENT_S)
            await lake.upkeep.begin_deletes(window_s=0, limit=100)
            async with reading(lake) as late:
                for replica in (early, middle, late):
                    assert (await replica.read(choice)).rows == expected
                    assert (await replica.read()).rows == {}
                    with pytest.raises(SnapshotExpired):
                        await replica.read(SnapshotChoice(snapshot_id=tagged_id + 1))


async def test_E8_tags_are_created_once_listed_and_dropped(
    lake: LakeHarness, table: TableSchema
) -> None:
    await files_of(lake, table, 2)
    first = await lake.upkeep.create_tag("b", 2, created_by="me")
    assert (first.name, first.snapshot_id, first.created_by) == ("b", 2, "me")
    assert await lake.upkeep.create_tag("b", 2, created_by="you") == first
    with pytest.raises(TagExists) as caught:
        await lake.upkeep.create_tag("b", 3, created_by="me")
    assert caught.value.members == {"snapshot_id": 2}
    second = await lake.upkeep.create_tag("a", 2, created_by="me")
    assert list(await lake.upkeep.tags()) == [second, first]
    with pytest.raises(SnapshotNotFound):
        await lake.upkeep.create_tag("c", 1_000, created_by="me")
    await expire_all_but_the_head(lake)
    with pytest.raises(SnapshotExpired):
        await lake.upkeep.create_tag("c", 3, created_by="me")
    # The snapshot ends with its last tag, and a tag of it can be made until then.
    assert await lake.upkeep.drop_tag("b") == first
    assert (await lake.upkeep.create_tag("d", 2, created_by="me")).snapshot_id == 2
    await lake.upkeep.drop_tag("a")
    assert (await lake.catalog.snapshot(2)).snapshot_id == 2
    await lake.upkeep.drop_tag("d")
    with pytest.raises(SnapshotExpired):
        await lake.catalog.snapshot(2)
    assert await lake.upkeep.drop_tag("d") is None
    with pytest.raises(SnapshotExpired):
        await lake.upkeep.create_tag("d", 2, created_by="me")


async def test_E8_a_tag_dropped_before_its_snapshot_is_old_expires_nothing(
    lake: LakeHarness, table: TableSchema
) -> None:
    await files_of(lake, table, 1)
    await lake.upkeep.create_tag("a", 2, created_by="me")
    await lake.upkeep.drop_tag("a")
    assert (await lake.catalog.snapshot(2)).snapshot_id == 2


# --- replicas -------------------------------------------------------------------------------------


async def test_D8_a_replica_that_slept_through_an_expiry_loads_anew(
    open_lake: OpenLake,
) -> None:
    """The rows of files that ended go when the files are deleted, so a delta could not tell a
    sleeper that they ended: it would see their rows twice for ever."""

    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    files = await files_of(lake, table, 3)
    manifest = Manifest(lake.catalog)
    try:
        head = await lake.catalog.head()
        view = await manifest.at(head.snapshot_id, head)
        assert len(view.files(table.table_id).files) == 3
        await swapped(lake, table, files)
        await files_of(lake, table, 1)
        await expire_all_but_the_head(lake)
        await lake.upkeep.condemn(limit=100)
        await lake.advance_s(A_MOMENT_S)
        assert len(await lake.upkeep.begin_deletes(window_s=0, limit=100)) == 3
        with pytest.raises(SnapshotExpired):
            await lake.catalog.manifest_delta(after=head.snapshot_id, until=head.snapshot_id + 1)
        now = await lake.catalog.head()
        view = await manifest.at(now.snapshot_id, now)
        assert len(view.files(table.table_id).files) == 2
    finally:
        await manifest.close()
