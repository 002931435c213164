"""Jobs as Ray tasks: in processes of their own, at a low priority, ended when idle.

* The task opens the backend itself, by the factory that role processes use; no secret is an
  argument, and progress goes straight to the database.
* What is dear to start and safe to share, the cage of callers' predicates, stays between the jobs
  of a process. So their event loop runs in a thread that lives as long as the process does.
* Ray never retries it. Its process takes the next job, too, because starting one costs about two
  CPU seconds, more than most compactions; after a while without a job it ends, so an idle stack
  keeps no process for jobs, and whatever jobs leaked ends with it. Should Ray give it a job in that
  very moment, the job is given back as one whose process was killed.
* `memory` is what Ray's scheduler counts, and on machines that are full the job waits for its turn.
  `num_cpus=0`: jobs are bounded by their number and their priority, not by CPUs that roles hold.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import shutil
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError

from actors.backend import load_factory
from actors.job_process import run_claimed
from actors.processor_load import ProcessorLoad
from actors.ray_metrics import RayMetrics
from actors.runtime_settings import RuntimeSettings
from lakebus.clock import SystemClock
from lakebus.errors import Fault, Unavailable
from lakebus.telemetry import configure_logging
from storage.maintenance.jobs import JobClaim
from storage.maintenance.registry import memory_bytes_of

if TYPE_CHECKING:
    from storage.maintenance.cages import WarmCage

_LOG = logging.getLogger(__name__)

#: On top of what Ray gives its processes: a tenth of a processor that replicas want too. More of it
#: costs those who write twice the p99, and a flood of small files is slowed down anyway (ADR 13).
_NICENESS = 10


#: A process that ran so many jobs is not given another.
_JOBS_OF_A_PROCESS = 100


@dataclass(frozen=True, slots=True)
class JobOrder:
    """What the process of a job is told. `idle_s`: how long it waits for another job."""

    factory: str
    config: str
    log_level: str
    claim: JobClaim
    idle_s: float


class _Shared:
    """What the jobs of this process have in common: an event loop, and a cage once one of them
    needs it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._cage: WarmCage | None = None
        self._folder: Path | None = None

    def run(self, work: Coroutine[Any, Any, Mapping[str, Any]]) -> Mapping[str, Any]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="jobs", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def cage(self, jobs_dir: Path | None) -> WarmCage | None:
        if self._cage is None and jobs_dir is not None:
            from storage.maintenance.cages import WarmCage  # heavy; the scheduler needs none

            self._folder = jobs_dir / f"cage-{os.getpid()}"
            self._cage = WarmCage(self._folder)
        return self._cage

    def end(self) -> None:
        """Ends this process, and with it the cage."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(0)


_SHARED = _Shared()


class _IdleEnd:
    """Ends this process when it has been without a job for a while."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def busy(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def idle(self, idle_s: float) -> None:
        self._timer = threading.Timer(idle_s, _SHARED.end)
        self._timer.daemon = True
        self._timer.start()


_IDLE_END = _IdleEnd()


@functools.cache
def _step_back() -> None:
    """Once in a process: it adds to what the process has."""

    os.nice(_NICENESS)


@ray.remote(num_cpus=0, max_retries=0, max_calls=_JOBS_OF_A_PROCESS)
def lakebus_job(order: JobOrder) -> Mapping[str, Any]:
    _IDLE_END.busy()
    try:
        _step_back()
        configure_logging(service=f"job.{order.claim.job.kind}", level=order.log_level)
        return _SHARED.run(_run(order))
    finally:
        _IDLE_END.idle(order.idle_s)


async def _run(order: JobOrder) -> Mapping[str, Any]:
    metrics = RayMetrics()
    backend = await load_factory(order.factory)(order.config)
    try:
        cage = _SHARED.cage(backend.jobs_dir)
        return dict(await run_claimed(backend, order.claim, metrics=metrics, cage=cage))
    finally:
        await backend.close()
        metrics.flush()


class RayJobRunner:
    """Runs jobs as tasks of the cluster that this process belongs to."""

    def __init__(self, settings: RuntimeSettings, *, rewrite_memory_bytes: int) -> None:
        self._settings = settings
        self._rewrite_memory_bytes = rewrite_memory_bytes
        self._load = ProcessorLoad(clock=SystemClock())
        self._at_work = 0

    def busy(self) -> bool:
        """Of this machine: jobs need no processor by Ray's count, so they mostly run here."""

        return self._load.busy(ours=self._at_work > 0)

    async def run(self, claim: JobClaim) -> Mapping[str, Any]:
        self._at_work += 1
        try:
            return await self._run(claim)
        finally:
            self._at_work -= 1

    async def _run(self, claim: JobClaim) -> Mapping[str, Any]:
        settings, kind = self._settings, claim.job.kind
        options: dict[str, Any] = {
            "name": f"lakebus:job:{kind}",
            "memory": memory_bytes_of(kind, rewrite_memory_bytes=self._rewrite_memory_bytes),
        }
        if settings.env:
            options["runtime_env"] = {"env_vars": dict(settings.env)}
        order = JobOrder(
            settings.factory, settings.config, settings.log_level, claim, settings.job_idle_s
        )
        task = lakebus_job.options(**options).remote(order)
        try:
            report: Mapping[str, Any] = await task
        except asyncio.CancelledError:
            # At once: a job may be ended at any point, and what it did so far is recorded.
            ray.cancel(task, force=True)
            raise
        except TaskCancelledError as error:
            raise Unavailable("the process of the job was told to stop") from error
        except RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, Exception) else Fault(str(error))) from error
        except RayError as error:
            text = f"the process of the job is lost: {type(error).__name__}"
            raise Unavailable(text) from error
        return report
