"""Jobs as Ray tasks: in processes of their own, at the lowest priority, ended when idle.

* The task opens the backend itself, by the factory that role processes use; no secret is an
  argument, and progress goes straight to the database.
* Ray never retries it. Its process takes the next job, too, because starting one costs about two
  CPU seconds, more than most compactions; after a while without a job it ends, so an idle stack
  keeps no process for jobs, and whatever jobs leaked ends with it. Should Ray give it a job in that
  very moment, the job is given back as one whose process was killed.
* `memory` is what Ray's scheduler counts, and on machines that are full the job waits for its turn.
  `num_cpus=0`: jobs are bounded by their number and their priority, not by CPUs that roles hold.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError

from actors.backend import load_factory
from actors.job_process import run_claimed
from actors.ray_metrics import RayMetrics
from actors.runtime_settings import RuntimeSettings
from lakebus.errors import Fault, Unavailable
from lakebus.telemetry import configure_logging
from storage.maintenance.jobs import JobClaim
from storage.maintenance.registry import memory_bytes_of

_LOG = logging.getLogger(__name__)

#: On top of what Ray gives its processes; the kernel takes the highest it has.
_NICENESS = 19


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


class _IdleEnd:
    """Ends this process when it has been without a job for a while."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def busy(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def idle(self, idle_s: float) -> None:
        self._timer = threading.Timer(idle_s, os._exit, (0,))
        self._timer.daemon = True
        self._timer.start()


_IDLE_END = _IdleEnd()


@ray.remote(num_cpus=0, max_retries=0, max_calls=_JOBS_OF_A_PROCESS)
def lakebus_job(order: JobOrder) -> Mapping[str, Any]:
    _IDLE_END.busy()
    try:
        os.nice(_NICENESS)
        configure_logging(service=f"job.{order.claim.job.kind}", level=order.log_level)
        return asyncio.run(_run(order))
    finally:
        _IDLE_END.idle(order.idle_s)


async def _run(order: JobOrder) -> Mapping[str, Any]:
    metrics = RayMetrics()
    backend = await load_factory(order.factory)(order.config)
    try:
        return dict(await run_claimed(backend, order.claim, metrics=metrics))
    finally:
        await backend.close()
        metrics.flush()


class RayJobRunner:
    """Runs jobs as tasks of the cluster that this process belongs to."""

    def __init__(self, settings: RuntimeSettings, *, rewrite_memory_bytes: int) -> None:
        self._settings = settings
        self._rewrite_memory_bytes = rewrite_memory_bytes

    async def run(self, claim: JobClaim) -> Mapping[str, Any]:
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
