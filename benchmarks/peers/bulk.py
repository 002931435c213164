"""Bulk insert of ready Arrow batches of 100,000 rows by DuckLake, as one writer with both cores.

Speaks the protocol of `benchmarks.windows`; a window inserts every batch once, a commit each.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import bulk_data, windows
from benchmarks.peers.stores import STORES


class Bulk:
    def __init__(self, order: dict[str, Any]) -> None:
        Path(order["folder"]).mkdir(parents=True, exist_ok=True)
        batches = bulk_data.read(order["batches"])
        self._rows = order["rows"]
        self._tables = []
        made = 0
        while made < self._rows:
            batch = batches[made // bulk_data.BATCH_ROWS % len(batches)]
            self._tables.append(bulk_data.with_ids(batch, made)[: self._rows - made])
            made += batch.num_rows
        self._store = STORES[order["store"]](
            dsn=order["dsn"], folder=order["folder"], threads=order["threads"]
        )
        self._store.create()
        self._store.open()

    def window(self) -> dict[str, Any]:
        latencies = []
        cpu, began = time.process_time(), time.perf_counter()
        for table in self._tables:
            sent = time.perf_counter()
            self._store.append(table)
            latencies.append((time.perf_counter() - sent) * 1000)
        took = time.perf_counter() - began
        return {
            "requests": len(latencies),
            "rows": self._rows,
            "published_s": round(took, 3),
            "rows_per_s": round(self._rows / took),
            "ack_ms_p50": sorted(latencies)[len(latencies) // 2],
            "client_cpu_us_per_request": round(
                (time.process_time() - cpu) * 1e6 / len(latencies), 1
            ),
        }


if __name__ == "__main__":
    windows.serve_plain(Bulk(json.loads(sys.stdin.readline())).window)
