"""The catalog in PostgreSQL. See `storage.catalog.interface.Catalog` for what is promised.

Reads are single statements, so each sees one snapshot of the database. Writes are single calls of
server-side functions (`storage/sql/functions/publish.sql`, `tables.sql`).
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import asyncpg

from lakebus.clock import format_time, new_uuid
from lakebus.errors import (
    HistoryLost,
    SchemaVersionMismatch,
    SnapshotExpired,
    SnapshotNotFound,
    TableExists,
    TableNotFound,
    TimeInFuture,
    Unavailable,
)
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import Snapshot
from storage.bus.settings import BusSettings
from storage.catalog.interface import (
    Commit,
    CommitOutcome,
    DropTicket,
    Head,
    LakeIdentity,
    ManifestDelta,
    Published,
    PublishedRange,
    TableChange,
    TableState,
)
from storage.postgres.deltas import read_addition, read_whole, schema_of
from storage.postgres.failures import reading, writing
from storage.postgres.file_rows import file_proposal
from storage.postgres.identity import read_identity
from storage.postgres.pool import Pool
from storage.postgres.rewind import HistoryGuard

_HEAD = """
SELECT l.snapshot_id, l.published_at, l.closed_until, l.watermark, l.oldest_snapshot_id,
       l.erasure_count, l.erasures_owed, l.erasures_serial = l.history_serial AS compared,
       h.history_id, clock_timestamp() AS now
  FROM lake l JOIN history h USING (history_serial)"""
_SNAPSHOT = """
SELECT s.*, h.history_id FROM snapshot s JOIN history h USING (history_serial)"""
_FORK_OVER_ID = """
SELECT * FROM history WHERE parent_serial IS NOT NULL AND fork_snapshot_id < $1
 ORDER BY fork_snapshot_id DESC LIMIT 1"""
_FORK_OVER_TIME = """
SELECT * FROM history WHERE fork_time < $1 AND began_at > $1 LIMIT 1"""
_REMOVED = """
SELECT EXISTS (SELECT FROM snapshot
    WHERE snapshot_id > $1 AND snapshot_id <= $2 AND operation IN ('delete', 'retain')
      AND summary -> 'tables' ? $3)"""
_RANGES = """
SELECT shard, lo, hi, snapshot_id FROM published_range
 WHERE snapshot_id > $1 AND snapshot_id <= $2 AND (shard > $3 OR (shard = $3 AND hi > $4))
 ORDER BY shard, lo LIMIT $5"""
_LIVE_TABLES = """
SELECT t.table_id, t.name, t.state, s.version, s.definition
  FROM lake_table t JOIN table_schema s ON s.table_id = t.table_id AND s.version = t.version
 WHERE t.state <> 'dropped'"""
#: Statements of their own, and bounds that are always there: under a generic plan "none given or
#: equal" is no condition of an index.
_TABLE = f"{_LIVE_TABLES} AND t.name = $1"
_TABLES = f"{_LIVE_TABLES} ORDER BY t.name"
_SNAPSHOTS = f"""{_SNAPSHOT}
 WHERE s.expired_at IS NULL AND s.snapshot_id < coalesce($2::bigint, {2**63 - 1})
 ORDER BY s.snapshot_id DESC LIMIT $1"""
_PUBLISH = "SELECT * FROM publish($1, $2, $3, $4, $5)"


class PostgresCatalog:
    def __init__(
        self,
        *,
        pool: Pool,
        scans: Pool,
        settings: BusSettings,
        guard: HistoryGuard,
        compare_erasures: Callable[[], Awaitable[None]],
    ) -> None:
        self._guard = guard
        self._compare_erasures = compare_erasures
        self._pool = pool
        self._scans = scans
        self._settings = settings

    async def identity(self) -> LakeIdentity:
        identity, _ = await read_identity(self._pool)
        return identity

    # --- snapshots ---------------------------------------------------------------------

    async def head(self) -> Head:
        row = await self._one(_HEAD)
        if row is not None and not row["compared"]:
            await self._compare_erasures()
            row = await self._one(_HEAD)
        if row is None or not row["compared"]:
            raise Unavailable("the database holds no lake, or a new line of history just began")
        self._guard.saw_head(row["history_id"], row["snapshot_id"])
        return Head(
            snapshot_id=row["snapshot_id"],
            published_at=row["published_at"],
            history=row["history_id"],
            watermark=dict(enumerate(row["watermark"])),
            closed_until=row["closed_until"],
            now=row["now"],
            oldest_snapshot_id=row["oldest_snapshot_id"],
            erasures=row["erasure_count"],
            erasures_owed=frozenset(row["erasures_owed"]),
        )

    async def snapshot(self, snapshot_id: int) -> Snapshot:
        row = None
        if 0 < snapshot_id < 2**63:
            row = await self._one(f"{_SNAPSHOT} WHERE s.snapshot_id = $1", snapshot_id)
        if row is not None:
            return await self._readable(row)
        head = await self.head()
        if 0 < snapshot_id <= head.snapshot_id:
            # Ids are dense within a line of history and skipped at the beginning of one (F3).
            fork = await self._one(_FORK_OVER_ID, snapshot_id)
            raise HistoryLost(
                f"snapshot {snapshot_id} belonged to a line of history that was lost",
                **_nearest(fork),
            )
        raise SnapshotNotFound(f"there is no snapshot {snapshot_id}")

    async def snapshot_at(self, time: dt.datetime) -> Snapshot:
        async with self._pool.connection() as connection:
            with reading():  # closing a time twice, or in vain, is harmless
                closed = await connection.fetchval("SELECT close_time($1)", time)
                if not closed:
                    raise TimeInFuture(
                        f"{format_time(time)} is later than the database's clock and the newest "
                        "snapshot"
                    )
                fork = await connection.fetchrow(_FORK_OVER_TIME, time)
                if fork is not None:
                    raise HistoryLost(
                        f"{format_time(time)} lies in a line of history that was lost",
                        **_nearest(fork),
                    )
                row = await connection.fetchrow(
                    f"{_SNAPSHOT} WHERE s.published_at <= $1 ORDER BY s.published_at DESC LIMIT 1",
                    time,
                )
        if row is None:
            raise SnapshotNotFound(f"the lake did not exist at {format_time(time)}")
        return await self._readable(row)

    async def snapshots(self, *, limit: int, before: int | None = None) -> Sequence[Snapshot]:
        rows = await self._all(_SNAPSHOTS, limit, before)
        return [_snapshot(row) for row in rows]

    async def _readable(self, row: asyncpg.Record) -> Snapshot:
        if row["expired_at"] is not None:
            head = await self.head()
            raise SnapshotExpired(
                f"snapshot {row['snapshot_id']} has expired",
                oldest_snapshot_id=head.oldest_snapshot_id,
            )
        return _snapshot(row)

    # --- tables ------------------------------------------------------------------------

    async def create_table(
        self,
        *,
        name: str,
        columns: Sequence[Column],
        partition_by: Sequence[str] = (),
        sort_by: Sequence[str] = (),
        retention: Mapping[str, object] | None = None,
        if_not_exists: bool = False,
        actor: str = "",
    ) -> TableChange:
        numbered = tuple(
            dataclasses.replace(column, column_id=number)
            for number, column in enumerate(columns, start=1)
        )
        schema = TableSchema(
            table_id=0,
            name=name,
            version=1,
            columns=numbered,
            partition_by=tuple(partition_by),
            sort_by=tuple(sort_by),
            retention=dict(retention or {}),
        )
        row = await self._write(
            "SELECT * FROM create_table($1, $2, $3)", name, definition_of(schema), new_uuid()
        )
        if not row["created"]:
            if not if_not_exists:
                raise TableExists(f"there is a table {name} already")
            state = await self.table(name)
            if state is None:
                raise Unavailable("the table was dropped meanwhile; try again")
            return TableChange(state.schema, row["snapshot_id"], created=False)
        return TableChange(
            dataclasses.replace(schema, table_id=row["table_id"]), row["snapshot_id"]
        )

    async def alter_table(
        self, *, schema: TableSchema, expected_version: int, actor: str = ""
    ) -> TableChange:
        row = await self._write(
            "SELECT * FROM alter_table($1, $2, $3, $4)",
            schema.table_id,
            expected_version,
            definition_of(schema),
            new_uuid(),
        )
        if row["outcome"] == "not_found":
            raise TableNotFound(f"there is no table {schema.name}")
        if row["outcome"] == "version":
            raise SchemaVersionMismatch(
                f"the table {schema.name} is at schema version {row['version']}",
                schema_version=row["version"],
            )
        changed = schema_of(schema.table_id, schema.name, row["version"], row["definition"])
        return TableChange(changed, row["snapshot_id"])

    async def begin_drop(self, *, name: str, actor: str = "") -> DropTicket:
        row = await self._write("SELECT * FROM begin_drop($1)", name)
        if row["table_id"] is None:
            raise TableNotFound(f"there is no table {name}")
        return DropTicket(row["table_id"], name, dict(enumerate(row["positions"])))

    async def finish_drop(self, ticket: DropTicket) -> int:
        row = await self._write("SELECT * FROM finish_drop($1, $2)", ticket.table_id, new_uuid())
        if row["outcome"] == "pending":
            raise Unavailable(
                "entries accepted before the drop are not published yet", retry_after_s=0.1
            )
        if row["outcome"] == "not_found":
            raise TableNotFound(f"the table {ticket.name} is not being dropped")
        return int(row["snapshot_id"])

    async def closing_tables(self) -> Sequence[DropTicket]:
        rows = await self._all(
            "SELECT table_id, name, closing_positions FROM lake_table WHERE state = 'closing'"
        )
        return [
            DropTicket(row["table_id"], row["name"], dict(enumerate(row["closing_positions"])))
            for row in rows
        ]

    async def table(self, name: str) -> TableState | None:
        row = await self._one(_TABLE, name)
        return None if row is None else _table_state(row)

    async def tables(self) -> Sequence[TableState]:
        return [_table_state(row) for row in await self._all(_TABLES)]

    async def schema_version(self, table_id: int, version: int) -> TableSchema | None:
        row = await self._one(
            "SELECT s.definition, t.name FROM table_schema s JOIN lake_table t USING (table_id)"
            " WHERE s.table_id = $1 AND s.version = $2",
            table_id,
            version,
        )
        return None if row is None else schema_of(table_id, row["name"], version, row["definition"])

    # --- publication -------------------------------------------------------------------

    async def publish(self, publication_id: uuid.UUID, commits: Sequence[Commit]) -> Published:
        payloads: list[bytes] = []
        proposals = [_proposal(commit, payloads) for commit in commits]
        # failpoint: catalog.before_publish
        row = await self._write(
            _PUBLISH,
            publication_id,
            proposals,
            payloads,
            self._settings.quarantine_rate_max,
            dt.timedelta(seconds=self._settings.quarantine_window_s),
        )
        return _published(row)

    async def publish_outcome(self, publication_id: uuid.UUID) -> Published | None:
        async with self._pool.connection() as connection:
            with reading():
                # The head row first: a transaction of this publication still in flight holds it,
                # so what is read after it is the end of the story (C5). One statement, one batch.
                await connection.execute("SELECT 1 FROM lake FOR UPDATE")
                row = await connection.fetchrow(
                    "SELECT snapshot_id, published_at, watermark,"
                    " summary -> 'outcomes' AS outcomes FROM snapshot WHERE publication_id = $1",
                    publication_id,
                )
        return None if row is None else _published(row)

    async def published_ranges(
        self, *, after: int, until: int, shard: int = 0, position: int = 0, limit: int = 1_000
    ) -> Sequence[PublishedRange]:
        async with self._scans.connection() as connection:
            with reading():
                rows = await connection.fetch(_RANGES, after, until, shard, position, limit)
        return [PublishedRange(*row) for row in rows]

    async def removed_rows(self, table_id: int, *, after: int, until: int) -> bool:
        row = await self._one(_REMOVED, after, until, str(table_id))
        assert row is not None
        return bool(row[0])

    async def manifest_delta(self, *, after: int, until: int) -> ManifestDelta:
        async with self._scans.connection() as connection:
            with reading():
                if after == 0:
                    return await read_whole(connection, until=until)
                return await read_addition(connection, after=after, until=until)

    # --- plumbing ----------------------------------------------------------------------

    async def _one(self, statement: str, *arguments: object) -> asyncpg.Record | None:
        async with self._pool.connection() as connection:
            with reading():
                return await connection.fetchrow(statement, *arguments)

    async def _all(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        async with self._pool.connection() as connection:
            with reading():
                return list(await connection.fetch(statement, *arguments))

    async def _write(self, statement: str, *arguments: object) -> asyncpg.Record:
        async with self._pool.connection() as connection:
            with writing():
                row = await connection.fetchrow(statement, *arguments)
        self._guard.changed()
        assert row is not None
        return row


def _snapshot(row: asyncpg.Record) -> Snapshot:
    return Snapshot(
        snapshot_id=row["snapshot_id"],
        parent_id=row["parent_id"],
        history=row["history_id"],
        published_at=row["published_at"],
        operation=row["operation"],
        watermark=dict(enumerate(row["watermark"])),
        summary={k: v for k, v in row["summary"].items() if k != "outcomes"},
    )


def _nearest(fork: asyncpg.Record | None) -> dict[str, Any]:
    """What can still be read around a fork: the newest that was kept, and since when again."""

    if fork is None:
        return {}
    return {
        "newest_kept_snapshot_id": fork["fork_snapshot_id"],
        "kept_until": format_time(fork["fork_time"]) if fork["fork_time"] else None,
        "lost_until": format_time(fork["began_at"]),
    }


def definition_of(schema: TableSchema) -> dict[str, object]:
    return {
        "columns": [
            {
                "column_id": column.column_id,
                "name": column.name,
                "type": column.type,
                "nullable": column.nullable,
            }
            for column in schema.columns
        ],
        "partition_by": list(schema.partition_by),
        "sort_by": list(schema.sort_by),
        "retention": schema.retention,
    }


def _table_state(row: asyncpg.Record) -> TableState:
    schema = schema_of(row["table_id"], row["name"], row["version"], row["definition"])
    return TableState(schema, open=row["state"] == "open")


def _proposal(commit: Commit, payloads: list[bytes]) -> dict[str, object]:
    quarantined = []
    for entry in commit.quarantined:
        payloads.append(entry.payload)
        quarantined.append(
            {
                "position": entry.position,
                "reason": entry.reason[:2_000],
                "attempts": entry.attempts,
                "by_crash": entry.by_crash,
                "payload": len(payloads),
            }
        )
    return {
        "commit_id": str(commit.commit_id),
        "lease_id": commit.lease.lease_id,
        "epoch": commit.lease.epoch,
        "shard": commit.lease.shard,
        "lo": commit.lease.lo,
        "hi": commit.lease.hi,
        "owner": str(commit.owner),
        "range_bytes": commit.range_bytes,
        "quarantined": quarantined,
        "files": [file_proposal(file) for file in commit.files],
    }


def _published(row: asyncpg.Record) -> Published:
    return Published(
        snapshot_id=row["snapshot_id"],
        published_at=row["published_at"],
        outcomes={
            uuid.UUID(commit_id): CommitOutcome(outcome)
            for commit_id, outcome in row["outcomes"].items()
        },
        watermark=dict(enumerate(row["watermark"])),
    )
