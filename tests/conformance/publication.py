"""C1 to C3, C5 and C7: the one transaction that makes a snapshot."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from lakebus.clock import new_uuid
from lakebus.errors import OutcomeUnknown
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import Accepted, BatchState, RejectSet
from storage.catalog.interface import CommitOutcome, Published
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, LakeHarness, LakeView, entry_of

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
    done, looked = asyncio.Event(), asyncio.Event()

    async def observe() -> None:
        while not done.is_set():
            head = await view.catalog.head()
            (covered,) = [end for end in head.watermark.values() if end] or [0]
            for one in (table, other):
                rows = await lake.files.rows_at(
                    view.catalog, head.snapshot_id, table_id=one.table_id
                )
                assert {position for _, position in rows} == set(range(covered))
            looked.set()
            await asyncio.sleep(0)

    observer = asyncio.ensure_future(observe())
    observer.add_done_callback(lambda _: looked.set())
    worker = lake.worker()
    for _ in range(6):
        if observer.done():
            break  # it has seen something, and says what
        looked.clear()
        await worker.publish_one()
        await looked.wait()  # the look that was under way meanwhile
    done.set()
    await observer


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
    accepted = [await lake.accept(entry_of(table, [n], ordering_key=str(n % 5))) for n in range(20)]
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


async def test_C3_publishing_on_one_shard_leaves_the_others_where_they_are(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=1, lease_ttl_ms=20_000)
    table = await lake.create()
    places = {
        (await lake.accept(entry_of(table, [n], ordering_key=str(n)))).shard for n in range(9)
    }
    assert len(places) > 1
    worker = lake.worker()
    claims = [await worker.claim() for _ in range(9)]
    # One shard after the other, in turns: each step starts from a head that the last one made.
    claims.sort(key=lambda claim: (claim.lease.lo, claim.lease.shard))
    before = dict((await lake.catalog.head()).watermark)
    for claim in claims:
        published = await worker.publish(await worker.stage(claim))
        before[claim.lease.shard] = claim.lease.hi
        assert dict(published.watermark) == before
        assert dict((await lake.catalog.head()).watermark) == before


async def test_D12_ranges_are_told_by_the_snapshots_that_published_them(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=2, lease_ttl_ms=20_000)
    table = await lake.create()
    shard = (await lake.accept_many(table, 8))[0].shard
    worker = lake.worker()
    commits = [await worker.stage(await worker.claim()) for _ in range(4)]
    made: list[tuple[int, int]] = []
    for n in (2, 0, 3, 1):  # by place in the shard, not in the order of publication
        snapshot_id = (await worker.publish(commits[n])).snapshot_id
        assert snapshot_id is not None
        made.append((2 * n, snapshot_id))
    first, last = made[0][1], made[-1][1]
    for after in range(first - 1, last + 1):
        for until in range(after, last + 1):
            found = await lake.catalog.published_ranges(after=after, until=until)
            wanted = sorted((lo, s) for lo, s in made if after < s <= until)
            told = [(one.shard, one.lo, one.hi, one.snapshot_id) for one in found]
            assert told == [(shard, lo, lo + 2, s) for lo, s in wanted]


# --- C5, C7 ---------------------------------------------------------------------------------------


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
