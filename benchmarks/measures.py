"""The measurements of `python -m benchmarks`, each over HTTP against a running stack.

The load generator runs in processes of its own on the same cores as the stack, and its share of
the machine is in every figure.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.http1 import Connection, Dropped


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(int(len(ordered) * share), len(ordered) - 1)], 3)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


async def make_table(url: str, api_key: str, name: str) -> None:
    connection = Connection(url, api_key)
    answer = await connection.post_json(
        "/v1/tables", {"name": name, "columns": data.COLUMNS, "if_not_exists": True}
    )
    connection.close()
    if answer.status not in (200, 201):
        raise RuntimeError(f"{answer.status} {answer.body!r}")


# --- ingest --------------------------------------------------------------------------------


def ingest_rate(
    url: str, api_key: str, *, clients: int, rows: int, seconds: float, table: str, seed: int
) -> dict[str, Any]:
    """Rows acknowledged and published, divided by the time until the last token is covered."""

    asyncio.run(make_table(url, api_key, table))
    order = {
        "url": url, "api_key": api_key, "clients": clients, "rows": rows, "seconds": seconds,
        "table": table, "seed": seed,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ingest_load"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 180,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


async def ingest_load(
    *, url: str, api_key: str, clients: int, rows: int, seconds: float, table: str, seed: int
) -> dict[str, Any]:
    rng = random.Random(seed)
    # Bodies are made before the clock starts; enough for the rates seen, reused only beyond that
    # (under new keys, so that they are new entries).
    bodies = [data.json_body(n * rows, rows, rng) for n in range(min(4_000, int(seconds * 500)))]
    latencies: list[float] = []
    failures: dict[str, int] = {}
    tokens: list[str] = [""] * clients
    sent = 0
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        nonlocal sent
        connection = Connection(url, api_key)
        while (now := time.perf_counter()) < end:
            sent += 1
            mine = sent
            try:
                answer = await connection.request(
                    "POST",
                    f"/v1/tables/{table}/rows",
                    body=bodies[mine % len(bodies)],
                    headers={
                        "Content-Type": "application/json",
                        "Idempotency-Key": f"{table}-{seed}-{mine}",
                    },
                )
            except Dropped:
                failures["dropped"] = failures.get("dropped", 0) + 1
                continue
            if answer.status == 202:
                latencies.append((time.perf_counter() - now) * 1000)
                tokens[number] = answer.json()["receipt"]["visibility_token"]
            else:
                key = answer.code or str(answer.status)
                failures[key] = failures.get(key, 0) + 1
        connection.close()

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    acknowledged_s = time.perf_counter() - began
    connection = Connection(url, api_key)
    merged = [token for token in tokens if token]
    answer = await connection.post_json("/v1/visibility", {"token": merged, "timeout_ms": 100_000})
    published_s = time.perf_counter() - began
    connection.close()
    return {
        "clients": clients,
        "rows_per_request": rows,
        "requests": len(latencies),
        "rows_per_s_acknowledged": round(len(latencies) * rows / acknowledged_s),
        "rows_per_s_published": round(len(latencies) * rows / published_s),
        "drain_s": round(published_s - acknowledged_s, 3),
        "visible": answer.status == 200,
        "ack_ms_p50": percentile(latencies or [0.0], 0.5),
        "ack_ms_p99": percentile(latencies or [0.0], 0.99),
        "failures": failures,
    }


# --- freshness -----------------------------------------------------------------------------


async def write_to_visible(
    url: str,
    api_key: str,
    *,
    requests: int,
    rows: int,
    table: str,
    write_url: str | None = None,
    read_url: str | None = None,
) -> dict[str, Any]:
    """One client: POST, then a query with the receipt's token; from the first byte sent to the
    last byte read. `write_url`, `read_url`: other doors for the rows and for the query."""

    await make_table(url, api_key, table)
    rng = random.Random(7)
    connection = Connection(url if read_url is None else read_url, api_key)
    writer = Connection(url if write_url is None else write_url, api_key)
    total: list[float] = []
    ack: list[float] = []
    for number in range(requests + 20):
        body = data.json_body(number * rows, rows, rng)
        began = time.perf_counter()
        written = await writer.request(
            "POST",
            f"/v1/tables/{table}/rows",
            body=body,
            headers={"Content-Type": "application/json", "Idempotency-Key": f"f-{number}"},
        )
        middle = time.perf_counter()
        answer = await connection.query(
            f"SELECT count(*), max(event_id) FROM {table} WHERE event_id >= {number * rows}",
            min_visibility_token=written.json()["receipt"]["visibility_token"],
        )
        ended = time.perf_counter()
        if answer.status != 200 or int(answer.json()["rows"][0][0]) != rows:
            raise RuntimeError(f"a write was not readable: {answer.status} {answer.body[:300]!r}")
        if number >= 20:
            total.append((ended - began) * 1000)
            ack.append((middle - began) * 1000)
    connection.close()
    writer.close()
    return {
        "requests": requests,
        "rows_per_request": rows,
        "write_to_visible_ms_p50": percentile(total, 0.5),
        "write_to_visible_ms_p99": percentile(total, 0.99),
        "ack_ms_p50": percentile(ack, 0.5),
        "ack_ms_p99": percentile(ack, 0.99),
    }


# --- query overhead ------------------------------------------------------------------------

QUERIES = {
    "count": "SELECT count(*) FROM {t}",
    "point": "SELECT event_id, device, region, ts, value, amount, note FROM {t}"
    " WHERE event_id = 77777",
    "range_group": "SELECT region, count(*), avg(value) FROM {t}"
    " WHERE ts BETWEEN TIMESTAMP '2026-03-05' AND TIMESTAMP '2026-03-15' GROUP BY region",
    "top10": "SELECT event_id, amount FROM {t} ORDER BY amount DESC, event_id LIMIT 10",
}


async def query_overhead(
    url: str, api_key: str, *, rows: int, repeats: int, table: str, objects_dir: Path
) -> dict[str, Any]:
    """p50 over HTTP beside p50 of DuckDB in this process over the same files, in turns."""

    import duckdb

    await make_table(url, api_key, table)
    rng = random.Random(11)
    connection = Connection(url, api_key)
    token = ""
    for first in range(0, rows, 5_000):
        written = await connection.request(
            "POST",
            f"/v1/tables/{table}/rows",
            body=data.json_body(first, 5_000, rng),
            headers={"Content-Type": "application/json", "Idempotency-Key": f"q-{first}"},
        )
        token = written.json()["receipt"]["visibility_token"]
    await connection.query(f"SELECT count(*) FROM {table}", min_visibility_token=token)
    listing = (await connection.request("GET", f"/v1/tables/{table}/files")).json()
    # The listing names files by id; the stack's own folder holds them under that name.
    wanted = {file["file_id"] for file in listing["files"]}
    paths = [str(path) for path in objects_dir.rglob("*.parquet") if path.stem in wanted]
    database = duckdb.connect()
    database.execute("SET threads = 2")
    database.execute(f"CREATE VIEW {table} AS FROM read_parquet({paths!r})")
    found: dict[str, Any] = {"rows": rows, "files": len(paths), "repeats": repeats}
    for name, sql in QUERIES.items():
        statement = sql.format(t=table)
        over_http: list[float] = []
        in_process: list[float] = []
        for _ in range(repeats):
            began = time.perf_counter()
            answer = await connection.query(statement)
            over_http.append((time.perf_counter() - began) * 1000)
            if answer.status != 200:
                raise RuntimeError(f"{answer.status} {answer.body[:300]!r}")
            began = time.perf_counter()
            database.execute(statement).fetchall()
            in_process.append((time.perf_counter() - began) * 1000)
        found[name] = {
            "http_ms_p50": percentile(over_http, 0.5),
            "http_ms_p99": percentile(over_http, 0.99),
            "in_process_ms_p50": percentile(in_process, 0.5),
            "overhead_ms_p50": round(percentile(over_http, 0.5) - percentile(in_process, 0.5), 3),
        }
    connection.close()
    return found
