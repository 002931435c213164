"""The same small queries by DuckDB in a pool of threads, in process: what a replica competes with.

Each thread has a cursor of one database, as DuckDB's documentation says, and asks its next question
when it has the answer to the last. Speaks the protocol of `benchmarks.windows`.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import duckdb

from benchmarks import windows
from benchmarks.measures import percentile


class QueryPool:
    def __init__(
        self, *, paths: list[str], table: str, threads: int, workers: int, questions: list[str]
    ) -> None:
        self._database = duckdb.connect()
        self._database.execute(f"SET threads = {threads}")
        self._database.execute("SET parquet_metadata_cache = true")
        self._database.execute(f"CREATE VIEW {table} AS FROM read_parquet({paths!r})")
        self._cursors = [self._database.cursor() for _ in range(workers)]
        self._pool = ThreadPoolExecutor(workers)
        self._questions = questions

    def window(self, *, seconds: float) -> dict[str, Any]:
        cpu, began = time.process_time(), time.perf_counter()
        asked = [self._pool.submit(self._ask, cursor, began + seconds) for cursor in self._cursors]
        latencies = [ms for one in asked for ms in one.result()]
        took = time.perf_counter() - began
        return {
            "requests": len(latencies),
            "queries_per_s": round(len(latencies) / took, 1),
            "query_ms_p50": percentile(latencies, 0.5),
            "query_ms_p99": percentile(latencies, 0.99),
            "client_cpu_s": round(time.process_time() - cpu, 3),
            "client_cpu_us_per_request": round(
                (time.process_time() - cpu) * 1e6 / len(latencies), 1
            ),
        }

    def _ask(self, cursor: duckdb.DuckDBPyConnection, until: float) -> list[float]:
        latencies: list[float] = []
        now = time.perf_counter()
        while now < until:
            cursor.execute(self._questions[len(latencies) % len(self._questions)]).fetchall()
            ended = time.perf_counter()
            latencies.append((ended - now) * 1000)
            now = ended
        return latencies


if __name__ == "__main__":
    pool = QueryPool(**json.loads(sys.stdin.readline()))
    pool.window(seconds=1.0)
    windows.serve_plain(pool.window)
