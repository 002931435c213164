"""Errors as OpenAPI describes them: the shape of each code, and which codes a route may answer.

`serve_app.problems` says which status a code has. What is said here beyond that, the further
members of a code and the codes of each route, is held to by tests that fuzz the service.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from lakebus.errors import LakebusError, all_errors
from serve_app.problems import MEDIA_TYPE, STATUS

Schema = dict[str, object]

_TEXT: Final[Schema] = {"type": "string"}
_WHOLE: Final[Schema] = {"type": "integer"}
_NUMBER: Final[Schema] = {"type": "number"}
_NAMES: Final[Schema] = {"type": "array", "items": _TEXT}
_SUPPORTED: Final = "What is supported here"
_ROW_ERROR: Final[Schema] = {
    "type": "object",
    "required": ["row", "column", "reason", "value"],
    "properties": {
        "row": {"type": "integer", "minimum": 0, "description": "Counted from 0"},
        "column": {"type": ["string", "null"]},
        "reason": _TEXT,
        "value": {"type": ["string", "null"], "description": "What was sent, cut if it is long"},
        "table": {"type": "string", "description": "Which one, in a request to several"},
    },
}

#: (always there, there where it is known) of the members that a code has beside those of all.
_MEMBERS: Final[Mapping[str, tuple[Schema, Schema]]] = {
    "malformed_body": ({}, {"position": {**_WHOLE, "description": "Byte"}, "line": _WHOLE}),
    "sql_error": ({}, {"position": {**_WHOLE, "description": "Offset in the statement"}}),
    "forbidden": ({"scope": {**_TEXT, "description": "The one that was missing"}}, {}),
    "statement_not_allowed": ({}, {"kind": {**_TEXT, "description": "Statement or function"}}),
    "table_not_found": ({}, {"did_you_mean": _NAMES}),
    "method_not_allowed": ({"supported": {**_NAMES, "description": _SUPPORTED}}, {}),
    "unsupported_media_type": ({"supported": {**_NAMES, "description": _SUPPORTED}}, {}),
    "tag_exists": ({"snapshot_id": _WHOLE}, {}),
    "token_not_covered": ({"snapshot_id": _WHOLE}, {}),
    "quarantined": ({"batch_id": _TEXT, "reason": _TEXT}, {}),
    "schema_version_mismatch": ({}, {"schema_version": _WHOLE}),
    "snapshot_expired": ({}, {"oldest_snapshot_id": _WHOLE}),
    "history_lost": (
        {},
        {"newest_kept_snapshot_id": _WHOLE, "kept_until": _TEXT, "lost_until": _TEXT},
    ),
    "idempotency_expired": ({}, {"batch_id": _TEXT}),
    "body_too_large": ({"limit_bytes": _WHOLE}, {}),
    "result_too_large": ({}, {"limit_rows": _WHOLE, "limit_bytes": _WHOLE}),
    "rows_invalid": (
        {
            "errors": {"type": "array", "items": _ROW_ERROR, "minItems": 1, "maxItems": 100},
            "error_count": {"type": "integer", "minimum": 1},
        },
        {},
    ),
    "idempotency_conflict": ({}, {"batch_id": _TEXT, "job_id": _TEXT}),
    "rate_limited": (
        {"limit": _TEXT, "limit_value": _NUMBER},
        {"retry_after_ms": _WHOLE, "replicas": _WHOLE},
    ),
    "backpressure": ({}, {"limit": _TEXT, "limit_value": _NUMBER}),
    "unavailable": ({}, {"phase": _TEXT, "failing": _NAMES}),
    "outcome_unknown": ({}, {"phase": _TEXT}),
    "visibility_timeout": ({"waited_ms": _NUMBER}, {}),
    "query_timeout": ({"phase": _TEXT}, {"waited_ms": _NUMBER}),
}

# --- which codes where -------------------------------------------------------------------------

OPEN: Final = ("malformed_request", "internal_error")
#: Whatever needs a key and asks the catalog.
KEYED: Final = (
    *OPEN,
    "unauthenticated",
    "not_found",
    "rate_limited",
    "unavailable",
    "history_rewound",
)
SCOPED: Final = ("forbidden",)
DOCUMENT: Final = ("malformed_body", "unsupported_media_type", "body_too_large")
KEY: Final = ("malformed_idempotency_key",)
WRITE: Final = (*KEY, "outcome_unknown")
#: The newest snapshot, within the time.
NEWEST: Final = ("visibility_timeout",)
TOKENS: Final = (
    *NEWEST,
    "malformed_token",
    "token_unknown",
    "token_history_lost",
    "quarantined",
)
ONE_SNAPSHOT: Final = ("snapshot_not_found", "snapshot_expired", "history_lost")
ROWS: Final = (
    *DOCUMENT,
    *WRITE,
    "table_not_found",
    "schema_invalid",
    "rows_invalid",
    "idempotency_conflict",
    "idempotency_expired",
    "backpressure",
)
SQL: Final = (
    *TOKENS,
    *ONE_SNAPSHOT,
    "token_not_covered",
    "time_in_future",
    "table_not_found",
    "sql_error",
    "statement_not_allowed",
    "result_too_large",
    "query_timeout",
    "cancelled",
    "unsupported_media_type",
)
#: What a predicate, and the tokens it waits for, can be wrong in.
PREDICATE: Final = (
    *DOCUMENT,
    *WRITE,
    *TOKENS,
    "table_not_found",
    "sql_error",
    "statement_not_allowed",
    "query_timeout",
    "idempotency_conflict",
)
#: What a job may end in, told by the request that waited for it.
_JOB_ENDS: Final = (
    "sql_error",
    "table_not_found",
    "schema_version_mismatch",
    "result_too_large",
    "query_timeout",
    "unavailable",
    "internal_error",
)


def responses(codes: Iterable[str], *, job: bool = False) -> dict[str, object]:
    """The responses of an operation for these codes, by status. `job`: the operation waits for a
    job, whose failure is its answer."""

    by_status: dict[int, set[str]] = {}
    for code in codes:
        by_status.setdefault(status_of(code), set()).add(_name(code))
    for code in _JOB_ENDS if job else ():
        by_status.setdefault(status_of(code), set()).add("FailedJob")
    return {str(status): _response(status, names) for status, names in sorted(by_status.items())}


def components() -> dict[str, object]:
    """The schemas that `responses` refers to."""

    titles = titles_by_code()
    shapes: dict[str, object] = {
        _name(code): _problem(code, titles[code], *_MEMBERS.get(code, ({}, {})))
        for code in (*STATUS, "internal_error")
    }
    failed = _base()
    failed["description"] = "The job that the request waited for has failed; `code` says why"
    return shapes | {
        "FailedJob": _with(failed, {"job_id": {"type": "string", "format": "uuid"}}),
        "Problem": _base(),
    }


def members_of(code: str) -> list[str]:
    """What a problem of this code may have beside what every problem has."""

    always, sometimes = _MEMBERS.get(code, ({}, {}))
    return [*always, *sometimes]


def titles_by_code() -> dict[str, str]:
    titles: dict[str, str] = {}
    for kind in all_errors():
        titles.setdefault(kind.code, kind.title)
    return titles | {"internal_error": LakebusError.title}


def status_of(code: str) -> int:
    return STATUS.get(code, 500)


def retry_after(status: int) -> bool:
    """Whether answers of this status say when to come back."""

    return status in (429, 503)


def _response(status: int, names: Iterable[str]) -> dict[str, object]:
    shapes = [{"$ref": f"#/components/schemas/{name}"} for name in sorted(names)]
    headers: dict[str, object] = {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}}
    if retry_after(status):
        headers["Retry-After"] = {"$ref": "#/components/headers/Retry-After"}
    if status == 401:
        headers["WWW-Authenticate"] = {"$ref": "#/components/headers/WWW-Authenticate"}
    return {
        "description": "An error; `code` is stable",
        "headers": headers,
        "content": {
            MEDIA_TYPE.decode("ascii"): {
                "schema": shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
            }
        },
    }


def _problem(code: str, title: str, always: Schema, sometimes: Schema) -> Schema:
    shape = _with(_base(), always)
    properties = shape["properties"]
    assert isinstance(properties, dict)
    properties |= sometimes
    properties |= {"code": {"const": code}, "status": {"const": status_of(code)}}
    return {"description": title} | shape


def _base() -> Schema:
    properties: Schema = {
        "type": {"type": "string", "format": "uri-reference"},
        "title": _TEXT,
        "status": {"type": "integer"},
        "detail": _TEXT,
        "code": {"type": "string", "enum": [*sorted(STATUS), "internal_error"]},
        "retryable": {"type": "boolean"},
        "request_id": _TEXT,
    }
    return {"type": "object", "required": [*properties], "properties": properties}


def _with(shape: Schema, members: Schema) -> Schema:
    required, properties = shape["required"], shape["properties"]
    assert isinstance(required, list)
    assert isinstance(properties, dict)
    return shape | {"required": [*required, *members], "properties": properties | members}


def _name(code: str) -> str:
    return "".join(word.capitalize() for word in code.split("_"))
