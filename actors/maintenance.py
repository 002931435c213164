"""The maintainer: asks for the jobs whose time has come, and has them run, a few at a time.

What is authoritative: the record of jobs in the database. Several maintainers may live: a periodic
job is submitted once, and a job is one worker's by its lease. A maintainer that dies leaves a lease
that expires. The work itself happens elsewhere (`actors.job_runner`: a process of its own at low
priority), so that nothing of it is on the event loop that ingest and publish share.

How a run ends: with a report, `done`; store or catalog away, or its process lost, it is given back
and tried again after a growing pause, a bounded number of times; any other error says that trying
again would not help, `failed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.compaction_due import CompactionDue, Due
from actors.loop import LoopStatus, OnFatal, RoleLoop, run_steps
from actors.settings import MaintainerSettings, RoleSettings
from lakebus.clock import SYSTEM_CHANCE, Chance, Clock
from lakebus.errors import (
    LakebusError,
    LeaseLost,
    OutcomeUnknown,
    RetryLater,
    StartRefused,
    Unavailable,
)
from lakebus.telemetry import Metrics
from storage.catalog.interface import Catalog
from storage.maintenance.interface import Upkeep
from storage.maintenance.jobs import (
    Job,
    JobClaim,
    JobKind,
    JobRequest,
    JobStore,
    publication_of,
)
from storage.maintenance.registry import LANES
from storage.maintenance.settings import MaintenanceSettings

_LOG = logging.getLogger(__name__)
SCHEDULER = "scheduler"

#: So many attempts more has a job that published and could not say so.
_LAST_LOOKS = 5
#: How often the store is asked at most whether a periodic job is due.
_ASK_S_MAX = 30.0
_FORGET_EVERY_S = 3_600.0
#: The snapshot that a new lake has.
_EMPTY = 1


class JobRunner(Protocol):
    """Where the work of a job is done."""

    async def run(self, claim: JobClaim) -> Mapping[str, Any]:
        """The job's report. Raises what the job raised, or Unavailable when its process is lost.
        Cancelling the call ends the work."""
        ...

    def busy(self) -> bool:
        """Whether there is better to do where jobs run: what can wait does. Asked at each tick."""
        ...


@dataclass(slots=True)
class MaintainerReport:
    """What one tick did: the jobs it submitted and began, and the steps that have to wait."""

    submitted: list[Job] = field(default_factory=list)
    began: list[Job] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class Maintainer:
    def __init__(
        self,
        *,
        instance: uuid.UUID,
        jobs: JobStore,
        catalog: Catalog,
        upkeep: Upkeep,
        runner: JobRunner,
        settings: MaintainerSettings,
        maintenance: MaintenanceSettings,
        roles: RoleSettings,
        clock: Clock,
        metrics: Metrics,
        on_fatal: OnFatal,
        chance: Chance = SYSTEM_CHANCE,
    ) -> None:
        self._instance = instance
        self._jobs = jobs
        self._catalog = catalog
        self._upkeep = upkeep
        self._runner = runner
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._chance = chance
        self._running: list[set[asyncio.Task[None]]] = [set() for _ in LANES]
        self._next_ask_s: dict[JobKind, float] = {}
        self._began_s = clock.monotonic_s()
        self._compactions = CompactionDue(
            catalog=catalog,
            upkeep=upkeep,
            settings=settings,
            maintenance=maintenance,
            clock=clock,
        )
        self._forgot_s = float("-inf")
        self._failing: list[str] = []
        self._loop = RoleLoop(
            role="maintenance",
            turn=self._turn,
            settings=roles,
            clock=clock,
            metrics=metrics,
            on_fatal=on_fatal,
            chance=chance,
        )

    def start(self) -> None:
        self._loop.start()

    async def stop(self) -> None:
        """Ends the jobs that run, and gives them back."""

        await self._loop.stop()
        running = self._tasks()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def wake(self) -> None:
        self._loop.wake.set()

    def status(self) -> LoopStatus:
        return self._loop.status()

    async def idle(self) -> None:
        """Waits until the jobs that run now have ended."""

        await asyncio.gather(*self._tasks())

    async def run_once(self) -> MaintainerReport:
        """One tick. Jobs go on when it has returned. Raises what is not absence of the catalog."""

        report, busy = MaintainerReport(), self._runner.busy()
        report.failed = await run_steps(
            "maintainer",
            (
                ("compaction", lambda: self._submit_compaction(report, busy=busy)),
                ("periodic", lambda: self._submit_periodic(report, busy=busy)),
                ("forget", self._forget),
                ("claim", lambda: self._claim(report)),
            ),
            failing=self._failing,
        )
        self._failing = report.failed
        return report

    async def _turn(self) -> float:
        await self.run_once()
        return self._settings.tick_ms / 1e3

    # --- what is due ------------------------------------------------------------------------

    async def _submit_compaction(self, report: MaintainerReport, *, busy: bool) -> None:
        due = await self._compactions.look(busy=busy) if self._settings.enabled else None
        if due is None:
            return
        parameters = {"small": True} if due is Due.SMALL else {}
        request = JobRequest(JobKind.COMPACT, SCHEDULER, parameters=parameters)
        job, was_there = await self._jobs.submit(request)
        if not was_there:
            report.submitted.append(job)
        self._compactions.submitted(due)

    async def _submit_periodic(self, report: MaintainerReport, *, busy: bool) -> None:
        """On a busy machine each waits a tenth of its period longer, at most. A lake that nothing
        was ever published in has nothing for them."""

        if not self._settings.enabled:
            return
        now = self._clock.monotonic_s()
        for kind, every_s in self._settings.periods().items():
            ask_s = self._next_ask_s.get(kind, self._began_s)
            if now < ask_s + (every_s / 10 if busy else 0.0):
                continue
            self._next_ask_s[kind] = now + min(every_s / 20, _ASK_S_MAX)
            if (await self._catalog.head()).snapshot_id <= _EMPTY:
                continue
            job = await self._jobs.submit_due(kind, every_s=every_s, requested_by=SCHEDULER)
            if job is not None:
                report.submitted.append(job)

    async def _forget(self) -> None:
        now = self._clock.monotonic_s()
        if now >= self._forgot_s + _FORGET_EVERY_S:
            await self._jobs.forget(older_than_s=self._settings.jobs_keep_s)
            self._forgot_s = now

    # --- running ----------------------------------------------------------------------------

    async def _claim(self, report: MaintainerReport) -> None:
        for kinds, running in zip(LANES, self._running, strict=True):
            while len(running) < self._settings.jobs_at_once:
                claim = await self._jobs.claim(
                    self._instance, kinds=kinds, ttl_s=self._settings.lease_ttl_s
                )
                if claim is None:
                    break
                # failpoint: maintainer.after_claim
                report.began.append(claim.job)
                task = asyncio.get_running_loop().create_task(self._work(claim), name="job")
                running.add(task)
                task.add_done_callback(functools.partial(self._ended, running))
                self._count_running()

    def _ended(self, running: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
        running.discard(task)
        self._count_running()
        self.wake()

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [task for running in self._running for task in running]

    def _count_running(self) -> None:
        self._metrics.gauge("lakebus_jobs_running_count", len(self._tasks()))

    async def _work(self, claim: JobClaim) -> None:
        """Runs a claimed job to its end. Raises nothing but CancelledError."""

        began_s = self._clock.monotonic_s()
        kind = claim.job.kind
        try:
            outcome = await self._outcome(claim)
        except LeaseLost:
            outcome = "lease_lost"
        except asyncio.CancelledError:
            with contextlib.suppress(LakebusError):  # its lease expires
                await self._jobs.give_back(
                    claim, delay_s=0, error="the worker was told to stop", counted=False
                )
            raise
        except Exception:  # noqa: BLE001 - recorded here; nobody awaits this task
            # The end could not be written: the lease expires, and somebody runs the job again.
            _LOG.exception("the end of the %s job %s was not recorded", kind, claim.job.job_id)
            outcome = "not_recorded"
        self._metrics.count("lakebus_jobs_ended_total", kind=kind.value, outcome=outcome)
        self._metrics.observe(
            "lakebus_job_seconds", self._clock.monotonic_s() - began_s, kind=kind.value
        )

    async def _outcome(self, claim: JobClaim) -> str:
        job = claim.job
        begun_too_often = (
            job.fruitless_attempts > self._settings.attempts_max and job.kind is not JobKind.ERASE
        )
        if begun_too_often and not await self._has_published(job):
            # It takes its process down each time.
            text = f"the job was begun {job.attempt - 1} times and never came to an end"
            await self._fail(claim, {"code": "internal_error", "detail": text})
            return "failed"
        try:
            report = await self._run_leased(claim)
        except LeaseLost:
            raise
        except (RetryLater, OutcomeUnknown, StartRefused) as error:
            # The last one is a process of another version than the database's: an upgrade goes on.
            return await self._give_back(claim, error)
        except LakebusError as error:
            _LOG.warning("the %s job %s failed: %s", job.kind, job.job_id, error)
            return await self._give_up(claim, error.code, error.detail)
        except Exception as error:  # noqa: BLE001 - whatever it was, the job has failed
            _LOG.exception("the %s job %s failed", job.kind, job.job_id)
            text = f"a bug or damage met by the job: {type(error).__name__}; see the log"
            return await self._give_up(claim, "internal_error", text)
        # failpoint: maintainer.before_finish
        await self._surely(lambda: self._jobs.finish(claim, report))
        return "done"

    async def _run_leased(self, claim: JobClaim) -> Mapping[str, Any]:
        """Runs the job while its lease is renewed; whichever fails first ends the other."""

        loop = asyncio.get_running_loop()
        run = loop.create_task(_awaited(self._runner.run(claim)), name="run")
        renewals = loop.create_task(self._keep(claim), name="renewals")
        bound = loop.create_task(self._clock.sleep_s(self._settings.job_s_max), name="bound")
        tasks: tuple[asyncio.Task[Any], ...] = (run, renewals, bound)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if run.done():
                return run.result()
            if renewals.done():
                renewals.result()
            raise Unavailable(f"the job did not end within {self._settings.job_s_max:.0f} s")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, claim: JobClaim) -> None:
        """Renews until LeaseLost. An absent catalog is no reason to stop: only it can say that
        somebody else has the job."""

        while True:
            await self._clock.sleep_s(self._settings.lease_ttl_s / 3)
            try:
                await self._jobs.renew(claim, ttl_s=self._settings.lease_ttl_s)
            except (RetryLater, OutcomeUnknown) as error:
                _LOG.info("the lease of the job %s waits: %s", claim.job.job_id, error)

    async def _give_back(self, claim: JobClaim, error: LakebusError) -> str:
        settings = self._settings
        job = await self._noted(claim.job)
        _LOG.warning("the %s job %s has to wait: %s", job.kind, job.job_id, error)
        # An erasure is owed: it is tried until it is done.
        if job.fruitless_attempts >= settings.attempts_max and job.kind is not JobKind.ERASE:
            text = f"gave up after {job.attempt} attempts: {error.detail}"
            return await self._give_up(claim, error.code, text)
        doublings = min(max(job.fruitless_attempts - 1, 0), 30)
        whole = min(self._pause_s_max(job), settings.backoff_s * 2.0**doublings)
        delay_s = whole * (1.0 + self._chance.jitter()) / 2
        await self._surely(lambda: self._jobs.give_back(claim, delay_s=delay_s, error=error.detail))
        return "given_back"

    async def _noted(self, job: Job) -> Job:
        """The job with what this attempt has noted, if the database tells."""

        with contextlib.suppress(RetryLater, OutcomeUnknown):
            return await self._jobs.job(job.job_id) or job
        return job

    def _pause_s_max(self, job: Job) -> float:
        """A compaction waits no longer than until the next one would be due: small files come in
        meanwhile, and an equal job that is asked for is this one."""

        settings = self._settings
        if job.kind is not JobKind.COMPACT:
            return settings.backoff_s_max
        return min(settings.backoff_s_max, max(settings.backoff_s, settings.compact_every_s))

    async def _give_up(self, claim: JobClaim, code: str, detail: str) -> str:
        """Ends the job as failed, unless it did what it was asked for: then all that another
        attempt has to do is to read that back, and it gets the chance."""

        if await self._has_published(claim.job):
            await self._surely(
                lambda: self._jobs.give_back(
                    claim, delay_s=self._settings.backoff_s_max, error=detail
                )
            )
            return "given_back"
        await self._fail(claim, {"code": code, "detail": detail})
        return "failed"

    async def _has_published(self, job: Job) -> bool:
        """Of a job that publishes once, and while another attempt is worth its while."""

        last = self._settings.attempts_max + _LAST_LOOKS
        if job.kind not in (JobKind.DELETE, JobKind.ERASE) or job.attempt > last:
            return False
        return await self._upkeep.swap_outcome(publication_of(job.job_id)) is not None

    async def _fail(self, claim: JobClaim, error: Mapping[str, Any]) -> None:
        """The report is what the job noted last."""

        async def write() -> None:
            noted = await self._jobs.job(claim.job.job_id)
            await self._jobs.finish(claim, {} if noted is None else noted.report, error=error)

        await self._surely(write)

    async def _surely(self, write: Callable[[], Awaitable[None]]) -> None:
        """Writes the end of a job, however often the catalog is away: within one lease time. All
        these writes may be repeated under one epoch; one that had happened already says so."""

        until_s = self._clock.monotonic_s() + self._settings.lease_ttl_s
        unknown = False
        while True:
            try:
                await write()
                return
            except LeaseLost:
                if unknown:  # it was given back the first time
                    return
                raise
            except (RetryLater, OutcomeUnknown) as error:
                unknown = unknown or isinstance(error, OutcomeUnknown)
                if self._clock.monotonic_s() >= until_s:
                    raise
                await self._clock.sleep_s(self._settings.backoff_s)


async def _awaited(run: Awaitable[Mapping[str, Any]]) -> Mapping[str, Any]:
    return await run
