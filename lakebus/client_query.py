"""Questions and answers by the client: queries, the change feed, and waiting for rows."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

from lakebus.client_arrow import Batches, pyarrow
from lakebus.client_calls import Calls
from lakebus.client_errors import AnswerTruncated
from lakebus.client_forms import JSON, json_text, milliseconds
from lakebus.client_http import Exchange, Reply
from lakebus.client_results import After, Changes, Result, tokens_of
from lakebus.client_rows import ARROW
from lakebus.client_values import load_rows
from lakebus.clock import format_time, parse_time
from lakebus.errors import MalformedRequest

if TYPE_CHECKING:
    import pyarrow as pa

#: A snapshot's id, or a time (RFC 3339, or a datetime with a zone).
At = int | str | dt.datetime
Parameters = Sequence[Any] | Mapping[str, Any]
_NUMBERS = f"{JSON}; integers=number"

_Got = TypeVar("_Got", Exchange, Reply)


class Queries(Calls):
    """The part of `Client` that reads."""

    def query(
        self,
        sql: str,
        parameters: Parameters | None = None,
        *,
        after: After = None,
        at: At | None = None,
        snapshot: At | None = None,
        max_rows: int | None = None,
        max_staleness_s: float | None = None,
        deterministic: bool = False,
        timeout_s: float | None = None,
    ) -> Result:
        """Runs one statement. `parameters`: a list for `?`, an object for `$name`. `after`:
        receipts, answers or tokens whose rows it must see. `at` (or `snapshot`, its other name): a
        past snapshot, by id or time. More than `max_rows` rows is an error, not a shorter answer.

        Raises SqlError, TableNotFound, QueryTimeout, VisibilityTimeout, ResultTooLarge,
        SnapshotExpired, AnswerTruncated, …
        """

        asked = _asked(
            sql, parameters, after, at, snapshot, max_rows, max_staleness_s, deterministic
        )
        document = _rows_of(self._query(self._call, asked, _NUMBERS, timeout_s))
        return Result(
            columns=tuple((c["name"], c["type"]) for c in document["columns"]),
            rows=document["rows"],
            snapshot_id=document["snapshot_id"],
            snapshot_time=parse_time(document["snapshot_time"]),
            token=document["visibility_token"],
            statistics=document["statistics"],
        )

    def query_arrow(
        self,
        sql: str,
        parameters: Parameters | None = None,
        *,
        after: After = None,
        at: At | None = None,
        snapshot: At | None = None,
        max_rows: int | None = None,
        max_staleness_s: float | None = None,
        deterministic: bool = False,
        timeout_s: float | None = None,
    ) -> pa.Table:
        """The same as a pyarrow Table; the fastest way for large answers that fit into memory.
        Raises PackageMissing too."""

        with self.query_batches(
            sql,
            parameters,
            after=after,
            at=at,
            snapshot=snapshot,
            max_rows=max_rows,
            max_staleness_s=max_staleness_s,
            deterministic=deterministic,
            timeout_s=timeout_s,
        ) as batches:
            return batches.read_all()

    def query_batches(
        self,
        sql: str,
        parameters: Parameters | None = None,
        *,
        after: After = None,
        at: At | None = None,
        snapshot: At | None = None,
        max_rows: int | None = None,
        max_staleness_s: float | None = None,
        deterministic: bool = False,
        timeout_s: float | None = None,
    ) -> Batches:
        """The same as record batches, as they come, in little memory. Close it, or use `with`.
        `timeout_s` bounds the whole answer on the server. Raises PackageMissing too."""

        pyarrow("an Arrow answer")  # before anything is asked for
        asked = _asked(
            sql, parameters, after, at, snapshot, max_rows, max_staleness_s, deterministic
        )
        return Batches(self._query(self._open, asked, ARROW, timeout_s))

    def changes(
        self, table: str, *, after: int = 0, until: int | None = None, rows_max: int = 1_000
    ) -> Iterator[Changes]:
        """Pages of the rows published after the snapshot `after`, up to `until` (the newest).

        Raises TableNotFound, SnapshotNotFound, SnapshotExpired when `until` is no longer kept.
        """

        page = self.changes_page(table, after=after, until=until, rows_max=rows_max)
        yield page
        while page.cursor is not None:
            page = self.changes_page(table, cursor=page.cursor, rows_max=rows_max)
            yield page

    def changes_page(
        self,
        table: str,
        *,
        after: int | None = None,
        until: int | None = None,
        cursor: str | None = None,
        rows_max: int = 1_000,
    ) -> Changes:
        """One page: of a window, or behind a cursor. See `changes`."""

        asked = {"after": after, "until": until, "cursor": cursor, "limit": rows_max}
        answer = self._call(
            "GET",
            f"/v1/tables/{quote(table, safe='')}/changes",
            query={name: str(value) for name, value in asked.items() if value is not None},
            headers={"accept": _NUMBERS},
        )
        document = _rows_of(answer)
        return Changes(
            columns=tuple((c["name"], c["type"]) for c in document["columns"]),
            rows=document["rows"],
            after=document["after"],
            until=document["until"],
            cursor=document["cursor"],
            token=document["visibility_token"],
        )

    def wait_visible(self, after: After, *, timeout_s: float | None = None) -> str:
        """Waits until a snapshot covers `after`; its token. Takes the direct door that rows take.
        Raises VisibilityTimeout, Quarantined."""

        budget_s = self._timeout_s if timeout_s is None else timeout_s
        document = {"token": tokens_of(after), "timeout_ms": milliseconds(budget_s)}
        found = self._read(
            "POST", "/v1/visibility", document=document, timeout_s=budget_s, visibility=True
        )
        return str(found["visibility_token"])

    def snapshots(self, *, limit: int = 100, before: int | None = None) -> list[dict[str, Any]]:
        """Snapshots, newest first; `before`: those older than this id."""

        asked = {"limit": limit, "before": before}
        query = urlencode({name: value for name, value in asked.items() if value is not None})
        return list(self._read("GET", f"/v1/snapshots?{query}")["snapshots"])

    def _query(
        self,
        send: Callable[..., _Got],
        asked: Mapping[str, Any],
        accept: str,
        timeout_s: float | None,
    ) -> _Got:
        budget_s = self._timeout_s if timeout_s is None else timeout_s
        return send(
            "POST",
            "/v1/query",
            body=json_text({**asked, "timeout_ms": milliseconds(budget_s)}),
            headers={"content-type": JSON, "accept": accept},
            timeout_s=budget_s,
            sql=True,
        )


def _asked(
    sql: str,
    parameters: Parameters | None,
    after: After,
    at: At | None,
    snapshot: At | None,
    max_rows: int | None,
    max_staleness_s: float | None,
    deterministic: bool,
) -> dict[str, Any]:
    if at is not None and snapshot is not None:
        raise MalformedRequest("at and snapshot are two names of one thing: give one of them")
    asked: dict[str, Any] = {
        "sql": sql,
        "parameters": parameters if parameters is None else _bound(parameters),
        "min_visibility_token": tokens_of(after) or None,
        "snapshot": _snapshot(at if snapshot is None else snapshot),
        "max_rows": max_rows,
        "max_staleness_ms": None if max_staleness_s is None else round(max_staleness_s * 1000),
        "deterministic": deterministic or None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _bound(parameters: Parameters) -> Any:
    if isinstance(parameters, Mapping):
        return dict(parameters)
    if isinstance(parameters, (str, bytes)):
        raise MalformedRequest("parameters are a list for ?, or an object for $name; not a text")
    return list(parameters)


def _snapshot(at: At | None) -> dict[str, Any] | None:
    if at is None:
        return None
    if isinstance(at, dt.datetime):
        if at.tzinfo is None:
            raise MalformedRequest("a time needs a zone: datetime(…, tzinfo=UTC)")
        return {"timestamp": format_time(at)}
    return {"timestamp": at} if isinstance(at, str) else {"id": at}


def _rows_of(answer: Exchange) -> dict[str, Any]:
    try:
        return load_rows(answer.body)
    except ValueError as error:
        raise AnswerTruncated(f"the answer is not whole JSON: {error}") from error
