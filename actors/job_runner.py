"""Jobs as Ray tasks: a process of its own for each job, at the lowest priority, ended after it.

* The task opens the backend itself, by the factory that role processes use; no secret is an
  argument, and progress goes straight to the database.
* Ray never retries it, and never runs a second job in its process: whatever a job leaked ends with
  it, and an idle stack keeps no process for jobs.
* `memory` is what Ray's scheduler counts, and on machines that are full the job waits for its turn.
  `num_cpus=0`: jobs are bounded by their number and their priority, not by CPUs that roles hold.
"""

from __future__ import annotations

import asyncio
import logging
import os
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


@dataclass(frozen=True, slots=True)
class JobOrder:
    """What the process of a job is told."""

    factory: str
    config: str
    log_level: str
    claim: JobClaim


@ray.remote(num_cpus=0, max_retries=0, max_calls=1)
def lakebus_job(order: JobOrder) -> Mapping[str, Any]:
    os.nice(_NICENESS)
    configure_logging(service=f"job.{order.claim.job.kind}", level=order.log_level)
    return asyncio.run(_run(order))


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
        order = JobOrder(settings.factory, settings.config, settings.log_level, claim)
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
