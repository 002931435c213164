"""Role processes: the real roles, their handles over the simulated network, and their processes.

A name leads to the instance that was started last; a handle keeps what it found until a call
fails, so that an old and a new instance of a role both get calls. Errors are those of
`actors.handles`: nobody of that name is Unavailable; an actor that does not answer is Unavailable
where the call may be repeated, else OutcomeUnknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from actors.coordinator import CommitCoordinator
from actors.lease_manager import LeaseManager, Leases
from actors.publisher import Publisher, SnapshotPublisher, Submitted
from actors.range_files import RangeEntry, single_payload
from actors.roles import Role
from actors.staging import Stager
from actors.supervisor import NoCrew, Supervisor
from lakebus.errors import OutcomeUnknown, Unavailable
from lakebus.telemetry import NO_METRICS, NO_TRACING
from storage.bus.interface import Claim, LeaseRef
from storage.catalog.interface import Commit
from tests.simulation.database import RemoteBus, RemoteCatalog
from tests.simulation.event_loop import Process
from tests.simulation.network import Endpoint
from tests.simulation.store import RemoteStore

if TYPE_CHECKING:
    from tests.simulation.world import World

T = TypeVar("T")

#: How long a call to another role may take (`RoleHandle.timeout_s`), shortened like all else.
_CALL_S = 5.0


class SimulatedStager(Stager):
    """The real stager; only the process that cuts poison out of its segment is not started."""

    async def _extract_apart(self, entry: RangeEntry, timeout_s: float) -> bytes:
        return single_payload(entry.segment.payload, entry.index)


class _Handle:
    def __init__(self, world: World, role: Role) -> None:
        self._world = world
        self._role = role
        self._found: RoleProcess | None = None

    async def call(
        self, work: Callable[[RoleProcess], Coroutine[Any, Any, T]], *, repeatable: bool
    ) -> T:
        if self._found is None:
            self._found = self._world.directory.get(self._role)
            if self._found is None:
                raise Unavailable(f"there is no actor {self._role}")
        target = self._found

        def lost() -> Exception:
            self._found = None
            text = f"the actor {self._role} did not answer"
            return Unavailable(text) if repeatable else OutcomeUnknown(text)

        return await self._world.network.call(
            target.endpoint,
            lambda: work(target),
            lost=lost,
            refused=lost,
            timeout_s=_CALL_S,
            repeatable=True,
        )


class RemoteLeases:
    """Satisfies `actors.lease_manager.Leases`, as `actors.handles.LeaseManagerHandle` does."""

    def __init__(self, world: World) -> None:
        self._role = _Handle(world, Role.LEASE_MANAGER)

    async def acquire(self, owner: uuid.UUID) -> Claim | None:
        return await self._role.call(lambda r: r.need_leases().acquire(owner), repeatable=False)

    async def renew(self, leases: Sequence[LeaseRef]) -> Sequence[LeaseRef]:
        return await self._role.call(lambda r: r.need_leases().renew(leases), repeatable=True)

    async def release(self, lease: LeaseRef) -> None:
        await self._role.call(lambda r: r.need_leases().release(lease), repeatable=False)

    async def nack(self, lease: LeaseRef, *, error: str, delay_s: float) -> None:
        await self._role.call(
            lambda r: r.need_leases().nack(lease, error=error, delay_s=delay_s), repeatable=False
        )

    async def note_canary(self, lease: LeaseRef) -> None:
        await self._role.call(lambda r: r.need_leases().note_canary(lease), repeatable=True)

    async def forget(self, lease: LeaseRef) -> None:
        with contextlib.suppress(Unavailable):
            await self._role.call(lambda r: r.need_leases().forget(lease), repeatable=True)


class RemotePublisher:
    """Satisfies `actors.publisher.Publisher`."""

    def __init__(self, world: World) -> None:
        self._role = _Handle(world, Role.PUBLISHER)

    async def submit(self, commit: Commit) -> Submitted:
        return await self._role.call(lambda r: r.need_publisher().submit(commit), repeatable=False)


class RoleProcess:
    """One life of one process with the given roles; a restart makes a new one."""

    def __init__(self, world: World, name: str, roles: frozenset[Role]) -> None:
        self.name = name
        self.roles = roles
        self._world = world
        self.process: Process = world.loop.new_process(name)
        self.endpoint = Endpoint(world.loop, self.process)
        self._bus = RemoteBus(world.database, self.process)
        self._catalog = RemoteCatalog(world.database)
        self._clock = world.new_clock()
        self.lease_manager: LeaseManager | None = None
        self.publisher: SnapshotPublisher | None = None
        self.coordinator: CommitCoordinator | None = None
        self.supervisor: Supervisor | None = None
        self._starting: asyncio.Task[None]
        self._build()

    def _build(self) -> None:
        if Role.LEASE_MANAGER in self.roles:
            self.lease_manager = LeaseManager(bus=self._bus, metrics=NO_METRICS)
        if Role.PUBLISHER in self.roles:
            self.publisher = SnapshotPublisher(
                catalog=self._catalog,
                settings=self._world.role_settings,
                clock=self._clock,
                metrics=NO_METRICS,
                tracing=NO_TRACING,
                on_fatal=self._on_fatal,
                chance=self._world.chance,
            )
        if Role.COORDINATOR in self.roles:
            leases = self.lease_manager or RemoteLeases(self._world)
            self.coordinator = self._coordinator(
                leases, self.publisher or RemotePublisher(self._world)
            )
        if Role.SUPERVISOR in self.roles:
            self.supervisor = Supervisor(
                bus=self._bus,
                catalog=self._catalog,
                crew=NoCrew(),
                settings=self._world.role_settings,
                clock=self._clock,
                metrics=NO_METRICS,
                on_fatal=self._on_fatal,
                chance=self._world.chance,
            )

    def _coordinator(self, leases: Leases, publisher: Publisher) -> CommitCoordinator:
        world = self._world
        stager = SimulatedStager(
            catalog=self._catalog,
            store=RemoteStore(world.network, world.store_endpoint, world.objects),
            encode=world.encode_for(self),
            settings=world.role_settings,
            clock=self._clock,
            metrics=NO_METRICS,
            chance=world.chance,
        )
        return CommitCoordinator(
            instance=world.chance.new_uuid(),
            leases=leases,
            bus=self._bus,
            stager=stager,
            publisher=publisher,
            settings=world.role_settings,
            clock=self._clock,
            metrics=NO_METRICS,
            tracing=NO_TRACING,
            on_fatal=self._on_fatal,
            chance=world.chance,
        )

    def start(self) -> None:
        self._starting = self._world.loop.spawn(self.process, self._start(), name="start")

    async def _start(self) -> None:
        if self.publisher is not None:
            self.publisher.start()
        if self.coordinator is not None:
            await self.coordinator.start()
        if self.supervisor is not None:
            self.supervisor.start()

    async def stop(self) -> None:
        """The polite end, in the order of `RoleHost.stop`, once it has started."""

        await asyncio.wait((self._starting,))
        if self.supervisor is not None:
            await self.supervisor.stop()
        if self.coordinator is not None:
            await self.coordinator.stop()
        if self.publisher is not None:
            await self.publisher.stop()
        if self.lease_manager is not None:
            await self.lease_manager.stop()

    async def end(self) -> None:
        """Stops, and ends the process, as `RoleHandle.stop` does."""

        await self.stop()
        self.process.kill()
        self.endpoint.abandon()

    def wake(self) -> None:
        """A hint."""

        if self.coordinator is not None:
            self.coordinator.wake()

    def need_leases(self) -> LeaseManager:
        assert self.lease_manager is not None
        return self.lease_manager

    def need_publisher(self) -> SnapshotPublisher:
        assert self.publisher is not None
        return self.publisher

    def _on_fatal(self, role: str, error: BaseException) -> None:
        self._world.faults.died_by_itself(self.process)
