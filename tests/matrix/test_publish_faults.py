"""M16, M18, M19, M21: the publish transaction under faults of its own database session."""

from __future__ import annotations

import asyncio

import pytest

from lakebus.clock import new_uuid
from lakebus.errors import OutcomeUnknown
from lakebus.schemas import TableSchema
from storage.bus.interface import Claim
from storage.catalog.interface import Commit, CommitOutcome, Published
from tests.conformance.harness import LakeView, entry_of
from tests.conformance.worker import Worker
from tests.failpoints.actions import Pause, Run
from tests.failpoints.markers import markers_of
from tests.failpoints.points import Failpoints
from tests.failpoints.sql import SqlBarrier, SqlError, SqlPause, SqlTerminate
from tests.matrix.conftest import OpenMatrixLake
from tests.matrix.rig import (
    MatrixLake,
    keyed_entries,
    locks_waited_for,
    named,
    reclaimed,
)

pytestmark = pytest.mark.usefixtures("patient_sessions")

PUBLISHED, LEASE_LOST = CommitOutcome.PUBLISHED, CommitOutcome.LEASE_LOST
#: The database gave up on the transaction: a deadlock, a conflict of snapshots.
REFUSALS = ("40P01", "40001")


async def two_commits(
    lake: MatrixLake, worker: Worker, table: TableSchema, *, first_id: int = 0
) -> list[Commit]:
    """Ranges of two shards. In the first an entry is set aside, so that every statement has work;
    the second is a lone entry, whose range is the same after a reclaim: its epoch tells it."""
    ids = range(first_id, first_id + 4)
    await lake.offer(keyed_entries(table, ids[:3], ordering_key="one"))
    await lake.offer(keyed_entries(table, ids[3:], ordering_key="two"))
    first, second = await worker.claim(), await worker.claim()
    assert first.lease.shard != second.lease.shard
    return [
        await worker.stage(first, quarantine={first.lease.lo + 1}),
        await worker.stage(second),
    ]


def outcomes(published: Published) -> set[CommitOutcome]:
    return set(published.outcomes.values())


async def publish_all(worker: Worker, claims: list[Claim]) -> None:
    for claim in claims:
        assert outcomes(await worker.publish(await worker.stage(claim))) == {PUBLISHED}


# --- M16 ------------------------------------------------------------------------------------------


async def test_M16_a_publish_killed_at_any_statement_changes_nothing(
    open_matrix_lake: OpenMatrixLake,
) -> None:
    lake = await open_matrix_lake(quarantine_rate_max=1_000)
    table = await lake.create()
    places = markers_of("publish")
    assert len(places) >= 15
    for turn, place in enumerate(places):
        with named(place):
            await _killed_at(lake, table, place, first_id=10 * turn)
    books = await lake.audit()
    assert len(books["quarantined"]) == 0
    await lake.replays()


async def _killed_at(lake: MatrixLake, table: TableSchema, place: str, *, first_id: int) -> None:
    zombie, successor = lake.worker(), lake.worker()
    commits = await two_commits(lake, zombie, table, first_id=first_id)
    before, publication_id = await lake.everything(), new_uuid()

    await lake.sql.arm(place, SqlTerminate())
    with pytest.raises(OutcomeUnknown):
        await lake.catalog.publish(publication_id, commits)
    assert await lake.sql.hits(place) == 1
    await lake.unchanged_since(before)
    assert await lake.catalog.publish_outcome(publication_id) is None
    await lake.audit(drained=False, keys=False)

    claims = await reclaimed(lake, successor)
    late = await zombie.publish(*commits)
    assert outcomes(late) == {LEASE_LOST}
    assert late.snapshot_id is None
    await publish_all(successor, claims)
    await lake.drain()


async def test_M16_the_same_publication_sent_again_after_a_kill_happens_once(
    matrix_lake: MatrixLake, matrix_table: TableSchema
) -> None:
    """The publisher's own way: read back, then the same publication under the same id."""
    lake, publisher = matrix_lake, matrix_lake.publisher()
    commits = await two_commits(lake, lake.worker(), matrix_table)
    await lake.sql.arm("publish.after_notify", SqlTerminate(), times=2)
    submitted = [asyncio.ensure_future(publisher.submit(commit)) for commit in commits]
    await asyncio.sleep(0)  # both are queued with the publisher
    await publisher.run_once()
    answers = await asyncio.gather(*submitted)
    assert {answer.outcome for answer in answers} == {PUBLISHED}
    assert len({answer.snapshot_id for answer in answers}) == 1
    assert await lake.sql.hits("publish.after_notify") == 2
    await lake.audit()


# --- M18 ------------------------------------------------------------------------------------------


async def test_M18_two_publishers_of_one_table_at_the_head_both_publish_one_after_the_other(
    open_matrix_lake: OpenMatrixLake,
) -> None:
    lake = await open_matrix_lake(claim_entries_max=1)
    table, rounds = await lake.create(), 10
    ids = list(range(2 * rounds))
    await lake.offer(keyed_entries(table, ids))
    views: list[LakeView | None] = [None, await lake.second()]
    workers = [lake.worker(view) for view in views]
    commits = await lake.staged(workers[0])
    assert len(commits) == len(ids)
    await lake.sql.arm("publish.before_head_lock", SqlBarrier(2), times=None)

    async def publish_half(worker: Worker, half: list[Commit]) -> list[Published]:
        return [await worker.publish(commit) for commit in half]

    halves = await asyncio.gather(
        publish_half(workers[0], commits[::2]), publish_half(workers[1], commits[1::2])
    )
    published = [one for half in halves for one in half]
    assert [outcomes(one) for one in published] == [{PUBLISHED}] * len(ids)
    assert len({one.snapshot_id for one in published}) == len(ids)
    assert await lake.sql.hits("publish.before_head_lock") == len(ids)
    books = await lake.audit()
    assert books["head"][0]["snapshot_id"] == 2 + len(ids)


async def test_M18_two_coordinators_with_the_same_ranges_have_one_winner(
    open_matrix_lake: OpenMatrixLake,
) -> None:
    lake = await open_matrix_lake(claim_entries_max=2)
    table, rounds = await lake.create(), 6
    view = await lake.second()
    await lake.sql.arm("publish.before_head_lock", SqlBarrier(2), times=None)
    for n in range(rounds):
        # A lone entry's range is the same after the reclaim, two entries' is halved by it.
        await lake.offer(keyed_entries(table, [2 * n, 2 * n + 1][: 1 + n % 2]))
        old, new = lake.worker(), lake.worker(view)
        stale = await old.stage(await old.claim())
        claims = await reclaimed(lake, new)
        fresh = [await new.stage(claim) for claim in claims]
        lost, won = await asyncio.gather(old.publish(stale), new.publish(*fresh))
        assert outcomes(lost) == {LEASE_LOST}
        assert outcomes(won) == {PUBLISHED}
    await lake.sql.disarm("publish.before_head_lock")
    await lake.drain()
    await lake.audit()


async def test_M18_one_lease_published_by_two_at_once_is_published_once(
    matrix_lake: MatrixLake, matrix_table: TableSchema
) -> None:
    lake, view = matrix_lake, await matrix_lake.second()
    await lake.sql.arm("publish.before_head_lock", SqlBarrier(2), times=None)
    for n in range(6):
        await lake.offer(keyed_entries(matrix_table, [n]))
        worker = lake.worker()
        commit = await worker.stage(await worker.claim())
        results = await asyncio.gather(
            *(catalog.publish(new_uuid(), [commit]) for catalog in (lake.catalog, view.catalog))
        )
        assert sorted(o for one in results for o in one.outcomes.values()) == [
            LEASE_LOST,
            PUBLISHED,
        ]
    await lake.sql.disarm("publish.before_head_lock")
    await lake.audit()


async def test_M18_a_publisher_waits_for_the_head_and_builds_on_what_it_finds(
    matrix_lake: MatrixLake, matrix_table: TableSchema
) -> None:
    """The second one came first to nothing: it holds no lock before the head's."""
    lake, view = matrix_lake, await matrix_lake.second()
    first, second = await two_commits(lake, lake.worker(), matrix_table)
    await lake.sql.arm("publish.after_head", SqlPause())
    leading = asyncio.ensure_future(lake.catalog.publish(new_uuid(), [first]))
    await lake.sql.reached("publish.after_head")
    following = asyncio.ensure_future(view.catalog.publish(new_uuid(), [second]))
    while not await locks_waited_for(lake.dsn):
        await asyncio.sleep(0.005)  # a lock that is waited for gives no signal
    assert not leading.done()
    assert not following.done()
    await lake.sql.resume("publish.after_head")
    led, followed = await asyncio.gather(leading, following)
    assert outcomes(led) == outcomes(followed) == {PUBLISHED}
    assert led.snapshot_id is not None
    assert followed.snapshot_id == led.snapshot_id + 1
    await lake.audit()


# --- M19 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sqlstate", REFUSALS)
@pytest.mark.parametrize("place", ["publish.after_fence", "publish.after_done"])
async def test_M19_a_refused_publish_is_sent_again_whole(
    matrix_lake: MatrixLake, matrix_table: TableSchema, place: str, sqlstate: str
) -> None:
    lake, publisher = matrix_lake, matrix_lake.publisher()
    commits = await two_commits(lake, lake.worker(), matrix_table)
    await lake.sql.arm(place, SqlError(sqlstate), skip=1)  # in the middle: one commit is done
    submitted = [asyncio.ensure_future(publisher.submit(commit)) for commit in commits]
    await asyncio.sleep(0)
    report = await publisher.run_once()
    assert (report.commits, report.failed) == (2, 0)
    answers = await asyncio.gather(*submitted)
    assert {(a.outcome, a.snapshot_id) for a in answers} == {(PUBLISHED, report.snapshot_id)}
    await lake.audit()


@pytest.mark.parametrize("sqlstate", REFUSALS)
async def test_M19_the_second_try_meets_the_fence_again(
    matrix_lake: MatrixLake, matrix_table: TableSchema, failpoints: Failpoints, sqlstate: str
) -> None:
    """The first try passed the fence and was refused; before the second the leases are reclaimed,
    so the second must lose, however right the first one was."""
    lake, publisher = matrix_lake, matrix_lake.publisher()
    zombie, successor = lake.worker(), lake.worker(await lake.second())
    commits = await two_commits(lake, zombie, matrix_table)
    claims: list[Claim] = []

    async def reclaim() -> None:
        claims.extend(await reclaimed(lake, successor))

    await lake.sql.arm("publish.after_head", SqlError(sqlstate))
    failpoints.arm("catalog.before_publish", Run(reclaim), skip=1)
    submitted = [asyncio.ensure_future(publisher.submit(commit)) for commit in commits]
    await asyncio.sleep(0)
    report = await publisher.run_once()
    assert report.snapshot_id is None
    answers = await asyncio.gather(*submitted)
    assert {(a.outcome, a.snapshot_id) for a in answers} == {(LEASE_LOST, None)}
    await lake.audit(drained=False)
    await publish_all(successor, claims)
    await lake.drain()
    await lake.audit()


# --- M21 ------------------------------------------------------------------------------------------


async def test_M21_a_stale_coordinator_after_a_hundred_publications_changes_nothing(
    open_matrix_lake: OpenMatrixLake, failpoints: Failpoints
) -> None:
    lake = await open_matrix_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.offer(keyed_entries(table, range(100)))
    zombie = lake.worker()
    commit = await zombie.stage(await zombie.claim())
    failpoints.arm("catalog.before_publish", Pause())
    late = asyncio.ensure_future(zombie.publish(commit))
    await failpoints.reached("catalog.before_publish")

    successor = lake.worker(await lake.second())
    await lake.expire_leases()
    marks = []
    for _ in range(100):
        published = await successor.publish_one()
        assert outcomes(published) == {PUBLISHED}
        marks.append(published.watermark[commit.lease.shard])
    assert marks == sorted(marks)
    assert marks[-1] == 100
    before = await lake.everything()

    failpoints.resume("catalog.before_publish")
    published = await late
    assert published.outcomes == {commit.commit_id: LEASE_LOST}
    assert published.snapshot_id is None
    assert published.watermark[commit.lease.shard] == 100
    await lake.unchanged_since(before)
    await lake.audit()


async def test_M21_a_publish_that_began_before_its_successors_sees_what_they_made(
    open_matrix_lake: OpenMatrixLake,
) -> None:
    """The stale one stands inside its transaction, before the head: what it read so far is old."""
    lake = await open_matrix_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.offer(keyed_entries(table, range(12)))
    zombie, successor = lake.worker(), lake.worker(await lake.second())
    reclaimed_one = await zombie.stage(await zombie.claim())
    kept_one = await zombie.stage(await zombie.claim())
    await lake.execute(
        "UPDATE lakebus.bus_lease SET expires_at = clock_timestamp() WHERE lease_id = $1",
        reclaimed_one.lease.lease_id,
    )
    await lake.sql.arm("publish.before_head_lock", SqlPause())
    late = asyncio.ensure_future(zombie.publish(reclaimed_one, kept_one))
    await lake.sql.reached("publish.before_head_lock")
    for _ in range(11):
        await successor.publish_one()
    assert (await lake.catalog.head()).watermark[kept_one.lease.shard] == 1
    await lake.sql.resume("publish.before_head_lock")
    published = await late
    assert published.outcomes == {
        reclaimed_one.commit_id: LEASE_LOST,
        kept_one.commit_id: PUBLISHED,
    }
    assert published.watermark[kept_one.lease.shard] == 12
    assert await successor.bus.claim(successor.owner) is None
    await lake.audit()


async def test_M21_entries_that_came_meanwhile_are_not_the_stale_ones_to_publish(
    matrix_lake: MatrixLake, matrix_table: TableSchema
) -> None:
    """Its range was halved at the reclaim: neither the whole nor a half is its own any more."""
    lake = matrix_lake
    await lake.accept(entry_of(matrix_table, [1], ordering_key="one"))
    await lake.accept(entry_of(matrix_table, [2], ordering_key="one"))
    zombie, successor = lake.worker(), lake.worker()
    commit = await zombie.stage(await zombie.claim())
    assert commit.lease.hi - commit.lease.lo == 2
    claims = await reclaimed(lake, successor)
    await publish_all(successor, claims[:1])
    before = await lake.everything()
    late = await zombie.publish(commit)
    assert outcomes(late) == {LEASE_LOST}
    await lake.unchanged_since(before)
    await publish_all(successor, claims[1:])
    await lake.drain()
    await lake.audit()
