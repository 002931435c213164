"""Jobs as Ray tasks: in processes of their own, at a low priority, ended when idle.

* Ray never retries it. Its process (`actors.job_worker`) takes the next job, too, because starting
  one costs more than most compactions; after a while without a job it ends, so an idle stack keeps
  no process for jobs, and whatever jobs leaked ends with it. Should Ray give it a job in that very
  moment, the job is given back as one whose process was killed.
* `memory` is what Ray's scheduler counts, and on machines that are full the job waits for its turn.
  `num_cpus=0`: jobs are bounded by their number and their priority, not by CPUs that roles hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError

from actors.job_worker import JobOrder
from actors.processor_load import ProcessorLoad
from actors.runtime_settings import RuntimeSettings
from lakebus.clock import SystemClock
from lakebus.errors import Fault, Unavailable
from storage.maintenance.jobs import JobClaim
from storage.maintenance.registry import memory_bytes_of

#: A process that ran so many jobs is not given another.
_JOBS_OF_A_PROCESS = 100


@ray.remote(num_cpus=0, max_retries=0, max_calls=_JOBS_OF_A_PROCESS)
def lakebus_job(order: JobOrder) -> Mapping[str, Any]:
    # Ray hands this function on by value: what it imports here is all that a job's process loads.
    from actors.job_worker import run_order

    return run_order(order)


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
