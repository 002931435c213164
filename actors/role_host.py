"""Hosts roles in one process, on one event loop, with plain awaits between them.

Together, lease manager, coordinator and publisher take a lone row from accepted to visible without
a hop between processes. The same class hosts a single role for the spread placement, runs the roles
without Ray, and is what tests use.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from actors.backend import Backend
from actors.brake import FilesBrake
from actors.coordinator import CommitCoordinator
from actors.hints import HintReceiver
from actors.lease_manager import LeaseManager, Leases
from actors.loop import LoopStatus, OnFatal
from actors.maintenance import JobRunner, Maintainer
from actors.publisher import Publisher, SnapshotPublisher
from actors.range_files import EncodeFile
from actors.roles import ALL_ROLES, Role
from actors.staging import Stager
from actors.supervisor import Crew, NoCrew, Supervisor
from lakebus.clock import Clock, SystemClock, new_uuid
from lakebus.telemetry import NO_METRICS, Metrics
from storage.files.parquet import encode_data_file

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostStatus:
    """`age_s` is the age of the loop that stands still the longest."""

    roles: tuple[str, ...]
    loops: tuple[LoopStatus, ...]
    age_s: float


class RoleHost:
    """Builds the wanted roles over a backend. Roles that live elsewhere are given as `leases` and
    `publisher`; those that live here replace them. Without a `runner`, or over a backend without
    jobs, nobody does maintenance."""

    def __init__(
        self,
        *,
        backend: Backend,
        on_fatal: OnFatal,
        roles: frozenset[Role] = ALL_ROLES,
        leases: Leases | None = None,
        publisher: Publisher | None = None,
        crew: Crew | None = None,
        runner: JobRunner | None = None,
        clock: Clock | None = None,
        metrics: Metrics = NO_METRICS,
        encode: EncodeFile = encode_data_file,
    ) -> None:
        self.instance = new_uuid()
        self._backend = backend
        self._on_fatal = on_fatal
        self._clock = clock or SystemClock()
        self._metrics = metrics
        self._roles = roles
        self.lease_manager = (
            LeaseManager(bus=backend.bus, metrics=metrics) if Role.LEASE_MANAGER in roles else None
        )
        self.publisher = self._make_publisher() if Role.PUBLISHER in roles else None
        self.brake = self._make_brake() if Role.COORDINATOR in roles else None
        self.coordinator: CommitCoordinator | None = None
        self._receiver: HintReceiver | None = None
        if Role.COORDINATOR in roles:
            self.coordinator = self._make_coordinator(
                self.lease_manager or leases, self.publisher or publisher, encode
            )
            self._receiver = self._make_receiver(self.coordinator)
        self.supervisor = (
            self._make_supervisor(crew or NoCrew()) if Role.SUPERVISOR in roles else None
        )
        self.maintainer = self._make_maintainer(runner) if Role.MAINTENANCE in roles else None

    async def start(self) -> None:
        """Begins to work. A start that fails or is cancelled leaves nothing running."""

        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        if self.publisher is not None:
            self.publisher.start()
        if self.coordinator is not None and self._receiver is not None:
            await self.coordinator.start()
            await self._receiver.start()
        if self.supervisor is not None:
            self.supervisor.start()
        if self.maintainer is not None:
            self.maintainer.start()

    async def stop(self) -> None:
        """Ends the roles in the order in which work flows, so that what is under way can end, and
        gives every lease back."""

        if self.maintainer is not None:
            await self.maintainer.stop()
        if self.supervisor is not None:
            await self.supervisor.stop()
        if self._receiver is not None:
            await self._receiver.stop()
        if self.coordinator is not None:
            await self.coordinator.stop()
        if self.publisher is not None:
            await self.publisher.stop()
        if self.lease_manager is not None:
            await self.lease_manager.stop()

    def wake(self) -> None:
        """Looks at everything now."""

        if self.coordinator is not None:
            self.coordinator.wake()
        if self.supervisor is not None:
            self.supervisor.wake()
        if self.maintainer is not None:
            self.maintainer.wake()

    def need_lease_manager(self) -> LeaseManager:
        if self.lease_manager is None:
            raise ValueError("the lease manager does not live in this process")
        return self.lease_manager

    def need_publisher(self) -> SnapshotPublisher:
        if self.publisher is None:
            raise ValueError("the publisher does not live in this process")
        return self.publisher

    def status(self) -> HostStatus:
        hosts = (self.coordinator, self.publisher, self.supervisor, self.maintainer)
        loops = tuple(host.status() for host in hosts if host is not None)
        return HostStatus(
            roles=tuple(sorted(self._roles)),
            loops=loops,
            age_s=max((loop.tick_age_s for loop in loops), default=0.0),
        )

    def _make_publisher(self) -> SnapshotPublisher:
        return SnapshotPublisher(
            catalog=self._backend.catalog,
            settings=self._backend.settings,
            clock=self._clock,
            metrics=self._metrics,
            tracing=self._backend.tracing,
            on_fatal=self._on_fatal,
        )

    def _make_coordinator(
        self, leases: Leases | None, publisher: Publisher | None, encode: EncodeFile
    ) -> CommitCoordinator:
        if leases is None or publisher is None:
            raise ValueError("a coordinator needs a lease manager and a publisher")
        backend = self._backend
        stager = Stager(
            catalog=backend.catalog,
            store=backend.store,
            encode=encode,
            settings=backend.settings,
            clock=self._clock,
            metrics=self._metrics,
            intents=backend.upkeep,
            owner=self.instance,
        )
        return CommitCoordinator(
            instance=self.instance,
            leases=leases,
            bus=backend.bus,
            stager=stager,
            publisher=publisher,
            settings=backend.settings,
            clock=self._clock,
            metrics=self._metrics,
            tracing=backend.tracing,
            on_fatal=self._on_fatal,
            brake=self.brake,
        )

    def _make_brake(self) -> FilesBrake | None:
        """None where nobody would release it, because nobody compacts."""

        backend, settings = self._backend, self._backend.settings
        upkeep, bound = backend.upkeep, backend.maintenance
        if upkeep is None or backend.jobs is None or not backend.maintainer.enabled:
            return None
        if settings.linger_ms_max <= settings.linger_ms:
            return None

        async def count() -> int:
            found = await upkeep.file_counts(small_bytes=bound.small_file_bytes)
            return max((small for _, small in found.values()), default=0)

        return FilesBrake(
            count=count,
            small_files_max=bound.small_files_max,
            linger_s_max=settings.linger_ms_max / 1e3,
            clock=self._clock,
            metrics=self._metrics,
        )

    def _make_receiver(self, coordinator: CommitCoordinator) -> HintReceiver:
        return HintReceiver(
            stack=self._backend.stack,
            instance=str(self.instance),
            host=self._backend.hint_host,
            directory=self._backend.hints,
            heard=coordinator.wake,
            settings=self._backend.settings,
            clock=self._clock,
            metrics=self._metrics,
            on_fatal=self._on_fatal,
        )

    def _make_supervisor(self, crew: Crew) -> Supervisor:
        return Supervisor(
            bus=self._backend.bus,
            catalog=self._backend.catalog,
            crew=crew,
            settings=self._backend.settings,
            clock=self._clock,
            metrics=self._metrics,
            on_fatal=self._on_fatal,
        )

    def _make_maintainer(self, runner: JobRunner | None) -> Maintainer | None:
        backend = self._backend
        if runner is None or backend.jobs is None or backend.upkeep is None:
            return None
        return Maintainer(
            instance=self.instance,
            jobs=backend.jobs,
            catalog=backend.catalog,
            upkeep=backend.upkeep,
            runner=runner,
            settings=backend.maintainer,
            maintenance=backend.maintenance,
            roles=backend.settings,
            clock=self._clock,
            metrics=self._metrics,
            on_fatal=self._on_fatal,
        )
