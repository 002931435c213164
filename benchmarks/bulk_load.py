"""Bulk ingest as a process of its own: large bodies by a few clients, made before the clock starts.

Speaks the protocol of `benchmarks.windows`; a window sends every body once, under new keys, and
ends when all is visible.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from benchmarks import bulk_data, windows
from benchmarks.http1 import Connection, Dropped
from benchmarks.measures import percentile

MEDIA_TYPES = {
    "arrow": "application/vnd.apache.arrow.stream",
    "parquet": "application/vnd.apache.parquet",
    "ndjson": "application/x-ndjson",
}


class BulkLoad:
    """`rows`: of all bodies; `body_rows`: of each."""

    def __init__(
        self, *, url: str, read_url: str, api_key: str, table: str, batches: str, form: str,
        clients: int, rows: int, body_rows: int,
    ) -> None:  # fmt: skip
        self._url, self._read_url, self._api_key = url, read_url, api_key
        self._path = f"/v1/tables/{table}/rows"
        self._headers = {"Content-Type": MEDIA_TYPES[form]}
        self._clients, self._rows = clients, rows
        self._bodies = [_body(form, one) for one in _tables(batches, rows, body_rows)]
        self._name = f"{table}-{time.time_ns()}"
        self._windows = 0

    async def window(self) -> dict[str, Any]:
        self._windows += 1
        waiting = list(range(len(self._bodies)))[::-1]
        latencies: list[float] = []
        failures: Counter[str] = Counter()
        tokens: dict[int, str] = {}

        async def client(number: int) -> None:
            connection = Connection(self._url, self._api_key)
            while waiting:
                body = waiting.pop()
                sent = time.perf_counter()
                tokens[number] = await self._post(connection, body, failures)
                latencies.append((time.perf_counter() - sent) * 1000)
            connection.close()

        cpu, began = time.process_time(), time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(self._clients)))
        cpu, acknowledged_s = time.process_time() - cpu, time.perf_counter() - began
        connection = Connection(self._read_url, self._api_key)
        answer = await connection.post_json(
            "/v1/visibility", {"token": list(tokens.values()), "timeout_ms": 100_000}
        )
        published_s = time.perf_counter() - began
        connection.close()
        return {
            "requests": len(self._bodies),
            "rows": self._rows,
            "body_bytes": sum(map(len, self._bodies)),
            "acknowledged_s": round(acknowledged_s, 3),
            "published_s": round(published_s, 3),
            "rows_per_s": round(self._rows / published_s),
            "ack_ms_p50": percentile(latencies, 0.5),
            "ack_ms_p99": percentile(latencies, 0.99),
            "visible": answer.status == 200,
            "failures": dict(failures),
            "load_cpu_us_per_request": round(cpu * 1e6 / len(self._bodies), 1),
            "load_share_of_a_core": round(cpu / acknowledged_s, 3),
        }

    async def _post(self, connection: Connection, number: int, failures: Counter[str]) -> str:
        """Until it is accepted; every refusal is counted."""

        headers = self._headers | {"Idempotency-Key": f"{self._name}-{self._windows}-{number}"}
        while True:
            try:
                answer = await connection.request(
                    "POST", self._path, body=self._bodies[number], headers=headers
                )
            except Dropped:
                failures["dropped"] += 1
                continue
            if answer.status == 202:
                return str(answer.json()["receipt"]["visibility_token"])
            failures[answer.code or str(answer.status)] += 1
            if answer.status not in (429, 503):
                raise RuntimeError(f"a bulk body was refused: {answer.body[:300]!r}")
            await asyncio.sleep(0.05)


def _tables(path: str, rows: int, body_rows: int) -> Iterator[pa.Table]:
    """Tables of `body_rows` until there are `rows`; batches come again with new ids."""

    batches = bulk_data.read(path)
    made = 0
    while made < rows:
        batch = bulk_data.with_ids(batches[made // bulk_data.BATCH_ROWS % len(batches)], made)
        for at in range(0, min(batch.num_rows, rows - made), body_rows):
            yield batch.slice(at, body_rows)
        made += batch.num_rows


def _body(form: str, table: pa.Table) -> bytes:
    if form == "ndjson":
        return "".join(map(_line, table.to_pylist())).encode()
    sink = io.BytesIO()
    if form == "parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def _line(row: dict[str, Any]) -> str:
    row = {**row, "ts": row["ts"].isoformat(), "amount": str(row["amount"])}
    return json.dumps(row, ensure_ascii=False) + "\n"


async def main() -> None:
    load = BulkLoad(**await windows.order())
    await windows.serve(load.window)


if __name__ == "__main__":
    windows.run(main())
