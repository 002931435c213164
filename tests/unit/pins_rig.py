"""A lake in memory on virtual time, a process that keeps a pin in it, and what can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from lakebus.errors import OutcomeUnknown, SnapshotExpired, Unavailable
from storage.catalog.interface import Head
from storage.catalog.memory import MemoryCatalog
from storage.catalog.memory_upkeep import MemoryUpkeep
from storage.maintenance.interface import Pin, Upkeep
from storage.memory_lake import MemoryLake
from storage.reading.holds import Hold
from storage.reading.pins import PinKeeper, PinSettings
from tests.simulation.chance import SeededChance
from tests.simulation.clock import SimulatedClock
from tests.simulation.event_loop import Process, SimulatedLoop

SETTINGS = PinSettings()
Effect = Callable[[], Awaitable[Pin]]


class Wire:
    """The way to the database: each call takes `delay_s` there and back; `fault` says what becomes
    of the next ones."""

    def __init__(self, upkeep: MemoryUpkeep) -> None:
        self.upkeep = upkeep
        self.calls: list[tuple[int | None, tuple[int, ...]]] = []
        self.delay_s = 0.001
        self.fault: Callable[[Effect], Awaitable[Pin]] | None = None
        self.released: list[uuid.UUID] = []

    async def pin(
        self,
        pin_id: uuid.UUID,
        *,
        kind: str,
        floor: int | None,
        snapshot_ids: Sequence[int] = (),
        ttl_s: float | None,
        note: str = "",
    ) -> Pin:
        self.calls.append((floor, tuple(snapshot_ids)))

        async def effect() -> Pin:
            return await self.upkeep.pin(
                pin_id, kind=kind, floor=floor, snapshot_ids=snapshot_ids, ttl_s=ttl_s, note=note
            )

        fault = self.fault
        await asyncio.sleep(self.delay_s)
        pin = await (effect() if fault is None else fault(effect))
        await asyncio.sleep(self.delay_s)
        return pin

    async def release_pin(self, pin_id: uuid.UUID) -> None:
        self.released.append(pin_id)
        await self.upkeep.release_pin(pin_id)


async def away(_: Effect) -> Pin:
    raise Unavailable("the catalog cannot be reached now")


async def lost(effect: Effect) -> Pin:
    """It happens, and its answer does not come."""
    with contextlib.suppress(SnapshotExpired):
        await effect()
    raise OutcomeUnknown("the connection broke")


class Rig:
    """A lake in memory, and one process that keeps a pin in it."""

    def __init__(self, *, wrong_s: float = 0.0, settings: PinSettings = SETTINGS) -> None:
        self.loop = SimulatedLoop(steps_max=3_000_000)
        self.lake = MemoryLake(clock=SimulatedClock(self.loop), seed=7)
        self.catalog = MemoryCatalog(self.lake)
        self.upkeep = MemoryUpkeep(self.lake)
        self.wire = Wire(self.upkeep)
        self.process: Process = self.loop.new_process("replica")
        # Its monotonic zero lies elsewhere, its wall clock is wrong.
        self.clock = SimulatedClock(self.loop, zero_s=1e6 + wrong_s, wrong_s=wrong_s)
        self.settings = settings
        self.keeper = self.new_keeper()

    def new_keeper(self) -> PinKeeper:
        upkeep: Upkeep = self.wire  # type: ignore[assignment] # the part of it that readers use
        return PinKeeper(
            upkeep=upkeep,
            head=self._head,
            settings=self.settings,
            clock=self.clock,
            chance=SeededChance(random.Random(3)),
        )

    async def _head(self) -> Head:
        return await self.catalog.head()

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            self.loop.run(work)
            assert self.loop.complaints == []
        finally:
            self.loop.close()

    def start(self) -> None:
        self.loop.context_of(self.process).run(self.keeper.start)

    def publish(self, count: int = 1) -> int:
        for _ in range(count):
            self.lake.next_snapshot("publish", {}, at=self.lake.next_publish_time())
        return self.lake.head.snapshot_id

    async def expire_all_but_the_head(self) -> None:
        await self.upkeep.expire_snapshots(keep_s=0, keep_count=1, limit=1_000_000)

    def protected(self, snapshot_id: int) -> bool:
        """What deletes look at."""
        pins = [
            pin
            for pin in self.lake.state.pins.values()
            if pin.expires_at is None or pin.expires_at > self.lake.now()
        ]
        return self.lake.retained(snapshot_id) or any(
            snapshot_id in pin.snapshot_ids or (pin.floor is not None and snapshot_id >= pin.floor)
            for pin in pins
        )

    def sound(self, hold: Hold) -> bool:
        """Whether the holder may go on. If so, its files are protected (E3)."""
        try:
            hold.check()
        except Unavailable:
            return False
        snapshot_id, onward = hold.want
        assert self.protected(snapshot_id)
        if onward:
            assert all(map(self.protected, range(snapshot_id, self.lake.head.snapshot_id)))
        return True


class Trouble:
    """Publications, expiry, lost and late calls, outages, pauses, and readers of all kinds."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.chance = random.Random(seed)
        self.holds: list[Hold] = []
        self.served = 0

    async def fate(self, effect: Effect) -> Pin:
        draw = self.chance.random()
        if draw < 0.15:
            return await lost(effect)
        if draw < 0.3:
            self.rig.loop.spawn(self.rig.loop.world, self.late(effect))
            raise OutcomeUnknown("the connection broke")
        if draw < 0.4:
            return await away(effect)
        if draw < 0.5:
            await asyncio.sleep(self.chance.random() * 3)
        return await effect()

    async def late(self, effect: Effect) -> None:
        await asyncio.sleep(self.chance.random() * 4)
        with contextlib.suppress(SnapshotExpired):
            await effect()

    async def reader(self) -> None:
        chance = self.chance
        while True:
            snapshot_id = max(1, self.rig.lake.head.snapshot_id - chance.choice((0, 0, 0, 1, 3, 9)))
            try:
                hold = await self.rig.keeper.hold(snapshot_id, onward=chance.random() < 0.2)
            except (SnapshotExpired, Unavailable):
                await asyncio.sleep(0.3)
                continue
            self.holds.append(hold)
            self.served += 1
            await asyncio.sleep(chance.random() * chance.choice((1, 5, 20)))
            self.holds.remove(hold)
            hold.release()

    async def step(self, number: int) -> None:
        rig, chance = self.rig, self.chance
        await asyncio.sleep(0.03)
        rig.publish(chance.random() < 0.3)
        if chance.random() < 0.1:
            keep = chance.choice((1, 4, 12))
            await rig.upkeep.expire_snapshots(keep_s=0, keep_count=keep, limit=1_000)
        if number % 200 == 0:
            rig.wire.fault = chance.choice((None, self.fate, self.fate, away))
        if chance.random() < 0.004:
            rig.process.paused = True
        elif rig.process.paused and chance.random() < 0.02:
            rig.loop.resume(rig.process)
