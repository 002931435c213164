"""Rounds: what is claimed back to back under load is published together, and nobody waits long."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

from actors.coordinator import CommitCoordinator
from actors.publisher import SnapshotPublisher
from actors.rounds import Round
from actors.settings import RoleSettings
from lakebus.clock import SystemClock
from storage.catalog.interface import Commit, Published
from tests.unit.actors_rig import ROLE_SETTINGS, Overlay, Rig, with_settings

_PATIENCE_S = 20.0
#: Pauses, and so patience, that no test lives to see the end of.
_PATIENT = with_settings(ROLE_SETTINGS, linger_ms=60_000)


async def test_a_round_is_written_once_it_is_closed_and_all_have_left() -> None:
    joined = Round()
    for lease_id in (1, 2):
        joined.join(lease_id)
    joined.leave(1)
    joined.leave(1)
    joined.close()
    assert not await joined.gathered(0.001)
    joined.leave(2)
    assert await joined.gathered(60.0)


async def test_an_open_round_is_not_written_and_waiting_for_it_ends() -> None:
    joined = Round()
    assert not await joined.gathered(0.001)
    joined.close()
    assert await joined.gathered(60.0)


class World:
    """Two shards, files that are stored when a test says so, and what was published together."""

    def __init__(self, roles: RoleSettings) -> None:
        self.rig = Rig(clock=SystemClock(), roles=roles, shards=2)
        self.arrived: asyncio.Queue[str] = asyncio.Queue()
        self.gates: dict[str, asyncio.Event] = {}
        self.published: asyncio.Queue[list[int]] = asyncio.Queue()

    async def put_new(self, key: str, data: bytes) -> None:
        gate = self.gates[key] = asyncio.Event()
        self.arrived.put_nowait(key)
        await gate.wait()
        await self.rig.store.put_new(key, data)

    async def publish(self, publication_id: uuid.UUID, commits: Sequence[Commit]) -> Published:
        published = await self.rig.catalog.publish(publication_id, commits)
        self.published.put_nowait(sorted(commit.lease.shard for commit in commits))
        return published

    async def begun(self, *, entries: int) -> tuple[SnapshotPublisher, CommitCoordinator]:
        """Roles, and so many entries in each of the two shards."""
        table = await self.rig.create()
        orderings: dict[int, str] = {}
        for number in range(64):
            orderings.setdefault(self.rig.bus.shard_of(1, f"o{number}"), f"o{number}")
        assert len(orderings) == 2
        for ordering in orderings.values():
            for number in range(entries):
                await self.rig.append((table, [number]), ordering=ordering)
        publisher = self.rig.publisher(Overlay(self.rig.catalog, publish=self.publish))
        coordinator = self.rig.coordinator(
            publisher=publisher, store=Overlay(self.rig.store, put_new=self.put_new)
        )
        publisher.start()
        await coordinator.start()
        return publisher, coordinator

    async def first_goes_alone(self) -> None:
        """Of two files the first is stored, and published while the second is still written."""
        async with asyncio.timeout(_PATIENCE_S):
            first, second = await self.arrived.get(), await self.arrived.get()
            self.gates[first].set()
            (shard,) = await self.published.get()
            self.gates[second].set()
            assert await self.published.get() == [1 - shard]


async def test_under_load_a_round_is_one_publication() -> None:
    world = World(_PATIENT)
    publisher, coordinator = await world.begun(entries=5)
    async with asyncio.timeout(_PATIENCE_S):
        first, second = await world.arrived.get(), await world.arrived.get()
        world.gates[first].set()
        while publisher.waiting == 0 and await world.rig.store.size(first) is None:
            await asyncio.sleep(0)
        for _ in range(20):  # whoever does not wait would be there by now
            await asyncio.sleep(0)
        assert publisher.waiting == 0
        world.gates[second].set()
        assert await world.published.get() == [0, 1]
    await coordinator.stop()
    await publisher.stop()
    assert await world.rig.drained()


async def test_without_load_nobody_waits_for_another() -> None:
    world = World(_PATIENT)
    publisher, coordinator = await world.begun(entries=1)
    await world.first_goes_alone()
    await coordinator.stop()
    await publisher.stop()


async def test_a_range_that_is_stuck_holds_its_round_up_for_a_while_only() -> None:
    world = World(with_settings(ROLE_SETTINGS, linger_ms=20))
    publisher, coordinator = await world.begun(entries=5)
    await world.first_goes_alone()
    await coordinator.stop()
    await publisher.stop()


async def test_B7_a_stop_does_not_wait_for_a_round_to_gather() -> None:
    world = World(with_settings(_PATIENT, ranges_in_flight=1))
    publisher, coordinator = await world.begun(entries=5)
    async with asyncio.timeout(_PATIENCE_S):
        first = await world.arrived.get()
        stopping = asyncio.create_task(coordinator.stop())
        world.gates[first].set()
        (shard,) = await world.published.get()
        await stopping
    await publisher.stop()
    status = {s.shard: s.backlog_entries for s in await world.rig.bus.shard_status()}
    assert status == {shard: 0, 1 - shard: 5}


async def test_ranges_that_wait_to_be_published_do_not_keep_others_from_being_written() -> None:
    """One at a time is written, and yet both are published as one."""
    world = World(with_settings(_PATIENT, ranges_in_flight=1))
    publisher, coordinator = await world.begun(entries=5)
    async with asyncio.timeout(_PATIENCE_S):
        first = await world.arrived.get()
        assert world.arrived.empty()
        world.gates[first].set()
        world.gates[await world.arrived.get()].set()
        assert await world.published.get() == [0, 1]
    await coordinator.stop()
    await publisher.stop()
