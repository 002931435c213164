"""M09 and M17: a claim or a publication has committed, and nobody hears of it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from actors.publisher import SnapshotPublisher, Submitted
from actors.settings import RoleSettings
from lakebus.clock import SystemClock, new_uuid
from lakebus.errors import LeaseLost, OutcomeUnknown, Unavailable
from lakebus.telemetry import NO_METRICS, NO_TRACING
from storage.bus.interface import Claim
from storage.catalog.interface import Catalog, CommitOutcome
from storage.postgres.pool import PoolSettings
from tests.conformance.harness import CLAIMABLE_WITHIN_S, SUITE_SETTINGS
from tests.conformance.worker import Worker
from tests.faults.proxy import Act, Rule, Way
from tests.matrix.connection_rig import (  # noqa: F401 (fixtures)
    FaultyLake,
    faulty_lake,
    lake,
    template,
)

_CLAIM, _PUBLISH, _READ_BACK = "claim_range(", "FROM publish(", "WHERE publication_id ="
_RACES = int(os.environ.get("LAKEBUS_MATRIX_RACES", "12"))
_SHORT = PoolSettings(connect_ms=300, statement_ms=300)


@pytest.fixture
async def patient_lake(template: str) -> AsyncIterator[FaultyLake]:  # noqa: F811
    """Leases end when a test says so, not when the machine is slow."""

    settings = dataclasses.replace(SUITE_SETTINGS, lease_ttl_ms=60_000, retry_backoff_ms=0)
    async with faulty_lake(template, settings) as made:
        yield made


# --- M09: the claim's reply -----------------------------------------------------------------------


async def test_M09_a_claim_nobody_heard_of_is_reclaimed_after_its_ttl_and_hides_nothing(
    patient_lake: FaultyLake,
) -> None:
    lake = patient_lake  # noqa: F811
    table = await lake.create()
    await lake.accept_many(table, 6)
    wired = await lake.wired()
    lost = wired.proxy.arm(Rule(act=Act.CUT, sql=_CLAIM))
    with pytest.raises(Unavailable):
        await wired.lake.bus.claim(new_uuid())
    assert (await lost.struck()).committed
    watching = await lake.connect()
    expires_at = await watching.fetchval(
        "UPDATE bus_lease SET expires_at = clock_timestamp() + interval '400 ms'"
        " RETURNING expires_at"
    )
    # Many ask all the time; whoever gets it first gets it in [ttl, ttl + 2 s].
    worker = lake.worker()
    claims = [await lake.claim_within(0.4 + CLAIMABLE_WITHIN_S, worker)]
    (row,) = await watching.fetch("SELECT * FROM bus_lease WHERE state = 'leased'")
    late_s = (row["claimed_at"] - expires_at).total_seconds()
    assert 0 <= late_s <= CLAIMABLE_WITHIN_S
    assert (row["attempt"], row["last_error"]) == (1, "the lease expired")
    claims.append(await lake.claim_within(CLAIMABLE_WITHIN_S, worker))
    assert sorted((c.lease.lo, c.lease.hi) for c in claims) == [(0, 3), (3, 6)]
    await worker.publish(*[await worker.stage(claim) for claim in claims])
    await lake.audited()
    assert len(await lake.rows_by_entry()) == 6


async def test_M09_a_silent_claim_is_unavailable_and_nothing_else(
    lake: FaultyLake,  # noqa: F811
) -> None:
    await lake.accept_many(await lake.create(), 2)
    wired = await lake.wired(pools=_SHORT)
    wired.proxy.arm(Rule(act=Act.DROP, sql=_CLAIM, way=Way.TO_CLIENT))
    with pytest.raises(Unavailable):
        await wired.lake.bus.claim(new_uuid())
    claim = await lake.claim_within(CLAIMABLE_WITHIN_S, lake.worker(wired.view))
    await lake.bus.release(claim.lease)
    await lake.audited()


async def test_M09_a_lost_claim_does_not_hide_what_is_accepted_later(
    patient_lake: FaultyLake,
) -> None:
    lake = patient_lake  # noqa: F811
    table = await lake.create()
    await lake.accept_many(table, 2)
    wired = await lake.wired()
    wired.proxy.arm(Rule(act=Act.CUT, sql=_CLAIM))
    with pytest.raises(Unavailable):
        await wired.lake.bus.claim(new_uuid())
    await lake.accept_many(table, 3)
    claim = await wired.lake.bus.claim(new_uuid())
    assert claim is not None
    assert (claim.lease.lo, claim.lease.hi) == (2, 5)
    await lake.bus.release(claim.lease)
    await _expire(lake)
    await lake.audited()


# --- M17: the publication's reply -----------------------------------------------------------------


def publisher_over(catalog: Catalog, stopped: list[BaseException]) -> SnapshotPublisher:
    return SnapshotPublisher(
        catalog=catalog,
        settings=RoleSettings(linger_ms=0, backoff_ms=1, backoff_ms_max=4, publish_attempts=4),
        clock=SystemClock(),
        metrics=NO_METRICS,
        tracing=NO_TRACING,
        on_fatal=lambda _role, error: stopped.append(error),
    )


async def submit(lake: FaultyLake, catalog: Catalog, claim: Claim) -> Submitted:  # noqa: F811
    """Through the product's own publisher, which reads back before it does anything again."""

    stopped: list[BaseException] = []
    publisher = publisher_over(catalog, stopped)
    commit = await lake.worker().stage(claim)
    submitting = asyncio.create_task(publisher.submit(commit))
    await asyncio.sleep(0)
    await publisher.run_once()
    assert stopped == []
    return await submitting


_LOSSES: dict[str, tuple[dict[str, Any], ...]] = {
    "the reply": ({"act": Act.CUT, "sql": _PUBLISH},),
    "the reply, and the read-back's": (
        {"act": Act.CUT, "sql": _PUBLISH},
        {"act": Act.CUT, "sql": _READ_BACK, "times": 2},
    ),
    "the request, then the reply": (
        {"act": Act.RESET, "sql": _PUBLISH},
        {"act": Act.CUT, "sql": _PUBLISH, "skip": 1},
    ),
    "the request twice": ({"act": Act.RESET, "sql": _PUBLISH, "times": 2},),
    "the read-back's request": (
        {"act": Act.CUT, "sql": _PUBLISH},
        {"act": Act.RESET, "sql": "FROM lake FOR UPDATE", "times": 2},
    ),
}


@pytest.mark.parametrize("loss", _LOSSES)
async def test_M17_whatever_is_lost_there_is_one_publication(
    lake: FaultyLake,  # noqa: F811
    loss: str,
) -> None:
    await lake.accept_many(await lake.create(), 3)
    claim = await lake.worker().claim()
    wired = await lake.wired()
    armed = [wired.proxy.arm(Rule(**rule)) for rule in _LOSSES[loss]]
    before = (await lake.catalog.head()).snapshot_id
    submitted = await submit(lake, wired.lake.catalog, claim)
    assert all(len(one.fired) == one.rule.times for one in armed)
    assert submitted.outcome is CommitOutcome.PUBLISHED
    assert submitted.snapshot_id == before + 1 == (await lake.catalog.head()).snapshot_id
    await lake.audited()
    assert len(await lake.rows_by_entry()) == 3


async def test_M17_the_same_publication_sent_again_answers_as_the_first_would_have(
    lake: FaultyLake,  # noqa: F811
) -> None:
    await lake.accept_many(await lake.create(), 2)
    wired = await lake.wired()
    wired.proxy.arm(Rule(act=Act.CUT, sql=_PUBLISH, times=2))
    commit = await lake.worker().stage(await lake.worker().claim())
    publication_id = new_uuid()
    for _ in range(2):
        with pytest.raises(OutcomeUnknown):
            await wired.lake.catalog.publish(publication_id, [commit])
    found = await wired.lake.catalog.publish_outcome(publication_id)
    assert found == await wired.lake.catalog.publish(publication_id, [commit])
    assert found.outcomes == {commit.commit_id: CommitOutcome.PUBLISHED}
    await lake.audited()


async def test_M17_a_silent_publish_is_unknown_and_nothing_else(
    lake: FaultyLake,  # noqa: F811
) -> None:
    await lake.accept_many(await lake.create(), 2)
    wired = await lake.wired(pools=_SHORT)
    wired.proxy.arm(Rule(act=Act.DROP, sql=_PUBLISH, way=Way.TO_CLIENT))
    commit = await lake.worker().stage(await lake.worker().claim())
    publication_id = new_uuid()
    with pytest.raises(OutcomeUnknown):
        await wired.lake.catalog.publish(publication_id, [commit])
    found = await wired.lake.catalog.publish_outcome(publication_id)
    assert found is not None
    await lake.audited()


async def test_M17_retry_and_reclaim_at_once_publish_once(
    lake: FaultyLake,  # noqa: F811
) -> None:
    table = await lake.create()
    wired = await lake.wired(seed=17)
    # Some replies are lost, some requests are; the lease has expired each time, so the reclaimer
    # may have the range the moment before.
    wired.proxy.arm(Rule(name="cut", act=Act.CUT, sql=_PUBLISH, probability=0.7, times=None))
    wired.proxy.arm(Rule(name="reset", act=Act.RESET, sql=_PUBLISH, probability=0.3, times=None))
    other = await lake.opened()
    dice = random.Random(17)
    ends: list[CommitOutcome] = []
    for _ in range(_RACES):
        await lake.accept_many(table, 4)
        worker = lake.worker()
        claim = await worker.claim()
        await _expire(lake)
        reclaimer = Worker(bus=other.bus, catalog=other.catalog, files=lake.files)
        racing = asyncio.create_task(_publish_all(reclaimer, after_s=dice.random() * 0.01))
        try:
            ends.append((await submit(lake, wired.lake.catalog, claim)).outcome)
        except (Unavailable, LeaseLost):
            # Each of its attempts was lost before the server saw it, or the reclaimer was there
            # before it had read its range.
            ends.append(CommitOutcome.LEASE_LOST)
        await racing
        await lake.drain()
    assert set(ends) <= {CommitOutcome.PUBLISHED, CommitOutcome.LEASE_LOST}
    await lake.audited()
    assert len(await lake.rows_by_entry()) == 4 * _RACES


async def _publish_all(worker: Worker, *, after_s: float) -> None:
    await asyncio.sleep(after_s)
    while (claim := await worker.bus.claim(worker.owner)) is not None:
        await worker.publish(await worker.stage(claim))


async def _expire(lake: FaultyLake) -> None:  # noqa: F811
    """Lets all leases be over now, without waiting for it."""

    observer = await lake.connect()
    await observer.execute("UPDATE bus_lease SET expires_at = clock_timestamp()")
