"""What the process of jobs does: one job after another, at a low priority, until it has had none
for a while.

* The backend is opened by the factory that role processes use; no secret is an argument, and
  progress goes straight to the database.
* What is dear to start and safe to share, the cage of callers' predicates, stays between the jobs
  of a process. So their event loop runs in a thread that lives as long as the process does.
* It imports nothing of the scheduler: starting costs as much as merging half a million rows.
"""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.backend import load_factory
from actors.job_process import run_claimed
from actors.ray_metrics import RayMetrics
from lakebus.telemetry import configure_logging
from storage.arrow_alone import leave_pandas_out
from storage.maintenance.jobs import JobClaim

if TYPE_CHECKING:
    from storage.maintenance.cages import WarmCage

#: On top of what Ray gives its processes: a tenth of a processor that replicas want too. More of it
#: costs those who write twice the p99, and a flood of small files is slowed down anyway (ADR 13).
_NICENESS = 10


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
def _begin() -> None:
    """Once in a process: niceness adds to what the process has."""

    os.nice(_NICENESS)
    leave_pandas_out()


def run_order(order: JobOrder) -> Mapping[str, Any]:
    """Runs one job, and answers its report. Raises what the job raised."""

    _IDLE_END.busy()
    try:
        _begin()
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
