"""Many small commits in a row by one writer, and queries over what they left.

Speaks the protocol of `benchmarks.windows`: a window commits, merges (DuckLake), or asks one query.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import windows
from benchmarks.peers import lake
from benchmarks.peers.batches import ArrowBatches
from benchmarks.peers.stores import STORES

_ROWS = 100


class History:
    def __init__(self, order: dict[str, Any]) -> None:
        Path(order["folder"]).mkdir(parents=True, exist_ok=True)
        self._order = order
        self._store = STORES[order["store"]](dsn=order["dsn"], folder=order["folder"], threads=2)
        self._store.create()
        self._store.open()
        self._batches = ArrowBatches(rows=_ROWS, seed=1, pool=1_000)
        self._reader: Any = None

    def window(self, *, step: str, **arguments: Any) -> dict[str, Any]:
        found: dict[str, Any] = getattr(self, f"_{step}")(**arguments)
        return found

    def _commit(self, *, commits: int, seconds: float) -> dict[str, Any]:
        """So many, or as many as the time allows."""

        latencies: list[float] = []
        end = time.perf_counter() + seconds
        for number in range(commits):
            batch = self._batches.batch(number)
            began = time.perf_counter()
            if began >= end:
                break
            self._store.append(batch)
            latencies.append((time.perf_counter() - began) * 1000)
        tenth = max(len(latencies) // 10, 1)
        first = statistics.median(latencies[:tenth])
        last = statistics.median(latencies[-tenth:])
        return {
            "requests": len(latencies),
            "first_tenth_ms_p50": round(first, 3),
            "last_tenth_ms_p50": round(last, 3),
            "growth": round(last / first, 3),
        }

    def _merge(self) -> dict[str, Any]:
        began = time.perf_counter()
        connection = self._connection()
        connection.execute("CALL ducklake_merge_adjacent_files('lake')")
        # A new connection: the files that the old one knows are not all there any more.
        connection.close()
        self._reader = None
        return {"seconds": round(time.perf_counter() - began, 2)}

    def _ask(self, *, sql: str) -> dict[str, Any]:
        began = time.perf_counter()
        rows = self._connection().execute(sql).fetchall()
        return {"ms": round((time.perf_counter() - began) * 1000, 3), "rows": len(rows)}

    def _connection(self) -> Any:
        if self._reader is None:
            data_path = str(Path(self._order["folder"]) / "data")
            self._reader = lake.connect(self._order["dsn"], data_path, threads=2)
        return self._reader


if __name__ == "__main__":
    windows.serve_plain(History(json.loads(sys.stdin.readline())).window)
