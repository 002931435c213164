"""What an operator asks of maintenance: jobs, and tags that keep snapshots. Everything is audited.

All of it needs `admin` on every table: reports name tables, and a tag keeps all of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lakebus.clock import Clock, SystemClock
from lakebus.errors import JobNotFound, MalformedRequest, NotFound
from storage.catalog.interface import Catalog
from storage.ingesting.grants import KeyStore, Principal
from storage.maintenance.interface import Tag, Upkeep
from storage.maintenance.jobs import Job, JobKind, JobRequest, JobStore

#: What may be asked for; deletes have a route of their own.
ASKABLE: Final = (JobKind.COMPACT, JobKind.RETAIN, JobKind.COLLECT, JobKind.VALIDATE)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")
_POLL_FIRST_S, _POLL_S = 0.02, 0.5


class MaintenanceService:
    def __init__(
        self,
        *,
        jobs: JobStore,
        upkeep: Upkeep,
        catalog: Catalog,
        keys: KeyStore,
        clock: Clock | None = None,
    ) -> None:
        self._jobs = jobs
        self._upkeep = upkeep
        self._catalog = catalog
        self._keys = keys
        self._clock = clock or SystemClock()

    # --- jobs -------------------------------------------------------------------------------

    async def submit(
        self,
        principal: Principal,
        kind: JobKind,
        *,
        table: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        dry_run: bool = False,
        key: str | None = None,
    ) -> tuple[Job, bool]:
        """(the job, whether it was there already): with a key it is one job for ever, without one
        an equal job that is still open. Raises Forbidden, TableNotFound, IdempotencyConflict."""

        principal.require_everywhere("admin")
        table_id = None if table is None else await self._table_id(principal, table)
        asked = {"table_id": table_id, "parameters": dict(parameters or {}), "dry_run": dry_run}
        request = JobRequest(
            kind,
            principal.name,
            table_id=table_id,
            parameters=dict(parameters or {}),
            dry_run=dry_run,
            principal_id=principal.principal_id,
            idempotency_key=key,
            fingerprint=hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest(),
        )
        job, was_there = await self._jobs.submit(request)
        if not was_there:
            await self._keys.audit(
                principal=principal.name,
                action=f"maintenance.{kind}",
                subject=str(job.job_id),
                detail={"table": table, "parameters": asked["parameters"], "dry_run": dry_run},
            )
        return job, was_there

    async def ended(self, job: Job, *, deadline_s: float) -> Job:
        """The job once it has ended, or as it is at the deadline (by the monotonic clock)."""

        pause_s = _POLL_FIRST_S
        while not job.ended and (left_s := deadline_s - self._clock.monotonic_s()) > 0:
            await self._clock.sleep_s(min(pause_s, left_s))
            pause_s = min(_POLL_S, pause_s * 1.5)
            job = await self._found(job.job_id)
        return job

    async def job(self, principal: Principal, job_id: uuid.UUID) -> Job:
        """Raises JobNotFound."""

        principal.require_everywhere("admin")
        return await self._found(job_id)

    async def jobs(
        self,
        principal: Principal,
        *,
        limit: int = 100,
        before: uuid.UUID | None = None,
        kind: JobKind | None = None,
    ) -> Sequence[Job]:
        """Newest first. Raises JobNotFound for `before`."""

        principal.require_everywhere("admin")
        until = None if before is None else (await self._found(before)).created_at
        return await self._jobs.jobs(limit=limit, before=until, kind=kind)

    async def table_names(self) -> Mapping[int, str]:
        """Live tables by id."""

        states = await self._catalog.tables()
        return {state.schema.table_id: state.schema.name for state in states}

    # --- tags -------------------------------------------------------------------------------

    async def tag(self, principal: Principal, name: str, snapshot_id: int | None) -> Tag:
        """Keeps a snapshot (None: the newest) under a name. Raises MalformedRequest, TagExists,
        SnapshotNotFound, SnapshotExpired, HistoryLost."""

        principal.require_everywhere("admin")
        if not _TAG.fullmatch(name):
            raise MalformedRequest(
                "a tag's name has 1 to 63 letters, digits, _, . or -, and does not begin with . "
                "or -"
            )
        if snapshot_id is None:
            snapshot_id = (await self._catalog.head()).snapshot_id
        made = await self._upkeep.create_tag(name, snapshot_id, created_by=principal.name)
        await self._keys.audit(
            principal=principal.name,
            action="tag.create",
            subject=name,
            detail={"snapshot_id": snapshot_id},
        )
        return made

    async def drop_tag(self, principal: Principal, name: str) -> Tag:
        """Raises NotFound."""

        principal.require_everywhere("admin")
        tag = await self._upkeep.drop_tag(name)
        if tag is None:
            raise NotFound(f"there is no tag {name[:80]}")
        await self._keys.audit(
            principal=principal.name,
            action="tag.drop",
            subject=name,
            detail={"snapshot_id": tag.snapshot_id},
        )
        return tag

    async def tags(self, principal: Principal) -> Sequence[Tag]:
        """By name."""

        principal.require_everywhere("admin")
        return await self._upkeep.tags()

    async def tags_of_snapshots(self) -> Mapping[int, Sequence[str]]:
        """Names by snapshot; who may see a name is for the caller to say."""

        found: dict[int, list[str]] = {}
        for tag in await self._upkeep.tags():
            found.setdefault(tag.snapshot_id, []).append(tag.name)
        return found

    async def _found(self, job_id: uuid.UUID) -> Job:
        job = await self._jobs.job(job_id)
        if job is None:
            raise JobNotFound(f"there is no job {job_id}")
        return job

    async def _table_id(self, principal: Principal, table: str) -> int:
        name = table.lower()
        states = await self._catalog.tables()
        for state in states:
            if state.schema.name == name:
                return state.schema.table_id
        raise principal.table_not_found(name[:200], [state.schema.name for state in states])
