"""What the client sends and what comes back: documents, receipts and errors in the API's forms."""

from __future__ import annotations

import datetime as dt
import json
import random
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lakebus import errors
from lakebus.client_errors import AnswerTruncated
from lakebus.client_http import Exchange, TransportFailed
from lakebus.client_results import Deleted, Erased, Sent
from lakebus.client_rows import ARROW, JSON, encode_rows, json_text
from lakebus.clock import parse_time
from lakebus.receipts import Receipt

__all__ = ["ARROW", "JSON", "encode_rows", "json_text"]

_BACKOFF_S, _BACKOFF_S_MAX = 0.05, 2.0


def write_headers(key: str | None, not_before: str | None = None) -> dict[str, str]:
    """`not_before`: when the first attempt was made, if this is not the first."""

    if key is not None and not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
        raise errors.MalformedIdempotencyKey(
            "an idempotency key is 1 to 255 visible ASCII characters"
        )
    return {
        "idempotency-key": str(uuid.uuid4()) if key is None else key,
        "idempotency-not-before": not_before or now_text(),
    }


def now_text() -> str:
    """As `format_time` writes it; strftime would take ten times as long."""

    return dt.datetime.now(dt.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def retention_document(keep_rows: tuple[str, str] | None) -> dict[str, Any] | None:
    if keep_rows is None:
        return None
    column, duration = keep_rows
    return {"rows": {"column": column, "for": duration}}


def change_document(
    *,
    dropped: Sequence[str],
    renamed: Mapping[str, str] | None,
    widened: Mapping[str, str] | None,
    relaxed: Sequence[str],
    added: Mapping[str, str] | None,
    partition_by: Sequence[str] | None,
    sort_by: Sequence[str] | None,
    keep_rows: tuple[str, str] | Literal["forever"] | None,
) -> dict[str, Any]:
    """The body of a change of a table; what is None is left out, and so stays as it is."""

    document: dict[str, Any] = {
        "drop_columns": list(dropped),
        "rename_columns": dict(renamed or {}),
        "widen_columns": dict(widened or {}),
        "relax_columns": list(relaxed),
        "add_columns": [{"name": name, "type": kind} for name, kind in (added or {}).items()],
    }
    if partition_by is not None:
        document["partition_by"] = list(partition_by)
    if sort_by is not None:
        document["sort_by"] = list(sort_by)
    if keep_rows is not None:
        kept = None if isinstance(keep_rows, str) else retention_document(keep_rows)
        document["retention"] = kept
    return document


def milliseconds(seconds: float) -> int:
    return min(100_000, max(1, round(seconds * 1000)))


# --- what comes back -----------------------------------------------------------------------


def document_of(answer: Exchange) -> dict[str, Any]:
    """Raises AnswerTruncated."""

    try:
        found: dict[str, Any] = json.loads(answer.body)
    except ValueError as error:
        raise AnswerTruncated(f"the answer is not whole JSON: {error}") from error
    return found


def sent_of(answer: Exchange) -> Sent:
    document = document_of(answer)
    return Sent(
        receipt=receipt_of(document["receipt"]),
        replayed=document["replayed"],
        visible=document["visible"],
        snapshot_id=document["snapshot_id"],
        columns_skipped=tuple(document.get("columns_skipped", ())),
    )


def receipt_of(document: Mapping[str, Any]) -> Receipt:
    times = ("accepted_at", "idempotency_expires_at")
    return Receipt(**{**document, **{name: parse_time(document[name]) for name in times}})


def deleted_of(document: Mapping[str, Any]) -> Deleted:
    """Raises the error of a delete that failed."""

    failure = document.get("error")
    if document["state"] == "failed":
        said = failure or {}
        kind = _BY_CODE.get(said.get("code", ""), errors.Fault)
        raise kind(said.get("detail", "the delete failed"), job_id=document["job_id"])
    return Deleted(
        job_id=document["job_id"],
        done=document["state"] == "done",
        replayed=document["replayed"],
        dry_run=document["dry_run"],
        snapshot_id=document["snapshot_id"],
        evaluated_at_snapshot_id=document["evaluated_at_snapshot_id"],
        rows=document["deleted_rows"],
        token=document["visibility_token"],
    )


def erased_of(document: Mapping[str, Any]) -> Erased:
    """Raises the error of an erasure that failed."""

    if document["state"] == "failed":
        said = document.get("error") or {}
        kind = _BY_CODE.get(said.get("code", ""), errors.Fault)
        raise kind(said.get("detail", "the erasure failed"), job_id=document["job_id"])
    return Erased(
        job_id=document["job_id"],
        done=document["state"] == "done",
        replayed=document["replayed"],
        dry_run=document["dry_run"],
        snapshot_id=document["snapshot_id"],
        rows=document["erased_rows"],
        token=document["visibility_token"],
        report=dict(document["report"]),
    )


#: Depth first: a class comes after the group whose code it shares, and stays.
_BY_CODE = {kind.code: kind for kind in errors.all_errors()}
_PROBLEM_MEMBERS = frozenset({"type", "title", "status", "detail", "code", "retryable"})


def error_of(answer: Exchange) -> errors.LakebusError:
    """The typed error of an answer; one that is not ours comes from something in between."""

    try:
        document = json.loads(answer.body)
        kind = _BY_CODE[document["code"]]
    except (ValueError, KeyError, TypeError):
        return _foreign(answer)
    members = {name: v for name, v in document.items() if name not in _PROBLEM_MEMBERS}
    error = kind(document["detail"], retry_after_s=answer.retry_after_s, **members)
    error.retryable = bool(document["retryable"])  # type: ignore[misc]
    return error


def _foreign(answer: Exchange) -> errors.LakebusError:
    if answer.status == 429:
        return errors.RateLimited("the server is busy", retry_after_s=answer.retry_after_s)
    if answer.status == 404 and answer.body.startswith(b"Path '"):
        # Ray Serve's balancer while the application behind it is not there: nothing was reached.
        return errors.Unavailable(
            "the server is starting, or starting again", retry_after_s=answer.retry_after_s
        )
    if answer.status >= 500 or answer.status == 408:
        return errors.OutcomeUnknown(
            f"something between here and the server answered {answer.status}",
            retry_after_s=answer.retry_after_s,
        )
    return errors.LakebusError(f"the server answered {answer.status} in a form that is not known")


def unreached(error: TransportFailed, *, keyed: bool) -> errors.LakebusError:
    if error.sent and keyed:
        return errors.OutcomeUnknown(f"the connection failed after the rows were sent: {error}")
    if error.answered:
        return AnswerTruncated(f"the answer broke off: {error}")
    return errors.Unavailable(f"the server cannot be reached: {error}")


def pause_after_s(failure: errors.LakebusError, attempt: int) -> float:
    """What the server asked for, or a doubling pause; spread, so that clients do not come back
    together."""

    backoff_s = min(_BACKOFF_S_MAX, _BACKOFF_S * 2.0 ** min(attempt, 16))
    asked_s = failure.retry_after_s or 0.0
    return max(asked_s, backoff_s) * (0.75 + random.random() / 2)
