"""Deletes at the door: who may, what is meant, and the wait for the job that does it (E7).

What is authoritative: the job's record. A delete with a key is one job for ever, so the key is
looked up before anything is judged (A3): a table that was dropped or changed since does not change
the answer. What is judged for a new one: the grants, the predicate (in the cage, against no rows),
and the tokens. They are waited for here, and the snapshot that covers them goes along as the floor
below which the predicate may not be evaluated. Nothing is stored before all of that is well.

A delete needs `ingest` on the table, because it changes rows, and `query`, because its predicate
reads them and its count tells about them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lakebus.clock import Clock, SystemClock, format_time
from lakebus.errors import (
    Fault,
    JobNotFound,
    LakebusError,
    SchemaInvalid,
    Unavailable,
    all_errors,
)
from lakebus.schemas import TableSchema, fold_table_name
from lakebus.tokens import TokenCodec, VisibilityToken
from storage.engine.plans import Parameters
from storage.ingesting.grants import KeyStore, Principal
from storage.ingesting.table_cache import TableCache
from storage.maintenance.jobs import Job, JobKind, JobRequest, JobState, JobStore
from storage.reading.predicates import PredicateRequest, Predicates
from storage.reading.resolve import Resolver
from storage.turns import Party

SCOPES: Final = ("ingest", "query")
_PAUSE_S: Final = (0.02, 0.5)
#: Depth first: a class comes after the group whose code it shares, and stays.
_BY_CODE: Final = {kind.code: kind for kind in all_errors()}


@dataclass(frozen=True, slots=True)
class DeleteRequest:
    """`table` as it was written. `deadline_s` is on the monotonic clock and bounds the wait for the
    tokens and for the job's end. `dry_run`: count, and delete nothing."""

    principal: Principal
    table: str
    where: str
    deadline_s: float
    parameters: Parameters = None
    min_visibility_tokens: Sequence[str] = ()
    idempotency_key: str | None = None
    dry_run: bool = False

    def fingerprint(self, table: str) -> bytes:
        """Equal for requests that ask for the same. The tokens are part of it: an answer from
        before a token would not be an answer to a request with it."""

        parameters = self.parameters
        if parameters is not None:
            parameters = dict(parameters) if isinstance(parameters, Mapping) else list(parameters)
        said = {
            "table": table,
            "where": self.where,
            "parameters": parameters or None,
            "tokens": sorted(set(self.min_visibility_tokens)),
            "dry_run": self.dry_run,
        }
        text = json.dumps(said, sort_keys=True, separators=(",", ":"), allow_nan=True)
        return hashlib.sha256(b"delete v1\n" + text.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class DeleteAnswer:
    """What became of a delete. All but `job_id`, `table` and `state` are None until it is done.

    `snapshot_id` took the rows away; when no row matched it is the one that was looked at."""

    job_id: uuid.UUID
    table: str
    state: JobState
    dry_run: bool = False
    replayed: bool = False
    snapshot_id: int | None = None
    evaluated_at_snapshot_id: int | None = None
    deleted_rows: int | None = None
    visibility_token: str | None = None
    error: Mapping[str, Any] | None = None
    report: Mapping[str, Any] | None = None

    @property
    def done(self) -> bool:
        return self.state is JobState.DONE


class DeleteService:
    """One per process. An erasure is asked for in the same way (`storage.ingesting.erasures`)."""

    kind = JobKind.DELETE
    scopes = SCOPES
    action = "table.delete_rows"

    def __init__(
        self,
        *,
        jobs: JobStore,
        tables: TableCache,
        resolver: Resolver,
        codec: TokenCodec,
        keys: KeyStore,
        clock: Clock | None = None,
    ) -> None:
        self._jobs = jobs
        self._tables = tables
        self._resolver = resolver
        self._codec = codec
        self._keys = keys
        self._clock = clock or SystemClock()

    async def delete(self, request: DeleteRequest, predicates: Predicates) -> DeleteAnswer:
        """Returns when the job has ended, or when the time is up (`state` says which).

        Raises Forbidden, TableNotFound, SqlError, StatementNotAllowed, MalformedRequest,
        IdempotencyConflict, what waiting for the tokens raises, and the error of a job that failed.
        """

        name = await self._granted(request.principal, request.table)
        asked = JobRequest(
            kind=self.kind,
            requested_by=request.principal.name,
            dry_run=request.dry_run,
            principal_id=request.principal.principal_id,
            idempotency_key=request.idempotency_key,
            fingerprint=request.fingerprint(name),
        )
        job, replayed = await self._jobs.repeated(asked), True
        if job is None:
            job, replayed = await self._submit(request, predicates, name, asked)
        job = await self._ended(job, request.deadline_s)
        if job.state is JobState.FAILED:
            raise _error_of(job)
        return self._answer(job, replayed=replayed)

    async def look(
        self, principal: Principal, table: str, job_id: str, *, deadline_s: float
    ) -> DeleteAnswer:
        """A delete of one's own. Waits for its end until the deadline. Raises JobNotFound."""

        for scope in self.scopes:
            principal.require(scope)
        job = await self._own(principal, table, job_id)
        if job is None:
            raise JobNotFound(f"there is no delete {job_id[:80]} of yours on this table")
        return self._answer(await self._ended(job, deadline_s), replayed=True)

    # --- judging -----------------------------------------------------------------------------

    async def _granted(self, principal: Principal, table: str) -> str:
        """The folded name, of a table that the caller may delete from if it is there."""

        for scope in self.scopes:
            principal.require(scope)
        try:
            name = fold_table_name(table)
        except SchemaInvalid:
            raise principal.table_not_found(table[:80]) from None
        for scope in self.scopes:
            if not principal.allows(scope, name):
                principal.require_table(scope, name, await self._tables.names())
        return name

    async def _submit(
        self, request: DeleteRequest, predicates: Predicates, name: str, asked: JobRequest
    ) -> tuple[Job, bool]:
        schema = await self._schema(request.principal, name)
        resolved = await self._resolver.resolve(
            tokens=request.min_visibility_tokens, deadline_s=request.deadline_s
        )
        left_s = request.deadline_s - self._clock.monotonic_s()
        await predicates.check(
            PredicateRequest(
                schema=schema,
                where=request.where,
                parameters=request.parameters,
                now=resolved.started_at,
                timeout_ms=max(1, round(left_s * 1000)),
                party=Party(request.principal.principal_id),
            )
        )
        parameters = request.parameters
        if parameters is not None:
            parameters = dict(parameters) if isinstance(parameters, Mapping) else list(parameters)
        job, replayed = await self._jobs.submit(
            JobRequest(
                kind=asked.kind,
                requested_by=asked.requested_by,
                table_id=schema.table_id,
                parameters={
                    "table": name,
                    "where": request.where,
                    "parameters": parameters,
                    "now": format_time(resolved.started_at),
                    "columns": {column.name: column.column_id for column in schema.columns},
                    "floor": resolved.snapshot_id,
                    **await self._more(schema),
                },
                dry_run=asked.dry_run,
                principal_id=asked.principal_id,
                idempotency_key=asked.idempotency_key,
                fingerprint=asked.fingerprint,
            )
        )
        if not replayed:
            await self._keys.audit(
                principal=request.principal.name,
                action=self.action,
                subject=name,
                detail={"job_id": str(job.job_id), "dry_run": request.dry_run},
            )
        return job, replayed

    async def _more(self, schema: TableSchema) -> dict[str, Any]:
        """Further parameters of the job."""

        return {}

    async def _schema(self, principal: Principal, name: str) -> TableSchema:
        state = await self._tables.fresh_state(name)
        if state is None:
            raise principal.table_not_found(name, await self._tables.names())
        if not state.open:
            raise Unavailable(f"the table {name} is being dropped", retry_after_s=1.0)
        return state.schema

    async def _own(self, principal: Principal, table: str, job_id: str) -> Job | None:
        try:
            name, number = fold_table_name(table), uuid.UUID(job_id)
        except (SchemaInvalid, ValueError):
            return None
        job = await self._jobs.job(number)
        if job is None or job.kind is not self.kind or job.requested_by != principal.name:
            return None
        return job if job.parameters.get("table") == name else None

    # --- waiting and answering ---------------------------------------------------------------

    async def _ended(self, job: Job, deadline_s: float) -> Job:
        """The job when it has ended, or as it is when the time is up."""

        pause_s, pause_s_max = _PAUSE_S
        while not job.ended:
            left_s = deadline_s - self._clock.monotonic_s()
            if left_s <= 0:
                break
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 1.5, pause_s_max)
            found = await self._jobs.job(job.job_id)
            if found is None:
                raise JobNotFound(f"the delete {job.job_id} is gone")
            job = found
        return job

    def _answer(self, job: Job, *, replayed: bool) -> DeleteAnswer:
        name = str(job.parameters["table"])
        if not job.ended:
            return DeleteAnswer(job.job_id, name, job.state, job.dry_run, replayed)
        if job.state is JobState.FAILED:
            error = dict(job.error or {})
            return DeleteAnswer(job.job_id, name, job.state, job.dry_run, replayed, error=error)
        report = job.report
        # The line of history in which it was done: another one knows what has become of it.
        token = VisibilityToken(uuid.UUID(str(report["history"])), int(report["snapshot_id"]))
        return DeleteAnswer(
            job_id=job.job_id,
            table=name,
            state=job.state,
            dry_run=job.dry_run,
            replayed=replayed,
            snapshot_id=int(report["snapshot_id"]),
            evaluated_at_snapshot_id=int(report["evaluated_at_snapshot_id"]),
            deleted_rows=int(report["deleted_rows"]),
            visibility_token=self._codec.encode(token),
            report=report,
        )


def _error_of(job: Job) -> LakebusError:
    """Why the job failed, typed as it was where it failed. Retrying with the same key cannot help,
    so none of them says that it may."""

    said = job.error or {}
    kind = _BY_CODE.get(str(said.get("code")), Fault)
    error = kind(str(said.get("detail") or "the delete failed"), job_id=str(job.job_id))
    error.retryable = False  # type: ignore[misc]
    return error
