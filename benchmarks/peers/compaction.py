"""Merging small files, by peers: `compaction.py PEER INPUT_DIR WORK_DIR THREADS`.

Runs in an environment of its own (`requirements/peers.txt`), because DuckLake is an extension of an
older DuckDB than lakebus uses. Loads every Parquet file of INPUT_DIR as one commit, in order of
names, then times the peer's own merge and nothing else. Prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

TARGET_FILE_BYTES = 128 * 1024 * 1024


class Stopwatch:
    """Wall and CPU seconds of this process from its making to `stop`."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()
        self.seconds = self.cpu_seconds = 0.0

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._began[0]
        self.cpu_seconds = time.process_time() - self._began[1]


def ducklake(inputs: list[Path], work: Path, threads: int) -> dict[str, Any]:
    """DuckLake with its catalog in a DuckDB file, its fastest; rows never inlined."""
    import duckdb
    import duckdb_extension_ducklake

    [extension] = Path(duckdb_extension_ducklake.__file__).parent.rglob("*.duckdb_extension")
    connection = duckdb.connect(config={"threads": threads})
    connection.execute("SET enable_progress_bar = false")
    connection.execute(f"LOAD '{extension}'")
    connection.execute(
        f"ATTACH 'ducklake:{work}/catalog.ducklake' AS lake"
        f" (DATA_PATH '{work}/data', DATA_INLINING_ROW_LIMIT 0)"
    )
    connection.execute(f"CREATE TABLE lake.t AS FROM read_parquet('{inputs[0]}') LIMIT 0")
    for path in inputs:
        connection.execute(f"INSERT INTO lake.t FROM read_parquet('{path}')")
    before = _files(connection)
    connection.execute(
        f"CALL lake.set_option('target_file_size', '{TARGET_FILE_BYTES // 1024**2}MB')"
    )
    took = Stopwatch()
    connection.execute("CALL ducklake_merge_adjacent_files('lake')")
    took.stop()
    after = _files(connection)
    [rows] = connection.execute("SELECT count(*) FROM lake.t").fetchone() or [0]
    return _report(f"ducklake (duckdb {duckdb.__version__})", took, before, after, rows)


def delta(inputs: list[Path], work: Path, threads: int) -> dict[str, Any]:
    """delta-rs `optimize.compact`."""
    import deltalake
    import pyarrow.parquet as pq

    for path in inputs:
        deltalake.write_deltalake(work / "t", pq.read_table(path), mode="append")
    table = deltalake.DeltaTable(work / "t")
    before = _delta_files(table)
    took = Stopwatch()
    table.optimize.compact(target_size=TARGET_FILE_BYTES, max_concurrent_tasks=threads)
    took.stop()
    table = deltalake.DeltaTable(work / "t")
    rows = table.to_pyarrow_dataset().count_rows()
    after = _delta_files(table)
    return _report(f"deltalake {deltalake.__version__}", took, before, after, rows)


def _files(connection: Any) -> tuple[int, int]:
    found = connection.execute(
        "SELECT count(*), sum(data_file_size_bytes) FROM ducklake_list_files('lake', 't')"
    ).fetchone()
    return int(found[0]), int(found[1])


def _delta_files(table: Any) -> tuple[int, int]:
    import pyarrow as pa

    sizes = pa.table(table.get_add_actions(flatten=True)).column("size_bytes").to_pylist()
    return len(sizes), sum(sizes)


def _report(
    peer: str, took: Stopwatch, before: tuple[int, int], after: tuple[int, int], rows: int
) -> dict[str, Any]:
    return {
        "engine": peer,
        "seconds": took.seconds,
        "cpu_seconds": took.cpu_seconds,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "files_in": before[0],
        "bytes_in": before[1],
        "files_out": after[0],
        "bytes_out": after[1],
        "rows": rows,
    }


PEERS = {"ducklake": ducklake, "delta": delta}


def main(peer: str, input_dir: str, work_dir: str, threads: str) -> None:
    inputs = sorted(Path(input_dir).glob("*.parquet"))
    work = Path(work_dir)
    work.mkdir(parents=True)
    print(json.dumps(PEERS[peer](inputs, work, int(threads))))


if __name__ == "__main__":
    main(*sys.argv[1:])
