"""Runs one job where it is: a folder of its own, the body, and nothing left behind.

The process that does it may be killed at any point. What it leaves in the store is a write intent
or a condemned file, which collection ends; what it leaves on disk lies below the folder of jobs
under the job's id, and the next job clears it away.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.backend import Backend
from lakebus.clock import SYSTEM_CHANCE, Chance, Clock, SystemClock
from lakebus.errors import Fault
from lakebus.telemetry import NO_METRICS, Metrics
from storage.maintenance.jobs import JobBody, JobClaim, JobContext, JobKind
from storage.maintenance.registry import body_of

if TYPE_CHECKING:  # the scheduler needs no engine
    from storage.maintenance.cages import WarmCage

_LOG = logging.getLogger(__name__)
#: A folder that nothing was written to for so long is nobody's any more, whatever its job.
LEFTOVER_AGE_S = 24 * 3600.0

BodyOf = Callable[[JobKind], JobBody]


async def run_claimed(
    backend: Backend,
    claim: JobClaim,
    *,
    body_of: BodyOf = body_of,
    clock: Clock | None = None,
    chance: Chance = SYSTEM_CHANCE,
    metrics: Metrics = NO_METRICS,
    cage: WarmCage | None = None,
) -> Mapping[str, Any]:
    """The report of the job. Raises what its body raises; LeaseLost once it is not ours. `cage`:
    one that this process keeps between jobs."""

    jobs, upkeep, engine, folder = backend.jobs, backend.upkeep, backend.engine, backend.jobs_dir
    if jobs is None or upkeep is None or engine is None or folder is None:
        raise Fault("the backend was opened without what maintenance stands on")
    body = await asyncio.to_thread(body_of, claim.job.kind)  # it imports for a second

    async def note(report: Mapping[str, Any]) -> None:
        await jobs.note(claim, report)

    temp_dir = await asyncio.to_thread(_new_folder, folder, claim)
    try:
        # failpoint: job.before_body
        context = JobContext(
            catalog=backend.catalog,
            upkeep=upkeep,
            bus=backend.bus,
            store=backend.store,
            settings=backend.maintenance,
            engine=dataclasses.replace(engine, temp_directory=str(temp_dir / "spill")),
            temp_dir=temp_dir,
            clock=clock or SystemClock(),
            chance=chance,
            note=note,
            inspection=backend.inspection,
            metrics=metrics,
            erasing=backend.erasing,
            cage=cage,
        )
        return await body(context, claim.job)
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


class LocalJobRunner:
    """Runs jobs on the event loop of their Maintainer, over the same backend: for tests and tools,
    and where no Ray is."""

    def __init__(self, backend: Backend, *, body_of: BodyOf = body_of) -> None:
        self._backend = backend
        self._body_of = body_of

    async def run(self, claim: JobClaim) -> Mapping[str, Any]:
        return await run_claimed(self._backend, claim, body_of=self._body_of)

    def busy(self) -> bool:
        return False  # tools and tests wait for nobody


def _new_folder(parent: Path, claim: JobClaim) -> Path:
    """The folder of this attempt, after earlier ones of the job, and old ones of others, are
    removed. An earlier worker that still runs fails without them; it has lost its lease anyway."""

    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for leftover in parent.iterdir():
        if _is_of(leftover, claim.job.job_id) or _age_s(leftover) > LEFTOVER_AGE_S:
            _LOG.info("clearing away the leftover of a job: %s", leftover.name)
            shutil.rmtree(leftover, ignore_errors=True)
    folder = parent / f"{claim.job.job_id}.{claim.epoch}"
    (folder / "spill").mkdir(mode=0o700, parents=True)
    return folder


def _is_of(folder: Path, job_id: uuid.UUID) -> bool:
    return folder.name.split(".")[0] == str(job_id)


def _age_s(folder: Path) -> float:
    try:
        return time.time() - folder.stat().st_mtime
    except OSError:  # another job clears away too
        return 0.0
