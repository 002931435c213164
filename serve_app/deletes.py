"""Deleting rows: `POST /v1/tables/{table}/delete`, and looking at a delete of one's own."""

from __future__ import annotations

import asyncio

import msgspec

from lakebus.errors import MalformedRequest
from serve_app.bodies import ClientGone, read_document
from serve_app.calls import TIMEOUT_MS_DEFAULT, TIMEOUT_MS_MAX, Answer, Call, Parameters
from serve_app.connection import ended_or_left
from serve_app.dependencies import Dependencies, present
from storage.ingesting.deletes import SCOPES, DeleteAnswer, DeleteRequest

Value = bool | int | float | str | None


class DeleteDocument(msgspec.Struct, forbid_unknown_fields=True):
    where: str
    parameters: list[Value] | dict[str, Value] | None = None
    min_visibility_token: str | list[str] | None = None
    timeout_ms: int | None = None
    dry_run: bool = False


async def post_delete(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    for scope in SCOPES:
        call.principal.require(scope)
    key = call.idempotency_key()
    document = await read_document(
        call, DeleteDocument, deadline_s=call.deadline_s(TIMEOUT_MS_DEFAULT)
    )
    timeout_ms = TIMEOUT_MS_DEFAULT if document.timeout_ms is None else document.timeout_ms
    if not 1 <= timeout_ms <= TIMEOUT_MS_MAX:
        raise MalformedRequest(f"timeout_ms must be a whole number, 1 to {TIMEOUT_MS_MAX}")
    tokens = document.min_visibility_token
    request = DeleteRequest(
        principal=call.principal,
        table=call.path_values["table"],
        where=document.where,
        deadline_s=call.deadline_s(timeout_ms),
        parameters=document.parameters,
        min_visibility_tokens=(tokens,) if isinstance(tokens, str) else tuple(tokens or ()),
        idempotency_key=key,
        dry_run=document.dry_run,
    )
    work = asyncio.create_task(present(app.deletes).delete(request, present(app.predicates)))
    # Who leaves stops the wait, never the job.
    if await ended_or_left(call, work):
        raise ClientGone
    return _answer(work.result())


async def get_delete(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    found = await present(app.deletes).look(
        call.principal,
        call.path_values["table"],
        call.path_values["job_id"],
        deadline_s=call.deadline_s(parameters.timeout_ms(low=0, default=0)),
    )
    return _answer(found, status=200)


def _answer(found: DeleteAnswer, *, status: int | None = None) -> Answer:
    document = {
        "job_id": str(found.job_id),
        "table": found.table,
        "state": str(found.state),
        "dry_run": found.dry_run,
        "replayed": found.replayed,
        "snapshot_id": found.snapshot_id,
        "evaluated_at_snapshot_id": found.evaluated_at_snapshot_id,
        "deleted_rows": found.deleted_rows,
        "visibility_token": found.visibility_token,
    }
    if found.error is not None:
        document["error"] = dict(found.error)
    return Answer(
        document,
        status=status or (200 if found.done else 202),
        headers=((b"idempotent-replayed", b"true"),) if found.replayed and status is None else (),
    )
