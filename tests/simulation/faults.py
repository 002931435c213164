"""What goes wrong, by the seed's plan: deaths, pauses, twins, outages, expiry.

Everything here is what the contract says the lake must bear. `heal` ends all of it; from then on
the lake has a bounded time to bring every accepted entry to an end.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from actors.roles import Role
from tests.simulation.event_loop import Process
from tests.simulation.network import Weather
from tests.simulation.replicas import Replica
from tests.simulation.roles import RoleProcess

if TYPE_CHECKING:
    from tests.simulation.world import World


class Faults:
    def __init__(self, world: World, source: random.Random) -> None:
        self._world = world
        self._random = source
        self._active = True
        self.counts: Counter[str] = Counter()
        world.loop.on_death = self._died
        self._acts: list[tuple[float, Callable[[], None]]] = [
            (5, self._kill_role),
            (4, self._pause_role),
            (3, self._twin),
            (2, self._kill_replica),
            (1.5, self._pause_replica),
            (1, self._crash_database),
            (1, self._stall_database),
            (1, self._storm),
            (1, self._store_away),
            (1, self._expire),
            (0.7, self._remove_intent),
            (0.7, self._step_clock),
            (2, self._lock_publishes),
        ]

    async def run(self) -> None:
        """Faults until the world heals."""

        weights = [weight for weight, _ in self._acts]
        acts = [act for _, act in self._acts]
        while self._active:
            every_s = self._world.plan.fault_every_s
            await self._world.sleep_s(self._random.expovariate(1 / every_s))
            if self._active:
                self._random.choices(acts, weights)[0]()

    def heal(self) -> None:
        self._active = False
        world = self._world
        world.network.weather = Weather()
        world.database.lock_s = None
        if not world.database.endpoint.process.alive:
            world.database.start()
        for process in world.loop.processes:
            process.dies_after = None
            if process.paused:
                world.loop.resume(process)
        for name in list(world.roles):
            if not world.roles[name].process.alive:
                world.start_role(name)
        for name in list(world.replicas):
            if not world.replicas[name].process.alive:
                world.start_replica(name)

    # --- deaths -------------------------------------------------------------------------------

    def died_by_itself(self, process: Process) -> None:
        """A role asked for the end of its process."""

        self.counts["processes ended by themselves"] += 1
        process.kill()
        self._died(process)

    def died_of_poison(self, process: Process) -> None:
        self.counts["processes killed by an entry"] += 1
        process.kill()
        self._died(process)

    def _died(self, process: Process) -> None:
        """Somebody starts what died again, after a while."""

        world = self._world
        world.note(f"{process.name} died")
        for host in world.hosts():
            if host.process is process:
                host.endpoint.abandon()
                self._later(0.05, 0.8, functools.partial(self._start_again, host))

    def _start_again(self, host: RoleProcess | Replica) -> None:
        world = self._world
        if isinstance(host, RoleProcess):
            if world.roles.get(host.name) is host:
                world.start_role(host.name)
        elif world.replicas.get(host.name) is host:
            world.start_replica(host.name)

    def _kill_role(self) -> None:
        host = self._random.choice([*self._world.roles.values(), *self._world.twins])
        self._doom(host.process)

    def _kill_replica(self) -> None:
        self._doom(self._random.choice(list(self._world.replicas.values())).process)

    def _doom(self, process: Process) -> None:
        """It dies somewhere in its next steps, in the middle of whatever it does."""

        if process.alive and process.dies_after is None:
            self.counts["kills"] += 1
            process.dies_after = self._random.randint(1, 150)

    # --- pauses -------------------------------------------------------------------------------

    def _pause_role(self) -> None:
        host = self._random.choice([*self._world.roles.values(), *self._world.twins])
        self._pause(host.process, self._world.ttl_s * self._random.choice((0.5, 1.5, 3.0)))

    def _pause_replica(self) -> None:
        host = self._random.choice(list(self._world.replicas.values()))
        self._pause(host.process, self._random.random() * 2)

    def _stall_database(self) -> None:
        self._pause(self._world.database.endpoint.process, self._random.random())

    def _pause(self, process: Process, seconds: float) -> None:
        if not process.alive or process.paused:
            return
        self.counts["pauses"] += 1
        self._world.note(f"{process.name} is paused for {seconds:.2f} s")
        process.paused = True
        self._later(seconds, seconds, lambda: self._world.loop.resume(process))

    # --- others -------------------------------------------------------------------------------

    def _twin(self) -> None:
        """A second instance of a role: the name leads to it, the old one lives on."""

        self.counts["twins"] += 1
        world = self._world
        name = self._random.choice(list(world.roles))
        old = world.roles[name]
        world.twins.append(old)
        world.start_role(name)
        world.note(f"{old.name} has a twin")

        def end() -> None:
            if self._active and old.process.alive and not old.process.paused:
                if self._random.random() < 0.5:
                    world.loop.spawn(old.process, old.end(), name="stop")
                else:
                    old.process.kill()
                    old.endpoint.abandon()

        if self._random.random() < 0.8:
            self._later(0.2, 4.0, end)

    def _crash_database(self) -> None:
        database = self._world.database
        if database.endpoint.process.alive:
            self.counts["database crashes"] += 1
            self._world.note("the database crashes")
            database.crash()
            self._later(0.05, 1.0, self._database_up)

    def _database_up(self) -> None:
        if not self._world.database.endpoint.process.alive:
            self._world.database.start()

    def _storm(self) -> None:
        """Nearly nothing gets through for a while."""

        self.counts["storms"] += 1
        network, usual = self._world.network, self._world.plan.weather
        network.weather = Weather(lost=0.7, twice=0.3, slow=0.5, slow_s=2.0)

        def over() -> None:
            if self._active:
                network.weather = usual

        self._later(0.1, 1.0, over)

    def _lock_publishes(self) -> None:
        """Publishes wait for about a lease: some take effect just after their range was taken."""

        self.counts["locked publishes"] += 1
        database, ttl_s = self._world.database, self._world.ttl_s
        database.lock_s = lambda: ttl_s * self._random.uniform(0.2, 1.6)

        def over() -> None:
            database.lock_s = None

        self._later(ttl_s, 4 * ttl_s, over)

    def _store_away(self) -> None:
        self._pause(self._world.store_endpoint.process, self._random.random() * 3)

    def _expire(self) -> None:
        self.counts["expiries"] += 1
        lake = self._world.lake
        lake.expire_snapshots(before=lake.head.snapshot_id - self._random.randint(0, 5))

    def _remove_intent(self) -> None:
        """What collection does first with a file that nobody referred to in time."""

        intents = self._world.lake.state.intents
        if intents:
            self.counts["intents removed"] += 1
            del intents[self._random.choice(list(intents))]

    def _step_clock(self) -> None:
        """The database's clock is set, back or forth."""

        self.counts["clock steps"] += 1
        self._world.database_clock.step_s(self._random.uniform(-1.5, 0.5))

    def _later(self, least_s: float, most_s: float, act: Callable[[], object]) -> None:
        self._world.network.after(self._random.uniform(least_s, most_s), act)


def roles_of(placement: str, coordinators: int) -> dict[str, frozenset[Role]]:
    """Process name → roles: everything in one process, or each role in its own."""

    if placement == "together":
        return {"roles": frozenset(Role)}
    spread = {
        "lease manager": frozenset({Role.LEASE_MANAGER}),
        "publisher": frozenset({Role.PUBLISHER}),
        "supervisor": frozenset({Role.SUPERVISOR}),
    }
    for number in range(coordinators):
        spread[f"coordinator {number}"] = frozenset({Role.COORDINATOR})
    return spread
