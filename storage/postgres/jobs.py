"""Jobs of maintenance in PostgreSQL. See `storage.maintenance.jobs.JobStore` for what is promised.

What decides anything is in `storage/sql/functions/jobs.sql`; the rest is single statements.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from lakebus.clock import SYSTEM_CHANCE, Chance
from lakebus.errors import Fault, IdempotencyConflict, LeaseLost
from storage.maintenance.jobs import Job, JobClaim, JobKind, JobRequest, JobState
from storage.postgres.failures import reading, writing
from storage.postgres.pool import Pool

_SUBMIT = "SELECT * FROM submit_job($1, $2, $3, $4, $5, $6, $7, $8, $9)"
_JOBS = """
SELECT * FROM job
 WHERE created_at < coalesce($2, 'infinity'::timestamptz) AND ($3::text IS NULL OR kind = $3)
 ORDER BY created_at DESC, job_id LIMIT $1"""
_KEYED = "SELECT * FROM job WHERE principal_id = $1 AND kind = $2 AND idempotency_key = $3"
_RENEW = """
UPDATE job SET expires_at = clock_timestamp() + $3::interval
 WHERE job_id = $1 AND epoch = $2 AND state = 'running' RETURNING job_id"""
_NOTE = """
UPDATE job SET report = $3
 WHERE job_id = $1 AND epoch = $2 AND state = 'running' RETURNING job_id"""
_GIVE_BACK = """
UPDATE job SET state = 'queued', owner = NULL, expires_at = NULL, error = $4,
               not_before = clock_timestamp() + $3::interval, attempt = attempt - $5::integer
 WHERE job_id = $1 AND epoch = $2 AND state = 'running' RETURNING job_id"""
_FORGET = """
DELETE FROM job WHERE state IN ('done', 'failed') AND idempotency_key IS NULL
   AND ended_at < clock_timestamp() - $1::interval"""


class PostgresJobs:
    def __init__(self, *, pool: Pool, chance: Chance = SYSTEM_CHANCE) -> None:
        self._pool = pool
        self._chance = chance

    async def submit(self, request: JobRequest) -> tuple[Job, bool]:
        keyed = request.idempotency_key is not None
        async with self._pool.connection() as connection:
            with writing():
                row = await connection.fetchrow(
                    _SUBMIT,
                    self._chance.new_uuid(),
                    request.kind.value,
                    request.table_id,
                    dict(request.parameters),
                    request.dry_run,
                    request.requested_by,
                    request.principal_id if keyed else None,
                    request.idempotency_key,
                    request.fingerprint if keyed else None,
                )
        assert row is not None
        if row["conflict"]:
            raise _conflict(row["found_id"])
        job = await self.job(row["found_id"])
        if job is None:
            raise Fault(f"the job {row['found_id']} is gone right after it was made")
        return job, row["was_there"]

    async def repeated(self, request: JobRequest) -> Job | None:
        if request.idempotency_key is None:
            return None
        async with self._pool.connection() as connection:
            with reading():
                row = await connection.fetchrow(
                    _KEYED, request.principal_id, request.kind.value, request.idempotency_key
                )
        if row is None:
            return None
        if row["fingerprint"] != request.fingerprint:
            raise _conflict(row["job_id"])
        return _job(row)

    async def submit_due(self, kind: JobKind, *, every_s: float, requested_by: str) -> Job | None:
        async with self._pool.connection() as connection:
            with writing():
                found = await connection.fetchval(
                    "SELECT submit_due_job($1, $2, $3, $4, $5)",
                    self._chance.new_uuid(),
                    kind.value,
                    dt.timedelta(seconds=every_s),
                    self._chance.jitter(),
                    requested_by,
                )
        return None if found is None else await self.job(found)

    async def claim(
        self, owner: uuid.UUID, *, kinds: Sequence[JobKind], ttl_s: float
    ) -> JobClaim | None:
        async with self._pool.connection() as connection:
            with writing():
                row = await connection.fetchrow(
                    "SELECT * FROM claim_job($1, $2, $3)",
                    owner,
                    [kind.value for kind in kinds],
                    dt.timedelta(seconds=ttl_s),
                )
        return None if row is None else JobClaim(_job(row), row["epoch"], ttl_s)

    async def renew(self, claim: JobClaim, *, ttl_s: float) -> None:
        await self._fenced(_RENEW, claim, dt.timedelta(seconds=ttl_s))

    async def note(self, claim: JobClaim, report: Mapping[str, Any]) -> None:
        await self._fenced(_NOTE, claim, dict(report))

    async def finish(
        self,
        claim: JobClaim,
        report: Mapping[str, Any],
        *,
        error: Mapping[str, Any] | None = None,
    ) -> None:
        async with self._pool.connection() as connection:
            with writing():
                ours = await connection.fetchval(
                    "SELECT finish_job($1, $2, $3, $4)",
                    claim.job.job_id,
                    claim.epoch,
                    dict(report),
                    None if error is None else dict(error),
                )
        if not ours:
            raise _lost(claim)

    async def give_back(
        self, claim: JobClaim, *, delay_s: float, error: str, counted: bool = True
    ) -> None:
        await self._fenced(
            _GIVE_BACK,
            claim,
            dt.timedelta(seconds=delay_s),
            {"code": "given_back", "detail": error},
            0 if counted else 1,
        )

    async def job(self, job_id: uuid.UUID) -> Job | None:
        async with self._pool.connection() as connection:
            with reading():
                row = await connection.fetchrow("SELECT * FROM job WHERE job_id = $1", job_id)
        return None if row is None else _job(row)

    async def jobs(
        self, *, limit: int = 100, before: dt.datetime | None = None, kind: JobKind | None = None
    ) -> Sequence[Job]:
        async with self._pool.connection() as connection:
            with reading():
                rows = await connection.fetch(_JOBS, limit, before, kind and kind.value)
        return [_job(row) for row in rows]

    async def forget(self, *, older_than_s: float) -> int:
        async with self._pool.connection() as connection:
            with reading():  # repeating it is safe
                told = await connection.execute(_FORGET, dt.timedelta(seconds=older_than_s))
        return int(told.split()[-1])

    async def _fenced(self, statement: str, claim: JobClaim, *arguments: object) -> None:
        """One write under the claim's epoch. Raises LeaseLost when another epoch holds the job."""

        async with self._pool.connection() as connection:
            with writing():
                found = await connection.fetchval(
                    statement, claim.job.job_id, claim.epoch, *arguments
                )
        if found is None:
            raise _lost(claim)


def _conflict(job_id: uuid.UUID) -> IdempotencyConflict:
    return IdempotencyConflict(
        "the idempotency key was used for another request of this kind; make a new key",
        job_id=str(job_id),
    )


def _lost(claim: JobClaim) -> LeaseLost:
    return LeaseLost(f"the job {claim.job.job_id} belongs to another worker, or has ended")


def _job(row: asyncpg.Record) -> Job:
    return Job(
        job_id=row["job_id"],
        kind=JobKind(row["kind"]),
        table_id=row["table_id"],
        parameters=row["parameters"],
        dry_run=row["dry_run"],
        requested_by=row["requested_by"],
        state=JobState(row["state"]),
        attempt=row["attempt"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        report=row["report"],
        error=row["error"],
    )
