"""The change feed: `GET /v1/tables/{table}/changes`, one page a call.

What the caller may see is decided here, and the snapshot `until` is fixed here; the rows come from
whoever has the SQL engine (`storage.reading.changes`).
"""

from __future__ import annotations

import asyncio
import time

import msgspec

from lakebus.errors import MalformedRequest, SnapshotExpired, SnapshotNotFound
from lakebus.schemas import TableSchema
from serve_app.accept import ARROW_STREAM, JSON, accepted
from serve_app.bodies import ClientGone
from serve_app.calls import Answer, Call, Header, Parameters
from serve_app.connection import ended_or_left
from serve_app.dependencies import Dependencies, present
from serve_app.tables import folded_table, snapshot_view
from storage.reading.changes import ROWS_MAX, ChangesPage, ChangesRequest, Window
from storage.reading.query import QueryService
from storage.reading.resolve import LATEST, Resolved, SnapshotChoice

CHANGES_PARAMETERS = ("after", "until", "cursor", "limit", "timeout_ms", "min_visibility_token")
CHANGES_TYPES = (JSON, ARROW_STREAM)
_ID_MAX = 2**63 - 1


async def get_changes(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require("query")
    form = accepted(call.joined_header(b"accept"), CHANGES_TYPES)
    limit = parameters.integer("limit", low=1, high=ROWS_MAX, default=1_000)
    after = parameters.optional_integer("after", low=0, high=_ID_MAX)
    until = parameters.optional_integer("until", low=0, high=_ID_MAX)
    cursor = parameters.text("cursor")
    if cursor is None and after is None:
        raise MalformedRequest("give after, the snapshot whose changes you have, or a cursor")
    resolved, schema = await _table(call, parameters, app, until, cursor)
    if cursor is None:
        window = Window(after or 0, resolved.snapshot_id)
    else:
        window = Window.decode(cursor, schema.table_id)
        if after not in (None, window.after) or until not in (None, window.until):
            raise MalformedRequest(
                "after and until are not those of the cursor: leave them out when you send a cursor"
            )
    if window.after > window.until:
        raise MalformedRequest(
            f"after ({window.after}) is newer than until ({window.until}): nothing lies between"
        )
    await _require_known(app, window.after)
    request = ChangesRequest(
        table=schema.name,
        window=window,
        limit=limit,
        timeout_ms=_left_ms(call, parameters),
        result_format=form.result_format,
        integers=form.integers,
        party=app.admission.party(call.principal),
    )
    work = asyncio.create_task(present(app.changes).page(request))
    if await ended_or_left(call, work):
        raise ClientGone
    page = work.result()
    token = app.codec.encode(resolved.token)
    if form.result_format == "arrow":
        return Answer(
            body=page.body,
            media_type=form.media_type.encode("ascii"),
            headers=_headers(page, window, token),
        )
    return Answer(
        body=_document(schema.name, window, page, token), headers=_headers(page, window, token)
    )


async def _table(
    call: Call, parameters: Parameters, app: Dependencies, until: int | None, cursor: str | None
) -> tuple[Resolved, TableSchema]:
    """The snapshot `until` and the table in it, for who may read it (D10)."""

    if until is None and cursor is not None:
        until = Window.until_of(cursor)
    choice = LATEST if until is None else SnapshotChoice(snapshot_id=until)
    resolved, view = await snapshot_view(call, parameters, app, choice)
    name = folded_table(call)
    if call.principal.sees(name):
        call.principal.require_table("query", name)
    return resolved, QueryService.describe(view, name, call.principal.sees).schema


async def _require_known(app: Dependencies, after: int) -> None:
    """A snapshot that is gone still says where a window begins; one of a lost line does not."""

    if after == 0:
        return
    try:
        await app.catalog.snapshot(after)
    except SnapshotExpired:
        return
    except SnapshotNotFound:
        raise SnapshotNotFound(f"there is no snapshot {after} to begin after") from None


def _left_ms(call: Call, parameters: Parameters) -> int:
    return max(1, round((call.deadline_s(parameters.timeout_ms()) - time.monotonic()) * 1000))


def _headers(page: ChangesPage, window: Window, token: str) -> tuple[Header, ...]:
    headers = [
        (b"cache-control", b"no-store"),
        (b"lakebus-snapshot-id", str(window.until).encode("ascii")),
        (b"lakebus-visibility-token", token.encode("ascii")),
    ]
    if page.cursor is not None:
        headers.append((b"lakebus-changes-cursor", page.cursor.encode("ascii")))
    return tuple(headers)


def _document(table: str, window: Window, page: ChangesPage, token: str) -> bytes:
    rest = msgspec.json.encode(
        {
            "row_count": page.row_count,
            "cursor": page.cursor,
            "table": table,
            "after": window.after,
            "until": window.until,
            "snapshot_id": window.until,
            "visibility_token": token,
        }
    )
    columns = msgspec.json.encode(page.columns)
    return b'{"columns":' + columns + b',"rows":' + page.body + b"," + rest[1:]
