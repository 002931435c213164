"""A lake in memory with maintainers over it, and runners that do as they are told."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from typing import Any

from actors.maintenance import JobRunner, Maintainer
from actors.settings import MaintainerSettings
from lakebus.clock import new_uuid
from storage.catalog.memory_upkeep import MemoryUpkeep
from storage.maintenance.jobs import Job, JobClaim, JobKind, JobRequest
from storage.maintenance.memory_jobs import MemoryJobs
from storage.maintenance.settings import MaintenanceSettings
from storage.memory_clock import ManualClock
from tests.unit.actors_rig import Rig

SETTINGS = MaintainerSettings(
    tick_ms=10,
    retain_every_s=600,
    collect_every_s=600,
    validate_every_s=86_400,
    lease_ttl_s=30,
    attempts_max=3,
    backoff_s=8,
    backoff_s_max=10,
)
ASKED = JobRequest(JobKind.COMPACT, "someone")


class ScriptedRunner:
    """Runs a job by what the test says: a report, an error, or a wait for `gate`."""

    def __init__(self, *ends: Mapping[str, Any] | Exception, gate: asyncio.Event | None = None):
        self.ends = list(ends) or [{"files_in": 1}]
        self.gate = gate
        self.begun: list[JobClaim] = []
        self.began = asyncio.Event()
        self.cancelled = 0
        self.is_busy = False

    def busy(self) -> bool:
        return self.is_busy

    async def run(self, claim: JobClaim) -> Mapping[str, Any]:
        self.begun.append(claim)
        self.began.set()
        try:
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        end = self.ends.pop(0) if len(self.ends) > 1 else self.ends[0]
        if isinstance(end, Exception):
            raise end
        return end


class World:
    """A lake and the maintainers over it."""

    def __init__(self) -> None:
        self.rig = Rig()
        self.clock = self.rig.clock
        self.jobs = MemoryJobs(self.rig.lake)
        self.upkeep = MemoryUpkeep(self.rig.lake)

    def maintainer(self, runner: JobRunner, *, jobs: Any = None, **changes: Any) -> Maintainer:
        quiet = {"enabled": False, **changes}
        return Maintainer(
            instance=new_uuid(),
            jobs=jobs or self.jobs,
            catalog=self.rig.catalog,
            upkeep=self.upkeep,
            runner=runner,
            settings=dataclasses.replace(SETTINGS, **quiet),
            maintenance=MaintenanceSettings(inputs_min=3, small_files_max=5),
            roles=self.rig.settings,
            clock=self.clock,
            metrics=self.rig.metrics,
            on_fatal=self.rig.deaths,
        )

    async def ask(self, request: JobRequest = ASKED) -> Job:
        return (await self.jobs.submit(request))[0]

    async def found(self, job: Job) -> Job:
        found = await self.jobs.job(job.job_id)
        assert found is not None
        return found

    def advance_s(self, seconds: float) -> None:
        assert isinstance(self.clock, ManualClock)
        self.clock.advance_s(seconds)


async def tick(maintainer: Maintainer) -> list[Job]:
    report = await maintainer.run_once()
    await maintainer.idle()
    return report.began
