"""Queries: `GET` and `POST /v1/query`, and one's own running queries.

The engine gives an answer's rows as JSON text or an Arrow stream already; they are passed on as
they are, never encoded again. A small answer is sent whole, so that an error in it still gets a
status; beyond that, a failure can only break the connection (D9).

When the client goes away, the work is cancelled; leaving `QueryAnswer` stops the engine.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from lakebus.clock import format_time, new_uuid
from lakebus.errors import Cancelled, MalformedBody, MalformedRequest, QueryNotFound
from serve_app.accept import Accepted, accepted
from serve_app.bodies import ClientGone, decode_document, read_document
from serve_app.calls import (
    TIMEOUT_MS_DEFAULT,
    TIMEOUT_MS_MAX,
    Answer,
    Call,
    Header,
    Parameters,
)
from serve_app.connection import ended_or_left
from serve_app.dependencies import Dependencies, present
from serve_app.door_headers import QUERY_URL, told
from serve_app.running import QueryDirectory, RunningQuery
from storage.reading.query import QueryAnswer, QueryRequest
from storage.reading.resolve import parse_choice

QUERY_PARAMETERS = (
    "sql",
    "parameters",
    "snapshot",
    "min_visibility_token",
    "timeout_ms",
    "max_rows",
    "max_staleness_ms",
    "deterministic",
)
#: Answers up to this size are sent whole, with a length and with whatever error they end in.
WHOLE_BYTES_MAX = 512 * 1024
_COUNT_MAX = 2**63 - 1
_CANCELLED = "the query was cancelled"

Value = bool | int | float | str | None


class QueryDocument(msgspec.Struct, forbid_unknown_fields=True):
    sql: str
    parameters: list[Value] | dict[str, Value] | None = None
    snapshot: str | dict[str, int | str] | None = None
    min_visibility_token: str | list[str] | None = None
    timeout_ms: int | None = None
    max_rows: int | None = None
    max_staleness_ms: int | None = None
    deterministic: bool = False


async def post_query(call: Call, parameters: Parameters, app: Dependencies) -> None:
    call.principal.require("query")
    form = accepted(call.joined_header(b"accept"))
    document = await read_document(
        call, QueryDocument, deadline_s=call.deadline_s(TIMEOUT_MS_DEFAULT)
    )
    await _run(call, app, document, form)


async def get_query(call: Call, parameters: Parameters, app: Dependencies) -> None:
    call.principal.require("query")
    form = accepted(call.joined_header(b"accept"))
    await _run(call, app, _from_parameters(parameters), form)


async def get_queries(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require("query")
    directory = _directory(app)
    return Answer({"queries": await directory.running(call.principal.principal_id)})


async def delete_query(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require("query")
    query_id = call.path_values["query_id"]
    if not await _directory(app).cancel(call.principal.principal_id, query_id):
        raise QueryNotFound(f"no query {query_id[:80]} of yours is running")
    return Answer({"query_id": query_id, "cancelled": True})


def _directory(app: Dependencies) -> QueryDirectory:
    return app.running if app.directory is None else app.directory


def _from_parameters(parameters: Parameters) -> QueryDocument:
    sql = parameters.text("sql")
    if sql is None:
        raise MalformedRequest("the parameter sql is missing")
    bound, snapshot = parameters.text("parameters"), parameters.text("snapshot")
    chosen: str | dict[str, int | str] | None = snapshot
    if snapshot is not None and snapshot.startswith("{"):
        chosen = _json_parameter("snapshot", snapshot, dict[str, int | str])
    elif snapshot is not None and snapshot.isascii() and snapshot.isdigit() and len(snapshot) < 20:
        chosen = {"id": int(snapshot)}
    return QueryDocument(
        sql=sql,
        parameters=(
            None
            if bound is None
            else _json_parameter("parameters", bound, list[Value] | dict[str, Value])
        ),
        snapshot=chosen,
        min_visibility_token=list(parameters.many("min_visibility_token")) or None,
        timeout_ms=parameters.optional_integer("timeout_ms", low=1, high=TIMEOUT_MS_MAX),
        max_rows=parameters.optional_integer("max_rows", low=1, high=_COUNT_MAX),
        max_staleness_ms=parameters.optional_integer("max_staleness_ms", low=0, high=_COUNT_MAX),
        deterministic=parameters.boolean("deterministic"),
    )


def _json_parameter(name: str, text: str, kind: Any) -> Any:
    try:
        return decode_document(text.encode("utf-8"), kind)
    except (MalformedBody, MalformedRequest) as error:
        raise MalformedRequest(f"the parameter {name} is JSON: {error.detail}") from None


# --- running -------------------------------------------------------------------------------


async def _run(call: Call, app: Dependencies, document: QueryDocument, form: Accepted) -> None:
    request = _request(call, app, document, form)
    if call.direct:
        await _run_here(call, app, request, form)
        return
    work = asyncio.create_task(_answer(call, app, request, form))
    with app.running.entered(_running(call, request, work.cancel)):
        if await ended_or_left(call, work):
            raise ClientGone
    if work.cancelled():
        raise Cancelled(_CANCELLED)
    work.result()


async def _run_here(call: Call, app: Dependencies, request: QueryRequest, form: Accepted) -> None:
    """In the request's own task, which the direct door ends when the client leaves (D9): nobody
    need watch the connection, which costs two tasks more."""

    task = asyncio.current_task()
    assert task is not None, "requests are served in tasks"
    told = False

    def cancel() -> None:
        nonlocal told
        told = True
        task.cancel()

    with app.running.entered(_running(call, request, cancel)):
        try:
            await _answer(call, app, request, form)
        except asyncio.CancelledError:
            if not told or task.uncancel():
                raise  # the client has left, too: nobody is to be answered
            raise Cancelled(_CANCELLED) from None


def _running(call: Call, request: QueryRequest, cancel: Callable[[], object]) -> RunningQuery:
    return RunningQuery(
        query_id=request.query_id,
        principal_id=call.principal.principal_id,
        sql=request.sql,
        started_at=dt.datetime.now(dt.UTC),
        cancel=cancel,
    )


def _request(
    call: Call, app: Dependencies, document: QueryDocument, form: Accepted
) -> QueryRequest:
    timeout_ms = TIMEOUT_MS_DEFAULT if document.timeout_ms is None else document.timeout_ms
    _in_range("timeout_ms", timeout_ms, 1, TIMEOUT_MS_MAX)
    _in_range("max_rows", document.max_rows, 1, _COUNT_MAX)
    _in_range("max_staleness_ms", document.max_staleness_ms, 0, _COUNT_MAX)
    tokens = document.min_visibility_token
    return QueryRequest(
        sql=document.sql,
        parameters=document.parameters,
        snapshot=parse_choice(document.snapshot),
        min_visibility_tokens=[tokens] if isinstance(tokens, str) else tokens or (),
        timeout_ms=timeout_ms,
        max_rows=document.max_rows,
        max_staleness_ms=document.max_staleness_ms or 0,
        deterministic=document.deterministic,
        result_format=form.result_format,
        integers=form.integers,
        query_id=str(new_uuid()),
        arrived_s=call.arrived_s,
        party=app.admission.party(call.principal),
    )


def _in_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise MalformedRequest(f"{name} must be a whole number, {low} to {high}")


async def _answer(call: Call, app: Dependencies, request: QueryRequest, form: Accepted) -> None:
    principal = call.principal
    answer = await present(app.queries).query(
        request, lambda table: principal.allows("query", table)
    )
    try:
        await _send(call, answer, form, told(call, app, QUERY_URL))
    finally:
        await answer.aclose()


async def _send(call: Call, answer: QueryAnswer, form: Accepted, more: Sequence[Header]) -> None:
    headers: list[Header] = [
        (b"cache-control", b"no-store"),
        (b"lakebus-snapshot-id", str(answer.snapshot_id).encode("ascii")),
        (b"lakebus-visibility-token", answer.visibility_token.encode("ascii")),
        (b"lakebus-query-id", answer.query_id.encode("ascii")),
    ]
    headers += more
    if answer.erasures:
        headers.append((b"lakebus-erased", ", ".join(answer.erasures).encode("ascii")))
    is_json = form.result_format == "json"
    parts: list[bytes] = [_json_head(answer)] if is_json else []
    size, ended = 0, True
    async for part in answer:
        parts.append(part)
        size += len(part)
        if size > WHOLE_BYTES_MAX:
            ended = False
            break
    media_type = form.media_type.encode("ascii")
    if ended:
        if is_json:
            parts.append(_json_tail(answer))
        await call.answer_bytes(200, b"".join(parts), media_type, headers)
        return
    await call.start(200, [(b"content-type", media_type), *headers])
    await _send_parts(call, parts)
    async for part in answer:
        await call.send_part(part, more=True)
    await call.send_part(_json_tail(answer) if is_json else b"", more=False)


async def _send_parts(call: Call, parts: Sequence[bytes]) -> None:
    for part in parts:
        await call.send_part(part, more=True)


def _json_head(answer: QueryAnswer) -> bytes:
    return b'{"columns":' + msgspec.json.encode(answer.columns) + b',"rows":'


def _json_tail(answer: QueryAnswer) -> bytes:
    rest = msgspec.json.encode(
        {
            "row_count": answer.row_count,
            "snapshot_id": answer.snapshot_id,
            "snapshot_time": format_time(answer.snapshot_time),
            "visibility_token": answer.visibility_token,
            "statistics": answer.statistics(),
        }
    )
    return b"," + rest[1:]
