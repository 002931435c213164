"""Erasing rows: `POST /v1/tables/{table}/erase`, and looking at an erasure of one's own."""

from __future__ import annotations

import asyncio

import msgspec

from lakebus.errors import MalformedRequest
from serve_app.bodies import ClientGone, read_document
from serve_app.calls import TIMEOUT_MS_DEFAULT, TIMEOUT_MS_MAX, Answer, Call, Parameters
from serve_app.connection import ended_or_left
from serve_app.dependencies import Dependencies, present
from storage.ingesting.deletes import DeleteAnswer, DeleteRequest
from storage.ingesting.erasures import SCOPES

Value = bool | int | float | str | None
#: What is told of a job beside what every delete tells.
_COUNTS = (
    "files_evaluated",
    "files_rewritten",
    "files_missing",
    "objects_deleted",
    "stray_objects",
    "stray_objects_unread",
    "quarantine_looked_at",
    "quarantine_erased",
    "bus_objects_deleted",
    "bus_bytes_left",
    "snapshots",
    "seconds",
)


class EraseDocument(msgspec.Struct, forbid_unknown_fields=True):
    where: str
    parameters: list[Value] | dict[str, Value] | None = None
    timeout_ms: int | None = None
    dry_run: bool = False


async def post_erase(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    for scope in SCOPES:
        call.principal.require(scope)
    key = call.idempotency_key()
    document = await read_document(
        call, EraseDocument, deadline_s=call.deadline_s(TIMEOUT_MS_DEFAULT)
    )
    timeout_ms = TIMEOUT_MS_DEFAULT if document.timeout_ms is None else document.timeout_ms
    if not 1 <= timeout_ms <= TIMEOUT_MS_MAX:
        raise MalformedRequest(f"timeout_ms must be a whole number, 1 to {TIMEOUT_MS_MAX}")
    request = DeleteRequest(
        principal=call.principal,
        table=call.path_values["table"],
        where=document.where,
        deadline_s=call.deadline_s(timeout_ms),
        parameters=document.parameters,
        idempotency_key=key,
        dry_run=document.dry_run,
    )
    work = asyncio.create_task(present(app.erasures).delete(request, present(app.predicates)))
    # Who leaves stops the wait, never the job.
    if await ended_or_left(call, work):
        raise ClientGone
    return _answer(work.result())


async def get_erasure(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    found = await present(app.erasures).look(
        call.principal,
        call.path_values["table"],
        call.path_values["job_id"],
        deadline_s=call.deadline_s(parameters.timeout_ms(low=0, default=0)),
    )
    return _answer(found, status=200)


def _answer(found: DeleteAnswer, *, status: int | None = None) -> Answer:
    report = found.report or {}
    document = {
        "job_id": str(found.job_id),
        "erasure_id": report.get("erasure_id"),
        "table": found.table,
        "state": str(found.state),
        "dry_run": found.dry_run,
        "replayed": found.replayed,
        "snapshot_id": found.snapshot_id,
        "erased_rows": found.deleted_rows,
        "visibility_token": found.visibility_token,
        "report": {name: report[name] for name in _COUNTS if name in report},
    }
    if found.error is not None:
        document["error"] = dict(found.error)
    return Answer(
        document,
        status=status or (200 if found.done else 202),
        headers=((b"idempotent-replayed", b"true"),) if found.replayed and status is None else (),
    )
