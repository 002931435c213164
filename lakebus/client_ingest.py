"""Rows in, by the client: one request that is stored whole, or a writer for a stream of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal
from urllib.parse import quote

from lakebus.client_calls import Calls
from lakebus.client_forms import sent_of, write_headers
from lakebus.client_results import Sent
from lakebus.client_rows import JSON, Body, Rows, body_of, json_text
from lakebus.errors import MalformedRequest
from lakebus.writer import Writer
from lakebus.writer_batches import Batch, WriterLimits

OnInvalid = Literal["reject", "quarantine"]


class Ingesting(Calls):
    """The part of `Client` that sends rows."""

    def ingest(
        self,
        table: str,
        rows: Rows,
        *,
        key: str | None = None,
        wait_visible: bool = False,
        on_invalid: str = "reject",
        ordering_key: str | None = None,
        create: bool = False,
        timeout_s: float | None = None,
    ) -> Sent:
        """Makes rows durable, all or none, exactly once for `key` (made up when none is given).

        `rows`: objects, a pyarrow Table, RecordBatch or reader, a pandas or polars DataFrame, the
        path of a file (.json, .ndjson, .csv, .parquet, .arrow, also .gz, .zst, .lz4), or (bytes,
        media type). A pandas index stays behind: `reset_index()` makes it a column. `create`: a
        missing table is made from the rows, where the server can.

        Raises RowsInvalid, IdempotencyConflict, TableNotFound, MalformedBody, BodyTooLarge (use a
        `writer`), PackageMissing, OutcomeUnknown (still unknown when the time was up: call again
        with the same key), OSError of a file, and what `lakebus.errors` says.
        """

        path = f"/v1/tables/{quote(table, safe='')}/rows"
        query = {"wait": "visible" if wait_visible else "durable", "on_invalid": on_invalid}
        if create:
            query["create"] = "true"
        return self._ingest(path, body_of(rows), query, write_headers(key), ordering_key, timeout_s)

    def ingest_tables(
        self,
        rows: Mapping[str, Iterable[Mapping[str, Any]]],
        *,
        key: str | None = None,
        wait_visible: bool = False,
        timeout_s: float | None = None,
    ) -> Sent:
        """Rows for several tables: all of them become visible together (contract A8)."""

        body = Body(json_text({table: list(given) for table, given in rows.items()}), JSON)
        query = {"wait": "visible" if wait_visible else "durable", "on_invalid": "reject"}
        return self._ingest("/v1/rows", body, query, write_headers(key), None, timeout_s)

    def batch(self, batch_id: str, *, wait_s: float = 0.0) -> dict[str, Any]:
        """What became of a batch; waits up to `wait_s` for its end. Raises BatchNotFound."""

        query = {"timeout_ms": str(round(wait_s * 1000))}
        return self._read("GET", f"/v1/batches/{quote(batch_id, safe='')}", query)

    def writer(
        self,
        table: str,
        *,
        rows_max: int = WriterLimits.rows_max,
        bytes_max: int = WriterLimits.bytes_max,
        linger_s: float = WriterLimits.linger_s,
        held_batches_max: int = WriterLimits.held_batches_max,
        held_bytes_max: int = WriterLimits.held_bytes_max,
        write_timeout_s: float = WriterLimits.write_timeout_s,
        retry_s: float = WriterLimits.retry_s,
        senders: int = 1,
        on_invalid: OnInvalid = "reject",
        ordering_key: str | None = None,
    ) -> Writer:
        """A writer that makes batches of rows and sends them behind the caller's back: see `Writer`
        for what it promises.

        A batch is sent when it has `rows_max` rows or `bytes_max` bytes, or is `linger_s` old. At
        most `held_batches_max` batches and `held_bytes_max` bytes wait for their receipts; then
        `write` waits, `write_timeout_s` at most. What may be tried again is, for `retry_s`. With
        one of `senders` rows become durable in the order in which they were written.
        """

        limits = WriterLimits(
            rows_max=rows_max,
            bytes_max=bytes_max,
            linger_s=linger_s,
            held_batches_max=held_batches_max,
            held_bytes_max=held_bytes_max,
            write_timeout_s=write_timeout_s,
            retry_s=retry_s,
        )
        return Writer(
            self.send_batch,
            table,
            limits=limits,
            senders=senders,
            on_invalid=on_invalid,
            ordering_key=ordering_key,
        )

    def resend(self, batches: Iterable[Batch], *, timeout_s: float | None = None) -> list[Sent]:
        """Sends batches of a RowsUnacknowledged again, in order, each with its own key: one that
        had arrived is not stored twice. Raises the error of the first that fails."""

        return [self.send_batch(batch, timeout_s=timeout_s) for batch in batches]

    def send_batch(self, batch: Batch, *, timeout_s: float | None = None) -> Sent:
        """One batch of a writer, with its key and the time of its first attempt."""

        path = f"/v1/tables/{quote(batch.table, safe='')}/rows"
        headers = write_headers(batch.key, batch.not_before)
        query = {"wait": "durable", "on_invalid": batch.on_invalid}
        body = Body(batch.content, batch.media_type)
        return self._ingest(path, body, query, headers, batch.ordering_key, timeout_s)

    def _ingest(
        self,
        path: str,
        body: Body,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        ordering_key: str | None,
        timeout_s: float | None,
    ) -> Sent:
        more = {} if ordering_key is None else {"lakebus-ordering-key": _header(ordering_key)}
        answer = self._call(
            "POST",
            path,
            query=query,
            body=body.content,
            headers={**body.headers(), **headers, **more},
            timeout_s=timeout_s,
            ingest=True,
        )
        return sent_of(answer)


def _header(ordering_key: str) -> str:
    if not (ordering_key.isascii() and ordering_key.isprintable()):
        raise MalformedRequest("an ordering key is visible ASCII text")
    return ordering_key
