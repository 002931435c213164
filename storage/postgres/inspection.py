"""What the validator reads of PostgreSQL. `storage.maintenance.inspection` tells the promises."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg

from lakebus.errors import Unavailable
from storage.catalog.interface import PublishedRange
from storage.maintenance.inspection import (
    AcceptedRows,
    AddedFiles,
    InspectedFile,
    InspectedHead,
    InspectedSnapshot,
    InspectedTag,
    View,
    WaitingPayload,
)
from storage.postgres.failures import reading
from storage.postgres.file_rows import data_file
from storage.postgres.pool import Pool

_PAGE = 5_000
#: Ends of files are told as they are.
_NEVER = 2**63 - 1
#: A busy machine may take its time between two pages; nobody waits for this transaction.
_IDLE_MS = 60_000

_HEAD = """
SELECT l.*, h.history_id, clock_timestamp() AS now FROM lake l JOIN history h USING (history_serial)
"""
_SNAPSHOTS = """
SELECT s.snapshot_id, s.parent_id, s.published_at, s.operation, s.watermark,
       s.summary -> 'tables' AS tables, s.expired_at IS NULL AS retained
  FROM snapshot s WHERE s.snapshot_id > $1 ORDER BY s.snapshot_id LIMIT $2"""
_RANGES = """
SELECT shard, lo, hi, snapshot_id FROM published_range
 WHERE shard = $1 AND lo > $2 ORDER BY lo LIMIT $3"""
# The one that begins before `lo` is found by its place in the order, not by a search.
_WITHIN = """
SELECT shard, lo, hi, snapshot_id FROM published_range
 WHERE shard = $1 AND lo < $3 AND hi > $2 AND lo >= coalesce(
       (SELECT max(p.lo) FROM published_range p WHERE p.shard = $1 AND p.lo <= $2), $2)
 ORDER BY lo LIMIT $4"""
_FILE = """
SELECT f.file_id, f.table_id, f.schema_version, f.first_snapshot, f.last_snapshot, f.object_key,
       f.rows, f.size_bytes, f.sha256, f.statistics, f.partition, f.layout,
       s.table_id IS NOT NULL AS has_schema, t.table_id IS NOT NULL AS has_table,
       t.last_snapshot AS table_last, c.state AS condemned, w.file_id IS NOT NULL AS has_intent
  FROM data_file f
  LEFT JOIN table_schema s ON s.table_id = f.table_id AND s.version = f.schema_version
  LEFT JOIN lake_table t ON t.table_id = f.table_id
  LEFT JOIN condemned_file c ON c.file_id = f.file_id
  LEFT JOIN write_intent w ON w.file_id = f.file_id"""
_FILES = f"{_FILE} WHERE f.file_id > $1 ORDER BY f.file_id LIMIT $2"
_ADDED = """
SELECT first_snapshot, table_id, sum(files)::bigint AS files, sum(rows)::bigint AS rows,
       sum(size_bytes)::bigint AS size_bytes
  FROM (SELECT first_snapshot, table_id, 1 AS files, rows, size_bytes FROM data_file
         WHERE first_snapshot = ANY ($1)
        UNION ALL SELECT first_snapshot, table_id, files, rows, size_bytes FROM erased_file
         WHERE first_snapshot = ANY ($1)) a
 GROUP BY first_snapshot, table_id"""
# The first group of a range is the last that begins at it or before.
_ACCEPTED = """
SELECT p.snapshot_id, sum(p.hi - p.lo)::bigint AS positions,
       coalesce(sum(l.logged), 0)::bigint AS logged,
       (coalesce(sum(l.rows), 0) - coalesce(sum(q.rows), 0))::bigint AS rows
  FROM published_range p
  LEFT JOIN LATERAL (
        SELECT sum(least(b.hi, p.hi) - greatest(b.lo, p.lo)) AS logged, sum((
               SELECT sum(n) FROM unnest(b.row_counts[
                   greatest(p.lo - b.lo, 0) + 1 : least(p.hi, b.hi) - b.lo]) n)) AS rows
          FROM bus_log b
         WHERE b.shard = p.shard AND b.lo < p.hi AND b.hi > p.lo AND b.lo >= coalesce((
               SELECT f.lo FROM bus_log f WHERE f.shard = p.shard AND f.lo <= p.lo
                ORDER BY f.lo DESC LIMIT 1), p.lo)) l ON true
  LEFT JOIN LATERAL (
        SELECT sum(b.rows) AS rows FROM bus_quarantine b
         WHERE b.kind = 'entry' AND b.shard = p.shard
           AND b.position >= p.lo AND b.position < p.hi) q ON true
 WHERE p.snapshot_id = ANY ($1) GROUP BY p.snapshot_id"""
_SHARED = """
SELECT object_key, array_agg(file_id ORDER BY file_id) AS files FROM data_file
 GROUP BY object_key HAVING count(*) > 1 ORDER BY object_key LIMIT $1"""
_TAGS = """
SELECT t.name, t.snapshot_id, s.snapshot_id IS NOT NULL AND s.expired_at IS NULL AS readable
  FROM tag t LEFT JOIN snapshot s USING (snapshot_id) ORDER BY t.name"""
_WAITING = """
SELECT l.shard, l.lo, l.hi, l.payload_key,
       EXISTS (SELECT 1 FROM bus_segment s WHERE s.segment_id = l.segment_id) AS has_bytes
  FROM bus_log l, lake h WHERE l.hi > h.watermark[l.shard + 1]"""
_UNKNOWN = """
SELECT i.id, (SELECT c.state FROM condemned_file c WHERE c.file_id = i.id) AS condemned
  FROM unnest($1::uuid[]) AS i (id)
 WHERE NOT EXISTS (SELECT 1 FROM data_file f WHERE f.file_id = i.id)
   AND NOT EXISTS (SELECT 1 FROM write_intent w WHERE w.file_id = i.id)"""
_PAYLOADS = "SELECT payload_key FROM bus_log WHERE payload_key = ANY ($1)"
_SAMPLED = """
SELECT report -> 'sample' ->> 'next' FROM job
 WHERE kind = 'validate' AND state = 'done' AND report -> 'sample' ->> 'next' IS NOT NULL
 ORDER BY created_at DESC LIMIT 1"""


class PostgresInspection:
    """`keeps_marker`: whether the lake was opened with an object store."""

    def __init__(self, *, pool: Pool, keeps_marker: bool) -> None:
        self._pool = pool
        self.keeps_marker = keeps_marker

    @asynccontextmanager
    async def look(self) -> AsyncIterator[View]:
        async with self._pool.connection() as connection:
            with reading():
                transaction = connection.transaction(isolation="repeatable_read", readonly=True)
                await transaction.start()
            try:
                with reading():
                    await connection.execute(
                        f"SET LOCAL idle_in_transaction_session_timeout = {_IDLE_MS}"
                    )
                yield PostgresView(connection)
            finally:
                # There is nothing to undo where the connection broke; what the view has told stays
                # right. The pool takes such a connection back at once, and from then on it cannot
                # even be asked whether it is closed.
                with suppress(Unavailable), reading():
                    await transaction.rollback()

    async def file(self, file_id: uuid.UUID) -> InspectedFile | None:
        rows = await self._all(f"{_FILE} WHERE f.file_id = $1", file_id)
        return _file(rows[0]) if rows else None

    async def ranges_within(
        self, shard: int, lo: int, hi: int, *, limit: int
    ) -> Sequence[PublishedRange]:
        return [PublishedRange(*row) for row in await self._all(_WITHIN, shard, lo, hi, limit)]

    async def waiting_payloads(self) -> AsyncIterator[WaitingPayload]:
        after = (-1, -1)
        statement = f"{_WAITING} AND (l.shard, l.lo) > ($1, $2) ORDER BY l.shard, l.lo LIMIT $3"
        while rows := await self._all(statement, *after, _PAGE):
            for row in rows:
                yield WaitingPayload(*row)
            after = (rows[-1]["shard"], rows[-1]["lo"])

    async def waiting_payload(self, shard: int, lo: int) -> WaitingPayload | None:
        rows = await self._all(f"{_WAITING} AND l.shard = $1 AND l.lo = $2", shard, lo)
        return WaitingPayload(*rows[0]) if rows else None

    async def quarantine_without_payload(self, *, limit: int) -> Sequence[int]:
        rows = await self._all(
            "SELECT quarantine_id FROM bus_quarantine"
            " WHERE dropped_at IS NULL AND payload IS NULL ORDER BY quarantine_id LIMIT $1",
            limit,
        )
        return [row[0] for row in rows]

    async def unknown(self, ids: Sequence[uuid.UUID]) -> Mapping[uuid.UUID, str]:
        keys = {f"bus/{one}.segment": one for one in ids}
        # The log first: a payload that is trimmed meanwhile is condemned by the same transaction.
        held = {keys[row[0]] for row in await self._all(_PAYLOADS, list(keys))}
        rows = await self._all(_UNKNOWN, list(ids))
        states = {None: "unknown", "deleted": "deleted"}
        return {
            row["id"]: states[row["condemned"]]
            for row in rows
            if row["id"] not in held and row["condemned"] in states
        }

    async def last_report(self) -> Mapping[str, Any] | None:
        rows = await self._all(
            "SELECT report FROM job WHERE kind = 'validate' AND state = 'done'"
            " ORDER BY created_at DESC LIMIT 1"
        )
        return rows[0]["report"] if rows else None

    async def sampled_until(self) -> uuid.UUID | None:
        rows = await self._all(_SAMPLED)
        return uuid.UUID(rows[0][0]) if rows else None

    async def _all(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        async with self._pool.connection() as connection:
            with reading():
                return list(await connection.fetch(statement, *arguments))


class PostgresView:
    """Reads of one transaction."""

    def __init__(self, connection: asyncpg.pool.PoolConnectionProxy[asyncpg.Record]) -> None:
        self._connection = connection

    async def head(self) -> InspectedHead:
        rows = await self._all(_HEAD)
        if not rows:
            raise Unavailable("the database holds no lake")
        row = rows[0]
        return InspectedHead(
            lake_id=row["lake_id"],
            history=row["history_id"],
            snapshot_id=row["snapshot_id"],
            published_at=row["published_at"],
            publish_count=row["publish_count"],
            oldest_snapshot_id=row["oldest_snapshot_id"],
            watermark=tuple(row["watermark"]),
            now=row["now"],
        )

    async def snapshots(self) -> AsyncIterator[InspectedSnapshot]:
        after = -(2**62)
        while rows := await self._all(_SNAPSHOTS, after, _PAGE):
            for row in rows:
                yield InspectedSnapshot(
                    snapshot_id=row["snapshot_id"],
                    parent_id=row["parent_id"],
                    published_at=row["published_at"],
                    operation=row["operation"],
                    watermark=tuple(row["watermark"]),
                    tables=row["tables"] or {},
                    retained=row["retained"],
                )
            after = rows[-1]["snapshot_id"]

    async def ranges(self, shard: int) -> AsyncIterator[PublishedRange]:
        after = -(2**62)
        while rows := await self._all(_RANGES, shard, after, _PAGE):
            for row in rows:
                yield PublishedRange(*row)
            after = rows[-1]["lo"]

    async def files(self) -> AsyncIterator[InspectedFile]:
        after = uuid.UUID(int=0)
        while rows := await self._all(_FILES, after, _PAGE):
            for row in rows:
                yield _file(row)
            after = rows[-1]["file_id"]

    async def sample(self, after: uuid.UUID, *, limit: int) -> Sequence[InspectedFile]:
        return [_file(row) for row in await self._all(_FILES, after, limit)]

    async def added(self, snapshot_ids: Sequence[int]) -> Mapping[tuple[int, int], AddedFiles]:
        return {
            (row["first_snapshot"], row["table_id"]): AddedFiles(
                row["files"], row["rows"], row["size_bytes"]
            )
            for row in await self._all(_ADDED, list(snapshot_ids))
        }

    async def accepted(self, snapshot_ids: Sequence[int]) -> Mapping[int, AcceptedRows]:
        return {
            row["snapshot_id"]: AcceptedRows(row["positions"], row["logged"], row["rows"])
            for row in await self._all(_ACCEPTED, list(snapshot_ids))
        }

    async def shared_objects(self, *, limit: int) -> Sequence[tuple[str, Sequence[uuid.UUID]]]:
        return [(row["object_key"], row["files"]) for row in await self._all(_SHARED, limit)]

    async def tags(self) -> Sequence[InspectedTag]:
        return [InspectedTag(*row) for row in await self._all(_TAGS)]

    async def expired_pins(self, *, before: dt.datetime) -> Sequence[tuple[uuid.UUID, str]]:
        rows = await self._all(
            "SELECT pin_id, kind FROM pin WHERE expires_at < $1 ORDER BY pin_id", before
        )
        return [(row["pin_id"], row["kind"]) for row in rows]

    async def _all(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        with reading():
            return list(await self._connection.fetch(statement, *arguments))


def _file(row: asyncpg.Record) -> InspectedFile:
    return InspectedFile(
        file=data_file(row, _NEVER),
        has_schema=row["has_schema"],
        has_table=row["has_table"],
        table_last_snapshot=row["table_last"],
        condemned=row["condemned"],
        has_intent=row["has_intent"],
    )
