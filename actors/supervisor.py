"""The supervisor: compares what should be with what is, and does the next step towards it.

Level-triggered: each tick looks at the whole state and needs no memory of the last one, so it may
be killed at any point, and two of them are only wasteful. Its steps do not depend on each other, so
one that cannot be done now does not hold up the others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from actors.loop import LoopStatus, OnFatal, RoleLoop, run_steps
from actors.settings import RoleSettings
from lakebus.clock import SYSTEM_CHANCE, Chance, Clock
from lakebus.telemetry import Metrics
from storage.bus.interface import IngestBus, PurgeReport
from storage.catalog.interface import Catalog

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RoleState:
    """What a look at one role found. `age_s` is None when the role does not answer."""

    role: str
    exists: bool
    age_s: float | None = None


class Crew(Protocol):
    """The roles that somebody can start and replace; `actors.runtime` has the Ray ones."""

    async def look(self) -> Sequence[RoleState]:
        """The state of every role that should live."""
        ...

    async def create(self, role: str) -> None:
        """Starts the role unless it is there."""
        ...

    async def replace(self, role: str) -> None:
        """Ends what is there under the role's name, and starts it anew."""
        ...

    async def end_strangers(self) -> Sequence[str]:
        """Ends roles of this stack that are not wanted any more, such as those of an older code
        version, and returns their names."""
        ...


class NoCrew:
    """Where all roles share the supervisor's process there is nobody to look after."""

    async def look(self) -> Sequence[RoleState]:
        return ()

    async def create(self, role: str) -> None:
        return

    async def replace(self, role: str) -> None:
        return

    async def end_strangers(self) -> Sequence[str]:
        return ()


@dataclass(slots=True)
class SupervisorReport:
    """What one tick did, and the names of the steps that failed."""

    created: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    drops_finished: list[str] = field(default_factory=list)
    purge: PurgeReport | None = None
    failed: list[str] = field(default_factory=list)


class Supervisor:
    def __init__(
        self,
        *,
        bus: IngestBus,
        catalog: Catalog,
        crew: Crew,
        settings: RoleSettings,
        clock: Clock,
        metrics: Metrics,
        on_fatal: OnFatal,
        chance: Chance = SYSTEM_CHANCE,
    ) -> None:
        self._bus = bus
        self._catalog = catalog
        self._crew = crew
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._purged_s = float("-inf")
        self._silent: dict[str, float] = {}
        self._failing: list[str] = []
        self._loop = RoleLoop(
            role="supervisor",
            turn=self._turn,
            settings=settings,
            clock=clock,
            metrics=metrics,
            on_fatal=on_fatal,
            chance=chance,
        )

    def start(self) -> None:
        self._loop.start()

    async def stop(self) -> None:
        await self._loop.stop()

    def wake(self) -> None:
        self._loop.wake.set()

    def status(self) -> LoopStatus:
        return self._loop.status()

    async def run_once(self) -> SupervisorReport:
        """One tick. Raises what a step raised that is not absence of store, catalog or crew."""

        report = SupervisorReport()
        report.failed = await run_steps(
            "supervisor",
            (
                ("crew", lambda: self._look_after_crew(report)),
                ("drops", lambda: self._finish_drops(report)),
                ("purge", lambda: self._purge(report)),
                ("backlog", lambda: self._measure_backlog(report)),
            ),
            failing=self._failing,
        )
        self._failing = report.failed
        return report

    async def _turn(self) -> float:
        await self.run_once()
        return self._settings.supervisor_tick_ms / 1e3

    async def _look_after_crew(self, report: SupervisorReport) -> None:
        for state in await self._crew.look():
            if not state.exists:
                self._silent.pop(state.role, None)
                await self._crew.create(state.role)
                report.created.append(state.role)
                self._metrics.count("lakebus_role_replaced_total", role=state.role, reason="gone")
            elif self._is_stale(state):
                self._silent.pop(state.role, None)
                await self._crew.replace(state.role)
                report.replaced.append(state.role)
                self._metrics.count("lakebus_role_replaced_total", role=state.role, reason="stale")
        report.ended += await self._crew.end_strangers()

    def _is_stale(self, state: RoleState) -> bool:
        """Its loop stands still, or it has not answered for as long (a restart takes a while)."""

        if state.age_s is not None:
            self._silent.pop(state.role, None)
            self._metrics.gauge("lakebus_role_tick_age_seconds", state.age_s, role=state.role)
            return state.age_s > self._settings.tick_age_s_max
        now = self._clock.monotonic_s()
        since_s = self._silent.setdefault(state.role, now)
        return now - since_s > self._settings.tick_age_s_max

    async def _finish_drops(self, report: SupervisorReport) -> None:
        watermark: dict[int, int] | None = None
        for ticket in await self._catalog.closing_tables():
            if watermark is None:
                watermark = dict((await self._catalog.head()).watermark)
            if all(watermark.get(shard, 0) >= end for shard, end in ticket.positions.items()):
                await self._catalog.finish_drop(ticket)
                report.drops_finished.append(ticket.name)
                self._metrics.count("lakebus_drops_finished_total")

    async def _purge(self, report: SupervisorReport) -> None:
        now = self._clock.monotonic_s()
        if now < self._purged_s + self._settings.purge_every_s:
            return
        report.purge = await self._bus.purge()
        self._purged_s = now
        self._metrics.count("lakebus_purged_segments_total", report.purge.segments_truncated)
        if report.purge.gave_up_on_lock:
            self._metrics.count("lakebus_purge_refused_total")

    async def _measure_backlog(self, report: SupervisorReport) -> None:
        for status in await self._bus.shard_status():
            shard = str(status.shard)
            self._metrics.gauge("lakebus_backlog_entries", status.backlog_entries, shard=shard)
            self._metrics.gauge("lakebus_backlog_bytes", status.backlog_bytes, shard=shard)
            self._metrics.gauge("lakebus_backlog_age_seconds", status.backlog_age_s, shard=shard)
            self._metrics.gauge("lakebus_bus_end_position", status.end, shard=shard)
            self._metrics.gauge("lakebus_watermark_position", status.watermark, shard=shard)
