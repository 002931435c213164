"""B4 to B6 and B11: leases and time, and owners that were paused."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Sequence
from typing import Any

import pytest

from lakebus.clock import SystemClock, new_uuid
from lakebus.errors import LeaseLost
from lakebus.schemas import TableSchema
from storage.bus.interface import BatchState, LeaseRef
from storage.catalog.interface import CommitOutcome
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import CLAIMABLE_WITHIN_S, Capability, LakeHarness, entry_of

# --- B4, B5, B6: time -----------------------------------------------------------------------------


async def test_B4_renewal_extends_the_lease(open_lake: OpenLake) -> None:
    lake = await open_lake(lease_ttl_ms=600)
    table = await lake.create()
    await lake.accept_many(table, 2)
    worker, rival = lake.worker(), lake.worker()
    claim = await worker.claim()
    assert 0 < claim.ttl_s <= 0.6
    for _ in range(3):
        await lake.advance_s(0.35)
        assert await lake.bus.renew([claim.lease]) == [claim.lease]
        assert await lake.bus.claim(rival.owner) is None
    assert (await worker.publish(await worker.stage(claim))).snapshot_id is not None


async def test_B4_renewal_after_a_reclaim_changes_nothing(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1, lease_ttl_ms=1_200)
    table = await lake.create()
    await lake.accept_many(table, 1)
    old, new = lake.worker(), lake.worker()
    lost = await old.claim()
    await lake.wait_expired()
    taken = await new.claim()
    assert taken.lease.epoch > lost.lease.epoch
    assert await lake.bus.renew([lost.lease, taken.lease]) == [taken.lease]
    assert await lake.bus.renew([lost.lease]) == []
    # Did the loser's renewals reach the row, the winner's short lease would never run out.
    latest = (await lake.catalog.head()).now + dt.timedelta(
        seconds=taken.ttl_s + CLAIMABLE_WITHIN_S
    )
    while (third := await lake.bus.claim(old.owner)) is None:
        assert (await lake.catalog.head()).now < latest
        assert await lake.bus.renew([lost.lease]) == []
        await lake.advance_s(0.05)
    assert third.lease.epoch > taken.lease.epoch


async def test_B4_an_expired_lease_that_nobody_took_can_be_renewed(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 2)
    claim = await lake.worker().claim()
    await lake.wait_expired()
    assert await lake.bus.renew([claim.lease]) == [claim.lease]
    assert await lake.bus.claim(lake.worker().owner) is None


async def test_B5_a_lease_is_claimable_after_its_ttl_and_not_before(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 1)
    began = (await lake.catalog.head()).now
    await lake.worker().claim()
    rival = lake.worker()
    claim = await lake.claim_within(lake.settings.lease_ttl_ms / 1000 + CLAIMABLE_WITHIN_S, rival)
    ended = (await lake.catalog.head()).now
    assert (ended - began).total_seconds() >= lake.settings.lease_ttl_ms / 1000
    assert claim.attempt == 1


@pytest.mark.parametrize("skew_s", [-3_600, 3_600])
async def test_B5_the_clocks_of_clients_decide_nothing(
    lake: LakeHarness, table: TableSchema, monkeypatch: pytest.MonkeyPatch, skew_s: int
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + skew_s)
    monkeypatch.setattr(
        SystemClock, "utc_now", lambda _: dt.datetime.fromtimestamp(real() + skew_s, dt.UTC)
    )
    await lake.accept_many(table, 1)
    began = (await lake.catalog.head()).now
    claim = await lake.worker().claim()
    assert 0 < claim.ttl_s <= lake.settings.lease_ttl_ms / 1000
    assert await lake.bus.renew([claim.lease]) == [claim.lease]
    assert await lake.bus.claim(lake.worker().owner) is None
    await lake.claim_within(lake.settings.lease_ttl_ms / 1000 + CLAIMABLE_WITHIN_S, lake.worker())
    ended = (await lake.catalog.head()).now
    assert (ended - began).total_seconds() >= lake.settings.lease_ttl_ms / 1000


async def test_B6_expired_and_not_reclaimed_still_publishes(
    lake: LakeHarness, table: TableSchema
) -> None:
    (accepted,) = await lake.accept_many(table, 1)
    worker = lake.worker()
    commit = await worker.stage(await worker.claim())
    await lake.wait_expired()
    published = await worker.publish(commit)
    assert published.outcomes == {commit.commit_id: CommitOutcome.PUBLISHED}
    assert await lake.rows_by_entry() == {(accepted.shard, accepted.position): 1}


async def test_B6_the_paused_owner_of_a_reclaimed_range_changes_nothing(
    lake: LakeHarness, table: TableSchema
) -> None:
    (accepted,) = await lake.accept_many(table, 1)
    paused, winner = lake.worker(), lake.worker()
    late = await paused.stage(await paused.claim())
    await lake.wait_expired()
    commit = await winner.stage(await winner.claim())
    before = await lake.catalog.head()

    lost = await paused.publish(late)
    assert lost.outcomes == {late.commit_id: CommitOutcome.LEASE_LOST}
    assert lost.snapshot_id is None
    assert (await lake.catalog.head()).snapshot_id == before.snapshot_id
    status = await lake.bus.batch(accepted.receipt.batch_id)
    assert status is not None
    assert status.state is BatchState.ACCEPTED
    await _assert_powerless(lake, late.lease)

    assert (await winner.publish(commit)).outcomes == {commit.commit_id: CommitOutcome.PUBLISHED}
    again = await paused.publish(late)
    assert again.outcomes == {late.commit_id: CommitOutcome.LEASE_LOST}
    await _assert_powerless(lake, late.lease)
    assert await lake.rows_by_entry() == {(accepted.shard, accepted.position): 1}


async def test_B6_a_range_that_was_reclaimed_cannot_be_read(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 4)
    old = await lake.worker().claim()
    await lake.wait_expired()
    await lake.worker().claim()
    with pytest.raises(LeaseLost):
        await lake.bus.read(old)


async def _assert_powerless(lake: LakeHarness, lease: LeaseRef) -> None:
    assert await lake.bus.renew([lease]) == []
    with pytest.raises(LeaseLost):
        await lake.bus.release(lease)
    with pytest.raises(LeaseLost):
        await lake.bus.nack(lease, error="late", delay_s=0)
    with pytest.raises(LeaseLost):
        await lake.bus.note_canary(lease)


# --- B11: pauses ----------------------------------------------------------------------------------

HELD_S = 3.0
"""What a paused client may hold, at most this long (B11)."""


@pytest.mark.parametrize("withhold_bytes", [1, 5, 40])
@pytest.mark.parametrize("chunks", [0, 1])
async def test_B11_a_paused_client_stops_neither_shard_nor_publisher(
    open_lake: OpenLake, chunks: int, withhold_bytes: int
) -> None:
    lake = await open_lake(lease_ttl_ms=20_000, claim_entries_max=1)
    lake.needs(Capability.ENDS_PAUSED_CLIENT)
    table = await lake.create()
    await lake.accept_many(table, 4)
    victim = lake.worker()
    commit = await victim.stage(await victim.claim())
    pause = lake.paused_client(chunks=chunks, withhold_bytes=withhold_bytes)
    async with pause as stuck:
        requests = [
            asyncio.ensure_future(stuck.bus.append(entry_of(table, [9], ordering_key="one"))),
            asyncio.ensure_future(stuck.bus.claim(victim.owner)),
            asyncio.ensure_future(stuck.catalog.publish(new_uuid(), [commit])),
            asyncio.ensure_future(stuck.catalog.publish_outcome(new_uuid())),
        ]
        await asyncio.sleep(0.2)  # no signal tells when a request that never ends has arrived
        try:
            # What was held for at most 3 s, and what the work itself takes on a busy machine.
            await asyncio.wait_for(_whole_cycle(lake, table), HELD_S + 1.5)
        finally:
            await _cancel_all(requests)


async def _whole_cycle(lake: LakeHarness, table: TableSchema) -> None:
    """Everything that takes a lock somewhere: append, claim, publish, a schema change."""

    await lake.accept(entry_of(table, [1], ordering_key="one"))
    # A claim passes over a shard that another claim holds (SKIP LOCKED), as a coordinator's does,
    # which then asks again: the paused one was sent last, so it may be the last to be ended.
    worker = lake.worker()
    await worker.publish(await worker.stage(await lake.claim_within(HELD_S, worker)))
    await lake.create("made_meanwhile")


async def _cancel_all(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
