"""Deleting rows: `POST /v1/tables/{table}/delete`, and looking at a delete of one's own."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping

import msgspec

from lakebus.errors import MalformedRequest
from serve_app.bodies import ClientGone, read_document, refuse_nul
from serve_app.calls import TIMEOUT_MS_DEFAULT, TIMEOUT_MS_MAX, Answer, Call, Parameters
from serve_app.connection import ended_or_left
from serve_app.dependencies import Dependencies, present
from storage.ingesting.deletes import SCOPES, DeleteAnswer, DeleteRequest, DeleteService

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
    tokens = document.min_visibility_token
    request = request_of(
        call, document.where, document.parameters, document.timeout_ms, key, document.dry_run
    )
    request = dataclasses.replace(
        request,
        min_visibility_tokens=(tokens,) if isinstance(tokens, str) else tuple(tokens or ()),
    )
    return _answer(await asked(call, present(app.deletes), request, app))


def request_of(
    call: Call,
    where: str,
    parameters: list[Value] | dict[str, Value] | None,
    timeout_ms: int | None,
    key: str | None,
    dry_run: bool,
) -> DeleteRequest:
    """What a delete and an erasure ask alike. Raises MalformedRequest."""

    given_ms = TIMEOUT_MS_DEFAULT if timeout_ms is None else timeout_ms
    if not 1 <= given_ms <= TIMEOUT_MS_MAX:
        raise MalformedRequest(f"timeout_ms must be a whole number, 1 to {TIMEOUT_MS_MAX}")
    refuse_nul(where, "where")
    refuse_nul(parameters, "parameters")
    return DeleteRequest(
        principal=call.principal,
        table=call.path_values["table"],
        where=where,
        deadline_s=call.deadline_s(given_ms),
        parameters=parameters,
        idempotency_key=key,
        dry_run=dry_run,
    )


async def asked(
    call: Call, service: DeleteService, request: DeleteRequest, app: Dependencies
) -> DeleteAnswer:
    """Waits for the job's end, the deadline, or until the client leaves: that ends the wait, never
    the job."""

    work = asyncio.create_task(service.delete(request, present(app.predicates)))
    if await ended_or_left(call, work):
        raise ClientGone
    return work.result()


async def looked(call: Call, service: DeleteService, parameters: Parameters) -> DeleteAnswer:
    return await service.look(
        call.principal,
        call.path_values["table"],
        call.path_values["job_id"],
        deadline_s=call.deadline_s(parameters.timeout_ms(low=0, default=0)),
    )


async def get_delete(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    return _answer(await looked(call, present(app.deletes), parameters), status=200)


def _answer(found: DeleteAnswer, *, status: int | None = None) -> Answer:
    return rendered(
        found,
        {
            "evaluated_at_snapshot_id": found.evaluated_at_snapshot_id,
            "deleted_rows": found.deleted_rows,
        },
        status=status,
    )


def rendered(found: DeleteAnswer, members: Mapping[str, object], *, status: int | None) -> Answer:
    """A delete or an erasure, with the members that only one of them has."""

    document: dict[str, object] = {
        "job_id": str(found.job_id),
        "table": found.table,
        "state": str(found.state),
        "dry_run": found.dry_run,
        "replayed": found.replayed,
        "snapshot_id": found.snapshot_id,
        "visibility_token": found.visibility_token,
        **members,
    }
    if found.error is not None:
        document["error"] = dict(found.error)
    return Answer(
        document,
        status=status or (200 if found.done else 202),
        headers=((b"idempotent-replayed", b"true"),) if found.replayed and status is None else (),
    )
