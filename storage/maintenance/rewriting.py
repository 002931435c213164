"""What a rewrite takes and gives: plain nouns (`storage.maintenance.rewrite` does the work)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lakebus.schemas import TableSchema
from lakebus.snapshots import ColumnStatistics, DataFile


@dataclass(frozen=True, slots=True)
class RowSum:
    """Rows and the sum of their hashes modulo 2^128: equal for equal multisets of rows (E1)."""

    rows: int
    hash_sum: int

    def __add__(self, other: RowSum) -> RowSum:
        return RowSum(self.rows + other.rows, (self.hash_sum + other.hash_sum) % 2**128)

    def __sub__(self, other: RowSum) -> RowSum:
        return RowSum(self.rows - other.rows, (self.hash_sum - other.hash_sum) % 2**128)


@dataclass(frozen=True, slots=True)
class RewriteInput:
    """A data file and where it lies on this machine."""

    file: DataFile
    path: Path


@dataclass(frozen=True, slots=True)
class RewriteRequest:
    """`schema` is the table's newest: outputs have its shape. Rows come out in the order of its
    `sort_by` (then shard, position, row), cut by its `partition_by` and at `target_file_bytes`.

    :param drop_places: an Arrow IPC file of the columns `$shard`, `$position`, `$row`: rows to
        leave out. None: none.
    :param keep_sql: SQL of ours over the table's columns; rows for which it is not true are left
        out. Never a caller's text. None: all are kept.
    """

    schema: TableSchema
    inputs: tuple[RewriteInput, ...]
    target_file_bytes: int
    memory_bytes: int
    threads: int
    temp_dir: Path
    drop_places: Path | None = None
    keep_sql: str | None = None


@dataclass(frozen=True, slots=True)
class RewrittenFile:
    """A finished Parquet file in the job's folder. `partition`: see `DataFile.partition`."""

    path: Path
    rows: int
    size_bytes: int
    sha256: str
    statistics: Mapping[int, ColumnStatistics]
    partition: str | None = None


@dataclass(frozen=True, slots=True)
class Rewritten:
    """`before` over the inputs, `after` over the finished files read back, `removed` over what was
    left out; `before - removed == after`, or the rewrite has raised."""

    files: tuple[RewrittenFile, ...]
    before: RowSum
    removed: RowSum
    after: RowSum
    seconds: float
    input_bytes: int = 0
    spilled_bytes: int = 0
    notes: Mapping[str, object] = field(default_factory=dict)
