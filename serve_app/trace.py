"""The life of one request: `GET /v1/admin/trace/{batch_id}`, or found by its idempotency key.

Needs `admin` on every table, because it tells of entries of any principal.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from typing import Any

from lakebus.clock import format_time
from lakebus.errors import BatchNotFound, MalformedRequest
from serve_app.calls import Answer, Call, Parameters
from serve_app.dependencies import Dependencies, present
from storage.bus.trace import Trace

TRACE_PARAMETERS = ("key", "target")


async def get_trace(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require_everywhere("admin")
    return Answer(await _traced(app, call.path_values["batch_id"]))


async def find_trace(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    """By a key of the caller's own: keys of different principals are different keys (A3)."""

    call.principal.require_everywhere("admin")
    key, target = parameters.text("key"), parameters.text("target")
    if not key or not target:
        raise MalformedRequest(
            "give the parameters key (the Idempotency-Key of the request) and target (its table, "
            "or * for several)"
        )
    record = await app.bus.find_key(call.principal.principal_id, target.lower(), key)
    if record is None:
        raise BatchNotFound(
            f"no request of yours to {target[:80]} with this key is known, or it is older than the "
            "idempotency window"
        )
    return Answer(await _traced(app, record.receipt.batch_id))


async def _traced(app: Dependencies, batch_id: str) -> dict[str, object]:
    found = await present(app.traces).trace(batch_id)
    if found is None:
        raise BatchNotFound(
            f"there is no batch {batch_id[:80]}, or it is older than the idempotency window"
        )
    document: dict[str, object] = _plain(dataclasses.asdict(found))
    return document | {"state": _state(found), "terminal": found.position < found.watermark}


def _state(found: Trace) -> str:
    if any(item.kind == "entry" for item in found.quarantine):
        return "quarantined"
    if found.publication is not None:
        return "published"
    return "accepted" if found.lease is None else "claimed"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, dt.datetime):
        return format_time(value)
    return str(value) if isinstance(value, uuid.UUID) else value
