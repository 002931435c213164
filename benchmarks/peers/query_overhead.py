"""What DuckLake itself adds to a query: through the lake, and by DuckDB over the lake's own files.

200,000 rows in commits of 5,000, not merged. Speaks the protocol of `benchmarks.windows`.
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
from benchmarks.peers.stores import DuckLake

_COMMITS, _ROWS = 40, 5_000


class Overhead:
    def __init__(self, order: dict[str, Any]) -> None:
        import duckdb

        folder = Path(order["folder"])
        folder.mkdir(parents=True)
        store = DuckLake(dsn=order["dsn"], folder=str(folder), threads=2)
        store.create()
        store.open()
        batches = ArrowBatches(rows=_ROWS, seed=11, pool=4)
        for number in range(_COMMITS):
            store.append(batches.batch(number * 5))
        self._lake = lake.connect(order["dsn"], str(folder / "data"), threads=2)
        self._files = duckdb.connect(config={"threads": 2})
        paths = [str(path) for path in folder.rglob("*.parquet")]
        self._files.execute(f"CREATE VIEW t AS FROM read_parquet({paths!r})")

    def window(self, *, repeats: int) -> dict[str, Any]:
        through, direct = [], []
        for _ in range(repeats):
            began = time.perf_counter()
            self._lake.execute("SELECT count(*) FROM lake.t").fetchall()
            middle = time.perf_counter()
            self._files.execute("SELECT count(*) FROM t").fetchall()
            ended = time.perf_counter()
            through.append((middle - began) * 1000)
            direct.append((ended - middle) * 1000)
        lake_ms, files_ms = statistics.median(through), statistics.median(direct)
        return {
            "requests": repeats,
            "count_lake_ms_p50": round(lake_ms, 3),
            "count_files_ms_p50": round(files_ms, 3),
            "count_overhead_ms_p50": round(lake_ms - files_ms, 3),
        }


if __name__ == "__main__":
    windows.serve_plain(Overhead(json.loads(sys.stdin.readline())).window)
