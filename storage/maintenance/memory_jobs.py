"""The in-memory JobStore: the meaning of the protocol, for tests, simulations and tools.

Each write happens between two awaits of one event loop, so it is a transaction by construction.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lakebus.errors import IdempotencyConflict, LeaseLost
from storage.maintenance.jobs import Job, JobClaim, JobKind, JobRequest, JobState
from storage.memory_lake import MemoryLake
from storage.memory_state import JobRow


class MemoryJobs:
    """Keeps jobs in the lake's state; several of them over one lake are several processes."""

    def __init__(self, lake: MemoryLake) -> None:
        self._lake = lake

    async def submit(self, request: JobRequest) -> tuple[Job, bool]:
        await self._lake.reach()
        return self._submit(request)

    async def repeated(self, request: JobRequest) -> Job | None:
        await self._lake.reach()
        if request.idempotency_key is None:
            return None
        rows = self._lake.state.jobs.values()
        if not any(_same(row, request) for row in rows):
            return None
        return self._submit(request)[0]

    async def submit_due(self, kind: JobKind, *, every_s: float, requested_by: str) -> Job | None:
        await self._lake.reach()
        schedule, now = self._lake.state.job_schedule, self._lake.now()
        next_at = schedule.get(kind)
        if next_at is not None and now < next_at <= now + dt.timedelta(seconds=every_s * 1.1):
            return None
        jitter = self._lake.new_uuid().int % 1_000 / 1_000
        schedule[kind] = now + dt.timedelta(seconds=every_s * (1 + jitter / 10))
        return self._submit(JobRequest(kind, requested_by))[0]

    async def claim(
        self, owner: uuid.UUID, *, kinds: Sequence[JobKind], ttl_s: float
    ) -> JobClaim | None:
        await self._lake.reach()
        now = self._lake.now()
        for row in self._lake.state.jobs.values():
            free = row.job.state is JobState.QUEUED and row.not_before <= now
            expired = row.job.state is JobState.RUNNING and _expired(row, now)
            if row.job.kind in kinds and (free or expired):
                break
        else:
            return None
        self._lake.state.last_epoch += 1
        row.epoch = self._lake.state.last_epoch
        row.expires_at = now + dt.timedelta(seconds=ttl_s)
        row.job = replace(
            row.job,
            state=JobState.RUNNING,
            attempt=row.job.attempt + 1,
            started_at=row.job.started_at or now,
        )
        return JobClaim(row.job, row.epoch, ttl_s)

    async def renew(self, claim: JobClaim, *, ttl_s: float) -> None:
        row = await self._held(claim)
        row.expires_at = self._lake.now() + dt.timedelta(seconds=ttl_s)

    async def note(self, claim: JobClaim, report: Mapping[str, Any]) -> None:
        row = await self._held(claim)
        row.job = replace(row.job, report=_stored(report))

    async def finish(
        self,
        claim: JobClaim,
        report: Mapping[str, Any],
        *,
        error: Mapping[str, Any] | None = None,
    ) -> None:
        row = await self._held(claim, ended=True)
        if row.job.ended:
            return
        row.expires_at = None
        row.job = replace(
            row.job,
            state=JobState.DONE if error is None else JobState.FAILED,
            report=_stored(report),
            error=None if error is None else _stored(error),
            ended_at=self._lake.now(),
        )

    async def give_back(
        self, claim: JobClaim, *, delay_s: float, error: str, counted: bool = True
    ) -> None:
        row = await self._held(claim)
        row.expires_at = None
        row.not_before = self._lake.now() + dt.timedelta(seconds=delay_s)
        row.job = replace(
            row.job,
            state=JobState.QUEUED,
            attempt=row.job.attempt - (0 if counted else 1),
            error={"code": "given_back", "detail": error},
        )

    async def job(self, job_id: uuid.UUID) -> Job | None:
        await self._lake.reach()
        row = self._lake.state.jobs.get(job_id)
        return None if row is None else row.job

    async def jobs(
        self, *, limit: int = 100, before: dt.datetime | None = None, kind: JobKind | None = None
    ) -> Sequence[Job]:
        await self._lake.reach()
        found = [
            row.job
            for row in reversed(self._lake.state.jobs.values())
            if (kind is None or row.job.kind is kind)
            and (before is None or row.job.created_at < before)
        ]
        return found[:limit]

    async def forget(self, *, older_than_s: float) -> int:
        await self._lake.reach()
        until = self._lake.now() - dt.timedelta(seconds=older_than_s)
        jobs = self._lake.state.jobs
        old = [
            job_id
            for job_id, row in jobs.items()
            if row.key is None and row.job.ended_at is not None and row.job.ended_at < until
        ]
        for job_id in old:
            del jobs[job_id]
        return len(old)

    def _submit(self, request: JobRequest) -> tuple[Job, bool]:
        for row in self._lake.state.jobs.values():
            if _same(row, request):
                if request.idempotency_key and row.fingerprint != request.fingerprint:
                    raise IdempotencyConflict(
                        "the idempotency key was used for another request of this kind; make a "
                        "new key",
                        job_id=str(row.job.job_id),
                    )
                return row.job, True
        now = self._lake.now()
        job = Job(
            job_id=self._lake.new_uuid(),
            kind=request.kind,
            table_id=request.table_id,
            parameters=_stored(request.parameters),
            dry_run=request.dry_run,
            requested_by=request.requested_by,
            state=JobState.QUEUED,
            attempt=0,
            created_at=now,
        )
        keyed = request.idempotency_key is not None
        self._lake.state.jobs[job.job_id] = JobRow(
            job=job,
            principal_id=request.principal_id if keyed else None,
            key=request.idempotency_key,
            fingerprint=request.fingerprint if keyed else None,
            not_before=now,
        )
        return job, False

    async def _held(self, claim: JobClaim, *, ended: bool = False) -> JobRow:
        await self._lake.reach()
        row = self._lake.state.jobs.get(claim.job.job_id)
        ours = row is not None and row.epoch == claim.epoch
        if row is None or not ours or not (row.expires_at is not None or (ended and row.job.ended)):
            raise LeaseLost(f"the job {claim.job.job_id} belongs to another worker, or has ended")
        return row


def _same(row: JobRow, request: JobRequest) -> bool:
    job = row.job
    if request.idempotency_key is not None:
        known = (row.principal_id, job.kind, row.key)
        return known == (request.principal_id, request.kind, request.idempotency_key)
    return (
        not job.ended
        and job.kind is request.kind
        and job.table_id == request.table_id
        and job.dry_run == request.dry_run
        and job.parameters == _stored(request.parameters)
    )


def _expired(row: JobRow, now: dt.datetime) -> bool:
    return row.expires_at is not None and row.expires_at <= now


def _stored(document: Mapping[str, Any]) -> dict[str, Any]:
    """As the database keeps it: JSON, and nobody else's object."""

    kept: dict[str, Any] = json.loads(json.dumps(dict(document)))
    return kept
