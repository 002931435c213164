"""Snapshots: the list, one, and the wait for a token without a query."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from lakebus.clock import format_time
from lakebus.errors import MalformedRequest, SnapshotNotFound
from lakebus.snapshots import Snapshot
from lakebus.tokens import VisibilityToken
from serve_app.bodies import read_document
from serve_app.calls import TIMEOUT_MS_DEFAULT, TIMEOUT_MS_MAX, Answer, Call, Parameters
from serve_app.dependencies import Dependencies
from storage.ingesting.grants import Principal
from storage.reading.resolve import LATEST, Resolved, SnapshotChoice

_ID = re.compile(r"[0-9]{1,18}")
_ID_MAX = 2**63 - 1
_CHANGES = ("created", "dropped", "version", "reason", "cut", "job_id", "erasure_id")
_COUNTS = ("rows_added", "rows_removed", "files_added", "files_removed")


class VisibilityDocument(msgspec.Struct, forbid_unknown_fields=True):
    token: str | list[str]
    timeout_ms: int | None = None


async def get_snapshots(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require("query")
    limit = parameters.integer("limit", low=1, high=1000, default=100)
    before = parameters.optional_integer("before", low=0, high=_ID_MAX)
    found = await app.catalog.snapshots(limit=limit, before=before)
    names = await _names(call, app)
    tags = await _tags(call, app)
    return Answer(
        {
            "snapshots": [
                _snapshot_json(s, names, call.principal) | {"tags": tags.get(s.snapshot_id, [])}
                for s in found
            ]
        }
    )


async def get_snapshot(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require("query")
    text = call.path_values["snapshot_id"]
    resolved = await app.resolver.resolve(
        _choice(text), deadline_s=call.deadline_s(parameters.timeout_ms())
    )
    snapshot = await app.catalog.snapshot(resolved.snapshot_id)
    names = await _names(call, app)
    return Answer(
        _snapshot_json(snapshot, names, call.principal)
        | {"erasures": await _erasures(call, app, snapshot.snapshot_id)}
        | {"tags": (await _tags(call, app)).get(snapshot.snapshot_id, [])}
        | {"visibility_token": app.codec.encode(_floor(resolved))}
    )


async def get_visibility(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    _require_reading(call)
    tokens = parameters.many("token")
    return await _visible(call, app, list(tokens), parameters.timeout_ms(low=0))


async def post_visibility(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    _require_reading(call)
    deadline_s = call.deadline_s(TIMEOUT_MS_DEFAULT)
    document = await read_document(call, VisibilityDocument, deadline_s=deadline_s)
    timeout_ms = TIMEOUT_MS_DEFAULT if document.timeout_ms is None else document.timeout_ms
    if not 0 <= timeout_ms <= TIMEOUT_MS_MAX:
        raise MalformedRequest(f"timeout_ms must be a whole number, 0 to {TIMEOUT_MS_MAX}")
    tokens = [document.token] if isinstance(document.token, str) else document.token
    return await _visible(call, app, tokens, timeout_ms)


def _require_reading(call: Call) -> None:
    """Who writes may ask whether it can be read, too."""

    if not call.principal.has("ingest"):
        call.principal.require("query")


async def _visible(call: Call, app: Dependencies, tokens: list[str], timeout_ms: int) -> Answer:
    if not tokens:
        raise MalformedRequest("give at least one token")
    resolved = await app.resolver.resolve(
        LATEST, tokens=tokens, deadline_s=call.deadline_s(timeout_ms)
    )
    return Answer(
        {
            "visible": True,
            "snapshot_id": resolved.snapshot_id,
            "snapshot_time": format_time(resolved.published_at),
            "visibility_token": app.codec.encode(resolved.token),
            "waited_ms": round(resolved.waited_ms, 3),
        }
    )


def _choice(text: str) -> SnapshotChoice:
    if text == "latest":
        return LATEST
    if not _ID.fullmatch(text):
        raise SnapshotNotFound(f"there is no snapshot {text[:40]}")
    return SnapshotChoice(snapshot_id=int(text))


def _floor(resolved: Resolved) -> VisibilityToken:
    return VisibilityToken(resolved.history, resolved.snapshot_id)


async def _names(call: Call, app: Dependencies) -> Mapping[str, str]:
    """Names of all tables ever seen by retained snapshots, by table id as text."""

    resolved = await app.resolver.resolve(deadline_s=call.deadline_s(TIMEOUT_MS_DEFAULT))
    view = await app.manifest.at(resolved.snapshot_id, resolved.head)
    return {str(schema.table_id): name for name, schema in view.schemas().items()}


async def _erasures(call: Call, app: Dependencies, snapshot_id: int) -> list[dict[str, object]]:
    """What erasures took from the snapshot, of the tables that the caller may see (D10)."""

    resolved = await app.resolver.resolve(deadline_s=call.deadline_s(TIMEOUT_MS_DEFAULT))
    at = await app.manifest.at(max(snapshot_id, 1), resolved.head)
    return [
        {"erasure_id": str(mark.erasure_id), "table": name, "rows": mark.rows}
        for name, schema in at.schemas().items()
        if call.principal.sees(name)
        for mark in at.marks(schema.table_id)
    ]


async def _tags(call: Call, app: Dependencies) -> Mapping[int, Sequence[str]]:
    """Names of tags by snapshot. A name says what its maker thought of: who sees only a part of the
    tables sees none (D10)."""

    seen = call.principal.covers("query") or call.principal.covers("admin")
    return await app.maintenance.tags_of_snapshots() if app.maintenance and seen else {}


def _snapshot_json(
    snapshot: Snapshot, names: Mapping[str, str], principal: Principal
) -> dict[str, object]:
    tables = _tables_json(snapshot, names, principal)
    return {
        "snapshot_id": snapshot.snapshot_id,
        "parent_id": snapshot.parent_id,
        "published_at": format_time(snapshot.published_at),
        "operation": snapshot.operation,
        "tables": tables,
        **{count: sum(_count(table, count) for table in tables) for count in _COUNTS},
    }


def _tables_json(
    snapshot: Snapshot, names: Mapping[str, str], principal: Principal
) -> list[dict[str, object]]:
    """What the snapshot did to each table, without those that the caller may not see (D10)."""

    touched = snapshot.summary.get("tables")
    if not isinstance(touched, Mapping):
        return []
    listed: list[dict[str, object]] = []
    for table_id, what in touched.items():
        name = names.get(str(table_id)) or what.get("dropped") or what.get("created")
        if isinstance(name, str) and principal.sees(name):
            known = {key: what[key] for key in (*_CHANGES, *_COUNTS) if key in what}
            listed.append({"table": name, **known})
    return listed


def _count(table: Mapping[str, object], count: str) -> int:
    value = table.get(count, 0)
    return value if isinstance(value, int) else 0
