"""B8 and B9: failure isolates and never condemns by itself; quarantine keeps and replays."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from lakebus.schemas import TableSchema
from storage.bus.interface import Accepted, BatchState, Claim, QuarantineItem
from storage.bus.settings import BusSettings
from storage.catalog.interface import CommitOutcome, Published
from storage.rows.segment import decode_single_entry
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import LakeHarness, entry_of
from tests.conformance.worker import Worker

SOON_S = 3.0

# --- B8: isolation --------------------------------------------------------------------------------


async def test_B8_an_expired_range_is_halved_and_nothing_of_it_is_lost(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 7)
    worker = lake.worker()
    whole = await worker.claim()
    assert (whole.lease.lo, whole.lease.hi) == (0, 7)
    await lake.wait_expired()
    halves = [await worker.claim()]
    halves.append(await lake.claim_within(SOON_S, worker))
    assert sorted((c.lease.lo, c.lease.hi) for c in halves) == [(0, 3), (3, 7)]
    assert [c.attempt for c in halves] == [1, 1]
    assert all(c.last_error and not c.doomed for c in halves)
    assert all(c.lease.epoch > whole.lease.epoch for c in halves)
    for half in halves:
        await worker.publish(await worker.stage(half))
    assert len(await lake.rows_by_entry()) == 7


async def test_B8_a_failed_range_is_halved_too_and_both_halves_wait(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 4)
    worker = lake.worker()
    claim = await worker.claim()
    await lake.bus.nack(claim.lease, error="cannot be read", delay_s=0.2)
    assert await lake.bus.claim(worker.owner) is None
    halves = [await lake.claim_within(SOON_S, worker) for _ in range(2)]
    assert sorted((c.lease.lo, c.lease.hi) for c in halves) == [(0, 2), (2, 4)]
    assert {(c.attempt, c.last_error) for c in halves} == {(1, "cannot be read")}


async def test_B8_a_range_that_failed_gets_a_short_lease(open_lake: OpenLake) -> None:
    lake = await open_lake(lease_ttl_ms=20_000)
    table = await lake.create()
    await lake.accept_many(table, 2)
    worker = lake.worker()
    claim = await worker.claim()
    assert claim.ttl_s > lake.settings.isolation_ttl_ms / 1000
    await lake.bus.nack(claim.lease, error="failed", delay_s=0)
    again = await lake.claim_within(SOON_S, worker)
    assert 0 < again.ttl_s <= lake.settings.isolation_ttl_ms / 1000


async def test_B8_halving_ends_with_the_poison_alone_and_its_neighbours_published(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake()
    table = await lake.create()
    accepted = await lake.accept_many(table, 8)
    worker = lake.worker()
    claim = await _crash_until(lake, worker, poison=5, enough=_is_alone)
    await _publish_the_rest(lake, worker, claim, entries=7)
    assert (claim.lease.lo, claim.lease.hi) == (5, 6)
    assert claim.attempt >= math.log2(8)
    assert not claim.doomed
    rows = await lake.rows_by_entry()
    assert set(rows) == {(a.shard, a.position) for a in accepted if a.position != 5}
    assert (await lake.catalog.head()).watermark[accepted[0].shard] == 5


async def test_B8_expiry_alone_never_condemns(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1, quarantine_attempts=2)
    table = await lake.create()
    await lake.accept_many(table, 1)
    claim = await lake.worker().claim()
    for attempt in range(1, 6):
        await lake.wait_expired()
        claim = await lake.claim_within(SOON_S, lake.worker())
        assert (claim.attempt, claim.lone_failures, claim.doomed) == (attempt, 0, False)
    await lake.bus.nack(claim.lease, error="no canary either", delay_s=0)
    claim = await lake.claim_within(SOON_S, lake.worker())
    assert (claim.lone_failures, claim.doomed) == (0, False)


async def test_B8_a_lone_entry_is_doomed_after_failures_beside_a_canary(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=1, quarantine_attempts=3)
    table = await lake.create()
    await lake.accept_many(table, 1)
    claim = await lake.worker().claim()
    for failures in range(1, 4):
        assert not claim.doomed
        await lake.bus.note_canary(claim.lease)
        if failures == 2:  # a failure that is told counts like one that is only noticed
            await lake.bus.nack(claim.lease, error="failed", delay_s=0)
        else:
            await lake.wait_expired()
        claim = await lake.claim_within(SOON_S, lake.worker())
        assert claim.lone_failures == failures
    assert claim.doomed


async def test_B8_a_canary_counts_for_its_own_epoch_only(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 1)
    claim = await lake.worker().claim()
    await lake.bus.note_canary(claim.lease)
    await lake.bus.release(claim.lease)  # this worker did not fail
    await lake.worker().claim()
    await lake.wait_expired()
    claim = await lake.claim_within(SOON_S, lake.worker())
    assert (claim.attempt, claim.lone_failures) == (1, 0)


async def test_B8_another_published_commit_serves_as_the_canary(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 3)
    busy, idle = lake.worker(), lake.worker()
    await busy.claim()  # fails on this one …
    await idle.claim()
    await busy.publish_one()  # … while it gets other work done
    await lake.wait_expired()
    claims = [await lake.claim_within(SOON_S, lake.worker()) for _ in range(2)]
    assert {c.lease.lo: c.lone_failures for c in claims} == {0: 1, 1: 0}


async def test_B8_what_was_published_before_the_claim_shows_nothing(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 2)
    worker = lake.worker()
    await worker.publish_one()
    await lake.advance_s(0.01)
    await worker.claim()
    await lake.wait_expired()
    assert (await lake.claim_within(SOON_S, lake.worker())).lone_failures == 0


async def test_B8_a_range_of_several_is_never_doomed(open_lake: OpenLake) -> None:
    lake = await open_lake(quarantine_attempts=1)
    table = await lake.create()
    await lake.accept_many(table, 4)
    claim = await lake.worker().claim()
    await lake.bus.note_canary(claim.lease)
    await lake.wait_expired()
    for _ in range(2):
        claim = await lake.claim_within(SOON_S, lake.worker())
        assert (claim.lone_failures, claim.doomed) == (0, False)


async def test_B8_one_poison_entry_delays_its_shard_by_at_most_ten_ttl(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(lease_ttl_ms=1_000, quarantine_attempts=3)
    table = await lake.create()
    accepted = await lake.accept_many(table, 8)
    began = (await lake.catalog.head()).now
    worker = lake.worker()
    claim = await _crash_until(lake, worker, poison=6, enough=lambda claim: claim.doomed)
    await worker.publish(await worker.stage(claim, quarantine=[6], by_crash=True))
    await lake.drain()
    head = await lake.catalog.head()
    assert head.watermark[accepted[0].shard] == 8
    assert (head.now - began).total_seconds() <= 10 * lake.settings.lease_ttl_ms / 1000


@pytest.mark.parametrize("ttl_ms", [2_500, 15_000, 60_000])
def test_B8_the_bound_holds_for_a_full_range_by_arithmetic(ttl_ms: int) -> None:
    # No test can wait for the isolation of a full range at a real ttl, but the settings decide it:
    # one ttl, then halvings and lone failures under short leases, each with its back-off.
    settings = BusSettings(lease_ttl_ms=ttl_ms)
    halvings = math.ceil(math.log2(settings.claim_entries_max))
    attempts = halvings + settings.quarantine_attempts
    total_ms = ttl_ms + sum(
        settings.isolation_ttl_ms + settings.backoff_ms(n) for n in range(1, attempts + 1)
    )
    assert total_ms <= 10 * ttl_ms


async def test_B8_a_deterministic_verdict_quarantines_at_once(open_lake: OpenLake) -> None:
    lake = await open_lake(quarantine_rate_max=0)  # the breaker is about crashes, not verdicts
    table = await lake.create()
    await lake.accept_many(table, 3)
    worker = lake.worker()
    published = await worker.publish(await worker.stage(await worker.claim(), quarantine=[1]))
    assert set(published.outcomes.values()) == {CommitOutcome.PUBLISHED}
    assert len(await lake.rows_by_entry()) == 2


async def test_B8_a_rising_rate_stops_quarantining(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1, quarantine_rate_max=2, quarantine_window_s=0.8)
    table = await lake.create()
    await lake.accept_many(table, 4)
    worker = lake.worker()
    for _ in range(2):
        _, outcome = await _quarantine_next(lake, worker)
        assert outcome is CommitOutcome.PUBLISHED
    stopped, outcome = await _quarantine_next(lake, worker)
    assert outcome is CommitOutcome.QUARANTINE_STOPPED
    assert len(await lake.bus.quarantine_items()) == 2
    # The owner still holds the range and gives it back; good entries go on meanwhile.
    assert await lake.bus.renew([stopped.lease]) == [stopped.lease]
    await lake.bus.nack(stopped.lease, error="quarantine has stopped", delay_s=0.1)
    await worker.publish_one()
    again = await lake.claim_within(SOON_S, worker)
    assert again.lease.lo == stopped.lease.lo
    await lake.bus.release(again.lease)
    await lake.advance_s(0.8)
    _, outcome = await _quarantine_next(lake, worker)
    assert outcome is CommitOutcome.PUBLISHED
    assert (await lake.catalog.head()).watermark == dict(await lake.bus.ends())


async def test_B8_one_publication_cannot_outrun_the_breaker(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1, quarantine_rate_max=2)
    table = await lake.create()
    await lake.accept_many(table, 4)
    worker = lake.worker()
    commits = []
    for position in range(4):
        claim = await worker.claim()
        commits.append(await worker.stage(claim, quarantine=[position], by_crash=True))
    published = await worker.publish(*commits)
    outcomes = list(published.outcomes.values())
    assert outcomes.count(CommitOutcome.PUBLISHED) == 2
    assert outcomes.count(CommitOutcome.QUARANTINE_STOPPED) == 2
    assert len(await lake.bus.quarantine_items()) == 2


async def _crash_until(
    lake: LakeHarness, worker: Worker, *, poison: int, enough: Callable[[Claim], bool]
) -> Claim:
    """Publishes every range without the poison and crashes on those with it, until `enough`.

    Before it crashes on the poison alone, the worker shows that it can do other work.
    """

    while True:
        # Whatever is returned or expired in the meantime comes by here; nothing is ever stuck.
        claim = await lake.claim_within(lake.settings.lease_ttl_ms / 1000 + SOON_S, worker)
        if not claim.lease.lo <= poison < claim.lease.hi:
            await worker.publish(await worker.stage(claim))
        elif enough(claim):
            return claim
        elif _is_alone(claim):
            await lake.bus.note_canary(claim.lease)


def _is_alone(claim: Claim) -> bool:
    return claim.lease.hi - claim.lease.lo == 1


async def _publish_the_rest(
    lake: LakeHarness, worker: Worker, held: Claim, *, entries: int
) -> None:
    """Publishes what the halvings set free, while `held` is kept."""

    while len(await lake.rows_by_entry()) < entries:
        assert await lake.bus.renew([held.lease]) == [held.lease]
        claim = await lake.claim_within(SOON_S, worker)
        await worker.publish(await worker.stage(claim))


async def _quarantine_next(lake: LakeHarness, worker: Worker) -> tuple[Claim, CommitOutcome]:
    claim = await lake.claim_within(SOON_S, worker)
    commit = await worker.stage(claim, quarantine=[claim.lease.lo], by_crash=True)
    return claim, (await worker.publish(commit)).outcomes[commit.commit_id]


# --- B9: quarantine -------------------------------------------------------------------------------


async def test_B9_a_quarantined_entry_keeps_what_is_needed_to_replay_it(
    lake: LakeHarness, table: TableSchema
) -> None:
    accepted, item, published = await _quarantined(lake, table)
    assert (item.kind, item.shard, item.position) == ("entry", accepted.shard, accepted.position)
    assert (item.batch_id, item.principal_id) == (accepted.receipt.batch_id, 1)
    assert (item.reason, item.attempts, item.rows) == ("poison", 1, 2)
    assert (item.target, item.table_ids) == ("t", (table.table_id,))
    assert item.successor_batch_id is None
    (part,) = decode_single_entry(item.payload)
    assert part.batch.column(0).to_pylist() == [10, 11]
    assert item.created_at == published.published_at
    assert await lake.bus.quarantine_item(item.quarantine_id) == item
    await lake.restart()
    assert await lake.bus.quarantine_item(item.quarantine_id) == item


async def test_B9_quarantine_does_not_stop_the_watermark(
    lake: LakeHarness, table: TableSchema
) -> None:
    accepted, item, published = await _quarantined(lake, table)
    assert published.watermark[accepted.shard] == 3
    rows = await lake.rows_by_entry()
    assert set(rows) == {(accepted.shard, 0), (accepted.shard, 2)}
    status = await lake.bus.batch(accepted.receipt.batch_id)
    assert status is not None
    assert (status.state, status.reason) == (BatchState.QUARANTINED, "poison")
    place = (accepted.shard, accepted.position)
    assert await lake.bus.quarantined_of([(accepted.shard, 0), place]) == (
        item.batch_id,
        "poison",
    )
    assert await lake.bus.quarantined_of([(accepted.shard, 0)]) is None
    assert await lake.bus.quarantined_of([]) is None


async def test_B9_a_replay_is_one_new_entry_and_recorded_once(
    lake: LakeHarness, table: TableSchema
) -> None:
    accepted, item, _ = await _quarantined(lake, table)
    replay = entry_of(table, [10, 11], key=f"replay-{item.batch_id}", ordering_key="one")
    successor = await lake.accept(replay)
    repeated = await lake.bus.append(replay)
    assert repeated.record.receipt == successor.receipt  # type: ignore[union-attr]
    for _ in range(2):
        await lake.bus.mark_replayed(item.quarantine_id, successor.receipt.batch_id)
    await lake.bus.mark_replayed(item.quarantine_id, "b1-0-999")  # the first successor stays
    kept = await lake.bus.quarantine_item(item.quarantine_id)
    assert kept is not None
    assert kept.successor_batch_id == successor.receipt.batch_id
    status = await lake.bus.batch(item.batch_id)
    assert status is not None
    assert status.successor_batch_id == successor.receipt.batch_id
    assert await lake.bus.quarantined_of([(accepted.shard, accepted.position)]) is None
    await lake.drain()
    rows = await lake.rows_by_entry()
    assert rows[(successor.shard, successor.position)] == 2
    assert (accepted.shard, accepted.position) not in rows


async def test_B9_items_are_listed_newest_first_in_pages_and_can_be_dropped(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 3)
    worker = lake.worker()
    for position in range(3):
        await worker.publish(await worker.stage(await worker.claim(), quarantine=[position]))
    items = await lake.bus.quarantine_items()
    assert [item.position for item in items] == [2, 1, 0]
    page = await lake.bus.quarantine_items(limit=1, before=items[0].quarantine_id)
    assert list(page) == [items[1]]
    assert await lake.bus.drop_quarantined(items[1].quarantine_id)
    assert not await lake.bus.drop_quarantined(items[1].quarantine_id)
    assert not await lake.bus.drop_quarantined(999_999)
    assert await lake.bus.quarantine_item(items[1].quarantine_id) is None
    assert [i.position for i in await lake.bus.quarantine_items()] == [2, 0]
    assert await lake.bus.quarantine_item(999_999) is None


async def _quarantined(
    lake: LakeHarness, table: TableSchema
) -> tuple[Accepted, QuarantineItem, Published]:
    """Three entries published in one commit, the middle one set aside."""

    await lake.accept(entry_of(table, [1], ordering_key="one"))
    accepted = await lake.accept(entry_of(table, [10, 11], key="k", ordering_key="one"))
    await lake.accept(entry_of(table, [2], ordering_key="one"))
    worker = lake.worker()
    commit = await worker.stage(await worker.claim(), quarantine=[accepted.position])
    published = await worker.publish(commit)
    assert published.outcomes == {commit.commit_id: CommitOutcome.PUBLISHED}
    (item,) = await lake.bus.quarantine_items()
    return accepted, item, published
