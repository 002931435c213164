"""What requests carry: bodies, query parameters and headers, as OpenAPI describes them.

The shapes of documents are read from the types that decode them; said here are only the bounds and
words that a type does not have. Rows have the shape of their table, which no description knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import msgspec

from serve_app.admin import KeyDocument
from serve_app.calls import TIMEOUT_MS_DEFAULT, TIMEOUT_MS_MAX
from serve_app.deletes import DeleteDocument
from serve_app.erasures import EraseDocument
from serve_app.maintenance import MaintenanceDocument, TagDocument
from serve_app.openapi_answers import FLAG, TEXT, listed, ref
from serve_app.openapi_problems import Schema
from serve_app.query import QueryDocument
from serve_app.snapshots import VisibilityDocument
from serve_app.tables import ChangeDocument, CreateDocument
from storage.ingesting.grants import SCOPES
from storage.maintenance.jobs import JobKind
from storage.reading.changes import ROWS_MAX
from storage.rows.decode import JSON
from storage.rows.multipart import MULTIPART

ID_MAX: Final = 2**63 - 1
_ID: Final[Schema] = {"type": "integer", "minimum": 0, "maximum": ID_MAX}
_TIMEOUT: Final[Schema] = {
    "type": "integer",
    "minimum": 1,
    "maximum": TIMEOUT_MS_MAX,
    "default": TIMEOUT_MS_DEFAULT,
}
_BOOLEAN: Final[Schema] = FLAG | {"default": False}
_PAGE: Final[Schema] = {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}

Described = tuple[Schema, str]

#: (schema, what it means) of every query parameter that any route knows.
PARAMETERS: Final[Mapping[str, Described]] = {
    "wait": (
        {"type": "string", "enum": ["durable", "visible"], "default": "durable"},
        "What to wait for: that the rows are durable, or that a snapshot shows them",
    ),
    "timeout_ms": (_TIMEOUT, "The time budget from arrival to the last byte"),
    "on_invalid": (
        {"type": "string", "enum": ["reject", "quarantine"], "default": "reject"},
        "What happens to rows that do not fit",
    ),
    "create": (_BOOLEAN, "Make missing tables from their rows; needs the scope create"),
    "sql": (TEXT, "One statement"),
    "parameters": (TEXT, "Values for ? (a JSON list) or $name (a JSON object)"),
    "snapshot": (TEXT, 'latest, a snapshot id, {"id": n} or {"timestamp": "…"}'),
    "min_visibility_token": (listed(TEXT), "A token that the snapshot must cover; may be repeated"),
    "token": (listed(TEXT) | {"minItems": 1}, "A token to wait for; may be repeated"),
    "max_rows": (_ID | {"minimum": 1}, "A limit: more rows are result_too_large"),
    "max_staleness_ms": (_ID, "How old the newest snapshot may be"),
    "deterministic": (_BOOLEAN, "One thread, rows in stored order"),
    "limit": (_PAGE, "At most"),
    "before": (_ID, "Only what has a lower id"),
    "kind": ({"type": "string", "enum": ["", *JobKind]}, "Only jobs of this kind"),
    "table": (TEXT, "Only this table"),
    "key": (TEXT | {"minLength": 1}, "The Idempotency-Key of a request of one's own"),
    "target": (TEXT | {"minLength": 1}, "The table of that request; * for several"),
    "dry_run": (_BOOLEAN, "Only say what would be done"),
    "after": (_ID, "The snapshot whose rows are known; 0 for none"),
    "until": (_ID, "The last snapshot whose rows are wanted; the newest if left out"),
    "cursor": (TEXT, "Where the last page ended; after and until are in it"),
}

_AT_ONCE: Final[Described] = (
    _TIMEOUT | {"minimum": 0, "default": 0},
    "How long to wait for its end",
)
_NAME_OF: Final = "[A-Za-z_][A-Za-z0-9_]{0,62}"
#: Where an operation takes a parameter otherwise than the others.
_OWN: Final[Mapping[tuple[str, str], Described]] = {
    ("get_batch", "timeout_ms"): _AT_ONCE,
    ("get_delete", "timeout_ms"): _AT_ONCE,
    ("get_erasure", "timeout_ms"): _AT_ONCE,
    ("get_job", "timeout_ms"): _AT_ONCE,
    ("post_maintenance", "timeout_ms"): _AT_ONCE,
    ("get_visibility", "timeout_ms"): (_TIMEOUT | {"minimum": 0}, "How long to wait"),
    ("get_changes", "limit"): (_PAGE | {"maximum": ROWS_MAX, "default": 1000}, "Rows of a page"),
    ("get_jobs", "before"): (
        {"type": "string", "format": "uuid"},
        "Only jobs made before the job of this id",
    ),
    ("get_files", "snapshot"): (
        {"type": "string", "pattern": "^(latest|[0-9]{1,18})$"},
        "latest, or a snapshot id",
    ),
}
#: Parameters without which an operation cannot be.
_REQUIRED: Final = {
    ("get_query", "sql"),
    ("get_visibility", "token"),
    ("find_trace", "key"),
    ("find_trace", "target"),
}
PATH_VALUES: Final[Mapping[str, Schema]] = {
    "kind": {"type": "string", "enum": ["compact", "retain", "collect", "validate"]},
    "table": {"type": "string", "pattern": rf"^({_NAME_OF}\.)?{_NAME_OF}$"},
    "job_id": {"type": "string", "format": "uuid"},
    "snapshot_id": {"type": "string", "pattern": "^(latest|[0-9]{1,18})$"},
    "quarantine_id": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
}

_KEY: Final[Described] = (
    {"type": "string", "pattern": "^[!-~]{1,255}$"},
    "Makes a repeated request the same request",
)
_FIRST: Final[Described] = (
    {"type": "string", "format": "date-time"},
    "The time of the first attempt; older than the window is refused, not stored twice",
)
_ORDERING: Final[Described] = (
    {"type": "string", "pattern": "^[ -~]{1,255}$"},
    "Requests with the same one go to the same shard, in the order of their receipts",
)
_MATCH: Final[Described] = (
    {"type": "string", "pattern": '^([*]|"?[0-9]{1,9}"?)$'},
    "The schema version that the change was made for",
)
_ROW_HEADERS: Final[Mapping[str, Described]] = {
    "Idempotency-Key": _KEY,
    "Idempotency-Not-Before": _FIRST,
    "Lakebus-Ordering-Key": _ORDERING,
}
_KEYED: Final[Mapping[str, Described]] = {"Idempotency-Key": _KEY}
#: Headers that an operation acts on, by the name of its handler.
HEADERS: Final[Mapping[str, Mapping[str, Described]]] = {
    "post_table_rows": _ROW_HEADERS,
    "post_rows": _ROW_HEADERS,
    "patch_table": {"If-Match": _MATCH, **_KEYED},
    **dict.fromkeys(
        (
            "post_table",
            "delete_table",
            "post_delete",
            "post_erase",
            "post_key",
            "delete_key",
            "replay_quarantined",
            "delete_quarantined",
            "post_maintenance",
            "post_tag",
            "delete_tag",
        ),
        _KEYED,
    ),
}

# --- bodies ------------------------------------------------------------------------------------

#: The type that decodes the body of an operation, and whether there must be one.
DOCUMENTS: Final[Mapping[str, tuple[type[msgspec.Struct], bool]]] = {
    "post_table": (CreateDocument, True),
    "patch_table": (ChangeDocument, True),
    "post_delete": (DeleteDocument, True),
    "post_erase": (EraseDocument, True),
    "post_query": (QueryDocument, True),
    "post_visibility": (VisibilityDocument, True),
    "post_key": (KeyDocument, True),
    "post_tag": (TagDocument, True),
    "post_maintenance": (MaintenanceDocument, False),
}
_TABLES_OF: Final[Schema] = listed(TEXT) | {"minItems": 1}
_SCOPE: Final[Schema] = {
    "anyOf": [
        {"type": "string", "enum": [*SCOPES]},
        {
            "type": "object",
            "required": ["scope"],
            "properties": {"scope": {"type": "string", "enum": [*SCOPES]}, "tables": _TABLES_OF},
            "additionalProperties": False,
        },
    ]
}
_AT_SNAPSHOT: Final[Schema] = {
    "anyOf": [
        {"enum": ["latest", None]},
        {
            "type": "object",
            "required": ["id"],
            "properties": {"id": {"type": "integer"}},
            "additionalProperties": False,
        },
        {
            "type": "object",
            "required": ["timestamp"],
            "properties": {"timestamp": {"type": "string", "format": "date-time"}},
            "additionalProperties": False,
        },
    ]
}
#: What the types do not say of their members.
_REFINED: Final[Mapping[str, Mapping[str, Schema]]] = {
    "QueryDocument": {
        "timeout_ms": {"anyOf": [_TIMEOUT, {"type": "null"}]},
        "max_rows": {"anyOf": [_ID | {"minimum": 1}, {"type": "null"}]},
        "max_staleness_ms": {"anyOf": [_ID, {"type": "null"}]},
        "snapshot": _AT_SNAPSHOT,
    },
    "DeleteDocument": {"timeout_ms": {"anyOf": [_TIMEOUT, {"type": "null"}]}},
    "EraseDocument": {"timeout_ms": {"anyOf": [_TIMEOUT, {"type": "null"}]}},
    "VisibilityDocument": {
        "timeout_ms": {"anyOf": [_TIMEOUT | {"minimum": 0}, {"type": "null"}]},
        "token": {"anyOf": [TEXT, listed(TEXT) | {"minItems": 1}]},
    },
    "KeyDocument": {
        "scopes": listed(_SCOPE) | {"minItems": 1},
        "expires_at": {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]},
    },
    "TagDocument": {"snapshot_id": {"anyOf": [_ID, {"const": "latest"}]}},
}

_ROW: Final[Schema] = {"type": "object", "description": "A row: values by the names of columns"}
_SOME_ROWS: Final[Schema] = {"anyOf": [listed(_ROW) | {"minItems": 1}, _ROW]}
#: Rows in the forms that JSON Schema can speak of.
_ROWS: Final[Mapping[str, Schema]] = {
    JSON: _SOME_ROWS,
    MULTIPART: {"type": "object", "description": "One part a table, named by it"},
}
_SEVERAL: Final[Schema] = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": _SOME_ROWS,
    "description": "Rows by table",
}


def parameters_of(operation: str, names: Sequence[str]) -> list[dict[str, object]]:
    """The parameters in the query string and the headers of an operation."""

    described: list[dict[str, object]] = []
    for name in names:
        schema, words = _OWN.get((operation, name), PARAMETERS[name])
        described.append(
            {
                "name": name,
                "in": "query",
                "schema": schema,
                "description": words,
                **({"required": True} if (operation, name) in _REQUIRED else {}),
            }
        )
    for name, (schema, words) in HEADERS.get(operation, {}).items():
        described.append({"name": name, "in": "header", "schema": schema, "description": words})
    return described


def body_of(operation: str, media_types: Sequence[str]) -> dict[str, object] | None:
    """The request body of an operation, if it takes one."""

    if operation in DOCUMENTS:
        kind, required = DOCUMENTS[operation]
        return {"required": required, "content": {JSON: {"schema": ref(kind.__name__)}}}
    if not media_types:
        return None
    rows = {**_ROWS, JSON: _SEVERAL} if operation == "post_rows" else _ROWS
    return {
        "required": operation != "replay_quarantined",
        "content": {kind: {"schema": rows.get(kind, {})} for kind in media_types},
    }


def components() -> dict[str, object]:
    """The schemas that bodies refer to, from the types that decode them."""

    _, shapes = msgspec.json.schema_components(
        [kind for kind, _ in DOCUMENTS.values()],
        schema_hook=_of_anything,
        ref_template="#/components/schemas/{name}",
    )
    for name, members in _REFINED.items():
        properties = cast(dict[str, Any], shapes[name]["properties"])
        for member, schema in members.items():
            default = {k: v for k, v in properties[member].items() if k == "default"}
            properties[member] = schema | default
    return cast(dict[str, object], shapes)


def _of_anything(kind: type) -> dict[str, Any]:
    """Members that are judged by what reads them, not by the decoder."""

    if kind is not object:
        raise NotImplementedError(kind)
    return {"description": "Any JSON"}
