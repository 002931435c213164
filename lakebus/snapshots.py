"""Data files, commits (proposals) and snapshots (facts)."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ColumnStatistics:
    """Bounds of one column in one file, in DuckDB's order for the column's type (contract D11).

    `minimum` and `maximum` are canonical text of the type (`storage.files.statistics` defines it),
    or None when no bound is claimed: nothing but nulls, a NaN, an unordered type, or text too long
    to keep. A missing column has no entry at all and makes no claim.
    """

    null_count: int
    minimum: str | None = None
    maximum: str | None = None


@dataclass(frozen=True, slots=True)
class DataFile:
    """An immutable Parquet object. `statistics` is by column id.

    `partition`: JSON text of the values of the table's partition transforms that all its rows
    share, as `storage.files.partitions` writes them with the transforms' own text; None for a file
    that mixes partitions, or of a table without any. `layout`: how its rows are sorted (the
    table's `sort_by` at the rewrite, comma-separated), "" for the order of arrival.
    """

    file_id: uuid.UUID
    table_id: int
    schema_version: int
    object_key: str
    rows: int
    size_bytes: int
    sha256: str
    statistics: Mapping[int, ColumnStatistics]
    first_snapshot: int = 0
    last_snapshot: int | None = None
    partition: str | None = None
    layout: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An immutable state of all tables. `watermark` is by shard, exclusive."""

    snapshot_id: int
    parent_id: int | None
    history: uuid.UUID
    published_at: dt.datetime
    operation: str
    watermark: Mapping[int, int]
    summary: Mapping[str, object] = field(default_factory=dict)
