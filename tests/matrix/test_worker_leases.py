"""The failure matrix, leases: a worker that dies, sleeps, is busy, or has a wrong clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest

from actors.coordinator import RangeEnd
from lakebus.clock import Clock, SystemClock
from lakebus.errors import LeaseLost
from storage.catalog.interface import CommitOutcome
from storage.files.objects import LocalObjectStore
from tests.faults.clocks import HOUR_S, SuspendedClock, jumping, skewed
from tests.faults.store import FaultyStore, Operation, Script, StoreFault
from tests.matrix.worker_rig import CLAIMABLE_WITHIN_S, WorkerRig, rig
from tests.matrix.worker_roles import Busy, FailpointFate

__all__ = ["rig"]


async def test_M08_a_crash_right_after_the_claim_gives_the_range_away_after_its_ttl(
    rig: WorkerRig,
) -> None:
    await rig.configure()
    await rig.append([1], [2], [3])
    dying = await rig.process(failpoint=FailpointFate("coordinator.after_claim", "kill"))
    await dying.ask("start")
    await dying.dies()
    (left,) = await rig.leases()
    assert (left["state"], left["attempt"]) == ("leased", 0)

    successor = await rig.worker()
    claim, at_s = await rig.claim_within(successor, rig.ttl_s + CLAIMABLE_WITHIN_S)
    assert rig.ttl_s <= at_s - left["claimed_s"] <= rig.ttl_s + CLAIMABLE_WITHIN_S
    assert claim.attempt == 1
    assert claim.lease.epoch > left["epoch"]
    assert claim.lone_failures == 0
    submitted = await rig.publish(successor, await rig.stage(successor, claim))
    assert submitted.outcome is CommitOutcome.PUBLISHED
    await successor.start()  # it came back in halves: the other one
    await rig.drain()
    assert (await rig.audit()).orphans == frozenset()


async def test_M10_a_worker_stopped_for_three_ttls_can_do_nothing_afterwards(
    rig: WorkerRig,
) -> None:
    """By hand, without the keeper that would doubt: the fence itself refuses each late call."""
    await rig.configure()
    await rig.append([1, 2], [3])
    zombie = await rig.process()
    _, staged = await zombie.ask("stage")
    await zombie.pause()
    (held,) = await rig.leases()
    await rig.started()
    await rig.drain()
    await rig.pass_s(held["claimed_s"] + 3 * rig.ttl_s - await rig.now_s())
    zombie.resume()

    assert await zombie.ask("renew") == 0
    assert await zombie.ask("submit") == CommitOutcome.LEASE_LOST
    for late in ("release", "nack", "note_canary"):
        with pytest.raises(LeaseLost):
            await zombie.ask(late)
    found = await rig.audit()
    assert found.orphans == {file.object_key for file in staged.files}


@pytest.mark.parametrize("where", ["coordinator.after_stage", "coordinator.before_submit"])
async def test_M10_a_coordinator_stopped_before_it_publishes_finds_its_lease_lost(
    rig: WorkerRig, where: str
) -> None:
    """After `before_submit` nothing doubts the lease any more but the publish itself."""
    await rig.configure()
    await rig.append([1, 2], [3])
    zombie = await rig.process(failpoint=FailpointFate(where, "stop"))
    await zombie.ask("start")
    await zombie.stops()
    (held,) = await rig.leases()
    await rig.started()
    await rig.drain()
    await rig.pass_s(held["claimed_s"] + 3 * rig.ttl_s - await rig.now_s())
    before = await rig.audit()
    zombie.resume()
    await zombie.until_ended(RangeEnd.LEASE_LOST)

    assert await zombie.ask("ended", RangeEnd.PUBLISHED) == 0
    after = await rig.audit()
    assert (after.files, after.snapshots) == (before.files, before.snapshots)
    assert len(after.orphans) == 1


@pytest.mark.parametrize("how", ["released", "python"])
async def test_M11_renewals_go_on_while_an_encoder_is_busy_for_two_ttls(
    rig: WorkerRig, how: Literal["released", "python"]
) -> None:
    # Long enough that a busy machine gives a thread that must share the interpreter its turn.
    await rig.configure(lease_ttl_ms=2_000)
    await rig.append([1], [2])
    busy = await rig.process(busy=Busy(2 * rig.ttl_s, how))
    await busy.ask("start")
    await rig.pass_s(rig.ttl_s / 2)
    (first,) = await rig.leases()
    rival = await rig.started()
    await rig.drain()

    assert await busy.ask("ended", RangeEnd.PUBLISHED) == 1
    assert rival.metrics.value("lakebus_ranges_claimed_total", attempt="1") == 0
    (row,) = await rig.look(
        "SELECT *, extract(epoch FROM published_at)::float8 AS at_s FROM published_range"
    )
    assert row["at_s"] - first["claimed_s"] >= 2 * rig.ttl_s
    assert (await rig.audit()).orphans == frozenset()


async def test_M11_where_renewals_cannot_run_the_fence_holds(rig: WorkerRig) -> None:
    """Code that never gives the interpreter up: nothing of the process runs for two ttls."""
    await rig.configure()
    await rig.append([1], [2])
    busy = await rig.process(busy=Busy(3 * rig.ttl_s, "held"))
    await busy.ask("start")
    await rig.started()
    await rig.drain()
    await busy.until_ended(RangeEnd.LEASE_LOST)
    assert await busy.ask("ended", RangeEnd.PUBLISHED) == 0
    found = await rig.audit()
    assert len(found.orphans) == 1
    assert len(found.files) == 2


#: What happens, whatever the clocks of the clients say.
STORY = [
    "a claims 0..1, attempt 0",
    "a still holds 0..1 after two ttls",
    "a published 1, b 0",
    "a claims 1..2, attempt 0",
    "b claims 1..2, attempt 1, between one ttl and 2 s later",
    "a: lease_lost",
    "b: published",
]


@pytest.mark.parametrize(
    ("clock_a", "clock_b"),
    [
        pytest.param(SystemClock, SystemClock, id="right"),
        pytest.param(lambda: skewed(HOUR_S), lambda: skewed(-HOUR_S), id="ahead-behind"),
        pytest.param(lambda: skewed(-HOUR_S), lambda: skewed(HOUR_S), id="behind-ahead"),
        pytest.param(jumping, jumping, id="jumping"),
    ],
)
async def test_M12_a_wrong_client_clock_changes_nothing(
    rig: WorkerRig, clock_a: Callable[[], Clock], clock_b: Callable[[], Clock]
) -> None:
    await rig.configure()
    assert await story_of_a_renewed_lease(rig, clock_a, clock_b) == STORY[:3]
    assert await story_of_an_expired_lease(rig, clock_a, clock_b) == STORY[3:]
    assert len((await rig.audit()).orphans) == 1


async def story_of_a_renewed_lease(
    rig: WorkerRig, clock_a: Callable[[], Clock], clock_b: Callable[[], Clock]
) -> list[str]:
    """Who holds what and when, by the database, while `a` waits for its store and `b` wants it."""
    store = held_at_put(rig)
    a, b = await rig.started(clock=clock_a(), store=store), await rig.worker(clock=clock_b())
    await rig.append([1])
    await store.reached()
    (held,) = await rig.leases()
    assert held["owner"] == a.owner
    told = [f"a claims {held['lo']}..{held['hi']}, attempt {held['attempt']}"]
    await b.start()
    await rig.pass_s(2 * rig.ttl_s)
    (still,) = await rig.leases()
    assert (still["owner"], still["epoch"]) == (held["owner"], held["epoch"])
    assert 0 < still["expires_s"] - await rig.now_s() <= rig.ttl_s
    told.append(f"a still holds {still['lo']}..{still['hi']} after two ttls")
    store.let_go()
    await rig.drain()
    for worker in (a, b):
        await worker.coordinator.stop()
    return [*told, f"a published {a.ended(RangeEnd.PUBLISHED):.0f}, b {b.ended('published'):.0f}"]


async def story_of_an_expired_lease(
    rig: WorkerRig, clock_a: Callable[[], Clock], clock_b: Callable[[], Clock]
) -> list[str]:
    """The same when `a` does not renew."""
    a, b = await rig.worker(clock=clock_a()), await rig.worker(clock=clock_b())
    await rig.append([2])
    claim, at_s = await rig.claim_within(a, 1.0)
    told = [f"a claims {claim.lease.lo}..{claim.lease.hi}, attempt {claim.attempt}"]
    commit = await rig.stage(a, claim)
    later, later_s = await rig.claim_within(b, rig.ttl_s + CLAIMABLE_WITHIN_S)
    in_time = rig.ttl_s <= later_s - at_s <= rig.ttl_s + CLAIMABLE_WITHIN_S
    when = "between one ttl and 2 s later" if in_time else f"{later_s - at_s} s later"
    told.append(f"b claims {later.lease.lo}..{later.lease.hi}, attempt {later.attempt}, {when}")
    told.append(f"a: {(await rig.publish(a, commit)).outcome}")
    return [*told, f"b: {(await rig.publish(b, await rig.stage(b, later))).outcome}"]


def held_at_put(rig: WorkerRig) -> FaultyStore:
    """The rig's folder behind a store that stands still at its first file."""
    script = Script().on(Operation.PUT, StoreFault.HELD_BEFORE, prefix="tables/")
    return FaultyStore(LocalObjectStore(rig.root), script)


async def test_M12_a_suspended_machine_believes_longer_than_it_may_and_the_fence_holds(
    rig: WorkerRig,
) -> None:
    await rig.configure()
    await rig.append([1], [2])
    clock = SuspendedClock()
    store = held_at_put(rig)
    sleeper = await rig.started(clock=clock, store=store)
    await store.reached()
    clock.suspend_s(HOUR_S)  # its next renewal is an hour away, and it trusts its lease until then
    await rig.started()
    await rig.drain()
    store.let_go()
    await sleeper.until_ended(RangeEnd.LEASE_LOST)
    assert len((await rig.audit()).orphans) == 1
