"""Maintenance on request: jobs and tags. Every route needs the scope `admin` on all tables."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import msgspec

from lakebus.clock import format_time
from lakebus.errors import JobNotFound, MalformedRequest, NotFound
from serve_app.bodies import (
    DOCUMENT_BYTES_MAX,
    decode_document,
    read_body,
    read_document,
    refuse_nul,
)
from serve_app.calls import TIMEOUT_MS_DEFAULT, Answer, Call, Parameters, media_type_of, time_text
from serve_app.dependencies import Dependencies, present
from serve_app.limits_bytes import ByteBudget
from storage.maintenance.interface import Tag
from storage.maintenance.jobs import Job, JobKind
from storage.maintenance.service import ASKABLE

MAINTENANCE_PARAMETERS = ("table", "dry_run", "timeout_ms")
JOBS_PARAMETERS = ("kind", "limit", "before")
_LAST_JOBS = 10
_ID_MAX = 2**63 - 1


class MaintenanceDocument(msgspec.Struct, forbid_unknown_fields=True):
    parameters: dict[str, Any] = {}


class TagDocument(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    snapshot_id: int | str


async def post_maintenance(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    """202 with the job as it is; with `timeout_ms` 200 if it has ended by then."""

    call.principal.require_everywhere("admin")
    service = present(app.maintenance)
    waits = parameters.text("timeout_ms") is not None
    timeout_ms = parameters.timeout_ms(low=0)
    kind = _askable(call.path_values["kind"])
    document = await _document(call)
    refuse_nul(document.parameters, "parameters")
    job, was_there = await service.submit(
        call.principal,
        kind,
        table=parameters.text("table"),
        parameters=document.parameters,
        dry_run=parameters.boolean("dry_run"),
        key=call.idempotency_key(),
    )
    if waits:
        job = await service.ended(job, deadline_s=call.deadline_s(timeout_ms))
    return Answer(
        _job_json(job, await service.table_names()),
        status=200 if job.ended else 202,
        headers=((b"idempotent-replayed", b"true"),) if was_there and call.keyed else (),
    )


async def get_jobs(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require_everywhere("admin")
    service = present(app.maintenance)
    before = parameters.text("before")
    kind = parameters.choice("kind", ("", *JobKind), "")
    jobs = await service.jobs(
        call.principal,
        limit=parameters.integer("limit", low=1, high=1000, default=100),
        before=None if before is None else _job_id(before),
        kind=JobKind(kind) if kind else None,
    )
    names = await service.table_names()
    return Answer({"jobs": [_job_json(job, names) for job in jobs]})


async def get_job(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    """As it is; with `timeout_ms` as soon as it has ended, or at that time."""

    call.principal.require_everywhere("admin")
    service = present(app.maintenance)
    timeout_ms = parameters.timeout_ms(low=0, default=0)
    job = await service.job(call.principal, _job_id(call.path_values["job_id"]))
    if timeout_ms:
        job = await service.ended(job, deadline_s=call.deadline_s(timeout_ms))
    return Answer(_job_json(job, await service.table_names()))


async def last_jobs(call: Call, app: Dependencies) -> Mapping[str, object]:
    """For the status: the newest jobs, for who may see all tables."""

    if app.maintenance is None or not call.principal.covers("admin"):
        return {}
    jobs = await app.maintenance.jobs(call.principal, limit=_LAST_JOBS)
    names = await app.maintenance.table_names()
    return {"jobs": [_job_json(job, names) for job in jobs]}


# --- tags ----------------------------------------------------------------------------------


async def post_tag(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require_everywhere("admin")
    call.idempotency_key()
    document = await read_document(
        call, TagDocument, deadline_s=call.deadline_s(TIMEOUT_MS_DEFAULT)
    )
    wanted = document.snapshot_id
    if isinstance(wanted, str) and wanted != "latest":
        raise MalformedRequest('snapshot_id must be a whole number, or "latest"')
    if isinstance(wanted, int) and not 0 <= wanted <= _ID_MAX:
        raise MalformedRequest(f"snapshot_id must be a whole number, 0 to {_ID_MAX}")
    snapshot_id = None if isinstance(wanted, str) else wanted
    tag = await present(app.maintenance).tag(call.principal, document.name, snapshot_id)
    return Answer(_tag_json(tag), status=201)


async def get_tags(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    tags = await present(app.maintenance).tags(call.principal)
    return Answer({"tags": [_tag_json(tag) for tag in tags]})


async def delete_tag(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require_everywhere("admin")
    call.idempotency_key()
    name = call.path_values["name"]
    if "\0" in name:
        raise NotFound("there is no tag of this name; names have no NUL")
    tag = await present(app.maintenance).drop_tag(call.principal, name)
    return Answer(_tag_json(tag) | {"dropped": True})


# --- words ---------------------------------------------------------------------------------


async def _document(call: Call) -> MaintenanceDocument:
    """The body, if there is one."""

    with ByteBudget(DOCUMENT_BYTES_MAX).reserve() as reservation:
        body = await read_body(
            call,
            limit_bytes=DOCUMENT_BYTES_MAX,
            deadline_s=call.deadline_s(TIMEOUT_MS_DEFAULT),
            reservation=reservation,
        )
    if not body:
        return MaintenanceDocument()
    media_type_of(call, ("application/json",))
    return decode_document(body, MaintenanceDocument)


def _askable(text: str) -> JobKind:
    for kind in ASKABLE:
        if kind.value == text:
            return kind
    raise NotFound(f"there is no maintenance {text[:40]}; there are {', '.join(ASKABLE)}")


def _job_id(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise JobNotFound(f"there is no job {text[:80]}") from None


def _job_json(job: Job, names: Mapping[int, str]) -> dict[str, object]:
    """`table` is null for a job about every table, and for one whose table was dropped since."""

    return {
        "job_id": str(job.job_id),
        "kind": job.kind.value,
        "state": job.state.value,
        "table": None if job.table_id is None else names.get(job.table_id),
        "table_id": job.table_id,
        "parameters": job.parameters,
        "dry_run": job.dry_run,
        "requested_by": job.requested_by,
        "attempt": job.attempt,
        "created_at": format_time(job.created_at),
        "started_at": time_text(job.started_at),
        "ended_at": time_text(job.ended_at),
        "report": job.report,
        "error": job.error,
    }


def _tag_json(tag: Tag) -> dict[str, object]:
    return {
        "name": tag.name,
        "snapshot_id": tag.snapshot_id,
        "created_at": format_time(tag.created_at),
        "created_by": tag.created_by,
    }
