"""Section C of the contract, and F1: the one transaction that makes a snapshot."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt

import pytest

from lakebus.clock import new_uuid
from lakebus.errors import OutcomeUnknown, TimeInFuture
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import Accepted, BatchState, KeyTaken, RejectSet
from storage.catalog.interface import Commit, CommitOutcome, Published
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, LakeHarness, LakeView, entry_of, total
from tests.conformance.worker import Worker, fake_file

# --- C1, C2, C3 -----------------------------------------------------------------------------------


async def test_C1_snapshot_files_ack_and_watermark_become_visible_together(
    lake: LakeHarness, table: TableSchema
) -> None:
    accepted = await lake.accept_many(table, 3)
    shard = accepted[0].shard
    before = await lake.catalog.head()
    worker = lake.worker()
    commit = await worker.stage(await worker.claim())
    assert await _seen(lake, accepted) == (before.snapshot_id, 0, set(), {BatchState.ACCEPTED})
    published = await worker.publish(commit)
    assert published.snapshot_id == before.snapshot_id + 1
    assert published.watermark[shard] == 3
    places = {(a.shard, a.position) for a in accepted}
    assert await _seen(lake, accepted) == (
        published.snapshot_id,
        3,
        places,
        {BatchState.PUBLISHED},
    )
    # Acking is part of publishing: the range is gone.
    assert await lake.bus.renew([commit.lease]) == []
    assert await lake.bus.claim(worker.owner) is None
    statuses = {status.shard: status for status in await lake.bus.shard_status()}
    assert (statuses[shard].backlog_entries, statuses[shard].leases) == (0, 0)
    assert (statuses[shard].backlog_bytes, statuses[shard].backlog_age_s) == (0, 0.0)


async def test_C1_an_observer_never_sees_half_of_a_publication(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=2, lease_ttl_ms=20_000)
    table, other = await lake.create("t"), await lake.create("u")
    for n in range(12):
        await lake.accept(entry_of([table, other], [n], ordering_key="one"))
    view = await lake.second()
    done = asyncio.Event()

    async def observe() -> int:
        looks = 0
        while not done.is_set():
            head = await view.catalog.head()
            (covered,) = [end for end in head.watermark.values() if end] or [0]
            for one in (table, other):
                rows = await lake.files.rows_at(
                    view.catalog, head.snapshot_id, table_id=one.table_id
                )
                assert {position for _, position in rows} == set(range(covered))
            looks += 1
            await asyncio.sleep(0)
        return looks

    observer = asyncio.ensure_future(observe())
    worker = lake.worker()
    for _ in range(6):
        await worker.publish_one()
    done.set()
    assert await observer > 1


async def test_C1_a_publication_that_lost_everything_changes_nothing(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 2)
    worker = lake.worker()
    commit = await worker.stage(await worker.claim())
    await lake.bus.release(commit.lease)
    before = await lake.catalog.head()
    published = await worker.publish(commit)
    assert (published.snapshot_id, published.published_at) == (None, None)
    assert published.outcomes == {commit.commit_id: CommitOutcome.LEASE_LOST}
    assert published.watermark == before.watermark
    after = await lake.catalog.head()
    assert (after.snapshot_id, after.watermark) == (before.snapshot_id, before.watermark)
    await lake.drain()
    assert len(await lake.rows_by_entry()) == 2


async def test_C2_every_entry_ends_in_exactly_one_snapshot(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=3)
    table = await lake.create()
    accepted = [
        await lake.accept(entry_of(table, [n], ordering_key=str(n % 5))) for n in range(20)
    ]
    await lake.drain()
    assert await lake.rows_by_entry() == {(a.shard, a.position): 1 for a in accepted}
    head = await lake.catalog.head()
    delta = await lake.catalog.manifest_delta(after=0, until=head.snapshot_id)
    first = {
        place: file.first_snapshot
        for file in delta.files
        for place in lake.files.contents[file.file_id]
    }
    for entry in accepted:
        status = await lake.bus.batch(entry.receipt.batch_id)
        assert status is not None
        assert status.state is BatchState.PUBLISHED
        assert status.snapshot_id == first[(entry.shard, entry.position)]


async def test_C2_two_commits_of_one_lease_in_one_publication(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept(entry_of(table, [1, 2]))
    worker = lake.worker()
    claim = await worker.claim()
    commits = [await worker.stage(claim), await worker.stage(claim)]
    published = await worker.publish(*commits)
    outcomes = sorted(published.outcomes.values())
    assert outcomes.count(CommitOutcome.PUBLISHED) == 1
    assert sum((await lake.rows_by_entry()).values()) == 2


async def test_C2_two_commits_without_files_of_one_lease_in_one_publication(
    lake: LakeHarness, table: TableSchema
) -> None:
    rejects = [RejectSet(table.table_id, table.version, rows=1, document=b"[]")]
    await lake.accept(entry_of(table, [], rejects=rejects, target="t"))
    worker = lake.worker()
    claim = await worker.claim()
    commits = [await worker.stage(claim), await worker.stage(claim)]
    published = await worker.publish(*commits)
    assert sorted(published.outcomes.values()) == [
        CommitOutcome.LEASE_LOST,
        CommitOutcome.PUBLISHED,
    ]


async def test_C2_a_commit_cannot_be_published_again_under_another_publication(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 2)
    worker = lake.worker()
    commit = await worker.stage(await worker.claim())
    await worker.publish(commit)
    again = await worker.publish(commit)
    assert again.outcomes == {commit.commit_id: CommitOutcome.LEASE_LOST}
    assert again.snapshot_id is None
    assert sum((await lake.rows_by_entry()).values()) == 2


async def test_C2_concurrent_publications_of_one_lease_have_one_winner(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 2)
    worker = lake.worker()
    commit = await worker.stage(await worker.claim())
    view = await lake.second()
    results = await asyncio.gather(
        *(catalog.publish(new_uuid(), [commit]) for catalog in (lake.catalog, view.catalog) * 3)
    )
    outcomes = [result.outcomes[commit.commit_id] for result in results]
    assert outcomes.count(CommitOutcome.PUBLISHED) == 1
    assert outcomes.count(CommitOutcome.LEASE_LOST) == len(outcomes) - 1
    assert len({r.snapshot_id for r in results} - {None}) == 1
    assert sum((await lake.rows_by_entry()).values()) == 2


async def test_A9_a_loser_in_a_publication_leaves_its_neighbours_published(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=2)
    table = await lake.create()
    accepted = await lake.accept_many(table, 6)
    worker = lake.worker()
    commits = [await worker.stage(await worker.claim()) for _ in range(3)]
    await lake.bus.release(commits[1].lease)
    published = await worker.publish(*commits)
    assert published.outcomes == {
        commits[0].commit_id: CommitOutcome.PUBLISHED,
        commits[1].commit_id: CommitOutcome.LEASE_LOST,
        commits[2].commit_id: CommitOutcome.PUBLISHED,
    }
    shard = accepted[0].shard
    assert published.watermark[shard] == 2
    assert {p for _, p in await lake.rows_by_entry()} == {0, 1, 4, 5}
    assert (await lake.drain())[-1].watermark[shard] == 6


async def test_C3_the_watermark_is_the_longest_terminal_prefix_and_never_falls(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=1, lease_ttl_ms=20_000)
    table = await lake.create()
    shard = (await lake.accept_many(table, 5))[0].shard
    worker = lake.worker()
    commits = [await worker.stage(await worker.claim()) for _ in range(5)]
    reached = []
    for n in (3, 1, 0, 4, 2):
        published = await worker.publish(commits[n])
        assert published.snapshot_id is not None
        head = await lake.catalog.head()
        snapshot = await lake.catalog.snapshot(published.snapshot_id)
        assert published.watermark == head.watermark == snapshot.watermark
        reached.append(published.watermark[shard])
        # Visibility inside the shard runs ahead of the watermark.
        assert (shard, n) in await lake.rows_by_entry()
        if n == 1:
            await lake.create("made_meanwhile")
            assert (await lake.catalog.head()).watermark[shard] == reached[-1]
    assert reached == [0, 0, 2, 2, 5]


# --- C4: time -------------------------------------------------------------------------------------


async def test_C4_publication_times_strictly_increase(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 6)
    worker = lake.worker()
    for n in range(6):
        await worker.publish_one()
        if n == 3:
            await lake.create("u")
            await lake.restart()
            worker = lake.worker()
    snapshots = list(await lake.catalog.snapshots(limit=100))[::-1]
    times = [snapshot.published_at for snapshot in snapshots]
    ids = [snapshot.snapshot_id for snapshot in snapshots]
    assert times == sorted(set(times))
    assert ids == list(range(1, len(ids) + 1))
    assert [s.parent_id for s in snapshots] == [None, *ids[:-1]]


async def test_C4_a_time_resolves_to_the_newest_snapshot_at_or_before_it(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 3)
    worker = lake.worker()
    for _ in range(3):
        await lake.advance_s(0.002)
        await worker.publish_one()
    snapshots = list(await lake.catalog.snapshots(limit=100))
    microsecond = dt.timedelta(microseconds=1)
    for newer, older in zip(snapshots, snapshots[1:], strict=False):
        assert await lake.catalog.snapshot_at(newer.published_at) == newer
        assert await lake.catalog.snapshot_at(newer.published_at - microsecond) == older


async def test_C4_an_answered_time_is_closed(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 4)
    for n in range(4):
        worker, view = lake.worker(), await lake.second()
        await lake.advance_s(0.002)
        now = (await lake.catalog.head()).now
        answer = await view.catalog.snapshot_at(now)
        published = await worker.publish_one()
        assert published.published_at is not None
        assert published.published_at > now
        if n == 1:
            await lake.restart()  # what was closed stays closed
        assert await lake.catalog.snapshot_at(now) == answer


async def test_C4_a_schema_change_takes_its_time_after_what_is_closed(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.advance_s(0.002)
    now = (await lake.catalog.head()).now
    answer = await lake.catalog.snapshot_at(now)
    await lake.create("u")
    assert (await lake.catalog.head()).published_at > now
    assert await lake.catalog.snapshot_at(now) == answer


async def test_C4_a_time_that_has_not_come_is_not_closed(
    lake: LakeHarness, table: TableSchema
) -> None:
    head = await lake.catalog.head()
    with pytest.raises(TimeInFuture):
        await lake.catalog.snapshot_at(head.now + dt.timedelta(hours=1))
    await lake.accept_many(table, 1)
    published = await lake.worker().publish_one()
    assert published.published_at is not None
    assert published.published_at < head.now + dt.timedelta(hours=1)


# --- C5, C6, C7 -----------------------------------------------------------------------------------


async def test_C5_a_lost_reply_is_unknown_and_can_be_read_back(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.LOST_REPLIES)
    await lake.accept_many(table, 2)
    worker = lake.worker()
    await worker.publish_one()
    await lake.accept_many(table, 2)
    commit = await worker.stage(await worker.claim())
    publication_id = new_uuid()
    await lake.lose_next_reply("publish")
    with pytest.raises(OutcomeUnknown):
        await lake.catalog.publish(publication_id, [commit])
    outcome = await lake.catalog.publish_outcome(publication_id)
    if outcome is None:  # the request was lost, not the reply: it is ours to send again
        outcome = await lake.catalog.publish(publication_id, [commit])
    assert outcome.outcomes == {commit.commit_id: CommitOutcome.PUBLISHED}
    assert (await lake.catalog.head()).snapshot_id == outcome.snapshot_id
    assert sum((await lake.rows_by_entry()).values()) == 4


async def test_C5_a_repeated_publication_is_answered_and_not_done_again(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 2)
    worker = lake.worker()
    commit = await worker.stage(await worker.claim())
    publication_id = new_uuid()
    assert await lake.catalog.publish_outcome(publication_id) is None
    first = await lake.catalog.publish(publication_id, [commit])
    await lake.accept_many(table, 1)
    await worker.publish_one()
    head = await lake.catalog.head()
    for _ in range(2):
        assert await lake.catalog.publish(publication_id, [commit]) == first
        assert await lake.catalog.publish_outcome(publication_id) == first
        await lake.restart()
    assert (await lake.catalog.head()).snapshot_id == head.snapshot_id
    assert sum((await lake.rows_by_entry()).values()) == 3


async def test_C5_concurrent_repeats_of_one_publication_give_one_answer(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 2)
    worker = lake.worker()
    commit = await worker.stage(await worker.claim())
    view = await lake.second()
    publication_id = new_uuid()
    results = await asyncio.gather(
        *(c.publish(publication_id, [commit]) for c in (lake.catalog, view.catalog) * 4)
    )
    assert all(result == results[0] for result in results)
    assert results[0].outcomes == {commit.commit_id: CommitOutcome.PUBLISHED}


async def test_C6_a_file_without_a_write_intent_is_not_published(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 1)
    worker = lake.worker()
    commit = await worker.stage(await worker.claim())
    stranger = fake_file(new_uuid(), table.table_id, table.version, 1)
    await _assert_intent_lost(worker, dataclasses.replace(commit, files=(stranger,)))
    await _assert_intent_lost(
        worker, dataclasses.replace(commit, files=(*commit.files, stranger))
    )
    published = await worker.publish(commit)  # the honest commit lost nothing by that
    assert published.outcomes == {commit.commit_id: CommitOutcome.PUBLISHED}


async def test_C6_collection_that_removed_the_intent_first_wins(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.REMOVE_INTENT)
    other = await lake.create("u")
    await lake.accept(entry_of([table, other], [1]))
    worker = lake.worker()
    claim = await worker.claim()
    commit = await worker.stage(claim)
    await lake.remove_intent(claim.file_ids[other.table_id])
    await _assert_intent_lost(worker, commit)
    assert await lake.rows_by_entry() == {}  # nothing of the other table either (A8)
    await lake.bus.release(claim.lease)
    await lake.drain()
    assert sum((await lake.rows_by_entry()).values()) == 2


async def test_C6_a_publish_consumes_the_intent(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 2)
    worker = lake.worker()
    first, second = [await worker.stage(await worker.claim()) for _ in range(2)]
    await worker.publish(first)
    await _assert_intent_lost(worker, dataclasses.replace(second, files=first.files))


async def test_C6_one_file_cannot_serve_two_commits_of_one_publication(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 2)
    worker = lake.worker()
    first, second = [await worker.stage(await worker.claim()) for _ in range(2)]
    thief = dataclasses.replace(second, files=first.files)
    published = await worker.publish(first, thief)
    assert sorted(published.outcomes.values()) == [
        CommitOutcome.INTENT_LOST,
        CommitOutcome.PUBLISHED,
    ]


async def test_C6_every_claim_gets_names_never_used_before(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 2)
    names = []
    for turn in range(6):
        claim = await lake.claim_within(2.0, lake.worker())
        names += claim.file_ids.values()
        if turn % 2:
            await lake.bus.release(claim.lease)
        else:
            await lake.wait_expired()
    assert len(set(names)) == len(names)


async def _assert_intent_lost(worker: Worker, commit: Commit) -> None:
    published = await worker.publish(commit)
    assert published.outcomes == {commit.commit_id: CommitOutcome.INTENT_LOST}
    assert published.snapshot_id is None


async def test_C7_appends_publishes_and_schema_changes_do_not_conflict(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=2, lease_ttl_ms=20_000)
    table, other = await lake.create("t"), await lake.create("u")
    view = await lake.second()
    count = 24

    async def append_all() -> list[Accepted]:
        entries = [entry_of(table, [n], ordering_key=str(n % 4)) for n in range(count)]
        return [o for e in entries if isinstance(o := await view.bus.append(e), Accepted)]

    async def publish_all(of: LakeView | None) -> list[Published]:
        worker, published = lake.worker(of), []
        while not appending.done() or len(await lake.rows_by_entry()) < count:
            claim = await worker.bus.claim(worker.owner)
            if claim is None:
                await lake.advance_s(0.005)
                await asyncio.sleep(0)
                continue
            published.append(await worker.publish(await worker.stage(claim)))
        return published

    async def change_schema() -> None:
        current = other
        for n in range(5):
            columns = (*current.columns, Column(0, f"more{n}", "bigint"))
            changed = dataclasses.replace(current, columns=columns)
            current = (
                await view.catalog.alter_table(schema=changed, expected_version=current.version)
            ).schema

    appending = asyncio.ensure_future(append_all())
    _, first, second = await asyncio.wait_for(
        asyncio.gather(change_schema(), publish_all(None), publish_all(view)), 30
    )
    assert len(await appending) == count
    outcomes = [o for published in first + second for o in published.outcomes.values()]
    assert set(outcomes) == {CommitOutcome.PUBLISHED}
    assert len(await lake.rows_by_entry()) == count


# --- D5, D6 as far as the bus answers them; F1 ----------------------------------------------------


async def test_D5_the_end_of_a_shard_is_known_once_a_receipt_is_given(
    lake: LakeHarness, table: TableSchema
) -> None:
    view = await lake.second()
    assert set(await lake.bus.ends()) == set(range(lake.bus.shards))
    for n in range(6):
        accepted = await lake.accept(entry_of(table, [n], ordering_key=str(n)))
        for bus in (lake.bus, view.bus):
            assert (await bus.ends())[accepted.shard] == accepted.position + 1
    before = await lake.bus.ends()
    await lake.restart()
    assert await lake.bus.ends() == before


async def test_D6_a_receipt_is_covered_exactly_from_its_publication_on(
    lake: LakeHarness, table: TableSchema
) -> None:
    accepted = await lake.accept_many(table, 3)
    token = (await lake.token_of(accepted[0])).merge(await lake.token_of(accepted[2]))
    head = await lake.catalog.head()
    assert not token.covered_by(head.snapshot_id, head.watermark)
    await lake.drain()
    head = await lake.catalog.head()
    assert token.covered_by(head.snapshot_id, head.watermark)


async def test_F1_after_killing_every_process_nothing_is_lost_and_nothing_is_twice(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=4)
    table = await lake.create()
    entries = [entry_of(table, [n], key=f"k{n}", ordering_key=str(n % 3)) for n in range(24)]
    accepted = [await lake.accept(entry) for entry in entries]
    tokens = [await lake.token_of(one) for one in accepted]
    worker = lake.worker()
    await worker.publish_one()
    staged = await worker.stage(await worker.claim())
    await worker.claim()
    identity = await lake.catalog.identity()
    await lake.restart()

    assert await lake.catalog.identity() == identity
    for entry, one in zip(entries, accepted, strict=True):
        again = await lake.bus.append(entry)
        assert isinstance(again, KeyTaken)
        assert again.record.receipt == one.receipt
    await lake.drain()
    assert await lake.rows_by_entry() == {(a.shard, a.position): 1 for a in accepted}
    head = await lake.catalog.head()
    assert [await lake.token_of(one) for one in accepted] == tokens
    assert all(token.covered_by(head.snapshot_id, head.watermark) for token in tokens)
    # The killed worker's last message arrives after all.
    late = await lake.worker().publish(staged)
    assert late.outcomes == {staged.commit_id: CommitOutcome.LEASE_LOST}
    assert total(await lake.bus.ends()) == len(entries)


async def test_F1_a_crash_of_the_server_keeps_receipts_and_snapshots(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=2)
    lake.needs(Capability.CRASH_SERVER)
    table = await lake.create()
    accepted = await lake.accept_many(table, 6)
    worker = lake.worker()
    await worker.publish_one()
    await worker.claim()
    head = await lake.catalog.head()
    await lake.crash_server()
    assert (await lake.catalog.head()).snapshot_id == head.snapshot_id
    await lake.drain()
    assert await lake.rows_by_entry() == {(a.shard, a.position): 1 for a in accepted}


# --- what helps -----------------------------------------------------------------------------------


async def _seen(
    lake: LakeHarness, accepted: list[Accepted]
) -> tuple[int, int, set[tuple[int, int]], set[BatchState]]:
    """(head, watermark of the shard, published entries, batch states), as a reader sees them."""

    head = await lake.catalog.head()
    statuses = [await lake.bus.batch(one.receipt.batch_id) for one in accepted]
    states = {status.state for status in statuses if status is not None}
    watermark = head.watermark[accepted[0].shard]
    return head.snapshot_id, watermark, set(await lake.rows_by_entry()), states
