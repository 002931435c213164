"""P12, P15 and P16: what the server adds to DuckDB."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import duckdb
import pyarrow as pa
import pyarrow.ipc

from benchmarks import bulk_data, data, measures
from benchmarks.bulk_load import MEDIA_TYPES
from benchmarks.goals import judging
from benchmarks.goals.context import Context, PeerPostgres, wait_quiet, windowed
from benchmarks.goals.judging import at_least, at_most
from benchmarks.goals.programs import Failed, program
from benchmarks.goals.rows import Benchmark, Row, absent, against, information, spread_of
from benchmarks.goals.turns import Figures, Turns
from benchmarks.http1 import Connection
from benchmarks.measures import QUERIES, percentile
from benchmarks.stacks import RunningStack

SMALL = "lakebus, query overhead"
DUCKLAKE = "DuckLake, query overhead"
POOL, REPLICAS = "DuckDB, a pool of 2 threads", "lakebus, 2 query replicas"
STREAM, FETCH = "lakebus, Arrow stream", "DuckDB, fetch in process"
TABLE, ROWS, BODY_ROWS = "queries", 200_000, 5_000
CLIENTS = 16
HEAVY = (
    "SELECT sum(r), max(m), sum(d) FROM (SELECT"
    " row_number() OVER (PARTITION BY device ORDER BY value, event_id) AS r,"
    " max(note) OVER (PARTITION BY device ORDER BY ts) AS m,"
    " dense_rank() OVER (PARTITION BY region ORDER BY note, event_id) AS d FROM {t})"
)
DELIVERED = "SELECT event_id, device, ts, value FROM {t}"
_LIMIT_S = 300.0

CONDITIONS = f"""\
Queries go to the direct door of the query replicas where the stack has one, as clients of ours do \
by themselves.
P12: {ROWS:,} rows that arrived in bodies of {BODY_ROWS:,} and are not compacted (maintenance is \
off), each query in turns over HTTP (JSON answer, `Accept` by default; from the first byte sent to \
the last byte read, on one connection that sends ready bytes) and by DuckDB of the same version in \
the measuring process with two threads, footers cached, over the same files; overhead is the \
difference of the p50s. DuckDB has its defaults otherwise: before it uses a footer that it keeps \
it opens the file to see whether it has changed, and threads of their own read for it. Our engine \
does neither, since its files never change and are small; what is left against DuckDB with these \
settings of ours, too, stands beside, asked in the same turns. The heavy query is one of more than \
100 ms in process; its pairs are single calls. DuckLake's overhead stands beside: `count(*)` \
through the lake minus DuckDB over its files, in process.
P15: 10 million rows (a quick run: 1 million) of four columns (28 bytes a row), `Accept` Arrow \
stream, read to a whole Arrow table by a Python client; the peer is DuckDB's own fetch of the \
same SQL over the same files to an Arrow table in the same process. One call each in turns.
P16: `count(*)` and the point look-up in turn, {CLIENTS} clients in a closed loop over HTTP \
against two query replicas; the peer is DuckDB in a pool of two threads, each with a cursor of \
one database that has two threads, over the same files, footers cached, in process. The same \
stack stands idle beside the peer."""


def run(context: Context, turns: Turns) -> None:
    for repetition in range(context.options.repetitions):
        with context.stack_or_note(
            turns,
            maintenance_enabled="false",
            http_query_replicas_min="2",
            http_query_replicas_max="2",
        ) as stack:
            if stack is not None:
                _overhead_and_pool(context, turns, repetition, stack)
                _delivery(context, turns, repetition, stack)
        if context.options.peers is not None:
            with context.postgres() as server:
                turns.take(
                    DUCKLAKE, repetition, lambda: _ducklake(context, server), limit_s=_LIMIT_S
                )  # fmt: skip


def _overhead_and_pool(
    context: Context, turns: Turns, repetition: int, stack: RunningStack
) -> None:
    repeats = 15 if context.options.quick else 60

    def overhead() -> Figures:
        paths = asyncio.run(_loaded(stack))
        return _overhead(stack, paths, repeats)

    if turns.take(SMALL, repetition, overhead, limit_s=_LIMIT_S) is None:
        return
    questions = [QUERIES[name].format(t=TABLE) for name in ("count", "point")]
    order: dict[str, Any] = {"questions": questions}
    ours = order | {"url": stack.asked, "api_key": stack.api_key, "clients": CLIENTS}
    pool = order | {
        "paths": asyncio.run(_paths(stack, TABLE)), "table": TABLE, "threads": 2, "workers": 2,
    }  # fmt: skip
    seconds = context.options.seconds
    sides = [(REPLICAS, "benchmarks.query_load", ours), (POOL, "benchmarks.query_pool", pool)]
    for contender, module, asked in sides if repetition % 2 == 0 else reversed(sides):
        wait_quiet(stack.supervisor)

        def turn(module: str = module, asked: dict[str, Any] = asked) -> Figures:
            with program(module, asked, log=context.log) as running:
                running.ready(60)
                return windowed(running, stack.supervisor, seconds=seconds, limit_s=seconds + 60)

        turns.take(contender, repetition, turn, limit_s=seconds + 150)


async def _loaded(stack: RunningStack) -> list[str]:

    await measures.make_table(stack.url, stack.api_key, TABLE)
    rng = random.Random(11)
    connection = Connection(stack.url, stack.api_key)
    token = ""
    for first in range(0, ROWS, BODY_ROWS):
        written = await connection.request(
            "POST",
            f"/v1/tables/{TABLE}/rows",
            body=data.json_body(first, BODY_ROWS, rng),
            headers={"Content-Type": "application/json", "Idempotency-Key": f"q-{first}"},
        )
        if written.status != 202:
            raise Failed(f"loading was answered {written.status}: {written.body[:200]!r}")
        token = written.json()["receipt"]["visibility_token"]
    await connection.query(f"SELECT count(*) FROM {TABLE}", min_visibility_token=token)
    connection.close()
    return await _paths(stack, TABLE)


async def _paths(stack: RunningStack, table: str) -> list[str]:
    """The files of a table in the stack's own folder, which holds them under their ids."""

    connection = Connection(stack.url, stack.api_key)
    listing = (await connection.request("GET", f"/v1/tables/{table}/files")).json()
    connection.close()
    wanted = {file["file_id"] for file in listing["files"]}
    objects = stack.data_dir / "objects"
    return [str(path) for path in objects.rglob("*.parquet") if path.stem in wanted]


#: What the engine sets of DuckDB for speed, besides keeping footers.
_TUNED = {
    "validate_external_file_cache": "'NO_VALIDATION'",
    "enable_external_file_cache": "false",
    "async_threads": "0",
}


def in_process(paths: list[str], table: str, *, tuned: bool = False) -> duckdb.DuckDBPyConnection:
    """`tuned`: with what our engine sets of DuckDB for speed."""

    database = duckdb.connect()
    database.execute("SET threads = 2").execute("SET enable_progress_bar = false")
    database.execute("SET parquet_metadata_cache = true")
    for name, value in _TUNED.items() if tuned else ():
        database.execute(f"SET {name} = {value}")
    database.execute(f"CREATE VIEW {table} AS FROM read_parquet({paths!r})")
    return database


class Asker:
    """One connection that asks and waits. Its own work stands in the server's figure, so it does
    little: it sends ready bytes and reads one answer with a length."""

    def __init__(self, url: str, api_key: str) -> None:
        parts = urlsplit(url)
        host, port = parts.hostname or "127.0.0.1", parts.port or 80
        self._head = (
            f"POST /v1/query HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {api_key}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        )
        self._socket = socket.create_connection((host, port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def request(self, sql: str) -> bytes:
        body = json.dumps({"sql": sql})
        return f"{self._head}{len(body)}\r\n\r\n{body}".encode()

    def ask(self, request: bytes) -> bytes:
        """The whole body. Raises Failed for everything but 200."""

        self._socket.sendall(request)
        came = self._more(b"")
        while (end := came.find(b"\r\n\r\n")) < 0:
            came = self._more(came)
        head = came[:end].lower()
        at = head.find(b"\r\ncontent-length:")
        if at < 0 or not head.startswith(b"http/1.1 200"):
            raise Failed(f"a query was answered {came[:300]!r}")
        whole = end + 4 + int(head[at:].split(b"\r\n", 2)[1].partition(b":")[2])
        while len(came) < whole:
            came = self._more(came)
        return came[end + 4 :]

    def _more(self, came: bytes) -> bytes:
        part = self._socket.recv(1 << 16)
        if not part:
            raise Failed(f"the connection ended after {came[:200]!r}")
        return came + part

    def close(self) -> None:
        self._socket.close()


def _overhead(stack: RunningStack, paths: list[str], repeats: int) -> Figures:
    connection = Asker(stack.asked, stack.api_key)
    found: Figures = {"requests": 0, "files": len(paths)}
    with in_process(paths, TABLE) as database, in_process(paths, TABLE, tuned=True) as tuned:
        for name, sql in {**QUERIES, "heavy": HEAVY}.items():
            statement = sql.format(t=TABLE)
            request = connection.request(statement)
            times = max(repeats // 4, 8) if name == "heavy" else repeats
            over_http, inside, inside_tuned = [], [], []
            for number in range(times + 2):
                began = time.perf_counter()
                answer = connection.ask(request)
                middle = time.perf_counter()
                rows = database.execute(statement).fetchall()
                ended = time.perf_counter()
                tuned.execute(statement).fetchall()
                ended_tuned = time.perf_counter()
                if len(json.loads(answer)["rows"]) != len(rows):
                    raise Failed(f"{name} was answered {answer[:200]!r} and in process {rows[:3]}")
                if number >= 2:  # the first reads footers, on all sides
                    over_http.append((middle - began) * 1000)
                    inside.append((ended - middle) * 1000)
                    inside_tuned.append((ended_tuned - ended) * 1000)
            found["requests"] += times
            found[f"{name}_http_ms_p50"] = percentile(over_http, 0.5)
            found[f"{name}_http_ms_p99"] = percentile(over_http, 0.99)
            found[f"{name}_inside_ms_p50"] = percentile(inside, 0.5)
            found[f"{name}_overhead_ms_p50"] = round(
                percentile(over_http, 0.5) - percentile(inside, 0.5), 3
            )
            found[f"{name}_tuned_ms_p50"] = percentile(inside_tuned, 0.5)
            found[f"{name}_over_tuned_ms_p50"] = round(
                percentile(over_http, 0.5) - percentile(inside_tuned, 0.5), 3
            )
            if name == "heavy":
                found["heavy_pairs"] = [
                    [round(a, 2), round(b, 2)] for a, b in zip(over_http, inside, strict=True)
                ]
    connection.close()
    return found


def _ducklake(context: Context, server: PeerPostgres) -> Figures:
    order = {"dsn": server.database(), "folder": str(server.folder / "overhead")}
    with context.peer("query_overhead", order) as peer:
        peer.ready(120)
        found: Figures = peer.window(60, repeats=60)
        return found


# --- P15 -------------------------------------------------------------------------------------


def _delivery(context: Context, turns: Turns, repetition: int, stack: RunningStack) -> None:
    rows = 1_000_000 if context.options.quick else 10_000_000
    paths: list[str] = []

    def load() -> Figures:
        _bulk_loaded(context, stack, rows)
        paths.extend(asyncio.run(_paths(stack, "delivered")))
        return {"rows": rows, "files": len(paths)}

    if turns.take("lakebus, loading for delivery", repetition, load, limit_s=_LIMIT_S) is None:
        return
    sql = DELIVERED.format(t="delivered")
    sides = [
        (STREAM, lambda: _streamed(stack, sql, rows)),
        (FETCH, lambda: _fetched(paths, sql, rows)),
    ]
    for contender, turn in sides if repetition % 2 == 0 else reversed(sides):
        wait_quiet(stack.supervisor)
        turns.take(contender, repetition, turn, limit_s=_LIMIT_S)


def _bulk_loaded(context: Context, stack: RunningStack, rows: int) -> None:
    batches = stack.data_dir.parent / "batches.arrow"
    bulk_data.write(batches, rows=min(rows, 1_000_000))
    asyncio.run(measures.make_table(stack.url, stack.api_key, "delivered"))
    order = {
        "url": stack.url, "read_url": stack.url, "api_key": stack.api_key, "table": "delivered",
        "batches": str(batches), "form": "arrow", "clients": 2, "rows": rows, "body_rows": 100_000,
    }  # fmt: skip
    with program("benchmarks.bulk_load", order, log=context.log) as load:
        load.ready(120)
        load.window(240)
    Path(batches).unlink()


def _streamed(stack: RunningStack, sql: str, rows: int) -> Figures:
    """To a whole Arrow table."""

    parts = urlsplit(stack.asked)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    headers = {
        "Authorization": f"Bearer {stack.api_key}",
        "Content-Type": "application/json",
        "Accept": MEDIA_TYPES["arrow"],
    }
    began = time.perf_counter()
    connection.request(
        "POST", "/v1/query", json.dumps({"sql": sql, "timeout_ms": 100_000}), headers
    )
    answer = connection.getresponse()
    if answer.status != 200:
        raise Failed(f"delivery was answered {answer.status}: {answer.read(200)!r}")
    table = pa.ipc.open_stream(pa.PythonFile(answer, mode="r")).read_all()
    took = time.perf_counter() - began
    connection.close()
    return _delivered(table, rows, took)


def _fetched(paths: list[str], sql: str, rows: int) -> Figures:
    with in_process(paths, "delivered") as database:
        database.execute("SELECT count(*) FROM delivered").fetchall()
        began = time.perf_counter()
        table = database.sql(sql).to_arrow_table()
        return _delivered(table, rows, time.perf_counter() - began)


def _delivered(table: Any, rows: int, took: float) -> Figures:
    if table.num_rows != rows:
        raise Failed(f"{table.num_rows} rows came instead of {rows}")
    return {
        "rows": rows,
        "seconds": round(took, 3),
        "rows_per_s": round(rows / took),
        "mb_per_s": round(table.nbytes / took / 1e6, 1),
    }


# --- the judging -----------------------------------------------------------------------------


def judge(turns: Turns) -> list[Row]:
    rows = [_small(turns, name) for name in QUERIES]
    rows.append(_heavy(turns))
    for name in QUERIES:
        rows += _over_tuned(turns, name)
    values = turns.values(DUCKLAKE, "count_overhead_ms_p50")
    if values:
        rows.append(
            information(
                "P12", "count, for comparison", "ms", turns.values(SMALL, "count_overhead_ms_p50"),
                "DuckLake answers in process, we over HTTP with tokens and a sandbox",
                peer_name=DUCKLAKE, peer=spread_of(values),
            )
        )  # fmt: skip
    rows.append(
        against(
            turns, "P15", "rows/s delivered as an Arrow stream", ours=STREAM, peer=FETCH,
            figure="rows_per_s", unit="rows/s", bound=at_least(0.5),
        )
    )  # fmt: skip
    rows.append(
        against(
            turns, "P16", f"small queries/s, {CLIENTS} clients", ours=REPLICAS, peer=POOL,
            figure="queries_per_s", unit="queries/s", bound=at_least(0.6),
        )
    )  # fmt: skip
    rows.append(_fairness(turns))
    return rows


def _small(turns: Turns, name: str) -> Row:
    values = turns.values(SMALL, f"{name}_overhead_ms_p50")
    what = f"{name}: p50 over HTTP less in process"
    if not values:
        return absent("P12", what, "ours gave no figure")
    bound = at_most(2, "ms")
    http, inside = (
        sorted(turns.values(SMALL, f"{name}_{side}_ms_p50"))[len(values) // 2]
        for side in ("http", "inside")
    )
    return Row(
        "P12", what, "ms", spread_of(values),
        judging.judge_value(values, bound).beside_others(turns.others_cores(SMALL)), bound,
        note=f"{http:.1f} ms over HTTP, {inside:.1f} in process",
    )  # fmt: skip


def _over_tuned(turns: Turns, name: str) -> list[Row]:
    values = turns.values(SMALL, f"{name}_over_tuned_ms_p50")
    what = f"{name}: p50 over HTTP less DuckDB in process with our settings"
    reason = "for comparison: neither side opens files to see whether they have changed"
    return [information("P12", what, "ms", values, reason)] if values else []


def _heavy(turns: Turns) -> Row:
    pairs = [
        pair for run in turns.figures.get(SMALL, {}).values() for pair in run.get("heavy_pairs", [])
    ]
    what = "a query of more than 100 ms, over HTTP by in process"
    if not pairs:
        return absent("P12", what, "ours gave no figure")
    ours, inside = ([pair[side] for pair in pairs] for side in (0, 1))
    bound = at_most(1.1)
    if spread_of(inside) is not None and sorted(inside)[len(inside) // 2] < 100:
        return absent("P12", what, "the query took less than 100 ms in process here")
    return Row(
        "P12", what, "ms", spread_of(ours),
        judging.judge_ratio(ours, inside, bound).beside_others(turns.others_cores(SMALL)), bound,
        "DuckDB, in process", spread_of(inside), "single calls in turns",
    )  # fmt: skip


def _fairness(turns: Turns) -> Row:
    p50, p99 = turns.values(REPLICAS, "query_ms_p50"), turns.values(REPLICAS, "query_ms_p99")
    ratios = [b / a for a, b in zip(p50, p99, strict=True) if a > 0]
    bound = at_most(5, "x p50")
    return Row(
        "P16", "p99 by p50 of these queries", "", spread_of(ratios),
        judging.judge_value(ratios, bound), bound,
    )  # fmt: skip


BENCHMARK = Benchmark(
    "queries",
    ("P12", "P15", "P16"),
    "what the server adds to DuckDB: small queries, many at once, a large answer",
    CONDITIONS,
    run,
    judge,
)
