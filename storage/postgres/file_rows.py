"""Data files as rows of the database and as proposals to its functions."""

from __future__ import annotations

import asyncpg

from lakebus.snapshots import DataFile
from storage.files.statistics import statistics_from_json, statistics_to_json

FILE_COLUMNS = (
    "file_id, table_id, schema_version, first_snapshot, last_snapshot, object_key, rows,"
    " size_bytes, sha256, statistics, partition, layout"
)
#: What one erasure (or with null all of them) took from which snapshots.
ERASED = """
SELECT erasure_id, table_id, first_snapshot, last_snapshot, sum(rows)::bigint AS rows,
       count(*)::integer AS exchanged
  FROM erased_file WHERE $1::uuid IS NULL OR erasure_id = $1
 GROUP BY erasure_id, table_id, first_snapshot, last_snapshot"""


def data_file(row: asyncpg.Record, until: int) -> DataFile:
    """The file of a row, as of the snapshot `until`."""

    return DataFile(
        file_id=row["file_id"],
        table_id=row["table_id"],
        schema_version=row["schema_version"],
        object_key=row["object_key"],
        rows=row["rows"],
        size_bytes=row["size_bytes"],
        sha256=row["sha256"],
        statistics=statistics_from_json(row["statistics"]),
        first_snapshot=row["first_snapshot"],
        last_snapshot=ended_by(row["last_snapshot"], until),
        partition=row["partition"],
        layout=row["layout"],
    )


def file_proposal(file: DataFile) -> dict[str, object]:
    """What `publish` and `publish_swap` take; the snapshots of its life are theirs to give."""

    return {
        "file_id": str(file.file_id),
        "table_id": file.table_id,
        "schema_version": file.schema_version,
        "object_key": file.object_key,
        "rows": file.rows,
        "size_bytes": file.size_bytes,
        "sha256": file.sha256,
        "statistics": statistics_to_json(file.statistics),
        "partition": file.partition,
        "layout": file.layout,
    }


def ended_by(last_snapshot: int | None, until: int) -> int | None:
    """An end later than the delta belongs to a later delta."""

    return last_snapshot if last_snapshot is not None and last_snapshot <= until else None
