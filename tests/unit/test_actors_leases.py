"""The lease manager and the lease keeper."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from actors.lease_keeper import LeaseKeeper
from actors.lease_manager import LeaseManager
from lakebus.errors import LeaseLost, Unavailable
from storage.bus.interface import Claim, LeaseRef
from storage.memory_clock import ManualClock
from tests.unit.actors_rig import Overlay, Rig, random_owner, with_settings


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def rig(clock: ManualClock) -> Rig:
    rig = Rig(shards=1, claim_entries_max=1, lease_ttl_ms=3_000, clock=clock)
    events = await rig.create()
    for i in range(3):
        await rig.append((events, [i]), ordering="a")
    return rig


async def claimed(rig: Rig, leases: LeaseManager) -> Claim:
    claim = await leases.acquire(random_owner())
    assert claim is not None
    return claim


def keeper_of(rig: Rig, leases: object) -> LeaseKeeper:
    return LeaseKeeper(leases=leases, settings=rig.settings, clock=rig.clock)  # type: ignore[arg-type]


async def test_B4_renewals_are_asked_at_a_third_of_the_lease_time(
    rig: Rig, clock: ManualClock
) -> None:
    manager = rig.lease_manager()
    rig.settings = with_settings(rig.settings, hold_ttls_max=100)
    keeper = keeper_of(rig, manager)
    claim = await claimed(rig, manager)
    keeper.hold(claim, asked_at_s=clock.monotonic_s())
    assert keeper.next_due_s() == pytest.approx(1.0)
    assert (await keeper.run_once()).renewed == 0
    for _ in range(5):  # five seconds, with a lease of three
        clock.advance_s(1.0)
        report = await keeper.run_once()
        assert (report.renewed, report.lost) == (1, 0)
        assert keeper.trusted(claim.lease)
    assert await rig.bus.renew([claim.lease]) == [claim.lease]


async def test_B4_a_reclaimed_lease_is_dropped_at_renewal(rig: Rig, clock: ManualClock) -> None:
    manager = rig.lease_manager()
    keeper = keeper_of(rig, manager)
    claim = await claimed(rig, manager)
    keeper.hold(claim, asked_at_s=clock.monotonic_s())
    clock.advance_s(3.1)
    again = await rig.bus.claim(random_owner())
    assert again is not None
    assert again.lease.epoch > claim.lease.epoch
    report = await keeper.run_once()
    assert (report.renewed, report.lost) == (0, 1)
    assert not keeper.holds(claim.lease)
    assert manager.held == ()
    assert rig.metrics.value("lakebus_leases_lost_total") == 1


async def test_B5_a_lease_is_believed_in_for_less_than_its_time(
    rig: Rig, clock: ManualClock
) -> None:
    manager = rig.lease_manager()
    keeper = keeper_of(rig, manager)
    asked_at_s = clock.monotonic_s()
    claim = await claimed(rig, manager)
    clock.advance_s(0.5)  # the answer was slow: counted from before the call
    keeper.hold(claim, asked_at_s=asked_at_s)
    clock.advance_s(2.1)
    assert keeper.trusted(claim.lease)
    clock.advance_s(0.2)
    assert not keeper.trusted(claim.lease)
    assert await keeper.confirm(claim.lease)  # not reclaimed: still ours
    assert keeper.trusted(claim.lease)


async def test_B5_a_slow_renewal_is_believed_in_from_when_it_was_asked(
    rig: Rig, clock: ManualClock
) -> None:
    manager = rig.lease_manager()

    async def renew(leases: Sequence[LeaseRef]) -> Sequence[LeaseRef]:
        kept = await manager.renew(leases)
        clock.advance_s(1.0)  # the answer is slow, or its reader was paused
        return kept

    keeper = keeper_of(rig, Overlay(manager, renew=renew))
    claim = await claimed(rig, manager)
    keeper.hold(claim, asked_at_s=clock.monotonic_s())
    assert await keeper.confirm(claim.lease)
    clock.advance_s(1.6)  # 2.6 s after it was asked for, with a lease of three
    assert keeper.trusted(claim.lease)
    clock.advance_s(0.2)
    assert not keeper.trusted(claim.lease)


async def test_B8_a_lease_held_too_long_is_left_to_expire(rig: Rig, clock: ManualClock) -> None:
    manager = rig.lease_manager()
    keeper = keeper_of(rig, manager)
    claim = await claimed(rig, manager)
    keeper.hold(claim, asked_at_s=clock.monotonic_s())
    given_up = 0
    for _ in range(10):
        clock.advance_s(1.0)
        given_up += (await keeper.run_once()).given_up
    assert given_up == 1
    again = await rig.bus.claim(random_owner())
    assert again is not None
    assert again.lease.lo == claim.lease.lo
    assert again.attempt == 1


async def test_a_renewal_that_fails_is_tried_again_soon(rig: Rig, clock: ManualClock) -> None:
    manager = rig.lease_manager()
    failing = True

    async def renew(leases: Sequence[LeaseRef]) -> Sequence[LeaseRef]:
        if failing:
            raise Unavailable("away")
        return await manager.renew(leases)

    keeper = keeper_of(rig, Overlay(manager, renew=renew))
    claim = await claimed(rig, manager)
    keeper.hold(claim, asked_at_s=clock.monotonic_s())
    clock.advance_s(1.0)
    with pytest.raises(Unavailable):
        await keeper.run_once()
    assert keeper.next_due_s() == pytest.approx(0.25)
    failing = False
    clock.advance_s(0.25)
    assert (await keeper.run_once()).renewed == 1


async def test_renewals_of_many_coordinators_travel_together(rig: Rig) -> None:
    claims = [await claimed(rig, rig.lease_manager()) for _ in range(3)]
    bus, calls = rig.bus, []

    async def renew(leases: Sequence[LeaseRef]) -> Sequence[LeaseRef]:
        calls.append(len(leases))
        return await bus.renew(leases)

    rig.bus = Overlay(bus, renew=renew)  # type: ignore[assignment]
    manager = rig.lease_manager()
    tasks = [asyncio.create_task(manager.renew([claim.lease])) for claim in claims]
    await asyncio.sleep(0)
    tasks[0].cancel()  # must not take the others along
    renewed = await asyncio.gather(*tasks[1:])
    assert renewed == [[claims[1].lease], [claims[2].lease]]
    assert calls == [3]


async def test_B7_stop_gives_everything_back_at_once(rig: Rig, clock: ManualClock) -> None:
    manager = rig.lease_manager()
    kept, lost = await claimed(rig, manager), await claimed(rig, manager)
    clock.advance_s(3.1)
    assert await rig.bus.renew([kept.lease]) == [kept.lease]
    again = await rig.bus.claim(random_owner())
    assert again is not None
    assert again.lease.lo == lost.lease.lo
    report = await manager.stop()
    assert (report.released, report.lost, report.unreachable) == (1, 1, 0)
    assert await manager.acquire(random_owner()) is None
    back = await rig.bus.claim(random_owner())
    assert back is not None
    assert (back.lease.lo, back.attempt) == (kept.lease.lo, 0)


async def test_stop_with_the_bus_away_leaves_leases_to_expire(rig: Rig) -> None:
    manager = rig.lease_manager()
    await claimed(rig, manager)
    rig.lake.faults.unreachable = True
    assert (await manager.stop()).unreachable == 1


async def test_B7_release_and_nack_end_the_lease(rig: Rig, clock: ManualClock) -> None:
    manager = rig.lease_manager()
    one, two = await claimed(rig, manager), await claimed(rig, manager)
    await manager.release(one.lease)
    await manager.nack(two.lease, error="no", delay_s=1.0)
    assert manager.held == ()
    with pytest.raises(LeaseLost):
        await manager.release(one.lease)
    with pytest.raises(LeaseLost):
        await manager.note_canary(two.lease)
    clock.advance_s(1.0)
    first, second = await claimed(rig, manager), await claimed(rig, manager)
    assert {first.attempt, second.attempt} == {0, 1}
