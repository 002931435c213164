"""Places of rows: published when their file was, and each once in the newest snapshot.

The places of all files that were read go into a small DuckDB database in the job's folder, which
sorts them within a bound of memory and spills beyond it; so memory does not grow with the lake.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa

from lakebus.snapshots import DataFile
from storage.catalog.interface import PublishedRange

_TWICE_MAX = 1_000
_BATCH_ROWS = 200_000


@dataclass(frozen=True, slots=True)
class Twice:
    """`rows` places are in all of these files, one of them at `position` of `shard`."""

    files: tuple[uuid.UUID, ...]
    rows: int
    shard: int
    position: int


def unpublished_intervals(
    ranges: Sequence[PublishedRange], *, lo: int, hi: int, snapshot_id: int
) -> list[tuple[int, int]]:
    """The parts of [lo, hi) that no range published until `snapshot_id` covers."""

    found: list[tuple[int, int]] = []
    reached = lo
    for one in ranges:
        if one.snapshot_id > snapshot_id or one.hi <= reached:
            continue
        if one.lo > reached:
            found.append((reached, min(one.lo, hi)))
        reached = one.hi
        if reached >= hi:
            return found
    found.append((reached, hi))
    return found


class PlaceTable:
    """Places of the rows of live files. Blocking; one thread at a time."""

    def __init__(self, folder: Path, *, memory_bytes: int, threads: int) -> None:
        self._files: list[uuid.UUID] = []
        self._given: list[pa.Table] = []
        self._given_rows = 0
        self._connection = duckdb.connect(
            str(folder / "places.duckdb"),
            config={
                "memory_limit": f"{memory_bytes // (1024 * 1024)}MiB",
                "temp_directory": str(folder / "places.spill"),
                "threads": threads,
                "preserve_insertion_order": False,
            },
        )
        self._connection.execute(
            "CREATE TABLE places"
            " (file INTEGER, table_id INTEGER, shard SMALLINT, position BIGINT, row_number INTEGER)"
        )

    def add(self, file: DataFile, rows: pa.Table) -> None:
        """Rows of the three hidden columns."""

        if not self._files or self._files[-1] != file.file_id:
            self._files.append(file.file_id)
        number = pa.repeat(pa.scalar(len(self._files) - 1, pa.int32()), rows.num_rows)
        table_id = pa.repeat(pa.scalar(file.table_id, pa.int32()), rows.num_rows)
        self._given.append(rows.append_column("file", number).append_column("table_id", table_id))
        self._given_rows += rows.num_rows
        if self._given_rows >= _BATCH_ROWS:
            self._insert()

    def _insert(self) -> None:
        """In large batches: each insert is a transaction, and small files are many."""

        given, self._given, self._given_rows = self._given, [], 0
        if given:
            self._connection.register("given", pa.concat_tables(given))
            self._connection.execute(
                'INSERT INTO places SELECT file, table_id, "$shard", "$position", "$row" FROM given'
            )
            self._connection.unregister("given")

    def twice(self) -> list[Twice]:
        """Groups of files (with a file twice when it has the place twice itself) that hold rows of
        the same places."""

        self._insert()
        found = self._connection.execute(
            "SELECT files, count(*), any_value(shard), any_value(position) FROM ("
            "  SELECT list(file ORDER BY file) AS files, shard, position FROM places"
            "   GROUP BY table_id, shard, position, row_number HAVING count(*) > 1)"
            " GROUP BY files ORDER BY files LIMIT ?",
            [_TWICE_MAX],
        ).fetchall()
        return [
            Twice(tuple(self._files[file] for file in files), rows, shard, position)
            for files, rows, shard, position in found
        ]

    def close(self) -> None:
        self._connection.close()
