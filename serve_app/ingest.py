"""Rows in: `POST /v1/tables/{table}/rows`, `POST /v1/rows`, and `GET /v1/batches/{batch_id}`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import time
from typing import cast

from lakebus.errors import LakebusError, MalformedRequest, SchemaInvalid
from lakebus.schemas import fold_table_name
from serve_app.bodies import read_body
from serve_app.calls import (
    NO_PARAMETERS,
    TIMEOUT_MS_DEFAULT,
    Answer,
    Call,
    Header,
    Parameters,
    media_type_of,
    time_of,
)
from serve_app.dependencies import Dependencies, present
from serve_app.door_headers import INGEST_URL, told
from serve_app.limits import Allowance
from serve_app.limits_bytes import Known
from storage.bus.interface import BatchStatus
from storage.ingesting.requests import SEVERAL_TABLES, IngestAnswer, IngestRequest
from storage.rows.decode import JSON, SUPPORTED_MEDIA_TYPES
from storage.rows.decoded import OnInvalid
from storage.rows.multipart import MULTIPART, boundary_of

INGEST_PARAMETERS = ("wait", "timeout_ms", "on_invalid", "create")
SEVERAL_TABLES_MEDIA_TYPES = (JSON, MULTIPART)
_folded = functools.lru_cache(maxsize=1024)(fold_table_name)
_ORDERING_KEY = re.compile(r"[\x20-\x7e]{1,255}")


async def post_table_rows(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require("ingest")
    try:
        table = _folded(call.path_values["table"])
    except SchemaInvalid:
        raise call.principal.table_not_found(call.path_values["table"][:80]) from None
    return await _ingest(call, parameters, app, table, SUPPORTED_MEDIA_TYPES)


async def post_rows(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require("ingest")
    return await _ingest(call, parameters, app, None, SEVERAL_TABLES_MEDIA_TYPES)


async def _ingest(
    call: Call,
    parameters: Parameters,
    app: Dependencies,
    table: str | None,
    media_types: tuple[str, ...],
) -> Answer:
    service = present(app.ingest)
    media_type = media_type_of(call, media_types)
    key = call.idempotency_key()
    wait, on_invalid, create, timeout_ms = _choices(parameters)
    boundary = ""
    if media_type == MULTIPART:
        boundary = boundary_of(call.header(b"content-type") or "")
    first_attempt = call.header(b"idempotency-not-before")
    deadline_s = call.deadline_s(timeout_ms)
    known = None
    if key is not None:
        target = SEVERAL_TABLES if table is None else table
        known = functools.partial(service.knows, call.principal, target, key)
    if call.refusal is not None:
        await _unless_replay(call.refusal, app, known, deadline_s)
    with app.budget.reserve(call.principal.principal_id, known=known) as reservation:
        body = await read_body(
            call,
            limit_bytes=app.limits.body_bytes_max,
            deadline_s=deadline_s,
            reservation=reservation,
            allowance=_allowance(call, app, known),
        )
        async with app.admission.ingest_turn(call.principal, deadline_s):
            answer = await service.accept(
                IngestRequest(
                    principal=call.principal,
                    table=table,
                    media_type=media_type,
                    body=body,
                    deadline_s=deadline_s,
                    idempotency_key=key,
                    first_attempt_at=(
                        None
                        if first_attempt is None
                        else time_of(first_attempt, "Idempotency-Not-Before")
                    ),
                    ordering_key=_ordering_key(call),
                    wait_visible=wait == "visible",
                    on_invalid=on_invalid,
                    create=create,
                    boundary=boundary,
                )
            )
        del body  # what was given back must be gone while the answer waits
    if not answer.replayed:
        app.metrics.count("lakebus_accepted_rows_total", answer.receipt.rows)
    if wait == "visible":
        answer = await service.seen(answer, deadline_s)
    return _rendered(answer, told(call, app, INGEST_URL))


def _choices(parameters: Parameters) -> tuple[str, OnInvalid, bool, int]:
    """`wait`, `on_invalid`, `create` and `timeout_ms`."""

    if parameters is NO_PARAMETERS:
        return "durable", "reject", False, TIMEOUT_MS_DEFAULT
    return (
        parameters.choice("wait", ("durable", "visible"), "durable"),
        cast(OnInvalid, parameters.choice("on_invalid", ("reject", "quarantine"), "reject")),
        parameters.boolean("create"),
        parameters.timeout_ms(),
    )


async def _unless_replay(
    refusal: LakebusError, app: Dependencies, known: Known | None, deadline_s: float
) -> None:
    """Raises what refuses the call, unless it was accepted before (A3)."""

    replay = False
    if known is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s - time.monotonic()):
                replay = await app.budget.accepted_before(known)
    if not replay:
        raise refusal


def _allowance(call: Call, app: Dependencies, known: Known | None) -> Allowance | None:
    if not app.admission.counts_bytes(call.principal):
        return None
    looked_up = None if known is None else functools.partial(app.budget.accepted_before, known)
    return app.admission.allowance(call.principal, known=looked_up)


def _ordering_key(call: Call) -> str | None:
    text = call.header(b"lakebus-ordering-key")
    if text is not None and not _ORDERING_KEY.fullmatch(text):
        raise MalformedRequest("Lakebus-Ordering-Key must have 1 to 255 printable ASCII characters")
    return text


def _rendered(answer: IngestAnswer, more: tuple[Header, ...]) -> Answer:
    return Answer(
        {
            "receipt": answer.receipt.as_json(),
            "replayed": answer.replayed,
            "visible": answer.visible,
            "snapshot_id": answer.snapshot_id,
            "columns_skipped": list(answer.columns_skipped),
        },
        status=200 if answer.visible else 202,
        headers=((b"idempotent-replayed", b"true"), *more) if answer.replayed else more,
    )


async def get_batch(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    timeout_ms = parameters.timeout_ms(low=0, default=0)
    status = await present(app.batches).status(
        call.principal,
        call.path_values["batch_id"],
        deadline_s=call.deadline_s(timeout_ms) if timeout_ms else None,
    )
    return Answer(_batch_json(status))


def _batch_json(status: BatchStatus) -> dict[str, object]:
    return {
        "batch_id": status.batch_id,
        "state": status.state.value,
        "snapshot_id": status.snapshot_id,
        "reason": status.reason,
        "successor_batch_id": status.successor_batch_id,
    }
