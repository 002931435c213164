"""What changed between two snapshots, read for whoever keeps the manifest (`storage.reading`).

Every process that reads does this after every publication, so the usual case, files that were
added and nothing else, is one statement. It tells too whether anything ended or took another shape
between the snapshots; only then that is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

import asyncpg

from lakebus.errors import SnapshotExpired
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import DataFile
from storage.catalog.interface import Erased, ManifestDelta, SchemaLife
from storage.postgres.file_rows import ERASED, FILE_COLUMNS, data_file, ended_by

#: Tags keep files that no later snapshot needs.
_WHOLE = f"""
SELECT {FILE_COLUMNS} FROM data_file f
 WHERE first_snapshot <= $1
   AND (last_snapshot IS NULL
        OR last_snapshot > (SELECT oldest_snapshot_id FROM lake)
        OR EXISTS (SELECT 1 FROM tag t WHERE t.snapshot_id >= f.first_snapshot
                                         AND t.snapshot_id < f.last_snapshot))
 ORDER BY first_snapshot, file_id"""
_RESHAPED = """(first_snapshot > $1 AND first_snapshot <= $2)
       OR (last_snapshot > $1 AND last_snapshot <= $2)"""
#: At least one row, and one a file. The rows of files that ended at or before the oldest snapshot
#: go when the files are deleted, so what ended after an older one may not all be there.
_ADDED = f"""
SELECT {FILE_COLUMNS}, l.erasure_count,
       l.oldest_snapshot_id > $1 OR EXISTS (
           SELECT FROM data_file
            WHERE last_snapshot > $1 AND last_snapshot <= $2 AND first_snapshot <= $1) AS has_ended,
       EXISTS (SELECT FROM table_schema WHERE {_RESHAPED}) AS is_reshaped
  FROM lake l LEFT JOIN data_file f ON f.first_snapshot > $1 AND f.first_snapshot <= $2
 ORDER BY first_snapshot, file_id"""
#: With a row of its own when the answer may lack some.
_ENDED = """
SELECT file_id, last_snapshot FROM data_file
 WHERE last_snapshot > $1 AND last_snapshot <= $2 AND first_snapshot <= $1
UNION ALL
SELECT NULL, oldest_snapshot_id FROM lake WHERE oldest_snapshot_id > $1"""
_SCHEMAS = """
SELECT s.table_id, s.version, s.first_snapshot, s.last_snapshot, s.definition, t.name,
       t.first_snapshot AS table_first, t.last_snapshot AS table_last
  FROM table_schema s JOIN lake_table t USING (table_id)
 WHERE (s.first_snapshot > $1 AND s.first_snapshot <= $2)
    OR (s.last_snapshot > $1 AND s.last_snapshot <= $2)
 ORDER BY s.table_id, s.version"""
_ERASURES = "SELECT erasure_count FROM lake"
#: The loop is given back after so many files: a million of them take many seconds.
_CHUNK = 2_000


class Connection(Protocol):
    """What is asked of a connection; each statement sees one state of the database."""

    async def fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]: ...

    async def fetchval(self, query: str, *arguments: object) -> int: ...


async def read_whole(connection: Connection, *, until: int) -> ManifestDelta:
    """Everything that the retained snapshots up to `until` consist of."""

    # Before the rest: never newer than it.
    erasures = await connection.fetchval(_ERASURES)
    rows = await connection.fetch(_WHOLE, until)
    schemas = await connection.fetch(_SCHEMAS, 0, until)
    erased = await connection.fetch(ERASED, None)
    files: list[DataFile] = []
    for start in range(0, len(rows), _CHUNK):
        files += (data_file(row, until) for row in rows[start : start + _CHUNK])
        await asyncio.sleep(0)
    return ManifestDelta(
        after=0,
        until=until,
        files=tuple(files),
        ended={},
        schemas=tuple(_schema_life(row, until) for row in schemas),
        erasures=erasures,
        erased=tuple(Erased(*row) for row in erased),
    )


async def read_addition(connection: Connection, *, after: int, until: int) -> ManifestDelta:
    """What `until` has over `after`. Raises SnapshotExpired when that is not all known any more."""

    rows = await connection.fetch(_ADDED, after, until)
    erasures, ended, schemas = rows[0]["erasure_count"], [], []
    if rows[0]["has_ended"] or rows[0]["is_reshaped"]:
        ended = await connection.fetch(_ENDED, after, until)
        for row in ended:
            if row["file_id"] is None:
                raise SnapshotExpired(
                    f"what ended after snapshot {after} is not all known any more",
                    oldest_snapshot_id=row["last_snapshot"],
                )
        schemas = await connection.fetch(_SCHEMAS, after, until)
        # After the rest: it tells whether that was read of another state.
        erasures = await connection.fetchval(_ERASURES)
    return ManifestDelta(
        after=after,
        until=until,
        files=tuple(data_file(row, until) for row in rows if row["file_id"] is not None),
        ended={row["file_id"]: row["last_snapshot"] for row in ended},
        schemas=tuple(_schema_life(row, until) for row in schemas),
        erasures=erasures,
        erased=(),
    )


def schema_of(
    table_id: int, name: str, version: int, definition: Mapping[str, object]
) -> TableSchema:
    columns: list[dict[str, object]] = definition["columns"]  # type: ignore[assignment]
    return TableSchema(
        table_id=table_id,
        name=name,
        version=version,
        columns=tuple(Column(**column) for column in columns),  # type: ignore[arg-type]
        partition_by=tuple(definition["partition_by"]),  # type: ignore[arg-type]
        sort_by=tuple(definition["sort_by"]),  # type: ignore[arg-type]
        retention=dict(definition["retention"]),  # type: ignore[call-overload]
    )


def _schema_life(row: asyncpg.Record, until: int) -> SchemaLife:
    return SchemaLife(
        schema=schema_of(row["table_id"], row["name"], row["version"], row["definition"]),
        first_snapshot=row["first_snapshot"],
        last_snapshot=ended_by(row["last_snapshot"], until),
        table_first_snapshot=row["table_first"],
        table_last_snapshot=ended_by(row["table_last"], until),
    )
