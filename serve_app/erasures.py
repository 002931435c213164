"""Erasing rows: `POST /v1/tables/{table}/erase`, and looking at an erasure of one's own."""

from __future__ import annotations

import msgspec

from serve_app.bodies import read_document
from serve_app.calls import TIMEOUT_MS_DEFAULT, Answer, Call, Parameters
from serve_app.deletes import Value, asked, looked, rendered, request_of
from serve_app.dependencies import Dependencies, present
from storage.ingesting.deletes import DeleteAnswer
from storage.ingesting.erasures import SCOPES

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
    request = request_of(
        call, document.where, document.parameters, document.timeout_ms, key, document.dry_run
    )
    return _answer(await asked(call, present(app.erasures), request, app))


async def get_erasure(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    return _answer(await looked(call, present(app.erasures), parameters), status=200)


def _answer(found: DeleteAnswer, *, status: int | None = None) -> Answer:
    report = found.report or {}
    return rendered(
        found,
        {
            "erasure_id": report.get("erasure_id"),
            "erased_rows": found.deleted_rows,
            "report": {name: report[name] for name in _COUNTS if name in report},
        },
        status=status,
    )
