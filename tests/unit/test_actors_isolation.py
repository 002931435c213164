"""B8: a range that has failed before goes alone in its worker, so its failures are its own."""

from __future__ import annotations

import asyncio

import pytest

from actors import staging
from actors.coordinator import RangeEnd
from lakebus.clock import SystemClock
from storage.bus.interface import Claim
from storage.memory_clock import ManualClock
from tests.unit.actors_rig import Overlay, Rig, random_owner, with_settings


class Gate:
    """A store whose puts of files wait, and that tells how many do."""

    def __init__(self, rig: Rig) -> None:
        self.store = Overlay(rig.store, put_new=self._put_new)
        self.most = 0
        self._under = rig.store
        self._open = asyncio.Event()
        self._waiting: list[str] = []
        self._arrived = asyncio.Condition()

    async def arrived(self, count: int) -> None:
        async with asyncio.timeout(10), self._arrived:
            await self._arrived.wait_for(lambda: len(self._waiting) >= count)

    def let_go(self) -> None:
        self._open.set()

    async def _put_new(self, key: str, data: bytes) -> None:
        if key.startswith("tables/"):
            async with self._arrived:
                self._waiting.append(key)
                self.most = max(self.most, len(self._waiting))
                self._arrived.notify_all()
            await self._open.wait()
            self._waiting.remove(key)
        await self._under.put_new(key, data)


async def failed_range(rig: Rig, *, canary: bool = False) -> Claim:
    """A range of one entry that has failed once more and is claimable again."""
    claim = await rig.bus.claim(random_owner())
    assert claim is not None
    if canary:
        await rig.bus.note_canary(claim.lease)
    await rig.bus.nack(claim.lease, error="it failed", delay_s=0.0)
    return claim


async def test_B8_a_range_that_failed_is_not_worked_on_beside_others() -> None:
    """It is claimed while another is under way, given back uncounted, and taken up alone."""
    rig = Rig(shards=1, clock=SystemClock(), claim_entries_max=1)
    events = await rig.create()
    gate = Gate(rig)
    publisher = rig.publisher()
    coordinator = rig.coordinator(publisher=publisher, store=gate.store)
    await rig.append((events, [1]), ordering="a")
    publisher.start()
    await coordinator.start()
    await gate.arrived(1)
    await rig.append((events, [2]), ordering="a")
    await rig.append((events, [3]), ordering="a")
    await failed_range(rig)
    coordinator.wake()
    async with asyncio.timeout(10):
        while not rig.metrics.value("lakebus_ranges_ended_total", outcome=RangeEnd.RELEASED):
            await asyncio.sleep(0.005)  # a counter tells nobody that it counted
        assert gate.most == 1
        gate.let_go()
        while not await rig.drained():
            await asyncio.sleep(0.005)
    await coordinator.stop()
    await publisher.stop()
    assert gate.most == 1
    assert set(await rig.ids()) == {1, 2, 3}
    assert await rig.bus.quarantine_items() == []
    assert rig.metrics.value("lakebus_ranges_claimed_total", attempt="2") == 0


async def test_B8_an_entry_that_hangs_its_extraction_too_is_set_aside_before_its_worker_is_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = ManualClock()
    rig = Rig(shards=1, clock=clock, quarantine_attempts=1, lease_ttl_ms=300)
    rig.settings = with_settings(rig.settings, hold_s_min=1.0)
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")
    claim = await failed_range(rig, canary=True)
    (segment,) = rig.lake.state.segments.values()
    monkeypatch.setattr(staging, "EXTRACT_MODULE", "time as m; m.sleep(60) #")
    publisher = rig.publisher()
    publisher.start()
    coordinator = rig.coordinator(publisher=publisher)
    report = await coordinator.run_once()
    await coordinator.stop()
    await publisher.stop()
    assert report is not None
    assert (report.end, report.quarantined) == (RangeEnd.PUBLISHED, 1)
    (item,) = await rig.bus.quarantine_items()
    assert item.payload == segment.payload
    assert claim.lease.hi - claim.lease.lo == 1


async def test_B8_fresh_ranges_overlap_as_before() -> None:
    rig = Rig(shards=1, clock=SystemClock(), claim_entries_max=1)
    events = await rig.create()
    for number in range(3):
        await rig.append((events, [number]), ordering="a")
    gate = Gate(rig)
    publisher = rig.publisher()
    coordinator = rig.coordinator(publisher=publisher, store=gate.store)
    publisher.start()
    await coordinator.start()
    await gate.arrived(rig.settings.ranges_in_flight)
    gate.let_go()
    await coordinator.stop()
    await publisher.stop()
    assert set(await rig.ids()) == {0, 1, 2}
