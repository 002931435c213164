"""The failure matrix, poison: an entry that ends every process that encodes it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from tests.conformance.worker import Place
from tests.matrix.worker_process import WorkerProcess
from tests.matrix.worker_rig import WorkerRig, rig
from tests.matrix.worker_roles import Poison

__all__ = ["rig"]

ENTRIES = 500
#: How often 500 can be halved until one is left.
HALVINGS = 9


@dataclass(slots=True)
class Crew:
    """Keeps so many workers alive, as a supervisor does: who dies is replaced at once."""

    rig: WorkerRig
    poison: Poison
    put_s: float = 0.0
    deaths: list[str] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self, workers: int) -> None:
        first = [await self._started() for _ in range(workers)]
        self._tasks = [asyncio.create_task(self._keep(worker)) for worker in first]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _started(self) -> WorkerProcess:
        worker = await self.rig.process(poison=self.poison, put_s=self.put_s)
        worker.tell("start")
        return worker

    async def _keep(self, worker: WorkerProcess) -> None:
        while True:
            self.deaths.append(await worker.dies())
            worker = await self._started()


def place_of(rig: WorkerRig, row_id: int) -> Place:
    (place,) = (place for place, ids in rig.accepted.items() if ids == [row_id])
    return place


async def test_M29_one_entry_of_500_that_kills_its_worker_is_isolated_and_set_aside(
    rig: WorkerRig,
) -> None:
    await rig.configure(lease_ttl_ms=2_000, group_entries_max=ENTRIES)
    crew = Crew(rig, Poison(136))
    await crew.start(workers=2)
    await asyncio.gather(*(rig.append([n]) for n in range(ENTRIES)))
    try:
        delay_s = await rig.drain()
    finally:
        await crew.stop()
    found = await rig.audit()
    assert delay_s <= 10 * rig.ttl_s
    (place,) = found.quarantined
    assert place == place_of(rig, 136)
    item = found.quarantined[place]
    assert item["by_crash"]
    assert item["attempts"] == len(crew.deaths) <= HALVINGS + rig.bus.quarantine_attempts
    assert crew.deaths.count("poison among 1") == rig.bus.quarantine_attempts


async def test_M29_neighbours_that_die_with_a_poison_entry_are_not_held_to_be_poison(
    rig: WorkerRig,
) -> None:
    """The store is slow and the poison too, so a worker would have the neighbours under way, their
    canaries passed and their files half sent, each time the poison kills it. An entry that has
    failed before goes alone, and its failures are its own."""
    await rig.configure(lease_ttl_ms=500, group_entries_max=4)
    crew = Crew(rig, Poison(0, after_s=0.15), put_s=0.25)
    await crew.start(workers=1)
    await asyncio.gather(*(rig.append([n]) for n in range(4)))
    try:
        await rig.drain()
    finally:
        await crew.stop()
    found = await rig.audit()
    assert list(found.quarantined) == [place_of(rig, 0)]
