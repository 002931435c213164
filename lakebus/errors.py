"""Every error lakebus raises, in one tree, grouped by what the caller does next.

::

    LakebusError
    ├── FixRequest            change the call, then send it again
    │   ├── MalformedRequest, MalformedBody, MalformedToken, MalformedIdempotencyKey
    │   ├── SqlError, StatementNotAllowed
    │   ├── Unauthenticated, Forbidden, MethodNotAllowed, UnsupportedMediaType
    │   ├── RowsInvalid, SchemaInvalid, SchemaChangeInvalid, SchemaVersionMismatch
    │   ├── BodyTooLarge, ResultTooLarge
    │   ├── IdempotencyConflict, TokenUnknown, TokenNotCovered, TimeInFuture
    │   └── TableExists, TagExists
    ├── NotFound              the thing is not there (or not yours to see)
    │   └── TableNotFound, SnapshotNotFound, BatchNotFound, QueryNotFound, JobNotFound
    ├── Gone                  it was there and never will be again
    │   └── SnapshotExpired, TokenHistoryLost, HistoryLost, IdempotencyExpired
    ├── RetryLater            the same call may succeed later
    │   ├── Unavailable, HistoryRewound, RateLimited, Backpressure
    │   └── VisibilityTimeout, QueryTimeout
    ├── OutcomeUnknown        it may have happened: ask again with the same key
    ├── Quarantined           own rows were set aside; look at the reason
    ├── Cancelled             somebody ended it on purpose
    └── Fault                 a bug or damage: report it
        └── LeaseLost (internal), Corrupt, StartRefused, ConfigurationError

``code`` is the stable snake_case word of the HTTP API; the HTTP status belongs to ``serve_app``.
Errors cross process boundaries, so each survives a pickle round trip.
"""

from __future__ import annotations

from typing import Any, ClassVar


class LakebusError(Exception):
    """Base of every error of lakebus. `detail` is one sentence that says what to change."""

    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    retryable: ClassVar[bool] = False
    #: True: raised by the client itself (`lakebus.client_errors`) and never sent over HTTP.
    local: ClassVar[bool] = False

    def __init__(
        self, detail: str = "", /, *, retry_after_s: float | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.detail = detail or self.title
        self.retry_after_s = retry_after_s
        self.members = members

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.detail, self.retry_after_s, self.members))

    def __str__(self) -> str:
        return self.detail


def _rebuild(
    kind: type[LakebusError], detail: str, retry_after_s: float | None, members: dict[str, Any]
) -> LakebusError:
    return kind(detail, retry_after_s=retry_after_s, **members)


# --- fix the request -----------------------------------------------------------------------


class FixRequest(LakebusError):
    code, title = "malformed_request", "The request is not well formed"


class MalformedRequest(FixRequest):
    code, title = "malformed_request", "The request is not well formed"


class MalformedBody(FixRequest):
    code, title = "malformed_body", "The body cannot be read in its declared format"


class MalformedToken(FixRequest):
    code, title = "malformed_token", "The visibility token is damaged or was not issued here"


class MalformedIdempotencyKey(FixRequest):
    code, title = "malformed_idempotency_key", "The idempotency key is not usable"


class SqlError(FixRequest):
    """Bad SQL. Member `position`: character offset in the statement, where known."""

    code, title = "sql_error", "The SQL statement is wrong"


class StatementNotAllowed(FixRequest):
    """Member `kind`: the kind of statement or the name of the function that was refused."""

    code, title = "statement_not_allowed", "This kind of statement is not allowed"


class Unauthenticated(FixRequest):
    code, title = "unauthenticated", "A valid API key is needed"


class Forbidden(FixRequest):
    """Member `scope`: the scope that was missing."""

    code, title = "forbidden", "The API key does not allow this"


class MethodNotAllowed(FixRequest):
    code, title = "method_not_allowed", "This method is not supported here"


class UnsupportedMediaType(FixRequest):
    code, title = "unsupported_media_type", "This format is not supported here"


class RowsInvalid(FixRequest):
    """Members `errors`: the first 100 of {row, column, reason, value}; `error_count`: all."""

    code, title = "rows_invalid", "Some rows do not fit the table"


class SchemaInvalid(FixRequest):
    code, title = "schema_invalid", "The table definition is not valid"


class SchemaChangeInvalid(FixRequest):
    code, title = "schema_change_invalid", "The schema change is not possible"


class SchemaVersionMismatch(FixRequest):
    code, title = "schema_version_mismatch", "The table has another schema version"


class BodyTooLarge(FixRequest):
    """Member `limit_bytes`."""

    code, title = "body_too_large", "The body is larger than allowed"


class ResultTooLarge(FixRequest):
    """Members `limit_rows` or `limit_bytes`."""

    code, title = "result_too_large", "The result is larger than allowed"


class IdempotencyConflict(FixRequest):
    """The key was used with another payload. Member `batch_id`: the first batch."""

    code, title = "idempotency_conflict", "The idempotency key was used with other rows"


class TokenUnknown(FixRequest):
    code, title = "token_unknown", "The token is ahead of everything written here"


class TokenNotCovered(FixRequest):
    code, title = "token_not_covered", "The chosen snapshot does not cover the token"


class TimeInFuture(FixRequest):
    code, title = "time_in_future", "The time lies in the future"


class TableExists(FixRequest):
    code, title = "table_exists", "A table of this name exists"


class TagExists(FixRequest):
    """Member `snapshot_id`: the one that the tag names."""

    code, title = "tag_exists", "The tag names another snapshot"


# --- not there -----------------------------------------------------------------------------


class NotFound(LakebusError):
    """Member `did_you_mean`: names close by, among what the caller may see."""

    code, title = "not_found", "There is nothing here"


class TableNotFound(NotFound):
    code, title = "table_not_found", "There is no such table"


class SnapshotNotFound(NotFound):
    code, title = "snapshot_not_found", "There is no such snapshot"


class BatchNotFound(NotFound):
    code, title = "batch_not_found", "There is no such batch"


class QueryNotFound(NotFound):
    code, title = "query_not_found", "There is no such query"


class JobNotFound(NotFound):
    code, title = "job_not_found", "There is no such job"


class Gone(LakebusError):
    """Member `oldest_snapshot_id`: the oldest snapshot that can still be read, where it helps."""

    code, title = "snapshot_expired", "No longer there"


class SnapshotExpired(Gone):
    code, title = "snapshot_expired", "The snapshot has expired"


class TokenHistoryLost(Gone):
    code, title = "token_history_lost", "The token belongs to a lost line of history"


class HistoryLost(Gone):
    code, title = "history_lost", "The snapshot belongs to a lost line of history"


class IdempotencyExpired(Gone):
    code, title = "idempotency_expired", "The idempotency window has passed"


# --- retry later ---------------------------------------------------------------------------


class RetryLater(LakebusError):
    retryable = True
    code, title = "unavailable", "Not available now"


class Unavailable(RetryLater):
    code, title = "unavailable", "Not available now"


class HistoryRewound(RetryLater):
    code, title = "history_rewound", "The catalog is older than the object store"
    retryable = False


class RateLimited(RetryLater):
    """Members `limit`: which one was hit; `limit_value`; `retry_after_ms` where it is a quota."""

    code, title = "rate_limited", "Too many requests"


class Backpressure(RetryLater):
    code, title = "backpressure", "The ingest bus is full for now"


class VisibilityTimeout(RetryLater):
    """Member `waited_ms`."""

    code, title = "visibility_timeout", "The rows were not visible in time"


class QueryTimeout(RetryLater):
    """Members `waited_ms` and `phase`: the phase in which the budget ran out."""

    code, title = "query_timeout", "The query did not end in time"


class OutcomeUnknown(LakebusError):
    """The write may or may not have happened; a retry with the same key finds out (A6)."""

    code, title = "outcome_unknown", "The outcome is not known"
    retryable = True


class Quarantined(LakebusError):
    """The caller's own entry was quarantined. Members `batch_id`, `reason`."""

    code, title = "quarantined", "The rows were quarantined"


class Cancelled(LakebusError):
    code, title = "cancelled", "Cancelled"


# --- report --------------------------------------------------------------------------------


class Fault(LakebusError):
    code, title = "internal_error", "Internal error"


class LeaseLost(Fault):
    """The range was reclaimed under a newer epoch; the loser drops its work (B4, B6)."""

    code, title = "lease_lost", "The lease was reclaimed"


class Corrupt(Fault):
    """Stored bytes are not what was recorded. Never repaired silently."""

    code, title = "corrupt", "Stored data is damaged"


class StartRefused(Fault):
    """A server does not start on this ground; `detail` names the command that fixes it."""

    code, title = "start_refused", "The server does not start here"


class ConfigurationError(Fault):
    code, title = "configuration_error", "A setting is wrong"


def all_errors() -> list[type[LakebusError]]:
    """Every error class of the tree that may be sent over HTTP, depth first."""

    found: list[type[LakebusError]] = []

    def walk(kind: type[LakebusError]) -> None:
        if kind.local:
            return
        found.append(kind)
        for child in kind.__subclasses__():
            walk(child)

    walk(LakebusError)
    return found
