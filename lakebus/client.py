"""The Python client: rows in, answers out, with the retries that the contract makes safe.

Standard library only, so that importing it stays light; pyarrow is used when it is there and asked
for. Every write carries an idempotency key and the time of its first attempt, so a retry after a
lost connection, a 503 or an unknown outcome ends in exactly one entry (contract A3, A6, A13).

::

    lake = lakebus.client.connect("http://127.0.0.1:8350", api_key)
    lake.create_table("events", {"id": "bigint", "note": "varchar"})
    sent = lake.ingest("events", [{"id": 1, "note": "hello"}])
    answer = lake.query("SELECT * FROM events", after=sent)

`Client` may be used by several threads. `AsyncClient` runs the same code in threads, so there is
one implementation and no twin to keep alike.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlencode

from lakebus import errors
from lakebus.client_admin import Administration
from lakebus.client_async import AsyncClient
from lakebus.client_erasures import Erasures
from lakebus.client_forms import (
    ARROW,
    JSON,
    change_document,
    deleted_of,
    document_of,
    encode_rows,
    error_of,
    json_text,
    milliseconds,
    pause_after_s,
    receipt_of,
    retention_document,
    unreached,
    write_headers,
)
from lakebus.client_http import Connections, Exchange, TransportFailed
from lakebus.client_results import After, Changes, Deleted, Result, Sent, tokens_of
from lakebus.clock import format_time, parse_time

if TYPE_CHECKING:
    import pyarrow as pa

TIMEOUT_S = 30.0
#: Beyond the server's own deadline, for the way there and back.
_GRACE_S = 2.0

#: A list of objects, one object, a pyarrow Table or RecordBatch, or a body with its media type.
Rows = Any


def connect(url: str, api_key: str, *, timeout_s: float = TIMEOUT_S) -> Client:
    """A client; connections are made when needed. Raises MalformedRequest for a bad URL."""

    return Client(url, api_key, timeout_s=timeout_s)


def connect_async(url: str, api_key: str, *, timeout_s: float = TIMEOUT_S) -> AsyncClient:
    """The same for `await`."""

    return AsyncClient(Client(url, api_key, timeout_s=timeout_s))


class Client(Administration, Erasures):
    """See the module. `timeout_s` is the budget of one call, retries included."""

    def __init__(self, url: str, api_key: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._connections = Connections(url)
        self._authorization = f"Bearer {api_key}"
        self._timeout_s = timeout_s

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connections.close()

    # --- tables -----------------------------------------------------------------------------

    def create_table(
        self,
        name: str,
        columns: Mapping[str, str] | Sequence[Mapping[str, Any]],
        *,
        partition_by: Sequence[str] = (),
        sort_by: Sequence[str] = (),
        keep_rows: tuple[str, str] | None = None,
        if_not_exists: bool = False,
    ) -> dict[str, Any]:
        """`columns`: name → type, or objects as in the HTTP API. `partition_by`: like `day(ts)`,
        `bucket(16, id)`; `sort_by`: columns, or `zorder(a, b)`; `keep_rows`: a time column and how
        long, like `("ts", "90 days")`. Raises TableExists, SchemaInvalid."""

        if isinstance(columns, Mapping):
            columns = [{"name": column, "type": kind} for column, kind in columns.items()]
        document = {
            "name": name,
            "columns": list(columns),
            "partition_by": list(partition_by),
            "sort_by": list(sort_by),
            "retention": retention_document(keep_rows),
            "if_not_exists": if_not_exists,
        }
        return self._write("POST", "/v1/tables", document)

    def alter_table(
        self,
        name: str,
        *,
        drop_columns: Sequence[str] = (),
        rename_columns: Mapping[str, str] | None = None,
        widen_columns: Mapping[str, str] | None = None,
        relax_columns: Sequence[str] = (),
        add_columns: Mapping[str, str] | None = None,
        partition_by: Sequence[str] | None = None,
        sort_by: Sequence[str] | None = None,
        keep_rows: tuple[str, str] | Literal["forever"] | None = None,
        schema_version: int | None = None,
    ) -> dict[str, Any]:
        """Changes a table; what is None stays. `add_columns` and `widen_columns`: name → type. An
        empty `partition_by` or `sort_by` removes it, and so does `keep_rows="forever"`.

        With `schema_version` only a table at that version is changed. Raises SchemaChangeInvalid,
        SchemaInvalid, SchemaVersionMismatch, TableNotFound; the first and third also when a reply
        was lost and the change had been made, so look at the table then.
        """

        document = change_document(
            dropped=drop_columns,
            renamed=rename_columns,
            widened=widen_columns,
            relaxed=relax_columns,
            added=add_columns,
            partition_by=partition_by,
            sort_by=sort_by,
            keep_rows=keep_rows,
        )
        expected = {} if schema_version is None else {"if-match": str(schema_version)}
        path = f"/v1/tables/{quote(name, safe='')}"
        return self._write("PATCH", path, document, headers=expected)

    def drop_table(self, name: str) -> dict[str, Any]:
        """Raises TableNotFound."""

        return self._write("DELETE", f"/v1/tables/{quote(name, safe='')}", None)

    def tables(self) -> list[dict[str, Any]]:
        found = self._read("GET", "/v1/tables")
        return list(found["tables"])

    def table(self, name: str) -> dict[str, Any]:
        """Raises TableNotFound."""

        return self._read("GET", f"/v1/tables/{quote(name, safe='')}")

    # --- rows in ----------------------------------------------------------------------------

    def ingest(
        self,
        table: str,
        rows: Rows,
        *,
        key: str | None = None,
        wait_visible: bool = False,
        on_invalid: str = "reject",
        ordering_key: str | None = None,
        timeout_s: float | None = None,
    ) -> Sent:
        """Makes rows durable, exactly once for `key` (made up when none is given).

        Raises RowsInvalid, IdempotencyConflict, TableNotFound, OutcomeUnknown (still unknown when
        the time was up: call again with the same key), and what `lakebus.errors` says.
        """

        body, media_type = encode_rows(rows)
        path = f"/v1/tables/{quote(table, safe='')}/rows"
        return self._ingest(
            path, body, media_type, key, wait_visible, on_invalid, ordering_key, timeout_s
        )

    def ingest_tables(
        self,
        rows: Mapping[str, Iterable[Mapping[str, Any]]],
        *,
        key: str | None = None,
        wait_visible: bool = False,
        timeout_s: float | None = None,
    ) -> Sent:
        """Rows for several tables: all of them become visible together (contract A8)."""

        body = json_text({table: list(given) for table, given in rows.items()})
        return self._ingest("/v1/rows", body, JSON, key, wait_visible, "reject", None, timeout_s)

    def batch(self, batch_id: str, *, wait_s: float = 0.0) -> dict[str, Any]:
        """What became of a batch; waits up to `wait_s` for its end. Raises BatchNotFound."""

        query = {"timeout_ms": str(round(wait_s * 1000))}
        return self._read("GET", f"/v1/batches/{quote(batch_id, safe='')}", query)

    # --- rows deleted -----------------------------------------------------------------------

    def delete(
        self,
        table: str,
        where: str,
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        after: After = None,
        key: str | None = None,
        dry_run: bool = False,
        timeout_s: float | None = None,
    ) -> Deleted:
        """Deletes the rows for which `where` is true, of one snapshot that covers `after`.

        Waits for the end; when the time is up before it, `done` is False and the delete goes on:
        ask `deletion` about it. `dry_run` counts and deletes nothing. Raises SqlError,
        StatementNotAllowed, TableNotFound, IdempotencyConflict, VisibilityTimeout.
        """

        budget_s = self._timeout_s if timeout_s is None else timeout_s
        document: dict[str, Any] = {
            "where": where,
            "parameters": parameters,
            "timeout_ms": milliseconds(budget_s),
            "dry_run": dry_run,
        }
        if after is not None:
            document["min_visibility_token"] = tokens_of(after)
        answer = self._call(
            "POST",
            f"/v1/tables/{quote(table, safe='')}/delete",
            body=json_text({name: v for name, v in document.items() if v is not None}),
            headers={"content-type": JSON, **write_headers(key)},
            timeout_s=budget_s,
        )
        return deleted_of(document_of(answer))

    def deletion(self, table: str, job_id: str, *, wait_s: float = 0.0) -> Deleted:
        """What became of a delete; waits up to `wait_s` for its end. Raises JobNotFound, and the
        error of a delete that failed."""

        path = f"/v1/tables/{quote(table, safe='')}/deletes/{quote(job_id, safe='')}"
        return deleted_of(self._read("GET", path, {"timeout_ms": str(round(wait_s * 1000))}))

    # --- answers out ------------------------------------------------------------------------

    def query(
        self,
        sql: str,
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        after: After = None,
        snapshot: int | dt.datetime | None = None,
        max_rows: int | None = None,
        deterministic: bool = False,
        timeout_s: float | None = None,
    ) -> Result:
        """Runs one statement. `after`: answers or tokens whose rows it must see.

        Integers are Python integers; decimals, times and blobs are text, as in the HTTP API.
        Raises SqlError, TableNotFound, QueryTimeout, VisibilityTimeout, ResultTooLarge, …
        """

        answer = self._query(
            sql,
            parameters,
            "application/json; integers=number",
            after=after,
            snapshot=snapshot,
            max_rows=max_rows,
            deterministic=deterministic,
            timeout_s=timeout_s,
        )
        document = document_of(answer)
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
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        after: After = None,
        snapshot: int | dt.datetime | None = None,
        max_rows: int | None = None,
        deterministic: bool = False,
        timeout_s: float | None = None,
    ) -> pa.Table:
        """The same as a pyarrow Table. Raises ImportError when pyarrow is not installed."""

        import pyarrow as pa  # here, because the client works without it

        answer = self._query(
            sql,
            parameters,
            ARROW,
            after=after,
            snapshot=snapshot,
            max_rows=max_rows,
            deterministic=deterministic,
            timeout_s=timeout_s,
        )
        with pa.ipc.open_stream(answer.body) as reader:
            return reader.read_all()

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
            headers={"accept": "application/json; integers=number"},
        )
        document = document_of(answer)
        return Changes(
            columns=tuple((c["name"], c["type"]) for c in document["columns"]),
            rows=document["rows"],
            after=document["after"],
            until=document["until"],
            cursor=document["cursor"],
            token=document["visibility_token"],
        )

    def wait_visible(self, after: After, *, timeout_s: float | None = None) -> str:
        """Waits until a snapshot covers `after`; its token. Raises VisibilityTimeout,
        Quarantined."""

        budget_s = self._timeout_s if timeout_s is None else timeout_s
        document = {"token": tokens_of(after), "timeout_ms": milliseconds(budget_s)}
        found = self._read("POST", "/v1/visibility", document=document, timeout_s=budget_s)
        return str(found["visibility_token"])

    # --- calls ------------------------------------------------------------------------------

    def _ingest(
        self,
        path: str,
        body: bytes,
        media_type: str,
        key: str | None,
        wait_visible: bool,
        on_invalid: str,
        ordering_key: str | None,
        timeout_s: float | None,
    ) -> Sent:
        query = {"wait": "visible" if wait_visible else "durable", "on_invalid": on_invalid}
        more = {} if ordering_key is None else {"lakebus-ordering-key": ordering_key}
        answer = self._call(
            "POST",
            path,
            query=query,
            body=body,
            headers={"content-type": media_type, **write_headers(key), **more},
            timeout_s=timeout_s,
        )
        document = document_of(answer)
        return Sent(
            receipt=receipt_of(document["receipt"]),
            replayed=document["replayed"],
            visible=document["visible"],
            snapshot_id=document["snapshot_id"],
        )

    def _query(
        self,
        sql: str,
        parameters: Sequence[Any] | Mapping[str, Any] | None,
        accept: str,
        *,
        after: After,
        snapshot: int | dt.datetime | None,
        max_rows: int | None,
        deterministic: bool,
        timeout_s: float | None,
    ) -> Exchange:
        budget_s = self._timeout_s if timeout_s is None else timeout_s
        document: dict[str, Any] = {
            "sql": sql,
            "parameters": parameters,
            "deterministic": deterministic,
            "timeout_ms": milliseconds(budget_s),
            "max_rows": max_rows,
        }
        if after is not None:
            document["min_visibility_token"] = tokens_of(after)
        if isinstance(snapshot, dt.datetime):
            document["snapshot"] = {"timestamp": format_time(snapshot)}
        elif snapshot is not None:
            document["snapshot"] = {"id": snapshot}
        return self._call(
            "POST",
            "/v1/query",
            body=json_text({name: v for name, v in document.items() if v is not None}),
            headers={"content-type": JSON, "accept": accept},
            timeout_s=budget_s,
        )

    def _write(
        self, method: str, path: str, document: object, *, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        headers = write_headers(None) | dict(headers or {})
        body = b""
        if document is not None:
            headers["content-type"], body = JSON, json_text(document)
        return document_of(self._call(method, path, body=body, headers=headers))

    def _read(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        document: object = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        headers = {} if document is None else {"content-type": JSON}
        body = b"" if document is None else json_text(document)
        return document_of(
            self._call(method, path, query=query, body=body, headers=headers, timeout_s=timeout_s)
        )

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes = b"",
        headers: Mapping[str, str],
        timeout_s: float | None = None,
    ) -> Exchange:
        """One call with its retries. Everything sent here is safe to repeat: reads are, and writes
        carry a key. Raises the typed error of the last answer."""

        deadline_s = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        named = {"authorization": self._authorization, **headers}
        attempt = 0
        while True:
            left_s = max(0.001, deadline_s - time.monotonic())
            target = path
            if query is not None:
                asked = {"timeout_ms": str(milliseconds(left_s)), **query}
                target = f"{path}?{urlencode(asked)}"
            failure: errors.LakebusError
            try:
                answer = self._connections.exchange(
                    method, target, body, named, timeout_s=left_s + _GRACE_S
                )
                if answer.status < 400:
                    return answer
                failure = error_of(answer)
            except TransportFailed as error:
                failure = unreached(error, keyed="idempotency-key" in named)
            pause_s = pause_after_s(failure, attempt)
            if not failure.retryable or time.monotonic() + pause_s >= deadline_s:
                raise failure
            attempt += 1
            time.sleep(pause_s)
