"""Errors as `application/problem+json` (RFC 9457), and the one table of HTTP status by code.

What is not in the table never leaves the process: it is logged with its request id, and the caller
gets a 500 that says nothing of our insides (no stack trace, no SQL, no path).
"""

from __future__ import annotations

import logging
import math
from typing import Any

import msgspec

from lakebus.errors import LakebusError, OutcomeUnknown

_log = logging.getLogger(__name__)

MEDIA_TYPE = b"application/problem+json"

STATUS: dict[str, int] = {
    "malformed_request": 400,
    "malformed_body": 400,
    "malformed_token": 400,
    "malformed_idempotency_key": 400,
    "sql_error": 400,
    "unauthenticated": 401,
    "forbidden": 403,
    "statement_not_allowed": 403,
    "table_not_found": 404,
    "snapshot_not_found": 404,
    "batch_not_found": 404,
    "query_not_found": 404,
    "job_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "unsupported_media_type": 415,
    "table_exists": 409,
    "tag_exists": 409,
    "token_not_covered": 409,
    "quarantined": 409,
    "schema_version_mismatch": 409,
    "snapshot_expired": 410,
    "token_history_lost": 410,
    "history_lost": 410,
    "idempotency_expired": 410,
    "body_too_large": 413,
    "result_too_large": 413,
    "rows_invalid": 422,
    "idempotency_conflict": 422,
    "token_unknown": 422,
    "time_in_future": 422,
    "schema_invalid": 422,
    "schema_change_invalid": 422,
    "rate_limited": 429,
    "backpressure": 429,
    "cancelled": 499,
    "unavailable": 503,
    "outcome_unknown": 503,
    "history_rewound": 503,
    "visibility_timeout": 504,
    "query_timeout": 504,
}

_RETRY_AFTER_STATUS = (429, 503)
_RETRY_AFTER_S = 1.0
_OWN_MEMBERS = frozenset({"type", "title", "status", "detail", "code", "retryable", "request_id"})

Headers = list[tuple[bytes, bytes]]


def render(error: Exception, *, request_id: str, keyed: bool = False) -> tuple[int, Headers, bytes]:
    """(status, headers, body) of any exception. `keyed`: the call carried an idempotency key,
    without which an unknown outcome must not be retried."""

    if not isinstance(error, LakebusError) or error.code not in STATUS:
        _log.error("a request failed inside", exc_info=error, extra={"request_id": request_id})
        return _internal(request_id)
    status = STATUS[error.code]
    document: dict[str, Any] = {
        "type": f"/docs#{error.code}",
        "title": error.title,
        "status": status,
        "detail": error.detail,
        "code": error.code,
        "retryable": error.retryable and (keyed or not isinstance(error, OutcomeUnknown)),
        "request_id": request_id,
    }
    document |= {
        name: value
        for name, value in error.members.items()
        if name not in _OWN_MEMBERS and value is not None
    }
    headers: Headers = []
    if status in _RETRY_AFTER_STATUS:
        wait_s = error.retry_after_s if error.retry_after_s is not None else _RETRY_AFTER_S
        headers.append((b"retry-after", str(max(1, math.ceil(wait_s))).encode("ascii")))
    if status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="lakebus"'))
    if status == 405 and isinstance(allow := error.members.get("supported"), list):
        headers.append((b"allow", ", ".join(allow).encode("ascii")))
    return status, headers, msgspec.json.encode(document, enc_hook=str)


def _internal(request_id: str) -> tuple[int, Headers, bytes]:
    document = {
        "type": "/docs#internal_error",
        "title": "Internal error",
        "status": 500,
        "detail": "the server failed on this request; the operator finds it by the request id",
        "code": "internal_error",
        "retryable": False,
        "request_id": request_id,
    }
    return 500, [], msgspec.json.encode(document)
