"""The steps of the demo, in order: each prints what it does and notes its checks in the report."""

from __future__ import annotations

import http.client
import json
import statistics
import time
from typing import Any
from urllib.parse import urlsplit

import pyarrow.compute as pc

from cluster.demo_data import SCHEMAS, Source, batches, encoded, load, objects_of
from cluster.demo_questions import QUESTIONS, Question, answer_of_source
from cluster.demo_report import Report
from cluster.demo_stack import DemoStack, coordinator_pid, kill
from cluster.demo_stream import (
    CONNECTIONS,
    FORMS,
    TIMEOUT_S,
    TOTALS,
    Stream,
    Watcher,
    key_of,
    monotonic,
)
from lakebus.client import Client, connect
from lakebus.client_results import Result, Sent
from lakebus.errors import (
    IdempotencyConflict,
    RowsInvalid,
    TableNotFound,
    Unavailable,
    VisibilityTimeout,
)

BATCH_ROWS = 2000
_REFERENCE_COUNTS = "SELECT (SELECT count(*) FROM weather), (SELECT count(*) FROM airports)"
_BATCHES_MIN = 24
_LONE_ROWS = 20
_TRAVELS_MAX = 10
_POLL_S = 0.05


class Demo:
    """Made for one run."""

    def __init__(self, report: Report, stack: DemoStack, flights_max: int | None) -> None:
        self.report = report
        self.screen = report.screen
        self.stack = stack
        self.flights_max = flights_max
        self._killed_pid = 0
        self._recovered_s = 0.0

    def run(self) -> None:
        self.stack.prepare()
        self.screen.title("1. A stack of its own: PostgreSQL, Ray, HTTP doors")
        with self.report.timed("start"):
            url, api_key = self.stack.start(self.screen.line)
        self.screen.line(f"serves at {url}")
        with self.report.timed("read_source"):
            source = load(self.flights_max)
        with connect(url, api_key) as client:
            self._tables(client, source)
            sent, moments = self._flights(client, source, url, api_key)
            self._own_writes(client, source, sent)
            self._questions(client, source)
            self._again(client, source, sent)
            self._travel(client, moments)
            self._mistakes(client)
            self._lone_rows(client)
            self._sizes(client)
        self.report.finished = True
        self.report.print_summary()

    def _tables(self, client: Client, source: Source) -> None:
        self.screen.title("2. Three tables; weather and airports in one request, seen together")
        for name, columns in SCHEMAS.items():
            client.create_table(name, columns)
        with self.report.timed("reference_tables"):
            rows = {"weather": objects_of(source.weather), "airports": objects_of(source.airports)}
            sent = client.ingest_tables(
                rows, key="reference-1", wait_visible=True, timeout_s=TIMEOUT_S
            )
        seen = client.query(_REFERENCE_COUNTS, after=sent)
        before = client.query(_REFERENCE_COUNTS, snapshot=seen.snapshot_id - 1)
        wanted = [source.weather.num_rows, source.airports.num_rows]
        self.report.numbers |= {"weather_rows": wanted[0], "airports_rows": wanted[1]}
        self.report.check(
            "reference_tables",
            sent.visible and seen.rows == [wanted] and before.rows == [[0, 0]],
            f"{wanted[0]:,} hours of weather and {wanted[1]:,} airports came into view in one"
            " snapshot",
        )

    # --- rows in ----------------------------------------------------------------------------

    def _flights(
        self, client: Client, source: Source, url: str, api_key: str
    ) -> tuple[dict[int, Sent], list[Result]]:
        total = source.flights.num_rows
        rows = min(BATCH_ROWS, max(1, total // _BATCHES_MIN))
        parts = batches(source.flights, rows=rows)
        self.screen.title(
            f"3. {total:,} flights as Arrow, NDJSON and JSON over {CONNECTIONS} connections;"
            " the commit coordinator is killed halfway"
        )
        coordinator = _coordinator(url, api_key)
        half = len(parts) // 2
        watcher = Watcher(client)
        began_s = time.monotonic()
        with (
            self.report.timed("flights"),
            Stream(client, parts, hold_at=half + 2 * CONNECTIONS) as stream,
        ):
            self._until(stream, began_s, total, batches_min=half)
            self._kill(client, stream, began_s, total, coordinator)
            self._until(stream, began_s, total)
            acknowledged_s = time.monotonic() - began_s
            published = client.wait_visible(list(stream.receipts.values()), timeout_s=TIMEOUT_S)
            published_s = time.monotonic() - began_s
        watcher.end()
        watcher.moments.append(client.query(TOTALS, after=published))
        received = sum(sent.receipt.rows for sent in stream.receipts.values())
        self.screen.line(
            f"{total:,} acknowledged in {acknowledged_s:.1f} s, all visible after"
            f" {published_s:.1f} s"
        )
        self.report.numbers |= {
            "rows": total,
            "requests": len(parts),
            "connections": CONNECTIONS,
            "batch_rows": rows,
            "acknowledged_rows_per_s": round(total / acknowledged_s),
            "published_rows_per_s": round(total / published_s),
            "body_bytes": stream.body_bytes,
        }
        self._succeeded(url, api_key)
        self.report.check(
            "receipts", received == total, f"the receipts add up to all {total:,} flights"
        )
        self.report.check(
            "monotonic_reads",
            monotonic(watcher.moments),
            f"{len(watcher.moments)} queries meanwhile never saw fewer rows than one before",
        )
        return stream.receipts, watcher.moments

    def _until(
        self, stream: Stream, began_s: float, total: int, *, batches_min: int | None = None
    ) -> None:
        """Shows progress until so many batches, or all, are acknowledged."""

        while stream.running:
            reached = stream.progress().batches_acknowledged
            if batches_min is not None and reached >= batches_min:
                return
            self._show(stream, began_s, total)
            time.sleep(_POLL_S)

    def _show(self, stream: Stream, began_s: float, total: int) -> None:
        now = stream.progress()
        seconds = max(time.monotonic() - began_s, 0.001)
        self.screen.progress(
            f"{now.sent:>9,} sent  {now.acknowledged:>9,} acknowledged"
            f"  {now.acknowledged / total:4.0%}  {now.acknowledged / seconds:>9,.0f} rows/s"
        )

    def _kill(self, client: Client, stream: Stream, began_s: float, total: int, pid: int) -> None:
        """SIGKILLs the coordinator, and waits until rows that were sent after that are visible: it
        has a successor then, which has taken over what the first one had begun."""

        kill(self.stack.files, pid)
        killed_s = time.monotonic()
        self.screen.line(
            f"killed process {pid}, the commit coordinator, at"
            f" {stream.progress().acknowledged:,} acknowledged"
        )
        stream.go_on()
        after = None
        while time.monotonic() - killed_s < TIMEOUT_S:
            after = after or stream.receipts.get(stream.hold_at)
            if after is not None and self._seen(client, after):
                break
            self._show(stream, began_s, total)
            time.sleep(_POLL_S)
        self._recovered_s = time.monotonic() - killed_s
        self._killed_pid = pid
        self.report.numbers["recovery_s"] = round(self._recovered_s, 3)

    def _succeeded(self, url: str, api_key: str) -> None:
        successor = _coordinator(url, api_key)
        self.report.check(
            "coordinator_restarted",
            successor != self._killed_pid and self._recovered_s < TIMEOUT_S,
            f"a new coordinator (process {successor}) took over; rows sent after the kill were"
            f" visible {self._recovered_s:.1f} s after it, and no request failed",
        )

    def _seen(self, client: Client, sent: Sent) -> bool:
        """Whether it can be read; asks for a moment only, so that progress goes on."""

        try:
            client.wait_visible(sent, timeout_s=0.1)
        except VisibilityTimeout:
            return False
        return True

    # --- answers out ------------------------------------------------------------------------

    def _own_writes(self, client: Client, source: Source, sent: dict[int, Sent]) -> None:
        self.screen.title("4. Reading what was written, by the tokens of the receipts")
        found = client.query(TOTALS, after=sent[max(sent)])
        wanted = [
            source.flights.num_rows,
            source.flights.num_rows - source.flights["dep_delay"].null_count,
            pc.sum(source.flights["distance"]).as_py(),
            pc.sum(source.flights["arr_delay"]).as_py(),
        ]
        names = [name for name, _ in found.columns]
        self.screen.table(names, found.rows)
        self.report.answers["totals"] = {"columns": names, "rows": found.rows}
        self.report.check(
            "nothing_lost_nothing_double",
            found.rows == [wanted],
            "counts and sums equal the source files: nothing lost, nothing double",
        )

    def _questions(self, client: Client, source: Source) -> None:
        self.screen.title("5. Joins across the tables, each compared with DuckDB over the files")
        for question in QUESTIONS:
            self._ask(client, source, question)

    def _ask(self, client: Client, source: Source, question: Question) -> None:
        parameters = question.parameters(source.flights.num_rows)
        began_s = time.monotonic()
        found = client.query(question.sql, parameters, timeout_s=TIMEOUT_S)
        took_ms = (time.monotonic() - began_s) * 1000
        names = [name for name, _ in found.columns]
        self.screen.line(f"{question.title} ({took_ms:.0f} ms)")
        self.screen.table(names, found.rows)
        self.report.answers[question.name] = {"columns": names, "rows": found.rows}
        self.report.check(
            question.name,
            found.rows == answer_of_source(source, question.sql, parameters),
            "the answer equals that of the source files",
        )

    def _again(self, client: Client, source: Source, sent: dict[int, Sent]) -> None:
        self.screen.title("6. A batch sent again: once as it was, and once in each other encoding")
        before = client.query(TOTALS)
        rows = batches(source.flights, rows=self.report.numbers["batch_rows"])[0]
        for form in dict.fromkeys(FORMS):
            answer = client.ingest("flights", encoded(rows, form), key=key_of(0))
            self.report.check(
                f"replay_{form.lower()}",
                answer.replayed and answer.receipt == sent[0].receipt,
                f"as {form}: replayed, with the receipt of the first time",
            )
        try:
            client.ingest("flights", encoded(rows.slice(0, 1), "JSON"), key=key_of(0))
            refused = False
        except IdempotencyConflict as error:
            refused = error.members.get("batch_id") == sent[0].receipt.batch_id
        self.report.check("conflict", refused, "other rows under the same key: refused")
        after = client.query(TOTALS, after=sent[0])
        self.report.check("nothing_doubled", before.rows == after.rows, "the table is as before")

    def _travel(self, client: Client, moments: list[Result]) -> None:
        self.screen.title("7. Back in time: the queries of step 3, asked again at their snapshots")
        chosen = _spread(moments)
        same_id = [
            client.query(TOTALS, snapshot=one.snapshot_id).rows == one.rows for one in chosen
        ]
        same_time = [
            client.query(TOTALS, snapshot=one.snapshot_time).rows == one.rows for one in chosen
        ]
        self.screen.table(
            ["snapshot", "published", "flights then"],
            [
                (m.snapshot_id, m.snapshot_time.strftime("%H:%M:%S.%f"), m.rows[0][0])
                for m in chosen
            ],
        )
        self.report.numbers["travels"] = len(chosen)
        self.report.check("by_id", all(same_id), f"by id: {len(chosen)} equal answers")
        self.report.check("by_time", all(same_time), f"by time: {len(chosen)} equal answers")

    def _mistakes(self, client: Client) -> None:
        self.screen.title("8. Mistakes are explained, and leave nothing behind")
        try:
            client.ingest("flights", [{"year": 2013}, {"year": "MMXIII"}])
            said, ok = "", False
        except RowsInvalid as error:
            problem = error.members["errors"][0]
            ok = (problem["row"], problem["column"]) == (1, "year")
            said = f"row {problem['row']}, column {problem['column']}: {problem['reason']}"
        self.report.check("rows_invalid", ok, f"rows_invalid: {said}")
        try:
            client.query("SELECT * FROM flihgts")
            hint = None
        except TableNotFound as error:
            hint = error.members.get("did_you_mean")
            said = str(error)
        self.report.check("did_you_mean", hint == ["flights"], f"table_not_found: {said}")

    def _lone_rows(self, client: Client) -> None:
        """From before the request to its answer, which comes when the row can be read."""

        client.create_table("notes", {"id": "integer", "note": "varchar"})
        took_ms = []
        for n in range(_LONE_ROWS):
            began_s = time.monotonic()
            sent = client.ingest("notes", [{"id": n, "note": "hello"}], wait_visible=True)
            took_ms.append((time.monotonic() - began_s) * 1000)
            if not sent.visible:
                client.wait_visible(sent)
        self.report.numbers |= {
            "write_to_visible_ms_p50": round(statistics.median(took_ms), 1),
            "write_to_visible_ms_max": round(max(took_ms), 1),
            "write_to_visible_count": len(took_ms),
        }

    def _sizes(self, client: Client) -> None:
        tables = client.tables()
        self.report.numbers |= {
            "snapshots": client.query("SELECT 1").snapshot_id,
            "files": sum(table["files"] for table in tables),
            "bytes": sum(table["bytes"] for table in tables),
        }


def _spread(moments: list[Result]) -> list[Result]:
    """At most so many, from the first to the last, no snapshot twice."""

    distinct = list({moment.snapshot_id: moment for moment in moments}.values())
    if len(distinct) <= _TRAVELS_MAX:
        return distinct
    last = len(distinct) - 1
    return [distinct[round(n * last / (_TRAVELS_MAX - 1))] for n in range(_TRAVELS_MAX)]


def _coordinator(url: str, api_key: str) -> int:
    """The process of the commit coordinator, as soon as `GET /v1/admin/status` knows one."""

    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        pid = coordinator_pid(_actors(url, api_key))
        if pid is not None:
            return pid
        time.sleep(_POLL_S)
    raise Unavailable(f"no commit coordinator answered within {TIMEOUT_S:.0f} s")


def _actors(url: str, api_key: str) -> Any:
    """The actors of the stack, as `GET /v1/admin/status` lists them."""

    parts = urlsplit(url)
    assert parts.hostname is not None, "the stack wrote it"
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
    try:
        connection.request(
            "GET", "/v1/admin/status", headers={"Authorization": f"Bearer {api_key}"}
        )
        return json.loads(connection.getresponse().read()).get("actors")
    finally:
        connection.close()
